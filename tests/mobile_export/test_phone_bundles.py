"""Bundles for phones as a user makes them: exported, verified on the emulator, judged, run here, opened by GenAI.

Draws: 4 bits cost a tiny model 0.1 nats or so; one nat and a cosine of 0.9 tell it from a wrong one. Two engines
agree to 1e-3, a hundred times the rounding of float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest

import transom
from transom.artifacts import Cache
from transom.bundles.judging import judge
from transom.bundles.verification import verify_bundle
from transom.contract import Cancelled
from transom.errors import FidelityError, OptionError, SelectionError, TransomError
from transom.hardware.catalogue import catalogue

PHONE = "snapdragon-8-gen-2"
OLDER = "snapdragon-8-gen-1"
CONTEXT = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Path:
    return byte_llama.write_gguf(
        tmp_path_factory.mktemp("model") / "tiny.gguf", shared_rng("a tiny model for phones"), quantization="Q8_0"
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def bundle(model: Path, cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> transom.Exported:
    """Three variants: two chips, of which the older cannot share weights, and the portable decoder."""
    out = tmp_path_factory.mktemp("bundles") / "phone"
    texts = ["the quick brown fox jumps over the lazy dog " * 3]
    return transom.export(
        model, target=f"{PHONE},{OLDER}", format="qnn,onnx", context=CONTEXT, out=out, cache=cache, calibration=texts,
        max_kl=1.0,
    )  # fmt: skip


def manifest_of(made: transom.Exported) -> Any:
    return json.loads((made.folder / "manifest.json").read_text())


def test_what_chips_and_processors_share_is_there_once(bundle: transom.Exported) -> None:
    names = [f"qnn-{PHONE}", f"onnx-{PHONE}", f"qnn-{OLDER}", f"onnx-{OLDER}"]
    variants = {v["name"]: v for v in manifest_of(bundle)["variants"]}
    assert list(variants) == names
    assert variants[names[1]]["files"] == variants[names[3]]["files"], "the portable decoder is one for both"
    tables = {v["files"]["shared/embedding.bin"] for n, v in variants.items() if n.startswith("qnn")}
    assert tables == {"shared/embedding.bin"}
    assert variants[names[0]]["requires"]["htp_arch"] == "73"
    assert variants[names[2]]["requires"]["htp_arch"] == "69"


def test_every_variant_says_how_it_compares_with_the_reference(bundle: transom.Exported) -> None:
    for variant in manifest_of(bundle)["variants"]:
        fidelity = variant["fidelity"]
        assert fidelity["tokens"] > 4
        assert 0 <= fidelity["kl"] < 1.0
        assert fidelity["cosine"] > 0.9
        assert ("HTP emulator" in fidelity["where"]) == variant["name"].startswith("qnn")
    shared, _, apart, _ = (v["fidelity"]["where"] for v in manifest_of(bundle)["variants"])
    assert "compiled for it again" in shared, "the emulator opens no context that shares its weights"
    assert "once more" not in apart


def test_genai_writes_from_the_folder_what_transom_does(bundle: transom.Exported, cache: Cache) -> None:
    import onnxruntime_genai as og

    loaded = og.Model(str(bundle.folder))
    tokenizer = og.Tokenizer(loaded)
    with transom.load(bundle.folder, backend="onnx", cache=cache) as model:
        assert model.tokenizer is not None
        ids = model.tokenizer.encode("Hello, wörld 🙂", add_special=False)
        assert tokenizer.encode("Hello, wörld 🙂").tolist() == ids
        params = og.GeneratorParams(loaded)
        params.set_search_options(do_sample=False, max_length=CONTEXT)
        generator = og.Generator(loaded, params)
        generator.append_tokens(ids)
        theirs = np.asarray(generator.get_logits()).reshape(-1)
        ours = model.logits(ids)[-1]
        np.testing.assert_allclose(theirs[-len(ours) :], ours, rtol=1e-3, atol=1e-3)


def test_each_variant_is_replayed_where_it_can_run(bundle: transom.Exported, cache: Cache) -> None:
    _, found = verify_bundle(bundle.folder, cache=cache)
    states = {one.variant: one.state for one in found}
    assert states == {
        f"qnn-{PHONE}": "not here", f"onnx-{PHONE}": "passed", f"qnn-{OLDER}": "passed", f"onnx-{OLDER}": "passed",
    }  # fmt: skip


def test_the_bundle_runs_here_and_the_emulator_runs_by_name(bundle: transom.Exported, cache: Cache) -> None:
    with transom.load(bundle.folder, cache=cache) as model:
        assert model.report.backend == "onnx"
        assert len(model.generate("Hello", max_new_tokens=3, ignore_eos=True).token_ids) == 3
    with transom.load(bundle.folder, backend="qnn", cache=cache) as model:
        assert "HTP emulator" in model.report.why
        assert len(model.generate("Hello", max_new_tokens=3, ignore_eos=True).token_ids) == 3
    with pytest.raises(OptionError, match=f"context=32 does not fit the bundle .* context={CONTEXT}"):
        transom.load(bundle.folder, backend="qnn", context=32, cache=cache)


def test_the_manifest_alone_says_what_is_good_where(bundle: transom.Exported) -> None:
    devices = {d.id.removeprefix("remote:"): d for d in catalogue()}
    manifest = manifest_of(bundle)
    for target, good in (
        (PHONE, {f"qnn-{PHONE}", f"onnx-{PHONE}", f"onnx-{OLDER}"}),
        (OLDER, {f"qnn-{OLDER}", f"onnx-{PHONE}", f"onnx-{OLDER}"}),
        ("snapdragon-8-elite", {f"onnx-{PHONE}", f"onnx-{OLDER}"}),
        ("rtx-4090", set()),
    ):
        assert {v.name for v in judge(manifest, devices[target]) if v.fits} == good


def test_an_app_is_told_its_libraries_and_the_lines_that_load_it(bundle: transom.Exported) -> None:
    libraries = {v["name"]: v["libraries"] for v in manifest_of(bundle)["variants"]}
    assert "libQnnHtpV73Skel.so" in libraries[f"qnn-{PHONE}"]
    assert "libQnnHtpV69Skel.so" in libraries[f"qnn-{OLDER}"]
    assert libraries[f"onnx-{PHONE}"]
    page = (bundle.folder / "README.md").read_text()
    for said in ("```kotlin", "```swift", "```cpp", "ADSP_LIBRARY_PATH"):
        assert said in page


def test_memory_is_that_of_the_variant(bundle: transom.Exported) -> None:
    for variant in manifest_of(bundle)["variants"]:
        own = [p for n, p in variant["files"].items() if not n.startswith("shared/") and n.endswith((".bin", ".data"))]
        size = sum((bundle.folder / path).stat().st_size for path in own)
        assert size <= variant["memory"]["weights"] < 2 * size + (1 << 20), variant["name"]
        assert str(CONTEXT) in variant["memory"]["at"]


def test_a_gate_that_is_too_narrow_names_the_worst_products(model: Path, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(FidelityError, match=r"qnn compiled diverges by .* the worst products are layers\.") as error:
        transom.export(
            model, target=PHONE, format="qnn", context=CONTEXT, out=tmp_path / "b", cache=cache, max_kl=1e-12
        )
    assert "Use precision='f16', give texts" in error.value.fix
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"target": "snapdragon-8-gen-99"}, OptionError, "snapdragon-8-gen-2"),
        ({"target": PHONE, "context": 100_000}, OptionError, "context=100000"),
        ({"target": "rtx-4090", "format": "qnn"}, SelectionError, "Snapdragon"),
        ({"target": PHONE, "format": "qnn", "sparsity": "balanced"}, TransomError, "top_k"),
    ],
)
def test_impossible_exports_give_one_sentence(
    model: Path, cache: Cache, tmp_path: Path, options: dict[str, Any], kind: type[TransomError], said: str
) -> None:
    with pytest.raises(kind) as error:
        transom.export(model, out=tmp_path / "b", cache=cache, **options)
    assert said in f"{error.value} {error.value.details}"
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_stopped_half_way_leaves_nothing(model: Path, cache: Cache, tmp_path: Path) -> None:
    def stop(stage: str, share: float | None) -> None:
        if stage == "compile":
            raise Cancelled

    with pytest.raises(Cancelled):
        transom.export(
            model, target="snapdragon-8-gen-3", format="qnn", context=CONTEXT, out=tmp_path / "b", cache=cache,
            progress=stop,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
