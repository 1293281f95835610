"""`transom calibrate-sparsity`: measures how many keys each head must read and writes a file that loading finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from transom.cli.options import BACKEND, DEVICE, JSON, MODEL, OFFLINE, THREADS, located_model
from transom.cli.output import ProgressLine, aside, print_json

if TYPE_CHECKING:
    from transom.evaluation.head_calibration import SavedCalibration


@click.command(
    epilog="""\b
Examples:
  transom calibrate-sparsity model.gguf
  transom calibrate-sparsity path/to/checkpoint --out heads.json
  transom calibrate-sparsity model.gguf --text contracts.txt --text letters.txt

After an interruption, the next run continues where this one stopped.
"""
)
@MODEL
@click.option("--out", type=click.Path(dir_okay=False), help="The file to write. [default: beside the model]")
@click.option(
    "--text", "texts", multiple=True, type=click.Path(), metavar="FILE",
    help="A text similar to the model's input; can be repeated. [default: documentation and code from Python itself]",
)  # fmt: skip
@DEVICE
@BACKEND
@THREADS
@OFFLINE
@JSON
def calibrate_sparsity(
    model: str, out: str | None, texts: tuple[str, ...], offline: bool, as_json: bool, **options: Any
) -> None:
    """Measure how many keys each head of a model must read, for sparse attention.

    Each KV head is made sparse by itself, and the effect on the output is measured on long passages. Sensitive heads
    stay dense, the others read less. This takes minutes for a small model, and grows with the number of heads.
    """
    from transom.evaluation.head_calibration import calibrate_file

    with ProgressLine(stage="Loading the model") as progress:
        outcome = calibrate_file(
            located_model(model, offline, progress),
            out=None if out is None else Path(out),
            texts=[Path(t) for t in texts],
            progress=progress,
            **options,
        )
    if as_json:
        print_json(outcome.to_dict())
        return
    _print(outcome)


def _print(outcome: SavedCalibration) -> None:
    found = outcome.calibrated
    click.echo(f"{outcome.where}")
    for name, effect in (("not calibrated", found.before), ("calibrated", found.after)):
        click.echo(f"  {name:16} reads {effect.density:.3f} of the keys, divergence {effect.divergence:.4f} nats")
    for name, heads in (("dense heads", found.dense_heads), ("loose heads", found.loose_heads)):
        click.echo(f"  {name:16} {', '.join(f'{layer}.{head}' for layer, head in heads) or 'none'} (layer.head)")
    aside(f"By the preset balanced, on {outcome.passages}; {found.seconds:.0f} s.")
