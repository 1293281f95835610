"""The result of a conformance run as data for JSON. Every check is in it: passed, failed or refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["passed", "failed", "refused"]


class Failed(AssertionError):
    """The backend breaks the contract, or its outputs differ from the reference."""


class Refused(Exception):
    """The backend reported that it does not support this, with a reason. Neither a failure nor a pass."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class CaseResult:
    """One case of a check, such as one random sample of an operator."""

    label: str
    outcome: Outcome
    reason: str = ""
    """Why the case failed or was refused. For a pass, how the operator ran: `"by its body, since: …"`."""
    error: float | None = None
    """The normalized error against the reference, if numbers were compared."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check. It failed if a part failed; otherwise it is refused if a part is."""

    name: str
    outcome: Outcome
    reason: str = ""
    error: float | None = None
    """The largest normalized error of its parts."""
    seconds: float = 0.0
    parts: tuple[CaseResult, ...] = ()


@dataclass(frozen=True)
class ConformanceResult:
    """The result of a whole run. `ok` if nothing failed; `refused` lists what the backend does not support."""

    backend: str
    api: tuple[int, int]
    device: Mapping[str, Any]
    precision: str
    options: Mapping[str, Any]
    seed: int
    """Pass it to `run` to repeat the same random inputs."""
    checks: tuple[CheckResult, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.failed and bool(self.checks)

    def _with(self, outcome: Outcome) -> tuple[CheckResult, ...]:
        return tuple(c for c in self.checks if c.outcome == outcome)

    @property
    def passed(self) -> tuple[CheckResult, ...]:
        return self._with("passed")

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        return self._with("failed")

    @property
    def refused(self) -> tuple[CheckResult, ...]:
        return self._with("refused")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        counts = Counter(c.outcome for c in self.checks)
        body = {"ok": self.ok, "counts": {o: counts.get(o, 0) for o in ("passed", "failed", "refused")}}
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=_plain))
        return body | plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def text(self) -> str:
        """The human-readable result: failures and refusals with their reasons, then the counts."""
        lines = []
        for label, checks in (("FAILED", self.failed), ("refused", self.refused)):
            for check in checks:
                lines.append(f"{label}  {check.name}: {check.reason}")
                lines += [f"    {p.label}: {p.reason}" for p in check.parts if p.outcome == check.outcome]
        counts = f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.refused)} refused"
        lines.append(f"{self.backend} on {self.device.get('id')}, {self.precision}: {counts} (seed {self.seed})")
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, (frozenset, set)):
        return sorted(value)
    return str(value)
