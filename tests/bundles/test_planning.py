"""The planned size and speed of a bundle: computed by hand, from shapes alone, and compared with real binaries.

Draws: sizes follow from shapes; the numbers only fill the files.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest

import transom
from transom.bundles.inventory import inventory
from transom.bundles.plan import ExportPlan, VariantPlan
from transom.bundles.weighing import context_lengths, form_of, plan_variants
from transom.contract import Device
from transom.contract_optional import MatrixForm, StorageForm
from transom.errors import DoesNotFit, OptionError, SelectionError, TransomError
from transom.graph import Blocked, Dense, Graph
from transom.graph.weights import UNPACKED, BlockedArrays
from transom.hardware import catalogue
from transom.hardware.bandwidth import bandwidth
from transom.plugins import load_plugins
from transom.testing import models
from transom_mobile_export.onnx import compiling
from transom_mobile_export.onnx.packing import block_of, pack
from transom_mobile_export.onnx.storage import FORMS as ONNX_FORMS
from transom_mobile_export.onnx.storage import kept
from transom_mobile_export.published import FIGURES, published
from transom_mobile_export.qnn.claims import read_decoder
from transom_mobile_export.qnn.layout import LARGEST
from transom_mobile_export.qnn.parts import plan_parts
from transom_mobile_export.qnn.precision import resolve
from transom_mobile_export.qnn.storage import FORMS, on_chip

ROOT = Path(__file__).parents[2]
TARGETS = {device.id.removeprefix("remote:"): device for device in catalogue()}
GEN2 = TARGETS["snapdragon-8-gen-2"]
HERE = Device("cpu", "cpu", "x86_64", 8 << 30)


def plan_of(
    graph: Graph, device: Device, variants: Sequence[tuple[str, str]], context: int | None = None
) -> ExportPlan:
    """The plan for some (format, precision)."""
    assert graph.decoder is not None
    known = load_plugins().backends
    forms = [form_of(known[format].backend, precision, graph.decoder, device) for format, precision in variants]
    return plan_variants(graph, graph.decoder, device, forms, context)


def planned(
    graph: Graph, variant: tuple[str, str] | StorageForm, device: Device = GEN2, context: int | None = None
) -> Any:
    if isinstance(variant, tuple):
        return plan_of(graph, device, [variant], context)
    assert graph.decoder is not None
    return plan_variants(graph, graph.decoder, device, [variant], context)


def only(plan: ExportPlan) -> VariantPlan:
    (variant,) = plan.variants
    return variant


def weighed(plan: ExportPlan) -> dict[str, int]:
    return {w.use: w.bytes for w in only(plan).weights}


@pytest.fixture
def shaped() -> Iterator[ModuleType]:
    """benchmarks/shaped.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("shaped")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


# ----------------------------------------------------------------------------------------------------------- arithmetic
def test_a_small_model_by_hand() -> None:
    """2 layers, hidden 64, 4 query and 2 KV heads of 16, inner 96, vocabulary 61; context 160."""
    graph = models.tiny_decoder(np.random.default_rng(0))
    plan = planned(graph, ("qnn", "int8"), context=100)
    # 64×64 q, 32×64 k, 32×64 v, 64×64 o, 96×64 gate, 96×64 up, 64×96 down; 16 bytes for each of their rows
    layer = 4096 + 2048 + 2048 + 4096 + 6144 + 6144 + 6144 + 16 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    head = 61 * 64 + 61 * 16
    other = 2 * (5 * 64 + 1 + 8)  # five norms, the factor of the embedding, 8 frequencies; float16
    table, code = 2 * 61 * 64, 2 * FORMS["int8"].layer
    twice = 2 * (64 + 32) * (64 + 16)  # the layouts of prefill and decoding differ for q or o, and for k or v
    uses = {
        "products": 2 * layer, "vocabulary": head, "embedding": table, "other": other, "twice": twice, "code": code,
    }  # fmt: skip
    assert weighed(plan) == uses
    variant = only(plan)
    assert variant.weight_bytes == 2 * layer + head + other + twice + code  # the embeddings are in a mapped file
    assert variant.cache_per_token == 2 * 2 * (16 + 16)
    (row,) = variant.at
    assert row.cache == 128 * 100
    assert row.read == 2 * layer + head + other + code // 2 + 2 * 64 + 128 * 100
    assert row.bound == pytest.approx(8400e6 * 64 / 8 / row.read)
    folder = "qnn-snapdragon-8-gen-2"
    assert variant.files == {f"{folder}/part0": 2 * layer + head + other + twice + code, "shared/embedding.bin": table}


def test_blocks_of_four_bits_by_hand() -> None:
    graph = models.tiny_decoder(np.random.default_rng(0))
    rows, columns_in_blocks = 64 + 32 + 32 + 64 + 96 + 96 + 64, 64 * (64 + 32 + 32 + 64 + 96 + 96) + 96 * 64
    qnn, onnx = planned(graph, ("qnn", "int4")), planned(graph, ("onnx", "int4"))
    assert weighed(qnn)["products"] == 2 * (columns_in_blocks // 2 + columns_in_blocks // 32 * 2 + 16 * rows)
    assert weighed(onnx)["products"] == 2 * (columns_in_blocks // 2 + columns_in_blocks // 32 * 4)
    assert weighed(onnx)["vocabulary"] == 61 * 64 + 61 * 64 // 32 * 4
    assert "embedding" not in weighed(onnx)  # it is the vocabulary matrix
    (held,) = (w.held for w in only(onnx).weights if w.use == "products")
    assert held == int(1.25 * weighed(onnx)["products"])  # ONNX Runtime packs it anew


def test_random_sizes_are_added_up(rng: np.random.Generator) -> None:
    layers, kv, head, inner = (int(rng.integers(*span)) for span in ((1, 5), (1, 4), (1, 5), (1, 6)))
    q, dim, width, hidden = kv * int(rng.integers(1, 4)), 32 * head, 32 * inner, 64 * int(rng.integers(1, 4))
    graph = models.tiny_decoder(
        rng, layers=layers, q_heads=q, kv_heads=kv, head_dim=dim, hidden=hidden, inner=width, vocabulary=96
    )
    matrices = [(q * dim, hidden), (kv * dim, hidden), (kv * dim, hidden), (hidden, q * dim)]
    matrices += [(width, hidden), (width, hidden), (hidden, width)]
    small = [16 * rows * columns <= sum(map(math.prod, matrices)) for rows, columns in matrices]
    plan = planned(graph, ("qnn", "int4"))
    int4 = [rows * (columns // 2 + columns // 32 * 2 + 16) for rows, columns in matrices]
    int8 = [rows * (columns + 16) for rows, columns in matrices]
    assert weighed(plan)["products"] == layers * sum(n for n, few in zip(int4, small, strict=True) if not few)
    assert weighed(plan).get("small products", 0) == layers * sum(n for n, few in zip(int8, small, strict=True) if few)
    assert only(plan).cache_per_token == layers * kv * 2 * dim


def test_contexts_double_up_to_the_one_asked_for(rng: np.random.Generator) -> None:
    assert context_lengths(8192) == (512, 1024, 2048, 4096, 8192)
    assert context_lengths(3000) == (512, 1024, 2048, 3000)
    assert context_lengths(300) == (300,)
    graph = models.tiny_decoder(rng, context=2048)
    variant = only(planned(graph, ("onnx", "int8")))
    assert [row.context for row in variant.at] == [512, 1024, 2048]
    caches = [row.cache for row in variant.at]
    assert caches == [variant.cache_per_token * n for n in (512, 1024, 2048)]
    for one, next_one in zip(variant.at, variant.at[1:], strict=False):
        assert one.bound is not None
        assert next_one.bound is not None
        assert one.peak < next_one.peak
        assert one.read < next_one.read
        assert one.bound > next_one.bound


def test_windows_spare_reads_where_shapes_are_open_and_none_where_they_are_fixed(rng: np.random.Generator) -> None:
    graph = models.tiny_decoder(rng, layers=4, window=5)  # of the first and the third layer
    for format, seen in (("onnx", 2 * 100 + 2 * 5), ("qnn", 4 * 100)):
        variant = only(planned(graph, (format, "auto"), context=100))
        weights = sum(w.read for w in variant.weights)
        assert variant.at[-1].read - weights == variant.cache_per_token // 4 * seen


def test_blocks_of_the_checkpoint_stay_where_the_format_takes_them(rng: np.random.Generator) -> None:
    for stored, block in (("int4", 4), ("uint4_minimums", 8), ("uint4_zero_points", 4.5), ("int8", 4)):
        graph = models.tiny_decoder(rng, weights=stored)  # type: ignore[arg-type]
        numbers = 2 * 64 * (64 + 32 + 32 + 64 + 96 + 96 + 96)
        bits = 8 if stored == "int8" else 4
        shapes = [(64 + 32 + 32 + 64 + 96 + 96, 64), (64, 96)]
        by_hand = 2 * sum(rows * math.ceil(columns * bits / 8 + columns // 32 * block) for rows, columns in shapes)
        for precision in ("int4", "int8", "f16"):
            plan = planned(graph, ("onnx", precision))
            assert weighed(plan)["products"] == by_hand
            (held,) = (w.held for w in only(plan).weights if w.use == "products")
            assert held == pytest.approx((1.2 if bits == 8 else 1.25) * by_hand, abs=14)  # rounded down, by matrix
            assert only(plan).kept == 15
            assert f"onnx, {precision}: plain products" in str(plan)
            assert "15 matrices keep the checkpoint's integer blocks" in str(plan)
        plain = models.tiny_decoder(rng)
        assert weighed(planned(graph, ("qnn", "int8"))) == weighed(planned(plain, ("qnn", "int8")))
        exact = planned(graph, ("onnx", "exact"))
        assert weighed(exact)["products"] == 4 * numbers
        assert only(exact).kept == 0
        assert "plain" not in str(exact)


def test_blocks_that_stay_take_the_bytes_that_the_backend_packs_them_into(rng: np.random.Generator) -> None:
    for dtype in ("int4", "uint4", "int8", "uint8"):
        for block in (16, 32, 128, 1024):  # the last one by rows, cut into blocks of 256
            for minimums, zeros in ((False, False), (True, False), (False, True)):
                shape, blocks = (8, 1024), 1024 // block
                codes = [rng.integers(0, 7, (8, n)).astype(UNPACKED[dtype]) for n in (1024, blocks, blocks)]
                scales, least = rng.uniform(0.1, 1, (2, 8, blocks)).astype(np.float16)
                parts = BlockedArrays(codes[0], scales, least if minimums else None, codes[1] if zeros else None)
                weight = Blocked(shape, block, dtype, "float16", lambda parts=parts: parts, minimums, zeros)  # type: ignore[misc]
                packed, form = pack(weight), kept(weight)
                arrays = (packed.codes, packed.scales, packed.zero_points, packed.shifts)
                assert form is not None
                assert form.bytes(*shape) == sum(array.nbytes for array in arrays if array is not None)
    for other in (replace(weight, block=8), replace(weight, dtype="float8e4m3fn")):
        assert kept(other) is None
        assert block_of(other) == 0


def test_rows_that_are_no_multiple_of_a_block(rng: np.random.Generator) -> None:
    graph = models.tiny_decoder(rng, inner=72)
    onnx = planned(graph, ("onnx", "int4"))
    fitting = 64 * (64 + 32 + 32 + 64 + 72 + 72)
    assert weighed(onnx)["products"] == 2 * (fitting // 2 + fitting // 32 * 4 + 64 * 72 * 4)  # the last one in float32
    with pytest.raises(OptionError, match=r"blocks of 32 columns, and a matrix has 72.*precision='int8'"):
        planned(graph, ("qnn", "int4"))
    planned(graph, ("qnn", "int8"))


def test_every_product_has_the_form_that_the_backend_gives_it(shaped: ModuleType) -> None:
    forms = {"float16": MatrixForm(16), "int8": MatrixForm(8, row=16), "int4": MatrixForm(4, 32, 2, 16)}
    for shape in ("3B", "7B", "7B-grouped", "7B-wide"):
        graph = shaped.decoder(shape, 4096, layers=2)
        for precision in ("f16", "int8", "int4"):
            resolved = resolve({"precision": precision}, 73)
            ops = [d for part in read_decoder(graph, resolved).layers for own in part.layers for d in own]
            expected = sum(forms[resolved.weights_of(d)].bytes(*d.weight.shape) for d in ops if d.weight is not None)
            plan = planned(graph, ("qnn", precision))
            assert sum(weighed(plan).get(use, 0) for use in ("products", "small products", "vocabulary")) == expected
            parts = plan_parts(read_decoder(graph, resolved).layers)
            assert [(p.first, p.end, p.bytes) for p in parts] == [(p.first, p.end, p.bytes) for p in only(plan).parts]
    grouped, wide = (str(planned(shaped.decoder(s, 4096), ("qnn", "int4"))) for s in ("7B-grouped", "7B-wide"))
    assert "small products: 32 layers × (2 × 1024×4096) = 268.435 million at 8.03 bits" in grouped
    assert "small products: 28 layers × (2 × 512×3584 + 2 × 3584×3584)" in wide  # queries and outputs are 5.5 % each


def test_a_hexagon_has_the_precisions_that_the_backend_takes_for_it(rng: np.random.Generator) -> None:
    graph, refused = models.tiny_decoder(rng), 0
    for target in TARGETS.values():
        if not target.arch.startswith("hexagon"):
            continue
        for precision in FORMS:
            try:
                name = resolve({"precision": precision}, int(target.drivers["htp_arch"])).weights
            except OptionError:
                refused += 1
                with pytest.raises(
                    OptionError, match=rf"qnn has no precision='{precision}' on {target.id}.*It has f16"
                ):
                    planned(graph, ("qnn", precision), target)
            else:
                form = only(planned(graph, ("qnn", precision), target)).form
                assert form.precision == {"float16": "f16"}.get(name, name)
    assert refused == 2
    assert only(planned(graph, ("qnn", "auto"), HERE)).form.precision == "int8"  # the emulator's


def test_other_formats_weigh_what_is_planned_for_all(rng: np.random.Generator) -> None:
    graph = models.tiny_decoder(rng)
    assert graph.decoder is not None
    plan = planned(graph, ("tensorrt", "bf16"))
    numbers = 2 * 64 * (64 + 32 + 32 + 64 + 96 + 96 + 96)
    assert weighed(plan)["products"] == pytest.approx(2 * numbers, rel=0.01)


def test_chips_that_cannot_share_weights_have_them_twice_and_read_them_once(rng: np.random.Generator) -> None:
    graph = models.tiny_decoder(rng)
    old, new = (only(planned(graph, ("qnn", "f16"), TARGETS[f"snapdragon-8-gen-{n}"])) for n in (1, 2))
    ours, theirs = ({w.use: w for w in variant.weights} for variant in (old, new))
    assert ours["products"].bytes == 2 * theirs["products"].bytes
    assert ours["products"].numbers == 2 * theirs["products"].numbers
    assert ours["products"].read == theirs["products"].read
    assert sum(old.files.values()) == sum(w.bytes for w in old.weights)
    assert any("hexagon_v69 cannot share" in note for note in old.notes)
    assert not any("cannot share" in note for note in new.notes)


# ----------------------------------------------------------------------------------------------------------------- text
def test_the_arithmetic_can_be_followed() -> None:
    graph = models.tiny_decoder(np.random.default_rng(0))
    text = str(planned(graph, ("qnn", "int8"), context=100))
    assert "LPDDR5X, 8400 million transfers/s × 64 bit / 8 = 67.2 GB/s" in text
    assert "2 layers × (2 × 32×64 + 2 × 64×64 + 64×96 + 2 × 96×64)" in text
    assert "2 layers × 2 heads × (16 + 16) numbers × 1 byte = 128 bytes a token" in text
    assert "67.2 GB/s / (" in text
    assert "a bound and not a measurement" in text
    assert "published" not in text  # nobody publishes figures of such a model


def test_what_programs_get_is_json(rng: np.random.Generator) -> None:
    graph = models.tiny_decoder(rng)
    plan = plan_of(graph, GEN2, [("qnn", "int4"), ("onnx", "auto")])
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["memory"]["bytes_per_second"] == 67.2e9
    assert told["bytes"] == sum(count for v in told["variants"] for count in v["files"].values())
    assert [(v["format"], v["precision"]) for v in told["variants"]] == [("qnn", "int4"), ("onnx", "int4")]
    assert told["variants"][0]["at"][-1]["bound"] == only(planned(graph, ("qnn", "int4"))).at[-1].bound


# ------------------------------------------------------------------------------------------------------------ refusals
def test_an_unknown_bandwidth_is_reported_and_gives_no_bound(rng: np.random.Generator) -> None:
    plan = planned(models.tiny_decoder(rng), ("onnx", "int4"), HERE)
    assert plan.memory is None
    assert only(plan).at[-1].bound is None
    assert "no bound" in str(plan)
    assert "tokens/s" not in str(plan)
    assert plan.to_dict()["memory"] is None


def test_what_cannot_be_planned_is_refused(rng: np.random.Generator) -> None:
    graph = models.tiny_decoder(rng)
    with pytest.raises(OptionError, match=r"qnn has no precision='fp8'.*auto, int8"):
        planned(graph, ("qnn", "fp8"))
    with pytest.raises(OptionError, match="context=4000"):
        planned(graph, ("qnn", "int8"), context=4000)


@pytest.fixture
def saved(rng: np.random.Generator, tmp_path: Path) -> Path:
    """A tiny decoder as a file."""
    path = tmp_path / "tiny.onnx"
    models.tiny_decoder(rng).save(path)
    return path


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target": "rtx-4090", "format": "qnn"}, '"qnn" cannot compile for the device "remote:rtx-4090"'),
        ({"target": "snapdragon-8-gen-2", "format": "onxx"}, 'Unknown backend "onxx". Did you mean "onnx"'),
        ({"target": "snapdragon-8-gen-2", "sparsity": "balanced"}, "A plan is for dense attention"),
        ({"target": "snapdragon-8-gen-2", "context": 161}, "context=161 is outside 1 … 160"),
        ({"target": "snapdragon-8-gen-9"}, "snapdragon-8-gen-2"),
    ],
)
def test_what_an_export_refuses_is_not_planned(saved: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(TransomError, match=re.escape(said)):
        transom.plan_export(saved, **asked)


def test_packages_of_the_compiler_are_not_needed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = transom.plan_export(saved, target="snapdragon-8-gen-2", format="qnn,onnx")
    monkeypatch.setattr("transom_mobile_export.qnn.probing.installed", dict)
    monkeypatch.setattr("transom_mobile_export.onnx.probing.installed_version", lambda package: None)
    with pytest.raises(SelectionError, match="cannot compile"):
        transom.export(saved, target="snapdragon-8-gen-2", format="qnn", out=tmp_path / "bundle")
    (plan,) = transom.plan_export(saved, target="snapdragon-8-gen-2", format="qnn,onnx")
    assert [v.form.name for v in plan.variants] == ["qnn, int8", "onnx, int4"]
    assert [plan] == here


# --------------------------------------------------------------------------------------------------------------- parts
def test_layers_are_cut_into_parts_that_fit(rng: np.random.Generator) -> None:
    graph = models.tiny_decoder(rng, layers=7)
    form = FORMS["int8"]
    layer = weighed(planned(graph, form))["products"] // 7
    head = weighed(planned(graph, form))["vocabulary"]
    for most, sizes in ((10 * layer, [7]), (3 * layer, [3, 3, 1]), (2 * layer + head, [2, 2, 2, 1])):
        variant = only(planned(graph, replace(form, part_bytes=most)))
        assert [part.end - part.first for part in variant.parts] == sizes
        assert [part.first for part in variant.parts[1:]] == [part.end for part in variant.parts[:-1]]
        assert max(part.bytes for part in variant.parts) <= most
        assert sum(part.bytes for part in variant.parts) == 7 * layer + head
        assert [part.vocabulary for part in variant.parts] == [False] * (len(sizes) - 1) + [True]
        assert sum(f"/part{i}" in name for i in range(9) for name in variant.files) == len(sizes)
    with pytest.raises(DoesNotFit, match=r"Layer 6 takes .* as qnn, int8"):
        planned(graph, replace(form, part_bytes=layer))  # the last one has the vocabulary matrix, too


def test_eight_billion_in_eight_bits_are_three_parts(shaped: ModuleType) -> None:
    variant = only(planned(shaped.decoder("8B", 4096), ("qnn", "int8")))
    assert len(variant.parts) == 3
    assert all(part.bytes <= LARGEST < 4e9 for part in variant.parts)
    assert variant.parts[-1].end == 32


@pytest.mark.parametrize("name", models.VARIANTS)
def test_every_layer_has_its_seven_products(rng: np.random.Generator, tmp_path: Path, name: str) -> None:
    graph = models.tiny_decoder(rng, layers=3, **models.VARIANTS[name])
    graph.save(tmp_path / "graph.onnx")
    for found in (inventory(graph), inventory(Graph.open(tmp_path / "graph.onnx"))):
        assert [[m.layer for m in found.products].count(i) for i in range(3)] == [7, 7, 7]
        assert [m.shape for m in found.vocabulary] == [(61, 64)]
        assert found.tied
        assert found.embedding is not None
        assert found.embedding.shape == (61, 64)
        queries = [m.shape for m in found.products if m.layer == 1][:3]
        layer = graph.decoder.layers[1] if graph.decoder else None
        assert layer is not None
        widths = (layer.q_heads * layer.head_dim, layer.kv_heads * layer.head_dim, layer.kv_heads * layer.value_dim)
        assert queries == [(width, 64) for width in widths]


# ---------------------------------------------------------------------------------------------------- nothing is read
class Unreadable:
    """Stands for the weights of `transom.testing.models`: who loads one fails."""

    def __init__(self, *_: Any) -> None:
        pass

    def hash(self) -> str:
        return "unreadable"

    def vector(self, size: int, center: float = 0.0, spread: float = 0.2) -> Dense:
        return Dense((size,), "float32", self._refuse)

    def matrix(self, rows: int, columns: int) -> Dense:
        return Dense((rows, columns), "bfloat16", self._refuse)

    @staticmethod
    def _refuse() -> Any:
        raise AssertionError("a weight was read")


def test_no_weight_is_read(rng: np.random.Generator) -> None:
    with mock.patch.object(models, "_Weights", Unreadable):
        graph = models.tiny_decoder(rng, linear_bias=True, sinks=True, final_softcap=6.0, window=5)
    with pytest.raises(AssertionError, match="a weight was read"):
        next(v for v in graph.model.graph.initializers.values() if v.const_value.nbytes > 1000).const_value.numpy()  # type: ignore[union-attr]
    named = {"qnn": FORMS, "onnx": ONNX_FORMS}
    variants = [(format, precision) for format, forms in named.items() for precision in forms]
    text = str(plan_of(graph, GEN2, [*variants, ("tensorrt", "fp8")]))
    assert text.count("a bound and not a measurement") == len(variants) + 1


PARAMETERS = {
    "1B": 1_235_814_400, "3B": 3_212_749_824, "8B": 8_030_261_248, "6B-grouped": 6_061_035_520, "7B": 6_738_415_616,
    "7B-grouped": 7_241_732_096, "7B-wide": 7_615_616_512,
}  # fmt: skip
"""Of the real models, as their model cards' files have them."""


@pytest.mark.parametrize("shape", PARAMETERS)
def test_shapes_have_the_parameters_of_the_real_models(shaped: ModuleType, shape: str) -> None:
    graph, sizes = shaped.decoder(shape, 4096), shaped.SHAPES[shape]
    found = inventory(graph)
    assert found.embedding is not None
    count = sum(m.numbers for m in (*found.products, *found.vocabulary)) + (2 * sizes["layers"] + 1) * sizes["hidden"]
    if shape not in ("1B", "3B"):
        count += found.embedding.numbers  # their own; here the head is tied
    if shape == "7B-wide":  # biases of queries, keys and values
        count += 28 * (3584 + 2 * 512)
    assert count == PARAMETERS[shape]


def test_seven_billion_by_hand(shaped: ModuleType) -> None:
    plan = planned(shaped.decoder("7B", 4096), ("qnn", "int4"), context=2048)
    last = only(plan).at[-1]
    assert weighed(plan)["products"] == pytest.approx(6_476_005_376 * 4.53 / 8, rel=1e-3)
    assert last.cache == 2048 * 32 * 2 * 4096
    assert last.bound == pytest.approx(67.2e9 / 4.334e9, rel=1e-3)
    assert "published, not measured by us" in str(plan)


# -------------------------------------------------------------------------------------------------------- what is known
def test_every_chip_and_card_of_the_catalogue_has_a_bandwidth() -> None:
    told = {name: found.bytes_per_second / 1e9 for name, d in TARGETS.items() if (found := bandwidth(d)) is not None}
    assert set(told) == {name for name, device in TARGETS.items() if device.arch != "aarch64"}
    sheets = {
        "snapdragon-8-gen-1": 51.2, "snapdragon-8-gen-2": 67.2, "snapdragon-8-gen-3": 76.8, "snapdragon-8-elite": 84.8,
        "snapdragon-x-elite": 135, "v100": 900, "t4": 320, "rtx-2080-ti": 616, "a100": 1555, "a100-80gb": 2039,
        "a10": 600, "a40": 696, "rtx-3060": 360, "rtx-3080": 760, "rtx-3090": 936, "l4": 300, "l40s": 864,
        "rtx-4060": 272, "rtx-4070": 504, "rtx-4080": 717, "rtx-4090": 1008, "h100": 3350, "h200": 4800, "b200": 8000,
        "rtx-5070": 672, "rtx-5080": 960, "rtx-5090": 1792,
    }  # fmt: skip
    for name, speed in sheets.items():
        assert told[name] == pytest.approx(speed, rel=0.03), name
    assert bandwidth(HERE) is None
    assert bandwidth(replace(GEN2, id="remote:another")) is None


def test_no_published_figure_is_above_the_bound_of_its_phone(shaped: ModuleType) -> None:
    compared = 0
    for shape in PARAMETERS:
        graph = shaped.decoder(shape, 8192)
        assert graph.decoder is not None
        for figure in published(graph.decoder):
            chip = TARGETS[figure.target]
            form = replace(
                on_chip(FORMS["int4"], chip), products=MatrixForm(4, row=16), small=None
            )  # the least to read
            plan = plan_variants(graph, graph.decoder, chip, [form], figure.context or 512)
            bound = only(plan).at[-1].bound
            assert bound is not None
            assert 0.2 * bound < figure.tokens_per_second < bound, str(figure)
            compared += 1
    assert compared == sum(map(len, FIGURES.values()))


@pytest.mark.parametrize("precision", ["int4", "int8", "f16", "exact"])
def test_portable_decoders_weigh_what_is_planned(shaped: ModuleType, precision: str) -> None:
    """Compiled; every weight begins on a page of its own, and tables of rotations are there, too."""
    from transom_mobile_export.onnx import OnnxDecoder

    backend = OnnxDecoder()
    graph = shaped.made_of(shaped.DrawnWeights, 256, "bfloat16", **{**shaped.SHAPES["tiny"], "vocabulary": 2048})
    artifact = backend.compile(graph, HERE, {"precision": precision, "context": 256}, lambda stage, share: None)
    file = Path(artifact.files["model.onnx.data"])
    try:
        made = file.stat().st_size
    finally:
        shutil.rmtree(file.parent)
    plan = only(planned(graph, ("onnx", precision)))
    (expected,) = plan.files.values()
    assert expected <= made < 1.03 * expected
    assert (plan.form.chunk, plan.form.activations) == (compiling.CHUNK, compiling.ROWS)


@pytest.mark.parametrize("name", ["int8", "int4", "int4 by rows"])
def test_context_binaries_weigh_what_is_planned(rng: np.random.Generator, tmp_path: Path, name: str) -> None:
    """One product, compiled for the Hexagon v73."""
    pytest.importorskip("onnxruntime_qnn")
    form = MatrixForm(4, row=16) if name == "int4 by rows" else FORMS[name].products
    sizes = {rows: binary_bytes(rng, tmp_path / str(rows), rows, 1024, form) for rows in (1024, 3072)}
    grown, planned_growth = sizes[3072] - sizes[1024], form.bytes(2048, 1024)
    assert grown == pytest.approx(planned_growth, rel=0.025)  # rows take 6 to 20 bytes besides, and pages are filled


def test_what_two_graphs_do_not_share_is_counted(rng: np.random.Generator) -> None:
    """What 6 KV heads more take of the shared context of a chip: their matrices, and half of them once more."""
    pytest.importorskip("onnxruntime_qnn")
    from transom_mobile_export.qnn.backend import Qnn

    made, plans = [], []
    for kv_heads in (2, 8):
        graph = models.tiny_decoder(
            rng, layers=1, q_heads=8, kv_heads=kv_heads, head_dim=64, hidden=1024, inner=96, context=128
        )
        options = {"precision": "int8", "context": 128, "calibration": ()}
        artifact = Qnn().compile(graph, GEN2, options, lambda stage, share: None)
        binaries = [Path(f) for name, f in artifact.files.items() if name.endswith(".bin") and "part" in name]
        made.append(sum(path.stat().st_size for path in binaries))
        plans.append(only(planned(graph, ("qnn", "int8"))).weight_bytes)
    assert made[1] - made[0] == pytest.approx(plans[1] - plans[0], rel=0.1)  # pages are filled


def binary_bytes(rng: np.random.Generator, folder: Path, rows: int, columns: int, form: MatrixForm) -> int:
    """Bytes of the context binary of y = x @ wᵀ with activations in uint16."""
    import ml_dtypes
    import onnx_ir as ir

    from transom.programs.onnx_writing import FLOAT, OnnxWriter

    folder.mkdir()
    write = OnnxWriter("product")
    x = write.input("x", FLOAT, (1, 1, columns))
    by = write.constant(np.array(8 / 65535, np.float32)), write.constant(np.array(32768, np.uint16))
    x = write("DequantizeLinear", write("QuantizeLinear", x, *by, dtype=ir.DataType.UINT16), *by, dtype=FLOAT)
    most, dtype = (7, ir.DataType.INT4) if form.bits == 4 else (127, ir.DataType.INT8)
    codes = rng.integers(-most, most + 1, (columns, rows)).astype(ml_dtypes.int4 if form.bits == 4 else np.int8)
    steps = rng.uniform(0.001, 0.002, (columns // form.block, rows) if form.block else (rows,)).astype(np.float32)
    zeros = np.zeros(steps.shape, codes.dtype)  # by rows, 4 bits take 8 where these are left out
    parts = (
        write.weight("w", dtype, codes.shape, lambda: codes),
        write.constant(steps),
        write.weight("zeros", dtype, zeros.shape, lambda: zeros),
    )
    attributes: dict[str, Any] = {"axis": 0, "block_size": form.block} if form.block else {"axis": 1}
    y = write("MatMul", x, write("DequantizeLinear", *parts, dtype=FLOAT, **attributes))
    y = write("DequantizeLinear", write("QuantizeLinear", y, *by, dtype=ir.DataType.UINT16), *by, dtype=FLOAT)
    write.output(y, "y", (1, 1, rows))
    model = write.model()
    model.graph.opset_imports[""], model.ir_version = 21, 10
    ir.save(model, folder / "product.onnx")
    subprocess.run([sys.executable, "-c", COMPILE, str(folder)], check=True, timeout=120)
    return sum(path.stat().st_size for path in folder.glob("*.bin"))


COMPILE = """
import sys

import onnxruntime
import onnxruntime_qnn

folder = sys.argv[1]
onnxruntime.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
settings = onnxruntime.SessionOptions()
settings.log_severity_level = 4
for key, value in {
    "session.disable_cpu_ep_fallback": "1",
    "ep.context_enable": "1",
    "ep.context_embed_mode": "0",
    "ep.context_file_path": f"{folder}/product.ctx.onnx",
}.items():
    settings.add_session_config_entry(key, value)
devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == "QNNExecutionProvider"]
chip = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "soc_model": "43", "htp_arch": "73"}
settings.add_provider_for_devices(devices[:1], chip)
onnxruntime.InferenceSession(f"{folder}/product.onnx", sess_options=settings)
"""
"""In a process of its own, since the libraries of a vendor may end the one that they are in."""
