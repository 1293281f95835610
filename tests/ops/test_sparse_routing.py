"""Which keys sparse attention reads, against an oracle that processes one key at a time; and attention over them.

Draws: the choice is compared with its own definition in float64 over the same numbers; errors over a thousand queries
fall with the coverage, whose steps are many deviations apart.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sparse_calls import BATCHES, CAREFUL, FORMS, POLICIES, SPREAD, call, full, oracle

from transom.ops import Array
from transom.ops.cached_attention import SCHEMA, reference
from transom.ops.sparse_attention import OBSERVER
from transom.ops.sparse_routing import BLOCK, Route, ScoreParams, choose, dense_route, route
from transom.sparsity import Sparsity


def heads(rng: np.random.Generator, n: int, group: int = 3, dim: int = 32) -> tuple[Array, Array]:
    """Queries [n, group, dim] and keys [n, dim] with topics and keys that all queries attend to, as in real heads."""
    topic = rng.normal(size=(16, dim))
    k = rng.normal(size=(n, dim)) * 0.6 + topic[np.arange(n) // 128 % 16] * 0.9
    q = rng.normal(size=(n, group, dim)) * 0.8
    q += topic[rng.integers(0, 16, -(-n // 64)).repeat(64)[:n]][:, None] * 1.2
    like = rng.normal(size=dim)
    k[rng.choice(n // 2, n // 100, replace=False)] += like * 1.5
    return (q + like * 0.8).astype(np.float32), k.astype(np.float32)


def choice(q: Array, k: Array, policy: Sparsity, **scores: Any) -> Route:
    return route(q, k, policy.layer(0), 0, ScoreParams(k.shape[1] ** -0.5, **scores))


# -------------------------------------------------------------------------------------------------------------- oracle
@pytest.mark.parametrize(("policy", "form", "batch"), SPREAD)
def test_choice_agrees_with_the_oracle(policy: str, form: str, batch: str, rng: np.random.Generator) -> None:
    rule = POLICIES[policy]
    sample = call(rng, *BATCHES[batch], rule, **FORMS[form])
    compared = 0
    for found in choose(sample.inputs, full(sample)):
        if found.route.margin < CAREFUL:
            continue
        for block, wanted in zip(found.route.blocks, oracle(sample, rule, found.sequence, found.head), strict=True):
            assert (block.begin, block.end) == (wanted.begin, wanted.end)
            window = FORMS[form].get("sliding_window", 0)
            start = max(0, block.begin - window + 1) if window else 0  # keys that no query sees may be read or not
            read = set(np.flatnonzero(block.reads(rule.unit)[start:]) + start)
            assert read == {j for j in wanted.keys if start <= j <= block.end}
            assert block.read == len(read)
            assert block.seen == block.end + 1 - start
            compared += 1
    assert compared


def test_the_long_form_of_the_method_gives_the_same_units(rng: np.random.Generator) -> None:
    """The oracle: row by row and head by head, in float64, without window, soft cap or sinks."""
    q, k = heads(rng, 1024)
    for tau in (0.97, 0.9):
        found = choice(q[512:], k, Sparsity(tau, dense_below=0))
        if found.margin < CAREFUL:
            continue
        score = np.zeros(len(k))
        for r in range(512 + 31, 1024, 32):
            s = q[r].astype(float) @ k[: r + 1].T.astype(float) / np.sqrt(32)
            p = np.exp(s - s.max(-1, keepdims=True))
            far = max(0, (r // 64 - 1) * 64)
            score[:far] += (p / p.sum(-1, keepdims=True)).sum(0)[:far]
        columns = np.sort(np.argsort(-score, kind="stable")[:64])
        np.testing.assert_array_equal(found.columns, columns)
        kept = np.ones(len(k))
        kept[columns] = 0
        weight, x = kept.reshape(-1, 8, 1), k.reshape(-1, 8, 32).astype(float)
        count = weight.sum(1)
        mean = (weight * x).sum(1) / np.maximum(count, 1)
        var = (weight * x * x).sum(1) / np.maximum(count, 1) - mean**2
        for block in found.blocks:
            if block.dense:
                continue
            lo = (block.begin // 64 - 1) * 64
            power, share = [], []
            for r in range(block.begin + 3, block.end + 1, 4):
                for y in q[r].astype(float) / np.sqrt(32):
                    est = count[: lo // 8, 0] * np.exp(
                        y @ mean[: lo // 8].T + np.minimum(0.35 * (y * y) @ var[: lo // 8].T, 8.3)
                    )
                    near, at = np.exp(k[lo : r + 1] @ y).sum(), np.exp(k[columns[columns < lo]] @ y).sum()
                    z = est.sum() + near + at
                    power.append(np.append(est.reshape(-1, 2).sum(1), near) / z)
                    share.append(at / z)
            a = np.sqrt(np.mean(np.square(power), 0))
            far_scores, covered = a[:-1], a[-1] + np.mean(share)
            order = np.argsort(-far_scores, kind="stable")
            before = covered + np.append(0, np.cumsum(far_scores[order]))[:-1]
            wanted = np.sort(order[before < tau * (far_scores.sum() + covered)])
            np.testing.assert_array_equal(block.units[block.units < lo // 16], wanted)
            np.testing.assert_allclose(block.scores, far_scores, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- properties
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "policy",
    [Sparsity(1.0, top_k=10**6, dense_below=0), Sparsity(0.2, min_density=1.0, dense_below=0), Sparsity(0.5)],
    ids=["every unit by number", "every unit by density", "short"],
)
def test_reading_everything_is_dense_attention(policy: Sparsity, batch: str, rng: np.random.Generator) -> None:
    sample = call(rng, *BATCHES[batch], policy)
    wanted = reference(sample.inputs, {**full(sample), "sparsity": "dense"})
    for got, want in zip(reference(sample.inputs, full(sample)), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    if policy.dense_below == 0:
        assert all(b.density == 1 for c in choose(sample.inputs, full(sample)) for b in c.route.blocks)


def test_coverage_of_one_is_dense_exactly(rng: np.random.Generator) -> None:
    sample = call(rng, *BATCHES["ragged"], Sparsity(1.0))
    assert sample.attributes["sparsity"] == "dense"
    text = '{"coverage":1.0,"dense_below":0}'
    for got, want in zip(
        reference(sample.inputs, {**full(sample), "sparsity": text}),
        reference(sample.inputs, full(sample)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_result_is_exact_attention_over_what_was_chosen(rng: np.random.Generator) -> None:
    """The dense operator with a bias that masks the keys that were not chosen."""
    for form in ("plain", "window across units", "sinks"):
        sample = call(rng, *BATCHES["ragged"], POLICIES["coverage"], **FORMS[form])
        seq, pos, past_seq, past_pos = (np.asarray(x) for x in sample.inputs[5:9])
        key_seq, key_pos = np.concatenate([past_seq, seq]), np.concatenate([past_pos, pos])
        bias = np.zeros((4, len(seq), len(key_seq)), np.float32)
        for found in choose(sample.inputs, full(sample)):
            for block in found.route.blocks:
                rows = (seq == found.sequence) & (pos >= block.begin) & (pos <= block.end)
                read = np.append(block.reads(16), np.zeros(max(0, key_pos.max() - block.end), bool))
                hidden = ~read[key_pos] & (key_seq == found.sequence)
                bias[found.head * 2 : found.head * 2 + 2, rows] += np.where(hidden, -np.inf, 0)[None, None]
        inputs = [*sample.inputs[:9], bias, *sample.inputs[10:]]
        want = reference(inputs, {**full(sample), "sparsity": "dense"})[0]
        np.testing.assert_allclose(reference(sample.inputs, full(sample))[0], want, rtol=1e-5, atol=1e-6)


def test_what_is_always_read_is_read(rng: np.random.Generator) -> None:
    for rule in (Sparsity(0.1, dense_below=0), Sparsity(0.1, 200, 0, dense_below=0), POLICIES["textbook"]):
        q, k = heads(rng, 640)
        found = choice(q[200:], k, rule)
        local = -(-rule.local_window // BLOCK)
        for block in found.blocks:
            read = block.reads(rule.unit)
            assert read[max(0, block.begin // BLOCK - local) * BLOCK :].all()
            assert read[found.columns[found.columns < block.begin]].all()
            if not rule.columns:
                assert read[:BLOCK].all()


def test_density_is_held_between_its_bounds(rng: np.random.Generator) -> None:
    q, k = heads(rng, 1536)
    for tau, low, high in ((0.2, 0.3, 0.5), (0.99, 0.1, 0.35), (0.9, 0.4, 0.4)):
        rule = Sparsity(tau, columns=0, min_density=low, max_density=high, dense_below=0)
        for block in choice(q[1024:], k, rule).blocks:
            units, always = block.end // 16 + 1, 4 + 8
            assert max(low * units, always) <= len(block.units) + 1e-3
            assert len(block.units) <= max(high * units, always) + 1


def test_more_coverage_reads_more(rng: np.random.Generator) -> None:
    q, k = heads(rng, 1024)
    last: list[set[int]] = []
    for tau in (0.3, 0.6, 0.8, 0.9, 0.95, 0.99):
        now = [set(b.units) for b in choice(q[512:], k, Sparsity(tau, dense_below=0, max_density=0.6)).blocks]
        assert all(a <= b for a, b in zip(last, now, strict=False))
        last = now


def test_less_coverage_is_further_from_dense_and_never_far(rng: np.random.Generator) -> None:
    q, k = heads(rng, 2048)
    v = rng.normal(size=(2048, 32)).astype(np.float32)
    inputs = [q[1024:].reshape(1024, -1), k[1024:], v[1024:], k[:1024], v[:1024],
              np.zeros(1024, np.int64), np.arange(1024, 2048), np.zeros(1024, np.int64), np.arange(1024)]  # fmt: skip
    base = SCHEMA.attributes_with_defaults({"q_num_heads": 3, "kv_num_heads": 1})
    dense = reference(inputs, base)[0]
    errors, densities = [], []
    for tau in (0.98, 0.95, 0.9):
        choices: list[Any] = []
        attributes = {**base, "sparsity": Sparsity(tau).layer(0).to_string(), OBSERVER: choices.append}
        out = reference(inputs, attributes)[0]
        errors.append(np.linalg.norm(out - dense) / np.linalg.norm(dense))
        densities.append(np.mean([b.density for c in choices for b in c.route.blocks]))
    assert errors == sorted(errors)
    assert errors[-1] < 0.4
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] < 0.5


def test_columns_find_the_keys_that_everyone_likes(rng: np.random.Generator) -> None:
    q, k = heads(rng, 1024)
    like = rng.normal(size=32).astype(np.float32)
    liked = np.sort(rng.choice(700, 20, replace=False))
    k[liked] += like * 2
    q += like * 2
    assert set(liked) <= set(choice(q[768:], k, Sparsity(0.9, dense_below=0)).columns)


# ----------------------------------------------------------------------------------------------------- ways of a prompt
def test_order_of_the_packed_cache_and_of_the_step_does_not_matter(rng: np.random.Generator) -> None:
    sample = call(rng, *BATCHES["ragged"], POLICIES["balanced"])
    mixed = list(sample.inputs)
    old, new = rng.permutation(len(np.asarray(mixed[7]))), rng.permutation(len(np.asarray(mixed[5])))
    for i, order in [(3, old), (4, old), (7, old), (8, old), (0, new), (1, new), (2, new), (5, new), (6, new)]:
        mixed[i] = np.asarray(mixed[i])[order]
    out = reference(sample.inputs, full(sample))[0]
    np.testing.assert_array_equal(reference(mixed, full(sample))[0], out[new])


def test_sequences_do_not_see_each_other(rng: np.random.Generator) -> None:
    sample = call(rng, (70, 40), (190, 300), POLICIES["coverage"])
    out = reference(sample.inputs, full(sample))[0]
    changed = [None if x is None else x.copy() for x in sample.inputs]
    seq, past_seq = np.asarray(changed[5]), np.asarray(changed[7])
    other = seq[0]
    for i, ids in ((0, seq), (1, seq), (2, seq), (3, past_seq), (4, past_seq)):
        np.asarray(changed[i])[ids == other] *= 3
    np.testing.assert_array_equal(reference(changed, full(sample))[0][seq != other], out[seq != other])


def test_a_prompt_in_chunks_of_whole_blocks_differs_by_its_columns_alone(rng: np.random.Generator) -> None:
    q, k = heads(rng, 768)
    rule = Sparsity(0.9, columns=0, dense_below=0, max_density=0.6)
    whole = {b.begin: b for b in choice(q, k, rule).blocks}
    for start, stop in ((0, 256), (256, 640), (640, 768)):
        for block in choice(q[start:stop], k[:stop], rule).blocks:
            np.testing.assert_array_equal(block.units, whole[block.begin].units)


def test_decoding_chooses_for_each_query_alone(rng: np.random.Generator) -> None:
    q, k = heads(rng, 512)
    rule = Sparsity(0.8, columns=0, dense_below=0, max_density=0.6)
    together = choice(q[502:], k, rule).blocks
    assert [(b.begin, b.end) for b in together] == [(p, p) for p in range(502, 512)]
    for block in together:
        alone = choice(q[block.begin : block.end + 1], k[: block.end + 1], rule).blocks[0]
        np.testing.assert_array_equal(alone.units, block.units)


def test_columns_may_be_taken_from_queries_that_an_engine_remembers(rng: np.random.Generator) -> None:
    q, k = heads(rng, 600)
    rule = Sparsity(0.8, dense_below=0, max_density=0.6).layer(0)
    rows = list(range(515, 579, 4))
    found = route(q[599:], k, rule, 0, ScoreParams(32**-0.5), column_queries=(rows, q[rows]))
    score = np.zeros(600)
    for r in rows:
        s = q[r] @ k[: r + 1].T / np.sqrt(32)
        p = np.exp(s - s.max(-1, keepdims=True))
        far = (r // 64 - 1) * 64
        score[:far] += (p / p.sum(-1, keepdims=True)).sum(0)[:far]
    wanted = np.sort(np.argsort(-score, kind="stable")[:64])
    assert len(set(wanted) ^ set(found.columns)) <= 2  # float32 may rank near-ties differently
    assert set(found.blocks[0].columns) == {c for c in found.columns if c < 512}


def test_a_dense_route_has_the_blocks_of_a_sparse_one(rng: np.random.Generator) -> None:
    q, k = heads(rng, 300)
    for first in (0, 100, 290):
        dense, sparse = dense_route(first, 300), choice(q[first:], k, POLICIES["coverage"])
        assert [(b.begin, b.end, b.seen) for b in dense.blocks] == [(b.begin, b.end, b.seen) for b in sparse.blocks]
        assert all(b.dense and b.read == b.seen for b in dense.blocks)


# ------------------------------------------------------------------------------------------------------------- refused
def test_scores_that_are_not_numbers_are_an_error_that_names_the_layer(rng: np.random.Generator) -> None:
    for place, value in ((0, np.nan), (3, np.nan), (3, np.inf)):
        sample = call(rng, (70,), (300,), POLICIES["coverage"], layer=17)
        inputs = [None if x is None else x.copy() for x in sample.inputs]
        np.asarray(inputs[place])[:] = value
        with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"layer 17, KV head 0.*not finite"):
            reference(inputs, full(sample))


def test_positions_with_a_gap_are_refused(rng: np.random.Generator) -> None:
    sample = call(rng, (20,), (100,), POLICIES["coverage"])
    inputs = list(sample.inputs)
    inputs[8] = np.asarray(inputs[8]) + 1
    with pytest.raises(ValueError, match="positions of a sequence"):
        reference(inputs, full(sample))


def test_a_policy_for_other_heads_is_refused(rng: np.random.Generator) -> None:
    sample = call(rng, (20,), (100,), replace(POLICIES["coverage"], heads=((1.0, 2.0, 3.0),)))
    with pytest.raises(ValueError, match="3 heads, and the layer has 2 KV heads"):
        reference(sample.inputs, full(sample))


@pytest.mark.parametrize("form", ["bias", "not causal"])
def test_attention_that_no_policy_fits_is_refused(form: str, rng: np.random.Generator) -> None:
    sample = call(rng, (20,), (100,), POLICIES["coverage"], **({"is_causal": 0} if form == "not causal" else {}))
    inputs = [*sample.inputs, np.zeros((1, 20, 120), np.float32)] if form == "bias" else sample.inputs
    with pytest.raises(ValueError, match="cannot be applied to attention"):
        reference(inputs, full(sample))
    assert SCHEMA.body is not None
    with pytest.raises(ValueError, match="cannot be applied to attention"):
        SCHEMA.body(full(sample), [x is not None for x in inputs])
