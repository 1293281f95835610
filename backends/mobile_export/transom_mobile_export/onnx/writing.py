"""Writes an ONNX model for ONNX Runtime: its own operators, and weights that go to their file at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from transom.graph.weights import Array
from transom.programs.onnx_writing import OnnxWriter

OPSET = 21
IR_VERSION = 10
"""The version that ONNX Runtime GenAI's own builder writes, which older runtimes on phones accept, too."""
DOMAIN = "com.microsoft"
PAGE = 4096
"""Alignment of weights in the file, in bytes, so that they can be memory-mapped."""


class RuntimeWriter(OnnxWriter):
    """An `OnnxWriter` that opens a file of weights beside the model; a context manager, which closes it.

    Only one matrix is in memory at a time: `stored` writes it and keeps only its location.

    Args:
        data: the file to create.
    """

    def __init__(self, name: str, data: Path) -> None:
        super().__init__(name)
        self.graph.opset_imports.update({"": OPSET, DOMAIN: 1})
        self._path, self._file = data, data.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def contrib(
        self, op_type: str, *inputs: ir.Value | None, dtypes: Sequence[ir.DataType], **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Append an operator of ONNX Runtime's own domain, with one output per dtype."""
        return self.several(op_type, *inputs, dtypes=dtypes, domain=DOMAIN, **attributes)

    def stored(self, name: str, array: Array) -> ir.Value:
        """An initializer whose numbers are written to the file of weights immediately."""
        self._file.write(b"\0" * (-self._file.tell() % PAGE))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(array).data)
        dtype = ir.DataType.from_numpy(array.dtype)
        tensor = ir.ExternalTensor(
            self._path.name, offset, array.nbytes, dtype, shape=ir.Shape(array.shape), name=name,
            base_dir=self._path.parent,
        )  # fmt: skip
        return self._initializer(tensor)

    def model(self) -> ir.Model:
        return ir.Model(self.graph, ir_version=IR_VERSION, producer_name="transom")
