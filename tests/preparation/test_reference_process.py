"""The process that computes the reference outputs in parallel with the one that compiles.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest
from bundling import HEXAGON, Tools
from made_up import CPU

import transom
from transom.loading import child_jobs
from transom.preparation import jobs, reference_process
from transom.preparation.child import run_in_child
from transom.preparation.jobs import Job

Payload = dict[str, Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Payload]:
    """What the children were asked to do."""
    payloads: list[Payload] = []

    def noted(entry: str, payload: Payload, **options: Any) -> Any:
        payloads.append(dict(payload))
        return run_in_child(entry, payload, **options)

    monkeypatch.setattr(child_jobs, "run_in_child", noted)
    return payloads


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    return byte_llama.write_gguf(tmp_path / "m.gguf", rng)


def job_of(payload: Payload) -> Job:
    return Job.from_payload({k: v for k, v in payload.items() if k not in ("work", "parallel_reference")})


def test_a_first_load_asks_for_it_once(asked: list[Payload], model: Path, tmp_path: Path) -> None:
    cache = transom.Cache(tmp_path / "cache")
    for precision in ("auto", "exact"):  # the second one needs another artifact, and the same answer
        with transom.load(model, device="cpu", cache=cache, precision=precision) as loaded:
            assert "passed" in str(loaded.report)
    assert [payload["work"] for payload in asked] == [jobs.PREPARE, jobs.PREPARE]
    assert asked[0]["parallel_reference"] == (len(os.sched_getaffinity(0)) > 1)
    assert asked[1]["parallel_reference"] is False


def test_it_needs_a_processor_and_room(
    asked: list[Payload], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with transom.load(model, device="cpu", cache=transom.Cache(tmp_path / "cache")):
        job = job_of(asked[0])
    empty = transom.Cache(tmp_path / "empty")
    here = reference_process.this_host()
    for processors, possible in (({0}, False), ({0, 1}, True)):
        host = replace(here, affinity=frozenset(processors))
        monkeypatch.setattr(reference_process, "this_host", lambda host=host: host)
        assert reference_process.worth_a_process(job, empty, job.device.free_bytes) == possible
    size = model.stat().st_size
    enough = reference_process.ROOM * size + 1
    for free, possible in ((None, False), (size, False), (enough, True)):
        assert reference_process.worth_a_process(job, empty, free) == possible
    assert not reference_process.worth_a_process(replace(job, verify=False), empty, enough)
    assert not reference_process.worth_a_process(replace(job, graph="kept"), empty, enough)
    assert not reference_process.worth_a_process(replace(job, model=str(tmp_path / "nowhere")), empty, enough)


@pytest.mark.parametrize("free", [None, 1 << 34])
def test_an_export_needs_the_reference_and_the_free_memory_of_the_host_counts(
    here: Any, export: Any, monkeypatch: pytest.MonkeyPatch, free: int | None
) -> None:
    here.use(Tools("tools"), devices=[replace(CPU, free_bytes=free)])
    wanted: list[bool] = []

    def noted(entry: str, payload: Payload, **options: Any) -> Any:
        wanted.append(payload["parallel_reference"])
        return here.child(entry, {**payload, "parallel_reference": False}, **options)

    monkeypatch.setattr(child_jobs, "run_in_child", noted)
    export(target=HEXAGON, verify="off")
    assert wanted == [free is not None and len(os.sched_getaffinity(0)) > 1]


def test_the_end_of_the_block_stops_the_process(asked: list[Payload], model: Path, tmp_path: Path) -> None:
    with transom.load(model, device="cpu", cache=transom.Cache(tmp_path / "cache")):
        payload = {k: v for k, v in asked[0].items() if k != "parallel_reference"}
    payload["cache"] = str(tmp_path / "other")
    with reference_process.reference_in_parallel(payload) as reference:
        reference_process.wait_for(reference, lambda stage, share: None)
        assert reference.result().ok
    assert any((tmp_path / "other" / "golden").iterdir())
    start = time.monotonic()
    with (
        pytest.raises(ZeroDivisionError),
        reference_process.reference_in_parallel({**payload, "model": "/dev/zero"}) as reference,
    ):
        raise ZeroDivisionError
    assert reference.done()
    assert time.monotonic() - start < 20
