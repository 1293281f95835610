"""The reference's session applies a policy per work item and counts the keys read.

Draws: a step in pieces sums in another order, about 1e-6 of 1e-4; the policy reads less by far than all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from transom.contract import Limits, Session, SparseSession, State, Work
from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.ops import Array
from transom.reference.executor import Executor
from transom.reference.session import ReferenceSession
from transom.sessions import PackedSession
from transom.sparsity import PRESETS, Sparsity
from transom.testing.models import tiny_decoder

LIMITS = Limits(max_sequences=4, max_tokens=1024, context=600, page_tokens=0)
POLICY = Sparsity(0.3, columns=4, dense_below=0, max_density=0.6)
OTHER = Sparsity(1.0, columns=0, top_k=1, dense_below=0, max_density=0.6)


def made(graph: Graph) -> ReferenceSession:
    return ReferenceSession(Executor(graph, keep_weights=True), graph.decoder, LIMITS)


def drawn(rng: np.random.Generator, count: int) -> list[int]:
    return [int(t) for t in rng.integers(0, 61, count)]


def logits(session: Session, tokens: list[int], sparsity: str | None = None) -> Array:
    """A prefill of all but the last three tokens, then decodes."""
    state, rows = session.new_state(), []
    for part in (tokens[:-3], *([t] for t in tokens[-3:])):
        rows.append(np.asarray(session.step([Work(state, part, "all", sparsity=sparsity)])[0]))
    return np.concatenate(rows)


@pytest.fixture
def graph(rng: np.random.Generator) -> Graph:
    return tiny_decoder(rng, context=600)


def test_it_is_a_sparse_session_and_a_packed_one_is_not(graph: Graph) -> None:
    assert isinstance(made(graph), SparseSession)
    packed = PackedSession(Executor(graph).run, graph.decoder, LIMITS)
    assert not isinstance(packed, SparseSession)
    state = packed.new_state()
    with pytest.raises(ValueError, match="takes no sparsity policy"):
        packed.step([Work(state, [1], sparsity="dense")])
    assert state.length == 0


def test_a_policy_for_a_work_is_as_good_as_one_in_the_graph(graph: Graph, rng: np.random.Generator) -> None:
    tokens = drawn(rng, 400)
    inside = made(with_sparsity(graph, POLICY))
    wanted = logits(inside, tokens)
    np.testing.assert_array_equal(logits(made(graph), tokens, POLICY.to_string()), wanted)
    dense = logits(made(graph), tokens)
    assert np.abs(wanted - dense).max() > 1e-3
    np.testing.assert_array_equal(logits(inside, tokens, "dense"), dense)


def test_works_of_one_step_each_have_their_own(graph: Graph, rng: np.random.Generator) -> None:
    session = made(graph)
    prompts = [drawn(rng, n) for n in (300, 250, 1, 270)]
    texts = [POLICY.to_string(), None, "dense", OTHER.to_string()]
    alone = []
    for prompt, text in zip(prompts, texts, strict=True):
        state = session.new_state()
        alone.append(session.step([Work(state, prompt, "all", sparsity=text)])[0])
    together = session.step(
        [Work(session.new_state(), p, "all", sparsity=t) for p, t in zip(prompts, texts, strict=True)]
    )
    for got, want in zip(together, alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def count(session: ReferenceSession, state: State) -> Array:
    return np.asarray(session.keys_read(state))


def test_dense_reads_every_key(graph: Graph, rng: np.random.Generator) -> None:
    session = made(graph)
    state = session.new_state()
    assert not count(session, state).any()
    session.step([Work(state, drawn(rng, 100), "none")])
    # blocks of 64 and 36 queries, and the keys that the last of each sees
    assert (count(session, state) == 64 * 64 + 36 * 100).all()
    session.step([Work(state, [5], "none")])
    assert (count(session, state) == 64 * 64 + 36 * 100 + 101).all()


def test_a_policy_reads_less_and_dense_heads_do_not(graph: Graph, rng: np.random.Generator) -> None:
    session = made(graph)
    state = session.new_state()
    policy = POLICY.with_heads(((1.0, 0.0), (1.0, 1.0)))
    session.step([Work(state, drawn(rng, 500), "none", sparsity=policy.to_string())])
    read, there = count(session, state)
    assert (there == there[0, 0]).all()
    assert read[0, 1] == there[0, 1]
    assert (read[[0, 1, 1], [0, 0, 1]] < there[0, 0]).all()


def test_a_fork_counts_anew_and_a_freed_state_raises(graph: Graph, rng: np.random.Generator) -> None:
    session = made(graph)
    state = session.new_state()
    session.step([Work(state, drawn(rng, 80), "none")])
    fork = state.fork(80)
    assert not count(session, fork).any()
    session.step([Work(fork, [3], "none")])
    assert (count(session, fork) == 81).all()
    state.free()
    with pytest.raises(RuntimeError, match="freed"):
        session.keys_read(state)


def test_a_step_that_fails_counts_nothing_and_changes_nothing(graph: Graph, rng: np.random.Generator) -> None:
    session = made(graph)
    states = [session.new_state() for _ in range(2)]
    run, calls = session._executor.run, []

    def second_fails(inputs: Mapping[str, Any], **options: Any) -> Any:
        calls.append(inputs)
        if len(calls) == 2:
            raise MemoryError
        return run(inputs, **options)

    session._executor.run = second_fails  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        session.step([Work(states[0], [1, 2], "none"), Work(states[1], [3], "none", sparsity=POLICY.to_string())])
    assert len(calls) == 2
    assert [s.length for s in states] == [0, 0]
    assert not any(count(session, s).any() for s in states)


@pytest.mark.parametrize("text", ["clever", '{"coverage":2}', PRESETS["safe"].with_heads(((1.0,),)).to_string()])
def test_a_policy_that_is_none_or_of_another_model_is_refused(graph: Graph, text: str) -> None:
    session = made(graph)
    state = session.new_state()
    with pytest.raises(ValueError, match=r"sparsity|coverage"):
        session.step([Work(state, [1], sparsity=text)])
    assert state.length == 0


def test_attention_with_a_bias_stays_dense(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, context=600, attention_bias=True)
    tokens = drawn(rng, 300)
    np.testing.assert_array_equal(logits(made(graph), tokens, POLICY.to_string()), logits(made(graph), tokens))
