"""Checks of compiling and of artifacts: progress, cancelling, verdicts, opening in another process, closing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transom.contract import Artifact, Cancelled
from transom.ops import find
from transom.preparation.plugin_calls import temporary_files_in
from transom.testing.bench import Bench
from transom.testing.checks.check import Check, must_raise
from transom.testing.child import in_child
from transom.testing.compare import compare_rows
from transom.testing.driver import Move, SessionDriver, session_driver
from transom.testing.models import BASE
from transom.testing.one_node import one_node
from transom.testing.result import Failed, Refused

OF_LOAD = ("context", "threads")
"""Options that may differ between loads. The host compares them with `requires`."""


def compile_reports_progress(bench: Bench) -> None:
    """compile calls progress with the name of a stage and a share between 0 and 1, or None."""
    calls: list[tuple[object, object]] = []
    model = bench.model(BASE)
    with temporary_files_in(bench.folder / "progress"):
        bench.backend.compile(
            model.lowered.graph, bench.device, bench.options, lambda stage, share: calls.append((stage, share))
        )
    if not calls:
        raise Failed("compile never called progress, so it cannot be cancelled")
    for stage, share in calls:
        if not isinstance(stage, str) or not stage.strip():
            raise Failed(f"progress was called with the stage {stage!r}")
        if share is not None and not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise Failed(f"progress was called with the share {share!r}; it is 0 to 1, or None")


def compile_can_be_cancelled(bench: Bench) -> None:
    """When progress raises Cancelled, at its first or last call, compile lets it pass and leaves no file behind."""
    model = bench.model(BASE)
    count = 0

    def counting(stage: str, share: float | None) -> None:
        nonlocal count
        count += 1

    with temporary_files_in(bench.folder / "counting"):
        bench.backend.compile(model.lowered.graph, bench.device, bench.options, counting)
    for stop in sorted({1, count}):
        calls = 0

        def cancelling(stage: str, share: float | None, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Cancelled

        with temporary_files_in(bench.folder / f"cancelled-{stop}") as folder:
            must_raise(
                Cancelled,
                f"compile, cancelled at call {stop} of {count} to progress,",
                lambda: bench.backend.compile(model.lowered.graph, bench.device, bench.options, cancelling),
            )
            if left := sorted(p.name for p in folder.iterdir()):
                raise Failed(f"a cancelled compile left {', '.join(left)} in the temporary folder")


def artifact_says_what_it_requires(bench: Bench) -> None:
    """An artifact has files and requirements, and its requirements and notes are text."""
    artifact = bench.model(BASE).artifact
    if not artifact.files:
        raise Failed("the artifact has no files")
    if not artifact.requires:
        raise Failed("artifact.requires is empty, so check cannot notice another version")
    for key, value in artifact.requires.items():
        if not isinstance(key, str) or not isinstance(value, str) or not value:
            raise Failed(f"artifact.requires holds {key!r}: {value!r}; both must be text")
    if any(not isinstance(note, str) or not note.strip() for note in artifact.notes):
        raise Failed(f"artifact.notes has an entry that is empty or not text: {artifact.notes!r:.80}")


def wrong_artifacts_are_recognized(bench: Bench) -> None:
    """check returns ok for a new artifact, and another state with a reason when any requirement differs."""
    artifact, device, check = bench.model(BASE).artifact, bench.device, bench.backend.check
    verdict = check(artifact, device)
    if verdict.state != "ok":
        raise Failed(f"check returned {verdict.state} ({verdict.reason}) for an artifact that was just made here")

    def expect_no(what: str, requires: Mapping[str, str]) -> None:
        found = check(replace(artifact, requires=requires), device)
        if found.state not in ("slower", "rebuild", "never"):
            raise Failed(f"check returned {found.state} though {what}")
        if not found.reason.strip():
            raise Failed(f"check returned {found.state} without a reason when {what}")

    for key, value in artifact.requires.items():
        if key in OF_LOAD:  # check gets no options: the host compares these
            continue
        rest = {k: v for k, v in artifact.requires.items() if k != key}
        expect_no(f"{key} is {value!r} here and '0.0.wrong' in the artifact", {**rest, key: "0.0.wrong"})
        expect_no(f"the artifact's requires has no {key}", rest)
    expect_no("the artifact has no requirement of this backend", {"something else": "1"})


def check_opens_nothing(bench: Bench) -> None:
    """check decides by the requirements alone. The files need not exist."""
    artifact = bench.model(BASE).artifact
    gone: Mapping[str, bytes | Path] = {name: bench.folder / "gone" / name for name in artifact.files}
    verdict = bench.backend.check(Artifact(gone, artifact.requires, artifact.notes), bench.device)
    if verdict.state != "ok":
        raise Failed(f"check returned {verdict.state} ({verdict.reason}) without the files; it must open none")


def opens_in_another_process(bench: Bench) -> float:
    """An artifact loaded from its files in a fresh process gives the same logits."""
    if not bench.offer().runs_here:
        raise Refused(f"{bench.backend.name} only compiles for {bench.device.id} and cannot run here")
    with session_driver(bench, "another process") as driver:
        chunks = [driver.draw(driver.chunk(n)) for n in (9, 1, 1)]
    request = {"artifact": driver.model.artifact, "device": bench.device, "options": bench.options}
    request |= {"scratch": bench.scratch(), "chunks": chunks}
    answer = in_child(bench, "load", request)
    if answer["verdict"] != "ok":
        raise Failed(f"check returned {answer['verdict']} for the artifact in another process")
    wanted = driver.model.oracle.logits([t for chunk in chunks for t in chunk])
    return compare_rows(answer["logits"], wanted, driver.model.limit, "logits in another process")


def sessions_are_independent(bench: Bench) -> float:
    """Two sessions of one artifact have independent states; closing one does not affect the other."""
    model = bench.model(BASE)
    with bench.session(model.artifact) as first, bench.session(model.artifact) as second:
        one, two = (SessionDriver(s, model, bench.rng(name)) for s, name in ((first, "first"), (second, "second")))
        a, b = one.grown(7), two.grown(4)
        one.probe(a)
        two.probe(b)
        first.close()
        two.probe(b)
        return max(one.error, two.error)


def closes_twice(bench: Bench) -> None:
    """close releases everything. Closing again and freeing a state afterwards do nothing."""
    with session_driver(bench, "close") as driver:
        track = driver.grown(3)
        driver.session.close()
        driver.session.close()
        track.state.free()


def runs_need_their_inputs(bench: Bench) -> None:
    """run raises when an input is missing or unknown."""
    bench.offer()
    schema = find("", "Add")
    assert schema is not None
    assert schema.samples is not None
    graph, inputs = one_node(schema, next(schema.samples(bench.rng("inputs"))))
    lowered = bench.lower(graph)
    with bench.session(bench.compile(lowered.graph)) as session:
        missing = {"x0": inputs["x0"]}
        must_raise(Exception, "run without one of its inputs", lambda: session.run(missing))
        unknown = inputs | {"x2": inputs["x0"]}
        must_raise(Exception, "run with an input that the graph does not have", lambda: session.run(unknown))
        session.run(inputs)


def load_decides_the_context(bench: Bench) -> None:
    """A session has the context that load got, whatever compile got, unless `requires` has a context."""
    model = bench.model(BASE)
    if "context" in model.artifact.requires:
        return  # the host compiles again for another context
    for context in (model.oracle.decoder.context // 2, model.oracle.decoder.context // 4):
        with bench.session(model.artifact, context=context) as session:
            if session.limits.context != context:
                raise Failed(
                    f"loaded with context={context}, but limits.context is {session.limits.context}; an artifact that "
                    "is bound to its context has to name it in requires"
                )


def limits_are_sound(bench: Bench) -> None:
    """limits and pages are valid and consistent with each other."""
    model = bench.model(BASE)
    with bench.session(model.artifact) as session:
        limits = session.limits
        for name in ("max_sequences", "max_tokens", "context"):
            if getattr(limits, name) < 1:
                raise Failed(f"limits.{name} is {getattr(limits, name)}")
        if limits.page_tokens < 0:
            raise Failed(f"limits.page_tokens is {limits.page_tokens}")
        if any(not 0 < c <= limits.max_tokens for c in limits.token_classes):
            raise Failed(f"limits.token_classes {limits.token_classes} exceed max_tokens {limits.max_tokens}")
        total, free = session.pages()
        if not 0 <= free <= total or (total > 0) != (limits.page_tokens > 0):
            raise Failed(f"pages() is {(total, free)} with page_tokens {limits.page_tokens}")
        driver = SessionDriver(session, model, bench.rng("limits"))
        driver.step([Move(driver.new(), driver.draw(driver.chunk(3)))])


def checks() -> list[Check]:
    return [
        Check("compile.progress", compile_reports_progress),
        Check("compile.cancel", compile_can_be_cancelled),
        Check("artifact.requires", artifact_says_what_it_requires),
        Check("artifact.verdicts", wrong_artifacts_are_recognized),
        Check("artifact.check_opens_nothing", check_opens_nothing),
        Check("artifact.another_process", opens_in_another_process),
        Check("load.context", load_decides_the_context),
        Check("session.independent", sessions_are_independent),
        Check("session.close_twice", closes_twice),
        Check("session.run_inputs", runs_need_their_inputs),
        Check("session.limits", limits_are_sound),
    ]
