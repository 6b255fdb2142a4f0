import math
import os
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adversarial import CORPUS, cost
from data import calculator
from data.calculator import CalculatorError, calculate, evaluate, format_number


@pytest.mark.parametrize("expression, value", [
    ("12+3*4", "24"), ("(12+3)*4", "60"), ("0.1+0.2", "0.3"), ("2/6", "1/3"), ("-1/8", "-0.125"), ("1/80", "0.0125"),
    ("-2**2", "-4"), ("2**-2", "0.25"), ("2**3**2", "512"), ("(-2)**3", "-8"), ("0**0", "1"), ("8/2/2", "2"), ("8-2-2", "4"),
    ("7//2", "3"), ("-7//2", "-4"), ("-7%3", "2"), ("7.5%2", "1.5"), ("7.5//2", "3"), (".5*.5", "0.25"), ("1.", "1"), ("007", "7"),
    ("--3", "3"), ("2*-3", "-6"), ("+-+3", "-3"), (" 1 + 2 ", "3"), ("5\u22123", "2"), ("2**64", "18446744073709551616"),
])
def test_values(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression, reason", [
    ("", "expected a number, found the end"), ("1+", "found the end"), ("*2", "found \\*"), ("1 2", "expected an operator"),
    ("(1", "closing parenthesis"), ("1)", "expected an operator"), ("()", "expected a number"), ("1/0", "division by zero"),
    ("1//0", "division by zero"), ("1%0", "division by zero"), ("0**-1", "division by zero"), ("2**0.5", "exponent"),
    ("2**65", "exponent"), ("9**9**9", "exponent"), ("(2**64)**64*2", "too large"), ("2**64**2", "exponent"), ("1,000", "','"),
    ("1e5", "'e'"), ("0x10", "'x'"), ("x", "'x'"), ("2^3", "'\\^'"), ("７", "'７'"), ("__import__('os')", "'_'"), ("1\n+2", "found"),
    ("(" * 33 + "1" + ")" * 33, "too deep"), ("2**" * 60 + "1", "too deep"), ("1" * 257, "too long"), ("1_0", "'_'"), ("1.2.3", "expected an operator"),
])
def test_refusals(expression, reason):
    with pytest.raises(CalculatorError, match=reason):
        calculate(expression)


def test_bounds_are_where_they_are_said_to_be():
    assert calculate("(" * 32 + "1" + ")" * 32) == "1"
    assert calculate("+" * 255 + "1") == "1"
    assert calculate("(2**64)**63 // 2**1") == str(2**(64 * 63 - 1))
    assert evaluate("((2**63)**64)*(2**63)") == 2**(63 * 65)  # 4,096 bits
    for one_more in ("((2**63)**64)*(2**64)", "(2**63)**64*2**63 + (2**63)**64*2**63"):
        with pytest.raises(CalculatorError, match="too large"):
            evaluate(one_more)
    assert len(calculate("1/((2**63)**64)")) > 4000  # the longest decimals still print


def test_every_gsm8k_note_is_exact():
    if not os.path.isdir(os.path.join(os.environ.get("TEMPER_DATA", ""), "gsm8k")):
        pytest.skip("needs TEMPER_DATA=<folder that holds gsm8k/>")
    from data import gsm8k
    notes = [note for split in ("train", "test") for row in gsm8k.load(split) for note in re.findall("<<([^<>]*)>>", row["answer"])]
    assert len(notes) == 27_998
    for note in notes:
        expression, _, value = note.rpartition("=")
        assert evaluate(expression) == evaluate(value), note


# random expression trees, valued beside the calculator with Fractions. Printed with every parenthesis, and with none that
# Python's precedence makes unnecessary for + - * /.
numbers = st.one_of(st.integers(0, 99).map(lambda n: (str(n), Fraction(n), 9)),
                    st.integers(0, 999).map(lambda n: (f"{n / 10:.1f}", Fraction(n, 10), 9)))


def combine(children):
    def join(operator, left, right, bare):
        (a, x, rank_a), (b, y, rank_b) = left, right
        rank = 1 if operator in "+-" else 2
        if operator in ("/", "//", "%") and y == 0:
            return left
        value = {"+": lambda: x + y, "-": lambda: x - y, "*": lambda: x * y, "/": lambda: x / y,
                 "//": lambda: Fraction(math.floor(x / y)), "%": lambda: x - y * math.floor(x / y)}[operator]()
        a = a if bare and rank_a >= rank else f"({a})"
        b = b if bare and rank_b > rank else f"({b})"
        return f"{a}{operator}{b}", value, rank

    return st.builds(join, st.sampled_from(["+", "-", "*", "/", "//", "%"]), children, children, st.booleans())


@settings(deadline=None, max_examples=300)
@given(st.recursive(numbers, combine, max_leaves=8))
def test_against_fractions(tree):
    text, value, _ = tree
    if len(text) <= calculator.MAX_CHARS:
        assert evaluate(text) == value
        assert evaluate(calculate(text)) == value  # what it prints is exact, and it reads what it prints


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="0123456789.+-*/%() ", max_size=60))
def test_any_text_has_a_value_or_a_reason(text):
    try:
        calculate(text)
    except CalculatorError as error:
        assert str(error)


def test_adversarial_corpus_is_refused_quickly():
    hardest = ["(2**64)**63*" * 20 + "1", "(9**64)**20//3**60%7**40" * 5, "1/7**64/11**64/13**64+" * 10 + "1"]
    for text in [*CORPUS.values(), *hardest]:
        def refuse(text=text):
            try:
                calculate(text)
            except CalculatorError:
                pass
        assert cost(refuse, enough=0.5)[1] <= 0.5         # unbounded, the hardest would take minutes


def test_format_number():
    assert [format_number(Fraction(n, d)) for n, d in ((0, 1), (-5, 1), (1, 4), (-1, 3), (100, 8), (1, 1000))] == [
        "0", "-5", "0.25", "-1/3", "12.5", "0.001"]
