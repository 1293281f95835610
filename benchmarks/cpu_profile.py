"""Where the native kernels' time goes, by kind of work, and how close they come to the peaks of this machine.

    python benchmarks/cpu_profile.py                                   # in the environment of `make bench`
    python benchmarks/cpu_profile.py --tokens 1024 4096 --sparsity off balanced
    python benchmarks/models.py long model-16k.gguf --tokens 17408 && \\
    python benchmarks/cpu_profile.py --model model-16k.gguf --tokens 16384 --sparsity off balanced fast

The library's clocks count thread seconds. Prefill is one prompt, decoding the 32 tokens after it. Shares are of the
peaks that `cpu_peaks.cpp` reaches here, compiled by the system's compiler: 8-bit integer products, products of bfloat16
pairs (both in AMX tiles where there are any), and memory reads; "-" if the machine or the compiler lacks one. Products
and attention are compared with the peak of the arithmetic that they use. Operations of attention count only the keys
that were read, its time includes choosing them (columns and routing), and "of dense" is dense time x density / sparse
time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from models import sample_model, texts
from parts.results import Row, add_out, finish, result
from tables_parts.profiles import CHOOSING, whole

NEW = 32


def peaks(threads: int) -> list[Row]:
    """`per_second`, operations or bytes, of each `kind`; empty if nothing compiles."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import hatch_build

    source = Path(__file__).with_name("cpu_peaks.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peaks"
        for compiler in hatch_build.candidates():
            command = [*compiler.command, "-O2", "-std=c++17", "-pthread", str(source), "-o", str(program)]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                done = subprocess.run([str(program), str(threads)], capture_output=True, text=True, check=True)
                return [{"kind": kind, "per_second": rate} for kind, rate in json.loads(done.stdout).items()]
    return []


class StepProfile:
    """A model's steps, timed by its library."""

    def __init__(self, path: str, sparsity: str, tokens: int) -> None:
        import transom

        self.model = transom.load(path, device="cpu", sparsity=sparsity, context=tokens + NEW + 1)
        self.sparsity = self.model._loaded.sparsity.to_string()
        assert self.model._loaded.decoder is not None
        self.layers = self.model._loaded.decoder.layers

    def run(self, ids: list[int]) -> tuple[dict[str, float], dict[str, float], Any, Any]:
        """Thread seconds of prefill and decoding, and the keys that each read, [layers, kv_heads]."""
        from transom.contract import Work

        with self.model._engine.exclusive() as session:
            native = session._native  # type: ignore[attr-defined]
            warm = session.new_state()
            session.step([Work(warm, ids[:1024], "last")])
            warm.free()
            state = session.new_state()
            native.times()
            for at in range(0, len(ids), 1024):
                session.step([Work(state, ids[at : at + 1024], "last", sparsity=self.sparsity)])
            prefill = native.times()
            read = np.asarray(session.keys_read(state))[0]  # type: ignore[attr-defined]
            for token in ids[:NEW]:
                session.step([Work(state, [token], "last", sparsity=self.sparsity)])
            decode = native.times()
            later = np.asarray(session.keys_read(state))[0] - read  # type: ignore[attr-defined]
            state.free()
        return prefill, decode, read, later

    def product_operations(self) -> float:
        """Multiplications and additions of one token with all matrices but the vocabulary's."""
        program = self.model._engine._session._native.program  # type: ignore[attr-defined]
        used = {o.matrix for o in program.ops if o.kind == "linear" and o.dst.buffer != program.output}
        return float(sum(2 * program.matrices[m].rows * program.matrices[m].columns for m in used))

    def attention_operations(self, read: Any) -> float:
        return float(sum(
            2 * (x.head_dim + x.value_dim) * x.q_heads / x.kv_heads * read[i, : x.kv_heads].sum()
            for i, x in enumerate(self.layers)
        ))  # fmt: skip

    @property
    def products(self) -> str:
        """The number format of most products' activations."""
        program = self.model._engine._session._native.program  # type: ignore[attr-defined]
        formats = Counter(o.by for o in program.ops if o.kind == "linear")
        return str(formats.most_common(1)[0][0])

    @property
    def cache(self) -> str:
        """The number format of keys and values."""
        return str(self.model._engine._session._native.program.cache)  # type: ignore[attr-defined]

    def decode_bytes(self, later: Any) -> float:
        """Bytes that one token reads: weights, keys and values."""
        program = self.model._engine._session._native.program  # type: ignore[attr-defined]
        number = {"f32": 4, "bf16": 2, "int8": 1}[self.cache]
        cache = sum(
            (x.head_dim + x.value_dim) * number * later[i, : x.kv_heads].sum() / NEW for i, x in enumerate(self.layers)
        )
        return float(program.weight_bytes + cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--sparsity", nargs="+", default=["off", "balanced"])
    add_out(parser)
    options = parser.parse_args()
    path = options.model or sample_model()
    threads = len(os.sched_getaffinity(0))
    work: list[Row] = []
    rates: list[Row] = []
    for tokens in options.tokens:
        for sparsity in options.sparsity:
            profile = StepProfile(path, sparsity, tokens)
            ids = profile.model.tokenize(dict(texts())["documentation"], add_special=False)[:tokens]
            prefill, decode, read, later = profile.run(ids)
            setting = {"tokens": tokens, "sparsity": sparsity}
            work += [
                {**setting, "kind": kind, "prefill": prefill[kind], "decode": decode[kind] / NEW} for kind in prefill
            ]
            attending = sum(prefill[kind] for kind in ("attention", *CHOOSING))
            rates.append({
                **setting,
                "products": profile.product_operations() * tokens / prefill["matrix products"] * threads,
                "attention": profile.attention_operations(read) / attending * threads,
                "product_arithmetic": profile.products,
                "arithmetic": profile.cache,
                "reading": profile.decode_bytes(later) / (sum(decode.values()) / NEW / threads),
            })  # fmt: skip
            profile.model.close()
    found = result({"peaks": peaks(threads), "work": work, "rates": rates}, "openvino")
    finish(found, options.out, whole([found]))


if __name__ == "__main__":
    main()
