"""Names of models of the Hugging Face hub, and the files of a repository that a model needs. Needs no package."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from transom.errors import SourceError
from transom.sources.base import summarize

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(?::(?P<part>[^:@\s]+))?(?:@(?P<revision>[^\s@:]+))?")
_ADDRESS = re.compile(
    rf"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repository>{_PART}/{_PART})"
    r"(?::(?P<part>[^@?#]+)|/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+))?)?(?:[/?#].*)?"
)
_FILE_SUFFIXES = (".gguf", ".ggml", ".onnx", ".safetensors", ".bin", ".pt", ".pth", ".json", ".zip")
"""The suffix of a name such as Qwen2.5-0.5B is none of a file."""

_SPLIT = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})$")
_QUANTIZATION = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d+(?:_[A-Z0-9]+)*|TQ\d_\d|(?:MX|NV)FP4(?:_MOE)?|BF16|FP?16|FP?32))(?=$|[-._])", re.I
)
_ONNX = ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx", "decoder_model.onnx")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SIDE_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken")
_SIDE_NAMES = ("merges.txt", "vocab.txt")
_NEEDLESS = ("trainer_state.json",)
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class HubName:
    """A model of the hub, as the user writes it: `owner/name[:file-or-quantization][@revision]`."""

    repository: str
    part: str = ""
    """A file, or the quantization of a GGUF file; empty: the only model of the repository."""
    revision: str = "main"

    def __str__(self) -> str:
        part = f":{self.part}" if self.part else ""
        return f"{self.repository}{part}" + (f"@{self.revision}" if self.revision != "main" else "")


@dataclass(frozen=True)
class Needed:
    """The files that a model needs, by their paths in the repository."""

    kind: str
    """`"safetensors"`, `"gguf"` or `"onnx"`."""
    sides: tuple[str, ...]
    """Settings, tokenizer, template and license: small files, to be fetched first."""
    weights: tuple[str, ...]
    """Empty where the file INDEX lists them."""
    model: str = ""
    """The file to load; empty: the folder."""


def parse(text: str) -> HubName:
    """Parse a name.

    Raises:
        SourceError: it is not the name of a model of the hub.
    """
    found = _NAME.fullmatch(text)
    if found is None or ".." in found["repository"] or "--" in found["repository"]:
        raise SourceError(
            f"{text!r} is not the name of a model of the Hugging Face hub",
            f"Write it like {of_address(text) or 'owner/name, owner/name:Q4_K_M or owner/name@revision'}",
        )
    return HubName(found["repository"], found["part"] or "", found["revision"] or "main")


def may_be_named(text: str) -> bool:
    """Whether a text that is no existing path reads like a name: a missing file of a folder does not."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in found["repository"] or "--" in found["repository"]:
        return False
    return found["part"] is not None or not found["repository"].lower().endswith(_FILE_SUFFIXES)


def of_address(text: str) -> str:
    """The name of the model whose page on the hub has this address; empty: it is not such an address."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return ""
    part = found["part"] or found["file"] or ""
    if not part.lower().endswith((".gguf", ".onnx")) and found["part"] is None:
        part = ""  # a page about another file
    return str(HubName(found["repository"], part, found["revision"] or "main"))


def quantization(file: str) -> str:
    """The quantization that the name of a GGUF file gives, such as `Q4_K_M`; empty: none."""
    found = _QUANTIZATION.findall(_stem(file))
    return str(found[-1]) if found else ""


def needed(name: HubName, sizes: Mapping[str, int]) -> Needed:
    """Choose the files of a model.

    Args:
        sizes: bytes of each file of the repository.

    Raises:
        SourceError: the repository holds several models and the name chooses none; it has no such file or quantization;
            or it holds no model that can be run.
    """
    files = sorted(sizes)
    ggufs, onnx = _gguf_models(files), [f for f in files if f.lower().endswith(".onnx")]
    weights = [f for f in files if f.endswith(".safetensors") and "/" not in f]
    if name.part:
        return _named(name, files, sizes, ggufs, onnx, weights)
    if weights and "config.json" not in files and "adapter_config.json" in files:
        raise SourceError(
            f"{name.repository} is an adapter (LoRA), not a whole model",
            "Merge it into its base model, for example with merge_and_unload of the package peft, and load the result",
        )
    if "config.json" in files:
        if "model.safetensors" in files:
            return Needed("safetensors", _sides(files), ("model.safetensors",))
        if INDEX in files:
            return Needed("safetensors", _sides(files), ())
        if len(weights) == 1:
            return Needed("safetensors", _sides(files), tuple(weights))
    if ggufs:
        if len(ggufs) == 1:
            return _gguf(next(iter(ggufs)), ggufs, files)
        raise _which(name, "GGUF", {f: sum(sizes[p] for p in parts) for f, parts in ggufs.items()})
    if onnx:
        for usual in (*_ONNX, *(f"onnx/{n}" for n in _ONNX)):
            if usual in onnx:
                return _onnx(usual, files)
        if len(onnx) == 1:
            return _onnx(onnx[0], files)
        raise _which(name, "ONNX", {f: sizes[f] for f in onnx})
    pickles = [f for f in files if f.endswith(_PICKLES) and "/" not in f and "training_args" not in f]
    if pickles:
        raise SourceError(
            f"{name.repository} holds its weights only as pickled PyTorch files ({summarize(pickles)}); loading a "
            "pickle can run any program, so Transom does not",
            "Look for a model of the same name with safetensors or GGUF files",
        )
    shown = summarize(f for f in files if not f.startswith(".git")) or "nothing"
    raise SourceError(
        f"{name.repository} holds no model that Transom can run, only {shown}",
        "Look for a repository with safetensors, GGUF or ONNX files",
    )


def _named(
    name: HubName,
    files: list[str],
    sizes: Mapping[str, int],
    ggufs: Mapping[str, list[str]],
    onnx: list[str],
    weights: list[str],
) -> Needed:
    part = name.part.lower()
    models = [*ggufs, *onnx]
    exact = [f for f in models if part in (f.lower(), _base(f).lower(), _stem(_base(f)).lower())]
    bounded = re.compile(rf"(?:^|[-./]){re.escape(part)}(?=$|[-./])", re.I)
    chosen = exact or [f for f in ggufs if quantization(f).lower() == part] or [
        f for f in models if bounded.search(_stem(f))
    ]  # fmt: skip
    if len(chosen) == 1:
        return _gguf(chosen[0], ggufs, files) if chosen[0] in ggufs else _onnx(chosen[0], files)
    if chosen:
        raise _which(name, "", {f: sum(sizes[p] for p in ggufs.get(f, [f])) for f in chosen})
    if name.part in files and name.part in weights:
        raise SourceError(f"{name.part} is one file of a model of several files", f"Leave it out: {name.repository}")
    choices = {f: sum(sizes[p] for p in ggufs.get(f, [f])) for f in models}
    raise SourceError(
        f'{name.repository} has no model "{name.part}"',
        "Choose one of these" if choices else f"Leave it out: {name.repository}",
        _choices(choices),
    )


def _which(name: HubName, kind: str, choices: Mapping[str, int]) -> SourceError:
    example = _labels(choices)[min(choices, key=lambda f: (quantization(f).upper() != "Q4_K_M", f))]
    of = f"match {name.part!r}" if name.part else "are there"
    return SourceError(
        f"{name.repository} holds {len(choices)} models{f' in {kind} files' if kind else f' that {of}'}",
        f"Choose one of these, as in {name.repository}:{example}",
        _choices(choices),
    )


def _choices(choices: Mapping[str, int]) -> list[str]:
    labels = _labels(choices)
    width = max(map(len, labels.values()), default=0)
    lines = [(size, labels[file], file) for file, size in choices.items()]
    return [
        f"{label:<{width}}  {shown_size(size):>7}" + (f"  {file}" if label != file else "")
        for size, label, file in sorted(lines)
    ]


def _labels(choices: Mapping[str, int]) -> dict[str, str]:
    """What to write for each file: its quantization where that is the only one of its kind, else its path."""
    kinds = [quantization(f).lower() for f in choices]
    return {f: q if (q := quantization(f)) and kinds.count(q.lower()) == 1 else f for f in choices}


def shown_size(size: int) -> str:
    """Bytes in decimal units, as the hub shows them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 1000 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} B"


def _gguf_models(files: Iterable[str]) -> dict[str, list[str]]:
    """The GGUF models, with the parts of each; no image projectors."""
    models: dict[str, list[str]] = {}
    for file in files:
        if not file.lower().endswith(".gguf") or _base(file).lower().startswith("mmproj"):
            continue
        split = _SPLIT.search(_stem(file))
        first = file if split is None else f"{_stem(file)[: split.start()]}-00001-of-{split['count']}{file[-5:]}"
        models.setdefault(first, []).append(file)
    return models


def _gguf(model: str, models: Mapping[str, list[str]], files: list[str]) -> Needed:
    split = _SPLIT.search(_stem(model))
    if split is not None and len(models[model]) != int(split["count"]):
        raise SourceError(
            f"The repository lacks {int(split['count']) - len(models[model])} of the {int(split['count'])} parts of "
            f"{model}",
            "Choose another file",
        )
    licenses = tuple(f for f in files if _is_license(f))
    return Needed("gguf", licenses, tuple(models[model]), model)


def _onnx(model: str, files: list[str]) -> Needed:
    folder = model.rpartition("/")[0]
    beside = [f for f in files if f.rpartition("/")[0] == folder]
    data = [f for f in beside if f != model and (f.startswith(model) or f == f"{_stem(model)}.data")]
    sides = [f for f in beside if _is_side(f)] if folder else []
    return Needed("onnx", (*_sides(files), *sides), (*data, model), model)


def _sides(files: Iterable[str]) -> tuple[str, ...]:
    return tuple(
        f
        for f in files
        if ("/" not in f or f.startswith("additional_chat_templates/")) and (_is_side(f) or _is_license(f))
    )


def _is_side(file: str) -> bool:
    base = _base(file)
    if base in _NEEDLESS or base.endswith(tuple(f"{suffix}.index.json" for suffix in _PICKLES)):
        return False
    return base.endswith(_SIDE_SUFFIXES) or base in _SIDE_NAMES


def _is_license(file: str) -> bool:
    return "/" not in file and file.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))


def _base(file: str) -> str:
    return PurePosixPath(file).name


def _stem(file: str) -> str:
    return file[: -len(PurePosixPath(file).suffix)] if PurePosixPath(file).suffix else file
