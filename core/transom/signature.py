"""What the host knows about a decoder without opening its graph: sizes, layers, cache shapes.

A `Decoder` is stored as JSON in the graph's metadata and beside each artifact, so that a warm start can plan memory and
drive a session without reading ONNX. This module imports no third-party package.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from transom.typed import from_json

METADATA_KEY = "transom.decoder"


@dataclass(frozen=True)
class LayerCache:
    """The cache of one attention layer: its shape per token, and its sliding window."""

    q_heads: int
    kv_heads: int
    head_dim: int
    """Columns of one key head."""
    value_dim: int
    """Columns of one value head."""
    sliding_window: int = 0
    """Tokens that a query sees, its own included; 0: all."""

    @property
    def elements(self) -> int:
        """Cached numbers per token, keys and values together."""
        return self.kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Decoder:
    """The signature of a decoder graph. Names of inputs and outputs are fixed; see `docs/architecture.md`."""

    family: str
    """The model family, such as `"llama"`; `"onnx"` for a model that is an ONNX graph of unknown family."""
    vocabulary: int
    hidden: int
    context: int
    """The longest sequence that the model was made for, in tokens."""
    layers: tuple[LayerCache, ...]
    parameters: int = 0
    weight_bytes: int = 0
    """Bytes of all weights as the graph stores them."""

    @property
    def cache_elements(self) -> int:
        """Cached numbers per token over all layers."""
        return sum(layer.elements for layer in self.layers)

    def cache_bytes(self, tokens: int, bytes_per_element: float) -> int:
        """Bytes that `tokens` cached tokens take."""
        return int(tokens * self.cache_elements * bytes_per_element)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def __post_init__(self) -> None:
        numbers = [self.vocabulary, self.hidden, self.context, self.parameters, self.weight_bytes]
        for layer in self.layers:
            numbers += [layer.q_heads, layer.kv_heads, layer.head_dim, layer.value_dim, layer.sliding_window]
        if min(numbers) < 0:
            raise ValueError(f"a size of a decoder is {min(numbers)}")

    @classmethod
    def from_json(cls, text: str | bytes) -> Decoder:
        """The inverse of `to_json`. Raises ValueError for anything else."""
        return from_json(cls, text)


def cache_input_names(layer: int) -> tuple[str, str]:
    return f"past_key.{layer}", f"past_value.{layer}"


def cache_output_names(layer: int) -> tuple[str, str]:
    return f"present_key.{layer}", f"present_value.{layer}"
