"""The synthetic world against loops over its equations, its own exact values, and what may not change or leak."""
import math

import numpy as np
import pytest

from data import bandit
from data.interactions import Log

SMALL = dict(num_users=200, num_items=40, min_events=3, max_events=12)


@pytest.fixture(scope="module")
def small():
    return bandit.make(0, **SMALL)


@pytest.fixture(scope="module")
def default():
    return bandit.make(0)


def value(policy, mu):
    return (policy * mu).sum(1)


def kl(policy, other):
    return np.where(policy > 0, policy * np.log(np.where(policy > 0, policy, 1) / np.where(policy > 0, other, 1)), 0).sum(1)


def same(a, b, fields):
    return [f for f in fields if not np.array_equal(getattr(a, f), getattr(b, f))] == []


# -----------------------------------------------------------------------------
# The logging policy


def test_the_logging_policy_is_its_equation(small):
    """An independent loop in Python over the factors: the logged probability of every event, and all of the first users' policies."""
    log, truth = small
    seen, previous, last = set(), 0, None
    for n, (user, item) in enumerate(zip(log.user.tolist(), log.item.tolist())):
        if user != last:
            seen, previous, last = set(), 0, user
        weights = {}
        for a in range(1, SMALL["num_items"] + 1):
            if a not in seen:
                same_genre = previous > 0 and truth.genre[a - 1] == truth.genre[previous - 1]
                x = 1.0 * truth.exposure[a - 1] + 2.0 * truth.affinity[user, a - 1] + 1.5 * truth.habit[user] * (truth.bait[a - 1] + .7 * same_genre)
                weights[a] = math.exp(x)
        total = sum(weights.values())
        assert truth.propensity[n] == pytest.approx(weights[item] / total, rel=1e-12)
        if n < 60:
            mask = np.array([[a in seen for a in range(1, SMALL["num_items"] + 1)]])
            policy = bandit.logging_policy(truth, np.array([user]), np.array([previous]), mask)[0]
            assert policy.tolist() == pytest.approx([weights.get(a, 0) / total for a in range(1, SMALL["num_items"] + 1)], rel=1e-12)
        seen.add(item)
        previous = item


def test_contexts_are_what_was_known_before(small):
    log, _ = small
    events = np.random.default_rng(0).permutation(len(log.item))[:300]
    users, previous, seen = bandit.contexts(log, events)
    for n, event in enumerate(events.tolist()):
        earlier = [i for u, i in zip(log.user[:event].tolist(), log.item[:event].tolist()) if u == log.user[event]]
        assert users[n] == log.user[event] and previous[n] == (earlier[-1] if earlier else 0)
        assert (np.flatnonzero(seen[n]) + 1).tolist() == sorted(earlier)
    last = bandit.last_events(log)
    assert last.tolist() == [max(np.flatnonzero(log.user == u)) for u in range(SMALL["num_users"])]
    assert (bandit.contexts(log, last)[2].sum(1) == np.bincount(log.user) - 1).all()


def test_clicks_are_draws_from_the_logging_policy(default):
    """Sums over 1e5 draws of f(item) - E_pi[f], a martingale, stay within 4 standard errors: satisfaction, bait, exposure, log propensity, and the
    id itself, which an error in the inverse of the cumulative sum would move."""
    log, truth = default
    assert len(log.item) > 95_000
    sums, variances = np.zeros(5), np.zeros(5)
    for events in np.array_split(np.arange(len(log.item)), 20):
        users, previous, seen = bandit.contexts(log, events)
        policy = bandit.logging_policy(truth, users, previous, seen)
        assert np.abs(policy.sum(1) - 1).max() < 1e-12 and (policy[seen] == 0).all() and (policy[~seen] > 0).all()
        rows, at = np.arange(len(events)), log.item[events] - 1
        assert np.allclose(policy[rows, at], truth.propensity[events], rtol=1e-12, atol=0)
        shape = policy.shape
        wide = lambda column: np.broadcast_to(column, shape)
        functions = truth.mu[users], wide(truth.bait), wide(truth.exposure), np.log(np.where(policy > 0, policy, 1)), wide(np.arange(300.))
        for k, f in enumerate(functions):
            mean = value(policy, f)
            sums[k] += (f[rows, at] - mean).sum()
            variances[k] += (value(policy, f * f) - mean ** 2).sum()
    assert (np.abs(sums) < 4 * variances ** .5).all(), sums / variances ** .5
    assert np.abs(sums[0]) / len(log.item) < .02                                            # and 4 standard errors are less than that


def test_nothing_left_to_recommend_is_an_error(small):
    _, truth = small
    seen = np.zeros((2, SMALL["num_items"]), bool)
    seen[1] = True
    with pytest.raises(ValueError, match="context 1: all items are seen"):
        bandit.logging_policy(truth, np.array([0, 1]), np.array([0, 1]), seen)


# -----------------------------------------------------------------------------
# Values


def test_values_of_the_default_world(default):
    """Near the numbers of the prototype: logging 3.60, uniform 3.23, optimum 4.87; tilt 4.19, 4.41, 4.59 at KL .25, .56, 1.05."""
    log, truth = default
    users, previous, seen = bandit.contexts(log, bandit.last_events(log))
    policy, mu = bandit.logging_policy(truth, users, previous, seen), truth.mu[users]
    found = [value(policy, mu).mean(), value(~seen / (~seen).sum(1, keepdims=True), mu).mean(), bandit.greedy(truth, users, seen).mean()]
    for lam in (1, .5, .25):
        tilt = bandit.tilted(policy, mu, lam)
        found += [value(tilt, mu).mean(), kl(tilt, policy).mean()]
    assert found == pytest.approx([3.60, 3.23, 4.87, 4.19, .25, 4.41, .56, 4.59, 1.05], abs=.06)
    assert 1.2 < value(policy, truth.bait * 1.0).mean() / .15 < 2                           # bait is clicked more than its share of items
    assert truth.mu[:, truth.bait].mean() < truth.mu[:, ~truth.bait].mean() - 1             # and disappoints


def test_no_policy_is_above_the_optimum(small):
    log, truth = small
    users, previous, seen = bandit.contexts(log, bandit.last_events(log))
    mu, best = truth.mu[users], bandit.greedy(truth, users, seen)
    assert best.tolist() == [max(m for m, s in zip(row, gone) if not s) for row, gone in zip(mu.tolist(), seen.tolist())]
    pi, rng = bandit.logging_policy(truth, users, previous, seen), np.random.default_rng(0)
    for scale in (.1, 1, 10, 100):
        other = np.where(seen, 0, np.exp(scale * rng.normal(size=mu.shape)))
        other /= other.sum(1, keepdims=True)
        assert (value(other, mu) <= best + 1e-9).all()
        for lam in (.2, 1, 5):                                                              # the tilt is what maximises V - lam KL
            tilt = bandit.tilted(pi, mu, lam)
            assert (value(other, mu) - lam * kl(other, pi) <= value(tilt, mu) - lam * kl(tilt, pi) + 1e-9).all()
    assert np.allclose(value(bandit.tilted(pi, mu, 1e-4), mu), best, atol=1e-3)
    assert np.allclose(bandit.tilted(pi, mu, math.inf), pi, rtol=1e-12)


def test_tilt_by_hand():
    """.5 e^0, .25 e^(ln 2 / 1), .25 e^(ln 4) -> 2/8, 2/8, 4/8; an item of probability 0 stays there, though it is the best by far."""
    tilt = bandit.tilted(np.array([[.5, .25, .25, 0]]), np.array([[1, 1 + math.log(2), 1 + math.log(4), 900.]]), 1)
    assert tilt[0].tolist() == pytest.approx([.25, .25, .5, 0])
    with pytest.raises(ValueError, match="lam 0"):
        bandit.tilted(tilt, tilt, 0)


# -----------------------------------------------------------------------------
# Satisfaction and rewards


def test_satisfaction_is_its_equation(default):
    """logit of (mu - 1) / 4, less 2 z.v, is a number per item: q - 2 h + .3 with q ~ N(0, .7)."""
    _, truth = default
    assert truth.mu.shape == (4000, 300) and truth.mu.min() > 1 and truth.mu.max() < 5
    share = (truth.mu - 1) / 4
    rest = np.log(share) - np.log1p(-share) - 2 * truth.affinity
    assert rest.std(0).max() < 1e-9
    quality = rest[0] + 2 * truth.bait - .3
    assert abs(quality.mean()) < 4 * .7 / 300 ** .5 and quality.std() == pytest.approx(.7, abs=.12)
    assert truth.bait.sum() == 45 and np.bincount(truth.genre).tolist() == [38] * 4 + [37] * 4
    assert np.abs(truth.affinity).max() <= 1 and truth.exposure.std() == pytest.approx(1, abs=.17)
    assert truth.habit.mean() == pytest.approx(.5, abs=.02) and truth.habit.var() == pytest.approx(.05, abs=.005)      # Beta(2, 2)


def test_noise_changes_rewards_only(small):
    log, truth = small
    mu = truth.mu[log.user, log.item - 1]
    still, exact = bandit.make(0, noise=0, **SMALL)
    loud, loud_truth = bandit.make(0, noise=2, noise_spread=.5, **SMALL)
    for other, other_truth in ((still, exact), (loud, loud_truth)):
        assert same(log, other, ("user", "item", "time", "row", "titles")) and same(truth, other_truth, truth._fields)
    assert np.array_equal(still.reward_raw, mu)
    twice, _ = bandit.make(0, noise=2, **SMALL)
    assert np.allclose(twice.reward_raw - mu, 2 * (log.reward_raw - mu))
    scale = (loud.reward_raw - mu) / (log.reward_raw - mu)                                  # a number per item, not all the same
    sigma = np.array([scale[log.item == i].mean() for i in range(1, 41)])
    assert np.allclose(scale, sigma[log.item - 1]) and sigma.std() > .3


def test_size_of_the_noise(default):
    log, truth = default
    error = log.reward_raw - truth.mu[log.user, log.item - 1]
    assert abs(error.mean()) < 4 / len(error) ** .5 and error.var() == pytest.approx(1, abs=.02)
    log, truth = bandit.make(0, num_users=8, num_items=3_000, noise=3, noise_spread=.4, min_events=1_000, max_events=1_000, taste=0, pop=0, habit=0)
    error = log.reward_raw - truth.mu[log.user, log.item - 1]
    assert error.var() == pytest.approx(9, rel=.1)                                          # the spread does not move the mean square


def test_autoplay_changes_rewards_of_bait_only(small):
    log, truth = small
    bait, mu = truth.bait[log.item - 1], truth.mu[log.user, log.item - 1]
    for p, low, high in ((.5, .4, .6), (1, 1, 1), (0, 0, 0)):
        other, other_truth = bandit.make(0, autoplay=p, **SMALL)
        assert same(log, other, ("user", "item", "time")) and same(truth, other_truth, truth._fields)
        changed = other.reward_raw != log.reward_raw
        assert not changed[~bait].any() and low <= changed[bait].mean() <= high
        assert np.allclose(other.reward_raw - log.reward_raw, np.where(changed, 5 - mu, 0))  # before noise: the noise is still there


def test_generosity_is_of_users_and_goes_with_habit(small):
    log, truth = small
    for generosity in (0.0, 2.0):
        other, other_truth = bandit.make(0, generosity=generosity, **SMALL)
        assert same(log, other, ("user", "item", "time")) and same(truth, other_truth, truth._fields)
        added = other.reward_raw - log.reward_raw
        assert np.allclose(added, generosity * ((truth.habit - .5) / .05 ** .5)[log.user])
    users = bandit.make(0, num_users=20_000, num_items=12, min_events=1, max_events=1, noise=0, generosity=3)
    assert (users[0].reward_raw - users[1].mu[users[0].user, users[0].item - 1]).std() == pytest.approx(3, abs=.05)


def test_the_log_is_not_in_the_satisfaction(small):
    _, truth = small
    for change in (dict(pop=3), dict(taste=0), dict(habit=0), dict(min_events=1)):
        other = bandit.make(0, **SMALL | change)[1]
        assert same(truth, other, ("mu", "bait", "genre", "exposure", "affinity", "habit"))
    flat, truth = bandit.make(0, pop=0, taste=0, habit=0, **SMALL)
    _, _, seen = bandit.contexts(flat, np.arange(len(flat.item)))
    assert np.allclose(truth.propensity, 1 / (~seen).sum(1))                                # nothing left to prefer


# -----------------------------------------------------------------------------
# The log


def test_the_log_holds_the_documented_fields_and_no_truth(small):
    log, truth = small
    assert log._fields == Log._fields == ("user", "item", "reward_raw", "time", "row", "signals", "user_ids", "item_ids", "titles", "report")
    assert log.signals == {}
    assert [getattr(log, f).dtype for f in ("user", "item", "reward_raw", "time", "row")] == [np.int64, np.int64, np.float64, np.int64, np.int64]
    assert all(title == f"{bandit.GENRES[g]} {i}" for title, g, i in zip(log.titles, truth.genre, log.item_ids))         # a genre and a number
    assert len(set(log.titles)) == 40 and log.item_ids == sorted(log.item_ids) and log.user_ids == sorted(log.user_ids)
    assert len(log.user_ids) == 200 and all(isinstance(line, str) for line in log.report)
    other = bandit.make(0, **SMALL | dict(bait_share=.9))[0]
    assert (other.titles, other.item_ids, other.user_ids) == (log.titles, log.item_ids, log.user_ids)


def test_the_log_is_a_log(default):
    log, _ = default
    counts = np.bincount(log.user)
    assert counts.min() == 10 and counts.max() == 40 and len(counts) == 4000 and counts.mean() == pytest.approx(25, abs=.6)
    assert log.item.min() == 1 and log.item.max() == 300
    assert len(np.unique(log.user * 1000 + log.item)) == len(log.item)                      # nobody gets an item twice
    assert np.array_equal(np.lexsort((log.row, log.time, log.user)), np.arange(len(log.item)))
    gaps = np.diff(log.time)[np.diff(log.user) == 0]
    assert (gaps == 0).mean() == pytest.approx(.15, abs=.01) and np.median(gaps[gaps > 0]) == pytest.approx(12 * 3600, rel=.05)


def test_a_seed_is_a_world(small, monkeypatch):
    log, truth = small
    monkeypatch.setattr(bandit, "BLOCK", 400)                                               # other blocks of users: bitwise the same draws
    again, again_truth = bandit.make(0, **SMALL)
    assert same(log, again, Log._fields) and same(truth, again_truth, truth._fields)
    other, other_truth = bandit.make(1, **SMALL)
    assert not np.array_equal(truth.mu, other_truth.mu) and not np.array_equal(log.item[:50], other.item[:50])


@pytest.mark.parametrize("setting, message", [
    (dict(num_users=0), "num_users 0"), (dict(max_events=40), "max_events < num_items"), (dict(min_events=13), "13 to 12"), (dict(min_events=0), "0 to 12"),
    (dict(autoplay=1.1), "autoplay 1.1"), (dict(bait_share=-.1), "bait_share -0.1"), (dict(noise=-1), "noise -1"), (dict(noise=math.nan), "noise nan"),
    (dict(noise_spread=-1), "noise_spread -1"), (dict(generosity=-1), "generosity -1.*units"), (dict(taste=math.inf), "taste inf")])
def test_impossible_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        bandit.make(0, **SMALL | setting)


def test_edges_of_the_settings():
    log, truth = bandit.make(0, num_users=3, num_items=4, min_events=3, max_events=3, bait_share=1.0)
    assert len(log.item) == 9 and truth.bait.all()
    log, truth = bandit.make(0, num_users=1, num_items=2, min_events=1, max_events=1, bait_share=0)
    assert len(log.item) == 1 and not truth.bait.any()
    assert bandit.make(0, pop=500.0, **SMALL)[1].propensity.min() >= 0                      # exp of 1,000 is not needed
