"""The quickstart's report: learning curves, retention against gain, tables and sample answers, as report.md and report.png.

    python report.py --root=out/quickstart

Reads what the runs left (metrics.jsonl, eval.json) and computes nothing new. A stage that did not run is left out.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import eval as evaluation
from common import parse_config, read_jsonl, write_atomically


@dataclass(frozen=True)
class Config:
    root: str = "out/quickstart"     # folder of the runs; the report goes there too


STAGES = {"base": "base", "mid_r0": "mid, no replay", "mid_r20": "mid, 20 % replay", "sft_base": "SFT from base", "sft": "SFT from mid"}
COLORS = {"base": "#777777", "mid_r0": "#d1495b", "mid_r20": "#2e86ab", "sft_base": "#e09f3e", "sft": "#3a7d44"}


def series(root, stage, key):
    """-> (steps, values) of one metric of one run."""
    points = [(line["step"], line[key]) for line in read_jsonl(root / stage / "metrics.jsonl") if key in line]
    return [s for s, _ in points], [v for _, v in points]


def smooth(values, keep=0.9):
    out, state = [], None
    for v in values:
        state = v if state is None else keep * state + (1 - keep) * v
        out.append(state)
    return out


def short(results):
    """{path: [result]} with the folder's name as key."""
    return {Path(path).name: rs for path, rs in results.items()}


def interval_bars(ax, results, tasks, names):
    for i, name in enumerate(names):
        rs = [next(r for r in results[name] if r["task"] == t) for t in tasks]
        x = [j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j in range(len(tasks))]
        errors = [[r["value"] - r["low"] for r in rs], [r["high"] - r["value"] for r in rs]]
        ax.bar(x, [r["value"] for r in rs], 0.8 / len(names), yerr=errors, label=STAGES[name], color=COLORS[name], capsize=2,
               error_kw=dict(lw=0.8))
    ax.set_xticks(range(len(tasks)), tasks)
    ax.set_ylim(0, 1.05)


def picture(root, mid, sft, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 3, figsize=(15, 8.5))
    (loss, retention, forgetting), (learning, tasks, by_source) = axes

    start = 0
    for stage in ("base", "mid_r0", "mid_r20"):
        steps, values = series(root, stage, "train/loss")
        offset = start if stage != "base" else 0
        loss.plot([s + offset for s in steps], smooth(values), color=COLORS[stage], label=STAGES[stage])
        if stage == "base":
            start = steps[-1]
    loss.axvline(start, color="#bbbbbb", lw=0.8)
    loss.set(title="Training loss: base, then mid-training", xlabel="step", ylabel="nats per token (smoothed)", ylim=(0, 4))

    interval_bars(retention, mid, ["facts_en", "facts_ko", "reasoning"], ["base", "mid_r0", "mid_r20"])
    retention.set(title="What replay keeps (facts), and the new skill", ylabel="share right, 95 % interval")

    names = [n for n in ("base", "mid_r0", "mid_r20") if n in mid]
    rs = [next(r for r in mid[n] if r["task"].startswith("bpb")) for n in names]
    forgetting.bar([STAGES[n] for n in names], [r["value"] for r in rs], color=[COLORS[n] for n in names], capsize=3,
                   yerr=[[r["value"] - r["low"] for r in rs], [r["high"] - r["value"] for r in rs]])
    forgetting.set(title="Held-out standard library (lower is better)", ylabel="bits per byte, 95 % interval")

    for stage in ("sft_base", "sft"):
        learning.plot(*series(root, stage, "val/acc_math_en"), "o-", color=COLORS[stage], label=STAGES[stage])
    learning.set(title="SFT: unseen English word problems", xlabel="step", ylabel="right call and right answer", ylim=(-0.02, 1.05))

    interval_bars(tasks, sft, [r["task"] for r in sft["sft"]], ["sft_base", "sft"])
    tasks.set(title="After SFT", ylabel="share right, 95 % interval")

    last = [line for line in read_jsonl(root / "sft" / "metrics.jsonl") if "train/loss" in line]
    for key in sorted(k for k in last[0] if k.startswith("train/loss_")):
        steps, values = series(root, "sft", key)
        by_source.plot(steps, smooth(values), label=key.removeprefix("train/loss_"))
    by_source.set(title="SFT from mid: loss by source", xlabel="step", ylabel="nats per token (smoothed)", yscale="log")

    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def samples(results, name, num=2):
    lines = []
    for r in results[name]:
        for s in r["samples"][:num]:
            mark = {"right": "right", "wrong": "WRONG"}.get(s["outcome"], s["outcome"])
            lines.append(f"| {r['task']} | {cell(s['prompt'])} | {cell(s['response'])} | {mark} |")
    return "\n".join(["| task | prompt | answer | |", "|---|---|---|---|", *lines])


def cell(text):
    text = text.replace("|", "\\|").replace("\n", " ⏎ ")
    return f"`{text[:110]}{'…' if len(text) > 110 else ''}`"


def main(cfg):
    root = Path(cfg.root)
    mid, sft = (short(json.loads((root / folder / "eval.json").read_text())) for folder in ("eval_mid", "eval_sft"))
    picture(root, mid, sft, root / "report.png")
    runs = [f"| {STAGES[s]} | {len(series(root, s, 'train/loss')[0])} | {series(root, s, 'train/tokens')[1][-1]:,} | "
            f"{sum(series(root, s, 'time/step')[1]):.0f} |" for s in STAGES]
    text = f"""# Quickstart report

![learning curves, retention against gain, accuracies](report.png)

## Base and mid-training

The base knows Python text and made-up facts in two languages. Mid-training teaches English reasoning; without replay it erases the facts.
Both mid-trained models saw the same new documents in the same order.

{evaluation.table(mid)}

## SFT

The same SFT from the base and from the mid-trained model. An answer is right if the tool call and the final answer are.

{evaluation.table(sft)}

### Answers of the model after SFT

{samples(sft, "sft")}

### Answers before SFT

{samples(mid, "mid_r20")}

## Runs

| stage | steps | trained tokens | seconds of training |
|---|---|---|---|
{chr(10).join(runs)}

Talk to the model: `.venv/bin/python chat.py --init={root}/sft`
"""
    write_atomically(root / "report.md", text)
    print(evaluation.table(mid) + "\n\n" + evaluation.table(sft))
    print(json.dumps(dict(report=str(root / "report.md"), picture=str(root / "report.png"))))


if __name__ == "__main__":
    main(parse_config(Config))
