"""Every operator's reference against two independent ones: onnx.reference and ONNX Runtime.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from transom.ops import OpSchema, operators
from transom.testing.checks.operators import expected
from transom.testing.compare import normalized_error
from transom.testing.one_node import one_node

SCHEMAS = {f"{s.domain}.{s.name}": s for s in operators()}
OURS = [name for name, s in SCHEMAS.items() if not s.domain]


def agree(ours: Any, theirs: Any, what: str) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    if ours.dtype.kind in "iub":
        np.testing.assert_array_equal(ours, theirs, what)
    else:
        assert normalized_error(ours, theirs) < 2e-6, what


@pytest.mark.parametrize("name", SCHEMAS)
def test_reference_agrees_with_onnx_runtime(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    schema = SCHEMAS[name]
    assert schema.samples is not None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    for sample in schema.samples(rng):
        graph, inputs = one_node(schema, sample)
        graph.save(tmp_path / "graph.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
        theirs = session.run(None, inputs)
        ours = expected(schema, sample)
        assert len(ours) == len(theirs)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            agree(a, b, f"{name}, {sample.label}, output {i}")


@pytest.mark.parametrize("name", OURS)
def test_reference_agrees_with_the_onnx_package(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    schema = SCHEMAS[name]
    assert schema.samples is not None
    for sample in schema.samples(rng):
        graph, inputs = one_node(schema, sample)
        graph.save(tmp_path / "graph.onnx")
        theirs = ReferenceEvaluator(onnx.load(tmp_path / "graph.onnx")).run(None, inputs)
        for i, (a, b) in enumerate(zip(expected(schema, sample), theirs, strict=True)):
            agree(a, b, f"{name}, {sample.label}, output {i}")


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", SCHEMAS)
def test_graph_of_one_node_is_valid_onnx_and_infers_the_true_shapes(
    name: str, dynamic: bool, rng: np.random.Generator
) -> None:
    schema = SCHEMAS[name]
    assert schema.samples is not None
    for sample in schema.samples(rng):
        graph, inputs = one_node(schema, sample, dynamic=dynamic)
        graph.check()
        inferred = onnx.shape_inference.infer_shapes(graph.structure(), strict_mode=True)
        sizes = {f"d{x.shape[0]}": x.shape[0] for x in inputs.values() if x.ndim}
        for output, array in zip(inferred.graph.output, expected(schema, sample), strict=True):
            dims = output.type.tensor_type.shape.dim
            assert len(dims) == array.ndim, (sample.label, output)
            for dim, size in zip(dims, array.shape, strict=True):
                told = dim.dim_value if dim.HasField("dim_value") else sizes.get(dim.dim_param, size)
                assert told == size, (sample.label, output, array.shape)


@pytest.mark.seeds(4265285645)
def test_every_number_of_a_sample_is_finite(rng: np.random.Generator) -> None:
    for schema in operators():
        assert schema.samples is not None
        for sample in schema.samples(rng):
            for array in sample.inputs:
                if array is not None and array.dtype.kind in "fV":
                    assert np.isfinite(array.astype(np.float32)).all(), f"{schema.name}, {sample.label}"


@pytest.mark.seeds(4265285645)
def test_samples_differ_from_seed_to_seed_and_repeat_with_one(seed: int) -> None:
    for schema in operators():
        assert schema.samples is not None
        first, again, other = (
            [x for s in schema.samples(np.random.default_rng(n)) for x in s.inputs] for n in (seed, seed, seed + 1)
        )
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)
        same = [a is not None and b is not None and np.array_equal(a, b) for a, b in zip(first, other, strict=False)]
        assert not all(same), schema.name


def test_every_sample_names_attributes_and_inputs_that_its_schema_knows(rng: np.random.Generator) -> None:
    for schema in operators():
        assert schema.samples is not None
        samples = list(schema.samples(rng))
        assert samples, schema.name
        assert len({s.label for s in samples}) == len(samples), f"{schema.name} has two samples of one label"
        for sample in samples:
            _check_sample(schema, sample.attributes, len(sample.inputs), sample.outputs)


def _check_sample(schema: OpSchema, attributes: Any, inputs: int, outputs: int) -> None:
    if schema.domain:
        known = {a.name for a in schema.attributes}
    else:
        known = set(onnx.defs.get_schema(schema.name, 24, "").attributes)
    assert set(attributes) <= known
    variadic = any(p.variadic for p in schema.inputs)
    assert variadic or inputs <= len(schema.inputs)
    assert outputs <= len(schema.outputs) or any(p.variadic for p in schema.outputs)
