"""Rounded graphs: symmetric weights, one encoding for what only moves, and the same numbers in prefill and decode.

Draws: half a step of a code bounds each error, and means over hundreds of weights bound the rest by many deviations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qnn_models import CHUNK, CONTEXT, draw

from transom.errors import OptionError, SourceError
from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.graph.weights import Blocked, BlockedArrays, dense, dequantize
from transom.quantize.rounding import to_int4
from transom.sparsity import Sparsity
from transom.testing.models import VARIANTS, tiny_decoder
from transom_mobile_export.qnn.claims import read_decoder
from transom_mobile_export.qnn.compiling import write_embedding
from transom_mobile_export.qnn.encoding import (
    HEADROOM,
    LARGEST_WIDE,
    MARGIN,
    UINT8,
    UINT16,
    Encoding,
    QuantizedMatrices,
    add_quantization,
)
from transom_mobile_export.qnn.lowering import LoweredPart, Matrices, lower
from transom_mobile_export.qnn.measuring import measure
from transom_mobile_export.qnn.observing import Seen, observe
from transom_mobile_export.qnn.parts import plan_parts
from transom_mobile_export.qnn.precision import Form, QnnPrecision
from transom_mobile_export.qnn.quantizing import quantized

Array = np.ndarray[Any, np.dtype[Any]]
INT8 = QnnPrecision("int8", "uint8")


def seen_of(rng: np.random.Generator, graph: Graph, precision: QnnPrecision) -> Seen:
    return observe(read_decoder(graph, precision), [draw(rng, graph, 30) for _ in range(2)], lambda share: None)


def lowered_of(graph: Graph, precision: QnnPrecision, seen: Seen, tokens: int, context: int = CONTEXT) -> LoweredPart:
    model = read_decoder(graph, precision)
    (part,) = plan_parts(model.layers)
    lowered = lower(model.reader, part, tokens=tokens, cached=context, context=context, matrices=scaled(precision))
    add_quantization(lowered, seen, ir.DataType[precision.cache.upper()])
    return lowered


def scaled(precision: QnnPrecision) -> Matrices:
    """Matrices whose codes nobody reads."""
    return QuantizedMatrices(precision, {}, Path("nowhere"))


def constant(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def encodings(lowered: LoweredPart) -> dict[str, tuple[float, int, str]]:
    """Of each value that is rounded by one scale: scale, zero point, type."""
    found = {}
    for node in lowered.graph:
        if node.op_type == "DequantizeLinear" and len(node.inputs) == 3:
            codes, scale, zero = node.inputs
            assert codes is not None
            assert zero is not None
            found[str(codes.name).split(".codes")[0]] = float(constant(scale)), int(constant(zero)), str(zero.dtype)
    return found


@pytest.mark.parametrize("dtype", [UINT8, UINT16])
def test_an_encoding_holds_its_range_and_zero(rng: np.random.Generator, dtype: ir.DataType) -> None:
    for low, high in [(-3.0, 5.0), (2.0, 9.0), (-9.0, -2.0), (0.0, 0.0), *rng.normal(0, 100, (20, 2)).tolist()]:
        low, high = sorted((low, high))
        by = Encoding.of((low, high), dtype)
        x = np.append(rng.uniform(low, high, 200), [low, high, 0.0])
        back = by.scale * (by.codes(x).astype(np.float64) - by.zero)
        assert np.abs(back - x).max() <= by.scale * 0.501 + 1e-12
        assert back[-1] == 0.0


@pytest.mark.parametrize("stored", ["float32", "int4", "uint4_minimums", "uint4_zero_points", "int8"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_no_zero_point_ever_reaches_a_weight(
    rng: np.random.Generator, tmp_path: Path, stored: Any, weights: Any
) -> None:
    """4-bit weights with one come out wrong of the HTP, and nothing is said."""
    graph = tiny_decoder(rng, weights=stored)
    precision = QnnPrecision(weights, "uint8")
    model = read_decoder(graph, precision)
    (part,) = plan_parts(model.layers)
    matrices = QuantizedMatrices(precision, {}, tmp_path)
    forms = set()
    for node in lower(model.reader, part, tokens=1, cached=8, context=8, matrices=matrices).graph:
        if node.op_type == "DequantizeLinear":
            codes, scales, *zero_points = node.inputs
            assert codes is not None
            forms.add(codes.dtype)
            assert not zero_points
            assert (constant(scales) > 0).all()
    assert forms == {ir.DataType.INT8, *([ir.DataType.INT4] if weights == "int4" else [])}


@pytest.mark.parametrize("stored", ["float32", "uint4_minimums", "int4", "int8"])
def test_a_weight_is_near_what_it_was(rng: np.random.Generator, stored: Any) -> None:
    graph = tiny_decoder(rng, weights=stored)
    model = read_decoder(graph, QnnPrecision("int8", "uint8"))
    weight = next(d.weight for own in model.layers[0].layers for d in own if d.weight)
    plain = dequantize(weight)
    bounds: dict[Form, float] = {"int8": 0.02, "int4": 0.12}
    for form, bound in bounds.items():
        found = quantized(weight, form)
        parts = found.load()
        assert parts.zero_points is None
        assert parts.minimums is None
        assert parts.quants.dtype == np.int8
        assert np.abs(parts.quants).max() <= (127 if form == "int8" else 8)
        assert np.linalg.norm(dequantize(found) - plain) < bound * np.linalg.norm(plain)
    assert (quantized(weight, "int4") is weight) == (stored == "int4")


@pytest.mark.parametrize("flaw", ["zero_points", "minimums", "negative"])
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_what_is_stored_in_a_form_is_kept_unless_the_htp_would_compute_it_wrong(
    rng: np.random.Generator, form: Any, flaw: str
) -> None:
    """Zero points and minimums would be lost, and a negative scale of int8 comes out wrong, other than one of int4."""
    rows, columns = 6, 64
    block, (low, high) = (columns, (-127, 128)) if form == "int8" else (32, (-8, 8))
    blocks = (rows, columns // block)
    scales = rng.uniform(0.5, 1.5, blocks).astype(np.float16)
    quants = rng.integers(low, high, (rows, columns)).astype(np.int8)

    def stored(**more: Any) -> Blocked:
        parts = BlockedArrays(quants, more.pop("scales", scales), more.get("minimums"), more.get("zero_points"))
        has = {f"has_{name}": True for name in more}
        return Blocked((rows, columns), block, form, "float16", lambda: parts, **has)

    np.testing.assert_array_equal(quantized(stored(), form).load().quants, quants)
    weight = {
        "zero_points": lambda: stored(zero_points=rng.integers(1, 4, blocks).astype(np.int8)),
        "minimums": lambda: stored(minimums=-scales),
        "negative": lambda: stored(scales=scales * np.where(np.arange(rows) % 2, 1, -1).astype(np.float16)[:, None]),
    }[flaw]()
    found = quantized(weight, form)
    parts = found.load()
    assert (parts.zero_points, parts.minimums) == (None, None)
    assert (parts.scales > 0).all() or (form, flaw) == ("int4", "negative")
    plain = dequantize(weight)
    assert np.linalg.norm(dequantize(found) - plain) < (0.02 if form == "int8" else 0.12) * np.linalg.norm(plain)


def test_numbers_that_float16_does_not_have_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    model = read_decoder(tiny_decoder(rng), QnnPrecision("int8", "uint8"))
    gain = next(d for own in model.layers[1].layers for d in own if d.kind == "norm")
    gain.vector = np.asarray(gain.vector) * np.float32(np.nan)
    with pytest.raises(SourceError, match=r"not finite, first seen at 1\..*RMSNormalization"):
        observe(model, [[1, 2, 3]], lambda share: None)
    model.embed.weight = dense(np.full((9, 4), 7e4, np.float32))
    with pytest.raises(OptionError, match="numbers up to 7e\\+04, and float16 ends at 65504"):
        write_embedding(model.embed, tmp_path / "table", lambda share: None)


def test_a_scale_is_searched_for_the_inputs_that_it_meets(rng: np.random.Generator) -> None:
    """Columns whose input is large are rounded more finely, at the cost of others."""
    matrix = rng.standard_normal((40, 96)).astype(np.float32)
    inputs = rng.standard_normal((500, 96)) * np.exp(rng.normal(0, 1.5, 96))
    weight = dense(matrix)
    squares = np.square(inputs).sum(0)

    def error(found: Blocked) -> float:
        return float(np.linalg.norm(inputs @ (dequantize(found) - matrix).T))

    widest, plain, weighed = to_int4(weight, 32), quantized(weight, "int4"), quantized(weight, "int4", squares)
    assert np.linalg.norm(dequantize(plain) - matrix) < np.linalg.norm(dequantize(widest) - matrix)
    assert error(weighed) < error(plain)
    assert error(weighed) < 0.95 * error(widest)
    nothing = quantized(dense(np.zeros((2, 32), np.float32)), "int4").load()
    assert not nothing.quants.any()
    assert (nothing.scales > 0).all()


@pytest.mark.parametrize("cache", ["uint8", "uint16"])
@pytest.mark.parametrize("form", ["gqa", "window", "sinks", "softcap"])
def test_prefill_and_decode_have_the_same_encodings(rng: np.random.Generator, form: str, cache: Any) -> None:
    """The one reads the codes that the other has written."""
    graph = tiny_decoder(rng, **VARIANTS[form])
    precision = QnnPrecision("int8", cache)
    seen = seen_of(rng, graph, precision)
    prefill, decode = (encodings(lowered_of(graph, precision, seen, tokens)) for tokens in (CHUNK, 1))
    assert prefill == decode
    assert len(prefill) > 40


@pytest.mark.parametrize("cache", ["uint8", "uint16"])
def test_what_goes_into_the_cache_is_what_comes_out(rng: np.random.Generator, cache: Any) -> None:
    graph = tiny_decoder(rng, q_heads=4, kv_heads=2, value_dim=32)
    precision = QnnPrecision("int8", cache)
    lowered = lowered_of(graph, precision, seen_of(rng, graph, precision), CHUNK)
    inputs = {v.name: v for v in lowered.graph.inputs}
    outputs = {v.name: v for v in lowered.graph.outputs}
    for i in range(2):
        for what, columns in (("key", 16), ("value", 32)):
            past, new = inputs[f"past_{what}.{i}"], outputs[f"new_{what}.{i}"]
            assert past.dtype == new.dtype == ir.DataType[cache.upper()]
            assert list(past.shape or ()) == [1, 2, CONTEXT, columns]
            assert list(new.shape or ()) == [1, 2, CHUNK, columns]
            reader = next(use.node for use in past.uses())
            writer = new.producer()
            assert writer is not None
            assert (reader.op_type, writer.op_type) == ("DequantizeLinear", "QuantizeLinear")
            for index in (1, 2):
                assert constant(reader.inputs[index]) == constant(writer.inputs[index])


@pytest.mark.parametrize("form", ["gqa", "sinks", "partial_rotary", "softcap"])
def test_no_constant_is_put_beside_what_is_computed(rng: np.random.Generator, form: str) -> None:
    """The HTP computes such a Concat wrong for some values, and nothing is said."""
    graph = tiny_decoder(rng, **VARIANTS[form])
    check_joins(lowered_of(graph, INT8, seen_of(rng, graph, INT8), 1))


def test_nor_is_one_in_sparse_attention(rng: np.random.Generator) -> None:
    policy = Sparsity(columns=0, dense_below=0, max_density=0.6, top_k=3)
    graph = with_sparsity(tiny_decoder(rng, sinks=True, context=192), policy)
    seen = seen_of(rng, graph, INT8)
    for tokens in (1, 128):
        check_joins(lowered_of(graph, INT8, seen, tokens, 192))


def check_joins(lowered: LoweredPart) -> None:
    joins = [node for node in lowered.graph if node.op_type == "Concat"]
    assert joins
    for node in joins:
        for value in node.inputs:
            assert value is not None
            producer = value.producer()
            source = value if producer is None else producer.inputs[0]
            assert source is not None
            assert source.const_value is None, node.name


def test_masked_scores_keep_their_steps(rng: np.random.Generator) -> None:
    """A mask of -10000 would leave a score 65 times coarser steps than it needs."""
    graph = tiny_decoder(rng)
    precision = QnnPrecision("int8", "uint8")
    seen = seen_of(rng, graph, precision)
    assert -1000 < seen.mask_low < -MARGIN
    lowered = lowered_of(graph, precision, seen, CHUNK)
    found = encodings(lowered)
    for masked, scores in lowered.masked.items():
        low, high = seen.ranges[scores]
        assert found[masked][0] == pytest.approx((HEADROOM * (high - low) + MARGIN) / 65535, rel=0.01)
        assert (
            HEADROOM * high + seen.mask_low <= HEADROOM * low - MARGIN + 1e-3
        )  # the largest score, masked, is below all others


def test_the_hidden_state_is_not_rounded_unless_it_leaves_float16(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    precision = QnnPrecision("int8", "uint8")
    seen = seen_of(rng, graph, precision)
    assert 0 < seen.widest < LARGEST_WIDE
    sums = {n for n in seen.ranges if ".add." in n}
    assert len(sums) == 4
    assert not sums & set(encodings(lowered_of(graph, precision, seen, CHUNK)))
    huge = Seen(seen.ranges, seen.mask_low, 60000.0)
    assert sums <= set(encodings(lowered_of(graph, precision, huge, CHUNK)))


def test_errors_are_listed_worst_first(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, layers=3)
    text = draw(rng, graph, 30)
    errors = {}
    for weights in ("int8", "int4"):
        precision = QnnPrecision(weights, "uint8")
        model = read_decoder(graph, precision)
        seen = observe(model, [text], lambda share: None)
        folder = tmp_path / weights
        folder.mkdir()
        matrices = QuantizedMatrices(precision, seen.squares, folder)
        found = measure(model, precision, seen, matrices, text, lambda share: None)
        assert [d.error for d in found] == sorted((d.error for d in found), reverse=True)
        assert sum(d.what == "residual" for d in found) == 2
        assert {d.node for d in found if d.what == "product"} == {
            *(f"layers.{i}.{name}" for i in range(3) for name in ("q", "k", "v", "o", "gate", "up", "down")), "head",
        }  # fmt: skip
        assert {d.layer for d in found} == {0, 1, 2}
        errors[weights] = float(np.mean([d.error for d in found]))
    assert 0 < errors["int8"] < 0.05
    assert 2 * errors["int8"] < errors["int4"] < 0.5
