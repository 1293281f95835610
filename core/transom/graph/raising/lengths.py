"""Identifies the inputs of an exported decoder, and gives their values for a choice of lengths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from transom.graph.raising.abstract import Fact
from transom.graph.raising.reasons import CannotRaise
from transom.graph.weights import Array

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


@dataclass(frozen=True)
class Lengths:
    """Number of new and of cached tokens of a batch of one sequence."""

    new: int
    past: int

    @property
    def total(self) -> int:
        return self.new + self.past


@dataclass(frozen=True)
class CacheInput:
    """A graph input that holds cached keys or values."""

    value: ir.Value
    axis: int
    """The axis along which tokens are appended."""
    present: ir.Value
    """The graph output that holds the cache and the new tokens."""

    def shape(self, lengths: Lengths) -> tuple[int, ...]:
        """Raises CannotRaise if a size other than batch and length is not fixed."""
        assert self.value.shape is not None
        dims: list[int] = []
        for axis, dim in enumerate(self.value.shape):
            if axis == self.axis:
                dims.append(lengths.past)
            elif axis == 0:
                dims.append(1)
            elif isinstance(dim, int) and dim > 0:
                dims.append(dim)
            else:
                raise CannotRaise(f"the cache input {self.value.name} does not state its size along axis {axis}")
        return tuple(dims)


def find_caches(graph: ir.Graph) -> list[CacheInput]:
    """The cache inputs, recognized by their use: a Concat appends to them, or `Attention` takes them as past."""
    caches = []
    outputs = {id(v) for v in graph.outputs}
    for value in graph.inputs:
        if value.dtype not in FLOATS or value.shape is None or len(value.shape) < 3:
            continue
        for node, index in value.uses():
            if node.domain or node.graph is not graph:
                continue
            if node.op_type == "Concat" and index == 0 and len(node.inputs) == 2:
                axis, present = node.attributes.get_int("axis", 0) % len(value.shape), node.outputs[0]
            elif node.op_type == "Attention" and index in (4, 5) and len(node.outputs) > index - 3:
                axis, present = 2, node.outputs[index - 3]
            else:
                continue
            if id(present) in outputs:
                caches.append(CacheInput(value, axis, present))
    return caches


def _named(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


_IDS = _named(r"input_ids$", r"^ids$", r"^tokens$", r"^input$", r"^inputs$")
_MASK = _named(r"attention_mask$", r"^mask$")
_POSITIONS = _named(r"position_ids$", r"cache_position$", r"^positions$", r"^input_pos$")
_TOTAL = _named(r"total_sequence_length$", r"total_seq_len$")
_LAST_KEY = _named(r"seqlens_k$")
_PAST = _named(r"past_sequence_length$", r"past_seq_len$", r"^past_length$")
_ZEROS = _named(r"logits_to_keep$", r"token_type_ids$")
_FLAG = _named(r"use_cache_branch$")


def find_ids(graph: ir.Graph) -> ir.Value:
    """The input of token ids: recognized by name, or the only integer input that indexes an embedding table."""
    integers = [v for v in graph.inputs if v.dtype in _INTEGERS]
    for value in integers:
        if _IDS.search(str(value.name)) and (value.shape is None or len(value.shape) == 2):
            return value
    picks = [
        v
        for v in integers
        if any(n.op_type == "Gather" and i == 1 and not n.domain for n, i in v.uses())
        and not _POSITIONS.search(str(v.name))
        and not _MASK.search(str(v.name))
    ]
    if len(picks) == 1 and picks[0].shape is not None and len(picks[0].shape) == 2:
        return picks[0]
    raise CannotRaise(
        "it has no input of token ids"
        + (", only embeddings" if any("embeds" in str(v.name) for v in graph.inputs) else "")
    )


def facts_of_inputs(
    graph: ir.Graph, ids: ir.Value, caches: Sequence[CacheInput], lengths: Lengths, *, strict: bool = True
) -> dict[str, Fact]:
    """The fact of each input. Of token ids and caches only the shape is known.

    Raises:
        CannotRaise: the meaning of an input is unknown, and `strict` is set.
    """
    facts: dict[str, Fact] = {}
    by_cache = {id(c.value): c for c in caches}
    for value in graph.inputs:
        name = str(value.name)
        if value is ids:
            facts[name] = Fact(value.dtype, (1, lengths.new))
        elif id(value) in by_cache:
            facts[name] = Fact(value.dtype, by_cache[id(value)].shape(lengths))
        else:
            array = _array(value, lengths)
            if array is None and strict:
                raise CannotRaise(f"the meaning of its input {name} is unknown")
            facts[name] = Fact(value.dtype) if array is None else Fact.of(array)
    return facts


def _array(value: ir.Value, lengths: Lengths) -> Array | None:
    """The content of an input whose name tells its meaning; None for any other input."""
    name, rank = str(value.name), -1 if value.shape is None else len(value.shape)
    dtype = value.dtype or ir.DataType.INT64
    new = np.arange(lengths.past, lengths.total)
    if _MASK.search(name):
        array = _mask(dtype, rank, lengths)
    elif _POSITIONS.search(name):
        array = new if rank == 1 else np.broadcast_to(new, _leading(value) + new.shape)
    elif _TOTAL.search(name):
        array = np.full((1,) * max(rank, 0), lengths.total)
    elif _PAST.search(name):
        array = np.full((1,) * max(rank, 0), lengths.past)
    elif _LAST_KEY.search(name):
        array = np.full((1,) * max(rank, 1), lengths.total - 1)
    elif _ZEROS.search(name):
        array = np.zeros((1, lengths.new) if rank == 2 else (1,) * max(rank, 0))
    elif _FLAG.search(name):
        array = np.ones((1,) * max(rank, 0))
    else:
        return None
    return np.ascontiguousarray(array).astype(dtype.numpy())


def _leading(value: ir.Value) -> tuple[int, ...]:
    """Sizes of the axes before the last: 1 for the batch, else the number in the file (3 for mrope)."""
    if value.shape is None:
        return (1,)
    dims = list(value.shape)[:-1]
    return tuple(d if isinstance(d, int) else 1 for d in dims)


def _mask(dtype: ir.DataType, rank: int, lengths: Lengths) -> Array:
    """A mask without padding. A mask of rank 4 is additive or boolean, and causal."""
    if rank != 4:
        return np.ones((1, lengths.total))
    visible = np.tril(np.ones((lengths.new, lengths.total), bool), lengths.past)[None, None]
    if dtype == ir.DataType.BOOL:
        return visible
    return np.where(visible, 0, np.finfo(dtype.numpy()).min)
