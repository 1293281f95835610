"""Finding, loading and calling plugins, so that a broken plugin affects nothing else.

Every distribution may register an object with hooks under the entry-point group `transom.backends`. This module finds
these objects, imports them one at a time, checks each backend against the contract, and calls the hooks one plugin at a
time. Every error becomes a `PluginFailure` with the cause and the fix. No exception of a plugin leaves this module,
except `KeyboardInterrupt`. A plugin of others is imported, and asked about new devices, in a child process first, in
case it ends the process (`transom.plugin_trials`).

The module does not depend on devices, graphs or engines, imports no plugin's SDK, and is on the warm start-up path.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args, get_type_hints

import pluggy

from transom.contract import API_VERSION, ENTRY_POINT_GROUP, Backend, Device, Offer, Refusal, Specs
from transom.errors import OptionError, option

if TYPE_CHECKING:
    from transom.ops import OpSchema
    from transom.plugin_trials import Killed

Stage = Literal["import", "api", "contract", "name", "hook", "probe", "ops"]
T = TypeVar("T")

PROBE_BUDGET_SECONDS = 2.0
"""How long the host waits for one backend's `probe`. The contract asks for 0.05."""

_OWN_DISTRIBUTION = "transom"
_RESERVED_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "com.microsoft", "transom"})
_NAME = re.compile(r"[a-z][a-z0-9_\-]*")
_HOOKS = tuple(name for name in vars(Specs) if name.startswith("transom_"))
_METHODS = {n: m for n, m in vars(Backend).items() if inspect.isfunction(m) and not n.startswith("_")}


@dataclass(frozen=True)
class PluginFailure:
    """One error of one plugin, as data that reports, `doctor` and error messages can show."""

    entry_point: str
    """The entry point's name; both names, separated by a comma, where two plugins collide."""
    distribution: str
    """The distribution that installed it; both, separated by a comma, where two plugins collide."""
    stage: Stage
    error: str
    fix: str
    traceback: str = field(default="", compare=False, repr=False)
    """The traceback, for the plugin's author; empty where nothing was raised."""

    def __str__(self) -> str:
        return f"plugin {self.entry_point} ({self.distribution}) failed at {self.stage}: {self.error}. {self.fix}"


@dataclass(frozen=True)
class LoadedBackend:
    """A backend that passed the contract's checks."""

    backend: Backend
    name: str
    distribution: str
    version: str
    """The distribution's version."""
    entry_point: str
    found: _EntryPoint | None = field(default=None, compare=False, repr=False)
    """Where it was found, to try it in a child process; None for an object that a program made itself."""

    @property
    def core(self) -> bool:
        """Whether it comes with Transom's own distribution."""
        return self.distribution == _OWN_DISTRIBUTION


@dataclass(frozen=True)
class ProbeAnswers:
    """The backends' answers about the devices."""

    answers: tuple[tuple[str, Offer | Refusal], ...]
    """(backend, answer), one for each backend and device. A backend that failed has refusals with the code `failed`."""
    failures: tuple[PluginFailure, ...]
    seconds: Mapping[str, float]
    """How long each backend's `probe` took."""


@dataclass(frozen=True)
class _Plugin:
    """An imported entry point and a pluggy manager that knows only this plugin."""

    entry_point: str
    distribution: str
    version: str
    manager: pluggy.PluginManager
    found: _EntryPoint | None = None

    @property
    def label(self) -> str:
        return f"{self.entry_point} ({self.distribution} {self.version})"

    def implements(self, hook: str) -> bool:
        return bool(getattr(self.manager.hook, hook).get_hookimpls())

    def list(self, hook: str, what: str) -> list[Any]:
        """The hook's result as a list. Raises what the plugin raises, and TypeError when the result is not iterable."""
        return _listed(getattr(self.manager.hook, hook)(), what)


@dataclass(frozen=True)
class _Raised:
    """An exception of a plugin: one line for the user, the traceback for the plugin's author."""

    line: str
    missing_module: str
    traceback: str


@dataclass(frozen=True)
class _Result(Generic[T]):
    value: T | None = None
    raised: _Raised | None = None


def _shield(call: Callable[..., T], *arguments: Any) -> _Result[T]:
    """Call into a plugin and turn any exception into data. The only place that catches everything."""
    try:
        return _Result(value=call(*arguments))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a plugin may raise anything, SystemExit included; it is recorded
        import traceback  # slow to import, and needed only after an error

        first = str(error).strip().splitlines()
        kind = type(error).__name__
        line = f"{kind}: {first[0]}" if first else kind
        if isinstance(error, SystemExit):
            line = f"it called sys.exit({error.code!r})"
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        return _Result(raised=_Raised(line, missing, "".join(traceback.format_exception(error))))


def _failure(
    owner: _EntryPoint | _Plugin | LoadedBackend, stage: Stage, error: str, fix: str = "", traceback: str = ""
) -> PluginFailure:
    fix = fix or _repair(owner.distribution)
    return PluginFailure(owner.entry_point, owner.distribution, stage, error, fix, traceback)


def _repair(distribution: str) -> str:
    """The fix for a broken plugin when nothing more is known."""
    if distribution == _OWN_DISTRIBUTION:
        return "Reinstall Transom: pip install --force-reinstall transom"
    return f"Update it with: pip install --upgrade {distribution} or remove it with: pip uninstall {distribution}"


class Plugins:
    """The plugins found under the entry-point group, and their failures.

    Attributes:
        backends: the usable backends by name, sorted by name.
        failures: all failures so far; `probe`, `choose` and `operators` add more.
    """

    def __init__(
        self, plugins: Sequence[_Plugin], backends: Sequence[LoadedBackend], failures: Iterable[PluginFailure]
    ) -> None:
        self._plugins = tuple(plugins)
        self.backends: Mapping[str, LoadedBackend] = MappingProxyType({b.name: b for b in backends})
        self.failures: list[PluginFailure] = list(failures)
        self._given_up: dict[str, PluginFailure] = {}
        self._operators: list[OpSchema] | None = None
        self._owners: dict[tuple[str, str], _Plugin] = {}
        self._lock = threading.RLock()

    def _record(self, failure: PluginFailure) -> PluginFailure:
        with self._lock:
            if failure not in self.failures:
                self.failures.append(failure)
        return failure

    def operators(self) -> list[OpSchema]:
        """The operators that plugins add through `transom_ops`. The hooks are called once, on the first call.

        Operators in a reserved domain are rejected, and so is an operator that two plugins define.
        """
        with self._lock:
            if self._operators is None:
                self._operators = self._collect_operators()
            return list(self._operators)

    def _collect_operators(self) -> list[OpSchema]:
        found: dict[tuple[str, str], list[tuple[_Plugin, OpSchema]]] = {}
        for plugin in self._plugins:
            if not plugin.implements("transom_ops"):
                continue
            result = _shield(plugin.list, "transom_ops", "operators")
            if result.raised:
                self._fail(plugin, "ops", f"transom_ops: {result.raised.line}", traceback=result.raised.traceback)
            for schema in result.value or ():
                key = _shield(lambda schema: (schema.domain, schema.name), schema).value
                if key is None or not all(isinstance(part, str) for part in key) or not key[1]:
                    self._fail(plugin, "ops", f"transom_ops returned {schema!r:.80}, which is not an OpSchema")
                elif key[0] in _RESERVED_DOMAINS:
                    self._fail(
                        plugin,
                        "ops",
                        f'{key[0] or "ai.onnx"}::{key[1]}: a plugin may not add to the domain "{key[0]}"',
                        "Give the operator a domain of the plugin's own, such as com.example",
                    )
                else:
                    found.setdefault(key, []).append((plugin, schema))
        for (domain, name), owners in found.items():
            if len(owners) > 1:
                self._record(_collision(f"the operator {domain}::{name}", [p for p, _ in owners], "ops"))
        self._owners = {key: owners[0][0] for key, owners in found.items() if len(owners) == 1}
        return [owners[0][1] for owners in found.values() if len(owners) == 1]

    def reject(self, schema: OpSchema, error: str) -> None:
        """Record that one of `operators` cannot be used, as a failure of the plugin that defines it."""
        self._fail(self._owners[(schema.domain, schema.name)], "ops", error)

    def bringing_operators(self) -> list[tuple[str, str, str, object]]:
        """Distribution, version, entry point and object of each plugin with the hook `transom_ops`. Calls no hook."""
        return [
            (p.distribution, p.version, p.entry_point, p.manager.get_plugin(p.entry_point))
            for p in self._plugins
            if p.implements("transom_ops")
        ]

    def _fail(self, plugin: _Plugin, stage: Stage, error: str, fix: str = "", traceback: str = "") -> PluginFailure:
        return self._record(_failure(plugin, stage, error, fix, traceback))

    def choose(self, offers: Sequence[tuple[str, Offer]]) -> tuple[str, str] | None:
        """Call the `transom_choose` hooks, one plugin at a time, and return (backend, plugin that chose it).

        The first hook that names a backend among `offers` wins, in the order of the distributions' names. A hook that
        raises or names another backend is recorded as a failure, and the next one is called.
        """
        known = sorted({name for name, _ in offers})
        for plugin in self._plugins:
            if not plugin.implements("transom_choose"):
                continue
            result: _Result[Any] = _shield(lambda p: p.manager.hook.transom_choose(offers=tuple(offers)), plugin)
            if result.raised:
                self._fail(plugin, "hook", f"transom_choose: {result.raised.line}", traceback=result.raised.traceback)
            elif result.value in known:
                return str(result.value), plugin.label
            elif result.value is not None:
                self._fail(
                    plugin,
                    "hook",
                    f"transom_choose returned {result.value!r:.80}, which made no offer",
                    f"Return None or one of: {', '.join(known) or 'none'}",
                )
        return None

    def probe(self, devices: Sequence[Device], budget_seconds: float | None = None) -> ProbeAnswers:
        """Ask every backend about every device.

        Backends are asked one after the other, so that the time of a slow one is not counted for another. Each runs in
        a thread that can be abandoned. A backend that raises, hangs or breaks the contract is recorded as a failure and
        gets refusals with the code `failed`. A backend that hung is not asked again in this process.

        Args:
            devices: the devices that the host detected, and the remote targets that the user named.
            budget_seconds: the time for each backend; None: `TRANSOM_PROBE_BUDGET`, else `PROBE_BUDGET_SECONDS`.

        Raises:
            OptionError: `TRANSOM_PROBE_BUDGET` is not a positive number.
        """
        budget = _budget() if budget_seconds is None else budget_seconds
        answers: list[tuple[str, Offer | Refusal]] = []
        failures: list[PluginFailure] = []
        seconds: dict[str, float] = {}
        for name, loaded in self.backends.items():
            known, groups = _known_to(loaded, devices)
            failure = self._given_up.get(name) or self._try_probe(loaded, known)
            if failure is None:
                started = time.perf_counter()
                judged = self._probe_one(loaded, known, budget)
                seconds[name] = time.perf_counter() - started
                if not isinstance(judged, PluginFailure):
                    answers += [(name, answer) for answer in (*judged, *groups)]
                    continue
                failure = judged
            failures.append(failure)
            answers += [(name, Refusal(d.id, "failed", failure.error, failure.fix)) for d in devices]
        _went_well(loaded.found for loaded in self.backends.values())
        return ProbeAnswers(tuple(answers), tuple(failures), seconds)

    def _try_probe(self, loaded: LoadedBackend, devices: tuple[Device, ...]) -> PluginFailure | None:
        how = None if loaded.found is None else _kills(loaded.found, devices)
        if how is None:
            return None
        failure = self._record(_failure(loaded, "probe", f"the probe of {loaded.name} {how}", "", how.output))
        self._given_up[loaded.name] = failure
        return failure

    def _probe_one(
        self, loaded: LoadedBackend, devices: tuple[Device, ...], budget: float
    ) -> list[Offer | Refusal] | PluginFailure:
        def failed(error: str, trace: str = "") -> PluginFailure:
            return self._record(_failure(loaded, "probe", error, traceback=trace))

        result = _within(budget, lambda: _listed([loaded.backend.probe(devices)], "answers"))
        if result is None:
            failure = failed(f"the probe of {loaded.name} did not answer within {budget:g} s")
            self._given_up[loaded.name] = failure
            return failure
        if result.raised:
            return failed(f"the probe of {loaded.name} raised {result.raised.line}", result.raised.traceback)
        answers = result.value or []
        if complaint := _wrong_answers(devices, answers):
            return failed(f"the probe of {loaded.name} {complaint}")
        place = {device.id: index for index, device in enumerate(devices)}
        return sorted(answers, key=lambda answer: place[answer.device_id])


def _known_to(loaded: LoadedBackend, devices: Sequence[Device]) -> tuple[tuple[Device, ...], list[Refusal]]:
    """The devices to ask a backend about, and refusals for groups of devices when its API version has no groups."""
    if tuple(loaded.backend.api) >= GROUPS_SINCE:
        return tuple(devices), []
    reason = "runs on one device at a time"
    groups = [
        Refusal(d.id, "wrong_device", reason, f"Use {option('device', d.members[0].id)}") for d in devices if d.members
    ]
    return tuple(d for d in devices if not d.members), groups


GROUPS_SINCE = (1, 3)
"""The API version that added `Device.members`."""


def _budget() -> float:
    text = os.environ.get("TRANSOM_PROBE_BUDGET", "").strip()
    if not text:
        return PROBE_BUDGET_SECONDS
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise OptionError(f'TRANSOM_PROBE_BUDGET is "{text}", not a positive number', "Give seconds, such as 2")
    return value


def _within(seconds: float, call: Callable[[], T]) -> _Result[T] | None:
    """Call in a daemon thread. Returns None when the call does not finish in time; the thread then keeps running."""
    box: list[_Result[T]] = []
    thread = threading.Thread(target=lambda: box.append(_shield(call)), name="transom-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    return box[0] if box else None


def _wrong_answers(devices: Sequence[Device], answers: Sequence[object]) -> str:
    """How a backend's answers break the contract; empty when they do not."""
    if len(answers) != len(devices):
        return f"gave {len(answers)} answers for {len(devices)} devices"
    seen: set[str] = set()
    for answer in answers:
        if not isinstance(answer, Offer | Refusal):
            return f"answered with a {type(answer).__name__}, not an Offer or a Refusal"
        if answer.device_id in seen:
            return f"answered twice for {answer.device_id}"
        seen.add(answer.device_id)
        kind = type(answer).__name__
        field_name, text = ("why", answer.why) if isinstance(answer, Offer) else ("reason", answer.reason)
        if not isinstance(text, str) or not text.strip():
            return f"gave no {field_name} in its {kind} for {answer.device_id}"
        allowed, value = (_BANDS, answer.band) if isinstance(answer, Offer) else (_CODES, answer.code)
        if value not in allowed:
            return f"gave {value!r} in its {kind} for {answer.device_id}; allowed are {', '.join(allowed)}"
    if strangers := sorted(seen - {device.id for device in devices}):
        return f"answered for {', '.join(strangers)}, which it was not asked about"
    return ""


_BANDS: tuple[str, ...] = get_args(get_type_hints(Offer)["band"])
_CODES: tuple[str, ...] = get_args(get_type_hints(Refusal)["code"])


def _listed(results: Any, what: str) -> list[Any]:
    """The list inside a hook's results, `[iterable]`; pluggy omits None.

    Raises:
        TypeError: the result is not an iterable of items. Exceptions of the iterable are not caught.
    """
    value = results[0] if results else None
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"returned {'None' if value is None else type(value).__name__}, not an iterable of {what}")
    return list(value)


def _collision(what: str, owners: Sequence[_Plugin], stage: Stage) -> PluginFailure:
    points = list(dict.fromkeys(owner.entry_point for owner in owners))
    distributions = list(dict.fromkeys(owner.distribution for owner in owners))
    where = " and ".join(owner.label for owner in owners)
    others = [d for d in distributions if d != _OWN_DISTRIBUTION]
    if len(distributions) > 1:
        fix = f"Uninstall all but one, for example: pip uninstall {others[-1]}"
    else:
        fix = _repair(distributions[0])
    return PluginFailure(
        ", ".join(points),
        ", ".join(distributions),
        stage,
        f"{what} is defined more than once, by {where}; none of them is used",
        fix,
    )


def _taken(what: str, plugin: _Plugin, stage: Stage) -> PluginFailure:
    """A plugin of others uses a name of Transom's own: ours stays."""
    error = f"{what} belongs to a backend that comes with Transom, which is used; this one is not"
    fix = f"Ask its authors for another name, or remove it with: pip uninstall {plugin.distribution}"
    return _failure(plugin, stage, error, fix)


@dataclass(frozen=True)
class _EntryPoint:
    """An entry point of our group and its distribution."""

    point: importlib.metadata.EntryPoint
    distribution: str
    version: str

    @property
    def entry_point(self) -> str:
        return self.point.name


def _entry_points() -> Iterator[_EntryPoint | PluginFailure]:
    """The entry points of our group, without shadowed copies of a distribution.

    Reads the text of each `entry_points.txt` and parses only those that name the group. Most of the cost of
    `importlib.metadata.entry_points` is parsing all of them and the metadata of each distribution.
    """
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        text = _shield(distribution.read_text, "entry_points.txt").value
        if not text or ENTRY_POINT_GROUP not in text:
            continue
        result = _shield(_read, distribution)
        if result.value is None:
            where = str(getattr(distribution, "_path", "unknown"))
            line = result.raised.line if result.raised else ""
            error = f"the metadata in {where} cannot be read: {line}"
            yield PluginFailure(ENTRY_POINT_GROUP, where, "import", error, "Reinstall or delete that distribution")
            continue
        name = result.value[0].distribution if result.value else ""
        if name not in seen:
            seen.add(name)
            yield from result.value


def _read(distribution: importlib.metadata.Distribution) -> list[_EntryPoint]:
    name, version = distribution.metadata["Name"], distribution.metadata["Version"]
    if not name:
        raise ValueError("it has no name")
    name = re.sub(r"[-_.]+", "-", str(name)).lower()
    points = [point for point in distribution.entry_points if point.group == ENTRY_POINT_GROUP]
    return [_EntryPoint(point, name, str(version or "unknown")) for point in points]


def _kills(found: _EntryPoint, devices: Sequence[Device] = ()) -> Killed | None:
    """How a plugin of others ends a child process that imports it, and probes the devices; None if it does not."""
    if found.distribution == _OWN_DISTRIBUTION:
        return None
    from transom.plugin_trials import Killed, try_first  # imports what starts a process

    try:
        try_first(found.point, found.version, devices, f"{__name__}:{rehearse.__name__}")
    except Killed as killed:
        return killed
    return None


def _went_well(found: Iterable[_EntryPoint | None]) -> None:
    """The plugins have been imported, or have answered."""
    if any(one is not None and one.distribution != _OWN_DISTRIBUTION for one in found):
        from transom.plugin_trials import went_well

        went_well()


def rehearse(name: str, value: str, devices: Sequence[Device]) -> None:
    """Import a plugin and have its backends probe these devices, in a child process.

    What it raises, and a probe that hangs, are met again in the host.
    """
    point = importlib.metadata.EntryPoint(name, value, ENTRY_POINT_GROUP)
    plugin = _import(_EntryPoint(point, "", ""))
    if isinstance(plugin, PluginFailure):
        return
    for backend in list(_backends_of(plugin)):
        if isinstance(backend, LoadedBackend) and devices:
            _within(PROBE_BUDGET_SECONDS, partial(backend.backend.probe, tuple(devices)))


def _import(found: _EntryPoint) -> _Plugin | PluginFailure:
    point, distribution = found.point, found.distribution
    result: _Result[Any] = _shield(point.load)
    if result.raised:
        missing = result.raised.missing_module
        fix = ""
        if missing and missing.split(".")[0] != point.value.split(".")[0].split(":")[0]:
            fix = f"Install the module {missing}, or remove the plugin with: pip uninstall {distribution}"
        return _failure(found, "import", result.raised.line, fix, result.raised.traceback)
    if isinstance(result.value, type):
        return _failure(found, "contract", f"{point.value} is a class; an entry point names a module or an instance")
    manager = pluggy.PluginManager("transom")
    manager.add_hookspecs(Specs)
    registered = _shield(manager.register, result.value, point.name)
    if registered.raised:
        trace = registered.raised.traceback
        return _failure(found, "hook", f"a hook does not fit the contract: {trace.strip().splitlines()[-1]}", "", trace)
    return _Plugin(point.name, distribution, found.version, manager, found)


def _hook_complaints(plugin: _Plugin) -> Iterator[str]:
    """Complaints about hooks that would never be called: misspelt or not marked; or about a plugin without hooks."""
    instance = plugin.manager.get_plugin(plugin.entry_point)
    callers = plugin.manager.get_hookcallers(instance) or []
    marked = {caller.name for caller in callers}
    for caller in sorted(callers, key=lambda caller: caller.name):
        # With `optionalhook` the plugin's author expects hosts without the hook.
        if caller.name not in _HOOKS and not all(impl.optionalhook for impl in caller.get_hookimpls()):
            near = difflib.get_close_matches(caller.name, _HOOKS, n=1, cutoff=0.0)[0]
            yield f'there is no hook "{caller.name}"; the nearest is "{near}"'
    unmarked = [name for name in _HOOKS if name not in marked and _shield(getattr, instance, name).value is not None]
    for name in unmarked:
        yield f'"{name}" is not marked with @transom.contract.hookimpl, so it is not called'
    if not marked and not unmarked:
        yield f"it implements no hook; the hooks are {', '.join(_HOOKS)}"


def _backends_of(plugin: _Plugin) -> Iterator[LoadedBackend | PluginFailure]:
    for complaint in _hook_complaints(plugin):
        yield _failure(plugin, "hook", complaint)
    if not plugin.implements("transom_backends"):
        return
    result = _shield(plugin.list, "transom_backends", "backends")
    if result.raised:
        yield _failure(plugin, "hook", f"transom_backends: {result.raised.line}", "", result.raised.traceback)
        return
    for backend in result.value or ():
        judged = _shield(_judge, backend)
        if judged.raised:
            yield _failure(plugin, "contract", f"{_kind(backend)}: {judged.raised.line}", "", judged.raised.traceback)
        elif judged.value is not None:
            stage, error, fix = judged.value
            yield _failure(plugin, stage, f"{_kind(backend)}: {error}", fix.format(distribution=plugin.distribution))
        else:
            yield LoadedBackend(
                backend, backend.name, plugin.distribution, plugin.version, plugin.entry_point, plugin.found
            )


def _kind(backend: object) -> str:
    return backend.__name__ if isinstance(backend, type) else type(backend).__name__


def _judge(backend: Any) -> tuple[Stage, str, str] | None:
    """(stage, error, fix) for a backend that breaks the contract; None for a valid one."""
    if isinstance(backend, type):
        return "contract", "transom_backends returned the class, not an instance of it", ""
    if not hasattr(backend, "api") and not any(hasattr(backend, name) for name in _METHODS):
        return "contract", "transom_backends returned something that is not a backend", ""
    api = getattr(backend, "api", None)
    if not (isinstance(api, tuple) and len(api) == 2 and all(type(part) is int for part in api)):
        return "api", f"its api is {api!r:.40}, not two whole numbers such as (1, 0)", ""
    host = f"{API_VERSION[0]}.{API_VERSION[1]}"
    if api[0] < API_VERSION[0]:
        fix = "Update the plugin with: pip install --upgrade {distribution}"
        return "api", f"it was written for API {api[0]}.{api[1]}, this is Transom with API {host}", fix
    if api[0] > API_VERSION[0] or api[1] > API_VERSION[1]:
        fix = "Update Transom with: pip install --upgrade transom or install an older {distribution}"
        return "api", f"it needs API {api[0]}.{api[1]}, this is Transom with API {host}", fix
    missing = [name for name in _METHODS if not callable(getattr(backend, name, None))]
    if missing:
        return "contract", f"the method {', '.join(missing)} is missing", ""
    for name, wanted in _METHODS.items():
        arguments = list(inspect.signature(wanted).parameters)[1:]
        try:
            inspect.signature(getattr(backend, name)).bind(*arguments)
        except TypeError:
            return "contract", f"{name} does not take ({', '.join(arguments)})", ""
        except ValueError:
            continue  # a built-in without a signature cannot be checked before it is called
    own_name = getattr(backend, "name", None)
    if not isinstance(own_name, str) or not _NAME.fullmatch(own_name) or own_name == "auto":
        return "contract", f"its name is {own_name!r:.40}, not a short identifier such as my_backend", ""
    return None


def _load() -> Plugins:
    failures: list[PluginFailure] = []
    plugins: list[_Plugin] = []
    found: list[_EntryPoint] = []
    for item in _entry_points():
        found.append(item) if isinstance(item, _EntryPoint) else failures.append(item)
    found.sort(key=lambda f: (f.distribution != _OWN_DISTRIBUTION, f.distribution, f.point.name))
    for one in found:
        if (how := _kills(one)) is not None:
            failures.append(_failure(one, "import", f"its import {how}", "", how.output))
            continue
        imported = _import(one)
        if isinstance(imported, PluginFailure):
            failures.append(imported)
        else:
            plugins.append(imported)
    owners: dict[str, list[tuple[_Plugin, LoadedBackend]]] = {}
    for plugin in plugins:
        for made in _backends_of(plugin):
            if isinstance(made, PluginFailure):
                failures.append(made)
            else:
                owners.setdefault(made.name, []).append((plugin, made))
    _went_well(found)
    backends: list[LoadedBackend] = []
    for name in sorted(owners):
        ours = [one for one in owners[name] if one[1].core]
        if len(owners[name]) == 1 or len(ours) == 1:
            backends.append((ours or owners[name])[0][1])
            others = [plugin for plugin, made in owners[name] if made is not backends[-1]]
            failures += [_taken(f'the name "{name}"', plugin, "name") for plugin in others]
        else:
            failures.append(_collision(f'the backend "{name}"', [plugin for plugin, _ in owners[name]], "name"))
    return Plugins(plugins, backends, failures)


_loaded: Plugins | None = None
_loading = threading.RLock()


def load_plugins(*, refresh: bool = False) -> Plugins:
    """Find and load every plugin, once per process. Never raises because of a plugin.

    Args:
        refresh: search again, for a process that installs plugins while it runs.
    """
    global _loaded
    with _loading:
        if _loaded is None or refresh:
            _loaded = _load()
        return _loaded
