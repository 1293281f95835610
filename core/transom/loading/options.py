"""The arguments of `transom.load` and `transom.export` that are checked before anything else is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transom.artifacts import Cache
from transom.errors import OptionError, nearest

PRECISIONS = ("auto", "exact", "fast", "f32", "bf16", "f16", "int8", "fp8", "int4")
VERIFY = ("auto", "off", "always")
_BOTH = ("backend", "cache", "calibration", "context", "precision", "probe_file", "progress", "sparsity", "verify")
NAMES = {"load": (*_BOTH, "device", "threads"), "export": (*_BOTH, "out", "overwrite", "target")}
"""Options by function."""


def check_arguments(
    options: Mapping[str, Any], verify: str, policy: str, unknown: Mapping[str, Any], function: str = "load"
) -> None:
    """Raise OptionError for an option that the function does not have, or a value that is not allowed."""
    for name in unknown:
        raise OptionError(f"{function}() has no option {name!r}", nearest(name, NAMES[function]))
    for name, value, known in (
        ("precision", options["precision"], PRECISIONS),
        ("verify", verify, VERIFY),
        ("TRANSOM_AUTO", policy, ("measure", "static")),
    ):
        if value not in known:
            raise OptionError(f"{name}={value!r} is unknown", nearest(str(value), known))
    for name in ("context", "threads"):
        value = options[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{name}={value!r} is not a positive whole number", "Leave it out for the default")


def check_objects(cache: object, progress: object) -> None:
    """Raise OptionError for a cache that is none, or a progress that cannot be called."""
    if cache is not None and not isinstance(cache, Cache):
        path = str(cache) if isinstance(cache, str | os.PathLike) else "folder"
        raise OptionError(f"cache={cache!r} is not a transom.Cache", f"Write cache=transom.Cache({path!r})")
    if progress is not None and not callable(progress):
        raise OptionError(
            f"progress={progress!r} cannot be called",
            "Give a function that takes the stage and the share done, or leave it out",
        )
