"""Decoder families that load without torch: they build the neutral graph from a checkpoint's settings and tensors.

To add a family, write one file with a config, two readers and `build`, and add its name to `_MODULES`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from transom.errors import SourceError
from transom.models.family import Family

_MODULES = ("gemma2", "gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3")


@functools.cache
def families() -> tuple[Family, ...]:
    """Every family, sorted by name."""
    return tuple(importlib.import_module(f"transom.models.{name}").FAMILY for name in _MODULES)


def family_for_hf(config: Mapping[str, Any], where: str) -> Family | None:
    """The family of a config.json, by `architectures`, or by `model_type` if that is missing; None: it has none.

    Raises:
        SourceError: the file names no kind of model.
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
            f"{where} names neither architectures nor a model_type, so the kind of model is unknown",
            "Download the file again from the model's publisher",
        )
    return None


def family_for_gguf(architecture: str) -> Family | None:
    """The family of a GGUF file, by `general.architecture`; None: it has none."""
    return next((family for family in families() if architecture in family.gguf), None)


__all__ = ["Family", "families", "family_for_gguf", "family_for_hf"]
