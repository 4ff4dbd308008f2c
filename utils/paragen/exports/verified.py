"""Whether collections are sound enough to export, for every format: files, hashes, keys, shapes, values, scores."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paragen.collection import checkpoints, derived, run_identity, verification
from paragen.collection.index import Chosen
from paragen.common import cli, files
from paragen.common.cli import UserError

READ = "read"  # in the source of a part that names collections without a copy of them: see `stamps`
_stamps: dict[str, str] = {}  # of the collections that are known to be sound, by their manifest's hash


def whole_of(chosen: Sequence[Chosen], out: Path) -> list[Chosen]:
    """The sound ones of some collections, which are read whole before anything of them is written below `out`.

    A collection that OUT/export.json names was read before it was exported, and is read again only with FORCE=1; where
    the export has no copy of it, also where the sizes or times of its files changed since. The files that are read here
    are not hashed again by this process.

    A line on stderr names the first fault of each of the others. Raises UserError where there is no sound one.
    """
    sources = [] if run_identity.force_requested() else [one["source"] for one in derived.read_record(out).values()]
    copied = {source.get(key) for source in sources for key in ("sha256", "manifest")}
    read: dict[str, Any] = {}
    for source in sources:
        read |= source[READ] if isinstance(source.get(READ), dict) else {}
    whole, faults = [], []
    for one in chosen:
        known = stamps_in(one.folder)
        stamp = files.sha256_of_value(sorted([path.name, *stamp] for path, stamp in known.items()))
        is_read = read.get(one.manifest.sha256) == stamp
        if not is_read and one.manifest.sha256 not in copied:
            if found := verification.faults_of(one.folder, one.manifest):
                more = f" and {len(found) - 1} more faults" if len(found) > 1 else ""
                faults.append(f"{one.name}: {found[0]}{more}; make verify names all; it is not exported")
                continue
            is_read = True
            for entry in one.manifest.checkpoints:
                path = one.folder / entry.file_name
                checkpoints.mark_verified(path, known[path], entry.sha256)
        whole.append(one)
        if is_read:
            _stamps[one.manifest.sha256] = stamp
    last = None if whole or not faults else faults.pop()
    for fault in faults:
        cli.complain(fault)
    if last is not None:
        raise UserError(last)
    return whole


def stamps_in(folder: Path) -> dict[Path, tuple[int, ...]]:
    """The sizes and times of a collection's files, but for those that another process is writing now."""
    found = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.name.startswith("."):
                found[path] = files.stamp_of(path.stat())
    return found


def stamps(chosen: Sequence[Chosen]) -> dict[str, str]:
    """What the sizes and times of the collections' files were when `whole_of` found them sound, as a hash each.

    A part that only names collections has this in its source under READ; by it the next export knows what was read.
    The key is the manifest's hash. Collections that were not read because OUT has copies of them are missing.
    """
    return {one.manifest.sha256: _stamps[one.manifest.sha256] for one in chosen if one.manifest.sha256 in _stamps}
