"""What a model's activations are like: a few texts through the NumPy reference, and how large the numbers get that meet
its matrices and its attention.

The bound that a scale is made from is the largest magnitude, or a percentile of all magnitudes, so that few outliers do
not widen the step of the rest: Wu et al. 2020, Integer quantization for deep learning inference (arXiv:2004.09602), who
count all magnitudes and not the largest of each token. They are counted by their first 16 bits, those of bfloat16,
which is 256 KB for each value however much is read, and the percentile is rounded up by less than 1 %.

A percentile is for integers. Language models have single activations that are hundreds of times as large as the rest
and that they cannot do without (Sun et al. 2024, Massive activations in large language models, arXiv:2402.17762):
E4M3 has the range for both, and there the largest magnitude is right.

No activation is kept but some rows of the inputs of products, by which passes report errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.errors import OptionError, SourceError
from transom.graph.reading import linear_weight
from transom.graph.sparse import is_attention
from transom.graph.weights import Array
from transom.reference.executor import Executor
from transom.sessions.inputs import decoder_inputs, empty_cache
from transom.signature import Decoder

if TYPE_CHECKING:
    import onnx_ir as ir

    from transom.graph import Graph

TOGETHER = 2048
"""Tokens that go through the model at a time, so that its weights are streamed once for all of them; a longer text goes
alone."""
LOGIT_ROWS = 256
"""Tokens of a run whose logits are computed: the vocabulary matrix is wide."""
_BINS = 1 << 15


@dataclass(frozen=True)
class Observed:
    """One value of the graph, over all tokens of all texts."""

    largest: float
    """Largest magnitude."""
    bound: float
    """What scales are made from: `largest`, or the percentile that was asked for."""
    rows: Array | None = None
    """float32 [rows, width]: the value at some tokens; None where it is no input of a product."""


@dataclass(frozen=True)
class Activations:
    """What `calibrate` saw."""

    inputs: Mapping[tuple[str, int], Observed]
    """By node and position of the input: input 0 of each product with a weight; query, key and value (0, 1, 2) of each
    `transom::CachedAttention`."""
    outputs: Mapping[str, float]
    """Largest magnitude of each product with a weight, before its bias, by node."""
    tokens: int
    percentile: float | None

    def input(self, node: str, index: int = 0) -> Observed:
        """Raises OptionError for an input that was not observed."""
        if (node, index) not in self.inputs:
            raise OptionError(
                f"The activations say nothing of input {index} of the node {node}",
                "Calibrate the graph that is to be quantised",
            )
        return self.inputs[node, index]


def calibrate(
    graph: Graph,
    texts: Sequence[Sequence[int]],
    *,
    percentile: float | None = None,
    rows: int = 32,
    progress: Callable[[float], None] | None = None,
) -> Activations:
    """Run texts through the reference and observe the inputs of products and attention.

    Args:
        graph: a decoder's.
        texts: token ids of each; each is read as one prefill from position 0.
        percentile: of the magnitudes, above 0 and up to 100, that the bounds are; None: the largest.
        rows: how many tokens, evenly spread over all texts, have their rows kept. The same arguments give the same
            ones.
        progress: called with the share that is done.

    The input of the vocabulary matrix is observed at up to `LOGIT_ROWS` tokens of a run, evenly spread.

    Raises:
        OptionError: the graph is no decoder, a text is empty, too long or has tokens that the model does not know, or
            the percentile is none.
        SourceError: an activation is not finite.
    """
    decoder = graph.decoder
    if decoder is None:
        raise OptionError(f"{graph.name} has no attention with a cache", "Calibrate a decoder")
    if percentile is not None and not 0 < percentile <= 100:
        raise OptionError(f"percentile={percentile} is none", "Give one above 0 and up to 100, such as 99.99")
    _need_texts(texts, decoder)
    executor = Executor(graph)
    watch = _Watch(executor.graph, percentile)
    runs = list(_runs(texts))
    total, done, kept = sum(map(len, texts)), 0, 0
    for run in runs:
        count = sum(map(len, run))
        logits = np.unique(np.linspace(0, count - 1, min(count, LOGIT_ROWS)).astype(np.int64))
        until = round(rows * (done + count) / total)  # a run's share of the rows, which add up to all of them
        sampled = np.linspace(0, len(logits) - 1, min(until - kept, len(logits))).astype(np.int64)
        watch.begin(count, logits, sampled)
        part = _part(progress, done / total, count / total)
        executor.run(decoder_inputs(run, logits, empty_cache(decoder)), progress=part, observe=watch.see)
        done, kept = done + count, until
    return watch.finish(total)


def _need_texts(texts: Sequence[Sequence[int]], decoder: Decoder) -> None:
    if not texts or not all(map(len, texts)):
        raise OptionError("There is no text to calibrate on, or one is empty", "Give texts of some hundred tokens")
    for text in texts:
        if len(text) > decoder.context:
            raise OptionError(
                f"A text to calibrate on has {len(text)} tokens, and the model reads {decoder.context}", "Cut it"
            )
        if not 0 <= min(text) <= max(text) < decoder.vocabulary:
            raise OptionError(
                f"A text to calibrate on has tokens outside the vocabulary of {decoder.vocabulary}",
                "Encode it with the model's own tokenizer",
            )


def _runs(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The texts in order, as many at a time as `TOGETHER` allows."""
    run: list[Sequence[int]] = []
    for text in texts:
        if run and sum(map(len, run)) + len(text) > TOGETHER:
            yield run
            run = []
        run.append(text)
    yield run


def _part(progress: Callable[[float], None] | None, begin: float, share: float) -> Callable[[float], None] | None:
    return None if progress is None else lambda done: progress(begin + share * done)


@dataclass
class _Counted:
    """One value while texts run."""

    name: str
    largest: float = 0.0
    counts: Array | None = None
    rows: list[Array] = field(default_factory=list)

    def add(self, x: Array) -> None:
        largest = float(np.abs(x).max(initial=0.0))
        if not np.isfinite(largest):
            raise SourceError(
                f"The model computes values that are not numbers, first seen at the node {self.name}",
                "Download or convert the checkpoint again",
            )
        self.largest = max(self.largest, largest)
        if self.counts is not None:
            bits = np.abs(x).astype(np.float32, copy=False).view(np.uint32) >> np.uint32(16)
            self.counts += np.bincount(bits.reshape(-1), minlength=_BINS)

    def bound(self, percentile: float | None) -> float:
        if percentile is None or self.counts is None or not self.counts.any():
            return self.largest
        below = np.cumsum(self.counts)
        index = int(np.searchsorted(below, below[-1] * (percentile / 100)))
        edge = (np.array([index + 1], np.uint32) << np.uint32(16)).view(np.float32)
        return min(self.largest, float(edge[0]))


class _Watch:
    """Counts what `Executor.run` shows of the nodes that matter."""

    def __init__(self, graph: Graph, percentile: float | None) -> None:
        self._percentile = percentile
        self._values: dict[int, _Counted] = {}
        self._inputs: dict[int, dict[int, _Counted]] = {}
        """By node and position; a value that several nodes read is counted at the first of them."""
        self._outputs: dict[int, _Counted] = {}
        self._names: dict[int, str] = {}
        self._products: set[int] = set()
        """Values that products read: their rows are kept."""
        for node in graph.nodes():
            product = linear_weight(node) is not None
            if not product and not is_attention(node):
                continue
            self._names[id(node)] = str(node.name)
            self._inputs[id(node)] = {i: self._counted(node.inputs[i], node) for i in ((0,) if product else (0, 1, 2))}
            if product:
                self._products.add(id(node.inputs[0]))
                self._outputs[id(node)] = _Counted(str(node.name))
        self._seen: set[int] = set()
        self._tokens, self._logits, self._sampled = 0, np.zeros(0, np.int64), np.zeros(0, np.int64)

    def _counted(self, value: ir.Value | None, node: ir.Node) -> _Counted:
        counts = None if self._percentile is None else np.zeros(_BINS, np.int64)
        return self._values.setdefault(id(value), _Counted(str(node.name), counts=counts))

    def begin(self, tokens: int, logits: Array, sampled: Array) -> None:
        """A run of so many tokens begins.

        Args:
            logits: the tokens whose logits are computed.
            sampled: of these, those whose rows are kept.
        """
        self._seen.clear()
        self._tokens, self._logits, self._sampled = tokens, logits, sampled

    def see(self, node: ir.Node, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        for index, counted in self._inputs.get(id(node), {}).items():
            value = id(node.inputs[index])
            if value in self._seen:
                continue
            self._seen.add(value)
            counted.add(inputs[index])
            if value in self._products:
                x = inputs[index].reshape(-1, inputs[index].shape[-1])
                at = self._logits[self._sampled] if len(x) == self._tokens else self._sampled
                counted.rows.append(np.array(x[at], np.float32))
        if id(node) in self._outputs:
            self._outputs[id(node)].add(outputs[0])

    def finish(self, tokens: int) -> Activations:
        found = {
            value: Observed(c.largest, c.bound(self._percentile), np.concatenate(c.rows) if c.rows else None)
            for value, c in ((id(c), c) for c in self._values.values())
        }
        inputs = {
            (self._names[node], index): found[id(counted)]
            for node, by_index in self._inputs.items()
            for index, counted in by_index.items()
        }
        outputs = {self._names[node]: counted.largest for node, counted in self._outputs.items()}
        return Activations(inputs, outputs, tokens, self._percentile)
