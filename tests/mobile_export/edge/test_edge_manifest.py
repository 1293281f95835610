"""The runner reads a manifest, checks files against it, and judges as Transom itself does.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_building import SOURCES
from edge_bundles import PHONE, content_hash, device_json, variant, write_bundle, write_manifest

from transom.bundles.judging import judge
from transom.contract import Device
from transom.hardware.catalogue import catalogue
from transom_mobile_export.qnn.probing import SOC_MODELS

Run = Callable[..., Any]
CPU = Device("cpu", "cpu", "x86_64", 8 << 30, name="A processor")
CARD = Device("cuda", "cuda:0", "sm_89", 8 << 30, name="A card")


@pytest.fixture
def bundle(tmp_path: Path, rng: np.random.Generator) -> Path:
    folder = tmp_path / "bundle"
    files = {"onnx/model.onnx": rng.bytes(5000), "tokenizer.json": b"{}", "shared/empty.bin": b""}
    write_bundle(folder, [variant("onnx", "onnx", {"model.onnx": "onnx/model.onnx"})], files)
    return folder


def refused(said: Any) -> str:
    assert said.returncode == 2
    assert said.stdout == ""
    text: str = said.stderr
    assert text.startswith("transom-edge: ")
    assert text.count("\n") == 1
    return text


def test_hashes_are_the_manifests(call: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    sizes = [0, 1, 127, 128, 129, 4096, int(rng.integers(1 << 20)), 1 << 20, (32 << 20) - 1, 32 << 20, (32 << 20) + 1]
    paths = []
    for size in sizes:
        paths.append(tmp_path / str(size))
        paths[-1].write_bytes(rng.bytes(size))
    assert call("hash", paths=list(map(str, paths))) == [content_hash(path.read_bytes()) for path in paths]


def test_a_whole_bundle_is_as_its_manifest_says(edge: Run, bundle: Path) -> None:
    said = edge(bundle, "--check")
    assert (said.returncode, said.stdout, said.stderr) == (0, "3 files match the manifest\n", "")


def _alter(bundle: Path) -> None:
    path = bundle / "onnx/model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _link(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_alter, "onnx/model.onnx was altered"),
        (lambda b: (b / "onnx/model.onnx").write_bytes(b"x"), "onnx/model.onnx has 1 bytes, not 5000"),
        (lambda b: (b / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda b: (b / "more.bin").write_bytes(b"x"), "more.bin is not in the manifest"),
        (_link, "tokenizer.json is a link"),
    ],
)
def test_damage_is_named(edge: Run, bundle: Path, damage: Callable[[Path], Any], named: str) -> None:
    damage(bundle)
    assert f"is damaged: {named}. Copy it again" in refused(edge(bundle, "--check"))


def test_a_newer_version_is_an_error(edge: Run, bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"transom_bundle": 2, "unheard": "of"}')
    wanted = f"The bundle {bundle} has version 2, and this program reads version 1."
    assert wanted in refused(edge(bundle, "--judge"))


def test_a_manifest_that_was_cut_anywhere_is_damaged(edge: Run, bundle: Path, rng: np.random.Generator) -> None:
    whole = (bundle / "manifest.json").read_bytes()
    for end in (0, 1, *map(int, rng.integers(2, len(whole), size=6)), len(whole) - 1):
        (bundle / "manifest.json").write_bytes(whole[:end])
        assert f"The manifest of the bundle {bundle} is damaged." in refused(edge(bundle, "--judge"))


@pytest.mark.parametrize(
    "change",
    [
        {"variants": []},
        {"variants": None},
        {"files": {"../up": {"bytes": 1, "blake2b": ""}}},
        {"files": {"/root": {"bytes": 1, "blake2b": ""}}},
        {"model": "tiny"},
        {"expected": {"tokens": [1], "best": []}},
        {"variants": [{**variant("x", "onnx", {}), "context": "many"}]},
        *({"variants": [{**variant("x", "onnx", {}), "context": count}]} for count in (-1, 1.5, 1e300, 1 << 63, True)),
        {"files": {"x": {"bytes": -1, "blake2b": ""}}},
        {"expected": {"tokens": [-1], "best": [0]}},
        {"variants": [variant("x", "onnx", {"model.onnx": "onnx/unlisted.onnx"})]},
        {"variants": [variant("x", "onnx", {}, context=5, at={4: 1})]},
        {"variants": [variant("x", "onnx", {"model.onnx": "../../model.onnx"})]},
    ],
)
def test_a_manifest_of_another_form_is_damaged(edge: Run, bundle: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    write_manifest(bundle, {**manifest, **change})
    assert "is damaged." in refused(edge(bundle, "--judge"))


def test_what_is_no_bundle(edge: Run, tmp_path: Path) -> None:
    assert "is not a folder" in refused(edge(tmp_path / "nowhere", "--judge"))
    assert "is not a bundle: it has no manifest.json" in refused(edge(tmp_path, "--judge"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--variant", "tpu", "--ids", "1", "--print-ids"], "has no variant tpu. It has: onnx."),
        (["--ids", "1,x"], '--ids is "x"'),
        (["--ids", "99999999999999999999"], "--ids is"),
        (["--ids", "3,-1", "--print-ids"], "--ids has the token id -1"),
        (["--temperature", "hot", "--judge"], '--temperature is "hot"'),
        (["--top-p", "0", "--judge"], "--top-p is 0"),
        (["--max-tokens", "0", "--judge"], "--max-tokens is below 1"),
        (["--threads", "-1", "--judge"], "--threads is below 1"),
        (["--prompt"], "--prompt has no value"),
        (["--prompt", "a", "--ids", "1"], "exclude each other"),
        (["--colour"], "--colour is not known"),
    ],
)
def test_words_that_are_wrong(edge: Run, bundle: Path, words: list[str], named: str) -> None:
    assert named in refused(edge(bundle, *words))


def test_a_backend_that_is_not_known_is_named(edge: Run, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    write_manifest(bundle, {**manifest, "variants": [variant("rtx", "tensorrt", {}, target=CPU)]})
    assert "rtx: Uses the backend tensorrt, which this program does not know" in refused(
        edge(bundle, "--ids", "1", "--print-ids")
    )
    said = edge(bundle, "--ids", "1", "--print-ids", "--variant", "rtx")
    assert "uses the backend tensorrt, which this program cannot run" in refused(said)


def test_verdicts_are_transoms_own(call: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    """Random variants on random devices: what fits, and the longest context that does."""
    phones = [device for device in catalogue() if device.arch.startswith("hexagon")]
    devices = []
    for device in (*phones, CPU, CARD, *catalogue()[:2]):
        free = [None, 0, *map(int, rng.integers(1, 4000, size=2))]
        devices += [replace(device, free_bytes=count) for count in free]
        devices.append(replace(device, memory_bytes=int(rng.integers(0, 2)) * 1500, name=""))
    variants = []
    for i in range(12):
        backend = ["onnx", "qnn", "qnn", "tensorrt"][i % 4]
        target = phones[int(rng.integers(len(phones)))] if backend != "tensorrt" else (CARD, CPU)[i % 3 % 2]
        numbers = {key: target.drivers[key] for key in ("soc_model", "htp_arch")} if backend == "qnn" else {}
        if backend == "qnn" and i % 8 == 1:
            numbers["htp_arch"] = "99"
        context = int(rng.choice([64, 128, 256]))
        at = {length: 10 * length + int(rng.integers(10)) for length in (64, 128, 256) if length <= context}
        variants.append(
            variant(f"v{i}", backend, {}, requires=numbers, context=context, at=at if i % 5 else None, target=target)
        )
    manifest = write_bundle(tmp_path / "bundle", variants, {})
    paths, wanted = [], []
    for i, device in enumerate(devices):
        paths.append(str(tmp_path / f"device{i}.json"))
        Path(paths[-1]).write_text(json.dumps({"devices": [device_json(device)]}))
        wanted += [[verdict.name, verdict.fits, verdict.context] for verdict in judge(manifest, device)]
    found = call("judge", bundle=str(tmp_path / "bundle"), devices=paths)
    assert [verdict[:3] for verdict in found] == wanted
    assert {verdict[1] for verdict in found} == {True, False}
    assert all(verdict[3] for verdict in found)


def test_chips_are_those_of_the_backend() -> None:
    rows = re.findall(r'\{"(\w+)", \{"(\d+)", "(\d+)"\}\}', (SOURCES / "src" / "device.cpp").read_text())
    assert {int(number): (name, int(arch)) for name, number, arch in rows} == dict(SOC_MODELS)


def test_the_reason_is_for_people(call: Run, edge: Run, tmp_path: Path) -> None:
    numbers = {"soc_model": "43", "htp_arch": "73"}
    at = {512: 900_000_000, 1024: 1_000_000_000, 4096: 2_500_000_000}
    variants = [
        variant("npu", "qnn", {}, requires=numbers, context=4096, at=at),
        variant("cpu", "onnx", {}, context=4096),
    ]
    write_bundle(tmp_path / "bundle", variants, {})
    device = tmp_path / "device.json"
    device.write_text(json.dumps({"devices": [device_json(replace(PHONE, free_bytes=1_200_000_000))]}))
    said = edge(tmp_path / "bundle", "--judge", "--device", device)
    assert said.returncode == 0
    assert said.stdout.splitlines()[0] == (
        "npu: does not fit. Needs 2.5 GB with its context of 4096 tokens, and 1.2 GB are free: 1024 tokens would fit"
    )
    device.write_text(json.dumps({"devices": [device_json(CARD)]}))
    said = edge(tmp_path / "bundle", "--judge", "--device", device)
    assert said.returncode == 1
    assert "is not a known Snapdragon" in said.stdout
    assert "Runs on a CPU, and A card has none" in said.stdout
