"""Implicit Q-learning (IQL, arXiv 2110.06169): for an agent that shows slates to people (PASTA, 2412.10419), and on plain logs of steps.

Q never sees an action that the log has not. With the logged (s, a, r, s'),

    u   = min_i qbar_i(s, a) - v(s)                       qbar: the target network, no gradient
    L_V = sum |expectile - 1[u < 0]| u^2 / num            eq. 5: v is an upper expectile of Q over the log's actions, their maximum as expectile -> 1
    L_pi = - sum min(exp(beta u), clip) log pi(a | s) / num         eq. 7, no gradient through the weight
    y   = r + gamma (1 - terminal) v(s')                  no gradient
    L_Q = sum_i sum (q_i(s, a) - y)^2 / num               eq. 6: the sum over the two heads; CORL's code has their mean
    qbar <- (1 - rho) qbar + rho q                        after the step

over the num steps of the global batch. The order of an update is V, policy, Q, target; all three losses are of the weights before the step (the authors'
code uses the new v for the policy and for y), so one backward and one optimizer serve all. `terminal` stops the bootstrap, a time limit does not.
expectile .5 is the value of the log's policy. With few steps for a (s, a) an upper expectile takes luck for value: v(start) less the true value of the
greedy policy is logged where it is known (eval/value_gap), as is the Bellman error on episodes that were held out.

An agent of slates (--task=slate): s is the session so far, a the slate P that was shown, r what its pick was worth to the person (or what a user model
says it was). q_i(h, P) = mean over p in P of f_i(h, p); the mean is regressed, not each item. There is no policy network: the best slate under min_i f_i
is exact for a mean (slate_agent.select), so L_pi has no part in it. What the paper leaves open is a flag, whose help says whose default it is. Agents are
judged by people who were held out, in the simulator that trained them (A), in another user model (B) and in the hidden world (W): sessions.py.

A plain log (--task=offline) checks the same losses against answers that are known: tables, CartPole, walks, D4RL files.
beta <= 0 is refused: at 0 all weights are 1 and the policy is a clone that no value changes, below 0 it prefers what v thinks is worse. For a clone
say --method=bc.

    python train_iql.py                                                     laptop: an agent in the hidden world, beside myopic and cloned ones
    python train_iql.py --simulator=out/users_a --evaluate=world,out/users_b --method=iql,myopic,bc,oracle         PASTA: train in A, judge in B and W
    python train_iql.py --task=offline --data=cartpole                      laptop: return 438 (+- 36, five seeds) from data of return 22; --method=bc: 22
    python train_iql.py --task=offline --data=sepsis --gamma=1 --expectile=.9        a tabular world whose policies are valued exactly
    python train_iql.py --task=offline --data=hopper_medium-v2.hdf5 --reward=locomotion --num_steps=1e6
    torchrun --nproc_per_node=8 train_iql.py --task=offline --data=log.npz --batch_size=2048         the same flags, eight GPUs
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

import checkpoint
import sessions
from common import (Logger, all_reduce_sum, check_finite, format_seconds, lr_scale, parse_config, progress, random_key, setup_distributed,
                    write_atomically)
from data import offline, slate
from data.embeddings import check_same, load_embeddings
from data.expansions import open_generator
from model import clip_grad_norm, make_optimizers, num_params, parallelize, set_gradient_sync
from offline_agent import OfflineAgent, OfflineAgentConfig
from sessions import agent_policy
from slate_agent import Deployment, SlateAgentConfig, load_agent, new_agent, rectangles
from tokenizer import Tokenizer
from user_model import load_user_model


@dataclass(frozen=True)
class Config:
    name: str = "dummy"              # results go to out/<name>; any name but dummy also opens wandb
    seed: int = 0                    # decides generated data, weights and order
    task: Literal["slate", "offline"] = "slate"         # slate: an agent that shows slates to people; offline: plain IQL on a log of steps
    # model
    init: str = ""                   # offline, encoder=text: checkpoint folder, or out/<name>, whose weights to start from
    encoder: Literal["pooled", "text"] = "pooled"       # slate: a token for each prompt, or the session written out (ours)
    hidden_size: int = 64            # slate, pooled: width (ours)
    num_layers: int = 2              # slate, pooled: blocks (ours)
    share_trunk: bool = True         # slate: v and f read one trunk (ours)
    turn_number: bool = True         # slate: the state knows the turn; without it a horizon cannot be seen
    width: int = 256                 # offline: units of a hidden layer (IQL)
    depth: int = 2                   # offline: hidden layers (IQL)
    # data of --task=slate: people and sessions
    data: str = ""                   # slate: session files with weights, as real.jsonl:1,simulated:1; simulated, or empty: with --simulator;
                                     # offline: cartpole | walks | sepsis | icu_sepsis | FILE.npz, .hdf5, .csv (data/README.md); empty: cartpole
    embeddings: str = ""             # .npz files of --data's prompts and images, where a user model says the rewards; clip:FOLDER embeds texts by CLIP
    simulator: str = "world"         # world, the folder of a user model, or small (36 states, exact values): with whom sessions are
                                     # simulated, rewards labelled, and steps selected (A)
    evaluate: str = "world"          # crowds of the evaluation, comma-separated: world (W), folders of user models (B); none: --simulator
    world_seed: int = -1             # of the hidden world's words and types; auto: --seed
    world_types: int = 4             # types in it (ours)
    novelty: float = 0.4             # what a quick win pays in it, once; 0: nothing to be tempted by (ours)
    deviation: float = 0.2           # of persons of it from their type (ours)
    sim_sessions: int = 6000         # sessions that are simulated (ours; PASTA had 30,000)
    sim_types: str = "prior"         # their types: by the user model's shares, or as in the file of sessions whose users' posteriors they follow
    behavior: str = "random"         # random, myopic, noisy: who shows the slates in them, with shares as random:.5,myopic:.3,noisy:.2 (ours)
    horizon: int = 5                 # turns (PASTA)
    slate_size: int = 4              # columns (PASTA)
    images_per_prompt: int = 4       # images of a column (PASTA)
    max_per_category: int = 1        # columns of one category; 0: any number (PASTA, secondary)
    candidates_per_category: int = 5 # of each of 5 categories (PASTA, secondary)
    generator: str = "template"      # template; checkpoint:PATH; url:BASE, an OpenAI-compatible server (ours)
    generator_model: str = ""        # url: the name that the server asks for
    generator_tries: int = 3         # times that a generator is asked before templates fill in (ours)
    critique: float = 0.0            # share of turns at which a simulated person says what it wishes (ours)
    reward_at: Literal["chosen", "mean", "best"] = "chosen"     # reward of a simulated turn: utility of the picked column, of all, of the best (ours)
    reward_source: Literal["given", "model"] = "given"  # of --data: its reward field, or what --simulator's user model says of each pick (ours)
    # data of --task=offline
    num_episodes: int = -1           # of generated data; auto: 1,500 of cartpole, 1,000 walks, 20,000 of sepsis
    reward: Literal["raw", "antmaze", "locomotion"] = "raw"     # files: as they are; minus 1; times 1000 / (best - worst return) (IQL)
    standardize: bool = True         # offline: shift and scale each coordinate of the state to mean 0 and deviation 1 (CORL; IQL does not)
    env: str = ""                    # files: gymnasium environment in which the greedy policy is played, if gymnasium is installed
    num_games: int = 100             # episodes of an evaluation that plays
    score_random: float = 0.0        # with score_expert: returns that are 0 and 100 of the normalised score
    score_expert: float = 0.0        # the other end; equal to score_random: no normalised score
    # the algorithm
    reward_scale: Literal["std", "none"] = "std"        # slate: rewards over their deviation in the training data (ours)
    center_types: bool = True        # slate: what a user model says of picks less its mean by type: picks are silent about a type's level (ours)
    method: str = ""                 # slate: iql | myopic (gamma 0) | bc | oracle (iql, told the types of people of the first of --evaluate), several
                                     # in turn; empty: iql,myopic,bc; offline: iql | bc; empty: iql
    expectile: float = 0.7           # of V over the log's actions: .5 their mean, towards 1 their maximum; antmaze .9 (IQL)
    cql_alpha: float = 0.0           # slate: weight of logsumexp of f over all candidates less its mean over the slate (2006.04779)
    gamma: float = -1.0              # discount; auto: slate 1, the sum over its turns is what counts (ours), offline .99 (IQL); sepsis: 1
    rho: float = -1.0                # share of Q that the target network takes over in a step; auto: slate .01 (ours), offline .005 (IQL)
    slate_value: Literal["mean", "choice"] = "mean"     # q of a slate: mean of its items (PASTA, secondary), or as a learned choice weighs them (SlateQ)
    beta: float = 3.0                # offline: of advantages in the policy's weights: higher is greedier, lower nearer to BC; antmaze 10 (IQL)
    weight_clip: float = 100.0       # offline: bound on a weight of the policy (IQL)
    # length of the run and optimization
    num_steps: int = -1              # updates of each method; auto: slate 1500, offline 6000 (IQL: 1e6 on D4RL)
    batch_size: int = -1             # per update; auto: 64 sessions (ours), 256 steps of a log (IQL)
    device_batch_size: int = 1024    # rows per forward pass and device: lower when memory runs out, the result stays the same
    lr: float = -1.0                 # rate; auto: slate 1e-3, AdamW, warmed up and decayed (ours), offline 3e-4, Adam (IQL)
    cosine: bool = True              # offline: the policy's rate falls to 0 along a cosine; those of Q and V stay (IQL)
    weight_decay: float = 0.01       # slate: on matrices (ours)
    warmup_steps: int = 30           # slate: steps of linear warm-up
    decay_share: float = 0.5         # slate: the last share goes linearly to rate 0
    max_grad_norm: float = 1.0       # global norm the gradient is clipped to (slate)
    # machine
    compile: bool = False            # torch.compile the model
    # looking and keeping
    val_share: float = 0.1           # share of users, or of episodes, held out
    eval_people: int = 500           # slate: held-out persons of the evaluation in each crowd
    val_people: int = 200            # slate: persons of --simulator on whom the step that stays is selected
    log_every: int = 100             # updates between lines of metrics
    eval_every: int = -1             # updates between evaluations, 0: only at the end; auto: slate 500, offline 1000
    save_every: int = 0              # steps between checkpoints; 0: only at the end
    resume: str = ""                 # latest, or a step folder: continue out/<name> exactly
    overwrite: bool = False          # delete the checkpoints of an earlier run of this name
    dry_run: bool = False            # print the resolved settings and the memory estimate, and stop


AUTO = {"slate": dict(method="iql,myopic,bc", gamma=1.0, rho=.01, num_steps=1500, batch_size=64, lr=1e-3, eval_every=500),
        "offline": dict(data="cartpole", method="iql", gamma=.99, rho=.005, num_steps=6000, batch_size=256, lr=3e-4, eval_every=1000)}
MAY_CHANGE = ("name", "log_every", "save_every", "resume", "overwrite", "dry_run", "compile")
QUANTILES = (0.05, 0.5, 0.95)


def resolved(cfg):
    """The config with every auto decided by its task: what runs is what is logged."""
    return replace(cfg, **{key: value for key, value in AUTO[cfg.task].items() if getattr(cfg, key) in ("", -1)})


# -----------------------------------------------------------------------------
# The algorithm. Sums over num, the steps of the global batch; N steps, H heads of Q


def expectile_loss(u, expectile, num):
    """sum |expectile - 1[u < 0]| u^2 / num, to minimize (eq. 5). u (N,) = target_q - v, of which only v has a gradient."""
    return ((expectile - (u < 0).to(u.dtype)).abs() * u.square()).sum() / num


def td_target(rewards, terminal, v_next, gamma):
    """r + gamma (1 - terminal) v(s'), without gradient. All (N,); terminal 1 where the episode ended, 0 also where it was cut off."""
    return rewards + gamma * (1 - terminal) * v_next.detach()


def q_loss(qs, y, num):
    """sum over heads and steps (q - y)^2 / num, to minimize (eq. 6). qs (H, N), y (N,)."""
    return (qs - y.detach()).square().sum() / num


def policy_loss(logps, advantages, beta, clip, num):
    """- sum min(exp(beta A), clip) log pi(a|s) / num, to minimize, no gradient through the weight (eq. 7). logps, advantages (N,)."""
    weights = (beta * advantages.detach()).exp().clamp(max=clip)
    return -(weights * logps).sum() / num


@torch.no_grad()
def update_target(target, online, rho):
    """target <- (1 - rho) target + rho online, parameter by parameter, in place. target, online: modules of one shape."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rho)


# -----------------------------------------------------------------------------
# Slates


def slate_q(f, value, choice_logits=None):
    """f (H, .., L) of the items of a slate -> (H, ..): their mean, or their mean under softmax(choice_logits (.., L)), which has no gradient."""
    if value == "mean":
        return f.mean(-1)
    return (choice_logits.detach().softmax(-1) * f).sum(-1)


def bc_loss(scores, slate_, valid, num):
    """- sum over turns of the mean over a slate's items of log softmax(scores)[item] / num. scores (B, T, C), -inf where there is no candidate;
    slate (B, T, L), valid (B, T)."""
    return -(scores.log_softmax(-1).gather(-1, slate_).mean(-1) * valid).sum() / num


def choice_loss(logits, picked, valid, num):
    """Cross-entropy of the picks: logits (B, T, L), picked (B, T)."""
    return -(logits.log_softmax(-1).gather(-1, picked[..., None])[..., 0] * valid).sum() / num


def cql_penalty(f, f_slate, present, valid, num):
    """sum over heads and turns of logsumexp over candidates of f less its mean over the slate, / num (2006.04779, eq. 4). f (H, B, T, C), f_slate
    (H, B, T, L)."""
    return ((f.masked_fill(~present, -torch.inf).logsumexp(-1) - f_slate.mean(-1)) * valid).sum() / num


def slate_losses(cfg, method, forward, target, s, scale, gamma, num):
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
    y = td_target(s.reward[s.valid] / scale, s.terminal[s.valid], v_next, gamma)
    losses = dict(v_loss=expectile_loss(u, cfg.expectile, num), q_loss=q_loss(qs, y, num))
    if logits is not None:
        losses["choice_loss"] = choice_loss(logits, s.batch.picked, valid, num)
    if cfg.cql_alpha:
        penalty = cql_penalty(f_all[:len(f)], f, present | ~s.valid[..., None], valid, num)
        losses["cql_loss"] = cfg.cql_alpha * penalty
    return losses, dict(v=v_now.detach().sum() / num, q=target_q.sum() / num, below=(u.detach() < 0).sum() / num)


@torch.no_grad()
def slate_stats(cfg, agent, target, s, scale, gamma):
    """-> {name: float} over held-out or training sessions: quantiles of q, v and u, share of u < 0, mean squared Bellman error, and f of candidates that
    were not shown less f of those that were."""
    v, f = agent(s.batch, s.candidates, s.categories)
    f_target = target(s.batch, s.candidates, s.categories)[1]
    take = lambda x: x.gather(3, s.slate.expand(len(x), -1, -1, -1))
    logits = take(f)[-1] if cfg.slate_value == "choice" else None
    heads = slice(0, len(f) - (logits is not None))
    q = slate_q(take(f_target)[heads], cfg.slate_value, logits)[:, s.valid].amin(0)
    own = slate_q(take(f)[heads], cfg.slate_value, logits)[:, s.valid]
    v_now, v_next = v[:, :-1][s.valid], v[:, 1:][s.valid]
    y = td_target(s.reward[s.valid] / scale, s.terminal[s.valid], v_next, gamma)
    shown = torch.zeros_like(s.categories, dtype=torch.bool).scatter_(2, s.slate, True)
    unseen = ~shown & (s.categories >= 0) & s.valid[..., None]
    mean_f = f[heads].mean(0)
    found = dict(below=float((q < v_now).double().mean()), bellman=float((own - y).square().double().mean()))
    if unseen.any():                                                 # a slate may be all there is
        found["unseen_less_shown"] = float(mean_f[unseen].mean() - mean_f[shown & s.valid[..., None]].mean())
    for name, x in (("q", q), ("v", v_now), ("u", q - v_now)):
        values = torch.quantile(x.double(), torch.tensor(QUANTILES, dtype=torch.float64, device=x.device)).tolist()
        found |= {f"{name}_p{round(100 * share):02d}": value for share, value in zip(QUANTILES, values)}
    return found


# -----------------------------------------------------------------------------
# The run


class Crowds(NamedTuple):
    """Who sessions are simulated and evaluated with. make(name, n, seed) -> a crowd, starts(n, seed) -> their prompts and which of them are specific."""
    world: slate.World | slate.SmallWorld
    models: dict                # name -> UserModel
    embed: object               # texts -> (N, d)

    def starts(self, n, seed):
        if isinstance(self.world, slate.SmallWorld):
            return [sessions.SmallGenerator.start] * n, np.zeros(n, bool)
        return slate.start_prompts(n, seed)

    def make(self, name, n, seed):
        if name == "small":
            return sessions.SmallCrowd(self.world, n)
        if name == "world":
            return sessions.WorldCrowd(self.world, n, seed)
        return sessions.ModelCrowd(self.models[name], n, seed, self.embed, name=name)


def open_crowds(cfg):
    """-> Crowds. ValueError: a user model of other embeddings than the ones at hand, the hidden world where texts are CLIP's."""
    names = list(dict.fromkeys([cfg.simulator, *(n for n in cfg.evaluate.split(",") if n and n != "none")]))
    if len({crowd_name(name) for name in names}) < len(names):
        raise ValueError(f"--simulator={cfg.simulator} --evaluate={cfg.evaluate}: two of {', '.join(names)} have one name in the tables; rename a folder")
    if "small" in names:
        expected = dict(simulator="small", slate_size=2, candidates_per_category=1, max_per_category=1, horizon=5, generator="template")
        if len(names) > 1 or any(getattr(cfg, key) != value for key, value in expected.items()):
            raise ValueError("the small world is played by itself: expected " + " ".join(f"--{key}={value}" for key, value in expected.items())
                             + " --evaluate=small (or none), found " + " ".join(f"--{key}={getattr(cfg, key)}" for key in (*expected, "evaluate")))
        return Crowds(slate.SmallWorld(cfg.novelty), {}, None)
    world = slate.World(cfg.seed if cfg.world_seed < 0 else cfg.world_seed, num_types=cfg.world_types, novelty=cfg.novelty, deviation=cfg.deviation)
    embed, encoder = world.embed, world.name
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
    return dict(horizon=cfg.horizon, slate_size=cfg.slate_size, images_per_prompt=cfg.images_per_prompt, max_per_category=cfg.max_per_category,
                propose=propose, reward_at=cfg.reward_at, critique=cfg.critique)


def sources_of(data):
    """"real.jsonl:1,simulated:.5" -> [(file, or "simulated", weight)]."""
    found = []
    for part in data.split(","):
        path, _, weight = part.rpartition(":") if ":" in part else (part, "", "1")
        try:
            weight = float(weight)
        except ValueError:
            raise ValueError(f"--data={data}: {weight!r} is no number; expected files with weights, as real.jsonl:1,simulated:1") from None
        if not 0 < weight < float("inf"):
            raise ValueError(f"--data={data}: expected weights above 0")
        if path != "simulated" and not Path(path).is_file():
            raise ValueError(f"--data={data}: no file {path!r} there; expected files of sessions, and simulated for those of --simulator")
        found.append((path, weight))
    return found


def open_sessions(cfg, crowds, propose, name):
    """-> (Log, (N,) rewards, (S,) weights of sampling, (S,) types or None). name: of a crowd that simulates; "": --data."""
    if not name:
        logs, weights, rewards = [], [], []
        for path, weight in sources_of(cfg.data):
            if path == "simulated":
                log, reward, _, _ = open_sessions(cfg, crowds, propose, cfg.simulator)
                logs.append(log), rewards.append(reward), weights.append(np.full(len(log.user), weight / len(log.user)))
                continue
            log = slate.read(path, cfg.slate_size, cfg.max_per_category == 1)
            reward = log.reward
            if cfg.reward_source == "model" or np.isnan(reward).any():
                if cfg.reward_source == "given":
                    raise ValueError(f"{path}: {int(np.isnan(reward).sum()):,} turns have no reward; --reward_source=model has a user model say it")
                if cfg.simulator in ("world", "small"):
                    raise ValueError("--reward_source=model: --simulator must be the folder of a user model, the hidden world tells nobody")
                reward = sessions.label_rewards(crowds.models[cfg.simulator], log, open_embeddings(cfg.embeddings), cfg.center_types)
            logs.append(log), rewards.append(reward), weights.append(np.full(len(log.user), weight / len(log.user)))
        return slate.joined(logs), np.concatenate(rewards), np.concatenate(weights), None
    seed = random_key(cfg.seed, "simulated", name) % 2**31
    crowd = crowds.make(name, cfg.sim_sessions, seed)
    if cfg.sim_types != "prior" and name == cfg.simulator:
        log = slate.read(cfg.sim_types, cfg.slate_size, cfg.max_per_category == 1)
        posterior, _ = sessions.posterior_of_users(crowds.models[name], log, open_embeddings(cfg.embeddings))
        crowd.kind = sessions.types_from(posterior.numpy(), cfg.sim_sessions, seed)
    behavior = sessions.behavior_policy(sessions.parse_behavior(cfg.behavior))
    found = sessions.simulate(crowd, crowds.starts(cfg.sim_sessions, seed)[0], behavior, seed=seed, source=f"sim:{crowd_name(name)}",
                              **settings_of(cfg, propose))
    reward = found.log.reward
    if cfg.center_types and name in crowds.models:
        of_turn = found.kind[found.log.session]
        reward = reward - sessions.type_levels(reward, np.eye(crowd.num_kinds)[of_turn])[of_turn]
    return found.log, reward, np.ones(cfg.sim_sessions), found.kind


def held_out(cfg, log):
    """(S,) bool: sessions of people who are held out, by a hash of the user."""
    is_val = (slate.parts_of(log.user_ids, cfg.seed, (1 - cfg.val_share, cfg.val_share)) == 1)[log.user]
    if is_val.all() or not is_val.any():
        raise ValueError(f"--val_share={cfg.val_share}: {(~is_val).sum()} sessions are left to train on, {is_val.sum()} to hold out: more users, or another "
                         "share")
    return is_val


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
    return stages + [Stage(f"oracle_{crowd_name(n)}", "iql", n) for n in evaluated[:1] if "oracle" in methods], evaluated


def crowd_name(name):
    return name if name == "world" else Path(name).parent.name if Path(name).name.startswith(("step_", "types_")) else Path(name).name


def check_slate(cfg):
    if not 0 < cfg.expectile < 1 or not 0 <= cfg.gamma <= 1 or not 0 < cfg.rho <= 1 or not 0 < cfg.val_share < 1:
        raise ValueError(f"expected --expectile in (0, 1), --gamma in [0, 1], --rho in (0, 1] and --val_share in (0, 1), found {cfg.expectile}, {cfg.gamma}, "
                         f"{cfg.rho}, {cfg.val_share}")
    if cfg.sim_types != "prior" and (cfg.simulator in ("world", "small") or not Path(cfg.sim_types).is_file()):
        raise ValueError(f"--sim_types={cfg.sim_types}: expected prior, or a file of sessions and with it --embeddings and the folder of a user model as "
                         f"--simulator, which knows types by what people picked; found --simulator={cfg.simulator}"
                         + ("" if Path(cfg.sim_types).is_file() else ", and no such file"))
    for key, least in dict(horizon=1, slate_size=1, images_per_prompt=1, max_per_category=0, candidates_per_category=1, sim_sessions=10, num_steps=1,
                           batch_size=1, device_batch_size=1, log_every=1, eval_every=0, save_every=0, eval_people=2, val_people=1, cql_alpha=0).items():
        if getattr(cfg, key) < least:
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected at least {least}")
    if not 0 <= cfg.critique <= 1:
        raise ValueError(f"--critique={cfg.critique}: expected a share in [0, 1]")
    sessions.parse_behavior(cfg.behavior)
    if cfg.encoder == "text" and not cfg.share_trunk:
        raise ValueError("--share_trunk=false: expected --encoder=pooled; written sessions are read by one trunk")
    if cfg.encoder == "pooled" and cfg.init:
        raise ValueError(f"--init={cfg.init}: expected --encoder=text, the pooled one starts from nothing")
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
    propose = sessions.SmallGenerator(crowds.world) if cfg.simulator == "small" else open_generator(
        cfg.generator, num=cfg.candidates_per_category, tries=cfg.generator_tries, model=cfg.generator_model, device=device)
    tokenizer, trunk, pretrained = None, {}, None
    if cfg.encoder == "text":
        tokenizer = Tokenizer.bytes()
        if cfg.init:
            pretrained, tokenizer = checkpoint.load_hf(checkpoint.newest(cfg.init))
            trunk = asdict(pretrained.config)
    config = SlateAgentConfig(encoder=cfg.encoder, hidden_size=cfg.hidden_size, num_layers=cfg.num_layers, max_turns=cfg.horizon, turn_number=cfg.turn_number,
                              share_trunk=cfg.share_trunk, choice_head=cfg.slate_value == "choice", trunk=trunk)
    deployment = Deployment(propose.name, cfg.slate_size, cfg.horizon, cfg.max_per_category, tokenizer)
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
    opened = None
    if cfg.data:                                                     # before an earlier run is cleared: a bad file must not cost its results
        opened = open_sessions(cfg, crowds, propose, "")
        held_out(cfg, opened[0])
    if not resume and rank == 0:
        checkpoint.clear(out_dir, cfg.overwrite)
    begun_at = state["stage"] * cfg.num_steps + state["step"]
    logger = Logger(cfg, rank, resume_step=begun_at if resume else None)
    started, loaded = time.monotonic(), {}

    for number in range(state["stage"], len(stages)):
        stage, begun = stages[number], resume and number == state["stage"]
        # sessions: of --data or simulated once for all methods, for an oracle by the crowd that it is asked about
        key = stage.crowd or ("" if cfg.data else cfg.simulator)
        if key not in loaded:
            log, rewards, weights, kind = opened if opened and not key else open_sessions(cfg, crowds, propose, key)
            loaded = {key: (log, rewards, weights, rectangles(log, rewards, kind).to(device))}
            logger.print(f"{stage.label}: {len(log.user):,} sessions of {len(log.user_ids):,} people, {len(log.choice):,} turns, reward {rewards.mean():.4f}"
                         + (f", generator {dict(propose.counts)}" if cfg.generator != "template" else ""))
        log, rewards, weights, rectangle = loaded[key]
        is_val = held_out(cfg, log)
        train_rows, val_rows = np.flatnonzero(~is_val), np.flatnonzero(is_val)
        # an oracle is told types, which are the labels of its sessions; others never see them
        num_kinds = crowds.make(stage.crowd, 1, 0).num_kinds if stage.crowd else 0
        # a clone has one head: of two, their mean would be trained and the smaller one played
        c = replace(config, num_kinds=num_kinds, **dict(choice_head=False, num_q=1) if stage.method == "bc" else {})
        scale = float(rewards[~is_val[log.session]].std()) if cfg.reward_scale == "std" else 1.0
        scale = scale if scale > 1e-8 else 1.0
        gamma = 0.0 if stage.method == "myopic" else cfg.gamma
        agent = new_agent(c, tokenizer).init_weights(random_key(cfg.seed, "weights") % 2**31)
        if cfg.encoder == "text":
            agent.texts = rectangle.texts
            if pretrained:
                agent.lm.model.load_state_dict(pretrained.model.state_dict())
        elif stage.method != "bc":                                   # v and f start where the mean of returns is, or every update would first have to find it
            to_go = mean_returns(rectangle.take(train_rows), gamma) / scale
            agent.offset.data[:len(to_go)] = to_go[:cfg.horizon + 1]
        if stage.method == "bc":
            agent.value.requires_grad_(False)
            if cfg.encoder == "pooled":
                agent.value_up.requires_grad_(False)
                if not cfg.share_trunk:
                    agent.of_value.requires_grad_(False)
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
        forward = torch.compile(wrapped) if cfg.compile else wrapped
        cumulative = np.cumsum(weights[train_rows]) / weights[train_rows].sum()
        looked = {"train": rectangle.take(train_rows[:400]), "val": rectangle.take(val_rows[:400])}

        for step in range(first_step, cfg.num_steps + 1):
            last_step, g = step == cfg.num_steps, number * cfg.num_steps + step

            # once in a while: what the crowd that trained it thinks of it, and what Q and V say of training and held-out turns
            if (last_step or (cfg.eval_every and step and step % cfg.eval_every == 0)) and not (begun and step == first_step):
                found = {}
                if stage.method != "bc":
                    found = {f"{part}/{k}": v for part, s in looked.items() for k, v in slate_stats(cfg, agent, target, s, scale, gamma).items()}
                seed = random_key(cfg.seed, "validation") % 2**31
                crowd = crowds.make(stage.crowd or cfg.simulator, cfg.val_people, seed)
                agent.eval()
                picked = sessions.simulate(crowd, crowds.starts(cfg.val_people, seed)[0], agent_policy(agent, device), seed=seed, keep=False,
                                           **settings_of(cfg, propose)).picked
                agent.train()
                # rank 0 speaks for all: a server may have answered others differently, and all must agree on what is the best step
                means = torch.tensor([picked.mean(), picked[:, -1].mean()], dtype=torch.float64, device=device)
                score, last_turn = all_reduce_sum(means * (rank == 0)).tolist()
                found |= {"eval/utility": score, "eval/last_turn": last_turn}
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
                losses, found = slate_losses(cfg, stage.method, forward, target, rectangle.take(rows), scale, gamma, num)
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
                logger.log(g + 1, **{f"train/{k}": v for k, v in sums.items()}, **{
                    "train/grad_norm": grad_norm.item(), "train/lr": optimizers[0].param_groups[0]["lr"], "time/step": seconds,
                    "time/turns_per_sec": num / seconds})
            if (step + 1) % max(1, cfg.num_steps // 5) == 0 and logged:
                left = (time.monotonic() - started) / (g + 1 - begun_at) * (len(stages) * cfg.num_steps - g - 1)
                logger.print(f"{stage.label} step {step + 1:5d}/{cfg.num_steps} | " + " | ".join(f"{k} {v:.4f}" for k, v in sums.items())
                             + f" | {1000 * seconds:.0f} ms | {format_seconds(left)} left")
    return finish_slate(cfg, crowds, stages, evaluated, propose, deployment, state, device, logger, started, rank, world_size)


def mean_returns(s, gamma):
    """(T,) mean discounted reward from each turn on, over the sessions that reach it."""
    total, to_go = torch.zeros_like(s.reward[:, 0]), []
    for t in reversed(range(s.reward.shape[1])):
        total = s.reward[:, t] + gamma * total
        reached = s.valid[:, t]
        to_go.append(total[reached].mean() if reached.any() else total.new_zeros(()))
    return torch.stack(to_go[::-1])


def finish_slate(cfg, crowds, stages, evaluated, propose, deployment, state, device, logger, started, rank, world_size):
    """Every policy before the same held-out people of every crowd -> report.md, results.json, pictures; the first method's agent is the checkpoint, as it was
    at the step that validation selected."""
    agents = {stage.label: load_agent(Path("out") / cfg.name / stage.label, device)[0] for stage in stages}
    first = agents[stages[0].label]
    if rank == 0:
        names = list(dict.fromkeys([*evaluated, cfg.simulator]))
        seed = random_key(cfg.seed, "held out") % 2**31
        starts, specific = crowds.starts(cfg.eval_people, seed)
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
            results=results, best=state["best"], history=state["results"], seconds=state["seconds"], counts=propose.counts, config=asdict(cfg))) + "\n")
        sessions.picture(found, state["results"], logger.out_dir / "utility.png")
        logger.picture(len(stages) * cfg.num_steps, "utility", logger.out_dir / "utility.png")
        name = names[0]
        story = {policy: sessions.simulate(crowds.make(name, len(starts[:8]), seed), starts[:8], play, seed=seed, **settings_of(cfg, propose))
                 for policy, play in (("base", sessions.base_policy), (stages[0].label, agent_policy(first, device)))}
        sessions.storyboard(story, logger.out_dir / "storyboard.png")
        print("\n".join(lines), flush=True)
    saved = checkpoint.save(logger.out_dir, len(stages) * cfg.num_steps, first, deployment, [], state=state | dict(stage=len(stages), step=0),
                            config=asdict(cfg), rank=rank, world_size=world_size)
    summary = dict(name=cfg.name, checkpoint=str(saved), parameters=num_params(first), seconds=round(time.monotonic() - started, 1))
    if rank == 0:
        summary |= {f"{crowd} {policy}": dict(mean=round(float(x.mean()), 4), last_turn=round(float(x[:, -1].mean()), 4))
                    for (crowd, policy), x in found.items()}
    logger.close(**summary)
    return summary


# -----------------------------------------------------------------------------
# Plain logs


def make_optimizer(agent, lr):
    """-> Adam with two groups: V and Q, whose rate stays, and the policy."""
    critics, policy = [*agent.v.parameters(), *agent.q.parameters()], [p for p in (*agent.policy.parameters(), agent.log_std) if p.requires_grad]
    return torch.optim.Adam([dict(params=critics), dict(params=policy)], lr=lr, fused=True)


def losses_of(cfg, agent, forward, target, batch, num):
    """One micro-batch (obs, actions, rewards, next_obs, terminal) -> (loss (3,) of V, policy and Q, {statistic: sum / num}). num: steps of the global batch."""
    obs, actions, rewards, next_obs, terminal = batch
    logps, v, v_next, qs = forward(obs, actions, next_obs, cfg.method)
    if cfg.method == "bc":
        return torch.stack([logps.new_zeros(()), policy_loss(logps, torch.zeros_like(logps), 1.0, 1.0, num), logps.new_zeros(())]), {}
    with torch.no_grad():
        target_q = agent.qs(target, obs, actions).amin(0)
    u = target_q - v
    y = td_target(rewards, terminal, v_next, cfg.gamma)
    losses = torch.stack([expectile_loss(u, cfg.expectile, num), policy_loss(logps, u, cfg.beta, cfg.weight_clip, num), q_loss(qs, y, num)])
    return losses, dict(v=v.detach().sum() / num, q=target_q.sum() / num, below=(u.detach() < 0).sum() / num)


# -----------------------------------------------------------------------------
# Plain logs: what the agent does in its world


@torch.no_grad()
def critic_stats(cfg, agent, target, batch):
    """-> {name: float} over a set of steps: quantiles of q (the smaller target head), v and u, share of u < 0, and the mean over heads and steps of the squared
    Bellman error (q - r - gamma (1 - terminal) v(s'))^2."""
    obs, actions, rewards, next_obs, terminal = batch
    q, v = agent.qs(target, obs, actions).amin(0), agent.values(obs)
    y = td_target(rewards, terminal, agent.values(next_obs), cfg.gamma)
    found = dict(below=float((q < v).double().mean()), bellman=float((agent.qs(agent.q, obs, actions) - y).square().double().mean()))
    for name, x in (("q", q), ("v", v), ("u", q - v)):
        values = torch.quantile(x.double(), torch.tensor(QUANTILES, dtype=torch.float64, device=x.device)).tolist()
        found |= {f"{name}_p{round(100 * share):02d}": value for share, value in zip(QUANTILES, values)}
    return found


def played(cfg, data, greedy):
    """greedy(states ndarray) -> actions ndarray. -> {metric: float} of the policy in its world, by exact values where the world is a table; {} where there is
    no world but a file."""
    if data.mdp is not None:
        action = greedy(np.arange(data.num_states))
        found = dict(optimality=offline.walk_optimality(data.mdp, action)) if cfg.data == "walks" else {}
        if cfg.data != "walks" or cfg.gamma < 1:                      # a walk may go round for ever: with gamma 1 that has no value
            found["value"] = float(data.mdp.initial @ offline.policy_values(data.mdp, np.eye(data.num_actions)[action], cfg.gamma))
        return found
    if cfg.data == "cartpole":
        returns = offline.cartpole_play(lambda obs, rng: greedy(obs), random_key(cfg.seed, "games"), cfg.num_games)[0]
    elif cfg.env:
        returns = gymnasium_returns(cfg.env, greedy, random_key(cfg.seed, "games") % 2**31, cfg.num_games)
    else:
        return {}
    found = {"return": float(returns.mean()), "return_std": float(returns.std())}
    return found | normalized(cfg, {"return": found["return"]})


def normalized(cfg, returns):
    """{name: return} -> {name with score for return: 100 (return - score_random) / (score_expert - score_random)}; {} without references (D4RL, 2004.07219)."""
    if cfg.score_expert == cfg.score_random:
        return {}
    return {name.replace("return", "score"): 100 * (value - cfg.score_random) / (cfg.score_expert - cfg.score_random) for name, value in returns.items()}


def gymnasium_returns(name, greedy, seed, num):
    """num episodes of a gymnasium environment, one after the other -> (num,) returns."""
    import gymnasium
    env, returns = gymnasium.make(name), np.zeros(num)
    for game in range(num):
        obs, done = env.reset(seed=seed + game)[0], False
        while not done:
            action = greedy(np.asarray(obs, np.float32)[None])[0]
            obs, reward, terminated, truncated, _ = env.step(int(action) if action.ndim == 0 else action * env.action_space.high)
            returns[game] += reward
            done = terminated or truncated
    env.close()
    return returns


# -----------------------------------------------------------------------------
# The run


def check_offline(cfg):
    if not cfg.beta > 0:
        raise ValueError(f"--beta={cfg.beta}: expected above 0: at 0 every weight is 1 and the policy clones the log whatever Q says (that is --method=bc), "
                         "below 0 it prefers the worse actions")
    if not 0 < cfg.expectile < 1 or not 0 <= cfg.gamma <= 1 or not 0 < cfg.rho <= 1 or not 0 <= cfg.val_share < 1:
        raise ValueError(f"expected --expectile in (0, 1), --gamma in [0, 1], --rho in (0, 1] and --val_share in [0, 1), found {cfg.expectile}, {cfg.gamma}, "
                         f"{cfg.rho}, {cfg.val_share}")
    for key, least in dict(width=1, depth=1, num_games=1, num_steps=1, batch_size=1, device_batch_size=1, log_every=1, eval_every=0, save_every=0).items():
        if getattr(cfg, key) < least:
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected at least {least}")
    if not cfg.weight_clip >= 1:
        raise ValueError(f"--weight_clip={cfg.weight_clip}: expected at least 1, the weight of an advantage of 0")


def agent_config(cfg, data):
    vectors = lambda x: x.shape[1] if x.ndim == 2 else 0
    return OfflineAgentConfig(data.num_states, vectors(data.obs), data.num_actions, vectors(data.actions), cfg.width, cfg.depth)


def train_offline(cfg):
    rank, _, world_size, device = setup_distributed()
    check_offline(cfg)
    if cfg.batch_size < world_size:
        raise ValueError(f"--batch_size={cfg.batch_size}: expected at least one step for each of {world_size} processes")
    data = offline.open_data(cfg.data, cfg.seed, cfg.num_episodes, cfg.reward)
    config = agent_config(cfg, data)
    held_out = np.random.default_rng([cfg.seed, 1]).random(int(data.episode[-1]) + 1)[data.episode] < cfg.val_share
    parts = {name: torch.from_numpy(np.flatnonzero(mask)) for name, mask in (("train", ~held_out), ("val", held_out))}
    if not len(parts["train"]) or (cfg.val_share and not len(parts["val"])):
        raise ValueError(f"--val_share={cfg.val_share}: of {int(data.episode[-1]) + 1} episodes {len(parts['train']):,} steps are left to train on, "
                         f"{len(parts['val']):,} to hold out; 0 holds out none")
    out_dir = Path("out") / cfg.name
    resume = checkpoint.find(out_dir, cfg.resume)
    agent = OfflineAgent(config)
    if cfg.dry_run:
        size, steps = num_params(agent), min(cfg.device_batch_size, cfg.batch_size)
        bytes_of = dict(weights=4 * size, gradients=4 * size, optimizer=8 * size, target=4 * num_params(agent.q),
                        data=sum(x.nbytes for x in data[:5]), activations=4 * 2 * steps * cfg.width * cfg.depth * (3 + 2 * config.num_heads))
        summary = asdict(cfg) | dict(parameters=size, steps=len(data.obs), memory_mb={k: round(v / 2**20, 1) for k, v in bytes_of.items()})
        if rank == 0:
            print(json.dumps(summary))
        return summary

    if resume:
        record = checkpoint.read_record(resume)
        if changed := [k for k, v in record["config"].items() if k not in MAY_CHANGE and getattr(cfg, k, v) != v]:
            raise ValueError(f"{resume} was made with other settings: " + ", ".join(f"--{k}={record['config'][k]}" for k in changed) + "; resume with the same")
    elif rank == 0:
        checkpoint.clear(out_dir, cfg.overwrite)
    first_step = record["step"] if resume else 0
    logger = Logger(cfg, rank, resume_step=first_step if resume else None)
    logger.print("\n".join([*data.report, f"{len(parts['train']):,} steps to train on, {len(parts['val']):,} held out; {num_params(agent):,} parameters"]))
    started = time.monotonic()

    # weights
    agent.init_weights(cfg.seed)
    if cfg.standardize and config.obs_size:
        known = data.obs[~held_out].astype(np.float64)
        agent.mean.data, agent.std.data = (torch.from_numpy(x).float() for x in (known.mean(0), known.std(0) + 1e-3))       # 1e-3: as CORL
    if resume or cfg.init:
        checkpoint.load_weights(resume or checkpoint.newest(cfg.init), agent)
    agent.to(device)
    if cfg.method == "bc":
        agent.v.requires_grad_(False), agent.q.requires_grad_(False)
    target = copy.deepcopy(agent.q).requires_grad_(False)
    optimizer = make_optimizer(agent, cfg.lr)
    if resume:
        checkpoint.restore(resume, agent, [optimizer])
        saved = checkpoint.load_extra(resume)
        for name, p in target.named_parameters():
            p.data.copy_(saved[f"target.{name}"])
    wrapped = parallelize(agent, "ddp", device, world_size)
    forward = torch.compile(wrapped) if cfg.compile else wrapped

    columns = [torch.from_numpy(x).to(device) for x in (data.obs, data.actions, data.rewards, data.next_obs, data.terminal)]
    batch_of = lambda index: [x[index] for x in columns]
    looked = {name: part[torch.randperm(len(part), generator=torch.Generator().manual_seed(random_key(cfg.seed, name)))[:10_000]].to(device)
              for name, part in parts.items() if len(part)}
    greedy = lambda obs: agent.greedy(torch.from_numpy(obs).to(device)).cpu().numpy()
    sums, results = {}, {}

    for step in range(first_step, cfg.num_steps + 1):
        last_step = step == cfg.num_steps

        # once in a while: the policy in its world, and what Q and V say of training and held-out steps
        if (last_step or (cfg.eval_every and step % cfg.eval_every == 0)) and rank == 0 and (step > first_step or not resume):
            results = {f"eval/{k}": v for k, v in played(cfg, data, greedy).items()}
            for name, index in looked.items():
                batch = batch_of(index)
                with torch.no_grad():
                    results[f"{name}/nll"] = float(-agent.logps(*batch[:2]).double().mean())
                if cfg.method == "iql":
                    results |= {f"{name}/{k}": v for k, v in critic_stats(cfg, agent, target, batch).items()}
            if cfg.method == "iql" and "eval/value" in results:
                with torch.no_grad():
                    at_start = data.mdp.initial @ agent.values(torch.arange(data.num_states, device=device)).double().cpu().numpy()
                results["eval/value_gap"] = float(at_start - results["eval/value"])
            logger.log(step, **results)
            logger.print(f"step {step:6d}/{cfg.num_steps} | " + " | ".join(f"{k} {v:.4g}" for k, v in results.items() if "_p" not in k))
        if last_step or (cfg.save_every and step > first_step and step % cfg.save_every == 0):
            path = checkpoint.save(out_dir, step, agent, None, [optimizer], state={}, config=asdict(cfg), rank=rank, world_size=world_size,
                                   extra={f"target.{name}": p for name, p in target.named_parameters()})
        if last_step:
            break

        # one global batch, with replacement: a function of (seed, step); each rank takes its part
        t0 = time.perf_counter()
        generator = torch.Generator().manual_seed(random_key(cfg.seed, "batch", step))
        chosen = parts["train"][torch.randint(len(parts["train"]), (cfg.batch_size,), generator=generator)][rank::world_size].to(device)
        groups = chosen.split(cfg.device_batch_size)
        logged = (step + 1) % cfg.log_every == 0
        totals = 0.0
        for i, index in enumerate(groups):
            set_gradient_sync(wrapped, i == len(groups) - 1)
            losses, found = losses_of(cfg, agent, forward, target, batch_of(index), cfg.batch_size)
            (losses.sum() * world_size).backward()                    # DDP averages over ranks, we want the sum
            if logged:
                totals = totals + torch.stack([*losses.detach(), *found.values()]).double()

        # update
        if logged:
            values = all_reduce_sum(totals).tolist()
            sums = dict(zip(["v_loss", "policy_loss", "q_loss", *found], values))
            for name, value in sums.items():
                check_finite(f"train/{name}", value)
        scale = 0.5 * (1 + math.cos(math.pi * step / cfg.num_steps)) if cfg.cosine else 1.0
        optimizer.param_groups[1]["lr"] = cfg.lr * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cfg.method == "iql":
            update_target(target, agent.q, cfg.rho)

        # log
        if logged:
            seconds = time.perf_counter() - t0
            logger.log(step + 1, **{f"train/{k}": v for k, v in sums.items()}, **{"train/policy_lr": cfg.lr * scale, "time/step": seconds,
                                                                                "time/steps_per_sec": cfg.batch_size / seconds})
        if (step + 1) % max(1, cfg.num_steps // 10) == 0 and sums:
            left = (time.monotonic() - started) / (step + 1 - first_step) * (cfg.num_steps - step - 1)
            logger.print(f"step {step + 1:6d}/{cfg.num_steps} | " + " | ".join(f"{k} {v:.4f}" for k, v in sums.items()) + f" | {format_seconds(left)} left")

    returns = dict(data_return=float(data.returns.mean()))
    summary = dict(name=cfg.name, checkpoint=str(path), parameters=num_params(agent), updates=cfg.num_steps, seconds=round(time.monotonic() - started, 1),
                   **returns, **normalized(cfg, returns), **results)
    logger.close(**summary)
    return summary


def main(cfg):
    cfg = resolved(cfg)
    return train_slate(cfg) if cfg.task == "slate" else train_offline(cfg)


if __name__ == "__main__":
    main(parse_config(Config))
