"""Finds the collections below some folders, and compares a run folder with what a recipe would train."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import presence, run_identity
from paragen.collection.manifest import Manifest, phase_named_in, read_manifest
from paragen.collection.run_files import CHECKPOINT_FILE
from paragen.common import paths

SHOWN = 5  # reasons that a message names


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


def dataset_folders(saves: Path) -> list[Path]:
    """The folders of datasets below saves/, sorted: not those of caches, derived files or hidden ones."""
    categories = sorted(saves.iterdir()) if saves.is_dir() else []
    return [
        folder
        for category in categories
        if category.is_dir() and not category.name.startswith(".") and category.name not in paths.DERIVED
        for folder in sorted(category.iterdir())
        # collect_scripts/test.yaml has its run folders where others have their datasets
        if folder.is_dir() and not folder.name.startswith(".") and paths.rank_in(folder.name) is None
    ]


class State(NamedTuple):
    """How a run folder compares with the run that a recipe requests.

    `name` is `missing`, `complete`, `stale` (trained from something else), `broken` (files are missing or truncated),
    or `unknown` (without a manifest: not made by this project, or a stock run that is not cleaned yet).
    """

    name: str
    reasons: list[str]  # what makes it stale or broken, a phrase each
    manifest: Manifest | None
    uncompared: tuple[str, ...] = ()  # what it was trained from and is not on this machine

    @property
    def reason(self) -> str:
        """The first few reasons as one text, and how many more there are."""
        more = len(self.reasons) - SHOWN
        return "; ".join([*self.reasons[:SHOWN], *([f"and {more} more"] if more > 0 else [])])


def state_of(folder: Path, identity: dict[str, Any]) -> State:
    """Compares a run folder, whether or not it exists, with the identity of the requested run (see run_identity.py).

    Compares files by names and lengths (presence.py). A broken run is made again, so that what is left of it need not
    come from the present pretrain; a run that is broken and otherwise stale is stale.
    """
    if not folder.exists():
        return State("missing", [], None)
    manifest = read_manifest(folder)
    if manifest is None:
        return State("unknown", [], None)
    faults = presence.faults_of(folder, manifest)
    if faults and identity["pretrain"]:
        identity = {**identity, "pretrain": {**identity["pretrain"], "sha256": None}}
    changed = run_identity.changes(manifest.identity, identity)
    name = "stale" if changed else "broken" if faults else "complete"
    return State(name, changed or faults, manifest, _absent(manifest, identity))


def _absent(manifest: Manifest, identity: dict[str, Any]) -> tuple[str, ...]:
    """The inputs of a run that are recorded in its manifest, but not in an identity that lacks what is not there."""
    found = [f"the base model {manifest.base_name}"] if manifest.base_name and identity["base_model"] is None else []
    if manifest.data and identity["data"] is None:
        found += [f"the data of {data.name}" for data in manifest.data]
    return tuple(found)
