"""The whole way, by commands: exported without a card, refused where there is none, run in onnxruntime.

Draws: see `model`, which draws again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import add_tokenizer, tiny

import transom
from transom.errors import TransomError

SIZES = {"intermediate_size": 128, "head_dim": 32, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tiny("llama", folder, shared_rng("a tiny llama for TensorRT"), **SIZES)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def command(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    transom = [sys.executable, "-c", "from transom.cli import main; main()", *arguments]
    settings = {**os.environ, "TRANSOM_CACHE": str(cache), **environment}
    return subprocess.run(transom, capture_output=True, text=True, check=False, env=settings)


@pytest.fixture(scope="module")
def bundle(model: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "engine"
    done = command("export", str(model), "--target", "rtx-4090", "--format", "tensorrt", "--out", str(out), cache=cache)
    assert done.returncode == 0, done.stderr
    assert "products rounded to nearest, fp8" in done.stdout + done.stderr
    return out


def test_a_bundle_has_an_engine_and_says_what_it_is(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (variant,) = manifest["variants"]
    assert variant["backend"]["name"] == "tensorrt"
    assert variant["requires"]["arch"] == "sm_89"
    assert variant["requires"]["sdk"].startswith("tensorrt-rtx 1.")
    assert variant["requires"]["context"] == "256"
    notes = "\n".join(variant["notes"])
    for said in ("engine of", "built in", "of memory", "on the card:", "prefill:", "decode:", "fused attentions"):
        assert said in notes
    assert {"engine.plan", "layers.json", "build.json", "rounding.txt"} <= {
        p.name for p in (bundle / "tensorrt").iterdir()
    }


def test_its_layers_are_explained(bundle: Path, cache: Path) -> None:
    done = command("explain", str(bundle), "--device", "rtx-4090", cache=cache)
    assert done.returncode == 0, done.stderr
    assert "fp8 x fp8" in done.stdout
    assert "tensorrt on remote:rtx-4090: yes" in done.stdout
    other = command("explain", str(bundle), "--device", "rtx-3090", cache=cache)
    assert "built for sm_89, and this is sm_86" in other.stdout


def test_without_a_card_one_sentence_is_said(bundle: Path, cache: Path) -> None:
    done = command("run", str(bundle), "Hello", cache=cache)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "was compiled for remote:rtx-4090" in done.stderr


@pytest.mark.parametrize("damage", ["cut", "altered", "foreign"])
def test_a_damaged_engine_is_refused_before_it_is_opened(damage: str, bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    plan = copy / "tensorrt" / "engine.plan"
    data = bytearray(plan.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "altered":
        data[len(data) // 2] ^= 1
    if damage == "foreign":
        (copy / "tensorrt" / "other.plan").write_bytes(data)
    else:
        plan.write_bytes(data)
    with pytest.raises(TransomError, match=r"engine\.plan|other\.plan"):
        transom.load(copy)


@pytest.mark.parametrize("precision", ["f16", "fp8", "int8"])
def test_it_writes_what_the_reference_writes(precision: str, model: Path, cache: Path) -> None:
    """In onnxruntime; rounded ones are held to the reference by the self-check, with its wider bound."""
    asked = ["--json", "--max-tokens", "8", "--temperature", "0", "--context", "64", "--raw"]
    found: dict[str, Any] = {}
    for backend in ("tensorrt", "reference"):
        more = ["--precision", precision] if backend == "tensorrt" else []
        done = command("run", str(model), "abc", "--backend", backend, *asked, *more, cache=cache,
                       TRANSOM_TENSORRT_EMULATE="1")  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[backend] = json.loads(done.stdout)
    if precision == "f16":
        assert found["tensorrt"]["choices"][0]["text"] == found["reference"]["choices"][0]["text"]
    assert found["tensorrt"]["report"]["backend"] == "tensorrt"
    assert found["tensorrt"]["report"]["check"].startswith("passed")


def test_targets_that_cannot_be_built_for_say_why(model: Path, cache: Path, tmp_path: Path) -> None:
    for target, said in (("v100", "TensorRT serves sm_75 and newer"), ("h100", "does not build for sm_90")):
        out = str(tmp_path / target)
        done = command("export", str(model), "--target", target, "--format", "tensorrt", "--out", out, cache=cache)
        assert done.returncode == 2
        assert said in done.stderr
        assert not Path(out).exists()
