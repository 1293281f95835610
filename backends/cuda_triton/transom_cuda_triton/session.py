"""The contract session over the engine: pages with copy on write, sparsity policies, and counts of the keys read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from transom.contract import OutOfPages, State, Tensor, Work
from transom.errors import OptionError, message_lines
from transom.sessions import PagedSession, PagedState, PageTable, check_step, logit_rows, split_rows
from transom.sessions.steps import CHUNK, Array, dense_keys
from transom.signature import Decoder, LayerCache
from transom.sparsity import Sparsity
from transom_cuda_triton.engine import Result, TritonEngine, not_finite
from transom_cuda_triton.routes import RoutedStep, SequenceRoute

if TYPE_CHECKING:
    from transom_cuda_triton.parallel import Team

MAX_SEQUENCES = 64
MAX_TOKENS = 1024
"""New tokens in one step; more would not use a card better, but need larger buffers of activations."""


class TritonState(PagedState):
    """A state with a slot of sparse attention, taken when it is first needed."""

    def __init__(
        self, table: PageTable, page_bytes: int, engine: TritonEngine | Team, layers: Sequence[LayerCache]
    ) -> None:
        super().__init__(table, page_bytes)
        self._engine, self._layers = engine, layers
        self.route: SequenceRoute | None = None
        self.counts = np.zeros((2, len(layers), max(x.kv_heads for x in layers)))

    def need_route(self) -> SequenceRoute:
        """Raises OutOfPages if no slot is free."""
        if self.route is None:
            self.route = self._engine.routes.take()
        return self.route

    def fork(self, length: int) -> TritonState:
        return TritonState(self.table.fork(length), self._page_bytes, self._engine, self._layers)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        if self.route is not None:
            self.route.forget(length)

    def free(self) -> None:
        super().free()
        self._free_route()

    def _free_route(self) -> None:
        if self.route is not None:
            self._engine.routes.give_back(self.route)
            self.route = None

    def __del__(self) -> None:
        self._free_route()


class TritonSession(PagedSession):
    """A `transom.contract_optional.SparseSession`."""

    def __init__(self, engine: TritonEngine | Team, decoder: Decoder, *, context: int, pages: int) -> None:
        self._triton = engine
        super().__init__(
            engine, decoder, context=context, pages=pages, max_sequences=MAX_SEQUENCES, max_tokens=MAX_TOKENS
        )

    def new_state(self) -> TritonState:
        self._need_open()
        return TritonState(self._pool.new_table(), self._page_bytes, self._triton, self._decoder.layers)

    def keys_read(self, state: State) -> Tensor:
        """float64 [2, layers, kv_heads]; see `transom.contract_optional.SparseSession`."""
        own = self._own(state)
        assert isinstance(own, TritonState)
        return own.counts.copy()

    def _check(self, work: Sequence[Work]) -> None:
        check_step(work, self._limits, self._decoder.vocabulary, sparsity=True)
        for w in work:
            self._policy(w)  # raises ValueError for an unsupported policy

    def _policy(self, work: Work) -> Sparsity:
        text = self._triton.program.sparsity if work.sparsity is None else work.sparsity
        try:
            policy = Sparsity.from_string(text).for_model(self._decoder)
        except OptionError as e:
            raise ValueError(str(e)) from e
        if reason := self._triton.routes.unsupported(policy):
            raise ValueError(reason)
        return policy

    def _results(
        self,
        work: Sequence[Work],
        tokens: Sequence[Array],
        past: Sequence[int],
        pages: Sequence[Sequence[int]],
        rows: Sequence[int],
    ) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        """Works with different policies run one after another; dense works run together with the first policy."""
        policies = [self._policy(w) for w in work]
        sparse = list(dict.fromkeys(p for p in policies if not p.dense))
        results: list[Any] = [None] * len(work)
        counted: list[tuple[TritonState, Array]] = []
        try:
            for i, policy in enumerate(sparse or [None]):
                places = [j for j, p in enumerate(policies) if p == policy or (p.dense and i == 0)]
                part = [work[j] for j in places]
                found, counts = self._run(part, policy, [tokens[j] for j in places], [past[j] for j in places],
                                          [pages[j] for j in places])  # fmt: skip
                for j, result in zip(places, found, strict=True):
                    results[j] = result
                counted += zip((_own(w) for w in part), counts, strict=True)
        except BaseException:  # drop what the step remembered of tokens that are not kept
            for w in work:
                if (route := _own(w).route) is not None:
                    route.forget(w.state.length)
            raise
        for state, count in counted:
            state.counts += count
        return results

    def _run(
        self,
        work: Sequence[Work],
        policy: Sparsity | None,
        tokens: Sequence[Array],
        past: Sequence[int],
        pages: Sequence[Sequence[int]],
    ) -> tuple[list[Any], list[Array]]:
        counts = [len(t) for t in tokens]
        rows = logit_rows(work, counts)
        routed = None
        if policy is not None:
            dense = [self._policy(w).dense for w in work]
            routes = [None if d else _own(w).need_route() for w, d in zip(work, dense, strict=True)]
            routed = RoutedStep(policy, policy.to_string(), tuple(routes))
        try:
            result = self._triton.step(tokens, past, pages, rows, routed)
            results = _on_host(result.logits, work, counts)
            read = self._read(result, past, counts)
        except torch.OutOfMemoryError as e:
            raise OutOfPages(f"{self._triton.device} has no memory left for this step: {message_lines(e)[0]}") from e
        return results, read

    def _read(self, result: Result, past: Sequence[int], counts: Sequence[int]) -> list[Array]:
        """Keys read and visible in this step, for each sequence: float64 [2, layers, kv_heads]."""
        layers = self._decoder.layers
        found = [np.zeros((2, len(layers), max(x.kv_heads for x in layers))) for _ in counts]
        if result.counts is None:
            for of, old, new in zip(found, past, counts, strict=True):
                for i, layer in enumerate(layers):
                    of[:, i, : layer.kv_heads] = dense_keys(old, new, layer.sliding_window, chunk=new >= CHUNK)
            return found
        for blocks, counted in zip(result.blocks, result.counts, strict=True):
            for i, (sequence, _, _, queries) in enumerate(blocks.tolist()):
                found[sequence] += counted[:, :, i].transpose(1, 0, 2).astype(np.float64) * queries
        return found


def _own(work: Work) -> TritonState:
    assert isinstance(work.state, TritonState)
    return work.state


def _on_host(logits: torch.Tensor, work: Sequence[Work], counts: Sequence[int]) -> list[Any]:
    """The result of each work, in host memory. For `top_k`, only the best logits are copied there.

    Raises:
        EngineError: logits are not finite.
    """
    if len(logits) and not bool(torch.isfinite(logits).all()):
        raise not_finite("The last layer")

    def result(part: torch.Tensor, top_k: int) -> Any:
        if not top_k:
            return part.cpu().numpy().copy()
        values, ids = torch.sort(part, dim=-1, descending=True, stable=True)  # ties by lower id
        best = ids[..., :top_k].to(torch.int64), values[..., :top_k]
        return tuple(t.cpu().numpy().copy() for t in best)

    return split_rows(logits, work, counts, result)
