"""`transom inspect`: a model's architecture, tensors, and the memory it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from transom.cli.options import JSON, MODEL, OFFLINE, located_model
from transom.cli.output import ProgressLine, heading, print_json, table

if TYPE_CHECKING:
    from transom.cli.inspection import Inspection, TypeTotals


@click.command(
    epilog="""\b
Examples:
  transom inspect model.gguf
  transom inspect path/to/checkpoint
  transom inspect encoder.onnx
  transom inspect model.gguf --json | jq .memory
"""
)
@MODEL
@OFFLINE
@JSON
def inspect(model: str, offline: bool, as_json: bool) -> None:
    """Show a model's architecture, sizes, quantization and memory.

    Reads headers only, no weights, and compiles nothing.
    """
    from transom.cli.inspection import inspect_model

    with ProgressLine(stage="read") as progress:
        found = inspect_model(located_model(model, offline, progress), progress)
    if as_json:
        print_json(found.to_dict())
        return
    heading(found.name)
    if found.cannot_load:
        click.echo(f"  Cannot be loaded: {found.cannot_load}")
    _facts(_summary(found))
    if found.stored:
        _kinds("Tensors in the file", found.stored)
    if found.kept and {k.type for k in found.stored} != {k.type for k in found.kept}:
        _kinds("Weights as backends see them", found.kept)
    if found.decoder is not None:
        _memory(found)
    elif not found.cannot_load:
        _plain_graph(found)
    if found.notes:
        click.echo()
        heading("Notes")
        for note in found.notes:
            click.echo(f"  {note}")


def _facts(facts: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        if value:
            click.echo(f"  {name:<{width}}{value}")


def _summary(found: Inspection) -> list[tuple[str, str]]:
    from transom.preparation.memory import size

    file = found.path + ("" if found.file_bytes is None else f" ({size(found.file_bytes)})")
    bits = 8 * found.weight_bytes / found.parameters if found.parameters else 0
    facts = [
        ("source", f"{found.source}, {file}"),
        ("architecture", found.architecture),
        ("parameters", f"{_count(found.parameters)} ({found.parameters})"),
        ("weights", f"{size(found.weight_bytes)}, {bits:.2f} bits each"),
    ]
    if (d := found.decoder) is not None:
        facts += [
            ("family", d.family),
            ("layers", _layers(found)),
            ("hidden size", str(d.hidden)),
            ("vocabulary", str(d.vocabulary)),
            ("context", f"{d.context} tokens"),
        ]
        facts += _text(found)
    elif found.cannot_load:
        facts += [(what, f"{size} tokens" if what == "context" else str(size)) for what, size in found.sizes.items()]
        facts += _text(found)
    return facts


def _layers(found: Inspection) -> str:
    assert found.decoder is not None
    layers = found.decoder.layers
    if not layers:
        return "none"
    first = layers[0]
    heads = f"{first.q_heads} heads of {first.head_dim}, {first.kv_heads} for keys and values"
    if len({(x.q_heads, x.kv_heads, x.head_dim, x.value_dim) for x in layers}) > 1:
        heads += " (the first; they differ)"
    windows = sorted({x.sliding_window for x in layers if x.sliding_window})
    if windows:
        count = sum(bool(x.sliding_window) for x in layers)
        heads += f"; {count} see the last {', '.join(map(str, windows))} tokens only"
    return f"{len(layers)}, each {heads}"


def _text(found: Inspection) -> list[tuple[str, str]]:
    tokenizer = found.tokenizer
    if tokenizer is None:
        return [("tokenizer", "none"), ("chat template", _templates(found))]
    roles = [f"{role} {entry['token']} ({entry['id']})" for role, entry in tokenizer["roles"].items()]
    special = list(tokenizer["special_tokens"].values())
    shown = " ".join(special[:8]) + (f" and {len(special) - 8} more" if len(special) > 8 else "")
    ends = [f"{tokenizer['special_tokens'].get(str(i), '')} ({i})".strip() for i in found.defaults.get("eos_ids", ())]
    sampling = {k: v for k, v in found.defaults.items() if k not in ("eos_ids", "bos_id", "pad_id", "suppress_ids")}
    return [
        ("tokenizer", f"{tokenizer['kind']}, {tokenizer['vocabulary']} tokens"),
        ("special tokens", shown),
        ("roles", ", ".join(roles)),
        ("text ends at", ", ".join(ends)),
        ("sampling", ", ".join(f"{k} {v}" for k, v in sampling.items())),
        ("chat template", _templates(found)),
    ]


def _templates(found: Inspection) -> str:
    if not found.templates:
        return "no"
    return "yes" if found.templates == ("default",) else f"yes: {', '.join(found.templates)}"


def _kinds(title: str, kinds: Sequence[TypeTotals]) -> None:
    from transom.preparation.memory import size

    click.echo()
    heading(title)
    total = sum(k.bytes for k in kinds) or 1
    rows = [
        (f"  {k.type}", str(k.tensors), _count(k.parameters), size(k.bytes), f"{k.bytes / total:.0%}") for k in kinds
    ]
    table(("  type", "tensors", "parameters", "size", "share"), rows, right=(1, 2, 3, 4))


def _memory(found: Inspection) -> None:
    from transom.preparation.memory import size

    click.echo()
    heading("Memory for one sequence, without working space")
    rows = [
        (f"  {r.context}", size(r.cache_f16), size(r.total_f16), size(r.cache_f32), size(r.total_f32))
        for r in found.memory
    ]
    headers = ("  tokens", "cache f16", "with weights", "cache f32", "with weights")
    table(headers, rows, right=(0, 1, 2, 3, 4))


def _plain_graph(found: Inspection) -> None:
    for title, values in (("Inputs", found.inputs), ("Outputs", found.outputs)):
        click.echo()
        heading(title)
        _facts([(name, kind) for name, kind in values.items()])
    click.echo()
    heading("Operators")
    table(("  operator", "nodes"), [(f"  {name}", str(count)) for name, count in found.operators.items()], right=(1,))


def _count(number: int) -> str:
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)
