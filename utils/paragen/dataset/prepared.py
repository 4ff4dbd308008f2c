"""Registers prepared dataset files, whose content data/sources.yaml pins, with what it states of each."""

from pathlib import Path
from typing import Any

from paragen.common.cli import UserError
from paragen.common.paths import relative
from paragen.dataset import dataset_info, registration, sources
from paragen.dataset.infer_entry import infer_entry
from paragen.dataset.row_faults import find_gaps


def register(name: str, entry: dict[str, Any], force: bool, data_dir: Path) -> list[str]:
    """Register a prepared file.

    Since its content is pinned, rows with a gap are known: they are accepted one by one.

    Args:
        name: the file's name in data/sources.yaml.
        entry: its mapping there.
        force: whether the dataset's name may stand for another file by now.
        data_dir: the folder of dataset_info.json.

    Returns the lines to print. Raises UserError with what is wrong with the file.
    """
    file, dataset = data_dir / entry["category"] / name, entry["dataset"]
    rows = dataset_info.load_rows(file)
    old = dataset_info.read_info(data_dir).get(dataset, {})
    old_file = old.get("file_name") if isinstance(old, dict) else None
    if old and old_file != f"{entry['category']}/{name}" and not force:
        way_out = "FORCE=1 registers this one in its place"
        raise UserError(f"is at {relative(file)}, but {dataset!r} is registered for {old_file!r}; {way_out}")
    named = columns_kept(old) if old_file == f"{entry['category']}/{name}" else {}
    prompts_only = entry["kind"] == "prompts"
    try:
        found = infer_entry(rows, named, prompts_only)
    except UserError as error:
        if entry["kind"] != "test":
            raise UserError(f"is at {relative(file)}, but cannot be registered: {error}") from None
        prompts_only = True
        found = infer_entry(rows, named, prompts_only)
    gaps = find_gaps(rows, found)
    known = old.get(dataset_info.HELD_OUT) if named else None  # of the same file: the user may have set another number
    last = held_out(entry, len(rows)) if known is None else known
    marks: dict[str, Any] = {dataset_info.HELD_OUT: last, dataset_info.ACCEPTED_ROWS: list(gaps)}
    if entry.get(dataset_info.FAMILY):
        marks[dataset_info.FAMILY] = entry[dataset_info.FAMILY]
    request = registration.Request(dataset, named, prompts_only, force, marks)
    lines = registration.register(file, request, data_dir).lines()
    if marks[dataset_info.HELD_OUT]:
        first = len(rows) - marks[dataset_info.HELD_OUT] + 1
        lines.append(f"note: held out: rows {first} to {len(rows)}, which no recipe trains on")
    for number, gap in list(gaps.items())[: registration.SHOWN]:
        lines.append(f"note: row {number}: {gap}; upstream's file has it so, accepted")
    if entry.get("pictures"):
        lines.append(
            f"note: its pictures are not downloaded; get them from {entry['pictures']} and put them below "
            f"{relative(data_dir)}/ at the paths that its rows name"
        )
    return lines


def columns_kept(old: dict[str, Any]) -> dict[str, str]:
    """The columns of an existing registration, so that a user's choice of them outlives another call."""
    if dataset_info.entry_faults(old):
        return {}
    mapped = dataset_info.columns_of(old)
    return {kind: mapped.get(kind, "") for kind in dataset_info.CANDIDATES[dataset_info.formatting_of(old)]}


def held_out(entry: dict[str, Any], rows: int) -> int:
    """How many of a file's last rows are held out: as its mapping states, otherwise by the rule for training sets."""
    if entry["kind"] != "train":
        return 0
    return sources.held_out(rows) if entry.get("held_out") is None else entry["held_out"]
