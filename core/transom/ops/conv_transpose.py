"""The reference of ONNX's ConvTranspose: a matrix product, and a sum of its columns for each place of the kernel.

The `onnx` package's own goes through each element in Python, which takes a minute for a small image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from transom.ops.schema import Array, Attributes


def reference(inputs: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
    """x [N, C, *sizes] and weight [C, M / group, *kernel], optionally bias [M]: [N, M, *output sizes]."""
    x, weight, bias = (*inputs, None, None)[:3]
    assert x is not None
    assert weight is not None
    rank, group = x.ndim - 2, int(attributes.get("group", 1))
    kernel, sizes = weight.shape[2:], x.shape[2:]
    strides, dilations = (attributes.get(name) or [1] * rank for name in ("strides", "dilations"))
    more = attributes.get("output_padding") or [0] * rank
    whole = [
        s * (n - 1) + p + (k - 1) * d + 1 for n, k, s, d, p in zip(sizes, kernel, strides, dilations, more, strict=True)
    ]
    starts, wanted = _pads(attributes, sizes, strides, whole)

    split = x.reshape(len(x), group, x.shape[1] // group, -1)
    columns = np.einsum("ngci,gcm->ngmi", split, weight.reshape(group, x.shape[1] // group, -1), optimize=True)
    columns = columns.reshape(len(x), group * weight.shape[1], *kernel, *sizes)
    canvas = np.zeros(
        (*columns.shape[:2], *(max(w, s + o) for w, s, o in zip(whole, starts, wanted, strict=True))), x.dtype
    )
    for place in itertools.product(*map(range, kernel)):
        at = [
            slice(p * d, p * d + s * (n - 1) + 1, s)
            for p, d, s, n in zip(place, dilations, strides, sizes, strict=True)
        ]
        canvas[:, :, *at] += columns[:, :, *place]
    found = canvas[:, :, *(slice(s, s + o) for s, o in zip(starts, wanted, strict=True))]
    return (found if bias is None else found + bias.reshape(-1, *[1] * rank),)


def _pads(
    attributes: Attributes, sizes: Sequence[int], strides: Sequence[int], whole: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What is cut off at the beginning of each axis, and the size of what is left."""
    rank, how = len(sizes), attributes.get("auto_pad") or "NOTSET"
    wanted = attributes.get("output_shape")
    if wanted is None and how in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(sizes, strides, strict=True)]
    if wanted is None:
        pads = attributes.get("pads") if how == "NOTSET" else None
        pads = pads or [0] * 2 * rank
        return list(pads[:rank]), [w - a - b for w, a, b in zip(whole, pads[:rank], pads[rank:], strict=True)]
    cut = [max(w - o, 0) for w, o in zip(whole, wanted, strict=True)]
    return [c // 2 if how == "SAME_UPPER" else c - c // 2 for c in cut], list(wanted)
