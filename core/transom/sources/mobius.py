"""The `mobius` source: architectures outside our own families, built by Microsoft's `mobius-onnx`.

It needs the extra `transom[families]`, which includes torch. mobius writes ONNX graphs without tracing; the raising
pass makes them neutral. Some of its graphs are wrong: each release was compared with transformers on tiny random
checkpoints, and architectures that differ are refused below with the reason. `transom verify MODEL` compares a given
model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transom.contract import Progress
from transom.errors import MissingExtra, SourceError, message_lines
from transom.sources.architectures import (
    BY_EXTRA,
    BY_NEITHER,
    BY_TRANSFORMERS,
    instead_of,
    refusal_of_directory,
    what_it_is,
)
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

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.signature import Decoder
    from transom.text.chat_template import ChatTemplate

WRONG: Mapping[str, str] = {
    "biogpt": "logits off by more than the largest",
    "bitnet": "logits off by 65 % of the largest",
    "codegen": "logits off by 40 % of the largest",
    "cohere": "logits off by 1 % with fresh weights and 50 % with trained norms",
    "cohere2": "logits off by 80 % of the largest",
    "deepseek_v3": "it leaves out the experts of current checkpoints",
    "deepseek_v32": "it leaves out the experts of current checkpoints",
    "ernie4_5": "logits off by 100 % of the largest",
    "exaone4": "logits off by 50 % of the largest",
    "gpt_oss": "logits off by 1 % of the largest with small weights and 50 % with large ones",
    "gptj": "logits off by 30 % of the largest",
    "helium": "logits off by 70 % of the largest",
    "hunyuan_v1_dense": "logits off by 20 % of the largest",
    "nanochat": "logits off by 25 % of the largest",
    "persimmon": "logits off by 30 % of the largest",
    "xglm": "logits off by more than the largest",
}
"""Architectures that mobius-onnx 0.1 builds wrongly, with the measured difference from transformers."""

NEARLY: Mapping[str, str] = {"openai-gpt": "0.006 %", "opt": "0.03 %"}
"""Architectures whose logits differ slightly, as a share of the largest logit. The notes report it."""

_HALVES = ("FLOAT16", "BFLOAT16")
_FAILURES = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, AssertionError),
    ImportError,
)
"""What mobius raises for a checkpoint that it cannot build."""


class MobiusSource(Source):
    """Loads Hugging Face directories of architectures outside our own families."""

    kind = "mobius"

    def matches(self, spec: Spec) -> bool:
        path = local_path(spec)
        if path is None or not (path / "config.json").is_file() or not installed():
            return False
        from transom.models import family_for_hf
        from transom.sources.hf import read_config

        try:
            return family_for_hf(read_config(path), str(path / "config.json")) is None
        except SourceError:
            return False  # the source `hf` says what is wrong with the file

    def require_supported(self, spec: Spec) -> None:
        from transom.sources.hf import read_config, weight_files

        folder = _folder(spec)
        config = read_config(folder)
        require_built(config, folder)
        weight_files(folder)

    def fingerprint(self, spec: Spec) -> str:
        from transom.sources.hf import HfSource

        return f"{HfSource().fingerprint(spec)}-mobius-{_version()}"

    def open(self, spec: Spec, *, context: int | None = None, progress: Progress | None = None) -> SourceModel:
        from transom.graph.importing import import_model
        from transom.graph.raising import CannotRaise, DecoderHints, raise_decoder
        from transom.sources.hf import read_config, weight_files
        from transom.sources.onnx import texts

        folder = _folder(spec)
        config = read_config(folder)
        kind = require_built(config, folder)
        check_architecture(config, folder, kind)
        files = weight_files(folder)
        if progress is not None:
            progress("build", None)
        model = _build(folder, kind)
        graph = import_model(model, name=kind, weights_hash=content_hash(files))
        settings = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
        length = settings.get("max_position_embeddings") if isinstance(settings, Mapping) else None
        try:
            graph = raise_decoder(graph, DecoderHints(kind, length if isinstance(length, int) else 0))
        except CannotRaise as e:
            raise SourceError(
                f'The graph that mobius-onnx builds for "{kind}" cannot generate: {e}', instead_of(kind, folder)
            ) from e
        decoder = graph.decoder
        assert decoder is not None
        check_windows(decoder, folder, kind)
        notes = [*graph.notes, f"built by mobius-onnx {_version()}; transom verify compares it with transformers"]
        if kind in NEARLY:
            notes.append(f"mobius-onnx builds this architecture with logits off by {NEARLY[kind]} of the largest")
        graph.notes = tuple(notes)
        tokenizer, template, generation = texts(folder)
        return SourceModel(
            graph, tokenizer, template, generation, name=folder_name(folder), kind=self.kind, notes=notes
        )

    def original(self, spec: Spec) -> Pretrained:
        from transom.sources.hf import HfSource

        return HfSource().original(spec)

    def chat_template(self, spec: Spec) -> ChatTemplate | None:
        from transom.sources.hf import HfSource

        return HfSource().chat_template(spec)

    def contents(self, spec: Spec) -> Contents:
        from transom.sources.hf import HfSource

        return HfSource().contents(spec)

    def texts(self, spec: Spec) -> Texts:
        from transom.sources.hf import HfSource

        return HfSource().texts(spec)


def installed() -> bool:
    """Whether the extra is installed. Imports nothing."""
    return importlib.util.find_spec("mobius") is not None and importlib.util.find_spec("torch") is not None


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mobius-onnx")
    except PackageNotFoundError:
        return "unknown"


def _folder(spec: Spec) -> Path:
    folder = local_path(spec)
    if folder is None:
        raise SourceError(f"{spec!r} is not the path of a model's directory")
    return folder


def require_built(config: Mapping[str, Any], folder: Path) -> str:
    """The `model_type` of an architecture that mobius builds, as far as that is known without importing it.

    Raises:
        SourceError: mobius builds it wrongly or not at all, or it is no decoder.
        MissingExtra: mobius is not installed.
    """
    kind = _kind(config, folder)
    if kind in WRONG:
        raise SourceError(f'mobius-onnx builds "{kind}", but wrongly: {WRONG[kind]}', instead_of(kind, folder))
    if what_it_is(config) or kind in BY_TRANSFORMERS - BY_EXTRA or kind in BY_NEITHER:
        raise refusal_of_directory(config, folder, extra=True)
    if not installed():
        raise MissingExtra(f'The architecture "{kind}" of {folder} needs mobius-onnx', "families")
    return kind


def _kind(config: Mapping[str, Any], folder: Path) -> str:
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise SourceError(
            f"{folder / 'config.json'} names no model_type, so the kind of model is unknown",
            "Download the file again from the model's publisher",
        )
    return kind


def _build(folder: Path, kind: str) -> ir.Model:
    """The graph with its weights, which mobius maps from the files.

    Raises:
        SourceError: mobius does not support the architecture, or fails on this checkpoint.
    """
    try:
        import mobius
        from mobius._registry import registry
    except ImportError as e:
        raise MissingExtra(
            f'The architecture "{kind}" needs mobius-onnx, which cannot be imported: {e}', "families"
        ) from e
    if kind not in registry:
        from transom.sources.hf import read_config

        raise refusal_of_directory(read_config(folder), folder, extra=True)
    model = _built(mobius, folder, kind)
    if any(str(v.dtype) in _HALVES for v in model.graph.initializers.values()):
        # In 16 bits mobius also rounds its rotary tables and constants; in float32 it does not.
        return with_stored_weights(_built(mobius, folder, kind, dtype="f32"), model)
    return model


def with_stored_weights(wide: ir.Model, stored: ir.Model) -> ir.Model:
    """The float32 graph with the weights in the checkpoint's type, cast where they are used."""
    import onnx_ir as ir

    from transom.graph.editing import Editor

    editor = Editor(wide)
    for name, value in list(wide.graph.initializers.items()):
        kept = stored.graph.initializers.get(name)
        if not isinstance(value.const_value, ir.LazyTensor) or kept is None or str(kept.dtype) not in _HALVES:
            continue  # a table or a constant that mobius computed
        uses = list(value.uses())
        value.const_value, value.type = kept.const_value, ir.TensorType(cast(ir.DataType, kept.dtype))
        wider = editor.op("Cast", value, to=int(ir.DataType.FLOAT), name=f"{name}.float32")
        for node, index in uses:
            node.replace_input_with(index, wider)
    editor.finish_edit()
    return wide


def _built(mobius: Any, folder: Path, kind: str, **options: Any) -> ir.Model:
    try:
        package = mobius.build(str(folder), **options)
    except _FAILURES as e:
        raise SourceError(
            f'mobius-onnx cannot build "{kind}" from {folder}: {message_lines(e)[0]}', instead_of(kind, folder)
        ) from e
    if list(package) != ["model"]:
        raise SourceError(
            f'mobius-onnx builds "{kind}" in several parts ({summarize(map(str, package))}), not one text decoder',
            instead_of(kind, folder),
        )
    model: ir.Model = package["model"]
    if missing := [str(n) for n, v in model.graph.initializers.items() if v.const_value is None]:
        if kind in BY_EXTRA:
            raise SourceError(f"{folder} lacks weights: {summarize(missing)}", "Download the checkpoint again")
        raise SourceError(
            f'mobius-onnx builds "{kind}" with weights that {folder} does not have: {summarize(missing)}',
            instead_of(kind, folder),
        )
    return model


def check_architecture(config: Mapping[str, Any], folder: Path, kind: str) -> None:
    """Compare `architectures` with `model_type`, because mobius uses only the type.

    The decoders that transformers has for the type are accepted. For a type that transformers does not have, every
    architecture is accepted.

    Raises:
        SourceError: the config names an architecture that does not belong to its type.
    """
    from transformers.models.auto import modeling_auto

    named = config.get("architectures")
    names = [str(a) for a in named] if isinstance(named, list) else []
    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    known = [str(table[kind]) for table in tables if kind in table]
    if not names or not known or set(names) & set(known):
        return
    raise SourceError(
        f'{folder / "config.json"} names the architecture {summarize(names)} and the model_type "{kind}", which is '
        f"that of {known[0]}; mobius-onnx would build the latter",
        f"If the model is a {known[0]}, write that name into architectures; if not, correct model_type, or export the "
        "model to ONNX and load that file",  # AutoModelForCausalLM of transformers goes by the type too
    )


def check_windows(decoder: Decoder, folder: Path, kind: str) -> None:
    """Compare the sliding windows of the graph with those of the checkpoint's settings, because mobius omits some.

    Raises:
        SourceError: they differ, and the context is longer than the smaller window.
    """
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(str(folder)).get_text_config()
    window = getattr(settings, "sliding_window", None)
    kinds = getattr(settings, "layer_types", None)
    if not isinstance(window, int) or getattr(settings, "use_sliding_window", True) is False:
        window = 0
    if kinds is None:
        wanted = [window] * len(decoder.layers)
    else:
        wanted = [window if k == "sliding_attention" else 0 for k in kinds]
    for index, (layer, want) in enumerate(zip(decoder.layers, wanted, strict=False)):
        have = layer.sliding_window
        if have != want and min(w for w in (have, want) if w) < decoder.context:
            raise SourceError(
                f'mobius-onnx builds "{kind}" with a sliding window of {have or "no"} tokens in layer {index}; the '
                f"checkpoint says {want or 'none'}",
                instead_of(kind, folder),
            )
