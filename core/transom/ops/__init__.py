"""The operator registry: for each operator a schema, a shape rule, a NumPy reference, a body in standard operators."""

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
