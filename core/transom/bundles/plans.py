"""What `transom.plan_export` does: a model's graph read, the formats chosen as an export would, and each planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom import hardware
from transom.bundles.targets import backends_for, pairs_of
from transom.errors import OptionError, UnsupportedError
from transom.loading.machine import can_be_mended, survey
from transom.loading.options import checked_options

if TYPE_CHECKING:
    from transom.bundles.planning import ExportPlan
    from transom.contract import Device


def plan_export(
    model: Any,
    *,
    target: str | Sequence[str],
    format: str | Sequence[str] = "auto",
    context: int | None = None,
    precision: str = "auto",
    sparsity: Any = "off",
    probe_file: str | Path | None = None,
) -> list[ExportPlan]:
    """What `transom.export` would write for each target, and how fast it could be, without compiling.

    Looks at the shapes of the model's graph, and at no weight; but a model that is opened for the first time is read
    once, for the hash of its files. The arguments are those of `transom.export`; a plan does not need the packages that
    compiling does.

    Raises:
        OptionError: an unknown target, format, option or value, a context beyond the model's, or a policy of sparse
            attention: a plan is for dense attention.
        SelectionError: no backend compiles for the target, or the one that is named does not; a package that is
            missing is no reason.
        SourceError, UnsupportedError: the model cannot be read, or is no decoder.
        DoesNotFit: a layer alone is larger than one compiled part may be.
    """
    from transom.bundles import planning
    from transom.preparation.plugin_operators import explaining_rejected, register_operators
    from transom.sources import resolve

    options = checked_options(
        "export",
        context=context,
        precision=precision,
        threads=None,
        sparsity=sparsity,
        calibration=(),
        verify="auto",
        unknown={},
    )
    if not options.sparsity.dense:
        raise OptionError(
            "A plan is for dense attention, and sparsity names a policy",
            "Leave it out; what a policy reads of the cache is among the notes of an export",
        )
    found: dict[str, tuple[Device, list[tuple[str, str]]]] = {}
    for name, backend in pairs_of(target, format):
        machine = survey(probe_file, target=name)
        device = hardware.find(machine.devices, name)
        own = [answer for by, answer in machine.answers if by == backend and answer.device_id == device.id]
        if not can_be_mended(own):
            backend = backends_for(name, backend, probe_file)[1].backend
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
