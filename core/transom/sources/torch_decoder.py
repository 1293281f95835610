"""Exporting a transformers decoder of a family that Transom does not build: torch writes its graph, with the cache as
inputs and outputs.

The wrapper gives the module the inputs and outputs of Optimum's decoders, which the raising pass recognizes.
"""

from __future__ import annotations

from typing import Any

from transom.errors import SourceError

_TOKENS, _PAST, _BATCH = 3, 4, 2


def as_decoder(model: Any) -> dict[str, Any]:
    """The arguments of a `TorchSource` for a transformers model: wrapper, example inputs, shapes and names.

    Raises:
        SourceError: the model's cache is not keys and values of each layer.
    """
    import torch

    past = _example_cache(model)
    layers = len(past) // 2
    device = next(model.parameters()).device
    ids = torch.full((_BATCH, _TOKENS), 1, dtype=torch.long, device=device)
    mask = torch.ones(_BATCH, _TOKENS + _PAST, dtype=torch.long, device=device)
    positions = torch.arange(_PAST, _PAST + _TOKENS, device=device)[None].repeat(_BATCH, 1)
    free = torch.export.Dim.DYNAMIC
    row = {0: free, 1: free}
    caches = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    return {
        "module": _wrapped(model),
        "args": (ids, mask, positions, *past),
        "dynamic_shapes": (row, row, row, tuple({0: free, 2: free} for _ in past)),
        "input_names": ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{c}" for c in caches)],
        "output_names": ["logits", *(f"present.{c}" for c in caches)],
    }


def _example_cache(model: Any) -> list[Any]:
    """Keys and values of a few tokens: [batch, heads, tokens, columns] for each layer."""
    import torch

    ids = torch.ones((_BATCH, _PAST), dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    found: list[Any] = []
    for layer in getattr(cache, "layers", None) or ():
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or keys.shape[2] != _PAST:
            break
        found += [keys.clone(), values.clone()]
    else:
        if found:
            return found
    raise SourceError(
        f"The cache of {type(model).__name__} is not keys and values of each layer",
        "Transom runs decoders with a cache of keys and values",
    )


def _wrapped(model: Any) -> Any:
    import torch
    from transformers import DynamicCache

    class Decoder(torch.nn.Module):
        """Takes ids, mask, positions and caches; returns logits and caches."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.config = model.config

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            present = [part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)]
            return (out.logits, *present)

    Decoder.__name__ = type(model).__name__  # messages name the model
    return Decoder()
