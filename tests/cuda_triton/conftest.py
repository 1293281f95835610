"""Puts this folder and the tools on the path.

A whole process interprets kernels or compiles them: `make test` has one for each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

for folder in (Path(__file__).parent, Path(__file__).parents[2] / "tools"):
    sys.path.insert(0, str(folder))

INTERPRETED = {
    "test_append.py", "test_bench_gpu.py", "test_conformance.py", "test_decode.py", "test_generation.py",
    "test_linear.py", "test_parallel.py", "test_prefill.py", "test_routing.py", "test_rows.py",
}  # fmt: skip
EVERY = {path.name for path in Path(__file__).parent.glob("test_*.py")}
collect_ignore = sorted(EVERY - INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else INTERPRETED)


def _patch_once() -> None:
    """Within a kernel, each call of a helper function patches Triton's language again for the module that the helper is
    in: a third of the interpreter's time. Once for each module and launch is enough."""
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    scopes: dict[int, object] = {}

    def patched(fn: Any) -> object:
        module = id(fn.__globals__)
        if module not in scopes:
            scopes[module] = patch(fn)
        return scopes[module]

    def launched(self: object, *arguments: object, **named: object) -> None:
        scopes.clear()
        try:
            run(self, *arguments, **named)
        finally:
            scopes.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patched, launched


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_once()
