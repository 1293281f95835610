"""The `onnx` source: any ONNX file becomes a graph that runs; a decoder with a cache becomes one that generates.

Tokenizer, chat template and generation defaults are read from the files beside the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.contract import Progress
from transom.errors import SourceError
from transom.sources.base import (
    OriginalGraph,
    Source,
    SourceModel,
    Spec,
    content_hash,
    folder_name,
    local_path,
    summarize,
)

if TYPE_CHECKING:
    from transom.graph import Graph
    from transom.text.chat_template import ChatTemplate
    from transom.text.defaults import GenerationDefaults
    from transom.text.tokenizer import Tokenizer

_PREFERRED = ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx", "decoder_model.onnx")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json")
_GENAI = "genai_config.json"
_BESIDE = ("*.json", "*.jinja", "tokenizer.model", "additional_chat_templates/*.jinja")


class OnnxSource(Source):
    """Loads `.onnx` files, and folders as Optimum, onnxruntime-genai and the Hugging Face hub lay them out."""

    kind = "onnx"

    def matches(self, spec: Spec) -> bool:
        path = local_path(spec)
        if path is None:
            return False
        if path.is_dir():
            return not any(path.glob("*.safetensors")) and bool(_models_in(path))
        return path.suffix.lower() in (".onnx", ".onnx_data") and path.is_file()

    def fingerprint(self, spec: Spec) -> str:
        from transom.sources.onnx_file import data_files

        path = onnx_path(spec)
        folder = side_folder(path)
        beside = [p for pattern in _BESIDE for p in sorted(folder.glob(pattern))]
        return content_hash([*data_files(path), *beside])

    def open(self, spec: Spec, *, context: int | None = None, progress: Progress | None = None) -> SourceModel:
        from transom.graph.importing import import_model
        from transom.sources.onnx_file import open_onnx

        path = onnx_path(spec)
        if progress is not None:
            progress("read", None)
        model, files = open_onnx(path)
        folder = side_folder(path)
        graph = import_model(model, name=path.stem, weights_hash=content_hash(files))
        config, genai = _json(folder / "config.json"), _json(folder / _GENAI)
        graph = raise_if_decoder(graph, config, genai)
        tokenizer, template, generation = texts(folder, genai) if graph.decoder is not None else (None, None, _plain())
        return SourceModel(
            graph, tokenizer, template, generation, name=_name(path, config), kind=self.kind, notes=list(graph.notes),
            unchecked=True,
        )  # fmt: skip

    def original(self, spec: Spec) -> OriginalGraph:
        from transom.sources.onnx_file import open_onnx

        path = onnx_path(spec)
        return OriginalGraph(path.name, lambda: open_onnx(path)[0])

    def chat_template(self, spec: Spec) -> ChatTemplate | None:
        from transom.text.from_hf import chat_template_from_hf

        return chat_template_from_hf(side_folder(onnx_path(spec)), None)


def onnx_path(spec: Spec) -> Path:
    """The ONNX file of a spec: the file itself, or the one in the folder.

    Raises:
        SourceError: the folder has several files and none with a usual name, or the file has only a model's weights.
    """
    path = local_path(spec)
    if path is None:
        raise SourceError(f"{spec!r} is not the path of an ONNX file")
    if path.is_file() and path.suffix.lower() == ".onnx_data":
        raise SourceError(
            f"{path} holds the weights of an ONNX model", f"Load the model itself: {path.with_suffix('.onnx')}"
        )
    if not path.is_dir():
        return path
    models = _models_in(path)
    named = _json(path / _GENAI).get("model", {})
    decoder = named.get("decoder", {}) if isinstance(named, Mapping) else {}
    filename = decoder.get("filename") if isinstance(decoder, Mapping) else None
    for name in ([filename] if isinstance(filename, str) else []) + list(_PREFERRED):
        for model in models:
            if model.name == name:
                return model
    if len(models) == 1:
        return models[0]
    raise SourceError(
        f"{path} holds {len(models)} ONNX files ({summarize(m.name for m in models)})", "Give the path of one of them"
    )


def _models_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.onnx")) or sorted(folder.glob("onnx/*.onnx"))


def side_folder(path: Path) -> Path:
    """The folder of the files that belong to a model: its own folder, or the one above when the model is in `onnx/`."""
    folder = path.parent
    if folder.name == "onnx" and not (folder / "config.json").exists() and (folder.parent / "config.json").exists():
        return folder.parent
    return folder


def raise_if_decoder(graph: Graph, config: Mapping[str, Any], genai: Mapping[str, Any] | None = None) -> Graph:
    """The graph as a neutral decoder if its form is recognized; otherwise the graph itself, with a note why not."""
    from transom.graph.raising import CannotRaise, DecoderHints, looks_like_decoder, raise_decoder

    if not looks_like_decoder(graph) and not _reads_ids_and_caches(graph):
        return graph
    try:
        return raise_decoder(graph, DecoderHints(_family(config), _context(config, genai or {})))
    except CannotRaise as e:
        note = f"cannot generate, only run: {e}"
        graph.notes = (*graph.notes, note)
        return graph


def _reads_ids_and_caches(graph: Graph) -> bool:
    names = graph.input_names
    return any("past" in n for n in names) or ("input_ids" in names and "logits" in graph.output_names)


def _family(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    return kind if isinstance(kind, str) and kind else "onnx"


def _context(config: Mapping[str, Any], genai: Mapping[str, Any]) -> int:
    """The model's context in tokens, from the files beside it; 0: they have none."""
    text = config.get("text_config")
    inner = genai.get("model")
    for source, keys in (
        (inner, ("context_length",)),
        (text, ("max_position_embeddings",)),
        (
            config,
            ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx", "max_seq_len"),
        ),
    ):
        for key in keys:
            value = source.get(key) if isinstance(source, Mapping) else None
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
                return value
    return 0


def texts(
    folder: Path, genai: Mapping[str, Any] | None = None
) -> tuple[Tokenizer | None, ChatTemplate | None, GenerationDefaults]:
    """Tokenizer and chat template from the files in a folder, each None if there is none; and generation defaults."""
    from transom.text.from_hf import chat_template_from_hf, generation_from_hf, tokenizer_from_hf

    has_tokenizer = any((folder / name).exists() for name in _TOKENIZER_FILES)
    tokenizer = tokenizer_from_hf(folder) if has_tokenizer else None
    generation = generation_from_hf(folder, tokenizer)
    if genai and not (folder / "generation_config.json").exists():
        generation = _with_genai(generation, genai, tokenizer)
    return tokenizer, chat_template_from_hf(folder, tokenizer), generation


def _with_genai(
    generation: GenerationDefaults, genai: Mapping[str, Any], tokenizer: Tokenizer | None
) -> GenerationDefaults:
    """The settings of onnxruntime-genai's file, read with the keys of generation_config.json."""
    from transom.text.defaults import defaults_from_hf

    model, search = genai.get("model"), genai.get("search")
    settings = {**(search if isinstance(search, Mapping) else {}), **(model if isinstance(model, Mapping) else {})}
    sampling, tokens = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"), ("eos", "bos", "pad")
    keys = [*sampling, *(f"{t}_token_id" for t in tokens)]
    found = defaults_from_hf({k: settings[k] for k in keys if settings.get(k) is not None}, {}, tokenizer)
    return replace(found, eos_ids=tuple(sorted({*found.eos_ids, *generation.eos_ids})))


def _plain() -> GenerationDefaults:
    from transom.text.defaults import GenerationDefaults

    return GenerationDefaults()


def _json(path: Path) -> dict[str, Any]:
    from transom.text.from_hf import read_json

    return read_json(path, {})


def _name(path: Path, config: Mapping[str, Any]) -> str:
    name = config.get("_name_or_path")
    if isinstance(name, str) and Path(name).name:
        return Path(name).name
    generic: Sequence[str] = [*_PREFERRED, "decoder.onnx"]
    folder = folder_name(side_folder(path))
    return folder if path.name in generic and folder else path.stem
