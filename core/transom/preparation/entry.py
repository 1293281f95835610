"""Where a child process begins: it runs the job that the host named. Imports little, so that a process beside this one
can start first."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from transom.contract import Progress


def run(payload: Mapping[str, Any], progress: Progress) -> Any:
    """What the child process calls: the function that `payload["work"]` names as `"module:function"`."""
    # The check prompt makes small matrix products, for which NumPy's threads cost more than they give: three times the
    # processor time of one thread, ten times the wall time where the processor is busy. Read when NumPy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = dict(payload)
    if not arguments.pop("beside", False):
        return _work(arguments, progress)
    from transom.preparation.reference_process import reference_beside

    with reference_beside(arguments) as reference:  # first of all: what comes next takes as long for both
        return _work(arguments, progress, reference=reference)


def _work(arguments: dict[str, Any], progress: Progress, **more: Any) -> Any:
    from transom.preparation.lazy_imports import import_later

    # Half of the import of onnx_ir is for arithmetic with symbolic sizes, which few graphs have.
    import_later("sympy", "onnx_ir._symbolic_shapes")
    module, _, function = arguments.pop("work").partition(":")
    return getattr(importlib.import_module(module), function)(arguments, progress, **more)
