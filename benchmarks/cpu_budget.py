"""A long prompt under a memory budget: what a load predicts, and what a run then takes.

    python benchmarks/models.py long model-66k.gguf --tokens 67584
    python benchmarks/cpu_budget.py model-66k.gguf               # in the environment of `make bench`

The budget is the memory in a probe file, which Transom plans with. Each budget runs in its own process, which prints
the refusal, or the time and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from parts.results import Row, add_out, finish, result
from parts.telling import tell, told
from tables_parts.budgets import budgets


def run(model: str, tokens: int, sparsity: str, budget: int) -> Row:
    """What happens under a budget in bytes: `refused` has the message, or `seconds` and `resident` are set."""
    from pydoc_data.topics import topics

    import transom
    from transom.hardware.probe_file import to_json

    devices = [
        dataclasses.replace(device, memory_bytes=budget, free_bytes=budget)
        for device in transom.devices()
        if device.kind == "cpu"
    ]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "devices.json"
        probe.write_text(json.dumps(to_json(devices)))
        try:
            loaded = transom.load(model, device="cpu", probe_file=probe, context=tokens + 64)
        except transom.TransomError as error:
            return {"gib": budget / 2**30, "tokens": tokens, "refused": str(error)}
        with loaded:
            text = "\n\n".join(topics[name] for name in sorted(topics))
            ids = loaded.tokenize(text)[:tokens]
            start = time.perf_counter()
            loaded.generate(ids, max_new_tokens=8, ignore_eos=True, sparsity=sparsity)
            seconds = time.perf_counter() - start
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"gib": budget / 2**30, "tokens": len(ids), "refused": "", "seconds": seconds, "resident": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--sparsity", default="fast")
    parser.add_argument("--gib", type=float, nargs="+", default=[1, 8])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    add_out(parser)
    options = parser.parse_args()
    if options.child:
        tell(run(options.model, options.tokens, options.sparsity, int(options.gib[0] * 2**30)))
        return
    rows = []
    for gib in options.gib:
        command = [sys.executable, __file__, options.model, "--tokens", str(options.tokens), "--gib", str(gib)]
        command += ["--sparsity", options.sparsity, "--child"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows.append(told(done.returncode, done.stdout, done.stderr))
    found = result({"budgets": rows}, "openvino")
    refusals = [f"{row['gib']:g} GiB: {row['refused']}" for row in rows if row["refused"]]
    finish(found, options.out, [*budgets([found]), "", *refusals])


if __name__ == "__main__":
    main()
