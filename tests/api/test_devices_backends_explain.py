"""The functions that inspect: `transom.devices`, `transom.backends`, `transom.explain`.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transom
from transom import hardware
from transom.contract import Device, Offer, Refusal
from transom.errors import OptionError, SourceError
from transom.testing.models import tiny_decoder

GPU = Device("cuda", "cuda:0", "sm_89", 24 << 30, name="RTX 4090", identity="gpu", drivers={"cuda": "12.8"})
CPU = Device("cpu", "cpu", "x86_64", 1 << 34, name="Xeon", identity="cpu", features=frozenset({"avx2"}))


@pytest.fixture
def probe_file(tmp_path: Path) -> Path:
    path = tmp_path / "probe.json"
    hardware.write_probe_file(path, [CPU, GPU])
    return path


def test_devices_come_from_the_probe_or_from_a_file(probe_file: Path) -> None:
    here = transom.devices()
    assert here[0].kind == "cpu"
    assert here[0].memory_bytes > 0
    assert transom.devices(probe_file) == transom.devices(str(probe_file)) == (CPU, GPU)


def test_a_probe_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"missing\.json"):
        transom.devices(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(OptionError, match=r"bad\.json"):
        transom.backends(tmp_path / "bad.json")


def test_backends_say_what_is_installed_and_what_they_offer(probe_file: Path) -> None:
    found = transom.backends(probe_file)
    reference = next(b for b in found.installed if b.name == "reference")
    assert reference.distribution == "transom"
    answers = {a.device_id: a for a in reference.answers}
    assert isinstance(answers["cpu"], Offer)
    assert isinstance(answers["cuda:0"], Refusal)
    back = json.loads(json.dumps(found.to_dict()))
    [offer, refusal] = next(b["answers"] for b in back["backends"] if b["name"] == "reference")
    assert (offer["offer"], offer["band"], refusal["offer"], refusal["code"]) == (
        True,
        "fallback",
        False,
        "wrong_device",
    )


def test_a_broken_plugin_is_reported_with_the_fix(monkeypatch: pytest.MonkeyPatch, probe_file: Path) -> None:
    from transom.loading import machine
    from transom.plugins import PluginFailure, Plugins

    failure = PluginFailure("x", "dist-x", "import", "ImportError: no", "pip uninstall dist-x", "Traceback …")
    monkeypatch.setattr(machine, "load_plugins", lambda: Plugins([], [], [failure]))
    found = transom.backends(probe_file)
    assert found.failures == (failure,)
    assert json.loads(json.dumps(found.to_dict()))["failures"][0]["fix"] == "pip uninstall dist-x"


def test_explain_takes_a_graph_or_a_file_and_says_what_each_backend_does(
    probe_file: Path, rng: np.random.Generator
) -> None:
    found = transom.explain(tiny_decoder(rng), probe_file=probe_file)
    answers: dict[Any, Any] = {(a.backend, a.device): a for a in found.answers}
    assert answers["reference", "cpu"].runs
    assert not answers["reference", "cuda:0"].runs
    one = transom.explain(tiny_decoder(rng), "cpu", probe_file=probe_file)
    assert {a.device for a in one.answers} == {"cpu"}


def test_explain_takes_a_target_that_is_not_here(probe_file: Path, rng: np.random.Generator) -> None:
    found = transom.explain(tiny_decoder(rng), "snapdragon-8-gen-2", probe_file=probe_file)
    assert {a.device for a in found.answers} == {"remote:snapdragon-8-gen-2"}


def test_explain_refuses_an_unknown_model_or_device(probe_file: Path, rng: np.random.Generator) -> None:
    with pytest.raises(SourceError):
        transom.explain("/nowhere/model.gguf", probe_file=probe_file)
    with pytest.raises(OptionError, match="cuda:7"):
        transom.explain(tiny_decoder(rng), "cuda:7", probe_file=probe_file)


def test_the_package_offers_what_it_lists_and_nothing_else() -> None:
    assert set(transom.__all__) <= set(dir(transom))
    for name in ("load", "devices", "backends", "explain", "Model", "Cancelled", "TransomError", "__version__"):
        assert getattr(transom, name)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = transom.no_such_thing


def test_importing_the_package_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, transom; print([n for n in ('numpy','onnx','onnx_ir','gguf','tokenizers','jinja2','torch','rich') if n in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
