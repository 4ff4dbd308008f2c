"""Finds the collections below some folders, and compares a run folder with what a recipe would train."""

import os
from pathlib import Path

from paragen.collection import run_identity
from paragen.collection.manifest import phase_named_in, read_manifest
from paragen.collection.run_files import CHECKPOINT_FILE
from paragen.common import paths


def find_collections(tops: list[Path]) -> list[Path]:
    """All folders at or below `tops` that are collections, or by name or content should be; sorted.

    Does not look into collections, stock checkpoint folders or derived folders (exports, statistics).
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
                    # left by a crash between two renames; the next training repairs it
                    found.add(folder / sub[1 : -len(".old")])
                elif sub.endswith("_finetune") and (folder / sub / paths.MANIFEST).is_file():
                    found.add(folder / sub)
                elif not (sub.startswith(".") or sub in skipped or paths.CHECKPOINT.fullmatch(sub)):
                    enter.append(sub)
            links = {sub: os.path.realpath(folder / sub) for sub in enter if (folder / sub).is_symlink()}
            subfolders[:] = [sub for sub in enter if sub not in links or links[sub] not in linked]
            linked.update(links.values())  # each is entered once, so that a link upwards ends
    return sorted(found)


def is_collection(folder: Path, names: list[str]) -> bool:
    """Whether a folder of any name is a collection, judged by its manifest or by the files (`names`) in it."""
    has_checkpoints = any(CHECKPOINT_FILE.fullmatch(name) for name in names)
    if paths.MANIFEST not in names:
        return has_checkpoints
    return has_checkpoints or phase_named_in(folder) == "finetune"


def state_of(folder: Path, identity: dict) -> tuple[str, list[str]]:
    """Compares a run folder with the run that a recipe requests.

    Args:
        folder: the run folder, whether or not it exists.
        identity: the requested run's, as `run_identity.identity_of` gives it.

    Returns (state, what changed, a phrase each). The state is `missing`, `complete`, `stale` (trained from something
    else), or `unknown` (without a manifest: not made by this project, or a stock run that is not cleaned yet).
    """
    if not folder.exists():
        return "missing", []
    manifest = read_manifest(folder)
    if manifest is None:
        return "unknown", []
    changed = run_identity.changes(manifest.identity, identity)
    return ("stale", changed) if changed else ("complete", [])
