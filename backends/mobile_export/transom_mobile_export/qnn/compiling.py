"""Compile: quantize a decoder as requested, write it as static graphs and have QNN compile them.

The ONNX models that QNN compiles are written to a temporary folder and removed: an app needs only the contexts.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from transom.authoring.folders import artifact_folder
from transom.authoring.opening import context_of
from transom.contract import Artifact, Device, Options, Progress
from transom.errors import OptionError, UnsupportedError, option
from transom.graph.weights import preloaded
from transom.ops.sparse_routing import BLOCK
from transom.programs.onnx_writing import IR_VERSION
from transom.programs.reading import UnsupportedNode
from transom_mobile_export.qnn import probing, sdk, sparse_sizes
from transom_mobile_export.qnn.claims import HtpDecoder, read_decoder
from transom_mobile_export.qnn.encoding import LARGEST_WIDE, QuantizedMatrices, add_half_cache, add_quantization
from transom_mobile_export.qnn.layout import (
    CACHE_BYTES,
    CHUNK,
    EMBEDDING_FILE,
    ERRORS_FILE,
    LARGEST,
    LIBRARIES_FILE,
    MEMORY_FILE,
    VARIANT_FILE,
    PartFiles,
    QnnVariant,
    cache_layers,
)
from transom_mobile_export.qnn.lowering import UNSEEN, Matrices, lower, plain
from transom_mobile_export.qnn.measuring import Deviation, measure
from transom_mobile_export.qnn.observing import SMALL, Seen, observe, rows_of
from transom_mobile_export.qnn.parts import GraphPart, plan_parts
from transom_mobile_export.qnn.precision import QnnPrecision, resolve
from transom_mobile_export.qnn.quantizing import quantized

if TYPE_CHECKING:
    from transom.graph import Graph
    from transom.programs.reading import Op

RANDOM_TEXTS = (4, 64)
"""Number and length of the random token sequences for a model without a tokenizer."""
CAPPED_WRONG = 16
"""Number of rows of scores for which the HTP computes a quantized soft cap wrongly."""
ROWS_AT_ONCE = 4096
"""Rows of the embedding that are written at a time."""
SHARES = {"observe": (0.0, 0.3), "measure": (0.3, 0.4), "embed": (0.4, 0.45), "compile": (0.45, 1.0)}
"""Start and end of each stage on the progress bar."""


def compile_graph(
    graph: Graph, device: Device, options: Options, progress: Progress, *, chunk: int = CHUNK, largest: int = LARGEST
) -> Artifact:
    """Compile a decoder whose nodes were all claimed. Large files are in a temporary folder, which the host empties.

    Args:
        chunk: largest number of new tokens of a prefill.
        largest: largest number of bytes of weights in one part.

    Raises:
        UnsupportedError: the HTP lacks an operator, or the model cannot be cut into the necessary parts.
        DoesNotFit: a single layer is too large for a context.
        OptionError: this checkpoint does not support the precision.
        EngineError: QNN cannot compile it; its own messages are included.
    """
    chip = probing.target(device)
    precision = resolve(options, chip.htp_arch)
    try:
        model = read_decoder(graph, precision)
    except UnsupportedNode as e:
        raise UnsupportedError(f"The node {e.node.name} cannot be run: {e.reason}", "Use another backend") from e
    decoder = model.reader.decoder
    context = context_of(options, decoder.context)
    chunk = min(chunk, context)
    policy = model.reader.sparsity
    if wrong := sparse_sizes.unfit(policy, context, chunk):
        raise OptionError(
            wrong, f"Use {option('context', max(1, context // BLOCK) * BLOCK)}, or {option('sparsity', 'off')}"
        )
    if precision.quantized:
        require_forms(model, precision)
        require_capped(model, chunk)
    parts = plan_parts(model.layers, largest=largest)
    notes = [f"precision: {precision.describe()}", *plan_notes(parts)]
    with artifact_folder("transom-qnn-") as folder:
        prepared = PreparedModel(model, precision, Seen({}, UNSEEN), plain)
        files: dict[str, bytes | Path] = {}
        matrices = folder / "matrices"
        matrices.mkdir()
        if precision.quantized:
            prepared, errors, said = _quantized(
                model, precision, texts_of(options, decoder.vocabulary), matrices, progress
            )
            files[ERRORS_FILE] = errors
            notes += said
        table = folder / Path(EMBEDDING_FILE).name
        write_embedding(model.embed, table, _told(progress, "embed"))
        variant = QnnVariant(
            context, chunk, decoder.vocabulary, decoder.hidden, float(model.embed.scale), cache_layers(decoder),
            precision.cache, prepared.seen.mask_low,
            tuple(PartFiles(f"part{i}_prefill.onnx", f"part{i}_decode.onnx", (p.first, p.end))
                  for i, p in enumerate(parts)),
            chip.soc_model, chip.htp_arch, policy.to_string(),
        )  # fmt: skip
        notes += sparse_notes(variant)
        share, tell = probing.shares(device), _told(progress, "compile")
        binaries: dict[str, Path] = {}
        for i, (part, names) in enumerate(zip(parts, variant.parts, strict=True)):
            tell(i / len(parts))
            binaries |= _compile_part(prepared, part, names, variant, folder, share)
        shutil.rmtree(matrices)
        size = sum(path.stat().st_size for path in binaries.values())
        kind = "prefill and decode share weights" if share else "prefill and decode have their own"
        notes.append(f"{len(parts)} part{'s' if len(parts) > 1 else ''} of {size / 1e6:.1f} MB in all; {kind}")
        files |= {VARIANT_FILE: variant.to_json().encode(), EMBEDDING_FILE: table, **binaries}
        files[LIBRARIES_FILE] = json.dumps(probing.libraries(chip.htp_arch)).encode()
        files[MEMORY_FILE] = json.dumps(_memory(variant, size)).encode()
        progress("compile", 1.0)
        made_by = sdk.sdk_version(binaries[variant.parts[0].prefill])
        return Artifact(files, probing.requirements(device, context, made_by), notes)


@dataclass(frozen=True)
class PreparedModel:
    """Everything that graphs are written from."""

    model: HtpDecoder
    precision: QnnPrecision
    seen: Seen
    matrices: Matrices


def _quantized(
    model: HtpDecoder,
    precision: QnnPrecision,
    texts: tuple[Sequence[Sequence[int]], str],
    folder: Path,
    progress: Progress,
) -> tuple[PreparedModel, bytes, list[str]]:
    """The data for quantized graphs, the quantization errors as JSON, and notes about them."""
    seen = observe(model, texts[0], _told(progress, "observe"))
    matrices = QuantizedMatrices(precision, seen.squares, folder)
    worst = measure(model, precision, seen, matrices, texts[0][0], _told(progress, "measure"))
    notes = [texts[1], error_note(worst)]
    if seen.widest > LARGEST_WIDE:
        notes.append(
            f"the hidden state has magnitudes up to {seen.widest:.4g}, too near the end of float16: it is quantized to "
            "uint16"
        )
    errors = json.dumps([asdict(deviation) for deviation in worst], indent=1).encode()
    return PreparedModel(model, precision, seen, matrices), errors, notes


def require_forms(model: HtpDecoder, precision: QnnPrecision) -> None:
    """Raises OptionError for a matrix that has no form in the precision, before anything slow."""
    for part in model.layers:
        for ops in part.layers:
            for op in ops:
                if op.weight is not None:
                    quantized(op.weight, precision.weights_of(op))  # reads and quantizes nothing yet


def require_capped(model: HtpDecoder, chunk: int) -> None:
    """Raises UnsupportedError for a soft cap over scores [KV heads, 1, 16, keys] or [1, 16, keys], which sparse
    attention has with 16 query heads per KV head: if quantized, the HTP silently computes it wrongly (QNN 2.51). In
    dense attention the query heads have an axis of their own, of which there has to be more than one."""
    reader = model.reader
    for index, layer in enumerate(reader.decoder.layers):
        _, softcap, _ = reader.layers[index]
        group = layer.q_heads // layer.kv_heads
        rows = {group, group * chunk} if not reader.sparsity.dense else {chunk} if layer.q_heads == 1 else set()
        if softcap and CAPPED_WRONG in rows:
            raise UnsupportedError(
                f"Layer {index} has soft-capped scores of {CAPPED_WRONG} rows, which the HTP computes wrongly if they "
                "are quantized",
                f"Use {option('precision', 'f16')}",
            )


def plan_notes(parts: Sequence[GraphPart]) -> list[str]:
    """The plan, human-readable; empty for a single part."""
    if len(parts) == 1:
        return []
    sizes = "; ".join(f"{part.name}: {part.bytes / 1e6:.1f} MB" for part in parts)
    return [f"the weights are too large for one context and are cut into {len(parts)} parts: {sizes}"]


def sparse_notes(variant: QnnVariant) -> list[str]:
    """What sparse attention reads, human-readable; empty for dense attention."""
    sizes = variant.sizes(1)
    if sizes is None:
        return []
    layers = [
        (len(variant.choosing(i)), c.kv_heads, c.head_dim, c.value_dim) for i, c in enumerate(variant.layers)
    ]  # fmt: skip
    read = sparse_sizes.reads(sizes, layers, CACHE_BYTES[variant.cache])
    choosing, every = sum(c[0] for c in layers), sum(c[1] for c in layers)
    return [
        f"sparse attention in {choosing} of {every} KV heads: a token reads "
        f"{sizes.far * sizes.rule.unit + sizes.near} of {variant.context} keys in the cache",
        f"bytes of cache that a token reads: {read.sparse / 1e6:.2f} MB, of them {read.nodes / 1e6:.2f} MB of "
        f"nodes; dense attention reads {read.dense / 1e6:.2f} MB",
    ]


def texts_of(options: Options, vocabulary: int) -> tuple[Sequence[Sequence[int]], str]:
    """The texts on which activation ranges are observed, and a note about them."""
    given: Any = options.get("calibration") or ()
    texts = [text for text in given if len(text)]
    if texts:
        return texts, f"activations are quantized by the ranges of {sum(map(len, texts))} tokens of text"
    rng = np.random.default_rng(0)
    return rng.integers(0, vocabulary, RANDOM_TEXTS).tolist(), (
        "activations are quantized by the ranges of random tokens, since the model has no tokenizer for texts"
    )


def error_note(worst: Sequence[Deviation]) -> str:
    products = [d.error for d in worst if d.what == "product"]
    first = next(d for d in worst if d.what == "product")
    return (
        f"quantization: products are off by {sum(products) / len(products):.2%} (mean), at most {first.error:.2%} "
        f"({first.node}); all of them are in {ERRORS_FILE}"
    )


def write_embedding(embed: Op, path: Path, progress: Callable[[float], None]) -> None:
    """The table as float16 rows, [vocabulary, hidden], not scaled.

    Raises:
        OptionError: a value is too large for float16.
    """
    weight = embed.weight
    assert weight is not None
    weight = preloaded(weight)
    rows = weight.shape[0]
    with path.open("wb") as file:
        for start in range(0, rows, ROWS_AT_ONCE):
            wide = rows_of(weight, range(start, min(rows, start + ROWS_AT_ONCE)))
            with np.errstate(over="ignore"):
                narrow = wide.astype("<f2")
            if not np.isfinite(narrow).all():
                raise OptionError(
                    f"The embedding has numbers up to {np.abs(wide).max():.4g}, and float16 ends at 65504",
                    "Use another backend",
                )
            file.write(narrow.tobytes())
            progress(start / rows)


def _compile_part(
    prepared: PreparedModel, part: GraphPart, names: PartFiles, variant: QnnVariant, folder: Path, share: bool
) -> dict[str, Path]:
    """Compile both graphs of a part; returns the files of their contexts by name."""
    chip = probing.Chip(variant.soc_model, variant.htp_arch)
    sessions = []
    for tokens, name in ((variant.chunk, names.prefill), (1, names.decode)):
        with tempfile.TemporaryDirectory(prefix="graph-", dir=folder) as sources:
            source = Path(sources) / name
            write_graph(prepared, part, source, tokens, variant.context)
            last = name == names.decode
            sessions.append(sdk.compile_context(source, folder / name, chip, share=share, last=last))
    del sessions
    stems = tuple(Path(name).stem for name in (names.prefill, names.decode))
    return {path.name: path for path in sorted(folder.iterdir()) if path.name.startswith(stems)}


def write_graph(prepared: PreparedModel, part: GraphPart, path: Path, tokens: int, context: int) -> None:
    """Write one graph of a part as the ONNX model that QNN compiles."""
    reader, precision = prepared.model.reader, prepared.precision
    lowered = lower(
        reader, part, tokens=tokens, cached=context, context=context, matrices=prepared.matrices,
        mask_low=prepared.seen.mask_low,
    )  # fmt: skip
    if precision.quantized:
        add_quantization(lowered, prepared.seen, ir.DataType[precision.cache.upper()])
    else:
        add_half_cache(lowered)
    written = ir.Model(lowered.graph, ir_version=IR_VERSION, producer_name="transom")
    ir.save(written, path, external_data=f"{path.stem}.weights", size_threshold_bytes=SMALL)


def _told(progress: Progress, stage: str) -> Callable[[float], None]:
    begin, end = SHARES[stage]

    def tell(share: float) -> None:
        progress(stage, begin + (end - begin) * share)

    tell(0.0)
    return tell


def _memory(variant: QnnVariant, size: int) -> dict[str, int]:
    """Bytes on the chip and in the app: contexts, cache of one token, and the inputs and outputs of a prefill."""
    number = CACHE_BYTES[variant.cache]
    sizes, nodes = variant.sizes(1), 0
    if sizes is not None:
        columns = sum(len(variant.choosing(i)) * c.head_dim for i, c in enumerate(variant.layers))
        nodes = -(-columns * (number + sparse_sizes.NODE_VARIANCE) // sizes.rule.node)
    rows = variant.chunk * (2 * variant.hidden + variant.context + variant.chunk) + variant.vocabulary
    return {
        "weights": size,
        "cache_per_token": sum(c.kv_heads * (c.head_dim + c.value_dim) * number for c in variant.layers) + nodes,
        "workspace": 4 * rows,
    }
