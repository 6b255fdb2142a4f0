"""Triton tiles of decode_attention: one program per (row, key head, split of the positions). Imported only where that path runs.

The query heads of one key head are the rows of one tile, padded to 16, the least that tensor cores take: keys and values are read once for all of
them, and those bytes are the cost of a step. Running maximum and sum in fp32; splits leave partial results that torch merges by their log-sum-exp.
A split beyond a row's length reads nothing. The loop is tl.range and no `while`, or loads are not pipelined (tests/test_decoding_kernels.py looks for
cp.async). UPCAST is for the interpreter (TRITON_INTERPRET=1), which multiplies the bit patterns of bf16. On a GPU neither results nor speed have been
checked yet.
"""
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _decode(q_ptr, k_ptr, v_ptr, lengths_ptr, out_ptr, lse_ptr, slot_stride, head_stride, Hkv, split_size, scale,
            GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """out (B, Hkv, splits, GROUP, D) fp32, or q's dtype for one split; lse (B, Hkv, splits, GROUP) fp32: log of the sum of exponentials, -inf for none."""
    row, head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    start = split * split_size
    end = tl.minimum(tl.load(lengths_ptr + row), start + split_size)
    heads, dims = tl.arange(0, 16), tl.arange(0, D)
    q_at = (row * Hkv + head) * GROUP * D + heads[:, None] * D + dims[None, :]
    q = tl.load(q_ptr + q_at, mask=heads[:, None] < GROUP, other=0.0)
    base = row * slot_stride + head * head_stride
    top, total, out = tl.full([16], -float("inf"), tl.float32), tl.zeros([16], tl.float32), tl.zeros([16, D], tl.float32)
    for j0 in tl.range(start, end, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        at, there = base + j[:, None] * D + dims[None, :], j[:, None] < end
        k = tl.load(k_ptr + at, mask=there, other=0.0)
        v = tl.load(v_ptr + at, mask=there, other=0.0)
        if UPCAST:
            q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
        scores = tl.where(j[None, :] < end, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))                        # finite from the first block on: position j0 is there
        shrink, e = tl.exp(top - new_top), tl.exp(scores - new_top[:, None])
        total = total * shrink + tl.sum(e, 1)
        out = out * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision="ieee")
        top = new_top
    out = tl.where(total[:, None] > 0.0, out / total[:, None], 0.0)
    block = (row * Hkv + head) * splits + split
    tl.store(out_ptr + block * GROUP * D + heads[:, None] * D + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=heads[:, None] < GROUP)
    tl.store(lse_ptr + block * GROUP + heads, tl.where(total > 0.0, top + tl.log(total), -float("inf")), mask=heads < GROUP)


def decode_attention(q, k_cache, v_cache, lengths, splits):
    B, H, d = q.shape
    _, Hkv, T, _ = k_cache.shape
    shape = _shape(d, q.dtype)
    split_size = -(-T // (splits * shape["BLOCK"])) * shape["BLOCK"]        # whole blocks
    out = torch.empty(B, Hkv, splits, H // Hkv, d, dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    lse = torch.empty(B, Hkv, splits, H // Hkv, device=q.device)
    with torch.cuda.device_of(q):
        _decode[(B, Hkv, splits)](q, k_cache, v_cache, lengths, out, lse, k_cache.stride(0), k_cache.stride(1), Hkv, split_size, d ** -0.5,
                                  GROUP=H // Hkv, D=d, UPCAST=INTERPRETED, **shape)
    if splits > 1:
        weights = lse.softmax(2).nan_to_num()[..., None]                    # a row of length 0: -inf throughout
        out = (weights * out).sum(2)
    return out.view(B, H, d).to(q.dtype)


def _shape(d, dtype):
    return dict(BLOCK=64 if d <= 64 and dtype.itemsize <= 2 else 16 if d >= 128 and dtype.itemsize > 2 else 32, num_warps=4, num_stages=3)
