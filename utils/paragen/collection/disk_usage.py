"""What the repository's folders take on the disk, by kind, and how each kind can be made again."""

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from paragen.collection import clean_up, discovery
from paragen.collection.manifest import phase_named_in
from paragen.common import paths

COLLECTIONS, PRETRAINS, EXPORTS, PUBLISHED = "collections", "pretrains", "exports", "published trees"
GENERATED = "generators, what they wrote, benchmarks"
PAGES, CACHE, LOGS, LEFT, RUNNING = "index, report, statistics", "token cache", "logs", "left-overs", "runs in progress"
OTHER, ARRIVING, MODELS, DATA = "other files in saves/", "unfinished downloads", "models", "data"
ENVIRONMENT = "Python packages"

# How each kind is made again, in the order of the table.
KINDS = {
    COLLECTIONS: "only by training",
    PRETRAINS: "only by training; not needed any more by a verified collection",
    EXPORTS: "make export",
    PUBLISHED: "make publish; keep the tree of an interrupted upload",
    GENERATED: "make generator, make generate",
    PAGES: "make index, make report, make stats",
    CACHE: "the next sweep",
    LOGS: "not at all; needed to see why a run failed",
    LEFT: "not needed",
    RUNNING: "keep",
    OTHER: "not known",
    ARRIVING: "make model, make data, make pull go on with them",
    MODELS: "make model, except for your own",
    DATA: "make data, except for your own",
    ENVIRONMENT: "make setup",
}  # fmt: skip
DERIVED = {"exports": EXPORTS, "publish": PUBLISHED, "report": PAGES, "stats": PAGES}
DERIVED |= dict.fromkeys(("generators", "generated", "benchmarks"), GENERATED)
SHIPPED = ("README.md", ".gitkeep")  # in saves/, by git
UNFINISHED = re.compile(r"\..+\.(download|part)|pull--.+")


class Use(NamedTuple):
    """What one kind takes."""

    bytes: int
    files: int
    clean_up: int  # bytes that `make clean-up` would free


class Usage(NamedTuple):
    """What `measure` returns."""

    kinds: dict[str, Use]  # in the order of KINDS, without those of which there is nothing
    links: list[Path]  # what they lead to is not counted


def measure(found: clean_up.Found) -> Usage:
    """Add up the files of the repository's folders. A file with several names counts once, for the first kind.

    `found` is what clean_up.find returned just now.
    """
    special = {one.path: CACHE if one.why == clean_up.SHARED else LEFT for one in found.left_overs}
    special |= {path: CACHE if path.parent.name == paths.TOKENS else RUNNING for path in found.in_use}
    sizes: list[tuple[int, os.stat_result]] = []
    links: list[Path] = []
    order = list(KINDS)
    collections = set(discovery.find_collections([paths.SAVES])) if paths.SAVES.is_dir() else set()

    def add(folder: Path, kind: str) -> None:
        links.extend(_links_in(folder) if kind != ENVIRONMENT else [])
        for path, info in clean_up.children(folder):
            if path.parent == paths.SAVES and path.name in SHIPPED:
                continue
            own = special.get(path) or _kind_of(path, info, kind, collections)
            if stat.S_ISDIR(info.st_mode):
                add(path, own)
            else:
                sizes.append((order.index(own), info))

    tops = {paths.SAVES: OTHER, paths.MODELS: MODELS, paths.DATA: DATA, paths.ROOT / ".venv": ENVIRONMENT}
    for top, kind in tops.items():
        add(top, kind)
    for path, kind in special.items():
        if not any(path.is_relative_to(top) for top in tops) and os.path.lexists(path):
            if path.is_dir():
                add(path, kind)
            else:
                sizes.append((order.index(kind), path.stat()))
    return Usage(_summed(sizes, found), links)


def _links_in(folder: Path) -> list[Path]:
    """The links in a folder that lead to other folders."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [folder / entry.name for entry in entries if entry.is_symlink() and entry.is_dir()]


def _kind_of(path: Path, info: os.stat_result, parent: str, collections: set[Path]) -> str:
    """The kind of a file or folder, from that of the folder in which it lies."""
    if UNFINISHED.fullmatch(path.name) and parent in (PUBLISHED, MODELS, DATA):
        return ARRIVING
    if parent != OTHER:
        return parent
    if path.parent == paths.SAVES and path.name in DERIVED:
        return DERIVED[path.name]
    if path == paths.SAVES / paths.INDEX:
        return PAGES
    if not stat.S_ISDIR(info.st_mode):
        return LOGS if path.suffix == ".log" else OTHER
    if (path / paths.EXPORT_RECORD).is_file():
        return EXPORTS
    name = path.name
    if replaced := clean_up.REPLACED.fullmatch(name):  # a run folder between two renames
        name = replaced[1]
    if path.with_name(name) in collections:
        return COLLECTIONS
    return PRETRAINS if name.endswith("_pretrain") or phase_named_in(path) == "pretrain" else OTHER


def _summed(sizes: list[tuple[int, os.stat_result]], found: clean_up.Found) -> dict[str, Use]:
    """The uses by kind, from (the kind's place in KINDS, the file's stat)."""
    uses = {kind: Use(0, 0, 0) for kind in KINDS}
    order = list(KINDS)
    seen: set[tuple[int, int]] = set()
    for place, info in sorted(sizes, key=lambda one: one[0]):
        if (info.st_dev, info.st_ino) not in seen:
            use = uses[order[place]]
            uses[order[place]] = use._replace(bytes=use.bytes + info.st_size, files=use.files + 1)
        seen.add((info.st_dev, info.st_ino))
    for one in found.left_overs:
        kind = CACHE if one.why == clean_up.SHARED else LEFT
        uses[kind] = uses[kind]._replace(clean_up=uses[kind].clean_up + one.bytes)
    return {kind: use for kind, use in uses.items() if use.files}


def size_text(size: int) -> str:
    """Bytes as tables show them: `1.4 GB`, `3.2 MB`, `27 bytes`."""
    if size < 1e5:
        return f"{size:,} bytes"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
