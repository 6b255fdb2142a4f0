"""Advantage-weighted SFT of a generative recommender (A-SFT, Netflix TechBlog 2025-10-24), beside its rivals, from one log of rewards.

A log holds, for each decision i, a history x_i, the item a_i that came next and one reward r_i; no propensities, no other item's reward. Cloning it
(BC) learns exposure and habit with the taste. With V(x) an estimate of the reward that was to be expected,

    A_i = r_i - V(x_i)      w_i = min(exp(A_i / weight_temp), w_max), no gradient      loss = - sum_i w_i log pi(a_i | x_i) / sum_i w_i

over the decisions of the global batch. The post gives no formula, clipping or normalisation: these are ours, and with an observed r and a learned V
they are one step of AWR (1910.00177). Other methods are called ASFT, too (2509.23753 anchored, 2409.10571 aligned).

What V does and does not do. The optimum of each history is pi_log(a|x) E[w | x, a]: a factor exp(-V(x) / weight_temp) cancels there. V changes how
histories share parameters: without it happy users are up-weighted. Exponential weights seek risk, and V does not repair that: with Gaussian noise
E[exp(r / t)] = exp(mu / t + sigma^2 / (2 t^2)), so a noisier item wins over a better one when sigma_a^2 - sigma_b^2 > 2 t (mu_b - mu_a).

One run: BC with reward and value heads trained beside it -> judges, reward models of their own from the other half's rewards -> advantages ->
--method, one or several, each from the BC checkpoint with the same steps, batches and number of trials -> report.md, frontier.png.

    python train_asft.py                                                    laptop, a synthetic world whose true policy values are known
    python train_asft.py --data=ml-latest-small --method=asft,exp_rsft,ppo --trials=4             MovieLens, rivals, four settings of each
    python train_asft.py --data=csv:log.csv --col_user=user --col_item=item --col_reward=stars --col_time=unix
    torchrun --nproc_per_node=8 train_asft.py --data=ml-20m --size=ml-20m-large --backbone=hstu   the same flags, eight GPUs
"""
import copy
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import ranking
import recommend
from checkpoint import Catalogue
from common import Logger, all_reduce_sum, check_finite, format_seconds, lr_scale, parse_config, random_key, setup_distributed, write_atomically
from data import bandit, interactions
from data.interactions import TEST, TRAIN, VAL
from data.packing import shuffled
from kernels import linear_logprob
from model import RECOMMENDER_SIZES, Recommender, RecommenderConfig, clip_grad_norm, make_optimizers, num_params, parallelize, set_gradient_sync
from recommend import World, context, seen_so_far, states


@dataclass(frozen=True)
class Config:
    name: str = "dummy"              # results go to out/<name>; any name but dummy also opens wandb
    seed: int = 0                    # decides the synthetic world, weights, order and samples
    # model
    init: str = ""                   # out/<name> of an earlier run: its BC checkpoint and judges, in place of training them
    size: str = "tiny"               # tiny | ml-1m | ml-1m-large | ml-20m-large | books-large
    backbone: Literal["hstu", "sasrec"] = "hstu"        # 2402.17152 | 1808.09781
    max_length: int = 50             # events of a history; longer ones keep their end
    dropout: float = 0.2             # in BC; post-training has none, so that samples and ratios are of one policy
    history_rewards: int = 0         # bins in which rewards of past items are read, too; 0: not read
    softmax: Literal["full", "sampled"] = "full"        # over all items, or the item and num_negatives others; sampled: not where the whole policy is needed
    num_negatives: int = 128         # sampled: negatives for each decision
    logq: bool = False               # sampled: correct the negatives' logits by log((I - 1) / num_negatives)
    # data
    data: str = "bandit"             # bandit: a synthetic world; csv:FILE with the columns below; ml-latest-small, ml-1m, .. (data/README.md)
    col_user: str = ""               # csv: name of the column, or its number from 0 without a header
    col_item: str = ""               # csv: the same
    col_reward: str = ""             # csv: the same
    col_time: str = ""               # csv: the same
    sep: str = ""                    # csv: between columns; empty: the first of tab :: , ; | that is in line 1
    header: int = -1                 # csv: lines of header, 0 or 1; auto: 1 where a column is given by name, or line 1 has words for numbers
    time_unit: Literal["", "s", "ms"] = ""              # of col_time; empty: the preset's, csv: s
    ties: Literal["row", "shuffle"] = "row"             # order of events at one time: as in the file, or by the seed
    dedup: Literal["first", "last", "none"] = "first"   # which of a user's events with one item stays
    missing_time: Literal["stop", "drop"] = "stop"      # an event without a time
    min_user: int = 0                # users with fewer events are left out
    min_item: int = 0                # items with fewer events are left out
    core: Literal["single", "iterative"] = "single"     # min_user and min_item once, or until nothing changes
    split: Literal["loo", "time"] = "loo"               # leave one out: each user's last event is test, the one before validation; or by time
    t_val: int = 0                   # time: events from this second on are validation
    t_test: int = 0                  # time: events from this second on are test
    cold: Literal["drop", "miss"] = "drop"              # time: targets that training never saw
    windows: Literal["end", "all"] = "end"              # long histories: their end, or overlapping windows in which each decision counts once
    reward: str = "raw"              # raw | centered | watch_ratio | signals:is_like=1,long_view=.5 | percentile | top25
    reward_scale: Literal["none", "std"] = "none"       # divide rewards by their standard deviation in training
    high: float = 4.5                # raw reward from which a target counts as high
    noise: float = 1.0               # bandit: standard deviation of an observed reward
    noise_spread: float = 0.0        # bandit: log-normal spread of that over items
    autoplay: float = 0.0            # bandit: share of bait whose observed satisfaction is 5, whatever it truly is: a bias that all observers share
    generosity: float = 0.0          # bandit: standard deviation of what users add to all of their ratings, habitual clickers most
    taste: float = 2.0               # bandit: how much the log follows what users truly like
    pop: float = 1.0                 # bandit: how much it follows exposure, which says nothing of taste
    habit: float = 1.5               # bandit: how much users click on bait and on the genre they had last, by habit
    bait_share: float = 0.15         # bandit: share of items that attract and disappoint
    num_users: int = 4000            # bandit: users
    num_items: int = 300             # bandit: items
    # rewards
    judge_share: float = 0.5         # share of users whose training rewards only the judges read; selection on validation reads all users'
    reward_share: float = 1.0        # share of the others whose rewards are read at all
    judges: int = 3                  # judges, each with a trunk and seed of its own; 0: none
    ensemble: int = 5                # members of the reward and value heads, users re-weighted by a Poisson bootstrap
    folds: int = 1                   # above 1: V and r of a user come from members that were not fitted on that user; the trunk has seen all
    reward_coef: float = 0.1         # weight of the reward head's loss in BC
    reward_to_trunk: bool = True     # the reward head's gradient reaches the trunk
    # the algorithm; several methods: comma-separated, or all
    method: str = "asft"             # asft | bc | reward_bc | exp_rsft | awr | crr | iql | cql | dpo | ipo | ppo | ecpo | exact | tilt
    trials: int = 1                  # settings of each method's knob: what its flag says, then those of METHODS
    weight_temp: float = 1.0         # of advantages in reward units: higher stays nearer to BC, inf is BC; crr: 0 is the indicator
    w_max: float = 20.0              # asft, awr, crr: bound on a weight
    normalize: Literal["batch", "dataset", "none"] = "batch"              # asft: weights over their sum in the batch, their mean in the data, or as they are
    baseline: Literal["zero", "global", "user", "item", "head", "policy"] = "head"        # asft: V; user, item: means; policy: sum_a pi(a|x) rhat(x, a)
    advantage_reward: Literal["observed", "model", "ensemble_mean", "ensemble_lcb"] = "observed"        # asft: r, or what the reward head says of it
    negative: Literal["stop", "zero"] = "zero"          # reward_bc: a negative reward stops the run, or weighs 0
    expectile: float = 0.7           # iql: of the value
    cql_alpha: float = 1.0           # cql: weight of the penalty on items not logged
    pref_beta: float = 0.1           # dpo, ipo: higher stays nearer to BC
    pref_gap: float = 1.0            # dpo, ipo: a pair needs means this many spreads apart, on either side
    num_samples: int = 8             # ppo, ecpo: items drawn for each history; dpo, ipo: twice as many
    clip: float = 0.2                # ppo, ecpo: bound on the ratio to the policy that sampled
    refresh_every: int = 8           # ppo, ecpo: steps between new copies of the policy that samples
    ecpo_delta: float = 0.1          # ecpo: how much further a bad item may fall
    kl_coef: float = 0.1             # ppo, ecpo, exact: strength of the exact KL to BC
    target_decay: float = 0.99       # iql: of the moving average of Q
    gamma: float = 0.0               # iql, crr: discount along the user's events; 0: each decision stands alone
    # length of the run and optimization
    pretrain_steps: int = 600        # steps of BC
    judge_steps: int = 400           # steps of each judge
    num_steps: int = 200             # steps of each trial after it
    batch_size: int = 64             # users (--windows=all: rows) per step
    device_batch_size: int = 64      # rows per forward pass and device: lower when memory runs out, the result stays the same but for dropout's masks
    lr: float = 3e-3                 # peak rate of AdamW in BC
    post_lr: float = 1e-3            # peak rate after it
    weight_decay: float = 0.0        # on matrices, embeddings included
    warmup_steps: int = 10           # steps of linear warm-up
    decay_share: float = 0.3         # the last share of each stage goes linearly to rate 0
    max_grad_norm: float = 1.0       # global norm the gradient is clipped to
    # machine
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"      # of the computation; weights are float32 always; auto: bfloat16 on CUDA
    compile: bool = False            # torch.compile the model
    # looking and keeping
    full_matrix: str = ""            # another log in which (nearly) every user has every item, as kuairec-small beside kuairec: policies are valued on it, too
    mask_seen: bool = True           # ranks leave out what the user had before; false: as some papers rank, to compare
    eval_every: int = 50             # steps between evaluations of validation and test; 0: only at the end
    policy_users: int = 4000         # histories on which exact values, KL and judges are computed
    save_every: int = 0              # steps between checkpoints; 0: only at the end
    resume: str = ""                 # latest, or a step folder: continue out/<name> exactly
    overwrite: bool = False          # delete the checkpoints of an earlier run of this name
    dry_run: bool = False            # print the resolved settings and the memory estimate, and stop


MAY_CHANGE = ("name", "save_every", "resume", "overwrite", "dry_run", "compile")
# what a BC checkpoint and its judges were made of: --init with other values would compare worlds, or leak a test event
OF_INIT = ("seed", "size", "backbone", "max_length", "history_rewards", "data", "split", "t_val", "t_test", "cold", "ties", "dedup", "min_user", "min_item",
           "core", "reward", "reward_scale", "noise", "noise_spread", "autoplay", "generosity", "taste", "pop", "habit", "bait_share", "num_users", "num_items",
           "judge_share", "reward_share", "ensemble", "folds")

# the knob that is tried, its values, and which heads a method trains. Every method has as many trials; weighted: its weights are known before the run
METHODS = {
    "asft": dict(knob="weight_temp", grid=(1.0, 0.5, 2.0, 4.0, 0.35, 0.2), weighted=True),
    "bc": dict(knob="post_lr", grid=(1e-3, 3e-4, 2e-3, 1e-4), weighted=True),
    "reward_bc": dict(knob="post_lr", grid=(1e-3, 3e-4, 2e-3, 1e-4), weighted=True),
    "exp_rsft": dict(knob="weight_temp", grid=(1.0, 0.5, 2.0, 4.0, 0.35, 0.2), weighted=True),           # 2603.10279, as its abstract has it
    "awr": dict(knob="weight_temp", grid=(1.0, 0.5, 2.0, 4.0, 0.35, 0.2), heads=("value",)),             # 1910.00177
    "crr": dict(knob="weight_temp", grid=(1.0, 0.5, 0.0, 2.0), heads=("reward",), full=True),               # 2006.15134
    "iql": dict(knob="weight_temp", grid=(1.0, 0.5, 2.0, 4.0, 0.35, 0.2), heads=("reward", "value")),    # 2110.06169
    "cql": dict(knob="cql_alpha", grid=(1.0, 3.0, 0.3, 10.0), heads=("value",)),   # 2006.04779
    "dpo": dict(knob="pref_beta", grid=(0.1, 0.3, 1.0, 0.03), full=True),                      # 2305.18290, pairs of rejection sampling
    "ipo": dict(knob="pref_beta", grid=(0.1, 0.3, 1.0, 0.03), full=True),                      # 2310.12036
    "ppo": dict(knob="kl_coef", grid=(0.1, 0.3, 1.0, 0.03), full=True),                        # 1707.06347 with group means
    "ecpo": dict(knob="kl_coef", grid=(0.1, 0.3, 1.0, 0.03), full=True),                       # 2506.13695
    "exact": dict(knob="kl_coef", grid=(0.1, 0.3, 1.0, 0.03), full=True),                      # the strongest optimiser of the reward model
    "tilt": dict(knob="weight_temp", grid=(1.0, 0.5, 2.0, 4.0, 0.35, 0.2)),                              # no training: pi_BC exp(rhat / weight_temp)
}


# -----------------------------------------------------------------------------
# Weights and losses. Sums over num, the number of decisions of the global batch, or over the sum of their weights. N decisions, I items, G samples


def asft_weights(advantages, weight_temp, w_max):
    """min(exp(A / weight_temp), w_max), detached, fp32 or fp64 as A is; exactly 1 at weight_temp inf. advantages (N,)."""
    exponent, most = advantages.detach() / weight_temp, math.log(w_max)
    return torch.where(exponent >= most, w_max, exponent.clamp(max=most).exp())        # cut before exp: no A overflows; the bound itself, not exp(log) of it


def exp_weights(rewards, weight_temp):
    """exp(r / weight_temp), neither clipped nor normalised, as exponential reward weighting has it. rewards (N,)."""
    if float(rewards.max()) / weight_temp > 46:                      # the weight is finite to 88, the square of its gradient, in a norm, is not
        raise ValueError(f"exp(r / weight_temp) overflows at r = {float(rewards.max()):g}, weight_temp = {weight_temp:g}: raise --weight_temp, "
                         "or --reward_scale=std, or take asft, whose weights are clipped")
    return (rewards.detach() / weight_temp).exp()


def weighted_nll(logps, weights, denominator):
    """- sum w log pi(a|x) / denominator. logps, weights (N,)."""
    return -(weights * logps).sum() / denominator


def sampled_logps(users, catalogue, actions, negatives, temperature, logq=0.0):
    """log of softmax over an item and its negatives: users (N, D), catalogue (I, D), actions (N,) and negatives (N, K) of 1..I -> (N,).

    A negative that is the item itself gets -5e4, as in the public HSTU code (here none is drawn); logq is added to the logits of the others.
    """
    positive = (users * catalogue[actions - 1]).sum(-1) / temperature
    others = torch.einsum("nd,nkd->nk", users, catalogue[negatives - 1]) / temperature + logq
    others = others.masked_fill(negatives == actions[:, None], -5e4)
    return positive - torch.cat([positive[:, None], others], 1).logsumexp(1)


def dpo_loss(margins, num, beta):
    """- sum log sigmoid(beta D) / num, D (P,): log-ratio to BC of the better item less that of the worse (2305.18290, eq. 7)."""
    return -F.logsigmoid(beta * margins).sum() / num


def ipo_loss(margins, num, beta):
    """sum (D - 1 / (2 beta))^2 / num (2310.12036, eq. 17)."""
    return (margins - 1 / (2 * beta)).square().sum() / num


def ppo_loss(logps, old_logps, advantages, num, clip):
    """- sum min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) / num (1707.06347, eq. 7). All (N, G); num counts samples."""
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).sum() / num


def ecpo_loss(logps, old_logps, advantages, num, clip, delta):
    """PPO whose ratio is at most 1 + clip + delta where A < 0: there pi_old is replaced by max(sg(pi) / (1 + clip + delta), pi_old) (2506.13695)."""
    floor = logps.detach() - math.log(1 + clip + delta)
    return ppo_loss(logps, torch.where(advantages < 0, torch.maximum(floor, old_logps), old_logps), advantages, num, clip)


def expectile_loss(gaps, expectile, num):
    """sum |expectile - 1{gap < 0}| gap^2 / num, gap = target - v (2110.06169, eq. 5)."""
    return (torch.where(gaps < 0, 1 - expectile, expectile) * gaps.square()).sum() / num


def cql_loss(logps, values, rewards, num, alpha):
    """1/num sum [ 1/2 (Q(x,a) - r)^2 + alpha (logsumexp Q(x,.) - Q(x,a)) ] with Q(x,a) = v(x) + log pi(a|x), so that pi = softmax(Q) and the penalty
    is - log pi (2006.04779, eq. 4, for one step). logps, values, rewards (N,)."""
    return (0.5 * (values + logps - rewards).square() - alpha * logps).sum() / num


def expected(logp, table):
    """sum_a pi(a) table(a): logp (N, I) with -inf on seen items, table (N, I) -> (N,)."""
    return (logp.exp() * table).sum(-1)


def kl(logp, ref_logp):
    """KL(pi || ref) (N,) of (N, I), -inf on seen items in both."""
    return (logp.exp() * (logp - ref_logp).masked_fill(logp == -math.inf, 0.0)).sum(-1)


def draw(logp, u):
    """Items 1..I by inverse CDF: logp (N, I), u (N, G) uniform -> (N, G). Never an item of probability 0."""
    cdf = logp.double().exp().cumsum(-1)
    places = torch.searchsorted(cdf, u.double() * cdf[:, -1:], right=True)
    last = logp.shape[1] - 1 - (logp > -math.inf).flip(-1).int().argmax(-1, keepdim=True)      # u near 1 may fall past the last item
    return places.minimum(last) + 1


class Facts(NamedTuple):
    """One micro-batch, flat: what is known of its N decisions."""
    hidden: torch.Tensor        # (N, D) states, with gradient
    actions: torch.Tensor       # (N,) 1..I
    rewards: torch.Tensor       # (N,) fp32
    weights: torch.Tensor       # (N,) of weighted methods
    after: torch.Tensor         # (N,) the flat place of the user's next decision, or -1
    seen: torch.Tensor          # (N, I) bool items of the history; methods that need the whole policy
    noise: torch.Tensor         # (N, 2G) uniform
    negatives: torch.Tensor     # (N, K) items, for the sampled softmax


def logps_of(cfg, model, f):
    """-> log pi(a|x) (N,) of the logged items, over the whole catalogue or the sampled part."""
    c = model.config
    if cfg.softmax == "sampled":
        logq = math.log((c.num_items - 1) / cfg.num_negatives) if cfg.logq else 0.0
        return sampled_logps(model.users(f.hidden), model.catalogue(), f.actions, f.negatives, c.temperature, logq)
    return linear_logprob(model.users(f.hidden), model.catalogue(), f.actions - 1, temperature=c.temperature).logp


def next_values(values, after):
    """values (N,) -> (N,): that of the user's next decision, and whether there is one: the last of a row has none, and no Q is fitted there."""
    return torch.where(after >= 0, values[after.clamp(min=0)], 0.0), after >= 0


def post_loss(cfg, model, ref, old, f, num, denominator):
    """-> (loss, {statistic: sum over the micro-batch / num}). ref: the BC model, old: the copy that samples, or target network of iql; hidden states
    of both are in f.hidden's order. num: decisions of the global batch; denominator: of weighted methods."""
    method = cfg.method
    if METHODS[method].get("weighted"):
        return weighted_nll(logps_of(cfg, model, f), f.weights, denominator), {}
    h = model.judged(f.hidden).detach()                          # critics learn from the state and leave it alone
    if method == "awr":
        values, logps = model.value(h), logps_of(cfg, model, f)
        weights = asft_weights(f.rewards - values.mean(0), cfg.weight_temp, cfg.w_max)
        fit = (f.rewards - values).square().sum() / (num * len(values))
        return weighted_nll(logps, weights, num) + fit, dict(critic_loss=fit.detach(), weight=weights.sum() / num)
    if method == "iql":
        q, value = model.reward.at(h, f.actions)[:2], model.value(h)[0]
        with torch.no_grad():
            target = old[0].reward.at(h, f.actions)[:2].amin(0)
            following, known = next_values(value, f.after)
        fit_v = expectile_loss(target - value, cfg.expectile, num)
        fit_q = ((f.rewards + cfg.gamma * following - q).square() * (known | (cfg.gamma == 0))).sum() / (2 * num)
        weights = asft_weights(target - value, cfg.weight_temp, 100.0)
        return weighted_nll(logps_of(cfg, model, f), weights, num) + fit_v + fit_q, dict(critic_loss=(fit_v + fit_q).detach(), weight=weights.sum() / num)
    if method == "cql":
        logps, value = logps_of(cfg, model, f), model.value(h)[0]
        loss = cql_loss(logps, value, f.rewards, num, cfg.cql_alpha)
        return loss, dict(critic_loss=loss.detach() + cfg.cql_alpha * logps.detach().sum() / num)
    logp = ranking.log_policy(model.logits(f.hidden), f.seen)
    if method == "crr":
        q_all, q = model.reward.catalogue(h).detach(), model.reward.at(h, f.actions)
        with torch.no_grad():
            value = expected(logp, q_all)
            following, known = next_values(value, f.after)
            advantages = q_all.gather(1, f.actions[:, None] - 1)[:, 0] - value
            weights = asft_weights(advantages, cfg.weight_temp, cfg.w_max) if cfg.weight_temp > 0 else (advantages > 0).float()
        fit = ((f.rewards + cfg.gamma * following - q).square() * (known | (cfg.gamma == 0))).sum() / (len(q) * num)
        # logp has -inf where the log repeats an item of the history; over the whole catalogue it has not
        return weighted_nll(logps_of(cfg, model, f), weights, num) + fit, dict(critic_loss=fit.detach(), weight=weights.sum() / num)
    ref_model, ref_hidden = ref
    with torch.no_grad():
        ref_logp = ranking.log_policy(ref_model.logits(ref_hidden), f.seen)
        ref_h = ref_model.judged(ref_hidden)
    if method in ("dpo", "ipo"):
        with torch.no_grad():
            items = draw(ref_logp, f.noise)                                                        # (N, 2G)
            said = ref_model.reward.at(ref_h.repeat_interleave(items.shape[1], 0), items.flatten()).view(-1, *items.shape)
            means, spreads = said.mean(0), said.std(0)
            best, worst = means.argmax(1, keepdim=True), means.argmin(1, keepdim=True)
            apart = (means - cfg.pref_gap * spreads).gather(1, best) > (means + cfg.pref_gap * spreads).gather(1, worst)
            apart, pair = apart[:, 0], torch.cat([items.gather(1, best), items.gather(1, worst)], 1) - 1
        ratios = (logp.gather(1, pair) - ref_logp.gather(1, pair))[apart]
        loss = (dpo_loss if method == "dpo" else ipo_loss)(ratios[:, 0] - ratios[:, 1], num, cfg.pref_beta)
        return loss, dict(accepted=apart.sum() / num, margin=(ratios[:, 0] - ratios[:, 1]).detach().sum() / num)
    with torch.no_grad():
        rhat = ref_model.reward.catalogue(ref_h)
    penalty = kl(logp, ref_logp).sum() / num
    if method == "exact":
        value = expected(logp, rhat).sum() / num
        return -value + cfg.kl_coef * penalty, dict(kl=penalty.detach(), reward=value.detach())
    old_model, old_hidden = old
    with torch.no_grad():
        sampling = ranking.log_policy(old_model.logits(old_hidden), f.seen)
        items = draw(sampling, f.noise[:, :cfg.num_samples]) - 1
        rewards = rhat.gather(1, items)
        advantages = rewards - rewards.mean(1, keepdim=True)
        if method == "ecpo":
            advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
        old_logps = sampling.gather(1, items)
    logps = logp.gather(1, items)
    loss = ppo_loss(logps, old_logps, advantages, num * cfg.num_samples, cfg.clip) if method == "ppo" else \
        ecpo_loss(logps, old_logps, advantages, num * cfg.num_samples, cfg.clip, cfg.ecpo_delta)
    clipped = ((logps - old_logps).exp() - 1).abs() > cfg.clip
    return loss + cfg.kl_coef * penalty, dict(kl=penalty.detach(), reward=rewards.mean(1).sum() / num, clip_fraction=clipped.float().mean(1).sum() / num)


def bc_loss(cfg, model, f, members, num, num_judged):
    """Cross entropy of the next item, and beside it the reward and value heads' squared error, the value's without a gradient into the trunk.
    members (M, N): how often each member counts a decision, 0 where the reward is not to be read."""
    nll = -logps_of(cfg, model, f).sum() / num
    h = model.judged(f.hidden)
    said = model.reward.at(h if cfg.reward_to_trunk else h.detach(), f.actions)
    reward_fit = (members * (said - f.rewards).square()).sum() / (max(num_judged, 1) * len(members))
    value_fit = (members * (model.value(h.detach()) - f.rewards).square()).sum() / (max(num_judged, 1) * len(members))
    return nll + cfg.reward_coef * reward_fit + value_fit, dict(nll=nll.detach(), reward_mse=reward_fit.detach(), value_mse=value_fit.detach())


# -----------------------------------------------------------------------------
# Data of a run


def open_world(cfg):
    signals = ",".join(part.partition("=")[0] for part in cfg.reward.partition("signals:")[2].split(","))
    if cfg.data == "bandit":
        log, truth = bandit.make(cfg.seed, num_users=cfg.num_users, num_items=cfg.num_items, noise=cfg.noise, noise_spread=cfg.noise_spread,
                                 autoplay=cfg.autoplay, generosity=cfg.generosity, taste=cfg.taste, pop=cfg.pop, habit=cfg.habit, bait_share=cfg.bait_share)
    else:
        log, truth = interactions.load(cfg.data, col_user=cfg.col_user, col_item=cfg.col_item, col_reward=cfg.col_reward, col_time=cfg.col_time,
                                       sep=cfg.sep, header=cfg.header, time_unit=cfg.time_unit, ties=cfg.ties, dedup=cfg.dedup,
                                       signals=signals,
                                       missing_time=cfg.missing_time, min_user=cfg.min_user, min_item=cfg.min_item, core=cfg.core, seed=cfg.seed), None
    log, part = interactions.split(log, cfg.split, t_val=cfg.t_val, t_test=cfg.t_test, cold=cfg.cold)
    reward = interactions.rewards(log, part, cfg.reward, cfg.reward_scale)
    rows = interactions.train_rows(log, part, cfg.max_length, cfg.windows)
    targets = {name: interactions.target_rows(log, part, which, cfg.max_length) for name, which in (("val", VAL), ("test", TEST))}
    for name, found in dict(train=rows, **targets).items():
        if not len(found):
            raise ValueError(f"--data={cfg.data}: no {name} decision: some users need at least 4 events (--split=loo), or other cuts (--t_val, --t_test)")
        if name != "train":                                                   # in an order without meaning, so that the first policy_users are a sample
            targets[name] = found[shuffled(np.arange(len(found)), len(found), cfg.seed, name)]
    judged = interactions.half(log.user_ids, cfg.judge_share if cfg.judges else 0.0)
    visible = ~judged & interactions.half(log.user_ids, cfg.reward_share, salt="rewards", flag="reward_share")
    if not visible[log.user[rows[:, 0]]].any() or cfg.judges and not judged[log.user[rows[:, 0]]].any():
        raise ValueError(f"--judge_share={cfg.judge_share}, --reward_share={cfg.reward_share}: nobody with a training decision is left whose rewards "
                         "the methods, or the judges, may read")
    if len(log.item_ids) < max(ranking.KS[:3]):
        raise ValueError(f"--data={cfg.data}: {len(log.item_ids)} items, expected at least {max(ranking.KS[:3])}: metrics are of the best ten")
    if not all(visible[log.user[found[:, 0]]].any() for found in targets.values()):
        raise ValueError("no user whose rewards the methods read has a validation and a test event: lower --judge_share, or other cuts (--t_val, --t_test)")
    high = {name: log.reward_raw[found[:, 1] - 1] >= cfg.high for name, found in targets.items()}
    matrix = None
    if cfg.full_matrix:                                                       # rewards of the same kind; it has no ranks and deviations of training data
        if cfg.data == "bandit" or cfg.reward in ("centered", "percentile", "top25") or cfg.reward_scale != "none":
            raise ValueError(f"--full_matrix={cfg.full_matrix}: expected --data of a file, --reward=raw, watch_ratio or signals, and --reward_scale=none, "
                             f"found --data={cfg.data} --reward={cfg.reward} --reward_scale={cfg.reward_scale}")
        other = interactions.load(cfg.full_matrix, col_user=cfg.col_user, col_item=cfg.col_item, col_reward=cfg.col_reward, col_time=cfg.col_time, sep=cfg.sep,
                                  header=cfg.header, time_unit=cfg.time_unit, missing_time=cfg.missing_time, signals=signals)
        matrix = interactions.full_matrix(log, other, interactions.rewards(other, np.zeros(len(other.user), np.int8), cfg.reward))
    return World(log, part, reward, rows, targets, high, cfg.policy_users, visible, judged, truth, Catalogue(log.item_ids, log.titles), cfg.mask_seen, matrix)


def on(device, *tensors):
    return [t if t is None else t.to(device) for t in tensors]


def facts(cfg, world, batch, hidden, weights, noise, negatives, rows=None, indices=None):
    """Flat decisions of a batch. hidden (B, T, D); weights (E,) by event or None; noise and negatives (N, ..) of these decisions or None; rows[indices]:
    what the batch was made of, for methods that need the whole policy."""
    T = batch.items.shape[1]
    decides = batch.targets.flatten() > 0
    places = decides.nonzero()[:, 0]
    number = torch.full((len(decides) + 1,), -1, dtype=torch.int64, device=places.device)
    number[places] = torch.arange(len(places), device=places.device)
    last = places % T == T - 1
    after = torch.where(last, -1, number[places + 1])                         # the next column of the same row, if it is a decision
    full = METHODS[cfg.method].get("full")
    events = batch.events.flatten()[places]
    return Facts(hidden.flatten(0, 1)[places], batch.targets.flatten()[places], batch.rewards.flatten()[places],
                 None if weights is None else weights[events], after, seen_so_far(world, rows, indices, batch.items, places) if full else None,
                 noise, negatives)


# -----------------------------------------------------------------------------
# Heads, advantages


def bootstrap_counts(cfg, users, seed):
    """(M, U): how often a member of the ensemble counts a user: Poisson(1); with folds only users of other folds, each once."""
    if cfg.folds > 1:
        fold = np.array([random_key(seed, "fold", u) % cfg.folds for u in range(users)])
        return torch.from_numpy(np.stack([fold != m % cfg.folds for m in range(cfg.ensemble)]).astype(np.float32)), fold
    rng = np.random.default_rng(random_key(seed, "bootstrap"))
    return torch.from_numpy(rng.poisson(1.0, (cfg.ensemble, users)).astype(np.float32)), None


def fold_mean(values, fold, cfg):
    """values (M, N) of members -> (N,): the mean over all, or over those that were not fitted on the user's fold (N,)."""
    if fold is None:
        return values.mean(0)
    own = torch.from_numpy(fold)[None] == torch.arange(cfg.ensemble)[:, None] % cfg.folds
    return (values * own).sum(0) / own.sum(0)


@torch.no_grad()
def reward_advantages(cfg, model, world, device):
    """-> (advantages (E,) float32 by event of the log, nan where there is none; V (E,) likewise; {name: number} to report), from the BC model."""
    log, reward = world.log, world.reward.astype(np.float64)
    train = (world.part == TRAIN) & world.visible[log.user]
    mean = reward[train].mean()
    r, v, logps = (np.full(len(reward), np.nan) for _ in range(3))
    fold = bootstrap_counts(cfg, len(log.user_ids), cfg.seed)[1]
    rows = world.readers(world.visible)
    for block, batch, places, hidden in states(model, world, rows, device):
        events, users = batch.events.flatten()[places].numpy(), batch.users.repeat_interleave(batch.items.shape[1])[places].numpy()
        actions, h = batch.targets.flatten()[places].to(device), model.judged(hidden)
        said = model.reward.at(h, actions).cpu()
        spread = said.std(0) if len(said) > 1 else torch.zeros(len(events))
        user_fold = None if fold is None else fold[users]
        r[events] = dict(observed=torch.from_numpy(reward[events]), model=said[0], ensemble_mean=fold_mean(said, user_fold, cfg),
                         ensemble_lcb=fold_mean(said, user_fold, cfg) - spread)[cfg.advantage_reward].numpy()
        if cfg.baseline == "head":
            v[events] = fold_mean(model.value(h).cpu(), user_fold, cfg).numpy()
        if cfg.baseline == "policy":
            seen = seen_so_far(world, rows, np.arange(len(rows))[block], batch.items, places)
            v[events] = expected(ranking.log_policy(model.logits(hidden), seen.to(device)), model.reward.catalogue(h)).cpu().numpy()
        logps[events] = linear_logprob(model.users(hidden), model.catalogue(), actions - 1, temperature=model.config.temperature).logp.cpu().numpy()
    decided = ~np.isnan(r)
    if cfg.baseline == "zero":
        v[decided] = 0.0
    if cfg.baseline == "global":
        v[decided] = mean
    if cfg.baseline == "item":
        sums, counts = (np.bincount(log.item[train], w, minlength=len(log.item_ids) + 1) for w in (reward[train], None))
        v[decided] = np.where(counts > 0, sums / np.maximum(counts, 1), mean)[log.item[decided]]
    if cfg.baseline == "user":                                                # strictly past events: a mean with r_i in it would shrink A_i to 0
        v[decided] = interactions.earlier_means(log, reward, mean)[decided]
    found = dict(mean=float(np.nanmean(r - v)), std=float(np.nanstd(r - v)), logp=float(np.nanmean(logps)))
    return (r - v).astype(np.float32), v.astype(np.float32), found


def deciles(values):
    """(E,) -> (E,) int: 1..10 by the tenths of the values that are there, equal ones in one; 0 where there is none (nan)."""
    known = ~np.isnan(values)
    cuts = np.quantile(values[known], np.arange(1, 10) / 10)
    return np.where(known, 1 + np.searchsorted(cuts, values, side="left"), 0)


def method_weights(cfg, advantages, reward):
    """(E,) fp32 weights of a weighted method, nan where an event is no decision."""
    decided = torch.from_numpy(~np.isnan(advantages))
    a, r = torch.from_numpy(advantages), torch.from_numpy(reward)
    weights = {"asft": lambda: asft_weights(a, cfg.weight_temp, cfg.w_max), "bc": lambda: torch.ones_like(r), "reward_bc": lambda: r.clamp(min=0),
               "exp_rsft": lambda: exp_weights(torch.where(decided, r, 0.0), cfg.weight_temp)}[cfg.method]()
    return torch.where(decided, weights, math.nan)


# -----------------------------------------------------------------------------
# The run


class Stage(NamedTuple):
    label: str                  # bc, judge0, .., or the method; its selected weights go to out/<name>/<label>
    value: float | None         # of the method's knob
    steps: int
    select: str                 # metric of validation that decides which step stays; "": the last

    @property
    def post(self):
        return self.value is not None


def stages_of(cfg):
    methods = list(METHODS) if cfg.method == "all" else cfg.method.split(",")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--method={method}: expected some of {', '.join(METHODS)}, or all")
    if len(set(methods)) < len(methods):
        raise ValueError(f"--method={cfg.method} names a method twice")
    most = min(len(METHODS[method]["grid"]) for method in methods)
    if not 1 <= cfg.trials <= most:
        raise ValueError(f"--trials={cfg.trials}: expected 1 to {most}, as many as each of {cfg.method} has settings")
    wrong = [m for m in methods if METHODS[m].get("full") or m == "cql"]
    if cfg.softmax == "sampled" and wrong:
        raise ValueError(f"--softmax=sampled: {', '.join(wrong)} need log-probabilities over the whole catalogue; --softmax=full, or weighted methods")
    stages = [] if cfg.init else [Stage("bc", None, cfg.pretrain_steps, "ndcg@10")] + [Stage(f"judge{j}", None, cfg.judge_steps, "") for j in range(cfg.judges)]
    for method in methods:
        value = getattr(cfg, METHODS[method]["knob"])
        values = (value, *(v for v in METHODS[method]["grid"] if v != value))[:cfg.trials]
        stages += [Stage(method, value, 0 if method == "tilt" else cfg.num_steps, "high_ndcg@10") for value in values]
    return stages


def new_model(cfg, world):
    c = RecommenderConfig(num_items=len(world.catalogue.item_ids), max_length=cfg.max_length, backbone=cfg.backbone, dropout=cfg.dropout,
                          num_heads_reward=cfg.ensemble, reward_bins=cfg.history_rewards, **RECOMMENDER_SIZES[cfg.size])
    if cfg.history_rewards:
        train = world.reward[(world.part == TRAIN) & world.visible[world.log.user]]
        c = replace(c, reward_low=float(train.min()), reward_high=float(train.max()))
    return c


def check(cfg):
    if cfg.size not in RECOMMENDER_SIZES:
        raise ValueError(f"--size={cfg.size} is unknown; the sizes are {', '.join(RECOMMENDER_SIZES)}")
    if not 0 <= cfg.dropout < 1 or not 0 < cfg.expectile < 1 or not 0 <= cfg.gamma < 1:
        raise ValueError(f"expected --dropout and --gamma in [0, 1), --expectile in (0, 1), found {cfg.dropout}, {cfg.gamma}, {cfg.expectile}")
    for key in ("weight_temp", "w_max", "pref_beta"):
        if not getattr(cfg, key) > 0 and not (key == "weight_temp" and cfg.method == "crr" and cfg.weight_temp == 0):
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected above 0")
    if cfg.folds > 1 and cfg.ensemble < cfg.folds:
        raise ValueError(f"--folds={cfg.folds}: expected at most --ensemble={cfg.ensemble}, since each member leaves out one fold")
    stages = stages_of(cfg)
    methods = {stage.label for stage in stages if stage.post}
    if methods & {"iql", "dpo", "ipo"} and cfg.ensemble < 2 or methods & {"ppo", "ecpo"} and cfg.num_samples < 2:
        raise ValueError(f"--ensemble={cfg.ensemble}, --num_samples={cfg.num_samples}: expected at least 2 members for iql (the smaller of two Q), dpo and ipo "
                         "(spreads), and 2 samples for ppo and ecpo, whose advantages are differences")
    for key, least in dict(batch_size=1, device_batch_size=1, num_steps=1, pretrain_steps=1, policy_users=1, ensemble=1, num_negatives=1, num_samples=1,
                           refresh_every=1, folds=1, judges=0, judge_steps=1, history_rewards=0, kl_coef=0, gamma=0, cql_alpha=0, eval_every=0).items():
        if getattr(cfg, key) < least:
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected at least {least}")
    if cfg.folds > 1 and (cfg.advantage_reward not in ("observed", "ensemble_mean") or cfg.baseline == "policy"):
        raise ValueError(f"--folds={cfg.folds}: only --advantage_reward=observed or ensemble_mean, and a --baseline other than policy, "
                         "leave the user's own fold out")
    if cfg.w_max < 1:
        raise ValueError(f"--w_max={cfg.w_max}: expected at least 1, the weight of an advantage of 0")
    return stages


def trained_parts(model, stage):
    """Only what a stage trains has gradients: the trunk always, of the heads those of the method."""
    heads = METHODS[stage.label].get("heads", ()) if stage.post else ("reward", "value")
    for name in ("reward", "value"):
        getattr(model, name).requires_grad_(name in heads)


def train(cfg):
    rank, _, world_size, device = setup_distributed()
    stages = check(cfg)
    if cfg.batch_size < world_size:
        raise ValueError(f"--batch_size={cfg.batch_size}: expected at least one user for each of {world_size} processes")
    world = open_world(cfg)
    out_dir = Path("out") / cfg.name
    resume = checkpoint.find(out_dir, cfg.resume)
    config = new_model(cfg, world)
    bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    if rank == 0:
        print("\n".join(world.log.report), flush=True)
        print(f"{len(world.rows):,} training histories, {int((world.rows[:, 1] - world.rows[:, 2]).sum()):,} decisions; rewards of "
              f"{int(world.visible.sum()):,} users for the methods, of {int(world.judged.sum()):,} for the judges", flush=True)
    if cfg.dry_run:
        with torch.device("meta"):
            size = num_params(Recommender(config))
        tokens = cfg.device_batch_size * (cfg.max_length + 1)
        bytes_of = dict(weights=4 * size, gradients=4 * size, optimizer=8 * size, copies=8 * size, activations=tokens * (
            config.num_layers * (12 * config.hidden_size + 4 * config.num_heads * (cfg.max_length + 1)) * 4 + 12 * config.num_items),
            tables=2 * cfg.policy_users * config.num_items * (8 + 4 * min(cfg.judges, 2) + (8 if world.truth is not None else 0)))
        summary = asdict(cfg) | dict(parameters=size, stages=[f"{s.label} {s.value} {s.steps}" for s in stages],
                                     memory_mb={k: round(v / 2**20, 1) for k, v in bytes_of.items()})
        if rank == 0:
            print(json.dumps(summary))
        return summary

    decided = world.reward[(world.part == TRAIN) & world.visible[world.log.user]]
    for stage in stages:                                             # what would stop a method should stop the run before BC
        if stage.label == "exp_rsft":
            exp_weights(torch.from_numpy(decided), stage.value)
        if stage.label == "reward_bc" and decided.min() < 0 and cfg.negative == "stop":
            raise ValueError(f"reward_bc: rewards are weights and must not be negative, found {decided.min():g}: --negative=zero, or another --reward")
    state = dict(stage=0, step=0, best={}, results=[], seconds={})
    if cfg.init:
        theirs = checkpoint.read_json(Path(cfg.init) / "config.json")
        if wrong := [key for key in OF_INIT if theirs.get(key, getattr(Config, key)) != getattr(cfg, key)]:         # a flag younger than that run: its default
            raise ValueError(f"--init={cfg.init} was made with other settings: " + ", ".join(f"--{key}={theirs.get(key)}" for key in wrong))
    if resume:
        record = checkpoint.read_record(resume)
        if changed := [k for k, v in record["config"].items() if k not in MAY_CHANGE and getattr(cfg, k, v) != v]:
            raise ValueError(f"{resume} was made with other settings: " + ", ".join(f"--{k}={record['config'][k]}" for k in changed) + "; resume with the same")
        state = record["state"]
        if checkpoint.Catalogue(**checkpoint.read_json(resume / "catalogue.json")) != world.catalogue:
            raise ValueError(f"{resume}: its items are not those of --data={cfg.data}: the file has changed since")
    elif rank == 0:
        checkpoint.clear(out_dir, cfg.overwrite)
    offsets = np.concatenate([[0], np.cumsum([s.steps for s in stages])]).tolist()
    begun_at = offsets[state["stage"]] + state["step"]
    logger = Logger(cfg, rank, resume_step=begun_at if resume else None)
    started = time.monotonic()
    keep = lambda model, label: rank == 0 and checkpoint.save_hf(model, world.catalogue, out_dir / label)

    def load(label):
        path = (out_dir if label.startswith("post_") or not cfg.init else Path(cfg.init)) / label
        model, catalogue = checkpoint.load_recommender(path, device)
        if catalogue.item_ids != world.catalogue.item_ids:
            raise ValueError(f"{path}: its items are not those of --data={cfg.data}; a checkpoint and its map of items belong together")
        model.compute_dtype = dtype
        return model.eval()

    ref = advantages = tables = facts_of_bc = None

    for number in range(state["stage"], len(stages)):
        stage, begun = stages[number], number == state["stage"] and resume
        post = stage.post
        label = stage.label if not post else f"{stage.label} {METHODS[stage.label]['knob']}={stage.value:g}"
        run = replace(cfg, method=stage.label, **{METHODS[stage.label]["knob"]: float(stage.value)}) if post else replace(cfg, method="bc")
        folder_name = f"post_{stage.label}" if post else stage.label

        # what all trials share, from the files that the stages before left
        if post and ref is None:
            ref = load("bc").requires_grad_(False)
            judges = [load(f"judge{j}").requires_grad_(False) for j in range(cfg.judges)]
            advantages, expectations, facts_of_bc = reward_advantages(cfg, ref, world, device)
            tenths = deciles(expectations)
            tables = recommend.tables_of(ref, judges, world, device)
            logger.print(f"advantages: mean {facts_of_bc['mean']:.3f}, standard deviation {facts_of_bc['std']:.3f}")
            if rank == 0:
                np.save(out_dir / "advantages.npy", advantages)
            logger.print(recommend.describe("before", {name: found for name, (found, _) in recommend.evaluate(ref, world, tables, device).items()}))

        if begun:
            model, _ = checkpoint.load_recommender(resume, device)
        elif post:
            model = copy.deepcopy(ref)
        else:
            seed = cfg.seed if stage.label == "bc" else random_key(cfg.seed, stage.label) % 2**31
            model = Recommender(config if stage.label == "bc" else replace(config, reward_bins=0)).init_weights(seed).to(device)
            readers = world.visible if stage.label == "bc" else world.judged
            mean = float(world.reward[(world.part == TRAIN) & readers[world.log.user]].mean())
            for head in (model.reward, model.value):
                head.mean.data.fill_(mean)
        model.compute_dtype = dtype
        model.requires_grad_(True)
        trained_parts(model, stage)
        if post and stage.label == "cql" and not begun:              # Q = v + log pi starts where its mean is that of the rewards
            model.value.mean.data -= facts_of_bc["logp"]
        optimizers = make_optimizers(model, run.post_lr if post else cfg.lr, weight_decay=cfg.weight_decay, betas=(0.9, 0.98))
        old = None
        if stage.label in ("ppo", "ecpo", "iql") and post:
            old = copy.deepcopy(model).requires_grad_(False).eval()
        first_step = 0
        if begun:
            checkpoint.restore(resume, model, optimizers)
            first_step = state["step"]
            if old is not None:
                saved = checkpoint.load_extra(resume)
                for name, p in old.named_parameters():
                    p.data.copy_(saved[f"old.{name}"])
        weights = None
        if post and METHODS[stage.label].get("weighted"):
            weights = method_weights(run, advantages, world.reward)
            device_weights, mean_weight = weights.to(device), float(weights.nanmean())
            if stage.label == "reward_bc" and decided.min() < 0:
                logger.print(f"reward_bc: {np.mean(decided < 0):.1%} of the rewards are negative and weigh 0 (--negative=zero)")
        wrapped = parallelize(model, "ddp", device, world_size)
        forward = torch.compile(wrapped) if cfg.compile else wrapped
        rows = world.readers(world.visible) if post else world.rows if stage.label == "bc" else world.readers(world.judged)
        if not post:                                                 # how often each head counts a user, 0 where it must not read the rewards
            readers = torch.from_numpy(world.visible if stage.label == "bc" else world.judged)
            counts = bootstrap_counts(cfg, len(readers), random_key(cfg.seed, stage.label) if stage.label != "bc" else cfg.seed)[0] * readers

        for step in range(first_step, stage.steps + 1):
            last_step, g = step == stage.steps, offsets[number] + step

            # once in a while: ranks, values; what validation likes best stays
            looks = (last_step or (cfg.eval_every and step and step % cfg.eval_every == 0)) and not stage.label.startswith("judge")
            if looks and not (begun and step == first_step):
                tilt = 1 / run.weight_temp if stage.label == "tilt" else 0.0
                found = {name: values for name, (values, _) in recommend.evaluate(model, world, tables, device, tilt=tilt).items()}
                score = found["val"].get(stage.select, found["val"]["ndcg@10"])
                state["results"].append(dict(stage=number, method=stage.label if post else "", value=stage.value, step=step, last=last_step, **found))
                best = state["best"].get(folder_name)
                if best is None or score > best["score"]:
                    state["best"][folder_name] = dict(score=score, value=stage.value, step=step)
                    with checkpoint.together():
                        keep(model, folder_name)
                if stage.steps:                                      # tilt has no steps of its own: its numbers are in results.json
                    logger.log(g, **{f"{name}/{key}": value for name, values in found.items() for key, value in values.items()
                                     if "@10" in key or "@" not in key})
                logger.print(recommend.describe(f"{label} {step}/{stage.steps}", found))
            if last_step and stage.label.startswith("judge"):
                with checkpoint.together():
                    keep(model, folder_name)
            if cfg.save_every and g and g % cfg.save_every == 0 and step > first_step:
                extra = {f"old.{name}": p for name, p in old.named_parameters()} if old is not None else None
                checkpoint.save(out_dir, g, model, world.catalogue, optimizers, state=state | dict(stage=number, step=step), config=asdict(cfg), rank=rank,
                                world_size=world_size, extra=extra)
            if last_step:
                break
            if old is not None and stage.label != "iql" and step % cfg.refresh_every == 0:
                old.load_state_dict(model.state_dict())

            # one global batch: users, and everything random about them, are a function of (seed, stage, step)
            t0 = time.perf_counter()
            places = np.arange(step * cfg.batch_size, (step + 1) * cfg.batch_size)
            chosen = shuffled(places, len(rows), cfg.seed, stage.label if not post else "post")        # every trial sees the same users
            chosen = chosen[np.argsort(rows[chosen, 0] - rows[chosen, 1], kind="stable")]              # long ones together: less padding
            sizes = rows[chosen, 1] - rows[chosen, 2]
            num, starts = int(sizes.sum()), np.concatenate([[0], np.cumsum(sizes)])
            generator = torch.Generator().manual_seed(random_key(cfg.seed, "noise", "post" if post else stage.label, step))
            noise = torch.rand(num, 2 * cfg.num_samples, generator=generator) if post and METHODS[stage.label].get("full") else None
            negatives = None
            if cfg.softmax == "sampled":                             # uniform over the other items, as logq assumes
                negatives = torch.randint(1, config.num_items, (num, cfg.num_negatives), generator=generator)
                actions = torch.from_numpy(np.concatenate([world.log.item[row[2]:row[1]] for row in rows[chosen]]))
                negatives += negatives >= actions[:, None]
            num_judged, denominator = 0, float(num)
            if not post:
                num_judged = int(sizes[readers.numpy()[world.log.user[rows[chosen, 0]]]].sum())
            elif weights is not None:
                batch_weights = np.concatenate([weights[row[2]:row[1]].numpy() for row in rows[chosen]])
                if stage.label == "asft" and cfg.normalize != "none":
                    denominator = float(batch_weights.sum()) if cfg.normalize == "batch" else num * mean_weight

            mine = np.arange(rank, len(chosen), world_size)
            groups = [mine[i:i + cfg.device_batch_size] for i in range(0, len(mine), cfg.device_batch_size)]
            sums = {}
            model.train(not post)
            for i, which in enumerate(groups):
                set_gradient_sync(wrapped, i == len(groups) - 1)
                batch = interactions.batch(world.log, world.reward, rows, chosen[which])
                arguments = context(world, batch, device)
                own = np.concatenate([np.arange(starts[w], starts[w + 1]) for w in which])
                torch.manual_seed(random_key(cfg.seed, stage.label, step, rank, i))                    # of dropout
                hidden = forward(*arguments)
                f = facts(run, world, type(batch)(*on(device, *batch)), hidden, None if weights is None else device_weights,
                          *on(device, noise if noise is None else noise[own], negatives if negatives is None else negatives[own]), rows, chosen[which])
                if post:
                    flat = lambda m: m(*arguments).flatten(0, 1)[(batch.targets.flatten() > 0).to(device)]
                    with torch.no_grad():
                        past = (ref, flat(ref)) if METHODS[stage.label].get("full") and stage.label != "crr" else None
                        before_now = None if old is None else (old, flat(old) if stage.label != "iql" else None)
                    loss, found = post_loss(run, model, past, before_now, f, num, denominator)
                else:
                    users = batch.users.repeat_interleave(batch.items.shape[1])[batch.targets.flatten() > 0]
                    loss, found = bc_loss(run, model, f, counts[:, users].to(device), num, num_judged)
                for key, value in (found | dict(loss=loss.detach())).items():
                    sums[key] = sums.get(key, 0.0) + value.double()
                (loss * world_size).backward()                                                         # DDP averages, we want the sum
            names = sorted(sums)
            sums = dict(zip(names, all_reduce_sum(torch.stack([sums[k] for k in names])).tolist()))
            check_finite("train/loss", sums["loss"])

            # update
            grad_norm = clip_grad_norm(model, cfg.max_grad_norm).item()
            check_finite("train/grad_norm", grad_norm)
            scale = lr_scale(step, stage.steps, cfg.warmup_steps, cfg.decay_share)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * scale
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if stage.label == "iql" and post:
                with torch.no_grad():
                    for p, target in zip(model.reward.parameters(), old.reward.parameters()):
                        target.lerp_(p, 1 - cfg.target_decay)

            # log
            seconds = time.perf_counter() - t0
            state["seconds"][label] = state["seconds"].get(label, 0.0) + seconds
            metrics = {f"train/{key}": value for key, value in sums.items()} | {"train/grad_norm": grad_norm, "train/lr": optimizers[0].param_groups[0]["lr"]}
            if weights is not None:
                metrics |= {"train/ess": ranking.ess_share(batch_weights), "train/clipped": float((batch_weights >= cfg.w_max).mean()),
                            "train/weight_p50": float(np.median(batch_weights)), "train/weight_p95": float(np.quantile(batch_weights, 0.95))}
                if stage.label == "asft":                            # do happy histories speak louder? V should level them
                    events = np.concatenate([np.arange(row[2], row[1]) for row in rows[chosen]])
                    metrics |= {"train/advantage": float(advantages[events].mean())}
                    metrics |= {f"train/weight_v{k}": float(batch_weights[tenths[events] == k].mean()) for k in np.unique(tenths[events]).tolist()}
            logger.log(g + 1, **metrics, **{"time/step": seconds, "time/decisions_per_sec": num / seconds})
            if (step + 1) % max(1, stage.steps // 4) == 0:
                left = (time.monotonic() - started) / (g + 1 - begun_at) * (offsets[-1] - g - 1)
                logger.print(f"{label} step {step + 1:5d}/{stage.steps} | " + " | ".join(f"{k} {v:.3f}" for k, v in sums.items())
                             + f" | grad_norm {grad_norm:.2f} | {1000 * seconds:.0f} ms | {format_seconds(left)} left")
    return finish(cfg, world, stages, state, load, tables, device, logger, started, rank, world_size, offsets[-1])


def finish(cfg, world, stages, state, load, tables, device, logger, started, rank, world_size, total):
    """Selected against last, before and after, validation and test, and what the heads are worth; the first method's selected weights are the checkpoint."""
    ref = load("bc")
    if tables is None:
        tables = recommend.tables_of(ref, [load(f"judge{j}") for j in range(cfg.judges)], world, device)
    found = recommend.evaluate(ref, world, tables, device)
    before, of_target = {name: values for name, (values, _) in found.items()}, found["test"][1]
    methods = list(dict.fromkeys(r["method"] for r in state["results"] if r["method"]))
    rows, after, gains = [["before (BC)", "", "", *recommend.row(before)]], {}, []
    for method in methods:
        best, knob = state["best"][f"post_{method}"], METHODS[method]["knob"]
        found = recommend.evaluate(load(f"post_{method}"), world, tables, device, tilt=1 / best["value"] if method == "tilt" else 0.0)
        last = [r for r in state["results"] if r["method"] == method and r["value"] == best["value"] and r["last"]][-1]
        after[method] = {name: values for name, (values, _) in found.items()}
        rows += [[method, f"{knob} {best['value']:g}", f"{values['step']}, {which}", *recommend.row(numbers)]
                 for which, values, numbers in (("selected", best, after[method]), ("last", last, last))]
        gains.append([method, *recommend.differences(found["test"][1], of_target, world, cfg.seed)])
    heads, final = recommend.check_heads(ref, world, cfg.max_length, device, cfg.seed), load(f"post_{methods[0]}")
    saved = checkpoint.save(logger.out_dir, total, final, world.catalogue, [], state=state | dict(stage=len(stages), step=0), config=asdict(cfg), rank=rank,
                            world_size=world_size)
    if rank == 0:
        seconds, references = {}, recommend.references(world) if world.truth is not None else {}
        for label, value in state["seconds"].items():
            seconds[label.split()[0]] = seconds.get(label.split()[0], 0.0) + value
        lines = [f"# {', '.join(methods)} after BC on {cfg.data}\n", *(f"- {line}" for line in world.log.report), "",
                 f"Targets: {before['val']['targets']:,} validation, {before['test']['targets']:,} test; of these {before['val']['high_targets']:,} and "
                 f"{before['test']['high_targets']:,} with a raw reward of {cfg.high:g} or more. Steps and settings are selected on validation alone "
                 f"({'high_ndcg@10' if before['val']['high_targets'] else 'ndcg@10: no target is high'}).\n",
                 "## Reward model and the averages that it has to beat: test events of users whose rewards it may read\n", *recommend.heads_report(heads),
                 *(["True values to compare with: " + ", ".join(f"{k} {v:.3f}" for k, v in references.items()) + ".\n"] if references else []),
                 "## Before and after\n", recommend.markdown(["method", "setting", "step", *recommend.HEADER], rows),
                 "## Test, selected less before: 95 % paired bootstrap over users\n", recommend.markdown(["method", *recommend.COMPARED], gains),
                 "Wall time of the steps: " + ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items()) + ". Equal steps are not equal cost.\n"]
        write_atomically(logger.out_dir / "report.md", "\n".join(lines) + "\n")
        write_atomically(logger.out_dir / "results.json", json.dumps(dict(
            before=before, after=after, references=references, heads=heads, best=state["best"], results=state["results"], seconds=seconds,
            config=asdict(cfg))) + "\n")
        recommend.picture(state["results"], before, logger.out_dir / "frontier.png")
        logger.picture(total, "frontier", logger.out_dir / "frontier.png")
        print("\n".join(lines[len(world.log.report) + 2:]), flush=True)
    short = lambda values: {k: values["test"][k] for k in recommend.SHOWN if k in values["test"]}
    summary = dict(name=cfg.name, checkpoint=str(saved), parameters=num_params(final), seconds=round(time.monotonic() - started, 1), before=short(before),
                   **{method: short(values) for method, values in after.items()})
    logger.close(**summary)
    return summary


def main(cfg):
    return train(cfg)


if __name__ == "__main__":
    main(parse_config(Config))
