"""Generation: what is sampled, its log-probabilities, and that neither neighbours, slots nor refills change it."""
import math
from dataclasses import replace

import pytest
import torch

from engine import Cache, Window, decode, decoder_weights, extend, generate, sample, splitmix, uniform
from model import Transformer, add_lora, config_for_size

END_TURN, END_TEXT = 258, 256


class Tok:
    """The few things that generate needs of a tokenizer."""
    end_of_turn_id, end_of_text_id, vocab_size = END_TURN, END_TEXT, 265

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model():
    model = Transformer(config_for_size("nano", 265)).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim == 2:                                  # sharper than at initialization, so that samples differ from uniform noise
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.15)
    return model


PROMPTS = [list(range(5, 5 + n)) for n in (3, 9, 1, 20, 7)]
STOPS = {END_TURN, END_TEXT} | set(range(30))            # often enough that rows finish at different times


def logps_of(model, prompt, rollout, temperature=1.0):
    """What a trainer computes: one forward over prompt and response, no cache."""
    logps = (model.logits(torch.tensor([prompt + rollout.ids])) / temperature).log_softmax(-1)[0]
    return logps[len(prompt) - 1:-1].gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_the_models(model, temperature):
    groups = generate(model, Tok(), PROMPTS, num_samples=3, max_new_tokens=40, temperature=temperature, seed=3, stop_ids=STOPS)
    for prompt, group in zip(PROMPTS, groups):
        for r in group:
            assert len(r.ids) == len(r.logps) == len(r.mask) and set(r.mask) == {1}
            assert (logps_of(model, prompt, r, temperature) - torch.tensor(r.logps)).abs().max() < 1e-5


@pytest.mark.parametrize("window", [1, 2, 40])
def test_cached_equals_uncached_greedy(model, window):
    """Token by token without a cache, by argmax of the whole sequence's logits."""
    (rollout,), = generate(model, Tok(), [PROMPTS[1]], max_new_tokens=25, temperature=0, stop_ids=set(), window=window)
    ids = list(PROMPTS[1])
    for _ in range(25):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert rollout.ids == ids[len(PROMPTS[1]):]


@pytest.mark.parametrize("window", [1, 5])
def test_same_rollout_alone_batched_and_refilled(model, window):
    options = dict(max_new_tokens=40, stop_ids=STOPS, window=window)
    seeds = [11, 22, 33, 44, 55]
    together = generate(model, Tok(), PROMPTS, num_samples=4, seed=seeds, **options)
    refilled = generate(model, Tok(), PROMPTS, num_samples=4, seed=seeds, max_slots=6, **options)
    assert [[r.ids for r in g] for g in together] == [[r.ids for r in g] for g in refilled]
    for prompt, seed, group in zip(PROMPTS, seeds, together):
        alone, = generate(model, Tok(), [prompt], num_samples=4, seed=[seed], **options)
        assert [r.ids for r in alone] == [r.ids for r in group]
        assert torch.tensor(alone[2].logps).sub(torch.tensor(group[2].logps)).abs().max() < 1e-5
    assert len({tuple(r.ids) for g in together for r in g}) > 15             # samples of one prompt differ
    lengths = {len(r.ids) for g in together for r in g}
    assert len(lengths) > 3, "rows must finish at different times, or compaction and refill were not exercised"


def test_stop_and_length(model):
    groups = generate(model, Tok(), PROMPTS, num_samples=4, max_new_tokens=15, seed=1, stop_ids=STOPS)
    reasons = set()
    for r in (r for g in groups for r in g):
        reasons.add(r.finish_reason)
        assert all(i not in STOPS for i in r.ids[:-1])
        if r.finish_reason == "stop":
            assert r.ids[-1] in STOPS and r.text == Tok().decode(r.ids[:-1])
        else:
            assert len(r.ids) == 15 and r.ids[-1] not in STOPS and r.text == Tok().decode(r.ids)
    assert reasons == {"stop", "length"}


def test_tool_results_are_appended_not_sampled(model):
    """Token in, token out: the appended ids have mask 0 and log-probability 0, and what follows is conditioned on them."""
    seen = []

    def tools(prompt, number, ids):
        seen.append((prompt, number, tuple(ids)))
        return [7, 8, 9, 10][:2 + prompt % 3] if len([s for s in seen if s[:2] == (prompt, number)]) < 3 else None

    class EndsOften(Tok):
        end_of_turn_id = 33

    stop_ids = {33}
    model_bias = model.lm_head.weight.data.clone()
    model.lm_head.weight.data[33] += 0.6 * model.lm_head.weight.data.std() * torch.randn(64, generator=torch.Generator().manual_seed(5))
    groups = generate(model, EndsOften(), PROMPTS, num_samples=8, max_new_tokens=60, seed=2, tools=tools, stop_ids=stop_ids)
    again = generate(model, EndsOften(), PROMPTS, num_samples=8, max_new_tokens=60, seed=2, stop_ids=stop_ids, max_slots=9,
                     tools=lambda p, n, ids, c={}: (c.__setitem__((p, n), c.get((p, n), 0) + 1),
                                                    [7, 8, 9, 10][:2 + p % 3] if c[(p, n)] < 3 else None)[1])
    checked = 0
    for prompt, group, other in zip(PROMPTS, groups, again):
        for r, o in zip(group, other):
            assert r.ids == o.ids, "tool turns must not depend on the slots"
            assert len(r.ids) <= 60
            expected = logps_of(model, prompt, r)
            for mask, logp, truth in zip(r.mask, r.logps, expected.tolist()):
                assert abs(logp - truth) < 1e-5 if mask else logp == 0
            if 0 in r.mask:
                first = r.mask.index(0)
                assert r.ids[first - 1] == 33 and r.ids[first:first + 2] == [7, 8]
                checked += 1
    model.lm_head.weight.data.copy_(model_bias)
    assert checked >= 3 and all(ids[-1] == 33 for *_, ids in seen)
    assert all(33 not in ids[:-1] for *_, ids in seen), "a turn begins after the last tool result"


def test_steps_without_a_look_change_nothing(model):
    """Windows of 1, 3 and 16 steps with tools, refills, limits and top_p: every id and log-probability. Which of them end within a window differs."""
    def play(window, **options):
        turns = {}
        tools = lambda p, n, ids: [7] * (1 + (p + n) % 5) if turns.setdefault((p, n), []).append(ids) or len(turns[p, n]) < 4 else None
        return [r for g in generate(model, Tok(), PROMPTS, num_samples=4, max_new_tokens=60, max_slots=9, seed=4, tools=tools,
                                    stop_ids={END_TURN, END_TEXT, 30, 31}, window=window, **options) for r in g]
    for options in (dict(temperature=.8), dict(top_p=.7)):
        one, *others = [play(window, **options) for window in (1, 3, 16)]
        assert {r.finish_reason for r in one} == {"stop", "length"} and any(0 in r.mask for r in one) and len({len(r.ids) for r in one}) > 5
        for other in others:
            assert [(r.ids, r.mask, r.finish_reason, r.text) for r in one] == [(r.ids, r.mask, r.finish_reason, r.text) for r in other]
            assert max(abs(a - b) for r, o in zip(one, other) for a, b in zip(r.logps, o.logps)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_are_graphs_on_cuda(dtype):
    """One graph replayed is the step by step path: ids in fp32, log-probabilities in both; and those of the trainer's forward."""
    model = Transformer(replace(config_for_size("nano", 265), num_kv_heads=1), dtype).init_weights(0).cuda()
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p) * 0.1)
    options = dict(num_samples=8, max_new_tokens=60, max_slots=20, seed=4, stop_ids=STOPS)
    one, graphs = (generate(model, Tok(), PROMPTS, window=window, **options) for window in (1, 16))
    for prompt, a, b in zip(PROMPTS, one, graphs):
        for r, o in zip(a, b):
            if dtype == torch.float32:
                assert r.ids == o.ids and max(abs(x - y) for x, y in zip(r.logps, o.logps)) < 1e-4
            exact = model.logits(torch.tensor([prompt + o.ids], device="cuda")).float().log_softmax(-1)[0, len(prompt) - 1:-1].cpu()
            exact = exact.gather(1, torch.tensor(o.ids)[:, None])[:, 0]
            assert (exact - torch.tensor(o.logps)).abs().max() < (1e-4 if dtype == torch.float32 else .1)


@pytest.mark.gpu
def test_a_window_waits_for_nothing():
    """Between the state that goes in and the ids that come out: no sync, no new memory."""
    model = Transformer(config_for_size("nano", 265), torch.bfloat16).init_weights(0).cuda()
    with torch.inference_mode():
        cache = Cache(model, 64, 200)
        window = Window(model, decoder_weights(model), cache, 64, 16, 1.0, 1.0, 265)
        window.run(torch.zeros(4, 64, dtype=torch.int64), 16)
        before = torch.cuda.memory_allocated()
        window.now.zero_()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(16):
                window.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("num_samples", [2, 16])                      # attention by the kernel over what is used, and by products over all positions
def test_a_cache_that_grows_changes_nothing(model, monkeypatch, num_samples):
    """Samples of several lengths with appended ids, refilled rows and compaction: every id and log-probability, from a cache that begins with no room."""
    def play():
        turns = {}
        tools = lambda p, n, ids: [7] * (1 + (p + n) % 5) if turns.setdefault((p, n), []).append(ids) or len(turns[p, n]) < 4 else None
        return [r for g in generate(model, Tok(), PROMPTS, num_samples=num_samples, max_new_tokens=150, max_slots=3 * num_samples, seed=4,
                                    tools=tools, stop_ids={END_TURN, 30, 31}) for r in g]
    whole, sizes, grow = play(), [], Cache.grow
    monkeypatch.setattr("engine.ROOM", 0)
    monkeypatch.setattr(Cache, "grow", lambda cache, model, size: (sizes.append((cache.k.shape[3], size)), grow(cache, model, size)))
    grown = play()
    assert sizes[0][0] == 20 and len(sizes) >= 4 and all(a < b <= 170 for a, b in sizes), "it grew, and never beyond the longest sample"
    assert [r.ids for r in grown] == [r.ids for r in whole] and len({len(r.ids) for r in whole}) > 5
    assert any(0 in r.mask for r in whole)
    assert max(abs(a - b) for r, o in zip(whole, grown) for a, b in zip(r.logps, o.logps)) < 1e-5
    r = max(grown, key=lambda r: len(r.ids))
    prompt = PROMPTS[grown.index(r) // num_samples]
    assert max(abs(a - b) for a, b, m in zip(r.logps, logps_of(model, prompt, r).tolist(), r.mask) if m) < 1e-5


def test_group_shares_one_prefill(model, monkeypatch):
    tokens, lookup = [], torch.nn.Embedding.forward
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, ids: (tokens.append(tuple(ids.shape)), lookup(self, ids))[1])
    generate(model, Tok(), [PROMPTS[3]], num_samples=8, max_new_tokens=2, stop_ids=set())
    assert tokens == [(1, 20), (8,)]


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("change", [{}, dict(num_heads=4, head_dim=16), dict(qk_norm=False, qkv_bias=True), dict(num_kv_heads=1, lora=True),
                                    dict(dtype=torch.bfloat16)])
def test_decode_equals_the_models_forward(rows, change):
    """One token for each row: the same cache, the same hidden states."""
    change = dict(change)
    lora, dtype = change.pop("lora", False), change.pop("dtype", torch.float32)
    model = Transformer(replace(config_for_size("nano", 265), **change), dtype).init_weights(0)
    if lora:
        add_lora(model, 4, 8.0)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    lengths, results = [3 + i % 5 for i in range(rows)], []
    with torch.no_grad():
        for weights in (None, decoder_weights(model)):
            cache = Cache(model, rows + 1, 12)
            extend(model, cache, slice(0, rows), [[5 + i + j for j in range(n)] for i, n in enumerate(lengths)], [0] * rows)
            ids = [7 + i for i in range(rows)]
            logits = decode(model, weights, cache, ids, lengths) if weights else extend(model, cache, slice(0, rows), [[i] for i in ids], lengths)
            results.append((logits, *(torch.cat([t[:, i, :, :n + 1].flatten() for i, n in enumerate(lengths)]) for t in (cache.k, cache.v))))
    assert decoder_weights(add_lora(Transformer(config_for_size("nano", 265), torch.bfloat16), 4, 8.0)) is None
    for a, b in zip(*results):
        assert (a - b).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * a.abs().max() and a.abs().max() > .1


def test_extend_with_ragged_rows_equals_one_by_one(model):
    """Filler keys of shorter rows are never seen."""
    cache = Cache(model, 3, 32)
    first = extend(model, cache, torch.tensor([2, 0]), [[1, 2, 3, 4], [9]], [0, 0])
    second = extend(model, cache, torch.tensor([2, 0]), [[5], [8, 7, 6]], [4, 1])
    for row, (a, b) in enumerate([([1, 2, 3, 4], [5]), ([9], [8, 7, 6])]):
        assert (first[row] - model.logits(torch.tensor([a]))[0, -1]).abs().max() < 1e-5
        assert (second[row] - model.logits(torch.tensor([a + b]))[0, -1]).abs().max() < 1e-5


def test_sample_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    u = uniform(torch.arange(50_000), torch.zeros(50_000, dtype=torch.int64))
    for temperature in (1.0, 0.5):
        tokens, logps = sample(logits.expand(50_000, 5), u, temperature)
        p = (logits / temperature).softmax(-1)
        counts = tokens.bincount(minlength=5)
        chi2 = ((counts[:4] - 50_000 * p[:4]) ** 2 / (50_000 * p[:4])).sum()
        assert chi2 < 16.3                                           # 3 degrees of freedom, p = 0.001
        assert torch.allclose(logps, p.log()[tokens], atol=1e-6)


def test_sample_edges():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    assert sample(logits, torch.tensor([0.0], dtype=torch.float64), 1.0)[0] == 0
    assert sample(logits, torch.tensor([0.5], dtype=torch.float64), 1.0)[0] == 2          # running mass must exceed u
    assert sample(logits, torch.tensor([1.0 - 2**-53], dtype=torch.float64), 1.0)[0] == 2
    assert sample(logits, torch.tensor([1.0], dtype=torch.float64), 1.0)[0] == 2, "never a token without mass"
    token, logp = sample(torch.tensor([[1.0, 3.0]]), torch.tensor([0.0], dtype=torch.float64), 0)
    assert token == 1 and abs(logp.item() - (3 - math.log(math.e + math.e**3))) < 1e-6    # greedy: logp at temperature 1


def test_top_p_keeps_the_smallest_set_and_full_logp():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    u = uniform(torch.arange(20_000), torch.ones(20_000, dtype=torch.int64))
    tokens, logps = sample(p.log().expand(20_000, 4), u, 1.0, top_p=0.7)
    assert set(tokens.tolist()) == {0, 1}
    assert abs((tokens == 0).float().mean() - 0.5 / 0.8) < 0.015
    assert torch.allclose(logps, p.log()[tokens])


def test_padded_columns_are_never_drawn():
    logits = torch.tensor([[0.0, 1.0, 9.0]])
    assert sample(logits, torch.tensor([0.99], dtype=torch.float64), 0, num_tokens=2)[0] == 1
    token, logp = sample(logits, torch.tensor([0.99], dtype=torch.float64), 1.0, num_tokens=2)
    assert token == 1 and torch.allclose(logp, logits.log_softmax(-1)[:, 1])


def test_uniform_is_even_and_pinned():
    u = uniform(torch.arange(100_000), torch.arange(100_000) % 97)
    assert 0 <= u.min() and u.max() < 1
    assert ((torch.histc(u.float(), 50, 0, 1) - 2000) ** 2 / 2000).sum() < 86            # 49 degrees of freedom, p = 0.001
    next_position = uniform(torch.arange(100_000), torch.arange(100_000) % 97 + 1)
    assert abs(torch.corrcoef(torch.stack([u, next_position]))[0, 1]) < 0.02
    # the hash is part of what a resumed run must repeat: splitmix64 in plain Python
    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)
    golden = 0x9E3779B97F4A7C15
    expected = (mix((mix((12345 + 7 * golden) % 2**64) + golden) % 2**64) >> 11) * 2.0**-53
    signed, shift = lambda n: n - 2**64 if n >= 2**63 else n, lambda x, n: (x >> n) & (2**(64 - n) - 1)         # what CUDA computes with
    keys = torch.randint(-2**63, 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(splitmix(keys, torch.arange(1000), signed, shift).double() * 2.0**-53, uniform(keys, torch.arange(1000)))
    assert uniform(torch.tensor([12345]), torch.tensor([7])).item() == expected


@pytest.mark.parametrize("options, message", [
    (dict(prompts=[[1], []]), "prompt 1 is empty"), (dict(max_new_tokens=0), "max_new_tokens"), (dict(top_p=0.0), "top_p"),
    (dict(temperature=-1.0), "temperature")])
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, Tok(), **{"prompts": [[1]], "max_new_tokens": 3} | options)


def test_no_prompts(model):
    assert generate(model, Tok(), [], max_new_tokens=3) == []
