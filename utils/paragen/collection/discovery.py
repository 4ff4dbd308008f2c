"""Finds the collections below some folders, and compares a run folder with what a recipe would train."""

import os
from pathlib import Path

from paragen.collection import run_identity
from paragen.collection.manifest import phase_named_in, read_manifest
from paragen.collection.run_files import CHECKPOINT_FILE
from paragen.common import paths


def find_collections(tops: list[Path]) -> list[Path]:
    """All folders below `tops` (or they themselves) that are collections, or by name or content should be, sorted.

    Nothing inside a collection or a stock checkpoint folder is looked at, nor what is made from collections (exports).
    """
    found, linked = set(), set()
    for top in tops:
        for name, subfolders, names in os.walk(top.absolute(), followlinks=True):
            folder, enter = Path(name), []
            if paths.EXPORT_RECORD in names:
                subfolders[:] = []
                continue
            if folder.name.endswith("_finetune") or (
                not folder.name.endswith("_pretrain") and is_collection(folder, names)
            ):
                found.add(folder)
            skipped = paths.DERIVED if folder == top.absolute() or folder == paths.SAVES else ()
            for sub in sorted(subfolders):
                if sub.startswith(".") and sub.endswith("_finetune.old"):
                    found.add(folder / sub[1 : -len(".old")])  # a crash between two renames; the next training mends it
                elif sub.endswith("_finetune") and (folder / sub / paths.MANIFEST).is_file():
                    found.add(folder / sub)
                elif not (sub.startswith(".") or sub in skipped or paths.CHECKPOINT.fullmatch(sub)):
                    enter.append(sub)
            links = {sub: os.path.realpath(folder / sub) for sub in enter if (folder / sub).is_symlink()}
            subfolders[:] = [sub for sub in enter if sub not in links or links[sub] not in linked]
            linked.update(links.values())  # each is entered once, so that a link upwards ends
    return sorted(found)


def is_collection(folder: Path, names: list[str]) -> bool:
    """Whether a folder, whatever its name, is a collection going by its manifest or by the files (`names`) in it."""
    has_checkpoints = any(CHECKPOINT_FILE.fullmatch(name) for name in names)
    if paths.MANIFEST not in names:
        return has_checkpoints
    return has_checkpoints or phase_named_in(folder) == "finetune"


def state_of(folder: Path, identity: dict) -> tuple[str, list[str]]:
    """How a run folder stands to what is asked for: (`missing` | `complete` | `stale` | `unknown`, what changed).

    `unknown` is a folder without a manifest: not made by this project, or not cleaned yet.
    """
    if not folder.exists():
        return "missing", []
    manifest = read_manifest(folder)
    if manifest is None:
        return "unknown", []
    changed = run_identity.changes(manifest.identity, identity)
    return ("stale", changed) if changed else ("complete", [])
