"""A made-up backend for tests of the command line: quick, and it says a text of our own.

It takes a model whose tokens are single bytes (`byte_llama.py`) and ignores the weights: after any prompt it says
`TOY_TEXT`, one byte for each step, slowed down by `TOY_DELAY` seconds.
"""

from __future__ import annotations

from pathlib import Path

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
        raise RuntimeError("the toy is a decoder")
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
        if os.environ.get("TOY_FAIL") == "full everywhere":
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
