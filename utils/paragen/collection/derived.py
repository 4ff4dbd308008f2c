"""Folders of files derived from collections (exports, statistics): each part is made whole, once, and recorded.

OUT/export.json maps each part's path to what it was made from and to its files with their hashes, which are checked
when a part is used again. Parts are copies, never links: editing an export does not change the collection.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from paragen.collection import run_identity
from paragen.common import cli, files, locks, paths
from paragen.common.cli import UserError, say

RECORD = paths.EXPORT_RECORD
ANOTHER_OUT = "choose another OUT"


class NotReplaceable(UserError):
    """At a part's path is something that its export did not make."""


def make_part(
    out: Path,
    name: str,
    source: dict[str, Any],
    make: Callable[[Path], None],
    done: str = "exported",
    quiet: bool = False,
    way_out: str = ANOTHER_OUT,
) -> bool:
    """Make one part, a file or a folder, unless it exists and was made from the same source.

    Args:
        out: the folder of all parts.
        name: the part's path in it.
        source: what decides its content, as a JSON object: format, the manifest's `sha256`, dtype.
        make: writes the part at the path that it is given, a staging path where nothing exists.
        done: the word printed before its path once it is made.
        quiet: print nothing when it exists already.
        way_out: what to do where something else is there, for messages.

    Returns whether it was made. Raises NotReplaceable, with nothing changed, where its path holds something else: files
    that no export made, an export of another format, or a folder into which other files were put since.
    """
    if not PurePosixPath(name).parts or not {"..", "/"}.isdisjoint(PurePosixPath(name).parts):
        raise UserError(f"{name!r}: would lie outside of {paths.relative(out)}; rename the dataset")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{paths.relative(out)}: cannot be made: {error.strerror}; {way_out}") from None
    target = out / name
    with locks.lock(out / f".{RECORD}.lock", waiting=f"waiting for another export into {out}"):
        if target.parent.is_dir():
            files.recover_folder(target)
        if is_there(out, name, source):
            damaged, note = check_content(out, name)
            if damaged is None:
                if not quiet:
                    say(f"there already: {paths.relative(target)}{note}")
                return False
            say(f"{paths.relative(target / damaged)}: was damaged since it was made; it is made again")
        check_replaceable(out, name, source, way_out)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = files.beside(target, f"staging-{secrets.token_hex(4)}")
        try:
            with cli.writing_to(target):
                make(staging)
                sync(staging)
            # recorded first, so that after a crash a part without sizes is recognised as ours and made again
            remember(out, name, {"source": source, "files": None})
            hashes = files.hashes_below(staging)
            if staging.is_dir():
                files.publish_folder(staging, target)
            else:
                os.replace(staging, target)
                files.sync_folder(target.parent)
        finally:
            files.remove_folder(staging)
        remember(out, name, {"source": source, "files": sizes_of(target), "sha256": hashes})
    say(f"{done}: {paths.relative(target)}")
    return True


def is_there(out: Path, name: str, source: dict[str, Any], record: dict[str, Any] | None = None) -> bool:
    """Whether a part exists, made from `source`, with all its files at their sizes; never with FORCE=1.

    The files are not read: see `check_content`. `record` is what `read_record` gave, unless it is to be read anew.
    """
    there = (read_record(out) if record is None else record).get(name)
    if there is None or there["source"] != source or there["files"] is None or run_identity.force_requested():
        return False
    return there["files"] == sizes_of(out / name)


def is_whole(out: Path, name: str, source: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a part exists, made from `source`, with the bytes of when it was made; its files are read."""
    return is_there(out, name, source, record) and check_content(out, name, record)[0] is None


def check_content(out: Path, name: str, record: dict[str, Any] | None = None) -> tuple[str | None, str]:
    """Read a part that is there, and compare it with the hashes of when it was made; `record` as for `is_there`.

    Returns the path in the part of the first file that differs, None where none does; and a note for a part that an
    earlier version made without hashes, which cannot be compared.
    """
    recorded = (read_record(out) if record is None else record)[name].get("sha256")
    if recorded is None:
        return None, " (made without hashes, so that it was not checked again; FORCE=1 makes it anew)"
    found = files.hashes_below(out / name)
    return next((file for file in found if found[file] != recorded.get(file)), None), ""


def check_replaceable(out: Path, name: str, source: dict[str, Any], way_out: str = ANOTHER_OUT) -> None:
    """Raise NotReplaceable where making a part would delete files that its export did not make."""
    target, there = out / name, read_record(out).get(name)
    if there and there["source"].get("format") != source.get("format"):
        raise NotReplaceable(
            f"{paths.relative(out)}: holds an export of FORMAT={there['source'].get('format')}; {way_out}"
        )
    file = next((above for above in target.parents if os.path.lexists(above) and not above.is_dir()), None)
    if file:
        raise NotReplaceable(f"{paths.relative(file)}: is not a folder; {way_out}")
    if not os.path.lexists(target):
        return
    if there is None:
        raise NotReplaceable(
            f"{paths.relative(target)}: is there already, and no export of ours ({RECORD} does not name it); {way_out}"
        )
    foreign = sorted(sizes_of(target).keys() - there["files"].keys()) if there["files"] is not None else []
    if foreign:
        raise NotReplaceable(
            f"{paths.relative(target / foreign[0])}: was not made there by us; move it away, then run it again"
        )


def remember(out: Path, name: str, entry: dict[str, Any]) -> None:
    """Record one part in OUT/export.json. Call it with the lock held."""
    record = read_record(out) | {name: entry}
    files.write_json(out / RECORD, dict(sorted(record.items())))


def read_record(out: Path, way_out: str = ANOTHER_OUT) -> dict[str, Any]:
    """The parts that OUT/export.json records, by path; empty without that file. Raises UserError when it is broken.

    A part has `source`; `files`: the sizes of its files in bytes, None while it is moved to its place; and `sha256`:
    their hashes, which parts of earlier versions lack.
    """
    path = out / RECORD
    try:
        record = json.loads(files.read_up_to(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{paths.relative(path)}: cannot be read: {error.strerror}; {way_out}") from None
    except ValueError as error:
        raise UserError(f"{paths.relative(path)}: broken ({error}); remove the export and make it again") from None
    if not isinstance(record, dict) or not all(_is_entry(entry) for entry in record.values()):
        raise UserError(f"{paths.relative(path)}: is no record of an export; {way_out}")
    return record


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("source"), dict)
        and isinstance(entry.get("files"), dict | None)
        and "files" in entry
        and isinstance(entry.get("sha256"), dict | None)
    )


def sizes_of(target: Path) -> dict[str, int]:
    """The sizes of a part's files in bytes, by path; the path is empty when the part is a file itself."""
    if target.is_file():
        return {"": target.stat().st_size}
    found = (path for path in sorted(target.rglob("*")) if path.is_file()) if target.is_dir() else ()
    return {path.relative_to(target).as_posix(): path.stat().st_size for path in found}


def sync(target: Path) -> None:
    """Flush a file, or every file in a folder, to the disk before it gets its final name."""
    for path in [target] if target.is_file() else target.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def check_room(
    out: Path, needed: int, way_out: str = "select fewer collections, or take an OUT on another disk"
) -> None:
    """Raise UserError when `needed` bytes do not fit on the disk that holds the folder `out`."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    total, _, free = shutil.disk_usage(existing)
    if total and needed > free:  # /proc and its like have no size; making a folder there says so
        raise UserError(
            f"{paths.relative(out)}: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free; make room, "
            f"{way_out}"
        )
