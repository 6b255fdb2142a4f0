"""The algorithms of train_rl.py: losses and advantages against float64 loops written from the papers, KL forms by enumeration, bandits with known
optima, settings. test_train_rl_runs.py has the script as a whole."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_rl
from data.packing import micro_batches, sequence_batch, token_offsets
from kernels import gae
from model import Prompts, Transformer, config_for_size
from train_rl import (METHODS, Config, group_advantages, is_weights, kl_penalty, overlong_penalty, policy_loss, ppo_advantages, resolve,
                      reward_to_go, token_logps, token_scale, value_loss, whiten)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -----------------------------------------------------------------------------
# Advantages


def test_group_advantages_by_hand():
    """Rewards 1, 0, 0, 1: mean 1/2, sample deviation sqrt(1/3); leaving oneself out, 4/3 of the centred reward."""
    rewards, valid = torch.tensor([[1.0, 0, 0, 1]]).double(), torch.ones(1, 4, dtype=torch.bool)
    assert group_advantages(rewards, valid).tolist() == [[.5, -.5, -.5, .5]]
    std = math.sqrt(1 / 3)
    assert torch.allclose(group_advantages(rewards, valid, scale="group"), torch.tensor([[.5, -.5, -.5, .5]]).double() / (std + 1e-4))
    assert torch.allclose(group_advantages(rewards, valid, "others"), torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3]]).double())
    assert group_advantages(rewards, valid, "none").tolist() == rewards.tolist()


def test_a_failed_grader_leaves_the_group_before_the_mean():
    """1, failed, 0: the mean is of two, and the failed one gets nothing; alone in its group, a sample has nothing to compare with."""
    rewards = torch.tensor([[1.0, float("nan"), 0.0], [1.0, float("nan"), float("nan")]]).double()
    valid = torch.tensor([[True, False, True], [True, False, False]])
    assert group_advantages(rewards, valid).tolist() == [[.5, 0, -.5], [0, 0, 0]]
    assert group_advantages(rewards, valid, "others").tolist() == [[1, 0, -1], [0, 0, 0]]


@pytest.mark.parametrize("baseline, scale", [("mean", "none"), ("mean", "group"), ("others", "none")])
def test_group_advantages_against_a_loop(baseline, scale):
    rewards, valid = draws(7, 5), draws(7, 5, seed=1) > -.8
    found = group_advantages(rewards, valid, baseline, scale)
    for i in range(7):
        mine = [j for j in range(5) if valid[i, j]]
        for j in range(5):
            others = [float(rewards[i, k]) for k in mine if k != j or baseline == "mean"]
            want = 0.0 if j not in mine or len(mine) < 2 else float(rewards[i, j]) - sum(others) / len(others)
            if scale == "group" and want:
                want /= np.std([float(rewards[i, k]) for k in mine], ddof=1) + 1e-4
            assert abs(float(found[i, j]) - want) < 1e-12


def test_permuting_samples_and_groups_permutes_advantages():
    rewards, valid = draws(4, 6), torch.ones(4, 6, dtype=torch.bool)
    within, across = torch.randperm(6), torch.randperm(4)
    for baseline, scale in (("mean", "none"), ("mean", "group"), ("others", "none")):
        a = group_advantages(rewards, valid, baseline, scale)
        assert torch.allclose(group_advantages(rewards[across][:, within], valid, baseline, scale), a[across][:, within], atol=1e-14)


def test_aggregation_by_hand():
    """Sequences of 2 and 8 tokens, 10 in all, room for 16 each."""
    lengths = torch.tensor([2, 8])
    assert token_scale(lengths, "token_mean", 10, 2, 16).tolist() == [.1, .1]
    assert token_scale(lengths, "seq_mean", 10, 2, 16).tolist() == [1 / 4, 1 / 16]
    assert token_scale(lengths, "constant", 10, 2, 16).tolist() == [1 / 32, 1 / 32]


def test_overlong_penalty():
    """Limit 100, the last fifth is soft: 0 at 80, -1/2 at 90, -1 at 100 and when cut."""
    assert [overlong_penalty(n, False, 100, .2) for n in (10, 80, 90, 100)] == [0, 0, -.5, -1] and overlong_penalty(100, True, 100, .2) == -1


# -----------------------------------------------------------------------------
# GAE


def test_gae_by_hand():
    """gamma .9, lam .8, two steps: delta_1 = 2 - .25 = 1.75, delta_0 = 1 + .9 · .25 - .5 = .725, A_0 = .725 + .72 · 1.75 = 1.985."""
    advantages, returns = gae(torch.tensor([[1.0, 2]]), torch.tensor([[.5, .25, float("nan")]]), torch.tensor([[False, True]]), .9, .8)
    assert torch.allclose(advantages, torch.tensor([[1.985, 1.75]])) and torch.allclose(returns, torch.tensor([[2.485, 2.0]]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_gae_against_a_loop_with_resets_and_garbage(rows, steps, gamma, lam, seed):
    rewards, values, dones = draws(rows, steps, seed=seed), draws(rows, steps + 1, seed=seed + 1), draws(rows, steps, seed=seed + 2) > .7
    dones[:, -1] = True
    values[:, -1] = float("nan")                                    # after the last done
    advantages, returns = gae(rewards, values, dones, gamma, lam)
    for b in range(rows):
        carried = 0.0
        for t in range(steps - 1, -1, -1):
            following, carried = (0.0, 0.0) if dones[b, t] else (float(values[b, t + 1]), carried)
            carried = float(rewards[b, t]) + gamma * following - float(values[b, t]) + gamma * lam * carried
            assert abs(float(advantages[b, t]) - carried) < 1e-10 and abs(float(returns[b, t]) - carried - float(values[b, t])) < 1e-10


def test_gae_refuses_shapes_and_rates():
    with pytest.raises(ValueError, match=r"values \(B, T \+ 1\)"):
        gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), 1, 1)
    with pytest.raises(ValueError, match="gamma"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.bool), 1.5, 1)


@pytest.mark.parametrize("lam, lam_value", [(.9, .9), (.9, 1.0), (1.0, 1.0)])
def test_ppo_advantages_of_ragged_sequences(lam, lam_value):
    """Flat tokens of sequences of 3, 1 and 5, a value added at the second's cut: a loop over each sequence alone."""
    cfg, offsets = Config(gamma=.97, lam=lam, lam_value=lam_value), np.array([0, 3, 4, 9])
    rewards, values, last = draws(9), draws(9, seed=1), torch.tensor([0.0, .7, 0.0]).double()
    advantages, returns = ppo_advantages(rewards, values, offsets, last, cfg)
    for s in range(3):
        carried = [0.0, 0.0]
        for t in range(offsets[s + 1] - 1, offsets[s] - 1, -1):
            end = t == offsets[s + 1] - 1
            delta = float(rewards[t]) + (.97 * float(last[s]) if end else .97 * float(values[t + 1])) - float(values[t])
            carried = [delta + .97 * lmb * (0.0 if end else c) for lmb, c in zip((lam, lam_value), carried)]
            assert abs(float(advantages[t]) - carried[0]) < 1e-6
            assert abs(float(returns[t]) - carried[1] - float(values[t])) < 1e-6


def test_lam_by_length():
    """VAPO's 1 - 1 / (.5 n) for answers of 1, 2, 3 and 8 tokens, 0 where that is below 0; the critic's targets keep lam_value."""
    lengths = [1, 2, 3, 8]
    offsets, values = np.concatenate([[0], np.cumsum(lengths)]), draws(14, seed=1)
    rewards, last = draws(14), torch.zeros(4).double()
    advantages, returns = ppo_advantages(rewards, values, offsets, last, Config(gamma=.9, lam_length=.5))
    for a, b, lam in zip(offsets, offsets[1:], (0, 0, 1 / 3, .75)):
        alone = ppo_advantages(rewards[a:b], values[a:b], np.array([0, b - a]), last[:1], Config(gamma=.9, lam=lam))
        assert torch.allclose(advantages[a:b], alone[0], atol=1e-12, rtol=0) and torch.allclose(returns[a:b], alone[1], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"lam: expected a number or \(2,\)"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.bool), 1, torch.ones(3))
    with pytest.raises(ValueError, match="within"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.bool), 1, torch.tensor([.5, 1.5]))


def test_whiten_by_track():
    x, tracks = torch.tensor([1.0, 3.0, 10.0, 30.0, 50.0]), torch.tensor([0, 0, 1, 1, 1])
    out = whiten(x, tracks, 2)
    assert torch.allclose(out, torch.tensor([-1, 1, -20 * 2 ** .5, 0, 20 * 2 ** .5]) / torch.tensor([2 ** .5, 2 ** .5, 20 * 2 ** .5, 1, 20 * 2 ** .5]), atol=1e-6)
    assert torch.allclose(whiten(x, tracks, 2, center=False)[:2], x[:2] / (2 ** .5 + 1e-4))


# -----------------------------------------------------------------------------
# Losses


def batch_of_tokens(seed=0, spread=.3):
    """Tokens of sequences of 4, 1 and 6: log-probabilities, old ones, advantages, denominators, owners."""
    owners = torch.tensor([0] * 4 + [1] + [2] * 6)
    logps, old = -draws(11, seed=seed).abs() - .1, None
    old = logps + spread * draws(11, seed=seed + 1)
    return logps.requires_grad_(), old, draws(11, seed=seed + 2), draws(11, seed=seed + 3).abs() / 11, owners


def oracle_policy_loss(logps, old, advantages, scale, owners, ratio, low, high, cap, dual):
    """The papers' equations, token by token, in plain Python on autograd scalars."""
    total = 0.0
    for t in range(len(logps)):
        mine = [u for u in range(len(logps)) if owners[u] == owners[t]]
        log_ratio = sum(logps[u] - old[u] for u in mine) / len(mine) if ratio == "sequence" else logps[t] - old[t]
        rho, a = log_ratio.exp(), float(advantages[t])
        if ratio == "cispo":
            gain = min(float(rho), cap) * a * logps[t]
        else:
            held = 1 - low if rho < 1 - low else 1 + high if rho > 1 + high else rho
            gain = rho * a if (rho * a).item() <= float(held) * a else held * a
            if dual and a < 0 and float(gain) < dual * a:
                gain = torch.tensor(dual * a, dtype=torch.float64)
        total = total - float(scale[t]) * gain
    return total


@pytest.mark.parametrize("ratio, low, high, dual", [("token", .2, .2, 0.0), ("token", .2, .28, 0.0), ("token", .1, .1, 1.2), ("sequence", .02, .01, 0.0), ("cispo", .2, .2, 0.0)])
@pytest.mark.parametrize("seed", range(4))
def test_policy_loss_and_gradient_against_the_papers(ratio, low, high, dual, seed):
    logps, old, advantages, scale, owners = batch_of_tokens(seed)
    loss, clipped = policy_loss(logps, old, advantages, scale, owners, ratio=ratio, clip_low=low, clip_high=high, cap=1.1, dual_clip=dual)
    want = oracle_policy_loss(logps, old, advantages, scale, owners, ratio, low, high, 1.1, dual)
    assert abs(float(loss) - float(want)) < 1e-10 and 0 < int(clipped.sum()) < 11
    mine, = torch.autograd.grad(loss, logps)
    theirs, = torch.autograd.grad(want, logps)
    assert torch.allclose(mine, theirs, atol=1e-10)


def test_policy_loss_by_hand():
    """One token, rho = 1.5, A = 2, clip at 1.2: -2.4, and no gradient. With A = -2: -(-3) = 3, and a gradient of 3."""
    logps, old, one = torch.tensor([math.log(1.5)], dtype=torch.float64).requires_grad_(), torch.zeros(1).double(), torch.ones(1).double()
    for advantage, want, gradient in ((2.0, -2.4, 0.0), (-2.0, 3.0, 3.0)):
        loss, _ = policy_loss(logps, old, one * advantage, one, torch.zeros(1, dtype=torch.int64), clip_low=.2, clip_high=.2)
        assert abs(float(loss) - want) < 1e-12 and abs(float(torch.autograd.grad(loss, logps)[0]) - gradient) < 1e-12


def test_on_policy_all_clips_give_one_gradient():
    """At rho = 1: -c A d(log p), whatever the ratio, the bounds and the caps; off policy they differ."""
    _, _, advantages, scale, owners = batch_of_tokens()
    logps = (-draws(11).abs()).requires_grad_()
    ways = [dict(ratio="token"), dict(ratio="token", clip_low=.1, clip_high=.5, dual_clip=3.0), dict(ratio="cispo")]
    gradients = [torch.autograd.grad(policy_loss(logps, logps.detach(), advantages, scale, owners, **way)[0], logps)[0] for way in ways]
    for g in gradients:
        assert torch.allclose(g, -scale * advantages, atol=1e-14)
    # GSPO's advantage and denominator are the sequence's: then its ratio, too, gives the same
    per_sequence, even = advantages[[0, 4, 5]][owners], token_scale(torch.tensor([4, 1, 6]), "seq_mean", 11, 3, 6)[owners]
    loss = policy_loss(logps, logps.detach(), per_sequence, even, owners, ratio="sequence", clip_low=3e-4, clip_high=4e-4)[0]
    assert torch.allclose(torch.autograd.grad(loss, logps)[0], -even * per_sequence, atol=1e-14)
    off = [torch.autograd.grad(policy_loss(logps, logps.detach() - .35, advantages, scale, owners, **way)[0], logps)[0] for way in ways]
    assert not torch.allclose(off[0], off[1]) and not torch.allclose(off[0], off[2])


def test_value_loss_against_the_paper():
    values, old, returns, scale = draws(9).requires_grad_(), draws(9, seed=1), draws(9, seed=2), draws(9, seed=3).abs()
    loss, held = value_loss(values, old, returns, scale, .3)
    want = sum(float(scale[t]) / 2 * max((values[t] - returns[t]) ** 2, (old[t] + max(-.3, min(.3, float(values[t] - old[t]))) - returns[t]) ** 2)
               if abs(float(values[t] - old[t])) > .3 else scale[t] / 2 * (values[t] - returns[t]) ** 2 for t in range(9))
    assert abs(float(loss) - float(want)) < 1e-12 and 0 < int(held.sum()) < 9
    gradient, = torch.autograd.grad(loss, values)
    assert torch.allclose(gradient, torch.where(held, 0.0, scale * (values - returns).detach()), atol=1e-12)


def test_sampler_weights():
    """Trainer e^2 times the sampler: capped at 2. Geometric mean over a sequence: ln 4 and 0 give ln 2, kept; ln 4 alone is masked."""
    drift, owners = torch.tensor([2.0, -.5]), torch.tensor([0, 0])
    assert torch.allclose(is_weights(drift, owners, Config()), torch.tensor([2.0, math.exp(-.5)]))
    drift, owners = torch.tensor([math.log(3.9), 0.0, math.log(4)]), torch.tensor([0, 0, 1])
    assert is_weights(drift, owners, Config(is_mode="seq_mask")).tolist() == [1, 1, 0]
    assert is_weights(drift, owners, Config(is_mode="none")).tolist() == [1, 1, 1]


# -----------------------------------------------------------------------------
# KL: which form has which gradient, by enumeration of a distribution over five


def kl_gradients(form):
    theta, other = draws(5).requires_grad_(), draws(5, seed=1)
    logps, ref = theta.log_softmax(0), other.log_softmax(0)
    probs = logps.detach().exp()
    forward = torch.autograd.grad((logps.exp() * (logps - ref)).sum(), theta, retain_graph=True)[0]           # KL(p || ref)
    backward = torch.autograd.grad((ref.exp() * (ref - logps)).sum(), theta, retain_graph=True)[0]            # KL(ref || p)
    if form == "k1_reward":                  # the expected policy gradient of reward -k1
        loss = -(probs * -(logps - ref).detach() * logps).sum()
    else:
        loss = (probs * kl_penalty(logps, logps.detach(), ref, form)).sum()
    return torch.autograd.grad(loss, theta)[0], forward, backward


@pytest.mark.parametrize("form", ["k1_reward", "k2_loss", "k3_rho_loss"])
def test_kl_forms_that_pull_to_the_reference(form):
    found, forward, backward = kl_gradients(form)
    assert torch.allclose(found, forward, atol=1e-12) and not torch.allclose(found, backward, atol=1e-3)


def test_k3_in_the_loss_is_the_other_direction():
    found, forward, backward = kl_gradients("k3_loss")
    assert torch.allclose(found, backward, atol=1e-12) and not torch.allclose(found, forward, atol=1e-3)


def two_tokens():
    """A policy and a reference over sequences of two tokens out of three: logits (3,) of the first, (3, 3) of the second after it."""
    logits = [draws(3, seed=1).requires_grad_(), draws(3, 3, seed=2).requires_grad_()]
    logps = lambda first, second: torch.stack([first.log_softmax(-1)[:, None].expand(3, 3), second.log_softmax(-1)], dim=-1).view(9, 2)
    ref = logps(draws(3, seed=3), draws(3, 3, seed=4))
    return logits, logps(*logits), ref                                                   # (9, 2): of both tokens of every sequence


def gradient(loss, logits):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, logits, retain_graph=True)])


@pytest.mark.parametrize("credit", ["to go", "whole"])
def test_k1_in_the_reward_has_the_gradient_of_the_kl_of_sequences(credit):
    logits, logps, ref = two_tokens()
    probs = logps.sum(1).exp()
    exact = gradient((probs * (logps - ref).sum(1)).sum(), logits)
    k1, offsets = (logps - ref).detach(), np.arange(0, 19, 2)
    advantages = reward_to_go(-k1.flatten(), offsets) if credit == "to go" else -k1.sum(1).repeat_interleave(2)
    loss, _ = policy_loss(logps.flatten(), logps.detach().flatten(), advantages, probs.detach().repeat_interleave(2), torch.arange(9).repeat_interleave(2))
    assert (gradient(loss, logits) - exact).norm() <= 1e-12 * exact.norm()


@pytest.mark.parametrize("form", ["k2_loss", "k3_rho_loss", "k3_loss"])
def test_kl_in_the_loss_holds_the_prefix_fixed(form):
    """Each token's KL has its gradient (k3: that of the other direction), but not what the token does to the KLs after it."""
    logits, logps, ref = two_tokens()
    probs = logps.detach().sum(1).exp()
    found = gradient((probs[:, None] * kl_penalty(logps, logps.detach(), ref, form)).sum(), logits)
    p, q = (logps, ref) if form != "k3_loss" else (ref, logps)
    per_token = [(p[::3, 0].exp() * (p - q)[::3, 0]).sum(), (probs.view(3, 3).sum(1) * (p[:, 1].exp() * (p - q)[:, 1]).view(3, 3).sum(1)).sum()]
    assert (found - gradient(sum(per_token), logits)).norm() <= 1e-12 * found.norm()
    exact = gradient((logps.sum(1).exp() * (logps - ref).sum(1)).sum(), logits)
    assert (found - exact).norm() > .05 * exact.norm()


# -----------------------------------------------------------------------------
# Bandits: five arms, exact expectations over groups are not needed, many samples are


def bandit(method, rewards, steps=400, group=16, num_groups=16, lr=.1, seed=0, updates=1, shuffled=False, **settings):
    """A softmax over five arms trained by the script's own functions, one token a sample. -> probabilities"""
    cfg = resolve(Config(method=method, init="x", num_steps=steps, group_size=group, **settings), 1e6, 1000, 1)
    g = torch.Generator().manual_seed(seed)
    theta, ref = torch.zeros(5, dtype=torch.float64, requires_grad=True), draws(5, seed=9).log_softmax(0)
    if cfg.kl_coef:
        theta.data.copy_(ref)
    value = torch.zeros((), dtype=torch.float64)
    optimizer = torch.optim.Adam([theta], lr=lr)
    tail = torch.zeros(5, dtype=torch.float64)
    for step in range(steps):
        for group_ in optimizer.param_groups:
            group_["lr"] = lr * (1 - step / steps)
        old = theta.detach().log_softmax(0)
        arms = torch.multinomial(old.exp(), num_groups * group, replacement=True, generator=g)
        paid = arms[torch.randperm(len(arms), generator=g)] if shuffled else arms
        r = rewards[paid] - (cfg.kl_coef * (old - ref)[arms] if cfg.kl_form == "k1_reward" else 0.0)
        n, owners = len(arms), torch.arange(num_groups * group)
        if method == "ppo":
            a, returns = ppo_advantages(r, value.expand(n).clone(), np.arange(n + 1), torch.zeros(n).double(), cfg)
            value = value + .1 * (returns.mean() - value)
        else:
            a = group_advantages(r.view(num_groups, group), torch.ones(num_groups, group, dtype=torch.bool), cfg.baseline, cfg.adv_scale).flatten()
        if cfg.adv_scale == "batch":
            a = whiten(a, torch.zeros(n, dtype=torch.int64), 1)
        for _ in range(updates):
            logps = theta.log_softmax(0)
            loss, _ = policy_loss(logps[arms], old[arms], a, torch.full((n,), 1 / n).double(), owners, ratio=cfg.ratio, clip_low=cfg.clip_low,
                                  clip_high=cfg.clip_high, cap=cfg.cispo_cap)
            if cfg.kl_coef and cfg.kl_form != "k1_reward":
                loss = loss + cfg.kl_coef * kl_penalty(logps[arms], old[arms], ref[arms], cfg.kl_form).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step >= steps // 2:
            tail += theta.detach().softmax(0) / (steps - steps // 2)
    return theta.detach().softmax(0), tail, ref


ARMS = torch.tensor([.1, .9, .3, .5, .2], dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_best_arm(method):
    probs, _, _ = bandit(method, ARMS, kl_coef=0.0, steps=200, lr=.3 if method == "gspo" else .1)
    assert probs[1] >= .95, probs


@pytest.mark.parametrize("method", ["grpo_mean", "ppo"])
def test_controls_learn_nothing(method):
    """Rewards of other samples, a rate of 0; and with the sign turned, the worst arm."""
    settings = dict(kl_coef=0.0, steps=200)
    assert max(float(bandit(method, ARMS, shuffled=True, seed=seed, **settings)[0][1]) for seed in range(3)) < .6
    assert bandit(method, ARMS, lr=0.0, **settings)[0].tolist() == pytest.approx([.2] * 5)
    assert bandit(method, -ARMS, **settings)[0][0] >= .95


def total_variation(p, q):
    return float((p - q).abs().sum() / 2)


def test_kl_in_the_reward_reaches_the_known_optimum():
    """ref exp(r / kl): the policy that maximizes E[r] - kl KL(p || ref). The control with k3 in the loss must miss it."""
    settings = dict(kl_coef=.5, steps=600, group=64, num_groups=16, lr=.05)
    optimum = lambda ref, rate: (ref + ARMS / rate).softmax(0)
    _, probs, ref = bandit("rloo", ARMS, kl_form="k1_reward", **settings)
    assert total_variation(probs, optimum(ref, .5)) <= .02
    _, other, _ = bandit("rloo", ARMS, kl_form="k3_loss", **settings)
    assert total_variation(other, optimum(ref, .5)) > .03


def test_a_group_mean_that_holds_the_sample_shifts_a_loss_side_kl():
    """(G - 1) / G of the policy gradient, all of the KL: with G = 2 the optimum is ref exp(r / (2 kl)), not ref exp(r / kl)."""
    _, probs, ref = bandit("grpo_mean", ARMS, kl_coef=.5, kl_form="k2_loss", steps=600, group=2, num_groups=512, lr=.05)
    shifted, plain = (ref + ARMS / 1.0).softmax(0), (ref + ARMS / .5).softmax(0)
    assert total_variation(probs, shifted) <= .02 < total_variation(probs, plain)


# -----------------------------------------------------------------------------
# Batches of sequences


def random_sequences(seed=0, lengths=(9, 30, 5, 17, 12), prompts=(3,)):
    """Sequence i goes on from prompt i % len(prompts), of prompts[...] tokens; the mask has holes, as tool results make them."""
    rng = np.random.default_rng(seed)
    heads = [rng.integers(0, 256, n).tolist() for n in prompts]
    heads = [heads[i % len(heads)] for i in range(len(lengths))]
    return [(head + rng.integers(0, 256, n - len(head)).tolist(), [0] * len(head) + [1] + rng.integers(0, 2, max(0, n - len(head) - 2)).tolist() + [1] * (n > len(head) + 1))
            for head, n in zip(heads, lengths)]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_sequence_batch_predicts_each_masked_token_from_the_one_before(pack, size):
    sequences = random_sequences(lengths=(19, 40, 18, 27, 22), prompts=(15, 16))
    offsets = token_offsets(sequences)
    seen, groups = {}, [i % 2 for i in range(len(sequences))]
    for which in micro_batches([len(ids) for ids, _ in sequences], size, groups=groups):
        b = sequence_batch(sequences, which, offsets, pack)
        shared = not pack and len({groups[i] for i in which}) < len(which)
        assert isinstance(b.doc_ids, Prompts) == shared
        flat = b.ids.flatten()
        for row, target, token, owner in zip(b.rows.tolist(), b.targets.tolist(), b.tokens.tolist(), b.sequences.tolist()):
            seen[token] = (owner, int(flat[row]), target)
        saved = sum(sum(groups[i] == g for i in which) * n for g, n in ((0, 15), (1, 16))) - sum(n for g, n in ((0, 15), (1, 16)) if g in [groups[i] for i in which])
        assert b.num_tokens == sum(len(sequences[i][0]) - 1 for i in which) - shared * saved
    want = [(i, ids[t - 1], ids[t]) for i, (ids, mask) in enumerate(sequences) for t in range(1, len(ids)) if mask[t]]
    assert [seen[n] for n in range(len(want))] == want and offsets[-1] == len(want)


def test_sequence_batch_of_nothing_and_of_a_bad_mask():
    b = sequence_batch([], [], np.zeros(1, dtype=np.int64))
    assert b.ids.shape == (1, 1) and len(b.rows) == 0
    with pytest.raises(ValueError, match="first token"):
        sequence_batch([([1, 2], [1, 1])], [0], np.array([0, 1]))


def test_micro_batches_keep_units_together():
    groups = micro_batches([5, 1, 9, 2, 3, 3], 2, unit=2)
    assert groups == [[2, 3, 0, 1], [4, 5]] and micro_batches([], 4) == []
    assert micro_batches([5, 1, 9, 2, 3, 3], 2, groups=[7, 7, 4, 9, 4, 9]) == [[2, 4], [0, 1], [5, 3]]


@pytest.mark.parametrize("ratio, aggregate", [("token", "token_mean"), ("sequence", "seq_mean"), ("cispo", "constant")])
def test_gradient_does_not_depend_on_the_cut(ratio, aggregate):
    """8 sequences in one batch, in 4 of 2, in 8 of 1, with a shared prompt or its copies, padded and packed: one gradient."""
    model = Transformer(replace(config_for_size("nano", 259), num_kv_heads=1), torch.float64).init_weights(1).double()
    for p in model.parameters():
        p.data += .02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    sequences = random_sequences(lengths=(19, 40, 16, 27, 22, 15, 31, 24), prompts=(13, 18, 14))
    offsets = token_offsets(sequences)
    n, lengths = int(offsets[-1]), torch.from_numpy(np.diff(offsets))
    owner = torch.repeat_interleave(torch.arange(8), lengths)
    advantages, drift = draws(8)[owner], .2 * draws(n, seed=1)
    with torch.no_grad():
        b = sequence_batch(sequences, list(range(8)), offsets)
        old = torch.zeros(n, dtype=torch.float64)
        old[b.tokens] = token_logps(model, model, b, .7).logp
    old += drift
    c = token_scale(lengths, aggregate, n, 8, 32)[owner]
    gradients, shared = [], 0
    for size, pack, groups in ((1, False, None), (2, False, None), (8, False, None), (4, False, [i % 3 for i in range(8)]), (8, True, None), (4, True, None)):
        model.zero_grad()
        for which in micro_batches([len(ids) for ids, _ in sequences], size, groups=groups):
            b = sequence_batch(sequences, which, offsets, pack)
            shared += isinstance(b.doc_ids, Prompts)
            out, at = token_logps(model, model, b, .7), b.tokens
            policy_loss(out.logp, old[at], advantages[at], c[at], b.sequences, ratio=ratio, clip_low=.1, clip_high=.1)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].abs().max() > 1e-4 and shared >= 2
    for g in gradients[1:]:
        assert (g - gradients[0]).abs().max() <= 1e-6 * float(gradients[0].abs().max())         # norms take fp32 statistics


def test_what_stands_at_mask_0_changes_no_loss():
    """Targets outside the mask (tool results, text of templates) carry nothing: another token as the very last, with mask 0, is no change."""
    model = Transformer(config_for_size("nano", 259)).init_weights(1)
    (ids, mask), = random_sequences(lengths=(12,))
    out = []
    for last in (7, 8):
        sequences = [(ids + [last], mask + [0])]
        offsets = token_offsets(sequences)
        out.append(token_logps(model, model, sequence_batch(sequences, [0], offsets), 1.0).logp)
    assert torch.equal(*out)


# -----------------------------------------------------------------------------
# Settings


def test_defaults_by_method_size_and_data():
    tiny = resolve(Config(init="x"), 1e6, 1000, 112)
    assert (tiny.lr, tiny.group_size, tiny.prompts_per_step, tiny.clip_low, tiny.clip_high, tiny.aggregate, tiny.adv_scale) == (1e-3, 8, 32, .2, .28, "token_mean", "none")
    large = resolve(Config(init="x"), 5e8, 7473, 400)
    assert (large.lr, large.prompts_per_step, large.num_epochs, large.num_steps, large.eval_every, large.kl_coef) == (1e-6, 64, 1, 116, 10, 0)
    assert resolve(Config(init="x", lora_rank=32), 5e8, 7473, 400).lr == 3e-5
    assert resolve(Config(init="x"), 8e9, 7473, 400).lr == 7e-7
    ppo = resolve(Config(init="x", method="ppo"), 5e8, 7473, 400)
    assert (ppo.kl_coef, ppo.critic_lr, ppo.group_size, ppo.num_minibatches, ppo.adv_scale) == (1e-3, pytest.approx(1e-5), 4, 4, "batch")
    assert resolve(Config(init="x", method="ppo"), 1e6, 1000, 112).lr == 5e-4           # four updates a step: at 1e-3 some runs collapse
    assert resolve(Config(init="x", method="dapo"), 5e8, 7473, 400).overlong == .2
    assert resolve(Config(init="x"), 1e6, 100, 112).num_epochs == 6 and resolve(Config(init="x"), 1e6, 100, 112).prompts_per_step == 8
    assert resolve(Config(init="x", method="gspo", clip_low=.1), 1e6, 100, 112).clip_low == .1          # an explicit flag wins
    assert resolve(Config(), 1e6, 100, 112).cold_start == 200 and tiny.cold_start == 0


@pytest.mark.parametrize("flag, value", [("lr", 1.0), ("temperature", 0.0), ("temperature", 2.5), ("group_size", 1), ("group_size", 65), ("clip_high", 2.0), ("kl_coef", 1.5),
                                         ("lora_rank", 512), ("num_epochs", 101), ("cispo_cap", .5), ("kl_form", "k1_loss"), ("kl_form", "k3_reward"), ("aggregate", "mean"),
                                         ("truncated", "bootstrap"), ("lam", 1.1), ("target_kl", .1), ("target_kl", -1.0), ("missing_eos", 1.0), ("lam_length", .05)])
def test_refusals_name_the_flag(flag, value):
    with pytest.raises(ValueError, match=f"--{flag}="):
        resolve(Config(init="x", **{flag: value}), 1e6, 1000, 112)


def test_tracks_and_shares():
    assert train_rl.parse_by_track("", ["logic", "chat"], "track_mix") == [.5, .5]
    assert train_rl.parse_by_track("chat:1,logic:3", ["logic", "chat"], "track_mix") == [.75, .25]
    for bad in ("logic:1", "logic:1,chat:0", "logic:1,chat:x", "logic:1,chat:1,code:1"):
        with pytest.raises(ValueError, match="track_mix"):
            train_rl.parse_by_track(bad, ["logic", "chat"], "track_mix")
