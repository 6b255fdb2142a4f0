"""What a problem is, what a grader may say, and how every grader reads a number; and the confidence that an answer states.

A grader never guesses. It returns one of four outcomes; only RIGHT is a reward of 1, and only GRADER_ERROR takes a
sample out of the denominator, because that one is our fault and not the model's:

    right          an answer in the asked form was read, and it equals the reference
    wrong          an answer was read, and it differs
    ungradable     no answer in the asked form, or one outside the grammar: not right, counted, logged apart
    grader_error   our exception, timeout or box failure: no score and no reward

Digits are ASCII, U+2212 is a minus, numbers are compared as rationals. Every scan is linear in the text, uses no signal
and no global state, and so may run in any thread.
"""
import functools
import logging
import re
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction

MAX_CHARS = 65536  # a longer response is ungradable: every grader is bounded in time because its input is
MAX_NUMBER_CHARS = 128  # int() of a long string is quadratic; no answer we grade comes near this


class Outcome(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"
    UNGRADABLE = "ungradable"
    GRADER_ERROR = "grader_error"


@dataclass(frozen=True, slots=True)
class Problem:
    task: str
    prompt: str | list  # text before the completion; or the messages before the first assistant turn
    gold: str | list  # one right completion; or the assistant and tool messages of one right rollout
    answer: str  # what the final answer must equal; "" if any text that is not blank will do
    hidden: dict = field(default_factory=dict)  # what grader and tools know and the prompt does not say
    tools: list | None = None  # schemas to render into the prompt; tools may work without being announced


def never_raises(grade):
    """Wrap a grader: an exception inside it becomes GRADER_ERROR and a logged traceback, never a score of 0."""

    @functools.wraps(grade)
    def wrapped(*args, **kwargs):
        try:
            return grade(*args, **kwargs)
        except Exception:
            logging.getLogger(__name__).exception("%s.%s failed", grade.__module__, grade.__name__)
            return Outcome.GRADER_ERROR

    return wrapped


# -----------------------------------------------------------------------------
# Numbers

# sign and dollar in either order; thousands commas only where they belong; a trailing % or full stop says nothing
_NUMBER = re.compile(r"(?:([+-]?)\$?|\$([+-]))([1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
                     r"(?: ?%)?\.?")
# a maximal run of digits, points and commas with a digit in it; the lookbehind makes long runs of commas linear
_DIGIT_RUN = re.compile(r"(?<![0-9.,])[.,]*+[0-9][0-9.,]*+")
_MAX_NAMES = 1000
_PART_OF_A_LITERAL = re.compile(r"[0-9][eE][+-]?$|[0-9]/$|\^$")  # what stands before the 5 of 1e5, 2/5 and 2^5


def parse_number(text: str) -> Fraction | None:
    """The number that `text` is, white space around it aside: '-$1,234.50' -> -1234.5, '72.' -> 72, '1,23' -> None."""
    text = text.strip().replace("\u2212", "-")
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER_CHARS else None
    if match is None:
        return None
    value = Fraction(match[3].replace(",", ""))
    return -value if "-" in (match[1], match[2]) else value


def last_number(text: str) -> Fraction | None:
    """The last number in running text; None if there is none, or if the last one is malformed or part of a larger one.

    A letter right before the digits makes them a name (H2O), a letter right after them a unit (5kg). A sign counts
    unless something it could subtract from stands before it: the last number of 'pages 10-15' is 15.
    """
    text = text.replace("\u2212", "-")
    # searched in the reversed text, since the last number of a long response is almost always the first match there
    for names, match in enumerate(_DIGIT_RUN.finditer(text[::-1])):
        start, run = len(text) - match.end(), match[0][::-1]
        before = text[start - 1:start]
        after_letter = before.isascii() and (before.isalpha() or before == "_") and run[0] not in ".,"
        if not after_letter or _PART_OF_A_LITERAL.search(text[max(0, start - 3):start]):
            break  # a number: not a name, or the exponent of 1e5
        if names == _MAX_NAMES:
            return None
    else:
        return None
    digits = run.rstrip(".,")
    end = start + len(digits)
    if digits[0] in ".,":
        bare = digits.lstrip(".,")
        if digits != "." + bare:
            return parse_number(bare)  # an ellipsis or a comma, then a number
        if text[start - 1:start].isalnum():
            return None  # 'Tuesday.5': a full stop or a decimal point?
    if _PART_OF_A_LITERAL.search(text[max(0, start - 3):start]) or re.match(r"[/^][0-9]", text[end:end + 2]):
        return None
    if text[start - 1:start].isdecimal() or text[end:end + 1].isdecimal():
        return None  # full-width or Arabic digits continue it
    if text[start - 1:start] == "$":
        start -= 1
    sign, before = text[start - 1:start], text[max(0, start - 2):max(0, start - 1)]
    if sign not in ("+", "-") or before.isalnum() or before in (")", "]", "%"):
        sign = ""
    return parse_number(sign + digits)


# -----------------------------------------------------------------------------
# A stated confidence

# 0.85, .85, 0, 1 or 1.0: whatever matches is in [0, 1]
_DIGITS = f"{{1,{MAX_NUMBER_CHARS}}}"
_CONFIDENCE = re.compile(rf"<confidence>\s*+(0|1|1\.0{_DIGITS}|0?\.[0-9]{_DIGITS})\s*+</confidence>")


def stated_confidence(text: str) -> tuple[str, float | None]:
    """'#### 72\\n<confidence>0.85</confidence>\\n' -> ('#### 72', .85): the text without the tag it ends with and the white space around that, and q.

    q is a plain decimal in [0, 1]. Never guessed at: with a percent sign, a word, a sign, an exponent, a number out of range or none, text after
    the tag, a tag left open or one elsewhere that says another number, q is None and the text comes back unchanged, as it does above MAX_CHARS.
    Of tags that agree, only the last is taken off.
    """
    found = list(_CONFIDENCE.finditer(text)) if len(text) <= MAX_CHARS else []
    malformed = not text.count("<confidence>") == text.count("</confidence>") == len(found)
    if not found or malformed or text[found[-1].end():].strip() or len({float(match[1]) for match in found}) > 1:
        return text, None
    return text[:found[-1].start()].rstrip(), float(found[-1][1])


def without_confidence(messages: list) -> tuple[list, float | None]:
    """What followed a prompt -> what is graded of it, and q: stated_confidence of the last message of the assistant. Changes no message in place."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
    if last is None:
        return messages, None
    text, q = stated_confidence(messages[last]["content"])
    return [*messages[:last], messages[last] | dict(content=text), *messages[last + 1:]], q
