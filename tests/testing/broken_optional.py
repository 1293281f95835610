"""Backends with optional protocols, sparse reading and saved states, that break the contract in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from changed_reference import Changed

from transom.contract import Artifact, Device, Options, Session, State, Tensor, Work
from transom.graph import Graph
from transom.reference.executor import Executor
from transom.reference.session import ReferenceSession
from transom.sessions import PackedSession, PackedState

Results = Sequence[Any]


class IgnoresPolicies(Changed):
    """A session that cannot read by a policy, but raises no error for one."""

    caught_by = ("sparsity.policies",)

    class session(PackedSession):
        def step(self, work: Sequence[Work]) -> Results:
            return super().step([replace(w, sparsity=None) for w in work])


class ChangedReading(Changed):
    """The reference's session, which reads by policies."""

    reading: type[ReferenceSession] = ReferenceSession

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        path = artifact.files["graph.onnx"]
        assert isinstance(path, Path)
        executor = Executor(Graph.open(path), keep_weights=True)
        decoder = executor.graph.decoder
        limits = replace(self.limits, context=options["context"] or (decoder.context if decoder else 1))
        return self.reading(executor, decoder, limits)


class CountsEverything(ChangedReading):
    caught_by = ("sparsity.policies",)

    class reading(ReferenceSession):
        def keys_read(self, state: State) -> Tensor:
            counts = np.array(super().keys_read(state))
            counts[0] = counts[1]
            return counts


class ForksGoOnCounting(ChangedReading):
    caught_by = ("sparsity.policies",)

    class reading(ReferenceSession):
        def keys_read(self, state: State) -> Tensor:
            counts: Any = super().keys_read(state)
            return counts if np.any(counts) else counts + 1


class ReadsLessThanEverything(ChangedReading):
    caught_by = ("sparsity.policies",)

    class reading(ReferenceSession):
        def step(self, work: Sequence[Work]) -> Results:
            return super().step([w if w.sparsity is None else replace(w, sparsity=_halved(w.sparsity)) for w in work])


def _halved(policy: str) -> str:
    from transom.sparsity import Sparsity

    return replace(Sparsity.from_string(policy), coverage=0.2, min_density=0.0, max_density=0.5).to_string()


class Saving(Changed):
    """Saves as it should; the classes below do not."""

    class session(PackedSession):
        def save(self, state: PackedState) -> Mapping[str, Tensor]:
            return {str(i): part for i, part in enumerate(state.cache)}

        def restore(self, length: int, arrays: Mapping[str, Any]) -> PackedState:
            empty = self.new_state().cache
            for i, part in enumerate(empty):
                found = arrays.get(str(i))
                if found is None or found.shape != (length, part.shape[1]) or len(arrays) != len(empty):
                    raise ValueError("these are not the arrays of a state")
            return PackedState([arrays[str(i)] for i in range(len(empty))], length)


class ForgetsTheLastToken(Saving):
    caught_by = ("state.saving",)

    class session(Saving.session):
        def save(self, state: PackedState) -> Mapping[str, Tensor]:
            rows = np.arange(state.length)[:, None] < state.length - 1
            return {name: np.asarray(part) * rows for name, part in super().save(state).items()}


class RestoresAnything(Saving):
    caught_by = ("state.saving",)

    class session(Saving.session):
        def restore(self, length: int, arrays: Mapping[str, Any]) -> PackedState:
            empty = self.new_state().cache
            whole = [np.resize(arrays.get(str(i), part), (length, part.shape[1])) for i, part in enumerate(empty)]
            return PackedState([part.astype(np.float32) for part in whole], length)


class SavesAndNeverRestores(Changed):
    caught_by = ("state.saving",)

    class session(PackedSession):
        def save(self, state: PackedState) -> Mapping[str, Tensor]:
            return {str(i): part for i, part in enumerate(state.cache)}


class SavesWhatWasFreed(Saving):
    caught_by = ("state.saving",)

    class session(Saving.session):
        def save(self, state: PackedState) -> Mapping[str, Tensor]:
            return {str(i): part for i, part in enumerate(state._cache or ())}
