"""Files that are whole or not there: atomic writes, hashes, locks that die with their process, swapped folders."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Put `parts`, one behind the other, at `path` so that no reader, also after a crash, ever sees a part of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write(path: Path, *parts: bytes | memoryview) -> None:
    """Write `parts`, one behind the other, to `path` in a staging folder, which `sync_tree` makes durable later."""
    with open(path, "wb") as file:
        file.writelines(parts)


def unfinished(path: Path) -> list[Path]:
    """What is there of writing `path` atomically: of a process that writes it now, or was killed when it did."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of `write_atomically`. Call it where no live one can be writing `path`."""
    for left_over in unfinished(path):
        left_over.unlink()


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON at `path`, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` (creations, renames, removals) survive a power cut."""
    sync(folder)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make all that is in `folder` survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def stamp_of(stat: os.stat_result) -> tuple[int, ...]:
    """What tells whether a file is still the one that was read: its size, times and number."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_value(value: Any) -> str:
    """The hexadecimal SHA-256 of a JSON value, the same for any order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Busy(Exception):
    """Another process holds the lock."""


HELD: set[int] = set()  # descriptors of the locks that this process holds


def _leave_locks_to_parent() -> None:
    """A forked child (a data loader's worker) that outlives its killed parent must not keep the parent's locks."""
    while HELD:
        os.close(HELD.pop())


os.register_at_fork(after_in_child=_leave_locks_to_parent)


@contextlib.contextmanager
def lock(path: Path, waiting: str | None = None) -> Iterator[int]:
    """Hold the lock file `path`; yields its descriptor.

    When a live process holds it: raises Busy at once, or, with a text for `waiting`, prints that and waits. The kernel
    drops the lock with the process, however that ends; the file itself is removed on a normal end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                os.close(handle)
                raise Busy(str(path)) from None
            print(waiting, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        os.close(handle)  # its last holder removed the file between our open and our lock: take the new one
    HELD.add(handle)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield handle
    finally:
        HELD.discard(handle)
        path.unlink(missing_ok=True)
        os.close(handle)


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock file `path`, which is taken for a moment to find out."""
    try:
        with lock(path):
            return True
    except Busy:
        return False


def is_held(path: Path) -> bool:
    """Whether a live process seems to hold the lock file `path`; the lock itself is not touched.

    Goes by the process number written into it; a holder on another host counts as alive.
    """
    try:
        number, host = path.read_text().split()
    except (FileNotFoundError, ValueError):
        return False
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def beside(folder: Path, kind: str) -> Path:
    """The hidden companion of `folder` in the same parent: its `lock`, a `staging-...` folder, the `old` one."""
    return folder.with_name(f".{folder.name}.{kind}")


def companions(folder: Path, kind: str) -> list[Path]:
    """All companions of `folder` whose kind starts with `kind`."""
    prefix = beside(folder, kind).name
    return (
        sorted(path for path in folder.parent.iterdir() if path.name.startswith(prefix))
        if folder.parent.is_dir()
        else []
    )


def publish_folder(staging: Path, folder: Path) -> None:
    """Give the whole folder `staging` its final name; what stood there before is deleted only afterwards.

    Call it with the folder's lock held. A crash in the middle is put right by `recover_folder`.
    """
    old = beside(folder, "old")
    for path in [staging, *staging.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    sync_folder(folder.parent)
    remove_folder(old)


def recover_folder(folder: Path) -> None:
    """Undo what a dead process left of `publish_folder` and of its staging folders. Call it with the lock held."""
    old = beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left_over in [old, *companions(folder, "staging-")]:
        remove_folder(left_over)


def remove_folder(folder: Path) -> None:
    """Delete a folder and all in it, or a file (of a link, the link alone); none there is fine."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    while folder.exists():
        with contextlib.suppress(FileNotFoundError):  # somebody else deleted a part of it meanwhile
            shutil.rmtree(folder)


def size_of(paths: Iterable[Path]) -> int:
    """Bytes in the files among `paths`."""
    return sum(path.stat().st_size for path in paths if path.is_file())
