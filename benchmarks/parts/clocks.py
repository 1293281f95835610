"""The state of an NVIDIA card while it works, and the packages that use it. Imports no torch."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Sequence
from typing import Any

from parts.results import installed
from transom.contract import Device


def state(device: Device) -> dict[str, Any]:
    """Clocks (MHz), temperature (°C), power (W) and reasons for throttling, from NVML."""
    try:
        import pynvml

        with _nvml(pynvml):
            card = pynvml.nvmlDeviceGetHandleByPciBusId(device.identity.removeprefix("pci:").split()[0])
            ask = {
                "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
                "most_sm_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(card, pynvml.NVML_CLOCK_SM),
                "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_MEM),
                "celsius": lambda: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU),
                "watts": lambda: pynvml.nvmlDeviceGetPowerUsage(card) / 1e3,
                "most_watts": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1e3,
                "slowed_by": lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card),
            }
            found: dict[str, Any] = {}
            for name, question in ask.items():
                with contextlib.suppress(pynvml.NVMLError, AttributeError):
                    found[name] = question()
            return found
    except Exception as e:  # noqa: BLE001  results are valid without it, and the reason is reported
        return {"missing": str(e)}


@contextlib.contextmanager
def _nvml(pynvml: Any) -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def versions(packages: Sequence[str], device: Device) -> dict[str, Any]:
    """Versions of Python, of the packages that are installed, and of the device's drivers."""
    drivers = {f"driver: {name}": version for name, version in device.drivers.items()}
    return {"platform": platform.platform()} | installed(packages) | drivers
