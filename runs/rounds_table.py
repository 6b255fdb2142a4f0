"""Tables of rejection-sampling runs over seeds: python runs/rounds_table.py out/rounds/*_s0 out/rounds/*_s1 ...

A folder's name up to _s<seed> is its arm. Success by round, mean over seeds [lowest, highest]; then what was sampled and kept.
"""
import json
import sys
from collections import defaultdict
from pathlib import Path


def spread(values):
    return f"{sum(values) / len(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def main(folders):
    arms = defaultdict(list)
    for folder in map(Path, folders):
        arms[folder.name.rpartition("_s")[0]].append(json.loads((folder / "rounds.json").read_text()))
    first = next(iter(arms.values()))[0]
    names = [r["task"] for r in first[0]["results"]]
    header = ["arm", "round", "seeds", *names, "kept for the next", "pool mean", "pool pass", "distinct per solved"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for arm, runs in arms.items():
        for k in range(max(map(len, runs))):
            rows = [run[k] for run in runs if k < len(run)]
            scores = [spread([row["results"][i]["value"] for row in rows]) for i in range(len(names))]
            pools = [row["pool"] for row in rows if "pool" in row]
            more = [spread([p[key] for p in pools]) if pools else "" for key in ("pool_mean", "pool_pass", "distinct_per_solved")]
            kept = f"{sum(p['kept'] for p in pools) / len(pools):.0f}" if pools else ""
            print(f"| {arm} | {k} | {len(rows)} | " + " | ".join([*scores, kept, *more]) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
