"""The Triton kernels of hstu_attention, run whole by Triton's interpreter on the CPU: see tests/test_kernels_interpreter.py.

fp32 tiles are 16 x 16 and bf16 ones 32 x 32, so 17 and 65 leave a tile of one row. Programs run one by one in numpy: hence few rows.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import hstu_attention

NAMES = "out", "dq", "dk", "dv", "dp", "dw"


def test_cases_in_the_interpreter():
    pytest.importorskip("triton")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "python_functions=case_*"]
    child = subprocess.run([sys.executable, "-m", "pytest", *options, __file__], cwd=Path(__file__).parent.parent,
                           env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]


def inputs(B, T, H, dqk, dv, dtype=torch.float32, N=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, dqk), (B, T, H, dqk), (B, T, H, dv), (2 * (N or T + 3) - 1,), (129,)
    leaves = [(torch.randn(shape, generator=g) * 0.5).to(dtype).requires_grad_() for shape in shapes]
    steps = torch.randint(0, 4, (B, T), generator=g) * 10 ** torch.randint(0, 6, (B, T), generator=g)
    steps[:, T // 2] += 20 * 365 * 86400
    return leaves, 1_700_000_000 + steps.cumsum(1)


def compare(leaves, lengths, timestamps, which="pt", tol=1e-5):
    """Triton against the reference in fp64: output and gradients, errors relative to the largest entry."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    results = []
    for (q, k, v, p, w), backend in ((leaves, "triton"), (exact, "reference")):
        p, w = p if "p" in which else None, w if "t" in which else None
        used = [x for x in (q, k, v, p, w) if x is not None]
        out = hstu_attention(q, k, v, torch.as_tensor(lengths), p, w, timestamps if "t" in which else None, backend=backend)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([out, *torch.autograd.grad(out, used, g.to(out.dtype))])
    for name, x, y, leaf in zip([n for n in NAMES if n[1] not in "pw" or {"p": "p", "w": "t"}[n[1]] in which], *results, [leaves[0], *leaves]):
        assert x.dtype == leaf.dtype and y.abs().max() > 1e-4
        assert (x.double() - y).abs().max() <= tol * max(y.abs().max(), 1), name
    return results[0]


@pytest.mark.parametrize("T, lengths", [(1, [1]), (2, [2, 1]), (17, [17, 0, 16]), (64, [64]), (65, [65, 20]), (200, [100])])
def case_lengths(T, lengths):
    leaves, timestamps = inputs(len(lengths), T, 2 if T < 64 else 1, 6, 4)
    out, *grads = compare(leaves, lengths, timestamps)
    pad = torch.arange(T) >= torch.tensor(lengths)[:, None]
    assert all((x[pad] == 0).all() for x in (out, *grads[:3]))


@pytest.mark.parametrize("which", ["", "p", "t"])
def case_without_biases(which):
    leaves, timestamps = inputs(1, 34, 2, 5, 20)
    compare(leaves, [34], timestamps, which)


def case_equal_times_and_times_out_of_order():
    leaves, timestamps = inputs(2, 20, 1, 4, 4)
    compare(leaves, [20, 9], torch.full_like(timestamps, 1_700_000_000))
    compare(leaves, [20, 9], timestamps.flip(1) - 2**40)


def case_buckets_on_both_sides_of_every_threshold():
    from kernels.hstu import thresholds
    gaps = torch.tensor([d + e for d in thresholds() for e in (-1, 0)] * 2)[:255].view(17, 15)
    timestamps = torch.nn.functional.pad(gaps, (1, 0))  # (17, 16): t_0 = 0
    first = torch.zeros(17, 16, 1, 1)
    first[:, 0] = 1.0  # only item 0 has a value
    out = hstu_attention(first * 0, first * 0, first, torch.full((17,), 15), None, torch.arange(129.0), timestamps, backend="triton")
    buckets = torch.bucketize(gaps, torch.tensor(thresholds()), right=True)
    assert (out[:, :15, 0, 0] - torch.nn.functional.silu(buckets.float())).abs().max() < 1e-4


@pytest.mark.parametrize("dtype, tol", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def case_low_precision_inputs(dtype, tol):
    leaves, timestamps = inputs(2, 65, 1, 8, 4, dtype)
    leaves[4] = leaves[4].detach().float().requires_grad_()
    compare(leaves, [65, 40], timestamps, tol=tol)


def case_nan_pads_views_and_expanded_gradients():
    (q, k, v, p, w), timestamps = inputs(2, 20, 2, 4, 4)
    lengths = torch.tensor([20, 9])
    wide = torch.cat([x.detach().flatten(2) for x in (q, k, v)], 2)  # (B, T, 24), as one projection gives them
    wide[1, 9:] = float("nan")
    wide.requires_grad_()
    views = [x.unflatten(2, (2, 4)) for x in wide.split(8, 2)]
    sums = [hstu_attention(*x, lengths, p, w, timestamps, backend=b).sum() for x, b in ((views, "triton"), ((q, k, v), "reference"))]
    assert (sums[0] - sums[1]).abs() <= 1e-5 * sums[1].abs()
    (ours,) = torch.autograd.grad(sums[0], wide)
    theirs = torch.cat([x.flatten(2) for x in torch.autograd.grad(sums[1], (q, k, v))], 2)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def case_two_runs_are_bitwise_equal_and_heads_lie_in_any_order():
    leaves, timestamps = inputs(2, 18, 2, 4, 4)
    runs = [compare(leaves, [18, 3], timestamps) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs))
    (q, k, v, p, w), lengths = leaves, torch.tensor([18, 3], dtype=torch.int32)
    by_head = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(hstu_attention(*by_head, lengths, p, w, timestamps, backend="triton"), runs[0][0])


def case_no_rows():
    leaves, timestamps = inputs(2, 20, 1, 4, 4)
    q, k, v, p, w = leaves
    out = hstu_attention(q[:0], k[:0], v[:0], torch.zeros(0, dtype=torch.int64), p, w, timestamps[:0], backend="triton")
    assert out.shape == (0, 20, 1, 4)
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(out.sum(), (p, w)))


def case_errors():
    (q, k, v, *_), _ = inputs(1, 2, 1, 130, 4)
    with pytest.raises(ValueError, match="at most 128"):
        hstu_attention(q, k, v, torch.tensor([2]), backend="triton")
