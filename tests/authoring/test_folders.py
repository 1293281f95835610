"""Temporary folders of artifacts: what stays for the host and what goes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from transom.authoring import folders
from transom.authoring.folders import artifact_folder, small_as_bytes


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(folders, "SMALL_FILE", 3)


def test_large_files_stay_and_small_ones_leave_no_folder(tmp_path: Path) -> None:
    with artifact_folder("transom-mine-") as folder:
        (folder / "small").write_bytes(b"abc")
        assert small_as_bytes(folder / "small") == b"abc"
    assert list(tmp_path.iterdir()) == []
    with artifact_folder("transom-mine-") as folder:
        (folder / "large").write_bytes(b"abcd")
        assert small_as_bytes(folder / "large") == folder / "large"
    assert [path.name for path in folder.iterdir()] == ["large"]
    assert folder.name.startswith("transom-mine-")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_compile_that_is_stopped_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def compile_and_stop() -> None:
        with artifact_folder("transom-mine-") as folder:
            (folder / "half").write_bytes(b"abcdef")
            raise error

    with pytest.raises(error):
        compile_and_stop()
    assert list(tmp_path.iterdir()) == []
