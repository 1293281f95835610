"""The installed packages that `probe` needs, and its refusals for those that are missing or too old."""

from __future__ import annotations

import functools
import importlib.metadata
import re

from transom.contract import Device, Refusal


@functools.cache
def installed_version(package: str) -> str | None:
    """The version of an installed package, from its metadata, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, for comparisons: (2, 9) of `"2.9.1+cu128"`; () if it begins with none."""
    found = re.match(r"(\d{1,9})(?:\.(\d{1,9}))?", version)
    return tuple(int(number) for number in found.groups() if number) if found else ()


def package_refusal(
    device: Device, package: str, version: str | None, oldest: tuple[int, ...], install: str
) -> Refusal | None:
    """A refusal if a package is missing or too old; None if it can be used.

    Args:
        version: the installed version, the result of `installed_version`.
        oldest: the first two numbers of the oldest version that the backend supports; (): every version.
        install: the command that installs the package; with `-U` it also updates it.
    """
    if version is None:
        return Refusal(device.id, "missing_dep", f"the package {package} is not installed", install)
    if version_numbers(version) < oldest:
        needed = ".".join(map(str, oldest))
        reason = f"{package} {version} is installed and {needed} or newer is needed"
        return Refusal(device.id, "too_old", reason, f"{install} -U")
    return None
