"""`transom verify`: a loaded model compared with another program that runs the same files."""

from __future__ import annotations

from typing import Any

import click

from transom.cli.options import MODEL, load_arguments, loading_exactly, located_model
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
    help="Tolerance of the comparison, by the least precise type involved. [default: the backend's compute precision]",
)
@click.option("--prompts", type=click.IntRange(1), default=3, show_default=True, help="Number of random prompts.")
@click.option("--longest", type=click.IntRange(8), default=48, show_default=True, help="Tokens of the longest prompt.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the prompts. [default: random, and printed]")
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

    Logits of prefill and of cached decoding, in one ragged batch, are compared with those of transformers. An ONNX
    file is compared with its own graph, run by the NumPy reference. The default precision is exact, so that the
    comparison measures the model and not the quantization.
    """
    import transom
    from transom.evaluation.verify import verify_model
    from transom.sources import resolve

    with ProgressLine(stage="load") as progress:
        path = located_model(model, options["offline"], progress)
        resolve(path)  # report a wrong path, or a bundle, which transformers cannot run, before loading
        loaded = transom.load(path, **load_arguments(options), progress=progress)
        with loaded:
            found = verify_model(
                loaded,
                path,
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
    """The bounds for the compute precision that the backend reports; `exact` if it names no lower one."""
    said = precision.lower()
    for words, bound in (
        (("int4", "4-bit"), "int4"),
        (("int8", "8-bit", "fp8"), "int8"),
        (("bfloat16", "bf16", "float16", "f16"), "bf16"),
    ):
        if any(word in said for word in words):
            return bound
    return "exact"
