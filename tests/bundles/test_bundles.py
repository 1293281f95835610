"""Exporting and loading bundles: the same outputs on another machine, built-in options, the choice of a device.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest
from bundling import HEXAGON, Tools, left_over
from made_up import CPU, MadeUp

import transom
from transom.artifacts import hash_file
from transom.artifacts.files import is_locked
from transom.bundles.bundle import open_bundle
from transom.contract import Refusal
from transom.errors import ContextExceeded, DoesNotFit, EngineError, OptionError, SelectionError, SelfCheckFailed
from transom.sparsity import Sparsity


# ------------------------------------------------------------------------------------------------- there and back again
def test_a_bundle_answers_as_the_model_does_and_is_checked_once(
    here: Any, export: Any, elsewhere: Any, tmp_path: Path
) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    with here.load() as model:
        wanted, text = model.logits([1, 2, 3]), model.generate("Hello", max_new_tokens=4).token_ids
    here.jobs.clear()
    made = export()
    assert here.jobs == []  # what a load had compiled is taken as it is
    (variant,) = made.variants
    assert (variant.backend, variant.device.id, variant.precision, variant.context) == ("sound", "cpu", "wood", 512)
    assert variant.check.startswith("passed")
    assert made.bytes == sum(p.stat().st_size for p in made.folder.rglob("*") if p.is_file())
    assert {f"sound/{n}" for n in ("graph.onnx", "graph.onnx.data")} < set(made.files)
    assert str(made.folder) in str(made)
    assert json.loads(json.dumps(made.to_dict()))["variants"][0]["device"]["id"] == "cpu"
    elsewhere()
    for jobs in (["check"], []):
        here.jobs.clear()
        with here.load(made.folder) as model:
            assert np.array_equal(model.logits([1, 2, 3]), wanted)
            assert model.generate("Hello", max_new_tokens=4).token_ids == text
            report = model.report
            assert model.chat_template is not None
        assert here.jobs == jobs
        assert (report.backend, report.model, report.source, report.precision) == ("sound", "Tiny", "gguf", "wood")
        assert report.check.startswith("passed")
        assert report.bundle == str(made.folder)
        assert f"from the bundle {made.folder}" in str(report)
        assert "The bundle was compiled for cpu" in report.why
    assert sound.calls.count("compile") == 1
    assert left_over(tmp_path) == ["bundle"]


def test_a_bundle_for_a_device_that_is_not_here_is_compiled_and_never_opened(here: Any, export: Any) -> None:
    tools = Tools("tools", "load:raise")
    here.use(tools)
    made = export(target=HEXAGON)
    assert here.jobs == ["prepare"]  # the model is read once
    assert tools.calls == ["compile"]
    assert made.variants[0].device.id == f"remote:{HEXAGON}"
    assert "where the bundle is loaded" in made.variants[0].check
    with pytest.raises(SelectionError, match="was compiled for remote:snapdragon-8-gen-2") as caught:
        here.load(made.folder)
    assert caught.value.details == ("tools on cpu: made for hexagon_v73, this is x86_64",)
    assert "--target cpu" in caught.value.fix


def test_a_target_that_no_backend_compiles_for_lists_what_each_says(here: Any, export: Any) -> None:
    here.use(Tools("tools"))
    with pytest.raises(SelectionError, match="compile for") as caught:
        export(target="rtx-4090")
    assert any(line.startswith("tools on remote:rtx-4090: not for it") for line in caught.value.details)
    assert "--target list" in caught.value.fix
    with pytest.raises(SelectionError, match='"reference" cannot compile for'):
        export(target=HEXAGON, format="reference")
    for target in ("rtx-409", "cuda:3", "auto", ""):
        with pytest.raises(OptionError, match=r'target=|device "'):
            export(target=target)
    assert here.jobs == []


def test_the_next_backend_is_taken_where_the_first_one_fails(here: Any, export: Any) -> None:
    here.use(MadeUp("a_shady", "garbage", band="tuned"), MadeUp("b_sound"))
    made = export()
    assert made.variants[0].backend == "b_sound"
    assert any("a_shady on cpu was set aside" in warning for warning in made.warnings)
    with pytest.raises(SelfCheckFailed):
        export(format="a_shady", overwrite=True)
    with here.load(made.folder) as model:  # the older bundle is still there
        assert model.report.backend == "b_sound"


def test_the_manifest_says_what_is_needed_to_judge_it(
    here: Any, export: Any, rng: np.random.Generator, tmp_path: Path
) -> None:
    from gguf import GGUFWriter

    here.use(Tools("tools"))
    add = GGUFWriter.add_name
    here.monkeypatch.setattr(GGUFWriter, "add_name", lambda self, name: (add(self, name), self.add_license("mit")))
    model = byte_llama.write_gguf(tmp_path / "licensed.gguf", rng)
    made = export(model, target=HEXAGON, context=100)
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert next(iter(manifest.items())) == ("transom_bundle", 1)
    assert manifest["model"]["license"] == "mit"
    (variant,) = manifest["variants"]
    assert variant["target"]["arch"] == variant["requires"]["arch"] == "hexagon_v73"
    assert manifest["options"] == {"precision": "auto", "context": 100, "sparsity": "dense"}
    assert variant["context"] == 100
    assert variant["memory"]["cache_per_token"] == 2 * 2 * (16 + 16) * 2  # layers, heads, key and value, bytes
    assert manifest["decoder"]["vocabulary"] == 262
    assert variant["precision"] == "wood"
    names = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}
    assert names == {*manifest["files"], "manifest.json"}
    for name, record in manifest["files"].items():
        path = made.folder / name
        assert record == {"bytes": path.stat().st_size, "blake2b": hash_file(path)}
    with np.load(made.folder / "golden.npz") as golden:
        assert golden["ids"].tolist() == manifest["expected"]["tokens"]
        assert golden["logits"].argmax(-1).tolist() == manifest["expected"]["best"]


def test_the_file_of_a_directory_s_license_is_named(here: Any, export: Any, rng: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    byte_llama.write_gguf(folder / "model.gguf", rng)
    here.use(MadeUp("sound"))
    for names, said in (((), None), (("README.md", "LICENSE.txt"), "LICENSE.txt")):
        for name in names:
            (folder / name).write_text("x")
        made = export(folder, overwrite=True)
        assert json.loads((made.folder / "manifest.json").read_text())["model"]["license"] == said


def test_a_graph_that_is_no_decoder_can_be_carried_too(here: Any, export: Any, rng: Any, tmp_path: Path) -> None:
    import onnx

    weight = onnx.numpy_helper.from_array(rng.standard_normal((4, 3)).astype(np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "plain",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])], [weight],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "plain.onnx")
    made = export(tmp_path / "plain.onnx", format="reference")
    x = rng.standard_normal((2, 4)).astype(np.float32)
    with here.load(made.folder) as model:
        np.testing.assert_allclose(model.run({"x": x})["y"], x @ onnx.numpy_helper.to_array(weight), atol=1e-5)
        assert model.report.check.startswith("passed")


def test_a_model_in_memory_can_be_carried_too(here: Any, export: Any, rng: np.random.Generator) -> None:
    from load_fixtures import MemorySource, Thing

    from transom.loading import identity
    from transom.testing.models import tiny_decoder

    here.monkeypatch.setattr(identity, "resolve", lambda spec: MemorySource())
    here.use(MadeUp("sound"))
    thing = Thing(tiny_decoder(rng))
    with here.load(thing) as model:
        wanted = model.logits([1, 2, 3])
    made = export(thing)
    assert json.loads((made.folder / "manifest.json").read_text())["model"]["kind"] == "memory"
    with here.load(made.folder) as model:
        assert model.tokenizer is None
        assert np.array_equal(model.logits([1, 2, 3]), wanted)


def test_the_page_on_bundles_names_every_key_and_computes_the_hashes(here: Any, export: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bundles.md").read_text(encoding="utf-8")
    here.use(MadeUp("sound"))
    made = export()
    manifest = json.loads((made.folder / "manifest.json").read_text())
    table = page[page.index("## The manifest") : page.index("## The hash")]
    for key, value in [*manifest.items(), *manifest["variants"][0].items()]:
        inner = key in ("model", "backend", "memory", "expected")
        for name in [f"{key}.{k}" for k in value] if inner else [key]:
            assert f"`{name}`" in table, name
    for key in manifest["decoder"]:
        assert f"`{key}`" in table, key
    code = page[page.index("```python") : page.rindex("```")].removeprefix("```python")
    names: dict[str, Any] = {}
    exec(code, names)
    for name, record in manifest["files"].items():
        assert names["file_hash"](made.folder / name) == record["blake2b"]


# -------------------------------------------------------------------------------------------------------------- options
def test_options_that_contradict_the_bundle_are_refused_with_its_own_value(here: Any, export: Any) -> None:
    here.use(MadeUp("bound", "bound"), MadeUp("other"))
    made = export(format="bound", precision="f32", context=100, sparsity="fast")
    policy = Sparsity.parse("fast")
    for options, said in (
        ({"backend": "other"}, r"one of these: bound \(backend='bound'\)"),
        ({"precision": "bf16"}, "has precision='f32'"),
        ({"sparsity": "safe"}, "has sparsity='fast'"),
        ({"context": 200}, "has context=100"),
        ({"calibration": ["text"]}, "compiled already"),
    ):
        with pytest.raises(OptionError, match=said):
            here.load(made.folder, **options)
    with here.load(made.folder, precision="f32", sparsity=policy, context=100, backend="bound", threads=1) as model:
        assert model.context == 100
        assert model.report.sparsity.startswith("fast")
    with here.load(made.folder) as model:
        assert model.context == 100
        assert model.report.sparsity.startswith("fast")
        assert "512 it was made for, built into the bundle" in str(model.report)
        with pytest.raises(ContextExceeded, match="or export the model again with context=121 or more"):
            model.generate("x" * 120)
        with pytest.raises(ContextExceeded, match="Pass fewer, or export the model again with a larger context"):
            model.logits("x" * 120)


def test_threads_that_are_built_in_cannot_be_changed(here: Any, export: Any) -> None:
    here.use(MadeUp("bound", "bound:threads"))
    made = export()
    here.load(made.folder).close()
    with pytest.raises(OptionError, match="has threads='None'"):
        here.load(made.folder, threads=1)


def test_a_context_that_is_not_built_in_may_change_and_is_the_exported_one_otherwise(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    made = export(context=100)
    for asked, got in ((None, 100), (300, 300), (20, 20)):
        with here.load(made.folder, context=asked) as model:
            assert model.context == got
            with pytest.raises(ContextExceeded, match=f"or load the model with context={got + 21} or more"):
                model.generate("x" * (got + 20))
    with pytest.raises(OptionError, match="the model's own limit"):
        here.load(made.folder, context=byte_llama.CONTEXT + 1)
    here.devices = [replace(CPU, free_bytes=1000)]
    with pytest.raises(DoesNotFit):
        here.load(made.folder)


# -------------------------------------------------------------------------------------------------------------- devices
def test_the_device_that_fits_is_found_and_a_named_one_is_never_replaced(here: Any, export: Any) -> None:
    here.use(Tools("tools"))
    other = replace(CPU, id="cpu:1", arch="riscv64", identity="another")
    made = export()
    here.devices = [other, replace(CPU)]
    with here.load(made.folder) as model:
        assert model.report.device.id == "cpu"
    with pytest.raises(SelectionError, match="fits no device") as caught:
        here.load(made.folder, device="cpu:1")
    assert caught.value.details == ("tools on cpu:1: made for x86_64, this is riscv64",)
    here.devices = [other]
    with pytest.raises(SelectionError, match="fits no device"):
        here.load(made.folder)


def test_a_backend_that_is_not_installed_is_named_with_what_to_install(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    made = export()
    here.use()
    with pytest.raises(SelectionError, match=r"needs the backend sound \(of made-up 1\.0\)") as caught:
        here.load(made.folder)
    assert "pip install made-up" in caught.value.fix
    assert "Installed backends: reference" in caught.value.details
    with pytest.raises(SelectionError, match="needs the backend"):
        transom.explain(made.folder)


def test_a_backend_that_lacks_something_says_what_to_install(here: Any, export: Any) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    made = export()
    sound.probe = lambda devices: [Refusal(d.id, "missing_dep", "no SDK", "pip install sdk") for d in devices]  # type: ignore[method-assign]
    with pytest.raises(SelectionError) as caught:
        here.load(made.folder)
    assert "Install it with: pip install sdk" in caught.value.fix


@pytest.mark.parametrize(("does", "error"), [("garbage", SelfCheckFailed), ("load:raise", EngineError)])
def test_an_engine_that_fails_on_this_machine_is_refused(
    here: Any, export: Any, elsewhere: Any, does: str, error: type[Exception]
) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    made = export()
    elsewhere()
    sound.does = does
    with pytest.raises(error):
        here.load(made.folder)
    assert here.jobs == ["check"]
    if does == "garbage":
        with here.load(made.folder, verify="off") as model:
            assert "off" in model.report.check


def test_verify_always_compares_with_the_bundle_s_own_answers(here: Any, export: Any, elsewhere: Any) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    made = export()
    elsewhere()
    here.load(made.folder, verify="always").close()
    here.jobs.clear()
    sound.does = "garbage"
    with pytest.raises(SelfCheckFailed):
        here.load(made.folder, verify="always")
    assert here.jobs == []


def test_verify_always_compares_again_before_a_bundle_is_written(here: Any, export: Any) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    first = export(verify="always")
    assert here.jobs == ["prepare"]
    assert first.variants[0].check.startswith("passed")
    here.jobs.clear()
    again = export(verify="always", overwrite=True)
    assert here.jobs == ["recheck"]
    assert again.variants[0].check.startswith("passed")
    assert sound.calls.count("compile") == 1
    sound.does = "garbage"
    export(overwrite=True)  # believed, as it was there
    with pytest.raises(SelfCheckFailed):
        export(verify="always", overwrite=True, format="sound")
    with pytest.raises(SelfCheckFailed):  # and believed no more
        export(overwrite=True, format="sound")
    assert first.folder.is_dir()


def test_a_bundle_that_is_slower_than_a_new_compilation_gives_a_warning(here: Any, export: Any) -> None:
    here.use(MadeUp("sound", "check:slower"))
    said = "The compiled model is slower here than a newly compiled one: said slower"
    assert said in export().warnings
    with here.load() as model:
        assert said in model.report.warnings


def test_the_device_of_the_environment_is_for_running_and_has_no_say_in_what_to_compile_for(
    here: Any, export: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.use(MadeUp("sound"))
    monkeypatch.setenv("TRANSOM_DEVICE", "npu:0")
    assert export().variants[0].device.id == "cpu"


def test_the_scratch_folder_of_a_bundle_is_held_while_it_is_open_and_when_it_is_opened_again(
    here: Any, export: Any
) -> None:
    here.use(MadeUp("sound"))
    bundle = open_bundle(export().folder, here.cache)
    for _ in range(2):
        scratch = bundle.scratch
        assert is_locked(scratch)
        bundle.release()
        assert not is_locked(scratch)


def test_what_can_no_longer_be_opened_is_checked_again(here: Any, export: Any) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    made = export()
    here.load(made.folder).close()
    here.jobs.clear()
    sound.does = "load:raise"
    with pytest.raises(EngineError):
        here.load(made.folder)
    sound.does = ""
    here.load(made.folder).close()
    assert here.jobs == ["check", "check"]


def test_another_driver_has_the_bundle_checked_anew(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    made = export()
    here.load(made.folder).close()
    here.jobs.clear()
    here.devices = [replace(CPU, drivers={"kernel": "7"})]
    here.load(made.folder).close()
    assert here.jobs == ["check"]


def test_explain_asks_the_bundle_s_backend_about_every_device(here: Any, export: Any) -> None:
    here.use(Tools("tools"))
    made = export()
    here.devices = [replace(CPU), replace(CPU, id="cpu:1", arch="riscv64")]
    found = transom.explain(made.folder)
    assert [(a.device, a.runs) for a in found.answers] == [("cpu", True), ("cpu:1", False)]
    assert "tools on cpu:1: no" in str(found)
    assert "made for x86_64, this is riscv64" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["answers"][1]["verdict"]["state"] == "rebuild"
    assert [a.device for a in transom.explain(made.folder, "v100").answers] == ["remote:v100"]
