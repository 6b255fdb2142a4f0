"""linear_logprob against its reference, by finite differences, by hand, and for memory. Tests marked gpu need CUDA."""
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_logprob, reference
from kernels.linear_logprob import _new_buffer, _stats_torch

ALL = 1 << 60  # save_bytes: room for every chunk's exponentials
gpu = pytest.mark.gpu


def inputs(N, D, V, dtype=torch.float32, *, bias=False, ignored=0, scale=2.0, seed=0, device="cpu", weight_dtype=None):
    """hidden (N, D), weight (V, D), targets (N,), bias (V,) or None; logits have a standard deviation of `scale`."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64) * (scale * D ** -0.5)
    b = torch.randn(V, generator=g, dtype=torch.float64) if bias else None
    targets = torch.randint(0, V, (N,), generator=g)
    targets[:ignored] = -100
    leaf = [None if x is None else x.to(device, t).requires_grad_()
            for x, t in ((hidden, dtype), (weight, weight_dtype or dtype), (b, dtype))]
    return leaf[0], leaf[1], targets.to(device), leaf[2]


def upstream(N, dtype, which=("logp", "entropy", "lse"), seed=1):
    """Gradients of both signs over four decades for the named outputs, None for the others."""
    g = torch.Generator().manual_seed(seed)
    sign, exponent = torch.rand(2, 3, N, generator=g, dtype=torch.float64)
    scales = torch.where(sign < 0.5, -1, 1) * 10 ** (4 * exponent - 3)
    return [s.to(dtype) if name in which else None for name, s in zip(("logp", "entropy", "lse"), scales)]


def gradients(out, grads, leaves):
    used = [(o, g.to(o)) for o, g in zip(out[:3], grads) if g is not None]
    return torch.autograd.grad([o for o, _ in used], [x for x in leaves if x is not None], [g for _, g in used])


def as_double(hidden, weight, bias):
    """The same numbers in fp64, the weight rounded to the compute dtype as the kernel rounds it."""
    leaves = hidden, weight.to(hidden.dtype), bias
    return [None if x is None else x.detach().double().requires_grad_() for x in leaves]


def relative_error(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def check_against_fp64(hidden, weight, targets, bias, *, forward_tol, gradient_tol, which=("logp", "entropy", "lse"),
                       **kwargs):
    out = linear_logprob(hidden, weight, targets, bias=bias, **kwargs)
    h, w, b = as_double(hidden, weight, bias)
    settings = {k: kwargs[k] for k in ("temperature", "softcap", "ignore_index") if k in kwargs}
    true = reference.linear_logprob(h, w, targets, bias=b, **settings)
    for name in ("logp", "entropy", "lse"):
        error = (getattr(out, name).double() - getattr(true, name)).abs().max().item()
        assert error <= forward_tol, f"{name}: off by {error:.1e}"
    grads = upstream(len(targets), torch.float64, which)
    pairs = zip(gradients(out, grads, (hidden, weight, bias)), gradients(true, grads, (h, w, b)))
    for name, (ours, theirs) in zip(("hidden", "weight", "bias"), pairs):
        assert theirs.abs().max() > 1e-3  # two zeros would agree
        error = relative_error(ours, theirs)
        assert error <= gradient_tol, f"gradient of {name}: off by {error:.1e}"
    return out, true


# -----------------------------------------------------------------------------
# Numbers worked by hand

@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_two_tokens_by_hand(backend):
    # row 0: logits 0, ln 2 -> p = 1/3, 2/3; row 1: logits 0, ln 4 -> p = 1/5, 4/5
    hidden = torch.tensor([[1.0], [2.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(2)]], requires_grad=True)
    out = linear_logprob(hidden, weight, torch.tensor([1, 0]), chunk=1, backend=backend)
    assert out.logp.tolist() == pytest.approx([-0.405465, -1.609438], abs=1e-6)
    assert out.entropy.tolist() == pytest.approx([0.636514, 0.500402], abs=1e-6)
    assert out.lse.tolist() == pytest.approx([1.098612, 1.609438], abs=1e-6)
    assert out.top1.tolist() == [True, False]
    # d logp_i / d W_v = (1[v = y] - p_v) h_i: for v = 0, (0 - 1/3) 1 + (1 - 1/5) 2 = 1.266667
    # d logp_i / d h_i = (1[y = 1] - p_1) ln 2
    dh, dw = torch.autograd.grad(out.logp.sum(), (hidden, weight), retain_graph=True)
    assert dw.flatten().tolist() == pytest.approx([1.266667, -1.266667], abs=1e-6)
    assert dh.flatten().tolist() == pytest.approx([0.231049, -0.554518], abs=1e-6)
    # dH / dz_v = -p_v (log p_v + H): row 0, v = 1: -2/3 (-0.405465 + 0.636514) = -0.154033, times ln 2
    (dh,) = torch.autograd.grad(out.entropy[0], hidden)
    assert dh.flatten().tolist() == pytest.approx([-0.106767, 0.0], abs=1e-6)


def test_a_step_up_the_gradient_raises_the_log_probability():
    hidden, weight, targets, _ = inputs(20, 8, 50)
    before = linear_logprob(hidden, weight, targets).logp
    (dw,) = torch.autograd.grad(before.sum(), weight)
    assert linear_logprob(hidden, weight + 1e-3 * dw, targets).logp.sum() > before.sum()


# -----------------------------------------------------------------------------
# Algebra, in fp64 by finite differences

@pytest.mark.parametrize("ignored", [0, 1])
@pytest.mark.parametrize("saved_chunks", [0, 1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias, softcap, temperature, saved_chunks, ignored):
    hidden, weight, targets, b = inputs(3, 2, 5, torch.float64, bias=bias, ignored=ignored)
    save_bytes = saved_chunks * 3 * 2 * 8  # chunks of 2, 2 and 1 columns

    def f(hidden, weight, b):
        return linear_logprob(hidden, weight, targets, bias=b, temperature=temperature, softcap=softcap, chunk=2,
                              save_bytes=save_bytes)[:3]

    # also with every mix of undefined upstream gradients, and none may be nan
    assert torch.autograd.gradcheck(f, (hidden, weight, b), eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("saved_chunks", [0, 1])
def test_gradcheck_where_one_chunk_holds_the_vocabulary(saved_chunks):
    hidden, weight, targets, b = inputs(3, 2, 5, torch.float64, bias=True, ignored=1)
    save_bytes = saved_chunks * 3 * 5 * 8
    f = lambda h, w, b: linear_logprob(h, w, targets, bias=b, softcap=2.0, save_bytes=save_bytes)[:3]
    assert torch.autograd.gradcheck(f, (hidden, weight, b), eps=1e-6, atol=1e-7, rtol=1e-6)


def test_reference_gradcheck():
    hidden, weight, targets, b = inputs(3, 2, 5, torch.float64, bias=True, ignored=1)
    f = lambda h, w, b: reference.linear_logprob(h, w, targets, b, 0.7, 2.0)[:3]
    assert torch.autograd.gradcheck(f, (hidden, weight, b))


def test_double_backward_is_refused():
    hidden, weight, targets, _ = inputs(3, 2, 5)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(linear_logprob(hidden, weight, targets).logp.sum(), hidden, create_graph=True)
    out = linear_logprob(hidden, weight, targets, backend="reference")
    torch.autograd.grad(out.logp.sum(), hidden, create_graph=True)


# -----------------------------------------------------------------------------
# Precision, against fp64

MIXES = [m for k in (1, 2, 3) for m in itertools.combinations(("logp", "entropy", "lse"), k)]


@pytest.mark.parametrize("which", MIXES, ids="+".join)
@pytest.mark.parametrize("save_bytes", [0, ALL])
def test_fp32_against_fp64(which, save_bytes):
    hidden, weight, targets, b = inputs(37, 24, 211, bias=True, ignored=5)
    check_against_fp64(hidden, weight, targets, b, which=which, temperature=0.8, chunk=64, save_bytes=save_bytes,
                       forward_tol=1e-5, gradient_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", MIXES, ids="+".join)
@pytest.mark.parametrize("save_bytes", [0, ALL])
def test_low_precision_inputs_against_fp64(which, save_bytes, dtype):
    # forward values carry no rounding but fp32's: logits rounded to bf16 would be off by 0.02
    hidden, weight, targets, b = inputs(37, 24, 211, dtype, bias=True, ignored=5)
    check_against_fp64(hidden, weight, targets, b, which=which, chunk=64, save_bytes=save_bytes,
                       forward_tol=1e-5, gradient_tol=4e-3)


@pytest.mark.parametrize("save_bytes", [0, ALL])
def test_softcap_against_fp64(save_bytes):
    hidden, weight, targets, b = inputs(37, 24, 211, bias=True, ignored=5, scale=8.0)
    check_against_fp64(hidden, weight, targets, b, softcap=10.0, temperature=0.8, chunk=64, save_bytes=save_bytes,
                       forward_tol=1e-5, gradient_tol=1e-5)


@pytest.mark.parametrize("save_bytes", [0, ALL])
def test_fp32_master_weight_with_bf16_hidden(save_bytes):
    hidden, weight, targets, b = inputs(37, 24, 211, torch.bfloat16, weight_dtype=torch.float32, bias=True)
    out, _ = check_against_fp64(hidden, weight, targets, b, chunk=64, save_bytes=save_bytes,
                                forward_tol=1e-5, gradient_tol=4e-3)
    rounded = linear_logprob(hidden, weight.bfloat16(), targets, bias=b, chunk=64)
    assert all(torch.equal(x, y) for x, y in zip(out, rounded))
    again = linear_logprob(hidden, weight, targets, bias=b, chunk=64, save_bytes=save_bytes)
    dh, dw, db = gradients(again, upstream(37, torch.float64), (hidden, weight, b))
    assert (dh.dtype, dw.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dtype_of_every_output(dtype, backend):
    hidden, weight, targets, _ = inputs(5, 8, 30, dtype)
    out = linear_logprob(hidden, weight, targets, backend=backend)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in out] == [expected] * 3 + [torch.bool]
    assert [x.shape for x in out] == [(5,)] * 4
    assert not out.top1.requires_grad


def test_autocast_changes_nothing():
    hidden, weight, targets, _ = inputs(9, 8, 50)
    grads = upstream(9, torch.float32)
    plain = linear_logprob(hidden, weight, targets, chunk=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_logprob(hidden, weight, targets, chunk=16)
        cast_grads = gradients(cast, grads, (hidden, weight))
    plain_grads = gradients(plain, grads, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip((*plain, *plain_grads), (*cast, *cast_grads)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_gradient_where_p_is_almost_one(dtype):
    # 1 - p = 1e-5: as the difference of 1 and a rounded p it would be anything
    weight = torch.zeros(100, 1)
    weight[7] = math.log(99e5)
    bias = torch.full((100,), 64.0, dtype=dtype, requires_grad=True)  # z_y - lse would be off by 4e-6
    hidden, weight = torch.ones(1, 1, dtype=dtype), weight.to(dtype)
    for save_bytes in (0, ALL):
        out = linear_logprob(hidden, weight, torch.tensor([7]), bias=bias, save_bytes=save_bytes)
        (db,) = torch.autograd.grad(out.logp.sum(), bias)
        z = weight.double().flatten()
        one_minus_p = (z.exp().sum() - z[7].exp()) / z.exp().sum()
        assert 5e-6 < one_minus_p < 2e-5
        assert out.logp.item() == pytest.approx(-one_minus_p.item(), rel=0.05)
        assert db[7].item() == pytest.approx(one_minus_p.item(), rel=0.05)


@pytest.mark.parametrize("save_bytes", [0, ALL])
def test_rows_of_dz_sum_to_the_gradient_of_lse(save_bytes):
    # with one row dbias is dz; a kernel that drops small probabilities has a biased sum
    hidden, weight, targets, b = inputs(1, 8, 3000, bias=True, scale=4.0)
    for seed in range(3):
        grads = upstream(1, torch.float32, seed=seed)
        out = linear_logprob(hidden, weight, targets, bias=b, save_bytes=save_bytes)
        dz = gradients(out, grads, (b,))[0]
        scale = sum(g.abs().item() for g in grads)
        assert dz.double().sum().item() == pytest.approx(grads[2].item(), abs=1e-5 * scale)


def test_probabilities_of_all_targets_sum_to_one():
    hidden, weight, _, _ = inputs(1, 8, 700, scale=5.0)
    out = linear_logprob(hidden.expand(700, 8), weight, torch.arange(700), chunk=256)
    assert out.logp.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)


# -----------------------------------------------------------------------------
# Entropy

@pytest.mark.parametrize("V", [2, 300, 5000])
def test_entropy_of_a_uniform_row_is_log_v(V):
    out = linear_logprob(torch.ones(2, 3), torch.ones(V, 3), torch.tensor([0, V - 1]), chunk=256)
    assert out.entropy.tolist() == pytest.approx([math.log(V)] * 2, abs=1e-5)
    assert out.logp.tolist() == pytest.approx([-math.log(V)] * 2, abs=1e-5)


@pytest.mark.parametrize("save_bytes", [0, ALL])
@pytest.mark.parametrize("softcap", [None, 500.0])
def test_one_hot_row_has_no_nan(save_bytes, softcap):
    # the other probabilities are e^-300 = 0 in fp32
    weight = torch.zeros(50, 2)
    weight[[3, 20]] = torch.tensor([300.0, 0.0])
    weight[20] = 0
    hidden = torch.tensor([[1.0, 1.0]] * 3, requires_grad=True)
    weight.requires_grad_()
    out = linear_logprob(hidden, weight, torch.tensor([3, 20, -100]), chunk=16, save_bytes=save_bytes, softcap=softcap)
    assert out.entropy.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-20)
    assert out.logp[0] == 0.0 and out.logp[1] < -250
    for name in ("logp", "entropy", "lse"):
        for g in torch.autograd.grad(getattr(out, name).sum(), (hidden, weight), retain_graph=True):
            assert g.isfinite().all()


def test_entropy_of_peaked_rows_is_accurate_and_never_negative():
    # rows at every distance from one-hot: lse - sum(p z) would be off by 8e-6, all of an entropy that small
    gaps = torch.linspace(0, 40, 2000)[:, None]
    weight, b, y = torch.tensor([[1.0], [0.0], [0.0]]), torch.full((3,), 64.0), torch.zeros(2000, dtype=torch.int64)
    out = linear_logprob(gaps, weight, y, bias=b)
    true = reference.linear_logprob(gaps.double(), weight.double(), y, b.double())
    assert true.entropy.min() < 1e-14 and true.entropy.max() > 1
    assert (out.entropy >= 0).all() and (out.entropy - true.entropy).abs().le(1e-4 * true.entropy + 5e-7).all()


@pytest.mark.parametrize("save_bytes", [0, ALL])
def test_entropy_gradient_alone(save_bytes):
    hidden, weight, targets, _ = inputs(11, 8, 100)
    check_against_fp64(hidden, weight, targets, None, which=("entropy",), chunk=32, save_bytes=save_bytes,
                       forward_tol=1e-5, gradient_tol=1e-5)


# -----------------------------------------------------------------------------
# Chunks, shifts and masks

@pytest.mark.parametrize("V, chunk", [(1408, 1024), (1408, 100), (5, 8192), (1, 8192), (64, 64), (65, 64), (63, 64),
                                      (128, 64), (33, 1)])
def test_any_vocabulary_and_chunk(V, chunk):
    hidden, weight, targets, b = inputs(12, 8, V, bias=True)
    edges = torch.tensor([0, chunk - 1, chunk, 2 * chunk - 1, V - 2, V - 1])
    targets[:6] = edges.clamp(0, V - 1)
    out = linear_logprob(hidden, weight, targets, bias=b, chunk=chunk, save_bytes=12 * min(chunk, V) * 4)
    true = linear_logprob(hidden, weight, targets, bias=b, backend="reference")
    assert all((x.double() - y).abs().max() <= 1e-5 for x, y in zip(out[:3], true[:3]))
    assert torch.equal(out.top1, true.top1)
    grads = upstream(12, torch.float32)
    pairs = zip(gradients(out, grads, (hidden, weight, b)), gradients(true, grads, (hidden, weight, b)))
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


def test_a_language_models_vocabulary():
    V = 151936  # Qwen's: 384 columns are left over after chunks of 2048, and 4480 after 8192
    hidden, weight, targets, _ = inputs(4, 8, V)
    targets[:2] = torch.tensor([V - 1, V - 384])
    # a sum over 151,936 columns in fp32 is as exact as the machine's product: 1e-5 on some, 9e-5 on others, in plain torch as here
    grads, (h, w, _) = upstream(4, torch.float64), as_double(hidden, weight, None)
    plain = gradients(reference.linear_logprob(hidden, weight, targets), grads, (hidden, weight, None))
    true = gradients(reference.linear_logprob(h, w, targets), grads, (h, w, None))
    error = max(relative_error(a, b) for a, b in zip(plain, true) if b is not None)
    assert error < 3e-4
    check_against_fp64(hidden, weight, targets, None, forward_tol=1e-5, gradient_tol=1e-5 + 1.2 * error)


@pytest.mark.parametrize("dtype, gradient_tol", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_chunks_and_savings_agree(dtype, gradient_tol):
    hidden, weight, targets, b = inputs(20, 8, 150, dtype, bias=True, ignored=2, scale=1.0, weight_dtype=torch.float32)
    grads = upstream(20, torch.float32)

    def run(chunk, save_bytes):
        out = linear_logprob(hidden, weight, targets, bias=b, chunk=chunk, save_bytes=save_bytes)
        return out, gradients(out, grads, (hidden, weight, b))

    one, one_grads = run(150, 0)
    for chunk, save_bytes in itertools.product((1, 7, 16, 64, 149, 4096), (0, 20 * 64 * 4, ALL, None)):
        out, out_grads = run(chunk, save_bytes)
        for x, y in zip(out[:3], one[:3]):
            assert (x - y).abs().max() <= 1e-6 * max(1.0, y.abs().max().item())
        assert torch.equal(out.top1, one.top1)
        for x, y in zip(out_grads, one_grads):
            # a gradient that is rounded to bf16 at the end may differ in its last bit, 2^-7 of its value at most
            assert relative_error(x, y) <= (2.0 ** -7 if x.dtype == torch.bfloat16 else gradient_tol)


@pytest.mark.parametrize("save_bytes", [0, ALL])
@pytest.mark.parametrize("offset", [-120.0, 80.0, 31.0])
def test_a_constant_on_every_logit_changes_nothing(offset, save_bytes):
    # a running maximum that starts at 0 turns -120 into inf
    hidden, weight, targets, _ = inputs(9, 8, 200)
    grads = upstream(9, torch.float32, ("logp", "entropy"))
    plain = linear_logprob(hidden, weight, targets, chunk=64, save_bytes=save_bytes)
    moved = linear_logprob(hidden, weight, targets, bias=torch.full((200,), offset), chunk=64, save_bytes=save_bytes)
    assert (plain.logp - moved.logp).abs().max() <= 2e-5  # 1.5e-5 is one unit in the last place of a logit near 120
    assert (plain.entropy - moved.entropy).abs().max() <= 1e-5
    assert (plain.lse + offset - moved.lse).abs().max() <= 2e-5
    for x, y in zip(gradients(plain, grads, (hidden, weight)), gradients(moved, grads, (hidden, weight))):
        assert relative_error(y, x) <= 2e-5


@pytest.mark.parametrize("save_bytes", [0, 9 * 64 * 4, ALL])
@pytest.mark.parametrize("softcap, offset", [(None, 0.0), (5.0, 0.0), (None, -120.0), (300.0, -120.0)])
def test_masked_columns_are_as_if_absent(save_bytes, softcap, offset):
    # -inf over one whole chunk, the first, over the last, and over parts of others: beside rows near -120 too
    hidden, weight, _, _ = inputs(9, 8, 250)
    keep = torch.ones(250, dtype=torch.bool)
    keep[:64] = keep[192:] = keep[100:110] = False
    b = torch.where(keep, offset, -float("inf")).requires_grad_()
    kept = keep.nonzero()[:, 0]
    y = torch.arange(9) * 10
    grads = upstream(9, torch.float32)
    out = linear_logprob(hidden, weight, kept[y], bias=b, chunk=64, save_bytes=save_bytes, softcap=softcap)
    less = linear_logprob(hidden, weight[keep], y, bias=torch.full((len(kept),), offset), softcap=softcap, chunk=4096)
    for name, x, other in zip(out._fields, out[:3], less[:3]):
        assert (x - other).abs().max() <= 2e-5, name
    dh, dw, db = gradients(out, grads, (hidden, weight, b))
    dh_less, dw_less = gradients(less, grads, (hidden, weight))
    assert relative_error(dh, dh_less) <= 2e-5 and relative_error(dw, dw_less) <= 2e-5
    assert db.isfinite().all() and db[~keep].abs().max() < 1e-20 and db[keep].abs().max() > 1e-3


def test_a_masked_target_has_log_probability_minus_infinity():
    hidden, weight, targets, _ = inputs(2, 8, 30)
    b = torch.zeros(30)
    b[targets[0]] = -float("inf")
    out = linear_logprob(hidden, weight, targets, bias=b, chunk=16)
    assert out.logp[0] == -float("inf") and out.logp[1].isfinite() and not out.top1[0]
    for g in gradients(out, upstream(2, torch.float32), (hidden, weight)):
        assert g.isfinite().all()


def test_no_subnormal_numbers_on_the_cpu():
    # exp below -87 takes 60 times as long on a CPU, and a product of matrices with subnormal numbers 15 times
    z = torch.linspace(-300, 0, 1000)[None].repeat(2, 1)
    z[1, ::2] = -float("inf")
    e = torch.empty_like(z)
    z_max, z_sum, _ = _stats_torch(z, e)
    assert e.min() >= torch.finfo(torch.float32).tiny
    assert z_max.tolist() == [0.0, 0.0] and z_sum[0].item() == pytest.approx(1 / (1 - math.exp(-300 / 999)), rel=1e-6)


# -----------------------------------------------------------------------------
# Rows: none, one, ignored, tied, oddly placed

def test_no_rows():
    hidden, weight, targets, b = inputs(0, 8, 30, bias=True)
    out = linear_logprob(hidden, weight, targets, bias=b, chunk=16)
    assert [x.shape for x in out] == [(0,)] * 4
    dh, dw, db = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight, b))
    assert dh.shape == (0, 8) and dw.abs().max() == 0 and db.abs().max() == 0
    assert linear_logprob(hidden, weight, targets, backend="reference").logp.shape == (0,)


def test_one_row():
    hidden, weight, targets, _ = inputs(1, 8, 100)
    check_against_fp64(hidden, weight, targets, None, chunk=32, forward_tol=1e-5, gradient_tol=1e-5)


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("save_bytes", [0, ALL])
def test_every_row_ignored(chunk, save_bytes):
    hidden, weight, targets, b = inputs(4, 8, 50, bias=True, ignored=4)
    with torch.no_grad():
        b[0] = 100.0  # the largest logit everywhere: no row may count it as its target
    out = linear_logprob(hidden, weight, targets, bias=b, chunk=chunk, save_bytes=save_bytes, softcap=3.0)
    assert all(x.tolist() == [0.0] * 4 for x in out[:3]) and out.top1.tolist() == [False] * 4
    for g in gradients(out, upstream(4, torch.float32), (hidden, weight, b)):
        assert g.abs().max() == 0


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("save_bytes", [0, ALL])
def test_ignored_rows_leave_no_trace(chunk, softcap, save_bytes):
    # whatever comes back for such a row, nan from an exp of masked garbage included
    hidden, weight, targets, _ = inputs(6, 8, 50)
    targets[[1, 4]] = -100
    keep = targets != -100
    out = linear_logprob(hidden, weight, targets, chunk=chunk, softcap=softcap, save_bytes=save_bytes)
    less = linear_logprob(hidden[keep], weight, targets[keep], chunk=chunk, softcap=softcap, save_bytes=save_bytes)
    assert all((x[keep] - y).abs().max() < 1e-6 for x, y in zip(out[:3], less[:3]))
    assert torch.equal(out.top1[keep], less.top1)
    grads = upstream(6, torch.float32)
    dh_less, dw_less = gradients(less, [g[keep] for g in grads], (hidden, weight))
    for g in grads:
        g[1] = float("nan")
    dh, dw = gradients(out, grads, (hidden, weight))
    assert dh[~keep].abs().max() == 0
    assert relative_error(dh, dh_less) < 1e-6 and relative_error(dw, dw_less) < 1e-6


def test_ignore_index_may_be_a_token():
    hidden, weight, targets, _ = inputs(6, 8, 50)
    targets[2] = 0
    out = linear_logprob(hidden, weight, targets, ignore_index=0)
    assert out.logp[2] == 0 and (out.logp != 0).sum() == (targets != 0).sum()


def test_ties_count_as_right():
    weight = torch.tensor([[1.9999], [2.0], [2.0], [0.0]])
    out = linear_logprob(torch.ones(4, 1), weight, torch.arange(4), chunk=2)
    assert out.top1.tolist() == [False, True, True, False]
    true = linear_logprob(torch.ones(4, 1), weight, torch.arange(4), backend="reference")
    assert torch.equal(out.top1, true.top1)


def test_views_and_strides():
    hidden, weight, targets, b = inputs(7, 8, 60, bias=True, ignored=1)
    plain = linear_logprob(hidden, weight, targets, bias=b, chunk=16)
    grads = upstream(7, torch.float32)
    odd = torch.zeros(7 * 8 + 1)
    odd[1:] = hidden.detach().flatten()
    views = {
        "hidden": odd[1:].view(7, 8).requires_grad_(),                                     # 4 bytes past any alignment
        "weight": weight.detach().t().contiguous().t().requires_grad_(),                   # column major
        "targets": torch.stack([targets, targets]).t()[:, 1],                              # every second element
        "bias": torch.cat([b.detach(), b.detach()]).view(2, 60).t()[:, 0].requires_grad_(),
    }
    view = linear_logprob(views["hidden"], views["weight"], views["targets"], bias=views["bias"], chunk=16)
    assert all((x.double() - y.double()).abs().max() < 1e-6 for x, y in zip(plain, view))
    ours = gradients(view, grads, (views["hidden"], views["weight"], views["bias"]))
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(ours, gradients(plain, grads, (hidden, weight, b))))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight bias"])
def test_frozen_inputs_get_no_gradient(frozen):
    leaves = dict(zip(("hidden", "weight", "targets", "bias"), inputs(7, 8, 60, bias=True)))
    targets = leaves.pop("targets")
    grads = upstream(7, torch.float32)
    full = linear_logprob(targets=targets, chunk=16, **leaves)
    expected = dict(zip(leaves, gradients(full, grads, leaves.values())))
    for name in frozen.split():
        leaves[name] = leaves[name].detach()
    out = linear_logprob(targets=targets, chunk=16, **leaves)
    sum((o * g).sum() for o, g in zip(out[:3], grads)).backward()
    for name, x in leaves.items():
        assert (x.grad is None) if name in frozen.split() else torch.equal(x.grad, expected[name])


# -----------------------------------------------------------------------------
# Repeatability and memory

@pytest.mark.parametrize("num_outputs", [1, 3])
def test_two_runs_are_bitwise_equal_and_so_are_two_backwards(num_outputs):
    hidden, weight, targets, b = inputs(33, 16, 300, bias=True, ignored=3)
    runs = []
    for _ in range(2):
        out = linear_logprob(hidden, weight, targets, bias=b, chunk=64, save_bytes=33 * 64 * 4)
        for _ in range(2):  # the backward must not consume what the forward saved
            grads = upstream(33, torch.float32)[:num_outputs]
            runs.append((*out, *torch.autograd.grad(out[:num_outputs], (hidden, weight, b), grads, retain_graph=True)))
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0]))


class Memory(TorchDispatchMode):
    """Bytes of live storages that were made under it, their peak, and the most elements a tensor had."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0

    def bytes(self):
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        return sum(v[1] for v in self.live.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in known:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, x.numel(), storage.nbytes() // x.element_size())
        self.peak = max(self.peak, self.bytes())
        return out


@pytest.mark.parametrize("dtype, weight_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                                 (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("which", [("logp",), ("logp", "entropy", "lse")], ids="+".join)
@pytest.mark.parametrize("saved_chunks", [0, 2, 100])
def test_memory_stays_within_the_formula(dtype, weight_dtype, which, saved_chunks):
    N, D, V, chunk = 200, 16, 2500, 256
    hidden, weight, targets, _ = inputs(N, D, V, dtype, weight_dtype=weight_dtype)
    grads = upstream(N, torch.float32, which)
    itemsize = hidden.element_size()
    save_bytes = saved_chunks * N * chunk * itemsize
    with Memory() as memory:
        out = linear_logprob(hidden, weight, targets, chunk=chunk, save_bytes=save_bytes)
        before, memory.peak = memory.peak, 0
        kept = memory.bytes()
        returned = gradients(out, grads, (hidden, weight))
        own = sum(x.numel() * x.element_size() for x in returned)
        peak = max(before, memory.peak - own)
    stride = _new_buffer(1, chunk, dtype, torch.device("cpu")).stride(0)
    # the formula of kernels/linear_logprob.py, and 40 vectors of N
    bound = N * stride * 8 + 12 * N * -(-V // chunk) + min(save_bytes, itemsize * N * V) * stride // chunk + 40 * 4 * N
    if dtype == torch.bfloat16:
        bound += 8 * N * D + 12 * chunk * D
    assert peak <= bound, f"{peak} bytes, expected at most {bound}"
    if which == ("logp",):  # outputs that nobody used cost nothing: log p needs no second buffer
        assert memory.peak - own - kept <= N * stride * 4 + (8 * N * D + 12 * chunk * D) * (itemsize < 4) + 40 * 4 * N
    if saved_chunks == 0:
        assert memory.largest < N * V


def test_a_vocabulary_of_one_chunk_keeps_its_exponentials_within_the_same_formula():
    # the default there: nothing is recomputed, at the peak that recomputing would be allowed
    hidden, weight, targets, _ = inputs(200, 16, 256)
    with Memory() as memory:
        out = linear_logprob(hidden, weight, targets)
        kept = memory.bytes()
        returned = torch.autograd.grad(out.logp.sum(), (hidden, weight))
    assert kept >= 200 * 256 * 4
    assert memory.peak - sum(x.numel() * 4 for x in returned) <= 200 * (256 + 16) * 8 + 12 * 200 + 40 * 4 * 200
    with Memory() as memory:
        out = linear_logprob(hidden, weight, targets, save_bytes=0)
        assert memory.bytes() < 200 * 256 * 4


def test_chunks_on_the_cpu_are_capped():
    hidden, weight, targets, _ = inputs(100, 4, 5000)
    with Memory() as memory:
        linear_logprob(hidden, weight, targets)
    assert memory.largest < 100 * 2100


def test_without_gradients_nothing_is_kept():
    hidden, weight, targets, _ = inputs(200, 16, 2500)

    def kept(hidden, weight):
        with Memory() as memory:
            out = linear_logprob(hidden, weight, targets, chunk=256, save_bytes=ALL)
            return memory.bytes() - sum(x.untyped_storage().nbytes() for x in out), memory.peak

    exponentials = 200 * 2500 * 4
    assert kept(hidden, weight)[0] > exponentials
    with torch.no_grad():
        after, peak = kept(hidden, weight)
        assert after <= 0 and peak < exponentials  # not even until the end of the forward
    with torch.inference_mode():
        assert kept(hidden, weight)[0] <= 0
    after, peak = kept(hidden.detach(), weight.detach())
    assert after <= 0 and peak < exponentials


def test_buffers_have_strides_for_vector_loads():
    for n in (1, 15, 16, 17, 272, 2048, 8192):
        stride = _new_buffer(3, n, torch.float32, torch.device("cpu")).stride(0)
        assert stride >= n and stride % 16 == 0 and stride <= n + 31


# -----------------------------------------------------------------------------
# Errors, and what gets imported

def test_errors_name_what_is_wrong():
    hidden, weight, targets, b = (x.detach() for x in inputs(4, 8, 30, bias=True))
    too_big, negative = targets.clone(), targets.clone()
    too_big[2], negative[3] = 30, -1
    cases = [
        (dict(hidden=hidden[None]), r"hidden \(N, D\).*\(1, 4, 8\).*flatten"),
        (dict(hidden=hidden[:, :7]), r"\(4, 7\) and \(30, 8\)"),
        (dict(weight=weight[:0], bias=None), r"\(0, 8\)"),
        (dict(hidden=hidden.to(torch.complex64)), "complex64"),
        (dict(weight=weight.bfloat16()), "weight: expected torch.float32.*torch.bfloat16"),
        (dict(weight=weight.double()), "weight: .*float64"),
        (dict(bias=b.half()), "bias: .*float16"),
        (dict(bias=b[:29]), r"bias: expected shape \(30,\)"),
        (dict(targets=targets.int()), "targets: expected int64.*int32"),
        (dict(targets=targets[:3]), r"targets: .*\(4,\).*\(3,\)"),
        (dict(targets=too_big), r"targets\[2\]: expected 0 to 29.*found 30"),
        (dict(targets=negative), r"targets\[3\]: .*found -1"),
        (dict(weight=weight.to("meta")), "weight: expected on cpu"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(softcap=0.0), "softcap"),
        (dict(chunk=0), "chunk"),
        (dict(save_bytes=-1), "save_bytes"),
        (dict(backend="cuda"), "auto, triton, torch, reference"),
        (dict(backend="triton"), "expected CUDA tensors, found cpu"),
    ]
    good = dict(hidden=hidden, weight=weight, targets=targets, bias=b)
    linear_logprob(**good)
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_logprob(**{**good, **change})


def test_a_sharded_head_is_refused(tmp_path):
    from torch import distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh
    hidden, weight, targets, _ = inputs(4, 8, 30)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(weight.detach(), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"weight: .*DTensor.*fully_shard\(model.lm_head\)"):
            linear_logprob(hidden, sharded, targets)
    finally:
        dist.destroy_process_group()


def test_the_cpu_path_imports_no_triton():
    code = ("import sys, torch; from kernels import linear_logprob; "
            "linear_logprob(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])); "
            "assert 'triton' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# -----------------------------------------------------------------------------
# On a GPU

@gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype, gradient_tol", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 4e-3)])
@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("save_bytes", [0, 37 * 1024 * 4, ALL])
def test_gpu_against_fp64(backend, dtype, gradient_tol, softcap, save_bytes):
    hidden, weight, targets, b = inputs(37, 64, 3001, dtype, bias=True, ignored=5, device="cuda")
    check_against_fp64(hidden, weight, targets, b, softcap=softcap, temperature=0.8, chunk=1024, save_bytes=save_bytes,
                       backend=backend, forward_tol=2e-5, gradient_tol=gradient_tol)


@gpu
@pytest.mark.parametrize("chunk", [16, 512, 8192, 16384])
def test_gpu_odd_shapes_and_masks(chunk):
    hidden, weight, targets, b = inputs(9, 64, 20011, torch.bfloat16, bias=True, ignored=2, device="cuda")
    with torch.no_grad():
        b[:chunk] = -float("inf")
        b[-5:] = -float("inf")
    targets[2:] = torch.arange(7, device="cuda") + chunk
    targets = torch.stack([targets, targets]).t()[:, 1]
    out = linear_logprob(hidden, weight, targets, bias=b - 120, chunk=chunk)
    true = linear_logprob(hidden, weight, targets, bias=b - 120, chunk=chunk, backend="reference")
    assert all((x - y).abs().max() <= 2e-5 for x, y in zip(out[:3], true[:3])) and torch.equal(out.top1, true.top1)
    grads = upstream(9, torch.float32)
    for ours, theirs in zip(gradients(out, grads, (hidden, weight)), gradients(true, grads, (hidden, weight))):
        assert relative_error(ours, theirs) <= 1e-2


@gpu
def test_gpu_more_logits_than_int32():
    N, D, V = 16384, 16, 151936  # N V = 2.5e9
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
    targets = torch.randint(0, V, (N,), device="cuda", generator=g)
    out = linear_logprob(hidden, weight, targets, save_bytes=ALL)  # 5 GB of exponentials
    dh, _ = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))
    tail = hidden[-64:].detach().requires_grad_()
    true = linear_logprob(tail, weight.detach(), targets[-64:], backend="reference")
    assert (out.logp[-64:] - true.logp).abs().max() <= 2e-5 and (out.entropy[-64:] - true.entropy).abs().max() <= 2e-5
    (dh_true,) = torch.autograd.grad(true.logp.sum() + true.entropy.sum(), tail)
    assert relative_error(dh[-64:], dh_true) <= 8e-3


@gpu
def test_gpu_one_buffer_of_more_elements_than_int32():
    N, D, V = 270_000, 16, 8192  # a single chunk of 2.2e9 logits: row offsets must be int64
    hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, V, (N,), device="cuda")
    out = linear_logprob(hidden, weight, targets)
    true = linear_logprob(hidden[-64:], weight, targets[-64:], backend="reference")
    assert (out.logp[-64:] - true.logp).abs().max() <= 2e-5


@gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gpu_does_not_sync_and_repeats_bitwise(backend):
    hidden, weight, targets, b = inputs(300, 64, 20000, torch.bfloat16, weight_dtype=torch.float32, bias=True,
                                        ignored=5, device="cuda")
    grads = [g.cuda() for g in upstream(300, torch.float32)]

    def run():
        out = linear_logprob(hidden, weight, targets, bias=b, chunk=4096, save_bytes=300 * 4096 * 2 * 2,
                             backend=backend)
        return (*out, *gradients(out, grads, (hidden, weight, b)))

    first = run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@gpu
@pytest.mark.parametrize("save_bytes", [0, None])
def test_gpu_memory_stays_within_the_formula(save_bytes):
    N, D, V, chunk = 4096, 512, 50000, 8192
    hidden, weight, targets, _ = inputs(N, D, V, torch.bfloat16, weight_dtype=torch.float32, device="cuda")
    grad = torch.ones(N, device="cuda")
    # once before, for cuBLAS's workspace
    torch.autograd.grad(linear_logprob(hidden, weight, targets, save_bytes=0).logp, (hidden, weight), grad)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_logprob(hidden, weight, targets, save_bytes=save_bytes)
    returned = torch.autograd.grad(out.logp, (hidden, weight), grad)
    peak = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in returned)
    bound = N * chunk * 6 + 4 * N * D + 12 * N * -(-V // chunk) + 2 * chunk * D + 40 * 4 * N
    bound += 0 if save_bytes == 0 else 2 * N * (V + 16)
    assert peak <= bound * 1.01
