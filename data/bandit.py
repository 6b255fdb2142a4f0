"""A synthetic, fully observed world of a recommender: a logged bandit in which the value of any policy is an exact sum.

U users, I items with vectors of width 8, 8 genres, one seed. What the description of the method leaves open is decided here:
    genre centres  uniform on the unit sphere; genres are equally large (+-1) and lie in random order on the item ids
    item           v = unit(centre + .5 n / sqrt 8), n ~ N(0, 1)^8; exposure b ~ N(0, 1); quality q, normal with standard deviation .7;
                   round(bait_share I) items are bait, h = 1, in random places
    user           z = unit(m + .2 n / sqrt 8), m a mixture of the centres by Dirichlet(.3); habit c ~ Beta(2, 2)
    satisfaction   mu(u, a) = 1 + 4 sig(2 z.v + q - 2 h + .3), in (1, 5): bait disappoints. The 2 is fixed, `taste` is of the log alone
    log            pi(a | u, previous) = softmax over unseen a of  pop b + taste z.v + habit c (h + .7 [genre of a = genre of the previous item]);
                   the first event has no previous item. A user has min_events..max_events events, each count equally likely
    reward         mu + sigma_a e, e ~ N(0, 1); on bait mu is replaced by 5 with probability autoplay, per event. Not clipped: clipping is a bias, so
                   with noise a reward may be below 1, and below 0. sigma_a = noise exp(s g - s^2), s = noise_spread, g ~ N(0, 1) per item: log-normal
                   with the mean of sigma_a^2 at noise^2 for any s. To all of this a user adds generosity (c - .5) / sqrt(.05): a standard deviation of
                   `generosity` over users, high where clicks are habitual. So what the habitual click on is rated by the generous
    time           a first event within a year, gaps log-normal with median 12 hours (68 % in 2.7 to 54 hours), 15 % of them 0: ties in the order of rows

Every part has a random stream of its own: noise, noise_spread, autoplay and generosity change nothing but rewards; pop, taste and habit nothing of mu.
"""
from typing import NamedTuple

import numpy as np

from data.interactions import Log

WIDTH, BLOCK = 8, 1 << 17                                                   # BLOCK: cells of (users, items) at a time; 1 MiB of float64 stays in the cache
GENRES = ("action", "comedy", "drama", "fantasy", "history", "mystery", "romance", "western")
STREAMS = {name: k for k, name in enumerate(("items", "users", "lengths", "clicks", "noise", "spread", "autoplay", "times"))}


class Truth(NamedTuple):                                                    # for evaluation only: a learner gets the Log and nothing else
    mu: np.ndarray                # (U, I) float64: satisfaction without noise; column i - 1 is item i, here and below
    bait: np.ndarray              # (I,) bool: h
    genre: np.ndarray             # (I,) int64
    exposure: np.ndarray          # (I,) float64: b
    affinity: np.ndarray          # (U, I) float64: z.v
    habit: np.ndarray             # (U,) float64: c
    propensity: np.ndarray        # (N,) float64: probability of every logged item where it was logged
    pop: float                    # the three weights of the log
    taste: float
    habit_weight: float


def check(num_users, num_items, noise, noise_spread, autoplay, generosity, bait_share, min_events, max_events, **weights):
    if num_users < 1 or num_items < 1:
        raise ValueError(f"num_users {num_users}, num_items {num_items}: expected at least 1 of each")
    if not 1 <= min_events <= max_events < num_items:
        raise ValueError(f"events per user {min_events} to {max_events}, {num_items} items: expected 1 <= min_events <= max_events < num_items, "
                         "since nobody gets an item twice and the last event has to have a choice left")
    for name, x in dict(autoplay=autoplay, bait_share=bait_share).items():
        if not 0 <= x <= 1:
            raise ValueError(f"{name} {x}: expected a share in [0, 1]")
    for name, x in dict(noise=noise, generosity=generosity, noise_spread=noise_spread).items():
        if not 0 <= x < np.inf:
            raise ValueError(f"{name} {x}: expected a number of 0 or more" + (", in units of the reward" if name != "noise_spread" else ""))
    for name, x in weights.items():
        if not np.isfinite(x):
            raise ValueError(f"{name} {x}: expected a finite weight of the logging policy")


def make(seed=0, *, num_users=4000, num_items=300, noise=1.0, noise_spread=0.0, autoplay=0.0, generosity=0.0, pop=1.0, taste=2.0, habit=1.5,
         bait_share=.15, min_events=10, max_events=40):
    """-> (Log, Truth). Events in (user, time, row) order. ValueError names a setting that is impossible. 4000 x 300: .9 s on one core."""
    check(num_users, num_items, noise, noise_spread, autoplay, generosity, bait_share, min_events, max_events, pop=pop, taste=taste, habit=habit)
    rng = {name: np.random.default_rng([seed, k]) for name, k in STREAMS.items()}
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)

    r = rng["items"]
    centres = unit(r.normal(size=(len(GENRES), WIDTH)))
    genre = r.permutation(np.arange(num_items) % len(GENRES))
    v = unit(centres[genre] + .5 * r.normal(size=(num_items, WIDTH)) / WIDTH ** .5)
    exposure, quality = r.normal(size=num_items), .7 * r.normal(size=num_items)
    bait = r.permutation(num_items) < round(bait_share * num_items)
    r = rng["users"]
    z = unit(r.dirichlet(np.full(len(GENRES), .3), num_users) @ centres + .2 * r.normal(size=(num_users, WIDTH)) / WIDTH ** .5)
    c = r.beta(2, 2, num_users)
    affinity = z @ v.T
    mu = 1 + 4 / (1 + np.exp(-(2 * affinity + quality - 2 * bait + .3)))
    truth = Truth(mu, bait, genre, exposure, affinity, c, np.zeros(0), pop, taste, habit)

    lengths = rng["lengths"].integers(min_events, max_events + 1, num_users)
    draws = rng["clicks"].random((num_users, max_events))                   # one per cell, so no draw depends on a length or on the blocks
    items, propensity = np.zeros((num_users, max_events), np.int64), np.zeros((num_users, max_events))
    for users in np.array_split(np.argsort(-lengths, kind="stable"), -(-num_users * num_items // BLOCK)):
        seen, previous = np.zeros((len(users), num_items), bool), np.zeros(len(users), np.int64)
        for step in range(max_events):
            users = users[lengths[users] > step]                            # longest first: those that stay are the first rows
            n, rows = len(users), np.arange(len(users))
            policy = logging_policy(truth, users, previous[:n], seen[:n])
            total = policy.cumsum(1)
            pick = (total > draws[users, step, None] * total[:, -1:]).argmax(1)             # the first above: never an item of probability 0
            propensity[users, step], seen[rows, pick] = policy[rows, pick], True
            items[users, step] = previous[:n] = pick + 1

    kept = np.arange(max_events) < lengths[:, None]
    user, item = np.nonzero(kept)[0], items[kept]
    spread = np.exp(noise_spread * rng["spread"].normal(size=num_items) - noise_spread ** 2)
    auto = bait[item - 1] & (rng["autoplay"].random(kept.shape)[kept] < autoplay)
    reward = np.where(auto, 5.0, mu[user, item - 1]) + noise * spread[item - 1] * rng["noise"].normal(size=kept.shape)[kept]
    reward += generosity * ((c - .5) / .05 ** .5)[user]                     # Beta(2, 2): mean .5, variance .05
    r = rng["times"]
    gaps = np.where(r.random(kept.shape) < .15, 0, np.exp(np.log(12 * 3600) + 1.5 * r.normal(size=kept.shape)))
    gaps[:, 0] = r.uniform(0, 365 * 86400, num_users)
    time = 1_600_000_000 + gaps.astype(np.int64).cumsum(1)[kept]
    ties = (time[1:] == time[:-1])[user[1:] == user[:-1]]
    report = [f"synthetic world, seed {seed}: {num_users:,} users, {num_items:,} items, {len(item):,} events, mean reward {reward.mean():.3f}",
              f"equal times in {ties.mean() if len(ties) else 0:.1%} of adjacent pairs"]
    digits = len(str(max(num_items, 100)))
    log = Log(user=user, item=item, reward_raw=reward, time=time, row=np.arange(len(item)), signals={},
              user_ids=[f"user {u:0{len(str(num_users))}d}" for u in range(num_users)], item_ids=[f"{i:0{digits}d}" for i in range(1, num_items + 1)],
              titles=[f"{GENRES[g]} {i:0{digits}d}" for i, g in enumerate(genre, 1)], report=report)
    return log, truth._replace(propensity=propensity[kept])


def logging_policy(truth, users, previous, seen):
    """users (n,), previous (n,) item, 0 for none, seen (n, I) bool -> (n, I) float64 probabilities, 0 on seen items."""
    logits = truth.taste * truth.affinity[users]
    logits += truth.pop * truth.exposure
    pull = truth.habit_weight * truth.habit[users]
    genres = np.append(truth.genre, -1)                                     # [0 - 1] of no previous item is the -1
    logits += pull[:, None] * (truth.bait + .7 * (genres[previous - 1][:, None] == truth.genre))
    logits[seen] = -np.inf
    top = logits.max(1, keepdims=True)
    if np.isneginf(top).any():
        raise ValueError(f"context {int(np.isneginf(top).argmax())}: all items are seen, nothing is left to recommend")
    logits -= top
    np.exp(logits, out=logits)
    return logits / logits.sum(1, keepdims=True)


def contexts(log, events):
    """What was known just before some events. events (n,) positions in the log -> users (n,), previous (n,) item or 0, seen (n, I) bool."""
    events = np.asarray(events)
    users = log.user[events]
    before = events - np.searchsorted(log.user, users)                      # (n,) how many earlier events of the same user
    rows = np.repeat(np.arange(len(events)), before)
    back = np.arange(len(rows)) - np.repeat(before.cumsum() - before, before) + 1           # 1, 2, .. before, for each
    seen = np.zeros((len(events), len(log.item_ids)), bool)
    seen[rows, log.item[events[rows] - back] - 1] = True
    return users, np.where(before > 0, log.item[events - 1], 0), seen


def last_events(log):
    """-> (U,) position of every user's last event: the test events of leave-one-out."""
    return np.append(np.flatnonzero(log.user[1:] != log.user[:-1]), len(log.user) - 1)


def greedy(truth, users, seen):
    """-> (n,) mu of the best unseen item: no policy has a higher value in these contexts."""
    return np.where(seen, -np.inf, truth.mu[users]).max(1)


def tilted(policy, mu, lam):
    """policy, mu (n, I), lam > 0 in units of mu -> policy exp(mu / lam), renormalised: of all policies of its KL, the one of highest value."""
    if not lam > 0:
        raise ValueError(f"lam {lam}: expected a temperature above 0, in units of the reward")
    top = np.where(policy > 0, mu, -np.inf).max(1, keepdims=True)
    weights = policy * np.exp(np.minimum(mu - top, 0) / lam)                # the minimum only cuts items of probability 0
    return weights / weights.sum(1, keepdims=True)
