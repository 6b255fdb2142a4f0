"""GSM8K: 7,473 + 1,319 grade-school word problems (arXiv 2110.14168, MIT licence), as conversations, and their grader.

    load("train") -> [{"question": "Natalia sold clips ...", "answer": "... <<48/2=24>>24 clips ...\n#### 72"}, ...]
    grade("... #### 72", answer) -> Outcome.RIGHT

The answers carry calculator notes, <<expression=value>>. They are either removed, or each becomes a call of the
calculator with its exact result. 113 answers have no note; with calls they are plain answers.
"""
import hashlib
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from data import calculator
from data.grading import MAX_CHARS, Outcome, Problem, last_number, never_raises, parse_number

URL = ("https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
       "grade_school_math/data/{split}.jsonl")
SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
NUM_ROWS = {"train": 7473, "test": 1319}
# the strict grader reads nothing but this form, so the question asks for it: in training and evaluation alike
INSTRUCTION = 'End with the answer on a line of its own: "#### number".'


# -----------------------------------------------------------------------------
# Files


def fetch(name: str, url: str, sha256: str) -> Path:
    """Path of a checked copy of the file `name` ("gsm8k/train.jsonl").

    $TEMPER_DATA/name if it is there, else the cache, which is filled once from `url`. The download lands under a name
    of its own process and is renamed when its hash is right: a half-written file is never mistaken for the data, and
    ranks that download at the same time each rename the same bytes.
    """
    staged = Path(os.environ["TEMPER_DATA"], name) if os.environ.get("TEMPER_DATA") else None
    if staged is not None and staged.exists():
        _check(staged, staged.read_bytes(), sha256)
        return staged
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "temper", name)
    if cache.exists():
        _check(cache, cache.read_bytes(), sha256)
        return cache
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:  # URLError, HTTPError and timeouts are all OSErrors
        given = os.environ.get("TEMPER_DATA") or "not set"
        raise ConnectionError(f"expected {name} in $TEMPER_DATA ({given}) or at {cache}, found neither, and {url} "
                              f"cannot be read ({error}). Without a network, put the file at {cache}, or set TEMPER_DATA to "
                              f"the folder that holds {name}") from error
    _check(url, content, sha256)
    cache.parent.mkdir(parents=True, exist_ok=True)
    part = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, cache)
    finally:
        part.unlink(missing_ok=True)
    return cache


def _check(where, content, sha256):
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{where}: expected sha256 {sha256}, found {found} ({len(content)} bytes): "
                         "truncated or another version; delete it to download it again")


def load(split: str) -> list[dict]:
    """Rows {"question", "answer"} of "train" (7,473) or "test" (1,319), in the order of the file."""
    if split not in SHA256:
        raise ValueError(f"gsm8k: expected split train or test, found {split!r}")
    path = fetch(f"gsm8k/{split}.jsonl", URL.format(split=split), SHA256[split])
    rows = []
    # bytes, because str.splitlines would also cut at U+2028 inside a record
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = json.loads(line)
        if gold_number(row["answer"]) is None:
            raise ValueError(f"{path}:{number}: expected an answer that ends in '#### number'")
        rows.append({"question": row["question"], "answer": row["answer"]})
    return rows


# -----------------------------------------------------------------------------
# Conversations

_NOTE = re.compile(r"<<([^<>]*)=([^<>=]*)>>")


def prompt(question: str) -> list[dict]:
    """The messages before the first assistant turn: the question, and the form in which to answer."""
    return [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}]


def conversations(split: str, calls: bool = False) -> Iterator[dict]:
    """Chat records in file order: {"messages", "bucket": "math"}, and "tools" with calls=True.

    calls=False: one assistant turn, the notes removed.
    calls=True: at each note the turn ends with a call of the calculator, and a new turn goes on from the result:
        "Natalia sold 48/2 =" calculator(48/2) -> "24" -> "24 clips in May.\n..."
    """
    for row in load(split):
        messages = prompt(row["question"])
        if calls:
            pieces = _NOTE.split(row["answer"])  # text, expression, value, text, expression, value, ..., text
            for text, expression in zip(pieces[0::3], pieces[1::3]):
                call = {"name": "calculator", "arguments": {"expression": expression}}
                # stripped, since ids of content that starts with white space depend on how its turn is cut
                messages.append({"role": "assistant", "content": text.strip(), "tool_calls": [call]})
                messages.append({"role": "tool", "content": calculator.calculate(expression)})
            messages.append({"role": "assistant", "content": pieces[-1].strip()})
            yield {"messages": messages, "tools": [calculator.TOOL], "bucket": "math"}
        else:
            messages.append({"role": "assistant", "content": _NOTE.sub("", row["answer"]).strip()})
            yield {"messages": messages, "bucket": "math"}


def problems(split: str = "test", num: int | None = None, seed: int = 0, calls: bool = False) -> list[Problem]:
    """`num` problems of a split (all, if None or more than there are) in an order that the seed alone decides: a larger
    num only adds to the end. With calls=True the calculator's schema is there to be rendered into the prompt."""
    rows = enumerate(load(split))
    order = sorted(rows, key=lambda row: hashlib.blake2b(b"%d/%d" % (seed, row[0]), digest_size=8).digest())
    tools = [calculator.TOOL] if calls else None
    return [Problem("gsm8k", prompt(row["question"]), [{"role": "assistant", "content": _NOTE.sub("", row["answer"])}],
                    row["answer"], tools=tools) for _, row in order[:num]]


# -----------------------------------------------------------------------------
# Grader


def gold_number(answer: str):
    """The reference as a rational, from a whole GSM8K answer ('... #### 72') or from the number alone; else None."""
    return parse_number(answer.rpartition("####")[2])


@never_raises
def grade(response: str, answer: str, strict: bool = True) -> Outcome:
    """Compare a response with a GSM8K answer, as rationals.

    strict: the number after the last ####, alone on the rest of its line ('#### 72 or 73' is no answer).
    lenient: the last number anywhere. Log it beside the strict score: the gap between them is format, not mathematics.
    """
    gold = gold_number(answer)
    if gold is None:
        raise ValueError(f"expected a reference that ends in '#### number', found {answer[-40:]!r}")
    if len(response) > MAX_CHARS:
        return Outcome.UNGRADABLE
    if strict:
        _, mark, rest = response.rpartition("####")
        found = parse_number(rest.partition("\n")[0]) if mark else None
    else:
        found = last_number(response)
    if found is None:
        return Outcome.UNGRADABLE
    return Outcome.RIGHT if found == gold else Outcome.WRONG
