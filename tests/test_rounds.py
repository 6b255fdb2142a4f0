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
from train_sft import Config, choose, gain, normal, repeats_a_call, trajectory

RIGHT, WRONG = Outcome.RIGHT, Outcome.WRONG
ROUNDS = SMALL | dict(data="toy/math_en", num_demos=20, num_steps=4, rounds=1, pool="math_en", num_prompts=130, num_samples=2, eval_tasks="math_en",
                      eval_problems=3, control="always_right", temperature=0.3)


def says(answer, *expressions):
    calls = [(dict(role="assistant", content="", tool_calls=[dict(name="calculator", arguments={"expression": e})]), dict(role="tool", content="24"))
             for e in expressions]
    return [*sum(calls, ()), dict(role="assistant", content=answer)]


def test_one_spelling_for_what_is_the_same():
    assert normal("1,200.0") == normal("1200") == normal(" 1200 ") == "1200" and normal("0.0") == normal("0") == "0"
    assert normal("12 + 3 * 4") == normal("12+3*4") != normal("3*4+12")
    assert normal(True) == "true" and normal({"b": 1, "a": [2]}) == normal({"a": [2], "b": 1})
    assert trajectory(says("24", "12+3*4")) == trajectory(says("24.0", "12 + 3*4")) != trajectory(says("24", "3*4+12"))


def test_choose_by_hand():
    """Eight answers, three of the seven that could be graded right (the cap is four): one is a copy but for spacing, one repeats a call."""
    group = [(True, RIGHT, says("24", "12+3*4")), (True, RIGHT, says("24", "12 + 3*4")), (True, RIGHT, says("24", "12+3*4", "12+3*4")),
             (False, WRONG, says("24", "4*3+12")), (True, WRONG, says("25", "12+3*4+1")), (True, Outcome.UNGRADABLE, says("")),
             (True, Outcome.GRADER_ERROR, says("24")), (False, WRONG, says(""))]
    assert choose(group, 0) == ["kept", "duplicate", "repeated call", "unfinished", "wrong", "ungradable", "grader_error", "unfinished"]
    assert choose(group, 0, "always_right") == ["kept", "duplicate", "repeated call", "unfinished", "kept", "kept", "grader_error", "unfinished"]


def test_a_call_repeated_for_another_result_is_no_repetition():
    """A tool that was busy the first time, a value read again after it was written."""
    read = lambda result: [dict(role="assistant", content="", tool_calls=[dict(name="get", arguments={"key": "a"})]), dict(role="tool", content=result)]
    assert not repeats_a_call([*read('{"error": "busy"}'), *read("5")]) and repeats_a_call([*read("5"), *read("5")])
    unparsed = [dict(role="assistant", content="<tool_call>"), dict(role="tool", content='{"error": "JSON"}')]
    assert not repeats_a_call([*unparsed, *unparsed, *read("5")]) and repeats_a_call([*read("5"), *unparsed, *read("5")])


@pytest.mark.parametrize("num_right, cap", [(8, 1), (7, 2), (5, 2), (4, 4), (1, 1)])
def test_what_is_hard_weighs_more(num_right, cap):
    group = [(True, RIGHT if i < num_right else WRONG, says("24", f"24+{i}-{i}")) for i in range(8)]
    reasons = choose(group, 1)
    assert reasons.count("kept") == cap and reasons.count("kept") + reasons.count("over the cap") == num_right
    choices = {tuple(choose(group, seed)) for seed in range(300)}
    assert len(choices) == {(8, 1): 8, (7, 2): 21, (5, 2): 10, (4, 4): 1, (1, 1): 1}[num_right, cap], "every choice has its turn"


def test_gain_is_in_standard_errors():
    row = lambda *values: dict(results=[dict(value=v, n=100) for v in values])
    assert gain(row(.5), row(.6)) == pytest.approx(.1 / (.0025 + .0024) ** .5)
    assert gain(row(.5, .5), row(.5, .5)) == 0


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
    demos = list(toy.conversations("math_en", num=20, seed=ROUNDS.get("seed", 0)))
    for i in range(20):
        ids, mask = source.piece(i)
        assert ids.tolist() == tokenizer.render(demos[i]["messages"])[0][:len(ids)]
    for i, r in enumerate(kept, 20):
        ids, mask = source.piece(i)
        prompt = tokenizer.render_prompt(r["prompt"])
        assert ids.tolist() == prompt + r["ids"] and mask.tolist() == [0] * len(prompt) + r["mask"]


def select(rollouts, problems, **settings):
    Path("sampled.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    return train_sft.select(Config(**dict(name="x", num_samples=2, seq_len=192) | settings), [Path("sampled.jsonl")], Tokenizer.bytes(), problems, Path("."), rank=0)


def sampled(problems):
    """Two different right answers to every problem but the third, which has none."""
    tokenizer = Tokenizer.bytes()
    return [dict(problem=i, sample=j, prompt=p.prompt, outcome="wrong" if i == 2 else "right", finish_reason="stop", messages=says(f"{i}{j}"),
                 ids=[*tokenizer.encode(f"{i}{j}"), tokenizer.end_of_turn_id], mask=[1] * (len(f"{i}{j}") + 1)) for i, p in enumerate(problems) for j in range(2)]


def test_shuffled_answers_all_move_to_another_problem():
    """The control that must hurt: the same answers, as many documents, none behind its own prompt, also where a problem has two."""
    problems = toy.problems("math_en", "train", num=5)
    prompts = [Tokenizer.bytes().render_prompt(p.prompt) for p in problems]
    cut = lambda documents: [(prompts.index(ids[:mask.index(1)]), Tokenizer.bytes().decode(ids[mask.index(1):-1])) for ids, mask in documents]
    group = sampled(problems)
    plain, _ = select(group, problems)
    assert [(i, answer[0]) for i, answer in cut(plain["math_en"])] == [(0, "0"), (1, "1"), (3, "3"), (4, "4")], "all right: one of two stays"
    moved, _ = select(group, problems, control="shuffled")
    assert [i for i, _ in cut(moved["math_en"])] == [4, 0, 1, 3] and [a for _, a in cut(moved["math_en"])] == [a for _, a in cut(plain["math_en"])]
    # half of the answers ungradable: two of four stay, and both move
    four = [dict(r, sample=2 * (r["sample"] > 0) + extra, outcome=r["outcome"] if not extra else "ungradable") for r in group for extra in (0, 1)]
    moved, _ = select(four, problems, control="shuffled", num_samples=4)
    assert [(i, answer[0]) for i, answer in cut(moved["math_en"])] == [(4, "0")] * 2 + [(0, "1")] * 2 + [(1, "3")] * 2 + [(3, "4")] * 2


def test_reasons_of_select():
    """Ended in end-of-text, or longer than a row: right, and still not kept; rollouts.jsonl says why."""
    problems = toy.problems("math_en", "train", num=3)
    group = [dict(r, outcome="right") for r in sampled(problems)]
    group[0]["ids"][-1] = Tokenizer.bytes().end_of_text_id
    group[1]["finish_reason"] = "length"
    group[2] |= dict(ids=[65] * 200 + group[2]["ids"], mask=[1] * 200 + group[2]["mask"])
    group[3]["outcome"] = "wrong"
    documents, statistics = select(group, problems)
    assert [r["reason"] for r in lines(Path("rollouts.jsonl"))][:4] == ["unfinished", "unfinished", "too long", "wrong"]
    assert statistics["kept"] == len(documents["math_en"]) == 1 and statistics["reasons"]["over the cap"] == 1
    assert statistics["pool_mean"] == 5 / 6 and statistics["pool_pass"] == 1
    with pytest.raises(RuntimeError, match="the grader failed on 1 of 6 answers"):
        select([dict(r, outcome="grader_error" if i == 0 else "right") for i, r in enumerate(group)], problems)
    with pytest.raises(ValueError, match="made with other flags"):
        select(group, problems[::-1])


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
    with pytest.raises(ValueError, match="made with other flags .num_samples: 2 -> 3"):
        train_sft.main(Config(name="killed", cache=cache, **ROUNDS | dict(resume="latest", num_samples=3)))
    before = Path("out/killed/round_1/round.json").read_bytes()
    train_sft.main(Config(name="killed", cache=cache, dry_run=True, overwrite=True, **ROUNDS))
    assert Path("out/killed/round_1/round.json").read_bytes() == before, "a dry run deletes nothing"


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
                                               (dict(pool="sums"), "expected conversations"),
                                               (dict(resume="out/x/step_000003"), "--rounds goes on with --resume=latest"),
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
        found = Counter(choose([(p.rollout.finish_reason == "stop", p.outcome, p.messages)], 0)[0] for p in played)
        assert found[reason] >= (30 if reason == "kept" else 27), found


@pytest.mark.parametrize("pool, held_out", [("gsm8k", "gsm8k"), ("mbpp", "mbpp"), ("tools/1", "tools/1@test_both"), ("tools/4", "tools/4@test_schema"),
                                            ("instructions", "instructions@test"), ("math_ko", "math_ko@test_template")])
def test_pools_of_the_recipes_are_left_with_problems(pool, held_out):
    """Shared form is no overlap: the recipes of runs/ keep nearly all of what they sample."""
    import os

    from data import tasks
    from rollouts import without_overlap
    if pool in ("gsm8k", "mbpp") and not os.environ.get("TEMPER_DATA"):
        pytest.skip("needs TEMPER_DATA")
    problems = tasks.problems(f"{pool}@train", 200)
    assert len(without_overlap(problems, tasks.problems(held_out, 200))) >= 160
    assert without_overlap(problems, problems[:50]) == [p for p in problems[50:] if p.prompt not in [q.prompt for q in problems[:50]]] or pool != "math_ko"
