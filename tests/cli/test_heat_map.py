"""`transom bench --heat-map`: what sparse attention reads, drawn."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from transom.cli import heat_map
from transom.errors import MissingExtra

EAGER = '{"coverage": 0.3, "columns": 4, "dense_below": 0, "max_density": 0.6}'


@pytest.fixture(autouse=True)
def policy(tmp_path: Path) -> None:
    (tmp_path / "eager.json").write_text(EAGER)


def test_a_page_and_a_picture_of_every_layer(bare: Any, model: Path, tmp_path: Path) -> None:
    command = ("bench", model, "--backend", "reference", "--sparsity", "eager.json", "--prompt-tokens", "200")
    status, out, err = bare(*command, "--heat-map", "a.html", "--heat-map", "b.png", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["ends"] == [200]
    assert all(0 < share < 1 for layer in found["densities"] for share in layer)
    page = (tmp_path / "a.html").read_text()
    shown = re.findall(r'<td title="layer (\d+), tokens 0 to 200: ([0-9.]+)"', page)
    assert [int(layer) for layer, _ in shown] == list(range(len(found["densities"])))
    assert [float(share) for _, share in shown] == pytest.approx([row[0] for row in found["densities"]], abs=1e-3)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--heat-map", "a.html"), "reads every key"),
        (("--heat-map", "a.jpg", "--sparsity", "eager.json"), "Use the suffix .png or .html"),
        (("--heat-map", "none/a.html", "--sparsity", "eager.json"), "There is no folder none"),
        (
            ("--heat-map", "a.html", "--sparsity", "eager.json", "--prompt-tokens", "100000"),
            "is too long for this model",
        ),
        (("--heat-map", "a.html", "--sparsity", "eager.json", "--device", "cpu", "--device", "cpu"), "Give it once"),
    ],
)
def test_what_cannot_be_drawn_is_refused(bare: Any, model: Path, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = bare("bench", model, "--backend", "reference", *arguments)
    assert status == 2
    assert said in err
    assert out == ""


def test_a_picture_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(MissingExtra, match=re.escape("pip install 'transom[plot]'")):
        heat_map.check(tmp_path / "b.png")
    assert heat_map.check(tmp_path / "b.html") == tmp_path / "b.html"
