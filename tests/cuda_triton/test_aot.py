"""What the kernels compile to, for cards that are not here."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from kernel_table import attention, merge, product

from transom_cuda_triton.aot import SHARED_LIMIT, CompiledKernel, compile_code, compile_kernel, compile_variant
from transom_cuda_triton.kernels.append import append
from transom_cuda_triton.kernels.decode import merge_splits
from transom_cuda_triton.kernels.linear import multiply_few, multiply_many
from transom_cuda_triton.tiles import (
    ARCHITECTURES,
    HEAD_SIZES,
    decode_tile,
    linear_tiles,
    parts,
    prefill_tile,
)

TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA"}
VARIANTS = {
    "prefill, lists": attention(80, 128, "fp16", decode=False),
    "prefill, dense with a window": attention(80, 64, "fp16", decode=False, sparse=False, WINDOWED=True),
    "decode": attention(80, 64, "fp16", decode=True),
    "merge": merge(64, "fp16"),
    "products of many rows": product(80, "fp16", bits=4, which=0),
    "products of one row": product(80, "fp16", bits=8, which=-1),
}
KINDS = {"i32": "u32", "fp32": "f32"}


def compiled(kernel: Any, arch: int, dtype: str, warps: int, stages: int = 2, **constants: Any) -> CompiledKernel:
    types = {
        **dict.fromkeys(("PARTS", "SHARES", "SINKS"), "*fp32"), "OUT": f"*{dtype}", "BLOCKS": "*i32",
        "out_token": "i32", "splits": "i32",
    }  # fmt: skip
    return compile_kernel(kernel, arch, types, constants, warps, stages)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.sweep(
    but=(
        "70",
        "89",
    )
)
def test_prefill_spills_nothing_and_uses_the_tensor_cores(arch: int) -> None:
    for size in HEAD_SIZES if arch in (80, 90) else (64, 128):
        for dtype in ("fp16", "bf16") if size == 128 and arch > 70 else ("fp16",):
            made = compile_variant(attention(arch, size, dtype, decode=False), arch)
            assert made.spilled == 0, (size, dtype)
            assert made.shared <= SHARED_LIMIT[arch] * 1024
            assert made.blocks >= 1
            if arch in TENSOR_CORES:
                assert made.matrix_instructions().get(TENSOR_CORES[arch], 0) > 0
                assert "cp.async" in made.ptx, "tiles are loaded ahead"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.sweep(
    but=(
        "70",
        "90",
    )
)
def test_decode_spills_nothing_and_uses_the_tensor_cores(arch: int) -> None:
    for size in (64, 128):
        made = compile_variant(attention(arch, size, "fp16", decode=True), arch)
        assert made.spilled == 0
        if arch in TENSOR_CORES:
            assert made.matrix_instructions().get("HMMA", 0) > 0, "16 rows are too few for wgmma"
        assert compile_variant(merge(size, "fp16"), arch).spilled == 0


@pytest.mark.parametrize("what", VARIANTS)
def test_a_launch_knows_every_parameter(what: str) -> None:
    """In their order: what is no constant, then pointers of Triton's own, which stay null."""
    variant = VARIANTS[what]
    made = compile_variant(variant, 80)
    types = dict(variant.types)
    assert set(made.arguments) == set(types)
    assert len(made.parameters) == len(types) + made.hidden
    assert made.hidden == 2 or triton.__version__ < "3.5"
    assert made.parameters == (*(KINDS.get(types[name], "u64") for name in made.arguments), *("u64",) * made.hidden)
    assert made.entry == variant.kernel.split(".")[1]
    assert made.warps == variant.warps
    assert {name for name, kind in types.items() if kind.startswith("*")} <= set(made.aligned)
    code = compile_code(variant, 80)
    assert (code.entry, code.arguments, code.parameters) == (made.entry, made.arguments, made.parameters)


def test_an_argument_that_is_none_is_no_parameter() -> None:
    shape = {"GROUP": 4, "VALUE": 64, "VALUE_REST": 0, "ROWS": 16, "WITH_SINKS": False}
    types = {
        "PARTS": "*fp32", "SHARES": "*fp32", "OUT": "*fp16", "BLOCKS": "*i32", "out_token": "i32", "splits": "i32",
    }  # fmt: skip
    made = compile_kernel(merge_splits, 80, types, {**shape, "SINKS": None})
    assert made.arguments == ("PARTS", "SHARES", "OUT", "BLOCKS", "out_token", "splits")
    assert len(made.parameters) == 6 + made.hidden
    made = compile_kernel(merge_splits, 80, {n: t for n, t in types.items() if n != "splits"}, {
        **shape, "SINKS": None, "splits": 1,
    })  # fmt: skip
    assert made.arguments == ("PARTS", "SHARES", "OUT", "BLOCKS", "out_token"), "nor is one whose value is known"


def test_arguments_without_a_type_or_a_value_are_refused() -> None:
    with pytest.raises(ValueError, match="splits"):
        compile_kernel(merge_splits, 80, {"PARTS": "*fp32"}, {})
    with pytest.raises(ValueError, match="nonsense"):
        compiled(merge_splits, 80, "fp16", 4, GROUP=4, VALUE=64, VALUE_REST=0, ROWS=16, WITH_SINKS=False, nonsense=1)


def test_tiles_of_sizes_and_architectures_without_a_table() -> None:
    assert prefill_tile(80, 16, "fp16") == prefill_tile(80, 64, "bf16")
    assert decode_tile(90, 112, "fp16") == decode_tile(90, 128, "fp16")
    assert prefill_tile(80, 64, "fp32") != prefill_tile(80, 64, "fp16")
    for call in (prefill_tile, decode_tile):
        with pytest.raises(ValueError, match="exceed 256"):
            call(80, 257, "fp16")
        with pytest.raises(ValueError, match="sm_75"):
            call(75, 64, "fp16")
        with pytest.raises(ValueError, match="bfloat16"):
            call(70, 64, "bf16")
    with pytest.raises(ValueError, match="sm_75"):
        linear_tiles(75, "fp16")
    assert [p.rows for p in linear_tiles(80, "fp16").many] == sorted(p.rows for p in linear_tiles(80, "fp16").many)


def test_head_sizes_are_sums_of_two_powers_of_two() -> None:
    assert [parts(size) for size in (16, 64, 80, 96, 192, 256)] == [
        (16, 0), (64, 0), (64, 16), (64, 32), (128, 64), (256, 0),
    ]  # fmt: skip
    assert (parts(128, 64), parts(256, 128), parts(192, 128)) == ((64, 64), (128, 128), (128, 64))
    assert parts(64, 64) == (64, 0)
    for size, most in ((112, 256), (72, 256), (256, 64)):
        with pytest.raises(ValueError, match=f"A head of {size}"):
            parts(size, most)


def test_code_for_another_architecture_is_another_code() -> None:
    shape = {"GROUP": 4, "VALUE": 64, "VALUE_REST": 0, "ROWS": 16, "WITH_SINKS": False}
    assert len({compiled(merge_splits, arch, "fp16", 4, **shape).cubin for arch in (80, 90)}) == 2


@pytest.mark.parametrize("arch", TENSOR_CORES)
def test_products_and_the_cache_spill_nothing(arch: int) -> None:
    """Of products the tensor cores are used by the one for many rows."""
    tensors = {"X": "*fp16", "QUANTS": "*u8", "SCALES": "*fp16", "OFFSETS": "*fp16", "OUT": "*fp16"}
    sizes = dict.fromkeys(("rows", "outputs", "blocks", "x_token", "out_token"), "i32")
    form = {"BITS": 4, "BLOCK": 32, "OFFSET": False, "ZERO": 8}
    many = compile_kernel(
        multiply_many, arch, tensors | sizes, {"ROWS": 64, "OUTPUTS": 64, "WIDTH": 32, **form}, warps=4
    )
    assert many.spilled == 0
    assert many.matrix_instructions().get(TENSOR_CORES[arch], 0) > 0
    named = {name: kind for name, kind in (tensors | sizes).items() if name in multiply_few.arg_names}
    assert compile_kernel(multiply_few, arch, named, {"OUTPUTS": 16, "WIDTH": 64, **form}, warps=4).spilled == 0
    named = {
        **dict.fromkeys(("NEW_K", "NEW_V", "K", "V", "MEANS", "VARIANCES"), "*fp16"), "COS": "*fp32", "SIN": "*fp32",
        **dict.fromkeys(("COUNTS", "BLOCKS", "PAGES"), "*i32"),
        **dict.fromkeys(("k_token", "v_token", "k_page", "k_head", "v_page", "v_head", "most_pages"), "i32"),
    }  # fmt: skip
    widths = {"HALF_WIDTH": 64, "REST_WIDTH": 0, "VALUE_WIDTH": 128}
    constants = {"HEAD": 128, "VALUE": 128, "ROTATED": 128, "INTERLEAVED": False, **widths}
    assert compile_kernel(append, arch, named, constants, warps=8).spilled == 0
