"""A graph is the same after saving and opening, and its weights keep their form.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from transom.errors import SourceError
from transom.graph import Dense, Graph, GraphBuilder
from transom.sessions.inputs import decoder_inputs, empty_cache
from transom.testing.bench import ReferenceOracle
from transom.testing.compare import compare_rows
from transom.testing.models import VARIANTS, tiny_decoder


@pytest.mark.parametrize("variant", VARIANTS)
def test_opened_graph_computes_the_same(variant: str, rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, **VARIANTS[variant])
    graph.notes = ("a note",)
    graph.save(tmp_path / "graph.onnx")
    opened = Graph.open(tmp_path / "graph.onnx")
    assert opened.decoder == graph.decoder
    assert opened.notes == graph.notes
    assert opened.weights_hash == graph.weights_hash
    assert (opened.input_names, opened.output_names) == (graph.input_names, graph.output_names)
    opened.check()
    tokens = rng.integers(0, 61, 12).tolist()
    np.testing.assert_array_equal(ReferenceOracle(opened).logits(tokens), ReferenceOracle(graph).logits(tokens))


@pytest.mark.parametrize("variant", ["everything", "int4", "bfloat16", "uint4_zero_points"])
def test_saved_graph_runs_in_onnx_runtime_without_transom(
    variant: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    graph = tiny_decoder(rng, **VARIANTS[variant])
    graph.save(tmp_path / "graph.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    decoder = graph.decoder
    assert decoder is not None
    tokens = rng.integers(0, decoder.vocabulary, 9)
    logits = session.run(["logits"], decoder_inputs([tokens], range(9), empty_cache(decoder)))[0]
    compare_rows(logits, ReferenceOracle(graph).logits(tokens.tolist()), 1e-5, "logits in ONNX Runtime")


def test_quantized_weights_stay_quantized_in_the_file(rng: np.random.Generator, tmp_path: Path) -> None:
    sizes = {}
    for stored in ("float32", "int4"):
        graph = tiny_decoder(rng, weights=stored)  # type: ignore[arg-type]
        graph.save(tmp_path / f"{stored}.onnx")
        sizes[stored] = (tmp_path / f"{stored}.onnx.data").stat().st_size
    assert sizes["int4"] < sizes["float32"] / 6


def test_file_passes_the_onnx_checker_as_it_is(rng: np.random.Generator, tmp_path: Path) -> None:
    tiny_decoder(rng, **VARIANTS["everything"]).save(tmp_path / "graph.onnx")
    onnx.checker.check_model(tmp_path / "graph.onnx", full_check=True)


def test_file_that_is_no_graph_is_one_sentence_and_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"missing\.onnx"):
        Graph.open(tmp_path / "missing.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"no protobuf, this\xff\xff")
    with pytest.raises(SourceError, match=r"noise\.onnx cannot be read"):
        Graph.open(tmp_path / "noise.onnx")


def test_saving_reads_one_weight_at_a_time_and_keeps_none(tmp_path: Path) -> None:
    read: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def load() -> np.ndarray[Any, Any]:
        array = np.ones((64, 64), np.float32)
        read.append(weakref.ref(array))
        alive.append(sum(one() is not None for one in read))
        return array

    b = GraphBuilder("chain")
    x = b.input("x", "float32", ["n", 64])
    for i in range(5):
        x = b.linear(x, Dense((64, 64), "float32", load), f"layers.{i}")
    b.output(x, "y")
    b.finish(weights_hash="w").save(tmp_path / "graph.onnx")
    gc.collect()
    assert alive == [1] * 5
    assert [one() for one in read] == [None] * 5
