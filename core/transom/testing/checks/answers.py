"""Checks of a backend's answers before anything is compiled: its name, probe, claim and check."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args, get_type_hints

import onnx_ir as ir

from transom.contract import API_VERSION, Backend, Device, Offer, Refusal
from transom.graph import Graph, GraphBuilder
from transom.testing.bench import Bench
from transom.testing.checks.check import Check, attempt
from transom.testing.child import in_child
from transom.testing.models import VARIANTS
from transom.testing.result import CaseResult, Failed

PROBE_BUDGET_MS = 50.0
SDKS = frozenset(
    {"torch", "triton", "tensorrt", "tensorrt_rtx", "openvino", "openvino_genai", "onnxruntime", "jax", "jaxlib"}
    | {"tensorflow", "mlx", "tinygrad", "executorch", "coremltools", "qai_hub", "tvm", "iree", "cupy", "numba", "nncf"}
    | {"paddle", "torch_xla", "habana_frameworks", "ttnn", "neuronxcc", "ctranslate2", "llama_cpp"}
)
MACHINES = (
    Device("cpu", "cpu", "x86_64", 8 << 30, features=frozenset({"avx2"}), name="Old Xeon", cores=4),
    Device("cpu", "cpu", "aarch64", 0, name="unknown"),
    Device("cuda", "cuda:0", "sm_70", 16 << 30, name="Tesla V100", drivers={"cuda": "12.8", "nvidia": "570.86"}),
    Device("cuda", "cuda:1", "sm_90", 80 << 30, name="H100", features=frozenset({"fp8"}), peers=frozenset({"cuda:0"})),
    Device("gpu", "gpu:0", "xe", 16 << 30, integrated=True, name="Intel Iris Xe"),
    Device("npu", "npu:0", "npu4", 0, name="Intel AI Boost"),
    Device("remote", "remote:snapdragon-8-gen-2", "hexagon_v73", 0, name="Snapdragon 8 Gen 2"),
)
"""Made-up devices. A probe judges device records, so it must answer for any device."""


def backend_keeps_its_form(bench: Bench) -> None:
    """The backend has the five methods, a valid name, and an API version that this host supports."""
    backend = bench.backend
    if not isinstance(backend, Backend):
        missing = [m for m in ("name", "api", "probe", "claim", "compile", "check", "load") if not hasattr(backend, m)]
        raise Failed(f"the backend lacks {', '.join(missing)}")
    if not isinstance(backend.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", backend.name):
        raise Failed(f"the name {backend.name!r} is not a short identifier in lower case")
    api = backend.api
    if not isinstance(api, tuple) or len(api) != 2 or not all(isinstance(n, int) for n in api):
        raise Failed(f"api is {api!r}, not a pair of numbers")
    if api[0] != API_VERSION[0] or api[1] > API_VERSION[1]:
        raise Failed(f"written for API {api[0]}.{api[1]}; this host has {API_VERSION[0]}.{API_VERSION[1]}")


def probe_answers_for_every_device(bench: Bench) -> None:
    """probe returns exactly one offer or refusal for each device, with a text, and nothing for no devices."""
    if list(bench.backend.probe([])):
        raise Failed("probe([]) must return no answers")
    for devices in ([bench.device], *([d] for d in MACHINES), list(MACHINES[1:])):
        answers = list(bench.backend.probe(devices))
        judged = sorted(a.device_id for a in answers)
        if judged != sorted(d.id for d in devices):
            raise Failed(f"probe was called with {', '.join(d.id for d in devices)} and answered for {judged}")
        for answer in answers:
            _check_answer(answer)
    bench.offer()


def _check_answer(answer: object) -> None:
    if isinstance(answer, Offer):
        bands = get_args(get_type_hints(Offer)["band"])
        if answer.band not in bands:
            raise Failed(f"the offer for {answer.device_id} has the band {answer.band!r}; known: {', '.join(bands)}")
        if not answer.why.strip():
            raise Failed(f"the offer for {answer.device_id} has an empty why")
    elif isinstance(answer, Refusal):
        codes = get_args(get_type_hints(Refusal)["code"])
        if answer.code not in codes:
            raise Failed(f"the refusal of {answer.device_id} has the code {answer.code!r}; known: {', '.join(codes)}")
        if not answer.reason.strip():
            raise Failed(f"{answer.device_id} is refused without a reason")
    else:
        raise Failed(f"probe returned {answer!r:.60}, neither Offer nor Refusal")


def probe_is_cheap(bench: Bench) -> None:
    """In a fresh process, importing the plugin and probing loads no vendor SDK, and a probe takes under 50 ms."""
    answer = in_child(bench, "probe", {"devices": [bench.device, *MACHINES]})
    heavy = sorted(SDKS & set(answer["modules"]))
    if heavy:
        raise Failed(f"importing the plugin and probing imported {', '.join(heavy)}; import it in compile and load")
    if answer["milliseconds"] > PROBE_BUDGET_MS:  # the fastest of several, so that a busy machine does not matter
        raise Failed(f"probe took {answer['milliseconds']:.0f} ms at best; the contract allows {PROBE_BUDGET_MS:.0f}")


def claim_answers_for_every_node(bench: Bench) -> list[CaseResult]:
    """claim returns one claim for each node of any graph, with a reason for each refusal, and changes nothing."""
    bench.offer()

    def ask(graph: Graph) -> None:
        before = graph.digest()
        first = bench.claim(graph)
        if graph.digest() != before:
            raise Failed("claim changed the graph")
        if bench.claim(graph) != first:
            raise Failed("claim answers differently the second time")

    def cases() -> Iterator[CaseResult]:
        for variant in VARIANTS:
            part = attempt(variant, lambda variant=variant: ask(bench.graph(variant)))  # type: ignore[misc]
            assert isinstance(part, CaseResult)
            yield part

    return list(cases())


def claim_refuses_what_nobody_knows(bench: Bench) -> None:
    """An operator of an unknown domain is refused with a reason, because a claim is a promise to compute."""
    bench.offer()
    b = GraphBuilder("unknown")
    x = b.input("x", "float32", ["n", 4])
    b.graph.opset_imports["nobody.knows"] = 1
    node = ir.Node("nobody.knows", "Riddle", [x], name="riddle", num_outputs=1)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", ir.TensorType(ir.DataType.FLOAT), x.shape
    b.graph.append(node)
    b.graph.outputs.append(node.outputs[0])
    graph = b.finish(weights_hash="none")
    if bench.claim(graph)[0].ok:
        raise Failed("the unknown operator nobody.knows::Riddle is claimed")


def check_survives_any_device(bench: Bench) -> None:
    """check returns a valid verdict for any device and never raises."""
    artifact = bench.model("gqa").artifact
    for device in (*MACHINES, replace(bench.device, drivers={}, features=frozenset())):
        verdict = bench.backend.check(artifact, device)
        if verdict.state not in ("ok", "slower", "rebuild", "never"):
            raise Failed(f"check on {device.id} returned the state {verdict.state!r}")
        if verdict.state != "ok" and not verdict.reason.strip():
            raise Failed(f"check on {device.id} says {verdict.state} without a reason")


def checks() -> list[Check]:
    return [
        Check("contract.form", backend_keeps_its_form),
        Check("probe.answers", probe_answers_for_every_device),
        Check("probe.cheap", probe_is_cheap),
        Check("claim.every_node", claim_answers_for_every_node),
        Check("claim.unknown_operator", claim_refuses_what_nobody_knows),
        Check("check.any_device", check_survives_any_device),
    ]
