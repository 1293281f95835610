"""A cache that cannot be written: the run goes on outside of it with one warning; only housekeeping raises."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from transom.artifacts import Cache, Origin, StoredArtifact, entries, files
from transom.contract import Artifact
from transom.errors import CacheError

Build = Callable[..., StoredArtifact]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, so that a test sees what is left there."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fill_disk(monkeypatch: pytest.MonkeyPatch, *roots: Path, room: int = 0) -> None:
    """Let every write below the roots fail as on a full disk, once `room` bytes have been written."""
    left = dict.fromkeys(roots, room)
    write = files.write_durably

    def limited(path: Path, data: bytes) -> None:
        for root in left:
            if path.is_relative_to(root):
                left[root] -= len(data)
                if left[root] < 0:
                    path.write_bytes(data[: len(data) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(entries, "write_durably", limited)
    monkeypatch.setattr(files, "write_durably", limited)


@pytest.mark.parametrize("room", [0, 1000, 2000])
def test_on_a_full_disk_the_artifact_is_kept_outside_for_this_run_with_one_warning(
    cache: Cache,
    build: Build,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: int,
) -> None:
    fill_disk(monkeypatch, cache.root, room=room)
    stored = build(cache, "key")
    assert stored.temporary
    assert stored.path.is_relative_to(temporary)
    assert stored.scratch.is_relative_to(temporary)
    found = cache.lookup("key", verify="full")
    assert found is not None
    assert found.temporary
    stored.record_verdict("here", {"ok": True})
    assert found.verdict("here", dict[str, bool]) == {"ok": True}
    second = build(cache, "other")
    assert second.temporary
    cache.sources.write("print", {"tokenizer.json": "{}"})
    assert cache.sources.lookup("print") is not None
    cache.remember("speed", "a", 1)
    assert cache.recall("speed", "a", int) == 1
    [record] = caplog.records
    assert "No space left on device" in record.getMessage()
    assert "TRANSOM_CACHE" in record.getMessage()
    assert cache.warnings == [record.getMessage()]
    assert list((cache.root / "building").iterdir()) == []
    assert Cache(cache.root).lookup("key") is None


def test_the_temporary_folder_goes_with_the_cache_and_the_last_artifact_in_it(
    tmp_path: Path, build: Build, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    fill_disk(monkeypatch, root)
    stored = build(Cache(root), "key")
    gc.collect()
    assert stored.artifact.files["model.xml"].exists()  # type: ignore[union-attr]
    del stored
    gc.collect()
    assert list(temporary.iterdir()) == []
    assert Cache(root).lookup("key") is None


def test_files_that_were_moved_before_the_disk_was_full_are_not_lost(
    cache: Cache, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cache.building("key") as slot:
        engine = slot.work / "engine"
        engine.write_bytes(b"engine")
        fill_disk(monkeypatch, cache.root)
        stored = slot.store(Artifact({"engine": engine, "small": b"1"}, {}), origin)
    assert stored.temporary
    assert Path(str(stored.artifact.files["engine"])).read_bytes() == b"engine"
    assert not list((cache.root / "building").iterdir())


def test_a_compiler_that_met_a_full_disk_gets_a_work_folder_outside(
    cache: Cache, origin: Origin, temporary: Path
) -> None:
    with cache.building("key") as slot:
        (slot.work / "half").write_bytes(b"half")
        work = slot.outside(OSError(errno.ENOSPC, "No space left on device"))
        assert work.is_relative_to(temporary)
        assert slot.work == work
        (work / "engine").write_bytes(b"engine")
        stored = slot.store(Artifact({"engine": work / "engine"}, {}), origin)
    assert stored.temporary
    assert len(cache.warnings) == 1
    assert not list((cache.root / "building").iterdir())


def test_no_room_in_either_place_is_an_error_that_names_both(
    cache: Cache, build: Build, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, cache.root, temporary)
    with pytest.raises(CacheError, match="No space left") as caught:
        build(cache, "key")
    assert str(cache.root) in caught.value.cause
    assert str(temporary) in caught.value.cause
    assert "TRANSOM_CACHE" in caught.value.fix
    assert list((cache.root / "building").iterdir()) == []


def test_a_missing_file_of_the_backend_is_not_blamed_on_the_disk_for_long(cache: Cache, origin: Origin) -> None:
    with pytest.raises(CacheError, match="No such file"), cache.building("key") as slot:
        slot.store(Artifact({"engine": Path("/nowhere/engine")}, {}), origin)


@pytest.mark.parametrize("place", ["cache", "cache/inside", "null"])
def test_a_cache_folder_that_is_no_folder_is_a_warning_for_load_and_an_error_for_housekeeping(
    tmp_path: Path, build: Build, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    (tmp_path / "cache").write_text("a file")
    root = Path("/dev/null") if place == "null" and os.path.exists("/dev/null") else tmp_path / place
    cache = Cache(root)
    assert cache.lookup("key") is None
    assert cache.sources.lookup("key") is None
    assert cache.list() == []
    assert cache.stats().bytes == 0
    assert build(cache, "key").temporary
    cache.remember("speed", "a", 1)
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert "irectory" in cache.warnings[0]
    with pytest.raises(CacheError, match=str(root)) as caught:
        cache.require_writable()
    assert "TRANSOM_CACHE" in caught.value.fix
    assert root.exists() == (place != "cache/inside")
    if place != "cache/inside":  # what is not there needs no housekeeping
        with pytest.raises(CacheError):
            cache.prune()
        with pytest.raises(CacheError):
            cache.clear()


def test_a_cache_that_can_only_be_read_is_still_read(
    cache: Cache, build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build(cache, "key")
    real_open = os.open

    def read_only(path: object, flags: int, *rest: object, **more: object) -> int:
        if str(path).startswith(str(cache.root)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real_open(path, flags, *rest, **more)  # type: ignore[arg-type]

    def refuse(path: object, *rest: object, **more: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    fill_disk(monkeypatch, cache.root)
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "utime", refuse)
    fresh = Cache(cache.root)
    assert fresh.lookup("key") is not None
    with fresh.building("key") as slot:
        assert slot.found is not None
        assert not slot.found.temporary
    assert caplog.records == []
    assert fresh.warnings == []


ON_TINY_DISK = """
import json, logging, subprocess, sys, tempfile
from pathlib import Path
root, lines = Path(sys.argv[1]), []
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", root], check=True)
logging.getLogger("transom.artifacts").addHandler(handler := logging.Handler())
handler.emit = lambda record: lines.append(record.getMessage())
from transom.artifacts import Cache, Origin
from transom.contract import Artifact
origin = Origin("m", "b", "1")
def build(cache, key, size):
    with cache.building(key) as slot:
        return slot.store(Artifact({"w": b"x" * size}, {}), origin)
cache = Cache(root / "cache")
small = build(cache, "small", 50_000)
big = build(cache, "big", 500_000)
with cache.building("spilled") as slot:
    try:
        (slot.work / "engine").write_bytes(b"x" * 500_000)
        error = None
    except OSError as e:
        error = e.strerror
        (slot.outside(e) / "engine").write_bytes(b"x" * 500_000)
    spilled = slot.store(Artifact({"engine": slot.work / "engine"}, {}), origin)
again = build(cache, "again", 50_000)
try:
    with (root / "fill").open("wb", buffering=0) as f:
        while True: f.write(b"x" * 4096)
except OSError as e:
    filled = e.strerror
full = build(cache, "full", 10)
small.release(), again.release()  # an open file keeps a disk from becoming read-only
subprocess.run(["mount", "-o", "remount,ro", root], check=True)
ro = Cache(root / "cache")
found = ro.lookup("small")
other = build(ro, "other", 10)
print(json.dumps({
    "small": small.temporary, "big": big.temporary, "error": error, "spilled": spilled.temporary,
    "filled": filled,
    "again": again.temporary, "full": full.temporary, "found": found is not None and not found.temporary,
    "other": other.temporary, "warnings": cache.warnings, "ro": ro.warnings, "lines": lines,
    "left": [p.name for p in (root / "cache" / "building").iterdir()],
}))
"""


def test_on_a_real_tiny_disk_that_fills_up_and_becomes_read_only_every_run_goes_on(
    tmp_path: Path, temporary: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which(command[0]) is None:
        pytest.skip("this system has no unshare")
    allowed = subprocess.run([*command, "true"], capture_output=True, text=True)
    if allowed.returncode and "not permitted" in allowed.stderr:
        pytest.skip(f"this system lets no user mount a disk of his own: {allowed.stderr}")
    assert allowed.returncode == 0, allowed.stderr
    done = subprocess.run(
        [*command, sys.executable, "-c", ON_TINY_DISK, disk],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["small"] is False
    assert result["big"] is True
    assert result["error"] == "No space left on device"
    assert result["spilled"] is True
    assert result["filled"] == "No space left on device"
    assert result["again"] is False
    assert result["full"] is True
    assert result["found"] is True
    assert result["other"] is True
    assert len(result["warnings"]) == 1
    assert "No space left" in result["warnings"][0]
    assert "Read-only" in result["ro"][0]
    assert result["lines"] == [*result["warnings"], *result["ro"]]
    assert result["left"] == []
    assert list(temporary.iterdir()) == []


AT_FILE_LIMIT = """
import resource, sys
from pathlib import Path
from transom.artifacts import Cache, Origin
from transom.contract import Artifact
from transom.errors import CacheError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cache = Cache(Path(sys.argv[1]))
try:
    with cache.building("key") as slot:
        slot.store(Artifact({"w": bytes(200_000)}, {}), Origin("m", "b", "1"))
except CacheError as error:
    print(error)
print(list((cache.root / "building").iterdir()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of a file")
def test_a_write_that_the_system_refuses_everywhere_ends_in_one_clear_error(tmp_path: Path, temporary: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_FILE_LIMIT, tmp_path / "cache"],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert list(temporary.iterdir()) == []
