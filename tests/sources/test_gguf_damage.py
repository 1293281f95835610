"""A damaged GGUF file gives one clear error: what is wrong, in which file and tensor, and the fix.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import tiny, write_gguf

from transom.errors import SourceError
from transom.graph.builder import WEIGHT_META
from transom.sources import resolve
from transom.sources.gguf_file import open_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Path:
    """A sound file of a tiny llama."""
    folder = tmp_path_factory.mktemp("sound")
    write_gguf(tiny("llama", folder / "hf", shared_rng("a tiny llama")), folder / "tiny.gguf", "Q8_0")
    return folder / "tiny.gguf"


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Callable[[Callable[[bytearray], Any]], Path]:
    def make(change: Callable[[bytearray], Any]) -> Path:
        data = bytearray(model.read_bytes())
        changed = change(data)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(changed if isinstance(changed, bytes | bytearray) else data)
        return path

    return make


def failure(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        resolve(path).open(path)
    assert caught.value.fix
    return str(caught.value)


def entry_at(data: bytes, name: str) -> int:
    """Where the tensor's entry goes on after its name: rank, dimensions, type, offset."""
    encoded = name.encode()
    return data.index(struct.pack("<Q", len(encoded)) + encoded) + 8 + len(encoded)


Q = "blk.1.attn_q.weight"


def patch(name: str, at: int, form: str, *values: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        struct.pack_into(form, data, entry_at(data, name) + at, *values)

    return change


def test_a_sound_file_opens(model: Path) -> None:
    resolve(model).open(model).graph.check()


def test_wrong_magic(damaged: Any) -> None:
    text = failure(damaged(lambda d: b"<!DOCTYPE html>" + bytes(d)))
    assert "not a GGUF file" in text
    assert "<!DO" in text


def test_an_empty_file(damaged: Any) -> None:
    assert "not a GGUF file" in failure(damaged(lambda d: b""))


@pytest.mark.parametrize("size", [3, 4, 23])
def test_a_file_shorter_than_its_header(damaged: Any, size: int) -> None:
    assert "cut short" in failure(damaged(lambda d: bytes(d[:size])))


@pytest.mark.parametrize("share", [0.02, 0.2, 0.9, 0.999])
def test_a_file_cut_short_anywhere(damaged: Any, share: float) -> None:
    assert "cut short" in failure(damaged(lambda d: bytes(d[: int(len(d) * share)])))


def test_every_cut_of_the_header_is_an_error_of_ours(model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    for size in range(24, 2000, 37):
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:size])
        with pytest.raises(SourceError):
            open_gguf(path)


def test_random_damage_of_the_header_is_refused_or_does_no_harm(
    model: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    data = model.read_bytes()
    end = entry_at(data, Q) + 64
    ways_out: list[str] = []
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(4, end, rng.integers(1, 4)):
            broken[at] = rng.integers(0, 256)
        path = tmp_path / "broken.gguf"
        path.write_bytes(broken)
        try:
            opened = resolve(path).open(path)
        except SourceError as error:
            ways_out.append(error.fix)
        else:
            opened.graph.check()
    assert 200 < len(ways_out) < 300
    assert all(ways_out)


def test_big_endian(damaged: Any) -> None:
    assert "big-endian" in failure(damaged(lambda d: struct.pack_into(">I", d, 4, 3)))


@pytest.mark.parametrize("version", [1, 4])
def test_unknown_version(damaged: Any, version: int) -> None:
    assert f"version {version}" in failure(damaged(lambda d: struct.pack_into("<I", d, 4, version)))


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "settings"])
def test_absurd_counts(damaged: Any, at: int) -> None:
    assert "more than fit" in failure(damaged(lambda d: struct.pack_into("<Q", d, at, 1 << 62)))


def test_offset_beyond_the_end(damaged: Any) -> None:
    text = failure(damaged(patch(Q, 4 + 16 + 4, "<Q", 1 << 40)))
    assert "cut short" in text
    assert Q in text


def test_offset_that_overlaps_another_tensor(damaged: Any) -> None:
    text = failure(damaged(patch(Q, 4 + 16 + 4, "<Q", 0)))
    assert "overlap" in text
    assert Q in text


def test_misaligned_offset(damaged: Any) -> None:
    def change(data: bytearray) -> None:
        at = entry_at(data, Q) + 4 + 16 + 4
        struct.pack_into("<Q", data, at, struct.unpack_from("<Q", data, at)[0] + 1)

    text = failure(damaged(change))
    assert "not a multiple of 32" in text
    assert Q in text


def test_absurd_dimensions(damaged: Any) -> None:
    text = failure(damaged(patch(Q, 4, "<QQ", 1 << 60, 1 << 60)))
    assert "impossible shape" in text
    assert Q in text


def test_wrong_shape(damaged: Any) -> None:
    text = failure(damaged(patch(Q, 4, "<QQ", 32, 128)))
    assert Q in text
    assert "[128, 32]" in text
    assert "[64, 64]" in text


def test_unknown_type(damaged: Any) -> None:
    text = failure(damaged(patch(Q, 4 + 16, "<I", 99)))
    assert "type 99" in text
    assert Q in text


def test_missing_tensor(damaged: Any) -> None:
    def change(data: bytearray) -> None:
        at = entry_at(data, Q)
        data[at - 1 : at] = b"X"  # weight -> weighX

    text = failure(damaged(change))
    assert f"The tensor {Q} is missing" in text


def test_the_same_tensor_twice(damaged: Any) -> None:
    def change(data: bytearray) -> None:
        at = entry_at(data, "blk.0.attn_q.weight")
        data[at - len("blk.0.attn_q.weight") : at] = b"blk.1.attn_q.weight"

    assert "twice" in failure(damaged(change))


def test_nan_weights_are_found_when_the_weights_are_read(model: Path, damaged: Any) -> None:
    tensor = open_gguf(model).tensors[Q]
    raw = tensor.data.tobytes()

    def change(data: bytearray) -> None:
        at = bytes(data).index(raw)
        data[at : at + 2] = b"\xff\x7f"  # the first scale

    path = damaged(change)
    graph = resolve(path).open(path).graph
    weights = [v.meta[WEIGHT_META] for v in graph.model.graph.initializers.values() if WEIGHT_META in v.meta]
    with pytest.raises(SourceError, match=r"blk\.1\.attn_q\.weight.*NaN"):
        [weight.load() for weight in weights]


def with_metadata(tmp_path: Path, rng: np.random.Generator, extra: dict[str, Any]) -> Path:
    write_gguf(tiny("llama", tmp_path / "hf", rng), tmp_path / "tiny.gguf", extra=extra)
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (".expert_count", 8),
        (".rope.scaling.type", "polar"),
        (".attention.causal", False),
        (".logit_scale", 0.5),
        (".attention.value_length", 32),
    ],
)
def test_settings_that_no_family_honors_are_refused_by_name(
    tmp_path: Path, rng: np.random.Generator, key: str, value: Any
) -> None:
    text = failure(with_metadata(tmp_path, rng, {key: value}))
    assert f"llama{key}" in text
    assert str(value) in text


@pytest.mark.parametrize(
    ("key", "value"), [(".block_count", 1 << 30), (".attention.head_count", 0), (".attention.head_count_kv", 3)]
)
def test_impossible_sizes_are_refused_by_name(tmp_path: Path, rng: np.random.Generator, key: str, value: int) -> None:
    assert f"llama{key}" in failure(with_metadata(tmp_path, rng, {key: value}))


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "hyena")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = failure(tmp_path / "x.gguf")
    for word in ('"hyena"', "llama", "qwen3", "gemma3"):
        assert word in text


def weights_of(path: Path) -> dict[str, Any]:
    initializers = resolve(path).open(path).graph.model.graph.initializers
    return {name: value.meta[WEIGHT_META].load() for name, value in initializers.items() if WEIGHT_META in value.meta}


def split(tmp_path: Path, rng: np.random.Generator) -> list[Path]:
    """A tiny model in three parts, as llama-gguf-split writes them."""
    write_gguf(tiny("llama", tmp_path / "hf", rng), tmp_path / "whole.gguf")
    whole = open_gguf(tmp_path / "whole.gguf")
    names = list(whole.tensors)
    paths = []
    for i in range(3):
        path = tmp_path / f"parts-{i + 1:05d}-of-00003.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in whole.metadata.items():
            if i == 0 and key != "general.architecture":
                add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
                add(key, value)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(names))
        for name in names[i::3]:
            tensor = whole.tensors[name]
            writer.add_tensor(name, np.array(tensor.data.view(np.float32).reshape(tensor.shape)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_a_split_model_loads_from_any_of_its_parts_and_from_its_folder(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    paths = split(tmp_path, rng)
    whole = weights_of(tmp_path / "whole.gguf")
    (tmp_path / "whole.gguf").unlink()
    for path in (*paths, tmp_path):
        parts = weights_of(path)
        assert parts.keys() == whole.keys()
        for name, values in whole.items():
            np.testing.assert_array_equal(parts[name], values, err_msg=name)


def test_a_split_model_names_the_part_that_is_missing(tmp_path: Path, rng: np.random.Generator) -> None:
    paths = split(tmp_path, rng)
    paths[1].unlink()
    assert paths[1].name in failure(paths[0])


def test_parts_of_different_models_are_not_mixed(tmp_path: Path, rng: np.random.Generator) -> None:
    paths = split(tmp_path, rng)
    paths[2].write_bytes((tmp_path / "whole.gguf").read_bytes())
    assert "not part 3" in failure(paths[0])
