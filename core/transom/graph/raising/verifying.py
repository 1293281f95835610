"""Determines what an attention computes: reads its parameters from the graph, then verifies them numerically.

The nodes between cache and output run on random queries, keys and values, with the masks of several choices of lengths,
and the result is compared with `transom::CachedAttention`. A mismatch is refused, so a misread attention is never used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from transom.graph.raising.abstract import REFERENCE_ERRORS, Facts, call
from transom.graph.raising.lengths import Lengths
from transom.graph.raising.reasons import CannotRaise
from transom.graph.raising.sites import AttentionSite
from transom.graph.weights import Array
from transom.ops import cached_attention
from transom.signature import LayerCache

TOLERANCE = 2e-4
"""Largest allowed difference between the nodes and the operator, in float32, for values of about 1."""


@dataclass(frozen=True)
class AttentionSpec:
    """The parameters of `transom::CachedAttention` for one layer."""

    cache: LayerCache
    scale: float
    softcap: float
    sinks: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    """ALiBi: slope[head] * (position of the key - position of the query) is added to the scores."""

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the operator."""
        return {
            "q_num_heads": self.cache.q_heads,
            "kv_num_heads": self.cache.kv_heads,
            "scale": self.scale,
            "softcap": self.softcap,
            "sliding_window": self.cache.sliding_window,
        }


@dataclass(frozen=True)
class Layout:
    """The axis of the tokens in a tensor whose other axes are batch, heads and columns."""

    shape: tuple[int, ...]
    """The shape, with -1 for the tokens."""
    axis: int

    @property
    def width(self) -> int:
        return int(np.prod([d for d in self.shape if d > 0], dtype=np.int64))

    @property
    def leads(self) -> bool:
        """Whether only axes of size 1 precede the tokens."""
        return all(d == 1 for d in self.shape[: self.axis])

    def flat(self, array: Array) -> Array:
        """The array as [tokens, width]."""
        return np.moveaxis(array, self.axis, 0).reshape(array.shape[self.axis], -1)

    def unflat(self, array: Array) -> Array:
        rest = [d for i, d in enumerate(self.shape) if i != self.axis]
        return np.moveaxis(array.reshape(array.shape[0], *rest), 0, self.axis)


def layout_of(value: ir.Value, facts: Mapping[Lengths, Facts]) -> Layout:
    """Find the axis whose size is the number of new tokens.

    Raises:
        CannotRaise: the shape is unknown, or varies in another way.
    """
    shapes = {lengths: f[id(value)].shape for lengths, f in facts.items()}
    if any(s is None for s in shapes.values()) or len({len(s) for s in shapes.values() if s is not None}) != 1:
        raise CannotRaise(f"the shape of {value.name} cannot be determined")
    known = {lengths: s for lengths, s in shapes.items() if s is not None}
    first = next(iter(known.values()))
    varying = [a for a in range(len(first)) if len({s[a] for s in known.values()}) > 1]
    if len(varying) != 1 or any(s[varying[0]] != lengths.new for lengths, s in known.items()):
        raise CannotRaise(f"the shape of {value.name} does not follow the number of tokens: {list(first)}")
    return Layout(tuple(-1 if a == varying[0] else d for a, d in enumerate(first)), varying[0])


@dataclass(frozen=True)
class Layouts:
    """The layouts of the inputs and the output of one attention."""

    query: Layout
    key: Layout
    value: Layout
    output: Layout

    @classmethod
    def of(cls, site: AttentionSite, facts: Mapping[Lengths, Facts]) -> Layouts:
        return cls(*(layout_of(v, facts) for v in (site.query, site.new_key, site.new_value, site.output)))


def _run(site: AttentionSite, facts: Facts, arrays: Mapping[int, Array]) -> Array:
    """Run the site's nodes on these arrays (by `id` of the value); returns the output."""
    values: dict[int, Array] = dict(arrays)

    def read(value: ir.Value | None) -> Array | None:
        if value is None:
            return None
        if id(value) in values:
            return values[id(value)]
        known = facts[id(value)].array
        if known is not None:
            return known
        if value.const_value is not None:
            return value.const_value.numpy()
        raise CannotRaise(f"the attention of layer {site.layer} reads {value.name}, whose value is unknown")

    for node in site.region:
        try:
            results = call(node, [read(v) for v in node.inputs])
        except REFERENCE_ERRORS as e:
            if isinstance(e, CannotRaise):
                raise
            raise CannotRaise(f"the node {node.name} of the attention of layer {site.layer} cannot run: {e}") from e
        values.update((id(v), r) for v, r in zip(node.outputs, results, strict=True))
    return values[id(site.output)]


def _cache_array(site_cache_shape: tuple[int, ...], axis: int, flat: Array) -> Array:
    rest = [d for i, d in enumerate(site_cache_shape) if i != axis]
    return np.moveaxis(flat.reshape(flat.shape[0], *rest), 0, axis)


class AttentionVerifier:
    """Finds and verifies the parameters of one site."""

    def __init__(self, site: AttentionSite, facts: Mapping[Lengths, Facts], far: tuple[Lengths, Facts]) -> None:
        self.site, self.facts, self.far = site, facts, far
        small = {k: v for k, v in facts.items() if k != far[0]}
        self.layouts = Layouts.of(site, small)
        one = Lengths(1, 1)
        key_shape, value_shape = site.key.shape(one), site.value.shape(one)
        self.kv_heads, self.head_dim = _heads(key_shape, site.key.axis)
        value_heads, self.value_dim = _heads(value_shape, site.value.axis)
        width = self.layouts.query.width
        if value_heads != self.kv_heads or width % self.head_dim:
            raise CannotRaise(f"the heads of layer {site.layer} do not fit together")
        self.q_heads = width // self.head_dim
        fits = self.q_heads % self.kv_heads == 0 and self.layouts.output.width == self.q_heads * self.value_dim
        if not fits or self.layouts.key.width != self.kv_heads * self.head_dim:
            raise CannotRaise(f"the heads of layer {site.layer} do not fit together")

    def spec(self) -> AttentionSpec:
        """The verified parameters.

        Raises:
            CannotRaise: the operator cannot compute what the nodes compute.
        """
        window, slopes = self._mask()
        softcap = self._softcap()
        scale = self._scale(softcap, slopes)
        cache = LayerCache(self.q_heads, self.kv_heads, self.head_dim, self.value_dim, window)
        spec = AttentionSpec(cache, scale, softcap, self._sinks(), slopes)
        rng = np.random.default_rng(site_seed(self.site))
        for lengths, facts in self.facts.items():
            if lengths != self.far[0]:
                self._verify(spec, lengths, facts, rng)
        return spec

    def arrays(self, lengths: Lengths, q: Array, k: Array, v: Array, past_k: Array, past_v: Array) -> dict[int, Array]:
        """The inputs of the site in its own layouts, from arrays [tokens, width]."""
        site, layouts = self.site, self.layouts
        return {
            id(site.query): layouts.query.unflat(q),
            id(site.new_key): layouts.key.unflat(k),
            id(site.new_value): layouts.value.unflat(v),
            id(site.key.value): _cache_array(site.key.shape(lengths), site.key.axis, past_k),
            id(site.value.value): _cache_array(site.value.shape(lengths), site.value.axis, past_v),
        }

    def _verify(self, spec: AttentionSpec, lengths: Lengths, facts: Facts, rng: np.random.Generator) -> None:
        def draw(tokens: int, width: int) -> Array:
            return rng.standard_normal((tokens, width)).astype(np.float32)

        k_width, v_width = self.kv_heads * self.head_dim, self.kv_heads * self.value_dim
        q = draw(lengths.new, self.q_heads * self.head_dim)
        k, v = draw(lengths.new, k_width), draw(lengths.new, v_width)
        past_k, past_v = draw(lengths.past, k_width), draw(lengths.past, v_width)
        got = self.layouts.output.flat(_run(self.site, facts, self.arrays(lengths, q, k, v, past_k, past_v)))
        want = _expected(spec, lengths, q, k, v, past_k, past_v)
        worst = float(np.max(np.abs(got - want))) if got.shape == want.shape else float("inf")
        if not worst <= TOLERANCE:
            raise CannotRaise(
                f"the attention of layer {self.site.layer} ({self.site.output.name}) does not compute "
                f"{spec}: it is off by {worst:.2g} at {lengths.past} cached and {lengths.new} new tokens"
            )

    # hypotheses ------------------------------------------------------------------------------------------------------
    def _mask(self) -> tuple[int, tuple[float, ...]]:
        """(sliding window, ALiBi slopes), from the masks that the site reads with a long past."""
        lengths, facts = self.far
        visible = np.ones((lengths.new, lengths.total), bool)
        slopes: tuple[float, ...] = ()
        attention = self.site.region[-1]
        if attention.op_type == "Attention" and attention.attributes.get_int("is_causal", 0) == 1:
            visible &= np.tril(visible, lengths.past)
        for value in self.site.outside():
            array = facts[id(value)].array
            if array is None or array.ndim < 2 or array.shape[-1] != lengths.total:
                continue
            if array.shape[-2] not in (1, lengths.new):
                continue
            if array.dtype == bool:
                seen = array.reshape(-1, *array.shape[-2:])[0]
                seen = seen if seen[-1, -1] else ~seen
            elif np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16":
                seen, found = _additive(array.astype(np.float32), self.site)
                slopes = found or slopes
            else:
                continue
            visible &= np.broadcast_to(seen, visible.shape)
        return _window(visible, lengths, self.site), slopes

    def _softcap(self) -> float:
        attention = self.site.region[-1]
        if attention.op_type == "Attention" and not attention.domain:
            return float(attention.attributes.get_float("softcap", 0.0))
        for node in self.site.region:
            if node.op_type == "Tanh":
                for after, _ in node.outputs[0].uses():
                    for operand in after.inputs:
                        number = self._number(operand)
                        if after.op_type == "Mul" and number:
                            return number
                raise CannotRaise(f"the attention of layer {self.site.layer} has a tanh that is not a soft cap")
        return 0.0

    def _number(self, value: ir.Value | None) -> float | None:
        array = None if value is None else next(iter(self.facts.values()))[id(value)].array
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def _scale(self, softcap: float, slopes: tuple[float, ...]) -> float:
        """Measure the scale: for one cached and one new token, the ratio of weights gives the score. 0: the default."""
        attention = self.site.region[-1]
        if attention.op_type == "Attention" and not attention.domain:
            return self._tidy_scale(float(attention.attributes.get_float("scale", 0.0)))
        lengths = Lengths(1, 1)
        if lengths not in self.facts or self.value_dim < 2:
            raise CannotRaise(f"the scale of the attention of layer {self.site.layer} cannot be measured")
        q = np.zeros((1, self.q_heads, self.head_dim), np.float32)
        k = np.zeros((1, self.kv_heads, self.head_dim), np.float32)
        v, past_v = (np.zeros((1, self.kv_heads, self.value_dim), np.float32) for _ in range(2))
        q[..., 0], v[..., 1], past_v[..., 0] = 1, 1, 1
        product, score = 1.0, 0.0
        for target in (1.0, 2.0):
            k[..., 0] = product
            rows = [x.reshape(1, -1) for x in (q, k, v, np.zeros_like(k), past_v)]
            arrays = self.arrays(lengths, rows[0], rows[1], rows[2], rows[3], rows[4])
            out = self.layouts.output.flat(_run(self.site, self.facts[lengths], arrays))[0]
            if out[0] <= 0 or out[1] <= 0:
                raise CannotRaise(f"the scale of the attention of layer {self.site.layer} cannot be measured")
            score = float(np.log(np.float64(out[1]) / np.float64(out[0])))
            score -= slopes[0] if slopes else 0.0
            if softcap:
                score = softcap * float(np.arctanh(np.clip(score / softcap, -0.999, 0.999)))
            if abs(score) < 1e-6:
                raise CannotRaise(f"the scale of the attention of layer {self.site.layer} is 0")
            if target == 1.0:
                product *= 2.0 / abs(score)
        return self._tidy_scale(score / product)

    def _tidy_scale(self, scale: float) -> float:
        """Snap a measured scale to the default, or to a constant of the nodes that it equals in float32 precision."""
        usual = self.head_dim**-0.5
        if scale == 0 or abs(scale / usual - 1) < 1e-5:
            return 0.0
        numbers = {1.0}
        for value in self.site.outside():
            number = self._number(value)
            if number:
                numbers |= {number, 1 / number, number * number}
        near = [n for n in numbers if abs(scale / n - 1) < 1e-5]
        return near[0] if near else scale

    def _sinks(self) -> tuple[float, ...]:
        """The column of learned logits, one per head, that is concatenated to the scores."""
        facts = next(f for lengths, f in self.facts.items() if lengths.new > 1 and lengths != self.far[0])
        for node in self.site.region:
            if node.op_type != "Concat":
                continue
            for value in node.inputs:
                array = None if value is None else facts[id(value)].array
                if array is not None and array.ndim >= 3 and array.shape[-1] == 1 and array.size % self.q_heads == 0:
                    rows = array.reshape(self.q_heads, -1).astype(np.float32)
                    if (rows == rows[:, :1]).all():
                        return tuple(float(x) for x in rows[:, 0])
        return ()


def site_seed(site: AttentionSite) -> list[int]:
    """A seed that depends only on the layer, so that importing a file is reproducible."""
    return [20, site.layer]


def _heads(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    rest = [d for i, d in enumerate(shape) if i not in (0, axis)]
    return int(np.prod(rest[:-1], dtype=np.int64)), rest[-1]


def _expected(
    spec: AttentionSpec, lengths: Lengths, q: Array, k: Array, v: Array, past_k: Array, past_v: Array
) -> Array:
    new, past = np.arange(lengths.past, lengths.total), np.arange(lengths.past)
    bias = None
    if spec.slopes:
        distance = np.arange(lengths.total)[None, :] - new[:, None]
        bias = np.asarray(spec.slopes, np.float32)[:, None, None] * distance.astype(np.float32)
    sinks = np.asarray(spec.sinks, np.float32) if spec.sinks else None
    attributes = cached_attention.SCHEMA.attributes_with_defaults(spec.attributes)
    zeros = [np.zeros_like(new), new, np.zeros_like(past), past]
    return cached_attention.reference([q, k, v, past_k, past_v, *zeros, bias, sinks], attributes)[0]


def _additive(mask: Array, site: AttentionSite) -> tuple[Array, tuple[float, ...]]:
    """(visible tokens, ALiBi slopes) of an additive mask [..., new or 1, total]."""
    rows = mask.reshape(-1, *mask.shape[-2:])
    visible = _not_hidden(rows)
    first = visible[0]
    if not (visible == first).all():
        raise CannotRaise(f"the heads of layer {site.layer} attend to different tokens")
    shown = np.where(first, rows, 0)
    if not shown.any():
        return first, ()
    own = rows[:, -1:, -1:]  # the last token's bias for itself: softmax ignores a constant added to a whole row
    distance = np.arange(mask.shape[-1], dtype=np.float64) - (mask.shape[-1] - 1)
    last = first[-1]
    slopes = (rows[:, -1, -2] - own[:, 0, 0]) / -1.0
    wanted = slopes[:, None] * distance
    if not np.allclose((rows[:, -1] - own[:, 0])[:, last], wanted[:, last], rtol=1e-4, atol=1e-3):
        raise CannotRaise(f"the mask of layer {site.layer} adds a bias that is neither a window nor ALiBi")
    return first, tuple(float(s) for s in slopes)


def _not_hidden(rows: Array) -> Array:
    """Which entries are not masked. The mask value varies: -inf, the type's lowest number, -1e9, -10000 …

    A bias that grows with distance (ALiBi) has a lowest number too, but it does not occur many times.
    """
    low = float(rows.min())
    if low <= -1e6:
        return np.asarray(rows > max(low / 2, -1e30))
    if low <= -9999 and int((rows == low).sum()) > len(rows):
        return np.asarray(rows > low)
    return np.ones(rows.shape, bool)


def _window(visible: Array, lengths: Lengths, site: AttentionSite) -> int:
    """The sliding window, 0 for none.

    Raises:
        CannotRaise: the visible tokens are not a causal window.
    """
    counts = visible.sum(-1)
    position = np.arange(lengths.past, lengths.total)
    distance = position[:, None] - np.arange(lengths.total)[None, :]
    window = 0 if counts[-1] == lengths.total else int(counts[-1])
    wanted = distance >= 0
    if window:
        wanted &= distance < window
    if not (visible == wanted).all():
        raise CannotRaise(f"the mask of layer {site.layer} is neither causal nor a sliding window")
    return window
