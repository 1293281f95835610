"""Observed ranges equal those of a brute-force run that keeps all values and runs each text alone.

Draws: largest values are equal but for the rounding of float32; a percentile is off by a bin of a histogram, 2^-7.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from transom.errors import OptionError, SourceError
from transom.graph import DecoderBuilder, Dense, Graph, GraphBuilder
from transom.graph.reading import linear_weight
from transom.graph.sparse import is_attention
from transom.graph.weights import dense
from transom.quantize import calibration
from transom.quantize.calibration import Activations, calibrate
from transom.reference.executor import Executor
from transom.sessions.inputs import decoder_inputs, empty_cache
from transom.signature import Decoder, LayerCache
from transom.testing.models import tiny_decoder

Array = np.ndarray[Any, np.dtype[Any]]
EVERYTHING: dict[str, Any] = {"window": 4, "softcap": 8.0, "sinks": True, "linear_bias": True, "attention_bias": True}


def texts_of(rng: np.random.Generator, *lengths: int) -> list[list[int]]:
    return [rng.integers(0, 61, n).tolist() for n in lengths]


def observed(graph: Graph, text: Sequence[int]) -> dict[tuple[str, int], Array]:
    """Each observed input, and each product's output as number -1, as outputs of a graph that has them for outputs."""
    model = graph.model.clone()
    found: dict[tuple[str, int], ir.Value] = {}
    for node in model.graph:
        product = linear_weight(node) is not None
        for i in (0,) if product else (0, 1, 2) if is_attention(node) else ():
            value = node.inputs[i]
            assert value is not None
            found[str(node.name), i] = value
        if product:
            found[str(node.name), -1] = node.outputs[0]
    known = {id(v) for v in model.graph.outputs}
    model.graph.outputs.extend({id(v): v for v in found.values() if id(v) not in known}.values())
    assert graph.decoder is not None
    inputs = decoder_inputs([text], range(len(text)), empty_cache(graph.decoder))
    outputs = Executor(Graph(model, weights_hash="")).run(inputs)
    return {key: outputs[str(value.name)] for key, value in found.items()}


def by_brute_force(graph: Graph, texts: Sequence[Sequence[int]]) -> dict[tuple[str, int], Array]:
    """All parts concatenated: [tokens, width]."""
    each = [observed(graph, text) for text in texts]
    return {key: np.concatenate([found[key] for found in each]) for key in each[0]}


@pytest.mark.parametrize("variant", [{}, EVERYTHING, {"weights": "int4"}], ids=["plain", "everything", "int4"])
def test_maxima_are_those_of_all_values(variant: dict[str, Any], rng: np.random.Generator) -> None:
    graph, texts = tiny_decoder(rng, **variant), texts_of(rng, 7, 1, 12)
    got, wanted = calibrate(graph, texts), by_brute_force(graph, texts)
    assert got.tokens == 20
    assert {(name, i) for name, i in wanted if i >= 0} == set(got.inputs)
    assert {name for name, i in wanted if i < 0} == set(got.outputs)
    for (name, i), values in wanted.items():
        largest = got.outputs[name] if i < 0 else got.input(name, i).largest
        assert largest == pytest.approx(float(np.abs(values).max()), rel=1e-5), (name, i)
        if i >= 0:
            assert got.input(name, i).bound == got.input(name, i).largest


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.5, 100.0])
def test_percentile_is_that_of_all_magnitudes(percentile: float, rng: np.random.Generator) -> None:
    graph, texts = tiny_decoder(rng), texts_of(rng, 9, 14)
    got, wanted = calibrate(graph, texts, percentile=percentile), by_brute_force(graph, texts)
    for key, seen in got.inputs.items():
        magnitudes = np.abs(wanted[key])
        exact = float(np.percentile(magnitudes, percentile, method="inverted_cdf"))
        assert exact * (1 - 1e-5) <= seen.bound <= exact * (1 + 2.0**-7 + 1e-5), key
        assert seen.bound <= seen.largest
        assert seen.largest == pytest.approx(float(magnitudes.max()), rel=1e-5)


def test_sampled_rows_are_rows_of_the_inputs_of_products(rng: np.random.Generator) -> None:
    tokens = rng.permutation(61).tolist()  # no token twice, so that no two rows are the same
    graph, texts = tiny_decoder(rng), [tokens[:9], tokens[9:23], tokens[23:26]]
    got, wanted = calibrate(graph, texts, rows=11), by_brute_force(graph, texts)
    for (name, i), seen in got.inputs.items():
        if name.endswith("attention"):
            continue
        rows = seen.rows
        assert rows is not None
        assert rows.shape == (11, wanted[name, i].shape[1])
        assert rows.dtype == np.float32
        distances = np.abs(rows[:, None] - wanted[name, i][None]).max(-1)
        assert (distances.min(1) < 1e-4).all(), name
        assert len(set(distances.argmin(1).tolist())) == 11, "one token twice"
    few = calibrate(graph, texts_of(rng, 2), rows=11).input("layers.0.q").rows
    assert few is not None
    assert len(few) == 2


def test_an_input_that_several_read_is_observed_once(rng: np.random.Generator) -> None:
    got = calibrate(tiny_decoder(rng), texts_of(rng, 5))
    assert got.input("layers.0.q") is got.input("layers.0.k")
    assert got.input("layers.0.q") is not got.input("layers.1.q")


def test_the_same_texts_give_the_same_numbers_in_any_order_and_any_runs(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, texts = tiny_decoder(rng), texts_of(rng, 30, 4, 11, 25)

    def numbers(found: Activations) -> list[tuple[float, float]]:
        return [(o.largest, o.bound) for o in found.inputs.values()]

    first, again = (calibrate(graph, texts, percentile=99.0) for _ in range(2))
    assert numbers(first) == numbers(again)
    for one, other in zip(first.inputs.values(), again.inputs.values(), strict=True):
        if one.rows is not None:
            np.testing.assert_array_equal(one.rows, other.rows)
    turned = calibrate(graph, texts[::-1], percentile=99.0)
    np.testing.assert_allclose(numbers(turned), numbers(first), rtol=2.0**-7 + 1e-5)
    monkeypatch.setattr(calibration, "MAX_RUN_TOKENS", 16)  # three runs, one of them longer than that
    shares: list[float] = []
    apart = calibrate(graph, texts, percentile=99.0, progress=shares.append)
    np.testing.assert_allclose(numbers(apart), numbers(first), rtol=2.0**-7 + 1e-5)
    rows = apart.input("layers.1.down").rows
    assert rows is not None
    assert len(rows) == 32
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_logits_are_computed_at_some_tokens_only(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rows of these tokens are kept."""
    monkeypatch.setattr(calibration, "LOGIT_ROWS", 5)
    graph, texts = tiny_decoder(rng), texts_of(rng, 19, 14)
    got, wanted = calibrate(graph, texts), by_brute_force(graph, texts)
    for name in ("head", "layers.0.q"):
        rows = got.input(name).rows
        assert rows is not None
        assert len(rows) == 5
        assert (np.abs(rows[:, None] - wanted[name, 0][None]).max(-1).min(1) < 1e-4).all()
    assert got.input("head").largest < float(np.abs(wanted["head", 0]).max()) * (1 + 1e-5)
    assert got.input("layers.0.q").largest == pytest.approx(float(np.abs(wanted["layers.0.q", 0]).max()), rel=1e-5)


def test_weights_are_streamed_once_for_all_texts_together(rng: np.random.Generator) -> None:
    reads = 0
    matrix = (rng.standard_normal((32, 32)) / 6).astype(np.float32)

    def load() -> Array:
        nonlocal reads
        reads += 1
        return matrix

    b = DecoderBuilder("counted", Decoder("toy", 32, 32, 64, (LayerCache(2, 2, 16, 16),)))
    x = b.embedding(dense(matrix))
    x = b.linear(b.attention(x, x, x, 0), Dense((32, 32), "float32", load), "o")
    graph = b.finish_decoder(b.linear(b.rows_for_logits(x), dense(matrix), "head"), weights_hash="w")
    calibrate(graph, [rng.integers(0, 32, 20).tolist() for _ in range(6)])
    assert reads == 1


def test_activations_are_not_kept(rng: np.random.Generator) -> None:
    """Only rows and ranges are kept in the end; meanwhile no more memory is used than the executor needs."""
    graph = tiny_decoder(rng, layers=6, hidden=256, inner=1024, context=1024)
    texts = texts_of(rng, 400, 400)
    calibrate(graph, texts_of(rng, 4))  # the first run also imports modules
    tracemalloc.start()
    try:
        found = calibrate(graph, texts, rows=4)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    every = sum(800 * (3 * 256 + 1024) * 4 for _ in range(6))
    assert found.tokens == 800
    assert held < every / 20


def test_what_is_no_number_is_an_error_that_names_the_node(rng: np.random.Generator) -> None:
    b = DecoderBuilder("damaged", Decoder("toy", 8, 16, 16, (LayerCache(1, 1, 16, 16),)))
    table = np.ones((8, 16), np.float32)
    table[3, 2] = np.nan
    x = b.embedding(dense(table))
    x = b.attention(b.linear(x, dense(np.eye(16, dtype=np.float32)), "q"), x, x, 0)
    graph = b.finish_decoder(b.linear(x, dense(np.ones((8, 16), np.float32)), "head"), weights_hash="w")
    with pytest.raises(SourceError, match="not finite, first at the node q"):
        calibrate(graph, [[1, 3]])


def test_texts_that_cannot_be_read_are_refused(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, context=16)
    for texts, words in (
        ([], "no calibration text"),
        ([[1], []], "or one is empty"),
        ([[1] * 17], "has 17 tokens, but the model.s context is 16"),
        ([[5, 61]], "outside the vocabulary of 61"),
        ([[-1]], "outside the vocabulary of 61"),
    ):
        with pytest.raises(OptionError, match=words):
            calibrate(graph, texts)
    for percentile in (0.0, -1.0, 100.5):
        with pytest.raises(OptionError, match="is out of range"):
            calibrate(graph, [[1]], percentile=percentile)
    b = GraphBuilder("plain")
    b.output(b.op("Neg", b.input("x", "float32", ["n"])), "y")
    with pytest.raises(OptionError, match="plain has no attention with a cache"):
        calibrate(b.finish(weights_hash="w"), [[1]])
    with pytest.raises(OptionError, match="do not include input 0 of the node riddle"):
        calibrate(graph, [[1]]).input("riddle")
