"""Portable decoders compute what the NumPy reference computes, family by family and form by form.

Draws: float32 agrees to 1e-4, a hundred times its rounding. What quantized inputs, int8 or int4 cost a random decoder
has no formula: one of eight draws must be within each bound (`redraws.one_within`).
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoints import tiny
from onnx_making import BACKEND, CPU, logits, made, options
from parted import parted, reference
from redraws import one_within

from transom.errors import EngineError, OptionError
from transom.graph import Graph
from transom.graph.sparse import is_attention, with_sparsity
from transom.preparation.agreement import Agreement, compare
from transom.quantize.passes import Scheme, quantize
from transom.sources import resolve
from transom.sparsity import Sparsity
from transom.testing.models import VARIANTS, tiny_decoder

REFUSED = {
    "attention_bias": "no kernel for Concat", "everything": "no kernel for Concat",
    "value_width": "heads of 16 columns for keys and 32 for values",
}  # fmt: skip


def operators(folder: Path) -> set[str]:
    model = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("form", sorted(set(VARIANTS) - set(REFUSED)))
def test_every_form_of_decoder_agrees_with_the_reference(form: str, rng: np.random.Generator, tmp_path: Path) -> None:
    def measure(draw: int) -> Agreement:
        graph = tiny_decoder(rng, **VARIANTS[form])
        parts = parted(rng, 61, [19, 1, 1, 7, 1])
        wanted = reference(graph, parts)
        exact = made(graph, tmp_path / f"exact {draw}", precision="exact")
        assert np.abs(logits(exact.session, parts) - wanted).max() < 1e-4
        assert "MatMulNBits" not in operators(tmp_path / f"exact {draw}")
        return compare(wanted, logits(made(graph, tmp_path / f"half {draw}", precision="f16").session, parts))

    one_within(measure, lambda half: half.kl_mean < 1e-3)  # inputs of products with stored integers are quantized


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3"])
def test_families_agree_with_the_reference(family: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Heads of 24 columns, which are rotated before attention; windows; soft caps; norms of queries and keys."""

    def measure(draw: int) -> Agreement:
        folder = tmp_path / f"model {draw}"
        tiny(family, folder, rng)
        graph = resolve(folder).open(folder).graph
        parts = parted(rng, 256, [21, 1, 1, 9])
        wanted = reference(graph, parts)
        exact = logits(made(graph, tmp_path / f"exact {draw}", precision="exact").session, parts)
        assert np.abs(exact - wanted).max() < 1e-4 * max(1.0, float(np.abs(wanted).max()))
        rotating = "RotaryEmbedding" in operators(tmp_path / f"exact {draw}")
        assert rotating == (family in ("gemma2", "gemma3", "mistral"))
        return compare(wanted, logits(made(graph, tmp_path / f"int8 {draw}", precision="int8").session, parts))

    one_within(measure, lambda rounded: rounded.kl_mean < 0.05)


@pytest.mark.parametrize(
    ("weights", "kl"),
    [("int4", 1e-3), ("uint4_minimums", 1e-3), ("uint4_zero_points", 1e-3), ("int8", 1e-3), ("float32", 0.2)],
)
def test_stored_integers_are_kept(weights: str, kl: float, rng: np.random.Generator, tmp_path: Path) -> None:
    """Only the inputs of products are quantized; matrices of floats are quantized to 4 bits, too."""

    def measure(draw: int) -> Agreement:
        graph = tiny_decoder(rng, weights=weights)  # type: ignore[arg-type]
        parts = parted(rng, 61, [40, 1, 1])
        it = made(graph, tmp_path / str(draw))
        assert {"MatMulNBits", "GatherBlockQuantized"} <= operators(it.folder)
        assert any("were quantized to int4" in note for note in it.artifact.notes) == (weights == "float32")
        return compare(reference(graph, parts), logits(it.session, parts))

    one_within(measure, lambda near: near.kl_mean < kl)


def test_blocks_of_an_unsupported_size_are_unpacked_where_they_cannot_be_quantized(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """Neither 16 columns divide a block, nor 32 a row."""
    graph = tiny_decoder(rng, weights="int8", block=40, hidden=80, inner=80, q_heads=2, head_dim=40)
    parts = parted(rng, 61, [20, 1])
    assert np.abs(logits(made(graph, tmp_path).session, parts) - reference(graph, parts)).max() < 1e-4


def test_matrices_are_quantized_as_in_a_quantized_graph(rng: np.random.Generator, tmp_path: Path) -> None:
    """The same codes as `quantize` writes, and the embeddings those of the vocabulary matrix."""
    graph = tiny_decoder(rng, hidden=128, inner=128)
    rounded = quantize(graph, Scheme("int8", block=32)).graph
    parts = parted(rng, 61, [40, 1, 1])
    own = logits(made(graph, tmp_path / "own", precision="int8").session, parts)
    given = logits(made(rounded, tmp_path / "given", precision="int8").session, parts)
    assert np.array_equal(own, given)


def test_a_shared_table_is_written_once(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng, vocabulary=512, layers=1, inner=32, hidden=256, q_heads=1, kv_heads=1)
    for precision, width in (("exact", 4), ("f16", 2), ("int4", 1)):
        it = made(graph, tmp_path / precision, precision=precision)
        size = it.files["model.onnx.data"].stat().st_size
        assert 512 * 256 * width < size < 1.9 * 512 * 256 * width, precision


def test_a_requested_context_is_part_of_the_artifact(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = tiny_decoder(rng)
    assert "context" not in made(graph, tmp_path / "own").artifact.requires
    it = made(graph, tmp_path / "short", context=48, precision="exact")
    assert it.artifact.requires["context"] == "48"
    assert it.session.limits.context == 48
    parts = parted(rng, 61, [47, 1])
    assert np.abs(logits(it.session, parts) - reference(graph, parts)).max() < 1e-4
    for damaged in ("0", "-5", "many"):
        with pytest.raises(EngineError, match="damaged"):
            BACKEND.load(replace(it.artifact, requires={"context": damaged}), CPU, options(), tmp_path)


def test_memory_has_room_for_a_chunk_of_a_prompt(rng: np.random.Generator, tmp_path: Path) -> None:
    """Its logits, which are all computed, and activations; a chunk is no longer than the context."""
    graph = tiny_decoder(rng, context=2000)
    found = {n: made(graph, tmp_path / str(n), context=n).files for n in (100, 1000, 2000)}
    memory = {n: json.loads(files["memory.json"].read_bytes()) for n, files in found.items()}
    beside = {n: m["workspace"] - m["weights"] // 4 for n, m in memory.items()}
    logits_of_a_token = 61 * 4
    assert beside[100] > 100 * logits_of_a_token
    assert beside[100] * 512 == beside[1000] * 100
    assert beside[1000] == beside[2000]
    assert memory[100]["weights"] == found[100]["model.onnx.data"].stat().st_size
    assert memory[100]["cache_per_token"] == 2 * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, columns, float32


@pytest.mark.parametrize("form", sorted(REFUSED))
def test_a_decoder_without_a_lowering_is_refused(form: str, rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, **VARIANTS[form])
    claims = BACKEND.claim(graph, CPU, options())
    assert REFUSED[form] in {claim.reason for claim in claims if not claim.ok}
    assert len(claims) == len(list(graph.nodes()))


def test_head_sizes_that_attention_does_not_support_are_refused(rng: np.random.Generator) -> None:
    claims = BACKEND.claim(tiny_decoder(rng, head_dim=20), CPU, options())
    reasons = {claim.reason for claim in claims if not claim.ok}
    assert reasons == {"heads of 20 columns, not a multiple of 8"}


def test_a_sparse_policy_is_refused(rng: np.random.Generator) -> None:
    graph = with_sparsity(tiny_decoder(rng), Sparsity(top_k=2))
    refused = [claim for claim in BACKEND.claim(graph, CPU, options()) if not claim.ok]
    assert [claim.node for claim in refused] == [n.name for n in graph.nodes() if is_attention(n)]
    assert all("reads all of its cache" in claim.reason for claim in refused)


def test_claims_are_inexact_where_something_is_quantized(rng: np.random.Generator) -> None:
    def inexact(graph: Graph, precision: str) -> set[str]:
        claims = BACKEND.claim(graph, CPU, options(precision=precision))
        types = {str(node.name): node.op_type for node in graph.nodes()}
        return {types[claim.node] for claim in claims if not claim.exact}

    plain, stored = tiny_decoder(rng), tiny_decoder(rng, weights="int4")
    assert inexact(plain, "exact") == inexact(stored, "exact") == inexact(plain, "f16") == set()
    assert inexact(plain, "int4") == {"MatMul", "Gather"}
    assert inexact(stored, "auto") == {"MatMul"}  # their inputs; the embeddings are as they were


def test_an_unknown_precision_is_an_error(rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match="precision='fp8' is unknown to portable"):
        BACKEND.claim(tiny_decoder(rng), CPU, options(precision="fp8"))


def test_numbers_beyond_float16_are_an_error(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of it is left behind."""
    checkpoint = tiny("llama", tmp_path / "large", rng)
    checkpoint.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    checkpoint.model.save_pretrained(tmp_path / "large")
    graph = resolve(tmp_path / "large").open(tmp_path / "large").graph
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(OptionError, match=r"numbers up to 1e\+06, and float16 ends at 65504"):
        BACKEND.compile(graph, CPU, options(precision="f16"), lambda stage, share: None)
    assert not list(temporary.iterdir())
