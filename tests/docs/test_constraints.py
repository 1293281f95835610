"""constraints.txt: versions of every dependency, within the ranges of pyproject.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
VERSIONS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNTESTED = {"v100", "bench"}
"""Extras that the environment of the tests does not have."""


def _requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    named = [*PROJECT["dependencies"], *(r for extra, rs in extras.items() if extra not in UNTESTED for r in rs)]
    return [r for r in map(Requirement, named) if r.name != PROJECT["name"] and (not r.marker or r.marker.evaluate())]


def test_every_line_names_one_version() -> None:
    assert LINES
    for line in LINES:
        assert Requirement(line).specifier, line
        assert not any(mark in line for mark in ("@", "/", "+")), line


def test_every_dependency_has_a_version_within_its_range() -> None:
    for requirement in _requirements():
        version = VERSIONS.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is missing: make constraints"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} against {version}"
