"""Finding NaN and infinity in weights when they are read: one sentence about a tensor is worth more than garbage text.

The test looks at exponent bits, so it costs one pass at memory speed for every type of number.
"""

from __future__ import annotations

import math

import numpy as np

from transom.errors import SourceError
from transom.graph.weights import Array

_CHUNK = 1 << 20
_EXPONENT = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80)}


def is_finite(array: Array) -> bool:
    """Whether every number of a float array (float16, bfloat16, float32) is finite."""
    word, mask = _EXPONENT[array.dtype.name]
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    flat = array.reshape(-1).view(word)
    bits = word(mask)
    starts = range(0, flat.size, _CHUNK)
    return not any(bool(((flat[at : at + _CHUNK] & bits) == bits).any()) for at in starts)


def require_finite(array: Array, name: str, where: object, what: str = "") -> Array:
    """The array itself.

    Raises:
        SourceError: it holds NaN or infinity; says which tensor and how many.
    """
    if not is_finite(array):
        bad = np.asarray(array, np.float32)
        count = int(np.count_nonzero(~np.isfinite(bad)))
        kind = "NaN" if np.isnan(bad).any() else "infinite"
        raise SourceError(
            f"The tensor {name} in {where} has {kind} values{what} ({count} of {math.prod(array.shape)})",
            "The model was damaged in training, conversion or download: get it again or convert it again",
        )
    return array
