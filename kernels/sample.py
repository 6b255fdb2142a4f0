"""Sampling a token by the inverse of the running mass: the first whose cumulative probability exceeds u.

torch path    in fp64 over the whole row
Triton        in two stages that read logits once, and one chunk of them twice. Per chunk m_c = max z, s_c = sum e^(z - m_c); per row m = max m_c,
              w_c = e^(m_c - m). u sum(w_c s_c) is a point of one chunk (fp64), and there of one column (fp32)

One number u serves both stages: it has 53 bits, the chunk takes a few of them. Not the largest of logits + Gumbel noise: fp32 noise never reaches the
tail, and a random number for every logit costs more than reading the logits. A token without mass is never drawn, wherever rounding puts the point.
"""
import torch

CHUNK = 8192            # columns of a Triton program: a row of them stays in the registers of 8 warps


def sample(logits, u, temperature, num_tokens, use_triton):
    """See kernels.sample, which checks the arguments and calls this."""
    if use_triton:
        from kernels import rows
        return rows.sample(padded(logits), u, temperature, num_tokens, CHUNK)
    logps = (logits.float() / temperature).log_softmax(-1)
    running = logps[:, :num_tokens].double().exp().cumsum(-1)
    total = running[:, -1:]
    below = torch.minimum(u[:, None] * total, total.nextafter(total.new_zeros(())))      # rounding may leave u at the very end, past all mass
    token = torch.searchsorted(running, below, right=True).clamp(max=num_tokens - 1)                      # only for nan, which training refuses
    return token[:, 0], logps.gather(1, token)[:, 0]


def padded(logits):
    """logits (B, V) whose rows can be loaded in whole vectors of 16: as they are, if rows are that far apart and the last one's memory reaches so far."""
    B, V = logits.shape
    size, stride = -(-V // 16) * 16, logits.stride(0)
    rest = logits.untyped_storage().nbytes() // logits.element_size() - logits.storage_offset() - (B - 1) * stride
    if logits.stride(1) == 1 and stride % 16 == 0 and logits.data_ptr() % 16 == 0 and rest >= size:
        return logits
    copy = torch.zeros(B, size, dtype=logits.dtype, device=logits.device)
    copy[:, :V] = logits
    return copy[:, :V]
