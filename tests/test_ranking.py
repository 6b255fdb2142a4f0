"""Ranks, policies, order and intervals against numbers by hand, loops in Python and a printed table of Student's t."""
import math
import random

import numpy as np
import pytest
import torch

import ranking

INF = math.inf


def rank_by_loop(scores, target, seen):
    """Place of the target when it is sorted behind everything that is not worse."""
    if not 1 <= target <= len(scores):
        return len(scores) + 1
    return 1 + sum(1 for i, s in enumerate(scores, 1) if i != target and not seen[i - 1] and s >= scores[target - 1])


# -----------------------------------------------------------------------------
# Ranks


def test_ranks_by_hand():
    scores = torch.tensor([[.1, .9, .5, .5], [.1, .9, .5, .5], [.1, .9, .5, .5], [.1, .9, .5, .5]])
    assert ranking.ranks(scores, torch.tensor([2, 1, 3, 4])).tolist() == [1, 4, 3, 3]       # a tie counts against the target
    seen = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 1, 0, 1]]).bool()
    assert ranking.ranks(scores, torch.tensor([2, 1, 3, 4]), seen).tolist() == [1, 2, 2, 2]         # the last target is seen: never masked itself
    assert ranking.ranks(scores, torch.tensor([0, 5, -3, 1])).tolist() == [5, 5, 5, 4]              # unknown items: behind all 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ranks_against_a_loop(dtype, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK", 100)                                              # 7 blocks of rows, the last one shorter
    rng = torch.Generator().manual_seed(0)
    scores = torch.randint(-4, 5, (20, 30), generator=rng).to(dtype) / 4                    # many ties
    targets, seen = torch.randint(-1, 34, (20,), generator=rng), torch.rand(20, 30, generator=rng) < .4
    expected = [rank_by_loop(s, t, m) for s, t, m in zip(scores.tolist(), targets.tolist(), seen.tolist())]
    assert ranking.ranks(scores, targets, seen).tolist() == expected
    assert ranking.ranks(scores, targets).tolist() == [rank_by_loop(s, t, [False] * 30) for s, t in zip(scores.tolist(), targets.tolist())]
    monkeypatch.setattr(ranking, "BLOCK", 1 << 20)
    assert ranking.ranks(scores, targets, seen).tolist() == expected


def test_a_constant_scorer_is_last():
    seen = torch.zeros(5, 100, dtype=torch.bool)
    seen[:, 60:80] = True
    found = ranking.ranks(torch.zeros(5, 100), torch.arange(1, 6), seen)
    assert found.tolist() == [80] * 5
    assert set(ranking.ranking_metrics(found).values()) == {0.0}


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("masked", [False, True])
def test_a_score_that_is_not_finite_is_an_error(bad, masked, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK", 8)
    scores, seen = torch.zeros(6, 4), torch.zeros(6, 4, dtype=torch.bool)
    scores[4, 2], seen[4, 2] = bad, masked
    with pytest.raises(ValueError, match=f"score {bad} of item 3 in row 4"):
        ranking.ranks(scores, torch.ones(6, dtype=torch.int64), seen)


def test_metrics_by_hand():
    """Ranks 1, 2, 3, 12: within 5 are 3 of 4, with gains 1, 1 / log2(3), 1 / 2 and reciprocals 1, 1/2, 1/3; 12 adds from 50 on."""
    found = ranking.ranking_metrics(torch.tensor([1, 2, 3, 12]))
    dcg, rr = 1 + 1 / math.log2(3) + 1 / 2, 1 + 1 / 2 + 1 / 3
    assert found == pytest.approx({
        "hr@1": .25, "hr@5": .75, "hr@10": .75, "hr@50": 1, "ndcg@1": .25, "ndcg@5": dcg / 4, "ndcg@10": dcg / 4, "ndcg@50": (dcg + 1 / math.log2(13)) / 4,
        "mrr@1": .25, "mrr@5": rr / 4, "mrr@10": rr / 4, "mrr@50": (rr + 1 / 12) / 4}, abs=1e-12)
    assert all(isinstance(x, float) for x in found.values())
    assert ranking.gains(torch.tensor([1, 2, 6]), ks=(5,))["hr@5"].tolist() == [1, 1, 0]
    assert ranking.ranking_metrics(torch.tensor([200, 201]), ks=(200,))["hr@200"] == .5
    with pytest.raises(ValueError, match="no targets"):
        ranking.ranking_metrics(torch.tensor([], dtype=torch.int64))


# -----------------------------------------------------------------------------
# Policies


def policies(n=7, num_items=23, seed=0):
    rng = torch.Generator().manual_seed(seed)
    seen = torch.rand(n, num_items, generator=rng) < .3
    logits = [3 * torch.randn(n, num_items, generator=rng) for _ in range(2)]
    return logits[0], logits[1], seen


def test_log_policy_is_a_softmax_over_unseen_items():
    logits, _, seen = policies()
    logp = ranking.log_policy(logits.bfloat16(), seen)
    assert logp.dtype == torch.float32 and (logp[seen] == -INF).all()
    for row, gone, found in zip(logits.bfloat16().tolist(), seen.tolist(), logp.tolist()):
        total = sum(math.exp(x) for x, s in zip(row, gone) if not s)
        assert found == pytest.approx([-INF if s else x - math.log(total) for x, s in zip(row, gone)], abs=2e-6)


def test_log_policy_has_a_gradient_and_refuses_nothing_left():
    logits, _, seen = policies()
    logits.requires_grad_()
    logp = ranking.log_policy(logits, seen)
    logp[~seen].sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[seen] == 0).all() and logits.grad.abs().max() > .1
    seen[3] = True
    with pytest.raises(ValueError, match="row 3"):
        ranking.log_policy(logits, seen)
    with pytest.raises(ValueError, match="row 0: a logit is not finite"):
        ranking.log_policy(torch.tensor([[0, math.nan]]), torch.zeros(1, 2, dtype=torch.bool))


def test_policy_metrics_against_a_loop_in_float64(monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK", 50)                                               # 2 rows at a time, the last one alone
    logits, ref_logits, seen = policies()
    rng = np.random.default_rng(0)
    table, vector = rng.normal(size=seen.shape), rng.normal(size=seen.shape[1]) > 0
    found = ranking.policy_metrics(ranking.log_policy(logits, seen), ranking.log_policy(ref_logits, seen), dict(mu=table, bait=vector))
    assert list(found) == ["kl", "entropy", "mu", "bait"] and all(x.dtype == torch.float64 and x.shape == (7,) for x in found.values())
    for n in range(len(seen)):
        kept = [i for i in range(seen.shape[1]) if not seen[n, i]]
        p, q = ({i: math.exp(x[n, i]) for i in kept} for x in (logits.double(), ref_logits.double()))
        p, q = ({i: x / sum(d.values()) for i, x in d.items()} for d in (p, q))
        assert float(found["kl"][n]) == pytest.approx(sum(p[i] * math.log(p[i] / q[i]) for i in kept), rel=2e-6)
        assert float(found["entropy"][n]) == pytest.approx(-sum(p[i] * math.log(p[i]) for i in kept), rel=2e-6)
        assert float(found["mu"][n]) == pytest.approx(sum(p[i] * table[n, i] for i in kept), abs=2e-6)
        assert float(found["bait"][n]) == pytest.approx(sum(p[i] * vector[i] for i in kept), abs=2e-6)


def test_policy_metrics_at_probability_zero():
    """Half of 1, half of 2, none of 3: ln 2 nats, KL to (1/4, 3/4) is (ln 2 + ln 2/3) / 2, whatever is known of item 3."""
    logp, ref = torch.tensor([[.5, .5, 0]]).log(), torch.tensor([[.25, .75, 0]]).log()
    found = ranking.policy_metrics(logp, ref, dict(mu=torch.tensor([[1., 3., math.nan]])))
    assert {name: float(x) for name, x in found.items()} == pytest.approx(dict(kl=(math.log(2) + math.log(2 / 3)) / 2, entropy=math.log(2), mu=2))
    assert ranking.policy_metrics(ref, logp, {})["kl"].item() == pytest.approx(.25 * math.log(.5) + .75 * math.log(1.5))
    assert ranking.policy_metrics(logp, torch.tensor([[1., 0, 0]]).log(), {})["kl"].item() == INF           # ref never does what pi does
    assert ranking.policy_metrics(logp, torch.tensor([[.3, .3, .4]]).log(), {})["kl"].item() == pytest.approx(math.log(5 / 3))


def test_kl_is_never_negative_and_zero_to_itself():
    """fp32 log-probabilities are normalised to 1e-7 only, which a KL of 1e-9 would feel."""
    rng = torch.Generator().manual_seed(0)
    logits, seen = torch.randn(50, 3000, generator=rng), torch.zeros(50, 3000, dtype=torch.bool)
    logp = ranking.log_policy(logits, seen)
    assert ranking.policy_metrics(logp, logp, {})["kl"].abs().max() == 0
    near = ranking.log_policy(logits + 1e-4 * torch.randn(50, 3000, generator=rng), seen)
    kl = ranking.policy_metrics(near, logp, {})["kl"]
    assert kl.min() > 0 and kl.mean().item() == pytest.approx(5e-9, rel=.1)                 # half the variance of the difference


def test_what_is_no_distribution_is_refused():
    logits, ref, seen = policies()
    logp = ranking.log_policy(logits, seen)
    for a, b in ((logp + .01, logp), (logp, ref), (logp * math.nan, logp)):
        with pytest.raises(ValueError, match="expected 1"):
            ranking.policy_metrics(a, b, {})


def test_top_k():
    logp = ranking.log_policy(torch.tensor([[.1, .9, .5, .7], [.9, .1, .2, .3]]), torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]]).bool())
    assert ranking.top_k(logp, 2).tolist() == [[4, 3], [1, 4]]
    assert ranking.top_k(logp, 3).tolist() == [[4, 3, 1], [1, 4, 3]]
    for k in (4, 5):
        with pytest.raises(ValueError, match=f"expected {k} unseen"):
            ranking.top_k(logp, k)


# -----------------------------------------------------------------------------
# Rewards and weights


def test_pair_accuracy_by_hand():
    """Group a: truth 1 2 2 3, prediction .1 .3 .3 .2: five pairs differ; 1<2 twice and 1<3 right, 2<3 twice wrong. Group b: one tie of two. c: no pair."""
    assert ranking.pair_accuracy([.1, .3, .3, .2], [1, 2, 2, 3], [0] * 4) == 3 / 5
    assert ranking.pair_accuracy([.1, .5, .3, .5, .3, .2, .9], [1, 9, 2, 8, 2, 3, 0], [0, 7, 0, 7, 0, 0, 3]) == 3.5 / 6
    assert ranking.pair_accuracy([1, 2], [5, 5], [0, 0]) is None and ranking.pair_accuracy([1, 2], [5, 6], [0, 1]) is None
    for bad, message in (([1, math.nan], "nan"), ([1], "equal length"), ([], "none")):
        with pytest.raises(ValueError, match=message):
            ranking.pair_accuracy(bad, [1, 2], [0, 0])


@pytest.mark.parametrize("levels, num_groups", [(3, 1), (5, 7), (1000, 12), (2, 100)])
def test_pair_accuracy_against_a_loop_over_pairs(levels, num_groups):
    rng = random.Random(levels)
    prediction, truth = ([rng.randrange(levels) / 7 - 3 for _ in range(150)] for _ in range(2))
    groups, right, total = [rng.randrange(num_groups) for _ in range(150)], 0.0, 0
    for i in range(150):
        for j in range(i):
            if groups[i] == groups[j] and truth[i] != truth[j]:
                total += 1
                product = (truth[i] - truth[j]) * (prediction[i] - prediction[j])
                right += .5 if product == 0 else product > 0
    assert ranking.pair_accuracy(prediction, truth, groups) == right / total
    assert ranking.pair_accuracy(torch.tensor(prediction), np.array(truth), torch.tensor(groups)) == right / total
    assert ranking.pair_accuracy(truth, truth, groups) == 1 and ranking.pair_accuracy([0] * 150, truth, groups) == .5


def test_ess_share():
    assert ranking.ess_share([2, 2, 2]) == 1 and ranking.ess_share([0, 5, 0, 0]) == .25 and ranking.ess_share(torch.tensor([1., 3.])) == pytest.approx(16 / 20)
    assert ranking.ess_share([0, 0]) == 0                                                   # a batch without any advantage above 0: no reason to stop
    assert ranking.ess_share([1e300, 1e300]) == 1                                           # squares are not finite
    noise = np.random.default_rng(0).normal(size=200_000) * .5
    assert ranking.ess_share(np.exp(noise)) == pytest.approx(math.exp(-.25), rel=.02)       # of exp(sigma e): exp(-sigma^2)
    for bad in ([1, -1], [math.nan, 1], []):
        with pytest.raises(ValueError):
            ranking.ess_share(bad)


# -----------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize("df, t95, t99", [(1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (4, 2.776, 4.604), (5, 2.571, 4.032), (7, 2.365, 3.499),
                                          (8, 2.306, 3.355), (9, 2.262, 3.250), (12, 2.179, 3.055), (19, 2.093, 2.861), (30, 2.042, 2.750), (1000, 1.962, 2.581)])
def test_t_quantile_against_a_printed_table(df, t95, t99):
    assert ranking.t_quantile(.95, df) == pytest.approx(t95, abs=6e-4) and ranking.t_quantile(.99, df) == pytest.approx(t99, abs=6e-4)


def test_mean_interval():
    """1, 2, 3, 4: mean 2.5, standard error sqrt((5 / 3) / 4), t of 3 degrees of freedom 3.18245."""
    half = 3.182446 * math.sqrt(5 / 12)
    assert ranking.mean_interval([1, 2, 3, 4]) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-6)
    assert ranking.mean_interval([.7]) == (.7, None, None)                                  # float64 all the way: fp32's .7 is .69999999
    assert ranking.mean_interval([.7, .7]) == (.7, .7, .7)
    narrow = ranking.mean_interval([1, 2, 3, 4], level=.5)
    assert narrow[2] - narrow[0] == pytest.approx(.764892 * math.sqrt(5 / 12), abs=1e-6)
    for bad in ([], [1, math.nan]):
        with pytest.raises(ValueError):
            ranking.mean_interval(bad)


def test_mean_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    intervals = [ranking.mean_interval(rng.normal(size=5))[1:] for _ in range(2000)]
    assert .94 < np.mean([low < 0 < high for low, high in intervals]) < .96                 # with the normal's 1.96 it would be .88


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    a = rng.normal(size=400)
    b = a + .1 * rng.normal(size=400) + .05
    difference, low, high = ranking.paired_bootstrap(torch.tensor(b), a)
    assert difference == pytest.approx(float(np.mean(b - a))) and low < difference < high
    assert high - low == pytest.approx(2 * 1.96 * .1 / 20, rel=.15)                         # of the pairs, not of two samples: .28
    assert ranking.paired_bootstrap(a, a) == (0, 0, 0)
    assert ranking.paired_bootstrap(b, a) == ranking.paired_bootstrap(b, a) != ranking.paired_bootstrap(b, a, seed=1)
    with pytest.raises(ValueError, match="same users"):
        ranking.paired_bootstrap(a, b[1:])
    covers = []
    for trial in range(300):
        x = np.random.default_rng(trial).normal(size=60)
        _, low, high = ranking.paired_bootstrap(x, np.zeros(60), num=200, seed=trial)
        covers.append(low < 0 < high)
    assert .89 < np.mean(covers) < .98


def test_bootstrap_over_users_keeps_their_rows_together():
    """Two users, rows (0, 0) and (1, 1): a resample of users has a mean of 0, 1/2 or 1, one of rows also 1/4 and 3/4; many rows of few users are few."""
    d, zero, users = torch.tensor([0.0, 0, 1, 1]), torch.zeros(4), [7, 7, 3, 3]
    assert ranking.paired_bootstrap(d, zero, groups=users) == (0.5, 0.0, 1.0)
    x = torch.arange(10.0).repeat_interleave(50)
    _, low, high = ranking.paired_bootstrap(x, torch.zeros(500))
    _, wide_low, wide_high = ranking.paired_bootstrap(x, torch.zeros(500), groups=torch.arange(10).repeat_interleave(50))
    assert wide_high - wide_low > 5 * (high - low)
    assert ranking.paired_bootstrap(x, torch.zeros(500), groups=torch.arange(500)) == ranking.paired_bootstrap(x, torch.zeros(500))
