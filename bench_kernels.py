"""The groups of bench.py that time kernels and rollouts inside one process: gemm, head, hstu, decode. Shapes are those of a GPU of 80 GB or more on
CUDA, and small ones on a CPU, where they show that everything runs and agrees, not how fast it would be.

Methods are timed in turn, in an order that is shuffled every time, with device events and a cold cache. A peer that is not installed is named and left
out. What a method computes is compared with float64 first: its errors stand beside its time.
"""
import importlib.util
import math
import random
import tempfile
import time

import torch
import torch.nn.functional as F

import checkpoint
import engine
from kernels import decode_attention, hstu_attention, linear_logprob, sample
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
PEAK = 790e12                   # FLOP/s of bf16 products that real kernels reach on an H200; for the limits of the tables
BANDWIDTH = 4.3e12              # bytes/s, likewise


def milliseconds(methods, warmup=8, repeats=30):
    """{name: function} -> {name: sorted times, ms}. Interleaved in shuffled order; on CUDA by events, with the L2 cache overwritten before each."""
    order, times, flush = list(methods), {name: [] for name in methods}, torch.empty(64 << 20, dtype=torch.int32, device=DEVICE) if ON_GPU else None
    shuffle = random.Random(0).shuffle
    for i in range(warmup + repeats):
        shuffle(order)
        for name in order:
            if ON_GPU:
                flush.zero_()
                torch.cuda._sleep(1_000_000)                                # half a millisecond for the host to launch everything: gaps are not the kernel's
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                methods[name]()
                end.record()
                end.synchronize()
                spent = start.elapsed_time(end)
            else:
                start = time.perf_counter()
                methods[name]()
                spent = (time.perf_counter() - start) * 1e3
            if i >= warmup:
                times[name].append(spent)
    return {name: sorted(values) for name, values in times.items()}


def quantiles(values):
    return dict(p20=values[len(values) // 5], p50=values[len(values) // 2], p80=values[4 * len(values) // 5])


def peak_bytes(function):
    """Memory at its highest during a call, less what was there before; None on a CPU."""
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def mebibytes(size):
    return "" if size is None else f"{size / 2**20:8.0f} MiB"


def installed(module):
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:                                             # of the package that it would be in
        found = False
    if not found:
        print(f"left out: {module} is not installed")
    return found


# -----------------------------------------------------------------------------
# gemm: what a product with an fp32 result costs beside one with a bf16 result. linear_logprob's design rests on the ratio (>= .88: as built)


def bench_gemm(cfg):
    rows, n, widths = (16384, 8192, (896, 1536, 2048, 4096)) if ON_GPU else (256, 512, (64, 128))
    result = {}
    for k in widths:
        a, b = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in ((rows, k), (n, k)))
        low, full = torch.empty(rows, n, device=DEVICE, dtype=DTYPE), torch.empty(rows, n, device=DEVICE)
        wide = dict(out_dtype=torch.float32) if ON_GPU else {}
        times = milliseconds({"16-bit result": lambda: torch.mm(a, b.t(), out=low), "fp32 result": lambda: torch.mm(a, b.t(), out=full, **wide),
                              "fp32 added in place": lambda: torch.addmm(full, a, b.t(), out=full, **wide)}, cfg.warmup, cfg.steps)
        rates = {name: 2 * rows * n * k / values[len(values) // 2] / 1e9 for name, values in times.items()}
        ratios = {name: rate / rates["16-bit result"] for name, rate in rates.items()}
        result[f"K={k}"] = dict(tflops=rates, ratio=ratios)
        print(f"M={rows} N={n} K={k}: " + ", ".join(f"{name} {rate:.0f} TFLOP/s ({ratios[name]:.2f})" for name, rate in rates.items()))
    return result


# -----------------------------------------------------------------------------
# head: hidden states and a table to log-probabilities and back


HEAD_SHAPES = ((16384, 2048, 151936), (16384, 4096, 151936), (16384, 896, 151936), (8192, 2048, 131072)) if ON_GPU else (
    (1024, 128, 272), (1024, 128, 4096), (512, 256, 32768), (256, 896, 151936))             # N, D, V


def full_logits(hidden, weight, targets, entropy):
    logps = F.linear(hidden, weight).float().log_softmax(-1)
    return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1) if entropy else None


def head_methods(entropy):
    """{name: function(hidden, weight, targets) -> (logp, entropy or None)}. Peers without an entropy are in the runs that ask for none."""
    def ours(*x):
        out = linear_logprob(*x)
        return out.logp, out.entropy if entropy else None
    methods = {"temper": ours, "full logits": lambda *x: full_logits(*x, entropy)}
    if ON_GPU:
        torch._dynamo.reset()                                               # past 8 variants it would run eagerly, and say it was compiled
        compiled = torch.compile(full_logits, dynamic=False)
        methods["torch.compile"] = lambda *x: compiled(*x, entropy)
    if installed("trl.kernels.chunked_logprob"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        rest = 1.0, 8192, None, 1.0, ("entropy",) if entropy else ()        # temperature, chunk, softcap, scale, outputs
        methods["trl chunked"] = lambda hidden, weight, targets: ChunkedLogProbFunction.apply(hidden, weight, None, targets, *rest)[:2]
    if ON_GPU and not entropy and installed("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        for name, accumulate in (("liger", None), ("liger, fp32 sums", torch.float32)):
            methods[name] = lambda *x, a=accumulate: (-liger_fused_linear_cross_entropy(*x, reduction="none", accum_dtype=a), None)
    if ON_GPU and not entropy and installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy
        for impl in ("cce", "cce_exact"):
            methods[impl] = lambda *x, i=impl: (-linear_cross_entropy(*x, reduction="none", impl=i), None)
    return methods


def head_errors(method, hidden, weight, targets, up, entropy):
    """Largest errors beside float64: of logp and entropy on some rows, of dh on these rows and dW on some columns, relative to the largest entry."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    logp, found = method(hidden, weight, targets)
    loss = (logp * up).sum() + ((found * up).sum() if entropy else 0)
    dh, dw = torch.autograd.grad(loss, (hidden, weight))
    N, V = len(hidden), len(weight)
    rows, columns = torch.arange(0, N, max(N // 256, 1), device=DEVICE), torch.arange(0, V, max(V // 64, 1), device=DEVICE)
    h, w = hidden.detach().double(), weight.detach().double()
    gradients, parts = torch.zeros(len(columns), h.shape[1], dtype=torch.float64, device=DEVICE), []
    for block in torch.arange(N, device=DEVICE).split(512):                 # dz of all rows at some columns; of some rows at all
        logps = (h[block] @ w.t()).log_softmax(-1)
        p = logps.exp()
        H = -(p * logps).sum(-1)
        upstream = up[block].double()[:, None]
        dz = -p * upstream
        dz[torch.arange(len(block)), targets[block]] += upstream[:, 0]
        if entropy:
            dz -= upstream * p * (logps + H[:, None])
        gradients += dz[:, columns].t() @ h[block]
        here = torch.isin(block, rows)
        parts.append((logps.gather(1, targets[block, None])[here, 0], H[here], dz[here] @ w))
    true_logp, true_entropy, true_dh = (torch.cat(x) for x in zip(*parts))
    relative = lambda x, y: ((x.double() - y).abs().max() / y.abs().max()).item()
    apart = lambda x, y: (x[rows].double() - y).abs().max().item()
    return dict(logp=apart(logp, true_logp), entropy=apart(found, true_entropy) if entropy else None,
                dh=relative(dh[rows], true_dh), dw=relative(dw[columns], gradients))


def bench_head(cfg):
    result = {}
    for N, D, V in HEAD_SHAPES:
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, device=DEVICE)
        hidden, weight, up = draw(N, D).to(DTYPE).requires_grad_(), (draw(V, D) / D**0.5).to(DTYPE).requires_grad_(), draw(N)
        targets = torch.randint(V, (N,), generator=generator, device=DEVICE)
        product = torch.empty(N, min(V, 8192), dtype=DTYPE, device=DEVICE)
        limit = milliseconds({"gemm": lambda: torch.mm(hidden.detach(), weight.detach()[:8192].t(), out=product)}, cfg.warmup, cfg.steps)["gemm"]
        gemm = limit[len(limit) // 2] * V / min(V, 8192)
        for mode in ("no gradient", "per token", "per token, with entropy"):
            entropy, gradient = mode.endswith("entropy"), mode != "no gradient"
            methods = head_methods(entropy)

            def step(method):
                if not gradient:
                    with torch.no_grad():
                        return method(hidden.detach(), weight.detach(), targets)
                hidden.grad = weight.grad = None
                logp, H = method(hidden, weight, targets)
                return ((logp * up).sum() + ((H * up).sum() if entropy else 0)).backward()

            errors, memory = {}, {}
            for name, method in list(methods.items()):
                try:                                                        # the first call may compile, and is not counted
                    errors[name] = head_errors(method, hidden, weight, targets, up, entropy) if gradient else step(method) and {}
                    hidden.grad = weight.grad = None
                    memory[name] = peak_bytes(lambda m=method: step(m))
                except Exception as error:                                  # a peer's; ours ends the run
                    if name == "temper":
                        raise
                    print(f"left out: {name}: {type(error).__name__}: {str(error)[:200]}")
                    del methods[name]
            repeats = cfg.steps if V < 10_000 or ON_GPU else 3
            times = milliseconds({name: lambda m=method: step(m) for name, method in methods.items()}, min(cfg.warmup, 3), repeats)
            bounds = dict(logp=1e-5, entropy=1e-5, dh=1e-5, dw=1e-5) if DTYPE == torch.float32 else dict(logp=1e-4, entropy=1e-4, dh=4e-3, dw=4e-3)
            rows = {}
            for name, values in times.items():
                q, products = quantiles(values), 3 if gradient else 1
                found = {key: error for key, error in errors[name].items() if error is not None}
                wrong = [key for key, error in found.items() if not error <= bounds[key]]
                rows[name] = r = q | dict(tflops=2 * products * N * D * V / q["p50"] / 1e9, gemms=q["p50"] / gemm / products,
                                          ratio=q["p50"] / quantiles(times["temper"])["p50"], memory=memory[name], errors=found, wrong=wrong)
                print(f"N={N} D={D} V={V} {mode:>23} {name:>17} {q['p50']:9.2f} ms [{q['p20']:.2f}, {q['p80']:.2f}]  {r['gemms']:5.2f} of {products} GEMM  "
                      f"x{r['ratio']:.2f}  {mebibytes(r['memory'])}  " + " ".join(f"{k} {e:.1e}" for k, e in found.items())
                      + (f"  WRONG: {', '.join(wrong)}" if wrong else ""), flush=True)
            result[f"N={N} D={D} V={V} {mode}"] = rows
    return result


# -----------------------------------------------------------------------------
# hstu: attention without a softmax, with biases of positions and times


def bench_hstu(cfg):
    B, H, d, lengths = (32, 4, 128, (1024, 2048, 4096)) if ON_GPU else (2, 2, 16, (32, 64))
    result = {}
    for L in lengths:
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE).requires_grad_()
        q, k, v, positions, times_bias = draw(B, L, H, d), draw(B, L, H, d), draw(B, L, H, d), draw(2 * L - 1), draw(129)
        stamps = torch.randint(1, 100_000, (B, L), generator=generator, device=DEVICE).cumsum(1)
        full, up = torch.full((B,), L, device=DEVICE), torch.randn(B, L, H, d, generator=generator, device=DEVICE).to(DTYPE)
        leaves = (q, k, v, positions, times_bias)
        attend = lambda backend: hstu_attention(q, k, v, full, positions, times_bias, stamps, backend=backend)

        def backward(backend):
            return torch.autograd.grad(attend(backend), leaves, up)
        backends = ["triton", "torch"] if ON_GPU and L <= 2048 else ["triton"] if ON_GPU else ["torch"]                # torch holds all scores
        times = milliseconds({f"{what}, {backend}": lambda f=f, b=backend: f(b) for backend in backends
                              for what, f in (("forward", attend), ("forward and backward", backward))}, cfg.warmup, cfg.steps)
        limit = {"forward": 2 * B * H * L * L * d / PEAK * 1e3}             # two products over the lower triangle
        limit["forward and backward"] = 3.5 * limit["forward"]              # and five of the backward
        for name, values in times.items():
            spent, what = quantiles(values), name.partition(",")[0]
            memory = peak_bytes(lambda: (attend if what == "forward" else backward)(name.partition(", ")[2]))
            result[f"L={L} {name}"] = spent | dict(of_limit=spent["p50"] / limit[what], memory=memory)
            print(f"B={B} L={L} H={H} d={d} {name:>30} {spent['p50']:9.2f} ms [{spent['p20']:.2f}, {spent['p80']:.2f}]  "
                  f"{spent['p50'] / limit[what]:.2f} times the limit  {mebibytes(memory)}", flush=True)
    return result


# -----------------------------------------------------------------------------
# decode: attention over a cache, sampling, and whole rollouts beside transformers


QWEN = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64, qkv_bias=True,
            tie_embeddings=True, rope_theta=1e6)                            # Qwen2.5-0.5B
SMALL = dict(vocab_size=265, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, tie_embeddings=True)


def bench_decode(cfg):
    slots, prompt, new, shape = (256, 768, 256, QWEN) if ON_GPU else (8, 24, 8, SMALL)
    config, generator = ModelConfig(**shape), torch.Generator(DEVICE).manual_seed(0)
    T, V, H, Hkv, d = prompt + new, config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim
    draw = lambda *shape: torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE)
    q, k, v = draw(slots, H, d), draw(slots, Hkv, T, d), draw(slots, Hkv, T, d)
    lengths = torch.randint(prompt, T + 1, (slots,), generator=generator, device=DEVICE, dtype=torch.int32)
    mask = torch.zeros(slots, 1, 1, T, device=DEVICE, dtype=DTYPE).masked_fill(torch.arange(T, device=DEVICE) >= lengths[:, None, None, None], -math.inf)
    logits = torch.randn(slots, V, generator=generator, device=DEVICE)
    u = torch.rand(slots, dtype=torch.float64, generator=generator, device=DEVICE)
    grouped = q.view(slots, Hkv, H // Hkv, d)
    methods = {"decode_attention": lambda: decode_attention(q, k, v, lengths), "SDPA": lambda: F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask),
               "sample": lambda: sample(logits, u), "softmax and multinomial": lambda: torch.multinomial(logits.softmax(-1), 1)}
    gap = (methods["decode_attention"]().float() - methods["SDPA"]().reshape(slots, H, d).float()).abs().max().item()
    moved = {"decode_attention": 2 * int(lengths.sum()) * Hkv * d * k.element_size(), "sample": logits.nbytes}
    result = dict(gap=gap)
    for name, values in milliseconds(methods, cfg.warmup, cfg.steps).items():
        result[name] = q = quantiles(values)
        share = f"  {moved[name] / q['p50'] * 1e3 / BANDWIDTH:.2f} of the bandwidth" if name in moved else ""
        print(f"{slots} rows, {T} positions, vocabulary {V}: {name:>24} {q['p50']:8.3f} ms [{q['p20']:.3f}, {q['p80']:.3f}]{share}")
    print(f"decode_attention and SDPA apart by at most {gap:.1e}")

    model = Transformer(config, DTYPE).init_weights(0).to(DEVICE)
    for p in model.parameters():                                            # residual outputs start at zero; let every weight matter
        p.data.add_(torch.randn(p.shape, generator=generator, device=DEVICE).to(p.dtype) * 0.02 if p.ndim == 2 else 0)
    tokenizer = Tokenizer.bytes()
    prompts = torch.randint(V - 10, (slots // 8, prompt), generator=generator, device=DEVICE).tolist()
    seconds, gaps = {}, {}

    def rollout(window):
        start = time.perf_counter()
        found = engine.generate(model, tokenizer, prompts, num_samples=8, max_new_tokens=new, stop_ids=set(), max_slots=slots, window=window)
        if ON_GPU:
            torch.cuda.synchronize()
        seconds.setdefault(window or "default", []).append(time.perf_counter() - start)
        return found
    for _ in range(3):
        for window in (None, 1):
            name = window or "default"
            sampled = rollout(window)[0][0]
            with torch.no_grad():
                exact = model.logits(torch.tensor([prompts[0] + sampled.ids], device=DEVICE)).float().log_softmax(-1)[0, prompt - 1:-1].cpu()
            gaps[name] = (exact.gather(1, torch.tensor(sampled.ids)[:, None])[:, 0] - torch.tensor(sampled.logps)).abs().max().item()
    parameters = sum(p.numel() for p in model.parameters())
    bound = (parameters * 2 + slots * (prompt + new / 2) * config.num_layers * 2 * Hkv * d * 2) / BANDWIDTH            # seconds a step, bf16
    for window, spent in seconds.items():
        rate = slots * new / min(spent[1:])
        result[f"engine, window {window}"] = dict(tokens_per_second=rate, of_bound=rate * bound / slots, logp_gap=gaps[window])
        print(f"engine.generate, window {window}: {rate:,.0f} tokens/s, {rate * bound / slots:.2f} of the bandwidth bound, prefill included; "
              f"log-probabilities {gaps[window]:.1e} from the trainer's")
    if installed("transformers"):
        from transformers import AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save_hf(model, tokenizer, folder)
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE)
        ids = torch.tensor(prompts, device=DEVICE).repeat_interleave(8, 0)
        tokens = min(new, 32)                                               # its steps do not get faster; a few will do
        spent = {}
        for n in (1, 1 + tokens) * 2:
            start = time.perf_counter()
            peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0)
            if ON_GPU:
                torch.cuda.synchronize()
            spent[n] = time.perf_counter() - start
        rate = slots * tokens / (spent[1 + tokens] - spent[1])
        result["transformers"] = dict(tokens_per_second=rate)
        ours = result["engine, window default"]["tokens_per_second"]
        print(f"transformers.generate, prefill not counted: {rate:,.0f} tokens/s; engine {ours / rate:.1f} times that")
    return result


GROUPS = {"gemm": bench_gemm, "head": bench_head, "hstu": bench_hstu, "decode": bench_decode}
