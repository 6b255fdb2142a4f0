"""Kernels: flat tensors in, flat tensors out. Each has a torch path for any device, Triton for GPUs, and a naive
reference that the tests compare with. `backend="auto"` takes Triton for CUDA tensors, else torch."""
import functools
import importlib.util
import os

import torch

from kernels import reference
from kernels.decode import decode_attention as _decode_attention
from kernels.gae import gae as _gae
from kernels.hstu import hstu_attention as _hstu_attention
from kernels.hstu import time_buckets as _time_buckets
from kernels.linear_logprob import LogProb
from kernels.linear_logprob import linear_logprob as _linear_logprob
from kernels.sample import sample as _sample

__all__ = ["LogProb", "decode_attention", "gae", "hstu_attention", "linear_logprob", "sample", "time_buckets"]

BACKENDS = ("auto", "triton", "torch", "reference")
TRITON_MAX_CHUNK = 16384
HSTU_MAX_SHORT = 512  # up to this T "auto" takes torch on CUDA as well; where the two paths cross has not been measured
HSTU_MAX_HEAD = 128   # a (64, 128) tile of queries, keys or values; wider heads would not fit in registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def linear_logprob(hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None, ignore_index=-100, chunk=8192,
                   save_bytes=None, backend="auto") -> LogProb:
    """Log-probability of each target under softmax(hidden @ weight.T + bias), with entropy and log-sum-exp, and without
    ever holding the (N, V) logits.

    hidden        (N, D) bf16, fp16, fp32 or fp64; its dtype is the compute dtype, whatever autocast says
    weight        (V, D) that dtype, or an fp32 master, which is cast chunk by chunk and gets an fp32 gradient
    targets       (N,) int64, 0 <= target < V, or ignore_index: such rows give 0 and no gradient (and cost as much as
                  others: better pass only the rows that count)
    bias          (V,) that dtype or fp32; -inf masks a column out
    temperature   divides the logits, after the softcap; softcap: logits become softcap * tanh(logits / softcap)
    chunk         columns of the vocabulary worked on at a time (on the CPU at most 2048): N * chunk * 6 bytes
    save_bytes    room for exponentials that spare the backward recomputing logits. None: 1/16 of the GPU's memory; on
                  the CPU 0, except that a vocabulary of one chunk is kept.
    backend       "auto", "triton", "torch" or "reference"

    Returns LogProb(logp, entropy, lse, top1), (N,) each: fp32 (fp64 for fp64 inputs), top1 bool. The first three are
    differentiable in hidden, weight and bias, in any mix. kernels/linear_logprob.py has the formulas.
    """
    _check_linear_logprob(hidden, weight, targets, bias, temperature, softcap, ignore_index, chunk, save_bytes)
    path = _pick(backend, hidden)
    if path == "triton" and min(chunk, len(weight)) > TRITON_MAX_CHUNK:
        raise ValueError(f"chunk: expected at most {TRITON_MAX_CHUNK} (a row must fit in registers), found {chunk}")
    if path == "reference":
        return reference.linear_logprob(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    return _linear_logprob(hidden, weight, targets, bias, temperature, softcap, ignore_index, chunk, save_bytes,
                           use_triton=path == "triton")


def gae(rewards, values, dones, gamma, lam):
    """Generalized advantage estimation (arXiv 1506.02438) -> (advantages, returns), (B, T) each; returns = advantages + values.

    rewards  (B, T) float; r_t is paid for the action at t
    values   (B, T + 1) of the state before each action, and after the last
    dones    (B, T) bool: no value and no advantage crosses from t + 1 to t. A row may hold several episodes, and garbage, even nan,
             after the last done
    gamma    discount; lam: 1 is the Monte Carlo return minus the value, 0 one step of temporal difference; a number, or (B,) one for each row

    fp32, or fp64 for fp64 rewards. An episode cut by a limit adds gamma V(next) to its last reward and is done there.
    """
    if rewards.ndim != 2 or values.shape != (rewards.shape[0], rewards.shape[1] + 1) or dones.shape != rewards.shape or dones.dtype != torch.bool:
        raise ValueError(f"expected rewards (B, T), values (B, T + 1), dones (B, T) bool, found {tuple(rewards.shape)}, {tuple(values.shape)}, "
                         f"{tuple(dones.shape)} {dones.dtype}")
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    if torch.is_tensor(lam):
        if lam.shape != rewards.shape[:1]:
            raise ValueError(f"lam: expected a number or ({rewards.shape[0]},), found {tuple(lam.shape)}")
        lam = lam.to(rewards.device, dtype)
    if not (0 <= gamma <= 1 and bool(((0 <= lam) & (lam <= 1)).all() if torch.is_tensor(lam) else 0 <= lam <= 1)):
        raise ValueError(f"gamma, lam: expected within [0, 1], found {gamma}, {lam}")
    return _gae(rewards.to(dtype), values.to(dtype), dones, gamma, lam)


def hstu_attention(q, k, v, lengths, position_bias=None, time_bias=None, timestamps=None, *, buckets=None, backend="auto"):
    """Attention of HSTU (arXiv 2402.17152, eq. 3): SiLU in place of the softmax, with biases by position and by time.

        out_i = sum_{j <= i} silu(q_i . k_j + position_bias[i - j + N - 1] + time_bias[bucket(t_{i+1} - t_j)]) v_j
        bucket(d) = clamp(floor(ln(max(|d|, 1)) / 0.301), 0, 128)

    The plain sum, (B, T, H, dv) in q's dtype, and 0 at i >= length: the caller divides by its constant maximum length (never by
    the batch's), and folds a 1/sqrt(dqk), if it wants one, into q. Differentiable in q, k, v and both tables.

    q, k           (B, T, H, dqk) bf16, fp16, fp32 or fp64; computed and summed in fp32 (fp64 for fp64). Rows are left-aligned:
    v              (B, T, H, dv)  what stands beyond a row's length may be anything, nan included, and gets gradient 0
    lengths        (B,) int32 or int64, 0 to T
    position_bias  (2N - 1,) with N >= T, shared by heads, in q's dtype or fp32. Entries below N - 1 are never read (j <= i)
    time_bias      (129,) likewise; needs timestamps
    timestamps     (B, T) int64, in any unit. Position i reads t_{i+1}, the time at which item i+1 was asked for; the last
                   column is repeated, so make T at least the longest length + 1
    buckets        time_buckets(timestamps), if a stack of layers made it once; without it every layer makes its own
    backend        "auto", "triton", "torch" or "reference"; "auto" is triton for CUDA with T > 512, else torch
    """
    _check_hstu_attention(q, k, v, lengths, position_bias, time_bias, timestamps, buckets)
    path = _pick(backend, q)
    if path == "reference":
        return reference.hstu_attention(q, k, v, lengths, position_bias, time_bias, timestamps)
    if path == "triton" and backend == "auto" and (q.shape[1] <= HSTU_MAX_SHORT or max(q.shape[3], v.shape[3]) > HSTU_MAX_HEAD):
        path = "torch"
    if path == "triton" and max(q.shape[3], v.shape[3]) > HSTU_MAX_HEAD:
        raise ValueError(f"backend='triton': expected heads of at most {HSTU_MAX_HEAD}, found dqk {q.shape[3]}, dv {v.shape[3]}; "
                         "use backend='torch'")
    return _hstu_attention(q, k, v, lengths, position_bias, time_bias, timestamps, buckets, use_triton=path == "triton")


def time_buckets(timestamps):
    """(B, T, T) uint8: bucket(t_{i+1} - t_j) at [b, i, j <= i], and anything above the diagonal. For hstu_attention's `buckets`:
    make it once per batch, not once per layer. None for CUDA with T > 512, where the kernels make buckets tile by tile.

    timestamps  (B, T) int64
    """
    if timestamps.ndim != 2 or timestamps.dtype != torch.int64:
        raise ValueError(f"timestamps: expected int64 of shape (B, T), found {timestamps.dtype} of {tuple(timestamps.shape)}")
    if timestamps.is_cuda and timestamps.shape[1] > HSTU_MAX_SHORT and _has_triton():
        return None
    return _time_buckets(timestamps)


def sample(logits, u, *, temperature=1.0, num_tokens=None, backend="auto"):
    """-> (token (B,) int64, logp (B,) fp32): the first token whose running mass under softmax(logits / temperature) exceeds u, and its log-probability.

    logits       (B, V) fp32, bf16 or fp16; -inf masks a token out
    u            (B,) fp64 in [0, 1): one number decides, so a sample depends on nothing but its logits and u
    temperature  above 0
    num_tokens   columns from there on pad the vocabulary: never drawn, but part of the distribution that logp speaks of
    backend      "auto", "triton", "torch" or "reference" (torch in fp64). kernels/sample.py says how
    """
    num_tokens = logits.shape[-1] if num_tokens is None else num_tokens
    if logits.ndim != 2 or u.shape != logits.shape[:1] or u.dtype != torch.float64 or u.device != logits.device:
        raise ValueError(f"expected logits (B, V) and u (B,) float64 on one device, found {tuple(logits.shape)} on {logits.device} and {tuple(u.shape)} "
                         f"{u.dtype} on {u.device}")
    if not temperature > 0 or not 0 < num_tokens <= logits.shape[1]:
        raise ValueError(f"expected temperature above 0 and num_tokens of 1 to {logits.shape[1]}, found {temperature} and {num_tokens}")
    path = _pick(backend, logits)
    return _sample(logits.double() if path == "reference" else logits, u, temperature, num_tokens, use_triton=path == "triton")


def decode_attention(q, k_cache, v_cache, lengths, *, splits=None, backend="auto"):
    """Attention of one query per row over the first `lengths` positions of the row's cache: (B, Hq, d) in q's dtype.

    q                 (B, Hq, d) bf16, fp16, fp32 or fp64, contiguous
    k_cache, v_cache  (slots, Hkv, T, d) of q's dtype, with slots >= B: row b is slot b. Hq is a multiple of Hkv; what lies beyond a length may be
                      anything, nan included
    lengths           (B,) int32, 0 to T: of length 0 the result is 0. On the device: the call waits for nothing
    splits            parts of the positions that are worked on apart, for few rows on a GPU; default by the number of rows
    backend           "auto", "triton" (d a power of 2 from 16 to 256, in fp32 to 128; at most 16 query heads for a key head), "torch" or "reference"
    """
    B, Hq, d = q.shape
    if (k_cache.ndim != 4 or v_cache.shape != k_cache.shape or k_cache.shape[0] < B or k_cache.shape[3] != d or Hq % k_cache.shape[1]
            or lengths.shape != (B,) or lengths.dtype != torch.int32):
        raise ValueError(f"expected q (B, Hq, d), caches (slots >= B, Hkv, T, d) with Hq a multiple of Hkv, lengths (B,) int32; found {tuple(q.shape)}, "
                         f"{tuple(k_cache.shape)}, {tuple(v_cache.shape)}, {tuple(lengths.shape)} {lengths.dtype}")
    if k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        raise ValueError(f"expected q and the caches in one dtype, found {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    path, fits = _pick(backend, q), 16 <= d <= 512 // max(q.element_size(), 2) and d & (d - 1) == 0 and Hq // k_cache.shape[1] <= 16
    if path == "triton" and not fits:
        if backend == "triton":
            raise ValueError(f"backend='triton': expected d a power of 2 from 16 to 256 (fp32 128) and at most 16 query heads for a key head, found {d} and "
                             f"{Hq // k_cache.shape[1]}; use backend='torch'")
        path = "torch"
    if path == "triton" and not (q.is_contiguous() and k_cache.stride() == v_cache.stride() and k_cache.stride()[2:] == (d, 1)):
        raise ValueError("expected q contiguous, and both caches with the same strides and contiguous positions")
    if path == "reference":
        q, k_cache, v_cache, dtype = q.double(), k_cache.double(), v_cache.double(), q.dtype
        return _decode_attention(q, k_cache, v_cache, lengths, 1, use_triton=False).to(dtype)
    # 132 processors and a few programs on each: below about 4 x 132 programs of whole rows, rows are split
    splits = splits or max(1, min(16, 528 // max(B * k_cache.shape[1], 1)))
    return _decode_attention(q, k_cache, v_cache, lengths, splits, use_triton=path == "triton")


def _pick(backend, x):
    """The path that runs. fp64 exists for gradcheck and always takes torch."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend == "auto":
        return "triton" if x.is_cuda and x.dtype != torch.float64 and _has_triton() else "torch"
    if backend == "triton":
        if x.dtype == torch.float64:
            raise ValueError("backend='triton' has no float64 kernels: use backend='torch'")
        if not _has_triton():
            raise ValueError("backend='triton': the package triton is not installed; use backend='torch'")
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"backend='triton': expected CUDA tensors, found {x.device}; use backend='auto'")
    return backend


@functools.cache
def _has_triton():
    return importlib.util.find_spec("triton") is not None


def _check_linear_logprob(hidden, weight, targets, bias, temperature, softcap, ignore_index, chunk, save_bytes):
    for name, x in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias)):
        if type(x).__name__ == "DTensor":
            raise ValueError(
                f"{name}: expected a plain tensor, found a DTensor. After fully_shard(model.lm_head) the head is "
                "sharded outside its own forward: drop that line, and fully_shard(model) keeps it whole after the "
                "model's forward.")
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name}: expected on {hidden.device} like hidden, found on {x.device}")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(f"expected hidden (N, D) and weight (V, D), found {tuple(hidden.shape)} and "
                         f"{tuple(weight.shape)}; flatten a batch with hidden.flatten(0, 1)")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden: expected one of {', '.join(map(str, DTYPES))}, found {hidden.dtype}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype not in (hidden.dtype, torch.float32):
            raise ValueError(f"{name}: expected {hidden.dtype} like hidden, or torch.float32, found {x.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({len(weight)},), found {tuple(bias.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets: expected int64 of shape ({len(hidden)},), found {targets.dtype} of "
                         f"{tuple(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected above 0, found {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected None or above 0, found {softcap}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 column, found {chunk}")
    if save_bytes is not None and save_bytes < 0:
        raise ValueError(f"save_bytes: expected None or at least 0, found {save_bytes}")
    if not targets.is_cuda and len(targets) > 0:  # a look at the values would stall a GPU
        low, high = targets.aminmax()
        if low.item() >= 0 and high.item() < len(weight):
            return
        wrong = ((targets < 0) | (targets >= len(weight))) & (targets != ignore_index)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(f"targets[{row}]: expected 0 to {len(weight) - 1}, or ignore_index={ignore_index}, "
                             f"found {targets[row]}")


def _check_hstu_attention(q, k, v, lengths, position_bias, time_bias, timestamps, buckets):
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3] or q.shape[3] == 0 or v.shape[3] == 0:
        raise ValueError(f"expected q, k (B, T, H, dqk) and v (B, T, H, dv), found {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    B, T = q.shape[:2]
    tensors = {"k": k, "v": v, "lengths": lengths, "position_bias": position_bias, "time_bias": time_bias, "timestamps": timestamps,
               "buckets": buckets}
    for name, x in tensors.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} like q, found on {x.device}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"expected q, k, v of one dtype of {', '.join(map(str, DTYPES))}, found {q.dtype}, {k.dtype}, {v.dtype}")
    if lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths: expected int32 or int64 of shape ({B},), found {lengths.dtype} of {tuple(lengths.shape)}")
    for name, x in (("position_bias", position_bias), ("time_bias", time_bias)):
        if x is not None and x.dtype not in (q.dtype, torch.float32):
            raise ValueError(f"{name}: expected {q.dtype} like q, or torch.float32, found {x.dtype}")
    if position_bias is not None and (position_bias.ndim != 1 or len(position_bias) % 2 == 0):
        raise ValueError(f"position_bias: expected shape (2N - 1,), found {tuple(position_bias.shape)}")
    if position_bias is not None and len(position_bias) < 2 * T - 1:
        raise ValueError(f"position_bias: expected at least 2T - 1 = {2 * T - 1} entries for T={T}, found {len(position_bias)}: cut the "
                         "rows, or build the model for longer ones")
    if time_bias is not None and time_bias.shape != (129,):
        raise ValueError(f"time_bias: expected shape (129,), found {tuple(time_bias.shape)}")
    if (time_bias is None) != (timestamps is None):
        given, missing = ("timestamps", "time_bias") if time_bias is None else ("time_bias", "timestamps")
        raise ValueError(f"{given} was given without {missing}: pass both or neither")
    if timestamps is not None and (timestamps.shape != (B, T) or timestamps.dtype != torch.int64):
        raise ValueError(f"timestamps: expected int64 of shape ({B}, {T}), found {timestamps.dtype} of {tuple(timestamps.shape)}")
    if buckets is not None and (timestamps is None or buckets.shape != (B, T, T) or buckets.dtype != torch.uint8):
        raise ValueError(f"buckets: expected time_buckets(timestamps), uint8 of shape ({B}, {T}, {T}), beside timestamps, found "
                         f"{buckets.dtype} of {tuple(buckets.shape)}")
    if not lengths.is_cuda and B > 0:  # a look at the values would stall a GPU
        low, high = lengths.aminmax()
        if low.item() < 0 or high.item() > T:
            raise ValueError(f"lengths: expected 0 to T={T}, found {low.item()} to {high.item()}")
