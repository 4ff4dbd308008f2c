"""Checks a run that another node sent (STAGE=1) before it is published."""

import os
from pathlib import Path
from typing import NamedTuple

from paragen.collection import finishing, run_files, run_identity
from paragen.collection.manifest import Manifest, read_manifest
from paragen.common import files, paths
from paragen.common.cli import UserError


class SentFile(NamedTuple):
    """A file of a finished run, as its node read it."""

    bytes: int
    sha256: str


def check_arrived(staging: Path, folder: Path, sent: dict[str, SentFile]) -> None:
    """Raise UserError unless the files in `staging`, read from disk, are exactly those that the node sent.

    Args:
        staging: where the run was received.
        folder: its run folder, for messages.
        sent: by name relative to the run folder.
    """
    received = {str(path.relative_to(staging)): path for path in staging.rglob("*") if path.is_file()}
    for name in sorted(received.keys() | sent.keys()):
        if name in received and name in sent:
            with open(received[name], "rb") as file:
                os.fsync(file.fileno())
            if SentFile(received[name].stat().st_size, files.sha256_of(received[name])) == sent[name]:
                continue
        raise UserError(f"{paths.relative(folder / name)}: came back with other bytes than it was sent; run it again")


def check_manifest(staging: Path, folder: Path) -> Manifest:
    """The manifest of a received run. Raises UserError unless the files beside it are those that it lists."""
    manifest = read_manifest(staging)
    if manifest is None:
        raise UserError(f"{paths.relative(folder)}: came back without manifest.json; run it again")
    entries, names = manifest.checkpoints, {paths.MANIFEST, run_files.LOG, run_files.PICTURE}
    if manifest.phase == "finetune":
        names |= {paths.ADAPTER_CONFIG, *(entry.file_name for entry in entries)}
        finishing.read_back(staging, entries)
        matches = files.sha256_of(staging / paths.ADAPTER_CONFIG) == manifest.adapter_config_sha256
    else:
        checkpoints = {entry.step: staging / f"checkpoint-{entry.step}" for entry in entries}
        names |= {path.name for path in checkpoints.values()}
        found = {step: run_identity.pretrain_of(path) for step, path in checkpoints.items()}
        matches = all((one := found[entry.step]) is not None and one["sha256"] == entry.sha256 for entry in entries)
    if not matches or not {path.name for path in staging.iterdir()} <= names or manifest.run != folder.name:
        raise UserError(f"{paths.relative(folder)}: came back, but differs from its manifest; run it again")
    return manifest
