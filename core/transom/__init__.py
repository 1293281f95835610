"""Transom runs language models on the available hardware.

    import transom

    model = transom.load("model.gguf")
    print(model.generate("Why is the sky blue?", max_new_tokens=64).text)
    print(model.report)

Importing this package imports nothing heavy, not even `typing`. Each name is loaded when it is first used, so that the
command line can handle Ctrl-C before anything slow is imported.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from transom.api import backends, devices, explain, export, load, plan_export
    from transom.artifacts import Cache
    from transom.bundles.exported import Exported
    from transom.contract import Cancelled, Device
    from transom.errors import TransomError
    from transom.generation.model import Model
    from transom.generation.params import SamplingParams
    from transom.generation.results import Generation
    from transom.sources.torch import TorchSource

_HOME = {
    "Cache": "transom.artifacts",
    "Cancelled": "transom.contract",
    "Device": "transom.contract",
    "Exported": "transom.bundles.exported",
    "Generation": "transom.generation.results",
    "Model": "transom.generation.model",
    "SamplingParams": "transom.generation.params",
    "TorchSource": "transom.sources.torch",
    "TransomError": "transom.errors",
    "backends": "transom.api",
    "devices": "transom.api",
    "explain": "transom.api",
    "export": "transom.api",
    "load": "transom.api",
    "plan_export": "transom.api",
}

__all__ = [
    "Cache",
    "Cancelled",
    "Device",
    "Exported",
    "Generation",
    "Model",
    "SamplingParams",
    "TorchSource",
    "TransomError",
    "backends",
    "devices",
    "explain",
    "export",
    "load",
    "plan_export",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("transom")
    if name not in _HOME:
        raise AttributeError(f"module 'transom' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
