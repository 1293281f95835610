"""Softmax with attention sinks, for the NumPy references of attention."""

from __future__ import annotations

import numpy as np

from transom.ops.schema import Array


def softmax(scores: Array, sink: Array | None = None) -> Array:
    """Softmax over the last axis.

    Args:
        scores: logits [..., keys]; -inf for hidden keys.
        sink: an extra logit without a value, which broadcasts with [..., 1]: it only adds to the denominator.
    """
    top = scores.max(-1, keepdims=True)
    if sink is not None:
        top = np.maximum(top, sink)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - top)
    result: Array = weights / total
    return result
