"""`transom bench`: every backend in its turn, and a cold start by its parts.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import toy

QUICK = ("--rounds", "2", "--prompt-tokens", "8", "--prompt-tokens", "16", "--new-tokens", "4")


def test_backends_are_measured_side_by_side(transom: Any, model: Path, tmp_path: Path) -> None:
    # A second toy that dies while compiling: its row says so, and the others are measured.
    source = toy.TOY.replace('name = "toy"', 'name = "dying"').replace(
        'os.environ.get("TOY_FAIL") == "compile"', "True"
    )
    toy.install_backend(tmp_path / "more", source, "dying")
    paths = f"{tmp_path / 'more'}{os.pathsep}{transom.environment['PYTHONPATH']}"
    named = ("--backend", "reference", "--backend", "dying")
    status, out, _ = transom("bench", model, *QUICK, *named, "--json", env={"PYTHONPATH": paths})
    assert status == 0
    found = json.loads(out)
    assert found["machine"]["devices"]["cpu"]["name"]
    assert found["machine"]["packages"]["transom"]
    rows = {r["backend"]: r for r in found["results"]}
    row = rows["reference"]
    for kind in ("prefill", "decode"):
        assert set(row[f"{kind}_tokens_per_second"]) == {"8", "16"}
        assert all(len(values) == 2 for values in row["rounds"][kind].values())
        assert all(rate > 0 for rate in row[f"{kind}_tokens_per_second"].values())
    assert row["load_seconds"] > 0
    assert row["memory_bytes"]["peak"] > 10**7
    assert "SIGABRT" in rows["dying"]["error"]


def test_the_table_names_machine_versions_and_ratios(bare: Any, model: Path) -> None:
    status, out, _ = bare("bench", model, *QUICK, "--backend", "reference", "--rounds", "1")
    assert status == 0
    for part in ("Tiny", "cpu: ", "numpy ", "medians of 1 rounds", "prefill 8", "decode at 16", "reference 0"):
        assert part in out


def test_what_takes_too_long_is_given_up_and_said(transom: Any, model: Path) -> None:
    named = ("--backend", "toy", "--patience", "1", "--rounds", "1", "--prompt-tokens", "8", "--new-tokens", "40")
    # The self-check is part of loading, and this backend cannot pass it.
    done = transom("bench", model, *named, env={"TOY_DELAY": "0.1"})
    assert done.status == 2
    assert "toy on cpu failed" in done.out


def test_a_prompt_longer_than_the_model_is_refused(bare: Any, model: Path) -> None:
    status, _, err = bare("bench", model, "--prompt-tokens", "5000")
    assert status == 2
    assert "more than the model's context of 4096" in err
    assert "--prompt-tokens 4048" in err


def test_a_cold_start_is_split_into_its_parts(bare: Any, model: Path) -> None:
    status, out, _ = bare("bench", model, "--startup", "--runs", "2", "--backend", "reference", "--json")
    assert status == 0
    found = json.loads(out)
    stages = found["median_seconds"]
    assert list(stages) == ["interpreter + imports", "probe", "read", "compile", "load", "warm-up", "first token"]
    assert stages["compile"] == 0
    assert all(seconds >= 0 for seconds in stages.values())
    for run in found["all"]:
        assert sum(run.values()) >= found["total_seconds"]["least"] - 1e-6
    assert found["report"]["backend"] == "reference"
    assert found["bytecode"] is True


def test_with_an_empty_cache_the_compiling_shows(bare: Any, model: Path) -> None:
    named = ("--startup", "--empty-cache", "--runs", "1", "--backend", "reference")
    status, out, _ = bare("bench", model, *named, env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert status == 0
    (line,) = (line for line in out.splitlines() if line.startswith("compile "))
    assert int(line.split()[1]) > 0
    assert "process start to first token: " in out
    assert "PYTHONDONTWRITEBYTECODE is set" in out


def test_ctrl_c_ends_the_workers_too(transom: Any, model: Path) -> None:
    child = transom.begin("bench", model, "--backend", "reference", "--rounds", "500", "--prompt-tokens", "64")
    workers: list[int] = []
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    while child.poll() is None and not workers:
        workers = [int(pid) for pid in children.read_text().split()] if children.exists() else [0]
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err.decode().splitlines()[-1]) == (130, b"", "Interrupted.")
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/stat").exists() for pid in workers if pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_graph_that_does_not_generate_is_refused_in_one_sentence(bare: Any, tmp_path: Path, rng: Any) -> None:
    from onnx_models import Writer, save
    from onnx_models import value as port

    w = Writer(rng)
    w.op("MatMul", "x", w.random(4, 4), outputs=["y"])
    path = save(w.model([port("x", shape=[1, 4])], [port("y", shape=[1, 4])]), tmp_path / "plain.onnx")
    for more in ((), ("--startup",)):
        status, out, err = bare("bench", path, *more)
        assert status == 2
        assert not out
        assert err.count("is not a decoder") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--runs", "3"), "--runs has no effect without --startup"),
        (("--empty-cache",), "--empty-cache has no effect without --startup"),
        (("--startup", "--rounds", "2"), "--rounds has no effect with --startup"),
        (("--heat-map", "a.html", "--startup"), "--startup has no effect with --heat-map"),
    ],
)
def test_an_option_without_an_effect_is_refused(bare: Any, model: Path, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = bare("bench", model, *arguments)
    assert (status, out) == (2, "")
    assert said in err
