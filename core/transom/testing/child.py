"""Checks that need a fresh process: what a probe imports, and whether an artifact opens in another process.

The backend is passed as a pickle, so its class must be importable by name. `python -m transom.testing.child` is the
child process. All files are in the kit's temporary folder.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transom.testing.bench import Bench

TIMEOUT_S = 300


def in_child(bench: Bench, task: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run `task` ("probe" or "load") for the bench's backend in a fresh process and return what it found.

    Raises:
        Failed: the backend cannot be pickled, the child process failed (with its signal or last line of output), or
            it took too long.
    """
    from transom.testing.result import Failed

    request_file, answer_file = bench.folder / f"{task}.request", bench.folder / f"{task}.answer"
    answer_file.unlink(missing_ok=True)
    try:
        backend = pickle.dumps(bench.backend)
    except (pickle.PicklingError, AttributeError, TypeError) as e:
        raise Failed(f"the backend cannot be passed to another process: {e}. Make its class importable") from e
    request_file.write_bytes(pickle.dumps({"task": task, "backend": backend, "answer": answer_file, **request}))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "transom.testing.child", str(request_file)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as e:
        raise Failed(f"the process that should {task} did not end within {TIMEOUT_S} s") from e
    if done.returncode or not answer_file.exists():
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"the process that should {task} ended with {how}: {last}")
    answer: dict[str, Any] = pickle.loads(answer_file.read_bytes())
    return answer


def _probe(backend: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        backend.probe(request["devices"])
        times.append(time.perf_counter() - started)
    return {"milliseconds": min(times) * 1e3, "modules": sorted({name.partition(".")[0] for name in sys.modules})}


def _load(backend: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    from transom.contract import Work

    verdict = backend.check(request["artifact"], request["device"])
    session = backend.load(request["artifact"], request["device"], request["options"], request["scratch"])
    state = session.new_state()
    logits = [np.array(session.step([Work(state, chunk, "all")])[0], np.float32) for chunk in request["chunks"]]
    session.close()
    return {"logits": np.concatenate(logits), "verdict": verdict.state}


def main() -> None:
    request = pickle.loads(Path(sys.argv[1]).read_bytes())
    backend = pickle.loads(request["backend"])
    answer = {"probe": _probe, "load": _load}[request["task"]](backend, request)
    request["answer"].write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
