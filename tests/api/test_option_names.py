"""An option that a function does not have is answered with the names that it has."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import transom
from transom.errors import OptionError
from transom.loading.options import NAMES


@pytest.mark.parametrize("function", ["load", "export"])
def test_the_names_are_those_of_the_function(function: str) -> None:
    parameters = inspect.signature(getattr(transom, function)).parameters.values()
    assert sorted(NAMES[function]) == sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def test_an_option_of_load_alone_is_refused_by_export(tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": "reference"}
    with pytest.raises(OptionError, match=r"export\(\) has no option 'backend'") as caught:
        transom.export("model.gguf", target="cpu", out=tmp_path / "bundle", **options)
    assert "format" in caught.value.fix
