"""The parts of an export: each is made whole, once, and known again by what it was made from.

Imported by the export_*.py scripts. OUT/export.json maps each part's path to the collection it was made from.
"""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import files
import paths
import run_identity
from cli import UserError, say

RECORD = "export.json"


def part(out: Path, name: str, source: dict[str, Any], make: Callable[[Path], None], done="exported") -> bool:
    """Make one part of an export, a file or a folder, unless it is there and was made from the same.

    Args:
        out: the export's folder.
        name: the part's path in it.
        source: what decides its content, as a JSON value: format, the manifest's `sha256`, dtype.
        make: writes the part at the path it is given (beside its place; nothing is there yet).
        done: the word that says so.

    Returns whether it was made. Raises UserError, with nothing changed, where something else stands at its place.
    """
    out.mkdir(parents=True, exist_ok=True)
    target = out / name
    with files.lock(out / f".{RECORD}.lock", waiting=f"waiting for another export into {out}"):
        record = read_record(out)
        there = record.get(name)
        if (
            there
            and there["source"] == source
            and there["files"] == sizes_of(target)
            and not run_identity.force_asked()
        ):
            say(f"there already: {paths.relative(target)}")
            return False
        if target.exists() and there is None:
            raise UserError(f"{paths.relative(target)}: is there already, and no export of ours; choose another OUT")
        target.parent.mkdir(parents=True, exist_ok=True)
        files.recover_folder(target)
        staging = files.beside(target, f"staging-{secrets.token_hex(4)}")
        try:
            make(staging)
            if staging.is_dir():
                files.publish_folder(staging, target)
            else:
                with open(staging, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(staging, target)
                files.sync_folder(target.parent)
        finally:
            files.remove_folder(staging)
        record = read_record(out) | {name: {"source": source, "files": sizes_of(target)}}
        files.write_json(out / RECORD, dict(sorted(record.items())))
    say(f"{done}: {paths.relative(target)}")
    return True


def read_record(out: Path) -> dict[str, Any]:
    """What OUT/export.json says of the parts there; empty where there is none. Raises UserError when it is broken."""
    try:
        record = json.loads((out / RECORD).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(
            f"{paths.relative(out / RECORD)}: broken ({error}); remove the export and make it again"
        ) from None
    return record


def sizes_of(target: Path) -> dict[str, int]:
    """The files of a part with their lengths in bytes; by an empty name when the part is a file itself."""
    if target.is_file():
        return {"": target.stat().st_size}
    found = (path for path in sorted(target.rglob("*")) if path.is_file()) if target.is_dir() else ()
    return {path.relative_to(target).as_posix(): path.stat().st_size for path in found}
