"""The reference backend passes its own kit, whole, as a plugin author would run it.

Draws: the kit derives its tolerances from the arithmetic; a new seed is a new set of models and inputs.
"""

from __future__ import annotations

from typing import ClassVar

from transom.contract import Backend
from transom.reference import ReferenceBackend
from transom.testing import BackendConformance


class TestReference(BackendConformance):
    backend: ClassVar[Backend] = ReferenceBackend()
