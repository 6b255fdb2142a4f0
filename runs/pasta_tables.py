"""Tables of `bash runs/pasta.sh`: mean over seeds [95 %, Student's t]. python runs/pasta_tables.py out/pasta"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ranking import mean_interval  # noqa: E402
from recommend import markdown  # noqa: E402

POLICIES = ("base", "random", "bc", "myopic", "iql", "oracle_greedy", "oracle_type")


def cell(values, digits=3):
    mean, low, high = mean_interval(values)
    return f"{mean:.{digits}f}" + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


def runs(root, name):
    """{seed: results.json of out/pasta/<name>_<seed>}, crowds without their seed."""
    found = {}
    for path in sorted(root.glob(f"{name}_*/results.json")):
        results = json.loads(path.read_text())
        crowds = results["results"] if "results" in results and isinstance(results["results"], dict) else {}
        found[int(path.parent.name.rpartition("_")[2])] = dict(results, crowds={c.rpartition("_")[0] or c: v for c, v in crowds.items()})
    return found


def users(root):
    """How well types were found, and picks foretold, on users who were held out: a row for A and one for B."""
    rows = []
    for name in ("A", "B"):
        of = [json.loads(path.read_text())["test"].values() for path in sorted(root.glob(f"{name}_*/results.json"))]
        of = [test for (test,) in of]
        if of:
            foretold = [cell([x[by][what] for x in of]) for what in ("choice_accuracy", "compare_accuracy") for by in ("prior", "filtered")]
            rows.append([name, str(len(of)), cell([x["ari"] for x in of]), cell([x["accuracy"] for x in of]), *foretold])
    print(markdown(["user model", "seeds", "adjusted Rand", "matched", "picks, prior", "picks, filtered", "comparisons, prior", "comparisons, filtered"], rows))


def main(root):
    users(root)
    agents = runs(root, "agents")
    if not agents:
        sys.exit(f"{root}: no agents_<seed>/results.json yet")
    for crowd, label in (("world", "W, the hidden world"), ("B", "B, a user model that training never saw"), ("A", "A, the simulator of the training")):
        rows = []
        for policy in POLICIES:
            of = [r["crowds"][crowd][policy] for r in agents.values() if policy in r["crowds"].get(crowd, {})]
            if of:
                gap = [x["gap"] for x in of if x["gap"] is not None]
                means, last, wins = ([x[key] for x in of] for key in ("mean", "last_turn", "wins"))
                less = [x["less_random"][0] for x in of]
                rows.append([policy, cell(means), cell(last), cell(less), cell(gap, 2) if gap else "-", cell(wins, 2)])
        print(f"**{label}**, {len(agents)} seeds\n")
        print(markdown(["policy", "utility per turn", "turn 5", "turn 5 less random", "share of the gap to oracle_type, turn 5", "sessions above base"], rows))
        for other in ("random", "bc", "myopic", "base", "oracle_greedy"):
            of = [(r["crowds"][crowd]["iql"], r["crowds"][crowd][other]) for r in agents.values() if other in r["crowds"].get(crowd, {})]
            print(f"IQL less {other}: turn 5 {cell([a['last_turn'] - b['last_turn'] for a, b in of])}, per turn {cell([a['mean'] - b['mean'] for a, b in of])}")
        print()
    mixed = {name: runs(root, name) for name in ("real", "both")}
    seeds = sorted(set(agents).intersection(*mixed.values()))
    if seeds:
        rows = []
        for name, found in (("real", mixed["real"]), ("simulated", agents), ("both", mixed["both"])):
            cells = [cell([found[s]["crowds"][crowd]["iql"][key] for s in seeds]) for crowd in ("world", "B") for key in ("mean", "last_turn")]
            rows.append([name, *cells])
        print(markdown([f"IQL trained on ({len(seeds)} seeds)", "W, per turn", "W, turn 5", "B, per turn", "B, turn 5"], rows))
        for a, b in (("both", "real"), ("both", "simulated"), ("simulated", "real")):
            at = lambda n, s: (agents if n == "simulated" else mixed[n])[s]["crowds"]["world"]["iql"]["last_turn"]
            print(f"{a} less {b}, W: turn 5 " + cell([at(a, s) - at(b, s) for s in seeds]))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/pasta"))
