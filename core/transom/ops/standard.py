"""ONNX's own operators. Schema and shape rule come from ONNX. The reference is defined in this package or taken from
the `onnx` package (`onnx.reference`), which is NumPy too.

`_SAMPLES` lists the operators that occur in graphs built by Transom, with random samples for the conformance kit. Other
ONNX operators are looked up on demand, so that any ONNX file runs on the reference backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from transom.ops import conv_transpose, dequantize_linear, quantize_linear, rms_normalization, rotary_embedding
from transom.ops.functions import OPSET
from transom.ops.schema import Array, Attributes, OpSchema, Param, Reference, Sample

Samples = Callable[[np.random.Generator], Iterator[Sample]]


@functools.lru_cache(maxsize=512)
def _evaluator(
    domain: str,
    name: str,
    present: tuple[bool, ...],
    outputs: int,
    attributes: bytes,
    types: tuple[tuple[int, int], ...] | None = None,
) -> Any:
    """One node, ready to run. `types`, the (element type, rank) of each input, is needed if the node's function body
    depends on them (Gelu)."""
    import onnx
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    node = onnx.NodeProto.FromString(attributes)
    names = [f"x{i}" if there else "" for i, there in enumerate(present)]
    node.input.extend(names)
    node.output.extend(f"y{i}" for i in range(outputs))
    opsets = [helper.make_opsetid("", OPSET), *([helper.make_opsetid(domain, 5)] if domain else [])]
    if types is None:
        given = [n for n in names if n]
        return ReferenceEvaluator(
            helper.make_function("transom.reference", name, given, list(node.output), [node], opsets)
        )
    inputs = [
        helper.make_tensor_value_info(n, elem, [None] * rank)
        for n, (elem, rank) in zip((n for n in names if n), types, strict=True)
    ]
    graph = helper.make_graph([node], name, inputs, [onnx.ValueInfoProto(name=y) for y in node.output])
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets))


def _onnx_reference(domain: str, name: str) -> Reference:
    def run(inputs: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
        from onnx import helper, numpy_helper
        from onnx.reference.op_run import RuntimeContextError

        given = {
            k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v
            for k, v in attributes.items()
            if not k.startswith("__")
        }
        node = helper.make_node(name, [], [], domain=domain, **given)
        present = tuple(x is not None for x in inputs)
        outputs = int(attributes.get("__outputs__", 1))
        key = (domain, name, present, outputs, node.SerializeToString(deterministic=True))
        try:
            evaluator = _evaluator(*key)
        except RuntimeContextError:
            arrays = [np.asarray(x) for x in inputs if x is not None]
            evaluator = _evaluator(*key, tuple((helper.np_dtype_to_tensor_dtype(x.dtype), x.ndim) for x in arrays))
        result = evaluator.run(None, {f"x{i}": x for i, x in enumerate(inputs) if x is not None}, attributes={})
        results: tuple[Any, ...] = tuple(
            y if isinstance(y, list) else np.asarray(y) for y in result
        )  # lists: sequences
        return results

    return run


def _direct(function: Callable[..., Array]) -> Reference:
    def run(inputs: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
        return (function(*inputs),)

    return run


def _swish(inputs: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
    x = np.asarray(inputs[0])
    alpha = x.dtype.type(attributes.get("alpha", 1.0))
    with np.errstate(over="ignore"):  # exp(-x) of a very negative x is inf, and x / inf is the right zero
        return ((x / (1 + np.exp(-alpha * x))).astype(x.dtype, copy=False),)


_REFERENCES: Mapping[str, Reference] = {
    "Add": _direct(np.add),
    "ConvTranspose": conv_transpose.reference,
    "DequantizeLinear": dequantize_linear.reference,
    "MatMul": _direct(np.matmul),
    "Mul": _direct(np.multiply),
    "QuantizeLinear": quantize_linear.reference,
    "RMSNormalization": rms_normalization.reference,
    "RotaryEmbedding": rotary_embedding.reference,
    "Sub": _direct(np.subtract),
    "Swish": _swish,
}


def has_own_reference(name: str) -> bool:
    """Whether the reference of this ONNX operator is defined here; otherwise the `onnx` package provides it."""
    return name in _REFERENCES


def _floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def _ints(*values: int) -> Array:
    return np.array(values, np.int64)


def _unary(low: float = -3.0, high: float = 3.0, **attributes: Any) -> Samples:
    def samples(rng: np.random.Generator) -> Iterator[Sample]:
        yield Sample("rank 2", (rng.uniform(low, high, (5, 24)).astype(np.float32),), attributes)
        yield Sample("rank 3", (rng.uniform(low, high, (2, 3, 8)).astype(np.float32),), attributes)

    return samples


def _binary(rng: np.random.Generator) -> Iterator[Sample]:
    for a, b in (((4, 24), (4, 24)), ((4, 24), (24,)), ((3, 1, 8), (5, 8)), ((4, 24), ())):
        right = (rng.random(b) + 0.5).astype(np.float32)
        yield Sample(f"{list(a)} and {list(b)}", (_floats(rng, *a), np.asarray(right)), {})


def _compare(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("int64", (rng.integers(0, 4, (6, 1)), rng.integers(0, 4, (1, 5))), {})
    yield Sample("float32", (_floats(rng, 3, 4), _floats(rng, 4)), {})


def _logical(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("bool", (rng.random((4, 5)) < 0.5, rng.random((1, 5)) < 0.5), {})


def _matmul(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("weights", (_floats(rng, 5, 32), _floats(rng, 32, 24)), {}, constant_inputs=(1,))
    yield Sample("batched", (_floats(rng, 2, 3, 4, 8), _floats(rng, 2, 1, 8, 6)), {})


def _gather(rng: np.random.Generator) -> Iterator[Sample]:
    table = _floats(rng, 40, 16)
    yield Sample("rows", (table, rng.integers(0, 40, 7)), {"axis": 0}, constant_inputs=(0,))
    yield Sample("one column", (table, np.asarray(np.int64(3))), {"axis": 1})


def _transpose(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("matrix", (_floats(rng, 5, 7),), {"perm": [1, 0]})
    yield Sample("heads", (_floats(rng, 5, 2, 3, 8),), {"perm": [1, 2, 0, 3]})


def _reshape(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("split", (_floats(rng, 5, 24), _ints(0, 3, -1)), {}, constant_inputs=(1,))
    yield Sample("join", (_floats(rng, 5, 3, 8), _ints(0, -1)), {}, constant_inputs=(1,))


def _unsqueeze(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("front", (_floats(rng, 5, 8), _ints(0)), {}, constant_inputs=(1,))


def _squeeze(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("front", (_floats(rng, 1, 5, 8), _ints(0)), {}, constant_inputs=(1,))


def _concat(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("rows", (_floats(rng, 2, 8), _floats(rng, 5, 8)), {"axis": 0})
    yield Sample("empty first", (_floats(rng, 0, 8), _floats(rng, 5, 8)), {"axis": 0})


def _slice(rng: np.random.Generator) -> Iterator[Sample]:
    inputs = (_floats(rng, 6, 12), _ints(1, 0), _ints(-1, 9), _ints(0, 1), _ints(1, 2))
    yield Sample("two axes", inputs, {}, constant_inputs=(1, 2, 3, 4))


def _split(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("two parts", (_floats(rng, 4, 12), _ints(8, 4)), {"axis": 1}, outputs=2, constant_inputs=(1,))


def _softmax(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("last axis", (_floats(rng, 2, 3, 9) * 4,), {"axis": -1})


def _where(rng: np.random.Generator) -> Iterator[Sample]:
    inputs = (rng.random((4, 6)) < 0.5, _floats(rng, 2, 4, 6), np.asarray(np.float32(-1e30)))
    yield Sample("mask", inputs, {})


def _expand(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("heads", (_floats(rng, 3, 1, 4), _ints(2, 3, 5, 4)), {}, constant_inputs=(1,))


def _cast(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("int64 to float32", (rng.integers(0, 9000, (1, 7)),), {"to": 1})
    yield Sample("float32 to int64", (rng.integers(-9, 9, (3, 4)).astype(np.float32),), {"to": 7})


def _shape(rng: np.random.Generator) -> Iterator[Sample]:
    yield Sample("rank 3", (_floats(rng, 2, 5, 3),), {})


def _attention(rng: np.random.Generator) -> Iterator[Sample]:
    q, k, v = _floats(rng, 1, 6, 5, 16), _floats(rng, 1, 2, 5, 16), _floats(rng, 1, 2, 5, 16)
    yield Sample("causal, grouped", (q, k, v), {"is_causal": 1})
    yield Sample("scaled", (q, k, v), {"scale": 0.2})


_SAMPLES: Mapping[str, Samples] = {
    "Add": _binary,
    "And": _logical,
    "Attention": _attention,
    "Cast": _cast,
    "Concat": _concat,
    "Cos": _unary(-9, 9),
    "DequantizeLinear": dequantize_linear.samples,
    "Div": _binary,
    "Equal": _compare,
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _unary(approximate="tanh"),
    "GreaterOrEqual": _compare,
    "Less": _compare,
    "LessOrEqual": _compare,
    "MatMul": _matmul,
    "Mul": _binary,
    "Neg": _unary(),
    "QuantizeLinear": quantize_linear.samples,
    "RMSNormalization": rms_normalization.samples,
    "Reciprocal": _unary(0.2, 3),
    "Reshape": _reshape,
    "RotaryEmbedding": rotary_embedding.samples,
    "Shape": _shape,
    "Sigmoid": _unary(),
    "Sin": _unary(-9, 9),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _unary(0, 9),
    "Squeeze": _squeeze,
    "Sub": _binary,
    "Swish": _unary(),
    "Tanh": _unary(),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}


@functools.cache
def schema_of(domain: str, name: str) -> OpSchema | None:
    """The operator of ONNX with this name at opset 24, or None."""
    import onnx

    try:
        found = onnx.defs.get_schema(name, OPSET if domain == "" else 5, domain)
    except onnx.defs.SchemaError:
        return None

    def params(formal: Sequence[Any]) -> tuple[Param, ...]:
        option = onnx.defs.OpSchema.FormalParameterOption
        return tuple(
            Param(
                p.name,
                p.description.strip(),
                tuple(sorted(t.removeprefix("tensor(").removesuffix(")") for t in p.types)),
                optional=p.option == option.Optional,
                variadic=p.option == option.Variadic,
            )
            for p in formal
        )

    return OpSchema(
        domain,
        name,
        found.since_version,
        (found.doc or "").strip(),
        params(found.inputs),
        params(found.outputs),
        (),
        _REFERENCES.get(name) or _onnx_reference(domain, name),
        samples=_SAMPLES.get(name),
    )


def schemas() -> Iterator[OpSchema]:
    """The operators that occur in graphs built by Transom."""
    for name in _SAMPLES:
        schema = schema_of("", name)
        if schema is None:
            raise LookupError(f"the installed onnx package does not know {name} at opset {OPSET}")
        yield schema
