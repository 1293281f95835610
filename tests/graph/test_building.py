"""Built graphs are valid ONNX, with named nodes, lazy weights and shared weights.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from transom.graph import Blocked, BlockedArrays, DecoderBuilder, Dense, GraphBuilder
from transom.graph.passes import decompose, infer_types
from transom.graph.weights import dense
from transom.signature import Decoder, LayerCache
from transom.testing.models import VARIANTS, tiny_decoder


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_decoder_is_a_valid_onnx_model(variant: str, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, **VARIANTS[variant])
    graph.check()
    names = [n.name for n in graph.nodes()]
    assert len(set(names)) == len(names)
    assert all(names)
    decompose(graph, [str(n.name) for n in graph.nodes() if n.domain]).check()


@pytest.mark.parametrize("variant", VARIANTS)
def test_shape_inference_knows_the_type_and_rank_of_every_value(variant: str, rng: np.random.Generator) -> None:
    graph = infer_types(tiny_decoder(rng, **VARIANTS[variant]))
    for node in graph.nodes():
        for value in node.outputs:
            assert value.dtype is not None, value.name
            assert value.shape is not None, value.name


def test_signature_counts_parameters_and_stored_bytes(rng: np.random.Generator) -> None:
    plain = tiny_decoder(rng, layers=1).decoder
    small = tiny_decoder(rng, layers=1, weights="int4").decoder
    assert plain is not None
    assert small is not None
    assert small.parameters == plain.parameters
    assert plain.weight_bytes == 4 * plain.parameters
    vectors = 3 * 64
    matrices = plain.parameters - vectors
    assert small.weight_bytes == matrices // 2 + matrices // 32 * 2 + 4 * vectors


def test_no_weight_is_read_before_it_is_needed() -> None:
    def never() -> Any:
        raise AssertionError("read too early")

    b = DecoderBuilder("lazy", Decoder("toy", 10, 32, 16, (LayerCache(2, 2, 16, 16),)))
    x = b.embedding(Dense((10, 32), "bfloat16", never))
    h = b.rms_norm(x, Dense((32,), "float32", never), 1e-5, "norm", offset=1.0)
    q = b.linear(h, Blocked((32, 32), 32, "int4", "float16", never), "q", bias=Dense((32,), "float16", never))
    y = b.attention(q, q, q, 0, sinks=Dense((2,), "float32", never))
    b.rotary_tables(b.inputs.positions, np.ones(8, np.float32))
    graph = b.finish_decoder(b.linear(y, Dense((10, 32), "float32", never), "head"), weights_hash="w")
    assert graph.decoder is not None
    graph.structure()


def test_weights_constants_and_tables_are_shared() -> None:
    b = DecoderBuilder("shared", Decoder("toy", 8, 16, 16, ()))
    w = dense(np.eye(16, dtype=np.float32))
    x = b.embedding(dense(np.ones((8, 16), np.float32)))
    first, second = b.linear(x, w, "a"), b.linear(x, w, "b")
    assert first.producer().inputs[1] is second.producer().inputs[1]  # type: ignore[union-attr]
    assert b.constant([1, 2]) is b.constant(np.array([1, 2], np.int64))
    assert b.constant(1) is not b.constant(1.0)
    tables = b.rotary_tables(b.inputs.positions, np.array([1.0, 0.5]))
    assert b.rotary_tables(b.inputs.positions, np.array([1.0, 0.5])) == tables
    assert b.rotary_tables(b.inputs.positions, np.array([1.0, 0.25])) != tables
    assert b.rotary_tables(b.inputs.positions, np.array([1.0, 0.5]), factor=2.0) != tables
    assert b.parameters == 16 * 16 + 8 * 16


def test_names_say_where_a_node_belongs() -> None:
    b = GraphBuilder("names")
    x = b.input("x", "float32", ["n", 4])
    with b.scope("layers.0"), b.scope("mlp"):
        names = [b.op("Neg", x, name="gate").producer().name for _ in range(2)]  # type: ignore[union-attr]
    assert names == ["layers.0.mlp.gate", "layers.0.mlp.gate_1"]


def test_unregistered_operators_wrong_attributes_and_wrong_inputs_are_refused() -> None:
    b = DecoderBuilder("wrong", Decoder("toy", 8, 16, 16, (LayerCache(4, 2, 8, 8),)))
    x = b.input("x", "float32", ["tokens", 32])
    with pytest.raises(ValueError, match=r"nobody\.knows::Riddle is not registered"):
        b.op("Riddle", x, domain="nobody.knows")
    with pytest.raises(ValueError, match="no attribute sliding"):
        b.op("CachedAttention", x, domain="transom", q_num_heads=4, kv_num_heads=2, sliding=4)
    with pytest.raises(ValueError, match="query must have rank 2"):
        b.attention(b.input("y", "float32", [1, "tokens", 32]), x, x, 0)


def test_layer_without_attention_is_refused() -> None:
    b = DecoderBuilder("short", Decoder("toy", 8, 16, 16, (LayerCache(2, 2, 8, 8), LayerCache(2, 2, 8, 8))))
    x = b.embedding(dense(np.ones((8, 16), np.float32)))
    b.attention(x, x, x, 0)
    with pytest.raises(ValueError, match=r"layers \[1\] have a cache but no attention"):
        b.finish_decoder(x, weights_hash="w")


def test_graph_uses_one_opset_and_an_ir_version_that_everyone_reads(rng: np.random.Generator) -> None:
    model = tiny_decoder(rng).model
    assert model.ir_version is not None
    assert model.ir_version <= 12
    assert model.graph.opset_imports == {"": 24, "transom": 1}
    assert all(f.opset_imports == {"": 24} for f in model.functions.values())


def test_each_part_of_a_quantized_weight_reads_the_file_once(rng: np.random.Generator) -> None:
    reads = 0
    parts = BlockedArrays(
        rng.integers(0, 16, (4, 64)).astype(np.uint8), np.ones((4, 2), np.float16), np.ones((4, 2), np.float16)
    )

    def load() -> BlockedArrays:
        nonlocal reads
        reads += 1
        return parts

    b = GraphBuilder("blocked")
    value = b.weight(Blocked((4, 64), 32, "uint4", "float16", load, has_minimums=True), "w")
    assert value.dtype is None or value.dtype == ir.DataType.FLOAT
    for initializer in b.graph.initializers.values():
        assert initializer.const_value is not None
        initializer.const_value.numpy()
    assert reads == 1
