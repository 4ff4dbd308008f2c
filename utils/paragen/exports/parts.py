"""What all formats do with a part of an export: write it whole, list it with DRY_RUN=1, keep what others put there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paragen.collection import derived, run_identity
from paragen.common import paths, settings
from paragen.common.cli import UserError, say


def dry_run_requested() -> bool:
    """Whether the user set DRY_RUN=1: list what would be written, and write nothing."""
    return settings.switch("DRY_RUN")


def make(out: Path, name: str, source: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Write one part, a file or a folder, unless it is there; with DRY_RUN=1, print its path alone.

    Arguments and errors as for `derived.make_part`; `write` is its `make`.
    """
    if not dry_run_requested():
        derived.make_part(out, name, source, write)
    elif derived.is_there(out, name, source):
        say(f"there already: {paths.relative(out / name)}")
    else:
        if not is_foreign(out, name):
            derived.check_replaceable(out, name, source)
        say(f"would write: {paths.relative(out / name)}")


def is_foreign(out: Path, name: str) -> bool:
    """Whether something that no export made is at a part's path."""
    return name not in derived.read_record(out) and os.path.lexists(out / name)


def set_aside(out: Path, name: str) -> None:
    """Rename a file at a part's path that no export made, see `check_may_replace`; with DRY_RUN=1, only say it."""
    if is_foreign(out, name):
        kept = aside(out / name)
        if not dry_run_requested():
            os.rename(out / name, kept)
        say(f"{'would keep' if dry_run_requested() else 'kept'}: {paths.relative(kept)}")


def aside(path: Path) -> Path:
    """Where a checkout's own file is kept when FORCE=1 replaces it."""
    return path.with_name(f"{path.name}.before-export")


def check_may_replace(path: Path, what: str, ours: str) -> None:
    """Raise UserError unless FORCE=1 is set and the name to keep the present file under is free.

    Args:
        path: the file, which no export made.
        what: what it holds, for the message.
        ours: what the export would put there.
    """
    if os.path.lexists(aside(path)):
        raise UserError(f"{paths.relative(aside(path))}: is there already; move it away, then run it again")
    if not run_identity.force_requested():
        raise UserError(
            f"{paths.relative(path)}: holds {what}; FORCE=1 puts {ours} there and keeps it as {aside(path).name}, or "
            "take another OUT"
        )


def out_folder(name: str) -> Path:
    """The absolute path of the folder `name`. Raises UserError where it is no folder, or one that holds collections."""
    out = Path(name).expanduser().absolute()
    blocking = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if blocking:
        raise UserError(f"{paths.relative(blocking)}: is not a folder; choose another OUT")
    real, saves = out.resolve(), paths.SAVES.resolve()
    if real.is_relative_to(saves) and not any(real.is_relative_to(saves / name) for name in paths.DERIVED):
        raise UserError(
            f"{paths.relative(out)}: lies among the collections; choose one outside of {paths.relative(paths.SAVES)} "
            f"or below {paths.relative(paths.SAVES / 'exports')}"
        )
    return out
