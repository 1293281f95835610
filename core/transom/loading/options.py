"""The options of `transom.load` and `transom.export`: checked first, then passed on as one object."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.artifacts import Cache
from transom.errors import OptionError, nearest, option
from transom.preparation.calibration_texts import user_texts
from transom.sparsity import Sparsity

PRECISIONS = ("auto", "exact", "fast", "f32", "bf16", "f16", "int8", "fp8", "int4")
VERIFY = ("auto", "off", "always")
_BOTH = (
    *("cache", "calibration", "context", "max_kl", "offline", "precision", "probe_file", "progress", "sparsity"),
    "verify",
)
NAMES = {
    "load": (*_BOTH, "backend", "deterministic", "device", "threads"),
    "export": (*_BOTH, "app", "format", "out", "overwrite", "target"),
}
"""Names of the options by function."""


@dataclass(frozen=True)
class LoadOptions:
    """The checked options of a call."""

    for_backend: Mapping[str, Any]
    """Options for the backend: `precision`, `context` (None: the model's own), `threads` (None: all) and `max_kl`
    (None: the backend's own)."""
    sparsity: Sparsity
    texts: tuple[str, ...]
    """The user's calibration texts; empty for the default passages."""
    verify: str
    deterministic: bool = False

    @property
    def max_kl(self) -> float | None:
        """Largest mean divergence from the reference that the user accepts, nats; None for the usual limits."""
        bound: float | None = self.for_backend["max_kl"]
        return bound


def auto_policy() -> str:
    """`"measure"` or `"static"`: how `auto` chooses between kinds of device.

    Raises:
        OptionError: `TRANSOM_AUTO` has another value.
    """
    policy = os.environ.get("TRANSOM_AUTO", "").strip() or "measure"
    _require_known("TRANSOM_AUTO", policy, ("measure", "static"))
    return policy


def checked_options(
    function: str,
    *,
    context: int | None,
    precision: str,
    sparsity: Any,
    threads: int | None = None,
    calibration: Sequence[str | Path] = (),
    verify: str = "auto",
    deterministic: bool = False,
    max_kl: float | None = None,
    unknown: Mapping[str, Any] | None = None,
) -> LoadOptions:
    """Check the options of a call.

    Args:
        function: `"load"` or `"export"`.
        unknown: further arguments, which the function does not have.

    Raises:
        OptionError: an option does not exist, or its value is not allowed.
        SourceError: a file of texts cannot be read.
    """
    for name in unknown or ():
        raise OptionError(f"{function}() has no option {name!r}", nearest(name, NAMES[function]))
    _require_known("precision", precision, PRECISIONS)
    _require_known("verify", verify, VERIFY)
    for name, value in (("context", context), ("threads", threads)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{option(name, value)} is not a positive whole number", "Leave it out for the default")
    if not isinstance(deterministic, bool):
        raise OptionError(f"{option('deterministic', deterministic)} is not True or False", "Leave it out for False")
    _check_bound(max_kl, verify)
    for_backend = {"context": context, "precision": precision, "threads": threads, "max_kl": max_kl}
    return LoadOptions(for_backend, Sparsity.parse(sparsity), user_texts(calibration), verify, deterministic)


def _check_bound(max_kl: object, verify: str) -> None:
    number = isinstance(max_kl, int | float) and not isinstance(max_kl, bool)
    if max_kl is not None and not (number and 0 < max_kl < math.inf):  # type: ignore[operator]
        raise OptionError(f"{option('max_kl', max_kl)} is not a bound", "Give nats above 0, such as 0.1")
    if max_kl is not None and verify == "off":
        raise OptionError(
            f"{option('max_kl', max_kl)} needs the comparison that {option('verify', 'off')} leaves out",
            "Leave one of the two out",
        )


def _require_known(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise OptionError(f"{option(name, value)} is unknown", nearest(str(value), known))


def check_objects(cache: object, progress: object) -> None:
    """Raise OptionError for a cache that is not a `Cache`, or a progress that cannot be called."""
    if cache is not None and not isinstance(cache, Cache):
        path = str(cache) if isinstance(cache, str | os.PathLike) else "folder"
        raise OptionError(f"cache={cache!r} is not a transom.Cache", f"Write cache=transom.Cache({path!r})")
    if progress is not None and not callable(progress):
        raise OptionError(
            f"progress={progress!r} cannot be called",
            "Give a function that takes the stage and the share done, or leave it out",
        )
