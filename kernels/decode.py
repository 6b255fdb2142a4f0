"""Attention of one new token per row over a cache, the rows' lengths read on the device: a step of decoding, without a mask or a sync.

    out_h = sum_{j < length} softmax_j(q_h . k_j / sqrt(d)) v_j         the heads h of a group share keys and values

SDPA reads every position of the cache, whatever the lengths are. The Triton kernel stops at a row's length; its grid depends on shapes alone, so that a
CUDA graph can hold it.
"""
import math

import torch


def decode_attention(q, k_cache, v_cache, lengths, splits, use_triton):
    """See kernels.decode_attention, which checks the arguments and calls this."""
    if use_triton:
        from kernels import decode_tiles
        return decode_tiles.decode_attention(q, k_cache, v_cache, lengths, splits)
    B, H, d = q.shape
    k, v = k_cache[:B], v_cache[:B]
    beyond = torch.arange(k.shape[2], device=q.device) >= lengths[:, None]                  # (B, T)
    scores = (q.view(B, k.shape[1], -1, d) * d ** -0.5 @ k.mT).masked_fill(beyond[:, None, None], -math.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).nan_to_num()                    # of length 0: nothing, 0
    return (weights.to(q.dtype) @ v.masked_fill(beyond[:, None, :, None], 0.0)).reshape(B, H, d)
