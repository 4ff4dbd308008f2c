"""What `make clean-up` deletes: left by killed processes, interrupted pretrains included, or made again by a sweep.

A left-over is told by its name and its content, belongs to this user, and is deleted while the lock is held under which
it was made, so that nothing is deleted that a process uses. What a sweep's runs share (claims, tokenised rows) is
deleted only while nothing runs. Links are neither followed nor deleted.
"""

import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from paragen.common import files, locks, paths

ATTEMPT = "[0-9a-f]{8}(?:[0-9a-f]{8})?"  # its id, the longer one in a sweep
STAGING = re.compile(rf"\.(.+)\.staging-{ATTEMPT}(-back)?")
REPLACED = re.compile(r"\.(.+)\.old")
LOCK = re.compile(r"\..+\.lock")
CLAIM = re.compile(r"\..+\.attempt")
TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
RENDERED = re.compile(r"(.+)_temp_rank_\d+(_seed-\d+)?\.ya?ml")
TOKENS_KEY = re.compile(r"[0-9a-f]{64}")
CLAIM_TEXT = re.compile(ATTEMPT.encode())
OWN_LOCK = ".clean-up.lock"  # in saves/
UNTOUCHED_SECONDS = 600  # after which no process, of another machine either, can be writing a file at one go

RUN = "left by a process that was killed"
SWEEP = "left by a sweep that was killed"
SHARED = "tokenised rows: the next sweep makes them again"


class LeftOver(NamedTuple):
    """A file or folder that can be deleted."""

    path: Path
    bytes: int  # that deleting it frees
    why: str
    lock: Path | None  # held while it is deleted
    is_shared: bool = False  # deleted only while nothing runs


class Found(NamedTuple):
    """What `find` returns."""

    left_overs: list[LeftOver]
    in_use: list[Path]  # what looks like left-overs, but a process may be at work on it


def find() -> Found:
    """All that can be deleted now, and what is in use."""
    candidates = [one for path, info in _entries() if (one := _left_over_of(path, info))]
    candidates += _process_folders()
    running = locks_in_use()
    found: list[LeftOver] = []
    in_use: list[Path] = []
    for one in candidates:
        busy = bool(running) if one.is_shared else one.lock is not None and is_in_use(one.lock)
        if busy:
            in_use.append(one.path)
        else:
            found.append(one)
    # locks last: each is needed to delete what lies beside it
    return Found(sorted(found, key=lambda one: (one.path == one.lock, one.path)), sorted(in_use))


def delete(one: LeftOver) -> bool:
    """Delete a left-over. Returns False, with nothing deleted, where a process has begun to use it since."""
    if one.is_shared:
        return _delete_shared(one.path)
    if one.lock is None:
        files.remove_folder(one.path)
        return True
    try:
        with locks.lock(one.lock):  # its end deletes the lock file itself
            if one.path != one.lock and not _is_only_copy(one.path):
                files.remove_folder(one.path)
    except locks.Busy:
        return False
    return True


def _delete_shared(path: Path) -> bool:
    """Delete a claim or tokenised rows. These get another name first: a run that starts sees all of them or none."""
    if locks_in_use():
        return False
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    removed = path.with_name(f"{paths.REMOVED_TOKENS}{secrets.token_hex(4)}")
    path.rename(removed)
    if locks_in_use() and not path.exists():  # a run that has begun meanwhile may have seen them
        removed.rename(path)
        return False
    files.remove_folder(removed)
    return True


def locks_in_use() -> list[Path]:
    """The locks of runs, sweeps and other work on this repository that is going on."""
    found = (path for path, info in _entries() if stat.S_ISREG(info.st_mode) and _is_lock(path))
    return [path for path in found if is_in_use(path)]


def is_in_use(lock: Path) -> bool:
    """Whether a process holds a lock file, or may hold it on another machine. Leaves the file as it is.

    Other than locks.is_held, this has no patience that ends: what is deleted cannot be had back.
    """
    try:
        if files.is_locked(lock):
            return True
    except FileNotFoundError:
        return False
    holder = locks.holder_of(lock)
    return holder is not None and not holder.is_here


def _entries() -> Iterator[tuple[Path, os.stat_result]]:
    """The files and folders of this user that can be left-overs, and those among which they lie, with their stat."""
    folders = [paths.SAVES, paths.DATA, paths.MODELS, paths.SCRIPTS]
    while folders:
        for path, info in children(folders.pop()):
            if info.st_uid == os.getuid() and path != paths.SAVES / OWN_LOCK:
                yield path, info
                if stat.S_ISDIR(info.st_mode) and _is_entered(path):
                    folders.append(path)


def children(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """What is in a folder, sorted, without links and what other processes have just deleted."""
    found = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in entries:
        try:
            info = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if not stat.S_ISLNK(info.st_mode):
            found.append((folder / entry.name, info))
    return found


def _is_entered(folder: Path) -> bool:
    """Whether left-overs are looked for in a folder. A published tree is cleaned by the next `make publish`."""
    if folder == paths.SAVES / paths.TOKENS:
        return True
    return not (
        folder.name.startswith(".")
        or paths.CHECKPOINT.fullmatch(folder.name)
        or folder.parent == paths.SAVES / "publish"
        or folder.parent == paths.SAVES / paths.TOKENS
    )


def _left_over_of(path: Path, info: os.stat_result) -> LeftOver | None:
    """What a file or folder is by its name and content; None for what must stay."""
    if stat.S_ISDIR(info.st_mode):
        return _left_over_folder(path)
    if not stat.S_ISREG(info.st_mode):
        return None
    name, size = path.name, freed_by(info)
    if _is_lock(path):
        return LeftOver(path, size, RUN, path)
    if CLAIM.fullmatch(name) and CLAIM_TEXT.fullmatch(_start_of(path)):
        return LeftOver(path, size, SWEEP, None, is_shared=True)
    if (temporary := TEMPORARY.fullmatch(name)) and not _is_being_written(int(temporary[1]), info):
        return LeftOver(path, size, RUN, None)
    return None


def _left_over_folder(path: Path) -> LeftOver | None:
    name = path.name
    if path.parent == paths.SAVES / paths.TOKENS:
        is_ours = TOKENS_KEY.fullmatch(name) or name.startswith(paths.REMOVED_TOKENS)
        return LeftOver(path, bytes_in(path), SHARED, None, is_shared=True) if is_ours else None
    if staging := STAGING.fullmatch(name):
        return LeftOver(path, bytes_in(path), RUN, _lock_over(path, staging[1]))
    if (replaced := REPLACED.fullmatch(name)) and not _is_only_copy(path):
        return LeftOver(
            path, bytes_in(path), "was replaced by a process that was killed", _lock_over(path, replaced[1])
        )
    return None


def _is_only_copy(path: Path) -> bool:
    """Whether a folder was renamed to be replaced, and is not: the next run gives it its name back."""
    replaced = REPLACED.fullmatch(path.name)
    return replaced is not None and not path.with_name(replaced[1]).is_dir()


def _lock_over(path: Path, name: str) -> Path:
    """The lock under which a companion of the file or folder `name` was made: an export's, or that of the folder."""
    for folder in path.parents:
        if folder in (paths.SAVES, *paths.SAVES.parents):
            break
        lock = folder / f".{paths.EXPORT_RECORD}.lock"
        if lock.exists() or (folder / paths.EXPORT_RECORD).is_file():
            return lock
    return files.beside(path.with_name(name), "lock")


def _is_lock(path: Path) -> bool:
    """Whether a file is a lock of ours; a rendered recipe is one, too, beside its recipe."""
    if rendered := RENDERED.fullmatch(path.name):
        return path.is_relative_to(paths.SCRIPTS) and path.with_name(f"{rendered[1]}{path.suffix}").is_file()
    return bool(LOCK.fullmatch(path.name) and locks.LOCK_TEXT.fullmatch(_start_of(path)))


def _start_of(path: Path) -> bytes:
    """The first bytes of a file, more than a lock or a claim has; one that is gone is like one of another program."""
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except FileNotFoundError:
        return b"gone"


def _is_being_written(process: int, info: os.stat_result) -> bool:
    """Whether a process may still write a temporary file; on another machine, its number says nothing."""
    if time.time() - info.st_mtime < UNTOUCHED_SECONDS:
        return True
    return files.is_running(process)


def _process_folders() -> list[LeftOver]:
    """The temporary folders of killed processes of this user."""
    found = []
    for path, info in children(locks.temporary_folder()):
        lock = path / locks.PROCESS_LOCK
        is_ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()
        if (
            is_ours
            and path.name.startswith(locks.PROCESS_PREFIX)
            and lock.is_file()
            and locks.LOCK_TEXT.fullmatch(_start_of(lock))
        ):
            found.append(LeftOver(path, bytes_in(path), RUN, lock))
    return found


def bytes_in(folder: Path) -> int:
    """The bytes that deleting a folder frees."""
    return sum(
        bytes_in(path) if stat.S_ISDIR(info.st_mode) else freed_by(info) for path, info in children(folder)
    )  # fmt: skip


def freed_by(info: os.stat_result) -> int:
    """The bytes that deleting a file frees: none where it has another name."""
    return info.st_size if info.st_nlink == 1 else 0
