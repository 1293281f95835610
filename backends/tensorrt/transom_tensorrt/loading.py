"""Load: open an artifact on its device and create its session."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transom.authoring.opening import REMOVE, context_of, paths_of, reading_artifact, threads_of
from transom.contract import Artifact, Device, Options
from transom.errors import EngineError
from transom.signature import Decoder
from transom_tensorrt.network import DECODER_FILE, ENGINE_FILE, MODEL_FILE, NETWORK_FILE, SEQUENCES, Network
from transom_tensorrt.sdk import MODULES, library

if TYPE_CHECKING:
    from transom_tensorrt.executing import NetworkExecutor
    from transom_tensorrt.session import SlotSession

MOST_SLOTS = 4 * SEQUENCES
"""Largest number of sequences with caches; above `SEQUENCES`, decoding takes several runs."""


def load_artifact(artifact: Artifact, device: Device, options: Options, scratch: Path) -> SlotSession:
    """A session over the artifact: on the card, or emulated if the artifact holds a model in place of an engine.

    Raises:
        EngineError: this backend did not write the files, or TensorRT does not open them.
        MissingExtra: a library is not installed.
        DoesNotFit: the card has no memory for the weights, or for the cache of one sequence.
    """
    from transom_tensorrt.engine import SlotEngine
    from transom_tensorrt.session import SlotSession

    files = paths_of(artifact)
    with reading_artifact():
        decoder = Decoder.from_json(files[DECODER_FILE].read_text())
        network = Network.from_json(files[NETWORK_FILE].read_text())
    context = context_of(options, decoder.context, network.context)
    if MODEL_FILE in files:
        executor = _emulated(network, files[MODEL_FILE], device, options)
    else:
        executor = _on_card(network, files, artifact, device, scratch)
    try:
        return SlotSession(SlotEngine(network, executor, executor.allocate(MOST_SLOTS)), decoder, context=context)
    except BaseException:
        executor.close()
        raise


def _emulated(network: Network, model: Path, device: Device, options: Options) -> NetworkExecutor:
    from transom_tensorrt.emulating import OnnxExecutor

    return OnnxExecutor(network, model, threads_of(options, device))


def _on_card(
    network: Network, files: dict[str, Path], artifact: Artifact, device: Device, scratch: Path
) -> NetworkExecutor:  # fmt: skip
    from transom_tensorrt.cuda import CudaCard
    from transom_tensorrt.kernel_cache import KernelCache
    from transom_tensorrt.rtx import RtxExecutor

    sdk, _, _ = artifact.requires.get("sdk", "").partition(" ")  # the version after it was compared by `probing.judge`
    if sdk not in MODULES or ENGINE_FILE not in files:
        raise EngineError("This compiled model is damaged: it has no engine", REMOVE)
    trt = library(sdk)
    card = CudaCard(device)
    try:
        return RtxExecutor(network, files[ENGINE_FILE], trt, card, KernelCache(scratch, str(trt.__version__), device))
    except BaseException:
        card.close()
        raise
