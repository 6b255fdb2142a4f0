"""The kernels written out naively, by autograd, in any dtype: the specification, and what the tests compare with.

Slow, and as large as the matrix of logits or scores. Low-precision inputs are upcast first, so that only their own rounding is in
the result.
"""
import torch

from kernels.linear_logprob import LogProb


def linear_logprob(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, ignore_index=-100) -> LogProb:
    """hidden (N, D), weight (V, D), targets (N,) int64, bias (V,) -> LogProb of (N,). See kernels.linear_logprob."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(hidden.dtype).to(dtype).t()  # (N, V); hidden's dtype is the compute dtype
    if bias is not None:
        logits = logits + bias.to(dtype)
    masked = logits == -float("inf")
    if softcap is not None:
        logits = torch.where(masked, logits, softcap * torch.tanh(logits / softcap))
    logits = logits / temperature
    counts = targets != ignore_index
    y = torch.where(counts, targets, 0)[:, None]

    lse = torch.logsumexp(logits, dim=1)
    logp = (logits - lse[:, None]).gather(1, y)[:, 0]
    log_p = (logits - lse[:, None]).masked_fill(masked, 0.0)  # p log p is 0 at p = 0, and so is its gradient
    entropy = -(log_p.exp() * log_p).masked_fill(masked, 0.0).sum(1)
    top1 = logits.gather(1, y)[:, 0] == logits.amax(1)
    logp, entropy, lse = (torch.where(counts, x, 0.0) for x in (logp, entropy, lse))
    return LogProb(logp, entropy, lse, top1 & counts)


def hstu_attention(q, k, v, lengths, position_bias=None, time_bias=None, timestamps=None):
    """q, k (B, T, H, dqk), v (B, T, H, dv), lengths (B,) -> (B, T, H, dv). See kernels.hstu_attention."""
    T, dtype = q.shape[1], torch.float64 if q.dtype == torch.float64 else torch.float32
    i, j = torch.arange(T, device=q.device)[:, None], torch.arange(T, device=q.device)[None, :]
    real = torch.arange(T, device=q.device) < lengths[:, None]  # (B, T)
    q_, k_, v_ = (x.to(dtype).masked_fill(~real[:, :, None, None], 0.0) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q_, k_)
    if position_bias is not None:
        scores = scores + position_bias.to(dtype)[i - j + len(position_bias) // 2]
    if time_bias is not None:
        gaps = torch.cat([timestamps[:, 1:], timestamps[:, -1:]], 1)[:, :, None] - timestamps[:, None, :]  # (B, T, T) int64
        buckets = (gaps.abs().clamp(min=1).double().log() / 0.301).floor().clamp(0, 128).long()
        scores = scores + time_bias.to(dtype)[buckets][:, None]
    weights = torch.nn.functional.silu(scores) * ((j <= i) & real[:, None, :, None])  # masked after the SiLU; no softmax, no scale
    return torch.einsum("bhij,bjhd->bihd", weights, v_).to(q.dtype)
