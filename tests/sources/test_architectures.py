"""A model that Transom cannot load is refused by what its headers say, with advice that can help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import transom
from transom.errors import MissingExtra, SourceError, TransomError
from transom.models import families
from transom.sources import architectures, mobius, resolve
from transom.sources.torch import TorchModels

FAMILY_NAMES = ", ".join(family.name for family in families())
SMALL = {
    "vocab_size": 300,
    "d_model": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def directory(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    return folder


def gguf_file(path: Path, architecture: str, **settings: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(spec: Any) -> TransomError:
    """The same error from the headers alone and from opening."""
    with pytest.raises((SourceError, MissingExtra)) as early:
        resolve(spec).require_supported(spec)
    with pytest.raises((SourceError, MissingExtra)) as late:
        resolve(spec).open(spec)
    assert str(early.value) == str(late.value)
    assert early.value.fix
    assert "again" not in early.value.fix
    return early.value


@pytest.fixture(params=["with the extra", "without the extra"])
def extra(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    there = bool(request.param == "with the extra")
    monkeypatch.setattr(mobius, "installed", lambda: there)
    monkeypatch.setattr(mobius, "_build", lambda *arguments: pytest.fail("mobius was asked to build it"))
    return there


OTHER_KINDS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is an encoder"),
    ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, "is an encoder"),
    ({"model_type": "modernbert"}, "is an encoder"),
    ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is an encoder-decoder"),
    ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "is an encoder-decoder"),
    ({"model_type": "new", "architectures": ["NewForX"], "is_encoder_decoder": True}, "is an encoder-decoder"),
    ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "reads images or sound"),
    ({"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}, "reads images or sound"),
    ({"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]}, "reads images or sound"),
    ({"model_type": "new", "architectures": ["NewForCausalLM"], "vision_config": {"a": 1}}, "reads images or sound"),
    ({"model_type": "new", "architectures": ["NewForConditionalGeneration"]}, "generates from more than the text"),
    ({"model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"]}, "has layers that keep a state"),
    ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "has layers that keep a state"),
    ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "has no output of next tokens"),
    ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "has no output of next tokens"),
    ({"model_type": "qwen2", "architectures": ["Qwen2Model"]}, "has no output of next tokens"),
]


@pytest.mark.parametrize(("config", "words"), OTHER_KINDS)
def test_a_model_that_is_no_decoder_of_text_is_called_what_it_is(
    config: dict[str, Any], words: str, tmp_path: Path, extra: bool
) -> None:
    error = refusal(directory(tmp_path, **config))
    assert words in error.cause
    assert str(tmp_path) in error.cause
    assert "transom[" not in error.fix
    assert "Did you mean" not in error.fix
    assert "from_pretrained" not in error.fix


@pytest.mark.parametrize("name", ["DeepseekV2ForCausalLM", "PhimoeForCausalLM", "Llama4ForCausalLM"])
def test_a_decoder_that_nothing_loads_is_not_said_to_be_damaged(name: str, tmp_path: Path, extra: bool) -> None:
    kinds = {"DeepseekV2ForCausalLM": "deepseek_v2", "PhimoeForCausalLM": "phimoe", "Llama4ForCausalLM": "llama4_text"}
    error = refusal(directory(tmp_path, model_type=kinds[name], architectures=[name]))
    assert error.cause == f'Transom does not support the architecture "{name}" of {tmp_path / "config.json"}'
    assert error.fix == f"Choose a model of a family that Transom builds: {FAMILY_NAMES}"


@pytest.mark.parametrize(("kind", "name"), [("falcon", "FalconForCausalLM"), ("glm4", "Glm4ForCausalLM")])
def test_a_decoder_that_torch_exports_is_loaded_through_transformers(
    kind: str, name: str, tmp_path: Path, extra: bool
) -> None:
    error = refusal(directory(tmp_path, model_type=kind, architectures=[name]))
    assert f'"{name}"' in error.cause
    assert f"transom.load(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}))" in error.fix


def test_the_extra_is_named_where_it_builds_the_model_and_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mobius, "installed", lambda: False)
    folder = directory(tmp_path, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"])
    error = refusal(folder)
    assert isinstance(error, MissingExtra)
    assert error.cause == (
        f'The architecture "Qwen3MoeForCausalLM" of {folder / "config.json"} is built by mobius-onnx, not by Transom'
    )
    assert "pip install 'transom[families]'" in error.fix
    monkeypatch.setattr(mobius, "installed", lambda: True)
    assert resolve(folder).kind == "mobius"
    resolve(folder).require_supported(folder)


@pytest.mark.parametrize("kind", ["qwen4", "qwen3small", "llama5", "phi"])
def test_another_architecture_is_no_misspelt_one(kind: str, tmp_path: Path) -> None:
    assert "Did you mean" not in refusal(gguf_file(tmp_path / "x.gguf", kind)).fix


@pytest.mark.parametrize(
    ("kind", "meant"), [("Qwen3", "qwen3"), ("qwen-3", "qwen3"), ("lama", "llama"), ("gemna3", "gemma3")]
)
def test_a_misspelt_architecture_gets_the_nearest_name(kind: str, meant: str, tmp_path: Path) -> None:
    fix = refusal(gguf_file(tmp_path / "x.gguf", kind)).fix
    assert fix == (f'Did you mean "{meant}"? ' if meant else "") + (
        f"Choose a model of a family that Transom builds: {FAMILY_NAMES}"
    )


@pytest.mark.parametrize("architecture", sorted(gguf.MODEL_ARCH_NAMES.values()))
def test_no_architecture_of_llama_cpp_is_taken_for_another(architecture: str, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf", architecture)
    if any(architecture in family.gguf for family in families()):
        return
    error = refusal(path)
    assert "does not know" not in error.cause
    assert str(path) in error.cause
    assert "Did you mean" not in error.fix


@pytest.mark.parametrize(
    ("architecture", "cause", "fix"),
    [
        ("mamba", "has layers that keep a state", "Choose a model"),
        ("bert", "is an encoder", "Export it to ONNX"),
        ("t5", "is an encoder-decoder", "Choose a model"),
        ("qwen3moe", "does not build", "Hugging Face directory that the file was made from, with the extra"),
        ("falcon", "does not build", "through transformers"),
        ("deepseek2", "does not support", "Choose a model"),
        ("llama4", "does not support", "Choose a model"),
        ("gemma3n", "does not support", "Choose a model"),
    ],
)
def test_what_a_gguf_file_needs_is_said_by_its_architecture(
    architecture: str, cause: str, fix: str, tmp_path: Path
) -> None:
    error = refusal(gguf_file(tmp_path / "x.gguf", architecture))
    assert f'"{architecture}"' in error.cause
    assert cause in error.cause
    assert fix in error.fix


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("clip", {}, "(mmproj), not a language model"),
        ("clip", {"general__type": "mmproj"}, "(mmproj), not a language model"),
        ("llama", {"general__type": "adapter"}, "is an adapter (LoRA), not a whole model"),
        ("llama", {"general__type": "imatrix"}, "is an importance matrix"),
    ],
)
def test_a_gguf_file_that_belongs_to_a_model_is_told_from_one(
    architecture: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refusal(gguf_file(tmp_path / "x.gguf", architecture, **settings)).cause


def test_a_mixture_of_experts_in_a_known_architecture_is_not_sent_to_the_extra(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf", "llama", llama__expert_count=8)
    with pytest.raises(SourceError) as caught:
        resolve(path).open(path)
    error = caught.value
    assert "mixture of experts" in error.cause
    assert "transom[" not in error.fix


def test_no_name_is_in_two_tables() -> None:
    tables = [architectures.BY_EXTRA, architectures.BY_TRANSFORMERS, architectures.BY_NEITHER]
    others = list(architectures._NOT_DECODERS.values())
    assert not (tables[0] | tables[1]) & tables[2]
    assert not tables[0] & mobius.WRONG.keys()
    text = frozenset().union(*tables)
    for i, table in enumerate(others):
        assert not table & text, table & text
        assert not any(table & later for later in others[i + 1 :])
    assert mobius.NEARLY.keys() <= architectures.BY_EXTRA
    own = families()
    assert {*architectures.OWN_GGUF} == {n for family in own for n in family.gguf}
    for family in own:  # they are asked first
        assert not {*family.model_types, *family.gguf} & (text.union(*others))


UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "relu2"}, "hidden_act in"),
    ("llama", {"rope_scaling": {"type": "spiral", "factor": 2.0}}, "type in rope_scaling of"),
    ("qwen2", {"layer_types": ["linear_attention"], "use_sliding_window": True}, "layer_types in"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention in"),
]


def own_directory(folder: Path, kind: str, **settings: Any) -> Path:
    sizes = {**SMALL, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    return directory(folder, model_type=kind, **sizes, **settings)


@pytest.mark.parametrize(("kind", "settings", "named"), UNSUPPORTED)
def test_a_setting_that_our_own_family_does_not_support_is_refused_by_the_headers(
    kind: str, settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    error = refusal(own_directory(tmp_path, kind, **settings))
    assert error.cause.startswith(named)
    assert "which this family does not support" in error.cause


def test_settings_are_read_without_onnx(tmp_path: Path) -> None:
    code = (
        "import sys; from transom.sources import resolve; resolve(sys.argv[1]).require_supported(sys.argv[1]); "
        "print(sorted({'onnx', 'onnx_ir', 'onnxscript', 'torch', 'transformers', 'tokenizers'} & {*sys.modules}))"
    )
    folder = own_directory(tmp_path, "llama")
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_loading_refuses_before_it_hashes_or_starts_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transom.loading import child_jobs
    from transom.sources import gguf as gguf_source
    from transom.sources import hf

    def never(*arguments: Any, **options: Any) -> None:
        pytest.fail("too late")

    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    for module, name in ((child_jobs, "run_in_child"), (gguf_source, "content_hash"), (hf, "content_hash")):
        monkeypatch.setattr(module, name, never)
    for name in ("hf", "own"):
        (tmp_path / name).mkdir()
    for spec in (
        own_directory(tmp_path / "own", "llama", hidden_act="relu2"),
        directory(tmp_path / "hf", model_type="bert", architectures=["BertForMaskedLM"]),
        gguf_file(tmp_path / "x.gguf", "mamba"),
    ):
        for _ in range(2):
            with pytest.raises(SourceError, match=r"is an encoder|keep a state|hidden_act"):
                transom.load(spec, backend="reference")


def objects() -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    whisper = transformers.WhisperConfig(
        **{
            **SMALL,
            "decoder_layers": 1,
            "encoder_layers": 1,
            "decoder_attention_heads": 2,
            "encoder_attention_heads": 2,
        },
        decoder_ffn_dim=16,
        encoder_ffn_dim=16,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=8,
        pad_token_id=0,
    )
    t5 = transformers.T5Config(**SMALL, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    llava = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL),
        vision_config=transformers.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4),
    )
    bert, llama = transformers.BertConfig(**SMALL), transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    return {
        "whisper": transformers.WhisperForConditionalGeneration(whisper),
        "whisper's decoder": AutoModelForCausalLM.from_config(whisper),
        "t5": transformers.T5ForConditionalGeneration(t5),
        "llava": transformers.LlavaForConditionalGeneration(llava),
        "bert": transformers.BertForMaskedLM(bert),
        "a classifier": transformers.LlamaForSequenceClassification(llama),
        "no head": transformers.LlamaModel(llama),
    }


WORDS = {
    "whisper": "WhisperForConditionalGeneration object is an encoder-decoder",
    "whisper's decoder": "WhisperForCausalLM object is an encoder-decoder",
    "t5": "T5ForConditionalGeneration object is an encoder-decoder",
    "llava": "LlavaForConditionalGeneration object reads images or sound",
    "bert": "BertForMaskedLM object is an encoder",
    "a classifier": "LlamaForSequenceClassification object has no output of next tokens",
    "no head": "LlamaModel object has no output of next tokens",
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    with torch.device("meta"):  # no weight is read before the refusal
        return objects()


@pytest.mark.parametrize("name", WORDS)
def test_a_transformers_object_that_is_no_decoder_of_text_is_refused(name: str, made: dict[str, Any]) -> None:
    model = made[name]
    model.config.architectures = ["LlamaForCausalLM"] if "Llama" in type(model).__name__ else None
    with pytest.raises(SourceError) as caught:
        TorchModels().open(model)
    assert WORDS[name] in caught.value.cause
    assert caught.value.fix
