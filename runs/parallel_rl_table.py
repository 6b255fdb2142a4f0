"""Tables of runs/parallel_rl.sh: python runs/parallel_rl_table.py out/parallel_rl --seeds="0 1 2 3 4" --parallel="0 1 2"

Per run, held-out accuracy before and after, mean over seeds and its 95 % interval (Student's t). Then, at equal rollouts, the specialists, their
merges and the joint run on both tracks, and the share of each specialist's gain that is kept. Results are kept in table.json, so a seed is
evaluated once.
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoint
import merge
from common import read_jsonl, write_atomically
from eval import run_task

TASKS = ("math_en", "math_en@test_template", "chat_en")
MERGES = {"average": dict(how="linear"), "task, lam .7": dict(how="task", lam=.7), "task, lam 1": dict(how="task"), "ties, density .2": dict(how="ties"),
          "ties, density .5": dict(how="ties", density=.5), "ties, density 1": dict(how="ties", density=1.0), "ram": dict(how="ram"),
          "ram_plus": dict(how="ram_plus")}
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}       # Student's t by degrees of freedom


def interval(values):
    """-> "mean [low, high]", 95 % of the mean over seeds."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return f"{mean:.3f}"
    half = T95[n - 1] * (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def before_after(root, name, seeds, key):
    """One row: accuracy at step 0 and at the end from the runs' own metrics, and what stayed sane on the way."""
    runs = [[line for line in read_jsonl(root / f"{name}_s{s}" / "metrics.jsonl")] for s in seeds]
    scores = [[line[key] for line in run if key in line] for run in runs]
    gain = [b - a for a, b in ((x[0], x[-1]) for x in scores)]
    last = lambda k: [next((line[k] for line in reversed(run) if k in line), None) for run in runs]
    rest = [" to ".join(f"{f(v):.3g}" for f in (min, max)) if None not in (v := last(k)) else ""
            for k in ("train/entropy", "rollout/response_length", "rollout/samples")]
    relative = sum(gain) / sum(x[0] for x in scores)
    return [name, interval([x[0] for x in scores]), interval([x[-1] for x in scores]), interval(gain), f"{relative:+.0%}", *rest]


def evaluated(root, label, path, done, num):
    if label not in done:
        model, tokenizer = checkpoint.load_hf(checkpoint.newest(path))
        done[label] = {task: run_task(model, tokenizer, task, num_problems=num)["value"] for task in TASKS}
        write_atomically(root / "table.json", json.dumps(done, indent=1) + "\n")
        print(label, done[label], file=sys.stderr, flush=True)
    return done[label]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--seeds", default="0 1 2 3 4")
    parser.add_argument("--parallel", default="0 1 2")
    parser.add_argument("--num", type=int, default=300)
    args = parser.parse_args()
    root, seeds, parallel = args.root, args.seeds.split(), args.parallel.split()
    print("| run | start | end | gain | relative | entropy | tokens | samples |\n|---|---|---|---|---|---|---|---|")
    for name, key in (("grpo_logic", "val/acc_math_en"), ("ppo_logic", "val/acc_math_en"), ("dpo_chat", "val/acc_chat_en")):
        if all((root / f"{name}_s{s}" / "metrics.jsonl").exists() for s in seeds):
            print("| " + " | ".join(before_after(root, name, seeds, key)) + " |")

    print("\n| perfectible prompts | start, share right | mean of the last 5 steps | best step |\n|---|---|---|---|")
    for s in parallel:
        if list((path := root / f"perfectible_s{s}").glob("step_*")):
            state = json.loads((checkpoint.newest(path) / "train.json").read_text())["state"]
            shares = [x for x in state["solved"] if .2 <= x <= .8]
            right = [line["rollout/right"] for line in read_jsonl(path / "metrics.jsonl") if "rollout/right" in line]
            print(f"| {len(shares)} (seed {s}) | {sum(shares) / len(shares):.3f} | {sum(right[-5:]) / len(right[-5:]):.3f} | {max(right):.3f} |")

    done = json.loads((root / "table.json").read_text()) if (root / "table.json").exists() else {}
    rows = {}
    for s in parallel:
        for name in ("start", "grpo_logic", "grpo_chat", "joint"):
            rows.setdefault(name, []).append(evaluated(root, f"{name}_s{s}", root / f"{name}_s{s}", done, args.num))
        for label, settings in MERGES.items():
            out = root / "merged" / f"{label.replace(', ', '_').replace(' ', '')}_s{s}"
            if f"{label}_s{s}" not in done:
                with contextlib.redirect_stdout(sys.stderr):
                    merge.main(merge.Config(base=str(checkpoint.newest(root / f"start_s{s}")), models=f"{root / f'grpo_logic_s{s}'},{root / f'grpo_chat_s{s}'}",
                                            out=str(out), overwrite=True, **settings))
            rows.setdefault(label, []).append(evaluated(root, f"{label}_s{s}", out, done, args.num))
    kept = lambda i, task, expert: (rows_i(i, task) - rows["start"][i][task]) / (rows[expert][i][task] - rows["start"][i][task])
    print(f"\n| {len(parallel)} seeds, {args.num} problems | {' | '.join(TASKS)} | logic gain kept | chat gain kept |\n{'|---' * (len(TASKS) + 3)}|")
    for name, results in rows.items():
        rows_i = lambda i, task: results[i][task]
        shares = [interval([kept(i, task, expert) for i in range(len(parallel))]) if name != "start" else ""
                  for task, expert in (("math_en", "grpo_logic"), ("chat_en", "grpo_chat"))]
        print(f"| {name} | " + " | ".join(interval([r[task] for r in results]) for task in TASKS) + f" | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
