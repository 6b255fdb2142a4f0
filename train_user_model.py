"""A user model by expectation-maximisation: K latent types of user, from slate choices, comparisons, pairs and ratings (PASTA, arXiv 2412.10419).

With g_i(k) the posterior of user i's type given everything that i did, and p(x | k) as user_model.py has it,

    E    log g_i(k) = log pi_k + sum over all observations x of user i of log p(x | k) - logsumexp_k
    M    gradient steps on  - 1/N (sum_i sum_k g_i(k) sum_x log p(x | k) - shrink/2 sum_k |A_k - 1|^2),  g without a gradient;
         pi_k = (sum_i g_i(k) + prior_count) / (I + K prior_count)

for the I users of a step, all of them by default; of a mini-batch of users, pi takes a running mean. N is the number of observations of the step, and
|A_k - 1|^2 is meant as the squares of its two factors.

That EM, and types of user, are the paper's is known; how its user model was fitted is not, so what follows is ours: posteriors pooled over a user
(--pool=sample treats each observation as a user of its own: with more types than columns every observation then finds a type that fits, and tau runs
away), a single gradient step of Adam for each E-step (--m_steps), the bounds of tau and the alarm at them, annealing, and re-seeding of types that die.

One run: every --num_types, each with --restarts starts; of a start the step, and of a --num_types the start, that validation users find likeliest;
a table over --num_types on test users; the one that validation users find likeliest is the checkpoint. Users are split by a hash of their id.

    python train_user_model.py                                                       laptop, a synthetic world whose types are known
    python train_user_model.py --num_types=1,2,4,8,16,32 --restarts=2                         curves over K
    python train_user_model.py --data=log.jsonl --embeddings=clip.npz --single=pairs.jsonl    sessions and single-turn preferences from files
    torchrun --nproc_per_node=8 train_user_model.py --total_batch_size=4096 ...                the same flags, eight GPUs
"""
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import checkpoint
import sessions
import user_model
from common import Logger, all_reduce_sum, check_finite, format_seconds, lr_scale, parse_config, random_key, setup_distributed, write_atomically
from data import preferences, slate
from data.embeddings import check_same, load_embeddings
from data.packing import shuffled
from recommend import markdown
from user_model import Evidence, Origin, UserModel, UserModelConfig, evidence, select

FIT, VAL, TEST = 0, 1, 2


@dataclass(frozen=True)
class Config:
    name: str = "dummy"              # results go to out/<name>; any name but dummy also opens wandb
    seed: int = 0                    # decides the synthetic world, starts and the order of users
    # model
    num_types: str = "4"             # types of user K; several, comma-separated: each is fitted, a table compares them (ours)
    rank: int = 4                    # of A_k less the identity; 0: A_k is the identity (ours)
    agg: Literal["lse", "max", "mean"] = "lse"          # a column's worth from those of its images; raters judge by the best (ours)
    lse_temp: float = 0.1            # agg=lse: lower is nearer to the maximum (ours)
    change: bool = True              # learn c_k, what a type gives for an image unlike the turn's base (ours)
    closeness: bool = True           # learn a_k, how much the first wish counts beside a taste; false: 1 (ours)
    same: Literal["drop", "half"] = "drop"              # a pick "same" as the one before: no evidence, or half of better and half of worse (ours)
    # data
    data: str = "world"              # world: synthetic sessions; or session files (data/README.md), comma-separated
    embeddings: str = ""             # .npz files of the prompts and images that files name, comma-separated (data/embeddings.py)
    single: str = ""                 # files of pairs, ratings and rankings, comma-separated (data/preferences.py)
    truth: str = ""                  # .truth.jsonl of the sessions: types of users, for the evaluation alone
    num_users: int = 430             # world: users, of whom 70 % are fitted, 15 % validation, 15 % test (ours)
    num_sessions: int = 4            # world: sessions of each user (ours)
    half: Literal["all", "a", "b"] = "all"              # fit and select on one half of the users, by a hash: a and b share nobody; test users are the same
    # EM
    tastes: Literal["users", "random"] = "users"        # start at clusters of what users are drawn to, or in directions of chance (ours)
    restarts: int = 4                # starts of each num_types (ours)
    prior_count: float = 1.0         # users that each type is given in pi beforehand (ours)
    tau_init: float = 5.0            # tau at the start: inverse temperature of choices, pairs and comparisons (ours)
    shrink: float = 3.0              # draws A_k to the identity: a normal prior of this precision on up and down; 0: maximum likelihood (ours)
    rating_sigma: float = 1.0        # standard deviation of a rating at the start (ours)
    pool: Literal["user", "sample"] = "user"            # a type for each user (ours), or for each observation (PASTA, secondary)
    em_temp: float = 1.0             # posteriors are flattened by this at the start, linearly less until half of the steps; 1: never (ours)
    min_pi: float = 0.005            # a type under this begins anew at the users explained worst; 0: never (ours)
    m_step: Literal["adam", "backtrack"] = "adam"       # backtrack: halve each step until the M-step's sum does not fall: likelihood never does (ours)
    m_steps: int = 1                 # gradient steps for each E-step (ours)
    single_steps: int = 0            # first steps of a start, on --single alone; later ones have everything (ours)
    # length of the run and optimization
    num_steps: int = 100             # EM steps of each start (ours)
    device_batch_size: int = 1024    # rows per forward pass and device (users): lower when memory runs out, the result stays the same
    total_batch_size: int = 0        # users per step; 0: all
    lr: float = 0.05                 # peak rate of Adam (ours)
    decay_share: float = 0.3         # the last share of each start goes linearly to rate 0
    # machine
    dtype: Literal["float32", "float64"] = "float32"    # of the computation (and of the weights); posteriors are float64 always
    # looking and keeping
    eval_every: int = 10             # steps between evaluations on validation users; 0: only at the end
    save_every: int = 0              # steps between checkpoints; 0: only at the end
    resume: str = ""                 # latest, or a step folder: continue out/<name> exactly
    overwrite: bool = False          # delete the checkpoints of an earlier run of this name
    dry_run: bool = False            # print the resolved settings and the memory estimate, and stop


MAY_CHANGE = ("name", "save_every", "resume", "overwrite", "dry_run")


# -----------------------------------------------------------------------------
# The algorithm


def m_loss(g, logps, group, num):
    """- sum_i sum_k g_i(k) sum_x log p(x | k) / num, to minimize. g (U, K) without gradient, logps (R, K), group (R,) the row of g of each observation."""
    return -(g.detach()[group] * logps.double()).sum() / num


def penalty(model, shrink):
    """- log of the normal prior on the low rank of A_k, without its constant: 300 users cannot afford 2 r d numbers for each type."""
    return shrink / 2 * (model.up.double().square().sum() + model.down.double().square().sum())


def updated_prior(log_prior, counts, total, prior_count, share):
    """pi after an E-step, as log (K,): the mean of g over the step's users with the Dirichlet count, mixed into the pi before by the step's share of all
    users. counts (K,): sum of g over `total` users; share 1 is exact EM. The prior counts as much against a mini-batch as against all."""
    K, count = len(counts), prior_count * share
    pi = (counts + count) / (total + K * count)
    return torch.log((1 - share) * log_prior.double().softmax(0) + share * pi)


def temperature(step, num_steps, em_temp):
    """From em_temp linearly to 1 at half of the steps (deterministic annealing, Ueda & Nakano 1998)."""
    return 1 + (em_temp - 1) * max(0.0, 1 - 2 * step / num_steps)


# -----------------------------------------------------------------------------
# Data of a run


class Data(NamedTuple):
    """Everything, and who is in which part. types are for the evaluation alone."""
    everyone: Evidence | None
    user_ids: list
    part: np.ndarray            # (U,) FIT, VAL or TEST; -1: of the other half
    types: np.ndarray | None    # (U,) true types, -1 where unknown
    embeddings: str             # name of the encoder


def open_log(cfg):
    """-> (user ids, Observations | None, pairs dict | None, ratings dict | None, types (U,) | None, name of the encoder)."""
    if cfg.data == "world":
        world = slate.World(cfg.seed)
        found = sessions.world_log(world, cfg.seed, num_users=cfg.num_users, num_sessions=cfg.num_sessions)
        types = np.zeros(cfg.num_users, np.int64)
        types[found.log.user] = found.kind
        return found.log.user_ids, slate.observations(found.log, found.ids, found.emb), None, None, types, world.name
    files = [load_embeddings(path) for path in cfg.embeddings.split(",") if path]
    if not files:
        raise ValueError("--embeddings is empty: expected the .npz files of the prompts and images that --data and --single name")
    for other in files[1:]:
        check_same(files[0], other)
    ids, emb = [name for f in files for name in f.ids], files[0].emb if len(files) == 1 else np.concatenate([f.emb for f in files])
    if len(set(ids)) < len(ids):
        raise ValueError(f"--embeddings={cfg.embeddings}: {len(ids) - len(set(ids)):,} ids are in two of the files")
    users, observations, types, pairs, ratings = {}, None, None, None, None
    if cfg.data:
        log = slate.joined([slate.read(path, one_per_category=False) for path in cfg.data.split(",")])
        users = {name: i for i, name in enumerate(log.user_ids)}
        observations = slate.observations(log, ids, emb)
        if cfg.truth:
            types = np.full(len(users), -1)
            types[log.user] = slate.read_truth(cfg.truth, log)[0]
    if cfg.single:
        pairs, ratings = preferences.arrays(preferences.read(cfg.single.split(",")), ids, emb, users)
    return list(users), observations, pairs, ratings, types, files[0].model


def open_data(cfg, device, dtype):
    user_ids, observations, pairs, ratings, types, encoder = open_log(cfg)
    everyone = evidence(len(user_ids), observations, pairs and user_model.Pairs(**pairs), ratings and user_model.Ratings(**ratings), dtype, device)
    part = slate.parts_of(user_ids)
    if cfg.half != "all":
        in_a = np.array([random_key("half", name) % 2 == 0 for name in user_ids])
        part = np.where((part == TEST) | (in_a == (cfg.half == "a")), part, -1)
    for number, name in enumerate(("fit", "validation", "test")):
        if not (part == number).any():
            raise ValueError(f"{len(user_ids)} users: none is in the {name} part, which a hash of the id decides; expected more users")
    if types is not None:
        types = np.append(types, np.full(len(user_ids) - len(types), -1))
    return Data(everyone, user_ids, part, types, encoder)


def without_sessions(data):
    """The users with pairs or ratings, and these alone."""
    users = torch.cat([data.pairs.user, data.ratings.user]).unique()
    if not len(users):
        raise ValueError("--single_steps: no user in the fit part has a pair or a rating")
    nothing = type(data.observations)(*(column[:0] for column in data.observations))
    return select(data._replace(observations=nothing), users.cpu())


# -----------------------------------------------------------------------------


def check(cfg):
    """-> [K, ..] of --num_types."""
    try:
        types = [int(k) for k in cfg.num_types.split(",")]
    except ValueError:
        types = []
    if not types or min(types) < 1 or len(set(types)) < len(types):
        raise ValueError(f"--num_types={cfg.num_types}: expected different whole numbers from 1, comma-separated")
    for key, least in dict(rank=0, restarts=1, num_steps=1, m_steps=1, single_steps=0, total_batch_size=0, device_batch_size=1, eval_every=0, save_every=0,
                           prior_count=0, shrink=0, min_pi=0, em_temp=1, num_users=1, num_sessions=1).items():
        if getattr(cfg, key) < least:
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected at least {least}")
    for key in ("lr", "lse_temp", "rating_sigma"):
        if not 0 < getattr(cfg, key) < math.inf:
            raise ValueError(f"--{key}={getattr(cfg, key)}: expected above 0")
    low, high = user_model.TAU_RANGE
    if not low <= cfg.tau_init <= high:
        raise ValueError(f"--tau_init={cfg.tau_init}: expected from {low} to {high}")
    if cfg.min_pi * max(types) > 0.5:
        raise ValueError(f"--min_pi={cfg.min_pi}: {max(types)} types have {1 / max(types):.3g} each on average, expected at most half of that")
    if cfg.m_step == "backtrack" and cfg.total_batch_size:
        raise ValueError(f"--m_step=backtrack: a mini-batch's likelihood is not the data's, expected --total_batch_size=0, found {cfg.total_batch_size}")
    if not cfg.data and not cfg.single:
        raise ValueError("--data and --single are empty: expected sessions, or single-turn preferences, or both")
    if cfg.single and cfg.data == "world":
        raise ValueError("--single: its ids are not of the synthetic world: --data= for single-turn preferences alone, or session files")
    if cfg.single_steps and not (cfg.single and cfg.data):
        raise ValueError(f"--single_steps={cfg.single_steps}: expected both --single and --data, whose turns come later")
    if cfg.truth and (cfg.data == "world" or not cfg.data):
        raise ValueError("--truth: expected session files in --data; the synthetic world knows its types")
    return types


def sum_gradients(params):
    """Over ranks, in one message. What a rank did not use, the ratings' scale or everything where it has no user, counts as 0 there."""
    flat = all_reduce_sum(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params]))
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad = part.view_as(p)


def train(cfg):
    rank, _, world_size, device = setup_distributed()
    all_types = check(cfg)
    dtype = getattr(torch, cfg.dtype)
    data = open_data(cfg, device, dtype)
    parts = [select(data.everyone, np.flatnonzero(data.part == number)) for number in (FIT, VAL, TEST)]
    true_types = None if data.types is None else data.types[data.part == TEST]
    turns, width = data.everyone.observations.images.shape, data.everyone.pairs.prompt.shape[1]
    counts = {name: len(part.user) for name, part in zip(Evidence._fields, data.everyone[:3])}
    size_of_data = sum(t.numel() * t.element_size() for part in data.everyone[:3] for t in part)
    data = data._replace(everyone=None)                              # the parts are copies
    out_dir = Path("out") / cfg.name
    resume = checkpoint.find(out_dir, cfg.resume)
    stages = [(K, start) for K in all_types for start in range(cfg.restarts if K > 1 else 1)]           # one type has no posterior to get wrong
    total = len(stages) * cfg.num_steps
    if rank == 0:
        print(", ".join(f"{n:,} {name}" for name, n in counts.items() if n) + f" of {len(data.user_ids):,} users; "
              + ", ".join(f"{part.num_users:,} {name}" for name, part in zip(("fit", "validation", "test"), parts)), flush=True)
    if cfg.dry_run:
        K, images = max(all_types), math.prod(turns[:3]) + 2 * counts["pairs"] + counts["ratings"]
        rows = images * min(cfg.device_batch_size, parts[FIT].num_users) / len(data.user_ids)
        size, item = K * width * (2 * cfg.rank + 1), dtype.itemsize
        bytes_of = dict(weights=size * item, gradients=size * item, optimizer=2 * size * item, activations=rows * K * (4 * cfg.rank + 6) * item,
                        data=2 * size_of_data)
        summary = asdict(cfg) | dict(width=width, stages=[f"K={K} start {start}" for K, start in stages], steps=total, **counts,
                                     memory_mb={k: round(v / 2**20, 3) for k, v in bytes_of.items()})
        if rank == 0:
            print(json.dumps(summary))
        return summary

    origin = Origin(data.embeddings, cfg.half, cfg.data or cfg.single)
    state = dict(stage=0, step=0, best={}, results=[], reseeded={}, at_bound=[])
    if resume:
        record = checkpoint.read_record(resume)
        if changed := [k for k, v in record["config"].items() if k not in MAY_CHANGE and getattr(cfg, k, v) != v]:
            raise ValueError(f"{resume} was made with other settings: " + ", ".join(f"--{k}={record['config'][k]}" for k in changed) + "; resume with the same")
        state = record["state"]
    elif rank == 0:
        checkpoint.clear(out_dir, cfg.overwrite)
    begun_at = state["stage"] * cfg.num_steps + state["step"]
    logger = Logger(cfg, rank, resume_step=begun_at if resume else None)
    started = time.monotonic()
    alone = without_sessions(parts[FIT]) if cfg.single_steps else None

    for number in range(state["stage"], len(stages)):
        (K, start), begun = stages[number], number == state["stage"] and resume
        label, folder = f"K={K} start {start}", f"types_{K}"
        if begun:
            model, _ = user_model.load_user_model(resume, device, dtype)
        else:
            config = UserModelConfig(K, width, cfg.rank, cfg.agg, cfg.lse_temp, change=cfg.change, closeness=cfg.closeness, same=cfg.same)
            ratings = parts[FIT].ratings.rating
            model = UserModel(config).to(dtype).init_weights(random_key(cfg.seed, "start", K, start), cfg.tau_init, cfg.rating_sigma,
                                                             float(ratings.mean()) if len(ratings) else 0.0).to(device)
            if cfg.tastes == "users" and K > 1:
                user_model.spread(model, parts[FIT], random_key(cfg.seed, "clusters", K, start))
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(params, lr=cfg.lr, betas=(0.9, 0.98))
        first_step = 0
        if begun:
            checkpoint.restore(resume, model, [optimizer])
            first_step = state["step"]

        for step in range(first_step, cfg.num_steps + 1):
            last_step, g_step = step == cfg.num_steps, number * cfg.num_steps + step

            # once in a while: how likely validation users are; the likeliest step of all starts stays
            if (last_step or (cfg.eval_every and step % cfg.eval_every == 0)) and not (begun and step == first_step):
                found, _ = user_model.evaluate(model, parts[VAL])
                result = dict(types=K, start=start, step=step, loss=found["loss"], **model.describe())
                if true_types is not None:                           # looked at, never selected by
                    result |= recovered(model, parts[TEST], true_types)
                state["results"].append(result)
                best = state["best"].get(str(K))
                if best is None or found["loss"] < best["loss"]:
                    state["best"][str(K)] = dict(loss=found["loss"], start=start, step=step)
                    with checkpoint.together():
                        if rank == 0:
                            checkpoint.save_hf(model, origin, out_dir / folder)
                if step:                                             # step 0 has the number of the last step of the start before
                    logger.log(g_step, **{"val/loss": found["loss"]}, **{f"val/{key}": value for key, value in found["filtered"].items() if value is not None},
                               **{f"test/{key}": result[key] for key in ("ari", "accuracy") if key in result})
                if names := model.at_bound():
                    state["at_bound"] = sorted({*state["at_bound"], *(f"K={K} {name}" for name in names)})
                    logger.print(f"{label} step {step}: tau of {', '.join(names)} is at a bound of {user_model.TAU_RANGE}: the likelihood has run away "
                                 "(fewer --num_types, --pool=user), or these observations say nothing")
                if last_step:
                    said = found["filtered"] | {key: result[key] for key in ("ari",) if key in result}
                    logger.print(f"{label} | val loss {found['loss']:.4f} | " + " | ".join(f"{k} {v:.3f}" for k, v in said.items() if v is not None))
            if cfg.save_every and step > first_step and g_step % cfg.save_every == 0:
                checkpoint.save(out_dir, g_step, model, origin, [optimizer], state=state | dict(stage=number, step=step), config=asdict(cfg), rank=rank,
                                world_size=world_size)
            if last_step:
                break

            # one global batch of whole users, a function of (seed, start, step)
            t0 = time.perf_counter()
            source = alone if step < cfg.single_steps else parts[FIT]
            size = min(cfg.total_batch_size or source.num_users, source.num_users)
            places = np.arange(step * size, (step + 1) * size)
            chosen = np.unique(shuffled(places, source.num_users, cfg.seed, "users", K, start))           # where two shuffles meet, a user may come twice
            batch = source if len(chosen) == source.num_users else select(source, chosen)
            num, share = user_model.num_observations(batch), len(chosen) / source.num_users
            mine = np.arange(rank, batch.num_users, world_size)
            groups = [mine[i:i + cfg.device_batch_size] for i in range(0, len(mine), cfg.device_batch_size)]
            blocks = [batch if len(users) == batch.num_users else select(batch, users) for users in groups]

            # E
            temp, posteriors = temperature(step, cfg.num_steps, cfg.em_temp), []
            sums = torch.zeros(K + 3, dtype=torch.float64, device=device)                                  # of g; then log-likelihood, entropy, users
            fits = torch.zeros(batch.num_users, dtype=torch.float64, device=device)
            for inner in range(cfg.m_steps):
                losses = torch.zeros((), dtype=torch.float64, device=device)
                for i, block in enumerate(blocks):
                    logps, user = user_model.all_likelihoods(model, block)
                    if inner == 0:
                        rows, members = (user, block.num_users) if cfg.pool == "user" else (torch.arange(len(user), device=device), len(user))
                        joint = user_model.joint(model, logps, rows, members)
                        posteriors.append(((joint / temp).softmax(1), rows))
                        likelihood = joint.logsumexp(1)
                        sums[:K] += posteriors[i][0].sum(0)
                        sums[K:] += torch.stack([likelihood.sum(), user_model.entropy(posteriors[i][0]).sum(), torch.tensor(float(members)).to(joint)])
                        seen = torch.bincount(user, minlength=block.num_users).clamp(min=1)
                        per_user = torch.zeros(block.num_users, dtype=torch.float64, device=device)
                        fits[groups[i]] = per_user.index_add_(0, user if cfg.pool == "sample" else torch.arange(members, device=device), likelihood) / seen

                    # M
                    g, rows = posteriors[i]
                    loss = m_loss(g, logps, rows, num)
                    losses += loss.detach()
                    loss.backward()
                held = penalty(model, cfg.shrink) * share / num                            # once, not once a rank; its share of a mini-batch
                (held / world_size).backward()
                losses = all_reduce_sum(losses) + held.detach()
                sum_gradients(params)
                for group in optimizer.param_groups:
                    group["lr"] = cfg.lr * lr_scale(step, cfg.num_steps, 0, cfg.decay_share)
                before = [p.detach().clone() for p in params]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                model.project()
                halvings = backtrack(model, optimizer, before, blocks, posteriors, num, cfg.shrink, losses) if cfg.m_step == "backtrack" else 0
            sums, fits = all_reduce_sum(sums), all_reduce_sum(fits)
            likelihood, uncertain, members = sums[K:].tolist()
            check_finite("train/loss", likelihood)
            model.log_prior.data.copy_(updated_prior(model.log_prior, sums[:K], members, cfg.prior_count, share))

            # a type that has died begins anew: one at a time, every tenth step, while there is time to learn
            pi = model.log_prior.double().softmax(0)
            if step % 10 == 9 and step < 0.6 * cfg.num_steps and float(pi.min()) < cfg.min_pi:
                k = int(pi.argmin())
                user_model.reseed(model, k, batch, fits, random_key(cfg.seed, "reseed", K, start, step))
                forget(optimizer, [model.down, model.up, model.taste, model.change], k)
                state["reseeded"][str(K)] = state["reseeded"].get(str(K), 0) + 1

            # log
            seconds, facts = time.perf_counter() - t0, model.describe()
            logger.log(g_step + 1, **{"train/loss": -likelihood / num, "train/penalty": float(held.detach()), "train/posterior_entropy": uncertain / members,
                                      "train/halvings": halvings, "train/reseeded": state["reseeded"].get(str(K), 0),
                                      "train/lr": optimizer.param_groups[0]["lr"]},
                       **{f"train/{key}": value for key, value in facts.items()}, **{"time/step": seconds, "time/users_per_sec": len(chosen) / seconds})
            if (step + 1) % max(1, cfg.num_steps // 4) == 0:
                left = (time.monotonic() - started) / (g_step + 1 - begun_at) * (total - g_step - 1)
                logger.print(f"{label} step {step + 1:4d}/{cfg.num_steps} | loss {-likelihood / num:.4f} | entropy of pi {facts['entropy_pi']:.3f} | "
                             f"min pi {facts['min_pi']:.3f} | tau {facts['tau_choice']:.2f} | {1000 * seconds:.0f} ms | {format_seconds(left)} left")
    state |= dict(stage=len(stages), step=0)
    return finish(cfg, turns[1], parts, true_types, all_types, state, origin, device, dtype, logger, started, rank, world_size, total)


@torch.no_grad()
def backtrack(model, optimizer, before, blocks, posteriors, num, shrink, loss):
    """Halves the step that led here until the M-step's loss is at most what it was -> how often. After 30 halvings the weights stay, and the moments are
    forgotten, so that the next step is along the gradient, which does go down."""
    params, reached = [p for p in model.parameters() if p.requires_grad], None
    for halvings in range(31):
        now = sum((m_loss(g, user_model.all_likelihoods(model, block)[0], rows, num) for block, (g, rows) in zip(blocks, posteriors)),
                  torch.zeros_like(loss))
        if all_reduce_sum(now) + penalty(model, shrink) / num <= loss:
            return halvings
        if reached is None:
            reached = [p.clone() for p in params]
        for p, a, b in zip(params, before, reached):
            p.copy_(a + (b - a) * 0.5 ** (halvings + 1) if halvings < 30 else a)
    optimizer.state.clear()
    return 31


def forget(optimizer, params, k):
    """Adam's moments of type k."""
    for p in params:
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimizer.state.get(p, {}):
                optimizer.state[p][key][k] = 0.0


def recovered(model, data, types):
    """Recovery of the users whose type is known."""
    known = types >= 0
    return user_model.recovery(types[known], user_model.evaluate(model, data)[1][known]) if known.any() else {}


def finish(cfg, slots, parts, true_types, all_types, state, origin, device, dtype, logger, started, rank, world_size, total):
    """A row of test users for each --num_types; the likeliest by validation is the checkpoint."""
    rows, test = [], {}
    for K in all_types:
        model, _ = user_model.load_user_model(logger.out_dir / f"types_{K}", device, dtype)
        test[K], _ = user_model.evaluate(model, parts[TEST])
        if true_types is not None:
            test[K] |= recovered(model, parts[TEST], true_types)
        test[K] |= model.describe() | dict(val_loss=state["best"][str(K)]["loss"], reseeded=state["reseeded"].get(str(K), 0))
    best = min(all_types, key=lambda K: (state["best"][str(K)]["loss"], K))
    model, _ = user_model.load_user_model(logger.out_dir / f"types_{best}", device, dtype)
    saved = checkpoint.save(logger.out_dir, total, model, origin, [], state=state, config=asdict(cfg), rank=rank, world_size=world_size)
    columns = [key for key in ("choice_accuracy", "choice_loss", "compare_accuracy", "pair_accuracy", "spearman") if key in test[best]["filtered"]]
    cell = lambda x: "-" if x is None else f"{x:.4f}" if isinstance(x, float) else str(x)
    header = ["types", "val loss", "test loss", *(f"{name} {key}" for key in columns for name in ("prior", "filtered")),
              *(["adjusted Rand", "matched"] if "ari" in test[best] else []), "entropy of pi", "min pi", "tau", "re-seeded"]
    for K in all_types:
        t = test[K]
        values = [t["val_loss"], t["loss"], *(t[name].get(key) for key in columns for name in ("prior", "filtered")),
                  *((t["ari"], t["accuracy"]) if "ari" in t else ()), t["entropy_pi"], t["min_pi"], t["tau_choice"], t["reseeded"]]
        rows.append([f"**{K}**" if K == best else str(K), *map(cell, values)])
    if rank == 0:
        fit, val, held_out = (f"{part.num_users:,}" for part in parts)
        lines = [f"# User model of {cfg.data or cfg.single}\n", f"{fit} users fitted, {val} validation, {held_out} test. Steps, starts and the number of types "
                 "are selected on validation alone. Loss: minus log-likelihood per observation, in nats"
                 + (f"; choices are among {slots} columns: chance is {1 / slots:.3f}, {math.log(slots):.3f} nats" if slots > 1 else "") + ".\n",
                 "prior: the types' shares alone. filtered: after the user's earlier observations, never this one or a later one.\n", markdown(header, rows)]
        if state["at_bound"]:
            lines.append(f"**tau was at a bound**: {', '.join(state['at_bound'])}. Its likelihood ran away, or such observations say nothing.\n")
        if "by_nth" in test[best]:
            shown = [n for n in (0, 1, 2, 4, 9, 19, 49) if n < len(test[best]["by_nth"]["choice_accuracy"])]
            lines += [f"{best} types, by how many observations of the user came before:\n", markdown(["before", *map(str, shown)], [
                [name, *(cell(values[n]) for n in shown)] for name, values in (
                    ("choice accuracy", test[best]["by_nth"]["choice_accuracy"]), ("choice loss", test[best]["by_nth"]["choice_loss"]),
                    ("entropy of the posterior", test[best]["entropy_by_nth"]))])]
        write_atomically(logger.out_dir / "report.md", "\n".join(lines) + "\n")
        write_atomically(logger.out_dir / "results.json", json.dumps(dict(best=best, test={str(K): t for K, t in test.items()}, selected=state["best"],
                                                                          results=state["results"], config=asdict(cfg))) + "\n")
        user_model.picture(state["results"], test, best, logger.out_dir / "user_model.png")
        logger.picture(total, "user_model", logger.out_dir / "user_model.png")
        print("\n".join(lines), flush=True)
    summary = dict(name=cfg.name, checkpoint=str(saved), types=best, seconds=round(time.monotonic() - started, 1), at_bound=state["at_bound"],
                   test={str(K): {k: v for k, v in t.items() if not k.startswith(("by_", "entropy_by"))} for K, t in test.items()})
    logger.close(**summary)
    return summary


def main(cfg):
    return train(cfg)


if __name__ == "__main__":
    main(parse_config(Config))
