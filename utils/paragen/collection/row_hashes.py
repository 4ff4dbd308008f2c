"""The hashes of the rows in data files. They are kept on disk, so that a file that did not change is not read again."""

import os
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from paragen.common import files
from paragen.dataset import dataset_info

CACHE = ".row_hashes"  # beside a data file
SETTLED_SECONDS = 2.0  # a younger file may change again within the resolution of its time stamp


class RowHashes(NamedTuple):
    """A data file: its hash and number of rows, and the number and hash of the first rows, which are trained on."""

    sha256: str
    rows_in_file: int
    rows: int
    rows_sha256: str


def read(path: Path, most: int | None) -> RowHashes:
    """The hashes of a data file and of its first `most` rows (None: all). Raises UserError for a broken file."""
    rows = dataset_info.load_rows(path)
    used = rows[: most or len(rows)]
    return RowHashes(files.sha256_of(path), len(rows), len(used), files.sha256_of_value(used))


def known(path: Path, most: int | None) -> RowHashes:
    """The same, from the cache where the file did not change since it was read."""
    return _known(path, most, files.stamp_of(path.stat()))


@cache
def _known(path: Path, most: int | None, stamp: tuple[int, ...]) -> RowHashes:
    cache_file, key = path.parent / CACHE, f"{path.name}|{most or 0}"
    cache = files.read_cache(cache_file)
    found = _parse(cache.get(key), stamp)
    if found is None:
        found = read(path, most)
        now = path.stat()
        if files.stamp_of(now) == stamp and time.time() - max(now.st_mtime, now.st_ctime) > SETTLED_SECONDS:
            _write(cache_file, {**cache, key: [list(stamp), *found]})
    return found


def _parse(value: Any, stamp: tuple[int, ...]) -> RowHashes | None:
    """An entry of the cache, where it is one of a file with this stamp."""
    if not isinstance(value, list) or len(value) != 5 or value[0] != list(stamp):
        return None
    return RowHashes(*value[1:])


def _write(cache_file: Path, cache: dict[str, Any]) -> None:
    """Keep the entries of files that are there. A folder that cannot be written to only costs time later."""
    if os.access(cache_file.parent, os.W_OK):
        there = {key: value for key, value in cache.items() if (cache_file.parent / key.rpartition("|")[0]).is_file()}
        files.write_json(cache_file, there)
