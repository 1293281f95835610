"""What a backend implements: five methods, API 1.6. Imports no torch and no vendor SDK.

A plugin is anything with a `transom_backends` hook, found through the entry-point group `transom.backends`. The hook
returns backends; a backend answers `probe`, `claim`, `compile`, `check` and `load`, and a loaded artifact is a
`Session`. What a backend or a session may do besides is in `transom.contract_optional`. Everything that is convenience
rather than contract lives in host helpers (`transom.sessions`).

Arrays cross this boundary as `Tensor`: anything NumPy can read, through DLPack or the array protocol. Output arrays
belong to the caller: a session must not write to them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import pluggy

if TYPE_CHECKING:
    from transom.contract_optional import AppBackend as AppBackend
    from transom.contract_optional import SavingSession as SavingSession
    from transom.contract_optional import SparseSession as SparseSession
    from transom.graph import Graph
    from transom.ops import OpSchema

API_VERSION = (1, 6)
"""A backend is accepted when `backend.api[0] == API_VERSION[0]` and `backend.api[1] <= API_VERSION[1]`."""

ENTRY_POINT_GROUP = "transom.backends"

hookspec = pluggy.HookspecMarker("transom")
hookimpl = pluggy.HookimplMarker("transom")

Options = Mapping[str, object]
"""What the user asked for. The host always gives four keys, and a backend ignores those that it does not know:

- `precision`: `"auto"`, `"exact"`, `"fast"`, `"f32"`, `"bf16"`, `"f16"`, `"int8"`, `"fp8"` or `"int4"`. What they mean
  is the backend's to say, in `Artifact.notes`. For one that it cannot give, `claim` raises
  `transom.errors.OptionError`;
- `context`: int, the tokens that a state must hold, as the host has planned them; None: the model's own;
- `threads`: int, processor threads to use; None: as many as `Device.cores` says;
- `calibration`: a sequence of texts, each a sequence of token ids within the vocabulary and no longer than the context,
  for a backend that rounds activations and has to see some. Given to `claim` and `compile` alone, and empty for a model
  without a tokenizer; empty for `load`. Since API 1.4.
"""
Tensor = Any
Progress = Callable[[str, float | None], None]
"""Called with (stage, share done in 0..1 or None when unknown). May raise `Cancelled`; let it pass."""


class Cancelled(Exception):
    """The user asked to stop. Raised out of a `Progress` call; nothing half-done may be left behind."""


class OutOfPages(RuntimeError):
    """A step did not fit the cache pool. Nothing has changed: the host preempts and tries again."""


@dataclass(frozen=True)
class Device:
    """One piece of hardware, as the host's one probe found it. A backend judges it and never detects again."""

    kind: Literal["cpu", "cuda", "gpu", "npu", "remote"]
    id: str
    """`"cpu"`, `"cuda:0"`, `"gpu:0"`, `"npu:0"`, `"remote:snapdragon-8-gen-2"`."""
    arch: str
    """`"x86_64"`, `"sm_70"`, `"hexagon_v73"`."""
    memory_bytes: int
    """Memory the device may use (a cgroup's limit applied); 0: not known, as for a phone that is only compiled for."""
    free_bytes: int | None = None
    integrated: bool = False
    """Shares the CPU's memory; never rank by memory size."""
    identity: str = ""
    """Survives a reboot (PCI id, CPU model): keys measured choices and remembered verdicts."""
    name: str = ""
    """The product name, for people."""
    features: frozenset[str] = frozenset()
    """`{"avx512f", "avx512_vnni", "fp8"}`: what the hardware has and the operating system has enabled."""
    drivers: Mapping[str, str] = field(default_factory=dict)
    """`{"cuda": "12.8", "nvidia": "570.86"}`."""
    peers: frozenset[str] = frozenset()
    """Ids of devices reachable over NVLink."""
    cores: int = 0
    """Processor cores this process may use (affinity and cgroup quota applied); 0 where it has no meaning."""
    caches: Mapping[str, int] = field(default_factory=dict)
    """Bytes of one cache of each level, `{"l1d": 32768, "l2": 1048576, "l3": 33554432}`; empty where not known."""
    numa: tuple[tuple[int, ...], ...] = ()
    """Logical CPUs this process may use, one tuple for each NUMA node that has any; empty where not known."""
    members: tuple[Device, ...] = ()
    """Of several devices that are to run one model together, `"cuda:0,cuda:1"`: these, two or more of one kind; empty
    for a single device. Memory is then that of all together, as far as the smallest fills it. Only a backend with
    `api >= (1, 3)` is asked about them."""


@dataclass(frozen=True)
class Offer:
    """Yes, this backend can use this device."""

    device_id: str
    band: Literal["fallback", "generic", "native", "tuned"]
    """Order within one kind of device; ties go by name."""
    why: str
    """`"sm_89 with FP8, TensorRT-RTX 1.7"`: shown to the user.

    Names hardware and versions, and nothing else. It is part of the key under which verdicts of the self-check,
    measured speeds and failures are remembered: another SDK is checked anew, and a text that changes from run to run
    (free memory, a time) would have all of them forgotten. In what numbers a model will compute is said in
    `Artifact.notes`, not here.
    """
    runs_here: bool = True
    """False: compile and export only."""
    by_name: bool = False
    """Only for who names the backend, or has a bundle of its own: an emulator, or an engine that another one beats.
    `auto` runs no model on it. Since API 1.5."""


@dataclass(frozen=True)
class Refusal:
    """No, because; and what would make it a yes."""

    device_id: str
    code: Literal["missing_dep", "too_old", "wrong_device", "missing_feature", "failed"]
    reason: str
    """`"needs sm_89 for FP8, found sm_80"`."""
    fix: str = ""
    """`"pip install 'transom[tensorrt]'"`."""


@dataclass(frozen=True)
class Claim:
    """The answer for one node. A backend returns one for each node, always; silence is a breach of contract."""

    node: str
    ok: bool
    reason: str = ""
    """Required when not ok."""
    exact: bool = True
    """False (FP8, sparse attention): the host's accuracy gate applies."""
    group: str = ""
    """A name of the backend's choosing for nodes that it runs only as one, fused. Empty: the node stands for itself.

    All or nothing: where one node of a group is refused, the host takes all of them as refused, decomposes those that
    have a body, and asks again about the new graph. `compile` is not told of groups: it gets the whole graph, and finds
    them as `claim` did.
    """


@dataclass(frozen=True)
class Artifact:
    """What `compile` made. The host stores it, checks it and hands it to `load` with every file as a path."""

    files: Mapping[str, bytes | Path]
    requires: Mapping[str, str]
    """`{"openvino": "2026.4.1", "arch": "x86_64"}`: kept in the manifest, and what `check` judges. The keys `context`
    and `threads` have a meaning of their own, see `Backend.load`."""
    notes: Sequence[str] = ()
    """What the user should know, such as re-rounded weights: `report.notes`.

    One that begins with `precision: ` says in what numbers the engine computes here, which for `"auto"` only the
    backend knows: `"precision: bfloat16, int8 matrix products"`. The host takes it out of the notes and shows the rest
    of its text as `report.precision`, which stays empty without one.
    """


@dataclass(frozen=True)
class Verdict:
    """May this artifact be opened on this device? Decided from `requires` alone, before any deserialising."""

    state: Literal["ok", "slower", "rebuild", "never"]
    reason: str = ""


@runtime_checkable
class State(Protocol):
    """The cache of one sequence; opaque to all but its session."""

    @property
    def length(self) -> int:
        """Tokens held."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held; pages shared with other states are counted once, in the state that made them."""
        ...

    def fork(self, length: int) -> State:
        """A new state that shares the first `length` tokens. Raises ValueError when `length > self.length`."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises ValueError when `length > self.length`."""
        ...

    def free(self) -> None:
        """Give the memory back. Using the state afterwards raises RuntimeError; freeing twice does nothing."""
        ...


@dataclass(frozen=True)
class Work:
    """One sequence's part of a step: a prefill chunk or a decode."""

    state: State
    tokens: Sequence[int]
    """New token ids, at least one; they take the positions `state.length …`."""
    logits: Literal["none", "last", "all"] = "last"
    top_k: int = 0
    """Above 0: return (ids, values) of the k best in place of whole rows (int64, float32; best first)."""
    sparsity: str | None = None
    """A policy to read the cache by, `"dense"` or `transom.sparsity.Sparsity.to_string()`, in place of the one that the
    graph's attributes name; None: as they say. Only a `SparseSession` gets another value. Since API 1.1."""


@dataclass(frozen=True)
class Limits:
    """What one step may hold."""

    max_sequences: int
    """Sequences in one step; 1: the host loops."""
    max_tokens: int
    """New tokens in one step, over all sequences."""
    context: int
    """Tokens one state may hold."""
    page_tokens: int
    """Tokens in a page of the cache pool; 0: contiguous."""
    token_classes: tuple[int, ...] = ()
    """Static shapes: a chunk must have one of these lengths. Empty: any length."""


@runtime_checkable
class Session(Protocol):
    """A loaded artifact. Calls come from one thread at a time; the host serialises them."""

    @property
    def limits(self) -> Limits: ...

    def pages(self) -> tuple[int, int]:
        """(total, free) pages of the cache pool; (0, 0) when the cache is contiguous."""
        ...

    def new_state(self) -> State:
        """An empty state."""
        ...

    def step(self, work: Sequence[Work]) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        """Append each work's tokens to its state and return its logits, in the order of `work`.

        Returns, for each work: None for `logits="none"`; float32 [vocabulary] for `"last"`; float32
        [tokens, vocabulary] for `"all"`; with `top_k` a pair (int64, float32) with `top_k` in the last axis.

        All or nothing: whatever is raised, every state is as it was. Raises OutOfPages when the pool is too small,
        ValueError for a step beyond `limits`, for token ids outside the vocabulary, and for one state used twice.
        """
        ...

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the graph once with all of its inputs by name; for graphs without a cache."""
        ...

    def close(self) -> None:
        """Release everything. Closing twice does nothing."""
        ...


@runtime_checkable
class Backend(Protocol):
    """Five methods, all required, none optional."""

    @property
    def name(self) -> str:
        """A short identifier, unique among the installed backends."""
        ...

    @property
    def api(self) -> tuple[int, int]:
        """The contract the backend was written for: a literal, never `API_VERSION`."""
        ...

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        """Judge each device: exactly one answer per device. Under 50 ms; opens no context, imports no SDK."""
        ...

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        """Answer for every node of the graph. Pure: no side effects, no SDK calls that need the device."""
        ...

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        """Build the artifact. May take long, calls `progress`, runs in a child process of the host."""
        ...

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        """Compare `artifact.requires` with what is installed and with the device. Opens nothing.

        The keys `context` and `threads` are the host's to compare, since no options come here: let them pass.
        """
        ...

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        """Open the artifact. `scratch` is a folder that lasts, for what an SDK writes after loading.

        `options` are those of `compile`, except that `context` and `threads` may differ from then, since one artifact
        serves them all. The values given here win: `limits.context` of the session is this `context` (at most the
        model's own), and it computes with these `threads`, whatever `compile` was given.

        A backend that builds one of them into its artifact writes what `compile` was given into `Artifact.requires`,
        as text under the option's name: `{"context": "4096"}`. The host then calls `load` with that value only, and
        has the model compiled anew when another one is wanted.
        """
        ...


class Specs:
    """The hooks a plugin may implement, marked with `transom.contract.hookimpl`."""

    @hookspec
    def transom_backends(self) -> Iterable[Backend]:  # type: ignore[empty-body]
        """Return this plugin's backends. Import no vendor SDK here."""

    @hookspec
    def transom_ops(self) -> Iterable[OpSchema]:  # type: ignore[empty-body]
        """Add operators under your own domain: schema, shape rule, NumPy reference, function body."""

    @hookspec(firstresult=True)
    def transom_choose(self, offers: Sequence[tuple[str, Offer]]) -> str | None:
        """Site policy: name a backend out of (backend, offer) pairs, or None for the default order."""


def __getattr__(name: str) -> Any:
    """The optional protocols that were in this file before API 1.6, for backends that import them from here."""
    if name not in ("AppBackend", "SavingSession", "SparseSession"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("transom.contract_optional"), name)
