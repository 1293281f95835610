"""Errors while an engine is built, and the builder's information about an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from transom.errors import EngineError
from transom.programs.onnx_writing import FLOAT, INT64, OnnxWriter
from transom_tensorrt import building, inspecting
from transom_tensorrt.building import BuildSpec, build
from transom_tensorrt.network import Network, ShapeProfile
from transom_tensorrt.sdk import installed

PROFILE = ShapeProfile((1, 1, 2), (1, 1, 1), (1, 1, 2))
NETWORK = Network("float16", 16, 8, (), PROFILE, PROFILE)
F16 = ir.DataType.FLOAT16


def saved(w: OnnxWriter, folder: Path) -> Path:
    ir.save(w.model(), folder / "model.onnx")
    return folder / "model.onnx"


def test_an_input_that_the_parser_does_not_use_is_an_error(tmp_path: Path) -> None:
    """ONNX's lengths of a cache are such a one: TensorRT ignores them with a warning (tensorrt-rtx 1.7)."""
    w = OnnxWriter("lengths")
    q, k, v = (w.input(n, F16, ("batch", 2, 16, 64)) for n in "qkv")
    lengths = w.input("lengths", INT64, ("batch",))
    out = w("Attention", q, k, v, None, None, None, lengths, is_causal=0)
    w.output(out, "y", ("batch", 2, 16, 64))
    inputs = dict.fromkeys("qkv", ("batch", 2, 16, 64)) | {"lengths": ("batch",)}
    with pytest.raises(EngineError, match="does not understand what an input is for: Unused Input: lengths"):
        build(saved(w, tmp_path), tmp_path / "plan", BuildSpec(NETWORK, inputs, 89), installed()[0], lambda s, x: None)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize("case", ["circular", "past and present", "zero point", "uint4"])
def test_known_failures_of_tensorrt_still_fail(case: str, tmp_path: Path) -> None:
    """Forms that are written otherwise because TensorRT refuses them. Should one of these be taken one day, the way
    round it can go."""
    w = OnnxWriter("refused")
    if case == "circular":
        past = w.input("past", F16, (1, 2, 16, 64))
        new = w.input("new", F16, (1, 2, 1, 64))
        at = w.input("at", INT64, (1,))
        w.output(w("TensorScatter", past, new, at, axis=-2, mode="circular"), "y", (1, 2, 16, 64))
        inputs = {"past": (1, 2, 16, 64), "new": (1, 2, 1, 64), "at": (1,)}
    elif case == "past and present":
        q, k, v = (w.input(n, F16, (1, 2, 4, 64)) for n in "qkv")
        past = [w.input(n, F16, (1, 2, 8, 64)) for n in ("pk", "pv")]
        outputs = w.several("Attention", q, k, v, None, *past, dtypes=(F16, F16, F16), is_causal=1)
        for value, (name, length) in zip(outputs, (("y", 4), ("nk", 12), ("nv", 12)), strict=True):
            w.output(value, name, (1, 2, length, 64))
        inputs = dict.fromkeys("qkv", (1, 2, 4, 64)) | dict.fromkeys(("pk", "pv"), (1, 2, 8, 64))
    else:
        dtype = ir.DataType.UINT4 if case == "uint4" else ir.DataType.INT4
        x = w.input("x", F16, (1, 64))
        codes = np.ones((64, 64), np.int8).astype(dtype.numpy())
        quants = w.weight("w", dtype, (64, 64), lambda: codes)
        scales = w.constant(np.ones((2, 64), np.float16))
        zeros = w.weight("z", dtype, (2, 64), lambda: np.ones((2, 64), np.int8).astype(dtype.numpy()))
        given = (quants, scales, zeros) if case == "zero point" else (quants, scales)
        w.output(w("MatMul", x, w("DequantizeLinear", *given, dtype=F16, axis=0, block_size=32)), "y", (1, 64))
        inputs = {"x": (1, 64)}
    with pytest.raises(EngineError, match="it cannot read the network"):
        build(saved(w, tmp_path), tmp_path / "plan", BuildSpec(NETWORK, inputs, 89), installed()[0], lambda s, x: None)


def test_the_error_of_a_failed_builder_quotes_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = building.library("tensorrt-rtx")

    def broken(logger: Any) -> None:
        logger.log(trt.ILogger.ERROR, "no driver to speak of")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Builder", broken)
    with pytest.raises(EngineError, match="it cannot be started") as caught:
        build(tmp_path / "model.onnx", tmp_path / "plan", BuildSpec(NETWORK, {}, 89), installed()[0], lambda s, x: None)
    assert caught.value.details == ("no driver to speak of",)


def test_the_error_of_a_crashed_build_process_quotes_its_last_output(tmp_path: Path) -> None:
    """TensorRT aborts the process in some places: when a plug-in is made from Python, for one. The host compiles in a
    child process of its own."""
    (tmp_path / "dying_builder.py").write_text(
        "import faulthandler, os, tensorrt_rtx as trt\n"
        "from transom_tensorrt.building import _BuildLog, _logger\n"
        "def build(payload, progress):\n"
        "    faulthandler.disable()\n"
        "    logger = _logger(trt, _BuildLog())\n"
        "    trt.Builder(logger)\n"
        "    logger.log(trt.ILogger.ERROR, 'what it said last')\n"
        "    os.abort()\n"
    )
    code = (
        "from transom.preparation.child import run_in_child\n"
        "try: run_in_child('dying_builder:build', {}).unwrap('Building')\n"
        "except Exception as e: print(e)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "Building failed in its child process: killed by SIGABRT" in done.stdout
    assert "TensorRT: what it said last" in done.stdout


# --------------------------------------------------------------------------------------------------------- what it says

SAID = [
    "Total Activation Memory: 8278528 bytes",
    "Total Activation Memory: 1024 bytes",
    "Total Weights Memory: 13768192 bytes",
    """Layers:
Name: __mye1_0_myl1_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Name: product_myl1_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,64], Strides: [64,1], StrideOrder: [1,0], Datatype: FP8, Format: (Linear) Row major linear format }, { Name: w_constantFP8_myl1, Dimensions: [64,32], Strides: [32,1], StrideOrder: [1,0], Datatype: FP8, Format: (Linear) Row major linear format }], Constants: [ { Name: alpha_myl1, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [ { Name: y, Dimensions: [-1,32], Strides: [32,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], TacticName: , StreamId: 0, Metadata: 
Name: __myl_MoveTran_myl1_2, LayerType: kgen, Inputs: [ { Name: present_key.0, Dimensions: [1,2,64,64], Strides: [8192,4096,64,1], StrideOrder: [3,2,1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: turned_myl1, Dimensions: [2,64,64], Strides: [4096,64,1], StrideOrder: [2,1,0], Datatype: Half, Format: (Linear) Row major linear format }], TacticName: t, StreamId: 0, Metadata: 
Name: _gemv_mha_v1_myl3_0, LayerType: kgen, Inputs: [ { Name: present_key.0 [profile 1], Dimensions: [-1,2,64,64], Strides: [8192,4096,64,1], StrideOrder: [3,2,1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: out_myl3, Dimensions: [-1,2,1,64], Strides: [128,64,64,1], StrideOrder: [3,2,1,0], Datatype: Half, Format: (Linear) Row major linear format }], TacticName: t, StreamId: 0, Metadata: 

I/O Tensors:
 Name: x, IOMode: Input, DataType: Half, Dimensions: [-1,64], Location: Device""",  # noqa: E501, W291
]


def test_layers_are_read() -> None:
    layers = inspecting.parse(["something else", *SAID])
    assert [(x.kind, x.profile) for x in layers] == [("shape_call", 0), ("gemm", 0), ("kgen", 0), ("kgen", 1)]
    product = layers[1]
    assert product.product
    assert [t.name for t in product.inputs] == ["x", "w_constantFP8_myl1", "alpha_myl1"]
    assert product.matrix is not None
    assert product.matrix.nbytes == 64 * 32
    assert layers[2].moves
    assert layers[3].attention
    assert inspecting.from_json(inspecting.to_json(layers)) == layers
    assert inspecting.memory(SAID) == {"activations": 8278528, "weights": 13768192}


def test_a_summary_counts_the_layers() -> None:
    layers = inspecting.parse(SAID)
    prefill = inspecting.summary(layers, 0, ["present_key.0"])
    assert prefill.products == {"fp8 x fp8": 1}
    assert (prefill.launches, prefill.moves, prefill.cache_copies) == (2, 1, 1)
    assert prefill.weight_bytes == {"fp8": 2048}
    assert str(prefill) == "2 launches: 1 products fp8 x fp8, 1 moves, 1 copies of a cache"
    decode = inspecting.summary(layers, 1, ["present_key.0"])
    assert decode.attention == {"float16": 1}
    assert decode.cache_copies == 0


@pytest.mark.parametrize("text", ["", "Layers:", "Layers:\nno layer", "Layers:\nName: x, LayerType: gemm, Inputs: ["])
def test_text_without_layers_gives_no_inputs(text: str) -> None:
    assert all(not x.inputs for x in inspecting.parse([text]))


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"name": 1}]'])
def test_damaged_layers_are_an_error(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        inspecting.from_json(text)


def test_a_constant_is_told_from_an_activation() -> None:
    assert inspecting.Tensor("mye1_dconst_myl0", (4, 4), "Int4").constant
    assert inspecting.Tensor("mye1_dconst_myl0", (4, 4), "Int4").nbytes == 8
    assert not inspecting.Tensor("x", (-1, 4), "Half").constant
    assert FLOAT == ir.DataType.FLOAT
