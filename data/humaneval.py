"""HumanEval: 164 Python functions to complete from a docstring (arXiv 2107.03374, MIT licence, OpenAI).

    load() -> [{"task_id", "prompt", "entry_point", "canonical_solution", "test"}, ...]
    grade("```python\\ndef f(x): ...\\n```", row) -> Outcome.RIGHT

Graded like MBPP (mbpp.py): the asserts of a row's check() are split, and the expected values stay outside the box. Six
rows (32, 38, 44, 50, 53, 151: asserts in loops, or about computed values) cannot be split. Their check() runs whole, beside
the response, which is right only if a fresh random sentinel comes back after it. That is dearer to forge, not proof, so report
scores over all 164 and over the 158 for which splittable(row) holds.
"""
import ast
import gzip
import hashlib
import json
import os
import re
import secrets
from pathlib import Path

from data import sandbox
from data.grading import Outcome, Problem, never_raises
from data.gsm8k import fetch
from data.mbpp import code_of, run_checks, split_assert

URL = "https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz"
SHA256 = {"gz": "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
          "plain": "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2"}
INSTRUCTION = "Complete this function. Put the whole of it in one ```python block."


def load() -> list[dict]:
    """The 164 rows, from $TEMPER_DATA/humaneval/HumanEval.jsonl or .jsonl.gz, else downloaded once; checked by sha256."""
    plain = "humaneval/HumanEval.jsonl"
    if os.environ.get("TEMPER_DATA") and Path(os.environ["TEMPER_DATA"], plain).exists():
        content = fetch(plain, URL, SHA256["plain"]).read_bytes()
    else:
        content = gzip.decompress(fetch(plain + ".gz", URL, SHA256["gz"]).read_bytes())
    return [json.loads(line) for line in content.splitlines()]


def prompt(row: dict) -> list[dict]:
    """The messages before the first assistant turn."""
    return [{"role": "user", "content": f"{INSTRUCTION}\n\n```python\n{row['prompt'].rstrip()}\n```"}]


def problems(num: int | None = None, seed: int = 0) -> list[Problem]:
    """`num` problems (all, if None) in an order that the seed alone decides. `hidden` is the row that grade() takes."""
    order = sorted(load(), key=lambda row: hashlib.blake2b(f"{seed}/{row['task_id']}".encode(), digest_size=8).digest())
    golds = [f"```python\n{row['prompt']}{row['canonical_solution']}\n```" for row in order]
    return [Problem("humaneval", prompt(row), [{"role": "assistant", "content": gold}], "", row) for row, gold in zip(order[:num], golds)]


# -----------------------------------------------------------------------------
# Grader


@never_raises
def grade(response: str, problem: dict, timeout: float = 5.0) -> Outcome:
    """Run the response's code on a row of load(); outcomes as in mbpp.grade."""
    code = code_of(response)
    if code is None:
        return Outcome.UNGRADABLE
    code, reference = program(code, problem), problem["prompt"] + problem["canonical_solution"]
    checks, after = _checks(problem)
    if checks:
        return run_checks(checks, code, reference, after, timeout)
    sentinel = secrets.token_hex(16)
    result = sandbox.evaluate(code, [f"[check(candidate), {sentinel!r}][1]"], after=after, timeout=timeout)
    return Outcome.RIGHT if result.status == "ok" and result.values == [sentinel] else Outcome.WRONG


def program(code: str, problem: dict) -> str:
    """The module to run: the code after what stands above the function in the prompt (imports, helpers that the tests use),
    if it defines the function; else after the whole prompt, whose body it is."""
    name = re.escape(problem["entry_point"])
    if not re.search(rf"^(?:async\s+def|def|class)\s+{name}\b|^{name}\s*=", code, re.M):
        return problem["prompt"] + code
    above = re.split(rf"^def\s+{name}\b", problem["prompt"], maxsplit=1, flags=re.M)[0]
    return code if "__future__" in code else above + code  # such an import must come first


def splittable(problem: dict) -> bool:
    """Do all expected values stay outside the box? True of 158 rows."""
    return bool(_checks(problem)[0])


def _checks(problem):
    """(checks, text to run before them), or ([], the test's whole text) if an assert cannot be split."""
    alias = f"candidate = {problem['entry_point']}\n"
    module = ast.parse(problem["test"])
    [function] = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "check")
    imports = [node for node in module.body + function.body if isinstance(node, ast.Import | ast.ImportFrom)]
    checks = []
    for node in function.body:
        silent = isinstance(node, ast.Expr) and "candidate" not in ast.unparse(node)  # a docstring, a print
        always = isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant) and node.test.value  # assert True
        if not silent and not always and node not in imports:
            checks.append(split_assert(node))
    if not checks or None in checks:
        return [], f"{problem['test']}\n{alias}"
    return checks, alias + "\n".join(map(ast.unparse, imports))
