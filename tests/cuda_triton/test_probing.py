"""What the backend says of devices: made-up cards, and made-up installations of torch and triton."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cards import A100

from transom.contract import Artifact, Device, Offer, Refusal
from transom.hardware.catalogue import catalogue
from transom_cuda_triton import CudaTriton, probing
from transom_cuda_triton.probing import Torch

TORCH, TRITON = Torch("2.10.0", "12.8"), "3.6.0"


def card(arch: int, **changes: Any) -> Device:
    return replace(A100, arch=f"sm_{arch}", **changes)


@pytest.mark.parametrize("arch", probing.ARCHITECTURES)
def test_cards_with_kernels_are_offered(arch: int) -> None:
    """RTX cards behind TensorRT, where that is installed."""
    offer = probing.answer(card(arch), TORCH, TRITON)
    assert isinstance(offer, Offer)
    assert offer.band == ("native" if arch in (86, 89) else "tuned")
    assert offer.runs_here
    assert f"sm_{arch}" in offer.why
    assert TRITON in offer.why
    assert ("without tensor cores" in offer.why) == (arch == 70)


@pytest.mark.parametrize("arch", [61, 75, 100, 120])
def test_other_cards_are_refused_with_what_there_is(arch: int) -> None:
    refusal = probing.answer(card(arch), TORCH, TRITON)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "missing_feature"
    assert f"sm_{arch}" in refusal.reason
    assert "sm_70, sm_80, sm_86, sm_89, sm_90" in refusal.reason


@pytest.mark.parametrize(
    ("device", "torch", "triton", "code", "reason", "fix"),
    [
        (card(80), TORCH, None, "missing_dep", "triton is not installed", "pip install 'transom[cuda]'"),
        (card(70), TORCH, None, "missing_dep", "triton is not installed", "pip install 'transom[v100]'"),
        (card(80), TORCH, "3.4.0", "too_old", "triton 3.4.0", "-U"),
        (card(80), None, TRITON, "missing_dep", "torch is not installed", "pip install 'transom[cuda]'"),
        (card(80), Torch("2.5.1", "12.4"), TRITON, "too_old", "torch 2.5.1", "-U"),
        (card(80), Torch("2.13.0+cpu", ""), TRITON, "missing_dep", "without CUDA", "pip uninstall torch"),
        (card(70), Torch("2.13.0", "12.8"), TRITON, "missing_dep", "no code for sm_70", "transom[v100]"),
        (card(70), Torch("2.10.0", "13.0"), TRITON, "missing_dep", "no code for sm_70", "transom[v100]"),
        (card(80), Torch("2.13.0", "13.0"), TRITON, "too_old", "driver for CUDA 13.0", "CUDA 12"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_fix(
    device: Device, torch: Torch | None, triton: str | None, code: str, reason: str, fix: str
) -> None:
    refusal = probing.answer(device, torch, triton)
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
    assert reason in refusal.reason
    assert fix in refusal.fix


def test_a_newer_minor_release_of_cuda_needs_no_newer_driver() -> None:
    assert isinstance(probing.answer(card(80, drivers={"cuda": "12.2"}), TORCH, TRITON), Offer)


@pytest.mark.parametrize("kind", ["cpu", "npu", "gpu"])
def test_other_kinds_of_devices_are_refused(kind: Any) -> None:
    refusal = probing.answer(Device(kind, kind, "x86_64", 1 << 30), TORCH, TRITON)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "wrong_device"


def test_cards_that_are_not_here_are_compiled_for() -> None:
    """Without torch: compiling ahead of time needs triton alone."""
    for device in catalogue():
        answer = probing.answer(device, None, TRITON)
        known = probing.architecture(device) in probing.ARCHITECTURES
        assert isinstance(answer, Offer if known else Refusal), device.id
        assert isinstance(answer, Refusal) or not answer.runs_here


def test_in_the_interpreter_kernels_run_on_the_cpu_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cpu = Device("cpu", "cpu", "x86_64", 1 << 30)
    offer, refusal = probing.answer(cpu, TORCH, TRITON), probing.answer(A100, TORCH, TRITON)
    assert isinstance(offer, Offer)
    assert offer.band == "fallback"
    assert isinstance(refusal, Refusal)
    assert "Unset TRITON_INTERPRET" in refusal.fix
    for torch, triton in ((None, TRITON), (TORCH, None)):
        assert isinstance(probing.answer(cpu, torch, triton), Refusal)


def test_cuda_of_torch_is_read_from_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the installed torch as torch itself says; and of one with CUDA, made up."""
    code = "import torch; print(torch.version.cuda or '')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    probing.installed_torch.cache_clear()
    found = probing.installed_torch()
    assert found is not None
    assert found.cuda == said.stdout.strip()

    class Made:
        version = "2.10.0+cu128"

        def locate_file(self, name: str) -> Path:
            (tmp_path / "version.py").write_text(
                "__version__ = '2.10.0+cu128'\ncuda: Optional[str] = '12.8'\nhip = None\n"
            )
            return tmp_path / "version.py"

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Made())
    probing.installed_torch.cache_clear()
    assert probing.installed_torch() == Torch("2.10.0+cu128", "12.8")
    probing.installed_torch.cache_clear()


def test_probing_and_checking_import_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from transom.contract import Artifact, Device; from transom_cuda_triton import CudaTriton; "
        "b = CudaTriton(); d = Device('cuda', 'cuda:0', 'sm_80', 1); b.probe([d]); b.check(Artifact({}, {}), d); "
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "triton", "numpy", "onnx", "onnx_ir"} & set(done.stdout.split())


def test_a_foreign_or_stale_artifact_is_rebuilt() -> None:
    backend = CudaTriton()
    requires = probing.requirements(A100)
    assert backend.check(Artifact({}, requires), A100).state == "ok"
    for key in requires:
        verdict = backend.check(Artifact({}, {**requires, key: "other"}), A100)
        assert verdict.state == "rebuild"
        assert key in verdict.reason
        missing = {k: v for k, v in requires.items() if k != key}
        assert backend.check(Artifact({}, missing), A100).state == "rebuild"
    assert backend.check(Artifact({}, requires), card(90)).state == "rebuild", "a cubin for another card"
    assert backend.check(Artifact({}, {**requires, "context": "64"}), A100).state == "ok", "the host's to judge"
