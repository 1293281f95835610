"""`transom.load`: from a path to a model that answers, on the best device there is, with the reason.

On a warm start nothing but the artifact is read: the probe, the choice, the manifest's checks, the engine's import. On
a cold one a child process compiles and checks (`transom.runtime.loader`). Imports nothing heavier than the warm start
needs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.artifacts import Cache
from transom.runtime.arguments import check_arguments, check_objects
from transom.runtime.guarding import interrupts_kept
from transom.runtime.loader import Asked, Loader
from transom.runtime.machine import choose, survey
from transom.runtime.pieces import given_texts
from transom.sources import bundle_at
from transom.sparsity import Sparsity

if TYPE_CHECKING:
    from transom.contract import Progress
    from transom.runtime.model import Model


@interrupts_kept()
def load(
    model: Any,
    *,
    device: str = "auto",
    backend: str = "auto",
    context: int | None = None,
    precision: str = "auto",
    threads: int | None = None,
    sparsity: Any = "off",
    calibration: Sequence[str | Path] = (),
    verify: str = "auto",
    probe_file: str | Path | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
    **unknown: Any,
) -> Model:
    """Load a model onto a device.

    Args:
        model: a GGUF file, a Hugging Face directory, an ONNX file, a `torch.nn.Module` wrapped in
            `transom.TorchSource`, a transformers model, or a bundle that `transom.export` wrote. A bundle's backend is
            the one that it names, and `precision`, `sparsity` and what else is built into it are its own: `"auto"` and
            `"off"` leave them as they are, another value is an OptionError.
        device: `"auto"`, or an id that `transom.devices()` lists (`"cpu"`, `"cuda:0"`), or several for one model on all
            of them (`"cuda:0,cuda:1"`). Named, it never falls back.
        backend: `"auto"`, or a name that `transom.backends()` lists. Named, it never falls back.
        context: tokens that one sequence may have; None for the model's own, cut to what fits and said so in
            `report.warnings`.
        precision: `"auto"`, `"exact"`, `"fast"`, or a form by name; what they mean is the backend's to say, in
            `model.report.precision`.
        threads: processor threads; None for every core this process may use.
        sparsity: which keys attention reads (`transom.sparsity.Sparsity.parse`): `"off"` for all, `"safe"`,
            `"balanced"`, `"fast"`, `"classic"`, a coverage such as 0.94, a JSON file, or a `Sparsity`.
        calibration: texts, or text files as `pathlib.Path`, that are like what the model will read, for a backend that
            rounds activations; empty for passages that come with Python.
        verify: `"auto"` compares a new artifact with the reference once on each device, `"always"` at every load,
            `"off"` never.
        probe_file: devices from a JSON file in place of the probe (`transom doctor --json` writes one).
        cache: the artifact cache; None for the default one.
        progress: called with (stage, share done or None); may raise `transom.Cancelled`, which leaves nothing
            half-done.

    Raises:
        SourceError: the model cannot be read.
        BundleError: the bundle is damaged, or of a newer Transom.
        SelectionError: nothing can run it as asked; the details say what each backend answered.
        DoesNotFit: it needs more memory than there is.
        SelfCheckFailed, EngineError, UnsupportedError: a named backend cannot run it. `auto` moves on to the next
            offer and says so in `report.warnings`.
        OptionError: an unknown option or value.
    """
    options = {"context": context, "precision": precision, "threads": threads}
    policy = os.environ.get("TRANSOM_AUTO", "").strip() or "measure"
    check_arguments(options, verify, policy, unknown)
    check_objects(cache, progress)
    asked = Asked(options, Sparsity.parse(sparsity), given_texts(calibration), verify)
    kept, told = cache or Cache.default(), progress or (lambda stage, share: None)
    if (bundle := bundle_at(model)) is not None:
        from transom.runtime.unbundling import load_bundle  # a model out of the cache does without

        return load_bundle(
            bundle, asked, device=device, backend=backend, probe_file=probe_file, cache=kept, progress=told
        )
    loader = Loader(model, asked, cache=kept, progress=told)
    with loader.stages.time("probe"):
        machine = survey(probe_file, target=device)
        choice = choose(machine, device=device, backend=backend)
    with loader.stages.time("read"):
        loader.identify(machine.plugins)
    if choice.kinds_to_measure and policy == "measure":
        speeds = loader.speeds(machine, choice.kinds_to_measure)
        choice = choose(machine, device=device, backend=backend, measured=speeds)
    return loader.first_that_works(machine, choice, lambda turn: loader.open(machine, choice, turn))
