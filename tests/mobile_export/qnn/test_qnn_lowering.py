"""Float graphs of layers are the reference, and models are cut where nothing but the hidden state is handed on.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from qnn_models import CPU, draw, float_logits, options

from transom.errors import DoesNotFit, OptionError, UnsupportedError
from transom.graph.sparse import with_sparsity
from transom.preparation.reference_outputs import reference_logits
from transom.sparsity import Sparsity
from transom.testing.models import VARIANTS, tiny_decoder
from transom_mobile_export.qnn.backend import Qnn
from transom_mobile_export.qnn.claims import HtpDecoder, read_decoder
from transom_mobile_export.qnn.compiling import plan_notes, require_capped
from transom_mobile_export.qnn.parts import matrix_bytes, plan_parts
from transom_mobile_export.qnn.precision import QnnPrecision, resolve

FLOAT16 = QnnPrecision("float16", "float16")


@pytest.mark.parametrize("form", sorted({*VARIANTS} - {"attention_bias", "everything"}))
def test_float_graphs_are_the_reference(rng: np.random.Generator, form: str) -> None:
    graph = tiny_decoder(rng, layers=3, **VARIANTS[form])
    ids = draw(rng, graph, 20)
    np.testing.assert_allclose(float_logits(graph, ids), reference_logits(graph, ids), atol=2e-4, rtol=2e-4)


def test_a_model_is_cut_into_parts_that_fit(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, layers=5)
    for precision in (resolve({"precision": "int8"}, 73), resolve({"precision": "int4"}, 73), FLOAT16):
        layers = read_decoder(graph, precision).layers
        assert [(layer.first, layer.end) for layer in layers] == [(i, i + 1) for i in range(5)]
        assert len({layer.bytes for layer in layers[:-1]}) == 1
        assert layers[-1].bytes > layers[0].bytes  # the vocabulary matrix is with the last one
        (whole,) = plan_parts(layers)
        assert (whole.first, whole.end, whole.last, whole.bytes) == (0, 5, True, sum(p.bytes for p in layers))
        parts = plan_parts(layers, largest=layers[0].bytes * 2 + 1)
        assert [(part.first, part.end) for part in parts][:2] == [(0, 2), (2, 4)]
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        assert sum(part.bytes for part in parts) == whole.bytes
        assert f"{len(parts)} parts" in plan_notes(parts)[0]
        assert plan_notes((whole,)) == []
        with pytest.raises(DoesNotFit, match="layer 0 "):
            plan_parts(layers, largest=layers[0].bytes - 1)


def test_bytes_of_a_matrix_are_those_of_its_codes_and_scales(rng: np.random.Generator) -> None:
    (weight,) = {d.weight for layer in read_decoder(tiny_decoder(rng, layers=1), FLOAT16).layers for own in layer.layers
                 for d in own if d.weight is not None and d.weight.shape == (64, 96)}  # fmt: skip
    assert matrix_bytes(weight, "int8") == 64 * 96 + 64 * 16
    assert matrix_bytes(weight, "int4") == 64 * 96 // 2 + 64 * 3 * 2 + 64 * 16
    assert matrix_bytes(weight, "float16") == 64 * 96 * 2


def test_no_weight_is_read_for_a_plan(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    model = read_decoder(graph, FLOAT16)
    for layer in model.layers:
        for own in layer.layers:
            for draft in own:
                if draft.weight is not None:
                    object.__setattr__(draft.weight, "load", lambda: pytest.fail("a weight was read"))
    assert plan_parts(model.layers)


def test_what_cannot_be_written_is_refused_with_its_reason(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, attention_bias=True)
    refused = [claim for claim in Qnn().claim(graph, CPU, options(rng, graph, "int8")) if not claim.ok]
    assert refused
    assert all(claim.reason for claim in refused)
    for precision in ("fp8", "bf16", "exact", "nonsense"):
        with pytest.raises(OptionError, match="int8"):
            Qnn().claim(graph, CPU, options(rng, graph, precision))


def test_rows_that_no_block_divides_are_refused_before_anything_is_observed(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng, inner=80)
    with pytest.raises(OptionError, match="a matrix has 80") as refused:
        Qnn().compile(graph, CPU, options(rng, graph, "int4"), lambda stage, share: pytest.fail(stage))
    assert "int8" in refused.value.fix


def test_a_soft_cap_that_would_come_out_wrong_without_a_word_is_refused(rng: np.random.Generator) -> None:
    def model(policy: Sparsity, **form: Any) -> HtpDecoder:
        graph = with_sparsity(tiny_decoder(rng, layers=1, softcap=8.0, **form), policy)
        return read_decoder(graph, QnnPrecision("int8", "uint8"))

    static, off = Sparsity(columns=0, top_k=3, max_density=0.6), Sparsity.parse("off")
    for policy, heads, chunk in ((static, 16, 128), (off, 1, 16)):
        with pytest.raises(UnsupportedError, match="Layer 0 has soft-capped scores of 16 rows") as refused:
            require_capped(model(policy, q_heads=heads, kv_heads=1), chunk)
        assert "f16" in refused.value.fix
    require_capped(model(static, q_heads=32, kv_heads=1), 128)
    for heads, chunk in ((16, 128), (32, 8), (2, 8)):
        require_capped(model(off, q_heads=heads, kv_heads=1), chunk)


def test_rounding_is_no_exact_claim(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    assert all(c.exact for c in Qnn().claim(graph, CPU, options(rng, graph, "f16")))
    assert not all(c.exact for c in Qnn().claim(graph, CPU, options(rng, graph, "auto")))
