"""Times the stages from the start of a fresh process to the first token, for `transom bench --startup`.

`interpreter + imports`: until everything that `transom run` needs is imported. `probe`, `read`, `compile`, `load`: the
stages of the report; `compile` is the child process, 0 on a warm start. `warm-up`: the extra time of the first request
over a second one. `first token`: that second request, from the call to its first token.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transom.errors import EngineError, option_names

STAGES = ("interpreter + imports", "probe", "read", "compile", "load", "warm-up", "first token")
PROMPT = "The capital of France is"


def measure(model: str, options: Mapping[str, Any], *, runs: int, empty_cache: bool, tell: Any) -> dict[str, Any]:
    """Medians of the stages over `runs` fresh processes.

    Args:
        options: keyword arguments of `transom.load`, in JSON types.
        empty_cache: compile again in each run, in a temporary cache.

    Raises:
        TransomError: the model cannot be loaded with these options.
    """
    results = []
    if not empty_cache:
        tell("Filling the cache", None)
        _once(model, options, None)
    for number in range(runs):
        tell(f"Start {number + 1} of {runs}", number / runs)
        if empty_cache:
            with tempfile.TemporaryDirectory(prefix="transom-startup-") as folder:
                results.append(_once(model, options, folder))
        else:
            results.append(_once(model, options, None))
    stages = {stage: statistics.median(r["stages"][stage] for r in results) for stage in STAGES}
    totals = [sum(r["stages"].values()) for r in results]
    return {
        "cache": "empty" if empty_cache else "warm",
        "runs": runs,
        "bytecode": not sys.dont_write_bytecode,
        "median_seconds": stages,
        "total_seconds": {"median": statistics.median(totals), "least": min(totals), "most": max(totals)},
        "report": results[-1]["report"],
        "all": [r["stages"] for r in results],
    }


def _once(model: str, options: Mapping[str, Any], cache: str | None) -> dict[str, Any]:
    request = json.dumps(
        {"model": str(Path(model).absolute()), "options": dict(options), "option_names": option_names()}
    )
    environment = os.environ | ({"TRANSOM_CACHE": cache} if cache else {})
    path = os.pathsep.join(entry for entry in sys.path if entry)
    start = "from transom.cli.startup import child; child()"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", start, repr(began), request],
        capture_output=True,
        env=environment | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
    )
    last = (done.stdout.decode("utf-8", "replace").strip().splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise EngineError(
            "The process whose start was measured failed", "Run it by itself: transom run MODEL", said[-4:]
        )
    answer: dict[str, Any] = json.loads(last)
    if "error" in answer:
        raise EngineError(answer["error"], answer["fix"], answer["details"])
    return answer


def child() -> None:
    """The measured process: does what `transom run` does, and prints the seconds as one line of JSON."""
    import transom
    from transom.cli import app, run  # noqa: F401  what `transom run` imports
    from transom.errors import TransomError, name_options

    began, request = float(sys.argv[1]), json.loads(sys.argv[2])
    name_options(request["option_names"])
    load = transom.load
    imported = time.monotonic()
    try:
        model = load(request["model"], **request["options"])
        loaded = time.monotonic()
        if model.tokenizer is None:
            prompt: Any = [1, 2, 3, 4, 5]
        else:
            prompt = PROMPT
        waits = []
        for _ in range(2):
            before = time.monotonic()
            with model.stream(prompt, temperature=0.0, max_new_tokens=1, ignore_eos=True) as stream:
                for _piece in stream:
                    break
            waits.append(time.monotonic() - before)
    except TransomError as e:
        print(json.dumps({"error": e.cause, "fix": e.fix, "details": list(e.details)}))
        return
    startup = model.report.startup
    compiled = sum(seconds for stage, seconds in startup.items() if stage.startswith("child "))
    probe, read = startup.get("probe", 0.0), startup.get("read", 0.0)
    rest = loaded - imported - probe - read - compiled
    second = min(waits)
    seconds = (imported - began, probe, read, compiled, rest, waits[0] - second, second)
    print(json.dumps({"stages": dict(zip(STAGES, seconds, strict=True)), "report": model.report.to_dict()}))
    sys.stdout.flush()
    model.close()
