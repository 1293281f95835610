"""The reference's answer from a process beside the one that compiles."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest

import transom
from transom.runtime import beside, loading
from transom.runtime.jobs import Job
from transom.runtime.trial import run_in_child

Payload = dict[str, Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Payload]:
    """What the children were asked to do."""
    payloads: list[Payload] = []

    def noted(entry: str, payload: Payload, **options: Any) -> Any:
        payloads.append(dict(payload))
        return run_in_child(entry, payload, **options)

    monkeypatch.setattr(loading, "run_in_child", noted)
    return payloads


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    return byte_llama.write_gguf(tmp_path / "m.gguf", rng)


def job_of(payload: Payload) -> Job:
    return Job.from_payload({k: v for k, v in payload.items() if k not in ("work", "beside")})


def test_a_first_load_asks_for_it_once(asked: list[Payload], model: Path, tmp_path: Path) -> None:
    cache = transom.Cache(tmp_path / "cache")
    for precision in ("auto", "exact"):  # the second one needs another artifact, and the same answer
        with transom.load(model, device="cpu", cache=cache, precision=precision) as loaded:
            assert "passed" in str(loaded.report)
    assert [payload["work"] for payload in asked] == ["prepare", "prepare"]
    assert asked[0]["beside"] == (len(os.sched_getaffinity(0)) > 1)
    assert asked[1]["beside"] is False


def test_it_needs_a_processor_and_room(
    asked: list[Payload], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with transom.load(model, device="cpu", cache=transom.Cache(tmp_path / "cache")):
        job = job_of(asked[0])
    empty = transom.Cache(tmp_path / "empty")
    here = beside.this_host()
    for processors, possible in (({0}, False), ({0, 1}, True)):
        host = replace(here, affinity=frozenset(processors))
        monkeypatch.setattr(beside, "this_host", lambda host=host: host)
        assert beside.worth_it(job, empty) == possible
    size = model.stat().st_size
    for free, possible in ((None, False), (size, False), (beside.ROOM * size + 1, True)):
        assert beside.worth_it(replace(job, device=replace(job.device, free_bytes=free)), empty) == possible
    assert not beside.worth_it(replace(job, verify=False), empty)
    assert not beside.worth_it(replace(job, graph="kept"), empty)
    assert not beside.worth_it(replace(job, model=str(tmp_path / "nowhere")), empty)


def test_the_end_of_the_block_stops_the_process(asked: list[Payload], model: Path, tmp_path: Path) -> None:
    with transom.load(model, device="cpu", cache=transom.Cache(tmp_path / "cache")):
        payload = {k: v for k, v in asked[0].items() if k != "beside"}
    payload["cache"] = str(tmp_path / "other")
    with beside.reference_beside(payload) as reference:
        beside.wait_for(reference, lambda stage, share: None)
        assert reference.result().ok
    assert any((tmp_path / "other" / "golden").iterdir())
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError), beside.reference_beside({**payload, "model": "/dev/zero"}) as reference:
        raise ZeroDivisionError
    assert reference.done()
    assert time.monotonic() - start < 20
