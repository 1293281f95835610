"""Checks of every registered operator: its random samples, one node at a time, against the registry's reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from transom.graph import Graph
from transom.graph.bodies import has_body
from transom.graph.passes import decompose
from transom.ops import Array, OpSchema, Sample, operators
from transom.testing.bench import Bench
from transom.testing.checks.check import Check, attempt
from transom.testing.compare import compare
from transom.testing.one_node import NODE, one_node
from transom.testing.result import CaseResult, Failed, Refused


def operator_name(schema: OpSchema) -> str:
    return f"{schema.domain}.{schema.name}" if schema.domain else schema.name


def expected(schema: OpSchema, sample: Sample) -> tuple[Array, ...]:
    """The reference's outputs for the sample."""
    attributes: dict[str, Any] = dict(sample.attributes)
    if schema.attributes:
        attributes = schema.attributes_with_defaults(attributes)
    attributes["__outputs__"] = sample.outputs
    inputs = [_as_stored(x, (sample.dtypes or {}).get(i)) for i, x in enumerate(sample.inputs)]
    return schema.reference(inputs, attributes)


def _as_stored(array: Array | None, dtype: str | None) -> Array | None:
    """The array with 4-bit integers in the element types of `ml_dtypes`."""
    if array is None or dtype not in ("int4", "uint4"):
        return array
    import ml_dtypes

    return array.astype(getattr(ml_dtypes, dtype))


def check_sample(bench: Bench, schema: OpSchema, sample: Sample) -> CaseResult:
    """Check one sample: with an open first dimension, or else with fixed sizes, or else as the operator's body."""
    reason = ""
    for dynamic, how in ((True, ""), (False, "with fixed sizes only")):
        graph, inputs = one_node(schema, sample, dynamic=dynamic)
        claim = bench.claim(graph)[0]
        if claim.ok:
            why = f"{how}, since: {reason}" if how else ""
            return _run(bench, schema, sample, graph, inputs, exact=claim.exact, how=why)
        reason = reason or claim.reason
    graph, inputs = one_node(schema, sample)
    if not has_body(graph.model, next(graph.nodes())):
        return CaseResult(sample.label, "refused", reason)
    try:
        lowered = bench.lower(decompose(graph, [NODE]))
    except Refused as e:
        return CaseResult(sample.label, "refused", f"{reason}; and its body: {e.reason}")
    how = f"by its body, since: {reason}"
    return _run(bench, schema, sample, lowered.graph, inputs, exact=lowered.exact, how=how)


def _run(
    bench: Bench, schema: OpSchema, sample: Sample, graph: Graph, inputs: dict[str, Array], *, exact: bool, how: str
) -> CaseResult:
    artifact = bench.compile(graph)
    with bench.session(artifact) as session:
        outputs = session.run(inputs)
        wanted = expected(schema, sample)
        if set(outputs) != {f"y{i}" for i in range(len(wanted))}:
            raise Failed(f"run returned {sorted(outputs)}, not one array for each output")
        limit = bench.tolerance(exact).operator
        kept = {name: np.array(np.asarray(y)) for name, y in outputs.items()}
        errors = [compare(outputs[f"y{i}"], y, limit, f"output {i}") for i, y in enumerate(wanted)]
        session.run({name: _other(x) for name, x in inputs.items()})
        if any(
            not np.array_equal(np.asarray(outputs[name]), y, equal_nan=y.dtype.kind == "f") for name, y in kept.items()
        ):
            raise Failed("a second run wrote into the first one's outputs")
    return CaseResult(sample.label, "passed", how, max(errors, default=0.0))


def _other(array: Array) -> Array:
    """Other floats of the same shape. Integers stay, so that indices remain valid."""
    return (array + array.dtype.type(1)).astype(array.dtype) if array.dtype.kind == "f" else array


def _check_of(schema: OpSchema) -> Callable[[Bench], list[CaseResult]]:
    def run(bench: Bench) -> list[CaseResult]:
        bench.offer()
        assert schema.samples is not None
        parts: list[CaseResult] = []
        for sample in schema.samples(bench.rng(f"operator {operator_name(schema)}")):
            part = attempt(sample.label, lambda sample=sample: [check_sample(bench, schema, sample)])  # type: ignore[misc]
            parts += [part] if isinstance(part, CaseResult) else part
        return parts

    run.__doc__ = f"{operator_name(schema)} computes the same as the registry's reference on every sample."
    return run


def checks() -> list[Check]:
    """One check for each operator with samples. ONNX operators that are found on demand have none."""
    return [Check(f"operator.{operator_name(s)}", _check_of(s)) for s in operators() if s.samples is not None]
