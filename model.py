"""The decoder Transformer: Llama, Qwen2, Qwen2.5, Qwen3 and SmolLM2 are one model and five settings.

Parameters carry their Hugging Face names (`model.layers.0.self_attn.q_proj.weight`), so that a checkpoint needs no translation table.
Here too: generative recommenders (HSTU, SASRec), scalar heads, LoRA, optimizer groups (AdamW, Muon), DDP and FSDP2 wrapping, FLOPs and memory estimates.

    B sequences   T tokens   D width   H query heads   Hkv key/value heads   K head size   V vocabulary
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from kernels import hstu_attention, time_buckets


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the slow rotations (the released `rope_type: llama3`)."""
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 4096        # what the model was trained for; longer inputs run, and are the caller's risk
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False           # Qwen2, Qwen2.5
    qk_norm: bool = False            # Qwen3
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embeddings turn pairs")


# From-scratch sizes, by name; vocab_size comes from the tokenizer. Parameters without tables: 0.1M, 0.9M, 3.1M, 25M, 0.44B.
SIZES = {
    "nano": dict(hidden_size=64, intermediate_size=192, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=32),
    "tiny": dict(hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32),
    "mini": dict(hidden_size=256, intermediate_size=768, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64),
    "small": dict(hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64),
    "base": dict(hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128),
}


def config_for_size(size, vocab_size, max_positions=4096):
    """A from-scratch config. q/k norm (Qwen3's) keeps small models stable at the high rates they are trained with."""
    if size not in SIZES:
        raise ValueError(f"--size={size} is unknown; the sizes are {', '.join(SIZES)}")
    return ModelConfig(vocab_size=vocab_size, max_positions=max_positions, qk_norm=True, **SIZES[size])


# -----------------------------------------------------------------------------
# Blocks


class Linear(nn.Linear):
    """Computes in the dtype of its input. The weight may be an fp32 master: precision is decided once, where embeddings are cast."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LoRALinear(nn.Module):
    """y = x Wᵀ + (alpha / rank) · x Aᵀ Bᵀ with W frozen (arXiv 2106.09685). B starts at 0, so training starts at the base model."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=torch.float32, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=torch.float32, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return y + self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


def inverse_rms(x, eps):
    """x (..., D) fp32 -> (..., 1), 1 / sqrt(mean x^2 + eps). A vector's norm is one pass over x on CPUs, a mean of squares two; and of a decoding
    step every call counts: rms_norm of (8, 128) takes two thirds of the time that it takes by F.rms_norm."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


class CPUNorm(torch.autograd.Function):
    """weight * F.rms_norm(x) with a gradient of its own: x (..., D) and weight (D,) fp32. With y = x r, r = 1 / sqrt(mean x^2 + eps) and
    h = weight * dL/dz: dL/dx = r (h - y mean(h y)), dL/dweight = sum dL/dz y. On CPUs torch takes RMSNorm and its gradient apart into many more passes
    over memory (LOG.md has what it saves). Fused kernels exist for GPUs alone."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        r = inverse_rms(x, eps)
        ctx.save_for_backward(x, r, weight)                      # x, not y: it is kept by others anyway
        return (x * r).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, r, weight = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        y = x * r
        of_rows = grad * y                                       # the terms of dL/dweight; of_rows @ weight is sum h y
        dx = (grad * weight).sub_(y.mul_((of_rows @ weight)[..., None] / y.shape[-1])).mul_(r) if of_x else None
        return dx, of_rows.flatten(0, -2).sum(0) if of_weight else None, None


def rms_norm(x, weight, eps):
    """x (..., D), weight (..., D): statistics in fp32, as the released models compute them; the scale is applied in the input's dtype."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling():
        if not torch.is_grad_enabled():
            return (x * inverse_rms(x, eps)).mul_(weight)
        if weight.ndim == 1:
            return CPUNorm.apply(x, weight, eps)
    return weight.to(x.dtype) * F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def inverse_frequencies(config):
    """(K/2,) fp32 rotation speeds, radians per position."""
    # the released models' arithmetic, bit by bit: a rounding error here grows with the position, to 1e-3 radians at 10,000
    freqs = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return freqs
    # slow rotations are slowed by `factor`, fast ones kept, those between blended by how many turns fit the original context
    turns = s.original_max_positions / (2 * math.pi / freqs)
    keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return keep * freqs + (1 - keep) * freqs / s.factor


def rotations(angles, dtype):
    """angles (...,K/2) -> cos, sin (...,K) for rotate."""
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """x (...,K); cos, sin: of rotations. Pairs are (i, i + K/2), Hugging Face's layout, not interleaved."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_heads != config.num_kv_heads
        self.q_proj = Linear(config.hidden_size, config.num_heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(config.head_dim, config.norm_eps), RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, cos, sin, mask, cache, layer):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)           # (B, Hkv, T, K)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
        if cache is not None:
            k, v = cache.update(layer, k, v)                                       # (B, Hkv, keys so far, K)
        if isinstance(mask, list):
            return self.o_proj(attend_by_document(q, k, v, mask, self.grouped).view(B, T, -1))
        if isinstance(mask, tuple):
            return self.o_proj(attend_to_prompts(q, k, v, *mask, self.grouped)[None])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


MIN_LENGTH = 128        # mean length of documents from which a call for each is cheaper than a mask over rows


def document_lengths(doc_ids):
    """doc_ids (B,T) -> lengths of the documents in the order of the flattened tokens; a document ends with its row."""
    starts = torch.ones_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return torch.diff(starts.flatten().nonzero()[:, 0], append=torch.tensor([doc_ids.numel()])).tolist()


def attend_by_document(q, k, v, lengths, grouped):
    """Causal attention within each document. q, k, v (B,H,T,K); lengths: of the documents, in the order of the flattened (B, T) tokens.
    -> (B * T, H * K)

    A mask over whole rows computes T^2 scores and throws most away: on a CPU, rows of 1,536 with documents of 700 tokens on average took 1.8
    times as long (`tiny`, forward and backward). Split and cat are one copy each; slices would write a full-size gradient for every document.
    """
    parts = (x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v))                   # (n, H, K) each
    outs = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv), is_causal=True, enable_gqa=grouped)[0].transpose(0, 1)
            for qkv in zip(*parts)]
    return torch.cat(outs).flatten(1)


class Prompts(NamedTuple):
    """In place of doc_ids, for a single row (1, P * W + R * A): P prompts of W slots, then R answers of A slots, which see their prompt and themselves.

    What several answers go on from is computed once; each stands at the left of its slots. Positions of an answer begin where its prompt ends.
    """
    width: int                 # W
    lengths: torch.Tensor      # (P,) int64: tokens of each prompt
    owner: torch.Tensor        # (R,) int64: prompt of each answer

    def to(self, device, **options):
        return Prompts(self.width, self.lengths.to(device, **options), self.owner.to(device, **options))

    def mask(self, num_slots):
        """-> (R, 1, A, W + A) bool: the keys that each slot of an answer sees."""
        R, W, device = len(self.owner), self.width, self.owner.device
        A = (num_slots - len(self.lengths) * W) // R
        of_prompt = torch.arange(W, device=device) < self.lengths[self.owner, None]                # (R, W)
        of_answer = torch.ones(A, A, dtype=torch.bool, device=device).tril()
        return torch.cat([of_prompt[:, None].expand(R, A, W), of_answer.expand(R, A, A)], dim=2)[:, None]


def attend_to_prompts(q, k, v, prompts, mask, grouped):
    """q, k, v (1,H,T,K) of T = P * W + R * A slots; prompts, mask: see Prompts. -> (T, H * K)"""
    P, R = len(prompts.lengths), len(prompts.owner)
    sizes = [P * prompts.width, q.shape[2] - P * prompts.width]                    # split, whose gradient is one cat: slices would write zeros for each

    def split(x):                                                                  # -> (P, H, W, K), (R, H, A, K)
        x = x.squeeze(0).transpose(0, 1)
        return (part.unflatten(0, (n, -1)).transpose(1, 2) for part, n in zip(x.split(sizes), (P, R)))
    (q_prompt, q), (k_prompt, k), (v_prompt, v) = split(q), split(k), split(v)
    y_prompt = F.scaled_dot_product_attention(q_prompt, k_prompt, v_prompt, is_causal=True, enable_gqa=grouped)
    # of the two ways to index, the one whose gradient adds up in one order: indexing does on CUDA, index_select on threads of a CPU
    of_owner = (lambda x: x[prompts.owner]) if q.is_cuda else (lambda x: x.index_select(0, prompts.owner))
    k, v = torch.cat([of_owner(k_prompt), k], dim=2), torch.cat([of_owner(v_prompt), v], dim=2)
    if grouped and q.is_cuda:                                                      # kernels that take a mask take no groups of heads
        k, v, grouped = *(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)), False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in (y_prompt, y)]).flatten(1)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache, layer):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """The part that Hugging Face calls `model`: embeddings, blocks, final norm."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Transformer(nn.Module):
    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.recompute_activations = False          # activation checkpointing: trades a second forward for most of the memory
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def init_weights(self, seed):
        """From scratch: variance 1/fan-in, residual outputs at 0 so that every block starts as the identity, small embeddings."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            with torch.no_grad():
                if p.ndim < 2:
                    p.fill_(0.0 if name.endswith("bias") else 1.0)
                elif name.endswith(("o_proj.weight", "down_proj.weight")):
                    p.zero_()
                else:
                    std = 0.02 if "embed_tokens" in name or "lm_head" in name else p.shape[1] ** -0.5
                    p.copy_(torch.randn(p.shape, generator=generator) * std)
        return self

    def forward(self, ids, positions=None, doc_ids=None, cache=None):
        """-> hidden (B,T,D) in compute_dtype, after the final norm.

        ids (B,T) int64. positions (B,T) int64, default 0..T-1. doc_ids (B,T): tokens see only earlier tokens of their own document, whose
        tokens are neighbours; None is one document per row. With a cache (engine.py), keys and values of earlier calls are seen too, by position.
        """
        B, T = ids.shape
        if positions is None:
            positions = torch.arange(T, device=ids.device).expand(B, T)
        angles = positions[:, None, :, None].float() * self.inv_freq                        # (B, 1, T, K/2)
        cos, sin = rotations(angles, self.compute_dtype)                                    # (B, 1, T, K)
        mask = None                                                                         # None means causal
        if cache is not None:
            mask = cache.mask(positions)                                                    # (B, 1, T, keys), 0 or -inf
        elif isinstance(doc_ids, Prompts):
            mask = doc_ids, doc_ids.mask(T)
        elif doc_ids is not None:
            lengths = document_lengths(doc_ids) if doc_ids.device.type == "cpu" and not torch.compiler.is_compiling() else []
            if 0 < len(lengths) <= B * T // MIN_LENGTH:
                mask = lengths
            else:
                mask = (doc_ids[:, :, None] == doc_ids[:, None, :]).tril()[:, None]         # (B, 1, T, T) bool
        x = self.model.embed_tokens(ids).to(self.compute_dtype)
        for i, block in enumerate(self.model.layers):
            if self.recompute_activations and torch.is_grad_enabled():
                x = recompute(block, x, cos, sin, mask, cache, i, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, i)
        return self.model.norm(x)

    def logits(self, ids):
        """-> (B,T,V) fp32. For looking at and for tests: training goes through kernels.linear_logprob and never makes them."""
        return F.linear(self(ids).float(), self.lm_head.weight.float())


class ScalarHead(nn.Module):
    """hidden (..., D) -> (...) fp32: a value, a reward, or a logit. Starts at exactly 0."""

    def __init__(self, hidden_size):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(hidden_size)), nn.Parameter(torch.zeros(()))

    def forward(self, hidden):
        return hidden.float() @ self.weight + self.bias


# -----------------------------------------------------------------------------
# Generative recommenders: the next item of a user's history, by HSTU (arXiv 2402.17152) or SASRec (1808.09781)
#
#     B users   T events   I items (1..I; 0 is padding)   D width   N decisions   M members of an ensemble   F width of a head's item table


@dataclass(frozen=True)
class RecommenderConfig:
    num_items: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int                    # of queries and keys
    value_dim: int                   # of values; SASRec: head_dim
    max_length: int                  # longest history, in events
    backbone: str = "hstu"           # hstu | sasrec
    intermediate_size: int = 50      # sasrec: width of its feed-forward layer
    dropout: float = 0.2
    temperature: float = 0.05        # logit = cosine / temperature
    num_heads_reward: int = 5        # members of the reward and value ensembles
    head_width: int = 16             # F
    reward_bins: int = 0             # > 0: past rewards are read too, in so many bins
    reward_low: float = 0.0          # of the training rewards: where the bins begin,
    reward_high: float = 1.0         # and end

    def __post_init__(self):
        if self.backbone not in ("hstu", "sasrec"):
            raise ValueError(f"backbone: expected hstu or sasrec, found {self.backbone!r}")
        if self.backbone == "sasrec" and self.num_heads * self.head_dim != self.hidden_size:
            raise ValueError(f"sasrec: num_heads ({self.num_heads}) times head_dim ({self.head_dim}) must be hidden_size ({self.hidden_size})")


# The published shapes by name (repository of 2402.17152), and one for CPUs.
RECOMMENDER_SIZES = {
    "tiny": dict(hidden_size=32, num_layers=2, num_heads=1, head_dim=32, value_dim=32),
    "ml-1m": dict(hidden_size=50, num_layers=2, num_heads=1, head_dim=50, value_dim=50),
    "ml-1m-large": dict(hidden_size=50, num_layers=8, num_heads=2, head_dim=25, value_dim=25),
    "ml-20m-large": dict(hidden_size=256, num_layers=16, num_heads=8, head_dim=32, value_dim=32),
    "books-large": dict(hidden_size=64, num_layers=16, num_heads=8, head_dim=8, value_dim=8),
}


class HSTUBlock(nn.Module):
    """u, v, q, k = split(SiLU(LN(x) W)); y = x + W_o dropout(LN(A v) * u), A_ij = SiLU(q_i.k_j + position and time bias) / length for j <= i:
    2402.17152, eq. 2 to 4. LayerNorm without parameters, no 1/sqrt(K); the length is a constant, never that of a batch."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.sizes, self.dropout, self.length = c.num_heads, (c.value_dim, c.value_dim, c.head_dim, c.head_dim), c.dropout, c.max_length + 1
        self.uvqk = Linear(c.hidden_size, c.num_heads * sum(self.sizes), bias=False)
        self.o = Linear(c.num_heads * c.value_dim, c.hidden_size)
        self.position_bias = nn.Parameter(torch.empty(2 * self.length - 1))         # by i - j + length - 1
        self.time_bias = nn.Parameter(torch.empty(129))                             # by bucket of the time from j to what follows i

    def init_weights(self, generator):
        for p in (self.uvqk.weight, self.position_bias, self.time_bias):
            nn.init.normal_(p, std=0.02, generator=generator)
        nn.init.xavier_uniform_(self.o.weight, generator=generator)
        nn.init.zeros_(self.o.bias)

    def forward(self, x, lengths, times, buckets):
        B, T, D = x.shape
        x_norm = F.layer_norm(x, (D,), eps=1e-6)
        u, v, q, k = F.silu(self.uvqk(x_norm)).split([self.heads * size for size in self.sizes], dim=-1)
        q, k, v = (t.view(B, T, self.heads, -1) for t in (q, k, v))
        attended = hstu_attention(q, k, v, lengths, self.position_bias, self.time_bias, times, buckets=buckets).flatten(2) / self.length
        return x + self.o(F.dropout(F.layer_norm(attended, attended.shape[-1:], eps=1e-6) * u, self.dropout, self.training))


class SASRecBlock(nn.Module):
    """q = LN(x); x = q + attention(q, x, x); x = LN(x); x = x + W_2 dropout(ReLU(W_1 x)): keys and values are not normalised and residuals start
    at the normalised side, as in the public implementations."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.dropout = c.num_heads, c.dropout
        self.attention_norm, self.norm = nn.LayerNorm(c.hidden_size, eps=1e-8), nn.LayerNorm(c.hidden_size, eps=1e-8)
        self.q, self.k, self.v, self.o = (Linear(c.hidden_size, c.hidden_size) for _ in range(4))
        self.up, self.down = Linear(c.hidden_size, c.intermediate_size), Linear(c.intermediate_size, c.hidden_size)

    def init_weights(self, generator):
        for layer in (self.q, self.k, self.v, self.o, self.up, self.down):
            nn.init.xavier_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x, *_):
        B, T, _ = x.shape
        normed = self.attention_norm(x)
        q, k, v = (layer(y).view(B, T, self.heads, -1).transpose(1, 2) for layer, y in ((self.q, normed), (self.k, x), (self.v, x)))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        x = self.norm(normed + self.o(attended.transpose(1, 2).flatten(2)))
        hidden = F.dropout(F.relu(self.up(x)), self.dropout, self.training)
        return x + F.dropout(self.down(hidden), self.dropout, self.training)


class RewardHead(nn.Module):
    """M models of the reward of item a in a state h: rhat(h, a) = g + b_a + w.h + (M h).f_a. The whole catalogue costs one product of width M F."""

    def __init__(self, members, num_items, hidden_size, width):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(members))                              # g
        self.item_bias = nn.Parameter(torch.zeros(members, num_items))              # b
        self.state = nn.Parameter(torch.zeros(members, hidden_size))                # w
        self.project = nn.Parameter(torch.empty(members, hidden_size, width))       # M
        self.item = nn.Parameter(torch.empty(members, num_items, width))            # f

    def init_weights(self, generator):
        nn.init.normal_(self.project, std=self.project.shape[1] ** -0.5, generator=generator)
        nn.init.normal_(self.item, std=0.02, generator=generator)

    def at(self, h, items):
        """h (N, D), items (N,) 1..I -> (M, N): each member's reward of one item."""
        taste = torch.einsum("nd,mdf->mnf", h, self.project)
        return self.mean[:, None] + self.item_bias[:, items - 1] + self.state @ h.t() + (taste * self.item[:, items - 1]).sum(-1)

    def catalogue(self, h):
        """h (N, D) -> (N, I): the mean over members, without holding each."""
        taste = torch.einsum("nd,mdf->nmf", h, self.project).flatten(1)
        return (self.mean.mean() + h @ self.state.mean(0))[:, None] + self.item_bias.mean(0) + taste @ self.item.transpose(0, 1).flatten(1).t() / len(self.mean)


class ValueHead(nn.Module):
    """M models of what a state is worth: two layers, h (N, D) -> (M, N)."""

    def __init__(self, members, hidden_size, width=64):
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.empty(members, hidden_size, width)), nn.Parameter(torch.zeros(members, 1, width))
        self.down, self.mean = nn.Parameter(torch.zeros(members, width)), nn.Parameter(torch.zeros(members))

    def init_weights(self, generator):
        nn.init.normal_(self.up, std=self.up.shape[1] ** -0.5, generator=generator)

    def forward(self, h):
        return torch.einsum("mnk,mk->mn", F.silu(torch.matmul(h, self.up) + self.up_bias), self.down) + self.mean[:, None]


class Recommender(nn.Module):
    """Histories in, a state per event out; the next item's logits are cosines of state and item over a temperature."""

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        c = self.config = config
        self.compute_dtype = compute_dtype
        self.items = nn.Embedding(c.num_items + 1, c.hidden_size, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(c.max_length + 1, c.hidden_size))
        if c.reward_bins:
            self.past_rewards = nn.Embedding(c.reward_bins + 1, c.hidden_size)          # the first: a reward that is not known
        self.layers = nn.ModuleList((HSTUBlock if c.backbone == "hstu" else SASRecBlock)(c) for _ in range(c.num_layers))
        self.reward = RewardHead(c.num_heads_reward, c.num_items, c.hidden_size, c.head_width)
        self.value = ValueHead(c.num_heads_reward, c.hidden_size)

    def init_weights(self, seed):
        generator = torch.Generator().manual_seed(seed)
        std = self.config.hidden_size ** -0.5
        with torch.no_grad():
            nn.init.trunc_normal_(self.items.weight, std=0.02, a=-0.04, b=0.04, generator=generator)
            self.items.weight[0] = 0
            nn.init.trunc_normal_(self.positions, std=std, a=-2 * std, b=2 * std, generator=generator)
            if self.config.reward_bins:
                nn.init.trunc_normal_(self.past_rewards.weight, std=0.02, a=-0.04, b=0.04, generator=generator)
            for part in (*self.layers, self.reward, self.value):
                part.init_weights(generator)
        return self

    def forward(self, items, lengths, times, past_rewards=None):
        """-> (B, T, D) in compute_dtype: column j is the state after event j, before the next item is known.

        items (B, T) int64, left-aligned, 0 from lengths on. lengths (B,). times (B, T) int64 seconds; where HSTU is asked what follows the last event,
        the column after it holds the time of the request. past_rewards (B, T) of the items, nan where not known; read where the config has reward_bins.
        """
        c = self.config
        if items.shape[1] > c.max_length + 1:
            raise ValueError(f"histories of {items.shape[1]} columns, expected at most max_length + 1 = {c.max_length + 1}")
        x = self.items(items) * c.hidden_size ** 0.5 + self.positions[:items.shape[1]]
        if c.reward_bins:
            share = (past_rewards - c.reward_low) / max(c.reward_high - c.reward_low, 1e-12)
            bins = (share * c.reward_bins).nan_to_num(0.0).long().clamp(0, c.reward_bins - 1)
            x = x + self.past_rewards(torch.where(past_rewards.isnan(), 0, bins + 1))
        x = F.dropout(x, c.dropout, self.training) * (items != 0)[..., None]
        x = x.to(self.compute_dtype)
        buckets = time_buckets(times) if c.backbone == "hstu" else None          # one for all layers
        for layer in self.layers:
            x = layer(x, lengths, times, buckets)
        return x

    def users(self, hidden):
        """hidden (N, D) -> unit vectors (N, D), fp32 (fp64 of an fp64 model)."""
        return F.normalize(hidden.to(self.items.weight.dtype), dim=-1, eps=1e-6)

    def catalogue(self):
        """-> (I, D) unit vectors of items 1..I, fp32."""
        return F.normalize(self.items.weight[1:], dim=-1, eps=1e-6)

    def logits(self, hidden):
        """hidden (N, D) -> (N, I) of the same dtype."""
        return self.users(hidden) @ self.catalogue().t() / self.config.temperature

    def judged(self, hidden):
        """What the heads read: the state, normalised without parameters, (N, D) fp32."""
        return F.layer_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)


# -----------------------------------------------------------------------------
# LoRA: every linear layer of the blocks


def add_lora(model, rank, alpha, seed=0):
    """Freezes the model and gives each block's linear layers an A and a B. Names of the base weights stay as they were."""
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, found {rank}")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, Linear):
                        setattr(parent, name, LoRALinear(child, rank, alpha))
    return model


@contextmanager
def lora_scaled(model, scale):
    """Inside, the adapter counts `scale` (alpha / rank) times; None: as it does. Without LoRA, nothing."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = layer.scale if scale is None else scale
        yield model
    finally:
        for layer, before in zip(layers, scales):
            layer.scale = before


def lora_off(model):
    """Inside, the model computes what it did before add_lora: the reference of a LoRA run needs no second copy."""
    return lora_scaled(model, 0.0)


def merged_state_dict(state_dict, scale):
    """Full-size tensors by name with W + scale·BA in place of (W, A, B): what a LoRA model exports. scale = alpha / rank."""
    merged = {}
    for name, tensor in state_dict.items():
        if name.endswith(("lora_A", "lora_B")):
            continue
        stem = name.removesuffix("weight")
        if stem + "lora_A" in state_dict:
            update = state_dict[stem + "lora_B"].double() @ state_dict[stem + "lora_A"].double()
            tensor = (tensor.double() + scale * update).to(tensor.dtype)
        merged[name] = tensor
    return merged


# -----------------------------------------------------------------------------
# Optimizers and processes


class Muon(torch.optim.Muon):
    """torch.optim.Muon whose Newton-Schulz iteration runs in fp32 on CPUs, over all matrices of one shape at once.

    torch's runs in bf16, one matrix at a time; CPUs without bf16 units emulate it: 177 against 60 ms a step for `tiny`, whose forward and
    backward take 300. Same state, same update up to bf16 rounding; on GPUs and for shards it is torch's own.
    """

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        if closure or any(p.device.type != "cpu" or hasattr(p, "full_tensor") for p in params):
            return super().step(closure)
        for group in self.param_groups:
            by_shape = {}
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum_buffer"], group["momentum"]) if group["nesterov"] else state["momentum_buffer"]
                by_shape.setdefault(p.shape, []).append((p, update))
            for (rows, columns), pairs in by_shape.items():
                x = torch.stack([update for _, update in pairs])                   # (matrices, rows, columns)
                x = x.mT if rows > columns else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
                a, b, c = group["ns_coefficients"]
                for _ in range(group["ns_steps"]):
                    gram = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                x = x.mT if rows > columns else x
                lr = group["lr"] * max(1, rows / columns) ** 0.5                   # torch's adjust_lr_fn="original"
                for (p, _), update in zip(pairs, x):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-lr)


def make_optimizers(model, lr, muon_lr=0.0, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """-> list of optimizers; each group remembers `initial_lr` for the schedule.

    muon_lr > 0 gives the blocks' matrices to Muon (its update has unit scale, so its rate is about ten times AdamW's) and the rest,
    embeddings, head, norms and biases, to AdamW. Weight decay touches matrices only.

    Under FSDP, Muon's Newton-Schulz iteration runs in bfloat16 and sums its products in another order: the update equals the unsharded one to
    bfloat16 rounding (about 2 % of its norm), AdamW's to that of fp32.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "layers." in n]
    tables = [p for n, p in named if p.ndim == 2 and "layers." not in n]
    vectors = [p for n, p in named if p.ndim != 2]
    on_muon = matrices if muon_lr > 0 else []
    groups = [dict(params=tables + ([] if on_muon else matrices), weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
    sharded = any(hasattr(p, "full_tensor") for _, p in named)
    groups = [g for g in groups if g["params"]]                                    # LoRA has no tables, and with Muon no group at all
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=not sharded)] if groups else []
    if on_muon:
        optimizers.append(Muon(on_muon, lr=muon_lr, weight_decay=weight_decay, momentum=0.95))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def parallelize(model, parallel, device, world_size):
    """-> the module whose forward to call. parallel: ddp | fsdp. One process needs neither. model.compute_dtype is final by now.

    fsdp shards in place (FSDP2): blocks one by one, embeddings, final norm and head in the root group, whose weights stay whole between
    forward and backward, because linear_logprob uses lm_head.weight outside of forward.
    """
    if world_size == 1:
        return model
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device.type, (world_size,))
    # blocks are gathered in the compute dtype: the copies that Linear would make live until the backward, whole, and undo the sharding
    precision = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def set_gradient_sync(wrapped, sync):
    """Gradients cross ranks once per step, with the last micro-batch."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        wrapped.require_backward_grad_sync = sync
    elif hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(sync)


def clip_grad_norm(model, max_norm):
    """-> the global norm before clipping, as a float-like tensor; also right for sharded parameters."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# -----------------------------------------------------------------------------
# Sizes


def num_params(model):
    return sum(p.numel() for p in model.parameters())


def flops_per_token(config, seq_len):
    """Training FLOPs per token, forward and backward: 6 per weight of a matrix product, and attention over half of seq_len on average.

    Recomputation is not counted (it is no progress), embeddings are looked up, not multiplied.
    """
    D, K, c = config.hidden_size, config.head_dim, config
    block = D * K * (2 * c.num_heads + 2 * c.num_kv_heads) + 3 * D * c.intermediate_size
    attention = 2 * c.num_heads * K * seq_len / 2                                  # q·k and p·v, causal half
    return 6 * (c.num_layers * (block + attention) + D * c.vocab_size)


def memory_estimate(config, device_batch_size, seq_len, *, trainable_share=1.0, muon=False, shards=1, recompute_activations=False,
                    compute_bytes=4, head_chunk=8192):
    """Bytes per rank: {weights, gradients, optimizer, activations, total}. An estimate, within about 30 %: allocators round, kernels borrow."""
    D, c = config.hidden_size, config
    tables = c.vocab_size * D * (1 if c.tie_embeddings else 2)
    matrices = c.num_layers * (D * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) + 3 * D * c.intermediate_size)
    weights = 4 * (tables + matrices)                                              # fp32 masters
    tokens = device_batch_size * seq_len
    # what one block keeps for its backward, bytes per token: two norms (fp32 in, in low precision also normalized, then scaled), rotated q and k,
    # v and the output of attention, q/k norm, and four vectors of the MLP
    heads = c.head_dim * (c.num_heads + c.num_kv_heads)
    normalized = compute_bytes if compute_bytes < 4 else 0
    per_block = (2 * D * (4 + normalized + compute_bytes) + 2 * heads * compute_bytes + (heads * (4 + normalized) if c.qk_norm else 0)
                 + 4 * c.intermediate_size * compute_bytes)
    blocks = D * compute_bytes * c.num_layers + per_block if recompute_activations else per_block * c.num_layers
    casts = compute_bytes * matrices if compute_bytes < 4 else 0                   # low-precision copies of the matrices, kept alike
    casts //= c.num_layers if recompute_activations or shards > 1 else 1
    head = tokens * min(head_chunk, c.vocab_size) * (4 + compute_bytes)
    moments = 8 * tables + (4 if muon else 8) * matrices                           # Muon keeps one buffer, AdamW two
    estimate = dict(weights=weights // shards, gradients=int(weights * trainable_share) // shards,
                    optimizer=int(moments * trainable_share) // shards, activations=tokens * blocks + casts + head)
    return estimate | dict(total=sum(estimate.values()))
