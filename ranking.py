"""How good a recommender is over the full catalogue: ranks, exact values of its policy, order of rewards, intervals.

    hr@k, ndcg@k, mrr@k    of one target per user: mean of 1, of 1 / log2(rank + 1), of 1 / rank, each 0 below place k
    kl, entropy            sum_a pi(a) (log pi(a) - log ref(a)) and -sum_a pi(a) log pi(a), full sums, in nats
    E_pi[f]                sum_a pi(a) f(a): of the truth the exact value of the policy, of a reward model the value that this model believes
Items are 1..I; column i - 1 of every (n, I) is item i. Nothing is sampled: no random negatives (Krichene & Rendle 2020), no importance weights.
"""
import math

import numpy as np
import torch

KS = (1, 5, 10, 50)
BLOCK = 1 << 20                                                             # cells of (n, I) at a time: temporaries stay in some 10 MB
blocks = lambda n, num_items: (slice(i, i + max(1, BLOCK // num_items)) for i in range(0, n, max(1, BLOCK // num_items)))


def numbers(x):
    """Tensor on any device, array or list -> float64 array, finite and not empty."""
    x = (x.detach().cpu().double() if torch.is_tensor(x) else np.asarray(x, np.float64)).__array__()
    if not x.size or not np.isfinite(x).all():
        raise ValueError(f"expected finite numbers, found {'none' if not x.size else f'{x[~np.isfinite(x)][0]} among {x.size}'}")
    return x


@torch.no_grad()
def ranks(scores, targets, seen=None):
    """scores (n, I) float, targets (n,) int64, seen (n, I) bool or None -> (n,) int64, 1 is best. 6,000 x 4,000: .1 to .3 s on one core.
    Seen items are out of the race, a target never is. Ties count against the target, so a constant scorer comes last. A target outside 1..I, an
    item that was not there in training, is a miss: rank I + 1, so keep k <= I. ValueError for a score that is not finite, of seen items too.
    """
    n, num_items = scores.shape
    found = torch.empty(n, dtype=torch.int64, device=scores.device)
    for rows in blocks(n, num_items):
        block, target = scores[rows], targets[rows].to(scores.device)
        if not torch.stack(torch.aminmax(block, dim=1)).isfinite().all():   # nan goes into both: one pass instead of isfinite's three
            row, column = (~block.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"score {float(block[row, column])} of item {column + 1} in row {rows.start + row}: expected finite scores, masked by `seen`")
        at = (target.clamp(1, num_items) - 1)[:, None]
        above = block >= block.gather(1, at)                                # the target is among them
        if seen is not None:
            above = (above & ~seen[rows].to(above.device)).scatter_(1, at, True)
        found[rows] = torch.where((target >= 1) & (target <= num_items), above.sum(1), num_items + 1)
    return found


def gains(ranks, ks=KS):
    """ranks (n,) -> {"hr@1": (n,) float64, ..}: each user's part, for a bootstrap."""
    r = ranks.double()
    parts = dict(hr=torch.ones_like(r), ndcg=1 / torch.log2(r + 1), mrr=1 / r)
    return {f"{name}@{k}": part * (ranks <= k) for name, part in parts.items() for k in ks}


def ranking_metrics(ranks, ks=KS):
    """ranks (n,), n >= 1 -> {"hr@1": .., "ndcg@10": .., "mrr@10": ..}, floats."""
    if not len(ranks):
        raise ValueError("no targets to rank: their mean is not defined")
    return {name: float(column.mean()) for name, column in gains(ranks, ks).items()}


def log_policy(logits, seen):
    """logits (n, I), seen (n, I) bool -> (n, I) fp32 log-probabilities over unseen items, -inf on seen ones. Differentiable."""
    logp = logits.float().masked_fill(seen, -math.inf).log_softmax(-1)
    if logp.isnan().any():
        raise ValueError(f"row {int(logp.isnan().any(1).nonzero()[0])}: a logit is not finite, or every item is seen")
    return logp


@torch.no_grad()
def policy_metrics(logp, ref_logp, tables):
    """logp, ref_logp (n, I) normalised log-probabilities, tables {name: (n, I) or (I,)} -> {"kl", "entropy", *tables: (n,) float64}.
    Items of probability 0 add nothing, whatever their log-probability in ref or their value in a table (nan where it is not known). KL is inf where
    pi gives weight to an item that ref never does. ValueError if a row is no distribution (sampled log-probabilities): its sums would mean nothing.
    """
    tables = {name: torch.as_tensor(table, device=logp.device).expand(logp.shape) for name, table in tables.items()}
    columns = {name: torch.empty(len(logp), dtype=torch.float64, device=logp.device) for name in ("kl", "entropy", *tables)}
    for rows in blocks(*logp.shape):
        a, b = logp[rows].double(), ref_logp[rows].double()
        for x in (a, b):
            total = x.logsumexp(1, keepdim=True)
            if not (total.abs() < 1e-3).all():
                raise ValueError(f"probabilities that sum to {float(total.min().exp()):.4g} to {float(total.max().exp()):.4g}, expected 1: see log_policy")
            x -= total                                                      # fp32 sums are off by 1e-7, more than a small KL
        p = a.exp()
        for name, f in dict(kl=a - b, entropy=-a, **{name: table[rows] for name, table in tables.items()}).items():
            columns[name][rows] = (p * f).masked_fill_(p == 0, 0).sum(1)
    return columns


def top_k(logp, k):
    """-> (n, k) int64 items, best first, equal ones in any order. ValueError where fewer than k have a probability above 0."""
    values, columns = logp.topk(min(k, logp.shape[1]), dim=1)
    if k > logp.shape[1] or values.isneginf().any():
        raise ValueError(f"expected {k} unseen items in every row, found fewer")
    return columns + 1


def pair_accuracy(prediction, truth, groups):
    """Share of the pairs of one group with different truth that the prediction orders right, ties 1/2 (N each). None if there is no such pair.
    All pairs, none sampled, in O(N log^2 N): 100,000 events in .3 s. In the order of truth, equal truths by falling prediction, a pair is right if
    its prediction rises. Such pairs are counted bit by bit of the prediction's rank: of one group and equal higher bits, a 0 before a 1.
    """
    keys = numbers(prediction), numbers(truth), groups.cpu() if torch.is_tensor(groups) else groups
    if len({len(x) for x in keys}) > 1:
        raise ValueError(f"expected columns of equal length, found {[len(x) for x in keys]}")
    rank, truth, groups = (np.unique(x, return_inverse=True)[1] for x in keys)

    def pairs(*columns):                                                    # how many are equal in all columns
        rows = np.stack(columns)[:, np.lexsort(columns)]
        counts = np.diff(np.flatnonzero(np.concatenate([[True], (rows[:, 1:] != rows[:, :-1]).any(0), [True]])))
        return int((counts * (counts - 1) // 2).sum())
    different, tied = pairs(groups) - pairs(groups, truth), pairs(groups, rank) - pairs(groups, truth, rank)
    order = np.lexsort((-rank, truth, groups))
    segment, rank, right = groups[order], rank[order], 0
    for bit in range(int(rank.max()).bit_length() - 1, -1, -1):
        ones = rank >> bit & 1
        zeros = np.append(0, np.cumsum(1 - ones))                           # before each event; less those before its segment
        right += int((zeros[:-1] - zeros[np.searchsorted(segment, segment)])[ones == 1].sum())
        order = np.argsort(2 * segment + ones, kind="stable")
        segment, rank = (2 * segment + ones)[order], rank[order]
    return (right + tied / 2) / different if different else None


def ess_share(weights):
    """weights (n,) >= 0 -> (sum w)^2 / (n sum w^2), 1 / n to 1: the share of the data that speaks (Kish 1965). 0 if all are 0: none does."""
    w = numbers(weights)
    if w.min() < 0:
        raise ValueError(f"weight {w.min()}: expected none below 0")
    w = w / (w.max() or 1)                                                  # squares of 1e200 would overflow
    return float(w.sum() ** 2 / (len(w) * (w * w).sum())) if w.any() else 0.0


def t_quantile(level, df):
    """-> t with P(|T| <= t) = level for Student's T of df = 1, 2, ..: the finite sums of Abramowitz & Stegun 26.7.3 and .4, bisected."""
    def inside(angle):                                                      # t = sqrt(df) tan(angle)
        term, total, odd = math.cos(angle) if df % 2 else 1.0, 0.0, df % 2
        for j in range(2 + odd, df + 1, 2):
            total, term = total + term, term * math.cos(angle) ** 2 * (j - 1) / j
        return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        low, high = ((low + high) / 2, high) if inside((low + high) / 2) < level else (low, (low + high) / 2)
    return math.sqrt(df) * math.tan(low)


def mean_interval(values, level=.95):
    """One number per seed -> (mean, low, high) by Student's t; (mean, None, None) of a single one, whose spread is not known."""
    x = numbers(values)
    half = t_quantile(level, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else None
    return (float(x.mean()), None, None) if half is None else (float(x.mean()), float(x.mean() - half), float(x.mean() + half))


def paired_bootstrap(a, b, num=1000, seed=0, groups=None):
    """a, b (n,) of the same rows -> (mean of a - b, low, high): 95 % percentile interval over resampled rows, each with both of its numbers, or over
    resampled groups (n,), such as users with several rows, each whole."""
    a, b, rng = numbers(a), numbers(b), np.random.default_rng(seed)
    if a.shape != b.shape:
        raise ValueError(f"expected the same users in both columns, found {len(a)} and {len(b)}")
    group = np.unique(np.arange(len(a)) if groups is None else groups, return_inverse=True)[1]
    sums, counts, means = np.bincount(group, a - b), np.bincount(group), []
    for _ in range(num):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    return float((a - b).mean()), *np.percentile(means, [2.5, 97.5]).tolist()
