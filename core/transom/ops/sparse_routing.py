"""Which keys a sparse `transom::CachedAttention` reads: the NumPy reference of the choice, called node routing.

Each sequence and KV head is routed on its own. Its keys are at the positions 0 … n - 1; its new queries, for all G
query heads of the KV head, are at the last T of these positions. Sizes are the fields of `transom.sparsity.Sparsity`; a
block has 64 tokens.

1. **Columns.** A few keys receive mass from all queries and would cause their whole units to be read. R = min(16, T) of
   the new queries, those at ⌊(j + 1) T / R⌋ - 1, attend to all their keys: exact softmax, summed over rows and heads,
   without each row's own block and local window. Every query of the step reads the `columns` keys with the largest
   mass, as far as they lie before its local window.
2. **Nodes.** For every `node` keys, without the columns: mean μ, diagonal variance σ², count c.
3. **Query blocks.** The new queries of a block of 64 positions choose together; in a step with fewer than 16 new
   queries (decoding), each query chooses by itself. Of a block's new queries, numbers stride - 1, 2 stride - 1, … are
   sampled, with stride = 64 / `rows`; if there are fewer than stride, only the last one.
4. **Masses** of a row q' = scale · q. A node before the local window has c · exp(cap(q'·μ + min(½ λ Σ q'² σ², 8.3))),
   λ = 0.7, where cap is the soft cap; a unit has the sum of its nodes. The masses of the columns before the window and
   of the nearby keys (the local window and the block itself) are exact. P is the share in a row's total mass, including
   the sink's.
5. **Score.** A unit has A = √ mean P² over rows and heads, and so has the nearby part as a whole; the columns have the
   mean of their P. The total is the sum of all scores.
6. **Choice.** The nearby units and the columns are always read; without columns (`columns` = 0), the first block of
   keys instead. Other units follow by descending A, lower positions first among equals, until the keys read have
   `coverage` of the total, or until `top_k` units are chosen; units without mass are never chosen. With a coverage, the
   number of units is then clamped between `min_density` and `max_density` of all units.
7. **Dense.** Every key is read by a block with at most `dense_below` keys, by a head that is calibrated as dense, and,
   if `max_density` is above 0.6, by a block that would read more than 0.6 of its keys.

With `score="mean"`, all masses come from nodes without variance. This includes the nearby nodes, each as a whole as
soon as its first key is visible; columns are exact at all positions; and A = mean P. With a sliding window, keys beyond
a row's window, and nodes that end before it, have no mass.

How a prompt is split into steps affects the columns, and the query blocks if a step does not begin and end at a
multiple of 64. All queries of a block use the choice of its sampled rows, so within a block the choice, and nothing
else, looks ahead. A decoding engine does not have queries that it has not kept: it may take the columns from earlier
queries, and `route(…, column_queries=…)` gives the choice that results.

Sources: keys that receive mass from all queries, StreamingLLM (arXiv:2309.17453) and SnapKV (arXiv:2404.14469); pages
ranked by the query, Quest (arXiv:2406.10774); coverage, FlexPrefill (arXiv:2502.20766).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from transom.ops.schema import Array, Attributes
from transom.ops.softmax import softmax
from transom.sparsity import LayerSparsity, Sparsity

BLOCK = 64
COLUMN_ROWS = 16
"""Number of queries that choose the columns; a step with fewer new queries is decoding."""
VARIANCE_WEIGHT = 0.7
VARIANCE_CAP = 8.3
"""Upper bound of what the variance adds to a logit."""
DENSE_ABOVE = (3, 5)
"""0.6 as a fraction of integers, so that every implementation compares exactly."""


@dataclass(frozen=True)
class ScoreParams:
    """How attention scores are computed from queries and keys, from the operator's attributes."""

    scale: float
    softcap: float = 0.0
    window: int = 0
    """Number of positions that a query sees, including its own; 0: all."""
    sinks: Array | None = None
    """float32 [G]: an extra logit in each head's softmax, without a value."""

    def capped(self, logits: Array) -> Array:
        return np.float32(self.softcap) * np.tanh(logits / np.float32(self.softcap)) if self.softcap else logits

    def first_seen(self, position: int) -> int:
        """The first position that a query sees."""
        return max(0, position - self.window + 1) if self.window else 0


@dataclass(frozen=True)
class QueryBlock:
    """The keys that the queries at the positions `begin … end` read."""

    begin: int
    end: int
    dense: bool
    """Whether every key is read."""
    units: Array
    """int64, ascending: units of `unit` keys that are read as a whole; all of them if dense."""
    columns: Array
    """int64, ascending: positions of single keys that are read; they may also lie in those units."""
    read: int
    """Number of keys that the last query reads, of those visible to any of the queries."""
    seen: int
    """Number of keys that dense attention would read."""
    scores: Array = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)
    """A of each unit before the local window, without columns and nearby keys; empty if not scored."""
    margin: float = np.inf
    """Distance to the nearest different choice, relative to the compared values. If it is below an engine's rounding
    error, the engine may choose differently."""

    @property
    def density(self) -> float:
        return self.read / self.seen

    def reads(self, unit: int) -> Array:
        """bool [end + 1]: the positions that are read, before the causal mask and the window."""
        mask = np.zeros(-(-(self.end + 1) // unit) * unit, bool)
        mask.reshape(-1, unit)[self.units] = True
        mask[self.columns] = True
        return mask[: self.end + 1]


@dataclass(frozen=True)
class Route:
    """The choice of one sequence and KV head in one step."""

    columns: Array
    """int64, ascending: positions of the columns, including those that no query block reads."""
    blocks: tuple[QueryBlock, ...]
    """In order of position."""
    margin: float = np.inf
    """The smallest margin of the columns and of all blocks."""


@dataclass(frozen=True)
class _Nodes:
    mean: Array
    """float32 [nodes, dim]."""
    variance: Array
    count: Array
    """float32 [nodes]."""


def route(
    queries: Array,
    keys: Array,
    policy: LayerSparsity,
    head: int,
    scores: ScoreParams,
    *,
    column_queries: tuple[Sequence[int], Array] | None = None,
) -> Route:
    """Choose the keys that the new queries of one sequence and KV head read.

    Args:
        queries: float32 [T, G, dim], rotated; at the last T positions.
        keys: float32 [n, dim], rotated, in order of position.
        policy: the layer's policy.
        head: the KV head, for its calibration.
        column_queries: positions, and queries float32 [R, G, dim], that choose the columns instead of the step's own
            queries; for comparison with an engine that remembers earlier queries.

    Raises:
        ValueError: scores are not finite.
    """
    first = len(keys) - len(queries)
    groups = list(_query_blocks(first, len(keys)))
    rule = policy.rule
    if rule is None or policy.dense_head(head):
        return dense_route(first, len(keys), scores.window, BLOCK if rule is None else rule.unit)
    local = -(-rule.local_window // BLOCK)

    def far_end(position: int) -> int:
        """Where the local window of a position's block begins; keys before it are subject to the choice."""
        return max(0, position // BLOCK - local) * BLOCK

    sparse = [g for g in groups if g[1] + 1 > rule.dense_below and far_end(g[0]) > scores.first_seen(g[0])]
    columns, gap = np.zeros(0, np.int64), np.inf
    if sparse and rule.columns:
        if column_queries is None:
            count = min(COLUMN_ROWS, len(queries))
            rows = [first + (j + 1) * len(queries) // count - 1 for j in range(count)]
            column_queries = rows, queries[[r - first for r in rows]]
        positions, column_rows = column_queries
        columns, gap = _columns(positions, column_rows, keys, [far_end(r) for r in positions], rule.columns, scores)
    nodes = _nodes(keys, columns, rule.node) if sparse else None
    coverage = policy.coverage(head)
    blocks = []
    for begin, end in groups:
        if nodes is None or (begin, end) not in sparse:
            blocks.append(_dense(begin, end, rule.unit, scores.first_seen(begin)))
            continue
        stride, size = BLOCK // rule.rows, end + 1 - begin
        sampled = np.arange(begin + stride - 1, end + 1, stride) if size >= stride else np.array([end])
        masses = _masses(sampled, queries[sampled - first], keys, columns, nodes, far_end(begin), rule, scores)
        blocks.append(_choose(begin, end, far_end(begin), masses, columns, coverage, rule, scores))
    found = tuple(blocks)
    return Route(columns, found, min([gap, *(b.margin for b in found)]))


def _query_blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """First and last position of each group of queries that choose together."""
    if last - first < COLUMN_ROWS:
        yield from ((p, p) for p in range(first, last))
        return
    for start in range(first // BLOCK * BLOCK, last, BLOCK):
        yield max(start, first), min(start + BLOCK, last) - 1


def dense_route(first: int, last: int, window: int = 0, unit: int = BLOCK) -> Route:
    """The route of queries at the positions `first … last - 1` that read every visible key."""
    seen = ScoreParams(1.0, window=window)
    blocks = (_dense(b, e, unit, seen.first_seen(b)) for b, e in _query_blocks(first, last))
    return Route(np.zeros(0, np.int64), tuple(blocks))


def _dense(begin: int, end: int, unit: int, start: int) -> QueryBlock:
    seen = end + 1 - start
    return QueryBlock(begin, end, True, np.arange(end // unit + 1), np.zeros(0, np.int64), seen, seen)


def _columns(
    positions: Sequence[int], queries: Array, keys: Array, limits: Sequence[int], most: int, scores: ScoreParams
) -> tuple[Array, float]:
    """The keys with the largest mass, ascending; and the relative gap between the last key taken and the next one."""
    mass = np.zeros(len(keys), np.float32)
    for position, query, limit in zip(positions, queries, limits, strict=True):
        start = scores.first_seen(position)
        logits = scores.capped((query * np.float32(scores.scale)) @ keys[start : position + 1].T)
        weights = softmax(logits, None if scores.sinks is None else scores.sinks[:, None])
        far = max(0, limit - start)
        mass[start : start + far] += weights[:, :far].sum(0)
    if not np.isfinite(mass).all():
        raise ValueError(NOT_FINITE)
    order = np.argsort(-mass, kind="stable")
    taken = order[:most]
    taken = taken[mass[taken] > 0]
    gap = np.inf
    if len(taken) == most and len(order) > most:
        gap = float(1 - mass[order[most]] / mass[order[most - 1]])
    return np.sort(taken), gap


NOT_FINITE = "attention scores are not finite numbers"


def _nodes(keys: Array, columns: Array, node: int) -> _Nodes:
    kept = np.ones(len(keys), np.float32)
    kept[columns] = 0
    pad = -len(keys) % BLOCK
    weight = np.pad(kept, (0, pad)).reshape(-1, node, 1)
    x = np.pad(keys, ((0, pad), (0, 0))).reshape(-1, node, keys.shape[1])
    count = weight.sum(1)
    mean = (weight * x).sum(1) / np.maximum(count, 1)
    variance = np.maximum((weight * x * x).sum(1) / np.maximum(count, 1) - mean * mean, 0)
    return _Nodes(mean, variance, count[:, 0])


@dataclass(frozen=True)
class _Masses:
    """Estimated probability mass for each sampled row of one query block, [rows * G]."""

    units: Array
    """[rows * G, units before the local window]."""
    near: Array
    columns: Array


def _masses(
    positions: Array,
    queries: Array,
    keys: Array,
    columns: Array,
    nodes: _Nodes,
    far_end: int,
    rule: Sparsity,
    scores: ScoreParams,
) -> _Masses:
    """The masses for the rows at these positions [R], with queries [R, G, dim]."""
    exact = rule.score == "rms"
    last, far_nodes = int(positions[-1]), far_end // rule.node
    row = positions[:, None]
    start = np.maximum(row - scores.window + 1, 0) if scores.window else np.zeros_like(row)
    q = queries * np.float32(scores.scale)

    seen_nodes = far_nodes if exact else last // rule.node + 1
    logits = q @ nodes.mean[:seen_nodes].T
    if exact:
        more = np.float32(0.5 * VARIANCE_WEIGHT) * ((q * q) @ nodes.variance[:seen_nodes].T)
        logits = logits + np.minimum(more, np.float32(VARIANCE_CAP))
    logits = scores.capped(logits)  # [R, G, nodes]
    begins = np.arange(seen_nodes) * rule.node
    counts = np.where((begins + rule.node > start) & (begins <= row), nodes.count[:seen_nodes], 0)[:, None]

    def exactly(at: Array) -> Array:
        found: Array = np.where(((at <= row) & (at >= start))[:, None], scores.capped(q @ keys[at].T), -np.inf)
        return found

    near = exactly(np.arange(far_end, last + 1) if exact else np.zeros(0, np.int64))
    single = exactly(columns[columns < (far_end if exact else last + 1)])
    top = np.max(np.concatenate([np.where(counts > 0, logits, -np.inf), near, single], -1), -1, keepdims=True)
    if scores.sinks is not None:
        top = np.maximum(top, scores.sinks[:, None])
    top = np.where(np.isfinite(top), top, 0)  # non-finite values show up in the total
    with np.errstate(over="ignore", invalid="ignore"):  # for nodes without keys, whose count is 0
        node_mass = np.where(counts > 0, counts * np.exp(logits - top), 0)
        near_mass = (np.exp(near - top) if exact else node_mass[:, :, far_nodes:]).sum(-1)
        column_mass = np.exp(single - top).sum(-1)
        far_mass = node_mass[:, :, :far_nodes]
        unit_mass = far_mass.reshape(*far_mass.shape[:2], -1, rule.unit // rule.node).sum(-1)
        total = unit_mass.sum(-1) + near_mass + column_mass
        if scores.sinks is not None:
            total = total + np.exp(scores.sinks - top[:, :, 0])
        shares = unit_mass / total[:, :, None], near_mass / total, column_mass / total
    units, near_share, column_share = (x.astype(np.float32) for x in shares)
    return _Masses(units.reshape(-1, units.shape[-1]), near_share.reshape(-1), column_share.reshape(-1))


def _choose(
    begin: int,
    end: int,
    far_end: int,
    masses: _Masses,
    columns: Array,
    coverage: float,
    rule: Sparsity,
    scores: ScoreParams,
) -> QueryBlock:
    def score(shares: Array) -> Array:
        found: Array = shares.mean(0) if rule.score == "mean" else np.sqrt(np.square(shares).mean(0))
        return found

    unit = rule.unit
    a, near = score(masses.units), float(score(masses.near))
    forced = np.zeros(len(a), bool)
    if not rule.columns:
        forced[: BLOCK // unit] = True
    covered = near + float(masses.columns.mean()) + float(a[forced].sum())
    total = covered + float(a[~forced].sum())
    if not np.isfinite(total):
        raise ValueError(NOT_FINITE)
    free = np.where(forced, 0, a)
    order = np.argsort(-free, kind="stable")
    falling = free[order]
    before = covered + np.append(0, np.cumsum(falling, dtype=np.float64))[:-1]
    rank = np.arange(len(a))
    take = rank < rule.top_k if rule.top_k else before < coverage * total
    if not rule.top_k:
        least, most = _bounds(begin, end, far_end, rule, scores)
        take = (take & (rank < most)) | (rank < least)
    take &= falling > 0
    chosen = forced.copy()
    chosen[order[take]] = True
    units = np.append(np.flatnonzero(chosen), np.arange(far_end // unit, end // unit + 1))
    found = QueryBlock(begin, end, False, units, columns[columns < far_end], 0, 0, a)
    start = scores.first_seen(begin)
    read, seen = int(found.reads(unit)[start:].sum()), end + 1 - start
    margin = _margin(take, falling, before, coverage, total, rule)
    if rule.max_density * DENSE_ABOVE[1] > DENSE_ABOVE[0] and read * DENSE_ABOVE[1] > seen * DENSE_ABOVE[0]:
        return replace(_dense(begin, end, unit, start), scores=a, margin=margin)
    return replace(found, read=read, seen=seen, margin=margin)


def _bounds(begin: int, end: int, far_end: int, rule: Sparsity, scores: ScoreParams) -> tuple[int, int]:
    """Minimum and maximum number of chosen units, besides those that are always read."""
    start, unit = scores.first_seen(begin), rule.unit
    every = end // unit - start // unit + 1
    always = end // unit - max(far_end, start) // unit + 1
    if not rule.columns:
        always += max(0, BLOCK // unit - start // unit)
    # in float32, which every implementation can reproduce
    least = int(np.ceil(np.float32(rule.min_density) * np.float32(every))) - always
    most = int(np.floor(np.float32(rule.max_density) * np.float32(every))) - always
    return max(least, 0), max(most, least, 0)


def _margin(take: Array, falling: Array, before: Array, coverage: float, total: float, rule: Sparsity) -> float:
    with_mass = falling > 0
    if not with_mass.any():
        return np.inf
    count = int(take.sum())
    # two units with nearly equal scores at the edge of the choice could swap
    edge = float(1 - falling[count] / falling[count - 1]) if 0 < count < len(falling) else np.inf
    if rule.top_k:
        return edge
    return min(edge, float(np.min(np.abs(before[with_mass] - coverage * total))) / total)


# the operator's inputs ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class HeadRoute:
    """The route of one sequence and KV head in one call of the operator."""

    sequence: int
    """Id of the sequence."""
    head: int
    """Index of the KV head."""
    route: Route


def sequence_rows(sequences: Array, positions: Array, sequence: int) -> Array:
    """The rows of a sequence's tokens, in order of position."""
    rows = np.flatnonzero(sequences == sequence)
    return rows[np.argsort(positions[rows], kind="stable")]


def rows_in_order(inputs: Sequence[Array | None], sequence: int) -> tuple[Array, Array]:
    """The rows of a sequence among the new tokens, and among past and new tokens, both in order of position.

    Raises:
        ValueError: the positions are not 0 … n - 1, each once, with the new ones last.
    """
    seq, pos, past_seq, past_pos = (np.asarray(inputs[i]) for i in (5, 6, 7, 8))
    all_positions = np.concatenate([past_pos, pos])
    new = sequence_rows(seq, pos, sequence)
    everything = sequence_rows(np.concatenate([past_seq, seq]), all_positions, sequence)
    count = len(everything)
    in_order = np.array_equal(all_positions[everything], np.arange(count))
    if not in_order or not np.array_equal(pos[new], np.arange(count - len(new), count)):
        raise ValueError(
            "a sparsity policy needs the positions of a sequence to be 0 … n - 1, the new ones last; those of "
            f"sequence {sequence} are not"
        )
    return new, everything


def call_scores(attributes: Attributes, dim: int, sinks: Array | None) -> ScoreParams:
    """The score parameters of a call, for one KV head's group of query heads."""
    scale = float(attributes["scale"]) or dim**-0.5
    return ScoreParams(scale, float(attributes["softcap"]), int(attributes["sliding_window"]), sinks)


def choose(inputs: Sequence[Array | None], attributes: Attributes) -> list[HeadRoute]:
    """Choose the keys for every sequence and KV head of a call of `transom::CachedAttention`.

    Args:
        inputs: the operator's inputs, in order.
        attributes: the operator's attributes, defaults filled in; `sparsity` is the layer's canonical string.

    Returns:
        One route for each sequence with new tokens and each KV head, by ascending sequence id.

    Raises:
        ValueError: the policy is invalid, has the heads of another model, or cannot be applied to the call.
    """
    policy = policy_of(inputs, attributes)
    q, k, past_k = (np.asarray(inputs[i]) for i in (0, 1, 3))
    seq = np.asarray(inputs[5])
    sinks = inputs[10] if len(inputs) > 10 else None
    kv_heads = int(attributes["kv_num_heads"])
    group = int(attributes["q_num_heads"]) // kv_heads
    dim = k.shape[1] // kv_heads
    present = np.concatenate([past_k, k]).astype(np.float32).reshape(-1, kv_heads, dim)
    queries = q.astype(np.float32).reshape(-1, kv_heads, group, dim)
    found = []
    for sequence in np.unique(seq):
        new, everything = rows_in_order(inputs, int(sequence))
        for head in range(kv_heads):
            own = None if sinks is None else np.asarray(sinks, np.float32).reshape(kv_heads, group)[head]
            scores = call_scores(attributes, dim, own)
            try:
                head_route = route(queries[new, head], present[everything, head], policy, head, scores)
            except ValueError as error:
                raise ValueError(f"layer {attributes['layer']}, KV head {head}: {error}") from error
            found.append(HeadRoute(int(sequence), head, head_route))
    return found


def policy_of(inputs: Sequence[Any], attributes: Attributes) -> LayerSparsity:
    """The policy in the attribute `sparsity` of a call.

    Args:
        inputs: the operator's inputs, or whether each is present.

    Raises:
        ValueError: the policy is invalid, has the heads of another model, or cannot be applied to the call.
    """
    policy = LayerSparsity.from_string(str(attributes["sparsity"]))
    if policy.dense:
        return policy
    heads = int(attributes["kv_num_heads"])
    if policy.heads is not None and len(policy.heads) != heads:
        raise ValueError(f"the sparsity policy has {len(policy.heads)} heads, and the layer has {heads} KV heads")
    if len(inputs) > 9 and inputs[9] is not None and inputs[9] is not False:
        raise ValueError("a sparsity policy cannot be applied to attention with a bias on its scores")
    if not attributes["is_causal"]:
        raise ValueError("a sparsity policy cannot be applied to attention that is not causal")
    return policy
