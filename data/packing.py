"""From documents to batches: mixture by tokens, best-fit packing, rows that do not depend on the number of ranks.

Three steps, the first two on lengths alone:

1. Mixture. The next document comes from the source with the smallest (tokens drawn / share), ties in flag order; a token counts if it is
   trained on. Within a source, epoch e is a permutation that is a pure function of (seed, source, e): no list of indices in memory.
2. Packing. Windows of 4,096 documents are packed into rows of seq_len slots, longest first, each into the fullest row that still holds
   it; then the window's rows are shuffled. A document of n tokens takes n - 1 slots: its last token predicts nothing.
3. make_batch reads the rows that one rank needs.

Everything is a function of the data and the flags, so the state to save is two integers a source, and where in the window we are.

    loader = Loader(sources, {"math": .7, "code": .3}, seq_len=384, seed=0)
    rows = loader.next_rows(total_batch_size)                           # the same on every rank
    for mine in split_rows(rows, device_batch_size, rank, world_size):
        batch = make_batch(mine, sources, seq_len=384)
"""
import bisect
import copy
import difflib
import math
from typing import NamedTuple

import numpy as np
import torch

from common import progress, random_key
from model import Prompts

WINDOW = 4096                  # documents packed together; four times as many fill the rows .0005 to .002 better (measured)

MIN_SAVED = 0.2                # attention to a shared prompt needs a mask in place of the causal kernel: less is not worth it

Row = list[tuple[int, int]]    # (index into the sources, piece), in slot order


class Batch(NamedTuple):
    """B rows of T slots. Legend: N trained-on slots of the whole batch, which may be none."""
    ids: torch.Tensor          # (B, T) int64; 0 in filler
    positions: torch.Tensor    # (B, T) int64; from 0 in every document, and in the filler
    doc_ids: torch.Tensor      # (B, T) int64; 0, 1, ... along a row; filler has an id of its own
    rows: torch.Tensor         # (N,) int64, ascending: indices into B * T whose hidden state predicts a trained-on token
    targets: torch.Tensor      # (N,) int64: that token
    buckets: torch.Tensor      # (N,) int64: index of its source
    num_tokens: int            # slots that hold a token, trained on or not: B * T without the filler

    def to(self, device):
        return Batch(*(t.to(device, non_blocking=True) for t in self[:-1]), self.num_tokens)


# -----------------------------------------------------------------------------
# Order


def mix(x):
    """splitmix64's finalizer: uint64 (N,) -> (N,), every input bit moves every output bit."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def shuffled(places, n, *key):
    """int64 (N,): the items at `places` (N,) of an endless series of shuffles of range(n). Shuffle e fills places e*n to (e+1)*n - 1.

    A Feistel network over the next power of 4, keyed by (key, e): a permutation without a table. A result past n goes through again
    (cycle walking) until it falls below n, which keeps it a permutation of range(n); from 16 items on, less than 4 turns on average.
    """
    if n < 1:
        raise ValueError("nothing to shuffle: expected at least one item")
    places = np.asarray(places, dtype=np.uint64)
    epoch, x = places // n, places % n
    epoch_key = mix(epoch * 0x9E3779B97F4A7C15 + random_key(*key))
    half = max(3, ((n - 1).bit_length() + 1) // 2)           # under 64 places, six rounds do not reach every order evenly
    low = (1 << half) - 1
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> half, x[todo] & low
        for r in range(1, 7):
            left, right = right, left ^ (mix(right + epoch_key[todo] + 0xD1B54A32D192ED03 * r % 2**64) & low)
        x[todo] = left << half | right
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


def merge(streams):
    """Greedy choice of the stream with the smallest key, as one stable sort: a stream's keys only grow, ties go to the earlier stream.

    streams: list of (keys (n,) float64, documents (n, 4) int64). -> documents (sum n, 4)
    """
    keys = np.concatenate([keys for keys, _ in streams])
    return np.concatenate([documents for _, documents in streams])[np.argsort(keys, kind="stable")]


def best_fit(slots, seq_len):
    """slots (N,) -> rows: lists of indices into `slots`, none over seq_len. Longest first, each into the fullest row that holds it."""
    rows, free = [], []                                     # free: sorted space * N + row, so equal space goes to the earlier row
    n = len(slots)
    lengths = slots.tolist()
    for i in np.argsort(-slots, kind="stable").tolist():
        at = bisect.bisect_left(free, lengths[i] * n)
        if at == len(free):
            rows.append([])
            space, row = seq_len, len(rows) - 1
        else:
            space, row = divmod(free.pop(at), n)
        rows[row].append(i)
        if space > lengths[i]:
            bisect.insort(free, (space - lengths[i]) * n + row)
    return rows


# -----------------------------------------------------------------------------
# Rows


class Loader:
    """Plans rows in one global order that no rank count or micro-batch size changes, and resumes exactly.

    sources: {name: TokenFile}, in flag order.
    shares: {name: weight} of trained-on tokens, relative; 0 leaves a source out. None: in proportion to size, one pass over everything
        takes each document once.
    replay, replay_share: names of the sources to replay, and their share r of all tokens. New documents come in an order that does not
        depend on r. Shares are then relative within the new sources, and within the replayed ones.
    new_tokens=N: ends with the new document that reaches N trained-on tokens; replay fills up to N / (1 - r) in all.
    epochs=E: ends after E passes over each new source. With neither, there is no end.
    pack=False: one document a row, in the order drawn.
    """

    def __init__(self, sources, shares=None, *, seq_len, seed=0, replay=(), replay_share=0.0, new_tokens=None, epochs=None, pack=True,
                 window=WINDOW):
        self.sources, self.seq_len, self.seed, self.pack, self.window = sources, seq_len, seed, pack, window
        self.names = list(sources)
        for flag, names in (("mix", shares or ()), ("replay", replay)):
            for name in names:
                if name not in sources:
                    near = difflib.get_close_matches(name, self.names, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"--{flag}: no source is named {name!r}, expected one of {', '.join(self.names)}{hint}")
        for name, source in sources.items():
            if source.seq_len != seq_len:
                raise ValueError(f"source {name}: opened with seq_len {source.seq_len}, expected {seq_len}")
        if not 0 <= replay_share < 1:
            raise ValueError(f"expected a replay share of at least 0 and below 1, found {replay_share}")
        if replay_share > 0 and not replay:
            raise ValueError(f"a replay share of {replay_share} needs a source to replay: name it in --replay")
        if new_tokens is not None and epochs is not None:
            raise ValueError("expected new_tokens or epochs, found both: each says where the run ends")
        if epochs is not None and shares is not None:
            raise ValueError("expected epochs or shares, found both: by shares, the sources do not end together")

        new = [name for name in self.names if name not in replay]
        self.shares = {name: 0.0 for name in self.names} | self._relative(new, shares)
        self.groups = [(new, 1 - replay_share, new_tokens)]               # names, share, budget in tokens
        self.last_place = {name: None for name in self.names}             # documents that may be drawn in all
        if epochs is not None:
            self.last_place |= {name: round(epochs * len(sources[name])) for name in new}
            new_tokens = epochs * sum(sources[name].num_targets for name in new)
        if replay_share > 0:
            old = [name for name in self.names if name in replay]
            self.shares |= self._relative(old, shares)
            self.groups.append((old, replay_share, None if new_tokens is None else new_tokens * replay_share / (1 - replay_share)))
        self.finite = new_tokens is not None
        self._restart()

    def _restart(self):
        self.window_index, self.row = 0, 0
        self.docs = dict.fromkeys(self.names, 0)            # drawn before this window: documents (place in the shuffles), and
        self.tokens = dict.fromkeys(self.names, 0)          # trained-on tokens
        self._plan = None                                   # rows of this window, documents drawn for it

    def _relative(self, names, shares):
        given = [name for name in names if name in (shares or ())]
        if not given:
            shares = {name: self.sources[name].num_targets for name in names}
        elif missing := [name for name in names if name not in shares]:
            raise ValueError(f"--mix: no share for {', '.join(missing)}; 0 leaves a source out")
        for name in names:
            if not 0 <= shares[name] < math.inf:
                raise ValueError(f"--mix: expected a share of at least 0 for {name}, found {shares[name]}")
            if shares[name] > 0 and not len(self.sources[name]):
                raise ValueError(f"source {name} has no documents to draw from ({self.sources[name].folder})")
        if not sum(shares[name] for name in names):
            raise ValueError(f"nothing to draw from: the shares of {', '.join(names) or 'the new sources'} add up to 0")
        return {name: float(shares[name]) for name in names}

    def _draw(self):
        """The window's documents in mixture order: int64 (W, 4) of source, piece, slots, trained-on tokens."""
        groups = []
        for names, share, budget in self.groups:
            streams = []
            for name in names:
                if self.shares[name] == 0:
                    continue
                source, place = self.sources[name], self.docs[name]
                # the window holds at most this many of each source, so no other document can be among its first
                stop = place + self.window if self.last_place[name] is None else min(place + self.window, self.last_place[name])
                pieces = shuffled(np.arange(place, stop), len(source), self.seed, name)
                _, slots, num_targets = source.locate(pieces)
                before = self.tokens[name] + np.cumsum(num_targets) - num_targets
                index = np.full_like(pieces, self.names.index(name))
                streams.append((before / self.shares[name], np.stack([index, pieces, slots, num_targets], axis=1)))
            documents = merge(streams)[:self.window]
            before = sum(self.tokens[name] for name in names) + np.cumsum(documents[:, 3]) - documents[:, 3]
            if budget is not None:
                documents, before = documents[before < budget], before[before < budget]
            groups.append((before / share, documents))      # by group first: the order inside a group cannot depend on the other's share
        return merge(groups)[:self.window]

    def _plan_window(self):
        documents = self._draw()
        pairs = [tuple(pair) for pair in documents[:, :2].tolist()]
        if self.pack:
            rows = best_fit(documents[:, 2], self.seq_len)
            # packing sorts by length; without a shuffle the long documents would be trained on first
            order = shuffled(np.arange(len(rows)), max(len(rows), 1), self.seed, "rows", self.window_index)
            rows = [[pairs[i] for i in rows[j]] for j in order.tolist()]
        else:
            rows = [[pair] for pair in pairs]
        self._plan = rows, documents

    def next_rows(self, k):
        """The next k rows of the global order; fewer at the end of a finite run, then none."""
        taken = []
        while len(taken) < k:
            if self._plan is None:
                self._plan_window()
            rows, documents = self._plan
            if not rows:
                break
            more = rows[self.row:self.row + k - len(taken)]
            taken += more
            self.row += len(more)
            if self.row == len(rows):
                for i, name in enumerate(self.names):
                    mine = documents[:, 0] == i
                    self.docs[name] += int(mine.sum())
                    self.tokens[name] += int(documents[mine, 3].sum())
                self.window_index, self.row, self._plan = self.window_index + 1, 0, None
        return taken

    def num_rows(self):
        """Rows of a whole finite run, counted by planning it; None without an end."""
        if not self.finite:
            return None
        probe = copy.copy(self)
        probe._restart()
        windows = iter(lambda: len(probe.next_rows(probe.window)), 0)                 # at most `window` rows at a time
        return sum(progress(windows, desc="plan rows"))

    def _settings(self):
        """Whatever else the order of rows depends on: a resumed run that differs in it would train on other documents."""
        return {"seed": self.seed, "seq_len": self.seq_len, "window": self.window, "pack": self.pack, "shares": self.shares,
                "groups": [[names, share, budget] for names, share, budget in self.groups], "last_place": self.last_place,
                "pieces": {name: len(source) for name, source in self.sources.items()}}

    def state_dict(self):
        """Plain ints, floats and strings. The window under way is planned again on load."""
        return {"window_index": self.window_index, "row": self.row, "docs": dict(self.docs), "tokens": dict(self.tokens),
                "settings": self._settings()}

    def load_state_dict(self, state):
        for key, value in self._settings().items():
            if state["settings"][key] != value:
                raise ValueError(f"cannot continue the order of rows: {key} was {state['settings'][key]}, found {value}; resume with the "
                                 "flags and data of the saved run, or start a new one from its weights (--init)")
        self.window_index, self.row, self._plan = state["window_index"], state["row"], None
        self.docs, self.tokens = dict(state["docs"]), dict(state["tokens"])


def split_rows(rows, device_batch_size, rank=0, world_size=1):
    """This rank's micro-batches of a global list of rows. Ranks take turns; the last turn is filled with empty rows, so that all ranks
    run the same number of equal micro-batches. An empty row has nothing to train on and changes no sum."""
    turn = device_batch_size * world_size
    rows = rows + [[]] * (-len(rows) % turn)
    first = rank * device_batch_size
    return [rows[at + first:at + first + device_batch_size] for at in range(0, len(rows), turn)]


def make_batch(rows, sources, seq_len=None):
    """Reads rows into a Batch. rows: B lists of (source index, piece). seq_len None: as wide as the longest row (for pack=False).

    One pass over flat arrays, since a row can hold a hundred documents. Legend: P pieces of the batch, S slots that hold a token.
    """
    files = list(sources.values())
    pairs = [(b, d, s, piece) for b, row in enumerate(rows) for d, (s, piece) in enumerate(row)]
    row, doc, source, piece = np.array(pairs, np.int64).reshape(-1, 4).T                      # (P,) each
    start, slots = np.empty_like(piece), np.empty_like(piece)
    for s in np.unique(source).tolist():
        start[source == s], slots[source == s], _ = files[s].locate(piece[source == s])
    used = np.bincount(row, slots, minlength=len(rows)).astype(np.int64)                      # (B,)
    B, T = len(rows), seq_len or int(max(1, used.max(initial=0)))

    parts = [files[s].read(*where) for s, *where in zip(source.tolist(), start.tolist(), slots.tolist())]
    tokens, mask = (np.concatenate([part[i] for part in parts] or [[]]).astype(np.int64) for i in (0, 1))       # (S + P,)
    owner = np.repeat(np.arange(len(piece)), slots)                                           # (S,) piece of each slot
    slot = np.arange(len(owner))
    token = slot + owner                                    # a piece has one token more than slots
    at = slot + (np.arange(B) * T - (np.cumsum(used) - used))[row[owner]]                     # (S,) where in B * T

    ids, targets, buckets = np.zeros(B * T, np.int64), np.full(B * T, -1), np.zeros(B * T, np.int64)
    doc_ids = np.repeat(np.bincount(row, minlength=B), T)                                     # filler comes after the last document
    positions = np.arange(B * T) % T - np.repeat(used, T)
    ids[at], buckets[at], doc_ids[at] = tokens[token], source[owner], doc[owner]
    positions[at] = slot - (np.cumsum(slots) - slots)[owner]
    targets[at] = np.where(mask[token + 1], tokens[token + 1], -1)                            # by position, never by id
    flat = np.flatnonzero(targets >= 0)
    shaped = (x.reshape(B, T) for x in (ids, positions, doc_ids))
    return Batch(*map(torch.from_numpy, (*shaped, flat, targets[flat], buckets[flat])), num_tokens=len(slot))


# -----------------------------------------------------------------------------
# Sequences at hand: samples of a policy, pairs of preferences


class SequenceBatch(NamedTuple):
    """Some of a list of sequences, in B rows of T slots. Legend: N trained-on tokens in these rows, which may be none."""
    ids: torch.Tensor          # (B, T) int64; 0 in filler
    positions: torch.Tensor    # (B, T) int64; from 0 in every sequence
    doc_ids: torch.Tensor | Prompts | None      # (B, T) int64; None: each row is one sequence, causal attention is enough; Prompts: B is 1
    rows: torch.Tensor         # (N,) int64: indices into B * T whose hidden state predicts a trained-on token, sequence after sequence
    targets: torch.Tensor      # (N,) int64: that token
    tokens: torch.Tensor       # (N,) int64: its number among the trained-on tokens of the whole list, sequence after sequence
    sequences: torch.Tensor    # (N,) int64: index of its sequence in the list
    num_tokens: int            # slots that hold a token

    def to(self, device):
        return SequenceBatch(*(t if t is None else t.to(device, non_blocking=True) for t in self[:-1]), self.num_tokens)


def token_offsets(sequences):
    """int64 (S + 1,): where each sequence's trained-on tokens begin among those of all. sequences: [(ids, mask), ...]"""
    return np.concatenate([[0], np.cumsum([int(np.sum(mask[1:], dtype=np.int64)) for _, mask in sequences])]).astype(np.int64)


def sequence_batch(sequences, which, offsets, pack=False):
    """One SequenceBatch of the sequences `which` (indices). sequences: [(ids, mask), ...], mask 1 where a token is trained on; the first
    token of a sequence predicts nothing backwards and must have mask 0. offsets: token_offsets(sequences).

    Where sequences are the same up to their first trained-on token, that prompt is in the batch once (see model.Prompts), if this saves at least
    MIN_SAVED of the tokens. pack: several short sequences share a row instead. Without any sequence, one row of filler: a rank with nothing to do
    runs the same code and changes no sum.
    """
    chosen = [(np.asarray(sequences[i][0], dtype=np.int64), np.asarray(sequences[i][1])) for i in which]
    for i, (_, mask) in zip(which, chosen):
        if mask[0]:
            raise ValueError(f"sequence {i}: its first token has mask 1, and nothing stands before it that could predict it")
    trained = [np.flatnonzero(mask) for _, mask in chosen]
    owners = [np.full(len(at), i) for i, at in zip(which, trained)]
    targets = [ids[at] for (ids, _), at in zip(chosen, trained)]
    tokens = [offsets[i] + np.arange(len(at)) for i, at in zip(which, trained)]
    lengths = np.array([len(ids) - 1 for ids, _ in chosen], dtype=np.int64)
    starts = [int(at[0]) if len(at) else n for at, n in zip(trained, lengths)]             # of what is sampled: all before it is the prompt
    prompts, owner = {}, []
    for (ids, _), start in zip(chosen, starts):
        owner.append(prompts.setdefault(ids[:start].tobytes(), len(prompts)))
    firsts = [owner.index(g) for g in range(len(prompts))]
    prompt_lengths = np.array([starts[j] for j in firsts], dtype=np.int64)
    num_saved = sum(starts) - int(prompt_lengths.sum())
    if not pack and 0 < num_saved >= MIN_SAVED * lengths.sum():
        width, room = int(prompt_lengths.max()), max(1, max(int(n) - start for n, start in zip(lengths, starts)))
        tops, bottoms = np.zeros((len(firsts), width), dtype=np.int64), np.zeros((len(chosen), room), dtype=np.int64)
        rows = []
        for g, j in enumerate(firsts):
            tops[g, :starts[j]] = chosen[j][0][:starts[j]]
        for j, ((ids, _), start) in enumerate(zip(chosen, starts)):
            bottoms[j, :lengths[j] - start] = ids[start:-1]
            before = trained[j] - 1 - start                                                # slot of the answer; -1: the end of the prompt
            rows.append(np.where(before < 0, owner[j] * width + start - 1, tops.size + j * room + before))
        ids = np.concatenate([tops.ravel(), bottoms.ravel()])[None]
        positions = np.concatenate([np.tile(np.arange(width), len(firsts)), (prompt_lengths[owner][:, None] + np.arange(room)).ravel()])[None]
        doc_ids = Prompts(width, torch.from_numpy(prompt_lengths), torch.tensor(owner))
        num_tokens = int(lengths.sum()) - num_saved
    else:
        width, num_tokens = max(1, int(lengths.max(initial=1))), int(lengths.sum())
        rows_of = best_fit(lengths, width) if pack else [[j] for j in range(len(chosen))]
        ids, positions, doc_ids = (np.zeros((max(1, len(rows_of)), width), dtype=np.int64) for _ in range(3))
        rows = [None] * len(chosen)
        for b, members in enumerate(rows_of):
            at = 0
            for number, j in enumerate(members):
                n = int(lengths[j])
                ids[b, at:at + n], positions[b, at:at + n], doc_ids[b, at:at + n] = chosen[j][0][:-1], np.arange(n), number
                rows[j] = b * width + at + trained[j] - 1
                at += n
            positions[b, at:], doc_ids[b, at:] = np.arange(width - at), len(members)
        doc_ids = torch.from_numpy(doc_ids) if pack else None
    flat = [torch.from_numpy(np.concatenate(x).astype(np.int64)) if x else torch.zeros(0, dtype=torch.int64) for x in (rows, targets, tokens, owners)]
    return SequenceBatch(torch.from_numpy(ids), torch.from_numpy(positions), doc_ids, *flat, num_tokens)


def micro_batches(lengths, device_batch_size, unit=1, groups=None):
    """Indices of sequences, cut into forward passes: longest first, device_batch_size units each, so that little is padded.

    unit: so many neighbours (a pair: 2) stay together and count as one. groups: a number for each unit; units of one group, which share a
    prompt, come one after the other, the group with the longest first. -> lists of indices; none for no sequences
    """
    lengths = np.asarray(lengths, dtype=np.int64).reshape(-1, unit).max(1, initial=0)
    groups = np.arange(len(lengths)) if groups is None else np.unique(np.asarray(groups, dtype=np.int64), return_inverse=True)[1]
    longest = np.zeros(len(lengths), dtype=np.int64)
    np.maximum.at(longest, groups, lengths)
    order = np.lexsort((np.arange(len(lengths)), -lengths, groups, -longest[groups]))
    cuts = [order[at:at + device_batch_size] for at in range(0, len(order), device_batch_size)]
    return [[int(unit * g + k) for g in cut for k in range(unit)] for cut in cuts]
