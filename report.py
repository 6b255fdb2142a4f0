"""The quickstart's report: learning curves, retention against gain, tables and sample answers, as report.md and report.png.

    python report.py --root=out/quickstart

Reads what the runs left (metrics.jsonl, eval.json) and computes nothing new.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import eval as evaluation
from calibration import save_figure
from common import parse_config, read_jsonl, write_atomically
from recommend import markdown


@dataclass(frozen=True)
class Config:
    root: str = "out/quickstart"     # folder of the runs; the report goes there too


STAGES = {"base": "base", "mid_r0": "mid, no replay", "mid_r20": "mid, 20 % replay", "sft": "SFT"}
RL = {"rl_logic": "GRPO on the logic track", "rl_chat": "GRPO on the chat track", "merged": "merged"}
COLORS = {"base": "#777777", "mid_r0": "#d1495b", "mid_r20": "#2e86ab", "sft": "#3a7d44", "round 0": "#edae49", "round 1": "#00798c",
          "rl_logic": "#8f2d56", "rl_chat": "#218380", "merged": "#fbb13c"}


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
        ax.bar(x, [r["value"] for r in rs], 0.8 / len(names), yerr=errors, label=(STAGES | RL).get(name, name), color=COLORS[name], capsize=2,
               error_kw=dict(lw=0.8))
    ax.set_xticks(range(len(tasks)), [t.replace("@test_template", "\nnew wording").replace("@test_schema", "\nnew names") for t in tasks])
    ax.set_ylim(0, 1.05)


def picture(root, mid, sft, rounds, rl, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(3, 4, figsize=(20, 12.5))
    (loss, forgetting, retention, success), (text, by_source, tasks, by_level), (score, entropy, length, tracks) = axes

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
    retention.set(title="What replay keeps (facts), what is learned (reasoning)", ylabel="share right, 95 % interval")

    for stage in ("mid_r0", "mid_r20"):
        for key, style in (("val/loss_facts_en", "-"), ("val/loss_facts_ko", "--")):
            forgetting.plot(*series(root, stage, key), style, color=COLORS[stage], label=f"{STAGES[stage]}, {key[-8:]}")
    forgetting.set(title="Forgetting, while mid-training goes on", xlabel="step", ylabel="loss on the facts, nats per token")

    names = ["base", "mid_r0", "mid_r20"]
    rs = [next(r for r in mid[n] if r["task"].startswith("bpb")) for n in names]
    text.bar([STAGES[n] for n in names], [r["value"] for r in rs], color=[COLORS[n] for n in names], capsize=3,
             yerr=[[r["value"] - r["low"] for r in rs], [r["high"] - r["value"] for r in rs]])
    text.set(title="Held-out standard library (lower is better)", ylabel="bits per byte, 95 % interval")

    interval_bars(tasks, sft, [r["task"] for r in sft["sft"]], ["mid_r20", "sft"])
    calls = [(i, r["call"]) for i, r in enumerate(sft["sft"]) if "call" in r]
    tasks.plot([i + 0.2 for i, _ in calls], [c for _, c in calls], "k_", ms=16, label="SFT: right call")
    tasks.tick_params(axis="x", labelsize=8)
    tasks.set(title="Before and after SFT, unseen problems", ylabel="share right, 95 % interval")

    last = [line for line in read_jsonl(root / "sft" / "metrics.jsonl") if "train/loss" in line]
    for key in sorted({k for line in last for k in line if k.startswith("train/loss_")}):
        steps, values = series(root, "sft", key)
        by_source.plot(steps, smooth(values), label=key.removeprefix("train/loss_"))
    by_source.set(title="SFT: loss by source", xlabel="step", ylabel="nats per token (smoothed)", yscale="log")

    results = {f"round {row['round']}": row["results"] for row in rounds}
    interval_bars(success, results, [r["task"] for r in rounds[0]["results"]], list(results))
    success.set(title="Rejection sampling: success by round", ylabel="share right, 95 % interval")
    for i, (name, rs) in enumerate(results.items()):
        levels = rs[0]["levels"]
        by_level.bar([j + 0.4 * i for j in range(len(levels))], levels.values(), 0.36, label=name, color=COLORS[name])
    by_level.set_xticks([j + 0.2 * (len(results) - 1) for j in range(len(levels))], [f"level {level}" for level in levels])
    by_level.set(title=f"{rounds[0]['results'][0]['task']}: success by level", ylabel="share right", ylim=(0, 1.05))

    for ax, key, title, label in ((score, "rollout/score", "RL: reward of sampled answers", "mean reward"),
                                  (entropy, "train/entropy", "RL: entropy, and KL to the start (dashed)", "nats per token"),
                                  (length, "rollout/response_length", "RL: length of answers", "sampled tokens")):
        for name in ("rl_logic", "rl_chat"):
            ax.plot(*series(root, name, key), color=COLORS[name], label=RL[name])
            if ax is entropy:
                ax.plot(*series(root, name, "rollout/ref_kl"), "--", color=COLORS[name])
        ax.set(title=title, xlabel="step", ylabel=label)
        ax.set_ylim(bottom=0)
    interval_bars(tracks, rl, [r["task"] for r in rl["sft"]], list(rl))
    tracks.set(title="Parallel RL: each track alone, and merged", ylabel="share right, 95 % interval")

    save_figure(fig, axes.flat, path)


def samples(results, name, num=2):
    lines = []
    for r in results[name]:
        for s in r["samples"][:num]:
            mark = {"right": "right", "wrong": "WRONG"}.get(s["outcome"], s["outcome"])
            lines.append(f"| {r['task']} | {cell(s['prompt'])} | {cell(s['response'])} | {mark} |")
    return "\n".join(["| task | prompt | answer | |", "|---|---|---|---|", *lines])


def rounds_table(rounds):
    names = [r["task"] for r in rounds[0]["results"]]
    levels = list(rounds[0]["results"][0]["levels"])
    lines = [f"| round | {' | '.join(names)} | {' | '.join(f'level {level}' for level in levels)} |", "|---" * (1 + len(names) + len(levels)) + "|"]
    for row in rounds:
        cells = [f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in row["results"]]
        cells += [f"{row['results'][0]['levels'][level]:.2f}" for level in levels]
        lines.append(f"| {row['round']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kept_table(rounds):
    lines = ["| sampled by round | answers | right | problems solved | kept | left out |", "|---|---|---|---|---|---|"]
    for row in rounds:
        if pool := row.get("pool"):
            reasons = ", ".join(f"{number} {reason}" for reason, number in pool["reasons"].items() if reason != "kept")
            lines.append(f"| {row['round']} | {pool['num_sampled']} | {pool['pool_mean']:.3f} | {pool['pool_pass']:.3f} | {pool['kept']} | {reasons} |")
    return "\n".join(lines)


def confidence_table(calibrated, in_words):
    """Rows of two runs of train_calibration.py: the merged model's, and after RL with confidence in words, which has answers of its own."""
    columns = ("accuracy", "brier", "bss", "auroc", "acc@80", "ece")
    lines = ["| | n | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]

    def row(label, scores, n):
        cells = [found["value"] if isinstance(found, dict) else found for found in (scores[key] for key in columns)]
        lines.append(f"| {label} | {n} | " + " | ".join("-" if value is None else f"{value:.3f}" for value in cells) + " |")
    for name, found in calibrated.items():
        for label in ("query", "query + temperature", "logprob", "logprob + temperature", "ct", "ct & logprob"):
            if label in found["scores"]:
                row(f"{name}: {label}", found["scores"][label], found["num_answers"])
    row("in domain: in words, after RL with the RLCR reward", in_words["in domain"]["scores"]["verbal"], in_words["in domain"]["num_answers"])
    return "\n".join(lines)


def recommender_table(root):
    """Selected settings in both worlds: what judges believe, what is true, and where the target of the log ranks."""
    rows = []
    for name, world in (("asft", "rewards with noise"), ("asft_bias", "and bait followed by autoplay")):
        run = json.loads((root / name / "results.json").read_text())
        for method, found in {"BC, before": run["before"], **run["after"]}.items():
            test = found["test"]
            rows.append([world, method, *(f"{test[key]:.3f}" for key in ("true_value", "judge", "reward_model", "bait", "high_ndcg@10", "ndcg@10", "kl"))])
    return markdown(["world", "method", "true value", "judges say", "reward model says", "bait", "NDCG@10, high rewards", "NDCG@10", "KL to BC"], rows)


def slates_table(root):
    """What held-out people got of each agent: the hidden world, which no agent was trained in, and the user model, in which all were."""
    found = json.loads((root / "slates" / "results.json").read_text())["results"]
    crowds = {"world": "the hidden world", "users": "the user model that trained them"}
    rows = [[crowds.get(crowd, crowd), policy, f"{r['mean']:.3f}", f"{r['last_turn']:.3f}", "{:+.3f} [{:+.3f}, {:+.3f}]".format(*r["less_random"]),
             f"{r['wins']:.2f}"] for crowd, policies in found.items() for policy, r in policies.items()]
    return markdown(["people of", "policy", "utility per turn", "turn 5", "turn 5 less random slates", "sessions above base"], rows)


def cell(text):
    text = text.replace("|", "\\|").replace("\n", " ⏎ ")
    return f"`{text[:110]}{'…' if len(text) > 110 else ''}`"


def main(cfg):
    root = Path(cfg.root)
    mid, math, rest = (short(json.loads((root / folder / "eval.json").read_text())) for folder in ("eval_mid", "eval_math", "eval_rest"))
    sft = {name: math[name] + rest[name] for name in math}
    rounds = json.loads((root / "rounds" / "rounds.json").read_text())
    rl = short(json.loads((root / "eval_rl" / "eval.json").read_text()))
    picture(root, mid, sft, rounds, rl, root / "report.png")
    runs = [f"| {STAGES[s]} | {len(series(root, s, 'train/loss')[0])} | {series(root, s, 'train/tokens')[1][-1]:,} trained tokens | "
            f"{sum(series(root, s, 'time/step')[1]):.0f} |" for s in STAGES]
    runs += [f"| {RL[s]} | {len(series(root, s, 'rollout/score')[0])} | {series(root, s, 'rollout/samples')[1][-1]:,} samples | "
             f"{sum(series(root, s, 'time/step')[1]):.0f} |" for s in ("rl_logic", "rl_chat")]
    calibrated, in_words = (json.loads((root / name / "results.json").read_text()) for name in ("calibration", "words"))
    merged = json.loads((root / "merged" / "merge.json").read_text())
    text = f"""# Quickstart report

![learning curves, retention against gain, accuracies](report.png)

## Base and mid-training

The base knows Python text and made-up facts in two languages. Mid-training teaches English reasoning; without replay it erases the facts.
Both mid-trained models saw the same new documents in the same order.

{evaluation.table(mid)}

## SFT

Unseen problems; `@test_template` also has wording that training never had. An answer is right if the calls and the final answer are; `call` is the
share of right calls alone.

{evaluation.table(sft)}

### Answers of the model after SFT

{samples(sft, "sft")}

### Answers before SFT

{samples(mid, "mid_r20")}

## Rejection sampling

The model after SFT goes on with 64 demonstrations of English word problems (round 0). It then answers new problems, calls are executed, right answers join
the demonstrations, and it is trained again from where it was before (round 1). Levels are by the operators of the expression.

{rounds_table(rounds)}

{kept_table(rounds)}

Every answer with the reason why it was kept or not: `{root}/rounds/round_0/rollouts.jsonl`

## Parallel RL

The model after SFT is trained by GRPO on two tracks apart: logic (word problems, rewarded when call and answer are right) and chat (instructions, rewarded when
every constraint holds; of their demonstrations in SFT 70 % broke one, so that the model can follow them and often does not).
`merge.py --how={merged["how"]}` adds both changes to the model they started from.

{evaluation.table(rl)}

Page through the sampled answers with their rewards: `.venv/bin/python chat.py --rollouts={root}/rl_logic`

## Calibration

Does the merged model know when it is right? Answers to prompts that nothing was fitted on. `query` asks the model as it is whether its answer is right,
`logprob` is the mean probability of its tokens, `temperature` rescales either. `ct` is the query after calibration-tuning, `ct & logprob` both together:
what the checkpoint states from now on (`chat.py` and `eval.py` show it). `brier` is lower, `bss` and `auroc` higher where a confidence knows more; a
constant has 0 and .5.

{confidence_table(calibrated, in_words)}

![confidence before and after: calibrated where the dots are on the diagonal](calibration/calibration.png)

All methods with intervals: `{root}/calibration/report.md`

## Recommenders

Another model: HSTU, cloned from a log of who took what (BC), then moved towards what satisfies by advantage-weighted SFT and its rivals, from one noisy reward
per event. The worlds are synthetic, so the true value of each policy is known. `exact` is the strongest optimiser of the reward model. In the second world
satisfaction with bait is recorded too high, which judges with data of their own cannot see. Settings are selected on validation, by rank.

{recommender_table(root)}

![what is believed and what is true against the distance from BC](asft/frontier.png)

![the same where all observers are wrong in one way](asft_bias/frontier.png)

The whole comparison: `{root}/asft/report.md`. Ask it: `.venv/bin/python chat.py --init={root}/asft`

## An agent that learns what a person wants to see

People of a hidden world refine prompts: each turn they see four columns of images and pick one. Types of user were fitted to their picks by EM, sessions were
simulated with these types, and implicit Q-learning trained an agent on them. `myopic` is the same agent looking one turn ahead, `base` the generator of
prompts as it comes, `oracle_greedy` knows the person and looks one turn ahead.

{slates_table(root)}

![utility by turn](slates/utility.png)

![one person, two agents](slates/storyboard.png)

Types of user, and whether they are the true ones: `{root}/users/report.md`. Play: `.venv/bin/python chat.py --init={root}/slates`

## Runs

| stage | steps | data | seconds of training |
|---|---|---|---|
{chr(10).join(runs)}

Talk to the model: `.venv/bin/python chat.py --init={root}/calibration`
"""
    write_atomically(root / "report.md", text)
    print("\n\n".join([evaluation.table(mid), evaluation.table(sft), rounds_table(rounds), evaluation.table(rl), confidence_table(calibrated, in_words),
                       recommender_table(root), slates_table(root)]))
    print(json.dumps(dict(report=str(root / "report.md"), picture=str(root / "report.png"))))


if __name__ == "__main__":
    main(parse_config(Config))
