"""A made-up model file and a made-up backend for tests of the command line: quick, and it says a text of our own.

The file is a GGUF of the llama family with random weights and a vocabulary of single bytes. The backend `toy` ignores
the weights: after any prompt it says `TOY_TEXT`, one byte for each step, slowed down by `TOY_DELAY` seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TEXT = "Hellö 🙂, world!"

TOY = """
import json, os, tempfile, time
import numpy as np
from transom.contract import Artifact, Claim, Limits, Offer, Refusal, Verdict, hookimpl

TEXT = os.environ.get("TOY_TEXT", "Hell\\u00f6 \\U0001f642, world!").encode() + bytes([0])
END = 257

class State:
    def __init__(self):
        self.tokens, self.begun = 0, None
    @property
    def length(self):
        return self.tokens
    @property
    def nbytes(self):
        return self.tokens
    def fork(self, length):
        other = State()
        other.tokens, other.begun = length, self.begun
        return other
    def truncate(self, length):
        self.tokens = length
    def free(self):
        pass

class Session:
    def __init__(self, decoder):
        self.limits = Limits(8, 64, context=decoder["context"], page_tokens=0)
        self.vocabulary = decoder["vocabulary"]
    def pages(self):
        return (0, 0)
    def new_state(self):
        return State()
    def step(self, work):
        time.sleep(float(os.environ.get("TOY_DELAY", "0")))
        if os.environ.get("TOY_FAIL") == "step":
            raise RuntimeError("the toy broke")
        out = []
        for w in work:
            w.state.tokens += len(w.tokens)
            if w.logits == "none":
                out.append(None)
                continue
            if w.state.begun is None:
                w.state.begun = w.state.tokens
            place = w.state.tokens - w.state.begun
            row = np.zeros(self.vocabulary, np.float32)
            if "TOY_ENDLESS" in os.environ:
                place %= len(TEXT) - 1
            byte = TEXT[min(place, len(TEXT) - 1)]
            row[END if byte == 0 and END < self.vocabulary else byte % self.vocabulary] = 30.0
            out.append(row if w.logits == "last" else np.tile(row, (len(w.tokens), 1)))
        return out
    def run(self, inputs):
        raise NotImplementedError
    def close(self):
        pass

class Toy:
    name = "toy"
    api = (1, 0)
    def probe(self, devices):
        return [
            Offer(d.id, "tuned", "made up") if d.kind == "cpu"
            else Refusal(d.id, "missing_dep", "the toy needs a toy driver", "pip install toy-driver")
            for d in devices
        ]
    def claim(self, graph, device, options):
        return [
            Claim(str(n.name), n.op_type != os.environ.get("TOY_REFUSES"), f"the toy has no {n.op_type}")
            for n in graph.nodes()
        ]
    def compile(self, part, device, options, progress):
        if os.environ.get("TOY_FAIL") == "compile":
            os.abort()
        if os.environ.get("TOY_FAIL") == "full" and tempfile.gettempdir().startswith(os.environ["TRANSOM_CACHE"]):
            raise OSError(28, "No space left on device")
        if "TOY_SLOW_COMPILE" in os.environ:
            open("compiling", "w").close()
            end = time.monotonic() + float(os.environ["TOY_SLOW_COMPILE"])
            while time.monotonic() < end:
                progress("compile", None)
                time.sleep(0.05)
        return Artifact({"toy.json": part.decoder.to_json().encode()}, {"toy": "1"}, ("precision: wood",))
    def check(self, artifact, device):
        return Verdict("ok")
    def load(self, artifact, device, options, scratch):
        return Session(json.loads(artifact.files["toy.json"].read_text()))

@hookimpl
def transom_backends():
    return [Toy()]
"""


def install_backend(folder: Path, source: str = TOY, name: str = "toy") -> None:
    """The backend as pip would leave it; `folder` goes on PYTHONPATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"transom_{name}.py").write_text(source, encoding="utf-8")
    info = folder / f"transom_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transom-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[transom.backends]\n{name} = transom_{name}\n")


def write_gguf(path: Path, rng: np.random.Generator, *, context: int = 4096, template: str | None = TEMPLATE) -> Path:
    """A llama with two layers; most matrices Q8_0, norms F32."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    hidden, inner, heads, kv_heads, layers = 64, 96, 4, 2, 2
    tokens = [_spelled(byte) for byte in range(256)] + [*SPECIAL, "qz"]
    w = GGUFWriter(path, "llama")
    w.add_name("Toy")
    w.add_context_length(context)
    w.add_embedding_length(hidden)
    w.add_block_count(layers)
    w.add_feed_forward_length(inner)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
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

    def matrix(name: str, rows: int, columns: int) -> None:
        data = (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0
        w.add_tensor(name, quants.quantize(data, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        w.add_tensor(name, (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32))

    matrix("token_embd.weight", len(tokens), hidden)
    norm("output_norm.weight")
    for i in range(layers):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", hidden, hidden)
        matrix(f"blk.{i}.attn_k.weight", hidden * kv_heads // heads, hidden)
        matrix(f"blk.{i}.attn_v.weight", hidden * kv_heads // heads, hidden)
        matrix(f"blk.{i}.attn_output.weight", hidden, hidden)
        matrix(f"blk.{i}.ffn_gate.weight", inner, hidden)
        matrix(f"blk.{i}.ffn_up.weight", inner, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, inner)
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


def last_json(text: str) -> object:
    return json.loads(text.strip().splitlines()[-1])
