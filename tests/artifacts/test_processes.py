"""Several processes, some of them killed: one builds, the others wait and find; nothing broken is ever visible.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from transom.artifacts import Cache, StoredArtifact

Build = Callable[..., StoredArtifact]
Start = Callable[..., "subprocess.Popen[str]"]

BUILD = """
import sys, time
from pathlib import Path
from transom.artifacts import Cache, Origin
from transom.contract import Artifact
cache = Cache(Path(sys.argv[1]))
waited = []
with cache.building("key", lambda stage, share: waited.append(stage)) as slot:
    if slot.found:
        print("found", flush=True)
    else:
        (slot.work / "engine").write_bytes(bytes(100_000))
        print("building", flush=True)
        time.sleep(float(sys.argv[2]))
        slot.store(Artifact({"engine": slot.work / "engine", "b": b"1"}, {}), Origin("m", "b", "1"))
        print("stored", flush=True)
"""

STORE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from transom.artifacts import Cache, Origin
from transom.contract import Artifact
cache = Cache(Path(sys.argv[1]))
for n in itertools.count():
    with cache.building(f"key{n % 3}") as slot:
        files = {f"f{i}": bytes([n % 256]) * 20_000 for i in range(10)}
        slot.store(Artifact(files, {"n": str(n)}), Origin("m", "b", "1")).release()
    if n == 0:
        print("stored one", flush=True)
"""

HOLD = """
import sys
from pathlib import Path
from transom.artifacts import Cache
stored = Cache(Path(sys.argv[1])).lookup("key")
print("holding" if stored else "absent", flush=True)
sys.stdin.readline()
"""

FULL = """
import errno, sys, time
from pathlib import Path
from transom.artifacts import Cache
cache = Cache(Path(sys.argv[1]))
with cache.building("key") as slot:
    print("outside", slot.outside(OSError(errno.ENOSPC, "full")), flush=True)
    time.sleep(60)
"""


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def outside(process: subprocess.Popen[str]) -> Path:
    """The folder outside the cache that FULL reports, after its warning."""
    while not (line := first_line(process)).startswith("outside "):
        assert line, "the process ended"
    return Path(line.removeprefix("outside "))


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_the_second_process_waits_for_the_first_and_finds_its_artifact(cache: Cache, python: Start) -> None:
    first = python(BUILD, cache.root, 1.5)
    assert first_line(first) == "building"
    stages: list[str] = []
    with cache.building("key", lambda stage, share: stages.append(stage)) as slot:
        assert slot.found is not None
        assert set(slot.found.artifact.files) == {"engine", "b"}
    assert "wait" in stages
    assert "stored" in first.communicate(timeout=30)[0]


def test_other_keys_are_not_waited_for(cache: Cache, python: Start, build: Build) -> None:
    first = python(BUILD, cache.root, 60)
    assert first_line(first) == "building"
    build(cache, "other")
    kill(first)


def test_waiting_can_be_given_up(cache: Cache, python: Start) -> None:
    first = python(BUILD, cache.root, 60)
    assert first_line(first) == "building"

    def stop(stage: str, share: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), cache.building("key", stop):
        pytest.fail("two processes build the same key")
    kill(first)


def test_a_process_killed_while_it_builds_blocks_nobody_and_its_left_overs_are_swept(
    cache: Cache, python: Start, build: Build
) -> None:
    first = python(BUILD, cache.root, 60)
    assert first_line(first) == "building"
    [left] = (cache.root / "building").iterdir()
    cache.prune()
    assert left.exists()  # the process lives
    kill(first)
    assert cache.lookup("key") is None
    assert left.exists()
    assert cache.prune().bytes >= 100_000
    assert not left.exists()
    build(cache, "key")
    assert cache.lookup("key", verify="full") is not None


def test_building_sweeps_what_a_killed_process_left(cache: Cache, python: Start, build: Build) -> None:
    first = python(BUILD, cache.root, 60)
    assert first_line(first) == "building"
    kill(first)
    build(cache, "other")
    assert list((cache.root / "building").iterdir()) == []


def test_kill_9_at_any_moment_of_storing_leaves_no_entry_that_is_broken(
    cache: Cache, python: Start, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    for round in range(8):
        process = python(STORE_FOR_EVER, cache.root)
        assert first_line(process) == "stored one"
        time.sleep((seed + round * 7919) % 97 / 400)
        kill(process)
        items = cache.list()
        assert items
        for item in items:
            stored = Cache(cache.root).lookup(item.key, verify="full")
            assert stored is not None, caplog.text
            contents = {Path(str(p)).read_bytes()[0] for p in stored.artifact.files.values()}
            assert contents == {int(stored.artifact.requires["n"]) % 256}
    assert caplog.records == []
    cache.prune()
    # A folder that was made but not yet marked may belong to a living process: it is empty, and goes after an hour.
    assert all(list(folder.iterdir()) == [] for folder in (cache.root / "building").glob("*"))
    assert list((cache.root / "trash").glob("*")) == []


def test_many_processes_building_one_key_build_it_once(cache: Cache, python: Start) -> None:
    outputs = [p.communicate(timeout=60)[0].split() for p in [python(BUILD, cache.root, 0.3) for _ in range(4)]]
    assert sorted(outputs) == [["building", "stored"], ["found"], ["found"], ["found"]]
    assert cache.lookup("key", verify="full") is not None


def test_an_artifact_that_another_process_uses_is_never_evicted(cache: Cache, build: Build) -> None:
    build(cache, "key").release()
    command = [sys.executable, "-c", HOLD, str(cache.root)]
    user = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first_line(user) == "holding"
    removed = cache.clear()
    assert removed.entries == 0
    assert removed.kept == ("artifacts/key",)
    assert cache.list()[0].in_use
    kill(user)
    assert user.stdin is not None
    user.stdin.close()
    assert not cache.list()[0].in_use
    assert cache.clear().entries == 1
    assert cache.list() == []


def test_the_temporary_folder_of_a_killed_process_is_swept_by_the_next_one(
    cache: Cache, python: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    first = python(FULL, cache.root)
    left = outside(first)
    while not left.name.startswith("transom-overflow-"):
        assert left != left.parent
        left = left.parent
    second = python(FULL, cache.root.with_name("other"))
    outside(second)
    assert left.exists()
    kill(second)
    kill(first)
    third = python(FULL, cache.root.with_name("third"))
    outside(third)
    assert not left.exists()
    third.send_signal(signal.SIGINT)
    third.communicate(timeout=30)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_leaves_its_parents_temporary_folder_alone(cache: Cache, python: Start) -> None:
    script = """
import errno, os, sys
from pathlib import Path
from transom.artifacts import Cache
cache = Cache(Path(sys.argv[1]))
with cache.building("key") as slot:
    work = slot.outside(OSError(errno.ENOSPC, "full"))
    if os.fork() == 0:
        raise SystemExit(0)
    os.wait()
    print(work.exists())
"""
    assert "True" in python(script, cache.root).communicate(timeout=30)[0].splitlines()
