"""Programs of any backend are read back as they were written, and other texts are refused."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from transom.programs.written import NOWHERE, RopeTable, View, from_json, to_json


@dataclass(frozen=True)
class SampleOp:
    kind: str
    dst: View = NOWHERE
    scale: float = 1.0


@dataclass(frozen=True)
class SampleProgram:
    name: str
    ops: tuple[SampleOp, ...]
    ropes: tuple[RopeTable, ...]
    widths: tuple[int, ...]
    output: int


SAMPLE = SampleProgram("made", (SampleOp("a"), SampleOp("b", View(1, 16), 0.5)), (RopeTable(256, 8, 1.0),), (4, 8), 1)


def test_a_program_is_read_back_as_it_was_written() -> None:
    assert from_json(SampleProgram, to_json(SAMPLE)) == SAMPLE


@pytest.mark.parametrize(
    "change",
    [
        {"ops": [["a"]]}, {"ops": [{"kind": "a", "more": 1}]}, {"ops": [{}]}, {"ropes": 3}, {"ropes": [{"at": 1}]},
        {"widths": ["wide"]}, {"output": None},
    ],
)  # fmt: skip
def test_what_is_no_program_is_refused(change: dict[str, object]) -> None:
    raw = json.loads(to_json(SAMPLE))
    with pytest.raises((ValueError, TypeError)):
        from_json(SampleProgram, json.dumps(raw | change))
    with pytest.raises(KeyError):
        from_json(SampleProgram, json.dumps({name: value for name, value in raw.items() if name not in change}))
