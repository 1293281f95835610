"""The registry entry of an operator: schema, shape rule, NumPy reference, function body, random samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Attributes = Mapping[str, Any]
Reference = Callable[[Sequence[Array | None], Attributes], tuple[Array, ...]]
"""(inputs in order, None for an absent optional one; attributes by name, defaults filled in) -> outputs."""

Dimension: TypeAlias = int | str | None


@dataclass(frozen=True)
class TensorSpec:
    """Element type (an ONNX name such as `"float32"`) and shape; a dimension is a number, a symbol or None
    (unknown)."""

    dtype: str
    shape: tuple[Dimension, ...] | None


ShapeRule = Callable[[Sequence[TensorSpec | None], Attributes], tuple[TensorSpec, ...]]
"""(input specs, attributes) -> output specs. Raises ValueError for invalid inputs."""


@dataclass(frozen=True)
class Param:
    """A formal input or output."""

    name: str
    doc: str
    types: tuple[str, ...] = ("float32",)
    optional: bool = False
    variadic: bool = False


@dataclass(frozen=True)
class Attribute:
    """A formal attribute; `default=None` means that it is required."""

    name: str
    type: Literal["int", "float", "string", "ints", "floats", "strings"]
    default: Any
    doc: str


@dataclass(frozen=True)
class Sample:
    """One random call of an operator, for the conformance kit."""

    label: str
    inputs: tuple[Array | None, ...]
    attributes: Mapping[str, Any]
    outputs: int = 1
    constant_inputs: tuple[int, ...] = ()
    """Indices of the inputs that are initializers in a real graph (weights, shapes, axes)."""
    dtypes: Mapping[int, str] | None = None
    """ONNX element types without a NumPy name, by input index: `{0: "int4"}`."""


Body = Callable[[Attributes, Sequence[bool]], "ir.Function"]
"""(attributes, which inputs are present) -> a function in standard operators, specialized to both."""


@dataclass(frozen=True)
class OpSchema:
    """An operator of the neutral graph.

    The domain `""` is ONNX itself: schema and shape rule come from ONNX, only reference and samples are defined here.
    Operators of any other domain need every field, including the body, so that every ONNX runtime can execute the
    graph.
    """

    domain: str
    name: str
    since_version: int
    doc: str
    inputs: tuple[Param, ...]
    outputs: tuple[Param, ...]
    attributes: tuple[Attribute, ...]
    reference: Reference
    samples: Callable[[np.random.Generator], Iterator[Sample]] | None = None
    infer: ShapeRule | None = None
    body: Body | None = None

    @property
    def key(self) -> tuple[str, str]:
        return (self.domain, self.name)

    def attributes_with_defaults(self, given: Attributes) -> dict[str, Any]:
        """The attributes of one node, defaults filled in.

        Raises:
            ValueError: an attribute is unknown or a required one is missing.
        """
        known = {a.name for a in self.attributes}
        if unknown := set(given) - known:
            raise ValueError(f"{self.name} has no attribute {', '.join(sorted(unknown))}")
        result = {a.name: given.get(a.name, a.default) for a in self.attributes}
        if missing := [name for name, value in result.items() if value is None]:
            raise ValueError(f"{self.name} needs the attribute {', '.join(missing)}")
        return result
