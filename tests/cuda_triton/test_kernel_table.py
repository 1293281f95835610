"""docs/kernels.md says what the kernels compile to, and lists cost little in the main loops."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import triton
from kernel_efficiency import Loop, main_loops
from kernel_table import GROUP, KernelEntry, KernelRow, entries, loops, measure, ratios, resources

from transom.programs.written import AttentionLayer, RopeTable, View
from transom_cuda_triton.aot import SHARED_LIMIT
from transom_cuda_triton.program import TritonOp, TritonProgram
from transom_cuda_triton.tiles import ARCHITECTURES, HEAD_SIZES, TENSOR_CORES

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
LEAST_EFFICIENCY = 0.9
"""Of a tile of a list, cycles of a dense one over its own, by the model."""
LEAST_BY_ISSUE = 0.7
SAMPLE = [
    *(("prefill.attend_blocks", f"{size} fp16", arch) for size, arch in ((64, 80), (128, 80), (128, 90), (256, 90))),
    ("prefill.attend_blocks", "128 bf16", 90), ("prefill.attend_blocks", "128 fp16, dense", 86),
    ("decode.attend_splits", "64 fp16", 90), ("decode.attend_splits", "128 fp16", 80),
    ("linear.multiply_many", "int4, fp16", 89), ("linear.multiply_few", "int8, fp16", 80),
    *(("linear.multiply_many_float8", "multiply_many_float8, bf16", arch) for arch in (89, 90)),
    ("append.append", "128 fp16", 90), ("scores.measure_rows", "measure_rows, 128 fp16, blocks", 80),
    ("norm.rms_norm", "rms_norm, with a sum, bf16", 86), ("sample.sample", "sample", 80),
]  # fmt: skip
"""(kernel, what, architecture) of rows that are made again; the first of each name."""
VOLTA = [("prefill.attend_blocks", f"{size} fp16", 70) for size in (64, 128)] + [
    ("decode.attend_splits", f"{size} fp16", 70) for size in (64, 128)
]

# Those that may spill on sm_70.
ON_VOLTA = ("columns.choose_columns", "scores.measure_rows", "scores.score_units")


@cache
def row(kernel: str, what: str, arch: int) -> KernelRow:
    return measure(entry(kernel, what, arch))


def entry(kernel: str, what: str, arch: int) -> KernelEntry:
    return next(e for e in entries() if (e.variant.kernel, e.what, e.arch) == (kernel, what, arch))


@pytest.mark.parametrize(("kernel", "what", "arch"), [*SAMPLE, *VOLTA])
def test_the_document_says_what_the_kernels_compile_to(kernel: str, what: str, arch: int) -> None:
    """Another Triton than the one that it names may need other registers, but must spill none."""
    made, text = row(kernel, what, arch), DOCUMENT.read_text(encoding="utf-8")
    assert made.spilled == 0
    assert made.shared <= SHARED_LIMIT[arch] * 1024
    assert made.blocks >= 1
    if made.entry.need:
        assert made.matrix is not None
        assert sum(made.matrix.values()) >= made.entry.need
    named = re.search(r"with Triton ([\w.]+);", text)
    assert named
    if named[1] == triton.__version__:
        lines = [resources(made), *([*loops(made), ratios(made)] if made.attention else [])]
        assert [line for line in lines if line not in text.splitlines()] == [], "run: make aot"


@pytest.mark.parametrize(
    ("kernel", "size", "arch"),
    [("prefill.attend_blocks", size, arch) for arch in (80, 90) for size in (64, 128)]
    + [("decode.attend_splits", 128, 80), ("decode.attend_splits", 64, 90)],
)
def test_a_list_costs_little_in_the_main_loop(kernel: str, size: int, arch: int) -> None:
    found = row(kernel, f"{size} fp16", arch).attention
    assert found is not None
    assert found.efficiency >= LEAST_EFFICIENCY
    assert found.issue_efficiency >= LEAST_BY_ISSUE
    for loop in (found.listed, found.dense):
        assert not loop.serialized, "products wait for each other"
    assert found.listed.classes["matrix"] == found.dense.classes["matrix"]
    assert found.listed.classes["special"] == found.dense.classes["special"]


def test_the_document_has_every_row_and_almost_nothing_spills() -> None:
    """What is for checking may (float32), and on sm_70, with plain cores, what chooses for heads of 256."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    for e in entries():
        mine = [line.split(" | ") for line in lines if line.startswith(f"| {e.what} | {e.tile} | sm_{e.arch} | ")]
        assert mine, e
        if e.exact or (e.arch == 70 and e.variant.kernel in ON_VOLTA):
            continue
        assert {spilled for _, _, _, _, spilled, *_ in mine} == {"0"}, e
    for size in HEAD_SIZES:
        for arch in TENSOR_CORES:
            starts = tuple(f"| prefill, {size} | sm_{arch} | {digit}" for digit in "01")
            ratio = next(line.split(" | ") for line in lines if line.startswith(starts))
            assert float(ratio[2]) >= LEAST_EFFICIENCY


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_has_what_an_engine_launches(arch: int) -> None:
    """For a layer of the table's own sizes: attention and the cache with the same types, constants and warps."""
    pytest.importorskip("torch")
    from transom_cuda_triton.attention import Attend

    size, number = 128, "fp16"
    layer = AttentionLayer(32, 32 // GROUP, size, size, 0, size**-0.5, 0.0, -1)
    program = TritonProgram(number, (), (), (RopeTable(0, size // 2, 1.0),), (layer,), (), 9, 0, 0, "")
    op = TritonOp("attend", 32 * size, View(0), View(0), View(1), View(2), rope=0)
    listed = {e.variant for e in entries() if e.arch == arch}
    launched = [v for v in Attend(op, program, arch, processors=1).variants() if v.kernel != "decode.merge_splits"]
    assert {v.kernel for v in launched} == {"append.append", "prefill.attend_blocks", "decode.attend_splits"}
    assert [v for v in launched if v not in listed] == []


def test_a_loop_is_what_lies_between_a_branch_and_where_it_goes() -> None:
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/                   MUFU.EX2 R2, R2 ;
        /*0030*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], [R6.64] ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0070*/              @!P1 BRA 0x60 ;
        /*0080*/                   EXIT ;
        /*0090*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*00a0*/                   BRA 0x20 ;
    """
    (loop,) = main_loops(code, 80)
    assert (len(loop.instructions), loop.classes["matrix"], loop.classes["copy"]) == (5, 1, 2)
    assert loop.cycles == {
        "issue": 5, "matrix": 8, "special": 8, "shared": 32, "level 2": pytest.approx(512 * 4 * 108 / 5120),
    }  # fmt: skip
    assert loop.binds == "level 2"
    assert main_loops(code, 86)[0].cycles["matrix"] == 16


def test_operands_of_wgmma_are_read_from_shared_memory() -> None:
    both = Loop(90, ("HGMMA.64x128x16.F32 R24, gdesc[UR8], R24",))
    assert (both.cycles["matrix"], both.cycles["shared"]) == (64, (64 + 128) * 16 * 2 / 128)
    one = Loop(90, ("HGMMA.64x128x16.F32 R24, R88, gdesc[UR8].tnspB, R24, gsb0",))
    assert one.cycles["shared"] == 128 * 16 * 2 / 128
    assert Loop(90, (*one.instructions, "WARPGROUP.DEPBAR.LE gsb0, 0x0")).serialized
