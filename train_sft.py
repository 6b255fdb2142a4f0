"""Supervised training on text and on conversations: pre-training a tiny base, mid-training with replay, SFT.

One objective for all three. With m_t = 1 where a token is trained on (every token of a text document but its first; in a conversation
the assistant's words, calls and end of turn) and N the number of such tokens in the global batch, all ranks and micro-batches together:

    loss = - (1/N) · sum_t m_t · log p(x_t | x_<t of the same document)

The mean is over tokens, not over conversations: a long answer counts for more, and neither packing, micro-batches nor ranks change it.
Mid-training (Kanana-2) draws a share `replay` of the tokens from the old data so that the new does not erase it; the order of the new
documents depends on the seed alone, so runs that differ in `replay` see the same new data.

With --rounds the model teaches itself (rejection sampling; Kanana-2's tool calls): answer each problem of --pool num_samples times, tools
executed, keep distinct right answers, train again from the checkpoint before SFT on demonstrations and kept answers, and so on.

    python train_sft.py --data=toy --size=tiny --eval_tasks=math_en             laptop: 400 steps, three to four minutes on one core
    python train_sft.py --init=<Hugging Face folder> --data=chats.jsonl --lr=5e-5 --muon_lr=0 --seq_len=4096 \\
        --device_batch_size=4 --total_batch_size=131072 --num_epochs=2         one GPU
    torchrun --nproc_per_node=8 train_sft.py ...                                the same flags, eight GPUs
"""
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
from common import (Logger, all_reduce_sum, check_finite, format_seconds, lr_scale, parse_config, peak_flops, random_key,
                    setup_distributed, write_atomically)
from data import open_sources, parse_shares, sandbox, tasks
from data.grading import Outcome, parse_number
from data.packing import Loader, make_batch, split_rows
from data.tokens import Chunk, TokenFile, write_sources
from kernels import linear_logprob
from model import (Transformer, add_lora, clip_grad_norm, config_for_size, flops_per_token, make_optimizers, memory_estimate,
                   num_params, parallelize, set_gradient_sync)
from rollouts import sample_to_files, without_overlap
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    name: str = "dummy"              # results go to out/<name>; any name but dummy also opens wandb
    seed: int = 0                    # decides initial weights and the order of the data
    # model
    init: str = ""                   # checkpoint folder, of ours or of Hugging Face; empty: random weights of --size
    size: str = "tiny"               # from scratch: nano | tiny | mini | small | base
    tokenizer: str = "bytes"         # from scratch: bytes, or a Hugging Face tokenizer.json
    lora_rank: int = 0               # 0: train all weights; 8 to 64: LoRA on every linear layer of the blocks
    lora_alpha: float = 16.0         # LoRA's update is scaled by alpha / rank: higher learns faster
    # data
    data: str = "toy"                # comma-separated sources: toy, toy/<task>, stdlib, gsm8k, a file or folder; name=<source> renames
    mix: str = ""                    # share of trained tokens by source, e.g. math_en:.6,code:.4; empty: as large as the sources are
    replay_data: str = ""            # old sources, drawn with total share --replay
    replay: float = 0.0              # share of replayed tokens, 0 to 1: higher forgets less and costs tokens
    seq_len: int = 384               # tokens per row
    long: Literal["error", "drop"] = "error"    # a conversation longer than a row stops the run, or is left out and counted
    cache: str = "out/cache"         # tokenized data is kept here
    num_demos: int = 0               # documents of each toy source; 0: 10,000
    # rejection sampling
    rounds: int = 0                  # 0: train once on --data; K: then K times sample, keep what is right, and train on both
    pool: str = "math_en"            # tasks whose problems are sampled, e.g. math_en,tools/1; their train split
    num_prompts: int = 400           # problems of each of them
    num_samples: int = 8             # answers to each problem
    temperature: float = 1.0         # of sampling
    control: Literal["", "shuffled", "always_right"] = ""       # runs that must fail: kept answers change problems; every answer is kept
    early_stop: bool = True          # stop after a round that gained less than a standard error on --eval_tasks
    # length of the run
    num_steps: int = 400             # optimizer steps, where neither of the next two is given
    new_tokens: int = 0              # trained tokens of --data; replay comes on top
    num_epochs: int = 0              # passes over --data; replay comes on top
    # optimization
    device_batch_size: int = 8       # rows per forward pass and device: lower when memory runs out, the result stays the same
    total_batch_size: int = 3072     # tokens per optimizer step over all devices, a multiple of device_batch_size * seq_len * devices
    lr: float = 3e-3                 # peak rate of AdamW; 5e-5 suits a trained 0.5B model
    muon_lr: float = 0.02            # peak rate of Muon on the blocks' matrices; 0: AdamW trains everything
    weight_decay: float = 0.0        # on matrices
    warmup_steps: int = 20           # steps of linear warm-up
    decay_share: float = 0.4         # the last share of the run goes linearly to rate 0; 1: all of it
    max_grad_norm: float = 1.0       # global norm the gradient is clipped to
    # machine
    pack: bool = True                # several documents per row, isolated from each other; false: one per row, padded
    tool_timeout: float = 60.0       # seconds until a call is given up; its rollout ends there
    sandbox: Literal["auto", "namespaces", "landlock", "none_i_accept"] = "auto"        # the box in which written code runs
    parallel: Literal["ddp", "fsdp"] = "ddp"    # under torchrun: whole copies, or FSDP2 shards
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"      # of the computation; weights are float32 always; auto: bfloat16 on CUDA
    recompute: bool = False          # activation checkpointing: a third slower, most of the activation memory back
    compile: bool = False            # torch.compile the model
    # looking and keeping
    eval_every: int = 100            # steps between evaluations; 0: only at the end
    eval_rows: int = 64              # held-out rows per evaluation
    eval_tasks: str = ""             # tasks of eval.py answered at each evaluation, e.g. math_en,facts_ko
    eval_problems: int = 100         # problems per task
    save_every: int = 0              # steps between checkpoints; 0: only at the end
    resume: str = ""                 # latest, or a step folder: continue out/<name> exactly
    overwrite: bool = False          # delete the checkpoints of an earlier run of this name
    dry_run: bool = False            # print the resolved settings and the memory estimate, and stop


# -----------------------------------------------------------------------------
# The algorithm


def sft_loss(logps, num_tokens):
    """Negative log-likelihood to minimize. logps: (N,), trained positions only. num_tokens: how many the global batch has."""
    return -logps.sum() / num_tokens


def bucket_sums(logps, buckets, num_buckets):
    """-> (num_buckets, 2) float64: summed negative log-likelihood and token count of each source. logps, buckets: (N,)."""
    sums = torch.zeros(num_buckets, 2, dtype=torch.float64, device=logps.device)
    pairs = torch.stack([-logps.detach().double(), torch.ones_like(logps, dtype=torch.float64)], dim=1)
    return sums.index_add_(0, buckets, pairs)


# -----------------------------------------------------------------------------


def demo_options(cfg):
    """Few demonstrations are a draw of their own for every seed; the usual 10,000 are the same for all, and cached once."""
    return dict(num=cfg.num_demos, seed=cfg.seed) if cfg.num_demos else {}


def evaluate(forward, model, sources, cfg, rank, world_size, device):
    """-> {source: mean loss in nats per token} over the same held-out rows at every call; {} without held-out data."""
    sources = {n: s for n, s in sources.items() if len(s)}
    if not sources:
        return {}
    rows_at_once = cfg.device_batch_size * world_size
    num_calls = -(-cfg.eval_rows // rows_at_once)
    loader = Loader(sources, {n: 1 / len(sources) for n in sources}, seq_len=cfg.seq_len, seed=0)
    sums = torch.zeros(len(sources), 2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for _ in range(num_calls):
            rows, = split_rows(loader.next_rows(rows_at_once), cfg.device_batch_size, rank, world_size)
            b = make_batch(rows, sources, cfg.seq_len).to(device)
            hidden = forward(b.ids, b.positions, b.doc_ids).flatten(0, 1)[b.rows]
            logps = linear_logprob(hidden, model.lm_head.weight, b.targets).logp
            sums += bucket_sums(logps, b.buckets, len(sources))
    sums = all_reduce_sum(sums).tolist()
    return {name: total / count for name, (total, count) in zip(sources, sums) if count}


def train(cfg, new=None):
    """One training run. new: {name: TokenFile} instead of those of --data."""
    rank, _, world_size, device = setup_distributed()
    out_dir = Path("out") / cfg.name
    grad_accum_steps, rest = divmod(cfg.total_batch_size, cfg.device_batch_size * cfg.seq_len * world_size)
    if rest or not grad_accum_steps:
        raise ValueError(f"--total_batch_size ({cfg.total_batch_size}) must be a multiple of device_batch_size * seq_len * ranks = "
                         f"{cfg.device_batch_size} * {cfg.seq_len} * {world_size} = {cfg.device_batch_size * cfg.seq_len * world_size}")
    resume = checkpoint.find(out_dir, cfg.resume)

    # model
    if resume or cfg.init:
        model, tokenizer = checkpoint.load_hf(resume or checkpoint.newest(cfg.init), device)
    else:
        tokenizer = Tokenizer.bytes() if cfg.tokenizer == "bytes" else Tokenizer.from_file(cfg.tokenizer)
        model = Transformer(config_for_size(cfg.size, tokenizer.vocab_size)).init_weights(random_key(cfg.seed, "weights")).to(device)
    bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
    model.compute_dtype = torch.bfloat16 if bfloat16 else torch.float32
    model.recompute_activations = cfg.recompute
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, seed=random_key(cfg.seed, "lora"))
        if resume:
            checkpoint.restore_lora(resume, model)

    # data: tokenized once by the first rank, memory-mapped by all
    options = dict(tokenizer=tokenizer, seq_len=cfg.seq_len, cache_dir=cfg.cache, long=cfg.long)
    demos = options | demo_options(cfg)
    new = new or open_sources(cfg.data, **demos)
    old = open_sources(cfg.replay_data, **options) if cfg.replay_data else {}
    if new.keys() & old.keys():
        raise ValueError(f"--replay_data repeats names of --data: {sorted(new.keys() & old.keys())}; rename one as name=<source>")
    sources = new | old
    shares = parse_shares(cfg.mix, sources)
    val_sources = open_sources(cfg.data, split="val", **demos) | (open_sources(cfg.replay_data, split="val", **options) if old else {})
    loader = Loader(sources, shares, seq_len=cfg.seq_len, seed=cfg.seed, replay=tuple(old), replay_share=cfg.replay,
                    new_tokens=cfg.new_tokens or None, epochs=cfg.num_epochs or None, pack=cfg.pack)
    rows_per_step = cfg.total_batch_size // cfg.seq_len
    num_steps = -(-loader.num_rows() // rows_per_step) if loader.finite else cfg.num_steps

    memory = memory_estimate(model.config, cfg.device_batch_size, cfg.seq_len, muon=cfg.muon_lr > 0, recompute_activations=cfg.recompute,
                             shards=world_size if cfg.parallel == "fsdp" else 1, compute_bytes=2 if bfloat16 else 4,
                             trainable_share=sum(p.numel() for p in model.parameters() if p.requires_grad) / num_params(model))
    settings = dict(parameters=num_params(model), device=str(device), ranks=world_size, num_steps=num_steps, rows_per_step=rows_per_step,
                    grad_accum_steps=grad_accum_steps, sources={n: s.describe() for n, s in sources.items()},
                    memory_estimate_mb={k: round(v / 2**20) for k, v in memory.items()})
    if rank == 0:
        for key, value in (asdict(cfg) | settings).items() if cfg.dry_run else settings.items():
            print(f"{key:>20}  {value}", flush=True)
        if num_params(model) > 1e8 and cfg.init and max(cfg.lr, cfg.muon_lr) > 1e-3 and not cfg.lora_rank:
            print(f"note: --lr={cfg.lr} --muon_lr={cfg.muon_lr} are rates for tiny models; runs/ has those for large ones", flush=True)
    if cfg.dry_run:
        return settings

    # optimization
    wrapped = parallelize(model, cfg.parallel, device, world_size)
    forward = torch.compile(wrapped) if cfg.compile else wrapped
    optimizers = make_optimizers(model, cfg.lr, cfg.muon_lr, cfg.weight_decay)
    first_step, tokens_seen = 0, 0
    if resume:
        state = checkpoint.restore(resume, model, optimizers, rank, world_size)
        first_step, tokens_seen = state["step"], state["tokens_seen"]
        loader.load_state_dict(state["loader"])
    elif rank == 0:
        checkpoint.clear(out_dir, cfg.overwrite or cfg.name == "dummy")
    logger = Logger(cfg, rank, first_step if resume else None)
    names, started, val = list(sources), time.monotonic(), {}
    flops, peak = flops_per_token(model.config, cfg.seq_len), peak_flops(device)

    for step in range(first_step, num_steps + 1):
        last_step = step == num_steps

        # once in a while: held-out loss, and answers
        if (last_step or (cfg.eval_every and step % cfg.eval_every == 0)) and (step > first_step or not resume):
            losses = evaluate(forward, model, val_sources, cfg, rank, world_size, device)
            val = {f"val/loss_{n}": v for n, v in losses.items()}
            if losses:
                val["val/loss"] = sum(losses.values()) / len(losses)
            if cfg.eval_tasks and rank == 0:
                from eval import run_task
                for task in cfg.eval_tasks.split(","):
                    result = run_task(model, tokenizer, task, num_problems=cfg.eval_problems, seed=cfg.seed)
                    if result["value"] is not None:                  # a grader that failed is no score
                        val[f"val/{result['metric']}_{task}"] = result["value"]
            logger.log(step, **val)
            logger.print(f"step {step:6d}/{num_steps} | " + " | ".join(f"{k.removeprefix('val/')} {v:.3f}" for k, v in val.items()))

        if last_step or (cfg.save_every and step > first_step and step % cfg.save_every == 0):
            state = dict(step=step, tokens_seen=tokens_seen, loader=loader.state_dict())
            saved = checkpoint.save(out_dir, step, model, tokenizer, optimizers, state=state, config=asdict(cfg), rank=rank,
                                    world_size=world_size)
        if last_step:
            break

        # collect: the rows of a step depend on the seed only, each rank takes its part of each micro-batch
        t0 = time.perf_counter()
        rows = split_rows(loader.next_rows(rows_per_step), cfg.device_batch_size, rank, world_size)
        batches = [make_batch(r, sources, cfg.seq_len if cfg.pack else None) for r in rows]

        # count before the first backward, so that neither micro-batches nor ranks change the gradient
        num_tokens = all_reduce_sum(sum(len(b.rows) for b in batches), device)
        if num_tokens == 0:
            raise ValueError(f"step {step}: no token of the batch is trained on; raise --total_batch_size")
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
        for i, b in enumerate(batches):
            b = b.to(device)
            set_gradient_sync(wrapped, i == len(batches) - 1)
            hidden = forward(b.ids, b.positions, b.doc_ids).flatten(0, 1)[b.rows]           # (N, D), trained positions only
            logps = linear_logprob(hidden, model.lm_head.weight, b.targets).logp            # (N,) fp32
            loss = sft_loss(logps, num_tokens)
            (loss * world_size).backward()                                                  # DDP and FSDP average, we want the sum
            sums += bucket_sums(logps, b.buckets, len(names))

        # update
        grad_norm = clip_grad_norm(model, cfg.max_grad_norm).item()
        scale = lr_scale(step, num_steps, cfg.warmup_steps, cfg.decay_share)
        check_finite("train/grad_norm", grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # log
        sums = all_reduce_sum(sums).tolist()
        seconds = time.perf_counter() - t0
        tokens_seen += num_tokens
        slots = sum(b.num_tokens for b in batches) * world_size                              # filler is no work done
        loss = sum(total for total, _ in sums) / num_tokens
        per_source = {f"train/loss_{n}": total / count for n, (total, count) in zip(names, sums) if count}
        per_source |= {f"train/tokens_{n}": count for n, (_, count) in zip(names, sums)}
        logger.log(step + 1, **{"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": cfg.lr * scale, "train/tokens": tokens_seen},
                   **per_source, **{"time/step": seconds, "time/tokens_per_sec": slots / seconds},
                   **({"time/mfu": flops * slots / seconds / peak / world_size} if peak else {}))
        left = (time.monotonic() - started) / (step + 1 - first_step) * (num_steps - step - 1)
        if (step + 1) % max(1, num_steps // 100) == 0 or step + 1 == num_steps:
            logger.print(f"step {step + 1:6d}/{num_steps} | loss {loss:7.4f} | grad_norm {grad_norm:6.3f} | lr {cfg.lr * scale:.2e} | "
                         f"{slots / seconds:8.0f} tok/s | {format_seconds(left)} left")

    summary = dict(name=cfg.name, checkpoint=str(saved), steps=num_steps, tokens=tokens_seen, parameters=num_params(model),
                   seconds=round(time.monotonic() - started, 1), **val)
    logger.close(**summary)
    return summary


# -----------------------------------------------------------------------------
# Rejection sampling


def normal(value):
    """One spelling for an argument or an answer: numbers as rationals, text without white space."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    number = parse_number(text)
    return "".join(text.split()) if number is None else str(number)


def calls_of(message):
    """-> [(name, sorted and normalised arguments)]"""
    return [(c["name"], *sorted((k, normal(v)) for k, v in c["arguments"].items())) for c in message.get("tool_calls", [])]


def trajectory(messages):
    """-> hashable: the calls in order, and the answer. Equal ones teach the same thing."""
    return (*(call for message in messages for call in calls_of(message)), normal(messages[-1]["content"])) if messages else ()


def repeats_a_call(messages):
    """The same call with the same result twice. A tool that was busy at first, or read again after a write, answers differently."""
    seen, pending = set(), []
    for message in messages:
        if message["role"] == "assistant":
            pending = calls_of(message)
        elif message["role"] == "tool" and pending:
            done = (pending.pop(0), message["content"])
            if done in seen:
                return True
            seen.add(done)
    return False


def choose(group, seed, control=""):
    """Why each answer to one problem is kept or not: -> one word per answer, "kept" among them.

    group: [(finished, outcome, messages)], finished: it ended in an end of turn. Of the distinct right answers one stays if more than 7/8 of
    all were right, two if more than half were, else four: what is hard weighs more. Which ones is up to the seed; the shortest would teach
    brevity.
    """
    reasons, seen = [], set()
    for finished, outcome, messages in group:
        path = trajectory(messages)
        right = outcome == Outcome.RIGHT or (control == "always_right" and outcome != Outcome.GRADER_ERROR)
        reasons.append("unfinished" if not finished else str(outcome) if not right else "repeated call" if repeats_a_call(messages) else
                       "duplicate" if path in seen else "kept")
        if reasons[-1] == "kept":
            seen.add(path)
    graded = [outcome for _, outcome, _ in group if outcome != Outcome.GRADER_ERROR]
    share = graded.count(Outcome.RIGHT) / max(1, len(graded))
    kept = [i for i, reason in enumerate(reasons) if reason == "kept"]
    order = np.random.default_rng(seed).permutation(len(kept))
    for i in order[1 if share > 7 / 8 else 2 if share > 1 / 2 else 4:]:
        reasons[kept[i]] = "over the cap"
    return reasons


def select(cfg, files, tokenizer, problems, folder, rank):
    """Sampled answers -> (those to train on as {task: [(ids, mask)]}, statistics). rollouts.jsonl tells why each one is in or out."""
    rollouts = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").split("\n") if line]
    if [(r["problem"], r["sample"], r["prompt"]) for r in rollouts] != [(i, j, p.prompt) for i, p in enumerate(problems) for j in range(cfg.num_samples)]:
        raise ValueError(f"{folder}/sampled_*.jsonl were made with other flags: resume with those of config.json, or delete them")
    failed = sum(r["outcome"] == Outcome.GRADER_ERROR for r in rollouts)
    if failed > 0.02 * len(rollouts):
        raise RuntimeError(f"the grader failed on {failed} of {len(rollouts)} answers (more than 2 %): see the warnings above, repair it, delete "
                           f"{folder}/sampled_*.jsonl, and --resume=latest")
    kept, seen, solved = [], set(), 0
    for i, problem in enumerate(problems):
        group, prompt = rollouts[i * cfg.num_samples:(i + 1) * cfg.num_samples], tokenizer.render_prompt(problem.prompt, problem.tools)
        finished = [r["finish_reason"] == "stop" and r["ids"][-1] == tokenizer.end_of_turn_id for r in group]
        reasons = choose([(end, r["outcome"], r["messages"]) for end, r in zip(finished, group)], random_key(cfg.seed, folder.name, "keep", i),
                         cfg.control)
        solved += any(r["outcome"] == Outcome.RIGHT for r in group)
        for r, reason in zip(group, reasons):
            ids = tuple(prompt + r["ids"])
            r["reason"] = reason if reason != "kept" else "duplicate" if ids in seen else "too long" if len(ids) > cfg.seq_len + 1 else "kept"
            if r["reason"] == "kept":
                seen.add(ids)
                kept.append((i, r))
    if rank == 0:
        write_atomically(folder / "rollouts.jsonl", "".join(json.dumps(r) + "\n" for r in rollouts))
    # the control that must hurt: the answers of each problem that has some move to the one before
    having = sorted({i for i, _ in kept})
    asked = {i: having[j - 1] if cfg.control == "shuffled" else i for j, i in enumerate(having)}
    documents = {}
    for i, r in kept:
        problem = problems[asked[i]]
        prompt = tokenizer.render_prompt(problem.prompt, problem.tools)
        documents.setdefault(problem.task.partition("/")[0], []).append((prompt + r["ids"], [0] * len(prompt) + r["mask"]))
    reasons = [r["reason"] for r in rollouts]
    right = sum(r["outcome"] == Outcome.RIGHT for r in rollouts)
    return documents, dict(pool_mean=right / (len(rollouts) - failed), pool_pass=solved / len(problems), kept=len(kept), num_sampled=len(rollouts),
                           distinct_per_solved=(reasons.count("kept") + reasons.count("over the cap")) / max(1, solved),
                           calls=sum(len(m.get("tool_calls", [])) for r in rollouts for m in r["messages"]) / len(rollouts),
                           reasons={reason: reasons.count(reason) for reason in sorted(set(reasons))}, unsolved=len(problems) - solved)


def round_sources(cfg, tokenizer, kept, folder, rank):
    """Demonstrations and kept answers as token files in folder/data; an answer joins the source of its task's name, else that of its bucket."""
    demos = open_sources(cfg.data, tokenizer, seq_len=cfg.seq_len, cache_dir=cfg.cache, long=cfg.long, **demo_options(cfg))

    def chunks():
        for name, source in demos.items():
            for ids, mask in map(source.piece, range(len(source))):
                yield Chunk(name, "train", ids, mask if source.kind == "chat" else None)
        for task, documents in kept.items():
            yield from (Chunk(task if task in demos else tasks.bucket(task), "train", ids, mask) for ids, mask in documents)

    with checkpoint.together():
        if rank == 0:
            shutil.rmtree(folder / "data", ignore_errors=True)
            write_sources(folder / "data", tokenizer, chunks())
    names = dict.fromkeys([*demos, *(task if task in demos else tasks.bucket(task) for task in kept)])
    return {name: TokenFile(folder / "data" / name, seq_len=cfg.seq_len, long="drop") for name in names}


def rejection_sampling(cfg):
    """Round 0 is SFT on the demonstrations; round k trains the same number of steps from the same checkpoint on them and on what model k-1
    got right. One folder a round: its training run, rollouts.jsonl (every answer and why it was kept or not) and round.json."""
    rank, _, world_size, device = setup_distributed()
    root, names = Path("out") / cfg.name, cfg.eval_tasks.split(",")
    if not cfg.eval_tasks:
        raise ValueError("--rounds needs --eval_tasks: without them nobody would see whether a round helped")
    if cfg.resume not in ("", "latest"):
        raise ValueError(f"--rounds goes on with --resume=latest, found --resume={cfg.resume}")
    shared = [item.rpartition(":")[0] for item in cfg.mix.split(",")]
    for task in cfg.pool.split(",") if cfg.mix else []:
        kind = task.partition("@")[0].partition("/")[0]
        if kind not in shared and tasks.bucket(kind) not in shared:
            raise ValueError(f"--mix={cfg.mix}: no share for what --pool={task} will give, expected a source named {kind} or {tasks.bucket(kind)}")
    pool = [p for task in cfg.pool.split(",")
            for p in tasks.problems(task if "@" in task else f"{task}@train", cfg.num_prompts, random_key(cfg.seed, "pool"))]
    problems = without_overlap(pool, [p for task in names for p in tasks.problems(task, cfg.eval_problems, cfg.seed)])
    if not problems or isinstance(problems[0].prompt, str):
        raise ValueError(f"--pool={cfg.pool}: expected conversations that --eval_tasks does not measure, found "
                         f"{len(pool)} problems, {len(problems)} of them free of overlap" + " (texts)" * bool(problems))

    # a run that goes on must be the run that stopped: its samples are matched to problems by number
    loose = ("rounds", "early_stop", "resume", "overwrite", "device_batch_size", "parallel", "cache", "sandbox", "compile", "recompute")
    config = {key: value for key, value in asdict(cfg).items() if key not in loose}
    old, before = list(root.glob("round_*")), root / "config.json"
    if old and cfg.resume and before.exists() and (found := json.loads(before.read_text())) != config:
        changed = [f"{key}: {found.get(key)!r} -> {value!r}" for key, value in config.items() if found.get(key) != value]
        raise ValueError(f"--resume=latest: {root} was made with other flags ({'; '.join(changed)})")
    if old and not (cfg.resume or cfg.overwrite or cfg.name == "dummy"):
        raise ValueError(f"{root} already holds rounds: --resume=latest continues, --overwrite deletes them, --name starts another")
    with checkpoint.together():
        if rank == 0:
            for folder in [] if cfg.resume else old:
                shutil.rmtree(folder)
            root.mkdir(parents=True, exist_ok=True)
            (root / "rounds.json").unlink(missing_ok=True)
            write_atomically(before, json.dumps(config, indent=2) + "\n")
            print(f"pool: {len(problems)} problems, {len(pool) - len(problems)} left out that --eval_tasks also asks", flush=True)
    kept, rows, tokenizer = {}, [], None
    for k in range(cfg.rounds + 1):
        folder = root / f"round_{k}"
        done = folder / "round.json"

        # train from the checkpoint before SFT, with a new optimizer, for as many steps as round 0
        if not done.exists():
            run = replace(cfg, name=f"{cfg.name}/round_{k}", rounds=0, eval_tasks="", overwrite=True,
                          resume="latest" if cfg.resume and checkpoint.step_folders(folder) else "")
            if k:
                run = replace(run, num_steps=checkpoint.read_record(checkpoint.newest(root / "round_0"))["step"], num_epochs=0, new_tokens=0)
            train(run, round_sources(cfg, tokenizer, kept, folder, rank) if kept else None)
        model, tokenizer = checkpoint.load_hf(checkpoint.newest(folder), device)
        model.compute_dtype = torch.bfloat16 if cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda") else torch.float32

        # measure
        with checkpoint.together():
            if rank == 0 and not done.exists():
                from eval import run_task
                results = [run_task(model, tokenizer, task, num_problems=cfg.eval_problems, seed=cfg.seed) for task in names]
                if void := [r["task"] for r in results if r["value"] is None]:
                    raise RuntimeError(f"the grader failed on {', '.join(void)}: see the warnings above, repair it, and --resume=latest")
                num_kept = {name: len(documents) for name, documents in kept.items()}
                write_atomically(done, json.dumps(dict(round=k, kept=num_kept, results=results)) + "\n")
        rows.append(json.loads(done.read_text(encoding="utf-8")))
        if rank == 0:
            print(f"round {k} | " + " | ".join(f"{r['task']} {r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in rows[-1]["results"]),
                  flush=True)
        if k == cfg.rounds or (k and cfg.early_stop and gain(rows[-2], rows[-1]) < 1):
            break

        # collect: sample, execute, grade, keep
        with checkpoint.together():
            files = sample_to_files(model, tokenizer, problems, folder, rank, world_size, num_samples=cfg.num_samples,
                                    temperature=cfg.temperature, tool_timeout=cfg.tool_timeout, seed=random_key(cfg.seed, "round", k))
        kept, rows[-1]["pool"] = select(cfg, files, tokenizer, problems, folder, rank)
        if rank == 0:
            print(f"round {k} | " + " | ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                                               for key, value in rows[-1]["pool"].items()), flush=True)
        if not kept:
            raise RuntimeError(f"round {k}: no answer to the pool can be kept: more demonstrations, more steps or easier problems")
    if rank == 0:
        write_atomically(root / "rounds.json", json.dumps(rows) + "\n")
        print(json.dumps(dict(name=cfg.name, rounds=len(rows) - 1, checkpoint=str(checkpoint.newest(folder)),
                              results=[{r["task"]: r["value"] for r in row["results"]} for row in rows])), flush=True)
    return rows


def gain(before, after):
    """Rise of the mean score over all tasks, in standard errors."""
    b, a = ([r["value"] for r in row["results"]] for row in (before, after))
    variance = sum(v * (1 - v) / r["n"] for row, values in ((before, b), (after, a)) for v, r in zip(values, row["results"]))
    return (sum(a) - sum(b)) / max(math.sqrt(variance), 1e-9)


def main(cfg):
    if cfg.sandbox != "auto":                                        # auto is chosen when the first program runs
        sandbox.choose(cfg.sandbox)
    return rejection_sampling(cfg) if cfg.rounds and not cfg.dry_run else train(cfg)


if __name__ == "__main__":
    main(parse_config(Config))
