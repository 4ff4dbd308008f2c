"""Verify one collection: print whether it is whole, what is wrong with it, and what is odd about it."""

from pathlib import Path

from paragen.collection import quality_warnings, verification
from paragen.collection.manifest import Manifest, read_manifest
from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.model import base_models


def verify(folder: Path, base: Path | None = None) -> list[str]:
    """Check one collection and print a line on it, a line FAULTY per fault, a line DOUBTFUL per quality warning.

    Args:
        folder: its run folder.
        base: the base model's folder (default: the one under models/ that the manifest names).

    Returns the lines on its faults; none when it is whole.
    """
    name, manifest = paths.relative(folder), None
    try:
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is not None:
            faults = verification.faults_of(folder, manifest) or peft_faults(folder, manifest, base)
        elif folder.is_dir():
            faults = ["has no manifest.json: no finished collection (make clean-checkpoints makes one of a stock run)"]
        else:
            faults = ["does not exist"]
    except UserError as error:
        faults = [str(error)]
    lines = [f"FAULTY {name}: {fault}" for fault in faults]
    for line in lines:
        say(line)
    if not lines and manifest is not None:
        steps = manifest.steps
        size = files.size_of(folder.iterdir()) / 1e6
        say(f"whole  {name}: {len(steps)} checkpoints, steps {steps[0]}-{steps[-1]}, {size:.1f} MB")
        for warning in quality_warnings.find_warnings(folder, manifest):
            say(f"DOUBTFUL {name}: {warning}")
    return lines


def peft_faults(folder: Path, manifest: Manifest, base: Path | None) -> list[str]:
    """What PEFT objects to in the collection's last checkpoint."""
    base = base or paths.MODELS / (manifest.base_name or "unknown")
    if not (base / "config.json").is_file():
        way = base_models.how_to_get(base)
        return [f"cannot be loaded with PEFT here, models/{base.name} is missing; get it with: {way}"]
    return verification.peft_faults(folder, manifest.steps[-1], base)
