"""Reinforcement learning from rewards that are checked or judged: PPO with a critic, and the GRPO family.

A step is one round: sample G answers to each of P prompts (tools executed), grade them, turn rewards into an advantage for every sampled
token, update, log. With rho_t = p_theta(a_t) / p_old(a_t), old being the policy that the round began with,

    loss = - sum_t c_t · w_t · min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)

over the tokens that the policy sampled: prompts, tool results and template text carry nothing anywhere. c_t holds the denominator (token_mean:
1 / tokens of the global batch), w_t corrects for a sampler that is not quite the trained policy. Methods differ in A, in rho and in c: see METHODS.
Prompts may belong to tracks (logic, chat), which share a step, and neither advantages nor denominators. With --rewards=rlcr (arXiv 2507.16806) the
confidence that an answer states is paid for being true; the prompts must ask for it, as in <confidence>0.85</confidence> at the end.

    python train_rl.py --data=toy --size=tiny                                       laptop, from nothing: a short SFT, then GRPO
    python train_rl.py --init=out/quickstart/sft --data=math_en --method=ppo        laptop
    python train_rl.py --init=out/quickstart/sft --data=logic=math_en,chat=chat_en  two tracks in one run; merge.py joins two runs
    python train_rl.py --init=<Hugging Face folder> --data=gsm8k                    one GPU; rates and sizes by --dry_run
    torchrun --nproc_per_node=8 train_rl.py ...                                     the same flags, eight GPUs
"""
import copy
import math
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

import checkpoint
from common import Logger, all_gather_list, all_reduce_sum, check_finite, format_seconds, lr_scale, parse_config, random_key, setup_distributed
from data import sandbox, tasks
from data.grading import Outcome
from data.packing import micro_batches, sequence_batch, shuffled, token_offsets
from data.rewards import check_reward, grader_reward, open_rewards, parse_rewards
from kernels import gae, linear_logprob
from model import (ScalarHead, Transformer, add_lora, clip_grad_norm, config_for_size, lora_off, make_optimizers, memory_estimate, num_params,
                   parallelize, set_gradient_sync)
from rollouts import as_line, check_grader_errors, play_for_rewards, rollout_metrics
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    name: str = "dummy"              # results go to out/<name>; any name but dummy also opens wandb
    seed: int = 0                    # decides samples and the order of prompts
    # model
    init: str = ""                   # checkpoint folder to start from, of ours or of Hugging Face; empty: random weights of --size and a short SFT
    ref: str = ""                    # reference of the KL terms; empty: where the run starts
    size: str = "tiny"               # from scratch: nano | tiny | mini | small | base
    tokenizer: str = "bytes"         # from scratch: bytes, or a Hugging Face tokenizer.json
    cold_start: int = -1             # SFT steps on gold answers before RL, toy tasks only; auto: 200 without --init, else 0
    lora_rank: int = 0               # 0: train all weights; 8 to 64: LoRA on every linear layer of the blocks
    lora_alpha: float = 64.0         # LoRA's update is scaled by alpha / rank: higher learns faster
    # prompts and rewards
    data: str = "toy"                # comma-separated prompts: tasks of data/tasks.py or files; track=<source> puts one in a track of that name
    num_prompts: int = 1000          # problems of each task that makes its own; files give all they have
    track_mix: str = ""              # share of a step's prompts by track, e.g. logic:.5,chat:.5; empty: equal
    track_weight: str = ""           # weight of each track's loss; empty: equal
    max_prompt_tokens: int = 512     # longer prompts are left out and counted
    max_new_tokens: int = -1         # bound on a rollout, tool results included; auto: the largest of the tasks' own
    val_fraction: float = 0.05       # share of a file's rows held out
    rewards: str = "grader"          # grader, file, judge, rlcr (right, and sure of it), weighted as in grader:1,judge:.5 and by track: logic/grader,chat/judge
    grader: str = ""                 # of rows in files: exact | gsm8k | math | ifeval | code | none; empty: by their data_source
    reward_file: str = ""            # your Python file with a reward function (Bedrock's and SageMaker's contract, or verl's)
    reward_function: str = "lambda_handler"     # its name there
    reward_role: Literal["assistant", "nova_assistant"] = "assistant"           # role of the response in what it is sent
    reward_event: Literal["list", "batch", "input", "trajectories", "body"] = "list"        # how the samples are wrapped
    reward_timeout: float = 30.0     # seconds until a call of it is given up
    judge: str = ""                  # checkpoint folder, or the http(s) URL of an OpenAI-compatible server
    judge_model: str = ""            # the model's name on that server
    judge_retries: int = 2           # repeats after transport faults
    judge_timeout: float = 60.0      # seconds until a request to a server is given up
    judge_range: str = "0:1"         # lowest and highest score; others are failures of the judge
    rubric: str = "instruction"      # instruction | summary | reasoning | faithfulness, or a file with {prompt} {answer} {reference}
    log_filter: str = ""             # of invocation logs: JSON with equals, notEquals, andAll or orAll
    log_bodies: str = ""             # folder with bodies that a log keeps elsewhere
    use_prompt_response: bool = False            # the logged response becomes the reference answer
    max_grader_error: float = 0.02   # share of a step's samples that may go without a reward
    reward_check: int = 0            # problems whose references, and others' references, the rewards score before training; 0: none
    solve_samples: int = 0           # answers to each prompt before training; prompts outside --solve_range are then left out; 0: off
    solve_range: str = ".2:.8"       # share of right answers, lowest and highest
    # the algorithm; auto: by method, see METHODS
    method: Literal["grpo_mean", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "ppo"] = "grpo_mean"     # a row of METHODS
    group_size: int = -1             # G, answers to each prompt; auto: 8, ppo 4
    prompts_per_step: int = -1       # P; auto: a sixteenth of the prompts as a power of two, 8 to 64
    temperature: float = 1.0         # of sampling; log-probabilities are of the sampled distribution
    baseline: str = "auto"           # taken off a reward: mean (of its group) | others (leaves itself out) | none
    adv_scale: str = "auto"          # advantages are divided by: none | group | batch (standard deviations)
    aggregate: str = "auto"          # token_mean | seq_mean (of each sequence's mean) | constant (tokens / max_new_tokens)
    ratio: str = "auto"              # token | sequence (GSPO) | cispo
    clip_low: float = -1.0           # the ratio is clipped to [1 - low, 1 + high]; auto: by method
    clip_high: float = -1.0          # higher lets rare tokens grow; auto: by method
    cispo_cap: float = 5.0           # CISPO's bound on the ratio
    dual_clip: float = 0.0           # bound on the loss where the advantage is negative, e.g. 3; 0: off
    kl_coef: float = -1.0            # strength of the pull to the reference; auto: 0, ppo .001
    kl_form: str = "k1_reward"       # k1_reward | k2_loss | k3_rho_loss | k3_loss: which gradient each has stands at kl_penalty
    entropy_coef: float = 0.0        # bonus for entropy
    is_mode: Literal["token", "seq_mask", "none"] = "token"      # sampler correction: weights capped at is_cap, or sequences masked beyond [1/is_cap, is_cap]
    is_cap: float = 2.0              # see is_mode
    dynamic_sampling: str = "auto"   # groups whose rewards are all equal: off | drop | refill (sample others); auto: drop, dapo refill, ppo off
    refill_tries: int = 3            # rounds of refilling
    overlong: float = -1.0           # share of max_new_tokens at whose end a reward falls by up to 1 (DAPO); auto: 0 (off), dapo .2
    truncated: Literal["terminal", "mask", "bootstrap"] = "terminal"      # answers out of tokens: graded as they stand | no loss | plus the critic's value
    num_epochs_per_step: int = 1     # passes over a step's samples
    num_minibatches: int = -1        # updates per pass; auto: 1, ppo 4
    target_kl: float = 0.0           # nats per token from where a step began: beyond it the policy's other updates of the step are left out; 0: off
    missing_eos: float = 0.0         # reward of an answer out of tokens, in place of its own: -1 in RLHF, where no grader sees the cut; 0: its own
    # PPO
    critic_lr: float = -1.0          # auto: 10 times lr
    critic_warmup: int = 20          # first steps that train the critic alone; they count
    gamma: float = 1.0               # discount per token
    lam: float = 1.0                 # of the policy's advantages: 1 suits one reward at the end, .95 shorter sight
    lam_value: float = 1.0           # of the critic's targets
    lam_length: float = 0.0          # above 0: lam is 1 - 1 / (lam_length n) for an answer of n tokens, .05 in VAPO; 0: off
    value_clip: float = 0.5          # bound on a value's move in one step
    reward_norm: bool = False        # divide rewards by their running standard deviation
    # length of the run and optimization
    num_steps: int = -1              # rounds; auto: by num_epochs
    num_epochs: int = -1             # passes over the prompts; auto: 6 below 1,000 prompts, 3 below 5,000, else 1
    device_batch_size: int = 16      # rows per forward pass and device: lower when memory runs out, the result stays the same; auto: as many as fit
    lr: float = -1.0                 # peak rate of AdamW; auto: 1e-3 below 20M parameters (5e-4 for several updates a step), 1e-6 up to 3B, LoRA 3e-5
    weight_decay: float = 0.0        # on matrices
    warmup_steps: int = 10           # steps of linear warm-up
    decay_share: float = 0.0         # the last share of the run goes linearly to rate 0
    max_grad_norm: float = 1.0       # global norm the gradient is clipped to
    # machine
    pack: bool = False               # several sequences to a row; false: sorted by length, and a prompt that answers share computed once
    slots: int = 128                 # rollouts sampled at once
    tool_timeout: float = 60.0       # seconds until a call is given up; its rollout ends there
    sandbox: Literal["auto", "namespaces", "landlock", "none_i_accept"] = "auto"        # the box in which written code runs
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"      # of the computation; weights are float32 always; auto: bfloat16 on CUDA
    recompute: bool = False          # activation checkpointing: a third slower, most of the activation memory back
    compile: bool = False            # torch.compile the model
    # guards
    preflight: int = 64              # prompts sampled before training to see whether there is anything to learn; 0: none
    force: bool = False              # go on where the preflight or a guard says stop
    max_engine_kl: float = 0.05      # sampler against trainer, nats per token: above it the run stops
    # looking and keeping
    eval_every: int = -1             # steps between evaluations, 0: only at the end; auto: an epoch, at most 10
    eval_tasks: str = ""             # further tasks of eval.py, e.g. math_en@test_template
    eval_problems: int = 100         # held-out problems per source
    log_rollouts: int = 16           # samples per step kept in rollouts.jsonl and shown in wandb; chat.py --rollouts pages through them
    save_every: int = 0              # steps between checkpoints; 0: only at the end
    resume: str = ""                 # latest, or a step folder: continue out/<name> exactly
    overwrite: bool = False          # delete the checkpoints of an earlier run of this name
    dry_run: bool = False            # print the resolved settings and the memory estimate, and stop


# -----------------------------------------------------------------------------
# The algorithms

GROUP = dict(baseline="mean", adv_scale="none", ratio="token", clip_low=.2, clip_high=.2, aggregate="token_mean", dynamic_sampling="drop",
             overlong=0.0, kl_coef=0.0, group_size=8, num_minibatches=1)
METHODS = {
    "grpo_mean": GROUP | dict(clip_high=.28),
    "grpo": GROUP | dict(adv_scale="group", aggregate="seq_mean"),                                                 # 2402.03300
    "dr_grpo": GROUP | dict(aggregate="constant"),                                                                 # 2503.20783
    "dapo": GROUP | dict(adv_scale="group", clip_high=.28, dynamic_sampling="refill", overlong=.2),                # 2503.14476
    "gspo": GROUP | dict(adv_scale="group", ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregate="seq_mean"),         # 2507.18071
    "cispo": GROUP | dict(adv_scale="group", ratio="cispo"),                                                       # 2506.13585
    "rloo": GROUP | dict(baseline="others", aggregate="constant"),                                                 # 2402.14740
    "reinforce++": GROUP | dict(baseline="none", adv_scale="batch", dynamic_sampling="off"),                       # 2501.03262
    "ppo": GROUP | dict(baseline="none", adv_scale="batch", clip_high=.28, dynamic_sampling="off", kl_coef=1e-3, group_size=4, num_minibatches=4),
}
CHOICES = dict(baseline=("mean", "others", "none"), adv_scale=("none", "group", "batch"), aggregate=("token_mean", "seq_mean", "constant"),
               ratio=("token", "sequence", "cispo"), dynamic_sampling=("off", "drop", "refill"),
               kl_form=("k1_reward", "k2_loss", "k3_rho_loss", "k3_loss"))

# what a run that goes on may do otherwise than the one that stopped
MAY_CHANGE = ("name", "num_steps", "num_epochs", "device_batch_size", "pack", "slots", "tool_timeout", "sandbox", "recompute", "compile", "preflight",
              "force", "max_grader_error", "max_engine_kl", "reward_check", "reward_timeout", "judge_retries", "judge_timeout", "eval_every", "eval_tasks",
              "eval_problems", "log_rollouts", "save_every", "resume", "overwrite", "dry_run")


def group_advantages(rewards, valid, baseline="mean", scale="none"):
    """rewards, valid (P, G) -> advantages (P, G): r - mean of the group's valid rewards, 0 where not valid.

    baseline "others": r_i minus the mean of the others, which is G / (G - 1) times r_i - mean (RLOO); "none": r. scale "group": divided by
    the sample standard deviation (n - 1) + 1e-4. Groups with fewer than two valid rewards give 0, except for baseline "none".
    """
    n = valid.sum(1, keepdim=True).to(rewards.dtype)
    rewards = torch.where(valid, rewards, 0.0)
    if baseline == "none":
        return rewards
    centred = torch.where(valid & (n > 1), rewards - rewards.sum(1, keepdim=True) / n.clamp(min=1), 0.0)
    if baseline == "others":
        return centred * n / (n - 1).clamp(min=1)
    if scale == "group":
        return centred / ((centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt() + 1e-4)
    return centred


def token_scale(lengths, aggregate, num_tokens, num_sequences, max_new_tokens):
    """(S,) lengths -> (S,): c_t of the tokens of each sequence. num_tokens, num_sequences: of the global batch.

    token_mean: every token of the batch counts alike. seq_mean: every sequence does, so a token of a long one counts for less. constant: tokens
    over (sequences x max_new_tokens), token_mean without the dependence on how long the others were.
    """
    lengths = lengths.double()
    if aggregate == "token_mean":
        return torch.full_like(lengths, 1 / max(1, num_tokens))
    if aggregate == "seq_mean":
        return 1 / (max(1, num_sequences) * lengths.clamp(min=1))
    return torch.full_like(lengths, 1 / (max(1, num_sequences) * max_new_tokens))


def policy_loss(logps, old_logps, advantages, scale, sequences, *, ratio="token", clip_low=.2, clip_high=.2, cap=5.0, dual_clip=0.0, weights=None):
    """-> loss (a sum; scale holds the denominators), clipped (N,) bool. All (N,), one entry per sampled token; sequences: whose token it is.

    token      - c w min(rho A, clip(rho) A)                                    PPO (arXiv 1707.06347, eq. 7)
    sequence   the same with s = exp(mean_t log rho_t) in place of rho          GSPO (arXiv 2507.18071, eq. 5)
    cispo      - c w sg(min(rho, cap)) A log p                                  CISPO (arXiv 2506.13585, eq. 4)
    dual_clip  where A < 0, the term is at least dual_clip * A
    """
    log_ratio = logps - old_logps
    if ratio == "sequence":
        _, index, counts = sequences.unique(return_inverse=True, return_counts=True)
        means = torch.zeros(len(counts), dtype=logps.dtype, device=logps.device).index_add(0, index, log_ratio) / counts
        log_ratio = means[index]
    rho = log_ratio.exp()
    if ratio == "cispo":
        clipped = rho.detach() > cap
        gain = rho.detach().clamp(max=cap) * advantages * logps
    else:
        bounded = rho.clamp(1 - clip_low, 1 + clip_high)
        gain = torch.minimum(rho * advantages, bounded * advantages)
        clipped = bounded * advantages < rho * advantages
        if dual_clip:
            gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    weights = 1.0 if weights is None else weights
    return -(scale * weights * gain).sum(), clipped


def kl_penalty(logps, old_logps, ref_logps, form):
    """(N,) penalty per token, to be scaled like the loss. k1 = log p - log ref on sampled tokens.

    k2_loss      k1^2 / 2                   gradient of KL(p || ref) with the prefix held fixed
    k3_rho_loss  rho (exp(-k1) - 1 + k1)    the same
    k3_loss      exp(-k1) - 1 + k1          gradient of KL(ref || p): the other direction, in most GRPO code
    (k1_reward   k1 off the reward: the exact gradient of KL(p || ref), not here but in the advantages)
    """
    k1 = logps - ref_logps
    if form == "k2_loss":
        return k1.square() / 2
    k3 = (-k1).exp() - 1 + k1
    return k3 if form == "k3_loss" else (logps - old_logps).exp() * k3


def value_loss(values, old_values, returns, scale, clip):
    """1/2 sum c max((V - R)^2, (V_old + clip(V - V_old) - R)^2), and (N,) bool where the clipped one is larger."""
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    plain, held = (values - returns).square(), (bounded - returns).square()
    return 0.5 * (scale * torch.maximum(plain, held)).sum(), held > plain


def overlong_penalty(length, truncated, limit, share):
    """0 up to (1 - share) of the limit, falling to -1 at it; -1 if truncated (DAPO, arXiv 2503.14476, eq. 13)."""
    room = share * limit
    return -1.0 if truncated else min(0.0, (limit - room - length) / room)


def ppo_advantages(token_rewards, values, offsets, last_values, cfg):
    """Flat (N,) rewards and values of sampled tokens -> flat (advantages, returns). Observations between turns are not in them, so a value's
    successor is that of the next sampled token. offsets (S + 1,): where sequences begin. last_values (S,): added to the last reward (0, or
    gamma V of the state where a sample was cut). lam_length: a sight that grows with the answer (VAPO, arXiv 2504.05118), 0 for the shortest."""
    lengths = torch.from_numpy(np.diff(offsets))
    if not len(lengths):
        return token_rewards, token_rewards
    inside = torch.arange(int(lengths.max()))[None] < lengths[:, None]                      # (S, T)
    rewards, before = torch.zeros(inside.shape, dtype=values.dtype), torch.zeros(len(lengths), inside.shape[1] + 1, dtype=values.dtype)
    rewards[inside], before[:, :-1][inside] = token_rewards, values
    rewards[torch.arange(len(lengths)), lengths - 1] += cfg.gamma * last_values
    dones = torch.arange(inside.shape[1])[None] >= lengths[:, None] - 1                     # the last token, and all that is filler
    lam = (1 - 1 / (cfg.lam_length * lengths.double())).clamp(min=0) if cfg.lam_length else cfg.lam
    advantages, returns = gae(rewards, before, dones, cfg.gamma, lam)
    if cfg.lam_length or cfg.lam_value != cfg.lam:                                                            # decoupled (VC-PPO, arXiv 2503.01491)
        returns = gae(rewards, before, dones, cfg.gamma, cfg.lam_value)[1]
    return advantages[inside], returns[inside]


def reward_to_go(token_rewards, offsets):
    """(N,) sum of the rewards from each token to the end of its sequence (REINFORCE++'s return, arXiv 2501.03262, eq. 6)."""
    before = torch.cat([token_rewards.new_zeros(1), token_rewards.double().cumsum(0)])
    ends = torch.repeat_interleave(torch.from_numpy(offsets[1:]), torch.from_numpy(np.diff(offsets)))
    return (before[ends] - before[:-1]).to(token_rewards.dtype)


def whiten(x, tracks, num_tracks, center=True):
    """(x - mean) / (std + 1e-8) over the entries of each track in the global batch. x, tracks (N,), track -1: left out, 0. center=False divides only,
    by std + 1e-4."""
    x, out = x.double(), torch.zeros_like(x)
    for k in range(num_tracks):
        mine = tracks == k
        n, total = all_reduce_sum(torch.stack([mine.sum().double(), x[mine].sum()])).tolist()
        mean = total / max(1, n)
        std = math.sqrt(all_reduce_sum((x[mine] - mean).square().sum()).item() / max(1, n - 1))
        out[mine] = ((x[mine] - (mean if center else 0)) / (std + (1e-8 if center else 1e-4))).to(out.dtype)
    return out


class Critic(nn.Module):
    """A copy of the policy's trunk with a scalar head that starts at 0. forward -> values (N,) at `rows`, fp32."""

    def __init__(self, model):
        super().__init__()
        self.trunk = copy.deepcopy(model)
        self.trunk.lm_head = None
        self.head = ScalarHead(model.config.hidden_size).to(model.lm_head.weight.device)

    def forward(self, ids, positions, doc_ids, rows):
        return self.head(self.trunk(ids, positions, doc_ids).flatten(0, 1)[rows])


# -----------------------------------------------------------------------------
# Settings


def resolve(cfg, parameters, num_prompts, max_new_tokens):
    """-> cfg with every -1 and "auto" chosen. Done once, before anything is logged: the config that is saved is the one that ran."""
    chosen = {}
    for key, value in METHODS[cfg.method].items():
        if getattr(cfg, key) in (-1, "auto"):
            chosen[key] = value
    cfg = replace(cfg, **chosen)
    auto = lambda key, value: getattr(cfg, key) if getattr(cfg, key) != -1 else value
    per_step = auto("prompts_per_step", max(8, 2 ** int(math.log2(max(1, min(64, num_prompts / 16))))))
    epochs = auto("num_epochs", 6 if num_prompts < 1000 else 3 if num_prompts < 5000 else 1)
    small = 5e-4 if cfg.num_minibatches * cfg.num_epochs_per_step > 1 else 1e-3
    lr = auto("lr", small if parameters < 20e6 else 3e-5 if cfg.lora_rank else 7e-7 if parameters > 3.5e9 else 1e-6)
    steps_per_epoch = max(1, num_prompts // per_step)
    cfg = replace(cfg, prompts_per_step=per_step, num_epochs=epochs, lr=lr, critic_lr=auto("critic_lr", 10 * lr),
                  num_steps=auto("num_steps", epochs * steps_per_epoch), eval_every=auto("eval_every", min(10, steps_per_epoch)),
                  max_new_tokens=auto("max_new_tokens", max_new_tokens), cold_start=auto("cold_start", 0 if cfg.init else 200))

    allowed = dict(lr=(1e-8, 1e-2), critic_lr=(1e-8, 1e-1), temperature=(1e-6, 2), clip_low=(0, 1), clip_high=(0, 1.5), cispo_cap=(1, 10), kl_coef=(0, 1),
                   group_size=(1 if cfg.method in ("ppo", "reinforce++") else 2, 64), lora_rank=(0, 256), lora_alpha=(1, 512), num_epochs=(1, 100),
                   prompts_per_step=(1, 4096), num_minibatches=(1, 64), num_epochs_per_step=(1, 16), gamma=(0, 1), lam=(0, 1), lam_value=(0, 1),
                   overlong=(0, 1), num_steps=(0, 10**7), max_new_tokens=(1, 10**6), is_cap=(1, 1e9), dual_clip=(0, 100), max_grader_error=(0, 1),
                   eval_every=(0, 10**9), cold_start=(0, 10**6), target_kl=(0, 10), missing_eos=(-100, 0), lam_length=(0, 100))
    for key, (low, high) in allowed.items():
        if not low <= getattr(cfg, key) <= high:
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected within [{low}, {high}]; {METHODS[cfg.method].get(key, 'auto')} is recommended")
    if cfg.kl_form in ("k1_loss", "k3_reward"):
        why = "zero, so it regularizes nothing" if cfg.kl_form == "k1_loss" else "not that of a KL"
        raise ValueError(f"--kl_form={cfg.kl_form}: its expected gradient is {why}; expected {', '.join(CHOICES['kl_form'])}\n{kl_penalty.__doc__}")
    for key, values in CHOICES.items():
        if getattr(cfg, key) not in values:
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected one of {', '.join(values)}")
    if cfg.method in ("ppo", "reinforce++") and cfg.baseline != "none":
        raise ValueError(f"--baseline={cfg.baseline}: {cfg.method} has its own, " + ("the critic" if cfg.method == "ppo" else "the mean of the batch"))
    if cfg.method in ("ppo", "reinforce++") and cfg.adv_scale != "batch":
        raise ValueError(f"--adv_scale={cfg.adv_scale}: {cfg.method} whitens over the batch")
    if cfg.method == "ppo" and 0 < cfg.num_steps <= cfg.critic_warmup:
        raise ValueError(f"--critic_warmup={cfg.critic_warmup}: the policy would never be trained in --num_steps={cfg.num_steps}")
    if cfg.adv_scale == "group" and cfg.baseline != "mean":
        raise ValueError(f"--adv_scale=group divides by the deviation of a group around its mean: expected --baseline=mean, found {cfg.baseline}")
    if cfg.adv_scale == "group" and any(weights.get("rlcr") for weights in parse_rewards(cfg.rewards).values()):
        raise ValueError(f"--rewards={cfg.rewards} and --adv_scale=group: dividing by the group's standard deviation makes proper scoring rules over-confident "
                         "(arXiv 2508.11800); expected --adv_scale=none")
    if cfg.target_kl and cfg.num_epochs_per_step * cfg.num_minibatches == 1:
        raise ValueError(f"--target_kl={cfg.target_kl}: a step of one update has none to leave out; raise --num_minibatches or --num_epochs_per_step")
    if cfg.missing_eos and cfg.truncated == "mask":
        raise ValueError(f"--missing_eos={cfg.missing_eos}: --truncated=mask trains on no answer that it would reach")
    if cfg.lam_length and (cfg.method != "ppo" or cfg.lam != 1):
        raise ValueError(f"--lam_length={cfg.lam_length}: is in place of --lam (found {cfg.lam}), and of --method=ppo (found {cfg.method})")
    if cfg.truncated == "bootstrap" and cfg.method != "ppo":
        raise ValueError("--truncated=bootstrap needs the critic of --method=ppo")
    return cfg


def parse_by_track(text, tracks, flag):
    """"logic:.7,chat:.3" -> [.7, .3], in the order of tracks and with sum 1; empty: equal."""
    given = dict(item.rpartition(":")[::2] for item in text.split(",")) if text else {name: 1 for name in tracks}
    try:
        values = [float(given.pop(name)) for name in tracks]
    except (KeyError, ValueError):
        values = [-1.0]
    if given or not all(0 < v < math.inf for v in values):
        raise ValueError(f"--{flag}={text}: expected a number above 0 for each of {', '.join(tracks)}")
    return [v / sum(values) for v in values]


# -----------------------------------------------------------------------------
# Samples and their tokens


def token_logps(forward, model, batch, temperature):
    """-> LogProb of the batch's sampled tokens, (N,) each, in the order of sequences."""
    hidden = forward(batch.ids, batch.positions, batch.doc_ids).flatten(0, 1)[batch.rows]
    return linear_logprob(hidden, model.lm_head.weight, batch.targets, temperature=temperature)


def cold_start(model, tokenizer, problems, cfg, device):
    """A short SFT on gold answers, so that the toy tasks run from nothing. For anything serious there is train_sft.py."""
    def render(p):
        if isinstance(p.prompt, list):
            return tokenizer.render(p.prompt + p.gold)
        prompt, answer = tokenizer.encode(p.prompt), tokenizer.encode(p.gold) + [tokenizer.end_of_text_id]
        return prompt + answer, [0] * len(prompt) + [1] * len(answer)
    optimizers = make_optimizers(model, 3e-3, 0.02)
    for step in range(cfg.cold_start):
        sequences = [render(problems[i]) for i in shuffled(np.arange(step * 32, step * 32 + 32), len(problems), cfg.seed, "cold start")]
        offsets = token_offsets(sequences)
        for which in micro_batches([len(ids) for ids, _ in sequences], cfg.device_batch_size):
            batch = sequence_batch(sequences, which, offsets).to(device)
            (-token_logps(model, model, batch, 1.0).logp.sum() / int(offsets[-1])).backward()
        clip_grad_norm(model, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_scale(step, cfg.cold_start, 20, 0.4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def collect(model, tokenizer, pools, places, per_track, cfg, rewards, rank, world_size):
    """One round of samples -> kept groups, their places among those of all ranks, all groups: lists of G Answers on this rank. `places`, each track's
    place in the endless order of its prompts, moves on. Every rank takes every world_size-th prompt, so a group stays whole. Groups whose rewards are
    all equal have no gradient and are not kept; with refill others are sampled in their place, as long as refill_tries last."""
    kept, where, everything, wanted = [], [], [], per_track
    for attempt in range(1 + cfg.refill_tries * (cfg.dynamic_sampling == "refill")):
        asked = []
        for k, pool in enumerate(pools):
            order = shuffled(np.arange(places[k], places[k] + wanted[k]), len(pool), cfg.seed, "order", k)
            asked += [(k, pool[i], random_key(cfg.seed, "rollout", k, places[k] + j)) for j, i in enumerate(order.tolist())]
            places[k] += wanted[k]
        mine = asked[rank::world_size]
        groups = play_for_rewards(model, tokenizer, [(k, p) for k, p, _ in mine], rewards, [seed for _, _, seed in mine], num_samples=cfg.group_size,
                                  temperature=cfg.temperature, **sampling(cfg))
        if cfg.missing_eos:
            groups = [[a._replace(reward=cfg.missing_eos) if a.truncated and a.reward is not None else a for a in g] for g in groups]
        everything += groups
        for j, g in enumerate(groups):
            graded = [a.reward for a in g if a.reward is not None]
            if len(set(graded)) > 1 or (cfg.dynamic_sampling == "off" and len(graded) > (cfg.baseline != "none")):
                kept.append(g)
                where.append((attempt, rank + j * world_size))
        had = Counter(all_gather_list(g[0].track for g in kept))
        wanted = [max(0, n - had[k]) for k, n in enumerate(per_track)]
        if not any(wanted):
            break
    return kept, where, everything


def sampling(cfg):
    return dict(max_new_tokens=cfg.max_new_tokens, tool_timeout=cfg.tool_timeout, max_slots=cfg.slots)


def is_weights(drift, sequences, cfg):
    """(N,) w_t = min(p_old / p_sampler, cap) per token; seq_mask: 1 or 0 by the geometric mean over the sequence. drift: its logarithm."""
    if cfg.is_mode == "none":
        return torch.ones_like(drift)
    if cfg.is_mode == "token":
        return drift.exp().clamp(max=cfg.is_cap)
    _, index, counts = sequences.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), device=drift.device).index_add(0, index, drift) / counts
    return (means.abs() <= math.log(cfg.is_cap)).float()[index]


def running_moments(moments, values):
    """Welford's count, mean and sum of squared deviations, continued by `values`."""
    count, mean, m2 = moments
    for x in values:
        count += 1
        delta = x - mean
        mean += delta / count
        m2 += delta * (x - mean)
    return [count, mean, m2]


# -----------------------------------------------------------------------------


def train(cfg):
    rank, _, world_size, device = setup_distributed()
    out_dir = Path("out") / cfg.name
    resume, start = checkpoint.find(out_dir, cfg.resume), cfg.init and checkpoint.newest(cfg.init)
    if not cfg.init:                                                  # from nothing: the run starts where its own cold start ended
        start = out_dir / "step_000000"
        resume = None if resume == start else resume
    cold = not (cfg.init or resume or (cfg.resume and start.exists()))

    # model
    if not cold:
        model, tokenizer = checkpoint.load_hf(resume or start, device)
    else:
        tokenizer = Tokenizer.bytes() if cfg.tokenizer == "bytes" else Tokenizer.from_file(cfg.tokenizer)
        model = Transformer(config_for_size(cfg.size, tokenizer.vocab_size)).init_weights(random_key(cfg.seed, "weights")).to(device)
    bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
    model.compute_dtype = torch.bfloat16 if bfloat16 else torch.float32
    model.recompute_activations = cfg.recompute

    # prompts, and the settings that depend on them
    tracks, sources, notes = tasks.open_prompts(cfg.data, num=cfg.num_prompts, num_val=cfg.eval_problems, seed=cfg.seed, grader=cfg.grader,
                                                val_fraction=cfg.val_fraction, log_filter=cfg.log_filter, log_bodies=cfg.log_bodies,
                                                use_prompt_response=cfg.use_prompt_response)
    prompt_length = lambda p: len(tokenizer.render_prompt(p.prompt, p.tools) if isinstance(p.prompt, list) else tokenizer.encode(p.prompt))
    everyone = [[p for s in sources if s.track == k for p in s.train] for k in range(len(tracks))]
    pools = [[p for p in problems if 0 < prompt_length(p) <= cfg.max_prompt_tokens] for problems in everyone]
    num_prompts = sum(map(len, pools))
    if not all(pools):
        raise ValueError(f"--data={cfg.data}: track {tracks[[bool(p) for p in pools].index(False)]!r} has no prompt of 1 to {cfg.max_prompt_tokens} tokens; "
                         "raise --max_prompt_tokens")
    room = tasks.STATED * any("rlcr" in weights for weights in parse_rewards(cfg.rewards).values())
    cfg = resolve(cfg, num_params(model), num_prompts, room + max(tasks.max_new_tokens(p.task) for pool in pools for p in pool))
    width = cfg.max_prompt_tokens + cfg.max_new_tokens
    if width > model.config.max_positions:
        raise ValueError(f"--max_prompt_tokens ({cfg.max_prompt_tokens}) + --max_new_tokens ({cfg.max_new_tokens}) are over the model's context of "
                         f"{model.config.max_positions}")
    if cfg.device_batch_size == -1:
        cfg = replace(cfg, device_batch_size=largest_batch(model, width, cfg.prompts_per_step * cfg.group_size))
    track_weights, mix = parse_by_track(cfg.track_weight, tracks, "track_weight"), parse_by_track(cfg.track_mix, tracks, "track_mix")
    per_track = [max(1, round(share * cfg.prompts_per_step)) for share in mix]
    num_updates = cfg.num_epochs_per_step * cfg.num_minibatches
    ppo, kl_in_reward = cfg.method == "ppo", cfg.kl_coef > 0 and cfg.kl_form == "k1_reward"

    memory = memory_estimate(model.config, cfg.device_batch_size, width, compute_bytes=2 if bfloat16 else 4, recompute_activations=cfg.recompute)
    c = model.config
    memory |= dict(cache=2 * c.num_layers * cfg.slots * c.num_kv_heads * width * c.head_dim * (2 if bfloat16 else 4),
                   reference=memory["weights"] * (cfg.kl_coef > 0 and (bool(cfg.ref) or not cfg.lora_rank)),
                   critic=(memory["weights"] + memory["gradients"] + memory["optimizer"]) * ppo)
    memory["total"] = sum(value for key, value in memory.items() if key != "total")
    settings = dict(parameters=num_params(model), device=str(device), ranks=world_size, prompts={t: len(p) for t, p in zip(tracks, pools)},
                    prompts_left_out=sum(map(len, everyone)) - num_prompts, samples_per_step={t: n * cfg.group_size for t, n in zip(tracks, per_track)},
                    memory_estimate_mb={k: round(v / 2**20) for k, v in memory.items()})
    if rank == 0:
        for key, value in (asdict(cfg) | settings).items() if cfg.dry_run else settings.items():
            print(f"{key:>20}  {value}", flush=True)
        for note in notes:
            print(f"note: {note}", flush=True)
    held = [(s.name, s.track, [p for p in s.val if prompt_length(p) <= cfg.max_prompt_tokens]) for s in sources]
    held += [(task, None, tasks.problems(task, cfg.eval_problems, cfg.seed)) for task in filter(None, cfg.eval_tasks.split(","))]
    rewards = open_rewards(cfg.rewards, tracks, device=device, reward_file=cfg.reward_file, reward_function=cfg.reward_function,
                           reward_role=cfg.reward_role, reward_event=cfg.reward_event, reward_timeout=cfg.reward_timeout, judge=cfg.judge,
                           judge_model=cfg.judge_model, judge_retries=cfg.judge_retries, judge_timeout=cfg.judge_timeout, judge_range=cfg.judge_range,
                           rubric=cfg.rubric)
    if cfg.dry_run:
        return settings

    # where the run starts is the reference
    if not cfg.resume and any(path and Path(path).resolve().is_relative_to(out_dir.resolve()) for path in (cfg.init, cfg.ref)):
        raise ValueError(f"--init={cfg.init} --ref={cfg.ref}: a new run of --name={cfg.name} would delete its own start; give another --name")
    golds = [p for pool in pools for p in pool if p.gold]
    if cold and cfg.cold_start and not golds:
        raise ValueError(f"--data={cfg.data} has no worked answers to start from: name a trained model in --init")
    if rank == 0 and not cfg.resume:
        checkpoint.clear(out_dir, cfg.overwrite or cfg.name == "dummy")
    if cold:
        cold_start(model, tokenizer, golds, cfg, device)
        checkpoint.save(out_dir, 0, model, tokenizer, [], state={}, config=asdict(cfg), rank=rank, world_size=world_size)
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, seed=random_key(cfg.seed, "lora"))
        if resume:
            checkpoint.restore_lora(resume, model)
    ref = None
    if cfg.kl_coef > 0 and (cfg.ref or not cfg.lora_rank):            # with LoRA the reference is the same weights, adapter off
        ref, _ = checkpoint.load_hf(checkpoint.newest(cfg.ref) if cfg.ref else start, device)
        ref.compute_dtype = model.compute_dtype
        ref.requires_grad_(False)

    # optimization
    critic = Critic(model) if ppo else None
    wrapped = parallelize(model, "ddp", device, world_size)
    wrapped_critic = parallelize(critic, "ddp", device, world_size) if ppo else None
    forward = torch.compile(wrapped) if cfg.compile else wrapped
    optimizers = make_optimizers(model, cfg.lr, 0.0, cfg.weight_decay)
    critic_optimizers = make_optimizers(critic, cfg.critic_lr, 0.0, cfg.weight_decay) if ppo else []
    state = dict(step=0, samples_seen=0, places=[0] * len(tracks), moments=[0.0, 0.0, 0.0], config=asdict(cfg), prompts=list(map(len, pools)))
    if resume:
        here, state = state, checkpoint.restore(resume, model, optimizers + critic_optimizers, rank, world_size)
        was, now = (s["config"] | dict(prompts=s["prompts"]) for s in (state, here))
        if changed := [f"{key} was {was.get(key)}, found {now[key]}" for key in now if key not in MAY_CHANGE and was.get(key) != now[key]]:
            raise ValueError(f"--resume={cfg.resume}: {'; '.join(changed)}; resume with the settings of the saved run, or start a new one from its "
                             "weights (--init)")
        if ppo:
            critic.load_state_dict(checkpoint.load_extra(resume))
    elif rank == 0:
        state["init_hash"] = checkpoint.weights_hash(start)           # merge.py joins runs from one start only
    first_step, samples_seen, places, moments = (state[key] for key in ("step", "samples_seen", "places", "moments"))
    logger = Logger(cfg, rank, first_step if resume else None)
    if cfg.solve_samples:
        state["solved"] = state.get("solved") or solve(model, tokenizer, pools, cfg, rewards, rank, world_size)
        pools = perfectible(pools, state["solved"], cfg, rank)
    if not resume:
        preflight(model, tokenizer, pools, cfg, rewards, rank, world_size)
    started, val = time.monotonic(), {}

    for step in range(first_step, cfg.num_steps + 1):
        last_step = step == cfg.num_steps

        # once in a while: greedy answers to held-out prompts, the same rewards
        if (last_step or (cfg.eval_every and step % cfg.eval_every == 0)) and (step > first_step or not resume):
            val = validate(model, tokenizer, held, cfg, rewards, rank, world_size)
            logger.log(step, **val)
            logger.print(f"step {step:5d}/{cfg.num_steps} | " + " | ".join(f"{k.removeprefix('val/')} {v:.3f}" for k, v in val.items()))

        if last_step or (cfg.save_every and step > first_step and step % cfg.save_every == 0):
            state |= dict(step=step, samples_seen=samples_seen, places=places, moments=moments)
            saved = checkpoint.save(out_dir, step, model, tokenizer, optimizers + critic_optimizers, state=state, config=asdict(cfg), rank=rank,
                                    world_size=world_size, extra=dict(critic.named_parameters()) if ppo else None)
        if last_step:
            break

        # sample and grade
        t0 = time.perf_counter()
        kept, groups_at, groups = collect(model, tokenizer, pools, places, per_track, cfg, rewards, rank, world_size)
        answers = [a for g in groups for a in g]
        num_errors = check_grader_errors(answers, cfg.max_grader_error, step)
        samples_seen += all_reduce_sum(len(answers))
        generate_seconds = time.perf_counter() - t0

        # what is trained on, and its rewards: samples in flat order, (S,)
        where = [(i, j) for i, g in enumerate(kept) for j, a in enumerate(g) if a.reward is not None]
        used = [kept[i][j] for i, j in where]
        trained = [not (a.truncated and cfg.truncated == "mask") for a in used]
        final = torch.tensor([a.reward + (overlong_penalty(len(a.ids) - a.mask.index(1), a.truncated, cfg.max_new_tokens, cfg.overlong) if cfg.overlong
                                          else 0.0) for a in used], dtype=torch.float64)
        if cfg.reward_norm:
            ordered = sorted(all_gather_list((*groups_at[i], j, reward) for (i, j), reward in zip(where, final.tolist())))
            moments = running_moments(moments, [reward for *_, reward in ordered])
            std = math.sqrt(moments[2] / max(1.0, moments[0] - 1))
            final = final / (std if std > 1e-4 else 1.0)

        # their sampled tokens, sequence after sequence, (N,): log-probabilities of sampler, trainer and reference, values
        sequences = [(a.ids, a.mask) for a in used]
        offsets = token_offsets(sequences)
        lengths, track_of = torch.from_numpy(np.diff(offsets)), torch.tensor([a.track for a in used], dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(used)), lengths)
        sampler_logps = torch.tensor([x for a in used for x in a.logps])
        cut = lambda which: [[which[i] for i in part] for part in micro_batches([len(sequences[i][0]) for i in which], cfg.device_batch_size,
                                                                                groups=[where[i][0] for i in which])] or [[]]

        looks_first = num_updates > 1 or cfg.kl_coef > 0 or ppo
        batches = [sequence_batch(sequences, which, offsets, cfg.pack) for which in cut(range(len(used)))] if looks_first else []

        @torch.no_grad()
        def per_token(function):
            out = torch.zeros(len(sampler_logps))
            for b in batches:
                out[b.tokens] = function(b.to(device)).float().cpu()
            return out
        logps_of = lambda m: per_token(lambda b: token_logps(m, m, b, cfg.temperature).logp)
        old_logps = logps_of(model) if num_updates > 1 or kl_in_reward else None        # with one update, old is the policy itself, detached
        ref_logps = None
        if cfg.kl_coef > 0:
            with lora_off(model):                                                       # which does nothing without LoRA
                ref_logps = logps_of(ref or model)
        old_values = per_token(lambda b: critic(b.ids, b.positions, b.doc_ids, b.rows)) if ppo else None

        # advantages, (N,)
        k1 = cfg.kl_coef * (old_logps - ref_logps) if kl_in_reward else torch.zeros(len(sampler_logps))
        token_rewards = -k1
        token_rewards[offsets[1:] - 1] += final.float()
        if ppo:
            last_values = torch.zeros(len(used))
            if cfg.truncated == "bootstrap":
                # one more token, which nothing is predicted from, so that the state after the last has a value
                longer = [(a.ids + [0], [0] * len(a.ids) + [1]) for a in used]
                for i in [i for i, a in enumerate(used) if a.truncated]:
                    b = sequence_batch(longer, [i], np.arange(len(used) + 1)).to(device)
                    with torch.no_grad():
                        last_values[i] = critic(b.ids, b.positions, b.doc_ids, b.rows)[0].cpu()
            advantages, returns = ppo_advantages(token_rewards, old_values, offsets, last_values, cfg)
        elif cfg.method == "reinforce++":
            advantages = reward_to_go(token_rewards, offsets)
        else:
            table, valid = torch.zeros(len(kept), cfg.group_size, dtype=torch.float64), torch.zeros(len(kept), cfg.group_size, dtype=torch.bool)
            at = tuple(torch.tensor(where, dtype=torch.int64).view(-1, 2).t())
            table[at] = final - torch.zeros(len(used), dtype=torch.float64).index_add(0, owner, k1.double())
            valid[at] = True
            advantages = group_advantages(table, valid, cfg.baseline, cfg.adv_scale)[at]
            if cfg.adv_scale == "batch":
                advantages = whiten(advantages, track_of, len(tracks), center=False)
            advantages = advantages.float()[owner]
        if cfg.method in ("ppo", "reinforce++"):
            advantages = whiten(advantages, torch.where(torch.tensor(trained, dtype=torch.bool), track_of, -1)[owner], len(tracks))

        # update: minibatches of all ranks' sequences in one global order, so that they do not depend on the number of ranks. Prompts are shuffled, the
        # answers to one stay neighbours: what they share is then computed once
        sums, gap, norms, critic_norms, stopped = torch.zeros(11, dtype=torch.float64, device=device), 0.0, [], [], False
        alone = cfg.critic_warmup if ppo else 0                                         # steps of the critic; the policy's schedule starts after them
        warming, scale = step < alone, lr_scale(max(0, step - alone), cfg.num_steps - alone, cfg.warmup_steps, cfg.decay_share)
        members = {}                                                                    # place of the prompt among all -> [(rank, n)] of its answers
        for *place, _, owner_rank, n in sorted(all_gather_list((*groups_at[i], j, rank, n) for n, (i, j) in enumerate(where) if trained[n])):
            members.setdefault(tuple(place), []).append((owner_rank, n))
        groups_of_all, num_members = list(members.values()), sum(map(len, members.values()))
        for epoch in range(cfg.num_epochs_per_step if members else 0):
            order = shuffled(np.arange(len(members)), len(members), cfg.seed, "minibatch", step, epoch)
            in_order = [member for i in order.tolist() for member in groups_of_all[i]]
            for part in np.array_split(np.arange(num_members), min(cfg.num_minibatches, num_members)):
                which = [n for owner_rank, n in (in_order[i] for i in part.tolist()) if owner_rank == rank]

                # count before the first backward, per track, so that neither micro-batches nor ranks change the gradient
                counts = torch.zeros(len(tracks), 2, dtype=torch.float64)
                counts.index_add_(0, track_of[which], torch.stack([lengths[which].double(), torch.ones(len(which), dtype=torch.float64)], dim=1))
                counts = all_reduce_sum(counts.to(device)).tolist()
                c = torch.zeros(len(used), dtype=torch.float64)
                for k, (num_tokens, num_sequences) in enumerate(counts):
                    weight = track_weights[k] / sum(w for w, (n, _) in zip(track_weights, counts) if n)
                    c[track_of == k] = weight * token_scale(lengths[track_of == k], cfg.aggregate, num_tokens, num_sequences, cfg.max_new_tokens)
                c, per_all_tokens = c.float()[owner], 1 / sum(n for n, _ in counts)
                pieces = [sequence_batch(sequences, piece, offsets, cfg.pack) for piece in cut(which)]

                # the critic first, all of it: ranks with unequal numbers of pieces must meet in the same order of collective calls
                for n, b in enumerate(pieces if ppo else []):
                    flat, b = lambda x, tokens=b.tokens: x[tokens].to(device), b.to(device)
                    set_gradient_sync(wrapped_critic, n == len(pieces) - 1)
                    values = wrapped_critic(b.ids, b.positions, b.doc_ids, b.rows)
                    loss, bounded = value_loss(values, flat(old_values), flat(returns), per_all_tokens, cfg.value_clip)
                    (loss * world_size).backward()                                        # DDP averages, we want the sum
                    sums[:2] += torch.stack([loss.detach(), bounded.sum()]).double()
                before = sums.clone()
                for n, b in enumerate([] if warming or stopped else pieces):
                    flat, b = lambda x, tokens=b.tokens: x[tokens].to(device), b.to(device)
                    set_gradient_sync(wrapped, n == len(pieces) - 1)
                    out = token_logps(forward, model, b, cfg.temperature)
                    old = out.logp.detach() if num_updates == 1 else flat(old_logps)
                    drift = old - flat(sampler_logps)                                     # trainer against sampler as the round began
                    weights = is_weights(drift, b.sequences, cfg)
                    loss, clipped = policy_loss(out.logp, old, flat(advantages), flat(c), b.sequences, ratio=cfg.ratio, clip_low=cfg.clip_low,
                                                clip_high=cfg.clip_high, cap=cfg.cispo_cap, dual_clip=cfg.dual_clip, weights=weights)
                    if cfg.kl_coef > 0 and not kl_in_reward:
                        loss = loss + cfg.kl_coef * (flat(c) * kl_penalty(out.logp, old, flat(ref_logps), cfg.kl_form)).sum()
                    loss = loss - cfg.entropy_coef * (flat(c) * out.entropy).sum()
                    (loss * world_size).backward()
                    with torch.no_grad():
                        k3 = lambda log_ratio: log_ratio.expm1().sum() - log_ratio.sum()  # KL(p || q) on samples of p, log_ratio = log q - log p
                        to_ref = flat(ref_logps) - out.logp if cfg.kl_coef > 0 else torch.zeros_like(old)
                        sums[2:] += torch.stack([loss.double(), drift.new_tensor(len(old)), clipped.sum(), k3(out.logp - old), out.entropy.sum(), k3(drift),
                                                 weights.sum(), (drift > math.log(cfg.is_cap)).sum(), k3(to_ref)]).double()
                        gap = max(gap, drift.abs().max().item() if len(drift) else 0.0)
                if ppo:
                    critic_norms.append(step_optimizers(critic, critic_optimizers, cfg, 1.0, "critic/grad_norm"))
                if cfg.target_kl and not (warming or stopped):
                    moved, num = all_reduce_sum((sums - before)[[5, 3]]).tolist()
                    if stopped := moved > cfg.target_kl * num:                            # too far already: no update, no statistics of it
                        sums = before
                        model.zero_grad(set_to_none=True)
                if not (warming or stopped):
                    norms.append(step_optimizers(model, optimizers, cfg, scale, "train/grad_norm"))

        # log
        sums, seconds = all_reduce_sum(sums).tolist(), time.perf_counter() - t0
        metrics = rollout_metrics(answers, tracks)
        num_groups, num_kept, new_tokens = all_reduce_sum(torch.tensor([len(groups), len(kept), sum(a.length for a in answers)], device=device)).tolist()
        no_spread = all_reduce_sum(sum(len({a.reward for a in g if a.reward is not None}) < 2 for g in groups))
        metrics |= {"rollout/samples": samples_seen, "rollout/grader_error": num_errors, "rollout/kept_groups": num_kept}
        if cfg.baseline != "none":
            metrics["rollout/zero_advantage_groups"] = no_spread / max(1, num_groups)
        if norms:
            n = max(1.0, sums[3])
            metrics |= {"train/loss": sums[2] / len(norms), "train/grad_norm": sum(norms) / len(norms), "train/lr": cfg.lr * scale,
                        "train/clip_frac": sums[4] / n, "train/approx_kl": sums[5] / n, "train/entropy": sums[6] / n, "rollout/engine_kl": sums[7] / n,
                        "rollout/engine_gap_max": max(all_gather_list([gap])), "rollout/is_weight_mean": sums[8] / n, "rollout/is_capped": sums[9] / n}
            if cfg.kl_coef > 0:
                metrics["rollout/ref_kl"] = sums[10] / n
            if cfg.target_kl:
                metrics["train/updates"] = len(norms)
        if critic_norms:
            old_values, returns = old_values.double(), returns.double()
            rest = returns - old_values
            m = torch.stack([torch.ones_like(rest).sum(), old_values.sum(), returns.sum(), returns.square().sum(), rest.sum(), rest.square().sum()])
            m = all_reduce_sum(m.to(device)).tolist()
            m = [m[0], *(x / m[0] for x in m[1:])]
            variance = m[3] - m[2] ** 2
            metrics |= {"critic/loss": sums[0] / len(critic_norms), "critic/clip_frac": sums[1] / (m[0] * cfg.num_epochs_per_step), "critic/value": m[1],
                        "critic/grad_norm": sum(critic_norms) / len(critic_norms),
                        "critic/explained_variance": 1 - (m[5] - m[4] ** 2) / variance if variance > 1e-12 else 0.0}
            if step == cfg.critic_warmup and metrics["critic/explained_variance"] < 0:
                logger.print("note: the critic knows less than a constant as the policy starts to move: raise --critic_warmup or --critic_lr")
        elif not norms:
            logger.print(f"step {step + 1}: no group holds better and worse answers with a loss, so there is no update")
        metrics |= {"time/step": seconds, "time/generate": generate_seconds, "time/tokens_per_sec": new_tokens / seconds}
        logger.log(step + 1, **metrics)
        logger.rollouts(step + 1, [as_line(a, tracks, step + 1) for a in answers[:cfg.log_rollouts]])
        if metrics.get("rollout/engine_kl", 0.0) > cfg.max_engine_kl and not cfg.force:
            raise RuntimeError(f"step {step + 1}: sampler and trainer differ by {metrics['rollout/engine_kl']:.3g} nats per token "
                               f"(--max_engine_kl={cfg.max_engine_kl}): one of the two is wrong")
        left = (time.monotonic() - started) / (step + 1 - first_step) * (cfg.num_steps - step - 1)
        shown = ("rollout/score", "rollout/right", "rollout/response_length", "rollout/zero_advantage_groups", "train/entropy", "rollout/ref_kl",
                 "train/grad_norm", "critic/explained_variance")
        logger.print(f"step {step + 1:5d}/{cfg.num_steps} | " + " | ".join(f"{k.partition('/')[2]} {metrics[k]:.3g}" for k in shown if k in metrics)
                     + f" | {seconds:.1f} s | {format_seconds(left)} left")

    for reward, _ in (pair for named in rewards for pair in named.values()):
        getattr(reward, "close", lambda: None)()
    summary = dict(name=cfg.name, checkpoint=str(saved), steps=cfg.num_steps, samples=samples_seen, seconds=round(time.monotonic() - started, 1), **val)
    logger.close(**summary)
    return summary


def step_optimizers(model, optimizers, cfg, scale, name):
    """Clip, step, zero. -> the gradient's norm before clipping."""
    grad_norm = clip_grad_norm(model, cfg.max_grad_norm).item()
    check_finite(name, grad_norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return grad_norm


def validate(model, tokenizer, held, cfg, rewards, rank, world_size):
    """held: [(name, track, Problems)] -> {"val/acc_<name>": share right, "val/reward_<name>": mean reward}, greedy. --eval_tasks have no track: they
    are graded by their graders alone, with room for their own answers. Failures of a grader are left out and counted."""
    val = {}
    for name, track, problems in held:
        mine, functions = range(len(problems))[rank::world_size], rewards if track is not None else [{"grader": (grader_reward, 1.0)}]
        room = max([cfg.max_new_tokens] + [tasks.max_new_tokens(p.task) for p in problems if track is None])
        groups = play_for_rewards(model, tokenizer, [(track or 0, problems[i]) for i in mine], functions, [random_key(cfg.seed, "val", i) for i in mine],
                                  num_samples=1, temperature=0.0, **sampling(cfg) | dict(max_new_tokens=room))
        results = all_gather_list((g[0].outcome == Outcome.RIGHT, g[0].reward) for g in groups)
        graded, short = [r for r in results if r[1] is not None], Path(name).stem if Path(name).exists() else name
        if len(graded) < len(results):
            val[f"val/grader_error_{short}"] = len(results) - len(graded)
        if graded:
            val[f"val/acc_{short}"] = sum(right for right, _ in graded) / len(graded)
            if track is not None and cfg.rewards != "grader":
                val[f"val/reward_{short}"] = sum(reward for _, reward in graded) / len(graded)
    return val


def solve(model, tokenizer, pools, cfg, rewards, rank, world_size):
    """-> the share of --solve_samples answers that are right, for every prompt."""
    asked = [(k, p) for k, pool in enumerate(pools) for p in pool]
    mine, shares = list(range(len(asked)))[rank::world_size], []
    for at in range(0, len(mine), 64):
        part = mine[at:at + 64]
        groups = play_for_rewards(model, tokenizer, [asked[i] for i in part], rewards, [random_key(cfg.seed, "solve", i) for i in part],
                                  num_samples=cfg.solve_samples, temperature=cfg.temperature, desc=f"solve {at + len(part)}/{len(mine)}", **sampling(cfg))
        shares += [(i, sum(a.outcome == Outcome.RIGHT for a in g) / len(g)) for i, g in zip(part, groups)]
    return [share for _, share in sorted(all_gather_list(shares))]


def perfectible(pools, solved, cfg, rank):
    """-> pools with those prompts alone that are solved within --solve_range of the time at the start (arXiv 2510.26788)."""
    (low, high), left = map(float, cfg.solve_range.split(":")), iter(solved)
    kept = [[p for p in pool if low <= next(left) <= high] for pool in pools]
    if rank == 0:
        print(f"perfectible: {sum(map(len, kept))} of {len(solved)} prompts are solved {low} to {high} of the time, on average "
              f"{np.mean([x for x in solved if low <= x <= high] or [0]):.3f}", flush=True)
    if not all(kept):
        raise ValueError(f"--solve_range={cfg.solve_range}: a track has no prompt in it; widen it, or choose other prompts")
    return kept


def preflight(model, tokenizer, pools, cfg, rewards, rank, world_size):
    """Asks before anything is trained: do the rewards tell right from wrong (--reward_check), and is there anything to learn from (--preflight)?"""
    if cfg.reward_check and rank == 0:
        for k, (name, (reward, _)) in ((k, item) for k, named in enumerate(rewards) for item in named.items()):
            grade = (lambda p, messages: tasks.episode_of(p).grade(messages)) if reward is grader_reward else None
            print(f"{name}: " + "\n  ".join(check_reward(reward, pools[k][:cfg.reward_check], grade)), flush=True)
    if not cfg.preflight:
        return
    some = [shuffled(np.arange(min(len(pool), max(1, cfg.preflight // len(pools)))), len(pool), cfg.seed, "preflight", k) for k, pool in enumerate(pools)]
    asked = [(k, pools[k][i]) for k, places in enumerate(some) for i in places.tolist()]
    mine, num_samples = range(len(asked))[rank::world_size], max(2, cfg.group_size)
    groups = play_for_rewards(model, tokenizer, [asked[i] for i in mine], rewards, [random_key(cfg.seed, "preflight", i) for i in mine],
                              num_samples=num_samples, temperature=cfg.temperature, **sampling(cfg))
    check_grader_errors([a for g in groups for a in g], cfg.max_grader_error, "preflight")
    results = all_gather_list(([a.reward for a in g if a.reward is not None], sum(a.truncated for a in g)) for g in groups)
    found = [reward for group, _ in results for reward in group]
    mean, mixed = sum(found) / max(1, len(found)), sum(len(set(group)) > 1 for group, _ in results) / len(results)
    advice = ("no answer states a confidence: SFT on what runs/stated.py makes comes first" if "rlcr" in cfg.rewards and max(found, default=0) == -2 else
              "no answer earns anything: SFT comes first (train_sft.py)" if mean == 0 else "no group holds better and worse answers: there is no gradient"
              if mixed == 0 else "little is left to learn" if mean > .95 else "")
    if rank == 0:
        print(f"preflight: mean reward {mean:.3f}, {mixed:.0%} of the groups mixed, {sum(n for _, n in results) / (len(results) * num_samples):.0%} truncated"
              + f": {advice}" * bool(advice), flush=True)
    if mixed == 0 and cfg.init and not cfg.force:
        raise ValueError(f"preflight: mean reward {mean:.3f}, and no group of {num_samples} answers holds better and worse ones; --force goes on, "
                         "--preflight=0 does not look")


def largest_batch(model, width, limit):
    """The largest power of two of sequences whose forward and backward fit: tried on CUDA; elsewhere those whose estimate stays
    below half of the machine's memory."""
    size, device = 1, model.lm_head.weight.device
    if device.type != "cuda":
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        while size < limit and memory_estimate(model.config, 2 * size, width)["total"] < free / 2:
            size *= 2
        return size
    while size <= limit:
        try:
            ids = torch.zeros(size, width, dtype=torch.int64, device=device)
            hidden = model(ids).flatten(0, 1)
            linear_logprob(hidden, model.lm_head.weight, ids.flatten()).logp.sum().backward()
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            model.zero_grad(set_to_none=True)
        size *= 2
    torch.cuda.empty_cache()
    return max(1, size // 4)              # half of what fitted: the optimizer's state and the cache are not there yet


def main(cfg):
    if cfg.sandbox != "auto":                                        # auto is chosen when the first program runs
        sandbox.choose(cfg.sandbox)
    return train(cfg)


if __name__ == "__main__":
    main(parse_config(Config))
