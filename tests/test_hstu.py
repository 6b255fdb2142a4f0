"""hstu_attention on the torch path against the naive reference, against a loop by hand, and by what it may read."""
import decimal
import math

import pytest
import torch

from kernels import hstu, hstu_attention, time_buckets
from model import Recommender, RecommenderConfig

YEAR = 365 * 86400


def inputs(B=5, T=70, H=2, dqk=6, dv=4, N=80, dtype=torch.float32, seed=0):
    """(q, k, v, position_bias, time_bias) with gradients, lengths 0, 1, odd, and full, and times with ties and long gaps."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, dqk), (B, T, H, dqk), (B, T, H, dv), (2 * N - 1,), (129,)
    leaves = [(torch.randn(shape, generator=g) * 0.5).to(dtype).requires_grad_() for shape in shapes]
    lengths = torch.tensor([0, 1, T // 2 | 1, T, max(T - 1, 1)] * B)[:B].clamp(max=T)
    steps = torch.randint(0, 4, (B, T), generator=g) * 10 ** torch.randint(0, 6, (B, T), generator=g)  # a quarter are ties
    steps[:, T // 2] += 20 * YEAR
    return leaves, lengths, 1_700_000_000 + steps.cumsum(1)


def with_biases(leaves, timestamps, which):
    q, k, v, p, w = leaves
    p, w = p if "p" in which else None, w if "t" in which else None
    return [x for x in (q, k, v, p, w) if x is not None], {"position_bias": p, "time_bias": w, "timestamps": timestamps if "t" in which else None}


def out_and_gradients(leaves, lengths, kwargs, **more):
    q, k, v = leaves[:3]
    out = hstu_attention(q, k, v, lengths, **kwargs, **more)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out, *torch.autograd.grad(out, leaves, g)


@pytest.fixture(params=[(64, 262144), (16, 1500)], ids=["one group", "many tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(hstu, "TILE_ROWS", request.param[0])
    monkeypatch.setattr(hstu, "TILE_SCORES", request.param[1])


@pytest.mark.parametrize("which", ["", "p", "t", "pt"])
@pytest.mark.parametrize("T, H, dqk, dv", [(1, 1, 3, 3), (2, 2, 5, 5), (17, 1, 8, 8), (70, 2, 6, 4), (70, 1, 4, 9)])
def test_outputs_and_gradients_of_the_reference(T, H, dqk, dv, which, tiles):
    leaves, lengths, timestamps = inputs(T=T, H=H, dqk=dqk, dv=dv)
    used, kwargs = with_biases(leaves, timestamps, which)
    ours = out_and_gradients(used, lengths, kwargs)
    theirs = out_and_gradients(used, lengths, kwargs, backend="reference")
    assert len(ours) == 4 + len(which)
    for x, y in zip(ours, theirs):
        assert x.dtype == y.dtype and y.abs().max() > 1e-4
        assert (x - y).abs().max() <= 1e-5 * max(y.abs().max(), 1)


def test_a_loop_by_hand():
    leaves, _, timestamps = inputs(B=2, T=5, H=2, dqk=2, dv=3, N=7, dtype=torch.float64)
    q, k, v, p, w = (x.detach() for x in leaves)
    lengths = torch.tensor([5, 3])
    expected = torch.zeros(2, 5, 2, 3, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            for i in range(lengths[b]):
                for j in range(i + 1):
                    gap = abs(int(timestamps[b, min(i + 1, 4)] - timestamps[b, j]))
                    bucket = min(int(math.log(max(gap, 1)) / 0.301), 128)
                    S = float(q[b, i, h] @ k[b, j, h] + p[i - j + 6] + w[bucket])
                    expected[b, i, h] += S / (1 + math.exp(-S)) * v[b, j, h]
    for backend in ("torch", "reference"):
        out = hstu_attention(q, k, v, lengths, p, w, timestamps, backend=backend)
        assert (out - expected).abs().max() < 1e-12


def test_gradcheck(tiles):
    leaves, lengths, timestamps = inputs(T=20, B=3, H=2, dqk=2, dv=3, N=21, dtype=torch.float64)
    lengths = torch.tensor([20, 0, 17])
    assert torch.autograd.gradcheck(lambda *x: hstu_attention(*x[:3], lengths, *x[3:], timestamps), leaves, fast_mode=True)
    small, lengths, timestamps = inputs(T=4, B=2, H=2, dqk=2, dv=1, N=5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: hstu_attention(*x[:3], torch.tensor([4, 3]), *x[3:], timestamps[:2]), small)


def test_thresholds_are_those_of_the_formula():
    with decimal.localcontext() as context:
        context.prec = 60
        for m, d in enumerate(hstu.thresholds(), 1):
            assert (decimal.Decimal(d - 1)).ln() < m * decimal.Decimal("0.301") <= decimal.Decimal(d).ln()
    within = [d for d in hstu.thresholds() if d < 2**40]  # 35 thousand years of seconds; by 2^46 fp64 rounds across one
    assert len(within) == 92 and within[:4] == [2, 2, 3, 4]  # no whole number is in bucket 1
    for d in within:
        for gap in (d - 1, d):
            assert math.floor(math.log(gap) / 0.301) == sum(gap >= x for x in hstu.thresholds())


def test_buckets_on_both_sides_of_every_threshold():
    gaps = sorted({d + e for d in hstu.thresholds() for e in (-1, 0, 1)} | {0, 1, 2**62, 20 * YEAR})
    # position 0 reads t_1 - t_0; a second row has the times the other way round
    timestamps = torch.tensor([[0, d] for d in gaps] + [[d, 0] for d in gaps])
    expected = [sum(d >= threshold for threshold in hstu.thresholds()) for d in gaps]
    assert time_buckets(timestamps)[:, 0, 0].tolist() == expected * 2
    assert expected[0] == 0 and expected[-1] == 128
    assert expected[gaps.index(20 * YEAR)] == math.floor(math.log(20 * YEAR) / 0.301) == 67


def test_seconds_are_subtracted_as_integers():
    # fp32 holds 1.7e9 to 128: the gap of 1 s would be 0 or 128 s
    start = 1_700_000_001
    buckets = time_buckets(torch.tensor([[start, start + 1, start + 3, start + 3]]))[0]
    assert buckets.tril().tolist() == [[0, 0, 0, 0], [3, 2, 0, 0], [3, 2, 0, 0], [3, 2, 0, 0]]


def test_buckets_made_once_are_the_same():
    leaves, lengths, timestamps = inputs()
    used, kwargs = with_biases(leaves, timestamps, "pt")
    ours = out_and_gradients(used, lengths, kwargs)
    given = out_and_gradients(used, lengths, kwargs, buckets=time_buckets(timestamps))
    assert all(torch.equal(x, y) for x, y in zip(ours, given))


def test_two_runs_agree_bitwise(tiles):
    leaves, lengths, timestamps = inputs()
    used, kwargs = with_biases(leaves, timestamps, "pt")
    assert all(torch.equal(x, y) for x, y in zip(out_and_gradients(used, lengths, kwargs), out_and_gradients(used, lengths, kwargs)))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_result_is_that_of_a_row_alone_and_unpadded(backend, tiles):
    leaves, lengths, timestamps = inputs()
    q, k, v, p, w = leaves
    out = hstu_attention(q, k, v, lengths, p, w, timestamps, backend=backend)
    for b, n in enumerate(lengths.tolist()):
        assert (out[b, n:] == 0).all()
        if n:
            cut = slice(b, b + 1), slice(0, min(n + 1, 70))  # one column of time more than items
            alone = hstu_attention(q[cut], k[cut], v[cut], lengths[b:b + 1], p, w, timestamps[cut], backend=backend)
            assert (out[b, :n] - alone[0, :n]).abs().max() <= 2e-6


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_pads_may_hold_nan_and_get_no_gradient(backend):
    leaves, lengths, timestamps = inputs()
    used, kwargs = with_biases(leaves, timestamps, "pt")
    clean = out_and_gradients(used, lengths, kwargs, backend=backend)
    pad = torch.arange(70) >= lengths[:, None]
    dirty = [x.detach().masked_fill(pad[:, :, None, None], float("nan")).requires_grad_() for x in used[:3]] + used[3:]
    found = out_and_gradients(dirty, lengths, kwargs, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(clean, found))
    assert all((g[pad] == 0).all() for g in found[1:4])


def test_what_position_i_reads():
    leaves, _, timestamps = inputs(B=1, T=12, N=12, dtype=torch.float64)
    q, k, v, p, w = (x.detach() for x in leaves)
    lengths = torch.tensor([11])
    base = hstu_attention(q, k, v, lengths, p, w, timestamps)[0]

    def changed(**new):
        now = {"q": q, "k": k, "v": v, "timestamps": timestamps, **new}
        out = hstu_attention(now["q"], now["k"], now["v"], lengths, p, w, now["timestamps"])[0]
        return ((out - base).abs().amax((1, 2)) > 1e-9).nonzero()[:, 0].tolist()

    bump = torch.zeros(1, 12, 1, 1, dtype=torch.float64)
    bump[0, 5] = 1.0
    assert changed(q=q + bump) == [5]
    assert changed(k=k + bump) == changed(v=v + bump) == [5, 6, 7, 8, 9, 10]
    later = timestamps.clone()
    later[0, 5:6] -= 1_000_000_000
    assert changed(timestamps=later) == [4, 5, 6, 7, 8, 9, 10]  # time 5 is read by position 4, before item 5
    later = timestamps.clone()
    later[0, 11] += 1_000_000_000_000
    assert changed(timestamps=later) == [10]  # the request time of the next item


@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision_inputs_are_computed_in_fp32(dtype, tol):
    leaves, lengths, timestamps = inputs(dtype=dtype)
    leaves[4] = leaves[4].detach().float().requires_grad_()  # an fp32 table beside bf16 activations
    used, kwargs = with_biases(leaves, timestamps, "pt")
    ours = out_and_gradients(used, lengths, kwargs)
    theirs = out_and_gradients(used, lengths, kwargs, backend="reference")
    for x, y, leaf in zip(ours, theirs, [used[0], *used]):
        assert x.dtype == y.dtype == leaf.dtype
        assert (x.float() - y.float()).abs().max() <= tol * y.float().abs().max()


def test_autocast_changes_nothing_and_no_grad_keeps_no_scores(monkeypatch):
    leaves, lengths, timestamps = inputs()
    used, kwargs = with_biases(leaves, timestamps, "pt")
    plain = hstu_attention(*used[:3], lengths, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, hstu_attention(*used[:3], lengths, **kwargs))
    monkeypatch.setattr(hstu, "_Short", None)
    with torch.no_grad():
        out = hstu_attention(*used[:3], lengths, **kwargs)
    assert torch.equal(plain, out) and not out.requires_grad


def test_views_of_one_projection_and_an_expanded_gradient():
    leaves, lengths, timestamps = inputs()
    used, kwargs = with_biases(leaves, timestamps, "pt")
    wide = torch.cat([x.detach() for x in used[:3]], 3).flatten(2).requires_grad_()  # (B, T, H * 16)
    q, k, v = wide.unflatten(2, (2, 16)).split([6, 6, 4], 3)
    hstu_attention(q, k, v, lengths, **kwargs).sum().backward()
    grads = torch.autograd.grad(hstu_attention(*used[:3], lengths, **kwargs).sum(), used[:3])
    assert (wide.grad.unflatten(2, (2, 16)) - torch.cat(grads, 3)).abs().max() <= 1e-6 * wide.grad.abs().max()


def test_no_rows_and_no_second_derivatives():
    leaves, lengths, timestamps = inputs()
    q, k, v, p, w = leaves
    empty = hstu_attention(q[:0], k[:0], v[:0], lengths[:0], p, w, timestamps[:0])
    assert empty.shape == (0, 70, 2, 4)
    assert torch.autograd.grad(empty.sum(), w)[0].abs().max() == 0
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(hstu_attention(q, k, v, lengths, p, w, timestamps).sum(), q, create_graph=True)


def test_auto_takes_triton_for_long_cuda_rows_only(monkeypatch):
    import kernels
    taken = []
    monkeypatch.setattr(kernels, "_hstu_attention", lambda *args, use_triton: taken.append(use_triton))
    monkeypatch.setattr(kernels, "_pick", lambda backend, x: "triton")
    for T, d in ((512, 4), (513, 4), (513, 256)):
        x = torch.zeros(1, T, 1, d)
        hstu_attention(x, x, x, torch.tensor([T]))
    assert taken == [False, True, False]
    with pytest.raises(ValueError, match="at most 128"):
        hstu_attention(x, x, x, torch.tensor([513]), backend="triton")


@pytest.mark.parametrize("change, message", [
    (lambda a: a.update(k=a["k"][:, :-1]), r"expected q, k \(B, T, H, dqk\)"),
    (lambda a: a.update(v=a["v"][0]), r"expected q, k \(B, T, H, dqk\)"),
    (lambda a: a.update(k=a["k"].double()), "one dtype"),
    (lambda a: a.update(q=a["q"].int(), k=a["k"].int(), v=a["v"].int()), "one dtype"),
    (lambda a: a.update(lengths=a["lengths"].float()), "lengths: expected int32 or int64"),
    (lambda a: a.update(lengths=a["lengths"][:2]), r"lengths: .* of shape \(5,\)"),
    (lambda a: a.update(lengths=a["lengths"] + 1), "lengths: expected 0 to T=70, found 1 to 71"),
    (lambda a: a.update(lengths=a["lengths"] - 1), "found -1 to 69"),
    (lambda a: a.update(position_bias=torch.zeros(137)), "position_bias: expected at least 2T - 1 = 139"),
    (lambda a: a.update(position_bias=torch.zeros(160)), r"position_bias: expected shape \(2N - 1,\)"),
    (lambda a: a.update(position_bias=torch.zeros(159).double()), "position_bias: expected torch.float32"),
    (lambda a: a.update(time_bias=torch.zeros(128)), r"time_bias: expected shape \(129,\)"),
    (lambda a: a.update(timestamps=None), "time_bias was given without timestamps"),
    (lambda a: a.update(time_bias=None), "timestamps was given without time_bias"),
    (lambda a: a.update(timestamps=a["timestamps"].double()), "timestamps: expected int64"),
    (lambda a: a.update(timestamps=a["timestamps"][:, :-1]), r"timestamps: .* of shape \(5, 70\)"),
    (lambda a: a.update(buckets=torch.zeros(5, 70, 70)), "buckets: expected time_buckets"),
    (lambda a: a.update(k=a["k"].to("meta")), "k: expected on cpu like q, found on meta"),
    (lambda a: a.update(backend="cuda"), "backend: expected one of"),
])
def test_bad_input(change, message):
    (q, k, v, p, w), lengths, timestamps = inputs()
    arguments = {"q": q, "k": k, "v": v, "lengths": lengths, "position_bias": p, "time_bias": w, "timestamps": timestamps}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        hstu_attention(**arguments)


def test_time_buckets_take_int64_only():
    with pytest.raises(ValueError, match="timestamps: expected int64"):
        time_buckets(torch.zeros(2, 3))


# -----------------------------------------------------------------------------
# The model around it


def test_the_model_is_its_equations():
    """Two blocks of two heads, values wider than keys, against a loop over positions in fp64 written from 2402.17152, eq. 2 to 4, and the public code:
    items * sqrt(D) + positions; U, V, Q, K in this order; both biases; over the constant max_length + 1; LayerNorm over all heads; times U; W_o; residual."""
    D, H, K, V, T, N = 12, 2, 3, 5, 6, 9
    config = RecommenderConfig(num_items=20, hidden_size=D, num_layers=2, num_heads=H, head_dim=K, value_dim=V, max_length=N - 1, backbone="hstu")
    model = Recommender(config, torch.float64).init_weights(0).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype) * 0.3)
        model.items.weight[0] = 0
    items, lengths = torch.tensor([[3, 7, 7, 1, 20, 0], [5, 2, 0, 0, 0, 0]]), torch.tensor([5, 2])
    times = torch.tensor([[0, 5, 5, 100, 10**6, 10**6 + 3], [9, 10, 10**9, 10**9, 10**9, 10**9]])
    found = model(items, lengths, times)
    norm = lambda x: (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()
    silu = lambda x: x / (1 + (-x).exp())
    bucket = lambda d: min(128, max(0, math.floor(math.log(max(abs(d), 1)) / 0.301)))
    for b in range(2):
        x = [model.items.weight[items[b, j]] * D ** 0.5 + model.positions[j] for j in range(lengths[b])]
        for layer in model.layers:
            parts = [silu(layer.uvqk.weight @ norm(row)).split([H * V, H * V, H * K, H * K]) for row in x]
            out = []
            for i in range(len(x)):
                heads = []
                for h in range(H):
                    total = torch.zeros(V, dtype=torch.float64)
                    for j in range(i + 1):
                        score = parts[i][2][h * K:][:K] @ parts[j][3][h * K:][:K] + layer.position_bias[i - j + N - 1]
                        total = total + silu(score + layer.time_bias[bucket(int(times[b, min(i + 1, T - 1)] - times[b, j]))]) * parts[j][1][h * V:][:V]
                    heads.append(total / N)
                out.append(x[i] + layer.o.weight @ (norm(torch.cat(heads)) * parts[i][0]) + layer.o.bias)
            x = out
        assert (found[b, :lengths[b]] - torch.stack(x)).abs().max() < 1e-10
    hidden, catalogue = found[0, 4:5].detach(), model.items.weight[1:].detach()
    cosines = (catalogue @ hidden[0]) / hidden.norm() / catalogue.norm(dim=1)
    assert (model.logits(hidden)[0] - cosines / 0.05).abs().max() < 1e-9
