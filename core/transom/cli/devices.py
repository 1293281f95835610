"""`transom devices`: the devices found by the probe, as a table."""

from __future__ import annotations

import sys

import click

from transom.cli.options import JSON, PROBE_FILE
from transom.cli.output import print_json, table, wrapped


@click.command(
    epilog="""\b
Examples:
  transom devices
  transom devices --all
  transom devices --probe-file support-case.json
"""
)
@click.option(
    "--all", "everything", is_flag=True, help="Also list targets that can be compiled for but are not in this machine."
)
@PROBE_FILE
@JSON
def devices(everything: bool, probe_file: str | None, as_json: bool) -> None:
    """List the devices of this machine and the targets to compile for."""
    from pathlib import Path

    from transom import hardware
    from transom.hardware.catalogue import PREFIX
    from transom.hardware.probe_file import to_json
    from transom.preparation.memory import size

    found = hardware.probe(Path(probe_file) if probe_file else None)
    remote = [d for d in hardware.catalogue() if d.id not in {x.id for x in found.devices}]
    shown = [*found.devices, *(remote if everything else ())]
    if as_json:
        print_json({**to_json(shown), "notes": list(found.notes)})
        return
    rows = [
        (
            d.id.removeprefix(PREFIX),  # as --device and --target take it
            d.name,
            d.arch,
            str(d.cores or ""),
            size(d.memory_bytes) if d.memory_bytes else "",
            "" if d.free_bytes is None else size(d.free_bytes),
            " ".join(sorted(d.features)) if len(d.features) < 9 else f"{len(d.features)}: " + _telling(d.features),
        )
        for d in shown
    ]
    table(("id", "name", "architecture", "cores", "memory", "free", "features"), rows, right=(3, 4, 5), spare=(6,))
    for note in found.notes:
        click.echo(wrapped(f"Note: {note}", sys.stdout))
    if not everything:
        click.echo(f"\n{len(remote)} more targets can be compiled for: transom devices --all")


def _telling(features: frozenset[str]) -> str:
    """The features that decide which code runs, out of the hundred of a CPU."""
    known = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
    also = ("avx_vnni", "neon", "asimd", "i8mm", "bf16", "sve")
    return " ".join(f for f in (*known, *also) if f in features) + " …"
