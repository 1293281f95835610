"""The files of a variant, and `qnn.json`, by which an app without Transom runs them.

Every part has two graphs, `prefill` for `chunk` new tokens and `decode` for one, whose inputs and outputs are described
in `transom_mobile_export.qnn.lowering`. The host looks up the embedding, writes masks, and keeps the caches as they
come out: columns 0 to C - 1 of a mask are the cache, columns C and on the new tokens. With sparse attention the host
also keeps the nodes, and makes the inputs of `transom_mobile_export.qnn.sparse_inputs` by the numbers under `sparse`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transom.signature import Decoder
from transom.sparsity import Sparsity
from transom_mobile_export.qnn.sparse_sizes import FORCED, ChoiceSizes, sparse_heads

VARIANT_FILE = "qnn.json"
EMBEDDING_FILE = "shared/embedding.bin"
ERRORS_FILE = "errors.json"
VERSION, SPARSE_VERSION = 1, 2
"""Of `qnn.json`. A host that knows dense attention alone refuses the second one."""
LIBRARIES_FILE = "libraries.json"
MEMORY_FILE = "memory.json"
CHUNK = 128
"""New tokens of a prefill."""
LARGEST = 3_200_000_000
"""Bytes of weights in one part. A context ends at 4 GB; activations, code, and what two graphs do not share are in it,
too."""
CACHE_BYTES = {"uint8": 1, "uint16": 2, "float16": 2, "float32": 4}
"""Of a number in a cache."""


@dataclass(frozen=True)
class PartFiles:
    """One part of the decoder."""

    prefill: str
    """Name of its ONNX file, which holds one node `EPContext` and names the binary beside it."""
    decode: str
    layers: tuple[int, int]
    """The first, and the first that is no longer in it."""


@dataclass(frozen=True)
class CacheLayer:
    """The cache of one layer."""

    kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    """Tokens that a query sees, itself included; 0: all."""


@dataclass(frozen=True)
class QnnVariant:
    """What `qnn.json` says."""

    context: int
    chunk: int
    vocabulary: int
    hidden: int
    scale: float
    """What rows of the embedding are multiplied by."""
    layers: tuple[CacheLayer, ...]
    cache: str
    """`"uint8"`, `"uint16"` or `"float16"`."""
    mask_low: float
    parts: tuple[PartFiles, ...]
    soc_model: int
    htp_arch: int
    sparsity: str = "dense"
    """The policy that is built in, in its canonical form."""

    def sizes(self, tokens: int) -> ChoiceSizes | None:
        """Of sparse attention in a step of one token or of a chunk; None: every key is read."""
        policy = Sparsity.from_string(self.sparsity)
        return None if policy.dense else ChoiceSizes(policy, self.context, tokens)

    def choosing(self, layer: int) -> tuple[int, ...]:
        """The KV heads of a layer that choose what they read, ascending; nodes are kept for them."""
        return sparse_heads(Sparsity.from_string(self.sparsity).layer(layer), self.layers[layer].kv_heads)

    def _sparse(self) -> dict[str, Any]:
        """The numbers by which a host makes the inputs of sparse attention."""
        sizes = self.sizes(1)
        if sizes is None:
            return {}
        rule = sizes.rule
        return {
            "sparse": {
                "policy": self.sparsity, "heads": [list(self.choosing(i)) for i in range(len(self.layers))],
                "unit": rule.unit, "node": rule.node, "rows": rule.rows, "local_blocks": sizes.local,
                "near_blocks": sizes.near_blocks, "chosen": sizes.chosen, "far": sizes.far,
                "dense_below": rule.dense_below, "dense_by_density": sizes.dense_by_density, "forced": FORCED,
            }
        }  # fmt: skip

    def to_json(self) -> str:
        version = VERSION if self.sizes(1) is None else SPARSE_VERSION
        return json.dumps(
            {
                "qnn_variant": version, "context": self.context, "chunk": self.chunk, "vocabulary": self.vocabulary,
                "hidden": self.hidden,
                "embedding": {"file": EMBEDDING_FILE, "dtype": "float16", "scale": self.scale},
                "layers": [vars(layer) for layer in self.layers],
                "cache": {"dtype": self.cache}, "mask_low": self.mask_low,
                "parts": [{"prefill": p.prefill, "decode": p.decode, "layers": list(p.layers)} for p in self.parts],
                "soc_model": self.soc_model, "htp_arch": self.htp_arch,
                **self._sparse(),
            },
            indent=1,
        )  # fmt: skip

    @classmethod
    def from_json(cls, text: str) -> QnnVariant:
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        raw: Mapping[str, Any] = json.loads(text)
        if raw["qnn_variant"] not in (VERSION, SPARSE_VERSION):
            raise ValueError(f"qnn_variant is {raw['qnn_variant']}, and up to {SPARSE_VERSION} are known")
        return cls(
            raw["context"], raw["chunk"], raw["vocabulary"], raw["hidden"], raw["embedding"]["scale"],
            tuple(CacheLayer(**layer) for layer in raw["layers"]), raw["cache"]["dtype"], raw["mask_low"],
            tuple(PartFiles(p["prefill"], p["decode"], (p["layers"][0], p["layers"][1])) for p in raw["parts"]),
            raw["soc_model"], raw["htp_arch"], raw.get("sparse", {}).get("policy", "dense"),
        )  # fmt: skip


def cache_layers(decoder: Decoder) -> tuple[CacheLayer, ...]:
    return tuple(
        CacheLayer(layer.kv_heads, layer.head_dim, layer.value_dim, layer.sliding_window) for layer in decoder.layers
    )
