"""Simulated sessions, and what an agent is worth in them.

A crowd is people who see slates and pick: of the hidden world (data.slate.World), or of a fitted user model. `simulate` lets a policy show them slates and
returns the Log that it leaves. Every draw is a function of (seed, person, turn, column): policies meet the same people, starts, candidates and images.

    n sessions   T turns   L columns   M images   C candidates   K types   d width of the embeddings
"""
import copy
from typing import NamedTuple

import numpy as np
import torch

import user_model
from calibration import save_figure
from common import random_key
from data import slate
from data.slate import CATEGORIES, STYLES, stream, unit
from ranking import paired_bootstrap
from recommend import cell, markdown
from slate_agent import Texts, View, candidate_scores, head_scores, select, select_by_choice


# -----------------------------------------------------------------------------
# Crowds


class WorldCrowd:
    """n people of the hidden world. persons (n,): sessions of one person share a taste."""

    def __init__(self, world, n, seed, persons=None):
        self.world, self.seed = world, seed
        self.persons = np.arange(n) if persons is None else np.asarray(persons)
        people = world.people(int(self.persons.max()) + 1 if n else 0, seed)
        self.people = slate.People(*(x[self.persons] for x in people))
        self.kind, self.name, self.num_kinds = self.people.kind, "world", world.num_types

    def embed(self, texts):
        return self.world.embed(texts)

    def utilities(self, start, base, base_texts, texts, images):
        """start, base (n, d), base_texts [n], texts [n][L], images (n, L, M, d) -> (n, L)."""
        return self.world.utilities(self.people, start, base, images)

    def probabilities(self, utilities, turn):
        return self.world.probabilities(self.people, utilities, turn)

    def compared(self, gain, noise):
        return self.world.compared(gain, noise)

    def wish(self):
        """-> [n] words that each would say: the style that it likes best."""
        return [STYLES[i] for i in (self.people.taste @ self.embed(list(STYLES)).T).argmax(1)]


class ModelCrowd:
    """n people of a fitted user model, each of one type. embed: texts -> (N, d), of the encoder that the model was fitted with."""

    def __init__(self, model, n, seed, embed, kind=None, name="model"):
        self.model, self.embed, self.name, self.num_kinds = model, embed, name, model.config.num_types
        prior = model.log_prior.detach().double().softmax(0).numpy()
        self.prior = prior / prior.sum()
        self.kind = stream(seed, "types").choice(len(prior), size=n, p=self.prior) if kind is None else np.asarray(kind)
        self.persons = np.arange(n)

    @torch.no_grad()
    def utilities(self, start, base, base_texts, texts, images):
        tensor = lambda x: torch.from_numpy(np.ascontiguousarray(x, np.float32))
        found = self.model.utilities(tensor(start), tensor(base), tensor(images))                               # (n, L, K)
        return found[torch.arange(len(found)), :, torch.from_numpy(self.kind)].double().numpy()

    def probabilities(self, utilities, turn):
        return slate.softmax(float(self.model.tau("choice").detach()) * utilities)

    def compared(self, gain, noise):
        p = torch.sigmoid(self.model.tau("compare").detach() * torch.from_numpy(gain))
        return np.where(torch.special.ndtr(torch.from_numpy(noise)) < p, 1, -1)                           # ndtr of a normal draw is a uniform one

    @torch.no_grad()
    def wish(self):
        taste = torch.nn.functional.normalize(self.model.taste, dim=-1).numpy()[self.kind]
        return [STYLES[i] for i in (taste @ self.embed(list(STYLES)).T).argmax(1)]


def types_from(posterior, n, seed):
    """posterior (U, K), rows sum to 1 -> (n,) types: of users drawn with replacement, a type each by the user's posterior."""
    users = stream(seed, "users").integers(len(posterior), size=n)
    return (posterior[users].cumsum(1) > stream(seed, "types").random((n, 1)) * posterior[users].sum(1, keepdims=True)).argmax(1)


class SmallCrowd:
    """n people of data.slate.SmallWorld, all alike, of whom every policy has an exact value. A text says its move and the state that it leads to, in words
    that a bag of them keeps apart ("detail style1 details2 off0"), and nothing else counts."""
    name, num_kinds, prior = "small", 1, np.ones(1)

    def __init__(self, world, n):
        self.world, self.kind, self.persons = world, np.zeros(n, np.int64), np.arange(n)

    def embed(self, texts):
        return np.eye(len(self.world.STATES), dtype=np.float32)[[small_state(self.world, text) for text in texts]]

    def utilities(self, start, base, base_texts, texts, images):
        move = lambda text: CATEGORIES.index(text.split()[0])
        return np.array([[self.world.utility[small_state(self.world, before), move(text)] for text in row] for before, row in zip(base_texts, texts)])

    def probabilities(self, utilities, turn):
        return slate.softmax(self.world.tau * utilities)

    def compared(self, gain, noise):
        return np.sign(gain).astype(np.int64)

    def wish(self):
        return ["style1"] * len(self.kind)


class SmallGenerator:
    """One candidate of each category: the state that its move leads to."""
    name, counts, start = "small", {}, "start style0 details0 off0"

    def __init__(self, world):
        self.world = world

    def __call__(self, text, seed, row, turn):
        reached = (self.world.STATES[s] for s in self.world.next[small_state(self.world, text)])
        return [(category, "{} style{} details{} off{}".format(category, *state)) for category, state in zip(CATEGORIES, reached)]


def small_state(world, text):
    return world.index[tuple(int(word[-1]) for word in text.split()[1:])]


# -----------------------------------------------------------------------------
# Policies: (view, facts) -> (n, L) slates and a word for the log. facts: what a simulator knows and an agent does not


class Facts(NamedTuple):
    expected: object              # () -> (n, C) utility of each candidate to its person, without image noise
    other: object                 # () -> (n, C) the same to a stranger, whose type is drawn at random
    draws: np.ndarray             # (n, C) uniform, the same for every policy
    coin: np.ndarray              # (n,) uniform, apart from draws
    slate_size: int
    max_per_category: int


def random_policy(view, facts):
    return select(facts.draws, view.categories, facts.slate_size, facts.max_per_category), "random"


def base_policy(view, facts):
    """The generator as it comes: the first candidate of each of the first L categories."""
    order = -np.arange(view.categories.shape[1], dtype=float)
    return select(np.broadcast_to(order, view.categories.shape), view.categories, facts.slate_size, facts.max_per_category), "base"


def oracle_greedy(view, facts):
    """Knows the person: the best slate for this turn alone."""
    return select(facts.expected(), view.categories, facts.slate_size, facts.max_per_category), "oracle_greedy"


def behavior_policy(shares):
    """{"random": .5, "myopic": .3, "noisy": .2} -> the policy that fills a log: random slates; the best for a stranger, of a type drawn at random; the same
    with noise. Each session's turn draws its own."""
    names = list(shares)
    edges = np.cumsum([shares[k] for k in names]) / sum(shares.values())

    def policy(view, facts):
        which = np.searchsorted(edges, facts.coin, side="right").clip(max=len(names) - 1)                  # rounding may leave the last edge below 1
        pick = lambda scores: select(scores, view.categories, facts.slate_size, facts.max_per_category)
        draws = facts.draws
        slates = {"random": lambda: pick(draws), "myopic": lambda: pick(facts.other()), "noisy": lambda: pick(facts.other() + .3 * (2 * draws - 1))}
        out = np.zeros((len(which), facts.slate_size), np.int64)
        for i, name in enumerate(names):
            if (which == i).any():
                out[which == i] = slates[name]()[which == i]
        return out, [names[i] for i in which]
    return policy


def agent_policy(agent, device="cpu", name="agent"):
    """The best slate under f, the smaller of the heads; with a choice head, under what its picks would be worth."""
    def policy(view, facts):
        limits = (view.categories, facts.slate_size, facts.max_per_category)
        if agent.config.choice_head:
            found = head_scores(agent, view, device)
            return select_by_choice(found[:-1].min(0), found[-1], *limits), name
        return select(candidate_scores(agent, view, device), *limits), name
    return policy


def parse_behavior(text):
    """"random:.5,myopic:.3,noisy:.2" -> shares. ValueError: another policy, a share that is no positive number."""
    shares = {}
    for part in text.split(","):
        name, _, share = part.partition(":")
        if name not in ("random", "myopic", "noisy"):
            raise ValueError(f"--behavior={text}: {name!r}: expected random, myopic or noisy, with shares, as random:.5,myopic:.5")
        if name in shares:
            raise ValueError(f"--behavior={text}: {name} stands there twice")
        try:
            shares[name] = float(share or 1)
        except ValueError:
            raise ValueError(f"--behavior={text}: {share!r} is no number") from None
        if not 0 < shares[name] < float("inf"):
            raise ValueError(f"--behavior={text}: expected shares above 0")
    return shares


# -----------------------------------------------------------------------------
# Sessions


class Simulated(NamedTuple):
    log: slate.Log
    kind: np.ndarray              # (n,) types of the persons
    utility: np.ndarray           # (n, T, L) of all columns that were shown
    picked: np.ndarray            # (n, T) of the column that was picked
    ids: list                     # of the embeddings: prompts by their text, images by number
    emb: np.ndarray               # (E, d) float16


def simulate(crowd, starts, policy, *, horizon=5, slate_size=4, images_per_prompt=4, max_per_category=1, seed=0, propose=slate.expansions, reward_at="chosen",
             critique=0.0, source="sim:model", keep=True, texts=None):
    """n sessions, one for each text of starts, with the persons of crowd. propose: (base text, seed, row, turn) -> [(category, text)]; where it has a
    `batch`: (n base texts, seed, turn) -> n of these, a whole crowd is asked for at once.

    critique: the share of turns at which a person says what it wishes. reward_at: chosen, the utility of the column that was picked (what the person got);
    mean or best, of all columns; none, nothing is written (a log of real people). keep=False: no Log and no embeddings, for evaluations.
    """
    n, L, M = len(starts), slate_size, images_per_prompt
    if reward_at not in ("chosen", "mean", "best", "none"):
        raise ValueError(f"--reward_at={reward_at}: expected chosen, mean, best or none")
    if not n or n != len(crowd.kind):
        raise ValueError(f"{n} start prompts for a crowd of {len(crowd.kind)}: expected as many, and at least one")
    if min(horizon, L, M) < 1 or not 0 <= critique <= 1:
        raise ValueError("expected --horizon, --slate_size and --images_per_prompt of at least 1 and a --critique from 0 to 1, "
                         f"found {horizon}, {L}, {M}, {critique}")
    texts = texts or Texts()
    start_emb = crowd.embed(starts)
    d = start_emb.shape[1]
    base, base_emb = list(starts), start_emb
    start_row = base_row = texts.add(starts)
    shown, shown_category, picked_rows, critiques = (np.zeros((n, 0, *s), np.int64) for s in ((L,), (L,), (), ()))
    utility, got = np.zeros((n, horizon, L)), np.zeros((n, horizon))
    kept = []
    for t in range(horizon):
        proposed = propose.batch(base, seed, t) if hasattr(propose, "batch") else [propose(text, seed, i, t) for i, text in enumerate(base)]
        C = max(map(len, proposed))
        candidates = [[text for _, text in row] for row in proposed]
        rows = texts.add([text for row in candidates for text in row])
        lengths = np.array([len(row) for row in candidates])
        present = np.arange(C) < lengths[:, None]
        candidate_rows, categories = np.zeros((n, C), np.int64), np.full((n, C), -1)
        candidate_rows[present] = rows
        categories[present] = [CATEGORIES.index(c) for row in proposed for c, _ in row]
        emb = np.zeros((n, C, d), np.float32)
        emb[present] = crowd.embed([text for row in candidates for text in row])
        padded = [row + [row[-1]] * (C - len(row)) for row in candidates]
        pick_draw = stream(seed, "picks", t).random(n)
        facts = Facts(expected=lambda: crowd.utilities(start_emb, base_emb, base, padded, emb[:, :, None]),                    # noqa: B023 called in this turn
                      other=lambda: stranger(crowd, seed, t).utilities(start_emb, base_emb, base, padded, emb[:, :, None]),
                      draws=stream(seed, "draws", t).random((n, C)), coin=stream(seed, "coin", t).random(n), slate_size=L, max_per_category=max_per_category)
        view = View(texts, t, start_row, base_row, shown, shown_category, picked_rows, critiques, candidate_rows, categories, crowd.kind)
        slates, behavior = policy(view, facts)
        columns = [[padded[i][j] for j in row] for i, row in enumerate(slates)]
        noise = slate.IMAGE_NOISE * stream(seed, "images", t).standard_normal((n, L, M, d)) / d ** .5
        images = unit(np.take_along_axis(emb, slates[:, :, None], 1)[:, :, None] + noise).astype(np.float32)
        if keep:                                                              # a file holds float16: what is simulated is what a reader sees
            images = images.astype(np.float16).astype(np.float32)
        u = crowd.utilities(start_emb, base_emb, base, columns, images)
        p = crowd.probabilities(u, t)
        choice = (p.cumsum(1) < (pick_draw * p.sum(1))[:, None]).sum(1).clip(max=L - 1)
        i = np.arange(n)
        utility[:, t], got[:, t] = u, u[i, choice]
        gain = got[:, t] - got[:, t - 1] if t else np.zeros(n)
        compare = crowd.compared(gain, stream(seed, "compare", t).standard_normal(n)) if t else np.full(n, 2)
        speaks = stream(seed, "critique", t).random(n) < critique
        said = [f"more {w}" if s else "" for w, s in zip(crowd.wish(), speaks)] if speaks.any() else [""] * n
        said_rows = np.full(n, -1)
        said_rows[speaks] = texts.add([w for w in said if w])
        if keep:
            kept.append((candidate_rows, categories, slates, choice, compare, said, behavior if isinstance(behavior, list) else [behavior] * n, images))
        of_slate = lambda x: np.take_along_axis(x, slates, 1)[:, None]
        shown = np.concatenate([shown, of_slate(candidate_rows)], 1)
        shown_category = np.concatenate([shown_category, of_slate(categories)], 1)
        picked_rows = np.concatenate([picked_rows, choice[:, None]], 1)
        critiques = np.concatenate([critiques, said_rows[:, None]], 1)
        base = [columns[k][c] for k, c in enumerate(choice)]
        base_row = texts.add(base)
        base_emb = emb[i, slates[i, choice]]
    rewards = {"chosen": got, "mean": utility.mean(2), "best": utility.max(2), "none": np.full((n, horizon), np.nan)}[reward_at]
    if not keep:
        return Simulated(None, crowd.kind, utility, got, [], np.zeros((0, d), np.float16))
    C = max(k[0].shape[1] for k in kept)
    pad = lambda x, fill: np.pad(x, ((0, 0), (0, C - x.shape[1])), constant_values=fill)
    table = lambda values: np.stack(values, 1).reshape(n * horizon, *values[0].shape[1:])
    person = [f"{source.removeprefix('sim:')}-{seed}-{p}" for p in crowd.persons]
    users = list(dict.fromkeys(person))
    number = {u: k for k, u in enumerate(users)}
    digits = len(str(n))
    sessions = [f"{source.removeprefix('sim:')}-{seed}-{k:0{digits}d}" for k in range(n)]
    image_ids = [f"{s}/{t}/{l}/{m}" for s in sessions for t in range(horizon) for l in range(L) for m in range(M)]
    log = slate.Log(
        sessions, users, np.array([number[p] for p in person], np.int64), [source] * n, np.zeros(n, np.int64), start_row, np.arange(n + 1) * horizon,
        list(texts.texts), table([pad(np.where(k[1] >= 0, k[0], -1), -1) for k in kept]), table([pad(k[1], -1) for k in kept]), table([k[2] for k in kept]),
        table([k[3] for k in kept]), [kept[t][5][k] for k in range(n) for t in range(horizon)], table([k[4] for k in kept]), rewards.reshape(-1),
        [kept[t][6][k] for k in range(n) for t in range(horizon)], image_ids, np.arange(n * horizon * L * M).reshape(n * horizon, L, M))
    named = np.unique(np.concatenate([log.prompt, log.base]))
    ids = [log.texts[k] for k in named] + image_ids
    emb = np.concatenate([crowd.embed(ids[:len(named)]), np.stack([k[7] for k in kept], 1).reshape(-1, d)]).astype(np.float16)
    return Simulated(log, crowd.kind, utility, got, ids, emb)


def stranger(crowd, seed, turn):
    """The same crowd with everybody's taste exchanged for that of somebody else: what an agent that takes one person for another shows. Who it is does
    not depend on the size of the crowd, as an exchange among its members would."""
    other = copy.copy(crowd)
    if isinstance(crowd, WorldCrowd):
        other.people = crowd.world.people(len(crowd.kind), random_key(seed, "strangers", turn))
    else:
        other.kind = stream(seed, "strangers", turn).choice(len(crowd.prior), size=len(crowd.kind), p=crowd.prior)
    return other


class Session:
    """One person's session with an agent, turn by turn: show() -> [(category, text)] of the columns, pick(column, words), base: what was picked last."""

    def __init__(self, agent, deployment, propose, start, seed=0, device="cpu"):
        self.agent, self.deployment, self.propose, self.seed, self.device = agent, deployment, propose, seed, device
        self.start = self.base = start
        self.texts = Texts([start])
        self.turns = []                                                       # (rows of the columns, categories, pick, row of the words or -1)

    @property
    def turn(self):
        return len(self.turns)

    def show(self):
        d = self.deployment
        proposed = self.propose(self.base, self.seed, 0, self.turn)
        rows = self.texts.add([text for _, text in proposed])
        categories = np.array([CATEGORIES.index(c) for c, _ in proposed])
        past = [np.array([t[k] for t in self.turns], np.int64).reshape(1, self.turn, *shape) for k, shape in
                ((0, (d.slate_size,)), (1, (d.slate_size,)), (2, ()), (3, ()))]
        row = lambda text: self.texts.add([text])
        view = View(self.texts, self.turn, row(self.start), row(self.base), *past, rows[None], categories[None], np.array([-1]))
        slate_, _ = agent_policy(self.agent, self.device)(view, Limits(d.slate_size, d.max_per_category))
        self.columns = rows[slate_[0]], categories[slate_[0]]
        return [(CATEGORIES[c], self.texts.texts[r]) for r, c in zip(*self.columns)]

    def pick(self, column, words=""):
        self.turns.append((*self.columns, column, self.texts.add([words])[0] if words else -1))
        self.base = self.texts.texts[self.columns[0][column]]


class Limits(NamedTuple):
    """All that an agent needs of Facts."""
    slate_size: int
    max_per_category: int


# -----------------------------------------------------------------------------
# What a log's turns were worth, where nobody wrote it down


@torch.no_grad()
def posterior_of_users(model, log, embeddings):
    """-> (U, K) float64: types of the users by everything that they did in this log, and its Evidence.

    embeddings: (ids, (E, d)) of the log's prompts and images.
    """
    data = user_model.evidence(len(log.user_ids), slate.observations(log, *embeddings))
    return user_model.posterior(model, *user_model.all_likelihoods(model, data), data.num_users), data


@torch.no_grad()
def label_rewards(model, log, embeddings, center=False):
    """(N,) sum_k g(k) (R_k(the picked column) - c_k), g the posterior of the user over everything that it did in this log: a label for training, never an
    input. c_k: 0, or with `center` the mean of R_k over all picks, weighed by g(k)."""
    g, data = posterior_of_users(model, log, embeddings)
    o = data.observations
    picked = model.utilities(o.start, o.base, o.images)[torch.arange(len(o.user)), o.choice].double().numpy()                # (N, K)
    order = np.argsort(log.user, kind="stable")                               # of sessions, as observations has them
    turns = np.concatenate([np.arange(log.first[s], log.first[s + 1]) for s in order])
    g, out = g[o.user].numpy(), np.empty(len(log.choice))
    out[turns] = (g * (picked - (type_levels(picked, g) if center else 0.0))).sum(1)
    return out


def type_levels(rewards, shares):
    """(K,) mean reward by type; rewards (N,) or (N, K), shares (N, K) of the types in each. Likelihoods of picks and comparisons are blind to a constant that
    is added to all utilities of a type, so a fitted one means nothing; left in, most of the variance of an agent's rewards would be who the person is."""
    rewards = rewards if rewards.ndim == 2 else rewards[:, None]
    return (shares * rewards).sum(0) / np.maximum(shares.sum(0), 1e-12)


def world_log(world, seed, *, num_users=700, num_sessions=1, shuffled=False, **settings):
    """A log of real people: of the hidden world, no utility written. -> Simulated. shuffled: every pick is drawn anew, at random: nothing can be learned."""
    persons = np.repeat(np.arange(num_users), num_sessions)
    crowd = WorldCrowd(world, len(persons), seed, persons)
    if shuffled:
        crowd.probabilities = lambda utilities, turn: np.full_like(utilities, 1 / utilities.shape[1])
    policy = settings.pop("policy", None) or behavior_policy(dict(random=.5, myopic=.3, noisy=.2))
    return simulate(crowd, slate.start_prompts(len(persons), seed)[0], policy, seed=seed, source="human", **dict(reward_at="none") | settings)


# -----------------------------------------------------------------------------
# Tables and pictures of an evaluation: {(crowd, policy): (n, T) utilities of the picks}, rows of all policies of a crowd are the same people


POLICIES = dict(base="generator as it comes", random="random slates", bc="cloned slates", myopic="one turn ahead", iql="IQL",
                oracle_greedy="knows the person, one turn ahead", oracle_type="IQL that is told the type")


def compare(found, seed=0):
    """-> {crowd: {policy: {mean, last_turn, by_turn, improved, wins, less_random, gap}}}.

    mean: utility per turn; improved: share of sessions whose last pick is worth more than the first; wins: share of sessions better than base, ties half;
    less_random: last turn less that of random slates [95 %, paired bootstrap over people]; gap: share of the way from random to oracle_type, last turn.
    """
    results = {}
    for (crowd, policy), x in found.items():
        base, random = found[crowd, "base"], found[crowd, "random"]
        oracle = found.get((crowd, "oracle_type"))
        better = x.mean(1) - base.mean(1)
        way = None if oracle is None else float(oracle[:, -1].mean() - random[:, -1].mean())
        results.setdefault(crowd, {})[policy] = dict(
            mean=float(x.mean()), last_turn=float(x[:, -1].mean()), by_turn=x.mean(0).tolist(), improved=float((x[:, -1] > x[:, 0]).mean()),
            wins=float(((better > 0) + .5 * (better == 0)).mean()), less_random=paired_bootstrap(x[:, -1], random[:, -1], seed=seed),
            gap=None if not way else float((x[:, -1].mean() - random[:, -1].mean()) / way))
    return results


def report(name, found, results, kinds, specific, trained_in, best):
    """-> lines of markdown."""
    lines = [f"# {name}: slates for people who were held out\n",
             "Selected on people of the simulator: " + ", ".join(f"{label} at step {b['step']} ({b['score']:.4f})" for label, b in best.items()) + ".\n"]
    for crowd, of_crowd in results.items():
        people = len(next(x for (c, _), x in found.items() if c == crowd))
        lines += [f"## {crowd}: {'who the agents were trained with' if crowd == trained_in else 'whom training never saw'}, {people:,} people\n",
                  markdown(["policy", "utility per turn", "last turn", "less random, last turn", "last pick above first", "above base", "share of the gap"], [
                      [policy, cell(r["mean"]), cell(r["last_turn"]), "{:+.4f} [{:+.4f}, {:+.4f}]".format(*r["less_random"]), cell(r["improved"], 3),
                       cell(r["wins"], 3), cell(r["gap"], 2)] for policy, r in of_crowd.items()])]
        groups = [mask for mask in (~specific, specific) if mask.any()] + [kinds[crowd] == k for k in range(kinds[crowd].max() + 1)]
        rows = [[policy, *(cell(float(found[crowd, policy][mask].mean()) if mask.any() else None) for mask in groups)] for policy in of_crowd]
        header = [label for label, mask in (("vague start", ~specific), ("specific start", specific)) if mask.any()]
        lines.append(markdown(["utility per turn", *header, *(f"type {k}" for k in range(kinds[crowd].max() + 1))], rows))
    if trained_in in results and len(results) > 1:
        others = [c for c in results if c != trained_in]
        lines += ["## What the simulator promised and others gave: gain over random slates, utility per turn\n",
                  markdown(["policy", trained_in, *others], [
                      [p, *(cell(results[c][p]["mean"] - results[c]["random"]["mean"]) if p in results[c] else "-" for c in (trained_in, *others))]
                      for p in results[trained_in] if p != "random"])]
    return lines


def picture(found, history, path):
    """Utility by turn in each crowd, and over training with the crowd that selects."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    crowds = list(dict.fromkeys(c for c, _ in found))
    labels = list(dict.fromkeys(r["stage"] for r in history))
    followed = len(history) > len(labels)                                     # one point of each is no curve
    fig, axes = plt.subplots(1, len(crowds) + followed, figsize=(5.2 * (len(crowds) + followed), 4.2), squeeze=False)
    for ax, crowd in zip(axes[0], crowds):
        for policy in (p for c, p in found if c == crowd):
            x = found[crowd, policy]
            half = 1.96 * x.std(0) / len(x) ** .5
            turns = np.arange(1, x.shape[1] + 1)
            line, = ax.plot(turns, x.mean(0), "--" if policy.startswith("oracle") else "-", label=POLICIES.get(policy, policy), color=COLORS.get(policy))
            ax.fill_between(turns, x.mean(0) - half, x.mean(0) + half, alpha=.15, color=line.get_color(), lw=0)
        ax.set(title=f"Utility of the picks: {crowd}", xlabel="turn", ylabel="utility, 95 % over people", xticks=turns)
    if followed:
        for label in labels:
            points = [(r["step"], r["eval/utility"]) for r in history if r["stage"] == label]
            axes[0, -1].plot(*zip(*points), "o-", ms=3, label=label, color=COLORS.get(label))
        axes[0, -1].set(title="While training: people of the simulator", xlabel="step", ylabel="utility per turn")
    save_figure(fig, list(axes[0]), path)


COLORS = {"base": "#999999", "random": "#cccccc", "bc": "#edae49", "myopic": "#d1495b", "iql": "#2e86ab", "oracle_greedy": "#66605b", "oracle_type": "#3a7d44"}


def storyboard(story, path, session=None):
    """{policy: Simulated} of the same people -> a picture: each turn's columns with their prompts and utilities, the pick framed. session: which one; None:
    the one where the last pick of the last policy exceeds that of the first most."""
    import textwrap
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    policies = list(story)
    if session is None:
        session = int((story[policies[-1]].picked[:, -1] - story[policies[0]].picked[:, -1]).argmax())
    T, L = story[policies[0]].utility.shape[1:]
    fig, axes = plt.subplots(1, len(policies), figsize=(8.5 * len(policies), 1.25 * T + .8), squeeze=False)
    low, high = (f([s.utility[session].ravel() for s in story.values()]) for f in (np.min, np.max))
    for ax, policy in zip(axes[0], policies):
        s = story[policy]
        log = s.log
        for t in range(T):
            n = log.first[session] + t
            for l in range(L):
                u, chosen = s.utility[session, t, l], l == log.choice[n]
                shade = (u - low) / (high - low + 1e-9)
                color = (1 - .55 * shade, 1 - .2 * shade, 1 - .45 * shade)
                ax.add_patch(plt.Rectangle((l + .03, T - t - .95), .94, .9, fc=color, ec="#222222" if chosen else "#dddddd", lw=2.2 if chosen else .8))
                text = log.texts[log.candidates[n, log.slate[n, l]]]
                ax.text(l + .5, T - t - .47, "\n".join(textwrap.wrap(text, 24)) + f"\n{u:.2f}", ha="center", va="center", fontsize=7.5,
                        fontweight="bold" if chosen else "normal")
            if log.critique[n]:
                ax.text(L + .03, T - t - .5, f"“{log.critique[n]}”", fontsize=8, va="center", style="italic")
            ax.text(-.05, T - t - .5, f"turn {t + 1}", ha="right", va="center", fontsize=9)
        ax.set(title=f"{POLICIES.get(policy, policy)}: from “{log.texts[log.prompt[session]]}” to {s.picked[session, -1]:.2f}",
               xlim=(-.5, L + .8), ylim=(0, T + .05))
        ax.set_axis_off()
    fig.suptitle("One person, two agents: columns as shown, the pick framed, darker is worth more to this person", fontsize=10)
    save_figure(fig, list(axes[0]), path)
