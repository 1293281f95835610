"""The paged session on small random decoders, against the reference; what the conformance kit cannot know of pages.

Draws: float32 agrees to 1e-4, a hundred times its rounding; 16 bits cost a hundredth and 0.1 are allowed, where a
lost position costs about one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transom import hardware
from transom.contract import Artifact, Device, OutOfPages, Work
from transom.errors import EngineError
from transom.graph import Graph
from transom.sessions import PagedSession, best
from transom.sessions import best as sorted_best
from transom.testing.bench import ReferenceOracle
from transom.testing.models import tiny_decoder
from transom_openvino_cpu import OpenVinoCpu
from transom_openvino_cpu.native.engine import NativeEngine
from transom_openvino_cpu.paging import OpenVinoPages, padded

Array = np.ndarray[Any, np.dtype[Any]]
Open = Callable[..., PagedSession]


def cpu() -> Device:
    return next(d for d in hardware.probe_devices() if d.kind == "cpu")


def stored(graph: Graph, folder: Path, options: dict[str, object]) -> Artifact:
    """Compiled, and kept as the host keeps it."""
    backend, device = OpenVinoCpu(), cpu()
    assert all(c.ok for c in backend.claim(graph, device, options))
    artifact = backend.compile(graph, device, options, lambda stage, share: None)
    files: dict[str, bytes | Path] = {}
    for name, content in artifact.files.items():
        files[name] = folder / name
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return Artifact(files, artifact.requires, artifact.notes)


@pytest.fixture(params=["native", "openvino"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paged engines keep the same promises."""
    if request.param == "openvino":
        monkeypatch.setenv("TRANSOM_NATIVE", "0")
    return str(request.param)


@pytest.fixture
def opened(tmp_path: Path, engine: str) -> Iterator[Open]:
    """Opens sessions, and closes them in the end."""
    sessions: list[PagedSession] = []

    def open_(graph: Graph, *, device: Device | None = None, **options: object) -> PagedSession:
        folder = tmp_path / str(len(sessions))
        folder.mkdir()
        chosen: dict[str, object] = {"precision": "exact", **options}
        artifact = stored(graph, folder, chosen)
        session = OpenVinoCpu().load(artifact, device or cpu(), chosen, folder)
        assert isinstance(session, PagedSession)
        assert isinstance(session._engine, NativeEngine if engine == "native" else OpenVinoPages)
        sessions.append(session)
        return session

    yield open_
    for session in sessions:
        session.close()


def draw(rng: np.random.Generator, count: int) -> list[int]:
    return [int(t) for t in rng.integers(0, 61, count)]


def close_to(got: Any, wanted: Array, limit: float = 1e-4) -> bool:
    return bool(np.linalg.norm(got - wanted) <= limit * np.linalg.norm(wanted))


@pytest.mark.parametrize("chunks", [[31, 1, 1, 1], [32, 1], [63, 1, 1], [33, 31, 1], [1, 64, 1], [100, 3, 29, 1]])
def test_chunks_that_end_beside_page_borders_agree_with_the_reference(
    chunks: Sequence[int], opened: Open, rng: np.random.Generator
) -> None:
    graph = tiny_decoder(rng)
    session, oracle = opened(graph), ReferenceOracle(graph)
    state, tokens = session.new_state(), []
    for count in chunks:
        new = draw(rng, count)
        tokens += new
        (got,) = session.step([Work(state, new, "all")])
        assert close_to(got, oracle.logits(tokens)[-count:])
    pages = -(-len(tokens) // session.limits.page_tokens)
    assert state.nbytes == pages * session._engine.page_bytes()


def test_layers_with_different_heads_come_back_in_order(opened: Open, rng: np.random.Generator) -> None:
    """An exported attention forgets its head sizes: the extension that reads it back must not mix layers up."""
    from transom.graph import DecoderBuilder
    from transom.graph.weights import dense
    from transom.signature import Decoder, LayerCache

    shapes = [(4, 2, 16), (2, 1, 32), (6, 3, 16)]
    b = DecoderBuilder("mixed", Decoder("mixed", 61, 64, 160, tuple(LayerCache(q, k, d, d) for q, k, d in shapes)))

    def weight(rows: int, columns: int) -> Any:
        return dense((rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32))

    x = b.embedding(weight(61, 64))
    for i, (q_heads, kv_heads, dim) in enumerate(shapes):
        q, k, v = (
            b.linear(x, weight(h * dim, 64), f"{n}{i}") for n, h in (("q", q_heads), ("k", kv_heads), ("v", kv_heads))
        )
        x = b.op("Add", x, b.linear(b.attention(q, k, v, i, name=f"a{i}"), weight(64, q_heads * dim), f"o{i}"))
    graph = b.finish_decoder(b.linear(b.rows_for_logits(x), weight(61, 64), "head"), weights_hash="mixed")
    session, tokens = opened(graph), draw(rng, 40)
    (got,) = session.step([Work(session.new_state(), tokens, "all")])
    assert close_to(got, ReferenceOracle(graph).logits(tokens))


@pytest.mark.parametrize("precision", ["bf16", "fast"])
def test_narrow_arithmetic_knows_large_positions(precision: str, opened: Open, rng: np.random.Generator) -> None:
    """A position rounded to 8 bits would turn queries and keys by radians."""
    if not cpu().features & {"avx512_bf16", "amx_bf16"} and precision == "bf16":
        precision = "fast"
    graph = tiny_decoder(rng, context=2000, weights="uint4_minimums")
    session, tokens = opened(graph, precision=precision), draw(rng, 1501)
    state = session.new_state()
    session.step([Work(state, tokens[:1000], "none")])
    session.step([Work(state, tokens[1000:1500], "none")])
    (got,) = session.step([Work(state, tokens[1500:])])
    assert close_to(got, ReferenceOracle(graph).logits(tokens)[-1], 0.1)


def test_a_full_pool_fails_the_whole_step_and_no_state(opened: Open, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, context=192)
    page = opened(graph).limits.page_tokens
    session = opened(graph, device=replace(cpu(), free_bytes=0), context=3 * page)
    assert session.pages() == (3, 3)
    oracle, first, second = ReferenceOracle(graph), session.new_state(), session.new_state()
    tokens, other = draw(rng, page + 8), draw(rng, page - 2)
    session.step([Work(first, tokens), Work(second, other)])
    assert session.pages() == (3, 0)
    with pytest.raises(OutOfPages, match="cache pages"):
        session.step([Work(first, draw(rng, 1)), Work(second, draw(rng, 3))])
    assert (first.length, second.length) == (page + 8, page - 2)
    second.free()
    more = draw(rng, page - 2)
    (got,) = session.step([Work(first, more)])
    assert close_to(got, oracle.logits(tokens + more)[-1])


def test_an_engine_that_fails_leaves_states_and_pages_alone(
    opened: Open, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny_decoder(rng)
    session = opened(graph)
    state, tokens = session.new_state(), draw(rng, 20)
    session.step([Work(state, tokens)])
    fork, pages = state.fork(20), session.pages()

    def fail(*arguments: object, **keywords: object) -> None:
        raise EngineError("made up")

    with monkeypatch.context() as patch:
        patch.setattr(session._engine, "step", fail)
        with pytest.raises(EngineError, match="made up"):
            session.step([Work(state, [1] * 50), Work(fork, [2])])
    assert (state.length, fork.length, session.pages()) == (20, 20, pages)
    (got,) = session.step([Work(fork, [2])])
    assert close_to(got, ReferenceOracle(graph).logits([*tokens, 2])[-1])


def test_pages_that_nobody_wrote_to_take_no_memory(opened: Open, rng: np.random.Generator) -> None:
    session = opened(tiny_decoder(rng, context=150_000), device=replace(cpu(), free_bytes=8 << 30))
    assert session.pages()[0] * session._engine.page_bytes() > 2 << 30
    before = _resident()
    session.step([Work(session.new_state(), draw(rng, 200))])
    assert _resident() - before < 100 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_states_of_another_session_and_freed_ones_are_refused(opened: Open, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    one, two = opened(graph), opened(graph)
    with pytest.raises(ValueError, match="another session"):
        one.step([Work(two.new_state(), [1])])
    state = one.new_state()
    state.free()
    with pytest.raises(RuntimeError, match="freed"):
        one.step([Work(state, [1])])


def test_a_paged_session_has_no_plain_run(opened: Open, rng: np.random.Generator) -> None:
    with pytest.raises(RuntimeError, match=r"call step\(\)"):
        opened(tiny_decoder(rng)).run({})


def test_a_damaged_artifact_is_one_sentence(tmp_path: Path, engine: str, rng: np.random.Generator) -> None:
    options: dict[str, object] = {"precision": "exact"}
    artifact = stored(tiny_decoder(rng), tmp_path, options)
    damaged = tmp_path / ("weights.bin" if engine == "native" else "body.blob")
    damaged.write_bytes(b"no model" * 100)
    with pytest.raises(EngineError, match="damaged" if engine == "native" else r"body\.blob"):
        OpenVinoCpu().load(artifact, cpu(), options, tmp_path)
    if engine == "native":
        (tmp_path / "program.json").write_text('{"ops": [')
        with pytest.raises(EngineError, match="damaged"):
            OpenVinoCpu().load(artifact, cpu(), options, tmp_path)
    (tmp_path / "session.json").write_text("{}")
    with pytest.raises(EngineError, match="damaged"):
        OpenVinoCpu().load(artifact, cpu(), options, tmp_path)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_best_tokens_are_those_of_a_full_sort(count: int, rng: np.random.Generator) -> None:
    logits = np.round(rng.standard_normal((4, 200)) * 3).astype(np.float32)  # with many ties
    for part in (logits, logits[0]):
        ids, values = best(part, count)
        wanted_ids, wanted = sorted_best(part, count)
        np.testing.assert_array_equal(ids, wanted_ids)
        np.testing.assert_array_equal(values, wanted)


def test_the_best_of_logits_that_are_no_numbers_does_not_hang_or_raise() -> None:
    ids, values = best(np.full((2, 50), np.nan, np.float32), 5)
    assert ids.shape == values.shape == (2, 5)


def test_padding_knows_few_sizes_and_adds_no_more_than_a_page() -> None:
    sizes = {padded(n) for n in range(1, 1025)}
    assert len(sizes) < 64
    assert all(0 <= padded(n) - n < 32 for n in range(1, 1025))
