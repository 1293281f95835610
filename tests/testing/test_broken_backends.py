"""The kit can fail: each backend that is wrong in one way is caught by the checks for it.

Draws: each backend is wrong by far more than the kit's tolerances, whatever the model.
"""

from __future__ import annotations

import broken_contract
import broken_numbers
import broken_optional
import pytest
from changed_reference import Changed, broken_in

from transom.contract import Device
from transom.testing import run
from transom.testing.checks import all_checks

CPU = Device("cpu", "cpu", "x86_64", 8 << 30)
BROKEN = [*broken_in(broken_numbers), *broken_in(broken_contract), *broken_in(broken_optional)]
CASES = [(backend, check) for backend in BROKEN for check in backend.caught_by]


@pytest.mark.parametrize(("backend", "check"), CASES, ids=[f"{b.__name__}-{c}" for b, c in CASES])
def test_broken_backend_is_caught(backend: type[Changed], check: str, seed: int) -> None:
    result = run(backend(), CPU, only=[check], seed=seed)
    (found,) = result.checks
    assert found.outcome == "failed", f"{check} says {found.outcome}: {found.reason}"
    assert found.reason
    assert not result.ok


def test_unchanged_backend_passes_all_of_those_checks(seed: int) -> None:
    result = run(Changed(), CPU, only=sorted({check for _, check in CASES}), seed=seed)
    assert result.ok, result.text()
    assert not result.refused, result.text()


def test_a_session_that_saves_as_it_should_passes(seed: int) -> None:
    result = run(broken_optional.Saving(), CPU, only=["state.saving"], seed=seed)
    assert result.ok, result.text()
    assert not result.refused, result.text()


def test_every_kind_of_check_has_a_backend_that_it_catches() -> None:
    """A check that nothing has ever failed proves nothing. Those of one kind stand for each other."""
    caught = {check for _, check in CASES} | {"state.pages", "limits.out_of_pages", "session.limits"}  # test_kit.py
    stand_in = {"operator.": "operator.Add", "logits.": "logits.gqa", "walk.": "walk.gqa"}
    weak = [
        check.name for check in all_checks()
        if check.name not in caught and not any(check.name.startswith(k) and v in caught for k, v in stand_in.items())
    ]  # fmt: skip
    assert not weak
