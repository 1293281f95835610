"""Which devices the backend takes, and which artifacts it opens where: all of it from made-up records."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from qnn_models import CPU, PHONE

from transom.contract import Device, Offer, Refusal
from transom.errors import OptionError
from transom.hardware.catalogue import catalogue
from transom_mobile_export.qnn import probing
from transom_mobile_export.qnn.precision import resolve
from transom_mobile_export.qnn.probing import answer, judge, libraries

PACKAGES = {"machine": "x86_64", "onnxruntime-qnn": "2.7.0", "onnxruntime": "1.32.0"}
REQUIRES = {
    "format": probing.FORMAT, "soc_model": "43", "htp_arch": "73", "qnn": "2.7.0", "qnn_sdk": "2.51.0",
    "context": "1024", "weights": "shared",
}  # fmt: skip


def phone(soc_model: str, htp_arch: str, version: int) -> Device:
    return replace(
        PHONE, arch=f"hexagon_v{version}", drivers={"soc_model": soc_model, "htp_arch": htp_arch}
    )  # fmt: skip


def test_a_phone_is_compiled_for_and_the_emulator_asked_by_name() -> None:
    offer = answer(PHONE, PACKAGES)
    assert isinstance(offer, Offer)
    assert (offer.band, offer.runs_here) == ("tuned", False)
    emulator = answer(CPU, PACKAGES)
    assert isinstance(emulator, Offer)
    assert (emulator.band, emulator.by_name, emulator.runs_here) == ("fallback", True, True)
    assert "emulator" in emulator.why
    assert "2.7.0" in emulator.why
    assert "1.32.0" in emulator.why


def test_every_snapdragon_of_the_catalogue_is_known() -> None:
    phones = [device for device in catalogue() if device.arch.startswith("hexagon_")]
    assert phones
    for device in phones:
        assert isinstance(answer(device, PACKAGES), Offer), device.id


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (
            phone("43", "75", 75),
            ["soc_model 43 is SM8550, whose HTP is v73", "v75"],
        ),  # QNN compiles it and says nothing
        (phone("43", "75", 73), ["v75"]),
        (phone("43", "73", 75), ["v73", "hexagon_v75"]),
        (phone("57", "73", 73), ["SM8650", "v75"]),
        (phone("30", "68", 68), ["v68", "v69 and newer"]),
        (phone("999", "73", 73), ["soc_model 999 is not known", "43 (SM8550)"]),
        (phone("", "73", 73), ["soc_model and htp_arch"]),
        (phone("43", "7³", 73), ["soc_model and htp_arch"]),
        (Device("cuda", "cuda:0", "sm_89", 1 << 30), ["HTP of Snapdragon"]),
        (replace(CPU, arch="aarch64"), ["x86_64"]),
    ],
)
def test_what_is_no_chip_is_refused_by_name(device: Device, words: list[str]) -> None:
    refusal = answer(device, PACKAGES)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "wrong_device"
    for word in words:
        assert word in refusal.reason


def test_missing_and_old_packages_are_named() -> None:
    for package in ("onnxruntime", "onnxruntime-qnn"):
        for device in (PHONE, CPU):
            refusal = answer(device, {k: v for k, v in PACKAGES.items() if k != package})
            assert isinstance(refusal, Refusal)
            assert (refusal.code, refusal.fix) == ("missing_dep", "pip install 'transom[qnn]'")
            assert f"package {package} " in refusal.reason
    old = answer(PHONE, PACKAGES | {"onnxruntime-qnn": "2.6.1"})
    assert isinstance(old, Refusal)
    assert (old.code, "2.7" in old.reason) == ("too_old", True)
    arm = answer(PHONE, PACKAGES | {"machine": "aarch64"})
    assert isinstance(arm, Refusal)
    assert "x86-64" in arm.reason


def test_an_artifact_opens_on_its_chip() -> None:
    assert judge(REQUIRES, PHONE, PACKAGES).state == "ok"
    assert judge(REQUIRES | {"weights": "apart"}, PHONE, PACKAGES).state == "ok"
    assert judge(REQUIRES, PHONE, {}).state == "ok"  # judged for a phone, on a machine without QNN
    other = judge(REQUIRES, phone("57", "75", 75), PACKAGES)
    assert other.state == "rebuild"
    assert "43" in other.reason
    assert "57" in other.reason


def test_the_emulator_opens_what_shares_no_weights() -> None:
    assert judge(REQUIRES | {"weights": "apart"}, CPU, PACKAGES).state == "ok"
    shared = judge(REQUIRES, CPU, PACKAGES)
    assert (shared.state, "share" in shared.reason) == ("never", True)
    assert judge(REQUIRES | {"weights": "apart"}, CPU, {"machine": "x86_64"}).state == "never"


@pytest.mark.parametrize(
    "change",
    [
        {"soc_model": "57"}, {"soc_model": "4³"}, {"htp_arch": "75"}, {"format": "0"}, {"qnn": "99.0"}, {"qnn": ""},
        {"qnn": "9" * 5000}, {"qnn_sdk": ""}, {"qnn_sdk": "2.51.x"},
    ],
    ids=lambda change: str(change)[:30],
)  # fmt: skip
def test_what_was_changed_is_built_anew(change: dict[str, str]) -> None:
    for device in (PHONE, CPU):
        verdict = judge(REQUIRES | {"weights": "apart"} | change, device, PACKAGES)
        assert verdict.state == "rebuild", (device, change)
        assert verdict.reason


def test_graphs_share_their_weights_from_v73_on() -> None:
    """Older chips do not have it, and the emulator dies of it."""
    for device, together in (
        (phone("36", "69", 69), False),
        (PHONE, True),
        (phone("87", "81", 81), True),
        (CPU, False),
    ):
        assert probing.shares(device) == together


def test_libraries_are_those_of_the_version() -> None:
    assert "libQnnHtpV75Skel.so" in libraries(75)
    assert "libQnnHtpV75Stub.so" in libraries(75)


def test_probing_imports_no_sdk() -> None:
    code = (
        "import sys; from transom_mobile_export.qnn.backend import Qnn;"
        "from transom.hardware.catalogue import catalogue;"
        "Qnn().probe(catalogue()); print([m for m in sys.modules if m.startswith(('onnxruntime', 'onnx', 'torch'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_before_v73_nothing_is_rounded_since_attention_would_be_wrong_without_a_word() -> None:
    for htp_arch, weights in ((69, "float16"), (73, "int8"), (81, "int8")):
        assert resolve({"precision": "auto"}, htp_arch).weights == weights
    for asked in ("int8", "int4"):
        with pytest.raises(OptionError, match="Hexagon v69 silently computes wrongly"):
            resolve({"precision": asked}, 69)
        assert resolve({"precision": asked}, 75).weights == asked
