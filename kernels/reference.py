"""The kernels written out naively, by autograd, in any dtype: the specification, and what the tests compare with.

Slow, and as large as the matrix of logits. Low-precision inputs are upcast first, so that only their own rounding is in
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
