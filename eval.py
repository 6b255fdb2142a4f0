"""Score checkpoints: bits per byte on held-out text, and tasks answered by generation; several checkpoints in one table.

    python eval.py --init=out/base,out/sft --tasks=bpb:stdlib,facts_en,facts_ko,math_en --num_problems=300

Every checkpoint sees the same problems, answers them greedily and is graded by the same functions. Shares of right answers carry 95 %
Wilson intervals, bits per byte bootstrap intervals over documents, and differences to the first checkpoint are paired bootstraps. An
answer that cannot be read is not right and stays in the denominator; a grader that failed voids the task's score, it is never a 0.

Tasks: bpb:<source> (a text file or folder, all of it; of stdlib and toy/<task> the held-out part), the toy tasks (<task>, or
<task>@test_template for held-out phrasings), gsm8k. The toy chat tasks with tools run them: the turn's call is executed and its result is
appended, token in, token out.
"""
import difflib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import checkpoint
from common import parse_config, progress, setup_distributed, write_atomically
from data import gsm8k, open_sources, toy
from data.grading import Outcome
from data.packing import Loader, make_batch
from engine import generate
from kernels import linear_logprob
from tokenizer import ToolCallError, parse_tool_calls


@dataclass(frozen=True)
class Config:
    init: str = ""                   # checkpoint folders to compare, comma-separated: out/<name>, a step folder, or Hugging Face's
    tasks: str = "facts_en,facts_ko,sums,reasoning,math_en,math_ko"      # what to score, see the docstring
    num_problems: int = 300          # problems per task (a task may have fewer)
    max_bytes: int = 200_000         # text per bpb task
    seed: int = 0                    # chooses the problems
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"       # of the computation; auto: bfloat16 on CUDA
    out: str = ""                    # folder for eval.json (results and every answer) and table.md; empty: print only
    samples: int = 1                 # answers to print per task


# -----------------------------------------------------------------------------
# Intervals


def wilson(right, total, z=1.96):
    """-> (low, high): the 95 % score interval of a share (Wilson 1927); stays inside [0, 1] and is honest at 0 and at 1."""
    if total == 0:
        return 0.0, 1.0
    p, zz = right / total, z * z / total
    centre, half = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / total + zz / (4 * total)) / (1 + zz)
    return max(0.0, centre - half), min(1.0, centre + half)


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


class GsmProblem(NamedTuple):
    prompt: list
    answer: str


def answer(model, tokenizer, problems, *, max_new_tokens=400, temperature=0.0, seed=0, desc=""):
    """-> per problem, the messages that followed its prompt: assistant turns, tool results between them, the last turn as it ended.

    Calls are parsed strictly and executed; a turn whose call cannot be parsed gets the parser's message as its result. A response that
    ran out of tokens ends in its unfinished turn, which graders read as it stands. Text prompts give one message.
    """
    chat = isinstance(problems[0].prompt, list)
    prompts = [tokenizer.render_prompt(p.prompt) if chat else tokenizer.encode(p.prompt) for p in problems]
    said = [[] for _ in problems]

    def tools(i, _, ids):
        text = tokenizer.decode(ids[:-1])
        try:
            content, calls = parse_tool_calls(text)
        except ToolCallError as error:
            said[i] += [dict(role="assistant", content=text), dict(role="tool", content=json.dumps({"error": str(error)}))]
            return tokenizer.render_tool_results([said[i][-1]["content"]])
        if not calls:
            return None
        said[i].append(dict(role="assistant", content=content, tool_calls=calls))
        so_far = [call for message in said[i] for call in message.get("tool_calls", [])]
        results = toy.execute(problems[i], so_far)[-len(calls):]
        said[i] += [dict(role="tool", content=r) for r in results]
        return tokenizer.render_tool_results(results)

    rollouts = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                        tools=tools if chat and isinstance(problems[0], toy.Problem) else None, desc=desc)
    for messages, (rollout,) in zip(said, rollouts):
        start = len(rollout.mask) - rollout.mask[::-1].index(0) if 0 in rollout.mask else 0
        ids = rollout.ids[start:-1] if rollout.finish_reason == "stop" else rollout.ids[start:]
        messages.append(dict(role="assistant", content=tokenizer.decode(ids)))
    return said


def in_words(messages):
    """One line of a rollout, for people: turns, calls and results as they came."""
    return " ".join(f"-> {m['content']}" if m["role"] == "tool" else
                    " ".join([m["content"], *(f"{c['name']}({', '.join(map(str, c['arguments'].values()))})" for c in m.get("tool_calls", []))])
                    for m in messages).strip()


def run_task(model, tokenizer, task, *, num_problems=300, max_bytes=200_000, seed=0, desc=""):
    """-> {"task", "metric", "value", "low", "high", "n", "outcomes", "samples", ...}. value is None when a grader failed on any item."""
    if task.startswith("bpb:"):
        bits, num_bytes = bits_per_byte(model, tokenizer, task.removeprefix("bpb:"), max_bytes, seed)
        ratio = lambda a, b: a.sum() / b.sum()
        low, high = bootstrap(ratio, bits, num_bytes)
        return dict(task=task, metric="bpb", value=float(ratio(bits, num_bytes)), low=low, high=high, n=len(bits), samples=[],
                    rows=[bits.tolist(), num_bytes.tolist()])
    name, _, split = task.partition("@")
    extra = {}
    if name == "gsm8k":
        rows = gsm8k.load(split or "test")
        chosen = sorted(np.random.default_rng(seed).permutation(len(rows))[:num_problems].tolist())
        problems = [GsmProblem(gsm8k.prompt(rows[i]["question"]), rows[i]["answer"]) for i in chosen]
        said = answer(model, tokenizer, problems, desc=desc)
        outcomes = [gsm8k.grade(m[-1]["content"], p.answer) for m, p in zip(said, problems)]
        lenient = [gsm8k.grade(m[-1]["content"], p.answer, strict=False) == Outcome.RIGHT for m, p in zip(said, problems)]
        extra = dict(lenient=sum(lenient) / len(lenient))
    elif name in toy.TEXT_TASKS + toy.CHAT_TASKS:
        problems = toy.problems(name, split or "test", seed=seed, num=num_problems)
        said = answer(model, tokenizer, problems, max_new_tokens=toy.MAX_NEW_TOKENS[name], desc=desc)
        outcomes = [toy.grade(p, m if name in toy.CHAT_TASKS else m[0]["content"]) for p, m in zip(problems, said)]
        if toy.tools_of(name):                                           # was the call right, whatever was made of its result?
            calls = [toy.grade_call(p, m) == Outcome.RIGHT for p, m in zip(problems, said)]
            extra = dict(call=sum(calls) / len(calls))
    else:
        known = [*toy.TEXT_TASKS, *toy.CHAT_TASKS, "gsm8k", "bpb:<source>"]
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"--tasks: no task is called {name!r}" + (f"; did you mean {near[0]}?" if near else f", expected one of {known}"))
    counts = {str(o): outcomes.count(o) for o in Outcome}
    right, n = counts["right"], len(outcomes)
    low, high = wilson(right, n)
    samples = [dict(prompt=p.prompt if isinstance(p.prompt, str) else p.prompt[-1]["content"], response=in_words(m), outcome=str(o))
               for p, m, o in zip(problems, said, outcomes)]
    return dict(task=task, metric="acc", value=None if counts["grader_error"] else right / n, low=low, high=high, n=n, outcomes=counts,
                rows=[[float(o == Outcome.RIGHT) for o in outcomes]], samples=samples, **extra)


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
            if "call" in r:
                cell += f" call {r['call']:.3f}"
            cells.append(cell)
        arrow = "bpb, lower is better" if first["metric"] == "bpb" else "right"
        lines.append(f"| {first['task']} ({arrow}) | {first['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(cfg):
    _, _, _, device = setup_distributed()
    if not cfg.init:
        raise ValueError("--init is empty: name one or more checkpoint folders, comma-separated")
    results, started = {}, time.monotonic()
    for path in cfg.init.split(","):
        folder = checkpoint.newest(path)
        model, tokenizer = checkpoint.load_hf(folder, device)
        if cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda"):
            model.compute_dtype = torch.bfloat16
        tasks = cfg.tasks.split(",")
        results[path] = [run_task(model, tokenizer, task, num_problems=cfg.num_problems, max_bytes=cfg.max_bytes, seed=cfg.seed)
                         for task in progress(tasks, desc=f"eval {path}")]
        for r in results[path]:
            for s in r["samples"][:cfg.samples]:
                print(f"[{path}] {r['task']} {s['outcome']}: {s['prompt']!r} -> {s['response']!r}")
    print("\n" + table(results) + "\n")
    if cfg.out:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(cfg.out) / "eval.json", json.dumps(results, ensure_ascii=False) + "\n")
        write_atomically(Path(cfg.out) / "table.md", table(results) + "\n")
    summary = {path: {r["task"]: dict(value=r["value"], low=r["low"], high=r["high"], n=r["n"], **({"call": r["call"]} if "call" in r else {}))
                      for r in rs} for path, rs in results.items()}
    print(json.dumps(dict(seconds=round(time.monotonic() - started, 1), results=summary), ensure_ascii=False), flush=True)
    return results


if __name__ == "__main__":
    main(parse_config(Config))
