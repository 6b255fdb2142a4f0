"""What a recommender is worth: states of its users, ranks over the whole catalogue, exact values of its policy, its reward model beside plain averages,
and the report. Shared plumbing of train_asft.py and chat.py; the metrics are in ranking.py.
"""
import difflib
from typing import NamedTuple

import numpy as np
import torch

import ranking
from checkpoint import Catalogue
from data import bandit, interactions
from data.interactions import TEST, TRAIN, VAL


class World(NamedTuple):
    """A log as a run sees it: E events, U users, I items. `truth` is for evaluation alone."""
    log: interactions.Log
    part: np.ndarray            # (E,) TRAIN, VAL or TEST
    reward: np.ndarray          # (E,) fp32
    rows: np.ndarray            # (R, 3) training histories: see interactions.train_rows
    targets: dict               # {"val", "test": (n, 3) rows of one target each}
    high: dict                  # {"val", "test": (n,) bool: targets with a high raw reward}
    policy_users: int           # the first so many targets are looked at with exact values of the policy
    visible: np.ndarray         # (U,) bool: users whose rewards the reward model and the methods read
    judged: np.ndarray          # (U,) bool: users whose rewards the judges read
    truth: bandit.Truth | None
    catalogue: Catalogue
    mask_seen: bool = True      # ranks leave out what the user had before; policies always do
    matrix: tuple | None = None # (row (U,), table (R, I)) of interactions.full_matrix: for evaluation alone

    def readers(self, users):
        """Rows of training histories of some users. users (U,) bool."""
        return self.rows[users[self.log.user[self.rows[:, 0]]]]


def context(world, batch, device):
    """The arguments of a Recommender's forward. Past rewards are nan where they are not for the model to read."""
    past = torch.where(torch.from_numpy(world.visible)[batch.users][:, None], batch.past_rewards, torch.nan)
    return [t.to(device) for t in (batch.items, batch.lengths, batch.times, past)]


@torch.no_grad()
def states(model, world, rows, device, size=256):
    """Yields (slice of rows, Batch, flat places of its decisions (N,), their states (N, D)), block by block; the caller's own work may need no_grad."""
    model.eval()
    for start in range(0, len(rows), size):
        batch = interactions.batch(world.log, world.reward, rows, np.arange(start, min(start + size, len(rows))))
        hidden = model(*context(world, batch, device))
        places = (batch.targets.flatten() > 0).nonzero()[:, 0]
        yield slice(start, start + size), batch, places, hidden.flatten(0, 1)[places.to(device)]


def seen_so_far(world, rows, indices, items, places):
    """(N, I) bool: what the user had up to each decision, events before the row included, as in evaluation. rows, indices: of the batch whose items
    (B, T) are; places (N,) flat positions in it."""
    num_items = len(world.catalogue.item_ids)
    B, T = items.shape
    first = torch.full((B, num_items + 1), T, dtype=torch.int16, device=items.device)                # column where an item is first met
    first.scatter_reduce_(1, items, torch.arange(T, dtype=torch.int16, device=items.device).expand(B, T), "amin")
    start = rows[np.asarray(indices), 0]
    earlier = interactions.seen(world.log, np.stack([start, start + 1, start], 1), np.arange(B), num_items)
    first[:, 1:].masked_fill_(earlier.to(items.device), -1)
    return first[places // T, 1:] <= (places % T).to(torch.int16)[:, None]


# -----------------------------------------------------------------------------
# Ranks of the targets, and exact values of the policy where a table of rewards is at hand


@torch.no_grad()
def tables_of(ref, judges, world, device):
    """-> {"val", "test": {name: (n, I)}} for the first policy_users targets: log-probabilities of ref (ref_logp), and what ref's reward head, the judges
    and, in the synthetic world, the truth say of every item. A row costs I numbers a table."""
    tables = {}
    for name, rows in world.targets.items():
        rows = rows[:world.policy_users]
        seen = interactions.seen(world.log, rows, np.arange(len(rows)), len(world.catalogue.item_ids)).to(device)
        of = lambda model: torch.cat([hidden for *_, hidden in states(model, world, rows, device)])
        hidden = of(ref)
        found = dict(ref_logp=ranking.log_policy(ref.logits(hidden), seen), reward_model=ref.reward.catalogue(ref.judged(hidden)))
        if judges:
            opinions = torch.stack([judge.reward.catalogue(judge.judged(of(judge))) for judge in judges])
            found["judge"] = opinions.mean(0)
            if len(judges) > 1:
                found["judge_spread"] = opinions.std(0)
        if world.truth is not None:
            found["true_value"] = torch.from_numpy(world.truth.mu[world.log.user[rows[:, 0]]]).to(device)
            found["bait"] = torch.from_numpy(world.truth.bait).float().to(device)
        tables[name] = found
    return tables


@torch.no_grad()
def evaluate(model, world, tables, device, tilt=0.0):
    """-> {"val", "test": ({metric: float}, {metric: (n,) by target})}: hr@k, ndcg@k, mrr@k over all targets, high_hr@k, .. over those with a high reward,
    full_matrix, the mean of the fully observed log under the policy among the items that it knows (of users in it), means under the policy of each table
    and its value at the policy's first item (top1_..), kl to ref and entropy. tilt: tilt * rhat is added to the logits. A target that no training event
    has is a miss: its embedding is random."""
    results, num_items = {}, len(world.catalogue.item_ids)
    known = np.bincount(world.log.item[world.part == TRAIN], minlength=num_items + 1) > 0
    for name, rows in world.targets.items():
        ranks, policy, watched = [], [], []
        for block, _, _, hidden in states(model, world, rows, device):
            logits, which = model.logits(hidden), np.arange(len(rows))[block]
            if tilt:
                logits = logits + tilt * model.reward.catalogue(model.judged(hidden))
            seen = interactions.seen(world.log, rows, which, num_items).to(device)
            targets = world.log.item[rows[block, 1] - 1]
            targets = torch.from_numpy(np.where(known[targets], targets, 0)).to(device)                 # 0: no item, so a miss
            ranks.append(ranking.ranks(logits, targets, seen if world.mask_seen else None).cpu())
            if world.matrix is not None:
                row, table = world.matrix[0][world.log.user[rows[block, 0]]], torch.from_numpy(world.matrix[1])
                values = table[row[row >= 0]].to(device)
                values, ours = values[(said := ~values.isnan()).any(1)], logits[torch.from_numpy(row >= 0).to(device)][said.any(1)]
                share = ours.double().masked_fill(values.isnan(), -torch.inf).softmax(1)
                watched.append((share * values.nan_to_num(0.0)).sum(1).cpu())
            size = int((which < world.policy_users).sum())
            if tables and size:
                parts = {key: table if table.ndim == 1 else table[which[0]:which[0] + size] for key, table in tables[name].items()}
                logp, ref_logp = ranking.log_policy(logits[:size], seen[:size]), parts.pop("ref_logp")
                found = ranking.policy_metrics(logp, ref_logp, parts)
                first = logp.argmax(1, keepdim=True)                                                    # what a user would be shown
                found |= {f"top1_{key}": table.expand_as(logp).gather(1, first)[:, 0].double() for key, table in parts.items()}
                policy.append({key: value.cpu() for key, value in found.items()})
        columns = ranking.gains(torch.cat(ranks), [k for k in (*ranking.KS, 200) if k <= num_items])
        high = torch.from_numpy(world.high[name])
        columns |= {f"high_{key}": column[high] for key, column in columns.items() if high.any()}
        if watched and len(torch.cat(watched)):
            columns["full_matrix"] = torch.cat(watched)
        columns |= {key: torch.cat([part[key] for part in policy]) for key in (policy[0] if policy else ())}
        results[name] = {key: float(column.mean()) for key, column in columns.items()} | dict(targets=len(rows), high_targets=int(high.sum())), columns
    return results


def references(world):
    """-> {name: true value} on the test targets of policy_users, exact: the logging policy, uniform, the best item of each user, and the logging policy
    tilted by the true satisfaction, of which no policy as near to it is better."""
    rows, truth = world.targets["test"][:world.policy_users], world.truth
    users, previous, seen = bandit.contexts(world.log, rows[:, 1] - 1)
    mu, logging = truth.mu[users], bandit.logging_policy(truth, users, previous, seen)
    value = lambda policy: float((policy * mu).sum(1).mean())
    return {"logging": value(logging), "uniform": value(~seen / (~seen).sum(1, keepdims=True)), "optimum": float(bandit.greedy(truth, users, seen).mean()),
            **{f"tilt {t:g}": value(bandit.tilted(logging, mu, t)) for t in (1, 0.5, 0.25)}}


@torch.no_grad()
def check_heads(model, world, max_length, device, seed):
    """-> {"val", "test": {predictor: {rmse, rmse_low, rmse_high, mae}}, "pairs": {predictor: share}}: the heads beside the averages that they have to
    beat, on held-out events of users whose rewards the methods read; in the synthetic world R^2 of rhat against the true satisfaction of every item
    (r2), and of both less their means over items (r2_within: only that moves a policy).

    pairs: share of one user's pairs of held-out events that are put in the right order.
    """
    log, keep = world.log, np.flatnonzero(world.visible[world.log.user])
    own = log._replace(**{name: getattr(log, name)[keep] for name in ("user", "item", "reward_raw", "time", "row")})
    results, columns = {}, []
    for name, which in (("val", VAL), ("test", TEST)):
        guesses, truth = interactions.baselines(own, world.part[keep], world.reward[keep], which)
        rows = interactions.target_rows(log, world.part, which, max_length)
        users = log.user[rows[:, 0]]
        rows, users = rows[world.visible[users]], users[world.visible[users]]
        said, values, squares = [], [], np.zeros(4)
        for block, _, _, hidden in states(model, world, rows, device):
            h = model.judged(hidden)
            said.append(model.reward.at(h, torch.from_numpy(log.item[rows[block, 1] - 1]).to(device)).mean(0).cpu())
            values.append(model.value(h).mean(0).cpu())
            if world.truth is not None:
                mu, rhat = torch.from_numpy(world.truth.mu[users[block]]), model.reward.catalogue(h).cpu().double()
                mu_c, rhat_c = (x - x.mean(1, keepdim=True) for x in (mu, rhat))
                squares += [float(x.square().sum()) for x in (mu - rhat, mu - world.truth.mu.mean(), mu_c - rhat_c, mu_c)]
        guesses |= {"reward head": torch.cat(said).double().numpy(), "value head": torch.cat(values).double().numpy()}
        found = {}
        for label, guess in guesses.items():
            errors = (guess - truth) ** 2
            _, low, high = ranking.paired_bootstrap(errors, np.zeros_like(errors), seed=seed, groups=users)
            found[label] = dict(rmse=errors.mean() ** 0.5, rmse_low=low ** 0.5, rmse_high=high ** 0.5, mae=float(np.abs(guess - truth).mean()))
        if world.truth is not None:
            found["reward head"] |= dict(r2=1 - squares[0] / squares[1], r2_within=1 - squares[2] / squares[3])
        results[name] = found
        columns.append((users, truth, guesses))
    users, truth = (np.concatenate([c[i] for c in columns]) for i in (0, 1))
    results["pairs"] = {label: ranking.pair_accuracy(np.concatenate([c[2][label] for c in columns]), truth, users)
                        for label in ("item", "user+item", "reward head")}
    return results


# -----------------------------------------------------------------------------
# Recommendations to look at


def find_item(catalogue, text):
    """-> item 1..I of a raw id, a title, or a part of one title alone. ValueError names titles that are near."""
    titles = [title.casefold() for title in catalogue.titles]
    wanted = text.strip().casefold()
    exact = [i for i, name in enumerate(catalogue.item_ids, 1) if name == text.strip()] or [i for i, title in enumerate(titles, 1) if title == wanted]
    inside = exact or [i for i, title in enumerate(titles, 1) if wanted and wanted in title]
    if len(inside) == 1 or exact:
        return inside[0]
    near = [catalogue.titles[i - 1] for i in inside[:5]] or difflib.get_close_matches(text, catalogue.titles, n=3, cutoff=0.4) or catalogue.item_ids[:3]
    raise ValueError(f"{text.strip()!r} is {'in several titles' if inside else 'no title and no id'}: " + "; ".join(near) + (", .." if len(inside) > 5 else ""))


@torch.no_grad()
def suggest(model, history, k=10, gap=3600):
    """The k best items after a history: -> items (k,) and their probabilities (k,) among unseen items. history: items 1..I, the latest last; its end is
    read where it is longer than max_length. gap: seconds between events, which nobody types."""
    model.eval()
    recent = history[-model.config.max_length:]
    items = torch.tensor([[*recent, 0]])
    times = torch.arange(len(recent) + 1)[None] * gap
    hidden = model(items, torch.tensor([len(recent)]), times, torch.full(items.shape, torch.nan))[:, len(recent) - 1]
    seen = torch.zeros(1, model.config.num_items, dtype=torch.bool)
    seen[0, torch.tensor(history) - 1] = True
    logp = ranking.log_policy(model.logits(hidden), seen)
    best = ranking.top_k(logp, min(k, int((~seen).sum())))[0]
    return best.tolist(), logp[0, best - 1].exp().tolist()


# -----------------------------------------------------------------------------
# Report


SHOWN = ("ndcg@10", "hr@10", "high_ndcg@10", "high_hr@10", "reward_model", "judge", "true_value", "full_matrix", "bait", "kl", "entropy")
COMPARED = ("ndcg@10", "high_ndcg@10", "judge", "true_value")


def describe(label, found):
    test = found["test"]
    return f"{label:>26} | val ndcg@10 {found['val']['ndcg@10']:.4f} | test " + " | ".join(
        f"{key} {test[key]:.4f}" for key in ("ndcg@10", "high_ndcg@10", "judge", "true_value", "kl") if key in test)


def cell(x, digits=4):
    return "-" if x is None else f"{x:.{digits}f}"


def markdown(header, rows):
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]) + "\n"


def row(found):
    """What `header` names, of {"val", "test": {metric: float}}."""
    return [*(cell(found["val"].get(k)) for k in ("ndcg@10", "high_ndcg@10")), *(cell(found["test"].get(k)) for k in SHOWN)]


HEADER = ["val ndcg@10", "val high_ndcg@10", *(f"test {k}" for k in SHOWN)]


def differences(after, before, world, seed):
    """after, before: by test target, as evaluate has them -> a cell for each of COMPARED: mean difference, 95 % paired bootstrap over users."""
    users = world.log.user[world.targets["test"][:, 0]]
    of = lambda key: users[world.high["test"]] if key.startswith("high_") else users[:len(before[key])]
    found = [ranking.paired_bootstrap(after[k], before[k], seed=seed, groups=of(k)) if k in before else None for k in COMPARED]
    return ["-" if f is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*f) for f in found]


def heads_report(heads):
    """Lines of markdown about check_heads, with what a reader must know of a reward model that is not better than averages."""
    lines = [markdown(["reward predicted by", "RMSE", "from", "to", "MAE"], [
        [label, *(cell(h[key], 3) for key in ("rmse", "rmse_low", "rmse_high", "mae"))] for label, h in heads["test"].items()]),
        "Pairs of a user's held-out events in the right order: " + ", ".join(f"{k} {cell(v, 3)}" for k, v in heads["pairs"].items()) + ".\n"]
    val, head = heads["val"], heads["test"]["reward head"]
    if "r2" in head:
        lines.append(f"R^2 of the reward head against the true satisfaction of all items: {head['r2']:.3f}; within a history {head['r2_within']:.3f}.\n")
    better = [name for name in ("global", "user", "item", "user+item") if val[name]["rmse"] <= val["reward head"]["rmse"]]
    if better:
        lines.append(f"**The reward model does not beat {', '.join(better)}** on validation (RMSE {val['reward head']['rmse']:.3f} against "
                     f"{', '.join(cell(val[name]['rmse'], 3) for name in better)}): what is optimised against it is optimised against little.\n")
    if val["value head"]["rmse"] >= val["global"]["rmse"]:
        lines.append(f"The value head is no better than the global mean (RMSE {val['value head']['rmse']:.3f} against {val['global']['rmse']:.3f}): "
                     "--baseline=user or item may serve better.\n")
    return lines


def picture(results, before, path):
    """Reward model, judges, truth and ranking against the distance from BC: one line per trial along its training. results: of train_asft.py."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = [(key, title) for key, title in (("reward_model", "what the reward model believes"), ("judge", "what the judges believe"),
              ("true_value", "true value"), ("high_ndcg@10", "NDCG@10 on highly rated targets")) if key in before["test"]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False)
    methods = list(dict.fromkeys(r["method"] for r in results if r["method"]))
    colors = dict(zip(methods, plt.cm.tab20.colors * 2))
    for ax, (key, title) in zip(axes[0], panels):
        for stage in dict.fromkeys(r["stage"] for r in results if r["method"]):
            trial = [r for r in results if r["stage"] == stage]
            points = [before["test"], *(r["test"] for r in trial)]
            ax.plot([p["kl"] for p in points], [p[key] for p in points], "o-", ms=2.5, lw=1, color=colors[trial[0]["method"]])
        ax.axhline(before["test"][key], color="#999999", lw=0.8, ls=":")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("KL to BC, nats", fontsize=9)
        ax.set_xscale("symlog", linthresh=0.1)
        ax.set_xlim(left=0)
        ax.spines[["top", "right"]].set_visible(False)
    handles = [plt.Line2D([], [], color=colors[m], label=m) for m in methods]
    figure.legend(handles=handles, loc="lower center", ncol=min(7, len(methods)), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
