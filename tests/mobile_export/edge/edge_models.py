"""One tiny random decoder in three forms: as a graph with GenAI's inputs, as static graphs with the inputs of a qnn
variant, and as NumPy.

Attention with grouped queries, of which some layers see a window only; learned positions, so that a wrong one shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]
HEADS, KV_HEADS, COLUMNS, HIDDEN = 4, 2, 4, 16
LOW = -10000.0
STEP = 1 / 16  # of a cache in integers, whose zero is 128
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}
NUMPY = {"float32": np.float32, "float16": np.float16, "uint8": np.uint8}


@dataclass
class Tiny:
    """The weights, float32."""

    embedding: Array  # [vocabulary, hidden], numbers that float16 has
    positions: Array  # [context, hidden]
    layers: list[dict[str, Array]]
    head: Array  # [hidden, vocabulary]
    windows: tuple[int, ...]

    @property
    def context(self) -> int:
        return len(self.positions)

    @property
    def vocabulary(self) -> int:
        return len(self.embedding)


def tiny(rng: np.random.Generator, *, vocabulary: int = 96, context: int = 40, windows: Sequence[int] = (0, 0)) -> Tiny:
    def draw(*shape: int, scale: float = 1.0) -> Array:
        drawn: Array = (rng.standard_normal(shape) * scale / np.sqrt(shape[0])).astype(np.float32)
        return drawn

    inner = HEADS * COLUMNS
    layers = [
        {
            "q": draw(HIDDEN, inner, scale=3),
            "k": draw(HIDDEN, KV_HEADS * COLUMNS),
            "v": draw(HIDDEN, KV_HEADS * COLUMNS),
            "o": draw(inner, HIDDEN),
        }
        for _ in windows
    ]
    embedding = rng.standard_normal((vocabulary, HIDDEN)).astype(np.float16).astype(np.float32)
    positions = rng.standard_normal((context, HIDDEN)).astype(np.float32)
    return Tiny(embedding, positions, layers, draw(HIDDEN, vocabulary, scale=3), tuple(windows))


# ----------------------------------------------------------------------------------------------------------- reference


def reference(
    model: Tiny, ids: Sequence[int], kind: str = "float32", scale: float = 1.0, edges: list[float] | None = None
) -> Array:
    """Logits [tokens, vocabulary], computed at once.

    Args:
        kind: the type of the cache, whose rounding keys and values get.
        edges: for uint8, gets the distance of the nearest key or value to the middle between two codes, in codes.
    """
    tokens, edges = len(ids), [] if edges is None else edges
    x = model.embedding[list(ids)] * np.float32(scale) + model.positions[:tokens]
    for layer, window in zip(model.layers, model.windows, strict=True):

        def heads(matrix: str, count: int, x: Array = x, layer: dict[str, Array] = layer) -> Array:
            return (x @ layer[matrix]).reshape(tokens, count, COLUMNS).transpose(1, 0, 2)

        q = heads("q", HEADS)
        k, v = (np.repeat(_kept(heads(name, KV_HEADS), kind, edges), HEADS // KV_HEADS, axis=0) for name in "kv")
        distance = np.arange(tokens)[:, None] - np.arange(tokens)
        seen = (distance >= 0) & ((distance < window) if window else True)
        scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(COLUMNS)) + np.where(seen, 0, np.float32(LOW))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + mixed.transpose(1, 0, 2).reshape(tokens, -1) @ layer["o"]
    logits: Array = np.tanh(x) @ model.head
    return logits


LEAD = {"float32": 0.01, "float16": 0.05, "uint8": 0.01}
"""Smallest lead of a greedy token's logit over the next, by the type of the cache.

float32: a score of attention is a sum of four products of numbers below 30, so it is off by 4 * 30 * 6e-8 = 7e-6.
Shares of attention, scores of the second layer and logits each multiply an error by less than 10: 1e-3 at most.
float16: an error may round a number in the cache to its neighbor, up to 2^-9 away. That changes a score by 0.01, a
share by a quarter of it, and the logits by 0.015 at most; a few such changes add up to 0.05.
"""
EDGE = 1e-3
"""Smallest distance of a number from the middle between two codes of a cache in uint8, in steps of 1/16: six times the
error of a key or a value in float32."""


def greedy(logits_of: Callable[[list[int]], Array], prompt: Sequence[int], count: int) -> list[int]:
    """Tokens that follow a prompt, without a cache."""
    return _greedy(logits_of, prompt, count)[0]


def _greedy(logits_of: Callable[[list[int]], Array], prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    """And the smallest lead of one of them over the next best token."""
    ids, lead = list(prompt), np.inf
    for _ in range(count):
        row = logits_of(ids)[-1]
        second, first = np.sort(row)[-2:]
        lead = min(lead, float(first - second))
        ids.append(int(np.argmax(row)))
    return ids[len(prompt) :], lead


def clear_answer(
    rng: np.random.Generator,
    length: int,
    count: int,
    *,
    kind: str = "float32",
    scale: float = 1.0,
    wanted: Callable[[list[int]], bool] = lambda answer: True,
    **form: Any,
) -> tuple[Tiny, list[int], list[int]]:
    """A random model and prompt whose greedy tokens do not depend on rounding: the model, the prompt, and the tokens.

    A draw is made again until each token leads by `LEAD` and no number of a uint8 cache is within `EDGE` of two codes;
    one in twenty is clear or more, so a thousand draws fail once in 10^22 runs.

    Args:
        length: of the prompt. count: of the answer.
        wanted: a further condition that the answer must meet.
        form: arguments of `tiny`.
    """
    for _ in range(1000):
        model = tiny(rng, **form)
        prompt = [int(token) for token in rng.integers(model.vocabulary, size=length)]
        edges: list[float] = [np.inf]
        logits_of = partial(reference, model, kind=kind, scale=scale, edges=edges)
        answer, lead = _greedy(logits_of, prompt, count)
        if lead > LEAD[kind] and min(edges) > EDGE and wanted(answer):
            return model, prompt, answer
    raise AssertionError("none of 1000 models had a clear answer")


CHECKED = (1, 2, 3, 4, 5, 6, 7)
"""The check prompt of a bundle."""


def verified(rng: np.random.Generator, kind: str = "float32", scale: float = 1.0) -> Tiny:
    """A random model whose most likely tokens for `CHECKED` do not depend on rounding; shifting the head by one column
    changes all of them."""
    for _ in range(1000):
        model, edges = tiny(rng), [np.inf]
        rows = np.sort(reference(model, CHECKED, kind, scale, edges))
        if (rows[:, -1] - rows[:, -2]).min() > LEAD[kind] and min(edges) > EDGE:
            return model
    raise AssertionError("none of 1000 models had clear tokens")


def _kept(values: Array, kind: str, edges: list[float]) -> Array:
    if kind == "uint8":
        edges.append(float(np.abs(values / STEP % 1 - 0.5).min()))
        kept: Array = ((np.clip(np.rint(values / STEP) + 128, 0, 255) - 128) * STEP).astype(np.float32)
    else:
        kept = values.astype(NUMPY[kind]).astype(np.float32)
    return kept


# -------------------------------------------------------------------------------------------------------------- graphs


class _Writer:
    """Nodes and weights of one graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def constant(self, value: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def __call__(self, operator: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def shaped(self, value: str, *shape: int) -> str:
        return self("Reshape", value, self.constant(np.array(shape, np.int64)))

    def heads(self, x: str, matrix: Array, tokens: int, count: int, out: str = "") -> str:
        product = self.shaped(self("MatMul", x, self.constant(matrix)), 1, tokens, count, COLUMNS)
        return self("Transpose", product, perm=[0, 2, 1, 3], out=out)

    def attend(self, q: str, both: list[str], mask: str, x: str, layer: dict[str, Array], tokens: int) -> str:
        """One layer from its queries, [1, heads, tokens, columns], and all keys and values."""
        spread = self.constant(np.repeat(np.arange(KV_HEADS), HEADS // KV_HEADS))
        k, v = (self("Gather", one, spread, axis=1) for one in both)
        scores = self("MatMul", q, self("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self("Add", self("Mul", scores, self.constant(np.float32(COLUMNS**-0.5))), mask)
        mixed = self("MatMul", self("Softmax", scores, axis=-1), v)
        rows = self.shaped(self("Transpose", mixed, perm=[0, 2, 1, 3]), 1, tokens, HEADS * COLUMNS)
        return self("Add", x, self("MatMul", rows, self.constant(layer["o"])))

    def model(self, inputs: list[Any], outputs: list[Any]) -> bytes:
        graph = helper.make_graph(self.nodes, "tiny", inputs, outputs, self.weights)
        data: bytes = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9
        ).SerializeToString()
        return data


def genai_graph(model: Tiny, kind: str = "float32") -> bytes:
    """A graph with the inputs and outputs of ONNX Runtime GenAI; its cache is of that kind, float32 or float16."""
    assert not any(model.windows)
    w, cache, info = _Writer(), TYPES[kind], helper.make_tensor_value_info
    inputs = [
        info("input_ids", TensorProto.INT64, [1, "tokens"]),
        info("attention_mask", TensorProto.INT64, [1, "total"]),
    ]
    outputs = [info("logits", TensorProto.FLOAT, [1, "tokens", model.vocabulary])]
    total = w("Shape", "attention_mask", start=1, end=2)
    past = w("Shape", "past_key_values.0.key", start=2, end=3)
    scalar = w.constant(np.array([], np.int64))
    zero, one = w.constant(np.int64(0)), w.constant(np.int64(1))
    columns = w("Range", zero, w("Reshape", total, scalar), one)
    at = w("Range", w("Reshape", past, scalar), w("Reshape", total, scalar), one)
    hidden = w("Gather", w.constant(model.embedding), "input_ids")
    x = w("Add", hidden, w("Gather", w.constant(model.positions), at))
    later = w("Greater", w("Unsqueeze", columns, w.constant([0])), w("Unsqueeze", at, w.constant([1])))
    low, none = w.constant(np.float32(LOW)), w.constant(np.float32(0))
    unseen = w("Equal", "attention_mask", zero)
    mask = w("Add", w("Where", later, low, none), w("Where", unseen, low, none))
    for i, layer in enumerate(model.layers):
        both = []
        for name in ("key", "value"):
            fresh = w("Cast", w.heads(x, layer[name[0]], -1, KV_HEADS), to=cache)
            full = w("Concat", f"past_key_values.{i}.{name}", fresh, axis=2, out=f"present.{i}.{name}")
            both.append(w("Cast", full, to=TensorProto.FLOAT))
            inputs.append(info(f"past_key_values.{i}.{name}", cache, [1, KV_HEADS, f"past{i}", COLUMNS]))
            outputs.append(info(f"present.{i}.{name}", cache, [1, KV_HEADS, f"now{i}", COLUMNS]))
        x = w.attend(w.heads(x, layer["q"], -1, HEADS), both, mask, x, layer, -1)
    w("MatMul", w("Tanh", x), w.constant(model.head), out="logits")
    return w.model(inputs, outputs)


def static_graph(model: Tiny, first: int, end: int, tokens: int, kind: str) -> bytes:
    """The layers from `first` to `end` as a part of a qnn variant, for `tokens` new tokens."""
    w, cache, info = _Writer(), TYPES[kind], helper.make_tensor_value_info
    context, width = model.context, model.context + tokens
    inputs = [
        info("hidden", TensorProto.FLOAT, [1, tokens, HIDDEN]),
        info("positions", TensorProto.INT32, [1, tokens]),
    ]
    windows = model.windows[first:end]
    masks = [name for name, used in (("mask", 0 in windows), ("mask_window", any(windows))) if used]
    inputs += [info(name, TensorProto.FLOAT, [1, 1, tokens, width]) for name in masks]
    outputs = []
    at = w("Gather", w.constant(model.positions), "positions")
    # Every part takes positions, the first one adds them
    x = w("Add", "hidden", at if first == 0 else w("Mul", at, w.constant(np.float32(0))))
    code = (w.constant(np.float32(STEP)), w.constant(np.uint8(128)))
    for i in range(first, end):
        layer, both = model.layers[i], []
        for name in ("key", "value"):
            fresh = w.heads(x, layer[name[0]], tokens, KV_HEADS)
            if kind == "uint8":
                new = w("QuantizeLinear", fresh, *code, out=f"new_{name}.{i}")
            else:
                new = w("Cast", fresh, to=cache, out=f"new_{name}.{i}")
            full = w("Concat", f"past_{name}.{i}", new, axis=2)
            plain = w("DequantizeLinear", full, *code) if kind == "uint8" else w("Cast", full, to=TensorProto.FLOAT)
            both.append(plain)
            inputs.append(info(f"past_{name}.{i}", cache, [1, KV_HEADS, context, COLUMNS]))
            outputs.append(info(f"new_{name}.{i}", cache, [1, KV_HEADS, tokens, COLUMNS]))
        mask = "mask_window" if model.windows[i] else "mask"
        x = w.attend(w.heads(x, layer["q"], tokens, HEADS), both, mask, x, layer, tokens)
    if end == len(model.layers):
        inputs.append(info("row", TensorProto.INT32, [1]))
        row = w("Gather", w("Tanh", x), "row", axis=1)
        w("MatMul", row, w.constant(model.head), out="logits")
        outputs.append(info("logits", TensorProto.FLOAT, [1, 1, model.vocabulary]))
    else:
        w("Identity", x, out="hidden_out")
        outputs.append(info("hidden_out", TensorProto.FLOAT, [1, tokens, HIDDEN]))
    return w.model(inputs, outputs)


def qnn_files(
    model: Tiny, *, chunk: int, parts: Sequence[tuple[int, int]], kind: str, scale: float
) -> dict[str, bytes]:
    """The files of a qnn variant, not compiled, by the backend's names."""
    files = {"shared/embedding.bin": model.embedding.astype(np.float16).tobytes()}
    described = []
    for place, (first, end) in enumerate(parts):
        names = {"prefill": f"part{place}_prefill.onnx", "decode": f"part{place}_decode.onnx"}
        files[names["prefill"]] = static_graph(model, first, end, chunk, kind)
        files[names["decode"]] = static_graph(model, first, end, 1, kind)
        described.append({**names, "layers": [first, end]})
    about = {
        "qnn_variant": 1,
        "context": model.context,
        "chunk": chunk,
        "vocabulary": model.vocabulary,
        "hidden": HIDDEN,
        "embedding": {"file": "shared/embedding.bin", "dtype": "float16", "scale": scale},
        "layers": [
            {"kv_heads": KV_HEADS, "head_dim": COLUMNS, "value_dim": COLUMNS, "window": window}
            for window in model.windows
        ],
        "cache": {"dtype": kind},
        "mask_low": LOW,
        "parts": described,
        "soc_model": 43,
        "htp_arch": 73,
    }
    files["qnn.json"] = json.dumps(about).encode()
    return files
