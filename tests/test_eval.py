"""Intervals by hand, bits per byte against a direct sum, rollouts with tools, and the scripts as a user runs them."""
import json
import math

import numpy as np
import pytest
import torch

import chat
import checkpoint
import eval as evaluation
from confidence import Confidence, Item
from data import open_sources, tasks, toy
from data.grading import Outcome
from engine import Rollout
from model import Transformer, config_for_size
from rollouts import play
from tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model():
    model = Transformer(config_for_size("nano", Tokenizer.bytes().vocab_size)).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator) * 0.1 if p.ndim == 2 else 0)
    return model


def test_wilson_by_hand():
    # p = .5, n = 100, z = 1.96: centre .5, half width 1.96 * sqrt(.0025 + .0096038 / 100) / 1.038416 = .09617
    low, high = evaluation.wilson(50, 100)
    assert abs(low - 0.40383) < 1e-4 and abs(high - 0.59617) < 1e-4
    assert evaluation.wilson(0, 20)[0] == 0 and abs(evaluation.wilson(0, 20)[1] - 0.16113) < 1e-4
    assert evaluation.wilson(20, 20)[1] > 1 - 1e-9 and evaluation.wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_covers_and_keeps_pairs():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = evaluation.bootstrap(np.mean, rng.normal(size=60), num=200, seed=trial)
        hits += low <= 0 <= high
    assert 0.89 < hits / 200 <= 0.99
    a = rng.normal(size=50)
    assert evaluation.bootstrap(lambda x, y: (x - y).mean(), a, a) == (0.0, 0.0)


def test_difference_is_paired():
    before = dict(metric="acc", rows=[[1.0, 0.0, 0.0, 1.0]])
    after = dict(metric="acc", rows=[[1.0, 1.0, 0.0, 1.0]])
    value, low, high = evaluation.difference(after, before)
    assert value == 0.25 and low == 0.0 and high > 0.25
    value, *_ = evaluation.difference(dict(metric="bpb", rows=[[8.0, 4.0], [2, 4]]), dict(metric="bpb", rows=[[4.0, 4.0], [2, 4]]))
    assert value == 4 / 6


def test_bits_per_byte_is_the_direct_sum(model, tmp_path):
    """Every document alone, log-softmax over full logits, multi-byte characters and end-of-text included."""
    texts = ["Ein süßes Lied.\n", "x = 1\ny = 2\n" * 20, "미보는 빨강 좋아해."]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts * 40))
    tokenizer = Tokenizer.bytes()
    bits, num_bytes = evaluation.bits_per_byte(model, tokenizer, "held.jsonl", max_bytes=10**9, seq_len=100)
    source, = open_sources("held.jsonl", tokenizer, seq_len=100, val_share=0).values()
    assert len(bits) == len(source) > 0
    expected, expected_bytes = 0.0, 0
    for i in range(len(source)):
        ids = [int(x) for x in source.piece(i)[0]]
        logps = model.logits(torch.tensor([ids[:-1]])).log_softmax(-1)[0].gather(1, torch.tensor(ids[1:])[:, None])
        expected -= logps.double().sum().item() / math.log(2)
        expected_bytes += len(tokenizer.decode_bytes([x for x in ids[1:] if x != tokenizer.end_of_text_id]))
    assert abs(bits.sum() - expected) < 1e-3 and num_bytes.sum() == expected_bytes


def test_pass_at_k_by_hand():
    # 4 answers, 1 right: two draws hit it in 3 of 6 pairs; all four always; none right never
    assert evaluation.pass_at_k(1, 4, 2) == 0.5 and evaluation.pass_at_k(1, 4, 4) == 1 and evaluation.pass_at_k(0, 4, 4) == 0
    assert evaluation.pass_at_k(1, 4, 1) == 0.25 and evaluation.pass_at_k(3, 4, 2) == 1


def test_samples_give_pass_at_k(model):
    result = evaluation.run_task(model, Tokenizer.bytes(), "facts_en", num_problems=3, num_samples=4, temperature=1.0)
    assert {"pass@2", "pass@4"} <= result.keys() and "pass@8" not in result and sum(result["outcomes"].values()) == 12
    assert result["value"] <= result["pass@2"] <= result["pass@4"]


def test_a_failed_grader_is_no_score(model, monkeypatch):
    monkeypatch.setattr(toy, "grade", lambda problem, text: Outcome.GRADER_ERROR)
    result = evaluation.run_task(model, Tokenizer.bytes(), "facts_en", num_problems=3)
    assert result["value"] is None and "grader failed" in evaluation.table({"a": [result]})


def test_main_compares_checkpoints(model, capsys):
    for name in ("a", "b"):
        checkpoint.save_hf(model, Tokenizer.bytes(), f"out/{name}")
    evaluation.main(evaluation.Config(init="out/a,out/b", tasks="facts_en,math_en", num_problems=4, out="out/eval"))
    out = capsys.readouterr().out.strip().splitlines()
    assert json.loads(out[-1])["results"]["out/a"]["facts_en"]["n"] == 4
    assert any("+0.000 [+0.000, +0.000]" in line for line in out)
    assert set(json.loads(open("out/eval/eval.json").read())) == {"out/a", "out/b"}


class Fake:
    """A confidence that is told what to say."""
    def __init__(self, p, threshold=0.5):
        self.p, self.threshold, self.items, self.slopes = p, threshold, [], {"query": 1.0}

    def of(self, model, tokenizer, items):
        self.items += items
        return (self.p * len(items))[:len(items)]


@pytest.mark.parametrize("task, is_chat", [("facts_en", False), ("math_en", True)])
def test_confidence_is_that_of_prompt_and_answer(model, task, is_chat):
    tokenizer, calibrated = Tokenizer.bytes(), Confidence({"query": 0.7, "logprob": 0.5}, temperature=0.8)
    sampling = dict(num_samples=2, temperature=0.8, seed=0)
    result = evaluation.run_task(model, tokenizer, task, num_problems=2, calibrated=calibrated, **sampling)
    problems, items, right = tasks.problems(task, 2, 0), [], []
    for problem, group in zip(problems, play(model, tokenizer, problems, **sampling)):
        prompt = tokenizer.render_prompt(problem.prompt, problem.tools) if is_chat else tokenizer.encode(problem.prompt)
        for rollout, messages, outcome in group:
            items.append(Item(prompt + rollout.ids, [0] * len(prompt) + rollout.mask, is_chat, messages[-1]["content"], str(problem.prompt)))
            right.append(outcome == Outcome.RIGHT)
    p = calibrated.of(model, tokenizer, items)
    assert [s["confidence"] for s in result["samples"]] == p[::2] and len(set(p)) == 4, "the saved sample is the first of each problem"
    assert abs(result["confidence"]["brier"] - np.mean((np.array(p) - right) ** 2)) < 1e-12


def test_items_of_text_and_of_turns():
    """Plain text is encoded, not rendered; samples of a problem share a key; an answer without a message has an empty text; tool results are no answer."""
    tokenizer, fake = Tokenizer.bytes(), Fake([0.1, 0.2, 0.3])
    said = [dict(role="assistant", content="first"), dict(role="tool", content="4"), dict(role="assistant", content="last")]
    problem = lambda prompt: toy.Problem("facts_en", prompt, "", "")
    chat_prompt = [dict(role="user", content="2+2?")]
    played = [[(Rollout([7, 8], mask=[1, 1]), said[-1:], None), (Rollout([9], mask=[1]), [], None)], [(Rollout([1, 2, 3], mask=[1, 0, 1]), said, None)]]
    assert evaluation.confidences(fake, None, tokenizer, [problem("ab"), problem(chat_prompt)], played) == [[0.1, 0.2], [0.3]]
    one, two, three = fake.items
    ab, rendered = tokenizer.encode("ab"), tokenizer.render_prompt(chat_prompt, None)
    assert one[:4] == (ab + [7, 8], [0, 0, 1, 1], False, "last") and two[:4] == (ab + [9], [0, 0, 1], False, "")
    assert three[:4] == (rendered + [1, 2, 3], [0] * len(rendered) + [1, 0, 1], True, "last") and one.prompt == two.prompt != three.prompt


def test_selective_answering_by_hand():
    R, W, failed = Outcome.RIGHT, Outcome.WRONG, Outcome.GRADER_ERROR
    # five are graded, four of them have p; at .5, and .5 itself is enough, .9 .8 .5 are given, the first and the last of these are right
    found = evaluation.confidence_scores([0.9, 0.8, 0.5, 0.4, None, 0.95], [R, W, R, W, R, failed], threshold=0.5)
    assert found["given"] == 3 / 5 and found["given_right"] == 2 / 3 and found["adherence"] == 4 / 5
    assert abs(found["brier"] - (0.01 + 0.64 + 0.25 + 0.16) / 4) < 1e-12 and found["auroc"] == 0.75 and abs(found["mean_q"] - 0.65) < 1e-12
    found = evaluation.confidence_scores([0.2, None], [R, Outcome.UNGRADABLE], threshold=0.5)
    assert found["given"] == 0 and found["given_right"] is None and found["auroc"] is None and abs(found["brier"] - 0.64) < 1e-12
    assert {key for key, value in evaluation.confidence_scores([0.9], [failed], threshold=0.5).items() if value is not None} == {"threshold"}


def test_main_shows_confidence(model, monkeypatch, capsys):
    for name in ("plain", "sure", "silent"):
        checkpoint.save_hf(model, Tokenizer.bytes(), f"out/{name}")
    fakes = dict(plain=None, sure=Fake([0.25, 0.75]), silent=Fake([None]))
    monkeypatch.setattr(evaluation.confidence, "load", lambda folder, model: fakes[folder.name])
    outcomes = iter([Outcome.WRONG] * 4 + [Outcome.WRONG, Outcome.RIGHT, Outcome.WRONG, Outcome.WRONG] + [Outcome.WRONG] * 4)
    monkeypatch.setattr(evaluation, "play", lambda *a, **k: [[p._replace(outcome=next(outcomes)) for p in group] for group in play(*a, **k)])
    results = evaluation.main(evaluation.Config(init="out/plain,out/sure,out/silent", tasks="facts_en", num_problems=4, samples=2))
    lines = capsys.readouterr().out.strip().splitlines()
    # (.0625 + .0625 + .0625 + .5625) / 4 = .1875; .75 > .25, and half of a tie at .75
    assert " q: brier .188, auroc .833; answers .50 at .50 right |" in lines[-3] and " q: brier -, auroc -; answers .00 at - right |" in lines[-3]
    assert [("(confidence .25)" in line, "(confidence .75)" in line) for line in lines if line.startswith("[out/sure]")] == [(True, False), (False, True)]
    assert sum("gave no answer a confidence" in line for line in lines) == 1
    assert json.loads(lines[-1])["results"]["out/sure"]["facts_en"]["confidence"]["given_right"] == 0.5
    plain, said = results["out/plain"][0], json.loads(lines[-1])["results"]["out/plain"]["facts_en"]
    assert list(plain) == ["task", "metric", "value", "low", "high", "n", "outcomes", "rows", "samples"]
    assert set(plain["samples"][0]) == {"prompt", "response", "outcome"}
    assert list(said) == ["value", "low", "high", "n"] and lines[-3].split("|")[3] == " 0.000 [0.000, 0.490] "
    assert [line.startswith("[out/plain] facts_en wrong: '") for line in lines[:2]] == [True, True] and "confidence" not in lines[0] + lines[1]


@pytest.mark.parametrize("settings, message", [
    (dict(init=""), "--init is empty"), (dict(init="nowhere"), "no config.json"), (dict(init="out/a", tasks="math_em"), "did you mean math_en"),
    (dict(init="out/a", num_samples=4), "a temperature above 0"),
    (dict(init="out/a", tasks="bpb:nothing.txt"), "nothing.txt")])
def test_wrong_settings(model, settings, message):
    checkpoint.save_hf(model, Tokenizer.bytes(), "out/a")
    with pytest.raises(ValueError, match=message):
        evaluation.main(evaluation.Config(**{"num_problems": 2} | settings))


def test_chat_answers_once_and_in_a_session(model, monkeypatch, capsys):
    checkpoint.save_hf(model, Tokenizer.bytes(), "out/a")
    chat.main(chat.Config(init="out/a", prompt="<|im_end|> hello", max_new_tokens=8))
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["prompt"] == "<|im_end|> hello"
    lines = iter(["Hi.", "And now?", "/raw mibo", "/what", "/new", "", "Again.", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    prompts = []
    generate = chat.generate
    monkeypatch.setattr(chat, "generate", lambda m, t, p, **k: (prompts.append(p[0]), generate(m, t, p, **k))[1])
    chat.main(chat.Config(init="out/a", max_new_tokens=8))
    tokenizer = Tokenizer.bytes()
    assert "unknown command" in capsys.readouterr().out
    assert prompts[1][:len(prompts[0])] == prompts[0], "the second turn continues the first, token by token"
    assert tokenizer.decode(prompts[1]).endswith("<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(prompts[2]) == "mibo" and tokenizer.decode(prompts[3]).startswith("<|im_start|>user\nAgain.")


def test_chat_calls_the_calculator():
    text = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12+3*4"}}\n</tool_call>'
    assert chat.run_calls(text) == ["24"]
    assert "error" in chat.run_calls(text.replace("12+", "12/0+"))[0] and "error" in chat.run_calls(text.replace("}}", "}"))[0]
    assert chat.run_calls("The answer is 24.") is None


def test_chat_runs_python_in_the_sandbox(monkeypatch):
    from data import sandbox
    text = '<tool_call>\n{"name": "python", "arguments": {"code": "print(6 * 7)"}}\n</tool_call>'
    results = {"print(6 * 7)": sandbox.Result("ok", "42\n"), "1 / 0": sandbox.Result("error", "", "ZeroDivisionError")}
    monkeypatch.setattr(sandbox, "run", lambda code: results[code])
    assert chat.run_calls(text) == ["42\n"] and "ZeroDivisionError" in chat.run_calls(text.replace("print(6 * 7)", "1 / 0"))[0]

    def none(code):
        raise sandbox.SandboxUnavailable("no box here")
    monkeypatch.setattr(sandbox, "run", none)
    assert json.loads(chat.run_calls(text)[0]) == {"error": "no box here"}
