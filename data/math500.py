r"""MATH-500: 500 competition problems (arXiv 2103.03874; the subset of arXiv 2305.20050), and a grader for their answers.

    load() -> [{"problem", "answer", "subject", "level", "unique_id"}, ...]
    grade(r"so \boxed{\frac{1}{2}}", r"\frac12") -> Outcome.RIGHT

An answer is read into a value and values are compared exactly: no tolerance (.333 is not 1/3), no evaluation of text, no
computer algebra system. The grammar: integers, decimals, fractions, mixed numbers, powers, roots, \pi, i, letters, + - * /,
juxtaposition, \pm; tuples and intervals, sets and lists, matrices, relations, numerals in a base, words. What lies outside
is ungradable, unless its text equals the reference's. So is what two readers could take for two things: x2, 1/2x, 2\frac53.
"""
import hashlib
import json
import math
import os
import re
from fractions import Fraction
from pathlib import Path

from data.grading import MAX_CHARS, MAX_NUMBER_CHARS, Outcome, Problem, last_number, never_raises

INSTRUCTION = r"Put your final answer within \boxed{}."
FIELDS = ("problem", "answer", "subject", "level", "unique_id")
MAX_ANSWER = 512  # characters; the longest reference has about 150
MAX_TERMS, MAX_DEGREE, MAX_BITS, MAX_DEPTH = 64, 32, 2048, 12
MAX_MATCHES = 10_000
MAX_WORK = 2500  # products of terms in one call of grade, at about 7 us each


class Outside(ValueError):
    """Outside the grammar or over a bound."""


# -----------------------------------------------------------------------------
# Files


def load() -> list[dict]:
    """The 500 rows, in the order of the file, from $TEMPER_DATA/math500/test.jsonl. There is no download: no copy has a
    licence of its own. A row that lacks a field, or has no answer, is refused with file and line."""
    path = Path(os.environ.get("TEMPER_DATA") or ".", "math500/test.jsonl")
    if not path.exists():
        raise FileNotFoundError(f"expected MATH-500 at {path}, found nothing: set TEMPER_DATA to a folder that holds math500/test.jsonl, "
                                f"500 JSON lines with {', '.join(FIELDS)} (HuggingFaceH4/MATH-500 is in this form)")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = json.loads(line)
        missing = [name for name in FIELDS if name not in row]
        if missing or not isinstance(row["answer"], str) or not _clean(row["answer"]):
            raise ValueError(f"{path}:{number}: expected the fields {', '.join(FIELDS)} and an answer that is not blank, "
                             f"found {', '.join(sorted(row))}")
        rows.append({name: row[name] for name in FIELDS})
    if len(rows) != 500:
        raise ValueError(f"{path}: expected 500 rows, found {len(rows)}")
    return rows


def prompt(problem: str) -> list[dict]:
    """The messages before the first assistant turn."""
    return [{"role": "user", "content": f"{problem}\n{INSTRUCTION}"}]


def problems(num: int | None = None, seed: int = 0) -> list[Problem]:
    """`num` problems (all, if None) in an order that the seed alone decides: a larger num only adds to the end."""
    order = sorted(enumerate(load()), key=lambda row: hashlib.blake2b(b"%d/%d" % (seed, row[0]), digest_size=8).digest())
    return [Problem("math500", prompt(row["problem"]), [{"role": "assistant", "content": f"\\boxed{{{row['answer']}}}"}],
                    row["answer"], {name: row[name] for name in FIELDS[2:]}) for _, row in order[:num]]


# -----------------------------------------------------------------------------
# Grader


@never_raises
def grade(response: str, answer: str, strict: bool = True) -> Outcome:
    r"""Compare a response with a MATH answer.

    strict: the last \boxed{} whose braces balance. lenient: that, or else what follows the last "answer is", or else the
    last number. Log it beside the strict score. The unit, the degree sign and % say nothing; `x =` and a base say
    nothing if one side has them and the other has not.
    """
    gold_text = _clean(answer)
    if not gold_text:
        raise ValueError(f"expected a reference that is not blank, found {answer!r}")
    if len(response) > MAX_CHARS:
        return Outcome.UNGRADABLE
    found_text = last_boxed(response)
    if found_text is None and not strict:
        found_text = _unboxed(response)
    if found_text is None or len(found_text) > MAX_ANSWER or not (found_text := _clean(found_text)):
        return Outcome.UNGRADABLE
    gold_text, found_text = _one_sided(gold_text, found_text), _one_sided(found_text, gold_text)
    gold_word, found_word = _word(gold_text), _word(found_text)
    if "".join(gold_text.split()) == "".join(found_text.split()):
        return Outcome.RIGHT
    if (gold_word or found_word) and _plain(gold_text) == _plain(found_text):
        return Outcome.RIGHT
    algebra = _Algebra()
    try:
        gold = gold_word or _read(gold_text, algebra)
        found = found_word or _read(found_text, algebra)
        if gold_word or found_word:
            return Outcome.WRONG  # two words, or a word and a value
        return Outcome.RIGHT if _same(gold, found, algebra) else Outcome.WRONG
    except Outside:
        return Outcome.UNGRADABLE


# a box opens; groups without a brace inside; runs of opening braces, and of closing ones; runs of other commands. Runs, because
# a match costs one to three microseconds; and no more than MAX_MATCHES, which no text from a first \boxed on comes near
_BOX = re.compile(r"(\\boxed\s*\{)|(?:\{[^{}\\]*\}[^{}\\]*)+|((?:\{[^{}\\]*)+)|(\}+)|(?:\\(?!boxed\s*\{).[^{}\\]*)+", re.S)


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces balance; None if there is none, or too many braces. One pass over the text."""
    last, opened, best = None, [], -1  # positions after \boxed{ that still wait for a brace; -1 for any other brace
    start = text.find("\\boxed")
    for num, match in enumerate(_BOX.finditer(text, start) if start >= 0 else ()):
        if num == MAX_MATCHES:
            return None
        if match.lastindex == 1:
            opened.append(match.end())
        elif match.lastindex == 2:
            opened += [-1] * match[2].count("{")
        elif match.lastindex == 3:
            for position in range(match.start(), min(match.end(), match.start() + len(opened))):
                begin = opened.pop()
                if begin > best:
                    best, last = begin, text[begin:position]
    return last


def _unboxed(text):
    """What follows the last 'answer is', to the end of the sentence; else the last number."""
    end = None
    for match in re.finditer(r"answer is", text, re.I | re.A):
        end = match.end()
    if end is not None:
        said = text[end:end + MAX_ANSWER].lstrip(" :*\n").partition("\n")[0]
        inside = re.match(r"\$+([^$]+)\$", said)
        said = inside[1] if inside else re.split(r"\.(?:\s|$)|\*\*", said, maxsplit=1)[0]
        if inside or not re.search(r"[0-9]", said) or not re.search(r"(?<![\\a-zA-Z])(?:[a-zA-Z]{3,}|it|is|of)(?![a-zA-Z])", said):
            return said
        text = said  # '5 apples': a number in running text
    number = last_number(text)
    return None if number is None else str(number)


# -----------------------------------------------------------------------------
# Text: what is removed or unified before the grammar looks at it

_SAME = {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
         "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "°": "", "∅": r"\emptyset ", "\u00a0": " "}
_TEXT = r"\\(?:text|textbf|textit|textrm|mbox|mathrm|operatorname|mathbf|mathit)\s*"
_UNIT = (r"(?:square |cubic )?(?:units?|degrees?|dollars?|cents?|percent|points?|hours?|minutes?|seconds?|days?|years?|mph|"
         r"inch(?:es)?|feet|foot|ft|miles?|yards?|met(?:er|re)s?|cm|mm|km|kg|pounds?|ways?)(?:\^\{?[23]\}?)?")
_CLEAN = [(re.compile(pattern, re.A), new) for pattern, new in (
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"\\\$|\$", ""),
    (r"(?<=[0-9])(?:,\\!\s*|\{,\}|\\,|\\ )(?=[0-9]{3}(?![0-9]))", ""),  # thousands
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|\\displaystyle(?![A-Za-z])", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])", ""),
    (r"\\?%", ""),
    (r"\\l(?:eq|eqslant)(?![A-Za-z])", r"\\le"), (r"\\g(?:eq|eqslant)(?![A-Za-z])", r"\\ge"),
    (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"), (r"\\neq(?![A-Za-z])", r"\\ne"),
    (r"\\lbrace(?![A-Za-z])", r"\\{"), (r"\\rbrace(?![A-Za-z])", r"\\}"), (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\\(?:cdot|times)(?![A-Za-z])", "*"), (r"\\div(?![A-Za-z])", "/"),
    (_TEXT + r"\{\s*(?:or|and|,)\s*\}|(?<=[0-9)}])\s+(?:or|and)(?=[\s\\])", ","),
    (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"), (r"\\frac\s*([0-9])\s*(?=\{)", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"), (r"\\sqrt\s*([0-9])", r"\\sqrt{\1}"),
    (r",\s*,", ","),
)]
_TRAILING_UNIT = re.compile(r"(?:(?<=[^\s,=])\s*\\(?:text|textrm|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?|"
                            rf"(?<=[0-9}})])\s*{_UNIT})\s*$", re.A)
_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])")


def _clean(text):
    text = text.strip()
    for old, new in _SAME.items():
        text = text.replace(old, new)
    for pattern, new in _CLEAN:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(".,;").strip()
    shorter = _TRAILING_UNIT.sub("", text).strip()
    text = re.sub(_TEXT + r"\{\s*([A-Za-z0-9])\s*\}", r"\1", shorter or text)
    if not re.search(r"[(\[]|\\\{", text):  # between brackets a comma separates
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return text


_NAME = rf"(?:[A-Za-z](?:_(?:[0-9A-Za-z]|\{{\w+\}}))?(?:\([A-Za-z]\))?|{_TEXT}\{{[^{{}}]*\}})"
_NAMED = re.compile(rf"(?:^|,)\s*({_NAME})\s*(?:=|\\in(?![A-Za-z]))\s*", re.A)
_BASE = re.compile(r"\(?(?=[A-Z]*[0-9])([0-9A-Z]+)\)?\s*_\s*(?:([0-9])|\{\s*([0-9]{1,2})\s*\})", re.A)


def _one_sided(text, other):
    """`text` without its `x =`, `x \\in` or base subscript where `other` has none. `x = 1, x = 2` names one thing, `x = 1,
    y = 2` two."""
    relation = re.compile(r"[=<>]|\\(?:in|le|ge|ne)(?![A-Za-z])")
    if not relation.search(other):
        names = set(_NAMED.findall(text))
        bare = _NAMED.sub(lambda match: "," if match[0].startswith(",") else "", text) if len(names) == 1 else text
        text = text if relation.search(bare) else bare
    match = _BASE.fullmatch(text)
    return match[1] if match and "_" not in other else text


def _plain(text):
    """The text of words, for comparison: commands and brackets off, case folded."""
    text = re.sub(_TEXT + r"\{([^{}]*)\}", r"\1", text)
    return " ".join(text.strip(" ().").casefold().split())


def _word(text):
    r"""The folded text of an answer in words, or "": \text{...} that holds two letters in a row or (A), or letters alone, of
    which one run has four or is not Latin: cat is c a t, `even` is a word."""
    if re.fullmatch(_TEXT + r"\{([^{}]*)\}", text):
        return _plain(text) if re.search(r"[^\W\d_]{2}|\([A-Z]\)", text[text.index("{"):]) else ""
    letters = re.fullmatch(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*", text)
    known = text.casefold() in ("yes", "no", "odd") or re.search(r"[^\W\d_]{4}", text) or not text.isascii()
    return _plain(text) if letters and known else ""


# -----------------------------------------------------------------------------
# Values: quotients (num, den) of polynomials {monomial: integer}. A monomial is a sorted tuple of (generator, exponent). A
# generator is a letter, "\\pi", "\\infty", "i" with i^2 = -1, the sign "\\pm" with square 1, or "\\sqrt p" of a prime p with
# an exponent e in (0, 1): p^e. Such powers of different primes are linearly independent over the rationals (Besicovitch
# 1940), and so equal values have equal cross-products.


class _Algebra:
    """Bounded arithmetic: one per call of grade, since it counts the work."""

    def __init__(self):
        self.work = 0

    def spend(self, work):
        self.work += work
        if self.work > MAX_WORK:
            raise Outside("too much work")

    def times(self, p, q):
        self.spend(len(p) * len(q))
        product = {}
        for left, a in p.items():
            for right, b in q.items():
                monomial, factor = _join(left, right)
                product[monomial] = product.get(monomial, 0) + a * b * factor
        return _bounded(product)

    def add(self, x, y):
        if x[1] == y[1]:
            return _lowest(_total(x[0], y[0]), x[1])
        return _lowest(_total(self.times(x[0], y[1]), self.times(y[0], x[1])), self.times(x[1], y[1]))

    def multiply(self, x, y):
        return _lowest(self.times(x[0], y[0]), self.times(x[1], y[1]))

    def divide(self, x, y):
        if not y[0]:
            raise Outside("division by zero")
        return self.multiply(x, (y[1], y[0]))

    def power(self, x, exponent):
        """x to a rational constant: p/q is the q-th root of the p-th power."""
        num, den = _constant(exponent)
        if abs(num) > MAX_BITS or den > MAX_DEGREE:
            raise Outside("exponent too large")
        if num < 0:
            x, num = self.divide(_ONE, x), -num
        value = _ONE
        for bit in bin(num)[2:]:
            value = self.multiply(value, value)
            if bit == "1":
                value = self.multiply(value, x)
        return self.root(value, den) if den > 1 else value

    def root(self, x, k):
        if not 2 <= k <= MAX_DEGREE or len(x[0]) > 1 or len(x[1]) > 1:
            raise Outside("expected the root of one term")
        if not x[0]:
            return x
        self.spend(100)  # the price of factoring
        [(top, a)], [(bottom, b)] = x[0].items(), x[1].items()
        value = self.divide(_root_of_term(top, a if b > 0 else -a, k), _root_of_term(bottom, abs(b), k))
        return value

    def equal(self, x, y):
        return self.times(x[0], y[1]) == self.times(y[0], x[1])


_ONE = ({(): 1}, {(): 1})


def _join(left, right):
    """(monomial, integer factor) of a product of two monomials."""
    if not left or not right:
        return left or right, 1
    exponents, factor = dict(left), 1
    for generator, exponent in right:
        exponent += exponents.get(generator, 0)
        if generator == "i" and exponent > 1:
            factor, exponent = -factor, exponent - 2
        elif generator == "\\pm":
            exponent %= 2
        elif generator[:5] == "\\sqrt" and exponent >= 1:
            factor, exponent = factor * int(generator[6:]), exponent - 1
        exponents[generator] = exponent
    return tuple(sorted((g, e) for g, e in exponents.items() if e)), factor


def _bounded(p):
    p = {monomial: a for monomial, a in p.items() if a}
    if len(p) > MAX_TERMS or any(a.bit_length() > MAX_BITS for a in p.values()):
        raise Outside("too many terms or digits")
    if any(sum(e for _, e in monomial) > MAX_DEGREE for monomial in p):
        raise Outside("degree too high")
    return p


def _total(p, q):
    return _bounded({monomial: p.get(monomial, 0) + q.get(monomial, 0) for monomial in {**p, **q}})


def _lowest(num, den):
    common = math.gcd(*num.values(), *den.values())
    if common == 1:
        return num, den
    return {m: a // common for m, a in num.items()}, {m: a // common for m, a in den.items()}


def _constant(x):
    """(numerator, denominator > 0) of a value that is a rational number."""
    if set(x[0]) - {()} or set(x[1]) != {()}:
        raise Outside("expected a rational number")
    number = Fraction(x[0].get((), 0), x[1][()])
    return number.numerator, number.denominator


def _root_of_term(monomial, a, k):
    """The k-th root of a * monomial as a value. The letters are taken as positive only where the root has no other reading:
    sqrt(x^3) is x sqrt(x), but sqrt(x^2) is |x|, and outside."""
    factor, exponents = 1, {}
    if a < 0 and k == 2:
        exponents["i"] = 1
    elif a < 0 and k % 2:
        factor = -1
    elif a < 0:
        raise Outside("even root of a negative number")
    for prime, count in _factors(abs(a)).items():
        factor *= prime**(count // k)
        if count % k:
            exponents[f"\\sqrt {prime}"] = Fraction(count % k, k)
    for generator, exponent in monomial:
        share = Fraction(exponent, k)
        if generator in ("i", "\\pm", "\\infty"):
            raise Outside("root of i")
        if generator[:5] == "\\sqrt":
            share += exponents.get(generator, 0)
            factor, share = factor * int(generator[6:])**int(share), share % 1
        elif generator != "\\pi" and k % 2 == 0 and exponent % 2 == 0 and share % 2:
            raise Outside("absolute value")
        exponents[generator] = share.numerator if share.denominator == 1 else share
    return _bounded({tuple(sorted((g, e) for g, e in exponents.items() if e)): factor}), {(): 1}


def _factors(n):
    """{prime: count} of n >= 1, as long as what is left after the primes below 1,000 is a prime or the square of one."""
    found = {}
    for prime in (2, *range(3, 1000, 2)):
        while n % prime == 0:
            n, found[prime] = n // prime, found.get(prime, 0) + 1
        if n < prime * prime:
            break
    if n > 1:
        side = math.isqrt(n)
        square = side * side == n
        if (side if square else n) >= 10**6:
            raise Outside("number too large to factor")
        found[side if square else n] = 2 if square else 1
    return found


def _signed(x, sign):
    """x with \\pm replaced by +1 or -1."""
    def substitute(p):
        result = {}
        for monomial, a in p.items():
            bare = tuple(g for g in monomial if g[0] != "\\pm")
            result[bare] = result.get(bare, 0) + (a * sign if bare != monomial else a)
        return _bounded(result)

    num, den = substitute(x[0]), substitute(x[1])
    if not den:
        raise Outside("division by zero")
    return num, den


# -----------------------------------------------------------------------------
# Reading. An answer is (kind, ...):
#     ("value", x)   ("tuple", "(", "]", items)   ("set", items): a set, or a bare list   ("union", items)
#     ("matrix", rows of values)   ("relation", operators, sides)   ("base", digits, base)

_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+|\\begin\{(?:[pbB]?matrix|array)\}(?:\{[lcr|]*\})?|"
                    r"\\end\{(?:[pbB]?matrix|array)\}|\\[A-Za-z]+|\\[\\{}]|[A-Za-z]|[-+*/^_()\[\]{},=<>&])", re.A)
_GREEK = {"\\" + name for name in ("alpha beta gamma delta epsilon theta lambda mu nu xi rho sigma tau phi varphi chi psi omega "
                                   "pi infty").split()}
_CLOSES = {"(": ")]", "[": ")]", "{": "}", "\\{": ("\\}",)}
_RELATIONS = {"=", "<", ">", "\\le", "\\ge", "\\ne", "\\in"}
_FLIPPED = {">": "<", "\\ge": "\\le"}


def _read(text, algebra):
    """The answer in a cleaned text. Raises Outside."""
    match = _BASE.fullmatch(text)
    if match:
        return "base", match[1].lstrip("0") or "0", match[2] or match[3]
    items = _Reader(text, algebra).answer()
    return items[0] if len(items) == 1 else ("set", items)


class _Reader:
    """Recursive descent over at most MAX_ANSWER characters; brackets nest at most MAX_DEPTH deep, nothing else recurses."""

    def __init__(self, text, algebra):
        self.algebra, self.at, self.tokens, position = algebra, 0, [], 0
        if len(text) > MAX_ANSWER:
            raise Outside("too long")
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None or len(match[0]) > MAX_NUMBER_CHARS:
                raise Outside(f"unknown text at {position}")
            self.tokens.append(match[1])
            position = match.end()
        self.partner, self.commas, opened = {}, set(), []  # of brackets; opening brackets with a comma right inside them
        for position, token in enumerate(self.tokens):
            if token in _CLOSES:
                opened.append(position)
            elif token in (")", "]", "}", "\\}"):
                if not opened or token not in _CLOSES[self.tokens[opened[-1]]]:
                    raise Outside("brackets do not match")
                self.partner[opened.pop()] = position
            elif token == "," and opened:
                self.commas.add(opened[-1])
            if len(opened) > MAX_DEPTH:
                raise Outside("too deep")
        if opened:
            raise Outside("brackets do not match")
        self.tokens.append("")

    def take(self, *expected):
        """The next token, if it is one of `expected` (any, if none is given), and a step forward; else ""."""
        token = self.tokens[self.at]
        if expected and token not in expected:
            return ""
        self.at += 1
        return token

    def need(self, *expected):
        if not self.take(*expected):
            raise Outside(f"expected {' or '.join(expected)}, found {self.tokens[self.at]!r}")

    # Collections

    def answer(self):
        items = self.items()
        if self.tokens[self.at]:
            raise Outside(f"did not expect {self.tokens[self.at]}")
        return items

    def items(self, expand=True):
        """A comma-separated list. With expand=True an item with \\pm is two; in a tuple it waits for the whole tuple."""
        items = self.item(expand)
        while self.take(","):
            items += self.item(expand)
        return items

    def item(self, expand):
        sides, operators = [self.side()], []
        while self.tokens[self.at] in _RELATIONS:
            operators.append(self.take())
            sides.append(self.side())
        item = ("relation", operators, sides) if operators else sides[0]
        both = [_choose(item, 1), _choose(item, -1)] if expand else [item]
        return both[:1] if both[0] == both[-1] else both

    def side(self):
        sides = [self.part()]
        while self.take("\\cup"):
            sides.append(self.part())
        return ("union", sides) if len(sides) > 1 else sides[0]

    def part(self):
        start, token = self.at, self.tokens[self.at]
        if token == "\\emptyset":
            self.take()
            return "set", []
        if token == "\\{":
            self.take()
            items = [] if self.tokens[self.at] == "\\}" else self.items()
            self.need("\\}")
            return "set", items
        if token in ("(", "[") and self.commas & {start}:
            self.take()
            items = self.items(expand=False)
            return "tuple", token, self.take(")", "]"), items
        if token in ("(", "[") and self.tokens[start + 1].startswith("\\begin"):
            self.take()
            matrix = self.matrix()
            self.need(")", "]")
            return matrix
        return self.matrix() if token.startswith("\\begin") else ("value", self.sum())

    def matrix(self):
        self.take()
        rows = [[]]
        while not self.tokens[self.at].startswith("\\end"):
            rows[-1].append(self.sum())
            if self.take("\\\\"):
                rows.append([])
            elif not self.tokens[self.at].startswith("\\end"):
                self.need("&")
        self.take()
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) != 1:
            raise Outside("expected rows of one length")
        return "matrix", rows

    # Expressions

    def sum(self):
        sign = self.take("+", "-", "\\pm", "\\mp")
        value = self.with_sign(self.product(), sign)
        while sign := self.take("+", "-", "\\pm", "\\mp"):
            value = self.algebra.add(value, self.with_sign(self.product(), sign))
        return value

    def with_sign(self, value, sign):
        if sign in ("-", "\\mp"):
            value = {m: -a for m, a in value[0].items()}, value[1]
        return self.algebra.multiply(value, ({(("\\pm", 1),): 1}, {(): 1})) if sign in ("\\pm", "\\mp") else value

    def product(self):
        start, value = self.at, self.factor()
        part = self.fraction_after(start)
        if part:
            return self.algebra.add(value, part)
        while True:
            if operator := self.take("*", "/"):
                negative = False
                while sign := self.take("+", "-"):
                    negative ^= sign == "-"
                start, factor = self.at, self.factor()
                if self.fraction_after(start) or operator == "/" and self.starts_factor():
                    raise Outside("is 1/2x a half of x?")
                value = (self.algebra.divide if operator == "/" else self.algebra.multiply)(value, self.with_sign(factor, "-" * negative))
            elif self.starts_factor():
                if self.tokens[self.at][0] in "0123456789.":
                    raise Outside("is x2 two x, x squared, or the second x?")
                value = self.algebra.multiply(value, self.factor())
            else:
                return value

    def fraction_after(self, start):
        r"""What makes a mixed number of the factor that began at `start`: if it was a whole number, the proper fraction
        right after it, \frac{1}{2} or 1/2; else None."""
        tokens, at = self.tokens, self.at
        if at != start + 1 or not tokens[start].isdigit():
            return None
        if tokens[at] == "\\frac" and [tokens[i] for i in (at + 1, at + 3, at + 4, at + 6) if i < len(tokens)] == ["{", "}", "{", "}"]:
            above, below, end = tokens[at + 2], tokens[at + 5], at + 7
        elif tokens[at].isdigit() and tokens[at + 1] == "/":
            above, below, end = tokens[at], tokens[at + 2], at + 3
        else:
            return None
        if not above.isdigit() or not below.isdigit():
            return None  # 2\frac{x}{3} is a product
        if not 0 < int(above) < int(below):
            raise Outside("is 2 5/3 a product or a mixed number?")
        self.at = end
        if self.starts_factor() or tokens[end] in ("*", "/", "^"):
            raise Outside("a mixed number in a product")
        return {(): int(above)}, {(): int(below)}

    def starts_factor(self):
        token = self.tokens[self.at]
        return token[:1].isalnum() or token[:1] == "." or token in ("(", "[", "{", "\\frac", "\\sqrt") or token in _GREEK

    def factor(self):
        value = self.atom()
        if self.take("^"):
            negative = bool(self.take("-"))
            exponent = self.with_sign(self.argument(digits=True), "-" if negative else "+")
            value = self.algebra.power(value, exponent)
            if self.tokens[self.at] == "^":
                raise Outside("double exponent")
        return value

    def argument(self, digits=False):
        """What stands in braces, or one digit or letter; with digits=True, a whole number too, since 2^10 is not 2^1 0."""
        token = self.tokens[self.at]
        if token == "{":
            return self.group()
        if len(token) == 1 and token.isalnum() or token in _GREEK or digits and token.isdigit():
            return self.atom()
        raise Outside("expected an argument")

    def group(self):
        close = self.partner[self.at]
        self.take()
        value = self.sum()
        if self.at != close:
            raise Outside("expected the end of a group")
        self.take()
        return value

    def atom(self):
        token = self.tokens[self.at]
        if token in ("(", "[", "{"):
            return self.group()
        self.take()
        if token == "\\frac":
            above = self.argument()
            return self.algebra.divide(above, self.argument())
        if token == "\\sqrt":
            k = 2
            if self.tokens[self.at] == "[":
                k, one = _constant(self.group())
                if one != 1:
                    raise Outside("expected a whole root")
            return self.algebra.root(self.argument(), k)
        if token[:1].isdigit() or token[:1] == ".":
            number = Fraction(token)
            return {(): number.numerator} if number else {}, {(): number.denominator}
        if token in _GREEK or len(token) == 1 and token.isalpha():
            if self.take("_"):
                close = self.partner.get(self.at, self.at)
                token += "_" + "".join(self.tokens[self.at:close + 1]).strip("{}")
                self.at = close + 1
            return {((token, 1),): 1}, {(): 1}
        raise Outside(f"did not expect {token!r}")


def _choose(item, sign):
    """The item with every \\pm taken as +1 or -1."""
    kind, *rest = item
    if kind == "value":
        return "value", _signed(rest[0], sign) if any("\\pm" in m for p in rest[0] for g in p for m in g) else rest[0]
    if kind == "matrix":
        return "matrix", [[_choose(("value", x), sign)[1] for x in row] for row in rest[0]]
    return (kind, *rest[:-1], [_choose(part, sign) for part in rest[-1]])


def _same(a, b, algebra):
    """Are two answers equal? Order counts in tuples and matrices, not in sets, bare lists and unions."""
    if a[0] != b[0]:
        return False
    kind = a[0]
    if kind == "value":
        return algebra.equal(a[1], b[1])
    if kind == "base":
        return a == b
    if kind == "matrix":
        return [len(row) for row in a[1]] == [len(row) for row in b[1]] and all(
            algebra.equal(x, y) for left, right in zip(a[1], b[1]) for x, y in zip(left, right))
    if kind == "tuple":
        return a[1:3] == b[1:3] and len(a[3]) == len(b[3]) and all(_same(x, y, algebra) for x, y in zip(a[3], b[3]))
    if kind == "relation":
        return _same_relation(a, b, algebra)
    left, right = list(a[1]), list(b[1])
    for item in left if len(left) == len(right) else ():
        algebra.spend(len(right))
        for position, other in enumerate(right):
            if _same(item, other, algebra):
                del right[position]
                break
        else:
            return False
    return len(a[1]) == len(b[1])


def _same_relation(a, b, algebra):
    """Chains are equal if their sides are, in the same order or turned round (1 < x and x > 1); two equations also if one is
    the other with terms moved across (y = x + 1 and x - y = -1), but not if it is a multiple."""
    (_, operators, sides), (_, others, other_sides) = _forward(a), _forward(b)
    if operators != others or len(sides) != len(other_sides):
        return False
    if operators == ["="] and all(side[0] == "value" for side in sides + other_sides):
        minus = {(): -1}, {(): 1}
        x, y = (algebra.add(left[1], algebra.multiply(right[1], minus)) for left, right in (sides, other_sides))
        return algebra.equal(x, y) or algebra.equal(x, algebra.multiply(y, minus))
    return all(_same(x, y, algebra) for x, y in zip(sides, other_sides))


def _forward(relation):
    kind, operators, sides = relation
    if all(operator in _FLIPPED for operator in operators):
        return kind, [_FLIPPED[operator] for operator in operators][::-1], sides[::-1]
    return relation
