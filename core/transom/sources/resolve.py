"""Finding the source of a spec, and the error message when no source matches."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from transom.contract import Progress
from transom.errors import SourceError, nearest
from transom.sources.base import Source, Spec, begins_with, local_path, summarize

_SOURCES = (
    ("gguf", "GgufSource"),
    ("onnx", "OnnxSource"),
    ("mobius", "MobiusSource"),
    ("hf", "HfSource"),
    ("torch", "TorchModels"),
)
"""The sources in the order of `resolve`. A source that needs an extra imports it only when it opens a model."""

BUNDLE_MANIFEST = "manifest.json"
BUNDLE_KEY = "transom_bundle"
"""The first key of a bundle's manifest. File name and key identify a bundle; only `transom.bundles` reads the rest."""

ADAPTER = "adapter_config.json"
"""The file that a LoRA adapter of the package peft has in place of config.json."""

_WAYS = "Give the path of a .gguf file, of a Hugging Face directory (config.json, *.safetensors), or of an .onnx file"


@functools.cache
def _source(module: str, name: str) -> Source:
    source: Source = getattr(importlib.import_module(f"transom.sources.{module}"), name)()
    return source


def sources() -> Iterator[Source]:
    """The sources in order. Each is imported when the iteration reaches it."""
    return (_source(module, name) for module, name in _SOURCES)


def resolve(spec: Spec) -> Source:
    """The source of a spec.

    Raises:
        SourceError: a missing path, an empty directory, a bundle, a file of another kind, a pipe, socket or device, an
            object that is not a model.
    """
    path = local_path(spec)
    if path is not None:
        _require_readable(spec, path)
        if bundle_at(path) is not None:
            raise SourceError(f"{path} is a bundle, which is compiled already", "Give the model that it was made from")
        if (adapter := path / ADAPTER).is_file() and not (path / "config.json").is_file():
            raise _adapter(path, adapter)
    for source in sources():
        if source.matches(spec):
            return source
    if path is None:
        cause = (
            "The model's path is empty" if spec == "" else f"An object of the type {type(spec).__name__} is not a model"
        )
        raise SourceError(cause, _WAYS)
    raise _no_model_inside(path) if path.is_dir() else _other_file(path)


def located(
    spec: Spec,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Spec:
    """The path of a model that is named by its id on the Hugging Face hub; any other spec as it is.

    A text that is an existing path is that path. An id, `owner/name[:file-or-quantization][@revision]`, is looked up in
    the hub's cache, and else downloaded.

    Args:
        offline: nothing is downloaded.
        progress: called with (stage, share done) during a download.
        announce: called with a sentence before a download; None: it is logged as a warning.

    Raises:
        MissingExtra: an id, and the package huggingface_hub is not installed.
        SourceError: the model is not in the cache and cannot be downloaded; the message has the cause and the fix.
    """
    if not isinstance(spec, str) or not spec or os.path.exists(os.path.expanduser(spec)):
        return spec
    from transom.sources import hub_names  # a model on disk does not need it

    if (error := _address(spec)) is not None:  # as a path it would lose a slash
        raise error
    if not hub_names.may_be_named(spec):
        return spec
    from transom.sources import hub

    return hub.find(hub_names.parse(spec), offline=offline, progress=progress, announce=announce)


def bundle_at(spec: Spec) -> Path | None:
    """The bundle's folder if the spec is a bundle, intact or damaged; otherwise None."""
    path = local_path(spec)
    try:
        manifest = None if path is None else path / BUNDLE_MANIFEST  # reading from a pipe would never end
        found = manifest is not None and manifest.is_file() and f'"{BUNDLE_KEY}"'.encode() in manifest.read_bytes()
    except (OSError, ValueError):
        return None
    return path.absolute() if path is not None and found else None


def _require_readable(spec: Spec, path: Path) -> None:
    try:
        exists = path.exists()
        if exists and path.is_dir():
            next(path.iterdir(), None)
        elif exists and not path.is_file():  # opening a pipe would wait for a writer
            raise SourceError(f"{path} is a pipe, socket or device, not a regular file", _WAYS)
        elif exists:
            with path.open("rb"):
                pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"{path} cannot be read: {reason}", "Check the path and its permissions") from error
    if not exists:
        raise _no_such_path(spec, path)


def _no_such_path(spec: Spec, path: Path) -> SourceError:
    if path.parent.is_dir():
        beside = [p.name for p in path.parent.iterdir() if not p.name.startswith(".")]
        hint = nearest(path.name, beside) if 0 < len(beside) <= 20 else ""
        if "Did you mean" in hint:
            return SourceError(f"There is no {path}", hint)
    from transom.sources import hub_names

    text = str(spec)
    if (error := _address(text)) is not None:
        return error
    if hub_names.may_be_named(text):
        return SourceError(
            f"There is no directory {path} here", f"If it is a model of the Hugging Face hub: transom pull {text}"
        )
    return SourceError(f"There is no {path}", _WAYS)


def _address(text: str) -> SourceError | None:
    from transom.sources import hub_names

    if name := hub_names.of_address(text):
        return SourceError(f"{text} is an address, not a path", f"Give the model's name on the hub: {name}")
    if "://" in text:
        return SourceError(
            f"{text} is an address, and Transom downloads models only from the Hugging Face hub",
            "Download the file, and give its path",
        )
    return None


def _adapter(path: Path, settings: Path) -> SourceError:
    try:
        base = json.loads(settings.read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = ""
    of = f" of {base}" if isinstance(base, str) and base.strip() else ""
    return SourceError(
        f"{path} is an adapter (LoRA){of}, not a whole model",
        "Merge it into its base model, for example with merge_and_unload of the package peft, and load the result",
    )


def _no_model_inside(path: Path) -> SourceError:
    names = sorted(p.name for p in path.iterdir())
    if not names:
        return SourceError(f"The directory {path} is empty", _WAYS)
    return SourceError(f"The directory {path} holds no model, only {summarize(names)}", _WAYS)


_KNOWN = (
    (b"PK\x03\x04", "a zip archive or a pickled PyTorch checkpoint", "Unpack it, or convert it to safetensors"),
    (b"\x80", "a pickled PyTorch checkpoint", "Convert it to safetensors: loading a pickle can run any program"),
    (b"ggml", "a model in the old GGML format", "Convert it to GGUF with an old llama.cpp, or get it as GGUF"),
    (b"lmgg", "a model in the old GGML format", "Convert it to GGUF with an old llama.cpp, or get it as GGUF"),
    (b"tjgg", "a model in the old GGML format", "Convert it to GGUF with an old llama.cpp, or get it as GGUF"),
    (b"<", "a web page", "The download saved an error page in place of the model: download it again"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "Run git lfs pull in its directory"),
)


def _other_file(path: Path) -> SourceError:
    if path.stat().st_size == 0:
        return SourceError(f"{path} is an empty file", "Download it again")
    if path.suffix == ".safetensors" or path.name == "config.json":
        return SourceError(
            f"{path} is one file of a Hugging Face directory", f"Load the directory itself: {path.parent}"
        )
    for magic, what, fix in _KNOWN:
        if begins_with(path, magic):
            return SourceError(f"{path} is {what}", fix)
    return SourceError(f"{path} is not a model that Transom knows", _WAYS)
