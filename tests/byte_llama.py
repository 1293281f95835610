"""A tiny llama with random weights and a vocabulary of single bytes, as a GGUF file that loads at once.

For tests that need a whole model on disk, with tokenizer and chat template, and none of what makes one for them
(`checkpoints.py` does that with transformers). Random weights say anything: a special token, which is no text, or the
end of text at once. A test that looks at the text of an answer has to allow for an empty one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""The tokens after the 256 bytes. The first begins a text, the second ends it."""
CONTEXT = 512
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2


def write_gguf(
    path: Path,
    rng: np.random.Generator,
    *,
    context: int = CONTEXT,
    template: str | None = TEMPLATE,
    quantization: str = "F32",
    not_a_number: bool = False,
) -> Path:
    """Write the model; norms are F32.

    Args:
        quantization: a type of blocks of 32 for all matrices, such as Q8_0; or F32.
        not_a_number: one weight is NaN.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    tokens = [_spelled(byte) for byte in range(256)] + [*SPECIAL, "qz"]
    kind = GGMLQuantizationType[quantization]
    w = GGUFWriter(path, "llama")
    w.add_name("Tiny")
    w.add_context_length(context)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(INNER)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([1] * 256 + [3] * len(SPECIAL) + [1])
    w.add_token_merges(["q z"])
    w.add_bos_token_id(256)
    w.add_eos_token_id(257)
    if template is not None:
        w.add_chat_template(template)

    def matrix(name: str, rows: int, columns: int, spread: float) -> None:
        data = (rng.standard_normal((rows, columns)) * spread).astype(np.float32)
        if not_a_number and name == "blk.0.ffn_up":
            data[3, 5] = np.nan
        w.add_tensor(f"{name}.weight", quants.quantize(data, kind), raw_dtype=kind)

    def linear(name: str, rows: int, columns: int) -> None:
        matrix(name, rows, columns, 1.5 * columns**-0.5)  # large enough that every part shows in the logits

    def norm(name: str) -> None:
        w.add_tensor(f"{name}.weight", (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32))

    matrix("token_embd", len(tokens), HIDDEN, 0.3)  # small beside what the layers add: the last token is not said again
    norm("output_norm")
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        linear(f"blk.{i}.attn_q", HIDDEN, HIDDEN)
        linear(f"blk.{i}.attn_k", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        linear(f"blk.{i}.attn_v", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        linear(f"blk.{i}.attn_output", HIDDEN, HIDDEN)
        linear(f"blk.{i}.ffn_gate", INNER, HIDDEN)
        linear(f"blk.{i}.ffn_up", INNER, HIDDEN)
        linear(f"blk.{i}.ffn_down", HIDDEN, INNER)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _spelled(byte: int) -> str:
    """GPT-2's spelling of a byte as a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))
