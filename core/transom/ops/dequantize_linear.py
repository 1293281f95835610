"""NumPy reference of ONNX `DequantizeLinear` (opset 24): per tensor, axis or block, and fast enough for weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np

from transom.ops.schema import Array, Attributes, Sample

_OUTPUT = {0: None, 1: np.float32, 10: np.float16, 16: ml_dtypes.bfloat16}


def reference(inputs: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
    """`(x - zero_point) * scale` in float32, rounded to `output_dtype` or to the scale's type."""
    x, scale = inputs[0], inputs[1]
    assert x is not None
    assert scale is not None
    zero = inputs[2] if len(inputs) > 2 else None
    dtype = _OUTPUT[int(attributes.get("output_dtype", 0))] or scale.dtype
    shape, spread = scale_layout(x.shape, scale.shape, attributes)
    values = x.astype(np.float32).reshape(shape)
    if zero is not None:
        values = values - spread(zero.astype(np.float32))
    values = values * spread(scale.astype(np.float32))
    return (values.reshape(x.shape).astype(dtype, copy=False),)


def scale_layout(
    shape: tuple[int, ...], scales: tuple[int, ...], attributes: Attributes
) -> tuple[tuple[int, ...], Callable[[Array], Array]]:
    """How scales relate to the elements in `QuantizeLinear` and `DequantizeLinear`.

    Args:
        shape: shape of the elements.
        scales: shape of the scales and of any zero points.

    Returns:
        The shape to reshape the elements to, and a function that reshapes scales or zero points to broadcast with it.
    """
    axis, block = int(attributes.get("axis", 1)), int(attributes.get("block_size", 0))
    if block:
        axis %= len(shape)
        blocks = scales[axis]
        if blocks * block == shape[axis]:
            return (*shape[:axis], blocks, block, *shape[axis + 1 :]), lambda s: np.expand_dims(s, axis + 1)
        whole = tuple(slice(shape[axis]) if a == axis else slice(None) for a in range(len(shape)))
        return shape, lambda s: np.repeat(s, block, axis)[whole]
    if np.prod(scales, dtype=np.int64) == 1:
        return shape, lambda s: s.reshape(())
    row = [1] * len(shape)
    row[axis] = scales[0]
    return shape, lambda s: s.reshape(row)


def samples(rng: np.random.Generator) -> Iterator[Sample]:
    n, k, block = 24, 64, 32
    scale = (rng.random((n, k // block)).astype(np.float16) + np.float16(0.5)) / np.float16(50)
    ranges = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}
    for name, (low, high) in ranges.items():
        q = rng.integers(low, high, (n, k)).astype(np.uint8 if name.startswith("u") else np.int8)
        zero = rng.integers(low, high, (n, k // block)).astype(q.dtype)
        attributes = {"axis": 1, "block_size": block, "output_dtype": 1}
        dtypes = {0: name, 2: name}
        yield Sample(f"{name} blocks", (q, scale), attributes, constant_inputs=(0, 1), dtypes=dtypes)
        yield Sample(f"{name} blocks, zero points", (q, scale, zero), attributes, 1, (0, 1, 2), dtypes)
    q8 = rng.integers(-128, 128, (n, k)).astype(np.int8)
    channel = rng.random(n).astype(np.float32) / 50
    yield Sample("int8 per channel", (q8, channel), {"axis": 0}, 1, (0, 1))
    yield Sample("int8 per tensor", (q8, np.array(0.02, np.float32)), {}, 1, (0, 1))
    rows = {"axis": 1, "block_size": k}
    yield Sample("int8 rows", (q8, channel[:, None]), rows, 1, (0, 1))
    # 448 is the largest float8: what is beyond it would be NaN.
    f8 = np.clip(rng.standard_normal((n, k)) * 100, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    yield Sample("float8 rows", (f8, channel[:, None]), rows, 1, (0, 1), {0: "float8e4m3fn"})
