"""Tiny random checkpoints, made with transformers, as a Hugging Face directory and as a GGUF file.

`tiny` makes one, `write_gguf` writes it as llama.cpp's converter would (names from the gguf package's own map, Q and K
of Llama permuted, Gemma's norms with one added), `assert_agrees` compares a graph with transformers. A folder's
conftest.py puts this file on the path: `sys.path.insert(0, str(Path(__file__).parents[1]))`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transom.contract import Limits, Work
from transom.graph import Graph
from transom.reference.executor import Executor
from transom.sessions import PackedSession

VOCABULARY = 288
"""256 bytes and room for special tokens."""
TOLERANCE = 1e-4

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5, "head_dim": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 5},
    "gemma3": {
        "head_dim": 24,
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "phi3": {"pad_token_id": 258},
}
"""What is special about each family's tiny model, in `config.json`'s words."""


@dataclass
class Checkpoint:
    """A tiny model: the transformers object (float32, eager attention) and the directory it was saved to."""

    family: str
    model: Any
    folder: Path

    @property
    def config(self) -> Any:
        return self.model.config


def tiny(family: str, folder: Path, rng: np.random.Generator, **settings: Any) -> Checkpoint:
    """Make a tiny model with random weights and save it to `folder` (config.json, model.safetensors).

    Args:
        family: a key of `FAMILIES`.
        folder: made where it is missing.
        settings: replace those of `FAMILIES` and `SIZES`.
    """
    import torch
    import transformers

    classes = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "mistral": ("MistralConfig", "MistralForCausalLM"),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
        "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    }
    config_class, model_class = (getattr(transformers, name) for name in classes[family])
    config = config_class(**{**SIZES, **FAMILIES[family], **settings}, attn_implementation="eager")
    with torch.device("cpu"):
        model = model_class(config).to(torch.float32).eval()
    randomize(model, rng)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return Checkpoint(family, model, folder)


def randomize(model: Any, rng: np.random.Generator) -> None:
    """Weights large enough that every part of the model shows in the logits."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            values = rng.standard_normal(shape).astype(np.float32)
            if parameter.dim() == 2:
                values *= 0.25 if "embed_tokens" in name else 1.3 / np.sqrt(shape[1])
            else:
                values *= 0.3
                if "norm" in name and not model.config.model_type.startswith("gemma"):
                    values += 1.0
            parameter.copy_(torch.from_numpy(values))


def add_tokenizer(folder: Path) -> None:
    """Give a directory a tokenizer of single bytes, with `<s>` 256, `</s>` 257 and `<pad>` 258."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    visible = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Tokenizer(models.BPE({token: i for i, token in enumerate(visible)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<s>", "</s>", "<pad>"])
    rust.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def expected_logits(model: Any, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """What transformers computes for one sequence without a cache, float32 [tokens, vocabulary]."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return np.asarray(logits.float().numpy())


def reference_session(graph: Graph) -> PackedSession:
    """A session that runs a graph by the NumPy reference."""
    assert graph.decoder is not None
    return PackedSession(Executor(graph, keep_weights=True).run, graph.decoder, Limits(8, 512, 512, 0))


def assert_agrees(
    graph: Graph, model: Any, rng: np.random.Generator, *, tolerance: float = TOLERANCE, longest: int = 21
) -> None:
    """Compare a graph with transformers: prefill, cached decode, and a ragged batch that mixes both."""
    session = reference_session(graph)

    def tokens(count: int) -> list[int]:
        return [int(t) for t in rng.integers(0, 256, count)]

    def compare(got: Any, wanted: np.ndarray[Any, Any], what: str) -> None:
        error = float(np.abs(np.asarray(got) - wanted).max())
        assert error < tolerance, f"{what}: off by {error:.2e} (logits up to {np.abs(wanted).max():.1f})"

    prompt = tokens(longest)
    wanted = expected_logits(model, prompt)
    state = session.new_state()
    compare(session.step([Work(state, prompt, "all")])[0], wanted, "prefill")

    state = session.new_state()
    cut = longest - 6
    session.step([Work(state, prompt[:cut], "none")])
    for i in range(cut, longest):
        compare(session.step([Work(state, prompt[i : i + 1], "last")])[0], wanted[i], f"decode at {i}")

    lengths = [1, longest // 3, longest - 4]
    batch = [tokens(n) for n in lengths]
    states = [session.new_state() for _ in batch]
    results = session.step([Work(s, b, "all") for s, b in zip(states, batch, strict=True)])
    for result, part in zip(results, batch, strict=True):
        compare(result, expected_logits(model, part), f"ragged prefill of {len(part)}")
    more = [tokens(n) for n in (3, 1, 1)]
    results = session.step([Work(s, m, "last") for s, m in zip(states, more, strict=True)])
    for result, part, new in zip(results, batch, more, strict=True):
        compare(result, expected_logits(model, part + new)[-1], f"ragged decode after {len(part)}")


# ----------------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    quantization: str = "F32",
    *,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
) -> None:
    """Write a tiny model as GGUF.

    Matrices are quantized where `quantization` is not F32, and the transformers model then gets the values they stand
    for, so that both compute the same function.

    Args:
        checkpoint: what `tiny` made.
        path: the file to write.
        quantization: a type that the gguf package can quantize to.
        extra: more metadata; keys are completed with the architecture where they begin with a dot.
        tensors: more tensors, such as rotary factors.
    """
    import gguf
    import torch

    model, config = checkpoint.model, checkpoint.config
    architecture = {"mistral": "llama"}.get(checkpoint.family, checkpoint.family)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_metadata(config), **(extra or {})}.items():
        _add(writer, architecture + key if key.startswith(".") else key, value)
    kind = gguf.GGMLQuantizationType[quantization]
    state = model.state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        module = name.rpartition(".")[0]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
        if architecture == "llama" and heads:
            values = _permute(values, heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1.0)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name, f"the gguf package has no name for {name}"
        if values.ndim == 2 and quantization != "F32":
            raw = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            back = np.asarray(gguf.quants.dequantize(raw, kind), np.float32)
            writer.add_tensor(gguf_name, raw, raw_shape=raw.shape if raw.dtype == np.uint8 else None, raw_dtype=kind)
            if architecture == "llama" and heads:
                back = _unpermute(back, heads)
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(np.array(back)))
        else:
            writer.add_tensor(gguf_name, np.ascontiguousarray(values))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config: Any) -> dict[str, Any]:
    """Metadata of any of the families, as llama.cpp's converter writes it."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata = {
        "general.name": "Tiny",
        ".block_count": config.num_hidden_layers,
        ".context_length": config.max_position_embeddings,
        ".embedding_length": config.hidden_size,
        ".feed_forward_length": config.intermediate_size,
        ".attention.head_count": config.num_attention_heads,
        ".attention.head_count_kv": config.num_key_value_heads,
        ".attention.key_length": dim,
        ".attention.value_length": dim,
        ".attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    metadata[".rope.freq_base"] = float(rope["rope_theta"])
    metadata[".rope.dimension_count"] = int(dim * rope.get("partial_rotary_factor", 1.0))
    if rope["rope_type"] in ("linear", "yarn"):
        metadata[".rope.scaling.type"] = rope["rope_type"]
        metadata[".rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        metadata[".rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    if getattr(config, "sliding_window", None):
        metadata[".attention.sliding_window"] = int(config.sliding_window)
    if config.model_type == "gemma2":
        metadata[".attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        metadata[".final_logit_softcapping"] = float(config.final_logit_softcapping)
        metadata[".attention.scale"] = float(config.query_pre_attn_scalar) ** -0.5
    return metadata


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _permute(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def _unpermute(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    return (
        values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )
