"""The network in ONNX Runtime: slots in place, and errors.

Draws: float16 agrees to 2e-2, tens of times its rounding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rtx_networks import compiled

from transom.errors import EngineError
from transom.preparation.reference_outputs import reference_logits
from transom_tensorrt.emulating import SLOTS, OnnxExecutor
from transom_tensorrt.network import MODEL_FILE


@pytest.mark.parametrize("number", ["float16", "float32"])
def test_a_run_over_a_slot_gives_the_references_logits(rng: np.random.Generator, tmp_path: Path, number: str) -> None:
    made = compiled(rng, tmp_path, number=number)
    executor = OnnxExecutor(made.network, made.model)
    executor.allocate(3)
    ids = rng.integers(0, made.network.vocabulary, 9)
    got = [executor.run("prefill", ids[None, :6], np.array([0]), np.arange(6), 1).copy()]
    got += [executor.run("decode", ids[None, i : i + 1], np.array([i]), np.zeros(1, int), 1) for i in range(6, 9)]
    np.testing.assert_allclose(np.concatenate(got), reference_logits(made.graph, ids), atol=2e-2, rtol=2e-2)


def test_runs_write_to_their_own_slots_alone(rng: np.random.Generator, tmp_path: Path) -> None:
    made = compiled(rng, tmp_path)
    executor = OnnxExecutor(made.network, made.model)
    executor.allocate(4)
    context = made.network.context
    for slot in range(4):
        executor.run("prefill", rng.integers(0, 9, (1, 5)), np.array([0]), np.zeros(1, int), slot)
    before = [executor.read_slot(slot, context) for slot in range(4)]
    executor.run("decode", rng.integers(9, 18, (2, 1)), np.array([5, 3]), np.arange(2), 1)
    for slot, (start, end) in {0: (0, 0), 1: (5, 6), 2: (3, 4), 3: (0, 0)}.items():
        after = executor.read_slot(slot, context)
        for name, array in before[slot].items():
            changed = (array != after[name]).any((0, 2))
            assert not changed[:start].any(), (slot, name)
            assert not changed[end:].any(), (slot, name)
            assert changed[start:end].all(), (slot, name)


def test_slots_are_copied_cleared_read_and_written(rng: np.random.Generator, tmp_path: Path) -> None:
    made = compiled(rng, tmp_path)
    executor = OnnxExecutor(made.network, made.model)
    assert executor.allocate(99) == SLOTS
    executor.run("prefill", rng.integers(0, 9, (1, 5)), np.array([0]), np.zeros(1, int), 0)
    executor.copy_slot(0, 2, 3)
    executor.write_slot(3, executor.read_slot(0, 4))
    executor.clear_slot(3, 2)
    first = executor.read_slot(0, 5)
    for slot, kept in ((2, 3), (3, 2)):
        for name, array in executor.read_slot(slot, 5).items():
            np.testing.assert_array_equal(array[:, :kept], first[name][:, :kept])
            assert not array[:, kept:].any()
            assert first[name][:, kept:].any()


def test_a_damaged_model_is_an_error(rng: np.random.Generator, tmp_path: Path) -> None:
    made = compiled(rng, tmp_path)
    made.model.write_bytes(made.model.read_bytes()[:500])
    with pytest.raises(EngineError, match=MODEL_FILE):
        OnnxExecutor(made.network, made.model)


def test_what_onnx_runtime_refuses_to_run_is_an_error(rng: np.random.Generator, tmp_path: Path) -> None:
    made = compiled(rng, tmp_path)
    executor = OnnxExecutor(made.network, made.model)
    executor.allocate(1)
    with pytest.raises(EngineError, match="cannot run the network"):
        executor.run("prefill", np.full((1, 2), 10**6), np.array([0]), np.zeros(1, int), 0)


def test_weight_bytes_are_the_size_of_the_files(rng: np.random.Generator, tmp_path: Path) -> None:
    made = compiled(rng, tmp_path)
    files = [path for path in tmp_path.iterdir() if path.name.startswith("model.")]
    assert len(files) == 2
    assert OnnxExecutor(made.network, made.model).weight_bytes == sum(path.stat().st_size for path in files)
