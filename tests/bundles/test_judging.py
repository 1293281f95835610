"""Which devices can run a variant, decided from the manifest alone.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from transom.bundles.judging import judge
from transom.bundles.manifest import VERSION, BundleError, Variant
from transom.contract import Device
from transom.hardware.catalogue import catalogue
from transom.hardware.probe_file import to_json

TARGETS = {device.id.removeprefix("remote:"): device for device in catalogue()}
PHONE = TARGETS["snapdragon-8-gen-2"]
CPU = Device("cpu", "cpu", "x86_64", 8 << 30, free_bytes=4 << 30, name="Xeon")
WEIGHTS, PER_TOKEN = 1_000_000_000, 100_000


def variant(backend: str, target: Device, **requires: str) -> dict[str, Any]:
    """As it stands in a manifest, written by the same code."""
    memory = {"weights": WEIGHTS, "workspace": 0, "cache_per_token": PER_TOKEN}
    made = Variant(
        name=f"{backend}-{target.id.removeprefix('remote:')}",
        backend=backend,
        backend_version="1",
        distribution="transom",
        target=target,
        requires=requires,
        precision="",
        exact=True,
        divergence=None,
        notes=(),
        decomposed=(),
        context=4096,
        memory=memory,
        fidelity=None,
        libraries=(),
        files={},
    )
    written: dict[str, Any] = json.loads(json.dumps(made.to_json()))
    return written


def bundle(*variants: dict[str, Any]) -> dict[str, Any]:
    return {"transom_bundle": VERSION, "variants": list(variants)}


QNN = variant("qnn", PHONE, soc_model="43", htp_arch="73")
ONNX = variant("onnx", TARGETS["android-arm64"])


def test_a_phone_takes_what_was_made_for_its_chip_and_what_runs_on_its_processor() -> None:
    for name, device in TARGETS.items():
        qnn, onnx = judge(bundle(QNN, ONNX), device)
        assert (qnn.name, onnx.name) == ("qnn-snapdragon-8-gen-2", "onnx-android-arm64")
        assert qnn.fits == (name == "snapdragon-8-gen-2"), name
        assert onnx.fits == name.startswith(("snapdragon", "android", "ios")), name
        assert onnx.reason.startswith("Runs on the processor of " if onnx.fits else "Runs on a processor, and "), name
    gen3 = judge(bundle(QNN), TARGETS["snapdragon-8-gen-3"])[0]
    assert "soc_model 43 and htp_arch 73; Snapdragon 8 Gen 3 (hexagon_v75) has 57 and 75" in gen3.reason
    assert "does not state which Snapdragon" in judge(bundle(QNN), CPU)[0].reason
    assert "is not one" in judge(bundle(ONNX), TARGETS["rtx-4090"])[0].reason


def test_one_number_of_the_pair_is_not_enough() -> None:
    # Snapdragon X Elite has Hexagon v73 as well
    assert not judge(bundle(QNN), TARGETS["snapdragon-x-elite"])[0].fits
    half = replace(PHONE, drivers={"soc_model": "43"})
    assert "has 43 and none" in judge(bundle(QNN), half)[0].reason


def test_other_backends_are_judged_by_the_architecture() -> None:
    made = bundle(variant("tensorrt", TARGETS["rtx-4090"]), variant("openvino_cpu", CPU))
    for name, fits in {"rtx-4090": True, "l4": True, "rtx-3090": False, "snapdragon-8-gen-2": False}.items():
        engine, processor = judge(made, TARGETS[name])
        assert engine.fits == fits, name
        assert not processor.fits
    assert judge(made, CPU)[1].fits
    assert "another architecture" in judge(made, CPU)[0].reason


def test_memory_decides_and_the_longest_context_that_fits_is_named(rng: np.random.Generator) -> None:
    contexts = [512, 1024, 2048, 4096]
    for free in [WEIGHTS, *(WEIGHTS + PER_TOKEN * c for c in contexts), *rng.integers(1, 2 * WEIGHTS, 20).tolist()]:
        longest = max((c for c in contexts if WEIGHTS + c * PER_TOKEN <= free), default=0)
        (said,) = judge(bundle(ONNX), replace(CPU, free_bytes=free))
        assert (said.fits, said.context) == (longest == 4096, longest)
        words = {4096: "are free", 0: "no context fits"}
        assert said.reason.endswith(words.get(longest, f"{longest} tokens would fit"))
        assert "Needs 1.4 GB with its context of 4096 tokens" in said.reason


def test_unknown_memory_refuses_nothing() -> None:
    assert judge(bundle(QNN), PHONE)[0].reason == "Is made for Snapdragon 8 Gen 2 (hexagon_v73)"
    assert judge(bundle(QNN), PHONE)[0].fits
    assert judge(bundle(ONNX), replace(CPU, free_bytes=None, memory_bytes=0))[0].fits
    assert not judge(bundle(ONNX), replace(CPU, free_bytes=None, memory_bytes=1 << 20))[0].fits
    assert not judge(bundle(ONNX), replace(CPU, free_bytes=0))[0].fits
    graph = {**ONNX, "context": 0, "memory": {}}
    assert judge(bundle(graph), replace(CPU, free_bytes=1))[0].fits


def test_the_verdict_uses_json_alone_and_ignores_new_keys() -> None:
    whole = bundle({**QNN, "added": 1}, ONNX) | {"added": {}}
    device = to_json([PHONE])["devices"]
    assert json.loads(json.dumps(device))[0]["drivers"]["soc_model"] == QNN["requires"]["soc_model"]
    assert [said.fits for said in judge(whole, PHONE)] == [True, True]


def test_newer_and_damaged_manifests_are_errors() -> None:
    with pytest.raises(
        BundleError, match=rf"version {VERSION + 1}, and this Transom reads version {VERSION}"
    ) as caught:
        judge({"transom_bundle": VERSION + 1, "something": "else"}, CPU)
    assert caught.value.fix == "Update it with: pip install --upgrade transom"
    for damaged in (
        {},
        {"transom_bundle": "1", "variants": []},
        {"transom_bundle": 0, "variants": []},
        {"transom_bundle": 1},
        {"transom_bundle": True, "variants": []},
        {"transom_bundle": float("inf"), "variants": []},
        bundle({**QNN, "requires": None}),
        bundle({**QNN, "target": {}}),
        bundle({**ONNX, "memory": {"at": {"many": 1}}}),
        bundle({**ONNX, "context": 4095}),
        bundle({**ONNX, "context": float("inf")}),
        bundle({**ONNX, "name": 3}),
        *(bundle({**ONNX, "memory": {"at": {"4096": n}}}) for n in (float("inf"), -1, "1", 10**400, None)),
        bundle("variant"),  # type: ignore[arg-type]
    ):
        with pytest.raises(BundleError, match="damaged"):
            judge(damaged, replace(PHONE, free_bytes=1 << 40))
