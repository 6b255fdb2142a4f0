"""Rejection sampling: which answers are kept, what a round trains on, and rounds that are killed, cut short or met by failing tools."""
import json
import time
from collections import Counter
from pathlib import Path

import pytest

import train_sft
from data import toy
from data.grading import Outcome
from test_train_sft import SMALL, cache, flags, in_tmp_path, kill_9, run          # noqa: F401  (fixtures)
from tokenizer import Tokenizer
from train_sft import Config, choose, gain, normal, trajectory

RIGHT, WRONG = Outcome.RIGHT, Outcome.WRONG
ROUNDS = SMALL | dict(data="toy/math_en", num_demos=20, num_steps=4, rounds=1, pool="math_en", num_prompts=130, num_samples=2, eval_tasks="math_en",
                      eval_problems=3, control="always_right", temperature=0.3)


def says(answer, *expressions):
    calls = [dict(role="assistant", content="", tool_calls=[dict(name="calculator", arguments={"expression": e})]) for e in expressions]
    return [*calls, dict(role="assistant", content=answer)]


def test_one_spelling_for_what_is_the_same():
    assert normal("1,200.0") == normal("1200") == normal(" 1200 ") == "1200" and normal("0") == "0"
    assert normal("12 + 3 * 4") == normal("12+3*4") != normal("3*4+12")
    assert normal(True) == "true" and normal({"b": 1, "a": [2]}) == normal({"a": [2], "b": 1})
    assert trajectory(says("24", "12+3*4")) == trajectory(says("24.0", "12 + 3*4")) != trajectory(says("24", "3*4+12"))


def test_choose_by_hand():
    """Eight answers, four of them right (one half: the cap is four): one is a copy but for spacing, one repeats a call, one ran out of room."""
    group = [("stop", RIGHT, says("24", "12+3*4")), ("stop", RIGHT, says("24", "12 + 3*4")), ("stop", RIGHT, says("24", "12+3*4", "12+3*4")),
             ("length", RIGHT, says("24", "4*3+12")), ("stop", WRONG, says("25", "12+3*4+1")), ("stop", Outcome.UNGRADABLE, says("")),
             ("stop", Outcome.GRADER_ERROR, says("24")), ("tool_timeout", WRONG, says(""))]
    assert choose(group, 0) == ["kept", "duplicate", "repeated call", "unfinished", "wrong", "ungradable", "grader_error", "unfinished"]
    assert choose(group, 0, "always_right") == ["kept", "duplicate", "repeated call", "unfinished", "kept", "kept", "grader_error", "unfinished"]


@pytest.mark.parametrize("num_right, cap", [(8, 1), (7, 2), (5, 2), (4, 4), (1, 1)])
def test_what_is_hard_weighs_more(num_right, cap):
    group = [("stop", RIGHT if i < num_right else WRONG, says("24", f"24+{i}-{i}")) for i in range(8)]
    reasons = choose(group, 1)
    assert reasons.count("kept") == cap and reasons.count("kept") + reasons.count("over the cap") == num_right
    choices = {tuple(choose(group, seed)) for seed in range(300)}
    assert len(choices) == {(8, 1): 8, (7, 2): 21, (5, 2): 10, (4, 4): 1, (1, 1): 1}[num_right, cap], "every choice has its turn"


def test_gain_is_in_standard_errors():
    row = lambda *values: dict(results=[dict(value=v, n=100) for v in values])
    assert gain(row(.5), row(.6)) == pytest.approx(.1 / (.0025 + .0024) ** .5)
    assert gain(row(.5, .5), row(.5, .5)) == 0 and gain(row(.5), row(None)) < 0


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):             # noqa: F811
    """A finished run, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("rounds")
        patch.chdir(folder)
        train_sft.main(Config(name="whole", cache=cache, **ROUNDS))
    return folder / "out/whole"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_every_answer_is_written_with_its_reason_and_the_kept_ones_are_trained_on(trained):
    """Token by token: demonstrations, then prompt + ids as sampled, mask 1 where sampled."""
    from data.tokens import TokenFile
    rollouts, tokenizer = lines(trained / "round_0/rollouts.jsonl"), Tokenizer.bytes()
    assert [(r["problem"], r["sample"]) for r in rollouts] == [(i, s) for i in range(130) for s in range(2)]
    assert all(r["reason"] for r in rollouts) and len(Counter(r["reason"] for r in rollouts)) > 1
    kept = [r for r in rollouts if r["reason"] == "kept"]
    source = TokenFile(trained / "round_1/data/math_en", seq_len=192, long="drop")
    assert len(source) == 20 + len(kept) and json.loads((trained / "round_1/round.json").read_text())["kept"] == {"math_en": len(kept)}
    demos = list(toy.conversations("math_en", num=20))
    for i in range(20):
        ids, mask = source.piece(i)
        assert ids.tolist() == tokenizer.render(demos[i]["messages"])[0][:len(ids)]
    for i, r in enumerate(kept, 20):
        ids, mask = source.piece(i)
        prompt = tokenizer.render_prompt(r["prompt"])
        assert ids.tolist() == prompt + r["ids"] and mask.tolist() == [0] * len(prompt) + r["mask"]


def test_shuffled_answers_keep_their_prompts_apart(trained, cache):          # noqa: F811
    """The control that must hurt: as many documents, but each answer behind the prompt before its own."""
    tokenizer, problems = Tokenizer.bytes(), toy.problems("math_en", "train", num=130)
    cfg = Config(name="x", cache=cache, **ROUNDS | dict(control="shuffled"))
    files = sorted((trained / "round_0").glob("sampled_*.jsonl"))
    right = [line | dict(outcome="right", finish_reason="stop", messages=says(str(n))) for n, line in enumerate(lines(files[0]))]
    Path("sampled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in right))
    documents = {}
    for control in ("", "shuffled"):
        documents[control], _ = train_sft.select(Config(**vars(cfg) | dict(control=control)), [Path("sampled.jsonl")], tokenizer, problems[:64],
                                                 Path("."), rank=1)
    plain, moved = documents[""]["math_en"], documents["shuffled"]["math_en"]
    assert len(plain) == len(moved) > 60
    answers = lambda docs: [[i for i, m in zip(ids, mask) if m] for ids, mask in docs]
    assert answers(plain) == answers(moved)
    prompts = lambda docs: [ids[:mask.index(1)] for ids, mask in docs]
    assert sorted(prompts(plain)) == sorted(prompts(moved)) and prompts(moved)[1:] == prompts(plain)[:-1]


def test_a_killed_round_continues_bitwise(trained, cache):                   # noqa: F811
    """Killed while it samples, with a file of answers done and others not, then resumed: the same answers and the same weights."""
    script = str(Path(train_sft.__file__))
    process = run(script, *flags(name="killed", cache=cache, **ROUNDS), wait=False)
    deadline = time.monotonic() + 300
    while not list(Path("out/killed/round_0").glob("sampled_*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()[-3000:]
        time.sleep(0.002)
    kill_9(process)
    assert not Path("out/killed/round_0/rollouts.jsonl").exists(), "killed too late: the test would prove nothing"
    run(script, *flags(name="killed", cache=cache, resume="latest", **ROUNDS))
    for name in ("round_0/rollouts.jsonl", "round_1/step_000004/model.safetensors", "round_1/data/math_en/train/ids.bin"):
        assert Path("out/killed", name).read_bytes() == (trained / name).read_bytes(), name
    with pytest.raises(ValueError, match="already holds rounds"):
        train_sft.main(Config(name="killed", cache=cache, **ROUNDS))


FAILING = """
import time
import train_sft
from common import parse_config, setup_distributed
from data import tasks
rank = setup_distributed()[0]
step = tasks.Question.step
def failing(episode, calls):
    if rank == 0:
        return step(episode, calls)
    time.sleep(1000 if len(episode.problem.prompt[0]["content"]) % 2 else 0)
    raise OSError("no tools here")
tasks.Question.step = failing
train_sft.main(parse_config(train_sft.Config))
"""


def test_two_ranks_finish_when_the_tools_of_one_fail(cache):                 # noqa: F811
    """Rank 1's calls hang or raise: its rollouts end unfinished or go on with an error, and the round finishes."""
    Path("failing.py").write_text(FAILING)
    settings = ROUNDS | dict(num_steps=100, num_prompts=84, num_samples=1, device_batch_size=4, tool_timeout=0.5, muon_lr=0.02, temperature=1.0)
    out = run("failing.py", *flags(name="two", cache=cache, **settings), ranks=2)
    rollouts = lines(Path("out/two/round_0/rollouts.jsonl"))
    assert [r["problem"] for r in rollouts] == list(range(84)) and json.loads(out.strip().splitlines()[-1])["rounds"] == 1
    theirs = [r for r in rollouts if r["problem"] >= 64]                     # the second file, rank 1's
    results = [m["content"] for r in theirs for m in r["messages"] if m["role"] == "tool"]
    assert all("error" in result for result in results) and not any(r["outcome"] == "right" for r in theirs)
    assert any("the tool failed" in result for result in results) and any(r["finish_reason"] == "tool_timeout" for r in theirs), "no calls: nothing proven"


@pytest.mark.parametrize("settings, message", [(dict(eval_tasks=""), "--rounds needs --eval_tasks"), (dict(pool="math_em"), "did you mean math_en"),
                                               (dict(pool="math_en@test"), "overlap"),
                                               (dict(pool="instructions", mix="math_en:1"), "a source named instructions or chat")])
def test_wrong_settings(settings, message, cache):                           # noqa: F811
    with pytest.raises(ValueError, match=message):
        train_sft.main(Config(name="wrong", cache=cache, **ROUNDS | settings))


def test_kept_answers_join_their_source_or_their_bucket(cache):              # noqa: F811
    """Answers to math_en join the demonstrations of math_en; with demonstrations in a bucket called math, those; with neither, a new source."""
    tokenizer, kept = Tokenizer.bytes(), {"math_en": [([1, 2, 3], [0, 1, 1])] * 5}
    record = next(toy.conversations("math_en", num=1))
    Path("mine.jsonl").write_text("".join(json.dumps(record | dict(bucket="math")) + "\n" for _ in range(3)))
    for data, names, size in (("toy/math_en", ["math_en"], 9), ("mine.jsonl", ["math"], 8), ("toy/code", ["code", "math"], 5)):
        cfg = Config(name="x", cache=cache, **ROUNDS | dict(data=data, num_demos=4))
        sources = train_sft.round_sources(cfg, tokenizer, kept, Path("round"), 0)
        assert list(sources) == names and len(sources[names[-1]]) == size


def test_only_answers_that_keep_all_constraints_are_kept(monkeypatch):
    """IFEval-style synthesis: two answers to each composed request, one written to its constraints, one with a comma-ridden, untitled remark."""
    import rollouts
    from data import tasks
    from test_instructions import write
    from test_rollouts import TOKENIZER, Scripted
    problems = tasks.problems("instructions@train", 30)
    for text_of, reason in ((write, "kept"), (lambda hidden: "Well, yes, no, so, it, is.", "wrong")):
        monkeypatch.setattr(rollouts, "generate", Scripted({i: [[text_of(p.hidden)]] for i, p in enumerate(problems)}))
        played = [group[0] for group in rollouts.play(None, TOKENIZER, problems)]
        found = Counter(choose([(p.rollout.finish_reason, p.outcome, p.messages)], 0)[0] for p in played)
        assert found[reason] >= (30 if reason == "kept" else 27), found
