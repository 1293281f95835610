"""What the kernels compile to, for cards that are not here."""

from __future__ import annotations

from typing import Any

import pytest
from calls import parts

from transom_cuda_triton.aot import SHARED_LIMIT, Compiled, compile_kernel
from transom_cuda_triton.kernels.append import append
from transom_cuda_triton.kernels.decode import attend_splits, merge_splits
from transom_cuda_triton.kernels.linear import multiply_few, multiply_many
from transom_cuda_triton.kernels.prefill import attend_blocks
from transom_cuda_triton.tiles import HEAD_SIZES, PREFILL

TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA"}
LISTS = dict.fromkeys(("BLOCKS", "PAGES", "FAR", "FAR_COUNT", "COLUMNS", "NEAR"), "*i32")
STRIDES = ("q_token", "k_page", "k_head", "v_page", "v_head", "out_token")
SIZES = dict.fromkeys((*STRIDES, "window", "most_pages", "most_far", "splits"), "i32")
FLAGS = {"CAPPED": False, "WINDOWED": False}


def arguments(dtype: str) -> dict[str, str]:
    tensors = dict.fromkeys(("Q", "K", "V", "OUT"), f"*{dtype}")
    floats = {"SINKS": "*fp32", "PARTS": "*fp32", "SHARES": "*fp32", "factor": "fp32", "cap": "fp32"}
    return {**tensors, **LISTS, **SIZES, **floats}


def compiled(kernel: Any, arch: int, dtype: str, warps: int, stages: int = 2, **constants: Any) -> Compiled:
    wanted = {name: kind for name, kind in arguments(dtype).items() if name in kernel.arg_names}
    return compile_kernel(kernel, arch, wanted, constants, warps, stages)


@pytest.mark.parametrize("arch", PREFILL)
def test_prefill_spills_nothing_and_uses_the_tensor_cores(arch: int) -> None:
    for size in HEAD_SIZES:
        tile, (head, rest) = PREFILL[arch][size], parts(size)
        for dtype in ("fp16", "bf16") if size == 128 else ("fp16",):
            made = compiled(
                attend_blocks, arch, dtype, tile.warps, tile.stages, GROUP=4, HEAD=head, HEAD_REST=rest, VALUE=head,
                VALUE_REST=rest, ROWS=tile.rows, KEYS=tile.keys, SPARSE=True, WITH_SINKS=False, **FLAGS,
            )  # fmt: skip
            assert made.spilled == 0, (size, dtype)
            assert made.shared <= SHARED_LIMIT[arch] * 1024
            assert made.blocks >= 1
            assert made.matrix_instructions().get(TENSOR_CORES[arch], 0) > 0
            assert "cp.async" in made.ptx, "tiles are loaded ahead"


@pytest.mark.parametrize("arch", PREFILL)
def test_decode_spills_nothing_and_uses_the_tensor_cores(arch: int) -> None:
    for size in (64, 128):
        shape = {"GROUP": 4, "VALUE": size, "VALUE_REST": 0, "ROWS": 16}
        made = compiled(attend_splits, arch, "fp16", 4, HEAD=size, HEAD_REST=0, KEYS=64, SPARSE=True, **FLAGS, **shape)
        assert made.spilled == 0
        assert made.matrix_instructions().get("HMMA", 0) > 0, "16 rows are too few for wgmma"
        assert compiled(merge_splits, arch, "fp16", 4, WITH_SINKS=True, **shape).spilled == 0


def test_code_for_another_architecture_is_another_code() -> None:
    shape = {"GROUP": 4, "VALUE": 64, "VALUE_REST": 0, "ROWS": 16, "WITH_SINKS": False}
    assert len({compiled(merge_splits, arch, "fp16", 4, **shape).cubin for arch in (80, 90)}) == 2


@pytest.mark.parametrize("arch", PREFILL)
def test_products_and_the_cache_spill_nothing(arch: int) -> None:
    """Of products the tensor cores are used by the one for many rows."""
    tensors = {"X": "*fp16", "QUANTS": "*u8", "SCALES": "*fp16", "OFFSETS": "*fp16", "OUT": "*fp16"}
    sizes = dict.fromkeys(("rows", "outputs", "columns", "x_token", "out_token"), "i32")
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
