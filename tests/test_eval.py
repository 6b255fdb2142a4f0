"""Intervals by hand, bits per byte against a direct sum, rollouts with tools, and the scripts as a user runs them."""
import json
import math

import numpy as np
import pytest
import torch

import chat
import checkpoint
import eval as evaluation
from data import open_sources, toy
from data.grading import Outcome
from model import Transformer, config_for_size
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
