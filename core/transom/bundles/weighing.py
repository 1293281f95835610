"""Planning an export: the size of a decoder as a backend would store it, computed from shapes before compiling.

A decoder generates one token after another, and for each token it reads its matrices once and the filled part of the
cache. So the memory bandwidth divided by these bytes bounds its speed. This is an upper bound, not a forecast of what a
device achieves. No weight is read: a plan takes one pass over the graph's nodes.

The backend defines how its format stores a model (`transom.contract_optional.PlanningBackend`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from transom.bundles.inventory import Inventory, Matrix, inventory
from transom.bundles.plan import AtContext, ExportPlan, PartPlan, VariantPlan, Weighed, exact
from transom.contract import Backend, Device
from transom.contract_optional import MatrixForm, PlanningBackend, StorageForm
from transom.errors import DoesNotFit, OptionError, option
from transom.graph import Graph
from transom.hardware.bandwidth import Bandwidth, bandwidth
from transom.hardware.catalogue import PREFIX
from transom.preparation.memory import CHUNK, require_context, size, weight_bytes
from transom.preparation.plugin_calls import guarded
from transom.signature import Decoder

FIRST_CONTEXT = 512
"""The shortest context of the table, in tokens. Each further context is twice the one before."""


def form_of(backend: Backend, precision: str, decoder: Decoder, device: Device) -> StorageForm:
    """How a backend stores a decoder. For a backend that is not a `PlanningBackend`, the estimate of `memory`.

    Raises:
        OptionError: the format does not support the precision, or not on this device.
    """
    if isinstance(backend, PlanningBackend):
        return guarded(backend.name, "planning", lambda: backend.storage_form(decoder, device, precision))
    form = MatrixForm(8 * weight_bytes(decoder, precision) / max(decoder.parameters, 1))
    cache = 4 if precision in ("f32", "exact") else 2
    return StorageForm(backend.name, precision, form, form, form, rest=4, cache=cache, chunk=CHUNK, shares_table=True)


def plan_variants(
    graph: Graph, decoder: Decoder, device: Device, forms: Sequence[StorageForm], context: int | None = None
) -> ExportPlan:
    """Plan the variants of a bundle.

    Args:
        graph: the neutral graph; only its shapes are used.
        forms: the storage form of each variant, from a backend (`form_of`) or made by the caller.
        context: the most tokens of a sequence; None: the model's own context.

    Raises:
        OptionError: the context is longer than the model's, or a format cannot store a matrix in the precision.
        DoesNotFit: one layer is larger than a compiled part may be.
    """
    require_context(decoder, context)
    tokens = context or decoder.context
    held, memory = inventory(graph), bandwidth(device)
    plans = tuple(_Planning(form, held, decoder, device, memory).plan(tokens) for form in forms)
    published = tuple(dict.fromkeys(figure for form in forms for figure in form.published))
    return ExportPlan(graph.name, device, tokens, memory, plans, published)


class _Planning:
    """Plans one decoder in one storage form."""

    def __init__(
        self, form: StorageForm, held: Inventory, decoder: Decoder, device: Device, memory: Bandwidth | None
    ) -> None:
        self.form, self.held, self.decoder, self.device, self.memory = form, held, decoder, device, memory
        most = form.small_share * sum(m.numbers for m in held.products) / len(decoder.layers)
        small = form.small or form.products
        self.products = [(m, small if m.numbers <= most else form.products) for m in held.products]
        """Each matrix with its form."""

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
                "embedding", _shape(table.shape), table.numbers, count, 0 if form.mapped_table else count, row
            )
        count = held.rest * form.rest
        yield Weighed("other", "norms and biases", held.rest, count, count, count)
        if form.attention_twice == "half":
            numbers, count = self.half_of_attention()
            yield Weighed("twice", "half of attention, for the other graph", numbers, count, count, 0)
        if form.layer:
            layers = len(self.decoder.layers)
            count = layers * form.layer
            yield Weighed("code", f"{layers} layers × {size(form.layer)}", 0, count, count, count // 2)

    def bytes(self, matrix: Matrix, form: MatrixForm) -> int:
        """Bytes of a matrix, where plain matrices have `form`."""
        return self.form_of(matrix, form).bytes(*matrix.shape)

    def form_of(self, matrix: Matrix, form: MatrixForm) -> MatrixForm:
        """The form of a matrix, where plain matrices have `form`. Raises OptionError if the format cannot store it."""
        own = self.form
        if own.kept is not None and matrix.stored is not None:
            form = own.kept.form(matrix.stored) or own.kept.other
        if not form.block or matrix.columns % form.block == 0:
            return form
        if own.ragged is not None:
            return own.ragged
        raise OptionError(
            f"{own.format} with {option('precision', own.precision)} quantizes blocks of {form.block} columns, "
            "and a matrix has "
            f"{matrix.columns}",
            f"Use {option('precision', own.instead)}" if own.instead else "Use another precision, or another format",
        )

    def half_of_attention(self) -> tuple[int, int]:
        """Numbers and bytes of half of attention's products: in each layer a matrix of queries and one of keys."""
        decoder, form = self.decoder, self.form
        rows = [heads * layer.head_dim for layer in decoder.layers for heads in (layer.q_heads, layer.kv_heads)]
        return sum(rows) * decoder.hidden, sum(form.products.bytes(n, decoder.hidden) for n in rows)

    def _read_once(self, use: str, arithmetic: str, matrices: Sequence[Matrix], form: MatrixForm) -> Weighed:
        one = sum(self.bytes(m, form) for m in matrices)
        held = sum(int(self.form.copies * self.bytes(m, form) * self.form_of(m, form).packed) for m in matrices)
        if self.form.copies > 1:
            arithmetic = f"{self.form.copies} copies × ({arithmetic})"
        numbers = self.form.copies * sum(m.numbers for m in matrices)
        return Weighed(use, arithmetic, numbers, self.form.copies * one, held, one)

    def parts(self) -> Iterator[PartPlan]:
        """Split the layers into parts in order, as many layers in each part as the limit allows."""
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
        form, target = self.form, self.device.id.removeprefix(PREFIX)
        names = [(form.file or form.format).format(target=target, part=i) for i in range(max(1, len(parts)))]
        found = {name: form.copies * part.bytes for name, part in zip(names, parts, strict=False)}
        table = sum(w.bytes for w in weights if w.use == "embedding") if form.mapped_table else 0
        found[names[-1]] = found.get(names[-1], 0) + sum(w.bytes for w in weights) - table - sum(found.values())
        return found | ({form.mapped_table: table} if table else {})

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
        """Bytes of a prefill chunk in float32: rows of activations per token, the scores of a layer, and the logits."""
        decoder, chunk = self.decoder, min(self.form.chunk, context)
        heads = max(layer.q_heads for layer in decoder.layers)
        scores = heads * chunk * (context + chunk) if self.form.static else 0
        logits = (chunk if self.form.every_logit else 8) * decoder.vocabulary
        return 4 * (self.form.activations * chunk * decoder.hidden + scores + logits)

    @property
    def kept(self) -> int:
        kept = self.form.kept
        stored = [m.stored for m in (*self.held.products, *self.held.vocabulary) if m.stored is not None]
        return 0 if kept is None else sum(kept.form(blocks) is not None for blocks in stored)

    def notes(self) -> Iterator[str]:
        form = self.form
        if self.kept:
            note = f", {form.kept.note}" if form.kept is not None and form.kept.note else ""
            yield f"{self.kept} matrices keep the checkpoint's integer blocks{note}"
        if form.static:
            yield "a step reads the whole cache, filled or not, so a longer built-in context is slower"
        elif any(layer.sliding_window for layer in self.decoder.layers):
            yield "layers with a sliding window read only the keys in the window, but the cache keeps all keys"
        if form.copies > 1:
            yield f"{self.device.arch} cannot share weights between graphs: prefill and decoding have a copy each"
        elif form.attention_twice == "up to half":
            most = exact(self.half_of_attention()[1])
            yield f"prefill and decoding may store up to half of attention's products twice: up to {most} more"
        if form.mapped_table:
            yield "the embedding table is read row by row from its mapped file and needs no memory of its own"
        if any(w.held > w.bytes for w in self.weights()):
            yield (
                "the engine repacks integer matrices into 1.2 to 1.25 times their size in the file (as on x86-64); the "
                "operating system can reclaim the pages of the file afterwards"
            )
        yield "the app itself and the engine's libraries need additional memory"


def context_lengths(context: int) -> tuple[int, ...]:
    """The contexts of the table: 512, 1024, 2048, … below `context`, and `context` itself."""
    found = []
    tokens = FIRST_CONTEXT
    while tokens < context:
        found.append(tokens)
        tokens *= 2
    return (*found, context)


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def _layers(products: Sequence[Matrix]) -> str:
    """`32 layers × (4 × 4096×4096 + 2 × 11008×4096 + 4096×11008)`: one term for all equal layers."""
    by_layer: dict[int, Counter[tuple[int, int]]] = {}
    for matrix in products:
        by_layer.setdefault(matrix.layer, Counter())[matrix.shape] += 1
    kinds = Counter(tuple(sorted(shapes.items())) for shapes in by_layer.values())
    terms = []
    for shapes, layers in kinds.items():
        inner = " + ".join(f"{n} × {_shape(shape)}" if n > 1 else _shape(shape) for shape, n in shapes)
        terms.append(f"{layers} layers × ({inner})" if layers > 1 else f"({inner})")
    return " + ".join(terms) or "0"
