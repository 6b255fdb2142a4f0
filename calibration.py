"""How far a confidence can be trusted: proper scores, calibration errors, order, intervals, noise floor, rescaling, pictures.

For N answers, q in [0, 1] is the confidence that was stated and c in {0, 1} says whether the answer is right. No score looks at the order of the
items, so all of them are functions of a Tally: per distinct q, how many items and how many right ones. Ties cannot depend on a sort, and a
resample only changes counts.

    brier, bss    mean (q - c)^2, a proper score; 1 - brier / (p (1 - p)) with p = mean c: 0 is the constant that knows p      (Brier 1950)
    nll           mean -log of the probability that q gives to c, q clamped
    ece, ace      mean over bins of |share right - mean q|, bins of equal width (arXiv 1706.04599, eq. 3) or equal mass          (1904.01685)
    auroc         P(q of a right item > q of a wrong one) + P(equal) / 2                                               (Mann & Whitney 1947)
    aurc          mean over k of risk(k), the share of errors among the k most confident                               (arXiv 1805.08206)
    acc@80        share right among the 80 % most confident: what is left after abstaining on 20 %
    cov@95        the largest share that can be answered with at most 5 % errors

An item may have no q (None: the model stated none). Such items are in accuracy and adherence, come last in risk(k), and are in no other score.
A score that is not defined (one class, no q at all) is None, null in JSON, and never 0.
"""
import math
from typing import NamedTuple

import numpy as np

NUM_BINS = 10
CLAMP = 1e-4  # q of exactly 0 or 1 has no logit; an answer that was sure and wrong costs at most 9.2 nats


class Tally(NamedTuple):
    q: np.ndarray         # (G,) float64: the distinct confidences, ascending
    items: np.ndarray     # (G,) int64: how many items have it, at least 1
    right: np.ndarray     # (G,) int64: how many of these are right
    silent: int           # items without a confidence
    silent_right: int     # how many of these are right


def columns(q, c):
    """Check the input -> q (N,) float64, 0 where there is none; stated (N,) bool; c (N,) int64.

    q: numbers in [0, 1], None where none was stated; c: 0, 1 or bools. ValueError names the first row that is neither. float32 is refused: .7
    would become .69999999 and fall into the bin below.
    """
    if not 0 < len(q) == len(c):
        raise ValueError(f"expected as many confidences as grades and at least one, found {len(q)} and {len(c)}")
    for row, (x, y) in enumerate(zip(q, c)):
        dtype = str(getattr(x, "dtype", "float64"))
        if "float" in dtype and not dtype.endswith("float64"):
            raise ValueError(f"row {row}: confidence of type {dtype}, expected float64 all the way from the text or the logits")
        if x is not None and not 0 <= x <= 1:
            raise ValueError(f"row {row}: confidence {x}, expected a number in [0, 1], or None where the model stated none")
        if y not in (0, 1):
            raise ValueError(f"row {row}: grade {y!r}, expected 0 (wrong) or 1 (right)")
    return np.array([0.0 if x is None else float(x) for x in q]), np.array([x is not None for x in q]), np.array([int(y) for y in c])


def grouped(q, stated):
    """-> (distinct q (G,), group (N,) int: which of them each item has, G for items without). Sorts once for all resamples."""
    distinct, inverse = np.unique(q[stated], return_inverse=True)
    group = np.full(len(q), len(distinct))
    group[stated] = inverse
    return distinct, group


def counted(distinct, group, c, weights):
    """-> the Tally in which item i stands weights[i] times; values of q that no item has are left out."""
    items = np.bincount(group, weights, len(distinct) + 1).astype(np.int64)
    right = np.bincount(group, weights * c, len(distinct) + 1).astype(np.int64)
    there = items[:-1] > 0
    return Tally(distinct[there], items[:-1][there], right[:-1][there], int(items[-1]), int(right[-1]))


def tally(q, c):
    """q: N numbers or None; c: N of 0 and 1 -> Tally. Errors: see columns."""
    q, stated, c = columns(q, c)
    return counted(*grouped(q, stated), c, np.ones(len(c), np.int64))


# -----------------------------------------------------------------------------
# Scores. t: Tally -> float, or None where the score is not defined


def accuracy(t):
    """Of all items, also those without q."""
    return (t.right.sum() + t.silent_right) / (t.items.sum() + t.silent)


def adherence(t):
    """Share of items that have a q: stands beside every score, since most leave the others out."""
    return t.items.sum() / (t.items.sum() + t.silent)


def mean_q(t):
    return t.items @ t.q / t.items.sum() if len(t.q) else None


def distinct_q(t):
    """How many different confidences were stated; 1 has a fine ECE if it is near the base rate, and knows nothing."""
    return len(t.q)


def brier(t):
    return (t.right @ (1 - t.q) ** 2 + (t.items - t.right) @ t.q ** 2) / t.items.sum() if len(t.q) else None


def bss(t):
    """Brier skill. None if all are right or all are wrong: no reference is left to be better than."""
    p = t.right.sum() / t.items.sum() if len(t.q) else 0.0
    return 1 - brier(t) / (p * (1 - p)) if 0 < p < 1 else None


def nll(t):
    """Nats per item, q clamped to [CLAMP, 1 - CLAMP]."""
    q = t.q.clip(CLAMP, 1 - CLAMP)
    return -(t.right @ np.log(q) + (t.items - t.right) @ np.log1p(-q)) / t.items.sum() if len(t.q) else None


def width_bins(t):
    """-> (G,) bin of each q. The last bin is closed: with half-open ones q = 1, the most over-confident items, would be in none."""
    return np.minimum(np.floor(NUM_BINS * t.q).astype(np.int64), NUM_BINS - 1)


def mass_bins(t):
    """-> (G,) min(9, floor(10 (r - 1/2) / N)), r the average rank of the items with that q: equal q share a bin. In integers."""
    twice_rank = 2 * np.cumsum(t.items) - t.items                           # 2 (r - 1/2) < 2 N, so the minimum is never needed
    return NUM_BINS * twice_rank // (2 * t.items.sum())


def bin_error(t, bins):
    """sum_b n_b / N |share right - mean q| = sum_b |right_b - sum of q_b| / N: empty bins add nothing."""
    return np.abs(np.bincount(bins, t.right - t.items * t.q)).sum() / t.items.sum() if len(t.q) else None


def ece(t):
    """Biased upward: a perfect predictor has noise_floor(t), not 0."""
    return bin_error(t, width_bins(t))


def ace(t):
    return bin_error(t, mass_bins(t)) if len(t.q) else None


def auroc(t):
    """(sum of average ranks of right items - n1 (n1 + 1) / 2) / (n1 n0), n1 right and n0 wrong ones. None if either is 0."""
    ranks = np.cumsum(t.items) - (t.items - 1) / 2                          # (G,) average rank within ties, from 1
    n1 = int(t.right.sum())
    n0 = int(t.items.sum()) - n1
    return (t.right @ ranks - n1 * (n1 + 1) / 2) / (n1 * n0) if n1 and n0 else None


def risk(t):
    """-> (N,) expected share of errors among the first k = 1..N items, most confident first, items without q last.

    Equal q are in random order: inside a group of them the expected number of errors grows linearly. Needs at least one item.
    """
    items = np.append(t.items[::-1], t.silent)
    errors = items - np.append(t.right[::-1], t.silent_right)
    items, errors = items[items > 0], errors[items > 0]                     # np.interp wants increasing positions
    k = np.arange(1, items.sum() + 1)
    return np.interp(k, np.append(0, np.cumsum(items)), np.append(0, np.cumsum(errors))) / k


def aurc(t):
    return risk(t).mean()


def accuracy_at(t, coverage=0.8):
    """1 - risk(ceil(coverage N)), 0 < coverage <= 1."""
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage {coverage}: expected a share above 0, at most 1")
    risks = risk(t)
    return 1 - risks[math.ceil(round(coverage * len(risks), 9)) - 1]        # rounded: .55 * 100 is 55.000000000000007


def coverage_at(t, max_risk=0.05):
    """Largest k / N with risk(k) <= max_risk, 0 if there is none. Of the curve itself, so a late dip below max_risk counts."""
    risks = risk(t)
    below = np.flatnonzero(risks <= max_risk + 1e-12)                       # 5 errors spread over 100 ties must count as .05
    return (below[-1] + 1) / len(risks) if len(below) else 0.0


def abstention(q, c, threshold):
    """-> what is left where answers with q below `threshold`, or without q, are not given: coverage, and the share of errors among those (None if none is
    given) and among all."""
    given = [y for x, y in zip(q, c) if x is not None and x >= threshold]
    return dict(coverage=len(given) / len(c), error=1 - sum(given) / len(given) if given else None, error_of_all=1 - sum(c) / len(c))


METRICS = {"accuracy": accuracy, "adherence": adherence, "mean_q": mean_q, "distinct_q": distinct_q, "brier": brier, "bss": bss, "nll": nll,
           "auroc": auroc, "aurc": aurc, "acc@80": accuracy_at, "cov@95": coverage_at, "ece": ece, "ace": ace}
RESAMPLED = tuple(name for name in METRICS if name != "distinct_q")         # a resample has fewer distinct q than the set: no interval


def metrics(t, names=tuple(METRICS)):
    """-> {name: float, or None where it is not defined}."""
    values = {name: METRICS[name](t) for name in names}
    return {name: None if value is None else float(value) for name, value in values.items()}


# -----------------------------------------------------------------------------
# Intervals and noise


def bootstrap(methods, num=2000, seed=0, names=RESAMPLED):
    """Resample prompts, the same for all methods. methods: {name: (q, c, prompts)}, three columns of equal length; prompts: an id per item.

    -> {method: {metric: (1 + num,) float64}}: first the value on all items, then one per resample, nan where it is not defined. All items of a
    prompt move together. Methods may have answers of their own, but to the same prompts: so a difference of two of these arrays is paired.
    Errors: see columns; ValueError too if the sets of prompts differ. 1,319 items: some 1 ms per method and resample on one core.
    """
    sets = {name: set(prompts) for name, (_, _, prompts) in methods.items()}
    ids = sorted(next(iter(sets.values())))
    index = {prompt: i for i, prompt in enumerate(ids)}
    prepared = {}
    for name, (q, c, prompts) in methods.items():
        if sets[name] != set(ids):
            raise ValueError(f"{name}: {len(sets[name] ^ set(ids))} prompts are not those of {next(iter(methods))}: a paired interval needs the same")
        if len(prompts) != len(q):
            raise ValueError(f"{name}: expected a prompt id per item, found {len(prompts)} for {len(q)} confidences")
        q, stated, c = columns(q, c)
        prepared[name] = (*grouped(q, stated), c, np.array([index[p] for p in prompts]))
    rng, draws = np.random.default_rng(seed), {name: [] for name in methods}
    for i in range(1 + num):
        counts = np.bincount(rng.integers(0, len(ids), len(ids)), minlength=len(ids)) if i else np.ones(len(ids), np.int64)
        for name, (distinct, group, c, prompt) in prepared.items():
            draws[name].append(list(metrics(counted(distinct, group, c, counts[prompt]), names).values()))
    return {name: dict(zip(names, np.array(rows, np.float64).T)) for name, rows in draws.items()}


def interval(draws):
    """draws (1 + num,) of one metric, or the difference of two -> value, and the 95 % percentile interval low, high.

    None where not defined. skipped: resamples in which it was not (AUROC with one class), which are left out.
    """
    value, rest = float(draws[0]), draws[1:][~np.isnan(draws[1:])]
    low, high = np.percentile(rest, [2.5, 97.5]).tolist() if len(rest) else (None, None)
    return dict(value=None if math.isnan(value) else value, low=low, high=high, skipped=len(draws) - 1 - len(rest))


def noise_floor(t, num=1000, seed=0):
    """ECE that a perfect predictor with these q would have: c ~ Bernoulli(q) drawn num times (Broecker & Smith 2007).

    -> its mean and 95th percentile (p95), None without any q. An ECE below p95 is not distinguishable from calibrated.
    """
    rng = np.random.default_rng(seed)
    draws = [ece(t._replace(right=rng.binomial(t.items, t.q))) for _ in range(num)] if len(t.q) else []
    return dict(mean=float(np.mean(draws)), p95=float(np.percentile(draws, 95))) if draws else dict(mean=None, p95=None)


def wilson(right, total, z=1.96):
    """-> (low, high): the 95 % score interval of the share right / total (Wilson 1927); stays inside [0, 1] and is honest at 0 and at 1."""
    if total == 0:
        return 0.0, 1.0
    p, zz = right / total, z * z / total
    centre, half = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / total + zz / (4 * total)) / (1 + zz)
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))          # p itself is inside, also after rounding


# -----------------------------------------------------------------------------
# Rescaling: p = sig(a z + b) with z = logit(q), q clamped to [CLAMP, 1 - CLAMP]


def logit(q):
    q = np.clip(q, CLAMP, 1 - CLAMP)
    return np.log(q) - np.log1p(-q)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))                                     # exact in both tails


def newton(x, c):
    """argmin over w (D,) of the mean negative log-likelihood of c (N,) under sig(x w), x (N, D): convex, steps halved while they go uphill."""
    signed, w = (2 * c - 1)[:, None] * x, np.zeros(x.shape[1])
    loss = lambda w: np.logaddexp(0, -signed @ w).mean()
    for _ in range(100):
        p = sigmoid(x @ w)
        gradient = x.T @ (p - c) / len(c)
        if np.abs(gradient).max() < 1e-12:
            return w
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x / len(c), gradient)
        while loss(w - step) > loss(w) + 1e-12:                             # beyond rounding, which at the minimum is all there is
            step = step / 2
        w = w - step
    raise ValueError(f"no convergence in 100 Newton steps: gradient {np.abs(gradient).max():.2g}, expected below 1e-12")


def fit_columns(q, c):
    """-> (z, c) of the items that have a q, both classes among them."""
    q, stated, c = columns(q, c)
    if not 0 < c[stated].sum() < stated.sum():
        raise ValueError(f"cannot fit: {c[stated].sum()} of {stated.sum()} items with a confidence are right, both classes are needed")
    return logit(q[stated]), c[stated]


def fit_temperature(q, c):
    """-> T > 0 of sig(z / T), by maximum likelihood (arXiv 1706.04599, sec. 4.2). ValueError where there is none.

    The loss is convex in 1 / T, so the sign of its slope at 0 says whether its minimum has T > 0.
    """
    z, c = fit_columns(q, c)
    if (c - 0.5) @ z <= 1e-9 * np.abs(z).sum():
        raise ValueError("no temperature above 0 fits: confidence is anti-correlated, or on the wrong side of one half; one half is better")
    if ((c - 0.5) * z >= 0).all():
        raise ValueError("no temperature fits: every item is on its side of one half, and the likelihood grows as T goes to 0; fit on more items")
    scale = np.sqrt((z * z).mean())
    return float(scale / newton(z[:, None] / scale, c)[0])


def fit_platt(q, c):
    """-> (a, b), a > 0, of sig(a z + b), by maximum likelihood (Platt 1999, without his smoothed targets). ValueError where there is none.

    a has the sign of the covariance of z and c. It is infinite where some threshold parts right from wrong.
    """
    z, c = fit_columns(q, c)
    if z.min() == z.max():
        raise ValueError(f"cannot fit a and b: all {len(z)} confidences are equal, or equal after the clamp to [{CLAMP}, {1 - CLAMP}]")
    mean, scale = z.mean(), z.std()
    x = (z - mean) / scale
    if (c - c.mean()) @ x <= 1e-9 * len(x):
        raise ValueError("confidence is anti-correlated with being right, or says nothing about it: a <= 0 would turn or flatten the order")
    if x[c == 0].max() <= x[c == 1].min():
        raise ValueError("cannot fit: a threshold parts right from wrong, and the likelihood grows as a goes to infinity; fit on more items")
    slope, offset = newton(np.stack([x, np.ones_like(x)], 1), c)
    return float(slope / scale), float(offset - slope * mean / scale)


def fit_together(columns_of_q, c):
    """Several confidences of the same items -> ([slope of each], offset) of sig(sum_j a_j z_j + b), by maximum likelihood (logistic regression).

    Items that lack any of them are left out. Slopes may have either sign: what one says given the others. ValueError where there is no fit."""
    there = [i for i in range(len(c)) if all(q[i] is not None for q in columns_of_q)]
    some = [c[i] for i in there]
    z = np.stack([fit_columns([q[i] for i in there], some)[0] for q in columns_of_q], 1)
    mean, scale = z.mean(0), z.std(0)
    if not scale.all():
        raise ValueError("cannot fit: a confidence is the same for all items")
    x, refusal = np.concatenate([(z - mean) / scale, np.ones((len(z), 1))], 1), "cannot fit: the confidences determine each other, or part right from wrong"
    try:
        w = newton(x, np.array(some, np.int64))
    except np.linalg.LinAlgError:
        raise ValueError(refusal) from None
    p = sigmoid(x @ w)
    if np.linalg.eigvalsh((x * (p * (1 - p))[:, None]).T @ x / len(x))[0] < 1e-9:       # flat in some direction: Newton stopped on its way to infinity
        raise ValueError(refusal)
    slopes, offset = w[:-1] / scale, w[-1]
    return slopes.tolist(), float(offset - slopes @ mean)


def combine(columns_of_q, slopes, offset):
    """-> sig(sum_j a_j logit(q_j) + b) of each item, None where any q_j is None."""
    there = [all(q is not None for q in row) for row in zip(*columns_of_q)]
    z = sum(a * logit(np.array([0.5 if x is None else x for x in q])) for a, q in zip(slopes, columns_of_q)) + offset
    return [p if ok else None for p, ok in zip(sigmoid(z).tolist(), there)]


# -----------------------------------------------------------------------------
# Diagrams: numbers for JSON, and a picture of exactly these numbers


def reliability(t):
    """-> columns over the bins of ece that have items: bin, items, mean_q, accuracy, low, high (Wilson 95 %, as if items were independent)."""
    bins = width_bins(t)
    items, right, q = (np.bincount(bins, column, NUM_BINS) for column in (t.items, t.right, t.items * t.q))
    there = np.flatnonzero(items)
    items, right, q = items[there], right[there], q[there]
    low, high = zip(*map(wilson, right.tolist(), items.tolist())) if len(there) else ((), ())
    return dict(bin=there.tolist(), items=items.astype(int).tolist(), mean_q=(q / items).tolist(), accuracy=(right / items).tolist(),
                low=list(low), high=list(high))


def risk_coverage(t):
    """-> coverage (N,) k / N, risk (N,), best (N,): risk if all right items came first; constant: 1 - accuracy, the risk of any constant q."""
    risks = risk(t)
    k = np.arange(1, len(risks) + 1)
    right = int(t.right.sum()) + t.silent_right
    return dict(coverage=(k / len(k)).tolist(), risk=risks.tolist(), best=(np.maximum(k - right, 0) / k).tolist(), constant=float(1 - accuracy(t)))


def diagrams(t):
    return dict(reliability=reliability(t), risk_coverage=risk_coverage(t))


def picture(methods, path):
    """Reliability diagram with counts below, and risk-coverage curves, as PNG. methods: {name: diagrams(t)}, before and after in one frame."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplot_mosaic([["bins", "risk"], ["count", "risk"]], figsize=(13, 6), height_ratios=[3, 1])
    bins, count, risks = axes["bins"], axes["count"], axes["risk"]
    bins.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8, label="calibrated")
    for i, (name, data) in enumerate(methods.items()):
        r, curve, color = data["reliability"], data["risk_coverage"], f"C{i}"
        errors = [[y - low for y, low in zip(r["accuracy"], r["low"])], [high - y for y, high in zip(r["accuracy"], r["high"])]]
        bins.errorbar(r["mean_q"], r["accuracy"], errors, fmt="o-", color=color, ms=4, lw=1, elinewidth=0.8, capsize=2, label=name)
        width = 0.8 / NUM_BINS / len(methods)
        count.bar([(b + 0.5) / NUM_BINS + (i - (len(methods) - 1) / 2) * width for b in r["bin"]], r["items"], width, color=color)
        lw = 1 + 2 * (len(methods) - 1 - i) / len(methods)                  # rescaling leaves this curve where it was: both stay visible
        risks.plot(curve["coverage"], curve["risk"], color=color, lw=lw, label=name)
        risks.axhline(curve["constant"], color=color, ls=":", lw=0.8, label="constant confidence" if i == 0 else None)
        risks.plot(curve["coverage"], curve["best"], color=color, ls="--", lw=0.8, label="best order" if i == 0 else None)
    bins.set(title="Reliability", ylabel="share right, 95 % interval", xlim=(0, 1), ylim=(0, 1.02))
    count.set(xlabel="stated confidence", ylabel="answers", xlim=(0, 1))
    risks.set(title="Risk and coverage", xlabel="share answered, most confident first", ylabel="share of errors among them", xlim=(0, 1))
    risks.set_ylim(bottom=0)
    save_figure(fig, axes.values(), path)


def save_figure(fig, axes, path):
    """axes: all that fig has. The same plain frame for every picture."""
    import matplotlib.pyplot as plt
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
