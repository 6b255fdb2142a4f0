import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import checkpoint
import sessions
from common import (Logger, all_reduce_sum, check_finite, format_seconds, lr_scale, parse_config, progress, random_key, setup_distributed,
                    write_atomically)
from data import slate
from data.embeddings import check_same, load_embeddings
from model import clip_grad_norm, make_optimizers, num_params, parallelize, set_gradient_sync
from sessions import agent_policy
from slate_agent import Deployment, SlateAgentConfig, load_agent, new_agent, rectangles
from tokenizer import Tokenizer
from user_model import load_user_model
from train_iql import QUANTILES, expectile_loss, q_loss, td_target, update_target


@dataclass(frozen=True)
class Config:
    name: str = "dummy"              # results go to out/<name>; any name but dummy also opens wandb
    seed: int = 0                    # decides generated data, weights and order
    task: Literal["slate", "offline"] = "slate"         # slate: an agent that shows slates to people; offline: plain IQL on a log of steps
    # model
    init: str = ""                   # checkpoint folder, or out/<name>, whose networks to start from
    # slate: who the people are
    data: str = ""                   # session files with weights, as real.jsonl:1,sim.jsonl:1; empty: sessions simulated with --simulator
    embeddings: str = ""             # .npz files that --data's images and prompts are in: where rewards are a user model's. Or clip:FOLDER: texts are embedded by it
    simulator: str = "world"         # world, or the folder of a user model: who sessions are simulated with, labels rewards, and selects (A)
    evaluate: str = "world"          # crowds of the evaluation, comma-separated: world (W), and folders of user models (B); none: only the simulator
    world_seed: int = -1             # of the hidden world's words and types; auto: --seed
    world_types: int = 4             # types in it (ours)
    novelty: float = 0.4             # what a quick win pays in it, once; 0: nothing to be tempted by (ours)
    deviation: float = 0.2           # of persons of it from their type (ours)
    # slate: sessions
    sim_sessions: int = 3000         # sessions that are simulated (ours; PASTA had 30,000)
    behavior: str = "random:.5,myopic:.3,noisy:.2"      # who shows slates in them, with shares (ours)
    horizon: int = 5                 # turns (PASTA)
    slate_size: int = 4              # columns (PASTA)
    images_per_prompt: int = 4       # images of a column (PASTA)
    max_per_category: int = 1        # columns of one category; 0: any number (PASTA, secondary)
    candidates_per_category: int = 5 # of 5 categories (PASTA, secondary)
    generator: str = "template"      # template; checkpoint:PATH; url:BASE, an OpenAI-compatible server (ours)
    generator_tries: int = 3         # times that a generator is asked before templates fill in (ours)
    critique: float = 0.1            # share of turns at which a simulated person says what it wishes (ours)
    reward_at: Literal["chosen", "mean", "best"] = "chosen"     # reward of a simulated turn: utility of the picked column, of all, of the best (ours)
    reward_source: Literal["given", "model"] = "given"  # of --data: its reward field, or what --simulator's user model says of the pick (ours)
    # slate: the agent
    encoder: Literal["pooled", "text"] = "pooled"       # a token for each prompt, or the session written out (ours)
    hidden_size: int = 64            # of encoder=pooled (ours)
    num_layers: int = 2              # of encoder=pooled (ours)
    share_trunk: bool = True         # v and f read one trunk (ours)
    turn_number: bool = True         # the state knows the turn; without it a horizon cannot be seen
    slate_value: Literal["mean", "choice"] = "mean"     # q of a slate: mean of its items (PASTA, secondary), or weighted by a learned choice (SlateQ, 1905.12767)
    # slate: the algorithm
    method: str = "iql,myopic,bc"    # iql | myopic (gamma 0) | bc | oracle (iql, told the types of people, one for each crowd); each in turn, all; offline: iql | bc
    expectile: float = 0.7           # of V over the log's slates: .5 their mean, towards 1 their maximum (IQL)
    gamma: float = 1.0               # discount; 1: the sum over the turns is what counts (ours; IQL .99)
    rho: float = 0.02                # share of Q that the target takes over in a step (ours; IQL .005)
    cql_alpha: float = 0.0           # weight of logsumexp of f over all candidates less its mean over the slate (2006.04779)
    reward_scale: Literal["std", "none"] = "std"        # rewards over their deviation in the training data (ours)
    # length of the run and optimization
    num_steps: int = 1500            # updates of each method
    batch_size: int = 51             # sessions per update: 255 turns (ours)
    device_batch_size: int = 256     # of these per forward pass and device: lower when memory runs out, the result stays the same
    lr: float = 2e-3                 # peak rate of AdamW (ours)
    weight_decay: float = 0.01       # on matrices (ours)
    warmup_steps: int = 30           # steps of linear warm-up
    decay_share: float = 0.5         # the last share goes linearly to rate 0
    max_grad_norm: float = 1.0       # global norm the gradient is clipped to
    # looking and keeping
    eval_people: int = 500           # held-out persons of the evaluation in each crowd
    val_people: int = 200            # persons of --simulator on whom the step that stays is selected
    val_share: float = 0.1           # share of users held out, on whose turns the Bellman error is looked at
    log_every: int = 50              # updates between lines of metrics
    eval_every: int = 250            # updates between evaluations; 0: only at the end
    save_every: int = 0              # updates between checkpoints; 0: only at the end
    resume: str = ""                 # latest, or a step folder: continue out/<name> exactly
    overwrite: bool = False          # delete the checkpoints of an earlier run of this name
    dry_run: bool = False            # print the resolved settings and the memory estimate, and stop


MAY_CHANGE = ("name", "log_every", "save_every", "resume", "overwrite", "dry_run")


# -----------------------------------------------------------------------------
# Slates


def slate_q(f, value, choice_logits=None):
    """f (H, .., L) of the items of a slate -> (H, ..): their mean, or their mean under softmax(choice_logits (.., L)), which has no gradient."""
    if value == "mean":
        return f.mean(-1)
    return (choice_logits.detach().softmax(-1) * f).sum(-1)


def bc_loss(scores, slate_, valid, num):
    """- sum over turns of the mean over a slate's items of log softmax(scores)[item] / num. scores (B, T, C), -inf where there is no candidate; slate (B, T, L);
    valid (B, T)."""
    return -(scores.log_softmax(-1).gather(-1, slate_).mean(-1) * valid).sum() / num


def choice_loss(logits, picked, valid, num):
    """Cross-entropy of the picks: logits (B, T, L), picked (B, T)."""
    return -(logits.log_softmax(-1).gather(-1, picked[..., None])[..., 0] * valid).sum() / num


def cql_penalty(f, f_slate, present, valid, num):
    """sum over heads and turns of logsumexp over candidates of f less its mean over the slate, / num (2006.04779, eq. 4). f (H, B, T, C), f_slate (H, B, T, L)."""
    return ((f.masked_fill(~present, -torch.inf).logsumexp(-1) - f_slate.mean(-1)) * valid).sum() / num


def slate_losses(cfg, method, forward, target, s, scale, num):
    """Sessions of a micro-batch -> ({loss: ()}, {statistic: sum / num}). num: turns of the global batch; scale: what rewards are divided by."""
    valid, present = s.valid.float(), s.categories >= 0
    if method == "bc":
        f = forward(s.batch, s.candidates, s.categories)[1]
        return dict(bc_loss=bc_loss(f.mean(0).masked_fill(~present & s.valid[..., None], -torch.inf), s.slate, valid, num)), {}
    rows, categories = s.candidates.gather(2, s.slate), s.categories.gather(2, s.slate)
    if cfg.cql_alpha:
        v, f_all = forward(s.batch, s.candidates, s.categories)
        f = f_all.gather(3, s.slate.expand(len(f_all), -1, -1, -1))
    else:
        v, f = forward(s.batch, rows, categories)
    with torch.no_grad():
        f_target = target(s.batch, rows, categories)[1]
    logits = None
    if cfg.slate_value == "choice":                                  # the last head is the choice model
        logits, f, f_target = f[-1], f[:-1], f_target[:-1]
    qs = slate_q(f, cfg.slate_value, logits)[:, s.valid]             # (H, N)
    target_q = slate_q(f_target, cfg.slate_value, logits)[:, s.valid].amin(0)
    v_now, v_next = v[:, :-1][s.valid], v[:, 1:][s.valid]
    u = target_q - v_now
    y = td_target(s.reward[s.valid] / scale, s.terminal[s.valid], v_next, 0.0 if method == "myopic" else cfg.gamma)
    losses = dict(v_loss=expectile_loss(u, cfg.expectile, num), q_loss=q_loss(qs, y, num))
    if logits is not None:
        losses["choice_loss"] = choice_loss(logits, s.batch.picked, valid, num)
    if cfg.cql_alpha:
        penalty = cql_penalty(f_all[:len(f)], f, present | ~s.valid[..., None], valid, num)
        losses["cql_loss"] = cfg.cql_alpha * penalty
    return losses, dict(v=v_now.detach().sum() / num, q=target_q.sum() / num, below=(u.detach() < 0).sum() / num)


@torch.no_grad()
def slate_stats(cfg, method, agent, target, s, scale):
    """-> {name: float} over held-out or training sessions: quantiles of q, v and u, share of u < 0, mean squared Bellman error, and f of candidates that were not
    shown less f of those that were."""
    v, f = agent(s.batch, s.candidates, s.categories)
    f_target = target(s.batch, s.candidates, s.categories)[1]
    take = lambda x: x.gather(3, s.slate.expand(len(x), -1, -1, -1))
    logits = take(f)[-1] if cfg.slate_value == "choice" else None
    heads = slice(0, len(f) - (logits is not None))
    q = slate_q(take(f_target)[heads], cfg.slate_value, logits)[:, s.valid].amin(0)
    own = slate_q(take(f)[heads], cfg.slate_value, logits)[:, s.valid]
    v_now, v_next = v[:, :-1][s.valid], v[:, 1:][s.valid]
    y = td_target(s.reward[s.valid] / scale, s.terminal[s.valid], v_next, 0.0 if method == "myopic" else cfg.gamma)
    shown = torch.zeros_like(s.categories, dtype=torch.bool).scatter_(2, s.slate, True)
    unseen = ~shown & (s.categories >= 0) & s.valid[..., None]
    mean_f = f[heads].mean(0)
    found = dict(below=float((q < v_now).double().mean()), bellman=float((own - y).square().double().mean()),
                 unseen_less_shown=float(mean_f[unseen].mean() - mean_f[shown & s.valid[..., None]].mean()))
    for name, x in (("q", q), ("v", v_now), ("u", q - v_now)):
        values = torch.quantile(x.double(), torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        found |= {f"{name}_p{round(100 * share):02d}": value for share, value in zip(QUANTILES, values)}
    return found


# -----------------------------------------------------------------------------
# The run


class Crowds(NamedTuple):
    """Who sessions are simulated and evaluated with. make(name, n, seed) -> a crowd."""
    world: slate.World | None
    models: dict                # name -> UserModel
    embed: object               # texts -> (N, d)

    def make(self, name, n, seed):
        if name == "world":
            return sessions.WorldCrowd(self.world, n, seed)
        return sessions.ModelCrowd(self.models[name], n, seed, self.embed, name=name)


def open_crowds(cfg):
    """-> Crowds. ValueError: a user model of other embeddings than the ones at hand, the hidden world where texts are CLIP's."""
    names = list(dict.fromkeys([cfg.simulator, *(n for n in cfg.evaluate.split(",") if n and n != "none")]))
    world = slate.World(cfg.seed if cfg.world_seed < 0 else cfg.world_seed, num_types=cfg.world_types, novelty=cfg.novelty, deviation=cfg.deviation)
    embed, encoder = world.embed, "world"
    if cfg.embeddings.startswith("clip:"):
        from data.clip import load_clip
        clip, tokenizer = load_clip(cfg.embeddings.removeprefix("clip:"))
        encoder = clip.name

        def embed(texts):
            with torch.no_grad():
                parts = [clip.text_features(tokenizer.encode(list(texts[i:i + 256]))) for i in range(0, len(texts), 256)]
            return torch.nn.functional.normalize(torch.cat(parts), dim=-1).numpy()
        if "world" in names:
            raise ValueError("--embeddings=clip: the hidden world has embeddings of its own; name user models in --simulator and --evaluate")
    models = {}
    for name in names:
        if name != "world":
            models[name], origin = load_user_model(checkpoint.newest(name))
            models[name].eval().requires_grad_(False)
            if origin.embeddings != encoder:
                raise ValueError(f"{name}: fitted to embeddings of {origin.embeddings}, here texts are embedded by {encoder}")
    return Crowds(world, models, embed)


def settings_of(cfg, propose):
    return dict(horizon=cfg.horizon, slate_size=cfg.slate_size, images_per_prompt=cfg.images_per_prompt, max_per_category=cfg.max_per_category, propose=propose,
                reward_at=cfg.reward_at)


def starts_of(cfg, n, seed):
    return slate.start_prompts(n, seed)


def open_sessions(cfg, crowds, propose, name, rank):
    """-> (Log, (N,) rewards, (S,) weights of sampling, (S,) types or None). name: of a crowd that simulates; "": --data."""
    if not name:
        logs, weights, rewards = [], [], []
        for part in cfg.data.split(","):
            path, _, weight = part.rpartition(":") if ":" in part else (part, "", "1")
            log = slate.read(path, cfg.slate_size, cfg.max_per_category == 1)
            reward = log.reward
            if cfg.reward_source == "model" or np.isnan(reward).any():
                if cfg.reward_source == "given":
                    raise ValueError(f"{path}: {int(np.isnan(reward).sum()):,} turns have no reward; --reward_source=model lets --simulator's user model say it")
                if cfg.simulator == "world":
                    raise ValueError("--reward_source=model: --simulator must be the folder of a user model, the hidden world tells nobody")
                given = ~np.isnan(reward)
                reward = np.where(given, reward, sessions.label_rewards(crowds.models[cfg.simulator], log, open_embeddings(cfg.embeddings)))
            logs.append(log), rewards.append(reward), weights.append(np.full(len(log.user), float(weight) / len(log.user)))
        return slate.joined(logs), np.concatenate(rewards), np.concatenate(weights), None
    seed = random_key(cfg.seed, "simulated", name) % 2**31
    crowd = crowds.make(name, cfg.sim_sessions, seed)
    found = sessions.simulate(crowd, starts_of(cfg, cfg.sim_sessions, seed)[0], sessions.behavior_policy(sessions.parse_behavior(cfg.behavior)), seed=seed,
                              critique=cfg.critique, source=f"sim:{crowd.name.replace('/', '_')}", **settings_of(cfg, propose))
    return found.log, found.log.reward, np.ones(cfg.sim_sessions), found.kind


def open_embeddings(paths):
    files = [load_embeddings(path) for path in paths.split(",") if path]
    if not files:
        raise ValueError("--embeddings is empty: expected the .npz files of the prompts and images that --data names")
    for other in files[1:]:
        check_same(files[0], other)
    return [i for f in files for i in f.ids], np.concatenate([f.emb for f in files])


class Stage(NamedTuple):
    label: str                  # iql, myopic, bc, oracle_<crowd>; its weights go to out/<name>/<label>
    method: str
    crowd: str                  # who its sessions are simulated with; "": what the other methods have


def stages_of(cfg, crowds):
    methods = cfg.method.split(",")
    known = ("iql", "myopic", "bc", "oracle")
    if methods == ["all"]:
        methods = list(known)
    for method in methods:
        if method not in known:
            raise ValueError(f"--method={method}: expected some of {', '.join(known)}, or all")
    if len(set(methods)) < len(methods):
        raise ValueError(f"--method={cfg.method} names a method twice")
    evaluated = [n for n in cfg.evaluate.split(",") if n and n != "none"] or [cfg.simulator]
    stages = [Stage(m, m, "") for m in methods if m != "oracle"]
    return stages + [Stage(f"oracle_{crowd_name(n)}", "iql", n) for n in evaluated if "oracle" in methods], evaluated


def crowd_name(name):
    return name if name == "world" else Path(name).parent.name if Path(name).name.startswith(("step_", "types_")) else Path(name).name


def check_slate(cfg):
    if not 0 < cfg.expectile < 1 or not 0 <= cfg.gamma <= 1 or not 0 < cfg.rho <= 1 or not 0 < cfg.val_share < 1:
        raise ValueError(f"expected --expectile in (0, 1), --gamma in [0, 1], --rho in (0, 1] and --val_share in (0, 1), found {cfg.expectile}, {cfg.gamma}, "
                         f"{cfg.rho}, {cfg.val_share}")
    for key, least in dict(horizon=1, slate_size=1, images_per_prompt=1, max_per_category=0, candidates_per_category=1, sim_sessions=10, num_steps=1, batch_size=1,
                           device_batch_size=1, log_every=1, eval_every=0, save_every=0, eval_people=2, val_people=1, cql_alpha=0).items():
        if getattr(cfg, key) < least:
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected at least {least}")
    if not 0 <= cfg.critique <= 1:
        raise ValueError(f"--critique={cfg.critique}: expected a share in [0, 1]")
    if cfg.slate_size > 5 * cfg.max_per_category and cfg.max_per_category:
        raise ValueError(f"--slate_size={cfg.slate_size}: 5 categories give at most {5 * cfg.max_per_category} columns of at most "
                         f"--max_per_category={cfg.max_per_category} each")


def train_slate(cfg):
    rank, _, world_size, device = setup_distributed()
    check_slate(cfg)
    crowds = open_crowds(cfg)
    stages, evaluated = stages_of(cfg, crowds)
    if cfg.batch_size < world_size:
        raise ValueError(f"--batch_size={cfg.batch_size}: expected at least one session for each of {world_size} processes")
    out_dir = Path("out") / cfg.name
    resume = checkpoint.find(out_dir, cfg.resume)
    propose = open_generator(cfg.generator, num=cfg.candidates_per_category, tries=cfg.generator_tries)
    tokenizer = Tokenizer.bytes() if cfg.encoder == "text" else None
    config = SlateAgentConfig(encoder=cfg.encoder, hidden_size=cfg.hidden_size, num_layers=cfg.num_layers, max_turns=cfg.horizon, turn_number=cfg.turn_number,
                              choice_head=cfg.slate_value == "choice", share_trunk=cfg.share_trunk)
    deployment = Deployment(cfg.generator, cfg.slate_size, cfg.horizon, cfg.max_per_category, tokenizer)
    if cfg.dry_run:
        size = num_params(new_agent(config, tokenizer))
        tokens = min(cfg.batch_size, cfg.device_batch_size) * (2 + cfg.horizon * (cfg.slate_size + 2))
        bytes_of = dict(weights=4 * size, gradients=4 * size, optimizer=8 * size, target=4 * size,
                        activations=4 * tokens * cfg.hidden_size * 14 * cfg.num_layers, sessions=cfg.sim_sessions * cfg.horizon * 25 * 16)
        summary = asdict(cfg) | dict(parameters=size, stages=[s.label for s in stages], memory_mb={k: round(v / 2**20, 1) for k, v in bytes_of.items()})
        if rank == 0:
            print(json.dumps(summary))
        return summary

    state = dict(stage=0, step=0, results=[], best={}, seconds={})
    if resume:
        record = checkpoint.read_record(resume)
        if changed := [k for k, v in record["config"].items() if k not in MAY_CHANGE and getattr(cfg, k, v) != v]:
            raise ValueError(f"{resume} was made with other settings: " + ", ".join(f"--{k}={record['config'][k]}" for k in changed) + "; resume with the same")
        state = record["state"]
    elif rank == 0:
        checkpoint.clear(out_dir, cfg.overwrite)
    begun_at = state["stage"] * cfg.num_steps + state["step"]
    logger = Logger(cfg, rank, resume_step=begun_at if resume else None)
    started, loaded = time.monotonic(), {}

    for number in range(state["stage"], len(stages)):
        stage, begun = stages[number], resume and number == state["stage"]
        # sessions: of --data or simulated once for all methods, for an oracle by the crowd that it is asked about
        key = stage.crowd or ("" if cfg.data else cfg.simulator)
        if key not in loaded:
            log, rewards, weights, kind = open_sessions(cfg, crowds, propose, key, rank)
            loaded = {key: (log, rewards, weights, rectangles(log, rewards, kind).to(device))}
            logger.print(f"{stage.label}: {len(log.user):,} sessions of {len(log.user_ids):,} people, {len(log.choice):,} turns, mean reward {rewards.mean():.4f}"
                         + (f", generator {propose.counts}" if getattr(propose, "counts", None) else ""))
        log, rewards, weights, rectangle = loaded[key]
        is_val = (slate.parts_of(log.user_ids, cfg.seed, (1 - cfg.val_share, cfg.val_share)) == 1)[log.user]
        train_rows, val_rows = np.flatnonzero(~is_val), np.flatnonzero(is_val)
        if not len(train_rows) or not len(val_rows):
            raise ValueError(f"--val_share={cfg.val_share}: {len(train_rows)} sessions are left to train on, {len(val_rows)} to hold out: more users, or another share")
        # an oracle is told types, which are the labels of its sessions; others never see them
        c = replace(config, num_kinds=crowds.make(stage.crowd, 1, 0).num_kinds if stage.crowd else 0, choice_head=config.choice_head and stage.method != "bc")
        scale = float(rewards[~is_val[log.session]].std()) if cfg.reward_scale == "std" else 1.0
        scale = scale if scale > 1e-8 else 1.0
        agent = new_agent(c, tokenizer).init_weights(random_key(cfg.seed, "weights") % 2**31)
        if cfg.encoder == "text":
            agent.texts = rectangle.texts
        elif stage.method != "bc":                                   # v and f start where the mean of returns is, or every update would first have to find it
            to_go = mean_returns(rectangle.take(train_rows), 0.0 if stage.method == "myopic" else cfg.gamma) / scale
            agent.offset.data[:len(to_go)] = to_go[:cfg.horizon + 1]
        if stage.method == "bc":
            agent.value.requires_grad_(False)
            if cfg.encoder == "pooled":
                agent.value_up.requires_grad_(False)
        if begun:
            checkpoint.load_weights(resume, agent)
        agent.to(device)
        target = copy.deepcopy(agent).requires_grad_(False)
        optimizers = make_optimizers(agent, cfg.lr, weight_decay=cfg.weight_decay, betas=(0.9, 0.99))
        first_step = 0
        if begun:
            checkpoint.restore(resume, agent, optimizers)
            saved = checkpoint.load_extra(resume)
            for name, p in target.named_parameters():
                p.data.copy_(saved[f"target.{name}"])
            first_step = state["step"]
        wrapped = parallelize(agent, "ddp", device, world_size)
        cumulative = np.cumsum(weights[train_rows]) / weights[train_rows].sum()
        looked = {"train": rectangle.take(train_rows[:400]), "val": rectangle.take(val_rows[:400])}

        for step in range(first_step, cfg.num_steps + 1):
            last_step, g = step == cfg.num_steps, number * cfg.num_steps + step

            # once in a while: what the crowd that trained it thinks of it, and what Q and V say of training and held-out turns
            if (last_step or (cfg.eval_every and step and step % cfg.eval_every == 0)) and not (begun and step == first_step):
                found = {}
                if stage.method != "bc":
                    found = {f"{part}/{k}": v for part, s in looked.items() for k, v in slate_stats(cfg, stage.method, agent, target, s, scale).items()}
                seed = random_key(cfg.seed, "validation") % 2**31
                crowd = crowds.make(stage.crowd or cfg.simulator, cfg.val_people, seed)
                agent.eval()
                picked = sessions.simulate(crowd, starts_of(cfg, cfg.val_people, seed)[0], agent_policy(agent, device), seed=seed, keep=False,
                                           **settings_of(cfg, propose)).picked
                agent.train()
                score = float(picked.mean())
                found |= {"eval/utility": score, "eval/last_turn": float(picked[:, -1].mean())}
                state["results"].append(dict(stage=stage.label, step=step, **found))
                if score > state["best"].get(stage.label, dict(score=-np.inf))["score"]:
                    state["best"][stage.label] = dict(score=score, step=step)
                    with checkpoint.together():
                        if rank == 0:
                            checkpoint.save_hf(agent, deployment, out_dir / stage.label)
                logger.log(g, **{f"{stage.label}/{k}": v for k, v in found.items()})
                logger.print(f"{stage.label} {step}/{cfg.num_steps} | " + " | ".join(f"{k} {v:.4f}" for k, v in found.items() if "_p" not in k))
            if cfg.save_every and g and g % cfg.save_every == 0 and step > first_step:
                checkpoint.save(out_dir, g, agent, deployment, optimizers, state=state | dict(stage=number, step=step), config=asdict(cfg), rank=rank,
                                world_size=world_size, extra={f"target.{name}": p for name, p in target.named_parameters()})
            if last_step:
                break

            # one global batch: sessions by their weights, a function of (seed, step), the same for all methods
            t0 = time.perf_counter()
            draws = np.random.default_rng(random_key(cfg.seed, "batch", step)).random(cfg.batch_size)
            chosen = train_rows[np.searchsorted(cumulative, draws, side="right").clip(max=len(train_rows) - 1)]
            num = int(rectangle.valid[chosen].sum())
            mine = chosen[rank::world_size]
            groups = [mine[i:i + cfg.device_batch_size] for i in range(0, len(mine), cfg.device_batch_size)]
            sums = {}
            for i, rows in enumerate(groups):
                set_gradient_sync(wrapped, i == len(groups) - 1)
                losses, found = slate_losses(cfg, stage.method, wrapped, target, rectangle.take(rows), scale, num)
                (sum(losses.values()) * world_size).backward()       # DDP averages over ranks, we want the sum
                for k, v in (losses | found).items():
                    sums[k] = sums.get(k, 0.0) + v.detach().double()

            # update: all losses are of the weights before the step, so one backward serves V and Q; then the target
            grad_norm = clip_grad_norm(agent, cfg.max_grad_norm)
            logged = (step + 1) % cfg.log_every == 0
            if logged:
                names = sorted(sums)
                sums = dict(zip(names, all_reduce_sum(torch.stack([sums[k] for k in names])).tolist()))
                for k in names:
                    check_finite(f"train/{k}", sums[k])
                check_finite("train/grad_norm", grad_norm.item())
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * lr_scale(step, cfg.num_steps, cfg.warmup_steps, cfg.decay_share)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if stage.method != "bc":
                update_target(target, agent, cfg.rho)

            # log
            seconds = time.perf_counter() - t0
            state["seconds"][stage.label] = state["seconds"].get(stage.label, 0.0) + seconds
            if logged:
                logger.log(g + 1, **{f"train/{k}": v for k, v in sums.items()}, **{"train/grad_norm": grad_norm.item(), "train/lr": optimizers[0].param_groups[0]["lr"],
                                                                                  "time/step": seconds, "time/turns_per_sec": num / seconds})
            if (step + 1) % max(1, cfg.num_steps // 5) == 0 and logged:
                left = (time.monotonic() - started) / (g + 1 - begun_at) * (len(stages) * cfg.num_steps - g - 1)
                logger.print(f"{stage.label} step {step + 1:5d}/{cfg.num_steps} | " + " | ".join(f"{k} {v:.4f}" for k, v in sums.items())
                             + f" | {1000 * seconds:.0f} ms | {format_seconds(left)} left")
    return finish_slate(cfg, crowds, stages, evaluated, propose, deployment, state, device, logger, started, rank, world_size)


def mean_returns(s, gamma):
    """(T,) mean discounted reward from each turn on, over the sessions that reach it."""
    total, to_go = torch.zeros(len(s.reward)), []
    for t in reversed(range(s.reward.shape[1])):
        total = s.reward[:, t] + gamma * total
        reached = s.valid[:, t]
        to_go.append(total[reached].mean() if reached.any() else torch.zeros(()))
    return torch.stack(to_go[::-1])


def finish_slate(cfg, crowds, stages, evaluated, propose, deployment, state, device, logger, started, rank, world_size):
    """Every policy before the same held-out people of every crowd -> report.md, results.json, pictures; the first method's agent is the checkpoint."""
    agents = {stage.label: load_agent(Path("out") / cfg.name / stage.label, device)[0] for stage in stages}
    first = agents[stages[0].label]
    if rank == 0:
        names = list(dict.fromkeys([*evaluated, cfg.simulator]))
        seed = random_key(cfg.seed, "held out") % 2**31
        starts, specific = starts_of(cfg, cfg.eval_people, seed)
        found, kinds = {}, {}
        for name in names:
            of_crowd = {"base": sessions.base_policy, "random": sessions.random_policy}
            of_crowd |= {stage.label: agent_policy(agents[stage.label], device) for stage in stages if not stage.crowd}
            of_crowd |= {"oracle_greedy": sessions.oracle_greedy}
            for stage in (s for s in stages if s.crowd == name):
                of_crowd["oracle_type"] = agent_policy(agents[stage.label], device)
            for policy, play in progress(of_crowd.items(), desc=f"evaluation with {crowd_name(name)}"):
                crowd = crowds.make(name, cfg.eval_people, seed)
                found[crowd_name(name), policy] = sessions.simulate(crowd, starts, play, seed=seed, keep=False, **settings_of(cfg, propose)).picked
                kinds[crowd_name(name)] = crowd.kind
        results = sessions.compare(found, cfg.seed)
        lines = sessions.report(cfg.name, found, results, kinds, specific, trained_in=crowd_name(cfg.simulator), best=state["best"])
        write_atomically(logger.out_dir / "report.md", "\n".join(lines) + "\n")
        write_atomically(logger.out_dir / "results.json", json.dumps(dict(
            results=results, best=state["best"], history=state["results"], seconds=state["seconds"], counts=getattr(propose, "counts", {}), config=asdict(cfg))) + "\n")
        sessions.picture(found, state["results"], logger.out_dir / "utility.png")
        logger.picture(len(stages) * cfg.num_steps, "utility", logger.out_dir / "utility.png")
        name = names[0]
        story = {policy: sessions.simulate(crowds.make(name, 8, seed), starts[:8], play, seed=seed, **settings_of(cfg, propose))
                 for policy, play in (("base", sessions.base_policy), (stages[0].label, agent_policy(first, device)))}
        sessions.storyboard(story, logger.out_dir / "storyboard.png")
        print("\n".join(lines), flush=True)
    saved = checkpoint.save(logger.out_dir, len(stages) * cfg.num_steps, first, deployment, [], state=state | dict(stage=len(stages), step=0), config=asdict(cfg),
                            rank=rank, world_size=world_size)
    summary = dict(name=cfg.name, checkpoint=str(saved), parameters=num_params(first), seconds=round(time.monotonic() - started, 1))
    if rank == 0:
        summary |= {f"{crowd} {policy}": dict(mean=round(float(x.mean()), 4), last_turn=round(float(x[:, -1].mean()), 4)) for (crowd, policy), x in found.items()}
    logger.close(**summary)
    return summary


def open_generator(spec, num=5, tries=3):
    return lambda text, seed, person, turn: slate.expansions(text, seed, person, turn, num)


if __name__ == "__main__":
    train_slate(parse_config(Config))
