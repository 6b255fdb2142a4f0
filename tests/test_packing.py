"""Mixture, packing and batches: who is drawn when, what is in a row, and that neither ranks nor a restart change it."""
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokens
from data.packing import Loader, best_fit, make_batch, shuffled, split_rows
from data.tokens import Chunk, TokenFile
from tokenizer import Tokenizer

TOK = Tokenizer.bytes()


def make_source(folder, lengths, seq_len, chat=False, first=0):
    """Documents of the given numbers of tokens; all tokens of a source are different, so that each can be traced."""
    ids, chunks = itertools.count(first), []
    for n in lengths:
        document = [next(ids) for _ in range(n)]
        mask = [0] * (n // 2) + [1] * (n - n // 2) if chat else None
        chunks.append(Chunk("source", "train", document, mask))

    class Wide:
        vocab_size, fingerprint = 1 << 20, staticmethod(lambda: "wide")
    tokens.write_sources(folder, Wide, chunks)
    return TokenFile(folder / "source", seq_len=seq_len)


@pytest.fixture
def two(tmp_path):
    """A text with documents longer than a row, and conversations."""
    rng = random.Random(0)
    return {"text": make_source(tmp_path / "a", [rng.randint(2, 70) for _ in range(300)], 24),
            "chat": make_source(tmp_path / "b", [rng.randint(4, 25) for _ in range(500)], 24, chat=True, first=500_000)}


def drawn(loader, k=10**9):
    """[(source, piece)] in mixture order; needs pack=False."""
    return [row[0] for row in loader.next_rows(k)]


# -----------------------------------------------------------------------------
# Order


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**40), epochs=st.integers(1, 4), start=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(n, seed, epochs, start):
    places = np.arange(start * n, (start + epochs) * n)
    items = shuffled(places, n, seed, "name").reshape(epochs, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in items.tolist())
    some = places[::3]                                      # a function of the place alone
    assert shuffled(some, n, seed, "name").tolist() == items.ravel()[::3].tolist()


def test_shuffles_are_even_and_differ():
    n, epochs = 5, 24_000
    orders = Counter(map(tuple, shuffled(np.arange(n * epochs), n, 1, "a").reshape(-1, n).tolist()))
    assert len(orders) == 120                               # all orders of 5 items, each about 200 times
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 180     # chi-square, 119 degrees: p = 0.0003
    a = shuffled(np.arange(1000), 1000, 1, "a")
    assert all((a != shuffled(np.arange(1000), 1000, *key)).mean() > 0.9 for key in ((2, "a"), (1, "b")))
    assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.1


def test_shuffle_is_fixed_for_good():
    """Runs of last month must resume: these numbers may change only together with a note to users."""
    assert shuffled(np.arange(8), 8, 0, "math").tolist() == [6, 7, 3, 0, 1, 5, 2, 4]


def test_shares_are_realised_to_one_document(two):
    shares = {"text": 0.7, "chat": 0.3}
    loader, count, longest = Loader(two, shares, seq_len=24, pack=False), Counter(), 24
    for source, piece in drawn(loader, 20_000):
        name = list(two)[source]
        count[name] += int(two[name].locate(np.array(piece))[2])
        total = sum(count.values())
        for name in two:
            assert abs(count[name] - shares[name] * total) <= longest
    assert count["text"] > 10 * two["text"].num_targets     # many epochs


def test_mixture_order_by_hand(tmp_path):
    """Documents of 4 trained tokens each; the smallest drawn / share is next, ties in flag order."""
    sources = {n: make_source(tmp_path / n, [5] * 9, 8) for n in "abc"}
    loader = Loader(sources, {"a": 2, "b": 1, "c": 0}, seq_len=8, pack=False)
    # drawn / share: 0 0 -> a; 2 0 -> b; 2 4 -> a; 4 4 -> a (flag order); 6 4 -> b; ...
    assert "".join("abc"[s] for s, _ in drawn(loader, 9)) == "abaabaaba"


def test_greedy_rule_matches_a_plain_loop(two):
    """The vectorised mixture against the rule as the specification words it."""
    shares = {"text": 0.37, "chat": 0.63}
    tokens_drawn, docs, expected = dict.fromkeys(two, 0), dict.fromkeys(two, 0), []
    for _ in range(3000):
        name = min(two, key=lambda n: tokens_drawn[n] / shares[n])
        piece = int(shuffled([docs[name]], len(two[name]), 3, name)[0])
        expected.append((list(two).index(name), piece))
        docs[name] += 1
        tokens_drawn[name] += int(two[name].locate(np.array(piece))[2])
    assert drawn(Loader(two, shares, seq_len=24, seed=3, window=700, pack=False), 3000) == expected


# -----------------------------------------------------------------------------
# Replay


def test_replay_arms_see_the_same_new_documents(tmp_path):
    rng = random.Random(1)
    sources = {n: make_source(tmp_path / n, [rng.randint(2, 25) for _ in range(400)], 24, chat=n == "b") for n in ("a", "old1", "b", "old2")}
    new_tokens, arms = 20_000, {}
    for r in (0, 0.01, 0.05, 0.2, 0.9):
        loader = Loader(sources, {"a": 0.7, "b": 0.3}, seq_len=24, seed=5, replay=("old1", "old2"), replay_share=r, new_tokens=new_tokens,
                        pack=False)
        order = drawn(loader)
        trained = [int(list(sources.values())[s].locate(np.array(p))[2]) for s, p in order]
        new = [t for (s, _), t in zip(order, trained) if s in (0, 2)]
        assert sum(new) >= new_tokens > sum(new[:-1])       # the document that reaches N is the last
        assert new_tokens / (1 - r) - 24 <= sum(trained) <= new_tokens / (1 - r) + 48
        half = sum(t for (s, _), t in zip(order[:len(order) // 2], trained) if s in (1, 3)) / sum(trained[:len(order) // 2])
        assert abs(half - r) < 0.02                         # replay is spread over the run
        arms[r] = [pair for pair in order if pair[0] in (0, 2)]
        assert loader.num_rows() == len(order) and loader.next_rows(1) == []
    assert all(arm == arms[0] for arm in arms.values())
    assert arms[0] != [p for p in drawn(Loader(sources, {"a": 0.7, "b": 0.3}, seq_len=24, seed=6, replay=("old1", "old2"),
                                               new_tokens=new_tokens, pack=False))]


def test_replay_with_whole_epochs(two):
    loader = Loader(two, seq_len=24, replay=("text",), replay_share=0.25, epochs=2, pack=False)
    order = drawn(loader)
    assert Counter(p for s, p in order if s == 1) == dict.fromkeys(range(500), 2)
    replayed = sum(int(two["text"].locate(np.array(p))[2]) for s, p in order if s == 0)
    assert abs(replayed - 2 * two["chat"].num_targets / 3) <= 24


# -----------------------------------------------------------------------------
# Packing


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_packs_all_and_overfills_none(lengths):
    rows = best_fit(np.array(lengths), 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert max(sizes) <= 50
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 50) + 4 or min(lengths) > 25            # best-fit decreasing: 11/9 of the optimum + 4
    assert sum(size <= 25 for size in sizes) <= 1           # two half-empty rows would have been one


def test_best_fit_by_hand():
    assert best_fit(np.array([3, 5, 4, 6, 2]), 10) == [[3, 2], [1, 0, 4]]       # 6+4; 5+3+2
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 177, 4096)
    assert lengths.sum() / 176 / len(best_fit(lengths, 176)) > 0.98


def test_batch_by_hand(tmp_path):
    sources = {"t": make_source(tmp_path / "t", [4, 3], 8), "c": make_source(tmp_path / "c", [4], 8, chat=True, first=90)}
    batch = make_batch([[(0, 0), (1, 0)], [], [(0, 1)]], sources, 8)
    assert batch.ids.tolist() == [[0, 1, 2, 90, 91, 92, 0, 0], [0] * 8, [4, 5] + [0] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch.doc_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2], [0] * 8, [0, 0, 1, 1, 1, 1, 1, 1]]
    assert batch.rows.tolist() == [0, 1, 2, 4, 5, 16, 17]   # slot 3 predicts 91, which is not trained on
    assert batch.targets.tolist() == [1, 2, 3, 92, 93, 5, 6]
    assert batch.buckets.tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert batch.num_tokens == 8 and all(t.dtype == torch.int64 for t in batch[:-1])
    padded = make_batch([[(0, 1)], [(0, 0)]], sources)
    assert padded.ids.tolist() == [[4, 5, 0], [0, 1, 2]] and padded.rows.tolist() == [0, 1, 3, 4, 5]


def test_a_batch_with_nothing_to_train_on_is_valid(two):
    batch = make_batch([[], []], two, 24)
    assert batch.ids.shape == (2, 24) and len(batch.rows) == len(batch.targets) == len(batch.buckets) == batch.num_tokens == 0
    assert make_batch([[]], two).ids.shape == (1, 1)
    assert batch.to("cpu").num_tokens == 0


def test_an_epoch_trains_on_every_token_once_and_isolates_documents(two):
    """Over one pass, packed: each token that may be a target is one exactly once, from the token before it, in its own document."""
    loader, targets, slots, num_rows = Loader(two, seq_len=24, epochs=1), Counter(), 0, 0
    while rows := loader.next_rows(8):
        batch = make_batch(rows, two, 24)
        num_rows += len(rows)
        slots += batch.num_tokens
        ids, doc_ids, positions = (x.flatten() for x in (batch.ids, batch.doc_ids, batch.positions))
        assert (batch.targets == ids[batch.rows] + 1).all()                     # tokens of a document are consecutive numbers here
        for target, bucket in zip(batch.targets.tolist(), batch.buckets.tolist()):
            targets[target] += 1
            assert bucket == (target >= 500_000)
        for b, row in enumerate(rows):
            assert sum(len(two[list(two)[s]].piece(p)[0]) - 1 for s, p in row) <= 24
            for d in range(len(row)):
                here = batch.doc_ids[b] == d
                assert (batch.positions[b][here] == torch.arange(int(here.sum()))).all()
                assert batch.ids[b][here].diff().eq(1).all() and here.int().diff().abs().sum() <= 2         # one document, one run
            filler = batch.doc_ids[b] == len(row)
            assert not filler.reshape(-1)[(batch.rows - 24 * b)[(batch.rows // 24) == b]].any()
    expected = Counter()
    for name, chat in (("text", False), ("chat", True)):
        file = two[name]
        for start, end in zip(file._offsets, file._offsets[1:]):
            n = int(end - start)
            first = max(1, n // 2) if chat else 1
            expected.update(range(int(start) + 500_000 * chat + first, int(end) + 500_000 * chat))
    assert targets == expected and sum(targets.values()) == sum(f.num_targets for f in two.values())
    assert num_rows == loader.num_rows() and slots / (24 * num_rows) > 0.97


def test_packed_and_padded_train_on_the_same(two):
    options = dict(seq_len=24, seed=7, new_tokens=3000)
    both = []
    for pack in (True, False):
        loader = Loader(two, {"text": 0.5, "chat": 0.5}, pack=pack, **options)
        batch = make_batch(loader.next_rows(10**6), two, 24 if pack else None)
        ids, positions = batch.ids.flatten(), batch.positions.flatten()
        both.append((len(batch.ids), sorted(zip(batch.targets.tolist(), ids[batch.rows].tolist(), positions[batch.rows].tolist(),
                                                batch.buckets.tolist()))))
    assert both[0][1] == both[1][1] and both[0][0] < 0.8 * both[1][0]


def test_rows_of_a_window_are_shuffled(two):
    rows = Loader(two, seq_len=24, epochs=1).next_rows(10**6)
    longest = [max(len(two[list(two)[s]].piece(p)[0]) for s, p in row) for row in rows]
    assert abs(np.corrcoef(longest, np.arange(len(rows)))[0, 1]) < 0.2          # packing alone puts the long documents first


# -----------------------------------------------------------------------------
# Ranks and restarts


@pytest.mark.parametrize("world_size, device_batch_size", [(2, 4), (3, 2), (4, 1), (1, 8)])
def test_ranks_share_the_rows_of_one_rank(two, world_size, device_batch_size):
    loaders = [Loader(two, seq_len=24, seed=1, window=64, new_tokens=6000) for _ in range(world_size)]
    alone, turn = Loader(two, seq_len=24, seed=1, window=64, new_tokens=6000), world_size * device_batch_size
    expected = alone.next_rows(10**6)
    seen, k = [], 3 * turn + 1
    while True:
        rows = [loader.next_rows(k) for loader in loaders]
        mine = [split_rows(r, device_batch_size, rank, world_size) for rank, r in enumerate(rows)]
        assert len({len(m) for m in mine}) == 1             # no rank waits for another's micro-batch
        assert all(len(micro) == device_batch_size for m in mine for micro in m)
        union = [row for micros in zip(*mine) for micro in micros for row in micro]         # rank after rank, turn after turn
        assert union[:len(rows[0])] == rows[0] and not any(union[len(rows[0]):])
        seen += rows[0]
        if not rows[0]:
            break
    assert seen == expected
    pieces = [piece for row in seen for piece in row]
    assert len(seen) == alone.num_rows() and len(set(pieces)) == len(pieces)    # less than an epoch: disjoint


@pytest.mark.parametrize("pack", [True, False])
def test_resume_in_the_middle_of_a_window_is_exact(two, pack):
    options = dict(seq_len=24, seed=2, replay=("text",), replay_share=0.3, new_tokens=9000, window=100, pack=pack)
    whole = Loader(two, **options)
    expected, states = [], []
    while True:
        states.append(json.dumps(whole.state_dict()))       # what a checkpoint holds is plain JSON
        rows = whole.next_rows(7)
        if not rows:
            break
        expected.append(rows)
    assert len(expected) > 30 and any(json.loads(s)["row"] > 0 for s in states)
    for i, state in list(enumerate(states))[::5]:
        loader = Loader(two, **options)
        loader.next_rows(5)                                 # whatever it did before
        loader.load_state_dict(json.loads(state))
        assert [loader.next_rows(7) for _ in expected[i:]] == expected[i:]
        assert loader.next_rows(7) == []


def test_resume_with_another_order_is_refused(two, tmp_path):
    state = Loader(two, seq_len=24, seed=2).state_dict()
    with pytest.raises(ValueError, match="seed was 2, found 3"):
        Loader(two, seq_len=24, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match="pack was True, found False"):
        Loader(two, seq_len=24, seed=2, pack=False).load_state_dict(state)
    other = two | {"text": make_source(tmp_path / "other", [5] * 7, 24)}
    with pytest.raises(ValueError, match="shares|pieces"):
        Loader(other, seq_len=24, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="shares"):
        Loader(two, {"text": 1, "chat": 1}, seq_len=24, seed=2).load_state_dict(state)


def test_planning_does_not_depend_on_how_rows_are_asked_for(two):
    a, b = (Loader(two, seq_len=24, seed=4, window=50) for _ in range(2))
    rng = random.Random(0)
    assert a.next_rows(400) == list(itertools.islice((row for _ in iter(int, 1) for row in b.next_rows(rng.randint(1, 30))), 400))


# -----------------------------------------------------------------------------
# Settings


def test_without_shares_sources_end_together(two):
    order = drawn(Loader(two, seq_len=24, epochs=1, pack=False))
    assert Counter(order) == {(s, p): 1 for s, file in enumerate(two.values()) for p in range(len(file))}
    quarter = Counter(s for s, _ in order[:len(order) // 4])
    assert abs(quarter[0] / len(two["text"]) - 0.25) < 0.03
    assert Loader(two, seq_len=24).num_rows() is None
    assert Counter(drawn(Loader(two, seq_len=24, epochs=1.5, pack=False)))[(1, 0)] in (1, 2)


def test_share_zero_is_never_drawn(two):
    assert {s for s, _ in drawn(Loader(two, {"text": 0, "chat": 1}, seq_len=24, pack=False), 3000)} == {1}


@pytest.mark.parametrize("options, reason", [
    (dict(shares={"tex": 1}), "no source is named 'tex'.*did you mean 'text'"),
    (dict(shares={"text": 1}), "no share for chat"),
    (dict(shares={"text": -1, "chat": 1}), "at least 0 for text, found -1"),
    (dict(shares={"text": float("nan"), "chat": 1}), "at least 0 for text, found nan"),
    (dict(shares={"text": 0, "chat": 0}), "add up to 0"),
    (dict(shares={"text": 1, "chat": 1}, epochs=1), "epochs or shares"),
    (dict(new_tokens=5, epochs=1), "new_tokens or epochs"),
    (dict(replay_share=0.1), "needs a source to replay"),
    (dict(replay=("old",), replay_share=0.1), "no source is named 'old'"),
    (dict(replay=("text",), replay_share=1), "below 1, found 1"),
    (dict(replay=("text", "chat"), replay_share=0.1), "shares of the new sources add up to 0"),
    (dict(seq_len=23), "source text: opened with seq_len 24, expected 23"),
])
def test_wrong_settings_say_so(two, options, reason):
    with pytest.raises(ValueError, match=reason):
        Loader(two, **{"seq_len": 24} | options)


def test_an_empty_source_cannot_be_drawn_from(two, tmp_path):
    folder = tmp_path / "empty"
    tokens.write_sources(folder, TOK, [Chunk("source", "val", [1, 2])])
    sources = two | {"empty": TokenFile(folder / "source", seq_len=24)}
    with pytest.raises(ValueError, match="source empty has no documents"):
        Loader(sources, {"text": 1, "chat": 1, "empty": 1}, seq_len=24)
    assert Loader(sources, {"text": 1, "chat": 1, "empty": 0}, seq_len=24).next_rows(3)
