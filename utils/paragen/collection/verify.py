"""Verify collections: whether each is whole, what is wrong with it, and what is odd about it."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import presence, quality_warnings, run_identity, verification
from paragen.collection.manifest import Manifest, read_manifest, require_manifest
from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.model import base_models, model_files


class Verified(NamedTuple):
    """What re-reading a collection showed.

    Attributes:
        folder: its run folder.
        manifest: its manifest; None where that is missing or broken.
        faults: what is wrong with it, a phrase each; none when it is whole.
        warnings: what is odd about a whole one, a phrase each.
        pretrain_faults: what is wrong with the run that it was resumed from, where that is here; a phrase each that
            begins with its folder.
        others: files and folders in its folder that are no part of it.
        bytes: the size of its files; 0 where it is not whole.
    """

    folder: Path
    manifest: Manifest | None
    faults: list[str]
    warnings: list[str]
    pretrain_faults: list[str]
    others: list[str]
    bytes: int

    @property
    def lines(self) -> list[str]:
        """The lines that are printed on it: one if it is whole and per warning, else one per fault; and
        one that names files that are no part of it."""
        name = paths.relative(self.folder)
        beside = [f"FAULTY {fault}" for fault in self.pretrain_faults]
        beside += [f"KEPT   {name}: no part of the collection: {', '.join(self.others)}"] if self.others else []
        if self.faults or self.manifest is None:
            return [*(f"FAULTY {name}: {fault}" for fault in self.faults), *beside]
        steps = self.manifest.steps
        size = self.bytes / 1e6
        whole = f"whole  {name}: {len(steps)} checkpoints, steps {steps[0]}-{steps[-1]}, {size:.1f} MB"
        return [whole, *(f"DOUBTFUL {name}: {warning}" for warning in self.warnings), *beside]


def verify(folder: Path, base: Path | None = None, rehash_models: bool = False, pretrains: bool = False) -> Verified:
    """Read one collection, check it, and print the lines on it.

    Args:
        folder: its run folder.
        base: the base model's folder (default: the one under models/ that the manifest names).
        rehash_models: read the base model, too, once in this process, and compare its hashes with the recorded ones.
        pretrains: read the pretrain run that it was resumed from, too, where that lies beside it.
    """
    found = _examine(folder, base, rehash_models)
    if pretrains and found.manifest is not None:
        found = found._replace(pretrain_faults=pretrain_faults(folder, found.manifest))
    for line in found.lines:
        say(line)
    return found


def _examine(folder: Path, base: Path | None, rehash_models: bool) -> Verified:
    manifest, warnings = None, []
    try:
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is not None:
            base = base or paths.MODELS / (manifest.base_name or "unknown")
            faults = verification.faults_of(folder, manifest) or peft_faults(folder, manifest, base)
            faults += model_faults(manifest, base) if rehash_models and (base / "config.json").is_file() else []
            warnings = [] if faults else quality_warnings.find_warnings(folder, manifest)
        elif folder.is_dir():
            faults = ["has no manifest.json: no finished collection (make clean-checkpoints makes one of a stock run)"]
        else:
            faults = ["does not exist"]
    except UserError as error:
        faults = [str(error)]
    others = presence.strangers_in(folder, manifest)[1] if manifest is not None else []
    size = files.size_of(folder / name for name in presence.names_of(manifest)) if manifest and not faults else 0
    return Verified(folder, manifest, faults, warnings, [], others, size)


def peft_faults(folder: Path, manifest: Manifest, base: Path) -> list[str]:
    """What PEFT objects to in the collection's last checkpoint."""
    if not (base / "config.json").is_file():
        way = base_models.how_to_get(base)
        return [f"cannot be loaded with PEFT here, models/{base.name} is missing; get it with: {way}"]
    return verification.peft_faults(folder, manifest.steps[-1], base)


def pretrain_faults(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the pretrain run beside a collection from which that was resumed; none where it is gone."""
    pretrain = folder.with_name(manifest.pretrain.run) if manifest.pretrain else None
    if pretrain is None or not (pretrain / paths.MANIFEST).is_file():
        return []
    try:
        found = require_manifest(pretrain)
    except UserError as error:
        return [str(error)]
    faults = verification.pretrain_faults(pretrain, found) if found.phase == "pretrain" else ["is no pretrain run"]
    return [f"{paths.relative(pretrain)}: {fault}" for fault in faults]


def model_faults(manifest: Manifest, base: Path) -> list[str]:
    """How the base model in a folder, all of whose files are read, differs from the one that a manifest records."""
    identity, changed = _read_model(base)
    named = f": {', '.join(changed)} differ from what make model put there" if changed else ""
    way_out = f"{named}; get it again with: {base_models.how_to_get(base)}"
    recorded = {"base_model": manifest.base_model, "tokenizer": manifest.tokenizer}
    what = {"base_model": "config or weights", "tokenizer": "tokenizer files"}
    return [
        f"models/{base.name} has other {what[section]} than it was trained with{way_out}"
        for section, part in recorded.items()
        if part is not None and part.sha256 is not None and part.sha256 != identity[section]["sha256"]
    ]


@cache
def _read_model(base: Path) -> tuple[dict[str, Any], list[str]]:
    """The sections of a manifest on a base model, and its files that differ from what `make model` recorded.

    All files are read, once in this process.
    """
    say(f"reading models/{base.name}")
    model_files.forget_hashes(base)
    return run_identity.model_identity_of(base), base_models.changed_files(base)


def content_of(found: Iterable[Verified]) -> dict[str, Any]:
    """What verifying collections showed as a JSON object for programs."""
    collections = [
        {
            "folder": paths.relative(one.folder),
            "whole": not one.faults,
            "faults": one.faults,
            "warnings": one.warnings,
            "pretrain_faults": one.pretrain_faults,
            "others": one.others,
            "steps": one.manifest.steps if one.manifest else None,
            "bytes": one.bytes if not one.faults else None,
        }
        for one in found
    ]
    faulty, pretrains = (sum(map(bool, (one[key] for one in collections))) for key in ("faults", "pretrain_faults"))
    counts = {"whole": len(collections) - faulty, "faulty": faulty, "faulty_pretrains": pretrains}
    return {"collections": collections, "summary": counts}
