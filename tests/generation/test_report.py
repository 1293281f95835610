"""The report states what runs the model and why, human-readable and machine-readable."""

from __future__ import annotations

import json

from fakes import CPU

from transom.contract import Device, Refusal
from transom.generation.report import Report, answer_line
from transom.generation.results import Choice, Generation, Timings, Usage

REPORT = Report(
    model="SmolLM2",
    backend="openvino_cpu",
    backend_version="0.1",
    device=Device("cpu", "cpu", "x86_64", 2**34, name="Xeon", features=frozenset({"avx2", "amx"}), drivers={"a": "1"}),
    why="AVX2, OpenVINO 2026.2.",
    source="gguf",
    precision="int4 weights, f32",
    context=4096,
    model_context=8192,
    warnings=("an NVIDIA GPU is there, its backend is not",),
    refusals=(("cuda_triton", Refusal("cuda:0", "missing_dep", "needs triton", "pip install triton")),),
    notes=("12 tensors dequantized",),
    memory={"weights": 90 * 2**20, "cache": 2**30, "workspace": 0, "available": 8 * 2**30},
    check="agrees with the reference",
    cache_hit=True,
    startup={"probe": 0.02, "load": 0.4},
)


def test_everything_a_person_asks_is_in_the_text() -> None:
    text = str(REPORT)
    for said in (
        "SmolLM2 on cpu (Xeon), by openvino_cpu 0.1",
        "AVX2, OpenVINO 2026.2",
        "4096 tokens of the 8192 it was made for",
        "weights 90.0 MiB, cache 1.0 GiB; 8.0 GiB available",
        "from the cache",
        "0.42 s (probe 0.02, load 0.40)",
        "warning:    an NVIDIA GPU is there",
        "note:       12 tensors dequantized",
        "cuda_triton on cuda:0: needs triton (pip install triton)",
    ):
        assert said in text


def test_a_report_of_little_says_little() -> None:
    assert str(Report("m", "reference", CPU, "")) == "m on cpu (Test CPU), by reference\n  artifact:   compiled now"


def test_the_dictionary_is_json_and_holds_every_field() -> None:
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert set(data) == set(Report.__dataclass_fields__)
    assert data["device"]["features"] == ["amx", "avx2"]
    assert data["refusals"][0]["fix"] == "pip install triton"


def test_the_line_after_an_answer_says_device_backend_why_and_speed() -> None:
    choice = Choice(0, "x", (1, 2), "stop")
    generation = Generation((choice,), Usage(10, 2), Timings(0.0, 0.123, 100.0, 85.31, 0.2))
    assert answer_line(REPORT, generation) == ("cpu · openvino_cpu · 123 ms to first token · 85 tokens/s")
