"""The operator registry: a schema, shape rule, NumPy reference and body in standard operators for each operator."""

from __future__ import annotations

from transom.ops import cached_attention, standard
from transom.ops.registry import find, operators, register, register_all
from transom.ops.schema import Array, Attribute, OpSchema, Param, Sample, TensorSpec

register(cached_attention.SCHEMA)
register_all(standard.schemas())

__all__ = [
    "Array",
    "Attribute",
    "OpSchema",
    "Param",
    "Sample",
    "TensorSpec",
    "find",
    "operators",
    "register",
    "register_all",
]
