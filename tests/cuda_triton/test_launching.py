"""Starting compiled kernels through the CUDA driver: what it is called with, on a driver that is made up."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest
import torch

from transom.errors import EngineError
from transom_cuda_triton.launching import DriverLauncher, packed
from transom_cuda_triton.variants import Code, KernelVariant

VARIANT = KernelVariant.of(
    "gate.gate", {"X": "*fp16", "rows": "i32", "x_token": "i32", "factor": "fp32"}, {"WIDTH": 64}
)
CODE = Code("gate", b"cubin", 60 << 10, 4, ("X", "rows", "x_token", "factor"), ("u64", "u32", "u32", "f32", "u64"))
X = torch.zeros(64, dtype=torch.float16)
GIVEN = {"X": X, "rows": 5, "x_token": 32, "factor": 1.5}


class Library:
    """The driver's functions, which note what they are called with and give what they are told to."""

    def __init__(self, **status: int) -> None:
        self.status, self.calls = status, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"no kernel image is available"
                return 0
            self.calls.append((name, arguments))
            if name == "cuLaunchKernel":
                values = [ctypes.cast(p, ctypes.POINTER(k)).contents.value for p, k in zip(
                    arguments[9], (ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_float, ctypes.c_uint64),
                    strict=True,
                )]  # fmt: skip
                self.values = values
            return self.status.get(name, 0)

        return call


def driver(library: Library) -> DriverLauncher:
    return DriverLauncher({VARIANT: CODE}, lambda: 77, library)


def test_arguments_are_passed_in_the_order_of_the_parameters() -> None:
    library = Library()
    driver(library)(VARIANT, (3, 2), GIVEN)
    name, arguments = library.calls[-1]
    assert name == "cuLaunchKernel"
    assert arguments[1:8] == (3, 2, 1, 128, 1, 1, 60 << 10)
    assert arguments[8].value == 77, "the stream"
    assert library.values == [X.data_ptr(), 5, 32, 1.5, 0], "what is Triton's own is null"


def test_much_shared_memory_is_asked_for_first() -> None:
    library = Library()
    driver(library)
    called = [name for name, _ in library.calls]
    assert called == ["cuCtxGetCurrent", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"]


def test_each_thread_takes_the_context_once() -> None:
    """One that has not called CUDA's runtime has none."""
    library = Library()
    opened = driver(library)
    for _ in range(2):
        thread = threading.Thread(target=lambda: [opened(VARIANT, (1,), GIVEN) for _ in range(3)])
        thread.start()
        thread.join()
    called = [name for name, _ in library.calls]
    assert called.count("cuCtxSetCurrent") == 2
    assert called.count("cuLaunchKernel") == 6


@pytest.mark.parametrize("failing", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"])
def test_what_the_driver_says_is_passed_on(failing: str) -> None:
    library = Library(**{failing: 209})
    with pytest.raises(EngineError, match="no kernel image is available"):
        driver(library)(VARIANT, (1,), GIVEN)


@pytest.mark.parametrize("wrong", [{"X": X[1:]}, {"x_token": 33}], ids=["pointer", "stride"])
def test_what_is_not_aligned_is_refused(wrong: dict[str, Any]) -> None:
    """Compiled code would read elsewhere."""
    library = Library()
    with pytest.raises(EngineError, match="not aligned"):
        driver(library)(VARIANT, (1,), {**GIVEN, **wrong})
    assert library.calls[-1][0] != "cuLaunchKernel"


def test_a_variant_that_was_not_compiled_is_refused() -> None:
    other = KernelVariant.of("gate.gate", dict(VARIANT.types), {"WIDTH": 128})
    with pytest.raises(EngineError, match=r"lacks a variant of gate\.gate"):
        driver(Library())(other, (1,), GIVEN)


def test_an_empty_grid_starts_nothing() -> None:
    library = Library()
    driver(library)(VARIANT, (3, 0), GIVEN)
    assert "cuLaunchKernel" not in [name for name, _ in library.calls]


def test_closing_unloads_once() -> None:
    library = Library()
    opened = driver(library)
    opened.close()
    opened.close()
    assert [name for name, _ in library.calls].count("cuModuleUnload") == 1


def test_an_argument_that_is_missing_is_found() -> None:
    with pytest.raises(KeyError):
        packed(CODE, {"X": X})
