"""Preference learning: chosen answers against rejected ones, from a file (--pairs) or from the model's own answers, graded (online).

A pair is one prompt and two completions, w chosen and l rejected. With h = sum_t m_t (log p(y_t) - log ref(y_t)) over the tokens of a
completion that the assistant wrote, end of turn included, n their number and D = h_w - h_l,

    sigmoid (DPO)   loss = - 1/P · sum_pairs log sigmoid(beta D)

over the P pairs of the global batch; sigmoid_norm, the default, takes h/n in place of h, and ipo, kto, orpo and simpo are beside it below.
The reference is the model that the run starts from, frozen. Online, a step samples num_samples answers to each of prompts_per_step prompts
(tools executed), scores them, and pairs each prompt's best answer with its worst: exactly the sampled ids are trained on.

    python train_dpo.py --data=toy --size=tiny                                  laptop, from nothing: a short SFT, then online pairs
    python train_dpo.py --init=out/quickstart/sft --data=math_en                laptop, online from a trained model
    python train_dpo.py --init=<Hugging Face folder> --pairs=pairs.jsonl        one GPU; rates and sizes by --dry_run
    torchrun --nproc_per_node=8 train_dpo.py ...                                the same flags, eight GPUs
"""
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
from common import (Logger, all_gather_list, all_reduce_sum, check_finite, format_seconds, lr_scale, parse_config, progress, random_key,
                    setup_distributed)
from data import prompts, sandbox, tasks
from data.packing import micro_batches, sequence_batch, shuffled, token_offsets
from data.rewards import open_rewards
from kernels import linear_logprob
from model import (Transformer, add_lora, clip_grad_norm, config_for_size, lora_off, make_optimizers, memory_estimate, num_params,
                   parallelize, set_gradient_sync)
from rollouts import as_line, check_grader_errors, play_for_rewards, rollout_metrics
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    name: str = "dummy"              # results go to out/<name>; any name but dummy also opens wandb
    seed: int = 0                    # decides samples and the order of pairs and prompts
    # model
    init: str = ""                   # checkpoint folder, of ours or of Hugging Face; empty: random weights of --size and a short SFT
    ref: str = ""                    # reference model; empty: where the run starts
    size: str = "tiny"               # from scratch: nano | tiny | mini | small | base
    tokenizer: str = "bytes"         # from scratch: bytes, or a Hugging Face tokenizer.json
    cold_start: int = -1             # from scratch: steps of SFT on gold or chosen answers; auto: 200
    lora_rank: int = 0               # 0: train all weights; 8 to 64: LoRA on every linear layer of the blocks
    lora_alpha: float = 64.0         # LoRA's update is scaled by alpha / rank: higher learns faster
    # data
    pairs: str = "online"            # file or folder of preferences (data/README.md), or online: pairs of the model's own answers to --data
    data: str = "toy"                # online: comma-separated prompts, tasks of data/tasks.py or files
    num_prompts: int = 1000          # online: problems of each task that makes its own; files give all they have
    max_prompt_tokens: int = 512     # longer prompts are left out and counted
    max_new_tokens: int = -1         # bound on a completion, tool results included; auto: the largest of the tasks' own, of pairs 1024
    val_fraction: float = 0.05       # share of a file's prompts held out
    # rewards of online answers
    rewards: str = "grader"          # grader, file, judge, weighted as in grader:1,judge:.5
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
    max_grader_error: float = 0.02   # share of a step's samples that may go without a reward
    # the algorithm; auto: by method, see METHODS
    method: Literal["sigmoid_norm", "sigmoid", "ipo", "kto", "orpo", "simpo"] = "sigmoid_norm"     # a row of METHODS
    beta: float = -1.0               # higher stays nearer to the reference; orpo: weight of the odds ratio; auto: by method
    margin: float = 1.4              # simpo: margin by which the chosen answer must lead
    label_smoothing: float = 0.0     # sigmoid, sigmoid_norm: share of pairs that are believed to be labelled the wrong way round
    rpo_alpha: float = 0.0           # weight of the chosen answers' negative log-likelihood, .1 to 1: else their probability may fall
    kto_desirable: float = 1.0       # weight of desirable rows; raise the rarer kind's
    kto_undesirable: float = 1.0     # weight of undesirable rows
    kto_threshold: float = 0.5       # online: an answer with a reward above is desirable
    pairs_per_step: int = -1         # of a file: pairs (kto: rows) per step over all devices; auto: a sixteenth as a power of two, 8 to 128
    prompts_per_step: int = -1       # online: prompts per step; auto: a sixteenth as a power of two, 8 to 64 (32 below 20M parameters)
    num_samples: int = 8             # online: answers to each prompt
    temperature: float = 1.0         # online: of sampling
    # length of the run and optimization
    num_steps: int = -1              # optimizer steps; auto: by num_epochs, without --init at most 40
    num_epochs: int = -1             # passes over the pairs or prompts; auto: 1; online 6 below 1,000 prompts, 3 below 5,000
    device_batch_size: int = 8       # rows per forward pass and device (of pairs, two completions each): lower when memory runs out, the result stays the same
    lr: float = -1.0                 # peak rate of AdamW; auto: 3e-4 below 20M parameters, else by method and LoRA
    muon_lr: float = 0.0             # peak rate of Muon on the blocks' matrices; 0: AdamW trains everything
    weight_decay: float = 0.0        # on matrices
    warmup_steps: int = -1           # steps of linear warm-up; auto: a tenth of the run
    decay_share: float = 1.0         # the last share of the run goes linearly to rate 0; 1: all of it
    max_grad_norm: float = 1.0       # global norm the gradient is clipped to
    # machine
    pack: bool = False               # several sequences to a row; false: sorted by length, and a prompt that answers share computed once
    slots: int = 128                 # answers sampled at once
    tool_timeout: float = 60.0       # seconds until a call is given up; its answer ends there
    sandbox: Literal["auto", "namespaces", "landlock", "none_i_accept"] = "auto"        # the box in which written code runs
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"      # of the computation; weights are float32 always; auto: bfloat16 on CUDA
    recompute: bool = False          # activation checkpointing: a third slower, most of the activation memory back
    compile: bool = False            # torch.compile the model
    # looking and keeping
    eval_every: int = -1             # steps between evaluations; 0: only at the end; auto: a tenth of the run
    eval_tasks: str = "auto"         # tasks of eval.py answered at each evaluation, e.g. math_en; auto: those of --data, if online
    eval_problems: int = 100         # problems per task
    save_every: int = 0              # steps between checkpoints; 0: only at the end
    resume: str = ""                 # latest, or a step folder: continue out/<name> exactly
    overwrite: bool = False          # delete the checkpoints of an earlier run of this name
    dry_run: bool = False            # print the resolved settings and the memory estimate, and stop


# -----------------------------------------------------------------------------
# The losses: sums over num, which is the number of pairs (kto: rows) of the global batch

# what a loss compares, x: seq_logps, less ref_logps if `reference`, per token of the completion if `mean`. lr: of all weights, of LoRA
METHODS = {
    "sigmoid_norm": dict(reference=True, mean=True, beta=5.0, lr=(2.5e-6, 2.5e-5)),          # 2411.15124 (Tulu 3), section 5
    "sigmoid": dict(reference=True, mean=False, beta=.1, lr=(7e-7, 1e-5)),                   # 2305.18290
    "ipo": dict(reference=True, mean=True, beta=.1, lr=(7e-7, 1e-5)),                        # 2310.12036
    "kto": dict(reference=True, mean=False, beta=.1, lr=(1e-6, 1e-5)),                       # 2402.01306
    "orpo": dict(reference=False, mean=True, beta=.1, lr=(8e-6, 8e-5)),                      # 2403.07691
    "simpo": dict(reference=False, mean=True, beta=2.5, lr=(1e-6, 1e-5)),                    # 2405.14734
}


def sigmoid_loss(margins, num, beta, label_smoothing=0.0):
    """1/num · sum [ -(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D) ]. margins (P,): D, of sums (DPO, eq. 7) or of means."""
    z = beta * margins
    return -((1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)).sum() / num


def ipo_loss(margins, num, beta):
    """1/num · sum (D - 1 / (2 beta))^2 (IPO, eq. 17), D of means per token, as TRL has it; the paper's is of sums."""
    return (margins - 1 / (2 * beta)).square().sum() / num


def kto_loss(x, good, z0, num, beta, desirable=1.0, undesirable=1.0):
    """1/num · sum over rows of lam_D (1 - sigmoid(beta (h - z0))) if good, lam_U (1 - sigmoid(beta (z0 - h))) if not (KTO, eq. 8).

    x (R,): h. good (R,) bool. z0: how far the policy is from the reference, see train; no gradient flows through it.
    """
    sign = torch.where(good, 1.0, -1.0)
    return (torch.where(good, desirable, undesirable) * torch.sigmoid(-sign * beta * (x - z0))).sum() / num


def orpo_loss(chosen, rejected, num, weight):
    """1/num · sum [ -l_w - weight · log sigmoid(lo_w - lo_l) ], lo = l - log(1 - e^l) (ORPO, eq. 6 and 7). chosen, rejected (P,): l, mean
    log-probability per token, below 0."""
    # log(1 - e^l) has no digits left in either form at the other end; at l = 0 itself the odds are infinite, so l stays below it
    def log_odds(means):
        l = means.clamp(max=-1e-7)
        return l - torch.where(l > -math.log(2), (-torch.expm1(l)).log(), torch.log1p(-l.exp()))
    return -(chosen + weight * F.logsigmoid(log_odds(chosen) - log_odds(rejected))).sum() / num


def simpo_loss(margins, num, beta, gamma):
    """1/num · sum -log sigmoid(beta (l_w - l_l) - gamma) (SimPO, eq. 6). margins (P,): l_w - l_l, of means per token."""
    return -F.logsigmoid(beta * margins - gamma).sum() / num


def preference_loss(cfg, x, good, z0, num):
    """x (S,): what METHODS says is compared; good (S,) bool: chosen or desirable. Pairs are neighbours, the chosen first."""
    if cfg.method == "kto":
        return kto_loss(x, good, z0, num, cfg.beta, cfg.kto_desirable, cfg.kto_undesirable)
    chosen, rejected = x[0::2], x[1::2]
    if cfg.method == "ipo":
        return ipo_loss(chosen - rejected, num, cfg.beta)
    if cfg.method == "orpo":
        return orpo_loss(chosen, rejected, num, cfg.beta)
    if cfg.method == "simpo":
        return simpo_loss(chosen - rejected, num, cfg.beta, cfg.margin)
    return sigmoid_loss(chosen - rejected, num, cfg.beta, cfg.label_smoothing)


def loss_at_reference(cfg, good):
    """What preference_loss must be where policy and reference are one, so that every h is 0. good (S,) bool of the global batch."""
    if cfg.method == "kto":
        return sum(cfg.kto_desirable if g else cfg.kto_undesirable for g in good) / 2 / len(good)
    return 1 / (4 * cfg.beta ** 2) if cfg.method == "ipo" else math.log(2)


# -----------------------------------------------------------------------------
# Pairs


class Examples(NamedTuple):
    """Pairs as neighbours, the chosen one first; or rows of kto, each alone. One entry per completion, or none where none is needed."""
    sequences: list         # (ids, mask), int32 arrays: prompt and completion
    good: list              # bool: chosen, or desirable
    mismatched: list        # kto: (ids, mask) of the prompt with the completion of another prompt
    ref: list = []          # log-probability of the completion under the reference
    wrong_ref: list = []    # of the mismatched one

    def take(self, which):
        return Examples(*([items[i] for i in which] if items else [] for items in self))


def arrays(prompt, ids, mask):
    return np.array(prompt + ids, np.int32), np.array([0] * len(prompt) + mask, np.int32)


def encode(tokenizer, messages, completions, tools=None):
    """-> (prompt ids, [(ids, mask) of each completion]): the ids after the prompt, up to and with the last end of turn."""
    prompt, found = tokenizer.render_prompt(messages, tools), []
    for completion in completions:
        ids, mask = tokenizer.render(messages + completion, tools)
        if ids[:len(prompt)] != prompt:
            raise ValueError("the prompt has other tokens before this completion (does the completion open its own <think>?)")
        end = len(ids) - mask[::-1].index(1)                              # the template's line break comes after the last end of turn
        found.append((ids[len(prompt):end], mask[len(prompt):end]))
    return prompt, found


def mismatched(sequences):
    """Each sequence's prompt with the completion of the next one (in a circle) that has another prompt; [] where there is only one."""
    starts = [int(mask.argmax()) for _, mask in sequences]                # a completion's first token is the assistant's
    prompt = [ids[:start].tobytes() for (ids, _), start in zip(sequences, starts)]
    if len(set(prompt)) < 2:
        return []
    n, found = len(sequences), []
    for i, (ids, mask) in enumerate(sequences):
        j = next(k % n for k in range(i + 1, i + n) if prompt[k % n] != prompt[i])
        found.append(tuple(np.concatenate([a[:starts[i]], b[starts[j]:]]) for a, b in ((ids, sequences[j][0]), (mask, sequences[j][1]))))
    return found


def examples_of(found, kto):
    """found: [(completions as (ids, mask) with their prompt, good for each)], one entry per pair or row -> Examples."""
    sequences = [s for group, _ in found for s in group]
    return Examples(sequences, [g for _, good in found for g in good], mismatched(sequences) if kto else [])


def read_pairs(cfg, tokenizer):
    """--pairs=FILE -> (Examples to train on, Examples held out, what there is to say about them). A prompt is on one side alone."""
    kto, sides, read = cfg.method == "kto", ([], []), prompts.read(cfg.pairs)
    if read.kind == "prompts" or (read.kind == "labels" and not kto):
        raise ValueError(f"--pairs={cfg.pairs}: these are {read.kind}; --method={cfg.method} needs pairs" + (" or labels" if kto else ""))
    dropped = Counter(read.skipped)
    for row in read.rows:
        completions, good = ([row.completion], [bool(row.label)]) if read.kind == "labels" else ([row.chosen, row.rejected], [True, False])
        try:
            prompt, found = encode(tokenizer, row.messages, completions, row.tools)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        if len(prompt) > cfg.max_prompt_tokens or max(len(ids) for ids, _ in found) > cfg.max_new_tokens:
            dropped["too long"] += 1
        elif len(found) == 2 and found[0][0] == found[1][0]:
            dropped["equal"] += 1
        else:
            held_out = random_key("held out", cfg.seed, prompt) % 10**6 < cfg.val_fraction * 10**6
            pair = [arrays(prompt, *completion) for completion in found]
            sides[held_out].extend([([s], [g]) for s, g in zip(pair, good)] if kto else [(pair, good)])
    if not sides[0]:
        raise ValueError(f"--pairs={cfg.pairs}: nothing to train on; left out: {dict(dropped)}, held out: {len(sides[1])}")
    return *(examples_of(side, kto) for side in sides), dict(left_out=dict(dropped), notes=read.notes)


# -----------------------------------------------------------------------------
# Answers of the model itself


def open_problems(cfg, tokenizer):
    """-> (Problems, names of the tasks among --data, number of prompts that are too long, notes)"""
    tracks, sources, notes = tasks.open_prompts(cfg.data, num=cfg.num_prompts, num_val=0, seed=cfg.seed, grader=cfg.grader, val_fraction=cfg.val_fraction)
    train = [p for source in sources for p in source.train]
    if texts := [p.task for p in train if isinstance(p.prompt, str)]:
        raise ValueError(f"--data={cfg.data}: expected conversations, found the texts of {texts[0]}; train_rl.py takes those")
    if tracks != ["all"]:
        raise ValueError(f"--data={cfg.data}: tracks are train_rl.py's; expected sources alone")
    kept = [p for p in train if len(tokenizer.render_prompt(p.prompt, p.tools)) <= cfg.max_prompt_tokens]
    if not kept:
        raise ValueError(f"--data={cfg.data}: no prompt has at most {cfg.max_prompt_tokens} tokens: raise --max_prompt_tokens")
    names = [source.name.partition("@")[0] for source in sources if not Path(source.name).exists()]
    return kept, names, len(train) - len(kept), notes


def best_and_worst(rewards, finished):
    """-> (chosen, rejected), places in the group of one prompt's answers, or why it gives no pair. rewards: None where the grader failed;
    finished: a chosen answer must end in an end of turn, or the model learns to go on for ever; a rejected one may be cut off."""
    graded = [i for i, r in enumerate(rewards) if r is not None]
    ends = [i for i in graded if finished[i]]
    if len(graded) < 2 or not ends:
        return "ungraded" if len(graded) < 2 else "unfinished"
    best, worst = max(ends, key=lambda i: rewards[i]), min(graded, key=lambda i: rewards[i])
    return (best, worst) if rewards[best] > rewards[worst] else "tie"


def pairs_of(answers, cfg, step):
    """All ranks' answers of a step -> (Examples, Counter of what was left out); sets each answer's "used"."""
    found, dropped = [], Counter()
    for number in dict.fromkeys(a["group"] for a in answers):
        group = [a for a in answers if a["group"] == number]
        sequences = [arrays([], a["ids"], a["mask"]) for a in group]
        finished = [a["finish_reason"] == "stop" for a in group]
        if cfg.method == "kto":
            for a, sequence, end in zip(group, sequences, finished):
                good = a["reward"] is not None and a["reward"] > cfg.kto_threshold
                why = "ungraded" if a["reward"] is None else "unfinished" if good and not end else ""
                a["used"] = "" if why else "desirable" if good else "undesirable"
                dropped.update([why] if why else [])
                found += [] if why else [([sequence], [good])]
            continue
        pair = best_and_worst([a["reward"] for a in group], finished)
        if not isinstance(pair, str) and group[pair[0]]["ids"] == group[pair[1]]["ids"]:
            pair = "equal"                                                # a judge, or a tool, that said something else the second time
        if isinstance(pair, str):
            dropped[pair] += 1
            continue
        for i, used in zip(pair, ("chosen", "rejected")):
            group[i]["used"] = used
        found.append(([sequences[i] for i in pair], [True, False]))
    order = shuffled(np.arange(len(found)), max(1, len(found)), cfg.seed, "step", step)        # so that neighbours have different prompts
    return examples_of([found[i] for i in order.tolist()], cfg.method == "kto"), dropped


# -----------------------------------------------------------------------------


def resolve(cfg, parameters, num_items, max_new_tokens, names):
    """-> cfg with every -1 and "auto" chosen. Done once, before anything is logged: the config that is saved is the one that ran.
    num_items: pairs, rows or prompts to train on. max_new_tokens, names: of the tasks."""
    online, method = cfg.pairs == "online", METHODS[cfg.method]
    auto = lambda key, value: value if getattr(cfg, key) in (-1, "auto") else getattr(cfg, key)
    size = lambda most: max(8, 2 ** int(math.log2(max(1, min(most if parameters > 20e6 else 32, num_items / 16)))))
    lr = 3e-4 if parameters < 20e6 else method["lr"][cfg.lora_rank > 0] if parameters < 3.5e9 else 7e-7 * (10 if cfg.lora_rank else 1)
    cfg = replace(cfg, beta=auto("beta", method["beta"]), lr=auto("lr", lr), cold_start=auto("cold_start", 0 if cfg.init else 200),
                  prompts_per_step=auto("prompts_per_step", size(64) if online else 0),
                  pairs_per_step=auto("pairs_per_step", 0 if online else size(128)),
                  max_new_tokens=auto("max_new_tokens", max_new_tokens), eval_tasks=auto("eval_tasks", ",".join(names)),
                  num_epochs=auto("num_epochs", 1 if not online or num_items >= 5000 else 6 if num_items < 1000 else 3))
    steps = -(-cfg.num_epochs * num_items // max(1, cfg.prompts_per_step if online else cfg.pairs_per_step))
    cfg = replace(cfg, num_steps=auto("num_steps", steps if cfg.init else min(steps, 40)))
    cfg = replace(cfg, warmup_steps=auto("warmup_steps", round(.1 * cfg.num_steps)),
                  eval_every=auto("eval_every", max(1, cfg.num_steps // 10)))

    allowed = dict(lr=(1e-8, 1e-2), muon_lr=(0, 1), beta=(1e-4, 100), margin=(0, 20), label_smoothing=(0, .5), rpo_alpha=(0, 10),
                   kto_desirable=(0, 100), kto_undesirable=(0, 100), lora_rank=(0, 256), lora_alpha=(1, 512), num_epochs=(1, 100),
                   num_samples=(1 if cfg.method == "kto" else 2, 64), temperature=(1e-6, 2), val_fraction=(0, .5), slots=(1, 10**5),
                   max_prompt_tokens=(1, 10**6), max_new_tokens=(1, 10**6), num_steps=(0, 10**7), prompts_per_step=(int(online), 4096),
                   pairs_per_step=(int(not online), 10**5), device_batch_size=(1, 10**5), cold_start=(0, 10**6), warmup_steps=(0, 10**7),
                   decay_share=(0, 1), max_grad_norm=(1e-6, 1e9), weight_decay=(0, 1), eval_every=(0, 10**9), save_every=(0, 10**9),
                   num_prompts=(1, 10**7), max_grader_error=(0, 1))
    recommended = dict(beta=method["beta"], lr=lr, num_samples=8, temperature=1.0)
    for key, (low, high) in allowed.items():
        if not low <= getattr(cfg, key) <= high:
            hint = f"; {recommended[key]:g} is recommended" if key in recommended else ""
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected within [{low}, {high}]{hint}")
    if cfg.label_smoothing and not cfg.method.startswith("sigmoid"):
        raise ValueError(f"--label_smoothing={cfg.label_smoothing}: is for sigmoid and sigmoid_norm, found --method={cfg.method}")
    if cfg.rpo_alpha and cfg.method in ("kto", "orpo"):
        why = "orpo has that term already" if cfg.method == "orpo" else "kto has rows, not chosen answers"
        raise ValueError(f"--rpo_alpha={cfg.rpo_alpha}: {why}")
    return cfg


def sequence_logps(forward, model, sequences, which, offsets, cfg):
    """-> (len(which),) fp32: the summed log-probability of each sequence's mask = 1 tokens, at temperature 1."""
    device = model.lm_head.weight.device
    b = sequence_batch(sequences, which, offsets, cfg.pack).to(device)
    hidden = forward(b.ids, b.positions, b.doc_ids).flatten(0, 1)[b.rows]                   # (N, D), trained positions only
    logps = linear_logprob(hidden, model.lm_head.weight, b.targets).logp                    # (N,) fp32
    owner = torch.tensor(which, dtype=torch.int64, device=device)[:, None] == b.sequences   # (len(which), N): a product, since index_add is
    return owner.float() @ logps                                                            # not deterministic on CUDA


@torch.no_grad()
def frozen_logps(model, sequences, cfg, desc=""):
    """(S,) sequence_logps without a gradient, in the same precision. There is no dropout to turn off."""
    result, offsets = torch.zeros(len(sequences), device=model.lm_head.weight.device), token_offsets(sequences)
    groups = micro_batches([len(ids) for ids, _ in sequences], cfg.device_batch_size, 1 if cfg.method == "kto" else 2)
    for which in progress(groups, desc=desc) if desc else groups:
        result[which] = sequence_logps(model, model, sequences, which, offsets, cfg)
    return result


def cold_start(model, documents, cfg):
    """A short SFT on gold or chosen answers, so that the toy tasks run from nothing. For anything serious there is train_sft.py."""
    optimizers = make_optimizers(model, 3e-3, 0.02)
    for step in progress(range(cfg.cold_start), desc="cold start"):
        sequences = [documents[i] for i in shuffled(np.arange(step * 32, step * 32 + 32), len(documents), cfg.seed, "cold start").tolist()]
        offsets = token_offsets(sequences)
        for which in micro_batches([len(ids) for ids, _ in sequences], 2 * cfg.device_batch_size):
            (-sequence_logps(model, model, sequences, which, offsets, cfg).sum() / int(offsets[-1])).backward()
        clip_grad_norm(model, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_scale(step, cfg.cold_start, 20, 0.4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def compare(cfg, seq_logps, ref_logps, num_tokens):
    """(S,) x: what the method's loss compares, see METHODS."""
    x = seq_logps - ref_logps if METHODS[cfg.method]["reference"] else seq_logps
    return x / num_tokens if METHODS[cfg.method]["mean"] else x


def known_before(model, part, num, cfg):
    """-> good (S,) bool, ref_logps (S,), sizes (S,) in tokens, z0 (). part: of this rank, num: of all ranks; every rank calls.

    z0 = max(0, mean of h over the mismatched rows of all ranks) estimates KL(policy || reference) (KTO, section 4.1). It is found before
    the loss, without a gradient: in the loss it would depend on the micro-batch.
    """
    device = model.lm_head.weight.device
    good, ref = torch.tensor(part.good, dtype=torch.bool, device=device), torch.tensor(part.ref, dtype=torch.float32, device=device)
    sizes, z0 = torch.from_numpy(np.diff(token_offsets(part.sequences))).to(device), torch.zeros((), device=device)
    if cfg.method == "kto":
        h = frozen_logps(model, part.mismatched, cfg) - torch.tensor(part.wrong_ref, dtype=torch.float32, device=device)
        z0 = all_reduce_sum(h.double().sum()).clamp(min=0).float() / num
    return good, ref, sizes, z0


def statistics(loss, seq_logps, x, good, z0, kto):
    """(8,) float64 sums: loss, right, x of the good, of the bad, seq_logps of the good, of the bad, how many good, how many bad."""
    seq_logps, x = seq_logps.detach().double(), x.detach().double()
    right = (x > z0) == good if kto else x[0::2] > x[1::2]
    by_side = [values[side].sum() for values in (x, seq_logps, torch.ones_like(x)) for side in (good, ~good)]
    return torch.stack([loss.detach().double(), right.sum().double(), *by_side])


def pair_metrics(sums, num):
    """Sums of all ranks -> loss, and pairs/... by name."""
    loss, right, x_good, x_bad, logp_good, logp_bad, num_good, num_bad = all_reduce_sum(sums).tolist()
    num_good, num_bad = max(1, num_good), max(1, num_bad)
    return loss, {"pairs/accuracy": right / num, "pairs/margin": x_good / num_good - x_bad / num_bad,
                  "pairs/chosen_logp": logp_good / num_good, "pairs/rejected_logp": logp_bad / num_bad}


def evaluate(model, data, cfg, rank, world_size):
    """-> {val/loss, val/pair_accuracy, val/pair_margin} over held-out pairs or rows."""
    num, part = len(data.good) // (1 if cfg.method == "kto" else 2), data.take(share_of(data, cfg, rank, world_size))
    good, ref_logps, sizes, z0 = known_before(model, part, num, cfg)
    seq_logps = frozen_logps(model, part.sequences, cfg)
    x = compare(cfg, seq_logps, ref_logps, sizes)
    loss, found = pair_metrics(statistics(preference_loss(cfg, x, good, z0, num), seq_logps, x, good, z0, cfg.method == "kto"), num)
    return {"val/loss": loss, "val/pair_accuracy": found["pairs/accuracy"], "val/pair_margin": found["pairs/margin"]}


def share_of(data, cfg, rank, world_size, units=None):
    """Indices of this rank's sequences in data. units: numbers of pairs (kto: rows), the same list on all ranks; None: all."""
    size = 1 if cfg.method == "kto" else 2
    units = range(len(data.good) // size) if units is None else units
    return [size * u + k for u in units[rank::world_size] for k in range(size)]


def train(cfg):
    rank, _, world_size, device = setup_distributed()
    out_dir, online, kto = Path("out") / cfg.name, cfg.pairs == "online", cfg.method == "kto"
    size = 1 if kto else 2                                            # sequences of a unit: a row, a pair
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

    # data
    if online:
        problems, names, too_long, notes = open_problems(cfg, tokenizer)
        cfg = resolve(cfg, num_params(model), len(problems), max(tasks.max_new_tokens(p.task) for p in problems), names)
        counts = dict(prompts=len(problems), left_out=dict(too_long=too_long), notes=notes)
        documents = [tokenizer.render(p.prompt + p.gold, p.tools) for p in problems if p.gold] if cold else []
    else:
        cfg = replace(cfg, max_new_tokens=1024 if cfg.max_new_tokens == -1 else cfg.max_new_tokens)
        data, held_out, said = read_pairs(cfg, tokenizer)
        num_items = len(data.good) // size
        cfg = resolve(cfg, num_params(model), num_items, 1024, [])
        counts = dict(rows=num_items) if kto else dict(pairs=num_items)
        counts |= dict(held_out=len(held_out.good) // size) | said
        documents = [s for s, g in zip(data.sequences, data.good) if g]
    width = cfg.max_prompt_tokens + cfg.max_new_tokens
    if width > model.config.max_positions:
        raise ValueError(f"--max_prompt_tokens ({cfg.max_prompt_tokens}) + --max_new_tokens ({cfg.max_new_tokens}) are over the model's "
                         f"context of {model.config.max_positions}")
    if cold and cfg.cold_start and not documents:
        raise ValueError("the prompts have no gold answers to start from: give a trained model in --init")

    uses_ref = METHODS[cfg.method]["reference"]
    c, bytes_each = model.config, 2 if bfloat16 else 4
    memory = memory_estimate(c, cfg.device_batch_size * size, width, muon=cfg.muon_lr > 0, compute_bytes=bytes_each,
                             recompute_activations=cfg.recompute)
    copy = memory["weights"] * (uses_ref and not (cfg.lora_rank and not cfg.ref))
    cache = 2 * c.num_layers * cfg.slots * c.num_kv_heads * width * c.head_dim * bytes_each * online
    memory |= dict(reference=copy, cache=cache, total=memory["total"] + copy + cache)
    settings = dict(parameters=num_params(model), device=str(device), ranks=world_size, **counts,
                    memory_estimate_mb={k: round(v / 2**20) for k, v in memory.items()})
    if rank == 0:
        for key, value in (asdict(cfg) | settings).items() if cfg.dry_run else settings.items():
            print(f"{key:>20}  {value}", flush=True)
    if cfg.dry_run:
        return settings
    rewards = [] if not online else open_rewards(cfg.rewards, ["all"], device=device, reward_file=cfg.reward_file, reward_function=cfg.reward_function,
                                                 reward_role=cfg.reward_role, reward_event=cfg.reward_event, reward_timeout=cfg.reward_timeout,
                                                 judge=cfg.judge, judge_model=cfg.judge_model, judge_retries=cfg.judge_retries,
                                                 judge_timeout=cfg.judge_timeout, judge_range=cfg.judge_range,
                                                 rubric=cfg.rubric)

    # where the run starts is the reference
    if not cfg.resume and rank == 0:
        checkpoint.clear(out_dir, cfg.overwrite or cfg.name == "dummy")
    if cold:
        cold_start(model, documents, cfg)
        checkpoint.save(out_dir, 0, model, tokenizer, [], state={}, config=asdict(cfg), rank=rank, world_size=world_size)
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, seed=random_key(cfg.seed, "lora"))
        if resume:
            checkpoint.restore_lora(resume, model)
    ref = model                                                       # with LoRA: the same weights, adapter off
    if uses_ref and (cfg.ref or not cfg.lora_rank):
        ref, _ = checkpoint.load_hf(checkpoint.newest(cfg.ref) if cfg.ref else start, device)
        ref.compute_dtype = model.compute_dtype
        ref.requires_grad_(False)

    def with_reference(part, ranks=1, desc=""):
        """part with ref and wrong_ref. ranks: so many share the work; what each leaves out are zeros, which a sum over ranks fills."""
        flat = part.sequences + part.mismatched
        table = torch.zeros(len(flat), device=device)
        mine = [i for i in range(len(flat)) if (i // size - rank) % ranks == 0]                   # pairs stay whole: they share a prompt
        if uses_ref:
            with lora_off(ref):
                table[mine] = frozen_logps(ref, [flat[i] for i in mine], cfg, desc)
        table = (all_reduce_sum(table) if ranks > 1 else table).tolist()
        return part._replace(ref=table[:len(part.good)], wrong_ref=table[len(part.good):])

    # optimization
    wrapped = parallelize(model, "ddp", device, world_size)
    forward = torch.compile(wrapped) if cfg.compile else wrapped
    optimizers = make_optimizers(model, cfg.lr, cfg.muon_lr, cfg.weight_decay)
    first_step, samples_seen = 0, 0
    # what a run that goes on must have in common with the one that stopped, or it would train on something else
    keys = ("method", "beta", "margin", "pairs", "data", "seed", "pairs_per_step", "prompts_per_step", "num_samples", "temperature",
            "max_prompt_tokens", "max_new_tokens", "val_fraction", "rewards", "reward_file", "judge", "rubric", "judge_range", "ref")
    fixed = {key: getattr(cfg, key) for key in keys} | counts | dict(init_hash=checkpoint.weights_hash(start))
    if resume:
        state = checkpoint.restore(resume, model, optimizers, rank, world_size)
        first_step, samples_seen = state["step"], state["samples_seen"]
        if changed := [f"{k} was {v}, found {fixed.get(k)}" for k, v in state["fixed"].items() if fixed.get(k) != v]:
            raise ValueError(f"--resume={cfg.resume}: {'; '.join(changed)}; resume with the flags and data of the saved run, or start a "
                             "new one from its weights (--init)")
    logger = Logger(cfg, rank, first_step if resume else None)
    started, val = time.monotonic(), {}

    if not online:                                                    # once, in memory; then the reference is let go
        data = with_reference(data, world_size, "reference of pairs")
        held_out = with_reference(held_out, world_size, "reference of held-out pairs")
        ref = None

    for step in range(first_step, cfg.num_steps + 1):
        last_step = step == cfg.num_steps

        # once in a while: held-out pairs, answers
        if (last_step or (cfg.eval_every and step % cfg.eval_every == 0)) and (step > first_step or not resume):
            val = evaluate(model, held_out, cfg, rank, world_size) if not online and held_out.good else {}
            if rank == 0:
                from eval import run_task
                for task in cfg.eval_tasks.split(",") if cfg.eval_tasks else []:
                    result = run_task(model, tokenizer, task, num_problems=cfg.eval_problems, seed=cfg.seed)
                    if result["value"] is not None:                   # a grader that failed is no score
                        val[f"val/{result['metric']}_{task}"] = result["value"]
            if val:
                logger.log(step, **val)
                logger.print(f"step {step:6d}/{cfg.num_steps} | " + " | ".join(f"{k.removeprefix('val/')} {v:.3f}" for k, v in val.items()))

        if last_step or (cfg.save_every and step > first_step and step % cfg.save_every == 0):
            state = dict(step=step, samples_seen=samples_seen, fixed=fixed, init_hash=fixed["init_hash"])
            saved = checkpoint.save(out_dir, step, model, tokenizer, optimizers, state=state, config=asdict(cfg), rank=rank,
                                    world_size=world_size)
        if last_step:
            break

        # collect: units are the global batch, the same list on every rank
        t0, metrics = time.perf_counter(), {}
        if online:
            places = np.arange(step * cfg.prompts_per_step, (step + 1) * cfg.prompts_per_step)
            asked = [(i, problems[p], random_key(cfg.seed, "rollout", step, i))
                     for i, p in enumerate(shuffled(places, len(problems), cfg.seed, "order").tolist())]
            mine = asked[rank::world_size]
            with checkpoint.together():
                groups = play_for_rewards(model, tokenizer, [(0, p) for _, p, _ in mine], rewards, [seed for *_, seed in mine], num_samples=cfg.num_samples,
                                          max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, tool_timeout=cfg.tool_timeout, max_slots=cfg.slots)
            answers = [a for group in groups for a in group]
            num_errors, metrics = check_grader_errors(answers, cfg.max_grader_error, step + 1), rollout_metrics(answers, ["all"])
            lines = [dict(as_line(a, ["all"], step + 1), group=i, sample=j, ids=a.ids, mask=a.mask, used="")
                     for (i, _, _), group in zip(mine, groups) for j, a in enumerate(group)]
            answers = sorted(all_gather_list(lines), key=lambda a: (a["group"], a["sample"]))
            samples_seen += len(answers)
            data, left_out = pairs_of(answers, cfg, step)
            units = range(len(data.good) // size)
            metrics |= {"pairs/ties": left_out["tie"], "pairs/left_out": left_out.total() - left_out["tie"], "rollout/grader_error": num_errors,
                        "rollout/samples": samples_seen, "time/generate": time.perf_counter() - t0}
            logger.rollouts(step + 1, [{key: value for key, value in a.items() if key != "mask"} for a in answers])
        else:
            places, total = np.arange(step * cfg.pairs_per_step, (step + 1) * cfg.pairs_per_step), cfg.num_epochs * num_items
            if step + 1 == cfg.num_steps and places[0] < total:         # whole epochs: each pair as often as every other
                places = places[places < total]
            units = shuffled(places, num_items, cfg.seed, "order").tolist()
        part, num = data.take(share_of(data, cfg, rank, world_size, units)), len(units)
        metrics["pairs/num"] = num
        if num == 0:
            logger.log(step + 1, **metrics)
            logger.print(f"step {step + 1:6d}/{cfg.num_steps} | no prompt has answers that differ in reward: no update")
            continue

        if online:
            t1 = time.perf_counter()
            part = with_reference(part)
            metrics["time/reference"] = time.perf_counter() - t1
        good, ref_logps, sizes, z0 = known_before(model, part, num, cfg)

        # num is of the global batch, so that neither micro-batches nor ranks change the gradient; a rank with nothing runs one empty row
        sums, nll = torch.zeros(8, dtype=torch.float64, device=device), torch.zeros((), dtype=torch.float64, device=device)
        offsets = token_offsets(part.sequences)
        groups = micro_batches([len(ids) for ids, _ in part.sequences], cfg.device_batch_size, size) or [[]]
        for i, which in enumerate(groups):
            set_gradient_sync(wrapped, i == len(groups) - 1)
            seq_logps = sequence_logps(forward, model, part.sequences, which, offsets, cfg)
            x = compare(cfg, seq_logps, ref_logps[which], sizes[which])
            loss = preference_loss(cfg, x, good[which], z0, num)
            sums += statistics(loss, seq_logps, x, good[which], z0, kto)
            if cfg.rpo_alpha:
                chosen_nll = -(seq_logps / sizes[which])[0::2].sum() / num                  # per token of each chosen answer
                loss = loss + cfg.rpo_alpha * chosen_nll
                nll += chosen_nll.detach()
            (loss * world_size).backward()                                                  # DDP averages, we want the sum
        (loss, found), nll = pair_metrics(sums, num), all_reduce_sum(nll).item()
        check_finite("train/loss", loss)

        # where the policy still is the reference, the loss is known
        if step == 0 and uses_ref and not cfg.ref:
            expected = loss_at_reference(cfg, [data.good[i] for i in share_of(data, cfg, 0, 1, units)])
            close = abs(loss - expected) < (2e-2 if bfloat16 else 1e-4) * max(1, expected)
            assert close, f"the first loss is {loss}, expected {expected}: policy and reference are not the same model"

        # update
        grad_norm = clip_grad_norm(model, cfg.max_grad_norm).item()
        scale = lr_scale(step, cfg.num_steps, cfg.warmup_steps, cfg.decay_share)
        check_finite("train/grad_norm", grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # log
        num_tokens = all_reduce_sum(sum(len(ids) - 1 for ids, _ in part.sequences), device)
        seconds, loss = time.perf_counter() - t0, loss + cfg.rpo_alpha * nll
        metrics |= {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": cfg.lr * scale} | found
        metrics |= ({"pairs/chosen_nll": nll} if cfg.rpo_alpha else {}) | ({"pairs/z0": z0.item()} if kto else {})
        metrics |= {"time/step": seconds, "time/tokens_per_sec": num_tokens / seconds}
        logger.log(step + 1, **metrics)
        left = (time.monotonic() - started) / (step + 1 - first_step) * (cfg.num_steps - step - 1)
        if online or (step + 1) % max(1, cfg.num_steps // 100) == 0 or step + 1 == cfg.num_steps:
            reward = f"reward {metrics['rollout/score']:.3f} | " if online else ""
            logger.print(f"step {step + 1:6d}/{cfg.num_steps} | loss {loss:7.4f} | {reward}margin {found['pairs/margin']:7.3f} | accuracy "
                         f"{found['pairs/accuracy']:.3f} | grad_norm {grad_norm:6.3f} | lr {cfg.lr * scale:.2e} | {seconds:.1f} s | "
                         f"{format_seconds(left)} left")

    for reward, _ in (pair for named in rewards for pair in named.values()):
        getattr(reward, "close", lambda: None)()
    summary = dict(name=cfg.name, checkpoint=str(saved), steps=cfg.num_steps, **(dict(samples=samples_seen) if online else {}),
                   parameters=num_params(model), seconds=round(time.monotonic() - started, 1), **val)
    logger.close(**summary)
    return summary


def main(cfg):
    if cfg.sandbox != "auto":                                        # auto is chosen when the first program runs
        sandbox.choose(cfg.sandbox)
    return train(cfg)


if __name__ == "__main__":
    main(parse_config(Config))
