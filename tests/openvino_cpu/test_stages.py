"""A decoder is cut into stages so that narrow arithmetic stays away from positions and logits.

Draws: 16 bits cost a hundredth and 0.1 are allowed, where a position in bfloat16 costs about one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from transom import hardware
from transom.contract import Artifact, Device, Work
from transom.graph import Graph
from transom.graph.passes import decompose
from transom.testing.bench import ReferenceOracle
from transom.testing.models import Stored, tiny_decoder
from transom_openvino_cpu import OpenVinoCpu
from transom_openvino_cpu.precision import CpuPrecision
from transom_openvino_cpu.stages import cut

pytestmark = pytest.mark.usefixtures("through_openvino")
NARROW = CpuPrecision("bf16", "bf16", False)
EXACT = CpuPrecision("exact", "f32", False)


def cpu() -> Device:
    return next(d for d in hardware.probe_devices() if d.kind == "cpu")


def stage_names(graph: Graph, precision: CpuPrecision, *, tables_apart: bool) -> list[str]:
    return [c.name for c in cut(graph, precision, tables_apart=tables_apart)]


def test_the_vocabulary_matrix_is_always_a_stage_of_its_own(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    assert stage_names(graph, EXACT, tables_apart=True) == ["body", "head"]
    assert stage_names(graph, NARROW, tables_apart=False) == ["body", "head"]


def test_tables_apart_hold_what_leads_to_sines_and_nothing_else(rng: np.random.Generator) -> None:
    stages = cut(tiny_decoder(rng), NARROW, tables_apart=True)
    assert [(s.name, s.hint) for s in stages][:2] == [("tables", "f32"), ("body", "bf16")]
    assert {n.op_type for n in stages[0].nodes} == {"Cast", "Unsqueeze", "Mul", "Cos", "Sin"}


def test_every_node_is_in_one_stage(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, final_softcap=6.0, attention_bias=True)
    names = [n.name for s in cut(graph, NARROW, tables_apart=True) for n in s.nodes]
    assert sorted(map(str, names)) == sorted(str(n.name) for n in graph.nodes())


def test_the_head_takes_float32_only_where_its_matrix_is_quantised(rng: np.random.Generator) -> None:
    def hint(weights: Stored) -> str:
        return cut(tiny_decoder(rng, weights=weights), NARROW, tables_apart=False)[-1].hint

    assert (hint("int8"), hint("uint4_minimums"), hint("float16")) == ("f32", "f32", "bf16")


def in_other_words(graph: Graph) -> Graph:
    """The rotations as ONNX defines them, in operators that the engine does not know as a rotation."""
    return decompose(graph, [str(n.name) for n in graph.nodes() if n.op_type == "RotaryEmbedding"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.sweep(but=("True",))
def test_rotations_that_the_engine_does_not_fuse_get_their_tables_from_a_stage(
    fused: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    graph = tiny_decoder(rng, context=4000, weights="int8")
    graph = graph if fused else in_other_words(graph)
    device = cpu()
    narrow = bool(device.features & {"avx512_bf16", "amx_bf16"})
    options: dict[str, object] = {"precision": "fast"}
    artifact = OpenVinoCpu().compile(graph, device, options, lambda stage, share: None)
    assert ("tables.blob" in artifact.files) == (narrow and not fused)
    tokens = [int(t) for t in rng.integers(0, 61, 3001)]
    assert _error(graph, artifact, tokens, device, tmp_path) < 0.1


def _error(graph: Graph, artifact: Artifact, tokens: Sequence[int], device: Device, folder: Path) -> float:
    """Of the last token's logits, far from the start: a position in bfloat16 would be off by eight."""
    files: dict[str, bytes | Path] = {}
    for name, content in artifact.files.items():
        files[name] = folder / name
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    session = OpenVinoCpu().load(Artifact(files, artifact.requires), device, {"precision": "fast"}, folder)
    try:
        state = session.new_state()
        for at in range(0, len(tokens) - 1, 1000):
            session.step([Work(state, tokens[at : at + 1000], "none")])
        (got,) = session.step([Work(state, tokens[-1:])])
        wanted = ReferenceOracle(graph).logits(tokens)[-1]
        return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    finally:
        session.close()
