"""Calibrates the heads of a model on disk: loads it, measures its heads (`transom.evaluation.head_effects`), and writes
the file that `load` finds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.api import load
from transom.artifacts import Cache, artifact_key
from transom.artifacts.files import replace_atomically
from transom.contract import Progress
from transom.errors import OptionError
from transom.evaluation.head_effects import MEASURED, NEW, HeadCalibration, calibrate
from transom.evaluation.passages import passages
from transom.loading.identity import fingerprint_of
from transom.preparation import heads
from transom.preparation.calibration_texts import default_texts, read_text
from transom.sources import resolve
from transom.sparsity import PRESETS, place_beside, shape_of

DEPTH = 4096
"""Tokens before the compared ones, or as many as the model's context allows."""
LEAST_DEPTH = 1216
"""Shortest useful depth: every policy reads prompts of up to 1024 tokens completely."""
NOTEBOOK = "calibrating"
"""Name under which the cache remembers measured heads."""


@dataclass(frozen=True)
class SavedCalibration:
    """The result of a calibration, and where it was written."""

    calibrated: HeadCalibration
    where: str
    """The file or the cache, human-readable."""
    passages: str
    """The passages that were read, human-readable."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"where": self.where, "passages": self.passages, **self.calibrated.to_dict()}


class _CachedMeasurements:
    """Measured heads, remembered in the cache."""

    def __init__(self, cache: Cache, key: str) -> None:
        self._cache, self._key = cache, key

    def read(self) -> dict[str, list[float]]:
        return dict(self._cache.recall(NOTEBOOK, self._key, dict[str, list[float]]) or {})

    def write(self, values: Mapping[str, list[float]]) -> None:
        self._cache.remember(NOTEBOOK, self._key, dict(values))


def calibrate_file(
    path: str | Path,
    *,
    out: Path | None = None,
    texts: Sequence[Path] = (),
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> SavedCalibration:
    """Measure a model's heads and write the calibration.

    Args:
        path: path of the model.
        out: the file to write; None for the file beside the model, or the cache if that cannot be written.
        texts: files to take the passages from, instead of the default ones.
        device, backend, threads, cache: as for `transom.load`.
        progress: called with the stage and the share done.

    Raises:
        OptionError: it is not a decoder with a tokenizer, its context or a text is too short, or its backend does not
            support a policy for each step.
        SourceError: a text cannot be read, or the model is a bundle.
        TransomError: as `transom.load`.
        OSError: `out` cannot be written.
    """
    path, cache = Path(path), cache or Cache.default()
    resolve(path)  # raises for a bundle: it can be loaded, but a calibration does not change it
    given = {t.name: read_text(t) for t in texts} or default_texts()
    if out is not None and not out.parent.is_dir():
        raise OptionError(f"There is no folder {out.parent}", "Create it, or choose another file with --out")
    with load(
        path, device=device, backend=backend, threads=threads, precision="exact", cache=cache, progress=progress
    ) as model:
        decoder, tokenizer = model._loaded.decoder, model._loaded.tokenizer
        if decoder is None or tokenizer is None:
            raise OptionError(f"{path.name} is not a decoder with a tokenizer", "Calibrate a model that generates text")
        depth = min(DEPTH, (model.context - NEW) // 64 * 64)
        if depth < LEAST_DEPTH:
            raise OptionError(
                f"The model has a context of {model.context} tokens, and prompts of up to 1024 are always read whole",
                "It needs no calibration",
            )
        taken = passages(tokenizer, given, depth + NEW)
        key = artifact_key({
            "format": 1, "content": fingerprint_of(path, cache), "measured": MEASURED,
            "policy": PRESETS["balanced"].to_string(), "tokens": [list(ids) for ids in taken.values()],
        })  # fmt: skip
        found = calibrate(
            model,
            taken,
            memory=_CachedMeasurements(cache, key),
            progress=_shown(progress) if progress is not None else None,
        )
        shape = shape_of(decoder)
        name = model.report.model
    words = f"{', '.join(taken)} ({depth + NEW} tokens each)"
    values = {
        "format": 1,
        "about": f"{name}, calibrated on {words}: balanced reads {found.after.density:.3f} with a divergence of "
        f"{found.after.divergence:.4f} nats, without calibration {found.before.density:.3f} and "
        f"{found.before.divergence:.4f}",
        "model": {"name": name, "shape": shape},
        "heads": [list(layer) for layer in found.heads],
    }
    where = _keep(values, out, path, cache, found)
    return SavedCalibration(found, where, words)


def _keep(values: Mapping[str, Any], out: Path | None, path: Path, cache: Cache, found: HeadCalibration) -> str:
    text = _json(values)
    target = out or place_beside(path)
    try:
        replace_atomically(target, text.encode())
    except OSError:
        if out is not None:
            raise
        heads.remember(cache, fingerprint_of(path, cache), found.heads)
        return f"the cache, because {target.parent} cannot be written"
    return str(target)


def _json(values: Mapping[str, Any]) -> str:
    """One line for each layer's heads."""
    rest = json.dumps({k: v for k, v in values.items() if k != "heads"}, indent=2)
    rows = ",\n".join("    " + json.dumps(layer) for layer in values["heads"])
    return rest[:-2] + ',\n  "heads": [\n' + rows + "\n  ]\n}\n"


def _shown(progress: Progress) -> Any:
    return lambda done, total: progress("calibrate", done / total)
