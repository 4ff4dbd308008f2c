"""Files that are whole or missing: atomic writes, hashes, locks that end with their process, replaced folders."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from typing import Any

from paragen.common import cli

CHUNK_BYTES = 1 << 20  # read at once from a file that is hashed
WRITING_SECONDS = 1  # after the last change, a file that is written in one go may be one of a killed process
HASHED_AT_ONCE = min(8, os.cpu_count() or 1)  # files
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that Git LFS did not download


def write_atomically(path: Path, *parts: bytes | bytearray | memoryview, durable: bool = True) -> None:
    """Write `parts`, one after the other, to `path`. No reader ever sees an incomplete file, not even after a crash.

    Raises UserError where a folder has that name.

    Without `durable` a power cut may lose the file: for a staging folder, whose files `sync_tree` syncs at the end.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with cli.writing_to(path), open(temporary, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # for `remove_abandoned` on another host
            file.writelines(parts)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except IsADirectoryError:
            raise cli.UserError(f"{path}: is a folder, where a file is to be written; move it away") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)
        remove_abandoned(path)


def read_up_to(path: Path, most: int = sys.maxsize) -> bytes:
    """The first `most` bytes of a regular file. Raises OSError for a folder, a FIFO or a device, without waiting."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        if not S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        return file.read(min(most, os.fstat(handle).st_size))


def unfinished(path: Path) -> list[Path]:
    """The temporary files of `write_atomically`: of a process that writes `path` now, or that was killed."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of `write_atomically`; what a live one may be writing stays.

    Of a file that was written to within WRITING_SECONDS it waits to see whether that goes on, as on another host.
    """
    for left_over in unfinished(path):
        number = left_over.name.split(".")[-2]
        if not number.isdigit() or is_running(int(number)):
            continue
        with contextlib.suppress(FileNotFoundError):
            time.sleep(max(0.0, min(WRITING_SECONDS, WRITING_SECONDS - _age_of(left_over))))
            is_old = _age_of(left_over) >= WRITING_SECONDS
            if is_old and not is_locked(left_over):  # a process of another host holds a lock
                left_over.unlink()


def _age_of(path: Path) -> float:
    """The seconds since a file was last written to."""
    return time.time() - path.stat().st_mtime


def is_running(number: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_locked(path: Path) -> bool:
    """Whether a lock file is locked, as far as this host's kernel knows. Leaves the file as it is."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # another user's
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of `write_atomically`. Call it only where no process can be writing `path`."""
    for left_over in unfinished(path):
        left_over.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_cache(path: Path) -> dict[str, Any]:
    """The JSON object in a cache file; empty where that is missing or broken, which only costs work again."""
    try:
        cache = json.loads(read_up_to(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return cache if isinstance(cache, dict) else {}


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` (creations, renames, removals) to disk, so that they survive a power cut."""
    sync(folder)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush everything in `folder` to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def stamp_of(stat: os.stat_result) -> tuple[int, ...]:
    """A file's size, times and number: while they stay equal, it is taken for the file that was read."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes_below(target: Path) -> dict[str, str]:
    """The hexadecimal SHA-256 of each file below a folder, by its path there; the path of a file itself is empty."""
    found = [path for path in sorted(target.rglob("*")) if path.is_file()] if target.is_dir() else [target]
    names = [path.relative_to(target).as_posix() if path != target else "" for path in found]
    with ThreadPoolExecutor(HASHED_AT_ONCE) as threads:
        return dict(zip(names, threads.map(sha256_of, found), strict=True))


def git_blob_id(path: Path) -> str:
    """Git's id of a file's content, hexadecimal: SHA-1 over `blob <size>`, a zero byte and the content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_value(value: Any) -> str:
    """The hexadecimal SHA-256 of a JSON value, the same for any order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def beside(folder: Path, kind: str) -> Path:
    """A hidden companion of `folder` in the same parent: its `lock`, a `staging-...` folder, the `old` folder."""
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
    """Give the complete folder `staging` its final name, then delete what had that name before.

    Call it with the folder's lock held. After a crash in the middle, `recover_folder` restores one of the two.
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


def recover_folder(folder: Path, spare: Path | None = None) -> None:
    """Clean up after a killed process: an unfinished `publish_folder`, staging folders. Call it with the lock held.

    The staging folder `spare` stays.
    """
    old = beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left_over in [old, *companions(folder, "staging-")]:
        if left_over != spare:
            remove_folder(left_over)


def remove_folder(folder: Path) -> None:
    """Delete a folder with its contents, a file, or a link alone; nothing happens where there is none."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    while folder.exists():
        with contextlib.suppress(FileNotFoundError):  # another process deleted a part of it meanwhile
            shutil.rmtree(folder)


def size_of(paths: Iterable[Path]) -> int:
    """The total size of the files among `paths`, bytes."""
    return sum(path.stat().st_size for path in paths if path.is_file())
