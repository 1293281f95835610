"""Every family keeps within the divergence that its int8 products declare, or the host's limit if they declare none.

Draws: in 200 models of all families the largest divergence was 0.004 nats and the smallest correlation 0.995, a tenth
or less of what is allowed here.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from checkpoints import FAMILIES, tiny, write_gguf

from transom import hardware
from transom.graph import Graph
from transom.preparation import agreement, selfcheck
from transom.preparation.compiled import APPROXIMATE, Allowed
from transom.preparation.reference_outputs import check_prompt, reference_logits
from transom.sources import resolve
from transom.testing.bench import Bench
from transom_openvino_cpu.backend import OpenVinoCpu
from transom_openvino_cpu.precision import DIVERGENCES

ANY = Allowed(kl=math.inf, correlation=-1.0)
"""What is measured is not judged by the self-check."""
SMALLEST_CORRELATION = 0.95
FAST = {"precision": "fast"}


def graph_of(family: str, stored: str, folder: Path, rng: np.random.Generator) -> Graph:
    made, path = tiny(family, folder / "model", rng), folder / "model"
    if stored != "plain":
        path = folder / "model.gguf"
        write_gguf(made, path, stored)
    return resolve(path).open(path).graph


@pytest.mark.sweep(but=("gemma2-Q4_1-natively", "mistral-plain-by OpenVINO"))
@pytest.mark.parametrize("engine", ["natively", "by OpenVINO"])
@pytest.mark.parametrize("stored", ["plain", "Q4_1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_within_the_divergence_that_is_declared(
    family: str, stored: str, engine: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "by OpenVINO":
        monkeypatch.setenv("TRANSOM_NATIVE", "0")
    cpu = next(device for device in hardware.probe_devices() if device.kind == "cpu")
    graph = graph_of(family, stored, tmp_path, rng)
    assert graph.decoder is not None
    ids = check_prompt(graph.decoder, None)
    wanted = reference_logits(graph, ids)
    with Bench(OpenVinoCpu(), cpu, seed=0, options=FAST) as bench:
        lowered = bench.lower(graph)
        with bench.session(bench.compile(lowered.graph)) as session:
            got = selfcheck.decoder_logits(session, wanted, ids, allowed=ANY, backend="openvino_cpu")
    assert not lowered.exact
    assert lowered.divergence == DIVERGENCES.get(graph.decoder.family)
    allowed = APPROXIMATE.kl if lowered.divergence is None else lowered.divergence
    for found in agreement.agreements(wanted, got):
        assert found.kl_mean < allowed / 4, found
        assert found.correlation_min > SMALLEST_CORRELATION, found


def test_a_directory_and_a_gguf_file_of_one_model_declare_the_same(tmp_path: Path, rng: np.random.Generator) -> None:
    cpu = next(device for device in hardware.probe_devices() if device.kind == "cpu")
    for family in FAMILIES:
        declared = set()
        for stored in ("plain", "Q4_1"):
            graph = graph_of(family, stored, tmp_path / family / stored, rng)
            with Bench(OpenVinoCpu(), cpu, seed=0, options=FAST) as bench:
                declared.add(bench.lower(graph).divergence)
        assert len(declared) == 1, family
