"""Compile: write a native program, or lower the graph, compile each stage with OpenVINO and export the result."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.authoring.folders import artifact_folder, small_as_bytes
from transom.authoring.opening import threads_of
from transom.contract import Artifact, Device, Options, Progress
from transom.errors import EngineError, message_lines
from transom.graph.reading import matrices
from transom.graph.weights import Dense
from transom_openvino_cpu import names, trial
from transom_openvino_cpu.engine import openvino
from transom_openvino_cpu.frontend import read_whole
from transom_openvino_cpu.integers import integers
from transom_openvino_cpu.lowering import Stage, lower
from transom_openvino_cpu.native.choosing import level_on, measures, read_native
from transom_openvino_cpu.paged_attention import paged
from transom_openvino_cpu.plan import EnginePlan, StagePlan
from transom_openvino_cpu.precision import GROUP, CpuPrecision, ProductForm, dynamic_group, resolve
from transom_openvino_cpu.probing import requirements
from transom_openvino_cpu.signal_stack import signal_stack_kept
from transom_openvino_cpu.stages import has_wide_tables

if TYPE_CHECKING:
    from transom.graph import Graph
    from transom.graph.weights import Weight
    from transom.programs.reading import GraphReader
    from transom_openvino_cpu.native.mixed_precision import MixedPrecision
    from transom_openvino_cpu.native.program import NativeProgram

FRONTEND_FOLDER = "graph"


def compile_graph(graph: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
    """Compile a graph whose nodes were all claimed.

    Large files are in a temporary folder until the host moves them.

    Raises:
        EngineError: OpenVINO cannot compile the graph; the message quotes it.
        OptionError: this CPU or checkpoint does not support the precision.
    """
    precision = resolve(options, device, matrices(graph), decoder=graph.decoder is not None)
    reader = read_native(graph, precision, device)
    with artifact_folder("transom-openvino-") as folder:
        if isinstance(reader, str):
            artifact = _by_openvino(graph, precision, device, options, folder, progress)
            if graph.decoder is not None:
                note = f"OpenVINO's kernels run this model, not the native ones: {reader}"
                artifact = replace(artifact, notes=[*artifact.notes, note])
        else:
            artifact = _native(graph, reader, precision, device, options, folder, progress)
            if measures(device):
                artifact = _faster(artifact, graph, precision, device, options, folder, progress)
        return artifact


def _faster(
    native: Artifact,
    graph: Graph,
    precision: CpuPrecision,
    device: Device,
    options: Options,
    folder: Path,
    progress: Progress,
) -> Artifact:
    """The faster of the native artifact and OpenVINO's, with a note of why. The native one if the other fails."""
    from transom_openvino_cpu.claims import openvino_refusals
    from transom_openvino_cpu.measuring import UNMEASURED, faster, short_of_memory

    note = short_of_memory(native, device)
    if not note and (refused := openvino_refusals(graph, precision)):
        note = f"{UNMEASURED}: {next(iter(refused.values()))}"
    if note:
        return replace(native, notes=[*native.notes, note])
    try:
        other = _by_openvino(graph, precision, device, options, folder, progress)
        progress("measure", None)
        kept = faster(native, other, device, options)
    except EngineError as error:
        kept = replace(native, notes=[*native.notes, f"{UNMEASURED}: {error.cause}"])
    for path in folder.iterdir():  # files of the other artifact
        if path.is_file() and path not in kept.files.values():
            path.unlink()
    return kept


def _by_openvino(
    graph: Graph, precision: CpuPrecision, device: Device, options: Options, folder: Path, progress: Progress
) -> Artifact:
    """The graph compiled by OpenVINO."""
    progress("lower", 0.0)
    if trial.whole_through_frontend(graph) or (graph.decoder is None and trial.refused_alone(graph, precision)):
        stages = [_through_frontend(graph, folder)]
    else:
        stages = lower(graph, precision, lambda share: progress("lower", share), tables_apart=False)
    notes = _notes(precision, stages)
    plans = _compile_all(stages, precision, device, options, folder, progress)
    if plans is None:  # the engine does not compute the rotary tables in float32
        stages = lower(graph, precision, lambda share: progress("lower", share), tables_apart=True)
        plans = _compile_all(stages, precision, device, options, folder, progress)
    assert plans is not None
    shutil.rmtree(folder / FRONTEND_FOLDER, ignore_errors=True)
    progress("compile", 1.0)
    plan = EnginePlan(tuple(plans), tuple(graph.input_names), tuple(graph.output_names), graph.decoder, paged(graph))
    if graph.decoder is None:
        found = integers(graph)
        plan = replace(plan, limit=found.limit, summed=found.summed, cut=found.cut)
    files: dict[str, bytes | Path] = {p.file: small_as_bytes(folder / p.file) for p in plans}
    files[names.PLAN_FILE] = plan.to_json().encode()
    return Artifact(files, requirements(device), notes)


def _native(
    graph: Graph,
    reader: GraphReader,
    precision: CpuPrecision,
    device: Device,
    options: Options,
    folder: Path,
    progress: Progress,
) -> Artifact:
    """The graph as a native program and its packed weights."""
    from transom_openvino_cpu.native import library, lowering

    weights = folder / names.WEIGHTS_FILE
    with weights.open("w+b") as file:
        program = lowering.write(reader, precision, file, lambda share: progress("compile", share))
    level = level_on(device)
    assert level is not None
    if level in library.BFLOAT16_FIRST:
        program = program.without_int8_products("bf16")
    mixed = None
    if program.cache == "int8":
        program, mixed = _calibrated(program, weights, precision, device, options, progress)
    plan = EnginePlan((), tuple(graph.input_names), tuple(graph.output_names), graph.decoder, True, level)
    files: dict[str, bytes | Path] = {
        names.PLAN_FILE: plan.to_json().encode(),
        names.PROGRAM_FILE: program.to_json().encode(),
        names.WEIGHTS_FILE: small_as_bytes(folder / names.WEIGHTS_FILE),
    }
    progress("compile", 1.0)
    return Artifact(files, requirements(device), _native_notes(reader, program, precision, mixed))


def _calibrated(
    program: NativeProgram, weights: Path, precision: CpuPrecision, device: Device, options: Options, progress: Progress
) -> tuple[NativeProgram, MixedPrecision | None]:
    """The program as calibration texts make it: without the means of its keys, and with the widths that this model
    needs, if they are to be chosen. As it is where this computer cannot run it to find out."""
    from transom.hardware.cpu import probe_cpu
    from transom_openvino_cpu.native import calibration_run, key_means, library, mixed_precision

    here = probe_cpu()
    level = library.level_for(here)
    if level is None or not (precision.mixes or key_means.movable(program)):
        return program, None
    given: Any = options.get("calibration") or ()
    bound: Any = options.get("max_kl")
    texts = calibration_run.cut(given, program.buffers[program.output].width)
    if not precision.mixes:
        texts = texts[: key_means.TEXTS]
    threads = min(threads_of(options, device), here.cores)
    run = calibration_run.CalibrationRun(weights, level, threads, texts, precision.wide)
    progress("measure", None)
    means, expected = key_means.KeyMeans(program), list[mixed_precision.Expected]()
    for logits, keys in run.wide(program):
        means.add(keys)
        expected.append(mixed_precision.Expected.of(logits))
    program = key_means.subtracted(program, weights, means.means())
    if not precision.mixes:
        return program, None
    mixed = mixed_precision.choose(
        program,
        expected,
        run.logits,
        limit=mixed_precision.LIMIT if bound is None else bound,
        form=precision.wide,
        progress=lambda share: progress("measure", share),
    )
    return mixed.program, mixed


def _native_notes(
    reader: GraphReader, program: NativeProgram, precision: CpuPrecision, mixed: MixedPrecision | None
) -> list[str]:
    """Notes for a native program."""
    if mixed is not None:
        return [f"precision: {_described(mixed, precision)}"]
    notes = [f"precision: {_products(program)}, float32 elsewhere, {precision.describe_cache()} cache"]
    products = [d for d in reader.ops if d.kind == "linear" and d.weight is not None]
    quantized = [d for d in products if d.by == "int8" and isinstance(d.weight, Dense)]
    if quantized:
        notes.append(
            f"{len(quantized)} of {len(products)} matrices were quantized to int8 in groups of {GROUP}; "
            "precision='exact' keeps them as stored"
        )
    return notes


def _products(program: NativeProgram) -> str:
    """The narrowest number format of the program's products, for a report."""
    formats = {op.by for op in program.ops if op.kind == "linear"}
    names = {"int8": "int8", "bf16": "bfloat16", "f32": "float32"}
    return f"{next(name for form, name in names.items() if form in formats or form == 'f32')} matrix products"


def _described(mixed: MixedPrecision, precision: CpuPrecision) -> str:
    wide = {"bf16": "bfloat16", "f32": "float32"}
    inside = _products(mixed.program)
    if mixed.wide and inside.startswith("int8"):
        inside += f" ({' and '.join(mixed.wide)} in {wide[precision.wide]})"
    cache = wide.get(mixed.program.cache, "int8")
    return (
        f"{inside}, float32 elsewhere, {cache} cache; mean divergence {mixed.divergence:.2g} nats a token on "
        f"calibration text"
    )


def _compile_all(
    stages: list[Stage], precision: CpuPrecision, device: Device, options: Options, folder: Path, progress: Progress
) -> list[StagePlan] | None:
    """Compile and export the stages, freeing each when done. None if the rotary tables need a stage of their own."""
    plans = []
    apart = any(s.name == "tables" for s in stages)
    for index, stage in enumerate(stages):
        progress("compile", index / len(stages))
        compiled, config = _compile(stage, precision, device, options)
        if (
            stage.name == "body"
            and stage.hint != "f32"
            and not apart
            and stage.rotates
            and not has_wide_tables(compiled)
        ):
            return None
        plans.append(_export(stage, compiled, config, folder))
        stages[index] = replace(stage, model=None, forms=[])
    return plans


def _through_frontend(graph: Graph, folder: Path) -> Stage:
    """A graph that OpenVINO reads as an ONNX file."""
    (folder / FRONTEND_FOLDER).mkdir()
    model = read_whole(graph, folder / FRONTEND_FOLDER)
    return Stage("body", "f32", model, graph.output_names)


def _compile(stage: Stage, precision: CpuPrecision, device: Device, options: Options) -> tuple[Any, dict[str, str]]:
    """The compiled stage, and the properties that compiling and opening share."""
    group = dynamic_group(stage.forms) if precision.dynamic else 0
    config = {
        "INFERENCE_PRECISION_HINT": stage.hint,
        "KV_CACHE_PRECISION": precision.hint,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
    }
    threads = threads_of(options, device)  # 0: the engine chooses
    core: Any = openvino().Core()
    try:
        with signal_stack_kept():
            compiled = core.compile_model(
                stage.model, "CPU", config | ({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})
            )
    except RuntimeError as e:
        raise EngineError(
            f"OpenVINO cannot compile the stage {stage.name} of this model: {message_lines(e)[-1]}"
        ) from e
    return compiled, config


def _export(stage: Stage, compiled: Any, config: dict[str, str], folder: Path) -> StagePlan:
    try:
        blob = compiled.export_model()
    except RuntimeError as e:
        raise EngineError(f"OpenVINO cannot export the stage {stage.name} of this model: {message_lines(e)[-1]}") from e
    file = f"{stage.name}.blob"
    (folder / file).write_bytes(blob if isinstance(blob, bytes) else blob.getbuffer())
    return StagePlan(stage.name, file, tuple(stage.outputs), config)


def _notes(precision: CpuPrecision, stages: Sequence[Stage]) -> list[str]:
    """Notes for the user: compute precision, and which weights were requantized."""
    notes = [f"precision: {precision.describe()}"]
    forms: list[tuple[Weight, ProductForm]] = [f for s in stages for f in s.forms]
    quantized = [(w, f) for w, f in forms if f.kind == "int8"]
    if quantized:
        elements = sum(w.shape[0] * w.shape[-1] for w, _ in quantized)
        groups = sorted({f.group for _, f in quantized})
        total = sum(w.shape[0] * w.shape[-1] for w, _ in forms)
        notes.append(
            f"{len(quantized)} of {len(forms)} matrices ({100 * elements // max(total, 1)} % of their weights) were "
            f"quantized to int8 in groups of {' and '.join(map(str, groups))}; precision='exact' keeps them as stored"
        )
    return notes
