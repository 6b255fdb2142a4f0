"""Episodes of tool use: generated, seeded, played turn by turn, graded by their end.

    e = episode(level=4, split="train", seed=0, index=7)
    e.messages, e.tools             the first messages, and the schemas to render into the prompt
    e.step(calls) -> responses      after a turn with calls; e.refuse(why) -> response, after one that parse_tool_calls refuses
    e.user_turn(text)               after a turn without a call: the user's next message, or None if that turn was the last
    e.grade(text) -> Outcome        of the last turn

    level 1  one call                                  level 4  a chain of two to five calls, each fed by the one before
    level 2  one call among 3-8 tools, near-misses     level 5  something is missing: the user says it when the assistant makes no call
    level 3  two to four calls that fit into a turn    level 6  no tool fits: no call, and a few words

Right is, whatever the path: everything that the tools can change ends as the gold program leaves it on a copy (each row, file, key and
booking, so side effects fail), and the last line "Answer: ..." equals the answer, which lies in the hidden state and not in the request.

An episode is a pure function of (level, split, seed, index), and what happens in it of that and the turns. Splits are "train" and the four
cells of the test; all of these have names (of keys, files, titles, products) that are in no training episode of any seed:

    test           nothing else is new             test_schema  tools and parameters have names that training never shows, and are
    test_template  wording is held out, too                     offered together as they never are there
                                                   test_both    both
"""
import functools
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from data.episode_tasks import CHAIN_FAMILIES, CHAINS, FAMILIES, FAMILY, MISSING, SINGLES, Draw, Scene
from data.episode_words import STYLES, WORDINGS
from data.grading import MAX_CHARS, Outcome, Problem, never_raises, parse_number
from data.tools import READERS, TOOLS, BoxError, ToolError, World, parameters, schema, to_json, to_response
from tokenizer import CALL, ToolCallError, check_value

MAX_TURNS, MAX_CALLS = 8, 4  # assistant turns of an episode, calls of a turn
LEVELS = (1, 2, 3, 4, 5, 6)
CELLS = {"train": "train", "test": "numbers", "test_template": "template", "test_schema": "schema", "test_both": "both"}
SPLITS = tuple(CELLS)
BUSY = {"error": "busy: try again"}
STATS = ("turns", "calls", "valid", "invalid", "errors", "wasted", "recovered", "asks", "needless_asks", "truncated")


# -----------------------------------------------------------------------------
# Answers


def last_answer(text):
    """What stands after the last line that starts with "Answer:"; None if no line does."""
    lines = [line for line in text.split("\n") if line.lstrip().startswith("Answer:")]
    return lines[-1].partition("Answer:")[2].strip() if lines else None


def _item(text):
    """An answer as it is compared: an exact rational if it is a number or a fraction, else stripped and case-folded text."""
    value, slash, denominator = text.partition("/")
    value, denominator = parse_number(value), parse_number(denominator) if slash else 1
    return value / denominator if value is not None and denominator else text.strip().casefold()


def grade_answer(text, gold, any_order=False):
    """gold: a text, or a list of texts for an answer with commas between its items, compared in order or as multisets."""
    found = last_answer(text) if len(text) <= MAX_CHARS else None
    if not found:
        return Outcome.UNGRADABLE
    single = isinstance(gold, str)
    values, golds = [*map(_item, [found] if single else found.split(","))], [*map(_item, [gold] if single else gold)]
    if single and isinstance(values[0], str) and not isinstance(golds[0], str):
        return Outcome.UNGRADABLE  # a number was asked for
    same = Counter(values) == Counter(golds) if any_order else values == golds
    return Outcome.RIGHT if same else Outcome.WRONG


# -----------------------------------------------------------------------------
# Playing


@dataclass(eq=False)
class Episode:
    level: int
    split: str
    lang: str
    request: str  # the user's first message
    offered: dict[str, tuple[str, ...]]  # tool -> (name, names of its parameters), as the model sees it
    first: World  # never changed: copies of it are played
    program: Callable  # -> generator: yields a turn's calls [(tool, values...)] or a question, is sent what came back, returns the answer
    answer: str | list[str]
    any_order: bool = False
    replies: tuple[str, ...] = ()  # what the scripted user still has to say
    wordings: tuple[str, ...] = ()  # templates that the request was made from

    has_tools = True  # for those who play it: turns may hold calls

    def __post_init__(self):
        self.world, self.due, self.box_failed = self.first.copy(), list(self.replies), False
        self.stats, self._calls = dict.fromkeys(STATS, 0), []
        self.messages = [{"role": "user", "content": self.request}]
        self.tools = [schema(tool, *names) for tool, names in self.offered.items()]
        self._tools = {names[0]: tool for tool, names in self.offered.items()}

    @property
    def needs_tools(self):
        return self.level != 6

    @property
    def over(self):
        """No assistant turn is left."""
        return self.stats["turns"] >= MAX_TURNS

    def step(self, calls: list[dict] | ToolCallError) -> list[str]:
        """Carries out a turn's calls in order; -> one response for each, or one for a turn that could not be parsed. Never raises."""
        self.stats["turns"] += 1
        if isinstance(calls, ToolCallError):
            self.stats["calls"] += 1
            self.stats["invalid"] += 1
            return [to_response({"error": str(calls)})]
        return [self._call(call, number) for number, call in enumerate(calls)]

    def refuse(self, why: str) -> str:
        """-> the response to a turn whose calls cannot be parsed."""
        return self.step(ToolCallError(why))[0]

    def _call(self, call, number):
        self.stats["calls"] += 1
        tool = self._tools.get(call["name"])
        try:  # the same check as the parser's, for callers who did not give it the tools
            if number >= MAX_CALLS:
                raise ToolCallError(f"expected at most {MAX_CALLS} calls in a turn; this one was not carried out")
            if tool is None:
                raise ToolCallError(f"unknown tool {call['name']!r}, expected one of {', '.join(self._tools)}")
            names = self.offered[tool]
            check_value(call["arguments"], schema(tool, *names)["function"]["parameters"], "arguments")
        except ToolCallError as error:
            self.stats["invalid"] += 1
            return to_response({"error": str(error)})
        self.stats["valid"] += 1
        own = dict(zip(names[1:], parameters(tool)))
        before = None if tool in READERS else [dict(part) for part in self.world.snapshot()]
        try:
            if tool in self.world.busy:
                payload = BUSY
                self.world.busy.remove(tool)
            else:
                payload = TOOLS[tool][0](self.world, **{own[name]: value for name, value in call["arguments"].items()})
            if not isinstance(payload, dict):
                raise TypeError(f"{tool}: expected a response that is an object, found {type(payload).__name__}")
            response = to_response(payload)
        except Exception as error:
            known = isinstance(error, (ToolError, BoxError))
            if not known:  # our bug: the log has it, the model sees an error, the rollouts beside it go on
                logging.getLogger(__name__).exception("%s failed", tool)
            self.box_failed |= isinstance(error, BoxError)
            payload = {"error": str(error) if known else f"the tool failed: {type(error).__name__}"}
            response = to_response(payload)
        self.stats["errors"] += "error" in payload
        self._calls.append((call, response, payload.keys(), before is not None and before != [*self.world.snapshot()]))
        return response

    def user_turn(self, text: str) -> str | None:
        """What the user says to a turn without a call: first what the request left out; to a question once nothing is missing, that nothing
        is; else None, the episode is over and `text` is to be graded."""
        self.stats["turns"] += 1
        if self.over:
            return None
        if self.due:
            self.stats["asks"] += 1
            return self.due.pop(0)
        if self.level != 6 and last_answer(text) is None and text.rstrip().endswith(("?", "？")):
            self.stats["needless_asks"] += 1
            return {"en": "You have all that you need.", "ko": "필요한 것은 다 말씀드렸습니다."}[self.lang]
        return None

    @functools.cached_property
    def _solution(self):
        """(messages of one right rollout, the world that it leaves): the gold program, on a copy of the first state."""
        twin, program, messages, reply = replace(self), self.program(), [], None
        while True:
            try:
                said = program.send(reply)
            except StopIteration as end:
                return [*messages, {"role": "assistant", "content": end.value if self.level == 6 else f"Answer: {end.value}"}], twin.world
            if isinstance(said, str):
                reply = twin.user_turn(said)
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": reply}]
                continue
            reply, due = [BUSY] * len(said), range(len(said))
            while due:  # what was busy is asked for again in the next turn
                calls = [{"name": self.offered[tool][0], "arguments": dict(zip(self.offered[tool][1:], values))}
                         for tool, *values in (said[i] for i in due)]
                results = twin.step(calls)
                if twin.box_failed:
                    raise BoxError(results[-1])
                messages.append({"role": "assistant", "content": "", "tool_calls": calls})
                messages += [{"role": "tool", "content": result} for result in results]
                for i, result in zip(due, results):
                    reply[i] = json.loads(result)
                due = [i for i in due if reply[i] == BUSY]

    @property
    def gold(self) -> list[dict]:
        """The messages of one right rollout. Raises BoxError if it needs a sandbox and there is none."""
        return self._solution[0]

    @never_raises
    def grade(self, response: str | list[dict] | None) -> Outcome:
        """response: the last turn, or all messages that followed the prompt; None, or messages that do not end in a turn of the assistant:
        the budget ran out before it. Also counts what only the end can tell: waste, recovery, truncation."""
        text = response
        if isinstance(response, list):
            ended = response and response[-1]["role"] == "assistant" and not response[-1].get("tool_calls")
            text = response[-1]["content"] if ended else None
        outcome = self._outcome(text)
        self.stats["truncated"] = int(text is None or self.stats["turns"] > MAX_TURNS)
        self.stats["recovered"] = int(outcome == Outcome.RIGHT and self.stats["errors"] + self.stats["invalid"] > 0)
        self.stats["wasted"] = self._num_wasted((text or "")[:MAX_CHARS])
        return outcome

    def _outcome(self, text):
        if self.box_failed:
            return Outcome.GRADER_ERROR
        if text is None or self.stats["turns"] > MAX_TURNS:
            return Outcome.WRONG
        if self.level == 6:
            if self.stats["calls"] or CALL in text:  # the latter: a call that the budget cut off
                return Outcome.WRONG
            return Outcome.RIGHT if text.strip() and len(text) <= MAX_CHARS else Outcome.UNGRADABLE
        outcome = grade_answer(text, self.answer, self.any_order)
        if outcome == Outcome.RIGHT and self.world.snapshot() != self._solution[1].snapshot():
            return Outcome.WRONG
        return outcome

    def _num_wasted(self, text):
        """Calls that changed nothing and either repeat an earlier call and its response, or returned nothing that a later call or the last
        turn has a word of. Errors count as errors, not as waste."""
        # apart by script, since a Korean particle is written onto the number before it
        words = lambda value: set(re.findall(r"[a-zA-Z0-9]{2,}|[^\W\da-zA-Z_]+", to_json(value)))
        later, wasted = words(text), 0
        for number, (call, response, keys, changed) in reversed([*enumerate(self._calls)]):
            repeats = (call, response) in [earlier[:2] for earlier in self._calls[:number]]
            used = "error" in keys or (words(response) - keys) & later
            wasted += not changed and (repeats or not used)
            later |= words(list(call["arguments"].values()))
        return wasted


# -----------------------------------------------------------------------------
# Making

_SAY = {
    "en": {"form": 'End with a line "Answer: ...".', "ordered": "in this order", "any order": "in any order",
           "ask": "What should it be? I need: {}.", "none": "None of my tools can do that."},
    "ko": {"form": '마지막 줄은 "Answer: ..." 형식으로 써 주세요.', "ordered": "이 순서대로", "any order": "순서에 상관없이",
           "ask": "무엇으로 할까요? 필요한 것: {}.", "none": "제 도구로는 할 수 없는 일입니다."},
}


def cell(split: str) -> str:
    """The column of the results that a split belongs to: train | numbers | template | schema | both."""
    return CELLS[split]


def episode(level: int, split: str, seed: int, index: int, lang: str | None = None, families=FAMILIES) -> Episode:
    """Episode `index` of the endless stream (level, split, seed).

    lang: "en" or "ko"; drawn if None. families: tools that may be needed or offered; leave "python" out where no sandbox works.
    """
    if level not in LEVELS or split not in SPLITS or lang not in (None, "en", "ko") or not set(families) <= set(FAMILIES):
        raise ValueError(f"expected a level of {LEVELS}, a split of {', '.join(SPLITS)}, lang en, ko or None, families of "
                         f"{', '.join(FAMILIES)}; found {level!r}, {split!r}, {lang!r}, {families!r}")
    draw = Draw(f"{level}/{split}/{seed}/{index}")
    lang = lang or draw.pick(("en", "ko"))
    say, scene, wordings, replies, any_order = _SAY[lang], Scene(draw, lang, split != "train"), [], (), False

    def word(kind, slots):
        texts = WORDINGS[kind][lang]
        num = len(texts) * 2 // 3  # the last third is held out
        wordings.append(texts[num + draw.below(len(texts) - num)] if split in ("test_template", "test_both") else texts[draw.below(num)])
        return wordings[-1].format(**slots)

    def some(kinds, needs):
        possible = [kind for kind in kinds if set(needs(kind)) <= set(families)]
        if not possible:
            raise ValueError(f"level {level} has nothing that {families} can do: allow more families")
        return draw.pick(possible)

    def single(kinds=SINGLES):
        kind = some(kinds, lambda kind: [_family_of(kind)])
        return kind, *SINGLES[kind](scene, kind)

    # play(tools), tools being what is offered below, is the gold program
    if level in (1, 2):
        kind, slots, call, answer, read = single()
        request, needed = word(kind, slots), [call[0]]

        def play(tools):
            return read((yield [call])[0])
    elif level == 3:
        parts = [single() for _ in range(2 + draw.below(3))]
        lines = "".join(f"\n{i}. {word(kind, slots)}" for i, (kind, slots, *_) in enumerate(parts, 1))
        any_order = draw.below(2) == 1
        request = word("batch", {"list": lines + "\n", "order": say["any order" if any_order else "ordered"]})
        needed, answer = [*dict.fromkeys(call[0] for _, _, call, _, _ in parts)], [part[3] for part in parts]

        def play(tools):
            responses = yield [call for _, _, call, _, _ in parts]
            return ", ".join(read(response) for (*_, read), response in zip(parts, responses))
    elif level == 4:
        kind = some(CHAINS, lambda kind: CHAIN_FAMILIES[kind].split())
        slots, needed, program, answer = CHAINS[kind](scene)
        request = word(kind, slots)

        def play(tools):
            return (yield from program())
    elif level == 5:
        kind, slots, call, answer, read = single(MISSING)
        request, needed, missing = word(kind + "?", slots), [call[0]], MISSING[kind]
        clock = {"en": "{day} {hour}:00", "ko": "{day} {hour}시"}[lang]
        replies = (word("reply", {"missing": clock.format(**slots) if "hour" in missing else slots[missing[0]]}),)

        def play(tools):
            yield say["ask"].format(", ".join(tools[call[0]][1 + parameters(call[0]).index(name)] for name in missing))
            return read((yield [call])[0])
    else:
        # half of it is what other levels ask for, too: only the tools tell that it cannot be done
        others, needed, answer = [], [], ""
        if draw.below(2):
            kind, slots, *_ = single()
            near = {"python": "file", "file": "python", "search": "file"}  # both see files; a file might be taken for a document
            others = [family for family in families if family not in (_family_of(kind), near.get(_family_of(kind)))]
        if not others:
            kind, slots, others = "outside", {"name": scene.name(), "number": scene.number()}, families
        request = word(kind, slots)

        def play(tools):
            return say["none"]
            yield  # makes it a generator, as the others are
        families = others

    offered = _offer(draw, split, needed, families, *{1: (1, 1), 2: (3, 8), 6: (2, 8)}.get(level, (len(needed), 8)))
    for family in dict.fromkeys(FAMILY[tool] for tool in TOOLS if tool in offered):
        scene.fill(family)
    if needed and draw.below(8) == 0:
        scene.world.busy = {draw.pick(needed)}
    request = f"{request}\n{say['form']}"
    return Episode(level, split, lang, request, offered, scene.world, functools.partial(play, offered), answer, any_order, replies,
                   tuple(wordings))


def _family_of(kind):
    return FAMILY.get(kind) or {"sql_one": "sql", "sql_sum": "sql"}[kind]


def _offer(draw, split, needed, families, low, high):
    """`needed` and other tools of `families`, low to high in all, in any order, under names of the split; -> Episode.offered.

    One in four combinations of tools is held out. Single tools are not: training has to show each of them somehow."""
    held = split in ("test_schema", "test_both")
    styles = {family: STYLES[family][3 + draw.below(2) if held else draw.below(3)] for family in FAMILIES}
    others = [tool for tool in TOOLS if FAMILY[tool] in families and tool not in needed]
    sisters = {FAMILY[tool] for tool in needed}
    for _ in range(200):
        num = min(low + draw.below(high - low + 1), len(needed) + len(others))
        near = draw.below(2)  # tools of the same family first: kv_list and kv_delete beside kv_get
        order = sorted(draw.shuffled(others), key=lambda tool: near and FAMILY[tool] not in sisters)
        tools = [*needed, *order[:num - len(needed)]]
        if len(tools) == 1 or held == (zlib.crc32(" ".join(sorted(tools)).encode()) % 4 == 0):
            return {tool: styles[FAMILY[tool]][_POSITION[tool]] for tool in draw.shuffled(tools)}
    raise ValueError(f"split {split} has no combination of {', '.join(needed)} with other tools of {families}: allow more families")


_POSITION = {tool: [t for t in TOOLS if FAMILY[t] == FAMILY[tool]].index(tool) for tool in TOOLS}


def conversations(split: str = "train", seed: int = 0, num: int = 1000, levels=LEVELS, lang=None, families=FAMILIES) -> Iterator[dict]:
    """`num` demonstrations {"messages", "tools", "bucket": "tool"}, the levels in turn. Those that call Python need a sandbox."""
    for index in range(num):
        e = episode(levels[index % len(levels)], split, seed, index, lang, families)
        yield {"messages": e.messages + e.gold, "tools": e.tools, "bucket": "tool"}


def problems(level: int, split: str = "test", seed: int = 0, num: int = 300, lang=None, families=FAMILIES) -> list[Problem]:
    """The first `num` episodes as problems of the task "tools/LEVEL"; hidden says which episode it is, and its cell and language."""
    found = []
    for index in range(num):
        e, key = episode(level, split, seed, index, lang, families), (level, split, seed, index, lang, tuple(families))
        answer = e.answer if isinstance(e.answer, str) else ", ".join(e.answer)
        hidden = {"episode": key, "level": level, "cell": cell(split), "lang": e.lang}
        found.append(Problem(f"tools/{level}", e.messages, e.gold, answer, hidden, e.tools))
    return found


def episode_of(problem: Problem) -> Episode:
    """A fresh episode of one of `problems`: its state is its own."""
    return episode(*problem.hidden["episode"])
