"""Step folders: what is saved comes back bit by bit, what is damaged or foreign is refused by name, and a full disk loses nothing."""
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import checkpoint
from model import ModelConfig, Transformer, add_lora, make_optimizers
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


@pytest.mark.parametrize("kind", [dict(muon_lr=0.0), dict(muon_lr=0.02), dict(muon_lr=0.0, lora=2), dict(muon_lr=0.02, lora=2),
                                  dict(config=replace(CONFIG, tie_embeddings=True)), dict(config=replace(CONFIG, qk_norm=False, qkv_bias=True))],
                         ids=["adamw", "muon", "lora-adamw", "lora-muon", "tied", "bias"])
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
    assert_same(load(path)[0], model) if False else assert_same(checkpoint.load_hf(path)[0], model)
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


def test_a_file_size_limit_loses_nothing(tmp_path):
    """The real thing: writes fail below Python, in safetensors and in torch.save, which wrap the error each in its own way."""
    script = textwrap.dedent("""
        import resource, sys
        import test_checkpoint as t
        out_dir, limit = sys.argv[1], int(sys.argv[2])
        good = t.saved_run(out_dir)
        model, optimizers = t.new_run()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            t.save(out_dir, 4, model, optimizers)
        except OSError as e:
            print("refused:", e)
        assert t.names(out_dir) == ["step_000003"], t.names(out_dir)
        assert t.checkpoint.find(out_dir, "latest") == good
        t.load(good)
    """)
    done = saved_run(tmp_path / "sizes")
    weights, moments = ((done / f).stat().st_size for f in ("model.safetensors", "optim_rank0.pt"))
    assert 8000 < weights < moments
    for limit in (weights - 4096, (weights + moments) // 2):               # the weights do not fit; the weights do, the moments do not
        run = subprocess.run([sys.executable, "-c", script, tmp_path / str(limit), str(limit)], env=script_env(), capture_output=True, text=True)
        assert run.returncode == 0 and "refused:" in run.stdout and "step_000004 could not be saved" in run.stdout, run.stderr[-2000:]


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
    for read in (lambda: checkpoint.find(tmp_path, "latest"), lambda: checkpoint.load_hf(path), lambda: checkpoint.restore(path, model, optimizers)):
        with pytest.raises(ValueError) as e:
            read()
        assert message in str(e.value) and str(path) in str(e.value)


def test_foreign_optimizer_file(tmp_path):
    path = saved_run(tmp_path)
    model, optimizers = new_run()
    untouched = [p.detach().clone() for p in model.parameters()]
    size = (path / "optim_rank0.pt").stat().st_size
    for content in (b"\0" * size, os.urandom(size)):                       # as long as it should be
        (path / "optim_rank0.pt").write_bytes(content)
        assert checkpoint.find(tmp_path, "latest") == path
        with pytest.raises(ValueError, match="optim_rank0.pt: cannot be read"):
            checkpoint.restore(path, model, optimizers)
    import pickle
    (path / "optim_rank0.pt").write_bytes(pickle.dumps(Path("code would run here")))
    with pytest.raises(ValueError, match="optim_rank0.pt: cannot be read"):
        checkpoint.restore(path, model, optimizers)
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
# Two ranks


def script_env():
    paths = [str(ROOT), str(ROOT / "tests")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def two_ranks(tmp_path, body, *args, timeout=90):
    """Runs `body` under torchrun with gloo; `t` is this module. -> the lines each rank wrote with say()."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent("""
        import os, sys
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch, torch.distributed as dist, torch.nn.functional as F
        import checkpoint, test_checkpoint as t
        from common import setup_distributed
        from model import *
        torch.set_num_threads(1)
        rank, _, world_size, device = setup_distributed()
        out_dir = sys.argv[1]
        def say(*words):
            with open(f"{out_dir}/rank{rank}.txt", "a") as f:
                print(*words, file=f)
        def train(model, wrapped, optimizers, steps):
            for step in steps:
                ids = torch.randint(0, 272, (4, 9), generator=torch.Generator().manual_seed(step))[rank::world_size]
                loss = F.cross_entropy(F.linear(wrapped(ids[:, :-1]).float(), model.lm_head.weight.float()).flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            return loss.detach()
        def sharded_run(**kind):
            model = Transformer(t.CONFIG).init_weights(0)
            wrapped = parallelize(model, "fsdp", device, world_size)
            return model, wrapped, make_optimizers(model, lr=0.01, weight_decay=0.1, **kind)
    """) + textwrap.dedent(body) + "\ndist.destroy_process_group()\n")
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
                          str(script), str(tmp_path), *args], env=script_env(), capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stderr[-4000:]
    return [(tmp_path / f"rank{r}.txt").read_text() for r in range(2)]


def test_fsdp_saves_the_whole_model_and_resumes_exactly(tmp_path):
    said = two_ranks(tmp_path, """
        for name, muon_lr in (("adamw", 0.0), ("muon", 0.02)):
            model, wrapped, optimizers = sharded_run(muon_lr=muon_lr)
            assert checkpoint.is_sharded(model)
            train(model, wrapped, optimizers, range(3))
            with torch.no_grad():
                wrapped(torch.zeros(1, 4, dtype=torch.long))       # an evaluation leaves the root's weights whole
            path = checkpoint.save(f"{out_dir}/{name}", 3, model, t.tokenizer, optimizers, state=t.STATE, config={}, rank=rank, world_size=2)
            assert path.is_dir()
            train(model, wrapped, optimizers, range(3, 6))

            found = checkpoint.find(f"{out_dir}/{name}", "latest")
            again, _ = checkpoint.load_hf(found)
            wrapped = parallelize(again, "fsdp", device, world_size)
            optimizers_again = make_optimizers(again, lr=0.01, weight_decay=0.1, muon_lr=muon_lr)
            assert checkpoint.restore(found, again, optimizers_again, rank, world_size) == t.STATE
            train(again, wrapped, optimizers_again, range(3, 6))
            for a, b in zip(model.parameters(), again.parameters()):
                assert torch.equal(a.full_tensor(), b.full_tensor())
            for a, b in zip(optimizers, optimizers_again):
                for p, q in zip(a.state.values(), b.state.values()):
                    assert p.keys() == q.keys() and all(torch.equal(getattr(p[k], "_local_tensor", p[k]), getattr(q[k], "_local_tensor", q[k])) for k in p)
            say(name, "same")
    """)
    assert said == ["adamw same\nmuon same\n"] * 2
    for name, muon_lr in (("adamw", 0.0), ("muon", 0.02)):
        path = tmp_path / name / "step_000003"
        assert {"optim_rank0.pt", "optim_rank1.pt", "model.safetensors"} <= set(names(path))
        # the same run without ranks: 4 rows per step
        model, optimizers = Transformer(CONFIG).init_weights(0), None
        optimizers = make_optimizers(model, lr=0.01, weight_decay=0.1, muon_lr=muon_lr)
        for step in range(3):
            ids = torch.randint(0, 272, (4, 9), generator=torch.Generator().manual_seed(step))
            F.cross_entropy(F.linear(model(ids[:, :-1]), model.lm_head.weight).flatten(0, 1), ids[:, 1:].flatten()).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        tensors = load_file(path / "model.safetensors")
        assert tensors.keys() == dict(model.named_parameters()).keys()
        for n, p in model.named_parameters():
            # AdamW to fp32 rounding; Muon's iteration is bfloat16, three updates of size 0.02 differ in their second digit
            torch.testing.assert_close(tensors[n], p.detach(), rtol=0, atol=2e-3 if muon_lr else 1e-5)
    # whoever is alone reads the weights, and is told that the optimizer state is in two parts
    model, _ = checkpoint.load_hf(path)
    with pytest.raises(ValueError, match="holds 2 FSDP shards, this run has whole weights: resume with the same --parallel and number of proc"):
        checkpoint.restore(path, model, make_optimizers(model, lr=0.01, muon_lr=0.02))


def test_sharded_muon_is_as_exact_as_muon(tmp_path):
    """Newton-Schulz in bfloat16 on shards: its distance to the iteration in fp64 is that of the unsharded one, and a little more."""
    said = two_ranks(tmp_path, """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        mesh = init_device_mesh("cpu", (2,))
        def exact(g):
            x = g.double() if g.shape[0] <= g.shape[1] else g.double().T
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            return x if g.shape[0] <= g.shape[1] else x.T
        def update(weight, grad):
            weight = torch.nn.Parameter(weight)
            weight.grad = grad
            torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0).step()
            return weight.detach()
        for shape in ((24, 40), (40, 24), (33, 32), (65, 64), (7, 48)):
            g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            truth = -exact(g) * max(1, shape[0] / shape[1]) ** 0.5
            plain = update(torch.zeros(shape), g).double()
            parts = update(distribute_tensor(torch.zeros(shape), mesh, [Shard(0)]), distribute_tensor(g, mesh, [Shard(0)])).full_tensor().double()
            errors = [((x - truth).norm() / truth.norm()).item() for x in (plain, parts)]
            assert 0 < errors[0] < 0.03 and errors[1] < 1.5 * errors[0] + 0.01, (shape, errors)
        say("exact enough")
    """)
    assert said == ["exact enough\n"] * 2


def test_fsdp_computes_what_one_process_computes_in_bfloat16(tmp_path):
    """Gathered in bfloat16, master weights and their gradients in fp32."""
    said = two_ranks(tmp_path, """
        losses = {}
        for kind in ("fsdp", "whole"):
            model = Transformer(t.CONFIG, compute_dtype=torch.bfloat16).init_weights(0)
            with torch.no_grad():                                  # no identity blocks
                for name, p in model.named_parameters():
                    p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
            wrapped = parallelize(model, kind, device, world_size) if kind == "fsdp" else model
            ids = torch.randint(0, 272, (2, 9), generator=torch.Generator().manual_seed(0))
            for _ in range(2):                                     # two micro-batches
                hidden = wrapped(ids)
                assert hidden.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
                loss = F.linear(hidden.float(), model.lm_head.weight).log_softmax(-1)[..., 5].mean()
                loss.backward()
            grads = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}
            losses[kind] = loss.item(), grads
        assert losses["fsdp"][0] == losses["whole"][0]
        for n, g in losses["whole"][1].items():
            h = losses["fsdp"][1][n]
            assert h.dtype == torch.float32 and (g - h).norm() < 0.01 * g.norm(), n
        say("equal")
    """)
    assert said == ["equal\n"] * 2


def test_wrong_number_of_ranks_and_kinds(tmp_path):
    said = two_ranks(tmp_path, """
        model, wrapped, optimizers = sharded_run()
        train(model, wrapped, optimizers, range(1))
        path = checkpoint.save(f"{out_dir}/sharded", 1, model, t.tokenizer, optimizers, state={}, config={}, rank=rank, world_size=2)
        def complain(path, model, optimizers, world_size):
            try:
                checkpoint.restore(path, model, optimizers, rank, world_size)
            except ValueError as e:
                say(str(e).replace(out_dir, ""))
        complain(path, model, optimizers, 4)
        whole = Transformer(t.CONFIG).init_weights(0)
        parallelize(whole, "ddp", device, world_size)
        complain(path, whole, make_optimizers(whole, lr=0.01), 2)
        path = checkpoint.save(f"{out_dir}/whole", 1, whole, t.tokenizer, make_optimizers(whole, lr=0.01), state={}, config={}, rank=rank, world_size=2)
        complain(path, model, optimizers, 2)
    """)
    advice = ": resume with the same --parallel and number of processes, or start from it with --init\n"
    assert said == [f"/sharded/step_000001 holds 2 FSDP shards, this run has 4 FSDP shards{advice}"
                    f"/sharded/step_000001 holds 2 FSDP shards, this run has whole weights{advice}"
                    f"/whole/step_000001 holds whole weights, this run has 2 FSDP shards{advice}"] * 2
    # whole weights are one file for all ranks, and one process may continue them
    path = tmp_path / "whole/step_000001"
    assert "optim_rank1.pt" not in names(path)
    model, _ = checkpoint.load_hf(path)
    assert checkpoint.restore(path, model, make_optimizers(model, lr=0.01)) == {}


def test_failure_on_one_rank_raises_on_both(tmp_path):
    said = two_ranks(tmp_path, """
        model, wrapped, optimizers = sharded_run()
        good = checkpoint.save(f"{out_dir}/run", 1, model, t.tokenizer, optimizers, state={}, config={}, rank=rank, world_size=2)
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")
        for fails_on, module, name in ((1, torch, "save"), (0, checkpoint, "save_file"), (0, checkpoint, "put_in_place"), (0, checkpoint.Path, "mkdir"),
                                       (0, checkpoint, "config_to_hf")):
            kept = getattr(module, name)
            if rank == fails_on:
                setattr(module, name, full)
            try:
                checkpoint.save(f"{out_dir}/run", 2, model, t.tokenizer, optimizers, state={}, config={}, rank=rank, world_size=2)
            except OSError as e:
                assert f"rank {fails_on}: OSError: [Errno 28] No space left" in str(e) and "step_000002 could not be saved" in str(e), e
                say(name)
            setattr(module, name, kept)
            dist.barrier()
            assert t.names(f"{out_dir}/run") == ["step_000001"], t.names(f"{out_dir}/run")
            assert checkpoint.find(f"{out_dir}/run", "latest") == good
        checkpoint.save(f"{out_dir}/run", 2, model, t.tokenizer, optimizers, state={}, config={}, rank=rank, world_size=2)
    """)
    assert said == ["save\nsave_file\nput_in_place\nmkdir\nconfig_to_hf\n"] * 2
    assert names(tmp_path / "run") == ["step_000001", "step_000002"]
