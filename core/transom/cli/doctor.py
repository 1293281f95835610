"""`transom doctor`: what works on this machine, what does not, and the command that fixes it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from transom.cli.options import JSON, PROBE_FILE
from transom.cli.output import ProgressLine, heading, print_json, wrapped

if TYPE_CHECKING:
    from transom.cli.diagnosis import Diagnosis

_MARKS = {"works": ("ok", "green"), "fails": ("FAILS", "red"), "not tried": ("?", "yellow")}


@click.command(
    epilog="""\b
Examples:
  transom doctor
  transom doctor --json > support-case.json
  transom devices --probe-file support-case.json

The exit status is 0 even if some device does not work, and 2 if no model can run at all.
"""
)
@PROBE_FILE
@JSON
def doctor(probe_file: str | None, as_json: bool) -> int:
    """Run a tiny model on each device and report what works.

    Each backend that makes an offer for a device compiles, loads and runs a tiny random decoder there in a child
    process. Its output is compared with that of the reference.
    """
    from pathlib import Path

    from transom.cli.diagnosis import diagnose

    with ProgressLine(stage="Trying each device") as progress:
        found = diagnose(
            Path(probe_file) if probe_file else None, lambda stage, share: progress("Trying each device", None)
        )
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)
    return 0 if found.works else 2


def _print(found: Diagnosis) -> None:
    from transom.preparation.memory import size

    system, packages = found.system, found.packages
    heading(f"Transom {packages.get('transom', '')}")
    click.echo(f"  Python {system['python']}, {system['platform']}")
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if name != "transom")
    click.echo(wrapped(versions, sys.stdout, "  "))

    heading("\nDevices" + ("" if found.source == "this machine" else f" in {found.source}"))
    for d in found.devices:
        cores = f", {d.cores} cores" if d.cores else ""
        free = "" if d.free_bytes is None else f", {size(d.free_bytes)} free"
        click.echo(f"  {d.id:<8} {d.name or d.arch}{cores}, {size(d.memory_bytes)}{free}")
    for note in found.notes:
        click.echo(wrapped(note, sys.stdout, "  "))

    heading("\nBackends")
    width = max([len(f"{t.backend} on {t.device}") for t in found.trials], default=0)
    for trial in found.trials:
        mark, color = _MARKS[trial.outcome]
        who = f"{trial.backend} on {trial.device}"
        took = f" ({trial.seconds:.1f} s)" if trial.seconds else ""
        click.echo(f"  {click.style(f'{mark:<5}', fg=color)} {who:<{width}}  {trial.says}{took}")
        for line in [line for line in trial.details if line.strip()][:4]:  # all of them are in the JSON
            click.secho(wrapped(line, sys.stdout, "        "), dim=True)
    if not found.trials:
        click.echo("  none can run on any of these devices")
    for name, refusal in found.refusals:
        fix = f" ({refusal.fix})" if refusal.fix else ""
        click.echo(wrapped(f"{'-':<5} {name} on {refusal.device_id}: {refusal.reason}{fix}", sys.stdout, "  "))
    for failure in found.failures:
        click.echo(f"  {click.style('BROKEN', fg='red')} {failure}")

    heading("\nCache")
    cache = found.cache
    if problem := cache.get("problem"):
        click.echo(f"  {click.style('FAILS', fg='red')} {problem}")
    if "bytes" in cache:
        limit = "no limit" if cache["limit_bytes"] is None else f"limit {size(cache['limit_bytes'])}"
        free = "" if cache["free_bytes"] is None else f", {size(cache['free_bytes'])} free on the disk"
        click.echo(f"  {cache['root']}: {size(cache['bytes'])}, {limit}{free}")

    if found.missing:
        heading("\nNot installed, and needed only for")
        for extra, what in found.missing.items():
            click.echo(f"  {what}: pip install 'transom[{extra}]'")

    if fixes := found.fixes():
        heading("\nTo fix")
        for fix in fixes:
            click.echo(f"  {fix}")
    elif found.source != "this machine":
        heading("\nNothing was tried: the devices come from a file")
    else:
        heading("\nEverything works")
        click.echo('  transom run MODEL "Hello"')
