"""What the cache says is read as the type that its reader expects: anything else counts as absent, and is made again.

Draws: which damages are tried. Each is to be met in the same way.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from made_up import MadeUp
from structural_damage import damages, kind_of, value_at

from transom.artifacts.entries import ArtifactFacts, CorruptEntry, EntryManifest, _Verified
from transom.artifacts.json_store import JsonStore
from transom.artifacts.keys import KnownHash
from transom.hardware import intel
from transom.preparation import cached_source, heads
from transom.preparation.compiled import Checked, verdict_text
from transom.signature import Decoder
from transom.text import ChatTemplate, GenerationDefaults
from transom.text.tokenizer import _Header
from transom.typed import WrongType, typed

NOT_JSON = (b"", b"\xff\xfe{}", b'{"a": "\xff"}', b"{", b"[" * 100_000, b'{"a": 1e400, "a": }', b"1" * 5000)
DECODER = {
    "family": "llama", "vocabulary": 9, "hidden": 4, "context": 8, "parameters": 1, "weight_bytes": 4,
    "layers": [{"q_heads": 2, "kv_heads": 1, "head_dim": 2, "value_dim": 2, "sliding_window": 0}],
}  # fmt: skip
DEVICE = {
    "id": "GPU", "name": "Arc", "type": "DISCRETE", "architecture": "arch=v1", "memory": 5, "capabilities": ["FP16"],
    "driver": "1", "uuid": "u",
}  # fmt: skip
NUMBERS = {"kl_mean": 0.1, "kl_max": 0.2, "correlation_min": 1.0, "top1": 1.0, "max_abs": 0.5}
NOTES: dict[str, tuple[Any, Any]] = {
    "a content hash": (KnownHash, {"mark": "1:2:3", "hash": "ab"}),
    "a fingerprint": (str, "ab"),
    "a failure": (str, "It crashed"),
    "a speed": (float, 12.5),
    "a sound template": (bool, True),
    "a tried plugin": (bool, True),
    "calibrated heads": (heads._Kept, {"heads": [[1.0, 0.0], [2.5, 1.0]]}),
    "measured heads": (dict[str, list[float]], {"0.1": [0.5, 0.25]}),
    "a verdict": (Checked, {"checked": True, "positions": 3, "text": "good", **NUMBERS}),
    "no check": (Checked, {"checked": False, "reason": "switched off", "ran_only": True}),
    "verified files": (_Verified, {"files": {"w": [1, 2, 3, 4]}, "samples": {"w": [[0, "ab"]]}}),
    "Intel devices": (intel._Kept, {"key": ["2026.4"], "answer": [DEVICE]}),
    "an artifact": (
        ArtifactFacts,
        {
            "source": "m", "backend": "b", "backend_version": "1", "device": {"id": "cpu"}, "drivers": {"kernel": "6"},
            "options": {"threads": 4}, "requires": {"context": "8"}, "notes": ["a note"],
            "ingredients": {"exact": False, "divergence": 0.1, "decomposed": ["a"], "sparsity": "dense"},
        },
    ),
    "a source": (
        cached_source._Facts,
        {
            "name": "m", "kind": "gguf", "notes": ["a"], "decoder": "{}", "graph_digest": "ab", "foreign": False,
            "inputs": {"x": ["float32", []]},
        },
    ),
    "a decoder": (Decoder, DECODER),
    "generation defaults": (GenerationDefaults, {"eos_ids": [1, 2], "bos_id": 3, "sample": True, "stop": ["a"]}),
    "a tokenizer": (
        _Header,
        {"format": "transom-tokenizer", "version": 1, "ids": {"bos": 1, "add_bos": True}, "vocabulary_size": 9},
    ),
}  # fmt: skip
ANYTHING = {("an artifact", ("options", "threads"))}
"""Places of any JSON value."""


@pytest.mark.parametrize("name", NOTES)
def test_no_note_is_believed_with_a_value_of_another_kind(name: str) -> None:
    expected, sound = NOTES[name]
    typed(expected, sound)
    refused = 0
    for damage in damages(sound):
        try:
            typed(expected, damage.document)
        except ValueError:  # WrongType, or what a record says of its values
            refused += 1
            continue
        if (name, damage.place) in ANYTHING or damage.what in ("missing", "one key more", "cut short", "longer"):
            continue
        old, new = value_at(sound, damage.place), value_at(damage.document, damage.place)
        assert new is None or kind_of(new) == kind_of(old), str(damage)
        assert not (isinstance(new, float) and isinstance(old, int)), str(damage)
    assert refused >= 10


def test_chat_templates_are_texts() -> None:
    sound = {"templates": {"default": "{{ 1 }}"}, "variables": {"bos_token": "<s>", "n": [1]}}
    assert ChatTemplate.from_json(sound).names == ["default"]
    for broken in (7, [], {}, {**sound, "templates": {}}, {**sound, "templates": {"a": 1}}, {**sound, "more": 1}):
        with pytest.raises(WrongType):
            ChatTemplate.from_json(broken)


def test_a_verdict_is_told_whatever_it_lacks() -> None:
    verdicts: list[Checked] = [{"checked": True}, {"checked": True, "text": "good"}, {"checked": False}]
    assert [verdict_text(v) for v in [*verdicts, None]] == ["passed", "passed, good", "", ""]


def test_a_value_that_lies_too_deep_to_be_written_does_not_keep_others_from_it(tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    store = JsonStore(path)
    path.write_text('{"deep": ' + "[" * 900 + "]" * 900 + "}")
    assert store.recall("deep", str) is None
    store.remember("a", 1)
    assert JsonStore(path).recall("a", int) == 1


@pytest.mark.parametrize("content", NOT_JSON, ids=range(len(NOT_JSON)))
def test_a_manifest_that_is_no_json_is_corrupt(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptEntry):
        EntryManifest.read(tmp_path)


# ---------------------------------------------------------------------------------------------------------- whole loads


def _loaded(here: Any) -> tuple[list[int], bool]:
    """Tokens of a load, and whether the cache had the model. The policy for attention looks for remembered heads."""
    with here.load(sparsity="balanced") as model:
        return list(model.generate("ab", max_new_tokens=4, temperature=0).token_ids), model.report.cache_hit


@pytest.fixture
def kept(here: Any) -> tuple[list[int], list[Path]]:
    """The tokens of a sound load, and the documents in the cache that no hash covers."""
    here.use(MadeUp("sound"))
    expected, _ = _loaded(here)
    assert _loaded(here) == (expected, True)
    notes = sorted((here.cache.root / "remembered").glob("*.json"))
    assert {path.name for path in notes} == {"fingerprints.json", "hashes.json"}
    entries = [p for kind in ("artifacts", "sources", "golden") for p in (here.cache.root / kind).glob("*/*.json")]
    assert {p.name for p in entries} == {"manifest.json", "verified.json", "verdicts.json"}
    return expected, [*notes, *entries]


def test_a_load_makes_every_damaged_note_again(here: Any, kept: Any, dice: random.Random) -> None:
    expected, paths = kept
    for path in paths:
        path.write_text(json.dumps(dice.choice(list(damages(json.loads(path.read_text())))).document))
    assert _loaded(here)[0] == expected
    assert _loaded(here) == (expected, True)


@pytest.mark.sweep
@pytest.mark.seeds(4122286574, 805699298)
def test_a_load_survives_each_damage_of_a_note(here: Any, kept: Any, dice: random.Random) -> None:
    expected, paths = kept
    for path in paths:
        if not path.exists():  # an entry that was made again, under the same key
            continue
        for damage in dice.sample(list(damages(json.loads(path.read_text()))), 5):
            path.write_text(json.dumps(damage.document))
            assert _loaded(here)[0] == expected, f"{path}: {damage}"
