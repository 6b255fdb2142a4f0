"""Tables and the phase map of runs/asft_worlds.sh and asft_movielens.sh, from the results.json of their runs: python runs/asft_tables.py out/asft

Writes tables.md, phase_map.png and temperature.png there. Intervals are 95 %, Student's t over seeds; differences are paired by seed.
"""
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ranking import mean_interval
from recommend import markdown


def interval(values, digits=3):
    mean, low, high = mean_interval(values)
    return f"{mean:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if low is not None else "")


def load(root):
    """-> {world: {seed: results}} of the runs that have finished."""
    worlds = defaultdict(dict)
    for file in sorted(root.glob("*_s*/results.json")):
        name, _, seed = file.parent.name.rpartition("_s")
        worlds[name][int(seed)] = json.loads(file.read_text())
    return worlds


def last_of_selected(run, method):
    return next(r for r in reversed(run["results"]) if r["method"] == method and r["last"] and r["value"] == run["best"][f"post_{method}"]["value"])


def best_last(run, method):
    """The setting whose last step has the highest true value: what a method could reach, chosen with knowledge that no user has."""
    return max((r for r in run["results"] if r["method"] == method and r["last"]), key=lambda r: r["test"]["true_value"])


def world_table(runs):
    seeds = sorted(runs)
    methods = [m for m in runs[seeds[0]]["after"] if all(m in run["after"] for run in runs.values())]
    gain = lambda s, found, key: found["test"][key] - runs[s]["before"]["test"][key]
    selected = {m: [gain(s, runs[s]["after"][m], "true_value") for s in seeds] for m in methods}
    rows = []
    for m in sorted(methods, key=lambda m: -np.mean(selected[m])):
        after = [runs[s]["after"][m] for s in seeds]
        of = lambda key: [gain(s, a, key) for s, a in zip(seeds, after)]
        less = [a - b for a, b in zip(selected[m], selected["asft"])]
        last, known = ([gain(s, which(runs[s], m), "true_value") for s in seeds] for which in (last_of_selected, best_last))
        rows.append([m, interval(selected[m]), interval(less) if m != "asft" else "", interval(last), interval(known),
                     *(interval(of(key)) for key in ("judge", "high_ndcg@10", "ndcg@10")), f"{np.mean([a['test']['kl'] for a in after]):.2f}",
                     f"{np.mean([a['test']['bait'] for a in after]):.2f}"])
    header = ["method", "true value, selected", "less asft", "last step", "best setting's last step", "judge", "high NDCG@10", "NDCG@10", "KL", "bait"]
    return markdown(header, rows)


def heads_line(runs):
    cells = [[run["heads"]["val"][name]["rmse"] for run in runs.values()] for name in ("reward head", "item", "user", "user+item", "global")]
    less, synthetic = [a - b for a, b in zip(cells[0], cells[1])], "true_value" in next(iter(runs.values()))["before"]["test"]
    text = (f"{len(runs)} seeds. Reward head's RMSE on validation {interval(cells[0])}, less the item mean's {interval(less)} (below 0: better); "
            f"item {np.mean(cells[1]):.3f}, user {np.mean(cells[2]):.3f}, user+item {np.mean(cells[3]):.3f}, global {np.mean(cells[4]):.3f}.")
    if synthetic:
        r2, start = ([of(run) for run in runs.values()] for of in (lambda run: run["heads"]["test"]["reward head"]["r2_within"],
                                                                   lambda run: run["before"]["test"]["true_value"]))
        text += f" R^2 on true satisfaction within a history {interval(r2)}. BC's true value {interval(start)}."
    return text + "\n"


def points(run, method):
    """(KL, gain in true value) of every evaluation of a method's trials, and the start."""
    start = run["before"]["test"]["true_value"]
    return [(0.0, 0.0)] + [(r["test"]["kl"], r["test"]["true_value"] - start) for r in run["results"] if r["method"] == method]


def frontier(run, method, kl):
    """The best gain at a distance of at most kl, between neighbouring points of the upper hull; None beyond the farthest point."""
    found = sorted(points(run, method))
    if found[-1][0] < kl:
        return None
    hull = []
    for p in found:
        while len(hull) >= 2 and (hull[-1][1] - hull[-2][1]) * (p[0] - hull[-2][0]) <= (p[1] - hull[-2][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append(p)
    at, gain = zip(*hull)
    return float(max([np.interp(kl, at, gain), *(g for k, g in hull if k <= kl)]))


def frontier_table(runs, kls=(0.1, 0.2, 0.4, 0.8)):
    rows, methods = [], [m for m in next(iter(runs.values()))["after"] if m != "bc" and all(m in run["after"] for run in runs.values())]
    for m in methods:
        cells = [[frontier(run, m, kl) for run in runs.values() if m in run["after"]] for kl in kls]
        rows.append([m, *(interval([c for c in cell if c is not None]) + ("" if None not in cell else f" ({sum(c is not None for c in cell)} seeds)")
                          if any(c is not None for c in cell) else "not reached" for cell in cells)])
    return markdown(["gain in true value at", *(f"KL {kl}" for kl in kls)], rows)


def tolerance_table(runs, methods=("asft", "exp_rsft", "awr")):
    values = sorted({r["value"] for run in runs.values() for r in run["results"] if r["method"] == "asft"})
    rows = []
    for m in (m for m in methods if all(m in run["after"] for run in runs.values())):
        of = [[next(r["test"]["true_value"] for r in run["results"] if r["method"] == m and r["value"] == v and r["last"]) - run["before"]["test"]["true_value"]
               for run in runs.values()] for v in values]
        rows.append([m, *(interval(cell) for cell in of), interval([max(c) - min(c) for c in zip(*of)])])
    return markdown(["gain at the last step", *(f"weight_temp {v:g}" for v in values), "largest less smallest"], rows)


def hacking_table(runs, kls=(0.5, 1.0, 2.0)):
    """Judge's gain less the true gain at some distances, and the distance where the true value peaks: means over trials, each along its own training."""
    rows = []
    for m in (m for m in ("exact", "ppo", "tilt", "dpo", "asft", "exp_rsft") if all(m in run["after"] for run in runs.values())):
        gaps, peaks = [[] for _ in kls], []
        for run in runs.values():
            start, found = run["before"]["test"], [[] for _ in kls]
            for stage in dict.fromkeys(r["stage"] for r in run["results"] if r["method"] == m):
                path = sorted([(0.0, 0.0, 0.0)] + [(r["test"]["kl"], r["test"]["judge"] - start["judge"], r["test"]["true_value"] - start["true_value"])
                                                  for r in run["results"] if r["stage"] == stage])
                kl, judge, true = zip(*path)
                peaks.append(kl[int(np.argmax(true))])
                for cell, at in zip(found, kls):
                    if kl[-1] >= at:
                        cell.append(float(np.interp(at, kl, judge) - np.interp(at, kl, true)))
            for cell, of_trials in zip(gaps, found):
                if of_trials:
                    cell.append(float(np.mean(of_trials)))
        rows.append([m, *(interval(c) + ("" if len(c) == len(runs) else f" ({len(c)} seeds)") if c else "not reached" for c in gaps), f"{np.mean(peaks):.2f}"])
    return markdown(["judge's gain less true gain at", *(f"KL {kl}" for kl in kls), "true value peaks at KL"], rows)


BC_KEYS, AFTER_KEYS = ("hr@10", "ndcg@10", "hr@50", "mrr@10", "high_hr@10", "high_ndcg@10"), ("ndcg@10", "hr@10", "high_ndcg@10", "high_hr@10", "judge", "kl")


def backbone_table(worlds):
    """BC's numbers on the test targets, by backbone: the step is selected on validation; beside it the step that is best on test, as published."""
    rows = []
    for name, runs in worlds.items():
        of_best = [max((r["test"]["ndcg@10"], r["test"]["hr@10"]) for r in run["results"] if r["method"] == "") for run in runs.values()]
        rows.append([name, str(len(runs)), *(interval([run["before"]["test"][key] for run in runs.values()], 4) for key in BC_KEYS),
                     " / ".join(f"{np.mean(x):.4f}" for x in list(zip(*of_best))[::-1])])
    return markdown(["BC", "seeds", *BC_KEYS, "best on test, hr@10 / ndcg@10"], rows)


def rivals_table(runs):
    seeds = sorted(runs)
    rows = [["before (BC)", *(interval([runs[s]["before"]["test"][key] for s in seeds], 4) for key in AFTER_KEYS), ""]]
    for m in runs[seeds[0]]["after"]:
        of = lambda key: [runs[s]["after"][m]["test"][key] for s in seeds]
        less = [a - runs[s]["after"]["asft"]["test"]["high_ndcg@10"] for s, a in zip(seeds, of("high_ndcg@10"))]
        rows.append([m, *(interval(of(key), 4) for key in AFTER_KEYS), interval(less, 4) if m != "asft" else ""])
    return markdown(["selected on validation", *AFTER_KEYS, "high_ndcg@10 less asft's"], rows)


def phase_map(worlds, root):
    """Noise of the rewards against a bias that all observers share: the method with the highest mean gain in true value, and what the others have."""
    cells = {tuple(float(x) for x in name.removeprefix("map_n").split("_a")): runs for name, runs in worlds.items() if name.startswith("map_")}
    if not cells:
        return ""
    methods = list(next(iter(next(iter(cells.values())).values()))["after"])
    gains = {at: {m: [run["after"][m]["test"]["true_value"] - run["before"]["test"]["true_value"] for run in runs.values()] for m in methods}
             for at, runs in cells.items()}
    rows = []
    for at, runs in sorted(cells.items()):
        of = lambda get: [get(run["heads"]) for run in runs.values()]
        ranked = sorted(methods, key=lambda m: -np.mean(gains[at][m]))
        rows.append([f"{at[0]:g}", f"{at[1]:g}", f"{np.mean(of(lambda h: h['test']['reward head']['r2_within'])):.2f}",
                     f"{np.mean(of(lambda h: h['val']['reward head']['rmse'] - h['val']['item']['rmse'])):+.3f}", f"**{ranked[0]}**",
                     *(f"{np.mean(gains[at][m]):+.2f}" for m in methods)])
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colors = dict(zip(methods, plt.cm.Pastel1.colors))
    noises, biases = (sorted({at[i] for at in cells}) for i in (0, 1))
    figure, ax = plt.subplots(figsize=(2.4 * len(biases), 1.9 * len(noises)))
    for (noise, bias), found in gains.items():
        x, y = biases.index(bias), noises.index(noise)
        ranked = sorted(methods, key=lambda m: -np.mean(found[m]))
        ax.add_patch(plt.Rectangle((x, y), 1, 1, color=colors[ranked[0]], ec="white"))
        for i, m in enumerate(ranked):
            ax.text(x + 0.08, y + 0.88 - 0.8 * (i + 0.5) / len(methods), f"{m} {np.mean(found[m]):+.2f}", fontsize=8, va="center",
                    weight="bold" if i == 0 else "normal", color="black" if np.mean(found[m]) > 0 else "#a02020")
    ax.set_xlim(0, len(biases))
    ax.set_ylim(0, len(noises))
    ax.set_xticks([i + 0.5 for i in range(len(biases))], [f"{b:g}" for b in biases])
    ax.set_yticks([i + 0.5 for i in range(len(noises))], [f"{n:g}" for n in noises])
    ax.set_xlabel("autoplay: share of bait recorded as satisfying")
    ax.set_ylabel("noise of a reward")
    ax.set_title("gain in true value, settings selected on validation", fontsize=10)
    ax.spines[:].set_visible(False)
    figure.tight_layout()
    figure.savefig(root / "phase_map.png", dpi=110)
    return f"## Phase map, {min(map(len, cells.values()))} seeds (phase_map.png)\n\n" + markdown(
        ["noise", "autoplay", "R^2 within a history", "head's RMSE less the item mean's", "winner", *methods], rows)


def temperature(worlds, root):
    """True gain at the last step against the temperature of the weights, one panel for each noise of the rewards: too cold, and a few lucky events speak."""
    cells = {float(name.removeprefix("temp_n")): runs for name, runs in worlds.items() if name.startswith("temp_n")}
    if not cells:
        return ""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(cells), figsize=(3.6 * len(cells), 3.4), squeeze=False, sharey=True)
    rows, all_temps = [], sorted({r["value"] for runs in cells.values() for run in runs.values() for r in run["results"] if r["method"]})
    for ax, (noise, runs) in zip(axes[0], sorted(cells.items())):
        methods = list(next(iter(runs.values()))["after"])
        temps = sorted({r["value"] for run in runs.values() for r in run["results"] if r["method"]})
        for m in methods:
            gains = [[next(r["test"]["true_value"] for r in run["results"] if r["method"] == m and r["value"] == t and r["last"])
                      - run["before"]["test"]["true_value"] for run in runs.values()] for t in temps]
            found = [mean_interval(cell) for cell in gains]
            at = dict(zip(temps, map(interval, gains)))
            rows.append([f"{noise:g}", m, *(at.get(t, "") for t in all_temps)])
            ax.plot(temps, [mean for mean, *_ in found], "o-", ms=3, label=m)
            if len(runs) > 1:
                ax.fill_between(temps, [low for _, low, _ in found], [high for *_, high in found], alpha=.15)
        ax.set_xscale("log")
        ax.set_xticks(temps, [f"{t:g}" for t in temps])
        ax.minorticks_off()
        ax.set_title(f"noise {noise:g}", fontsize=10)
        ax.set_xlabel("weight_temp")
        ax.axhline(0, color="#999999", lw=0.8, ls=":")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("gain in true value, last step")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(root / "temperature.png", dpi=110)
    return (f"## Temperature of the weights, {min(map(len, cells.values()))} seeds (temperature.png)\n\n"
            + markdown(["noise", "gain at the last step", *(f"weight_temp {t:g}" for t in all_temps)], rows))


def main(root):
    worlds, parts = load(root), []
    if not worlds:
        raise SystemExit(f"{root}: no finished run (*_s*/results.json)")
    for name in ("noise", "bias", "scales", "scales_all", "scales_centered"):
        if name in worlds:
            runs = worlds[name]
            parts += [f"## World {name}", heads_line(runs), world_table(runs), frontier_table(runs), tolerance_table(runs), hacking_table(runs)]
    parts += [phase_map(worlds, root), temperature(worlds, root)]
    real = {name: runs for name, runs in worlds.items() if "true_value" not in next(iter(runs.values()))["before"]["test"]}
    if real:
        parts.append(backbone_table(real))
        parts += [heads_line(runs) + rivals_table(runs) for runs in real.values() if "asft" in next(iter(runs.values()))["after"]]
    (root / "tables.md").write_text("\n".join(parts) + "\n")
    print("\n".join(parts))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/asft"))
