"""A file system that looks like a machine's `/proc` and `/sys`, and the machine that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from transom.contract import Device

Machine = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Write files by path below a root and return the root."""

    def build(files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return build


@pytest.fixture
def host() -> Device:
    return Device("cpu", "cpu", "x86_64", memory_bytes=32 << 30, free_bytes=20 << 30, cores=8)
