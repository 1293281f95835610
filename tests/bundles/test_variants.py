"""Bundles with several variants: shared files, the selection of a variant, and fidelity before writing.

Draws: noise of a quarter of the spread over 262 tokens leaves a correlation of 0.97, give or take 0.01: above 0.9 and
below 0.99.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundling import HEXAGON, left_over
from made_up import CPU, MadeUp

from transom.bundles.manifest import read_manifest
from transom.bundles.verification import verify_bundle
from transom.contract import Artifact, Offer, Refusal, Verdict
from transom.errors import EngineError, FidelityError, OptionError, SelectionError

NEWER = "snapdragon-8-gen-3"


class Phones(MadeUp):
    """Compiles for phones, and runs what it compiled on an emulator here: used only when it is named."""

    api = (1, 5)

    def __init__(self, name: str = "phones", does: str = "", **more: Any) -> None:
        super().__init__(name, does, band="fallback", **more)
        self.emulated = True

    def probe(self, devices: Any) -> Any:
        def answer(device: Any) -> Offer | Refusal:
            if device.arch.startswith("hexagon"):
                return Offer(device.id, "tuned", "tools 1", runs_here=False)
            if device.kind == "cpu" and self.emulated:
                return Offer(device.id, "fallback", "an emulator", by_name=True)
            return Refusal(device.id, "wrong_device", "not for it")

        return [answer(device) for device in devices]

    def compile(self, part: Any, device: Any, options: Any, progress: Any) -> Any:
        made = super().compile(part, device, options, progress)
        files = {
            **made.files,
            "arch": device.arch.encode(),
            "shared/table.bin": b"one for all",
            "shared/own.bin": device.arch.encode(),
            "libraries.json": b'["libone.so", "libtwo.so"]',
            "memory.json": b'{"weights": 1000, "cache_per_token": 10}',
            "errors.json": json.dumps([{"node": "worst", "error": 0.5}, {"node": "better", "error": 0.1}]).encode(),
        }
        return Artifact(files, {**made.requires, "arch": device.arch}, made.notes)

    def check(self, artifact: Any, device: Any) -> Verdict:
        fits = device.kind == "cpu" or device.arch == artifact.requires["arch"]
        return Verdict("ok") if fits else Verdict("never", "another chip")

    def app_files(self, manifest: Any, variant: Any, texts: Any) -> dict[str, bytes]:
        assert manifest["model"]["name"] == "Tiny"
        assert "files" not in manifest
        assert "tokenizer.json" in texts
        readme = f"## For {self.name}\n\nLoad it from the folder.\n"
        return {"app.json": json.dumps(variant["files"]).encode(), "README.md": readme.encode()}


class Portable(Phones):
    """The same files for every target; the engine is a real one."""

    def probe(self, devices: Any) -> Any:
        return [Offer(d.id, "generic", "portable", runs_here=d.kind == "cpu", by_name=d.kind == "cpu") for d in devices]

    def compile(self, part: Any, device: Any, options: Any, progress: Any) -> Any:
        made = super().compile(part, replace(device, arch="any"), options, progress)
        return Artifact({n: c for n, c in made.files.items() if not n.startswith("shared")}, made.requires, made.notes)

    def check(self, artifact: Any, device: Any) -> Verdict:
        return Verdict("ok")


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def test_several_targets_lie_in_one_bundle_and_what_they_share_once(here: Any, export: Any) -> None:
    here.use(Phones())
    made = export(target=f"{HEXAGON}, {NEWER}")
    names = [f"phones-{HEXAGON}", f"phones-{NEWER}"]
    assert [v.name for v in made.variants] == names
    manifest = manifest_of(made.folder)
    one, other = manifest["variants"]
    assert [v["target"]["id"] for v in (one, other)] == [f"remote:{HEXAGON}", f"remote:{NEWER}"]
    assert one["files"]["shared/table.bin"] == other["files"]["shared/table.bin"] == "shared/table.bin"
    assert one["files"]["shared/own.bin"] == "shared/own.bin"
    assert other["files"]["shared/own.bin"] == f"{names[1]}/shared/own.bin"
    for variant, arch in ((one, "hexagon_v73"), (other, "hexagon_v75")):
        for name in ("arch", "shared/own.bin"):
            assert (made.folder / variant["files"][name]).read_text() == arch
    assert set(made.files) == {*manifest["files"], "manifest.json"}
    assert not list(made.folder.rglob("*/shared/table.bin")), "the second one's copy is gone, and its folder"


def test_variants_with_the_same_files_have_them_once(here: Any, export: Any) -> None:
    here.use(Portable("portable"))
    made = export(target=[HEXAGON, NEWER], format="portable")
    one, other = manifest_of(made.folder)["variants"]
    assert one["files"] == other["files"]
    assert set(one["files"].values()) == {f"portable-{HEXAGON}/{n}" for n in one["files"]}
    assert not (made.folder / f"portable-{NEWER}").exists()
    for name in (v["name"] for v in (one, other)):
        _, [found] = verify_bundle(made.folder, variants=[name], cache=here.cache)
        assert found.state == "passed", found


def test_each_format_is_a_variant_and_the_engine_comes_before_the_emulator(
    here: Any, export: Any, elsewhere: Any
) -> None:
    phones, portable = Phones(), Portable("portable")
    here.use(phones, portable, MadeUp("native", band="tuned"))
    made = export(target=HEXAGON, format="phones,portable")
    assert [v.name for v in made.variants] == ["phones", "portable"]
    elsewhere()
    with here.load(made.folder) as model:
        assert model.report.backend == "portable"  # of the same rank as an emulator by name, but of a better band
    opened = len(portable.calls)
    with here.load(made.folder, backend="phones") as model:
        assert model.report.backend == "phones"
    assert phones.calls[-2:] == ["load", "load"], "checked, and opened"
    assert len(portable.calls) == opened
    with here.load(made.folder, backend="phones") as model:
        assert "an emulator" in model.report.why
    with pytest.raises(OptionError, match=r"one of these: phones \(backend='phones'\), portable"):
        here.load(made.folder, backend="native")


def test_what_only_runs_by_name_is_never_chosen_for_a_model(here: Any) -> None:
    here.use(Portable("a_portable"))
    with here.load() as model:
        assert model.report.backend == "reference"
        assert any(name == "a_portable" and "only when it is named" in r.reason for name, r in model.report.refusals)
    with here.load(backend="a_portable") as model:
        assert model.report.backend == "a_portable"


def test_a_variant_for_another_device_is_compared_on_an_emulator(here: Any, export: Any) -> None:
    phones = Phones()
    here.use(phones)
    made = export(target=HEXAGON)
    assert here.jobs == ["prepare", "fidelity"]
    [variant] = manifest_of(made.folder)["variants"]
    assert variant["libraries"] == ["libone.so", "libtwo.so"]
    assert (variant["memory"]["weights"], variant["memory"]["cache_per_token"]) == (1000, 10)
    workspace = variant["memory"]["workspace"]
    assert variant["memory"]["at"] == {"512": 1000 + 512 * 10 + workspace}
    fidelity = variant["fidelity"]
    assert fidelity["where"] == "an emulator, on cpu"
    assert fidelity["kl"] < 1e-6
    assert (fidelity["top1"], fidelity["tokens"] > 4) == (1.0, True)
    assert fidelity["cosine"] == pytest.approx(1.0)
    assert "an emulator, on cpu" in made.variants[0].check
    assert export(target=HEXAGON, verify="off", overwrite=True).variants[0].fidelity is None
    phones.emulated = False
    assert export(target=HEXAGON, overwrite=True).variants[0].fidelity is None


def test_what_the_emulator_cannot_open_is_compiled_for_it_once_more_and_not_kept(here: Any, export: Any) -> None:
    class Sharing(Phones):
        def check(self, artifact: Any, device: Any) -> Verdict:
            fits = device.arch == artifact.requires["arch"]
            return Verdict("ok") if fits else Verdict("never", "shares its weights")

    phones = Sharing()
    here.use(phones)
    made = export(target=HEXAGON)
    assert phones.calls.count("compile") == 2
    fidelity = made.variants[0].fidelity
    assert fidelity["where"] == "an emulator, on cpu, compiled for it again"
    assert fidelity["kl"] < 1e-6
    assert not list((here.cache.root / "artifacts").glob("*/files/arch")), "both are gone: one moved into the bundle"
    _, [found] = verify_bundle(made.folder, cache=here.cache)
    assert (found.state, "shares its weights" in found.text) == ("not here", True)


def test_what_diverges_is_not_shipped_and_the_worst_products_are_named(here: Any, export: Any, tmp_path: Path) -> None:
    phones = Phones(does="layer")
    here.use(phones)
    with pytest.raises(
        FidelityError, match=r"phones compiled diverges by .* nats .* worst \(50\.0%\), better"
    ) as error:
        export(target=HEXAGON, max_kl=1e-9)
    assert "Choose a precision with more bits" in error.value.fix
    assert not [p for p in tmp_path.iterdir() if "bundle" in p.name]
    assert export(target=HEXAGON, max_kl=50).variants[0].fidelity["kl"] > 1e-9
    phones.does = "garbage"
    with pytest.raises(FidelityError, match=r"and 0\.05 are allowed"):
        export(target=HEXAGON, overwrite=True)


def test_a_variant_that_would_fail_the_self_check_is_not_written(here: Any, export: Any, rng: Any) -> None:
    """The model's distribution is nearly flat: what is wrong with logits shows little in a divergence."""

    class Decoding(Phones):
        def _spoil(self, inputs: Any, outputs: Any) -> None:
            if len(inputs["input_ids"]) == 1:
                spread = outputs["logits"].std()
                noise = rng.standard_normal(outputs["logits"].shape)
                outputs["logits"] = outputs["logits"] + (0.25 * spread * noise).astype(np.float32)

    phones = Decoding()
    here.use(phones)
    for max_kl in (None, 0.04):
        with pytest.raises(FidelityError, match=r"would fail the self-check .* correlation of 0\.9"):
            export(target=HEXAGON, max_kl=max_kl)
    made = export(target=HEXAGON, max_kl=0.06)
    assert made.variants[0].fidelity["kl"] < 0.04


def test_a_bound_applies_to_variants_that_run_here_and_others_give_a_warning(here: Any, export: Any, rng: Any) -> None:
    class Noisy(MadeUp):
        def _spoil(self, inputs: Any, outputs: Any) -> None:
            noise = rng.standard_normal(outputs["logits"].shape)
            outputs["logits"] = outputs["logits"] + np.float32(0.02) * noise.astype(np.float32)

    phones = Phones()
    phones.emulated = False
    here.use(Noisy("noisy"), phones)
    with pytest.raises(FidelityError, match=r"noisy compiled diverges by .* \(on cpu\), and 1e-09 are allowed"):
        export(format="noisy", max_kl=1e-9)
    assert export(format="noisy", max_kl=0.1).warnings == ()
    [warning] = export(target=HEXAGON, max_kl=0.1, overwrite=True).warnings
    assert warning == "Nothing here could compare phones with the reference, so max_kl=0.1 was not applied to it"


def test_an_invalid_app_is_reported_before_anything_is_compiled(here: Any, export: Any, tmp_path: Path) -> None:
    here.use(Phones())
    (tmp_path / "empty").mkdir()
    for app, said in (("none.apk", "cannot be read: No such file"), ("empty", "no shared library in")):
        with pytest.raises(OptionError, match=said):
            export(target=HEXAGON, app=tmp_path / app)
    assert here.jobs == []


def test_an_app_without_the_libraries_keeps_a_bundle_from_being_written(here: Any, export: Any, tmp_path: Path) -> None:
    from numpy._core import _multiarray_umath

    here.use(Phones())
    folder = tmp_path / "jniLibs" / "x86_64"
    folder.mkdir(parents=True)
    (folder / "libone.so").write_bytes(Path(_multiarray_umath.__file__).read_bytes())
    with pytest.raises(OptionError, match="cannot run this bundle") as error:
        export(target=HEXAGON, app=tmp_path / "jniLibs")
    assert any("libtwo.so" in problem for problem in error.value.details)
    assert not [p for p in tmp_path.iterdir() if "bundle" in p.name]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": f"{HEXAGON},{HEXAGON}"}, "names one twice"),
        ({"target": ""}, "names none"),
        ({"target": [HEXAGON, 3]}, "names none"),
        ({"target": 3}, "names none"),
        ({"format": "phones,phones"}, "names one twice"),
        ({"max_kl": 0}, "is not a bound"),
        ({"max_kl": True}, "is not a bound"),
        ({"max_kl": float("inf")}, "is not a bound"),
        ({"max_kl": 0.1, "verify": "off"}, "needs the comparison that verify='off' leaves out"),
        ({"target": f"{HEXAGON},snapdragon-9"}, "snapdragon-9"),
    ],
)
def test_invalid_names_are_refused(here: Any, export: Any, options: Any, said: str) -> None:
    here.use(Phones())
    with pytest.raises(OptionError, match=said):
        export(**{"target": HEXAGON, **options})
    assert here.jobs == []


def test_one_target_that_nobody_serves_ends_all(here: Any, export: Any) -> None:
    here.use(Phones())
    with pytest.raises(SelectionError, match=r"rtx-4090"):
        export(target=f"{HEXAGON},rtx-4090", format="phones")


def test_apps_find_their_files_in_the_root_and_a_page_that_explains_them(here: Any, export: Any) -> None:
    here.use(Phones(), Portable("portable"))
    made = export(target=HEXAGON, format="phones,portable")
    page = (made.folder / "README.md").read_text()
    assert page.startswith("# Tiny\n")
    for said in ("| `phones` |", "| `portable` |", "## For phones", "## For portable", "License of the model"):
        assert said in page
    assert json.loads((made.folder / "app.json").read_text())["arch"] == "portable/arch"
    manifest = read_manifest(made.folder)
    assert {"README.md", "app.json", "tokenizer.json", "tokenizer_config.json"} <= set(manifest.files)


@pytest.mark.parametrize("files", [{"../app.json": b""}, {"app.json": None}, None])
def test_a_backend_that_gives_apps_no_files_is_named(here: Any, export: Any, tmp_path: Path, files: Any) -> None:
    class Broken(Phones):
        def app_files(self, manifest: Any, variant: Any, texts: Any) -> Any:
            return files

    here.use(Broken())
    with pytest.raises(EngineError, match="The backend phones failed while writing files for apps"):
        export(target=HEXAGON, verify="off")
    assert left_over(tmp_path) == []


def test_the_tokenizer_is_hugging_face_s_own_file(here: Any, export: Any, elsewhere: Any) -> None:
    import tokenizers

    here.use(MadeUp("sound"))
    made = export()
    text = "Hello  wörld 🙂\n\tend"
    with here.load() as model:
        wanted, special = model.tokenizer.encode(text), model.tokenizer.special_ids
    plain = tokenizers.Tokenizer.from_file(str(made.folder / "tokenizer.json"))
    assert plain.encode(text, add_special_tokens=True).ids == wanted
    elsewhere()
    with here.load(made.folder) as model:
        assert model.tokenizer.encode(text) == wanted
        assert model.tokenizer.special_ids == special


def test_every_license_file_comes_along(here: Any, export: Any, rng: Any, tmp_path: Path) -> None:
    import byte_llama

    folder = tmp_path / "model"
    folder.mkdir()
    byte_llama.write_gguf(folder / "model.gguf", rng)
    wanted = {"LICENSE", "LICENCE-CODE.md", "license_mit", "Copying.lesser", "NOTICE.txt", "LICENSE: all"}
    for name in (*wanted, "notice_of_dismissal.txt", "licensed.txt", "license.bin"):
        (folder / name).write_text(f"this is {name}")
    os.truncate(folder / "license.bin", 2 << 20)
    here.use(MadeUp("sound"))
    made = export(folder / "model.gguf")
    found = {p.name: p.read_text() for p in (made.folder / "licenses").iterdir()}
    assert found == {name.replace(":", "_"): f"this is {name}" for name in wanted}
    assert manifest_of(made.folder)["model"]["license"] in wanted


def test_replaying_tells_what_passes_fails_and_cannot_run_here(here: Any, export: Any, elsewhere: Any) -> None:
    phones, portable = Phones(), Portable("portable")
    here.use(phones, portable)
    made = export(target=HEXAGON, format="phones,portable")
    elsewhere()
    portable.does, phones.emulated = "garbage", False
    _, found = verify_bundle(made.folder, cache=here.cache)
    assert [(r.variant, r.state) for r in found] == [("phones", "not here"), ("portable", "failed")]
    assert "does not compute the outputs of this model" in found[1].text
    portable.does = ""
    _, [again] = verify_bundle(made.folder, variants=["portable"], cache=here.cache)
    assert (again.state, again.where) == ("passed", f"portable on {CPU.id}")
    device = replace(CPU, memory_bytes=1 << 20, free_bytes=1 << 20)
    here.use(phones, portable, devices=(device,))
    _, [small] = verify_bundle(made.folder, variants=["portable"], cache=here.cache)
    assert (small.state, "The model needs" in small.text) == ("not here", True), "that is not the bundle's fault"
    with pytest.raises(OptionError, match="It has phones, portable"):
        verify_bundle(made.folder, variants=["none"], cache=here.cache)
