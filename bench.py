"""Speed beside peers, in one run: ratios are the result, since absolute times belong to one machine.

    python bench.py sft         training steps beside TRL's SFTTrainer: same checkpoint, token ids, order and optimizer settings
    python bench.py head        linear_logprob beside full logits in plain torch
    python bench.py sandbox     a program in the box beside a bare interpreter that does nothing
    python bench.py             all groups

Methods run in separate processes with one thread each, in turn, round after round (A B C, A B C, ...), so that a machine whose speed drifts
drifts for all. No time is reported unless the methods compute the same: losses must agree first. A peer that is not installed is named and
left out. The last line is JSON.
"""
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import train_sft
from common import parse_config, read_jsonl, write_atomically
from data import open_sources, sandbox, toy
from data.packing import Loader
from kernels import linear_logprob
from model import Transformer, config_for_size
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    steps: int = 20                  # timed steps per process, after the warm-up
    warmup: int = 3                  # steps before
    rounds: int = 3                  # processes per method, interleaved
    size: str = "tiny"               # from-scratch size of the model that is trained
    out: str = ""                    # file for the JSON line; empty: print only


def summarize(values):
    """-> median and quartiles of a list of numbers."""
    if len(values) < 2:
        return dict(p50=values[0], p25=values[0], p75=values[0])
    p25, p50, p75 = statistics.quantiles(values, n=4)
    return dict(p50=p50, p25=p25, p75=p75)


# -----------------------------------------------------------------------------
# sft: conversations of 1 to 8 exchanges, so that lengths are ragged; 8 a step

CHATS_PER_STEP, SEQ_LEN = 8, 1536
SFT_METHODS = ("temper padded", "temper packed", "trl padded")


def write_chats(path, num):
    tasks = [toy.conversations(task, seed=0, num=8 * num) for task in toy.CHAT_TASKS]
    with open(path, "w") as f:
        for i in range(num):
            exchanges = [next(tasks[(i + j) % len(tasks)])["messages"] for j in range(1 + i * 5 % 8)]
            f.write(json.dumps({"messages": sum(exchanges, []), "bucket": "chat"}) + "\n")


def sft_worker(method, folder, cfg):
    """Runs in a process of its own -> {"losses", "seconds", "tokens": real tokens of each step, "memory_mb"}."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_steps = cfg.warmup + cfg.steps
    options = dict(init=f"{folder}/model", data=f"{folder}/chats.jsonl", seq_len=SEQ_LEN, cache=f"{folder}/cache", lr=1e-3, muon_lr=0.0,
                   warmup_steps=0, decay_share=0.0, num_steps=num_steps, eval_every=num_steps + 1, eval_rows=2, seed=0)
    if method == "temper padded":
        train_sft.main(train_sft.Config(pack=False, device_batch_size=CHATS_PER_STEP, total_batch_size=CHATS_PER_STEP * SEQ_LEN, **options))
    elif method == "temper packed":
        train_sft.main(train_sft.Config(device_batch_size=3, total_batch_size=3 * SEQ_LEN, **options))
    else:
        result = trl_steps(folder, num_steps)
    if method != "trl padded":
        lines = [line for line in read_jsonl("out/dummy/metrics.jsonl") if "train/loss" in line]
        result = dict(losses=[line["train/loss"] for line in lines], seconds=[line["time/step"] for line in lines],
                      tokens=[line["time/tokens_per_sec"] * line["time/step"] for line in lines])
    return result | dict(memory_mb=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def trl_steps(folder, num_steps):
    """TRL's own trainer on the documents that temper's loader draws, in that order. Only time between a step's begin and end counts, so that
    TRL's data loading is not held against it."""
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    sources = open_sources(f"{folder}/chats.jsonl", Tokenizer.from_file(f"{folder}/model"), seq_len=SEQ_LEN, cache_dir=f"{folder}/cache")
    rows = Loader(sources, None, seq_len=SEQ_LEN, seed=0, pack=False).next_rows(CHATS_PER_STEP * num_steps)
    source, = sources.values()
    documents = [source.piece(piece) for (_, piece), in rows]
    dataset = Dataset.from_list([dict(input_ids=ids.tolist(), labels=[int(i) if m else -100 for i, m in zip(ids, mask)])
                                 for ids, mask in documents])
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    losses, seconds = [], []

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.start)

    class Recorder(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            losses.append((result[0] if isinstance(result, tuple) else result).detach())
            return result

    args = SFTConfig(output_dir=f"{folder}/trl", max_steps=num_steps, per_device_train_batch_size=CHATS_PER_STEP, learning_rate=1e-3,
                     lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch",
                     train_sampling_strategy="sequential", report_to="none", use_cpu=True, bf16=False, fp16=False,
                     gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, logging_strategy="no", max_length=None, seed=0,
                     data_seed=0)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/model/tokenizer.json", pad_token="<|endoftext|>",
                                                     eos_token="<|im_end|>")
    Recorder(model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[Timer()]).train()
    sizes = [len(ids) - 1 for ids, _ in documents]
    tokens = [sum(sizes[i:i + CHATS_PER_STEP]) for i in range(0, len(sizes), CHATS_PER_STEP)]
    return dict(losses=[x.item() for x in losses], seconds=seconds, tokens=tokens)


def bench_sft(cfg):
    methods = [m for m in SFT_METHODS if not m.startswith("trl") or importlib.util.find_spec("trl")]
    for missing in set(SFT_METHODS) - set(methods):
        print(f"{missing}: TRL is not installed (pip install -r requirements-peers.txt), left out")
    runs = {m: [] for m in methods}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.bytes()
        model = Transformer(config_for_size(cfg.size, tokenizer.vocab_size)).init_weights(0)
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():                            # residual outputs start at zero; let every weight matter from the first step
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.02 if p.ndim == 2 else 0)
        checkpoint.save_hf(model, tokenizer, f"{folder}/model")
        write_chats(f"{folder}/chats.jsonl", 600)
        for _ in range(cfg.rounds):
            for method in methods:
                runs[method].append(in_process("sft", method, folder, cfg))

    first = {m: r[0] for m, r in runs.items()}
    rows, ours = {}, first["temper padded"]
    for m, rs in runs.items():
        seconds = [s for r in rs for s in r["seconds"][cfg.warmup:]]
        rate = [t / s for r in rs for t, s in zip(r["tokens"][cfg.warmup:], r["seconds"][cfg.warmup:])]
        rows[m] = dict(step_ms={k: v * 1e3 for k, v in summarize(seconds).items()}, tokens_per_sec=summarize(rate),
                       memory_mb=statistics.median(r["memory_mb"] for r in rs), first_loss=rs[0]["losses"][0])
        print(f"{m:>14}  step {rows[m]['step_ms']['p50']:7.1f} ms [{rows[m]['step_ms']['p25']:.1f}, {rows[m]['step_ms']['p75']:.1f}]  "
              f"{rows[m]['tokens_per_sec']['p50']:7.0f} tok/s  +{rows[m]['memory_mb']:.0f} MB  first loss {rows[m]['first_loss']:.6f}")
    result = dict(methods=rows)
    if "trl padded" in first:
        gaps = [abs(a - b) for a, b in zip(ours["losses"], first["trl padded"]["losses"])]
        result |= dict(step0_loss_gap=gaps[0], largest_loss_gap=max(gaps), steps_compared=len(gaps))
        print(f"loss, temper padded against trl padded: step 0 differs by {gaps[0]:.1e}, the largest of {len(gaps)} steps by {max(gaps):.1e}")
        if gaps[0] > 1e-5:
            raise AssertionError("the first losses differ by more than 1e-5: no time is reported for methods that compute different things")
        by_round = lambda a, b, key: [statistics.median(x) / statistics.median(y) for x, y in
                                      zip(*[[key(r) for r in runs[m]] for m in (a, b)])]
        step = by_round("temper padded", "trl padded", lambda r: r["seconds"][cfg.warmup:])
        rate = by_round("temper packed", "trl padded", lambda r: [t / s for t, s in zip(r["tokens"], r["seconds"])][cfg.warmup:])
        result |= dict(step_time_ratio=summarize(step), tokens_per_sec_ratio=summarize(rate))
        print(f"step time, temper padded / trl padded: {statistics.median(step):.3f} (rounds: {', '.join(f'{x:.3f}' for x in step)})")
        print(f"tokens per second, temper packed / trl padded: {statistics.median(rate):.2f} (rounds: {', '.join(f'{x:.2f}' for x in rate)})")
    return result


def in_process(group, method, folder, cfg):
    """One method in a fresh process, working in `folder` so that nothing is left behind."""
    env = os.environ | dict(OMP_NUM_THREADS="1", WANDB_MODE="disabled", HF_HUB_OFFLINE="1", PYTHONPATH=str(Path(__file__).parent),
                            TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, __file__, "worker", group, method, folder, f"--steps={cfg.steps}", f"--warmup={cfg.warmup}"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method} failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# -----------------------------------------------------------------------------
# head: hidden states and a table to log-probabilities and back

HEAD_SHAPES = ((1024, 128, 272), (1024, 128, 4096), (512, 256, 32768), (256, 896, 151936))      # N, D, V


def bench_head(cfg):
    torch.manual_seed(0)
    result = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for n, d, v in HEAD_SHAPES:
        hidden, weight = torch.randn(n, d, device=device).requires_grad_(), (torch.randn(v, d, device=device) / d**0.5).requires_grad_()
        targets, up = torch.randint(v, (n,), device=device), torch.randn(n, device=device)

        def ours(entropy):
            out = linear_logprob(hidden, weight, targets)
            return (out.logp * up).sum() + ((out.entropy * up).sum() if entropy else 0)

        def full(entropy):
            logps = torch.nn.functional.linear(hidden, weight).log_softmax(-1)
            loss = (logps.gather(1, targets[:, None])[:, 0] * up).sum()
            return loss + (-(logps.exp() * logps).sum(-1) * up).sum() if entropy else loss

        for entropy in (False, True):
            times = {"ours": [], "full": []}
            losses = {}
            for i in range(3 + (cfg.steps if v < 10_000 else 3)):
                for name, method in (("ours", ours), ("full", full)):
                    hidden.grad = weight.grad = None
                    start = time.perf_counter()
                    loss = method(entropy)
                    loss.backward()
                    if device == "cuda":
                        torch.cuda.synchronize()
                    times[name] += [time.perf_counter() - start] if i >= 2 else []
                    losses[name] = loss.item()
            assert abs(losses["ours"] - losses["full"]) < 1e-4 * n, losses
            p50 = {k: summarize(t)["p50"] * 1e3 for k, t in times.items()}
            label = f"N={n} D={d} V={v}" + (" with entropy" if entropy else "")
            result[label] = p50 | dict(ratio=p50["ours"] / p50["full"])
            print(f"{label:>40}  linear_logprob {p50['ours']:8.1f} ms  full logits {p50['full']:8.1f} ms  ratio {p50['ours'] / p50['full']:.2f}")
    return result


# -----------------------------------------------------------------------------
# sandbox: what a box costs on top of the interpreter in it

def bench_sandbox(cfg):
    try:
        tier = sandbox.choose("auto")
    except sandbox.SandboxUnavailable as e:
        print(f"sandbox: left out, {e}")
        return {}
    bare = lambda *flags: lambda: subprocess.run([sandbox._python, *flags, "-c", "pass"], check=True)
    methods = {"python -I": bare("-I"), "python -I -S": bare("-I", "-S"), "run": lambda: sandbox.run("pass"),
               "evaluate": lambda: sandbox.evaluate("def f(x): return x", ["f(1)"])}
    times = {name: [] for name in methods}
    for i in range(cfg.warmup + 3 * cfg.steps):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            times[name] += [time.perf_counter() - start] if i >= cfg.warmup else []
    rows = {name: {k: v * 1e3 for k, v in summarize(t).items()} for name, t in times.items()}
    for name, row in rows.items():
        print(f"{name:>14}  {row['p50']:6.1f} ms [{row['p25']:.1f}, {row['p75']:.1f}]")
    # without -S the interpreter also reads its site-packages, which is slow where many packages are installed
    ratios = {f"{a} / {b}": summarize([x / y for x, y in zip(times[a], times[b])])
              for a in ("run", "evaluate") for b in ("python -I", "python -I -S")}
    for name, ratio in ratios.items():
        print(f"{name:>24}  {ratio['p50']:.2f} [{ratio['p25']:.2f}, {ratio['p75']:.2f}]")
    return dict(tier=tier, milliseconds=rows, ratio=ratios)


GROUPS = {"sft": bench_sft, "head": bench_head, "sandbox": bench_sandbox}


def main(cfg, groups):
    machine = dict(machine=platform.machine(), cpu_count=os.cpu_count(), torch=torch.__version__, python=platform.python_version(),
                   gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    results = {}
    for group in groups:
        print(f"== {group}", flush=True)
        results[group] = GROUPS[group](cfg)
    line = json.dumps(dict(machine, **results))
    if cfg.out:
        write_atomically(cfg.out, line + "\n")
    print(line)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(sft_worker(sys.argv[3], sys.argv[4], parse_config(Config, sys.argv[5:]))))
    else:
        names = [a for a in sys.argv[1:] if not a.startswith("-")]
        unknown = [n for n in names if n not in GROUPS]
        if unknown:
            sys.exit(f"bench.py: unknown group {unknown[0]!r}; the groups are {', '.join(GROUPS)}")
        main(parse_config(Config, [a for a in sys.argv[1:] if a.startswith("-")]), names or list(GROUPS))
