"""The choice of dynamic sparse attention in Triton's interpreter, against the registry's reference.

Draws: a choice is compared where its margin is beyond the rounding of the scores, which half of the blocks or more
are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from calls import Array

from transom.ops import sparse_routing
from transom.ops.sparse_routing import BLOCK, QueryBlock, ScoreParams, route
from transom.sparsity import Sparsity
from transom_cuda_triton.kernels.largest import beyond, edge
from transom_cuda_triton.routing import FINEST, SPLITS, Routing, Rule, coverages, splits_of
from transom_cuda_triton.variants import KernelVariant

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "i32": torch.int32, "i8": torch.int8}
NODE_FIELDS = ("mean", "variance")
RULE = Sparsity(coverage=0.7, columns=16, dense_below=100, max_density=0.9)
STEPS = [[(0, 70), (1, 1)], [(0, 2)], [(1, 20), (2, 1)]]
"""(sequence, new tokens) of each step; some sequences have a past before."""


def interpret(variant: KernelVariant, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    module, name = variant.kernel.split(".")
    kernel = getattr(import_module(f"transom_cuda_triton.kernels.{module}"), name)
    assert set(arguments) == {name for name, _ in variant.types}
    assert set(kernel.arg_names) == set(arguments) | {name for name, _ in variant.constants}
    assert all(n > 0 for n in grid)
    kernel[grid](**arguments, **dict(variant.constants))


def made(shapes: Mapping[str, tuple[tuple[int, ...], str]], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Arrays that hold what is no number, and whole numbers out of every range."""
    found = {}
    for name, (shape, kind) in shapes.items():
        wrong = float("nan") if kind.startswith("fp") else int(rng.integers(100, 127)) * (1 if kind == "i8" else 99991)
        found[name] = torch.full(shape, wrong, dtype=TYPES[kind])
    return found


NODES = sparse_routing._nodes


@dataclass
class SampledQueries:
    """The queries that a sequence's columns were taken from."""

    positions: list[int]
    queries: Array
    block: int


class Layer:
    """One layer, sequences that grow in it, and what the engine would keep and say."""

    def __init__(
        self, rng: np.random.Generator, policy: Sparsity, lengths: list[int], *, kv_heads: int = 1, group: int = 2,
        head_dim: int = 16, softcap: float = 0.0, window: int = 0, with_sinks: bool = False, dtype: str = "fp32",
    ) -> None:  # fmt: skip
        self.rng, self.policy, self.layer = rng, policy, policy.layer(0)
        self.rule, self.dtype = Rule.of(policy), dtype
        self.routing = Routing(
            kv_heads, group, head_dim, head_dim**-0.5, softcap, window, with_sinks, dtype, policy.unit
        )
        self.window, self.lengths = window, [0] * len(lengths)
        number = np.float16 if dtype == "fp16" else np.float32

        def random(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(number).astype(np.float32)

        self.q = [random(n, kv_heads, group, head_dim) * np.float32(2) for n in lengths]
        self.k = [random(n, kv_heads, head_dim) for n in lengths]
        for k in self.k:  # neighbors are alike, and some keys draw mass from everywhere
            k[1:] = (0.5 * k[:-1] + k[1:]).astype(number).astype(np.float32)
            k[rng.permutation(len(k))[: len(k) // 24]] *= np.float32(2)
        self.sinks = rng.standard_normal((kv_heads, group)).astype(np.float32) if with_sinks else None
        self.most_pages = max(-(-n // BLOCK) for n in lengths) + 1
        counts = [-(-n // BLOCK) for n in lengths]
        self.cache_pages, slots = sum(counts) + 3, len(lengths) + 1
        order = rng.permutation(self.cache_pages).tolist()
        self.table = np.full((len(lengths), self.most_pages), -1, np.int32)
        for s, count in enumerate(counts):
            self.table[s, :count] = [order.pop() for _ in range(count)]
        self.slots = rng.permutation(slots)[: len(lengths)].astype(np.int32)
        self.k_pages = np.full((self.cache_pages, kv_heads, BLOCK, head_dim), np.nan, np.float32)
        self.kept = made(self.routing.kept(slots, self.most_pages), rng)
        for name in ("COLUMNS", "PATCHES", "SIDES"):
            self.kept[name].fill_(-1)
        self.nodes = made(self.routing.nodes(self.cache_pages, slots), rng)
        self.remembered: list[dict[int, int]] = [{} for _ in lengths]
        self.sampled: list[SampledQueries | None] = [None] * len(lengths)
        self.compared = self.all = self.sparse = 0

    def rounded(self, nodes: Any) -> Any:
        """The reference's nodes as the cache holds them."""
        if self.dtype == "fp32":
            return nodes
        return replace(nodes, **{n: getattr(nodes, n).astype(np.float16).astype(np.float32) for n in NODE_FIELDS})

    def write(self, s: int, past: int, new: int) -> None:
        """The keys of a step and their nodes into the cache."""
        for block in range(past // BLOCK, (past + new - 1) // BLOCK + 1):
            page, end = self.table[s, block], min(past + new, block * BLOCK + BLOCK)
            keys = self.k[s][block * BLOCK : end]
            self.k_pages[page, :, : len(keys)] = keys.transpose(1, 0, 2)
            for h in range(self.routing.kv_heads):
                nodes = NODES(keys[:, h], np.zeros(0, np.int64), 8)
                for name, values in (("MEANS", nodes.mean), ("VARIANCES", nodes.variance), ("COUNTS", nodes.count)):
                    self.nodes[name][page, h] = torch.from_numpy(values).to(self.nodes[name].dtype)

    def preload(self, s: int, past: int) -> None:
        """Tokens whose steps are not looked at."""
        if past:
            self.write(s, 0, past)
        self.lengths[s] = past

    def column_rows(self, s: int, new: int, row: int) -> tuple[list[int], list[list[int]]] | None:
        """(positions, entries of SAMPLED) where a sequence chooses its columns in this step."""
        past = self.lengths[s]
        if past + new <= self.rule.dense_below or not self.rule.most_columns:
            return None
        if new >= 16:
            at = [(j + 1) * new // 16 - 1 for j in range(16)]
            return [past + i for i in at], [[row + i, -1, past + i] for i in at]
        known = self.sampled[s]
        if known is not None and known.block == past // BLOCK:
            return None
        last = range(max(0, past - BLOCK), past)
        old = [p for p in last if p % 4 == 3 and self.remembered[s].get(p // 4 % 16) == p]
        if old:
            return old, [[-1, p // 4 % 16, p] for p in old]
        return [past], [[row, -1, past]]

    def step(self, parts: list[tuple[int, int]], padding: int = 0) -> dict[str, Array]:
        """What is chosen for new tokens of some sequences, and `BLOCKS`."""
        rng, r = self.rng, self.routing
        blocks: list[tuple[int, int, int, int]] = []
        choosers: list[int] = []
        sampled: list[list[list[int]]] = []
        remember: list[list[int]] = []
        queries: list[Array] = []
        row = 0
        for s, new in parts:
            past = self.lengths[s]
            self.write(s, past, new)
            at = past
            while at < past + new:
                count = 1 if new < 16 else min(at // BLOCK * BLOCK + BLOCK, past + new) - at
                blocks.append((s, row + at - past, at, count))
                at += count
            chosen = self.column_rows(s, new, row)
            if chosen is not None:
                positions, entries = chosen
                choosers.append(s)
                sampled.append(entries + [[-1, -1, -1]] * (16 - len(entries)))
                self.sampled[s] = SampledQueries(positions, self.q[s][positions], (past + new - 1) // BLOCK)
            for p in range(max(past, past + new - BLOCK), past + new):
                if p % 4 == 3:
                    remember.append([row + p - past, int(self.slots[s]), p // 4 % 16])
                    self.remembered[s][p // 4 % 16] = p
            queries.append(self.q[s][past : past + new])
            self.lengths[s] = past + new
            row += new
        decoding = all(new < 16 for _, new in parts)
        blocks += [(0, 0, 0, 0)] * padding
        choosers += [-1] * padding
        sampled += [[[-1, -1, -1]] * 16] * padding
        remember += [[-1, -1, -1]] * padding
        splits, column_splits = int(rng.choice([1, 1, 2, 3])), int(rng.choice([1, 2, 3]))
        rows = 1 if decoding else self.rule.rows
        scratch = r.scratch(
            len(blocks), len(choosers), self.most_pages, rows, max(splits, column_splits), decoding=decoding
        )
        out = made(r.chosen(len(blocks), self.most_pages), rng)
        out["FLAG"].zero_()

        def numbers(values: Any, *shape: int) -> torch.Tensor:
            return torch.from_numpy(np.array(values, np.int32).reshape(shape))

        arrays = {
            **made(scratch, rng), **self.nodes, **self.kept, **out,
            "Q": torch.from_numpy(np.concatenate(queries).reshape(row, -1)).to(TYPES[self.dtype]),
            "K": torch.from_numpy(self.k_pages).to(TYPES[self.dtype]), "PAGES": torch.from_numpy(self.table),
            "BLOCKS": numbers(blocks, -1, 4), "SLOTS": torch.from_numpy(self.slots),
            "COVERAGE": torch.tensor(coverages(self.layer, r.kv_heads)), "CHOOSERS": numbers(choosers, -1),
            "SAMPLED": numbers(sampled, -1, 16, 3), "REMEMBERED": numbers(remember, -1, 3),
        }  # fmt: skip
        if self.sinks is not None:
            arrays["SINKS"] = torch.from_numpy(self.sinks.reshape(-1))
        r.run(interpret, arrays, self.rule, decoding=decoding, splits=splits, column_splits=column_splits)
        return {n: arrays[n].numpy() for n in ("SCORES", "BLOCKS", *out)}

    def check(self, parts: list[tuple[int, int]], out: dict[str, Array]) -> None:
        """It is the reference's wherever rounding cannot make it another one, and one that can be read everywhere."""
        assert out["FLAG"].item() == 0
        exact = 1e-5 if self.dtype == "fp32" else 1e-3
        number = {(s, first): i for i, (s, _, first, count) in enumerate(out["BLOCKS"].tolist()) if count}
        for s, new in parts:
            self.in_order(s)
            n = self.lengths[s]
            known = self.sampled[s]
            for h in range(self.routing.kv_heads):
                sinks = None if self.sinks is None else self.sinks[h]
                scores = ScoreParams(self.routing.scale, self.routing.softcap, self.window, sinks)
                given = None if known is None else (known.positions, known.queries[:, h])
                way = route(self.q[s][n - new : n, h], self.k[s][:n, h], self.layer, h, scores, column_queries=given)
                column = self.kept["COLUMNS"][self.slots[s], h].numpy()
                column = column[column >= 0]
                same = all(b.dense and not len(b.scores) for b in way.blocks) or np.array_equal(column, way.columns)
                if not same:
                    assert way.margin < exact, "the columns"
                    assert len(set(column) ^ set(way.columns)) <= 4
                for b in way.blocks:
                    at = number[s, b.begin], h
                    self.legal(b, at, out, column)
                    if same and len(b.scores):
                        first = scores.first_seen(b.begin) // self.policy.unit
                        got = out["SCORES"][at][first : len(b.scores)]
                        np.testing.assert_allclose(got, b.scores[first:], rtol=4 * exact, atol=exact / 100)
                        self.all += 1
                        self.compared += b.margin > exact
                        self.sparse += not b.dense and b.margin > exact
                    if same and b.margin > exact:
                        self.equal(b, at, out)

    def in_order(self, s: int) -> None:
        """What is kept of a sequence agrees with itself."""
        ring = self.kept["RING"][self.slots[s]].numpy()
        for place, position in self.remembered[s].items():
            np.testing.assert_array_equal(ring[place].reshape(self.q[s][position].shape), self.q[s][position])
        for h in range(self.routing.kv_heads):
            column, patch, sides = (self.kept[n][self.slots[s], h].numpy() for n in ("COLUMNS", "PATCHES", "SIDES"))
            columns = int((column >= 0).sum())
            assert (column[columns:] == -1).all()
            assert (np.diff(column[:columns]) > 0).all()
            nodes = np.unique(column[:columns] // 8)
            np.testing.assert_array_equal(patch, np.append(nodes, np.full(64 - len(nodes), -1)))
            assert (sides >= 0).sum() == len(nodes)
            np.testing.assert_array_equal(sides[nodes], np.arange(len(nodes)))

    def equal(self, b: QueryBlock, at: tuple[int, int], out: dict[str, Array]) -> None:
        """The choice is the reference's."""
        assert (out["READ"][at], out["SEEN"][at]) == (b.read, b.seen)
        assert (out["NEAR"][at] == 0) == b.dense
        if b.dense:
            return
        per = self.policy.unit // FINEST
        units = (b.units[:, None] * per + np.arange(per)).reshape(-1)
        far = units[units * FINEST < out["NEAR"][at]]
        np.testing.assert_array_equal(out["FAR"][at][: out["FAR_COUNT"][at]], far)
        single = b.columns[~np.isin(b.columns // FINEST, far)]
        got = out["BLOCK_COLUMNS"][at]
        np.testing.assert_array_equal(got[got >= 0], single)

    def legal(self, b: QueryBlock, at: tuple[int, int], out: dict[str, Array], columns: Array) -> None:
        """It is a choice that attention can read."""
        count, near, got = int(out["FAR_COUNT"][at]), int(out["NEAR"][at]), out["BLOCK_COLUMNS"][at]
        single = got[got != -1]
        assert out["SEEN"][at] == b.seen
        if near == 0:
            assert (count, len(single), out["READ"][at]) == (0, 0, b.seen)
            return
        assert near == max(0, b.begin // BLOCK - self.rule.local) * BLOCK
        far = out["FAR"][at][:count]
        assert (np.diff(far) > 0).all()
        assert ((far >= 0) & (far < near // FINEST)).all()
        assert np.isin(single, columns[columns < near]).all()
        assert not np.isin(single // FINEST, far).any()
        mask = np.zeros(b.end + 1, bool)
        mask[near:] = mask[single] = True
        for unit in far:
            mask[unit * FINEST : unit * FINEST + FINEST] = True
        assert mask[b.end + 1 - b.seen :].sum() == out["READ"][at]


def through(
    layer: Layer, past: list[int], steps: list[list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch, padding: int = 0
) -> None:
    """Steps, each checked."""
    monkeypatch.setattr(sparse_routing, "_nodes", lambda *given: layer.rounded(NODES(*given)))
    for s, n in enumerate(past):
        layer.preload(s, n)
    for parts in steps:
        layer.check(parts, layer.step(parts, padding))


def lengths_of(past: list[int], steps: list[list[tuple[int, int]]]) -> list[int]:
    return [n + sum(new for parts in steps for s, new in parts if s == i) for i, n in enumerate(past)]


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "64 columns, float16": ({"columns": 64}, {"dtype": "fp16", "head_dim": 32, "kv_heads": 2}),
    "no columns, units of 64": ({"columns": 0, "unit": 64, "coverage": 0.5}, {"window": 420}),
    "top k, units of 32": ({"unit": 32, "top_k": 3}, {"head_dim": 48, "group": 1}),
    "least and most": ({"coverage": 0.3, "min_density": 0.3, "max_density": 0.55}, {}),
    "few, float16": ({"coverage": 0.6, "max_density": 0.15}, {"dtype": "fp16", "head_dim": 80}),
    "window": ({"coverage": 0.5}, {"window": 300}),
    "soft cap and sinks": ({"coverage": 0.5}, {"softcap": 8.0, "with_sinks": True, "group": 3}),
    "all of it": (
        {"rows": 64, "local_window": 100, "coverage": 0.5, "max_density": 0.6},
        {"softcap": 9.0, "with_sinks": True, "window": 460},
    ),
    "a dense head": ({"heads": ((0.0, 1.5),)}, {"kv_heads": 2}),
    "many heads of a group": ({"rows": 8}, {"group": 12}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_is_the_references(kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, shape = KINDS[kind]
    past = [int(rng.integers(600, 1300)), int(rng.integers(400, 700)), int(rng.integers(0, 300))]
    layer = Layer(rng, replace(RULE, **policy), lengths_of(past, STEPS), **shape)
    through(layer, past, STEPS, monkeypatch, padding=int(rng.integers(0, 2)))
    assert layer.compared > 0.5 * layer.all
    assert layer.sparse > 0


def test_any_lengths_and_any_policy(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Sparsity(
        coverage=float(rng.uniform(0.2, 0.95)), local_window=int(rng.integers(1, 150)),
        columns=int(rng.integers(0, 65)), unit=int(rng.choice([16, 32, 64])), rows=int(rng.choice([1, 4, 16, 64])),
        min_density=float(rng.uniform(0, 0.3)), max_density=float(rng.uniform(0.3, 1)),
        dense_below=int(rng.integers(0, 300)), top_k=int(rng.choice([0, 0, 1, 5])),
    )  # fmt: skip
    print(policy)
    new = [[int(n) for n in rng.choice([0, 1, 2, 15, 16, 17, 63, 65, 90], 3)] for _ in range(3)]
    steps = [[(s, n) for s, n in enumerate(parts) if n] for parts in new]
    steps = [parts for parts in steps if parts]
    past = [int(n) for n in rng.integers(0, 500, 3)]
    window = int(rng.choice([0, 1, 64, 200]))
    layer = Layer(rng, policy, lengths_of(past, steps), window=window, with_sinks=bool(rng.integers(2)))
    through(layer, past, steps, monkeypatch)
    assert layer.compared >= 0.5 * layer.all


def test_a_slot_goes_to_another_sequence(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    past, steps = [300, 410], [[(0, 1)], [(1, 1)]]
    layer = Layer(rng, RULE, lengths_of(past, [*steps, [(0, 1)]]))
    through(layer, past, steps[:1], monkeypatch)
    layer.slots[:] = -1, layer.slots[0]
    out = layer.step([(0, 1)])
    layer.check(steps[1], layer.step(steps[1]))
    for name, value in (("NEAR", 0), ("FAR_COUNT", 0), ("READ", 302), ("SEEN", 302)):
        assert out[name].item() == value, "a sequence without a slot reads everything"


def test_equal_keys_are_taken_from_the_first(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(rng, replace(RULE, coverage=0.421), [600])
    layer.k[0][:] = 0
    layer.preload(0, 580)
    out = layer.step([(0, 20)])
    np.testing.assert_array_equal(layer.kept["COLUMNS"][layer.slots[0], 0, :16], np.arange(16))
    scores = ScoreParams(layer.routing.scale)
    for i, block in enumerate(route(layer.q[0][580:, 0], layer.k[0][:, 0], layer.layer, 0, scores).blocks):
        assert not block.dense
        layer.legal(block, (i, 0), out, np.arange(16))
        layer.equal(block, (i, 0), out)


@pytest.mark.parametrize(
    ("what", "value"), [("q", np.nan), ("q", np.inf), ("k", np.nan), ("k", np.inf), ("near", np.nan)]
)
def test_what_is_not_finite_is_said_and_reads_everything(what: str, value: float, rng: np.random.Generator) -> None:
    new = int(rng.choice([1, 20]))
    layer = Layer(rng, RULE, [330 + new], kv_heads=2)
    if what == "q":
        layer.q[0][330:, 0] = value
    else:
        layer.k[0][321 if what == "near" else int(rng.integers(0, 250)), 0] = value
    with np.errstate(all="ignore"):
        layer.preload(0, 330)
        out = layer.step([(0, new)])
    assert out["FLAG"].item() == 1
    for name, wanted in (("NEAR", 0), ("FAR_COUNT", 0), ("BLOCK_COLUMNS", -1), ("READ", out["SEEN"][:, 0])):
        np.testing.assert_array_equal(out[name][:, 0].T, wanted)
    assert (out["NEAR"][:, 1] > 0).all(), "the other head"


@triton.jit
def take(X, OUT, first, stop, least, most, need, WIDTH: tl.constexpr):
    low, high, last = edge(X, first, stop, least, most, need, WIDTH)
    at = tl.arange(0, 64)
    x = tl.load(X + at, mask=(at >= first) & (at < stop), other=0.0)
    tl.store(OUT + at, beyond(x, at, low, high, last).to(tl.int32))


@pytest.mark.parametrize("_", range(12))
def test_the_largest_are_taken_with_ties_in_order(_: int, rng: np.random.Generator) -> None:
    kinds = int(rng.integers(1, 8))
    x = (rng.integers(0, kinds, 64) / np.float32(kinds)).astype(np.float32) if rng.integers(2) else rng.random(64)
    x = x.astype(np.float32)
    first, stop = int(rng.integers(0, 20)), int(rng.integers(30, 65))
    least, most = sorted(int(n) for n in rng.integers(0, 50, 2))
    need = float(rng.uniform(-1, 1.2)) * float(x[first:stop].sum())
    out = torch.zeros(64, dtype=torch.int32)
    take[(1,)](torch.from_numpy(x), out, first, stop, least, most, need, WIDTH=16)
    inner = x[first:stop]
    order = np.argsort(-inner, kind="stable")
    before = np.append(0, np.cumsum(inner[order], dtype=np.float64))[:-1]
    rank = np.arange(len(inner))
    taken = (((before < need) & (rank < most)) | (rank < least)) & (inner[order] > 0)
    np.testing.assert_array_equal(np.flatnonzero(out.numpy()), np.sort(order[taken]) + first)


def test_as_many_splits_as_a_card_has_use_for() -> None:
    assert splits_of(1, 8, 131072, 132) == SPLITS
    assert splits_of(64, 8, 131072, 132) == 1
    assert splits_of(1, 8, 600, 132) == 4
