"""Programs and steps that point outside their memory are refused before anything is computed.

A bundle from a stranger has correct hashes and an arbitrary program; `fuzz.py` damages programs at random.

Draws: what is refused is refused whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from levels import DEVICE, LEVELS, pytestmark  # noqa: F401  pytest reads the mark from here
from programs import Machine, linear, matrix
from test_decoders import EXACT, built

from transom.contract import Artifact, Work
from transom.errors import EngineError
from transom.sparsity import Sparsity
from transom.testing.models import tiny_decoder
from transom_openvino_cpu import OpenVinoCpu, names
from transom_openvino_cpu.native.layout import KINDS
from transom_openvino_cpu.native.program import NativeProgram

each_level = pytest.mark.parametrize("level", LEVELS)
VOCABULARY = 61


@each_level
@pytest.mark.parametrize(
    ("tokens", "past", "pages", "rows"),
    [
        ([VOCABULARY], 0, [0], [0]),
        ([2**31], 0, [0], [0]),
        ([-1], 0, [0], [0]),
        ([1], 0, [4], [0]),
        ([1], 0, [-1], [0]),
        ([1], 64, [0], [0]),
        ([1], -1, [0], [0]),
        ([1], 2**31 - 2, [0], [0]),
        ([1], 0, [0], [1]),
        ([1], 0, [0], [-1]),
        ([], 0, [0], []),
    ],
    ids=[
        "token behind the table", "token of 33 bits", "negative token", "page behind the cache", "negative page",
        "too few pages", "negative length", "longest length", "row behind the step", "negative row", "no tokens",
    ],
)  # fmt: skip
def test_a_step_outside_the_memory_is_refused(
    tokens: list[int], past: int, pages: list[int], rows: list[int], level: str, rng: np.random.Generator
) -> None:
    with Machine(built(tiny_decoder(rng, layers=1), EXACT), level, pages=3) as machine:
        right = machine.rows(3)
        with pytest.raises(EngineError, match="outside the program's memory"):
            machine.engine.step([np.array(tokens, np.int64)], [past], [pages], rows)
        assert np.array_equal(machine.rows(3), right)


def _choice(program: NativeProgram) -> int:
    return next(i for i, op in enumerate(program.ops) if op.kind == "rows")


def _moved(program: NativeProgram, kind: str) -> NativeProgram:
    """The first operator of a kind once more, after the rows were chosen."""
    found = next(op for op in program.ops if op.kind == kind)
    at = _choice(program) + 1
    return replace(program, ops=(*program.ops[:at], found, *program.ops[at:]))


@each_level
@pytest.mark.parametrize("kind", ["embed", "rope", "attend", "rows"])
def test_a_program_that_needs_tokens_after_its_rows_were_chosen_is_refused(
    kind: str, level: str, rng: np.random.Generator
) -> None:
    """There may be more rows than tokens: positions, ids and keys of the rest would be foreign memory."""
    program, weights = built(tiny_decoder(rng, layers=1), EXACT)
    with pytest.raises(EngineError, match="does not fit the library"), Machine((_moved(program, kind), weights), level):
        pass


@each_level
@pytest.mark.parametrize(
    ("bits", "block", "columns"), [(5, 16, 64), (5, 40, 80), (6, 8, 64), (6, 24, 48), (6, 16, 48), (6, 48, 96)]
)
def test_quants_whose_planes_do_not_fit_their_blocks_are_refused(
    bits: int, block: int, columns: int, level: str, rng: np.random.Generator
) -> None:
    """The code for few rows reads the planes of whole units."""
    program, weights = linear(matrix(rng, "int8", 32, columns, block), np.ones((1, columns), np.float32), by="int8")
    with Machine((program, weights), level):
        pass
    kind = KINDS[f"uint{bits}"]
    matrices = tuple(replace(m, kind=kind) if m.kind == KINDS["uint8"] else m for m in program.matrices)
    with pytest.raises(EngineError, match="does not fit the library"):
        Machine((replace(program, matrices=matrices), weights), level)


@each_level
@pytest.mark.parametrize(
    ("form", "outer"), [("int8", 96), ("int8", 384), ("int8", -256), ("int8", 512), ("float32", 256)]
)
def test_superblocks_that_do_not_fit_their_matrix_are_refused(
    form: str, outer: int, level: str, rng: np.random.Generator
) -> None:
    """Blocks of 64 columns, 512 in all: a superblock has a multiple of four blocks, and floats have none."""
    by = "int8" if form == "int8" else "f32"
    program, weights = linear(matrix(rng, form, 32, 512, 64), np.ones((1, 512), np.float32), by=by)
    with Machine((program, weights), level):
        pass
    index = next(op.matrix for op in program.ops if op.kind == "linear")
    matrices = list(program.matrices)
    matrices[index] = replace(matrices[index], outer=outer, columns=256, rows=16)  # so that the memory is large enough
    ops = tuple(replace(op, width=16) if op.kind == "linear" else op for op in program.ops)
    with pytest.raises(EngineError, match="does not fit the library"):
        Machine((replace(program, ops=ops, matrices=tuple(matrices)), weights), level)


def _artifact(rng: np.random.Generator, folder: Path, damage: Callable[[NativeProgram], NativeProgram]) -> Artifact:
    """A compiled model whose program was altered."""
    backend = OpenVinoCpu()
    graph = tiny_decoder(rng, vocabulary=VOCABULARY)
    options = {"precision": "exact"}
    assert all(claim.ok for claim in backend.claim(graph, DEVICE, options))
    made = backend.compile(graph, DEVICE, options, lambda stage, share: None)
    files: dict[str, bytes | Path] = {}
    for name, content in made.files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        if name == names.PROGRAM_FILE:
            data = damage(NativeProgram.from_json(data.decode())).to_json().encode()
        (folder / name).write_bytes(data)
        files[name] = folder / name
    return Artifact(files, made.requires, made.notes)


def _short_table(program: NativeProgram) -> NativeProgram:
    """An embedding of 16 rows."""
    index = next(op.matrix for op in program.ops if op.kind == "embed")
    table = replace(program.matrices[index], rows=16)
    ops = tuple(replace(op, matrix=len(program.matrices)) if op.kind == "embed" else op for op in program.ops)
    return replace(program, ops=ops, matrices=(*program.matrices, table))


def _narrow_logits(program: NativeProgram) -> NativeProgram:
    buffers = list(program.buffers)
    buffers[program.output] = replace(buffers[program.output], width=VOCABULARY - 1)
    return replace(program, buffers=tuple(buffers))


def _other_layers(program: NativeProgram) -> NativeProgram:
    return replace(program, layers=tuple(replace(layer, kv_heads=1) for layer in program.layers))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_short_table, "an embedding has 16 rows for a vocabulary of 61"),
        (_narrow_logits, "the program has 60 logits for a vocabulary of 61"),
        (_other_layers, "other attention layers than the model"),
        (lambda program: replace(program, output=99), "list index|tuple index"),
    ],
    ids=["short table", "narrow logits", "other layers", "no such output"],
)
def test_an_artifact_whose_program_computes_another_model_is_damaged(
    damage: Callable[[NativeProgram], NativeProgram], said: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    artifact = _artifact(rng, tmp_path, damage)
    with pytest.raises(EngineError, match=f"This compiled model is damaged: .*({said})"):
        OpenVinoCpu().load(artifact, DEVICE, {"precision": "exact"}, tmp_path)


def test_an_artifact_that_was_not_altered_loads(tmp_path: Path, rng: np.random.Generator) -> None:
    artifact = _artifact(rng, tmp_path, lambda program: program)
    session = OpenVinoCpu().load(artifact, DEVICE, {"precision": "exact"}, tmp_path)
    (logits,) = session.step([Work(session.new_state(), [1, 2, 3], "last")])
    assert np.shape(logits) == (VOCABULARY,)
    session.close()


@each_level
def test_a_window_larger_than_any_memory_reads_everything_and_needs_no_more_memory(
    level: str, rng: np.random.Generator
) -> None:
    """Its scratch memory once followed the window, and what one request had asked for failed all later ones."""
    graph = tiny_decoder(rng, layers=1, context=1024)
    tokens = rng.integers(0, VOCABULARY, 300)
    pages = [list(range(5))]
    with Machine(built(graph, EXACT), level, pages=5) as machine:
        dense = machine.engine.step([tokens], [0], pages, [299])
        policy = machine.engine.policy(Sparsity(local_window=2**30, dense_below=0, top_k=2**30).to_string())
        route = machine.engine.new_route()
        try:
            got = machine.engine.step([tokens], [0], pages, [299], [policy], [route])
        finally:
            machine.engine.free_route(route)
        assert np.allclose(got, dense, atol=1e-4)
        assert np.array_equal(machine.engine.step([tokens], [0], pages, [299]), dense)
