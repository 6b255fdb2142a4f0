"""Conversations from JSON lines, one a line: {"messages", "tools"?, "bucket"}. What is wrong is refused with file and line, never repaired.

A line {"text", ...} is a plain document instead; its other keys (a url, an id) are not read.
"""
import difflib
import gzip
import json

from tokenizer import validate_messages

BUCKETS = ("chat", "math", "code", "tool")
KEYS = {"messages", "tools", "bucket"}


def open_lines(path):
    """Binary file object of a .jsonl or .jsonl.gz."""
    return gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb")


def parse_line(line, where, bucket=None):
    """-> {"messages", "tools" (None if absent), "bucket"}, or {"text"}. Raises ValueError that begins with `where`.

    The messages themselves are checked where they are used: by `read` here, by the tokenizer when it renders them.
    line: bytes. where: "file:line". bucket: name given by the user (--data=name=path); it then holds for every conversation.
    """
    record = _parse_json(line, where)
    if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
        raise ValueError(f'{where}: expected an object with either "messages" or "text", found {_short(record)}')
    if "text" in record:
        if not isinstance(record["text"], str):
            raise ValueError(f'{where}: expected a string in "text", found {_short(record["text"])}')
        return {"text": record["text"]}
    for key in record.keys() - KEYS:
        near = difflib.get_close_matches(key, KEYS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: unknown key {key!r}, expected messages, tools and bucket{hint}")
    found = record.get("bucket")
    if bucket is None and found not in BUCKETS:             # a typo here would otherwise become a source of its own
        problem = "no bucket" if found is None else f"unknown bucket {_short(found)}"
        raise ValueError(f"{where}: {problem}, expected one of {', '.join(BUCKETS)} (or name the whole file: --data=NAME=PATH)")
    tools = record.get("tools")
    if not isinstance(tools, list | None):
        raise ValueError(f"{where}: expected a list of tools, found {_short(tools)}")
    return {"messages": record["messages"], "tools": tools, "bucket": bucket or found}


def read(path, bucket=None):
    """Yields the records of a .jsonl file, checked; blank lines are skipped."""
    with open_lines(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                record = parse_line(line, f"{path}:{number}", bucket)
                try:
                    if "messages" in record:
                        validate_messages(record["messages"], record["tools"])
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
                yield record


def first_user_message(messages):
    """What the validation split hashes: one question never sits on both sides of it."""
    return next((m["content"] for m in messages if m["role"] == "user"), messages[0].get("content") or "")


def _parse_json(line, where):
    def unique(pairs):
        record = dict(pairs)
        if len(record) < len(pairs):                        # json would keep the last one and say nothing
            raise ValueError(f"duplicate key in {sorted(k for k, _ in pairs)}")
        return record

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def _short(value):
    if isinstance(value, dict):
        return f"an object with keys {sorted(value)}"[:80]
    return repr(value)[:80]
