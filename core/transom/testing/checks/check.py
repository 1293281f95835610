"""The class of a check, and running one: every outcome, including an exception, becomes a result."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transom.contract import OutOfPages
from transom.testing.bench import Bench
from transom.testing.result import CaseResult, CheckResult, Failed, Outcome, Refused

Found = Sequence[CaseResult] | float | None


@dataclass(frozen=True)
class Check:
    """A named requirement for backends.

    `run` returns None, the largest normalized error, or the results of its parts. It raises Failed or Refused.
    """

    name: str
    run: Callable[[Bench], Found]

    @property
    def doc(self) -> str:
        """The requirement in words."""
        return " ".join((self.run.__doc__ or "").split())


def run_check(check: Check, bench: Bench) -> CheckResult:
    """Run one check. An exception of the backend is not raised: it becomes a failure with the exception's message."""
    started = time.perf_counter()
    part = attempt(check.name, lambda: check.run(bench))
    seconds = round(time.perf_counter() - started, 4)
    if isinstance(part, CaseResult):
        return CheckResult(check.name, part.outcome, part.reason, part.error, seconds)
    outcome: Outcome = "passed"
    for worse in ("refused", "failed"):
        if any(p.outcome == worse for p in part):
            outcome = worse
    bad = [p for p in part if p.outcome == outcome]
    reason = "" if outcome == "passed" else f"{len(bad)} of {len(part)} cases {outcome}; first: {bad[0].reason}"
    error = max((p.error for p in part if p.error is not None), default=None)
    return CheckResult(check.name, outcome, reason, error, seconds, tuple(part))


def attempt(label: str, run: Callable[[], Found]) -> CaseResult | Sequence[CaseResult]:
    """Run a part of a check, and turn an exception into a result."""
    try:
        found = run()
    except Refused as e:
        return CaseResult(label, "refused", e.reason or "refused without a reason")
    except Failed as e:
        return CaseResult(label, "failed", str(e))
    except OutOfPages as e:
        return CaseResult(
            label, "refused", f"the pool is too small for this check ({e}); give options that make it larger"
        )
    except Exception as e:  # noqa: BLE001  the code under test may raise anything, and each exception is a failure
        where = traceback.extract_tb(e.__traceback__)[-1]
        place = f"{where.filename.rsplit('/', 1)[-1]}:{where.lineno}"
        return CaseResult(label, "failed", f"{type(e).__name__}: {e} ({place})")
    if found is None or isinstance(found, float):
        return CaseResult(label, "passed", error=found)
    return found


def must_raise(
    wanted: type[BaseException] | tuple[type[BaseException], ...], what: str, run: Callable[[], object]
) -> None:
    """Raise Failed unless `run` raises `wanted`."""
    names = " or ".join(w.__name__ for w in (wanted if isinstance(wanted, tuple) else (wanted,)))
    try:
        run()
    except wanted:
        return
    except Exception as e:
        raise Failed(f"{what} must raise {names}; it raised {type(e).__name__}: {e}") from e
    raise Failed(f"{what} must raise {names}; it raised nothing")
