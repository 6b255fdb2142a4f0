"""The training script as a whole: the gradient does not depend on how the batch is cut, a killed run continues bitwise, it learns."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train_sft
from data import open_sources
from data.packing import Loader, make_batch
from kernels import linear_logprob
from model import Transformer, config_for_size
from tokenizer import Tokenizer
from train_sft import Config, bucket_sums, sft_loss

ROOT = Path(__file__).resolve().parents[1]
DATA = "toy/math_en,toy/code,toy/facts_ko"
SMALL = dict(size="nano", data=DATA, seq_len=192, total_batch_size=8 * 192, device_batch_size=8, num_steps=2, eval_every=0, eval_rows=8,
             warmup_steps=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def metrics(name="dummy", times=False):
    lines = [json.loads(line) for line in Path(f"out/{name}/metrics.jsonl").read_text().splitlines()]
    return lines if times else [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def flags(**settings):
    return [f"--{k}={v}" for k, v in settings.items()]


def run(*args, ranks=1, wait=True):
    """The script as a user starts it."""
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0",
                                                 "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*start, *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    if not wait:
        return process
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out[-3000:]
    return out


def kill_9(process):
    """The process and everything below it: torchrun gives each rank a session of its own, out of reach of killpg."""
    table = [map(int, line.split()) for line in subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()]
    parents, victims = dict(table), [process.pid]
    for pid in victims:
        victims += [child for child, parent in parents.items() if parent == pid]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


# -----------------------------------------------------------------------------
# The loss


def test_loss_by_hand():
    """Two trained tokens with probability 1/2 and 1/8, four in the global batch: (ln 2 + ln 8) / 4 = ln 16 / 4 = ln 2."""
    logps = torch.tensor([0.5, 0.125]).log().requires_grad_()
    loss = sft_loss(logps, 4)
    assert abs(loss.item() - 0.6931472) < 1e-6
    loss.backward()
    assert logps.grad.tolist() == [-0.25, -0.25]                    # a step against the gradient raises both


def test_bucket_sums_by_hand():
    sums = bucket_sums(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([2, 0, 2]), 3)
    assert sums.tolist() == [[2.0, 1.0], [0.0, 0.0], [5.0, 2.0]]


# -----------------------------------------------------------------------------
# The gradient does not depend on how the batch is cut

PROBE = """
import json, sys, torch, train_sft
whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t
clip = train_sft.clip_grad_norm
def probe(model, max_norm):
    grads = {n: whole(p.grad).clone() for n, p in model.named_parameters()}
    torch.save(grads, path)
    return clip(model, max_norm)
train_sft.clip_grad_norm = probe
for path, settings in json.loads(sys.argv[1]).items():
    train_sft.main(train_sft.Config(**settings))
"""


def first_gradients(tmp_path, runs, ranks=1):
    """Full gradients of the first step of each run, before clipping, as the script itself made them. One start for all: it takes longer than they do."""
    (tmp_path / "probe.py").write_text(PROBE)
    paths = [str(tmp_path / f"{ranks}_{i}.pt") for i in range(len(runs))]
    run(str(tmp_path / "probe.py"), json.dumps(dict(zip(paths, runs))), ranks=ranks)
    return [torch.load(path, weights_only=True) for path in paths]


def assert_equal_gradients(a, b, tolerance=1e-6):
    assert a.keys() == b.keys() and sum(g.abs().sum() for g in a.values()) > 1
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


def test_gradient_is_the_same_for_any_cut(tmp_path, cache):
    """1 rank: 1x8, 2x4, 8x1 micro-batches; 2 ranks: DDP 1x4, DDP 4x1, FSDP2 2x2. Supervised tokens are uneven over rows by construction."""
    settings = SMALL | dict(cache=cache, num_steps=1)
    reference, *one = first_gradients(tmp_path, [settings | dict(device_batch_size=size) for size in (8, 4, 1)])
    two = first_gradients(tmp_path, [settings | dict(device_batch_size=size, parallel=parallel, muon_lr=0.0) for parallel, size in (("ddp", 4), ("ddp", 1), ("fsdp", 2))], ranks=2)
    for gradients in one + two:
        assert_equal_gradients(reference, gradients)


def test_packed_equals_padded(cache):
    """The same documents packed into rows and one per row: same loss, same gradient, source by source."""
    tokenizer = Tokenizer.bytes()
    sources = open_sources(DATA, tokenizer, seq_len=192, cache_dir=cache)
    rows = Loader(sources, dict(math_en=1, code=1, facts_ko=4), seq_len=192, seed=3).next_rows(8)
    assert max(map(len, rows)) > 2
    results = []
    for batch in (make_batch(rows, sources, 192), make_batch([[d] for row in rows for d in row], sources)):
        model = Transformer(config_for_size("nano", tokenizer.vocab_size)).init_weights(0)
        torch.manual_seed(0)
        for p in model.parameters():                              # zero-initialized outputs would hide attention
            p.data.add_(torch.randn_like(p) * 0.05)
        hidden = model(batch.ids, batch.positions, batch.doc_ids).flatten(0, 1)[batch.rows]
        logps = linear_logprob(hidden, model.lm_head.weight, batch.targets).logp
        sft_loss(logps, len(batch.rows)).backward()
        results.append((bucket_sums(logps, batch.buckets, 3), {n: p.grad for n, p in model.named_parameters()}))
    (sums, grads), (padded_sums, padded_grads) = results
    assert torch.allclose(sums, padded_sums, atol=0, rtol=1e-6) and (sums[:, 1] > 0).all()
    assert_equal_gradients(grads, padded_grads)


def test_recompute_and_logging_do_not_change_the_run(cache):
    settings = SMALL | dict(cache=cache, num_steps=3)
    train_sft.main(Config(**settings))
    plain = metrics()
    train_sft.main(Config(**settings, recompute=True))
    for a, b in zip(plain, metrics()):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-6 * max(1, abs(a[k])) for k in a)


# -----------------------------------------------------------------------------
# Stop, kill -9, resume


@pytest.mark.parametrize("ranks, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_killed_run_continues_bitwise(cache, ranks, parallel):
    settings = SMALL | dict(cache=cache, num_steps=24, save_every=3, device_batch_size=2, eval_every=4, parallel=parallel, replay=0.3,
                            replay_data="toy/sums", lora_rank=4 if ranks == 1 else 0, muon_lr=0.02 if parallel == "ddp" else 0.0)
    script = str(ROOT / "train_sft.py")
    run(script, *flags(name="whole", **settings), ranks=ranks)
    process = run(script, *flags(name="killed", **settings), ranks=ranks, wait=False)
    deadline = time.monotonic() + 600
    while not Path("out/killed/step_000003/train.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()[-3000:]
        time.sleep(0.005)
    kill_9(process)
    assert not Path("out/killed/step_000024").exists(), "killed too late: the test would prove nothing"
    out = run(script, *flags(name="killed", resume="latest", **settings), ranks=ranks)
    whole, killed = Path("out/whole/step_000024"), Path("out/killed/step_000024")
    for name in sorted(f.name for f in whole.glob("*.safetensors")):
        a, b = load_file(whole / name), load_file(killed / name)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a), name
    for file in sorted(whole.glob("optim_rank*.pt")):
        a, b = (torch.load(folder / file.name, weights_only=True) for folder in (whole, killed))
        for x, y in zip(a, b):
            for i in x["state"]:
                assert all(torch.equal(torch.as_tensor(x["state"][i][k]), torch.as_tensor(y["state"][i][k])) for k in x["state"][i])
    assert metrics("whole") == metrics("killed")
    assert json.loads(out.strip().splitlines()[-1])["steps"] == 24
    state = [json.loads((folder / "train.json").read_text())["state"] for folder in (whole, killed)]
    assert state[0] == state[1]


def test_resume_prints_what_changed_and_refuses_other_data(cache, capsys):
    settings = SMALL | dict(cache=cache, num_steps=2, name="changed")
    os.environ["WANDB_MODE"] = "disabled"
    train_sft.main(Config(**settings))
    train_sft.main(Config(**settings | dict(num_steps=3, lr=1e-4, resume="latest")))
    assert "--lr=0.0001 (was 0.003)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seed was 0, found 1"):
        train_sft.main(Config(**settings | dict(num_steps=4, seed=1, resume="latest")))


# -----------------------------------------------------------------------------
# What it says, and what it refuses


def test_learns_and_reports(cache, capsys):
    """A nano model learns the facts' form and half of their bits in seconds; the last line is one JSON object."""
    summary = train_sft.main(Config(**SMALL | dict(cache=cache, data="toy/facts_en", num_steps=60, seq_len=64, total_batch_size=16 * 64,
                                                   device_batch_size=16, eval_every=30)))
    lines = metrics(times=True)
    train = [line["train/loss"] for line in lines if "train/loss" in line]
    assert train[0] > 5 and train[-1] < 1.2                                    # ln 265 = 5.58 at the start
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == summary
    assert {"train/loss", "train/grad_norm", "train/lr", "train/tokens_facts_en", "time/tokens_per_sec"} <= lines[-2].keys() | lines[1].keys()
    model, tokenizer = checkpoint.load_hf(summary["checkpoint"])
    config = json.loads(Path("out/dummy/config.json").read_text())
    assert config["num_steps"] == 60 and Path("out/dummy/code.patch").exists() and tokenizer.vocab_size <= model.config.vocab_size


def test_shares_are_the_logged_tokens(cache):
    train_sft.main(Config(**SMALL | dict(cache=cache, num_steps=30, mix="math_en:.5,code:.3,facts_ko:.2")))
    lines = [line for line in metrics() if "train/loss" in line]
    counts = {n: sum(line[f"train/tokens_{n}"] for line in lines) for n in ("math_en", "code", "facts_ko")}
    total = sum(counts.values())
    assert total == lines[-1]["train/tokens"]
    assert all(abs(counts[n] / total - share) < 0.05 for n, share in (("math_en", 0.5), ("code", 0.3), ("facts_ko", 0.2)))


def test_epochs_give_every_document_once(cache):
    summary = train_sft.main(Config(**SMALL | dict(cache=cache, data="toy/facts_ko", num_epochs=2)))
    source = open_sources("toy/facts_ko", Tokenizer.bytes(), seq_len=192, cache_dir=cache)["facts_ko"]
    assert summary["tokens"] == 2 * source.num_targets


@pytest.mark.parametrize("settings, message", [
    (dict(total_batch_size=1000), "--total_batch_size .1000. must be a multiple"),
    (dict(data="toi"), "did you mean"),
    (dict(mix="math:.5"), "math_en"),
    (dict(size="huge"), "--size=huge is unknown"),
    (dict(init="nowhere"), "no config.json"),
    (dict(resume="latest", name="never_started"), "holds no checkpoint"),
    (dict(seq_len=64, total_batch_size=512), "raise --seq_len"),
    (dict(replay=0.2), "needs a source"),
    (dict(replay_data="toy/code", replay=0.2), "repeats names"),
])
def test_wrong_settings_name_the_flag(cache, settings, message):
    with pytest.raises(ValueError, match=message):
        train_sft.main(Config(**SMALL | dict(cache=cache) | settings))


def test_a_repeated_name_loses_nothing(cache):
    settings = SMALL | dict(cache=cache, num_steps=1, name="kept")
    train_sft.main(Config(**settings))
    before = Path("out/kept/metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        train_sft.main(Config(**settings))
    assert Path("out/kept/metrics.jsonl").read_bytes() == before
    train_sft.main(Config(**settings, overwrite=True))


def test_nan_stops_before_the_weights_are_touched(cache, monkeypatch):
    monkeypatch.setattr(train_sft, "sft_loss", lambda logps, n: logps.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="grad_norm is nan"):
        train_sft.main(Config(**SMALL | dict(cache=cache)))


def test_dry_run_trains_nothing(cache, capsys):
    train_sft.main(Config(**SMALL | dict(cache=cache, dry_run=True)))
    out = capsys.readouterr().out
    assert "memory_estimate_mb" in out and "device_batch_size  8" in out and not Path("out/dummy/metrics.jsonl").exists()
