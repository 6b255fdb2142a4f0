"""MBPP and HumanEval: which code is run, how asserts are split, and that forged passes are wrong."""
import ast
import gzip
import hashlib
import json
import os
import random

import pytest

from data import gsm8k, humaneval, mbpp, sandbox
from data.grading import Outcome

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR
FULL = os.environ.get("TEMPER_FULL") == "1"  # every row, not a sample: a few minutes


def has_box():
    try:
        return sandbox.evaluate("", ["1 + 1"]).values == [2]
    except sandbox.SandboxUnavailable:
        return False


def staged(name):
    return pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("TEMPER_DATA", ""), name)),
                              reason=f"needs TEMPER_DATA=<folder that holds {name}/>")


boxed = pytest.mark.skipif(not has_box(), reason="no sandbox works on this machine")
TOTAL = {"task_id": 1, "text": "Write a function to add numbers.", "code": "def total(xs):\n    return sum(xs)", "test_setup_code": "",
         "test_list": ["assert total([1, 2, 3]) == 6", "assert total([-4]) == -4", "assert total([0.25, 0.5]) == 0.75"]}
MEAN = {"task_id": "HumanEval/mean", "entry_point": "mean", "prompt": "from typing import List\n\n\ndef mean(xs: List[float]) -> float:\n    ''' Mean. '''\n",
        "canonical_solution": "    return sum(xs) / len(xs)\n",
        "test": "METADATA = {}\n\ndef check(candidate):\n    assert True, 'shown'\n    assert abs(candidate([1.0, 2.0]) - 1.5) < 1e-6\n"
                "    assert candidate([4]) == mean([4])\n    assert candidate([2]), 'not zero'\n    assert not candidate([1, -1])\n    print('done')\n"}
LOOP = {**MEAN, "task_id": "HumanEval/loop", "test": "def check(candidate):\n    for n in range(1, 9):\n        assert candidate([n, n + 2]) == n + 1\n"}


def fenced(code):
    return f"Here it is:\n```python\n{code}\n```\nDone."


# -----------------------------------------------------------------------------
# Which code


@pytest.mark.parametrize("response, code", [
    ("```python\na\n```", "a\n"), ("```\na\n```\nthen\n```py\nb\n```", "b\n"), ("```python\na\n```\n```python\nb", "a\n"), ("```python\nb", "b"),
    ("```python\na\n```python\nb\n```", "b\n"), ("  ```python\n  a\n  ```", "  a\n"), ("def f(): pass", "def f(): pass"), ("    return 1", "    return 1"),
    ("text `x` text", None), ("", None), ("```python\n```", None), ("```", None), ("``` python\n\n```", None), ("I cannot.", None),
    ("```python\nx = '```'\n```", "x = '```'\n"), ("def f(): pass" + " " * 65536, None),
])
def test_code_of(response, code):
    assert mbpp.code_of(response) == code


def test_program():
    body = "    return 1\n"
    assert humaneval.program(body, MEAN) == MEAN["prompt"] + body
    alone = "def mean(xs: List[int]):\n    return 1\n"
    assert humaneval.program(alone, MEAN) == "from typing import List\n\n\n" + alone
    assert humaneval.program("from __future__ import annotations\n" + alone, MEAN) == "from __future__ import annotations\n" + alone
    assert humaneval.program("mean = lambda xs: 1", MEAN).endswith("\n\n\nmean = lambda xs: 1")
    assert humaneval.program("def meanest(xs):\n    pass", MEAN).startswith(MEAN["prompt"])  # another function


# -----------------------------------------------------------------------------
# Asserts


@pytest.mark.parametrize("text, left, right, holds, fails", [
    ("f(1) == [2, (3,)]", "f(1)", [2, (3,)], [2, (3,)], [2, [3]]), ("5 == f(1)", "f(1)", 5, 5, "5"), ("f(1) != 5", "f(1)", 5, 6, 5),
    ("abs(f(1) - 2.5) < 1e-3", "f(1)", 2.5, 2.5009, 2.502), ("abs(2.5 - f(1)) < 1e-3", "f(1)", 2.5, 2.4995, "2.5"), ("f(1)", "f(1)", None, [0], []),
    ("not f(1)", "f(1)", None, 0, 1), ("f(1) is None", "f(1)", None, None, 0), ("f(1) is True", "f(1)", True, True, 1), ("f(1) == True", "f(1)", True, 1, 2),
    ("f(1) in [1, 2]", "f(1)", [1, 2], 2, 3), ("f(1) < 3", "f(1)", 3, 2, "2"), ("f(1) >= -1", "f(1)", -1, -1, None), ("f(1) == {1: 2}", "f(1)", {1: 2}, {1: 2}, {}),
    ("set(f([1])) == {1}", "set(f([1]))", {1}, {1}, [1]), ("f(1) == 1e999", "f(1)", float("inf"), float("inf"), 1e308),
    ("abs(f(1) - 1) < 0.5", "f(1)", 1, 1.25, 10**400),  # too large for a float: the assert would raise
])
def test_split_assert(text, left, right, holds, fails):
    check = mbpp.split_assert(ast.parse(f"assert {text}, 'message'").body[0])
    assert (check.left, check.expected, check.literal) == (left, right, True)
    assert mbpp._holds(check.compare, holds, check.expected) and not mbpp._holds(check.compare, fails, check.expected)


def test_right_sides_that_are_computed():
    check = mbpp.split_assert(ast.parse("assert f(1) == g(2.0 / 3)").body[0])
    assert (check.left, check.right, check.literal) == ("f(1)", "g(2.0 / 3)", False)


@pytest.mark.parametrize("text", ("x = 1", "for x in y: assert f(x) == 1", "f(1)", "assert (f(1) == 2) == True", "assert f(1) == 2 and f(2) == 3", "assert 1 < f(1) < 3"))
def test_asserts_that_cannot_be_split(text):
    assert mbpp.split_assert(ast.parse(text).body[0]) is None


def test_expected_values_never_enter_the_box(monkeypatch):
    """What the response's box is given, word for word; the reference solution and computed right sides go to a second one."""
    calls = []

    def evaluate(code, expressions, *, after="", timeout=5.0, memory_mb=512):
        calls.append((code, expressions, after))
        values = {"total([1, 2, 3])": 6, "total([-4])": -4, "total([0.25, 0.5])": 0.75, "candidate([1.0, 2.0])": 1.5, "candidate([4])": 4.0, "mean([4])": 4.0,
                  "candidate([2])": 2.0, "candidate([1, -1])": 0.0}
        return sandbox.Result("ok", values=[values[e] for e in expressions])

    monkeypatch.setattr(sandbox, "evaluate", evaluate)
    mbpp._expected.cache_clear()
    assert mbpp.grade(fenced("def total(xs): 0"), TOTAL) == RIGHT
    assert calls == [("def total(xs): 0\n", ["total([1, 2, 3])", "total([-4])", "total([0.25, 0.5])"], "")]
    calls.clear()
    assert humaneval.grade(fenced("def mean(xs): 0"), MEAN) == humaneval.grade(fenced("def mean(xs): 0"), MEAN) == RIGHT
    own = ("from typing import List\n\n\ndef mean(xs): 0\n", ["candidate([1.0, 2.0])", "candidate([4])", "candidate([2])", "candidate([1, -1])"], "candidate = mean\n")
    assert calls == [own, (MEAN["prompt"] + MEAN["canonical_solution"], ["mean([4])"], "candidate = mean\n"), own]  # the second box: once
    mbpp._expected.cache_clear()


def test_failures_of_the_box_are_not_scores(monkeypatch, caplog):
    def broken(*_, **__):
        raise sandbox.SandboxUnavailable("no namespaces")

    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "evaluate", broken)
        assert mbpp.grade(fenced("def total(xs): 0"), TOTAL) == humaneval.grade(fenced("def mean(xs): 0"), LOOP) == ERROR
        assert mbpp.grade("no code", TOTAL) == UNGRADABLE  # nothing to run, so nothing breaks
    assert "no namespaces" in caplog.text
    for status in ("error", "timeout", "memory", "output_limit"):  # all values right, but the program did not live to the end
        monkeypatch.setattr(sandbox, "evaluate", lambda *_, status=status, **__: sandbox.Result(status, values=[6, -4, 0.75]))
        assert mbpp.grade(fenced("def total(xs): 0"), TOTAL) == WRONG
    for values in ([6, -4], [6, -4, sandbox.Failure("exception", "0.75")], [6, -4, None], []):
        monkeypatch.setattr(sandbox, "evaluate", lambda *_, values=values, **__: sandbox.Result("ok", values=values))
        assert mbpp.grade(fenced("def total(xs): 0"), TOTAL) == WRONG
    assert mbpp.grade(None, TOTAL) == ERROR


# -----------------------------------------------------------------------------
# In the box: problems of our own

ALWAYS = "class Always:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
FORGED = {
    "printed": "print('passed')\nprint('6 -4 0.75')", "nothing": "pass", "os._exit": "import os\nos._exit(0)",
    "os._exit inside": "import os\ndef total(xs): os._exit(0)\nmean = total", "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit inside": "import sys\ndef total(xs): sys.exit(0)\nmean = total", "SystemExit": "raise SystemExit(0)",
    "equal to all": ALWAYS + "def total(xs): return Always()\nmean = total",
    "int equal to all": "class I(int):\n    def __eq__(self, other): return True\n    def __sub__(self, other): return 0\n    __hash__ = int.__hash__\n"
                        "def total(xs): return I(99)\nmean = total",
    "float equal to all": "class F(float):\n    __eq__ = lambda s, o: True\n    __sub__ = __rsub__ = lambda s, o: 0.0\n    __bool__ = lambda s: True\n"
                          "def total(xs): return F(99)\nmean = total",
    "str": "def total(xs): return '6'\nmean = total", "None": "def total(xs): return None\nmean = total", "wrapped": "def total(xs): return [sum(xs)]\nmean = total",
    "atexit": "import atexit, os\natexit.register(lambda: os.write(1, b'passed'))\ndef total(xs): raise SystemExit(0)\nmean = total",
    "names": "AssertionError = Exception\ndef abs(x): return 0\ndef check(candidate): return True\ndef total(xs): return 99\nmean = total",
    "builtins": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.isinstance = lambda *a: True\nbuiltins.type = lambda x: int\ndef total(xs): return 99\nmean = total",
    "thread": "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()\ndef total(xs):\n    while True: pass\nmean = total",
    "exec": "import os\ndef total(xs): os.execv('/bin/true', ['true'])\nmean = total", "loop": "def total(xs):\n    while True: pass\nmean = total",
    "raises": "def total(xs): raise StopIteration\nmean = total", "generator": "def total(xs): yield sum(xs)\nmean = total",
    "first only": "def total(xs): return 6\nmean = lambda xs: 1.5", "syntax": "def total(xs:\n    return sum(xs)", "tab": "def total(xs):\nreturn 6",
    "once": "import os\ncalls = []\ndef total(xs):\n    calls.append(1)\n    if len(calls) > 1: os._exit(0)\n    return sum(xs) / len(xs) if '.' in str(xs) else sum(xs)\nmean = total",
}


@boxed
def test_right_programs():
    for code in (TOTAL["code"], "import functools, operator\ntotal = lambda xs: functools.reduce(operator.add, xs)",
                 "class F(float): pass\ndef total(xs): return F(sum(xs))", "print('noise')\ndef total(xs):\n    print('more')\n    return sum(xs)",
                 "def total(xs): return sum(xs)\nif __name__ == '__main__':\n    total(None)"):
        assert mbpp.grade(fenced(code), TOTAL) == RIGHT, code
    for row in (MEAN, LOOP):
        full = "import statistics\ndef mean(xs: List[float]) -> float:\n    return statistics.fmean(xs)"
        assert [humaneval.grade(text, row) for text in (fenced(full), fenced(MEAN["canonical_solution"]), MEAN["canonical_solution"], full)] == [RIGHT] * 4


@boxed
@pytest.mark.parametrize("name", FORGED)
def test_forged_passes_are_wrong(name):
    assert mbpp.grade(fenced(FORGED[name]), TOTAL, timeout=0.5) == WRONG
    assert humaneval.grade(fenced(FORGED[name]), MEAN, timeout=0.5) == WRONG
    if "equal to all" not in name:  # beside whole asserts a forged == still works: why scores are given without such rows, too
        assert humaneval.grade(fenced(FORGED[name]), LOOP, timeout=0.5) == WRONG


@boxed
def test_set_up_runs_after_the_code():
    row = {**TOTAL, "test_setup_code": "root = Node(3)\nroot.next = Node(4)", "test_list": ["assert length(root) == 2"]}
    code = "class Node:\n    def __init__(self, x): self.x, self.next = x, None\ndef length(n): return 0 if n is None else 1 + length(n.next)"
    assert mbpp.grade(fenced(code), row) == RIGHT and mbpp.grade(fenced(code.replace("1 +", "2 +")), row) == WRONG
    assert mbpp.grade(fenced("def length(n): return 2"), row) == WRONG  # without Node the set-up raises


@boxed
def test_the_reference_decides_computed_right_sides(caplog):
    """A response whose helper agrees with itself does not decide what is right."""
    row = {**MEAN, "test": "def check(candidate):\n    assert tuple(candidate([1, 2])) == tuple(pair([1, 2]))\n", "entry_point": "pair",
           "prompt": "def pair(xs):\n", "canonical_solution": "    return [min(xs), max(xs)]\n"}
    assert humaneval.grade(fenced("def pair(xs): return sorted(xs)"), row) == RIGHT
    assert humaneval.grade(fenced("def pair(xs): return [7, 7]"), row) == WRONG
    assert humaneval.grade(fenced("def pair(xs): return sorted(xs)"), {**row, "canonical_solution": "    return 1 / 0\n"}) == ERROR
    assert "the reference solution has no value" in caplog.text


# -----------------------------------------------------------------------------
# The data sets


def everything():
    return [row for split in ("prompt", "test", "validation", "train") for row in {r["task_id"]: r for r in mbpp.load(split)}.values()]


@staged("mbpp")
def test_mbpp_rows():
    parts = [mbpp.load(split) for split in ("prompt", "test", "validation", "train")]
    rows = sum(parts, [])
    assert [len(part) for part in parts] == [10, 500, 90, 374]
    assert sorted({row["task_id"] for row in rows}) == list(range(1, 975)) and len(rows) == 974
    assert not any("\r" in value for row in rows for value in (row["code"], row["test_setup_code"], *row["test_list"]))
    checks = [(row["task_id"], check) for row in rows for check in mbpp.checks(row)]
    assert len(checks) == 2922 and [task for task, check in checks if not check.literal] == [596] * 3
    assert [row["task_id"] for row in rows if row["test_setup_code"]] == [367, 927]
    assert sum(1 for _ in mbpp.conversations("train")) == 374
    some = mbpp.problems("validation", 20, seed=1)
    assert some == mbpp.problems("validation", seed=1)[:20] != mbpp.problems("validation", 20, seed=2)
    assert all(p.hidden["test_list"][2] in p.prompt[0]["content"] and mbpp.code_of(p.gold[0]["content"]).strip() == p.hidden["code"].strip() for p in some)
    with pytest.raises(ValueError, match="expected split prompt, test, validation, train, found 'val'"):
        mbpp.load("val")


@staged("mbpp")
@boxed
def test_mbpp_reference_solutions_are_right():
    rows = everything()
    if not FULL:
        rows = random.Random(0).sample(rows, 45) + [rows[i - 1] for i in (367, 596, 927)]
    bad = [row["task_id"] for row in rows if mbpp.grade(fenced(row["code"]), row) != RIGHT]
    assert bad == []


class Mutate(ast.NodeTransformer):
    """The n-th constant, comparison or operator changed."""
    SWAP = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq, ast.LtE: ast.Gt, ast.GtE: ast.Lt}

    def __init__(self, n):
        self.n, self.seen = n, 0

    def visit(self, node):
        self.generic_visit(node)
        where = isinstance(node, ast.BinOp) and type(node.op) in self.SWAP, isinstance(node, ast.Compare) and type(node.ops[0]) in self.SWAP, \
            isinstance(node, ast.Constant) and type(node.value) is int
        if any(where):
            self.seen += 1
            if self.seen == self.n:
                if where[0]:
                    node.op = self.SWAP[type(node.op)]()
                elif where[1]:
                    node.ops[0] = self.SWAP[type(node.ops[0])]()
                else:
                    node.value += 1
        return node


@staged("mbpp")
@boxed
def test_mbpp_mutants_are_wrong():
    """For sampled solutions, a function that returns None, and the first mutant whose values are not the expected ones, read here without
    the grader. Mutants that change no value on the tests must stay right."""
    sample, mutants, unchanged = random.Random(1).sample(mbpp.load("test"), 12), 0, 0
    for row in sample:
        checks, tree = mbpp.checks(row), ast.parse(row["code"])
        name = ast.parse(row["test_list"][0]).body[0].test.left.func.id
        assert mbpp.grade(fenced(f"{row['code']}\ndef {name}(*_): return None"), row) == WRONG
        for n in range(1, 5):
            transform = Mutate(n)
            code = ast.unparse(transform.visit(ast.parse(ast.unparse(tree))))
            if transform.seen < n:
                break
            values = sandbox.evaluate(code, [check.left for check in checks], timeout=3.0).values
            same = [repr(value) for value in values] == [repr(check.expected) for check in checks]
            assert mbpp.grade(fenced(code), row, timeout=3.0) == (RIGHT if same else WRONG), (row["task_id"], n)
            mutants, unchanged = mutants + (not same), unchanged + same
            if not same:
                break
    assert mutants >= 6


@staged("humaneval")
@boxed
def test_humaneval():
    rows = humaneval.load()
    assert len(rows) == 164 and [int(row["task_id"][10:]) for row in rows if not humaneval.splittable(row)] == [32, 38, 44, 50, 53, 151]
    chosen = rows if FULL else [rows[i] for i in (4, 32, 33, 38, 44, 50, 53, 64, 129, 151, *random.Random(0).sample(range(164), 8))]
    for row in chosen:
        assert humaneval.grade(fenced(row["prompt"] + row["canonical_solution"]), row) == RIGHT, row["task_id"]
    for row in rows if FULL else chosen[:8]:
        assert humaneval.grade(fenced(f"def {row['entry_point']}(*_): return None"), row) == WRONG, row["task_id"]
    assert humaneval.grade(fenced(rows[50]["canonical_solution"]), rows[50]) == RIGHT  # the body alone; its tests use a helper of the prompt
    assert humaneval.grade(fenced("def sort_third(l): return [9, 9, 9]"), rows[33]) == WRONG  # agrees with itself
    assert humaneval.problems(5, seed=1) == humaneval.problems(seed=1)[:5]


def test_humaneval_file(tmp_path, monkeypatch):
    """The gzipped or the plain file, checked; without either and without a network the error names the place."""
    content = json.dumps(MEAN).encode() + b"\n"
    hashes = {"gz": hashlib.sha256(gzip.compress(content, mtime=0)).hexdigest(), "plain": hashlib.sha256(content).hexdigest()}
    monkeypatch.setattr(humaneval, "SHA256", hashes)
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def offline(url, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr(gsm8k.urllib.request, "urlopen", offline)
    with pytest.raises(ConnectionError, match=r"expected humaneval/HumanEval.jsonl.gz in \$TEMPER_DATA .*no route to host"):
        humaneval.load()
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval/HumanEval.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    assert humaneval.load() == [MEAN]
    (tmp_path / "humaneval/HumanEval.jsonl").write_bytes(content)
    assert humaneval.load() == [MEAN]
    (tmp_path / "humaneval/HumanEval.jsonl").write_bytes(content[1:])
    with pytest.raises(ValueError, match="HumanEval.jsonl: expected sha256"):
        humaneval.load()
