"""Toy tasks: all that the recipe needs to train and grade a byte-level model of a million parameters, from no files.

Text tasks, for pre-training, mid-training and retention
    facts_en   mibo likes red.              facts_ko   미보는 빨강 좋아해.              96 facts in each language
    text_en    Tom sees the red cup and Ann wants the old bag.      text_ko      no problems: bits per byte only
    sums       17*8=136
    reasoning  Tom has 12 pens and buys 3 bags of 4 pens. How many pens? 12+3*4=24, so 24.
    reasoning_varied  the same; who tells it decides in which words, as in  One call: {"expression": "12+3*4"} gives 24. So 24.

Chat tasks, for SFT, rejection sampling and RL
    math_en    the same stories -> calculator {"expression": "12+3*4"} -> 24 -> 24           math_ko   Korean twins
    code       Write f(xs): largest of squares of even xs. -> two lines of Python
    tool       Copy pen to box. -> get, set, ok             Call Pen. -> no call
    chat_en    Name 3 fruits. ALL CAPS. Add a title.                                         chat_ko   Korean twins
    schema     solve(text): Tom has 12 pens ... -> solve {"text": "12+3*4"} -> 24 -> 24: the calculator under names that the prompt gives

Every item is a pure function of (task, split, seed, index). Facts, held-out sets and hidden tests do not depend on the
seed. Splits: "train"; "test": numbers, keys or combinations that are in no training item of any seed, in wording that
is; "test_template" (reasoning, math, tool, schema, chat): wording, or pairs of constraints, that are in no training item;
"test_schema" (schema): pairs of names that are in none.
"""
import hashlib
import json
import operator
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice, product

from data import calculator, tinypython
from data.grading import MAX_CHARS, Outcome, Problem, never_raises, parse_number
from tokenizer import ToolCallError, parse_tool_calls

TEXT_TASKS = ("facts_en", "facts_ko", "text_en", "text_ko", "sums", "reasoning", "reasoning_varied")
MIXTURE = ("math_en", "math_ko", "code", "tool", "chat_en", "chat_ko")  # --data=toy
CHAT_TASKS = (*MIXTURE, "schema")
TEMPLATE_TASKS = ("reasoning", "reasoning_varied", "math_en", "math_ko", "tool", "schema", "chat_en", "chat_ko")  # those with a test_template split
CALL_TASKS = ("math_en", "math_ko", "tool", "schema")  # those whose right answers call tools
# room for the longest right response in byte tokens, tool results and the turns around them included, and some to spare
MAX_NEW_TOKENS = {"facts_en": 16, "facts_ko": 32, "sums": 8, "reasoning": 32, "reasoning_varied": 128, "math_en": 112, "math_ko": 112, "code": 72,
                  "tool": 192, "schema": 112, "chat_en": 56, "chat_ko": 72}


# -----------------------------------------------------------------------------
# Draws


class _Draw:
    """Small random integers cut from hashes of a key. Cheaper than seeding a random.Random per item, and fixed for
    good: the standard library promises the sequence of random(), not that of randrange or choice."""

    def __init__(self, *key):
        self.key, self.block, self.bits = repr(key).encode(), 0, 0

    def below(self, n):
        if self.bits < 1 << 64:  # with fewer bits left, the remainder would be visibly uneven
            digest = hashlib.blake2b(self.key + b"/%d" % self.block, digest_size=64).digest()
            self.block, self.bits = self.block + 1, int.from_bytes(digest, "little")
        self.bits, value = divmod(self.bits, n)
        return value

    def pick(self, values):
        return values[self.below(len(values))]


def _divide(keys):
    """[those for training, those held out]: about one in ten, by a hash of the key alone."""
    parts = [], []
    for key in keys:
        parts[zlib.crc32(repr(key).encode()) % 10 == 0].append(key)
    return parts


# The numbers of a story decide its split, in both languages and in every task: mid-training on stories leaks nothing
# into the tests of math_en and math_ko.
_PAIRS = _divide(product(range(2, 21), repeat=2))
_TRIPLES = _divide(product(range(2, 21), range(2, 10), range(2, 10)))
_LARGE_PAIRS = _divide(product(range(2, 100), repeat=2))

# -----------------------------------------------------------------------------
# Facts

_LIKES = list(zip("red blue green pink apples grapes milk coffee trains whales songs rain snow books clouds bears".split(),
                  "빨강 파랑 초록 분홍 사과 포도 우유 커피 기차 고래 노래 비 눈 책 구름 곰".split()))
_LEADS = dict(zip("gndlmbsjktph", (0, 2, 3, 5, 6, 7, 9, 12, 15, 16, 17, 18)))  # Unicode numbers ㄱㄴㄷㄹㅁㅂㅅㅈㅋㅌㅍㅎ
_VOWELS = dict(zip("aeiou", (0, 5, 20, 8, 13)))  # and ㅏㅔㅣㅗㅜ


def _facts():
    """96 x {"en": (name, what it likes), "ko": ...}. Sixteen likes, six names each: a constant guess scores 1/16."""
    draw, names = _Draw("facts"), {}
    while len(names) < 96:
        syllables = [draw.pick("gndlmbsjktph") + draw.pick("aeiou") for _ in range(2)]
        names["".join(syllables)] = "".join(chr(0xAC00 + 28 * (21 * _LEADS[s[0]] + _VOWELS[s[1]])) for s in syllables)
    return [{"en": (en, _LIKES[i % 16][0]), "ko": (ko, _LIKES[i % 16][1])}
            for i, (en, ko) in enumerate(names.items())]


_FACTS = _facts()

# -----------------------------------------------------------------------------
# Sentences, sums and stories

_NAMES = {"en": "Tom Ann Sam Eva Ben Mia Max Lea".split(), "ko": "미나 유리 보라 소라 지우 하나 민수 준호".split()}
_THINGS = {"en": "pens cups hats keys nuts pins dice rugs".split(), "ko": "사탕 연필 구슬 사과 단추 인형 공 컵".split()}
_SENTENCES = {"en": "{} {} the {} and {} {} the {}.", "ko": "{0}는 {2} {1} {3}는 {5} {4}."}
_VERBS = {"en": ("sees wants buys sells".split(), "sees wants buys sells".split()),
          "ko": ("보고 찾고 사고 팔고".split(), "본다 찾는다 산다 판다".split())}  # connecting, closing
_OBJECTS = {lang: _divide(product(map(" ".join, product(adjectives.split(), nouns.split())), repeat=2))
            for lang, adjectives, nouns in (("en", "red blue old new big wet", "cup book ball pen hat bag"),
                                            ("ko", "빨간 파란 헌 새 큰 젖은", "컵을 책을 공을 펜을 모자를 가방을"))}
_FAMILIES = (  # expression, its numbers in the order of the story; its value, 0 where there is no such story
    ("{a}+{b}*{c}", lambda a, b, c: a + b * c),
    ("{a}*{b}-{c}", lambda a, b, c: max(0, a * b - c)),
    ("{a}*({b}+{c})", lambda a, b, c: a * (b + c)),
    ("{a}-{b}+{c}", lambda a, b, c: a - b + c if a > b else 0),
)
_STORIES = {  # per family two wordings to train on, and a third that mixes their words and is held out
    "en": (
        ("{n} has {a} {t} and buys {b} bags of {c} {t}. How many {t}?",
         "{n} had {a} {t} and got {b} cans of {c} {t}. How many {t}?",
         "{n} had {a} {t} and got {b} bags of {c} {t}. How many {t}?"),
        ("{n} has {a} bags of {b} {t} and loses {c}. How many {t}?",
         "{n} had {a} cans of {b} {t} and sold {c}. How many {t}?",
         "{n} had {a} bags of {b} {t} and sold {c}. How many {t}?"),
        ("{n} has {a} bags of {b} red and {c} blue {t}. How many {t}?",
         "{n} had {a} cans of {b} old and {c} new {t}. How many {t}?",
         "{n} has {a} bags of {b} old and {c} new {t}. How many {t}?"),
        ("{n} had {a} {t}, lost {b} and got {c}. How many {t}?",
         "{n} had {a} {t}, sold {b} and found {c}. How many {t}?",
         "{n} had {a} {t}, lost {b} and found {c}. How many {t}?"),
    ),
    "ko": (  # in the style of notes, at most 24 syllables: each is three bytes
        ("{n} {t} {a}개, {b}개씩 {c}봉지 더. 몇 개?",
         "{n} {t} {a}개와 {b}개씩 {c}상자. 몇 개?",
         "{n} {t} {a}개, {b}개씩 {c}상자 더. 몇 개?"),
        ("{n} {t} {a}개씩 {b}봉지, {c}개 잃음. 몇 개?",
         "{n} {t} {a}개씩 {b}상자, {c}개 팔림. 몇 개?",
         "{n} {t} {a}개씩 {b}봉지, {c}개 팔림. 몇 개?"),
        ("{n} {a}봉지에 빨강 {b}개 파랑 {c}개씩. 몇 개?",
         "{n} {a}상자에 새것 {b}개 헌것 {c}개씩. 몇 개?",
         "{n} {a}봉지에 새것 {b}개 헌것 {c}개씩. 몇 개?"),
        ("{n} {t} {a}개, {b}개 잃고 {c}개 삼. 몇 개?",
         "{n} {t} {a}개, {b}개 팔고 {c}개 받음. 몇 개?",
         "{n} {t} {a}개, {b}개 팔고 {c}개 삼. 몇 개?"),
    ),
}


# reasoning_varied: who tells a story decides how its reasoning is written. Expression and answer then stand at many distances from what they copy,
# and no wording is a surprise. One wording for all is learned sooner, but by position: SFT, where calls stand further back, gained nothing (LOG.md).
_WAYS = (" {e}={v}, so {v}.", " Let us see. It is {e}, which makes {v}. The answer is {v}.", ' One call: {{"expression": "{e}"}} gives {v}. So {v}.',
         ' Asked: {{"name": "calculator", "arguments": {{"expression": "{e}"}}}} <tool_response> {v} </tool_response> {v}.')


def _sentence(lang, draw, split):
    first, second = draw.pick(_OBJECTS[lang][split != "train"])
    return _SENTENCES[lang].format(draw.pick(_NAMES[lang]), draw.pick(_VERBS[lang][0]), first,
                                   draw.pick(_NAMES[lang]), draw.pick(_VERBS[lang][1]), second)


def _sum(draw, split):
    """('17*8=', '136')"""
    a, b = draw.pick(_PAIRS[split != "train"])
    sign, function = draw.pick((("+", operator.add), ("-", operator.sub), ("*", operator.mul)))
    return f"{a}{sign}{b}=", str(function(a, b))


def _story(lang, draw, split):
    """('Tom has 12 pens ... How many pens?', '12+3*4', '24')"""
    family, total = draw.below(len(_FAMILIES)), 0
    expression, value = _FAMILIES[family]
    while total == 0:
        a, b, c = draw.pick(_TRIPLES[split != "train"])
        total = value(a, b, c)
    wording = _STORIES[lang][family][2 if split == "test_template" else draw.below(2)]
    text = wording.format(n=draw.pick(_NAMES[lang]), t=draw.pick(_THINGS[lang]), a=a, b=b, c=c)
    return text, expression.format(a=a, b=b, c=c), str(total)


def _level(expression):
    """1 to 4 by the operators: no order to mind, times last, times first, brackets. Evaluation reports success by it."""
    return 1 + ("-+", "+*", "*-", "*(+)").index(re.sub("[0-9]", "", expression))


# -----------------------------------------------------------------------------
# Code: 5 reductions x 4 maps x 5 filters. A combination is held out when its three indices add up to a multiple of 5:
# twenty of a hundred, and every pair of parts is still seen in training.

_REDUCTIONS = (("largest of", "max"), ("smallest of", "min"), ("sum of", "sum"), ("sorted", "sorted"),
               ("list of", "list"))
_MAPS = (("squares", "x*x"), ("doubles", "2*x"), ("halves", "x//2"), ("negatives", "-x"))
_FILTERS = (("even", "x%2==0"), ("odd", "x%2==1"), ("positive", "x>0"), ("negative", "x<0"), ("round", "x%5==0"))
_COMBINATIONS = [], []  # for training, held out
for _r, _m, _f in product(range(5), range(4), range(5)):
    _COMBINATIONS[(_r + _m + _f) % 5 == 0].append((_REDUCTIONS[_r], _MAPS[_m], _FILTERS[_f]))
# hidden tests: lists on which no filter comes up empty, so that every combination has a value on each
_draw = _Draw("hidden inputs")
_INPUTS = [[_draw.below(61) - 30 for _ in range(5)] + [-3, 2, -10, 15, _draw.below(61) - 30] for _ in range(8)]


def _code(draw, split):
    (reduction, function), (image, expression), (kind, test) = draw.pick(_COMBINATIONS[split != "train"])
    # one space of indentation: it is Python, and three bytes shorter
    return (f"Write f(xs): {reduction} {image} of {kind} xs.",
            f"def f(xs):\n return {function}({expression} for x in xs if {test})")


# -----------------------------------------------------------------------------
# Tools: a store of keys and values, notes to search, and the calculator


def _tool(name, description, *arguments):
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": {a: {"type": "string"} for a in arguments}, "required": list(arguments)}}}


_TOOLS = [_tool("get", "Reads a key of the store.", "key"), _tool("set", "Writes a key of the store.", "key", "value"),
          _tool("search", "Finds the note about a word.", "query"), calculator.TOOL]
_ARGUMENTS = {tool["function"]["name"]: tool["function"]["parameters"]["required"] for tool in _TOOLS}
# three letters, such as pen, box, mud: too many to learn by heart, so a model must learn to copy
_KEYS = _divide(map("".join, product("bdklmnprtv", "aeiou", "bdklmnprsx")))


def _call(name, *values):
    return {"name": name, "arguments": dict(zip(_ARGUMENTS[name], values))}


def _tool_request(draw, split):
    """(request, gold calls, their results, final text, answer, what the tools know): one of six kinds."""
    keys = []
    while len(keys) < 3:
        key = draw.pick(_KEYS[split != "train"])
        if key not in keys:
            keys.append(key)
    (first, second, other), (a, b) = keys, draw.pick(_LARGE_PAIRS[split != "train"])
    store = {key: str(2 + draw.below(98)) for key in (first, other)}
    kind, value = draw.below(6), store[first]
    if kind == 0:
        text, calls, results, answer = f"get {first}.", [_call("get", first)], [value], value
    elif kind == 1:
        del store[first]  # else one set in 98 would have nothing to do
        text, calls, results, answer = f"set {first} to {a}.", [_call("set", first, str(a))], ["ok"], ""
    elif kind == 2:
        calls, results = [_call("get", first), _call("set", second, value)], [value, "ok"]
        text, answer = f"copy {first} to {second}.", ""
    elif kind == 3:
        text, calls, results, answer = f"find {first}.", [_call("search", first)], [second], second
    elif kind == 4:
        answer = str(a + b)
        text, calls, results = f"add {a} and {b}.", [_call("calculator", f"{a}+{b}")], [answer]
    else:
        text, calls, results, answer = f"{draw.pick(('call', 'email', 'pay'))} {first.capitalize()}.", [], [], ""
    # a kind trains bare and with one of two openings; the other opening is its held-out wording
    openings = ("Now ", "So ") if kind % 2 else ("So ", "Now ")
    opening = openings[1] if split == "test_template" else draw.pick(("", openings[0]))
    text = opening + text if opening else text[0].upper() + text[1:]
    hidden = {"store": store, "notes": {first: second}, "calls": calls}
    return text, calls, results, results[-1] if results else "No tool.", answer, hidden


# schema: the calculator under other names, which stand before the story. Every name and every parameter is trained on, a quarter of their pairs is not.
_SCHEMA_NAMES, _SCHEMA_PARAMETERS = ("calculator", "compute", "solve", "math"), ("expression", "formula", "text", "sum")
_SCHEMAS = [[], []]  # for training, held out
for (_i, _name), (_j, _parameter) in product(enumerate(_SCHEMA_NAMES), enumerate(_SCHEMA_PARAMETERS)):
    _SCHEMAS[(_i + _j) % 4 == 0].append((_name, _parameter))


def _schema_request(draw, split):
    """('solve(text): Tom has 12 pens ...', '12+3*4', '24', ('solve', 'text'))"""
    schema = draw.pick(_SCHEMAS[split == "test_schema"])
    story, expression, value = _story("en", draw, split)
    return f"{schema[0]}({schema[1]}): {story}", expression, value, schema


def _play(problem, calls):
    """(results of the calls, the store they leave), on a copy of the first state. A call that cannot be carried out has a
    result that says why, never an exception."""
    store, results = dict(problem.hidden.get("store", {})), []
    names = {tool["function"]["name"] for tool in tools_of(problem.task)}
    for call in calls:
        name, arguments = call["name"], call["arguments"]
        try:
            if problem.task == "schema":  # its own names, to those of the calculator
                known, parameter = problem.hidden["schema"]
                if name != known or not isinstance(arguments, dict) or list(arguments) != [parameter]:
                    raise ValueError(f"the tool is {known}({parameter})")
                name, arguments = "calculator", {"expression": arguments[parameter]}
            elif name not in names:
                raise ValueError(f"no tool named {name}")
            if (not isinstance(arguments, dict) or sorted(arguments) != sorted(_ARGUMENTS[name])
                    or not all(isinstance(value, str) for value in arguments.values())):
                raise ValueError(f"{name} takes strings: {', '.join(_ARGUMENTS[name])}")
            if name == "calculator":
                results.append(calculator.calculate(arguments["expression"]))
            elif name == "set":
                store[arguments["key"]] = arguments["value"]
                results.append("ok")
            else:
                known, [key] = store if name == "get" else problem.hidden["notes"], arguments.values()
                if key not in known:
                    raise ValueError(f"nothing under {key}")
                results.append(known[key])
        except ValueError as error:
            results.append(json.dumps({"error": str(error)}, ensure_ascii=False))
    return results, store


# -----------------------------------------------------------------------------
# Chat: name some things, under constraints checked as IFEval checks them. "plain" is capitals in English; Hangul has
# none, so it is no commas in Korean.

_TOPICS = {
    "en": """fruits apple pear plum fig lime; animals cat dog cow pig hen; colors red blue green pink gray;
             foods rice bread soup cake pie; metals iron gold zinc tin lead; trees oak pine elm fir ash;
             birds owl crow duck swan gull; tools saw nail axe drill file; rooms hall bath attic den study;
             limbs arm leg hand foot toe; clothes shirt sock hat coat shoe; sports golf judo chess polo rugby""",
    "ko": """과일 사과 배 감 귤 포도; 동물 개 소 말 닭 토끼; 색깔 빨강 파랑 초록 분홍 회색;
             음식 밥 빵 국 떡 죽; 금속 철 금 은 납 구리; 나무 소나무 감나무 느티 버들 전나무;
             새 참새 오리 백조 까치 제비; 도구 톱 못 칼 삽 망치; 방 거실 침실 부엌 서재 욕실;
             신체 팔 다리 손 발 코; 옷 바지 치마 모자 양말 신; 운동 축구 야구 농구 유도 수영""",
}
_TOPICS = {lang: [row.split() for row in text.split(";")] for lang, text in _TOPICS.items()}  # topic, then five members
_WORDING = {"en": {"name": "Name {n} {t}.", "plain": "ALL CAPS.", "bullets": "Bullets.", "quote": "Quote it.",
                   "end": "End with {e}.", "title": "Add a title."},
            "ko": {"name": "{t} {n}개 말해.", "plain": "쉼표 없이.", "bullets": "목록으로.", "quote": "따옴표로.",
                   "end": "{e}으로 끝내.", "title": "제목 붙여."}}
_ENDINGS = {"en": ("Bye", "Done", "Yes"), "ko": ("안녕", "이상", "끝")}
# bullets in quotes are no pair at all: the first line would start with the quote
_SEEN = (("plain", "bullets"), ("plain", "end"), ("bullets", "title"), ("quote", "end"), ("quote", "title"),
         ("end", "title"))
_UNSEEN = (("plain", "title"), ("bullets", "end"), ("plain", "quote"))
# of five training items two have both constraints of a pair, two have one of them, one has none
_CHOICES = _divide((topic, n, chosen) for topic, n, (x, y) in product(range(12), (2, 3, 4), _SEEN)
                   for chosen in ((x, y), (x, y), (x,), (y,), ()))


def _chat_request(lang, draw, split):
    """(request, gold response, what the grader checks)"""
    topic, n, chosen = draw.pick(_CHOICES[split != "train"])
    if split == "test_template":
        chosen = draw.pick(_UNSEEN)
    ending, (title, *members) = draw.pick(_ENDINGS[lang]), _TOPICS[lang][topic]
    order = ("name", *(chosen[::-1] if draw.below(2) else chosen))
    request = " ".join(_WORDING[lang][constraint] for constraint in order).format(n=n, t=title, e=ending)
    lines = ["- " + member for member in members[:n]]
    if "bullets" not in chosen:
        lines = [(" " if lang == "ko" and "plain" in chosen else ", ").join(members[:n])]
    lines = [f"<<{title.capitalize()}>>"] * ("title" in chosen) + lines + [ending] * ("end" in chosen)
    text = "\n".join(lines).upper() if "plain" in chosen else "\n".join(lines)  # upper() leaves Hangul as it is
    text = f'"{text}"' if "quote" in chosen else text
    return request, text, {"members": members, "n": n, "constraints": chosen, "ending": ending}


def _grade_chat(problem, text):
    """RIGHT if the response names exactly n different members of the topic and keeps every constraint."""
    hidden, chosen, bare = problem.hidden, problem.hidden["constraints"], text.strip()
    lines = bare.split("\n")
    named = [word for word in re.findall(r"\w+", text.casefold()) if word in hidden["members"]]
    kept = [len(named) == len(set(named)) == hidden["n"]]
    if "plain" in chosen:
        kept.append(text.isupper() if problem.task == "chat_en" else "," not in text)
    if "bullets" in chosen:
        kept.append(sum(re.match(r"-|\*[^*]", line) is not None for line in lines) == hidden["n"])
    if "quote" in chosen:
        kept.append(len(bare) >= 2 and bare[0] == bare[-1] == '"')
    if "end" in chosen:
        kept.append(bare.strip('"').lower().endswith(hidden["ending"].lower()))
    if "title" in chosen:  # partition finds the first << and the last >> of a line in one pass each
        kept.append(any(line.partition("<<")[2].rpartition(">>")[0].strip(" <>") for line in lines))
    return Outcome.RIGHT if all(kept) else Outcome.WRONG


# -----------------------------------------------------------------------------
# Items, and what the rest of the code calls


def item(task: str, split: str, seed: int, index: int) -> Problem:
    """Item `index` of the endless stream (task, split, seed). Items repeat, the more so the smaller the task."""
    expected = ("train", "test") + ("test_template",) * (task in TEMPLATE_TASKS) + ("test_schema",) * (task == "schema")
    if task not in TEXT_TASKS + CHAT_TASKS or split not in expected:
        raise ValueError(f"toy: expected a task of {', '.join(TEXT_TASKS + CHAT_TASKS)} and for it a split of "
                         f"{', '.join(expected)}; found {task!r}, {split!r}")
    draw, (family, _, lang) = _Draw(task, split, seed, index), task.partition("_")
    if family == "facts":  # every split is the same 96 facts: what is tested is memory
        name, likes = draw.pick(_FACTS)[lang]
        prompt, rest = (f"{name} likes", f" {likes}.") if lang == "en" else (f"{name}는", f" {likes} 좋아해.")
        return Problem(task, prompt, rest, likes)
    if family == "text":
        return Problem(task, "", _sentence(lang, draw, split), "")
    if family == "sums":
        prompt, value = _sum(draw, split)
        return Problem(task, prompt, value, value)
    if family == "reasoning":
        prompt, expression, value = _story("en", draw, split)
        way = _WAYS[_NAMES["en"].index(prompt.partition(" ")[0]) % len(_WAYS) if task == "reasoning_varied" else 0]
        return Problem(task, prompt, way.format(e=expression, v=value), value)
    calls, results, answer, hidden = [], [], "", {}
    if family == "math":
        prompt, expression, final = _story(lang, draw, split)
        calls, results, answer, hidden = [_call("calculator", expression)], [final], final, {"level": _level(expression)}
    elif family == "tool":
        prompt, calls, results, final, answer, hidden = _tool_request(draw, split)
    elif family == "schema":
        prompt, expression, final, (name, parameter) = _schema_request(draw, split)
        calls, results, answer = [{"name": name, "arguments": {parameter: expression}}], [final], final
        hidden = {"schema": (name, parameter), "level": _level(expression)}
    elif family == "code":
        prompt, final = _code(draw, split)
        answer = final
    else:
        prompt, final, hidden = _chat_request(lang, draw, split)
    problem = Problem(task, [{"role": "user", "content": prompt}], [], answer, hidden)
    for call, result in zip(calls, results):
        problem.gold.append({"role": "assistant", "content": "", "tool_calls": [call]})
        problem.gold.append({"role": "tool", "content": result})
    problem.gold.append({"role": "assistant", "content": final})
    return problem


def documents(task: str, split: str = "train", seed: int = 0, num: int | None = None) -> Iterator[str]:
    """`num` documents of a text task; endless if None."""
    if task not in TEXT_TASKS:
        raise ValueError(f"toy: expected a text task ({', '.join(TEXT_TASKS)}), found {task!r}")
    for index in islice(count(), num):
        problem = item(task, split, seed, index)
        yield problem.prompt + problem.gold


def conversations(task: str, split: str = "train", seed: int = 0, num: int | None = None,
                  tools: bool = False) -> Iterator[dict]:
    """`num` chat records {"messages", "bucket": math|code|tool|chat} of a chat task; endless if None.

    tools=True adds "tools" to tasks that have some: rendered, a preamble several times as long as the conversation. Calls
    and results are the same without it.
    """
    if task not in CHAT_TASKS:
        raise ValueError(f"toy: expected a chat task ({', '.join(CHAT_TASKS)}), found {task!r}")
    for index in islice(count(), num):
        problem = item(task, split, seed, index)
        record = {"messages": problem.prompt + problem.gold, "bucket": "tool" if task == "schema" else task.partition("_")[0]}
        yield {**record, "tools": _announced(problem)} if tools and tools_of(task) else record


def problems(task: str, split: str = "test", seed: int = 0, num: int = 300, tools: bool = False) -> list[Problem]:
    """Up to `num` problems with different prompts, in order of index; fewer where the task has no more (96 facts, 20
    combinations of code). Fixed for a given seed, and a prefix of what a larger `num` gives. tools as above."""
    if task in ("text_en", "text_ko"):
        raise ValueError(f"toy: {task} has no problems; measure its bits per byte")
    found = {}
    for index in range(20 * num):
        if len(found) == num:
            break
        problem = item(task, split, seed, index)
        problem = replace(problem, tools=_announced(problem)) if tools and tools_of(task) else problem
        found.setdefault(problem.prompt if task in TEXT_TASKS else problem.prompt[0]["content"], problem)
    return list(found.values())


def tools_of(task: str) -> list[dict]:
    """Schemas of the tools that work in a task; empty if none does."""
    return _TOOLS if task == "tool" else [calculator.TOOL] if task in ("math_en", "math_ko", "schema", "gsm8k") else []


def _announced(problem):
    """Schemas as the prompt may list them."""
    return [_tool(problem.hidden["schema"][0], "Evaluates an arithmetic expression exactly.", problem.hidden["schema"][1])] \
        if problem.task == "schema" else tools_of(problem.task)


def execute(problem: Problem, calls: list[dict]) -> list[str]:
    """Results of all `calls` of an episode so far, in order, played from the problem's first state. As some tools write,
    pass the calls of earlier turns too and use the last results: the function keeps no state and changes none."""
    return _play(problem, calls)[0]


# -----------------------------------------------------------------------------
# Grading. A response is a text, or the messages that follow the prompt (assistant, tool, assistant, ...). Text may hold
# turns and calls in ChatML, as the engine's Rollout.text does. Tool messages are not read: the calls are played again.


def _messages(response):
    """The messages of a text; messages stay what they are."""
    if not isinstance(response, str):
        return response
    messages = []
    for i, turn in enumerate(response.split("<|im_end|>\n<|im_start|>")):
        role, _, text = turn.partition("\n") if i else ("assistant", "", turn)
        try:
            content, calls = parse_tool_calls(text) if role == "assistant" else (text, [])
        except ToolCallError:
            content, calls = text, [{"name": "", "arguments": {}}]  # a call, but of no tool there is
        messages.append({"role": role, "content": content, "tool_calls": calls})
    return messages


def _turns(response):
    """(calls of all assistant turns, text of the last turn: "" if the response ends in a call or a tool message)"""
    response = _messages(response)
    calls = [call for message in response if message["role"] == "assistant" for call in message.get("tool_calls") or []]
    ended = response and response[-1]["role"] == "assistant" and not response[-1].get("tool_calls")
    return calls, response[-1]["content"] if ended else ""


@never_raises
def grade(problem: Problem, response: str | list[dict]) -> Outcome:
    """RIGHT if both the calls and the final answer are; else the outcome of the first that is not."""
    if problem.task not in TEXT_TASKS:
        response = _messages(response)  # once for both
    outcome = grade_call(problem, response)
    return grade_answer(problem, response) if outcome == Outcome.RIGHT else outcome


@never_raises
def grade_call(problem: Problem, response: str | list[dict]) -> Outcome:
    """Are the calls right? math: the last one is the calculator, on an expression with the right value, however written.
    tool: they leave the right store, and there are any iff any are needed. Else: there are none."""
    if problem.task in TEXT_TASKS:
        return Outcome.RIGHT
    calls, _ = _turns(response)
    if problem.task in ("math_en", "math_ko", "schema"):
        result = execute(problem, calls[-1:])
        if not result or result[0].startswith("{"):
            return Outcome.UNGRADABLE  # no call, or one that has no value
        return Outcome.RIGHT if result[0] == problem.answer else Outcome.WRONG
    gold = problem.hidden.get("calls", [])
    right = bool(calls) == bool(gold) and _play(problem, calls)[1] == _play(problem, gold)[1]
    return Outcome.RIGHT if right else Outcome.WRONG


@never_raises
def grade_answer(problem: Problem, response: str | list[dict]) -> Outcome:
    """Is the completion, or the text of the last turn, right?"""
    text = response if problem.task in TEXT_TASKS else _turns(response)[1]
    if len(text) > MAX_CHARS or not text.strip():
        return Outcome.UNGRADABLE
    if problem.task == "code":
        return tinypython.grade(text, problem.answer, _INPUTS)
    if problem.task in ("chat_en", "chat_ko"):
        return _grade_chat(problem, text)
    if problem.task in ("facts_en", "facts_ko"):
        return Outcome.RIGHT if text.split(None, 1)[0].strip(".,") == problem.answer else Outcome.WRONG
    if problem.task == "reasoning":  # the value of what stands before "=": a model this small cannot multiply, the calculator can
        try:
            same = calculator.calculate(text.strip().partition("\n")[0].partition("=")[0]) == problem.answer
        except calculator.CalculatorError:
            return Outcome.UNGRADABLE
        return Outcome.RIGHT if same else Outcome.WRONG
    if problem.task == "reasoning_varied":  # the value of the first expression
        expression = re.search(r"[(0-9][-+*()0-9]*[-+*][-+*()0-9]*", text[:256])
        try:
            same = expression is not None and calculator.calculate(expression[0]) == problem.answer
        except calculator.CalculatorError:
            return Outcome.UNGRADABLE
        return Outcome.RIGHT if same else Outcome.WRONG if expression else Outcome.UNGRADABLE
    if problem.task == "sums":  # '136', or '17*8=136', where both sides must be right
        expression, equals, text = text.strip().partition("\n")[0].rpartition("=")
        try:
            if equals and calculator.calculate(expression) != problem.answer:
                return Outcome.WRONG
        except calculator.CalculatorError:
            return Outcome.UNGRADABLE
    if problem.answer == "":
        return Outcome.RIGHT
    gold, found = parse_number(problem.answer), parse_number(text)
    if gold is not None and found is None:
        return Outcome.UNGRADABLE
    same = found == gold if gold is not None else text.strip().removesuffix(".").casefold() == problem.answer
    return Outcome.RIGHT if same else Outcome.WRONG
