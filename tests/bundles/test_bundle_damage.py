"""Bundles that were altered, truncated or mixed up: refused with one sentence, before anything is opened."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import MadeUp

import transom
from transom.artifacts import Cache, hash_file
from transom.bundles.manifest import BundleError, read_manifest
from transom.bundles.verification import verify_bundle
from transom.errors import OptionError, SourceError, TransomError


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
    [(_flip, "has been altered"), (_cut, "bytes in place of"), (Path.unlink, "is missing"), (_link, "plain file")],
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


OPTIONS = {"precision": "auto", "sparsity": "dense"}
DAMAGE: list[dict[str, Any]] = [
    {"transom_bundle": "one"},
    {"transom_bundle": True},
    {"variants": []},
    {"variants": [{"name": "sound"}]},
    {"files": {}},
    {"files": {"../outside": {"bytes": 1, "blake2b": ""}}},
    {"files": 3},
    {"decoder": {"family": "llama"}},
    {"options": {}},
    {"options": {**OPTIONS, "context": "12"}},
    {"options": {**OPTIONS, "context": True}},
    {"options": {**OPTIONS, "context": 0}},
]


def test_a_manifest_that_is_newer_or_wrong_is_refused(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    made = export()
    whole = (made.folder / "manifest.json").read_text()
    newer = "is of version 2, and this Transom reads version 1"
    for changes, said in [({"transom_bundle": 2, "variants": "more"}, newer), *((d, "is damaged") for d in DAMAGE)]:
        (made.folder / "manifest.json").write_text(whole)
        _edited(made.folder, **changes)
        for call in (lambda: here.load(made.folder), lambda: transom.explain(made.folder)):
            with pytest.raises(BundleError, match=said) as caught:
                call()
            assert ("pip install --upgrade transom" in caught.value.fix) == (said == newer), changes


FIDELITY = {"where": "an emulator, on cpu", "tokens": 12, "kl": 0.001, "top1": 1.0, "cosine": 0.999}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("where", 3), ("tokens", "12"), ("tokens", True), ("tokens", -1), ("kl", "0.001"), ("kl", float("nan")),
        ("kl", 10**400), ("top1", None), ("cosine", [1.0]), ("cosine", float("inf")),
    ],
)  # fmt: skip
def test_a_comparison_of_another_type_is_damage(here: Any, export: Any, key: str, value: object) -> None:
    here.use(MadeUp("sound"))
    made = export()
    [variant] = json.loads((made.folder / "manifest.json").read_text())["variants"]
    _edited(made.folder, variants=[{**variant, "fidelity": {**FIDELITY, "later": 1}}])
    assert read_manifest(made.folder).variants[0].fidelity == FIDELITY
    _edited(made.folder, variants=[{**variant, "fidelity": {**FIDELITY, key: value}}])
    assert _is_damaged(made.folder)
    missing = {name: number for name, number in FIDELITY.items() if name != key}
    _edited(made.folder, variants=[{**variant, "fidelity": missing}])
    assert _is_damaged(made.folder)


OTHER_KINDS: dict[type, tuple[Any, ...]] = {
    str: (7, ["x"], None),
    bool: ("true", 1),
    int: (float("inf"), float("nan"), 10**400, -1, 1.5, "1", True, None),
    type(None): (["x"],),
}
READ_BY_NOBODY = {"expected.file", "variants.0.memory.at.512"}
MAY_BE_NULL = {"model.license", "options.context"}


def _values(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Each value that is neither an object nor a list, with the keys that lead to it."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _values(inner, (*place, key))
    else:
        yield place, value


def _is_damaged(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except BundleError as error:
        return "is damaged" in error.cause
    return False


def test_no_value_of_a_manifest_may_be_of_another_kind(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    folder = export().folder
    whole = (folder / "manifest.json").read_text()
    tried, taken = 0, []
    for place, value in _values(json.loads(whole)):
        name = ".".join(map(str, place))
        for other in () if name in READ_BY_NOBODY else OTHER_KINDS[type(value)]:
            if other is None and name in MAY_BE_NULL:
                continue
            changed = holder = json.loads(whole)
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = other
            (folder / "manifest.json").write_text(json.dumps(changed))
            tried += 1
            if not _is_damaged(folder):
                taken.append(f"{name} = {other!r}")
    assert taken == []
    assert tried > 100
    for text in ("[" * 100_000, whole.replace("{", '{"a":' * 10_000, 1), whole.replace("512", "9" * 5000)):
        (folder / "manifest.json").write_text(text)
        assert _is_damaged(folder), text[:40]


@pytest.mark.parametrize("place", [("decoder",), ("expected", "tokens"), ("inputs",)])
def test_a_decoder_that_is_gone_is_damage_and_no_plain_graph(here: Any, export: Any, place: tuple[str, ...]) -> None:
    here.use(MadeUp("sound"))
    folder = export().folder
    holder = changed = json.loads((folder / "manifest.json").read_text())
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = {"decoder": None, "tokens": [], "inputs": {"x": ["float32", [1]]}}[place[-1]]
    (folder / "manifest.json").write_text(json.dumps(changed))
    assert _is_damaged(folder)


def test_two_variants_of_one_name_are_damage(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    folder = export().folder
    _edited(folder, variants=json.loads((folder / "manifest.json").read_text())["variants"] * 2)
    assert _is_damaged(folder)


def _replaced(folder: Path, name: str, content: bytes) -> None:
    """A file of a bundle and what the manifest says of it, as somebody does it who makes up a bundle."""
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    whole = json.loads((folder / "manifest.json").read_text())
    record = {"bytes": len(content), "blake2b": hash_file(folder / name)}
    _edited(folder, files={**whole["files"], name: record})


def test_answers_and_texts_that_are_made_up_are_one_sentence(here: Any, export: Any, tmp_path: Path) -> None:
    here.use(MadeUp("sound"))
    folder = export().folder
    with np.load(folder / "golden.npz") as stored:
        ids, logits = stored["ids"], stored["logits"]

    def npz(**arrays: Any) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    whole = npz(ids=ids, logits=logits)
    for name, contents in {
        "golden.npz": [
            b"", b"no archive", whole[:-30], npz(ids=ids), npz(ids=ids + 1, logits=logits),
            npz(ids=ids, logits=logits[:, :5]), npz(ids=ids, logits=logits.astype(str)),
        ],
        "tokenizer.transom.json": [b"", b"[]"],
        "chat_template.json": [b"", b"[]", b'{"templates": 3, "variables": {}}', b"[" * 100_000],
        "generation.json": [b"", b"[]", b"nul", b'{"eos_ids": 3}'],
    }.items():  # fmt: skip
        before = (folder / name).read_bytes()
        for content in contents:
            _replaced(folder, name, content)
            here.cache = Cache(tmp_path / f"{name}-{contents.index(content)}")
            with pytest.raises(TransomError, match=r"is damaged|cannot be read") as caught:
                here.load(folder)
            assert "\n" not in str(caught.value)
        _replaced(folder, name, before)
    here.load(folder).close()


def test_a_replay_reads_every_file_anew(here: Any, export: Any) -> None:
    """What a load remembers of a file may be wrong: disks forget bits, and tools set the time of change back."""
    here.use(MadeUp("sound"))
    folder = export().folder
    path = folder / "README.md"
    os.utime(path, (1e9, 1e9))
    here.load(folder).close()
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(bytes([content[0] ^ 1]))
    os.utime(path, (1e9, 1e9))
    with pytest.raises(BundleError, match=r"README\.md .* has been altered"):
        verify_bundle(folder, cache=here.cache)


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
    whole = json.loads((made.folder / "manifest.json").read_text())
    [variant] = whole["variants"]
    for holder in (
        whole, whole["model"], whole["decoder"], whole["decoder"]["layers"][0], whole["expected"], whole["options"],
        variant, variant["backend"], variant["target"], variant["memory"], whole["files"]["golden.npz"],
    ):  # fmt: skip
        holder["later"] = {"more": 1}
    (made.folder / "manifest.json").write_text(json.dumps(whole))
    with here.load(made.folder) as model:
        assert model.report.bundle == str(made.folder)
        np.testing.assert_array_equal(model.logits([1, 2, 3]), wanted)
