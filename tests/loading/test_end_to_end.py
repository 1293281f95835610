"""A complete load in real processes: a model file, a child process that compiles it, the cache, and text."""

from __future__ import annotations

import json
from typing import Any

HEAVY = ("onnx", "onnx_ir", "sympy", "gguf", "torch", "transom.graph.builder", "transom.ops", "transom.models.llama",
         "transom.reference.executor")  # fmt: skip
"""What only the child process needs: it reads the model, builds the graph and computes the reference."""
READERS = ("ml_dtypes", "transom.graph", "transom.models", "transom.sources.gguf", "transom.sources.hf")
"""What the host needs too, once: to name the content of a file that it has not seen."""

LOAD = """
import made_up
from transom.contract import Limits
from transom.sessions import PackedSession
# An engine that opens its artifact without ONNX, as a real one does.
made_up.MadeUp.load = lambda self, artifact, device, options, scratch: PackedSession(
    lambda inputs: {}, None, Limits(1, 16, options["context"], 0))
with transom.load(model) as loaded:
    assert loaded.tokenize("Hello") and loaded.chat_template is not None
    show(hit=loaded.report.cache_hit, modules=sorted(sys.modules))
"""


def test_the_first_load_compiles_in_a_child_process_and_the_second_takes_it_from_the_cache(packages: Any) -> None:
    packages.use({"name": "a_sound", "band": "tuned"})
    code = """
    import os
    show(**outcome(), pid=os.getpid())
    """
    first = packages.run(code, fresh=True)
    assert first["report"]["backend"] == "a_sound"
    assert first["report"]["cache_hit"] is False
    assert first["report"]["check"].startswith("passed")
    assert first["report"]["precision"] == "wood"
    assert first["report"]["source"] == "gguf"
    assert first["report"]["model"] == "Tiny"
    assert {"probe", "read", "load", "child read", "child compile", "child reference", "child check"} <= set(
        first["report"]["startup"]
    )
    [compiled] = packages.log
    assert compiled.split()[1] != str(first["pid"])

    second = packages.run(code, fresh=True)
    assert second["report"]["cache_hit"] is True
    assert second["text"] == first["text"]
    assert not any(stage.startswith("child") for stage in second["report"]["startup"])
    assert len(packages.log) == 1


def test_a_warm_start_imports_neither_onnx_nor_the_checkpoint_s_reader(packages: Any) -> None:
    packages.use({"name": "a_sound", "band": "tuned"})
    packages.run("show(**outcome())")
    warm = packages.run(LOAD, fresh=True)
    assert warm["hit"] is True
    assert not {*HEAVY, *READERS} & set(warm["modules"])
    assert not {"transom.bundles.manifest", "transom.bundles.opening"} & set(warm["modules"])


def test_a_warm_start_with_a_file_that_has_to_be_named_again_imports_no_onnx(packages: Any) -> None:
    packages.use({"name": "a_sound", "band": "tuned"})
    packages.run("show(**outcome())")
    (packages.cache / "remembered" / "fingerprints.json").unlink()
    warm = packages.run(LOAD, fresh=True)
    assert warm["hit"] is True
    assert not set(HEAVY) & set(warm["modules"])


def test_the_first_load_leaves_what_is_heavy_to_the_child_process(packages: Any) -> None:
    packages.use({"name": "a_sound", "band": "tuned"})
    first = packages.run(LOAD, fresh=True)
    assert first["hit"] is False
    assert len(packages.log) == 1
    assert not set(HEAVY) & set(first["modules"])


def test_the_reference_loads_checks_and_answers(packages: Any) -> None:
    result = packages.run("""
    result = outcome(backend="reference")
    again = outcome(backend="reference", verify="always")
    show(first=result, again=again)
    """)
    first, again = result["first"], result["again"]
    assert first["report"]["precision"] == "float32, by NumPy"
    assert first["report"]["context"] == 512
    assert first["report"]["memory"]["weights"] > 0
    assert "100%" in first["report"]["check"]
    assert again["report"]["cache_hit"] is True
    assert "check" in again["report"]["startup"]
    assert again["text"] == first["text"]
    assert json.dumps(first["report"])
