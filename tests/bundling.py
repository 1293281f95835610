"""Shared by the tests of bundles: a made-up backend that compiles for phones, and a search for left-over files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from made_up import MadeUp

from transom.contract import Offer, Refusal, Verdict

HEXAGON = "snapdragon-8-gen-2"


class Tools(MadeUp):
    """Compiles for phones, runs on none of them, and insists on the architecture that it compiled for."""

    def probe(self, devices: Any) -> Any:
        return [
            Offer(d.id, self.band, self.why, runs_here=d.kind != "remote")
            if d.kind == self.kind or d.arch.startswith("hexagon")
            else Refusal(d.id, "wrong_device", "not for it")
            for d in devices
        ]

    def compile(self, part: Any, device: Any, options: Any, progress: Any) -> Any:
        made = super().compile(part, device, options, progress)
        return replace(made, requires={**made.requires, "arch": device.arch})

    def check(self, artifact: Any, device: Any) -> Verdict:
        made = artifact.requires["arch"]
        return Verdict("ok") if made == device.arch else Verdict("rebuild", f"made for {made}, this is {device.arch}")


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "bundle" in p.name)
