"""Triton tiles of hstu_attention: one program per (row, head, block of queries or keys), 32 of them, for fp32 16. Imported
only where that path runs. kernels/hstu.py has the formulas; scores are never written to memory: each backward pass makes
them again.

    _forward      by query block: out                      keys 0 to the diagonal
    _backward_kv  by key block: dk, dv                     queries from the diagonal to the row's length
    _backward_q   by query block: dq, and both tables      keys 0 to the diagonal

Tiles beyond a row's length and above the diagonal are skipped. Nothing is added through memory: no atomics, no locks. A
program of _backward_q writes its own row of table sums, and torch.sum adds the rows, so two runs agree bit by bit. With M
blocks in T positions that takes B H M (T + 256) fp32 numbers: 286 MB for bf16 at B = 32, H = 4, T = 4096.

  positions   the diagonals i - j = D + c, 0 <= c < BLOCK, of the key block at distance D = i0 - j0 are the lower part of
              its tile and the upper part of the tile before (distance D + BLOCK). With row i rotated by i (tl.gather) both
              are columns c: each sum is written once, and one vector is carried from tile to tile.
  times       one masked sum per bucket that is present in the tile, from its least to its greatest: times are sorted, so a
              tile far from the diagonal holds two or three. Times out of order are right too, only slower.

Products of fp32 take three TF32 passes (tf32x3), about as exact as fp32. bf16 and fp16 are summed in fp32; A and dS are
rounded to the inputs' dtype before a product. UPCAST is for the interpreter (TRITON_INTERPRET=1), which multiplies the bit
patterns of bf16. 70 to 255 registers and no spills (tests/test_hstu_compile.py). Run in the interpreter only: on a GPU
neither results nor speed have been checked, and the tile sizes are what fits, not what was fastest.
"""
import os

import torch
import triton
import triton.language as tl

from kernels.hstu import next_thresholds

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _load(ptr, rows, cols, n, stride, D: tl.constexpr):
    """Tile (rows, D padded to a power of two) of a row's queries, keys, ...: 0 at rows from n on, whatever stands there."""
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=(rows[:, None] < n) & (cols[None, :] < D), other=0.0)


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _buckets(gap, next_ptr):
    """kernels.hstu.time_buckets, for a tile of int64 gaps: an fp32 guess from below, and one exact comparison."""
    gap = tl.abs(gap)
    guess = (tl.log(tl.maximum(gap.to(tl.float32), 1.0)) * (1 / 0.301) - 0.01).to(tl.int32)
    guess = tl.minimum(guess, 128)
    return guess + (gap >= tl.load(next_ptr + guess)).to(tl.int32)


@triton.jit
def _score(qk, i, j, t_next, t, next_ptr, position_ptr, time_ptr, N, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr):
    """(S, s, bucket) of a tile; i and j (and their times) broadcast against each other, in either order."""
    bucket = i - j
    if HAS_POSITION:
        # clamped for what lies above the diagonal or beyond the length, and is masked later
        qk += tl.load(position_ptr + N - 1 + tl.minimum(tl.maximum(i - j, 0), N - 1))
    if HAS_TIME:
        bucket = _buckets(t_next - t, next_ptr)
        qk += tl.load(time_ptr + bucket)
    return qk, 1.0 / (1.0 + tl.exp(-qk)), bucket


@triton.jit
def _times(ptr, row, positions, T, HAS_TIME: tl.constexpr):
    t = positions.to(tl.int64)  # in place of times that nothing will read
    if HAS_TIME:
        t = tl.load(ptr + row * T + tl.minimum(positions, T - 1))
    return t


@triton.jit
def _forward(q_ptr, k_ptr, v_ptr, position_ptr, time_ptr, lengths_ptr, t_ptr, next_ptr, out_ptr,
             q_row, q_stride, k_row, k_stride, v_row, v_stride, T, H, M, N, DK: tl.constexpr, DV: tl.constexpr,
             BLOCK: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
             HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, UPCAST: tl.constexpr):
    row = (tl.program_id(0) // M // H).to(tl.int64)
    h = tl.program_id(0) // M % H
    i0 = (M - 1 - tl.program_id(0) % M) * BLOCK  # the longest programs start first
    n = tl.load(lengths_ptr + row).to(tl.int32)
    i = i0 + tl.arange(0, BLOCK)
    cols, cols_v = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    q = _load(q_ptr + row * q_row + h * DK, i, cols, n, q_stride, DK)
    t_next = _times(t_ptr, row, i + 1, T, HAS_TIME)
    out = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    end = tl.where(i0 < n, tl.minimum(i0 + BLOCK, n), 0)
    for j0 in range(0, end, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        k = _load(k_ptr + row * k_row + h * DK, j, cols, n, k_stride, DK)
        v = _load(v_ptr + row * v_row + h * DV, j, cols_v, n, v_stride, DV)
        t = _times(t_ptr, row, j, T, HAS_TIME)
        S, s, _ = _score(_dot(q, tl.trans(k), UPCAST), i[:, None], j[None, :], t_next[:, None], t[None, :], next_ptr,
                         position_ptr, time_ptr, N, HAS_POSITION, HAS_TIME)
        A = tl.where(j[None, :] <= i[:, None], S * s, 0.0)
        out += _dot(A.to(v.dtype), v, UPCAST)
    out = tl.where(i[:, None] < n, out, 0.0)
    tl.store(out_ptr + (row * T * H + h) * DV + i[:, None] * (H * DV) + cols_v[None, :], out.to(out_ptr.dtype.element_ty),
             mask=(i[:, None] < T) & (cols_v[None, :] < DV))


@triton.jit
def _backward_kv(q_ptr, k_ptr, v_ptr, position_ptr, time_ptr, lengths_ptr, t_ptr, next_ptr, dout_ptr, dk_ptr, dv_ptr,
                 q_row, q_stride, k_row, k_stride, v_row, v_stride, T, H, M, N, DK: tl.constexpr, DV: tl.constexpr,
                 BLOCK: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
                 HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, UPCAST: tl.constexpr):
    row = (tl.program_id(0) // M // H).to(tl.int64)
    h = tl.program_id(0) // M % H
    j0 = tl.program_id(0) % M * BLOCK  # the longest programs start first
    n = tl.load(lengths_ptr + row).to(tl.int32)
    j = j0 + tl.arange(0, BLOCK)
    cols, cols_v = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    k = _load(k_ptr + row * k_row + h * DK, j, cols, n, k_stride, DK)
    v = _load(v_ptr + row * v_row + h * DV, j, cols_v, n, v_stride, DV)
    t = _times(t_ptr, row, j, T, HAS_TIME)
    dk = tl.zeros([BLOCK, BLOCK_DK], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for i0 in range(j0, n, BLOCK):
        # the tile stands on its side, keys by queries, so that A and dS are left factors as they are
        i = i0 + tl.arange(0, BLOCK)
        q = _load(q_ptr + row * q_row + h * DK, i, cols, n, q_stride, DK)
        dout = _load(dout_ptr + (row * T * H + h) * DV, i, cols_v, n, H * DV, DV)
        t_next = _times(t_ptr, row, i + 1, T, HAS_TIME)
        S, s, _ = _score(_dot(k, tl.trans(q), UPCAST), i[None, :], j[:, None], t_next[None, :], t[:, None], next_ptr,
                         position_ptr, time_ptr, N, HAS_POSITION, HAS_TIME)
        seen = j[:, None] <= i[None, :]  # dout is 0 from n on
        dv += _dot(tl.where(seen, S * s, 0.0).to(dout.dtype), dout, UPCAST)
        dS = _dot(v, tl.trans(dout), UPCAST) * (s + S * s * (1.0 - s))
        dk += _dot(tl.where(seen, dS, 0.0).to(q.dtype), q, UPCAST)
    tl.store(dk_ptr + (row * T * H + h) * DK + j[:, None] * (H * DK) + cols[None, :], dk.to(dk_ptr.dtype.element_ty),
             mask=(j[:, None] < T) & (cols[None, :] < DK))
    tl.store(dv_ptr + (row * T * H + h) * DV + j[:, None] * (H * DV) + cols_v[None, :], dv.to(dv_ptr.dtype.element_ty),
             mask=(j[:, None] < T) & (cols_v[None, :] < DV))


@triton.jit
def _backward_q(q_ptr, k_ptr, v_ptr, position_ptr, time_ptr, lengths_ptr, t_ptr, next_ptr, dout_ptr, dq_ptr, dp_ptr, dw_ptr,
                q_row, q_stride, k_row, k_stride, v_row, v_stride, T, H, M, N, DK: tl.constexpr, DV: tl.constexpr,
                BLOCK: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
                HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, UPCAST: tl.constexpr):
    """dp_ptr (programs, M * BLOCK), zeros, and dw_ptr (programs, 256): fp32 sums of each program."""
    row = (tl.program_id(0) // M // H).to(tl.int64)
    h = tl.program_id(0) // M % H
    i0 = (M - 1 - tl.program_id(0) % M) * BLOCK
    n = tl.load(lengths_ptr + row).to(tl.int32)
    block = tl.arange(0, BLOCK)
    i = i0 + block
    cols, cols_v, bins = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV), tl.arange(0, 256)
    q = _load(q_ptr + row * q_row + h * DK, i, cols, n, q_stride, DK)
    dout = _load(dout_ptr + (row * T * H + h) * DV, i, cols_v, n, H * DV, DV)
    t_next = _times(t_ptr, row, i + 1, T, HAS_TIME)
    dq = tl.zeros([BLOCK, BLOCK_DK], tl.float32)
    dw = tl.zeros([256], tl.float32)
    carried = tl.zeros([BLOCK], tl.float32)
    end = tl.where(i0 < n, tl.minimum(i0 + BLOCK, n), 0)
    for j0 in range(0, end, BLOCK):
        j = j0 + block
        k = _load(k_ptr + row * k_row + h * DK, j, cols, n, k_stride, DK)
        v = _load(v_ptr + row * v_row + h * DV, j, cols_v, n, v_stride, DV)
        t = _times(t_ptr, row, j, T, HAS_TIME)
        S, s, bucket = _score(_dot(q, tl.trans(k), UPCAST), i[:, None], j[None, :], t_next[:, None], t[None, :], next_ptr,
                              position_ptr, time_ptr, N, HAS_POSITION, HAS_TIME)
        dS = _dot(dout, tl.trans(v), UPCAST) * (s + S * s * (1.0 - s))
        # dout is 0 from n on; times there are garbage, and would only widen the loop over buckets
        seen = (j[None, :] <= i[:, None]) & (i[:, None] < n)
        dS = tl.where(seen, dS, 0.0)
        dq += _dot(dS.to(k.dtype), k, UPCAST)
        if HAS_POSITION:
            rotated = tl.gather(dS, (block[:, None] - block[None, :]) & (BLOCK - 1), 1)
            lower = block[None, :] <= block[:, None]  # i - j >= i0 - j0
            dp_row = dp_ptr + tl.program_id(0).to(tl.int64) * M * BLOCK
            tl.store(dp_row + i0 - j0 + block, tl.sum(tl.where(lower, rotated, 0.0), 0) + carried)
            carried = tl.sum(tl.where(lower, 0.0, rotated), 0)
        if HAS_TIME:
            least = tl.min(tl.min(tl.where(seen, bucket, 255), 1), 0)
            greatest = tl.max(tl.max(tl.where(seen, bucket, 0), 1), 0)
            for m in range(least, greatest + 1):
                dw += tl.where(bins == m, tl.sum(tl.sum(tl.where(bucket == m, dS, 0.0), 1), 0), 0.0)
    tl.store(dq_ptr + (row * T * H + h) * DK + i[:, None] * (H * DK) + cols[None, :], dq.to(dq_ptr.dtype.element_ty),
             mask=(i[:, None] < T) & (cols[None, :] < DK))
    if HAS_TIME:
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * 256 + bins, dw)


def forward(q, k, v, position_bias, time_bias, lengths, timestamps):
    """out (B, T, H, dv) in q's dtype."""
    out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    _launch(_forward, q, k, v, position_bias, time_bias, lengths, timestamps, out)
    return out


def backward(q, k, v, position_bias, time_bias, lengths, timestamps, dout):
    """Gradients of q, k, v and both tables, each in its tensor's dtype."""
    (B, T, H, _), shape = q.shape, _shape(q, v)
    inputs = q, k, v, position_bias, time_bias, lengths, timestamps
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dout = dout.contiguous()  # that of a sum is one expanded number
    blocks = triton.cdiv(T, shape["BLOCK"])
    dp = dw = None
    if position_bias is not None:
        dp = torch.zeros(B * H * blocks, blocks * shape["BLOCK"], dtype=torch.float32, device=q.device)
    if time_bias is not None:
        dw = torch.empty(B * H * blocks, 256, dtype=torch.float32, device=q.device)
    _launch(_backward_kv, *inputs, dout, dk, dv)
    _launch(_backward_q, *inputs, dout, dq, dp, dw)
    if dp is not None:
        middle, sums = len(position_bias) // 2, dp.sum(0)[:T]
        dp = torch.zeros_like(position_bias)  # j <= i: the lower half of the table is never read
        dp[middle:middle + T] = sums
    return dq, dk, dv, dp, None if dw is None else dw.sum(0)[:129].to(time_bias.dtype)


def _launch(kernel, q, k, v, position_bias, time_bias, lengths, timestamps, *outputs):
    B, T, H, _ = q.shape
    q, k, v = (_rows(x) for x in (q, k, v))
    tables = [None if x is None else x.float().contiguous() for x in (position_bias, time_bias)]
    times = (None, None) if time_bias is None else (timestamps.contiguous(), next_thresholds(q.device))
    shape, N = _shape(q, v), 1 if position_bias is None else len(position_bias) // 2 + 1
    blocks = triton.cdiv(T, shape["BLOCK"])
    if B * H * blocks == 0:
        return
    with torch.cuda.device_of(q):
        kernel[(B * H * blocks,)](q, k, v, *tables, lengths.contiguous(), *times, *outputs,
                                  q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), T, H, blocks, N,
                                  HAS_POSITION=position_bias is not None, HAS_TIME=time_bias is not None, **shape)


def _rows(x):
    """x with the heads of a token side by side, as a slice of a wider projection has them too."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _shape(q, v):
    """Constants of a launch: the largest tiles that compile without spills for sm_80 and sm_90, whatever the head size. More
    warps than a tile of 64 needs on sm_80 repeat each other's products, and larger tiles pass 255 registers there."""
    widths = [max(triton.next_power_of_2(x.shape[3]), 16) for x in (q, v)]  # 16 is the least that tl.dot takes
    # fp32 is multiplied in three parts, which take three times the registers
    block, num_warps = (16, 4) if q.dtype == torch.float32 else (32, 8)
    return {"DK": q.shape[3], "DV": v.shape[3], "BLOCK": block, "BLOCK_DK": widths[0], "BLOCK_DV": widths[1], "UPCAST": INTERPRETED,
            "num_warps": num_warps, "num_stages": 1}
