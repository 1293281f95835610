"""Policies and counts in the engine: every step has its request's policy, and no count is lost.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fakes import FakeSession, FakeState, loaded, text_session

from transom.contract import SparseSession, Work
from transom.errors import EngineError, OptionError
from transom.generation.model import Model
from transom.generation.report import answer_line
from transom.generation.results import densities_of
from transom.sparsity import PRESETS, Sparsity

POLICY = Sparsity(0.5)


class CountingSession(FakeSession):
    """Counts one key read, of two, per token of a step; records policies."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"vocabulary": 259, **options})
        self.read: dict[FakeState, int] = {}
        self.policies: list[str | None] = []
        self.fails = False

    def step(self, work: Sequence[Work]) -> list[Any]:
        outputs = super().step(work)
        for w in work:
            self.policies.append(w.sparsity)
            self.read[w.state] = self.read.get(w.state, 0) + len(w.tokens)  # type: ignore[index,call-overload]
        return outputs

    def keys_read(self, state: FakeState) -> np.ndarray:
        state._use()
        if self.fails:
            raise LookupError("no counts today")
        count = float(self.read.get(state, 0))
        return np.array([[[count, 0.0]], [[2 * count, 0.0]]])


def test_a_session_that_counts_is_a_sparse_session() -> None:
    assert isinstance(CountingSession(), SparseSession)
    assert not isinstance(text_session(), SparseSession)


def test_every_work_of_a_request_has_its_policy(rng: Any) -> None:
    session = CountingSession(max_tokens=16)
    with Model(loaded(session)) as model:
        model.generate("x" * 50, max_new_tokens=5, ignore_eos=True, sparsity=POLICY)
        assert set(session.policies) == {POLICY.to_string()}
        assert len(session.policies) > 5
        session.policies.clear()
        model.logits("x" * 20, sparsity="off")
        model.generate("y", max_new_tokens=3)
        assert set(session.policies) == {None}


def test_the_policy_it_was_loaded_with_is_no_policy_of_a_call() -> None:
    session = CountingSession()
    with Model(loaded(session, sparsity=POLICY)) as model:
        result = model.generate("x", max_new_tokens=2, sparsity=POLICY)
        assert result.densities is not None
        assert model.generate("x", max_new_tokens=2, sparsity="off").densities is None
        assert session.policies[0] is None
        assert session.policies[-1] == "dense"


def test_a_call_gets_the_heads_of_the_model() -> None:
    session = CountingSession()
    with Model(loaded(session, heads=lambda: ((2.0,),))) as model:
        model.generate("x", max_new_tokens=1, sparsity="fast")
        mine = PRESETS["safe"].with_heads(((3.0,),))
        model.generate("x", max_new_tokens=1, sparsity=mine)
        assert session.policies[-2:] == [PRESETS["fast"].with_heads(((2.0,),)).to_string(), mine.to_string()]
        with pytest.raises(OptionError, match="heads for 2 layers, and the model has 1"):
            model.generate("x", sparsity=PRESETS["safe"].with_heads(((1.0,), (1.0,))))


def test_a_session_without_counts_refuses_a_policy_before_it_computes() -> None:
    session = text_session()
    with Model(loaded(session)) as model:
        for call in (model.generate, model.stream, model.chat, model.stream_chat, model.logits):
            with pytest.raises(OptionError, match="The backend fake supports only the policy"):
                call("x", sparsity="fast")
        assert session.steps == []
        assert model.generate("x", max_new_tokens=1, sparsity="off").densities is None
    assert session.violations == []


def test_densities_are_what_was_read_of_what_was_there(rng: Any) -> None:
    session = CountingSession(max_tokens=16)
    with Model(loaded(session)) as model:
        result = model.generate("x" * 40, max_new_tokens=5, n=2, temperature=1.0, ignore_eos=True, sparsity=POLICY)
        assert result.densities is not None
        np.testing.assert_array_equal(result.densities, [[0.5, np.nan]])  # one head of two is there
        assert result.density == 0.5
        assert result.to_dict()["densities"] == [[0.5, None]]
        assert "50% of the keys read" in answer_line(model.report, result)
    assert densities_of(None) is None


def test_what_a_sequence_read_before_it_gave_way_counts_too() -> None:
    session = CountingSession(page_tokens=4, pages=12, context=256)
    with Model(loaded(session)) as model:
        streams = [model.stream("x" * 18, max_new_tokens=14, ignore_eos=True, sparsity=POLICY) for _ in range(3)]
        for pieces in zip(*streams, strict=False):
            del pieces
        results = [s.result for s in streams]
        assert model._engine.preemptions > 0
        assert all(r.densities is not None for r in results)
        assert sum(s._request.keys_read[0, 0, 0] for s in streams) == sum(session.read.values())
    assert session.violations == []
    assert not session.live


def test_counts_that_fail_are_an_error_and_free_the_state() -> None:
    session = CountingSession()
    with Model(loaded(session)) as model:
        session.fails = True
        with pytest.raises(EngineError, match="no counts today"):
            model.generate("x", max_new_tokens=2, sparsity=POLICY)
        assert not session.live
        assert model.generate("x", max_new_tokens=2).densities is None  # not requested
        session.fails = False
        assert model.generate("x", max_new_tokens=1).token_ids
    assert session.violations == []
