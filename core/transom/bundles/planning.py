"""Planning an export: the model's graph is read, the backends are chosen as an export would, and each is planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom import hardware
from transom.bundles.targets import backends_for, pairs_of
from transom.bundles.weighing import form_of, plan_variants
from transom.errors import OptionError, UnsupportedError
from transom.loading.machine import has_fix, survey
from transom.preparation.plugin_operators import explaining_rejected, register_operators
from transom.sources import resolve

if TYPE_CHECKING:
    from transom.bundles.plan import ExportPlan
    from transom.contract import Backend, Device
    from transom.loading.options import LoadOptions


def plan_model(
    model: Any,
    options: LoadOptions,
    *,
    target: str | Sequence[str],
    format: str | Sequence[str],
    probe_file: str | Path | None,
) -> list[ExportPlan]:
    """Plan an export without compiling; arguments and errors are those of `transom.plan_export`."""
    context, precision = options.for_backend["context"], options.for_backend["precision"]
    if not options.sparsity.dense:
        raise OptionError(
            "A plan is for dense attention, and sparsity names a policy",
            "Leave it out; what a policy reads of the cache is among the notes of an export",
        )
    found: dict[str, tuple[Device, list[Backend]]] = {}
    for name, backend in pairs_of(target, format):
        machine = survey(probe_file, target=name)
        device = hardware.find(machine.devices, name)
        own = [answer for by, answer in machine.answers if by == backend and answer.device_id == device.id]
        if not has_fix(own):
            backend = backends_for(name, backend, probe_file)[1].backend
        found.setdefault(device.id, (device, []))[1].append(machine.plugins.backends[backend].backend)
    plugins = machine.plugins
    register_operators(plugins)
    with explaining_rejected(plugins):
        source = resolve(model).open(model, context=context)
    graph, decoder = source.graph, source.graph.decoder
    if decoder is None:
        raise UnsupportedError(f"{graph.name} has no attention with a cache, so there is nothing to plan")
    plans = []
    for device, formats in found.values():
        forms = [form_of(backend, precision, decoder, device) for backend in formats]
        plans.append(replace(plan_variants(graph, decoder, device, forms, context), model=source.name))
    return plans
