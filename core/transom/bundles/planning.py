"""What a bundle would weigh and how fast it could be at most, before anything is compiled: arithmetic on shapes.

A decoder writes one token after another, and for each it reads its matrices once and what lies in the cache. So the
speed is bounded by the memory's bandwidth over these bytes. It is a bound and no forecast: nothing here claims what a
device does that nobody has seen do it. No weight is read, so a plan takes as long as going through the graph's nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transom.bundles.inventory import Inventory, Matrix, inventory
from transom.bundles.published import Published, published
from transom.bundles.storage import SMALL_SHARE, Form, MatrixForm, form_of
from transom.contract import Device
from transom.errors import DoesNotFit
from transom.graph import Graph
from transom.hardware.bandwidth import Bandwidth, bandwidth
from transom.hardware.catalogue import PREFIX
from transom.preparation.memory import require_context, size
from transom.signature import Decoder

FIRST_CONTEXT = 512
"""The shortest context of the table, tokens; the next ones are twice the one before."""


@dataclass(frozen=True)
class Weighed:
    """The weights of one use."""

    use: str
    """`"products"`, `"small products"`, `"vocabulary"`, `"embedding"`, `"other"` (norms and biases), `"code"`."""
    arithmetic: str
    """Where the number of weights comes from."""
    numbers: int
    bytes: int
    """In files."""
    held: int
    """Bytes of them in memory."""
    read: int
    """Bytes that are read of them for one token."""

    @property
    def bits(self) -> float:
        """Of one number, scales included."""
        return 8 * self.bytes / self.numbers if self.numbers else 0.0


@dataclass(frozen=True)
class PartPlan:
    """The layers `first` to `end - 1`, compiled as one."""

    first: int
    end: int
    vocabulary: bool
    """Whether the vocabulary matrix is in it."""
    bytes: int

    def __str__(self) -> str:
        head = " and the vocabulary matrix" if self.vocabulary else ""
        layers = f"layers {self.first} to {self.end - 1}" if self.end - self.first > 1 else f"layer {self.first}"
        return f"{layers}{head}, {exact(self.bytes)}"


@dataclass(frozen=True)
class AtContext:
    """A variant with a full cache of so many tokens."""

    context: int
    cache: int
    """Bytes of one sequence."""
    peak: int
    """Bytes in memory at most: weights, cache, and the working space of a prefill chunk."""
    read: int
    """Bytes that are read for one token: weights and cache."""
    bound: float | None
    """Tokens a second that the memory's bandwidth allows; None where it is not known."""


@dataclass(frozen=True)
class VariantPlan:
    """One variant of a bundle."""

    form: Form
    weights: tuple[Weighed, ...]
    parts: tuple[PartPlan, ...]
    files: Mapping[str, int]
    """Bytes by name. What is small is left out: the manifest, the tokenizer, the graph without its weights."""
    cache_per_token: int
    cache_arithmetic: str
    at: tuple[AtContext, ...]
    """By context, the longest one last: the one that was asked for."""
    notes: tuple[str, ...]
    kept: int
    """Matrices that stay as the checkpoint has them, whatever the form of plain ones."""

    @property
    def weight_bytes(self) -> int:
        """Of all weights in memory."""
        return sum(w.held for w in self.weights)

    def lines(self, memory: Bandwidth | None) -> Iterator[str]:
        """For people, the arithmetic with it."""
        form = self.form
        small = f"; small ones {form.small}" if any(w.use == "small products" for w in self.weights) else ""
        plain = "plain " if self.kept else ""
        yield f"{form.name}: {plain}products {form.products}{small}; {plain}vocabulary matrix {form.vocabulary}"
        for w in self.weights:
            where = "" if w.held == w.bytes else f", {exact(w.held)} in memory" if w.held else ", in a mapped file"
            count = f" = {_count(w.numbers)} at {w.bits:.2f} bits" if w.numbers else ""
            yield f"  {w.use}: {w.arithmetic}{count} = {exact(w.bytes)}{where}"
        parts = " + ".join(exact(w.held) for w in self.weights if w.held)
        yield f"  weights in memory: {parts} = {exact(self.weight_bytes)}"
        for i, part in enumerate(self.parts):
            yield f"  part {i}: {part}"
        yield f"  files: {', '.join(f'{name} {exact(count)}' for name, count in self.files.items())}"
        yield f"  cache: {self.cache_arithmetic} = {self.cache_per_token} bytes a token"
        for row in self.at:
            bound = "" if row.bound is None else f", at most {row.bound:.1f} tokens/s"
            yield (
                f"  at {row.context} tokens: cache {exact(row.cache)}, at most {exact(row.peak)} in memory, "
                f"{exact(row.read)} read for a token{bound}"
            )
        last, weights = self.at[-1], sum(w.read for w in self.weights)
        read = f"{exact(weights)} of weights + {exact(last.read - weights)} of cache = {exact(last.read)}"
        if memory is None:
            yield f"  no bound: {read} for a token, and how fast this device's memory is read is not known here"
        else:
            speed = f"{memory.bytes_per_second / 1e9:.1f} GB/s"
            yield f"  bound: {speed} / ({read}) = {last.bound:.1f} tokens/s, a bound and not a measurement"
        for note in self.notes:
            yield f"  note: {note}"

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "format": self.form.format,
            "precision": self.form.precision,
            "weights": [vars(w) for w in self.weights],
            "weight_bytes": self.weight_bytes,
            "parts": [vars(part) for part in self.parts],
            "files": dict(self.files),
            "cache_per_token": self.cache_per_token,
            "at": [vars(row) for row in self.at],
            "notes": list(self.notes),
            "kept": self.kept,
        }


@dataclass(frozen=True)
class ExportPlan:
    """What a bundle would be, for people (`str`) and for programs (`to_dict`)."""

    model: str
    device: Device
    context: int
    memory: Bandwidth | None
    """None: not known."""
    variants: tuple[VariantPlan, ...]
    published: tuple[Published, ...]
    """Figures of others for models of this shape."""

    @property
    def bytes(self) -> int:
        """Of the files of all variants; a file that several of them have is there once."""
        return sum({name: count for v in self.variants for name, count in v.files.items()}.values())

    def __str__(self) -> str:
        where = f"{self.device.id} ({self.device.name})" if self.device.name else self.device.id
        lines = [
            f"{self.model} for {where}, {self.context} tokens: planned from shapes, nothing is compiled or measured"
        ]
        if self.memory is None:
            lines.append("memory: how fast it is read is not known here, so there is no bound")
        else:
            lines.append(f"memory: {self.memory} at most ({self.memory.source}); a device may have slower memory")
        for variant in self.variants:
            lines += ["", *variant.lines(self.memory)]
        if len(self.variants) > 1:
            lines += ["", f"files of all variants: {exact(self.bytes)}"]
        if self.published:
            lines += ["", "published, not measured by us, for models of this shape:"]
            lines += [f"  {figure}" for figure in self.published]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        memory = None
        if self.memory is not None:
            memory = {**vars(self.memory), "bytes_per_second": self.memory.bytes_per_second}
        return {
            "model": self.model,
            "target": self.device.id,
            "context": self.context,
            "memory": memory,
            "bytes": self.bytes,
            "variants": [variant.to_dict() for variant in self.variants],
            "published": [figure.to_dict() for figure in self.published],
        }


def plan_export(
    graph: Graph,
    decoder: Decoder,
    device: Device,
    variants: Sequence[tuple[str, str] | Form],
    context: int | None = None,
) -> ExportPlan:
    """Plan the variants of a bundle.

    Args:
        graph: the neutral graph; only its shapes are looked at.
        variants: (format, precision), `("qnn", "int4")`, or a form of one's own.
        context: tokens that a sequence may have; None for the model's own.

    Raises:
        OptionError: the context is longer than the model's, or a format does not have a precision, or not for this
            device or model.
        DoesNotFit: a layer alone is larger than one compiled part may be.
    """
    require_context(decoder, context)
    tokens = context or decoder.context
    held, memory = inventory(graph), bandwidth(device)
    forms = [v if isinstance(v, Form) else form_of(*v, decoder, device) for v in variants]
    plans = tuple(_Planning(form, held, decoder, device, memory).plan(tokens) for form in forms)
    return ExportPlan(graph.name, device, tokens, memory, plans, published(decoder))


class _Planning:
    """One decoder in one form."""

    def __init__(self, form: Form, held: Inventory, decoder: Decoder, device: Device, memory: Bandwidth | None) -> None:
        self.form, self.held, self.decoder, self.device, self.memory = form, held, decoder, device, memory
        self.copies = 2 if form.static and "weight_sharing" not in device.features else 1
        """Of the matrices: the graphs for prefill and for decoding have each their own where they cannot share."""
        most = SMALL_SHARE * sum(m.numbers for m in held.products) / len(decoder.layers)
        small = form.small or form.products
        self.products = [(m, small if m.numbers <= most else form.products) for m in held.products]
        """Each with its form."""

    def plan(self, context: int) -> VariantPlan:
        weights = tuple(self.weights())
        parts = tuple(self.parts())
        kinds = Counter((layer.kv_heads, layer.head_dim, layer.value_dim) for layer in self.decoder.layers)
        cache = " + ".join(
            f"{n} layers × {heads} heads × ({key} + {value})" for (heads, key, value), n in kinds.items()
        )
        unit = "byte" if self.form.cache == 1 else "bytes"
        return VariantPlan(
            form=self.form,
            weights=weights,
            parts=parts,
            files=self.files(weights, parts),
            cache_per_token=self.decoder.cache_bytes(1, self.form.cache),
            cache_arithmetic=f"{cache} numbers × {self.form.cache:g} {unit}",
            at=tuple(self.at(tokens, weights) for tokens in context_lengths(context)),
            notes=tuple(self.notes()),
            kept=self.kept,
        )

    # weights ----------------------------------------------------------------------------------------------------------
    def weights(self) -> Iterator[Weighed]:
        form, held = self.form, self.held
        for use, of in (("products", form.products), ("small products", form.small)):
            own = [m for m, has in self.products if has is of]
            if own and of is not None:
                yield self._read_once(use, _layers(own), own, of)
        shapes = " + ".join(_shape(m.shape) for m in held.vocabulary) or "0"
        yield self._read_once("vocabulary", shapes, held.vocabulary, form.vocabulary)
        table = held.embedding
        if table is not None and not (form.shares_table and held.tied):
            count = self.bytes(table, form.embedding)
            row = count // table.rows
            yield Weighed(
                "embedding", _shape(table.shape), table.numbers, count, 0 if form.embedding_mapped else count, row
            )
        count = held.rest * form.rest
        yield Weighed("other", "norms and biases", held.rest, count, count, count)
        if not form.shares_all and self.copies == 1:
            numbers, count = self.half_of_attention()
            yield Weighed("twice", "half of attention, for the other graph", numbers, count, count, 0)
        if form.layer:
            layers = len(self.decoder.layers)
            count = layers * form.layer
            yield Weighed("code", f"{layers} layers × {size(form.layer)}", 0, count, count, count // 2)

    def bytes(self, matrix: Matrix, form: MatrixForm) -> int:
        """Of a matrix where plain ones are to have `form`."""
        return self.form.of(matrix, form).bytes(*matrix.shape)

    def half_of_attention(self) -> tuple[int, int]:
        """Numbers and bytes of one of queries and outputs, and of one of keys and values, in each layer."""
        decoder, form = self.decoder, self.form
        rows = [heads * layer.head_dim for layer in decoder.layers for heads in (layer.q_heads, layer.kv_heads)]
        return sum(rows) * decoder.hidden, sum(form.products.bytes(n, decoder.hidden) for n in rows)

    def _read_once(self, use: str, arithmetic: str, matrices: Sequence[Matrix], form: MatrixForm) -> Weighed:
        one = sum(self.bytes(m, form) for m in matrices)
        held = sum(int(self.copies * self.bytes(m, form) * self.form.of(m, form).packed) for m in matrices)
        if self.copies > 1:
            arithmetic = f"{self.copies} copies × ({arithmetic})"
        numbers = self.copies * sum(m.numbers for m in matrices)
        return Weighed(use, arithmetic, numbers, self.copies * one, held, one)

    def parts(self) -> Iterator[PartPlan]:
        """As many layers in each as fit, those before the limit."""
        form, held = self.form, self.held
        if not form.part_bytes:
            return
        last = len(self.decoder.layers) - 1
        layers = [0] * (last + 1)
        for m, of in self.products:
            layers[m.layer] += self.bytes(m, of)
        layers[last] += sum(self.bytes(m, form.vocabulary) for m in held.vocabulary)
        part = PartPlan(0, 0, False, 0)
        for layer, count in enumerate(layers):
            if count > form.part_bytes:
                raise DoesNotFit(
                    f"Layer {layer} takes {exact(count)} as {form.name}, and one part of a {form.format} variant has "
                    f"at most {exact(form.part_bytes)} of weights",
                    "Use a precision with fewer bits, or another format",
                )
            if part.bytes + count > form.part_bytes:
                yield part
                part = PartPlan(layer, layer, False, 0)
            part = replace(part, end=layer + 1, bytes=part.bytes + count)
        yield replace(part, vocabulary=True)

    def files(self, weights: Sequence[Weighed], parts: Sequence[PartPlan]) -> dict[str, int]:
        form, total = self.form, sum(w.bytes for w in weights)
        if form.format == "qnn":
            folder = f"qnn-{self.device.id.removeprefix(PREFIX)}"
            found = {f"{folder}/part{i}": self.copies * part.bytes for i, part in enumerate(parts)}
            table = sum(w.bytes for w in weights if w.use == "embedding")
            found[f"{folder}/part{len(parts) - 1}"] += total - table - sum(found.values())
            return found | ({"shared/embedding.bin": table} if table else {})
        if form.format == "onnx":
            return {"onnx/model.onnx.data": total}
        return {form.format: total}

    # contexts ---------------------------------------------------------------------------------------------------------
    def at(self, context: int, weights: Sequence[Weighed]) -> AtContext:
        form, decoder = self.form, self.decoder
        cache = decoder.cache_bytes(context, form.cache)
        seen = cache
        if not form.static:
            numbers = sum(layer.elements * min(context, layer.sliding_window or context) for layer in decoder.layers)
            seen = int(numbers * form.cache)
        read = sum(w.read for w in weights) + seen
        peak = sum(w.held for w in weights) + cache + self.workspace(context)
        bound = None if self.memory is None else self.memory.bytes_per_second / read
        return AtContext(context, cache, peak, read, bound)

    def workspace(self, context: int) -> int:
        """Of a prefill chunk: some rows of activations for each token, the scores of a layer, and logits. float32."""
        decoder, chunk = self.decoder, min(self.form.chunk, context)
        heads = max(layer.q_heads for layer in decoder.layers)
        scores = heads * chunk * (context + chunk) if self.form.static else 0
        logits = (chunk if self.form.every_logit else 8) * decoder.vocabulary
        return 4 * (self.form.activations * chunk * decoder.hidden + scores + logits)

    @property
    def kept(self) -> int:
        return sum(self.form.keeps(m) is not None for m in (*self.held.products, *self.held.vocabulary))

    def notes(self) -> Iterator[str]:
        form = self.form
        if self.kept:
            yield f"{self.kept} matrices are in integer blocks and stay so, scales and minimums of 4 bytes each"
        if form.static:
            yield "a step reads all places of the cache, filled or not, so the context that is built in costs speed"
        elif any(layer.sliding_window for layer in self.decoder.layers):
            yield "of layers with a sliding window the keys in it are read, and all are kept"
        if self.copies > 1:
            yield f"{self.device.arch} cannot share weights between graphs: prefill and decoding have each their own"
        elif form.format == "qnn" and form.shares_all:
            most = exact(self.half_of_attention()[1])
            yield f"prefill and decoding may keep up to half of attention's products twice: up to {most} more"
        if form.embedding_mapped:
            yield "of the table of embeddings the rows of a text are read from its file; it needs no memory of its own"
        if any(w.held > w.bytes for w in self.weights()):
            yield (
                "the engine packs integer matrices anew, into 1.2 to 1.25 times as much as the file has of them (as on "
                "x86-64); pages of the file that it has read can be given back"
            )
        yield "the app itself and the libraries of the engine need memory besides"


def context_lengths(context: int) -> tuple[int, ...]:
    """512, 1024, 2048, … as far as `context`, which is the last one."""
    found = []
    tokens = FIRST_CONTEXT
    while tokens < context:
        found.append(tokens)
        tokens *= 2
    return (*found, context)


def exact(count: int) -> str:
    """Bytes with one digit more than `size` has, since plans are compared: `3.86 GB`, `131.6 MB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}" if name == "GB" else f"{count / unit:.1f} {name}"
    return size(count)


def _count(numbers: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if numbers >= unit:
            return f"{numbers / unit:.3f} {name}"
    return f"{numbers}"


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def _layers(products: Sequence[Matrix]) -> str:
    """`32 layers × (4 × 4096×4096 + 2 × 11008×4096 + 4096×11008)`; layers that are alike are one term."""
    by_layer: dict[int, Counter[tuple[int, int]]] = {}
    for matrix in products:
        by_layer.setdefault(matrix.layer, Counter())[matrix.shape] += 1
    kinds = Counter(tuple(sorted(shapes.items())) for shapes in by_layer.values())
    terms = []
    for shapes, layers in kinds.items():
        inner = " + ".join(f"{n} × {_shape(shape)}" if n > 1 else _shape(shape) for shape, n in shapes)
        terms.append(f"{layers} layers × ({inner})" if layers > 1 else f"({inner})")
    return " + ".join(terms) or "0"
