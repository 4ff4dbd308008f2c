"""Verify collections: whether each is whole, what is wrong with it, and what is odd about it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import presence, quality_warnings, verification
from paragen.collection.manifest import Manifest, read_manifest
from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.model import base_models


class Verified(NamedTuple):
    """What re-reading a collection showed.

    Attributes:
        folder: its run folder.
        manifest: its manifest; None where that is missing or broken.
        faults: what is wrong with it, a phrase each; none when it is whole.
        warnings: what is odd about a whole one, a phrase each.
        others: files and folders in its folder that are no part of it.
        bytes: the size of its files; 0 where it is not whole.
    """

    folder: Path
    manifest: Manifest | None
    faults: list[str]
    warnings: list[str]
    others: list[str]
    bytes: int

    @property
    def lines(self) -> list[str]:
        """The lines that are printed on it: one if it is whole and per warning, else one per fault; and
        one that names files that are no part of it."""
        name = paths.relative(self.folder)
        kept = [f"KEPT   {name}: no part of the collection: {', '.join(self.others)}"] if self.others else []
        if self.faults or self.manifest is None:
            return [*(f"FAULTY {name}: {fault}" for fault in self.faults), *kept]
        steps = self.manifest.steps
        size = self.bytes / 1e6
        whole = f"whole  {name}: {len(steps)} checkpoints, steps {steps[0]}-{steps[-1]}, {size:.1f} MB"
        return [whole, *(f"DOUBTFUL {name}: {warning}" for warning in self.warnings), *kept]


def verify(folder: Path, base: Path | None = None) -> Verified:
    """Read one collection, check it, and print the lines on it.

    Args:
        folder: its run folder.
        base: the base model's folder (default: the one under models/ that the manifest names).
    """
    found = _examine(folder, base)
    for line in found.lines:
        say(line)
    return found


def _examine(folder: Path, base: Path | None) -> Verified:
    manifest, warnings = None, []
    try:
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is not None:
            faults = verification.faults_of(folder, manifest) or peft_faults(folder, manifest, base)
            warnings = [] if faults else quality_warnings.find_warnings(folder, manifest)
        elif folder.is_dir():
            faults = ["has no manifest.json: no finished collection (make clean-checkpoints makes one of a stock run)"]
        else:
            faults = ["does not exist"]
    except UserError as error:
        faults = [str(error)]
    others = presence.strangers_in(folder, manifest)[1] if manifest is not None else []
    size = files.size_of(folder / name for name in presence.names_of(manifest)) if manifest and not faults else 0
    return Verified(folder, manifest, faults, warnings, others, size)


def peft_faults(folder: Path, manifest: Manifest, base: Path | None) -> list[str]:
    """What PEFT objects to in the collection's last checkpoint."""
    base = base or paths.MODELS / (manifest.base_name or "unknown")
    if not (base / "config.json").is_file():
        way = base_models.how_to_get(base)
        return [f"cannot be loaded with PEFT here, models/{base.name} is missing; get it with: {way}"]
    return verification.peft_faults(folder, manifest.steps[-1], base)


def content_of(found: Iterable[Verified]) -> dict[str, Any]:
    """What verifying collections showed as a JSON object for programs."""
    collections = [
        {
            "folder": paths.relative(one.folder),
            "whole": not one.faults,
            "faults": one.faults,
            "warnings": one.warnings,
            "others": one.others,
            "steps": one.manifest.steps if one.manifest else None,
            "bytes": one.bytes if not one.faults else None,
        }
        for one in found
    ]
    faulty = sum(not one["whole"] for one in collections)
    return {"collections": collections, "summary": {"whole": len(collections) - faulty, "faulty": faulty}}
