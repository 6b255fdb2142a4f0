"""The agent of a slate: what it reads of a session, v(h) and f(h, p), and how scores become a slate.

    h   the session so far: its start prompt, every slate with the pick and the critique, and the number of the turn (without it a horizon is invisible)
    p   a candidate: text and category
    f   two heads (double Q); the value of a slate is the mean of its items, q(h, P) = mean over p in P of f(h, p): what PASTA uses (arXiv 2412.10419)

Encoders: `pooled`, one token per prompt (hashed words), a small Transformer over at most 1 + T (L + 3) tokens, f an MLP of [h, p, h p]; `text`, the
session written out, through the repository's Transformer, a row for each (h, p), v read before the candidate and f at its last token.

    B sessions   T turns   L columns   C candidates   K items to be scored   D width   W words of a text
"""
import functools
import hashlib
import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
from common import write_atomically
from data.slate import CATEGORIES, softmax
from model import Block, ModelConfig, RopeScaling, ScalarHead, Transformer, config_for_size
from tokenizer import Tokenizer

NUM_WORDS, MAX_WORDS = 2048, 24


# -----------------------------------------------------------------------------
# What an agent reads


@functools.lru_cache(maxsize=1 << 16)
def hashed(word):
    return 1 + int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") % (NUM_WORDS - 1)


class Texts:
    """Texts by number, with their hashed words: (U, W) int64, 0 where a text has fewer. Words past the first 24 are not read."""

    def __init__(self, texts=()):
        self.texts, self.index = [], {}
        self.words = np.zeros((1024, MAX_WORDS), np.int64)
        self.add(texts)

    def add(self, texts):
        """-> (N,) int64 numbers of the texts."""
        rows = np.empty(len(texts), np.int64)
        for i, text in enumerate(texts):
            row = self.index.get(text)
            if row is None:
                row = self.index[text] = len(self.texts)
                self.texts.append(text)
                if row == len(self.words):
                    self.words = np.concatenate([self.words, np.zeros_like(self.words)])
                words = [hashed(w) for w in text.lower().replace(",", " ").split()[:MAX_WORDS]]
                self.words[row, :len(words)] = words
            rows[i] = row
        return rows


class Batch(NamedTuple):
    """Sessions as an agent reads them. Texts are rows of `words`; nothing of turn t is read by the state of turn t or of an earlier one."""
    words: torch.Tensor           # (U, W) int64
    start: torch.Tensor           # (B,) int64 rows
    shown: torch.Tensor           # (B, T, L) int64 rows
    shown_category: torch.Tensor  # (B, T, L) int64
    picked: torch.Tensor          # (B, T) int64: column
    critique: torch.Tensor        # (B, T) int64 rows, -1 where none was given
    length: torch.Tensor          # (B,) int64: turns of the session; later ones are padding
    kind: torch.Tensor            # (B,) int64: type of the user, which only an oracle reads; -1 unknown

    def to(self, device):
        return Batch(*(x.to(device) for x in self))


class Sessions(NamedTuple):
    """A Log in rectangles, once, on the CPU: what batches are cut from. Padding turns repeat nothing and carry 0."""
    texts: Texts
    batch: Batch                  # all sessions; words as of this moment
    candidates: torch.Tensor      # (S, T, C) int64 rows, 0 where there is none
    categories: torch.Tensor      # (S, T, C) int64, -1 where there is none
    slate: torch.Tensor           # (S, T, L) int64
    reward: torch.Tensor          # (S, T) float32
    terminal: torch.Tensor        # (S, T) float32: 1 at the last turn of a session that ended, at horizon or by quitting
    valid: torch.Tensor           # (S, T) bool

    def to(self, device):
        return self._replace(batch=self.batch.to(device), **{k: getattr(self, k).to(device) for k in self._fields[2:]})

    def take(self, rows):
        rows = torch.as_tensor(rows, device=self.reward.device)
        return self._replace(batch=Batch(self.batch.words, *(x[rows] for x in self.batch[1:])), **{k: getattr(self, k)[rows] for k in self._fields[2:]})


def rectangles(log, reward, kind=None, texts=None):
    """A data.slate.Log, (N,) rewards, and (S,) types for an oracle -> Sessions."""
    texts = texts or Texts()
    number = texts.add(log.texts)
    S, T = len(log.user), int(np.diff(log.first).max())
    at = (log.session, log.turn)

    def spread(values, fill):
        out = np.full((S, T, *values.shape[1:]), fill, values.dtype)
        out[at] = values
        return torch.from_numpy(out)
    rows = np.arange(len(log.choice))[:, None]
    critique = np.array([texts.add([c])[0] if c else -1 for c in log.critique], np.int64)
    lengths = np.diff(log.first)
    terminal = np.zeros(len(log.choice), np.float32)
    terminal[log.first[1:] - 1] = log.end < 2
    batch = Batch(torch.from_numpy(texts.words[:len(texts.texts)]), torch.from_numpy(number[log.prompt]),
                  spread(number[log.candidates[rows, log.slate]], 0), spread(log.categories[rows, log.slate], 0), spread(log.choice, 0),
                  spread(critique, -1), torch.from_numpy(lengths), torch.from_numpy(np.full(S, -1) if kind is None else np.asarray(kind, np.int64)))
    return Sessions(texts, batch, spread(np.where(log.candidates >= 0, number[log.candidates], 0), 0), spread(log.categories, -1), spread(log.slate, 0),
                    spread(np.asarray(reward, np.float32), 0), spread(terminal, 0), spread(np.ones(len(log.choice), bool), False))


# -----------------------------------------------------------------------------
# The agent


@dataclass(frozen=True)
class SlateAgentConfig:
    encoder: str = "pooled"           # pooled | text
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    max_turns: int = 8                # a longer session loses its oldest turns, never its start prompt
    turn_number: bool = True          # the state knows which turn it is
    num_kinds: int = 0                # types that an oracle is told; 0: none
    num_q: int = 2                    # heads of f
    share_trunk: bool = True          # v and f read one trunk
    choice_head: bool = False         # one more head, of which column is picked, after those of f
    trunk: dict = field(default_factory=dict)         # text: settings of the Transformer

    def __post_init__(self):
        if self.encoder not in ("pooled", "text") or self.hidden_size % self.num_heads or self.max_turns < 1 or self.num_q < 1:
            raise ValueError(f"expected an encoder of pooled or text, a width that is a multiple of num_heads, max_turns and num_q of at least 1, found {self}")


class Score(nn.Module):
    """f(h, p) = MLP of [h, p, h p], num_q heads stacked: one product for all. h (..., 1, D), p (..., K, D) -> (num_q, ..., K) fp32. Starts at 0."""

    def __init__(self, num_q, hidden_size, width=128):
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_q, 3 * hidden_size, width))
        self.up_bias, self.down = nn.Parameter(torch.zeros(num_q, width)), nn.Parameter(torch.zeros(num_q, width))
        self.down_bias = nn.Parameter(torch.zeros(num_q))

    def forward(self, h, p):
        # [h, p, h p] U = h U_1 + p U_2 + (h p) U_3: the first product is once per state, not once per candidate
        of_h, of_p, of_both = self.up.unflatten(1, (3, -1)).unbind(1)                                # (num_q, D, width) each
        flat = lambda x: x.flatten(0, -2)
        many = lambda x, w: torch.matmul(flat(x), w).view(len(w), *x.shape[:-1], -1)
        hidden = F.relu(many(h, of_h) + many(p, of_p) + many(h * p, of_both) + self.up_bias.view(len(self.up), *[1] * (p.ndim - 1), -1))
        return (hidden.float() * self.down.view(len(self.up), *[1] * (p.ndim - 1), -1)).sum(-1) + self.down_bias.view(-1, *[1] * (p.ndim - 1))


class SlateAgent(nn.Module):
    """v(h) and f(h, p) for all turns of sessions in one pass."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        D = c.hidden_size
        self.word = nn.EmbeddingBag(NUM_WORDS, D, mode="mean", padding_idx=0)
        self.category = nn.Embedding(len(CATEGORIES), D)
        self.role = nn.Embedding(5, D)                                        # start, shown, picked, critique, state
        self.turn = nn.Embedding(c.max_turns + 1, D)
        if c.num_kinds:
            self.kind = nn.Embedding(c.num_kinds, D)
        block = ModelConfig(vocab_size=1, hidden_size=D, intermediate_size=2 * D, num_layers=c.num_layers, num_heads=c.num_heads, num_kv_heads=c.num_heads,
                            head_dim=D // c.num_heads)
        self.layers = nn.ModuleList(Block(block) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(D)
        self.item = nn.Linear(D, D)
        self.value_up, self.value = nn.Linear(D, 128), ScalarHead(128)
        self.score = Score(c.num_q + c.choice_head, D)
        if not c.share_trunk:
            self.of_value = SlateAgent(replace(c, share_trunk=True))          # its states alone are read
            for part in ("item", "value_up", "value", "score", "offset"):
                delattr(self.of_value, part)
        self.offset = nn.Parameter(torch.zeros(c.max_turns + 1))              # by turn, of v and f alike: starts at the mean return from there on

    def init_weights(self, seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim < 2 and "norm" in name and name.endswith("weight"):
                    p.fill_(1.0)
                elif p.ndim < 2 or name == "score.down" or "bias" in name:
                    p.zero_()
                elif isinstance(self.get_submodule(name.rpartition(".")[0]), (nn.Embedding, nn.EmbeddingBag)):
                    p.normal_(0, .5, generator=generator)
                else:
                    p.normal_(0, p.shape[-1 if name != "score.up" else 1] ** -.5, generator=generator)
            self.word.weight[0] = 0
        return self

    def text(self, words, rows):
        """rows (...) of words (U, W) -> (..., D)."""
        return self.word(words[rows.flatten()]).view(*rows.shape, self.config.hidden_size)

    def number(self, turns):
        """(T,) turns -> (T,) the rows of `turn` and `offset` that they read: all the same one where the state may not know its turn."""
        return turns.clamp(max=self.config.max_turns) if self.config.turn_number else torch.zeros_like(turns)

    def states(self, b):
        """Batch -> (B, T + 1, D): h before each turn, and after the last."""
        T, most = b.shown.shape[1], self.config.max_turns
        if T <= most:
            return self.window(b, 0)
        # a pass for each state past max_turns: a mask would not do, since a second layer reads what the first one read before it
        part = lambda t: b._replace(**{k: getattr(b, k)[:, t - most:t] for k in ("shown", "shown_category", "picked", "critique")})
        return torch.cat([self.window(part(most), 0), *(self.window(part(t), t - most)[:, -1:] for t in range(most + 1, T + 1))], 1)

    def window(self, b, first):
        """states of a Batch of at most max_turns turns, which are turns first, first + 1, .. of their sessions."""
        B, T, L = b.shown.shape
        device, c = b.shown.device, self.config
        turns = torch.arange(T + 1, device=device)
        number = self.number(first + turns)
        start = self.text(b.words, b.start) + self.role.weight[0]                                              # (B, D)
        is_picked = (torch.arange(L, device=device) == b.picked[:, :, None]).long()                            # (B, T, L)
        shown = self.text(b.words, b.shown) + self.category(b.shown_category) + self.role(1 + is_picked) + self.turn(number[:T])[:, None]
        spoken = T if bool((b.critique >= 0).any()) else 0                                                     # without a word no token is spent on any
        said = self.text(b.words, b.critique[:, :spoken].clamp(min=0)) + self.role.weight[3] + self.turn(number[:spoken])
        state = (self.role.weight[4] + self.turn(number)).expand(B, -1, -1)
        if c.num_kinds:
            state = state + self.kind(b.kind)[:, None]
        x = torch.cat([start[:, None], shown.flatten(1, 2), said, state], 1)                                   # (B, 1 + T L + spoken + T + 1, D)
        # a token is seen by those of its own turn and of later ones; a state by itself alone
        turn = torch.cat([turns.new_zeros(1), turns[:T].repeat_interleave(L), turns[:spoken], turns])
        is_state = torch.arange(len(turn), device=device) >= len(turn) - T - 1
        is_start = torch.arange(len(turn), device=device) == 0
        age = turn[:, None] - turn                                                                             # of the key, for each query
        mask = is_start | (~is_state & (age >= is_state[:, None].long()) & ~is_start[:, None])
        mask = (mask | torch.eye(len(turn), dtype=torch.bool, device=device)).expand(B, 1, -1, -1)
        if spoken and bool((b.critique < 0).any()):
            silent = torch.cat([b.critique.new_zeros(B, 1 + T * L, dtype=torch.bool), b.critique < 0, b.critique.new_zeros(B, T + 1, dtype=torch.bool)], 1)
            mask = mask & ~(silent[:, None, None] & ~torch.eye(len(turn), dtype=torch.bool, device=device))
        one, zero = x.new_ones(()), x.new_zeros(())                                                            # no rotation: columns have no order
        for layer in self.layers:
            x = layer(x, one, zero, mask, None, None)
        return self.norm(x[:, -(T + 1):])

    def forward(self, b, rows, categories):
        """b: Batch; rows (B, T', K) of texts and categories (B, T', K) to be scored in the first T' of the T + 1 states.
        -> v (B, T + 1) fp32, f (num_q, B, T', K) fp32."""
        h = self.states(b)
        offset = self.offset[self.number(torch.arange(h.shape[1], device=h.device))]
        own = h if self.config.share_trunk else self.of_value.states(b)
        v = self.value(F.relu(self.value_up(own))) + offset
        p = self.item(self.text(b.words, rows) + self.category(categories.clamp(min=0)))
        return v, self.score(h[:, :rows.shape[1], None], p) + offset[:rows.shape[1], None]


class TextSlateAgent(nn.Module):
    """The same two functions read off the session written out: a row of tokens for each (h, p), so candidates never see one another."""

    def __init__(self, config, tokenizer, texts=None):
        super().__init__()
        self.config, self.tokenizer, self.texts = config, tokenizer, texts
        scaling = config.trunk.get("rope_scaling")                            # a dict again, where the config was read from a file
        trunk = (ModelConfig(**config.trunk | dict(rope_scaling=RopeScaling(**scaling) if isinstance(scaling, dict) else scaling)) if config.trunk
                 else config_for_size("nano", tokenizer.vocab_size))
        self.lm = Transformer(trunk)
        del self.lm.lm_head                                                   # no token is predicted
        self.value = ScalarHead(trunk.hidden_size)
        self.scores = nn.ModuleList(ScalarHead(trunk.hidden_size) for _ in range(config.num_q + config.choice_head))
        if config.num_kinds:
            self.kind = nn.Embedding(config.num_kinds, trunk.hidden_size)

    def init_weights(self, seed):
        self.lm.lm_head = self.lm.model.embed_tokens                          # init_weights of a language model wants its head
        self.lm.init_weights(seed)
        del self.lm.lm_head
        if self.config.num_kinds:
            nn.init.normal_(self.kind.weight, 0, .5, generator=torch.Generator().manual_seed(seed))
        return self

    def history(self, b, row, turn):
        """-> ids of what state `turn` of session `row` reads; the oldest turns go first where there are more than max_turns."""
        text = self.texts.texts
        said = [f"start: {text[b.start[row]]}"]
        for t in range(max(0, turn - self.config.max_turns), turn):
            shown = " | ".join(("> " if l == b.picked[row, t] else "") + text[x] for l, x in enumerate(b.shown[row, t].tolist()))
            wish = f" ({text[b.critique[row, t]]})" if b.critique[row, t] >= 0 else ""
            said.append((f"{t + 1}: " if self.config.turn_number else "shown: ") + shown + wish)
        said.append(f"turn {turn + 1}:" if self.config.turn_number else "turn:")
        return self.tokenizer.encode("\n".join(said))

    def items(self, history, rows, categories):
        """history: ids; rows, categories [K] -> K lists of ids: the history and one candidate each, the history alone where there is none."""
        name = lambda c: self.tokenizer.encode(" " + CATEGORIES[c] + ": ")
        return [history + name(c) + self.tokenizer.encode(self.texts.texts[x]) if c >= 0 else history for x, c in zip(rows, categories)]

    def last(self, sequences, kind):
        """sequences: N lists of ids, kind (N,) -> (N, D) at their last tokens."""
        device = kind.device
        length = torch.tensor([len(s) for s in sequences])
        ids = torch.zeros(len(sequences), int(length.max()), dtype=torch.int64)
        for i, s in enumerate(sequences):
            ids[i, :len(s)] = torch.tensor(s)
        hidden = self.lm(ids.to(device))                                      # causal, so padding at the end is not read
        last = hidden[torch.arange(len(ids), device=device), length.to(device) - 1]
        return last + self.kind(kind) if self.config.num_kinds else last

    def forward(self, b, rows, categories):
        """As SlateAgent.forward."""
        (B, T), (_, scored, K) = b.picked.shape, rows.shape
        kind, b = b.kind, b.to("cpu")
        histories = [[self.history(b, i, t) for t in range(T + 1)] for i in range(B)]
        sequences = [h for one in histories for h in one]
        for i in range(B):
            for t in range(scored):
                sequences += self.items(histories[i][t], rows[i, t].tolist(), categories[i, t].tolist())
        last = self.last(sequences, torch.cat([kind.repeat_interleave(T + 1), kind.repeat_interleave(scored * K)]))
        v, f = last[:B * (T + 1)].view(B, T + 1, -1), last[B * (T + 1):].view(B, scored, K, -1)
        return self.value(v), torch.stack([head(f) for head in self.scores])


# -----------------------------------------------------------------------------
# From scores to a slate


def select(scores, categories, slate_size, max_per_category=1):
    """scores (n, C) float, categories (n, C) int, -1 where there is no candidate -> (n, L) int64, the best slate of at most max_per_category of each category
    (0: as many as wanted), best first, the lowest index where scores are equal. Exact for a slate that is worth the mean of its items.
    ValueError: too few candidates, a score that is no number."""
    scores = np.where(categories >= 0, scores, -np.inf)
    if np.isnan(scores).any():
        raise ValueError(f"the scores of row {int(np.isnan(scores).any(1).argmax())} are not numbers: nothing can be chosen by them")
    order = np.argsort(-scores, axis=1, kind="stable")
    sorted_categories = np.take_along_axis(categories, order, 1)
    allowed = sorted_categories >= 0
    if max_per_category:
        rank = np.zeros_like(order)                                           # how many better ones of its category there are
        for c in range(len(CATEGORIES)):
            here = sorted_categories == c
            rank[here] = (here.cumsum(1) - 1)[here]
        allowed &= rank < max_per_category
    order = np.take_along_axis(order, np.argsort(~allowed, axis=1, kind="stable"), 1)
    enough = allowed.sum(1)
    if (enough < slate_size).any():
        row = int((enough < slate_size).argmax())
        raise ValueError(f"candidates of row {row} make a slate of {enough[row]}, expected {slate_size}: more categories, or --max_per_category=0")
    return order[:, :slate_size]


def select_by_choice(scores, logits, categories, slate_size, max_per_category=1, size=64):
    """The slate of the largest sum of softmax(logits) scores, by trying all legal ones (3,125 of 25 candidates in 5 categories): such a value has no best item.
    scores, logits (n, C) float, categories (n, C) -> (n, L) int64, in the order of candidates."""
    out = np.empty((len(scores), slate_size), np.int64)
    for pattern in np.unique(categories, axis=0):                             # rows with equal categories have the same legal slates
        rows = np.flatnonzero((categories == pattern).all(1))
        legal = np.array([s for s in itertools.combinations(np.flatnonzero(pattern >= 0), slate_size)
                          if not max_per_category or max(np.bincount(pattern[list(s)])) <= max_per_category])
        if not len(legal):
            raise ValueError(f"no legal slate of {slate_size}: more categories, or --max_per_category=0")
        for i in range(0, len(rows), size):
            part = rows[i:i + size]
            weights = softmax(logits[part][:, legal])                         # (n, slates, L)
            out[part] = legal[(weights * scores[part][:, legal]).sum(2).argmax(1)]
    return out


class View(NamedTuple):
    """What n sessions look like when a slate is due; texts are rows of `texts`."""
    texts: Texts
    turn: int
    start: np.ndarray             # (n,)
    base: np.ndarray              # (n,)
    shown: np.ndarray             # (n, turn, L)
    shown_category: np.ndarray    # (n, turn, L)
    picked: np.ndarray            # (n, turn)
    critique: np.ndarray          # (n, turn)
    candidates: np.ndarray        # (n, C), 0 where there is none
    categories: np.ndarray        # (n, C), -1 where there is none
    kind: np.ndarray              # (n,) true types, for oracles alone


def candidate_scores(agent, view, device="cpu", size=512):
    """-> (n, C) float64: the smallest of the heads' f for every candidate of this turn."""
    return head_scores(agent, view, device, size)[:agent.config.num_q].min(0)


@torch.no_grad()
def head_scores(agent, view, device="cpu", size=512):
    """-> (num_q, n, C) float64 of every candidate of this turn; with a choice head one more, its logits. size: sessions in one pass."""
    if isinstance(agent, TextSlateAgent):
        size = max(1, size // 32)                                             # a row of tokens for each candidate, not a vector
    words = torch.from_numpy(view.texts.words[:len(view.texts.texts)]).to(device)
    found, trained_on = [], getattr(agent, "texts", None)
    for i in range(0, len(view.start), size):
        part = [torch.from_numpy(np.ascontiguousarray(x[i:i + size])) for x in
                (view.start, view.shown, view.shown_category, view.picked, view.critique, view.candidates, view.categories, view.kind)]
        n = len(part[0])
        b = Batch(words, *part[:5], torch.full((n,), view.turn), part[7]).to(device)
        if isinstance(agent, TextSlateAgent):
            agent.texts = view.texts
        found.append(last_scores(agent, b, part[5].to(device), part[6].to(device)))
    if isinstance(agent, TextSlateAgent):
        agent.texts = trained_on                                              # rows of a training batch are of its own table
    return np.concatenate(found, 1)


def last_scores(agent, b, rows, categories):
    """forward's scores of rows (B, C) after the last turn alone -> (heads, B, C)."""
    T = b.picked.shape[1]
    if isinstance(agent, TextSlateAgent):
        kind, b = b.kind, b.to("cpu")
        sequences = []
        for i, (row, category) in enumerate(zip(rows.tolist(), categories.tolist())):
            sequences += agent.items(agent.history(b, i, T), row, category)
        last = agent.last(sequences, kind.repeat_interleave(rows.shape[1]))
        return torch.stack([head(last).view(rows.shape) for head in agent.scores]).double().cpu().numpy()
    h = agent.states(b)[:, -1]
    p = agent.item(agent.text(b.words, rows) + agent.category(categories.clamp(min=0)))
    offset = agent.offset[agent.number(torch.tensor([T], device=h.device))]
    return (agent.score(h[:, None], p) + offset).double().cpu().numpy()


# -----------------------------------------------------------------------------
# Folders


class Deployment(NamedTuple):
    """What an agent was trained for, in the place where a language model has its tokenizer: another generator, or another slate, is another problem."""
    generator: str
    slate_size: int
    horizon: int
    max_per_category: int
    tokenizer: object = None      # encoder=text alone

    def save(self, path):
        write_atomically(Path(path) / "deployment.json", json.dumps({k: v for k, v in self._asdict().items() if k != "tokenizer"}) + "\n")
        if self.tokenizer is not None:
            self.tokenizer.save(path)


def new_agent(config, tokenizer=None):
    return TextSlateAgent(config, tokenizer) if config.encoder == "text" else SlateAgent(config)


def load_agent(path, device="cpu"):
    """-> (agent, Deployment) from a folder that checkpoint.save or save_hf wrote. ValueError: another kind of model, a damaged file."""
    path = Path(path)
    if not (path / "config.json").exists() or not (path / "deployment.json").exists():
        raise ValueError(f"{path}: no config.json and deployment.json there; expected the checkpoint of a slate agent (out/<name>/step_..)")
    checkpoint.verify(path)
    settings = checkpoint.read_json(path / "config.json")
    if settings.pop("architectures", None) != ["SlateAgent"]:
        raise ValueError(f"{path}: holds another kind of model than a slate agent")
    try:
        config = SlateAgentConfig(**settings)
        tokenizer = Tokenizer.from_file(path) if config.encoder == "text" else None
        deployment = Deployment(**checkpoint.read_json(path / "deployment.json"), tokenizer=tokenizer)
    except TypeError as e:
        raise ValueError(f"{path}: {e}") from None
    agent = new_agent(config, tokenizer)
    files = checkpoint.weight_files(path)
    handles = checkpoint.checked(path, files, agent)
    with torch.no_grad():
        for name, p in agent.named_parameters():
            p.copy_(handles[files[name]].get_tensor(name))
    return agent.to(device).eval(), deployment
