"""The Triton kernels of hstu_attention compiled ahead of time for GPUs that are not here: no spills, few registers, and tiles
that fit. See tests/test_kernels_compile.py; here too the compiler is told that pointers and strides are multiples of 16."""
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted process cannot compile", allow_module_level=True)
triton = pytest.importorskip("triton")
from test_kernels_compile import resources  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import hstu_tiles  # noqa: E402

KERNELS = "_forward", "_backward_kv", "_backward_q"
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
POSITION, TIME = {"position_ptr": "*fp32", "dp_ptr": "*fp32"}, {"time_ptr": "*fp32", "dw_ptr": "*fp32", "t_ptr": "*i64", "next_ptr": "*i64"}


def check(arch, name, dtype, d, position, time, folder):
    kernel = getattr(hstu_tiles, name)
    x = torch.empty(1, 1, 1, d, dtype=dtype, device="meta")
    constants = {**hstu_tiles._shape(x, x), "HAS_POSITION": position, "HAS_TIME": time}
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    constants |= {key: None for given, table in ((position, POSITION), (time, TIME)) if not given for key in table}
    signature, facts = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        pointer = {**POSITION, **TIME, "lengths_ptr": "*i64"}.get(argument, TYPES[dtype])
        signature[argument] = pointer if argument.endswith("_ptr") else "i32"
        if argument.endswith(("_ptr", "_row", "_stride")):
            facts[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items() if key in kernel.arg_names}
    compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=facts),
                              target=GPUTarget("cuda", arch, 32), options=options)
    used = resources(compiled, folder)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"
    assert used["REG"] * options["num_warps"] * 32 <= 65536, used
    assert compiled.metadata.shared <= 99 * 1024
    ptx = compiled.asm["ptx"]
    assert "mma" in ptx  # the products run on tensor cores
    assert not any(word in ptx for word in ("atom.", "red.global", "red.relaxed"))


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


# All variants of bf16 and fp32 with and without tables, at 1 to 3 s each, were compiled once; here the heaviest of each kernel, those with both tables
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", KERNELS)
def test_both_tables(name, dtype, tmp_path):
    for arch, d in ((90, 64), (90, 128), (80, 128), *([(90, 32)] if dtype == torch.bfloat16 else [])):
        try:
            check(arch, name, dtype, d, True, True, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"sm_{arch} {name} {dtype} d={d}: {error}") from error


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", KERNELS)
def test_no_table(name, tmp_path):
    check(90, name, torch.bfloat16, 64, False, False, tmp_path)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("position", [True, False])
def test_one_table_and_fp16(position, tmp_path):
    check(80, "_backward_q", torch.float16, 64, position, not position, tmp_path)
