"""Bundles of the backends that come with Transom, each step in a process of its own and the devices really probed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

EXPORT = """
try:
    made = transom.export(model, target=sys.argv[2], out=sys.argv[3], format=sys.argv[4])
    show(made=made.to_dict())
except TransomError as error:
    show(error=str(error))
"""
LOAD = """
try:
    with transom.load(sys.argv[2]) as loaded:
        answer = loaded.generate("Hello", max_new_tokens=12, ignore_eos=True)
        logits = loaded.logits("The capital").tobytes().hex()
        show(tokens=answer.token_ids, logits=logits, report=loaded.report.to_dict())
except TransomError as error:
    show(error=str(error))
"""


@pytest.fixture
def engines(packages: Any) -> Any:
    """Without the made-up backends and devices."""
    del packages.environment["TRANSOM_PROBE_FILE"]
    return packages


def test_a_bundle_for_this_processor_answers_to_the_last_bit_as_the_model_does(engines: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    made = engines.run(EXPORT, "cpu", bundle, "openvino_cpu")["made"]
    (variant,) = made["variants"]
    assert variant["backend"] == "openvino_cpu"
    assert variant["check"].startswith("passed")
    direct = engines.run(LOAD.replace("sys.argv[2]", "model, backend='openvino_cpu'"))
    shutil.rmtree(engines.cache)
    first = engines.run(LOAD, bundle)
    second = engines.run(LOAD, bundle)
    assert first["report"]["check"].startswith("passed")
    assert "child check" in first["report"]["startup"]
    assert "child check" not in second["report"]["startup"]
    assert [answer["tokens"] for answer in (first, second)] == [direct["tokens"]] * 2
    assert [answer["logits"] for answer in (first, second)] == [direct["logits"]] * 2
    assert second["report"]["precision"] == direct["report"]["precision"] == variant["precision"]


@pytest.mark.parametrize(("target", "arch"), [("a100", "sm_80"), ("remote:rtx-4090", "sm_89")])
@pytest.mark.sweep(but=("remote:rtx-4090-sm_89",))
def test_a_bundle_for_a_card_is_compiled_without_one_and_needs_it_to_run(
    engines: Any, tmp_path: Path, target: str, arch: str
) -> None:
    bundle = tmp_path / "bundle"
    made = engines.run(EXPORT, target, bundle, "cuda_triton")["made"]
    (variant,) = made["variants"]
    assert variant["backend"] == "cuda_triton"
    assert variant["device"]["arch"] == arch
    assert made["files"]["cuda_triton/kernels.bin"] > 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["variants"][0]["requires"]["arch"] == arch
    assert manifest["expected"]["tokens"]
    # A machine without cards is made up, so that the test says the same on one that has them.
    devices = '{"devices": [{"kind": "cpu", "id": "cpu", "arch": "x86_64", "memory_bytes": 8000000000}]}'
    (tmp_path / "probe.json").write_text(devices)
    engines.environment["TRANSOM_PROBE_FILE"] = str(tmp_path / "probe.json")
    error = engines.run(LOAD, bundle)["error"]
    assert f"was compiled for remote:{target.removeprefix('remote:')}" in error
    assert "cuda_triton on cpu" in error
    assert "transom export MODEL --target cpu" in error


def test_a_card_that_no_backend_compiles_for_says_why(engines: Any, tmp_path: Path) -> None:
    error = engines.run(EXPORT, "snapdragon-8-gen-2", tmp_path / "bundle", "cuda_triton")["error"]
    assert 'The backend "cuda_triton" cannot compile for the device "remote:snapdragon-8-gen-2"' in error
    assert "--target list" in error
    assert not (tmp_path / "bundle").exists()
