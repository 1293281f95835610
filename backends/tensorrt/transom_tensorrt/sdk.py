"""The two SDKs: `tensorrt-rtx`, which builds for cards that are not present, and classic `tensorrt`.

Both have the same Python API as far as this backend uses it. Versions are read from installed packages; only `library`
imports the libraries themselves, when something is built or loaded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

from transom.authoring.packages import installed_version, version_numbers

RTX, CLASSIC = "tensorrt-rtx", "tensorrt"
PACKAGES = {
    RTX: ("tensorrt-rtx", "tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu12"),
    CLASSIC: ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}
"""Distribution names, by SDK."""
MODULES = {RTX: "tensorrt_rtx", CLASSIC: "tensorrt"}
OLDEST = {RTX: (1, 7), CLASSIC: (10, 15)}
"""The oldest versions that have layers for attention, lengths and cache updates."""
SERVED = {RTX: (75, 80, 86, 89, 120, 121), CLASSIC: (80, 86, 89, 90, 100, 103, 120, 121)}
"""Supported architectures; 89 for sm_89. Classic TensorRT also runs on sm_75, but without fused attention."""


@dataclass(frozen=True)
class Sdk:
    """An installed SDK."""

    name: str
    version: str
    cuda: int = 12
    """The major version of CUDA that it needs."""

    @property
    def crosses(self) -> bool:
        """Whether it builds for cards that are not present."""
        return self.name == RTX

    @property
    def old(self) -> bool:
        return version_numbers(self.version) < OLDEST[self.name]


@functools.cache
def installed() -> tuple[Sdk, ...]:
    """The installed SDKs. PyPI's package `tensorrt`, which only downloads another one, does not count."""
    found = []
    for name, packages in PACKAGES.items():
        versions = {package: v for package in packages if (v := installed_version(package)) is not None}
        if versions and _has_module(packages, MODULES[name]):
            cuda = 13 if any(package.endswith("cu13") for package in versions) else 12
            found.append(Sdk(name, next(iter(versions.values())), cuda))
    return tuple(found)


def _has_module(packages: tuple[str, ...], module: str) -> bool:
    """Whether one of the packages contains the module; `find_spec` might find an unrelated module of that name."""
    for package in packages:
        try:
            files = importlib.metadata.distribution(package).files or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        if any(str(f).startswith(f"{module}/") for f in files):
            return True
    return False


def library(name: str) -> Any:
    """The module of an SDK.

    Raises:
        MissingExtra: it cannot be imported.
    """
    from transom.errors import MissingExtra

    try:
        return importlib.import_module(MODULES[name])
    except (ImportError, OSError) as e:
        raise MissingExtra(f"The library {name} cannot be imported: {e}", "tensorrt") from e
