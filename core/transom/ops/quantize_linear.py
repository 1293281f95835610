"""NumPy reference of ONNX `QuantizeLinear` (opset 24): per tensor, axis or block, to integers and small floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from transom.ops.dequantize_linear import scale_layout
from transom.ops.schema import Array, Attributes, Sample

_INTEGERS: dict[int, Any] = {
    2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 21: ml_dtypes.uint4, 22: ml_dtypes.int4,
}  # fmt: skip
_FLOATS: dict[int, Any] = {
    17: ml_dtypes.float8_e4m3fn, 18: ml_dtypes.float8_e4m3fnuz, 19: ml_dtypes.float8_e5m2,
    20: ml_dtypes.float8_e5m2fnuz, 23: ml_dtypes.float4_e2m1fn,
}  # fmt: skip
_PRECISIONS: dict[int, Any] = {1: np.float32, 10: np.float16, 16: ml_dtypes.bfloat16}


def reference(inputs: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
    """`x / scale`, rounded to the nearest code, ties to even, plus `zero_point`, and clamped to the range of codes. NaN
    stays NaN if the output type has it.

    With `saturate=0`, values beyond the largest 8-bit float become infinite or NaN. The division uses the scale's type,
    or `precision`.
    """
    x, scale = inputs[0], inputs[1]
    assert x is not None
    assert scale is not None
    zero = inputs[2] if len(inputs) > 2 else None
    output_dtype = int(attributes.get("output_dtype", 0))
    kind = np.dtype(zero.dtype if zero is not None else (_INTEGERS | _FLOATS)[output_dtype or 2])
    precision = int(attributes.get("precision", 0))
    scales = scale.dtype.type if scale.dtype in map(np.dtype, _PRECISIONS.values()) else np.float32
    number: Any = _PRECISIONS[precision] if precision else scales
    shape, spread = scale_layout(x.shape, scale.shape, attributes)
    values = (x.astype(number).reshape(shape) / spread(scale.astype(number))).astype(np.float32)
    whole = kind in map(np.dtype, _INTEGERS.values())
    if whole:
        values = np.rint(values)
    if zero is not None:
        values = values + spread(zero.astype(np.float32))
    if whole or int(attributes.get("saturate", 1)):
        types: Any = ml_dtypes
        limits = types.iinfo(kind) if whole else types.finfo(kind)
        values = np.clip(values, np.float32(limits.min), np.float32(limits.max))
    with np.errstate(invalid="ignore"):  # ONNX does not define the integer of a NaN
        return (values.reshape(x.shape).astype(kind),)


def samples(rng: np.random.Generator) -> Iterator[Sample]:
    scale, channel = np.array(0.03, np.float32), (rng.random(64).astype(np.float32) + np.float32(0.5)) / 20
    x, y = _between_ties(rng, (6, 64), scale), _between_ties(rng, (6, 64), channel)
    zero = np.array(rng.integers(100, 156), np.uint8)
    yield Sample("int8 per tensor", (x, scale, np.array(0, np.int8)), {}, 1, (1, 2))
    yield Sample("uint8 per tensor, zero point", (x, scale, zero), {}, 1, (1, 2))
    yield Sample("int8 per channel", (y, channel), {"axis": 1, "output_dtype": 3}, 1, (1,))


def _between_ties(rng: np.random.Generator, shape: tuple[int, ...], scale: Array) -> Array:
    """Normal values, float32, of which each is at least a hundredth of `scale` away from the middle of two codes.

    Engines may multiply by 1 / scale in place of dividing. Both are right, and give different codes at a middle.
    """
    quotient = rng.standard_normal(shape) * 3 / scale
    code = np.rint(quotient)
    return ((code + np.clip(quotient - code, -0.49, 0.49)) * scale).astype(np.float32)
