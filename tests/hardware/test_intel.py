"""Intel GPUs and NPUs: nothing is asked without a hint, and a made-up OpenVINO is asked in a child process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from transom.contract import Device
from transom.hardware import intel

FAKE_OPENVINO = """
import os, pathlib
__version__ = "9.9"

class Core:
    available_devices = ["CPU", "GPU.0", "GPU.1", "NPU"]
    table = {
        "GPU.0": {"FULL_DEVICE_NAME": "Intel(R) Iris(R) Xe Graphics (iGPU)", "DEVICE_TYPE": "Type.INTEGRATED",
                  "DEVICE_ARCHITECTURE": "GPU: vendor=0x8086 arch=v12.3.0", "GPU_DEVICE_TOTAL_MEM_SIZE": 30 << 30,
                  "OPTIMIZATION_CAPABILITIES": ["FP32", "FP16", "INT8"]},
        "GPU.1": {"FULL_DEVICE_NAME": "Intel(R) Arc(TM) B580 Graphics (dGPU)", "DEVICE_TYPE": "Type.DISCRETE",
                  "DEVICE_ARCHITECTURE": "GPU: vendor=0x8086 arch=v20.1.0", "GPU_DEVICE_TOTAL_MEM_SIZE": 12 << 30,
                  "OPTIMIZATION_CAPABILITIES": ["FP16", "INT8", "GPU_HW_MATMUL"], "DEVICE_UUID": "b5-80"},
        "NPU": {"FULL_DEVICE_NAME": "Intel(R) AI Boost", "DEVICE_ARCHITECTURE": "3720",
                "OPTIMIZATION_CAPABILITIES": ["FP16", "INT8"], "NPU_DRIVER_VERSION": 17},
    }
    def __init__(self):
        with open(os.environ["ASKED"], "a") as log:
            log.write("x")
        if os.environ.get("CRASH"):
            os.abort()
    def get_property(self, device, name):
        try:
            return self.table[device][name]
        except KeyError:
            raise RuntimeError("no such property") from None
"""

LAPTOP = {
    "sys/class/drm/renderD128/device/vendor": "0x8086\n",
    "sys/class/drm/renderD128/device/device": "0x7d55\n",
    "sys/class/accel/accel0/device/vendor": "0x8086\n",
    "sys/class/accel/accel0/device/device": "0x7d1d\n",
}


@pytest.fixture
def openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up OpenVINO in front of any real one; the file returned grows by a letter each time it is asked."""
    package = tmp_path / "site" / "openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_OPENVINO)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return tmp_path / "asked"


def probe(host: Device, root: Path, version: str = "9.9") -> tuple[list[Device], list[str]]:
    return intel.probe_intel(host, root=root, version=version, may_open=lambda node: True)


def test_without_a_hint_nothing_is_asked(host: Device, machine: Any) -> None:
    root = machine({"sys/class/drm/renderD128/device/vendor": "0x10de\n", "sys/class/drm/card0/x": ""})
    assert intel.probe_intel(host, root=root, query=lambda: pytest.fail("asked without a hint")) == ([], [])


def test_a_laptop_with_two_gpus_and_an_npu(host: Device, machine: Any, openvino: Path) -> None:
    devices, notes = probe(host, machine(LAPTOP))
    assert notes == []
    integrated, discrete, npu = devices
    assert (integrated.kind, integrated.id, integrated.arch) == ("gpu", "gpu:0", "intel_gpu_v12.3.0")
    assert integrated.integrated
    assert integrated.free_bytes == host.free_bytes
    assert (discrete.id, discrete.integrated, discrete.memory_bytes) == ("gpu:1", False, 12 << 30)
    assert discrete.free_bytes is None
    assert discrete.identity == "b5-80 Intel(R) Arc(TM) B580 Graphics (dGPU)"
    assert "gpu_hw_matmul" in discrete.features
    assert discrete.drivers["openvino_device"] == "GPU.1"
    assert (npu.kind, npu.id, npu.arch, npu.integrated) == ("npu", "npu:0", "intel_npu_3720", True)
    assert npu.memory_bytes == host.memory_bytes
    assert npu.drivers["driver"] == "17"


def test_the_answer_is_kept_until_the_version_or_the_hardware_changes(
    host: Device, machine: Any, openvino: Path
) -> None:
    root = machine(LAPTOP)
    first = probe(host, root)
    assert probe(host, root) == first
    assert openvino.read_text() == "x"
    probe(host, root, version="10.0")
    assert openvino.read_text() == "xx"
    probe(host, machine({"sys/class/drm/renderD128/device/device": "0x1234\n"}), version="10.0")
    assert openvino.read_text() == "xxx"


def test_an_answer_that_lacks_what_the_kernel_shows_is_not_kept_and_says_which_driver_is_missing(
    host: Device, machine: Any, openvino: Path, tmp_path: Path
) -> None:
    module = tmp_path / "site" / "openvino" / "__init__.py"
    module.write_text(FAKE_OPENVINO.replace(', "NPU"]', "]"))
    root = machine(LAPTOP)
    devices, notes = probe(host, root)
    assert [device.kind for device in devices] == ["gpu", "gpu"]
    assert len(notes) == 1
    assert "intel-driver-compiler-npu" in notes[0]
    module.write_text(FAKE_OPENVINO)
    assert [device.kind for device in probe(host, root)[0]] == ["gpu", "gpu", "npu"]


@pytest.mark.parametrize("kept", ["", "{", "[]", '{"key": 1}', '{"key": [], "answer": [1]}'])
def test_a_kept_answer_that_is_damaged_is_asked_again(
    kept: str, host: Device, machine: Any, openvino: Path, tmp_path: Path
) -> None:
    root = machine(LAPTOP)
    probe(host, root)
    [file] = (tmp_path / "cache" / "remembered").iterdir()
    key = json.loads(file.read_text())["key"]
    file.write_text(kept.replace("[]", json.dumps(key), 1) if "answer" in kept else kept)
    assert len(probe(host, root)[0]) == 3
    assert openvino.read_text() == "xx"


def test_a_driver_that_kills_the_process_is_a_note_and_the_host_lives(
    host: Device, machine: Any, openvino: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRASH", "1")
    devices, notes = probe(host, machine(LAPTOP))
    assert devices == []
    assert len(notes) == 1
    assert "died" in notes[0]


def test_an_openvino_that_cannot_be_imported_is_a_note(
    host: Device, machine: Any, openvino: Path, tmp_path: Path
) -> None:
    (tmp_path / "site" / "openvino" / "__init__.py").write_text("raise ImportError('libtbb.so.12 is missing')")
    devices, notes = probe(host, machine(LAPTOP))
    assert devices == []
    assert "libtbb.so.12 is missing" in notes[0]


def test_hardware_without_openvino_names_the_command(
    host: Device, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intel, "_openvino_version", lambda: "")
    devices, notes = intel.probe_intel(host, root=machine(LAPTOP), may_open=lambda node: True)
    assert devices == []
    assert notes == ["An Intel GPU and NPU may be here; to use it: pip install 'transom[openvino]'"]


def test_a_device_file_that_may_not_be_opened_names_the_group(host: Device, machine: Any) -> None:
    root = machine(LAPTOP)
    _, notes = intel.probe_intel(host, root=root, version="9.9", query=list, may_open=lambda node: "accel" in node)
    assert "usermod -aG render" in notes[0]
    assert "renderD128" in notes[0]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    host: Device, machine: Any, openvino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TRANSOM_CACHE", os.fspath(blocked / "below"))
    assert len(probe(host, machine(LAPTOP))[0]) == 3
