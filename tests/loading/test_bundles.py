"""A model exported as a bundle and loaded from it: the same answers elsewhere, and all that can stand in the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import byte_llama
import numpy as np
import pytest
from made_up import CPU, MadeUp

import transom
from transom.artifacts import Cache, hash_file
from transom.contract import Cancelled, Offer, Refusal, Verdict
from transom.errors import DoesNotFit, EngineError, OptionError, SelectionError, SelfCheckFailed, SourceError
from transom.runtime import bundles, exporting
from transom.runtime.bundles import BundleError
from transom.sparsity import Sparsity

HEXAGON = "snapdragon-8-gen-2"


class Tools(MadeUp):
    """Compiles for phones, runs on none of them, and insists on the architecture that it compiled for."""

    def probe(self, devices: Any) -> Any:
        return [
            Offer(d.id, self.band, self.why, runs_here=d.kind != "remote")
            if d.kind == self.kind or d.arch.startswith("hexagon")
            else Refusal(d.id, "wrong_device", "not for it")
            for d in devices
        ]

    def compile(self, part: Any, device: Any, options: Any, progress: Any) -> Any:
        made = super().compile(part, device, options, progress)
        return replace(made, requires={**made.requires, "arch": device.arch})

    def check(self, artifact: Any, device: Any) -> Verdict:
        made = artifact.requires["arch"]
        return Verdict("ok") if made == device.arch else Verdict("rebuild", f"made for {made}, this is {device.arch}")


@pytest.fixture
def export(here: Any, tmp_path: Path) -> Callable[..., exporting.Exported]:
    def run(model: Any = None, **options: Any) -> exporting.Exported:
        where = {"target": "cpu", "out": tmp_path / "bundle", "cache": here.cache}
        return transom.export(here.model if model is None else model, **{**where, **options})

    return run


@pytest.fixture
def elsewhere(here: Any, tmp_path: Path) -> Any:
    """Forgets the cache in which the bundle was made, as another machine would."""

    def move() -> None:
        shutil.rmtree(here.cache.root)
        here.cache = Cache(tmp_path / "elsewhere")
        here.jobs.clear()

    return move


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "bundle" in p.name)


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
    assert (made.backend, made.device.id, made.precision, made.context) == ("sound", "cpu", "wood", 512)
    assert made.check.startswith("passed")
    assert made.bytes == sum(p.stat().st_size for p in made.folder.rglob("*") if p.is_file())
    assert {f"artifact/{n}" for n in ("graph.onnx", "graph.onnx.data")} < set(made.files)
    assert str(made.folder) in str(made)
    assert json.loads(json.dumps(made.to_dict()))["device"]["id"] == "cpu"
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
    assert here.jobs == ["prepare", "golden"]
    assert tools.calls == ["compile"]
    assert made.device.id == f"remote:{HEXAGON}"
    assert "where the bundle is loaded" in made.check
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
        export(target=HEXAGON, backend="reference")
    for target in ("rtx-409", "cuda:3", "auto", ""):
        with pytest.raises(OptionError, match=r'target=|device "'):
            export(target=target)
    assert here.jobs == []


def test_the_next_backend_is_taken_where_the_first_one_fails(here: Any, export: Any) -> None:
    here.use(MadeUp("a_shady", "garbage", band="tuned"), MadeUp("b_sound"))
    made = export()
    assert made.backend == "b_sound"
    assert any("a_shady on cpu was set aside" in warning for warning in made.warnings)
    with pytest.raises(SelfCheckFailed):
        export(backend="a_shady", overwrite=True)
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
    assert manifest["target"]["arch"] == manifest["requires"]["arch"] == "hexagon_v73"
    assert manifest["options"] == {"precision": "auto", "context": 100, "sparsity": "dense"}
    assert manifest["context"] == 100
    assert manifest["memory"]["cache_per_token"] == 2 * 2 * (16 + 16) * 2  # layers, heads, key and value, bytes
    assert manifest["decoder"]["vocabulary"] == 262
    assert manifest["precision"] == "wood"
    names = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}
    assert names == {*manifest["files"], "manifest.json"}
    for name, record in manifest["files"].items():
        path = made.folder / name
        assert record == {"bytes": path.stat().st_size, "blake2b": hash_file(path)}
    with np.load(made.folder / "golden.npz") as golden:
        assert golden["ids"].tolist() == manifest["expected"]["tokens"]
        assert golden["logits"].argmax(-1).tolist() == manifest["expected"]["best"]


def test_the_file_of_a_directory_s_licence_is_named(here: Any, export: Any, rng: Any, tmp_path: Path) -> None:
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
    made = export(tmp_path / "plain.onnx", backend="reference")
    x = rng.standard_normal((2, 4)).astype(np.float32)
    with here.load(made.folder) as model:
        np.testing.assert_allclose(model.run({"x": x})["y"], x @ onnx.numpy_helper.to_array(weight), atol=1e-5)
        assert model.report.check.startswith("passed")


def test_a_model_in_memory_can_be_carried_too(here: Any, export: Any, rng: np.random.Generator) -> None:
    from test_in_memory import MemorySource, Thing

    from transom.runtime import loading
    from transom.testing.models import tiny_decoder

    here.monkeypatch.setattr(loading, "resolve", lambda spec: MemorySource())
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
    for key, value in manifest.items():
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
    made = export(backend="bound", precision="f32", context=100, sparsity="fast")
    policy = Sparsity.parse("fast")
    for options, said in (
        ({"backend": "other"}, "has backend='bound'"),
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
    assert "Backends that are there: reference" in caught.value.details
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


# --------------------------------------------------------------------------------------------------------------- damage
def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.unlink()  # the cache may hold the same file
    path.write_bytes(content)


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])


def _link(path: Path) -> None:
    os.rename(path, path.parent.parent / "away")
    path.symlink_to(path.parent.parent / "away")


@pytest.mark.parametrize("name", ["artifact/graph.onnx.data", "tokenizer.json", "golden.npz"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [(_flip, "its hash is another"), (_cut, "bytes in place of"), (Path.unlink, "is missing"), (_link, "plain file")],
    ids=["altered", "cut", "missing", "a link"],
)
def test_a_damaged_bundle_is_one_sentence_before_anything_is_opened(
    here: Any, export: Any, tmp_path: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    sound = MadeUp("sound")
    here.use(sound)
    made = export(out=tmp_path / "made" if (tmp_path / "made").mkdir() else tmp_path / "made" / "bundle")
    here.load(made.folder).close()
    sound.calls.clear()
    damage(made.folder / name)
    (made.folder / "away").unlink(missing_ok=True)
    with pytest.raises(BundleError, match=said) as caught:
        here.load(made.folder)
    assert name in caught.value.cause
    assert "\n" not in str(caught.value)
    assert sound.calls == []


def test_a_foreign_file_is_named(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    made = export()
    (made.folder / "artifact" / "more.bin").write_text("x")
    with pytest.raises(BundleError, match=r"artifact/more\.bin, which is not a part of it"):
        here.load(made.folder)
    with pytest.raises(OptionError, match=r"artifact/more\.bin is not a part of it"):
        export(overwrite=True)


def _edited(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transom_bundle": 2}, "is of version 2, and this Transom reads version 1"),
        ({"transom_bundle": "one"}, "is damaged"),
        ({"target": {"kind": "cpu"}}, "is damaged"),
        ({"files": {"../outside": {"bytes": 1, "blake2b": ""}}}, "is damaged"),
        ({"files": 3}, "is damaged"),
        ({"decoder": {"family": "llama"}}, "is damaged"),
        ({"options": {}}, "is damaged"),
    ],
)
def test_a_manifest_that_is_newer_or_wrong_is_refused(here: Any, export: Any, changes: Any, said: str) -> None:
    here.use(MadeUp("sound"))
    made = export()
    _edited(made.folder, **changes)
    for call in (lambda: here.load(made.folder), lambda: transom.explain(made.folder)):
        with pytest.raises(BundleError, match=said) as caught:
            call()
    assert ("pip install --upgrade transom" in caught.value.fix) == ("version 2" in said)


def test_a_manifest_that_was_cut_is_damaged_and_one_that_is_gone_leaves_no_model(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    made = export()
    path = made.folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BundleError, match="manifest"):
        here.load(made.folder)
    path.unlink()
    with pytest.raises(SourceError, match="holds no model"):
        here.load(made.folder)


def test_keys_that_a_later_version_adds_are_no_harm(here: Any, export: Any) -> None:
    here.use(MadeUp("sound"))
    made = export()
    with here.load(made.folder) as model:
        wanted = model.logits([1, 2, 3])
    _edited(made.folder, later={"more": 1})
    with here.load(made.folder) as model:
        assert model.report.bundle == str(made.folder)
        np.testing.assert_array_equal(model.logits([1, 2, 3]), wanted)


# -------------------------------------------------------------------------------------------------------------- writing
def test_only_a_bundle_gives_its_place_to_another_and_only_when_told(here: Any, export: Any, tmp_path: Path) -> None:
    here.use(MadeUp("sound"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out, said in (
        ("file", "is no folder"),
        ("link", "is no folder"),
        ("full", "is not empty"),
        ("none/bundle", "There is no folder"),
    ):
        for overwrite in (False, True):
            with pytest.raises(OptionError, match=said):
                export(out=tmp_path / out, overwrite=overwrite)
    assert here.jobs == []  # told before anything is compiled
    first = export(out=tmp_path / "empty")
    with pytest.raises(OptionError, match="There is a bundle"):
        export(out=first.folder)
    export(out=first.folder, overwrite=True, precision="f32")
    assert json.loads((first.folder / "manifest.json").read_text())["options"]["precision"] == "f32"
    assert not list(tmp_path.glob(".*"))
    for wrong in ("", "/", 5):
        with pytest.raises(OptionError, match="out="):
            export(out=wrong)
    with pytest.raises(OptionError, match="is a bundle"):
        export(first.folder, out=tmp_path / "second")


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_compiled(
    here: Any, export: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here.use(MadeUp("sound"))
    mkdir = os.mkdir

    def refused(path: Any, mode: int = 0o777) -> None:
        if Path(path).parent == tmp_path:
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(OptionError, match=r"cannot be written: Read-only file system"):
        export()
    assert here.jobs == []
    monkeypatch.undo()
    assert export().folder.is_dir()
    assert left_over(tmp_path) == ["bundle"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".transom-")]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system of Linux's kernel")
def test_what_looks_as_if_it_could_be_written_is_tried(here: Any, export: Any) -> None:
    """The administrator has every permission in /proc, and nobody makes a folder there."""
    here.use(MadeUp("sound"))
    with pytest.raises(OptionError, match="The folder /proc cannot be written"):
        export(out="/proc/bundle")
    assert here.jobs == []


def test_an_option_that_is_not_one_is_refused_with_the_nearest(export: Any) -> None:
    for options, nearest in (
        ({"overwrit": True}, '"overwrite"'),
        ({"precision": "int9"}, '"int8"'),
        ({"verify": "of"}, '"off"'),
    ):
        with pytest.raises(OptionError) as caught:
            export(**options)
        assert nearest in caught.value.fix


def test_what_is_compiled_for_elsewhere_moves_out_of_the_cache_and_what_runs_here_stays_in_it(
    here: Any, export: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One name for each file in any case: ONNX refuses weights that have two."""
    here.use(Tools("tools"))
    export(target=HEXAGON)
    assert not list((here.cache.root / "artifacts").iterdir())
    local = export(overwrite=True)
    assert len(list((here.cache.root / "artifacts").iterdir())) == 1
    for folder in (local.folder, here.cache.root):
        assert {p.stat().st_nlink for p in folder.rglob("*") if p.is_file()} == {1}
    here.cache.clear()
    here.load(local.folder).close()
    assert caplog.records == []


@pytest.mark.parametrize("why", ["another disk", "another name already"])
def test_files_that_cannot_move_are_copied(
    here: Any, export: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str
) -> None:
    here.use(Tools("tools"))

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def name_again(stage: str, share: float | None) -> None:
        if (stage, share) == ("write", 0.0):
            for file in (here.cache.root / "artifacts").rglob("files/*"):
                os.link(file, tmp_path / file.name)

    if why == "another disk":
        monkeypatch.setattr(os, "link", refuse)
    made = export(target=HEXAGON, progress=name_again if why == "another name already" else None)
    data = made.folder / "artifact" / "graph.onnx.data"
    assert data.stat().st_nlink == 1
    [entry] = (here.cache.root / "artifacts").iterdir()
    assert (entry / "files" / "graph.onnx.data").read_bytes() == data.read_bytes()


@pytest.mark.parametrize("room", [0, 36_000])
@pytest.mark.parametrize("older", [False, True], ids=["new", "over an older one"])
def test_a_full_disk_leaves_nothing_and_an_older_bundle_as_it_was(
    here: Any, export: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: int, older: bool
) -> None:
    here.use(MadeUp("sound"))
    if older:
        export()
    write, left = bundles.write_durably, [room]

    def limited(path: Path, data: bytes) -> None:
        left[0] -= len(data)
        if left[0] < 0:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(bundles, "write_durably", limited)
        with pytest.raises(BundleError, match="No space left on device") as caught:
            export(overwrite=True, precision="f32")
    assert "Free space" in caught.value.fix
    assert left_over(tmp_path) == (["bundle"] if older else [])
    if older:
        with here.load(tmp_path / "bundle", precision="auto") as model:
            assert model.report.bundle
    export(overwrite=True)


def test_a_cache_without_room_costs_a_warning_and_no_bundle(here: Any, export: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    here.use(MadeUp("sound"))
    made = export(cache=Cache(tmp_path / "file"))
    assert any("TRANSOM_CACHE" in warning for warning in made.warnings)
    with here.load(made.folder) as model:
        assert model.report.backend == "sound"


@pytest.mark.parametrize("target", ["cpu", HEXAGON])
@pytest.mark.parametrize("room", [0, 3000, 6000, 12_000, 36_000])
def test_a_cache_that_gets_full_costs_a_warning_and_no_bundle(
    here: Any, export: Any, monkeypatch: pytest.MonkeyPatch, room: int, target: str
) -> None:
    from test_artifacts_in_use import fill_disk

    here.use(Tools("tools"))
    with monkeypatch.context() as patch:
        fill_disk(patch, here.cache.root, room)
        made = export(target=target)
    assert any("TRANSOM_CACHE" in warning for warning in made.warnings)
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["expected"]["tokens"]
    assert all((made.folder / name).stat().st_size == f["bytes"] for name, f in manifest["files"].items())


def test_a_bundle_runs_where_the_cache_cannot_be_written(here: Any, export: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    here.use(MadeUp("sound"))
    made = export()
    here.cache = Cache(tmp_path / "file")
    with here.load(made.folder) as model:
        assert any("TRANSOM_CACHE" in warning for warning in model.report.warnings)
        assert model.generate("Hello", max_new_tokens=2).usage.completion_tokens


@pytest.mark.parametrize("stage", ["compile", "write"])
@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
def test_stopping_leaves_nothing(
    here: Any, export: Any, tmp_path: Path, stage: str, error: type[BaseException]
) -> None:
    here.use(MadeUp("sound"))

    def stop(at: str, share: float | None) -> None:
        if at == stage and (share or 1.0) > 0.5:
            raise error

    with pytest.raises(error):
        export(progress=stop)
    assert left_over(tmp_path) == []
    assert not list((here.cache.root / "building").iterdir())
    export()


# ------------------------------------------------------------------------------------------------ in processes that die
WRITE = """
import os, signal
from transom.runtime import bundles
sync, count = bundles.sync_file, [0]

def die(path):
    count[0] += 1
    if count[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)

bundles.sync_file = die
transom.export(model, target="cpu", out=sys.argv[2], backend="sound", overwrite=True)
"""
EXPORT = """
made = transom.export(model, target="cpu", out=sys.argv[2], backend="sound", overwrite=True)
with transom.load(made.folder) as loaded:
    show(text=loaded.generate("Hello", max_new_tokens=4).token_ids, startup=list(loaded.report.startup))
"""


def test_a_kill_leaves_no_bundle_and_what_is_left_goes_with_the_next_export(packages: Any, tmp_path: Path) -> None:
    packages.use({"name": "sound"})
    out = tmp_path / "out" / "bundle"
    out.parent.mkdir()
    child = packages.start(WRITE, out)
    child.communicate(timeout=120)
    assert child.returncode == -9
    assert not out.exists()
    [half] = out.parent.iterdir()
    assert half.name.startswith(".")
    assert not list(half.rglob("manifest.json"))
    done = packages.run(EXPORT, out)
    assert done["text"]
    assert "child check" in done["startup"]
    assert os.listdir(out.parent) == ["bundle"]


def test_a_kill_while_it_compiles_leaves_nothing_beside_the_place(packages: Any, tmp_path: Path) -> None:
    import time

    packages.use({"name": "sound", "does": "compile:slow"})
    out = tmp_path / "out" / "bundle"
    out.parent.mkdir()
    child = packages.start(EXPORT, out)
    end = time.monotonic() + 60
    while not packages.log and time.monotonic() < end:
        time.sleep(0.05)
    child.kill()
    child.communicate(timeout=60)
    assert packages.log
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize(("does", "said"), [("load:abort", "SIGABRT"), ("step:ill", "SIGILL")])
def test_an_engine_that_dies_on_a_bundle_does_so_in_a_child_process(
    packages: Any, tmp_path: Path, does: str, said: str
) -> None:
    packages.use({"name": "sound"})
    packages.run(EXPORT, tmp_path / "bundle")
    shutil.rmtree(packages.cache)
    packages.use({"name": "sound", "does": does})
    died = packages.run("model = sys.argv[2]\nshow(**outcome())", tmp_path / "bundle")
    assert died["error"] == "ChildFailed"
    assert said in died["cause"]


def test_a_bundle_opens_without_onnx_and_without_its_model(packages: Any, tmp_path: Path) -> None:
    packages.use({"name": "sound"})
    packages.run(EXPORT, tmp_path / "bundle")
    warm = packages.run(
        """
        import made_up
        from transom.contract import Limits
        from transom.sessions import PackedSession
        made_up.MadeUp.load = lambda self, artifact, device, options, scratch: PackedSession(
            lambda inputs: {}, None, Limits(1, 16, options["context"], 0))
        with transom.load(sys.argv[2]) as loaded:
            assert loaded.tokenize("Hello")
            show(modules=sorted(sys.modules))
        """,
        tmp_path / "bundle",
    )
    assert not {"onnx", "onnx_ir", "gguf", "transom.graph", "transom.models"} & set(warm["modules"])
