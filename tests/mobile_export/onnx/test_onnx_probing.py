"""Who is offered a portable decoder, and where one may be opened."""

from __future__ import annotations

import subprocess
import sys

import pytest
from onnx_making import BACKEND, CPU

from transom.contract import AppBackend, Artifact, Backend, Device, Offer, Refusal
from transom_mobile_export.onnx import probing

PHONE = Device("remote", "remote:snapdragon-8-gen-2", "hexagon_v73", 0)
BOARD = Device("remote", "remote:board", "aarch64", 0)
CARD = Device("cuda", "cuda:0", "sm_89", 24 << 30)
FAR_CARD = Device("remote", "remote:rtx-4090", "sm_89", 24 << 30)


def test_it_is_a_backend_for_apps() -> None:
    assert isinstance(BACKEND, Backend)
    assert isinstance(BACKEND, AppBackend)


def test_phones_and_boards_are_compiled_for_and_the_cpu_runs_for_who_asks() -> None:
    phone, board, cpu, card, far = BACKEND.probe([PHONE, BOARD, CPU, CARD, FAR_CARD])
    for offer in (phone, board):
        assert isinstance(offer, Offer)
        assert (offer.band, offer.runs_here) == ("generic", False)
    assert isinstance(cpu, Offer)
    assert (cpu.band, cpu.runs_here, cpu.by_name) == ("generic", True, True)
    for refusal in (card, far):
        assert isinstance(refusal, Refusal)
        assert refusal.code == "wrong_device"


@pytest.mark.parametrize(
    ("version", "code"), [(None, "missing_dep"), ("1.23.2", "too_old"), ("1.24.0", ""), ("2.0", "")]
)
def test_the_cpu_needs_onnx_runtime_and_phones_need_nothing_here(
    version: str | None, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "installed_version", lambda package: version)
    phone, cpu = BACKEND.probe([PHONE, CPU])
    assert isinstance(phone, Offer)
    if not code:
        assert isinstance(cpu, Offer)
        return
    assert isinstance(cpu, Refusal)
    assert cpu.code == code
    assert "pip install 'transom[onnx]'" in cpu.fix


@pytest.mark.parametrize(("format_", "device", "state"), [
    ("1", CPU, "ok"), ("1", PHONE, "ok"), ("1", BOARD, "ok"), ("1", CARD, "never"), ("2", CPU, "rebuild"),
])  # fmt: skip
def test_an_artifact_needs_a_cpu_and_this_format(format_: str, device: Device, state: str) -> None:
    requires = {"onnx_decoder": format_, "context": "512"}
    assert BACKEND.check(Artifact({}, requires), device).state == state


def test_probing_imports_no_runtime() -> None:
    code = (
        "import sys; from transom_mobile_export.onnx.backend import OnnxDecoder; OnnxDecoder().probe([]); "
        "print([m for m in sys.modules if m.split('.')[0] in ('onnxruntime', 'onnx', 'onnx_ir', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
