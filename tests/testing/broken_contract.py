"""Backends that break the contract, each in one way: the conformance kit must catch every one of them.

Each class says in `caught_by` which checks must fail. They are the reference backend with one thing changed.
"""

from __future__ import annotations

import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from changed_reference import Changed, ChangedStates

from transom.contract import (
    Artifact,
    Cancelled,
    Claim,
    Device,
    Limits,
    Offer,
    Options,
    Progress,
    Refusal,
    Session,
    Verdict,
    Work,
)
from transom.graph import Graph
from transom.reference.executor import Executor
from transom.sessions import PackedSession, PackedState

Results = list[Any]


# states ---------------------------------------------------------------------------------------------------------------
class ForkSharesWrites(ChangedStates):
    """A fork is the same cache: a write to one is a write to all."""

    caught_by = ("state.copy_on_write", "state.fork")

    class state(PackedState):
        def fork(self, length: int) -> PackedState:
            if length == self.length:
                return self
            return super().fork(length)


class ForkMovesTheValues(ChangedStates):
    caught_by = ("state.fork",)

    class state(PackedState):
        def fork(self, length: int) -> PackedState:
            fork = super().fork(length)
            if 1 < length < self.length:  # keys and values fall apart
                fork._cache = [np.roll(part, i % 2, 0) for i, part in enumerate(fork.cache)]
            return fork


class PagesAreShared(ChangedStates):
    """Copy on write forgotten: forks share a mutable last page of four tokens."""

    caught_by = ("state.copy_on_write",)

    class state(PackedState):
        def fork(self, length: int) -> PackedState:
            fork = type(self)(self.cache, self.length)
            PackedState.truncate(fork, length)
            fork.family = self.family = getattr(self, "family", [])  # type: ignore[attr-defined]
            self.family.append(fork)  # type: ignore[attr-defined]
            return fork

        def append(self, cache: Any, tokens: int) -> None:
            start = self.length
            super().append(cache, tokens)
            for other in getattr(self, "family", []):
                if other is not self and other._cache is not None and other.length > start:
                    page = slice(start, min(start + tokens, other.length))
                    for mine, theirs in zip(self.cache, other.cache, strict=True):
                        theirs[page] = mine[page]


class TruncateForgetsNothing(ChangedStates):
    caught_by = ("state.truncate",)

    class state(PackedState):
        def truncate(self, length: int) -> None:
            if not 0 <= length <= self.length:
                raise ValueError("out of bounds")
            cut = self.length - length
            self._cache = [part[cut:] for part in self.cache]  # the wrong end
            self._length = length


class TruncateWipesSharedPages(ChangedStates):
    caught_by = ("state.truncate_fork",)

    class state(PackedState):
        def fork(self, length: int) -> PackedState:
            return type(self)(super().fork(length).cache, length)

        def truncate(self, length: int) -> None:
            if 0 <= length <= self.length:
                for part in self.cache:
                    part[length:] = 0
            super().truncate(length)


class FreeTakesTheForksAlong(ChangedStates):
    caught_by = ("state.outlives_parent",)

    class state(PackedState):
        def fork(self, length: int) -> PackedState:
            fork = super().fork(length)
            self.forks = [*getattr(self, "forks", []), fork]
            return fork

        def free(self) -> None:
            super().free()
            for fork in getattr(self, "forks", []):
                if fork._cache is not None:
                    fork._cache = [part * 0 for part in fork._cache]


class FreedStatesWork(ChangedStates):
    caught_by = ("state.free",)

    class state(PackedState):
        def free(self) -> None:
            pass


class FreeingTwiceRaises(ChangedStates):
    caught_by = ("state.free",)

    class state(PackedState):
        def free(self) -> None:
            _ = self.cache
            super().free()


class BoundsAreClamped(ChangedStates):
    caught_by = ("state.bounds",)

    class state(PackedState):
        def fork(self, length: int) -> PackedState:
            return super().fork(max(0, min(length, self.length)))


class ForkCountsNothingAnywhere(ChangedStates):
    caught_by = ("state.bytes",)

    class state(PackedState):
        @property
        def nbytes(self) -> int:
            return 0


# failures and limits --------------------------------------------------------------------------------------------------
class AppendsBeforeItLooks(Changed):
    """Runs the works one by one, so the first ones are done when the last one fails."""

    caught_by = ("failure.changes_nothing",)

    class session(PackedSession):
        def step(self, work: Sequence[Work]) -> Results:
            return [super(AppendsBeforeItLooks.session, self).step([w])[0] for w in work]


class WrongTokensWrapAround(Changed):
    caught_by = ("step.wrong_tokens", "failure.changes_nothing")

    class session(PackedSession):
        def step(self, work: Sequence[Work]) -> Results:
            return list(super().step([replace(w, tokens=[t % 61 for t in w.tokens]) for w in work]))


class RaisesTheWrongError(Changed):
    caught_by = ("step.wrong_tokens",)

    class session(PackedSession):
        def step(self, work: Sequence[Work]) -> Results:
            try:
                return list(super().step(work))
            except ValueError as e:
                raise IndexError(str(e)) from e


class NoContextLimit(Changed):
    caught_by = ("limits.context",)

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        session = super().load(artifact, device, options, scratch)
        session._limits = replace(session.limits, context=10**9)  # type: ignore[attr-defined]
        return session


class MoreSequencesThanItSays(Changed):
    caught_by = ("limits.sequences",)

    class session(PackedSession):
        said = False

        @property
        def limits(self) -> Limits:
            return replace(self._limits, max_sequences=2)


class ClosesOnce(Changed):
    caught_by = ("session.close_twice",)

    class session(PackedSession):
        def close(self) -> None:
            if self._closed:
                raise RuntimeError("closed already")
            super().close()


class ClosingOneClosesAll(Changed):
    caught_by = ("session.independent",)

    class session(PackedSession):
        open: ClassVar[list[PackedSession]] = []

        def new_state(self) -> PackedState:
            self.open.append(self)
            return super().new_state()

        def close(self) -> None:
            for each in self.open:
                each._closed = True
            self.open.clear()


class InputsMayBeMissing(Changed):
    caught_by = ("session.run_inputs",)

    def outputs(self, executor: Executor, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        names = executor.graph.input_names
        return executor.run({n: inputs.get(n, np.zeros((), np.float32)) for n in names})


# before anything runs -------------------------------------------------------------------------------------------------
class SilentOnOneNode(Changed):
    caught_by = ("claim.every_node", "logits.gqa")

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        return list(super().claim(graph, device, options))[:-1]


class RefusesWithoutReason(Changed):
    caught_by = ("claim.every_node",)

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        return [replace(c, ok=False) if c.node == "norm" else c for c in super().claim(graph, device, options)]


class ClaimsEverything(Changed):
    caught_by = ("claim.unknown_operator",)

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        return [Claim(str(n.name), True) for n in graph.nodes()]


class ClaimChangesTheGraph(Changed):
    caught_by = ("claim.every_node",)

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        for node in graph.nodes():
            if "epsilon" in node.attributes:
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
        return super().claim(graph, device, options)


class SilentOnUnknownDevices(Changed):
    caught_by = ("probe.answers",)

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        return [a for a in super().probe(devices) if isinstance(a, Offer)]


class RefusesDevicesWithoutWords(Changed):
    caught_by = ("probe.answers",)

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        return [replace(a, reason="") if isinstance(a, Refusal) else a for a in super().probe(devices)]


class ProbeImportsAnSDK(Changed):
    caught_by = ("probe.cheap",)

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        sys.modules.setdefault("tensorrt_rtx", types.ModuleType("tensorrt_rtx"))
        return super().probe(devices)


class SlowProbe(Changed):
    caught_by = ("probe.cheap",)

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        time.sleep(0.08)
        return super().probe(devices)


class SaysTheHostsVersion(Changed):
    caught_by = ("contract.form",)
    api = (1, 99)


# artifacts ------------------------------------------------------------------------------------------------------------
class NeverCallsProgress(Changed):
    caught_by = ("compile.progress",)

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        return super().compile(part, device, options, lambda stage, share: None)


class SwallowsCancelled(Changed):
    caught_by = ("compile.cancel",)

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        def quiet(stage: str, share: float | None) -> None:
            try:
                progress(stage, share)
            except Cancelled:
                print("too late")

        return super().compile(part, device, options, quiet)


class LeavesHalfAFile(Changed):
    caught_by = ("compile.cancel",)

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        (Path(tempfile.gettempdir()) / "half-done.bin").write_bytes(b"half")
        return super().compile(part, device, options, progress)


class RequiresNothing(Changed):
    caught_by = ("artifact.requires",)

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        return replace(super().compile(part, device, options, progress), requires={})

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        return Verdict("ok")


class AlwaysOk(Changed):
    caught_by = ("artifact.verdicts",)

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        return Verdict("ok")


class CheckCrashes(Changed):
    caught_by = ("artifact.verdicts",)

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        return Verdict("ok") if artifact.requires["format"] == "1" else Verdict("rebuild", "another format")


class CheckNeedsADriver(Changed):
    caught_by = ("check.any_device",)

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        if device.kind == "npu":
            return Verdict("rebuild", f"driver {device.drivers['npu']}")
        return super().check(artifact, device)


class CheckOpensFiles(Changed):
    caught_by = ("artifact.check_opens_nothing",)

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        there = all(isinstance(p, Path) and p.exists() for p in artifact.files.values())
        return super().check(artifact, device) if there else Verdict("rebuild", "files are missing")


class KeepsTheContextOfCompile(Changed):
    caught_by = ("load.context",)

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        return super().load(artifact, device, {**options, "context": None}, scratch)


class ArtifactLivesInThisProcess(Changed):
    caught_by = ("artifact.another_process",)
    graphs: ClassVar[dict[str, Graph]] = {}

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        artifact = super().compile(part, device, options, progress)
        self.graphs[part.digest()] = part
        return replace(artifact, files={"key": part.digest().encode()})

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        path = artifact.files["key"]
        assert isinstance(path, Path)
        executor = Executor(self.graphs[path.read_text()])
        decoder = executor.graph.decoder
        return PackedSession(executor.run, decoder, replace(self.limits, context=decoder.context if decoder else 1))
