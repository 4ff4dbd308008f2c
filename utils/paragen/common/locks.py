"""Lock files: held while a process lives, and looked at by others. And temporary folders that have one."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import NamedTuple

from paragen.common import cli, files
from paragen.common.cli import UserError

SILENT_SECONDS = 6 * 3600  # after which a run of another host, that has written nothing, is taken for dead
LOOK_SECONDS = 0.02


class Busy(Exception):
    """Another process holds the lock."""


HELD: set[int] = set()  # descriptors of the locks that this process holds


def _leave_locks_to_parent() -> None:
    """Close the locks in a forked child (a data loader's worker), which may outlive its killed parent."""
    while HELD:
        os.close(HELD.pop())


os.register_at_fork(after_in_child=_leave_locks_to_parent)


@contextlib.contextmanager
def lock(path: Path, waiting: str | None = None) -> Iterator[int]:
    """Hold the lock file `path`; yields its descriptor.

    When a live process holds it, Busy is raised at once; with a text for `waiting`, that is printed and this waits. The
    kernel releases the lock when the process ends in any way; a normal end also removes the file. Raises UserError
    where something else has its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = _open_lock(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                if not _lock_soon(handle):
                    os.close(handle)
                    raise Busy(str(path)) from None
            else:
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


def _open_lock(path: Path) -> int:
    """A descriptor of a lock file, which is made where there is none. Raises UserError for anything else."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
    except IsADirectoryError:
        raise cli.UserError(f"{path}: is a folder, where a lock file is to be; move it away") from None
    if not S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise cli.UserError(f"{path}: is no regular file, where a lock file is to be; move it away")
    return handle


def _lock_soon(handle: int) -> bool:
    """Try again after the moment for which `is_held` and `make clean-up` may take a lock to look at it."""
    time.sleep(LOOK_SECONDS)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def is_free(path: Path) -> bool:
    """Whether no process holds the lock file `path`; the lock is taken for a moment to find out."""
    try:
        with lock(path):
            return True
    except Busy:
        return False


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock file `path`, which stays as it is.

    On this host the kernel knows: a process that has got the number of a killed holder does not hold its lock. The
    kernel does not know of another host's where their common disk has no locks; such a holder counts as alive until its
    lock and its staging folder have not changed for SILENT_SECONDS.
    """
    holder = holder_of(path)
    if holder is None or (holder.is_here and not files.is_running(holder.process)):
        return False
    try:
        return files.is_locked(path) or (not holder.is_here and time.time() - _last_change(path) < SILENT_SECONDS)
    except FileNotFoundError:
        return False


class Holder(NamedTuple):
    """Who wrote a lock file: the number of a process, and whether it is one of this host."""

    process: int
    is_here: bool


LOCK_TEXT = re.compile(rb"(\d+) (\S+)\n")  # process and host


def holder_of(path: Path) -> Holder | None:
    """Who wrote the lock file `path`, whether or not it still holds it; None where it is gone or no lock file."""
    try:
        found = LOCK_TEXT.fullmatch(files.read_up_to(path, 512))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.EISDIR):  # gone, or a pipe or a folder of that name
            return None
        raise
    return Holder(int(found[1]), found[2].decode(errors="replace") == socket.gethostname()) if found else None


def _last_change(lock: Path) -> float:
    """When a lock file, or a file in a staging folder that was made under it, changed last; seconds since the epoch."""
    folder = lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))
    staged = [path for staging in files.companions(folder, "staging-") for path in (staging, *staging.glob("*"))]
    changed = [lock.stat().st_mtime]
    for path in staged:
        with contextlib.suppress(FileNotFoundError):  # it was published or renamed meanwhile
            changed.append(path.stat().st_mtime)
    return max(changed)


PROCESS_PREFIX = "paragen-"  # of such a folder's name
PROCESS_NAME = re.compile(PROCESS_PREFIX + "[a-z0-9_]{8}")  # as tempfile makes it
PROCESS_LOCK = "paragen.lock"  # in a process's own temporary folder


def temporary_folder() -> Path:
    """Where temporary files go: the first of the folders that tempfile tries which can be written to.

    tempfile writes a file to try each, which stays where it is killed. Raises UserError where none can be written to.
    """
    named = [
        tempfile.tempdir,
        *map(os.environ.get, ("TMPDIR", "TEMP", "TMP")),
        "/tmp",
        "/var/tmp",
        "/usr/tmp",
        os.curdir,
    ]
    for folder in filter(None, named):
        if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder).absolute()
    raise UserError("no folder for temporary files can be written to; set TMPDIR to one that can")


@contextlib.contextmanager
def process_folder() -> Iterator[Path]:
    """A temporary folder for this process until the body ends.

    It holds a lock inside, which tells it from the folder of a killed process: each command removes such at its end.
    """
    made = tempfile.TemporaryDirectory(prefix=PROCESS_PREFIX, dir=temporary_folder())
    with made as name, lock(Path(name, PROCESS_LOCK)):
        try:
            yield Path(name)
        finally:
            _empty(Path(name))


def _empty(folder: Path) -> None:
    """Remove all from a process's folder but its lock, which shows what the folder is, should this be killed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            files.remove_folder(path)
        elif path.name != PROCESS_LOCK:
            path.unlink(missing_ok=True)


def remove_abandoned_process_folders() -> None:
    """Remove the temporary folders of this user's killed processes."""
    for folder in temporary_folder().glob(f"{PROCESS_PREFIX}*"):
        with contextlib.suppress(Busy, FileNotFoundError):
            if not _is_abandoned(folder):
                continue
            if (folder / PROCESS_LOCK).exists():
                with lock(folder / PROCESS_LOCK):
                    _empty(folder)
            with contextlib.suppress(OSError):  # another process has removed it, or is using it
                folder.rmdir()


def _is_abandoned(folder: Path) -> bool:
    """Whether a folder is that of a killed process of this user.

    One without a process in its lock may be a live one's that is just starting: this waits for a moment then.
    """
    info, known = folder.lstat(), folder / PROCESS_LOCK
    if not S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or not PROCESS_NAME.fullmatch(folder.name):
        return False
    if holder_of(known) is None:
        if {path.name for path in folder.iterdir()} - {PROCESS_LOCK}:
            return False  # not ours
        time.sleep(max(0.0, files.WRITING_SECONDS - (time.time() - info.st_mtime)))
        return holder_of(known) is None and not {path.name for path in folder.iterdir()} - {PROCESS_LOCK}
    return not is_held(known)


cli.AT_END.append(remove_abandoned_process_folders)
