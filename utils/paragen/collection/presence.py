"""Compares the files of a run with its manifest by their names and lengths. `verification.py` reads them."""

import os
from pathlib import Path

from paragen.collection import run_files
from paragen.collection.manifest import CheckpointEntry, Manifest
from paragen.common import files, paths


def faults_of(folder: Path, manifest: Manifest) -> list[str]:
    """The files of a run that are missing or have another length than was recorded, a phrase each.

    Files that the manifest does not know are no fault here. The length of adapter_config.json is not recorded, so that
    this small file is hashed.
    """
    if manifest.phase == "finetune":
        return _collection_faults(folder, manifest)
    return [fault for entry in manifest.checkpoints for fault in checkpoint_faults(folder, entry)]


def content_faults(run: Path, manifest: Manifest, below: str = "") -> list[str]:
    """Which of the small files whose hashes are in `files_sha256` have other bytes, a phrase each.

    With `below`, only those in this folder of the run. Log and picture may be missing; files of a checkpoint folder
    may not.
    """
    faults = []
    for name, sha256 in sorted((manifest.files_sha256 or {}).items()):
        if not name.startswith(f"{below}/" if below else ""):
            continue
        if not (run / name).is_file():
            faults += [f"{name} is missing"] if "/" in name else []
        elif files.sha256_of(run / name) != sha256:
            faults.append(f"{name} does not have its recorded sha256")
    return faults


def checkpoint_faults(run: Path, entry: CheckpointEntry) -> list[str]:
    """The same for one checkpoint folder of a pretrain run, of which the manifest records the length of all files."""
    name = run_files.checkpoint_folder(entry.step)
    sizes = sizes_in(run / name)
    if not sizes:
        return [f"{name} is missing"]
    total = sum(size for file, size in sizes.items() if run_files.is_kept(file))
    if total == entry.bytes:
        return []
    gone = [file for file in run_files.RESUMED if file not in sizes and file != "rng_state.pth"]
    return [f"{name}/{file} is missing" for file in gone] or [f"{name} has {total} bytes, not {entry.bytes}"]


def names_of(manifest: Manifest) -> set[str]:
    """The names that the files of a collection have; it may lack run_files.OPTIONAL."""
    return {paths.MANIFEST, *run_files.BESIDE, *(entry.file_name for entry in manifest.checkpoints)}


def half_written(folder: Path) -> set[str]:
    """The names of the temporary files that a killed process left in a run folder."""
    return {path.name for name in (paths.MANIFEST, *run_files.BESIDE) for path in files.unfinished(folder / name)}


def strangers_in(folder: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """What lies in a collection's folder and is no part of it: (checkpoints that the manifest does not list, others).

    Both are sorted names; a folder's ends with a "/". What a killed evaluation left half-written is not named.
    """
    known = names_of(manifest) | half_written(folder)
    with os.scandir(folder) as entries:
        found = {f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries} - known
    unlisted = {name for name in found if run_files.CHECKPOINT_FILE.fullmatch(name)}
    return sorted(unlisted), sorted(found - unlisted)


def sizes_in(folder: Path) -> dict[str, int]:
    """The length of each file in a folder by its name, bytes; empty where there is no such folder.

    A link that leads nowhere, or to itself, is no file.
    """
    try:
        with os.scandir(folder) as entries:
            return {path.name: path.stat().st_size for path in map(Path, entries) if path.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _collection_faults(folder: Path, manifest: Manifest) -> list[str]:
    sizes = sizes_in(folder)
    config = paths.ADAPTER_CONFIG
    faults = [f"{name} is missing" for name in (paths.MANIFEST, config) if name not in sizes]
    if config in sizes and files.sha256_of(folder / config) != manifest.adapter_config_sha256:
        faults.append(f"{config} does not have its recorded sha256")
    for entry in manifest.checkpoints:
        size = sizes.get(entry.file_name)
        if size is None:
            faults.append(f"{entry.file_name} is missing")
        elif size != entry.bytes:
            faults.append(f"{entry.file_name} has {size} bytes, not {entry.bytes}")
    return faults
