"""Program operators over float32 rows that are written to ONNX the same way for every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from transom.graph.weights import Array
from transom.programs.onnx_writing import FLOAT, OnnxWriter
from transom.programs.reading import Op, Value


class RowOperators:
    """Writes these operators.

    Args:
        wide: returns the rows of a value in float32.
    """

    def __init__(self, write: OnnxWriter, wide: Callable[[Value], ir.Value]) -> None:
        self._write, self._wide = write, wide
        self.writers: Mapping[str, Callable[[Op], ir.Value]] = {
            "add": self.add, "bias": self._bias, "scale": self._scale, "softcap": self._softcap, "glu": self._gate,
        }  # fmt: skip
        """By `Op.kind`."""

    def vector(self, vector: Array | None) -> ir.Value:
        """The constant vector of an operator, which must be present: a bias, or the gain of a norm."""
        assert vector is not None
        return self._write.constant(np.asarray(vector, np.float32))

    def add(self, op: Op) -> ir.Value:
        return self._write("Add", *(self._wide(v) for v in op.inputs))

    def _bias(self, op: Op) -> ir.Value:
        return self._write("Add", self._wide(op.inputs[0]), self.vector(op.vector))

    def _scale(self, op: Op) -> ir.Value:
        return self._write("Mul", self._wide(op.inputs[0]), self._write.number(op.scale, FLOAT))

    def _softcap(self, op: Op) -> ir.Value:
        return self._write.softcapped(self._wide(op.inputs[0]), op.scale)

    def _gate(self, op: Op) -> ir.Value:
        w, (x, up) = self._write, (self._wide(v) for v in op.inputs)
        if op.act == "silu":
            x = w("Mul", x, w("Sigmoid", x))
        else:
            x = w("Gelu", x, approximate="tanh" if op.act == "gelu_tanh" else "none")
        return w("Mul", x, up)
