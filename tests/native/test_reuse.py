"""An answer is the same, to the last bit, whether its prompt was read anew or the cache of an earlier one was used.

Draws: what is compared must be equal, whatever the numbers are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest
from levels import LEVELS, pytestmark  # noqa: F401  pytest reads the mark from here
from programs import Machine
from test_decoders import EXACT, built

import transom
from transom.contract import Work
from transom.errors import OptionError
from transom.testing.models import tiny_decoder
from transom_openvino_cpu.sparse_session import NativeSession

PROMPT = 900
TURN = 100


def _answer(model: Any, prompt: list[int], sparsity: str) -> tuple[Any, int]:
    result = model.generate(prompt, max_new_tokens=4, temperature=0.0, ignore_eos=True, logprobs=3, sparsity=sparsity)
    (choice,) = result.choices
    numbers = [[(t.id, t.logprob) for t in token.top] for token in choice.logprobs]
    return (choice.token_ids, numbers), result.usage.cached_tokens


@pytest.mark.parametrize("precision", ["exact", "auto", "bf16"])
@pytest.mark.parametrize("quantization", ["F32", "Q8_0", "Q4_0"])
def test_a_prompt_read_again_gives_the_same_answer(
    precision: str, quantization: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = byte_llama.write_gguf(tmp_path / "m.gguf", rng, context=4096, quantization=quantization)
    options: dict[str, Any] = {
        "device": "cpu", "backend": "openvino_cpu", "precision": precision, "verify": "off",
        "cache": transom.Cache(tmp_path / "cache"),
    }  # fmt: skip
    prompt = rng.integers(0, 256, PROMPT).tolist()
    following = [*prompt, *rng.integers(0, 256, TURN + int(rng.integers(0, 70))).tolist()]
    with transom.load(path, **options) as model:
        first, cached = _answer(model, prompt, "off")
        assert cached == 0
        again, cached = _answer(model, prompt, "off")
        assert cached == (PROMPT - 8) // 64 * 64
        assert again == first
        turn, cached = _answer(model, following, "off")
        few = 0 < len(following) % 1024 < 8  # in its last step: read as it would have been
        assert cached >= (0 if few else PROMPT // 64 * 64)
    with transom.load(path, **options) as model:
        assert _answer(model, following, "off") == (turn, 0)


def test_sparse_attention_takes_up_whole_chunks(tmp_path: Path, rng: np.random.Generator) -> None:
    path = byte_llama.write_gguf(tmp_path / "m.gguf", rng, context=4096)
    prompt = rng.integers(0, 256, 2500).tolist()
    options: dict[str, Any] = {"device": "cpu", "verify": "off", "cache": transom.Cache(tmp_path / "cache")}
    with transom.load(path, **options) as model:
        first, cached = _answer(model, prompt, "0.5")
        assert cached == 0
        assert _answer(model, prompt, "0.5") == (first, 2048)
        assert _answer(model, prompt, "0.6")[1] == 0


# ------------------------------------------------------------------------------------------------------------- on disk
@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"device": "cpu", "backend": "openvino_cpu", "verify": "off", "cache": transom.Cache(tmp_path / "cache")}


@pytest.mark.parametrize("sparsity", ["off", "0.5"])
def test_a_saved_prompt_is_taken_up_by_another_process(
    sparsity: str, tmp_path: Path, options: dict[str, Any], rng: np.random.Generator
) -> None:
    path = byte_llama.write_gguf(tmp_path / "m.gguf", rng, context=4096)
    prompt = rng.integers(0, 256, 2500).tolist()
    with transom.load(path, **options) as model:
        first, _ = _answer(model, prompt, sparsity)
        assert model.save_prompt_cache(tmp_path / "p.cache") == 2503  # the last token of the answer is not computed
    with transom.load(path, **options) as model:
        assert model.load_prompt_cache(tmp_path / "p.cache") == 2503
        assert _answer(model, prompt, sparsity) == (first, 2048 if sparsity != "off" else 2432)
        other = "off" if sparsity != "off" else "0.5"
        assert _answer(model, prompt, other)[1] == 0


def test_nothing_is_saved_of_less_than_a_page(
    tmp_path: Path, options: dict[str, Any], rng: np.random.Generator
) -> None:
    with transom.load(byte_llama.write_gguf(tmp_path / "m.gguf", rng), **options) as model:
        _answer(model, [1, 2, 3], "off")
        assert model.save_prompt_cache(tmp_path / "p.cache") == 0
    assert not (tmp_path / "p.cache").exists()


def test_what_is_no_prompt_cache_of_this_model_is_refused(
    tmp_path: Path, options: dict[str, Any], rng: np.random.Generator
) -> None:
    path = byte_llama.write_gguf(tmp_path / "m.gguf", rng)
    other = byte_llama.write_gguf(tmp_path / "other.gguf", rng)
    file = tmp_path / "p.cache"
    with transom.load(other, **options) as model:
        _answer(model, rng.integers(0, 256, 300).tolist(), "off")
        model.save_prompt_cache(file)
    with transom.load(path, **options) as model:
        with pytest.raises(OptionError, match="made with another model"):
            model.load_prompt_cache(file)
        _answer(model, rng.integers(0, 256, 300).tolist(), "off")
        model.save_prompt_cache(file)
        whole = file.read_bytes()
        inside = len(whole) // 2  # of an array; a byte of an entry's header, such as its time, may have no meaning
        flipped = whole[:inside] + bytes([whole[inside] ^ 1]) + whole[inside + 1 :]
        for damaged in (b"", b"no archive", whole[:inside], flipped):
            file.write_bytes(damaged)
            with pytest.raises(OptionError, match="is damaged"):
                model.load_prompt_cache(file)
        with pytest.raises(OptionError, match="cannot be read"):
            model.load_prompt_cache(tmp_path / "none")
        with pytest.raises(FileNotFoundError):
            model.save_prompt_cache(tmp_path / "none" / "p.cache")
        file.write_bytes(whole)
        assert model.load_prompt_cache(file) == 303


def test_what_sparse_attention_knew_is_checked(
    tmp_path: Path, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Positions in it are places in memory: bytes that only look like a prompt cache must not lead anywhere."""
    path = byte_llama.write_gguf(tmp_path / "m.gguf", rng, context=4096)
    with transom.load(path, **options) as model:
        _answer(model, rng.integers(0, 256, 2500).tolist(), "0.5")
        kept, arrays = model._engine.save_latest()
        for _ in range(20):
            route = arrays["route"].copy()
            route[: 4 * 130].view(np.int32)[rng.integers(130, size=40)] = rng.integers(3000, 1 << 30, 40)
            with pytest.raises(OptionError, match="the saved route of sparse attention is damaged"):
                model._engine.restore(kept.tokens, kept.sparsity, {**arrays, "route": route})
        pages = model._engine._session.pages()
        assert pages[0] == pages[1]  # nothing was left behind
        model._engine.restore(kept.tokens, kept.sparsity, arrays)


def test_a_backend_that_cannot_save_says_so(tmp_path: Path, options: dict[str, Any], rng: np.random.Generator) -> None:
    path = byte_llama.write_gguf(tmp_path / "m.gguf", rng)
    with transom.load(path, **(options | {"backend": "reference"})) as model:
        _answer(model, [1, 2, 3], "off")
        with pytest.raises(OptionError, match="cannot save prompt caches"):
            model.save_prompt_cache(tmp_path / "p.cache")


def test_a_freed_state_gives_its_memory_back(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, layers=2, kv_heads=4, q_heads=4, head_dim=64, context=8192)
    decoder = graph.decoder
    assert decoder is not None
    with Machine(built(graph, EXACT), LEVELS[-1], threads=2, pages=None) as machine:
        session = NativeSession(machine.engine, decoder, context=8192, pages=256)
        start = _shared_memory()
        state = session.new_state()
        while state.length < 8192:
            session.step([Work(state, rng.integers(0, decoder.vocabulary, 1024).tolist(), "none")])
        held = state.nbytes
        assert held > 30 << 20
        assert _shared_memory() - start > 0.9 * held
        state.free()
        assert _shared_memory() - start < 0.1 * held
        session.close()


def _shared_memory() -> int:
    """Bytes of anonymous memory that this process holds, of the kind that pages are made of."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem:"))
