"""Running the kit from a program: `transom.testing.run(backend, device)`."""

from __future__ import annotations

import fnmatch
import platform
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from transom.contract import Backend, Device, Offer
from transom.errors import OptionError, nearest
from transom.testing.bench import Bench
from transom.testing.checks import all_checks
from transom.testing.checks.check import Check, run_check
from transom.testing.compare import PRECISIONS
from transom.testing.result import CheckResult, ConformanceResult

Report = Callable[[CheckResult, int, int], None]
"""Called after each check with its result, its number from 1 and the count."""


def run(
    backend: Backend,
    device: Device | None = None,
    *,
    seed: int | None = None,
    precision: str = "float32",
    options: Mapping[str, object] | None = None,
    only: Sequence[str] = (),
    report: Report | None = None,
) -> ConformanceResult:
    """Check a backend against the contract and the reference on one device.

    Args:
        backend: the backend object, installed or not. Its class must be importable by name, because two checks pass it
            to a fresh process.
        device: the device to run on; None: the first device of this machine for which the backend makes an offer.
        seed: the seed of all random inputs; None: a fresh one, which is in the result.
        precision: the compute precision behind exact claims: `"float32"`, `"float16"` or `"bfloat16"`. It sets the
            tolerances.
        options: options for the backend that replace the defaults.
        only: names or patterns of checks, `["state.*", "operator.MatMul"]`; empty: all.
        report: called after each check.

    Returns:
        Every check with its outcome. See `ConformanceResult.ok` and `.refused`.

    Raises:
        OptionError: an unknown precision, a pattern that matches no check, or no device that the backend offers to use.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"there is no precision {precision!r}", nearest(precision, PRECISIONS))
    chosen = choose(only)
    where = device or offered(backend)
    number = secrets.randbits(32) if seed is None else seed
    results: list[CheckResult] = []
    with Bench(backend, where, seed=number, precision=precision, options=options) as bench:
        for check in chosen:
            results.append(run_check(check, bench))
            if report is not None:
                report(results[-1], len(results), len(chosen))
    return ConformanceResult(
        backend=str(getattr(backend, "name", "?")),
        api=tuple(getattr(backend, "api", (0, 0))),
        device=asdict(where),
        precision=precision,
        options=dict(options or {}),
        seed=number,
        checks=tuple(results),
        versions=_versions(),
    )


def choose(only: Sequence[str]) -> tuple[Check, ...]:
    """The checks whose names match a pattern; without patterns, all. Raises OptionError if a pattern has no match."""
    known = all_checks()
    for pattern in only:
        if not any(fnmatch.fnmatchcase(c.name, pattern) for c in known):
            raise OptionError(f"no check is named {pattern!r}", nearest(pattern, [c.name for c in known]))
    return tuple(c for c in known if not only or any(fnmatch.fnmatchcase(c.name, p) for p in only))


def offered(backend: Backend) -> Device:
    """The first device of this machine that the backend offers to use. Raises OptionError with its refusals."""
    from transom.hardware import probe_devices

    devices = list(probe_devices())
    answers = list(backend.probe(devices))
    taken = {a.device_id for a in answers if isinstance(a, Offer)}
    for device in devices:
        if device.id in taken:
            return device
    raise OptionError(
        f"the backend {backend.name} makes no offer for any device of this machine",
        "Name a device, for example a made-up one for a backend that only compiles",
        [f"{a.device_id}: {a.reason}" for a in answers if not isinstance(a, Offer)],
    )


def _versions() -> dict[str, Any]:
    names = ("transom", "numpy", "onnx", "onnx-ir")
    return {"python": platform.python_version(), "platform": platform.platform()} | {
        name: metadata.version(name) for name in names
    }
