"""The plan that compile writes for load, a small JSON file beside the compiled stages."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from transom.signature import Decoder
from transom.typed import from_json


@dataclass(frozen=True)
class StagePlan:
    """One compiled stage."""

    name: str
    file: str
    outputs: tuple[str, ...]
    config: dict[str, str]
    """Properties for compiling, which are passed again on import, since the file lacks some of them."""


class _Written(TypedDict):
    """What `EnginePlan.to_json` writes."""

    stages: tuple[StagePlan, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    decoder: str | None
    paged: bool
    native: str
    limit: int
    summed: tuple[str, ...]
    cut: tuple[str, ...]


@dataclass(frozen=True)
class EnginePlan:
    """How to run an artifact."""

    stages: tuple[StagePlan, ...]
    inputs: tuple[str, ...]
    """Inputs of the graph; `run` takes exactly these."""
    outputs: tuple[str, ...]
    decoder: Decoder | None
    paged: bool
    native: str = ""
    """The instruction set of the native library that runs the decoder; empty if OpenVINO runs it."""
    limit: int = 0
    """What integers of the inputs may reach, as in `integers.Integers`, like the next two; 0: they are not checked."""
    summed: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()

    def to_json(self) -> str:
        raw = asdict(self)
        raw["decoder"] = None if self.decoder is None else self.decoder.to_json()
        return json.dumps(raw, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> EnginePlan:
        """The inverse of `to_json`. Raises ValueError for anything else."""
        raw: Any = from_json(_Written, text)
        return cls(**{**raw, "decoder": None if raw["decoder"] is None else Decoder.from_json(raw["decoder"])})
