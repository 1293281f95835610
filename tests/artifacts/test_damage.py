"""A corrupt or foreign entry is absent: one log line, removed, and built again.

Draws: what is compared must be equal, whatever the bytes are.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from structural_damage import damages

from transom.artifacts import Cache, StoredArtifact, files
from transom.artifacts.entries import CorruptEntry, EntryManifest, FileRecord
from transom.artifacts.samples import PIECE, PIECES, same_samples, take_samples

Build = Callable[..., StoredArtifact]
Damage = Callable[[Path], object]


def edit(entry: Path, **changes: object) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps(manifest | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    numbers = random.Random(bytes(data))  # what is in the files is random, and so is the bit
    data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
    path.write_bytes(data)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def turn_into_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def point_elsewhere(entry: Path) -> None:
    target = entry / "files" / "model.xml"
    copy = entry.parent.parent / "elsewhere"
    shutil.copy(target, copy)
    target.unlink()
    target.symlink_to(copy)


DAMAGES: dict[str, Damage] = {
    "cut manifest": lambda e: os.truncate(e / "manifest.json", 40),
    "empty manifest": lambda e: os.truncate(e / "manifest.json", 0),
    "manifest of zeros": lambda e: (e / "manifest.json").write_bytes(bytes(500)),
    "manifest is a list": lambda e: (e / "manifest.json").write_text("[]"),
    "manifest too deep": lambda e: (e / "manifest.json").write_text("[" * 100_000),
    "manifest not utf-8": lambda e: (e / "manifest.json").write_bytes(b'{"format": "\xff"}'),
    "manifest is a folder": lambda e: turn_into_folder(e / "manifest.json"),
    "no manifest": lambda e: (e / "manifest.json").unlink(),
    "files is a number": lambda e: edit(e, files=1),
    "no facts": lambda e: edit(e, facts=None),
    "other format": lambda e: edit(e, format=99),
    "other key": lambda e: edit(e, key="other"),
    "path out of the entry": lambda e: edit(e, files={"../manifest.json": {"bytes": 1, "blake2b": "0"}}),
    "missing file": lambda e: (e / "files" / "weights" / "0.bin").unlink(),
    "manifest names no file": lambda e: edit(e, files={}),
    "missing folder": lambda e: shutil.rmtree(e / "files"),
    "cut file": lambda e: os.truncate(e / "files" / "model.xml", 999),
    "longer file": lambda e: os.truncate(e / "files" / "model.xml", 1001),
    "flipped bit": lambda e: flip(e / "files" / "weights" / "0.bin"),
    "file is a link": point_elsewhere,
    "no mark": lambda e: (e / ".used").unlink(),
    "empty folder": empty,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_entry_is_absent_with_one_log_line_and_is_built_again(
    cache: Cache, build: Build, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = build(cache, "key").path
    DAMAGES[name](path)
    assert cache.lookup("key") is None
    [record] = caplog.records
    assert record.name == "transom.artifacts"
    assert record.levelname == "WARNING"
    assert "artifacts/key" in record.getMessage()
    assert "it was removed" in record.getMessage()
    assert not path.exists()
    assert list((cache.root / "trash").iterdir()) == []
    assert cache.lookup("key") is None
    assert len(caplog.records) == 1
    build(cache, "key")
    assert cache.lookup("key", verify="full") is not None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("decoder", [{"layers": 2}, None])
def test_no_damage_of_a_manifest_goes_unseen(tmp_path: Path, decoder: object) -> None:
    """A fact of another value is found too, if its type may be."""
    written = EntryManifest("key", 12.5, {"a/b": FileRecord(1, "ab")}, {"decoder": decoder, "notes": ["é"], "n": 1})
    sound = json.loads(written.to_json())
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(sound))
    assert EntryManifest.read(tmp_path) == written
    count = 0
    for damage in damages(sound):
        if json.dumps(damage.document) == json.dumps(sound):
            continue
        path.write_text(json.dumps(damage.document))
        with pytest.raises(CorruptEntry):
            EntryManifest.read(tmp_path)
        count += 1
    assert count > 100


def test_a_damaged_source_is_absent_too(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    flip(cache.sources.write("print", {"tokenizer.json": "{}"}).files["tokenizer.json"])
    assert cache.sources.lookup("print") is None
    assert len(caplog.records) == 1


def test_contents_are_hashed_on_first_use_and_after_a_change_and_not_otherwise(
    cache: Cache, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(cache, "key").path
    hashed: list[str] = []

    def counting(path: Path, progress: object = None) -> str:
        hashed.append(path.name)
        return files.hash_file(path)

    monkeypatch.setattr("transom.artifacts.entries.hash_file", counting)
    assert Cache(cache.root).lookup("key", verify="sizes") is not None
    assert hashed == []
    assert Cache(cache.root).lookup("key") is not None
    assert len(hashed) == 2
    assert Cache(cache.root).lookup("key") is not None
    assert len(hashed) == 2
    assert Cache(cache.root).lookup("key", verify="full") is not None
    assert len(hashed) == 4
    os.utime(path / "files" / "model.xml", (1000, 1000))
    assert Cache(cache.root).lookup("key") is not None
    assert len(hashed) == 6


def test_a_damaged_record_of_the_hashing_means_hashing_again(cache: Cache, build: Build) -> None:
    path = build(cache, "key").path
    assert cache.lookup("key") is not None
    (path / "verified.json").write_text("{")
    flip(path / "files" / "model.xml")
    assert Cache(cache.root).lookup("key") is None


def _written_again(path: Path) -> None:
    """Another bit, and the old times."""
    stat = path.stat()
    flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _replaced(path: Path) -> None:
    """Another file of the same size under the name, with the old times."""
    stat = path.stat()
    other = path.with_name("other")
    shutil.copy(path, other)
    flip(other)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


def _within_a_second(path: Path) -> None:
    """Another bit, in the same second."""
    stat = path.stat()
    flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns // 10**9 * 10**9 + (stat.st_mtime_ns + 1) % 10**9))


@pytest.mark.parametrize("alter", [_written_again, _replaced, _within_a_second])
def test_a_change_that_hides_behind_size_and_time_is_found(
    alter: Callable[[Path], None], cache: Cache, build: Build
) -> None:
    path = build(cache, "key").path / "files" / "model.xml"
    assert cache.lookup("key") is not None
    alter(path)
    assert Cache(cache.root).lookup("key") is None


def _unnoticed(entry: Path, change: Callable[[Path], None]) -> None:
    """A change that the file system does not record."""
    path = entry / "files" / "model.xml"
    change(path)
    noted = json.loads((entry / "verified.json").read_text())
    stat = path.stat()
    noted["files"]["model.xml"] = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    (entry / "verified.json").write_text(json.dumps(noted))


def test_a_change_that_the_file_system_does_not_record_is_found_in_a_small_file(cache: Cache, build: Build) -> None:
    entry = build(cache, "key").path
    assert cache.lookup("key") is not None
    _unnoticed(entry, lambda path: None)
    assert Cache(cache.root).lookup("key") is not None
    _unnoticed(entry, flip)
    assert Cache(cache.root).lookup("key") is None


def test_a_change_that_the_file_system_does_not_record_is_found_in_a_large_file_by_its_samples(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    large = tmp_path / "large"
    large.write_bytes(rng.bytes(3_000_001))
    samples = take_samples(large)
    assert same_samples(large, samples)
    assert len(samples) in (PIECES - 2, PIECES - 1, PIECES)
    assert {offset for offset, _ in samples} >= {0, 3_000_001 // PIECE * PIECE}
    data = bytearray(large.read_bytes())
    for offset, _ in samples:
        other = bytearray(data)
        other[offset] ^= 1
        large.write_bytes(other)
        assert not same_samples(large, samples)
    large.write_bytes(bytes(len(data)))  # such as a file whose blocks were never written
    assert not same_samples(large, samples)


def test_a_full_check_finds_what_samples_miss(cache: Cache, rng: np.random.Generator) -> None:
    content = bytearray(rng.bytes(3_000_000))
    entry = cache.sources.write("print", {"model.bin": bytes(content)}).path
    assert cache.sources.lookup("print") is not None
    sampled = {offset for offset, _ in json.loads((entry / "verified.json").read_text())["samples"]["model.bin"]}
    missed = next(offset for offset in range(0, len(content), PIECE) if offset not in sampled)
    content[missed] ^= 1
    path = entry / "files" / "model.bin"
    path.write_bytes(content)
    noted = json.loads((entry / "verified.json").read_text())
    stat = path.stat()
    noted["files"]["model.bin"] = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    (entry / "verified.json").write_text(json.dumps(noted))
    assert Cache(cache.root).sources.lookup("print") is not None
    assert Cache(cache.root).sources.lookup("print", verify="full") is None


def test_an_entry_that_another_process_rebuilt_meanwhile_is_left_alone(cache: Cache, build: Build) -> None:
    stale = build(cache, "key")
    stale.discard("stale")
    rebuilt = build(cache, "key")
    assert not stale._entry._lock.is_at(stale.path)
    assert rebuilt._entry._lock.is_at(rebuilt.path)


def test_a_plain_file_in_the_place_of_an_entry_is_replaced(cache: Cache, build: Build) -> None:
    (cache.root / "artifacts").mkdir(parents=True)
    (cache.root / "artifacts" / "key").write_text("junk")
    assert cache.lookup("key") is None
    build(cache, "key")
    assert cache.lookup("key") is not None


def test_foreign_files_in_the_cache_folder_harm_nothing(cache: Cache, build: Build) -> None:
    build(cache, "key")
    (cache.root / "notes.txt").write_text("mine")
    (cache.root / "artifacts" / "README").write_text("mine")
    assert cache.lookup("key") is not None
    assert len(cache.list()) >= 1
    cache.clear()
    assert (cache.root / "notes.txt").exists()
