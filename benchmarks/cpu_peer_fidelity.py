"""What sparse prefill costs in perplexity, in Transom and openvino-genai, each against its own dense attention.

    python benchmarks/cpu_peer_fidelity.py                       # in the environment of `make bench`
    python benchmarks/cpu_peer_fidelity.py --tokens 8192 --peer-sparsity trishape xattention=0.9 xattention=0.95

openvino-genai returns no logits of a prompt, only the log-probability of each of its tokens (`echo`). So the comparison
uses the perplexity of a text: that of the engine's own dense attention divided by that of its sparse one, over the
positions beyond the first 1024, on the texts of `cpu_fidelity.py`. Its logarithm estimates the divergence, in nats a
token. The last column is the same over only the answers of the tasks of `tasks.py`: facts that are hidden in the text.
Both engines run with default settings, in one process, one after the other; nothing is timed.
"""

from __future__ import annotations

import argparse
import gc
import math
from functools import partial
from typing import Any

import numpy as np
from cpu_engines import genai_scheduler
from cpu_fidelity import log_softmax
from models import sample_model, texts
from parts.results import Row, add_out, finish, result
from tables_parts.fidelity import peers
from tasks import tasks

Array = np.ndarray[Any, np.dtype[Any]]

FAR = 1024
ANSWERS = "hidden facts"


def transom_log_probabilities(model: Any, ids: list[int], sparsity: str) -> Array:
    """Log-probability of each token but the first, given those before it; float64 [tokens - 1]."""
    logits = model.logits(ids, sparsity=sparsity)
    found = np.empty(len(ids) - 1)
    for start in range(0, len(found), 256):
        rows = log_softmax(logits[start : min(start + 256, len(found))])
        found[start : start + len(rows)] = rows[np.arange(len(rows)), ids[start + 1 : start + 1 + len(rows)]]
    return found


class GenaiTexts:
    """openvino-genai, reading texts with one setting; "" is dense."""

    def __init__(self, model: str, sparsity: str) -> None:
        import openvino_genai

        self._genai = openvino_genai
        config = genai_scheduler(openvino_genai, sparsity)
        self._pipe = openvino_genai.ContinuousBatchingPipeline(model, config, "CPU", {})
        self._number = 0

    def log_probabilities(self, ids: list[int]) -> Array:
        import openvino

        config = self._genai.GenerationConfig(max_new_tokens=1, ignore_eos=True, apply_chat_template=False)
        config.echo, config.logprobs = True, 1
        self._number += 1
        handle = self._pipe.add_request(self._number, openvino.Tensor(np.array([ids], np.int64)), config)
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
        (output,) = handle.read_all()
        found = np.asarray(output.generated_log_probs, np.float64)
        if list(output.generated_ids[: len(ids)]) != list(ids):
            raise RuntimeError("openvino-genai did not return the prompt")
        return found[1 : len(ids)]


def main() -> None:
    import transom

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sparsity", nargs="+", default=["balanced", "fast"])
    parser.add_argument("--peer-sparsity", nargs="+", default=["trishape", "xattention=0.9"])
    parser.add_argument("--no-tasks", action="store_true", help="leave the hidden facts out: they are many prompts")
    add_out(parser)
    options = parser.parse_args()
    path = options.model or sample_model()
    rows: list[Row] = []

    def note(setting: str, domain: str, gained: list[Array]) -> None:
        nats = -float(np.mean([g[at].mean() for g, at in zip(gained, places[domain], strict=True)]))
        rows.append({"tokens": options.tokens, "setting": setting, "domain": domain, "retention": math.exp(-nats)})
        print(f"{setting}, {domain}: retention {math.exp(-nats):.4f}, {nats:.4f} nats a token", flush=True)

    passages: dict[str, list[list[int]]] = {}
    places: dict[str, list[Any]] = {}  # positions whose log-probabilities count
    with transom.load(path, device="cpu", context=options.tokens) as model:
        assert model.tokenizer is not None
        beginning, tokenize = model.tokenizer.beginning, partial(model.tokenize, add_special=False)
        for domain, text in texts():
            ids = tokenize(text)
            passage = [*beginning, *ids[len(ids) // 3 :]][: options.tokens]
            passages[domain], places[domain] = [passage], [slice(FAR, None)]
        if not options.no_tasks:
            hidden = list(tasks(tokenize, next(texts())[1], options.tokens, 0, beginning))
            passages[ANSWERS] = [task.ids for task in hidden]
            places[ANSWERS] = [[place - 1 for place in task.places] for task in hidden]
        for domain, several in passages.items():
            dense = [transom_log_probabilities(model, ids, "off") for ids in several]
            for sparsity in options.sparsity:
                sparse = [transom_log_probabilities(model, ids, sparsity) for ids in several]
                note(f"transom {sparsity}", domain, [s - d for s, d in zip(sparse, dense, strict=True)])
                gc.collect()
    genai = GenaiTexts(path, "")
    references = {domain: [genai.log_probabilities(ids) for ids in several] for domain, several in passages.items()}
    del genai
    for sparsity in options.peer_sparsity:
        genai = GenaiTexts(path, sparsity)
        for domain, several in passages.items():
            found = [genai.log_probabilities(ids) for ids in several]
            gained = [f - r for f, r in zip(found, references[domain], strict=True)]
            note(f"openvino-genai {sparsity}", domain, gained)
        del genai
        gc.collect()
    made = result({"retention": rows}, "openvino", "openvino-genai")
    finish(made, options.out, peers([made]))


if __name__ == "__main__":
    main()
