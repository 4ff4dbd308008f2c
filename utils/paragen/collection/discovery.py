"""Finds the collections below some folders, and compares a run folder with what a recipe would train."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import run_identity
from paragen.collection.manifest import Manifest, phase_named_in, read_manifest
from paragen.collection.run_files import CHECKPOINT_FILE
from paragen.common import paths


def find_collections(tops: list[Path]) -> list[Path]:
    """All folders at or below `tops` that are collections, or by name or content should be; sorted.

    Does not look into collections, stock checkpoint folders or derived folders (exports, statistics).
    """
    found: set[Path] = set()
    linked: set[str] = set()
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


class State(NamedTuple):
    """How a run folder compares with the run that a recipe requests.

    `name` is `missing`, `complete`, `stale` (trained from something else), or `unknown` (without a manifest: not made
    by this project, or a stock run that is not cleaned yet).
    """

    name: str
    changed: list[str]  # what makes it stale, a phrase each
    manifest: Manifest | None


def state_of(folder: Path, identity: dict[str, Any]) -> State:
    """Compares a run folder, whether or not it exists, with the identity of the requested run (see run_identity.py)."""
    if not folder.exists():
        return State("missing", [], None)
    manifest = read_manifest(folder)
    if manifest is None:
        return State("unknown", [], None)
    changed = run_identity.changes(manifest.identity, identity)
    return State("stale" if changed else "complete", changed, manifest)
