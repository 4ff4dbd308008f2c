"""Checks every entry of dataset_info.json, the files that they name, and all their rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from paragen.common.cli import UserError
from paragen.common.paths import relative
from paragen.dataset import comparison, data_warnings, names
from paragen.dataset.dataset_info import entry_faults, load_rows, place_fault, read_info
from paragen.dataset.row_faults import row_faults


class Checked(NamedTuple):
    """What a check found in one dataset."""

    name: str
    faults: list[str]
    notes: list[str]  # what is no fault but may be a mistake; only without faults
    warnings: list[str]  # what is odd about its rows, see data_warnings.py; only without faults


def check_all(data_dir: Path) -> Iterator[Checked]:
    """Check the registered datasets one after the other. Raises UserError when none is registered."""
    info = read_info(data_dir)
    if not info:
        where = relative(data_dir / "dataset_info.json")
        raise UserError(f"{where}: there is nothing registered; `make register FILE=data/<category>/<file>.json`")
    earlier: dict[str, Any] = {}
    for name, entry in info.items():
        yield Checked(name, *check_entry(name, entry, info, earlier, data_dir))
        earlier[name] = entry


def check_entry(
    name: str, entry: Any, info: dict[str, Any], earlier: dict[str, Any], data_dir: Path
) -> tuple[list[str], list[str], list[str]]:
    """The faults of one entry, the notes on it and the warnings about its rows.

    Notes and warnings compare it with the `earlier` entries only, so that what concerns two datasets is noted once.
    """
    faults = [] if names.is_dataset_name(name) else [f"{name!r} {names.RULE}"]
    unsound = entry_faults(entry)
    if unsound:
        return faults + unsound, [], []
    file = data_dir / entry["file_name"]
    place = place_fault(entry["file_name"])
    faults += [f"{relative(file)}: {place}"] if place else []
    try:
        rows = load_rows(file)
    except UserError as error:
        return [*faults, str(error)], [], []
    found = row_faults(rows, entry)
    if comparison.is_test(name, file):
        found += comparison.split_faults(name, file, rows, info, data_dir)
    faults += [f"{relative(file)}: {fault}" for fault in found]
    if found:
        return faults, [], []
    notes = comparison.notes_on(name, file, rows, entry, earlier, data_dir)
    return faults, notes, data_warnings.of_dataset(name, file, rows, entry, earlier, data_dir)
