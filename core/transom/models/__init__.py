"""Decoder families that load without torch: a checkpoint's settings and tensors → the neutral graph.

To add a family: write one file with a config, two readers and `build`, and add it to `_MODULES`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from transom.errors import SourceError, nearest
from transom.models.family import Family

_MODULES = ("gemma2", "gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3")


@functools.cache
def families() -> tuple[Family, ...]:
    """Every family, in the order of their names."""
    return tuple(importlib.import_module(f"transom.models.{name}").FAMILY for name in _MODULES)


def family_for_hf(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json, by `architectures`, or by `model_type` where that is missing.

    Raises:
        SourceError: no family has the name; lists what is known and the ways out.
    """
    architectures = config.get("architectures")
    names = [str(a) for a in architectures] if isinstance(architectures, list) and architectures else []
    for family in families():
        if any(name in family.architectures for name in names):
            return family
    kind = config.get("model_type")
    if not names:
        for family in families():
            if kind in family.model_types:
                return family
    if not names and kind is None:
        raise SourceError(
            f"{where} names neither architectures nor a model_type, so the kind of model is not known",
            "Get the file again from where the model was published",
        )
    known = {name for family in families() for name in family.architectures}
    raise _unknown(names[0] if names else str(kind), where, known)


def family_for_gguf(architecture: str, where: str) -> Family:
    """The family of a GGUF file, by `general.architecture`.

    Raises:
        SourceError: no family has the name; lists what is known and the ways out.
    """
    for family in families():
        if architecture in family.gguf:
            return family
    raise _unknown(architecture, where, {name for family in families() for name in family.gguf})


def _unknown(name: str, where: str, known: set[str]) -> SourceError:
    return SourceError(
        f'The architecture "{name}" of {where} is not one that Transom builds itself',
        "Load its Hugging Face directory with the extra that knows some 290 more (pip install 'transom[families]'), or "
        f"export the model to ONNX and load that file. {nearest(name, known)}",
    )


__all__ = ["Family", "families", "family_for_gguf", "family_for_hf"]
