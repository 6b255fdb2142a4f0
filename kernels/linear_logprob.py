"""Log-probability, entropy and log-sum-exp of a linear head, without the (N, V) matrix of logits.

N rows (tokens), D width, V vocabulary, C chunks of at most `chunk` columns. Per row, with target y:

    z = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature
    lse = log sum_j e^z_j     logp = z_y - lse     entropy = -sum_j p_j log p_j     top1: no z_j is greater than z_y

    forward, per chunk c   m_c = max z   s_c = sum e^(z - m_c)   t_c = sum (z - m_c) e^(z - m_c)   E_c = e^(z - m_c)
    merge                  m = max m_c   w_c = e^(m_c - m)       s = sum w_c s_c   t = sum w_c (t_c + (m_c - m) s_c)
    outputs                lse = m + log s    entropy = log s - t / s    logp = (z_y - m) - log s    top1 = (z_y == m)
    backward               dz_j = [p_j (g_lse - g_logp - g_H (log p_j + H)) + g_logp 1[j = y]] (1 - u_j^2) / temperature
                           with u = capped logit / softcap (no such factor without a softcap)
      recomputed chunk     log p = z - lse
      saved chunk          p = E e^(m_c - lse)     log p = log E + m_c - lse
    gradients              dW_c = dz^T h           dh += dz W_c (fp32)     dbias_c = column sum of dz (fp32)

Why these forms: t / s is well conditioned where sum(p z) - lse is not. z_y - m first is exact near p = 1, where
z_y - lse loses 1e-6. The m_c of a chunk that is all -inf stays -inf, and the merge selects it away: a 0 there would
beat rows whose logits are near -120.

Memory in bytes, beyond inputs, returned gradients and a few dozen vectors of N:
    GPU, bf16 or fp16    N chunk (4 + 2) + 12 N C + min(save_bytes, 2 N V) + 4 N D; to cast a master weight, 2 chunk D
    CPU, bf16 or fp16    N chunk (4 + 4) + 12 N C + min(save_bytes, 2 N V) + 8 N D + 12 chunk D
    CPU, fp32            N chunk (4 + 4) + 12 N C + min(save_bytes, 4 N V)
On the CPU a chunk has at most 2048 columns, and a softcap takes a third buffer of N chunk 4.

Two paths share the loop: torch (any device and dtype) and the Triton row kernels of kernels/rows.py. Every probability
counts, and without atomics or autotuning two runs agree bit by bit. Not here: a Brier score (it needs sum p^2), second
derivatives.
"""
from typing import NamedTuple

import torch
from torch import Tensor

CPU_CHUNK = 2048  # columns per chunk there: two (N, 2048) buffers of a few hundred rows stay in the last-level cache


class LogProb(NamedTuple):
    """What linear_logprob returns: (N,) each, fp32, or fp64 for fp64 inputs. Ignored rows hold 0 and False."""
    logp: Tensor     # log-probability of the target, nats
    entropy: Tensor  # of the whole row, nats
    lse: Tensor      # log sum exp of the capped and tempered logits
    top1: Tensor     # bool: no logit is greater than the target's, so a tie counts as right


class Settings(NamedTuple):
    temperature: float
    softcap: float | None
    chunk: int         # columns per chunk
    num_saved: int     # so many leading chunks keep their exponentials for the backward
    use_triton: bool


def linear_logprob(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, ignore_index=-100, chunk=8192,
                   save_bytes=None, use_triton=False) -> LogProb:
    """See kernels.linear_logprob, which checks the arguments and calls this."""
    N, V = hidden.shape[0], weight.shape[0]
    counts = targets != ignore_index
    if not targets.is_cuda and counts.all():
        # a look that is free on the CPU and saves every `where` below; a GPU would have to wait for the answer
        counts, targets = None, targets.contiguous()
    else:
        # -1 is in no chunk. The result is contiguous and aligned, whatever view `targets` was.
        targets = torch.where(counts, targets, -1)
    # Decided here: inside a Function grad mode is always off, and ctx.needs_input_grad is True under no_grad too, so
    # a call without gradients would keep its exponentials, 5 GB of them, for a backward that never comes.
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    chunk = min(chunk, V) if hidden.is_cuda or use_triton else min(chunk, V, CPU_CHUNK)
    num_saved = num_saved_chunks(N, V, chunk, hidden, save_bytes) if wants_grad else 0
    settings = Settings(float(temperature), softcap, chunk, num_saved, use_triton)
    if wants_grad:
        return LogProb(*_LinearLogProb.apply(hidden, weight, bias, targets, counts, settings))
    return LogProb(*_forward(hidden, weight, bias, targets, counts, settings)[:4])


def num_saved_chunks(N, V, chunk, hidden, save_bytes):
    """How many leading chunks keep their exponentials, given room for save_bytes of them."""
    itemsize = hidden.element_size()
    if save_bytes is None and hidden.is_cuda:
        # Total, never free memory: free memory differs after a resume. That would change which chunks are recomputed,
        # with that the rounding of gradients, and a resumed run would not be the run that was never stopped.
        total_memory = torch.cuda.get_device_properties(hidden.device).total_memory
        save_bytes = min(total_memory // 16, itemsize * N * V)
    elif save_bytes is None:
        # The head of a toy model fits one chunk and keeps it: a tenth less time, within the same formula for memory.
        save_bytes = itemsize * N * V if chunk == V else 0
    full = min(save_bytes // max(N * chunk * itemsize, 1), V // chunk)
    rest = V % chunk
    return full + (rest > 0 and full == V // chunk and save_bytes >= N * V * itemsize)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, counts, settings):
        *outputs, row_lse, z_y, maxima, saved = _forward(hidden, weight, bias, targets, counts, settings)
        logp, entropy, lse, top1 = outputs
        ctx.save_for_backward(hidden, weight, bias, targets, counts, logp, entropy, row_lse, z_y, *maxima, *saved)
        ctx.settings = settings
        ctx.mark_non_differentiable(top1)
        ctx.set_materialize_grads(False)  # an output nobody used arrives as None, and its terms are skipped
        return logp, entropy, lse, top1

    @staticmethod
    def backward(ctx, g_logp, g_entropy, g_lse, _):
        """Gradients of hidden (N, D), weight (V, D) and bias (V,), each in its tensor's dtype."""
        if torch.is_grad_enabled():  # once_differentiable would return a constant here, without a word
            raise RuntimeError("linear_logprob has no second derivatives: drop create_graph=True, "
                               "or call it with backend='reference'")
        hidden, weight, bias, targets, counts, logp, entropy, row_lse, z_y, *kept = ctx.saved_tensors
        maxima, saved = kept[:len(kept) // 2], kept[len(kept) // 2:]
        s, needed = ctx.settings, ctx.needs_input_grad
        if s.use_triton:
            from kernels import rows
        N, V = hidden.shape[0], weight.shape[0]
        dtype, device = _accumulation_dtype(hidden), hidden.device
        h = _operand(hidden, s)
        padded_bias = _padded_bias(bias, dtype)
        dh = torch.empty(hidden.shape, dtype=dtype, device=device) if needed[0] else None
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
        dbias = torch.empty(V, dtype=dtype, device=device) if needed[2] else None

        if counts is not None:  # what arrives for an ignored row may be anything, nan included
            g_logp, g_entropy, g_lse = (None if g is None else torch.where(counts, g, 0.0)
                                        for g in (g_logp, g_entropy, g_lse))
        base, dz_y = _row_gradients(g_logp, g_entropy, g_lse, logp, entropy, z_y, s)

        dz_dtype = hidden.dtype if s.use_triton else h.dtype
        x_buffer = _new_buffer(N, s.chunk, dtype, device)
        dz_buffer = x_buffer if dz_dtype == dtype else _new_buffer(N, s.chunk, dz_dtype, device)
        p_buffer = None  # the torch path's second one, where it needs p beside log p
        if not s.use_triton and (g_entropy is not None or s.softcap is not None):
            p_buffer = _new_buffer(N, s.chunk, dtype, device)
        for c, first in enumerate(range(0, V, s.chunk)):
            last = min(first + s.chunk, V)
            x, dz = x_buffer[:, :last - first], dz_buffer[:, :last - first]
            w = _weight_chunk(weight, first, last, hidden, h)
            bias_c = None if padded_bias is None else padded_bias[first:]
            save = saved[c] if c < len(saved) else None
            shift = None if save is None else maxima[c] - row_lse
            row = s.temperature, s.softcap, row_lse, base, g_entropy, dz_y
            if s.use_triton:
                if save is None:
                    _mm(h, w.t(), x)
                rows.dz(x if save is None else save, bias_c, shift, targets, first, *row, dz)
            else:
                if save is None:
                    _logits_torch(h, w, bias_c, s, x)
                in_chunk, column = _columns_of_targets(targets, first, last, V)
                p = None if p_buffer is None else p_buffer[:, :last - first]
                _dz_torch(x, save, shift, in_chunk, column, *row, p)
                if dz.dtype != x.dtype:
                    dz.copy_(x)
            if dw is not None:
                # one GEMM over all rows: each element of dW is written once, so there is no accumulator to round
                if dw.dtype == dtype or (dw.is_cuda and dw.dtype == h.dtype):
                    _mm(dz.t(), h, dw[first:last])
                else:
                    dw[first:last] = _mm(dz.t(), h, torch.empty(last - first, h.shape[1], dtype=dtype, device=device))
            if dh is not None:
                _mm(dz, w, dh, accumulate=c > 0)
            if dbias is not None:
                torch.sum(dz, 0, dtype=dtype, out=dbias[first:last])
        dh = None if dh is None else dh.to(hidden.dtype)
        dbias = None if dbias is None else dbias.to(bias.dtype)
        return dh, dw, dbias, None, None, None


def _row_gradients(g_logp, g_entropy, g_lse, logp, entropy, z_y, settings):
    """(base, dz_y), (N,) each: dz_j = p_j (base - g_H log p_j) (1 - u_j^2) / temperature, but dz_y at the target."""
    base = torch.zeros_like(logp) if g_lse is None else g_lse
    dz_y = base
    if g_entropy is not None:
        base = base - g_entropy * entropy
        dz_y = dz_y - g_entropy * (logp.clamp(min=_exp_floor(logp.dtype)) + entropy)
    if g_entropy is not None or g_lse is not None:
        dz_y = logp.exp() * dz_y
    if g_logp is not None:
        base = base - g_logp
        # 1 - p from the exact logp: near p = 1 the difference of two rounded numbers would be noise
        dz_y = dz_y - g_logp * torch.expm1(logp)
    if settings.softcap is not None:
        u = (z_y * (settings.temperature / settings.softcap)).clamp(-1.0, 1.0)  # clamped for a target at -inf
        dz_y = dz_y * (1.0 - u * u)
    return base, dz_y / settings.temperature


# -----------------------------------------------------------------------------
# The forward, and the merge of its chunks

def _forward(hidden, weight, bias, targets, counts, settings):
    """The four outputs, then what the backward needs: lse (N,) of ignored rows too, z_y (N,), and of the saved chunks a
    list of maxima (N,) and a list of exponentials (N, chunk)."""
    s = settings
    if s.use_triton:
        from kernels import rows
    N, V = hidden.shape[0], weight.shape[0]
    dtype, device = _accumulation_dtype(hidden), hidden.device
    h = _operand(hidden, s)
    bias = _padded_bias(bias, dtype)
    z_buffer = _new_buffer(N, s.chunk, dtype, device)
    # The torch path makes exponentials in a second buffer, or in the one that is saved; the row kernel in registers.
    save_directly = _saved_dtype(hidden) == dtype
    e_buffer = None
    if not s.use_triton and not (save_directly and s.num_saved * s.chunk >= V):
        e_buffer = _new_buffer(N, s.chunk, dtype, device)
    z_y = torch.empty(N, dtype=dtype, device=device)
    stats, saved = [], []  # per chunk (max, sum, dot), (N,) each; exponentials
    for c, first in enumerate(range(0, V, s.chunk)):
        last = min(first + s.chunk, V)
        z = z_buffer[:, :last - first]
        bias_c = None if bias is None else bias[first:]  # longer than the chunk: see _padded_bias
        save = None
        if c < s.num_saved:
            save = _new_buffer(N, last - first, _saved_dtype(hidden), device)[:, :last - first]
            saved.append(save)
        w = _weight_chunk(weight, first, last, hidden, h)
        if s.use_triton:
            _mm(h, w.t(), z)
            stats.append(_new_buffer(3, N, dtype, device)[:, :N])
            rows.stats(z, bias_c, targets, first, s.temperature, s.softcap, z_y, *stats[-1], save)
        else:
            _logits_torch(h, w, bias_c, s, z)
            in_chunk, column = _columns_of_targets(targets, first, last, V)
            z_column = z.gather(1, column)[:, 0]
            z_y = z_column if in_chunk is None else torch.where(in_chunk, z_column, z_y)
            e = save if save is not None and save_directly else e_buffer[:, :last - first]
            stats.append(_stats_torch(z, e))
            if save is not None and save is not e:
                save.copy_(e)
    z_buffer = e_buffer = z = e = None  # freed before the merge and its (C, N) temporaries

    top, total, dot = stats[0] if len(stats) == 1 else _merge(*(torch.stack(x) for x in zip(*stats)))
    log_s = total.log()
    lse = row_lse = top + log_s
    logp = (z_y - top).sub_(log_s)
    entropy = log_s - dot / total  # never negative, in rounded arithmetic too: total >= 1 and dot <= 0
    top1 = z_y == top
    if counts is not None:
        logp, entropy, lse = (torch.where(counts, x, 0.0) for x in (logp, entropy, row_lse))
        top1 &= counts
    return logp, entropy, lse, top1, row_lse, z_y, [stat[0] for stat in stats[:len(saved)]], saved


def _merge(chunk_max, chunk_sum, chunk_dot):
    """(C, N) statistics of chunks -> (N,) max, sum e^(z - max), sum (z - max) e^(z - max) of whole rows."""
    top = chunk_max.amax(0)
    gap = chunk_max - top
    w = gap.exp()
    gap.masked_fill_(w == 0, 0.0)  # a chunk without one finite logit is selected away: 0 * inf is nan
    dot = (w * gap.mul_(chunk_sum).add_(chunk_dot)).sum(0)
    return top, w.mul_(chunk_sum).sum(0), dot


# -----------------------------------------------------------------------------
# Buffers, dtypes, matrix products

def _accumulation_dtype(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _saved_dtype(hidden):
    # p from a bf16 exponential is off by 2^-9, the rounding a bf16 dz gets anyway; to fp32 inputs it would cost three
    # digits. fp16 has no normal number below e^-9.7, bf16 has.
    return torch.bfloat16 if hidden.dtype == torch.float16 else hidden.dtype


def _operand(hidden, settings):
    """hidden as the products take it: upcast on the torch path's CPU, which has no bf16 product with an fp32 result."""
    return hidden if hidden.is_cuda or settings.use_triton else hidden.to(_accumulation_dtype(hidden))


def _weight_chunk(weight, first, last, hidden, h):
    # an fp32 master is rounded to the compute dtype chunk by chunk, never whole
    return weight[first:last].to(hidden.dtype).to(h.dtype)


def _padded_bias(bias, dtype):
    # 16 spare elements let a row kernel load whole vectors past the last column
    return None if bias is None else torch.nn.functional.pad(bias.to(dtype), (0, 16))


def _new_buffer(N, columns, dtype, device):
    """(N, at least `columns`), a multiple of 16: without that the row kernels compile to scalar loads."""
    stride = -(-columns // 16) * 16
    if device.type == "cpu" and stride % 512 == 0:
        stride += 16  # rows a power of two apart share cache sets: dz.t() @ h at (1024, 128, 2048) took twice as long
    return torch.empty(N, stride, dtype=dtype, device=device)


def _mm(a, b, out, accumulate=False):
    """out = a @ b, or out += a @ b, in out's dtype: on a GPU a bf16 GEMM that stores its fp32 accumulator."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    if not a.is_cuda:
        return _mm(a.to(out.dtype), b.to(out.dtype), out, accumulate)
    if accumulate:  # with out=, or a copy of the accumulator is made (pytorch#153590)
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


# -----------------------------------------------------------------------------
# The torch path's row functions, in place: the plain expressions took up to three times as long

def _exp_floor(dtype):
    # Below -87, e^z is subnormal or 0, and a CPU is slow at that: 60 to 250 times in exp, 15 times in a GEMM over the
    # results. e^-60 = 9e-27 in its place changes no fp32 sum, and keeps log p finite: p log p is then 0 where p is.
    return -600.0 if dtype == torch.float64 else -60.0


def _logits_torch(h, w, bias, settings, z):
    """z (N, n) = the capped and tempered logits of one chunk."""
    _mm(h, w.t(), z)
    if bias is not None:
        z.add_(bias[:z.shape[1]])
    if settings.softcap is not None:
        masked = z == -float("inf") if bias is not None else None  # stays masked: tanh would make it -softcap
        z.div_(settings.softcap).tanh_().mul_(settings.softcap / settings.temperature)
        if masked is not None:
            z.masked_fill_(masked, -float("inf"))
    elif settings.temperature != 1.0:
        z.div_(settings.temperature)


def _columns_of_targets(targets, first, last, V):
    """(in_chunk bool (N,), column (N, 1)). column is valid in every row, so that gather and scatter need no sync.
    in_chunk is None where the chunk is the vocabulary: an ignored row has column 0 and a gradient of 0 to put there."""
    if last - first == V:
        return None, targets.clamp(min=0)[:, None]
    return (targets >= first) & (targets < last), (targets - first).clamp_(0, last - first - 1)[:, None]


def _stats_torch(z, e):
    """(max, sum, dot), (N,) each, of one chunk of logits z (N, n); e (N, n) = e^(z - max). Overwrites z."""
    z_max = z.amax(1)
    shift = z_max.clamp(min=torch.finfo(z.dtype).min)  # a chunk of -inf: -inf - -inf is nan
    torch.exp(z.sub_(shift[:, None]).clamp_(min=_exp_floor(z.dtype)), out=e)
    return z_max, e.sum(1), z.mul_(e).sum(1)


def _dz_torch(x, save, shift, in_chunk, column, temperature, softcap, lse, base, g_entropy, dz_y, p):
    """x (N, n) = gradient of the raw logits: from x = z, or where `save` is given from the saved exponentials. p is a
    buffer like x, where there is an entropy gradient or a softcap."""
    scale = base[:, None] if temperature == 1.0 else base[:, None] / temperature
    if p is None:
        if save is None:
            x.sub_(lse[:, None]).clamp_(min=_exp_floor(x.dtype)).exp_().mul_(scale)
        else:
            torch.mul(save, scale * shift.exp()[:, None], out=x)
    else:
        log_p = x.sub_(lse[:, None]) if save is None else x.copy_(save).log_().add_(shift[:, None])
        torch.exp(log_p.clamp_(min=_exp_floor(x.dtype)), out=p)
        if softcap is not None:
            u = (log_p + lse[:, None]).mul_(temperature / softcap)
            p.mul_(u.square_().neg_().add_(1.0))
        if g_entropy is None:
            torch.mul(p, scale, out=x)
        else:
            log_p.mul_((g_entropy / -temperature)[:, None]).add_(scale).mul_(p)
    if in_chunk is not None:
        dz_y = torch.where(in_chunk, dz_y, x.gather(1, column)[:, 0])
    x.scatter_(1, column, dz_y[:, None])
