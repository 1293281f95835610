"""Verifies a bundle: each variant runs the check prompt on a device of this machine and is compared with the reference
outputs that the bundle contains. The work of `transom bundle verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transom.artifacts import Cache
from transom.bundles.bundle import open_bundle
from transom.bundles.manifest import BundleError, BundleManifest, read_manifest
from transom.bundles.opening import load_bundle
from transom.errors import CacheError, DoesNotFit, OptionError, SelectionError, TransomError
from transom.loading.load_state import LoadState
from transom.loading.options import LoadOptions
from transom.sparsity import Sparsity

if TYPE_CHECKING:
    from transom.contract import Progress


@dataclass(frozen=True)
class VariantResult:
    """The result for one variant."""

    variant: str
    state: Literal["passed", "failed", "not here"]
    where: str
    """Backend and device that ran it; empty if none did."""
    text: str
    """The measured agreement, or the reason why it failed or did not run."""

    def __str__(self) -> str:
        return f"{self.variant}: {self.state}" + (f" on {self.where}" if self.where else "") + f": {self.text}"


def verify_bundle(
    folder: Path,
    *,
    variants: Sequence[str] = (),
    device: str = "auto",
    probe_file: str | Path | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> tuple[BundleManifest, list[VariantResult]]:
    """Check the hash of each file, then run the check prompt through the variants.

    Args:
        variants: names of the variants to run; empty for all.
        device: `"auto"`, or the id of a device of this machine.

    Raises:
        BundleError: the bundle is damaged.
        OptionError: there is no such variant or device.
    """
    cache, progress = cache or Cache.default(), progress or (lambda stage, share: None)
    manifest = read_manifest(folder)
    names = [v.name for v in manifest.variants]
    for name in variants:
        if name not in names:
            raise OptionError(f"The bundle {folder} has no variant {name!r}", f"It has {', '.join(names)}")
    open_bundle(folder, cache, progress, known=False).release()
    return manifest, [_verify_variant(folder, name, device, probe_file, cache, progress) for name in variants or names]


def _verify_variant(
    folder: Path, name: str, device: str, probe_file: str | Path | None, cache: Cache, progress: Progress
) -> VariantResult:
    options: dict[str, Any] = {"context": None, "precision": "auto", "threads": None, "max_kl": None}
    state = LoadState(LoadOptions(options, Sparsity.parse("off"), (), "always"), cache, progress)
    try:
        with load_bundle(folder, state, device=device, probe_file=probe_file, variant=name) as model:
            report = model.report
            return VariantResult(name, "passed", f"{report.backend} on {report.device.id}", report.check)
    except SelectionError as error:
        details = f" ({'; '.join(error.details)})" if error.details else ""
        return VariantResult(name, "not here", "", " ".join(filter(None, (f"{error.cause}.", error.fix))) + details)
    except DoesNotFit as error:
        return VariantResult(name, "not here", "", error.cause)
    except (OptionError, BundleError, CacheError):
        raise
    except TransomError as error:
        return VariantResult(name, "failed", "", error.cause)
