"""Calibrates activations: runs texts through the NumPy reference and records the range of inputs of products and
attention.

The bound from which a scale is computed is the largest magnitude, or a percentile of all magnitudes, so that a few
outliers do not enlarge the step for all other values: Wu et al. 2020, Integer quantization for deep learning inference
(arXiv:2004.09602), who count all magnitudes, not the largest of each token. The histogram is over the first 16 bits of
each float32 (those of bfloat16). It takes 256 KB per value for any amount of text, and overestimates the percentile by
less than 1 %.

Percentiles are for integers. Language models have a few essential activations that are hundreds of times as large as
all others (Sun et al. 2024, Massive activations in large language models, arXiv:2402.17762). E4M3 has the range for
both; use the largest magnitude there.

Activations are not kept, except for some rows of the inputs of products, from which passes measure errors.
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

MAX_RUN_TOKENS = 2048
"""Maximum number of tokens per run, unless a single text is longer. Weights are streamed once per run."""
LOGIT_ROWS = 256
"""Maximum number of tokens per run whose logits are computed, since the vocabulary matrix is large."""
_BINS = 1 << 15


@dataclass(frozen=True)
class ActivationRange:
    """The range of one value of the graph, over all tokens of all texts."""

    largest: float
    """Largest magnitude."""
    bound: float
    """The number from which scales are computed: `largest`, or the requested percentile."""
    rows: Array | None = None
    """float32 [rows, width]: the value at some tokens; None if it is not the input of a product."""


@dataclass(frozen=True)
class Activations:
    """The result of `calibrate`."""

    inputs: Mapping[tuple[str, int], ActivationRange]
    """Ranges by node and input index: input 0 of each product with a weight; query, key and value (0, 1, 2) of each
    `transom::CachedAttention`."""
    outputs: Mapping[str, float]
    """Largest magnitude of the output of each product with a weight, before its bias, by node."""
    tokens: int
    percentile: float | None

    def input(self, node: str, index: int = 0) -> ActivationRange:
        """The range of an input. Raises OptionError if it was not observed."""
        if (node, index) not in self.inputs:
            raise OptionError(
                f"The activations do not include input {index} of the node {node}",
                "Calibrate the graph that is to be quantized",
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
        graph: the graph of a decoder.
        texts: token ids of each text; each text is read as one prefill from position 0.
        percentile: the percentile of magnitudes that becomes the bound, above 0 and up to 100; None: the largest.
        rows: number of tokens, evenly spread over all texts, whose rows are kept. The choice is deterministic.
        progress: called with the completed fraction.

    The input of the vocabulary matrix is observed at up to `LOGIT_ROWS` evenly spread tokens per run.

    Raises:
        OptionError: the graph is not a decoder, a text is empty, too long or has tokens outside the vocabulary, or the
            percentile is out of range.
        SourceError: an activation is not finite.
    """
    decoder = graph.decoder
    if decoder is None:
        raise OptionError(f"{graph.name} has no attention with a cache", "Calibrate a decoder")
    if percentile is not None and not 0 < percentile <= 100:
        raise OptionError(
            f"percentile={percentile} is out of range", "Use a number above 0 and up to 100, such as 99.99"
        )
    _check_texts(texts, decoder)
    executor = Executor(graph)
    observer = _RangeObserver(executor.graph, percentile)
    runs = list(_runs(texts))
    total, done, kept = sum(map(len, texts)), 0, 0
    for run in runs:
        count = sum(map(len, run))
        logits = np.unique(np.linspace(0, count - 1, min(count, LOGIT_ROWS)).astype(np.int64))
        until = round(rows * (done + count) / total)  # cumulative, so that the runs' rows add up to `rows`
        sampled = np.linspace(0, len(logits) - 1, min(until - kept, len(logits))).astype(np.int64)
        observer.begin(count, logits, sampled)
        part = _scaled_progress(progress, done / total, count / total)
        executor.run(decoder_inputs(run, logits, empty_cache(decoder)), progress=part, observe=observer.observe)
        done, kept = done + count, until
    return observer.finish(total)


def _check_texts(texts: Sequence[Sequence[int]], decoder: Decoder) -> None:
    if not texts or not all(map(len, texts)):
        raise OptionError("There is no calibration text, or one is empty", "Pass texts of some hundred tokens")
    for text in texts:
        if len(text) > decoder.context:
            raise OptionError(
                f"A calibration text has {len(text)} tokens, but the model's context is {decoder.context}", "Shorten it"
            )
        if not 0 <= min(text) <= max(text) < decoder.vocabulary:
            raise OptionError(
                f"A calibration text has tokens outside the vocabulary of {decoder.vocabulary}",
                "Encode it with the model's own tokenizer",
            )


def _runs(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The texts in order, grouped into runs of at most `MAX_RUN_TOKENS` tokens."""
    run: list[Sequence[int]] = []
    for text in texts:
        if run and sum(map(len, run)) + len(text) > MAX_RUN_TOKENS:
            yield run
            run = []
        run.append(text)
    yield run


def _scaled_progress(
    progress: Callable[[float], None] | None, begin: float, share: float
) -> Callable[[float], None] | None:
    return None if progress is None else lambda done: progress(begin + share * done)


@dataclass
class _RunningRange:
    """The range of one value so far."""

    name: str
    largest: float = 0.0
    counts: Array | None = None
    rows: list[Array] = field(default_factory=list)

    def add(self, x: Array) -> None:
        largest = float(np.abs(x).max(initial=0.0))
        if not np.isfinite(largest):
            raise SourceError(
                f"The model computes values that are not finite, first at the node {self.name}",
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


class _RangeObserver:
    """Records ranges while `Executor.run` runs."""

    def __init__(self, graph: Graph, percentile: float | None) -> None:
        self._percentile = percentile
        self._values: dict[int, _RunningRange] = {}
        self._inputs: dict[int, dict[int, _RunningRange]] = {}
        """Ranges by node and input index; a value that several nodes read has one range."""
        self._outputs: dict[int, _RunningRange] = {}
        self._names: dict[int, str] = {}
        self._products: set[int] = set()
        """Values that products read, whose rows are kept."""
        for node in graph.nodes():
            product = linear_weight(node) is not None
            if not product and not is_attention(node):
                continue
            self._names[id(node)] = str(node.name)
            self._inputs[id(node)] = {i: self._range_of(node.inputs[i], node) for i in ((0,) if product else (0, 1, 2))}
            if product:
                self._products.add(id(node.inputs[0]))
                self._outputs[id(node)] = _RunningRange(str(node.name))
        self._observed: set[int] = set()
        self._tokens, self._logits, self._sampled = 0, np.zeros(0, np.int64), np.zeros(0, np.int64)

    def _range_of(self, value: ir.Value | None, node: ir.Node) -> _RunningRange:
        counts = None if self._percentile is None else np.zeros(_BINS, np.int64)
        return self._values.setdefault(id(value), _RunningRange(str(node.name), counts=counts))

    def begin(self, tokens: int, logits: Array, sampled: Array) -> None:
        """Start a run.

        Args:
            tokens: number of tokens.
            logits: indices of the tokens whose logits are computed.
            sampled: indices into `logits` of the tokens whose rows are kept.
        """
        self._observed.clear()
        self._tokens, self._logits, self._sampled = tokens, logits, sampled

    def observe(self, node: ir.Node, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        for index, counted in self._inputs.get(id(node), {}).items():
            value = id(node.inputs[index])
            if value in self._observed:
                continue
            self._observed.add(value)
            counted.add(inputs[index])
            if value in self._products:
                x = inputs[index].reshape(-1, inputs[index].shape[-1])
                at = self._logits[self._sampled] if len(x) == self._tokens else self._sampled
                counted.rows.append(np.array(x[at], np.float32))
        if id(node) in self._outputs:
            self._outputs[id(node)].add(outputs[0])

    def finish(self, tokens: int) -> Activations:
        found = {
            value: ActivationRange(c.largest, c.bound(self._percentile), np.concatenate(c.rows) if c.rows else None)
            for value, c in ((id(c), c) for c in self._values.values())
        }
        inputs = {
            (self._names[node], index): found[id(counted)]
            for node, by_index in self._inputs.items()
            for index, counted in by_index.items()
        }
        outputs = {self._names[node]: counted.largest for node, counted in self._outputs.items()}
        return Activations(inputs, outputs, tokens, self._percentile)
