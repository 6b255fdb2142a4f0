"""Is a balance pass accepted? python runs/balance_table.py out/balance/eval_s*/eval.json

Each file: eval.py of three checkpoints, before RL, after it, and after the balance pass. Accepted: on chat tasks the last is at most one standard
error below the first; on all others at most one below the second. Differences are paired over problems.
"""
import json
import sys
from pathlib import Path

import numpy as np


def change(after, before):
    """-> mean difference of two results on the same problems, and its standard error."""
    d = np.array(after["rows"][0]) - np.array(before["rows"][0])
    return float(d.mean()), float(d.std(ddof=1) / len(d) ** .5)


def main(paths):
    verdicts = {}
    print("| | task | before RL | after RL | balanced | to hold | change (standard error) | |\n|---|---|---|---|---|---|---|---|")
    for path in paths:
        for first, second, last in zip(*json.loads(Path(path).read_text()).values()):
            chat = first["task"].startswith("chat")
            moved, error = change(last, first if chat else second)
            verdicts[f"{path} {first['task']}"] = bool(moved >= -error)
            print(f"| {Path(path).parent.name} | {first['task']} | {first['value']:.3f} | {second['value']:.3f} | {last['value']:.3f} | "
                  f"{'before' if chat else 'after'} RL | {moved:+.3f} ({error:.3f}) | {'held' if moved >= -error else 'FAILED'} |")
    print(json.dumps(dict(accepted=all(verdicts.values()), held=verdicts)))


if __name__ == "__main__":
    main(sys.argv[1:])
