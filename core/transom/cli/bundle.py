"""`transom bundle`: verify a bundle, judge it for a device, check an app's native libraries."""

from __future__ import annotations

from pathlib import Path

import click

from transom.cli.options import JSON, PROBE_FILE, complete_device
from transom.cli.output import ProgressLine, print_json, table


@click.group(
    epilog="""\b
Examples:
  transom bundle verify bundle
  transom bundle verify bundle --variant onnx
  transom bundle judge bundle --device snapdragon-8-gen-3
  transom bundle libraries bundle app-release.apk
"""
)
def bundle() -> None:
    """Verify a bundle, or check whether it suits a device."""


@bundle.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--variant", "variants", multiple=True, metavar="NAME", help="Only this variant; can be repeated.")
@click.option(
    "--device", default="auto", metavar="NAME", shell_complete=complete_device,
    help="The device of this machine to run on. [default: the best for each variant]",
)  # fmt: skip
@PROBE_FILE
@JSON
def verify(folder: Path, variants: tuple[str, ...], device: str, probe_file: str | None, as_json: bool) -> None:
    """Run each variant of the bundle in FOLDER that can run here, and compare it with the expected outputs."""
    from transom.bundles.verification import verify_bundle
    from transom.errors import SelectionError, SelfCheckFailed

    with ProgressLine(stage="read") as progress:
        _, found = verify_bundle(
            _bundle(folder), variants=variants, device=device, probe_file=probe_file, progress=progress
        )
    if as_json:
        print_json({"bundle": str(folder), "variants": [vars(one) for one in found]})
    else:
        table(
            ("variant", "outcome", "device", "details"), [(r.variant, r.state, r.where or "-", r.text) for r in found]
        )
    if failed := [one.variant for one in found if one.state == "failed"]:
        raise SelfCheckFailed(
            f"{folder} does not give the expected outputs: {', '.join(failed)}", "Export the model again"
        )
    if not any(one.state == "passed" for one in found):
        raise SelectionError(
            f"Nothing here can run a variant of {folder}",
            "Apply the fixes in the table, or run it on a device that can",
        )


@bundle.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--device", default="auto", metavar="NAME", shell_complete=complete_device,
    help="A device of this machine, or a target of transom export --target list. [default: all local devices]",
)  # fmt: skip
@PROBE_FILE
@JSON
def judge(folder: Path, device: str, probe_file: str | None, as_json: bool) -> None:
    """Report which variants of the bundle in FOLDER suit a device, from the manifest alone."""
    import json

    from transom import hardware
    from transom.bundles.judging import judge as judged
    from transom.bundles.manifest import read_manifest
    from transom.loading.machine import survey

    place = _bundle(folder)
    read_manifest(place)  # raises an error with a fix if the manifest is damaged
    manifest = json.loads((place / "manifest.json").read_bytes())
    machine = survey(probe_file, target=device)
    devices = [d for d in machine.devices if d.kind != "remote"]
    if device != "auto":
        devices = [hardware.find(machine.devices, device)]
    rows = [(d, verdict) for d in devices for verdict in judged(manifest, d, machine.plugins)]
    if as_json:
        print_json({"bundle": str(folder), "verdicts": [{"device": d.id, **vars(v)} for d, v in rows]})
        return
    table(
        ("device", "variant", "suits", "context", "details"),
        [(d.id, v.name, "yes" if v.fits else "no", str(v.context or "-"), v.reason or "-") for d, v in rows],
    )


@bundle.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--abi", default="arm64-v8a", metavar="NAME", help="The ABI whose libraries are checked.", show_default=True
)
@JSON
def libraries(folder: Path, package: Path, abi: str, as_json: bool) -> None:
    """Check that PACKAGE (an APK, AAR, app bundle or folder) has the native libraries that the bundle in FOLDER needs.

    The errors name missing libraries, those for another processor, and those that newer phones or the app store reject.
    """
    from transom.bundles.manifest import read_manifest
    from transom.bundles.native_libraries import require_libraries

    manifest = read_manifest(_bundle(folder))
    needed = list(dict.fromkeys(name for variant in manifest.variants for name in variant.libraries))
    found = require_libraries(package, needed, abi)
    if as_json:
        print_json({"needed": needed, "found": [vars(library) for library in found]})
        return
    table(("library", "ABI", "page"), [(x.name, x.abi, str(x.page)) for x in found], right=(2,))


def _bundle(folder: Path) -> Path:
    from transom.errors import SourceError
    from transom.sources import bundle_at

    found = bundle_at(folder)
    if found is None:
        raise SourceError(f"{folder} is not a bundle", "Give a folder that transom export wrote")
    return found
