"""Implicit Q-learning (IQL, arXiv 2110.06169) on logged steps (s, a, r, s'): Q never sees an action that the log has not.

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

beta <= 0 is refused: at 0 all weights are 1 and the policy is a clone that no value changes, below 0 it prefers what v thinks is worse. For a clone
say --method=bc.

    python train_iql.py --task=offline --data=cartpole                      laptop: return 438 (+- 36, five seeds) from data of return 22; --method=bc: 22
    python train_iql.py --task=offline --data=sepsis --gamma=1 --expectile=.9        a tabular world whose policies are valued exactly
    python train_iql.py --task=offline --data=hopper_medium-v2.hdf5 --reward=locomotion --num_steps=1e6
    torchrun --nproc_per_node=8 train_iql.py --task=offline --data=log.npz --batch_size=2048         the same flags, eight GPUs
"""
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

import checkpoint
from common import Logger, all_reduce_sum, check_finite, format_seconds, parse_config, random_key, setup_distributed
from data import offline
from model import num_params, parallelize, set_gradient_sync


@dataclass(frozen=True)
class Config:
    name: str = "dummy"              # results go to out/<name>; any name but dummy also opens wandb
    seed: int = 0                    # decides generated data, weights and order
    task: Literal["slate", "offline"] = "offline"       # slate: an agent that shows slates to people; offline: plain IQL on a log of steps
    # model
    init: str = ""                   # checkpoint folder, or out/<name>, whose networks to start from
    width: int = 256                 # units of a hidden layer (IQL)
    depth: int = 2                   # hidden layers (IQL)
    # data
    data: str = "cartpole"           # cartpole | walks | sepsis | icu_sepsis | FILE.npz, .hdf5, .csv (data/README.md)
    num_episodes: int = -1           # of generated data; auto: 1,500 of cartpole, 1,000 walks, 20,000 of sepsis
    reward: Literal["raw", "antmaze", "locomotion"] = "raw"     # files: as they are; minus 1; times 1000 / (best - worst return) (IQL)
    standardize: bool = True         # shift and scale each coordinate of the state to mean 0 and deviation 1 (CORL; IQL does not)
    val_share: float = 0.1           # share of episodes held out
    env: str = ""                    # files: gymnasium environment in which the greedy policy is played, if gymnasium is installed
    num_games: int = 100             # episodes of an evaluation that plays
    score_random: float = 0.0        # with score_expert: returns that are 0 and 100 of the normalised score
    score_expert: float = 0.0        # the other end; equal to score_random: no normalised score
    # the algorithm
    method: Literal["iql", "bc"] = "iql"                # bc: clone the log, no Q and no V
    expectile: float = 0.7           # of V over the log's actions: .5 their mean, towards 1 their maximum; antmaze .9 (IQL)
    gamma: float = 0.99              # discount (IQL); sepsis: 1
    beta: float = 3.0                # of advantages in the policy's weights: higher is greedier, lower nearer to BC; antmaze 10 (IQL)
    weight_clip: float = 100.0       # bound on a weight of the policy (IQL)
    rho: float = 0.005               # share of Q that the target network takes over in a step (IQL)
    # length of the run and optimization
    num_steps: int = 6000            # updates; IQL has 1e6 on D4RL
    batch_size: int = 256            # steps of the log per update (IQL)
    device_batch_size: int = 256     # rows per forward pass and device: lower when memory runs out, the result stays the same
    lr: float = 3e-4                 # rate of Adam (IQL)
    cosine: bool = True              # the policy's rate falls to 0 along a cosine; those of Q and V stay (IQL)
    # machine
    compile: bool = False            # torch.compile the model
    # looking and keeping
    log_every: int = 100             # updates between lines of metrics
    eval_every: int = 1000           # updates between evaluations; 0: only at the end
    save_every: int = 0              # steps between checkpoints; 0: only at the end
    resume: str = ""                 # latest, or a step folder: continue out/<name> exactly
    overwrite: bool = False          # delete the checkpoints of an earlier run of this name
    dry_run: bool = False            # print the resolved settings and the memory estimate, and stop


MAY_CHANGE = ("name", "log_every", "save_every", "resume", "overwrite", "dry_run", "compile")
QUANTILES = (0.05, 0.5, 0.95)


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
# The networks


class MLP(nn.Module):
    """num_heads networks side by side, ReLU between layers. x (N, sizes[0]) float, or (N,) int64, a row of the identity each -> (H, N, sizes[-1])."""

    def __init__(self, sizes, num_heads=1):
        super().__init__()
        shapes = list(zip(sizes, sizes[1:]))
        self.weights = nn.ParameterList(torch.empty(num_heads, i, o) for i, o in shapes)
        self.biases = nn.ParameterList(torch.empty(num_heads, 1, o) for _, o in shapes)

    def init_weights(self, generator):
        for w, b in zip(self.weights, self.biases):                   # uniform within 1 / sqrt(inputs), as torch.nn.Linear has it
            for p in (w, b):
                p.data.uniform_(-w.shape[1] ** -0.5, w.shape[1] ** -0.5, generator=generator)

    def forward(self, x):
        w, b = self.weights[0], self.biases[0]
        x = torch.baddbmm(b, x.expand(len(w), *x.shape), w) if x.is_floating_point() else w[:, x] + b
        for w, b in zip(list(self.weights)[1:], list(self.biases)[1:]):
            x = x.relu_()
            # one output: a batched product by a column has a slow path on CPUs (two heads of 256, both ways: 446 us, so 110 us)
            x = (x * w.mT).sum(-1, keepdim=True) + b if w.shape[-1] == 1 else torch.baddbmm(b, x, w)
        return x


@dataclass(frozen=True)
class OfflineAgentConfig:
    num_states: int                  # 0: states are vectors of obs_size
    obs_size: int
    num_actions: int                 # 0: actions are vectors of action_size
    action_size: int
    width: int
    depth: int
    num_heads: int = 2               # of Q


class OfflineAgent(nn.Module):
    """Q with H heads, V and the policy: three multilayer perceptrons that share nothing.

    Numbered actions: Q has one output for each and the policy is categorical. Vectors: Q reads [s, a], the policy is Gaussian with mean tanh and a deviation
    that does not depend on the state, not squashed.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        inputs, outputs, hidden = c.num_states or c.obs_size, c.num_actions or c.action_size, [c.width] * c.depth
        self.v = MLP([inputs, *hidden, 1])
        self.q = MLP([inputs, *hidden, c.num_actions] if c.num_actions else [inputs + c.action_size, *hidden, 1], c.num_heads)
        self.policy = MLP([inputs, *hidden, outputs])
        self.log_std = nn.Parameter(torch.empty(c.action_size), requires_grad=not c.num_actions)     # DDP waits for whatever asks for a gradient
        self.mean, self.std = (nn.Parameter(torch.empty(c.obs_size), requires_grad=False) for _ in range(2))      # of the data, kept with the weights

    def init_weights(self, seed):
        generator = torch.Generator().manual_seed(random_key(seed, "weights"))
        for part in (self.v, self.q, self.policy):
            part.init_weights(generator)
        self.log_std.data.zero_()
        self.mean.data.zero_(), self.std.data.fill_(1.0)
        return self

    def encode(self, obs):
        return obs if self.config.num_states else (obs - self.mean) / self.std

    def values(self, obs):
        """-> (N,)."""
        return self.v(self.encode(obs))[0, :, 0]

    def qs(self, net, obs, actions):
        """net: self.q or its target -> (H, N), of the given actions."""
        if self.config.num_actions:
            return net(self.encode(obs)).gather(2, actions[None, :, None].expand(self.config.num_heads, -1, 1))[..., 0]
        return net(torch.cat([self.encode(obs), actions], 1))[..., 0]

    def logps(self, obs, actions):
        """-> (N,) log pi(a|s)."""
        out = self.policy(self.encode(obs))[0]
        if self.config.num_actions:
            return out.log_softmax(-1).gather(1, actions[:, None])[:, 0]
        log_std = self.log_std.clamp(-5.0, 2.0)                       # as the authors' code
        z = (actions - out.tanh()) * (-log_std).exp()
        return -0.5 * z.square().sum(1) - (log_std + 0.5 * math.log(2 * math.pi)).sum()

    @torch.no_grad()
    def greedy(self, obs):
        """-> the likeliest action: (N,) int64 or (N, A)."""
        out = self.policy(self.encode(obs))[0]
        return out.argmax(-1) if self.config.num_actions else out.tanh()

    def forward(self, obs, actions, next_obs, method):
        """-> log pi(a|s) (N,), v(s) (N,), v(s') (N,) without gradient, q(s, a) (H, N); method bc: the first, and None."""
        logps = self.logps(obs, actions)
        if method == "bc":
            return logps, None, None, None
        with torch.no_grad():
            v_next = self.values(next_obs)
        return logps, self.values(obs), v_next, self.qs(self.q, obs, actions)


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
# Looking


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


def check(cfg):
    if cfg.task != "offline":
        raise ValueError(f"--task={cfg.task}: only --task=offline is there")
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


def train(cfg):
    rank, _, world_size, device = setup_distributed()
    check(cfg)
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
    return train(cfg)


if __name__ == "__main__":
    main(parse_config(Config))
