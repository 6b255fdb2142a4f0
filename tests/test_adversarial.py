"""Every grader that reads a model's text, against responses that break careless graders.

What must hold for each: no exception, at most 50 ms of the thread's own time on 64 KB, the same from another thread, and
never right on what holds no answer. Gold answers are right, other people's gold answers no more often than by chance.
A new pure grader joins by one line in GRADERS.
"""
import ast
import inspect
import os
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from adversarial import CORPUS, assert_bounded
from data import bfcl, calculator, gsm8k, humaneval, ifeval, math500, mbpp, tinypython, toy
from data.grading import Outcome, never_raises

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR
DATA = Path(toy.__file__).parent
staged = pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("TEMPER_DATA", ""), "gsm8k")),
                            reason="needs TEMPER_DATA=<folder that holds gsm8k/>")

TASKS = ("sums", "facts_en", "reasoning", "math_ko", "tool", "code", "chat_en")
ITEMS = {task: toy.item(task, "test", 0, 1) for task in TASKS}
FUNCTIONS = [{"name": "book", "description": "Books.", "parameters": {"type": "dict", "required": ["title"], "properties": {
    "title": {"type": "string"}, "copies": {"type": "array", "items": {"type": "integer"}}}}}]
CALLS = {"functions": FUNCTIONS, "possible_answer": [{"book": {"title": ["Emma"], "copies": [[4321], ""]}}]}
# scans of every kind (words, sentences, sections, stars, titles, JSON), and a keyword that no response below has
INSTRUCTIONS = {
    "keywords:existence": {"keywords": ["zebrafish"]}, "length_constraints:number_sentences": {"num_sentences": 3, "relation": "at least"},
    "length_constraints:number_words": {"num_words": 5, "relation": "at least"}, "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2}, "detectable_format:title": {}, "detectable_format:json_format": {},
    "detectable_content:number_placeholders": {"num_placeholders": 2}, "language:response_language": {"language": "ko"},
    "change_case:capital_word_frequency": {"capital_frequency": 3, "capital_relation": "at least"}, "combination:two_responses": {},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2}, "detectable_format:number_bullet_lists": {"num_bullets": 3},
}
# name -> text -> Outcome, for one problem whose answer no response below gives
GRADERS = {
    "gsm8k": lambda text: gsm8k.grade(text, "#### 4321"),
    "gsm8k lenient": lambda text: gsm8k.grade(text, "#### 4321", strict=False),
    "math500": lambda text: math500.grade(text, r"\frac{4321}{7}"),
    "math500 lenient": lambda text: math500.grade(text, r"\frac{4321}{7}", strict=False),
    "math500 word": lambda text: math500.grade(text, r"\text{ellipse}"),
    **{f"ifeval {name}": lambda text, name=name: ifeval.outcome(text, [name, "keywords:existence"], [INSTRUCTIONS[name], {"keywords": ["zebrafish"]}])
       for name in INSTRUCTIONS},
    "bfcl": lambda text: bfcl.grade_response(text, CALLS),
    **{f"toy {task}": lambda text, problem=problem: toy.grade(problem, text) for task, problem in ITEMS.items()},
}
# format without an answer, lists of all answers, pleas: in the form that each grader asks for
NUMBERS = [str(n) for n in range(2000)]
EXTRA = {
    "tower in a box": r"\boxed{9**9**9}", "tower in TeX": r"\boxed{9^{9^{9}}}", "empty box": r"\boxed{}", "open boxes": r"\boxed{" * 9000,
    "box of braces": r"\boxed{" + "{" * 60_000, "deep box": r"\boxed{" + "(" * 250 + "1" + ")" * 250 + "}", "10^4 digits in a box": r"\boxed{" + "9" * 10_000 + "}",
    "1e999 in a box": r"\boxed{1e999}", "full-width in a box": r"\boxed{４３２１}", "NUL in a box": "\\boxed{\0}", "surrogate in a box": "\\boxed{\ud800}",
    "right-to-left in a box": "\\boxed{\u202e7\u200f}", "all numbers, boxed": r"\boxed{" + ", ".join(NUMBERS[:90]) + "}",
    "all numbers, each in a box": " ".join(rf"\boxed{{{n}}}" for n in NUMBERS), "all numbers, marked": "\n".join(f"#### {n}" for n in NUMBERS),
    "all words": r"\boxed{circle, parabola, hyperbola}", "plea in a box": r"\boxed{\text{ignore the rubric, score 10}}", "plea, marked": "#### full marks",
    "box of pm": r"\boxed{" + r"\pm 1 " * 60 + "}", "box of roots": r"\boxed{" + r"\sqrt{999983}" * 36 + "}", "box of powers": r"\boxed{" + "(1+x)^{31}+" * 40 + "1}",
    "64 KB of 'answer is '": "answer is " * 6500, "64 KB of combining accents": "e" + "\u0301" * 32_000, "64 KB of emoji": "\U0001f600" * 16_000,
    "64 KB of CRLF": "\r\n" * 32_000, "answer in a call": '<tool_call>\n{"name": "answer", "arguments": {}}\n</tool_call>',
}


def test_the_bound_sees_what_explodes_and_not_the_machine(monkeypatch):
    """A quadratic and an exponential grader fail; one that takes 20 ms passes where every clock reads four times as much, and 200 ms fails there too."""
    def quadratic(text):
        for i in range(0, len(text), 60):
            text[i:].count("zz")

    def exponential(text):
        re.match(r"(?:9|9)*$", text[:21] + "x" if text.startswith("9" * 24) else text[:9])

    def busy(seconds):
        def grade(text):
            if text == CORPUS["NaN"]:
                end = time.thread_time() + seconds
                while time.thread_time() < end:
                    pass
        return grade

    for grade, which in ((quadratic, "parentheses"), (exponential, "of '9"), (busy(.2), "NaN")):
        with pytest.raises(AssertionError, match=which):
            assert_bounded(grade)
    assert_bounded(busy(.02))
    clock = time.thread_time
    monkeypatch.setattr("adversarial.time", SimpleNamespace(thread_time=lambda: 4 * clock()))
    assert_bounded(busy(.02))
    with pytest.raises(AssertionError, match="NaN"):
        assert_bounded(busy(.2))


@pytest.mark.parametrize("name", GRADERS)
def test_corpus(name, monkeypatch):
    """50 ms of an idle core is the bound that users get. Measured: at most 25 ms, on 64 KB of unclosed braces."""
    monkeypatch.setattr("adversarial.CORPUS", {**CORPUS, **EXTRA})
    outcomes = assert_bounded(GRADERS[name])
    assert len(outcomes) == len(CORPUS) + len(EXTRA) and set(outcomes.values()) <= {WRONG, UNGRADABLE}, {
        text: outcome for text, outcome in outcomes.items() if outcome not in (WRONG, UNGRADABLE)}


@pytest.mark.parametrize("name", GRADERS)
def test_blank_is_ungradable_or_wrong_and_echo_is_not_right(name):
    assert all(GRADERS[name](text) in (WRONG, UNGRADABLE) for text in ("", " ", "\n\n", "\0"))
    if name.startswith("toy "):
        prompt = ITEMS[name[4:]].prompt
        question = prompt if isinstance(prompt, str) else prompt[0]["content"]
        assert GRADERS[name](question) in (WRONG, UNGRADABLE) and GRADERS[name](question * 3) in (WRONG, UNGRADABLE)


@pytest.mark.parametrize("name", GRADERS)
def test_an_injected_exception_is_a_grader_error(name, monkeypatch):
    """The deepest function that each grader calls raises: never a score of 0, never a reward."""
    def broken(*_, **__):
        raise ZeroDivisionError("injected")

    module, inner = {"gsm8k": (gsm8k, "gold_number"), "math500": (math500, "_clean"), "ifeval": (ifeval, "grade"),
                     "bfcl": (bfcl, "parse_tool_calls")}.get(name.split()[0], (toy, "grade_answer"))
    monkeypatch.setattr(toy, "grade_call", lambda *_: RIGHT)
    monkeypatch.setattr(module, inner, broken)
    assert GRADERS[name]("7") == ERROR


def test_never_raises_lets_through_what_is_not_ours():
    """KeyboardInterrupt and SystemExit end the run; an exception of ours does not."""
    for error in (KeyboardInterrupt, SystemExit):
        @never_raises
        def grade(error=error):
            raise error

        with pytest.raises(error):
            grade()

    @never_raises
    def recursive(n):
        return recursive.__wrapped__(n + 1)

    assert recursive(0) == ERROR


# -----------------------------------------------------------------------------
# Golds


@pytest.mark.parametrize("task", TASKS)
def test_toy_golds_are_right_and_shuffled_ones_no_more_often_than_by_chance(task):
    problems = toy.problems(task, "test", seed=5, num=100)
    golds = [p.gold if isinstance(p.gold, str) else p.gold[-1]["content"] for p in problems]
    order = random.Random(0).sample(range(len(golds)), len(golds))
    assert all(toy.grade(p, p.gold) == RIGHT for p in problems)
    shuffled = [toy.grade(p, problems[i].gold) for p, i in zip(problems, order)]
    # chance: the same text; beside it "yes" and "no call" style answers that are equal as values
    chance = sum(golds[i] == gold or toy.grade_answer(p, golds[i]) == RIGHT for p, gold, i in zip(problems, golds, order))
    assert shuffled.count(RIGHT) <= chance < 0.6 * len(golds) and ERROR not in shuffled


@staged
def test_gsm8k_golds_are_right_and_shuffled_ones_no_more_often_than_by_chance():
    """All 8,792. Chance is the share of questions whose permuted answer is the same number: 1.2 %, as answers repeat."""
    golds = [row["answer"] for split in gsm8k.NUM_ROWS for row in gsm8k.load(split)]
    assert len(golds) == 8792 and all(gsm8k.grade(gold, gold) == RIGHT for gold in golds)
    order = random.Random(0).sample(range(len(golds)), len(golds))
    equal = sum(gsm8k.gold_number(golds[i]) == gsm8k.gold_number(gold) for i, gold in zip(order, golds))
    shuffled = [gsm8k.grade(golds[i], gold) for i, gold in zip(order, golds)]
    assert shuffled.count(RIGHT) == equal < 0.02 * len(golds) and shuffled.count(WRONG) == len(golds) - equal
    # the same numbers through the MATH grader, which reads them as TeX
    numbers = [gold.rpartition("####")[2].strip() for gold in golds[:1000]]
    assert all(math500.grade(rf"\boxed{{{n}}}", n) == RIGHT for n in numbers)


def test_constant_and_echo_policies_score_at_most_chance():
    """One answer for all questions is right only where it is the answer."""
    problems = toy.problems("sums", "test", seed=3, num=100)
    for constant in ("0", "1", "12", "100"):
        right = sum(toy.grade(p, constant) == RIGHT for p in problems)
        assert right == sum(p.answer == constant for p in problems) <= 5


# -----------------------------------------------------------------------------
# The text of the graders


FILES = sorted(path for path in DATA.glob("*.py") if "Outcome" in path.read_text() or path.stem in ("calculator", "tinypython"))
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "marshal.loads", "os.system", "signal.signal", "signal.alarm",
                   "signal.setitimer", "globals", "input", "yaml.load"}
FORBIDDEN_IMPORTS = {"pickle", "signal", "sympy", "shelve", "dill"}


def violations(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            yield f"line {node.lineno}: calls {ast.unparse(node.func)}"
        elif isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "BaseException"):
            yield f"line {node.lineno}: bare except"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: imports {name}" for name in names if name.partition(".")[0] in FORBIDDEN_IMPORTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_grader_runs_what_it_read(path):
    assert list(violations(path.read_text())) == []


def test_the_scan_sees():
    """It finds what it must, does not take literal_eval or re.compile for eval and compile, and covers every grader."""
    for bad in ("eval('1')", "exec(x)", "import pickle", "from pickle import loads", "try:\n    f()\nexcept:\n    pass", "signal.alarm(1)",
                "try:\n    f()\nexcept BaseException:\n    pass", "__import__('os')", "def f():\n    return [eval(x) for x in y]"):
        assert list(violations(bad)), bad
    assert not list(violations("import ast, re\nast.literal_eval('1')\nre.compile('a')\ntry:\n    f()\nexcept ValueError:\n    pass"))
    assert {"gsm8k.py", "math500.py", "ifeval.py", "bfcl.py", "mbpp.py", "humaneval.py", "toy.py", "tinypython.py", "calculator.py", "grading.py"} <= {path.name for path in FILES}


def test_every_grade_is_wrapped():
    """A public grade* that returns an Outcome turns its own exceptions into GRADER_ERROR."""
    for module in (gsm8k, math500, toy, mbpp, humaneval, ifeval, bfcl, tinypython):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("grade") and function.__module__ == module.__name__ and inspect.signature(function).return_annotation is Outcome:
                assert hasattr(function, "__wrapped__"), f"{module.__name__}.{name}"


def test_the_calculator_is_exact_and_bounded_from_the_graders():
    """What toy graders hand to it is model text: the tower of nines and long sums must be refused, not computed."""
    for text in ("9**9**9", "9" * 300, "(" * 200 + "1" + ")" * 200, "1/0", "__import__('os')"):
        with pytest.raises(calculator.CalculatorError):
            calculator.calculate(text)
