"""Offline data: dynamics against gymnasium, exact solvers against hand-worked worlds and each other, the public sepsis tables, and files that are wrong."""
import gzip
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from data import offline
from data.offline import (Tabular, backup, empirical, expectile_values, expectiles, greedy, load, log_tabular, open_data, policy_values, sepsis,
                          tabular_transitions, value_iteration, walk_graph)

staged = pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("TEMPER_DATA", ""), "icu_sepsis")),
                            reason="needs TEMPER_DATA=<folder that holds icu_sepsis/>")


# -----------------------------------------------------------------------------
# CartPole


def test_cartpole_moves_as_gymnasium_does():
    gymnasium = pytest.importorskip("gymnasium")
    env, rng = gymnasium.make("CartPole-v1").unwrapped, np.random.default_rng(0)
    for game in range(5):
        env.reset(seed=game)
        state, fallen = np.array([env.state], np.float64), np.array([False])
        while not fallen[0]:
            action = rng.integers(0, 2, 1)
            _, reward, terminated, _, _ = env.step(int(action[0]))
            state, fallen = offline.cartpole_step(state, action)
            assert reward == 1 and terminated == fallen[0]
            assert np.abs(state[0] - np.array(env.state, np.float64)).max() < 1e-12
    assert gymnasium.make("CartPole-v1").spec.max_episode_steps == offline.LIMIT
    starts = offline.cartpole_start(np.random.default_rng(1), 10_000)
    assert starts.shape == (10_000, 4) and np.abs(starts).max() < 0.05 and np.abs(starts.mean(0)).max() < 0.002


def test_cartpole_by_hand():
    """From rest and upright: push 10 / 1.1, turn -push / (.5 (4/3 - .1/1.1)), shift push - .05 turn / 1.1, times .02 s."""
    state, fallen = offline.cartpole_step(np.zeros((1, 4)), np.array([1]))
    push = 10 / 1.1
    turn = -push / (0.5 * (4 / 3 - 0.1 / 1.1))
    assert np.allclose(state, [[0, 0.02 * (push - 0.05 * turn / 1.1), 0, 0.02 * turn]], atol=1e-15) and not fallen[0]
    state, fallen = offline.cartpole_step(np.array([[2.39, 1, 0, 0], [0, 0, .2, 1], [0, 0, 0, 0]]), np.array([1, 0, 0]))
    assert fallen.tolist() == [True, True, False]


def test_cartpole_log_and_time_limit():
    data = offline.cartpole(3, 50)
    last = np.flatnonzero(np.append(data.episode[1:] != data.episode[:-1], True))
    assert (np.flatnonzero(data.terminal) == last).all() and data.rewards.sum() == len(data.obs) == data.returns.sum()
    same = np.setdiff1d(np.arange(len(data.obs)), last)
    assert (data.next_obs[same] == data.obs[same + 1]).all() and abs(data.actions.mean() - 0.5) < 0.05
    assert 18 < offline.cartpole(0, 1500).returns.mean() < 27                # about 22, as gymnasium's under the same policy
    # a controller that never falls is cut off at 500, and being cut off is no fall
    returns, log = offline.cartpole_play(lambda obs, rng: (obs[:, 2] + obs[:, 3] + 0.1 * obs[:, 0] + 0.2 * obs[:, 1] > 0).astype(np.int64), 0, 20)
    assert (returns == 500).all() and len(log) == 500 and not any(step[3].any() for step in log)


# -----------------------------------------------------------------------------
# Exact solvers


def test_expectile_of_a_bernoulli_is_the_closed_form():
    """e p / (e p + (1 - e)(1 - p))."""
    for e, p, by_hand in ((.7, .25, .4375), (.9, .25, .75), (.5, .25, .25), (.5, .8, .8), (.3, .5, .3)):
        assert abs(expectiles(np.array([0.0, 1.0]), np.array([1 - p, p]), e) - by_hand) < 1e-12
        assert abs(expectiles(np.array([1.0, 0.0]), np.array([p, 1 - p]), e) - by_hand) < 1e-12           # in any order
    x, w = np.array([3.0, -2.0, 9.0, 4.0]), np.array([.2, .5, 0.0, .3])
    assert abs(expectiles(x, w, .5) - (w * x).sum()) < 1e-12                  # the mean
    assert abs(expectiles(x, w, 1 - 1e-9) - 4) < 1e-6                         # the maximum of what has weight
    assert abs(expectiles(x, w, 1e-9) + 2) < 1e-6
    assert expectiles(x, np.zeros(4), .7) == 0 and expectiles(np.full(3, 5.0), np.ones(3), .9) == 5


def test_expectiles_against_bisection():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(200, 7)), rng.random((200, 7)) * (rng.random((200, 7)) < .6) + 1e-12 * (np.arange(7) == 0)
    w[:, 1] += 1e-3
    for e in (.1, .7, .99):
        low, high = x.min(1), x.max(1)
        for _ in range(80):
            m = (low + high) / 2
            slope = (w * np.where(x < m[:, None], 1 - e, e) * (x - m[:, None])).sum(1)
            low, high = np.where(slope > 0, m, low), np.where(slope > 0, high, m)
        assert np.abs(expectiles(x, w, e) - low).max() < 1e-9


def two_doors():
    """State 0: left pays 1 and ends; right goes to state 1, whose only good action pays 3 and ends, its bad one pays 0 and ends. States 2 to 4: ends."""
    transition = np.zeros((5, 2, 5))
    transition[0, 0, 2] = transition[0, 1, 1] = transition[1, 0, 3] = transition[1, 1, 4] = 1
    transition[2:, :, 2:] = np.eye(3)[:, None]
    return Tabular(transition, np.array([0, 0, 1.0, 3.0, 0]), np.arange(5) >= 2, np.eye(5)[0], np.array([[.5, .5], [.25, .75], [1, 0], [1, 0], [1, 0]]))


def test_solvers_by_hand():
    mdp = two_doors()
    assert np.allclose(value_iteration(mdp, .9), [2.7, 3, 0, 0, 0])
    assert np.allclose(policy_values(mdp, mdp.behavior, .9), [.5 + .5 * .9 * .75, .75, 0, 0, 0])
    left_only = np.array([[True, False], [False, True], *[[True, True]] * 3])
    assert np.allclose(value_iteration(mdp, .9, left_only), [1, 0, 0, 0, 0])
    assert greedy(backup(mdp, value_iteration(mdp, .9), .9), np.ones((5, 2), bool))[:2].tolist() == [[0, 1], [1, 0]]
    # expectile .7 of {3 w.p. .25, 0 w.p. .75} is 3 * .4375; then of {1, .9 * 1.3125} in equal parts: the larger has weight .7, the smaller .3
    v1 = 3 * .4375
    assert np.allclose(expectile_values(mdp, mdp.behavior, .9, .7)[:2], [.7 * .9 * v1 + .3 * 1, v1])
    with pytest.raises(ValueError, match="gamma 1.0: the policy never ends"):
        policy_values(mdp._replace(transition=np.broadcast_to(np.eye(5)[:, None], (5, 2, 5))), mdp.behavior, 1.0)
    with pytest.raises(ValueError, match="still move after 50 sweeps"):
        value_iteration(mdp._replace(transition=np.broadcast_to(np.eye(5)[:, None], (5, 2, 5)), reward=np.ones(5)), 1.0, most=50)


def test_the_expectile_goes_from_policy_evaluation_to_value_iteration_in_the_support():
    """On a random world whose log leaves actions out: e = .5 is the value of the log's policy, e -> 1 the best value within what it takes; V rises with e."""
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(12, .3), (12, 4))
    behavior = rng.dirichlet(np.ones(4), 12) * (rng.random((12, 4)) < .7)
    behavior[behavior.sum(1) == 0, 0] = 1
    mdp = Tabular(transition, rng.normal(size=12), np.arange(12) == 11, np.full(12, 1 / 12), behavior / behavior.sum(1, keepdims=True))
    values = {e: expectile_values(mdp, mdp.behavior, .9, e) for e in (.5, .7, .9, .99, 1 - 1e-7)}
    assert np.abs(values[.5] - policy_values(mdp, mdp.behavior, .9)).max() < 1e-8
    best = value_iteration(mdp, .9, mdp.behavior > 0)
    assert np.abs(values[1 - 1e-7] - best).max() < 1e-4 and (best < value_iteration(mdp, .9) - 1e-3).any()
    steps = list(values.values())
    assert all((b >= a - 1e-9).all() for a, b in zip(steps, steps[1:]))


def test_the_log_is_of_the_world_and_empirical_counts_it():
    mdp = two_doors()
    data = tabular_transitions(mdp, 0, 4000, "doors")
    seen, counts = empirical(data)
    assert counts[0].sum() == 4000 and counts[1].sum() == counts[0, 1] and counts[2:].sum() == 0
    assert abs(seen.behavior[0, 0] - .5) < .03 and abs(seen.behavior[1, 0] - .25) < .03 and seen.initial[0] == 1
    assert np.allclose(seen.transition[:2], mdp.transition[:2]) and np.allclose(seen.transition.sum(-1), 1)
    assert data.terminal.sum() == 4000 and abs(data.returns.mean() - policy_values(mdp, mdp.behavior, 1.0)[0]) < .06
    cut = tabular_transitions(walk_graph(), 0, 200, "walks", 9)
    lengths = np.bincount(cut.episode)
    assert lengths.max() == 9 and (lengths[np.unique(cut.episode[cut.terminal > 0])] <= 9).all() and cut.terminal.sum() < 200       # cut off is no end


def test_draws_follow_their_distributions():
    rng = np.random.default_rng(0)
    p = np.array([[0, .2, 0, .8, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    found = offline.draw(p.cumsum(1), np.repeat(np.arange(3), 20_000), rng).reshape(3, -1)
    assert abs((found[0] == 1).mean() - .2) < .012 and set(found[0]) == {1, 3} and set(found[1]) == {0} and set(found[2]) == {4}


# -----------------------------------------------------------------------------
# Walks and sepsis


def test_walks_by_hand():
    edges = np.zeros((4, 4), bool)
    edges[1, 0] = edges[2, 1] = edges[3, 2] = edges[3, 3 - 1] = edges[2, 3] = True         # 3 -> 2 -> 1 -> 0, and 2 -> 3
    behavior = edges / np.maximum(edges.sum(1, keepdims=True), 1)
    transition = np.where(edges[:, :, None], np.eye(4)[None], np.eye(4)[:, None])
    mdp = Tabular(transition, np.full(4, -1.0), np.arange(4) == 0, np.array([0, 1, 1, 1]) / 3, behavior)
    assert offline.shortest(mdp).tolist() == [1, 2, 3, 4]
    assert offline.walk_optimality(mdp, np.array([0, 0, 1, 2])) == 1
    assert offline.walk_optimality(mdp, np.array([0, 0, 3, 2])) == pytest.approx(1 / 3)    # 2 and 3 go round
    assert offline.walk_optimality(mdp, np.array([0, 3, 1, 2])) == 0                       # there is no edge 1 -> 3
    assert offline.optimality(mdp, np.array([3]), np.array([6])) == pytest.approx(4 / 6)
    apart = mdp._replace(behavior=np.where(np.arange(4)[:, None] == 1, 0, behavior))       # 1 leads nowhere: all starts are left out
    assert len(offline.optimality(apart, np.array([1, 2, 3]), np.array([10, 10, 10]))) == 0


def test_walks():
    data = open_data("walks", 0)
    mdp = data.mdp
    assert data.num_states == data.num_actions == 21 and mdp.behavior[0].sum() == pytest.approx(1) and data.terminal[data.next_obs == 0].all()
    assert .77 < offline.logged_optimality(data) < .83                        # .798 measured
    best = backup(mdp, value_iteration(mdp, .99, mdp.behavior > 0), .99)
    assert offline.walk_optimality(mdp, np.where(mdp.behavior > 0, best, -np.inf).argmax(1)) == 1
    # from the log alone: cloning its mode falls short, the greedy policy of the expectile's fixed point does not
    seen, counts = empirical(data)
    assert offline.walk_optimality(mdp, counts.argmax(1)) < .95
    for e, least in ((.5, .93), (.7, .98), (.9, .98)):                        # .952 (one step of improvement of the walk), 1 and 1 measured
        q = backup(seen, expectile_values(seen, counts, .99, e), .99)
        assert offline.walk_optimality(mdp, np.where(counts > 0, q, -np.inf).argmax(1)) >= least


def test_sepsis_has_the_shape_and_its_values_are_in_order():
    mdp = sepsis()
    assert mdp.transition.shape == (716, 25, 716) and np.allclose(mdp.transition.sum(-1), 1) and np.allclose(mdp.behavior.sum(1), 1)
    assert mdp.terminal.sum() == 3 and mdp.reward.sum() == 1 and mdp.initial[mdp.terminal].sum() == 0 and (mdp.behavior == 0).any()
    value = lambda policy: mdp.initial @ policy_values(mdp, policy, 1.0)
    random, behavior = value(np.full((716, 25), 1 / 25)), value(mdp.behavior)
    small = sepsis(1, 60)                                                     # the full size takes a second here, and says the same
    best = small.initial @ value_iteration(small, 1.0, tolerance=1e-8)
    assert .6 < random < behavior < .85 and small.initial @ policy_values(small, small.behavior, 1.0) + .1 < best < 1
    in_support = small.initial @ value_iteration(small, 1.0, small.behavior > 0, tolerance=1e-8)
    upper = [small.initial @ expectile_values(small, small.behavior, 1.0, e, tolerance=1e-8) for e in (.5, .9, .99)]
    assert abs(upper[0] - small.initial @ policy_values(small, small.behavior, 1.0)) < 1e-6 and upper[0] < upper[1] < upper[2] < in_support <= best


def test_luck_is_taken_for_value():
    """Exact fixed points of the log alone: with few samples a higher expectile promises more at the start, and the policy is not worth it."""
    mdp = sepsis(0, 120)
    gaps = []
    for e in (.5, .9, .99):
        seen, counts = empirical(tabular_transitions(mdp, 0, 600, "sepsis"))
        values = expectile_values(seen, counts, 1.0, e, tolerance=1e-8)
        policy = greedy(backup(seen, values, 1.0), counts > 0)
        gaps.append(mdp.initial @ values - mdp.initial @ policy_values(mdp, policy, 1.0))
    assert gaps[0] < gaps[1] < gaps[2] and gaps[2] > .1


@staged
def test_the_public_tables_give_the_published_numbers():
    """Random .78, clinicians .78, optimum .88 (arXiv 2406.05646); greedy on the expectile's Q at .9 comes near."""
    mdp = offline.icu_sepsis()
    value = lambda policy: mdp.initial @ policy_values(mdp, policy, 1.0)
    assert value(np.full((716, 25), 1 / 25)) == pytest.approx(.7801, abs=1e-3) and value(mdp.behavior) == pytest.approx(.7818, abs=1e-3)
    assert mdp.initial @ value_iteration(mdp, 1.0, tolerance=1e-5) == pytest.approx(.8751, abs=1e-3)
    v = expectile_values(mdp, mdp.behavior, 1.0, .9, tolerance=1e-5)
    assert mdp.initial @ v == pytest.approx(.832, abs=1e-3)
    assert value(greedy(backup(mdp, v, 1.0), np.ones((716, 25), bool))) == pytest.approx(.871, abs=1e-3)


def test_missing_and_damaged_tables_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="transitionFunction.csv.*--data=sepsis makes"):
        offline.icu_sepsis()
    (tmp_path / "icu_sepsis").mkdir()
    (tmp_path / "icu_sepsis/transitionFunction.csv").write_text("0.5,0.5\n")
    with pytest.raises(ValueError, match="transitionFunction.csv: expected 12,816,400 finite numbers, found 2"):
        offline.icu_sepsis()
    (tmp_path / "icu_sepsis/transitionFunction.csv").unlink()
    (tmp_path / "icu_sepsis/transitionFunction.csv.gz").write_bytes(gzip.compress(b"0.5,0.5\n" * 100)[:-10])
    with pytest.raises(ValueError, match="transitionFunction.csv.gz: cannot be read"):
        offline.icu_sepsis()


# -----------------------------------------------------------------------------
# Files in the layout of D4RL: three episodes of 3, 2 and 2 steps; the first ends, the second is cut off, the last is not finished


def arrays(**changes):
    obs = np.arange(14, dtype=np.float64).reshape(7, 2)
    return dict(observations=obs, actions=np.linspace(-1, 1, 7)[:, None], rewards=np.array([1, 2, 3, 4, 5, 6, 7.0]),
                terminals=np.array([0, 0, 1, 0, 0, 0, 0], bool), timeouts=np.array([0, 0, 0, 0, 1, 0, 0], bool)) | changes


def saved(tmp_path, name="log.npz", **changes):
    np.savez(tmp_path / name, **{k: v for k, v in arrays(**changes).items() if v is not None})
    return tmp_path / name


def test_next_observations_by_shift(tmp_path):
    """The step at the timeout and the last row have no next observation; the terminal step keeps its place and is never bootstrapped."""
    data = load(saved(tmp_path))
    assert data.rewards.tolist() == [1, 2, 3, 4, 6] and data.terminal.tolist() == [0, 0, 1, 0, 0] and data.episode.tolist() == [0, 0, 0, 1, 2]
    assert data.obs[:, 0].tolist() == [0, 2, 4, 6, 10] and data.next_obs[[0, 1, 3, 4], 0].tolist() == [2, 4, 8, 12]
    assert data.returns.tolist() == [6, 9] and (data.num_states, data.num_actions) == (0, 0)
    assert all(x.dtype == np.float32 for x in (data.obs, data.actions, data.rewards, data.next_obs, data.terminal))
    assert "2 steps without a next observation dropped" in data.report[0]


def test_next_observations_that_are_there(tmp_path):
    after = arrays()["observations"] + 100
    data = load(saved(tmp_path, next_observations=after))
    assert len(data.obs) == 7 and (data.next_obs == after).all() and data.terminal.tolist() == [0, 0, 1, 0, 0, 0, 0]       # cut off: goes on in value
    data = load(saved(tmp_path, next_observations=after, timeouts=None, actions=np.array([0, 1, 2, 1, 0, 2, 2])))
    assert data.num_actions == 3 and data.actions.dtype == np.int64 and data.episode.tolist() == [0] * 3 + [1] * 4
    both = load(saved(tmp_path, timeouts=np.array([0, 0, 1, 0, 1, 0, 0], bool)))
    assert both.rewards.tolist() == [1, 2, 3, 4, 6]                           # ended and timed out at once: ended


def test_rewards(tmp_path):
    path = saved(tmp_path)
    assert load(path, "antmaze").rewards.tolist() == [0, 1, 2, 3, 5]
    scaled = load(path, "locomotion")                                         # returns 6 and 9 of the finished episodes: times 1000 / 3
    assert np.allclose(scaled.rewards, np.array([1, 2, 3, 4, 6]) * 1000 / 3) and scaled.returns.tolist() == [6, 9]
    with pytest.raises(ValueError, match="log.npz: --reward=locomotion divides by the gap .* 0 over 2 episodes"):
        load(saved(tmp_path, rewards=np.array([1, 1, 4, 3, 3, 0, 0.0])), "locomotion")


def test_csv_equals_npz(tmp_path):
    x = arrays()
    rows = [["obs0", "obs1", "action0", "reward", "terminal", "timeout"]]
    rows += [[*map(repr, map(float, (*x["observations"][i], *x["actions"][i], x["rewards"][i]))), str(int(x["terminals"][i])), str(int(x["timeouts"][i]))]
             for i in range(7)]
    text = "\n".join(",".join(row) for row in rows) + "\n"
    (tmp_path / "log.csv").write_text(text)
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text.encode()))
    want = load(saved(tmp_path))
    for name in ("log.csv", "log.csv.gz"):
        found = load(tmp_path / name)
        assert all((a == b).all() for a, b in zip(want[:6], found[:6]))
    (tmp_path / "numbers.csv").write_text("obs0,action,reward,terminal,next_obs0\n0,1,0,0,1\n1,0,1,1,0\n")
    found = load(tmp_path / "numbers.csv")
    assert found.actions.tolist() == [1, 0] and found.num_actions == 2 and found.next_obs.tolist() == [[1], [0]]


def test_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "log.hdf5", "w") as f:
        for name, x in arrays().items():
            f[name] = x
    assert all((a == b).all() for a, b in zip(load(saved(tmp_path))[:6], load(tmp_path / "log.hdf5")[:6]))
    whole = (tmp_path / "log.hdf5").read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="cut.hdf5: cannot be read as .hdf5"):
        load(tmp_path / "cut.hdf5")


def test_without_h5py_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "log.hdf5").write_bytes(b"")
    with pytest.raises(ValueError, match="need h5py, which is not installed"):
        load(tmp_path / "log.hdf5")


nan = float("nan")


@pytest.mark.parametrize("changes, message", [
    (dict(rewards=None, terminals=None), "rewards, terminals missing; found actions, observations, timeouts"),
    (dict(timeouts=None), "neither timeouts nor next_observations"),
    (dict(rewards=np.ones(6)), r"of one N, found \[7, 2\], \[7, 1\] and \[6\]"),
    (dict(actions=np.zeros((6, 1))), r"found \[7, 2\], \[6, 1\] and \[7\]"),
    (dict(observations=np.zeros(7)), r"expected observations \(N, D\).*found \[7\]"),
    (dict(observations=np.zeros((0, 2))), "observations is empty"),
    (dict(terminals=np.zeros(5)), r"terminals must be 7 values that are 0 or 1, found shape \[5\]"),
    (dict(terminals=np.full(7, .5)), "terminals must be 7 values that are 0 or 1"),
    (dict(timeouts=np.full(7, nan)), "timeouts must be 7 values that are 0 or 1"),
    (dict(rewards=np.array([1, nan, 3, 4, 5, math.inf, 7])), "rewards is not finite in 2 rows, the first is row 1"),
    (dict(observations=np.where(np.arange(14).reshape(7, 2) == 5, nan, 1)), "observations is not finite in 1 rows, the first is row 2"),
    (dict(actions=np.full((7, 1), 1.5)), "actions reach 1.5, expected at most 1"),
    (dict(actions=np.linspace(0, 1, 7)), r"actions \(N,\) must be whole numbers, found float64"),
    (dict(actions=np.array([0, 1, -1, 0, 1, 0, 1])), "numbered from 0, found -1"),
    (dict(next_observations=np.zeros((7, 3))), r"next_observations has shape \[7, 3\], expected \[7, 2\]"),
    (dict(observations=np.array([["a", "b"]] * 7)), "observations holds <U1, expected numbers"),
    (dict(timeouts=np.ones(7, bool), terminals=np.zeros(7, bool)), "no step has a next observation"),
])
def test_wrong_files_are_named_with_what_is_wrong(tmp_path, changes, message):
    with pytest.raises(ValueError, match="log.npz: .*" + message):
        load(saved(tmp_path, **changes))


def test_truncated_foreign_and_object_files(tmp_path):
    whole = saved(tmp_path).read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.npz: cannot be read as .npz"):
            load(tmp_path / "cut.npz")
    np.savez(tmp_path / "objects.npz", **arrays(observations=np.array([{}] * 7, object)))
    with pytest.raises(ValueError, match="objects.npz: cannot be read as .npz"):
        load(tmp_path / "objects.npz")
    with open(tmp_path / "one.npz", "wb") as f:
        np.save(f, np.zeros(3))
    with pytest.raises(ValueError, match="one.npz: holds one array"):
        load(tmp_path / "one.npz")
    with pytest.raises(FileNotFoundError, match="--data=.*gone.npz: there is no such file"):
        load(tmp_path / "gone.npz")
    with pytest.raises(ValueError, match="--data=cartpol: expected cartpole, walks"):
        open_data("cartpol", 0)


@pytest.mark.parametrize("text, message", [
    ("", "observations, actions, rewards, terminals missing"),
    ("obs0,action,reward\n0,1,0\n", "terminals missing"),
    ("obs0,action,reward,terminal,timeout\n0,1,0,0\n", "line 2: 4 fields, expected 5"),
    ("obs0,action,reward,terminal,timeout\n0,1,0,0,0\n0,x,0,0,0\n", "line 3: expected numbers"),
    ("obs0,action,reward,terminal,timeout\n0,1.5,0,0,0\n", "action must hold whole numbers"),
    ("obs0,obs2,action,reward,terminal,timeout\n0,0,1,0,0,0\n", r"columns obs0, obs1, .. have a gap: \['obs0', 'obs2'\]"),
    ("obs0,obs0,action,reward,terminal,timeout\n0,0,1,0,0,0\n", "names a column twice"),
    ("obs0,action,reward,terminal,timeout,done\n0,1,0,0,0,1\n", "unknown columns done"),
    ("obs0,action,reward,terminal,timeout\n0,1,nan,1,0\n", "rewards is not finite in 1 rows"),
    ("obs0,action,reward,terminal,timeout\n", "observations is empty"),
])
def test_wrong_csv_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ValueError, match="log.csv: .*" + message):
        load(tmp_path / "log.csv")


def test_settings_that_cannot_be_meant():
    with pytest.raises(ValueError, match="--num_episodes=1: expected at least 2"):
        open_data("cartpole", 0, 1)
    with pytest.raises(ValueError, match="--reward=antmaze: of files only"):
        open_data("walks", 0, reward="antmaze")
    with pytest.raises(ValueError, match="--num_episodes=5: only generated data"):
        open_data(str(Path("x.npz")), 0, 5)


def test_data_is_a_function_of_the_seed():
    for name, num in (("cartpole", 20), ("walks", 20)):
        a, b, c = (open_data(name, seed, num) for seed in (0, 0, 1))
        assert all((x == y).all() for x, y in zip(a[:6], b[:6])) and not (len(a.obs) == len(c.obs) and (a.obs == c.obs).all())
    assert log_tabular(two_doors(), 0, 3)[0].tolist() == log_tabular(two_doors(), 0, 3)[0].tolist()
