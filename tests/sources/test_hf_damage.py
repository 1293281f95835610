"""A damaged or foreign Hugging Face directory gives one clear error: what is wrong, where, and the fix.

Draws: what is damaged must be seen whatever the weights are; sound ones agree to 1e-4, a hundred times float32's
rounding.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import assert_agrees, tiny
from safetensors.numpy import load_file, save_file

from transom.errors import SourceError
from transom.graph.builder import WEIGHT_META
from transom.sources import resolve
from transom.sources.hf import HfSource
from transom.sources.safetensors_file import open_safetensors

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    tiny("llama", folder, shared_rng("a tiny llama"))
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def failure(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        resolve(folder).open(folder)
    assert caught.value.fix
    return str(caught.value)


def set_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    stored = load_file(folder / "model.safetensors")
    edit(stored)
    save_file(stored, folder / "model.safetensors")


def change_header(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_a_file_shorter_than_its_header(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "cut short" in failure(folder)


def test_a_file_cut_short_in_its_data(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "cut short" in failure(folder)


def test_a_header_of_more_than_100_megabytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + path.read_bytes()[8:])
    assert "header of 100000001 bytes" in failure(folder)


def test_a_header_that_is_no_json(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:10] = b"[["
    path.write_bytes(data)
    assert "not JSON" in failure(folder)


def test_a_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in failure(folder)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"data_offsets": [0, 1 << 40]}, ("spans", Q)),
        ({"data_offsets": [16384, 0]}, ("impossible", Q)),
        ({"data_offsets": [-5, 10]}, ("impossible", Q)),
        ({"data_offsets": "x"}, ("does not describe", Q)),
        ({"shape": [1 << 60, 1 << 60]}, ("impossible", Q)),
        ({"shape": None}, ("impossible", Q)),
        ({"dtype": "F12"}, ("F12", Q)),
        ({"dtype": "F16"}, ("needs", Q)),
    ],
)
def test_a_header_entry_that_cannot_be(folder: Path, entry: dict[str, Any], words: tuple[str, ...]) -> None:
    change_header(folder, lambda header: header[Q].update(entry))
    text = failure(folder)
    assert all(word in text for word in words)


def test_offsets_beyond_the_end(folder: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        begin, end = header[Q]["data_offsets"]
        header[Q]["data_offsets"] = [begin + (1 << 30), end + (1 << 30)]

    change_header(folder, edit)
    text = failure(folder)
    assert "cut short" in text
    assert Q in text


def test_tensors_that_overlap(folder: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        other = next(n for n, e in header.items() if n not in (Q, "__metadata__") and e["shape"] == header[Q]["shape"])
        header[Q]["data_offsets"] = header[other]["data_offsets"]

    change_header(folder, edit)
    text = failure(folder)
    assert "overlap" in text
    assert Q in text


def test_random_damage_of_the_header_never_crashes(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    ways_out: list[str] = []
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(0, 8 + length, 3):
            broken[at] = rng.integers(0, 256)
        path.write_bytes(broken)
        try:
            open_safetensors(path)
        except SourceError as error:
            ways_out.append(error.fix)
    assert len(ways_out) > 200
    assert all(ways_out)


def test_a_missing_tensor(folder: Path) -> None:
    change(folder, lambda stored: stored.pop(Q))
    assert f"The tensor {Q} is missing" in failure(folder)


def test_a_tensor_of_the_wrong_shape(folder: Path) -> None:
    change(folder, lambda stored: stored.update({Q: np.zeros((64, 32), np.float32)}))
    text = failure(folder)
    assert Q in text
    assert "[64, 32]" in text
    assert "[64, 64]" in text


def test_a_tensor_of_integers_in_a_plain_checkpoint(folder: Path) -> None:
    change(folder, lambda stored: stored.update({Q: np.zeros((64, 64), np.int8)}))
    text = failure(folder)
    assert Q in text
    assert "I8" in text


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(folder: Path, dtype: Any, value: float) -> None:
    def edit(stored: dict[str, Any]) -> None:
        stored[Q] = stored[Q].astype(dtype)
        stored[Q][5, 7] = value

    change(folder, edit)
    graph = resolve(folder).open(folder).graph
    weights = [v.meta[WEIGHT_META] for v in graph.model.graph.initializers.values() if WEIGHT_META in v.meta]
    kind = "NaN" if np.isnan(value) else "infinite"
    with pytest.raises(SourceError, match=rf"q_proj\.weight in .* has {kind} values \(1 of 4096\)"):
        [weight.load() for weight in weights]


def test_unused_tensors_are_reported(folder: Path) -> None:
    change(folder, lambda stored: stored.update({"model.layers.0.self_attn.q_norm.weight": np.zeros(16, np.float32)}))
    assert any("1 tensors of the checkpoint are not used" in note for note in resolve(folder).open(folder).notes)


def shard(folder: Path) -> list[Path]:
    stored = load_file(folder / "model.safetensors")
    names = list(stored)
    table = {}
    paths = []
    for i in range(3):
        path = folder / f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: stored[name] for name in names[i::3]}, path)
        table |= dict.fromkeys(names[i::3], path.name)
        paths.append(path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return paths


def test_a_sharded_checkpoint_loads(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = tiny("qwen3", tmp_path, rng)
    shard(tmp_path)
    assert_agrees(resolve(tmp_path).open(tmp_path).graph, checkpoint.model, rng)


def test_a_missing_shard_is_named(folder: Path) -> None:
    paths = shard(folder)
    paths[1].unlink()
    text = failure(folder)
    assert "1 of 3" in text
    assert paths[1].name in text


def test_shards_without_an_index_are_not_guessed(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json" in failure(folder)


def test_an_index_that_points_outside_is_refused(folder: Path) -> None:
    shard(folder)
    table = {"weight_map": {Q: "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    assert "points outside" in failure(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(folder: Path, text: str) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "index.json" in failure(folder)


def test_pickled_weights_are_refused_with_how_to_convert(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    text = failure(folder)
    assert "pytorch_model.bin" in text
    assert "save_pretrained" in text


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights" in failure(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in failure(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in failure(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "relu6"),
        ("rope_parameters", {"rope_type": "polar", "rope_theta": 1e4}),
        ("num_local_experts", 8),
        ("layer_types", None),
    ],
)
def test_settings_that_the_family_does_not_honor_are_refused_by_name_and_value(
    folder: Path, key: str, value: Any
) -> None:
    if key == "layer_types":
        set_config(folder, architectures=["Qwen2ForCausalLM"], layer_types=["linear_attention", "full_attention"])
        words = ("layer_types", "linear_attention")
    else:
        set_config(folder, **{key: value})
        words = (key.split("_")[0], str(value["rope_type"] if isinstance(value, dict) else value))
    text = failure(folder)
    assert all(word in text for word in words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 1e30),
        ("num_attention_heads", "four"),
        ("num_key_value_heads", 3),
        ("hidden_size", True),
        ("vocab_size", -1),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "yes"),
        ("head_dim", 15),
    ],
)
def test_impossible_values_are_refused_by_name(folder: Path, key: str, value: Any) -> None:
    set_config(folder, **{key: value})
    assert f"{key} in {folder / 'config.json'} is {value!r}, not " in failure(folder)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_size_is_named(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    assert f"does not contain {key}" in failure(folder)


def test_an_unknown_architecture_lists_the_known_ones(folder: Path) -> None:
    set_config(folder, architectures=["HyenaForCausalLM"], model_type="hyena")
    with pytest.raises(SourceError) as caught:
        HfSource().open(folder)
    text = str(caught.value)
    for word in ('"HyenaForCausalLM"', "llama", "qwen3", "phi3"):
        assert word in text


def test_a_config_that_names_no_architecture(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    assert "model_type" in failure(folder)
