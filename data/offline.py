"""Offline data for implicit Q-learning whose answers are known: CartPole, tabular worlds with exact solvers, random walks, and files in the layout of D4RL.

    cartpole      the classic cart and pole, 500 steps at most, logged by uniformly random actions
    walks         shortest paths on a random graph of 21 nodes from 1,000 random walks (the task of trlX's tests), optimum 1
    sepsis        716 states, 25 actions, death or survival, +1 for survival, from a seed: the shape of ICU-Sepsis (arXiv 2406.05646)
    icu_sepsis    the public tables of that benchmark, in $TEMPER_DATA/icu_sepsis
    FILE          .npz, .hdf5 (with h5py) or .csv: data/README.md has the layout

Tabular policies are valued by a linear solve, not by playing. One step of data is (state, action, reward, next state, terminal): `terminal` says that
nothing follows, and only it stops the bootstrap; an episode that was cut off by a time limit goes on in value.
"""
import csv
import gzip
import math
import os
import zipfile
import zlib
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Transitions(NamedTuple):
    """N steps, in the order of episodes. States are vectors, or numbers below num_states; actions are vectors, or numbers below num_actions."""
    obs: np.ndarray             # (N, D) float32, or (N,) int64
    actions: np.ndarray         # (N, A) float32, or (N,) int64
    rewards: np.ndarray         # (N,) float32
    next_obs: np.ndarray        # as obs
    terminal: np.ndarray        # (N,) float32: 1 where the episode ended for good, 0 where it goes on or was cut off
    episode: np.ndarray         # (N,) int64, ascending
    num_states: int             # 0: vectors
    num_actions: int            # 0: vectors
    returns: np.ndarray         # (E,) float64: sums of raw rewards over the finished episodes
    mdp: object                 # the Tabular that the data came from, or None
    report: list                # lines to print


class Tabular(NamedTuple):
    """A world of S states and A actions. An episode ends on entering a terminal state; rewards are paid for the state that is entered."""
    transition: np.ndarray      # (S, A, S) float64, rows sum to 1
    reward: np.ndarray          # (S,) float64, of the state entered
    terminal: np.ndarray        # (S,) bool
    initial: np.ndarray         # (S,) float64, sums to 1
    behavior: np.ndarray        # (S, A) float64: the policy of the log; an action that is not allowed has 0


# -----------------------------------------------------------------------------
# CartPole: gravity 9.8, cart 1 kg, pole .1 kg and half-length .5 m, force 10 N, steps of .02 s (Barto, Sutton and Anderson, 1983)

LIMIT, MAX_X, MAX_ANGLE = 500, 2.4, 12 * 2 * math.pi / 360


def cartpole_start(rng, num):
    """-> (num, 4) float64: x, its speed, angle, its speed, each uniform in (-.05, .05)."""
    return rng.uniform(-0.05, 0.05, (num, 4))


def cartpole_step(state, action):
    """state (n, 4) float64, action (n,) 0 left or 1 right -> (next state (n, 4), fallen (n,) bool). The reward of every step is 1."""
    x, speed, angle, turning = state.T
    force = np.where(action == 1, 10.0, -10.0)
    sin, cos = np.sin(angle), np.cos(angle)
    push = (force + 0.05 * turning ** 2 * sin) / 1.1                          # .05: mass of the pole times its half-length; 1.1: both masses
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos ** 2 / 1.1))
    shift = push - 0.05 * turn * cos / 1.1
    state = np.stack([x + 0.02 * speed, speed + 0.02 * shift, angle + 0.02 * turning, turning + 0.02 * turn], 1)
    return state, (np.abs(state[:, 0]) > MAX_X) | (np.abs(state[:, 2]) > MAX_ANGLE)


def cartpole_play(act, seed, num):
    """num episodes side by side -> (returns (num,) = steps survived, log of (obs, actions, next_obs, fallen, episode) per step).

    act(obs (n, 4) float32, rng) -> (n,) 0 or 1, of the episodes that still run.
    """
    rng = np.random.default_rng([seed, 7])
    state, alive, returns, log = cartpole_start(rng, num), np.arange(num), np.zeros(num), []
    for _ in range(LIMIT):
        obs = state.astype(np.float32)
        actions = act(obs, rng)
        state, fallen = cartpole_step(state, actions)
        log.append((obs, actions, state.astype(np.float32), fallen, alive))
        returns[alive] += 1
        state, alive = state[~fallen], alive[~fallen]
        if not len(alive):
            break
    return returns, log


def cartpole(seed=0, num_episodes=1500):
    """-> Transitions of uniformly random actions: about 22 steps an episode."""
    returns, log = cartpole_play(lambda obs, rng: rng.integers(0, 2, len(obs)), seed, num_episodes)
    obs, actions, next_obs, fallen, episode = (np.concatenate(part) for part in zip(*log))
    order = np.argsort(episode, kind="stable")
    obs, actions, next_obs, fallen, episode = (x[order] for x in (obs, actions, next_obs, fallen, episode))
    report = [f"CartPole, uniformly random actions, seed {seed}: {num_episodes:,} episodes, {len(obs):,} steps, mean return {returns.mean():.1f}"]
    return Transitions(obs, actions, np.ones(len(obs), np.float32), next_obs, fallen.astype(np.float32), episode, 0, 2, returns, None, report)


# -----------------------------------------------------------------------------
# Exact answers in a Tabular


def backup(mdp, values, gamma):
    """-> (S, A): E[r + gamma V(s') unless s' is terminal]; values (S,)."""
    return mdp.transition @ (mdp.reward + gamma * np.where(mdp.terminal, 0.0, values))


def policy_values(mdp, policy, gamma):
    """-> (S,): the value of policy (S, A) from every state, 0 in terminal ones, by one linear solve.

    ValueError: with gamma 1, a state from which the policy never ends has no value.
    """
    open_states = ~mdp.terminal
    move = np.einsum("sa,sat->st", policy[open_states], mdp.transition[open_states])
    values = np.zeros(len(mdp.reward))
    try:
        values[open_states] = np.linalg.solve(np.eye(len(move)) - gamma * move[:, open_states], move @ mdp.reward)
    except np.linalg.LinAlgError:
        raise ValueError(f"gamma {gamma}: the policy never ends from some state, so it has no value there; expected gamma below 1") from None
    return values


def iterate(mdp, gamma, choose, tolerance, most):
    """V <- choose(backup(V)) until nothing moves by more than tolerance."""
    values = np.zeros(len(mdp.reward))
    for _ in range(most):
        new = np.where(mdp.terminal, 0.0, choose(backup(mdp, values, gamma)))
        if np.abs(new - values).max() <= tolerance:
            return new
        values = new
    raise ValueError(f"gamma {gamma}: values still move after {most:,} sweeps; expected gamma below 1, or a world that ends")


def value_iteration(mdp, gamma, support=None, tolerance=1e-10, most=100_000):
    """-> (S,): the best value over actions in support (S, A) bool (default: all); 0 where a state has none."""
    support = np.ones(mdp.behavior.shape, bool) if support is None else support
    best = lambda q: np.where(support.any(1), np.where(support, q, -np.inf).max(1), 0.0)
    return iterate(mdp, gamma, best, tolerance, most)


def greedy(q, support):
    """q, support (S, A) -> (S, A) float64 deterministic policy: the first best action of the support; the first of all where it is empty."""
    return np.eye(q.shape[1])[np.where(support, q, -np.inf).argmax(1)]


def expectiles(values, weights, expectile):
    """The m with sum_i w_i |e - 1[x_i < m]| (x_i - m) = 0 along the last axis, exactly: the condition is piecewise linear, its root lies between two of
    the x. values, weights (.., A) with weights >= 0 -> (..,); 0 where all weights are 0 (arXiv 2110.06169, section 4.1)."""
    order = np.argsort(np.where(weights > 0, values, np.inf), -1, kind="stable")
    x, w = np.take_along_axis(values, order, -1), np.take_along_axis(weights, order, -1)
    below, below_x = w.cumsum(-1), (w * x).cumsum(-1)
    low, high = 1 - expectile, expectile
    total, total_x = below[..., -1:], below_x[..., -1:]
    mass = low * below + high * (total - below)
    # the root if exactly the first k values lie below it; the right k is the one whose root is at most x_{k+1}
    root = (low * below_x + high * (total_x - below_x)) / np.where(mass > 0, mass, 1)
    following = np.concatenate([np.where(w > 0, x, np.inf)[..., 1:], np.full_like(x[..., :1], np.inf)], -1)
    place = (root <= following).argmax(-1)[..., None]
    return np.where(total[..., 0] > 0, np.take_along_axis(root, place, -1)[..., 0], 0.0)


def expectile_values(mdp, weights, gamma, expectile, tolerance=1e-10, most=100_000):
    """-> (S,): the fixed point V(s) = expectile over actions, weighted by weights (S, A), of E[r + gamma V(s')]: what IQL converges to.

    expectile .5 is the value of the policy `weights`; towards 1 it is value iteration in its support.
    """
    return iterate(mdp, gamma, lambda q: expectiles(q, weights, expectile), tolerance, most)


def draw(cdf, rows, rng):
    """One number from each of the distributions cdf[rows]: cdf (R, S) running sums, rows (n,) -> (n,). By halving, side by side; never an entry of
    probability 0."""
    u = rng.random(len(rows)) * cdf[rows, -1]
    low, high = np.zeros(len(rows), np.int64), np.full(len(rows), cdf.shape[1] - 1)
    while (low < high).any():
        middle = (low + high) // 2
        above = cdf[rows, middle] > u                                         # the answer is the first entry whose running sum is above u
        low, high = np.where(above, low, middle + 1), np.where(above, middle, high)
    return low


def log_tabular(mdp, seed, num_episodes, most=200):
    """Episodes of mdp.behavior -> the arrays (states, actions, next states, terminal, episode). most: steps after which an episode is cut off."""
    rng, (S, A) = np.random.default_rng([seed, 8]), mdp.behavior.shape
    chooses, moves = mdp.behavior.cumsum(1), mdp.transition.cumsum(-1).reshape(S * A, S)
    state, alive, steps = draw(mdp.initial.cumsum()[None], np.zeros(num_episodes, np.int64), rng), np.arange(num_episodes), []
    for _ in range(most):
        action = draw(chooses, state, rng)
        after = draw(moves, state * A + action, rng)
        ended = mdp.terminal[after]
        steps.append((state, action, after, ended, alive))
        state, alive = after[~ended], alive[~ended]
        if not len(alive):
            break
    parts = [np.concatenate(part) for part in zip(*steps)]
    order = np.argsort(parts[4], kind="stable")
    return [part[order] for part in parts]


def tabular_transitions(mdp, seed, num_episodes, label, most=200):
    """-> Transitions logged in mdp by its behavior."""
    states, actions, after, ended, episode = log_tabular(mdp, seed, num_episodes, most)
    rewards = mdp.reward[after]
    returns = np.bincount(episode, rewards, minlength=num_episodes)
    report = [f"{label}, seed {seed}: {num_episodes:,} episodes, {len(states):,} steps, mean return {returns.mean():.4f}"]
    return Transitions(states, actions, rewards.astype(np.float32), after, ended.astype(np.float32), episode, len(mdp.reward), mdp.behavior.shape[1], returns,
                       mdp, report)


def empirical(data):
    """What the log says of its world: Transitions of numbered states -> (Tabular of observed frequencies, counts (S, A)).

    Its behavior is the observed one. An action never taken leads back to its state: no fixed point gives it weight.
    """
    S, A = data.num_states, data.num_actions
    counts = np.zeros((S, A, S))
    np.add.at(counts, (data.obs, data.actions, data.next_obs), 1)
    taken, visits = counts.sum(-1), counts.sum((1, 2))
    stay = np.broadcast_to(np.eye(S)[:, None], counts.shape)
    transition = np.where(taken[..., None] > 0, counts / np.maximum(taken, 1)[..., None], stay)
    behavior = np.where(visits[:, None] > 0, taken / np.maximum(visits, 1)[:, None], 1 / A)
    first = np.append(True, data.episode[1:] != data.episode[:-1])
    initial = np.bincount(data.obs[first], minlength=S) / first.sum()
    return Tabular(transition, data.mdp.reward, data.mdp.terminal, initial, behavior), taken


# -----------------------------------------------------------------------------
# Random walks: shortest paths from walks that know nothing of them

NUM_NODES, WALK, GRAPH_SEED = 21, 10, 1002                                    # WALK: nodes of a walk at most


def walk_graph(num_nodes=NUM_NODES, edge=0.1, seed=GRAPH_SEED):
    """-> Tabular: nodes are states, action b moves to node b where there is an edge, node 0 is the goal, every move pays -1, walks start anywhere else.

    A directed graph without loops in which every node has a way out. Where there is no edge an action stays; the log never takes it.
    """
    rng = np.random.RandomState(seed)                                         # the old generator: with seed 1002 the graph is that of trlX's task
    edges = np.zeros((num_nodes, num_nodes), bool)
    while not edges.any(1).all():
        edges = rng.rand(num_nodes, num_nodes) > 1 - edge
        np.fill_diagonal(edges, False)
    edges[0] = False
    transition = np.where(edges[:, :, None], np.eye(num_nodes)[None], np.eye(num_nodes)[:, None])
    terminal = np.arange(num_nodes) == 0
    behavior = np.where(terminal[:, None], 1 / num_nodes, edges / np.maximum(edges.sum(1, keepdims=True), 1))
    return Tabular(transition, np.full(num_nodes, -1.0), terminal, ~terminal / (num_nodes - 1), behavior)


def shortest(mdp):
    """-> (S,) nodes on the shortest way to node 0, both ends counted; WALK where it is longer or there is none."""
    length, queue = np.full(len(mdp.reward), WALK), deque([0])
    length[0] = 1
    while queue:
        node = queue.popleft()
        for before in np.flatnonzero(mdp.behavior[:, node] > 0):
            if before != 0 and length[before] > length[node] + 1:
                length[before] = length[node] + 1
                queue.append(before)
    return length


def optimality(mdp, start, length):
    """(WALK - length) / (WALK - shortest) of walks from nodes `start` with `length` nodes, WALK for those that did not arrive; starts whose shortest way has
    WALK nodes or more are left out, being 0 / 0. -> 1-D float64: 1 is the best, 0 did not arrive."""
    best = shortest(mdp)[start]
    return ((WALK - length) / np.maximum(WALK - best, 1))[best < WALK]


def walk_optimality(mdp, action):
    """Mean optimality over all starts of walks that follow action (S,); a move along no edge ends a walk."""
    start = np.flatnonzero(mdp.initial)
    node, length = start.copy(), np.full(len(start), WALK)
    for moves in range(1, WALK):
        going = node > 0
        legal = mdp.behavior[node, action[node]] > 0
        node = np.where(going & legal, action[node], np.where(going, -1, node))            # -1: stopped
        length[going & (node == 0)] = moves + 1
    return float(optimality(mdp, start, length).mean())


def logged_optimality(data):
    """Mean optimality of the walks in Transitions."""
    first = np.flatnonzero(np.append(True, data.episode[1:] != data.episode[:-1]))
    moves = np.diff(np.append(first, len(data.obs)))
    arrived = data.terminal[first + moves - 1] > 0
    return float(optimality(data.mdp, data.obs[first], np.where(arrived, moves + 1, WALK)).mean())


# -----------------------------------------------------------------------------
# Sepsis


def sepsis(seed=0, num_states=716, pool=60):
    """-> Tabular of the shape of ICU-Sepsis: patients, then death, survival and an absorbing end; 25 actions, two drugs at 5 doses each.

    A patient has a severity x in (0, 1) and a right dose of each drug, which rises with x and differs from state to state; the distance m of an action from
    it, 0 to 8, moves the severity by .03 m - .06. The next state is one of `pool` states of like severity. A stay ends with probability .1, in death with
    the probability sig(8 (x - 1) + .45 m), else in survival. The log's policy prefers small m, and does not take every action.
    """
    rng = np.random.default_rng([seed, 9])
    num = num_states - 3
    x = np.sort(rng.random(num))
    right = np.clip(np.rint(4 * x[:, None] + rng.normal(size=(num, 2))), 0, 4)
    doses = np.stack(np.divmod(np.arange(25), 5), 1)
    m = np.abs(right[:, None] - doses[None]).sum(-1)                          # (num, 25)
    aim = np.clip(x[:, None] + 0.03 * m - 0.06, 0, 1)
    reach = max(1, num // 5)                                                  # states are sorted by severity: near in number is near in severity
    near = np.clip(np.arange(num)[:, None] + rng.integers(-reach, reach + 1, (num, pool)), 0, num - 1)
    weight = np.exp(-(x[near][:, None] - aim[..., None]) ** 2 / (2 * 0.1 ** 2)) + 1e-6       # (num, 25, pool)
    weight /= weight.sum(-1, keepdims=True)
    death = 1 / (1 + np.exp(-(8 * (x[:, None] - 1) + 0.45 * m)))
    transition = np.zeros((num_states, 25, num_states))
    rows, columns = np.arange(num)[:, None, None], np.arange(25)[None, :, None]
    np.add.at(transition, (rows, columns, near[:, None]), 0.9 * weight)
    transition[:num, :, num], transition[:num, :, num + 1] = 0.1 * death, 0.1 * (1 - death)
    transition[num:, :, num + 2] = 1
    behavior = np.exp(-0.3 * m + rng.normal(size=m.shape))
    behavior /= behavior.sum(1, keepdims=True)
    behavior[behavior < 0.01] = 0                                             # the largest of 25 is at least .04
    behavior = np.concatenate([behavior / behavior.sum(1, keepdims=True), np.full((3, 25), 1 / 25)])
    patient = np.arange(num_states) < num
    return Tabular(transition, (np.arange(num_states) == num + 1).astype(float), ~patient, patient / num, behavior)


def icu_sepsis(folder=None):
    """-> Tabular of the public tables (arXiv 2406.05646, MIT licence). folder: default $TEMPER_DATA/icu_sepsis. ValueError names a file that is damaged."""
    folder = Path(folder or os.path.join(os.environ.get("TEMPER_DATA", ""), "icu_sepsis"))

    def table(name, shape):
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
        if path is None:
            raise FileNotFoundError(f"{folder / name}(.gz) is not there: --data=icu_sepsis reads the tables of the ICU-Sepsis benchmark from "
                                    "$TEMPER_DATA/icu_sepsis; --data=sepsis makes a world of that shape")
        try:
            found = np.loadtxt(path, delimiter=",")
        except (ValueError, OSError, EOFError, zlib.error) as e:
            raise ValueError(f"{path}: cannot be read as a table of numbers ({e})") from None
        if found.size != math.prod(shape) or not np.isfinite(found).all():
            raise ValueError(f"{path}: expected {math.prod(shape):,} finite numbers, found {found.size:,}, {int((~np.isfinite(found)).sum())} of them "
                             "not finite")
        return found.reshape(shape)

    transition, behavior = table("transitionFunction.csv", (716, 25, 716)), table("expertPolicy.csv", (716, 25))
    terminal = np.arange(716) >= 713                                          # death, survival, and where both lead
    for name, rows in (("transitionFunction.csv", transition), ("expertPolicy.csv", behavior[~terminal])):
        if rows.min() < 0 or np.abs(rows.sum(-1) - 1).max() > 1e-6:
            raise ValueError(f"{folder / name}: expected probabilities that sum to 1")
    return Tabular(transition / transition.sum(-1, keepdims=True), table("rewardFunction.csv", (716,)), terminal, table("initialStateDistribution.csv", (716,)),
                   np.where(terminal[:, None], 1 / 25, behavior))


# -----------------------------------------------------------------------------
# Files in the layout of D4RL

KEYS = ("observations", "actions", "rewards", "terminals")


def read_npz(path):
    try:
        f = np.load(path, allow_pickle=False)
        found = {name: f[name] for name in f.files} if isinstance(f, np.lib.npyio.NpzFile) else None
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path}: cannot be read as .npz ({e}): truncated, no .npz, or made of Python objects, which are not read") from None
    if found is None:
        raise ValueError(f"{path}: holds one array, expected an .npz with the arrays {', '.join(KEYS)}")
    return found


def read_hdf5(path):
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: .hdf5 files need h5py, which is not installed: pip install h5py, or turn the file into .npz") from None
    try:
        with h5py.File(path, "r") as f:
            return {name: f[name][()] for name in (*KEYS, "timeouts", "next_observations") if name in f}
    except (OSError, RuntimeError, TypeError) as e:
        raise ValueError(f"{path}: cannot be read as .hdf5 ({e}): truncated, or another format") from None


def read_csv(path):
    """Columns obs0, obs1, .., action (whole numbers) or action0, action1, .., reward, terminal, and if there timeout and next_obs0, .."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as f:
            lines = csv.reader(f)
            header, rows = [name.strip() for name in next(lines, [])], []
            for row in lines:
                if len(row) != len(header):
                    raise ValueError(f"line {lines.line_num}: {len(row)} fields, expected {len(header)} as in the header")
                try:
                    rows.append([float(x) for x in row])
                except ValueError:
                    raise ValueError(f"line {lines.line_num}: expected numbers, found {row!r}") from None
    except (ValueError, OSError, EOFError, zlib.error, csv.Error) as e:
        raise ValueError(f"{path}: {e}") from None
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: the header names a column twice: {header}")
    table = np.array(rows, np.float64).reshape(len(rows), len(header))
    column = dict(zip(header, table.T))

    def vector(name):
        names = [f"{name}{i}" for i in range(len(header)) if f"{name}{i}" in column]
        if names != [f"{name}{i}" for i in range(len(names))]:
            raise ValueError(f"{path}: columns {name}0, {name}1, .. have a gap: {names}")
        return np.stack([column[n] for n in names], 1) if names else None

    found = dict(observations=vector("obs"), actions=column.get("action", vector("action")), rewards=column.get("reward"), terminals=column.get("terminal"),
                 timeouts=column.get("timeout"), next_observations=vector("next_obs"))
    unknown = [name for name in header if name.rstrip("0123456789") not in ("obs", "next_obs", "action") and name not in ("reward", "terminal", "timeout")]
    if unknown:
        raise ValueError(f"{path}: unknown columns {', '.join(unknown)}; expected obs0.., action or action0.., reward, terminal, timeout, next_obs0..")
    if "action" in column:
        if (column["action"] != np.rint(column["action"])).any():
            raise ValueError(f"{path}: column action must hold whole numbers; a vector of one number is column action0")
        found["actions"] = column["action"].astype(np.int64)
    return {name: x for name, x in found.items() if x is not None}


def flags_of(path, name, x, length):
    """A column of 0 and 1 -> (N,) bool."""
    x = np.asarray(x).reshape(-1) if np.asarray(x).size == length else np.asarray(x)
    if x.shape != (length,) or not np.isin(x, (0, 1)).all():
        raise ValueError(f"{path}: {name} must be {length:,} values that are 0 or 1, found shape {list(x.shape)}")
    return x.astype(bool)


def load(path, reward="raw"):
    """-> Transitions of a .npz, .hdf5 or .csv(.gz) file.

    reward: raw, antmaze (minus 1) or locomotion (times 1000 / (best - worst return)). Where next_observations is missing, the next observation is the next
    row of the same episode; a step at a timeout then has none and is dropped, as is a last row that ends nothing. Only `terminals` stop the bootstrap: a step
    that is both ended and timed out has ended. ValueError names file and array.
    """
    path = Path(path)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    readers = dict(npz=read_npz, hdf5=read_hdf5, h5=read_hdf5, csv=read_csv)
    if kind not in readers:
        raise ValueError(f"--data={path}: expected cartpole, walks, sepsis, icu_sepsis, or a file that ends in .npz, .hdf5, .h5, .csv or .csv.gz")
    if not path.exists():
        raise FileNotFoundError(f"--data={path}: there is no such file")
    found = readers[kind](path)
    if gone := [key for key in KEYS if key not in found]:
        raise ValueError(f"{path}: {', '.join(gone)} missing; found {', '.join(sorted(found)) or 'nothing'}")
    if "timeouts" not in found and "next_observations" not in found:
        raise ValueError(f"{path}: neither timeouts nor next_observations: where episodes were cut off cannot be known")
    obs, actions, rewards = (np.asarray(found[key]) for key in KEYS[:3])
    num = len(obs) if obs.ndim else 0
    rewards = rewards.reshape(-1) if rewards.size == num else rewards                       # some files have (N, 1)
    if not num:
        raise ValueError(f"{path}: observations is empty")
    for name, x in (("observations", obs), ("actions", actions), ("rewards", rewards), ("next_observations", found.get("next_observations"))):
        if x is not None and np.asarray(x).dtype.kind not in "fiub":
            raise ValueError(f"{path}: {name} holds {np.asarray(x).dtype}, expected numbers")
    if obs.ndim != 2 or rewards.shape != (num,) or len(actions) != num or actions.ndim > 2:
        raise ValueError(f"{path}: expected observations (N, D), actions (N,) or (N, A) and rewards (N,) of one N, found {list(obs.shape)}, "
                         f"{list(actions.shape)} and {list(rewards.shape)}")
    terminal = flags_of(path, "terminals", found["terminals"], num)
    timeout = flags_of(path, "timeouts", found["timeouts"], num) if "timeouts" in found else np.zeros(num, bool)
    for name, x in (("observations", obs), ("actions", actions), ("rewards", rewards), ("next_observations", found.get("next_observations"))):
        if x is not None and not np.isfinite(x).all():
            rows = np.flatnonzero(~np.isfinite(np.asarray(x).reshape(num, -1)).all(1)) if len(x) == num else [0]
            raise ValueError(f"{path}: {name} is not finite in {len(rows):,} rows, the first is row {rows[0]}")
    if actions.ndim == 1:
        if actions.dtype.kind not in "iu":
            raise ValueError(f"{path}: actions (N,) must be whole numbers, found {actions.dtype}; vectors are (N, A)")
        if actions.min() < 0:
            raise ValueError(f"{path}: actions are numbered from 0, found {actions.min()}")
    elif np.abs(actions).max() > 1 + 1e-5:
        raise ValueError(f"{path}: actions reach {np.abs(actions).max():g}, expected at most 1 in each coordinate: the policy's mean is a tanh; "
                         "divide by the bound")

    ends = terminal | timeout
    episode = np.append(0, ends[:-1].cumsum())
    returns = np.bincount(episode, rewards.astype(np.float64))
    finished = returns[:-1] if not ends[-1] and len(returns) > 1 else returns
    if reward == "antmaze":
        rewards = rewards - 1.0
    if reward == "locomotion":
        spread = finished.max() - finished.min()
        if not spread > 0:
            raise ValueError(f"{path}: --reward=locomotion divides by the gap of the best and worst return, which is 0 over {len(finished)} episodes")
        rewards = rewards * (1000 / spread)
    if "next_observations" in found:
        after, keep = np.asarray(found["next_observations"]), np.ones(num, bool)
        if after.shape != obs.shape:
            raise ValueError(f"{path}: next_observations has shape {list(after.shape)}, expected {list(obs.shape)} as observations")
    else:
        after = np.where(terminal[:, None], obs, np.concatenate([obs[1:], obs[-1:]]))       # after a terminal nothing is read
        keep = terminal | ~timeout
        keep[-1] &= terminal[-1]
    if not keep.any():
        raise ValueError(f"{path}: no step has a next observation")
    float32 = lambda x: np.ascontiguousarray(x[keep], np.float32)
    discrete = actions.ndim == 1
    report = [f"{path.name}: {num:,} steps, {len(returns):,} episodes, {int(terminal.sum()):,} of them ended; {num - int(keep.sum()):,} steps without a next "
              f"observation dropped; mean return {finished.mean():.2f}, rewards {reward}, {rewards.min():.3g} to {rewards.max():.3g}"]
    return Transitions(float32(obs), actions[keep].astype(np.int64) if discrete else float32(actions), float32(rewards), float32(after), float32(terminal),
                       episode[keep], 0, int(actions.max()) + 1 if discrete else 0, finished, None, report)


def open_data(name, seed, num_episodes=-1, reward="raw"):
    """--data -> Transitions. num_episodes: of generated logs, -1 for the usual number. reward: see load; generated rewards are raw."""
    usual = dict(cartpole=1500, walks=1000, sepsis=20_000, icu_sepsis=20_000)
    if name not in usual:
        if num_episodes != -1:
            raise ValueError(f"--num_episodes={num_episodes}: only generated data has a number of episodes to choose, --data={name} is a file")
        return load(name, reward)
    if reward != "raw":
        raise ValueError(f"--reward={reward}: of files only; --data={name} has rewards of its own")
    num = usual[name] if num_episodes == -1 else num_episodes
    if num < 2:
        raise ValueError(f"--num_episodes={num}: expected at least 2")
    if name == "cartpole":
        return cartpole(seed, num)
    if name == "walks":
        data = tabular_transitions(walk_graph(), seed, num, f"walks on a graph of {NUM_NODES} nodes", WALK - 1)
        return data._replace(report=[*data.report, f"mean optimality of the walks {logged_optimality(data):.3f}"])
    mdp = sepsis() if name == "sepsis" else icu_sepsis()
    return tabular_transitions(mdp, seed, num, name)
