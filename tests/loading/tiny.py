"""A tiny llama with random weights and a vocabulary of single bytes, as a GGUF file that loads at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")
CONTEXT = 512
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 32, 48, 4, 2, 2


def write_gguf(path: Path, rng: np.random.Generator, *, context: int = CONTEXT, not_a_number: bool = False) -> Path:
    """Write the model; matrices and norms are F32.

    Args:
        not_a_number: one weight is NaN.
    """
    from gguf import GGUFWriter

    tokens = [_spelled(byte) for byte in range(256)] + [*SPECIAL, "qz"]
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
    w.add_chat_template(TEMPLATE)

    def matrix(name: str, rows: int, columns: int) -> None:
        data = (rng.standard_normal((rows, columns)) * 1.5 * columns**-0.5).astype(np.float32)
        if not_a_number and name == "blk.0.ffn_up.weight":
            data[3, 5] = np.nan
        w.add_tensor(name, data)

    def norm(name: str) -> None:
        w.add_tensor(name, (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32))

    w.add_tensor("token_embd.weight", rng.standard_normal((len(tokens), HIDDEN)).astype(np.float32))
    norm("output_norm.weight")
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", HIDDEN, HIDDEN)
        matrix(f"blk.{i}.attn_k.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        matrix(f"blk.{i}.attn_v.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        matrix(f"blk.{i}.attn_output.weight", HIDDEN, HIDDEN)
        matrix(f"blk.{i}.ffn_gate.weight", INNER, HIDDEN)
        matrix(f"blk.{i}.ffn_up.weight", INNER, HIDDEN)
        matrix(f"blk.{i}.ffn_down.weight", HIDDEN, INNER)
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
