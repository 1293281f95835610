"""The faster of two engines: what is compiled, what is kept, what is said.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from transom.authoring import folders
from transom.contract import Artifact, Device, Options
from transom.errors import EngineError
from transom.hardware.cpu import probe_cpu
from transom.testing.models import tiny_decoder
from transom_openvino_cpu import OpenVinoCpu, compiling, measuring
from transom_openvino_cpu.measuring import RunTimes
from transom_openvino_cpu.native import choosing

CPU = probe_cpu()
pytestmark = pytest.mark.skipif(choosing.level_on(CPU) is None, reason="there is one engine: no native library")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setenv("TRANSOM_NATIVE", "measure")
    monkeypatch.setattr(folders, "SMALL_FILE", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return monkeypatch


def _compile(rng: np.random.Generator, device: Device = CPU) -> Artifact:
    return OpenVinoCpu().compile(tiny_decoder(rng), device, {"precision": "exact"}, lambda stage, share: None)


@pytest.mark.parametrize(("openvino", "kept"), [(0.89, "body.blob"), (0.91, "weights.bin"), (2.0, "weights.bin")])
def test_the_faster_one_is_kept_with_a_note_and_nothing_of_the_other(
    openvino: float, kept: str, rng: np.random.Generator, measured: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def times(artifact: Artifact, device: Device, options: Options) -> RunTimes:
        seconds = 1.0 if "weights.bin" in artifact.files else openvino
        return RunTimes(0.75 * seconds, 0.25 * seconds, (1024, 32))

    measured.setattr(measuring, "times", times)
    artifact = _compile(rng)
    assert kept in artifact.files
    assert ("body.blob" in artifact.files) != ("weights.bin" in artifact.files)
    note = artifact.notes[-1]
    assert "native kernels: 1024 tokens read in 0.750 s and 32 written in 0.250 s" in note
    which = "OpenVINO's" if kept == "body.blob" else "the native ones"
    assert note.endswith(f"{which} were kept")
    paths = {content for content in artifact.files.values() if isinstance(content, Path)}
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == paths


def test_both_are_really_run(rng: np.random.Generator, measured: pytest.MonkeyPatch) -> None:
    note = _compile(rng).notes[-1]
    assert note.count("tokens read in") == 2
    assert "measured here" in note


@pytest.mark.parametrize("stage", ["compile", "run"])
def test_where_openvino_fails_the_native_one_is_kept_and_says_so(
    stage: str, rng: np.random.Generator, measured: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*args: object) -> None:
        raise EngineError("OpenVINO cannot do this")

    real = measuring.times
    if stage == "compile":
        measured.setattr(compiling, "_by_openvino", fails)
    else:
        measured.setattr(measuring, "times", lambda a, *rest: real(a, *rest) if "weights.bin" in a.files else fails())
    artifact = _compile(rng)
    assert artifact.notes[-1] == "native kernels were chosen without measuring: OpenVINO cannot do this"
    paths = {content for content in artifact.files.values() if isinstance(content, Path)}
    assert {p.name for p in paths} == {"weights.bin"}
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == paths


def test_without_memory_for_both_the_native_one_is_kept_unmeasured(
    rng: np.random.Generator, measured: pytest.MonkeyPatch
) -> None:
    measured.setattr(compiling, "_by_openvino", lambda *args: pytest.fail("there is no memory for it"))
    artifact = _compile(rng, replace(CPU, free_bytes=100_000))
    assert "weights.bin" in artifact.files
    assert "chosen without measuring" in artifact.notes[-1]
    assert artifact.notes[-1].endswith("and 0.0 GB are free")


def test_one_engine_is_compiled_where_nobody_asks(rng: np.random.Generator, measured: pytest.MonkeyPatch) -> None:
    measured.delenv("TRANSOM_NATIVE")
    assert not any("measured" in note for note in _compile(rng).notes)


def test_a_decoder_that_openvino_cannot_run_is_native_without_measuring(
    rng: np.random.Generator, measured: pytest.MonkeyPatch
) -> None:
    graph = tiny_decoder(rng, softcap=20.0)
    artifact = OpenVinoCpu().compile(graph, CPU, {"precision": "exact"}, lambda stage, share: None)
    assert "weights.bin" in artifact.files
    assert artifact.notes[-1] == (
        "native kernels were chosen without measuring: OpenVINO's PagedAttention has no soft cap on the scores"
    )


def test_an_artifact_that_was_not_measured_is_made_again_where_it_is_asked_for(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = _compile(rng)
    assert OpenVinoCpu().check(artifact, CPU).state == "ok"
    monkeypatch.setenv("TRANSOM_NATIVE", "measure")
    assert OpenVinoCpu().check(artifact, CPU).state == "rebuild"
