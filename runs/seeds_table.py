"""Tables over seeds from the eval.json of several eval.py runs: `python runs/seeds_table.py out/x/eval_mid_s0 out/x/eval_mid_s1 ...`.

Checkpoints whose names differ only in `_s<seed>` are one row. Each cell: mean over seeds, [lowest, highest], and in words how many seeds.
"""
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

values, order = defaultdict(lambda: defaultdict(list)), []
for folder in sys.argv[1:]:
    for path, results in json.loads((Path(folder) / "eval.json").read_text()).items():
        name = re.sub(r"_s\d+$", "", Path(path).name)
        order += [name] if name not in order else []
        for r in results:
            values[name][r["task"]].append(r["value"])
            if "call" in r:
                values[name][r["task"] + " call"].append(r["call"])
groups = defaultdict(list)                                    # rows that were scored on the same tasks share a table
for name in order:
    groups[tuple(values[name])].append(name)
for tasks, names in groups.items():
    print("| checkpoint | seeds | " + " | ".join(tasks) + " |\n|---|---|" + "---|" * len(tasks))
    for name in names:
        cells = [f"{sum(v) / len(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for v in values[name].values()]
        print(f"| {name} | {len(next(iter(values[name].values())))} | " + " | ".join(cells) + " |")
    print()
print(json.dumps(values))
