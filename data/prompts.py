r"""Rows of other people's files: prompts with references, preference pairs, KTO rows, and the invocation logs of Amazon Bedrock.

    read("rows.jsonl") -> Read("prompts", [Row(id, messages, reference, ...), ...], Counter(), ["rows.jsonl: 812 prompts, ..."])
    problems("rows.jsonl", grader="gsm8k", split="val") -> [Problem("rows/gsm8k", ...), ...]       graded by data.tasks

JSON lines, or one JSON array, plain or gzipped, a file or every file of a folder. What a file is, its records say, not its name:

    OpenAI chat, Bedrock RFT    messages, reference_answer?, id?, tools?, any other key (they are the metadata)
    SageMaker, verl RL          prompt (string or messages), data_source?, reward_model {ground_truth}?, extra_info {answer}?, any other key
    preference                  chosen and rejected (strings or messages), prompt or input? (else: the turns that both begin with)
    Converse preference         the last of messages has candidates [{content, preferenceLabel: preferred or non-preferred}, ...]
    scored / KTO                prompt, samples [{completion, score}, ...] / prompt, completion, label
    invocation log              schemaType ModelInvocationLog

`system` (a string or [{text}]) may stand beside the messages of any of them. Content blocks [{text}, ...] are joined, with nothing between
them. Strings that hold a chat template (Llama's and ChatML's headers, [INST], Human: / Assistant:) are parsed to turns. A record of another
kind or form stops with file and line; what is left out is left out for a reason that is counted.

Sources, as far as they are public: Bedrock's user guide (rft-prepare-data, model-invocation-logging), its API's RequestMetadataFilters,
SageMaker's guide (customizing-models-dpo, -rft; nova-dpo), and log records that people have published.
"""
import functools
import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import random_key
from data import gsm8k, ifeval, math500, mbpp
from data.grading import MAX_CHARS, Outcome, Problem, never_raises
from data.tokens import input_files
from tokenizer import load_strict, to_json, validate_messages

BEDROCK_ROWS = (100, 20_000)
GRADERS = ("exact", "gsm8k", "math", "ifeval", "code", "none")
# the last word of a data_source, in lower case -> the grader that its references are made for
SOURCES = {"gsm8k": "gsm8k", "ifeval": "ifeval", "mbpp": "code", **dict.fromkeys(
    ("math", "math500", "math-500", "math_500", "math-lighteval", "hendrycks_math", "competition_math"), "math")}


class Row(NamedTuple):
    id: str                    # the record's, else its line (of a folder: "file:line")
    messages: list             # the prompt; it ends with the user's turn, or with results of tools
    reference: object          # any JSON; None: the record has none
    metadata: dict             # the record's other keys as they are (of a log: requestMetadata)
    data_source: str
    tools: list | None         # OpenAI schemas
    where: str                 # "file:line"


class Pair(NamedTuple):
    messages: list
    chosen: list               # messages from the assistant's turn on, usually one
    rejected: list
    tools: list | None
    where: str


class Label(NamedTuple):
    messages: list
    completion: list           # as chosen
    label: bool
    tools: list | None
    where: str


class Read(NamedTuple):
    kind: str                  # prompts, pairs or labels
    rows: list
    skipped: Counter           # reason -> records
    notes: list[str]           # to be printed


class _Skip(Exception):
    """This record is left out; the message is the reason that is counted."""


class _Block(ValueError):
    """Content that is not text; the message says what it is. A log's record is skipped, another is refused."""


# -----------------------------------------------------------------------------
# Files


def _open(path):
    with open(path, "rb") as file:
        start = file.read(4)
    if start == b"PAR1" or path.suffix == ".parquet":
        script = f"import json, pyarrow.parquet as pq; [print(json.dumps(row)) for row in pq.read_table('{path}').to_pylist()]"
        raise ValueError(f'{path}: Parquet is not read here, convert it (pip install pyarrow): python -c "{script}" > {path.stem}.jsonl')
    return gzip.open(path, "rb") if start[:2] == b"\x1f\x8b" else open(path, "rb")


def _texts(path):
    """Yields (line, text of the record that begins there). ValueError with file and line: not UTF-8, damaged gzip, no array, nothing."""
    line, empty = 0, True
    try:
        with _open(path) as file:
            for line, data in enumerate(file, 1):
                if not data.strip():
                    continue
                if empty and data.lstrip().startswith(b"["):        # lines are read one by one, an array as a whole
                    for start, text in _items((data + file.read()).decode("utf-8"), line, path):
                        empty = False
                        yield start, text
                    break
                empty = False
                yield line, data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = error.object[:error.start].split(b"\n")
        raise ValueError(f"{path}:{line + len(before) - 1}: not UTF-8 at byte {len(before[-1])} of the line") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{line + 1}: truncated or damaged gzip: {error}") from None
    if empty:
        raise ValueError(f"{path}: empty, expected JSON lines or a JSON array of records")


def _whole(path):
    """The one JSON value that a file holds."""
    try:
        with _open(path) as file:
            return load_strict(file.read().decode("utf-8"))
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from None


_SPACE = re.compile(r"[ \t\r\n]*")


def _items(text, line, path):
    """(line, text) of each item of a JSON array. text begins at `line`."""
    end, counted, mark = _SPACE.match(text).end(), 0, "["
    while mark in ("[", ","):
        start = _SPACE.match(text, end + 1).end()
        if mark == "[" and text[start:start + 1] == "]":
            return
        line += text.count("\n", counted, start)
        try:
            end = json.JSONDecoder().raw_decode(text, start)[1]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{line}: not valid JSON: {error}") from None
        yield line, text[start:end]
        counted, end = start, _SPACE.match(text, end).end()
        mark = text[end:end + 1]
    if mark != "]" or text[end + 1:].strip():
        line += text.count("\n", counted, end)
        raise ValueError(f"{path}:{line}: not valid JSON: expected a comma or the end of the array, found {text[end:end + 20]!r}")


# -----------------------------------------------------------------------------
# Text and turns


def _expect(condition, message):
    if not condition:
        raise ValueError(message)


def _short(value):
    return f"the keys {sorted(value)}" if isinstance(value, dict) else repr(value)[:80]


def _take(record, key, kind):
    """record[key], None if it is absent or null."""
    value = record.get(key)
    _expect(value is None or isinstance(value, kind), f"expected {key} to be {getattr(kind, '__name__', kind)}, found {_short(value)}")
    return value


def _text(content):
    if isinstance(content, str):
        return content
    _expect(isinstance(content, list) and all(isinstance(block, dict) and block for block in content),
            f"expected content as a string or as blocks [{{text}}], found {_short(content)}")
    texts = []
    for block in content:
        kind = str(block.get("type") or next(iter(block)))
        keys = {key for key, value in block.items() if value is not None}
        if kind == "text" and isinstance(block.get("text"), str) and keys <= {"type", "text", "cache_control"}:
            texts.append(block["text"])
        elif kind != "cachePoint":                                  # a mark for the service, the model does not see it
            raise _Block("tool blocks" if kind.lower().startswith("tool") else "image or file blocks" if kind in
                         ("image", "image_url", "document", "video", "audio", "file", "input_audio") else f"{kind} blocks")
    return "".join(texts)


def _messages(value):
    """OpenAI's or Converse's messages in our form: content is a string, a call is {"name", "arguments"}, keys that are null are gone."""
    _expect(isinstance(value, list) and value and all(isinstance(message, dict) for message in value),
            f"expected a list of messages, found {_short(value)}")
    messages, due = [], []                                          # due: ids of calls whose results follow, in this order
    for n, given in enumerate(value):
        message = {key: item for key, item in given.items() if item is not None}
        if "content" in message:
            message["content"] = _text(message["content"])
        if calls := _take(message, "tool_calls", list):
            due = [call.get("id") for call in calls if isinstance(call, dict)]
            message["tool_calls"] = [_call(call) for call in calls]
        else:
            message.pop("tool_calls", None)
        if "tool_call_id" in message:
            found, wanted = message.pop("tool_call_id"), due.pop(0) if due else None
            _expect(found == wanted, f"message {n}: expected results in the order of their calls, here of {wanted}, found that of {found}")
        messages.append(message)
    return messages


def _call(call):
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call                                                 # in our form already, or refused when the messages are checked
    arguments = function.get("arguments")
    return {"name": function.get("name"), "arguments": load_strict(arguments) if isinstance(arguments, str) else arguments}


_HEADERS = (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ("<|header_start|>", "<|header_end|>", "<|eot|>"),
            ("<|im_start|>", "\n", "<|im_end|>"))                   # of a turn: before and after the role, at the end
_HUMAN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPECIAL = re.compile(r"<\|\w+\|>|\[/?INST\]|<</?SYS>>")


def turns(text: str, answered: bool = False) -> tuple[list, bool]:
    """A string -> (messages, whether it held a chat template). Without one it is the user's turn as it stands.

    A last turn of the assistant that is empty is the template's invitation to answer, and left out; of a conversation that was answered it
    is an empty answer. White space around a turn belongs to the template. ValueError: special tokens are left over, of a template that is
    not known here, or not whole.
    """
    _expect(text.strip(), "the prompt is blank")
    found, special = [], _SPECIAL
    header = next((h for h in _HEADERS if h[0] in text), None)
    if header:
        before, *parts = text.strip().removeprefix("<|begin_of_text|>").split(header[0])
        for part in parts:
            role, _, content = part.partition(header[1])
            found.append((role.strip(), content.strip().removesuffix(header[2])))
    elif "[INST]" in text:
        before, *parts = text.split("[INST]")
        before, special = before.replace("<s>", "", 1), re.compile(_SPECIAL.pattern + "|</?s>")
        for n, part in enumerate(parts):
            user, closed, answer = part.partition("[/INST]")
            _expect(closed, "expected [/INST] after [INST]")
            if n == 0 and user.lstrip().startswith("<<SYS>>"):
                system, _, user = user.lstrip().removeprefix("<<SYS>>").partition("<</SYS>>")
                found.append(("system", system))
            answer = answer.strip().removesuffix("<s>").strip().removesuffix("</s>")
            found += [("user", user)] + [("assistant", answer)] * bool(answer.strip())
    elif {"Human", "Assistant"} <= set(_HUMAN.findall(text)):
        before, *parts = _HUMAN.split(text)
        found = [("system", before)] * bool(before.strip())
        found += [({"Human": "user"}.get(role, "assistant"), content) for role, content in zip(parts[::2], parts[1::2])]
        before = ""
    else:
        before, found = "", [("user", text)]
    templated = found != [("user", text)]
    _expect(not before.strip(), f"expected nothing before the first turn, found {before.strip()[:80]!r}")
    messages = [dict(role=role, content=content.strip() if templated else content) for role, content in found]
    if not answered and len(messages) > 1 and messages[-1] == dict(role="assistant", content=""):
        messages.pop()
    for message in messages:
        left = special.search(message["content"]) or special.search(message["role"])
        _expect(not left, f"the special token {left and left[0]!r} is left over from a template")
    return messages, templated


def _prompt(record, value):
    """-> (messages, whether they were a template), with the record's system."""
    messages, templated = turns(value) if isinstance(value, str) else (_messages(value), False)
    return _with_system(record, messages), templated


def _with_system(record, messages):
    system = record.get("system")
    if not system:
        return messages
    _expect(messages[0].get("role") != "system", "expected system or a system message, found both")
    return [dict(role="system", content=_text(system)), *messages]


def _completion(value, templated):
    if not isinstance(value, str):
        return _messages(value)
    return [dict(role="assistant", content=value.strip() if templated else value)]


# -----------------------------------------------------------------------------
# Records: each function takes one and gives its rows, without `where`


def _tools(record, messages):
    """The record's tools, when the prompt can be answered with them."""
    tools = _take(record, "tools", list) or None
    validate_messages(messages, tools, prompt=True)
    _expect(messages[-1]["role"] == "tool" or messages[-1]["content"].strip(), "the prompt is blank")
    return tools


def _rows(record):
    asked = "messages" if "messages" in record else "prompt"
    messages, _ = _prompt(record, record[asked])
    reference = record.get("reference_answer")
    for outer, inner in (("reward_model", "ground_truth"), ("extra_info", "answer")):
        if asked == "prompt" and reference is None:
            reference = (_take(record, outer, dict) or {}).get(inner)
    name = record.get("id")
    _expect(name is None or isinstance(name, str | int) and not isinstance(name, bool) and name != "",
            f"expected id to be a string that is not empty or an integer, found {_short(name)}")
    metadata = {key: value for key, value in record.items() if key not in (asked, "system", "reference_answer", "id", "tools")}
    tools = _tools(record, messages)
    return [Row("" if name is None else str(name), messages, reference, metadata, _take(record, "data_source", str) or "", tools, "")]


def _pair(messages, sides, record):
    """Of each side the messages behind the prompt, when all of it is in order."""
    tools = _tools(record, messages)
    for side in sides:
        if not (str(side[0].get("content") or "").strip() or side[0].get("tool_calls")):
            raise _Skip("an empty answer")
        validate_messages(messages + side, tools)
    return messages, *sides, tools


def _preference(record):
    asked = record["prompt"] if record.get("prompt") is not None else record.get("input")
    sides = record["chosen"], record["rejected"]
    if asked is not None:
        prompt, templated = _prompt(record, asked)
        answers = [_completion(side, templated) for side in sides]
        if all(answer[0].get("role") == "assistant" for answer in answers):
            return [Pair(*_pair(prompt, answers, record), "")]
        prompt = prompt[bool(record.get("system")):]
    both = []                                                       # whole conversations
    for side in sides:
        messages, templated = turns(side, answered=True) if isinstance(side, str) else (_messages(side), True)
        _expect(templated, "expected prompt or input, or chosen and rejected as whole conversations")
        if isinstance(side, str) and any(a["role"] == b["role"] == "assistant" for a, b in itertools.pairwise(messages)):
            raise _Skip("a template whose turns cannot be told apart")       # HH-RLHF has a few "Human:" within a line
        both.append(messages)
    run = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(both[0][:-1], both[1][:-1])))
    shared = both[0][:run]
    _expect(shared, "expected chosen and rejected to begin with the same turns")
    _expect(all(messages[run].get("role") == "assistant" for messages in both),
            f"expected chosen and rejected to part at an assistant's turn, found that they part at message {run}")
    _expect(asked is None or shared == prompt or shared[-1:] == prompt,
            "expected chosen and rejected to answer the prompt, found other turns before the answers")
    return [Pair(*_pair(_with_system(record, shared), [messages[run:] for messages in both], record), "")]


def _candidates(record):
    *before, last = record["messages"]
    candidates = _take(last, "candidates", list) or []
    _expect(last.get("role") == "assistant" and len(candidates) >= 2 and all(isinstance(c, dict) for c in candidates),
            f"expected at least two candidates in the assistant's turn, found {_short(last)}")
    sides = {"preferred": [], "non-preferred": []}
    for candidate in candidates:
        label = candidate.get("preferenceLabel")
        _expect(isinstance(label, str) and label in sides, f"expected preferenceLabel preferred or non-preferred, found {_short(label)}")
        sides[label].append([dict(role="assistant", content=_text(candidate.get("content")))])
    _expect(all(sides.values()), "expected a preferred and a non-preferred candidate")
    prompt = _with_system(record, _messages(before))
    return [Pair(*_pair(prompt, [good, bad], record), "") for good in sides["preferred"] for bad in sides["non-preferred"]]


def _scored(record):
    prompt, templated = _prompt(record, record["prompt"])
    samples = _take(record, "samples", list)
    _expect(samples and len(samples) >= 2, "expected at least two samples")
    for sample in samples:
        score = sample.get("score") if isinstance(sample, dict) else None
        _expect(isinstance(score, int | float) and not isinstance(score, bool) and "completion" in sample,
                f"expected samples [{{completion, score}}] with a number as score, found {_short(sample)}")
    best, worst = (pick(samples, key=lambda sample: sample["score"]) for pick in (max, min))
    if best["score"] == worst["score"]:
        raise _Skip("all scores are equal")
    return [Pair(*_pair(prompt, [_completion(sample["completion"], templated) for sample in (best, worst)], record), "")]


def _labelled(record):
    prompt, templated = _prompt(record, record["prompt"])
    _expect(isinstance(record["label"], bool), f"expected label true or false, found {_short(record['label'])}")
    messages, completion, tools = _pair(prompt, [_completion(record["completion"], templated)], record)
    return [Label(messages, completion, record["label"], tools, "")]


# -----------------------------------------------------------------------------
# Invocation logs

_OPERATIONS = ("Converse", "ConverseStream", "InvokeModel", "InvokeModelWithResponseStream")
# in a folder that was copied as it is: bodies too long for a record, and what the service writes to see whether it may
_BESIDE = re.compile(r"/data/[0-9a-f-]{36}_(input|output)\.json(\.gz)?$|/amazon-bedrock-logs-permission-check[^/]*$")


def parse_filter(text: str):
    """--log_filter -> a function of a record's requestMetadata that says whether the record is wanted.

    Exactly one of {"equals": {key: value}}, {"notEquals": {key: value}}, {"andAll": [...]}, {"orAll": [...]}; the lists hold the first
    two. As in Bedrock's API a map has one key: a map of several, or a key written twice, could mean "and" or "or". A key that a record does
    not have is not equal to anything (ours; the API does not say).
    """
    def base(given):
        _expect(isinstance(given, dict) and len(given) == 1 and given.keys() <= {"equals", "notEquals"},
                f"expected one of equals and notEquals, found {_short(given)}")
        (name, pairs), = given.items()
        _expect(isinstance(pairs, dict) and len(pairs) == 1 and all(isinstance(value, str) for value in pairs.values()),
                f"expected {name} to be one {{key: string}} (for more use andAll or orAll), found {_short(pairs)}")
        (key, value), = pairs.items()
        return lambda metadata: (metadata.get(key) == value) == (name == "equals")

    if not text:
        return lambda metadata: True
    try:
        given = load_strict(text)
        if isinstance(given, dict) and len(given) == 1 and given.keys() <= {"andAll", "orAll"}:
            (name, items), = given.items()
            _expect(isinstance(items, list) and items, f"expected {name} to be a list of equals and notEquals, found {_short(items)}")
            tests = [base(item) for item in items]
            return lambda metadata: (all if name == "andAll" else any)(test(metadata) for test in tests)
        _expect(isinstance(given, dict) and len(given) == 1 and given.keys() <= {"equals", "notEquals"},
                f"expected exactly one of equals, notEquals, andAll and orAll, found {_short(given)}")
        return base(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--log_filter: {error}") from None


def _bodies(folder):
    """{name: path} of every file below --log_bodies."""
    found = {}
    _expect(not folder or Path(folder).is_dir(), f"--log_bodies={folder}: expected a folder")
    for path in input_files(folder) if folder else ():
        _expect(path.name not in found, f"--log_bodies={folder}: two files are called {path.name}: {found.get(path.name)}, {path}")
        found[path.name] = path
    return found


def _body(record, side, bodies, needed):
    """The request (side "input") or the response ("output") as it was logged; None: there is none that is needed."""
    part = _take(record, side, dict) or {}
    path = _take(part, f"{side}BodyS3Path", str)
    if part.get(f"{side}BodyJson") is not None or path is None:
        return part.get(f"{side}BodyJson")
    name = path.rpartition("/")[2]
    if name in bodies:
        return _whole(bodies[name])
    if needed:
        raise _Skip("its body is in a file that is not under --log_bodies")


def _said(body):
    """Text of a response in any of its forms, or of the chunks of a stream in their order; reasoning is not part of it."""
    match body:
        case list():
            return "".join(map(_said, body))
        case ({"output": {"message": {"content": list(parts)}}} | {"content": list(parts)} | {"results": list(parts)}
              | {"outputs": list(parts)}):
            return "".join(map(_said, parts))
        case {"contentBlockDelta": {"delta": {"text": str(text)}}} | {"delta": {"text": str(text)}}:
            return text
        case {"choices": [{"message": {"content": str(text)}}]} | {"choices": [{"delta": {"content": str(text)}}]}:
            return text
        case {"generation": str(text)} | {"completion": str(text)} | {"outputText": str(text)} | {"text": str(text)}:
            return text
    return ""


def _logged(record, matches, use_prompt_response, bodies):
    metadata = _take(record, "requestMetadata", dict) or {}
    if not matches(metadata):
        raise _Skip("--log_filter")
    if record.get("errorCode"):
        raise _Skip("errorCode")
    if record.get("operation") not in _OPERATIONS:
        raise _Skip(f"operation {record.get('operation')}")
    asked, answer = _body(record, "input", bodies, True), _body(record, "output", bodies, use_prompt_response)
    said = _said(answer)
    if isinstance(asked, dict) and (asked.get("toolConfig") or asked.get("tools")):
        raise _Skip("tool blocks")
    silent = not said.strip() and (answer is not None or use_prompt_response)
    if not isinstance(asked, dict) or "embed" in str(record.get("modelId")) or silent:
        raise _Skip("no text")
    prompt = next((asked[key] for key in ("messages", "prompt", "inputText") if asked.get(key)), "")
    if isinstance(prompt, str) and not prompt.strip():
        raise _Skip("no text")
    try:
        messages, _ = _prompt(asked, prompt)
    except _Block as block:
        raise _Skip(str(block)) from None
    if messages[-1].get("role") == "assistant":
        raise _Skip("an answer that the caller began")
    if not (messages[-1].get("content") or "").strip():
        raise _Skip("no text")
    validate_messages(messages, prompt=True)
    return [Row(_take(record, "requestId", str) or "", messages, said if use_prompt_response else None, metadata, "", None, "")]


# -----------------------------------------------------------------------------
# All of it

CHAT, RL, LOG = "OpenAI chat / Bedrock RFT", "SageMaker / verl RL", "Bedrock invocation log"
KINDS = {CHAT: ("prompts", _rows), RL: ("prompts", _rows), LOG: ("prompts", _logged), "preference": ("pairs", _preference),
         "Converse preference": ("pairs", _candidates), "scored": ("pairs", _scored), "KTO": ("labels", _labelled)}


def _kind(record):
    keys = record.keys() if isinstance(record, dict) else set()
    last = record["messages"][-1] if "messages" in keys and isinstance(record["messages"], list) and record["messages"] else None
    if keys >= {"schemaType"}:
        kind = LOG if record["schemaType"] == "ModelInvocationLog" else None
    elif keys >= {"chosen", "rejected"}:
        kind = "preference"
    elif "messages" in keys:
        kind = "Converse preference" if isinstance(last, dict) and "candidates" in last else CHAT
    elif "prompt" in keys and "samples" in keys:
        kind = "scored"
    elif "prompt" in keys and "completion" in keys:                 # without a label it is for train_sft.py
        kind = "KTO" if "label" in keys else None
    else:
        kind = RL if "prompt" in keys else None
    _expect(kind, f"expected a record of one of the kinds {', '.join(KINDS)}, found {_short(record)}")
    return kind


def read(path, *, log_filter: str = "", use_prompt_response: bool = False, log_bodies: str = "") -> Read:
    """All records of a file, or of the files of a folder (sorted; hidden ones aside). All must be of one kind.

    log_filter, use_prompt_response, log_bodies: for invocation logs alone. See parse_filter; the logged response becomes the reference; the
    folder that holds the bodies which the service stored beside the log, found by the names in inputBodyS3Path and outputBodyS3Path.
    ValueError, with file and line: a record that is malformed or of another kind, an id that is there twice, no record that is left.
    """
    path = Path(path).expanduser()
    single, kind, first, rows, skipped, seen = not path.is_dir(), None, None, [], Counter(), {}
    files = input_files(path)
    beside = [] if single else [file for file in files if _BESIDE.search(f"/{file.relative_to(path).as_posix()}")]
    parse_log = functools.partial(_logged, matches=parse_filter(log_filter), use_prompt_response=use_prompt_response,
                                  bodies=_bodies(log_bodies))
    for file in files:
        for number, text in _texts(file) if file not in beside else ():
            where = f"{file}:{number}"
            try:
                record = load_strict(text)
                found = _kind(record)
                kind, first = kind or found, first or where
                _expect(found == kind, f"expected a record of the kind {kind}, as at {first}, found {found} with {_short(record)}")
                for row in (parse_log if kind == LOG else KINDS[kind][1])(record):
                    if isinstance(row, Row):
                        row = row._replace(id=row.id or (str(number) if single else f"{file.relative_to(path).as_posix()}:{number}"))
                        if row.id in seen and kind == LOG:          # delivered twice
                            raise _Skip("a requestId that was there before")
                        _expect(row.id not in seen, f"the id {row.id!r} is that of {seen.get(row.id)} too")
                        seen[row.id] = where
                    rows.append(row._replace(where=where))
            except _Skip as reason:
                skipped[str(reason)] += 1
            except _Block as block:
                raise ValueError(f"{where}: expected text alone, found {block}") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON: {error}") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {error}") from None
    why = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    _expect(rows, f"{path}: no record is left" + (f", left out: {why}" if why else ""))
    _expect(kind == LOG or not (log_filter or use_prompt_response or log_bodies),
            f"{path}: --log_filter, --use_prompt_response and --log_bodies are for invocation logs, found the kind {kind}")
    gives = KINDS[kind][0]
    notes = [f"{path}: {len(rows):,} {gives}, read as {kind}" + ("" if single else f", {len(files) - len(beside):,} files")]
    if skipped:
        notes.append(f"{path}: {skipped.total():,} records left out: {why}")
    if beside:
        notes.append(f"{path}: {len(beside):,} files that the log keeps beside its records were not read as records")
    if gives == "prompts" and not BEDROCK_ROWS[0] <= len(rows) <= BEDROCK_ROWS[1]:
        notes.append(f"{path}: {len(rows):,} prompts; Bedrock takes {BEDROCK_ROWS[0]:,} to {BEDROCK_ROWS[1]:,}")
    return Read(gives, rows, skipped, notes)


# -----------------------------------------------------------------------------
# Problems, and how they are graded


def problems(path, grader: str = "", *, split: str = "train", val_fraction: float = 0.05, seed: int = 0, log_filter: str = "",
             use_prompt_response: bool = False, log_bodies: str = "") -> list[Problem]:
    """The prompts of a file as problems "rows/GRADER" of one split.

    path: as in read, or what read returned. grader: one of GRADERS for all rows; "": by each row's data_source (SOURCES), else none, which
    is for a reward file or a judge. hidden: id, reference, metadata, data_source, where. ValueError, with file and line, for a reference
    that the grader could not grade by, in either split.
    split: "val" is val_fraction of the distinct prompts, drawn by (seed, prompt), at least one of two or more, in the order of the draw:
    its beginning is a sample too. "train" is the rest, so that no question is on both sides, in the order of the file. 0: all is train.
    """
    found = path if isinstance(path, Read) else read(path, log_filter=log_filter, use_prompt_response=use_prompt_response,
                                                     log_bodies=log_bodies)
    _expect(found.kind == "prompts", f"{found.rows[0].where}: expected prompts, found {found.kind} (they are for train_dpo.py)")
    _expect(grader in ("", *GRADERS), f"no grader is called {grader!r}, expected one of {', '.join(GRADERS)}")
    _expect(split in ("train", "val") and 0 <= val_fraction < 1,
            f"expected split train or val and a val_fraction of at least 0 and below 1, found {split!r} and {val_fraction}")
    keys = [random_key("val", seed, to_json(row.messages)) for row in found.rows]
    distinct = sorted(set(keys))
    num_val = min(max(1, round(val_fraction * len(distinct))), len(distinct) - 1) if val_fraction else 0
    val, made = set(distinct[:num_val]), []
    for key, row in zip(keys, found.rows):
        name = grader or SOURCES.get(row.data_source.lower().rpartition("/")[2], "none")
        try:
            _gold(name, row.reference)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{row.where}: a reference that {name} cannot grade by: {error}") from None
        if (key in val) == (split == "val"):
            answer = row.reference if isinstance(row.reference, str) else "" if row.reference is None else to_json(row.reference)
            made.append((key, Problem(f"rows/{name}", row.messages, [], answer, tools=row.tools, hidden=dict(
                id=row.id, reference=row.reference, metadata=row.metadata, data_source=row.data_source, where=row.where))))
    return [problem for _, problem in (sorted(made, key=lambda pair: pair[0]) if split == "val" else made)]


def _gold(grader, reference):
    """What a grader compares with. ValueError if it could not."""
    if grader == "none":
        return None
    if grader in ("ifeval", "code"):
        gold = load_strict(reference) if isinstance(reference, str) else reference
        _expect(isinstance(gold, dict), f"expected an object, found {_short(gold)}")
        return _gold_ifeval(gold) if grader == "ifeval" else _gold_code(gold)
    value = reference.get("answer") if isinstance(reference, dict) else reference
    _expect(isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip(),
            f'expected a string or a number, or one as "answer", found {_short(reference)}')
    text = str(value)
    if grader == "gsm8k":
        _expect(gsm8k.gold_number(text) is not None, f"expected '... #### number' or a number, found {text[-80:]!r}")
    if grader == "math":
        text = math500.last_boxed(text) or text
        _expect(math500.grade(f"\\boxed{{{text}}}", text) is Outcome.RIGHT, f"expected an answer that equals itself, found {text[-80:]!r}")
    return text


def _gold_ifeval(gold):
    names, kwargs = gold.get("instruction_id_list"), gold.get("kwargs")
    _expect(isinstance(names, list) and names and all(isinstance(name, str) for name in names)
            and isinstance(kwargs, list) and all(isinstance(given, dict | None) for given in kwargs),
            f"expected instruction_id_list [string] and kwargs [object], found {_short(gold)}")
    # a table has a column for every argument: what an instruction does not take is null there
    kwargs = [{key: value for key, value in (given or {}).items() if value is not None} for given in kwargs]
    ifeval.check_reference(names, kwargs)
    return names, kwargs


def _gold_code(gold):
    tests = gold.get("test_list")
    row = dict(task_id=None, test_list=tests, code=gold.get("code") or "", test_setup_code=gold.get("test_setup_code") or "")
    _expect(isinstance(tests, list) and tests and all(isinstance(text, str) for text in [*tests, row["code"], row["test_setup_code"]]),
            f"expected test_list [string], and code and test_setup_code, if any, as strings, found {_short(gold)}")
    try:
        checks = mbpp.checks(row)
    except SyntaxError as error:
        raise ValueError(f"a test that is not Python: {error}") from None
    _expect(checks, "expected asserts that compare one value")
    _expect(row["code"] or all(check.literal for check in checks),
            "expected code, the reference solution: a test compares with more than a literal")
    return row


@never_raises
def grade(problem: Problem, text: str) -> Outcome:
    """Outcome of a response to one of problems(). exact: equal but for white space around it; UNGRADABLE if blank. none: UNGRADABLE."""
    grader = problem.task.partition("/")[2]
    gold = _gold(grader, problem.hidden["reference"])
    if grader == "gsm8k":
        return gsm8k.grade(text, gold)
    if grader == "math":
        return math500.grade(text, gold)
    if grader == "ifeval":
        return ifeval.outcome(text, *gold)
    if grader == "code":
        return mbpp.grade(text, gold)
    if grader == "none" or not text.strip() or len(text) > MAX_CHARS:
        return Outcome.UNGRADABLE
    return Outcome.RIGHT if text.strip() == gold.strip() else Outcome.WRONG
