"""Listing, pruning, clearing, and the limit of the cache's size."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from transom.artifacts import Cache, StoredArtifact

Build = Callable[..., StoredArtifact]


def age(cache: Cache, kind: str, key: str, seconds: float) -> None:
    """Let an entry look as if it had last been used some time ago."""
    then = time.time() - seconds
    os.utime(cache.root / kind / key / ".used", (then, then))


def keys(cache: Cache) -> list[str]:
    return [item.key for item in cache.list()]


def test_the_list_shows_entries_least_recently_used_first(cache: Cache, build: Build) -> None:
    for key in ("a", "b", "c"):
        build(cache, key).release()
    cache.sources.write("print", {"tokenizer.json": "{}"})
    age(cache, "artifacts", "b", 300)
    age(cache, "artifacts", "a", 200)
    age(cache, "sources", "print", 100)
    items = cache.list()
    assert [item.key for item in items] == ["b", "a", "print", "c"]
    first = items[0]
    assert (first.kind, first.in_use, first.problem) == ("artifacts", False, "")
    assert first.bytes > 2000
    assert first.facts["backend"] == "openvino_cpu"
    assert abs(first.last_used - (time.time() - 300)) < 60
    json.dumps([{**asdict(item), "path": str(item.path)} for item in items])


def test_the_list_tells_what_is_in_use_and_what_is_broken(cache: Cache, build: Build) -> None:
    used = build(cache, "used")
    broken = build(cache, "broken")
    broken.release()
    (broken.path / "manifest.json").write_text("{")
    items = {item.key: item for item in cache.list()}
    assert items["used"].in_use
    assert "damaged" in items["broken"].problem
    used.release()
    assert not {item.key: item for item in cache.list()}["used"].in_use


def test_a_scratch_folder_counts_for_its_artifact_and_goes_with_it(cache: Cache, build: Build) -> None:
    with build(cache, "key") as stored:
        (stored.scratch / "jit").write_bytes(bytes(50_000))
    assert cache.list()[0].bytes > 52_000
    assert cache.clear().entries == 1
    assert not (cache.root / "scratch" / "key").exists()


def test_a_scratch_folder_without_its_artifact_is_listed_and_cleared(cache: Cache, build: Build) -> None:
    build(cache, "key").release()
    (cache.root / "scratch" / "gone").mkdir(parents=True)
    assert [(i.kind, i.key) for i in cache.list() if i.kind == "scratch"] == [("scratch", "gone")]
    cache.clear()
    assert keys(cache) == []


def test_storing_evicts_the_least_recently_used_down_to_the_limit(tmp_path: Path, build: Build) -> None:
    cache = Cache(tmp_path / "cache", limit=100_000)
    for key, seconds in (("a", 300), ("b", 400), ("c", 100)):
        build(cache, key, 15_000).release()
        age(cache, "artifacts", key, seconds)
    assert keys(cache) == ["b", "a", "c"]
    build(cache, "d", 15_000)
    assert keys(cache) == ["a", "c", "d"]
    assert cache.lookup("a") is not None
    build(cache, "e", 15_000)
    assert "c" not in keys(cache)
    assert cache.stats().bytes <= 100_000


def test_what_was_just_written_and_what_is_in_use_stay_even_beyond_the_limit(tmp_path: Path, build: Build) -> None:
    cache = Cache(tmp_path / "cache", limit=10_000)
    used = build(cache, "used", 8_000)
    age(cache, "artifacts", "used", 1000)
    big = build(cache, "big", 20_000)
    assert sorted(keys(cache)) == ["big", "used"]
    used.release()
    build(cache, "small", 10)
    assert sorted(keys(cache)) == ["big", "small"]
    assert big.artifact.files["model.xml"].exists()  # type: ignore[union-attr]


def test_a_limit_of_none_keeps_everything(tmp_path: Path, build: Build) -> None:
    cache = Cache(tmp_path / "cache", limit=None)
    for key in ("a", "b"):
        build(cache, key, 50_000).release()
    assert keys(cache) == ["a", "b"]
    assert cache.prune().entries == 0


def test_sources_and_golden_logits_are_evicted_by_the_same_rule(tmp_path: Path, build: Build) -> None:
    cache = Cache(tmp_path / "cache", limit=50_000)
    cache.reference_outputs.write("graph", {"logits": bytes(30_000)}).release()
    age(cache, "golden", "graph", 1000)
    build(cache, "key", 20_000)
    assert keys(cache) == ["key"]
    assert cache.reference_outputs.lookup("graph") is None


def test_pruning_takes_a_size_or_an_age(cache: Cache, build: Build) -> None:
    for key, seconds in (("a", 3000), ("b", 2000), ("c", 1000)):
        build(cache, key).release()
        age(cache, "artifacts", key, seconds)
    removed = cache.prune(unused_since=time.time() - 2500)
    assert (removed.entries, removed.kept) == (1, ())
    assert removed.bytes > 2000
    assert keys(cache) == ["b", "c"]
    cache.prune(limit=5000)
    assert keys(cache) == ["c"]
    assert cache.prune(limit=0).entries == 1


def test_clearing_forgets_everything_and_touches_only_what_is_the_caches(cache: Cache, build: Build) -> None:
    build(cache, "key").release()
    cache.sources.write("print", {"a": "1"}).release()
    cache.remember("speed", "a", 1)
    mine = cache.root / "mine.txt"
    mine.write_text("mine")
    removed = cache.clear()
    assert removed.entries == 2
    assert keys(cache) == []
    assert cache.recall("speed", "a", int) is None
    assert Cache(cache.root).recall("speed", "a", int) is None
    assert mine.exists()


def test_clearing_a_cache_that_is_not_there_makes_none(cache: Cache) -> None:
    assert cache.clear().entries == 0
    assert cache.prune().entries == 0
    assert not cache.root.exists()


def test_the_statistics_add_up(cache: Cache, build: Build) -> None:
    empty = cache.stats()
    assert (empty.exists, empty.bytes) == (False, 0)
    assert empty.free_bytes
    build(cache, "a")
    cache.reference_outputs.write("graph", {"logits": bytes(100)})
    stats = cache.stats()
    assert stats.exists
    assert stats.kinds["artifacts"].entries == 1
    assert stats.kinds["golden"].entries == 1
    assert stats.bytes == sum(item.bytes for item in cache.list()) == sum(k.bytes for k in stats.kinds.values())
    assert stats.limit_bytes == cache.limit


def test_backup_programs_are_told_to_leave_the_cache_out(cache: Cache, build: Build) -> None:
    build(cache, "a")
    assert (cache.root / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_old_left_overs_of_every_sort_are_swept_and_young_ones_are_not(cache: Cache, build: Build) -> None:
    entry = build(cache, "key").path
    cache.remember("speed", "a", 1)
    unmarked = cache.root / "building" / "unmarked"
    unmarked.mkdir()
    half = [cache.root / "remembered" / ".speed.json-1-ab", entry / ".verified.json-1-ab"]
    for file in half:
        file.write_text("{")
    (cache.root / "trash" / "old").mkdir(parents=True)
    (cache.root / "trash" / "file").write_text("")
    cache.prune()
    assert list((cache.root / "trash").iterdir()) == []
    assert unmarked.exists()
    assert all(file.exists() for file in half)
    for path in (unmarked, *half):
        os.utime(path, (1000, 1000))
    cache.prune()
    assert not unmarked.exists()
    assert not any(file.exists() for file in half)
    assert cache.lookup("key") is not None


def test_an_age_that_is_negative_evicts_nothing_young(cache: Cache, build: Build) -> None:
    build(cache, "key").release()
    assert cache.prune(unused_since=0.0).entries == 0


@pytest.mark.parametrize("kind", ["artifacts", "sources", "golden", "scratch", "building", "trash", "remembered"])
def test_a_plain_file_where_a_folder_should_be_breaks_no_listing(cache: Cache, build: Build, kind: str) -> None:
    cache.root.mkdir()
    (cache.root / kind).write_text("junk")
    assert cache.list() == []
    assert cache.stats().bytes == 0
    cache.prune()
    assert build(cache, "key").bytes == 2000
