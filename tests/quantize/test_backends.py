"""Backends either compute a quantized graph correctly or refuse it with a reason.

Draws: float32 agrees to 1e-5, a hundred times its rounding. What int8 costs a random decoder has no formula: one of
eight draws must be within 0.1 (`redraws.one_within`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from redraws import one_within

from transom import hardware
from transom.contract import Device, Work
from transom.graph import Blocked, BlockedArrays, GraphBuilder
from transom.graph.passes import infer_types
from transom.graph.weights import dense, dequantize
from transom.quantize.calibration import calibrate
from transom.quantize.passes import Scheme, quantize
from transom.quantize.rounding import to_float8
from transom.testing.bench import Bench, ReferenceOracle
from transom.testing.compare import normalized_error
from transom.testing.models import tiny_decoder
from transom.testing.result import Refused
from transom_cuda_triton import CudaTriton
from transom_openvino_cpu import OpenVinoCpu

SCHEMES = {
    "int4": Scheme("int4"),
    "int8": Scheme("int8"),
    "int8 blocks": Scheme("int8", block=16),
    "fp8": Scheme("fp8"),
}
EXACT: Mapping[str, object] = {"precision": "exact"}
H100 = Device("cuda", "cuda:0", "sm_90", 80 << 30, name="H100", features=frozenset({"fp8"}))


def cpu() -> Device:
    return next(d for d in hardware.probe_devices() if d.kind == "cpu")


@pytest.fixture(params=["native", "openvino"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "openvino":
        monkeypatch.setenv("TRANSOM_NATIVE", "0")
    return str(request.param)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", SCHEMES)
def test_the_cpu_computes_rounded_weights_as_they_are(name: str, rng: np.random.Generator) -> None:
    graph = quantize(tiny_decoder(rng, linear_bias=True), SCHEMES[name]).graph
    tokens = rng.integers(0, 61, 9).tolist()
    with Bench(OpenVinoCpu(), cpu(), seed=0, options=EXACT) as bench:
        lowered = bench.lower(graph)
        assert lowered.exact
        with bench.session(bench.compile(lowered.graph)) as session:
            state = session.new_state()
            (many,) = session.step([Work(state, tokens[:-1], "all")])
            (one,) = session.step([Work(state, tokens[-1:])])
            got = np.concatenate([np.asarray(many), np.asarray(one).reshape(1, -1)])
    assert normalized_error(got, ReferenceOracle(graph).logits(tokens)) < 1e-5


@pytest.mark.usefixtures("engine")
def test_the_cpu_rounds_8_bit_floats_again_where_int8_is_asked_for_and_says_so(rng: np.random.Generator) -> None:
    def measure(draw: int) -> float:
        graph = quantize(tiny_decoder(rng), Scheme("fp8")).graph
        tokens = rng.integers(0, 61, 9).tolist()
        with Bench(OpenVinoCpu(), cpu(), seed=0, options={"precision": "int8"}) as bench:
            lowered = bench.lower(graph)
            assert not lowered.exact
            with bench.session(bench.compile(lowered.graph)) as session:
                (got,) = session.step([Work(session.new_state(), tokens, "all")])
                error = normalized_error(np.asarray(got), ReferenceOracle(graph).logits(tokens))
        assert error > 1e-5
        return error

    one_within(measure, lambda error: error < 0.1)


def test_openvino_gathers_rows_of_a_table_of_8_bit_floats(rng: np.random.Generator) -> None:
    weight = to_float8(dense(rng.standard_normal((20, 48)).astype(np.float32)), "float16")
    b = GraphBuilder("table")
    b.output(b.op("Gather", b.weight(weight, "w"), b.input("x", "int64", ["n"]), axis=0), "y", ["n", 48])
    graph = infer_types(b.finish(weights_hash="w"))
    ids = rng.integers(0, 20, 7)
    with Bench(OpenVinoCpu(), cpu(), seed=0, options=EXACT) as bench:
        lowered = bench.lower(graph)
        with bench.session(bench.compile(lowered.graph)) as session:
            got = np.asarray(session.run({"x": ids})["y"])
    np.testing.assert_allclose(got, dequantize(weight, ids), rtol=1e-6)


@pytest.mark.usefixtures("engine")
def test_the_cpu_refuses_activations_that_it_would_round_otherwise(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    found = quantize(graph, Scheme("int8", activations="fp8"), calibrate(graph, [[1, 2, 3]])).graph
    refused = [c for c in OpenVinoCpu().claim(found, cpu(), EXACT) if not c.ok]
    assert {c.node for c in refused} == {str(n.name) for n in found.nodes() if n.op_type == "QuantizeLinear"}
    assert all("rounds to FLOAT8E4M3FN differently from ONNX" in c.reason for c in refused)
    with Bench(OpenVinoCpu(), cpu(), seed=0, options=EXACT) as bench, pytest.raises(Refused, match="QuantizeLinear"):
        bench.lower(found)


def test_cuda_takes_rounded_blocks_and_refuses_what_its_kernels_lack(rng: np.random.Generator) -> None:
    graph = tiny_decoder(rng)
    seen = calibrate(graph, [[1, 2, 3]])
    for scheme, reason in (
        (Scheme("int4"), ""),
        (Scheme("int8", block=32), ""),
        (Scheme("int8"), "blocks of 96 columns"),
        (Scheme("fp8"), "a matrix of float8e4m3fn"),
        (Scheme("int4", activations="fp8"), "rounded to 8 bits"),
    ):
        claims = CudaTriton().claim(quantize(graph, scheme, seen).graph, H100, {"precision": "auto"})
        refused = [c.reason for c in claims if not c.ok]
        assert bool(refused) == bool(reason), scheme
        assert all(reason in words for words in refused), scheme


def test_blocks_of_floats_are_never_taken_for_blocks_of_integers(rng: np.random.Generator) -> None:
    """Both weight packers name the type, for all block sizes."""
    from transom_cuda_triton.packing import packable
    from transom_openvino_cpu.native.packing import packable as packable_on_cpu

    parts = BlockedArrays(
        to_float8(dense(rng.standard_normal((4, 64)).astype(np.float32))).load().quants, np.ones((4, 2), np.float32)
    )
    weight = Blocked((4, 64), 32, "float8e4m3fn", "float32", lambda: parts)
    assert packable(weight) == packable_on_cpu(weight) == "a matrix of float8e4m3fn"
