"""Loading models in memory: a source that builds graphs of decoders and other models without a file.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from load_fixtures import MemorySource, Thing
from made_up import MadeUp

from transom.errors import SelfCheckFailed
from transom.graph import Graph
from transom.loading import identity
from transom.preparation import stages
from transom.sources import SourceModel
from transom.testing.models import tiny_decoder
from transom.text import GenerationDefaults


@pytest.fixture
def memory(here: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def never(spec: Any) -> None:
        raise AssertionError("the child process cannot see what is in memory")

    monkeypatch.setattr(identity, "resolve", lambda spec: MemorySource())
    monkeypatch.setattr(stages, "resolve", never)
    return here


def test_a_decoder_in_memory_goes_to_the_child_through_the_cache(memory: Any, rng: np.random.Generator) -> None:
    sound = MadeUp("sound")
    memory.use(sound)
    thing = Thing(tiny_decoder(rng))
    with memory.load(thing) as model:
        assert model.report.backend == "sound"
        assert model.report.model == "thing"
        assert model.report.source == "memory"
        assert "a note of the source" in model.report.notes
        assert model.report.check.startswith("passed")
        first = model.logits([1, 2, 3])
    with memory.load(thing, context=20) as model:
        assert model.report.cache_hit
        assert model.context == 20
        np.testing.assert_array_equal(model.logits([1, 2, 3]), first)
    assert sound.calls.count("compile") == 1
    memory.load(Thing(tiny_decoder(rng))).close()
    assert sound.calls.count("compile") == 2


def test_a_decoder_in_memory_is_checked_too(memory: Any, rng: np.random.Generator) -> None:
    memory.use(MadeUp("shady", "garbage"))
    with pytest.raises(SelfCheckFailed):
        memory.load(Thing(tiny_decoder(rng)), backend="shady")


def test_a_decoder_in_memory_loads_though_the_cache_cannot_be_written_with_one_warning(
    memory: Any, rng: np.random.Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transom.artifacts import Cache

    (tmp_path / "file").write_text("not a folder")
    memory.cache = Cache(tmp_path / "file")
    memory.use(MadeUp("sound"))
    with memory.load(Thing(tiny_decoder(rng))) as model:
        assert model.report.backend == "sound"
        [warning] = {*model.report.warnings, *(r.getMessage() for r in caplog.records)}
        assert "cannot be written" in warning
        assert "TRANSOM_CACHE" in warning
        assert warning in model.report.warnings


# graphs that are no decoders ------------------------------------------------------------------------------------------


class Once:
    """A session for graphs without a cache, spoilt or not."""

    def __init__(self, session: Any, spoil: bool) -> None:
        self._session, self._spoil = session, spoil
        self.limits = session.limits

    def run(self, inputs: Any) -> Any:
        outputs = self._session.run(inputs)
        return {name: value + 1 if self._spoil else value for name, value in outputs.items()}

    def close(self) -> None:
        self._session.close()


class OnceBackend(MadeUp):
    def load(self, artifact: Any, device: Any, options: Any, scratch: Any) -> Any:
        return Once(super().load(artifact, device, options, scratch), self.does == "wrong")


def plain(rng: np.random.Generator) -> Thing:
    import onnx_ir as ir

    weight = rng.standard_normal((4, 5)).astype(np.float32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 4]))
    w = ir.Value(
        name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4, 5]), const_value=ir.tensor(weight, name="w")
    )
    node = ir.node("MatMul", [x, w], name="product")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 5])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 24}, name="plain")
    return Thing(Graph(ir.Model(graph, ir_version=11), weights_hash=""))


def test_a_plain_graph_runs_and_is_checked_on_made_up_inputs(memory: Any, rng: np.random.Generator) -> None:
    memory.use(OnceBackend("sound"))
    thing = plain(rng)
    x = rng.standard_normal((2, 4)).astype(np.float32)
    weight = thing.graph.model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    for backend in ("sound", "reference"):
        with memory.load(thing, backend=backend) as model:
            assert model.decoder is None
            assert model.report.context == 0
            assert model.report.check.startswith("passed")
            np.testing.assert_allclose(model.run({"x": x})["y"], x @ weight, rtol=1e-5, atol=1e-5)


def test_a_plain_graph_that_is_computed_wrongly_is_refused(memory: Any, rng: np.random.Generator) -> None:
    memory.use(OnceBackend("shady", "wrong"))
    with pytest.raises(SelfCheckFailed):
        memory.load(plain(rng), backend="shady")
    with memory.load(plain(rng)) as model:
        assert model.report.backend == "reference"


def test_kinds_of_device_are_not_measured_for_a_plain_graph(memory: Any, rng: np.random.Generator) -> None:
    from made_up import CPU, NPU

    memory.use(OnceBackend("on_cpu"), OnceBackend("on_npu", kind="npu"), devices=[CPU, replace(NPU)])
    with memory.load(plain(rng)) as model:
        assert model.report.device.id == "cpu"
    assert "measure" not in memory.jobs


# sources whose graph depends on the context ---------------------------------------------------------------------------


class LongSource(MemorySource):
    """Like a model with long rotary factors: made for 32 tokens, and another graph for more, up to 64."""

    kind = "long"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fingerprint(self, spec: Any) -> str:
        return f"long {self.seed}"

    def open(self, spec: Any, *, context: Any = None, progress: Any = None) -> SourceModel:
        longer = context is not None and context > 32
        graph = tiny_decoder(np.random.default_rng(self.seed), context=64 if longer else 32, window=4 if longer else 0)
        graph.weights_hash = f"{self.seed}"
        return SourceModel(graph, None, None, GenerationDefaults(), "long", "long")


def test_a_context_that_needs_another_graph_gets_it_and_neither_is_taken_for_the_other(
    here: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    source = LongSource(seed)
    for module in (identity, stages):
        monkeypatch.setattr(module, "resolve", lambda spec: source)
    sound = MadeUp("sound")
    here.use(sound)
    ids = list(range(12))
    logits: dict[Any, Any] = {}
    for context in (64, None, 16, 40, None, 64):
        with here.load("/made/up", context=context) as model:
            assert model.context == (context or 32)
            logits.setdefault(context, model.logits(ids))
            np.testing.assert_array_equal(model.logits(ids), logits[context])
    np.testing.assert_allclose(logits[16], logits[None], atol=1e-6)
    assert np.abs(logits[64] - logits[None]).max() > 1e-3
    assert sound.calls.count("compile") == 3  # 64, the model's own, 40
    from transom.errors import OptionError

    with pytest.raises(OptionError, match="64"):
        here.load("/made/up", context=65)
