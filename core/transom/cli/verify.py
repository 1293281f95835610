"""`transom verify`: a loaded model compared with another program that runs the same files."""

from __future__ import annotations

from typing import Any

import click

from transom.cli.options import MODEL, load_arguments, loading_exactly
from transom.cli.output import ProgressLine, print_json, warn


@click.command(
    epilog="""\b
Examples:
  transom verify path/to/checkpoint
  transom verify model.gguf --device cpu --as bf16
  transom verify model.onnx --prompts 5 --longest 200
  transom verify path/to/checkpoint --seed 7 --json

Exit status 0: they agree; 2: they differ, or could not be compared. Needs pip install 'transom[verify]'.
"""
)
@MODEL
@click.option(
    "--as",
    "bound",
    type=click.Choice(("exact", "bf16", "int8", "int4")),
    help="The least exact step that is allowed between the two. [default: what the backend computes in]",
)
@click.option("--prompts", type=click.IntRange(1), default=3, show_default=True, help="Random prompts.")
@click.option("--longest", type=click.IntRange(8), default=48, show_default=True, help="Tokens of the longest prompt.")
@click.option("--seed", type=click.IntRange(0), help="For the prompts. [default: a fresh one, which is shown]")
@loading_exactly
def verify(
    model: str,
    bound: str | None,
    prompts: int,
    longest: int,
    seed: int | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Compare a model with transformers on random prompts.

    Logits of prefill and of cached decoding, in one ragged batch, are held against those of transformers. An ONNX file
    is held against its own graph, run by the NumPy reference. Unless --precision says otherwise the backend computes
    exactly, so that the model is compared and not its rounding.
    """
    import transom
    from transom.evaluation.verify import verify_model
    from transom.sources import resolve

    resolve(model)  # a wrong path, or a bundle, which has no other program, is said before anything is loaded
    with ProgressLine(stage="load") as progress:
        loaded = transom.load(model, **load_arguments(options), progress=progress)
        with loaded:
            found = verify_model(
                loaded,
                model,
                precision=bound or _bound(loaded.report.precision),
                prompts=prompts,
                longest=longest,
                seed=seed,
                progress=progress,
            )
    if as_json:
        print_json({**found.to_dict(), "report": loaded.report.to_dict()})
    else:
        for warning in loaded.report.warnings:
            warn(warning)
        click.secho("agrees" if found.agrees else "DIFFERS", fg="green" if found.agrees else "red", bold=True)
        click.echo(str(found))
        click.echo(f"{loaded.report.backend} on {loaded.report.device.id}, {prompts} prompts, seed {found.seed}")
    return 0 if found.agrees else 2


def _bound(precision: str) -> str:
    """The bounds for what the backend says that it computes in; `exact` where it says nothing of rounding."""
    said = precision.lower()
    for words, bound in (
        (("int4", "4-bit"), "int4"),
        (("int8", "8-bit", "fp8"), "int8"),
        (("bfloat16", "bf16", "float16", "f16"), "bf16"),
    ):
        if any(word in said for word in words):
            return bound
    return "exact"
