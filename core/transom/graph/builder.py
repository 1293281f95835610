"""Builds a neutral graph: a thin layer over `onnx_ir` that names every node and keeps weights lazy.

A decoder's activations are [tokens, features]: the tokens of all sequences of a step, packed without padding.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from transom.graph.graph import PRODUCER, Graph
from transom.graph.weights import Array, Blocked, BlockedArrays, Dense, Weight
from transom.ops import TensorSpec, find
from transom.ops.functions import OPSET, overload
from transom.signature import METADATA_KEY, Decoder, LayerCache, cache_input_names, cache_output_names

IR_VERSION = 12
WEIGHT_META = "transom.weight"
"""Key in an initializer's `meta` under which the original `Weight` is kept."""

Dim = int | str


class _LastLoaded:
    """Keeps the arrays of the most recently read `Blocked` weight: each of its parts is a separate initializer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weight: Blocked | None = None
        self._arrays: BlockedArrays | None = None

    def part(self, weight: Blocked, index: Literal[0, 1, 2, 3]) -> Array:
        with self._lock:
            if self._weight is not weight or self._arrays is None:
                self._weight, self._arrays = weight, weight.load()
            part = self._arrays[index]
        assert part is not None
        return part


_last_loaded = _LastLoaded()


def _lazy(name: str, dtype: ir.DataType, shape: Sequence[int], load: Callable[[], Array]) -> ir.LazyTensor:
    def tensor() -> ir.TensorProtocol:
        array = load()
        if dtype in (ir.DataType.INT4, ir.DataType.UINT4):
            return ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
        return ir.Tensor(np.ascontiguousarray(array), dtype=dtype, name=name)

    return ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=name)


class DecoderInputs(NamedTuple):
    """The inputs of a decoder graph besides its cache. int64 vectors: [tokens], [past] or [rows]."""

    input_ids: ir.Value
    positions: ir.Value
    sequences: ir.Value
    past_positions: ir.Value
    past_sequences: ir.Value
    logit_rows: ir.Value
    """Indices of the new tokens that need logits."""


class GraphBuilder:
    """Writes one graph. Values are `onnx_ir.Value`; node names are unique and begin with the node's scope."""

    def __init__(self, name: str) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
        self.functions: dict[ir.OperatorIdentifier, ir.Function] = {}
        self._scope: list[str] = []
        self._names: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._weights: dict[int, tuple[Weight, ir.Value]] = {}
        self._shared: dict[str, tuple[ir.Value, ...]] = {}
        self.weight_bytes = 0
        self.parameters = 0

    # names -----------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of all nodes written inside: `with b.scope("layers.0")`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def _name(self, base: str) -> str:
        full = ".".join([*self._scope, base])
        count = self._names.get(full, 0)
        self._names[full] = count + 1
        return full if count == 0 else f"{full}_{count}"

    # inputs, outputs, constants --------------------------------------------------------------------------------------
    def input(self, name: str, dtype: str, shape: Sequence[Dim]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType[_ONNX_NAME[dtype]]), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[Dim] | None = None) -> None:
        value.name = name
        if shape is not None:
            value.shape = ir.Shape(shape)
        self.graph.outputs.append(value)

    def constant(self, array: Array | Sequence[int] | int | float, name: str = "constant") -> ir.Value:
        """A small constant; equal ones are shared. Python ints are int64, floats float32."""
        if not isinstance(array, np.ndarray):
            array = np.asarray(array, np.float32 if isinstance(array, float) else np.int64)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            saved, self._scope = self._scope, []
            tensor = ir.tensor(array, name=self._name(name))
            self._scope = saved
            self._constants[key] = self._initializer(tensor)
        return self._constants[key]

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    # nodes -----------------------------------------------------------------------------------------------------------
    def nodes(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int = 1,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Append one node and return all its outputs. An operator outside ONNX gets its function body attached.

        Raises:
            ValueError: the operator is not registered, or its shape rule rejects the inputs.
        """
        schema = find(domain, op_type)
        if schema is None:
            raise ValueError(f"the operator {domain or 'ai.onnx'}::{op_type} is not registered")
        version = ""
        if domain:
            attributes = schema.attributes_with_defaults(attributes)
            present = tuple(v is not None for v in inputs)
            version = overload(attributes, present)
            key = (domain, op_type, version)
            if key not in self.functions:
                assert schema.body is not None
                self.functions[key] = schema.body(attributes, present)
                self.graph.opset_imports.setdefault(domain, 1)
        node = ir.Node(
            domain,
            op_type,
            inputs,
            [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()],
            overload=version,
            num_outputs=outputs,
            name=self._name(name or op_type),
        )
        for i, value in enumerate(node.outputs):
            value.name = node.name if i == 0 else f"{node.name}.{i}"
        self.graph.append(node)
        if schema.infer is not None:
            specs = schema.infer([None if v is None else spec_of(v) for v in inputs], attributes)
            for value, spec in zip(node.outputs, specs, strict=False):
                value.type = ir.TensorType(ir.DataType[_ONNX_NAME[spec.dtype]])
                value.shape = None if spec.shape is None else ir.Shape(spec.shape)
        return tuple(node.outputs)

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", name: str | None = None, **attributes: Any
    ) -> ir.Value:
        """Append one node that has one output."""
        return self.nodes(op_type, *inputs, domain=domain, name=name, **attributes)[0]

    # weights ---------------------------------------------------------------------------------------------------------
    def weight(self, weight: Weight, name: str) -> ir.Value:
        """The weight as a float32 value: an initializer, cast or block-dequantized if it is stored in another form."""
        if id(weight) in self._weights:
            return self._weights[id(weight)][1]
        self.parameters += int(np.prod(weight.shape, dtype=np.int64))
        self.weight_bytes += weight.nbytes
        if isinstance(weight, Dense):
            stored = self._lazy(name, weight.dtype, weight.shape, weight.load, weight)
            value = stored if weight.dtype == "float32" else self.op("Cast", stored, to=1, name=f"{name}.float32")
        else:
            value = self._blocked(weight, name)
        self._weights[id(weight)] = (weight, value)
        return value

    def _lazy(self, name: str, dtype: str, shape: Sequence[int], load: Callable[[], Array], weight: Weight) -> ir.Value:
        value = self._initializer(_lazy(self._name(name), ir.DataType[_ONNX_NAME[dtype]], shape, load))
        value.meta[WEIGHT_META] = weight
        return value

    def _blocked(self, weight: Blocked, name: str) -> ir.Value:
        (rows, columns), block = weight.shape, weight.block
        blocks = (rows, columns // block)

        def part(index: Literal[0, 1, 2, 3]) -> Callable[[], Array]:
            return lambda: _last_loaded.part(weight, index)

        quants = self._lazy(f"{name}.quants", weight.dtype, weight.shape, part(0), weight)
        scales = self._lazy(f"{name}.scales", weight.scale_dtype, blocks, part(1), weight)
        zeros = None
        if weight.has_zero_points:
            zeros = self._lazy(f"{name}.zero_points", weight.dtype, blocks, part(3), weight)
        attributes: dict[str, Any] = {"axis": 1, "block_size": block}
        if weight.scale_dtype != "float32":
            attributes["output_dtype"] = int(ir.DataType.FLOAT)
        inputs = (quants, scales) if zeros is None else (quants, scales, zeros)
        value = self.op("DequantizeLinear", *inputs, name=f"{name}.dequantized", **attributes)
        if weight.has_minimums:
            shape = (*blocks, 1)
            minimums = self._lazy(
                f"{name}.minimums", weight.scale_dtype, shape, lambda: part(2)().reshape(shape), weight
            )
            if weight.scale_dtype != "float32":
                minimums = self.op("Cast", minimums, to=int(ir.DataType.FLOAT), name=f"{name}.minimums.float32")
            value = self.op("Reshape", value, self.constant([*blocks, block]), name=f"{name}.blocks")
            value = self.op("Add", value, minimums, name=f"{name}.shifted")
            value = self.op("Reshape", value, self.constant([rows, columns]), name=f"{name}.matrix")
        return value

    # what decoders are made of ---------------------------------------------------------------------------------------
    def linear(self, x: ir.Value, weight: Weight, name: str, bias: Weight | None = None) -> ir.Value:
        """`x @ weightᵀ + bias`; weight [out, in]."""
        matrix = self.weight(weight, f"{name}.weight")
        key = f"transposed {id(weight)}"
        if key not in self._shared:
            self._shared[key] = (self.op("Transpose", matrix, perm=[1, 0], name=f"{name}.weight.transposed"),)
        y = self.op("MatMul", x, self._shared[key][0], name=name)
        return y if bias is None else self.op("Add", y, self.weight(bias, f"{name}.bias"), name=f"{name}.biased")

    def rms_norm(self, x: ir.Value, scale: Weight, epsilon: float, name: str, *, offset: float = 0.0) -> ir.Value:
        """RMS normalization over the last axis; `offset` is added to the scale (1 for Gemma checkpoints)."""
        value = self.weight(scale, f"{name}.weight")
        if offset:
            value = self.op("Add", value, self.constant(float(offset)), name=f"{name}.scale")
        return self.op("RMSNormalization", x, value, axis=-1, epsilon=float(epsilon), name=name)

    def rotary_tables(
        self, positions: ir.Value, inverse_frequencies: Array, *, factor: float = 1.0, name: str = "rotary"
    ) -> tuple[ir.Value, ir.Value]:
        """cos and sin of position × frequency, [1, tokens, dim / 2] float32; computed once per set of frequencies.

        `factor` multiplies both (attention factor of YaRN and LongRoPE).
        """
        frequencies = np.asarray(inverse_frequencies, np.float32)
        key = f"rotary {factor} {frequencies.tobytes().hex()}"
        if key not in self._shared:
            saved, self._scope = self._scope, []
            wide = self.op("Cast", positions, to=int(ir.DataType.FLOAT), name=f"{name}.positions")
            column = self.op("Unsqueeze", wide, self.constant([0, 2]), name=f"{name}.column")
            angles = self.op("Mul", column, self.constant(frequencies.reshape(1, 1, -1)), name=f"{name}.angles")
            tables = [self.op("Cos", angles, name=f"{name}.cos"), self.op("Sin", angles, name=f"{name}.sin")]
            if factor != 1.0:
                tables = [self.op("Mul", t, self.constant(float(factor)), name=f"{name}.scaled") for t in tables]
            self._scope = saved
            self._shared[key] = (tables[0], tables[1])
        cos, sin = self._shared[key]
        return cos, sin

    def rotate(
        self, x: ir.Value, tables: tuple[ir.Value, ir.Value], heads: int, name: str, *, rotated: int = 0
    ) -> ir.Value:
        """Rotary embedding of [tokens, heads * dim]; `rotated`: columns of each head to rotate (0: all)."""
        batch = self.op("Unsqueeze", x, self.constant([0]), name=f"{name}.batch")
        attributes: dict[str, Any] = {"num_heads": heads} | ({"rotary_embedding_dim": rotated} if rotated else {})
        result = self.op("RotaryEmbedding", batch, *tables, name=name, **attributes)
        return self.op("Squeeze", result, self.constant([0]), name=f"{name}.flat")

    def decoder_inputs(self) -> DecoderInputs:
        """Add the inputs of a decoder graph besides its cache."""
        dims = ("tokens", "tokens", "tokens", "past", "past", "rows")
        inputs = zip(DecoderInputs._fields, dims, strict=True)
        return DecoderInputs(*(self.input(name, "int64", [dim]) for name, dim in inputs))

    def cache_inputs(self, layer: int, cache: LayerCache) -> tuple[ir.Value, ir.Value]:
        """Add the inputs for a layer's cached keys and values, [past, kv_heads * dim]."""
        key, value = cache_input_names(layer)
        return (
            self.input(key, "float32", ["past", cache.kv_heads * cache.head_dim]),
            self.input(value, "float32", ["past", cache.kv_heads * cache.value_dim]),
        )

    def cache_outputs(self, layer: int, cache: LayerCache, present: tuple[ir.Value, ir.Value]) -> None:
        """Make a layer's cache, with the new tokens, outputs of the graph."""
        dims = (cache.head_dim, cache.value_dim)
        for value, name, dim in zip(present, cache_output_names(layer), dims, strict=True):
            self.output(value, name, ["present", cache.kv_heads * dim])

    def finish(self, *, weights_hash: str, decoder: Decoder | None = None, notes: Sequence[str] = ()) -> Graph:
        """The finished graph. `weights_hash` identifies the content of the weights (a hash of their file)."""
        metadata = {METADATA_KEY: decoder.to_json()} if decoder else {}
        model = ir.Model(
            self.graph,
            ir_version=IR_VERSION,
            producer_name=PRODUCER,
            functions=list(self.functions.values()),
            metadata_props=metadata,
        )
        return Graph(model, weights_hash=weights_hash, notes=notes)


class DecoderBuilder(GraphBuilder):
    """A `GraphBuilder` with the standard inputs and outputs of a decoder graph.

    Inputs: those of `DecoderInputs`; `past_key.i`, `past_value.i` float32 [past, heads * dim] per layer.
    Outputs: `logits` float32 [rows, vocabulary]; `present_key.i`, `present_value.i` [present, heads * dim].
    """

    def __init__(self, name: str, decoder: Decoder) -> None:
        super().__init__(name)
        self.decoder = decoder
        self.inputs = self.decoder_inputs()
        self._past = [self.cache_inputs(i, cache) for i, cache in enumerate(decoder.layers)]
        self._present: dict[int, tuple[ir.Value, ir.Value]] = {}

    def embedding(self, weight: Weight, name: str = "embedding") -> ir.Value:
        """Rows of the embedding table for `input_ids`: [tokens, hidden]."""
        return self.op("Gather", self.weight(weight, f"{name}.weight"), self.inputs.input_ids, axis=0, name=name)

    def attention(
        self,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        layer: int,
        *,
        scale: float = 0.0,
        softcap: float = 0.0,
        sinks: Weight | None = None,
        bias: ir.Value | None = None,
        name: str = "attention",
    ) -> ir.Value:
        """`transom::CachedAttention` over the layer's cache: [tokens, q_heads * value_dim]."""
        cache, step = self.decoder.layers[layer], self.inputs
        inputs: list[ir.Value | None] = [q, k, v, *self._past[layer], step.sequences, step.positions]
        inputs += [step.past_sequences, step.past_positions]
        if bias is not None or sinks is not None:
            inputs.append(bias)
        if sinks is not None:
            inputs.append(self.weight(sinks, f"{name}.sinks"))
        out, present_key, present_value = self.nodes(
            "CachedAttention",
            *inputs,
            domain="transom",
            outputs=3,
            name=name,
            q_num_heads=cache.q_heads,
            kv_num_heads=cache.kv_heads,
            scale=float(scale),
            softcap=float(softcap),
            sliding_window=cache.sliding_window,
            layer=layer,
        )
        self._present[layer] = (present_key, present_value)
        return out

    def rows_for_logits(self, hidden: ir.Value) -> ir.Value:
        """The rows of the hidden state whose logits are needed: only these are multiplied by the vocabulary matrix."""
        return self.op("Gather", hidden, self.inputs.logit_rows, axis=0, name="logit_rows.hidden")

    def finish_decoder(self, logits: ir.Value, *, weights_hash: str, notes: Sequence[str] = ()) -> Graph:
        """Set the outputs and finish. Raises ValueError when a layer has no attention."""
        if missing := set(range(len(self.decoder.layers))) - set(self._present):
            raise ValueError(f"layers {sorted(missing)} have a cache but no attention")
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        self.output(logits, "logits", ["rows", self.decoder.vocabulary])
        for i, cache in enumerate(self.decoder.layers):
            self.cache_outputs(i, cache, self._present[i])
        decoder = replace(self.decoder, parameters=self.parameters, weight_bytes=self.weight_bytes)
        return self.finish(weights_hash=weights_hash, decoder=decoder, notes=notes)


_ONNX_NAME: Mapping[str, str] = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "float64": "DOUBLE",
    "int64": "INT64",
    "int32": "INT32",
    "int16": "INT16",
    "uint64": "UINT64",
    "uint32": "UINT32",
    "uint16": "UINT16",
    "bool": "BOOL",
    "int4": "INT4",
    "uint4": "UINT4",
    "int8": "INT8",
    "uint8": "UINT8",
    "float8e4m3fn": "FLOAT8E4M3FN",
}
_NUMPY_NAME = {v: k for k, v in _ONNX_NAME.items()}


def spec_of(value: ir.Value) -> TensorSpec:
    """Type and shape of a value in the form that shape rules take; float32 of unknown shape if unset. A type without a
    NumPy name has its ONNX name in lower case."""
    dtype = "float32" if value.dtype is None else _NUMPY_NAME.get(value.dtype.name, value.dtype.name.lower())
    if value.shape is None:
        return TensorSpec(dtype, None)
    dims = [d if isinstance(d, int) else d.value for d in value.shape]
    return TensorSpec(dtype, tuple(dims))
