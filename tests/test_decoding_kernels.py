"""sample and decode_attention: the torch paths, the Triton kernels whole in the interpreter, and compiled for GPUs that are not here.

TRITON_INTERPRET is read when a kernel is decorated, and an interpreted process cannot compile: cases run in a child process that has the variable.
"""
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import decode_attention, linear_logprob, sample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def test_cases_in_the_interpreter():
    pytest.importorskip("triton")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "python_functions=case_*", "-W", "ignore::RuntimeWarning"]
    child = subprocess.run([sys.executable, "-m", "pytest", *options, __file__], cwd=Path(__file__).parent.parent,
                           env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
    assert child.stdout.count(".") >= 30, child.stdout


def draws(n, seed=0):
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# sample


def by_hand(backend):
    """Masses 1/2, 1/4, 1/4 at temperature 1; 4/6, 1/6, 1/6 at temperature 1/2. A running mass must exceed u."""
    logits = torch.tensor([[2.0, 1.0, 1.0]]).log().expand(6, 3).contiguous()
    u = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2**-30], dtype=torch.float64)
    token, logp = sample(logits, u, backend=backend)
    assert token.tolist() == [0, 0, 1, 1, 2, 2] and torch.allclose(logp.exp(), torch.tensor([.5, .5, .25, .25, .25, .25]).to(logp.dtype))
    token, logp = sample(logits, u, temperature=.5, backend=backend)
    assert token.tolist() == [0, 0, 0, 1, 1, 2] and torch.allclose(logp[-1].exp(), torch.tensor(1 / 6).to(logp.dtype))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_sample_by_hand(backend):
    by_hand(backend)


def test_the_engine_samples_with_it():
    from engine import sample as engine_sample
    logits, u = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 3, draws(50)
    for a, b in zip(engine_sample(logits, u, .8, num_tokens=290), sample(logits, u, temperature=.8, num_tokens=290)):
        assert torch.equal(a, b)


def case_sample_by_hand():
    by_hand("triton")


@pytest.mark.parametrize("chunk", [64, 8192])
@pytest.mark.parametrize("V, dtype", [(265, torch.float32), (272, torch.bfloat16), (64, torch.float32), (1000, torch.float16), (1, torch.float32)])
def case_sample_is_the_fp64_inverse(V, dtype, chunk, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.sample"], "CHUNK", chunk)
    g = torch.Generator().manual_seed(V)
    logits = (torch.randn(12, V, generator=g) * 3).to(dtype)
    logits[1], logits[2] = logits[1] - 120, logits[2] + 80
    if V > chunk:
        logits[3, :chunk] = -math.inf                               # a whole chunk masked out
        logits[4, chunk:] = -math.inf
    for temperature, num_tokens in ((1.0, V), (.7, max(V - 9, 1))):
        logits[5, :num_tokens] = -math.inf
        logits[5, num_tokens // 2] = 1.0                            # one token that may be drawn
        token, logp = sample(logits, draws(12), temperature=temperature, num_tokens=num_tokens, backend="triton")
        exact_token, exact = sample(logits, draws(12), temperature=temperature, num_tokens=num_tokens, backend="reference")
        assert torch.equal(token, exact_token) and (logp - exact).abs().max() < 1e-5 and token.dtype == torch.int64
        assert token[5] == num_tokens // 2


def case_logp_is_that_of_linear_logprob():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 16, generator=g), torch.randn(530, 16, generator=g)
    token, logp = sample(hidden @ weight.t(), draws(8), temperature=.9, backend="triton")
    assert (logp - linear_logprob(hidden, weight, token, temperature=.9).logp).abs().max() < 2e-6


def case_no_token_without_mass():
    """u of 0 and just below 1, where running masses of a chunk are fp32: ends of the row are masked, or too unlikely for fp32."""
    logits = torch.full((4, 100), -200.0)
    logits[:, :10] = logits[:, 90:] = -math.inf
    logits[:, 40] = logits[:, 41] = 0.0
    u = torch.tensor([0.0, 1 - 2**-53, .5 - 1e-6, .5 + 1e-6], dtype=torch.float64)
    assert sample(logits, u, backend="triton")[0].tolist() == [40, 41, 40, 41]


def case_the_tail_has_its_mass(monkeypatch):
    """4,000 tokens of mass 1e-6 each beside one that holds the rest: drawn .004 of the time, evenly. Noise added to fp32 logits would not reach them."""
    monkeypatch.setattr(sys.modules["kernels.sample"], "CHUNK", 1024)
    logits = torch.full((1, 4001), math.log(1e-6))
    logits[0, 1500] = math.log(1 - .004)
    u = torch.linspace(0, 1 - 1e-9, 400, dtype=torch.float64)
    token, _ = sample(logits.expand(400, -1).contiguous(), u, backend="triton")
    exact, _ = sample(logits.expand(400, -1).contiguous(), u, backend="reference")
    assert (token - exact).abs().max() <= 2 and (token != 1500).sum() == (exact != 1500).sum() > 0
    # which chunk is decided in fp64: a point 1e-9 to the left or right of its edge falls to either side
    edge = 1024 * 1e-6
    at = sample(logits.expand(2, -1).contiguous(), torch.tensor([edge - 1e-9, edge + 1e-9], dtype=torch.float64), backend="triton")[0]
    assert at[0] in (1022, 1023) and at[1] in (1024, 1025)


def case_views_and_spare_columns():
    """Rows that are views of a wider buffer are read in place; nan beyond the vocabulary does not leak."""
    module = sys.modules["kernels.sample"]
    wide = torch.full((5, 288), math.nan)
    wide[:, :265] = torch.randn(5, 265, generator=torch.Generator().manual_seed(0))
    view = wide[:, :265]
    assert module.padded(view) is view and module.padded(view.contiguous()) is not view
    assert module.padded(wide[1:, 3:268]).data_ptr() % 16 == 0 and module.padded(view.t().contiguous().t()).stride(1) == 1
    expected = sample(view.contiguous(), draws(5), backend="reference")
    for x in (view, view.contiguous()):
        token, logp = sample(x, draws(5), backend="triton")
        assert torch.equal(token, expected[0]) and logp.isfinite().all()


def test_sample_refuses():
    x, u = torch.zeros(2, 5), draws(2)
    for change, message in ((dict(temperature=0), "temperature above 0"), (dict(num_tokens=6), "num_tokens of 1 to 5"), (dict(num_tokens=0), "num_tokens"),
                            (dict(backend="gpu"), "backend")):
        with pytest.raises(ValueError, match=message):
            sample(x, u, **change)
    with pytest.raises(ValueError, match="float64"):
        sample(x, u.float())
    with pytest.raises(ValueError, match=r"\(3,\)"):
        sample(x, draws(3))


# -----------------------------------------------------------------------------
# decode_attention


def cached(B, H, Hkv, T, d, dtype=torch.float32, slots=None):
    g = torch.Generator().manual_seed(T * d)
    q = torch.randn(B, H, d, generator=g).to(dtype)
    k, v = (torch.randn(slots or B, Hkv, T, d, generator=g).to(dtype) for _ in range(2))
    return q, k, v


def one_by_one(q, k, v, lengths):
    """Row by row and head by head, over the positions that are there."""
    B, H, d = q.shape
    out = torch.zeros(B, H, d, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            n, kv = int(lengths[b]), h // (H // k.shape[1])
            if n:
                weights = (k[b, kv, :n].double() @ q[b, h].double() / d ** .5).softmax(0)
                out[b, h] = weights @ v[b, kv, :n].double()
    return out


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_decode_attention_of_every_length(backend):
    q, k, v = cached(6, 4, 2, 40, 8, slots=7)
    lengths = torch.tensor([0, 1, 2, 39, 40, 17], dtype=torch.int32)
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = v[b, :, n:] = math.nan                        # garbage beyond a length
    out = decode_attention(q, k, v, lengths, backend=backend)
    assert (out - one_by_one(q, k, v, lengths)).abs().max() < 1e-6 and (out[0] == 0).all() and out.dtype == q.dtype


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H, Hkv, d", [(4, 4, 32), (14, 2, 64), (4, 1, 128)])
def case_decode_attention(H, Hkv, d, dtype, splits):
    """Lengths 0, 1, the edges of a block and of a split, and T; nan beyond them."""
    q, k, v = cached(7, H, Hkv, 100, d, dtype, slots=8)
    lengths = torch.tensor([0, 1, 32, 33, 64, 65, 100], dtype=torch.int32)
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = v[b, :, n:] = math.nan
    out = decode_attention(q, k, v, lengths, splits=splits, backend="triton")
    error = (out.double() - one_by_one(q, k, v, lengths)).abs().max()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] and (out[0] == 0).all() and out.dtype == dtype


def case_decode_attention_of_large_scores():
    """Scores of +-100 and one of 600: the running maximum must start below any of them, a later one take over, and an earlier one stay."""
    q, k, v = cached(2, 2, 2, 70, 16)
    q *= 40
    k[0, :, 66], k[1, :, 3] = q[0] / 10, q[1] / 10
    lengths = torch.tensor([70, 66], dtype=torch.int32)
    assert (decode_attention(q, k, v, lengths, splits=1, backend="triton") - one_by_one(q, k, v, lengths)).abs().max() < 1e-5
    assert (decode_attention(q, k, v, lengths, splits=2, backend="triton") - one_by_one(q, k, v, lengths)).abs().max() < 1e-5


def test_decode_attention_refuses():
    q, k, v = cached(2, 4, 2, 10, 8)
    lengths = torch.tensor([1, 2], dtype=torch.int32)
    for change, message in ((dict(lengths=lengths.long()), "int32"), (dict(k_cache=k[:1], v_cache=v[:1]), "slots >= B"), (dict(q=q[:, :3]), "multiple"),
                            (dict(v_cache=v[..., :9, :]), "found"), (dict(q=q.bfloat16()), "one dtype")):
        with pytest.raises(ValueError, match=message):
            decode_attention(**dict(q=q, k_cache=k, v_cache=v, lengths=lengths) | change)
    if INTERPRETED:
        with pytest.raises(ValueError, match="power of 2 from 16"):
            decode_attention(q, k, v, lengths, backend="triton")


def case_decode_attention_refuses():
    test_decode_attention_refuses()


# -----------------------------------------------------------------------------
# on a GPU, at the shapes of a rollout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample_on_the_gpu(dtype):
    """512 x 151,936: tokens of the fp64 inverse but where u falls within rounding of an edge, log-probabilities everywhere; twice the same bits, no sync."""
    g = torch.Generator("cuda").manual_seed(0)
    logits = (torch.randn(512, 151936, generator=g, device="cuda") * 3).to(dtype)
    u = torch.rand(512, dtype=torch.float64, generator=g, device="cuda")
    sample(logits, u, num_tokens=151665)                            # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        token, logp = sample(logits, u, num_tokens=151665)
        again = sample(logits, u, num_tokens=151665)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = logits.double().log_softmax(-1)
    running = exact[:, :151665].exp().cumsum(-1)
    at = running.gather(1, token[:, None])[:, 0]
    before = at - exact.gather(1, token[:, None])[:, 0].exp()
    point = u * running[:, -1]
    assert ((point >= before - 1e-6) & (point <= at + 1e-6)).all() and token.max() < 151665
    assert (logp - exact.gather(1, token[:, None])[:, 0]).abs().max() < 1e-5
    assert torch.equal(token, again[0]) and torch.equal(logp, again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, H, Hkv, d", [(256, 14, 2, 64), (3, 16, 8, 128)])
def test_decode_attention_on_the_gpu(B, H, Hkv, d, dtype):
    q, k, v = (x.cuda() for x in cached(B, H, Hkv, 1024, d, dtype))
    lengths = torch.randint(0, 1025, (B,), generator=torch.Generator().manual_seed(0), dtype=torch.int32).cuda()
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:] = v[b, :, n:] = math.nan
    decode_attention(q, k, v, lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, again = decode_attention(q, k, v, lengths), decode_attention(q, k, v, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = decode_attention(q.double(), k.double(), v.double(), lengths, backend="reference")
    assert (out.double() - exact).abs().max() < (2e-6 if dtype == torch.float32 else 2e-2) and torch.equal(out, again)


# -----------------------------------------------------------------------------
# compiled for sm_80 and sm_90: no spills, wide loads, and loads that overlap with products


def compiled(kernel, arch, types, constants, multiples, num_warps, num_stages=3):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    signature, facts = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or name in multiples:
            facts[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=facts), target=GPUTarget("cuda", arch, 32),
                          options=dict(num_warps=num_warps, num_stages=num_stages))


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    if INTERPRETED:
        pytest.skip("an interpreted process cannot compile")
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sample_compiles(arch, dtype, compiler):
    from test_kernels_compile import resources

    from kernels import rows
    whole = rows._shape(8192)
    types = dict(x_ptr=f"*{dtype}", stats_ptr="*fp32", u_ptr="*fp64", token_ptr="*i64", logp_ptr="*fp32", inv_temperature="fp32")
    for kernel, constants, shape in ((rows._chunks, {}, whole), *((rows._pick, dict(CHUNKS=c), rows._pick_shape(whole)) for c in (1, 32))):
        made = compiled(kernel, arch, types, dict(constants, BLOCK=shape["BLOCK"]), ("n_load", "x_stride"), shape["num_warps"])
        used = resources(made, compiler)
        assert used["STACK"] == 0 and used["LOCAL"] == 0 and used["REG"] <= 128, (kernel.fn.__name__, used)
        per_thread = 8192 // (shape["num_warps"] * 32)
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", made.asm["ptx"])) == per_thread * (4 if dtype == "fp32" else 2) // 16


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("d, group, dtype", [(64, 7, "bf16"), (128, 2, "bf16"), (256, 4, "bf16"), (64, 4, "fp32"), (128, 2, "fp32"), (32, 1, "bf16")])
def test_decode_compiles(arch, d, group, dtype, compiler):
    from test_kernels_compile import resources

    from kernels import decode_tiles
    shape = decode_tiles._shape(d, torch.bfloat16 if dtype == "bf16" else torch.float32)
    types = dict(q_ptr=f"*{dtype}", k_ptr=f"*{dtype}", v_ptr=f"*{dtype}", lengths_ptr="*i32", out_ptr=f"*{dtype}", lse_ptr="*fp32", scale="fp32")
    made = compiled(decode_tiles._decode, arch, types, dict(GROUP=group, D=d, BLOCK=shape["BLOCK"], UPCAST=False), ("slot_stride", "head_stride"),
                    shape["num_warps"], shape["num_stages"])
    used = resources(made, compiler)
    assert used["STACK"] == 0 and used["LOCAL"] == 0 and used["REG"] <= 255, used
    assert made.metadata.shared <= 99 * 1024
    assert len(re.findall(r"cp\.async", made.asm["ptx"])) >= 8, "loads must be in flight while products run"
