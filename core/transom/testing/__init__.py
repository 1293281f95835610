"""The conformance kit: checks a backend against the contract and the reference, on your machine, in one command.

In a test file of your own repository (`pip install transom pytest`)::

    from transom.testing import BackendConformance
    from my_plugin import MyBackend

    class TestMyBackend(BackendConformance):
        backend = MyBackend()
        may_refuse = ["operator.Attention"]     # what it does not support; everything else must pass

or from a program::

    from transom.testing import run

    result = run(MyBackend(), only=["state.*"])
    print(result.text())                        # or result.to_json()

The kit checks the answers of probe, claim and check; compiling, cancelling, and artifacts in another process; every
registered operator on fresh random inputs; the logits of small random decoders in prefill, decode and ragged batches;
forking, truncating and freeing states; failed steps; limits; and random sequences of these operations. Each check
passes, fails, or is refused with the backend's own reason. `transom.testing.models.tiny_decoder` makes the decoders,
also for your own tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transom.testing.conformance import BackendConformance
    from transom.testing.result import CaseResult, CheckResult, ConformanceResult
    from transom.testing.runner import run

__all__ = ["BackendConformance", "CaseResult", "CheckResult", "ConformanceResult", "run"]

_HOMES = {
    "BackendConformance": "transom.testing.conformance",
    "CheckResult": "transom.testing.result",
    "ConformanceResult": "transom.testing.result",
    "CaseResult": "transom.testing.result",
    "run": "transom.testing.runner",
}


def __getattr__(name: str) -> Any:
    """Import on demand: only `BackendConformance` needs pytest, and the child processes need nothing from here."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
