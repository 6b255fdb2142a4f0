"""The Triton row kernels compiled ahead of time for GPUs that are not here: no spills, few registers, 128-bit loads.

Needs the triton package (which ships ptxas and cuobjdump) and no GPU. The compiler is told what the launcher would
infer: pointers are 16-byte aligned, n_load and the strides are multiples of 16 (test_linear_logprob.py checks those).
"""
import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted process cannot compile", allow_module_level=True)
triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import rows  # noqa: E402

MULTIPLES_OF_16 = ("n_load", "x_stride", "e_stride", "dz_stride")
TYPES = {"targets_ptr": "*i64", "n": "i32", "first": "i32", **{name: "i32" for name in MULTIPLES_OF_16},
         "softcap": "fp32", "inv_temperature": "fp32"}


def dz_variant(x, dz, bias, softcap, entropy, saved):
    flags = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "HAS_ENTROPY": entropy, "SAVED": saved}
    return rows._dz, {"x_ptr": x, "dz_ptr": dz}, flags


def combinations():
    """(kernel, types behind pointers, constants) of the variants that kernels/linear_logprob.py launches."""
    flags = (False, True)
    for bias, softcap, saved in itertools.product(flags, flags, (None, "fp32", "bf16")):
        yield rows._stats, {"e_ptr": saved}, {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "SAVE": saved is not None}
    for bias, softcap, entropy, dz in itertools.product(flags, flags, flags, ("fp32", "bf16")):
        yield dz_variant("fp32", dz, bias, softcap, entropy, False)
    for softcap, entropy, dz in itertools.product(flags, flags, ("fp32", "bf16")):
        yield dz_variant(dz, dz, False, softcap, entropy, True)
    for flag in flags:  # fp16 inputs save bf16 exponentials; the code is that of bf16 but for the last conversion
        yield dz_variant("fp32", "fp16", flag, flag, flag, False)
        yield dz_variant("bf16", "fp16", False, flag, flag, True)


def compile_for(arch, kernel, pointers, flags, n=8192):
    """(compiled kernel, warps) for rows of n columns."""
    shape = rows._shape(n)
    constants = {"BLOCK": shape["BLOCK"], **flags}
    for flag, pointer in (("HAS_BIAS", "bias"), ("SAVE", "e"), ("HAS_ENTROPY", "g_entropy"), ("SAVED", "shift")):
        if flags.get(flag) is False:
            constants[f"{pointer}_ptr"] = None
    signature, facts = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = TYPES.get(name) or "*" + (pointers.get(name) or "fp32")
        if signature[name].startswith("*") or name in MULTIPLES_OF_16:
            facts[(i,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=facts)
    options = {"num_warps": shape["num_warps"]}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options), shape["num_warps"]


def resources(compiled, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [cuobjdump, "--dump-resource-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def check(arch, kernel, pointers, flags, folder, n=8192):
    compiled, num_warps = compile_for(arch, kernel, pointers, flags, n)
    used = resources(compiled, folder)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"
    assert used["REG"] <= 128 and used["REG"] * num_warps * 32 <= 65536, used
    assert compiled.metadata.shared <= 99 * 1024
    # wide loads and stores only, beside the handful of scalars per row
    width = {"fp32": 4, "bf16": 2, "fp16": 2}
    per_thread = n // (num_warps * 32)
    ptx = compiled.asm["ptx"]
    loads = per_thread * width[pointers.get("x_ptr", "fp32")] // 16 + (per_thread * 4 // 16 if flags["HAS_BIAS"] else 0)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == loads
    out = pointers.get("dz_ptr") or pointers.get("e_ptr")
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == (per_thread * width[out] // 16 if out else 0)
    assert len(re.findall(r"(?:ld|st)\.global", ptx)) <= loads + (per_thread * width[out] // 16 if out else 0) + 7


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["_stats", "_dz"])
def test_every_variant(kernel, arch, tmp_path):
    variants = [v for v in combinations() if v[0] is getattr(rows, kernel)]
    assert len(variants) == {"_stats": 12, "_dz": 28}[kernel]
    for variant in variants:
        try:
            check(arch, *variant, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"{variant[0].fn.__name__} {variant[1:]}: {error}") from error


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_newest_target_and_widest_rows(tmp_path):
    heavy_stats = rows._stats, {"e_ptr": "fp32"}, {"HAS_BIAS": True, "HAS_SOFTCAP": True, "SAVE": True}
    for variant in (heavy_stats, dz_variant("bf16", "bf16", False, True, True, True)):
        check(100, *variant, tmp_path)
        check(90, *variant, tmp_path, n=16384)
        check(90, *variant, tmp_path, n=512)
