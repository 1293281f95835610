"""What a backend or a session may do beyond `transom.contract`. Each protocol stands for itself; none is required.

The host asks with `isinstance`, so it is enough to have the methods. For a backend or a session without them the host
follows a general rule, which each protocol names.
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
    """A session that obeys `Work.sparsity` and counts the keys it reads. Optional; the host asks with `isinstance`.

    Attention with a bias, or that is not causal, stays dense whatever a work says. A text that is no policy for this
    model raises ValueError before anything runs. Another session owes its host a ValueError for a work that names a
    policy (`transom.sessions.check_step` raises it). Since API 1.1.
    """

    def keys_read(self, state: State) -> Tensor:
        """float64 [2, layers, kv_heads]: keys that the state's steps have read since it was made or forked, and keys
        that dense attention would have read, summed over its tokens.

        The tokens of a block that chooses together count alike: what its last one read, among the keys that any of them
        sees. KV heads that a layer does not have are 0. A state that was freed raises RuntimeError.
        """
        ...


@runtime_checkable
class SavingSession(Session, Protocol):
    """A session whose states can be written down and made again, also in another process that loaded the same artifact.
    Optional; the host asks with `isinstance`, and offers prompt caches on disk with it. Since API 1.2.
    """

    def save(self, state: State) -> Mapping[str, Tensor]:
        """All that the state holds, by name. A state that was freed raises RuntimeError."""
        ...

    def restore(self, length: int, arrays: Mapping[str, Tensor]) -> State:
        """A state of so many tokens out of what `save` gave. The arrays are the session's from then on.

        Raises ValueError for arrays that are not those of such a state, OutOfPages when the pool is too small.
        """
        ...


# bundles --------------------------------------------------------------------------------------------------------------
@runtime_checkable
class AppBackend(Backend, Protocol):
    """A backend whose bundles are opened by apps without Transom. Optional; the host asks with `isinstance`. Since API
    1.5."""

    def app_files(
        self, manifest: Mapping[str, Any], variant: Mapping[str, Any], texts: Mapping[str, bytes]
    ) -> Mapping[str, bytes]:
        """Files for the root of a bundle, by name; a plain function of what it is given.

        Args:
            manifest: the bundle's, as `manifest.json` will have it, but without `files` and `variants`.
            variant: the object of this backend's variant, as in the manifest.
            texts: the bundle's text files: `tokenizer.json`, `tokenizer_config.json`, `generation.json`, …

        What it returns as `README.md` is not written as it is: it becomes a part of the bundle's own, which is for the
        developer of an app; it begins with a heading of the second level.
        """
        ...


@runtime_checkable
class FittingBackend(Backend, Protocol):
    """A backend that tells from a bundle's manifest which devices a variant is for. Without this protocol, the variant
    is for devices with the architecture of its target. Since API 1.6."""

    def fits(self, variant: Mapping[str, Any], device: Device) -> Verdict:
        """Whether a variant is for a device, which need not be here. Memory is the host's to compare.

        Looks at no file and at nothing that is installed, so that programs in other languages can have the same rule.

        Args:
            variant: the object of this backend's variant, as in the manifest.

        Returns `"ok"` or `"never"`, with the reason as a sentence without a full stop; an `"ok"` needs none.
        """
        ...


@runtime_checkable
class LibraryBackend(Backend, Protocol):
    """A backend whose apps need native libraries for a processor other than the CPU. Without this protocol, each
    library of an app is for the CPU. Since API 1.6."""

    def machine_of(self, library: str) -> str:
        """What a native library is compiled for, by its file name: `"hexagon"` for Qualcomm's DSP, as
        `transom.bundles.native_libraries` names machines; empty: the CPU, or a library of somebody else.

        Such a library lies in the folder of the CPU's ABI. Android has to extract it from the package, because its
        processor opens files only.
        """
        ...


# the plan of an export ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MatrixForm:
    """How the numbers of a matrix are stored."""

    bits: float
    block: int = 0
    """Numbers of a row that share a scale; 0: no scale but that of the row."""
    scale: float = 0
    """Bytes of a block's scale, with its minimum or zero point."""
    row: int = 0
    """Bytes that each row takes besides."""
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
    """How a format stores matrices that the checkpoint has in blocks of integers."""

    form: Callable[[Blocked], MatrixForm | None]
    """The form of a matrix that keeps its blocks; None where the format cannot keep them."""
    other: MatrixForm
    """The form of a matrix whose blocks cannot be kept."""
    note: str = ""
    """The size of kept scales, for people: `"scales and minimums of 4 bytes each"`."""


@dataclass(frozen=True)
class Published:
    """A speed that somebody else has published. A plan shows it beside its bound."""

    model: str
    target: str
    """A name of the catalogue, without `remote:`."""
    device: str
    tokens_per_second: float
    context: int
    """Tokens that the engine was made for; 0: not known."""
    vocabulary: int
    source: str

    def __str__(self) -> str:
        context = f", context {self.context}" if self.context else ""
        return f"{self.tokens_per_second:g} tokens/s on {self.device}: {self.model}{context} ({self.source})"


@dataclass(frozen=True)
class StorageForm:
    """How a format stores and reads a whole decoder on one device: what the plan of an export counts."""

    format: str
    """The backend's name."""
    precision: str
    """What `"auto"` became."""
    products: MatrixForm
    vocabulary: MatrixForm
    embedding: MatrixForm
    rest: int
    """Bytes of a number of norms and biases."""
    cache: float
    """Bytes of a number in the cache."""
    chunk: int
    """Tokens of a prefill step."""
    static: bool = False
    """Shapes are fixed: a step reads all places of the cache, filled or not, windows or not."""
    small: MatrixForm | None = None
    """The form of products with at most `small_share` of the weights of their layer, such as keys and values where
    query heads share them; None: that of the others."""
    small_share: float = 0.0
    ragged: MatrixForm | None = None
    """The form of a matrix whose columns are not a multiple of a block; None: it is refused."""
    instead: str = ""
    """The precision to use where such a matrix is refused."""
    kept: KeptBlocks | None = None
    """None: blocks of the checkpoint are quantized again, like plain matrices."""
    copies: int = 1
    """How often each matrix of a product is stored, in files and in memory. A token reads one copy."""
    attention_twice: Literal["no", "up to half", "half"] = "no"
    """How much of attention's products is stored twice, because the graphs for prefill and decoding cannot share it.
    `"half"` is counted; `"up to half"` becomes a note."""
    layer: int = 0
    """Bytes of a layer's compiled code."""
    part_bytes: int = 0
    """Bytes of weights that one compiled part may have; 0: all are in one."""
    file: str = ""
    """Name of the file with the weights of a part, where `{target}` stands for the target's name and `{part}` for the
    part's number; empty: the format's name."""
    mapped_table: str = ""
    """Name of a file that holds the table of embeddings. It is mapped, and takes no memory of its own. Empty: the table
    is with the other weights."""
    shares_table: bool = False
    """A vocabulary matrix that is also the table of embeddings is stored once."""
    activations: int = 16
    """Numbers that a token of a step takes besides its logits, for each number of the hidden state."""
    every_logit: bool = False
    """A step makes logits of all its tokens."""
    published: tuple[Published, ...] = ()
    """Figures of others for models of this shape."""

    @property
    def name(self) -> str:
        return f"{self.format}, {self.precision}"


@runtime_checkable
class PlanningBackend(Backend, Protocol):
    """A backend that knows how it stores a decoder before it compiles one. Without this protocol, a plan counts the
    bytes that the host plans for any backend. Since API 1.6."""

    def storage_form(self, decoder: Decoder, device: Device, precision: str) -> StorageForm:
        """How a decoder would be stored for a device. Needs no SDK.

        Args:
            decoder: sizes of the model.
            precision: as in `transom.contract.Options`.

        Raises:
            OptionError: the format does not have the precision, or not on this device.
        """
        ...
