"""Replaces and removes run folders without losing what others put into them: notes, pictures, folders of a user's own.

Ours is what a run writes, by its name; everything else in a run folder is somebody else's.
"""

import os
import shutil
from pathlib import Path

from paragen.collection import presence, run_files, stock_files
from paragen.common import files, paths
from paragen.common.cli import UserError, say

SHOWN = 3  # files that a message names


def others_in(folder: Path) -> list[str]:
    """The files below a run folder that no run wrote, as sorted paths in it; an empty folder's ends with a "/".

    Where there is no manifest, what stock LLaMA-Factory writes counts as a run's, too. Empty where there is no folder.
    """
    found = stock_files.files_in(folder)
    is_ours = (folder / paths.MANIFEST).is_file()
    names = sorted([*found.others, *found.stock]) if is_ours else found.others
    half_written = presence.half_written(folder)
    return [name for name in names if name not in half_written and not _is_of_a_run(name)]


def _is_of_a_run(name: str) -> bool:
    """Whether a run of ours writes what has this path in its folder."""
    place, _, last = name.rpartition("/")
    if paths.CHECKPOINT.fullmatch(place):
        return run_files.is_kept(last)
    if place:
        return paths.CHECKPOINT.fullmatch(name.removesuffix("/")) is not None  # an empty one
    return last in (paths.MANIFEST, *run_files.BESIDE) or run_files.CHECKPOINT_FILE.fullmatch(last) is not None


def check(folder: Path) -> None:
    """Raise UserError where a run folder cannot be replaced, before anything is done to replace it: something of others
    is in a folder that has the name of a run's file, or that cannot be written to, or is neither a file nor a link."""
    for name in others_in(folder):
        first, _, below = name.partition("/")
        if below and _is_of_a_run(first):
            raise UserError(f"{paths.relative(folder / first)}: is a folder with the name of a run's file; rename it")
        path = folder / name
        if not (path.is_symlink() or path.is_file() or path.is_dir()):
            raise UserError(f"{paths.relative(path)}: is no regular file and cannot be kept; move it away first")
        parent = path if name.endswith("/") else path.parent
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(
                f"{paths.relative(parent)}: cannot be written to, so the run cannot be replaced; chmod u+w it"
            )


def publish(staging: Path, folder: Path) -> None:
    """Give the complete folder `staging` the name of a run folder, with what others put into the one that has it.

    Their files are linked into `staging` first: they are in the run folder whenever this process is killed. Call it
    with the folder's lock held. Raises UserError, with nothing changed, as `check` does.
    """
    check(folder)
    for name in others_in(folder):
        take_along(folder, staging, name)
    files.publish_folder(staging, folder)


def remove(folder: Path) -> None:
    """Remove a run folder; one into which others put something stays whole, and a line says so."""
    others = others_in(folder)
    if not others:
        files.remove_folder(folder)
        return
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    say(f"kept: {paths.relative(folder)}: no run wrote {', '.join(map(repr, others[:SHOWN]))}{more}")


def take_along(folder: Path, staging: Path, name: str) -> None:
    """Give a file, a link or (where `name` ends with a "/") an empty folder below `folder` its place in `staging`."""
    target = staging / name
    for parent in reversed(Path(name).parents):
        if (folder / parent).is_dir() and not (staging / parent).is_dir():
            (staging / parent).mkdir()
            shutil.copystat(folder / parent, staging / parent)
    if name.endswith("/"):
        target.mkdir(exist_ok=True)
        shutil.copystat(folder / name, target)
    elif os.path.lexists(target):
        raise UserError(f"{folder / name}: has the name of a file of the collection; rename it; nothing was changed")
    else:
        link_or_copy(folder / name, target)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file or a link, or copy it where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_file():
            shutil.copy2(source, target)
            with open(target, "rb+") as file:
                os.fsync(file.fileno())
        else:
            raise UserError(f"{source}: is no regular file and cannot be kept; move it away first") from None
