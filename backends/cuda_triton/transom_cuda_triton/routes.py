"""The state that sparse attention keeps for each sequence between steps, and the routing of a step.

A sequence with sparse attention has a slot: for each layer a ring of queries from which decoding selects columns, its
columns, and the nodes that contain them. The contents of the ring and the time of the last selection follow from
lengths alone, so the host knows them without reading from the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from transom.contract import OutOfPages
from transom.ops.sparse_routing import COLUMN_ROWS
from transom.sessions.steps import BLOCK, CHUNK, Array
from transom.sparsity import Sparsity
from transom_cuda_triton.cache import node_bytes
from transom_cuda_triton.program import TritonProgram
from transom_cuda_triton.routing import Routing, Rule, Shape, coverages, splits_of
from transom_cuda_triton.store import TORCH
from transom_cuda_triton.tiles import INTERPRETER, TENSOR_CORES
from transom_cuda_triton.variants import KernelVariant

if TYPE_CHECKING:
    from transom_cuda_triton.step import Planned, StepPart, TritonStep

UNITS = (16,)
"""Keys per unit that the kernels are always compiled for, in addition to that of the model's policy."""
EVERY = 4
"""One query in every `EVERY` is remembered."""
_TYPES = {**TORCH, "i32": torch.int32, "i8": torch.int8}


@dataclass
class SequenceRoute:
    """The host's record of one sequence's slot."""

    slot: int
    ring: list[int] = field(default_factory=lambda: [-1] * COLUMN_ROWS)
    """Position of the query at each place of the ring; -1: none."""
    chosen_in: int = -1
    """The block of 64 positions in which columns were last selected; -1: never."""
    chosen_by: str = ""
    """The policy of that selection: `RoutedStep.name`."""

    def forget(self, length: int) -> None:
        """Drop everything but the first `length` tokens."""
        self.ring = [p if p < length else -1 for p in self.ring]
        self.chosen_in = -1


@dataclass(frozen=True)
class RoutedStep:
    """The sparse attention of a step: one policy, for the sequences that have a route."""

    policy: Sparsity
    """The policy for this card's heads."""
    name: str
    """The whole model's policy, in canonical form."""
    routes: tuple[SequenceRoute | None, ...]


@dataclass(frozen=True)
class SampledQueries:
    """Inputs of the routing kernels for one part of a step, the same for every layer."""

    choosers: torch.Tensor
    queries: torch.Tensor
    remembered: torch.Tensor


@dataclass(frozen=True)
class Lists:
    """The keys that the query blocks of a part read, in the format of the attention kernels."""

    arrays: dict[str, torch.Tensor]

    def arguments(self) -> dict[str, Any]:
        far = self.arrays["FAR"]
        return {
            "FAR": far, "FAR_COUNT": self.arrays["FAR_COUNT"], "COLUMNS": self.arrays["BLOCK_COLUMNS"],
            "NEAR": self.arrays["NEAR"], "most_far": far.shape[2],
        }  # fmt: skip


def routings(program: TritonProgram, unit: int, arch: int) -> list[Routing]:
    """The routing of each layer."""
    plain = arch not in (INTERPRETER, *TENSOR_CORES)
    return [
        Routing(
            x.kv_heads, x.group, x.head_dim, x.scale, x.softcap, x.window, x.sinks >= 0, program.number, unit,
            plain,
        )
        for x in program.layers
    ]  # fmt: skip


def units_of(program: TritonProgram) -> list[int]:
    """The unit sizes that a program's kernels are compiled for."""
    own = Sparsity.from_string(program.sparsity)
    return sorted({*UNITS, *(() if own.dense else (own.unit,))})


def routing_variants(program: TritonProgram, arch: int) -> list[KernelVariant]:
    """All kernel variants that routing may launch."""
    found = (v for unit in units_of(program) for routing in routings(program, unit, arch) for v in routing.variants())
    return list(dict.fromkeys(found))


class Routes:
    """The slots of an engine, and the routing of its steps.

    Args:
        slots: maximum number of sequences with sparse attention.
        context: maximum tokens of a sequence.
    """

    def __init__(
        self, program: TritonProgram, slots: int, context: int, device: torch.device, *, arch: int, processors: int
    ) -> None:
        self._program, self._device, self.slots, self.processors = program, device, slots, processors
        self._most_pages = -(-context // BLOCK)
        self._free = list(range(slots))
        self._by_unit = {unit: routings(program, unit, arch) for unit in units_of(program)}
        self.kept: list[dict[str, torch.Tensor]] = []
        self._coverages: dict[str, list[torch.Tensor]] = {}

    @property
    def side_pages(self) -> int:
        """Pages of nodes that slots have, behind those of the cache."""
        return COLUMN_PAGES * self.slots

    def bind(self) -> None:
        """Allocate the arrays of all slots."""
        shapes = [r.kept(self.slots, self._most_pages) for r in next(iter(self._by_unit.values()))]
        self.kept = [{n: self._new(s, -1) for n, s in layer.items()} for layer in shapes]

    @property
    def nbytes(self) -> int:
        """Bytes of the slots' arrays and of their pages of nodes."""
        nodes = sum(self.side_pages * x.kv_heads * node_bytes(x, self._program.number) for x in self._program.layers)
        shapes = (s for r in next(iter(self._by_unit.values())) for s in r.kept(self.slots, self._most_pages).values())
        return nodes + sum(math.prod(size) * _TYPES[number].itemsize for size, number in shapes)

    def _new(self, shape: Shape, value: int | None = None) -> torch.Tensor:
        size, number = shape
        if value is None:
            return torch.empty(size, dtype=_TYPES[number], device=self._device)
        return torch.full(size, value, dtype=_TYPES[number], device=self._device)

    # slots ------------------------------------------------------------------------------------------------------------
    def take(self) -> SequenceRoute:
        """Take a free slot. Raises OutOfPages if there is none."""
        if not self._free:
            raise OutOfPages(f"{self.slots} sequences already use sparse attention, which is the maximum")
        return SequenceRoute(self._free.pop(0))

    def give_back(self, route: SequenceRoute) -> None:
        self._free.append(route.slot)

    def unsupported(self, policy: Sparsity) -> str:
        """Why a step cannot use such a policy; empty if it can."""
        from transom_cuda_triton.lowering import unsupported

        if policy.dense or (reason := unsupported(policy)):
            return "" if policy.dense else reason
        if policy.unit not in self._by_unit:
            known = " or ".join(map(str, self._by_unit))
            return f"the model is compiled for units of {known} tokens, not of {policy.unit}: load it with this policy"
        return ""

    # steps ------------------------------------------------------------------------------------------------------------
    def of(self, step: TritonStep, planned: Planned, routed: RoutedStep, remembered: int = 0) -> RoutingStep:
        """The routing of a step. Does not change the host's records; `done` does, once the step has run.

        Args:
            remembered: minimum entries of REMEMBERED, padded with -1.
        """
        parts = [self._sampled(planned, routed, not part.single, remembered) for part in step.parts]
        sampled = [SampledQueries(*(torch.from_numpy(a).to(self._device) for a in arrays)) for arrays in parts]
        return RoutingStep(self, routed.policy, torch.from_numpy(_slots(routed)).to(self._device), sampled)

    def fresh(self, recorded: RoutingStep, planned: Planned, routed: RoutedStep) -> list[tuple[torch.Tensor, Array]]:
        """The arrays of a recorded step, with their values for another step that selects no columns."""
        found = [(recorded.slots, _slots(routed))]
        for sampled in recorded.sampled:
            array = self._sampled(planned, routed, False, len(sampled.remembered))[2]
            found.append((sampled.remembered, array))
        return found

    def chooses(self, planned: Planned, routed: RoutedStep) -> bool:
        """Whether any sequence selects columns in this step."""
        return any(self._chooses(planned, routed, s) for s in range(len(routed.routes)))

    def _chooses(self, planned: Planned, routed: RoutedStep, s: int) -> bool:
        route, count, length = routed.routes[s], planned.counts[s], planned.lengths[s]
        if route is None or length <= routed.policy.dense_below:
            return False
        stale = route.chosen_in != (length - count) // BLOCK or route.chosen_by != routed.name
        return count >= CHUNK or stale

    def _sampled(self, planned: Planned, routed: RoutedStep, chunk: bool, least: int) -> tuple[Array, Array, Array]:
        """CHOOSERS, SAMPLED and REMEMBERED of the sequences with a chunk of new tokens, or of those with fewer."""
        choosers: list[int] = []
        sampled: list[list[tuple[int, int, int]]] = []
        remembered: list[tuple[int, int, int]] = []
        row = 0
        for s, (count, length) in enumerate(zip(planned.counts, planned.lengths, strict=True)):
            route = routed.routes[s]
            if route is not None and chunk == (count >= CHUNK):
                if self._chooses(planned, routed, s):
                    choosers.append(s)
                    rows = _sampled_rows(route, row, count, length)
                    sampled.append(rows + [(-1, -1, -1)] * (COLUMN_ROWS - len(rows)))
                remembered += [
                    (row + p - (length - count), route.slot, p // EVERY % COLUMN_ROWS) for p in _kept(count, length)
                ]
            row += count
        remembered += [(-1, 0, 0)] * (least - len(remembered))
        return (
            np.array(choosers, np.int32), np.array(sampled, np.int32).reshape(-1, COLUMN_ROWS, 3),
            np.array(remembered, np.int32).reshape(-1, 3),
        )  # fmt: skip

    def begin(self, planned: Planned, routed: RoutedStep) -> None:
        """Called before a step runs: invalidate the records of everything that it may overwrite."""
        for s, (count, length) in enumerate(zip(planned.counts, planned.lengths, strict=True)):
            route = routed.routes[s]
            if route is None:
                continue
            if self._chooses(planned, routed, s):
                route.chosen_in = -1
            for p in _kept(count, length):
                route.ring[p // EVERY % COLUMN_ROWS] = -1

    def done(self, planned: Planned, routed: RoutedStep, chose: Sequence[bool]) -> None:
        """Called after a step has run: record what it wrote."""
        for s, (count, length) in enumerate(zip(planned.counts, planned.lengths, strict=True)):
            route = routed.routes[s]
            if route is None:
                continue
            if chose[s]:
                route.chosen_in = (length - count if count < CHUNK else length - 1) // BLOCK
                route.chosen_by = routed.name
            for p in _kept(count, length):
                route.ring[p // EVERY % COLUMN_ROWS] = p

    def choosing(self, planned: Planned, routed: RoutedStep) -> list[bool]:
        """Whether each sequence selects columns in this step."""
        return [self._chooses(planned, routed, s) for s in range(len(routed.routes))]

    def routing(self, policy: Sparsity, layer: int) -> Routing:
        return self._by_unit[policy.unit][layer]

    def coverage(self, policy: Sparsity, layer: int) -> torch.Tensor:
        """COVERAGE of a layer."""
        text = policy.to_string()
        if text not in self._coverages:
            of = [coverages(policy.layer(i), x.kv_heads) for i, x in enumerate(self._program.layers)]
            self._coverages[text] = [torch.tensor(c, dtype=torch.float32, device=self._device) for c in of]
        return self._coverages[text][layer]

    def scratch(self, shapes: dict[str, Shape]) -> dict[str, torch.Tensor]:
        return {name: self._new(shape) for name, shape in shapes.items()}


COLUMN_PAGES = 8
"""Pages of nodes per slot: at most one node per column."""


def _slots(routed: RoutedStep) -> Array:
    return np.array([-1 if r is None else r.slot for r in routed.routes], np.int32)


def _sampled_rows(route: SequenceRoute, row: int, count: int, length: int) -> list[tuple[int, int, int]]:
    """SAMPLED: the step's own queries for a chunk; while decoding, remembered queries if there are any."""
    past = length - count
    if count < CHUNK:
        known = sorted((p, place) for place, p in enumerate(route.ring) if p >= 0)
        if known:
            return [(-1, place, p) for p, place in known]
    rows = min(COLUMN_ROWS, count)
    places = [(j + 1) * count // rows - 1 for j in range(rows)]
    return [(row + i, -1, past + i) for i in places]


def _kept(count: int, length: int) -> Iterator[int]:
    """Positions of the new queries to remember: every fourth, the last ones of these."""
    first = length - count
    found = range(first + (EVERY - 1 - first) % EVERY, length, EVERY)
    return iter(found[-COLUMN_ROWS:])


class RoutingStep:
    """The routing of one step, layer by layer."""

    def __init__(
        self, routes: Routes, policy: Sparsity, slots: torch.Tensor, sampled: Sequence[SampledQueries]
    ) -> None:
        self._routes, self._policy, self.slots, self.sampled = routes, policy, slots, sampled
        self._rule = Rule.of(policy)
        self._flag = routes.scratch({"FLAG": ((1,), "i32")})["FLAG"]
        self._counts: list[torch.Tensor | None] = [None] * len(sampled)
        """For each part, int32 [layers, 2, blocks * largest kv_heads], with the numbers of each layer at the start."""

    def reset(self) -> None:
        """Called when the step begins."""
        self._flag.zero_()

    def lists(self, step: TritonStep, part: StepPart, layer: int, q: torch.Tensor) -> Lists:
        """Select the keys that a part's query blocks read in a layer, once its new keys are in the cache."""
        routes, index = self._routes, next(i for i, p in enumerate(step.parts) if p is part)
        sampled, cache = self.sampled[index], step.caches[layer]
        routing, shape = routes.routing(self._policy, layer), step.program.layers[layer]
        pages = step.pages.shape[1]
        splits = splits_of(part.count, shape.kv_heads, part.most_keys, routes.processors)
        column_splits = splits_of(len(sampled.choosers), shape.kv_heads, part.most_keys, routes.processors)
        scratch = routes.scratch(
            routing.scratch(
                part.count, max(1, len(sampled.choosers)), pages, 1 if part.single else self._rule.rows,
                max(splits, column_splits), decoding=part.single,
            )
        )  # fmt: skip
        shapes = routing.chosen(part.count, pages)
        chosen = routes.scratch({name: s for name, s in shapes.items() if name not in ("READ", "SEEN", "FLAG")})
        read, seen = self._counters(step, index)[layer]
        arrays = {
            **scratch, **chosen, **routes.kept[layer], "READ": read, "SEEN": seen, "FLAG": self._flag, "Q": q,
            "K": cache.k, "PAGES": step.pages, "BLOCKS": part.blocks, "SLOTS": self.slots,
            "COVERAGE": routes.coverage(self._policy, layer), "MEANS": cache.means, "VARIANCES": cache.variances,
            "COUNTS": cache.counts, "CHOOSERS": sampled.choosers, "SAMPLED": sampled.queries,
            "REMEMBERED": sampled.remembered,
        }  # fmt: skip
        if shape.sinks >= 0:
            arrays["SINKS"] = step.store.vector(shape.sinks, shape.heads)
        routing.run(
            step.launch, arrays, self._rule, decoding=part.single, splits=splits, column_splits=column_splits
        )  # fmt: skip
        return Lists(chosen)

    def _counters(self, step: TritonStep, index: int) -> torch.Tensor:
        found = self._counts[index]
        if found is None:
            layers = step.program.layers
            numbers = step.parts[index].count * max(x.kv_heads for x in layers)
            # Rows start aligned, as pointers to them must be.
            shape = len(layers), 2, -(-numbers // 4) * 4
            found = self._counts[index] = self._routes.scratch({"COUNTS": (shape, "i32")})["COUNTS"]
        return found

    def finite(self) -> bool:
        """Whether all scores were finite."""
        return not bool(self._flag.item())

    def counts(self, step: TritonStep) -> list[Array]:
        """For each part of the step, int32 [layers, 2, blocks, largest kv_heads]: keys read and keys visible."""
        found = []
        layers = step.program.layers
        most = max(x.kv_heads for x in layers)
        for part, flat in zip(step.parts, self._counts, strict=True):
            assert flat is not None
            array, own = flat.cpu().numpy(), np.zeros((len(layers), 2, part.count, most), np.int32)
            for i, layer in enumerate(layers):
                own[i, :, :, : layer.kv_heads] = array[i, :, : part.count * layer.kv_heads].reshape(2, part.count, -1)
            found.append(own)
        return found
