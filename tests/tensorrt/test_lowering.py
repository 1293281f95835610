"""The network for TensorRT computes the same as the NumPy reference: onnxruntime runs it unchanged.

Draws: float32 agrees to 1e-4, a hundred times its rounding. What 16 or 8 bits cost a random model has no formula: one
of eight draws must be within each bound (`redraws.one_within`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import tiny
from parted import parted, reference
from redraws import one_within
from running import Running, session

from transom.preparation.agreement import Agreement, compare
from transom.programs.reading import GraphReader, UnsupportedNode
from transom.quantize.calibration import calibrate
from transom.quantize.passes import Scheme, quantize
from transom.reference.executor import Executor
from transom.sessions.inputs import decoder_inputs, empty_cache
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
def test_every_form_of_decoder_agrees_with_the_reference(form: str, rng: np.random.Generator, tmp_path: Path) -> None:
    def measure(draw: int) -> Agreement:
        graph = tiny_decoder(rng, **VARIANTS[form])
        parts = parted(rng, 61, [19, 1, 1, 7, 1])
        wanted = reference(graph, parts)
        exact = Running(graph, EXACT, CONTEXT, tmp_path / f"exact {draw}").logits(parts)
        assert np.abs(exact - wanted).max() < 1e-4
        return compare(wanted, Running(graph, HALF, CONTEXT, tmp_path / f"half {draw}").logits(parts))

    one_within(measure, lambda half: half.kl_mean < 1e-5 and half.correlation_min > 0.999)


@pytest.mark.parametrize("form", sorted(REFUSED))
def test_a_decoder_without_a_lowering_is_refused(form: str, rng: np.random.Generator) -> None:
    with pytest.raises(UnsupportedNode, match=REFUSED[form]):
        GraphReader(tiny_decoder(rng, **VARIANTS[form]), RtxKernels())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3"])
def test_families_agree_with_the_reference(family: str, rng: np.random.Generator, tmp_path: Path) -> None:
    def measure(draw: int) -> Agreement:
        folder = tmp_path / f"model {draw}"
        tiny(family, folder, rng)
        graph = resolve(folder).open(folder).graph
        parts = parted(rng, 256, [21, 1, 1, 9])
        wanted = reference(graph, parts)
        exact = Running(graph, EXACT, CONTEXT, tmp_path / f"exact {draw}").logits(parts)
        assert np.abs(exact - wanted).max() < 1e-3 * max(1.0, float(np.abs(wanted).max()))
        return compare(wanted, Running(graph, HALF, CONTEXT, tmp_path / f"half {draw}").logits(parts))

    one_within(measure, lambda half: half.kl_mean < 1e-3)


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
def test_logits_are_those_of_the_requested_rows(head: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """And heads may be as wide as fused attention takes them."""
    graph = tiny_decoder(rng, layers=1, head_dim=head or 16)
    running = Running(graph, EXACT, CONTEXT, tmp_path)
    (ids,) = parted(rng, 61, [12])
    inputs = {"input_ids": np.array([ids]), "past": np.array([0]), "rows": np.array([3, 11])}
    (logits,) = running._session.run(["logits"], {**inputs, **running.start()})
    assert np.abs(logits - reference(graph, [ids])[[3, 11]]).max() < 1e-4


# ------------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(("weights", "activations"), [("int4", ""), ("int8", ""), ("fp8", ""), ("fp8", "fp8")])
def test_quantized_graphs_agree_with_the_reference(
    weights: Any, activations: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    """The reference computes the quantized graph. Where activations are quantized, the order of float32 sums may move
    one of them to the next code, which changes the logits."""

    def measure(draw: int) -> tuple[Agreement, Agreement]:
        graph = tiny_decoder(rng)
        seen = calibrate(graph, parted(rng, 61, [40])) if activations else None
        rounded = quantize(graph, Scheme(weights, activations=activations), seen).graph
        parts = parted(rng, 61, [17, 1, 1, 5])
        wanted = reference(rounded, parts)
        exact = Running(rounded, EXACT, CONTEXT, tmp_path / f"exact {draw}").logits(parts)
        if not activations:
            assert np.abs(exact - wanted).max() < 1e-4
            assert compare(wanted, exact).kl_mean < 1e-9
        half = Running(rounded, HALF, CONTEXT, tmp_path / f"half {draw}").logits(parts)
        return compare(wanted, exact), compare(wanted, half)

    one_within(measure, lambda found: found[0].kl_mean < 1e-3 and found[1].kl_mean < 3e-3)


def test_graphs_with_8_bit_blocks_agree_with_the_reference(rng: np.random.Generator, tmp_path: Path) -> None:
    """In float16 they are quantized again, to rows."""

    def measure(draw: int) -> Agreement:
        graph = tiny_decoder(rng, weights="int8")
        parts = parted(rng, 61, [17, 1, 1, 5])
        wanted = reference(graph, parts)
        exact = Running(graph, EXACT, CONTEXT, tmp_path / f"exact {draw}").logits(parts)
        assert np.abs(exact - wanted).max() < 1e-4
        return compare(wanted, Running(graph, HALF, CONTEXT, tmp_path / f"half {draw}").logits(parts))

    one_within(measure, lambda half: half.kl_mean < 3e-3)


@pytest.mark.parametrize("columns", [1, 17, 20])
def test_caches_are_aligned_for_tensorrt_whatever_the_size_of_heads(
    columns: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    graph = tiny_decoder(rng, q_heads=2, kv_heads=1, head_dim=2 * columns, layers=1)
    running = Running(graph, HALF, CONTEXT, tmp_path)
    assert all(k.nbytes % ALIGNMENT == 0 for k in running.lowered.kept)


def test_float8_codes_of_the_first_input_agree_with_the_reference(rng: np.random.Generator, tmp_path: Path) -> None:
    """The input of the first product has only gone through a norm. Of its 1536 codes three may differ: float32 values
    are off by 1e-7 of their size, the step between two codes is 1/16 of it or more, so 0.005 codes differ on average,
    and more than three in one run of 10^10."""
    graph = tiny_decoder(rng, layers=1)
    seen = calibrate(graph, parted(rng, 61, [40]))
    rounded = quantize(graph, Scheme("fp8", activations="fp8"), seen).graph
    (ids,) = parted(rng, 61, [24])
    wanted: list[Any] = []

    def observe(node: Any, inputs: Any, outputs: Any) -> None:
        if node.op_type == "QuantizeLinear" and not wanted:
            wanted.append(np.asarray(outputs[0]).astype(np.float32))

    assert rounded.decoder is not None
    Executor(rounded).run(decoder_inputs([ids], [0], empty_cache(rounded.decoder)), observe=observe)
    running = Running(rounded, EXACT, CONTEXT, tmp_path)
    model = running.lowered.model
    first = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    import onnx_ir as ir

    value = ir.Value(name="codes", type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.Node("", "Cast", [first.outputs[0]], [ir.convenience.convert_attribute("to", 1)], outputs=[value])
    model.graph.append(cast)
    model.graph.outputs.append(value)
    got = session(model, tmp_path / "codes").run(
        ["codes"],
        {"input_ids": np.array([ids]), "past": np.array([0]), "rows": np.array([0]), **running.start()},
    )[0]
    differing = int((got.reshape(wanted[0].shape) != wanted[0]).sum())
    assert differing <= 3, f"{differing} of {wanted[0].size} codes"


def test_attention_in_float8_is_close_to_the_reference(rng: np.random.Generator, tmp_path: Path) -> None:
    precision = RtxPrecision("float16", "fp8", True, attention=True)

    def measure(draw: int) -> Agreement:
        graph = tiny_decoder(rng)
        seen = calibrate(graph, parted(rng, 61, [60]))
        parts = parted(rng, 61, [25, 1, 1])
        rounded = quantize(graph, Scheme("fp8", activations="fp8"), seen).graph
        running = Running(rounded, precision, CONTEXT, tmp_path / str(draw), activations=seen)
        assert all(f.float8 for f in running.lowered.fused)
        return compare(reference(graph, parts), running.logits(parts))

    one_within(measure, lambda near: near.kl_mean < 0.05 and near.correlation_min > 0.97)
