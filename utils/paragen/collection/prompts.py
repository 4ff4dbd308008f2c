"""The prompts of a collection: the rows it was trained on, or held-out rows, as its manifest recorded them.

A data file whose rows changed since the training is refused.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paragen.collection.manifest import Manifest, TrainedData
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, names, row_texts

SPLITS = ("train", "test")
Part = tuple[dict[str, Any], Sequence[dict[str, Any]]]  # (an entry of dataset_info.json, rows of its file)

# What this process has read, by path: (the file's stamp, the value made from it).
_rows: dict[Path, tuple[tuple, list[dict[str, Any]]]] = {}
_hashes: dict[tuple[Path, int | None], tuple[tuple, str]] = {}
_entries: dict[tuple[Path, str], tuple[tuple, tuple[dict[str, Any], Path] | None]] = {}


def of_collection(manifest: Manifest, split: str = "train", data_dir: Path | None = None) -> list[dict[str, Any]]:
    """The prompts of one split of a collection's dataset.

    Args:
        manifest: the collection's.
        split: `train` for the rows trained on; `test` for the dataset's registered `<name>_test`, else for the rows of
            its own file that were not trained on (only the last `held_out` of them where the entry says so).
        data_dir: where dataset_info.json lies (default: data/).

    Returns a dict per row: `system`, `prompt` and `response` (texts, empty where there is none), `images` (paths
    relative to data/). A conversation gives its first user message, its last answer, and all of it as `messages`.

    Raises UserError when the rows are gone, when they changed since the training, or when this split has none. The rows
    of a registered `<name>_test` cannot be compared, since no manifest recorded them.
    """
    return [row_texts.texts_of(row, entry) for entry, rows in parts(manifest, split, data_dir) for row in rows]


def parts(manifest: Manifest, split: str = "train", data_dir: Path | None = None) -> list[Part]:
    """The rows behind `of_collection` as they are in their files, by dataset; each file is read once."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not known; known: {', '.join(SPLITS)}")
    if manifest.data is None:
        raise UserError(f"{manifest.run}: its manifest does not know the data (it was made from a stock run)")
    folder = Path(data_dir or paths.DATA).absolute()
    return [(trained if split == "train" else held_out)(data, folder) for data in manifest.data]


def trained(data: TrainedData, data_dir: Path) -> Part:
    """The rows of one dataset of a manifest that were trained on. Raises UserError where they changed since."""
    path = data_dir / data.file
    rows = rows_in(path)
    if _hash_of(path, data.rows) != data.rows_sha256:
        raise UserError(
            f"{paths.relative(path)}: its first {data.rows} rows are not those that {data.name} was trained on; "
            "put the file back, or train again with FORCE=1"
        )
    return data.entry, rows[: data.rows]


def held_out(data: TrainedData, data_dir: Path) -> Part:
    """The held-out rows of one dataset of a manifest: its registered test split, or the rest of its own file."""
    paired = paired_name(data)
    if found := _registered(paired, data_dir):
        entry, path = found
        return entry, rows_in(path)
    entry, _ = trained(data, data_dir)
    path = data_dir / data.file
    rest = rows_in(path)[first_held_out(data, data_dir) :]
    if not rest:
        raise UserError(
            f"{data.name}: has no {paired} in dataset_info.json and was trained on all its rows; register rows to "
            f"score with as {paired}"
        )
    if data.sha256 and _hash_of(path, None) != data.sha256:
        raise UserError(
            f"{paths.relative(path)}: changed since {data.name} was trained, behind the rows trained on; put it "
            f"back, or register rows to score with as {paired}"
        )
    return entry, rest


def first_held_out(data: TrainedData, data_dir: Path) -> int:
    """The index of the first held-out row in a dataset's own file: the one after those trained on, or the first of the
    last `held_out` rows where the entry has that key."""
    count, last = len(rows_in(data_dir / data.file)), data.entry.get(dataset_info.HELD_OUT)
    return max(data.rows, count - last) if last else data.rows


def paired_name(data: TrainedData) -> str:
    """The name of a dataset's test split where it is registered as a dataset of its own."""
    return names.test_split_name(data.name)


def split_name(data: TrainedData, data_dir: Path | None = None) -> str:
    """The name of the rows that `held_out` returns: `ARC-c_test`, or `MATH[5000:5250]` for rows of its own file."""
    folder = Path(data_dir or paths.DATA).absolute()
    if _registered(paired_name(data), folder):
        return paired_name(data)
    start, end = first_held_out(data, folder), len(rows_in(folder / data.file))
    return f"{data.name}[{start}:{end}]"


def registered(name: str, data_dir: Path | None = None) -> tuple[str, Part]:
    """(name, rows) of the registered dataset that a user names. Raises UserError where it is not known."""
    folder = Path(data_dir or paths.DATA).absolute()
    found = paths.choose(name, dataset_info.read_info(folder), "registered dataset")
    return found, (dataset_info.entry_of(found, folder), rows_in(dataset_info.data_file(found, folder)))


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a data file, read once per process while it stays unchanged."""
    stamp = _stamp(path)
    if path not in _rows or _rows[path][0] != stamp:
        _rows[path] = stamp, dataset_info.load_rows(path)
    return _rows[path][1]


def _hash_of(path: Path, rows: int | None) -> str:
    """The hash of a file's first rows, or, without a number, of its bytes."""
    stamp = _stamp(path)
    if (path, rows) not in _hashes or _hashes[path, rows][0] != stamp:
        try:
            sha256 = files.sha256_of(path) if rows is None else files.sha256_of_value(rows_in(path)[:rows])
        except (UnicodeEncodeError, RecursionError):
            raise UserError(
                f"{paths.relative(path)}: its rows hold half of a surrogate pair, or are nested too deeply; "
                "put the file back"
            ) from None
        _hashes[path, rows] = stamp, sha256
    return _hashes[path, rows][1]


def _registered(name: str, data_dir: Path) -> tuple[dict[str, Any], Path] | None:
    """(the entry, the file) of a dataset that dataset_info.json has; None for one that it does not have."""
    info = data_dir / "dataset_info.json"
    stamp = _stamp(info) if info.exists() else ()
    if (info, name) not in _entries or _entries[info, name][0] != stamp:
        there = name in dataset_info.read_info(data_dir)
        found = (dataset_info.entry_of(name, data_dir), dataset_info.data_file(name, data_dir)) if there else None
        _entries[info, name] = stamp, found
    return _entries[info, name][1]


def _stamp(path: Path) -> tuple:
    """A file's size, times and number, which differ once it was changed or replaced."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{paths.relative(path)}: the prompts are gone; put the file back (make data)") from None
    except OSError as error:
        raise UserError(f"{paths.relative(path)}: cannot be read: {error.strerror}") from None
    return files.stamp_of(stat)
