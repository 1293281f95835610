"""The reference backend: its offers, refusals and cleanup.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from transom.contract import Artifact, Cancelled, Device, Offer, Refusal, Work
from transom.reference import ReferenceBackend
from transom.testing.models import tiny_decoder

CPU = Device("cpu", "cpu", "x86_64", 8 << 30)


def test_it_offers_every_cpu_as_a_fallback_and_refuses_all_else() -> None:
    cuda = Device("cuda", "cuda:0", "sm_90", 80 << 30)
    answers = ReferenceBackend().probe([cuda, CPU])
    assert isinstance(answers[0], Refusal)
    assert answers[0].code == "wrong_device"
    assert isinstance(answers[1], Offer)
    assert answers[1].band == "fallback"


def test_context_option_bounds_the_session(rng: np.random.Generator, tmp_path: Path) -> None:
    backend = ReferenceBackend()
    artifact = backend.compile(tiny_decoder(rng, context=64), CPU, {}, lambda stage, share: None)
    for asked, wanted in ((None, 64), (10, 10), (1000, 64)):
        session = backend.load(artifact, CPU, {"context": asked}, tmp_path)
        assert session.limits.context == wanted
    session = backend.load(artifact, CPU, {"context": 10}, tmp_path)
    with pytest.raises(ValueError, match="context of 10"):
        session.step([Work(session.new_state(), list(range(11)))])


def test_compile_that_fails_leaves_no_folder(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    graph = tiny_decoder(rng)

    def at_the_end(stage: str, share: float | None) -> None:
        if share == 1.0:
            raise Cancelled

    with pytest.raises(Cancelled):
        ReferenceBackend().compile(graph, CPU, {}, at_the_end)
    assert not list(tmp_path.iterdir())


def test_artifact_of_another_format_is_rebuilt() -> None:
    backend = ReferenceBackend()
    assert backend.check(Artifact({}, {"format": "1"}), CPU).state == "ok"
    for requires in ({"format": "0"}, {}, {"format": "1", "openvino": "2026.4"}):
        verdict = backend.check(Artifact({}, requires), CPU)
        assert verdict.state == "rebuild"
        assert verdict.reason
