"""`transom bundle`: replaying, judging, and the libraries of an app.

Draws: logits whose columns are mixed at random have no correlation with those that are expected; 0.99 is asked for.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from transom import export
from transom.artifacts import Cache


@pytest.fixture(scope="module")
def made(model: Path, warm_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the processor, made once."""
    out = tmp_path_factory.mktemp("made") / "bundle"
    return export(model, target="cpu", format="reference", out=out, cache=Cache(warm_cache)).folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def test_what_a_bundle_expects_is_replayed(transom: Any, bundle: Path) -> None:
    status, out, err = transom("bundle", "verify", bundle)
    assert (status, err) == (0, "")
    assert [line.split()[:4] for line in out.splitlines()[1:]] == [["reference", "passed", "reference", "on"]]
    status, out, err = transom("bundle", "verify", bundle, "--variant", "reference", "--json")
    [found] = json.loads(out)["variants"]
    assert (found["state"], found["where"]) == ("passed", "reference on cpu")


def test_answers_that_are_others_are_a_failure(transom: Any, bundle: Path, rng: Any) -> None:
    import numpy as np

    from transom.artifacts import hash_file

    with np.load(bundle / "golden.npz") as golden:
        answers = dict(golden.items())
    answers["logits"] = rng.permuted(answers["logits"], axis=-1)
    np.savez(bundle / "golden.npz", **answers)
    path = bundle / "golden.npz"
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["golden.npz"] = {"bytes": path.stat().st_size, "blake2b": hash_file(path)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    status, out, err = transom("bundle", "verify", bundle)
    assert status == 2
    assert "failed" in out
    assert "does not give the expected outputs: reference" in err
    assert "Traceback" not in err


def test_where_nothing_can_run_it_the_way_out_is_that_of_each_variant(transom: Any, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["variants"][0]["backend"] |= {"name": "theirs", "distribution": "their-backend"}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    status, out, err = transom("bundle", "verify", bundle, "--json")
    assert status == 2
    [found] = json.loads(out)["variants"]
    assert found["state"] == "not here"
    assert "needs the backend theirs" in found["text"]
    assert "Install it with: pip install their-backend" in found["text"]
    assert "Apply the fixes in the table" in err
    assert "Traceback" not in err


def test_a_manifest_is_judged_without_its_model(transom: Any, bundle: Path) -> None:
    shutil.rmtree(bundle / "reference")
    status, out, err = transom("bundle", "judge", bundle)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].split()[:3] == ["cpu", "reference", "yes"]
    status, out, err = transom("bundle", "judge", bundle, "--device", "rtx-4090", "--json")
    [verdict] = json.loads(out)["verdicts"]
    assert (verdict["device"], verdict["fits"]) == ("remote:rtx-4090", False)
    assert verdict["reason"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["variants"][0]["memory"]["at"] = {"64": float("inf")}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    status, out, err = transom("bundle", "judge", bundle)
    assert (status, out) == (2, "")
    assert err.startswith("Error: The manifest of the bundle is damaged.")


def test_an_app_s_libraries_are_compared_with_what_is_needed(transom: Any, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "jniLibs" / "arm64-v8a"
    folder.mkdir(parents=True)
    (folder / "libsomething.so").write_text("no library")
    status, _, err = transom("bundle", "libraries", bundle, tmp_path / "jniLibs")
    assert status == 2
    assert "libsomething.so" in err
    (folder / "libsomething.so").unlink()
    here = tmp_path / "jniLibs" / "x86_64"
    here.mkdir()
    from numpy._core import _multiarray_umath

    shutil.copy(_multiarray_umath.__file__, here / "libother.so")
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["variants"][0]["libraries"] = ["libneeded.so"]
    path.write_text(json.dumps(manifest))
    status, _, err = transom("bundle", "libraries", bundle, tmp_path / "jniLibs")
    assert status == 2
    assert "libneeded.so" in err


@pytest.mark.parametrize("verb", [("verify",), ("judge",), ("libraries", "x")])
def test_what_is_no_bundle_or_damaged_or_newer_is_one_sentence(
    transom: Any, bundle: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    command, *more = verb
    (tmp_path / "plain").mkdir()
    cases = {
        str(tmp_path / "plain"): "is not a bundle",
        str(tmp_path / "none"): "is not a bundle",
        str(bundle): "is of version 2, and this Transom reads version 1",
    }
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "transom_bundle": 2}))
    for folder, said in cases.items():
        status, out, err = transom("bundle", command, folder, *more)
        assert (status, out) == (2, "")
        assert said in err
        assert "Traceback" not in err


def test_a_variant_that_is_not_there_is_named(transom: Any, bundle: Path) -> None:
    status, _, err = transom("bundle", "verify", bundle, "--variant", "qnn")
    assert status == 2
    assert "has no variant 'qnn'" in err
    assert "It has reference" in err
