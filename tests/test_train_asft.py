"""A-SFT and its rivals: weights and losses against hand-worked numbers and float64 loops, and the optima that theory names, in worlds of a few numbers."""
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import ranking
from data import interactions
from model import Recommender, RecommenderConfig
from recommend import seen_so_far
from train_asft import (METHODS, Config, Facts, asft_weights, bc_loss, bootstrap_counts, cql_loss, dpo_loss, draw, ecpo_loss, exp_weights, expected,
                        expectile_loss, facts, fold_mean, ipo_loss, kl, logps_of, method_weights, next_values, post_loss, ppo_loss, sampled_logps,
                        weighted_nll)

I = 7
TINY = RecommenderConfig(num_items=I, hidden_size=8, num_layers=1, num_heads=1, head_dim=4, value_dim=4, max_length=6, dropout=0.0, temperature=.5,
                         num_heads_reward=3, head_width=3)
tensor = lambda *x: torch.tensor(x, dtype=torch.float64)


# -----------------------------------------------------------------------------
# The pure functions, by hand


def test_weights_by_hand():
    a = torch.tensor([math.log(2), 0.0, -math.log(4), 1e4, -1e4])
    assert torch.allclose(asft_weights(a, 1.0, 20.0), torch.tensor([2, 1, .25, 20, 0]), atol=1e-6)
    assert torch.allclose(asft_weights(a, .5, 3.0), torch.tensor([3, 1, .0625, 3, 0]), atol=1e-6)                # 4 is above the bound
    assert asft_weights(torch.tensor([1e4] * 9), 1.0, 20.0).tolist() == [20.0] * 9                               # exact: the share that is clipped counts >= 20
    assert asft_weights(torch.tensor([float("nan")]), 1.0, 20.0).isnan().all()
    assert torch.equal(asft_weights(a, math.inf, 20.0), torch.ones(5))
    assert asft_weights(a.double(), 1.0, 20.0).dtype == torch.float64
    assert torch.allclose(exp_weights(torch.tensor([0.0, 2.0]), 2.0), torch.tensor([1, math.e]))
    assert torch.equal(exp_weights(a, math.inf), torch.ones(5))
    exp_weights(torch.tensor([46.0]), 1.0)
    with pytest.raises(ValueError, match="r = 47, weight_temp = 1: raise"):
        exp_weights(torch.tensor([0.0, 47.0]), 1.0)


def test_losses_by_hand():
    zero, logps = tensor(0), tensor(math.log(.5), math.log(.25))
    assert abs(weighted_nll(logps, tensor(2, 1), 3).item() - 4 * math.log(2) / 3) < 1e-12
    assert abs(dpo_loss(zero, 2, 5.0).item() - math.log(2) / 2) < 1e-12                                          # half of a batch of two
    assert abs(dpo_loss(tensor(10), 1, .1).item() - 0.3132616875) < 1e-9                                         # log(1 + 1/e)
    assert ipo_loss(zero, 4, .1).item() == 25 / 4
    # ratios 2 and .5 for A = 1, -1 each: min takes 1.2, -2, .5, -.8
    logps, old = tensor([math.log(.5), math.log(.5), math.log(.25), math.log(.25)]), tensor([math.log(.25), math.log(.25), math.log(.5), math.log(.5)])
    assert abs(ppo_loss(logps, old, tensor([1, -1, 1, -1]), 8, .2).item() - (-1.2 + 2 - .5 + .8) / 8) < 1e-12
    assert abs(ecpo_loss(logps, old, tensor([1, -1, 1, -1]), 8, .2, .1).item() - (-1.2 + 1.3 - .5 + .8) / 8) < 1e-12
    assert abs(expectile_loss(tensor(1, -1, 2), .7, 3).item() - (.7 + .3 + 2.8) / 3) < 1e-7
    # Q = 1 + log .5, r = 0
    assert abs(cql_loss(tensor(math.log(.5)), tensor(1), zero, 2, .3).item() - ((1 - math.log(2)) ** 2 / 2 + .3 * math.log(2)) / 2) < 1e-12
    policy, ref = tensor([0, .25, .75]).log(), tensor([0, .5, .5]).log()
    assert abs(expected(policy, tensor([100, 4, 8])).item() - 7) < 1e-12
    assert abs(kl(policy, ref).item() - (.25 * math.log(.5) + .75 * math.log(1.5))) < 1e-12
    values, known = next_values(tensor(1, 2, 3), torch.tensor([2, -1, 0]))
    assert values.tolist() == [3, 0, 1] and known.tolist() == [True, False, True]


def test_folds_by_hand():
    values = tensor([1, 10], [2, 20], [6, 60])                              # three members, two users
    assert fold_mean(values, None, Config(ensemble=3)).tolist() == [3, 30]
    assert fold_mean(values, np.array([0, 1]), Config(ensemble=3, folds=2)).tolist() == [3.5, 20]                # members 0 and 2 left fold 0 out, 1 left 1 out


def test_bootstrap_counts():
    counts, fold = bootstrap_counts(Config(ensemble=3), 20000, 5)
    assert fold is None and counts.dtype == torch.float32 and counts.shape == (3, 20000)
    for member in counts.double():                                          # Poisson(1): mean, variance and share of zeros, within 4 standard errors
        assert abs(member.mean() - 1) < 4 / 141 and abs(member.var() - 1) < 4 * 3 ** .5 / 141 and abs((member == 0).double().mean() - math.exp(-1)) < .014
    assert abs(torch.corrcoef(counts)[0, 1]) < 4 / 141
    assert torch.equal(counts, bootstrap_counts(Config(ensemble=3), 20000, 5)[0]) and not torch.equal(counts, bootstrap_counts(Config(ensemble=3), 20000, 6)[0])
    cfg = Config(ensemble=5, folds=2)
    counts, fold = bootstrap_counts(cfg, 300, 0)
    assert set(fold) == {0, 1} and set(counts.unique().tolist()) == {0, 1} and 110 < fold.sum() < 190
    for member, user in product(range(5), range(300)):
        assert counts[member, user] == (fold[user] != member % 2)
    only_unfitted = torch.where(counts == 0, 1.0, math.nan)                 # what fold_mean gives a user comes from members that never counted the user
    assert (fold_mean(only_unfitted.nan_to_num(-99.0), fold, cfg) == 1).all()


def test_method_weights():
    nan = math.nan
    advantages, rewards = np.array([nan, math.log(2), 5.0, -1.0], np.float32), np.array([900, 1.0, 2.0, -3.0], np.float32)
    of = lambda **settings: method_weights(Config(**settings), advantages, rewards).tolist()[1:]
    assert np.allclose(of(method="asft"), [2, 20, math.exp(-1)]) and np.allclose(of(method="asft", weight_temp=.5, w_max=4), [4, 4, math.exp(-2)])
    assert of(method="bc") == [1, 1, 1] and of(method="reward_bc") == [1, 2, 0]
    assert np.allclose(of(method="exp_rsft"), np.exp([1, 2, -3]))           # 900 is no decision, so it does not stop the run
    assert all(math.isnan(method_weights(Config(method=m), advantages, rewards)[0]) for m in ("asft", "bc", "reward_bc", "exp_rsft"))
    with pytest.raises(ValueError, match="overflows at r = 2"):
        of(method="exp_rsft", weight_temp=.02)


@pytest.mark.parametrize("w_max", [3.5, 15.0])
def test_a_cut_weight_is_the_bound(w_max):
    assert asft_weights(torch.tensor([1e4]), 1.0, w_max).item() == w_max


# -----------------------------------------------------------------------------
# Every method on a tiny model, against loops over float64 tables


def tiny(seed):
    model, generator = Recommender(TINY).init_weights(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():                                        # init_weights leaves much at 0
            p.copy_(torch.randn(p.shape, generator=generator) * .5)
    return model


def decisions(n=8, seed=0):
    """Facts of n decisions in three rows, with random states, and the states of two more models."""
    g = torch.Generator().manual_seed(seed)
    actions, seen = torch.randint(1, I + 1, (n,), generator=g), torch.rand(n, I, generator=g) < .3
    seen[torch.arange(n), actions - 1] = False
    after = torch.tensor([1, 2, -1, 4, -1, 6, 7, -1])[:n]
    hidden, *others = (torch.randn(n, 8, generator=g) for _ in range(3))
    return Facts(hidden, actions, torch.randn(n, generator=g), torch.rand(n, generator=g) * 3, after, seen, torch.rand(n, 8, generator=g),
                 torch.randint(1, I + 1, (n, 4), generator=g)), *others


class Tables:
    """A model's numbers as float64 tables, item by item."""
    def __init__(self, model, hidden):
        self.p = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
        self.hidden, self.members = hidden.detach().double().requires_grad_(), len(model.reward.mean)

    def logits(self, n):
        unit = lambda x: x / x.square().sum().sqrt()
        return [(unit(self.hidden[n]) * unit(e)).sum() / TINY.temperature for e in self.p["items.weight"][1:]]

    def logp(self, n, seen=()):
        """{item: log-probability} of the items that are not seen."""
        logits = self.logits(n)
        z = sum(logit.exp() for a, logit in enumerate(logits, 1) if a not in seen)
        return {a: logit - z.log() for a, logit in enumerate(logits, 1) if a not in seen}

    def sampled(self, n, action, negatives, logq):
        logits = self.logits(n)
        z = logits[action - 1].exp() + sum((logits[a - 1] + logq).exp() for a in negatives if a != action)
        return logits[action - 1] - z.log()

    def state(self, n, detach=True):
        x = self.hidden[n].detach() if detach else self.hidden[n]
        return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-6).sqrt()

    def q(self, m, n, a, detach=True):
        p, h = {key: self.p[f"reward.{key}"][m] for key in ("mean", "item_bias", "state", "project", "item")}, self.state(n, detach)
        return p["mean"] + p["item_bias"][a - 1] + (p["state"] * h).sum() + ((h @ p["project"]) * p["item"][a - 1]).sum()

    def rhat(self, n, a):
        return sum(self.q(m, n, a) for m in range(self.members)) / self.members

    def value(self, m, n):
        x = self.state(n) @ self.p["value.up"][m] + self.p["value.up_bias"][m, 0]
        return (x / (1 + (-x).exp()) * self.p["value.down"][m]).sum() + self.p["value.mean"][m]


def pick(logp, u):
    """The item whose interval of the unit interval, in the order of the items, holds u."""
    end = 0.0
    for a, lp in logp.items():
        end += math.exp(number(lp))
        if u < end:
            return a
    return a                                                                # u beyond a sum just short of 1


def oracle(cfg, now, past, before, f, num, denominator):
    """The formulas, one decision at a time. -> loss, statistics."""
    method, total, stats = cfg.method, tensor(0)[0], {}
    count = lambda **values: stats.update({key: stats.get(key, 0.0) + number(value) / num for key, value in values.items()})
    for n in range(len(f.actions)):
        a, r, after = int(f.actions[n]), float(f.rewards[n]), int(f.after[n])
        seen = {i + 1 for i in range(I) if f.seen[n, i]}
        logq = math.log((I - 1) / cfg.num_negatives) if cfg.logq else 0.0
        lp = now.sampled(n, a, f.negatives[n].tolist(), logq) if cfg.softmax == "sampled" else now.logp(n)[a]
        if method in ("asft", "bc", "reward_bc", "exp_rsft"):
            total = total - float(f.weights[n]) * lp / denominator
        elif method == "awr":
            w = min(math.exp((r - sum(number(now.value(m, n)) for m in range(3)) / 3) / cfg.weight_temp), cfg.w_max)
            fit = sum((r - now.value(m, n)) ** 2 for m in range(3)) / 3
            total = total + (fit - w * lp) / num
            count(critic_loss=fit.detach(), weight=w)
        elif method == "iql":
            target, v = min(number(before.q(m, n, a)) for m in range(2)), now.value(0, n)
            fit = (cfg.expectile if target >= v else 1 - cfg.expectile) * (target - v) ** 2
            if after >= 0 or cfg.gamma == 0:
                fit = fit + sum((r + cfg.gamma * (number(now.value(0, after)) if after >= 0 else 0) - now.q(m, n, a)) ** 2 for m in range(2)) / 2
            w = min(math.exp((target - number(v)) / cfg.weight_temp), 100)
            total = total + (fit - w * lp) / num
            count(critic_loss=fit.detach(), weight=w)
        elif method == "crr":
            mean_q = lambda n, unseen: sum(math.exp(number(p)) * number(now.rhat(n, i)) for i, p in unseen.items())
            advantage = number(now.rhat(n, a)) - mean_q(n, now.logp(n, seen))
            w = (1.0 if advantage > 0 else 0.0) if cfg.weight_temp == 0 else min(math.exp(advantage / cfg.weight_temp), cfg.w_max)
            fit = tensor(0)[0]
            if after >= 0 or cfg.gamma == 0:
                following = mean_q(after, now.logp(after, {i + 1 for i in range(I) if f.seen[after, i]})) if after >= 0 else 0
                fit = sum((r + cfg.gamma * following - now.q(m, n, a)) ** 2 for m in range(3)) / 3
            total = total + (fit - w * lp) / num
            count(critic_loss=fit.detach(), weight=w)
        elif method == "cql":
            q = {i: now.value(0, n) + p for i, p in now.logp(n).items()}
            penalty = sum(x.exp() for x in q.values()).log() - q[a]
            total = total + (.5 * (q[a] - r) ** 2 + cfg.cql_alpha * penalty) / num
            count(critic_loss=.5 * (q[a] - r) ** 2)
        else:
            logp, ref_logp = now.logp(n, seen), past.logp(n, seen)
            divergence = sum(logp[i].exp() * (logp[i] - number(ref_logp[i])) for i in logp)
            if method in ("dpo", "ipo"):
                items = [pick(ref_logp, float(u)) for u in f.noise[n]]
                opinions = {i: [number(past.q(m, n, i)) for m in range(3)] for i in items}
                mean, spread = ({i: fn(x) for i, x in opinions.items()} for fn in (np.mean, lambda x: np.std(x, ddof=1)))
                good, bad = max(items, key=mean.get), min(items, key=mean.get)
                if mean[good] - cfg.pref_gap * spread[good] > mean[bad] + cfg.pref_gap * spread[bad]:
                    d = logp[good] - number(ref_logp[good]) - logp[bad] + number(ref_logp[bad])
                    total = total + (torch.log1p((-cfg.pref_beta * d).exp()) if method == "dpo" else (d - 1 / (2 * cfg.pref_beta)) ** 2) / num
                    count(accepted=1, margin=d)
                else:
                    count(accepted=0, margin=0)
            elif method == "exact":
                worth = sum(logp[i].exp() * number(past.rhat(n, i)) for i in logp)
                total = total + (cfg.kl_coef * divergence - worth) / num
                count(kl=divergence, reward=worth)
            else:
                sampling = before.logp(n, seen)
                items = [pick(sampling, float(u)) for u in f.noise[n, :cfg.num_samples]]
                rewards = np.array([number(past.rhat(n, i)) for i in items])
                advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6 if method == "ecpo" else 1)
                for i, A in zip(items, advantages):
                    old = number(sampling[i])
                    if method == "ecpo" and A < 0:
                        old = max(number(logp[i]) - math.log(1 + cfg.clip + cfg.ecpo_delta), old)
                    ratio = (logp[i] - old).exp()
                    total = total - torch.minimum(ratio * A, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * A) / (num * cfg.num_samples)
                    count(clip_fraction=(abs(math.exp(number(logp[i] - sampling[i])) - 1) > cfg.clip) / cfg.num_samples)
                total = total + cfg.kl_coef * divergence / num
                count(kl=divergence, reward=rewards.mean())
    return total, stats


CASES = [dict(method="asft"), dict(method="bc"), dict(method="reward_bc"), dict(method="exp_rsft"), dict(method="awr", weight_temp=.7, w_max=3.0),
         dict(method="crr", weight_temp=.7, w_max=3.0), dict(method="crr", weight_temp=0.0), dict(method="crr", gamma=.9),
         dict(method="iql", weight_temp=.5), dict(method="iql", gamma=.9, expectile=.8), dict(method="cql", cql_alpha=.7),
         dict(method="dpo", pref_gap=.7), dict(method="ipo", pref_gap=.7), dict(method="ppo", kl_coef=.3), dict(method="ppo", kl_coef=0.0),
         dict(method="ecpo", kl_coef=.3), dict(method="exact", kl_coef=.3), dict(method="exact", kl_coef=0.0),
         dict(method="asft", softmax="sampled"), dict(method="asft", softmax="sampled", logq=True), dict(method="awr", softmax="sampled", logq=True)]
number = lambda x: torch.as_tensor(x).detach().item()
same = lambda ours, exact: math.isclose(number(ours), number(exact), rel_tol=1e-6, abs_tol=1e-6)
name_of = lambda case: "-".join(str(v) if k in ("method", "softmax") else f"{k}={v}" for k, v in case.items())


def gradients(loss, tree):
    found = torch.autograd.grad(loss, list(tree.values()), allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(tree.items(), found)}


def setting(**case):
    """-> cfg, the three models, Facts whose states take a gradient, states of the other two."""
    cfg = Config(num_samples=4, num_negatives=4, **{"pref_beta": .4} | case)
    model, ref, before = (tiny(seed) for seed in (1, 2, 3))
    f, ref_hidden, old_hidden = decisions()
    return cfg, model, (ref, ref_hidden), (before, old_hidden), f._replace(hidden=f.hidden.requires_grad_())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_loss_and_gradient_against_a_loop(case):
    cfg, model, (ref, ref_hidden), (before, old_hidden), f = setting(**case)
    now, past, sampling = Tables(model, f.hidden), Tables(ref, ref_hidden), Tables(before, f.hidden if case["method"] == "iql" else old_hidden)
    num, denominator = 11, 9.5                                              # more decisions are in other micro-batches
    loss, found = post_loss(cfg, model, (ref, ref_hidden), (before, old_hidden), f, num, denominator)
    expected_loss, stats = oracle(cfg, now, past, sampling, f, num, denominator)
    assert same(loss, expected_loss)
    assert found.keys() == stats.keys() and all(same(found[key], stats[key]) for key in found), (found, stats)
    ours, theirs = gradients(loss, dict(model.named_parameters()) | dict(hidden=f.hidden)), gradients(expected_loss, now.p | dict(hidden=now.hidden))
    for name in ours:
        assert torch.allclose(ours[name].double(), theirs[name], rtol=1e-5, atol=1e-6), (name, (ours[name] - theirs[name]).abs().max())
    moved = {name.split(".")[0] for name, g in theirs.items() if g.abs().max() > 1e-4}
    heads = {"awr": {"value"}, "crr": {"reward"}, "iql": {"reward", "value"}, "cql": {"value"}}.get(cfg.method, set())
    assert moved == {"hidden", "items"} | heads == {"hidden", "items"} | set(METHODS[cfg.method].get("heads", ()))
    if "accepted" in stats:                                                 # the setting shows both sides of each branch
        assert 0 < stats["accepted"] < 8 / num
    if "clip_fraction" in stats:
        assert 0 < stats["clip_fraction"] < 8 / num


def test_every_method_has_an_oracle():
    assert {case["method"] for case in CASES} == set(METHODS) - {"tilt"}    # tilt trains nothing


@pytest.mark.parametrize("to_trunk", [True, False])
def test_bc_loss_against_a_loop(to_trunk):
    cfg, model, _, _, f = setting(method="bc", reward_to_trunk=to_trunk, reward_coef=.3)
    members = torch.tensor([[0.0, 1, 2, 0, 1, 3, 1, 1], [1, 1, 1, 0, 0, 0, 2, 1], [2, 0, 1, 0, 1, 1, 1, 1]])       # nobody reads the reward of decision 3
    loss, found = bc_loss(cfg, model, f._replace(rewards=f.rewards.where(torch.arange(8) != 3, 1e9)), members, 11, 9)
    now = Tables(model, f.hidden)
    nll = -sum(now.logp(n)[int(f.actions[n])] for n in range(8)) / 11
    fit = lambda said: sum(int(members[m, n]) * (said(m, n) - float(f.rewards[n])) ** 2 for m in range(3) for n in range(8)) / 27
    reward_fit, value_fit = fit(lambda m, n: now.q(m, n, int(f.actions[n]), detach=not to_trunk)), fit(now.value)
    for key, value in dict(nll=nll, reward_mse=reward_fit, value_mse=value_fit).items():
        assert same(found[key], value)
    ours = gradients(loss, dict(model.named_parameters()) | dict(hidden=f.hidden))
    theirs = gradients(nll + .3 * reward_fit + value_fit, now.p | dict(hidden=now.hidden))
    for name in ours:
        assert torch.allclose(ours[name].double(), theirs[name], rtol=1e-5, atol=1e-6), name
    only_nll = gradients(nll, dict(hidden=now.hidden))["hidden"]
    assert torch.allclose(theirs["hidden"], only_nll, atol=1e-9) != to_trunk
    assert math.isfinite(bc_loss(cfg, model, f, members * 0, 11, 0)[0].item())                                    # a batch without a reader


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_order_and_cut_of_the_decisions_change_nothing(case):
    """Rows in another order, and the sum over two micro-batches, give one loss and one gradient."""
    cfg, model, (ref, ref_hidden), (before, old_hidden), f = setting(**case)

    def pieces(*orders):
        losses = []
        for order in orders:
            place = {old: new for new, old in enumerate(order)} | {-1: -1}
            part = Facts(*(t[order] for t in f))._replace(after=torch.tensor([place[int(f.after[n])] for n in order]))
            losses.append(post_loss(cfg, model, (ref, ref_hidden[order]), (before, old_hidden[order]), part, 8, 8.0)[0])
        return sum(losses), gradients(sum(losses), dict(model.named_parameters()) | dict(hidden=f.hidden))
    whole, g = pieces(list(range(8)))
    for loss, other in (pieces([5, 6, 7, 3, 4, 0, 1, 2]), pieces([0, 1, 2], [3, 4, 5, 6, 7])):                    # rows are 0 1 2, 3 4, 5 6 7
        assert same(loss, whole)
        assert all(torch.allclose(g[name], other[name], rtol=1e-5, atol=2e-6) for name in g)


# -----------------------------------------------------------------------------
# From a log to facts


def small_log():
    items = [[3, 1, 3, 5], [2, 6], [4, 2, 7, 1, 4, 6, 5]]                   # the first user comes back to 3, the third to 4
    sizes = [len(x) for x in items]
    user, item = np.repeat(np.arange(3), sizes), np.concatenate(items)
    log = interactions.Log(user, item, np.arange(13) / 2, np.arange(13) * 10, np.arange(13), {}, list("abc"), [str(i) for i in range(1, I + 1)], [], [])
    return log, np.zeros(13, np.int8), (np.arange(13) / 2).astype(np.float32)


@pytest.mark.parametrize("max_length, windows", [(6, "end"), (3, "end"), (3, "all")])
def test_facts_of_a_log(max_length, windows):
    log, part, reward = small_log()
    rows = interactions.train_rows(log, part, max_length, windows)
    assert len(rows) == (5 if windows == "all" else 3)
    order = np.random.default_rng(0).permutation(len(rows))
    batch = interactions.batch(log, reward, rows, order)
    B, T = batch.items.shape
    hidden = torch.arange(B * T).view(B, T, 1).float()
    weights, world = torch.arange(13).float() ** 2, SimpleNamespace(log=log, catalogue=SimpleNamespace(item_ids=log.item_ids))
    noise, negatives = torch.rand(99, 2), torch.ones(99, 2).long()
    f = facts(Config(method="ppo"), world, batch, hidden, weights, noise, negatives, rows, order)
    n = 0
    for b, (start, end, first) in enumerate(rows[order]):
        for event in range(first, end):
            assert f.hidden[n].item() == b * T + event - 1 - start          # the state before the event
            assert (f.actions[n], f.rewards[n], f.weights[n]) == (log.item[event], reward[event], event ** 2)
            assert f.after[n] == (n + 1 if event + 1 < end else -1)
            assert {i + 1 for i in range(I) if f.seen[n, i]} == set(log.item[np.searchsorted(log.user, log.user[start]):event].tolist())       # and before the row
            n += 1
    assert n == len(f.actions) == len(f.hidden) == len(f.seen) and f.noise is noise and f.negatives is negatives
    if windows == "all":
        assert n == 3 + 1 + 6                                               # every decision once
    f = facts(Config(method="asft"), world, batch, hidden, None, None, None)
    assert f.weights is None and f.seen is None and len(f.actions) == n


def test_seen_so_far():
    items = torch.randint(0, 12, (5, 30), generator=torch.Generator().manual_seed(0))           # 0 is padding and no item
    places, zeros = torch.tensor([0, 29, 30, 77, 149, 77, 120]), np.zeros(5, np.int64)
    log = SimpleNamespace(user=zeros, item=zeros + 1)                                            # nothing before the rows
    seen = seen_so_far(SimpleNamespace(log=log, catalogue=SimpleNamespace(item_ids=[""] * 11)), np.stack([zeros, zeros + 31, zeros + 1], 1), np.arange(5), items, places)
    assert seen.shape == (7, 11) and seen.dtype == torch.bool
    for row, place in zip(seen, places.tolist()):
        assert {i + 1 for i in range(11) if row[i]} == set(items[place // 30, :place % 30 + 1].tolist()) - {0}


def test_a_state_has_one_loss_whatever_its_batch():
    """Whole path: model, facts and loss of all rows at once are the sum over rows alone (other padding, other places)."""
    log, part, reward = small_log()
    rows, world = interactions.train_rows(log, part, 6), SimpleNamespace(log=log, catalogue=SimpleNamespace(item_ids=log.item_ids))
    model, ref = tiny(1).eval(), tiny(2).eval()
    noise = torch.rand(10, 8, generator=torch.Generator().manual_seed(0))
    for method in ("asft", "crr", "iql", "dpo", "ppo", "exact"):
        cfg, sums, start = Config(method=method, gamma=.5, num_samples=4), [], 0
        for indices in ([0, 1, 2], [0], [1], [2]):
            batch = interactions.batch(log, reward, rows, indices)
            of = lambda m: m(batch.items, batch.lengths, batch.times, batch.past_rewards)
            size = int((batch.targets > 0).sum())
            part_noise = noise if len(indices) == 3 else noise[start:start + size]
            start += size * (len(indices) == 1)
            f = facts(cfg, world, batch, of(model), torch.arange(13) / 5, part_noise, None, rows, indices)
            past = (ref, of(ref).flatten(0, 1)[batch.targets.flatten() > 0])
            sums.append(post_loss(cfg, model, past, past, f, 10, 7.0)[0].item())
        assert abs(sums[0] - sum(sums[1:])) < 1e-5 and sums[0] != 0, method


# -----------------------------------------------------------------------------
# Weights: what is BC, what is exponential weighting, what the data's voice shrinks to


def loss_and_gradients(cfg, advantages, rewards):
    """As a run has it: weights of the log, the denominator of the batch, the loss."""
    _, model, _, _, f = setting(method=cfg.method)
    weights = method_weights(cfg, advantages, rewards)
    denominator = float(weights.numpy().sum()) if cfg.method == "asft" and cfg.normalize == "batch" else 8.0
    loss, _ = post_loss(cfg, model, None, None, f._replace(weights=weights), 8, denominator)
    return weights, loss, gradients(loss, dict(model.named_parameters()) | dict(hidden=f.hidden))


def test_infinite_temperature_is_bc_and_no_baseline_is_exponential_weighting():
    rng = np.random.default_rng(0)
    advantages, rewards = (rng.normal(0, 3, 8).astype(np.float32) for _ in range(2))
    bitwise = lambda x, y: torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and all(torch.equal(x[2][name], y[2][name]) for name in x[2])
    bc = loss_and_gradients(Config(method="bc"), advantages, rewards)
    for normalize in ("batch", "none"):
        assert bitwise(loss_and_gradients(Config(method="asft", weight_temp=math.inf, normalize=normalize), advantages, rewards), bc)
    assert bitwise(loss_and_gradients(Config(method="exp_rsft", weight_temp=math.inf), advantages, rewards), bc)
    asft, exp = (loss_and_gradients(Config(method=m, weight_temp=.7, w_max=math.inf, normalize="none"), rewards, rewards) for m in ("asft", "exp_rsft"))
    assert bitwise(asft, exp) and not bitwise(asft, bc)
    batch = loss_and_gradients(Config(method="asft", weight_temp=.7, w_max=math.inf), rewards, rewards)           # normalised: the same up to one factor
    factor = 8 / exp[0].sum()
    assert all(torch.allclose(batch[2][name], factor * exp[2][name], rtol=1e-5, atol=1e-7) for name in exp[2])


@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_no_gradient_flows_through_weights():
    logits, advantages = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64, requires_grad=True)
    for weights in (asft_weights(advantages, .5, 2.0), exp_weights(advantages, .5)):
        assert not weights.requires_grad
        weighted_nll(logits, weights, 4).backward()
    assert advantages.grad is None and logits.grad is not None
    for method in ("awr", "iql", "crr"):                                    # critics learn from their own error alone: another policy, the same gradient
        cfg, model, past, before, f = setting(method=method)
        heads, found = {name: p for name, p in model.named_parameters() if name.startswith(("reward", "value"))}, []
        for _ in range(2):
            found.append(gradients(post_loss(cfg, model, past, before, f, 8, 8)[0], heads))
            model.items.weight.data.add_(torch.randn(I + 1, 8))
        assert all(torch.equal(found[0][name], found[1][name]) for name in heads) and any(g.abs().max() > .1 for g in found[0].values())


@pytest.mark.parametrize("scale", [.5, 1.0])
def test_ess_of_gaussian_rewards(scale):
    """(sum w)^2 / (n sum w^2) = exp(-sigma^2 / lambda^2): at lambda = sigma 37 % of the data speaks. Constant mu and V drop out."""
    n, sigma = 2_000_000, 1.5
    z = math.sqrt(2) * torch.erfinv((torch.arange(n, dtype=torch.float64) + .5) / n * 2 - 1)                      # quantiles of N(0, 1)
    for rewards, advantages in ((3 + sigma * z, sigma * z), ((3 + sigma * z).float(), (sigma * z - 2).float())):
        for weights in (asft_weights(advantages, sigma / scale, math.inf), exp_weights(rewards, sigma / scale)):
            assert abs(ranking.ess_share(weights) / math.exp(-scale ** 2) - 1) < .02


def test_two_contexts_with_one_policy():
    """Contexts logged at .9 and .1 pay 1 and 0 whatever is done. A policy that cannot tell them apart learns the habit of the happy one from exp(r),
    and nothing at all, .5, from A-SFT with the exact V."""
    actions, rewards = tensor(*[1] * 9, 0, 1, *[0] * 9), tensor(*[1] * 10, *[0] * 10)
    values = rewards                                                        # exact

    def learned(weights):
        logit = tensor(0).requires_grad_()
        for _ in range(300):                                                # the loss bends by at most 1/4: steps of 4 cannot overshoot
            loss = weighted_nll(nn.functional.logsigmoid(torch.where(actions > 0, logit, -logit)), weights, weights.sum())
            logit.data -= 4 * torch.autograd.grad(loss, logit)[0]
        return logit.sigmoid().item()
    for temp in (.3, 1.0, 3.0):
        habit = (.9 * math.exp(1 / temp) + .1) / (math.exp(1 / temp) + 1)
        assert abs(learned(exp_weights(rewards, temp)) - habit) < 1e-6 and habit > .55
        assert abs(learned(asft_weights(rewards - values, temp, 20.0)) - .5) < 1e-6
        assert abs(learned(asft_weights(rewards - .5, temp, math.inf)) - habit) < 1e-6                            # a constant V changes nothing


@pytest.mark.parametrize("more", [.2, -.2])
def test_noise_wins_where_the_formula_says(more):
    """Two items logged alike, b better by .5: the noisier a gets more weight exactly if sigma_a^2 - sigma_b^2 > 2 t (mu_b - mu_a), with any V."""
    temp, mu_a, mu_b, sigma_b = .8, 2.0, 2.5, .4
    sigma_a = math.sqrt(sigma_b ** 2 + 2 * temp * (mu_b - mu_a) + more)
    z = math.sqrt(2) * torch.erfinv((torch.arange(400_000, dtype=torch.float64) + .5) / 200_000 - 1)
    a, b = mu_a + sigma_a * z, mu_b + sigma_b * z
    for of in (lambda r: exp_weights(r, temp), lambda r: asft_weights(r - 2.25, temp, math.inf)):
        odds = (of(a).sum() / of(b).sum()).item()                           # what weighted_nll's optimum gives a over b
        logs = (mu_a - mu_b) / temp + (sigma_a ** 2 - sigma_b ** 2) / (2 * temp ** 2)
        assert abs(math.log(odds) - logs) < 2e-3 and (odds > 1) == (more > 0)


# -----------------------------------------------------------------------------
# Sampled softmax


def test_sampled_softmax_with_every_negative_is_the_full_one():
    cfg, model, _, _, f = setting(method="asft")
    others = torch.stack([torch.tensor([i for i in torch.randperm(I).tolist() if i + 1 != a]) + 1 for a in f.actions])
    tree = dict(items=model.items.weight, hidden=f.hidden)
    full, sampled = logps_of(cfg, model, f), logps_of(Config(softmax="sampled", num_negatives=I - 1), model, f._replace(negatives=others))
    assert torch.allclose(full, sampled, atol=1e-6)
    corrected = logps_of(Config(softmax="sampled", num_negatives=I - 1, logq=True), model, f._replace(negatives=others))
    assert torch.equal(sampled, corrected)                                  # log((I - 1) / (I - 1)) = 0
    ours, theirs = gradients(sampled.sum(), tree), gradients(full.sum(), tree)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=2e-6) for name in tree)
    hits = torch.cat([others, f.actions[:, None].expand(-1, 3)], 1)         # the item among its own negatives adds nothing
    assert torch.allclose(logps_of(Config(softmax="sampled"), model, f._replace(negatives=hits)), full, atol=1e-6)


def test_sampled_logps_by_hand():
    users, catalogue = tensor([2.0]), tensor([0.0], [math.log(2) / 2], [math.log(3) / 2])                         # exp(logit) 1, 2, 3
    logp = lambda negatives, **kw: sampled_logps(users, catalogue, torch.tensor([2]), torch.tensor([negatives]), 1.0, **kw).exp().item()
    assert abs(logp([1, 3]) - 2 / 6) < 1e-12 and abs(logp([3, 3]) - 2 / 8) < 1e-12 and logp([2, 2]) == 1
    assert abs(logp([3], logq=math.log(2)) - 2 / 8) < 1e-12
    assert abs(sampled_logps(users, catalogue, torch.tensor([2]), torch.tensor([[3]]), .5).exp().item() - 4 / 13) < 1e-12
    assert logp([1, 3, 3]) == logp([3, 1, 3])


def test_with_logq_the_mean_estimate_of_z_is_unbiased():
    """Over every choice of K negatives among the other items: the mean of exp(s_a) / pi_sampled(a) is Z. Without the correction it is short of it."""
    cfg, model, _, _, f = setting(method="asft")
    logits = model.logits(f.hidden).detach().double()
    own = logits.gather(1, f.actions[:, None] - 1)[:, 0]
    for num in (1, 2, 3):
        estimates = {True: [], False: []}
        for choice in product(range(I - 1), repeat=num):
            negatives = torch.tensor(choice).expand(8, num) + 1
            negatives = negatives + (negatives >= f.actions[:, None])       # of the other items
            for logq in (True, False):
                settings = Config(softmax="sampled", num_negatives=num, logq=logq)
                estimates[logq].append((own - logps_of(settings, model, f._replace(negatives=negatives)).detach().double()).exp())
        mean = {key: torch.stack(x).mean(0) / logits.exp().sum(1) for key, x in estimates.items()}
        assert (mean[True] - 1).abs().max() < 1e-5 and mean[False].max() < .9


# -----------------------------------------------------------------------------
# Identities


def test_cql_without_the_reward_term_is_bc():
    logps, f = torch.randn(9, dtype=torch.float64).requires_grad_(), torch.randn(9, dtype=torch.float64)
    loss = cql_loss(logps, f - logps.detach(), f, 9, .6)                    # Q = r: that term is 0, and so is its gradient
    bc = weighted_nll(logps, torch.ones(9, dtype=torch.float64), 9)
    (g,), (g_bc,) = torch.autograd.grad(loss, logps), torch.autograd.grad(bc, logps)
    assert torch.allclose(loss, .6 * bc) and torch.allclose(g, .6 * g_bc)


def test_minimum_of_ipo_and_mean_as_expectile():
    for beta in (.1, 1.0, 3.0):
        d = tensor(1 / (2 * beta)).requires_grad_()
        loss = ipo_loss(d, 1, beta)
        loss.backward()
        assert loss.item() == 0 and d.grad.item() == 0 and min(ipo_loss(d + s, 1, beta).item() for s in (-.1, .1)) > 1e-3
    targets = torch.randn(50, dtype=torch.float64)
    for expectile in (.5, .7, .9):
        v = targets.mean().clone().requires_grad_()
        expectile_loss(targets - v, expectile, 50).backward()
        assert abs(v.grad.item()) < 1e-12 if expectile == .5 else v.grad.item() < -.1             # a higher one pulls v up
    v = tensor(2).requires_grad_()                                          # of 0 and 3 the .8-expectile: .2 * 2.4 = .8 * .6
    expectile_loss(tensor(0, 3) - 2.4 / 2 * v, .8, 2).backward()
    assert abs(v.grad.item()) < 1e-12


def test_ratio_of_a_negative_sample_is_bounded_in_ecpo():
    ratios = tensor(.1, .5, .79, .81, 1, 1.19, 1.21, 1.29, 1.31, 2, 50)
    for A in (-1.0, 1.0):
        logps, plain = (ratios.log().requires_grad_() for _ in range(2))
        loss, zero = ecpo_loss(logps, torch.zeros(11), torch.full((11,), A), 1, .2, .1), ppo_loss(plain, torch.zeros(11), torch.full((11,), A), 1, .2)
        loss.backward(), zero.backward()
        # one by one: for A < 0 the value is max(ratio, .8) and its gradient ratio above .8, both stop growing at 1.3
        values = [(max(min(x, 1.3), .8) if A < 0 else min(x, 1.2)) * A for x in ratios.tolist()]
        slopes = [(min(x, 1.3) * (x > .8) if A < 0 else x * (x < 1.2)) * A for x in ratios.tolist()]
        assert abs(loss.item() + sum(values)) < 1e-9 and torch.allclose(logps.grad, -tensor(*slopes))
        assert (abs(zero.item() - loss.item()) < 1e-9) == (A > 0)
    assert torch.allclose(plain.grad, logps.grad)                           # A > 0: no difference


def test_on_policy_all_clip_variants_have_one_gradient():
    logps, A = torch.randn(6, 4, dtype=torch.float64).requires_grad_(), torch.randn(6, 4, dtype=torch.float64)
    policy_gradient = -A / 24                                               # of - sum A logp / num
    for clip in (.05, .2, 1e9):
        for loss in (ppo_loss(logps, logps.detach(), A, 24, clip), ecpo_loss(logps, logps.detach(), A, 24, clip, .1)):
            assert abs(loss.item() + A.mean().item()) < 1e-12               # every ratio is 1
            assert torch.allclose(torch.autograd.grad(loss, logps)[0], policy_gradient)
    cfg, model, past, _, f = setting(method="ppo", kl_coef=0.0)
    loss, found = post_loss(cfg, model, past, (model, f.hidden.detach()), f, 8, 8)
    assert found["clip_fraction"] == 0 and abs(loss.item()) < 1e-6          # ratio 1, advantages around their mean


class Rewards(nn.Module):
    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(q)                                            # (M, X, I)

    def at(self, h, items):
        return (h @ self.q)[:, torch.arange(len(h)), items - 1]

    def catalogue(self, h):
        return h @ self.q.mean(0)


class Values(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.v = nn.Parameter(v)                                            # (M, X)

    def forward(self, h):
        return self.v @ h.t()


class Tabular(nn.Module):
    """What post_loss asks of a model, for X contexts with free logits (X, I), Q and v: a state is a one-hot row."""
    def __init__(self, logits, q=None, members=2):
        super().__init__()
        self.table = nn.Parameter(logits.clone())
        self.reward = Rewards((torch.zeros_like(logits) if q is None else q).expand(members, -1, -1).clone())
        self.value = Values(torch.zeros(members, len(logits), dtype=logits.dtype))
        self.config = SimpleNamespace(num_items=logits.shape[1], temperature=1.0)

    def users(self, hidden):
        return hidden @ self.table

    def catalogue(self):
        return torch.eye(self.table.shape[1], dtype=self.table.dtype)

    def logits(self, hidden):
        return hidden @ self.table

    def judged(self, hidden):
        return hidden

    def policy(self):
        return self.table.detach().softmax(1)


def test_exact_gradient_is_the_mean_of_sampled_ones():
    """100,000 draws of one policy, within 4 standard errors, for every logit: pi_j (r_j - E r). A baseline that holds the sample itself shrinks the
    mean gradient of G samples by (G - 1) / G and turns it nowhere."""
    generator = torch.Generator().manual_seed(0)
    logits, rewards = tensor(1.0, .2, -.5, 0, -2), tensor(.3, 1.5, -1, .4, 3)
    pi = logits.softmax(0)
    exact = pi * (rewards - (pi * rewards).sum())
    num = 100_000
    leaf = logits.expand(num, 5).clone().requires_grad_()
    logp = leaf.log_softmax(1)
    items = draw(logp.detach(), torch.rand(num, 1, generator=generator)) - 1
    logps = logp.gather(1, items)
    ppo_loss(logps, logps.detach(), rewards[items], 1, .2).backward()
    error = leaf.grad.std(0) / num ** .5
    assert ((-leaf.grad.mean(0) - exact).abs() < 4 * error).all() and (error < .01).all() and exact.abs().max() > .1
    # through post_loss: the states are the logits themselves
    groups, size = 25_000, 4
    model, ref = Tabular(torch.eye(5)), Tabular(torch.zeros(5, 5), rewards.float().expand(5, 5))
    ref.reward.catalogue = lambda h: rewards.float().expand(len(h), 5)
    hidden = logits.float().expand(groups, 5).clone().requires_grad_()
    f = Facts(hidden, None, None, None, None, torch.zeros(groups, 5, dtype=torch.bool), torch.rand(groups, 2 * size, generator=generator), None)
    found = {}
    for method in ("ppo", "exact"):
        loss, _ = post_loss(Config(method=method, num_samples=size, kl_coef=0.0), model, (ref, hidden), (model, hidden.detach()), f, 1, 1.0)
        found[method] = -torch.autograd.grad(loss, hidden)[0].double()
    error = found["ppo"].std(0) / groups ** .5
    assert torch.allclose(found["exact"], exact.expand(groups, 5), atol=1e-6)
    assert ((found["ppo"].mean(0) * size / (size - 1) - exact).abs() < 4 * error * size / (size - 1)).all() and (error < .01).all()


# -----------------------------------------------------------------------------
# Three contexts, four items, a reward model without error: every method reaches the optimum that theory names


LOGGED = torch.tensor([[8, 4, 2, 2], [2, 6, 6, 2], [4, 4, 2, 6]])           # how often an item was logged in a context
MU = tensor([1, 2, 0, 3], [2, .5, 1, 1.5], [0, .5, 2.5, 1])
PI_LOG = LOGGED / LOGGED.sum(1, keepdim=True).double()
normalised = lambda x: x / x.sum(1, keepdim=True)


def world(spread=0.0):
    """-> Facts of the log; half of an item's rewards in a context are mu + spread, half mu - spread."""
    context, item = (torch.repeat_interleave(t.flatten(), LOGGED.flatten()) for t in torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"))
    sign = torch.arange(len(item)) % 2 * 2 - 1                              # counts are even
    return Facts(nn.functional.one_hot(context, 3).double(), item + 1, MU[context, item] + sign * spread, None, torch.full((len(item),), -1),
                 torch.zeros(len(item), 4, dtype=torch.bool), None, None), context


def minimise(model, loss, steps=0, lr=.15):
    """The policy at the minimum: by L-BFGS, or in so many steps of Adam where the objective moves with the policy."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(.8, .95)) if steps else \
        torch.optim.LBFGS(model.parameters(), max_iter=80, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        found = loss()
        found.backward()
        return found
    for step in range(steps or 1):
        optimizer.param_groups[0]["lr"] = lr * min(1, 2 * (1 - step / steps)) if steps else 1.0
        optimizer.step(closure)
    return model.policy()


def near(policy, target, tolerance=2e-3):
    assert (policy - target).abs().max() < tolerance, (policy, target)
    assert (PI_LOG - target).abs().max() > 30 * tolerance                  # and BC is far from it


@pytest.mark.parametrize("method", ["asft", "reward_bc", "exp_rsft"])
def test_weighted_methods_reach_the_log_times_the_mean_weight(method):
    f, context = world(spread=.8)
    values = tensor(1, -1, 2)[context]                                      # V(x) cancels in each context, where nothing is clipped
    for settings in (dict(w_max=3.0), dict(w_max=math.inf))[:2 if method == "asft" else 1]:
        cfg = Config(method=method, weight_temp=1.5, **settings)
        weights = method_weights(cfg, (f.rewards - values).float().numpy(), f.rewards.float().numpy()).double()
        one = lambda r: {"asft": torch.minimum(((r - tensor(1, -1, 2)[:, None]) / 1.5).exp(), tensor(cfg.w_max)), "reward_bc": r.clamp(min=0),
                         "exp_rsft": (r / 1.5).exp()}[method]
        target = normalised(PI_LOG * (one(MU + .8) + one(MU - .8)) / 2)
        model = Tabular(torch.zeros_like(MU))
        near(minimise(model, lambda: post_loss(cfg, model, None, None, f._replace(weights=weights), len(values), float(weights.sum()))[0]), target)
        if cfg.w_max == math.inf:
            near(target, normalised(PI_LOG * (MU / 1.5).exp()), 1e-9)       # equal noise on all items: the tilt of the log


def test_awr_iql_and_crr_reach_their_weighted_policies():
    """Critics are learned beside the policy. awr: v = E[r|x]; iql: v an expectile of Q over the log; crr: v = E_pi Q, which cancels in each context."""
    f, context = world(spread=.8)
    n = len(context)
    v = (PI_LOG * MU).sum(1, keepdim=True)
    cut = lambda r: ((r - v) / 1.5).exp().clamp(max=2.0)
    model = Tabular(torch.zeros_like(MU))
    cfg = Config(method="awr", weight_temp=1.5, w_max=2.0)
    near(minimise(model, lambda: post_loss(cfg, model, None, None, f, n, None)[0], 350), normalised(PI_LOG * (cut(MU + .8) + cut(MU - .8)) / 2))
    assert torch.allclose(model.value.v, v.t().expand(2, 3), atol=2e-3)

    model, cfg = Tabular(torch.zeros_like(MU)), Config(method="iql", weight_temp=1.5, expectile=.8)
    near(minimise(model, lambda: post_loss(cfg, model, None, (model, None), f, n, None)[0], 350), normalised(PI_LOG * (MU / 1.5).exp()))
    gaps = MU - model.value.v[0, :, None].detach()
    assert torch.allclose(model.reward.q.detach(), MU.expand(2, 3, 4), atol=5e-3)
    assert (PI_LOG * torch.where(gaps > 0, .8, .2) * gaps).sum(1).abs().max() < 2e-3 and (gaps > -1.5 * math.log(100)).all()

    model, cfg = Tabular(torch.zeros_like(MU)), Config(method="crr", weight_temp=1.5, w_max=math.inf)
    near(minimise(model, lambda: post_loss(cfg, model, None, None, f, n, None)[0], 350), normalised(PI_LOG * (MU / 1.5).exp()))
    assert torch.allclose(model.reward.q.detach(), MU.expand(2, 3, 4), atol=5e-3)
    model, cfg = Tabular(torch.zeros_like(MU)), Config(method="crr", weight_temp=0.0)             # better than the policy: again and again, the best
    near(minimise(model, lambda: post_loss(cfg, model, None, None, f, n, None)[0], 250), nn.functional.one_hot(MU.argmax(1), 4).double(), .02)


def test_discounted_values_walk_along_a_users_decisions():
    """Users meet contexts 0, 1, 2 in turn; Q(x, a) = r + gamma v(next), and the last one, cut off, keeps the Q that it has."""
    f, _ = world()
    per = 24                                                                # 24 users; in each context every item six times
    context, item = torch.arange(3).repeat(per), torch.arange(per).repeat_interleave(3) % 4
    f = Facts(nn.functional.one_hot(context, 3).double(), item + 1, MU[context, item], None, torch.where(context < 2, torch.arange(3 * per) + 1, -1),
              torch.zeros(3 * per, 4, dtype=torch.bool), None, None)
    start = tensor([0] * 4, [0] * 4, [4, 2, 1, 1])
    model, cfg = Tabular(torch.zeros_like(MU), start), Config(method="iql", gamma=.9, expectile=.5, weight_temp=2.0)
    minimise(model, lambda: post_loss(cfg, model, None, (model, None), f, 3 * per, None)[0], 400)
    v2 = 2.0
    q1 = MU[1] + .9 * v2
    q0 = MU[0] + .9 * q1.mean()
    assert torch.equal(model.reward.q[0, 2].detach(), start[2])
    assert torch.allclose(model.value.v[0].detach(), torch.stack([q0.mean(), q1.mean(), tensor(v2)[0]]), atol=5e-3)
    assert torch.allclose(model.reward.q[0, :2].detach(), torch.stack([q0, q1]), atol=1e-2)


def test_cql_is_stationary_where_fit_and_penalty_balance():
    """For each item: pi_log (Q - r) + alpha (pi - pi_log) = 0, pi = softmax(Q): BC for a large alpha, and with a small one Q = r, a policy exp(r)."""
    f, context = world(spread=.8)                                           # noise is averaged by the square
    found = {}
    for alpha in (1e-3, .5, 1e3):
        model, cfg = Tabular(PI_LOG.log()), Config(method="cql", cql_alpha=alpha)
        logits = minimise(model, lambda: post_loss(cfg, model, None, None, f, len(context), None)[0] / max(1, alpha)).log()
        q = model.value.v[0].detach()[:, None] + logits
        assert (PI_LOG * (q - MU) + alpha * (logits.exp() - PI_LOG)).abs().max() < 5e-3 * max(1, alpha ** .5)
        found[alpha] = logits.exp()
    near(found[1e-3], MU.softmax(1), 5e-3)
    assert (found[1e3] - PI_LOG).abs().max() < 5e-3 < (found[.5] - PI_LOG).abs().max()


def each_context():
    """Facts with every context once; in context 2 the item 3, the best there, was seen. And what was seen."""
    seen = torch.zeros(3, 4, dtype=torch.bool)
    seen[2, 2] = True
    return Facts(torch.eye(3, dtype=torch.float64), None, None, None, None, seen, None, None), seen


def test_exact_reaches_the_tilt_and_without_kl_the_best_item():
    f, seen = each_context()
    ref = Tabular(PI_LOG.log(), MU)
    for kl_coef in (.5, 2.0):
        model, cfg = Tabular(PI_LOG.log()), Config(method="exact", kl_coef=kl_coef)
        minimise(model, lambda: post_loss(cfg, model, (ref, f.hidden), None, f, 3, None)[0])
        tilt = normalised((PI_LOG * (MU / kl_coef).exp()).masked_fill(seen, 0))
        near(ranking.log_policy(model.table.detach(), seen).exp(), tilt)
        assert torch.allclose(ranking.log_policy(PI_LOG.log() + MU / kl_coef, seen).exp().double(), tilt, atol=1e-6)        # what --method=tilt evaluates
        assert torch.equal(model.table[2, 2].detach(), PI_LOG[2, 2].log())                        # a seen item takes no gradient
    model, cfg = Tabular(PI_LOG.log()), Config(method="exact", kl_coef=0.0)
    minimise(model, lambda: post_loss(cfg, model, (ref, f.hidden), None, f, 3, None)[0], 150)
    near(ranking.log_policy(model.table.detach(), seen).exp(), nn.functional.one_hot(torch.tensor([3, 0, 3]), 4), .01)


@pytest.mark.parametrize("method", ["ppo", "ecpo"])
def test_sampled_policy_gradients_reach_the_tilt(method):
    """With many evenly spaced draws, on-policy, the gradient is that of `exact`; ecpo's rewards are in units of their spread under the policy itself."""
    samples, kl_coef = 400, 1.5
    f, seen = each_context()
    f = f._replace(noise=((torch.arange(samples) + .5) / samples).repeat(3, 2))
    ref, model = Tabular(PI_LOG.log(), MU), Tabular(PI_LOG.log())
    cfg = Config(method=method, kl_coef=kl_coef, num_samples=samples)

    def step():
        return post_loss(cfg, model, (ref, f.hidden), (model, f.hidden), f, 3, None)[0]
    minimise(model, step, 250)
    policy = ranking.log_policy(model.table.detach(), seen).exp().double()
    mean = (policy * MU).sum(1, keepdim=True)
    spread = (policy * (MU - mean) ** 2).sum(1, keepdim=True).sqrt() if method == "ecpo" else 1.0
    near(policy, normalised((PI_LOG * (MU / (kl_coef * spread)).exp()).masked_fill(seen, 0)), 5e-3)


def test_preference_methods_prefer_the_better_item():
    """Two items left to choose from, pairs of both: ipo stops where the log-ratio has moved by 1 / (2 beta), dpo goes on."""
    f, _ = each_context()
    seen = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1]]).bool()
    f = f._replace(seen=seen, noise=torch.tensor([.01, .99]).expand(3, 2))
    ref, better, worse = Tabular(PI_LOG.log(), MU), torch.tensor([1, 2, 2]), torch.tensor([0, 1, 1])
    at = lambda x, items: x.gather(1, items[:, None])[:, 0]
    odds = lambda model: (at(model.table, better) - at(model.table, worse) - at(ref.table, better) + at(ref.table, worse)).detach()
    found = {}
    for method, beta in product(("ipo", "dpo"), (.25, 1.0)):
        model, cfg = Tabular(PI_LOG.log()), Config(method=method, pref_beta=beta, num_samples=1)
        start, stats = post_loss(cfg, model, (ref, f.hidden), None, f, 3, None)
        assert stats["accepted"] == 1 and stats["margin"] == 0 and abs(start.item() - (math.log(2) if method == "dpo" else 1 / (4 * beta ** 2))) < 1e-6
        minimise(model, lambda: post_loss(cfg, model, (ref, f.hidden), None, f, 3, None)[0], 0 if method == "ipo" else 150)
        found[method, beta] = odds(model)
    for beta in (.25, 1.0):
        assert torch.allclose(found["ipo", beta], torch.full((3,), 1 / (2 * beta), dtype=torch.float64), atol=2e-3)
        assert (found["dpo", beta] > 4).all()
    # over all items: the best gains on every other, the worst loses
    f, _ = each_context()
    f = f._replace(seen=torch.zeros(3, 4, dtype=torch.bool), noise=torch.rand(3, 32, generator=torch.Generator().manual_seed(0)))
    for method in ("dpo", "ipo"):
        model, cfg = Tabular(PI_LOG.log()), Config(method=method, num_samples=16)
        policy = minimise(model, lambda: post_loss(cfg, model, (ref, f.hidden), None, f, 3, None)[0], 100)
        moved = (policy / PI_LOG).log()
        assert torch.equal(moved.argmax(1), MU.argmax(1)) and torch.equal(moved.argmin(1), MU.argmin(1))
    # opinions as far apart as their spreads make no pair, and then there is nothing to learn
    noisy = Tabular(PI_LOG.log(), torch.stack([MU - 5, MU + 5]))
    loss, stats = post_loss(cfg, model, (noisy, f.hidden), None, f, 3, None)
    assert stats["accepted"] == 0 and loss.item() == 0 and (torch.autograd.grad(loss, model.table)[0] == 0).all()


# -----------------------------------------------------------------------------
# Draws


def test_draws_follow_the_policy():
    p = tensor([0, .4, 0, .25, .2, .1, .05, 0])
    even = ((torch.arange(1000) + .5) / 1000)[None]
    counts = torch.bincount(draw(p.log(), even)[0] - 1, minlength=8)
    assert ((counts - 1000 * p[0]).abs() <= 1).all()                        # evenly spaced u: right to one draw
    u = torch.rand(1, 20000, generator=torch.Generator().manual_seed(0))
    items = draw(p.log().float(), u)
    counts, expected_counts = torch.bincount(items[0] - 1, minlength=8)[p[0] > 0], 20000 * p[p > 0]
    assert ((counts - expected_counts) ** 2 / expected_counts).sum() < 23.5                       # chi-square, 4 degrees of freedom, 1 in 10,000
    assert torch.equal(items, draw(p.log().float(), u))
    order = torch.randperm(20000)
    assert torch.equal(draw(p.log().float(), u[:, order]), items[:, order])                       # each u for itself


def test_never_an_item_of_probability_zero():
    edge = torch.tensor([0.0, 1e-30, 2 ** -24, .5, 1 - 2 ** -24, 1.0])      # fp32 rand is below 1; 1.0 is one step worse
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 50, 4000):
        logits, seen = torch.randn(64, size, generator=generator) * 4, torch.rand(64, size, generator=generator) < .5
        seen[:, 0] |= torch.arange(64) % 2 == 0                             # the first, the last, all but one
        seen[:, -1] |= torch.arange(64) % 3 == 0
        seen[5] = True
        seen[torch.arange(64), torch.randint(size, (64,), generator=generator)] = False
        logp = ranking.log_policy(logits, seen)
        items = draw(logp, torch.cat([edge.expand(64, 6), torch.rand(64, 10, generator=generator)], 1))
        assert items.dtype == torch.int64 and items.min() >= 1 and items.max() <= size
        assert not seen.gather(1, items - 1).any()
        rows = torch.randperm(64)                                           # a row's items depend on nothing but the row
        assert torch.equal(draw(logp[rows], edge.expand(64, 6)), items[rows, :6])


def test_sums_over_the_catalogue_ignore_order_and_seen_items():
    generator = torch.Generator().manual_seed(0)
    logits, other, table = (torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    seen = torch.rand(5, 9, generator=generator) < .4
    leaf = logits.clone().requires_grad_()
    logp, ref_logp = (x.masked_fill(seen, -math.inf).log_softmax(1) for x in (leaf, other))
    value, divergence = expected(logp, table), kl(logp, ref_logp)
    order = torch.randperm(9)
    assert torch.allclose(expected(logp[:, order], table[:, order]), value) and torch.allclose(kl(logp[:, order], ref_logp[:, order]), divergence)
    assert torch.equal(kl(logp, logp), torch.zeros(5, dtype=torch.float64)) and (divergence > 0).all()
    (value.sum() + divergence.sum()).backward()
    p, advantage = logp.detach().exp(), table + (logp - ref_logp).detach().masked_fill(seen, 0)
    assert torch.allclose(leaf.grad, p * (advantage - (p * advantage).sum(1, keepdim=True))) and (leaf.grad[seen] == 0).all()      # and no nan
