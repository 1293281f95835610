"""Finding the source of a spec, and clear errors if there is none.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import add_tokenizer, tiny, write_gguf

from transom.errors import SourceError
from transom.sources import located, resolve, sources


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Path:
    """A folder with a Hugging Face directory `hf` and a file `tiny.gguf`."""
    folder = tmp_path_factory.mktemp("models")
    write_gguf(tiny("llama", folder / "hf", shared_rng("a tiny llama")), folder / "tiny.gguf")
    add_tokenizer(folder / "hf")
    return folder


def failure(spec: Any) -> str:
    with pytest.raises(SourceError) as caught:
        resolve(spec).open(spec)
    assert caught.value.fix
    return str(caught.value)


def test_paths_as_text_as_path_and_as_pathlike(models: Path) -> None:
    class Elsewhere:
        def __fspath__(self) -> str:
            return str(models / "tiny.gguf")

    for spec in (str(models / "tiny.gguf"), models / "tiny.gguf", Elsewhere()):
        assert resolve(spec).kind == "gguf"
        assert resolve(spec).open(spec).name == "Tiny"
    assert resolve(models / "hf").kind == "hf"
    assert resolve(str(models / "hf") + os.sep).kind == "hf"


def test_the_home_directory_is_expanded(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(models))
    assert resolve("~/tiny.gguf").open("~/tiny.gguf").kind == "gguf"
    assert resolve("~/hf").open("~/hf").kind == "hf"


def test_a_gguf_file_of_another_name(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "sha256-12ab"  # as ollama keeps them
    path.write_bytes((models / "tiny.gguf").read_bytes())
    assert resolve(path).kind == "gguf"


def test_a_directory_with_one_gguf_file(models: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    (tmp_path / "tiny.gguf").write_bytes((models / "tiny.gguf").read_bytes())
    assert resolve(tmp_path).open(tmp_path).kind == "gguf"


def test_a_directory_with_several_gguf_files_asks_which(models: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes((models / "tiny.gguf").read_bytes())
    text = failure(tmp_path)
    assert "2 GGUF models: a.gguf, b.gguf" in text


@pytest.mark.parametrize("manifest", ['{"transom_bundle": 1}', '{"transom_bundle": 1, "tra'])
def test_a_bundle_is_called_one_whole_or_damaged(models: Path, tmp_path: Path, manifest: str) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "manifest.json").write_text(manifest)
    text = failure(tmp_path)
    assert text == f"{tmp_path} is a bundle, which is compiled already. Give the model that it was made from."
    (tmp_path / "manifest.json").write_text("{}")
    assert "holds no model" in failure(tmp_path)


def test_no_such_path(models: Path) -> None:
    text = failure(models / "nothing" / "here.gguf")
    assert "There is no" in text
    assert ".gguf" in text


def test_a_misspelt_path_gets_the_nearest_name(models: Path) -> None:
    assert 'Did you mean "tiny.gguf"' in failure(models / "tyny.gguf")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "meta-llama/Llama-3.2-1B", "org/model-v1.0"])
def test_a_name_of_the_hub_is_explained_where_only_paths_are_read(name: str) -> None:
    with pytest.raises(SourceError) as caught:
        resolve(name)
    assert caught.value.cause == f"There is no directory {name} here"
    assert f"transom pull {name}" in caught.value.fix


@pytest.mark.parametrize("path", ["models/tiny.gguf", "models/tiny.Q4_K_M.GGUF", "models/tiny.onnx"])
def test_a_missing_file_in_a_folder_is_no_name_of_the_hub(path: str) -> None:
    with pytest.raises(SourceError) as caught:
        resolve(path)
    assert "transom pull" not in caught.value.fix


@pytest.mark.parametrize("reads", [resolve, located])
def test_an_address_is_not_downloaded(reads: Any) -> None:
    with pytest.raises(SourceError) as caught:
        reads("https://example.com/org/model.gguf")
    assert caught.value.cause.startswith(
        "https://example.com/org/model.gguf is an address, and Transom downloads models"
    )
    assert "Download the file" in caught.value.fix


@pytest.mark.parametrize(
    ("settings", "of"), [('{"base_model_name_or_path": "org/base"}', " of org/base"), ("{}", ""), ("[", ""), ("[]", "")]
)
def test_a_folder_with_an_adapter_is_told_from_a_model(tmp_path: Path, settings: str, of: str) -> None:
    (tmp_path / "adapter_config.json").write_text(settings)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError) as caught:
        resolve(tmp_path)
    assert caught.value.cause == f"{tmp_path} is an adapter (LoRA){of}, not a whole model"
    assert "Merge it into its base model" in caught.value.fix


def test_an_empty_path() -> None:
    assert "empty" in failure("")


@pytest.mark.parametrize("name", ["pipe", "pipe.gguf", "pipe.onnx"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in failure(tmp_path / name)
    assert "not a regular file" in failure("/dev/null")


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_manifest_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    assert "holds no model" in failure(tmp_path)


def test_an_empty_directory(tmp_path: Path) -> None:
    assert "is empty" in failure(tmp_path)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    text = failure(tmp_path)
    assert "holds no model" in text
    assert "notes.txt" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.bin", b"PK\x03\x04....", "pickled"),
        ("model.pt", b"\x80\x02}q\x00.", "safetensors"),
        ("model.bin", b"lmgg\x01", "GGML"),
        ("model.bin", b"<html>", "web page"),
        ("model.bin", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("model.bin", b"", "empty"),
        ("model.txt", b"once upon a time", "not a model"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "directory"),
    ],
)
def test_other_files_are_recognized(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in failure(tmp_path / name)


@pytest.mark.parametrize("spec", [None, 3, {"a": 1}, b"\xff\xfe"])
def test_objects_that_are_not_models(spec: Any) -> None:
    assert "is not a model" in failure(spec)


@pytest.mark.parametrize("spec", ["a\0b", "x" * 5000])
def test_impossible_paths(spec: str) -> None:
    assert "cannot be read" in failure(spec) or "There is no" in failure(spec)


def test_a_file_without_permission(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # file modes mean nothing to root
    assert "cannot be read: Permission denied" in failure(models / "tiny.gguf")


def test_tokenizer_and_generation_defaults_come_along(models: Path) -> None:
    loaded = resolve(models / "hf").open(models / "hf")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("héllo", add_special=False)) == "héllo"
    assert 257 in loaded.generation.eos_ids
    assert loaded.name == "hf"


def test_a_model_without_a_tokenizer_still_loads(models: Path) -> None:
    assert resolve(models / "tiny.gguf").open(models / "tiny.gguf").tokenizer is None


def test_fingerprints_follow_the_content_and_not_the_place(models: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes((models / "tiny.gguf").read_bytes())
    source = resolve(copy)
    assert source.fingerprint(copy) == source.fingerprint(models / "tiny.gguf")
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert source.fingerprint(copy) != source.fingerprint(models / "tiny.gguf")
    assert len(resolve(models / "hf").fingerprint(models / "hf")) >= 32


def test_every_source_answers_for_every_kind_of_spec(tmp_path: Path) -> None:
    for source in sources():
        for spec in (None, 3, "", "nothing here", tmp_path, b"x", object()):
            assert source.matches(spec) is False
