"""Remembered facts: kept between processes, never half-written, never a reason to fail."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from transom.artifacts import Cache, JsonStore

Start = Callable[..., "subprocess.Popen[str]"]


def test_what_is_remembered_is_recalled_by_the_next_process(cache: Cache) -> None:
    cache.remember("choices", "Xeon|2026.2", {"device": "cpu", "speed": 12.5})
    assert Cache(cache.root).recall("choices", "Xeon|2026.2", dict[str, object]) == {"device": "cpu", "speed": 12.5}
    assert cache.recall("choices", "other", object) is None
    assert cache.recall("verdicts", "Xeon|2026.2", object) is None


def test_a_change_by_another_process_is_seen(tmp_path: Path) -> None:
    one, two = JsonStore(tmp_path / "n.json"), JsonStore(tmp_path / "n.json")
    one.remember("a", 1)
    assert two.recall("a", int) == 1
    one.remember("a", 2)
    assert two.recall("a", int) == 2
    two.forget("a")
    assert one.recall("a", int) is None
    two.forget("a")
    assert one.all() == {}


def test_many_processes_writing_at_once_lose_nothing(tmp_path: Path, python: Start) -> None:
    script = """
import sys
from pathlib import Path
from transom.artifacts import JsonStore
notebook = JsonStore(Path(sys.argv[1]))
for i in range(20):
    notebook.remember(f"{sys.argv[2]}-{i}", i)
assert notebook.unwritable is None
"""
    processes = [python(script, tmp_path / "n.json", name) for name in "abcd"]
    assert [p.communicate(timeout=60)[0] for p in processes] == [""] * 4
    assert len(JsonStore(tmp_path / "n.json").all()) == 80


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"1", b"[" * 100_000])
def test_a_damaged_notebook_is_empty_with_one_log_line_and_is_mended_by_the_next_fact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "n.json"
    path.write_bytes(content)
    notebook = JsonStore(path)
    assert notebook.recall("a", int) is None
    assert notebook.recall("b", int) is None
    [record] = caplog.records
    assert str(path) in record.getMessage()
    notebook.remember("a", 1)
    assert JsonStore(path).recall("a", int) == 1
    assert len(caplog.records) == 1


def test_the_oldest_facts_go_first(tmp_path: Path) -> None:
    notebook = JsonStore(tmp_path / "n.json", limit=3)
    for key in ("a", "b", "c", "a", "d"):
        notebook.remember(key, key)
    assert set(JsonStore(tmp_path / "n.json").all()) == {"c", "a", "d"}


def test_where_nothing_can_be_written_facts_last_for_this_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    notebook = JsonStore(tmp_path / "file" / "n.json")
    notebook.remember("a", 1)
    assert isinstance(notebook.unwritable, OSError)
    assert notebook.recall("a", int) == 1
    assert notebook.all() == {"a": 1}
    notebook.forget("a")
    assert notebook.recall("a", int) is None
    assert notebook.all() == {}


def test_what_is_not_json_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    notebook = JsonStore(tmp_path / "n.json")
    notebook.remember("a", 1)
    with pytest.raises(TypeError):
        notebook.remember("a", object())
    with pytest.raises(ValueError):
        notebook.remember("a", float("inf"))
    assert notebook.recall("a", int) == 1


def test_a_name_that_leads_out_of_the_cache_is_refused(cache: Cache) -> None:
    with pytest.raises(ValueError, match="not a cache key"):
        cache.remember("../outside", "a", 1)
