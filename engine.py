"""Batched generation with a KV cache: token ids in, sampled token ids and their log-probabilities out.

Slots, not pages: the cache is one tensor per layer with a row per running sample. A prompt is computed once and its keys and values are
copied to the rows of its samples. Rows have their own lengths, so prompts are never padded on the left. Freed rows are refilled.

What a sample becomes depends on (seed of its prompt, sample index, position) and the weights, never on its neighbours or its row.
"""
import functools
import math
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

import kernels
from common import progress, random_key
from model import LoRALinear, rms_norm, rotate, rotations

MANY_ROWS = 64          # queries of a decoding step from which, on CPUs, plain products beat the attention kernel: 0.8 against 1.2 ms at 256
ROOM = 64               # positions beyond the prompts that a cache on a CPU starts with


@dataclass
class Rollout:
    """Everything after the prompt. ids: sampled tokens (the stop token included) and, between turns, tokens that tools appended.
    logps: log-probability of each id at the sampling temperature, full distribution; 0 where not sampled. mask: 1 where sampled.
    finish_reason: "stop" (a stop id was sampled), "length" (max_new_tokens was reached) or "tool_timeout" (a call outlasted its limit)."""
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""


class Cache:
    """Keys and values (layers, slots, Hkv, positions, K). A forward call works on `rows`, a LongTensor of slots or a slice of them.
    Zeros, not garbage: what is masked is multiplied by 0, and garbage may be nan."""

    def __init__(self, model, num_slots, num_positions):
        c, p = model.config, model.lm_head.weight
        shape = (c.num_layers, num_slots, c.num_kv_heads, num_positions, c.head_dim)
        self.k = torch.zeros(shape, dtype=model.compute_dtype, device=p.device)
        self.v = torch.zeros(shape, dtype=model.compute_dtype, device=p.device)
        self.rows, self.used, self.index = None, 0, None
        self.cos, self.sin = rotations(torch.arange(num_positions, device=p.device)[:, None].float() * model.inv_freq, model.compute_dtype)

    def grow(self, model, num_positions):
        old, length = (self.k, self.v), self.k.shape[3]
        self.__init__(model, self.k.shape[1], num_positions)
        self.k[:, :, :, :length], self.v[:, :, :, :length] = old

    def mask(self, positions):
        """(B,1,T,keys) 0 or -inf: a query sees keys at its own position and before. Called once per forward, before update."""
        rows = torch.arange(self.k.shape[1], device=self.k.device)[self.rows]
        self.index = (rows[:, None], slice(None), positions)
        later = torch.arange(self.used, device=positions.device) > positions[..., None]
        return torch.zeros(later.shape, dtype=self.k.dtype, device=later.device).masked_fill_(later, -math.inf)[:, None]

    def update(self, layer, k, v):
        """Writes k, v (B,Hkv,T,K) at their positions; -> all keys and values of the rows up to `used`."""
        self.k[layer][self.index] = k.transpose(1, 2)               # advanced indices around a slice put (B,T) in front
        self.v[layer][self.index] = v.transpose(1, 2)
        return self.k[layer][self.rows, :, :self.used], self.v[layer][self.rows, :, :self.used]

    def copy_row(self, source, targets, length):
        for t in (self.k, self.v):
            t[:, targets, :, :length] = t[:, source:source + 1, :, :length]


def decoder_weights(model):
    """What decode needs, made once for many steps: products that share an input joined to one, LoRA merged, (in, out) as a product of few rows
    reads fastest on a CPU, all in the compute dtype. A second copy of the blocks' matrices, for as long as it is held.
    -> (blocks, head), or None for LoRA in low precision: merged and rounded, a small update would vanish."""
    def of(*layers):
        weights = [x.weight + x.scale * x.lora_B @ x.lora_A if isinstance(x, LoRALinear) and x.scale else x.weight for x in layers]
        biases = [x.bias for x in layers if x.bias is not None]
        return torch.cat([w.to(model.compute_dtype).t() for w in weights], dim=1).contiguous(), torch.cat(biases).to(model.compute_dtype) if biases else None
    if model.compute_dtype.itemsize < 4 and any(isinstance(m, LoRALinear) and m.scale for m in model.modules()):
        return None
    blocks = []
    for block in model.model.layers:
        a, mlp = block.self_attn, block.mlp
        norms = [a.q_norm.weight.expand(model.config.num_heads, -1), a.k_norm.weight.expand(model.config.num_kv_heads, -1)] if model.config.qk_norm else []
        blocks.append((block.input_layernorm.weight, of(a.q_proj, a.k_proj, a.v_proj), torch.cat(norms) if norms else None, of(a.o_proj),
                       block.post_attention_layernorm.weight, of(mlp.gate_proj, mlp.up_proj), of(mlp.down_proj)))
    return blocks, model.lm_head.weight.to(model.compute_dtype)


def decode(model, weights, cache, new_ids, lengths):
    """extend for one id in each of the first B rows: Transformer.forward in half the calls, since a step of a small batch is all overhead.
    new_ids, lengths: lists, or int64 (B,) on the device: then nothing waits for the host. weights: decoder_weights(model). Has no gradient.
    -> logits (B,V) fp32"""
    c, B, device = model.config, len(new_ids), model.lm_head.weight.device
    H, Hkv, eps, on_host = c.num_heads, c.num_kv_heads, c.norm_eps, isinstance(lengths, list)
    ids, ends = (torch.as_tensor(x, device=device) for x in (new_ids, lengths))
    positions = ends.clamp(max=cache.k.shape[3] - 1)
    many, size = device.type == "cpu" and B * H >= MANY_ROWS, cache.k.shape[3]
    cache.rows, cache.used = slice(0, B), min(max(lengths) + 1, size) if on_host else size
    if many and size <= 2 * cache.used:                 # many small products: memory streams through without gaps three times as fast, so read all of it
        cache.used = size
    cos, sin = cache.cos[positions, None], cache.sin[positions, None]                                       # (B, 1, K)
    mask = cache.mask(positions[:, None]) if on_host and min(lengths) + 1 < cache.used else None  # of one length: all see all
    product = lambda x, weight, bias: x @ weight if bias is None else torch.addmm(bias, x, weight)
    at = ((torch.arange(B, device=device)[:, None] * Hkv + torch.arange(Hkv, device=device)) * cache.k.shape[3] + positions[:, None]).flatten()
    x, (blocks, head) = model.model.embed_tokens(ids).to(model.compute_dtype), weights
    for (norm, qkv, qk_norm, o, mlp_norm, gate_up, down), all_k, all_v in zip(blocks, cache.k, cache.v):
        qk, v = product(rms_norm(x, norm, eps), *qkv).view(B, H + 2 * Hkv, c.head_dim).split([H + Hkv, Hkv], dim=1)
        qk = rotate(qk if qk_norm is None else rms_norm(qk, qk_norm, eps), cos, sin)
        for all_rows, new in ((all_k, qk[:, H:]), (all_v, v)):
            all_rows.view(-1, c.head_dim).index_copy_(0, at, new.reshape(-1, c.head_dim))
        if not on_host:
            y = kernels.decode_attention(qk[:, :H].contiguous(), all_k, all_v, (positions + 1).int())
        else:
            k, v = all_k[:B, :, :cache.used], all_v[:B, :, :cache.used]                                     # (B, Hkv, keys, K)
            q = qk[:, :H].reshape(B, Hkv, H // Hkv, c.head_dim)                                             # heads of one key are rows of one product
            if many:
                scores = (q * c.head_dim ** -0.5) @ k.mT
                y = (scores if mask is None else scores.add_(mask)).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + product(y.reshape(B, -1), *o)
        gate, up = product(rms_norm(x, mlp_norm, eps), *gate_up).chunk(2, dim=-1)
        x = x + product(F.silu(gate).mul_(up), *down)
    return head_logits(model.model.norm(x), head)


@functools.cache
def capture_stream(device):
    return torch.cuda.Stream(device)                                        # one for all: each stream keeps a workspace of cuBLAS for good


class Window:
    """Several steps of decoding and sampling with one look of the host at their end; on CUDA a step is a graph that is captured once for a number of
    rows. Ids beyond a sample's end are computed, too, and dropped by whoever reads the window: what they wrote to the cache lies beyond that end."""

    def __init__(self, model, weights, cache, num_rows, num_steps, temperature, top_p, num_tokens, pool=None):
        device = model.lm_head.weight.device
        self.model, self.weights, self.cache, self.sampling = model, weights, cache, (temperature, top_p, num_tokens)
        self.cache_size = cache.k.shape[3]                                  # a cache that has grown lies elsewhere
        self.state = torch.zeros(4, num_rows, dtype=torch.int64, device=device)         # ids, lengths, keys, numbers of the next ids in their samples
        self.tokens = torch.zeros(num_steps, num_rows, dtype=torch.int64, device=device)
        self.logps = torch.zeros(num_steps, num_rows, device=device)
        self.now, self.graph = torch.zeros(1, dtype=torch.int64, device=device), None
        if device.type == "cuda":
            self.state[1] = cache.k.shape[3]                                # clamped to the last position, which holds no sample's id
            with torch.cuda.device(device):
                stream = capture_stream(device)
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self.step()                                             # kernels are compiled, and workspaces made, before the capture
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):       # tools may run in threads meanwhile
                    self.step()
                self.graph = graph

    def step(self):
        if self.graph:
            return self.graph.replay()
        ids, lengths, keys, numbers = self.state
        token, logp = sample(decode(self.model, self.weights, self.cache, ids, lengths), uniform(keys, numbers), *self.sampling)
        self.tokens.index_copy_(0, self.now, token[None])
        self.logps.index_copy_(0, self.now, logp[None])
        ids.copy_(token)
        for counter in (lengths, numbers, self.now):
            counter.add_(1)

    def run(self, state, num_steps):
        """state: ids, lengths, keys, numbers, int64 (4, rows) on the host -> tokens, logps: num_steps lists of a number for each row."""
        self.state.copy_(state)
        self.now.zero_()
        for _ in range(num_steps):
            self.step()
        return self.tokens[:num_steps].tolist(), self.logps[:num_steps].tolist()


def extend(model, cache, rows, new_ids, lengths):
    """Appends new_ids (list of id lists, their sizes may differ) to `rows`, which hold `lengths` tokens (list of ints).

    Prefill (lengths 0) and tool results are this one function. -> logits (B,V) fp32 after each row's last id.
    Rows shorter than the longest write filler keys beyond their end; these are masked until real tokens overwrite them.
    """
    device = model.lm_head.weight.device
    sizes = torch.tensor([len(ids) for ids in new_ids])
    T = int(sizes.max())
    ids = torch.tensor([row + [0] * (T - len(row)) for row in new_ids], device=device)
    starts = torch.tensor(lengths)
    positions = (starts[:, None] + torch.arange(T)).clamp(max=cache.k.shape[3] - 1).to(device)       # (B, T)
    cache.rows, cache.used = rows, min(max(lengths) + T, cache.k.shape[3])
    hidden = model(ids, positions, cache=cache)
    last = hidden[torch.arange(len(new_ids), device=device), (sizes - 1).to(device)]                  # (B, D)
    return head_logits(last, model.lm_head.weight)


def head_logits(hidden, weight):
    """fp32 logits with the arithmetic of kernels.linear_logprob: product in the compute dtype, accumulated and kept in fp32."""
    if hidden.dtype == torch.float32:
        return F.linear(hidden, weight.float())
    weight = weight.to(hidden.dtype)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return F.linear(hidden.float(), weight.float())


# -----------------------------------------------------------------------------
# Sampling


def uniform(keys, positions):
    """fp64 in [0, 1): a hash (splitmix64) of (key of the sample, position), both int64 (B,) on one device. The same bits on every device."""
    if keys.is_cuda:
        return splitmix(keys, positions, lambda n: n - 2**64 if n >= 2**63 else n, lambda x, n: (x >> n) & (2**(64 - n) - 1)).double() * 2.0 ** -53
    # numpy has unsigned numbers, and less to do for each of a few rows
    bits = splitmix(*(x.numpy().view(np.uint64) for x in (keys, positions)), lambda n: n, lambda x, n: x >> n)
    return torch.from_numpy(bits * 2.0 ** -53)


def splitmix(keys, positions, constant, shift):
    """53 bits of 64-bit integers whose products wrap. constant: of an unsigned number; shift: to the right, zeros come in."""
    def mix(x):
        x = (x ^ shift(x, 30)) * constant(0xBF58476D1CE4E5B9)
        x = (x ^ shift(x, 27)) * constant(0x94D049BB133111EB)
        return x ^ shift(x, 31)
    golden = constant(0x9E3779B97F4A7C15)
    return shift(mix(mix(keys + positions * golden) + golden), 11)


def sample(logits, u, temperature, top_p=1.0, num_tokens=None):
    """logits (B,V) fp32, u (B,) fp64 -> token (B,) int64, logp (B,) fp32.

    Inverse CDF in fp64: the first token whose running mass exceeds u. Temperature 0 is argmax, with logp at temperature 1. top_p < 1
    samples from the smallest set of mass >= top_p; logp stays that of the full distribution, which is why RL uses top_p = 1. Columns from
    num_tokens on, which pad a vocabulary and are no tokens, are never drawn.
    """
    if temperature == 0:
        token = logits[:, :num_tokens].argmax(-1)
        return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
    if top_p == 1:
        return kernels.sample(logits, u, temperature=temperature, num_tokens=num_tokens)
    logps = (logits / temperature).log_softmax(-1)
    ordered, order = logps[:, :num_tokens].double().exp().sort(dim=-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p                 # tokens before which the mass was already there
    token, _ = kernels.sample(logps[:, :num_tokens].masked_fill(beyond.gather(1, order.argsort(-1)), -math.inf), u)
    return token, logps.gather(1, token[:, None])[:, 0]


# -----------------------------------------------------------------------------


PATIENCE = 0.005        # seconds a decoding step waits for calls under way: quick tools then keep the batch, and its arithmetic, the same


def in_thread(function, *args):
    """A Future of function(*args) in a daemon thread: a call that hangs can be abandoned, and does not keep the process alive."""
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except BaseException as error:                              # is raised again where the result is read
            future.set_exception(error)
    threading.Thread(target=work, daemon=True).start()
    return future


@torch.inference_mode()
def generate(model, tokenizer, prompts, *, num_samples=1, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, tools=None,
             tool_timeout=60.0, stop_ids=None, max_slots=64, window=None, desc=""):
    """-> per prompt, a list of num_samples Rollouts.

    prompts: lists of token ids (tokenizer.render_prompt makes them from messages, tokenizer.encode from text).
    max_new_tokens: bound on everything after the prompt, tool results included.
    seed: an int for all, or one int per prompt, for callers whose prompts have global numbers (ranks, resumed runs).
    tools: called as tools(prompt_index, sample_index, ids) when a sample ends a turn with end-of-turn, ids being that turn's; returns the
      ids to append (results and the next generation prompt, tokenizer.render_tool_results), or None when the rollout is over. Calls of
      different samples run at the same time in threads, while the other samples go on; what it raises ends the whole batch.
    tool_timeout: seconds until a call is abandoned and its rollout ends as "tool_timeout".
    stop_ids: default the tokenizer's end-of-turn and end-of-text. max_slots: samples that run at once (memory). desc: draws a progress bar.
    window: steps between looks at what was sampled; default 16 on CUDA, as a graph, and 1 elsewhere. It decides when freed rows are filled, not ids.
    """
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ValueError("generate needs whole weights on every rank, found FSDP shards: evaluate the saved checkpoint, or use --parallel=ddp")
    if not prompts:
        return []
    empty = [i for i, p in enumerate(prompts) if not len(p)]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: there is nothing to continue")
    if max_new_tokens < 1 or num_samples < 1 or not 0 < top_p <= 1 or temperature < 0:
        raise ValueError(f"expected max_new_tokens >= 1, num_samples >= 1, 0 < top_p <= 1, temperature >= 0; found {max_new_tokens}, "
                         f"{num_samples}, {top_p}, {temperature}")
    if stop_ids is None:
        stop_ids = {tokenizer.end_of_turn_id, tokenizer.end_of_text_id} - {None}
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [random_key(seed, i) for i in range(len(prompts))]
    device = model.lm_head.weight.device
    num_slots = max(min(max_slots, len(prompts) * num_samples), num_samples)
    longest, weights = max(map(len, prompts)), decoder_weights(model)
    limit = longest + max_new_tokens
    window = window or (16 if device.type == "cuda" else 1)
    cache = Cache(model, num_slots, min(limit, longest + ROOM) if device.type == "cpu" else limit)
    rollouts = [[Rollout() for _ in range(num_samples)] for _ in prompts]
    bar = iter(progress(range(len(prompts) * num_samples), desc=desc)) if desc else None

    waiting = list(range(len(prompts)))[::-1]
    free = list(range(num_slots))[::-1]
    running = {}                                                    # slot -> [prompt, sample, tokens in the cache, start of the turn]
    calling = {}                                                    # slot -> (Future, its start): those of running that wait for a tool
    keys = torch.zeros(num_slots, dtype=torch.int64)

    def reserve(position):
        """Room for ids up to `position`, and for one filler beyond."""
        if position >= cache.k.shape[3] < limit:
            cache.grow(model, min(limit, position * 3 // 2))

    def take(slots, logits):
        """Samples one token for each slot; -> {slot: ids to append next}. Slots that finish are freed."""
        where = torch.tensor([len(rollouts[running[s][0]][running[s][1]].ids) for s in slots])
        u = uniform(keys.index_select(0, torch.tensor(slots)), where).to(device)
        tokens, logps = (x.tolist() for x in sample(logits, u, temperature, top_p, tokenizer.vocab_size))
        return {slot: [token] for slot, token, logp in zip(slots, tokens, logps) if accept(slot, token, logp)}

    def accept(slot, token, logp):
        """Whether the sample goes on with this token; else it waits for a tool, or its slot is freed."""
        prompt, number, _, turn = running[slot]
        r = rollouts[prompt][number]
        r.ids.append(token), r.logps.append(logp), r.mask.append(1)
        if token in stop_ids:
            if tools and token == tokenizer.end_of_turn_id:
                calling[slot] = in_thread(tools, prompt, number, r.ids[turn:]), time.monotonic()
            else:
                finish(slot, "stop")
        elif len(r.ids) >= max_new_tokens:
            finish(slot, "length")
        else:
            return True

    windows, pool = {}, torch.cuda.graph_pool_handle() if device.type == "cuda" else None            # they run in turn and may share memory

    def leap(slots, ids, lengths):
        """A window of steps over the first rows, of which `slots` have an id to append; -> {slot: ids to append next} of those that go on."""
        done = [len(rollouts[running[s][0]][running[s][1]].ids) if s in slots else 0 for s in range(len(ids))]
        steps = min(window, max(max_new_tokens - done[s] for s in slots))
        reserve(min(max(lengths) + steps, limit))
        size = min(4 ** math.ceil(math.log(len(ids), 4)), num_slots)         # a capture costs some steps: few numbers of rows have a graph
        if size not in windows or windows[size].cache_size != cache.k.shape[3]:
            windows[size] = Window(model, weights, cache, size, window, temperature, top_p, tokenizer.vocab_size, pool)
        state = torch.zeros(4, size, dtype=torch.int64)
        state[:, :len(ids)] = torch.stack([torch.tensor(ids), torch.tensor(lengths), keys[:len(ids)], torch.tensor(done)])
        state[1, len(ids):] = torch.tensor([running[s][2] if s in running else 0 for s in range(len(ids), size)])        # rows beyond: fillers at their end
        tokens, logps = windows[size].run(state, steps)
        append = {}
        for s in slots:
            for step in range(steps):
                running[s][2] += 1
                if not accept(s, tokens[step][s], logps[step][s]):
                    break
            else:
                append[s] = [tokens[-1][s]]
        return append

    def finish(slot, reason):
        prompt, number, _, _ = running.pop(slot)
        r = rollouts[prompt][number]
        r.finish_reason = reason
        r.text = tokenizer.decode(r.ids[:-1] if r.ids[-1] in stop_ids else r.ids)
        free.append(slot)
        if bar:
            next(bar, None)

    def results(idle):
        """-> {slot: ids to append next} of the calls that came back. idle: there is nothing else to do, so wait for the first of them."""
        futures, now = [call for call, _ in calling.values()], time.monotonic()
        wait(futures, max(start for _, start in calling.values()) + PATIENCE - now)
        if idle and not any(call.done() for call in futures):
            wait(futures, min(start for _, start in calling.values()) + tool_timeout - now, FIRST_COMPLETED)
        append = {}
        for slot, (call, start) in list(calling.items()):
            done = call.done()
            if not done and time.monotonic() < start + tool_timeout:
                continue
            del calling[slot]
            prompt, number, _, _ = running[slot]
            r, more = rollouts[prompt][number], call.result() if done else None
            if not done:
                finish(slot, "tool_timeout")
            elif more is None:
                finish(slot, "stop")
            elif len(r.ids) + len(more) >= max_new_tokens:          # no room for the result and one more token
                finish(slot, "length")
            else:
                append[slot] = [r.ids[-1], *more]
                r.ids += more
                r.logps += [0.0] * len(more)
                r.mask += [0] * len(more)
                running[slot][3] = len(r.ids)
        return append

    pending = {}
    while waiting or running:
        if calling:
            pending |= results(idle=not pending and not (waiting and len(free) >= num_samples))
            if not running:
                continue
        # refill in batches, not one by one: a prefill call costs as much as a decode step
        if waiting and len(free) >= num_samples and (not pending or len(free) >= max(num_samples, num_slots // 4)):
            groups = []
            while waiting and len(free) >= num_samples:
                prompt = waiting.pop()
                groups.append((prompt, [free.pop() for _ in range(num_samples)]))
            firsts = torch.tensor([slots[0] for _, slots in groups], device=device)
            logits = extend(model, cache, firsts, [list(prompts[p]) for p, _ in groups], [0] * len(groups))
            for prompt, slots in groups:
                if num_samples > 1:
                    cache.copy_row(slots[0], slots[1:], len(prompts[prompt]))
                for number, slot in enumerate(slots):
                    running[slot] = [prompt, number, len(prompts[prompt]), 0]
                    keys[slot] = random_key(seeds[prompt], number)
            slots = [s for _, group in groups for s in group]
            pending |= take(slots, logits.repeat_interleave(num_samples, dim=0))
            continue
        if not waiting and 2 * len(running) <= max(running) + 1:     # the tail of a batch: move the last samples together
            order = sorted(running)
            cache.k[:, :len(order)], cache.v[:, :len(order)] = cache.k[:, order], cache.v[:, order]
            keys[:len(order)] = keys[order]
            running, pending, calling = ({new: d[old] for new, old in enumerate(order) if old in d} for d in (running, pending, calling))
        # tool results (many ids) go apart from decoding (one id), so that they do not widen the batch for the rest
        wide = sorted(s for s in pending if len(pending[s]) > 1)
        if wide:
            reserve(max(running[s][2] + len(pending[s]) for s in wide))
            logits = extend(model, cache, torch.tensor(wide, device=device), [pending[s] for s in wide], [running[s][2] for s in wide])
            for s in wide:
                running[s][2] += len(pending.pop(s))
            pending |= take(wide, logits)
        # decoding runs on a contiguous range of rows, a view of the cache; rows in it that have nothing to append write a filler key at
        # their end, where the next real token overwrites it
        slots = sorted(s for s in pending if len(pending[s]) == 1)
        if slots:
            rows = range(slots[-1] + 1)
            ids, lengths = [pending.get(s, [0])[0] for s in rows], [running[s][2] if s in running else 0 for s in rows]
            if window > 1 and weights:
                pending = {s: ids for s, ids in pending.items() if s not in slots} | leap(slots, ids, lengths)
                continue
            reserve(max(lengths) + 1)
            logits = (decode(model, weights, cache, ids, lengths) if weights else
                      extend(model, cache, slice(0, len(rows)), [[i] for i in ids], lengths))
            for s in slots:
                running[s][2] += 1
                del pending[s]
            pending |= take(slots, logits if len(slots) == len(rows) else logits[slots])
    return rollouts
