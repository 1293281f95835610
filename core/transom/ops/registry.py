"""The operators that a neutral graph may contain, by (domain, name). Third parties add theirs through `transom_ops`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transom.ops.schema import OpSchema

_REGISTRY: dict[tuple[str, str], OpSchema] = {}


def register(schema: OpSchema) -> None:
    """Add an operator.

    Raises:
        ValueError: the name is taken, or an operator outside ONNX's own domain has no shape rule, body or samples.
    """
    if schema.key in _REGISTRY and _REGISTRY[schema.key] is not schema:
        raise ValueError(f"the operator {schema.domain or 'ai.onnx'}::{schema.name} is registered twice")
    if schema.domain and not (schema.infer and schema.body and schema.samples):
        raise ValueError(f"{schema.domain}::{schema.name} needs a shape rule, a function body and samples")
    _REGISTRY[schema.key] = schema


def register_all(schemas: Iterable[OpSchema]) -> None:
    for schema in schemas:
        register(schema)


def find(domain: str, name: str) -> OpSchema | None:
    """The operator, or None. `ai.onnx` equals the empty domain. Every operator of ONNX itself is found."""
    from transom.ops import standard

    domain = "" if domain == "ai.onnx" else domain
    found = _REGISTRY.get((domain, name))
    if found is None and domain in ("", "ai.onnx.ml"):
        found = standard.schema_of(domain, name)
    return found


def operators() -> Iterator[OpSchema]:
    """All registered operators, ONNX's own first, then by domain and name."""
    return iter(sorted(_REGISTRY.values(), key=lambda s: s.key))
