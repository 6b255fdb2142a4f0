"""train_calibration.py: losses against oracles, bad input, equal gradients however the batch is cut, exact resume, answers that stay, and a known optimum."""
import json
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_confidence import random_model
from test_train_sft import flags, kill_9, metrics, run

import calibration
import checkpoint
import confidence
import train_calibration
from engine import generate
from tokenizer import Tokenizer
from confidence import Item
from train_calibration import Config, Graded, check_overlap, jsd, jsd_loss, query_loss, read_graded, resolve, split_of

ROOT = Path(__file__).resolve().parents[1]
FULL = os.environ.get("TEMPER_FULL") == "1"            # five seeds of what needs training, not one: two minutes
TOKENIZER = Tokenizer.bytes()
QUERY = "{no}{yes}"                                     # short: a byte is a token here


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """Without what test_calibration.py tests: pictures, and a thousand draws for a floor."""
    monkeypatch.setattr(calibration, "picture", lambda panels, file: None)
    monkeypatch.setattr(calibration, "noise_floor", lambda t, floor=calibration.noise_floor: floor(t, num=10))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "model"
    checkpoint.save_hf(random_model(), TOKENIZER, folder)
    return str(folder)


def graded_folder(start, rows, path="graded"):
    """rows: [(prompt, answer, outcome)], prompt a text or the question of a conversation in a list -> a folder as sample_to_files fills it."""
    lines, folder = [], Path(path) / "in domain" / "chat"
    for i, (prompt, answer, outcome) in enumerate(rows):
        chat = isinstance(prompt, list)
        prompt = [dict(role="user", content=prompt[0])] if chat else prompt
        prompt_ids = TOKENIZER.render_prompt(prompt) if chat else TOKENIZER.encode(prompt)
        ids = TOKENIZER.encode(answer) + [TOKENIZER.end_of_turn_id if chat else TOKENIZER.end_of_text_id]
        lines.append(json.dumps(dict(problem=i, sample=0, task="kinds", prompt=prompt, messages=[dict(role="assistant", content=answer)], outcome=outcome, finish_reason="stop",
                                     prompt_ids=prompt_ids, ids=ids, mask=[1] * len(ids))))
    folder.mkdir(parents=True)
    (folder.parents[1] / "record.json").write_text(json.dumps(dict(weights=checkpoint.weights_hash(start), sets=["in domain"])))
    (folder / "sampled_000000.jsonl").write_text("\n".join(lines) + "\n")
    return path


def some(start, num=300, **more):
    """Settings of a small run on answers of unequal length, half of them right."""
    rows = [([f"Say {i}"], "a" * (1 + i % 7), "right" if i // 2 % 2 else "wrong") for i in range(num)]
    return dict(init=start, graded=graded_folder(start, rows), query=QUERY, num_steps=2, batch_size=15, lr=1e-3, warmup_steps=0, lora_rank=2, num_resamples=100) | more


# -----------------------------------------------------------------------------
# Losses


def test_the_query_s_loss_reads_two_logits_at_one_position():
    """Against the cross-entropy of two logits in float64, and its gradient: exactly 0 at other tokens and in the rows of other words."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    at, right, swapped, labels = [2, 5, 11], torch.tensor([1, 0, 1]), torch.tensor([False, False, True]), [4, 17]
    z = confidence.query_logits(hidden[torch.tensor([i in at for i in range(12)])], weight, labels, swapped)
    loss = query_loss(z, right, 7)
    two = hidden.detach().double()[at] @ weight.detach().double()[labels].T
    expected = sum(torch.logsumexp(row, 0) - row[c if not s else 1 - c] for row, c, s in zip(two, right.tolist(), swapped.tolist())) / 7
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    for grad, there in ((hidden.grad, at), (weight.grad, labels)):
        assert grad[there].abs().amin(1).gt(0).all()
        grad[there] = 0
        assert not grad.any()


def test_the_query_s_loss_by_hand():
    """The truth had probability 3/4, then 1/8: (ln 4/3 + ln 8) / 4 = ln(32 / 3) / 4, with four answers in the global batch."""
    assert query_loss(torch.tensor([math.log(3), math.log(7)]), torch.tensor([1, 0]), 4).item() == pytest.approx(math.log(32 / 3) / 4, rel=1e-6)


def test_the_divergence_by_hand():
    """p = (3/4, 1/4), q = (1/4, 3/4), m = (1/2, 1/2): both are 3/4 ln 3/2 + 1/4 ln 1/2 away."""
    p, q = torch.tensor([[.75, .25]]).log(), torch.tensor([[.25, .75]]).log()
    assert jsd(p, q).item() == pytest.approx(.75 * math.log(1.5) - .25 * math.log(2), rel=1e-6)


def test_the_divergence_is_symmetric_and_at_most_ln_2():
    torch.manual_seed(0)
    p, q = 4 * torch.randn(50, 30), 4 * torch.randn(50, 30)
    assert jsd(p, p).abs().max() < 1e-6 and jsd(p, p + 3).abs().max() < 1e-6                # logits are free up to a constant
    assert torch.allclose(jsd(p, q), jsd(q, p), atol=1e-6) and jsd(p, q).min() > 1e-2
    apart = torch.zeros(1, 30), torch.zeros(1, 30)
    apart[0][0, :15], apart[1][0, 15:] = 40, 40
    assert jsd(*apart).item() == pytest.approx(math.log(2), abs=1e-5)
    assert (jsd(100 * p, 100 * q) <= math.log(2) + 1e-6).all() and jsd(100 * p, 100 * q).isfinite().all()


def test_the_divergence_s_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    p, q = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(jsd, (p, q))
    h = torch.randn(3, 5, dtype=torch.float64) * 1e-6                                       # and without torch's own difference quotients
    ahead, behind = jsd((p + h).detach(), q.detach()).sum(), jsd((p - h).detach(), q.detach()).sum()
    assert ((ahead - behind) / 2).item() == pytest.approx((torch.autograd.grad(jsd(p, q).sum(), p)[0] * h).sum().item(), rel=1e-6)


def test_the_divergence_in_chunks_is_the_whole():
    """Row by row and all at once: value, gradient of the hidden states and of the table. The denominator is the one given."""
    torch.manual_seed(0)
    hidden, ref, weight, ref_weight = torch.randn(9, 8), torch.randn(9, 8), torch.randn(20, 8), torch.randn(20, 8)
    found = []
    for chunk in (512, 4, 1):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = jsd_loss(h, ref, w, ref_weight, 5, chunk)
        loss.backward()
        found.append((loss.detach(), h.grad, w.grad))
    assert found[0][0].item() == pytest.approx(jsd(F.linear(hidden.double(), weight.double()), F.linear(ref.double(), ref_weight.double())).sum().item() / 5, rel=1e-5)
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0], other)) and other[1].abs().min() > 0


# -----------------------------------------------------------------------------
# Graded answers


def test_splits_are_of_prompts():
    prompts = [f"What is {i}?" for i in range(4000)]
    splits = [split_of(0, p, .1, .2) for p in prompts]
    assert splits == [split_of(0, p, .1, .2) for p in prompts] != [split_of(1, p, .1, .2) for p in prompts]
    shares = {split: splits.count(split) / 4000 for split in ("train", "fit", "test")}
    assert shares == pytest.approx(dict(train=.7, fit=.1, test=.2), abs=.02)                # 3 standard errors
    kept = [p for p, split in zip(prompts, splits) if split == "test"]
    assert {split_of(0, p, .3, .2) for p in kept} == {"test"}                               # more to fit on comes out of train


def test_answers_are_read_with_their_split(start, tmp_path):
    """Four answers to each of 40 prompts: each prompt in one split; what cannot be graded is not right; what the grader failed on is nothing."""
    outcomes = ["right", "wrong", "ungradable", "grader_error"]
    folder = graded_folder(start, [(f"prompt {i}" if i % 2 else [f"prompt {i}"], f"answer {k}", outcomes[k]) for i in range(40) for k in range(4)])
    g = read_graded(folder, Config(max_grader_error=.25, test_share=.3, fit_share=.3), None)
    assert len(g.items) == len(g.right) == len(g.split) == 120 and g.right == [1, 0, 0] * 40 and [item.text for item in g.items] == ["answer 0", "answer 1", "answer 2"] * 40
    of = defaultdict(set)
    for item, split in zip(g.items, g.split):
        of[item.prompt].add(split)
    assert len(of) == 40 and {len(s) for s in of.values()} == {1} and set.union(*of.values()) == {"train", "fit", "test"}
    assert g.items[0].chat and g.items[0].ids == TOKENIZER.render_prompt([dict(role="user", content="prompt 0")]) + [*b"answer 0", 258]
    assert not g.items[3].chat and g.items[3].ids == [*b"prompt 1answer 0", 256] and g.items[3].mask == [0] * 8 + [1] * 9
    assert g.of("fit", "test").right == [c for c, s in zip(g.right, g.split) if s != "train"] and set(g.of("fit").split) == {"fit"}
    assert set(read_graded(folder, Config(max_grader_error=.25), "test").split) == {"test"}
    with pytest.raises(RuntimeError, match=r"failed on 40 of 160 answers \(--max_grader_error=0.24"):
        read_graded(folder, Config(max_grader_error=.24), None)


@pytest.mark.parametrize("kind, num, match", [("right", 300, r"are right: .*--data"), ("wrong", 300, r" 0 are right: .*--data"), ("ungradable", 300, r" 0 are right: .*--data"),
                                              ("mixed", 220, "expected at least 200: raise --num_prompts")])
def test_answers_that_teach_nothing_are_refused(start, kind, num, match):
    outcome = lambda i: ("right", "wrong")[i % 2] if kind == "mixed" else kind
    folder = graded_folder(start, [([f"Say {i}"], "a", outcome(i)) for i in range(num)])
    with pytest.raises(ValueError, match=match):
        train_calibration.main(Config(init=start, graded=folder, num_steps=1))


def test_answers_of_other_weights_are_refused(start):
    other = random_model(2)
    checkpoint.save_hf(other, TOKENIZER, Path("other"))
    with pytest.raises(ValueError, match="of other weights than"):
        train_calibration.main(Config(**some(start, init="other")))


@pytest.mark.parametrize("more, match", [(dict(lr=.02), "--lr=0.02"), (dict(lr=1e-8), "--lr=1e-08"), (dict(jsd_coef=.5), "--jsd_coef=0.5.*answers cannot move"),
                                         (dict(adapter="shared", jsd_coef=11), "--jsd_coef=11"), (dict(query="Right? {yes}"), "--query="), (dict(lora_rank=0), "needs --lora_rank"),
                                         (dict(source="vote"), "--source=vote: --method=ct"), (dict(test_share=.7), "--test_share=0.7"), (dict(coverage=0), "--coverage=0"),
                                         (dict(num_resamples=5), "--num_resamples=5")])
def test_bad_settings_are_refused_by_flag(more, match):
    resolve(Config(), 10**6, 1000)
    with pytest.raises(ValueError, match=match):
        resolve(Config(**more), 10**6, 1000)


def test_what_is_left_to_the_script():
    small, lora, all_weights = resolve(Config(), 10**6, 4_000), resolve(Config(), 10**9, 8_000), resolve(Config(adapter="shared", lora_rank=0), 10**9, 25_600)
    assert (small.lr, small.num_epochs, small.num_steps, small.jsd_coef) == (3e-3, 6, 750, 0)
    assert (lora.lr, lora.num_epochs, lora.num_steps) == (1e-4, 3, 750) and (all_weights.lr, all_weights.num_epochs, all_weights.num_steps, all_weights.jsd_coef) == (2e-6, 1, 800, 1)
    assert resolve(Config(method="platt", source="verbal"), 10**6, 4_000).num_steps == 0


def test_starts_that_cannot_be_are_refused(start):
    with pytest.raises(ValueError, match="--init is empty"):
        train_calibration.main(Config())
    checkpoint.save_hf(random_model(), TOKENIZER, Path("out/dummy/step_000001"))
    with pytest.raises(ValueError, match="would delete its own start"):
        train_calibration.main(Config(init="out/dummy"))
    with pytest.raises(ValueError, match="--source=verbal: no answer states a confidence"):
        train_calibration.main(Config(**some(start, method="platt", source="verbal")))


def test_answers_are_sampled_once_and_from_one_setting(start):
    """A random model is never right, which the script says; its answers stay, and another run of the name takes them or says what differs."""
    values = dict(init=start, name="dummy/a", data="math_en", num_prompts=6, num_samples=2, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"are right: .*--data"):
        train_calibration.main(Config(**values))
    files = {p: p.stat().st_mtime_ns for p in Path("out/dummy/a/graded").rglob("*.jsonl")}
    lines = [json.loads(line) for p in files for line in p.read_text().splitlines()]
    assert len(lines) == 12 and all(sum(line["mask"]) <= 3 and line["prompt_ids"] for line in lines)
    with pytest.raises(ValueError, match=r"are right: .*--data"):
        train_calibration.main(Config(**values))
    assert files == {p: p.stat().st_mtime_ns for p in Path("out/dummy/a/graded").rglob("*.jsonl")}
    with pytest.raises(OSError, match="other num_samples, temperature than"):                  # of all ranks, so that none waits
        train_calibration.main(Config(**values | dict(num_samples=1, answer_temperature=.5)))


def test_sets_by_level_and_of_another_kind():
    sets, _ = train_calibration.open_sets(Config(data="math_en", ood="math_en@test_template,math_ko", hold_out_levels="4", num_prompts=60, num_ood=5))
    assert list(sets)[0] == "in domain" and set(sets) == {"in domain", "level 4", "math_en@test_template", "math_ko"}
    assert {p.hidden["level"] for p in sets["in domain"]} == {1, 2, 3} and {p.hidden["level"] for p in sets["level 4"]} == {4}
    assert [len(sets[name]) for name in ("level 4", "math_en@test_template", "math_ko")] == [5, 5, 5]
    with pytest.raises(ValueError, match="no problem of --data=math_en has level 9"):
        train_calibration.open_sets(Config(data="math_en", hold_out_levels="9", num_prompts=6))


# -----------------------------------------------------------------------------
# The gradient does not depend on how the batch is cut, nor a run on whether it was stopped


class Enough(Exception):
    pass


def gradients(settings, after):
    """The gradient of the update number `after`, where the run ends."""
    found, clip = [], train_calibration.clip_grad_norm

    def probe(model, max_norm):
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if len(found) == after:
            raise Enough
        return clip(model, max_norm)
    train_calibration.clip_grad_norm = probe
    try:
        train_calibration.main(Config(**settings))
    except Enough:
        return found[-1]
    finally:
        train_calibration.clip_grad_norm = clip


PROBE = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[3])
from test_train_calibration import gradients
found = [gradients(settings, 1) for settings in json.loads(sys.argv[1])]
if os.environ["RANK"] == "0":
    torch.save(found, sys.argv[2])
"""


def test_the_gradient_is_equal_for_every_micro_batch_and_two_ranks(start, tmp_path):
    """Of the second update, when answers have moved and the divergence counts; resumed after the first with the batch of 15 cut otherwise."""
    values = some(start, save_every=1, device_batch_size=4, lr=1e-2)
    cases = {"query": values | dict(name="dummy/query"), "shared": values | dict(name="dummy/shared", adapter="shared", both_orders=True),
             "all weights": values | dict(name="dummy/all", adapter="shared", lora_rank=0, jsd_coef=2.0)}
    whole = {name: gradients(settings, 2) for name, settings in cases.items()}
    resumed = [settings | dict(resume="latest") for settings in cases.values()]
    found = [[gradients(settings | dict(device_batch_size=size), 1) for settings in resumed] for size in (1, 16)]
    (tmp_path / "probe.py").write_text(PROBE)
    run(str(tmp_path / "probe.py"), json.dumps(resumed), str(tmp_path / "found.pt"), str(ROOT / "tests"), ranks=2)
    found.append(torch.load(tmp_path / "found.pt", weights_only=True))
    for other in found:
        for name, b in zip(cases, other, strict=True):
            a = whole[name]
            largest = max(g.abs().max().item() for g in a.values())
            assert a.keys() == b.keys() and largest > 1e-4, name
            assert all((a[n] - b[n]).abs().max() <= 1e-4 * largest for n in a), (name, [(a[n] - b[n]).abs().max() / largest for n in a])
    assert all(n.endswith(("lora_A", "lora_B")) for n in whole["query"]) and "lm_head.weight" in whole["all weights"]


def test_kill_9_and_resume_is_exact(start, quick):
    """A run of six steps, killed once the third is saved: weights, adapter, moments, metrics, tables and calibration.json are bitwise those of one that
    never stopped."""
    values = some(start, num_steps=6, save_every=3, eval_every=2, adapter="shared", both_orders=True, warmup_steps=2)
    train_calibration.main(Config(**values, name="dummy/whole"))
    process = run(str(ROOT / "train_calibration.py"), *flags(**values, name="dummy/killed"), wait=False)
    deadline = time.monotonic() + 300
    while not Path("out/dummy/killed/step_000003").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()[-3000:] if process.poll() is not None else "too slow"
        time.sleep(.005)
    kill_9(process)
    train_calibration.main(Config(**values, name="dummy/killed", resume="out/dummy/killed/step_000003"))
    assert metrics("dummy/killed") == metrics("dummy/whole") and len(metrics("dummy/whole")) >= 10
    for file in ("model.safetensors", "unmerged.safetensors"):
        a, b = (load_file(f"out/dummy/{name}/step_000006/{file}") for name in ("whole", "killed"))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    a, b = (torch.load(f"out/dummy/{name}/step_000006/optim_rank0.pt", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(x["state"][i][k], y["state"][i][k]) for x, y in zip(a, b, strict=True) for i in x["state"] for k in x["state"][i])
    for file in ("results.json", "report.md", "step_000006/calibration.json"):
        assert Path(f"out/dummy/killed/{file}").read_text() == Path(f"out/dummy/whole/{file}").read_text()
    with pytest.raises(ValueError, match="lr was 0.001, found 0.002"):
        train_calibration.main(Config(**values | dict(lr=2e-3), name="dummy/killed", resume="latest"))


# -----------------------------------------------------------------------------
# What training leaves


def test_with_an_adapter_for_the_query_answers_stay(start):
    """Exported weights are the start's bit by bit, and so are greedy answers with the adapter loaded; what the table says is what the checkpoint states."""
    values = some(start, lr=1e-2, num_steps=8, test_share=.1, fit_share=.2)
    summary = train_calibration.main(Config(**values))
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (start, summary["checkpoint"]))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    before, after = checkpoint.load_hf(start)[0], checkpoint.load_hf(summary["checkpoint"])[0]
    known = confidence.load(summary["checkpoint"], after)
    prompts = [TOKENIZER.render_prompt([dict(role="user", content=f"Say {i}")]) for i in range(3)]
    x, y = ([r.ids for group in generate(m, TOKENIZER, prompts, max_new_tokens=12, temperature=0.0) for r in group] for m in (before, after))
    assert x == y and max(map(len, x)) > 4
    g = read_graded("graded/in domain", Config(**values), None).of("test")
    p = known.of(after, TOKENIZER, g.items)
    results = json.loads(Path("out/dummy/results.json").read_text())["in domain"]
    assert np.std(p) > 1e-3 and calibration.brier(calibration.tally(p, g.right)) == pytest.approx(results["scores"][summary["method"]]["brier"]["value"], abs=1e-6)
    assert results["abstention"]["coverage"] == pytest.approx(np.mean(np.array(p) >= known.threshold), abs=1.5 / len(p))
    assert set(known.slopes) <= {"query", "logprob"} and known.lora_rank == 2 and known.query == QUERY
    moved = load_file(Path(summary["checkpoint"]) / "unmerged.safetensors")
    assert max(moved[n].abs().max() for n in moved if n.endswith("lora_B")) > 1e-3
    report = Path("out/dummy/report.md").read_text()
    assert "| constant |" in report and "| query |" in report and "| logprob |" in report and "| ct |" in report and Path("out/dummy/calibration.png").exists()


@pytest.mark.parametrize("rank", [2, 0])
def test_shared_weights_move_and_are_held(start, quick, rank):
    """The divergence from the start is 0 before the first update and not after; the same run pulled harder ends nearer to where it began."""
    values = some(start, adapter="shared", lora_rank=rank, num_steps=4, lr=3e-3, both_orders=bool(rank))
    ends = []
    for coef in (.1, 10.0):
        summary = train_calibration.main(Config(**values | dict(jsd_coef=coef)))
        lines = [line for line in metrics() if "train/jsd" in line]
        assert abs(lines[0]["train/jsd"]) < 1e-7 < 1e-6 < lines[1]["train/jsd"]
        assert all(line["train/loss"] == pytest.approx(line["train/ce"] + coef * line["train/jsd"], rel=1e-5) for line in lines)
        a, b = (load_file(Path(folder) / "model.safetensors") for folder in (start, summary["checkpoint"]))
        assert not all(torch.equal(a[n], b[n]) for n in a)
        known = confidence.load(summary["checkpoint"], checkpoint.load_hf(summary["checkpoint"])[0])
        assert known.lora_rank == 0 and known.both_orders == bool(rank)                         # one set of weights: nothing to switch on
        ends.append(lines[-1]["train/jsd"])
    assert ends[1] < ends[0]


def test_rescaling_alone_trains_nothing(start, quick):
    """The checkpoint is the start and a calibration.json; a slope or an order that does not exist falls back to the source as it is."""
    values = some(start, source="logprob")
    for method in ("none", "platt", "temperature"):
        summary = train_calibration.main(Config(**values | dict(method=method)))
        a, b = (load_file(Path(folder) / "model.safetensors") for folder in (start, summary["checkpoint"]))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) and summary["steps"] == 0
        known = confidence.load(summary["checkpoint"], checkpoint.load_hf(summary["checkpoint"])[0])
        assert list(known.slopes) == ["logprob"] and known.lora_rank == 0 and (summary["method"] == "logprob") == ((known.slopes["logprob"], known.offset) == (1.0, 0.0))


# -----------------------------------------------------------------------------
# Known optimum

RIGHT = (.1, .3, .5, .7, .95)


def kinds(start, seed, num):
    """Five kinds of questions, answered alike, right with fixed probabilities: only the kind says how sure one can be."""
    rng = np.random.default_rng(seed)
    rows = [(f"Kind {i % 5}: {i}", "ok", "right" if rng.random() < RIGHT[i % 5] else "wrong") for i in range(num)]
    return dict(init=start, graded=graded_folder(start, rows), query=QUERY, seed=seed, with_logprob=False, num_resamples=100, test_share=.2, fit_share=.05, batch_size=64,
                device_batch_size=64, lr=5e-3, warmup_steps=5)


@pytest.mark.parametrize("seed", range(5) if FULL else [0])
def test_the_known_optimum(start, quick, seed):
    """Brier within .005 and AUROC within .02 of the oracle that states each kind's probability, on the same answers. Measured: .0003 and .0002 at seed 0."""
    values = kinds(start, seed, 6000)
    summary = train_calibration.main(Config(**values, num_steps=120))
    g = read_graded("graded/in domain", Config(**values), None).of("test")
    oracle = calibration.metrics(calibration.tally([RIGHT[int(json.loads(item.prompt)[5])] for item in g.items], g.right))
    found = json.loads(Path("out/dummy/results.json").read_text())["in domain"]["scores"]
    for method in ("ct", "ct + platt"):
        assert found[method]["brier"]["value"] <= oracle["brier"] + .005 and found[method]["auroc"]["value"] >= oracle["auroc"] - .02, (method, found[method], oracle)
    assert summary["method"] == "ct + platt" and found["constant"]["brier"]["value"] > oracle["brier"] + .05         # there was something to learn


@pytest.mark.parametrize("seed", range(5) if FULL else [0])
def test_shuffled_grades_end_without_skill(start, quick, seed):
    """A leak of the grade into the sequence, or of test prompts into training, would show here."""
    train_calibration.main(Config(**kinds(start, seed, 3000), num_steps=40, shuffle_grades=True))
    found = json.loads(Path("out/dummy/results.json").read_text())["in domain"]["scores"]
    assert found["ct"]["bss"]["value"] <= .02


def test_what_is_only_tested_on_is_fitted_on_nowhere():
    item = lambda prompt: Item([1, 2], [0, 1], True, "", prompt)
    graded = {"in domain": Graded([item("a"), item("b"), item("c")], [1, 0, 1], ["train", "fit", "test"]), "other": Graded([item("c"), item("d")], [1, 0], ["test"] * 2)}
    check_overlap(graded)                                            # c is only tested on, twice
    graded["other"].items.append(item("b"))
    with pytest.raises(ValueError, match="1 prompts of other are among those that are trained on or fitted on"):
        check_overlap(graded)
