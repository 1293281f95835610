"""Which models fit a phone, in which form, and how fast they could be at most: shapes × forms, without a phone.

    python benchmarks/phone_plan.py                                 # the goal: 3.2 GB and 4.5 tokens/s at 2048 tokens
    python benchmarks/phone_plan.py --target snapdragon-8-elite --context 4096 --shapes 3B 7B --out plan.json

The shapes are those of `shaped.py`; no weight is created. `int4` and `int8` are what an export writes for the Hexagon,
and "onnx, int4" for the CPU. The other forms are only calculated: all products in 4 bits, with scales for blocks of 32,
64 or 128 numbers or for a row; the last form, the smallest possible in 4 bits, includes vocabulary matrix and cache.
Bytes of weights are those in memory: the Hexagon's variants have their embeddings in a mapped file, unless the table
says that they are in memory. Speeds are upper bounds from the bandwidth of memory. Below are published figures, each as
a share of the bound of `int4` at its context.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from parts.results import Row, add_out, finish, result
from shaped import decoder
from tables_parts.plans import LEAST, needed, published, sizes

from transom.bundles.inventory import inventory
from transom.bundles.weighing import plan_variants
from transom.contract import Device
from transom.contract_optional import MatrixForm, StorageForm
from transom.graph import Graph
from transom.hardware import catalogue
from transom.hardware.catalogue import PREFIX
from transom_mobile_export.onnx import storage as onnx
from transom_mobile_export.published import published as published_speeds
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
        LEAST: replace(least, cache=0.5),
        "int8": int8,
        "onnx, int4": replace(onnx.FORMS["int4"], shares_table=tied),
    }


@dataclass(frozen=True)
class PlanRow:
    """One model in one form."""

    model: str
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
        yield PlanRow(NAMES[shape], name, max(1, len(variant.parts)), variant.weight_bytes, last.cache, last.bound)


def published_rows(graph: Graph, devices: dict[str, Device]) -> Iterator[Row]:
    """Published figures for a shape, and the bound of `int4` at their context; 2048 tokens if none is stated."""
    assert graph.decoder is not None
    for figure in published_speeds(graph.decoder):
        context = min(figure.context or 2048, graph.decoder.context)
        form = qnn.on_chip(qnn.FORMS["int4"], devices[figure.target])
        plan = plan_variants(graph, graph.decoder, devices[figure.target], [form], context)
        yield {
            "model": figure.model, "target": figure.target, "measured_on": figure.device, "context": context,
            "speed": figure.tokens_per_second, "source": figure.source, "bound": plan.variants[0].at[-1].bound,
        }  # fmt: skip


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
    add_out(parser)
    options = parser.parse_args()
    device = phones[options.target]
    told: list[PlanRow] = []
    products: list[Row] = []
    known: list[Row] = []
    print(f"{device.name}, {options.context} tokens; GB are 1e9 bytes. Bounds, not measurements.")
    for shape in options.shapes:
        graph = decoder(shape, max(options.context, 4096))
        found = list(rows(shape, graph, device, options.context))
        told += found
        products.append({"model": NAMES[shape], "numbers": sum(m.numbers for m in inventory(graph).products)})
        known += published_rows(graph, phones)
        print(f"\n{NAMES[shape]}\n{table(found, options.goal, options.least)}")
        if options.explain:
            assert graph.decoder is not None
            form = qnn.on_chip(qnn.FORMS["int4"], device)
            print(replace(plan_variants(graph, graph.decoder, device, [form], options.context), model=NAMES[shape]))
    made = result({
        "goal": [{"gigabytes": options.goal, "least": options.least}],
        "forms": [asdict(row) for row in told], "products": products, "published": known,
    })  # fmt: skip
    finish(made, options.out, [*sizes([made]), "", *needed([made]), "", *published([made])])


if __name__ == "__main__":
    main()
