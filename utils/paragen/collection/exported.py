"""The parts of an export: each is made whole, once, and known again by what it was made from.

Imported by the export_*.py scripts. OUT/export.json maps each part's path to the collection it was made from and to its
files. All is copied, never linked: who edits an export does not change a collection, nor the other way round.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from paragen.collection import checkpoints, run_identity
from paragen.collection.manifest import CheckpointEntry
from paragen.common import files, paths
from paragen.common.cli import UserError, say

RECORD = paths.EXPORT_RECORD


def part(
    out: Path, name: str, source: dict[str, Any], make: Callable[[Path], None], done="exported", quiet=False
) -> bool:
    """Make one part of an export, a file or a folder, unless it is there and was made from the same.

    Args:
        out: the export's folder.
        name: the part's path in it.
        source: what decides its content, as a JSON value: format, the manifest's `sha256`, dtype.
        make: writes the part at the path it is given (beside its place; nothing is there yet).
        done: the word that says so.
        quiet: say nothing when it is there already.

    Returns whether it was made. Raises UserError, with nothing changed, where something else stands at its place: what
    no export made, what an export of another format made, or a folder with files that were put into it since.
    """
    if not PurePosixPath(name).parts or not {"..", "/"}.isdisjoint(PurePosixPath(name).parts):
        raise UserError(f"{name!r}: would lie outside of {paths.relative(out)}; rename the dataset")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{paths.relative(out)}: cannot be made: {error.strerror}; choose another OUT") from None
    target = out / name
    with files.lock(out / f".{RECORD}.lock", waiting=f"waiting for another export into {out}"):
        if is_there(out, name, source):
            if not quiet:
                say(f"there already: {paths.relative(target)}")
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        files.recover_folder(target)
        check_replaceable(out, name, source)
        staging = files.beside(target, f"staging-{secrets.token_hex(4)}")
        try:
            make(staging)
            sync(staging)
            # noted before the part gets its name: one that a crash leaves without its sizes is ours, and made again
            remember(out, name, {"source": source, "files": None})
            if staging.is_dir():
                files.publish_folder(staging, target)
            else:
                os.replace(staging, target)
                files.sync_folder(target.parent)
        finally:
            files.remove_folder(staging)
        remember(out, name, {"source": source, "files": sizes_of(target)})
    say(f"{done}: {paths.relative(target)}")
    return True


def is_there(out: Path, name: str, source: dict[str, Any]) -> bool:
    """Whether a part is there, made from `source`, with all its files at their lengths; never with FORCE=1."""
    there = read_record(out).get(name)
    if there is None or there["source"] != source or there["files"] is None or run_identity.force_asked():
        return False
    return there["files"] == sizes_of(out / name)


def check_replaceable(out: Path, name: str, source: dict[str, Any]) -> None:
    """Raise UserError where making a part would delete what its export did not make."""
    target, there = out / name, read_record(out).get(name)
    if there and there["source"].get("format") != source.get("format"):
        raise UserError(
            f"{paths.relative(out)}: holds an export of FORMAT={there['source'].get('format')}; take another OUT"
        )
    if not os.path.lexists(target):
        return
    if there is None:
        raise UserError(f"{paths.relative(target)}: is there already, and no export of ours; choose another OUT")
    strange = sorted(sizes_of(target).keys() - there["files"].keys()) if there["files"] is not None else []
    if strange:
        raise UserError(
            f"{paths.relative(target / strange[0])}: is not of this export; move it away, then run it again"
        )


def remember(out: Path, name: str, entry: dict[str, Any]) -> None:
    """Write what OUT/export.json says of one part. Call it with the lock held."""
    record = read_record(out) | {name: entry}
    files.write_json(out / RECORD, dict(sorted(record.items())))


def read_record(out: Path) -> dict[str, Any]:
    """What OUT/export.json says of the parts there; empty where there is none. Raises UserError when it is broken.

    By a part's path: `source`, and `files`, its lengths in bytes, null while it is being put in its place.
    """
    path = out / RECORD
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{paths.relative(path)}: broken ({error}); remove the export and make it again") from None
    if not isinstance(record, dict) or not all(_is_entry(entry) for entry in record.values()):
        raise UserError(f"{paths.relative(path)}: is no record of an export; choose another OUT")
    return record


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("source"), dict)
        and isinstance(entry.get("files"), dict | None)
        and "files" in entry
    )


def sizes_of(target: Path) -> dict[str, int]:
    """The files of a part with their lengths in bytes; by an empty name when the part is a file itself."""
    if target.is_file():
        return {"": target.stat().st_size}
    found = (path for path in sorted(target.rglob("*")) if path.is_file()) if target.is_dir() else ()
    return {path.relative_to(target).as_posix(): path.stat().st_size for path in found}


def sync(target: Path) -> None:
    """Have the content of a file, or of every file in a folder, on disk before it gets its final name."""
    for path in [target] if target.is_file() else target.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def check_room(out: Path, needed: int) -> None:
    """Raise UserError when `needed` bytes do not fit on the disk that holds the export's folder."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{paths.relative(out)}: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free; make room, "
            "select fewer collections, or take an OUT on another disk"
        )


def bytes_of(entry: CheckpointEntry, stored: str, dtype: str | None) -> int:
    """About how many bytes a checkpoint takes in an export; `stored` is the dtype it has, `dtype` the one asked for."""
    if dtype in (None, stored):
        return entry.bytes
    return entry.bytes * (4 if dtype == "float32" else 2) // (4 if stored == "float32" else 2)


def write_checkpoint(
    folder: Path, entry: CheckpointEntry, target: Path, dtype: str | None = None, rename: dict[str, str] | None = None
) -> None:
    """Write one checkpoint of a collection at `target`: the same bytes, unless it is cast or its keys are renamed.

    Args:
        folder: the collection's.
        entry: the checkpoint in the manifest's `checkpoints`; the file is hashed against it.
        target: a path where nothing is yet.
        dtype: what its tensors are cast to (`float32`, `bfloat16`, `float16`); None keeps them.
        rename: its keys by those to write; None keeps them. Exactly these must be in the file.

    Raises UserError naming the file when it is not as recorded, has other keys, or has values too large for `dtype`.
    """
    import torch
    from safetensors.torch import save_file

    path = folder / entry.file_name
    tensors = checkpoints.load(path, entry.bytes, entry.sha256)
    if rename is not None and rename.keys() != tensors.keys():
        differing = min(rename.keys() ^ tensors.keys())
        raise UserError(f"{paths.relative(path)}: has not the keys of the other steps ({differing}); run: make verify")
    wanted = getattr(torch, dtype) if dtype else None
    as_it_is = wanted is None or all(tensor.dtype == wanted for tensor in tensors.values())
    if as_it_is and (rename is None or all(old == new for old, new in rename.items())):
        with (
            open(path, "rb") as source,
            open(target, "xb") as copy,
        ):  # shutil.copyfile would blame the source for a full disk
            shutil.copyfileobj(source, copy, 1 << 20)
        return
    if wanted is not None:
        tensors = {key: checkpoints.cast(tensor, wanted, key, path) for key, tensor in tensors.items()}
    written = {(rename or {}).get(key, key): tensor for key, tensor in tensors.items()}
    save_file(written, target, metadata={"format": "pt"})
