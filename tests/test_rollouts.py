"""Rollouts with tools: what is sampled, executed, kept as tokens and as messages, and graded."""
import json
import threading
import time
from dataclasses import dataclass, replace

import pytest

import rollouts
from data import episodes, toy
from data.grading import Outcome, Problem
from engine import Rollout, generate
from model import Transformer, config_for_size
from tokenizer import Tag, Tokenizer

TOKENIZER = Tokenizer.bytes()


def call(expression, name="calculator"):
    return [Tag("<tool_call>"), "\n" + json.dumps({"name": name, "arguments": {"expression": expression}}) + "\n", Tag("</tool_call>")]


@dataclass
class Scripted:
    """Stands in for engine.generate: plays turns that are given, as a model would have sampled them."""
    turns: dict

    def __call__(self, model, tokenizer, prompts, *, tools=None, max_new_tokens, **options):
        groups = []
        for i in range(len(prompts)):
            r = Rollout(finish_reason="stop")
            for turn in self.turns[i]:
                ids = tokenizer._encode_parts(turn) + [tokenizer.end_of_turn_id]
                r.ids += ids
                r.mask += [1] * len(ids)
                more = tools(i, 0, ids)
                if more is None:
                    break
                r.ids += more
                r.mask += [0] * len(more)
            groups.append([r])
        return groups


def test_a_rollout_with_a_call_is_executed_and_graded(monkeypatch):
    """Right call and answer; right call, wrong answer; wrong call; a call that cannot be parsed, with the parser's message as result."""
    problem = toy.problems("math_en", num=1)[0]
    expression = problem.gold[0]["tool_calls"][0]["arguments"]["expression"]
    turns = {0: [call(expression), [problem.answer]], 1: [call(expression), ["7654321"]], 2: [call("1+1"), ["2"]],
             3: [[Tag("<tool_call>"), "\n{\n", Tag("</tool_call>")], ["5"]]}
    monkeypatch.setattr(rollouts, "generate", Scripted(turns))
    played = [group[0] for group in rollouts.play(None, TOKENIZER, [problem] * 4)]
    assert [str(p.outcome) for p in played] == ["right", "wrong", "wrong", "ungradable"]
    assert [toy.grade_call(problem, p.messages) == "right" for p in played] == [True, True, False, False]
    assert played[0].messages[1] == {"role": "tool", "content": problem.answer} and "error" in played[3].messages[1]["content"]
    assert rollouts.in_words(played[0].messages) == f"calculator({expression}) -> {problem.answer} {problem.answer}"


def test_tokens_are_the_sampler_s_and_the_mask_is_what_was_sampled(monkeypatch):
    """Prompt + ids decode to the conversation as the renderer writes it; tool results and headers carry mask 0, words and calls 1."""
    problem = toy.problems("math_en", num=1)[0]
    expression = problem.gold[0]["tool_calls"][0]["arguments"]["expression"]
    monkeypatch.setattr(rollouts, "generate", Scripted({0: [call(expression), [problem.answer]]}))
    (played,), = rollouts.play(None, TOKENIZER, [problem])
    ids = TOKENIZER.render_prompt(problem.prompt) + played.rollout.ids
    expected, mask = TOKENIZER.render(problem.prompt + played.messages)
    expected, mask = expected[:len(ids)], mask[:len(ids)]               # the renderer also writes the newline after the last turn
    assert ids == expected and mask[-len(played.rollout.mask):] == played.rollout.mask
    sampled = TOKENIZER.decode([i for i, m in zip(played.rollout.ids, played.rollout.mask) if m])
    assert "tool_response" not in sampled and expression in sampled and sampled.count("<|im_end|>") == 2


def test_an_unfinished_rollout_ends_in_its_unfinished_turn(monkeypatch):
    """Out of room right after a call: the call is in the messages once, with its result, and nothing is graded right."""
    problem = toy.problems("math_en", num=1)[0]

    def cut(model, tokenizer, prompts, *, tools, **options):
        ids = tokenizer._encode_parts(call("1+1")) + [tokenizer.end_of_turn_id]
        tools(0, 0, ids)
        partial = tokenizer.encode("the ans")
        return [[Rollout(ids=ids, logps=[0.0] * len(ids), mask=[1] * len(ids), finish_reason="length")],
                [Rollout(ids=partial, logps=[0.0] * len(partial), mask=[1] * len(partial), finish_reason="length")]]
    monkeypatch.setattr(rollouts, "generate", cut)
    (a,), (b,) = rollouts.play(None, TOKENIZER, [problem, problem])
    assert [m["role"] for m in a.messages] == ["assistant", "tool"] and a.outcome != Outcome.RIGHT
    assert b.messages == [{"role": "assistant", "content": "the ans"}]


# -----------------------------------------------------------------------------
# Calls beside decoding


class Talks:
    """A tokenizer whose end of turn is likely, so that a random model makes many calls."""
    vocab_size, end_of_text_id = TOKENIZER.vocab_size, None
    end_of_turn_id = 65

    def decode(self, ids):
        return ""


@pytest.fixture(scope="module")
def model():
    return Transformer(config_for_size("nano", TOKENIZER.vocab_size)).init_weights(0)


PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]


def several(model, tools, **options):
    return generate(model, Talks(), PROMPTS, num_samples=4, max_new_tokens=200, seed=3, stop_ids={65, 66, 67}, tools=tools, **options)


def test_slow_calls_change_nothing_but_the_time(model):
    """Ids are those of instant tools, whatever the order in which results come back, and calls of different samples overlap."""
    results = lambda prompt, sample, ids: [70 + sample] * (1 + len(ids) % 3)
    instant = several(model, results)
    assert sum(0 in r.mask for group in instant for r in group) >= 4, "too few calls: the test would prove nothing"
    lock, now, most = threading.Lock(), [0], [0]

    def slow(prompt, sample, ids):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02 * (1 + (prompt + sample) % 3))
        with lock:
            now[0] -= 1
        return results(prompt, sample, ids)
    late = several(model, slow)
    assert [[r.ids for r in g] for g in late] == [[r.ids for r in g] for g in instant]
    assert [[r.mask for r in g] for g in late] == [[r.mask for r in g] for g in instant]
    assert most[0] > 1


def test_a_call_that_hangs_ends_its_own_rollout_only(model):
    healthy = several(model, lambda prompt, sample, ids: [70])
    hanging = next((i, j) for i, group in enumerate(healthy) for j, r in enumerate(group) if 0 in r.mask)
    release = threading.Event()
    groups = several(model, lambda *where: release.wait() and None if where[:2] == hanging else [70], tool_timeout=0.5)
    release.set()
    for i, group in enumerate(groups):
        for j, r in enumerate(group):
            if (i, j) == hanging:
                assert r.finish_reason == "tool_timeout" and r.ids == healthy[i][j].ids[:len(r.ids)] and 0 not in r.mask
            else:
                assert (r.ids, r.finish_reason) == (healthy[i][j].ids, healthy[i][j].finish_reason)


def test_what_a_tool_raises_is_not_swallowed(model):
    def broken(prompt, sample, ids):
        raise ZeroDivisionError("in the tool")
    with pytest.raises(ZeroDivisionError, match="in the tool"):
        several(model, broken)


# -----------------------------------------------------------------------------
# Sampling to files


def test_samples_do_not_depend_on_ranks_and_files_are_not_made_twice(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "CHUNK", 3)
    problems = [replace(p, prompt=p.prompt) for p in toy.problems("math_en", num=7)]
    options = dict(num_samples=2, temperature=1.0, seed=5)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    files = rollouts.sample_to_files(model, TOKENIZER, problems, tmp_path / "one", 0, 1, **options)
    for rank in (1, 0):
        rollouts.sample_to_files(model, TOKENIZER, problems, tmp_path / "two", rank, 2, **options)
    assert [f.name for f in files] == ["sampled_000000.jsonl", "sampled_000003.jsonl", "sampled_000006.jsonl"]
    assert all(f.read_bytes() == (tmp_path / "two" / f.name).read_bytes() for f in files)
    lines = [json.loads(line) for f in files for line in f.read_text().split("\n") if line]
    assert [(r["problem"], r["sample"]) for r in lines] == [(i, j) for i in range(7) for j in range(2)]
    files[0].unlink()
    before = files[1].stat().st_mtime_ns
    again = rollouts.sample_to_files(model, TOKENIZER, problems, tmp_path / "one", 0, 1, **options)
    assert again[1].stat().st_mtime_ns == before and again[0].read_bytes() == (tmp_path / "two" / files[0].name).read_bytes()


def test_what_the_evaluation_asks_too_is_left_out():
    ask = lambda text: Problem("math_en", [{"role": "user", "content": text}], [], "")
    long = "a b c d e f g h i j k l m"
    for pool, held_out, stays in (("one two", "one two three", True), ("x " + long[:-2], long[:-2] + " y", True), ("One  two", "one two", False),
                                  ("x " + long, long + " y", False)):             # the second: twelve words in common
        assert rollouts.without_overlap([ask(pool)], [ask(held_out)]) == [ask(pool)] * stays
    form = [ask(f"{i} {long}") for i in range(3)]                                  # words that three problems share are form
    assert rollouts.without_overlap(form, [ask("7 " + long)]) == form and rollouts.without_overlap(form, [ask("1 " + long)]) == [form[0], form[2]]


def test_no_problems():
    assert rollouts.play(None, TOKENIZER, []) == []


# -----------------------------------------------------------------------------
# Episodes of the tool environment


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5, 6])
def test_a_gold_episode_is_right_and_its_tokens_are_the_renderer_s(level, monkeypatch):
    """Gold turns as a model would have sampled them, through the parser, the tools and the scripted user: right, and token for token the
    conversation that the renderer writes; tool results and the user's turns carry mask 0."""
    problems = [p for p in episodes.problems(level, num=12, families=[f for f in episodes.FAMILIES if f != "python"])]
    turns = {}
    for i, problem in enumerate(problems):
        turns[i] = []
        for message in problem.gold:
            if message["role"] == "assistant":
                parts = [message["content"]] if message["content"] else []
                for call in message.get("tool_calls", []):
                    parts += ["\n"] if parts else []
                    parts += [Tag("<tool_call>"), "\n" + json.dumps(call, ensure_ascii=False) + "\n", Tag("</tool_call>")]
                turns[i].append(parts)
    monkeypatch.setattr(rollouts, "generate", Scripted(turns))
    played = [group[0] for group in rollouts.play(None, TOKENIZER, problems)]
    assert [str(p.outcome) for p in played] == ["right"] * len(problems)
    assert level != 5 or any(m["role"] == "user" for p in played for m in p.messages)
    for problem, p in zip(problems, played):
        prompt = TOKENIZER.render_prompt(problem.prompt, problem.tools)
        ids, mask = TOKENIZER.render(problem.prompt + problem.gold, problem.tools)
        assert prompt + p.rollout.ids == ids[:-1] and [0] * len(prompt) + p.rollout.mask == mask[:-1]      # but for the newline at the end


def test_calls_that_a_model_may_write_are_answered_and_never_right(monkeypatch):
    """Unknown name, missing, extra and ill-typed arguments, broken JSON, no JSON, a call inside a call: an error to the model, no reward."""
    problems = episodes.problems(1, num=1, families=["kv"]) * 8
    name, parameters = (problems[0].tools[0]["function"][key] for key in ("name", "parameters"))
    good = {parameter: "x" for parameter in parameters["required"]}
    bodies = [{"name": "nothing", "arguments": {}}, {"name": name, "arguments": {}}, {"name": name, "arguments": good | {"more": 1}},
              {"name": name, "arguments": dict.fromkeys(good, [5])}, {"name": name, "arguments": "x"}, {"name": name}]
    texts = [json.dumps(body) for body in bodies] + ['{"name": ', "\x00\ufffd" * 2000]
    monkeypatch.setattr(rollouts, "generate", Scripted({i: [[Tag("<tool_call>"), f"\n{text}\n", Tag("</tool_call>")], ["Answer: 1"]]
                                                        for i, text in enumerate(texts)}))
    for played in rollouts.play(None, TOKENIZER, problems):
        assert [m["role"] for m in played[0].messages] == ["assistant", "tool", "assistant"] and played[0].outcome == Outcome.WRONG
        assert "error" in json.loads(played[0].messages[1]["content"])


def test_a_tool_that_raises_is_an_answer_too(monkeypatch, caplog):
    problem = toy.problems("math_en", num=1)[0]

    def broken(episode, calls):
        raise RuntimeError("no such luck")
    monkeypatch.setattr("data.tasks.Question.step", broken)
    monkeypatch.setattr(rollouts, "generate", Scripted({0: [call("1+1"), [problem.answer]]}))
    (played,), = rollouts.play(None, TOKENIZER, [problem])
    assert played.messages[1] == {"role": "tool", "content": '{"error": "the tool failed"}'} and played.outcome != Outcome.RIGHT
    assert "no such luck" in caplog.text
