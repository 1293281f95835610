"""Lets these tests load models as the fixtures of `load_fixtures` describe, and import modules beside them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from load_fixtures import clean_environment, elsewhere, export, here, packages, tiny_model

__all__ = ["clean_environment", "elsewhere", "export", "here", "packages", "tiny_model"]
