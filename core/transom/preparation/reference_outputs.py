"""The outputs of the NumPy reference for the check prompt, computed once for each model and kept in the cache.

The reference reads the weights layer by layer, so it needs little memory. A graph that is not a decoder gets fixed
inputs that are generated from their shapes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.artifacts import artifact_key
from transom.artifacts.arrays import read_arrays
from transom.errors import SourceError
from transom.preparation.agreement import DECODES
from transom.preparation.jobs import version
from transom.sessions.inputs import decoder_inputs, empty_cache
from transom.signature import Decoder

if TYPE_CHECKING:
    from transom.artifacts import Cache
    from transom.graph import Graph
    from transom.preparation.cached_source import CachedSource
    from transom.text import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
InputSpecs = Mapping[str, tuple[str, tuple[int | str | None, ...]]]
"""Input name -> NumPy element type and shape."""

PROMPT = "The capital of France is Paris, and two plus two is four."
LONGEST = 32
"""Largest number of tokens in the check prompt."""


def check_prompt(decoder: Decoder, tokenizer: Tokenizer | None) -> list[int]:
    """The fixed prompt as token ids: a text, or without a tokenizer ids spread over the vocabulary."""
    ids = tokenizer.encode(PROMPT) if tokenizer is not None else []
    ids = [i for i in ids if 0 <= i < decoder.vocabulary]
    if len(ids) < DECODES + 2:
        ids = [(i * 7919 + 13) % decoder.vocabulary for i in range(16)]
    return ids[: min(LONGEST, decoder.context)]


def reference_logits(graph: Graph, ids: Sequence[int], progress: Callable[[float], None] | None = None) -> Array:
    """The reference's logits for every position, float32 [positions, vocabulary].

    Raises:
        SourceError: the reference itself computes NaN or infinity, so the weights are damaged.
    """
    from transom.reference.executor import Executor

    decoder = graph.decoder
    assert decoder is not None
    inputs = decoder_inputs([ids], range(len(ids)), empty_cache(decoder))
    logits = np.asarray(Executor(graph).run(inputs, progress=progress)["logits"], np.float32)
    if not np.isfinite(logits).all():
        raise SourceError(
            "The reference computes NaN or infinity for this model: its weights hold such values, or overflow",
            "Download or convert the checkpoint again",
        )
    return logits


def plain_inputs(specs: InputSpecs) -> dict[str, Array]:
    """Fixed inputs of a graph that is not a decoder: normally distributed floats, and integers of 0 and 1.

    Each dynamic dimension is 3, so that dimensions which must be equal are.
    """
    rng = np.random.default_rng(7)
    inputs: dict[str, Array] = {}
    for name, (dtype, shape) in specs.items():
        sizes = [d if isinstance(d, int) else 3 for d in shape]
        kind = np.dtype(dtype)
        values = rng.standard_normal(sizes) if kind.kind == "f" else rng.integers(0, 2, sizes)
        inputs[name] = np.asarray(values).astype(kind)
    return inputs


_FILE = "golden.npz"


def _key(source: CachedSource) -> str:
    parts = {"graph": source.graph_digest, "transom": version()}
    return artifact_key({**parts, "source": source.key} if source.uses_plugin_operators else parts)


def to_npz(outputs: Mapping[str, Array]) -> bytes:
    """The outputs in NumPy's file format, as the cache and bundles contain them."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(array) for name, array in outputs.items()})
    return buffer.getvalue()


def keep(cache: Cache, source: CachedSource, outputs: Mapping[str, Array]) -> None:
    """Keep the reference outputs of a source."""
    cache.reference_outputs.write(_key(source), {_FILE: to_npz(outputs)})


def from_npz(data: bytes, decoder: Decoder | None) -> dict[str, Array]:
    """The outputs that `to_npz` wrote.

    Args:
        decoder: the decoder that they are of.

    Raises:
        ValueError: the file is damaged, or its content is none of such a decoder.
    """
    found = read_arrays(data)
    if decoder is None:
        return found
    ids, logits = found.get("ids"), found.get("logits")
    sound = (
        ids is not None
        and logits is not None
        and (ids.dtype.kind, logits.dtype.kind) == ("i", "f")
        and ids.ndim == 1
        and logits.shape == (len(ids), decoder.vocabulary)
        and len(ids) > 0
        and ids.min() >= 0
        and ids.max() < decoder.vocabulary
    )
    if not sound:
        raise ValueError("these are no logits of this model")
    return found


def recall(cache: Cache, source: CachedSource) -> dict[str, Array] | None:
    """The outputs that `keep` stored, or None. What is damaged is removed."""
    entry = cache.reference_outputs.lookup(_key(source))
    if entry is None:
        return None
    try:
        return from_npz(entry.read(_FILE), source.decoder)
    except (OSError, KeyError, ValueError) as error:
        entry.discard(f"its file {_FILE} is damaged: {error}")
        return None
