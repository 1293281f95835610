"""The network on a made-up card with a made-up TensorRT: what is bound, copied and kept.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rtx_made_up
from rtx_made_up import CARD, OTHER, Cuda, Diagnostics, Status, Trt, Validity
from rtx_networks import Compiled, compiled

from transom.errors import DoesNotFit, EngineError
from transom.sparsity import Sparsity
from transom_tensorrt.cuda import CudaCard, aligned
from transom_tensorrt.emulating import OnnxExecutor
from transom_tensorrt.executing import Array, stored
from transom_tensorrt.kernel_cache import KernelCache
from transom_tensorrt.rtx import SHARE, WARM_RUNS, ErrorLog, RtxExecutor, _check_header


@pytest.fixture
def made(rng: np.random.Generator, tmp_path: Path) -> Compiled:
    return compiled(rng, tmp_path / "model")


def opened(made: Compiled, trt: Trt, scratch: Path) -> RtxExecutor:
    return RtxExecutor(
        made.network, made.model, trt, CudaCard(CARD, trt.cuda), KernelCache(scratch, trt.__version__, CARD)
    )


def random_run(rng: np.random.Generator, made: Compiled, way: Any, slots: int) -> tuple[Any, Array, Array, Array, int]:
    network = made.network
    profile = network.prefill if way == "prefill" else network.decode
    count = int(rng.integers(1, min(slots, profile.batch[2]) + 1))
    tokens = int(rng.integers(1, profile.tokens[2] + 1))
    rows = np.sort(rng.permutation(count * tokens)[: int(rng.integers(1, profile.rows[2] + 1))])
    past = rng.integers(0, network.context - tokens, count)
    return (
        way,
        rng.integers(0, network.vocabulary, (count, tokens)),
        past,
        rows,
        int(rng.integers(0, slots - count + 1)),
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_the_executor_computes_what_the_emulated_network_does(
    rng: np.random.Generator, tmp_path: Path, sparse: bool
) -> None:
    policy = Sparsity(1.0, columns=0, top_k=1, dense_below=0, max_density=0.6) if sparse else None
    made = compiled(rng, tmp_path / "model", policy=policy, context=100 if sparse else 64)
    executor, other = opened(made, Trt(Cuda()), tmp_path), OnnxExecutor(made.network, made.model)
    assert executor.allocate(4) == other.allocate(4) == 4
    for slot in range(4):
        numbers = {k.input: rng.standard_normal(k.shape).astype(k.number) for k in made.network.kept}
        for each in (executor, other):
            each.write_slot(slot, {k.input: numbers[k.input].view(stored(k)) for k in made.network.kept})
    for way in rng.choice(["prefill", "decode"], 30):
        run = random_run(rng, made, way, 4)
        np.testing.assert_array_equal(executor.run(*run), other.run(*run))
    a, b = (int(s) for s in rng.permutation(4)[:2])
    for each in (executor, other):
        each.copy_slot(a, b, 7)
        each.clear_slot(a, 5)
        each.write_slot((a + 1) % 4, each.read_slot(b, 9))
    for slot in range(4):
        want = other.read_slot(slot, made.network.context)
        got = executor.read_slot(slot, made.network.context)
        assert got.keys() == want.keys()
        for name, array in got.items():
            np.testing.assert_array_equal(array, want[name], f"{name} of slot {slot}")


def test_a_run_sends_ids_and_brings_back_logits_and_nothing_else(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(cuda := Cuda())
    executor = opened(made, trt, tmp_path)
    executor.allocate(4)
    cuda.calls.clear()
    executor.run("decode", np.zeros((3, 1), int), np.zeros(3, int), np.arange(2), 1)
    assert {call[1] for call in cuda.named("cudaSetDevice")} == {3}
    assert [call[0] for call in cuda.calls if call[0] != "cudaSetDevice"] == [
        "cudaMemcpyAsync", "execute", "cudaMemcpyAsync", "cudaStreamSynchronize",
    ]  # fmt: skip
    up, down = cuda.named("cudaMemcpyAsync")
    assert up[4:] == ("up", 77)
    assert up[3] < 4096
    assert down[3:] == (2 * made.network.vocabulary * 4, "down", 77)
    assert down[2] == trt.contexts[1].addresses["logits"]


def test_a_cache_is_read_and_written_at_the_address_of_its_first_slot(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(Cuda())
    executor = opened(made, trt, tmp_path)
    executor.allocate(4)
    for way, first in (("prefill", 0), ("prefill", 2), ("decode", 2)):
        executor.run(way, np.zeros((1, 1), int), np.zeros(1, int), np.zeros(1, int), first)  # type: ignore[arg-type]
    zero, prefill, decode = (addresses for _, _, _, addresses in trt.calls)
    for kept in made.network.kept:
        assert prefill[kept.input] - zero[kept.input] == 2 * kept.nbytes
        assert prefill[kept.input] == prefill[kept.output] == decode[kept.input] == decode[kept.output]
    fixed = {"input_ids", "past", "rows", "logits"}
    assert {n: zero[n] for n in fixed} == {n: decode[n] for n in fixed}, "what TensorRT has recorded stays right"
    begins = sorted((zero[k.input], 4 * k.nbytes) for k in made.network.kept)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(begins))


def test_queries_share_one_place_that_holds_the_widest(made: Compiled, tmp_path: Path) -> None:
    assert made.network.queries
    trt = Trt(cuda := Cuda())
    opened(made, trt, tmp_path)
    for context in trt.contexts:
        (place,) = {context.addresses[f"query.{i}"] for i in range(len(made.network.queries))}
        most = made.network.prefill.tokens[2] + 126  # places that are nobody's in the first and the last block
        assert cuda.blocks[place][1] == max(made.network.queries) * most * 2


def test_an_address_is_bound_once(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(Cuda())
    executor = opened(made, trt, tmp_path)
    executor.allocate(4)

    def decode(count: int, first: int) -> list[str]:
        trt.contexts[1].set.clear()
        executor.run("decode", np.zeros((count, 1), int), np.zeros(count, int), np.arange(count), first)
        return trt.contexts[1].set

    kept = made.network.kept
    ends = [name for k in kept for name in (k.input, k.output)]
    decode(2, 0)
    assert decode(2, 0) == []
    assert decode(2, 1) == ends
    assert decode(1, 1) == ["input_ids", "past", "rows", *(k.input for k in kept)]


def test_both_contexts_share_memory_for_the_larger_of_their_activations(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(Cuda(), activations=(3000, 7000))
    opened(made, trt, tmp_path)
    prefill, decode = trt.contexts
    assert (prefill.profile, decode.profile) == (0, 1)
    assert prefill.memory == decode.memory
    assert prefill.memory is not None
    assert prefill.memory[1] == 7000
    assert trt.cuda.blocks[prefill.memory[0]][1] == 7000
    for context in trt.contexts:
        allocation = context.config.get_execution_context_allocation_strategy()
        assert allocation == Trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert context.config.cuda_graph_strategy == Trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        lazy = Trt.DynamicShapesKernelSpecializationStrategy.LAZY
        assert context.config.dynamic_shapes_kernel_specialization_strategy == lazy
    assert prefill.config.cache is decode.config.cache


def test_slots_take_a_share_of_what_is_free(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(cuda := Cuda())
    executor = opened(made, trt, tmp_path)
    slot = made.network.slot_bytes
    used = cuda.memory - cuda._cudaMemGetInfo()[0]
    cuda.memory = used + int(5.5 * slot / SHARE)
    assert executor.allocate(64) == 5
    assert cuda.memory - cuda._cudaMemGetInfo()[0] - used == sum(aligned(5 * k.nbytes) for k in made.network.kept)


def test_there_are_as_many_slots_as_fit_in_one_allocation(
    made: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = opened(made, Trt(cuda := Cuda()), tmp_path)
    largest = 3 * sum(aligned(k.nbytes) for k in made.network.kept)
    malloc = cuda._cudaMalloc

    def in_pieces(size: int) -> Any:
        return malloc(size) if size <= largest else (Status.OUT_OF_MEMORY, None)

    monkeypatch.setattr(cuda, "_cudaMalloc", in_pieces, raising=False)
    assert executor.allocate(8) in (2, 3)


def test_a_card_without_room_for_one_sequence_says_what_would_fit(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(cuda := Cuda())
    executor = opened(made, trt, tmp_path)
    used = cuda.memory - cuda._cudaMemGetInfo()[0]
    cuda.memory = used + int(0.25 * made.network.slot_bytes / SHARE) + 8
    with pytest.raises(DoesNotFit, match=r"A cache of 64 tokens takes .* on cuda:0.* context=16 or less"):
        executor.allocate(64)
    cuda.memory = used
    with pytest.raises(DoesNotFit, match="more memory"):
        executor.allocate(64)


@pytest.mark.parametrize("short", ["weights", "activations"])
def test_a_card_too_small_for_the_engine_is_refused_with_numbers(made: Compiled, tmp_path: Path, short: str) -> None:
    cuda = Cuda(memory=1000 if short == "weights" else 1 << 20)
    trt = Trt(cuda, activations=(4 << 30, 0))
    with pytest.raises(DoesNotFit, match=f"{short}.* GB, and cuda:0 has .* GB free"):
        opened(made, trt, tmp_path)


def test_the_engines_file_is_read_in_parts(made: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transom_tensorrt.rtx.READ_BYTES", 1000)
    trt = Trt(Cuda())
    opened(made, trt, tmp_path)
    assert max(trt.reads) == 1000
    assert sum(trt.reads) == made.model.stat().st_size


@pytest.mark.parametrize(
    ("found", "reason", "fix"),
    [
        (Diagnostics.VERSION_MISMATCH, "another version of TensorRT", "cache clear"),
        (Diagnostics.OLD_CUDA_DRIVER, "the driver is too old", "newer driver"),
        (Diagnostics.MALFORMED_ENGINE, "the file is damaged", "cache clear"),
        (None, "gives no reason", "cache clear"),
    ],
)
def test_an_engine_that_tensorrt_would_not_take_is_not_opened(
    made: Compiled, tmp_path: Path, found: Diagnostics | None, reason: str, fix: str
) -> None:
    trt = Trt(Cuda())
    trt.validity = Validity.INVALID, found.value if found else 0
    with pytest.raises(EngineError, match=reason) as error:
        opened(made, trt, tmp_path)
    assert fix in error.value.fix
    assert not trt.reads


def test_an_engine_that_is_merely_slower_is_opened(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(Cuda())
    trt.validity = Validity.SUBOPTIMAL, 0
    assert opened(made, trt, tmp_path).allocate(1) == 1


@pytest.mark.parametrize(
    ("refusing", "what"),
    [
        ("runtime", "start on cuda:0: CUDA initialization failure with error: 35"),
        ("deserialize", "open the engine of this model on cuda:0: then that"),
        ("context", "prepare the engine of this model on cuda:0: no context"),
        ("profile", "use the shapes"),
    ],
)
def test_an_error_while_opening_quotes_tensorrt(made: Compiled, tmp_path: Path, refusing: str, what: str) -> None:
    with pytest.raises(EngineError, match=what) as error:
        opened(made, Trt(Cuda(), refusing=refusing), tmp_path)
    assert "warning" not in str(error.value)
    if refusing == "deserialize":
        assert error.value.details == ("first this",)


class Contexts(list[Any]):
    """Keeps none, and notes beside CUDA's calls that one has gone."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def append(self, context: Any) -> None:
        weakref.finalize(context, self.cuda.calls.append, ("context gone",))


@pytest.mark.parametrize("why", ["names", "aligned", "memory", "context", "profile", "kernels"])
def test_a_failure_while_opening_leaves_no_engine_on_the_card(
    made: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """The host keeps the error, and its frames with it, while another backend loads."""
    cuda = Cuda()
    trt = Trt(cuda, refusing=why, activations=(4 << 30, 0) if why == "memory" else (5000, 3000))
    trt.contexts = Contexts(cuda)
    first, *others = made.network.kept
    if why == "names":
        made = replace(made, network=replace(made.network, kept=tuple(others)))
    elif why == "aligned":
        made = replace(made, network=replace(made.network, kept=(replace(first, shape=(1, 3, 17)), *others)))
    elif why == "kernels":
        monkeypatch.setattr(rtx_made_up._Config, "set_runtime_cache", lambda self, cache: 1 // 0)
    with pytest.raises((EngineError, DoesNotFit, ZeroDivisionError)) as kept:
        opened(made, trt, tmp_path)
    (engine,) = trt.engines
    assert engine() is None, kept
    assert cuda.calls.count(("context gone",)) == (why == "profile")


def test_contexts_are_freed_before_their_memory(made: Compiled, tmp_path: Path) -> None:
    for close in (True, False):
        trt = Trt(cuda := Cuda(), refusing="" if close else "profile")
        trt.contexts = Contexts(cuda)
        card = CudaCard(CARD, cuda)
        try:
            RtxExecutor(made.network, made.model, trt, card, KernelCache(tmp_path, "1", CARD)).close()
        except EngineError:
            card.close()
        names = [call[0] for call in cuda.calls if call[0] in ("context gone", "cudaFree", "cudaStreamDestroy")]
        contexts = 2 if close else 1
        assert names[:contexts] == ["context gone"] * contexts
        assert names[contexts] == "cudaFree"
        assert names[-1] == "cudaStreamDestroy"


@pytest.mark.parametrize("function", ["cudaSetDevice", "serialize"])
def test_an_executor_releases_a_card_after_a_fatal_error(
    made: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    trt = Trt(cuda := Cuda())
    trt.contexts = Contexts(cuda)
    executor = opened(made, trt, tmp_path)
    if function == "serialize":
        monkeypatch.setattr(rtx_made_up._Cache, "serialize", lambda self: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            executor.close()
    else:
        cuda.failing[function] = Status.LAUNCH_FAILED
        executor.close()
    assert trt.engines[0]() is None
    assert not cuda.blocks


def test_the_error_of_a_step_quotes_tensorrt_once(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(Cuda())
    executor = opened(made, trt, tmp_path)
    executor.allocate(1)
    run: Any = ("decode", np.zeros((1, 1), int), np.zeros(1, int), np.zeros(1, int), 0)
    trt.refusing = "execute"
    for _ in range(2):
        with pytest.raises(EngineError, match="cannot run a step: the card is on fire") as error:
            executor.run(*run)
        assert error.value.details == ()
    trt.refusing = "shape"
    with pytest.raises(EngineError, match="cannot take a step of 1 x 2 tokens"):
        executor.run("prefill", np.zeros((1, 2), int), np.zeros(1, int), np.zeros(1, int), 0)
    trt.refusing = ""
    trt.contexts[0].shapes.clear()
    executor.run("prefill", np.zeros((1, 2), int), np.zeros(1, int), np.zeros(1, int), 0)
    assert trt.contexts[0].shapes["input_ids"] == (1, 2), "all is bound anew after a step that could not be bound"


def test_an_engine_of_another_network_is_refused(made: Compiled, tmp_path: Path) -> None:
    other = replace(made.network, kept=made.network.kept[1:])
    trt = Trt(Cuda())
    with pytest.raises(EngineError, match="other inputs"):
        RtxExecutor(other, made.model, trt, CudaCard(CARD, trt.cuda), KernelCache(tmp_path, "1", CARD))


def test_slots_that_would_not_begin_at_aligned_addresses_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    made = compiled(rng, tmp_path)
    first, *others = made.network.kept
    odd = replace(made.network, kept=(replace(first, shape=(1, 3, 17)), *others))
    with pytest.raises(EngineError, match="are not aligned as TensorRT requires"):
        opened(replace(made, network=odd), Trt(Cuda()), tmp_path)


def test_a_missing_engine_is_a_damaged_model(made: Compiled, tmp_path: Path) -> None:
    made.model.unlink()
    with pytest.raises(EngineError, match="damaged"):
        opened(made, Trt(Cuda()), tmp_path)


def test_warming_up_runs_prefill_and_decode_and_leaves_no_token(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(Cuda())
    executor = opened(made, trt, tmp_path)
    executor.allocate(2)
    executor.warm_up()
    assert [profile for _, profile, _, _ in trt.calls] == [0] + [1] * WARM_RUNS
    assert not any(array.any() for array in executor.read_slot(0, made.network.context).values())


def test_classic_tensorrt_is_driven_by_the_same_calls(rng: np.random.Generator, made: Compiled, tmp_path: Path) -> None:
    trt = Trt(Cuda(), classic=True)
    executor, other = opened(made, trt, tmp_path), OnnxExecutor(made.network, made.model)
    executor.allocate(2)
    other.allocate(2)
    executor.warm_up()
    run = random_run(rng, made, "decode", 2)
    np.testing.assert_array_equal(executor.run(*run), other.run(*run))
    executor.close()
    assert not list(tmp_path.glob("*.cache"))


def test_the_fake_tensorrt_has_only_names_of_the_real_one() -> None:
    import tensorrt_rtx

    for made_up, real in (
        (rtx_made_up._Runtime, "Runtime"),
        (rtx_made_up._Engine, "ICudaEngine"),
        (rtx_made_up._ClassicConfig, "IRuntimeConfig"),
        (rtx_made_up._Config, "IRuntimeConfig"),
        (rtx_made_up._Cache, "IRuntimeCache"),
        (rtx_made_up._Context, "IExecutionContext"),
        (Trt.SeekPosition, "SeekPosition"),
        (Trt.CudaGraphStrategy, "CudaGraphStrategy"),
        (Trt.ExecutionContextAllocationStrategy, "ExecutionContextAllocationStrategy"),
        (Trt.DynamicShapesKernelSpecializationStrategy, "DynamicShapesKernelSpecializationStrategy"),
        (Validity, "EngineValidity"),
        (Diagnostics, "EngineInvalidityDiagnostics"),
    ):
        names = {name for name in vars(made_up) if not name.startswith("_")}
        assert names <= set(dir(getattr(tensorrt_rtx, real))), real


def test_the_real_tensorrt_reports_a_meaningless_file_as_damaged(tmp_path: Path) -> None:
    """This needs no card."""
    import tensorrt_rtx

    plan = tmp_path / "engine.plan"
    plan.write_bytes(bytes(range(200)))
    runtime = tensorrt_rtx.Runtime(ErrorLog(tensorrt_rtx).logger)
    with pytest.raises(EngineError, match=r"TensorRT [0-9.]+ does not open the engine.*: the file is damaged"):
        _check_header(runtime, tensorrt_rtx, plan)


# kernels --------------------------------------------------------------------------------------------------------------
def kernel_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("kernels-*"))


def test_kernels_are_kept_after_warming_up_and_read_by_the_next(made: Compiled, tmp_path: Path) -> None:
    first = Trt(Cuda())
    executor = opened(made, first, tmp_path)
    executor.allocate(2)
    assert not kernel_files(tmp_path)
    executor.warm_up()
    assert len(kernel_files(tmp_path)) == 1
    second = Trt(Cuda())
    executor = opened(made, second, tmp_path)
    assert second.kernels == first.kernels != set()
    (path,) = kernel_files(tmp_path)
    path.unlink()
    executor.close()
    assert not kernel_files(tmp_path), "what was read is not written again"


def test_kernels_of_later_steps_are_kept_on_closing(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(cuda := Cuda())
    executor = opened(made, trt, tmp_path)
    executor.allocate(2)
    executor.warm_up()
    (path,) = kernel_files(tmp_path)
    before = path.read_bytes()
    executor.run("decode", np.zeros((2, 1), int), np.zeros(2, int), np.arange(2), 0)
    executor.close()
    executor.close()
    assert path.read_bytes() != before
    assert kernel_files(tmp_path) == [path]
    gc.collect()
    assert not cuda.blocks


def test_kernels_that_were_read_are_not_written_again(made: Compiled, tmp_path: Path) -> None:
    executor = opened(made, Trt(Cuda()), tmp_path)
    executor.allocate(2)
    executor.warm_up()
    (path,) = kernel_files(tmp_path)
    path.unlink()
    executor.close()
    assert not kernel_files(tmp_path)


def test_kernels_of_another_version_or_driver_are_removed_unread(made: Compiled, tmp_path: Path) -> None:
    for version, device in (("1.6", CARD), ("1.7.1.116", replace(CARD, drivers={"nvidia": "1"}))):
        KernelCache(tmp_path, version, device).path.write_text('["foreign"]')
    assert len(kernel_files(tmp_path)) == 2
    trt = Trt(Cuda())
    executor = opened(made, trt, tmp_path)
    executor.allocate(1)
    executor.warm_up()
    assert "foreign" not in trt.kernels
    assert len(kernel_files(tmp_path)) == 1


def test_cards_of_one_kind_share_kernels_and_those_of_another_kind_keep_theirs(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(Cuda())
    mine, twin = (KernelCache(tmp_path, trt.__version__, card).path for card in (CARD, OTHER))
    assert mine == twin
    others = [replace(CARD, name="RTX 4080"), replace(CARD, arch="sm_86")]
    theirs = [KernelCache(tmp_path, trt.__version__, card).path for card in others]
    for path in theirs:
        path.write_text("theirs")
    executor = opened(made, trt, tmp_path)
    executor.allocate(1)
    executor.warm_up()
    assert kernel_files(tmp_path) == sorted([mine, *theirs])
    assert {path.read_text() for path in theirs} == {"theirs"}


def test_kernels_that_tensorrt_does_not_take_are_compiled_again(made: Compiled, tmp_path: Path) -> None:
    trt = Trt(Cuda())
    path = KernelCache(tmp_path, trt.__version__, CARD).path
    path.write_bytes(b"nonsense")
    executor = opened(made, trt, tmp_path)
    executor.allocate(1)
    executor.warm_up()
    assert path.read_bytes() != b"nonsense"


def test_kernels_that_cannot_be_written_to_disk_are_no_error(
    made: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transom_tensorrt.kernel_cache.replace_atomically", full)
    executor = opened(made, Trt(Cuda()), tmp_path)
    executor.allocate(1)
    executor.warm_up()
    assert "No space left" in caplog.text
    executor.close()


def test_no_file_is_written_if_tensorrt_gives_no_kernels(made: Compiled, tmp_path: Path) -> None:
    executor = opened(made, Trt(Cuda(), refusing="cache"), tmp_path)
    executor.allocate(1)
    executor.warm_up()
    executor.close()
    assert not kernel_files(tmp_path)
