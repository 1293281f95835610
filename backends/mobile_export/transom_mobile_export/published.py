"""Decoder speeds on phones that others have published, by the shape of the model. Transom's authors measured none.

They are printed beside a planned bound, to show what share of it real engines have reached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transom.contract_optional import Published

if TYPE_CHECKING:
    from transom.signature import Decoder

_EXECUTORCH = (
    "ExecuTorch, README of examples/models/llama2 (2024): 4-bit groups of 128 through XNNPACK, on the processor"
)
_EXECUTORCH_8B = (
    "ExecuTorch, README of examples/models/llama (2024): 4-bit groups of 128 through XNNPACK, on the processor"
)
_AI_HUB = "Qualcomm AI Hub Models, perf.yaml of the model: w4a16, on the Hexagon"
_AI_HUB_2024 = (
    "Qualcomm AI Hub Models, perf.yaml of Llama-v2-7B-Chat (quantized), January 2024: 4-bit weights and 16-bit "
    "activations, on the Hexagon"
)
_GEN1, _GEN2, _GEN3 = "snapdragon-8-gen-1", "snapdragon-8-gen-2", "snapdragon-8-gen-3"
_ELITE, _GEN5, _X = "snapdragon-8-elite", "snapdragon-8-elite-gen-5", "snapdragon-x-elite"
_S22 = "Samsung Galaxy S22 (Snapdragon 8 Gen 1, or Exynos 2200: not stated)"
_S23, _S24, _ONEPLUS = "Samsung Galaxy S23 Ultra", "Samsung Galaxy S24", "OnePlus 12"
_ELITE_QRD, _GEN5_QRD, _X_CRD = "Snapdragon 8 Elite QRD", "Snapdragon 8 Elite Gen 5 QRD", "Snapdragon X Elite CRD"

Shape = tuple[int, int, int]
"""Layers, hidden size, KV heads per layer."""

FIGURES: dict[Shape, tuple[Published, ...]] = {
    (32, 4096, 32): (
        Published("Llama 2 7B", _GEN1, _S22, 8.15, 0, 32000, _EXECUTORCH),
        Published("Llama 2 7B", _GEN3, _ONEPLUS, 11.55, 0, 32000, _EXECUTORCH),
        Published("Llama-v2-7B-Chat", _GEN2, _S23, 8.48, 1024, 32000, _AI_HUB_2024),
        Published("Llama-v2-7B-Chat", _GEN3, _S24, 12.85, 1024, 32000, _AI_HUB),
        Published("Llama-v2-7B-Chat", _ELITE, _ELITE_QRD, 17.94, 1024, 32000, _AI_HUB),
        Published("Llama-v2-7B-Chat", _X, _X_CRD, 11.2, 1024, 32000, _AI_HUB),
    ),
    (28, 3584, 4): (
        Published("Qwen2.5-7B-Instruct", _ELITE, _ELITE_QRD, 15.4, 4096, 152064, _AI_HUB),
        Published("Qwen2.5-7B-Instruct", _X, _X_CRD, 12.34, 4096, 152064, _AI_HUB),
    ),
    (32, 4096, 8): (
        Published("Mistral-7B-Instruct-v0.3", _ELITE, _ELITE_QRD, 12.56, 4096, 32768, _AI_HUB),
        Published("Llama 3 8B", _GEN1, _S22, 7.85, 0, 128256, _EXECUTORCH_8B),
        Published("Llama 3 8B", _GEN3, _ONEPLUS, 10.85, 0, 128256, _EXECUTORCH_8B),
        Published("Llama-v3.1-8B-Instruct", _ELITE, _ELITE_QRD, 13.05, 4096, 128256, _AI_HUB),
        Published("Llama-v3.1-8B-Instruct", _GEN5, _GEN5_QRD, 14.92, 4096, 128256, _AI_HUB),
        Published("Llama-v3.1-8B-Instruct", _X, _X_CRD, 9.36, 4096, 128256, _AI_HUB),
    ),
    (28, 3072, 8): (
        Published("Llama-v3.2-3B-Instruct", _ELITE, _ELITE_QRD, 23.47, 4096, 128256, _AI_HUB),
        Published("Llama-v3.2-3B-Instruct", _GEN5, _GEN5_QRD, 29.48, 4096, 128256, _AI_HUB),
        Published("Llama-v3.2-3B-Instruct", _X, _X_CRD, 18.42, 4096, 128256, _AI_HUB),
    ),
    (16, 2048, 8): (
        Published("Llama-v3.2-1B-Instruct", _ELITE, _ELITE_QRD, 53.64, 4096, 128256, _AI_HUB),
        Published("Llama-v3.2-1B-Instruct", _GEN5, _GEN5_QRD, 64.04, 4096, 128256, _AI_HUB),
    ),
}  # fmt: skip


def published(decoder: Decoder) -> tuple[Published, ...]:
    """Published speeds of models with a decoder's shape and a vocabulary of about the same size."""
    heads = {layer.kv_heads for layer in decoder.layers}
    shape = (len(decoder.layers), decoder.hidden, max(heads, default=0))
    found = FIGURES.get(shape, ()) if len(heads) == 1 else ()
    return tuple(f for f in found if 0.95 < decoder.vocabulary / f.vocabulary < 1.05)
