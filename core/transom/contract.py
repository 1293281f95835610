"""What a backend implements: five methods, API 1.9. This file imports neither torch nor a vendor SDK.

A plugin is an object with a `transom_backends` hook. The host finds it through the entry-point group
`transom.backends`. The hook returns backends. A backend has the methods `probe`, `claim`, `compile`, `check` and
`load`; a loaded artifact is a `Session`. `transom.contract_optional` has the protocols that a backend or a session may
implement in addition. Helpers that make a backend easier to write are not part of the contract: see
`transom.authoring` and `transom.sessions`.

Arrays cross this boundary as `Tensor`: anything that NumPy can read through DLPack or the array protocol. Output arrays
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

API_VERSION = (1, 9)
"""A backend is accepted when `backend.api[0] == API_VERSION[0]` and `backend.api[1] <= API_VERSION[1]`."""

ENTRY_POINT_GROUP = "transom.backends"

hookspec = pluggy.HookspecMarker("transom")
hookimpl = pluggy.HookimplMarker("transom")

Options = Mapping[str, object]
"""The user's options. The host always passes five keys. A backend ignores keys that it does not know.

- `precision`: `"auto"`, `"exact"`, `"fast"`, `"f32"`, `"bf16"`, `"f16"`, `"int8"`, `"fp8"` or `"int4"`. The backend
  decides what each means and documents it in `Artifact.notes`. `claim` raises `transom.errors.OptionError` for a
  precision that the backend does not have.
- `context`: int, the tokens that a state must hold, as the host has planned them. None: the model's own context.
- `threads`: int, the processor threads to use. None: `Device.cores`.
- `calibration`: a sequence of texts, for a backend that needs sample inputs to quantize activations. Each text is a
  sequence of token ids within the vocabulary, no longer than the context. Only `claim` and `compile` get texts; the
  sequence is empty for `load` and for a model without a tokenizer. Since API 1.4.
- `max_kl`: float, the largest mean divergence in nats that the user accepts, for a backend that chooses number formats
  by measuring. None: the backend's own limit. The host refuses a model that is above it in the self-check. Since API
  1.9.
"""
Tensor = Any
Progress = Callable[[str, float | None], None]
"""Called with (stage, share done in 0..1 or None when unknown). May raise `Cancelled`; do not catch it."""


class Cancelled(Exception):
    """The user asked to stop. Raised by a `Progress` call. A backend must leave nothing half-done behind."""


class OutOfPages(RuntimeError):
    """A step does not fit in the cache pool. No state has changed: the host preempts a sequence and tries again."""


@dataclass(frozen=True)
class Device:
    """One piece of hardware, as the host detected it. A backend judges it and does not detect hardware itself."""

    kind: Literal["cpu", "cuda", "gpu", "npu", "remote"]
    id: str
    """`"cpu"`, `"cuda:0"`, `"gpu:0"`, `"npu:0"`, `"remote:snapdragon-8-gen-2"`."""
    arch: str
    """`"x86_64"`, `"sm_70"`, `"hexagon_v73"`."""
    memory_bytes: int
    """Memory that the device may use, after a cgroup's limit. 0: not known, as for a phone as a compile target."""
    free_bytes: int | None = None
    """Memory that was free when the host looked; None: not known."""
    integrated: bool = False
    """The device shares the CPU's memory. Do not rank such devices by memory size."""
    identity: str = ""
    """Stable across reboots (PCI id, CPU model). Part of the key of measured choices and remembered verdicts."""
    name: str = ""
    """The product name, human-readable."""
    features: frozenset[str] = frozenset()
    """Features that the hardware has and the operating system has enabled: `{"avx512f", "avx512_vnni", "fp8"}`."""
    drivers: Mapping[str, str] = field(default_factory=dict)
    """`{"cuda": "12.8", "nvidia": "570.86"}`."""
    peers: frozenset[str] = frozenset()
    """Ids of devices reachable over NVLink."""
    cores: int = 0
    """Processor cores that this process may use, after affinity and cgroup quota. 0: not a CPU."""
    caches: Mapping[str, int] = field(default_factory=dict)
    """Bytes of one cache of each level: `{"l1d": 32768, "l2": 1048576, "l3": 33554432}`. Empty: not known."""
    numa: tuple[tuple[int, ...], ...] = ()
    """Logical CPUs that this process may use, one tuple for each NUMA node that has any. Empty: not known."""
    members: tuple[Device, ...] = ()
    """The devices of a group that runs one model together (`"cuda:0,cuda:1"`): two or more of one kind. Empty for a
    single device. The group's `memory_bytes` is the smallest member's memory times the number of members. Only a
    backend with `api >= (1, 3)` is asked about groups."""


@dataclass(frozen=True)
class Offer:
    """The answer yes: this backend can use this device."""

    device_id: str
    band: Literal["fallback", "generic", "native", "tuned"]
    """How well the backend suits the device, worst first. Orders the offers for one kind of device; ties are broken by
    name."""
    why: str
    """What the offer rests on, shown to the user: `"sm_89 with FP8, TensorRT-RTX 1.7"`.

    Name hardware and versions, and nothing else. The text is part of the key under which the host remembers verdicts of
    the self-check, measured speeds and failures. A new SDK version is therefore checked anew, and a text that changes
    from run to run (free memory, a time) would make the host forget everything. The compute precision belongs in
    `Artifact.notes`.
    """
    runs_here: bool = True
    """False: the backend can compile and export for the device, but not run on it."""
    by_name: bool = False
    """True: the backend is used only when the user names it or opens a bundle made by it. `"auto"` never selects it.
    For an emulator, or an engine that another backend outperforms. Since API 1.5."""
    deterministic: bool = False
    """True: of one compiled model on this device, a step with the same tokens on states that were made by the same
    steps gives the same bits, in every process, whatever ran before or between. False: the backend does not promise
    it, for example because it adds in the order in which threads finish, or changes its kernels while it runs.

    `transom.load(..., deterministic=True)` takes only offers that promise it. Since API 1.8."""


@dataclass(frozen=True)
class Refusal:
    """The answer no, with the reason and the fix."""

    device_id: str
    code: Literal["missing_dep", "too_old", "wrong_device", "missing_feature", "failed"]
    reason: str
    """`"needs sm_89 for FP8, found sm_80"`."""
    fix: str = ""
    """What the user can do about it: `"pip install 'transom[tensorrt]'"`. Empty: nothing."""


@dataclass(frozen=True)
class Claim:
    """The answer for one node: whether the backend can run it. A backend returns exactly one for each node."""

    node: str
    ok: bool
    reason: str = ""
    """Required when `ok` is False. When it is True, the reservation under which the backend would run the node, for one
    that runs a graph as a whole or not at all and refuses other nodes; otherwise empty."""
    exact: bool = True
    """False for an approximation (FP8, sparse attention): the host's accuracy gate applies."""
    group: str = ""
    """A name that the backend chooses for nodes that it can run only fused. Empty: the node is not part of a group.

    A group is all or nothing. When the backend refuses one node of a group, the host treats all of them as refused,
    decomposes those that have a body, and asks again about the new graph. `compile` gets the whole graph without
    groups, and has to find them again as `claim` did.
    """
    divergence: float | None = None
    """For an approximate claim: the mean divergence of the whole model from the reference that the backend expects with
    all its claims, nats per token, above 0. The self-check allows the largest that is declared, at most 0.5. None: the
    backend expects no particular one, and the host's default for approximate claims applies. Since API 1.7."""


@dataclass(frozen=True)
class Artifact:
    """What `compile` returns. The host stores it, checks it and passes it to `load` with every file as a path."""

    files: Mapping[str, bytes | Path]
    requires: Mapping[str, str]
    """What `check` compares: `{"openvino": "2026.4.1", "arch": "x86_64"}`. The host keeps it in the manifest. The keys
    `context` and `threads` have a special meaning: see `Backend.load`."""
    notes: Sequence[str] = ()
    """What the user should know, such as weights that were quantized again. Shown in `report.notes`.

    A note that begins with `precision: ` names the compute precision, which for `"auto"` only the backend knows:
    `"precision: bfloat16, int8 matrix products"`. The host removes this note and shows the text after the prefix as
    `report.precision`. Without such a note, `report.precision` is empty.
    """


@dataclass(frozen=True)
class Verdict:
    """Whether an artifact can be opened on a device, decided from `requires` alone before anything is deserialized."""

    state: Literal["ok", "slower", "rebuild", "never"]
    """`"ok"`: open the artifact. `"slower"`: open it and report the reason. `"rebuild"`: compile the model again.
    `"never"`: it cannot be opened on this device."""
    reason: str = ""


@runtime_checkable
class State(Protocol):
    """The cache of one sequence. Only its session knows what is inside."""

    @property
    def length(self) -> int:
        """Tokens held."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held. Pages shared with other states are counted only in the state that made them."""
        ...

    def fork(self, length: int) -> State:
        """A new state that shares the first `length` tokens. Raises ValueError when `length > self.length`."""
        ...

    def truncate(self, length: int) -> None:
        """Keep only the first `length` tokens. Raises ValueError when `length > self.length`."""
        ...

    def free(self) -> None:
        """Release the memory. Using the state afterwards raises RuntimeError; freeing it twice does nothing."""
        ...


@dataclass(frozen=True)
class Work:
    """The part of one sequence in a step: a prefill chunk, or one token of decoding."""

    state: State
    tokens: Sequence[int]
    """New token ids, at least one. Their positions start at `state.length`."""
    logits: Literal["none", "last", "all"] = "last"
    """The tokens for which to return logits."""
    top_k: int = 0
    """Above 0: return the `top_k` highest logits as (ids, values), int64 and float32, best first, not whole rows."""
    sparsity: str | None = None
    """The policy for reading the cache: `"dense"` or `transom.sparsity.Sparsity.to_string()`. It replaces the policy in
    the graph's attributes; None: use that one. The host sets it only for a `SparseSession`; another session raises
    ValueError for it. Since API 1.1."""


@dataclass(frozen=True)
class Limits:
    """The largest step that a session accepts."""

    max_sequences: int
    """Sequences in one step. 1: the host runs sequences one after the other."""
    max_tokens: int
    """New tokens in one step, all sequences together."""
    context: int
    """Tokens that one state can hold."""
    page_tokens: int
    """Tokens in a page of the cache pool. 0: the cache is contiguous."""
    token_classes: tuple[int, ...] = ()
    """The lengths that a chunk may have, for a backend with static shapes. Empty: any length."""
    batch_invariant: bool = False
    """True: with dense attention, the logits of a sequence have the same bits whatever other sequences its steps
    contain, and however its tokens are divided among steps. False: for `deterministic=True` the host gives each
    sequence steps of its own, whose borders follow from positions. Since API 1.8."""


@runtime_checkable
class Session(Protocol):
    """A loaded artifact. The host serializes calls: only one thread at a time is inside a session."""

    @property
    def limits(self) -> Limits: ...

    def pages(self) -> tuple[int, int]:
        """Pages of the cache pool as (total, free). (0, 0) when the cache is contiguous."""
        ...

    def new_state(self) -> State:
        """An empty state."""
        ...

    def step(self, work: Sequence[Work]) -> Sequence[Tensor | tuple[Tensor, Tensor] | None]:
        """Append the tokens of each work to its state and return their logits, in the order of `work`.

        Returns, for each work: None for `logits="none"`; float32 [vocabulary] for `"last"`; float32
        [tokens, vocabulary] for `"all"`. With `top_k`, a pair (int64, float32) whose last axis has length `top_k`.

        A step is all or nothing: when it raises, no state has changed. Raises OutOfPages when the pool is too small;
        ValueError for a step beyond `limits`, for token ids outside the vocabulary, and for a state used twice.
        """
        ...

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run a graph without a cache once. `inputs` has every input by name; returns every output by name."""
        ...

    def close(self) -> None:
        """Release everything. Closing twice does nothing."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A backend. All five methods are required."""

    @property
    def name(self) -> str:
        """A short identifier, unique among the installed backends."""
        ...

    @property
    def api(self) -> tuple[int, int]:
        """The API version that the backend was written for. A literal such as `(1, 8)`, never `API_VERSION` itself."""
        ...

    def probe(self, devices: Sequence[Device]) -> Sequence[Offer | Refusal]:
        """Return one answer for each device. Takes under 50 ms, opens no context, imports no SDK."""
        ...

    def claim(self, graph: Graph, device: Device, options: Options) -> Sequence[Claim]:
        """Return one answer for each node. No side effects, and no SDK calls that need the device."""
        ...

    def compile(self, part: Graph, device: Device, options: Options, progress: Progress) -> Artifact:
        """Build the artifact. Runs in a child process of the host, may take long, and reports to `progress`."""
        ...

    def check(self, artifact: Artifact, device: Device) -> Verdict:
        """Compare `artifact.requires` with the device and the installed software. Opens no file.

        Ignore the keys `context` and `threads`: the host compares them, because `check` gets no options.
        """
        ...

    def load(self, artifact: Artifact, device: Device, options: Options, scratch: Path) -> Session:
        """Open the artifact. `scratch` is a persistent folder for files that an SDK writes after loading.

        `options` are those of `compile`, except that `context` and `threads` may differ. The values given here apply:
        `limits.context` of the session is this `context` (at most the model's own), and the session computes with this
        number of `threads`, whatever `compile` got.

        A backend that builds one of the two into its artifact writes the value from `compile` into `Artifact.requires`,
        as text under the option's name: `{"context": "4096"}`. The host then calls `load` with that value only, and
        compiles the model anew when the user wants another one.
        """
        ...


class Specs:
    """The hooks that a plugin may implement. Mark each with `transom.contract.hookimpl`."""

    @hookspec
    def transom_backends(self) -> Iterable[Backend]:  # type: ignore[empty-body]
        """Return this plugin's backends. Import no vendor SDK here."""

    @hookspec
    def transom_ops(self) -> Iterable[OpSchema]:  # type: ignore[empty-body]
        """Return operators in a domain of your own, each with schema, shape rule, NumPy reference and function body."""

    @hookspec(firstresult=True)
    def transom_choose(self, offers: Sequence[tuple[str, Offer]]) -> str | None:
        """Choose a backend for a site: return a name from the (backend, offer) pairs, or None for the default order."""


def __getattr__(name: str) -> Any:
    """Optional protocols that were in this file before API 1.6, for backends that still import them from here."""
    if name not in ("AppBackend", "SavingSession", "SparseSession"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("transom.contract_optional"), name)
