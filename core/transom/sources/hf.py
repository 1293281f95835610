"""The `hf` source: a directory with config.json, safetensors, and the tokenizer's files."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict

from transom.contract import Progress
from transom.errors import SourceError
from transom.graph.weights import Array, Dense, Weight
from transom.models import Family, family_for_hf
from transom.models.tensors import Checkpoint, Tensors
from transom.models.values import Values
from transom.sources.architectures import refusal_of_directory
from transom.sources.base import (
    Contents,
    Pretrained,
    Source,
    SourceModel,
    Spec,
    Texts,
    content_hash,
    folder_name,
    local_path,
    summarize,
)
from transom.sources.finite import require_finite
from transom.sources.packed import Packing
from transom.sources.quantized import packing_of
from transom.sources.safetensors_file import StoredTensor, open_safetensors

if TYPE_CHECKING:
    from transom.text.chat_template import ChatTemplate

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
_SIZES = (
    ("layers", ("num_hidden_layers", "n_layer", "n_layers", "num_layers")),
    ("hidden size", ("hidden_size", "n_embd", "d_model")),
    ("vocabulary", ("vocab_size",)),
    ("context", ("max_position_embeddings", "n_positions", "max_seq_len")),
)
"""The sizes that `inspect` shows, and their keys in config.json."""
_VISION = ("vision_tower.", "vision_model.", "multi_modal_projector.", "visual.", "audio_tower.")


class _Index(TypedDict, total=False):
    """What is read of model.safetensors.index.json."""

    weight_map: Required[dict[str, str]]


class HfSource(Source):
    """Loads directories that `save_pretrained` of transformers wrote."""

    kind = "hf"

    def matches(self, spec: Spec) -> bool:
        path = local_path(spec)
        if path is None or not path.is_dir():
            return False
        return (path / "config.json").is_file() or any(path.glob("*.safetensors")) or bool(_pickles(path))

    def fingerprint(self, spec: Spec) -> str:
        folder = _folder(spec)
        files = [*weight_files(folder)]
        for pattern in ("*.json", "*.jinja", "tokenizer.model", "additional_chat_templates/*.jinja"):
            files += sorted(folder.glob(pattern))
        return content_hash(files)

    def open(self, spec: Spec, *, context: int | None = None, progress: Progress | None = None) -> SourceModel:
        folder = _folder(spec)
        if progress is not None:
            progress("read", None)
        config = read_config(folder)
        family, settings, checkpoint, tensors = _headers(folder, config)
        graph = family.build(family.from_hf(settings, tensors, context), tensors)
        notes = [*graph.notes, *checkpoint.notes()]
        left = [name for name in tensors.unused() if not checkpoint.is_part(name)]
        if vision := [name for name in left if any(part in name for part in _VISION)]:
            notes.append(f"the parts for images or audio are not loaded ({len(vision)} tensors)")
        if left := [name for name in left if name not in vision]:
            notes.append(f"{len(left)} tensors of the checkpoint are not used: {summarize(left)}")
        graph.notes = tuple(notes)
        tokenizer, template, generation = _text(folder)
        name = config.get("_name_or_path")
        return SourceModel(
            graph,
            tokenizer,
            template,
            generation,
            name=Path(name).name if isinstance(name, str) and Path(name).name else folder_name(folder),
            kind=self.kind,
            notes=notes,
        )

    def require_supported(self, spec: Spec) -> None:
        folder = _folder(spec)
        family, settings, _, tensors = _headers(folder, read_config(folder))
        family.from_hf(settings, tensors, None)  # raises for a setting that the family does not support

    def original(self, spec: Spec) -> Pretrained:
        folder = _folder(spec)
        return Pretrained(folder, {"pretrained_model_name_or_path": str(folder)})

    def chat_template(self, spec: Spec) -> ChatTemplate | None:
        from transom.text.from_hf import chat_template_from_hf

        return chat_template_from_hf(_folder(spec), None)

    def contents(self, spec: Spec) -> Contents:
        folder = _folder(spec)
        config = read_config(folder)
        names = config.get("architectures")
        architecture = str(names[0]) if isinstance(names, list) and names else str(config.get("model_type", ""))
        stored = [t for file in weight_files(folder) for t in open_safetensors(file).values()]
        tensors = tuple((t.dtype, math.prod(t.shape), t.data.nbytes) for t in stored)
        return Contents(architecture, tensors, _sizes(config, str(folder / "config.json")))

    def texts(self, spec: Spec) -> Texts:
        return _text(_folder(spec))


def _headers(folder: Path, config: Mapping[str, Any]) -> tuple[Family, Values, HfCheckpoint, Tensors]:
    """Family, settings, checkpoint and tensors of a directory. Reads no weight.

    Raises:
        SourceError, MissingExtra: no family builds the architecture, or the weights' headers cannot be read.
    """
    where = str(folder / "config.json")
    family = family_for_hf(config, where)
    if family is None:
        raise refusal_of_directory(config, folder)
    settings = text_settings(config, where)
    files = weight_files(folder)
    checkpoint = HfCheckpoint(
        folder, files, {t.name: t for file in files for t in open_safetensors(file).values()}, config
    )
    return family, settings, checkpoint, Tensors(checkpoint, rename_for(checkpoint), _needless)


def _sizes(config: Mapping[str, Any], where: str) -> dict[str, int]:
    settings = text_settings(config, where)
    found = {what: next((settings.get(key) for key in keys if settings.has(key)), None) for what, keys in _SIZES}
    return {what: size for what, size in found.items() if isinstance(size, int)}


class HfCheckpoint:
    """The tensors of safetensors files by name, as weights."""

    def __init__(
        self, folder: Path, files: list[Path], stored: Mapping[str, StoredTensor], config: Mapping[str, Any]
    ) -> None:
        self.where = str(folder)
        self._files, self._stored = files, stored
        self._packing: Packing | None = packing_of(config, stored, str(folder))
        self._notes: Counter[str] = Counter()

    @functools.cached_property
    def weights_hash(self) -> str:
        return content_hash(self._files)

    def names(self) -> Iterable[str]:
        return self._stored

    def is_part(self, name: str) -> bool:
        """Whether a tensor is a part of a quantized module, whose weight has a name of its own."""
        return self._packing is not None and self._packing.is_part(name)

    def find(self, name: str) -> Weight | None:
        if self._packing is not None:
            packed = self._packing.find(name)
            if packed is not None:
                weight, note = packed
                if note:
                    self._notes[note] += 1
                return weight
        stored = self._stored.get(name)
        return None if stored is None else dense_weight(stored)

    def notes(self) -> list[str]:
        found = [f"{count} matrices: {note}" for note, count in sorted(self._notes.items())]
        return [*(self._packing.notes if self._packing else ()), *found]


def dense_weight(stored: StoredTensor) -> Dense:
    """A float tensor of a file, read on demand.

    Raises:
        SourceError: a type that is not for plain weights.
    """
    dtype: Any = _NAMES.get(stored.dtype)
    if dtype is None:
        raise SourceError(
            f"The tensor {stored.name} in {stored.path} is of the type {stored.dtype}, which is not for weights",
            "Get the model in float16, bfloat16 or float32, or quantized by GPTQ, AWQ or compressed-tensors",
        )
    return Dense(stored.shape, dtype, checked_loader(stored))


def checked_loader(stored: StoredTensor) -> Callable[[], Array]:
    """A function that reads a tensor, and checks it for NaN and infinity the first time."""
    checked = False

    def load() -> Array:
        nonlocal checked
        array = stored.array()
        if not checked:
            require_finite(array, stored.name, stored.path)
            checked = True
        return array

    return load


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        SourceError: the file is missing, or it is not a JSON object.
    """
    from transom.text.from_hf import read_json

    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{folder} has weights but no config.json, so the kind of model is not known",
            "Download config.json of the model into the directory",
        )
    return read_json(folder / "config.json")


def text_settings(config: Mapping[str, Any], where: str) -> Values:
    """The settings of the language model: the whole config, or its `text_config` in a model that also reads images."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return Values(config, where)
    outer = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return Values({**outer, **inner}, f"text_config of {where}")


def rename_for(checkpoint: Checkpoint) -> Callable[[str], str]:
    """The names of the language model's tensors in a checkpoint that has other parts too, or that has no head."""
    names = set(checkpoint.names())
    prefixes = ("model.language_model.", "language_model.model.", "model.", "")
    inner = next((p for p in prefixes if f"{p}embed_tokens.weight" in names), "model.")

    def rename(name: str) -> str:
        if name.startswith("model."):
            return inner + name.removeprefix("model.")
        beside = f"language_model.{name}"  # the head
        return beside if beside in names else name

    return rename


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model.

    Raises:
        SourceError: there are none or only pickled weights, a shard is missing, or the index is damaged or points
            outside the directory.
    """
    from transom.text.from_hf import read_typed

    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / _INDEX
    if index.is_file():
        names = sorted(set(read_typed(index, _Index)["weight_map"].values()))
        if outside := [n for n in names if Path(n).name != n]:
            raise SourceError(
                f"{index} points outside its directory, to {outside[0]}", "Get the model from a source you trust"
            )
        if missing := [n for n in names if not (folder / n).is_file()]:
            raise SourceError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files: {summarize(missing)}",
                "Download the missing files into the directory",
            )
        return [folder / n for n in names]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise SourceError(
            f"{folder} holds {len(others)} safetensors files ({summarize(p.name for p in others)}) and no {_INDEX} "
            "that lists their tensors",
            f"Download {_INDEX} of the model into the directory",
        )
    if pickles := _pickles(folder):
        raise SourceError(
            f"{folder} holds its weights only as pickled PyTorch files ({summarize(pickles)}); loading a pickle can "
            "run any program, so Transom does not",
            "Convert them once with the transformers package, if you trust the files: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        )
    raise SourceError(
        f"{folder} has a config.json but no weights (*.safetensors)", "Download the weights into the directory"
    )


def _pickles(folder: Path) -> list[str]:
    found = {p.name for pattern in _PICKLES for p in folder.glob(pattern)}
    return sorted(found - {"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt"})


def _needless(name: str) -> bool:
    return name.endswith((".rotary_emb.inv_freq", ".masked_bias"))


def _text(folder: Path) -> Texts:
    from transom.text.from_hf import chat_template_from_hf, generation_from_hf, tokenizer_from_hf

    has_tokenizer = any((folder / name).exists() for name in _TOKENIZER_FILES)
    tokenizer = tokenizer_from_hf(folder) if has_tokenizer else None
    return Texts(tokenizer, chat_template_from_hf(folder, tokenizer), generation_from_hf(folder, tokenizer))


def _folder(spec: Spec) -> Path:
    path = local_path(spec)
    if path is None:
        raise SourceError(f"{spec!r} is not the path of a model's directory")
    return path
