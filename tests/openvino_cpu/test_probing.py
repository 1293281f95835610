"""Answers to made-up device records: nothing is detected and nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from transom.contract import Artifact, Device, Offer, Refusal
from transom_openvino_cpu import OpenVinoCpu, probing

GIB = 2**30
CPU = Device("cpu", "cpu", "x86_64", 16 * GIB, features=frozenset({"avx2", "avx512f", "avx512bw", "avx512_vnni"}))


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(probing, "installed_version", lambda package: "2026.4.1")
    return monkeypatch


def test_a_modern_cpu_gets_a_native_offer_that_names_its_instructions(version: pytest.MonkeyPatch) -> None:
    (answer,) = OpenVinoCpu().probe([CPU])
    assert isinstance(answer, Offer)
    assert (answer.band, answer.runs_here) == ("native", True)
    assert "avx512_vnni" in answer.why
    assert "2026.4.1" in answer.why


def test_a_cpu_without_avx2_gets_a_generic_offer_with_the_reason(version: pytest.MonkeyPatch) -> None:
    (answer,) = OpenVinoCpu().probe([replace(CPU, features=frozenset({"sse4_2"}))])
    assert isinstance(answer, Offer)
    assert answer.band == "generic"
    assert "without AVX2" in answer.why


def test_a_value_of_the_variable_that_means_nothing_is_refused(version: pytest.MonkeyPatch) -> None:
    version.setenv("TRANSOM_NATIVE", "yes")
    (answer,) = OpenVinoCpu().probe([CPU])
    assert isinstance(answer, Refusal)
    assert "TRANSOM_NATIVE is 'yes'" in answer.reason
    assert "measure" in answer.fix


def test_a_level_that_is_unknown_is_refused(version: pytest.MonkeyPatch) -> None:
    version.setenv("TRANSOM_NATIVE_LEVEL", "avx3")
    (answer,) = OpenVinoCpu().probe([CPU])
    assert isinstance(answer, Refusal)
    assert "TRANSOM_NATIVE_LEVEL is 'avx3'" in answer.reason
    assert "amx, avx512_bf16, avx512, avx_vnni, avx2, scalar" in answer.fix


@pytest.mark.parametrize("kind", ["cuda", "gpu", "npu", "remote"])
def test_any_other_device_is_the_wrong_one(kind: str, version: pytest.MonkeyPatch) -> None:
    (answer,) = OpenVinoCpu().probe([replace(CPU, kind=kind, id=f"{kind}:0")])  # type: ignore[arg-type]
    assert isinstance(answer, Refusal)
    assert (answer.code, answer.device_id) == ("wrong_device", f"{kind}:0")
    assert answer.fix


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "installed_version", lambda package: None)
    (answer,) = OpenVinoCpu().probe([CPU])
    assert isinstance(answer, Refusal)
    assert (answer.code, answer.fix) == ("missing_dep", "pip install 'transom[openvino]'")


def test_an_old_package_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "installed_version", lambda package: "2025.1.0")
    (answer,) = OpenVinoCpu().probe([CPU])
    assert isinstance(answer, Refusal)
    assert answer.code == "too_old"
    assert "2025.1.0" in answer.reason
    assert "2026.4" in answer.reason


def test_every_device_gets_one_answer_in_order(version: pytest.MonkeyPatch) -> None:
    devices = [CPU, replace(CPU, kind="cuda", id="cuda:0"), replace(CPU, id="cpu:1")]
    assert [a.device_id for a in OpenVinoCpu().probe(devices)] == ["cpu", "cuda:0", "cpu:1"]


def test_an_artifact_for_other_instructions_or_another_release_is_rebuilt(version: pytest.MonkeyPatch) -> None:
    made = Artifact({}, probing.requirements(CPU))
    assert OpenVinoCpu().check(made, CPU).state == "ok"
    newer = replace(CPU, features=CPU.features | {"avx512_bf16"})
    assert OpenVinoCpu().check(made, newer).state == "rebuild"
    version.setattr(probing, "installed_version", lambda package: "2026.5.0")
    verdict = OpenVinoCpu().check(made, CPU)
    assert verdict.state == "rebuild"
    assert "2026.5.0" in verdict.reason


def test_probing_and_checking_import_no_engine() -> None:
    code = (
        "import sys\n"
        "from transom_openvino_cpu import OpenVinoCpu, transom_backends\n"
        "from transom.contract import Artifact, Device\n"
        "d = Device('cpu', 'cpu', 'x86_64', 0)\n"
        "b = list(transom_backends())[0]\n"
        "b.probe([d]); b.check(Artifact({}, {}), d)\n"
        "heavy = {'openvino', 'onnx', 'onnx_ir', 'torch', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
