"""The network for TensorRT computes the same as the NumPy reference: onnxruntime runs it unchanged.

Draws: float32 agrees to 1e-4, a hundred times its rounding; the divergences that are allowed are several times what
16 or 8 bits cost; one code in a thousand may fall otherwise on an edge.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import tiny
from running import Running, parted, reference

from transom.preparation.agreement import compare
from transom.programs.reading import GraphReader, UnsupportedNode
from transom.quantize.calibration import calibrate
from transom.quantize.passes import Scheme, quantize
from transom.reference.executor import Executor
from transom.sources import resolve
from transom.testing.models import VARIANTS, tiny_decoder
from transom_tensorrt.lowering import RtxKernels
from transom_tensorrt.network import ALIGNMENT
from transom_tensorrt.precision import RtxPrecision

CONTEXT = 64
EXACT, HALF = RtxPrecision("float32"), RtxPrecision("float16")
REFUSED = {"attention_bias": "no kernel for Concat", "everything": "no kernel for Concat"}
"""Attention with a bias that is computed: another backend's."""


@pytest.mark.parametrize("form", sorted(set(VARIANTS) - set(REFUSED) - {"int8"}))
def test_every_form_of_decoder_is_the_references(form: str, rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, **VARIANTS[form])
    parts = parted(rng, 61, [19, 1, 1, 7, 1])
    wanted = reference(graph, parts)
    exact = Running(graph, EXACT, CONTEXT, tmp_path / "exact").logits(parts)
    assert np.abs(exact - wanted).max() < 1e-4
    half = compare(wanted, Running(graph, HALF, CONTEXT, tmp_path / "half").logits(parts))
    assert half.kl_mean < 1e-5, half
    assert half.correlation_min > 0.999, half


@pytest.mark.parametrize("form", sorted(REFUSED))
def test_what_cannot_be_written_is_refused(form: str, rng: np.random.Generator) -> None:
    with pytest.raises(UnsupportedNode, match=REFUSED[form]):
        GraphReader(tiny_decoder(rng, **VARIANTS[form]), RtxKernels())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3"])
def test_families_are_the_references(family: str, rng: np.random.Generator, tmp_path: Path) -> None:
    tiny(family, tmp_path / "model", rng)
    graph = resolve(tmp_path / "model").open(tmp_path / "model").graph
    parts = parted(rng, 256, [21, 1, 1, 9])
    wanted = reference(graph, parts)
    exact = Running(graph, EXACT, CONTEXT, tmp_path / "exact").logits(parts)
    assert np.abs(exact - wanted).max() < 1e-3 * max(1.0, float(np.abs(wanted).max()))
    half = compare(wanted, Running(graph, HALF, CONTEXT, tmp_path / "half").logits(parts))
    assert half.kl_mean < 1e-3, half


def test_sequences_of_a_batch_do_not_see_each_other(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, window=5)
    lengths = [9, 1, 14]
    texts = parted(rng, 61, lengths)
    running = Running(graph, EXACT, CONTEXT, tmp_path)
    caches = running.start(len(texts))
    for i, text in enumerate(texts):  # each prompt by itself, into its own slot
        own = {name: value[i : i + 1].copy() for name, value in caches.items()}
        running.step(own, [text], [0])
        for name, value in own.items():
            caches[name][i] = value[0]
    more = parted(rng, 61, [1, 1, 1])
    logits = running.step(caches, more, lengths)
    for i, (text, new) in enumerate(zip(texts, more, strict=True)):
        assert np.abs(logits[i] - reference(graph, [text, new])[-1]).max() < 1e-4


@pytest.mark.parametrize("head", [0, 200, 256])
def test_rows_are_those_that_are_asked_for(head: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """And heads may be as wide as fused attention takes them."""
    graph = tiny_decoder(rng, layers=1, head_dim=head or 16)
    running = Running(graph, EXACT, CONTEXT, tmp_path)
    (ids,) = parted(rng, 61, [12])
    inputs = {"input_ids": np.array([ids]), "past": np.array([0]), "rows": np.array([3, 11])}
    (logits,) = running._session.run(["logits"], {**inputs, **running.start()})
    assert np.abs(logits - reference(graph, [ids])[[3, 11]]).max() < 1e-4


# ------------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(("weights", "activations"), [("int4", ""), ("int8", ""), ("fp8", ""), ("fp8", "fp8")])
def test_rounded_graphs_are_the_references(
    weights: Any, activations: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    """FP8 rounding included: the reference computes the very graph that was rounded."""
    graph = tiny_decoder(rng)
    seen = calibrate(graph, parted(rng, 61, [40])) if activations else None
    rounded = quantize(graph, Scheme(weights, activations=activations), seen).graph
    parts = parted(rng, 61, [17, 1, 1, 5])
    wanted, exact = reference(rounded, parts), Running(rounded, EXACT, CONTEXT, tmp_path / "exact").logits(parts)
    if not activations:
        assert np.abs(exact - wanted).max() < 1e-4
    # A value at the edge of two codes may fall either way: float32 sums differ in their last bits.
    assert compare(wanted, exact).kl_mean < (1e-3 if activations else 1e-9)
    half = compare(wanted, Running(rounded, HALF, CONTEXT, tmp_path / "half").logits(parts))
    assert half.kl_mean < 3e-3, half


def test_8_bit_blocks_are_the_references_in_float32(rng: np.random.Generator, tmp_path: Path) -> None:
    """Where networks are for speed they are rounded anew."""
    graph = tiny_decoder(rng, weights="int8")
    parts = parted(rng, 61, [17, 1, 1, 5])
    wanted = reference(graph, parts)
    assert np.abs(Running(graph, EXACT, CONTEXT, tmp_path / "exact").logits(parts) - wanted).max() < 1e-4
    assert compare(wanted, Running(graph, HALF, CONTEXT, tmp_path / "half").logits(parts)).kl_mean < 3e-3


@pytest.mark.parametrize("columns", [1, 17, 20])
def test_caches_begin_where_tensorrt_takes_them_whatever_heads_there_are(
    columns: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    graph = tiny_decoder(rng, q_heads=2, kv_heads=1, head_dim=2 * columns, layers=1)
    running = Running(graph, HALF, CONTEXT, tmp_path)
    assert all(k.nbytes % ALIGNMENT == 0 for k in running.lowered.kept)


def test_most_codes_of_float8_inputs_are_the_references(rng: np.random.Generator, tmp_path: Path) -> None:
    """The first product's input has gone through nothing but a norm: there the codes must agree, bit for bit."""
    graph = tiny_decoder(rng, layers=1)
    seen = calibrate(graph, parted(rng, 61, [40]))
    rounded = quantize(graph, Scheme("fp8", activations="fp8"), seen).graph
    (ids,) = parted(rng, 61, [24])
    wanted: list[Any] = []

    def observe(node: Any, inputs: Any, outputs: Any) -> None:
        if node.op_type == "QuantizeLinear" and not wanted:
            wanted.append(np.asarray(outputs[0]).astype(np.float32))

    executor = Executor(rounded)
    _run(executor, rounded, ids, observe)
    running = Running(rounded, EXACT, CONTEXT, tmp_path)
    model = running.lowered.model
    first = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    import onnx_ir as ir
    from running import session

    value = ir.Value(name="codes", type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.Node("", "Cast", [first.outputs[0]], [ir.convenience.convert_attribute("to", 1)], outputs=[value])
    model.graph.append(cast)
    model.graph.outputs.append(value)
    got = session(model, tmp_path / "codes").run(
        ["codes"],
        {"input_ids": np.array([ids]), "past": np.array([0]), "rows": np.array([0]), **running.start()},
    )[0]
    same = np.mean(got.reshape(wanted[0].shape) == wanted[0])
    assert same > 0.999, f"{same:.4%} of the codes"


def _run(executor: Executor, graph: Any, ids: list[int], observe: Any) -> None:
    from transom.signature import cache_input_names

    count = len(ids)
    inputs: dict[str, Any] = {
        "input_ids": np.asarray(ids), "positions": np.arange(count), "sequences": np.zeros(count, np.int64),
        "past_positions": np.zeros(0, np.int64), "past_sequences": np.zeros(0, np.int64), "logit_rows": np.array([0]),
    }  # fmt: skip
    for i, layer in enumerate(graph.decoder.layers):
        for name, width in zip(cache_input_names(i), (layer.head_dim, layer.value_dim), strict=True):
            inputs[name] = np.zeros((0, layer.kv_heads * width), np.float32)
    executor.run(inputs, observe=observe)


def test_attention_in_float8_stays_near(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng)
    seen = calibrate(graph, parted(rng, 61, [60]))
    parts = parted(rng, 61, [25, 1, 1])
    precision = RtxPrecision("float16", "fp8", True, attention=True)
    rounded = quantize(graph, Scheme("fp8", activations="fp8"), seen).graph
    running = Running(rounded, precision, CONTEXT, tmp_path, activations=seen)
    assert all(f.float8 for f in running.lowered.fused)
    near = compare(reference(graph, parts), running.logits(parts))
    assert near.kl_mean < 0.05, near
    assert near.correlation_min > 0.97, near
