"""The checks of the conformance kit: what the contract says, one function each."""

from __future__ import annotations

from transom.testing.checks import answers, artifacts, failures, logits, operators, optional, states, walk
from transom.testing.checks.check import Check


def all_checks() -> tuple[Check, ...]:
    """Every check, those for the registered operators included, in the order in which they are worth reading."""
    rooms = (answers, artifacts, operators, logits, states, optional, failures, walk)
    return tuple(check for room in rooms for check in room.checks())


__all__ = ["Check", "all_checks"]
