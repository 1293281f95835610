"""Finds the calibration of a model's heads: in a file beside the model, or among those shipped with Transom.

A calibration is a policy file of which only the `heads` are used.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transom.sparsity.files import policy_values
from transom.sparsity.policy import Heads, Sparsity

if TYPE_CHECKING:
    from transom.signature import Decoder

FILE_NAME = "transom-sparsity.json"
"""The name of the file in a model's folder; beside a GGUF or ONNX file it is `model.transom-sparsity.json`."""
_TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Calibration:
    """The heads of one model and their origin."""

    heads: Heads
    source: str
    """For display: a path, `"the cache"`, `"shipped with Transom, for SmolLM2-135M"`."""


def read_calibration(path: Path) -> Calibration | None:
    """The heads in a file; None if it is a policy without heads.

    Raises:
        OptionError: as for any policy file.
    """
    policy = Sparsity.from_dict(policy_values(path), where=str(path))
    return None if policy.heads is None else Calibration(policy.heads, str(path))


def beside(model: Path) -> Calibration | None:
    """The calibration beside a model file or in a model's folder; None if there is none.

    Raises:
        OptionError: the file cannot be read or is invalid.
    """
    places = [model / FILE_NAME]
    if not model.is_dir():
        places = [model.with_name(f"{model.stem}.{FILE_NAME}"), model.with_name(FILE_NAME)]
    found = next((path for path in places if path.is_file()), None)
    return None if found is None else read_calibration(found)


def place_beside(model: Path) -> Path:
    """The path for writing a model's calibration: the first one that `beside` looks at."""
    return model / FILE_NAME if model.is_dir() else model.with_name(f"{model.stem}.{FILE_NAME}")


def shipped(decoder: Decoder, name: str) -> Calibration | None:
    """The calibration shipped with Transom for a model of this shape and name.

    Both must match: quantizations and file formats of one model share them, but not their hashes. The name is compared
    without case and punctuation, and may be longer: `"SmolLM2-135M"` is in `"Smollm2 135M 8k"`.
    """
    for path in sorted(_TABLES.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["model"]["shape"] == shape_of(decoder) and _plain(table["model"]["name"]) in _plain(name):
            heads: Heads = tuple(tuple(float(h) for h in layer) for layer in table["heads"])
            return Calibration(heads, f"shipped with Transom, for {table['model']['name']}")
    return None


def shape_of(decoder: Decoder) -> str:
    """The shape of a model as text: vocabulary × width, layers × heads × head size.

    `"llama 49152x576, 30x9/3x64"`: 30 layers of 9 query and 3 KV heads.
    """
    kinds: list[str] = []
    for layer in decoder.layers:
        text = f"{layer.q_heads}/{layer.kv_heads}x{layer.head_dim}"
        if layer.value_dim != layer.head_dim:
            text += f"+{layer.value_dim}"
        if layer.sliding_window:
            text += f"w{layer.sliding_window}"
        kinds.append(text)
    distinct = dict.fromkeys(kinds)
    layers = f"{len(kinds)}x{kinds[0]}" if len(distinct) == 1 else " ".join(kinds)
    return f"{decoder.family} {decoder.vocabulary}x{decoder.hidden}, {layers}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
