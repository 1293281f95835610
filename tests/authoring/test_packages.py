"""Packages that are missing or too old are refused with the command that installs or updates them."""

from __future__ import annotations

import pytest

from transom.authoring.packages import installed_version, package_refusal, version_numbers
from transom.contract import Device

CPU = Device("cpu", "cpu", "x86_64", 2**30)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.9.1+cu128", (2, 9)), ("10.15.1.116", (10, 15)), ("3", (3,)), ("3rc1", (3,)), ("unknown", ()), ("", ())],
)
def test_versions_compare_by_their_first_two_numbers(version: str, expected: tuple[int, ...]) -> None:
    assert version_numbers(version) == expected


@pytest.mark.parametrize(
    ("version", "oldest", "expected"),
    [
        (None, (2, 0), ("missing_dep", "the package engine is not installed", "pip install engine")),
        ("1.9", (2, 0), ("too_old", "engine 1.9 is installed and 2.0 or newer is needed", "pip install engine -U")),
        ("2.0", (2, 0), None),
        ("0.1", (), None),
    ],
)
def test_a_missing_or_old_package_is_refused(
    version: str | None, oldest: tuple[int, ...], expected: tuple[str, str, str] | None
) -> None:
    refusal = package_refusal(CPU, "engine", version, oldest, "pip install engine")
    assert (refusal and (refusal.code, refusal.reason, refusal.fix)) == expected


def test_versions_come_from_the_metadata_of_installed_packages() -> None:
    assert installed_version("pytest") == pytest.__version__
    assert installed_version("no-such-package-here") is None
