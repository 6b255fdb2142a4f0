"""Score checkpoints: bits per byte on held-out text, and tasks answered by generation; several checkpoints in one table.

    python eval.py --init=out/base,out/sft --tasks=bpb:stdlib,facts_en,facts_ko,math_en --num_problems=300

Every checkpoint sees the same problems, answers them greedily and is graded by the same functions. Shares of right answers carry 95 %
Wilson intervals, bits per byte bootstrap intervals over documents, and differences to the first checkpoint are paired bootstraps. An
answer that cannot be read is not right and stays in the denominator; a grader that failed voids the task's score, it is never a 0.

Tasks: bpb:<source> (a text file or folder, all of it; of stdlib and toy/<task> the held-out part), and those of data/tasks.py: the toy tasks
(<task>, or <task>@test_template for held-out phrasings), gsm8k, math500, humaneval, mbpp, ifeval, bfcl/<category>, tools/<level>. Where there are
tools, a turn's calls are executed and their results appended, token in, token out. --num_samples adds pass@k.

Of a checkpoint with a calibration.json (train_calibration.py) every answer has a confidence p as well: its scores stand beside the task's, and what
would be left if answers below its threshold, or without p, were not given.
"""
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import calibration
import checkpoint
import confidence
from calibration import wilson
from common import parse_config, progress, setup_distributed, write_atomically
from data import open_sources, sandbox, tasks
from data.grading import Outcome
from data.packing import Loader, make_batch
from kernels import linear_logprob
from rollouts import in_words, play


@dataclass(frozen=True)
class Config:
    init: str = ""                   # checkpoint folders to compare, comma-separated: out/<name>, a step folder, or Hugging Face's
    tasks: str = "facts_en,facts_ko,sums,reasoning,math_en,math_ko"      # what to score, see the docstring
    num_problems: int = 300          # problems per task (a task may have fewer)
    max_bytes: int = 200_000         # text per bpb task
    num_samples: int = 1             # answers to each problem; above 1 needs --temperature and adds pass@k
    temperature: float = 0.0         # of sampling; 0: greedy
    seed: int = 0                    # chooses the problems
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"       # of the computation; auto: bfloat16 on CUDA
    sandbox: Literal["auto", "namespaces", "landlock", "none_i_accept"] = "auto"        # the box in which written code runs
    out: str = ""                    # folder for eval.json (results and every answer) and table.md; empty: print only
    samples: int = 1                 # answers to print per task


# -----------------------------------------------------------------------------
# Intervals


def bootstrap(statistic, *columns, num=1000, seed=0):
    """95 % percentile interval of statistic(*resampled columns); columns (n,) are resampled by row, so pairs stay pairs."""
    rng, n = np.random.default_rng(seed), len(columns[0])
    values = [statistic(*(c[rows] for c in columns)) for rows in (rng.integers(0, n, n) for _ in range(num))]
    return float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))


# -----------------------------------------------------------------------------
# Bits per byte


@torch.no_grad()
def bits_per_byte(model, tokenizer, source, max_bytes, seed=0, seq_len=0):
    """-> (bits (n,), bytes (n,)) per piece of held-out text. bpb is bits.sum() / bytes.sum().

    Long documents are cut into pieces of seq_len tokens that share no context; a piece's first token is context, neither its bits nor
    its bytes count. End-of-text counts its bits and no bytes. The same text gives the same number whatever the batch.
    """
    seq_len = seq_len or min(256, model.config.max_positions)
    own_split = source == "stdlib" or source.startswith("toy/")
    file = open_sources(source, tokenizer, seq_len=seq_len, cache_dir="out/cache", split="val" if own_split else "train", val_share=0)
    if any(s.kind == "chat" for s in file.values()):
        raise ValueError(f"bpb:{source}: these are conversations, bits per byte are of plain text")
    device = model.lm_head.weight.device
    length = np.array([len(tokenizer.decode_bytes([i])) if i not in tokenizer.specials.values() else 0 for i in range(tokenizer.vocab_size)])
    loader = Loader(file, None, seq_len=seq_len, seed=seed, pack=False)
    num_pieces = sum(map(len, file.values()))
    bits, num_bytes, done = [], [], 0
    while done < num_pieces and sum(num_bytes) < max_bytes:
        rows = loader.next_rows(min(16, num_pieces - done))
        done += len(rows)
        b = make_batch(rows, file).to(device)
        hidden = model(b.ids, b.positions, b.doc_ids).flatten(0, 1)[b.rows]
        logps = linear_logprob(hidden, model.lm_head.weight, b.targets).logp
        row = (b.rows // b.ids.shape[1]).cpu().numpy()
        bits += list(np.bincount(row, weights=-logps.double().cpu().numpy() / math.log(2), minlength=len(rows)))
        num_bytes += list(np.bincount(row, weights=length[b.targets.cpu().numpy()], minlength=len(rows)))
    return np.array(bits), np.array(num_bytes)


# -----------------------------------------------------------------------------
# Tasks answered by generation


def pass_at_k(right, n, k):
    """Probability that at least one of k answers is right, unbiased from `right` of n (Codex, arXiv 2107.03374, eq. 1); k <= n."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


CONFIDENCE_SCORES = ("brier", "bss", "auroc", "ece", "mean_q", "adherence")


def confidences(calibrated, model, tokenizer, problems, played):
    """-> p of each answer, or None, in the shape of played. calibrated: confidence.Confidence."""
    items = []
    for i, (problem, group) in enumerate(zip(problems, played)):
        chat = isinstance(problem.prompt, list)
        prompt = tokenizer.render_prompt(problem.prompt, problem.tools) if chat else tokenizer.encode(problem.prompt)      # as play does
        items += [confidence.Item(prompt + r.ids, [0] * len(prompt) + r.mask, chat, confidence.last_words(messages), str(i)) for r, messages, _ in group]
    p = iter(calibrated.of(model, tokenizer, items))
    return [[next(p) for _ in group] for group in played]


def confidence_scores(p, outcomes, threshold):
    """p: of each answer, or None -> scores of calibration.py, and selective answering: "given", the share of answers with p >= threshold, and
    "given_right", the share right among these. Answers whose grader failed are left out; what is not defined is None."""
    graded = [(q, int(o == Outcome.RIGHT)) for q, o in zip(p, outcomes) if o != Outcome.GRADER_ERROR]
    if not graded:
        return dict.fromkeys((*CONFIDENCE_SCORES, "given", "given_right")) | dict(threshold=threshold)
    left = calibration.abstention(*zip(*graded), threshold)
    return calibration.metrics(calibration.tally(*zip(*graded)), CONFIDENCE_SCORES) | dict(
        given=left["coverage"], given_right=None if left["error"] is None else 1 - left["error"], threshold=threshold)


def short(value, digits=3):
    """0.0834 -> .083, None -> -"""
    return "-" if value is None else f"{value:.{digits}f}".removeprefix("0")


def run_task(model, tokenizer, task, *, num_problems=300, max_bytes=200_000, seed=0, num_samples=1, temperature=0.0, calibrated=None, desc=""):
    """-> {"task", "metric", "value", "low", "high", "n", "outcomes", "samples", ...}. value is None when a grader failed on any item.

    With several samples a problem counts with its share of right answers (pass@1), the interval is a bootstrap over problems, and pass@k
    stands beside it for k = 2, 4, ... num_samples. calibrated: the checkpoint's confidence.Confidence, which adds "confidence": see confidence_scores.
    """
    if task.startswith("bpb:"):
        bits, num_bytes = bits_per_byte(model, tokenizer, task.removeprefix("bpb:"), max_bytes, seed)
        ratio = lambda a, b: a.sum() / b.sum()
        low, high = bootstrap(ratio, bits, num_bytes)
        return dict(task=task, metric="bpb", value=float(ratio(bits, num_bytes)), low=low, high=high, n=len(bits), samples=[],
                    rows=[bits.tolist(), num_bytes.tolist()])
    problems = tasks.problems(task, num_problems, seed)
    room = max(tasks.max_new_tokens(p.task) for p in problems) + tasks.STATED if calibrated and "verbal" in calibrated.slopes else None
    played = play(model, tokenizer, problems, num_samples=num_samples, temperature=temperature, seed=seed, max_new_tokens=room, desc=desc)
    outcomes = [[p.outcome for p in group] for group in played]
    right = [group.count(Outcome.RIGHT) for group in outcomes]
    counts = {str(o): sum(group.count(o) for group in outcomes) for o in Outcome}
    shares = np.array(right) / num_samples
    low, high = wilson(sum(right), len(right)) if num_samples == 1 else bootstrap(np.mean, shares)
    samples = [dict(prompt=p.prompt if isinstance(p.prompt, str) else p.prompt[-1]["content"], response=in_words(group[0].messages),
                    outcome=str(group[0].outcome)) for p, group in zip(problems, played)]
    measured = {}
    if calibrated:
        p = confidences(calibrated, model, tokenizer, problems, played)
        measured = dict(confidence=confidence_scores(sum(p, []), sum(outcomes, []), calibrated.threshold))
        samples = [s | dict(confidence=group[0]) for s, group in zip(samples, p)]
    passes = {f"pass@{k}": float(np.mean([pass_at_k(r, num_samples, k) for r in right])) for k in (2 ** i for i in range(1, 11)) if k <= num_samples}
    return dict(task=task, metric="acc", value=None if counts["grader_error"] else float(shares.mean()), low=low, high=high, n=len(problems),
                outcomes=counts, rows=[shares.tolist()], samples=samples, **passes, **measured,
                **tasks.more_scores(task, problems, [[p.messages for p in group] for group in played], outcomes))


def difference(result, first):
    """-> (value, low, high) of result - first on the same items: paired bootstrap."""
    a, b = [np.array(c) for c in result["rows"]], [np.array(c) for c in first["rows"]]
    if result["metric"] == "bpb":
        statistic = lambda x, y, n: (x.sum() - y.sum()) / n.sum()
        columns = (a[0], b[0], a[1])
    else:
        statistic = lambda x, y: x.mean() - y.mean()
        columns = (a[0], b[0])
    return (float(statistic(*columns)), *bootstrap(statistic, *columns))


def table(results):
    """results: {checkpoint: [result, ...]}, the same tasks in each -> markdown. Differences are to the first checkpoint."""
    names = list(results)
    lines = ["| task | n | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for i, first in enumerate(results[names[0]]):
        cells = []
        for name in names:
            r = results[name][i]
            cell = "grader failed" if r["value"] is None else f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            if name != names[0] and None not in (r["value"], first["value"]):
                cell += " ({:+.3f} [{:+.3f}, {:+.3f}])".format(*difference(r, first))
            cell += "".join(f" {key} {value:.3f}" for key, value in r.items() if key.startswith("pass@") or key in tasks.SCORES)
            if q := r.get("confidence"):
                cell += f" q: brier {short(q['brier'])}, auroc {short(q['auroc'])}; answers {short(q['given'], 2)} at {short(q['given_right'], 2)} right"
            cells.append(cell)
        arrow = "bpb, lower is better" if first["metric"] == "bpb" else "right"
        lines.append(f"| {first['task']} ({arrow}) | {first['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(cfg):
    _, _, _, device = setup_distributed()
    if not cfg.init:
        raise ValueError("--init is empty: name one or more checkpoint folders, comma-separated")
    if (cfg.num_samples > 1) != (cfg.temperature > 0):
        raise ValueError(f"--num_samples={cfg.num_samples} --temperature={cfg.temperature}: several answers need a temperature above 0, one answer is greedy")
    if cfg.sandbox != "auto":                            # auto is chosen when the first program runs
        sandbox.choose(cfg.sandbox)
    results, started = {}, time.monotonic()
    for path in cfg.init.split(","):
        folder = checkpoint.newest(path)
        model, tokenizer = checkpoint.load_hf(folder, device)
        calibrated = confidence.load(folder, model)
        if cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda"):
            model.compute_dtype = torch.bfloat16
        results[path] = [run_task(model, tokenizer, task, num_problems=cfg.num_problems, max_bytes=cfg.max_bytes, seed=cfg.seed,
                                  num_samples=cfg.num_samples, temperature=cfg.temperature, calibrated=calibrated)
                         for task in progress(cfg.tasks.split(","), desc=f"eval {path}")]
        for r in results[path]:
            for s in r["samples"][:cfg.samples]:
                p = f" (confidence {short(s['confidence'], 2)})" if "confidence" in s else ""
                print(f"[{path}] {r['task']} {s['outcome']}{p}: {s['prompt']!r} -> {s['response']!r}")
        shares = [r["confidence"]["adherence"] for r in results[path] if "confidence" in r]
        if 0 in shares and not any(shares):                  # None: graders failed, that is another matter
            print(f"[{path}] calibration.json gave no answer a confidence: a vote needs --num_samples above 1, one in words needs a model that states it")
    print("\n" + table(results) + "\n")
    if cfg.out:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(cfg.out) / "eval.json", json.dumps(results, ensure_ascii=False) + "\n")
        write_atomically(Path(cfg.out) / "table.md", table(results) + "\n")
    wanted = lambda key: key in ("value", "low", "high", "n", "confidence", *tasks.SCORES) or key.startswith("pass@")
    summary = {path: {r["task"]: {key: value for key, value in r.items() if wanted(key)} for r in rs} for path, rs in results.items()}
    print(json.dumps(dict(seconds=round(time.monotonic() - started, 1), results=summary), ensure_ascii=False), flush=True)
    return results


if __name__ == "__main__":
    main(parse_config(Config))
