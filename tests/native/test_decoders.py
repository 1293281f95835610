"""Whole decoders: lowered to a program, run by the native library, and compared with the NumPy reference.

Draws: float32 agrees to 1e-5, a hundred times its rounding. What narrower arithmetic costs a random model has no
formula: one of eight draws must be within `GARBAGE` (`redraws.one_within`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import FAMILIES, tiny
from levels import DEVICE, EVERY, LEVELS, NATIVE, hatch_build, pytestmark  # noqa: F401  pytest reads the mark from here
from programs import Machine, error
from redraws import one_within

from transom.errors import EngineError
from transom.graph import Graph
from transom.graph.builder import WEIGHT_META
from transom.graph.weights import dense
from transom.programs.reading import GraphReader, UnsupportedNode
from transom.sources import resolve
from transom.testing.bench import ReferenceOracle
from transom.testing.models import VARIANTS, tiny_decoder
from transom_openvino_cpu.native import choosing, library
from transom_openvino_cpu.native.abilities import NativeKernels
from transom_openvino_cpu.native.lowering import write
from transom_openvino_cpu.native.program import NativeProgram
from transom_openvino_cpu.precision import CpuPrecision

Array = np.ndarray[Any, np.dtype[Any]]

EXACT = CpuPrecision("exact", "f32", False)
BFLOAT16 = CpuPrecision("bf16", "bf16", False)
INT8 = CpuPrecision("int8", "f32", True)
INT8_ALL = CpuPrecision("int8", "f32", True, dense_to_int8=True)
INT8_NARROW = CpuPrecision("int8", "bf16", True)

GARBAGE = {"exact": 5e-5, "bf16": 0.1, "int8": 0.3}
"""Normalized error of a row of logits that rounding does not explain."""

each_level = pytest.mark.parametrize("level", LEVELS)

DECODERS: dict[str, dict[str, Any]] = {
    **{name: dict(keywords) for name, keywords in VARIANTS.items() if not keywords.get("attention_bias")},
    "head of 32, value of 48": {"head_dim": 32, "value_dim": 48},
    "head of 80": {"head_dim": 80, "softcap": 15.0},
    "head of 128, one for eight": {"head_dim": 128, "q_heads": 8, "kv_heads": 1, "sinks": True},
    "head of 256, value of 16": {"head_dim": 256, "value_dim": 16, "window": 70},
    "head of 64, value of 256": {"head_dim": 64, "value_dim": 256, "rotated": 20},
    "a long window": {"window": 65, "head_dim": 32},
    "blocks of 16": {"weights": "uint4_zero_points", "block": 16, "linear_bias": True},
    "blocks of 8": {"weights": "int4", "block": 8, "final_softcap": 20.0},
    "blocks of 64": {"weights": "uint4_zero_points", "block": 64, "hidden": 128, "inner": 192},
    "blocks of 128": {"weights": "uint4_minimums", "block": 128, "hidden": 256, "inner": 128, "q_heads": 8},
    "int8 blocks of 128": {"weights": "int8", "block": 128, "hidden": 128, "inner": 384, "q_heads": 8},
    "gates of no whole tiles": {"inner": 90, "hidden": 80},
    "wide vocabulary": {"vocabulary": 333, "weights": "uint4_minimums"},
    "all but a bias of scores": {
        "window": 4, "softcap": 8.0, "sinks": True, "linear_bias": True, "weights": "uint4_minimums", "rotated": 8,
        "final_softcap": 9.0, "value_dim": 32,
    },
}  # fmt: skip


def _written(drafting: GraphReader, precision: CpuPrecision) -> tuple[NativeProgram, bytes]:
    file = BytesIO()
    program = write(drafting, precision, file, lambda share: None)
    return NativeProgram.from_json(program.to_json()), file.getvalue()


def built(graph: Graph, precision: CpuPrecision) -> tuple[NativeProgram, bytes]:
    return _written(GraphReader(graph, NativeKernels(precision)), precision)


class Steps:
    """Random ragged steps over some sequences that come to an end; two of them begin with the same page."""

    def __init__(self, rng: np.random.Generator, oracle: ReferenceOracle) -> None:
        vocabulary = oracle.decoder.vocabulary
        lengths = [int(n) for n in (rng.integers(1, 12), rng.integers(66, 90), rng.integers(120, 160))]
        self.texts = [rng.integers(0, vocabulary, n).tolist() for n in lengths]
        self.texts[1][:64] = self.texts[2][:64]
        self.wanted = [oracle.logits(text) for text in self.texts]
        needed = [-(-n // 64) for n in lengths]
        self.count = sum(needed)
        free = rng.permutation(self.count).tolist()
        self.pages = [[free.pop() for _ in range(n)] for n in needed]
        self._rng = rng

    def run(self, machine: Machine) -> Iterator[tuple[Array, Array]]:
        """Pairs of logits: got and wanted, [rows, vocabulary]."""
        rng, done = self._rng, [0] * len(self.texts)
        pages = [list(p) for p in self.pages]
        while any(d < len(t) for d, t in zip(done, self.texts, strict=True)):
            if done[1] == 0 and done[2] >= 64:  # the second starts from the first page of the third
                pages[1][0], done[1] = pages[2][0], 64
            ready = [s for s, t in enumerate(self.texts) if done[s] < len(t) and (s != 1 or done[1])]
            chosen = rng.permutation(ready)[: int(rng.integers(1, len(ready) + 1))].tolist()
            sizes = [int(n) for n in rng.choice([1, 1, 1, 2, 3, 5, 31, 40, 64, 70], len(chosen))]
            news = [min(n, len(self.texts[s]) - done[s]) for n, s in zip(sizes, chosen, strict=True)]
            tokens = [np.array(self.texts[s][done[s] : done[s] + n]) for s, n in zip(chosen, news, strict=True)]
            past = [done[s] for s in chosen]
            wanted = np.concatenate([self.wanted[s][done[s] : done[s] + n] for s, n in zip(chosen, news, strict=True)])
            rows = sorted(rng.choice(len(wanted), int(rng.integers(1, len(wanted) + 1)), replace=False).tolist())
            yield machine.engine.step(tokens, past, [pages[s] for s in chosen], rows), wanted[rows]
            for s, n in zip(chosen, news, strict=True):
                done[s] += n


def _errors(made: tuple[NativeProgram, bytes], level: str, steps: Steps, threads: int) -> tuple[float, float]:
    """Normalized error of all logits together, and of the worst row."""
    with Machine(made, level, threads=threads, pages=steps.count) as machine:
        got, wanted = (np.concatenate(rows) for rows in zip(*steps.run(machine), strict=True))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)), error(got, wanted)


# -------------------------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_agrees_with_the_reference(name: str, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, **DECODERS[name])
    steps = Steps(rng, ReferenceOracle(graph))
    made = built(graph, EXACT)
    for level in LEVELS:
        whole, row = _errors(made, level, steps, int(rng.integers(1, 4)))
        assert whole < 1e-5, level
        assert row < 5e-5, level


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.sweep(  # the test above has each form in float32
    but=(
        "gqa",
        "window",
        "sinks",
        "linear_bias",
        "bfloat16",
        "int4",
        "int8",
        "uint4_minimums",
        "uint4_zero_points",
        "head of 80",
        "blocks of 64",
        "all but a bias of scores",
    )
)
def test_a_decoder_in_fewer_bits_is_near_the_reference(name: str, rng: np.random.Generator) -> None:
    """The bounds only exclude garbage; the rounding of each operator is tested in test_kernels.py."""
    _assert_near(lambda draw: tiny_decoder(rng, **DECODERS[name]), rng, (BFLOAT16, INT8, INT8_ALL, INT8_NARROW), LEVELS)


def test_levels_that_trap_too_often_for_all_tests_are_near_the_reference(rng: np.random.Generator) -> None:
    _assert_near(lambda draw: tiny_decoder(rng, **DECODERS["uint4_minimums"]), rng, (INT8,), EVERY)


def _assert_near(
    graph_of: Callable[[int], Graph],
    rng: np.random.Generator,
    precisions: Sequence[CpuPrecision],
    levels: Sequence[str],
) -> None:
    """The worst row of logits is within `GARBAGE`, for all precisions and levels of one of eight draws.

    Args:
        graph_of: draws a model; takes the number of the draw.
    """

    def measure(draw: int) -> list[tuple[CpuPrecision, str, float]]:
        graph = graph_of(draw)
        steps = Steps(rng, ReferenceOracle(graph))
        programs = [(precision, built(graph, precision)) for precision in precisions]
        return [(p, level, _errors(made, level, steps, 1)[1]) for p, made in programs for level in levels]

    one_within(measure, lambda errors: all(off < GARBAGE[precision.name] for precision, _, off in errors))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", [EXACT, BFLOAT16, INT8_ALL], ids=lambda p: p.name)
def test_every_family_is_lowered_and_agrees_with_the_reference(
    family: str, precision: CpuPrecision, tmp_path: Path, rng: np.random.Generator
) -> None:
    settings = {"head_dim": 32} if FAMILIES[family].get("head_dim") == 24 else {}

    def graph_of(draw: int) -> Graph:
        folder = tmp_path / f"model {draw}"
        tiny(family, folder, rng, **settings)
        return resolve(str(folder)).open(folder).graph

    _assert_near(graph_of, rng, (precision,), LEVELS)


# ------------------------------------------------------------------------------------------------------------- refusals
def _reason(graph: Graph, precision: CpuPrecision = EXACT) -> str:
    with pytest.raises(UnsupportedNode) as caught:
        GraphReader(graph, NativeKernels(precision))
    return caught.value.reason


def test_what_the_library_cannot_run_is_refused_with_the_reason(rng: np.random.Generator) -> None:
    assert _reason(tiny_decoder(rng, attention_bias=True)) == "no kernel for Concat"  # the bias's first node
    assert "width is not a multiple of 16" in _reason(tiny_decoder(rng, head_dim=24))
    assert "24 columns" in _reason(tiny_decoder(rng, value_dim=24))
    assert "272 columns" in _reason(tiny_decoder(rng, value_dim=272))
    graph = tiny_decoder(rng)
    for node in graph.nodes():
        if node.op_type == "CachedAttention":
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
    assert "causal" in _reason(graph)


def test_a_graph_that_is_refused_says_the_node(rng: np.random.Generator) -> None:
    said = choosing.read_native(tiny_decoder(rng, value_dim=24), EXACT, DEVICE)
    assert isinstance(said, str)
    assert said.startswith("layers.0.attention: heads of 24 columns")


def test_float16_is_refused(rng: np.random.Generator) -> None:
    said = choosing.read_native(tiny_decoder(rng), CpuPrecision("f16", "f16", False), DEVICE)
    assert isinstance(said, str)
    assert "float16" in said


def test_the_variable_leaves_the_library_alone(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choosing.read_native(tiny_decoder(rng), EXACT, DEVICE), GraphReader)
    monkeypatch.setenv("TRANSOM_NATIVE", "0")
    assert choosing.read_native(tiny_decoder(rng), EXACT, DEVICE) == "TRANSOM_NATIVE=0 is set"


def test_a_processor_without_any_feature_gets_the_scalar_code() -> None:
    assert library.level_for(replace(DEVICE, features=frozenset())) == "scalar"
    assert library.level_for(replace(DEVICE, features=DEVICE.features | {"avx2", "fma", "f16c"})) != "scalar"


def test_the_library_has_the_code_of_every_unit_and_the_processors_best_is_taken() -> None:
    units = {unit.removeprefix("level_") for unit in hatch_build().LEVELS}
    assert units == set(library.LEVELS) == set(library.built_levels())
    assert library.level_for(DEVICE) == NATIVE[0]


def test_the_variable_limits_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for level in library.LEVELS:
        monkeypatch.setenv("TRANSOM_NATIVE_LEVEL", level)
        order = list(library.LEVELS)
        best = next(name for name in order[order.index(level) :] if name in NATIVE)
        assert library.level_for(DEVICE) == best


# --------------------------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize(
    "damage",
    [
        lambda p: replace(p, output=len(p.buffers)),
        lambda p: replace(p, buffers=(replace(p.buffers[0], width=16), *p.buffers[1:])),
        lambda p: replace(p, buffers=(*p.buffers, replace(p.buffers[0], width=(1 << 24) + 16))),
        lambda p: replace(p, ops=(replace(p.ops[0], width=32), *p.ops[1:])),
        lambda p: replace(p, ops=(replace(p.ops[0], matrix=len(p.matrices)), *p.ops[1:])),
        lambda p: replace(p, ops=(replace(p.ops[0], dst=replace(p.ops[0].dst, offset=1)), *p.ops[1:])),
        lambda p: replace(p, matrices=tuple(replace(m, columns=m.columns + 8) for m in p.matrices)),
        lambda p: replace(p, matrices=tuple(replace(m, kind=5) for m in p.matrices)),
        lambda p: replace(p, layers=tuple(replace(x, head_dim=20) for x in p.layers)),
        lambda p: replace(p, layers=tuple(replace(x, kv_heads=3) for x in p.layers)),
        lambda p: replace(p, layers=p.layers[:1]),
        lambda p: replace(p, ropes=()),
        lambda p: replace(p, ropes=tuple(replace(r, count=r.count + 1) for r in p.ropes)),
    ],
)
def test_a_damaged_program_is_refused(damage: Any, rng: np.random.Generator) -> None:
    program, weights = built(tiny_decoder(rng, weights="int4"), EXACT)
    for level in LEVELS:
        with pytest.raises(EngineError, match="does not fit the library"):
            Machine((damage(program), weights), level)


def test_weights_that_were_cut_off_are_refused(rng: np.random.Generator) -> None:
    program, weights = built(tiny_decoder(rng), EXACT)
    with pytest.raises(EngineError, match="damaged"):
        Machine((program, weights[:-1]), LEVELS[0])


def _spoil(graph: Graph, name: str) -> None:
    """One number of a weight becomes NaN."""
    value = graph.model.graph.initializers[name]
    array = value.meta[WEIGHT_META].load().copy()
    array.reshape(-1)[array.size // 2] = np.nan
    value.meta[WEIGHT_META] = dense(array)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # NumPy's, of NaN rounded to int8
@each_level
@pytest.mark.parametrize(
    "precision", [EXACT, BFLOAT16, INT8_ALL, INT8_NARROW], ids=["f32", "bf16", "int8", "int8 bf16"]
)
@pytest.mark.parametrize("weight", ["q", "k", "attention_norm"])
@pytest.mark.parametrize("layer", [0, 2])
def test_weights_that_are_not_numbers_are_an_error_that_names_the_layer(
    layer: int, weight: str, precision: CpuPrecision, level: str, rng: np.random.Generator
) -> None:
    graph = tiny_decoder(rng, layers=3, softcap=float(rng.choice([0, 10])))
    _spoil(graph, f"layers.{layer}.{weight}.weight")
    for count in (1, 3, 40):
        with Machine(built(graph, precision), level, pages=1) as machine:
            with pytest.raises(EngineError, match=f"attention of layer {layer} computed numbers that are not finite"):
                machine.rows(count)
            with pytest.raises(EngineError):  # and it can be used again, without a hang
                machine.rows(count)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # NumPy's, of NaN rounded to int8
@each_level
@pytest.mark.parametrize("precision", [EXACT, INT8_ALL], ids=["f32", "int8"])
def test_what_is_no_number_behind_the_last_attention_is_an_error(
    precision: CpuPrecision, level: str, rng: np.random.Generator
) -> None:
    graph = tiny_decoder(rng, layers=2, vocabulary=int(rng.integers(50, 80)))
    _spoil(graph, f"layers.1.{rng.choice(['up', 'down', 'mlp_norm'])}.weight")
    expected = pytest.raises(EngineError, match="The last layer computed numbers that are not finite")
    with Machine(built(graph, precision), level, pages=1) as machine, expected:
        machine.rows(int(rng.choice([1, 3, 40])))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_is_told_to_load_the_model_itself(rng: np.random.Generator) -> None:
    with Machine(built(tiny_decoder(rng), EXACT), LEVELS[0], pages=1) as machine:
        wanted = machine.rows(3)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover - nothing of the parent's may run on
            said = b"no error"
            try:
                machine.rows(3)
            except EngineError as error:
                said = str(error).encode()
            finally:
                machine.engine.close()
                os.write(writer, said)
                os._exit(0)
        os.close(writer)
        assert os.waitpid(child, 0)[1] == 0
        assert b"forked after this model was loaded" in os.read(reader, 1000)
        os.close(reader)
        np.testing.assert_array_equal(machine.rows(3), wanted)


# -------------------------------------------------------------------------------------------------------------- threads
@each_level
@pytest.mark.parametrize("precision", [EXACT, BFLOAT16, INT8_ALL], ids=["f32", "bf16", "int8"])
def test_any_number_of_threads_gives_the_same_answer(
    precision: CpuPrecision, level: str, rng: np.random.Generator
) -> None:
    graph = tiny_decoder(rng, softcap=5.0, window=40)
    made = built(graph, precision)
    text = rng.integers(0, 61, 150)
    first: list[Array] = []
    for threads in (1, 2, 3, 8):
        with Machine(made, level, threads=threads, pages=3) as machine:
            at, got = 0, []
            for count in (5, 17, 31, 1, 40, 1, 55):
                got.append(machine.engine.step([text[at : at + count]], [at], [[2, 0, 1]], list(range(count))))
                at += count
        # Bit for bit, until the number of threads decides how the pages of one query are shared out and rows are cut.
        assert all(np.array_equal(a, b) for a, b in zip(got[:3], first, strict=False)), threads
        if first and precision is EXACT:
            assert max(error(a, b) for a, b in zip(got, first, strict=True)) < 2e-6, threads
        elif first:
            assert max(error(a, b) for a, b in zip(got, first, strict=True)) < 0.02, threads
        first = first or got


def test_no_thread_at_all_is_an_error(rng: np.random.Generator) -> None:
    made = built(tiny_decoder(rng), EXACT)
    with pytest.raises(EngineError, match="threads cannot be started"):
        Machine(made, LEVELS[0], threads=0)
