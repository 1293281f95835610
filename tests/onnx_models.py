"""ONNX models written by hand for these tests, and onnxruntime without optimizations to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY = 288
HIDDEN, HEADS, KV_HEADS, DIM, LAYERS, CONTEXT = 32, 4, 2, 16, 2, 64


class Writer:
    """Collects nodes and weights of one model."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._count = 0

    def op(self, op_type: str, *inputs: str, domain: str = "", outputs: int | list[str] = 1, **attributes: Any) -> Any:
        self._count += 1
        name = f"{op_type}_{self._count}"
        names = outputs if isinstance(outputs, list) else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: Any) -> str:
        self._count += 1
        name = f"constant_{self._count}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def random(self, *shape: int, scale: float | None = None, dtype: Any = np.float32) -> str:
        size = scale if scale is not None else 1.5 / np.sqrt(shape[0])
        return self.constant((self.rng.standard_normal(shape) * size).astype(dtype))

    def model(self, inputs: list[Any], outputs: list[Any], *, opset: int = 21, functions: Any = ()) -> Any:
        graph = helper.make_graph(self.nodes, "handmade", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        opsets += [helper.make_opsetid(f.domain, 1) for f in functions]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def value(name: str, dtype: int = TensorProto.FLOAT, shape: Any = None) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def adding_loop(rng: np.random.Generator, most: int, opset: int = 21) -> Any:
    """A Loop that adds |x| to a sum until its largest element reaches 4, at most so many times: x [3] gives the `total`
    [3] and the `steps` [k, 3], which are x times the sum after each turn.

    It carries a value, collects one, and reads two of the outer graph.
    """
    nodes = [
        helper.make_node("Add", ["sum_in", "step"], ["sum_out"]),
        helper.make_node("Mul", ["sum_out", "x"], ["collected"]),
        helper.make_node("ReduceMax", ["sum_out"], ["top"], keepdims=0),
        helper.make_node("Less", ["top", "limit"], ["more"]),
    ]
    body = helper.make_graph(
        nodes,
        "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("sum_in", shape=[3])],
        [value("more", TensorProto.BOOL, []), value("sum_out", shape=[3]), value("collected", shape=[3])],
    )
    w = Writer(rng)
    w.op("Abs", "x", outputs=["step"])
    w.weights.append(numpy_helper.from_array(np.float32(4), "limit"))
    count, start = w.constant(np.int64(most)), w.constant(np.zeros(3, np.float32))
    w.op("Loop", count, w.constant(np.bool_(True)), start, body=body, outputs=["total", "steps"])
    outputs = [value("total", shape=[3]), value("steps", shape=["k", 3])]
    return w.model([value("x", shape=[3])], outputs, opset=opset)


def cache_values(dtype: int = TensorProto.FLOAT) -> tuple[list[Any], list[Any]]:
    """(past inputs, present outputs) of Optimum's names."""
    past, present = [], []
    for i in range(LAYERS):
        for part in ("key", "value"):
            past.append(value(f"past_key_values.{i}.{part}", dtype, ["batch", KV_HEADS, "past", DIM]))
            present.append(value(f"present.{i}.{part}", dtype, ["batch", KV_HEADS, "total", DIM]))
    return past, present


def group_query_decoder(
    rng: np.random.Generator,
    *,
    packed: bool = False,
    rotary: bool = True,
    sinks: bool = False,
    dtype: Any = np.float32,
    position_ids: bool = False,
    **attributes: Any,
) -> Any:
    """A decoder as onnxruntime-genai's builder writes them, with `com.microsoft::GroupQueryAttention`."""
    w = Writer(rng)
    elem = int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def weight(*shape: int, scale: float | None = None) -> str:
        return str(w.random(*shape, scale=scale, dtype=dtype))

    lengths = w.op("Cast", w.op("Sub", w.op("ReduceSum", "attention_mask", w.constant([1]), keepdims=0),
                                w.constant(np.int64(1))), to=TensorProto.INT32)  # fmt: skip
    total = w.op("Gather", w.op("Shape", "attention_mask"), w.constant(np.int64(1)), axis=0)
    total = w.op("Cast", total, to=TensorProto.INT32)
    angles = np.arange(CONTEXT)[:, None] * (100.0 ** -(np.arange(DIM // 2) / (DIM // 2)))[None, :]
    cos, sin = (w.constant(f(angles).astype(dtype)) for f in (np.cos, np.sin))
    x = w.op("Gather", weight(VOCABULARY, HIDDEN, scale=1.0), "input_ids")
    skip = None
    for i in range(LAYERS):
        scale = w.constant((1 + 0.3 * rng.standard_normal(HIDDEN)).astype(dtype))
        if skip is None:
            normal = w.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=1e-5)
        else:
            names = [f"normal.{i}", "", "", f"sum.{i}"]
            w.op(
                "SkipSimplifiedLayerNormalization", x, skip, scale, domain="com.microsoft", outputs=names, epsilon=1e-5
            )
            normal, x = names[0], names[3]
        widths = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
        if packed:
            qkv = [w.op("MatMul", normal, weight(HIDDEN, sum(widths))), "", ""]
        else:
            qkv = [w.op("MatMul", normal, weight(HIDDEN, width)) for width in widths]
        inputs = [*qkv, f"past_key_values.{i}.key", f"past_key_values.{i}.value", lengths, total]
        inputs += [cos, sin] if rotary else ["", ""]
        inputs += ["position_ids" if position_ids else "", ""]
        if sinks:
            inputs.append(weight(HEADS, scale=1.0))
        while inputs[-1] == "":
            inputs.pop()
        out = w.op("GroupQueryAttention", *inputs, domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS,
                   outputs=[f"attention.{i}", f"present.{i}.key", f"present.{i}.value"], do_rotary=int(rotary),
                   **attributes)[0]  # fmt: skip
        skip = w.op("MatMul", out, weight(HEADS * DIM, HIDDEN))
    w.op("SkipSimplifiedLayerNormalization", x, skip, w.constant(np.ones(HIDDEN, dtype)), domain="com.microsoft",
         outputs=["final"], epsilon=1e-5)  # fmt: skip
    logits = w.op("MatMul", "final", weight(HIDDEN, VOCABULARY))
    w.op("Cast", logits, to=TensorProto.FLOAT, outputs=["logits"])
    past, present = cache_values(elem)
    ids = [value("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    ids += [value("attention_mask", TensorProto.INT64, ["batch", "total"])]
    if position_ids:
        ids.append(value("position_ids", TensorProto.INT64, ["batch", "sequence"]))
    return w.model([*ids, *past], [value("logits", shape=["batch", "sequence", VOCABULARY]), *present])


def save(model: Any, path: Path) -> Path:
    onnx.save(model, str(path))
    return path


def runtime(model: Any | Path) -> Any:
    """An onnxruntime session without optimizations, which would round int8 and int4 weights anew."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class RuntimeOracle:
    """A decoder's logits by onnxruntime: the whole sequence at once, or token by token through its cache."""

    def __init__(self, model: Any | Path) -> None:
        self.session = runtime(model)

    def logits(self, ids: list[int], *, steps: int = 0) -> Any:
        """[tokens, vocabulary]; the last `steps` tokens one at a time."""
        inputs = {i.name: i for i in self.session.get_inputs()}
        outputs = [o.name for o in self.session.get_outputs()]
        half = any(i.type == "tensor(float16)" for i in inputs.values())
        cache = {
            name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float16 if half else np.float32)
            for name, i in inputs.items()
            if name.startswith("past")
        }
        rows, done = [], 0
        chunks = [ids[: len(ids) - steps], *([t] for t in ids[len(ids) - steps :])]
        for chunk in chunks:
            total = done + len(chunk)
            feed: dict[str, Any] = {"input_ids": np.asarray([chunk]), **cache}
            feed["attention_mask"] = np.ones((1, total), np.int64)
            feed["position_ids"] = np.arange(done, total)[None]
            result = dict(
                zip(outputs, self.session.run(None, {k: v for k, v in feed.items() if k in inputs}), strict=True)
            )
            rows.append(result["logits"][0])
            cache = {name: result[name.replace("past_key_values", "present")] for name in cache}
            done = total
        return np.concatenate(rows)
