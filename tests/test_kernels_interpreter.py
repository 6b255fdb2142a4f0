"""The Triton kernels, run whole by Triton's interpreter on the CPU.

TRITON_INTERPRET is read when a kernel is decorated, and an interpreted process cannot compile: so the one test here
runs this file's cases in a child process that has the variable. Programs run one by one in numpy, 5 ms each: hence few
rows and short chunks.
The interpreter truncates fp32 to bf16 where a GPU rounds to nearest: hence 2 units in the last place of bf16 there.
"""
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import linear_logprob

ALL = 1 << 60


def test_cases_in_the_interpreter():
    pytest.importorskip("triton")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "python_functions=case_*"]
    child = subprocess.run([sys.executable, "-m", "pytest", *options, __file__], cwd=Path(__file__).parent.parent,
                           env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]


def inputs(N, D, V, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in ((N, D), (V, D), (V,))]
    return leaves[0], leaves[1], torch.randint(0, V, (N,), generator=g), leaves[2]


def compare(hidden, weight, targets, bias, *, gradient_tol, which=(0, 1, 2), chunk=8192, save_bytes=0, **kwargs):
    """Triton against the reference in fp64, upstream gradients on the outputs `which` of (logp, entropy, lse)."""
    out = linear_logprob(hidden, weight, targets, bias=bias, chunk=chunk, save_bytes=save_bytes, backend="triton",
                         **kwargs)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    exact = [x.detach().to(hidden.dtype).double().requires_grad_() for x in leaves]  # as the kernel rounds a master
    true = linear_logprob(*exact[:2], targets, bias=exact[2] if len(exact) > 2 else None, backend="reference", **kwargs)
    assert all((x.double() - y).abs().max() <= 1e-5 for x, y in zip(out[:3], true[:3]))
    assert torch.equal(out.top1, true.top1)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(len(targets), generator=g) for _ in range(3)]
    ours = torch.autograd.grad([out[i] for i in which], leaves, [grads[i] for i in which])
    theirs = torch.autograd.grad([true[i] for i in which], exact, [grads[i].double() for i in which])
    for x, y in zip(ours, theirs):
        assert y.abs().max() > 1e-3 and x.isfinite().all()
        assert (x.double() - y).abs().max() <= gradient_tol * y.abs().max()


@pytest.fixture(autouse=True)
def nan_in_fresh_buffers(monkeypatch):
    # what lies between the last column and the stride is loaded, and must not leak
    module = sys.modules["kernels.linear_logprob"]
    fresh = module._new_buffer
    monkeypatch.setattr(module, "_new_buffer", lambda *args: fresh(*args).fill_(float("nan")))


@pytest.mark.parametrize("bias, softcap, temperature",
                         [(False, None, 1.0), (True, None, 0.7), (False, 3.0, 1.0), (True, 3.0, 0.7)])
@pytest.mark.parametrize("saved_chunks", [0, 1, 4])
@pytest.mark.parametrize("which", [(0,), (0, 1, 2)])
def case_fp32(which, saved_chunks, bias, softcap, temperature):
    hidden, weight, targets, b = inputs(4, 8, 100, torch.float32)
    targets[1] = -100
    compare(hidden, weight, targets, b if bias else None, softcap=softcap, temperature=temperature, chunk=32,
            which=which, save_bytes=saved_chunks * 4 * 32 * 4, gradient_tol=1e-5)


@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, 1.2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("save_bytes, softcap", [(0, None), (ALL, None), (ALL, 3.0)])
def case_low_precision_inputs(dtype, tol, save_bytes, softcap):
    hidden, weight, targets, b = inputs(4, 8, 100, dtype)
    if dtype == torch.float16 and save_bytes:
        tol = 1.2e-2  # the exponentials are bf16
    compare(hidden, weight, targets, b, chunk=32, save_bytes=save_bytes, softcap=softcap, gradient_tol=tol)
    master = torch.randn(100, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    compare(hidden, master, targets, None, chunk=32, save_bytes=save_bytes, softcap=softcap, gradient_tol=tol)


@pytest.mark.parametrize("V, chunk", [(5, 8192), (1, 16), (1408, 1024), (96, 32), (97, 32), (65, 64)])
def case_vocabularies_and_edges(V, chunk):
    hidden, weight, targets, b = inputs(6, 8, V, torch.float32)
    targets[:] = torch.tensor([0, chunk - 1, chunk, 2 * chunk - 1, V - 2, V - 1]).clamp(0, V - 1)
    if V > 1:
        compare(hidden, weight, targets, b, chunk=chunk, save_bytes=6 * min(V, chunk) * 4, gradient_tol=1e-5)
    else:
        assert linear_logprob(hidden, weight, targets, backend="triton").logp.tolist() == [0.0] * 6


@pytest.mark.parametrize("save_bytes", [0, ALL])
@pytest.mark.parametrize("softcap, offset", [(None, -120.0), (3.0, -1.0)])
def case_masked_chunks_beside_rows_far_below_zero(save_bytes, softcap, offset):
    hidden, weight, _, _ = inputs(3, 8, 130, torch.float32)
    keep = torch.ones(130, dtype=torch.bool)
    keep[:32] = keep[96:] = keep[40:44] = False
    b = torch.where(keep, offset, -float("inf")).requires_grad_()
    targets = torch.tensor([32, 60, 95])
    grads = [torch.tensor([1.0, -0.5, 0.3])] * 3
    out = linear_logprob(hidden, weight, targets, bias=b, softcap=softcap, chunk=32, save_bytes=save_bytes,
                         backend="triton")
    less = linear_logprob(hidden, weight[keep], torch.tensor([0, 24, 59]), bias=torch.full((60,), offset),
                          softcap=softcap)
    assert all((x - y).abs().max() <= 2e-5 for x, y in zip(out[:3], less[:3]))
    dh, dw, db = torch.autograd.grad(out[:3], (hidden, weight, b), grads)
    for x, y in zip((dh, dw), torch.autograd.grad(less[:3], (hidden, weight), grads)):
        assert (x - y).abs().max() <= 1e-4 * y.abs().max()
    assert db[~keep].abs().max() == 0


def case_peaked_rows_have_no_nan():
    weight = torch.zeros(40, 1)
    weight[3] = 300.0
    hidden, weight = torch.ones(3, 1, requires_grad=True), weight.requires_grad_()
    for save_bytes, softcap in itertools.product((0, ALL), (None, 1000.0)):
        out = linear_logprob(hidden, weight, torch.tensor([3, 20, -100]), softcap=softcap, chunk=16,
                             save_bytes=save_bytes, backend="triton")
        assert out.entropy.tolist() == [0.0] * 3 and out.top1.tolist() == [True, False, False]
        assert out.logp[0] == 0 and out.logp[1] < -250
        for g in torch.autograd.grad(out[:3], (hidden, weight), [torch.ones(3)] * 3):
            assert g.isfinite().all()


def case_target_gradient_where_p_is_almost_one():
    weight = torch.zeros(100, 1)
    weight[7] = 16.125
    bias = torch.zeros(100, dtype=torch.bfloat16, requires_grad=True)
    out = linear_logprob(torch.ones(1, 1).bfloat16(), weight.bfloat16(), torch.tensor([7]), bias=bias, save_bytes=ALL,
                         backend="triton")
    (db,) = torch.autograd.grad(out.logp.sum(), bias)
    e = torch.tensor(16.125).double().exp().item()
    assert db[7].item() == pytest.approx(99 / (99 + e), rel=0.05)


def case_no_rows_all_ignored_and_views():
    hidden, weight, targets, b = inputs(4, 8, 50, torch.float32)
    empty = linear_logprob(hidden[:0], weight, targets[:0], bias=b, chunk=16, backend="triton")
    assert empty.logp.shape == (0,)
    assert torch.autograd.grad(empty.logp.sum(), weight)[0].abs().max() == 0
    ignored = linear_logprob(hidden, weight, torch.full((4,), -100), bias=b, softcap=2.0, chunk=16, save_bytes=ALL,
                             backend="triton")
    assert all(x.tolist() == [0.0] * 4 for x in ignored[:3])
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(ignored[:3], (hidden, weight, b), [torch.ones(4)] * 3))
    unaligned = torch.cat([b.detach()] * 2)[1:51].requires_grad_()
    compare(hidden, weight, torch.stack([targets, targets]).t()[:, 1], unaligned, chunk=16, gradient_tol=1e-5)


@pytest.mark.parametrize("name", ["logp", "entropy", "lse"])
def case_gradients_of_plain_sums(name):
    # the upstream gradient of a sum is one number with stride 0
    hidden, weight, targets, _ = inputs(4, 8, 50, torch.float32)
    outs = [linear_logprob(hidden, weight, targets, chunk=16, backend=backend) for backend in ("triton", "reference")]
    ours, theirs = (torch.autograd.grad(getattr(out, name).sum(), (hidden, weight)) for out in outs)
    assert all((x - y).abs().max() < 1e-5 for x, y in zip(ours, theirs))


def case_two_runs_are_bitwise_equal_and_the_backward_consumes_nothing():
    hidden, weight, targets, b = inputs(3, 8, 50, torch.float32)
    runs = []
    for _ in range(2):
        out = linear_logprob(hidden, weight, targets, bias=b, chunk=16, save_bytes=ALL, backend="triton")
        for _ in range(2):
            grads = torch.autograd.grad(out[:3], (hidden, weight, b), [torch.ones(3)] * 3, retain_graph=True)
            runs.append((*out, *grads))
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0]))


def case_errors():
    hidden, weight, targets, _ = inputs(3, 8, 20000, torch.float32)
    with pytest.raises(ValueError, match="chunk: expected at most 16384"):
        linear_logprob(hidden, weight, targets, chunk=20000, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        linear_logprob(hidden.double(), weight.double(), targets, backend="triton")
