"""The backend's answers about devices and artifacts, from records and installed packages alone."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from targets import BACKEND, target

from transom.contract import Device, Offer, Refusal
from transom_tensorrt import probing, sdk
from transom_tensorrt.sdk import CLASSIC, RTX, Sdk

NEW, OLD = Sdk(RTX, "1.7.1.116", 13), Sdk(RTX, "1.3.0.35")
BIG, BIG_OLD = Sdk(CLASSIC, "10.15.1", 13), Sdk(CLASSIC, "10.3.0")
ALL = {"cuda": "13.5.0", "onnxruntime": "1.24.0"}
PACKAGE = Path(probing.__file__).parent


def here(name: str, **changes: Any) -> Device:
    """A card of the catalogue as if it were in this machine."""
    drivers = {"nvidia": "580.65", "cuda": "13.0"}
    return replace(target(name), kind="cuda", id="cuda:0", drivers=drivers, **changes)


@pytest.mark.parametrize(
    ("device", "sdks", "answer"),
    [
        (here("rtx-4090"), (NEW,), "tuned: sm_89 with FP8, tensorrt-rtx 1.7.1.116"),
        (here("rtx-4090"), (NEW, BIG), "tuned: sm_89 with FP8, tensorrt-rtx 1.7.1.116"),
        (here("rtx-4090"), (BIG,), "tuned: sm_89 with FP8, tensorrt 10.15.1"),
        (here("rtx-5090"), (NEW,), "tuned: sm_120 with FP8, tensorrt-rtx 1.7.1.116"),
        (here("rtx-3090"), (NEW,), "native: sm_86, tensorrt-rtx 1.7.1.116"),
        (here("t4"), (NEW,), "native: sm_75, tensorrt-rtx 1.7.1.116"),
        (here("a100"), (NEW,), "native: sm_80, tensorrt-rtx 1.7.1.116"),
        (here("a100"), (NEW, BIG), "native: sm_80, tensorrt 10.15.1"),
        (target("a100"), (NEW, BIG), "native: sm_80, tensorrt-rtx 1.7.1.116"),
        (here("h100"), (NEW, BIG), "native: sm_90 with FP8, tensorrt 10.15.1"),
        (here("h100"), (NEW,), "missing_dep: tensorrt-rtx does not serve sm_90, and classic TensorRT is not installed"),
        (here("h100"), (NEW, BIG_OLD), "too_old: tensorrt 10.3.0 is installed and 10.15 or newer is needed"),
        (here("rtx-4090"), (), "missing_dep: the package tensorrt-rtx is not installed"),
        (here("rtx-4090"), (OLD,), "too_old: tensorrt-rtx 1.3.0.35 is installed and 1.7 or newer is needed"),
        (here("v100"), (NEW, BIG), "wrong_device: TensorRT serves sm_75 and newer, and this is sm_70"),
        (here("b200"), (NEW, BIG), "native: sm_100 with FP8, tensorrt 10.15.1"),
        (target("rtx-4090"), (NEW,), "tuned: sm_89 with FP8, tensorrt-rtx 1.7.1.116"),
        (target("h100"), (NEW, BIG), "missing_feature: tensorrt-rtx does not build for sm_90"),
        (target("snapdragon-8-gen-2"), (NEW,), "wrong_device: runs on NVIDIA GPUs only"),
        (Device("cpu", "cpu", "x86_64", 1), (NEW,), "wrong_device: runs on NVIDIA GPUs only; cpu is a device of kind"),
    ],
)  # fmt: skip
def test_each_device_gets_its_offer_or_refusal(device: Device, sdks: tuple[Sdk, ...], answer: str) -> None:
    found = probing.answer(device, sdks, ALL)
    said = f"{found.band}: {found.why}" if isinstance(found, Offer) else f"{found.code}: {found.reason}"
    assert said.startswith(answer)
    assert found.device_id == device.id
    if isinstance(found, Offer):
        assert found.runs_here == (device.kind == "cuda")
    elif found.code in ("missing_dep", "too_old"):
        assert found.fix


def test_v100_is_pointed_to_our_own_kernels() -> None:
    found = probing.answer(here("v100"), (NEW,), ALL)
    assert isinstance(found, Refusal)
    assert "cuda_triton" in found.fix


@pytest.mark.parametrize(
    ("device", "fix"),
    [
        (target("h100"), "Use backend='cuda_triton', or build on a machine with the card"),
        (target("b200"), "Build on a machine with the card"),
        (replace(here("v100"), arch="sm_61"), ""),
        (replace(here("a100"), members=(here("a100"),) * 2), "Use backend='cuda_triton' for several cards"),
        (replace(here("b200"), members=(here("b200"),) * 2), "Name one of the cards"),
    ],
)
def test_a_refusal_names_only_kernels_that_exist(device: Device, fix: str) -> None:
    found = probing.answer(device, (NEW, BIG), ALL)
    assert isinstance(found, Refusal)
    assert found.fix == fix


def test_the_kernels_that_a_refusal_names_exist_for_that_architecture() -> None:
    from transom_cuda_triton.probing import ARCHITECTURES

    assert probing.OUR_KERNELS == ARCHITECTURES


def test_a_package_or_a_driver_that_is_missing_is_refused() -> None:
    found = probing.answer(here("rtx-4090"), (NEW,), {})
    assert isinstance(found, Refusal)
    assert (found.code, found.fix) == ("missing_dep", "pip install 'transom[tensorrt]'")
    old = replace(here("rtx-4090"), drivers={"nvidia": "470.1", "cuda": "11.4"})
    found = probing.answer(old, (Sdk(RTX, "1.7", 12),), {"cuda": "12.9.4"})
    assert isinstance(found, Refusal)
    assert found.reason == "tensorrt-rtx 1.7 needs a driver with CUDA 12, and the driver 470.1 has CUDA 11"


@pytest.mark.parametrize(
    ("made_for", "bindings", "driver", "needs"),
    [
        (13, "13.5.0", "12.8", "tensorrt-rtx 1.7 needs a driver with CUDA 13"),
        (13, "12.9.4", "12.8", "tensorrt-rtx 1.7 needs a driver with CUDA 13"),
        (12, "13.5.0", "12.8", "cuda-bindings 13.5.0 needs a driver with CUDA 13"),
        (12, "12.9.4", "12.2", ""),
        (13, "13.5.0", "13.0", ""),
        (12, "12.9.4", "13.1", ""),
        (13, "13.5.0", "", ""),
    ],
)
def test_a_driver_older_than_the_installed_package_needs_is_refused(
    made_for: int, bindings: str, driver: str, needs: str
) -> None:
    device = replace(here("rtx-4090"), drivers={"nvidia": "570.86"} | ({"cuda": driver} if driver else {}))
    found = probing.answer(device, (Sdk(RTX, "1.7", made_for),), {"cuda": bindings})
    if not needs:
        assert isinstance(found, Offer)
        return
    assert isinstance(found, Refusal)
    assert (found.code, found.fix) == ("too_old", "Update NVIDIA's driver")
    assert found.reason == f"{needs}, and the driver 570.86 has CUDA 12"


def test_several_cards_together_are_refused() -> None:
    both = replace(here("rtx-4090"), id="cuda:0,cuda:1", members=(here("rtx-4090"), here("rtx-4090")))
    found = probing.answer(both, (NEW,), ALL)
    assert isinstance(found, Refusal)
    assert "on one card" in found.reason


def test_an_engine_is_judged_by_what_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "installed", lambda: (NEW,))
    device = here("rtx-4090")
    good = probing.requirements(device) | {"context": "4096"}
    assert probing.judge(good, device).state == "ok"
    for changed, said in (
        ({"arch": "sm_86"}, "built for sm_86, and this is sm_89"),
        ({"sdk": "tensorrt-rtx 1.6.0"}, "built by tensorrt-rtx 1.6.0, and here is tensorrt-rtx 1.7.1.116"),
        ({"code": "0"}, "built by another version"),
        ({"format": "0"}, "built by another version"),
    ):
        verdict = probing.judge({**good, **changed}, device)
        assert verdict.state == "rebuild"
        assert said in verdict.reason
    assert probing.judge({}, device).reason == "built for an unknown card, and this is sm_89"
    monkeypatch.setattr(probing, "installed", lambda: ())
    assert "here is none" in probing.judge(good, device).reason


def test_emulation_needs_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Device("cpu", "cpu", "x86_64", 1)
    monkeypatch.setenv(probing.EMULATE, "1")
    found = probing.answer(cpu, (), ALL)
    assert isinstance(found, Offer)
    assert found.band == "fallback"
    refused = probing.answer(cpu, (), {"cuda": "13.5.0"})
    assert isinstance(refused, Refusal)
    assert refused.fix == "pip install onnxruntime"
    card = probing.answer(here("rtx-4090"), (NEW,), ALL)
    assert isinstance(card, Refusal)
    assert "is set" in card.reason
    assert probing.judge(probing.requirements(cpu), cpu).state == "ok"


@pytest.mark.parametrize("value", ["0", "yes", "onnxruntime", " "])
def test_a_value_of_the_variable_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(probing.EMULATE, value)
    for device in (Device("cpu", "cpu", "x86_64", 1), here("rtx-4090"), target("rtx-4090")):
        found = probing.answer(device, (NEW,), ALL)
        assert isinstance(found, Refusal)
        assert (found.code, found.device_id) == ("failed", device.id)
        assert found.reason == f"the environment variable TRANSOM_TENSORRT_EMULATE is {value!r}"
        assert found.fix == "Set TRANSOM_TENSORRT_EMULATE to 1, or do not set it"
    monkeypatch.setenv(probing.EMULATE, "")
    assert isinstance(probing.answer(here("rtx-4090"), (NEW,), ALL), Offer)


def test_the_installed_package_is_found() -> None:
    (found,) = sdk.installed()
    assert found.name == RTX
    assert not found.old


@pytest.mark.parametrize(
    ("packages", "cuda"),
    [
        (("tensorrt-rtx", "tensorrt_rtx_cu13"), 13),
        (("tensorrt-rtx", "tensorrt_rtx_cu12"), 12),
        (("tensorrt_rtx",), 12),
        (("tensorrt", "tensorrt-cu13"), 13),
        (("tensorrt", "tensorrt-cu12"), 12),
    ],
)
def test_the_cuda_version_is_read_from_the_packages_name(
    monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...], cuda: int
) -> None:
    monkeypatch.setattr(sdk, "installed_version", lambda package: "9.9" if package in packages else None)
    monkeypatch.setattr(sdk, "_has_module", lambda packages, module: True)
    (found,) = sdk.installed.__wrapped__()
    assert (found.version, found.cuda) == ("9.9", cuda)


def test_an_engine_is_built_anew_after_a_change_of_any_module_but_those_that_only_run(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert probing.digest_of(folder) == probing.code_digest.__wrapped__()
    counted = set()
    for path in folder.glob("*.py"):
        before, text = probing.digest_of(folder), path.read_bytes()
        path.write_bytes(text + b"#")
        if probing.digest_of(folder) != before:
            counted.add(path.stem)
        path.write_bytes(text)
    assert {"sparse", "compiling", "lowering", "attention", "building", "claims", "forms", "precision"} <= counted
    assert {path.stem for path in folder.glob("*.py")} - counted == {
        "__init__", "backend", "cuda", "emulating", "engine", "executing", "kernel_cache", "loading", "rtx", "session",
    }  # fmt: skip
    before = probing.digest_of(folder)
    (folder / "new").mkdir()
    (folder / "new" / "one.py").write_text("")
    assert probing.digest_of(folder) != before


def test_nothing_that_only_runs_is_imported_by_what_compiles() -> None:
    seen, left = set(), ["compiling", "claims"]
    while left:
        name = left.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
                _, _, module = str(node.module).partition(".")
                left += {module} - seen if module else {alias.name for alias in node.names} - seen
    assert "sparse" in seen
    assert not seen & probing.RUN_ONLY


def test_probing_imports_no_tensorrt() -> None:
    code = (
        "import sys; from transom.hardware.catalogue import catalogue; from transom_tensorrt import TensorRt\n"
        "TensorRt().probe(catalogue())\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('tensorrt_rtx', 'tensorrt', 'cuda', 'onnxruntime')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert BACKEND.name == "tensorrt"
