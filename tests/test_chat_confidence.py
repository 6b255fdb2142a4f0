"""Checkpoints with calibration.json in chat.py: what is printed and written, which tokens it is of, and that an adapter for the query leaves answers alone."""
import json
from pathlib import Path

import pytest
import torch

import chat
import checkpoint
import confidence
from confidence import Confidence, Item
from engine import generate
from model import LoRALinear, Transformer, add_lora, config_for_size, lora_scaled
from tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def random_model():
    model = Transformer(config_for_size("nano", Tokenizer.bytes().vocab_size)).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator) * 0.1 if p.ndim == 2 else 0)
    return model


def with_adapter():
    """-> step folder of a model with an adapter for the query, which changes much."""
    model = add_lora(random_model(), 2, 8.0)
    generator = torch.Generator().manual_seed(2)
    for layer in (m for m in model.modules() if isinstance(m, LoRALinear)):
        layer.lora_B.data.normal_(generator=generator)
    with lora_scaled(model, 0.0):
        return checkpoint.save("out/a", 1, model, Tokenizer.bytes(), [], state={}, config={})


class Fake:
    def __init__(self, *p, threshold=0.48, source="query"):
        self.p, self.threshold, self.items, self.slopes = list(p), threshold, [], {source: 1.0}

    def of(self, model, tokenizer, items):
        self.items += items
        return [self.p.pop(0) for _ in items]


def answer(capsys, monkeypatch, fake):
    """-> (what chat.py --prompt printed, its JSON line)."""
    checkpoint.save_hf(random_model(), Tokenizer.bytes(), "out/plain")
    monkeypatch.setattr(confidence, "load", lambda folder, model: fake)
    chat.main(chat.Config(init="out/plain", prompt="Hi.", max_new_tokens=4))
    out = capsys.readouterr().out.strip()
    return out, json.loads(out.splitlines()[-1])


def test_adapter_of_the_query_leaves_greedy_answers_alone():
    """Base weights, and a checkpoint with the adapter: the same tokens and log-probabilities, bit by bit. With the adapter on they differ."""
    folder, tokenizer = with_adapter(), Tokenizer.bytes()
    Confidence({"query": 1.0}, lora_rank=2, lora_alpha=8.0).save(folder)
    prompts = [tokenizer.render_prompt([dict(role="user", content=text)]) for text in ("Hi.", "How many pens?")]
    greedy = lambda model: [(r.ids, r.logps) for r, in generate(model, tokenizer, prompts, max_new_tokens=24, temperature=0.0)]
    expected = greedy(random_model())
    model, _ = checkpoint.load_hf(folder)
    assert greedy(model) == expected
    calibrated = confidence.load(folder, model)
    assert any(isinstance(m, LoRALinear) for m in model.modules()) and greedy(model) == expected
    p, = calibrated.of(model, tokenizer, [Item(prompts[0] + expected[0][0], [0] * len(prompts[0]) + [1] * 24, True, "", "")])
    assert greedy(model) == expected, "also after the query was asked"
    with lora_scaled(model, 4.0):
        assert greedy(model) != expected


def test_prompt_prints_the_confidence_of_the_adapter(capsys):
    """p is that of ids and mask by hand, asked with the adapter on; --init names the run, calibration.json lies in its step folder."""
    folder, tokenizer = with_adapter(), Tokenizer.bytes()
    chat.main(chat.Config(init="out/a", prompt="Hi.", max_new_tokens=8))
    before = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert list(before) == ["init", "prompt", "response"]
    Confidence({"query": 1.0}, threshold=0.0, lora_rank=2, lora_alpha=8.0).save(folder)
    chat.main(chat.Config(init="out/a", prompt="Hi.", max_new_tokens=8))
    *_, shown, line = capsys.readouterr().out.strip().splitlines()
    line = json.loads(line)
    prompt = tokenizer.render_prompt([dict(role="user", content="Hi.")], None)
    model, _ = checkpoint.load_hf(folder)
    ids = generate(model, tokenizer, [prompt], max_new_tokens=8, temperature=0.0)[0][0].ids
    item, calibrated = Item(prompt + ids, [0] * len(prompt) + [1] * len(ids), True, "", ""), confidence.load(folder, model)
    assert [line["confidence"]] == calibrated.of(model, tokenizer, [item]) != Confidence({"query": 1.0}).of(model, tokenizer, [item])
    assert before | dict(confidence=line["confidence"], abstains=False) == line
    assert f"(confidence {line['confidence']:.2f}, ".replace(" 0.", " .") in shown and shown.endswith(" tok/s)")


def test_below_the_threshold_it_would_rather_not_answer(capsys, monkeypatch):
    out, line = answer(capsys, monkeypatch, Fake(0.83))
    assert "  (confidence .83, " in out and line["confidence"] == 0.83 and line["abstains"] is False
    out, line = answer(capsys, monkeypatch, Fake(0.31))
    assert "  (confidence .31: below .48, it would rather not answer, " in out and line["confidence"] == 0.31 and line["abstains"] is True
    out, line = answer(capsys, monkeypatch, Fake(0.48))
    assert "  (confidence .48, " in out and line["abstains"] is False
    out, line = answer(capsys, monkeypatch, Fake(None))            # words were not said this time
    assert "  (no confidence: it would rather not answer, " in out and line["confidence"] is None and line["abstains"] is True


def test_a_vote_of_one_is_said_once_and_not_shown(capsys, monkeypatch):
    out, line = answer(capsys, monkeypatch, Fake(source="vote"))
    assert out.startswith(f"{Path('out/plain/calibration.json')}: this confidence is a vote") and "confidence" not in line
    out, line = answer(capsys, monkeypatch, None)
    assert "confidence" not in out and list(line) == ["init", "prompt", "response"]


def test_a_session_asks_of_all_ids_and_marks_the_last_answer(monkeypatch, capsys):
    checkpoint.save_hf(random_model(), Tokenizer.bytes(), "out/plain")
    fake, rollouts = Fake(0.9, 0.8, 0.7), []
    monkeypatch.setattr(confidence, "load", lambda folder, model: fake)

    def recorded(model, tokenizer, prompts, **options):
        rollouts.append((prompts[0], generate(model, tokenizer, prompts, **options)))
        return rollouts[-1][1]
    monkeypatch.setattr(chat, "generate", recorded)
    lines = iter(["Hi.", "And now?", "/raw mibo", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.main(chat.Config(init="out/plain", max_new_tokens=6, temperature=0.7))
    out = capsys.readouterr().out
    assert [f"(confidence .{digits}, " in out for digits in (90, 80, 70)] == [True] * 3
    first, second, raw = fake.items
    for item, (prompt, [[rollout]]) in zip((first, second, raw), rollouts):
        assert item.ids == prompt + rollout.ids and item.mask == [0] * len(prompt) + [1] * len(rollout.ids)
    assert second.ids[:len(first.ids)] == first.ids and [item.chat for item in fake.items] == [True, True, False]
    assert Tokenizer.bytes().decode(raw.ids).startswith("mibo" + raw.text)
