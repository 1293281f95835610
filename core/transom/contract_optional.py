"""Optional protocols: what a backend or a session may implement beyond `transom.contract`.

Each protocol is independent of the others. The host tests for it with `isinstance`, so it is enough to have the
methods. Each docstring names the rule that the host follows for a backend or a session without the protocol.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from transom.contract import Backend, Device, Session, State, Tensor, Verdict

if TYPE_CHECKING:
    from transom.graph.weights import Blocked
    from transom.signature import Decoder


# sessions -------------------------------------------------------------------------------------------------------------
@runtime_checkable
class SparseSession(Session, Protocol):
    """A session that obeys `Work.sparsity` and counts the keys that it reads. Since API 1.1.

    Attention that has a bias or is not causal stays dense under every policy. A text that is not a policy for this
    model raises ValueError before anything runs. A session without this protocol must raise ValueError for a work that
    names a policy (`transom.sessions.check_step` does).
    """

    def keys_read(self, state: State) -> Tensor:
        """float64 [2, layers, kv_heads], summed over the state's tokens since it was made or forked: the keys that its
        steps have read, and the keys that dense attention would have read.

        All tokens of a block that selects keys together have the same counts: the keys that its last token read, and
        the keys that any of its tokens can see. KV heads that a layer does not have are 0. Raises RuntimeError for a
        freed state.
        """
        ...


@runtime_checkable
class SavingSession(Session, Protocol):
    """A session that can save its states and restore them, also in another process that loaded the same artifact. The
    host then offers prompt caches on disk; without this protocol it offers none. Since API 1.2.
    """

    def save(self, state: State) -> Mapping[str, Tensor]:
        """The whole content of the state as arrays by name. Raises RuntimeError for a freed state."""
        ...

    def restore(self, length: int, arrays: Mapping[str, Tensor]) -> State:
        """Make a state of `length` tokens from the arrays that `save` returned. The session owns the arrays afterwards.

        Raises ValueError for arrays that do not belong to a state of this length, OutOfPages when the pool is too
        small.
        """
        ...


# bundles --------------------------------------------------------------------------------------------------------------
@runtime_checkable
class AppBackend(Backend, Protocol):
    """A backend whose bundles are opened by apps that do not have Transom. Without this protocol, a bundle has no files
    of the backend besides its artifacts. Since API 1.5."""

    def app_files(
        self, manifest: Mapping[str, Any], variant: Mapping[str, Any], texts: Mapping[str, bytes]
    ) -> Mapping[str, bytes]:
        """Files for the root of a bundle, by name. The result depends on the arguments alone.

        Args:
            manifest: the content of the bundle's `manifest.json`, without `files` and `variants`.
            variant: the object of this backend's variant in the manifest.
            texts: the bundle's text files by name: `tokenizer.json`, `tokenizer_config.json`, `generation.json`, …

        The text returned as `README.md` becomes a section of the bundle's own README, which is for the developer of an
        app. It begins with a heading of the second level.
        """
        ...


@runtime_checkable
class FittingBackend(Backend, Protocol):
    """A backend that decides from a bundle's manifest which devices can run a variant. Without this protocol, a variant
    fits devices with the architecture of its target. Since API 1.6."""

    def fits(self, variant: Mapping[str, Any], device: Device) -> Verdict:
        """Whether a device can run a variant. The device need not be this machine's. The host compares the memory.

        The rule reads no file and does not depend on what is installed, so that programs in other languages can
        implement it too.

        Args:
            variant: the object of this backend's variant in the manifest.

        Returns `"ok"` or `"never"`, with the reason as a sentence without a full stop. `"ok"` needs no reason.
        """
        ...


@runtime_checkable
class LibraryBackend(Backend, Protocol):
    """A backend whose apps need native libraries for a processor other than the CPU. Without this protocol, every
    library of an app counts as one for the CPU. Since API 1.6."""

    def machine_of(self, library: str) -> str:
        """The processor that a native library is compiled for, by the library's file name.

        `"hexagon"` is Qualcomm's DSP; `transom.bundles.native_libraries` has the names. Empty: the CPU, or not a
        library of this backend.

        A library for another processor lies in the folder of the CPU's ABI. Android has to extract it from the package,
        because that processor can open only files.
        """
        ...


# the plan of an export ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MatrixForm:
    """How the numbers of a matrix are stored."""

    bits: float
    """Bits of one number, scales excluded."""
    block: int = 0
    """Numbers of a row that share a scale. 0: there is at most one scale per row."""
    scale: float = 0
    """Bytes of a block's scale, with its minimum or zero point."""
    row: int = 0
    """Additional bytes of each row."""
    packed: float = 1.0
    """Bytes in memory for each byte in the file."""

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes in the file."""
        blocks = -(-columns // self.block) if self.block else 0
        return rows * (math.ceil(columns * self.bits / 8 + blocks * self.scale) + self.row)

    def __str__(self) -> str:
        block = f", {self.scale:g} bytes for each {self.block} of them" if self.block else ""
        row = f", {self.row} bytes for each row" if self.row else ""
        return f"{self.bits:.3g} bits a number{block}{row}"


@dataclass(frozen=True)
class KeptBlocks:
    """How a format stores matrices that are quantized in blocks in the checkpoint."""

    form: Callable[[Blocked], MatrixForm | None]
    """Returns the form of a matrix that keeps its blocks; None when the format cannot keep them."""
    other: MatrixForm
    """The form of a matrix whose blocks cannot be kept."""
    note: str = ""
    """The size of kept scales, human-readable: `"scales and minimums of 4 bytes each"`."""


@dataclass(frozen=True)
class Published:
    """A speed published by others. A plan shows it beside its own bound."""

    model: str
    target: str
    """The target's name in the catalogue, without `remote:`."""
    device: str
    tokens_per_second: float
    context: int
    """Tokens that the engine was compiled for; 0: not known."""
    vocabulary: int
    source: str

    def __str__(self) -> str:
        context = f", context {self.context}" if self.context else ""
        return f"{self.tokens_per_second:g} tokens/s on {self.device}: {self.model}{context} ({self.source})"


@dataclass(frozen=True)
class StorageForm:
    """How a format stores and reads a decoder on one device. The plan of an export counts bytes by it."""

    format: str
    """The backend's name."""
    precision: str
    """The precision that `"auto"` resolved to, or the one that was given."""
    products: MatrixForm
    vocabulary: MatrixForm
    embedding: MatrixForm
    rest: int
    """Bytes of one number in norms and biases."""
    cache: float
    """Bytes of one number in the cache."""
    chunk: int
    """Tokens of a prefill step."""
    static: bool = False
    """Shapes are fixed: every step reads the whole cache, including unfilled positions and those outside a window."""
    small: MatrixForm | None = None
    """The form of products with at most `small_share` of the weights of their layer, such as keys and values under
    grouped-query attention. None: as other products."""
    small_share: float = 0.0
    ragged: MatrixForm | None = None
    """The form of a matrix whose columns are not a multiple of a block. None: the format refuses such a matrix."""
    instead: str = ""
    """The precision to suggest when the format refuses such a matrix."""
    kept: KeptBlocks | None = None
    """How matrices in blocks are stored. None: they are quantized again, like plain matrices."""
    copies: int = 1
    """Copies of each matrix of a product, in files and in memory. A token reads one of them."""
    attention_twice: Literal["no", "up to half", "half"] = "no"
    """The share of attention's products that is stored twice, because the graphs for prefill and decoding cannot share
    it. The plan counts `"half"`; for `"up to half"` it adds a note."""
    layer: int = 0
    """Bytes of the compiled code of one layer."""
    part_bytes: int = 0
    """The most bytes of weights in one compiled part. 0: the model is compiled as one part."""
    file: str = ""
    """Name of the file with the weights of a part; `{target}` stands for the target's name and `{part}` for the part's
    number. Empty: the format's name."""
    mapped_table: str = ""
    """Name of the memory-mapped file with the embedding table, which takes no memory of its own. Empty: the table is
    stored with the other weights."""
    shares_table: bool = False
    """A vocabulary matrix that is also the embedding table is stored once."""
    activations: int = 16
    """Activations of one token in a step, logits excluded, as a multiple of the hidden size."""
    every_logit: bool = False
    """A step computes the logits of all its tokens."""
    published: tuple[Published, ...] = ()
    """Figures published by others for models of this shape."""

    @property
    def name(self) -> str:
        return f"{self.format}, {self.precision}"


@runtime_checkable
class PlanningBackend(Backend, Protocol):
    """A backend that knows how it stores a decoder before it compiles one. Without this protocol, a plan uses the
    host's general estimate. Since API 1.6."""

    def storage_form(self, decoder: Decoder, device: Device, precision: str) -> StorageForm:
        """Return how a decoder would be stored for a device. Needs no SDK.

        Args:
            decoder: the sizes of the model.
            precision: as in `transom.contract.Options`.

        Raises:
            OptionError: the format does not support the precision, or not on this device.
        """
        ...
