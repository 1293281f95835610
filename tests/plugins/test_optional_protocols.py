"""A third-party backend takes part in plans, in judging bundles and in checking an app's libraries, as ours do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transom.testing import models

BOARDS = """
    def fits(self, variant, device):
        from transom.contract import Verdict
        wanted, found = variant["requires"]["board"], device.drivers.get("board", "none")
        if found == "broken":
            raise RuntimeError("the rule is broken")
        if found == wanted:
            return Verdict("ok", f"Runs on board {found}")
        return Verdict("never", f"Is made for board {wanted}, this is {found}")

    def machine_of(self, library):
        return "hexagon" if library.endswith("_dsp.so") else ""

    def storage_form(self, decoder, device, precision):
        from transom.contract_optional import MatrixForm, StorageForm
        from transom.errors import OptionError
        if precision not in ("auto", "int6"):
            raise OptionError(f"boards has no precision={precision!r}", "It has int6")
        six = MatrixForm(6, row=4)
        return StorageForm("boards", "int6", six, six, MatrixForm(16), rest=2, cache=2, chunk=64, static=True,
                           layer=1000, file="boards-{target}/layers{part}.bin", part_bytes=40_000,
                           mapped_table="shared/table.bin")
"""

ASK = """
import json, sys
import transom
from transom.bundles.judging import judge
from transom.bundles.native_libraries import Library, judge as judge_libraries, machines
from transom.contract import Device
from transom.errors import TransomError
from transom.plugins import load_plugins

def variant(backend):
    target = {"kind": "remote", "id": "remote:one", "arch": "riscv64", "name": "Board one", "memory_bytes": 0}
    return {"name": backend, "backend": {"name": backend}, "target": target, "requires": {"board": "one"},
            "context": 0, "memory": {}}

def planned(precision="auto"):
    try:
        plan, = transom.plan_export(sys.argv[1], target="android-arm64", format="boards,plain", precision=precision)
    except TransomError as error:
        return str(error)
    return plan.to_dict()

manifest = {"transom_bundle": 1, "variants": [variant("boards"), variant("plain"), variant("nowhere")]}
verdicts = {}
for board in ("one", "two", "broken"):
    device = Device("remote", "remote:there", "riscv64", 0, drivers={"board": board})
    verdicts[board] = [[v.name, v.fits, v.reason] for v in judge(manifest, device)]
other = judge(manifest, Device("cpu", "cpu", "x86_64", 0, drivers={"board": "one"}))

names = ["libapp.so", "libapp_dsp.so"]
here = machines(names, load_plugins())
found = [Library(name, f"lib/arm64-v8a/{name}", abi, 16384, folder_abi="arm64-v8a")
         for name, abi in (("libapp.so", "arm64-v8a"), ("libapp_dsp.so", "hexagon"))]
print(json.dumps({
    "plan": planned(), "refused": planned("int4"), "verdicts": verdicts, "other": [v.fits for v in other],
    "machines": here, "libraries": judge_libraries(found, names, elsewhere=here),
    "without": judge_libraries(found, names),
}))
"""


@pytest.fixture
def asked(environment: Any, sound_source: str, tmp_path: Path) -> Any:
    """The results with a backend that has the protocols and one that has none."""
    named = sound_source.replace('name = "sound"', 'name = "boards"')
    environment.install("boards-dist", named.replace("\n@hookimpl", f"{BOARDS}\n@hookimpl"))
    environment.install_sound("plain-dist", "plain")
    path = tmp_path / "tiny.onnx"
    models.tiny_decoder(np.random.default_rng(0)).save(path)
    return environment.run(
        f"import sys; sys.argv = ['x', {str(path)!r}]\n{ASK}", {"TRANSOM_CACHE": str(tmp_path / "c")}
    )


def test_a_plan_counts_in_the_form_that_the_backend_names(asked: Any) -> None:
    boards, plain = asked["plan"]["variants"]
    assert (boards["format"], boards["precision"]) == ("boards", "int6")
    weights = {w["use"]: w["bytes"] for w in boards["weights"]}
    rows, numbers = 64 + 32 + 32 + 64 + 96 + 96 + 64, 64 * (64 + 32 + 32 + 64 + 96 + 96 + 96)
    assert weights["products"] == 2 * (numbers * 6 // 8 + 4 * rows)
    assert weights["vocabulary"] == 61 * (64 * 6 // 8 + 4)
    assert weights["code"] == 2 * 1000
    assert boards["cache_per_token"] == 2 * 2 * 2 * (16 + 16)
    assert list(boards["files"]) == [
        "boards-android-arm64/layers0.bin", "boards-android-arm64/layers1.bin", "shared/table.bin",
    ]  # fmt: skip
    assert boards["files"]["shared/table.bin"] == 2 * 61 * 64
    assert (plain["format"], list(plain["files"])) == ("plain", ["plain"])
    assert "boards has no precision='int4'" in asked["refused"]


def test_a_bundle_is_judged_by_the_rule_that_the_backend_has(asked: Any) -> None:
    generic = [
        ["plain", True, "Is made for remote:there (riscv64)"],
        ["nowhere", True, "Is made for remote:there (riscv64)"],
    ]
    assert asked["verdicts"]["one"] == [["boards", True, "Runs on board one"], *generic]
    assert asked["verdicts"]["two"] == [["boards", False, "Is made for board one, this is two"], *generic]
    (name, fits, reason), *others = asked["verdicts"]["broken"]
    assert (name, fits) == ("boards", False)
    assert "The backend boards failed while judging a variant: RuntimeError: the rule is broken" in reason
    assert others == generic
    assert asked["other"] == [
        True,
        False,
        False,
    ]  # the rule looks at the board alone; without one the architecture counts


def test_libraries_for_another_processor_are_those_that_the_backend_names(asked: Any) -> None:
    assert asked["machines"] == {"libapp_dsp.so": "hexagon"}
    assert asked["libraries"] == []
    assert any("is compiled for hexagon, and arm64-v8a is needed" in problem for problem in asked["without"])
