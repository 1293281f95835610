"""OpenVINO's PagedAttention operator: how it is written into a graph, and restored from an exported one.

The operator attends over pages that the backend owns: `key_cache.i` and `value_cache.i` are inputs of the model, and
every step passes the page numbers of each sequence. Its Python constructor is undocumented; the 28 inputs are those of
OpenVINO 2026.4 (`src/core/include/openvino/op/paged_attention.hpp`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transom_openvino_cpu import names

Node = Any


@dataclass(frozen=True)
class Heads:
    """The shapes of one layer's attention."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


class PageInputs:
    """The inputs that all layers share, and two caches per layer."""

    def __init__(self) -> None:
        from openvino import opset13 as op

        self.shared: dict[str, Node] = {
            name: op.parameter([-1], np.int32, name=name)
            for name in (names.PAST_LENGTHS, names.BEGINS, names.PAGES, names.PAGE_BEGINS)
        }
        self.shared[names.LONGEST] = op.parameter([], np.int32, name=names.LONGEST)
        self.caches: dict[str, Node] = {}

    def caches_of(self, layer: int) -> list[Node]:
        """The layer's cache inputs; the plug-in fixes their type and layout when it compiles."""
        import openvino as ov
        from openvino import opset13 as op

        for name in names.cache_inputs(layer):
            if name not in self.caches:
                cache = op.parameter([-1, -1, -1, -1], np.float32, name=name)
                cache.set_element_type(ov.Type.dynamic)
                cache.output(0).get_tensor().set_names({name})
                self.caches[name] = cache
        return [self.caches[name] for name in names.cache_inputs(layer)]

    def parameters(self) -> list[Node]:
        return [*self.shared.values(), *self.caches.values()]


def _none(dtype: Any, shape: Sequence[int] = (0,)) -> Node:
    from openvino import opset13 as op

    return op.constant(np.zeros(shape, dtype))


def _scalar(value: float, dtype: Any = np.int32) -> Node:
    from openvino import opset13 as op

    return op.constant(np.array(value, dtype))


def paged_attention(
    qkv: Sequence[Node], inputs: PageInputs, layer: int, heads: Heads, *, scale: float, window: int, sinks: Node | None
) -> Node:
    """Attention of the step's tokens over the pages of their sequences, float32 [tokens, q_heads * value_dim].

    Args:
        qkv: query, key and value, [tokens, heads * dim]; the keys and values are appended to the pages.
        window: tokens that a query attends to, itself included; 0: all before it.
        sinks: float32 [q_heads], or None.
    """
    from openvino import opset13 as op

    if sinks is not None:
        sinks = op.reshape(sinks, op.constant(np.array([1, heads.q_heads, 1, 1], np.int64)), False)
    shared = inputs.shared
    arguments = [
        *qkv,
        *inputs.caches_of(layer),
        shared[names.PAST_LENGTHS],
        shared[names.BEGINS],
        shared[names.PAGES],
        shared[names.PAGE_BEGINS],
        _scalar(scale, np.float32),
        _scalar(window),
        _none(np.float32),  # ALiBi slopes
        shared[names.LONGEST],
        _none(np.int32),  # score aggregation window
        *_rotation(),
        _none(np.float32), _scalar(0), _scalar(0),  # XAttention: threshold, block size, stride
        sinks if sinks is not None else _none(np.float32, (0, 0, 0, 0)),
        *_eviction(),
        _none(np.int32),  # token types
        _none(np.uint8), _none(np.int32),  # bias among queries
    ]  # fmt: skip
    return _node(arguments, heads)


def _rotation() -> list[Node]:
    return [_none(np.int32), _none(np.int32), _none(np.float32)]


def _eviction() -> list[Node]:
    return [_scalar(0), _none(np.int32), _none(np.int32), _none(np.int32)]


def _node(arguments: Sequence[Node], heads: Heads) -> Node:
    import openvino as ov

    outputs = [a if isinstance(a, ov.Output) else a.output(0) for a in arguments]
    node = ov.op._PagedAttentionExtension(outputs)
    sizes = {
        "num_k_heads": heads.kv_heads,
        "k_head_size": heads.head_dim,
        "num_v_heads": heads.kv_heads,
        "v_head_size": heads.value_dim,
    }
    for key, value in sizes.items():
        node.get_rt_info()[key] = value
    return node


def reader(layers: Sequence[Heads]) -> type[Any]:
    """An extension for `Core.add_extension` that makes exported models readable.

    An exported PagedAttention loses its head sizes, which are runtime information, and the plug-in refuses to compile
    it. The extension creates the nodes in place of the plug-in, in file order. Since the attention of each layer
    depends on the layer before, file order is layer order.
    """
    import openvino as ov
    from openvino import opset13 as op

    made = iter(range(1 << 30))

    def blank(heads: Heads) -> Node:
        """A node whose inputs OpenVINO replaces."""
        wide = op.parameter([-1, heads.kv_heads * heads.head_dim], np.float32)
        cache = op.parameter([-1, -1, -1, -1], np.float32)
        tables = [op.parameter([-1], np.int32) for _ in range(4)]
        return _node(
            [
                wide, wide, wide, cache, cache, *tables, _scalar(1, np.float32), _scalar(0), _none(np.float32),
                _scalar(0), _none(np.int32), *_rotation(), _none(np.float32), _scalar(0), _scalar(0),
                _none(np.float32, (0, 0, 0, 0)), *_eviction(), _none(np.int32), _none(np.uint8), _none(np.int32),
            ],
            heads,
        )  # fmt: skip

    class Reader(ov.Op):  # type: ignore[misc]
        class_type_info = ov.DiscreteTypeInfo("PagedAttentionExtension", "extension")

        def __new__(cls, *arguments: object, **keywords: object) -> Any:
            # `add_extension` creates one node itself, to query its type; the layers follow.
            return blank(layers[max(0, next(made) - 1) % len(layers)])

    return Reader


def layers_from(raw: Sequence[Mapping[str, int]]) -> list[Heads]:
    return [Heads(**layer) for layer in raw]
