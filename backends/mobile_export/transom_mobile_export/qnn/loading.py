"""Load: open the contexts of an artifact and create its session."""

from __future__ import annotations

import numpy as np

from transom.authoring.opening import context_of, paths_of, reading_artifact
from transom.contract import Artifact, Limits, Options
from transom.sessions import BufferedSession
from transom_mobile_export.qnn import sdk
from transom_mobile_export.qnn.layout import EMBEDDING_FILE, VARIANT_FILE, QnnVariant
from transom_mobile_export.qnn.probing import Chip
from transom_mobile_export.qnn.running import PartGraphs, QnnEngine

DAMAGED = "Remove it with: transom cache clear; or export the bundle again"


def load_artifact(artifact: Artifact, options: Options) -> BufferedSession:
    """A session over the artifact, which runs one sequence in a step.

    Raises:
        EngineError: this backend did not write the files, or QNN does not open them.
    """
    files = paths_of(artifact)
    with reading_artifact(DAMAGED):
        variant = QnnVariant.from_json(files[VARIANT_FILE].read_text())
        shape = variant.vocabulary, variant.hidden
        table = np.memmap(files[EMBEDDING_FILE], "<f2", "r", shape=shape)
        paths = [(files[part.prefill], files[part.decode]) for part in variant.parts]
    chip = Chip(variant.soc_model, variant.htp_arch)
    graphs = [PartGraphs(*(sdk.open_context(path, chip) for path in pair)) for pair in paths]
    context = context_of(options, variant.context)
    return session_over(QnnEngine(variant, table, graphs), context)


def session_over(engine: QnnEngine, context: int) -> BufferedSession:
    """A session whose states hold up to `context` tokens, at most as many as the graphs do."""
    variant = engine.variant
    return BufferedSession(engine, variant.vocabulary, Limits(1, min(variant.chunk, context), context, page_tokens=0))
