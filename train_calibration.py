"""Calibration tuning: a checkpoint learns to say how likely its own answers are right, and is measured at it.

Answers are sampled from the frozen checkpoint and graded. Prompts are split in three: train, fit (rescaling and threshold) and test. Then

    ct            calibration-tuning (arXiv 2406.08391). A query after the answer asks whether it is right; on the logits of its two labels

                      loss = 1/N sum_i CE(softmax(z_no, z_yes), right_i) + jsd_coef / M sum_t JSD(p_theta || p_start)

                  the second sum over the M sampled tokens of the answers. --adapter=query: LoRA that is on for the query alone, so that answers
                  stay as they were, bit by bit; shared: one set of weights answers and judges itself, and the second term holds it where it was
    platt, temperature     train nothing: --source (query, verbal, logprob, vote) rescaled, p = sig(a logit(q) + b) with a = 1/T, b = 0 for the latter
    none          trains and rescales nothing

Whatever the method, one table compares every source, as it is and rescaled, on the test prompts and on sets of another kind (--ood): another
wording, another language, levels left out of training. report.md, calibration.png, calibration.json (beside the weights) for eval.py and chat.py.
Confidence in words is trained by train_rl.py --rewards=rlcr (arXiv 2507.16806), and measured here with --source=verbal.

    python train_calibration.py --init=out/quickstart/sft --data=math_en --ood=math_en@test_template,math_ko      laptop, minutes
    python train_calibration.py --init=<Hugging Face folder> --data=gsm8k --ood=gsm8k,math500                       one GPU; gsm8k is its training part,
                                                                          which a model may know by heart: --ood=gsm8k is the test part
    torchrun --nproc_per_node=8 train_calibration.py ...                                                            the same flags, eight GPUs
"""
import json
import math
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

import calibration
import checkpoint
import confidence
from common import (Logger, all_gather_list, all_reduce_sum, check_finite, format_seconds, parse_config, random_key, read_jsonl, setup_distributed,
                    write_atomically)
from data import sandbox, tasks
from data.grading import Outcome
from data.packing import micro_batches, sequence_batch, shuffled, token_offsets
from model import add_lora, clip_grad_norm, lora_off, lora_scaled, make_optimizers, memory_estimate, num_params, parallelize, set_gradient_sync
from rollouts import play, sample_to_files


@dataclass(frozen=True)
class Config:
    name: str = "dummy"              # results go to out/<name>; any name but dummy also opens wandb
    seed: int = 0                    # decides prompts, answers, splits and the order of training
    # model
    init: str = ""                   # checkpoint folder that answers: out/<name>, a step folder, or one of Hugging Face
    adapter: Literal["query", "shared"] = "query"       # trained weights act on the query alone, or on answers too
    lora_rank: int = 8               # of the adapter; 0, for shared alone: train all weights
    lora_alpha: float = 32.0         # LoRA's update is scaled by alpha / rank: higher learns faster
    # prompts
    data: str = "toy"                # comma-separated prompts: tasks of data/tasks.py or files, as in train_rl.py
    ood: str = ""                    # prompts that are only tested on, e.g. math_en@test_template,math_ko
    hold_out_levels: str = ""        # levels of difficulty that are only tested on, e.g. 4; of tasks that have levels
    num_prompts: int = 1000          # problems of each task that makes its own; files, gsm8k and mbpp give all they have
    num_ood: int = 250               # prompts of each --ood
    max_new_tokens: int = -1         # bound on an answer, tool results included; auto: the largest of the tasks' own, and room for a stated confidence
    graded: str = ""                 # folder of graded answers that another run left (out/<name>/graded), of these same weights, in place of the flags above
    fit_share: float = 0.1           # share of the prompts for rescaling and threshold
    test_share: float = 0.1          # share of the prompts to test on
    grader: str = ""                 # of rows in files: exact | gsm8k | math | ifeval | code | none; empty: by their data_source
    max_grader_error: float = 0.02   # share of the answers that may go without a grade
    # confidence
    method: Literal["ct", "platt", "temperature", "none"] = "ct"        # see above
    source: Literal["query", "verbal", "logprob", "vote"] = "query"     # what is rescaled and saved; ct trains the query
    query: str = confidence.QUERY    # what is asked after the answer; {no} and {yes} are the options of labels 0 and 1
    both_orders: bool = False        # ask with the options in either order and average: removes a liking for a label, costs twice
    with_logprob: bool = True        # state ct and the answer's log-probability together, weighed on the fit prompts; false: ct alone, rescaled by platt
    coverage: float = 0.8            # share of answers to give: the threshold, chosen on the fit prompts, abstains from the others
    # answers
    num_samples: int = 4             # answers to each prompt
    answer_temperature: float = 1.0  # of sampling
    # training
    num_steps: int = -1              # steps; auto: by num_epochs
    num_epochs: int = -1             # passes over the graded answers; auto: 1 from 20,000 on, 3 from 5,000 on, else 6
    batch_size: int = 32             # answers per step
    device_batch_size: int = 16      # rows per forward pass and device: lower when memory runs out, the result stays the same
    lr: float = -1.0                 # peak rate of AdamW; auto: 3e-3 below 20M parameters, 1e-4 for LoRA, 2e-6 for all weights
    weight_decay: float = 0.0        # on matrices
    warmup_steps: int = 10           # steps of linear warm-up; then down along a cosine
    max_grad_norm: float = 1.0       # global norm the gradient is clipped to
    jsd_coef: float = -1.0           # strength of the pull of answers to where they were; auto: 1 for shared, 0 for query
    shuffle_grades: bool = False     # control: grades that ct is trained on change answers; its row must end at a skill of 0
    # machine
    tool_timeout: float = 60.0       # seconds until a call is given up
    sandbox: Literal["auto", "namespaces", "landlock", "none_i_accept"] = "auto"        # the box in which written code runs
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"      # of the computation; weights are float32 always; auto: bfloat16 on CUDA
    # looking and keeping
    eval_every: int = 0              # steps between scores on the fit prompts, 0: only at the end
    num_resamples: int = 2000        # of the bootstrap over prompts
    save_every: int = 0              # steps between checkpoints; 0: only at the end
    resume: str = ""                 # latest, or a step folder: continue out/<name> exactly
    overwrite: bool = False          # delete the checkpoints of an earlier run of this name; its graded answers, too
    dry_run: bool = False            # print the resolved settings and the memory estimate, and stop


MAY_CHANGE = ("name", "device_batch_size", "sandbox", "max_grader_error", "eval_every", "num_resamples", "save_every", "resume", "overwrite",
              "dry_run")


# -----------------------------------------------------------------------------
# Losses: sums over a denominator that is given


def query_loss(z, right, count):
    """z (N,) fp32 z_yes - z_no, right (N,) 0 or 1 -> 1/count sum of the cross-entropy of softmax(z_no, z_yes) against right, in nats."""
    return F.softplus(torch.where(right > 0, -z, z)).sum() / count


def jsd(logits, ref_logits):
    """(N, V) fp32 each -> (N,) JSD = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats: 0 to ln 2, symmetric."""
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2


def jsd_loss(hidden, ref_hidden, weight, ref_weight, count, chunk=512):
    """hidden, ref_hidden (N, D), weight, ref_weight (V, D) -> 1/count sum of jsd. Logits of `chunk` rows at a time, made again for the gradient."""
    def part(h, r):
        return jsd(F.linear(h.float(), weight.float()), F.linear(r.float(), ref_weight.float())).sum()
    return sum(recompute(part, h, r, use_reentrant=False) for h, r in zip(hidden.split(chunk), ref_hidden.split(chunk))) / count


# -----------------------------------------------------------------------------
# Graded answers


class Graded(NamedTuple):
    """Columns of the graded answers to one set of prompts."""
    items: list             # confidence.Items
    right: list             # 0 or 1
    split: list             # train | fit | test

    def of(self, *splits):
        rows = [i for i, s in enumerate(self.split) if s in splits]
        return Graded(*([column[i] for i in rows] for column in self))


def split_of(seed, prompt, fit_share, test_share):
    """By a hash of the prompt alone: all answers to it, and the same prompt met again, are in one split."""
    x = random_key(seed, "split", prompt) / 2**63
    return "test" if x < test_share else "fit" if x < test_share + fit_share else "train"


def read_graded(folder, cfg, split):
    """-> Graded of all files below the folder. split: a name, or None: by prompt. Answers whose grader failed are left out and counted; ungradable is
    not right."""
    columns, outcomes, files = ([], [], []), Counter(), sorted(Path(folder).rglob("*.jsonl"))
    for file in files:
        for number, line in enumerate(read_jsonl(file), 1):
            if missing := [key for key in ("outcome", "prompt", "prompt_ids", "ids", "mask", "messages") if key not in line]:
                raise ValueError(f"{file}:{number}: no {missing[0]!r} in this graded answer")
            outcomes[line["outcome"]] += 1
            if line["outcome"] == Outcome.GRADER_ERROR:
                continue
            chat, key = isinstance(line["prompt"], list), json.dumps(line["prompt"])
            prompt = line["prompt_ids"]
            if sum(line["mask"]) == 0:
                raise ValueError(f"{file}:{number}: an answer without a sampled token")
            item = confidence.Item(prompt + line["ids"], [0] * len(prompt) + line["mask"], chat, confidence.last_words(line["messages"]), key)
            for column, value in zip(columns, (item, int(line["outcome"] == Outcome.RIGHT), split or split_of(cfg.seed, key, cfg.fit_share, cfg.test_share))):
                column.append(value)
    if outcomes[Outcome.GRADER_ERROR] > cfg.max_grader_error * sum(outcomes.values()):
        raise RuntimeError(f"{folder}: the grader failed on {outcomes[Outcome.GRADER_ERROR]} of {sum(outcomes.values())} answers "
                           f"(--max_grader_error={cfg.max_grader_error})")
    if not columns[0]:
        raise ValueError(f"{folder}: no graded answer")
    return Graded(*columns)


def check_overlap(graded):
    """What is only tested on must be in no split that something is fitted on."""
    fitted = {item.prompt for item in graded["in domain"].of("train", "fit").items}
    for name, g in graded.items():
        if name != "in domain" and (both := {item.prompt for item in g.items} & fitted):
            raise ValueError(f"{len(both)} prompts of {name} are among those that are trained on or fitted on: choose another --ood")


def check_classes(graded, training):
    for split in ("train", "fit", "test") if training else ("fit", "test"):
        right = graded.of(split).right
        if not 0 < sum(right) < len(right):
            raise ValueError(f"of the {len(right)} graded answers in split {split} {sum(right)} are right: right and wrong ones are needed. Choose other "
                             "prompts (--data, --num_prompts), or raise --answer_temperature")
    if training and len(graded.of("train").right) < 200:
        raise ValueError(f"{len(graded.of('train').right)} graded answers to train on, expected at least 200: raise --num_prompts or --num_samples")


def open_sets(cfg):
    """-> {set: problems}: "in domain", which is split by prompt, and those that are only tested on."""
    options = dict(seed=random_key(cfg.seed, "prompts"), grader=cfg.grader, val_fraction=0.0)
    _, sources, notes = tasks.open_prompts(cfg.data, num=cfg.num_prompts, num_val=0, **options)
    sets, held_out = {"in domain": []}, [int(level) for level in cfg.hold_out_levels.split(",") if level]
    for p in (p for s in sources for p in s.train):
        level = p.hidden.get("level")
        sets.setdefault(f"level {level}" if level in held_out else "in domain", []).append(p)
    if missing := [level for level in held_out if f"level {level}" not in sets]:
        raise ValueError(f"--hold_out_levels={cfg.hold_out_levels}: no problem of --data={cfg.data} has level {missing[0]}")
    for name in filter(None, cfg.ood.split(",")):
        sets[name] = tasks.open_prompts(name, num=cfg.num_ood, num_val=0, **options)[1][0].train[:cfg.num_ood] if Path(name).exists() else \
            tasks.problems(name, cfg.num_ood, random_key(cfg.seed, "ood"))
    return {name: problems[:cfg.num_ood] if name.startswith("level ") else problems for name, problems in sets.items()}, notes


def sample_graded(model, tokenizer, sets, cfg, folder, start, rank, world_size):
    """Answers to every problem of {set: problems}, graded, in folder/<set>/: 64 problems to a file, and a file that is there is not made again.
    record.json says which weights they are of."""
    room = max(tasks.max_new_tokens(p.task) for problems in sets.values() for p in problems) + tasks.STATED if cfg.max_new_tokens == -1 else cfg.max_new_tokens
    record = dict(weights=checkpoint.weights_hash(start), sets=list(sets), num_samples=cfg.num_samples, temperature=cfg.answer_temperature, seed=cfg.seed,
                  max_new_tokens=room, tool_timeout=cfg.tool_timeout,
                  prompts=random_key([[[p.prompt, p.task, p.answer] for p in problems] for problems in sets.values()]))
    with checkpoint.together():
        file = folder / "record.json"
        if rank == 0 and file.exists():
            found = checkpoint.read_json(file)
            if changed := [key for key in record if found.get(key) != record[key]]:
                raise ValueError(f"{file}: the answers there have other {', '.join(changed)} than this run asks for; give another --name, or --overwrite")
        elif rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(record) + "\n")
    with checkpoint.together():
        for name, problems in sets.items():
            for kind in ("chat", "text"):                            # conversations and plain texts are played apart
                part = folder / name.replace("/", "_") / kind
                part.mkdir(parents=True, exist_ok=True)
                sample_to_files(model, tokenizer, [p for p in problems if isinstance(p.prompt, list) == (kind == "chat")], part, rank, world_size,
                                num_samples=cfg.num_samples, temperature=cfg.answer_temperature, max_new_tokens=room, tool_timeout=cfg.tool_timeout,
                                seed=random_key(cfg.seed, "answers", name, kind))


def check_record(folder, start):
    """-> the record of a folder of graded answers. ValueError unless they are of the weights in `start`."""
    record = checkpoint.read_json(Path(folder) / "record.json")
    if record.get("weights") != checkpoint.weights_hash(start):
        raise ValueError(f"{folder}: these answers are of other weights than {start}: a model is calibrated on its own answers")
    if "in domain" not in record.get("sets", []):
        raise ValueError(f"{folder}/record.json: expected sets, among them \"in domain\", found {record.get('sets')}")
    return record


# -----------------------------------------------------------------------------
# Settings


def resolve(cfg, parameters, num_train):
    """-> cfg with every -1 chosen."""
    auto = lambda key, value: getattr(cfg, key) if getattr(cfg, key) != -1 else value
    epochs = auto("num_epochs", 1 if num_train >= 20_000 else 3 if num_train >= 5_000 else 6)
    lr = auto("lr", 3e-3 if parameters < 20e6 else 1e-4 if cfg.lora_rank else 2e-6)
    cfg = replace(cfg, num_epochs=epochs, lr=lr, jsd_coef=auto("jsd_coef", 1.0 if cfg.adapter == "shared" else 0.0),
                  num_steps=auto("num_steps", max(1, epochs * num_train // cfg.batch_size)) if cfg.method == "ct" else 0)
    for key, (low, high) in dict(lr=(1e-7, 1e-2), jsd_coef=(0, 10), fit_share=(.01, .5), test_share=(.01, .5), num_samples=(1, 64), batch_size=(1, 4096),
                                 coverage=(.01, 1), answer_temperature=(0, 2), lora_rank=(0, 256), num_resamples=(100, 10**6)).items():
        if not low <= getattr(cfg, key) <= high:
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected within [{low}, {high}]")
    if cfg.adapter == "query" and cfg.jsd_coef:
        raise ValueError(f"--jsd_coef={cfg.jsd_coef}: with --adapter=query answers cannot move; it is for --adapter=shared")
    if cfg.adapter == "query" and cfg.method == "ct" and not cfg.lora_rank:
        raise ValueError("--adapter=query needs --lora_rank above 0; --adapter=shared can train all weights")
    if cfg.method == "ct" and cfg.source != "query":
        raise ValueError(f"--source={cfg.source}: --method=ct trains the query")
    confidence.check_query(cfg.query)
    return cfg


# -----------------------------------------------------------------------------
# The table


def methods(sources):
    """-> {label: (its sources, fit([q of each], right) -> (slopes, offset))}: every source as it is and rescaled, and ct beside the log-probability, which
    knows where the sampler hesitated."""
    found = {}
    for source in sources:
        found[source] = (source,), lambda columns, right: ([1.0], 0.0)
        found[f"{source} + temperature"] = (source,), lambda columns, right: ([1 / calibration.fit_temperature(columns[0], right)], 0.0)
        found[f"{source} + platt"] = (source,), lambda columns, right: (lambda a, b: ([a], b))(*calibration.fit_platt(columns[0], right))
    if "ct" in sources:
        found["ct & logprob"] = ("ct", "logprob"), calibration.fit_together
    return found


def apply(fit, values):
    """fit: (sources, slopes, offset); values: {source: q of each item} -> p of each item."""
    parts, slopes, offset = fit
    return values[parts[0]] if (slopes, offset) == ([1.0], 0.0) else calibration.combine([values[part] for part in parts], slopes, offset)


COLUMNS = ("accuracy", "brier", "bss", "auroc", "aurc", "acc@80", "cov@95", "ece", "floor", "ace", "adherence", "mean_q")


def score(rows, graded, num_resamples, seed):
    """rows: {method: q of each item} -> {method: {metric: number, or a dict of value, low, high}, "floor": ..., "diagrams": ...}."""
    prompts = [item.prompt for item in graded.items]
    draws = calibration.bootstrap({name: (q, graded.right, prompts) for name, q in rows.items()}, num_resamples, seed, ("brier", "bss", "auroc", "ece"))
    out = {}
    for name, q in rows.items():
        t = calibration.tally(q, graded.right)
        floor = calibration.noise_floor(t)
        out[name] = calibration.metrics(t) | {key: calibration.interval(values) for key, values in draws[name].items()}
        out[name] |= dict(floor=floor["mean"], floor_p95=floor["p95"], diagrams=calibration.diagrams(t))
    return out, draws


def cell(value):
    if value is None or isinstance(value, float | int):
        return "-" if value is None else f"{value:.3f}"
    return cell(value["value"]) + (f" [{value['low']:.3f}, {value['high']:.3f}]" if value["low"] is not None else "")


def table(scores):
    """{method: metrics} of one set -> markdown."""
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cell(found[key]) for key in COLUMNS) + " |" for name, found in scores.items()])


# -----------------------------------------------------------------------------


def train(cfg):
    rank, _, world_size, device = setup_distributed()
    out_dir = Path("out") / cfg.name
    if not cfg.init:
        raise ValueError("--init is empty: name the checkpoint whose answers are to be calibrated")
    resume, start = checkpoint.find(out_dir, cfg.resume), checkpoint.newest(cfg.init)
    if start.resolve().is_relative_to(out_dir.resolve()):
        raise ValueError(f"--init={cfg.init}: a run of --name={cfg.name} would delete its own start; give another --name")

    # model
    model, tokenizer = checkpoint.load_hf(start, device)
    bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
    model.compute_dtype = torch.bfloat16 if bfloat16 else torch.float32
    parameters, labels = num_params(model), confidence.label_ids(tokenizer)
    if cfg.dry_run:
        cfg = resolve(cfg, parameters, round(cfg.num_prompts * cfg.num_samples * (1 - cfg.fit_share - cfg.test_share)))
        memory = memory_estimate(model.config, cfg.device_batch_size, 1024, compute_bytes=2 if bfloat16 else 4)
        settings = dict(parameters=parameters, device=str(device), ranks=world_size, memory_estimate_mb={k: round(v / 2**20) for k, v in memory.items()})
        for key, value in (asdict(cfg) | settings).items() if rank == 0 else ():
            print(f"{key:>20}  {value}", flush=True)
        return settings

    # graded answers of the model as it is
    resolve(cfg, parameters, 1000)                                    # a flag that is wrong should not be found after an hour of sampling
    if cfg.graded and (cfg.ood or cfg.hold_out_levels):
        raise ValueError(f"--graded={cfg.graded} has the sets that it has: --ood and --hold_out_levels are for answers yet to be sampled")
    folder = Path(cfg.graded) if cfg.graded else out_dir / "graded"
    if rank == 0 and not cfg.resume:
        checkpoint.clear(out_dir, cfg.overwrite or cfg.name == "dummy")
        if not cfg.graded and (cfg.overwrite or cfg.name == "dummy"):
            shutil.rmtree(folder, ignore_errors=True)
    if not cfg.graded:
        sets, notes = open_sets(cfg)
        for note in notes if rank == 0 else ():
            print(f"note: {note}", flush=True)
        sample_graded(model, tokenizer, sets, cfg, folder, start, rank, world_size)
    record = check_record(folder, start)
    cfg = replace(cfg, num_samples=record.get("num_samples", cfg.num_samples), answer_temperature=record.get("temperature", cfg.answer_temperature))
    graded = {name: read_graded(folder / name.replace("/", "_"), cfg, None if name == "in domain" else "test") for name in record["sets"]}
    check_overlap(graded)
    check_classes(graded["in domain"], cfg.method == "ct")
    todo = graded["in domain"].of("train")
    cfg = resolve(cfg, parameters, len(todo.items))
    if rank == 0:
        for name, g in graded.items():
            print(f"{name}: {len(g.items)} graded answers to {len({item.prompt for item in g.items})} prompts, {np.mean(g.right):.3f} right"
                  + (f" ({', '.join(f'{split} {g.split.count(split)}' for split in ('train', 'fit', 'test'))})" if name == "in domain" else ""), flush=True)
    right = torch.tensor(todo.right)
    if cfg.shuffle_grades:
        right = right[torch.from_numpy(shuffled(np.arange(len(right)), len(right), cfg.seed, "shuffle grades"))]

    # weights that are trained, and those that answers are held to
    ct = cfg.method == "ct"
    shared, ref = ct and cfg.adapter == "shared", model
    if shared and not cfg.lora_rank:
        ref, _ = checkpoint.load_hf(start, device)
        ref.compute_dtype = model.compute_dtype
        ref.requires_grad_(False)
        if resume:
            model, _ = checkpoint.load_hf(resume, device)
            model.compute_dtype = ref.compute_dtype
    elif ct:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, seed=random_key(cfg.seed, "lora"))
        if resume:
            checkpoint.restore_lora(resume, model)
    else:
        model.requires_grad_(False)
    wrapped = parallelize(model, "ddp", device, world_size) if ct else model
    optimizers, first_step = make_optimizers(model, cfg.lr, 0.0, cfg.weight_decay) if ct else [], 0
    if resume:
        state = checkpoint.restore(resume, model, optimizers, rank, world_size)
        if changed := [f"{key} was {state['config'].get(key)}, found {value}" for key, value in asdict(cfg).items()
                       if key not in MAY_CHANGE and state["config"].get(key) != value]:
            raise ValueError(f"--resume={cfg.resume}: {'; '.join(changed)}; resume with the settings of the saved run")
        first_step = state["step"]
    logger, started = Logger(cfg, rank, first_step if resume else None), time.monotonic()

    # what training reads: one sequence for each answer, whose last token is a label; with --adapter=shared the answer's own tokens too
    swapped = torch.tensor([bool(cfg.both_orders and random_key(cfg.seed, "order", i) % 2) for i in range(len(todo.items))])
    sequences = [confidence.query_sequence(tokenizer, item, cfg.query, swap, with_answer=shared) for item, swap in zip(todo.items, swapped.tolist())]
    offsets = token_offsets(sequences)
    is_label = torch.zeros(int(offsets[-1]), dtype=torch.bool)
    is_label[offsets[1:] - 1] = True
    fit = graded["in domain"].of("fit")
    query = lambda g: spread(lambda items: confidence.by_query(model, tokenizer, items, cfg.query, cfg.both_orders, cfg.device_batch_size), g.items, rank,
                             world_size)

    for step in range(first_step, cfg.num_steps + 1):
        last_step = step == cfg.num_steps

        # once in a while: scores on the fit prompts; the test prompts are for the end
        if ct and (last_step or (cfg.eval_every and step % cfg.eval_every == 0)) and (step > first_step or not resume):
            found = calibration.metrics(calibration.tally(query(fit), fit.right), ("brier", "auroc", "ece"))
            logger.log(step, **{f"val/{key}": value for key, value in found.items()})
            logger.print(f"step {step:5d}/{cfg.num_steps} | " + " | ".join(f"{key} {value:.3f}" for key, value in found.items()))

        if last_step or (cfg.save_every and step > first_step and step % cfg.save_every == 0):
            with lora_scaled(model, 0.0 if cfg.adapter == "query" else None):             # exported are the weights that answer
                saved = checkpoint.save(out_dir, step, model, tokenizer, optimizers, state=dict(step=step, config=asdict(cfg)), config=asdict(cfg), rank=rank,
                                        world_size=world_size)
        if last_step:
            break

        # collect: the answers of a step depend on the seed only, each rank takes its part
        t0 = time.perf_counter()
        which = shuffled(np.arange(step * cfg.batch_size, (step + 1) * cfg.batch_size), len(sequences), cfg.seed, "order")[rank::world_size].tolist()
        cuts = [[which[i] for i in cut] for cut in micro_batches([len(sequences[i][0]) for i in which], cfg.device_batch_size)] or [[]]
        num_tokens = max(1, all_reduce_sum(sum(int(offsets[i + 1] - offsets[i]) - 1 for i in which)))
        done = max(0, step - cfg.warmup_steps) / max(1, cfg.num_steps - cfg.warmup_steps)
        scale = min(1.0, (step + 1) / (cfg.warmup_steps + 1)) * (1 + math.cos(math.pi * done)) / 2
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for n, cut in enumerate(cuts):
            b = sequence_batch(sequences, cut, offsets).to(device)
            set_gradient_sync(wrapped, n == len(cuts) - 1)
            hidden = wrapped(b.ids, b.positions, b.doc_ids).flatten(0, 1)[b.rows]
            at, owner = is_label[b.tokens.cpu()].to(device), b.sequences.cpu()
            owner = owner[at.cpu()]
            z = confidence.query_logits(hidden[at], model.lm_head.weight, labels, swapped[owner].to(device))
            ce = query_loss(z, right[owner].to(device), cfg.batch_size)
            loss, divergence = ce, torch.zeros((), device=device)
            if cfg.jsd_coef:
                with torch.no_grad(), lora_off(ref):
                    ref_hidden = ref(b.ids, b.positions, b.doc_ids).flatten(0, 1)[b.rows][~at]
                divergence = jsd_loss(hidden[~at], ref_hidden, model.lm_head.weight, ref.lm_head.weight, num_tokens)
                loss = ce + cfg.jsd_coef * divergence
            (loss * world_size).backward()                                                    # DDP averages, we want the sum
            sums += torch.stack([loss.detach(), ce.detach(), divergence.detach()]).double()

        # update
        grad_norm = clip_grad_norm(model, cfg.max_grad_norm).item()
        check_finite("train/grad_norm", grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # log
        sums, seconds = all_reduce_sum(sums).tolist(), time.perf_counter() - t0
        metrics = {"train/loss": sums[0], "train/ce": sums[1], "train/grad_norm": grad_norm, "train/lr": cfg.lr * scale, "time/step": seconds}
        logger.log(step + 1, **metrics, **({"train/jsd": sums[2]} if cfg.jsd_coef else {}))
        left = (time.monotonic() - started) / (step + 1 - first_step) * (cfg.num_steps - step - 1)
        if (step + 1) % 10 == 0 or step == first_step:
            logger.print(f"step {step + 1:5d}/{cfg.num_steps} | loss {sums[0]:.3f} | grad_norm {grad_norm:.2f} | {seconds:.1f} s | {format_seconds(left)} left")

    # every source of confidence, as it is and rescaled by what the fit prompts say, on all that is tested on
    def of_start(function):
        def q_of(g):
            with lora_off(ref):
                return spread(function, g.items, rank, world_size)
        return q_of
    sources = {"query": of_start(lambda items: confidence.by_query(ref, tokenizer, items, cfg.query, cfg.both_orders, cfg.device_batch_size)),
               "logprob": of_start(lambda items: confidence.by_logprob(ref, items, cfg.answer_temperature, cfg.device_batch_size))}
    if cfg.num_samples > 1:
        sources["vote"] = lambda g: confidence.by_vote(g.items)
    if any(q is not None for q in confidence.by_words(fit.items)):
        sources["verbal"] = lambda g: confidence.by_words(g.items)
    if ct:
        sources["ct"] = query
    if cfg.source not in sources:
        raise ValueError(f"--source={cfg.source}: " + ("a vote needs --num_samples above 1" if cfg.source == "vote" else "no answer states a confidence; "
                         "train_rl.py --rewards=rlcr teaches it to"))
    base_rate = sum(fit.right) / len(fit.right)
    tested = {name: g.of("test") for name, g in graded.items()}
    rows, refused, fits = {name: {"constant": [base_rate] * len(g.items)} for name, g in tested.items()}, [], {}
    on_fit, on_test = ({source: of(q_of) for source, q_of in sources.items()} for of in (lambda q_of: q_of(fit), lambda q_of: {
        name: q_of(g) for name, g in tested.items()}))
    for label, (parts, fit_them) in methods(sources).items():
        try:
            fits[label] = parts, *fit_them([on_fit[part] for part in parts], fit.right)
        except ValueError as error:
            refused.append(f"{label}: {error}")
            continue
        for name in tested:
            rows[name][label] = apply(fits[label], {part: on_test[part][name] for part in parts})

    # what the checkpoint will state from now on, and from where on it abstains: the first of these that could be fitted
    source = "ct" if ct else cfg.source
    wanted = ["ct & logprob"] * (ct and cfg.with_logprob) + ["ct + platt"] * ct + [f"{source} + {cfg.method}", source]
    final = next(label for label in wanted if label in fits)
    parts, slopes, offset = fits[final]
    stated = apply(fits[final], on_fit)
    threshold = float(np.quantile([-1.0 if q is None else q for q in stated], 1 - cfg.coverage, method="higher"))
    refusal = next((line for line in refused if not ct and line.startswith(f"{source} + {cfg.method}: ")), "")
    own = ct and cfg.adapter == "query"
    known = confidence.Confidence(dict(zip((part.replace("ct", "query") for part in parts), slopes)), offset, max(0.0, threshold), cfg.query, cfg.both_orders,
                                  cfg.lora_rank * own, cfg.lora_alpha * own, cfg.answer_temperature or 1.0)
    moved = accuracy_moved(model, ref, tokenizer, sets["in domain"], cfg, rank, world_size) if shared and not cfg.graded else None
    summary = dict(name=cfg.name, checkpoint=str(saved), steps=cfg.num_steps, seconds=round(time.monotonic() - started, 1), method=final)
    if rank == 0:
        if not refusal:
            known.save(saved)
        lines, results = [f"# How far the confidence of {cfg.init} can be trusted\n", f"Rescaled on {len(fit.items)} answers of the fit prompts, "
                          f"{base_rate:.3f} of them right; intervals: 95 %, bootstrap over prompts, {cfg.num_resamples} resamples. Brier and its skill (bss) "
                          "and auroc rank; an ece below the noise floor's 95th percentile cannot be told from calibrated.\n"], {}
        for name, g in tested.items():
            found, draws = score(rows[name], g, cfg.num_resamples, cfg.seed)
            given = calibration.abstention(rows[name][final], g.right, known.threshold)
            results[name] = dict(num_answers=len(g.items), scores=found, abstention=given)
            length = np.mean([sum(item.mask) for item in g.items])
            lines.append(f"## {name}: {len(g.items)} answers, {length:.1f} sampled tokens each\n\n{table(found)}\n")
            for other in ("logprob + temperature", "logprob + platt", "query + temperature", "query + platt"):
                if other in found and other != final:
                    gains = {key: calibration.interval(draws[final][key] - draws[other][key]) for key in ("brier", "auroc")}
                    lines.append(f"{final} minus {other}: " + ", ".join(f"{key} {cell(gain)}" for key, gain in gains.items()) + "\n")
                    results[name].setdefault("gains", {})[other] = gains
            lines.append(f"{final}: ece {cell(found[final]['ece'])}, noise floor up to {cell(found[final]['floor_p95'])}. Below {known.threshold:.3f} it "
                         f"abstains: {given['coverage']:.3f} of the answers are given, {cell(given['error'])} of them wrong, where of all "
                         f"{given['error_of_all']:.3f} are.\n")
        lines += [f"- no {line}" for line in refused]
        if shared and not moved:
            lines.append("\nWhether answers got worse was not looked at: --graded brings no prompts to ask again.")
        if moved:
            summary["accuracy_moved"] = moved
            lines.append(f"\nGreedy accuracy on {moved['n']} test prompts moved by {moved['by']:+.3f} (standard error {moved['error']:.3f}): "
                         + ("FAILED, answers changed; raise --jsd_coef" if moved["by"] < -moved["error"] else "answers are as good as they were"))
        write_atomically(out_dir / "report.md", "\n".join(lines) + "\n")
        write_atomically(out_dir / "results.json", json.dumps(results) + "\n")
        shown = [label for label in (cfg.source, "logprob + temperature", source, final) if label in fits]        # more could not be told apart
        for name in tested:
            file = out_dir / ("calibration.png" if name == "in domain" else f"calibration_{name.replace('/', '_').replace('@', '_').replace(' ', '_')}.png")
            calibration.picture({label: results[name]["scores"][label]["diagrams"] for label in dict.fromkeys(shown)}, file)
            logger.picture(cfg.num_steps, f"calibration/{name}", file)
            best = results[name]["scores"][final]
            best = {key: best[key]["value"] if isinstance(best[key], dict) else best[key] for key in COLUMNS}
            logger.log(cfg.num_steps, **{f"test/{key}_{name}": best[key] for key in ("brier", "bss", "auroc", "ece", "accuracy")})
            summary[name] = best | results[name]["abstention"]
        print("\n".join(lines), flush=True)
    if refusal:
        raise ValueError(f"--method={cfg.method}: {refusal}. The table is in {out_dir}/report.md; there is no calibration.json")
    logger.close(**summary)
    return summary


def spread(function, items, rank, world_size):
    """function: items -> a list of numbers, each rank's part. -> those of all items."""
    mine = list(range(len(items)))[rank::world_size]
    found = all_gather_list(zip(mine, function([items[i] for i in mine])))
    return [value for _, value in sorted(found)]


def accuracy_moved(model, ref, tokenizer, problems, cfg, rank, world_size):
    """Greedy answers to the test prompts before and after -> {n, by: change of the share right, error: its standard error, paired}."""
    chat = [p for p in problems if isinstance(p.prompt, list) and split_of(cfg.seed, json.dumps(p.prompt), cfg.fit_share, cfg.test_share) == "test"]
    mine, right = chat[rank::world_size], []
    with lora_off(ref):
        right.append([group[0].outcome == Outcome.RIGHT for group in play(ref, tokenizer, mine)])
    right.append([group[0].outcome == Outcome.RIGHT for group in play(model, tokenizer, mine)])
    change = np.array([int(b) - int(a) for a, b in all_gather_list(zip(*right))])
    return dict(n=len(change), by=float(change.mean()), error=float(change.std() / math.sqrt(len(change)))) if len(change) else None


def main(cfg):
    if cfg.sandbox != "auto":                                        # auto is chosen when the first program runs
        sandbox.choose(cfg.sandbox)
    return train(cfg)


if __name__ == "__main__":
    main(parse_config(Config))
