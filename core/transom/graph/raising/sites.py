"""Finds the attention of each layer: all nodes between its cache and its output.

The values computed from each cache are followed until the keys and the values meet in one node. The output of that node
is the attention's output. The region's inputs are the new key, the new value, the query, and values that depend only on
lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from transom.graph.raising.abstract import Facts
from transom.graph.raising.lengths import CacheInput
from transom.graph.raising.reasons import CannotRaise


@dataclass
class AttentionSite:
    """One layer's attention."""

    layer: int
    key: CacheInput
    value: CacheInput
    new_key: ir.Value
    new_value: ir.Value
    query: ir.Value
    output: ir.Value
    region: list[ir.Node]
    """The nodes from cache to output, in execution order."""

    def outside(self) -> list[ir.Value]:
        """The values that the region reads but does not compute, each once."""
        inner = {id(v) for node in self.region for v in node.outputs}
        seen: dict[int, ir.Value] = {}
        for node in self.region:
            for v in node.inputs:
                if v is not None and id(v) not in inner:
                    seen.setdefault(id(v), v)
        return list(seen.values())


def find_sites(graph: ir.Graph, caches: Sequence[CacheInput], facts: Facts) -> list[AttentionSite]:
    """The attentions in execution order.

    Raises:
        CannotRaise: a cache is used for something other than attention.
    """
    from_caches: dict[int, frozenset[int]] = {id(c.value): frozenset([i]) for i, c in enumerate(caches)}
    paths: dict[int, list[ir.Node]] = {i: [] for i in range(len(caches))}
    sites: list[AttentionSite] = []
    used: set[int] = set()
    for node in graph:
        if node.op_type in ("Shape", "Size") and not node.domain:
            continue
        origins: frozenset[int] = frozenset().union(*(from_caches.get(id(v), frozenset()) for v in node.inputs))
        if not origins:
            continue
        if len(origins) == 1:
            (origin,) = origins
            paths[origin].append(node)
            for value in node.outputs:
                from_caches[id(value)] = origins
            continue
        if len(origins) > 2 or origins & used:
            raise CannotRaise(f"the node {node.name} reads the caches of several layers")
        used |= origins
        order = {id(n): i for i, n in enumerate(graph)}
        region = sorted([n for i in origins for n in paths[i]] + [node], key=lambda n: order[id(n)])
        first, second = _key_and_value(node, origins, from_caches)
        sites.append(_site(len(sites), caches[first], caches[second], region, node, facts))
    if left := [str(c.value.name) for i, c in enumerate(caches) if i not in used]:
        raise CannotRaise(f"the cache input {left[0]} is not used in an attention with a second cache")
    return sites


def _key_and_value(node: ir.Node, origins: frozenset[int], sides: dict[int, frozenset[int]]) -> tuple[int, int]:
    """(cache of keys, cache of values): by the past inputs of `Attention`; else the values are the second operand."""
    first, second = sorted(origins)
    if node.op_type == "Attention" and not node.domain:
        for index in (4, 1):
            given = node.inputs[index] if len(node.inputs) > index else None
            origin = sides.get(id(given), frozenset()) if given is not None else frozenset()
            if len(origin) == 1:
                (key,) = origin
                return key, second if key == first else first
    right = node.inputs[1] if len(node.inputs) > 1 else None
    (value,) = sides.get(id(right), frozenset([second]))
    return (first, second) if value == second else (second, first)


def _site(
    layer: int, key: CacheInput, value: CacheInput, region: list[ir.Node], merge: ir.Node, facts: Facts
) -> AttentionSite:
    output = merge.outputs[0]
    new = [_appended(cache, region) for cache in (key, value)]
    site = AttentionSite(layer, key, value, new[0], new[1], output, output, region)
    known = {id(key.value), id(value.value), id(new[0]), id(new[1])}
    hidden = [v for v in site.outside() if id(v) not in known and v.const_value is None and facts[id(v)].array is None]
    if len(hidden) != 1:
        names = ", ".join(str(v.name) for v in hidden) or "none"
        raise CannotRaise(f"the attention of layer {layer} must read exactly one query, but reads {names}")
    site.query = hidden[0]
    return site


def _appended(cache: CacheInput, region: list[ir.Node]) -> ir.Value:
    """The value that is appended to a cache."""
    for node in region:
        for index, value in enumerate(node.inputs):
            if value is cache.value:
                new = node.inputs[1] if node.op_type == "Concat" else node.inputs[index - 3]
                if new is not None:
                    return new
    raise CannotRaise(f"nothing is appended to the cache input {cache.value.name}")
