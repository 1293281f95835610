"""Every tensor type of GGUF is read number for number as the gguf package reads it.

Draws: numbers are equal to the gguf package's, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from transom.errors import SourceError
from transom.graph.weights import BITS, Blocked, Dense, dequantize
from transom.sources.gguf_blocks import BLOCK_TYPES, weight_of
from transom.sources.gguf_file import GgufTensor

ROWS = 6
HALVES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}
"""Where the float16 scales of a K-quant lie in its block; the rest of the bytes may be anything."""


def random_blocks(kind: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """uint8 [rows, bytes]: every bit pattern where the layout is bits, sane numbers where it is a float16."""
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = 512 // numbers
    raw = rng.integers(0, 256, (ROWS, blocks, size), dtype=np.uint8)
    halves = HALVES_AT.get(kind, (0, 2) if kind in ("Q4_1", "Q5_1") else (0,) if kind != "MXFP4" else ())
    for at in halves:
        scales = (rng.standard_normal((ROWS, blocks)) * 0.1).astype(np.float16)
        raw[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    if kind == "MXFP4":
        raw[:, :, 0] = rng.integers(0, 255, (ROWS, blocks))  # 255 stands for NaN
    return raw.reshape(ROWS, -1)


def tensor(kind: str, raw: np.ndarray[Any, Any], columns: int = 512) -> GgufTensor:
    return GgufTensor("t", kind, (ROWS, columns), np.ascontiguousarray(raw).reshape(-1).view(np.uint8))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_stay_blocks_and_equal_the_package_bit_for_bit(kind: str, rng: np.random.Generator) -> None:
    raw = random_blocks(kind, rng)
    weight, note = weight_of(tensor(kind, raw), "file")
    assert isinstance(weight, Blocked)
    assert weight.shape == (ROWS, 512)
    with np.errstate(over="ignore"):
        wanted = gguf.quants.dequantize(raw, GGMLQuantizationType[kind])
        got = dequantize(weight)
    np.testing.assert_array_equal(got, wanted)
    assert note == ""
    arrays = weight.load()
    low, high = arrays.quants.min(), arrays.quants.max()
    bits = BITS[weight.dtype]
    signed = weight.dtype.startswith("int")
    assert arrays.quants.dtype == (np.int8 if signed else np.uint8)
    assert low >= (-(1 << (bits - 1)) if signed else 0)
    assert high < (1 << (bits - 1) if signed else 1 << bits)
    assert arrays.scales.dtype == weight.scale_dtype
    assert (arrays.minimums is not None) == weight.has_minimums
    assert arrays.scales.shape == (ROWS, 512 // weight.block)
    assert weight.outer == (256 if kind.endswith("_K") or kind == "IQ4_XS" else 0)
    if not weight.outer:
        assert arrays.levels is None
        return
    assert arrays.levels is not None
    halves, codes, least, least_codes = arrays.levels
    for half, code, folded in ((halves, codes, arrays.scales), (least, least_codes, arrays.minimums)):
        assert (half is None) == (code is None) == (folded is None)
        if half is not None and code is not None:
            assert (half.dtype, half.shape, code.dtype) == (np.float16, (ROWS, 2), np.int8)
            spread = np.repeat(half.astype(np.float64), 256 // weight.block, 1)
            np.testing.assert_array_equal(spread * code, folded)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_what_the_package_quantizes_is_read_back(kind: str, rng: np.random.Generator) -> None:
    values = rng.standard_normal((ROWS, 512)).astype(np.float32)
    raw = gguf.quants.quantize(values, GGMLQuantizationType[kind])
    weight, _ = weight_of(tensor(kind, raw), "file")
    np.testing.assert_array_equal(dequantize(weight), gguf.quants.dequantize(raw, GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_stay_floats(kind: str, rng: np.random.Generator) -> None:
    values = rng.standard_normal((ROWS, 512)).astype(np.float32)
    raw = gguf.quants.quantize(values, GGMLQuantizationType[kind])
    weight, note = weight_of(tensor(kind, raw), "file")
    assert isinstance(weight, Dense)
    assert weight.dtype == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]
    assert not note
    np.testing.assert_array_equal(dequantize(weight), gguf.quants.dequantize(raw, GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "IQ2_XXS", "IQ3_S", "IQ1_S"])
def test_other_types_are_dequantized_and_noted(kind: str, rng: np.random.Generator) -> None:
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.zeros((ROWS, 2, size), np.uint8)
    raw[..., : size // 2] = rng.integers(0, 3, (ROWS, 2, size // 2))
    raw = raw.reshape(ROWS, -1)
    weight, note = weight_of(tensor(kind, raw), "file")
    assert isinstance(weight, Dense)
    assert weight.dtype == "float32"
    assert "dequantized" in note
    np.testing.assert_array_equal(dequantize(weight), gguf.quants.dequantize(raw, GGMLQuantizationType[kind]))


def test_a_quantized_vector_is_dequantized(rng: np.random.Generator) -> None:
    raw = gguf.quants.quantize(rng.standard_normal((1, 512)).astype(np.float32), GGMLQuantizationType.Q8_0)
    weight, note = weight_of(GgufTensor("t", "Q8_0", (512,), raw.reshape(-1)), "file")
    assert weight.shape == (512,)
    assert "dequantized" in note
    np.testing.assert_array_equal(
        dequantize(weight), gguf.quants.dequantize(raw, GGMLQuantizationType.Q8_0).reshape(-1)
    )


def test_integers_are_no_weights() -> None:
    with pytest.raises(SourceError, match="I32"):
        weight_of(GgufTensor("t", "I32", (4, 8), np.zeros(128, np.uint8)), "file")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K", "F32", "F16", "BF16", "TQ2_0"])
def test_nan_in_weights_or_scales_is_an_error_that_names_the_tensor(kind: str, rng: np.random.Generator) -> None:
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.zeros((ROWS, 512 // numbers * size), np.uint8)
    at = {"TQ2_0": size - 2}.get(kind, 0)
    raw[3, at : at + size] = 0xFF if size <= 4 else raw[3, at : at + size]
    raw[3, at : at + 2] = 0xFF  # a float16 NaN, or the lower half of a float32 one
    weight, _ = weight_of(tensor(kind, raw), Path("some.gguf"))
    with pytest.raises(SourceError, match=r"tensor t in some\.gguf has NaN values"):
        weight.load()
