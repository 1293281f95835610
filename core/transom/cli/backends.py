"""`transom backends`: installed backends, those that failed to load, and how to fix them."""

from __future__ import annotations

import sys

import click

from transom.cli.options import JSON, PROBE_FILE
from transom.cli.output import print_json, table, wrapped


@click.command(
    epilog="""\b
Examples:
  transom backends
  transom backends --json
"""
)
@PROBE_FILE
@JSON
def backends(probe_file: str | None, as_json: bool) -> None:
    """List installed backends, those that failed to load, and how to fix them."""
    from transom.api import backends as installed
    from transom.contract import Offer

    found = installed(probe_file)
    if as_json:
        print_json(found.to_dict())
        return
    rows = []
    for b in found.installed:
        for i, answer in enumerate(b.answers or (None,)):
            name = (b.name, f"{b.distribution} {b.version}") if i == 0 else ("", "")
            if answer is None:
                rows.append((*name, "", "", "no device"))
            elif isinstance(answer, Offer):
                rows.append((*name, answer.device_id, answer.band, answer.why))
            else:
                rows.append((*name, answer.device_id, "no", answer.reason + (f" ({answer.fix})" if answer.fix else "")))
    table(("backend", "package", "device", "band", "reason"), rows)
    for failure in found.failures:
        click.echo("\n" + wrapped(f"Broken: {failure}", sys.stdout))
