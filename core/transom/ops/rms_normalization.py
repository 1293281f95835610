"""NumPy reference of ONNX `RMSNormalization` (opset 23). Source: Zhang and Sennrich 2019 (arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from transom.ops.schema import Array, Attributes, Sample


def reference(inputs: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
    """`x / sqrt(mean(x², axes from axis on) + epsilon) * scale`, the mean in float32."""
    x, scale = inputs
    assert x is not None
    assert scale is not None
    axis = int(attributes.get("axis", -1)) % x.ndim
    wide = x.astype(np.float32)
    mean = np.mean(wide * wide, axis=tuple(range(axis, x.ndim)), keepdims=True, dtype=np.float32)
    normal = wide / np.sqrt(mean + np.float32(attributes.get("epsilon", 1e-5)))
    return ((normal.astype(x.dtype) * scale).astype(scale.dtype, copy=False),)


def samples(rng: np.random.Generator) -> Iterator[Sample]:
    for shape in ((7, 48), (5, 3, 16)):
        x = rng.standard_normal(shape).astype(np.float32)
        scale = rng.random(shape[-1]).astype(np.float32) + np.float32(0.5)
        yield Sample(f"rank {len(shape)}", (x, scale), {"axis": -1, "epsilon": 1e-5}, constant_inputs=(1,))
