"""`deterministic=True`: which backends it takes, and what a request gives there beside others.

Draws: what is compared must be equal, whatever the numbers are; and made-up roundings that differ by a thousandth of a
logit differ in its bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_up import CPU, NPU, MadeUp

import transom
from transom.contract import Offer
from transom.errors import OptionError, SelectionError

PROMPTS = ["a", "Hello, hello, hello", "abc" * 40]


class Rounding(MadeUp):
    """Logits that depend on the number of tokens in a step, as they do where the order of additions does."""

    def __init__(self, name: str, promises: bool, **options: Any) -> None:
        super().__init__(name, **options)
        self.promises, self.shared = promises, 0

    def probe(self, devices: Any) -> Any:
        return [replace(a, deterministic=self.promises) if isinstance(a, Offer) else a for a in super().probe(devices)]

    def _spoil(self, inputs: Any, outputs: Any) -> None:
        self.shared += len(np.unique(inputs["sequences"])) > 1
        size = len(inputs["input_ids"])
        outputs["logits"] = outputs["logits"] + np.float32(1e-3) * np.float32(np.sin(size))


def answers(model: Any, prompts: list[str]) -> list[Any]:
    """Tokens and log-probabilities of generations that take turns, each with a seed of its own."""
    options = {"max_new_tokens": 9, "temperature": 1.0, "ignore_eos": True, "logprobs": 1}
    streams = [model.stream(prompt, seed=len(prompt), **options) for prompt in prompts]
    running = [iter(stream) for stream in streams]
    while running:
        running = [one for one in running if next(one, None) is not None]
    return [
        (stream.result.token_ids, [token.logprob for token in stream.result.choices[0].logprobs]) for stream in streams
    ]


def test_each_request_gives_what_it_gives_alone(here: Any) -> None:
    rounding = Rounding("rounding", promises=True)
    here.use(rounding)
    with here.load(deterministic=True) as model:
        assert model.report.determinism == "the same bits whatever else runs; each sequence has steps of its own"
        rounding.shared = 0
        alone = [answers(model, [prompt])[0] for prompt in PROMPTS]
        assert answers(model, PROMPTS) == alone
        assert rounding.shared == 0
    with here.load() as model:
        asked = "what else runs may change the rounding; deterministic=True prevents it"
        assert model.report.determinism == asked
        assert answers(model, PROMPTS) != alone
        assert rounding.shared > 0
    assert here.jobs == ["prepare"], "both loads share one compiled model"


def test_a_backend_that_promises_nothing_is_refused_with_the_reason(here: Any) -> None:
    here.use(Rounding("a_rounding", promises=False, band="tuned"), MadeUp("silent", kind="npu"), devices=(CPU, NPU))
    with here.load(deterministic=True) as model:
        assert model.report.backend == "reference"
        reasons = {(name, refusal.device_id): refusal.reason for name, refusal in model.report.refusals}
    for place in (("a_rounding", "cpu"), ("silent", "npu:0")):
        assert reasons[place] == "does not promise the same bits each time (made up)"
    with here.load(device="cpu") as model:
        assert model.report.backend == "a_rounding"
        assert model.report.determinism == "the backend does not promise the same bits each time"
    with pytest.raises(SelectionError) as caught:
        here.load(deterministic=True, backend="a_rounding")
    assert caught.value.cause == 'The backend "a_rounding" cannot run on any device of this machine'
    assert caught.value.fix == "Leave out deterministic=True"
    assert "does not promise the same bits each time" in caught.value.details[0]


def test_a_bundle_keeps_the_rule(here: Any, export: Any) -> None:
    rounding = Rounding("rounding", promises=True)
    here.use(rounding)
    folder = export(format="rounding").folder
    with here.load(folder, deterministic=True) as model:
        assert model.report.determinism.startswith("the same bits whatever else runs")
    rounding.promises = False
    with here.load(folder) as model:
        assert model.report.determinism == "the backend does not promise the same bits each time"
    with pytest.raises(SelectionError, match="deterministic=True"):
        here.load(folder, deterministic=True)


def test_explain_says_which_backends_promise_nothing(here: Any) -> None:
    here.use(Rounding("rounding", promises=False))
    found = transom.explain(here.model)
    assert {a["backend"]: a["offer"]["deterministic"] for a in found.to_dict()["answers"]} == {
        "rounding": False,
        "reference": True,
    }
    (line,) = [line for line in str(found).splitlines() if "deterministic=True" in line]
    assert line == "  not for deterministic=True: it does not promise the same bits each time"


@pytest.mark.parametrize("value", [1, "yes", None])
def test_another_value_is_refused(here: Any, value: Any) -> None:
    with pytest.raises(OptionError, match="is not True or False"):
        here.load(deterministic=value)
