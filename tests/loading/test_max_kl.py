"""The option `max_kl` of a load: passed to the backend, part of what is cached, and held against the self-check.

Draws: none of its own; the noise is a hundredth of a logit, which is far below the usual limits and above 1e-7 nats.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from made_up import MadeUp

from transom.errors import OptionError, SelfCheckFailed


class Noisy(MadeUp):
    """Rounds a little, and notes the bounds with which it compiles."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.bounds: list[Any] = []

    def _spoil(self, inputs: Any, outputs: Any) -> None:
        logits = outputs["logits"]
        outputs["logits"] = logits + np.float32(1e-2) * np.sin(np.arange(logits.size, dtype="f4")).reshape(logits.shape)

    def compile(self, part: Any, device: Any, options: Any, progress: Any) -> Any:
        self.bounds.append(options["max_kl"])
        return super().compile(part, device, options, progress)


@pytest.fixture
def noisy(here: Any) -> Noisy:
    backend = Noisy("noisy")
    here.use(backend)
    return backend


def test_the_backend_gets_the_bound_and_each_bound_has_a_compiled_model(here: Any, noisy: Noisy) -> None:
    for bound in (None, 0.01, 0.01, None):
        with here.load(max_kl=bound) as model:
            assert model.report.backend == "noisy"
            assert noisy.loaded_with["max_kl"] == bound
    assert noisy.bounds == [None, 0.01]  # of what was compiled


def test_a_model_above_the_bound_is_not_used(here: Any, noisy: Noisy) -> None:
    with pytest.raises(SelfCheckFailed) as caught:
        here.load(backend="noisy", max_kl=1e-7)
    assert "noisy compiled diverges by" in caught.value.cause
    assert "max_kl=1e-07 allows less" in caught.value.cause
    assert "precision='exact'" in caught.value.fix
    with here.load(max_kl=1e-7) as model:
        assert model.report.backend == "reference"
        assert any("max_kl=1e-07" in warning for warning in model.report.warnings)
    with here.load() as model:
        assert model.report.backend == "noisy"


def test_the_bound_holds_for_a_model_that_is_there_and_is_checked_again(here: Any, noisy: Noisy) -> None:
    here.load(backend="noisy", max_kl=1e-3).close()
    here.load(backend="noisy", max_kl=1e-3, verify="always").close()
    noisy._spoil = lambda inputs, outputs: outputs.update(logits=outputs["logits"] * np.float32(1.05))  # type: ignore[method-assign]
    with pytest.raises(SelfCheckFailed, match="allow"):
        here.load(backend="noisy", max_kl=1e-6, verify="always")


@pytest.mark.parametrize("bound", [0, -1.0, True, math.nan, math.inf, "0.1"])
def test_what_is_not_a_bound_is_refused(here: Any, bound: Any) -> None:
    with pytest.raises(OptionError, match="is not a bound"):
        here.load(max_kl=bound)


def test_a_bound_needs_the_comparison(here: Any) -> None:
    with pytest.raises(OptionError, match="needs the comparison that verify='off' leaves out"):
        here.load(max_kl=0.1, verify="off")
