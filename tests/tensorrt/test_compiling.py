"""Engines for cards that are not installed: their layers, what is refused, and the files of a build.

Draws: sizes and layers follow from shapes; the weights only fill them.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import tiny
from targets import BACKEND, built, content, summaries, target

from transom.contract import Cancelled
from transom.errors import DoesNotFit, EngineError, OptionError
from transom.graph import Graph
from transom.graph.builder import WEIGHT_META
from transom.graph.sparse import is_attention, with_sparsity
from transom.graph.weights import Dense
from transom.quantize.calibration import ActivationRange, Activations
from transom.sources import resolve
from transom.sparsity import Sparsity
from transom.testing.models import tiny_decoder
from transom_tensorrt import compiling, network
from transom_tensorrt.network import Network
from transom_tensorrt.precision import RtxPrecision

STATIC = Sparsity(1.0, columns=0, top_k=4, dense_below=64, max_density=0.6)
HEAD = 320 * 256
"""Numbers of the vocabulary matrix."""
TEXT = [list(range(3, 60))]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def wide(rng: np.random.Generator, **form: Any) -> Graph:
    """The widths at which TensorRT uses the kernels of a real model."""
    sizes: dict[str, Any] = {
        "hidden": 256,
        "inner": 512,
        "head_dim": 64,
        "q_heads": 4,
        "kv_heads": 2,
        "vocabulary": 320,
    }
    return tiny_decoder(rng, **{**sizes, "context": 1024, **form})


# ------------------------------------------------------------------------------------------------- what an engine is of

FORMS = {
    "fp8": ("fp8 x fp8", {"fp8"}), "int8": ("float16 x int8", {"int8"}), "int4": ("float16 x int4", {"int4"}),
    "f16": ("float16 x float16", {"float16"}), "bf16": ("bfloat16 x bfloat16", {"bfloat16"}),
}  # fmt: skip


@pytest.mark.parametrize("precision", FORMS)
@pytest.mark.parametrize("policy", [None, STATIC], ids=["dense", "sparse"])
@pytest.mark.sweep(but=("dense-fp8", "dense-int8", "dense-int4", "dense-f16", "dense-bf16"))
def test_an_engine_has_the_expected_products_attention_and_weights(
    precision: str, policy: Sparsity | None, rng: np.random.Generator
) -> None:
    """Every product multiplies what was asked for, attention is fused, no cache is copied to decode a token."""
    graph = wide(rng, layers=2)
    if policy is not None:
        graph = with_sparsity(graph, policy)
    artifact = built(graph, precision=precision, calibration=TEXT)
    product, weights = FORMS[precision]
    number = "bfloat16" if precision == "bf16" else "float16"
    size = 4 * 2 * (256 * 512 + 256 * 256 + 3 * 256 * 512) // 4 + HEAD  # q, k, v; o; gate, up, down; the head
    bits = {"fp8": 8, "int8": 8, "int4": 4, "float16": 16, "bfloat16": 16}
    for name, summary in zip(("prefill", "decode"), summaries(artifact), strict=True):
        if precision in ("int4", "fp8"):  # but for the vocabulary matrix
            rest = (size - HEAD) * bits[precision] // 8
            assert summary.products == {product: 8, "float16 x int8": 1}, name
            assert summary.weight_bytes == {precision: rest, "int8": HEAD}, name
            assert summary.attention == {number: 2}, name
            assert not (name == "decode" or policy is None) or summary.cache_copies == 0, name
            continue
        assert summary.products == {product: 9}, name
        assert summary.attention == {number: 2}, name
        assert set(summary.weight_bytes) == weights, name
        (stored,) = summary.weight_bytes.values()
        assert stored == size * bits[next(iter(weights))] // 8, name
        assert not (name == "decode" or policy is None) or summary.cache_copies == 0, name
    made = Network.from_json(content(artifact, network.NETWORK_FILE))
    assert made.context == 1024
    assert made.number == number
    assert len(made.queries) == 2


def test_float8_products_are_summed_in_float32(rng: np.random.Generator) -> None:
    """A product of bare codes, before its scales, is beyond what float16 holds."""
    from transom_tensorrt import inspecting

    artifact = built(wide(rng), precision="fp8", calibration=TEXT)
    layers = inspecting.from_json(content(artifact, network.LAYERS_FILE))
    products = [x for x in layers if x.matrix is not None and x.product and x.matrix.dtype == "FP8"]
    assert len(products) == 16
    assert {t.dtype for x in products for t in x.outputs} == {"Float"}


def test_precision_fast_computes_attention_in_float8(rng: np.random.Generator) -> None:
    for summary in summaries(built(wide(rng), precision="fast", calibration=TEXT)):
        assert summary.attention == {"fp8": 2}
        assert summary.cache_copies > 0  # as its description says


def test_precision_exact_computes_everything_in_float32(rng: np.random.Generator) -> None:
    for summary in summaries(built(wide(rng), precision="exact")):
        assert summary.products == {"float32 x float32": 9}
        assert not summary.attention


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    ("precision", "policy"), [*((p, None) for p in ("fp8", "int4", "int8", "f16")), ("fp8", STATIC)],
    ids=["fp8", "int4", "int8", "f16", "fp8 sparse"],
)  # fmt: skip
@pytest.mark.sweep(but=("fp8-gemma3", "int4-qwen3", "int8-llama", "f16-llama"))
def test_families_are_built(
    family: str, precision: str, policy: Sparsity | None, rng: np.random.Generator, tmp_path: Path
) -> None:
    sizes = {"intermediate_size": 128, "head_dim": 32, "max_position_embeddings": 256}
    tiny(family, tmp_path / "model", rng, **sizes)
    graph = resolve(tmp_path / "model").open(tmp_path / "model").graph
    artifact = built(graph if policy is None else with_sparsity(graph, policy), precision=precision, calibration=TEXT)
    prefill, decode = summaries(artifact)
    assert graph.decoder is not None
    layers = len(graph.decoder.layers)
    assert sum(decode.products.values()) >= 4 * layers + 1
    assert sum(prefill.attention.values()) == sum(decode.attention.values()) == layers


@pytest.mark.parametrize("card", ["t4", "a100", "rtx-3090", "rtx-4060", "rtx-5090"])
def test_other_cards_are_built_for_from_the_same_code(card: str, rng: np.random.Generator) -> None:
    artifact = built(wide(rng), card, calibration=TEXT)
    assert artifact.requires["arch"] == target(card).arch
    prefill, _ = summaries(artifact)
    float8 = card in ("rtx-4060", "rtx-5090")
    assert set(prefill.products) == ({"fp8 x fp8", "float16 x int8"} if float8 else {"float16 x float16"})


# -------------------------------------------------------------------------------------------------------------- reports


def test_the_notes_describe_the_engine(rng: np.random.Generator) -> None:
    artifact = built(wide(rng), calibration=TEXT)
    notes = "\n".join(artifact.notes)
    assert "precision: fp8 and int8 weights, fp8 inputs of products, float16 products and cache" in notes
    for said in ("products quantized to fp8", "engine of", "on the card:", "prefill: ", "decode: ", "fused"):
        assert said in notes
    table = content(artifact, compiling.ROUNDING_FILE)
    assert table.splitlines()[0].split() == ["product", "form", "before", "after", "weight", "error", "output", "error"]
    assert sum(" fp8 by rows " in line for line in table.splitlines()) == 14
    assert sum(" int8 by rows " in line for line in table.splitlines()) == 1
    assert artifact.requires["context"] == "1024"
    facts = json.loads(content(artifact, network.BUILD_FILE))
    assert facts["cache_per_sequence"] == 2 * 2 * 1024 * 2 * 64 * 2  # layers, keys and values, tokens, heads, columns
    assert facts["engine"] == Path(artifact.files[network.ENGINE_FILE]).stat().st_size
    assert facts["weights"] > HEAD
    assert 0 < facts["activations"] < facts["build_memory"]


def test_without_calibration_texts_activations_are_not_quantized(rng: np.random.Generator) -> None:
    artifact = built(wide(rng), precision="fp8")
    prefill, _ = summaries(artifact)
    assert set(prefill.products) == {"float16 x fp8", "float16 x int8"}
    assert any("no calibration texts" in note for note in artifact.notes)


@pytest.mark.parametrize("stored", ["int4", "uint4_minimums", "uint4_zero_points", "int8"])
def test_quantized_checkpoints_are_kept_where_possible(stored: Any, rng: np.random.Generator) -> None:
    artifact = built(wide(rng, weights=stored))
    _, decode = summaries(artifact)
    if stored == "int8":
        assert any("15 matrices (15 in int8 in blocks of 32) were requantized" in note for note in artifact.notes)
        assert set(decode.products) == {"float16 x int8"}
        return
    assert not any("rounded" in note for note in artifact.notes)
    shifted = {"float16 x float16": 9} if stored != "int4" else {}
    assert decode.products == {"float16 x int4": 9, **shifted}


@pytest.mark.parametrize("precision", ["fast", "fp8", "int8", "int4"])
def test_a_note_says_when_there_is_nothing_to_quantize(precision: str, rng: np.random.Generator) -> None:
    artifact = built(wide(rng, weights="int4"), precision=precision, calibration=TEXT)
    assert artifact.notes[0] == "precision: int4 weights, float16 products and cache, float32 between them"
    said = f"precision {precision!r} quantizes plain matrices, and all of the checkpoint's are quantized"
    assert said in artifact.notes
    assert compiling.ROUNDING_FILE not in artifact.files
    assert not any("tokenizer" in note for note in artifact.notes)


def test_precision_exact_keeps_8_bit_blocks(rng: np.random.Generator) -> None:
    graph = wide(rng, weights="int8")
    artifact = built(graph, precision="exact")
    assert not any("rounded anew" in note for note in artifact.notes)
    _, decode = summaries(artifact)
    assert set(decode.products) == {"float32 x float32"}
    for precision, exact in (("exact", True), ("f16", False)):
        claims = BACKEND.claim(graph, target("rtx-4090"), {"precision": precision})
        assert all(c.exact for c in claims) == exact


def test_quantizing_again_is_noted_and_can_be_cancelled(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = wide(rng, weights="int8")
    shares: list[float] = []

    def progress(stage: str, share: float | None) -> None:
        if stage == "requantize":
            shares.append(share or 0.0)
            if len(shares) == 3:
                raise Cancelled

    options = {"precision": "f16", "context": None, "threads": None, "calibration": ()}
    with pytest.raises(Cancelled):
        BACKEND.compile(graph, target("rtx-4090"), options, progress)
    assert shares == sorted(shares)
    assert not list(tmp_path.iterdir())


def test_range_decides_between_two_kinds_of_16_bits() -> None:
    def seen(largest: float) -> Activations:
        return Activations(
            {("a", 0): ActivationRange(9e9, 9e9), ("a", 1): ActivationRange(largest, largest)}, {}, 1, None
        )

    free, asked = RtxPrecision("float16", "fp8", True, free=True), RtxPrecision("float16")
    assert compiling.wide_enough(free, seen(1e3), 89) == (free, [])
    assert compiling.wide_enough(asked, seen(1e6), 89) == (asked, [])
    wider, said = compiling.wide_enough(free, seen(2e4), 89)
    assert wider.number == "bfloat16"
    assert "up to 2e+04" in said[0]
    kept, said = compiling.wide_enough(free, seen(2e4), 75)
    assert kept.number == "float16"
    assert "float16 ends at 65504" in said[0]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    compiling.require_memory(1 << 30, None, 1 << 29)
    compiling.require_memory(1 << 30, 64 << 30, 1 << 29)
    said = r"takes about \d+\.\d GB of memory \(8\.6 GB of weights\).* has 8\.6 GB free"
    for smallest, helps in ((8 << 30, False), (4 << 30, True)):
        with pytest.raises(DoesNotFit, match=said) as caught:
            compiling.require_memory(8 << 30, 8 << 30, smallest)
        assert ("int4" in caught.value.fix) == helps


def test_nothing_is_built_where_memory_is_short(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing has begun by then: neither calibrating nor rounding, which take long."""
    monkeypatch.setattr(compiling, "_available", lambda: 1 << 20)
    options = {"precision": "fp8", "context": None, "threads": None, "calibration": TEXT}
    told: list[str] = []
    with pytest.raises(DoesNotFit):
        BACKEND.compile(wide(rng), target("rtx-4090"), options, lambda stage, share: told.append(stage))
    assert not told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["f16", "fp8", "int8", "int4", "exact"])
@pytest.mark.parametrize("stored", ["float32", "int4", "uint4_minimums", "int8"])
@pytest.mark.sweep(but=("float32-f16", "float32-fp8", "float32-exact", "int4-fp8", "uint4_minimums-exact", "int8-fp8"))
def test_planned_memory_is_what_the_weights_take(precision: str, stored: Any, rng: np.random.Generator) -> None:
    graph = wide(rng, weights=stored)
    options = {"precision": precision, "context": None, "threads": None, "calibration": TEXT}
    card = target("rtx-4090")
    planned = compiling.planned_bytes(graph, compiling.precision_of(graph, card, options))
    artifact = BACKEND.compile(graph, card, options, lambda stage, share: None)
    weights = json.loads(content(artifact, network.BUILD_FILE))["weights"]
    rotations = 2 * 1024 * 32 * 4 * 2  # tables of cosines and sines, of each profile; vectors are small
    assert abs(weights - planned) < 0.15 * planned + rotations


@pytest.mark.parametrize("precision", ["int4", "fp8"])
def test_a_large_vocabulary_is_planned_in_int8(precision: str, rng: np.random.Generator) -> None:
    graph = wide(rng, layers=1, vocabulary=16384)
    options = {"precision": precision, "context": None, "threads": None, "calibration": TEXT}
    card = target("rtx-4090")
    planned = compiling.planned_bytes(graph, compiling.precision_of(graph, card, options))
    artifact = BACKEND.compile(graph, card, options, lambda stage, share: None)
    weights = json.loads(content(artifact, network.BUILD_FILE))["weights"]
    assert abs(weights - planned) < 0.03 * planned


def test_a_weight_beyond_float16_is_refused_with_its_size(rng: np.random.Generator, tmp_path: Path) -> None:
    graph = _scaled(wide(rng, layers=1), 1e6)
    with pytest.raises(OptionError, match=r"has numbers up to .*, and float16 ends at 65504.*precision='bf16'"):
        built(graph, precision="f16")
    assert not list(tmp_path.iterdir())


def _scaled(graph: Graph, factor: float) -> Graph:
    """The same graph with its first matrix that much larger."""
    for value in graph.model.graph.initializers.values():
        kept = value.meta.get(WEIGHT_META)
        if isinstance(kept, Dense) and len(kept.shape) == 2 and kept.shape[0] != kept.shape[1]:
            value.meta[WEIGHT_META] = replace(kept, load=partial(_times, kept.load, factor))
            return graph
    raise AssertionError("no matrix")


def _times(load: Callable[[], Any], factor: float) -> Any:
    return load() * np.float32(factor)


@pytest.mark.parametrize("precision", ["fp8", "fast"])
def test_float8_is_refused_below_sm_89_with_another_plan(precision: str, rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match=r"of sm_89 or newer, and this is sm_86.*Use precision='int8' or 'int4'"):
        BACKEND.claim(wide(rng), target("rtx-3090"), {"precision": precision, "calibration": TEXT})


def test_bfloat16_is_refused_on_turing(rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match="needs sm_80 or newer"):
        BACKEND.claim(wide(rng), target("t4"), {"precision": "bf16"})


def test_heads_of_odd_sizes_are_built_with_aligned_caches(rng: np.random.Generator) -> None:
    artifact = built(wide(rng, kv_heads=1, value_dim=17, context=64), precision="f16")
    made = Network.from_json(content(artifact, network.NETWORK_FILE))
    assert {k.shape for k in made.kept} == {(1, 128, 64), (1, 128, 17)}
    assert all(k.nbytes % network.ALIGNMENT == 0 for k in made.kept)
    assert made.context == 64


def test_an_unknown_precision_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match="is unknown"):
        BACKEND.claim(wide(rng), target("t4"), {"precision": "int2"})


def test_int4_needs_columns_in_blocks(rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match="quantizes blocks of 32 columns, and a matrix has 100"):
        BACKEND.claim(wide(rng, inner=100), target("rtx-4090"), {"precision": "int4"})


@pytest.mark.parametrize(
    ("form", "reason"),
    [({"attention_bias": True}, "no kernel for Concat"), ({"head_dim": 320}, "heads of 320 columns")],
)
def test_nodes_are_refused_with_their_reason(form: dict[str, Any], reason: str, rng: np.random.Generator) -> None:
    claims = BACKEND.claim(wide(rng, **form), target("rtx-4090"), {})
    assert any(reason in c.reason for c in claims if not c.ok)


@pytest.mark.parametrize("policy", [Sparsity(0.9), Sparsity(1.0, top_k=4)], ids=["coverage", "columns"])
def test_policies_without_static_shapes_are_refused(policy: Sparsity, rng: np.random.Generator) -> None:
    claims = BACKEND.claim(with_sparsity(wide(rng), policy), target("rtx-4090"), {})
    refused = [c for c in claims if not c.ok]
    assert refused
    assert all("use top_k=…" in c.reason or "use columns=0" in c.reason for c in refused)


def test_claims_are_inexact_where_the_precision_rounds(rng: np.random.Generator) -> None:
    graph = wide(rng)
    claims = {c.node: c.exact for c in BACKEND.claim(graph, target("rtx-4090"), {"precision": "f16"})}
    assert all(claims.values())
    claims = {c.node: c.exact for c in BACKEND.claim(graph, target("rtx-4090"), {"precision": "fp8"})}
    assert sum(not exact for exact in claims.values()) == 15
    options = {"precision": "fast", "calibration": TEXT}
    inexact = {c.node for c in BACKEND.claim(graph, target("rtx-4090"), options) if not c.exact}
    assert len(inexact) == 17
    assert {str(n.name) for n in graph.nodes() if is_attention(n)} < inexact


def test_heads_whose_means_would_be_unaligned_are_refused_at_once(rng: np.random.Generator) -> None:
    for columns, ok in ((16, True), (24, True), (20, False), (2, False)):
        graph = tiny_decoder(rng, q_heads=2, kv_heads=1, head_dim=columns)
        for policy in (STATIC, Sparsity(1.0)):
            claims = BACKEND.claim(with_sparsity(graph, policy), target("rtx-4090"), {})
            refused = [c.reason for c in claims if not c.ok]
            assert bool(refused) == (not ok and not policy.dense)
            assert not refused or f"heads of a multiple of 8 columns, and these have {columns}" in refused[0]


# -------------------------------------------------------------------------------------------------- what is left behind


class _Stop(BaseException):
    """As Ctrl-C is one."""


@pytest.mark.parametrize("error", [Cancelled("stop"), KeyboardInterrupt(), _Stop()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("stage", ["observe", "round", "write", "parse", "build"])
def test_a_build_that_is_stopped_leaves_nothing(
    error: BaseException, stage: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    graph = wide(rng)
    seen: list[str] = []

    def progress(name: str, share: float | None) -> None:
        seen.append(name)
        if name == stage and (stage != "build" or (share or 0) > 0.6):
            raise error

    options = {"precision": "fp8", "context": None, "threads": None, "calibration": TEXT}
    with pytest.raises(type(error)):
        BACKEND.compile(graph, target("rtx-4090"), options, progress)
    assert stage in seen
    assert not list(tmp_path.iterdir())


def test_progress_grows_to_the_end(rng: np.random.Generator) -> None:
    told: list[tuple[str, float | None]] = []
    options = {"precision": "fp8", "context": None, "threads": None, "calibration": TEXT}
    BACKEND.compile(wide(rng), target("rtx-4090"), options, lambda s, x: told.append((s, x)))
    shares = [x for _, x in told if x is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert list(dict.fromkeys(s for s, _ in told)) == ["observe", "round", "write", "parse", "build"]


def test_a_full_disk_is_an_oserror_and_leaves_nothing(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host knows what to do about it."""

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    original = Path.open

    def opened(self: Path, mode: str = "r", **more: Any) -> Any:
        file = original(self, mode, **more)
        return Full(file) if self.name == network.ENGINE_FILE and "w" in mode else file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="No space left"):
        built(wide(rng), precision="f16")
    assert not list(tmp_path.iterdir())


def test_an_error_quotes_tensorrt(rng: np.random.Generator, tmp_path: Path) -> None:
    from transom_tensorrt.building import BuildSpec, build
    from transom_tensorrt.network import ShapeProfile
    from transom_tensorrt.sdk import installed

    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"no model")
    profile = ShapeProfile((1, 1, 1), (1, 1, 1), (1, 1, 1))
    wanted = BuildSpec(Network("float16", 1, 1, (), profile, profile), {}, 89)
    with pytest.raises(EngineError, match=r"TensorRT \(tensorrt-rtx .*\): it cannot read the network"):
        build(wrong, tmp_path / "plan", wanted, installed()[0], lambda s, x: None)
