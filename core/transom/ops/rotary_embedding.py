"""NumPy reference of ONNX `RotaryEmbedding` (opset 23). Source: Su et al. 2021 (arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from transom.ops.schema import Array, Attributes, Sample


def reference(inputs: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
    """Rotate pairs of columns: column i of each half of the rotated part, or neighbors if `interleaved`.

    x is [batch, sequence, heads * dim] with `num_heads`, or [batch, heads, sequence, dim]; cos and sin are
    [batch, sequence, rotated / 2], or tables [positions, rotated / 2] with `position_ids` [batch, sequence].
    """
    x, cos, sin = (np.asarray(a) for a in inputs[:3])
    positions = inputs[3] if len(inputs) > 3 else None
    flat = x.ndim == 3
    if flat:
        heads = int(attributes["num_heads"])
        x4 = x.reshape(x.shape[0], x.shape[1], heads, -1)
    else:
        x4 = x.transpose(0, 2, 1, 3)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    rotated = int(attributes.get("rotary_embedding_dim", 0)) or x4.shape[-1]
    part, rest = x4[..., :rotated], x4[..., rotated:]
    c, s = cos[:, :, None, : rotated // 2], sin[:, :, None, : rotated // 2]
    if attributes.get("interleaved", 0):
        a, b = part[..., 0::2], part[..., 1::2]
        turned = np.stack([a * c - b * s, b * c + a * s], -1).reshape(part.shape)
    else:
        a, b = part[..., : rotated // 2], part[..., rotated // 2 :]
        turned = np.concatenate([a * c - b * s, b * c + a * s], -1)
    out = np.concatenate([turned.astype(x.dtype), rest], -1)
    return (out.reshape(x.shape) if flat else np.ascontiguousarray(out.transpose(0, 2, 1, 3)),)


def samples(rng: np.random.Generator) -> Iterator[Sample]:
    tokens, heads, dim = 6, 3, 16
    for rotated in (dim, 8):
        angles = rng.random((1, tokens, rotated // 2)) * 6
        x = rng.standard_normal((1, tokens, heads * dim)).astype(np.float32)
        for interleaved in (0, 1):
            attributes = {"num_heads": heads, "interleaved": interleaved}
            if rotated != dim:
                attributes["rotary_embedding_dim"] = rotated
            inputs = (x, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
            yield Sample(f"{rotated} of {dim}, interleaved={interleaved}", inputs, attributes)
