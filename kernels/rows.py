"""Triton row kernels: one program per row of a chunk of logits. Imported only where the Triton path runs.

A program loads its row once, in vectors of 128 bits, keeps it in registers, and writes its own elements: no atomics,
nothing to tune, and int64 row offsets, since N V passes 2^31 at 16384 rows of 151936. Two habits to keep:

  vectors   a load is masked at n_load, n rounded up to 16, which the launcher knows to be divisible by 16. Masked at n
            it compiles to 32 scalar loads. What lies between n and n_load is garbage, and is selected away by column.
  upcast    every load becomes fp32 at once: the interpreter (TRITON_INTERPRET=1) computes garbage with bf16 values.

At 8192 columns and 8 warps, for sm_80 and sm_90: 36 to 118 registers and no spills in any variant, which
tests/test_kernels_compile.py repeats without a GPU.

_chunks and _pick sample tokens (kernels/sample.py): programs of _chunks are as many as rows and chunks, one of _pick reads
the row's statistics, then one chunk again.
"""
import torch
import triton
import triton.language as tl


@triton.jit
def _logits(x, bias_ptr, cols, n_load, softcap, inv_temperature, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """(z, u): raw logits x to capped and tempered ones, and tanh(raw / softcap)."""
    u = x
    if HAS_BIAS:
        x += tl.load(bias_ptr + cols, mask=cols < n_load, other=0.0)
    if HAS_SOFTCAP:
        # tanh without libdevice; its absolute error of 1e-7 becomes 1e-7 * softcap in z
        u = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x / softcap))
        x = tl.where(x == -float("inf"), x, softcap * u)  # a masked column stays masked
    return x * inv_temperature, u


@triton.jit(do_not_specialize=["n", "first"])
def _stats(x_ptr, bias_ptr, targets_ptr, z_y_ptr, max_ptr, sum_ptr, dot_ptr, e_ptr,
           n, n_load, first, x_stride, e_stride, softcap, inv_temperature,
           BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SAVE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_load, other=0.0).to(tl.float32)
    z, _ = _logits(x, bias_ptr, cols, n_load, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
    z = tl.where(cols < n, z, -float("inf"))

    target = (tl.load(targets_ptr + row) - first).to(tl.int32)
    if (target >= 0) & (target < n):
        tl.store(z_y_ptr + row, tl.sum(tl.where(cols == target, z, 0.0), 0))
    z_max = tl.max(z, 0)
    # a row of -inf keeps z_max = -inf for the merge, but -inf - -inf is nan
    gap = z - tl.where(z_max == -float("inf"), 0.0, z_max)
    e = tl.exp(gap)
    tl.store(max_ptr + row, z_max)
    tl.store(sum_ptr + row, tl.sum(e, 0))
    tl.store(dot_ptr + row, tl.sum(tl.where(e > 0.0, gap * e, 0.0), 0))  # -inf * 0 is nan
    if SAVE:
        tl.store(e_ptr + row * e_stride + cols, e.to(e_ptr.dtype.element_ty), mask=cols < n_load)


@triton.jit(do_not_specialize=["n", "first"])
def _dz(x_ptr, bias_ptr, targets_ptr, lse_ptr, shift_ptr, base_ptr, g_entropy_ptr, dz_y_ptr, dz_ptr,
        n, n_load, first, x_stride, dz_stride, softcap, inv_temperature,
        BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
        SAVED: tl.constexpr):
    """x holds raw logits, or with SAVED the exponentials that _stats wrote. dz may be x itself, if the dtypes agree."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_load, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + row)
    if SAVED:
        shift = tl.load(shift_ptr + row)
        p = x * tl.exp(shift)
        log_p = tl.log(x) + shift
        u = (log_p + lse) / (softcap * inv_temperature)
    else:
        z, u = _logits(x, bias_ptr, cols, n_load, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP)
        log_p = z - lse
        p = tl.exp(log_p)
    dz = p * tl.load(base_ptr + row)
    if HAS_ENTROPY:
        dz -= tl.load(g_entropy_ptr + row) * tl.where(p > 0.0, p * log_p, 0.0)
    if HAS_SOFTCAP:
        dz = tl.where(p > 0.0, dz * (1.0 - u * u), 0.0)
    # the target's entry comes exact, with 1 - p = -expm1(logp), from vectors of N
    target = (tl.load(targets_ptr + row) - first).to(tl.int32)
    dz = tl.where(cols == target, tl.load(dz_y_ptr + row), dz * inv_temperature)
    tl.store(dz_ptr + row * dz_stride + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < n_load)


@triton.jit(do_not_specialize=["V", "num_tokens"])
def _chunks(x_ptr, stats_ptr, V, num_tokens, n_load, x_stride, inv_temperature, BLOCK: tl.constexpr):
    """stats (B, 3, C): maximum of a chunk, sum of e^(z - maximum), and that of the columns that may be drawn."""
    row, c, C = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    cols, z = _tempered(x_ptr, row, c, V, n_load, x_stride, inv_temperature, BLOCK)
    z_max = tl.max(z, 0)
    e = tl.exp(z - tl.where(z_max == -float("inf"), 0.0, z_max))
    out = stats_ptr + row * 3 * C + c
    tl.store(out, z_max)
    tl.store(out + C, tl.sum(e, 0))
    tl.store(out + 2 * C, tl.sum(tl.where(cols < num_tokens, e, 0.0), 0))


@triton.jit(do_not_specialize=["V", "num_tokens", "C"])
def _pick(x_ptr, stats_ptr, u_ptr, token_ptr, logp_ptr, V, num_tokens, C, n_load, x_stride, inv_temperature,
          CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    stats = stats_ptr + row * 3 * C + chunks
    maxima = tl.load(stats, mask=chunks < C, other=-float("inf"))
    z_max = tl.max(maxima, 0)
    w = tl.exp(maxima - z_max)
    total = tl.sum(w * tl.load(stats + C, mask=chunks < C, other=0.0), 0)
    mass = (w * tl.load(stats + 2 * C, mask=chunks < C, other=0.0)).to(tl.float64)

    # the first chunk that has mass and whose running mass exceeds the point; should rounding leave none, the last that has mass
    point = tl.load(u_ptr + row) * tl.sum(mass, 0)
    c = tl.min(tl.where((tl.cumsum(mass, 0) > point) & (mass > 0), chunks, CHUNKS), 0)
    c = tl.where(c == CHUNKS, tl.max(tl.where(mass > 0, chunks, 0), 0), c)
    before, own = tl.sum(tl.where(chunks < c, mass, 0.0), 0), tl.sum(tl.where(chunks == c, mass, 0.0), 0)
    share = ((point - before) / own).to(tl.float32)

    cols, z = _tempered(x_ptr, row, c, V, n_load, x_stride, inv_temperature, BLOCK)
    e = tl.exp(z - tl.sum(tl.where(chunks == c, maxima, 0.0), 0))
    e = tl.where(cols < num_tokens, e, 0.0)
    token = tl.min(tl.where((tl.cumsum(e, 0) > share * tl.sum(e, 0)) & (e > 0.0), cols, V), 0)
    token = tl.where(token == V, tl.max(tl.where(e > 0.0, cols, 0), 0), token)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logp_ptr + row, (tl.sum(tl.where(cols == token, z, 0.0), 0) - z_max) - tl.log(total))


@triton.jit
def _tempered(x_ptr, row, c, V, n_load, x_stride, inv_temperature, BLOCK: tl.constexpr):
    cols = c * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_load, other=0.0).to(tl.float32)
    return cols, tl.where(cols < V, x * inv_temperature, -float("inf"))


def stats(x, bias, targets, first, temperature, softcap, z_y, chunk_max, chunk_sum, chunk_dot, save=None):
    """Statistics of one chunk of raw logits x (N, n), columns `first` and up of the vocabulary. Writes z_y where the
    target is in the chunk, chunk_max, chunk_sum, chunk_dot ((N,) fp32 each), and e^(z - max) into save (N, n)."""
    N, n = x.shape
    with torch.cuda.device_of(x):
        _stats[(N,)](x, bias, targets, z_y, chunk_max, chunk_sum, chunk_dot, save,
                     n, _round_up(n), first, x.stride(0), 0 if save is None else save.stride(0),
                     softcap or 1.0, 1.0 / temperature,
                     HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, SAVE=save is not None, **_shape(n))


def dz(x, bias, shift, targets, first, temperature, softcap, lse, base, g_entropy, dz_y, out):
    """out (N, n) = gradient of the raw logits x (N, n); given `shift` = m_c - lse (N,), x holds exponentials."""
    N, n = x.shape
    bias = bias if shift is None else None  # already in the exponentials
    # an upstream gradient may be one expanded number, as that of a sum is
    base, g_entropy = base.contiguous(), None if g_entropy is None else g_entropy.contiguous()
    with torch.cuda.device_of(x):
        _dz[(N,)](x, bias, targets, lse, shift, base, g_entropy, dz_y, out,
                  n, _round_up(n), first, x.stride(0), out.stride(0), softcap or 1.0, 1.0 / temperature,
                  HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
                  HAS_ENTROPY=g_entropy is not None, SAVED=shift is not None, **_shape(n))


def sample(x, u, temperature, num_tokens, chunk):
    """x (B, V) logits, whole vectors of 16 per row (kernels.sample.padded), u (B,) fp64 -> token (B,) int64, logp (B,) fp32."""
    B, V = x.shape
    shape = _shape(min(chunk, V))
    C = -(-V // shape["BLOCK"])
    chunk_stats = torch.empty(B, 3, C, device=x.device)
    token, logp = torch.empty(B, dtype=torch.int64, device=x.device), torch.empty(B, device=x.device)
    with torch.cuda.device_of(x):
        _chunks[(B, C)](x, chunk_stats, V, num_tokens, _round_up(V), x.stride(0), 1.0 / temperature, **shape)
        _pick[(B,)](x, chunk_stats, u, token, logp, V, num_tokens, C, _round_up(V), x.stride(0), 1.0 / temperature,
                    CHUNKS=triton.next_power_of_2(C), **_pick_shape(shape))
    return token, logp


def _pick_shape(shape):
    # a running sum takes more registers than the rest: half as many columns for each thread
    return dict(shape, num_warps=min(2 * shape["num_warps"], 16))


def _round_up(n):
    return -(-n // 16) * 16


def _shape(n):
    # 32 elements per thread, at most 16 warps: the caller keeps n within 16384
    block = max(triton.next_power_of_2(n), 16)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 1), 16)}
