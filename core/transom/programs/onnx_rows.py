"""The operators of a draft over rows of float32 that look alike in every ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from transom.graph.weights import Array
from transom.programs.drafting import Draft, Value
from transom.programs.onnx_writing import FLOAT, OnnxWriter


class RowOperators:
    """Writes them.

    Args:
        wide: rows of a value, float32.
    """

    def __init__(self, write: OnnxWriter, wide: Callable[[Value], ir.Value]) -> None:
        self._write, self._wide = write, wide
        self.writers: Mapping[str, Callable[[Draft], ir.Value]] = {
            "add": self.add, "bias": self._bias, "scale": self._scale, "softcap": self._softcap, "glu": self._gate,
        }  # fmt: skip
        """By the kind of a draft."""

    def vector(self, vector: Array | None) -> ir.Value:
        """What a draft has beside its inputs, which the draft must have: a bias, or the gain of a norm."""
        assert vector is not None
        return self._write.constant(np.asarray(vector, np.float32))

    def add(self, draft: Draft) -> ir.Value:
        return self._write("Add", *(self._wide(v) for v in draft.inputs))

    def _bias(self, draft: Draft) -> ir.Value:
        return self._write("Add", self._wide(draft.inputs[0]), self.vector(draft.vector))

    def _scale(self, draft: Draft) -> ir.Value:
        return self._write("Mul", self._wide(draft.inputs[0]), self._write.number(draft.scale, FLOAT))

    def _softcap(self, draft: Draft) -> ir.Value:
        return self._write.softcapped(self._wide(draft.inputs[0]), draft.scale)

    def _gate(self, draft: Draft) -> ir.Value:
        w, (x, up) = self._write, (self._wide(v) for v in draft.inputs)
        if draft.act == "silu":
            x = w("Mul", x, w("Sigmoid", x))
        else:
            x = w("Gelu", x, approximate="tanh" if draft.act == "gelu_tanh" else "none")
        return w("Mul", x, up)
