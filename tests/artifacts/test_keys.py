"""Keys of artifacts, hashes of content, and sizes as people write them.

Draws: any byte that changes must change the hash, of which two are equal once in 2^160.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from transom.artifacts import Cache, artifact_key, hash_file, keys, parse_size
from transom.errors import OptionError, SourceError


def old(path: Path) -> Path:
    """Let a file look as if it had been written long ago."""
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


def test_the_key_does_not_depend_on_the_order_of_mappings_and_sets() -> None:
    one = artifact_key({"graph": "g", "options": {"a": 1, "b": [1, 2]}, "features": frozenset({"avx2", "amx"})})
    two = artifact_key({"features": frozenset({"amx", "avx2"}), "options": {"b": (1, 2), "a": 1}, "graph": "g"})
    assert one == two
    assert len(one) == 40


@pytest.mark.parametrize(
    "other",
    [{"a": [2, 1]}, {"a": [1, 2], "b": None}, {"a": "12"}, {"a": ["1", "2"]}, {"a": {"1": 2}}, {"a": [1, 2.5]}, {}],
)
def test_every_difference_changes_the_key(other: dict[str, object]) -> None:
    assert artifact_key({"a": [1, 2]}) != artifact_key(other)


def test_the_format_of_the_cache_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = artifact_key({"a": 1})
    monkeypatch.setattr(keys, "FORMAT", keys.FORMAT + 1)
    assert artifact_key({"a": 1}) != before


def test_what_has_no_canonical_form_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot be part of a key"):
        artifact_key({"a": object()})
    with pytest.raises(TypeError, match="must be strings"):
        artifact_key({"a": {1: 2}})
    with pytest.raises(ValueError):
        artifact_key({"a": float("nan")})


def test_the_hash_of_a_file_sees_every_byte(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transom.artifacts.files._CHUNK", 1000)
    monkeypatch.setattr("transom.artifacts.files._PIECE", 300)
    numbers = random.Random(seed)
    data = bytearray(numbers.randbytes(numbers.randrange(2500, 9000)))
    path = tmp_path / "weights"
    path.write_bytes(data)
    shares: list[float | None] = []
    whole = hash_file(path, lambda stage, share: shares.append(share))
    assert shares[-1] == 1.0
    assert shares == sorted(shares)  # type: ignore[type-var]
    seen = {whole}
    for position in {0, 999, 1000, len(data) - 1, numbers.randrange(len(data))}:
        data[position] ^= 1
        path.write_bytes(data)
        seen.add(hash_file(path))
        data[position] ^= 1
    path.write_bytes(data + b"\0")
    seen.add(hash_file(path))
    assert len(seen) >= 6
    path.write_bytes(data)
    assert hash_file(path) == whole


def test_a_progress_call_that_raises_stops_the_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transom.artifacts.files._CHUNK", 10)
    path = tmp_path / "weights"
    path.write_bytes(bytes(1000))

    def stop(stage: str, share: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hash_file(path, stop)


def test_a_content_hash_is_computed_once_and_remembered_by_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    first = Cache(tmp_path / "cache").content_hash(old(path))
    monkeypatch.setattr(keys, "hash_file", lambda path, progress: pytest.fail("hashed again"))
    assert Cache(tmp_path / "cache").content_hash(path) == first


def test_a_file_that_changed_is_hashed_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    first = cache.content_hash(old(path))
    path.write_bytes(b"Weights")
    assert cache.content_hash(path) != first
    path.write_bytes(b"weights")
    assert cache.content_hash(path) == first


def test_a_file_written_just_now_is_not_memoized_since_its_time_may_not_show_the_next_change(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    stat = path.stat()
    first = cache.content_hash(path)
    path.write_bytes(b"Weights")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.content_hash(path) != first


def test_a_file_that_changes_while_it_is_hashed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")

    def hash_and_grow(path: Path, progress: object) -> str:
        with path.open("ab") as file:
            file.write(b"more")
        return "hash"

    monkeypatch.setattr(keys, "hash_file", hash_and_grow)
    with pytest.raises(SourceError, match="changes while it is read"):
        Cache(tmp_path / "cache").content_hash(path)


def test_hashing_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        Cache(tmp_path / "cache").content_hash(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GB", 10 * 1000**3),
        ("10 gb", 10 * 1000**3),
        ("1.5G", 1500 * 1000**2),
        ("512MiB", 512 * 1024**2),
        ("2TiB", 2 * 1024**4),
        ("7", 7),
        ("0", 0),
        ("unlimited", None),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "ten", "-1GB", "1PB", "1,5GB", "10 G i B"])
def test_a_size_that_is_none_is_an_error_with_examples(text: str) -> None:
    with pytest.raises(OptionError, match="512MiB"):
        parse_size(text, "TRANSOM_CACHE_SIZE")
