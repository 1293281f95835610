"""GPTQ, AWQ and compressed-tensors checkpoints: packed integers unpacked into `Blocked`, number for number.

In all three, w[n, k] = scale[n, g] * (q[n, k] - zero[n, g]), where g is the group of column k. They differ in what is
packed along which axis and in which order:

- GPTQ packs qweight [K / 8, N] along K and qzeros [K / g, N / 8] along N. Format "gptq" stores each zero point minus
  one ("gptq_v2" does not); a stored 15 means 0, because the packer lets it wrap around. With activation order, `g_idx`
  scatters the groups over the columns, which blocks cannot represent: such matrices are dequantized, with a note.
- AWQ ("gemm") packs qweight [K, N / 8] and qzeros along N, in the order 0 2 4 6 1 3 5 7.
- compressed-tensors ("pack-quantized") packs weight_packed [N, K / 8] along K with half of the range added, and zero
  points in the same way along N; "int-quantized" stores plain int8 [N, K].

Sources: Frantar et al. 2022 (arXiv:2210.17323) and AutoGPTQ's `QuantLinear`; Lin et al. 2023 (arXiv:2306.00978) and
AutoAWQ's `WQLinear_GEMM`; the compressed-tensors package's `pack_quantized`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from transom.errors import SourceError
from transom.graph.weights import Array, Blocked, BlockedArrays, Dense, Weight
from transom.models.values import Values
from transom.sources.finite import require_finite
from transom.sources.safetensors_file import StoredTensor

Stored = Mapping[str, StoredTensor]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_DAMAGED = "The checkpoint is damaged or incomplete: download it again"


class Packing(Protocol):
    """How a checkpoint stores its quantized modules."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the report about the whole checkpoint."""

    def is_part(self, name: str) -> bool:
        """Whether a tensor belongs to a quantized module."""

    def find(self, name: str) -> tuple[Weight, str] | None:
        """The weight `<module>.weight` and a note, or None if the module is not quantized."""


def group_size(values: Values, columns: int, size: int, name: str) -> int:
    """The block size for a group size; -1 is a whole row.

    Raises:
        SourceError: the block size does not divide the row.
    """
    block = columns if size == -1 else size
    if block < 1 or columns % block:
        raise SourceError(
            f"The matrix {name} has rows of {columns}, which groups of {block} (group_size of {values.where}) do not "
            "fill",
            _DAMAGED,
        )
    return block


def unpack(words: Array, bits: int) -> Array:
    """int32 [rows, n] -> uint8 [rows, n * 32 / bits], lowest bits first."""
    rows = words.shape[0]
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    count = 8 // bits
    out = np.empty((rows, raw.shape[1], count), np.uint8)
    for i in range(count):
        np.right_shift(raw, np.uint8(i * bits), out=out[:, :, i])
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(rows, -1)


def scales_of(stored: StoredTensor, array: Array) -> Array:
    """Scales in the types of `Blocked`: float16 stays, bfloat16 becomes float32. Checked for NaN and infinity."""
    require_finite(array, stored.name, stored.path)
    return np.ascontiguousarray(array if array.dtype == np.float16 else array.astype(np.float32))


def scale_dtype(stored: StoredTensor) -> Literal["float16", "float32"]:
    if stored.dtype not in ("F16", "BF16", "F32"):
        raise SourceError(f"The scales {stored.name} in {stored.path} are of the type {stored.dtype}", _DAMAGED)
    return "float16" if stored.dtype == "F16" else "float32"


def require_shape(stored: StoredTensor, dtype: str, *shape: int) -> StoredTensor:
    """Return the tensor.

    Raises:
        SourceError: the tensor has another type or shape.
    """
    if stored.dtype != dtype or stored.shape != shape:
        raise SourceError(
            f"The tensor {stored.name} in {stored.path} is {stored.dtype} {list(stored.shape)}, not {dtype} "
            f"{list(shape)}",
            _DAMAGED,
        )
    return stored


def scattered(weight: Blocked, g_idx: StoredTensor) -> Dense:
    """The dequantized form of a matrix with scattered groups: column k belongs to group g_idx[k]."""
    groups = weight.shape[1] // weight.block

    def dense() -> Array:
        quants, scales, _, zeros, _ = weight.load()
        group = g_idx.array().astype(np.int64)
        if np.min(group) < 0 or np.max(group) >= groups:
            raise SourceError(f"The tensor {g_idx.name} in {g_idx.path} names groups that do not exist", _DAMAGED)
        centerd = quants.astype(np.float32)
        if zeros is not None:
            centerd -= zeros[:, group].astype(np.float32)
        return np.asarray(centerd * scales[:, group].astype(np.float32), np.float32)

    return Dense(weight.shape, "float32", dense)


@dataclass(frozen=True)
class Module:
    """The tensors of one quantized module."""

    name: str
    stored: Stored
    where: str

    def part(self, suffix: str) -> StoredTensor:
        found = self.stored.get(f"{self.name}.{suffix}")
        if found is None:
            raise SourceError(f"The tensor {self.name}.{suffix} is missing from {self.where}", _DAMAGED)
        return found


@dataclass(frozen=True)
class _Grouped:
    """A packing whose modules are recognized by one of their tensors."""

    stored: Stored
    where: str
    telltale: str
    parts: tuple[str, ...]
    read: Callable[[Module], tuple[Weight, str]]
    notes: tuple[str, ...] = ()

    def is_part(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf in self.parts and f"{module}.{self.telltale}" in self.stored

    def find(self, name: str) -> tuple[Weight, str] | None:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or f"{module}.{self.telltale}" not in self.stored:
            return None
        return self.read(Module(module, self.stored, self.where))


def gptq(values: Values, stored: Stored, where: str) -> Packing:
    bits = values.one_of("bits", (2, 4, 8))
    size = values.whole("group_size", low=-1)
    symmetric = values.flag("sym", True)
    reordered = values.flag("desc_act", False)
    form = values.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    one = np.uint8(1 if form == "gptq" else 0)
    top = np.uint8((1 << bits) - 1)
    middle = 1 << (bits - 1)

    def read(module: Module) -> tuple[Weight, str]:
        packed, scales = module.part("qweight"), module.part("scales")
        if packed.dtype != "I32" or len(packed.shape) != 2:
            raise SourceError(f"The tensor {packed.name} in {where} is not a matrix of packed integers", _DAMAGED)
        columns, rows = packed.shape[0] * 32 // bits, packed.shape[1]
        block = group_size(values, columns, size, module.name)
        groups = columns // block
        zeros = require_shape(module.part("qzeros"), "I32", groups, rows * bits // 32)
        require_shape(scales, scales.dtype, groups, rows)
        g_idx = stored.get(f"{module.name}.g_idx")

        def load() -> BlockedArrays:
            quants = unpack(packed.array().T, bits)
            found = scales_of(scales, scales.array().T)
            zero_points = np.ascontiguousarray(((unpack(zeros.array(), bits) + one) & top).T)
            if not symmetric:
                return BlockedArrays(quants, found, None, zero_points)
            if (zero_points != middle).any():
                raise SourceError(
                    f"{where} is marked as symmetric (sym), but {zeros.name} has zero points other than {middle}",
                    'Set "sym" to false in quantization_config of config.json',
                )
            return BlockedArrays((quants - np.uint8(middle)).view(np.int8), found)

        signed: Literal["int4", "int8"] = "int8" if bits == 8 else "int4"
        unsigned: Literal["uint4", "uint8"] = "uint8" if bits == 8 else "uint4"
        weight = Blocked(
            (rows, columns),
            block,
            signed if symmetric else unsigned,
            scale_dtype(scales),
            load,
            has_zero_points=not symmetric,
        )
        if g_idx is None:
            return weight, ""
        require_shape(g_idx, "I32", columns)
        in_order = np.arange(columns, dtype=np.int64) // block
        if reordered and not np.array_equal(g_idx.array(), in_order):
            return scattered(weight, g_idx), (
                "GPTQ with activation order (desc_act): dequantized to float32, because its groups are not blocks"
            )

        def load_in_order() -> BlockedArrays:
            if not np.array_equal(g_idx.array(), in_order):
                raise SourceError(
                    f"{g_idx.name} in {where} scatters its groups, but desc_act in config.json is false",
                    'Set "desc_act" to true in quantization_config of config.json',
                )
            return load()

        return replace(weight, load=load_in_order), ""

    parts = ("qweight", "qzeros", "scales", "g_idx")
    return _Grouped(stored, where, "qweight", parts, read)


def awq(values: Values, stored: Stored, where: str) -> Packing:
    values.one_of("bits", (4,))
    values.one_of("version", ("gemm", "GEMM"), "gemm")
    size = values.whole("group_size", low=-1)
    values.one_of("zero_point", (True,), True)
    order = np.argsort(_AWQ_ORDER)

    def columns_of(words: Array) -> Array:
        """int32 [r, n] -> uint8 [r, 8n] with the columns in order."""
        return unpack(words, 4).reshape(words.shape[0], -1, 8)[:, :, order].reshape(words.shape[0], -1)

    def read(module: Module) -> tuple[Weight, str]:
        packed, scales = module.part("qweight"), module.part("scales")
        if packed.dtype != "I32" or len(packed.shape) != 2:
            raise SourceError(f"The tensor {packed.name} in {where} is not a matrix of packed integers", _DAMAGED)
        columns, rows = packed.shape[0], packed.shape[1] * 8
        block = group_size(values, columns, size, module.name)
        groups = columns // block
        zeros = require_shape(module.part("qzeros"), "I32", groups, rows // 8)
        require_shape(scales, scales.dtype, groups, rows)

        def load() -> BlockedArrays:
            return BlockedArrays(
                np.ascontiguousarray(columns_of(packed.array()).T),
                scales_of(scales, scales.array().T),
                None,
                np.ascontiguousarray(columns_of(zeros.array()).T),
            )

        return Blocked((rows, columns), block, "uint4", scale_dtype(scales), load, has_zero_points=True), ""

    return _Grouped(stored, where, "qweight", ("qweight", "qzeros", "scales"), read)
