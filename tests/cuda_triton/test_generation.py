"""The whole backend in Triton's interpreter, host code and kernels: it writes what the reference writes.

Draws: float32 agrees to 1e-4 of the largest logit, a hundred times its rounding. Models are drawn again until no greedy
token leads by less than that, and no sparse choice is closer to another one than `CLOSE`. What float16, int8 and fp8
cost a random model has no formula: one of eight draws must be within each bound (`redraws.one_within`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import tiny
from redraws import one_within, without_close_choices

from transom import hardware
from transom.contract import Artifact, Device, Limits, OutOfPages, SavingSession, SparseSession, Work
from transom.errors import DoesNotFit, EngineError, OptionError
from transom.graph import Graph
from transom.preparation import agreement, selfcheck
from transom.preparation.compiled import Allowed
from transom.preparation.reference_outputs import check_prompt, reference_logits
from transom.quantize.passes import Scheme, quantize
from transom.reference.executor import Executor
from transom.reference.session import ReferenceSession
from transom.sources import resolve
from transom.sparsity import Sparsity
from transom.testing.bench import ReferenceOracle
from transom.testing.models import tiny_decoder
from transom_cuda_triton import CudaTriton, graphs
from transom_cuda_triton.engine import TritonEngine
from transom_cuda_triton.precision import DIVERGENCES
from transom_cuda_triton.routes import SequenceRoute
from transom_cuda_triton.session import TritonSession

Array = np.ndarray[Any, np.dtype[Any]]
Open = Callable[..., TritonSession]
BACKEND = CudaTriton()
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "gemma3": {"head_dim": 32}, "gemma2": {"head_dim": 48}, "mistral": {"head_dim": 16},
    "qwen2": {}, "phi3": {},
}  # fmt: skip
ANY = Allowed(kl=math.inf, correlation=-1.0)
"""What is measured is not judged by the self-check."""
SPARSE = Sparsity(0.3, columns=16, dense_below=64, local_window=64, max_density=0.6)
NO_COLUMNS = Sparsity(1.0, columns=0, top_k=1, dense_below=64, local_window=64, max_density=0.6)
"""At this `max_density` no block falls back to reading everything."""
CLOSE = 1e-4
"""A sparse choice with a smaller margin may turn out differently in another order of float32 sums."""


def cpu() -> Device:
    return next(d for d in hardware.probe_devices() if d.kind == "cpu")


def stored(graph: Graph, folder: Path, device: Device | None = None, **options: object) -> Artifact:
    """Compiled, and kept as the host keeps it."""
    device = device or cpu()
    refused = [c for c in BACKEND.claim(graph, device, options) if not c.ok]
    assert not refused
    artifact = BACKEND.compile(graph, device, options, lambda stage, share: None)
    files: dict[str, bytes | Path] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in artifact.files.items():
        files[name] = folder / name
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return Artifact(files, artifact.requires, artifact.notes)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens sessions, and closes them in the end."""
    sessions: list[TritonSession] = []

    def open_(graph: Graph, **options: object) -> TritonSession:
        artifact = stored(graph, tmp_path / str(len(sessions)), **options)
        session = BACKEND.load(artifact, cpu(), options, tmp_path)
        assert isinstance(session, TritonSession)
        sessions.append(session)
        return session

    yield open_
    for session in sessions:
        session.close()


def drawn(rng: np.random.Generator, count: int, vocabulary: int = 61) -> list[int]:
    return [int(t) for t in rng.integers(0, vocabulary, count)]


def reference(graph: Graph) -> ReferenceSession:
    assert graph.decoder is not None
    limits = Limits(max_sequences=8, max_tokens=1024, context=graph.decoder.context, page_tokens=0)
    return ReferenceSession(Executor(graph, keep_weights=True), graph.decoder, limits)


def greedy(session: Any, prompts: Sequence[Sequence[int]], count: int) -> tuple[list[list[int]], list[Array]]:
    """What a batch of prompts is continued with, and the logits of each step [sequences, vocabulary]."""
    states = [session.new_state() for _ in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    steps: list[Sequence[int]] = list(prompts)
    logits = []
    for _ in range(count):
        rows = session.step([Work(s, t) for s, t in zip(states, steps, strict=True)])
        logits.append(np.stack([np.asarray(r) for r in rows]))
        steps = [[int(np.argmax(r))] for r in rows]
        for text, new in zip(texts, steps, strict=True):
            text.extend(new)
    return texts, logits


def lead(row: Array) -> float:
    """How much larger the largest logit is than the second."""
    second, first = np.sort(row)[-2:]
    return float(first - second)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.sweep(but=("llama", "gemma3"))  # interpreted
def test_families_write_what_the_reference_writes(family: str, opened: Open, tmp_path: Path, rng: Any) -> None:
    """Prompts of different lengths, one beyond a page, together and then token by token."""
    folder = tiny(family, tmp_path / "model", rng, **FAMILIES[family]).folder
    graph = resolve(folder).open(folder).graph
    assert graph.decoder is not None
    for _ in range(100):  # one in two hundred has a token that leads by too little
        prompts = [drawn(rng, n, graph.decoder.vocabulary) for n in (3, 70)]
        theirs, their_logits = greedy(reference(graph), prompts, 6)
        if all(lead(row) > 2e-4 * np.abs(row).max() for rows in their_logits for row in rows):
            break
    else:
        pytest.fail("none of 100 prompts had a clear answer")
    ours, our_logits = greedy(opened(graph), prompts, 6)
    for got, wanted in zip(our_logits, their_logits, strict=True):
        assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert ours == theirs


def error(got: Any, wanted: Array) -> float:
    """The largest difference of two sets of logits, as a share of the largest logit."""
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("stored_as", ["float16", "bfloat16", "int4", "uint4_zero_points"])
def test_float16_is_close_to_the_reference(stored_as: Any, opened: Open, rng: np.random.Generator) -> None:
    def measure(draw: int) -> float:
        graph, tokens = tiny_decoder(rng, weights=stored_as), drawn(rng, 90)
        session = opened(graph, precision="f16")
        (got,) = session.step([Work(session.new_state(), tokens, "all")])
        return error(got, ReferenceOracle(graph).logits(tokens))

    one_within(measure, lambda off: off < 2e-2)


def test_int8_quantizes_matrices_of_floats_and_says_so(tmp_path: Path, rng: np.random.Generator) -> None:
    def measure(draw: int) -> float:
        graph, folder = tiny_decoder(rng), tmp_path / str(draw)
        artifact = stored(graph, folder, precision="int8")
        assert any("quantized to int8" in note for note in artifact.notes)
        assert any(not c.exact for c in BACKEND.claim(graph, cpu(), {"precision": "int8"}))
        session = BACKEND.load(artifact, cpu(), {}, folder)
        tokens = drawn(rng, 20)
        (got,) = session.step([Work(session.new_state(), tokens, "all")])
        session.close()
        off = error(got, ReferenceOracle(graph).logits(tokens))
        assert off > 1e-6
        return off

    one_within(measure, lambda off: off < 0.1)


@pytest.mark.parametrize(("family", "precision"), [(f, p) for f in FAMILIES for p in ("int8", "fp8")])
@pytest.mark.sweep(but=("qwen3-int8",))  # interpreted
def test_every_family_keeps_within_the_divergence_that_is_declared(
    family: str, precision: str, opened: Open, tmp_path: Path, rng: np.random.Generator
) -> None:
    def measure(i: int) -> list[agreement.Agreement]:
        folder = tiny(family, tmp_path / f"model{i}", rng, **FAMILIES[family]).folder
        graph = resolve(folder).open(folder).graph
        assert graph.decoder is not None
        claims = BACKEND.claim(graph, cpu(), {"precision": precision})
        assert {c.divergence for c in claims if not c.exact} == {DIVERGENCES[precision]}
        assert {c.divergence for c in claims if c.exact} == {None}
        ids = check_prompt(graph.decoder, None)
        session, wanted = opened(graph, precision=precision), reference_logits(graph, ids)
        return agreement.agreements(wanted, selfcheck.decoder_logits(session, wanted, ids, allowed=ANY, backend="mine"))

    one_within(measure, lambda found: all(a.kl_mean <= DIVERGENCES[precision] for a in found))


@pytest.mark.parametrize("stored_as", ["int4", "uint4_minimums", "int8"])
def test_on_a_v100_blocks_are_unpacked_for_many_rows(
    stored_as: Any, opened: Open, rng: np.random.Generator, monkeypatch: Any
) -> None:
    """With the tiles of sm_70, in float16: prompts through plain matrices, single tokens through blocks."""
    from transom_cuda_triton import operators, probing

    monkeypatch.setattr(probing, "tiles_architecture", lambda device: 70)
    monkeypatch.setattr(operators, "PIECE", 40)

    def measure(draw: int) -> float:
        graph, tokens = tiny_decoder(rng, weights=stored_as), drawn(rng, 60)
        session = opened(graph, precision="f16")
        assert any(isinstance(op, operators.UnpackingProduct) for op in session._triton.operators)
        state = session.new_state()
        (got,) = session.step([Work(state, tokens[:-1], "all")])
        (last,) = session.step([Work(state, tokens[-1:])])
        return error(np.vstack([got, last]), ReferenceOracle(graph).logits(tokens))

    one_within(measure, lambda off: off < 2e-2)


@pytest.mark.parametrize("count", [1, 20], ids=["one token", "many tokens"])
def test_fp8_quantizes_matrices_of_floats_and_says_so(count: int, tmp_path: Path, rng: np.random.Generator) -> None:
    """The vocabulary matrix is not quantized, nor are matrices in blocks."""
    assert all(c.exact for c in BACKEND.claim(tiny_decoder(rng, weights="int8"), cpu(), {"precision": "fp8"}))

    def measure(draw: int) -> float:
        graph, folder = tiny_decoder(rng), tmp_path / str(draw)
        artifact = stored(graph, folder, precision="fp8")
        assert any("quantized to fp8" in note for note in artifact.notes)
        assert any(not c.exact for c in BACKEND.claim(graph, cpu(), {"precision": "fp8"}))
        session = BACKEND.load(artifact, cpu(), {}, folder)
        assert isinstance(session, TritonSession)
        matrices = session._triton.program.matrices
        assert {m.float8 for m in matrices} == {True, False}
        assert graph.decoder is not None
        assert all(m.rows != graph.decoder.vocabulary for m in matrices if m.float8)
        tokens = drawn(rng, count)
        (got,) = session.step([Work(session.new_state(), tokens, "all")])
        session.close()
        off = error(got, ReferenceOracle(graph).logits(tokens))
        assert off > 1e-6
        return off

    one_within(measure, lambda off: off < 0.2)


@pytest.mark.parametrize("scheme", [Scheme("int4"), Scheme("int8", block=32)], ids=str)
def test_quantized_graphs_agree_with_the_reference(scheme: Scheme, opened: Open, rng: np.random.Generator) -> None:
    graph = quantize(tiny_decoder(rng, linear_bias=True), scheme).graph
    session, tokens = opened(graph), drawn(rng, 20)
    state = session.new_state()
    (many,) = session.step([Work(state, tokens[:-1], "all")])
    (one,) = session.step([Work(state, tokens[-1:])])
    wanted = ReferenceOracle(graph).logits(tokens)
    for ours, theirs in ((np.asarray(many), wanted[:-1]), (np.asarray(one), wanted[-1])):
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(wanted).max()


# sparse attention -----------------------------------------------------------------------------------------------------
def assert_reads_and_writes_as_the_reference(
    opened: Open, rng: np.random.Generator, policy: Sparsity, lengths: list[int], decodes: int
) -> None:
    """The same steps by ours and by the reference: the same keys are read, and the logits agree."""
    text = policy.to_string()

    def run(session: Any, steps: list[list[list[int]]]) -> Iterator[tuple[Array, Array]]:
        """The logits of each sequence in each step, and how many keys it has read so far."""
        states = [session.new_state() for _ in lengths]
        for tokens in steps:
            rows = session.step([Work(s, t, "all", sparsity=text) for s, t in zip(states, tokens, strict=True)])
            yield from (
                (np.asarray(row), np.asarray(session.keys_read(s))) for row, s in zip(rows, states, strict=True)
            )

    def draw() -> tuple[Graph, list[list[list[int]]], list[tuple[Array, Array]]]:
        graph = tiny_decoder(rng, context=600, window=200, sinks=True)
        steps = [[drawn(rng, n) for n in lengths], *([drawn(rng, 1) for _ in lengths] for _ in range(decodes))]
        return graph, steps, list(run(reference(graph), steps))

    graph, steps, expected = without_close_choices(draw, CLOSE)
    ours = opened(graph)
    assert isinstance(ours, SparseSession)
    for (got, keys), (wanted, their_keys) in zip(run(ours, steps), expected, strict=True):
        np.testing.assert_array_equal(keys, their_keys)
        assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    read, seen = expected[-len(lengths)][1]
    assert read[1].sum() < seen[1].sum(), "the policy reads less than everything"


def test_a_sparse_policy_decides_what_prompts_read(opened: Open, rng: np.random.Generator) -> None:
    assert_reads_and_writes_as_the_reference(opened, rng, SPARSE, [250, 90], 0)


def test_decoding_without_columns_agrees_with_the_reference(opened: Open, rng: np.random.Generator) -> None:
    """With columns the engine takes them from earlier queries, which the reference does not keep: see test_routing."""
    assert_reads_and_writes_as_the_reference(opened, rng, NO_COLUMNS, [250, 140], 2)


@pytest.mark.sweep  # interpreted; the kit has a smaller one: sparsity.policies
def test_works_of_different_policies_go_in_one_step(opened: Open, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, context=600)
    session, tokens = opened(graph), drawn(rng, 200)
    texts = [None, SPARSE.to_string(), NO_COLUMNS.to_string(), "dense"]
    alone = []
    for text in texts:
        (row,) = session.step([Work(session.new_state(), tokens, sparsity=text)])
        alone.append(np.asarray(row))
    together = session.step([Work(session.new_state(), tokens, sparsity=text) for text in texts])
    for got, wanted in zip(together, alone, strict=True):
        assert np.abs(np.asarray(got) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert not np.allclose(alone[0], alone[2], atol=1e-4), "a policy shows in the logits"
    np.testing.assert_array_equal(np.asarray(together[0]), np.asarray(together[3]))


@pytest.mark.parametrize("policy", [SPARSE, NO_COLUMNS], ids=["columns", "no columns"])
@pytest.mark.sweep(but=("columns",))  # interpreted
def test_decoding_goes_on_after_forks_and_cuts(policy: Sparsity, opened: Open, rng: np.random.Generator) -> None:
    """The same tokens again: with columns, after the same queries give them, and without, the same logits."""
    session, text = opened(tiny_decoder(rng, context=600)), policy.to_string()
    tokens = drawn(rng, 300)

    def step(of: Any, part: list[int]) -> Array:
        (row,) = session.step([Work(of, part, sparsity=text)])
        return np.asarray(row)

    states = [session.new_state() for _ in range(2)]
    for state in states:
        step(state, tokens)
    states[0].truncate(300)  # forgets when its columns were chosen, and nothing of what it remembers
    first = [step(states[0], [t]) for t in tokens[:3]]
    states[0].truncate(300)
    states[1].truncate(300)
    again = [[step(state, [t]) for t in tokens[:3]] for state in states]
    for rows in again:
        np.testing.assert_allclose(rows, first, atol=1e-5)
    forked = [step(states[0].fork(300), [t]) for t in tokens[:1]]
    assert np.isfinite(forked).all()
    if not policy.columns:
        np.testing.assert_allclose(forked, first[:1], atol=1e-5)


def test_remembered_queries_are_forgotten_with_their_tokens() -> None:
    route = SequenceRoute(0, [3, 7, 11, 67, *[-1] * 12], 1, "policy")
    route.forget(11)
    assert route.ring[:4] == [3, 7, -1, -1]
    assert route.chosen_in == -1


def test_a_step_that_fails_halfway_is_forgotten(opened: Open, rng: np.random.Generator, monkeypatch: Any) -> None:
    """One policy's part of a step has run when the other's fails: nothing of its tokens is remembered."""
    session = opened(tiny_decoder(rng, context=400))
    texts, states = [SPARSE.to_string(), NO_COLUMNS.to_string()], [session.new_state() for _ in range(2)]

    def step(counts: tuple[int, int]) -> None:
        works = zip(states, texts, counts, strict=True)
        session.step([Work(s, drawn(rng, n), sparsity=t) for s, t, n in works])

    step((150, 150))
    engine, runs = session._triton, iter((True, False))
    assert isinstance(engine, TritonEngine)
    compute = engine.compute

    def once(of: Any) -> Any:
        if next(runs):
            return compute(of)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "compute", once)
        with pytest.raises(KeyboardInterrupt):
            step((30, 30))
    for state in states:
        assert state.length == 150
        assert state.route is not None
        assert max(state.route.ring) < 150
        assert state.route.chosen_in == -1
    step((1, 1))


def test_slots_run_out_and_come_back(opened: Open, rng: np.random.Generator) -> None:
    session, text = opened(tiny_decoder(rng, context=160)), SPARSE.to_string()
    slots = session._triton.routes.slots
    states = [session.new_state() for _ in range(slots + 1)]
    for state in states[:-1]:
        session.step([Work(state, [1], sparsity=text)])
    with pytest.raises(OutOfPages, match="use sparse attention"):
        session.step([Work(states[-1], [1], sparsity=text)])
    assert states[-1].length == 0
    session.step([Work(states[-1], [1])])
    states[0].free()
    session.step([Work(states[-1], [1], sparsity=text)])


@pytest.mark.parametrize("policy", ["classic", '{"unit":8}'], ids=["classic", "small units"])
def test_policies_without_kernels_are_refused_before_anything_runs(policy: str, opened: Open, rng: Any) -> None:
    session = opened(tiny_decoder(rng))
    state = session.new_state()
    with pytest.raises(ValueError, match="routing kernels"):
        session.step([Work(state, [1], sparsity=Sparsity.parse(policy).to_string())])
    assert state.length == 0


# states that are written down -----------------------------------------------------------------------------------------
def test_a_saved_state_goes_on_where_it_was(opened: Open, rng: np.random.Generator) -> None:
    """In another session of the same model, in float16; and what is no such state is refused."""
    graph, tokens = tiny_decoder(rng, context=400), drawn(rng, 150)
    one, other = (opened(graph, precision="f16") for _ in range(2))
    assert isinstance(one, SavingSession)
    assert isinstance(other, SavingSession)
    state = one.new_state()
    one.step([Work(state, tokens, "none")])
    saved = one.save(state)
    again = other.restore(150, saved)
    assert again.length == 150
    for text in (None, SPARSE.to_string()):
        rows = [session.step([Work(s.fork(150), [7], sparsity=text)]) for session, s in ((one, state), (other, again))]
        np.testing.assert_array_equal(rows[0][0], rows[1][0])
    for length, arrays in ((149 + 64, saved), (150, {**saved, "layer.0.k": np.zeros((1, 1), np.uint8)}), (150, {})):
        with pytest.raises(ValueError, match="does not fit a state"):
            other.restore(length, arrays)


# recorded steps -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.sweep(but=("dense",))  # interpreted
def test_recorded_steps_give_the_same(policy: Sparsity | None, opened: Open, rng: np.random.Generator) -> None:
    """Where a graph is recorded on a card, the same function runs again here: over the same arrays, padded alike."""
    graph = tiny_decoder(rng, context=400, window=90)
    plain, recording = opened(graph), opened(graph)

    def record(compute: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        logits = compute()
        return lambda: logits.copy_(compute()), logits

    engine = recording._triton
    engine.graphs = graphs.CudaGraphs(engine, record)
    text = None if policy is None else policy.to_string()
    prompts = [drawn(rng, n) for n in (70, 130, 20)]
    states = [[s.new_state() for _ in prompts] for s in (plain, recording)]
    steps: list[list[list[int]]] = [prompts, *([drawn(rng, 1) for _ in prompts] for _ in range(3)), [[1], [2]], [[3]]]
    for tokens in steps:
        rows = []
        for session, own in zip((plain, recording), states, strict=True):
            works = [Work(s, t, sparsity=text) for s, t in zip(own, tokens, strict=False)]
            rows.append(np.stack([np.asarray(r) for r in session.step(works)]))
        assert np.abs(rows[0] - rows[1]).max() < 1e-5 * np.abs(rows[0]).max()
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(plain.keys_read(a), recording.keys_read(b))
    assert engine.graphs.replays >= 3


# what is wrong --------------------------------------------------------------------------------------------------------
def test_a_step_that_fails_changes_nothing(opened: Open, rng: np.random.Generator, monkeypatch: Any) -> None:
    """Out of memory in the middle of a step: the other sequences live on, and this one may try again."""
    import torch

    graph = tiny_decoder(rng)
    session = opened(graph)
    state, other = session.new_state(), session.new_state()
    tokens = drawn(rng, 70)
    session.step([Work(state, tokens[:40]), Work(other, tokens[:9])])
    pages = session.pages()
    last = session._triton.operators[-1]

    def no_memory(step: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(last, "run", no_memory)
        with pytest.raises(OutOfPages, match="out of memory"):
            session.step([Work(state, tokens[40:]), Work(other, [1])])
    assert (state.length, other.length, session.pages()) == (40, 9, pages)
    (got,) = session.step([Work(state, tokens[40:], "all")])
    wanted = ReferenceOracle(graph).logits(tokens)[40:]
    assert np.abs(np.asarray(got) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_weights_that_are_no_numbers_are_an_error_and_no_answer(opened: Open, rng: np.random.Generator) -> None:
    session = opened(tiny_decoder(rng))
    session._triton.store._bytes.view(dtype=__import__("torch").float32)[:] = float("nan")
    state = session.new_state()
    with pytest.raises(EngineError, match="not finite"):
        session.step([Work(state, [1, 2, 3])])
    assert state.length == 0


def test_weights_that_do_not_fit_are_refused_with_the_numbers(tmp_path: Path, rng: np.random.Generator) -> None:
    artifact = stored(tiny_decoder(rng), tmp_path)
    with pytest.raises(DoesNotFit, match=r"The weights take .* and cpu has 0.00 GiB free"):
        BACKEND.load(artifact, replace(cpu(), free_bytes=1000), {}, tmp_path)


def test_the_cache_takes_what_memory_is_left(opened: Open, rng: np.random.Generator, monkeypatch: Any) -> None:
    """As on a card: nine tenths of what is free beside weights, slots and buffers; less than one context is refused."""
    from transom_cuda_triton import loading, probing
    from transom_cuda_triton.step import Workspace

    engine = opened(tiny_decoder(rng, context=640))._triton
    assert isinstance(engine, TritonEngine)
    monkeypatch.setattr(probing, "interpreting", lambda: False)
    others = engine.store.nbytes + engine.routes.nbytes + Workspace.nbytes(engine.program, 1024, 64)
    assert engine.store.nbytes > 0

    def pages(count: float) -> int:
        free = others + int(count * engine.page_bytes() / loading.CACHE_SHARE) + 100
        return loading._pages(engine, cpu(), loading.Place(engine.device, free, 1))

    assert pages(25) == 25
    assert pages(10) == 10
    with pytest.raises(DoesNotFit, match=r"cache of 640 tokens takes .* context=576 or less"):
        pages(9)


@pytest.mark.parametrize("file", ["program-0.json", "decoder.json", "weights-0.bin"])
@pytest.mark.parametrize("damage", ["cut", "missing", "foreign"])
def test_damaged_artifacts_are_errors(file: str, damage: str, tmp_path: Path, rng: np.random.Generator) -> None:
    artifact = stored(tiny_decoder(rng), tmp_path)
    path = artifact.files[file]
    assert isinstance(path, Path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "foreign":
        path.write_bytes(b'{"a": 1}')
    files = {n: p for n, p in artifact.files.items() if damage != "missing" or n != file}
    with pytest.raises(EngineError, match="damaged"):
        BACKEND.load(Artifact(files, artifact.requires), cpu(), {}, tmp_path)


def test_bfloat16_is_refused_where_it_would_be_wrong(rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match="computes bfloat16 wrongly"):
        BACKEND.claim(tiny_decoder(rng), cpu(), {"precision": "bf16"})
