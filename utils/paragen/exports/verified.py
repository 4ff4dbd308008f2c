"""Whether collections are sound enough to export, for every format: files, hashes, keys, shapes, values, scores."""

from collections.abc import Sequence
from pathlib import Path

from paragen.collection import checkpoints, derived, run_identity, verification
from paragen.collection.index import Chosen
from paragen.common import cli, files
from paragen.common.cli import UserError


def whole_of(chosen: Sequence[Chosen], out: Path) -> list[Chosen]:
    """The sound ones of some collections, which are read whole before anything of them is written below `out`.

    A collection that OUT/export.json names was read before it was exported, and is read again only with FORCE=1. The
    files that are read here are not hashed again by this process.

    A line on stderr names the first fault of each of the others. Raises UserError where there is no sound one.
    """
    exported = {one["source"].get(key) for one in derived.read_record(out).values() for key in ("sha256", "manifest")}
    whole, faults = [], []
    for one in chosen:
        if one.manifest.sha256 in exported and not run_identity.force_requested():
            whole.append(one)
            continue
        known = {path: files.stamp_of(path.stat()) for path in one.folder.iterdir() if path.is_file()}
        if found := verification.faults_of(one.folder, one.manifest):
            more = f" and {len(found) - 1} more faults" if len(found) > 1 else ""
            faults.append(f"{one.name}: {found[0]}{more}; make verify names all; it is not exported")
            continue
        whole.append(one)
        for entry in one.manifest.checkpoints:
            path = one.folder / entry.file_name
            checkpoints.mark_verified(path, known[path], entry.sha256)
    last = None if whole or not faults else faults.pop()
    for fault in faults:
        cli.complain(fault)
    if last is not None:
        raise UserError(last)
    return whole
