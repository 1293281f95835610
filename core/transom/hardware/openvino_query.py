"""Asks OpenVINO for its GPUs and NPUs and prints them as JSON. Run as a script in a separate process.

Loading a GPU driver may take seconds or kill the process; neither must happen to the host.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def describe(openvino: Any) -> list[dict[str, object]]:
    """One dictionary for each device but the CPU: id, name, type, architecture, memory, capabilities, driver, uuid."""
    core = openvino.Core()

    def ask(device: str, *properties: str) -> object:
        for name in properties:
            try:
                return core.get_property(device, name)
            except (RuntimeError, TypeError):  # the plugin does not know the property, or it has no Python form
                continue
        return None

    def text(value: object) -> str:
        return "" if value is None else str(value)

    found: list[dict[str, object]] = []
    for device in core.available_devices:
        kind = device.split(".")[0]
        if kind not in ("GPU", "NPU"):
            continue
        memory = ask(device, "GPU_DEVICE_TOTAL_MEM_SIZE", "NPU_DEVICE_TOTAL_MEM_SIZE")
        capabilities = ask(device, "OPTIMIZATION_CAPABILITIES")
        found.append(
            {
                "id": device,
                "name": text(ask(device, "FULL_DEVICE_NAME")),
                "type": text(ask(device, "DEVICE_TYPE")),
                "architecture": text(ask(device, "DEVICE_ARCHITECTURE")),
                "memory": memory if isinstance(memory, int) else 0,
                "capabilities": [str(c) for c in capabilities] if isinstance(capabilities, list | tuple) else [],
                "driver": text(ask(device, "NPU_DRIVER_VERSION", "GPU_DRIVER_VERSION")),
                "uuid": text(ask(device, "DEVICE_UUID")),
            }
        )
    return found


if __name__ == "__main__":
    import openvino

    json.dump(describe(openvino), sys.stdout)
