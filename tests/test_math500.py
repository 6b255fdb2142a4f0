r"""Pairs of answers worked by hand, for each kind of answer that MATH-500 has; extraction; bounds; the file."""
import json
import os
import threading

import pytest

from adversarial import assert_bounded, cost
from data import math500
from data.grading import Outcome

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR
staged = pytest.mark.skipif(not os.path.isfile(os.path.join(os.environ.get("TEMPER_DATA", ""), "math500/test.jsonl")),
                            reason="needs TEMPER_DATA=<folder that holds math500/test.jsonl>")

SAME = {
    "integers": [("72", "72"), ("-72", "−72"), ("72.0", "72"), ("+3", "3"), ("007", "7"), ("10,000", "10000"), (r"32,\!348", "32348"),
                 (r"11,\! 111,\! 111,\! 100", "11111111100"), ("1{,}000", "1000"), (r"1\,000\,000", "1,000,000"), (r"2^{10}", "1024"),
                 (r"2^3 \cdot 3^2", "72"), ("72.", "72"), (r"$72$", "72"), (r"\left(72\right)", "72"), (r"{72}", "72"), ("2*36", "72")],
    "fractions": [(r"\frac{3}{56}", "3/56"), (r"\dfrac12", r"\tfrac{2}{4}"), (r"\frac 12", "0.5"), (r"\frac1{72}", "1/72"), (r"\frac{1}2", ".5"),
                  (r"-\frac{35}{9}", r"\frac{-35}{9}"), (r"\frac{35}{-9}", "-35/9"), (r"\frac{\frac{1}{2}}{3}", r"\frac16"), ("14/4", "7/2")],
    "roots and pi": [(r"3\sqrt{13}", r"\sqrt{117}"), (r"11\sqrt2", r"\sqrt{242}"), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
                     (r"\sqrt{6}", r"\sqrt{2}\sqrt{3}"), (r"\sqrt{\frac{1}{2}}", r"\frac{\sqrt{2}}{2}"), (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"),
                     (r"\frac{1}{2+\sqrt3}", r"2-\sqrt{3}"), (r"2^{1/2}", r"\sqrt2"), (r"4^{\frac{3}{2}}", "8"), (r"\sqrt[4]{4}", r"\sqrt{2}"),
                     (r"\frac{\pi}{2}", r"\pi/2"), (r"2\pi r", r"2r\pi"), ("4π", r"4\pi"), (r"(1+\sqrt{5})^2", r"6+2\sqrt5"),
                     (r"\sqrt[3]{-8}", "-2"), (r"\sqrt{3}/2", r"\frac{\sqrt{3}}{2}"), (r"\sqrt{50x}", r"5\sqrt{2x}"), (r"\sqrt{999983^2}", "999983")],
    "letters and i": [("6 - 5i", "-5i+6"), ("p - q", "-q + p"), ("x^3+3x-6", "3x+x^3-6"), (r"\frac{x+1}{2}", "0.5x+.5"), ("2x", "x*2"),
                      ("(x+1)(x-1)", "x^2-1"), (r"\frac{x^2-1}{x-1}", "x+1"), (r"\frac{1}{1+i}", r"\frac{1-i}{2}"), (r"\sqrt{-4}", "2i"),
                      ("i^3", "-i"), ("xy", "yx"), (r"\theta+\alpha", r"\alpha+\theta"), ("x_1+x_2", "x_2+x_1"), ("x_{12}", "x_{12}"),
                      ("x^{-1}", r"\frac{1}{x}"), (r"\sqrt{x^3}", r"x\sqrt{x}"), ("3R^2", "3 R^2"), (r"\mathbf{i}+2\mathbf{j}", "i+2j")],
    "tuples and intervals": [(r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"), ("(1,2,3)", "( 1, 2, 3 )"), ("(3,4]", r"\left(3,4\right]"),
                             (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty,2)"), (r"(-∞,2]", r"(-\infty,2]"),
                             (r"x \in [-2,7]", "[-2,7]"), (r"((1,2),(3,4))", "((1,2),(3,4))"), (r"(0.5,\sqrt4)", r"(\frac12,2)"),
                             (r"(1,\pm 2)", "(1,2), (1,-2)")],
    "decimals": [("0.09", ".09"), ("0.50", "1/2"), ("1.5", r"\frac{3}{2}"), ("1,234.5", "1234.5"), (r"1.2 \times 10^{-3}", "0.0012")],
    "words": [(r"\text{Evelyn}", "Evelyn"), (r"\text{(C)}", "C"), (r"\text{(C)}", "(C)"), (r"\textbf{Even}", r"\text{even}"),
              (r"\text{east}", "East."), (r"\text{ellipse}", r"\mathrm{ellipse}"), ("no", "No"), (r"\text{black or white}", "black or white"),
              ("짝수", r"\text{짝수}")],
    "mixed, in a base": [(r"3\frac{1}{2}", "7/2"), ("3 1/2", "3.5"), (r"-1\frac45", "-9/5"), ("2516_8", "2516_{8}"), ("4343_6", "4343"),
                         ("4343", r"(4343)_{6}"), ("2A_{16}", "2A_{16}"), (r"5-1\frac12", "3.5")],
    "matrices": [(r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{bmatrix} -\frac13 \\ \frac{2}{3}\end{bmatrix}"),
                 (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\\\end{pmatrix}"),
                 (r"\left( \begin{array}{c} 1 \\ x+1 \end{array} \right)", r"\begin{pmatrix} 1 \\ 1+x \end{pmatrix}")],
    "relations": [("x=5", "5"), ("5", "x = 5"), ("y = 2x+3", "y=3+2x"), ("y = 2x+3", "2x-y=-3"), ("f(x) = 2x", "2x"), ("1 < x \\le 2", "2 \\ge x > 1"),
                  (r"x \geq 3", r"3 \leqslant x"), ("x=1, x=2", "1,2"), ("x=3, y=4", "y=4,x=3"), (r"x \ne 2", "x ≠ 2"), (r"\text{Area} = 5", "5")],
    "lists": [("1, -2", "-2,1"), (r"3 \pm 2\sqrt{2}", r"3-2\sqrt2, 3+2\sqrt2"), (r"1\text{ or }2", "2, 1"), ("1, 2 and 3", "3,2,1"),
              (r"0, \pm 2", "-2, 0, 2"), (r"\pm 1", r"\mp 1"), (r"\frac{1\pm i}{2}", r"\frac{1+i}{2}, \frac{1-i}{2}")],
    "units": [("90^\\circ", "90"), ("90°", r"90^{\circ}"), (r"5.4 \text{ cents}", "5.4"), (r"15\mbox{ cm}^2", "15"), (r"20\%", "20"), (r"\$32", "32"),
              ("5 cm", "5"), ("36 square units", "36"), (r"30\text{ degrees}", r"30^\circ"), ("10 inches", r"10\text{ in}")],
    "sets": [(r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt5, 1-\sqrt5\}"), (r"\{1,2\}", "2,1"), (r"\{ \}", r"\emptyset"), (r"\{(1,2),(3,4)\}", "(3,4), (1,2)")],
    "equal text outside the grammar": [(r"\sin x", r"\sin x"), ("5!", "5!"), ("3:2", "3 : 2"), (r"0.\overline{3}", r"0.\overline{3}"), ("2^n", "2^n"),
                                       (r"\text{6:00 p.m.}", r"\text{6:00 p.m.}")],
}
DIFFERENT = {
    "integers": [("72", "-72"), ("72", "720"), ("1024", "2^9"), ("12", "21"), ("10000", "1,000"), ("0", "1")],
    "fractions": [(r"\frac13", ".333"), (r"\frac13", "0.333333333333333333"), (r"\frac{3}{56}", r"\frac{56}{3}"), (r"\frac12", "12")],
    "roots and pi": [(r"\sqrt{2}", "1.41421356237"), (r"3\sqrt{13}", r"\sqrt{39}"), (r"\pi", "3.14159"), (r"\pi", r"\frac{22}{7}"), (r"\sqrt2", r"\sqrt3"),
                     (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5}"), (r"\sqrt[3]{2}", r"\sqrt{2}"), (r"\sqrt{\pi}", r"\pi")],
    "letters and i": [("6-5i", "6+5i"), ("x", "X"), ("x", "y"), ("x^2", "2x"), ("x+1", "x"), ("x_1", "x_2"), ("2x", "2"), ("i", "1"), ("e", "2.718281828")],
    "tuples and intervals": [("(1,2)", "[1,2]"), ("(1,2)", "(1,2]"), ("(1,2)", "(2,1)"), ("(1,2)", "1,2"), ("(1,2)", "(1,2,3)"), ("(1,2)", r"\{1,2\}"),
                             (r"(-\infty,2)", r"(-\infty,3)"), (r"(0,1)\cup(2,3)", "(0,1), (2,3)"), (r"(0,1)\cup(2,3)", "(0,3)")],
    "decimals": [("0.09", "0.9"), ("1.5", "1,5"), ("2.3", "2,3"), ("0.1", "0.10000001")],
    "words": [(r"\text{Evelyn}", "Angela"), (r"\text{(C)}", "(D)"), (r"\text{even}", "odd"), (r"\text{even}", "2"), ("5", r"\text{none}"), ("even", "neve")],
    "mixed, in a base": [(r"3\frac12", r"\frac32"), ("2516_8", "2516_9"), ("2516_8", "2561_8"), ("1010_2", "10"), ("10_2", "2_{10}")],
    "matrices": [(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
                 (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)")],
    "relations": [("x=5", "y=5"), ("x=5", "6"), ("x > 3", "x < 3"), ("x > 3", r"x \ge 3"), ("y=2x+3", "y=3x+2"), ("x+y=1", "2x+2y=2"), ("x=3,y=4", "3,4"),
                  ("1<x<2", "1<x<3")],
    "lists": [("1,2", "1,2,3"), ("1,2", "1,3"), ("1,1,2", "1,2,2"), (r"\pm 1", "1"), (r"1 \pm \sqrt2", r"1 + \sqrt{2}"), ("5", "5, 6")],
    "units": [("20", "0.2"), (r"20\%", "0.2"), ("90^\\circ", r"\frac{\pi}{2}"), ("5", "5m")],
    "sets": [(r"\{1,2\}", "(1,2)"), (r"\{1,2\}", r"\{1\}"), (r"\{2\}", "2"), (r"\emptyset", "0")],
}
# what two readers could take for two things, or what only a tolerance, a theorem or an evaluation would settle
REFUSED = [("2x", "x2"), ("x/2", "1/2x"), (r"\frac{\pi}{2}", r"1/2\pi"), ("10/3", r"2\frac{5}{3}"), ("6", "2 3"), ("7", r"3\frac12 x"), ("x", r"\sqrt{x^2}"),
           ("2", r"\log_2 4"), ("120", "5!"), ("5", "|5|"), ("1", r"\sin \frac{\pi}{2}"), ("5", "five5"), ("5", r"5 \approx 5"), ("5", "(5"), ("5", "5)"),
           ("5", "5+"), ("5", "*5"), ("5", "5^"), ("5", r"\frac{5}"), ("5", r"\sqrt{}"), ("5", "0/0"), ("1", "0^0 / 0"), ("5", "1.2.3"), ("5", "1e5"),
           ("5", "５"), ("5", "٥"), ("5", "5,,"[:1] + "?"), ("5", "[5"), ("5", "x^{33}"), ("5", "9^{9^{9}}"), ("5", "2^{5000}"), ("5", "(a+b+c)^{20}"),
           ("5", r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}"), ("5", r"\begin{pmatrix} 1 & 2 \\ 3 \end{pmatrix}"), ("5", r"\sqrt{1+\sqrt{2}}"),
           ("5", "((((((((((((((5))))))))))))))"), ("5", "9" * 200), ("5", "2^3^2"), ("5", "2**3"), ("5", r"\input{x}"), ("5", "1;2"), (r"\sin x", "5")]


def boxed(text):
    return f"So the answer is $\\boxed{{{text}}}$."


def pairs(table):
    return [pytest.param(a, b, id=f"{kind}: {a} | {b}") for kind, rows in table.items() for a, b in rows]


def test_the_table_covers_every_kind():
    assert set(DIFFERENT) == set(SAME) - {"equal text outside the grammar"} and sum(map(len, SAME.values())) + sum(map(len, DIFFERENT.values())) > 180


@pytest.mark.parametrize("a, b", pairs(SAME))
def test_same(a, b):
    assert math500.grade(boxed(b), a) == math500.grade(boxed(a), b) == RIGHT


@pytest.mark.parametrize("a, b", pairs(DIFFERENT))
def test_different(a, b):
    assert math500.grade(boxed(b), a) == WRONG
    assert math500.grade(boxed(a), b) == WRONG


@pytest.mark.parametrize("gold, found", REFUSED, ids=lambda text: text[:30])
def test_never_guesses(gold, found):
    assert math500.grade(boxed(found), gold) == UNGRADABLE


def test_shuffled_answers_are_not_right():
    """All against all: two answers of the table are equal only if the table says so, or their values are (by hand: below)."""
    golds = sorted({a for kind, rows in SAME.items() if "text" not in kind for a, _ in rows})
    outcomes = [math500.grade(boxed(golds[i - 7]), gold) for i, gold in enumerate(golds)]
    assert RIGHT not in outcomes and ERROR not in outcomes and outcomes.count(WRONG) > 0.95 * len(golds)
    assert all(math500.grade(boxed(gold), gold) == RIGHT for gold in golds)


# -----------------------------------------------------------------------------
# Which text is the answer


@pytest.mark.parametrize("text, content", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{1} then \boxed{2", "1"), (r"\boxed{\boxed{3}}", "3"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed {7}", "7"), (r"}} \boxed{5}}}", "5"), (r"{\boxed{{a}{b}}", "{a}{b}"), (r"\boxed{}", ""), ("boxed{3}", None),
    (r"\boxed 5", None), (r"\boxed{\boxed{4} 5", "4"), (r"\boxed{x_{1}^{2}} {", "x_{1}^{2}"), ("", None), (r"\boxed{a\}b}", r"a\}b"), pytest.param(r"\boxed{1}" * 5000, "1", id="10,000 matches"), pytest.param(r"\boxed{1}" * 5001, None, id="10,002"),
])
def test_last_boxed(text, content):
    assert math500.last_boxed(text) == content


@pytest.mark.parametrize("response, strict, lenient", [
    (r"\boxed{4}", RIGHT, RIGHT), (r"\boxed{5} is wrong, so \boxed{4}", RIGHT, RIGHT), (r"\boxed{4} or \boxed{5}", WRONG, WRONG),
    ("The answer is 4.", UNGRADABLE, RIGHT), ("The answer is 5. No: the ANSWER IS: $4$.", UNGRADABLE, RIGHT), ("It is 4", UNGRADABLE, RIGHT),
    ("the answer is **4**.", UNGRADABLE, RIGHT), ("The answer is 4 apples.", UNGRADABLE, RIGHT), ("The answer is 8/2", UNGRADABLE, RIGHT),
    (r"The answer is $\frac{8}{2}$ since 9 is not.", UNGRADABLE, RIGHT), ("It is 8/2", UNGRADABLE, UNGRADABLE), ("4 = 9", UNGRADABLE, WRONG),
    ("four", UNGRADABLE, UNGRADABLE), ("", UNGRADABLE, UNGRADABLE), (r"\boxed{}", UNGRADABLE, UNGRADABLE), (r"\boxed{ }", UNGRADABLE, UNGRADABLE),
    (r"\boxed{.}", UNGRADABLE, UNGRADABLE), ("The answer is", UNGRADABLE, UNGRADABLE), ("the answer is not 5, it is 4", UNGRADABLE, RIGHT),
])
def test_strict_and_lenient(response, strict, lenient):
    assert math500.grade(response, "4") == strict
    assert math500.grade(response, "4", strict=False) == lenient


# -----------------------------------------------------------------------------
# Bounds


HARD = {
    "pow": "(1+x)^{31}" + "+(1+x)^{31}" * 40, "roots": "*".join(f"(1+\\sqrt{{{p}}})" for p in (2, 3, 5, 7, 11, 13)) + r"(1+\sqrt{2})" * 20,
    "powers": "+".join(["3^{1200}"] * 50), "primes": r"\sqrt{999983}" * 36, "list": ",".join(["(1+x)^{9}"] * 40), "signs": r"\pm1" * 100,
    "words": "aaaa " * 100, "almost a word": "a" * 511 + "1", "spaces": "1" + " " * 500 + "2", "texts": r"\text{" * 60 + "}" * 60, "digits": "9" * 500,
    "commas": "," * 500, "thousands": "1,234" * 100, "fractions": r"\frac{1}{1+" * 11 + "1" + "}" * 11, "capitals": "A1" * 250, "units": "1 square " * 50,
    "answers": "1 and " * 80 + "2", "roots of roots": r"\sqrt" * 100 + "2", "frac": r"\frac" * 100, "minus": "-" * 500 + "1", "exponents": "2^" * 200 + "2",
}


@pytest.mark.parametrize("gold", ("72", r"(1+x)^9, (1+x)^8, 3, \sqrt{2}+\sqrt{3}", r"\text{Evelyn}"))
def test_hard_answers_are_cheap(gold):
    """Each within 50 ms of the thread's own time, as adversarial.py measures it. Measured: at most 20 ms."""
    for name, text in HARD.items():
        outcome, best = cost(lambda text=text: math500.grade(boxed(text), gold, strict=False), enough=0.05)
        assert best <= 0.05 and outcome in (WRONG, UNGRADABLE), name
        assert math500.grade(boxed(text), text + "+1") in (WRONG, UNGRADABLE), name  # as a reference


@pytest.mark.parametrize("strict", (True, False))
def test_adversarial_corpus(strict):
    outcomes = assert_bounded(lambda text: math500.grade(text, r"\frac{72}{5}", strict))
    assert ERROR not in outcomes.values() and RIGHT not in outcomes.values()
    outcomes = assert_bounded(lambda text: math500.grade(r"\boxed{" + text + "}", "72", strict))
    assert ERROR not in outcomes.values() and RIGHT not in outcomes.values()
    long = "x" * (65536 - 9) + r"\boxed{4}"
    assert math500.grade(long, "4", strict) == RIGHT and math500.grade("x" + long, "4", strict) == UNGRADABLE


@pytest.mark.parametrize("text", (r"\boxed{" + "{" * 65000, r"\boxed{" + "{}" * 32000, r"\boxed{" + r"\{" * 32000, r"\boxed{" * 9000, r"\boxed{1}" * 7000, r"\boxed{" + "{" * 22000 + "}" * 22000,
                                  r"\boxed{" + "{a" * 32000, r"\boxed{" + "{}}a" * 16000, r"\boxed{" + "{a{b}" * 13000, r"\boxed{" + r"\b" * 32000, "answer is " * 6500, r"\boxed" + " " * 65000))
def test_scans_are_linear(text):
    seconds = [cost(lambda part=part: math500.grade(part, "72", strict=False))[1] for part in (text[:len(text) // 4], text)]
    assert seconds[1] < 0.05 and seconds[1] < 9 * seconds[0] + 0.004  # four times the text: 4 if linear, 16 if quadratic


def test_threads_share_nothing():
    """Bounded work is counted per call: four threads that grade at once agree with one."""
    golds = [a for rows in SAME.values() for a, _ in rows]
    expected, found = [math500.grade(boxed(g), "7") for g in golds], [None] * 4

    def run(k):
        found[k] = [math500.grade(boxed(g), "7") for g in golds]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_an_exception_is_never_a_score(monkeypatch, caplog):
    assert math500.grade(r"\boxed{4}", " ") == ERROR and "expected a reference" in caplog.text
    assert math500.grade(None, "4") == ERROR
    monkeypatch.setattr(math500, "_same", lambda *_: 1 / 0)
    assert math500.grade(r"\boxed{4}", "5") == ERROR and "ZeroDivisionError" in caplog.text


# -----------------------------------------------------------------------------
# The file


def write(folder, rows):
    (folder / "math500").mkdir(exist_ok=True)
    (folder / "math500/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_load(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"expected MATH-500 at .*math500/test.jsonl.*TEMPER_DATA.*problem, answer, subject, level, unique_id"):
        math500.load()
    row = {"problem": "1+1?", "solution": "2", "answer": "2", "subject": "Algebra", "level": 1, "unique_id": "test/1.json"}
    write(tmp_path, [row] * 500)
    assert math500.load() == [{name: row[name] for name in math500.FIELDS}] * 500
    some = math500.problems(3, seed=1)
    assert [p.answer for p in some] == ["2"] * 3 and some[0].hidden == {"subject": "Algebra", "level": 1, "unique_id": "test/1.json"}
    assert all(math500.grade(p.gold[-1]["content"], p.answer) == RIGHT and "1+1?" in p.prompt[0]["content"] for p in some)
    write(tmp_path, [row] * 499)
    with pytest.raises(ValueError, match="expected 500 rows, found 499"):
        math500.load()
    for bad in ({**row, "answer": "$ $"}, {name: value for name, value in row.items() if name != "unique_id"}, {**row, "answer": 2}):
        write(tmp_path, [row, bad])
        with pytest.raises(ValueError, match="test.jsonl:2: expected the fields"):
            math500.load()


def test_order_depends_on_the_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path))
    write(tmp_path, [{"problem": f"{i}?", "answer": str(i), "subject": "", "level": 1, "unique_id": str(i)} for i in range(500)])
    assert math500.problems(seed=3)[:20] == math500.problems(20, seed=3) != math500.problems(20, seed=4)
    assert {p.answer for p in math500.problems()} == {str(i) for i in range(500)}


@staged
def test_gold_answers():
    rows = math500.load()
    golds = [row["answer"] for row in rows]
    assert all(math500.grade(boxed(gold), gold) == RIGHT for gold in golds)
    shifted = [math500.grade(boxed(golds[i - 1]), gold) for i, gold in enumerate(golds)]
    assert shifted.count(RIGHT) < 0.03 * 500 and shifted.count(UNGRADABLE) < 0.1 * 500 and ERROR not in shifted
