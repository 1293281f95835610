"""`transom export`: compiles a model for another device and writes it as a folder (a bundle)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from transom.cli.options import (
    CONTEXT,
    JSON,
    OFFLINE,
    PRECISION,
    PROBE_FILE,
    SPARSITY,
    VERIFY,
    ModelPath,
    complete_device,
    located_model,
)
from transom.cli.output import ProgressLine, print_json, table, warn, wrapped

if TYPE_CHECKING:
    from transom.bundles.exported import Exported
    from transom.bundles.targets import Target
    from transom.contract import Offer, Refusal


@click.command(
    epilog="""\b
Examples:
  transom export model.gguf --target rtx-4090 --out model-4090
  transom export path/to/checkpoint --target cpu --out bundle --precision int8 --context 4096
  transom export model.gguf --target a100 --out bundle --text letters.txt --text contracts.txt
  transom export model.gguf --target snapdragon-8-gen-2 --format qnn,onnx --context 2048 --out bundle
  transom export model.gguf --target snapdragon-8-gen-2 --format qnn --precision int4 --plan
  transom export --target list
  transom run bundle "Hello"
"""
)
@click.argument("model", type=ModelPath(), required=False)
@click.option(
    "--target", metavar="NAME", shell_complete=complete_device,
    help="The device to compile for: one of this machine, or one that `--target list` shows; several are separated by "
    "commas.",
)  # fmt: skip
@click.option(
    "--plan", "planned", is_flag=True,
    help="Print what would be written and how fast it could run, without compiling, checking or writing.",
)  # fmt: skip
@click.option("--out", metavar="DIR", type=click.Path(), help="The folder to write; it must be new or empty.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle in the folder.")
@click.option(
    "--format", default="auto", metavar="NAME",
    help="The format: the name of a backend that --target list shows; several are separated by commas. [default: the "
    "best]",
)  # fmt: skip
@CONTEXT
@PRECISION
@SPARSITY
@click.option(
    "--text", "calibration", multiple=True, metavar="FILE", type=click.Path(),
    help="A text similar to the model's real input, for backends that quantize activations; can be repeated. "
    "[default: documentation and code from Python itself]",
)  # fmt: skip
@VERIFY
@click.option(
    "--max-kl", type=float, metavar="NATS",
    help="Write nothing if the logits diverge from the reference by more than this, where an emulator can measure it.",
)  # fmt: skip
@click.option(
    "--app", metavar="FILE", type=click.Path(),
    help="An APK, AAR, app bundle or folder: write nothing unless it contains the required native libraries.",
)  # fmt: skip
@PROBE_FILE
@OFFLINE
@JSON
def export(
    model: str | None,
    target: str | None,
    out: str | None,
    planned: bool,
    calibration: tuple[str, ...],
    probe_file: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile MODEL for a device and write it as a bundle: a folder that `transom run` opens on that device.

    A bundle for a device of this machine, or for one that has an emulator here, is compared with the reference before
    it is written. Every bundle is compared again when it is first loaded.
    """
    import transom
    from transom.errors import OptionError

    if target == "list":
        _list(probe_file, as_json)
        return
    if target is None:
        from transom.bundles.targets import known_targets

        raise OptionError(
            "No target is given",
            f"Name one with --target: {', '.join(known_targets(probe_file))}. "
            "To see which backend compiles for which: --target list",
        )
    if model is None:
        raise OptionError("No model is given", "Give it first, as in: transom export model.gguf --target cpu")
    if planned:
        _plan(model, target, probe_file, as_json, options)
        return
    if out is None:
        raise OptionError("No output folder is given", "Name it with --out DIR")
    with ProgressLine(stage="read") as progress:
        made = transom.export(
            located_model(model, options["offline"], progress),
            target=target,
            out=out,
            calibration=[Path(text) for text in calibration],
            probe_file=probe_file,
            progress=progress,
            **options,
        )
    if as_json:
        print_json(made.to_dict())
        return
    _print(made)


def _plan(model: str, target: str, probe_file: str | None, as_json: bool, options: dict[str, Any]) -> None:
    import transom

    chosen = {name: options[name] for name in ("format", "context", "precision", "sparsity")}
    with ProgressLine(stage="read") as progress:
        path = located_model(model, options["offline"], progress)
        plans = transom.plan_export(path, target=target, probe_file=probe_file, **chosen)
    if as_json:
        print_json({"plans": [plan.to_dict() for plan in plans]})
        return
    click.echo("\n\n".join(map(str, plans)))


def _print(made: Exported) -> None:
    for warning in made.warnings:
        warn(warning)
    click.echo(str(made))


def _list(probe_file: str | None, as_json: bool) -> None:
    """Print every target with the backends that compile for it, or with the reasons why none does."""
    from transom.bundles.targets import targets
    from transom.contract import Offer

    found = targets(probe_file)
    if as_json:
        print_json({"targets": [_facts(target) for target in found]})
        return
    rows = []
    reasons: dict[str, int] = {}
    for target in found:
        able = [name for name, answer in target.answers if isinstance(answer, Offer)]
        cell = ", ".join(able)
        if not able:
            numbers = [reasons.setdefault(text, len(reasons) + 1) for text in _reasons(target.answers)]
            cell = "none: see " + ", ".join(f"({number})" for number in numbers)
        rows.append((target.name, target.device.name, target.device.arch, cell))
    table(("target", "name", "architecture", "backends that compile for it"), rows)
    if reasons:
        click.echo()
    for text, number in reasons.items():
        click.echo(wrapped(f"({number}) {text}", sys.stdout))


def _reasons(answers: Sequence[tuple[str, Offer | Refusal]]) -> list[str]:
    """Why no backend compiles for a target, and the fixes, limited to the backends made for it if there are any."""
    from transom.contract import Refusal

    refused = [(name, answer) for name, answer in answers if isinstance(answer, Refusal)]
    close = [(name, answer) for name, answer in refused if answer.code != "wrong_device"]
    if not close:
        return ["no installed backend is made for it"]
    return [f"{name}: {a.reason}" + (f" ({a.fix})" if a.fix else "") for name, a in close]


def _facts(target: Target) -> dict[str, Any]:
    from transom.contract import Offer

    said = [{"backend": name, "offer": isinstance(answer, Offer), **vars(answer)} for name, answer in target.answers]
    return {"target": target.name, "id": target.device.id, "name": target.device.name, "arch": target.device.arch,
            "answers": said}  # fmt: skip
