"""Compile: a graph, rounded as asked for, as an ONNX model; and the engine that TensorRT builds from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from transom.authoring.folders import artifact_folder
from transom.authoring.opening import context_of
from transom.contract import Artifact, Device, Options, Progress
from transom.errors import DoesNotFit, EngineError, option
from transom.graph.reading import linear_weight, matrices
from transom.graph.weights import Blocked, preloaded
from transom.ops.sparse_routing import COLUMN_ROWS
from transom.programs.reading import GraphReader, Op
from transom_tensorrt import forms, inspecting, network, probing
from transom_tensorrt.building import Built, Wanted, build
from transom_tensorrt.claims import precision_of
from transom_tensorrt.lowering import LoweredNetwork, RtxKernels, lower
from transom_tensorrt.network import Network, ShapeProfile
from transom_tensorrt.precision import ROUNDING, RtxPrecision
from transom_tensorrt.sdk import Sdk, installed

if TYPE_CHECKING:
    from transom.graph import Graph
    from transom.quantize.calibration import Activations
    from transom.quantize.passes import QuantizedGraph

SMALL = 1024
"""Bytes of an initializer that stays in the ONNX file itself."""
ROUNDING_FILE = "rounding.txt"
"""What rounding did to each product, for people."""
SHARES = {
    "observe": (0.0, 0.3), "round": (0.3, 0.36), "requantize": (0.36, 0.4), "write": (0.4, 0.5),
    "parse": (0.5, 0.55), "build": (0.55, 1.0),
}  # fmt: skip
"""Of the progress bar, from where to where."""
NEAR_THE_END = 65504 / 4
"""A magnitude in attention from which on bfloat16 is taken: other texts may have larger ones than those seen."""


def compile_graph(graph: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
    """The artifact of a decoder all of whose nodes were claimed. Large files lie in a temporary folder, which the host
    empties.

    Raises:
        EngineError: TensorRT cannot build it; its own words are in the message.
        DoesNotFit: building takes more memory than this machine has.
        OptionError: the precision cannot be had on this card or for this checkpoint.
    """
    decoder = graph.decoder
    assert decoder is not None
    context = context_of(options, decoder.context)
    sdk = None if probing.emulating() else probing.sdk_for(device, installed())
    if sdk is not None:  # before anything that takes long
        precision = precision_of(graph, device, options)
        smallest = planned_bytes(graph, replace(precision, rounded="int4"))
        require_memory(planned_bytes(graph, precision), _available(), smallest)
    prepared = _prepare(graph, device, options, progress)
    reader = GraphReader(prepared.graph, RtxKernels())
    anew: list[str] = []
    if prepared.precision.number != "float32":  # that is for checking, and keeps every weight as it is
        anew = round_anew(reader.ops, lambda share: _tell(progress, "requantize", share))
    lowered = lower(reader, prepared.precision, context, prepared.activations)
    made = _network(lowered, reader, prepared.precision, context)
    with artifact_folder("transom-tensorrt-") as folder:
        files: dict[str, bytes | Path] = {
            network.NETWORK_FILE: made.to_json().encode(), network.DECODER_FILE: decoder.to_json().encode(),
        }  # fmt: skip
        notes = [f"precision: {prepared.precision.describe(matrices(prepared.graph))}", *prepared.notes, *anew]
        if prepared.rounding:
            files[ROUNDING_FILE] = prepared.rounding.encode()
        model = folder / network.MODEL_FILE
        _tell(progress, "write", 0.0)
        ir.save(lowered.model, model, external_data=network.WEIGHTS_FILE, size_threshold_bytes=SMALL)
        if sdk is None:
            weights = folder / network.WEIGHTS_FILE
            files |= {network.MODEL_FILE: model} | ({network.WEIGHTS_FILE: weights} if weights.exists() else {})
        else:
            plan = folder / network.ENGINE_FILE
            built = _build(model, plan, lowered, made, device, sdk, progress)
            for used in (model, folder / network.WEIGHTS_FILE):
                used.unlink(missing_ok=True)
            files |= {
                network.ENGINE_FILE: plan, network.LAYERS_FILE: inspecting.to_json(built.layers).encode(),
                network.BUILD_FILE: json.dumps(build_facts(built, made), indent=1).encode(),
            }  # fmt: skip
            notes += engine_notes(built, made)
        progress("build", 1.0)
        requires = probing.requirements(device) | {"context": str(context)}
        return Artifact(files, requires, notes)


# what is computed in what ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PreparedGraph:
    """A graph in the numbers that were asked for."""

    graph: Graph
    precision: RtxPrecision
    activations: Activations | None
    notes: Sequence[str]
    rounding: str = ""
    """The table of errors, for people."""


def _prepare(graph: Graph, device: Device, options: Options, progress: Progress) -> PreparedGraph:
    from transom.graph.reading import vocabulary_products
    from transom.quantize.calibration import calibrate
    from transom.quantize.passes import Scheme, quantize

    precision = precision_of(graph, device, options)
    seen = None
    notes: list[str] = []
    if precision.activations:
        texts: Any = options.get("calibration")
        seen = calibrate(graph, texts, progress=lambda share: _tell(progress, "observe", share))
        precision, said = wide_enough(precision, seen, probing.architecture(device))
        notes += said
    elif precision.rounded == "fp8":
        notes.append(
            "inputs of products are not rounded: the model has no tokenizer, so there are no texts to see them on"
        )
    if not precision.rounded:
        asked = str(options.get("precision"))
        if asked in ROUNDING:
            notes.append(f"precision {asked!r} rounds plain matrices, and all of these are quantised in the checkpoint")
        return PreparedGraph(graph, precision, seen, notes)
    scheme = Scheme(precision.rounded, activations="fp8" if precision.activations else "")
    if precision.rounded != "int8":
        scheme = replace(scheme, keep=vocabulary_products(graph))
    rounded = quantize(graph, scheme, seen, lambda share: _tell(progress, "round", share))
    notes, table = [*notes, *_rounding_notes(rounded)], rounded.table()
    if precision.rounded != "int8":  # and the vocabulary matrix to int8: its errors show in the logits at once
        rounded = quantize(rounded.graph, Scheme("int8"), seen)
        if rounded.layers:
            notes.append(
                f"the vocabulary matrix was rounded to int8 by rows, off by {rounded.layers[0].weight_error:.2%}"
            )
            table = f"{table}\n\n{rounded.table()}"
    return PreparedGraph(rounded.graph, precision, seen, notes, table)


def _rounding_notes(rounded: QuantizedGraph) -> list[str]:
    if not rounded.layers:
        return []
    return [rounded.summary, f"the error of each product is in the artifact's {ROUNDING_FILE}"]


def wide_enough(precision: RtxPrecision, seen: Activations, arch: int) -> tuple[RtxPrecision, list[str]]:
    """bfloat16 in place of float16, where what was seen comes near float16's end and nobody asked for float16."""
    from transom_tensorrt.precision import BFLOAT16_SINCE

    largest = max((v.largest for (_, i), v in seen.inputs.items() if i > 0), default=0.0)
    if precision.number != "float16" or not precision.free or largest < NEAR_THE_END:
        return precision, []
    if probing.emulating() or arch < BFLOAT16_SINCE:
        return precision, [f"keys and values have magnitudes up to {largest:.3g}, and float16 ends at 65504"]
    return replace(precision, number="bfloat16"), [
        f"bfloat16 in place of float16: keys and values have magnitudes up to {largest:.3g}"
    ]


def round_anew(drafts: Sequence[Op], progress: Callable[[float], None]) -> list[str]:
    """Give matrices whose stored form TensorRT has no fast product for another one, and say so.

    Raises:
        SourceError: a weight is not finite.
    """
    from transom.quantize.passes import weight_error
    from transom.quantize.rounding import to_int8

    forms_of: dict[str, int] = {}
    off: list[float] = []
    for done, op in enumerate(drafts):
        weight = op.weight
        if op.kind != "linear" or not isinstance(weight, Blocked) or forms.kept(weight):
            continue
        progress(done / len(drafts))
        named = f"{weight.dtype} in blocks of {weight.block}"
        forms_of[named] = forms_of.get(named, 0) + 1
        op.weight = to_int8(weight)
        read = preloaded(weight)
        off.append(weight_error(op.node, read, to_int8(read)))
    if not off:
        return []
    stored = ", ".join(f"{count} in {name}" for name, count in forms_of.items())
    return [
        f"{len(off)} matrices ({stored}) were rounded anew to int8 by rows, which TensorRT multiplies without "
        f"unpacking them first: off by {sum(off) / len(off):.2%} (mean), at most {max(off):.2%}"
    ]


# the engine -----------------------------------------------------------------------------------------------------------
def _network(lowered: LoweredNetwork, reader: GraphReader, precision: RtxPrecision, context: int) -> Network:
    assert all(k.nbytes % network.ALIGNMENT == 0 for k in lowered.kept)  # `claims` refuses what would not be
    most = min(network.CHUNK, context)
    # Fewer new tokens than that choose each by itself, which the engine has them do one after the other.
    least = 1 if reader.sparsity.dense else min(COLUMN_ROWS, most)
    # Logits of all tokens are rare, and room for them is kept on the card. A step that is cut would choose otherwise.
    rows = min(network.ROWS, most) if reader.sparsity.dense else most
    return Network(
        number=precision.number, context=context, vocabulary=reader.decoder.vocabulary, kept=lowered.kept,
        prefill=ShapeProfile((1, 1, 1), (least, most, most), (1, 1, rows)),
        decode=ShapeProfile((1, 1, network.SEQUENCES), (1, 1, 1), (1, 1, network.SEQUENCES)),
        queries=lowered.queries, sparsity=reader.sparsity.to_string(),
    )  # fmt: skip


def _build(
    model: Path, plan: Path, lowered: LoweredNetwork, made: Network, device: Device, sdk: Sdk, progress: Progress
) -> Built:
    arch = probing.architecture(device)
    wanted = Wanted(made, lowered.inputs, arch, lowered.fused)
    built = build(model, plan, wanted, sdk, lambda stage, share: _tell(progress, stage, share))
    if not built.layers:
        raise EngineError(f"{sdk.name} {sdk.version} built an engine and said nothing of its layers",
                          "Report it, with the output of: transom doctor")  # fmt: skip
    return built


def build_facts(built: Built, made: Network) -> dict[str, float]:
    """In bytes, but for `seconds` and counts. With `sequences` of up to `context` tokens an engine needs `weights`,
    `activations` and so many times `cache_per_sequence` on its card."""
    return {
        "seconds": round(built.seconds, 1), "build_memory": built.memory["build"], "engine": built.memory["engine"],
        "weights": built.memory.get("weights", 0), "activations": built.memory.get("activations", 0),
        "cache_per_sequence": made.slot_bytes, "context": made.context, "sequences": made.decode.batch[2],
    }  # fmt: skip


def engine_notes(built: Built, made: Network) -> list[str]:
    """What the builder said of an engine, for the report."""
    caches = [name for k in made.kept for name in (k.input, k.output)]
    sizes = built.memory
    cache = made.slot_bytes
    memory = f" with {_size(sizes['build'])} of memory" if sizes["build"] else ""
    notes = [
        f"engine of {_size(sizes['engine'])}, built in {built.seconds:.0f} s{memory}",
        f"on the card: {_size(sizes.get('weights', 0))} of weights, {_size(sizes.get('activations', 0))} for a step, "
        f"and {_size(cache)} for each sequence of {made.context} tokens",
        f"prompts go through one by one, {made.prefill.tokens[2]} tokens at a time; up to {made.decode.batch[2]} "
        "sequences decode together",
    ]
    for name, profile in (("prefill", 0), ("decode", 1)):
        notes.append(f"{name}: {inspecting.summary(built.layers, profile, caches)}")
    return notes


# memory ---------------------------------------------------------------------------------------------------------------
BUILD_BASE = 700 << 20
"""Bytes that a build takes whatever is built: libraries, the compiler, code for one model."""
BUILD_FACTOR = 3.0
"""Bytes for each byte of weights. `benchmarks/rtx_build.py` measures 2.1 (fp8) to 2.8 (int4)."""


def planned_bytes(graph: Graph, precision: RtxPrecision) -> int:
    """What the weights of a network will take, from the shapes of a decoder's matrices alone."""
    from transom.graph.reading import vocabulary_products

    assert graph.decoder is not None
    number = 4 if precision.number == "float32" else 2
    rounded = {"int4": 0.5 + 2 / 32, "int8": 1, "fp8": 1}.get(precision.rounded, number)
    total = float(number * graph.decoder.vocabulary * graph.decoder.hidden)  # the table of embeddings
    heads = vocabulary_products(graph)
    for node in graph.nodes():
        weight = linear_weight(node)
        if weight is None:
            continue
        if isinstance(weight, Blocked) and forms.kept(weight):
            total += weight.nbytes
            continue
        each = (4 if precision.number == "float32" else 1) if isinstance(weight, Blocked) else rounded
        if precision.rounded and node.name in heads:
            each = 1
        total += each * math.prod(weight.shape)
    return int(total)


def require_memory(weights: int, available: int | None, smallest: int) -> None:
    """Raises DoesNotFit for a build that this machine has not enough memory for.

    Args:
        weights: bytes of them.
        smallest: the same, if plain matrices were rounded to int4.
    """
    needed = BUILD_BASE + int(BUILD_FACTOR * weights)
    if available is not None and needed > available:
        raise DoesNotFit(
            f"Building this engine takes about {_size(needed)} of memory ({_size(weights)} of weights), and this "
            f"machine has {_size(available)} free",
            "Build it on a machine with more memory"
            + (f", or with {option('precision', 'int4')}" if smallest < weights else ""),
        )


def _available() -> int | None:
    """Bytes that this process may still take; None where that is not known."""
    from transom.hardware.cpu import probe_cpu

    return probe_cpu().free_bytes


def _tell(progress: Progress, stage: str, share: float | None) -> None:
    begin, end = SHARES[stage]
    progress(stage, begin if share is None else begin + (end - begin) * share)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
