import ast
import copy
import random
import re
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest

from adversarial import assert_bounded
from data import calculator, tinypython, toy
from data.grading import Outcome
from tokenizer import Tokenizer, parse_tool_calls

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR
TOKENIZER = Tokenizer.bytes()
GRADED = [task for task in toy.TEXT_TASKS + toy.CHAT_TASKS if not task.startswith("text")]
SPLITS = [(task, split) for task in GRADED for split in ("train", "test", "test_template")
          if split != "test_template" or task in toy.TEMPLATE_TASKS]


def prompt_text(problem):
    return problem.prompt if isinstance(problem.prompt, str) else problem.prompt[0]["content"]


def rollout_text(problem):
    """The gold rollout as the engine's Rollout.text shows it: all that follows the prompt, the last stop id left off."""
    ids, _ = TOKENIZER.render(problem.prompt + problem.gold)
    return TOKENIZER.decode(ids[len(TOKENIZER.render_prompt(problem.prompt)):]).removesuffix("<|im_end|>\n")


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def rollout(*turns):
    """Messages from texts (final turns) and lists of calls."""
    return [{"role": "assistant", "content": turn} if isinstance(turn, str) else
            {"role": "assistant", "content": "", "tool_calls": turn} for turn in turns]


# -----------------------------------------------------------------------------
# Items


def test_items_are_these():
    """Pinned: data that a model was trained on must not change under it."""
    show = lambda p: f"{prompt_text(p)} | {p.gold if isinstance(p.gold, str) else p.gold[-1]['content']}"
    assert [show(toy.item(task, "train", 0, 7)) for task in toy.TEXT_TASKS + toy.CHAT_TASKS] == PINNED


def test_pure_function_of_task_split_seed_index():
    for task, split in SPLITS:
        forward = [toy.item(task, split, 5, i) for i in range(50)]
        assert forward == [toy.item(task, split, 5, i) for i in reversed(range(50))][::-1]
        assert forward != [toy.item(task, split, 6, i) for i in range(50)]
    assert list(toy.documents("sums", num=3)) == [p.prompt + p.gold for p in (toy.item("sums", "train", 0, i) for i in range(3))]
    first = [next(iter(toy.conversations("math_en")))["messages"], *[c["messages"] for c in toy.conversations("math_en", num=1)]]
    assert first[0] == first[1] == toy.item("math_en", "train", 0, 0).prompt + toy.item("math_en", "train", 0, 0).gold


@pytest.mark.parametrize("task", [t for t in toy.TEXT_TASKS + toy.CHAT_TASKS if not t.startswith("facts")])
def test_splits_are_disjoint(task):
    """10^5 items of every split, of several seeds: no prompt is in two of them (text_*, which have none: no document).
    2*10^4 do where a task has fewer than 2,500 prompts in all."""
    num = 20_000 if task in ("sums", "code", "chat_en", "chat_ko") else 100_000
    splits = ["train", "test"] + ["test_template"] * (task in toy.TEMPLATE_TASKS)
    seen = {}
    for split in splits:
        text = (lambda p: p.gold) if task.startswith("text") else prompt_text
        seen[split] = {hash(text(toy.item(task, split, i % 3, i))) for i in range(num)}
    sizes = {split: len(hashes) for split, hashes in seen.items()}
    assert sum(sizes.values()) == len(set().union(*seen.values())), sizes
    assert min(sizes.values()) >= 20


def test_numbers_of_stories_are_disjoint_across_tasks_and_languages():
    numbers = lambda task, split: {tuple(map(int, re.findall(r"\d+", prompt_text(toy.item(task, split, 0, i))))) for i in range(5000)}
    train = set().union(*(numbers(task, "train") for task in ("reasoning", "math_en", "math_ko")))
    test = set().union(*(numbers(task, split) for task in ("reasoning", "math_en", "math_ko") for split in ("test", "test_template")))
    assert len(train) > 1000 and len(test) > 100 and not train & test
    pairs = lambda split: {tuple(map(int, re.findall(r"\d+", toy.item("sums", split, 0, i).prompt))) for i in range(5000)}
    assert 0.05 < len(pairs("test")) / 361 < 0.15 and not pairs("test") & pairs("train")  # for all three operators


@pytest.mark.parametrize("task", toy.TEMPLATE_TASKS)
def test_templates_are_held_out(task):
    def shape(problem):
        words = toy._NAMES["en"] + toy._NAMES["ko"] + toy._THINGS["en"] + toy._THINGS["ko"]
        text = re.sub(r"\d+", "#", prompt_text(problem))
        if task == "tool":  # keys
            text = re.sub(r"\b[bdklmnprtv][aeiou][bdklmnprsx]\b", "@", text, flags=re.I)
        if task.startswith("chat"):  # the set of constraints
            return tuple(sorted(problem.hidden["constraints"]))
        return re.sub("|".join(words), "@", text)

    shapes = {split: {shape(toy.item(task, split, 0, i)) for i in range(3000)} for split in ("train", "test", "test_template")}
    assert shapes["test"] <= shapes["train"] and not shapes["test_template"] & shapes["train"]
    assert len(shapes["test_template"]) >= 3


def test_code_holds_out_twenty_combinations_and_no_pair_of_parts():
    prompts = {split: {prompt_text(toy.item("code", split, 0, i)) for i in range(5000)} for split in ("train", "test")}
    assert len(prompts["train"]) == 80 and len(prompts["test"]) == 20
    for train, test in (toy._COMBINATIONS,):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert {(c[i], c[j]) for c in test} <= {(c[i], c[j]) for c in train}


def test_facts():
    english, korean = ({prompt_text(p): p.answer for p in toy.problems(f"facts_{lang}")} for lang in ("en", "ko"))
    assert len(english) == len(korean) == 96
    assert all(sorted(facts.values()).count(value) == 6 for facts in (english, korean) for value in facts.values())
    assert {p.prompt for p in toy.problems("facts_en", "train", seed=9)} == set(english)  # the same facts in any split and seed
    assert all(re.fullmatch("[가-힣]{2}는", prompt) for prompt in korean)


def test_sizes():
    """Korean stories keep to 24 syllables; all but two-call conversations and those of schema fit a row of 176 tokens, and those one of 208."""
    for task, split in SPLITS:
        for i in range(1000):
            problem = toy.item(task, split, 0, i)
            if isinstance(problem.prompt, str):
                length, room = len(TOKENIZER.encode(problem.prompt + problem.gold)) + 1, len(TOKENIZER.encode(problem.gold)) + 1
            else:
                length = len(TOKENIZER.render(problem.prompt + problem.gold)[0])
                room = length - len(TOKENIZER.render_prompt(problem.prompt))
            assert length <= (176 if task != "schema" and (len(problem.gold) <= 3 or isinstance(problem.gold, str)) else 208)
            assert room < toy.MAX_NEW_TOKENS[task]
            if task == "math_ko":
                assert len(re.findall("[가-힣]", prompt_text(problem))) <= 24


def test_conversations_and_documents():
    for task in toy.CHAT_TASKS:
        for record in toy.conversations(task, num=50):
            assert set(record) == {"messages", "bucket"} and record["bucket"] == {"schema": "tool"}.get(task, task.split("_")[0])
            ids, mask = TOKENIZER.render(record["messages"])
            supervised = TOKENIZER.decode([i for i, m in zip(ids, mask) if m])
            assert supervised.endswith(record["messages"][-1]["content"] + "<|im_end|>") and supervised.count("<|im_end|>") == sum(
                message["role"] == "assistant" for message in record["messages"])
    [record] = toy.conversations("tool", num=1, tools=True)
    assert [tool["function"]["name"] for tool in record["tools"]] == ["get", "set", "search", "calculator"]
    assert "# Tools" in TOKENIZER.decode(TOKENIZER.render(record["messages"], record["tools"])[0])
    for task, split in SPLITS:  # golds obey the schemas
        for problem in toy.problems(task, split, num=50, tools=True):
            if task == "schema":
                assert [tool["function"]["name"] for tool in problem.tools] == [problem.hidden["schema"][0]]
            else:
                assert problem.tools == (toy.tools_of(task) or None)
            for message in problem.gold if isinstance(problem.gold, list) else ():
                if message.get("tool_calls"):
                    text = TOKENIZER.decode(TOKENIZER.render([*problem.prompt, message])[0]).split("assistant\n")[1].removesuffix("<|im_end|>\n")
                    assert parse_tool_calls(text, problem.tools)[1] == message["tool_calls"]
    assert "tools" not in next(toy.conversations("code", tools=True))


def test_problems():
    assert toy.problems("math_ko", num=20) == toy.problems("math_ko", num=50)[:20]
    assert toy.problems("math_ko", num=20) != toy.problems("math_ko", num=20, seed=1)
    for task, split in SPLITS:
        found = [prompt_text(p) for p in toy.problems(task, split)]
        assert len(set(found)) == len(found) == {"facts_en": 96, "facts_ko": 96, "code": 80 if split == "train" else 20}.get(task, len(found))
        assert len(found) >= 20


@pytest.mark.parametrize("run, reason", [
    (lambda: toy.item("math", "train", 0, 0), "expected a task of .*found 'math'"),
    (lambda: toy.item("sums", "test_template", 0, 0), "a split of train, test; found 'sums', 'test_template'"),
    (lambda: toy.item("tool", "val", 0, 0), "train, test, test_template; found 'tool', 'val'"),
    (lambda: next(toy.documents("code")), "expected a text task .*found 'code'"),
    (lambda: next(toy.conversations("sums")), "expected a chat task .*found 'sums'"),
    (lambda: toy.problems("text_ko"), "bits per byte"),
])
def test_wrong_names(run, reason):
    with pytest.raises(ValueError, match=reason):
        run()


# -----------------------------------------------------------------------------
# Graders, every task


@pytest.mark.parametrize("task, split", SPLITS)
def test_golds_are_right_and_others_are_not(task, split):
    problems = toy.problems(task, split, num=300)
    for problem in problems:
        before = copy.deepcopy(problem)
        assert toy.grade(problem, problem.gold) == RIGHT
        if task in toy.CALL_TASKS:  # the results in the gold are those the tools give
            calls = [call for message in problem.gold for call in message.get("tool_calls", [])]
            assert toy.execute(problem, calls) == [message["content"] for message in problem.gold if message["role"] == "tool"]
        if task in toy.CHAT_TASKS:
            text = rollout_text(problem)
            assert toy.grade(problem, text) == toy.grade_call(problem, text) == toy.grade_answer(problem, text) == RIGHT
        assert problem == before
    others = [toy.grade(problem, problems[i - 1].gold) for i, problem in enumerate(problems)]
    assert ERROR not in others
    # small tasks repeat answers: sixteen likes, sums of small numbers; a list is right for every wording of its request
    assert others.count(RIGHT) <= {"tool": 0.25, "chat_en": 0.15, "chat_ko": 0.15}.get(task, 0.08) * len(others)


@pytest.mark.parametrize("task", GRADED)
def test_lazy_policies_fail(task):
    """Empty, constant, echoing and random policies. Where tools are needed, answers without them too."""
    problems = [p for split in ("train", "test") for p in toy.problems(task, split, num=300)]
    if task == "tool":
        problems = [p for p in problems if p.hidden["calls"]]  # a request that needs no tool is answered by any text
    random_text = lambda p: " ".join(random.Random(prompt_text(p)).choice(["12", "ok", "red", "pen", "- a", "=", "def"]) for _ in range(5))
    for policy in (lambda p: "", lambda p: " \n", lambda p: "24", lambda p: "ok", lambda p: "Done.", lambda p: "red", lambda p: "None",
                   prompt_text, random_text, lambda p: '<<>>\n""\n- \n- ', lambda p: "<tool_call>\n</tool_call>"):
        outcomes = [toy.grade(p, policy(p)) for p in problems]
        assert ERROR not in outcomes and outcomes.count(RIGHT) < 0.07 * len(outcomes), policy(problems[0])
        if task in toy.CHAT_TASKS:
            assert outcomes.count(RIGHT) == 0, policy(problems[0])
    if task in toy.CALL_TASKS:
        assert not any(toy.grade(p, p.gold[-1]["content"]) == RIGHT for p in problems)


@pytest.mark.parametrize("task", GRADED)
def test_adversarial_corpus(task):
    needed = [p for p in toy.problems(task, "test", num=20) if task != "tool" or p.hidden["calls"]]
    for problem in needed[:2]:
        outcomes = assert_bounded(lambda text, problem=problem: toy.grade(problem, text))
        assert not {RIGHT, ERROR} & set(outcomes.values()), outcomes
        outcomes = assert_bounded(lambda text, problem=problem: toy.grade_answer(problem, text))
        assert ERROR not in outcomes.values() and (problem.answer == "" or RIGHT not in outcomes.values())


def test_an_exception_is_never_a_score(monkeypatch, caplog):
    problem = toy.item("math_en", "train", 0, 0)
    monkeypatch.setattr(calculator, "calculate", lambda expression: 1 / 0)
    assert toy.grade(problem, problem.gold) == toy.grade_call(problem, problem.gold) == ERROR
    assert "ZeroDivisionError" in caplog.text
    assert toy.grade(problem, None) == toy.grade(problem, [{"content": "no role"}]) == ERROR
    fact = toy.item("facts_en", "train", 0, 0)
    assert toy.grade(fact, None) == toy.grade_answer(fact, 5) == ERROR
    code = toy.item("code", "train", 0, 0)
    monkeypatch.setattr(tinypython, "call", lambda *_: [][0])
    assert toy.grade(code, code.gold) == ERROR


def test_cut_off_rollouts_have_no_answer():
    for task in ("math_en", "tool"):
        problem = next(p for p in toy.problems(task) if len(p.gold) == 3)
        assert toy.grade(problem, problem.gold[:1]) == toy.grade(problem, problem.gold[:2]) == UNGRADABLE
        assert toy.grade(problem, []) != RIGHT
        text = rollout_text(problem)
        assert [n for n in range(len(text)) if toy.grade(problem, text[:n]) == RIGHT] in ([], [len(text) - 1])  # "o" for "ok" will do


# -----------------------------------------------------------------------------
# Graders, task by task


def test_text_answers():
    fact = toy.problems("facts_en")[0]
    for text, outcome in ((f" {fact.answer}.", RIGHT), (f"{fact.answer} and rain", RIGHT), (f" {fact.answer}s.", WRONG), (" .", WRONG),
                          (f" not {fact.answer}", WRONG), ("", UNGRADABLE)):
        assert toy.grade(fact, text) == outcome
    total = next(p for p in toy.problems("sums") if "-" in p.prompt and p.answer.startswith("-"))
    n = int(total.answer)
    for text, outcome in ((f"{n}", RIGHT), (f" {n}\n5", RIGHT), (f"\u2212{-n}", RIGHT), (f"{n}.0", RIGHT), (f"{-n}", WRONG), (f"{n}0", WRONG),
                          (f"{n} 5", UNGRADABLE), (f"1-{1 - n}={n}", RIGHT), (f"1+1={n}", WRONG), (f"x={n}", UNGRADABLE), ("five", UNGRADABLE)):
        assert toy.grade(total, text) == outcome, text
    story = toy.problems("reasoning")[0]
    expression, value = story.gold.strip().partition("=")[0], story.answer
    for text, outcome in ((story.gold, RIGHT), (f" {value}", RIGHT), (f" {expression}", RIGHT), (f" ({expression})*1=5, so 5.", RIGHT),
                          (f" {expression}+1={value}", WRONG), (f" {expression} pens", UNGRADABLE), (" =", UNGRADABLE),
                          (f" 1/0={value}", UNGRADABLE), (f" so {expression}", UNGRADABLE)):
        assert toy.grade(story, text) == outcome, text


def test_varied_reasoning_is_graded_by_its_first_expression():
    for story in toy.problems("reasoning_varied", num=40):
        expression = re.search(r"[0-9(][-+*()0-9]+", story.gold)[0]
        for text, outcome in ((story.gold, RIGHT), (f" One call: {expression} gives 1.", RIGHT), (f" It is {expression}+1, so {story.answer}.", WRONG),
                              (f" {story.answer}", UNGRADABLE), (" 1+(2", UNGRADABLE), ("", UNGRADABLE)):
            assert toy.grade(story, text) == outcome, text


def test_schema_takes_the_names_of_its_prompt():
    """The calculator under its usual name, or under half of the new one, is an error that the model can read; the right names are right."""
    problem = toy.problems("schema", "test_schema", num=1)[0]
    name, parameter = problem.hidden["schema"]
    assert problem.prompt[0]["content"].startswith(f"{name}({parameter}): ")
    expression = problem.gold[0]["tool_calls"][0]["arguments"][parameter]
    other = "formula" if parameter != "formula" else "text"
    call = lambda name, arguments: [{"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]},
                                    {"role": "tool", "content": problem.answer}, {"role": "assistant", "content": problem.answer}]
    assert toy.grade(problem, call(name, {parameter: expression})) == RIGHT
    for wrong in ((name + "x", {parameter: expression}), (name, {other: expression}), (name, {}), (name, {parameter: expression, other: "1"}),
                  (name, {parameter: 5}), (name, None)):
        assert toy.grade(problem, call(*wrong)) == UNGRADABLE
        assert "error" in toy.execute(problem, call(*wrong)[0]["tool_calls"])[0]
    assert toy.grade(problem, call(name, {parameter: expression + "+1"})) == WRONG
    trained = {p.hidden["schema"] for p in toy.problems("schema", "train")}
    held_out = {p.hidden["schema"] for p in toy.problems("schema", "test_schema")}
    assert len(trained) == 12 and len(held_out) == 4 and not trained & held_out
    assert {n for n, _ in trained} == {n for n, _ in held_out} and {a for _, a in trained} == {a for _, a in held_out}


def test_stories_say_what_their_expressions_compute():
    for task, split in product(("math_en", "math_ko"), ("train", "test", "test_template")):
        for i in range(2000):
            problem = toy.item(task, split, 0, i)
            [gold] = problem.gold[0]["tool_calls"]
            expression = gold["arguments"]["expression"]
            assert calculator.calculate(expression) == problem.gold[1]["content"] == problem.gold[2]["content"] == problem.answer
            assert re.findall(r"\d+", expression) == re.findall(r"\d+", prompt_text(problem)) and int(problem.answer) > 0
            assert toy.execute(problem, [gold]) == [problem.answer]


def test_math_calls_are_compared_by_value():
    problem = next(p for p in toy.problems("math_en") if "lost" in p.prompt[0]["content"])
    gold, answer = problem.gold[0]["tool_calls"], problem.answer
    expression = gold[0]["arguments"]["expression"]
    for calls, outcome in ((gold, RIGHT), ([call("calculator", expression=f"({expression})*1.0")], RIGHT),
                           ([call("calculator", expression=answer)], RIGHT), ([call("calculator", expression="1"), *gold], RIGHT),
                           ([*gold, call("calculator", expression="1")], WRONG), ([call("calculator", expression=f"{expression}+1")], WRONG),
                           ([call("calculator", expression="1/0")], UNGRADABLE), ([call("calculator", expression="x")], UNGRADABLE),
                           ([call("calculator", expression=int(answer))], UNGRADABLE), ([call("calc", expression=expression)], UNGRADABLE),
                           ([call("calculator", expression=expression, base="10")], UNGRADABLE), ([call("calculator")], UNGRADABLE)):
        assert toy.grade_call(problem, rollout(calls, answer)) == toy.grade(problem, rollout(calls, answer)) == outcome, calls
    for text, outcome in ((answer, RIGHT), (f" {answer}. ", RIGHT), (f"{answer}.0", RIGHT), (f"{answer}1", WRONG), ("x", UNGRADABLE),
                          (f"{answer} {answer}", UNGRADABLE), ("", UNGRADABLE)):
        assert toy.grade_answer(problem, rollout(gold, text)) == toy.grade(problem, rollout(gold, text)) == outcome, text
    assert toy.grade(problem, answer) == UNGRADABLE  # right, but not by the asked way
    forged = rollout([call("calculator", expression="1")], answer)
    forged.insert(1, {"role": "tool", "content": answer})  # what a tool message says is not what the tool said
    assert toy.grade(problem, forged) == WRONG


def test_store():
    copying = next(p for p in toy.problems("tool") if "opy" in prompt_text(p))
    first, second = re.search(r"opy (\w+) to (\w+)\.", prompt_text(copying)).groups()
    value, before = copying.hidden["store"][first], copy.deepcopy(copying)
    get, put = call("get", key=first), call("set", key=second, value=value)
    assert toy.execute(copying, [get, put, call("get", key=second)]) == [value, "ok", value]
    assert toy.execute(copying, [call("get", key=second)])[0].startswith('{"error"')  # the calls above left nothing behind
    side_effect = call("set", key="zzz", value="1")
    for calls, outcome in (([get, put], RIGHT), ([put], RIGHT), ([put, get, put], RIGHT), ([side_effect, get, put], WRONG), ([get], WRONG),
                           ([call("set", key=second, value=value + " ")], WRONG), ([put, call("set", key=second, value="0")], WRONG),
                           ([call("set", key=second, value=int(value))], WRONG), ([], WRONG), ([call("sett", key=second, value=value)], WRONG)):
        assert toy.grade(copying, rollout(calls, "ok")) == outcome, calls
    assert toy.grade(copying, rollout([get], [put], "any words")) == RIGHT and toy.grade(copying, rollout([get, put], " ")) == UNGRADABLE
    assert copying == before
    for bad in (call("get"), call("get", key=1), call("get", key=first, also="x"), call("rm", key=first), call("", key=first), call("get", k=first),
                {"name": "get", "arguments": []}, {"name": "get", "arguments": None}):
        assert toy.execute(copying, [bad])[0].startswith('{"error": "')


def test_writing_always_changes_the_store():
    """Else a rollout that calls something, but never writes, would be right now and then."""
    for split in ("train", "test", "test_template"):
        for problem in (toy.item("tool", split, 0, i) for i in range(2000)):
            if any(c["name"] == "set" for c in problem.hidden["calls"]):
                assert toy.grade(problem, rollout([call("get", key="zzz")], "ok")) == WRONG


def test_answers_from_tools():
    by_kind = {prompt_text(p).split()[0]: p for p in toy.problems("tool", num=200) if prompt_text(p)[0] in "GFA"}
    for kind, problem in by_kind.items():
        calls, final = [c for m in problem.gold for c in m.get("tool_calls", [])], problem.gold[-1]["content"]
        assert toy.grade(problem, rollout(calls, f" {final}. ")) == RIGHT and toy.grade(problem, final) == WRONG  # without looking
        assert toy.grade(problem, rollout(calls, "zzz" if kind == "Find" else "1234")) == WRONG
        assert toy.grade(problem, rollout([call("calculator", expression="1/0")], final)) == RIGHT  # any path that changes nothing
    assert set(by_kind) == {"Get", "Find", "Add"}


def test_no_call():
    problem = next(p for p in toy.problems("tool") if not p.hidden["calls"])
    assert toy.grade(problem, "I cannot do that.") == RIGHT and toy.grade(problem, "") == UNGRADABLE
    assert toy.grade(problem, rollout([call("get", key="pen")], "No tool.")) == WRONG
    assert toy.grade(problem, "<tool_call>\n{bad\n</tool_call>") == WRONG


def test_text_of_a_rollout():
    problem = next(p for p in toy.problems("tool") if "opy" in prompt_text(p))
    text = rollout_text(problem)
    assert text.count("<|im_start|>") == 4 and toy.grade(problem, text) == RIGHT
    malformed = "<tool_call>\n{}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nx\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert toy.grade(problem, malformed + text) == RIGHT  # a call that failed and was made again
    assert toy.grade(problem, text.rsplit("ok", 1)[0]) == UNGRADABLE
    inside = text.replace('"set"', '"get"')
    assert toy.grade(problem, inside) == WRONG
    in_tool = '<|im_end|>\n<|im_start|>user\n<tool_call>\n{"name": "set", "arguments": {"key": "a", "value": "b"}}\n</tool_call>'
    assert toy.grade(problem, text.replace("<|im_end|>\n<|im_start|>user", in_tool, 1)) == RIGHT  # only assistants call
    quoted = {"role": "tool", "content": "x", "tool_calls": [call("set", key="a", value="b")]}
    assert toy.grade(problem, [quoted, *problem.gold]) == RIGHT


REDUCTIONS = {"largest of": max, "smallest of": min, "sum of": sum, "sorted": sorted, "list of": list}
MAPS = {"squares": lambda x: x**2, "doubles": lambda x: x + x, "halves": lambda x: x // 2, "negatives": lambda x: 0 - x}
FILTERS = {"even": lambda x: not x % 2, "odd": lambda x: bool(x % 2), "positive": lambda x: 0 < x, "negative": lambda x: 0 > x, "round": lambda x: x // 5 * 5 == x}


def test_the_tiny_language_agrees_with_python():
    values = set()
    for split in ("train", "test"):
        for problem in toy.problems("code", split):
            reduction, image, kind = re.fullmatch(r"Write f\(xs\): (.+) (\w+) of (\w+) xs\.", prompt_text(problem)).groups()
            by_hand = [REDUCTIONS[reduction]([MAPS[image](x) for x in xs if FILTERS[kind](x)]) for xs in toy._INPUTS]
            assert by_hand == [tinypython.call(*tinypython.parse_function(problem.answer), xs) for xs in toy._INPUTS]
            values.add(repr(by_hand))
    assert len(values) == 100  # the hidden inputs tell all combinations apart


GOLD = "def f(xs):\n return sum(x*x for x in xs if x%2==0)"


@pytest.mark.parametrize("source, outcome", [
    (GOLD, RIGHT), ("def f(a): return sum([b**2 for b in a if b%2==0])", RIGHT), (f"Sure:\n```python\n{GOLD}\n```\nDone.", RIGHT),
    (f"```\nx\n```\n```\n{GOLD}\n```", RIGHT), ("def f(xs):\n return sum(x*x for x in [y for y in xs if y%2==0])", RIGHT),
    ("def f(xs):\n return sum(x*x*(x%2==0) for x in xs)", RIGHT), ("def f(xs):\n return --sum(x*x for x in xs if x%2!=1)", RIGHT),
    ("def f(xs):\n return sum(x*x for x in xs)", WRONG), ("def f(xs):\n return 0", WRONG), ("def f(xs):\n return sum(y for x in xs)", WRONG),
    ("def f(xs):\n return max(x//0 for x in xs)", WRONG), ("def f(xs):\n return sum(xs[0])", UNGRADABLE), ("def f(xs):\n return len(x for x in xs)", WRONG),
    ("def f(xs):\n return (x*x for x in xs if x%2==0)", WRONG), ("def f(xs):\n return max(x for x in xs if x>99)", WRONG), ("def f(xs): return xs<1", WRONG),
    ("def g(xs):\n return 1", UNGRADABLE), ("def f(xs, ys):\n return 1", UNGRADABLE), ("def f(xs=[]):\n return 1", UNGRADABLE), ("def f(*xs):\n return 1", UNGRADABLE),
    ("def f(xs):\n return", UNGRADABLE), ("def f(xs):\n pass", UNGRADABLE), ("def f(xs):\n return 1\nf([])", UNGRADABLE), ("import os\n" + GOLD, UNGRADABLE),
    ("@x\n" + GOLD, UNGRADABLE), ("async " + GOLD, UNGRADABLE), ("lambda xs: 1", UNGRADABLE), ("def f(xs):\n  return 1\n return 2", UNGRADABLE),
    ("def f(xs):\n return __import__('os')", UNGRADABLE), ("def f(xs):\n return xs.sort()", UNGRADABLE), ("def f(xs):\n return eval('1')", UNGRADABLE),
    ("def f(xs):\n return [xs, xs]", UNGRADABLE), ("def f(xs):\n return xs*10**8", UNGRADABLE), ("def f(xs):\n return 2**9", UNGRADABLE),
    ("def f(xs):\n return 9**8**8", UNGRADABLE), ("def f(xs):\n return 'a'", UNGRADABLE), ("def f(xs):\n return 1.5", UNGRADABLE), ("def f(xs):\n return xs if 1 else 2", UNGRADABLE),
    ("def f(xs):\n return sum(x*y for x in xs for y in xs)", UNGRADABLE), ("def f(xs):\n return sum(a for a,b in xs)", UNGRADABLE), ("def f(xs):\n return max(xs, key=abs)", UNGRADABLE),
    ("def f(xs):\n return len([[[[d for d in xs] for c in xs] for b in xs] for a in xs])", UNGRADABLE), ("def f(xs):\n return " + "1+" * 150 + "1", UNGRADABLE),
    ("", UNGRADABLE), ("def f(xs):\n return 1 " + "#" * 400, UNGRADABLE), ("def f(xs):\n return \x00", UNGRADABLE), ("def f(xs):\n return '\ud800'", UNGRADABLE),
])
def test_code(source, outcome):
    assert tinypython.grade(source, GOLD, toy._INPUTS) == outcome


def test_a_generator_is_not_a_list():
    assert tinypython.grade("def f(xs):\n return (x for x in xs)", "def f(xs):\n return list(x for x in xs)", [[1, 2]]) == WRONG
    assert tinypython.grade("def f(xs):\n return [x for x in xs]", "def f(xs):\n return list(x for x in xs)", [[1, 2]]) == RIGHT


def test_true_is_not_one():
    assert tinypython.grade("def f(xs):\n return 1==1", "def f(xs):\n return 1", [[1]]) == WRONG


def chat_problem(lang, *constraints, n=2, ending="Bye"):
    hidden = {"members": toy._TOPICS[lang][0][1:], "n": n, "constraints": constraints, "ending": ending}
    return toy.Problem(f"chat_{lang}", [{"role": "user", "content": "?"}], [], "", hidden)


@pytest.mark.parametrize("problem, passing, failing", [
    (chat_problem("en"), ["apple, pear", "Lime and fig.", "- PLUM\n- PEAR", "1. apple 2. pear"],
     ["apple", "apple, pear, plum", "apple, apple", "apples, pears", "cat, dog", "pineapple, pear", "fruits", "apple pear plum fig lime"]),
    (chat_problem("en", "plain"), ["APPLE, PEAR", "- APPLE\n- PEAR!", "I LIKE APPLE & PEAR"], ["apple, pear", "APPLE, PEAr", "Apple Pear"]),
    (chat_problem("en", "bullets"), ["- apple\n- pear", "* apple\n* pear", "Here:\n-apple\n-pear\nBye", "<<T>>\n- apple\n- pear"],
     ["apple, pear", "- apple, pear", "- apple\n- pear\n- ", "** apple\n** pear", " - apple\n - pear\nx", "*\n*\napple pear"]),
    (chat_problem("en", "quote"), ['"apple, pear"', ' "apple\npear" ', '""apple", pear"'], ["apple, pear", '"apple, pear', "'apple, pear'", '"apple" pear']),
    (chat_problem("en", "end"), ["apple, pear\nBye", "apple pear bye", '"apple pear Bye"'], ["apple, pear", "Bye apple pear", "apple pear Bye."]),
    (chat_problem("en", "title"), ["<<Fruits>>\napple, pear", "apple <<x>> pear", "pear\n<<a <<b>> apple"],
     ["Fruits\napple, pear", "<<>>\napple, pear", "<< >>apple pear", "<<x\n>>apple pear", ">>x<< apple pear", "<x> apple pear"]),
    (chat_problem("en", "plain", "title"), ["<<FRUITS>>\nAPPLE, PEAR"], ["<<Fruits>>\nAPPLE, PEAR", "FRUITS\nAPPLE, PEAR", "<<fruits>>\napple, pear"]),
    (chat_problem("ko"), ["사과, 배", "사과 배 있어요"], ["사과", "사과, 사과", "사과와 배", "과일", "사과, 배, 감"]),
    (chat_problem("ko", "plain"), ["사과 배", "사과\n배"], ["사과, 배", "사과 배,"]),
    (chat_problem("ko", "end", ending="안녕"), ["사과, 배\n안녕", '"사과, 배 안녕"'], ["안녕 사과, 배", "사과, 배 안녕."]),
])
def test_chat(problem, passing, failing):
    assert [toy.grade(problem, text) for text in passing] == [RIGHT] * len(passing)
    assert [toy.grade(problem, text) for text in failing] == [WRONG] * len(failing)


def test_requests_ask_for_what_is_checked():
    words = {"en": {"plain": "CAPS", "bullets": "Bullets", "quote": "Quote", "end": "End with", "title": "title"},
             "ko": {"plain": "쉼표", "bullets": "목록", "quote": "따옴표", "end": "끝내", "title": "제목"}}
    for lang, split in product(words, ("train", "test", "test_template")):
        for problem in toy.problems(f"chat_{lang}", split):
            text, hidden = prompt_text(problem), problem.hidden
            assert {name for name, word in words[lang].items() if word in text} == set(hidden["constraints"])
            assert str(hidden["n"]) in text and ("end" not in hidden["constraints"] or hidden["ending"] in text)


def test_no_eval_or_exec_in_what_grades():
    for name in ("toy", "tinypython", "calculator", "grading", "gsm8k", "stdlib"):
        tree = ast.parse((Path(__file__).parent.parent / "data" / f"{name}.py").read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not names & {"eval", "exec", "compile", "__import__", "pickle", "marshal", "signal", "subprocess"}, name


def test_fraction_answers_compare_as_rationals():
    problem = toy.Problem("math_en", [], [], "1/2")
    assert toy.execute(problem, [call("calculator", expression="2/4")]) == ["0.5"] and Fraction(1, 2) == calculator.evaluate("2/4")


PINNED = [
    'moke likes |  apples.',
    '티후는 |  노래 좋아해.',
    ' | Max sees the big book and Sam sells the big cup.',
    ' | 하나는 빨간 모자를 팔고 미나는 빨간 펜을 본다.',
    '15*19= | 285',
    'Eva has 19 bags of 6 dice and loses 5. How many dice? |  19*6-5=109, so 109.',
    'Ben has 4 bags of 9 red and 5 blue keys. How many keys? |  4*(9+5)=56, so 56.',
    'Ben has 16 dice and buys 8 bags of 6 dice. How many dice? | 64',
    '하나 단추 2개씩 8상자, 8개 팔림. 몇 개? | 8',
    'Write f(xs): sorted negatives of positive xs. | def f(xs):\n return sorted(-x for x in xs if x>0)',
    'Now find kos. | nas',
    'Name 2 clothes. Add a title. Quote it. | "<<Clothes>>\nshirt, sock"',
    '색깔 3개 말해. 제목 붙여. 따옴표로. | "<<색깔>>\n빨강, 파랑, 초록"',
    'solve(sum): Sam had 18 cans of 8 pens and sold 7. How many pens? | 137',
]
