"""Which models fit a phone, in which form, and how fast they could be at most: shapes × forms, without a phone.

    python benchmarks/phone_plan.py                                 # the goal: 3.2 GB and 4.5 tokens/s at 2048 tokens
    python benchmarks/phone_plan.py --target snapdragon-8-elite --context 4096 --shapes 3B 7B --json plan.json

The shapes are those of `shaped.py`; no weight is created. `int4` and `int8` are what an export writes for the Hexagon,
and "onnx, int4" for the CPU. The other forms are only calculated: all products in 4 bits, with scales for blocks of 32,
64 or 128 numbers or for a row; the last form, the smallest possible in 4 bits, includes vocabulary matrix and cache.
Bytes of weights are those in memory: the Hexagon's variants have their embeddings in a mapped file, unless the table
says that they are in memory. Speeds are upper bounds from the bandwidth of memory. Below are published figures, each as
a share of the bound of `int4` at its context.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shaped import decoder

from transom.bundles.inventory import inventory
from transom.bundles.weighing import plan_variants
from transom.contract import Device
from transom.contract_optional import MatrixForm, StorageForm
from transom.graph import Graph
from transom.hardware import catalogue
from transom.hardware.catalogue import PREFIX
from transom_mobile_export.onnx import storage as onnx
from transom_mobile_export.published import published
from transom_mobile_export.qnn import storage as qnn

GIB = 1 << 30
NAMES = {
    "1B": "Llama 3.2 1B", "3B": "Llama 3.2 3B", "6B-grouped": "Yi-6B", "7B": "Llama 2 7B",
    "7B-grouped": "Mistral 7B", "7B-wide": "Qwen2.5 7B", "8B": "Llama 3.1 8B",
}  # fmt: skip

TIED = ("1B", "3B")
"""Models with tied embeddings, as all models of `shaped.py` have."""


def forms(tied: bool, device: Device) -> dict[str, StorageForm]:
    """Storage forms by their names in the table.

    Args:
        tied: whether the vocabulary matrix is the table of embeddings.
    """
    int4, int8 = (qnn.on_chip(qnn.FORMS[name], device) for name in ("int4", "int8"))
    row = int8.products.row
    all4 = {name: replace(int4, products=form, small=None) for name, form in {
        **{f"4 bit, blocks of {n}": MatrixForm(4, n, 2, row) for n in (32, 64, 128)},
        "4 bit, by rows": MatrixForm(4, row=row),
    }.items()}  # fmt: skip
    rows = all4["4 bit, by rows"]
    least = replace(rows, vocabulary=rows.products)
    return {
        "int4": int4,
        "int4, cache of 16 bit": replace(int4, cache=2),
        "int4, embeddings in memory": replace(int4, mapped_table=""),
        **all4,
        "4 bit, by rows, vocabulary too": least,
        "4 bit, by rows, vocabulary and cache too": replace(least, cache=0.5),
        "int8": int8,
        "onnx, int4": replace(onnx.FORMS["int4"], shares_table=tied),
    }


@dataclass(frozen=True)
class PlanRow:
    """One shape in one form."""

    shape: str
    form: str
    parts: int
    weights: int
    cache: int
    bound: float
    """Tokens per second."""

    @property
    def total(self) -> int:
        return self.weights + self.cache

    def cells(self, goal: float, least: float) -> tuple[str, ...]:
        sizes = [f"{n / 1e9:.2f}" for n in (self.weights, self.cache, self.total)]
        fits = {"GB": goal * 1e9, "GiB": goal * GIB}
        meets = [
            " ".join(unit for unit, most in fits.items() if count <= most) or "no"
            for count in (self.total, self.weights)
        ]
        bound = f"{self.bound:.1f}{'' if self.bound > least else ' (too slow)'}"
        return (self.form, str(self.parts), *sizes, f"{self.total / GIB:.2f}", *meets, bound)


HEAD = ("form", "parts", "weights GB", "cache GB", "both GB", "both GiB", "both fit", "weights fit", "bound tokens/s")


def rows(shape: str, graph: Graph, device: Device, context: int) -> Iterator[PlanRow]:
    assert graph.decoder is not None
    named = forms(shape in TIED, device)
    plan = plan_variants(graph, graph.decoder, device, list(named.values()), context)
    for name, variant in zip(named, plan.variants, strict=True):
        last = variant.at[-1]
        assert last.bound is not None
        yield PlanRow(shape, name, max(1, len(variant.parts)), variant.weight_bytes, last.cache, last.bound)


def verdict(found: list[PlanRow], graph: Graph, goal: float, context: int) -> Iterator[str]:
    """Which forms meet the goal, by unit, or why none can."""
    held = inventory(graph)
    numbers = sum(m.numbers for m in held.products)
    least = min(found, key=lambda row: row.total)
    rest = least.total - numbers // 2
    for unit, size in (("GB", 10**9), ("GiB", GIB)):
        best = [row.form for row in found if row.total <= goal * size]
        if best:
            yield f"Within {goal:g} {unit} with its cache of {context} tokens: {'; '.join(best)}."
            continue
        yield (
            f"No form is within {goal:g} {unit} with its cache of {context} tokens: {numbers / 1e9:.3f} billion "
            f"numbers of products at 4 bits and no scales are {numbers / 2 / size:.2f} {unit}, and the least of the "
            f"rest is {rest / size:.2f} {unit}. The products would have to take "
            f"{(goal * size - rest) * 8 / numbers:.2f} bits a number."
        )


def figures(graph: Graph, devices: dict[str, Device]) -> Iterator[str]:
    """Published figures for a shape, as shares of the bound of `int4` at their context; 2048 if none is stated."""
    assert graph.decoder is not None
    for figure in published(graph.decoder):
        context = min(figure.context or 2048, graph.decoder.context)
        form = qnn.on_chip(qnn.FORMS["int4"], devices[figure.target])
        plan = plan_variants(graph, graph.decoder, devices[figure.target], [form], context)
        bound = plan.variants[0].at[-1].bound
        assert bound is not None
        share = figure.tokens_per_second / bound
        yield f"  {figure}\n    {share:.0%} of a bound of {bound:.1f} ({figure.target}, {form.name}, {context} tokens)"


def table(found: list[PlanRow], goal: float, least: float) -> str:
    lines = [HEAD, *(row.cells(goal, least) for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    phones = {d.id.removeprefix(PREFIX): d for d in catalogue() if d.arch.startswith("hexagon")}
    parser.add_argument("--target", choices=sorted(phones), default="snapdragon-8-gen-2")
    parser.add_argument("--shapes", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--context", type=int, default=2048, help="tokens")
    parser.add_argument("--goal", type=float, default=3.2, help="limit for weights and cache, in GB and in GiB")
    parser.add_argument("--least", type=float, default=4.5, help="tokens/s that the bound must exceed")
    parser.add_argument("--explain", action="store_true", help="show the arithmetic of each shape's int4 form")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    device = phones[options.target]
    told: list[PlanRow] = []
    print(f"{device.name}, {options.context} tokens; GB are 1e9 bytes. Bounds, not measurements.")
    for shape in options.shapes:
        graph = decoder(shape, max(options.context, 4096))
        found = list(rows(shape, graph, device, options.context))
        told += found
        print(f"\n{NAMES[shape]}\n{table(found, options.goal, options.least)}")
        print(*verdict(found, graph, options.goal, options.context), sep="\n")
        if options.explain:
            assert graph.decoder is not None
            form = qnn.on_chip(qnn.FORMS["int4"], device)
            print(replace(plan_variants(graph, graph.decoder, device, [form], options.context), model=NAMES[shape]))
        known = list(figures(graph, phones))
        if known:
            print("Published, not measured by us:", *known, sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in told], indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
