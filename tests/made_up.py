"""Made-up backends that run a model with NumPy and fail at one point, which `does` selects.

Used in two ways: as objects in the test's own process, and as the module of a made-up distribution, whose backends the
variable MADE_UP lists as JSON.

| does | what happens |
|---|---|
| `garbage`, `nan` | the logits are random, or not numbers |
| `layer` | the second layer attends with a wrong scale |
| `decode` | the second layer's cache loses the prompt's values, which only decoding shows |
| `compile:HOW`, `load:HOW`, `step:HOW` | at that point: `segv`, `ill`, `abort`, `exit`, `hang`, `raise`, `slow` |
| `silent`, `mute`, `odd` | claim leaves a node out, refuses without a reason, answers with a string |
| `refuse:OPERATOR` | claim refuses it |
| `inexact`, `inexact:NATS` | claims are approximate, with this divergence |
| `check:STATE` | the verdict on every artifact; `check:raise` raises |
| `bound`, `bound:threads` | the artifact is bound to its context, to its threads |

The variable MADE_UP_LATER, such as `load:11`, raises a signal at a point: `check`, `load`, `new_state`, `step` or
`close`.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

from transom.contract import Artifact, Claim, Device, Limits, Offer, Refusal, Verdict, hookimpl

CPU = Device("cpu", "cpu", "x86_64", 1 << 34, identity="made-up CPU", name="CPU", drivers={"kernel": "6"}, cores=2)
NPU = Device("npu", "npu:0", "npu_3720", 1 << 34, identity="made-up NPU", name="NPU", drivers={"npu": "1.0"})

SIGNALS = {"segv": signal.SIGSEGV, "ill": signal.SIGILL, "abort": signal.SIGABRT}


def _later(here):
    where, _, number = os.environ.get("MADE_UP_LATER", "").partition(":")
    if where == here:
        signal.raise_signal(int(number))  # in this thread, as native code does


class MadeUp:
    api = (1, 0)

    def __init__(self, name="made_up", does="", kind="cpu", band="native", delay=0.0, why="made up", chunk=0):
        self.name, self.does, self.kind, self.band = name, does, kind, band
        self.delay, self.why, self.chunk = delay, why, chunk
        self.calls = []
        self.loaded_with = {}

    def probe(self, devices):
        return [
            Offer(d.id, self.band, self.why) if d.kind == self.kind else Refusal(d.id, "wrong_device", "not for it")
            for d in devices
        ]

    def claim(self, graph, device, options):
        nodes = list(graph.nodes())
        if self.does == "silent":
            nodes.pop(1)
        if self.does == "odd":
            return [str(n.name) for n in nodes]
        if self.does == "claim:raise":
            raise KeyError("claims")
        operator = self.does.removeprefix("refuse:") if self.does.startswith("refuse:") else ""
        mute = self.does == "mute"
        nats = self.does.removeprefix("inexact").removeprefix(":")
        approximate = {"exact": False} if self.does.startswith("inexact") else {}
        approximate |= {"divergence": float(nats)} if approximate and nats else {}
        return [
            Claim(str(n.name), False, "" if mute else f"there is no {n.op_type} in this engine")
            if n.op_type in operator.split("+") or mute
            else Claim(str(n.name), True, **approximate)
            for n in nodes
        ]

    def compile(self, part, device, options, progress):
        self.calls.append("compile")
        if log := os.environ.get("MADE_UP_LOG"):
            with open(log, "a") as file:
                file.write(f"compile {os.getpid()}\n")
        self._happen("compile", progress)
        folder = Path(tempfile.mkdtemp())
        part.save(folder / "graph.onnx")
        bound = {"context": str(options["context"])} if self.does == "bound" else {}
        bound |= {"threads": str(options["threads"])} if self.does == "bound:threads" else {}
        return Artifact({p.name: p for p in folder.iterdir()}, {"made_up": "1", **bound}, ("precision: wood",))

    def check(self, artifact, device):
        _later("check")
        if self.does.startswith("check:"):
            state = self.does.removeprefix("check:")
            if state == "raise":
                raise RuntimeError("check fails")
            return Verdict(state, f"said {state}")
        return Verdict("ok")

    def load(self, artifact, device, options, scratch):
        from transom.graph import Graph
        from transom.reference.executor import Executor
        from transom.sessions import PackedSession

        self.calls.append("load")
        self.loaded_with = dict(options)
        self._happen("load")
        _later("load")
        graph = Graph.open(artifact.files["graph.onnx"])
        if self.does == "layer":
            import onnx_ir as ir

            wrong = [n for n in graph.nodes() if n.op_type == "CachedAttention"][1]
            wrong.attributes["scale"] = ir.AttrFloat32("scale", 0.05)
        executor = Executor(graph, keep_weights=True)

        def run(inputs):
            time.sleep(self.delay)
            self._happen("step")
            _later("step")
            outputs = dict(executor.run(inputs))
            if "logits" in outputs:
                self._spoil(inputs, outputs)
            return outputs

        decoder = graph.decoder
        context = options["context"] or 0

        class Session(PackedSession):
            def new_state(self):
                _later("new_state")
                return super().new_state()

            def close(self):
                _later("close")
                super().close()

        return Session(run, decoder, Limits(8, self.chunk or 256, context, 0, (4, 1) if self.chunk else ()))

    def _spoil(self, inputs, outputs):
        logits = outputs["logits"]
        if self.does == "garbage":
            outputs["logits"] = np.random.default_rng(0).standard_normal(logits.shape).astype(np.float32)
        if self.does == "nan":
            outputs["logits"] = np.full_like(logits, np.nan)
        if self.does == "decode" and len(inputs["input_ids"]) > 1:
            outputs["present_value.1"] = np.zeros_like(outputs["present_value.1"])

    def _happen(self, where, progress=None):
        place, _, how = self.does.partition(":")
        if place != where:
            return
        if how in SIGNALS:
            os.kill(os.getpid(), SIGNALS[how])
        if how == "exit":
            os._exit(3)
        if how == "raise":
            raise LookupError(f"made up in {where}")
        if how == "hang":
            time.sleep(600)
        if how == "slow":
            end = time.monotonic() + 60
            while time.monotonic() < end:
                if progress is not None:
                    progress("compile", None)
                time.sleep(0.02)


@hookimpl
def transom_backends():
    return [MadeUp(**one) for one in json.loads(os.environ.get("MADE_UP", "[]"))]
