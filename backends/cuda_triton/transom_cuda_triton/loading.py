"""Load: open an artifact on its device and create its session."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.authoring.opening import context_of, paths_of, reading_artifact
from transom.contract import Artifact, Device, Options
from transom.errors import DoesNotFit, EngineError, option
from transom.signature import Decoder
from transom_cuda_triton import names, probing
from transom_cuda_triton.program import TritonProgram
from transom_cuda_triton.variants import Code, KernelVariant, Launcher

if TYPE_CHECKING:
    import torch

    from transom_cuda_triton.engine import TritonEngine
    from transom_cuda_triton.graphs import Record
    from transom_cuda_triton.parallel import Seat
    from transom_cuda_triton.session import TritonSession

CACHE_SHARE = 0.9
"""Share of the memory left for the cache; the rest is for torch's allocator."""
INTERPRETED_PAGES = 256
"""Maximum pages in the interpreter."""
SLOTS_SHARE = 0.05
"""Share of the card's memory that slots of sparse attention may take."""
MOST_SLOTS = 64


@dataclass(frozen=True)
class Place:
    """A card as a torch device, or the CPU in the interpreter."""

    device: torch.device
    free: int
    """Bytes of free memory."""
    processors: int


def load_artifact(artifact: Artifact, device: Device, options: Options) -> TritonSession:
    """A session over the artifact.

    Raises:
        EngineError: the files are damaged, a card is missing, or it rejects them.
        DoesNotFit: the weights or the cache of one sequence exceed the memory of a card.
    """
    from transom_cuda_triton.saving import SavingTritonSession
    from transom_cuda_triton.session import TritonSession

    files = paths_of(artifact)
    with reading_artifact():
        decoder = Decoder.from_json(files[names.DECODER_FILE].read_text())
    context = context_of(options, decoder.context)
    if device.members:
        from transom_cuda_triton.parallel import Seat, Team, meeting_place

        meeting, ranks = meeting_place(), len(device.members)
        memory = min(d.memory_bytes for d in device.members)
        seats = [Seat(rank, ranks, files, d, memory, context, meeting) for rank, d in enumerate(device.members)]
        team = Team(seats, open_share, [x.kv_heads for x in decoder.layers])
        return _session(TritonSession, team, decoder, context, team.room)
    engine, pages = _open(files, device, device.memory_bytes, context, 0, None)
    return _session(SavingTritonSession, engine, decoder, context, pages)


def _session(kind: Any, engine: Any, decoder: Decoder, context: int, pages: int) -> TritonSession:
    try:
        session: TritonSession = kind(engine, decoder, context=context, pages=pages)
        return session
    except BaseException:
        engine.close()
        raise


def open_share(seat: Seat, reduce: Callable[[torch.Tensor], None]) -> tuple[TritonEngine, int]:
    """Open one card's share of a model that runs on several cards."""
    return _open(seat.files, seat.device, seat.memory, seat.context, seat.rank, reduce)


def _open(
    files: Mapping[str, Path],
    device: Device,
    memory: int,
    context: int,
    rank: int,
    reduce: Callable[[torch.Tensor], None] | None,
) -> tuple[TritonEngine, int]:
    """The engine of a share, and the number of pages that fit on its card."""
    from transom_cuda_triton.engine import TritonEngine

    with reading_artifact():
        program = TritonProgram.from_json(files[names.program_file(rank)].read_text())
        weights = files[names.weights_file(rank)]
        needed = weights.stat().st_size
    place = _place(device)
    if needed > place.free:
        raise DoesNotFit(
            f"The weights take {_size(needed)}, and {device.id} has {_size(place.free)} free",
            "Use a card with more memory, or a checkpoint with smaller weights",
        )
    launch, record = _launcher(files, place)
    most = 8 if probing.interpreting() else MOST_SLOTS
    slots = max(1, min(most, int(memory * SLOTS_SHARE) // max(1, _slot_bytes(program, context))))
    engine = TritonEngine(
        program, weights, place.device, launch, arch=probing.tiles_architecture(device),
        processors=place.processors, context=context, slots=slots, record=record, reduce=reduce,
    )  # fmt: skip
    try:
        return engine, _pages(engine, device, place)
    except BaseException:
        engine.close()
        raise


def _slot_bytes(program: TritonProgram, context: int) -> int:
    from transom_cuda_triton.cache import node_bytes
    from transom_cuda_triton.routes import COLUMN_PAGES
    from transom_cuda_triton.store import TORCH

    size = TORCH[program.number].itemsize
    ring = sum(16 * x.heads * x.head_dim * size for x in program.layers)
    nodes = sum(COLUMN_PAGES * x.kv_heads * node_bytes(x, program.number) for x in program.layers)
    return ring + nodes + sum(x.kv_heads * (context // 8 + 8 * 64) for x in program.layers)


def _launcher(files: Mapping[str, Path], place: Place) -> tuple[Launcher, Record | None]:
    """The launcher of kernels, and the recorder of CUDA graphs."""
    from transom_cuda_triton.launching import DriverLauncher, InterpretingLauncher

    if probing.interpreting():
        return InterpretingLauncher(), None
    import torch

    from transom_cuda_triton.graphs import cuda_record

    def stream() -> int:
        return int(torch.cuda.current_stream(place.device).cuda_stream)

    return DriverLauncher(read_codes(files), stream), cuda_record


def read_codes(files: Mapping[str, Path]) -> dict[KernelVariant, Code]:
    """Read the output of `compiling.code_files`.

    Raises:
        EngineError: the files are damaged.
    """
    with reading_artifact():
        listed: list[dict[str, Any]] = json.loads(files[names.CODE_LIST].read_text())
        blob = files[names.CODE_FILE].read_bytes()
        codes: dict[KernelVariant, Code] = {}
        for raw in listed:
            at, size = int(raw["at"]), int(raw["size"])
            if at < 0 or at + size > len(blob):
                raise ValueError("machine code is truncated")
            v = raw["variant"]
            types, constants = (tuple((str(n), x) for n, x in v[key]) for key in ("types", "constants"))
            variant = KernelVariant(str(v["kernel"]), types, constants, int(v["warps"]), int(v["stages"]))
            codes[variant] = Code(
                str(raw["entry"]), blob[at : at + size], int(raw["shared"]), int(raw["warps"]),
                tuple(raw["arguments"]), tuple(raw["parameters"]),
            )  # fmt: skip
        return codes


def _place(device: Device) -> Place:
    """The torch device of a device.

    Raises:
        EngineError: torch does not find the card.
    """
    import torch

    from transom_cuda_triton.launching import device_index

    if probing.interpreting():
        free = device.free_bytes if device.free_bytes is not None else device.memory_bytes
        return Place(torch.device("cpu"), free, 1)
    if not torch.cuda.is_available():
        raise EngineError(
            f"torch {torch.__version__} finds no CUDA card, although {device.id} is present",
            "Check that nvidia-smi works, and that the driver is as new as torch's CUDA",
        )
    index = device_index(device)
    torch.cuda.set_device(index)
    free, _ = torch.cuda.mem_get_info(index)
    processors = torch.cuda.get_device_properties(index).multi_processor_count
    return Place(torch.device("cuda", index), int(free), int(processors))


def _pages(engine: TritonEngine, device: Device, place: Place) -> int:
    """Number of pages that fit beside weights, slots and the buffers of the largest step.

    Raises:
        DoesNotFit: fewer pages fit than one full context needs.
    """
    from transom_cuda_triton.session import MAX_SEQUENCES, MAX_TOKENS
    from transom_cuda_triton.step import Workspace

    one = -(-engine.context // engine.page_tokens)
    if probing.interpreting():
        return max(one, min(INTERPRETED_PAGES, 4 * one))
    buffers = Workspace.nbytes(engine.program, MAX_TOKENS, MAX_SEQUENCES)
    others = engine.store.nbytes + engine.routes.nbytes + buffers  # `free` was measured before all of them
    left = int((place.free - others) * CACHE_SHARE)
    pages = left // engine.page_bytes()
    if pages < one:
        raise DoesNotFit(
            f"A cache of {engine.context} tokens takes {_size(one * engine.page_bytes())} on {device.id}, and "
            f"{_size(max(0, left))} are left beside {_size(others)} of weights and buffers",
            f"Load it with {option('context', max(0, pages) * engine.page_tokens)} or less",
        )
    return pages


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
