"""The backend `qnn`: decoders as context binaries for the Hexagon tensor processor (HTP) of Snapdragon chips."""

from __future__ import annotations

from collections.abc import Iterable

from transom.contract import Backend, hookimpl
from transom_mobile_export.qnn.backend import Qnn

__all__ = ["Qnn", "transom_backends"]


@hookimpl
def transom_backends() -> Iterable[Backend]:
    return [Qnn()]
