"""Models that use the operator of a plugin, which is changed, removed, installed or broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

PLUGIN = """
import numpy as np
from transom.contract import hookimpl
from transom.ops import OpSchema
from transom.ops.functions import FunctionWriter
from transom.ops.schema import Param, Sample

FACTOR = {factor!r}

def reference(inputs, attributes):
    return (np.asarray(inputs[0]) * np.float32(FACTOR),)

def infer(specs, attributes):
    return (specs[0],)

def body(attributes, present):
    w = FunctionWriter("acme", "Scale", ["x"])
    return w.finish([w("Mul", w.inputs[0], w.floats(FACTOR))], (), attributes, present)

def samples(rng):
    yield Sample("plain", (rng.standard_normal((2, 3)).astype(np.float32),), {{}})

SCALE = OpSchema("acme", "Scale", 1, "x times a factor", (Param("x", "in"),), (Param("y", "out"),), (), reference,
                 samples, infer, {body})

@hookimpl
def transom_ops():
    return [SCALE]
"""

RUN = """
import numpy as np
try:
    with transom.load(sys.argv[2], **json.loads(sys.argv[3])) as loaded:
        y = loaded.run({"x": np.ones((1, 4), np.float32)})["y"]
        show(y=float(y[0, 0]), said=str(loaded.report.warnings))
except TransomError as error:
    show(error=str(error))
"""


class Acme:
    """The distribution `acme-ops`, which brings the operator acme::Scale, and a model that uses it."""

    def __init__(self, packages: Any, folder: Path) -> None:
        packages.environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the file changes within a second, its size does not
        self.packages, self.model = packages, folder / "scaled.onnx"
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy")
        graph = helper.make_graph([helper.make_node("Scale", ["x"], ["y"], domain="acme")], "scaled", [x], [y])
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("acme", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), self.model)

    @property
    def _points(self) -> Path:
        return Path(self.packages.folder / "acme_ops-1.0.dist-info" / "entry_points.txt")

    def install(self, factor: float, body: str = "body") -> None:
        (self.packages.folder / "acme_ops.py").write_text(PLUGIN.format(factor=factor, body=body))
        self._points.parent.mkdir(exist_ok=True)
        (self._points.parent / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-ops\nVersion: 1.0\n")
        self._points.write_text("[transom.backends]\nacme_ops = acme_ops\n")

    def remove(self) -> None:
        self._points.unlink()

    def run(self, options: str = "{}") -> Any:
        return self.packages.run(RUN, self.model, options)


@pytest.fixture
def acme(packages: Any, tmp_path: Path) -> Acme:
    return Acme(packages, tmp_path)


@pytest.mark.parametrize("options", ['{"backend": "reference"}', "{}"], ids=["reference", "auto"])
@pytest.mark.sweep(but=("auto",))
def test_a_plugin_whose_operator_changes_gives_new_numbers_and_one_removed_gives_none(acme: Acme, options: str) -> None:
    acme.install(3.0)
    assert acme.run(options)["y"] == 3.0
    assert acme.run(options)["y"] == 3.0  # the reference opens a graph with the operator in the host's own process
    acme.install(5.0)
    assert acme.run(options)["y"] == 5.0
    acme.remove()
    assert "acme::Scale" in acme.run(options)["error"]


def test_a_failure_for_want_of_a_plugin_is_forgotten_when_it_is_installed(acme: Acme) -> None:
    assert "acme::Scale, which Transom does not know" in acme.run()["error"]
    acme.install(2.0, body="None")
    lacking = acme.run()["error"]
    assert "acme::Scale needs a shape rule, a function body and samples" in lacking
    assert "at an earlier load" not in lacking
    acme.install(2.0)
    found = acme.run()
    assert found["y"] == 2.0
    assert "at an earlier load" not in found["said"]


def test_an_operator_that_is_left_out_is_named_with_its_plugin_wherever_it_is_missed(acme: Acme) -> None:
    acme.install(2.0, body="None")
    found = acme.packages.run(
        """
        said = [str(f) for f in transom.backends().failures]
        try:
            transom.explain(sys.argv[2])
        except TransomError as error:
            show(backends=said, explain=str(error))
        """,
        acme.model,
    )
    why = "acme::Scale needs a shape rule, a function body and samples"
    assert any("acme_ops (acme-ops)" in line and why in line for line in found["backends"])
    assert "acme_ops (acme-ops)" in found["explain"]
    assert why in found["explain"]
    assert why in acme.run('{"backend": "reference"}')["error"]


def test_inspecting_and_verifying_know_the_operators_of_plugins(acme: Acme) -> None:
    acme.install(2.0)
    found = acme.packages.run(
        """
        from transom.cli.inspection import inspect_model
        from transom.evaluation.verify import oracle_for
        show(nodes=str(inspect_model(sys.argv[2])), oracle=oracle_for(sys.argv[2]).name)
        """,
        acme.model,
    )
    assert "Scale" in found["nodes"]
    assert "scaled.onnx" in found["oracle"]


def test_a_model_that_cannot_use_a_plugin_s_operators_is_not_compiled_anew_for_them(acme: Acme) -> None:
    acme.packages.use({"name": "one"})
    load = "outcome(backend='one'); show()"
    acme.packages.run(load)
    made = list(acme.packages.log)
    acme.install(2.0)
    acme.packages.run(load)
    assert made
    assert acme.packages.log == made
