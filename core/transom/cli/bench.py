"""`transom bench`: times all installed backends side by side, or the stages of a cold start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from transom.cli.options import (
    CONTEXT,
    JSON,
    MODEL,
    OFFLINE,
    PRECISION,
    SPARSITY,
    THREADS,
    complete_backend,
    complete_device,
    located_model,
)
from transom.cli.output import ProgressLine, heading, print_json, table

if TYPE_CHECKING:
    from transom.cli.benching import BenchRow


@click.command(
    epilog="""\b
Examples:
  transom bench model.gguf
  transom bench model.gguf --prompt-tokens 1024 --prompt-tokens 4096 --rounds 5
  transom bench model.gguf --backend openvino_cpu --threads 8 --json
  transom bench model.gguf --startup
  transom bench model.gguf --startup --empty-cache --runs 3
  transom bench model.gguf --sparsity balanced --heat-map reads.html --prompt-tokens 4096
"""
)
@MODEL
@click.option(
    "--device", "devices", multiple=True, shell_complete=complete_device, help="Only this device; can be repeated."
)
@click.option(
    "--backend", "backends", multiple=True, shell_complete=complete_backend, help="Only this backend; can be repeated."
)
@click.option(
    "--prompt-tokens", "prompts", type=click.IntRange(1), multiple=True, help="Length of a prompt; can be repeated. "
    "[default: 128 and 1024]",
)  # fmt: skip
@click.option("--new-tokens", type=click.IntRange(2), default=48, show_default=True, help="Tokens to decode.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Number of rounds.")
@click.option(
    "--patience",
    type=click.FloatRange(1),
    default=60.0,
    show_default=True,
    help="Timeout of one measurement, in seconds.",
)
@click.option("--startup", is_flag=True, help="Time the stages of a cold start, in fresh processes.")
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, help="With --startup: number of processes."
)
@click.option(
    "--heat-map", "heat_maps", multiple=True, type=click.Path(dir_okay=False), metavar="FILE",
    help="With --sparsity: plot the share of keys each layer reads along a prompt (.png or .html); can be repeated.",
)  # fmt: skip
@click.option("--empty-cache", is_flag=True, help="With --startup: compile in each process.")
@CONTEXT
@PRECISION
@THREADS
@SPARSITY
@OFFLINE
@JSON
def bench(
    model: str,
    devices: tuple[str, ...],
    backends: tuple[str, ...],
    prompts: tuple[int, ...],
    new_tokens: int,
    rounds: int,
    patience: float,
    startup: bool,
    runs: int,
    empty_cache: bool,
    heat_maps: tuple[str, ...],
    offline: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Time all installed backends side by side, or the stages of a cold start, or plot what sparse attention reads.

    Each backend loads the model in its own process. The processes take turns, prompts are random tokens, and the table
    shows the medians of all rounds. Nothing else should run on the machine meanwhile.
    """
    from transom.bundles.manifest import read_manifest
    from transom.sources import bundle_at, resolve
    from transom.sparsity import Sparsity

    _refuse_unused("--heat-map" if heat_maps else "--startup" if startup else "")
    with ProgressLine(stage="Starting") as progress:
        model = str(located_model(model, offline, progress))
    bundle = bundle_at(model)
    if bundle is None:
        resolve(model)  # report a wrong path before anything is started
    else:
        backends = backends or tuple(dict.fromkeys(v.backend for v in read_manifest(bundle).variants))
    Sparsity.parse(options["sparsity"])
    if heat_maps:
        return _heat_maps(model, devices, backends, prompts, heat_maps, as_json, options)
    if startup:
        return _startup(model, devices, backends, runs, empty_cache, as_json, options)

    from transom.cli.benching import BenchPlan, machine_facts, rows_for
    from transom.cli.benching import bench as measure

    rows = rows_for(devices, backends)
    facts = machine_facts(rows)
    lengths = tuple(sorted(set(prompts))) or (128, 1024)
    needed = _context(model, lengths, new_tokens)
    options["context"] = options["context"] or (needed if bundle is None else None)
    plan = BenchPlan(model, options, lengths, new_tokens, rounds, patience)
    with ProgressLine(stage="Starting") as progress:
        measure(plan, rows, progress)
    if as_json:
        results = [row.to_dict() for row in rows]
        print_json({"model": model, "machine": facts, "plan": vars(plan), "results": results})
    else:
        _print(model, facts, plan.prompts, new_tokens, rounds, rows)
    return 0 if any(not row.error for row in rows) else 2


_UNUSED = {
    "--heat-map": ("startup", "runs", "empty_cache", "new_tokens", "rounds", "patience"),
    "--startup": ("prompts", "new_tokens", "rounds", "patience"),
    "": ("runs", "empty_cache"),
}
"""The options that each way to measure does not use."""


def _refuse_unused(way: str) -> None:
    """Raise OptionError for an option that would have no effect."""
    from click.core import ParameterSource

    from transom.errors import OptionError

    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in _UNUSED[way] and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = parameter.opts[0]
            if way:
                raise OptionError(f"{flag} has no effect with {way}", "Leave one of them out")
            raise OptionError(f"{flag} has no effect without --startup", "Add --startup, or leave it out")


def _heat_maps(
    model: str,
    devices: Sequence[str],
    backends: Sequence[str],
    prompts: Sequence[int],
    files: Sequence[str],
    as_json: bool,
    options: Mapping[str, Any],
) -> int:
    """Run a prompt with the policy and plot which keys were read. Raises OptionError, MissingExtra, OSError."""
    from pathlib import Path

    import transom
    from transom.cli import heat_map
    from transom.errors import OptionError
    from transom.evaluation.densities import along
    from transom.preparation.calibration_texts import default_texts

    for what, given in (("--device", devices), ("--backend", backends), ("--prompt-tokens", prompts)):
        if len(given) > 1:
            raise OptionError(f"{what} is given {len(given)} times, and a heat map shows one run", "Give it once")
    paths = [heat_map.check(Path(file)) for file in files]
    where: dict[str, Any] = {"device": (*devices, "auto")[0], "backend": (*backends, "auto")[0]}
    with ProgressLine(stage="load") as progress, transom.load(model, **where, **options, progress=progress) as loaded:
        wanted = prompts[0] if prompts else min(4096, loaded.context)
        ids = loaded.tokenize(default_texts()["documentation"])[:wanted]
        if len(ids) < wanted or wanted > loaded.context:
            most = min(loaded.context, len(ids))
            raise OptionError(
                f"A prompt of {wanted} tokens is too long for this model", f"Use --prompt-tokens {most} or fewer"
            )
        found = along(loaded, ids, progress.prompt)
        title = f"{loaded.report.model}, {loaded.report.sparsity}"
    for path in paths:
        heat_map.draw(found, path, title)
    if as_json:
        print_json({"model": model, "sparsity": title, **found.to_dict(), "files": [str(p) for p in paths]})
    else:
        click.echo(f"{', '.join(map(str, paths))}: {found.by_layer.mean():.3f} of the keys on average")
    return 0


def _context(model: str, prompts: Sequence[int], new_tokens: int) -> int:
    """The context that the measurements need, so that no memory is planned for the model's full context.

    Raises:
        OptionError: a prompt is longer than the model's context, or the model is not a decoder.
    """
    from transom.bundles.manifest import read_manifest
    from transom.errors import OptionError
    from transom.sources import bundle_at, resolve

    if (bundle := bundle_at(model)) is not None:
        manifest = read_manifest(bundle)
        decoder, most = manifest.decoder, manifest.variants[0].context
    else:
        decoder = resolve(model).open(model).graph.decoder
        most = decoder.context if decoder is not None else 0
    if decoder is None:
        raise OptionError(
            f"{model} is not a decoder with a cache, so there is no generation to time",
            "Time your own calls of model.run() in Python, or see what the model is: transom inspect MODEL",
        )
    needed = max(prompts) + new_tokens
    if needed > most:
        raise OptionError(
            f"{max(prompts)} + {new_tokens} tokens are more than the model's context of {most}",
            f"Use at most --prompt-tokens {most - new_tokens}",
        )
    return needed


def _print(
    model: str, facts: Mapping[str, Any], prompts: Sequence[int], new_tokens: int, rounds: int, rows: Sequence[BenchRow]
) -> None:
    from transom.cli.benching import best
    from transom.preparation.memory import size

    heading(next((str(row.report["model"]) for row in rows if row.report), model))
    _machine(facts)
    click.echo(f"  medians of {rounds} rounds; decoding {new_tokens} tokens; × is relative to the best of the column\n")

    def rate(row: BenchRow, kind: str, prompt: int) -> str:
        value, top = row.median(kind, prompt), best(rows, kind, prompt)
        if value is None or top is None:
            return "gave up" if row.given_up else ""
        return f"{value:.1f}" + (f"  ×{value / top:.2f}" if len(rows) > 1 else "")

    headers = ["backend", "device", "load s", "memory", *(f"prefill {n}" for n in prompts)]
    headers += [f"decode at {n}" for n in prompts]
    shown = []
    for row in rows:
        if row.error:
            continue
        peak = row.memory.get("peak") or row.memory.get("resident")
        cells = [f"{row.backend} {row.version}", row.device.id, f"{row.load_seconds:.2f}", size(peak) if peak else ""]
        cells += [rate(row, "prefill", n) for n in prompts] + [rate(row, "decode", n) for n in prompts]
        shown.append(cells)
    if shown:
        table(headers, shown, right=range(2, len(headers)))
        click.echo("\ntokens/s; memory is the peak of the whole process")
    for row in rows:
        if precision := row.report.get("precision"):
            click.echo(f"{row.backend} on {row.device.id} computes in {precision}")
        if row.compile_seconds:
            click.echo(f"{row.backend} on {row.device.id} was compiled in {sum(row.compile_seconds.values()):.1f} s")
        if row.given_up:
            lengths = ", ".join(map(str, sorted(row.given_up)))
            click.echo(f"{row.backend} on {row.device.id} took longer than --patience allows at {lengths} tokens")
        if row.error:
            click.echo(f"{row.backend} on {row.device.id} failed: {row.error}")


def _machine(facts: Mapping[str, Any]) -> None:
    for id, device in facts["devices"].items():
        cores = f", {device['cores']} cores" if device["cores"] else ""
        drivers = "".join(f", {name} {version}" for name, version in device["drivers"].items())
        click.echo(f"  {id}: {device['name']}{cores}{drivers}")
    names = ("transom", "numpy", "openvino")
    versions = ", ".join(f"{name} {facts['packages'][name]}" for name in names if name in facts["packages"])
    load = facts["load_average_before"]
    busy = f"; load average before: {load:.1f}" if load is not None else ""
    click.echo(f"  {facts['platform']}, Python {facts['python']}, {versions}{busy}")


def _startup(
    model: str,
    devices: Sequence[str],
    backends: Sequence[str],
    runs: int,
    empty_cache: bool,
    as_json: bool,
    options: Mapping[str, Any],
) -> int:
    from transom.cli.benching import machine_facts, rows_for
    from transom.cli.startup import measure
    from transom.errors import OptionError

    if len(devices) > 1 or len(backends) > 1:
        raise OptionError("--startup measures one device and backend", "Name one device and one backend, or none")
    _context(model, (1,), 1)
    facts = machine_facts(rows_for(devices, backends))
    chosen = {"device": devices[0] if devices else "auto", "backend": backends[0] if backends else "auto"}
    with ProgressLine(stage="Starting") as progress:
        found = measure(model, {**options, **chosen}, runs=runs, empty_cache=empty_cache, tell=progress)
    if as_json:
        print_json({"model": model, "machine": facts, **found})
        return 0
    report, total = found["report"], found["total_seconds"]
    heading(f"{report['model']} on {report['device']['id']} by {report['backend']}, cache {found['cache']}")
    _machine(facts)
    click.echo(f"  medians of {runs} fresh processes\n")
    stages = found["median_seconds"]
    whole = sum(stages.values()) or 1.0
    rows = [(stage, f"{s * 1000:.0f}", f"{s / whole:.0%}", "█" * round(30 * s / whole)) for stage, s in stages.items()]
    table(("stage", "ms", "share", ""), rows, right=(1, 2))
    click.echo(f"\nprocess start to first token: {total['median']:.3f} s ({total['least']:.3f} … {total['most']:.3f})")
    if not found["bytecode"]:
        click.echo(
            "PYTHONDONTWRITEBYTECODE is set: each start compiles modules that were not compiled at installation."
        )
    return 0
