"""Compares a dataset with the others: splits with the same rows, equal files, similar names; and notes likely slips."""

import json
import os
from pathlib import Path
from typing import Any

from paragen.common import files
from paragen.common.cli import UserError
from paragen.common.paths import loose
from paragen.dataset import names
from paragen.dataset.dataset_info import columns_in, columns_of, load_rows, pictures_of


def registered_files(info: dict[str, Any], data_dir: Path) -> dict[str, Path]:
    """The existing files of the entries, by dataset name."""
    named = {name: entry.get("file_name") for name, entry in info.items() if isinstance(entry, dict)}
    paths = {name: Path(data_dir) / file_name for name, file_name in named.items() if isinstance(file_name, str)}
    return {name: path for name, path in paths.items() if os.path.isfile(path)}


def is_test(name: str, file: Path) -> bool:
    """Whether the name of a dataset or of its file ends in a split that is not for training."""
    return any(split not in (None, "train") for split in map(names.split_in, (name, file.stem)))


def split_faults(name: str, file: Path, rows: list[dict[str, Any]], info: dict[str, Any], data_dir: Path) -> list[str]:
    """A train file that is named as a test split, and each test split of this train split, or train split of this test
    split, that has the same rows."""
    if names.split_in(file.stem) == "train" and names.split_in(name) not in (None, "train"):
        return [f"is a train split by its name, {name} a test split: rename one of them"]
    registered = registered_files(info, data_dir)
    others = [(other, path) for other, path in registered.items() if other != name]
    # A file that is not registered has its own name; this one has the name that it is registered under.
    unnamed = sorted({*file.parent.glob("*.json")} - {*registered.values(), file})
    equal = [
        f"is the file of {other}, too" if path == file else f"has the same rows as {path.name}"
        for other, path in [*others, *((path.stem, path) for path in unnamed)]
        if is_other_split(other, path, name, file) and same_rows(rows, path)
    ]
    return [f"{text}: a test split must differ from its train split" for text in dict.fromkeys(equal)]


def is_other_split(other: str, path: Path, name: str, file: Path) -> bool:
    """Whether the dataset `other` is a test split of the train split `name`, or the other way round, by their names."""
    return bool(families(other, path) & families(name, file)) and is_test(other, path) != is_test(name, file)


def families(name: str, file: Path) -> set[str]:
    """The names of a dataset and its file without _train, _test and the like."""
    return {names.without_split(name), names.without_split(file.stem)}


def same_rows(rows: list[dict[str, Any]], path: Path) -> bool:
    """Whether the file `path` holds exactly these rows, in any order."""
    try:
        others = load_rows(path)
    except UserError:
        return False
    return len(rows) == len(others) and sorted(map(as_text, rows)) == sorted(map(as_text, others))


def as_text(value: Any) -> str:
    """A JSON value as text, the same for any order of its keys."""
    return json.dumps(value, sort_keys=True)


def notes_on(
    name: str, file: Path, rows: list[dict[str, Any]], entry: dict[str, Any], info: dict[str, Any], data_dir: Path
) -> list[str]:
    """What is no fault but may be a mistake, in the dataset itself and beside the other ones in `info`."""
    notes = []
    columns = columns_of(entry)
    unused = [column for column in columns_in(rows) if column not in columns.values()]
    if unused:
        notes.append(f"columns that nothing reads: {', '.join(map(repr, unused))}")
    if "images" in columns:
        pictures = dict.fromkeys(picture for row in rows for picture in pictures_of(row, columns["images"]))
        missing = [picture for picture in pictures if not os.path.isfile(Path(data_dir) / picture)]
        if missing:
            notes.append(f"{len(missing)} of {len(pictures)} pictures are not in data/; the first: {missing[0]!r:.80}")
    named, filed = names.split_in(name), names.split_in(file.stem)
    if named and filed and named != filed:
        notes.append(f"the name says {named}, the file {file.name} says {filed}")
    notes += [f"its name is almost that of {other}" for other in info if other != name and loose(other) == loose(name)]
    for other, path in registered_files(info, data_dir).items():
        same_size = other != name and path.stat().st_size == file.stat().st_size
        if same_size and files.sha256_of(path) == files.sha256_of(file):
            notes.append(f"its file is the same as that of {other} ({path.name})")
    return notes
