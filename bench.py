"""Speed beside peers, in one run: ratios are the result, since absolute times belong to one machine.

    python bench.py sft         training steps beside TRL's SFTTrainer: same checkpoint, token ids, order and optimizer settings
    python bench.py dpo         the same beside TRL's DPOTrainer, reference log-probabilities found before the first step by both
    python bench.py grpo        rollout, reward and update beside TRL's GRPOTrainer: same checkpoint, prompts, rewards and lengths of responses
    python bench.py ppo         the same beside the PPOTrainer of trl 1.12.0, the last that had it: pip install --no-deps
                                --target=out/peers/trl-1.12.0 trl==1.12.0 puts it where this group looks
    python bench.py recsys      a training epoch and a full-catalogue evaluation of SASRec beside plain PyTorch and RecBole 1.2.1, which
                                requirements-peers.txt says how to put where this group looks
    python bench.py iql         updates of train_iql.py --task=offline beside CORL's implicit Q-learning: same networks, weights and batch of 256;
                                requirements-peers.txt says where its one file goes
    python bench.py head        linear_logprob beside full logits, torch.compile, TRL's chunked kernel, Liger and CCE: times, memory, errors
    python bench.py gemm        matrix products with 16-bit and with fp32 results        these four are made for a GPU (bench_kernels.py) and
    python bench.py hstu        attention of HSTU, forward and backward, by length       run at small shapes without one
    python bench.py decode      attention over a cache, sampling, rollouts beside transformers
    python bench.py sandbox     a program in the box beside a bare interpreter that does nothing
    python bench.py             all groups

Methods run in separate processes with one thread each, in turn, round after round (A B C, A B C, ...), so that a machine whose speed drifts
drifts for all. No time is reported unless the methods compute the same: losses must agree first. A peer that is not installed is named and
left out. The last line is JSON.
"""
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import bench_kernels
import checkpoint
import engine
import ranking
import recommend
import rollouts
import train_asft
import train_dpo
import offline_agent
import train_iql
import train_rl
import train_sft
from common import parse_config, random_key, read_jsonl, write_atomically
from data import interactions, open_sources, rewards, sandbox, toy
from data.grading import Outcome
from data.packing import Loader, shuffled
from model import Recommender, Transformer, clip_grad_norm, config_for_size, make_optimizers
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    steps: int = 20                  # timed steps per process, after the warm-up
    warmup: int = 3                  # steps before
    rounds: int = 3                  # processes per method, interleaved
    size: str = "tiny"               # from-scratch size of the model that is trained
    out: str = ""                    # file for the JSON line; empty: print only


ON_GPU = torch.cuda.is_available()           # then both sides train there in bf16 with fp32 masters
SAME = 2e-2 if ON_GPU else 1e-5              # what first losses of equal computations may differ by, relative


def now():
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_mb(before=0.0):
    """The largest memory of this process so far, MiB, on the device that trains, less what it was before."""
    return (torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024) - before


def summarize(values):
    """-> median and quartiles of a list of numbers."""
    if len(values) < 2:
        return dict(p50=values[0], p25=values[0], p75=values[0])
    p25, p50, p75 = statistics.quantiles(values, n=4)
    return dict(p50=p50, p25=p25, p75=p75)


# -----------------------------------------------------------------------------
# sft: conversations of 1 to 8 exchanges, so that lengths are ragged; 8 a step

CHATS_PER_STEP, SEQ_LEN = 8, 1536
METHODS = ("temper padded", "temper packed", "trl padded")


def write_chats(path, num):
    tasks = [toy.conversations(task, seed=0, num=8 * num) for task in toy.CHAT_TASKS]
    with open(path, "w") as f:
        for i in range(num):
            exchanges = [next(tasks[(i + j) % len(tasks)])["messages"] for j in range(1 + i * 5 % 8)]
            f.write(json.dumps({"messages": sum(exchanges, []), "bucket": "chat"}) + "\n")


def sft_worker(method, folder, cfg):
    """Runs in a process of its own -> {"losses", "seconds", "tokens": real tokens of each step, "memory_mb"}."""
    before = memory_mb()
    num_steps = cfg.warmup + cfg.steps
    options = dict(init=f"{folder}/model", data=f"{folder}/chats.jsonl", seq_len=SEQ_LEN, cache=f"{folder}/cache", lr=1e-3, muon_lr=0.0,
                   warmup_steps=0, decay_share=0.0, num_steps=num_steps, eval_every=num_steps + 1, eval_rows=2, seed=0)
    if method == "temper padded":
        train_sft.main(train_sft.Config(pack=False, device_batch_size=CHATS_PER_STEP, total_batch_size=CHATS_PER_STEP * SEQ_LEN, **options))
    elif method == "temper packed":
        train_sft.main(train_sft.Config(device_batch_size=3, total_batch_size=3 * SEQ_LEN, **options))
    else:
        result = trl_steps(folder, num_steps)
    if method != "trl padded":
        lines = [line for line in read_jsonl("out/dummy/metrics.jsonl") if "train/loss" in line]
        result = dict(losses=[line["train/loss"] for line in lines], seconds=[line["time/step"] for line in lines],
                      tokens=[line["time/tokens_per_sec"] * line["time/step"] for line in lines])
    return result | dict(memory_mb=memory_mb(before))


def trl_steps(folder, num_steps):
    """TRL's own trainer on the documents that temper's loader draws, in that order. Only time between a step's begin and end counts, so that
    TRL's data loading is not held against it."""
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    sources = open_sources(f"{folder}/chats.jsonl", Tokenizer.from_file(f"{folder}/model"), seq_len=SEQ_LEN, cache_dir=f"{folder}/cache")
    rows = Loader(sources, None, seq_len=SEQ_LEN, seed=0, pack=False).next_rows(CHATS_PER_STEP * num_steps)
    source, = sources.values()
    documents = [source.piece(piece) for (_, piece), in rows]
    dataset = Dataset.from_list([dict(input_ids=ids.tolist(), labels=[int(i) if m else -100 for i, m in zip(ids, mask)])
                                 for ids, mask in documents])
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    args = SFTConfig(per_device_train_batch_size=CHATS_PER_STEP, max_length=None, **trl_settings(folder, num_steps))
    result = trl_train(SFTTrainer, model=model, args=args, train_dataset=dataset, processing_class=trl_tokenizer(folder))
    sizes = [len(ids) - 1 for ids, _ in documents]
    return result | dict(tokens=[sum(sizes[i:i + CHATS_PER_STEP]) for i in range(0, len(sizes), CHATS_PER_STEP)])


def trl_settings(folder, num_steps):
    return dict(output_dir=f"{folder}/trl", max_steps=num_steps, learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0,
                weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch", train_sampling_strategy="sequential",
                report_to="none", use_cpu=not ON_GPU, bf16=ON_GPU, fp16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
                logging_strategy="no", seed=0, data_seed=0)


def trl_tokenizer(folder):
    import transformers
    return transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/model/tokenizer.json", pad_token="<|endoftext|>",
                                                eos_token="<|im_end|>")


def trl_train(trainer, **options):
    """-> {"losses", "seconds"} of each step. options: of the trainer class."""
    import transformers
    losses, seconds = [], []

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = now()

        def on_step_end(self, *args, **kwargs):
            seconds.append(now() - self.start)

    class Recorder(trainer):
        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            losses.append((result[0] if isinstance(result, tuple) else result).detach())
            return result

    Recorder(callbacks=[Timer()], **options).train()
    return dict(losses=[x.item() for x in losses], seconds=seconds)


def bench_sft(cfg):
    return side_by_side("sft", cfg, lambda folder: write_chats(f"{folder}/chats.jsonl", 600))


def side_by_side(group, cfg, write_data):
    """temper padded, temper packed and TRL padded in turn, on one checkpoint and the data that write_data(folder) leaves -> their times."""
    methods = [m for m in METHODS if not m.startswith("trl") or importlib.util.find_spec("trl")]
    for missing in set(METHODS) - set(methods):
        print(f"{missing}: TRL is not installed (pip install -r requirements-peers.txt), left out")
    runs = {m: [] for m in methods}
    with tempfile.TemporaryDirectory() as folder:
        save_model(cfg, f"{folder}/model", 1)
        write_data(folder)
        for _ in range(cfg.rounds):
            for method in methods:
                runs[method].append(in_process(group, method, folder, cfg))

    first = {m: r[0] for m, r in runs.items()}
    rows, ours = {}, first["temper padded"]
    for m, rs in runs.items():
        seconds = [s for r in rs for s in r["seconds"][cfg.warmup:]]
        rate = [t / s for r in rs for t, s in zip(r["tokens"][cfg.warmup:], r["seconds"][cfg.warmup:])]
        rows[m] = dict(step_ms={k: v * 1e3 for k, v in summarize(seconds).items()}, tokens_per_sec=summarize(rate),
                       memory_mb=statistics.median(r["memory_mb"] for r in rs), first_loss=rs[0]["losses"][0])
        print(f"{m:>14}  step {rows[m]['step_ms']['p50']:7.1f} ms [{rows[m]['step_ms']['p25']:.1f}, {rows[m]['step_ms']['p75']:.1f}]  "
              f"{rows[m]['tokens_per_sec']['p50']:7.0f} tok/s  +{rows[m]['memory_mb']:.0f} MB  first loss {rows[m]['first_loss']:.6f}")
    result = dict(methods=rows)
    if "trl padded" in first:
        gaps = [abs(a - b) for a, b in zip(ours["losses"], first["trl padded"]["losses"])]
        result |= dict(step0_loss_gap=gaps[0], largest_loss_gap=max(gaps), steps_compared=len(gaps))
        print(f"loss, temper padded against trl padded: step 0 differs by {gaps[0]:.1e}, the largest of {len(gaps)} steps by {max(gaps):.1e}")
        if gaps[0] > SAME:
            raise AssertionError(f"the first losses differ by more than {SAME}: no time is reported for methods that compute different things")
        by_round = lambda a, b, key: [statistics.median(x) / statistics.median(y) for x, y in
                                      zip(*[[key(r) for r in runs[m]] for m in (a, b)])]
        step = by_round("temper padded", "trl padded", lambda r: r["seconds"][cfg.warmup:])
        rate = by_round("temper packed", "trl padded", lambda r: [t / s for t, s in zip(r["tokens"], r["seconds"])][cfg.warmup:])
        result |= dict(step_time_ratio=summarize(step), tokens_per_sec_ratio=summarize(rate))
        print(f"step time, temper padded / trl padded: {statistics.median(step):.3f} (rounds: {', '.join(f'{x:.3f}' for x in step)})")
        print(f"tokens per second, temper packed / trl padded: {statistics.median(rate):.2f} (rounds: {', '.join(f'{x:.2f}' for x in rate)})")
    return result


def save_model(cfg, path, seed):
    tokenizer = Tokenizer.bytes()
    model = Transformer(config_for_size(cfg.size, tokenizer.vocab_size)).init_weights(0)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():                                # residual outputs start at zero; let every weight matter from the first step
        p.data.add_(torch.randn(p.shape, generator=generator) * 0.02 if p.ndim == 2 else 0)
    checkpoint.save_hf(model, tokenizer, path)


def in_process(group, method, folder, cfg):
    """One method in a fresh process, working in `folder` so that nothing is left behind."""
    env = os.environ | dict(OMP_NUM_THREADS="1", WANDB_MODE="disabled", HF_HUB_OFFLINE="1", PYTHONPATH=str(Path(__file__).parent),
                            TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, __file__, "worker", group, method, folder, f"--steps={cfg.steps}", f"--warmup={cfg.warmup}"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method} failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# -----------------------------------------------------------------------------
# dpo: an answer against that to another request, after 0 to 3 earlier exchanges; 8 pairs a step. The reference is another model than the
# policy: else the first loss would be ln 2 whatever is computed

PAIRS_PER_STEP = 8


def write_pairs(folder, num, cfg):
    save_model(cfg, f"{folder}/reference", 2)
    tasks = [toy.conversations(task, seed=1, num=8 * num) for task in ("chat_en", "chat_ko", "code")]
    with open(f"{folder}/pairs.jsonl", "w") as f:
        for i in range(num):
            exchanges = [next(tasks[i % 3])["messages"] for _ in range(1 + i * 7 % 4)]
            other = next(tasks[i % 3])["messages"][-1:]
            f.write(json.dumps(dict(prompt=sum(exchanges, [])[:-1], chosen=exchanges[-1][-1:], rejected=other)) + "\n")


def dpo_worker(method, folder, cfg):
    before = memory_mb()
    num_steps = cfg.warmup + cfg.steps
    config = train_dpo.Config(init=f"{folder}/model", ref=f"{folder}/reference", pairs=f"{folder}/pairs.jsonl", method="sigmoid", beta=0.1,
                              lr=1e-3, pairs_per_step=PAIRS_PER_STEP, device_batch_size=PAIRS_PER_STEP, num_steps=num_steps, num_epochs=100,
                              warmup_steps=0, decay_share=0.0, val_fraction=0.0, eval_every=0, max_prompt_tokens=2048, max_new_tokens=1024,
                              pack=method == "temper packed")
    # TRL is given what temper trains on, in that order
    data, _, _ = train_dpo.read_pairs(config, Tokenizer.from_file(f"{folder}/model"))
    order = shuffled(np.arange(PAIRS_PER_STEP * num_steps), len(data.good) // 2, 0, "order").tolist()
    if method == "trl padded":
        result = trl_dpo(folder, num_steps, [data.sequences[2 * i:2 * i + 2] for i in order])
    else:
        train_dpo.main(config)
        lines = [line for line in read_jsonl("out/dummy/metrics.jsonl") if "train/loss" in line]
        result = dict(losses=[line["train/loss"] for line in lines], seconds=[line["time/step"] for line in lines])
    sizes = [len(ids) - 1 for i in order for ids, _ in data.sequences[2 * i:2 * i + 2]]
    per_step = 2 * PAIRS_PER_STEP
    return result | dict(tokens=[sum(sizes[i:i + per_step]) for i in range(0, len(sizes), per_step)],
                         memory_mb=memory_mb(before))


def trl_dpo(folder, num_steps, pairs):
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    records = []
    for chosen, rejected in pairs:
        start = int(chosen[1].argmax())
        records.append(dict(prompt_ids=chosen[0][:start].tolist(), chosen_ids=chosen[0][start:].tolist(),
                            rejected_ids=rejected[0][start:].tolist()))

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):             # ids, not text
            return dataset

    load = lambda name: transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.float32)
    args = DPOConfig(per_device_train_batch_size=PAIRS_PER_STEP, max_length=None, beta=0.1, loss_type="sigmoid", disable_dropout=True,
                     precompute_ref_log_probs=True, **trl_settings(folder, num_steps))
    return trl_train(Tokenized, model=load("model"), ref_model=load("reference"), args=args, train_dataset=Dataset.from_list(records),
                     processing_class=trl_tokenizer(folder))


def bench_dpo(cfg):
    return side_by_side("dpo", cfg, lambda folder: write_pairs(folder, PAIRS_PER_STEP * (cfg.warmup + cfg.steps), cfg))


# -----------------------------------------------------------------------------
# grpo, ppo: prompts of a toy task, responses of one forced length (no id ends one, in any method), a reward that is a function of the sample's
# number. Samplers differ, so in the warm-up TRL is handed the completions that temper sampled, after it sampled its own: losses, gradient norms
# and entropy must then agree. Every later step is each method's own. Prompts are read and logs written outside the timed step, by all

# prompts, samples of each (as many as the method takes by default), tokens of a response: once where overhead counts, once where arithmetic does
RL_SHAPES = {"grpo": ((1, 8, 32), (8, 8, 64)), "ppo": ((2, 4, 32), (16, 4, 64))}
RL_PEERS = {"grpo": "trl", "ppo": "trl-1.12"}
PPO_PEER = Path(__file__).parent / "out/peers/trl-1.12.0"
PPO_UPDATES, RL_LR, RL_TASK = 4, 1e-4, "math_en"


class Clock:
    """Seconds of each part of each step: [of the wall, of this process's CPU]. One thread that waits for nothing: they differ where the machine
    does something else meanwhile."""
    now = staticmethod(lambda: np.array([now(), time.process_time()]))

    def __init__(self):
        self.parts = {part: [] for part in ("step", "generate", "score", "update")}

    def begin(self):
        self.start = self.now()

    def generate(self, function, *args, **options):
        start = self.now()
        found = function(*args, **options)
        self.parts["generate"].append(self.now() - start)
        return found

    def scored(self):
        self.parts["score"].append(self.now() - self.start - self.parts["generate"][-1])

    def end(self):
        self.parts["step"].append(self.now() - self.start)
        self.parts["update"].append(self.parts["step"][-1] - self.parts["generate"][-1] - self.parts["score"][-1])

    def seconds(self):
        return {part: [x.tolist() for x in values] for part, values in self.parts.items()}


def rl_rewards(num, num_samples):
    """Of samples 0 to num - 1, group after group: better and worse ones in every group."""
    return [float((i // num_samples + i) % 3 == 0) - 0.25 * (i % 2) for i in range(num)]


def rl_temper(group, shape, folder, cfg):
    """train_rl.py as it is, but for the rewards and for what ends a response. Leaves its prompts and completions in samples.json."""
    (num_prompts, num_samples, num_tokens), clock, rounds = shape, Clock(), []
    num_steps, play, metrics = cfg.warmup + cfg.steps, train_rl.collect, train_rl.rollout_metrics

    def collect(*args):
        clock.begin()
        kept, at, groups = play(*args)
        rounds.append([(a.ids[:a.mask.index(1)], a.ids[a.mask.index(1):]) for g in groups for a in g])
        return kept, at, groups

    def order(indices, num, seed, what, *keys):                 # of minibatches: asked for when all but the update is done
        if what == "minibatch":
            clock.scored()
        return shuffled(indices, num, seed, what, *keys)

    def rollout_metrics(*args):                                 # the first thing that is no step any more
        clock.end()
        return metrics(*args)

    fixed = lambda samples: [rewards.Score(r, Outcome.RIGHT) for r in rl_rewards(len(samples), num_samples)]
    train_rl.open_rewards = lambda *args, **options: [{"fixed": (fixed, 1.0)}]
    train_rl.collect, train_rl.shuffled, train_rl.rollout_metrics = collect, order, rollout_metrics
    rollouts.generate = lambda *args, **options: clock.generate(engine.generate, *args, stop_ids=set(), **options)
    batch = num_prompts * num_samples
    config = train_rl.Config(init=f"{folder}/model", data=RL_TASK, num_prompts=64, eval_problems=0, eval_every=0, preflight=0, group_size=num_samples,
                             prompts_per_step=num_prompts, max_new_tokens=num_tokens, num_steps=num_steps, warmup_steps=0, lr=RL_LR,
                             device_batch_size=batch, log_rollouts=0, method="grpo_mean", clip_low=.2, clip_high=.28)
    if group == "ppo":
        config = replace(config, method="ppo", clip_high=.2, num_minibatches=PPO_UPDATES, critic_lr=RL_LR, critic_warmup=0, kl_coef=.05, lam=.95,
                         lam_value=.95, value_clip=.2, max_grad_norm=1e9)
    train_rl.main(config)
    Path(f"{folder}/samples.json").write_text(json.dumps(rounds))
    lines = [line for line in read_jsonl("out/dummy/metrics.jsonl") if "train/loss" in line]
    names = ["train/loss", "train/grad_norm", "train/entropy"] + ["critic/loss", "critic/grad_norm"] * (group == "ppo")
    return clock.seconds() | dict(computed={name: [line[name] for line in lines] for name in names})


def rl_worker(method, folder, cfg):
    """-> {"step", "generate", "score", "update": seconds of each step (Clock), "computed": {name: number of each step}, "memory_mb"}."""
    before = memory_mb()
    name, group, shape = method.split()
    shape = tuple(map(int, shape.split("x")))
    if name == "temper":
        result = rl_temper(group, shape, folder, cfg)
    else:
        result = (trl_ppo if group == "ppo" else trl_grpo)(shape, folder, cfg)
    return result | dict(memory_mb=memory_mb(before))


def trl_grpo(shape, folder, cfg):
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    (num_prompts, num_samples, num_tokens), clock = shape, Clock()
    num_steps, rounds = cfg.warmup + cfg.steps, json.loads(Path(f"{folder}/samples.json").read_text())
    computed = {key: [] for key in ("train/loss", "train/grad_norm", "train/entropy")}

    class Timed(GRPOTrainer):
        def _tokenize_prompts(self, prompts):                   # ids, not text
            return [rounds[int(p) // num_prompts][int(p) % num_prompts * num_samples][0] for p in prompts], None, {}

        def _generate_single_turn(self, *args, **options):
            ids, logps = clock.generate(super()._generate_single_turn, *args, **options)
            assert {len(x) for x in ids} == {num_tokens}, "a response ended early"
            step = len(clock.parts["step"])
            return [response for _, response in rounds[step]] if step < cfg.warmup else ids, logps

        def _generate_and_score_completions(self, *args):
            batch = super()._generate_and_score_completions(*args)
            clock.scored()
            return batch

        def compute_loss(self, *args, **options):
            loss = super().compute_loss(*args, **options)
            computed["train/loss"].append(loss.item())
            computed["train/entropy"].append(self._metrics["train"]["entropy"][-1])
            return loss

        def _clip_grad_norm(self, model):
            norm = super()._clip_grad_norm(model)
            computed["train/grad_norm"].append(norm.item())
            return norm

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *args, **options):
            clock.begin()

        def on_step_end(self, *args, **options):
            clock.end()

    args = GRPOConfig(per_device_train_batch_size=num_prompts * num_samples, num_generations=num_samples, steps_per_generation=1,
                      max_completion_length=num_tokens, temperature=1.0, top_p=1.0, top_k=0, beta=0.0, loss_type="dapo", scale_rewards="none",
                      epsilon=.2, epsilon_high=.28, num_iterations=1, use_vllm=False, mask_truncated_completions=False, shuffle_dataset=False,
                      **trl_settings(folder, num_steps) | dict(learning_rate=RL_LR))
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    trainer = Timed(model=model, args=args, train_dataset=Dataset.from_dict(dict(prompt=[str(i) for i in range(num_prompts * num_steps)])),
                    processing_class=trl_tokenizer(folder), callbacks=[Timer()],
                    reward_funcs=lambda completions, **_: rl_rewards(len(completions), num_samples))
    trainer.eos_token_ids = []
    trainer.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    trainer.train()
    return clock.seconds() | dict(computed=computed)


def trl_ppo(shape, folder, cfg):
    """TRL's PPOTrainer samples one response to each query, so queries are repeated. By design it differs from temper in two things: one optimizer
    takes the sum of both losses (two optimizers do the same where no gradient is clipped, and this trainer clips none), and the old policy's
    log-probabilities are the sampler's (temper finds them with a forward pass of the trainer, which its time includes)."""
    sys.path.insert(0, str(PPO_PEER))
    import transformers
    import trl.experimental.ppo.ppo_trainer as peer
    from datasets import Dataset
    (num_prompts, num_samples, num_tokens), clock = shape, Clock()
    batch, num_steps, rounds = num_prompts * num_samples, cfg.warmup + cfg.steps, json.loads(Path(f"{folder}/samples.json").read_text())
    tokenizer = trl_tokenizer(folder)
    tokenizer.add_special_tokens(dict(pad_token="<|padding|>"))             # an id beyond the model's: TRL takes all of that id for padding
    computed, norms = {}, {"train/grad_norm": [], "critic/grad_norm": []}
    generate, reward = peer.batch_generation, peer.get_reward

    def batch_generation(model, queries, size, pad, generation_config):
        clock.begin()
        ids, logits = clock.generate(generate, model, queries, size, pad, generation_config)
        assert ids.shape[1] == queries.shape[1] + num_tokens, "a response ended early"
        if len(clock.parts["step"]) < cfg.warmup:
            ids = torch.cat([queries, torch.tensor([response for _, response in rounds[len(clock.parts["step"])]])], 1)
            logits = peer.forward(model, ids, pad).logits[:, queries.shape[1] - 1:-1]
        return ids, logits

    def get_reward(model, ids, *args):
        return (None, torch.tensor(rl_rewards(len(ids), num_samples)), None) if model is trainer.reward_model else reward(model, ids, *args)

    def order(num):                                             # of minibatches, temper's; asked for when all but the update is done
        clock.scored()
        prompts = shuffled(np.arange(num_prompts), num_prompts, 0, "minibatch", len(clock.parts["step"]), 0)
        return (prompts[:, None] * num_samples + np.arange(num_samples)).ravel()

    class Quiet(peer.PPOTrainer):
        def log(self, metrics, *args):                          # after the last update of a step
            clock.end()
            found = {"train/loss": metrics["loss/policy_avg"], "critic/loss": metrics["loss/value_avg"],
                     "train/entropy": metrics["policy/entropy_avg"]}
            for name, value in (found | {name: statistics.mean(values) for name, values in norms.items() if values}).items():
                computed.setdefault(name, []).append(value)
            norms.update({name: [] for name in norms})

    def before_update(*args):
        if len(clock.parts["step"]) < cfg.warmup:               # this trainer computes no norm: the timed steps are without
            for name, module in (("train/grad_norm", model), ("critic/grad_norm", critic)):
                norms[name].append(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item())

    peer.batch_generation, peer.get_reward, np.random.permutation = batch_generation, get_reward, order
    model, ref = (transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32) for _ in range(2))
    critic = transformers.AutoModelForSequenceClassification.from_pretrained(f"{folder}/model", dtype=torch.float32, num_labels=1)
    critic.score = torch.nn.Linear(critic.config.hidden_size, 1)
    torch.nn.init.zeros_(critic.score.weight), torch.nn.init.zeros_(critic.score.bias)
    args = peer.PPOConfig(per_device_train_batch_size=batch, gradient_accumulation_steps=1, total_episodes=batch * num_steps, num_ppo_epochs=1,
                          num_mini_batches=PPO_UPDATES, response_length=num_tokens, temperature=1.0, kl_coef=.05, kl_estimator="k1", cliprange=.2,
                          vf_coef=1.0, cliprange_value=.2, gamma=1.0, lam=.95, local_rollout_forward_batch_size=batch, num_sample_generations=0,
                          **trl_settings(folder, num_steps) | dict(learning_rate=RL_LR))
    queries = Dataset.from_dict(dict(input_ids=[[0]] * batch))
    trainer = Quiet(args=args, processing_class=tokenizer, model=model, ref_model=ref, reward_model=torch.nn.Module(), value_model=critic,
                    train_dataset=queries, eval_dataset=queries)
    trainer.optimizer.optimizer.register_step_pre_hook(before_update)
    pad = lambda prompts: [[tokenizer.pad_token_id] * (max(map(len, prompts)) - len(p)) + p for p in prompts]
    trainer.dataloader = [dict(input_ids=torch.tensor(pad([prompt for prompt, _ in samples]))) for samples in rounds]
    trainer.train()
    return clock.seconds() | dict(computed=computed)


def bench_rl(group, cfg, missing):
    """temper and its peer in turn, for each shape -> their times. missing: why there is no peer, or nothing."""
    names = ["temper", RL_PEERS[group]] if not missing else ["temper"]
    if missing:
        print(f"{RL_PEERS[group]}: {missing}, left out")
    runs, result = {(shape, name): [] for shape in RL_SHAPES[group] for name in names}, {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(cfg, f"{folder}/model", 1)
        for _ in range(cfg.rounds):
            for shape, name in runs:
                runs[shape, name].append(in_process(group, f"{name} {group} {'x'.join(map(str, shape))}", folder, cfg))
    for shape in RL_SHAPES[group]:
        found, title = {name: runs[shape, name] for name in names}, "{} x {} x {} tokens".format(*shape)
        row = result[title] = {name: rl_times(rs, cfg) for name, rs in found.items()}
        print(title)
        ours, theirs = found["temper"], found.get(RL_PEERS[group], [])
        all_gaps = {}
        for key, values in ours[0]["computed"].items() if theirs else ():
            all_gaps[key] = gaps = [abs(a - b) / max(1.0, abs(a)) for a, b in zip(values[:cfg.warmup], theirs[0]["computed"][key])]
            print(f"{key}, on the same samples: {values[0]:.6f} and {theirs[0]['computed'][key][0]:.6f}, apart by {gaps[0]:.1e}; the largest of "
                  f"{len(gaps)} steps {max(gaps):.1e}")
        if any(gaps[0] > SAME for gaps in all_gaps.values()):
            raise AssertionError(f"the first steps differ by more than {SAME}: no time is reported for methods that compute different things")
        for name, times in row.items():
            print(f"{name:>10}  " + "  ".join(f"{part} {times[part]['p50']:.1f} ms [{times[part]['p25']:.1f}, {times[part]['p75']:.1f}]"
                                              for part in ("step", "generate", "score", "update"))
                  + f"  CPU {times['cpu']['p50']:.1f} ms  +{times['memory_mb']:.0f} MB")
        if missing:
            continue
        row["gaps"] = all_gaps
        for part, clock in (("step", 0), ("step", 1), ("generate", 1), ("update", 1)):
            median = lambda r: statistics.median(x[clock] for x in r[part][cfg.warmup:])
            ratios = [median(a) / median(b) for a, b in zip(ours, theirs)]
            row[f"{part}_{('time', 'cpu')[clock]}_ratio"] = summarize(ratios)
            print(f"{part}, {('time', 'CPU time')[clock]}, temper / {names[1]}: {statistics.median(ratios):.3f} "
                  f"(rounds: {', '.join(f'{x:.3f}' for x in ratios)})")
    return result


def rl_times(runs, cfg):
    """-> milliseconds of the wall of each part, and of CPU of the step, medians and quartiles over the timed steps of all rounds."""
    of = lambda part, clock: {k: v * 1e3 for k, v in summarize([x[clock] for r in runs for x in r[part][cfg.warmup:]]).items()}
    return {part: of(part, 0) for part in ("step", "generate", "score", "update")} | dict(
        cpu=of("step", 1), memory_mb=statistics.median(r["memory_mb"] for r in runs))


def bench_grpo(cfg):
    return bench_rl("grpo", cfg, "" if importlib.util.find_spec("trl") else "TRL is not installed (pip install -r requirements-peers.txt)")


def bench_ppo(cfg):
    there = (PPO_PEER / "trl").exists() and importlib.util.find_spec("transformers")
    return bench_rl("ppo", cfg, "" if there else "not installed (pip install -r requirements-peers.txt, then pip install --no-deps "
                    f"--target={PPO_PEER} trl==1.12.0)")


# -----------------------------------------------------------------------------
# recsys: SASRec in its published shape for MovieLens-1M (width 50, 2 blocks, 1 head) on a log with about that many users and items and a fifth of its
# events, so that no history is cut by any side and all sides have the same decisions. Loss: cross-entropy over the catalogue. A step is 64 users in
# temper and plain PyTorch, which read a history once for all of its decisions, and 2,048 decisions (as many, its default) in RecBole, which reads
# the history anew for each: so times are per trained decision, and an epoch is that times the epoch's decisions. Dropout is off in the warm-up, in
# which the losses from equal weights are compared, and on in the timed steps. Building a batch is part of a step, by all

REC_USERS, REC_ITEMS, REC_EVENTS, REC_LENGTH = 6040, 4000, (20, 51), 50     # a test history: at most 50 events
REC_BATCH, REC_LR, REC_EVALS = 64, 1e-3, 2
REC_METHODS = ("temper sasrec", "temper hstu", "torch sasrec", "recbole sasrec")
REC_PEER = Path(__file__).parent / "out/peers/recbole"


def write_log(path):
    """An .inter file, which temper and RecBole both read. The items of a user are drawn without replacement from softmax(popularity + taste): the
    largest of logits + Gumbel noise, in order. Times are multiples of 1,024 s, which fp32 (RecBole's times) holds."""
    rng = np.random.default_rng(0)
    taste, popularity = rng.normal(size=(8, REC_ITEMS)), 1.2 * rng.normal(size=REC_ITEMS)
    path.parent.mkdir()
    with open(path, "w") as f:
        f.write("user_id:token\titem_id:token\trating:float\ttimestamp:float\n")
        for user in range(REC_USERS):                           # one at a time: a worker's memory is counted from this process's peak
            logits = 0.7 * rng.normal(size=8) @ taste + popularity + rng.gumbel(size=REC_ITEMS)
            items = 1 + np.argsort(-logits)[:rng.integers(REC_EVENTS[0], REC_EVENTS[1] + 1)]
            times = 1024 * (1_500_000_000 // 1024 + rng.geometric(0.02, len(items)).cumsum())
            f.writelines(f"{user}\t{item}\t{1 + (user + item) % 5}\t{time}\n" for item, time in zip(items, times))


class PlainSASRec(torch.nn.Module):
    """SASRec as public PyTorch code has it: histories padded on the left to the longest allowed, nn.MultiheadAttention, all logits at once. The
    published dot product is a cosine over a temperature here, as in temper."""

    def __init__(self, c):
        super().__init__()
        D, p = c.hidden_size, c.dropout
        self.temperature, self.scale, self.dropout = c.temperature, D ** 0.5, torch.nn.Dropout(p)
        self.items, self.positions = torch.nn.Embedding(c.num_items + 1, D, padding_idx=0), torch.nn.Embedding(c.max_length + 1, D)
        each = lambda make: torch.nn.ModuleList(make() for _ in range(c.num_layers))
        self.attention_norms, self.norms = (each(lambda: torch.nn.LayerNorm(D, eps=1e-8)) for _ in range(2))
        self.attentions = each(lambda: torch.nn.MultiheadAttention(D, c.num_heads, dropout=p, batch_first=True))
        self.feeds = each(lambda: torch.nn.Sequential(torch.nn.Linear(D, c.intermediate_size), torch.nn.ReLU(), torch.nn.Dropout(p),
                                                      torch.nn.Linear(c.intermediate_size, D), torch.nn.Dropout(p)))

    @torch.no_grad()
    def copy_weights(self, model):
        self.items.weight.copy_(model.items.weight), self.positions.weight.copy_(model.positions)
        for i, theirs in enumerate(model.layers):
            self.attentions[i].in_proj_weight.copy_(torch.cat([theirs.q.weight, theirs.k.weight, theirs.v.weight]))
            self.attentions[i].in_proj_bias.copy_(torch.cat([theirs.q.bias, theirs.k.bias, theirs.v.bias]))
            pairs = (self.attentions[i].out_proj, theirs.o), (self.feeds[i][0], theirs.up), (self.feeds[i][3], theirs.down), \
                (self.attention_norms[i], theirs.attention_norm), (self.norms[i], theirs.norm)
            for own, their in pairs:
                own.weight.copy_(their.weight), own.bias.copy_(their.bias)
        return self

    def forward(self, ids):
        """ids (B, T), 0 to the left of a history -> (B, T, D)."""
        empty = ids == 0
        x = self.items(ids) * self.scale + self.positions((~empty).cumsum(1).sub(1).clamp(min=0))
        x = self.dropout(x) * ~empty[..., None]
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        for attention_norm, attention, norm, feed in zip(self.attention_norms, self.attentions, self.norms, self.feeds):
            q = attention_norm(x)
            x = norm(q + attention(q, x, x, attn_mask=later, key_padding_mask=empty, need_weights=False)[0])
            x = x + feed(x)
        return x

    def logits(self, hidden):
        return F.normalize(hidden, dim=-1, eps=1e-6) @ F.normalize(self.items.weight[1:], dim=-1, eps=1e-6).t() / self.temperature

    @torch.no_grad()
    def evaluate(self, histories, targets):
        """histories (n, T), targets (n,) -> {"hr@10", "ndcg@10"} over the whole catalogue but for the history."""
        self.eval()
        hits = []
        for ids, target in zip(histories.split(256), targets.split(256)):
            scores = self.logits(self(ids)[:, -1])
            user, place = ids.nonzero(as_tuple=True)
            scores[user, ids[user, place] - 1] = -torch.inf
            hits.append(scores.topk(10).indices + 1 == target[:, None])
        hits = torch.cat(hits).double()
        return {"hr@10": float(hits.sum(1).mean()), "ndcg@10": float((hits / torch.arange(2, 12).log2()).sum(1).mean())}


def rec_steps(model, optimizers, loss_of, cfg):
    """loss_of(i) -> (loss, number of decisions) of step i. -> {"losses", "decisions", "seconds": [wall, CPU] of each step}."""
    losses, decisions, seconds = [], [], []
    for i in range(cfg.warmup + cfg.steps):
        model.train(i >= cfg.warmup)
        start = Clock.now()
        loss, num = loss_of(i)
        loss.backward()
        clip_grad_norm(model, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append((Clock.now() - start).tolist())
        decisions.append(num)
    return dict(losses=losses, decisions=decisions, seconds=seconds)


def rec_evaluations(evaluate):
    """evaluate() -> metrics of the test targets. -> {"metrics", "evaluations": [wall, CPU] of each}."""
    seconds = []
    for _ in range(REC_EVALS):
        start = Clock.now()
        metrics = evaluate()
        seconds.append((Clock.now() - start).tolist())
    return dict(metrics={k: metrics[k] for k in ("hr@10", "ndcg@10")}, evaluations=seconds)


def rec_facts(lengths, targets, test_lengths, test_targets):
    """What all sides must agree on: of the training decisions and of the test targets the number, the events read before them, the sum of raw ids."""
    return [[len(a), int(sum(a)), int(sum(b))] for a, b in ((lengths, targets), (test_lengths, test_targets))]


def recsys_worker(method, folder, cfg):
    """-> what rec_steps and rec_evaluations say, "facts", "memory_mb", and "gaps" of what must be equal."""
    before = memory_mb()
    memory = lambda: dict(memory_mb=memory_mb(before))
    if method == "recbole sasrec":
        return recbole_sasrec(folder, cfg) | memory()
    name, backbone = method.split()
    run = train_asft.Config(data=f"csv:{folder}/log/log.inter", sep="tab", col_user="0", col_item="1", col_reward="2", col_time="3", header=1, judges=0,
                            size="ml-1m", backbone=backbone, max_length=REC_LENGTH, policy_users=REC_USERS, method="bc")
    world = train_asft.open_world(run)
    world.targets.pop("val")
    rows, test, cpu = world.rows, world.targets["test"], torch.device("cpu")
    raw = np.array([int(x) for x in world.catalogue.item_ids])
    events = np.concatenate([np.arange(first, end) for _, end, first in rows])
    lengths = events - np.repeat(rows[:, 0], rows[:, 1] - rows[:, 2])
    result = dict(items=len(raw), facts=rec_facts(lengths, raw[world.log.item[events] - 1],
                                                  test[:, 1] - 1 - test[:, 0], raw[world.log.item[test[:, 1] - 1] - 1]))
    chosen = lambda i: shuffled(np.arange(i * REC_BATCH, (i + 1) * REC_BATCH), len(rows), 0, "recsys")
    model = Recommender(train_asft.new_model(run, world)).init_weights(0)
    for head in (model.reward, model.value):                                # not trained here, nor by any peer
        head.requires_grad_(False)
    if name != "temper":
        return result | plain_sasrec(model, world, chosen, cfg, name == "compare") | memory()

    weights = torch.ones(len(world.reward))

    def loss_of(i):                                                         # as in train_asft.train, of --method=bc
        places = chosen(i)
        places = places[np.argsort(rows[places, 0] - rows[places, 1], kind="stable")]
        num = int((rows[places, 1] - rows[places, 2]).sum())
        batch = interactions.batch(world.log, world.reward, rows, places)
        hidden = model(*recommend.context(world, batch, cpu))
        f = train_asft.facts(run, world, batch, hidden, weights, None, None)
        return train_asft.post_loss(run, model, None, None, f, num, num)[0], num

    result |= rec_steps(model, make_optimizers(model, REC_LR, betas=(0.9, 0.98)), loss_of, cfg)
    result |= rec_evaluations(lambda: recommend.evaluate(model, world, None, cpu)["test"][0]) | memory()
    if method == "temper hstu":                                             # and what a run looks at: KL to BC and the reward model's value, exactly
        tables = recommend.tables_of(model, [], world, cpu)
        result["with_tables"] = rec_evaluations(lambda: recommend.evaluate(model, world, tables, cpu)["test"][0])["evaluations"]
    return result


def plain_sasrec(model, world, chosen, cfg, compare):
    """model: temper's, whose weights it starts from. compare: also its evaluation with temper's, before and after the steps."""
    log, test, peer = world.log, world.targets["test"], PlainSASRec(model.config).copy_weights(model)

    def padded(rows):                                                       # once, before the first step -> inputs and targets (R, T)
        table = np.zeros((len(rows), REC_LENGTH + 1), np.int64)
        for row, (start, end, _) in zip(table, rows):
            row[len(row) - (end - start):] = log.item[start:end]
        return torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, 1:] * (table[:, :-1] > 0))

    (inputs, targets), (histories, following) = padded(world.rows), padded(test)

    def loss_of(i):
        places = torch.from_numpy(chosen(i))
        target = targets[places]
        decides = target > 0
        logits = peer.logits(peer(inputs[places])[decides])
        return F.cross_entropy(logits, target[decides] - 1), len(logits)

    evaluate, gaps = lambda: peer.evaluate(histories, following[:, -1]), {}
    apart = lambda ours, theirs: max(abs(ours[key] - theirs[key]) for key in theirs)
    if compare:
        gaps["equal weights"] = apart(recommend.evaluate(model, world, None, torch.device("cpu"))["test"][0], evaluate())
    result = rec_steps(peer, [torch.optim.Adam(peer.parameters(), lr=REC_LR, betas=(0.9, 0.98))], loss_of, cfg)
    result |= rec_evaluations(evaluate)
    if compare:
        with torch.no_grad():
            scores = torch.cat([peer.logits(peer(ids)[:, -1]) for ids in histories.split(256)])
        seen = interactions.seen(log, test, np.arange(len(test)), len(scores[0]))
        gaps["equal scores"] = apart(ranking.ranking_metrics(ranking.ranks(scores, following[:, -1], seen)), result["metrics"])
    return result | dict(gaps=gaps)


def recbole_sasrec(folder, cfg):
    """RecBole's own dataset, loaders and trainer. Its SASRec is another one (norms after the residuals, a dot product, the padding among the
    classes), so losses are not comparable; its evaluation does not mask the history. numpy 2 lacks names that RecBole asks for."""
    sys.path.append(str(REC_PEER))                                          # behind the environment's own packages
    sys.argv = sys.argv[:1]                                                 # RecBole would read them
    for name, there in dict(float_=np.float64, complex_=np.complex128, object_=np.object_, unicode_=np.str_).items():
        setattr(np, name, there)
    np.bool, np.int, np.float, np.object, np.str, np.long = np.bool_, np.int_, np.float64, np.object_, np.str_, np.int_
    from recbole.config import Config as RecBoleConfig
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    torch.autograd.set_detect_anomaly(False)                                # importing one of its models, SINE, switches it on for all: half of a step
    width = dict(hidden_size=50, inner_size=50, n_layers=2, n_heads=1, hidden_act="relu", hidden_dropout_prob=0.2, attn_dropout_prob=0.2)
    config = RecBoleConfig(model="SASRec", dataset="log", config_dict=dict(
        data_path=folder, load_col=dict(inter=["user_id", "item_id", "timestamp"]), MAX_ITEM_LIST_LENGTH=REC_LENGTH, loss_type="CE", learner="adam",
        train_neg_sample_args=None, learning_rate=REC_LR, clip_grad_norm=dict(max_norm=1.0), train_batch_size=2048, metrics=["Hit", "NDCG"],
        topk=[10], valid_metric="NDCG@10", metric_decimal_place=9, use_gpu=False, show_progress=False, reproducibility=True, seed=0,
        eval_args=dict(split=dict(LS="valid_and_test"), order="TO", group_by="user", mode="full"), **width))
    train_data, _, test_data = data_preparation(config, create_dataset(config))
    torch.manual_seed(0)
    model = SASRec(config, train_data.dataset)
    trainer = Trainer(config, model)
    raw = lambda data: [int(x) for x in data.dataset.id2token("item_id", data.dataset.inter_feat["item_id"].numpy())]
    lengths = lambda data: data.dataset.inter_feat["item_length"].tolist()
    result = dict(items=model.n_items - 1, facts=rec_facts(lengths(train_data), raw(train_data), lengths(test_data), raw(test_data)))
    losses, decisions, marks = [], [], []

    class Steps:                                                            # a loader that ends early and looks at the clock
        def __iter__(self):
            batches = iter(train_data)
            for i in range(cfg.warmup + cfg.steps):
                model.train(i >= cfg.warmup)
                marks.append(Clock.now())
                yield next(batches)
            marks.append(Clock.now())

    def loss_of(interaction):
        loss = model.calculate_loss(interaction)
        losses.append(loss.item()), decisions.append(len(interaction))
        return loss

    trainer._train_epoch(Steps(), 0, loss_func=loss_of)
    result |= dict(losses=losses, decisions=decisions, seconds=[(b - a).tolist() for a, b in zip(marks, marks[1:])])

    def evaluate():
        found = trainer.evaluate(test_data, load_best_model=False)
        return {"hr@10": found["hit@10"], "ndcg@10": found["ndcg@10"]}

    result |= rec_evaluations(evaluate)
    with torch.no_grad():
        ranks = torch.cat([ranking.ranks(model.full_sort_predict(interaction)[:, 1:], positive, None) for interaction, _, _, positive in test_data])
    ours = ranking.ranking_metrics(ranks)
    return result | dict(gaps={"equal scores": max(abs(ours[key] - value) for key, value in result["metrics"].items())})


def bench_recsys(cfg):
    methods = [m for m in REC_METHODS if not m.startswith("recbole") or (REC_PEER / "recbole").exists()]
    if len(methods) < len(REC_METHODS):
        print("recbole sasrec: not installed (requirements-peers.txt says how), left out")
    runs = {m: [] for m in methods}
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder) / "log/log.inter")
        compared = in_process("recsys", "compare sasrec", folder, cfg)["gaps"]
        for _ in range(cfg.rounds):
            for method in methods:
                share = 5 if method.startswith("recbole") else 1         # its steps are alike, and take several times as long
                runs[method].append(in_process("recsys", method, folder, replace(cfg, steps=max(2, cfg.steps // share))))
    first = {m: r[0] for m, r in runs.items()}
    (num, _, _), (users, _, _) = first["temper sasrec"]["facts"]
    print(f"{users:,} users, {first['temper sasrec']['items']:,} items; {num:,} training decisions an epoch; evaluation: one target per user, all items")

    # what must agree
    for m, r in first.items():
        if r["facts"] != first["temper sasrec"]["facts"] or r["items"] != first["temper sasrec"]["items"]:
            raise AssertionError(f"{m} has other decisions or targets: {r['facts']}, {r['items']} items, against {first['temper sasrec']['facts']}, "
                                 f"{first['temper sasrec']['items']}")
        for what, gap in (compared if m == "torch sasrec" else r.get("gaps", {})).items():
            print(f"hr@10 and ndcg@10 of {what}, by temper and by {m.split()[0]}: apart by at most {gap:.1e}")
            if gap > (1e-6 if what == "equal scores" else 2 / users):       # equal weights: rounding may swap items around place 10 of two users
                raise AssertionError(f"{m}, {what}: apart by {gap}: no time is reported for methods that compute different things")
    gaps = [abs(a - b) for a, b in zip(first["temper sasrec"]["losses"][:cfg.warmup], first["torch sasrec"]["losses"])]
    print(f"loss, temper sasrec against torch sasrec from equal weights: step 0 differs by {gaps[0]:.1e}, the largest of {len(gaps)} by {max(gaps):.1e}")
    if gaps[0] > 1e-5:
        raise AssertionError("the first losses differ by more than 1e-5: no time is reported for methods that compute different things")
    for m, r in first.items():
        print(f"{m:>14}  loss {r['losses'][0]:.4f} -> {statistics.mean(r['losses'][-3:]):.4f} in {len(r['losses'])} steps")
        if not statistics.mean(r["losses"][-3:]) < r["losses"][0]:
            raise AssertionError(f"{m} does not learn")

    # per round: microseconds a decision, and seconds an evaluation
    decision = lambda r, clock: statistics.median(s[clock] / n for s, n in zip(r["seconds"][cfg.warmup:], r["decisions"][cfg.warmup:]))
    evaluation = lambda r, clock: statistics.median(s[clock] for s in r["evaluations"])
    rows, result = {}, dict(users=users, items=first["temper sasrec"]["items"], decisions=num, loss_gaps=gaps)
    for m, rs in runs.items():
        rows[m] = dict(memory_mb=statistics.median(r["memory_mb"] for r in rs))
        for clock, name in enumerate(("wall", "cpu")):
            rows[m][f"epoch_{name}_s"] = summarize([num * s[clock] / n for r in rs for s, n in zip(r["seconds"][cfg.warmup:], r["decisions"][cfg.warmup:])])
            rows[m][f"evaluation_{name}_s"] = summarize([s[clock] for r in rs for s in r["evaluations"]])
        if "with_tables" in rs[0]:
            rows[m]["evaluation_with_tables_wall_s"] = summarize([s[0] for r in rs for s in r["with_tables"]])
        epoch, look = rows[m]["epoch_wall_s"], rows[m]["evaluation_wall_s"]
        print(f"{m:>14}  epoch {epoch['p50']:6.1f} s [{epoch['p25']:.1f}, {epoch['p75']:.1f}], {epoch['p50'] / num * 1e6:5.0f} us a decision, CPU "
              f"{rows[m]['epoch_cpu_s']['p50']:.1f} s  evaluation {look['p50']:5.2f} s [{look['p25']:.2f}, {look['p75']:.2f}], "
              f"{look['p50'] / users * 1e6:4.0f} us a user, CPU {rows[m]['evaluation_cpu_s']['p50']:.2f} s  +{rows[m]['memory_mb']:.0f} MB")
    look = rows["temper hstu"]["evaluation_with_tables_wall_s"]
    print(f"   temper hstu  evaluation with exact KL and reward-model value of every user {look['p50']:.2f} s [{look['p25']:.2f}, {look['p75']:.2f}]")
    for peer in methods[2:]:
        ratios = {f"{what}_{name}_ratio": [of(a, clock) / of(b, clock) for a, b in zip(runs["temper sasrec"], runs[peer])]
                  for what, of in (("epoch", decision), ("evaluation", evaluation)) for clock, name in enumerate(("wall", "cpu"))}
        rows[peer] |= {name: summarize(values) for name, values in ratios.items()}
        for name, values in ratios.items():
            what, clock, _ = name.split("_")
            print(f"{what}, {clock} time, temper sasrec / {peer}: {statistics.median(values):.3f} (rounds: {', '.join(f'{x:.3f}' for x in values)})")
    return result | dict(methods=rows)


# -----------------------------------------------------------------------------
# iql: updates per second of implicit Q-learning with vector actions, in the sizes of HalfCheetah, on a log of random numbers: an update costs the same
# whatever is in it. Drawing a batch from the log is part of an update, by both. CORL's q loss is the mean of its two heads', ours their sum: the
# gradients differ by a factor that Adam divides out

IQL_OBS, IQL_ACTIONS, IQL_LOG, IQL_BATCH, IQL_UPDATES = 17, 6, 100_000, 256, 10             # IQL_UPDATES: for each of --steps and --warmup
IQL_METHODS = ("temper iql", "corl iql")
IQL_PEER = Path(__file__).parent / "out/peers/corl/iql.py"


def iql_log():
    """-> obs, actions, rewards, next_obs, terminal: float32 tensors of IQL_LOG rows."""
    g = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, IQL_LOG, IQL_OBS, generator=g)
    actions, terminal = torch.rand(IQL_LOG, IQL_ACTIONS, generator=g) * 2 - 1, (torch.rand(IQL_LOG, generator=g) < .01).float()
    return obs, actions, torch.randn(IQL_LOG, generator=g), next_obs, terminal


def corl_trainer(num_updates):
    """-> CORL's module and its trainer with its default settings. What it imports and is not installed, it does not use here: empty modules stand in."""
    for name in ("d4rl", "gym", "pyrallis", "wandb"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    gym, pyrallis = sys.modules.get("gym"), sys.modules.get("pyrallis")
    if gym is not None and not hasattr(gym, "Env"):                           # named in annotations, and as a decorator
        gym.Env = object
    if pyrallis is not None and not hasattr(pyrallis, "wrap"):
        pyrallis.wrap = lambda: lambda function: function
    spec = importlib.util.spec_from_file_location("corl_iql", IQL_PEER)
    corl = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corl)
    torch.manual_seed(0)
    q, v, actor = corl.TwinQ(IQL_OBS, IQL_ACTIONS), corl.ValueFunction(IQL_OBS), corl.GaussianPolicy(IQL_OBS, IQL_ACTIONS, 1.0)
    of = lambda module: torch.optim.Adam(module.parameters(), lr=3e-4)
    return corl, corl.ImplicitQLearning(1.0, actor, of(actor), q, of(q), v, of(v), max_steps=num_updates)


def iql_temper():
    """-> (cfg, agent, target, optimizer) with train_iql.py's default settings, which are CORL's."""
    agent = offline_agent.OfflineAgent(offline_agent.OfflineAgentConfig(0, IQL_OBS, 0, IQL_ACTIONS, 256, 2)).init_weights(0)
    target = offline_agent.MLP([IQL_OBS + IQL_ACTIONS, 256, 256, 1], 2).requires_grad_(False)
    target.load_state_dict(agent.q.state_dict())
    return train_iql.resolved(train_iql.Config(task="offline", batch_size=IQL_BATCH)), agent, target, train_iql.make_optimizer(agent, 3e-4)


@torch.no_grad()
def iql_copy(agent, target, trainer):
    """CORL's weights, which are (outputs, inputs) head by head, into temper's, which are (heads, inputs, outputs)."""
    pairs = [(agent.v, [trainer.vf.v]), (agent.q, [trainer.qf.q1, trainer.qf.q2]), (target, [trainer.q_target.q1, trainer.q_target.q2]),
             (agent.policy, [trainer.actor.net])]
    for mlp, nets in pairs:
        layers = [[m for m in net.net if isinstance(m, torch.nn.Linear)] for net in nets]
        for i, (w, b) in enumerate(zip(mlp.weights, mlp.biases)):
            w.copy_(torch.stack([head[i].weight.t() for head in layers])), b.copy_(torch.stack([head[i].bias[None] for head in layers]))
    agent.log_std.copy_(trainer.actor.log_std)


def iql_update(cfg, agent, target, optimizer, batch):
    """As in train_iql.train, of one micro-batch -> losses (3,) of V, policy and Q."""
    losses, _ = train_iql.losses_of(cfg, agent, agent, target, batch, cfg.batch_size)
    losses.sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    train_iql.update_target(target, agent.q, cfg.rho)
    return losses.detach()


def iql_worker(method, folder, cfg):
    """-> {"seconds": [wall, CPU] of each update, "losses": of the last, "memory_mb"}; compare iql: {"gaps": relative gap of each loss, by update}."""
    before = memory_mb()
    warmup, num_updates = IQL_UPDATES * cfg.warmup, IQL_UPDATES * (cfg.warmup + cfg.steps)
    name, log, seconds = method.split()[0], iql_log(), []
    if name != "temper":
        corl, trainer = corl_trainer(num_updates)
    if name == "compare":
        run, agent, target, optimizer = iql_temper()
        iql_copy(agent, target, trainer)
        gaps = []
        for i in range(5):
            index = torch.from_numpy(np.random.default_rng(i).integers(0, IQL_LOG, IQL_BATCH))
            obs, actions, rewards, next_obs, terminal = (x[index] for x in log)
            theirs = trainer.train([obs, actions, rewards[:, None], next_obs, terminal[:, None]])
            ours = iql_update(run, agent, target, optimizer, (obs, actions, rewards, next_obs, terminal)).tolist()
            gaps.append([abs(a / b - 1) for a, b in zip(ours, (theirs["value_loss"], theirs["actor_loss"], 2 * theirs["q_loss"]))])
        return dict(gaps=gaps)
    if name == "corl":
        buffer = corl.ReplayBuffer(IQL_OBS, IQL_ACTIONS, IQL_LOG)
        names = ("observations", "actions", "rewards", "next_observations", "terminals")
        printed, sys.stdout = sys.stdout, sys.stderr                          # it prints the size
        buffer.load_d4rl_dataset({key: x.numpy() for key, x in zip(names, log)})
        sys.stdout = printed
        np.random.seed(0)

        def update(i):
            return list(trainer.train([x.to("cpu") for x in buffer.sample(IQL_BATCH)]).values())
    else:
        run, agent, target, optimizer = iql_temper()

        def update(i):
            generator = torch.Generator().manual_seed(random_key(0, "batch", i))
            index = torch.randint(IQL_LOG, (IQL_BATCH,), generator=generator)
            return iql_update(run, agent, target, optimizer, [x[index] for x in log])
    for i in range(num_updates):
        start = Clock.now()
        losses = update(i)
        seconds.append((Clock.now() - start).tolist())
    return dict(seconds=seconds[warmup:], losses=[float(x) for x in losses], memory_mb=memory_mb(before))


def bench_iql(cfg):
    methods = [m for m in IQL_METHODS if not m.startswith("corl") or IQL_PEER.exists()]
    runs, result = {m: [] for m in methods}, dict(obs=IQL_OBS, actions=IQL_ACTIONS, batch=IQL_BATCH)
    with tempfile.TemporaryDirectory() as folder:
        if "corl iql" in methods:
            gaps = in_process("iql", "compare iql", folder, cfg)["gaps"]
            result |= dict(first_loss_gaps=gaps[0], largest_loss_gap=max(map(max, gaps)))
            print(f"losses from equal weights on one batch, relative: V {gaps[0][0]:.1e}, policy {gaps[0][1]:.1e}, Q {gaps[0][2]:.1e}; the largest of "
                  f"{len(gaps)} updates {max(map(max, gaps)):.1e}")
            if max(gaps[0]) > 1e-5:
                raise AssertionError("the first losses differ by more than 1e-5: no time is reported for methods that compute different things")
        else:
            print(f"corl iql: {IQL_PEER.relative_to(Path(__file__).parent)} is not there (requirements-peers.txt says where it comes from), left out")
        for _ in range(cfg.rounds):
            for method in methods:
                runs[method].append(in_process("iql", method, folder, cfg))
    rows, of = {}, lambda r, clock: statistics.median(s[clock] for s in r["seconds"])
    for m, rs in runs.items():
        rows[m] = dict(memory_mb=statistics.median(r["memory_mb"] for r in rs), losses=rs[0]["losses"])
        for clock, name in enumerate(("wall", "cpu")):
            rows[m][f"update_{name}_ms"] = summarize([1e3 * s[clock] for r in rs for s in r["seconds"]])
        wall, cpu = rows[m]["update_wall_ms"], rows[m]["update_cpu_ms"]
        print(f"{m:>15}  {1e3 / wall['p50']:6.1f} updates a second, {wall['p50']:6.2f} ms [{wall['p25']:.2f}, {wall['p75']:.2f}], CPU {cpu['p50']:.2f} ms "
              f"[{cpu['p25']:.2f}, {cpu['p75']:.2f}]  +{rows[m]['memory_mb']:.0f} MB")
    for m in methods if "corl iql" in methods else ():
        if m != "corl iql":
            for clock, name in enumerate(("wall", "cpu")):
                ratios = [of(theirs, clock) / of(ours, clock) for ours, theirs in zip(runs[m], runs["corl iql"])]
                rows[m][f"speedup_{name}"] = summarize(ratios)
                print(f"updates per second, {name} time, {m} / corl iql: {statistics.median(ratios):.2f} (rounds: {', '.join(f'{x:.2f}' for x in ratios)})")
    return result | dict(methods=rows)


# -----------------------------------------------------------------------------
# sandbox: what a box costs on top of the interpreter in it

def bench_sandbox(cfg):
    try:
        tier = sandbox.choose("auto")
    except sandbox.SandboxUnavailable as e:
        print(f"sandbox: left out, {e}")
        return {}
    bare = lambda *flags: lambda: subprocess.run([sandbox._python, *flags, "-c", "pass"], check=True)
    methods = {"python -I": bare("-I"), "python -I -S": bare("-I", "-S"), "run": lambda: sandbox.run("pass"),
               "evaluate": lambda: sandbox.evaluate("def f(x): return x", ["f(1)"])}
    times = {name: [] for name in methods}
    for i in range(cfg.warmup + 3 * cfg.steps):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            times[name] += [time.perf_counter() - start] if i >= cfg.warmup else []
    rows = {name: {k: v * 1e3 for k, v in summarize(t).items()} for name, t in times.items()}
    for name, row in rows.items():
        print(f"{name:>14}  {row['p50']:6.1f} ms [{row['p25']:.1f}, {row['p75']:.1f}]")
    # without -S the interpreter also reads its site-packages, which is slow where many packages are installed
    ratios = {f"{a} / {b}": summarize([x / y for x, y in zip(times[a], times[b])])
              for a in ("run", "evaluate") for b in ("python -I", "python -I -S")}
    for name, ratio in ratios.items():
        print(f"{name:>24}  {ratio['p50']:.2f} [{ratio['p25']:.2f}, {ratio['p75']:.2f}]")
    return dict(tier=tier, milliseconds=rows, ratio=ratios)


WORKERS = {"sft": sft_worker, "dpo": dpo_worker, "grpo": rl_worker, "ppo": rl_worker, "recsys": recsys_worker, "iql": iql_worker}
GROUPS = {"sft": bench_sft, "dpo": bench_dpo, "grpo": bench_grpo, "ppo": bench_ppo, "recsys": bench_recsys, "iql": bench_iql, "sandbox": bench_sandbox,
          **bench_kernels.GROUPS}


def main(cfg, groups):
    machine = dict(machine=platform.machine(), cpu_count=os.cpu_count(), torch=torch.__version__, python=platform.python_version(),
                   gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    results = {}
    for group in groups:
        print(f"== {group}", flush=True)
        results[group] = GROUPS[group](cfg)
    line = json.dumps(dict(machine, **results))
    if cfg.out:
        write_atomically(cfg.out, line + "\n")
    print(line)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(WORKERS[sys.argv[2]](sys.argv[3], sys.argv[4], parse_config(Config, sys.argv[5:]))))
    else:
        names = [a for a in sys.argv[1:] if not a.startswith("-")]
        unknown = [n for n in names if n not in GROUPS]
        if unknown:
            sys.exit(f"bench.py: unknown group {unknown[0]!r}; the groups are {', '.join(GROUPS)}")
        main(parse_config(Config, [a for a in sys.argv[1:] if a.startswith("-")]), names or list(GROUPS))
