"""Writes the tables of the pages from the files in benchmarks/results; `make docs` runs it.

    python benchmarks/tables.py                             # needs: pip install -e .

A section of a page is between two markers. Until all of its files are there, the page has no markers for it. The
sections of cards are always there: they take whatever files of `gpu.py` and `rtx.py` exist.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts import report
from parts.markdown import between
from parts.results import FOLDER, BenchResult, about, console, read
from tables_parts import budgets, builds, engines, fidelity, phones, plans, profiles, starts

ROOT = Path(__file__).resolve().parents[1]
PERFORMANCE, SPARSITY, MOBILE = "docs/performance.md", "docs/sparsity.md", "docs/mobile-export.md"


@dataclass(frozen=True)
class Section:
    """A part of a page that is generated."""

    page: str
    name: str
    """As in the markers."""
    files: tuple[str, ...]
    """In benchmarks/results."""
    write: Callable[[Sequence[BenchResult]], list[str]]
    command: bool = True
    """Whether the section begins with the commands of its files."""
    machine: bool = True
    """Whether it ends with their machine, versions and dates: not for what is computed from shapes alone."""

    def measured(self, folder: Path) -> bool:
        return all((folder / file).exists() for file in self.files)

    def body(self, folder: Path) -> str:
        """Raises ValueError if a file is no result of a benchmark."""
        found = [read(folder / file) for file in self.files]
        before = [*console(found), ""] if self.command else []
        after = ["", *dict.fromkeys(map(about, found))] if self.machine else []
        return "\n".join([*before, *self.write(found), *after])


SECTIONS = (
    Section(PERFORMANCE, "engines", ("cpu-engines.json",), engines.comparison),
    Section(PERFORMANCE, "openvino", ("cpu-openvino.json",), engines.through_openvino),
    Section(PERFORMANCE, "openvino_bf16", ("cpu-openvino-bf16.json",), engines.through_openvino),
    Section(PERFORMANCE, "openvino_sparse", ("cpu-openvino-sparse.json",), engines.measured_only),
    Section(PERFORMANCE, "busy", ("cpu-busy.json",), engines.comparison),
    Section(PERFORMANCE, "long", ("cpu-long.json",), engines.comparison),
    Section(PERFORMANCE, "peers", ("cpu-peers-4k.json", "cpu-peers-16k.json"), fidelity.peers),
    Section(PERFORMANCE, "longest", ("cpu-66k.json",), engines.by_length),
    Section(PERFORMANCE, "budget", ("cpu-budget.json",), budgets.budgets),
    Section(PERFORMANCE, "amx", ("cpu-amx.json",), engines.comparison),
    Section(PERFORMANCE, "amx_long", ("cpu-amx-long.json",), engines.comparison),
    Section(PERFORMANCE, "amx_profile", ("cpu-amx-profile.json",), profiles.summary),
    Section(
        PERFORMANCE, "amx_precision",
        ("cpu-amx-fidelity-smollm2.json", "cpu-amx-fidelity-gemma3.json", "cpu-amx-fidelity-qwen2.json"),
        fidelity.by_model,
    ),
    Section(
        PERFORMANCE, "k_quants", ("cpu-k-gemma3.json", "cpu-k-qwen2.json", "cpu-k-1b.json"), engines.by_model,
    ),
    Section(PERFORMANCE, "random", ("cpu-1b.json",), engines.comparison),
    Section(PERFORMANCE, "random_16k", ("cpu-1b-16k.json",), engines.comparison),
    Section(PERFORMANCE, "random_profile", ("cpu-1b-profile.json",), profiles.summary),
    Section(
        PERFORMANCE, "rtx_build", ("engines-1b.json", "engines-sample.json", "engines-sparse.json"), builds.builds
    ),
    Section(PERFORMANCE, "profile", ("cpu-profile.json",), profiles.whole),
    Section(PERFORMANCE, "profile_16k", ("cpu-profile-16k.json",), profiles.summary),
    Section(PERFORMANCE, "starts", ("cold-start.json",), starts.stages),
    Section(PERFORMANCE, "precision", ("cpu-fidelity.json",), fidelity.precision_alone),
    Section(
        PERFORMANCE, "precision_models",
        ("cpu-fidelity-smollm2.json", "cpu-fidelity-gemma3.json", "cpu-fidelity-qwen2.json"), fidelity.by_model,
    ),
    Section(SPARSITY, "presets", ("cpu-fidelity.json",), fidelity.presets, command=False),
    Section(SPARSITY, "lengths", ("cpu-fidelity-lengths.json", "cpu-fidelity-16k.json"), fidelity.lengths),
    Section(
        SPARSITY, "retrieval", ("cpu-fidelity.json", "cpu-fidelity-lengths.json"), fidelity.retrieval,
        command=False, machine=False,
    ),
    Section(MOBILE, "precisions", ("phone.json",), phones.precisions),
    Section(MOBILE, "sparse_cost", ("phone-sparse-cost.json",), phones.sparse_cost, machine=False),
    Section(MOBILE, "sparse_fidelity", ("phone-sparse-2048.json", "phone-sparse-512.json"), phones.sparse_fidelity),
    Section(MOBILE, "portable", ("onnx-fidelity.json",), phones.portable),
    Section(MOBILE, "sizes", ("phone-plan.json",), plans.sizes, machine=False),
    Section(MOBILE, "needed", ("phone-plan.json",), plans.needed, command=False, machine=False),
    Section(MOBILE, "published", ("phone-plan.json",), plans.published, command=False, machine=False),
)  # fmt: skip
CARDS = ("gpu", "rtx")
"""Scripts whose files are `<script>-<card>.json`, with sections of the same names in docs/performance.md."""


def card_results(script: str, folder: Path) -> list[dict[str, Any]]:
    """The results of all cards.

    Raises:
        ValueError: a file is of another script, or of a dry run.
    """
    found = []
    for path in sorted(folder.glob(f"{script}-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or result.get("script") != script:
            raise ValueError(f"{path} is not a result of benchmarks/{script}.py")
        if result["dry"]:
            raise ValueError(f"{path} is of a dry run: it has no times")
        found.append(result)
    return found


def bodies(page: str, folder: Path = FOLDER) -> dict[str, str]:
    """The text of each section of a page that is measured, by name."""
    found = {s.name: s.body(folder) for s in SECTIONS if s.page == page and s.measured(folder)}
    if page == PERFORMANCE:
        found |= {script: report.section(card_results(script, folder)) for script in CARDS}
    return found


def generated(page: str, text: str, folder: Path = FOLDER) -> str:
    """The text of a page with its sections generated.

    Raises:
        ValueError: the page lacks the markers of a measured section, or a file is no result.
    """
    for name, body in bodies(page, folder).items():
        text = between(text, name, body)
    return text


def used(folder: Path = FOLDER) -> set[str]:
    """Names of the result files that a section uses."""
    cards = {path.name for script in CARDS for path in folder.glob(f"{script}-*.json")}
    return cards.union(*(section.files for section in SECTIONS if section.measured(folder)))


def write(root: Path = ROOT, folder: Path = FOLDER) -> int:
    """Write all pages; the exit status."""
    try:
        made = {
            root / page: generated(page, (root / page).read_text(encoding="utf-8"), folder)
            for page in (PERFORMANCE, SPARSITY, MOBILE)
        }
    except (OSError, ValueError) as e:
        print(e, file=sys.stderr)
        return 1
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    sys.exit(write())
