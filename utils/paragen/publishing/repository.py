"""A published repository at a commit: its index, read within bounds and checked, and its files, by the hub's hashes.

A repository is a stranger's. Nothing of it is used before it was compared with a hash, and what it declares is bounded
by what `make publish` writes.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paragen.collection import index, run_files
from paragen.collection import manifest_kinds as kinds
from paragen.common import cli, parquet_files, paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info
from paragen.dataset.names import PATH_PART
from paragen.hub import transfer
from paragen.publishing import published_tree

if TYPE_CHECKING:
    import pyarrow as pa

THREADS = 8
PART = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.archive")
# What an index.parquet may be: one row per checkpoint, compressed as pyarrow does by default (at most 21 times).
LARGEST_INDEX = 2**28  # bytes
MOST_ROWS = 2**21
LONGEST_TEXT = 2**10  # bytes of a text in a row
LARGEST_TEXTS = 2**29  # bytes of all texts
MOST_MEMORY = 2**30  # bytes of the address space of the process that reads it
MOST_SECONDS = 10  # of a processor, for the same


class Source(NamedTuple):
    """A repository at a commit."""

    repository: str
    commit: str
    listed: dict[str, Any]  # the hub's RepoSibling by path
    staging: Path  # the folder of downloaded files that are not in their final places yet


def read_index(source: Source) -> "tuple[pa.Table, dict[str, Any]]":
    """The repository's index and the marks in its metadata, whose paths are checked to stay below saves/ and data/.

    The file has been checked against the hub's hash, which says nothing about who wrote it: see `read_table`.
    """
    import pyarrow as pa

    if paths.INDEX not in source.listed:
        raise UserError(f"{source.repository}: has no {paths.INDEX}, so `make publish` did not make it")
    fetch(source, [paths.INDEX])
    try:
        table = read_table(source.staging / paths.INDEX)
        marks = json.loads(table.schema.metadata[b"paragen"])
        if not kinds.is_flat(marks, 5):
            raise ValueError("its marks are nested too deeply")
        table = table.replace_schema_metadata(None)
        table = index.with_all_columns(table)
        if marks["format"] != published_tree.FORMAT or not table.schema.equals(index.schema()):
            raise ValueError(f"of another format than {published_tree.FORMAT}")
        faults = marks_faults(marks, set(table["collection"].to_pylist()))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if cli.storage_fault(error) is not None:
            raise
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source.repository}: {paths.INDEX} is broken, or `make publish` did not make it: {text}"
        ) from None
    if faults:
        raise UserError(f"{source.repository}: {paths.INDEX}: {faults[0]}; nothing was written")
    return table, marks


def read_table(path: Path) -> "pa.Table":
    """An index.parquet with its metadata, of a size that `make publish` may have written.

    It is read in a child process, which it may end. Texts are read as dictionaries and measured before they are written
    out, since a few bytes can stand for gigabytes. Raises ValueError, or what pyarrow raises, for any other file.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if path.stat().st_size > LARGEST_INDEX:
        raise ValueError(f"it has {path.stat().st_size} bytes")
    texts = [name for name, kind in index.COLUMNS.items() if kind == "string"]
    table = parquet_files.read_in_child(path, texts, MOST_ROWS, MOST_MEMORY, MOST_SECONDS)
    if not set(table.column_names) <= index.COLUMNS.keys():
        raise ValueError("it has other columns")
    total = 0
    for name in table.column_names:
        column = table[name]
        if not pa.types.is_dictionary(column.type):
            continue
        for chunk in column.chunks:
            lengths = pc.binary_length(chunk.dictionary)
            if (pc.max(lengths).as_py() or 0) > LONGEST_TEXT:
                raise ValueError(f"a text of its column {name} is longer than {LONGEST_TEXT} bytes")
            total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
        if total > LARGEST_TEXTS:
            raise ValueError("its texts are larger than those of any index")
        table = table.set_column(table.column_names.index(name), name, column.cast(pa.string()))
    if table.num_rows and (pc.min(table["bytes"]).as_py() or 0) < 0:
        raise ValueError("a checkpoint has less than 0 bytes")
    return table


def marks_faults(marks: dict[str, Any], names: set[str]) -> list[str]:
    """The faults of an index's marks and their paths. `names`: the collections in its rows."""
    faults = [] if names == marks["collections"].keys() else ["does not list the collections that it has rows of"]
    faults += [] if marks["layout"] in ("archive", "raw") else [f"layout {marks['layout']!r} is not known"]
    for name, mark in marks["collections"].items():
        kinds.check(mark["sha256"], kinds.SHA256, f"the sha256 of {name}")
        kinds.check(mark.get("labels", mark["sha256"]), kinds.SHA256, f"the labels of {name}")
        kinds.check(mark["files"], kinds.OBJECT, f"the files of {name}")
        for file, size in mark["files"].items():
            kinds.check(size, kinds.WHOLE, f"the size of {file[:200]!r}")
        parts = name.split("/")
        if len(parts) != 3 or parts[0] not in paths.CATEGORIES or not all(map(PATH_PART.fullmatch, parts)):
            faults.append(f"{name!r} is no <category>/<dataset>/<run folder>")
        for file in mark["files"]:
            folder, _, last = file.rpartition("/")
            if marks["layout"] == "raw":
                right = folder == name and (
                    last in published_tree.OTHER_FILES or run_files.CHECKPOINT_FILE.fullmatch(last)
                )
            else:
                part = PART.fullmatch(file)
                right = part is not None and part[1] == name
            if not right:
                faults.append(f"{file!r} is no file of {name}")
    for file, sha256 in marks["data"].items():
        kinds.check(sha256, kinds.SHA256, f"the hash of {file[:200]!r}")
        if dataset_info.place_fault(file) or not all(map(PATH_PART.fullmatch, file.split("/"))):
            faults.append(f"{file!r} is no <category>/<file>.json")
    return faults


def fetch(source: Source, names: list[str]) -> None:
    """Download files of the repository into the staging folder, and check them against the hub's hashes."""
    missing = [name for name in names if name not in source.listed]
    if missing:
        raise UserError(f"{source.repository}: lacks {missing[0]}, which its {paths.INDEX} names")

    def download(name: str) -> str | None:
        file = source.listed[name]
        for _ in range(2):  # an earlier call may have left a broken file
            transfer.download_file(source.repository, source.commit, file, source.staging, "dataset")
            fault = transfer.fault_of(source.staging / name, file)
            if fault is None:
                return None
            (source.staging / name).unlink(missing_ok=True)
        return f"{name} {fault}"

    transfer.quiet()
    with transfer.stopping_at_once(), ThreadPoolExecutor(THREADS) as threads:
        faults = [fault for fault in threads.map(download, names) if fault]
    if faults:
        raise UserError(f"{source.repository}: {faults[0]}; run it again, the rest is kept")
