"""The sample model, SmolLM2-135M: its rounded graphs agree with the reference on text.

In onnxruntime, which computes what the HTP computes: a token of this model takes the emulator seconds, and compiling it
most of a minute. `benchmarks/phone.py` does both.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from models import sample_model

from transom.preparation.agreement import compare
from transom.preparation.calibration_texts import pieces
from transom.preparation.reference_outputs import reference_logits
from transom.sources import resolve
from transom_mobile_export.qnn.claims import read_decoder
from transom_mobile_export.qnn.encoding import QuantizedMatrices, add_quantization
from transom_mobile_export.qnn.lowering import lower
from transom_mobile_export.qnn.observing import RunningPart, embedded, observe, prefill
from transom_mobile_export.qnn.parts import plan_parts
from transom_mobile_export.qnn.precision import QnnPrecision

TOKENS = 32


@pytest.mark.sweep  # a real model
def test_its_rounded_graphs_agree_with_the_reference(tmp_path: Path) -> None:
    """8-bit weights on a text that no activation was seen on; some activations are a thousand times as large as the
    rest, and an encoding of 16 bits for the hidden state would double the divergence."""
    path = sample_model()
    source = resolve(path).open(path)
    assert source.tokenizer is not None
    assert source.graph.decoder is not None
    texts = pieces(source.tokenizer, source.graph.decoder.vocabulary, 128, ())[:3]
    held = list(texts[2][:TOKENS])
    precision = QnnPrecision("int8", "uint8")
    model = read_decoder(source.graph, precision)
    seen = observe(model, [text[:64] for text in texts[:2]], lambda share: None)
    assert seen.widest > 1000
    (part,) = plan_parts(model.layers)
    matrices = QuantizedMatrices(precision, seen.squares, tmp_path)
    lowered = lower(model.reader, part, tokens="tokens", cached="cached", context=TOKENS, matrices=matrices)
    add_quantization(lowered, seen, ir.DataType.UINT8)
    with RunningPart(lowered) as running:
        inputs = prefill(model.reader.decoder, part, embedded(model.embed, held), np.arange(TOKENS), np.uint8)
        found = compare(reference_logits(source.graph, held), running(inputs)["logits"][0])
    assert found.kl_mean < 0.04, found
    assert found.correlation_min > 0.93, found
    assert found.top1 > 0.85, found
