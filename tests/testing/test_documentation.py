"""`docs/operators.md` agrees with the registry and the first-party backends."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_kit import NoAttention, NoMatMul

from transom.ops import operators
from transom.reference import ReferenceBackend
from transom.testing import documentation
from transom.testing.documentation import document, first_party, main

FILE = Path(__file__).parents[2] / "docs" / "operators.md"


def test_file_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == document(first_party()), "stale; run: make docs"


def test_every_operator_is_in_it_with_attributes_and_meaning() -> None:
    text = document({"reference": ReferenceBackend()})
    for schema in operators():
        assert f"`{schema.domain}::{schema.name}`" in text if schema.domain else f"`{schema.name}`" in text
        for attribute in schema.attributes:
            assert f"| `{attribute.name}` | {attribute.type} |" in text
    assert "| `MatMul` | own | none | yes |" in text


def test_coverage_says_no_and_why_and_what_runs_as_its_body() -> None:
    text = document({"plain": ReferenceBackend(), "no_attention": NoAttention(), "no_matmul": NoMatMul()})
    assert "| `transom::CachedAttention` | own | own | yes | as its body | yes |" in text
    assert "| `MatMul` | own | none | yes | yes | no |" in text
    assert "- `MatMul`: no kernel for MatMul" in text
    assert "Why `no_attention` does not take some nodes as they are:" in text


def test_command_writes_the_file_and_checks_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one backend, which is quick; all of them are asked above."""
    monkeypatch.setattr(documentation, "first_party", lambda installed: {"reference": ReferenceBackend()})
    path = tmp_path / "operators.md"
    assert main([str(path), "--check"]) == 1
    assert "run: make docs" in capsys.readouterr().out
    assert main([str(path)]) == 0
    assert main([str(path), "--check"]) == 0
    path.write_text(path.read_text() + "edited by hand\n")
    assert main([str(path), "--check"]) == 1
