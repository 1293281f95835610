"""`transom explain`: which nodes of a model each backend can run, without compiling."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from transom.cli.options import DEVICE, JSON, MODEL, OFFLINE, PROBE_FILE, SPARSITY, located_model
from transom.cli.output import ProgressLine, print_json, warn

if TYPE_CHECKING:
    from transom.loading.explanation import Explanation


@click.command(
    epilog="""\b
Examples:
  transom explain model.gguf
  transom explain path/to/checkpoint --device cpu --nodes
  transom explain model.onnx --device snapdragon-8-gen-3
  transom explain model.gguf --json | jq '.answers[] | {backend, device, runs}'
"""
)
@MODEL
@DEVICE
@click.option(
    "--nodes", is_flag=True, help="Also list each node that does not run directly; --json always contains all."
)
@SPARSITY
@PROBE_FILE
@OFFLINE
@JSON
def explain(
    model: str, device: str, nodes: bool, sparsity: str, probe_file: str | None, offline: bool, as_json: bool
) -> None:
    """Show which nodes of a model each backend can run, and the reason for each refusal.

    Nothing is compiled. The summary counts, for each operator, the nodes that run directly, run after decomposition
    into standard operators, or are refused.
    """
    import transom
    from transom.plugins import load_plugins

    with ProgressLine(stage="read") as progress:
        path = located_model(model, offline, progress)
        found = transom.explain(path, device, sparsity=sparsity, probe_file=probe_file)
    if as_json:
        print_json(found.to_dict())
        return
    for failure in load_plugins().failures:
        warn(str(failure))
    click.echo(str(found))
    if nodes:
        _nodes(found)
    sys.stdout.flush()


def _nodes(found: Explanation) -> None:
    for answer in found.answers:
        if not answer.nodes:
            continue
        click.echo(f"\n{answer.backend} on {answer.device}, node by node:")
        for node in answer.nodes:
            approximate = "" if node.exact else " (approximate)"
            reason = f": {node.reason}" if node.reason else ""
            click.echo(f"  {node.node}  {node.operator} {node.outcome}{approximate}{reason}")
