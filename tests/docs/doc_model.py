"""A tiny random model as a GGUF file, so that the documentation's examples run as they stand: `model.gguf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")


def write_model(path: Path, rng: np.random.Generator) -> None:
    """A llama of two layers in float32 whose tokens are single bytes."""
    import gguf

    hidden, inner, heads, kv_heads, layers = 64, 96, 4, 2, 2
    tokens = [_spelled(byte) for byte in range(256)] + [*SPECIAL, "qz"]
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("Tiny")
    w.add_context_length(512)
    w.add_embedding_length(hidden)
    w.add_block_count(layers)
    w.add_feed_forward_length(inner)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([1] * 256 + [3] * len(SPECIAL) + [1])
    w.add_token_merges(["q z"])
    w.add_bos_token_id(256)
    w.add_eos_token_id(257)
    w.add_chat_template(TEMPLATE)

    def matrix(name: str, rows: int, columns: int) -> None:
        w.add_tensor(f"{name}.weight", (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32))

    def norm(name: str) -> None:
        w.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))

    matrix("token_embd", len(tokens), hidden)
    norm("output_norm")
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            norm(f"blk.{i}.{name}")
        narrow = hidden * kv_heads // heads
        for name, rows, columns in (
            ("attn_q", hidden, hidden), ("attn_k", narrow, hidden), ("attn_v", narrow, hidden),
            ("attn_output", hidden, hidden), ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):  # fmt: skip
            matrix(f"blk.{i}.{name}", rows, columns)
    write: Any = (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close)
    for step in write:
        step()


def _spelled(byte: int) -> str:
    """GPT-2's spelling of a byte as a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))
