"""Merges against arithmetic by hand and float64 loops; what must not be merged is refused by name; the result is a checkpoint like any other."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import merge
from engine import generate
from model import Transformer, add_lora, config_for_size, make_optimizers
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
NANO = config_for_size("nano", 272)
tokenizer = Tokenizer.bytes()
METHODS = [("linear", {}), ("task", dict(lam=0.5)), ("ties", dict(density=1.0)), ("ram", {}), ("ram_plus", {})]


def tensors(*shape, num=2, scale=0.1, seed=0):
    """A base and models around it, fp32, with exponents of all kinds."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g) * torch.exp(3 * torch.randn(shape, generator=g))
    return base, [base + scale * torch.randn(shape, generator=g) for _ in range(num)]


# -----------------------------------------------------------------------------
# By hand


def test_ties_by_hand():
    """base 0; kept are the top 3 of 6 by magnitude:
        tau_1 =  4   -1   3  .5  -2   0        kept   4   .   3   .  -2   .
        tau_2 = -3    2   1   6   .2  0        kept  -3   2   .   6   .   .
        sum                                           1   2   3   6  -2   0
        mean of the kept entries of that sign         4   2   3   6  -2   0        (entry 0: only tau_1 has the elected sign)
    """
    base, a, b = torch.zeros(6), torch.tensor([4, -1, 3, .5, -2, 0]), torch.tensor([-3, 2, 1, 6, .2, 0])
    expected = torch.tensor([4., 2, 3, 6, -2, 0])
    assert torch.equal(merge.ties(base, [a, b], density=0.5), expected)
    assert torch.equal(merge.ties(base + 8, [a + 8, b + 8], density=0.5, lam=0.25), 8 + expected / 4)


def test_ties_takes_the_mean_of_those_that_agree_and_drops_what_cancels():
    """sums 3, 0, 5 at density 1: of 4, 2, -3 the mean of 4 and 2; 2, -1, -1 cancel, the base stays; 6 and -1 give 6, the 0 is no vote."""
    models = [torch.tensor(m) for m in ([4., 2, 6], [2., -1, -1], [-3., -1, 0])]
    assert torch.equal(merge.ties(torch.zeros(3), models, density=1.0), torch.tensor([3., 0, 6]))


def test_equal_magnitudes_are_kept_by_index():
    tau = torch.tensor([[1., -2, 2], [-2, 1, 2]])
    assert merge.largest(tau, 0.5).tolist() == [[False, True, True], [True, False, False]]        # three of the four twos, the first ones
    assert merge.largest(tau, 4 / 6).tolist() == [[False, True, True], [True, False, True]]
    assert merge.largest(tau, 5 / 6).tolist() == [[True, True, True], [True, False, True]]
    assert merge.largest(tau, 1.0).all()
    assert merge.largest(torch.zeros(9), 0.2).tolist() == [True] * 2 + [False] * 7                # 1.8 entries are 2
    assert merge.largest(torch.tensor([1., 5.]), 0.2).tolist() == [False, True]                   # never none
    assert merge.largest(torch.tensor(3.), 0.2).tolist() is True


def test_ram_plus_by_hand():
    """tau_1 = 4 2 0 6, tau_2 = 0 4 8 0 over base 1: entry 1 is shared, entries 0 and 3 are model 1's, entry 2 is model 2's.

    Model 1 has 1 shared of 2 unique, .5; model 2 1 of 1, 1. With r .5, alpha .75 their factors are 1.25 and 1 + .5 * .75 = 1.375:
        1 + 4 * 1.25 = 6      1 + (2 + 4) / 2 = 4      1 + 8 * 1.375 = 12      1 + 6 * 1.25 = 8.5
    """
    base, models = torch.ones(4), [torch.tensor([5., 3, 1, 7]), torch.tensor([1., 5, 9, 1])]
    assert torch.equal(merge.ram_plus(base, models, rescale=0.5, alpha=0.75), torch.tensor([6, 4, 12, 8.5]))
    assert torch.equal(merge.ram(base, models), torch.tensor([5., 4, 9, 7]))
    # without a unique entry there is nothing to scale, and no division by zero
    assert torch.equal(merge.ram_plus(base, [models[0], models[0]], rescale=0.5), models[0])
    assert torch.equal(merge.ram_plus(base, [models[0], base], rescale=0.5), models[0])


def test_task_and_linear_by_hand():
    base, models = torch.tensor([1., -2]), [torch.tensor([3., -2]), torch.tensor([2., 2])]
    assert torch.equal(merge.task(base, models, lam=0.5), torch.tensor([1 + .5 * (2 + 1), -2 + .5 * 4]))
    assert torch.equal(merge.linear(base, models, [0.75, 0.25]), torch.tensor([2.75, -1]))
    assert torch.equal(merge.linear(base, models), torch.tensor([2.5, 0]))


def test_a_change_at_the_threshold_is_no_change():
    base, model = torch.zeros(3), torch.tensor([0.125, -0.125, 0.25])
    assert torch.equal(merge.ram(base, [model], threshold=0.125), torch.tensor([0, 0, 0.25]))


# -----------------------------------------------------------------------------
# Identities


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("how, settings", METHODS)
def test_identical_models_give_that_model(how, settings, num):
    """To the bit; ram leaves what changed by less than the threshold, so here all did by more."""
    base, model = tensors(40, 30)[0], tensors(40, 30, seed=1)[0]            # unrelated, so that fp32 differences would not be exact
    model = torch.where((model.double() - base.double()).abs() > 1e-5, model, base)
    settings = dict(lam=1 / num) if how == "task" else settings
    result = merge.METHODS[how][0](base, [model] * num, **settings)
    if how == "ram_plus" and num == 1:
        settings = dict(settings, rescale=0.3)                    # all entries are unique, none shared: the factor stays 1
    assert result.dtype == torch.float32 and torch.equal(result, model)
    assert torch.equal(merge.METHODS[how][0](model, [model] * num, **settings), model)


def test_linear_one_zero_is_the_first_model_to_the_bit():
    base, models = tensors(50, 20)
    models[0][0, 0], base[0, 0] = 1e-30, 1e8                # base + (model - base) would lose it, even in float64
    assert torch.equal(merge.linear(base, models, [1.0, 0.0]), models[0])
    assert torch.equal(merge.linear(base, models, [0.0, 1.0]), models[1])


def test_lam_zero_is_the_base():
    base, models = tensors(50, 20)
    assert torch.equal(merge.task(base, models, lam=0.0), base) and torch.equal(merge.ties(base, models, lam=0.0), base)
    assert not torch.equal(merge.task(base, models, lam=0.01), base)


def test_disjoint_ram_is_base_plus_sum():
    base, models = tensors(64, 8, num=3)
    owner = torch.arange(64 * 8).view(64, 8) % 4                           # the fourth part nobody changed
    models = [torch.where(owner == i, m, base) for i, m in enumerate(models)]
    expected = sum((m.double() - base.double() for m in models), base.double()).float()
    assert torch.equal(merge.ram(base, models, threshold=0.0), expected) and torch.equal(merge.ram_plus(base, models, threshold=0.0), expected)
    assert torch.equal(merge.task(base, models), expected)


@pytest.mark.parametrize("how, settings", [("ties", dict(density=0.3)), ("ram", {}), ("ram_plus", {}), ("task", {}), ("linear", {})])
def test_the_order_of_models_changes_nothing(how, settings):
    base, models = tensors(60, 40, num=3, scale=1e-5 if how.startswith("ram") else 0.1)
    results = [merge.METHODS[how][0](base, [models[i] for i in order], **settings) for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2))]
    for other in results[1:]:                               # thirds are not exact, so there the last bit may differ
        torch.testing.assert_close(results[0], other, rtol=2e-7 if how == "linear" else 0, atol=0)
    assert not any(torch.equal(results[0], m) for m in (base, *models))


# -----------------------------------------------------------------------------
# Loops in float64


def ties_oracle(base, models, density, lam):
    base, taus = base.double().tolist(), [(m.double() - base.double()).tolist() for m in models]
    k = max(1, round(density * len(base)))
    for tau in taus:
        order = sorted(range(len(tau)), key=lambda i: (-abs(tau[i]), i))
        for i in order[k:]:
            tau[i] = 0.0
    result = []
    for i, b in enumerate(base):
        total = sum(tau[i] for tau in taus)
        same = [tau[i] for tau in taus if tau[i] * total > 0]
        result.append(b + lam * (sum(same) / len(same) if same else 0.0))
    return torch.tensor(result, dtype=torch.float64)


def ram_plus_oracle(base, models, r, alpha, threshold):
    base, taus = base.double().tolist(), [(m.double() - base.double()).tolist() for m in models]
    who = [[j for j, tau in enumerate(taus) if abs(tau[i]) > threshold] for i in range(len(base))]
    factor = []
    for j in range(len(taus)):
        shared, unique = sum(j in w and len(w) > 1 for w in who), sum(w == [j] for w in who)
        factor.append(1 + r * min(shared / unique, alpha) if unique else 1.0)
    return torch.tensor([b + (factor[w[0]] * taus[w[0]][i] if len(w) == 1 else sum(taus[j][i] for j in w) / max(1, len(w)))
                         for i, (b, w) in enumerate(zip(base, who))], dtype=torch.float64)


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_float64_oracles(num):
    base, models = tensors(300, num=num, seed=num)
    for m in models:
        m[::3] = base[::3] + (m[::3] - base[::3]) * 1e-4                   # some below the threshold of ram
    for density, lam in ((0.2, 1.0), (0.5, 0.7), (1.0, 1.3)):
        torch.testing.assert_close(merge.ties(base, models, density, lam), ties_oracle(base, models, density, lam).float(), rtol=1e-7, atol=0)
    for r, alpha in ((0.0, 0.2), (0.1, 0.2), (0.5, 3.0)):
        expected = ram_plus_oracle(base, models, r, alpha, 1e-5).float()
        torch.testing.assert_close(merge.ram_plus(base, models, r, alpha), expected, rtol=1e-7, atol=0)
        if r == 0:
            torch.testing.assert_close(merge.ram(base, models), expected, rtol=0, atol=0)
    weights = [1 / 2 ** (i + 1) for i in range(num)]
    weights[-1] += 1 - sum(weights)
    taus = [m.double() - base.double() for m in models]
    torch.testing.assert_close(merge.linear(base, models, weights), (base.double() + sum(w * t for w, t in zip(weights, taus))).float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(merge.task(base, models, 0.4), (base.double() + 0.4 * sum(taus)).float(), rtol=1e-7, atol=0)


def test_whole_models_tensor_by_tensor():
    (a, (a1, a2)), (b, (b1, b2)) = tensors(6, 4), tensors(7, seed=1)
    result = merge.merge(dict(a=a, b=b), [dict(a=a1, b=b1), dict(b=b2, a=a2)], "ties", density=0.5)
    assert torch.equal(result["a"], merge.ties(a, [a1, a2], 0.5)) and torch.equal(result["b"], merge.ties(b, [b1, b2], 0.5))
    with pytest.raises(ValueError, match="model 2: 1 tensors are missing, among them b"):
        merge.merge(dict(a=a, b=b), [dict(a=a1, b=b1), dict(a=a2)])
    with pytest.raises(ValueError, match=r"model 1: a has shape \[3, 4\], that of the base \[6, 4\]"):
        merge.merge(dict(a=a, b=b), [dict(a=a1[:3], b=b1)])


def test_overlap_by_hand():
    """tau_1 = 3 4 0 0, tau_2 = -3 4 0 5 and the merge 0 4 0 5: cosine (-9 + 16) / (5 sqrt 50); both active in 2 of 3; one sign in 1 of 2."""
    overlap = merge.Overlap(2, 1e-5)
    for half in (slice(0, 2), slice(2, 4)):                                # sums over tensors
        overlap.add(torch.full((2,), 3.0), torch.tensor([[3., 4, 0, 0], [-3, 4, 0, 5]])[:, half].double(), torch.tensor([0., 4, 0, 5])[half].double())
    assert overlap.of_pair(0, 1) == dict(models=[1, 2], cosine=pytest.approx(7 / (5 * 50 ** 0.5)), overlap=pytest.approx(2 / 3), sign_agreement=0.5)
    assert overlap.of_model(0) == dict(active=0.5, norm=5.0, cosine_with_merge=pytest.approx(16 / (5 * 41 ** 0.5)))
    assert overlap.base_square == 36.0


# -----------------------------------------------------------------------------
# Checkpoints


def nano(seed, shift=0.0, config=NANO):
    """Weights that depend on both: a run that started at seed 0 and went `shift` far."""
    model, noise = Transformer(config).init_weights(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += shift * torch.randn(p.shape, generator=noise)
    return model


@pytest.fixture
def folders(tmp_path):
    """base, b and c as checkpoint.save_hf writes them."""
    for name, shift, seed in (("base", 0.0, 0), ("b", 0.01, 1), ("c", 0.02, 2)):
        checkpoint.save_hf(nano(seed, shift), tokenizer, tmp_path / name)
    return tmp_path


def run(folders, **flags):
    given = dict(base=str(folders / "base"), models=f"{folders}/b,{folders}/c", out=str(folders / "out")) | flags
    return merge.main(merge.Config(**given))


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("how", list(merge.METHODS))
def test_end_to_end(how, folders, capsys):
    """What is written is what the functions give, loads as any checkpoint, and answers."""
    record = run(folders, how=how)
    expected = merge.merge(weights(folders / "base"), [weights(folders / "b"), weights(folders / "c")], how)
    found = weights(folders / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    model, tok = checkpoint.load_hf(checkpoint.newest(folders / "out"))
    assert tok.fingerprint() == tokenizer.fingerprint() and model.config == NANO
    rollout = generate(model, tok, [tok.encode("2+2=")], max_new_tokens=4, temperature=0.0)[0][0]
    assert 1 <= len(rollout.ids) <= 4
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["merged"] == record["merged"] and "models 1 and 2  cosine" in printed
    assert json.loads((folders / "out/merge.json").read_text()) == json.loads(json.dumps(record))
    assert record["merged"]["hash"] == checkpoint.weights_hash(folders / "out") and record["how"] == how
    assert sorted(p.name for p in folders.iterdir()) == ["b", "base", "c", "out"]                  # nothing temporary is left


def test_what_is_recorded(folders, capsys):
    record = run(folders, how="task", lam=0.5, threshold=0.005)
    for i, name in enumerate(("b", "c")):
        m = record["models"][i]
        assert (m["path"], m["hash"], m["start"]) == (str(folders / name), checkpoint.weights_hash(folders / name), None)
    # changes are normal with sigma .01 and .02: beyond .005 lie P(|z| > .5) = .617 and P(|z| > .25) = .803; independent, so cosine 0, signs .5
    assert record["models"][0]["active"] == pytest.approx(0.617, abs=0.01) and record["models"][1]["active"] == pytest.approx(0.803, abs=0.01)
    pair, = record["pairs"]
    assert abs(pair["cosine"]) < 0.02 and pair["sign_agreement"] == pytest.approx(0.5, abs=0.02)
    assert pair["overlap"] == pytest.approx(.617 * .803 / (.617 + .803 - .617 * .803), abs=0.01)
    # (b + c) / 2: cosines 1 : 2 over sqrt 5
    assert record["models"][0]["cosine_with_merge"] == pytest.approx(5 ** -0.5, abs=0.02)
    assert record["models"][1]["cosine_with_merge"] == pytest.approx(2 * 5 ** -0.5, abs=0.02)
    assert "active 0.6" in capsys.readouterr().out


def test_tied_embeddings(tmp_path):
    config = replace(NANO, tie_embeddings=True)
    for name, shift, seed in (("base", 0.0, 0), ("b", 0.01, 1), ("c", 0.02, 2)):
        checkpoint.save_hf(nano(seed, shift, config), tokenizer, tmp_path / name)
    b = weights(tmp_path / "b")
    assert "lm_head.weight" not in b
    before = checkpoint.weights_hash(tmp_path / "b")
    save_file(b | {"lm_head.weight": b["model.embed_tokens.weight"].clone()}, tmp_path / "b/model.safetensors")        # an exporter wrote it twice
    assert checkpoint.weights_hash(tmp_path / "b") == before
    run(tmp_path, how="linear", weights="1,0")
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[n], b[n]) for n in b) and found.keys() == b.keys()
    model, _ = checkpoint.load_hf(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_lora_runs_merge_by_what_they_do_to_the_weights(tmp_path):
    """The dense change is scale * BA for each run; averages of A and of B would be another matrix."""
    base = nano(0)
    checkpoint.save_hf(base, tokenizer, tmp_path / "base")
    expected = {n: p.detach().double().clone() for n, p in base.named_parameters()}
    for name, seed in (("b", 1), ("c", 2)):
        model = add_lora(nano(0), 4, alpha=8.0, seed=seed)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith("lora_B"):
                    p.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
        parts = {n: p.detach().double() for n, p in model.named_parameters()}
        for n in expected:
            stem = n.removesuffix("weight")
            if stem + "lora_A" in parts:
                expected[n] += 0.5 * 2.0 * parts[stem + "lora_B"] @ parts[stem + "lora_A"]
        checkpoint.save(tmp_path / name, 3, model, tokenizer, make_optimizers(model, lr=0.01), state={}, config={})
    record = run(tmp_path, how="linear")
    found = weights(tmp_path / "out")
    assert record["models"][0]["folder"].endswith("b/step_000003") and 0.3 < record["models"][0]["active"] < 1
    for n in expected:
        torch.testing.assert_close(found[n].double(), expected[n], rtol=0, atol=1e-6)
    assert not torch.allclose(found["model.layers.0.mlp.up_proj.weight"], base.model.layers[0].mlp.up_proj.weight, atol=1e-3)


def test_bf16_files_are_warned_about_and_the_result_is_fp32(folders, capsys):
    half = {n: t.bfloat16() for n, t in weights(folders / "b").items()}
    save_file(half, folders / "b/model.safetensors")
    run(folders, how="linear", weights="1,0")
    notes = [line for line in capsys.readouterr().out.splitlines() if "is stored in BF16" in line]
    assert len(notes) == 1 and notes[0].startswith(f"note: {folders / 'b'} ")
    found = weights(folders / "out")
    assert all(found[n].dtype == torch.float32 and torch.equal(found[n], half[n].float()) for n in half)


def test_sharded_folders_of_hugging_face(folders):
    w = weights(folders / "b")
    names = sorted(w)
    files = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: w[n] for n in names if files[n] == file}, folders / "b" / file)
    (folders / "b/model.safetensors").unlink()
    (folders / "b/model.safetensors.index.json").write_text(json.dumps(dict(weight_map=files)))
    run(folders, how="linear", weights="1,0")
    assert all(torch.equal(t, w[n]) for n, t in weights(folders / "out").items())


def test_dry_run_writes_nothing(folders, capsys):
    record = run(folders, out="", dry_run=True)
    assert record["pairs"][0]["models"] == [1, 2] and sorted(p.name for p in folders.iterdir()) == ["b", "base", "c"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == ""


# -----------------------------------------------------------------------------
# The hash of weights, and what a run recorded of its start


def test_weights_hash(folders):
    model, _ = checkpoint.load_hf(folders / "b")
    h = checkpoint.weights_hash(folders / "b")
    assert h == checkpoint.weights_hash(dict(model.named_parameters())) == checkpoint.weights_hash(model.state_dict()) and len(h) == 32
    w = weights(folders / "b")
    assert checkpoint.weights_hash(dict(reversed(w.items()))) == h != checkpoint.weights_hash(folders / "c")
    w["model.norm.weight"][3] += 1e-6
    assert checkpoint.weights_hash(w) != h
    same_bytes = weights(folders / "b")
    same_bytes["model.embed_tokens.weight"] = same_bytes["model.embed_tokens.weight"].view(-1, 32)
    assert checkpoint.weights_hash(same_bytes) != h
    half = {n: t.bfloat16() for n, t in w.items()}                         # values count, not how they are stored
    assert checkpoint.weights_hash(half) == checkpoint.weights_hash({n: t.float() for n, t in half.items()})


def save_run(folder, model, state=(), config=()):
    return checkpoint.save(folder, 7, model, tokenizer, make_optimizers(model, lr=0.01), state=dict(state), config=dict(config))


@pytest.mark.parametrize("place", ["state", "config"])
def test_a_run_from_another_base_is_refused(place, folders, capsys):
    right, wrong = checkpoint.weights_hash(folders / "base"), checkpoint.weights_hash(folders / "c")
    save_run(folders / "good", nano(3, 0.01), **{place: dict(init_hash=right)})
    record = run(folders, models=str(folders / "good"))
    assert record["models"][0]["start"] == right and "note:" not in capsys.readouterr().out
    save_run(folders / "bad", nano(3, 0.01), **{place: dict(init_hash=wrong)})
    models = f"{folders}/good,{folders}/bad"
    with pytest.raises(ValueError, match=f"bad/step_000007 started from other weights .*{wrong}.* than those of .*base .*{right}.*--any_base"):
        run(folders, models=models, out=str(folders / "out2"))
    assert not (folders / "out2").exists()
    run(folders, models=models, out=str(folders / "out2"), any_base=True)


def test_no_record_of_the_start_is_a_note(folders, capsys):
    save_run(folders / "old", nano(3, 0.01), config=dict(init="out/sft"))
    save_run(folders / "scratch", nano(3, 0.01), config=dict(init=""))
    run(folders, models=f"{folders}/old,{folders}/b,{folders}/scratch")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 3 and "old/step_000007 does not record the weights it started from (its --init was out/sft)" in notes[0]
    assert f"{folders}/b does not record the weights it started from: --base" in notes[1] and "scratch/step_000007" in notes[2] and "random" in notes[2]


def test_a_merge_can_be_merged_again(folders, capsys):
    run(folders)
    run(folders, models=f"{folders}/out,{folders}/b", out=str(folders / "again"), how="ram")
    with pytest.raises(ValueError, match="out started from other weights"):
        run(folders, base=str(folders / "c"), models=f"{folders}/out,{folders}/b", out=str(folders / "third"))


# -----------------------------------------------------------------------------
# Refusals


def spoil(folder, name, change):
    w = weights(folder)
    change(w)
    save_file(w, folder / "model.safetensors")


REFUSED = [
    (lambda f: spoil(f / "c", "", lambda w: w.pop("model.norm.weight")), "c: 1 tensors are missing, among them model.norm.weight"),
    (lambda f: spoil(f / "c", "", lambda w: w.update({"model.extra": torch.ones(2)})), "c: 1 tensors are not in the base, among them model.extra"),
    (lambda f: spoil(f / "c", "", lambda w: w.update({"model.norm.weight": torch.ones(63)})), r"c: model.norm.weight has shape \[63\], that of the base \[64\]"),
    (lambda f: spoil(f / "c", "", lambda w: w["lm_head.weight"][5].fill_(float("nan"))), "c: lm_head.weight holds NaN or infinity"),
    (lambda f: spoil(f / "base", "", lambda w: w["lm_head.weight"][5, :1].fill_(float("inf"))), "base: lm_head.weight holds NaN or infinity"),
    (lambda f: checkpoint.save_hf(nano(0, config=replace(NANO, vocab_size=280)), tokenizer, f / "c"), r"c is another model than .*: vocab_size 280 \(base: 272\)"),
    (lambda f: checkpoint.save_hf(nano(0, config=replace(NANO, rope_theta=5e5)), tokenizer, f / "c"), r"c is another model than .*: rope_theta 500000.0 \(base: "),
    (lambda f: (f / "c/config.json").unlink(), "c: no config.json there"),
    (lambda f: os.truncate(f / "c/model.safetensors", 5000), "c/model.safetensors: cannot be read"),
]


@pytest.mark.parametrize("damage, message", REFUSED, ids=["missing", "extra", "shape", "nan", "inf-base", "vocab", "rope", "no-config", "truncated"])
def test_what_cannot_be_merged_is_refused(damage, message, folders):
    damage(folders)
    with pytest.raises(ValueError, match=message):
        run(folders)
    assert not (folders / "out").exists() and not (folders / "out.tmp").exists()


def test_another_tokenizer_is_refused(folders):
    """The same number of tokens, but two of them with their ids swapped."""
    file = folders / "c/tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[65:67]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="c: its tokenizer is not that of"):
        run(folders)


FLAGS = [
    (dict(base=""), "--base, --models and --out are needed"), (dict(models=","), "--base, --models and --out are needed"),
    (dict(out=""), "--base, --models and --out are needed"), (dict(density=0.0), "--density=0.0: expected a share above 0"),
    (dict(density=1.5), "--density=1.5"), (dict(how="ram", lam=0.5), "--lam has no effect on --how=ram, which reads --threshold"),
    (dict(weights=".5,.5"), "--weights has no effect on --how=ties"), (dict(how="linear", weights=".7,.4"), "expected 2 numbers with sum 1, one per model, found 0.7, 0.4"),
    (dict(how="linear", weights="1"), "expected 2 numbers with sum 1"), (dict(how="linear", weights="a,b"), "--weights=a,b: expected 2 numbers"),
    (dict(how="task", lam=float("inf")), "--lam=inf"), (dict(how="ram", threshold=-1.0), "--threshold=-1.0"), (dict(how="linear", weights="nan,1"), "sum 1"),
]


@pytest.mark.parametrize("flags, message", FLAGS, ids=[m for _, m in FLAGS])
def test_flags_are_refused_by_name(flags, message, folders):
    with pytest.raises(ValueError, match=message):
        run(folders, **flags)
    assert not (folders / "out").exists()


def test_a_merge_that_overflows_is_refused(folders):
    with pytest.raises(ValueError, match="the result of --how=task: .* holds NaN or infinity"):
        run(folders, how="task", lam=1e300)


def test_nothing_but_an_earlier_merge_is_replaced(folders, monkeypatch):
    save_run(folders / "logic", nano(3, 0.01))
    before = {p: p.stat().st_mtime_ns for p in sorted(folders.rglob("*"))}
    for out in ("base", "b", "logic", "", "logic/step_000007"):            # an input, a run that holds one, all of them
        with pytest.raises(ValueError, match="holds the checkpoint .*, which is to be merged: give another folder"):
            run(folders, models=f"{folders}/b,{folders}/logic", out=str(folders / out))
    with pytest.raises(ValueError, match="c exists and was not made by merge.py"):
        run(folders, models=str(folders / "b"), out=str(folders / "c"), overwrite=True)
    assert before == {p: p.stat().st_mtime_ns for p in sorted(folders.rglob("*"))}
    run(folders, how="ram")
    first = (folders / "out/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="out holds an earlier merge: --overwrite replaces it"):
        run(folders, how="ties")
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        run(folders, how="ties", overwrite=True)
    assert (folders / "out/model.safetensors").read_bytes() == first and not (folders / "out.tmp").exists()
    monkeypatch.undo()
    run(folders, how="ties", overwrite=True)
    assert json.loads((folders / "out/merge.json").read_text())["how"] == "ties" and (folders / "out/model.safetensors").read_bytes() != first


def test_command_line(folders):
    script = [sys.executable, str(ROOT / "merge.py"), f"--base={folders}/base"]
    bad = subprocess.run([*script, f"--models={folders}/b,{folders}/nowhere", f"--out={folders}/out"], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr == (f"merge.py: {folders}/nowhere: no config.json there; expected a checkpoint folder, of ours "
                                                  "(out/<name>/step_...) or of Hugging Face\n")
