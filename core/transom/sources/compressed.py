"""compressed-tensors checkpoints (vLLM, llm-compressor): integer weights with scales for each group or row.

Layouts "pack-quantized" (4 or 8 bits in int32 words) and "int-quantized" (plain int8); see `transom.sources.packed`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from transom.errors import SourceError
from transom.graph.weights import Array, Blocked, BlockedArrays, Weight
from transom.models.values import Values
from transom.sources.packed import (
    Module,
    Packing,
    Stored,
    group_size,
    require_shape,
    scale_dtype,
    scales_of,
    scattered,
    unpack,
)
from transom.sources.safetensors_file import StoredTensor

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_DAMAGED = "The checkpoint is damaged or incomplete: download it again"


@dataclass(frozen=True)
class _Scheme:
    """How the modules of one group are quantized."""

    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    size: int
    """Columns in a group; -1: the whole row; 0: the whole matrix."""
    values: Values


def compressed_tensors(values: Values, stored: Stored, where: str) -> Packing:
    """The packing that a `quantization_config` of the method compressed-tensors describes.

    Raises:
        SourceError: an unknown format, number of bits, or strategy.
    """
    values.one_of("quantization_status", ("compressed", "frozen"), "compressed")
    notes = []
    if values.has("kv_cache_scheme"):
        notes.append("the checkpoint's quantization of the cache (kv_cache_scheme) is not used")
    groups = values.inner("config_groups")
    if groups is None or not groups.data:
        raise values.wrong("config_groups", "a table of groups")
    schemes = []
    for name in groups.data:
        group = groups.inner(name)
        assert group is not None
        if group.has("input_activations"):
            notes.append("activations stay in float32, though the checkpoint was made for quantized ones")
        form = group if group.has("format") else values
        form.one_of("format", ("pack-quantized", "int-quantized"), "pack-quantized")
        schemes.append(_scheme(group))
    ignored = values.get("ignore") or []
    if not isinstance(ignored, list):
        raise values.wrong("ignore", "a list of modules")
    return _Compressed(stored, where, tuple(schemes), tuple(dict.fromkeys(notes)))


def _scheme(group: Values) -> _Scheme:
    weights = group.inner("weights")
    if weights is None:
        raise group.wrong("weights", "a table of settings")
    weights.one_of("type", ("int",), "int")
    strategy = weights.one_of("strategy", ("group", "channel", "tensor"), "tensor")
    size = {"channel": -1, "tensor": 0}.get(strategy)
    targets = group.get("targets") or ["Linear"]
    return _Scheme(
        tuple(map(str, targets)) if isinstance(targets, list) else (),
        weights.one_of("num_bits", (4, 8)),
        weights.flag("symmetric", True),
        weights.whole("group_size") if size is None else size,
        weights,
    )


@dataclass(frozen=True)
class _Compressed:
    stored: Stored
    where: str
    schemes: tuple[_Scheme, ...]
    notes: tuple[str, ...]

    def is_part(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf in _PARTS and f"{module}.weight_scale" in self.stored

    def find(self, name: str) -> tuple[Weight, str] | None:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or f"{module}.weight_scale" not in self.stored:
            return None
        return self._read(Module(module, self.stored, self.where))

    def _scheme_of(self, module: str) -> _Scheme:
        for scheme in self.schemes:
            for target in scheme.targets:
                if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                    return scheme
        for scheme in self.schemes:
            if "Linear" in scheme.targets:
                return scheme
        if len(self.schemes) == 1:
            return self.schemes[0]
        raise SourceError(f"No group of config_groups in {self.where} matches the module {module}", _DAMAGED)

    def _read(self, module: Module) -> tuple[Weight, str]:
        scheme = self._scheme_of(module.name)
        bits, scales = scheme.bits, module.part("weight_scale")
        plain = self.stored.get(f"{module.name}.weight")
        packed = plain if plain is not None else module.part("weight_packed")
        rows, columns = self._shape(module, packed, plain is not None)
        block = columns if scheme.size == 0 else group_size(scheme.values, columns, scheme.size, module.name)
        groups = columns // block
        self._check(packed, scales, scheme, rows, columns, groups, plain is not None)
        zeros = None if scheme.symmetric else module.part("weight_zero_point")
        half = np.uint8(1 << (bits - 1))

        def spread(array: Array) -> Array:
            return np.ascontiguousarray(np.broadcast_to(array.reshape(-1, groups), (rows, groups)))

        def zero_points() -> Array | None:
            if zeros is None:
                return None
            if zeros.dtype == "I32" and bits < 32 and zeros.shape != (rows, groups):  # packed along the rows
                unpacked = unpack(np.ascontiguousarray(zeros.array().T), bits)[:, :rows].T
                return spread((unpacked - half).view(np.int8))
            return spread(zeros.array().astype(np.int8))

        def load() -> BlockedArrays:
            if plain is not None:
                quants = plain.array().view(np.int8)
            else:
                words = unpack(packed.array(), bits)[:, :columns]
                quants = (words - half).view(np.int8)
            return BlockedArrays(quants, spread(scales_of(scales, scales.array())), None, zero_points())

        dtype: Literal["int4", "int8"] = "int4" if bits == 4 else "int8"
        weight = Blocked((rows, columns), block, dtype, scale_dtype(scales), load, has_zero_points=zeros is not None)
        g_idx = self.stored.get(f"{module.name}.weight_g_idx")
        if g_idx is None or (g_idx.array() < 0).any():  # -1: written, but not used
            return weight, ""
        require_shape(g_idx, g_idx.dtype, columns)
        if np.array_equal(g_idx.array(), np.arange(columns) // block):
            return weight, ""
        return scattered(weight, g_idx), (
            "compressed-tensors with activation order: dequantized to float32, because its groups are not blocks"
        )

    def _shape(self, module: Module, packed: StoredTensor, plain: bool) -> tuple[int, int]:
        if plain:
            if packed.dtype != "I8" or len(packed.shape) != 2:
                raise SourceError(f"The tensor {packed.name} in {self.where} is not an int8 matrix", _DAMAGED)
            return packed.shape[0], packed.shape[1]
        # This tensor has two numbers, the matrix's size: it is metadata, so it is read here
        shape = require_shape(module.part("weight_shape"), module.part("weight_shape").dtype, 2).array()
        rows, columns = int(shape[0]), int(shape[1])
        return rows, columns

    def _check(
        self,
        packed: StoredTensor,
        scales: StoredTensor,
        scheme: _Scheme,
        rows: int,
        columns: int,
        groups: int,
        plain: bool,
    ) -> None:
        if not plain:
            require_shape(packed, "I32", rows, -(-columns * scheme.bits // 32))
        elif scheme.bits != 8:
            raise SourceError(f"{packed.name} in {self.where} is int8, but its scheme has {scheme.bits} bits", _DAMAGED)
        count = int(np.prod(scales.shape, dtype=np.int64))
        if count not in ((1,) if scheme.size == 0 else (rows * groups,)):
            raise SourceError(
                f"The tensor {scales.name} in {self.where} has {count} scales; {rows} rows of {groups} groups need "
                f"{1 if scheme.size == 0 else rows * groups}",
                _DAMAGED,
            )
