"""The entry point of a child process: runs the job that the host named.

Imports little, so that the process for the reference outputs can start before the heavy imports.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from transom.contract import Progress


def run(payload: Mapping[str, Any], progress: Progress) -> Any:
    """Call the function that `payload["work"]` names as `"module:function"`."""
    # NumPy's threads slow down the small matrix products of the check prompt: they take three times the processor time
    # of one thread, and ten times the wall time where the processor is busy. NumPy reads the variable on import.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = dict(payload)
    if not arguments.pop("parallel_reference", False):
        return _work(arguments, progress)
    from transom.preparation.reference_process import reference_in_parallel

    with reference_in_parallel(
        arguments
    ) as reference:  # first, because the imports that follow take both processes equally long
        return _work(arguments, progress, reference=reference)


def _work(arguments: dict[str, Any], progress: Progress, **more: Any) -> Any:
    from transom.preparation.lazy_imports import import_later

    # sympy takes half of the import time of onnx_ir. Only arithmetic with symbolic sizes, which is rare, needs it.
    import_later("sympy", "onnx_ir._symbolic_shapes")
    module, _, function = arguments.pop("work").partition(":")
    return getattr(importlib.import_module(module), function)(arguments, progress, **more)
