"""Tables of runs/calibration.sh: python runs/calibration_table.py out/calibration --seeds="0 1 2 3 4" --rlcr="0 1 2"

Per set of test prompts and method: mean over seeds and its 95 % interval (Student's t). Then what the method that is stated in the end gains on others, seed
by seed, and confidence in words after RL with and without the RLCR reward.
"""
import argparse
import json
import math
from pathlib import Path

from parallel_rl_table import interval

COLUMNS = ("accuracy", "brier", "bss", "auroc", "acc@80", "ece", "floor_p95")


def value(found, key):
    return found[key]["value"] if isinstance(found[key], dict) else found[key]


def row(label, runs):
    """runs: of each seed {metric: number}; a method that could not be fitted in a seed leaves that seed out."""
    cells = []
    for key in COLUMNS:
        numbers = [value(found, key) for found in runs]
        cells.append(interval([x for x in numbers if x is not None]) if any(x is not None for x in numbers) else "-")
    return f"| {label} | {len(runs)} | " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--seeds", default="0 1 2 3 4")
    parser.add_argument("--rlcr", default="0 1 2")
    args = parser.parse_args()
    load = lambda name, seeds: [json.loads((args.root / f"{name}_s{s}" / "results.json").read_text()) for s in seeds.split()]
    header = "| method | seeds | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---|" * len(COLUMNS)
    runs, summary = load("ct", args.seeds), {}
    for name in runs[0]:
        print(f"\n**{name}**\n\n{header}")
        for label in dict.fromkeys(label for r in runs for label in r[name]["scores"]):
            print(row(label, [r[name]["scores"][label] for r in runs if label in r[name]["scores"]]))
        fitted = [r for r in runs if "ct & logprob" in r[name]["scores"]]
        final = [r[name]["scores"]["ct & logprob"] for r in fitted]
        summary[name] = dict(bss=interval([value(f, "bss") for f in final]))
        for before in ("query", "logprob"):
            ratio = [value(r[name]["scores"][before], "ece") / value(f, "ece") for r, f in zip(fitted, final)]
            summary[name][f"ece of {before} / ece"] = f"{math.exp(sum(map(math.log, ratio)) / len(ratio)):.1f} ({min(ratio):.1f} to {max(ratio):.1f})"
        for before in ("query + temperature", "logprob + temperature"):
            gains = [value(f, "auroc") - value(r[name]["scores"][before], "auroc") for r, f in zip(fitted, final) if before in r[name]["scores"]]
            summary[name][f"auroc minus {before}"] = interval(gains) if gains else "-"
        left = [r[name]["abstention"] for r in fitted if r[name]["abstention"]["error"] is not None]
        summary[name]["errors at the threshold / at full coverage"] = interval([a["error"] / a["error_of_all"] for a in left])
        summary[name]["coverage"] = interval([a["coverage"] for a in left])
        # the definition of the curve: the 80 % most confident answers of the test set itself
        summary[name]["errors at 80 % / at full coverage"] = interval([(1 - value(f, "acc@80")) / (1 - value(f, "accuracy")) for f in final])
    for name, found in summary.items():
        print(f"\n{name}: " + "; ".join(f"{key} {text}" for key, text in found.items()))
    if args.rlcr:
        print(f"\n**confidence in words, in domain**\n\n{header}")
        for name in ("rlcr", "rlvr"):
            print(row(name, [r["in domain"]["scores"]["verbal"] for r in load(f"words_{name}", args.rlcr)]))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
