"""The checks of the conformance kit: one function for each requirement of the contract."""

from __future__ import annotations

from transom.testing.checks import answers, artifacts, determinism, failures, logits, operators, optional, states, walk
from transom.testing.checks.check import Check


def all_checks() -> tuple[Check, ...]:
    """Every check, including those of the registered operators, in the order of a report."""
    rooms = (answers, artifacts, operators, logits, determinism, states, optional, failures, walk)
    return tuple(check for room in rooms for check in room.checks())


__all__ = ["Check", "all_checks"]
