"""The files of a bundle besides compiled models: tokenizer, chat template, licenses, README, files for apps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.artifacts.entries import check_file_name
from transom.contract import Backend
from transom.contract_optional import AppBackend
from transom.errors import TransomError
from transom.preparation.cached_source import TOKENIZER_HEADER
from transom.preparation.memory import size
from transom.preparation.plugin_calls import guarded
from transom.sources import local_path, resolve

if TYPE_CHECKING:
    from transom.bundles.manifest import BundleManifest, Variant
    from transom.preparation.cached_source import CachedSource
    from transom.text.proving import TextComparison

README = "README.md"
_LICENSE = re.compile(r"((un)?licen[cs]e|copying)(?![a-z]).*|notice(\.\w+)?", re.IGNORECASE)
"""Names of license files."""
_LONGEST_LICENSE = 1 << 20
"""Bytes. A longer file with such a name is not a license."""


def texts_of(source: CachedSource) -> tuple[dict[str, bytes], TextComparison | None]:
    """Tokenizer, chat template and generation defaults, in Hugging Face's format and in Transom's, with the comparison
    of the two.

    Raises:
        TextMismatch: the tokenizer in Hugging Face's format gives other tokens.
    """
    from transom.text.proving import verify_texts
    from transom.text.to_hf import hf_files

    files = {n: source.files.read(n) for n in ("chat_template.json", "generation.json") if n in source.files.files}
    tokenizer, template = source.tokenizer(), source.chat_template()
    if tokenizer is None:
        return files, None
    files |= hf_files(tokenizer, template, source.generation())
    files[TOKENIZER_HEADER] = tokenizer.header().encode()
    return files, verify_texts(tokenizer, template, files)


def licenses_of(model: Any) -> list[Path]:
    """The license files beside a model."""
    path = local_path(model)
    if path is None:
        return []
    folder = path if path.is_dir() else path.parent
    found = [p for p in folder.iterdir() if _LICENSE.fullmatch(p.name) and p.is_file()]
    return sorted(p for p in found if p != path and p.stat().st_size <= _LONGEST_LICENSE)


def license_of(model: Any, licenses: list[Path]) -> str | None:
    """The license that the model names, or the name of a license file beside it; None: neither exists."""
    path = local_path(model)
    if path is None:
        return None
    try:
        named = resolve(path).license(path)
    except TransomError:  # loading the model reports the error
        return None
    return named or (licenses[0].name if licenses else None)


def app_files(
    manifest: BundleManifest, backends: Mapping[str, Backend], texts: Mapping[str, bytes]
) -> dict[str, bytes]:
    """README.md and the backends' files for apps, by name. Raises EngineError if a backend fails to make its files."""

    def made_by(backend: AppBackend, variant: Variant) -> dict[str, bytes]:
        made = backend.app_files(manifest.head(), variant.to_json(), texts)
        return {check_file_name(name): bytes(content) for name, content in made.items()}

    files: dict[str, bytes] = {}
    parts = []
    for variant in manifest.variants:
        backend = backends[variant.backend]
        if not isinstance(backend, AppBackend):
            continue
        made = guarded(variant.backend, "writing files for apps", partial(made_by, backend, variant))
        if (part := made.pop(README, None)) is not None:
            parts.append(part.decode().strip())
        files |= made
    files[README] = "\n\n".join([_readme(manifest), *dict.fromkeys(parts)]).encode() + b"\n"
    return files


def _readme(manifest: BundleManifest) -> str:
    decoder = manifest.decoder
    lines = [
        f"# {manifest.name}",
        "",
        "A language model, compiled by Transom for the devices below. Do not change the files in this folder: "
        "`manifest.json` has the hash of each.",
        "",
        "| Variant | Device | Backend | Precision | Context | Weights | Memory with a full context |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(variant) for variant in manifest.variants]
    lines += ["", f"License of the model: {manifest.license or 'not stated; ask the author of the model'}."]
    if decoder is not None:
        expected = json.dumps(list(manifest.tokens[:8]))
        lines += [
            "",
            "`tokenizer.json`, `tokenizer_config.json` (with the chat template) and `generation.json` (sampling "
            "defaults and end-of-sequence tokens) are for all variants. The fixed prompt begins with the tokens "
            f"{expected}; `expected.best` in the manifest has the expected next token after each.",
        ]
    lines += [
        "",
        'On a computer: `transom run . "Hello"`; `transom bundle verify .` checks the expected outputs.',
    ]
    return "\n".join(lines)


def _row(variant: Variant) -> str:
    full = size(variant.needed(variant.context)) if variant.memory else "-"
    weights = size(variant.memory["weights"]) if variant.memory else "-"
    target = variant.target.name or variant.target.id
    numbers = variant.precision or "as in the model"
    context = str(variant.context) if variant.context else "-"
    return (
        f"| `{variant.name}` | {target} ({variant.target.arch}) | {variant.backend} {variant.backend_version} "
        f"| {numbers} | {context} | {weights} | {full} |"
    )
