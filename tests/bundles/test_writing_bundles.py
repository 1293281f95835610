"""Writing a bundle: atomically, never over other files, on full disks and in processes that are killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from bundling import HEXAGON, Tools, left_over
from made_up import MadeUp

from transom.artifacts import Cache
from transom.bundles import writing
from transom.bundles.manifest import BundleError
from transom.contract import Cancelled
from transom.errors import OptionError


def test_only_a_bundle_gives_its_place_to_another_and_only_when_told(here: Any, export: Any, tmp_path: Path) -> None:
    here.use(MadeUp("sound"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out, said in (
        ("file", "is not a folder"),
        ("link", "is not a folder"),
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


def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_compiled(
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


def test_an_invalid_or_unreadable_folder_is_reported_before_anything_is_compiled(
    here: Any, export: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here.use(MadeUp("sound"))
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for out in ("~no-such-user/bundle", tmp_path / "circle" / "bundle", "zero\0byte"):
        with pytest.raises(OptionError, match="out="):
            export(out=out)
    (tmp_path / "shut").mkdir()
    with monkeypatch.context() as patch:
        _shut(patch, tmp_path / "shut", reading=True)
        with pytest.raises(OptionError, match="shut cannot be read: Permission denied"):
            export(out=tmp_path / "shut")
        with pytest.raises(OptionError, match="shut/in cannot be read: Permission denied"):
            export(out=tmp_path / "shut" / "in" / "bundle")
    assert here.jobs == []


def test_what_another_user_left_beside_the_place_is_not_looked_into(
    here: Any, export: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here.use(MadeUp("sound"))
    left = tmp_path / ".other.transom-999-abc"
    (left / "replaced").mkdir(parents=True)
    (left / ".used").touch()
    owner = left.stat().st_uid
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: owner + 1)
        _shut(patch, left)
        assert export().folder.is_dir()
    assert (left / "replaced").is_dir()


def _shut(patch: pytest.MonkeyPatch, folder: Path, *, reading: bool = False) -> None:
    """Let nothing in a folder be seen, as the system does for users who may not; the administrator may everything."""
    stat, listdir = os.stat, os.listdir

    def inside(path: Any) -> bool:
        return isinstance(path, str | Path) and folder in Path(path).parents

    def no_stat(path: Any, **options: Any) -> os.stat_result:
        if inside(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    def no_list(path: Any = ".") -> list[str]:
        if reading and (inside(path) or path == folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listdir(path)

    patch.setattr(os, "stat", no_stat)
    patch.setattr(os, "listdir", no_list)


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


@pytest.mark.parametrize("why", ["another disk", "another name already", "used by another process"])
def test_files_that_cannot_move_are_copied(
    here: Any, export: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str
) -> None:
    here.use(Tools("tools"))
    users: list[Any] = []

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def name_again(stage: str, share: float | None) -> None:
        if (stage, share) == ("write", 0.0):
            for file in (here.cache.root / "artifacts").rglob("files/*"):
                os.link(file, tmp_path / file.name)

    def use(stage: str, share: float | None) -> None:
        if (stage, share) == ("write", 0.0):
            [entry] = (here.cache.root / "artifacts").iterdir()
            users.append(Cache(here.cache.root).lookup(entry.name))

    if why == "another disk":
        monkeypatch.setattr(os, "link", refuse)
    made = export(
        target=HEXAGON, progress={"another name already": name_again, "used by another process": use}.get(why)
    )
    data = made.folder / "tools" / "graph.onnx.data"
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
    write, left = writing.write_durably, [room]

    def limited(path: Path, data: bytes) -> None:
        left[0] -= len(data)
        if left[0] < 0:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_durably", limited)
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
    from load_fixtures import fill_disk

    here.use(Tools("tools"))
    with monkeypatch.context() as patch:
        fill_disk(patch, here.cache.root, room)
        made = export(target=target)
    assert any("TRANSOM_CACHE" in warning for warning in made.warnings)
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["expected"]["tokens"]
    assert all((made.folder / name).stat().st_size == f["bytes"] for name, f in manifest["files"].items())
    assert {p.stat().st_nlink for p in made.folder.rglob("*") if p.is_file()} == {1}


def test_a_bundle_runs_where_the_cache_cannot_be_written(here: Any, export: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    here.use(MadeUp("sound"))
    made = export()
    here.cache = Cache(tmp_path / "file")
    with here.load(made.folder) as model:
        assert any("TRANSOM_CACHE" in warning for warning in model.report.warnings)
        assert model.generate("Hello", max_new_tokens=2).usage.completion_tokens


def test_a_name_that_is_too_long_is_reported_before_anything_is_compiled(
    here: Any, export: Any, tmp_path: Path
) -> None:
    here.use(MadeUp("sound"))
    with pytest.raises(OptionError, match="cannot be written: File name too long"):
        export(out=tmp_path / ("b" * 240))
    assert here.jobs == []


def test_no_room_for_the_mark_leaves_nothing(
    here: Any, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    here.use(MadeUp("sound"))
    monkeypatch.setattr(writing, "lock_folder", full)
    with pytest.raises(BundleError, match="No space left on device"):
        export()
    assert left_over(tmp_path) == []


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
from transom.bundles import writing
sync, count = writing.sync_file, [0]

def die(path):
    count[0] += 1
    if count[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)

writing.sync_file = die
transom.export(model, target="cpu", out=sys.argv[2], format="sound", overwrite=True)
"""
EXPORT = """
made = transom.export(model, target="cpu", out=sys.argv[2], format="sound", overwrite=True)
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
@pytest.mark.sweep(but=("step:ill-SIGILL",))
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
        fresh=True,
    )
    assert not {"onnx", "onnx_ir", "gguf", "transom.graph", "transom.models"} & set(warm["modules"])
