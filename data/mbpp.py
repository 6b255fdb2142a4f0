"""MBPP: 974 small Python tasks, three asserts each (arXiv 2108.07732, CC BY 4.0, Google), and how code is graded here.

    load("train") -> [{"task_id", "text", "code", "test_list", "test_setup_code"}, ...]
    grade("```python\\ndef f(x): ...\\n```", row) -> Outcome.RIGHT

Expected values never enter the box that runs the response. Each assert is split on its syntax tree: the left side is
evaluated in the box and its value comes back as plain data; the right side is a literal, or is evaluated in a second box
with the reference solution; the comparison happens here. A response that prints "passed", leaves early, or returns an
object whose == is always true has then not produced the value that was asked for.
"""
import ast
import functools
import hashlib
import json
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass

from data import sandbox
from data.grading import MAX_CHARS, Outcome, Problem, never_raises
from data.gsm8k import fetch

URL = "https://raw.githubusercontent.com/google-research/google-research/4700efb9afa54286b0e04473ba80a13e8461e25f/mbpp/mbpp.jsonl"
SHA256 = "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"
SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}  # task ids, both ends included
_SECONDS = {123: 30.0}  # its reference solution divides 10^8 times
INSTRUCTION = "Put the whole program in one ```python block."


# -----------------------------------------------------------------------------
# Files


def load(split: str = "test") -> list[dict]:
    """Rows {"task_id", "text", "code", "test_list", "test_setup_code"} of "prompt" (10, for few-shot prompts), "test" (500),
    "validation" (90) or "train" (374), in order of task id. Carriage returns are left out."""
    if split not in SPLITS:
        raise ValueError(f"mbpp: expected split {', '.join(SPLITS)}, found {split!r}")
    path, (first, last), rows = fetch("mbpp/mbpp.jsonl", URL, SHA256), SPLITS[split], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = json.loads(line)
        if first <= row["task_id"] <= last:
            code, setup = (row[name].replace("\r", "") for name in ("code", "test_setup_code"))
            row = {"task_id": row["task_id"], "text": row["text"], "code": code, "test_list": row["test_list"], "test_setup_code": setup}
            if checks(row) is None:
                raise ValueError(f"{path}:{number}: expected asserts that compare one value, found {row['test_list']}")
            rows.append(row)
    return rows


def prompt(row: dict) -> list[dict]:
    """The messages before the first assistant turn. The asserts are shown, as in the paper: they name the function."""
    return [{"role": "user", "content": f"{row['text']}\nYour code should pass these tests:\n\n" + "\n".join(row["test_list"])
             + f"\n\n{INSTRUCTION}"}]


def conversations(split: str = "train") -> Iterator[dict]:
    """Chat records in file order: {"messages", "bucket": "code"}."""
    for row in load(split):
        yield {"messages": [*prompt(row), {"role": "assistant", "content": f"```python\n{row['code'].strip()}\n```"}], "bucket": "code"}


def problems(split: str = "test", num: int | None = None, seed: int = 0) -> list[Problem]:
    """`num` problems (all, if None) in an order that the seed alone decides. `hidden` is the row that grade() takes."""
    order = sorted(load(split), key=lambda row: hashlib.blake2b(b"%d/%d" % (seed, row["task_id"]), digest_size=8).digest())
    return [Problem("mbpp", prompt(row), [{"role": "assistant", "content": f"```python\n{row['code'].strip()}\n```"}], "", row)
            for row in order[:num]]


# -----------------------------------------------------------------------------
# Grader


@never_raises
def grade(response: str, problem: dict, timeout: float | None = None) -> Outcome:
    """Run the response's code on a row of load(). UNGRADABLE: no code in it. WRONG: it failed an assert, or raised, or left
    early, or took longer than `timeout` seconds (default: 5, and 30 for row 123) or more memory than the box has."""
    code = code_of(response)
    if code is None:
        return Outcome.UNGRADABLE
    setup = problem["test_setup_code"]  # 367 and 927 build trees of the response's own class: after its code
    return run_checks(checks(problem), code, problem["code"], setup, timeout or _SECONDS.get(problem["task_id"], 5.0))


def checks(row: dict) -> list["Check"] | None:
    """The row's asserts, split; None if one of them cannot be."""
    split = [split_assert(node) for test in row["test_list"] for node in ast.parse(test).body]
    return split if all(split) else None


def code_of(response: str) -> str | None:
    """The last fenced block that is closed, or else the open one, or else the whole response if it looks like Python; None if
    there is no code, or more than MAX_CHARS."""
    if len(response) > MAX_CHARS:
        return None
    start, block = None, None
    for fence in re.finditer(r"^ {0,3}```([^\n`]*)\n?", response, re.M):
        if start is None or fence[1].strip():  # an opening fence inside a block: that one was never closed
            start = fence.end()
        else:
            block, start = response[start:fence.start()], None
    if block is None and start is not None:
        block = response[start:]
    if block is None and re.search(r"\b(?:def|return|yield|lambda)\b", response):
        block = response
    return block if block and block.strip() else None


# -----------------------------------------------------------------------------
# Asserts


@dataclass(frozen=True, slots=True)
class Check:
    left: str  # an expression for the box with the response
    compare: object  # (value of left, value of right) -> bool
    right: str  # an expression for the box with the reference, unless `literal`
    literal: bool
    expected: object = None  # the value of a literal


_COMPARE = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
            ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda x, y: x in y,
            ast.NotIn: lambda x, y: x not in y}


def split_assert(node: ast.stmt) -> Check | None:
    """The two sides of an assert, or None where that has no form known here:
    `left == right` and other comparisons, `abs(left - right) < tolerance`, `left`, `not left`."""
    if not isinstance(node, ast.Assert):
        return None
    match node.test:
        case ast.Compare(left=ast.Call(func=ast.Name("abs"), args=[ast.BinOp(left, ast.Sub(), right)]), ops=[ast.Lt()],
                         comparators=[ast.Constant(float() | int() as tolerance)]):
            return _check(left, right, lambda x, y: abs(x - y) < tolerance, True)
        case ast.Compare(left, [op], [right]):
            return _check(left, right, _COMPARE[type(op)], isinstance(op, ast.Eq | ast.NotEq))
        case ast.UnaryOp(ast.Not(), left):
            return _check(left, ast.Constant(None), lambda x, _: not x, False)
        case left:
            return _check(left, ast.Constant(None), lambda x, _: bool(x), False)


def _check(left, right, compare, symmetric):
    if symmetric and _literal(left) and not _literal(right):
        left, right = right, left
    if isinstance(left, ast.Compare | ast.BoolOp):
        return None  # it would hold expected values
    literal = _literal(right)
    return Check(ast.unparse(left), compare, ast.unparse(right), bool(literal), literal[0] if literal else None)


def _literal(node):
    """(value,) of a literal, else ()."""
    try:
        return (ast.literal_eval(node),)
    except ValueError:
        return ()


def run_checks(checks: list[Check], code: str, reference: str, after: str, timeout: float) -> Outcome:
    """RIGHT if every check holds. `after` runs after the code, in both boxes. Raises if the reference has no value, or if a
    box does not start."""
    result = sandbox.evaluate(code, [check.left for check in checks], after=after, timeout=timeout)
    if result.status != "ok" or len(result.values) != len(checks):
        return Outcome.WRONG
    unknown = tuple(check.right for check in checks if not check.literal)
    expected = iter(_expected(reference, unknown, after) if unknown else ())
    for check, value in zip(checks, result.values):
        if isinstance(value, sandbox.Failure) or not _holds(check.compare, value, check.expected if check.literal else next(expected)):
            return Outcome.WRONG
    return Outcome.RIGHT


@functools.lru_cache(maxsize=256)
def _expected(reference, expressions, after):
    """Values of expressions under the reference solution, each computed once."""
    result = sandbox.evaluate(reference, list(expressions), after=after)
    if result.status != "ok" or any(isinstance(value, sandbox.Failure) for value in result.values):
        raise RuntimeError(f"the reference solution has no value: {result.status}, {result.values}")
    return tuple(result.values)


def _holds(compare, value, expected):
    try:
        return bool(compare(value, expected))
    except (TypeError, ValueError, OverflowError):  # abs("a" - 1), 1 < None: the assert would have raised, too
        return False
