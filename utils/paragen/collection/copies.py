"""A collection has one identity, the hash of its manifest: finds it wherever it is below saves/, and tells its copies.

A folder that was renamed or moved is the same collection, and so is an archive or a download of it.
"""

import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from paragen.collection import discovery
from paragen.collection.manifest import Manifest, read_manifest, require_manifest
from paragen.common import files, paths
from paragen.common.cli import UserError

COPY_OF = "copy_of"  # in the index's marks of a collection that is a second copy: the name of the one that has rows


def named_place(manifest: Manifest) -> str:
    """The path below saves/ that a manifest names: `<category>/<dataset>/<run folder>`, the category if it has one."""
    return "/".join(part for part in (manifest.category, manifest.dataset, manifest.run) if part)


def kept_copy(names: Collection[str], manifest: Manifest) -> str:
    """Which of several copies of a collection counts: the one at the place that its manifest names, else the first.

    `names` are their paths below saves/.
    """
    place = named_place(manifest)
    return place if place in names else min(names)


def find(saves: Path, wanted: Collection[str]) -> dict[str, Path]:
    """The folders below `saves` of the collections whose manifests have these hashes, by hash.

    A manifest without one of the hashes in its text is not parsed, so that this is cheap among many collections. Of
    several copies, the one that `kept_copy` chooses is returned. A collection with a broken manifest is not found.
    """
    found: dict[str, dict[str, Manifest]] = {}
    for folder in discovery.find_collections([saves]) if saves.is_dir() else []:
        manifest = _manifest_of(folder, wanted)
        if manifest is not None:
            name = folder.relative_to(saves.absolute()).as_posix()
            found.setdefault(manifest.sha256, {})[name] = manifest
    return {sha256: saves / kept_copy(by_name, next(iter(by_name.values()))) for sha256, by_name in found.items()}


def _manifest_of(folder: Path, wanted: Collection[str]) -> Manifest | None:
    """A collection's manifest where its hash is among `wanted`, else None."""
    if not folder.exists():
        folder = files.beside(folder, "old")  # the collection itself, after a crash between two renames
    try:
        text = (folder / paths.MANIFEST).read_text(encoding="utf-8", errors="replace")
        if not any(sha256 in text for sha256 in wanted):
            return None
        manifest = read_manifest(folder)
    except (OSError, UserError):  # `make index` and `make verify` name it
        return None
    return manifest if manifest is not None and manifest.sha256 in wanted else None


def mark(saves: Path, seen: dict[str, dict[str, Any]]) -> None:
    """Add COPY_OF to the marks of second copies, and name them on stderr."""
    for names in alike(seen):
        kept = kept_copy(names, require_manifest(saves / names[0]))
        for name in names:
            if name != kept:
                seen[name][COPY_OF] = kept
            if name != kept and not os.path.samefile(saves / name, saves / kept):  # a link to it is no second copy
                one, other = paths.relative(saves / name), paths.relative(saves / kept)
                note = f"note: {one}: a second copy of {other}, which alone counts; remove one of both"
                print(note, file=sys.stderr, flush=True)


def alike(marks: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The names of the collections of which there are several copies, a sorted list for each."""
    by_sha256: dict[str, list[str]] = {}
    for name, mark in sorted(marks.items()):
        by_sha256.setdefault(mark["sha256"], []).append(name)
    return [names for names in by_sha256.values() if len(names) > 1]
