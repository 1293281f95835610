"""Sparse `qnn` variants in the runner: it hands to the graphs what Transom's host does, and gives the same tokens.

Draws: both hosts feed the same graphs with the same inputs, so nothing is left to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from edge_building import onnxruntime_library
from edge_bundles import variant, write_bundle
from onnx import ModelProto, TensorProto, helper

from transom.contract import Work
from transom.generation.params import SamplingParams
from transom.generation.sampling import Sampler
from transom.graph.sparse import with_sparsity
from transom.programs.onnx_writing import IR_VERSION
from transom.sparsity import Sparsity
from transom.testing.models import tiny_decoder
from transom_mobile_export.qnn.claims import read_decoder
from transom_mobile_export.qnn.layout import (
    EMBEDDING_FILE,
    VARIANT_FILE,
    CacheLayer,
    PartFiles,
    QnnVariant,
    cache_layers,
)
from transom_mobile_export.qnn.loading import session_over
from transom_mobile_export.qnn.lowering import lower
from transom_mobile_export.qnn.observing import rows_of
from transom_mobile_export.qnn.parts import plan_parts
from transom_mobile_export.qnn.precision import QnnPrecision
from transom_mobile_export.qnn.running import PartGraphs, QnnEngine
from transom_mobile_export.qnn.sparse_inputs import base_of, first_node, step_inputs
from transom_mobile_export.qnn.sparse_sizes import ChoiceSizes

Call = Callable[..., Any]
Array = np.ndarray[Any, np.dtype[Any]]
BLOCK = 64
CONTEXT = 384
FOLDER = "qnn-snapdragon-8-gen-2"
LOW = -10000.0
STEPS = (128, 70, 1, 1, 60, 1, 3, 72, 1)
"""A prompt in chunks, chunks that begin and end within a block, tokens by themselves."""
HEAT = 4.0
"""Temperature: what is drawn then depends on every logit."""


def described(policy: Sparsity, context: int, chunk: int, low: float = LOW) -> QnnVariant:
    layers, parts = (CacheLayer(2, 16, 16, 0),), (PartFiles("", "", (0, 1)),)
    return QnnVariant(context, chunk, 9, 32, 1.0, layers, "uint8", low, parts, 43, 73, policy.to_string())


def drawn_policy(rng: np.random.Generator) -> Sparsity:
    unit = int(rng.choice([8, 16, 32, 64]))
    return Sparsity(
        columns=0,
        unit=unit,
        node=int(rng.choice([size for size in (1, 4, 8, 16, 64) if unit % size == 0])),
        rows=int(rng.choice([1, 4, 16, 64])),
        local_window=int(rng.integers(1, 150)),
        top_k=int(rng.integers(1, 20)),
        dense_below=int(rng.choice([0, int(rng.integers(400))])),
        max_density=float(rng.choice([0.6, 1.0])),
    )


def test_inputs_are_those_of_transoms_host(call: Call, tmp_path: Path, rng: np.random.Generator) -> None:
    """Random policies, contexts, chunks and positions; each input by name, type, shape and value."""
    seen: set[str] = set()
    for turn in range(10):
        # The first one gathers more units than it chooses
        policy = drawn_policy(rng) if turn else Sparsity(columns=0, top_k=1, dense_below=500)
        blocks = int(rng.integers(1, 9)) if turn else 8
        most = min(-(-policy.local_window // BLOCK) + 1, blocks)
        context, chunk = blocks * BLOCK, int(rng.integers(1, most + 1)) * BLOCK
        low = -float(rng.integers(1, 9999))
        path = tmp_path / f"{turn}.json"
        path.write_text(described(policy, context, chunk, low).to_json())
        steps = []
        for _ in range(4):
            past = int(rng.integers(context))
            steps.append((1, past, 1))
            steps.append((chunk, past, int(rng.integers(1, min(chunk - past % BLOCK, context - past) + 1))))
        found = call("sparse_steps", qnn_json=str(path), steps=steps)
        for (tokens, past, count), (inputs, base, node) in zip(steps, found, strict=True):
            sizes = ChoiceSizes(policy, context, tokens)
            assert (base, node) == (base_of(sizes, past), first_node(sizes, past))
            wanted = step_inputs(sizes, past, count, low)
            seen |= set(wanted)
            assert inputs.keys() == wanted.keys()
            for name, (kind, shape, numbers) in inputs.items():
                case = f"{name} of {policy.to_string()}, {tokens=}, {past=}, {count=}, {context=}"
                assert (kind, tuple(shape)) == (wanted[name].dtype.name, wanted[name].shape), case
                np.testing.assert_array_equal(np.asarray(numbers, kind).reshape(shape), wanted[name], case)
    assert {"mask_rank", "look", "look_weights", "unit_bonus", "mask_near", "node_weights"} <= seen


def test_steps_are_cut_as_transoms_host_cuts_them(call: Call, rng: np.random.Generator) -> None:
    policy = Sparsity(columns=0, top_k=2, local_window=128)
    engine = QnnEngine(described(policy, 1024, 192), np.zeros((9, 32), np.float16), [])
    steps = [(int(rng.integers(800)), int(rng.integers(1, 193))) for _ in range(60)]
    steps += [(0, 1), (0, 15), (0, 16), (63, 192), (64, 192), (700, 15), (700, 16)]
    assert call("sparse_runs", chunk=192, steps=steps) == [engine._pieces(past, count) for past, count in steps]


# -------------------------------------------------------------------------------------------------------------- tokens


def graph_file(lowered: Any) -> bytes:
    """A float graph as a variant's: variances of the keys are float16 outside of it."""
    proto: ModelProto = ir.to_proto(ir.Model(lowered.graph, ir_version=IR_VERSION))
    graph = proto.graph
    for value in graph.input:
        if value.name.startswith("past_variance."):
            inner = f"wide.{value.name}"
            for node in graph.node:
                node.input[:] = [inner if name == value.name else name for name in node.input]
            graph.node.insert(0, helper.make_node("Cast", [value.name], [inner], to=TensorProto.FLOAT))
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for value in graph.output:
        if value.name.startswith("new_variance."):
            inner = f"wide.{value.name}"
            for node in graph.node:
                for names in (node.input, node.output):
                    names[:] = [inner if name == value.name else name for name in names]
            graph.node.append(helper.make_node("Cast", [inner], [value.name], to=TensorProto.FLOAT16))
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    data: bytes = proto.SerializeToString()
    return data


@pytest.mark.parametrize(
    ("heads", "split", "dense_below"),
    [(None, True, 300), (((0.0, 1.0), (0.0, 0.0)), False, 0)],
    ids=["two parts, dense at first", "heads that read everything"],
)
def test_logits_and_tokens_are_transoms(
    edge: Call, call: Call, tmp_path: Path, rng: np.random.Generator, heads: Any, split: bool, dense_below: int
) -> None:
    """The same graphs on the CPU, with Transom's host around them: logits step by step, and a whole answer."""
    policy = Sparsity(columns=0, top_k=3, dense_below=dense_below, max_density=0.6, heads=heads)
    graph = with_sparsity(tiny_decoder(rng, vocabulary=96, context=CONTEXT), policy)
    model = read_decoder(graph, QnnPrecision("float16", "float16"))
    decoder = model.reader.decoder
    files: dict[str, bytes] = {}
    parts, graphs = [], []
    for i, part in enumerate(model.layers if split else plan_parts(model.layers)):
        sizes: dict[str, Any] = {"cached": CONTEXT, "context": CONTEXT}
        pair = [graph_file(lower(model.reader, part, tokens=tokens, **sizes)) for tokens in (128, 1)]
        names = [f"part{i}_{what}.onnx" for what in ("prefill", "decode")]
        files |= dict(zip(names, pair, strict=True))
        parts.append(PartFiles(names[0], names[1], (part.first, part.first + len(part.layers))))
        graphs.append(PartGraphs(*(onnxruntime.InferenceSession(data) for data in pair)))
    assert model.embed.weight is not None
    table = rows_of(model.embed.weight, range(96)).astype(np.float16)
    about = QnnVariant(
        CONTEXT, 128, 96, decoder.hidden, float(model.embed.scale), cache_layers(decoder), "float32", LOW, tuple(parts),
        43, 73, policy.to_string(),
    )  # fmt: skip
    files |= {EMBEDDING_FILE: table.tobytes(), VARIANT_FILE: about.to_json().encode()}
    write(tmp_path, files)
    session = session_over(QnnEngine(about, table, graphs), CONTEXT)
    ids = [int(token) for token in rng.integers(96, size=sum(STEPS))]
    steps = [ids[sum(STEPS[:i]) :][:size] for i, size in enumerate(STEPS)]
    state = session.new_state()
    wanted = [np.asarray(session.step([Work(state, step)])[0]).reshape(-1) for step in steps]
    found = call("step", bundle=str(tmp_path), onnxruntime=str(onnxruntime_library()), steps=steps)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    prompt = ids[: int(rng.integers(257, 272))]
    seed = int(rng.integers(1 << 30))
    words = ("--variant", FOLDER, "--qnn-on-cpu", "--ids", ",".join(map(str, prompt)), "--print-ids")
    said = edge(tmp_path, *words, "--max-tokens", "12", "--temperature", str(HEAT), "--seed", str(seed))
    assert said.returncode == 0, said.stderr
    assert [int(token) for token in said.stdout.split(",")] == sampled(session, prompt, 12, seed)


def sampled(session: Any, prompt: list[int], count: int, seed: int) -> list[int]:
    """Tokens that follow a prompt, drawn by Transom's sampler."""
    sampler = Sampler(SamplingParams(temperature=HEAT, seed=seed), 96, prompt=prompt)
    state, tokens = session.new_state(), list(prompt)
    for _ in range(count):
        new = tokens[state.length :]
        for begin in range(0, len(new), 128):
            (row,) = session.step([Work(state, new[begin : begin + 128])])
        tokens.append(sampler.sample(np.asarray(row).reshape(-1)).token)
    return tokens[len(prompt) :]


def write(folder: Path, files: dict[str, bytes]) -> None:
    places = {name: name if name.startswith("shared/") else f"{FOLDER}/{name}" for name in files}
    numbers = {"soc_model": "43", "htp_arch": "73"}
    one = variant(FOLDER, "qnn", places, requires=numbers, context=CONTEXT)
    write_bundle(folder, [one], {places[name]: content for name, content in files.items()})
