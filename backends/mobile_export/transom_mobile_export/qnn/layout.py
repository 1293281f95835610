"""The files of a variant, and `qnn.json`, with which an app runs them without Transom.

Every part has two graphs, `prefill` for `chunk` new tokens and `decode` for one, whose inputs and outputs are described
in `transom_mobile_export.qnn.lowering`. The host looks up the embedding, writes masks and stores the caches unchanged.
Columns 0 to C - 1 of a mask are the cache, columns from C on the new tokens. With sparse attention the host also stores
the nodes, and computes the inputs of `transom_mobile_export.qnn.sparse_inputs` from the numbers under `sparse`.
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
"""Versions of `qnn.json`. A host that supports only dense attention refuses the second one."""
LIBRARIES_FILE = "libraries.json"
MEMORY_FILE = "memory.json"
CHUNK = 128
"""New tokens of a prefill."""
LARGEST = 3_200_000_000
"""Largest number of bytes of weights in one part. A context is limited to 4 GB, and also holds activations, code, and
what two graphs do not share."""
CACHE_BYTES = {"uint8": 1, "uint16": 2, "float16": 2, "float32": 4}
"""Bytes of a number in a cache."""


@dataclass(frozen=True)
class PartFiles:
    """One part of the decoder."""

    prefill: str
    """Name of its ONNX file, which has one node `EPContext` that names the binary beside it."""
    decode: str
    layers: tuple[int, int]
    """The first layer, and one past the last."""


@dataclass(frozen=True)
class CacheLayer:
    """The cache of one layer."""

    kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    """How many tokens a query sees, itself included; 0: all."""


@dataclass(frozen=True)
class QnnVariant:
    """The contents of `qnn.json`."""

    context: int
    chunk: int
    vocabulary: int
    hidden: int
    scale: float
    """Factor of the embedding's rows."""
    layers: tuple[CacheLayer, ...]
    cache: str
    """`"uint8"`, `"uint16"` or `"float16"`."""
    mask_low: float
    parts: tuple[PartFiles, ...]
    soc_model: int
    htp_arch: int
    sparsity: str = "dense"
    """The built-in sparsity policy in its canonical form."""

    def sizes(self, tokens: int) -> ChoiceSizes | None:
        """Sizes of sparse attention in a step of one token or a chunk; None: every key is read."""
        policy = Sparsity.from_string(self.sparsity)
        return None if policy.dense else ChoiceSizes(policy, self.context, tokens)

    def choosing(self, layer: int) -> tuple[int, ...]:
        """The sparse KV heads of a layer, in ascending order; the host stores nodes for them."""
        return sparse_heads(Sparsity.from_string(self.sparsity).layer(layer), self.layers[layer].kv_heads)

    def _sparse(self) -> dict[str, Any]:
        """The numbers from which a host computes the inputs of sparse attention."""
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
        """Raises ValueError, KeyError or TypeError for text that `to_json` did not write."""
        raw: Mapping[str, Any] = json.loads(text)
        if raw["qnn_variant"] not in (VERSION, SPARSE_VERSION):
            raise ValueError(f"qnn_variant is {raw['qnn_variant']}, and the newest known version is {SPARSE_VERSION}")
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
