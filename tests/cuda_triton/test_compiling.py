"""Whole decoders compiled ahead of time, for cards that are not here: every kernel that may be launched is there.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cards import A100

from transom.contract import Artifact, Cancelled, Device
from transom.errors import EngineError, OptionError
from transom.graph import Blocked, Graph
from transom.graph.weights import dense
from transom.sparsity import Sparsity
from transom.testing.models import tiny_decoder
from transom_cuda_triton import CudaTriton, compiling, loading
from transom_cuda_triton.packing import narrowed, packable
from transom_cuda_triton.program import TritonProgram
from transom_cuda_triton.tiles import float8_tiles
from transom_cuda_triton.variants import Code, KernelVariant

BACKEND = CudaTriton()


def compiled(graph: Graph, device: Device, **options: object) -> Artifact:
    assert all(c.ok for c in BACKEND.claim(graph, device, options))
    return BACKEND.compile(graph, device, options, lambda stage, share: None)


def in_files(artifact: Artifact, folder: Path) -> dict[str, Path]:
    files = {}
    for name, content in artifact.files.items():
        files[name] = folder / name
        files[name].write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return files


@pytest.fixture(scope="module")
def graph(shared_rng: Any) -> Graph:
    return tiny_decoder(shared_rng("a decoder to compile"), weights="uint4_minimums", sinks=True, softcap=9.0, window=5)


@pytest.mark.parametrize(("arch", "number"), [("sm_70", "float16"), ("sm_80", "bfloat16"), ("sm_90", "bfloat16")])
@pytest.mark.sweep(
    but=(
        "sm_70-float16",
        "sm_90-bfloat16",
    )
)
def test_an_artifact_has_all_that_a_card_needs(arch: str, number: str, graph: Graph, tmp_path: Path) -> None:
    """Loading compiles nothing: the list in the artifact is the engine's own."""
    device = replace(A100, arch=arch)
    artifact = compiled(graph, device)
    assert any(number in note for note in artifact.notes)
    assert ("not used the tensor cores of sm_70" in " ".join(artifact.notes)) == (arch == "sm_70")
    files = in_files(artifact, tmp_path)
    codes = loading.read_codes(files)
    program = TritonProgram.from_json(files["program-0.json"].read_text())
    wanted = compiling.variants_of(program, int(arch[3:]))
    assert list(codes) == wanted
    for variant, code in codes.items():
        assert code.cubin.startswith(b"\x7fELF"), variant.kernel
        assert set(code.arguments) == {name for name, _ in variant.types}, variant.kernel
        assert len(code.parameters) >= len(code.arguments)
    assert BACKEND.check(artifact, device).state == "ok"
    assert BACKEND.check(artifact, replace(A100, arch="sm_86")).state == "rebuild"


def test_codes_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    variant = KernelVariant.of(
        "a.b", {"X": "*fp16", "n": "i32"}, {"WIDTH": 16, "FLAG": True, "NONE": None, "F": 0.5}, 8, 3
    )
    codes = {variant: Code("entry", b"abc", 1, 8, ("X", "n"), ("u64", "u32", "u64"))}
    files = in_files(Artifact(compiling.code_files(codes), {}), tmp_path)
    assert loading.read_codes(files) == codes


@pytest.mark.parametrize("damage", ["cut", "no list", "no code", "not JSON"])
def test_damaged_machine_code_is_an_error(damage: str, tmp_path: Path) -> None:
    codes = {KernelVariant.of("a.b", {}, {}): Code("entry", b"abcdef", 0, 4, (), ())}
    files = in_files(Artifact(compiling.code_files(codes), {}), tmp_path)
    if damage == "cut":
        files["kernels.bin"].write_bytes(b"abc")
    elif damage == "not JSON":
        files["kernels.json"].write_text("{")
    else:
        del files["kernels.json" if damage == "no list" else "kernels.bin"]
    with pytest.raises(EngineError, match="damaged"):
        loading.read_codes(files)


def test_cancelling_leaves_nothing_behind(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def cancel(stage: str, share: float | None) -> None:
        if stage == "kernels":
            raise Cancelled

    with pytest.raises(Cancelled):
        BACKEND.compile(graph, A100, {}, cancel)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("transom-")]


def test_a_kernel_that_cannot_be_compiled_is_an_error_with_tritons_words() -> None:
    wrong = KernelVariant.of("gate.gate", {"GATE": "*fp16"}, {"WIDTH": 17})
    with pytest.raises(EngineError, match=r"cannot compile gate\.gate for sm_80"):
        compiling.compile_all([wrong], 80, lambda share: None)


def test_without_a_card_loading_is_an_error_in_words(graph: Graph, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a card is here")
    files = in_files(compiled(graph, A100), tmp_path)
    with pytest.raises(EngineError, match="finds no CUDA card"):
        BACKEND.load(Artifact(files, {}), A100, {}, tmp_path)


@pytest.mark.parametrize(
    ("arch", "instructions"), [("sm_89", ("QMMA",) * 3), ("sm_90", ("HMMA", "QGMMA", "QGMMA"))], ids=["sm_89", "sm_90"]
)
@pytest.mark.sweep(but=("sm_90",))
def test_float8_goes_through_the_tensor_cores(
    arch: str, instructions: tuple[str, ...], rng: Any, tmp_path: Any
) -> None:
    """On sm_90 the smallest tile has too few rows for products of four warps: its codes are widened to float16."""
    from transom_cuda_triton.aot import compile_variant

    artifact = compiled(tiny_decoder(rng), replace(A100, arch=arch), precision="fp8")
    assert any("quantized to fp8" in note for note in artifact.notes)
    codes = loading.read_codes(in_files(artifact, tmp_path))
    float8 = [v for v in codes if ("QUANTS", "*fp8e4nv") in v.types or ("CODES", "*fp8e4nv") in v.types]
    many = [v for v in float8 if v.kernel == "linear.multiply_many_float8"]
    assert {v.kernel.split(".")[1] for v in float8} == {"multiply_few_float8", "multiply_many_float8", "quantize_rows"}
    assert all(compile_variant(v, int(arch[3:])).spilled == 0 for v in float8)
    for variant, name in zip(many, instructions, strict=True):
        assert compile_variant(variant, int(arch[3:])).matrix_instructions()[name] > 0, variant


# what a card or a checkpoint cannot have ----------------------------------------------------------------------------
def test_bfloat16_needs_sm_80(graph: Graph) -> None:
    with pytest.raises(OptionError, match="needs sm_80"):
        BACKEND.claim(graph, replace(A100, arch="sm_70"), {"precision": "bf16"})


def test_float8_needs_sm_89(graph: Graph) -> None:
    with pytest.raises(OptionError, match="of sm_89 or newer, and this is sm_80") as found:
        BACKEND.claim(graph, A100, {"precision": "fp8"})
    assert "precision='int8'" in str(found.value)
    with pytest.raises(ValueError, match="sm_89 or sm_90 for float8, not sm_80"):
        float8_tiles(80)


def test_four_bits_are_refused_where_there_are_none(rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match="has none"):
        BACKEND.claim(tiny_decoder(rng), A100, {"precision": "int4"})


def test_a_weight_beyond_float16_is_refused_with_its_size(rng: np.random.Generator) -> None:
    large = dense(np.array([[1.0, 70000.0]], np.float32))
    with pytest.raises(OptionError, match=r"up to 7e\+04, and float16 ends at 65504"):
        narrowed(large, "fp16", "a matrix")
    assert np.isfinite(narrowed(large, "bf16", "a matrix").astype(np.float32)).all()
    infinite = dense(np.array([[np.inf]], np.float32))
    assert np.isinf(narrowed(infinite, "fp16", "a matrix")), "what was infinite before is found when it is run"


@pytest.mark.parametrize("size", [112, 272])
def test_head_sizes_that_no_tile_serves_are_refused(size: int, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, head_dim=size, q_heads=2, kv_heads=1)
    reasons = [c.reason for c in BACKEND.claim(graph, A100, {}) if not c.ok]
    assert reasons
    assert all(str(size) in reason for reason in reasons)


@pytest.mark.parametrize(("block", "ok"), [(32, True), (128, True), (24, False), (4, False)])
def test_blocks_have_to_be_powers_of_two(block: int, ok: bool) -> None:
    weight = Blocked((2, block * 3), block, "int4", "float16", lambda: None)  # type: ignore[arg-type, return-value]
    assert (packable(weight) == "") == ok


def test_policies_are_part_of_what_is_compiled(rng: np.random.Generator) -> None:
    """A model that is loaded with units of 64 has the kernels for them, and for requests with those of 16."""
    from transom_cuda_triton.routes import units_of

    def program(policy: Sparsity) -> Any:
        return replace(TritonProgram("fp16", (), (), (), (), (), 0, 0, 0, ""), sparsity=policy.to_string())

    assert units_of(program(Sparsity(0.9, unit=64))) == [16, 64]
    assert units_of(program(Sparsity(1.0))) == [16]
