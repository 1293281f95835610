"""GPTQ, AWQ and compressed-tensors checkpoints load as blocks and compute the formulas of the formats.

The packers here are written from the formats, number by number, and share nothing with the code they test.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import assert_agrees, tiny
from safetensors.numpy import load_file, save_file

from transom.errors import SourceError
from transom.graph.builder import WEIGHT_META
from transom.graph.weights import Blocked, Dense, Weight, dequantize
from transom.sources import resolve

Arrays = dict[str, np.ndarray[Any, Any]]
GROUP = 32


def pack(values: np.ndarray[Any, Any], bits: int, order: tuple[int, ...] | None = None) -> np.ndarray[Any, Any]:
    """Unsigned numbers [rows, n] -> int32 words [rows, n * bits / 32]; nibble i of a word holds column order[i]."""
    count = 32 // bits
    columns = -(-values.shape[1] // count) * count
    padded = np.zeros((values.shape[0], columns), np.uint64)
    padded[:, : values.shape[1]] = values
    words = np.zeros((values.shape[0], columns // count), np.uint64)
    for i in range(count):
        words |= padded[:, (order[i] if order else i) :: count] << np.uint64(i * bits)
    return words.astype(np.uint32).view(np.int32)


def numbers(
    rng: np.random.Generator, rows: int, columns: int, bits: int, group: int, symmetric: bool
) -> tuple[np.ndarray[Any, Any], ...]:
    """Unsigned quants [rows, columns], scales and unsigned zero points [rows, groups]."""
    groups = columns // group
    top = 1 << bits
    quants = rng.integers(0, top, (rows, columns))
    scales = ((0.5 + rng.random((rows, groups))) * 3 / top / columns**0.5).astype(np.float16)
    zeros = np.full((rows, groups), top // 2) if symmetric else rng.integers(0, top, (rows, groups))
    return quants, scales, zeros


def formula(quants: Any, scales: Any, zeros: Any, group_of: Any) -> np.ndarray[Any, Any]:
    """w[n, k] = s[n, g(k)] * (q[n, k] - z[n, g(k)])."""
    return (scales[:, group_of].astype(np.float32) * (quants - zeros[:, group_of])).astype(np.float32)


Maker = Callable[[np.random.Generator, int, int], tuple[Arrays, np.ndarray[Any, Any]]]


def gptq(bits: int, *, symmetric: bool, v2: bool = False, scattered: bool = False, group: int = GROUP) -> Maker:
    def make(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray[Any, Any]]:
        width = columns if group == -1 else group
        quants, scales, zeros = numbers(rng, rows, columns, bits, width, symmetric)
        group_of = np.arange(columns) // width
        if scattered:
            group_of = rng.permutation(group_of)
        stored_zeros = zeros if v2 else (zeros - 1) % (1 << bits)
        parts = {
            "qweight": _along_rows(quants.T, bits),
            "qzeros": pack(stored_zeros.T, bits),
            "scales": np.ascontiguousarray(scales.T),
            "g_idx": group_of.astype(np.int32),
        }
        return parts, formula(quants, scales, zeros, group_of)

    return make


def _along_rows(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """[K, N] -> int32 [K * bits / 32, N]: the words run along K."""
    return np.ascontiguousarray(pack(np.ascontiguousarray(values.T), bits).T)


def awq(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray[Any, Any]]:
    quants, scales, zeros = numbers(rng, rows, columns, 4, GROUP, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        "qweight": pack(quants.T, 4, order),
        "qzeros": pack(zeros.T, 4, order),
        "scales": np.ascontiguousarray(scales.T),
    }
    return parts, formula(quants, scales, zeros, np.arange(columns) // GROUP)


def compressed(
    bits: int,
    *,
    symmetric: bool = True,
    strategy: str = "group",
    plain: bool = False,
    bfloat16: bool = False,
    scattered: bool = False,
) -> Maker:
    def make(rng: np.random.Generator, rows: int, columns: int) -> tuple[Arrays, np.ndarray[Any, Any]]:
        group = GROUP if strategy == "group" else columns
        quants, scales, zeros = numbers(rng, rows, columns, bits, group, symmetric)
        if strategy == "tensor":
            scales = np.broadcast_to(scales[:1], scales.shape)
        if bfloat16:
            scales = scales.astype(ml_dtypes.bfloat16)
        group_of = np.arange(columns) // group
        if scattered:
            group_of = rng.permutation(group_of)
        half = 1 << (bits - 1)
        parts: Arrays = {"weight_scale": np.ascontiguousarray(scales[0] if strategy == "tensor" else scales)}
        if plain:
            parts["weight"] = (quants - half).astype(np.int8)
        else:
            parts["weight_packed"] = pack(quants, bits)
            parts["weight_shape"] = np.array([rows, columns], np.int64)
        if not symmetric:
            parts["weight_zero_point"] = _along_rows(zeros, bits)
        if scattered:
            parts["weight_g_idx"] = group_of.astype(np.int32)
        return parts, formula(quants, scales, zeros, group_of)

    return make


def ct_config(bits: int, *, symmetric: bool = True, strategy: str = "group", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    weights["group_size"] = GROUP if strategy == "group" else None
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        **more,
    }


def quantized(folder: Path, rng: np.random.Generator, make: Maker, settings: dict[str, Any]) -> Any:
    """A tiny llama whose projections are quantized by `make`; returns the transformers model with the same values."""
    import torch

    checkpoint = tiny("llama", folder, rng)
    stored = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in checkpoint.model.named_parameters():
            module = name.removesuffix(".weight")
            if not module.endswith("_proj"):
                continue
            parts, values = make(rng, *parameter.shape)
            del stored[name]
            stored |= {f"{module}.{part}": array for part, array in parts.items()}
            parameter.copy_(torch.from_numpy(values))
    save_file(stored, folder / "model.safetensors")
    set_config(folder, quantization_config=settings)
    return checkpoint.model


def set_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def weights_of(folder: Path) -> list[Weight]:
    graph = resolve(folder).open(folder).graph
    found = [v.meta[WEIGHT_META] for v in graph.model.graph.initializers.values() if WEIGHT_META in v.meta]
    return list({id(w): w for w in found}.values())


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
CASES: list[tuple[str, Maker, dict[str, Any], tuple[str, bool]]] = [
    ("gptq", gptq(4, symmetric=True), GPTQ, ("int4", False)),
    ("gptq asymmetric", gptq(4, symmetric=False), GPTQ | {"sym": False}, ("uint4", True)),
    (
        "gptq v2",
        gptq(4, symmetric=False, v2=True),
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        ("uint4", True),
    ),
    ("gptq 8 bits", gptq(8, symmetric=True), GPTQ | {"bits": 8}, ("int8", False)),
    ("gptq 2 bits", gptq(2, symmetric=False), GPTQ | {"bits": 2, "sym": False}, ("uint4", True)),
    ("gptq whole rows", gptq(4, symmetric=True, group=-1), GPTQ | {"group_size": -1}, ("int4", False)),
    ("gptq, order that changes nothing", gptq(4, symmetric=True), GPTQ | {"desc_act": True}, ("int4", False)),
    (
        "awq",
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        ("uint4", True),
    ),
    ("compressed-tensors", compressed(4), ct_config(4), ("int4", False)),
    ("compressed-tensors bfloat16", compressed(4, bfloat16=True), ct_config(4), ("int4", False)),
    (
        "compressed-tensors asymmetric",
        compressed(4, symmetric=False),
        ct_config(4, symmetric=False),
        ("int4", True),
    ),
    ("compressed-tensors 8 bits", compressed(8), ct_config(8), ("int8", False)),
    (
        "compressed-tensors by rows",
        compressed(4, strategy="channel"),
        ct_config(4, strategy="channel"),
        ("int4", False),
    ),
    (
        "compressed-tensors int8 by rows",
        compressed(8, strategy="channel", plain=True),
        ct_config(8, strategy="channel", format="int-quantized"),
        ("int8", False),
    ),
    (
        "compressed-tensors int8, one scale",
        compressed(8, strategy="tensor", plain=True),
        ct_config(8, strategy="tensor", format="int-quantized"),
        ("int8", False),
    ),
]


@pytest.mark.parametrize(("name", "make", "settings", "form"), CASES, ids=[case[0] for case in CASES])
def test_a_quantized_checkpoint_stays_in_blocks_and_computes_its_formula(
    name: str, make: Maker, settings: dict[str, Any], form: tuple[str, bool], tmp_path: Path, rng: np.random.Generator
) -> None:
    model = quantized(tmp_path, rng, make, settings)
    loaded = resolve(tmp_path).open(tmp_path)
    loaded.graph.check()
    blocked = [w for w in weights_of(tmp_path) if isinstance(w, Blocked)]
    assert len(blocked) == 14
    assert {(w.dtype, w.has_zero_points) for w in blocked} == {form}
    assert not [note for note in loaded.notes if "not used" in note]
    exact = {p.detach().numpy().tobytes() for _, p in model.named_parameters()}
    for weight in blocked:
        assert dequantize(weight).tobytes() in exact
    assert_agrees(loaded.graph, model, rng)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (gptq(4, symmetric=True, scattered=True), GPTQ | {"desc_act": True}),
        (gptq(4, symmetric=False, scattered=True), GPTQ | {"desc_act": True, "sym": False}),
        (compressed(4, scattered=True), ct_config(4)),
    ],
    ids=["gptq", "gptq asymmetric", "compressed-tensors"],
)
def test_activation_order_is_dequantized_and_said(
    make: Maker, settings: dict[str, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    model = quantized(tmp_path, rng, make, settings)
    loaded = resolve(tmp_path).open(tmp_path)
    assert all(isinstance(w, Dense) for w in weights_of(tmp_path))
    assert any("activation order" in note and note.startswith("14 ") for note in loaded.notes)
    assert_agrees(loaded.graph, model, rng)


def failure(folder: Path, *, read: bool = False) -> str:
    with pytest.raises(SourceError) as caught:
        [weight.load() if read else None for weight in weights_of(folder)]
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes"}, ("bitsandbytes", "gptq, awq and compressed-tensors")),
        (GPTQ | {"bits": 3}, ("bits", "3")),
        (GPTQ | {"group_size": 48}, ("group_size", "48")),
        (GPTQ | {"checkpoint_format": "marlin"}, ("checkpoint_format", "marlin")),
        ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemv"}, ("version", "gemv")),
        (ct_config(4) | {"format": "marlin-24"}, ("format", "marlin-24")),
        (ct_config(4, strategy="block"), ("strategy", "block")),
        (ct_config(3), ("num_bits", "3")),
    ],
)
def test_what_cannot_be_honored_is_refused_by_name_and_value(
    settings: dict[str, Any], words: tuple[str, ...], tmp_path: Path, rng: np.random.Generator
) -> None:
    quantized(tmp_path, rng, gptq(4, symmetric=True), settings)
    text = failure(tmp_path)
    assert all(word in text for word in words)


def test_zero_points_that_belie_the_settings_are_found(tmp_path: Path, rng: np.random.Generator) -> None:
    quantized(tmp_path, rng, gptq(4, symmetric=False), GPTQ)
    text = failure(tmp_path, read=True)
    assert "symmetric" in text
    assert "qzeros" in text


def test_groups_that_belie_the_settings_are_found(tmp_path: Path, rng: np.random.Generator) -> None:
    quantized(tmp_path, rng, gptq(4, symmetric=True, scattered=True), GPTQ)
    text = failure(tmp_path, read=True)
    assert "g_idx" in text
    assert "desc_act" in text


def change(folder: Path, edit: Callable[[Arrays], Any]) -> None:
    stored = load_file(folder / "model.safetensors")
    edit(stored)
    save_file(stored, folder / "model.safetensors")


MODULE = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_part_is_named(part: str, tmp_path: Path, rng: np.random.Generator) -> None:
    quantized(tmp_path, rng, gptq(4, symmetric=True), GPTQ)
    change(tmp_path, lambda stored: stored.pop(f"{MODULE}.{part}"))
    assert f"{MODULE}.{part} is missing" in failure(tmp_path)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_part_of_the_wrong_shape_is_named(part: str, tmp_path: Path, rng: np.random.Generator) -> None:
    quantized(tmp_path, rng, gptq(4, symmetric=True), GPTQ)
    name = f"{MODULE}.{part}"
    change(tmp_path, lambda stored: stored.update({name: np.ascontiguousarray(stored[name][:-1])}))
    assert MODULE in failure(tmp_path)


def test_nan_among_the_scales_is_found(tmp_path: Path, rng: np.random.Generator) -> None:
    quantized(tmp_path, rng, awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP})

    def edit(stored: Arrays) -> None:
        stored[f"{MODULE}.scales"][0, 3] = np.nan

    change(tmp_path, edit)
    text = failure(tmp_path, read=True)
    assert f"{MODULE}.scales" in text
    assert "NaN" in text
