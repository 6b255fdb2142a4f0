"""Step folders: what is saved comes back bit by bit, what is damaged or foreign is refused by name, and a full disk loses nothing."""
import atexit
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

import checkpoint
from common import all_reduce_sum, setup_distributed
from model import ModelConfig, Muon, Transformer, add_lora, config_for_size, make_optimizers, parallelize
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ModelConfig(vocab_size=272, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=12, qk_norm=True)
STATE = dict(step=3, tokens_seen=17, loader={"order": [2, 0, 1], "share": 0.1})
tokenizer = Tokenizer.bytes()


def new_run(muon_lr=0.02, lora=0, config=CONFIG, lr=0.01):
    model = Transformer(config).init_weights(0)
    if lora:
        add_lora(model, lora, alpha=4.0)
    return model, make_optimizers(model, lr=lr, muon_lr=muon_lr, weight_decay=0.1)


def train(model, optimizers, steps):
    for step in steps:
        ids = torch.randint(0, 272, (3, 9), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(F.linear(model(ids[:, :-1]), model.lm_head.weight).flatten(0, 1), ids[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - step / 10)
            optimizer.step()
            optimizer.zero_grad()


def save(out_dir, step, model, optimizers, **more):
    return checkpoint.save(out_dir, step, model, tokenizer, optimizers, state=STATE, config=dict(lr=0.01), **more)


def load(path, muon_lr=0.02, lora=0, lr=0.01):
    """What a script does with --resume."""
    model, _ = checkpoint.load_hf(path)
    if lora:
        add_lora(model, lora, alpha=4.0, seed=99)
        checkpoint.restore_lora(path, model)
    optimizers = make_optimizers(model, lr=lr, muon_lr=muon_lr, weight_decay=0.1)
    return model, optimizers, checkpoint.restore(path, model, optimizers)


def saved_run(out_dir, step=3, **kind):
    model, optimizers = new_run(**kind)
    train(model, optimizers, range(2))
    return save(out_dir, step, model, optimizers)


def assert_same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


# -----------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("kind", [
    dict(muon_lr=0.0), dict(muon_lr=0.02), dict(muon_lr=0.0, lora=2), dict(muon_lr=0.02, lora=2),
    dict(config=replace(CONFIG, tie_embeddings=True)), dict(config=replace(CONFIG, qk_norm=False, qkv_bias=True)),
], ids=["adamw", "muon", "lora-adamw", "lora-muon", "tied", "bias"])
def test_stop_and_resume_is_bitwise_no_stop(kind, tmp_path):
    model, optimizers = new_run(**kind)
    train(model, optimizers, range(3))
    path = save(tmp_path, 3, model, optimizers)
    train(model, optimizers, range(3, 6))                                  # the run that was never stopped

    kind.pop("config", None)
    assert checkpoint.find(tmp_path, "latest") == path == tmp_path / "step_000003"
    again, optimizers_again, state = load(path, **kind)
    assert state == STATE
    train(again, optimizers_again, range(3, 6))
    assert_same(model, again)
    for a, b in zip(optimizers, optimizers_again):
        a, b = a.state_dict(), b.state_dict()
        assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
        for i in a["state"]:
            assert all(torch.equal(a["state"][i][k], b["state"][i][k]) for k in a["state"][i])
            assert any(v.ndim and v.abs().sum() > 0 for v in a["state"][i].values())


def test_what_a_step_folder_holds(tmp_path):
    path = saved_run(tmp_path)
    files = ["config.json", "model.safetensors", "optim_rank0.pt", "tokenizer.json", "tokenizer_config.json", "train.json"]
    assert names(path) == files and names(tmp_path) == ["step_000003"]
    record = json.loads((path / "train.json").read_text())
    assert record["step"] == 3 and record["state"] == STATE and record["config"] == dict(lr=0.01)
    assert record["files"] == {f: (path / f).stat().st_size for f in files if f != "train.json"}


def test_lora_exports_merged_and_keeps_the_parts(tmp_path):
    model, optimizers = new_run(lora=2)
    train(model, optimizers, range(2))
    path = save(tmp_path, 2, model, optimizers)
    ids = torch.arange(20)[None]
    merged, _ = checkpoint.load_hf(path)                                   # as anyone else reads it
    assert not any("lora" in n for n, _ in merged.named_parameters())
    torch.testing.assert_close(merged.logits(ids), model.logits(ids), rtol=1e-5, atol=1e-6)
    assert (merged.logits(ids) - new_run()[0].logits(ids)).abs().max() > 1e-3
    parts = load_file(path / "unmerged.safetensors")
    assert all(torch.equal(parts[n], p) for n, p in model.named_parameters())


def test_extra_tensors(tmp_path):
    model, optimizers = new_run()
    extra = {"target.weight": torch.randn(3, 4), "count": torch.tensor([7])}
    path = save(tmp_path, 1, model, optimizers, extra=extra)
    found = checkpoint.load_extra(path)
    assert found.keys() == extra.keys() and all(torch.equal(found[n], extra[n]) for n in extra)


def test_rates_are_those_of_this_run(tmp_path):
    """Moments come from the checkpoint, --lr from the command line: the log says `resuming with --lr=...`, and so it is."""
    path = saved_run(tmp_path)
    _, optimizers, _ = load(path, lr=0.5, muon_lr=0.25)
    assert [g["initial_lr"] for o in optimizers for g in o.param_groups] == [0.5, 0.5, 0.25]
    assert [g["lr"] for o in optimizers for g in o.param_groups] == [0.5, 0.5, 0.25]
    assert all(s["step"] == 2 for s in optimizers[0].state.values())


def test_saving_a_step_again_replaces_it(tmp_path):
    saved_run(tmp_path)
    model, optimizers = new_run()
    path = save(tmp_path, 3, model, optimizers)
    assert_same(checkpoint.load_hf(path)[0], model)
    assert names(tmp_path) == ["step_000003"]


# -----------------------------------------------------------------------------
# Which checkpoint


def test_find(tmp_path):
    assert checkpoint.find(tmp_path, "") is None
    with pytest.raises(ValueError, match="--resume=latest: .* holds no checkpoint; start without --resume, or check --name"):
        checkpoint.find(tmp_path, "latest")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.find(tmp_path / "nowhere", "latest")
    first = saved_run(tmp_path, step=999_999)
    last = saved_run(tmp_path, step=1_000_000)                             # as text it sorts before the other
    (tmp_path / "step_2000000.tmp").mkdir()
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    assert checkpoint.find(tmp_path, "latest") == last == tmp_path / "step_1000000"
    assert checkpoint.find(tmp_path, str(first)) == first
    for wrong in (tmp_path, tmp_path / "step_notes", tmp_path / "nowhere", tmp_path / "step_2000000.tmp"):
        with pytest.raises(ValueError, match="has no train.json, so it is no finished checkpoint") as e:
            checkpoint.find(tmp_path, str(wrong))
        assert str(wrong) in str(e.value)


def test_newest(tmp_path):
    path = saved_run(tmp_path / "run", step=900)
    last = saved_run(tmp_path / "run", step=1_000)
    assert checkpoint.newest(tmp_path / "run") == last and checkpoint.newest(path) == path
    assert checkpoint.newest(tmp_path) == tmp_path                         # nothing there: load_hf says so by name


def test_clear(tmp_path):
    checkpoint.clear(tmp_path / "nowhere", allowed=False)
    path = saved_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "step_notes.txt").write_text("mine")
    with pytest.raises(ValueError) as e:
        checkpoint.clear(tmp_path, allowed=False)
    assert all(part in str(e.value) for part in (str(tmp_path), "step_000003", "--resume=latest", "--overwrite", "--name"))
    assert path.exists()
    (tmp_path / "step_000004.tmp").mkdir()
    checkpoint.clear(tmp_path, allowed=True)
    assert names(tmp_path) == ["metrics.jsonl", "step_notes.txt"]
    (tmp_path / "step_000005.tmp").mkdir()                                 # what a crash left is no result
    checkpoint.clear(tmp_path, allowed=False)
    assert names(tmp_path) == ["metrics.jsonl", "step_notes.txt"]


# -----------------------------------------------------------------------------
# A failure in the middle


@pytest.mark.parametrize("where", ["save_file", "torch.save", "write_atomically", "mkdir", "rename"])
def test_a_full_disk_loses_nothing(where, tmp_path, monkeypatch):
    good = saved_run(tmp_path)
    model, optimizers = new_run()
    before = {f: (good / f).read_bytes() for f in names(good)}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    target, name = {"save_file": (checkpoint, "save_file"), "torch.save": (torch, "save"), "write_atomically": (checkpoint, "write_atomically"),
                    "mkdir": (Path, "mkdir"), "rename": (os, "replace")}[where]
    monkeypatch.setattr(target, name, full)
    for step in (4, 3):                                                    # a new step, and the same step once more
        with pytest.raises(OSError, match=f"step_00000{step} could not be saved: .*No space left.*earlier checkpoints are untouched"):
            save(tmp_path, step, model, optimizers)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_000003"]
    assert checkpoint.find(tmp_path, "latest") == good
    assert before == {f: (good / f).read_bytes() for f in names(good)}
    load(good)


def limited(out_dir):
    """In a process of its own, which may not write large files from some point on."""
    good = saved_run(out_dir)
    model, optimizers = new_run()
    train(model, optimizers, range(1))
    weights, moments = ((good / f).stat().st_size for f in ("model.safetensors", "optim_rank0.pt"))
    assert 8000 < weights < moments
    for limit in (weights - 4096, (weights + moments) // 2):               # the weights do not fit; the weights do, the moments do not
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="step_000004 could not be saved: .*earlier checkpoints are untouched"):
            save(out_dir, 4, model, optimizers)
        assert names(out_dir) == ["step_000003"]
        assert checkpoint.find(out_dir, "latest") == good
        load(good)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save(out_dir, 4, model, optimizers)


def test_a_failed_swap_loses_nothing(tmp_path, monkeypatch):
    """Saving the same step again moves the old folder aside first; where the new one cannot take its place, the old one comes back."""
    good = saved_run(tmp_path)
    model, optimizers = new_run()
    rename = os.replace

    def no_swap(source, target):
        if Path(source).name == "step_000003.tmp":
            raise OSError(13, "Permission denied")
        rename(source, target)
    monkeypatch.setattr(os, "replace", no_swap)
    with pytest.raises(OSError, match="step_000003 could not be saved: .*Permission denied.*earlier checkpoints are untouched"):
        save(tmp_path, 3, model, optimizers)
    assert names(tmp_path) == ["step_000003"]
    assert all(s["step"] == 2 for s in load(good)[1][0].state.values())    # the old one, which had trained two steps


def test_a_file_size_limit_loses_nothing(tmp_path):
    """The real thing: writes fail below Python, in safetensors and in torch.save, which wrap the error each in its own way."""
    run = subprocess.run([sys.executable, __file__, "limited", tmp_path], env=script_env(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert names(tmp_path) == ["step_000003", "step_000004"]


def test_kill_in_the_middle_of_saving(tmp_path, monkeypatch):
    """kill -9 runs no handler: the temporary folder stays, and is neither found nor in the way."""
    good = saved_run(tmp_path)
    model, optimizers = new_run()
    monkeypatch.setattr(checkpoint, "put_in_place", lambda temporary, final: None)       # killed just before the rename
    save(tmp_path, 4, model, optimizers)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_000003", "step_000004.tmp"]
    assert checkpoint.find(tmp_path, "latest") == good and checkpoint.newest(tmp_path) == good
    path = save(tmp_path, 4, model, optimizers)
    assert names(tmp_path) == ["step_000003", "step_000004"] and checkpoint.find(tmp_path, "latest") == path


# -----------------------------------------------------------------------------
# Damaged and foreign checkpoints


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "optim_rank0.pt", "tokenizer.json", "config.json"])
def test_damaged_files_are_named(name, tmp_path):
    path = saved_run(tmp_path, step=4)
    size = (path / name).stat().st_size
    truncate(path / name)
    for read in (lambda: checkpoint.find(tmp_path, "latest"), lambda: checkpoint.find(tmp_path, str(path)), lambda: checkpoint.load_hf(path)):
        with pytest.raises(ValueError, match=f"{path / name}: {size // 2} bytes, expected {size}: the checkpoint is damaged"):
            read()
    (path / name).unlink()
    with pytest.raises(ValueError, match=f"{path / name}: missing: the checkpoint is damaged; resume from an earlier step"):
        checkpoint.find(tmp_path, "latest")


@pytest.mark.parametrize("content, message", [
    ('{"step": 3, "fi', "train.json: not valid JSON"), ("", "train.json: not valid JSON"), ("[1, 2]", "train.json: expected a JSON object"),
    ('{"loss": 0.1}', "train.json: config, files, sharded, state, step, world_size missing: not a checkpoint of this repository")])
def test_garbage_train_json(content, message, tmp_path):
    path = saved_run(tmp_path)
    (path / "train.json").write_text(content)
    model, optimizers = new_run()
    for read in (lambda: checkpoint.find(tmp_path, "latest"), lambda: checkpoint.load_hf(path),
                 lambda: checkpoint.restore(path, model, optimizers)):
        with pytest.raises(ValueError) as e:
            read()
        assert message in str(e.value) and str(path) in str(e.value)


class Trojan:
    """Unpickled without care, it makes a folder."""
    def __reduce__(self):
        return os.mkdir, ("trojan",)


def test_foreign_optimizer_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved_run(tmp_path)
    model, optimizers = new_run()
    untouched = [p.detach().clone() for p in model.parameters()]
    size = (path / "optim_rank0.pt").stat().st_size
    for content in (b"\0" * size, os.urandom(size)):                       # as long as it should be
        (path / "optim_rank0.pt").write_bytes(content)
        assert checkpoint.find(tmp_path, "latest") == path
        with pytest.raises(ValueError, match="optim_rank0.pt: cannot be read"):
            checkpoint.restore(path, model, optimizers)
    torch.save([Trojan()], path / "optim_rank0.pt")
    with pytest.raises(ValueError, match="optim_rank0.pt: cannot be read"):
        checkpoint.restore(path, model, optimizers)
    assert not Path("trojan").exists()
    assert all(torch.equal(a, b) for a, b in zip(untouched, model.parameters())) and not any(o.state for o in optimizers)


@pytest.mark.parametrize("saved, resumed, message", [
    (dict(muon_lr=0.02), dict(muon_lr=0.0), "holds the state of AdamW and Muon, this run has AdamW"),
    (dict(muon_lr=0.0), dict(muon_lr=0.02), "holds the state of AdamW, this run has AdamW and Muon"),
    (dict(muon_lr=0.02, lora=2), dict(muon_lr=0.0, lora=2), "holds the state of Muon, this run has AdamW"),
    (dict(muon_lr=0.0, lora=2), dict(muon_lr=0.0), "holds [28] parameters in its groups, this run has [16, 9]"),
    (dict(muon_lr=0.0), dict(muon_lr=0.0, config=replace(CONFIG, intermediate_size=48)),
     "exp_avg of parameter 6 has shape [40, 24], this run expects [48, 24]"),
])
def test_optimizer_state_of_other_flags(saved, resumed, message, tmp_path):
    path = saved_run(tmp_path, **saved)
    model, optimizers = new_run(**resumed)
    with pytest.raises(ValueError) as e:
        checkpoint.restore(path, model, optimizers)
    assert message in str(e.value) and "optim_rank0.pt" in str(e.value) and "--muon_lr" in str(e.value)
    assert not any(o.state for o in optimizers)


def test_lora_of_other_flags(tmp_path):
    plain, lora = saved_run(tmp_path / "plain"), saved_run(tmp_path / "lora", lora=2)
    with pytest.raises(ValueError, match="was saved without LoRA: resume with --lora_rank=0"):
        checkpoint.restore_lora(plain, new_run(lora=2)[0])
    model = new_run(lora=3)[0]
    with pytest.raises(ValueError, match=r"lora_A has shape \[2, 24\], expected \[3, 24\]: --lora_rank differs"):
        checkpoint.restore_lora(lora, model)
    assert_same(model, new_run(lora=3)[0])                                 # nothing was loaded in part


# -----------------------------------------------------------------------------
# Two ranks: every function named rank_* runs under one torchrun, with gloo


def script_env():
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def sharded_run(muon_lr, model):
    wrapped = parallelize(model, "fsdp", torch.device("cpu"), world_size=2)
    return model, wrapped, make_optimizers(model, lr=0.01, weight_decay=0.1, muon_lr=muon_lr)


def train_shards(model, wrapped, optimizers, steps, rank=0, world_size=1):
    for step in steps:
        ids = torch.randint(0, 272, (4, 9), generator=torch.Generator().manual_seed(step))[rank::world_size]
        F.cross_entropy(F.linear(wrapped(ids[:, :-1]), model.lm_head.weight).flatten(0, 1), ids[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def save_shards(out_dir, step, model, optimizers, rank):
    return save(out_dir, step, model, optimizers, rank=rank, world_size=2)


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rank_resumes_exactly(out_dir, rank):
    for kind, muon_lr in (("adamw", 0.0), ("muon", 0.02), ("lora", 0.0)):
        model = Transformer(CONFIG).init_weights(0)
        model, wrapped, optimizers = sharded_run(muon_lr, add_lora(model, 2, alpha=4.0) if kind == "lora" else model)
        assert checkpoint.is_sharded(model)
        train_shards(model, wrapped, optimizers, range(3), rank, 2)
        with torch.no_grad():
            wrapped(torch.zeros(1, 4, dtype=torch.long))                   # an evaluation leaves the root's weights whole
        path = save_shards(out_dir / kind, 3, model, optimizers, rank)
        assert {"optim_rank0.pt", "optim_rank1.pt", "model.safetensors"} <= set(names(path))
        train_shards(model, wrapped, optimizers, range(3, 6), rank, 2)     # the run that was never stopped

        found = checkpoint.find(out_dir / kind, "latest")
        again, _ = checkpoint.load_hf(found)
        if kind == "lora":
            checkpoint.restore_lora(found, add_lora(again, 2, alpha=4.0, seed=99))
        again, wrapped, optimizers_again = sharded_run(muon_lr, again)
        assert checkpoint.restore(found, again, optimizers_again, rank, world_size=2) == STATE
        train_shards(again, wrapped, optimizers_again, range(3, 6), rank, 2)
        for a, b in zip(model.parameters(), again.parameters()):
            assert torch.equal(checkpoint.whole(a), checkpoint.whole(b))
        for a, b in zip(optimizers, optimizers_again):
            assert len(a.state) == len(b.state) > 0
            for p, q in zip(a.state.values(), b.state.values()):
                assert p.keys() == q.keys() and all(torch.equal(local(p[k]), local(q[k])) for k in p)


def rank_saves_the_whole_model(out_dir, rank):
    """What the function above saved equals three steps without ranks."""
    for kind, muon_lr in (("adamw", 0.0), ("muon", 0.02)):
        model, before = (Transformer(CONFIG).init_weights(0) for _ in range(2))
        train_shards(model, model, make_optimizers(model, lr=0.01, weight_decay=0.1, muon_lr=muon_lr), range(3))
        found = load_file(out_dir / kind / "step_000003/model.safetensors")
        expected, start = dict(model.named_parameters()), before.state_dict()
        assert found.keys() == expected.keys()
        error = sum((found[n] - expected[n]).square().sum() for n in found) / sum((start[n] - expected[n]).square().sum() for n in found)
        # of what was learned; AdamW differs by fp32 rounding, Muon's iteration by that of bfloat16
        assert error.sqrt() < (0.1 if muon_lr else 1e-3), (kind, error.sqrt())


def rank_muon_is_as_exact_on_shards(out_dir, rank):
    """Newton-Schulz on shards, in bfloat16: its distance to the iteration in fp64 is what torch's has on whole matrices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (2,))

    def update(muon, weight, grad):
        weight = torch.nn.Parameter(weight)
        weight.grad = grad
        muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0).step()
        return checkpoint.whole(weight.detach()).double()

    for shape in ((24, 40), (40, 24), (33, 32), (65, 64), (7, 48)):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x = grad.double() / grad.double().norm()
        for _ in range(5):
            x = 3.4445 * x + (-4.7750 * x @ x.T + 2.0315 * x @ x.T @ x @ x.T) @ x
        truth = -x * max(1, shape[0] / shape[1]) ** 0.5
        shards = [distribute_tensor(t, mesh, [Shard(0)]) for t in (torch.zeros(shape), grad)]
        updates = update(torch.optim.Muon, torch.zeros(shape), grad), update(Muon, torch.zeros(shape), grad), update(Muon, *shards)
        plain, whole, sharded = (((u - truth).norm() / truth.norm()).item() for u in updates)
        assert 0 < plain < 0.03 and whole < 1e-4 and 0 < sharded < 1.5 * plain + 0.01, (shape, plain, whole, sharded)


def rank_computes_in_bfloat16(out_dir, rank):
    """Blocks are gathered in bfloat16; master weights and gradients are fp32, and what comes out is what one process computes."""
    losses, grads = [], []
    for sharded in (False, True):
        model = Transformer(CONFIG, compute_dtype=torch.bfloat16).init_weights(0)
        with torch.no_grad():                                              # no identity blocks
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        wrapped = parallelize(model, "fsdp", torch.device("cpu"), world_size=2) if sharded else model
        for _ in range(2):                                                 # two micro-batches
            hidden = wrapped(torch.arange(18).view(2, 9))
            assert hidden.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
            loss = F.linear(hidden.float(), model.lm_head.weight).log_softmax(-1)[..., 5].mean()
            loss.backward()
        losses.append(loss.item())
        grads.append({n: checkpoint.whole(p.grad) for n, p in model.named_parameters()})
    assert losses[0] == losses[1]
    for name, g in grads[0].items():
        assert grads[1][name].dtype == torch.float32 and (g - grads[1][name]).norm() < 0.01 * g.norm(), name


def rank_refuses_other_shards(out_dir, rank):
    sharded, wrapped, sharded_optimizers = sharded_run(0.0, Transformer(CONFIG).init_weights(0))
    train_shards(sharded, wrapped, sharded_optimizers, range(1), rank, 2)
    whole, _ = new_run()
    parallelize(whole, "ddp", torch.device("cpu"), world_size=2)
    whole_optimizers = make_optimizers(whole, lr=0.01)
    shards_path = save_shards(out_dir / "shards", 1, sharded, sharded_optimizers, rank)
    whole_path = save_shards(out_dir / "whole", 1, whole, whole_optimizers, rank)
    assert "optim_rank1.pt" not in names(whole_path)                       # the same on every rank: one file
    for path, model, optimizers, world_size, message in (
            (shards_path, sharded, sharded_optimizers, 4, "shards/step_000001 holds 2 FSDP shards, this run has 4 FSDP shards"),
            (shards_path, whole, whole_optimizers, 2, "shards/step_000001 holds 2 FSDP shards, this run has whole weights"),
            (whole_path, sharded, sharded_optimizers, 2, "whole/step_000001 holds whole weights, this run has 2 FSDP shards")):
        with pytest.raises(ValueError, match=message + ": resume with the same --parallel and number of processes"):
            checkpoint.restore(path, model, optimizers, rank, world_size)


def rank_failure_raises_on_both(out_dir, rank):
    model, wrapped, optimizers = sharded_run(0.0, Transformer(CONFIG).init_weights(0))
    good = save_shards(out_dir / "run", 1, model, optimizers, rank)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    for fails_on, module, name in ((1, torch, "save"), (0, checkpoint, "save_file"), (0, checkpoint, "put_in_place"), (0, Path, "mkdir"),
                                   (0, checkpoint, "config_to_hf")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == fails_on:
                patch.setattr(module, name, full)
            with pytest.raises(OSError, match=rf"step_000002 could not be saved: rank {fails_on}: OSError: \[Errno 28\] No space left"):
                save_shards(out_dir / "run", 2, model, optimizers, rank)
        dist.barrier()
        assert names(out_dir / "run") == ["step_000001"] and checkpoint.find(out_dir / "run", "latest") == good
    save_shards(out_dir / "run", 2, model, optimizers, rank)
    assert names(out_dir / "run") == ["step_000001", "step_000002"]


def rank_sums(out_dir, rank):
    total = all_reduce_sum(rank + 2**40)
    assert total == 2**41 + 1 and type(total) is int
    assert all_reduce_sum(0.1 + rank) == 0.1 + 1.1
    mine = torch.tensor([1.0, 10.0 * rank], requires_grad=True)
    assert all_reduce_sum(mine).tolist() == [2.0, 10.0] and mine.tolist() == [1.0, 10.0 * rank]


RANK_TESTS = [rank_sums, rank_resumes_exactly, rank_saves_the_whole_model, rank_muon_is_as_exact_on_shards, rank_computes_in_bfloat16,
              rank_refuses_other_shards, rank_failure_raises_on_both]


def test_under_two_ranks(tmp_path):
    """One launch for all of RANK_TESTS, since starting torch three times takes longer than they do; the first to fail ends it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    run = subprocess.run([*torchrun, __file__, "ranks", tmp_path], env=script_env(), capture_output=True, text=True, timeout=240)
    for rank in range(2):
        passed = (tmp_path / f"rank{rank}.txt").read_text().split()
        assert passed == [f.__name__ for f in RANK_TESTS], f"rank {rank} stopped after {passed}: {run.stderr[-4000:]}"
    assert run.returncode == 0, run.stderr[-4000:]
    assert [(tmp_path / f"rank{rank}.end").read_text() for rank in range(2)] == ["closed", "closed"]
    # one process reads the weights of two, and is told that the optimizer state is in parts; whole weights it may continue
    model, _ = checkpoint.load_hf(tmp_path / "adamw/step_000003")
    with pytest.raises(ValueError, match="holds 2 FSDP shards, this run has whole weights"):
        checkpoint.restore(tmp_path / "adamw/step_000003", model, make_optimizers(model, lr=0.01))
    model, _ = checkpoint.load_hf(tmp_path / "whole/step_000001")
    assert checkpoint.restore(tmp_path / "whole/step_000001", model, make_optimizers(model, lr=0.01)) == STATE


if __name__ == "__main__":
    torch.set_num_threads(1)
    out_dir = Path(sys.argv[2])
    if sys.argv[1] == "limited":
        limited(out_dir)
    else:
        # runs after setup_distributed's own handler: a group that outlives the interpreter aborts the rank now and then
        atexit.register(lambda: (out_dir / f"rank{rank}.end").write_text("open" if dist.is_initialized() else "closed"))
        rank = setup_distributed()[0]
        with open(out_dir / f"rank{rank}.txt", "w", buffering=1) as done:
            for rank_test in RANK_TESTS:
                rank_test(out_dir, rank)
                print(rank_test.__name__, file=done)
                dist.barrier()


def test_save_hf_does_not_replace_the_folder_of_a_run(tmp_path):
    """out/<name> holds a config.json too, that of the flags, and every checkpoint of the run."""
    model, tokenizer = Transformer(config_for_size("nano", 259)).init_weights(0), Tokenizer.bytes()
    (tmp_path / "run/step_000001").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoint.save_hf(model, tokenizer, tmp_path / "run")
    assert (tmp_path / "run/step_000001").exists()
