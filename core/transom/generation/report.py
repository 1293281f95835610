"""`model.report`: what runs a model and why, human-readable (`str`) and machine-readable (`to_dict`).

Also the line that the command line prints after an answer. Contains data only, no decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from transom.contract import Device, Refusal
from transom.errors import TransomError, option, option_prefix
from transom.generation.prompts import larger_context
from transom.generation.results import Generation


@dataclass(frozen=True)
class Report:
    """The report on a loaded model. It does not change after loading."""

    model: str
    """The model's name."""
    backend: str
    device: Device
    why: str
    """Why this backend and device were chosen, in one sentence."""
    backend_version: str = ""
    source: str = ""
    """The source of the model: `"gguf"`, `"hf"`, `"onnx"`, `"torch"`."""
    precision: str = ""
    """The compute precision, as the backend reports it."""
    context: int = 0
    """Maximum number of tokens of prompt and answer together; 0 for a graph that is not a decoder."""
    model_context: int = 0
    """Maximum context that the model supports, in tokens."""
    context_built_in: bool = False
    """Whether a bundle was compiled for this context, so that only a new export can extend it."""
    warnings: tuple[str, ...] = ()
    """Problems that the user should fix: a device without its backend, a broken plugin."""
    refusals: tuple[tuple[str, Refusal], ...] = ()
    """(backend, refusal) pairs: backends that were not used, and why."""
    notes: tuple[str, ...] = ()
    """Changes made while loading: dequantized tensors, decomposed operators, a reduced context."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Planned bytes by use: `weights`, `cache`, `workspace`, `available`."""
    check: str = ""
    """The result of the self-check against the reference."""
    sparsity: str = ""
    """Which keys attention reads, and whether the model's heads are calibrated; empty: all keys."""
    determinism: str = ""
    """Whether what else runs may change results; empty for a graph that is not a decoder."""
    cache_hit: bool = False
    """Whether the compiled artifact was in the cache."""
    bundle: str = ""
    """The bundle folder from which the model was loaded, if any."""
    startup: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage, in execution order."""

    def __str__(self) -> str:
        lines = [f"{self.model or 'model'} on {_device(self.device)}, by {_joined(self.backend, self.backend_version)}"]
        facts = [
            ("why", self.why),
            ("source", self.source),
            ("precision", self.precision),
            ("context", self._context()),
            ("memory", self._memory()),
            ("sparsity", self.sparsity),
            ("self-check", self.check),
            ("determinism", self.determinism),
            ("artifact", self._artifact()),
            ("start-up", self._startup()),
        ]
        lines += [f"  {name + ':':<12}{text}" for name, text in facts if text]
        lines += [f"  warning:    {text}" for text in self.warnings]
        lines += [f"  note:       {text}" for text in self.notes]
        for backend, refusal in self.refusals:
            fix = f" ({refusal.fix})" if refusal.fix else ""
            lines.append(f"  not used:   {backend} on {refusal.device_id}: {refusal.reason}{fix}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        device = asdict(self.device)
        for name in ("features", "peers"):
            device[name] = sorted(device[name])
        device["drivers"] = dict(self.device.drivers)
        return {
            "model": self.model,
            "backend": self.backend,
            "backend_version": self.backend_version,
            "device": device,
            "why": self.why,
            "source": self.source,
            "precision": self.precision,
            "context": self.context,
            "model_context": self.model_context,
            "context_built_in": self.context_built_in,
            "warnings": list(self.warnings),
            "refusals": [{"backend": backend, **asdict(refusal)} for backend, refusal in self.refusals],
            "notes": list(self.notes),
            "memory": dict(self.memory),
            "sparsity": self.sparsity,
            "check": self.check,
            "determinism": self.determinism,
            "cache_hit": self.cache_hit,
            "bundle": self.bundle,
            "startup": dict(self.startup),
        }

    def _context(self) -> str:
        if not self.context:
            return ""
        made_for = f" of the {self.model_context} it was made for" if self.model_context > self.context else ""
        built_in = ", built into the bundle" if self.context_built_in else ""
        return f"{self.context} tokens{made_for}{built_in}"

    def _memory(self) -> str:
        if not self.memory:
            return ""
        parts = [f"{name} {_bytes(size)}" for name, size in self.memory.items() if name != "available" and size]
        room = self.memory.get("available")
        return ", ".join(parts) + (f"; {_bytes(room)} available" if room else "")

    def _artifact(self) -> str:
        if self.bundle:
            return f"from the bundle {self.bundle}"
        return "from the cache" if self.cache_hit else "compiled now"

    def _startup(self) -> str:
        if not self.startup:
            return ""
        parts = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self.startup.items())
        return f"{sum(self.startup.values()):.2f} s ({parts})"


def answer_line(report: Report, generation: Generation) -> str:
    """The line after an answer: device, backend, time to first token, tokens/s, and what sparse attention read."""
    timings = generation.timings
    parts = [report.device.id, report.backend, f"{_seconds(timings.time_to_first_token)} to first token"]
    if rate := timings.decode_tokens_per_second:
        parts.append(f"{rate:.0f} tokens/s" if rate >= 10 else f"{rate:.1f} tokens/s")
    if generation.density is not None:
        parts.append(f"{generation.density:.0%} of the keys read")
    return " · ".join(parts)


def token_line(generation: Generation) -> str:
    """How many tokens the prompt and the answers have, and how many of the prompt's were known."""
    usage = generation.usage
    known = f" ({usage.cached_tokens} of them known)" if usage.cached_tokens else ""
    return f"tokens: {usage.prompt_tokens} of the prompt{known}, {usage.completion_tokens} generated"


def cut_cause(report: Report, generation: Generation) -> tuple[str, str] | None:
    """Which limit cut answers off and what allows more, in one sentence each; None if every answer ended by itself."""
    cut = [choice for choice in generation.choices if choice.cut_by is not None]
    if not cut:
        return None
    several = len(generation.choices) > 1
    tokens = max(len(choice.token_ids) for choice in cut)
    who = f"{len(cut)} of {len(generation.choices)} answers were" if several else "The answer was"
    cause = f"{who} cut off after {tokens} tokens"
    if cut[0].cut_by == "context":
        cause += f", because the context of {report.context} tokens is full"
        if report.context >= report.model_context > 0:
            return cause, "The model has no larger one, so shorten the prompt"
        more = f"more than {option('context', report.context)}"
        return cause, f"Shorten the prompt, or {larger_context(more, built_in=report.context_built_in)}"
    if cut[0].cut_by == "model_default":
        cause += ", the limit that the model's own settings give"
    return cause, f"A larger {option_prefix('max_new_tokens').strip(' =')} allows more"


def incomplete(report: Report, generation: Generation) -> TransomError | None:
    """The error that a guided answer ended before it conformed to its schema or grammar; None if none did.

    A limit ended it, or a stop string or token of the request. One that was cancelled is no error.
    """
    short = [c for c in generation.choices if c.conforms is False and c.finish_reason != "cancelled"]
    if not short:
        return None
    cut = cut_cause(report, generation)
    if cut is not None and any(choice.cut_by is not None for choice in short):
        return TransomError(f"{cut[0]}, before the text conformed to what was asked for", cut[1])
    stop = short[0].stop
    what, name = (f"string {stop!r}", "stop") if isinstance(stop, str) else (f"token {stop}", "stop_token_ids")
    return TransomError(
        f"The stop {what} ended the answer before it conformed to what was asked for",
        f"Leave out {option_prefix(name).strip(' =')}, or name what no such answer has",
    )


def _device(device: Device) -> str:
    return f"{device.id} ({device.name})" if device.name else device.id


def _joined(name: str, version: str) -> str:
    return f"{name} {version}" if version else name


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
