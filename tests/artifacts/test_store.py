"""What goes into the cache comes out: artifacts, their manifests, verdicts, scratch folders, sources, golden logits."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from transom.artifacts import Cache, Origin, StoredArtifact
from transom.contract import Artifact, Device
from transom.errors import OptionError

Build = Callable[..., StoredArtifact]


def contents(artifact: Artifact) -> dict[str, bytes]:
    return {name: Path(path).read_bytes() for name, path in artifact.files.items() if isinstance(path, Path)}


def test_an_artifact_comes_back_with_every_file_as_a_path(cache: Cache, build: Build, origin: Origin) -> None:
    stored = build(cache, "key")
    found = cache.lookup("key")
    assert found is not None
    assert set(found.artifact.files) == {"model.xml", "weights/0.bin"}
    assert all(isinstance(path, Path) for path in found.artifact.files.values())
    assert contents(found.artifact) == contents(stored.artifact)
    assert found.artifact.requires == {"openvino": "2026.2", "arch": "x86_64"}
    assert found.artifact.notes == ("bf16",)
    assert found.origin == origin
    assert found.bytes == 2000
    assert not found.temporary
    assert cache.warnings == []


def test_the_manifest_is_plain_json_with_sizes_and_hashes(cache: Cache, build: Build) -> None:
    manifest = json.loads((build(cache, "key").path / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert manifest["key"] == "key"
    assert manifest["files"]["weights/0.bin"]["bytes"] == 1000
    assert len(manifest["files"]["weights/0.bin"]["blake2b"]) == 40
    assert manifest["facts"]["backend"] == "openvino_cpu"
    assert manifest["facts"]["device"]["identity"] == "Xeon"
    assert manifest["facts"]["requires"]["openvino"] == "2026.2"


def test_what_was_never_stored_is_absent_and_making_a_cache_touches_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path / "cache")
    assert cache.lookup("key") is None
    assert cache.sources.lookup("key") is None
    assert cache.recall("speed", "key", int) is None
    assert cache.list() == []
    assert not (tmp_path / "cache").exists()
    assert caplog.records == []


def test_files_in_the_work_folder_are_moved_and_others_are_copied(cache: Cache, origin: Origin, tmp_path: Path) -> None:
    outside = tmp_path / "engine"
    outside.write_bytes(b"outside")
    with cache.building("key") as slot:
        (slot.work / "deep").mkdir()
        inside = slot.work / "deep" / "engine.tmp"
        inside.write_bytes(b"inside")
        (slot.work / "left-over").write_bytes(bytes(100))
        inode = inside.stat().st_ino
        stored = slot.store(Artifact({"a/engine": inside, "b": outside, "c": inside}, {}), origin)
    assert contents(stored.artifact) == {"a/engine": b"inside", "b": b"outside", "c": b"inside"}
    assert stored.artifact.files["a/engine"].stat().st_ino == inode  # type: ignore[union-attr]
    assert outside.exists()
    assert sorted(p.name for p in stored.path.iterdir()) == [".used", "files", "manifest.json"]
    assert list((cache.root / "building").iterdir()) == []


def test_an_artifact_without_files_is_stored_too(cache: Cache, origin: Origin) -> None:
    with cache.building("key") as slot:
        slot.store(Artifact({}, {"a": "1"}), origin)
    found = cache.lookup("key")
    assert found is not None
    assert found.artifact.requires == {"a": "1"}


def test_leaving_without_storing_leaves_nothing(cache: Cache) -> None:
    def compile_in_vain() -> None:
        with cache.building("key") as slot:
            (slot.work / "half").write_bytes(b"half")
            raise RuntimeError("compile")

    with pytest.raises(RuntimeError, match="compile"):
        compile_in_vain()
    assert cache.lookup("key") is None
    assert list((cache.root / "building").iterdir()) == []
    assert list((cache.root / "trash").iterdir()) == []


def test_cancelling_while_storing_leaves_nothing(cache: Cache, origin: Origin) -> None:
    def stop(stage: str, share: float | None) -> None:
        assert stage == "store"
        if share:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), cache.building("key") as slot:
        slot.store(Artifact({"a": b"1", "b": b"2"}, {}), origin, stop)
    assert cache.lookup("key") is None
    assert list((cache.root / "building").iterdir()) == []


def test_storing_again_replaces_the_entry_and_the_old_one_stays_readable(cache: Cache, origin: Origin) -> None:
    with cache.building("key") as slot:
        slot.store(Artifact({"a": b"old"}, {}), origin)
    with cache.building("key") as slot:
        old = slot.found
        assert old is not None
        with Path(old.artifact.files["a"]).open("rb") as file:  # type: ignore[arg-type]
            slot.store(Artifact({"a": b"new"}, {}), origin)
            assert file.read() == b"old"
    found = cache.lookup("key")
    assert found is not None
    assert contents(found.artifact) == {"a": b"new"}
    assert list((cache.root / "trash").iterdir()) == []


@pytest.mark.parametrize("name", ["../a", "/a", "a/../b", "", ".", "a//b", "a\\b", "C:a", "a\0b", "./a", "a/"])
def test_a_file_name_that_leads_out_of_the_artifact_is_refused(cache: Cache, origin: Origin, name: str) -> None:
    with pytest.raises(ValueError), cache.building("key") as slot:
        slot.store(Artifact({name: b""}, {}), origin)
    assert cache.lookup("key") is None


@pytest.mark.parametrize("key", ["", "..", ".hidden", "a/b", "a\0", "x" * 129, "ä"])
def test_a_key_that_is_no_folder_name_is_refused(cache: Cache, key: str) -> None:
    with pytest.raises(ValueError, match="not a cache key"):
        cache.lookup(key)
    with pytest.raises(ValueError, match="not a cache key"), cache.building(key):
        pass
    with pytest.raises(ValueError, match="not a cache key"):
        cache.sources.write(key, {})


def test_files_that_differ_by_case_alone_are_refused(cache: Cache, origin: Origin) -> None:
    with pytest.raises(ValueError, match="case"), cache.building("key") as slot:
        slot.store(Artifact({"a": b"", "A": b""}, {}), origin)


def test_an_origin_that_is_not_json_is_refused_before_anything_is_written(cache: Cache) -> None:
    odd = Origin("m", "b", "1", options={"callback": print})
    with pytest.raises(TypeError, match="print"), cache.building("key") as slot:
        slot.store(Artifact({}, {}), odd)


def test_origin_on_a_device_takes_what_identifies_it() -> None:
    device = Device("cuda", "cuda:0", "sm_89", 24 << 30, identity="GPU-1", name="RTX", drivers={"cuda": "12.8"})
    origin = Origin.on(device, source="m", backend="b", backend_version="1", options={"o": 1})
    assert origin.device == {"kind": "cuda", "id": "cuda:0", "arch": "sm_89", "identity": "GPU-1", "name": "RTX"}
    assert origin.drivers == {"cuda": "12.8"}


def test_looking_up_counts_as_use(cache: Cache, build: Build) -> None:
    stored = build(cache, "key")
    mark = stored.path / ".used"
    os.utime(mark, (1000, 1000))
    assert cache.lookup("key", verify="sizes") is not None
    assert mark.stat().st_mtime > 1_000_000


def test_verdicts_live_and_die_with_the_artifact(cache: Cache, build: Build) -> None:
    stored = build(cache, "key")
    assert stored.verdict("Xeon|2026.2", dict[str, object]) is None
    stored.record_verdict("Xeon|2026.2", {"ok": True, "difference": 1e-3})
    stored.record_verdict("Xeon|2026.3", {"ok": False})
    again = Cache(cache.root).lookup("key")
    assert again is not None
    assert again.verdict("Xeon|2026.2", dict[str, object]) == {"ok": True, "difference": 1e-3}
    assert set(again.verdicts) == {"Xeon|2026.2", "Xeon|2026.3"}
    stored.discard("rebuild")
    assert build(cache, "key").verdicts == {}


def test_the_scratch_folder_lasts_and_is_discarded_with_a_bad_artifact(cache: Cache, build: Build) -> None:
    stored = build(cache, "key")
    (stored.scratch / "jit.cache").write_bytes(b"jit")
    again = cache.lookup("key")
    assert again is not None
    assert (again.scratch / "jit.cache").read_bytes() == b"jit"
    again.discard("the driver is new")
    assert cache.lookup("key") is None
    assert list(build(cache, "key").scratch.iterdir()) == []


def test_discarding_says_why_in_one_line(cache: Cache, build: Build, caplog: pytest.LogCaptureFixture) -> None:
    build(cache, "key").discard("built for openvino 2026.1, found 2026.2")
    [record] = caplog.records
    assert record.name == "transom.artifacts"
    assert "built for openvino 2026.1, found 2026.2" in record.getMessage()


def test_sources_and_golden_logits_are_named_blobs(cache: Cache) -> None:
    cache.sources.write("print", {"tokenizer.json": "{}", "template": "é", "raw": b"\xff"}, {"context": 2048})
    cache.reference_outputs.write("graph", {"logits.npy": b"123"})
    source = cache.sources.lookup("print")
    assert source is not None
    assert source.read("template") == "é".encode()
    assert source.files["tokenizer.json"].read_text() == "{}"
    assert source.manifest.facts == {"context": 2048}
    with pytest.raises(KeyError):
        source.read("other")
    golden = cache.reference_outputs.lookup("graph")
    assert golden is not None
    assert golden.read("logits.npy") == b"123"
    assert cache.reference_outputs.lookup("print") is None


def test_writing_equal_blobs_again_keeps_the_entry_that_others_have_open(cache: Cache) -> None:
    first = cache.sources.write("print", {"a": "1"})
    inode = first.path.stat().st_ino
    assert cache.sources.write("print", {"a": "1"}).path.stat().st_ino == inode
    assert cache.sources.write("print", {"a": "2"}).path.stat().st_ino != inode
    assert list((cache.root / "building").iterdir()) == []


def test_the_environment_names_the_default_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("TRANSOM_CACHE_SIZE", "3GB")
    cache = Cache.default()
    assert (cache.root, cache.limit) == (tmp_path / "mine", 3 * 1000**3)
    assert Cache.default() is cache
    monkeypatch.delenv("TRANSOM_CACHE")
    monkeypatch.delenv("TRANSOM_CACHE_SIZE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert "transom" in str(Cache.default().root)
    assert Cache.default().limit == 20 * 1000**3
    monkeypatch.setenv("TRANSOM_CACHE_SIZE", "a lot")
    with pytest.raises(OptionError, match="TRANSOM_CACHE_SIZE"):
        Cache.default()


def test_a_lookup_imports_nothing_that_a_warm_start_can_do_without(cache: Cache, build: Build) -> None:
    build(cache, "key")
    script = (
        "import sys; from pathlib import Path; from transom.artifacts import Cache\n"
        "assert Cache(Path(sys.argv[1])).lookup('key', verify='sizes')\n"
        "unwanted = {'filelock', 'numpy', 'onnx', 'tempfile', 'transom.artifacts.housekeeping'}\n"
        "print(sorted(unwanted & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, cache.root], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("outside", [False, True], ids=["in the cache", "in the temporary folder"])
def test_an_artifact_is_removed_where_it_lies_with_its_scratch_folder_unless_another_uses_it(
    tmp_path: Path, build: Build, outside: bool
) -> None:
    cache = Cache(tmp_path / "cache")
    if outside:
        (tmp_path / "cache").write_text("not a folder")
    stored = build(cache, "key")
    assert stored.temporary == outside
    path, scratch = stored.path, stored.scratch
    other = cache.lookup("key")
    assert other is not None
    assert not stored.remove()
    assert path.is_dir()
    assert other.remove()
    assert not path.exists()
    assert not scratch.exists()
    assert not other.remove()
    assert cache.lookup("key") is None


@pytest.mark.skipif(sys.platform == "win32", reason="no modes")
def test_only_its_owner_can_enter_the_cache(tmp_path: Path) -> None:
    root = tmp_path / "new" / "cache"
    old = os.umask(0)
    try:
        cache = Cache(root)
        cache.remember("speeds", "key", 1)
        cache.recall("speeds", "key", int)
    finally:
        os.umask(old)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (root, root.parent, root / "remembered")] == [0o700] * 3
