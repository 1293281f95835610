"""The reference backend with hooks, for making deliberately broken backends."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from transom.contract import (
    Artifact,
    Device,
    Limits,
    Options,
    Session,
    Work,
)
from transom.graph import Graph
from transom.reference import ReferenceBackend
from transom.reference.executor import Executor
from transom.sessions import PackedSession, PackedState

Results = list[Any]


class Changed(ReferenceBackend):
    """The reference, with hooks for what the classes below change."""

    name = "changed"
    caught_by: ClassVar[tuple[str, ...]] = ()
    session: type[PackedSession] = PackedSession
    limits = Limits(64, 4096, 0, 0)

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        path = artifact.files["graph.onnx"]
        assert isinstance(path, Path)
        executor = Executor(self.edit(Graph.open(path)), keep_weights=True)
        decoder = executor.graph.decoder
        limits = replace(self.limits, context=options["context"] or (decoder.context if decoder else 1))
        return self.session(lambda inputs: self.outputs(executor, inputs), decoder, limits)

    def edit(self, graph: Graph) -> Graph:
        return graph

    def outputs(self, executor: Executor, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return executor.run(inputs)


class ChangedLogits(Changed):
    """Changes the results of a step; each kind of change says how in `alter`."""

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        session = super().load(artifact, device, options, scratch)
        step, alter = session.step, self.alter
        session.step = lambda work: alter(list(step(work)), work)  # type: ignore[method-assign]
        return session

    def alter(self, results: Results, work: Sequence[Work]) -> Results:
        raise TypeError(f"{type(self).__name__} does not say what it changes")


class ChangedStates(Changed):
    state: type[PackedState] = PackedState

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        session = super().load(artifact, device, options, scratch)
        new, kind = session.new_state, self.state
        session.new_state = lambda: kind(new().cache, 0)  # type: ignore[method-assign]
        return session


def broken_in(module: types.ModuleType) -> Iterator[type[Changed]]:
    """Every class of the module that says what must catch it."""
    for item in vars(module).values():
        if isinstance(item, type) and issubclass(item, Changed) and item.caught_by:
            yield item
