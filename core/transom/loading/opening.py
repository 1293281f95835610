"""Opens a compiled model in this process as a `Model`, with its report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from transom.errors import EngineError, SelfCheckFailed, option
from transom.generation.report import Report
from transom.loading import crashes
from transom.loading.compiled_models import CompiledModels, Ready
from transom.preparation import compiled, heads
from transom.preparation.cached_source import DamagedSource
from transom.preparation.plugin_calls import LoadTimedOut, open_session_beside
from transom.preparation.plugin_operators import register_operators
from transom.sparsity import shipped

if TYPE_CHECKING:
    from transom.contract import Limits, Session
    from transom.generation.model import Model
    from transom.loading.attempts import Attempt
    from transom.loading.identity import ModelIdentity
    from transom.loading.load_state import LoadState
    from transom.preparation.cached_source import CachedSource
    from transom.preparation.compiled import Checked, CompiledModel
    from transom.sparsity import Heads, Sparsity
    from transom.text import ChatTemplate, GenerationDefaults, Tokenizer


class _Text(NamedTuple):
    """Tokenizer, chat template and generation defaults."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    defaults: GenerationDefaults


def open_model(models: CompiledModels, attempt: Attempt) -> Model:
    """Open the model in this process, after a child process has compiled and checked it if necessary.

    Raises:
        TransomError: it cannot be compiled or opened, or does not pass the self-check.
    """
    watch = crashes.watch(
        models.jobs.state.cache,
        models.jobs.job(attempt).failure_key,
        f"{attempt.candidate.backend} ended the process with {{signal}} while it opened or ran this model on "
        f"{attempt.device.id}",
    )
    try:
        return _watched(models, attempt, watch)
    except BaseException:
        crashes.release(watch)
        raise


def _watched(models: CompiledModels, attempt: Attempt, watch: AbstractContextManager[None]) -> Model:
    state = models.jobs.state
    with watch:
        found = models.find(attempt)
    was_there = isinstance(found, Ready)
    ready = found if isinstance(found, Ready) else models.prepare(attempt)
    try:
        with watch:
            session, text = _open(models, attempt, ready)
    except (EngineError, DamagedSource) as error:
        if not was_there or isinstance(error, LoadTimedOut):
            raise
        if isinstance(error, DamagedSource):  # it is no longer in the cache, and read again
            ready.compiled.release()
        else:
            # An earlier process could open it, so the SDK or its own files beside the artifact have changed.
            ready.compiled.discard(error.cause)
        ready, was_there = models.prepare(attempt), False
        with watch:
            session, text = _open(models, attempt, ready)
    try:
        if state.options.verify == "always":
            with state.stages.time("check"), watch:
                ready = replace(ready, verdict=_check_here(models, attempt, ready, session))
        _require_bound(state, attempt, ready)
        return _model(models, attempt, ready, session, text, was_there, watch)
    except BaseException:
        session.close()
        ready.compiled.release()
        raise


def _require_bound(state: LoadState, attempt: Attempt, ready: Ready) -> None:
    """Raise SelfCheckFailed if the model diverges by more than the user accepts. It stays in the cache."""
    bound, kl = state.options.max_kl, compiled.divergence(ready.source.decoder, ready.verdict)
    if bound is not None and kl is not None and not kl <= bound:
        raise SelfCheckFailed(
            f"What {attempt.candidate.backend} compiled diverges by {kl:.3g} nats from the reference on the check "
            f"prompt, and {option('max_kl', bound)} allows less",
            f"Use {option('precision', 'exact')}, or allow more",
        )


def _open(models: CompiledModels, attempt: Attempt, ready: Ready) -> tuple[Session, _Text]:
    state, source = models.jobs.state, ready.source
    context = ready.plan.context if ready.plan else state.options.for_backend["context"]
    options = {**state.options.for_backend, "context": context, "calibration": ()}
    if models.jobs.identity.uses_plugin_operators:
        register_operators(attempt.machine.plugins)  # a backend may open a graph that uses them

    def text() -> _Text:
        return _Text(source.tokenizer(), source.chat_template(), source.generation())

    with state.stages.time("load"):
        return open_session_beside(attempt.plugin.backend, ready.compiled, attempt.device, options, text)


def _check_here(models: CompiledModels, attempt: Attempt, ready: Ready, session: Session) -> Checked:
    from transom.preparation import selfcheck

    wanted = models.reference_outputs(attempt, ready.source)
    allowed = compiled.allowed(ready.compiled)
    return selfcheck.verdict(session, wanted, ready.source, backend=attempt.candidate.backend, allowed=allowed)


def warnings_of(state: LoadState, attempt: Attempt, ready: Ready) -> tuple[str, ...]:
    """Warnings about this compiled model and about the attempts before it."""
    warnings = [*attempt.choice.warnings, *state.cache.warnings, *state.warnings, *attempt.warnings()]
    if ready.plan is not None and ready.plan.note:
        warnings.append(ready.plan.note)
    if ready.slower:
        where = "here" if attempt.runs_here else f"on {attempt.device.id}"
        warnings.append(f"The compiled model is slower {where} than a newly compiled one: {ready.slower}")
    return tuple(dict.fromkeys(warnings))


def _model(
    models: CompiledModels,
    attempt: Attempt,
    ready: Ready,
    session: Session,
    text: _Text,
    was_there: bool,
    watch: AbstractContextManager[None],
) -> Model:
    from transom.generation.model import InputSpec, Loaded, Model

    state, identity = models.jobs.state, models.jobs.identity
    source, plan = ready.source, ready.plan
    sparsity, heads_from = identity.sparsity, identity.heads_from
    if source.decoder is not None:
        sparsity, shipped_for = heads.with_shipped_heads(sparsity, source.decoder, source.name)
        heads_from = heads_from or shipped_for
    precision, notes = compiled.precision_and_notes(source.notes, ready.compiled)
    report = Report(
        model=source.name,
        backend=attempt.candidate.backend,
        backend_version=attempt.plugin.version,
        device=attempt.device,
        why=attempt.why(),
        source=source.kind,
        precision=precision,
        context=plan.context if plan else 0,
        model_context=source.decoder.context if source.decoder else 0,
        context_built_in=bool(models.bundle) and "context" in ready.compiled.artifact.requires,
        warnings=warnings_of(state, attempt, ready),
        refusals=attempt.choice.refusals,
        notes=notes,
        memory=plan.parts() if plan else {},
        check=compiled.verdict_text(ready.verdict),
        sparsity=heads.description(sparsity, heads_from),
        determinism=_determinism(state, attempt, session.limits, sparsity) if source.decoder else "",
        cache_hit=was_there or bool(models.bundle),
        bundle=models.bundle,
        startup=dict(state.stages.seconds),
    )
    return Model(
        Loaded(
            session=session,
            report=report,
            decoder=source.decoder,
            context=report.context,
            tokenizer=text.tokenizer,
            chat_template=text.template,
            defaults=text.defaults,
            inputs={} if source.decoder else {n: InputSpec(*spec) for n, spec in source.inputs.items()},
            sparsity=sparsity,
            identity=ready.compiled.key,
            heads=_heads_finder(state, identity, sparsity, source),
            deterministic=state.options.deterministic,
            watch=watch,
            on_close=_releaser(ready.compiled, state.held, watch),
        )
    )


def _determinism(state: LoadState, attempt: Attempt, limits: Limits, sparsity: Sparsity) -> str:
    """What the report says about results beside other generations."""
    always, shared = "the same bits whatever else runs", limits.batch_invariant and sparsity.dense
    if state.options.deterministic:
        return always if shared else f"{always}; each sequence has steps of its own"
    if not attempt.candidate.offer.deterministic:
        return "the backend does not promise the same bits each time"
    asked = option("deterministic", True)
    return always if shared else f"what else runs may change the rounding; {asked} prevents it"


def _heads_finder(
    state: LoadState, identity: ModelIdentity, sparsity: Sparsity, source: CachedSource
) -> Callable[[], Heads | None]:
    """A function that finds the model's heads for a policy of a single call, at the first such call.

    It lives as long as the model. It holds no `source`, which would keep its cache entry in use.
    """
    local, fingerprint, cache = identity.local, identity.fingerprint, state.cache
    decoder, name = source.decoder, source.name

    def find() -> Heads | None:
        if sparsity.heads is not None or decoder is None:
            return sparsity.heads
        found = heads.local(local, cache, fingerprint) or shipped(decoder, name)
        return None if found is None else found.heads

    return find


def _releaser(model: CompiledModel, held: list[object], watch: AbstractContextManager[None]) -> Callable[[], None]:
    def release() -> None:
        crashes.release(watch)
        model.release()
        held.clear()

    return release
