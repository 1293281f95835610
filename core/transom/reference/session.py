"""The reference backend's session: a packed session that applies sparsity policies and counts the keys read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from transom.contract import Limits, State, Tensor, Work
from transom.errors import OptionError
from transom.graph.sparse import dense_reason, is_attention
from transom.ops.sparse_attention import OBSERVER
from transom.ops.sparse_routing import HeadRoute
from transom.reference.executor import Executor
from transom.sessions import PackedSession, check_step
from transom.sessions.steps import Array
from transom.signature import Decoder
from transom.sparsity import Sparsity


class ReferenceSession(PackedSession):
    """A `SparseSession` over the executor. Work items with different policies in one step run one after the other."""

    def __init__(self, executor: Executor, decoder: Decoder | None, limits: Limits) -> None:
        super().__init__(executor.run, decoder, limits)
        self._executor = executor
        self._read: weakref.WeakKeyDictionary[State, Array] = weakref.WeakKeyDictionary()

    def step(self, work: Sequence[Work]) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        decoder = self._need_decoder()
        check_step(work, self._limits, decoder.vocabulary, sparsity=True)
        by_policy: dict[str | None, list[int]] = {}
        for i, w in enumerate(work):
            by_policy.setdefault(w.sparsity, []).append(i)
        results: list[Any] = [None] * len(work)
        added: list[list[Array]] = [[] for _ in work]
        counts: list[Array] = [self._zeros() for _ in work]
        for text, indices in by_policy.items():
            part = [work[i] for i in indices]
            run = self._run_with(_policy(text, decoder), [counts[i] for i in indices])
            for i, result, cache in zip(indices, *self._compute(part, run), strict=True):
                results[i], added[i] = result, cache
        self._commit(work, added)
        for w, count in zip(work, counts, strict=True):
            self._read[w.state] = self._read.get(w.state, 0) + count
        return results

    def keys_read(self, state: State) -> Tensor:
        """float64 [2, layers, kv_heads]; see `transom.contract_optional.SparseSession`."""
        state.fork(0)  # raises for a freed state
        return np.array(self._read.get(state, self._zeros()))

    def _zeros(self) -> Array:
        layers = self._need_decoder().layers
        return np.zeros((2, len(layers), max(layer.kv_heads for layer in layers)))

    def _run_with(self, policy: Sparsity | None, counts: Sequence[Array]) -> Callable[[Mapping[str, Any]], Any]:
        """The executor with a policy that overrides the graph's; counts the keys that each sequence reads."""

        def observe(layer: int, routed: HeadRoute) -> None:
            count = counts[routed.sequence][:, layer, routed.head]
            for block in routed.route.blocks:
                count += np.array([block.read, block.seen]) * (block.end + 1 - block.begin)

        def adjust(node: ir.Node, attributes: dict[str, Any]) -> None:
            if not is_attention(node):
                return
            attributes[OBSERVER] = partial(observe, int(attributes["layer"]))
            if policy is not None and not dense_reason(node):
                attributes["sparsity"] = policy.layer(int(attributes["layer"])).to_string()

        return partial(self._executor.run, adjust=adjust)


def _policy(text: str | None, decoder: Decoder) -> Sparsity | None:
    """Parse a policy. Raises ValueError if it is not a policy for this model."""
    if text is None:
        return None
    try:
        return Sparsity.from_string(text).for_model(decoder)
    except OptionError as error:
        raise ValueError(str(error)) from error
