"""Kernels: flat tensors in, flat tensors out. Each has a torch path for any device, Triton for GPUs, and a naive
reference that the tests compare with. `backend="auto"` takes Triton for CUDA tensors, else torch."""
import functools
import importlib.util
import os

import torch

from kernels import reference
from kernels.gae import gae as _gae
from kernels.linear_logprob import LogProb
from kernels.linear_logprob import linear_logprob as _linear_logprob

__all__ = ["LogProb", "gae", "linear_logprob"]

BACKENDS = ("auto", "triton", "torch", "reference")
TRITON_MAX_CHUNK = 16384
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
    gamma    discount; lam: 1 is the Monte Carlo return minus the value, 0 one step of temporal difference

    fp32, or fp64 for fp64 rewards. An episode cut by a limit adds gamma V(next) to its last reward and is done there.
    """
    if rewards.ndim != 2 or values.shape != (rewards.shape[0], rewards.shape[1] + 1) or dones.shape != rewards.shape or dones.dtype != torch.bool:
        raise ValueError(f"expected rewards (B, T), values (B, T + 1), dones (B, T) bool, found {tuple(rewards.shape)}, {tuple(values.shape)}, "
                         f"{tuple(dones.shape)} {dones.dtype}")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma, lam: expected within [0, 1], found {gamma}, {lam}")
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return _gae(rewards.to(dtype), values.to(dtype), dones, gamma, lam)


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
