"""One card through a made-up CUDA runtime: the calls, and the errors when a call fails.

Draws: the numbers are only carried along; what is checked does not depend on them.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from rtx_made_up import CARD, OTHER, Cuda, Status

from transom.errors import EngineError, MissingExtra
from transom_tensorrt.cuda import CudaCard, OutOfMemory


def test_a_card_is_found_by_its_address() -> None:
    cuda = Cuda()
    card = CudaCard(CARD, cuda)
    assert ("cudaSetDevice", 3) in cuda.calls
    assert ("cudaStreamCreateWithFlags", 1) in cuda.calls, "one that does not wait for the default stream"
    assert card.stream == 77


def test_a_card_that_cuda_does_not_show_is_an_error() -> None:
    cuda = Cuda()
    with pytest.raises(EngineError, match="CUDA does not show cuda:0"):
        CudaCard(replace(CARD, identity="pci:0000:17:00.0 other"), cuda)
    assert cuda.last == 0


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtra, match=r"transom\[tensorrt\]"):
        CudaCard(CARD)


def test_each_of_two_cards_gives_its_own_memory_in_whatever_thread() -> None:
    cuda = Cuda()
    cards = {3: CudaCard(CARD, cuda), 4: CudaCard(OTHER, cuda)}
    given: list[tuple[int, int]] = []

    def take() -> None:
        for number in (3, 4, 3, 3, 4):
            given.append((number, cards[number].allocate(8)))
            cuda.cudaSetDevice(0)  # as somebody else in this thread may

    take()
    for _ in range(2):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    assert len(given) == 15
    assert [cuda.placed[pointer] for _, pointer in given] == [number for number, _ in given]


def test_every_call_selects_the_card_first() -> None:
    cuda = Cuda()
    card, other = CudaCard(CARD, cuda), CudaCard(OTHER, cuda)
    pointer, rows = card.allocate(20), np.zeros((1, 20), np.uint8)
    pinned = card.pinned((20,), np.uint8)
    for ask in (
        card.free_bytes, card.wait, lambda: card.pinned((1,), np.uint8),
        lambda: card.upload(pointer, pinned.pointer, 20), lambda: card.download(pinned.pointer, pointer, 20),
        lambda: card.copy_rows(pointer, pointer, 20, 20, 1), lambda: card.clear_rows(pointer, 20, 20, 1),
        lambda: card.upload_rows(pointer, 20, rows), lambda: card.download_rows(rows, pointer, 20), card.close,
    ):  # fmt: skip
        other.use()
        ask()
        assert cuda.current == 3


def test_closing_after_a_fatal_card_error_raises_nothing() -> None:
    """An error that is under way would be hidden."""
    cuda = Cuda()
    card = CudaCard(CARD, cuda)
    card.allocate(10)
    cuda.failing["cudaSetDevice"] = Status.LAUNCH_FAILED
    card.close()
    assert not cuda.blocks
    assert cuda.calls[-1][0] == "cudaStreamDestroy"


def test_memory_is_zeroed_and_freed() -> None:
    cuda = Cuda()
    card = CudaCard(CARD, cuda)
    pointer = card.allocate(1000)
    found = np.ones(1000, np.uint8)
    card.download_rows(found.reshape(1, -1), pointer, 1000)
    assert not found.any()
    pinned = card.pinned((3, 5), np.float32)
    assert pinned.array.shape == (3, 5)
    assert pinned.array.ctypes.data == pinned.pointer
    card.close()
    card.close()
    assert [c[0] for c in cuda.calls[-3:]] == ["cudaFree", "cudaFreeHost", "cudaStreamDestroy"]
    assert not cuda.blocks


def test_a_failed_allocation_leaves_no_pending_cuda_error() -> None:
    cuda = Cuda(memory=1000)
    with pytest.raises(OutOfMemory):
        CudaCard(CARD, cuda).allocate(1001)
    assert cuda.last == 0, "TensorRT asks CUDA for the last error, too"


def test_rows_are_copied_and_cleared_up_to_their_width(rng: np.random.Generator) -> None:
    card = CudaCard(CARD, Cuda())
    a, b = card.allocate(60), card.allocate(60)
    rows = rng.integers(1, 255, (3, 20)).astype(np.uint8)
    card.upload_rows(a, 20, rows)
    card.copy_rows(b, a, 20, 8, 3)
    card.clear_rows(b + 2, 20, 3, 3)
    got = np.zeros((3, 20), np.uint8)
    card.download_rows(got, b, 20)
    want = rows.copy()
    want[:, 8:] = 0
    want[:, 2:5] = 0
    np.testing.assert_array_equal(got, want)


def test_empty_rows_need_no_cuda_call() -> None:
    cuda = Cuda()
    card = CudaCard(CARD, cuda)
    card.copy_rows(256, 512, 20, 0, 3)
    card.clear_rows(256, 20, 0, 3)
    card.download_rows(np.zeros((3, 0), np.uint8), 256, 20)
    assert not cuda.named("cudaMemcpy2DAsync", "cudaMemset2DAsync")


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("cudaSetDevice", "use the card"),
        ("cudaStreamCreateWithFlags", "make a stream"),
        ("cudaMemGetInfo", "say how much memory is free"),
        ("cudaMalloc", "give 10 bytes"),
        ("cudaMallocHost", "pin 80 bytes"),
        ("cudaMemcpyAsync", "copy to the card"),
        ("cudaStreamSynchronize", "finish its work"),
    ],
)
def test_an_error_quotes_cuda(function: str, what: str) -> None:
    def work() -> None:
        card = CudaCard(CARD, Cuda(**{function: Status.LAUNCH_FAILED}))
        card.free_bytes()
        pointer = card.allocate(10)
        pinned = card.pinned((10,), np.int64)
        card.upload(pointer, pinned.pointer, 10)
        card.wait()

    with pytest.raises(EngineError) as error:
        work()
    assert f"cuda:0 cannot {what}" in error.value.cause
    assert "launch failed (CUDA 719)" in error.value.cause
    assert "nvidia-smi" in error.value.fix


def test_the_fake_cuda_has_only_functions_of_the_real_one() -> None:
    from cuda.bindings import runtime

    functions = {name.removeprefix("_") for name in vars(Cuda) if name.startswith("_cuda")}
    assert len(functions) > 10
    for name in (*functions, "cudaSetDevice", "cudaStreamSynchronize", "cudaStreamDestroy", "cudaFreeHost"):
        assert callable(getattr(runtime, name))
    for kind in vars(Cuda.cudaMemcpyKind):
        assert hasattr(runtime.cudaMemcpyKind, kind)
    assert int(runtime.cudaError_t.cudaErrorMemoryAllocation) == Status.OUT_OF_MEMORY
    assert runtime.cudaStreamNonBlocking == 1


def test_the_real_cuda_explains_why_an_absent_card_is_missing() -> None:
    """With or without a driver."""
    with pytest.raises(EngineError, match=r"cuda:0 \(pci:ffff:7f:1f.0 none\).*\(CUDA \d+\)"):
        CudaCard(replace(CARD, identity="pci:ffff:7f:1f.0 none"))
