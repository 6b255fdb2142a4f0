"""Attention of HSTU (arXiv 2402.17152, eq. 3): SiLU in place of the softmax, a bias by position and one by elapsed time.

B rows, T positions, H heads, n a row's length, N >= T the longest row the position table was built for:

    S_ij = q_i . k_j + p[i - j + N - 1] + w[bucket(t_{i+1} - t_j)]         i < n, j <= i; the last t is repeated
    s = 1 / (1 + e^-S)     A = S s     out_i = sum_{j <= i} A_ij v_j       masked after the SiLU; no scale, no 1 / n
    bucket(d) = clamp(floor(ln(max(|d|, 1)) / 0.301), 0, 128)

    backward     dA_ij = dout_i . v_j          dS = dA (s + S s (1 - s))
                 dv_j = sum_i A_ij dout_i      dq_i = sum_j dS_ij k_j      dk_j = sum_i dS_ij q_i
                 dp[N - 1 + c] = sum of the diagonal i - j = c of dS       dw[m] = sum of dS where the bucket is m

Buckets come from 128 integer thresholds, and times are subtracted in int64: fp32 holds unix seconds to 128 s only, and a
logarithm may be rounded to either side of a whole number on another device. An fp32 logarithm guesses the bucket from
below, and one comparison with the next threshold corrects it; a search (torch.bucketize) took 1.5 times as long.

Two paths: torch, here, for short rows and any device, and Triton, kernels/hstu_tiles.py, which never writes S to memory.
Memory of the torch path beyond inputs, outputs and gradients: S of the tiles on and below the diagonal, about
B H T (T + 64) / 2 numbers on the CPU, B H T^2 on a GPU, kept for the backward; and one byte per bucket, B T^2.

The CPU works on tiles of 64 query rows, which leave out most of what lies above the diagonal, times as many batch rows as
make a quarter million scores: smaller tiles drown in the call overhead of some 30 operations each, larger ones leave the
cache. A group of rows is as wide as its longest, so a batch sorted by length takes two thirds of the time of a shuffled one.
"""
import decimal
import functools

import torch

TILE_ROWS = 64        # query rows of a tile on the CPU
TILE_SCORES = 262144  # scores of a tile, heads included
NUM_BUCKETS = 129


@functools.cache
def thresholds():
    """The least d of bucket 1, ..., 128, as ints: in decimal arithmetic of 28 digits, so that no libm has a say."""
    return [int((decimal.Decimal("0.301") * m).exp(decimal.Context(prec=28)).to_integral_value(decimal.ROUND_CEILING)) for m in range(1, NUM_BUCKETS)]


@functools.cache
def next_thresholds(device):
    """(129,) int64: the least d of the bucket after bucket m. The last bucket has none."""
    return torch.tensor([*thresholds(), 2**63 - 1], device=device)


def time_buckets(timestamps):
    """See kernels.time_buckets."""
    B, T = timestamps.shape
    following = torch.cat([timestamps[:, 1:], timestamps[:, -1:]], 1)[:, :, None]  # (B, T, 1)
    upper = next_thresholds(timestamps.device)
    buckets = timestamps.new_zeros((B, T, T), dtype=torch.uint8)  # above the diagonal: never read
    for b, c in _groups(B, T, 1, timestamps.is_cuda, scores=TILE_SCORES // 4):  # int64 temporaries: smaller tiles
        for first, last in _row_blocks(T, timestamps.is_cuda):
            gaps = (following[b:c, first:last] - timestamps[b:c, None, :last]).abs_()
            guess = gaps.float().clamp_(min=1).log_().mul_(1 / 0.301).sub_(0.01).clamp_(0, NUM_BUCKETS - 1).int()
            buckets[b:c, first:last, :last] = guess.add_(gaps >= upper.index_select(0, guess.view(-1)).view_as(guess))
    return buckets


def hstu_attention(q, k, v, lengths, position_bias=None, time_bias=None, timestamps=None, buckets=None, use_triton=False):
    """See kernels.hstu_attention, which checks the arguments and calls this."""
    leaves = q, k, v, position_bias, time_bias
    # decided here: inside a Function grad mode is always off, and a call without gradients would keep its scores
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)
    if use_triton:
        return _Tiles.apply(*leaves, lengths, timestamps) if wants_grad else _tiles().forward(*leaves, lengths, timestamps)
    if time_bias is not None and buckets is None:
        buckets = time_buckets(timestamps)
    return _Short.apply(*leaves, lengths, buckets) if wants_grad else _forward(*leaves, lengths, buckets)


def _tiles():
    from kernels import hstu_tiles  # imports triton
    return hstu_tiles


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args)
        return _tiles().forward(*args)

    @staticmethod
    def backward(ctx, dout):
        _no_second_derivatives()
        return *_tiles().backward(*ctx.saved_tensors, dout), None, None


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        saved = []
        out = _forward(*args, saved)
        ctx.save_for_backward(*args, *saved)
        return out

    @staticmethod
    def backward(ctx, dout):
        _no_second_derivatives()
        args, saved = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        return *_backward(*args, saved, dout), None, None


def _no_second_derivatives():
    if torch.is_grad_enabled():  # once_differentiable would return a constant here, without a word
        raise RuntimeError("hstu_attention has no second derivatives: drop create_graph=True, or call it with backend='reference'")


# -----------------------------------------------------------------------------
# The torch path

def _forward(q, k, v, position_bias, time_bias, lengths, buckets, saved=None):
    """out (B, T, H, dv) in q's dtype; appends the scores (rows * H, queries, keys) of each tile to `saved`."""
    (B, T, H, _), dtype, cuda = q.shape, _compute_dtype(q), q.is_cuda
    p = None if position_bias is None else _by_offset(position_bias.to(dtype), T)
    w = None if time_bias is None else time_bias.to(dtype)
    counts = _counts(lengths)
    out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for b, c in _groups(B, T, H, cuda):
            n, real = _longest(lengths, counts, b, c, T)
            q_, k_, v_ = (_heads(x[b:c, :n], real, dtype) for x in (q, k, v))
            o = torch.empty(*v_.shape, dtype=dtype, device=q.device)
            for first, last in _row_blocks(n, cuda):
                S = torch.empty(c - b, H, last - first, last, dtype=dtype, device=q.device)
                if w is not None:
                    # index_select with int32: indexing by int64, or F.embedding, took three times as long
                    bias = S if H == 1 else torch.empty_like(S[:, :1])  # one bias for all heads
                    torch.index_select(w, 0, buckets[b:c, first:last, :last].int().view(-1), out=bias.view(-1))
                    if p is not None:
                        bias += p[first:last, :last]
                    if H > 1:
                        S.copy_(bias)
                elif p is not None:
                    S.copy_(p[first:last, :last])
                S = S.view(-1, last - first, last)
                torch.baddbmm(S, q_[:, first:last], k_[:, :last].transpose(1, 2), beta=0 if w is None and p is None else 1, out=S)
                A = torch.nn.functional.silu(S, inplace=saved is None).tril_(first)
                o[:, first:last] = torch.bmm(A, v_[:, :last])
                if saved is not None:
                    saved.append(S)
            _put(o, real, out, b, c, n)
    return out


def _backward(q, k, v, position_bias, time_bias, lengths, buckets, saved, dout):
    """Gradients of q, k, v and both tables, each in its tensor's dtype."""
    (B, T, H, _), dtype, cuda = q.shape, _compute_dtype(q), q.is_cuda
    counts, tiles = _counts(lengths), iter(saved)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dp = None if position_bias is None else torch.zeros(T, T, dtype=dtype, device=q.device)
    dw = None if time_bias is None else torch.zeros(NUM_BUCKETS, dtype=torch.float64, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for b, c in _groups(B, T, H, cuda):
            n, real = _longest(lengths, counts, b, c, T)
            # a masked dout alone makes every term of a pad 0; the others are masked against nan
            q_, k_, v_, dout_ = (_heads(x[b:c, :n], real, dtype) for x in (q, k, v, dout))
            dq_, dk_, dv_ = torch.empty_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
            for first, last in _row_blocks(n, cuda):
                S, do = next(tiles), dout_[:, first:last]
                A = torch.nn.functional.silu(S).tril_(first)
                dv_[:, :last] += torch.bmm(A.transpose(1, 2), do)
                dA = torch.bmm(do, v_[:, :last].transpose(1, 2), out=A)
                dS = torch.ops.aten.silu_backward.grad_input(dA, S, grad_input=dA).tril_(first)
                dq_[:, first:last] = torch.bmm(dS, k_[:, :last])
                dk_[:, :last] += torch.bmm(dS.transpose(1, 2), q_[:, first:last])
                if dw is not None or dp is not None:
                    dS = dS if H == 1 else dS.unflatten(0, (-1, H)).sum(1)  # (rows, queries, keys)
                if dw is not None:
                    dw += _bucket_sums(buckets[b:c, first:last, :last], dS)
                if dp is not None:
                    dp[first:last, :last] += dS.sum(0)
            for x, y in ((dq_, dq), (dk_, dk), (dv_, dv)):
                _put(x, None, y, b, c, n)
    if dp is not None:
        dp = _diagonal_sums(dp, len(position_bias)).to(position_bias.dtype)
    return dq, dk, dv, dp, None if dw is None else dw.to(time_bias.dtype)


def _compute_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _counts(lengths):
    return None if lengths.is_cuda else lengths.tolist()  # a GPU would have to wait for the numbers: it works at full width


def _groups(B, T, H, cuda, scores=None):
    """(first, end) of the batch rows that are worked on together."""
    size = max(B, 1) if cuda else max((scores or TILE_SCORES) // max(H * min(T, TILE_ROWS) * T, 1), 1)
    return [(b, min(b + size, B)) for b in range(0, B, size)]


def _row_blocks(n, cuda):
    """(first, end) of the query rows of each tile; it sees the keys up to `end`."""
    size = max(n, 1) if cuda else TILE_ROWS
    return [(first, min(first + size, n)) for first in range(0, n, size)]


def _longest(lengths, counts, b, c, T):
    """(n, real): columns that this group needs, and bool (rows, n), or None where every row fills them."""
    n = T if counts is None else max(counts[b:c])
    if counts is not None and min(counts[b:c]) == n:
        return n, None
    return n, torch.arange(n, device=lengths.device) < lengths[b:c, None]


def _heads(x, real, dtype):
    """(rows, n, H, d) -> (rows * H, n, d), 0 at pads."""
    x = x.to(dtype)
    if real is not None:
        x = torch.where(real[:, :, None, None], x, 0.0)
    return x[:, :, 0] if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)


def _put(x, real, out, b, c, n):
    """Undoes _heads, into rows b to c of out (B, T, H, d): 0 at pads."""
    x = x.unflatten(0, (c - b, -1)).transpose(1, 2)
    out[b:c, :n] = x if real is None else torch.where(real[:, :, None, None], x, 0.0)
    out[b:c, n:] = 0


def _by_offset(p, T):
    """(2N - 1,) -> (T, T): p[i - j + N - 1] at [i, j]."""
    middle = len(p) // 2
    return p[middle - T + 1:middle + T].flip(0).unfold(0, T, 1).flip(0).contiguous()


def _diagonal_sums(x, size):
    """(T, T) -> (size,), the sums over i - j at size // 2 + i - j. Rows of T padded to 2T and read as rows of 2T - 1 slide
    by one, which turns diagonals into columns."""
    T = len(x)
    out = x.new_zeros(size)
    out[size // 2 - T + 1:size // 2 + T] = torch.nn.functional.pad(x.flip(1), (0, T)).view(-1)[:T * (2 * T - 1)].view(T, 2 * T - 1).sum(0)
    return out


def _bucket_sums(buckets, x):
    """(129,) fp64 sums of x by bucket."""
    buckets, x = buckets.reshape(-1), x.reshape(-1)
    if not x.is_cuda:
        # uint8 as it is: int64 took 1.4 times as long, and so did index_add_
        return torch.bincount(buckets, weights=x, minlength=NUM_BUCKETS)
    # there bincount, like scatter_add, adds in an order that changes from run to run
    which = torch.arange(NUM_BUCKETS, dtype=torch.uint8, device=x.device)[:, None]
    pieces = zip(buckets.split(TILE_SCORES), x.split(TILE_SCORES))
    return sum((piece == which).to(x.dtype) @ y for piece, y in pieces).double()
