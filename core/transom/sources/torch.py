"""The `torch` source: loads a module with example inputs through ONNX, and a transformers model through our families.

A transformers model of a family that Transom builds itself shares its weights: the graph reads the module's memory and
copies nothing. Every other module, including a transformers model of another family, is exported with
`torch.onnx.export(dynamo=True)` at opset 23, where attention and normalization keep their operators (the exporter's
default opset decomposes them; at 26 it writes invalid files). Only this source and the `mobius` source import torch,
when they open a model.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from transom.contract import Progress
from transom.errors import MissingExtra, SourceError, message_lines
from transom.sources.base import InMemory, Source, SourceModel, Spec, summarize

if TYPE_CHECKING:
    from transom.graph import Graph
    from transom.graph.weights import Array, Weight

EXPORT_OPSET = 23
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
"""Escape sequences in the exporter's messages."""
_NAMES = {"torch.float32": "float32", "torch.float16": "float16", "torch.bfloat16": "bfloat16"}


@dataclass(frozen=True)
class TorchSource:
    """A `torch.nn.Module` with example inputs for its export: `transom.load(TorchSource(module, (x,)))`.

    Args:
        module: the module. It is exported in evaluation mode.
        args: example inputs by position. Their sizes are fixed in the graph unless `dynamic_shapes` frees them.
        kwargs: example inputs by name.
        dynamic_shapes: as `torch.export` takes it.
        input_names, output_names: names in the graph; the parameters' own names and `output_0` … by default. A module
            with the inputs and outputs of Optimum's decoders (`input_ids`, `past_key_values.0.key` … to `logits`,
            `present.0.key` …) generates.
        tokenizer_from: a folder whose tokenizer, chat template and generation defaults belong to the model.
    """

    module: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    tokenizer_from: Any = None


class TorchModels(Source):
    """Loads `TorchSource` objects and models of the transformers package."""

    kind = "torch"

    def matches(self, spec: Spec) -> bool:
        return isinstance(spec, TorchSource) or _is_module(spec)

    def fingerprint(self, spec: Spec) -> str:
        module = spec.module if isinstance(spec, TorchSource) else spec
        return _hash_of(module.state_dict())

    def open(self, spec: Spec, *, context: int | None = None, progress: Progress | None = None) -> SourceModel:
        if progress is not None:
            progress("read", None)
        if isinstance(spec, TorchSource):
            return _export(spec)
        if _is_pretrained(spec):
            return _pretrained(spec, context)
        raise SourceError(
            f"A module of the type {type(spec).__name__} cannot be loaded without example inputs",
            "Load transom.TorchSource(module, (example_input, …))",
        )

    def original(self, spec: Spec) -> InMemory:
        return InMemory(spec)


def _is_module(spec: Any) -> bool:
    torch = sys.modules.get("torch")  # an object of torch exists only if torch is imported
    return torch is not None and isinstance(spec, torch.nn.Module)


def _is_pretrained(spec: Any) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(spec, transformers.PreTrainedModel)


def _hash_of(state: Mapping[str, Any]) -> str:
    """A hash of the bytes of all weights in memory."""
    h = hashlib.blake2b(digest_size=20)
    for name in sorted(state):
        tensor = state[name].detach()
        h.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        h.update(_bytes(tensor).data)
    return h.hexdigest()


def _bytes(tensor: Any) -> Array:
    import torch

    flat = tensor.cpu().contiguous().reshape(-1)
    array: Array = flat.view(torch.uint8).numpy() if flat.numel() else flat.numpy()
    return array


# a transformers model ------------------------------------------------------------------------------------------------
class ModuleCheckpoint:
    """The weights of a module by name, as views of its memory."""

    def __init__(self, state: Mapping[str, Any], where: str) -> None:
        self._state, self.where = state, where
        self.weights_hash = _hash_of(state)

    def names(self) -> Iterable[str]:
        return self._state

    def find(self, name: str) -> Weight | None:
        from transom.graph.weights import Dense

        tensor = self._state.get(name)
        if tensor is None:
            return None
        dtype: Any = _NAMES.get(str(tensor.dtype))
        if dtype is None or not tensor.is_contiguous() or str(tensor.device) == "meta":
            raise SourceError(
                f"The weight {name} of {self.where} is of the type {tensor.dtype} on {tensor.device}, which cannot "
                "be read",
                "Load the model in float32, bfloat16 or float16, on the CPU and without quantization",
            )
        return Dense(tuple(tensor.shape), dtype, lambda: _view(tensor))


def _view(tensor: Any) -> Array:
    """The tensor's memory as an array."""
    import ml_dtypes
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        array: Array = tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()
    return array


def _pretrained(model: Any, context: int | None) -> SourceModel:
    from transom.models import family_for_hf
    from transom.models.tensors import Tensors
    from transom.sources.architectures import refusal_of_object
    from transom.sources.hf import rename_for, text_settings

    where = f"the {type(model).__name__} object"
    # Not the architecture of the checkpoint: the object may be another model, such as a classifier, made from it.
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    family = family_for_hf(config, where)
    if family is None:
        if (refusal := refusal_of_object(config, where)) is not None:
            raise refusal
        return _exported_decoder(model)
    checkpoint = ModuleCheckpoint(model.state_dict(), where)
    tensors = Tensors(checkpoint, rename_for(cast(Any, checkpoint)), lambda name: name.endswith("inv_freq"))
    graph = family.build(family.from_hf(text_settings(config, where), tensors, context), tensors)
    notes = list(graph.notes)
    if left := tensors.unused():
        notes.append(f"{len(left)} weights of the model are not used: {summarize(left)}")
    graph.notes = tuple(notes)
    return _with_texts(graph, getattr(model, "name_or_path", "") or type(model).__name__, None, model, notes)


def _exported_decoder(model: Any) -> SourceModel:
    """A decoder of a family that Transom does not build itself, exported by torch.

    Raises:
        SourceError: torch cannot export it, or the export cannot generate.
    """
    from transom.sources.torch_decoder import as_decoder

    found = _export(TorchSource(**as_decoder(model)))
    if found.graph.decoder is None:
        raise SourceError(
            f"The {type(model).__name__} object, exported by torch, {found.notes[-1]}",
            "Load a decoder of text with a cache of keys and values",
        )
    name = str(getattr(model, "name_or_path", "")) or type(model).__name__
    notes = [*found.notes, "exported by torch: Transom does not build this architecture itself"]
    found.graph.notes = tuple(notes)
    return _with_texts(found.graph, name, None, model, notes)


# any other module ----------------------------------------------------------------------------------------------------
def _export(spec: TorchSource) -> SourceModel:
    try:
        import torch
        import torch.onnx
    except ImportError as e:
        raise MissingExtra("Loading a torch module needs torch", "torch") from e
    from transom.graph.importing import import_model
    from transom.sources.onnx import raise_if_decoder

    module = spec.module
    if not isinstance(module, torch.nn.Module):
        raise SourceError(
            f"TorchSource takes a torch.nn.Module, not a {type(module).__name__}", "Wrap the module itself"
        )
    if not spec.args and not spec.kwargs:
        raise SourceError("A TorchSource needs example inputs", "Give them: TorchSource(module, (example_input, …))")
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        program = _program(torch, spec)
    finally:
        for part, training in modes:
            part.training = training
    name = type(module).__name__
    graph = import_model(program.model, name=name, weights_hash=_hash_of(module.state_dict()))
    config: dict[str, Any] = getattr(getattr(module, "config", None), "to_dict", dict)()
    graph = raise_if_decoder(graph, config)
    return _with_texts(graph, name, spec.tokenizer_from, module, list(graph.notes))


def _program(torch: Any, spec: TorchSource) -> Any:
    talk = io.StringIO()  # the exporter prints its progress
    try:
        with contextlib.redirect_stdout(talk), torch.no_grad():
            program = torch.onnx.export(
                spec.module,
                spec.args,
                kwargs=dict(spec.kwargs) or None,
                dynamo=True,
                opset_version=EXPORT_OPSET,
                dynamic_shapes=spec.dynamic_shapes,
                input_names=spec.input_names,
                output_names=spec.output_names,
                verbose=False,
            )
    except ModuleNotFoundError as e:
        raise MissingExtra(f"Exporting a torch module needs {e.name}", "torch") from e
    except (RuntimeError, TypeError, ValueError, KeyError, NotImplementedError, AssertionError) as e:
        raise SourceError(
            f"torch cannot export {type(spec.module).__name__} to ONNX: {_COLORS.sub('', message_lines(e)[0])}",
            "Make the module exportable (torch.export's messages say where it is not), or export it to ONNX yourself",
            [line for line in _COLORS.sub("", str(e)).splitlines() if line.strip()][1:12],
        ) from e
    if program is None:
        raise SourceError(f"torch exported nothing for {type(spec.module).__name__}", "Use torch 2.9 or newer")
    return program


def _with_texts(graph: Graph, name: str, folder: Any, model: Any, notes: list[str]) -> SourceModel:
    """The model with the tokenizer of the named folder, or of the folder that the model was loaded from, if any."""
    from pathlib import Path

    from transom.sources.base import local_path
    from transom.sources.onnx import texts
    from transom.text.defaults import GenerationDefaults, defaults_from_hf

    where = local_path(folder) if folder is not None else local_path(str(getattr(model, "name_or_path", "")))
    tokenizer, template, generation = None, None, GenerationDefaults()
    if where is not None and where.is_dir():
        tokenizer, template, generation = texts(where)
    elif folder is not None:
        raise SourceError(f"There is no folder {folder} to read the tokenizer from", "Give the model's folder")
    elif hasattr(model, "generation_config") and model.generation_config is not None:
        config = model.config.to_dict() if hasattr(model, "config") else {}
        stated = {key: value for key, value in model.generation_config.to_dict().items() if value is not None}
        generation = defaults_from_hf(stated, config, None)
    return SourceModel(graph, tokenizer, template, generation, name=Path(name).name, kind=TorchModels.kind, notes=notes)
