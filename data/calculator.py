"""The calculator that models call: exact arithmetic over the rationals, bounded, without eval.

    calculate("12+3*4") -> "24"      calculate("0.1+0.2") -> "0.3"      calculate("2/6") -> "1/3"

+ - * / // %, parentheses, signs, and ** with an integer exponent of at most 64, with Python's precedence and Python's
floor for // and %. Decimals are exact. At most 256 characters, 32 levels, 4,096 bits in any numerator or denominator:
a model may write anything at all here, and none of it may cost more than a few milliseconds.
"""
import re
from fractions import Fraction

MAX_CHARS = 256
MAX_DEPTH = 32
MAX_BITS = 4096
MAX_EXPONENT = 64

TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression exactly.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "for example 12+3*4"}},
            "required": ["expression"],
        },
    },
}

_TOKEN = re.compile(r"[ \t]*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(\*\*|//|[-+*/%()]))")


class CalculatorError(ValueError):
    """The expression has no value, or is outside the language; the message is written for the model that wrote it."""


def calculate(expression: str) -> str:
    """The value as text: an integer, an exact decimal, or else a fraction n/d. Raises CalculatorError."""
    return format_number(evaluate(expression))


def evaluate(expression: str) -> Fraction:
    """The value as a rational. Raises CalculatorError."""
    if len(expression) > MAX_CHARS:
        raise CalculatorError(f"expression too long: expected at most {MAX_CHARS} characters, found {len(expression)}")
    tokens = _tokens(expression)
    value, position = _sum(tokens, 0, 0)
    if tokens[position] is not None:
        raise CalculatorError(f"expected an operator, found {tokens[position]}")
    return value


def format_number(value: Fraction) -> str:
    """24, 0.3 or 1/3: a decimal where it ends, a fraction where it does not."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    text = digits if places == 0 else f"{digits[:-places]}.{digits[-places:]}"
    return "-" + text if value < 0 else text


# -----------------------------------------------------------------------------
# Recursive descent. Each function takes (tokens, position, depth) and returns (value, next position).


def _tokens(text):
    """Fractions for numbers, strings for operators, None at the end."""
    text = text.replace("\u2212", "-").rstrip(" \t\n")
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            found = text[position:].strip()[:1]
            raise CalculatorError(f"expected a number, an operator or a parenthesis, found {found!r}")
        tokens.append(_bounded(Fraction(match[1])) if match[1] else match[2])
        position = match.end()
    return tokens + [None]


def _bounded(value):
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculatorError(f"number too large: expected at most {MAX_BITS} bits")
    return value


def _sum(tokens, position, depth):
    if depth > MAX_DEPTH:
        raise CalculatorError(f"expression too deep: expected at most {MAX_DEPTH} levels")
    value, position = _product(tokens, position, depth)
    while tokens[position] in ("+", "-"):
        right, after = _product(tokens, position + 1, depth)
        value, position = _bounded(value + right if tokens[position] == "+" else value - right), after
    return value, position


def _product(tokens, position, depth):
    value, position = _signed(tokens, position, depth)
    while tokens[position] in ("*", "/", "//", "%"):
        operator = tokens[position]
        right, position = _signed(tokens, position + 1, depth)
        if operator != "*" and right == 0:
            raise CalculatorError("division by zero")
        if operator == "*":
            value *= right
        elif operator == "/":
            value /= right
        elif operator == "//":
            value = Fraction(value // right)
        else:
            value %= right
        _bounded(value)
    return value, position


def _signed(tokens, position, depth):
    """Signs bind weaker than a power to their right, as in Python: -2**2 is -4."""
    negative = False
    while tokens[position] in ("+", "-"):
        negative ^= tokens[position] == "-"
        position += 1
    value, position = _power(tokens, position, depth)
    return -value if negative else value, position


def _power(tokens, position, depth):
    base, position = _atom(tokens, position, depth)
    if tokens[position] != "**":
        return base, position
    if depth > MAX_DEPTH:
        raise CalculatorError(f"expression too deep: expected at most {MAX_DEPTH} levels")
    exponent, position = _signed(tokens, position + 1, depth + 1)  # right-associative
    if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
        raise CalculatorError(f"expected an integer exponent between -{MAX_EXPONENT} and {MAX_EXPONENT}")
    if base == 0 and exponent < 0:
        raise CalculatorError("division by zero")
    # base has at most 4,096 bits, so the power has at most 64 times that before it is refused
    return _bounded(base**int(exponent)), position


def _atom(tokens, position, depth):
    token = tokens[position]
    if isinstance(token, Fraction):
        return token, position + 1
    if token != "(":
        raise CalculatorError(f"expected a number, found {'the end' if token is None else token}")
    value, position = _sum(tokens, position + 1, depth + 1)
    if tokens[position] != ")":
        raise CalculatorError("expected a closing parenthesis")
    return value, position + 1
