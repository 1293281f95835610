"""Bundles that were altered, cut or mixed up on the way: refused in one sentence, before anything is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import MadeUp

import transom
from transom.errors import OptionError, SourceError
from transom.runtime.bundles import BundleError


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.unlink()  # the cache may hold the same file
    path.write_bytes(content)


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])


def _link(path: Path) -> None:
    os.rename(path, path.parent.parent / "away")
    path.symlink_to(path.parent.parent / "away")


@pytest.mark.parametrize("name", ["sound/graph.onnx.data", "tokenizer.json", "golden.npz"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [(_flip, "its hash is another"), (_cut, "bytes in place of"), (Path.unlink, "is missing"), (_link, "plain file")],
    ids=["altered", "cut", "missing", "a link"],
)
def test_a_damaged_bundle_is_one_sentence_before_anything_is_opened(
    here: Any, export: Any, tmp_path: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    made = export(out=tmp_path / "made" if (tmp_path / "made").mkdir() else tmp_path / "made" / "bundle")
    here.load(made.folder).close()
    sound.calls.clear()
    damage(made.folder / name)
    (made.folder / "away").unlink(missing_ok=True)
    with pytest.raises(BundleError, match=said) as caught:
        here.load(made.folder)
    assert name in caught.value.cause
    assert "\n" not in str(caught.value)
    assert sound.calls == []


def test_a_foreign_file_is_named(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    made = export()
    (made.folder / "sound" / "more.bin").write_text("x")
    with pytest.raises(BundleError, match=r"sound/more\.bin, which is not a part of it"):
        here.load(made.folder)
    with pytest.raises(OptionError, match=r"sound/more\.bin is not a part of it"):
        export(overwrite=True)


def _edited(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transom_bundle": 2}, "is of version 2, and this Transom reads version 1"),
        ({"transom_bundle": "one"}, "is damaged"),
        ({"variants": []}, "is damaged"),
        ({"variants": [{"name": "sound"}]}, "is damaged"),
        ({"files": {}}, "is damaged"),
        ({"files": {"../outside": {"bytes": 1, "blake2b": ""}}}, "is damaged"),
        ({"files": 3}, "is damaged"),
        ({"decoder": {"family": "llama"}}, "is damaged"),
        ({"options": {}}, "is damaged"),
        ({"options": {"precision": "auto", "sparsity": "dense", "context": "12"}}, "is damaged"),
        ({"options": {"precision": "auto", "sparsity": "dense", "context": True}}, "is damaged"),
        ({"options": {"precision": "auto", "sparsity": "dense", "context": 0}}, "is damaged"),
    ],
)
def test_a_manifest_that_is_newer_or_wrong_is_refused(here: Any, export: Any, changes: Any, said: str) -> None:
    here.use(MadeUp("sound"))
    made = export()
    _edited(made.folder, **changes)
    for call in (lambda: here.load(made.folder), lambda: transom.explain(made.folder)):
        with pytest.raises(BundleError, match=said) as caught:
            call()
    assert ("pip install --upgrade transom" in caught.value.fix) == ("version 2" in said)


def test_a_manifest_that_was_cut_is_damaged_and_one_that_is_gone_leaves_no_model(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    made = export()
    path = made.folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BundleError, match="manifest"):
        here.load(made.folder)
    path.unlink()
    with pytest.raises(SourceError, match="holds no model"):
        here.load(made.folder)


def test_keys_that_a_later_version_adds_are_no_harm(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    made = export()
    with here.load(made.folder) as model:
        wanted = model.logits([1, 2, 3])
    _edited(made.folder, later={"more": 1})
    with here.load(made.folder) as model:
        assert model.report.bundle == str(made.folder)
        np.testing.assert_array_equal(model.logits([1, 2, 3]), wanted)
