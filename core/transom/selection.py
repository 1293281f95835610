"""One choice out of offers and refusals, explained. Pure: no probing, no environment, no plugin is asked here.

A device or backend that is named is used, or the error lists what every backend said; nothing is put in its place. Who
decides, in this order: the argument, `TRANSOM_DEVICE`, the `transom_choose` hook, and otherwise the order below.

Among offers for one kind of device: by band, `fallback < generic < native < tuned`; then by the backend's name; then in
the order of the probe. An offer of band `fallback` comes after every other offer, whatever its device.

Between kinds of device: by measured tokens per second where every kind was measured. Until then in the static order
`KINDS`. Memory size never counts: an integrated GPU's looks large because it is the CPU's. An integrated GPU or an NPU
is not put before the CPU unmeasured either, because for token generation, which memory bandwidth bounds, they share
the CPU's and are often slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from transom.contract import Device, Offer, Refusal
from transom.errors import OptionError, SelectionError, nearest, option, option_prefix
from transom.hardware import find
from transom.plugins import PluginFailure

BANDS = ("fallback", "generic", "native", "tuned")
"""Worst to best."""

KINDS = ("cuda", "gpu", "cpu", "integrated gpu", "npu", "remote")
"""Best to worst while nothing is measured. A `cuda` device counts as such even where it shares the CPU's memory."""

INSTALL = {"cpu": "pip install 'transom[openvino]'"}
"""What to type when no installed backend wants a kind of device at all."""

Decider = Literal["argument", "environment", "hook", "measurement", "bands"]
Answer = tuple[str, Offer | Refusal]


@dataclass(frozen=True)
class Candidate:
    """A backend, a device, and what the backend said about it."""

    backend: str
    device: Device
    offer: Offer

    @property
    def key(self) -> str:
        """How measurements name it: `"openvino_cpu@cpu"`."""
        return f"{self.backend}@{self.device.id}"


@dataclass(frozen=True)
class Selection:
    """What was chosen, why, and what else could run."""

    ranked: tuple[Candidate, ...]
    """Best first; the first is the choice. All are within what the user named, so moving on never breaks a promise."""
    refusals: tuple[tuple[str, Refusal], ...]
    """(backend, refusal) for the devices that were in question."""
    why: str
    """One or two sentences for people."""
    warnings: tuple[str, ...]
    """What must be said aloud: a GPU that is not used, a broken plugin, a slow fallback."""
    decided_by: Decider
    kinds_to_measure: tuple[Candidate, ...]
    """The best candidate of each kind that lacks a measurement, where several kinds could run and `auto` decides."""

    @property
    def backend(self) -> str:
        return self.ranked[0].backend

    @property
    def device(self) -> Device:
        return self.ranked[0].device

    @property
    def offer(self) -> Offer:
        return self.ranked[0].offer


def kind_of(device: Device) -> str:
    """The kind as `KINDS` has it: an integrated GPU is told apart from one with memory of its own."""
    return "integrated gpu" if device.kind == "gpu" and device.integrated else device.kind


def select(
    devices: Sequence[Device],
    answers: Sequence[Answer],
    *,
    device: str = "auto",
    backend: str = "auto",
    environment_device: str | None = None,
    hook: tuple[str, str] | None = None,
    failures: Sequence[PluginFailure] = (),
    purpose: Literal["run", "export"] = "run",
    measured: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    deterministic: bool = False,
) -> Selection:
    """Choose a backend and a device.

    Args:
        devices: what the probe found, and the remote target where one is meant (`hardware.with_target`).
        answers: (backend, offer or refusal) for each backend and device, as `Plugins.probe` returns them.
        device: an id, a kind, a target's name, or `"auto"`. Named, it never falls back.
        backend: a backend's name or `"auto"`. Named, it never falls back.
        environment_device: the value of `TRANSOM_DEVICE`; counts when `device` is `"auto"`, and is as strict.
        hook: (backend, plugin) that `Plugins.choose` returned; counts when `backend` is `"auto"`.
        failures: broken plugins, for warnings and errors.
        purpose: `"run"` leaves out offers that can only compile. `"export"` takes them too.
        measured: tokens per second by `Candidate.key`; 0.0 for one that was tried and failed.
        notes: the probe's notes, for warnings and errors.
        deterministic: leave out offers that do not promise the same bits for the same steps.

    Raises:
        OptionError: an unknown device or backend; names the nearest one.
        SelectionError: nothing can run as asked; the details hold what each backend said.
    """
    target, named_by = _target(devices, device, environment_device, notes)
    _check_backend(backend, answers, failures)
    scope = [d for d in devices if (d.id == target.id if target else d.kind != "remote")]
    by_id = {d.id: d for d in scope}
    offers: list[Candidate] = []
    refusals: list[tuple[str, Refusal]] = []
    for name, answer in answers:
        if answer.device_id not in by_id:
            continue
        if isinstance(answer, Refusal):
            refusals.append((name, answer))
        elif purpose == "run" and not answer.runs_here:
            reason = f"compiles for it, but cannot run it here ({answer.why})"
            refusals.append((name, Refusal(answer.device_id, "wrong_device", reason)))
        elif answer.by_name and backend != name:
            reason = f"is used only when it is named ({answer.why})"
            refusals.append((name, Refusal(answer.device_id, "wrong_device", reason, f"Use {option('backend', name)}")))
        elif deterministic and not answer.deterministic:
            reason = f"does not promise the same bits each time ({answer.why})"
            fix = f"Leave out {option('deterministic', True)}"
            refusals.append((name, Refusal(answer.device_id, "missing_feature", reason, fix)))
        else:
            offers.append(Candidate(name, by_id[answer.device_id], answer))
    pool = [candidate for candidate in offers if backend in ("auto", candidate.backend)]
    if not pool:
        raise _nothing_runs(devices, answers, scope, target, named_by, backend, refusals, failures, purpose, notes)

    warnings: list[str] = []
    favored = [c for c in pool if hook and backend == "auto" and c.backend == hook[0]]
    if hook and backend == "auto" and not favored:
        warnings.append(f'The plugin {hook[1]} chose "{hook[0]}", which has no offer here; its choice was set aside')
    first = favored or pool
    speeds = dict(measured or {})
    ranking = _Ranking(scope, first, speeds, between_kinds=target is None)
    ranked = ranking.sort(first) + ranking.sort([c for c in pool if c not in first])
    decided_by: Decider = "bands"
    if named_by is not None:
        decided_by = named_by
    elif backend != "auto":
        decided_by = "argument"
    elif favored:
        decided_by = "hook"
    elif ranking.decided_by_measurement:
        decided_by = "measurement"
    if target is None or backend == "auto":
        warnings += [_capital(str(failure)) for failure in failures]
    if target is None and backend == "auto" and ranked[0].device.kind == "cpu":
        warnings += _unused_gpus(scope, pool, refusals)
        warnings += notes
    if purpose == "export" and backend == "auto":
        warnings += [
            f"{name} could compile for {r.device_id} too: {r.reason}. {_command(r.fix)}"
            for name, r in refusals
            if r.code == "missing_dep" and r.device_id == ranked[0].device.id
        ]
    if backend == "auto" and ranked[0].offer.band == "fallback":
        warnings.append(_slow(ranked[0], refusals))
    return Selection(
        ranked=tuple(ranked),
        refusals=tuple(refusals),
        why=_why(ranked, ranking, device, backend, environment_device, named_by, hook if favored else None),
        warnings=tuple(dict.fromkeys(warnings)),
        decided_by=decided_by,
        kinds_to_measure=ranking.unmeasured,
    )


def _target(
    devices: Sequence[Device], device: str, environment_device: str | None, notes: Sequence[str]
) -> tuple[Device | None, Literal["argument", "environment"] | None]:
    """The device that was named, and by what; (None, None) for `auto`."""
    if device.strip().lower() not in ("", "auto"):
        return find(devices, device, notes), "argument"
    if (environment_device or "").strip().lower() in ("", "auto"):
        return None, None
    try:
        return find(devices, environment_device or "", notes), "environment"
    except OptionError as error:
        raise OptionError(f"TRANSOM_DEVICE: {error.cause}", error.fix, error.details) from None


def _check_backend(backend: str, answers: Sequence[Answer], failures: Sequence[PluginFailure]) -> None:
    known = {name for name, _ in answers}
    if backend == "auto" or backend in known:
        return
    for failure in failures:
        if backend in failure.entry_point.split(", ") or f'"{backend}"' in failure.error:
            raise SelectionError(f'The backend "{backend}" is installed but broken: {failure.error}', failure.fix)
    details = [_capital(str(failure)) for failure in failures]
    raise OptionError(f'Unknown backend "{backend}"', nearest(backend, known), details)


class _Ranking:
    """The order of candidates: which kinds are compared, by what, and the sort that follows."""

    def __init__(
        self, scope: Sequence[Device], pool: Sequence[Candidate], speeds: Mapping[str, float], *, between_kinds: bool
    ) -> None:
        self.speeds = speeds
        self._place = {device.id: index for index, device in enumerate(scope)}
        self._order = {kind: index for index, kind in enumerate(KINDS)}
        self.best: dict[str, Candidate] = {}
        for candidate in self.sort([c for c in pool if c.offer.band != "fallback"]):
            self.best.setdefault(kind_of(candidate.device), candidate)
        several = between_kinds and len(self.best) > 1
        missing = tuple(candidate for candidate in self.best.values() if candidate.key not in speeds)
        self.unmeasured: tuple[Candidate, ...] = missing if several else ()
        self.decided_by_measurement = several and not missing
        if self.decided_by_measurement:
            fastest = sorted(self.best, key=lambda kind: (-speeds[self.best[kind].key], self._order[kind]))
            self._order |= {kind: index - len(fastest) for index, kind in enumerate(fastest)}

    def sort(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        return sorted(
            candidates,
            key=lambda c: (
                c.offer.band == "fallback",
                self._order[kind_of(c.device)],
                -BANDS.index(c.offer.band),
                c.backend,
                self._place[c.device.id],
            ),
        )


def _why(
    ranked: Sequence[Candidate],
    ranking: _Ranking,
    device: str,
    backend: str,
    environment_device: str | None,
    named_by: str | None,
    hook: tuple[str, str] | None,
) -> str:
    chosen = ranked[0]
    label = f" ({chosen.device.name})" if chosen.device.name else ""
    reasons: list[str] = []
    if named_by == "argument":
        reasons.append(f'device="{device}" was asked for')
    elif named_by == "environment":
        reasons.append(f'TRANSOM_DEVICE is "{environment_device}"')
    if backend != "auto":
        reasons.append(f'backend="{backend}" was asked for')
    if hook:
        reasons.append(f"the plugin {hook[1]} chose {hook[0]}")
    if ranking.decided_by_measurement:
        speeds = sorted(((ranking.speeds[c.key], c) for c in ranking.best.values()), key=lambda pair: -pair[0])
        reasons.append("measured " + ", ".join(f"{c.device.id} {speed:.1f} tokens/s" for speed, c in speeds))
    elif ranking.unmeasured:
        kinds = sorted(ranking.best, key=KINDS.index)
        reasons.append(f"kinds of device come in the order {', '.join(kinds)} until they are measured")
    reasons += _among_equals(chosen, ranked, hook)
    text = _capital("; ".join(reasons) or "it is the only offer")
    return f"{chosen.backend} on {chosen.device.id}{label}: {chosen.offer.why}. {text}."


def _among_equals(chosen: Candidate, ranked: Sequence[Candidate], hook: tuple[str, str] | None) -> list[str]:
    """How the choice stands to other backends for its device, and to other devices of its kind."""
    said: list[str] = []
    others = [c for c in ranked[1:] if c.device.id == chosen.device.id]
    if others and not hook:
        band = chosen.offer.band
        tied = [c.backend for c in others if c.offer.band == band]
        behind = [f"{c.backend} ({c.offer.band})" for c in others if c.offer.band != band]
        if behind:
            said.append(f'its band "{band}" comes before {", ".join(behind)}')
        if tied:
            said.append(f'it ties with {", ".join(tied)} in the band "{band}", and ties go by name')
    same_kind = [c for c in ranked[1:] if c.device.id != chosen.device.id and c.device.kind == chosen.device.kind]
    if twins := list(dict.fromkeys(c.device.id for c in same_kind)):
        said.append(f"{', '.join(twins)} could run it too and can be named")
    if len(ranked) > 1 and not said and chosen.offer.band != "fallback" and ranked[1].offer.band == "fallback":
        said.append(f"{ranked[1].backend} is only a fallback")
    return said


def _unused_gpus(
    scope: Sequence[Device], pool: Sequence[Candidate], refusals: Sequence[tuple[str, Refusal]]
) -> list[str]:
    """A line for each GPU that nothing can use. Integrated ones are left out: the CPU would be chosen anyway."""
    usable = {candidate.device.id for candidate in pool}
    lines: list[str] = []
    for device in scope:
        if kind_of(device) not in ("cuda", "gpu") or device.id in usable:
            continue
        said = [(name, r) for name, r in refusals if r.device_id == device.id and r.code != "wrong_device"]
        reasons = "; ".join(f"{name}: {r.reason}" for name, r in said) or "no installed backend is made for it"
        fix = _best_fix([r for _, r in said]) or INSTALL.get(device.kind, "")
        fix = fix or "Install a plugin for it; see: transom backends"
        name = f"{device.name} ({device.id})" if device.name else device.id
        lines.append(f"{name} is present but cannot be used: {reasons}. {_command(fix)}")
    return lines


def _slow(chosen: Candidate, refusals: Sequence[tuple[str, Refusal]]) -> str:
    said = [(n, r) for n, r in refusals if r.device_id == chosen.device.id and r.code != "wrong_device"]
    reasons = "".join(f"; {name}: {r.reason}" for name, r in said)
    fix = _best_fix([r for _, r in said]) or INSTALL.get(chosen.device.kind, "")
    return f"Only the slow fallback {chosen.backend} can run on {chosen.device.id}{reasons}. {_command(fix)}".rstrip()


def _nothing_runs(
    devices: Sequence[Device],
    answers: Sequence[Answer],
    scope: Sequence[Device],
    target: Device | None,
    named_by: str | None,
    backend: str,
    refusals: Sequence[tuple[str, Refusal]],
    failures: Sequence[PluginFailure],
    purpose: Literal["run", "export"],
    notes: Sequence[str],
) -> SelectionError:
    where = f'the device "{target.id}"' if target else "any device of this machine"
    if named_by == "environment":
        where += ", which TRANSOM_DEVICE names"
    verb = "run on" if purpose == "run" else "compile for"
    who = f'The backend "{backend}" cannot' if backend != "auto" else "No installed backend can"
    relevant = [r for name, r in refusals if backend in ("auto", name)]
    fix = _command(_best_fix(relevant))
    # What could run instead is offered in words only: a named device or backend never falls back by itself.
    runnable = [(name, a) for name, a in answers if isinstance(a, Offer) and (a.runs_here or purpose == "export")]
    local = {d.id for d in devices if d.kind != "remote"}
    elsewhere = sorted({f"{name} on {a.device_id}" for name, a in runnable if a.device_id in local})
    if target and target.kind == "remote" and purpose == "run":
        fix = f"A remote target can only be compiled for; this machine has: {', '.join(sorted(local)) or 'nothing'}"
    if not fix and elsewhere:
        fix = f"What can: {', '.join(elsewhere)}"
    if not fix and failures:
        fix = failures[0].fix
    if not fix:
        kind = target.kind if target else "cpu"
        fix = _command(INSTALL.get(kind, "")) or "Install a plugin for it; see: transom backends"
    if not scope:
        fix = "The probe found no device; see: transom doctor"
    details = [_line(name, refusal, purpose) for name, refusal in refusals if backend in ("auto", name)]
    if backend == "auto" and devices and not answers:
        details.append("no backend is installed")
    details += [_capital(str(failure)) for failure in failures]
    details += [f"note: {note}" for note in notes]
    return SelectionError(f"{who} {verb} {where}", fix, details)


_FIXABLE = ("missing_dep", "too_old", "failed", "missing_feature", "wrong_device")
"""The order in which fixes are worth trying: a package to install before a machine to buy."""


_PIP = "pip install"


def _best_fix(refusals: Sequence[Refusal]) -> str:
    """The first that is worth trying. Of packages that are missing, all: which of them serves best shows only with an
    offer."""
    with_fix = sorted((r for r in refusals if r.fix), key=lambda refusal: _FIXABLE.index(refusal.code))
    if not with_fix:
        return ""
    packages = [r.fix for r in with_fix if r.code == "missing_dep" and r.fix.startswith(_PIP)]
    return ", or: ".join(dict.fromkeys(packages)) if with_fix[0].fix in packages else with_fix[0].fix


def _command(fix: str) -> str:
    """A bare command becomes a sentence that can follow another."""
    return f"Install it with: {fix}" if fix.startswith(_PIP) else fix


def _line(backend: str, refusal: Refusal, purpose: Literal["run", "export"]) -> str:
    fix = f" -> {refusal.fix}" if refusal.fix else ""
    if purpose == "export":  # backends name the argument of `load`
        fix = fix.replace(option_prefix("device"), option_prefix("target"))
    return f"{backend} on {refusal.device_id}: {refusal.reason} [{refusal.code}]{fix}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
