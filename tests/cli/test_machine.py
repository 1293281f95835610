"""`transom devices`, `backends`, `doctor` and `cache`: the machine, what is installed, what works, what is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import toy

BROKEN = "raise ImportError('libtoy.so is missing')"
GPU = {"kind": "cuda", "id": "cuda:0", "arch": "sm_80", "memory_bytes": 40 * 10**9, "name": "NVIDIA A100"}


def probe_file(folder: Path, *devices: dict[str, Any]) -> Path:
    path = folder / "probe.json"
    path.write_text(json.dumps({"devices": list(devices)}))
    return path


def test_devices_lists_the_cpu_and_with_all_the_targets(bare: Any) -> None:
    status, out, _ = bare("devices")
    assert status == 0
    assert out.splitlines()[1].startswith("cpu ")
    assert "transom devices --all" in out
    ids = [d["id"] for d in json.loads(bare("devices", "--all", "--json").out)["devices"]]
    assert ids[0] == "cpu"
    assert "remote:snapdragon-8-gen-3" in ids


def test_backends_shows_offers_refusals_and_what_is_broken(transom: Any, tmp_path: Path) -> None:
    toy.install_backend(tmp_path / "more", BROKEN, "broken")
    environment = {"PYTHONPATH": f"{tmp_path / 'more'}{os.pathsep}{transom.environment['PYTHONPATH']}"}
    file = probe_file(tmp_path, GPU)
    status, out, _ = transom("backends", "--probe-file", file, env=environment)
    assert status == 0
    assert "the toy needs a toy driver (pip install toy-driver)" in out
    assert "libtoy.so is missing" in out
    found = json.loads(transom("backends", "--json", env=environment).out)
    assert {b["name"] for b in found["backends"]} >= {"reference", "toy"}
    assert [f["entry_point"] for f in found["failures"]] == ["broken"]


def test_doctor_says_what_works_what_does_not_and_what_mends_it(transom: Any, tmp_path: Path) -> None:
    toy.install_backend(tmp_path / "more", BROKEN, "broken")
    paths = f"{tmp_path / 'more'}{os.pathsep}{transom.environment['PYTHONPATH']}"
    status, out, err = transom("doctor", env={"TOY_FAIL": "compile", "PYTHONPATH": paths})
    assert status == 0
    lines = out.splitlines()
    assert any(line.split()[:4] == ["ok", "reference", "on", "cpu"] for line in lines)
    assert any(line.split()[:4] == ["FAILS", "toy", "on", "cpu"] and "SIGABRT" in line for line in lines)
    assert "libtoy.so is missing" in out
    fix = out[out.index("To fix") :]
    assert "pip uninstall transom-broken" in fix
    assert "report it to the authors of toy" in fix
    assert "Traceback" not in out + err


def test_a_report_of_doctor_is_a_probe_file_with_everything_else(transom: Any, tmp_path: Path) -> None:
    status, out, _ = transom("doctor", "--json", env={"TRANSOM_DEVICE": "cpu"})
    assert status == 0
    found = json.loads(out)
    assert {t["backend"]: t["outcome"] for t in found["trials"]}["reference"] == "works"
    assert {t["backend"]: t["outcome"] for t in found["trials"]}["toy"] == "fails"  # it says what it likes
    assert found["packages"]["transom"]
    assert found["cache"]["writable"] is True
    assert found["environment"]["TRANSOM_DEVICE"] == "cpu"
    case = tmp_path / "case.json"
    case.write_text(out)
    again = json.loads(transom("devices", "--probe-file", case, "--json").out)
    assert again["devices"] == found["devices"]
    status, out, _ = transom("doctor", "--probe-file", case)
    assert status == 0
    assert "Nothing was tried" in out


def test_doctor_ends_with_2_when_nothing_can_run(bare: Any, tmp_path: Path) -> None:
    card = {**GPU, "arch": "sm_70", "name": "NVIDIA V100"}  # tensorrt, which the tests install, serves newer ones
    status, out, _ = bare("doctor", "--probe-file", probe_file(tmp_path, card))
    assert status == 2
    assert "none can run on any" in out


def test_doctor_names_a_cache_that_cannot_be_written(bare: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = bare("doctor", "--probe-file", probe_file(tmp_path, GPU), env={"TRANSOM_CACHE": str(tmp_path / "file")}).out
    assert "cannot be written" in out
    assert "TRANSOM_CACHE" in out[out.index("To fix") :]


def test_the_cache_is_listed_pruned_and_cleared(fresh: Any, model: Path) -> None:
    assert fresh("run", model, "x", "--backend", "toy", "--verify", "off").status == 0
    status, out, _ = fresh("cache", "list")
    assert status == 0
    assert "toy.gguf for toy on cpu" in out
    assert "limit 20.0 GB" in out
    listed = json.loads(fresh("cache", "list", "--json").out)
    assert {e["kind"] for e in listed["entries"]} == {"artifacts", "sources"}
    assert "Removed 0 entries" in fresh("cache", "prune", "--size", "1GB").out
    assert json.loads(fresh("cache", "prune", "--size", "0B", "--json").out)["entries"] == 2
    assert "Removed 0 entries" in fresh("cache", "clear").out
    status, _, err = fresh("cache", "prune", "--size", "lots")
    assert status == 2
    assert '"lots"' in err


def test_the_content_of_the_cache_is_verified_on_request(fresh: Any, model: Path, tmp_path: Path) -> None:
    assert fresh("run", model, "x", "--backend", "toy", "--verify", "off").status == 0
    before = [e["last_used"] for e in json.loads(fresh("cache", "list", "--json").out)["entries"]]
    status, out, _ = fresh("cache", "verify")
    assert status == 0
    assert "2 entries are intact" in out
    listed = json.loads(fresh("cache", "list", "--json").out)["entries"]
    assert [e["last_used"] for e in listed] == before  # not a use
    artifact = next(e for e in listed if e["kind"] == "artifacts")
    changed = next(path for path in (Path(artifact["path"]) / "files").rglob("*") if path.stat().st_size)
    changed.write_bytes(bytes(changed.stat().st_size))
    status, out, _ = fresh("cache", "verify")
    assert status == 1
    assert "1 entries are intact" in out
    assert f"artifacts/{artifact['key']} had changed and is removed" in out
    assert fresh("cache", "verify", "--json").status == 0


def test_an_age_that_is_none_removes_nothing(fresh: Any, model: Path) -> None:
    assert fresh("run", model, "x", "--backend", "toy", "--verify", "off").status == 0
    for days in ("-3", "-0.001", "nan", "-inf"):
        status, out, err = fresh("cache", "prune", "--unused-days", days)
        assert (status, out) == (2, ""), days
        assert f"--unused-days {days}" in err
    assert len(json.loads(fresh("cache", "list", "--json").out)["entries"]) == 2
    assert "Removed 0 entries" in fresh("cache", "prune", "--unused-days", "1").out


def test_clear_says_what_is_in_use(fresh: Any, model: Path) -> None:
    environment = {"TOY_DELAY": "0.2", "TOY_ENDLESS": "1"}
    child = fresh.begin("run", model, "x", "--backend", "toy", "--verify", "off", env=environment)
    assert child.stdout.read(1) == b"H"
    assert "in use and kept: artifacts/" in fresh("cache", "clear").out


@pytest.mark.parametrize("verb", ["list", "prune", "clear"])
def test_a_cache_that_is_not_there_is_empty(fresh: Any, verb: str) -> None:
    status, _, err = fresh("cache", verb)
    assert (status, err) == (0, "")
