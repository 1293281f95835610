"""Heat maps of the keys that sparse attention reads, layer by position, as a PNG or a self-contained HTML page."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from transom.errors import MissingExtra, OptionError

if TYPE_CHECKING:
    from transom.evaluation.densities import Densities

TITLE_WIDTH = 90
"""Characters of a line of the title of a picture; a policy is often longer."""
ENDINGS = (".png", ".html")

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
  body { font: 14px system-ui, sans-serif; margin: 2em; }
  table { border-collapse: collapse; }
  td { width: 14px; height: 14px; padding: 0; }
  th { font-weight: normal; text-align: right; padding-right: 6px; }
  td:hover { outline: 2px solid black; }
</style>
<h1>{{ title }}</h1>
<p>{{ about }} Rows are layers, the first on top; columns are parts of the prompt. Hover over a cell for its value.</p>
<table>
{%- for row in rows %}
<tr><th>{{ loop.index0 }}</th>
{%- for cell in row %}
  <td title="{{ cell.where }}: {{ cell.share }}" style="background:{{ cell.color }}"></td>
{%- endfor %}
</tr>
{%- endfor %}
</table>
</html>
"""


def check(path: Path) -> Path:
    """The path itself, if a heat map can be written there.

    Raises:
        OptionError: the suffix is neither .png nor .html, or the folder does not exist.
        MissingExtra: a PNG needs matplotlib, which is not installed.
    """
    if path.suffix.lower() not in ENDINGS:
        raise OptionError(f"{path.name} is not a file name for a heat map", f"Use the suffix {' or '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise OptionError(f"There is no folder {path.parent}", "Create it, or choose another file")
    if path.suffix.lower() == ".png":
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            raise MissingExtra("A heat map as PNG needs matplotlib", "plot") from None
    return path


def draw(found: Densities, path: Path, title: str) -> None:
    """Write a heat map in the format of the file's suffix.

    Raises:
        OSError: it cannot be written.
    """
    about = f"Share of the keys that each layer reads; mean over layers and positions: {found.by_layer.mean():.3f}."
    if path.suffix.lower() == ".png":
        _picture(found, path, title, about)
    else:
        path.write_text(_page(found, title, about), encoding="utf-8")


def _picture(found: Densities, path: Path, title: str, about: str) -> None:
    from matplotlib.figure import Figure

    layers = len(found.by_layer)
    figure = Figure(figsize=(9, 2 + layers * 0.15), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        found.by_layer, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest",
        extent=(0, found.ends[-1], layers - 0.5, -0.5),
    )  # fmt: skip
    axes.set(xlabel="position, tokens", ylabel="layer")
    figure.suptitle(textwrap.fill(title, TITLE_WIDTH), fontsize=11)
    figure.colorbar(image, label="share of the keys read")
    figure.text(0.01, 0.005, about, fontsize=7)
    figure.savefig(path, dpi=120)


def _page(found: Densities, title: str, about: str) -> str:
    from jinja2 import Environment

    starts = (0, *found.ends[:-1])
    rows = [
        [
            {"share": f"{share:.3f}", "color": _color(share), "where": f"layer {layer}, tokens {start} to {end}"}
            for share, start, end in zip(shares, starts, found.ends, strict=True)
        ]
        for layer, shares in enumerate(found.by_layer)
    ]
    return Environment(autoescape=True).from_string(_PAGE).render(title=title, about=about, rows=rows) + "\n"


def _color(share: float) -> str:
    """A color from white (0) to dark blue (1)."""
    return f"hsl(222 70% {97 - 67 * min(max(share, 0.0), 1.0):.0f}%)"
