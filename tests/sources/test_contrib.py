"""Each `com.microsoft` operator in standard operators gives what onnxruntime's own kernel gives.

Draws: float32 sums in another order differ by about 1e-6 of their size; the tolerances are ten times that or more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from onnx_models import Writer, runtime, save, value

from transom.errors import UnsupportedError
from transom.graph.reading import weight_of
from transom.graph.weights import Blocked
from transom.reference.executor import Executor
from transom.sources.onnx import OnnxSource

MS = "com.microsoft"
INT = TensorProto.INT64


def norm(w: Writer) -> None:
    scale, bias = w.random(16, scale=1.0), w.random(16, scale=1.0)
    a = w.op("SimplifiedLayerNormalization", "x", scale, axis=-1, epsilon=1e-3)
    names = ["n1", "", "", "s1"]
    w.op("SkipSimplifiedLayerNormalization", a, "x", scale, bias, domain=MS, outputs=names, epsilon=1e-3)
    names = ["n2", "", "", "s2"]
    w.op("SkipLayerNormalization", "n1", "s1", scale, bias, bias, domain=MS, outputs=names, epsilon=1e-3)
    w.op("Add", "n2", "s2", outputs=["y"])


def activations(w: Writer) -> None:
    a = w.op("FastGelu", "x", w.random(16, scale=1.0), domain=MS)
    b = w.op("BiasGelu", a, w.random(16, scale=1.0), domain=MS)
    w.op("QuickGelu", w.op("Gelu", b, domain=MS), domain=MS, alpha=1.3, outputs=["y"])


def fused(w: Writer) -> None:
    a = w.op("FusedMatMul", "x", w.random(8, 16), domain=MS, transB=1, alpha=0.3)
    w.op("FusedMatMul", a, "x", domain=MS, transA=1, outputs=["y"])


def nbits(bits: int, zeros: str, block: int = 32, columns: int = 16, bias: bool = False) -> Callable[[Writer], None]:
    def build(w: Writer) -> None:
        rows, blocks = 12, -(-columns // block)
        packed = w.constant(w.rng.integers(0, 256, (rows, blocks, block * bits // 8)).astype(np.uint8))
        scales = w.constant((w.rng.random((rows, blocks)) * 0.1).astype(np.float32))
        inputs = ["x", packed, scales]
        if zeros == "packed":
            inputs.append(w.constant(w.rng.integers(0, 256, (rows, -(-blocks * bits // 8))).astype(np.uint8)))
        elif zeros == "float":
            inputs.append(w.constant((w.rng.random((rows, blocks)) * 8).astype(np.float32)))
        if bias:
            inputs += [""] * (5 - len(inputs)) + [w.random(rows)]
        w.op("MatMulNBits", *inputs, domain=MS, K=columns, N=rows, bits=bits, block_size=block, outputs=["y"])

    return build


def gather(w: Writer) -> None:
    ids = w.op("Cast", w.op("Clip", w.op("Abs", "x"), "", w.constant(np.float32(5))), to=INT)
    packed = w.constant(w.rng.integers(0, 256, (6, 16)).astype(np.uint8))
    scales = w.constant((w.rng.random((6, 2)) * 0.1).astype(np.float32))
    w.op("GatherBlockQuantized", packed, ids, scales, domain=MS, block_size=16, bits=4, outputs=["y"])


def rotary(heads: int, rotated: int, interleaved: int) -> Callable[[Writer], None]:
    def build(w: Writer) -> None:
        positions = w.constant(np.asarray([[4, 0, 2], [1, 1, 3]]))
        half = (rotated or 16 // heads) // 2
        tables = [w.random(6, half, scale=1.0) for _ in range(2)]
        extra = {"rotary_embedding_dim": rotated} if rotated else {}
        if rotated or heads == 2:
            extra["num_heads"] = heads
        w.op("RotaryEmbedding", "x", positions, *tables, domain=MS, interleaved=interleaved, outputs=["y"], **extra)

    return build


def multi_head(causal: int, bias: bool) -> Callable[[Writer], None]:
    def build(w: Writer) -> None:
        qkv = [w.op("MatMul", "x", w.random(16, 16)) for _ in range(3)]
        inputs = [*qkv, w.random(48) if bias else ""]
        if bias:
            inputs += ["", w.random(1, 4, 3, 3, scale=1.0)]
        while inputs[-1] == "":
            inputs.pop()
        w.op("MultiHeadAttention", *inputs, domain=MS, num_heads=4, unidirectional=causal, outputs=["y"])

    return build


CASES: dict[str, Callable[[Writer], None]] = {
    "normalization": norm,
    "activations": activations,
    "fused matmul": fused,
    "4 bits, symmetric": nbits(4, "none", 16),
    "4 bits, zero points": nbits(4, "packed", 16, 64),
    "4 bits, odd number of blocks": nbits(4, "packed", 16, 48),
    "4 bits, part of a block": nbits(4, "none", 32, 48),
    "4 bits, float zero points": nbits(4, "float", 16, 32),
    "8 bits": nbits(8, "packed", 32, 64, bias=True),
    "8 bits, symmetric": nbits(8, "none", 16),
    "gather of blocks": gather,
    "rotary": rotary(2, 0, 0),
    "rotary, part, interleaved": rotary(2, 4, 1),
    "multi-head": multi_head(0, True),
    "multi-head, causal": multi_head(1, False),
}


@pytest.mark.parametrize("name", CASES)
def test_an_expansion_computes_what_onnxruntime_computes(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    w = Writer(rng)
    CASES[name](w)
    columns = next((a.i for n in w.nodes for a in n.attribute if a.name == "K"), 16)
    model = w.model([value("x", shape=[2, 3, columns])], [value("y")], opset=21)
    x = rng.standard_normal((2, 3, columns)).astype(np.float32)
    (wanted,) = runtime(model).run(None, {"x": x})
    graph = OnnxSource().open(save(model, tmp_path / "model.onnx")).graph
    graph.check()
    assert all(n.domain == "" for n in graph.nodes())
    got = Executor(graph).run({"x": x})["y"]
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() < 1e-5 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize(("name", "dtype"), [("4 bits, symmetric", "int4"), ("8 bits", "uint8")])
def test_packed_weights_stay_packed(name: str, dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    w = Writer(rng)
    CASES[name](w)
    columns = next(a.i for n in w.nodes for a in n.attribute if a.name == "K")
    model = w.model([value("x", shape=[2, 3, columns])], [value("y")], opset=21)
    graph = OnnxSource().open(save(model, tmp_path / "model.onnx")).graph
    transpose = next(n for n in graph.nodes() if n.op_type == "Transpose")
    weight = weight_of(transpose.inputs[0])
    assert isinstance(weight, Blocked)
    assert weight.dtype == dtype


@pytest.mark.parametrize("what", ["permuted", "three bits"])
def test_a_form_without_an_expansion_is_refused_with_the_node(
    what: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    w = Writer(rng)
    nbits(4, "none", 16)(w)
    node = w.nodes[0]
    if what == "permuted":
        node.input.extend(["", w.constant(np.zeros(16, np.int32))])
    else:
        next(a for a in node.attribute if a.name == "bits").i = 3
    model = w.model([value("x", shape=[2, 3, 16])], [value("y")], opset=21)
    with pytest.raises(UnsupportedError, match=r"MatMulNBits_\d+ \(com.microsoft::MatMulNBits\)"):
        OnnxSource().open(save(model, tmp_path / "model.onnx"))
