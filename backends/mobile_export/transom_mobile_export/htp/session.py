"""The contract session over compiled parts: one sequence at a time, whose caches it keeps as the graphs give them.

A prompt goes through `prefill` in chunks, padded at the end where a chunk is short: no token sees what comes behind it,
and keys and values of the padding are thrown away. `prefill` gives the logits of one row, the chunk's last; where all
rows are asked for, the others go through `decode` once more, with what `prefill` has put into the cache before them.

With sparse attention a chunk begins at a multiple of 64 positions: rows of tokens that are in the cache are padding,
too. Steps of fewer than 16 tokens go through `decode` one by one, since each of their queries chooses for itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transom.contract import Artifact, Limits, Options, State, Tensor, Work
from transom.errors import EngineError
from transom.graph.weights import Array
from transom.ops.sparse_routing import BLOCK, COLUMN_ROWS
from transom.sessions import check_step, split_logits
from transom_mobile_export.htp import sdk
from transom_mobile_export.htp.layout import EMBEDDING_FILE, VARIANT_FILE, Variant
from transom_mobile_export.htp.lowering import MASK, MASK_WINDOW
from transom_mobile_export.htp.probing import Chip
from transom_mobile_export.htp.sparse_inputs import base_of, first_node, step_inputs

DAMAGED = "Remove it with: transom cache clear"
NODES = ("new_mean.", "new_variance.")
"""Outputs that are of nodes, not of tokens."""
NEVER = 1 << 30
"""The position of what no query sees."""


def load_artifact(artifact: Artifact, options: Options) -> QnnSession:
    """A session over the artifact.

    Raises:
        EngineError: the files are not what this backend wrote, or QNN does not open them.
    """
    files = {name: path for name, path in artifact.files.items() if isinstance(path, Path)}
    try:
        variant = Variant.from_json(files[VARIANT_FILE].read_text())
        shape = variant.vocabulary, variant.hidden
        table = np.memmap(files[EMBEDDING_FILE], "<f2", "r", shape=shape)
        paths = [(files[part.prefill], files[part.decode]) for part in variant.parts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise EngineError(f"This compiled model is damaged: {e}", DAMAGED) from e
    chip = Chip(variant.soc_model, variant.htp_arch)
    graphs = [Graphs(*(sdk.open_context(path, chip) for path in pair)) for pair in paths]
    context = min(int(str(options.get("context") or variant.context)), variant.context)
    return QnnSession(variant, table, graphs, context)


@dataclass(frozen=True)
class Graphs:
    """The two of a part, as onnxruntime's sessions."""

    prefill: Any
    decode: Any


class QnnState:
    """The cache of one sequence: codes or float16 by the name of the input, [1, KV heads, context, columns]."""

    def __init__(self, owner: QnnSession, cache: dict[str, Array], length: int = 0) -> None:
        self.owner, self.cache, self._length = owner, cache, length
        self._freed = False

    @property
    def length(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.cache.values())

    def need(self) -> None:
        """Raises RuntimeError once it is freed."""
        if self._freed:
            raise RuntimeError("this sequence state was freed")

    def fork(self, length: int) -> QnnState:
        self._within(length, "fork")
        return QnnState(self.owner, {name: array.copy() for name, array in self.cache.items()}, length)

    def truncate(self, length: int) -> None:
        self._within(length, "truncate")
        self._length = length

    def _within(self, length: int, what: str) -> None:
        self.need()
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot {what} at {length}: the state holds {self._length} tokens")

    def grow(self, tokens: int) -> None:
        """Take so many tokens more, which lie in the cache already."""
        self._length += tokens

    def free(self) -> None:
        self.cache, self._length, self._freed = {}, 0, True


class QnnSession:
    """A `transom.contract.SavingSession`.

    Args:
        table: float16 [vocabulary, hidden].
        graphs: of each part.
        context: tokens that one state may hold; at most the variant's.
    """

    def __init__(self, variant: Variant, table: Array, graphs: Sequence[Graphs], context: int) -> None:
        self.variant, self._table, self._graphs = variant, table, list(graphs)
        self._limits = Limits(1, min(variant.chunk, context), context, 0)
        self._window = max(layer.window for layer in variant.layers)
        self._sizes = {tokens: variant.sizes(tokens) for tokens in (1, variant.chunk)}
        self._closed = False

    @property
    def limits(self) -> Limits:
        return self._limits

    def pages(self) -> tuple[int, int]:
        return (0, 0)

    def new_state(self) -> QnnState:
        self._need_open()
        return QnnState(self, self._caches())

    def _caches(self) -> dict[str, Array]:
        """Empty caches by the names of their inputs."""
        variant, sizes = self.variant, self._sizes[1]
        found: dict[str, Array] = {}
        for i, layer in enumerate(variant.layers):
            for what, columns in (("key", layer.head_dim), ("value", layer.value_dim)):
                found[f"past_{what}.{i}"] = np.zeros((1, layer.kv_heads, variant.context, columns), variant.cache)
            if sizes is not None and (heads := variant.choosing(i)):
                shape = 1, len(heads), sizes.nodes, layer.head_dim
                found[f"past_mean.{i}"] = np.zeros(shape, variant.cache)
                found[f"past_variance.{i}"] = np.zeros(shape, np.float16)
        return found

    def step(self, work: Sequence[Work]) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        self._need_open()
        states = [self._own(w.state) for w in work]
        check_step(work, self._limits, self.variant.vocabulary)
        if not work:
            return []
        (w,), (state,) = work, states
        # What is written behind a state's tokens is no part of it before it grows.
        logits = self._logits(state, np.asarray(w.tokens, np.int64), all_rows=w.logits == "all")
        results = split_logits(logits[: 0 if w.logits == "none" else None], work, [len(w.tokens)], copy=False)
        state.grow(len(w.tokens))
        return results

    def _logits(self, state: QnnState, ids: Array, *, all_rows: bool) -> Array:
        """float32 [1, vocabulary], or [tokens, vocabulary]. The tokens' keys and values are then in the cache."""
        past, begin = state.length, 0
        rows: list[Array] = []
        for size in self._pieces(past, len(ids)):
            last = self._run(state, ids[begin : begin + size], past + begin)
            if all_rows:
                more = range(begin, begin + size - 1)
                rows += [self._run(state, ids[i : i + 1], past + i, keep=False) for i in more]
            rows.append(last)
            begin += size
        return np.concatenate(rows) if all_rows else last

    def _pieces(self, past: int, count: int) -> list[int]:
        """Tokens of each run of a step."""
        if self._sizes[1] is None:
            return [count]
        if count < COLUMN_ROWS:
            return [1] * count
        first = min(count, self.variant.chunk - past % BLOCK)
        return [first, count - first] if first < count else [first]

    def _run(self, state: QnnState, ids: Array, past: int, *, keep: bool = True) -> Array:
        """The logits of the last token, float32 [1, vocabulary].

        Args:
            keep: write keys and values into the cache.
        """
        variant, count = self.variant, len(ids)
        size = 1 if count == 1 else variant.chunk
        sizes = self._sizes[size]
        base = past if sizes is None else base_of(sizes, past)
        at = slice(past - base, past - base + count)
        """The rows of the tokens."""
        hidden = np.zeros((1, size, variant.hidden), np.float32)
        hidden[0, at] = self._table[ids].astype(np.float32) * np.float32(variant.scale)
        positions = base + np.arange(size)
        inputs: dict[str, Array] = {
            "hidden": hidden, "positions": np.minimum(positions, variant.context - 1)[None].astype(np.int32),
            "row": np.array([at.stop - 1], np.int32), MASK: self._mask(positions, past, 0),
        }  # fmt: skip
        if sizes is not None:
            inputs |= step_inputs(sizes, past, count, variant.mask_low)
        if self._window:
            inputs[MASK_WINDOW] = self._mask(positions, past, self._window)
        new: dict[str, Array] = {}
        outputs: dict[str, Array] = {}
        for graphs in self._graphs:
            session = graphs.decode if count == 1 else graphs.prefill
            wanted = [v.name for v in session.get_inputs()]
            given = {name: state.cache[name] if name.startswith("past_") else inputs[name] for name in wanted}
            outputs = dict(zip([v.name for v in session.get_outputs()], session.run(None, given), strict=True))
            inputs["hidden"] = outputs.pop("hidden_out", inputs["hidden"])
            new |= {name: array for name, array in outputs.items() if name.startswith("new_")}
        if keep:
            for name, array in new.items():
                cache = state.cache[name.replace("new_", "past_")]
                if sizes is not None and name.startswith(NODES):
                    first = first_node(sizes, past)
                    cache[:, :, first : first + array.shape[2]] = array[:, :, : cache.shape[2] - first]
                else:
                    cache[:, :, past : past + count] = array[:, :, at]
        return np.asarray(outputs["logits"], np.float32).reshape(1, -1)

    def _mask(self, positions: Array, past: int, window: int) -> Array:
        """float32 [1, 1, S, C + S]: 0 for what each new token sees, the cache first and the new tokens behind it."""
        context, low = self.variant.context, self.variant.mask_low
        own = np.where(positions < past, NEVER, positions)
        at = np.concatenate([np.where(np.arange(context) < past, np.arange(context), NEVER), own])
        behind = positions[:, None] - at[None]
        seen = (behind >= 0) & ((behind < window) | (window == 0))
        return np.where(seen, 0.0, low).astype(np.float32)[None, None]

    def save(self, state: State) -> Mapping[str, Tensor]:
        """Every cache by the name of its input, [1, KV heads, tokens, columns]; of nodes, those that tokens are in."""
        self._need_open()
        own = self._own(state)
        return {name: array[:, :, : self._filled(name, own.length)].copy() for name, array in own.cache.items()}

    def _filled(self, name: str, length: int) -> int:
        """Rows of a cache that so many tokens fill."""
        sizes = self._sizes[1]
        nodes = sizes is not None and name.replace("past_", "new_").startswith(NODES)
        return -(-length // sizes.rule.node) if nodes and sizes is not None else length

    def restore(self, length: int, arrays: Mapping[str, Tensor]) -> QnnState:
        """A state out of what `save` gave.

        Raises:
            ValueError: these are no arrays of a state of so many tokens.
        """
        self._need_open()
        if not 0 <= length <= self._limits.context:
            raise ValueError(f"{length} tokens exceed the context of {self._limits.context} tokens")
        state = self.new_state()
        for name, array in state.cache.items():
            given = np.asarray(arrays.get(name, ()))
            filled = self._filled(name, length)
            if given.dtype != array.dtype or given.shape != (*array.shape[:2], filled, array.shape[3]):
                raise ValueError(f"{name} is not that of {length} tokens")
            array[:, :, :filled] = given
        state.grow(length)
        return state

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._need_open()
        raise RuntimeError("this session keeps the cache of its decoder itself; call step()")

    def close(self) -> None:
        self._closed = True
        self._graphs.clear()

    def _own(self, state: State) -> QnnState:
        if not isinstance(state, QnnState) or state.owner is not self:
            raise ValueError("this sequence state belongs to another session")
        state.need()
        return state

    def _need_open(self) -> None:
        if self._closed:
            raise RuntimeError("this session is closed")
