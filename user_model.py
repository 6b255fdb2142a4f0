"""What people want to see, as K latent types of user over embeddings such as CLIP's (the user model of PASTA, arXiv 2412.10419), and what it is worth.

A user has one type k for ever. An image I is worth, to a user of type k who began with the prompt `start` and sees a turn that began with `base`,

    s_k = a_k cos(A_k start, A_k I) + w_k . I + c_k (1 - cos(base, I))
    A_k = identity + up_k down_k of low rank, |w_k| = 1, 0 < a_k = 2 sigmoid(.) < 2, c_k = 2 tanh(.)

The last term is ours: the charm of what is unlike the picture before, for better or worse, which lasts one turn; change=False leaves it out. So is a_k, how
much the wish that the user began with counts beside a taste; closeness=False holds it at 1. Beside
a single prompt (pairs, ratings) start and base are that prompt. A column of M images is worth R_k = agg_m s_k (raters go by the best image:
agg=lse is a soft maximum), and what a user of type k does is

    choice      P(c) = softmax over columns of tau R_k              tau multiplies, an inverse temperature, in [.1, 100]
    compare     P(this pick is better than the last) = sigmoid(tau_compare (R_k,t(c_t) - R_k,t-1(c_t-1)))
    pair        P(a over b) = sigmoid(tau_pair (s_a - s_b)), a label of 1/2 is half of each
    rating      y ~ Normal(slope s + offset, sigma^2), slope > 0

R is bounded by a_k + 1 + 2 |c_k| <= 7, since of tau R only the product is seen. The E-step pools log-likelihoods over ALL observations of a user:

    log g_i(k) = log pi_k + sum over the observations x of user i of log p(x | k) - logsumexp_k

Shared by train_user_model.py, which fits it, and whatever simulates or reads users. Legend: N observations, U users, L columns, M images of each, P images
of an observation, K types, D width of the embeddings (float, of unit norm).
"""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
from calibration import save_figure
from common import write_atomically
from data.slate import Observations

TAU_RANGE = (0.1, 100.0)
TAUS = ("choice", "pair", "compare")
BETTER, SAME, WORSE, NOT_ASKED = 1, 0, -1, 2


class Pairs(NamedTuple):
    """Two images to one prompt, ordered by user."""
    user: np.ndarray            # (N,) int64
    prompt: np.ndarray          # (N, D)
    image_a: np.ndarray         # (N, D)
    image_b: np.ndarray         # (N, D)
    label: np.ndarray           # (N,) 1: a is preferred, 0: b, .5: neither
    weight: np.ndarray          # (N,) the pairs of one ranking weigh 1 together


class Ratings(NamedTuple):
    """Images rated one by one, ordered by user."""
    user: np.ndarray            # (N,) int64
    prompt: np.ndarray          # (N, D)
    image: np.ndarray           # (N, D)
    rating: np.ndarray          # (N,)


class Evidence(NamedTuple):
    """All that is known of U users. A part that there is none of has 0 rows. Every user has a row somewhere, or is explained by the prior alone."""
    observations: Observations
    pairs: Pairs
    ratings: Ratings
    num_users: int


def evidence(num_users, observations=None, pairs=None, ratings=None, dtype=torch.float32, device="cpu"):
    """The parts there are (arrays) -> Evidence of tensors: embeddings, labels, weights and ratings in dtype, the rest int64. Checked: ValueError names
    the part, the row, and what was expected."""
    width = next((part[1].shape[-1] for part in (observations, pairs, ratings) if part is not None), None)
    if width is None:
        raise ValueError("no evidence: expected observations, pairs or ratings")
    none = lambda *shape: np.zeros((0, *shape), np.float32)
    index = np.zeros(0, np.int64)
    parts = (observations if observations is not None else Observations(index, none(width), none(width), none(1, 1, width), *[index] * 5),
             pairs if pairs is not None else Pairs(index, none(width), none(width), none(width), none(), none()),
             ratings if ratings is not None else Ratings(index, none(width), none(width), none()))
    parts = [kind(*part) for kind, part in zip((Observations, Pairs, Ratings), parts)]
    for part in parts:
        check(part, num_users, width)

    def tensor(name, value):
        value = np.require(value, requirements="W")                            # torch warns of what it cannot write to
        if value.ndim > 1:                                                    # a norm of 1 as exact as dtype has it
            return F.normalize(torch.as_tensor(value, dtype=dtype, device=device), dim=-1)
        return torch.as_tensor(value, dtype=dtype if name in ("label", "weight", "rating") else torch.int64, device=device)
    return Evidence(*(type(part)(*(tensor(name, value) for name, value in part._asdict().items())) for part in parts), num_users)


def check(part, num_users, width):
    """ValueError: which column and row of an Observations, Pairs or Ratings (arrays) is not as its class says."""
    what = type(part).__name__.lower()

    def stop(name, wrong, expected, shown="{}", values=None):
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            value = np.asarray(getattr(part, name) if values is None else values)[row]
            raise ValueError(f"{what}, row {row}: {name} {shown.format(value)}, expected {expected}")
    for name, value in part._asdict().items():
        value = np.asarray(value)
        if len(value) != len(part.user):
            raise ValueError(f"{what}: {len(value)} rows of {name}, {len(part.user)} of user")
        if value.ndim > 1:
            if value.shape[-1] != width or value.ndim != (4 if name == "images" else 2):
                raise ValueError(f"{what}: {name} has the shape {value.shape}, expected embeddings of width {width}")
            norms = np.linalg.norm(value, axis=-1).reshape(len(value), int(np.prod(value.shape[1:-1])))
            far = norms[np.arange(len(norms)), np.abs(norms - 1).argmax(1)]                            # nan counts as the largest
            stop(name, ~(np.abs(far - 1) < 1e-2), "1", "has norm {:.4g}", far)                         # 1e-2: float16 files
        elif value.dtype.kind == "f":
            stop(name, ~np.isfinite(value), "a finite number")
    user = np.asarray(part.user)
    stop("user", (user < 0) | (user >= num_users), f"a user of 0..{num_users - 1}")
    stop("user", np.diff(user, prepend=user[:1]) < 0, "rows that are ordered by user")
    if isinstance(part, Observations) and len(user):
        columns, rows = np.asarray(part.images).shape[1], np.arange(len(user))
        stop("choice", (part.choice < 0) | (part.choice >= columns), f"a column of 0..{columns - 1}; leave out turns without a pick")
        stop("before", (part.before < -1) | (part.before >= rows), "an earlier row, or -1")
        at = np.maximum(part.before, 0)
        stop("before", (part.before >= 0) & ((part.session[at] != part.session) | (user[at] != user)), "a row of the same session")
        stop("compare", ~np.isin(part.compare, (BETTER, SAME, WORSE, NOT_ASKED)), "1, 0, -1 or 2")
        stop("compare", (part.before < 0) & (part.compare != NOT_ASKED), "2, not asked, at a turn with none before it")
    if isinstance(part, Pairs):
        stop("label", ~np.isin(part.label, (0, 0.5, 1)), "1, .5 or 0")
        stop("weight", np.asarray(part.weight) <= 0, "a weight above 0")


def select(data, users):
    """The evidence of some users (int64, ascending), who become 0..len(users)-1. Rows that `before` points to come along: they are the same user's."""
    device = data.pairs.user.device
    users = torch.as_tensor(np.asarray(users), dtype=torch.int64, device=device)
    number = torch.full((data.num_users,), -1, dtype=torch.int64, device=device)
    number[users] = torch.arange(len(users), device=device)
    parts = []
    for part in data[:3]:
        rows = (number[part.user] >= 0).nonzero()[:, 0]
        taken = type(part)(*(column[rows] for column in part))
        taken = taken._replace(user=number[taken.user])
        if isinstance(part, Observations):
            place = torch.full((len(part.user) + 1,), -1, dtype=torch.int64, device=device)          # the last is where -1 points
            place[rows] = torch.arange(len(rows), device=device)
            taken = taken._replace(before=place[taken.before])
        parts.append(taken)
    return Evidence(*parts, len(users))


def num_observations(data):
    """Turns, ratings, and pairs by their weights: what a log-likelihood is divided by. A comparison of two turns belongs to the later turn."""
    return len(data.observations.user) + float(data.pairs.weight.sum()) + len(data.ratings.user)


# -----------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class UserModelConfig:
    num_types: int
    width: int                  # of the embeddings
    rank: int = 4               # of A_k less the identity
    agg: Literal["lse", "max", "mean"] = "lse"          # of a column's images
    lse_temp: float = 0.1       # of agg=lse: 0 would be the maximum, infinity the mean
    change: bool = True         # c_k is learned, else 0
    closeness: bool = True      # a_k is learned, else 1
    same: Literal["drop", "half"] = "drop"              # a comparison "same": no evidence, or half of better and half of worse

    def __post_init__(self):
        bad = [name for name in ("num_types", "width") if getattr(self, name) < 1] + ["rank"] * (self.rank < 0)
        if bad or self.agg not in ("lse", "max", "mean") or self.same not in ("drop", "half") or not self.lse_temp > 0:
            raise ValueError(f"{self}: expected num_types and width of at least 1, rank of at least 0, agg of lse, max or mean, same of drop or half, "
                             "lse_temp above 0")


class UserModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        K, D, r = config.num_types, config.width, config.rank
        self.down = nn.Parameter(torch.empty(K, r, D))
        self.up = nn.Parameter(torch.empty(K, D, r))
        self.taste = nn.Parameter(torch.empty(K, D))                          # w_k
        self.change = nn.Parameter(torch.zeros(K), requires_grad=config.change)
        self.closeness = nn.Parameter(torch.zeros(K), requires_grad=config.closeness)
        self.log_tau = nn.Parameter(torch.zeros(len(TAUS)))
        self.rating = nn.Parameter(torch.zeros(3))                            # log slope, offset, log sigma
        self.log_prior = nn.Parameter(torch.full((K,), -np.log(K)), requires_grad=False)          # log pi, which has a closed form

    @torch.no_grad()
    def init_weights(self, seed, tau=5.0, rating_sigma=1.0, rating_mean=0.0):
        """Every type starts elsewhere: equal ones would have equal gradients for ever."""
        generator = torch.Generator().manual_seed(seed)
        for k in range(self.config.num_types):
            self.init_type(k, generator)
        self.log_tau.fill_(np.log(tau))
        self.rating.copy_(torch.tensor([0.0, rating_mean, np.log(rating_sigma)]))
        self.log_prior.fill_(-np.log(self.config.num_types))
        self.project()
        return self

    @torch.no_grad()
    def init_type(self, k, generator, direction=None):
        """Type k anew. direction (D,): where its taste points, any direction without it."""
        D, r = self.config.width, self.config.rank
        noise = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        taste = noise(D)
        self.taste[k] = (taste if direction is None else direction.cpu() / direction.norm().cpu() + 0.1 * taste / taste.norm()).to(self.taste)
        self.taste[k] /= self.taste[k].norm()
        self.down[k] = (noise(r, D) / D ** 0.5).to(self.down)
        self.up[k] = (noise(D, r) * 0.1 / max(D * r, 1) ** 0.5).to(self.up)
        self.change[k] = self.closeness[k] = 0.0

    @torch.no_grad()
    def project(self):
        """After each step: tau and sigma back into their ranges, w_k to length 1. Of w_k only the direction is read: a gradient step makes it longer, and
        later steps smaller."""
        self.log_tau.clamp_(*np.log(TAU_RANGE))
        self.rating[2].clamp_(np.log(0.01), np.log(100.0))
        self.taste /= self.taste.norm(dim=-1, keepdim=True)

    def tau(self, name):
        return self.log_tau[TAUS.index(name)].clamp(*np.log(TAU_RANGE)).exp()

    def scores(self, start, base, images):
        """s_k of P images: start, base (N, D), images (N, P, D) -> (N, P, K).

        A_k I itself is never made, which would be N P K D numbers: <A s, A I> = (A'A s) . I, and |A I|^2 = 1 + (V I) . (2 U' + U'U V) I.
        """
        K, r, D = self.down.shape
        if images.shape[-1] != D or start.shape[-1] != D or base.shape[-1] != D:
            raise ValueError(f"embeddings of width {images.shape[-1]}, this user model was made for {D}: they come from another encoder")
        up, down = self.up, self.down
        moved = start[:, None] + torch.einsum("nd,krd,ker->nke", start, down, up)                                        # (N, K, D): A_k start
        pulled = moved + torch.einsum("nke,ker,krd->nkd", moved, up, down)                                               # A_k' A_k start
        pulled = pulled / moved.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        inner = 2 * up.mT + up.mT @ up @ down                                                                            # (K, r, D)
        both = images @ torch.cat([down, inner]).flatten(0, 1).T                                                         # (N, P, 2 K r)
        low, high = both.unflatten(-1, (2, K, r)).unbind(2)
        lengths = (1 + (low * high).sum(-1)).clamp(min=1e-6).sqrt()                                                      # (N, P, K): |A_k I|
        scores = 2 * self.closeness.sigmoid() * (images @ pulled.mT / lengths) + images @ F.normalize(self.taste, dim=-1).T
        if self.config.change:
            scores = scores + 2 * self.change.tanh() * (1 - (images * base[:, None]).sum(-1, keepdim=True))
        return scores

    def utilities(self, start, base, images):
        """R_k of columns: start, base (N, D), images (N, L, M, D) -> (N, L, K). A soft maximum lies between the mean and the maximum, M does not add to it."""
        s = self.scores(start, base, images.flatten(1, 2)).unflatten(1, images.shape[1:3])                               # (N, L, M, K)
        if self.config.agg == "mean":
            return s.mean(2)
        if self.config.agg == "max":
            return s.amax(2)
        return self.config.lse_temp * ((s / self.config.lse_temp).logsumexp(2) - np.log(s.shape[2]))

    def log_choice(self, utilities):
        """(N, L, K) -> (N, L, K) log P(column | type)."""
        return (self.tau("choice") * utilities).log_softmax(1)

    def at_bound(self):
        """-> names of the tau that sit at a bound: of a likelihood that has run away, or of choices that say nothing."""
        low, high = np.log(TAU_RANGE)
        return [name for name, x in zip(TAUS, self.log_tau.tolist()) if not low + 1e-4 < x < high - 1e-4]


    def describe(self):
        """-> {entropy_pi in nats, min_pi, tau_<name>} as floats."""
        pi = self.log_prior.detach().double().softmax(0)
        return dict(entropy_pi=float(entropy(pi)), min_pi=float(pi.min()), **{f"tau_{name}": float(self.tau(name).detach()) for name in TAUS})


# -----------------------------------------------------------------------------
# Likelihoods: log-probability of one observation under each type


def gains(utilities, observations):
    """(N, L, K) -> (N, K): R of the pick less R of the pick of the turn before; of no meaning at a first turn."""
    picked = utilities.gather(1, observations.choice[:, None, None].expand(-1, -1, utilities.shape[2]))[:, 0]
    return picked - picked[observations.before.clamp(min=0)]


def log_compare(model, gain, compare):
    """gain (N, K), compare (N,) -> (N, K), 0 where nothing was asked."""
    up, down = F.logsigmoid(model.tau("compare") * gain), F.logsigmoid(-model.tau("compare") * gain)
    label = compare[:, None]
    same = (up + down) / 2 if model.config.same == "half" else torch.zeros_like(up)
    return torch.where(label == BETTER, up, torch.where(label == WORSE, down, torch.where(label == SAME, same, 0.0)))


def log_likelihoods(model, observations):
    """Observations -> (N, K): log P(choice) + log P(compare)."""
    utilities = model.utilities(observations.start, observations.base, observations.images)
    logps = model.log_choice(utilities)
    chosen = logps.gather(1, observations.choice[:, None, None].expand(-1, -1, logps.shape[2]))[:, 0]
    return chosen + log_compare(model, gains(utilities, observations), observations.compare)


def pair_margins(model, pairs):
    """tau_pair (s_a - s_b), (N, K)."""
    s = model.scores(pairs.prompt, pairs.prompt, torch.stack([pairs.image_a, pairs.image_b], 1))
    return model.tau("pair") * (s[:, 0] - s[:, 1])


def pair_likelihoods(model, pairs):
    """Pairs -> (N, K), weighted."""
    margins, label = pair_margins(model, pairs), pairs.label[:, None]
    return pairs.weight[:, None] * (label * F.logsigmoid(margins) + (1 - label) * F.logsigmoid(-margins))


def rating_means(model, ratings):
    """slope s + offset, (N, K)."""
    return model.rating[0].exp() * model.scores(ratings.prompt, ratings.prompt, ratings.image[:, None])[:, 0] + model.rating[1]


def rating_likelihoods(model, ratings):
    """Ratings -> (N, K): log of the normal density without its constant log(2 pi) / 2."""
    log_sigma = model.rating[2]
    return -((rating_means(model, ratings) - ratings.rating[:, None]) / log_sigma.exp()).square() / 2 - log_sigma


def all_likelihoods(model, data):
    """Evidence -> ((R, K), user (R,)): pairs, then ratings, then turns, the order in which they count as known."""
    parts = [of(model, part) for of, part in ((pair_likelihoods, data.pairs), (rating_likelihoods, data.ratings), (log_likelihoods, data.observations))
             if len(part.user)]
    return torch.cat(parts), torch.cat([part.user for part in (data.pairs, data.ratings, data.observations)])


# -----------------------------------------------------------------------------
# Posteriors: log space, float64, never a gradient


@torch.no_grad()
def joint(model, logps, user, num_users):
    """log pi_k + sum over ALL rows of the user: logps (R, K), user (R,) -> (U, K) float64. Its logsumexp is the user's log-likelihood."""
    total = torch.zeros(num_users, logps.shape[1], dtype=torch.float64, device=logps.device)
    return total.index_add_(0, user, logps.double()) + model.log_prior.double().log_softmax(0)


def posterior(model, logps, user, num_users, temp=1.0):
    """-> (U, K) float64, rows sum to 1. temp above 1 flattens it: annealing."""
    return (joint(model, logps, user, num_users) / temp).softmax(1)


@torch.no_grad()
def filtered(model, logps, user, num_users, occasion=None):
    """Posteriors from EARLIER rows of the same user alone: logps (R, K), user (R,) -> (R, K) float64; the prior at a user's first row.

    occasion (R,): rows of one user that share a number and stand side by side do not know of one another, such as pairs made of one ranking.
    """
    order = torch.argsort(user, stable=True)
    first = torch.searchsorted(user[order], torch.arange(num_users, device=user.device))
    nth = torch.arange(len(user), device=user.device) - first[user[order]]
    table = torch.zeros(num_users, int(nth.max()) + 1 if len(nth) else 1, logps.shape[1], dtype=torch.float64, device=logps.device)
    table[user[order], nth] = logps.double()[order]
    before = table.cumsum(1).roll(1, 1)                                       # user by user, so that none is rounded by another's
    before[:, 0] = 0.0
    if occasion is not None and len(nth):
        here = occasion[order]
        begins = torch.ones_like(here, dtype=torch.bool)
        begins[1:] = (here[1:] != here[:-1]) | (user[order][1:] != user[order][:-1])
        starts = begins.nonzero()[:, 0]
        nth = nth[starts[begins.cumsum(0) - 1]]
    found = torch.empty_like(logps, dtype=torch.float64)
    found[order] = (before[user[order], nth] + model.log_prior.double().log_softmax(0)).softmax(1)
    return found


def occasions(data):
    """(R,) in the order of all_likelihoods: neighbouring pairs of one user about one prompt are one occasion, as the pairs of a ranking are."""
    pairs, num = data.pairs, len(data.pairs.user)
    begins = torch.ones(num, dtype=torch.int64, device=pairs.user.device)
    begins[1:] = ((pairs.prompt[1:] != pairs.prompt[:-1]).any(1) | (pairs.user[1:] != pairs.user[:-1])).long()
    return torch.cat([begins.cumsum(0), num + 1 + torch.arange(len(data.ratings.user) + len(data.observations.user), device=pairs.user.device)])


def entropy(g):
    """Nats: (.., K) -> (..)."""
    return 0.0 - torch.xlogy(g, g).sum(-1)


# -----------------------------------------------------------------------------
# Types that die


def pulls(data):
    """(U, D) float64: where each user is drawn, the sum over its observations of what it took less the mean of what it was offered."""
    o, p, r = data[:3]
    total = torch.zeros(data.num_users, p.prompt.shape[1], dtype=torch.float64, device=p.prompt.device)
    if len(o.user):
        columns = o.images.double().mean(2)
        total.index_add_(0, o.user, columns[torch.arange(len(o.user), device=o.user.device), o.choice] - columns.mean(1))
    total.index_add_(0, p.user, ((p.weight * (p.label - 0.5))[:, None] * (p.image_a - p.image_b)).double())
    if len(r.user):
        total.index_add_(0, r.user, ((r.rating - r.rating.mean())[:, None] * r.image).double())
    return total


@torch.no_grad()
def spread(model, data, seed, num_iterations=20):
    """Tastes at the start where users are drawn: means of K clusters of their pulls, by k-means from distant users (k-means++). Types that start in
    directions of chance often end two for one, and none for another."""
    K, generator = model.config.num_types, torch.Generator().manual_seed(seed)
    raw = pulls(data).cpu()
    x = raw - raw.mean(0)                                                     # what all have in common tells nobody apart
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    while len(centres) < K:
        far = torch.cdist(x, centres).amin(1).square()
        centres = torch.cat([centres, x[torch.multinomial(far / far.sum(), 1, generator=generator)] if far.sum() > 0 else x[:1]])
    for _ in range(num_iterations):
        nearest = torch.cdist(x, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=K)
        means = torch.zeros_like(centres).index_add_(0, nearest, x) / counts.clamp(min=1)[:, None]
        centres = torch.where(counts[:, None] > 0, means, centres)
    for k, centre in enumerate(centres + raw.mean(0)):
        if centre.norm() > 0:
            model.init_type(k, generator, centre)


@torch.no_grad()
def reseed(model, k, data, fit, seed):
    """A type that has died begins anew at the pull of the 1 / K of the users that are explained worst, with 1 / K of the prior.

    data: Evidence of users with fit (U,), their log-likelihood per observation.
    """
    K = model.config.num_types
    worst = fit.argsort(stable=True)[:max(1, len(fit) // K)].sort().values
    direction = pulls(select(data, worst.cpu())).sum(0)
    generator = torch.Generator().manual_seed(seed)
    model.init_type(k, generator, direction if direction.norm() > 0 else None)
    prior = model.log_prior.double().softmax(0)
    prior[k] = 0
    prior = prior / prior.sum() * (1 - 1 / K)
    prior[k] = 1 / K
    model.log_prior.copy_(prior.log())


# -----------------------------------------------------------------------------
# What it is worth


def mean_ranks(x):
    """(N,) -> (N,) ranks from 1, equal values share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x, y):
    """Rank correlation of two (N,), ties by mean rank; None where one of them is constant or shorter than 2."""
    a, b = (mean_ranks(np.asarray(v, np.float64)) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if len(a) > 1 and scale > 0 else None


@torch.no_grad()
def predictions(model, data):
    """Evidence -> ({"prior", "filtered": {"choice": (N, L) probabilities, "compare": (N,) of better, "pair": (N,) of a, "rating": (N,) mean}},
    facts): nothing knows of its own row or a later one. facts: nth (R,) how many rows the user has before, entropy (R,) of what is known then, and by
    user (U, K) joint and the (U,) number of rows."""
    o, p, r = data[:3]
    logps, user = all_likelihoods(model, data)
    known = filtered(model, logps, user, data.num_users, occasions(data))
    prior = model.log_prior.double().softmax(0).expand_as(known)
    cut = np.cumsum([len(p.user), len(r.user)])
    found = {}
    choices = compares = None
    if len(o.user):
        utilities = model.utilities(o.start, o.base, o.images)
        choices = model.log_choice(utilities).double().exp()
        compares = (model.tau("compare") * gains(utilities, o)).double().sigmoid()
    for name, g in (("prior", prior), ("filtered", known)):
        of = {}
        if len(o.user):
            of |= dict(choice=torch.einsum("nlk,nk->nl", choices, g[cut[1]:]), compare=(compares * g[cut[1]:]).sum(1))
        if len(p.user):
            of |= dict(pair=(pair_margins(model, p).double().sigmoid() * g[:cut[0]]).sum(1))
        if len(r.user):
            of |= dict(rating=(rating_means(model, r).double() * g[cut[0]:cut[1]]).sum(1))
        found[name] = {key: value.cpu().numpy() for key, value in of.items()}
    order = torch.argsort(user, stable=True)
    first = torch.searchsorted(user[order], torch.arange(data.num_users, device=user.device))
    nth = torch.empty_like(user)
    nth[order] = torch.arange(len(user), device=user.device) - first[user[order]]
    facts = dict(nth=nth, entropy=entropy(known), joint=joint(model, logps, user, data.num_users))
    return found, {key: value.cpu().numpy() for key, value in facts.items()}


def by_group(values, groups):
    """Means of values (N,) by group 0, 1, ..: a list, None where a group is empty."""
    counts = np.bincount(groups)
    return [float(total / count) if count else None for total, count in zip(np.bincount(groups, values), counts)]


def evaluate(model, data, size=256):
    """Evidence of held-out users, `size` of them at a time -> (metrics, posteriors (U, K) float64 over everything a user did).

    metrics: loss, minus the log-likelihood per observation by the chain rule; for prior and filtered: choice_accuracy, choice_loss, compare_accuracy,
    compare_loss, pair_accuracy, pair_loss, spearman, rating_rmse, where there is such evidence; the filtered ones by_turn and by_nth (how many
    observations the user has before), entropy_by_nth. accuracies leave out "same" and labels of 1/2; ties of predictions count half; of pairs each
    counts its weight.
    """
    blocks = [select(data, np.arange(i, min(i + size, data.num_users))) for i in range(0, data.num_users, size)]
    looked = [predictions(model, block) for block in blocks]
    facts = {key: np.concatenate([fact[key] for _, fact in looked]) for key in ("nth", "entropy", "joint")}
    column = lambda part, name: np.concatenate([getattr(block[part], name).cpu().numpy() for block in blocks])
    likelihood = np.logaddexp.reduce(facts["joint"], axis=1)
    metrics = dict(users=data.num_users, loss=float(-likelihood.sum() / num_observations(data)),
                   entropy_by_nth=by_group(facts["entropy"], facts["nth"]))
    turn_rows = np.concatenate([fact["nth"][len(fact["nth"]) - len(block.observations.user):] for block, (_, fact) in zip(blocks, looked)])
    for name in ("prior", "filtered"):
        of = lambda key: np.concatenate([found[name][key] for found, _ in looked if key in found[name]])
        got = {}
        if len(data.observations.user):
            choice, p = column(0, "choice"), of("choice")
            mine = p[np.arange(len(p)), choice]
            best = p.max(1)
            hit = (mine == best) / (p == best[:, None]).sum(1)
            loss = -np.log(np.maximum(mine, 1e-300))
            got |= dict(choice_accuracy=float(hit.mean()), choice_loss=float(loss.mean()))
            if name == "filtered":
                turns = column(0, "turn")
                metrics["by_turn"] = dict(choice_accuracy=by_group(hit, turns), choice_loss=by_group(loss, turns))
                metrics["by_nth"] = dict(choice_accuracy=by_group(hit, turn_rows), choice_loss=by_group(loss, turn_rows))
            asked = np.isin(column(0, "compare"), (BETTER, WORSE))
            if asked.any():
                p = np.where(column(0, "compare") == BETTER, of("compare"), 1 - of("compare"))[asked]
                got |= dict(compare_accuracy=float(((p > 0.5) + 0.5 * (p == 0.5)).mean()), compare_loss=float(-np.log(np.maximum(p, 1e-300)).mean()))
                if name == "filtered":
                    metrics["by_turn"]["compare_accuracy"] = by_group((p > 0.5) + 0.5 * (p == 0.5), turns[asked])
        if len(data.pairs.user):
            label, weight, p = column(1, "label"), column(1, "weight"), of("pair")
            clear = label != 0.5
            q = np.where(label == 1, p, 1 - p)
            if clear.any():
                got["pair_accuracy"] = float(np.average(((q > 0.5) + 0.5 * (q == 0.5))[clear], weights=weight[clear]))
            loss = -label * np.log(np.maximum(p, 1e-300)) - (1 - label) * np.log(np.maximum(1 - p, 1e-300))
            got["pair_loss"] = float(np.average(loss, weights=weight))
        if len(data.ratings.user):
            rating, said = column(2, "rating"), of("rating")
            got |= dict(spearman=spearman(said, rating), rating_rmse=float(np.sqrt(np.square(said - rating).mean())))
        metrics[name] = got
    return metrics, np.exp(facts["joint"] - likelihood[:, None])


# -----------------------------------------------------------------------------
# Types that were found beside those that are true. Types have no names, so both are compared up to a permutation


def adjusted_rand(a, b):
    """(U,), (U,) labels -> the adjusted Rand index (Hubert & Arabie 1985): 1 the same partition, 0 as chance has it, below 0 worse. 1 if both are trivial
    in the same way."""
    a, b = (np.unique(x, return_inverse=True)[1] for x in (a, b))
    pairs = lambda counts: float((counts * (counts - 1.0) / 2).sum())
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    both, of_a, of_b, total = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(np.array([len(a)]))
    chance = of_a * of_b / total if total else 0.0
    most = (of_a + of_b) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def assignment(gain):
    """(n, n) -> (n,) column of each row, one to one, of the largest sum (Kuhn 1955, Munkres 1957).

    Row by row, along a path of least reduced cost from the new row to a free column; potentials keep the reduced costs at or above 0.
    """
    cost = gain.max() - np.asarray(gain, np.float64)
    n = len(cost)
    of_row, of_column = np.zeros(n), np.zeros(n)                              # potentials
    owner = np.full(n, -1)                                                    # the row of each column
    for new in range(n):
        distance, came, done = np.full(n, np.inf), np.full(n, -1), np.zeros(n, bool)
        row, at, reached = new, -1, 0.0
        while True:                                                           # Dijkstra over columns
            through = reached + cost[row] - of_row[row] - of_column
            nearer = ~done & (through < distance)
            distance[nearer], came[nearer] = through[nearer], at
            at = int(np.where(done, np.inf, distance).argmin())
            reached = distance[at]
            if owner[at] < 0:
                break
            done[at], row = True, owner[at]
        of_row[new] += reached
        of_row[owner[done]] += reached - distance[done]
        of_column[done] -= reached - distance[done]
        while at >= 0:                                                        # back along the path, each column to the row before
            previous = came[at]
            owner[at] = new if previous < 0 else owner[previous]
            at = previous
    columns = np.empty(n, np.int64)
    columns[owner] = np.arange(n)
    return columns


def recovery(types, g):
    """True types (U,) and posteriors (U, K) -> {ari, accuracy, mean_certainty}: accuracy under the best one-to-one matching of found and true types."""
    found, true = np.asarray(g).argmax(1), np.unique(types, return_inverse=True)[1]
    n = max(g.shape[1], true.max() + 1)
    table = np.zeros((n, n))
    np.add.at(table, (found, true), 1)
    matched = table[np.arange(n), assignment(table)].sum()
    return dict(ari=adjusted_rand(found, true), accuracy=float(matched / len(true)), certainty=float(np.asarray(g).max(1).mean()))


# -----------------------------------------------------------------------------
# A picture


def picture(results, test, best, path):
    """Likelihood and recovery over the steps of each start, what is learned of a user from observation to observation, and curves over K.

    results: [{types, start, step, loss, ari?}], test: {K: evaluate's metrics}, both as train_user_model.py has them; best: the K that is kept.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    recovery_known, counts = "ari" in results[0], sorted(test)
    turns = "by_nth" in test[best]
    names = ["steps", *(["recovery"] if recovery_known else []), *(["observations"] if turns else []), *(["types"] if len(counts) > 1 else [])]
    figure, axes = plt.subplots(1, len(names), figsize=(4.4 * len(names), 3.6), squeeze=False)
    panel = dict(zip(names, axes[0]))
    for start in sorted({r["start"] for r in results if r["types"] == best}):
        mine = [r for r in results if r["types"] == best and r["start"] == start]
        for name, key in (("steps", "loss"), ("recovery", "ari")):
            if name in panel:
                panel[name].plot([r["step"] for r in mine], [r[key] for r in mine], "o-", ms=2.5, lw=1, label=f"start {start}")
    panel["steps"].set_title(f"{best} types: loss of validation users, nats", fontsize=10)
    panel["steps"].set_xlabel("EM steps", fontsize=9)
    if recovery_known:
        panel["recovery"].set_title(f"{best} types: adjusted Rand, test users", fontsize=10)
        panel["recovery"].set_xlabel("EM steps", fontsize=9)
        panel["recovery"].set_ylim(-0.05, 1.05)
    if turns:
        for K in sorted({counts[0], best}):
            panel["observations"].plot(test[K]["by_nth"]["choice_accuracy"], "o-", ms=2.5, lw=1, label="1 type" if K == 1 else f"{K} types")
        panel["observations"].axhline(test[best]["prior"]["choice_accuracy"], color="#999999", lw=0.8, ls=":", label=f"{best} types, prior alone")
        panel["observations"].set_title("choice accuracy, test users", fontsize=10)
        panel["observations"].set_xlabel("observations of the user before", fontsize=9)
    if len(counts) > 1:
        for key in ("choice_accuracy", "compare_accuracy", "pair_accuracy", "spearman"):
            for name, style in (("filtered", "o-"), ("prior", ":")):
                if test[best][name].get(key) is not None:
                    panel["types"].plot(counts, [np.nan if test[K][name][key] is None else test[K][name][key] for K in counts], style, ms=2.5, lw=1,
                                        label=f"{key.replace('_', ' ')}, {name}")
        panel["types"].set_xscale("log", base=2)
        panel["types"].set_xticks(counts, map(str, counts))
        panel["types"].set_xlabel("types", fontsize=9)
        panel["types"].set_title("test users", fontsize=10)
    save_figure(figure, axes[0], path)


# -----------------------------------------------------------------------------
# Folders


class Origin(NamedTuple):
    """What a user model was fitted to, in the place where a language model has its tokenizer."""
    embeddings: str             # name of the encoder: embeddings of another one mean something else
    half: str                   # all, a or b: models of a and b share no user
    data: str

    def save(self, path):
        write_atomically(Path(path) / "origin.json", json.dumps(self._asdict(), ensure_ascii=False) + "\n")


def load_user_model(path, device="cpu", dtype=torch.float32):
    """-> (UserModel, Origin) from a folder that checkpoint.save or save_hf wrote. ValueError: another kind of model, a damaged file."""
    path = Path(path)
    if not (path / "config.json").exists() or not (path / "origin.json").exists():
        raise ValueError(f"{path}: no config.json and origin.json there; expected the checkpoint of a user model (out/<name>/step_..., out/<name>/types_4)")
    checkpoint.verify(path)
    settings = checkpoint.read_json(path / "config.json")
    if settings.pop("architectures", None) != ["UserModel"]:
        raise ValueError(f"{path}: holds another kind of model than a user model")
    try:
        config = UserModelConfig(**settings)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}/config.json: {e}") from None
    origin = checkpoint.read_json(path / "origin.json")
    if origin.keys() != set(Origin._fields):
        raise ValueError(f"{path}/origin.json: expected {', '.join(Origin._fields)}, found {', '.join(origin)}")
    files = checkpoint.weight_files(path)
    model = UserModel(config).to(dtype)
    handles = checkpoint.checked(path, files, model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(handles[files[name]].get_tensor(name))
    return model.to(device), Origin(**origin)
