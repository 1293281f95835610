"""The process in which `transom bench` measures one backend, isolated in memory and in crashes.

Requests are JSON lines on standard input, answers are JSON lines on the original standard output. The first request
loads the model. The end of input ends the process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transom.generation.model import Model


def main() -> None:
    """Answer requests until the end of input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    model: Model | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                model, answer = _load(request)
            else:
                assert model is not None
                answer = _measure(model, request)
        except Exception as e:  # noqa: BLE001  the parent shows it in the table and goes on with the others
            answer = {"error": getattr(e, "cause", None) or f"{type(e).__name__}: {e}"}
        _send(answers, answer)


def _send(answers: IO[str], answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _load(request: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
    """Load once to fill the cache, then again with a timer."""
    import transom

    options = request["options"]
    first = transom.load(request["model"], **options)
    compiled = {k.removeprefix("child "): s for k, s in first.report.startup.items() if k.startswith("child ")}
    first.close()
    started = time.perf_counter()
    model = transom.load(request["model"], **options)
    seconds = time.perf_counter() - started
    if model.decoder is None:
        model.close()
        raise ValueError("the model is not a decoder, so there is no prefill and no decoding to time")
    report = model.report.to_dict()
    return model, {"report": report, "load_seconds": seconds, "compile_seconds": compiled, "memory": memory()}


def _measure(model: Model, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run one random prompt with an answer of fixed length; cancelled after `patience` seconds."""
    import numpy as np

    assert model.decoder is not None
    rng = np.random.default_rng(request["seed"])  # new tokens each time, so that no prefix is cached
    prompt = rng.integers(0, model.decoder.vocabulary, request["prompt_tokens"]).tolist()
    cancel = threading.Event()
    clock = threading.Timer(request["patience"], cancel.set)
    clock.daemon = True
    clock.start()
    try:
        new = request["new_tokens"]
        result = model.generate(prompt, temperature=0.0, max_new_tokens=new, ignore_eos=True, cancel=cancel)
    finally:
        clock.cancel()
    timings = result.timings
    return {
        "prefill": timings.prefill_tokens_per_second,
        "decode": timings.decode_tokens_per_second,
        "first": timings.time_to_first_token,
        "given_up": result.finish_reason == "cancelled",
        "memory": memory(),
    }


def memory() -> dict[str, int]:
    """Bytes of this process: `resident` now, and at its `peak`; empty if the system does not report them."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        named = {"resident": "VmRSS", "peak": "VmHWM", "anonymous": "RssAnon"}
        return {name: int(fields[key].split()[0]) * 1024 for name, key in named.items() if key in fields}
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak": peak if sys.platform == "darwin" else peak * 1024}


if __name__ == "__main__":
    main()
