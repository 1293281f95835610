"""Programs made by hand, of a few operators each, so that every operator of the native library can be tested alone.

`Draft` gathers buffers, operators and weights, `Draft.program` is what lowering would have written. The tests' inputs
come through the embedding: row `i` of a table of float32 is what token `i` brings along. `Machine` runs it.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass, field, replace
from math import erf
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from transom.graph.weights import DENSE_DTYPES, Blocked, BlockedArrays, ScaleLevels, Weight, dense, dequantize
from transom.programs.buffers import Buffer
from transom.programs.written import NOWHERE, AttentionLayer, RopeTable, View
from transom.sparsity import DENSE
from transom_openvino_cpu.native import packing
from transom_openvino_cpu.native.engine import NativeEngine
from transom_openvino_cpu.native.layout import NativeMatrix
from transom_openvino_cpu.native.program import NativeOp, NativeProgram

Array = np.ndarray[Any, np.dtype[Any]]

FORMS: dict[str, dict[str, Any]] = {
    "float32": {}, "float16": {}, "bfloat16": {},
    "int4": {}, "uint4": {}, "int8": {}, "uint8": {},
    "int4, wide scales": {"wide": True},
    "uint4, minimums": {"minimums": True},
    "uint4, wide minimums": {"minimums": True, "wide": True},
    "uint4, one zero point": {"zeros": "one"},
    "uint4, zero points": {"zeros": "many"},
    "uint4, minimums and zero points": {"minimums": True, "zeros": "many"},
    "int8, of 4 bits": {"bits": 4},
    "int8, of 5 bits": {"bits": 5},
    "int8, of 6 bits": {"bits": 6},
    "int8, of 6 bits, wide scales": {"bits": 6, "wide": True},
    "uint8, of 5 bits, wide minimums": {"bits": 5, "minimums": True, "wide": True},
    "uint8, of 6 bits": {"bits": 6},
    "uint8, of 6 bits, minimums": {"bits": 6, "minimums": True},
    "int8, of 5 bits, zero points": {"bits": 5, "zeros": "many"},
    "int8, zero points": {"zeros": "many"},
    "uint8, minimums": {"minimums": True},
    "uint8, one zero point": {"zeros": "one"},
    "uint8, wide scales, zero points": {"zeros": "many", "wide": True},
    "uint4, two levels": {"levels": True},
    "uint4, two levels, minimums": {"levels": True, "minimums": True},
    "int8, of 6 bits, two levels": {"bits": 6, "levels": True},
    "uint8, of 5 bits, two levels, minimums": {"bits": 5, "levels": True, "minimums": True},
    "int8, two levels": {"levels": True},
}  # fmt: skip
"""Every way in which a matrix is kept, by name: a type, then what `matrix` takes."""


def matrix(
    rng: np.random.Generator, form: str, rows: int, columns: int, block: int = 32, *, extreme: bool = False
) -> Weight:
    """A random matrix [rows, columns] in one of `FORMS`, with entries of about the same size in all of them.

    Args:
        extreme: quants are the lowest and the highest ones only.
    """
    options, dtype = FORMS[form], form.split(",")[0]
    spread = columns**-0.5
    if dtype in ("float32", "float16", "bfloat16"):
        return dense((rng.standard_normal((rows, columns)) * spread).astype(DENSE_DTYPES[dtype]))
    bits, signed = options.get("bits") or int(dtype.lstrip("uint")), not dtype.startswith("u")
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    kept = np.int8 if signed else np.uint8
    quants = rng.integers(low, high, (rows, columns))
    if extreme:
        quants = np.where(quants < (low + high) / 2, low, high - 1)
    shape = (rows, columns // block)
    scale = np.float32 if options.get("wide") or options.get("levels") else np.float16
    step = spread * 3.5 / (high - low) * rng.uniform(0.5, 1.5, shape)
    minimums = zeros = None
    if options.get("minimums"):
        minimums = (-step * (low + high) / 2 * rng.uniform(0.8, 1.2, shape)).astype(scale)
    if options.get("zeros"):
        middle, width = (low + high) // 2, (high - low) // 8
        zeros = rng.integers(middle - width, middle + width + 1, shape if options["zeros"] == "many" else (1, 1))
        zeros = np.broadcast_to(zeros, shape).astype(kept)
    parts, outer = BlockedArrays(quants.astype(kept), step.astype(scale), minimums, zeros), 0
    if options.get("levels"):  # without a superblock that fits, one level
        outer = next((n * block for n in (16, 12, 8, 4) if columns % (n * block) == 0), 0)
        parts = in_two_levels(parts, outer, block) if outer else parts
    name: Any = dtype
    wide: Any = np.dtype(scale).name
    return Blocked((rows, columns), block, name, wide, lambda: parts, minimums is not None, zeros is not None, outer)


def in_two_levels(parts: BlockedArrays, outer: int, block: int) -> BlockedArrays:
    """Nearly the same scales and minimums, as products of a float16 for `outer` columns and an int8 for each block."""

    def split(part: Array) -> tuple[Array, Array, Array]:
        grouped = part.reshape(len(part), -1, outer // block)
        halves = (np.abs(grouped).max(-1) / 127).astype(np.float16)
        codes = np.rint(grouped / halves[..., None].astype(np.float32)).clip(-128, 127).astype(np.int8)
        folded = (halves[..., None].astype(np.float32) * codes.astype(np.float32)).reshape(part.shape)
        return folded, halves, codes.reshape(part.shape)

    scales, halves, codes = split(parts.scales)
    if parts.minimums is None:
        return BlockedArrays(parts.quants, scales, levels=ScaleLevels(halves, codes))
    minimums, least, least_codes = split(parts.minimums)
    return BlockedArrays(parts.quants, scales, minimums, levels=ScaleLevels(halves, codes, least, least_codes))


def blocks_for(columns: int) -> list[int]:
    """The blocks that a matrix of so many columns may have."""
    return [block for block in (8, 16, 24, 32, 40, 64, 96, 128, 256) if columns % block == 0]


@dataclass
class Draft:
    """A program in the making."""

    weights: io.BytesIO = field(default_factory=io.BytesIO)
    ops: list[NativeOp] = field(default_factory=list)
    matrices: list[NativeMatrix] = field(default_factory=list)
    ropes: list[RopeTable] = field(default_factory=list)
    layers: list[AttentionLayer] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)

    def buffer(self, width: int, *, local: bool = False) -> View:
        self.buffers.append(Buffer(width, local))
        return View(len(self.buffers) - 1)

    def vector(self, values: Array | None) -> int:
        return -1 if values is None else packing.write_vector(self.weights, values)

    def matrix(self, weight: Weight, **options: bool) -> int:
        self.matrices.append(packing.write_matrix(self.weights, weight, **options))
        return len(self.matrices) - 1

    def add(self, kind: str, dst: View, width: int, vector: Array | None = None, **fields: Any) -> View:
        self.ops.append(NativeOp(kind, width, dst, vector=self.vector(vector), **fields))
        return dst

    def rows(self, table: Array, *, scale: float = 1.0) -> View:
        """The rows of the table that the tokens name, in a buffer of their own."""
        place, index = self.buffer(table.shape[1]), self.matrix(dense(np.ascontiguousarray(table, np.float32)))
        return self.add("embed", place, table.shape[1], matrix=index, scale=scale)

    def rope(self, frequencies: Array, factor: float) -> int:
        self.ropes.append(RopeTable(self.vector(frequencies), len(frequencies), factor))
        return len(self.ropes) - 1

    def layer(self, layer: AttentionLayer, sinks: Array | None = None) -> int:
        self.layers.append(replace(layer, sinks=self.vector(sinks)))
        return len(self.layers) - 1

    def program(self, output: View, *, cache: str = "f32") -> tuple[NativeProgram, bytes]:
        """The program and its weights; `output` is a whole buffer, of which the rows are taken that are asked for."""
        width = self.buffers[output.buffer].width
        output = self.add("rows", self.buffer(width), width, a=output)
        size = packing.align(self.weights)
        made = NativeProgram(
            tuple(self.ops), tuple(self.matrices), tuple(self.ropes), tuple(self.layers), tuple(self.buffers),
            cache, output.buffer, size, DENSE,
        )  # fmt: skip
        return NativeProgram.from_json(made.to_json()), self.weights.getvalue()


def linear(
    weight: Weight,
    table: Array,
    *,
    by: str = "f32",
    act: str = "",
    bias: Array | None = None,
    residual: Array | None = None,
    local: bool = False,
    **packed: bool,
) -> tuple[NativeProgram, bytes]:
    """One product of the rows of a table with a matrix."""
    draft = Draft()
    x = draft.rows(table)
    extra = NOWHERE if residual is None else draft.rows(residual)
    width = weight.shape[0] // (2 if act else 1)
    # The product goes through a buffer of its own, so that a local one is tried, too.
    made = draft.buffer(width, local=local)
    draft.add("linear", made, width, bias, a=x, b=extra, matrix=draft.matrix(weight, **packed), by=by, act=act)
    out = draft.buffer(width)
    draft.add("scale", out, width, a=made, scale=1.0)
    return draft.program(out)


def exact(weight: Weight) -> Array:
    """The matrix as float64."""
    return dequantize(weight).astype(np.float64)


def narrowed(array: Array) -> Array:
    """Rounded to bfloat16, as float64."""
    return np.asarray(array, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def together(dim: int) -> int:
    """The size of the Hadamard matrices that keys and queries of an int8 cache are multiplied by."""
    return dim & -dim


def turned(array: Array) -> Array:
    """Times Hadamard matrices that are not scaled, in the array's own numbers."""
    y = array.copy()
    step = 1
    while step < together(array.shape[-1]):
        pairs = y.reshape(*y.shape[:-1], -1, 2, step)
        low, high = pairs[..., 0, :].copy(), pairs[..., 1, :].copy()
        pairs[..., 0, :], pairs[..., 1, :] = low + high, low - high
        step *= 2
    return y


def in_bytes(array: Array) -> Array:
    """Rounded to int8 with a scale for each row, as float64."""
    most = np.abs(array).max(-1, keepdims=True).astype(np.float32)
    inverse = np.where(most > 1e-30, np.float32(127) / np.maximum(most, np.float32(1e-30)), np.float32(0))
    return np.rint(array.astype(np.float32) * inverse).astype(np.float64) * (most.astype(np.float64) / 127)


def gated(act: str, gate: Array, up: Array) -> Array:
    """act(gate) * up in float64."""
    if act == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if act == "gelu":
        return gate / 2 * (1 + np.vectorize(erf)(gate / np.sqrt(2))) * up
    return gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


class Machine:
    """An engine over a program and its weights, on one instruction set. Use it in a `with`. Without `pages` a session
    binds its own."""

    def __init__(
        self, made: tuple[NativeProgram, bytes], level: str, *, threads: int = 2, pages: int | None = 0
    ) -> None:
        program, weights = made
        with tempfile.NamedTemporaryFile(suffix=".weights") as file:
            file.write(weights)
            file.flush()
            self.engine = NativeEngine(program, Path(file.name), level, threads)
        if pages is not None:
            self.engine.bind_pages(pages)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.engine.close()

    def rows(self, count: int) -> Array:
        """What the program gives for tokens 0 ... count - 1, as float64."""
        tokens = np.arange(count, dtype=np.int64)
        pages = [list(range(-(-count // self.engine.page_tokens)))]
        return self.engine.step([tokens], [0], pages, list(range(count))).astype(np.float64)


def error(got: Array, wanted: Array) -> float:
    """The largest over the rows: norm of the difference over norm of what is wanted."""
    norms = np.linalg.norm(wanted, axis=-1)
    return float((np.linalg.norm(got - wanted, axis=-1) / np.where(norms > 0, norms, 1)).max())
