"""Quantized graphs: standard ONNX that other runtimes run alike, the original unchanged, errors as computed by hand.

Draws: what rounding costs a random model has no formula: one of eight draws must be within `CLOSE`, or within the
bounds for activations that fall between two codes (`redraws.one_within`). Errors of products are compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from checkpoints import tiny
from graph_fidelity import fidelity
from redraws import one_within

from transom.errors import OptionError, SourceError
from transom.graph import Blocked, DecoderBuilder, Dense, Graph
from transom.graph.reading import constant_of, linear_weight, vocabulary_products, weight_of
from transom.graph.weights import Weight, dense, dequantize
from transom.preparation.agreement import Agreement
from transom.quantize import passes
from transom.quantize.calibration import calibrate
from transom.quantize.passes import QuantizedGraph, Scheme, quantize
from transom.reference.executor import Executor
from transom.sessions.inputs import decoder_inputs, empty_cache
from transom.signature import Decoder, LayerCache
from transom.sources import resolve
from transom.testing.bench import ReferenceOracle
from transom.testing.compare import normalized_error
from transom.testing.models import VARIANTS, tiny_decoder

Array = np.ndarray[Any, np.dtype[Any]]
SCHEMES = {
    "int4": Scheme("int4"),
    "int8": Scheme("int8"),
    "int8 blocks": Scheme("int8", block=16),
    "fp8": Scheme("fp8"),
    "fp8 both": Scheme("fp8", activations="fp8"),
    "int4 fp8": Scheme("int4", activations="fp8"),
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("gemma3", {"head_dim": 32}),
    ("gemma3", {"head_dim": 32, "tie_word_embeddings": False}),
]
CLOSE = {"int4": (1.0, 0.3), "int8": (0.01, 0.98), "fp8": (0.2, 0.8)}
"""Largest mean divergence and smallest correlation, which `redraws.one_within` requires of these random models. A wrong
scale or a row in the wrong place is far beyond."""


def texts_of(rng: np.random.Generator, vocabulary: int = 61) -> list[list[int]]:
    return [rng.integers(0, vocabulary, n).tolist() for n in (9, 17)]


def family(name: str, settings: dict[str, Any], folder: Path, rng: np.random.Generator) -> Graph:
    tiny(name, folder, rng, **settings)
    return resolve(folder).open(folder).graph


def products(graph: Graph) -> dict[str, Weight]:
    return {str(n.name): w for n in graph.nodes() if (w := linear_weight(n)) is not None}


def node_of(graph: Graph, name: str) -> ir.Node:
    return next(n for n in graph.nodes() if n.name == name)


def onnx_runtime(graph: Graph, folder: Path) -> onnxruntime.InferenceSession:
    graph.save(folder / "graph.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / "graph.onnx", options, providers=["CPUExecutionProvider"])


def logits_of(session: onnxruntime.InferenceSession, graph: Graph, tokens: list[int]) -> Array:
    assert graph.decoder is not None
    inputs = decoder_inputs([tokens], range(len(tokens)), empty_cache(graph.decoder))
    return np.asarray(session.run(["logits"], inputs)[0])


def forms_of(quantized: QuantizedGraph) -> list[str]:
    """The forms of the quantized products' weights in the graph."""
    return sorted({w.dtype for n, w in products(quantized.graph).items() if n in {x.node for x in quantized.layers}})


# quantized ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "settings"), FAMILIES, ids=[f"{n} {', '.join(s)}" for n, s in FAMILIES])
def test_every_product_of_a_family_is_quantized_and_the_logits_stay_close(
    name: str, settings: dict[str, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    def measure(draw: int) -> dict[str, Agreement]:
        graph = family(name, settings, tmp_path / f"model {draw}", rng)
        before = graph.digest()
        texts = texts_of(rng, 256)
        seen = calibrate(graph, texts, rows=8)
        plain = products(graph)
        assert all(isinstance(w, Dense) for w in plain.values())
        agreements = {}
        for scheme in (Scheme("int4"), Scheme("int8"), Scheme("fp8", activations="fp8")):
            found = quantize(graph, scheme, seen)
            found.graph.check()
            assert {layer.node for layer in found.layers} == set(plain)
            assert forms_of(found) == [{"fp8": "float8e4m3fn"}.get(scheme.weights, scheme.weights)]
            agreement = fidelity(graph, found.graph, [texts[1], texts[0]])
            assert agreement.kl_mean > 0
            assert agreement.positions == 26
            agreements[scheme.weights] = agreement
        assert graph.digest() == before
        return agreements

    def bound(agreements: dict[str, Agreement]) -> bool:
        return all(a.kl_mean < CLOSE[w][0] and a.correlation_min > CLOSE[w][1] for w, a in agreements.items())

    one_within(measure, bound)


@pytest.mark.parametrize("name", SCHEMES)
def test_onnx_runtime_computes_a_quantized_graph_like_the_reference(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Up to the order of sums. Where activations are quantized, that order may move one of them to the next code,
    which changes all logits of a prompt; then six of nine prompts must agree."""
    rounds_activations = bool(SCHEMES[name].activations)

    def measure(draw: int) -> list[float]:
        graph = tiny_decoder(rng, window=5, softcap=8.0, linear_bias=True)
        found = quantize(graph, SCHEMES[name], calibrate(graph, texts_of(rng)))
        folder = tmp_path / str(draw)
        folder.mkdir()
        session, oracle = onnx_runtime(found.graph, folder), ReferenceOracle(found.graph)
        prompts = [rng.integers(0, 61, 6).tolist() for _ in range(9)]
        errors = sorted(normalized_error(logits_of(session, graph, p), oracle.logits(p)) for p in prompts)
        assert rounds_activations or errors[-1] < 1e-5
        return errors

    one_within(measure, lambda errors: errors[5] < 1e-5 and errors[-1] < 0.1)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_saved_quantized_graph_is_valid_and_has_the_same_digest_and_weights_when_read_back(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    graph = tiny_decoder(rng)
    found = quantize(graph, SCHEMES[name], calibrate(graph, texts_of(rng))).graph
    found.check()
    found.save(tmp_path / "graph.onnx")
    onnx.checker.check_model(tmp_path / "graph.onnx", full_check=True)
    opened = Graph.open(tmp_path / "graph.onnx")
    assert opened.digest() == found.digest() != graph.digest()
    assert opened.notes == found.notes
    tokens = rng.integers(0, 61, 8).tolist()
    np.testing.assert_array_equal(ReferenceOracle(opened).logits(tokens), ReferenceOracle(found).logits(tokens))
    for (node, a), b in zip(products(found).items(), products(opened).values(), strict=True):
        assert isinstance(a, Blocked)
        assert isinstance(b, Blocked)
        assert (a.shape, a.block, a.dtype, a.scale_dtype) == (b.shape, b.block, b.dtype, b.scale_dtype), node
        np.testing.assert_array_equal(dequantize(a), dequantize(b))
    assert (tmp_path / "graph.onnx.data").stat().st_size < 0.9 * sum(w.nbytes for w in products(graph).values())


def test_graphs_quantized_differently_have_different_digests(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    seen = calibrate(graph, texts_of(rng))
    other = calibrate(graph, texts_of(rng), percentile=90.0)
    found = [quantize(graph, scheme, seen) for scheme in SCHEMES.values()]
    found += [quantize(graph, SCHEMES["fp8 both"], other), quantize(graph, Scheme("int4", keep=["head"]))]
    digests = [graph.digest(), *(q.graph.digest() for q in found)]
    assert len(set(digests)) == len(digests)
    assert quantize(graph, SCHEMES["int4"], seen).graph.digest() == found[0].graph.digest()
    unnamed = Graph(graph.model, weights_hash="")
    assert quantize(unnamed, SCHEMES["int4"]).graph.weights_hash == ""


def test_norms_biases_and_the_embedding_are_not_quantized_and_a_tied_vocabulary_matrix_is_copied(
    rng: np.random.Generator,
) -> None:
    graph = tiny_decoder(rng, linear_bias=True)
    found = quantize(graph, Scheme("int8")).graph
    gather = node_of(found, "embedding")
    table, head = weight_of(gather.inputs[0]), products(found)["head"]
    assert isinstance(table, Dense)
    assert isinstance(head, Blocked)
    assert products(graph)["head"] is table
    names = {str(n.name) for n in graph.nodes() if n.op_type in ("RMSNormalization", "Add")}
    for name in names:
        for old, new in zip(node_of(graph, name).inputs, node_of(found, name).inputs, strict=True):
            if old is not None and old.const_value is not None:
                assert new is not None
                assert weight_of(new) is weight_of(old)
    dense_bytes = sum(w.nbytes for w in products(graph).values())
    rounded = sum(w.nbytes for w in products(found).values())
    assert graph.decoder is not None
    assert found.decoder is not None
    assert found.decoder.parameters == graph.decoder.parameters
    assert found.decoder.weight_bytes == graph.decoder.weight_bytes - dense_bytes + rounded + table.nbytes


def shared_weight(rng: np.random.Generator, stored: Callable[[Array], Weight] = dense) -> Graph:
    """Two products with one weight, one after the other, and two products of one input."""
    b = DecoderBuilder("shared", Decoder("toy", 32, 32, 64, (LayerCache(1, 1, 32, 32),)))
    one, two = (stored((rng.standard_normal((32, 32)) / 6).astype(np.float32)) for _ in range(2))
    x = b.embedding(dense(rng.standard_normal((32, 32)).astype(np.float32)))
    q, k = b.linear(x, one, "q"), b.linear(x, two, "k")
    x = b.linear(b.attention(q, k, x, 0), one, "o")
    return b.finish_decoder(b.linear(x, two, "head"), weights_hash="w")


def test_shared_weights_and_inputs_are_quantized_once(rng: np.random.Generator) -> None:
    graph = shared_weight(rng)
    found = quantize(graph, Scheme("fp8", activations="fp8"), calibrate(graph, [[1, 2, 3, 30, 31]]))
    weights = products(found.graph)
    assert weights["q"] is weights["o"]
    assert weights["k"] is weights["head"]
    nodes = [n.op_type for n in found.graph.nodes()]
    assert nodes.count("QuantizeLinear") == 3  # the input of q and k, of o, of head
    assert nodes.count("DequantizeLinear") == 3 + 2
    q, k = (node_of(found.graph, name) for name in ("q", "k"))
    assert q.inputs[0] is k.inputs[0]
    assert [layer.node for layer in found.layers] == ["q", "k", "o", "head"]
    assert found.layers[0].weight_error == found.layers[2].weight_error
    assert found.layers[0].output_error != found.layers[2].output_error


def test_the_scale_of_activations_is_their_largest_magnitude_or_a_percentile(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    texts = texts_of(rng)
    for percentile in (None, 95.0):
        seen = calibrate(graph, texts, percentile=percentile)
        found = quantize(graph, Scheme("int8", activations="fp8"), seen).graph
        for name in products(graph):
            wide = node_of(found, name).inputs[0].producer()  # type: ignore[union-attr]
            assert wide is not None
            codes = wide.inputs[0].producer()  # type: ignore[union-attr]
            assert codes is not None
            assert (wide.op_type, codes.op_type) == ("DequantizeLinear", "QuantizeLinear")
            assert wide.inputs[1:] == codes.inputs[1:]
            scale, zero = (constant_of(v) for v in codes.inputs[1:])
            assert scale is not None
            assert zero is not None
            assert (scale.shape, scale.dtype, zero.shape) == ((), np.float32, ())
            assert zero.dtype == ml_dtypes.float8_e4m3fn
            assert float(zero) == 0
            assert float(scale) == np.float32(seen.input(name).bound / 448)
            assert (seen.input(name).bound < seen.input(name).largest) == (percentile is not None)
            assert codes.inputs[0].name == node_of(graph, name).inputs[0].name  # type: ignore[union-attr]
        assert not any(n.op_type == "QuantizeLinear" for n in quantize(graph, Scheme("fp8"), seen).graph.nodes())


def test_activations_beyond_the_bound_are_clipped_and_zeros_stay_zero(tmp_path: Path, rng: np.random.Generator) -> None:
    """In the reference as in ONNX Runtime."""
    b = DecoderBuilder("steps", Decoder("toy", 4, 32, 8, (LayerCache(1, 1, 32, 32),)))
    table = np.zeros((4, 32), np.float32)
    table[1], table[2, 0], table[3] = rng.standard_normal(32), 1e-3, 100 * rng.standard_normal(32)
    x = b.embedding(dense(table))
    x = b.op("Sub", b.attention(x, x, x, 0), b.constant(np.zeros(32, np.float32)))
    graph = b.finish_decoder(b.linear(x, dense(np.eye(32, dtype=np.float32)[:4]), "head"), weights_hash="w")
    bound = float(np.abs(table[1]).max())
    found = quantize(graph, Scheme("fp8", activations="fp8"), calibrate(graph, [[1], [0]]))
    scale, session = np.float32(bound / 448), onnx_runtime(found.graph, tmp_path)
    for token in range(4):
        codes = np.clip(table[token] / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        wanted = codes.astype(np.float32) * scale
        for got in (ReferenceOracle(found.graph).logits([token]), logits_of(session, graph, [token])):
            np.testing.assert_allclose(got[0], wanted[:4], rtol=1e-6)
    silent = quantize(graph, Scheme("fp8", activations="fp8"), calibrate(graph, [[0]]))
    assert not ReferenceOracle(silent.graph).logits([0]).any()
    assert silent.layers[0].output_error == 0.0


# not quantized --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stored", ["int4", "uint4_minimums", "uint4_zero_points", "int8"])
def test_weights_in_blocks_stay_as_they_are(stored: Any, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, weights=stored)
    found = quantize(graph, Scheme("fp8", activations="fp8"), calibrate(graph, texts_of(rng)))
    assert products(found.graph) == products(graph)
    assert found.layers == ()
    assert dict(found.left) == dict.fromkeys(products(graph), "already quantized in the checkpoint")
    assert found.summary == (
        "no product quantized to fp8 by rows, activations to fp8; not quantized: 15 already quantized in the checkpoint"
    )
    assert found.bytes_before == found.bytes_after
    assert "already quantized in the checkpoint" in found.table()
    tokens = rng.integers(0, 61, 9).tolist()
    np.testing.assert_array_equal(ReferenceOracle(found.graph).logits(tokens), ReferenceOracle(graph).logits(tokens))


def test_products_to_keep_are_given_by_name_or_by_a_function(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    assert vocabulary_products(graph) == {"head"}
    by_name = quantize(graph, Scheme("int4", keep=vocabulary_products(graph)))
    by_function = quantize(graph, Scheme("int4", keep=lambda name: name == "head"))
    for found in (by_name, by_function):
        assert found.left == (("head", "kept as requested"),)
        assert products(found.graph)["head"] is products(graph)["head"]
        assert len(found.layers) == 14
        assert "; not quantized: 1 kept as requested" in found.summary
    assert by_name.graph.digest() == by_function.graph.digest()
    with pytest.raises(OptionError, match="no product lm_head to keep") as told:
        quantize(graph, Scheme("int4", keep=["lm_head"]))
    assert "layers.0.q" in str(told.value)


def test_a_product_that_is_kept_reads_the_exact_input_beside_quantized_ones(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    seen = calibrate(graph, texts_of(rng))
    found = quantize(graph, Scheme("fp8", activations="fp8", keep=["layers.0.k"]), seen).graph
    q, k, v = (node_of(found, f"layers.0.{name}").inputs[0] for name in "qkv")
    assert k is not None
    assert k.name == "layers.0.attention_norm"
    assert q is v is not k


# errors ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEMES)
def test_reported_errors_equal_those_computed_by_hand(
    name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny_decoder(rng)
    seen, scheme = calibrate(graph, texts_of(rng), rows=6), SCHEMES[name]
    monkeypatch.setattr(passes, "_CHUNK", 700)  # some rows at a time
    shares: list[float] = []
    found = quantize(graph, scheme, seen, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    plain, rounded = products(graph), products(found.graph)
    for layer in found.layers:
        exact, other = (dequantize(w[layer.node]).astype(np.float64) for w in (plain, rounded))
        assert layer.weight_error == pytest.approx(np.linalg.norm(exact - other) / np.linalg.norm(exact), rel=1e-4)
        assert (layer.bytes_before, layer.bytes_after) == (plain[layer.node].nbytes, rounded[layer.node].nbytes)
        x = seen.input(layer.node).rows
        assert x is not None
        met = x
        if scheme.activations:
            scale = np.float32(seen.input(layer.node).bound / 448)
            met = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        wanted = x @ exact.T
        off = np.linalg.norm(wanted - met @ other.T) / np.linalg.norm(wanted)
        assert layer.output_error == pytest.approx(off, rel=1e-4)
    unseen = quantize(graph, Scheme(scheme.weights, scheme.block))
    assert all(layer.output_error is None for layer in unseen.layers)
    assert [a.weight_error for a in unseen.layers] == [b.weight_error for b in found.layers]


def test_the_table_lists_every_product_worst_first_and_the_summary_is_one_line(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    found = quantize(graph, Scheme("int4", keep=["head"]), calibrate(graph, texts_of(rng)))
    head, *lines = found.table().splitlines()
    assert head.split() == ["product", "form", "before", "after", "weight", "error", "output", "error"]
    assert len(lines) == 15
    assert lines[-1].split(maxsplit=1) == ["head", "kept as requested"]
    errors = [float(line.rsplit(maxsplit=1)[1].rstrip("%")) for line in lines[:-1]]
    assert errors == sorted(errors, reverse=True)
    worst = max(found.layers, key=lambda x: x.output_error or 0)
    assert lines[0].startswith(worst.node)
    assert found.graph.notes == (*graph.notes, found.summary)
    assert found.summary.startswith("14 products quantized to int4 in blocks of 32 (round to nearest): ")
    assert f"worst product {worst.node} with {worst.output_error:.2%}" in found.summary
    assert "\n" not in found.summary


def test_an_error_names_the_product_that_cannot_be_quantized(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, hidden=48)
    with pytest.raises(OptionError, match=r"layers\.0\.q: Blocks of 32 columns do not fit into the 48 columns"):
        quantize(graph, Scheme("int4"))
    quantize(graph, Scheme("int8", block=16))
    wrong = tiny_decoder(rng)
    with pytest.raises(OptionError, match="do not include input 0 of the node layers"):
        quantize(wrong, Scheme("int8"), calibrate(shared_weight(rng), [[1]]))
    with pytest.raises(OptionError, match="requires their ranges"):
        quantize(wrong, Scheme("fp8", activations="fp8"))
    for value, words in ((np.nan, None), (3e38, "is too large for quantization with float16 scales")):

        def stored(array: Array, value: float = value) -> Weight:
            array[3, 4] = value
            return dense(array)

        damaged = shared_weight(rng, stored)
        if words is None:
            with pytest.raises(SourceError, match="The weight of q contains NaN"):
                quantize(damaged, Scheme("int8"))
        else:
            with pytest.raises(OptionError, match=f"q: A weight of 3e.38 {words}"):
                quantize(damaged, Scheme("int8"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": "int3"}, "Weights cannot be quantized to 'int3'"),
        ({"weights": "int8", "activations": "int8"}, "Activations cannot be quantized to 'int8'"),
        ({"weights": "fp8", "block": 32}, "have one scale per row"),
        ({"weights": "int4", "block": 16}, "int4 weights do not support blocks of 16"),
        ({"weights": "int8", "block": 0}, "int8 weights do not support blocks of 0"),
    ],
)
def test_schemes_that_do_not_exist_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Scheme(**settings)


def test_weights_are_read_only_to_quantize_them_and_to_measure_the_error(rng: np.random.Generator) -> None:
    reads = 0

    def stored(array: Array) -> Weight:
        def load() -> Array:
            nonlocal reads
            reads += 1
            return array

        return Dense((32, 32), "float32", load)

    graph = shared_weight(rng, stored)
    found = quantize(graph, Scheme("int4"))
    once = reads
    assert once == 2 * 2  # for each matrix, once for the errors and once for quantization
    found.graph.structure()
    assert reads == once


@pytest.mark.parametrize("variant", ["everything", "float16", "bfloat16", "value_width"])
def test_every_form_of_decoder_is_quantized_and_its_logits_stay_close(variant: str, rng: np.random.Generator) -> None:
    settings = {**VARIANTS[variant]}
    if variant == "everything":
        settings["weights"] = "bfloat16"

    def measure(draw: int) -> Agreement:
        graph = tiny_decoder(rng, **settings)
        texts = texts_of(rng)
        found = quantize(graph, Scheme("int8", activations="fp8"), calibrate(graph, texts))
        found.graph.check()
        assert len(found.layers) == len(products(graph))
        agreement = fidelity(graph, found.graph, texts)
        assert agreement.kl_mean > 0
        return agreement

    one_within(measure, lambda a: a.kl_mean < 0.05 and a.correlation_min > 0.98)


def test_fidelity_covers_all_positions_of_all_texts(rng: np.random.Generator) -> None:
    graph, texts = tiny_decoder(rng), texts_of(rng)
    other = quantize(graph, Scheme("int4")).graph
    shares: list[float] = []
    got = fidelity(graph, other, texts, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    p, q = (np.concatenate([ReferenceOracle(g).logits(t) for t in texts]).astype(np.float64) for g in (graph, other))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    assert got.kl_mean == pytest.approx(float((np.exp(p) * (p - q)).sum(-1).mean()), rel=1e-3)
    assert got.top1 == float((p.argmax(-1) == q.argmax(-1)).mean())
    same = fidelity(graph, graph, texts)
    assert (same.kl_mean, same.top1, same.max_abs) == (0.0, 1.0, 0.0)


def test_a_quantized_graph_runs_with_weights_that_are_loaded_node_by_node(rng: np.random.Generator) -> None:
    """The executor keeps only what one node needs, including quantized weights."""
    graph = tiny_decoder(rng)
    found = quantize(graph, Scheme("fp8")).graph
    tokens = rng.integers(0, 61, 7).tolist()
    wanted = ReferenceOracle(found).logits(tokens)
    assert found.decoder is not None
    inputs = decoder_inputs([tokens], range(7), empty_cache(found.decoder))
    np.testing.assert_array_equal(Executor(found).run(inputs)["logits"], wanted)
