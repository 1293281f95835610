"""The inputs of a decoder graph for ragged steps.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import numpy as np

from transom.sessions.inputs import decoder_inputs, empty_cache
from transom.testing.models import tiny_decoder


def test_inputs_of_a_ragged_step_fit_the_graph(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    assert graph.decoder is not None
    inputs = decoder_inputs([[5, 6], [7]], [1, 2], empty_cache(graph.decoder))
    assert set(inputs) == set(graph.input_names)
    assert {n: inputs[n].tolist() for n in ("input_ids", "positions", "sequences", "past_positions", "logit_rows")} == {
        "input_ids": [5, 6, 7], "positions": [0, 1, 0], "sequences": [0, 0, 1], "past_positions": [],
        "logit_rows": [1, 2],
    }  # fmt: skip
    cache = [np.ones((3, part.shape[1]), np.float32) for part in empty_cache(graph.decoder)]
    later = decoder_inputs([[5, 6], [7]], [2], cache, [1, 2])
    assert later["positions"].tolist() == [1, 2, 2]
    assert later["past_positions"].tolist() == [0, 0, 1]
    assert later["past_sequences"].tolist() == [0, 1, 1]
    assert all(
        array.dtype == np.int64 for name, array in later.items() if not name.startswith("past_key.") and array.ndim == 1
    )
