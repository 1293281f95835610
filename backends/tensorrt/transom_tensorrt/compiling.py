"""Compile: quantize a graph as requested, write it as an ONNX model and build TensorRT's engine from it."""

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
from transom_tensorrt.building import BuildResult, BuildSpec, build
from transom_tensorrt.claims import precision_of
from transom_tensorrt.lowering import LoweredNetwork, RtxKernels, lower
from transom_tensorrt.network import Network, ShapeProfile
from transom_tensorrt.precision import QUANTIZING, RtxPrecision
from transom_tensorrt.sdk import Sdk, installed

if TYPE_CHECKING:
    from transom.graph import Graph
    from transom.quantize.calibration import Activations
    from transom.quantize.passes import QuantizedGraph

SMALL = 1024
"""Largest initializer, in bytes, that is stored in the ONNX file itself."""
ROUNDING_FILE = "rounding.txt"
"""Quantization error of each product, human-readable."""
SHARES = {
    "observe": (0.0, 0.3), "round": (0.3, 0.36), "requantize": (0.36, 0.4), "write": (0.4, 0.5),
    "parse": (0.5, 0.55), "build": (0.55, 1.0),
}  # fmt: skip
"""Start and end of each stage on the progress bar."""
NEAR_THE_END = 65504 / 4
"""Magnitude in attention from which bfloat16 is used: other texts may reach larger ones than the calibration texts."""


def compile_graph(graph: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
    """Compile a decoder whose nodes were all claimed. Large files are in a temporary folder, which the host empties.

    Raises:
        EngineError: TensorRT cannot build it; its own messages are included.
        DoesNotFit: building takes more memory than this machine has.
        OptionError: this card or this checkpoint does not support the precision.
    """
    decoder = graph.decoder
    assert decoder is not None
    context = context_of(options, decoder.context)
    sdk = None if probing.emulating() else probing.sdk_for(device, installed())
    if sdk is not None:  # checked before anything slow
        precision = precision_of(graph, device, options)
        smallest = planned_bytes(graph, replace(precision, quantized="int4"))
        require_memory(planned_bytes(graph, precision), _available(), smallest)
    prepared = _prepare(graph, device, options, progress)
    reader = GraphReader(prepared.graph, RtxKernels())
    anew: list[str] = []
    if prepared.precision.number != "float32":  # float32 is for checking and keeps every weight unchanged
        anew = requantize(reader.ops, lambda share: _tell(progress, "requantize", share))
    lowered = lower(reader, prepared.precision, context, prepared.activations)
    made = _network(lowered, reader, prepared.precision, context)
    with artifact_folder("transom-tensorrt-") as folder:
        files: dict[str, bytes | Path] = {
            network.NETWORK_FILE: made.to_json().encode(), network.DECODER_FILE: decoder.to_json().encode(),
        }  # fmt: skip
        notes = [f"precision: {prepared.precision.describe(matrices(prepared.graph))}", *prepared.notes, *anew]
        if prepared.quantization:
            files[ROUNDING_FILE] = prepared.quantization.encode()
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


# precision ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PreparedGraph:
    """A graph in the requested precision."""

    graph: Graph
    precision: RtxPrecision
    activations: Activations | None
    notes: Sequence[str]
    quantization: str = ""
    """The table of errors, human-readable."""


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
    elif precision.quantized == "fp8":
        notes.append(
            "inputs of products are not quantized: the model has no tokenizer, so there are no calibration texts"
        )
    if not precision.quantized:
        requested = str(options.get("precision"))
        if requested in QUANTIZING:
            notes.append(f"precision {requested!r} quantizes plain matrices, and all of the checkpoint's are quantized")
        return PreparedGraph(graph, precision, seen, notes)
    scheme = Scheme(precision.quantized, activations="fp8" if precision.activations else "")
    if precision.quantized != "int8":
        scheme = replace(scheme, keep=vocabulary_products(graph))
    quantized = quantize(graph, scheme, seen, lambda share: _tell(progress, "round", share))
    notes, table = [*notes, *_quantization_notes(quantized)], quantized.table()
    if precision.quantized != "int8":  # the vocabulary matrix becomes int8: its errors go straight to the logits
        quantized = quantize(quantized.graph, Scheme("int8"), seen)
        if quantized.layers:
            notes.append(
                f"the vocabulary matrix was quantized to int8 by rows, off by {quantized.layers[0].weight_error:.2%}"
            )
            table = f"{table}\n\n{quantized.table()}"
    return PreparedGraph(quantized.graph, precision, seen, notes, table)


def _quantization_notes(quantized: QuantizedGraph) -> list[str]:
    if not quantized.layers:
        return []
    return [quantized.summary, f"the error of each product is in the artifact's {ROUNDING_FILE}"]


def wide_enough(precision: RtxPrecision, seen: Activations, arch: int) -> tuple[RtxPrecision, list[str]]:
    """Use bfloat16 in place of float16 if observed values come near float16's limit and float16 was not requested."""
    from transom_tensorrt.precision import BFLOAT16_SINCE

    largest = max((v.largest for (_, i), v in seen.inputs.items() if i > 0), default=0.0)
    if precision.number != "float16" or not precision.free or largest < NEAR_THE_END:
        return precision, []
    if probing.emulating() or arch < BFLOAT16_SINCE:
        return precision, [f"keys and values have magnitudes up to {largest:.3g}, and float16 ends at 65504"]
    return replace(precision, number="bfloat16"), [
        f"bfloat16 in place of float16: keys and values have magnitudes up to {largest:.3g}"
    ]


def requantize(ops: Sequence[Op], progress: Callable[[float], None]) -> list[str]:
    """Requantize matrices whose stored form has no fast product in TensorRT. Returns notes about it.

    Raises:
        SourceError: a weight is not finite.
    """
    from transom.quantize.passes import weight_error
    from transom.quantize.rounding import to_int8

    forms_of: dict[str, int] = {}
    off: list[float] = []
    for done, op in enumerate(ops):
        weight = op.weight
        if op.kind != "linear" or not isinstance(weight, Blocked) or forms.kept(weight):
            continue
        progress(done / len(ops))
        named = f"{weight.dtype} in blocks of {weight.block}"
        forms_of[named] = forms_of.get(named, 0) + 1
        op.weight = to_int8(weight)
        read = preloaded(weight)
        off.append(weight_error(op.node, read, to_int8(read)))
    if not off:
        return []
    stored = ", ".join(f"{count} in {name}" for name, count in forms_of.items())
    return [
        f"{len(off)} matrices ({stored}) were requantized to int8 by rows, which TensorRT multiplies without "
        f"unpacking them first: off by {sum(off) / len(off):.2%} (mean), at most {max(off):.2%}"
    ]


# the engine -----------------------------------------------------------------------------------------------------------
def _network(lowered: LoweredNetwork, reader: GraphReader, precision: RtxPrecision, context: int) -> Network:
    assert all(k.nbytes % network.ALIGNMENT == 0 for k in lowered.kept)  # `claims` refuses others
    most = min(network.CHUNK, context)
    # With fewer new tokens than that each chooses for itself, so the engine runs them one by one.
    least = 1 if reader.sparsity.dense else min(COLUMN_ROWS, most)
    # Logits of all tokens are rare, and they take memory on the card. But cutting a step would change the choice.
    rows = min(network.ROWS, most) if reader.sparsity.dense else most
    return Network(
        number=precision.number, context=context, vocabulary=reader.decoder.vocabulary, kept=lowered.kept,
        prefill=ShapeProfile((1, 1, 1), (least, most, most), (1, 1, rows)),
        decode=ShapeProfile((1, 1, network.SEQUENCES), (1, 1, 1), (1, 1, network.SEQUENCES)),
        queries=lowered.queries, sparsity=reader.sparsity.to_string(),
    )  # fmt: skip


def _build(
    model: Path, plan: Path, lowered: LoweredNetwork, made: Network, device: Device, sdk: Sdk, progress: Progress
) -> BuildResult:
    arch = probing.architecture(device)
    spec = BuildSpec(made, lowered.inputs, arch, lowered.fused)
    built = build(model, plan, spec, sdk, lambda stage, share: _tell(progress, stage, share))
    if not built.layers:
        raise EngineError(f"{sdk.name} {sdk.version} built an engine but did not list its layers",
                          "Report it, with the output of: transom doctor")  # fmt: skip
    return built


def build_facts(built: BuildResult, made: Network) -> dict[str, float]:
    """What building took, and what the engine needs; in bytes, except `seconds` and counts. On its card an engine needs
    `weights`, `activations` and, for each of up to `sequences` sequences, `cache_per_sequence`."""
    return {
        "seconds": round(built.seconds, 1), "build_memory": built.memory["build"], "engine": built.memory["engine"],
        "weights": built.memory.get("weights", 0), "activations": built.memory.get("activations", 0),
        "cache_per_sequence": made.slot_bytes, "context": made.context, "sequences": made.decode.batch[2],
    }  # fmt: skip


def engine_notes(built: BuildResult, made: Network) -> list[str]:
    """What the builder reported about an engine, as notes for the report."""
    caches = [name for k in made.kept for name in (k.input, k.output)]
    sizes = built.memory
    cache = made.slot_bytes
    memory = f" with {_size(sizes['build'])} of memory" if sizes["build"] else ""
    notes = [
        f"engine of {_size(sizes['engine'])}, built in {built.seconds:.0f} s{memory}",
        f"on the card: {_size(sizes.get('weights', 0))} of weights, {_size(sizes.get('activations', 0))} for a step, "
        f"and {_size(cache)} for each sequence of {made.context} tokens",
        f"prompts are processed one by one, {made.prefill.tokens[2]} tokens at a time; up to {made.decode.batch[2]} "
        "sequences decode together",
    ]
    for name, profile in (("prefill", 0), ("decode", 1)):
        notes.append(f"{name}: {inspecting.summary(built.layers, profile, caches)}")
    return notes


# memory ---------------------------------------------------------------------------------------------------------------
BUILD_BASE = 700 << 20
"""Bytes that any build takes: libraries, the compiler, code for one model."""
BUILD_FACTOR = 3.0
"""Bytes that a build takes for each byte of weights. `benchmarks/rtx_build.py` measures 2.1 (fp8) to 2.8 (int4)."""


def planned_bytes(graph: Graph, precision: RtxPrecision) -> int:
    """Bytes that the weights of a network will take, from the shapes of a decoder's matrices alone."""
    from transom.graph.reading import vocabulary_products

    assert graph.decoder is not None
    number = 4 if precision.number == "float32" else 2
    quantized = {"int4": 0.5 + 2 / 32, "int8": 1, "fp8": 1}.get(precision.quantized, number)
    total = float(number * graph.decoder.vocabulary * graph.decoder.hidden)  # the table of embeddings
    heads = vocabulary_products(graph)
    for node in graph.nodes():
        weight = linear_weight(node)
        if weight is None:
            continue
        if isinstance(weight, Blocked) and forms.kept(weight):
            total += weight.nbytes
            continue
        each = (4 if precision.number == "float32" else 1) if isinstance(weight, Blocked) else quantized
        if precision.quantized and node.name in heads:
            each = 1
        total += each * math.prod(weight.shape)
    return int(total)


def require_memory(weights: int, available: int | None, smallest: int) -> None:
    """Raises DoesNotFit for a build that takes more memory than this machine has.

    Args:
        weights: bytes of the weights.
        smallest: bytes of the weights if plain matrices were quantized to int4.
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
    """Bytes that this process may still allocate; None if unknown."""
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
