"""Scores of a confidence against numbers by hand, closed forms, loops over pairs and orders, and scikit-learn; what is not defined is null."""
import itertools
import json
import math

import numpy as np
import pytest

import calibration as cal

# sorted by confidence; the last answer states none
Q = [1.0, 0.9, 0.9, 0.65, 0.6, 0.2, 0.2, None]
C = [0, 1, 1, 0, 1, 1, 0, 1]
DEFINED_WITHOUT_Q = {"accuracy", "adherence", "distinct_q", "aurc", "acc@80", "cov@95"}


def sample(n, seed=0, levels=21, silent=0.0, slope=1.0):
    """n confidences with many ties, right with probability sig(slope logit q); a share of them not stated."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, levels, n) / (levels - 1)
    c = (rng.random(n) < cal.sigmoid(slope * cal.logit(q))).astype(int)
    return [None if s else x for x, s in zip(q.tolist(), rng.random(n) < silent)], c.tolist()


def scores(q, c):
    return cal.metrics(cal.tally(q, c))


# -----------------------------------------------------------------------------
# By hand


def test_every_score_by_hand():
    """ECE: bins 9 (1, .9, .9), 6 (.65, .6) and 2 (.2, .2) are off by |2 - 2.8|, |1 - 1.25| and |1 - .4| items of 7.
    ACE: r - 1/2 is 1 for both .2, then 2.5, 3.5, 5 for both .9, 6.5: bins 1, 3, 5, 7, 9, off by .6, .4, .65, .2 and 1.
    AUROC: the right .9, .9, .6, .2 are above 2, 2, 1 and a half (a tie) of the wrong 1, .65, .2.
    Risk: 1 error, still 1, still 1, 2, 2, then 1 of 2 ties, 3, and the answer without a confidence is right.
    """
    expected = dict(accuracy=5 / 8, adherence=7 / 8, mean_q=4.45 / 7, distinct_q=5, brier=2.2825 / 7, bss=1 - 2.2825 * 7 / 12,
                    nll=-math.log(1e-4 * 0.9 * 0.9 * 0.35 * 0.6 * 0.2 * 0.8) / 7, auroc=5.5 / 12,
                    aurc=(1 + 1 / 2 + 1 / 3 + 2 / 4 + 2 / 5 + 2.5 / 6 + 3 / 7 + 3 / 8) / 8, ece=1.65 / 7, ace=2.85 / 7) | {"acc@80": 4 / 7, "cov@95": 0}
    assert scores(Q, C) == pytest.approx(expected, abs=1e-12)
    assert all(type(v) is float for v in scores(Q, C).values())                                 # json knows these


def test_coverage_at_a_risk_and_accuracy_at_a_coverage():
    t = cal.tally(Q, C)
    assert [cal.coverage_at(t, r) for r in (0.4, 0.36, 0.3)] == [1.0, 3 / 8, 0.0]                # the last k below, not the first above
    assert [cal.accuracy_at(t, share) for share in (0.01, 0.5, 0.51, 1)] == pytest.approx([0, 1 / 2, 3 / 5, 5 / 8])       # k = 1, 4, 5, 8
    hundred = cal.tally([1 - i / 100 for i in range(100)], [1] * 55 + [0] * 45)
    assert cal.accuracy_at(hundred, 0.55) == 1                                                  # .55 * 100 > 55 in floating point
    assert [cal.coverage_at(cal.tally([0.7] * 100, [0] * n + [1] * (100 - n))) for n in (5, 6)] == [1.0, 0.0]
    ties = cal.tally([0.9] * 115 + [0.5] * 50, [1] * 115 + [0] * 14 + [1] * 36)                 # k = 140: 25 ties with 7 expected errors, 7 / 140 = .05
    assert cal.risk(ties)[139] > 0.05 and cal.coverage_at(ties) == 140 / 165                    # but for rounding
    for coverage in (0, 1.01, math.nan):
        with pytest.raises(ValueError, match="coverage"):
            cal.accuracy_at(t, coverage)


def test_a_confidence_of_exactly_one_is_counted():
    """Half-open bins would give an ECE of 0: the items that are sure and wrong would be in no bin."""
    t = cal.tally([1.0] * 10, [1, 0] * 5)
    assert cal.ece(t) == cal.ace(t) == 0.5
    assert cal.reliability(t)["items"] == [10] and cal.reliability(t)["bin"] == [9]


def test_a_tenth_opens_its_bin():
    tenths = [float(f"0.{i}") for i in range(10)] + [1.0]
    assert cal.width_bins(cal.tally(tenths, [1] * 11)).tolist() == [*range(10), 9]
    assert cal.width_bins(cal.tally([math.nextafter(0.5, 0), math.nextafter(1, 0)], [1, 0])).tolist() == [4, 9]


def test_equal_confidences_share_a_bin_of_equal_mass():
    distinct = cal.tally([i / 100 for i in range(100)], [0] * 100)
    assert np.bincount(cal.mass_bins(distinct)).tolist() == [10] * 10
    assert cal.mass_bins(cal.tally([0.1] * 50 + [0.9] * 50, [0] * 100)).tolist() == [2, 7]       # r - 1/2 is 25 and 75 of 100
    # mean q of each half is right, though both have .5 +- .5 in them: one bin each, whatever the order
    assert cal.ace(cal.tally([0.25, 0.75] * 4, [0, 1, 0, 1, 0, 1, 1, 0])) == 0


# -----------------------------------------------------------------------------
# Closed forms


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
def test_a_constant_knows_nothing(q):
    c = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]                                                          # p = .4
    m = scores([q] * 10, c)
    assert m["auroc"] == 0.5 and m["distinct_q"] == 1
    assert m["aurc"] == pytest.approx(0.6) and m["acc@80"] == pytest.approx(0.4)
    assert m["ece"] == pytest.approx(abs(q - 0.4)) == m["ace"]
    assert m["bss"] == pytest.approx(1 - (0.24 + (q - 0.4) ** 2) / 0.24)                         # bias^2 + variance: 0 only at q = p


def test_a_constant_at_the_base_rate_has_no_skill_and_no_error():
    m = scores([0.4] * 5, [1, 1, 0, 0, 0])
    assert m["bss"] == pytest.approx(0, abs=1e-12) and m["ece"] == pytest.approx(0, abs=1e-12)


def test_perfect_and_reversed_order():
    c = [1] * 6 + [0] * 4
    perfect, reversed_ = cal.tally([1.0] * 6 + [0.0] * 4, c), cal.tally([i / 10 for i in range(10)], c)
    m = cal.metrics(perfect)
    assert (m["brier"], m["bss"], m["ece"], m["ace"], m["auroc"], m["acc@80"], m["cov@95"]) == (0, 1, 0, 0, 1, 0.75, 0.6)
    assert m["nll"] == pytest.approx(-math.log1p(-1e-4)) and cal.auroc(reversed_) == 0
    curve = cal.risk_coverage(perfect)
    assert curve["risk"] == pytest.approx(curve["best"]) and curve["best"] == [0] * 6 + [1 / 7, 2 / 8, 3 / 9, 4 / 10]
    assert cal.risk_coverage(reversed_)["risk"] == pytest.approx([1, 1, 1, 1] + [4 / k for k in range(5, 11)])


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("n", [1, 7])
def test_one_class_leaves_skill_and_order_undefined(right, n):
    m = scores([0.75] * n, [right] * n)
    assert m["bss"] is None and m["auroc"] is None                                              # null, not 0
    assert m["brier"] == (right - 0.75) ** 2 and m["ece"] == m["ace"] == abs(right - 0.75)
    assert (m["aurc"], m["acc@80"], m["cov@95"]) == (1 - right, right, right)
    assert json.loads(json.dumps(m)) == m


def test_without_any_confidence_only_accuracy_and_risk_are_defined():
    m = scores([None, None], [1, 0])
    assert {name for name, value in m.items() if value is not None} == DEFINED_WITHOUT_Q
    assert (m["accuracy"], m["adherence"], m["aurc"], m["distinct_q"]) == (0.5, 0, 0.5, 0)
    assert cal.noise_floor(cal.tally([None], [1])) == dict(mean=None, p95=None)
    assert cal.reliability(cal.tally([None], [1]))["items"] == []


def test_answers_without_a_confidence_come_last_and_are_in_no_average_over_q():
    q, c = [0.8, 0.3], [1, 0]
    m, without = scores(q + [None] * 2, c + [1, 1]), scores(q, c)
    assert all(m[k] == without[k] for k in cal.METRICS.keys() - (DEFINED_WITHOUT_Q - {"distinct_q"}))
    assert cal.risk(cal.tally(q + [None] * 2, c + [1, 1])).tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert m["adherence"] == 0.5 and m["accuracy"] == 0.75


# -----------------------------------------------------------------------------
# Oracles


def oracle(q, c):
    """The definitions as loops over items, pairs and bins; every item has a q."""
    n, p = len(q), sum(c) / len(c)
    error = lambda bins: sum(abs(sum(c[i] - q[i] for i in range(n) if bins[i] == b)) for b in range(10)) / n
    rank = [sum(y < x for y in q) + (sum(y == x for y in q) + 1) / 2 for x in q]
    pairs = [(x > y) + (x == y) / 2 for x, right in zip(q, c) if right for y, wrong in zip(q, c) if not wrong]
    brier = sum((x - y) ** 2 for x, y in zip(q, c)) / n
    def risk(k):                                                                                # items of a tie at the cut are in with equal probability
        taken = [min(1, max(0, k - sum(y > x for y in q)) / sum(y == x for y in q)) for x in q]
        return sum(w * (1 - right) for w, right in zip(taken, c)) / k
    return dict(brier=brier, bss=1 - brier / (p * (1 - p)), auroc=sum(pairs) / len(pairs), ece=error([min(math.floor(10 * x), 9) for x in q]),
                ace=error([min(9, math.floor(10 * (r - 0.5) / n)) for r in rank]), aurc=sum(risk(k) for k in range(1, n + 1)) / n) \
        | {"acc@80": 1 - risk(math.ceil(0.8 * n))}


@pytest.mark.parametrize("n, levels", [(2, 3), (17, 4), (50, 21), (61, 1001)])
def test_scores_equal_loops_over_items_and_pairs(n, levels):
    for seed in range(5):
        q, c = sample(n, seed, levels)
        c[0], c[1] = 0, 1                                                                       # both classes
        expected = oracle(q, c)
        assert {k: scores(q, c)[k] for k in expected} == pytest.approx(expected, abs=1e-12)


def test_risk_is_the_mean_over_all_orders_of_ties():
    q, c = [0.9, 0.5, 0.5, 0.5, None, None], [1, 0, 1, 1, 0, 1]
    key = [-1 if x is None else x for x in q]
    curves = []
    for order in itertools.permutations(range(6)):
        errors = [1 - c[i] for i in sorted(order, key=lambda i: -key[i])]                       # stable: ties stay in the order of the permutation
        curves.append(np.cumsum(errors) / np.arange(1, 7))
    assert cal.risk(cal.tally(q, c)) == pytest.approx(np.mean(curves, 0), abs=1e-12)


def test_the_order_of_items_does_not_matter_to_the_bit():
    q, c = sample(300, silent=0.1)
    expected = scores(q, c)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(300)
        assert scores([q[i] for i in order], [c[i] for i in order]) == expected


def test_parity_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    linear = pytest.importorskip("sklearn.linear_model")
    for levels in (3, 11, 100_000):                                                             # few levels: mostly ties
        q, c = sample(400, seed=levels, levels=levels, slope=0.3)
        m, clamped = scores(q, c), np.clip(q, 1e-4, 1 - 1e-4)
        assert m["auroc"] == pytest.approx(sklearn.roc_auc_score(c, q), abs=1e-12)
        assert m["brier"] == pytest.approx(sklearn.brier_score_loss(c, q), abs=1e-12)
        assert m["nll"] == pytest.approx(sklearn.log_loss(c, clamped), abs=1e-12)
        peer = linear.LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(cal.logit(q)[:, None], c)
        assert cal.fit_platt(q, c) == pytest.approx((peer.coef_[0, 0], peer.intercept_[0]), abs=1e-5)


# -----------------------------------------------------------------------------
# Input that is refused


@pytest.mark.parametrize("q, c, message", [
    ([], [], "at least one, found 0 and 0"),
    ([0.5, 0.5], [1], "found 2 and 1"),
    ([0.5, math.nan], [1, 0], "row 1: confidence nan"),
    ([0.5, 0.5, 1.0000001], [1, 0, 1], "row 2: confidence 1.0000001"),
    ([-0.01], [1], r"row 0: confidence -0.01"),
    ([math.inf], [1], "row 0: confidence inf"),
    ([85], [1], r"row 0: confidence 85, expected a number in \[0, 1\]"),
    ([0.5, 0.5], [1, 0.5], "row 1: grade 0.5"),
    ([0.5], [None], "row 0: grade None"),
    ([0.5], [math.nan], "row 0: grade nan"),
    (np.array([0.7], np.float32), [1], "row 0: confidence of type float32"),
])
def test_bad_input_is_refused_by_row(q, c, message):
    for function in (cal.tally, cal.fit_platt, cal.fit_temperature):
        with pytest.raises(ValueError, match=message):
            function(q, c)
    with pytest.raises(ValueError, match=message):
        cal.bootstrap({"a": (q, c, range(len(q)))}, num=1)


def test_grades_may_be_bools_and_columns_arrays():
    assert scores(np.array(Q[:-1]), np.array(C[:-1], bool)) == scores(Q[:-1], C[:-1])


# -----------------------------------------------------------------------------
# Intervals and noise


def test_a_resample_is_what_repeating_items_gives():
    """Two prompts with 3 items and 1: a resample has a twice, b twice (no confidence at all), or both."""
    a, b = ([0.9, None, 0.4], [1, 1, 0]), ([None], [1])
    q, c = a[0] + b[0], a[1] + b[1]
    with np.errstate(all="raise"):                                                              # not defined is decided, not 0 / 0
        draws = cal.bootstrap({"x": (q, c, ["a", "a", "a", "b"])}, num=60)["x"]
    assert draws.keys() == cal.METRICS.keys() - {"distinct_q"}
    for name in cal.RESAMPLED:
        possible = [scores(first[0] + second[0], first[1] + second[1])[name] for first, second in ((a, a), (a, b), (b, b))]
        seen = {None if math.isnan(x) else round(x, 9) for x in draws[name][1:]}
        assert seen == {None if x is None else round(x, 9) for x in possible}, name
        assert draws[name][0] == pytest.approx(scores(q, c)[name])


def test_undefined_resamples_are_skipped_and_counted():
    draws = cal.bootstrap({"x": ([0.9, 0.1], [1, 0], [0, 1])}, num=400)["x"]
    found = cal.interval(draws["auroc"])                                                        # defined only where both items are drawn: half of the time
    assert (found["value"], found["low"], found["high"]) == (1, 1, 1) and 150 < found["skipped"] < 250
    assert found["skipped"] == np.isnan(draws["auroc"]).sum() and cal.interval(draws["brier"])["skipped"] == 0
    one_class = cal.bootstrap({"x": ([0.9, 0.1], [1, 1], [0, 1])}, num=10)["x"]
    assert cal.interval(one_class["auroc"]) == dict(value=None, low=None, high=None, skipped=10)


def test_interval_is_the_percentiles_of_the_resamples_alone():
    draws = np.array([1e6, *range(1, 1002)], float)                                             # the value on all items is not one of them
    assert cal.interval(draws) == dict(value=1e6, low=26.0, high=976.0, skipped=0)


def test_bootstrap_of_prompts_covers_the_truth():
    """Calibrated q, uniform: E (q - c)^2 = E q (1 - q) = 1/6. Three samples per prompt with one q and one outcome: items as the unit would cover 75 %."""
    rng, hits, num = np.random.default_rng(0), 0, 200
    prompts = np.repeat(np.arange(100), 3).tolist()
    for seed in range(num):
        q = rng.random(100)
        columns = np.repeat(q, 3).tolist(), np.repeat(rng.random(100) < q, 3).tolist(), prompts
        found = cal.interval(cal.bootstrap({"x": columns}, num=250, seed=seed, names=("brier",))["x"]["brier"])
        hits += found["low"] <= 1 / 6 <= found["high"]
    assert 0.93 <= hits / num <= 0.97, hits / num


def test_differences_are_paired_on_the_same_prompts():
    q, c = sample(200, seed=3)
    prompts = [f"p{i // 2}" for i in range(200)]
    worse = [None if x is None else 0.8 * x for x in q]
    order = np.random.default_rng(0).permutation(200)                                           # a file in another order pairs all the same
    shuffled = [[column[i] for i in order] for column in (q, c, prompts)]
    draws = cal.bootstrap({"a": (q, c, prompts), "same": shuffled, "worse": (worse, c, prompts)}, num=100)
    alone = cal.bootstrap({"same": shuffled}, num=100)["same"]                                  # and also in a call of its own
    for name in cal.RESAMPLED:
        assert np.array_equal(draws["a"][name], draws["same"][name]) and np.array_equal(draws["a"][name], alone[name]), name
    difference, alone = cal.interval(draws["worse"]["brier"] - draws["a"]["brier"]), cal.interval(draws["a"]["brier"])
    assert 0 < difference["low"] < difference["value"] < difference["high"]
    assert difference["high"] - difference["low"] < 0.5 * (alone["high"] - alone["low"])         # prompts are hard for both
    again = cal.bootstrap({"a": (q, c, prompts)}, num=100)["a"]["brier"]
    assert np.array_equal(again, draws["a"]["brier"]) and not np.array_equal(again, cal.bootstrap({"a": (q, c, prompts)}, num=100, seed=1)["a"]["brier"])


def test_other_prompts_do_not_pair():
    with pytest.raises(ValueError, match="b: 2 prompts are not those of a"):
        cal.bootstrap({"a": ([0.1, 0.2], [0, 1], ["x", "y"]), "b": ([0.1, 0.2], [0, 1], ["x", "z"])}, num=1)
    with pytest.raises(ValueError, match="prompt id per item, found 3 for 2"):
        cal.bootstrap({"a": ([0.1, 0.2], [0, 1], ["x", "y", "y"])}, num=1)


def test_shuffled_grades_have_no_order():
    q, c = sample(500, seed=1)
    order = np.random.default_rng(0).permutation(500)
    for grades, informative in ((c, True), ([c[i] for i in order], False)):
        draws = cal.bootstrap({"x": (q, grades, list(range(500)))}, num=300, names=("auroc", "bss"))["x"]
        auroc, skill = cal.interval(draws["auroc"]), cal.interval(draws["bss"])
        assert (auroc["low"] <= 0.5 <= auroc["high"]) != informative
        assert skill["low"] > 0 if informative else skill["high"] < 0


@pytest.mark.parametrize("q, mean, p95", [
    (((np.arange(1319) + 0.5) / 1319).tolist(), 0.028, 0.039),
    (np.random.default_rng(0).beta(5, 2, 1319).tolist(), 0.024, 0.036),
    ([0.9] * 1319, 0.007, 0.017),
    (((np.arange(500) + 0.5) / 500).tolist(), 0.045, 0.064),
], ids=["uniform", "beta", "constant", "uniform_500"])
def test_noise_floor_of_a_perfect_predictor(q, mean, p95):
    """Numbers of an independent simulation."""
    assert cal.noise_floor(cal.tally(q, [0] * len(q))) == pytest.approx(dict(mean=mean, p95=p95), abs=0.0015)


def test_noise_floor_in_closed_form():
    """One item with q = .8: ECE is .2 with probability .8, else .8; of items that are sure it is 0. What was graded does not matter."""
    one = cal.noise_floor(cal.tally([0.8], [0]), num=4000)
    assert one["mean"] == pytest.approx(0.8 * 0.2 + 0.2 * 0.8, abs=0.02) and one["p95"] == pytest.approx(0.8)
    assert one == cal.noise_floor(cal.tally([0.8, None], [1, 1]), num=4000)
    assert cal.noise_floor(cal.tally([0.0, 1.0], [1, 0])) == dict(mean=0.0, p95=0.0)


def test_wilson_holds_the_share_itself_also_after_rounding():
    for total in range(1, 300):
        for right in (0, total):
            low, high = cal.wilson(right, total)
            assert 0 <= low <= right / total <= high <= 1


# -----------------------------------------------------------------------------
# Rescaling


rescale = lambda q, a, b=0.0: cal.combine([q], [a], b)


def test_temperature_by_hand():
    """q = .9, right 3 of 4 times: sig(log 9 / T) = .75 = sig(log 3), so T = 2. Items at one half have nothing to say."""
    assert cal.fit_temperature([0.9] * 4, [1, 1, 1, 0]) == pytest.approx(2, abs=1e-10)
    assert cal.fit_temperature([0.9] * 4 + [0.5] * 3 + [None], [1, 1, 1, 0, 0, 0, 1, 0]) == pytest.approx(2, abs=1e-10)
    assert cal.combine([[0.9, 0.1, 0.5, None]], [1 / 2], 0.0) == pytest.approx([0.75, 0.25, 0.5, None])


def test_abstention_by_hand():
    """At the threshold is given; without a confidence is not."""
    q, c = [0.9, 0.5, 0.4, None, 0.8], [1, 0, 1, 1, 0]
    assert cal.abstention(q, c, 0.5) == pytest.approx(dict(coverage=0.6, error=2 / 3, error_of_all=0.4))
    assert cal.abstention(q, c, 0.95) == dict(coverage=0.0, error=None, error_of_all=pytest.approx(0.4))


def test_platt_by_hand():
    """Two confidences, two parameters: each gets its own share of right answers, .6 and .2. a = (log 1.5 - log .25) / (log 9 - log 4)."""
    a, b = cal.fit_platt([0.9] * 5 + [0.8] * 5 + [None], [1, 1, 1, 0, 0] + [1, 0, 0, 0, 0] + [0])
    assert a == pytest.approx(math.log(6) / math.log(2.25), abs=1e-9) and b == pytest.approx(math.log(1.5) - a * math.log(9), abs=1e-9)
    assert rescale([0.9, 0.8], a, b) == pytest.approx([0.6, 0.2], abs=1e-10)


def test_fits_recover_what_made_the_data():
    rng = np.random.default_rng(0)
    q = rng.random(10_000)
    c = rng.random(10_000) < cal.sigmoid(0.4 * cal.logit(q) - 0.7)
    assert cal.fit_platt(q, c) == pytest.approx((0.4, -0.7), abs=0.06)                          # standard errors .013 and .023
    c = rng.random(10_000) < cal.sigmoid(cal.logit(q) / 3)
    assert cal.fit_temperature(q, c) == pytest.approx(3, abs=0.3)
    before, after = scores(q, c), scores(rescale(q, 1 / 3), c)
    assert after["brier"] < before["brier"] - 0.02 and after["ece"] < 0.02 < 0.1 < before["ece"]


@pytest.mark.parametrize("slope", [0.1, 1.0, 5.0])
def test_fits_solve_the_score_equations(slope):
    """At the maximum of the likelihood sum (c - p) and sum (c - p) z are 0, for weak and for all but perfect separation."""
    q, c = sample(1000, seed=4, levels=200, slope=slope)
    z = cal.logit(q)
    residual = c - np.array(rescale(q, *cal.fit_platt(q, c)))
    assert abs(residual.mean()) < 1e-9 and abs((residual * z).mean()) < 1e-9
    residual = c - np.array(rescale(q, 1 / cal.fit_temperature(q, c)))
    assert abs((residual * z).mean()) < 1e-9


def test_newton_takes_smaller_steps_where_full_ones_diverge():
    """51, 2794 and 6 answers of which 0, 2 and 2 are right: full steps from 0 end in a singular matrix."""
    q, c = [0.1] * 51 + [0.7] * 2794 + [0.9] * 6, [0] * 51 + [1] * 2 + [0] * 2792 + [1] * 2 + [0] * 4
    a, b = cal.fit_platt(q, c)
    residual = c - np.array(rescale(q, a, b))
    assert abs(residual.sum()) < 1e-6 and abs((residual * cal.logit(q)).sum()) < 1e-6 and 4 < a < 6


def test_rescaling_keeps_the_order_and_clamps():
    q, c = sample(400, seed=2, levels=50, silent=0.1)
    q = [None if x is None else min(max(x, 0.001), 0.999) for x in q]                            # inside the clamp, so that no ties are made
    before = scores(q, c)
    for a, b in ((1 / cal.fit_temperature(q, c), 0.0), cal.fit_platt(q, c), (0.1, 3.0), (3.0, -2.0)):
        after = scores(rescale(q, a, b), c)
        assert all(after[k] == before[k] for k in ("auroc", "aurc", "acc@80", "cov@95", "distinct_q", "adherence"))
    assert rescale([0.0, 1.0, 0.00005, None], 1.0) == pytest.approx([1e-4, 1 - 1e-4, 1e-4, None])
    assert rescale([0.3], 40.0)[0] / (3 / 7) ** 40 == pytest.approx(1, abs=1e-9)             # exact in the tail


@pytest.mark.parametrize("fit, q, c, message", [
    (cal.fit_platt, [0.2, 0.4, 0.6, 0.8], [1, 1, 0, 0], "anti-correlated"),
    (cal.fit_platt, [0.2, 0.4, 0.4, 0.8, 0.6], [1, 1, 0, 0, 1], "anti-correlated"),
    (cal.fit_platt, [0.2, 0.8] * 2, [0, 0, 1, 1], "says nothing"),
    (cal.fit_platt, [0.2, 0.4, 0.4, 0.8], [0, 0, 1, 1], "threshold parts right from wrong"),
    (cal.fit_platt, [0.7] * 4, [0, 0, 1, 1], "all 4 confidences are equal"),
    (cal.fit_platt, [1.0, 0.99999], [0, 1], "equal after the clamp"),
    (cal.fit_platt, [0.2, 0.4, None], [1, 1, 0], "2 of 2 items with a confidence are right, both classes"),
    (cal.fit_platt, [0.2, 0.4, None], [0, 0, 1], "0 of 2 items"),
    (cal.fit_temperature, [0.2, 0.4, 0.6, 0.8], [1, 1, 0, 0], "anti-correlated"),
    (cal.fit_temperature, [0.9, 0.8, 0.7], [0, 0, 1], "wrong side of one half"),
    (cal.fit_temperature, [0.5] * 4, [0, 1, 1, 1], "no temperature above 0 fits"),
    (cal.fit_temperature, [0.2, 0.5, 0.8], [0, 0, 1], "every item is on its side"),
    (cal.fit_temperature, [0.2, 0.4], [1, 1], "both classes"),
    (cal.fit_temperature, [None, None], [1, 0], "0 of 0"),
])
def test_fits_without_an_answer_are_refused(fit, q, c, message):
    with pytest.raises(ValueError, match=message):
        fit(q, c)


# -----------------------------------------------------------------------------
# Diagrams


def test_diagrams_hold_the_numbers_of_the_scores():
    t = cal.tally(Q, C)
    r, curve = cal.reliability(t), cal.risk_coverage(t)
    assert (r["bin"], r["items"]) == ([2, 6, 9], [2, 2, 3])
    assert r["mean_q"] == pytest.approx([0.2, 0.625, 2.8 / 3]) and r["accuracy"] == pytest.approx([1 / 2, 1 / 2, 2 / 3])
    assert sum(n * abs(a - q) for n, a, q in zip(r["items"], r["accuracy"], r["mean_q"])) / 7 == pytest.approx(cal.ece(t))
    assert r["low"] == pytest.approx([0.0945, 0.0945, 0.2077], abs=1e-4) and r["high"] == pytest.approx([0.9055, 0.9055, 0.9385], abs=1e-4)
    assert curve["coverage"] == [k / 8 for k in range(1, 9)] and np.mean(curve["risk"]) == pytest.approx(cal.aurc(t))
    assert curve["best"] == pytest.approx([0] * 5 + [1 / 6, 2 / 7, 3 / 8]) and curve["constant"] == 3 / 8 == curve["risk"][-1]


def test_picture_is_drawn_from_what_json_keeps(tmp_path):
    cases = {"before": (Q, C), "all wrong": ([1.0] * 7, [0] * 7), "all right": ([0.35] * 7, [1] * 7), "one": ([0.5], [1]), "silent": ([None] * 3, [1, 0, 1])}
    saved = json.loads(json.dumps({name: cal.diagrams(cal.tally(*case)) for name, case in cases.items()}, allow_nan=False))
    cal.picture(saved, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (tmp_path / "calibration.png").stat().st_size > 20_000
