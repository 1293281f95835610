"""Calibrations of a model's heads, where they are found: beside the model, in the cache, or shipped with Transom.

A calibration is a policy file of which the `heads` count.
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
"""Beside a model: in its folder, or before it the name of a GGUF or ONNX file, `model.transom-sparsity.json`."""
_TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Calibration:
    """The heads of one model, and where they were found."""

    heads: Heads
    source: str
    """For people: a path, `"the cache"`, `"shipped with Transom, for SmolLM2-135M"`."""


def read_calibration(path: Path) -> Calibration | None:
    """The heads that a file holds; None where it is a policy without heads.

    Raises:
        OptionError: as for any policy file.
    """
    policy = Sparsity.from_dict(policy_values(path), where=str(path))
    return None if policy.heads is None else Calibration(policy.heads, str(path))


def beside(model: Path) -> Calibration | None:
    """The calibration that lies beside a model file, or in a model's folder.

    Raises:
        OptionError: there is a file, and it cannot be read or holds what is not allowed.
    """
    places = [model / FILE_NAME]
    if not model.is_dir():
        places = [model.with_name(f"{model.stem}.{FILE_NAME}"), model.with_name(FILE_NAME)]
    found = next((path for path in places if path.is_file()), None)
    return None if found is None else read_calibration(found)


def place_beside(model: Path) -> Path:
    """Where the calibration of a model is written: of the places that `beside` looks at, the model's own."""
    return model / FILE_NAME if model.is_dir() else model.with_name(f"{model.stem}.{FILE_NAME}")


def shipped(decoder: Decoder, name: str) -> Calibration | None:
    """The calibration that comes with Transom for a model of this shape and name.

    Both must fit: quantisations and file formats of one model share them, and their hashes do not. The name is compared
    without case and punctuation, and may go on: `"SmolLM2-135M"` is in `"Smollm2 135M 8k"`.
    """
    for path in sorted(_TABLES.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["model"]["shape"] == shape_of(decoder) and _plain(table["model"]["name"]) in _plain(name):
            heads: Heads = tuple(tuple(float(h) for h in layer) for layer in table["heads"])
            return Calibration(heads, f"shipped with Transom, for {table['model']['name']}")
    return None


def shape_of(decoder: Decoder) -> str:
    """What tells architectures apart, in text: vocabulary × width, layers × heads × head size.

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
