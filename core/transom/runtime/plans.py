"""What `transom.plan_export` does: a model's graph read, the formats chosen as an export would, and each planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom import hardware
from transom.errors import UnsupportedError
from transom.runtime.arguments import check_arguments
from transom.runtime.exporting import chosen_for, pairs_of
from transom.runtime.machine import survey

if TYPE_CHECKING:
    from transom.contract import Device
    from transom.runtime.planning import ExportPlan


def plan_export(
    model: Any,
    *,
    target: str | Sequence[str],
    format: str | Sequence[str] = "auto",
    context: int | None = None,
    precision: str = "auto",
    probe_file: str | Path | None = None,
) -> list[ExportPlan]:
    """What `transom.export` would write for each target, and how fast it could be, without compiling.

    Reads the shapes of the model's graph, and no weight. The arguments are those of `transom.export`; a plan does not
    need the packages that compiling does.

    Raises:
        OptionError: an unknown target, format, option or value, or a context beyond the model's.
        SelectionError: `"auto"`, and no backend compiles for the target.
        SourceError, UnsupportedError: the model cannot be read, or is no decoder.
        DoesNotFit: a layer alone is larger than one compiled part may be.
    """
    from transom.runtime import planning
    from transom.runtime.operators import explaining_rejected, register_operators
    from transom.sources import resolve

    check_arguments({"context": context, "precision": precision, "threads": None}, "auto", "static", {}, "export")
    found: dict[str, tuple[Device, list[tuple[str, str]]]] = {}
    for name, backend in pairs_of(target, format):
        machine = survey(probe_file, target=name)
        device = hardware.find(machine.devices, name)
        if backend == "auto":
            backend = chosen_for(name, backend, probe_file)[1].backend
        found.setdefault(device.id, (device, []))[1].append((backend, precision))
    plugins = machine.plugins
    register_operators(plugins)
    with explaining_rejected(plugins):
        source = resolve(model).open(model, context=context)
    graph = source.graph
    if graph.decoder is None:
        raise UnsupportedError(f"{graph.name} has no attention with a cache, so there is nothing to plan")
    return [
        replace(planning.plan_export(graph, graph.decoder, device, variants, context), model=source.name)
        for device, variants in found.values()
    ]
