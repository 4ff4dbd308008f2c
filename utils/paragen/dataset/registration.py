"""Registers a data file in data/dataset_info.json after a check of every row.

A file in another format is first converted to data/<category>/<name>.json (convert.py).
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from paragen.common import files, locks
from paragen.common.cli import UserError
from paragen.common.paths import CATEGORIES, relative
from paragen.dataset import comparison, convert, data_warnings, descriptions, names
from paragen.dataset.dataset_info import (
    ACCEPTED_ROWS,
    FOREIGN_KEYS,
    HELD_OUT,
    PROMPTS_ONLY,
    columns_of,
    entry_faults,
    entry_of,
    files_named,
    load_rows,
    parse_info,
    place_fault,
    read_info,
)
from paragen.dataset.infer_entry import infer_entry
from paragen.dataset.row_faults import row_faults

SHOWN = 5  # faulty rows that a refusal names; --check names all
LOCK_SECONDS = 30


class Request(NamedTuple):
    """What a user wants to register a file as."""

    name: str  # the dataset's
    columns: dict[str, str] = {}  # those that the user names, e.g. {"prompt": "question"}
    prompts_only: bool = False  # the rows have no responses
    replace: bool = False  # the name may stand for another file
    # held_out, accepted_rows and family; of those that are not here, an entry for the same file keeps its own
    marks: dict[str, Any] = {}


class Registered(NamedTuple):
    """What came of a registration."""

    name: str
    outcome: str  # `registered`, `registered anew`, or that nothing changes
    file: str  # as messages show it
    rows: int
    entry: dict[str, Any]
    notes: list[str]  # what is no fault but may be a mistake
    warnings: list[str]  # what is odd about its rows, see data_warnings.py

    def lines(self) -> list[str]:
        """The lines to print."""
        only = ", prompts only: not for training" if self.entry.get(PROMPTS_ONLY) else ""
        columns = ", ".join(f"{kind}={column}" for kind, column in columns_of(self.entry).items())
        lines = [f"{self.name}: {self.outcome}: {self.file}, {self.rows} rows{only}", f"columns: {columns}"]
        return lines + [f"note: {note}" for note in self.notes] + [f"warning: {text}" for text in self.warnings]


def register(file: Path, request: Request, data_dir: Path) -> Registered:
    """Write an entry for `file` into the dataset_info.json of `data_dir`, provided that every row of it is sound.

    Raises UserError with the first faults; then nothing is written.
    """
    file_name, label = place_of(file, data_dir), relative(file)
    file = Path(data_dir) / file_name
    rows = load_rows(file)
    info = read_info(data_dir)
    entry = sound_entry(rows, file_name, label, request, info, data_dir)
    outcome = store(request.name, entry, request.replace, data_dir)
    notes = comparison.notes_on(request.name, file, rows, entry, info, data_dir)
    warnings = data_warnings.of_dataset(request.name, file, rows, entry, info, data_dir)
    return Registered(request.name, outcome, label, len(rows), entry, notes, warnings)


def register_converted(source: str, target: Path, request: Request, data_dir: Path) -> Registered:
    """Convert `source` to the file `target` in `data_dir` and register that.

    Raises UserError with the first faults, or when `target` has other rows and `replace` is not requested; then nothing
    is written.
    """
    rows, notes = convert.convert(source, request.columns, request.prompts_only)
    file_name, info = f"{target.parent.name}/{target.name}", read_info(data_dir)
    as_converted = request._replace(columns={})
    require_free(request.name, file_name, request.replace, info, Path(data_dir) / "dataset_info.json")
    sound_entry(rows, file_name, source, as_converted, info, data_dir)
    content = convert.as_json(rows)
    same = target.is_file() and target.read_bytes() == content
    if target.exists() and not same and not request.replace:
        raise UserError(f"{relative(target)}: is there with other rows; give another NAME, or REPLACE=1")
    if not same:
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(target, content)
    registered = register(target, as_converted, data_dir)
    return registered._replace(notes=registered.notes + notes)


# ------------------------------------------------------------------------------------------------ which file is meant


def find_file(file: str, data_dir: Path) -> Path:
    """`file`, or the one of that name in the repository where a user types data/... in another folder.

    Some shells leave the ~ of FILE=~/table.csv to programs.
    """
    file = os.path.expanduser(file)
    from_root = data_dir.parent / file
    return from_root if not os.path.exists(file) and os.path.exists(from_root) else Path(file)


def file_in_category(name: str, category: str, data_dir: Path) -> Path:
    """The one file of the dataset `name` in `category`. Raises UserError when there is none, or more than one."""
    if category not in CATEGORIES:
        raise UserError(f"unknown category {category!r}; the categories are {', '.join(CATEGORIES)}")
    found = files_named(name, [category], data_dir)
    if len(found) == 1:
        return found[0]
    holds = f"holds both {name}.json and" if found else f"holds neither {name}.json nor"
    raise UserError(f"{relative(data_dir / category)}: {holds} {name}_train.json; give the file itself")


def target_of(source: str, category: str | None, stem: str, data_dir: Path) -> Path:
    """The file that a source is converted to: `stem`.json in its category's folder.

    Raises UserError when no category is given and the source is in no category's folder.
    """
    inside = None
    if not source.startswith(convert.HUB):
        folder = Path(source).resolve().parent
        inside = folder.name if folder.parent == Path(data_dir).resolve() and folder.name in CATEGORIES else None
    category = category or inside
    if category is None:
        raise UserError(f"{source}: say which CATEGORY it is of: {', '.join(CATEGORIES)}")
    if category not in CATEGORIES:
        raise UserError(f"unknown category {category!r}; the categories are {', '.join(CATEGORIES)}")
    if not names.is_dataset_name(stem):
        raise UserError(f"{source}: {stem!r} {names.RULE}; give another NAME")
    return Path(data_dir) / category / f"{stem}.json"


def place_of(file: Path, data_dir: Path) -> str:
    """`file` as an entry names it, `<category>/<file>.json`. Raises UserError when it is elsewhere or missing."""
    if not os.path.isfile(file):
        raise UserError(f"{relative(file)}: there is no such file")
    lexical = os.path.relpath(os.path.abspath(file), os.path.abspath(data_dir))
    resolved = os.path.relpath(file.parent.resolve() / file.name, Path(data_dir).resolve())
    for file_name in (lexical, resolved):  # the second for a repository reached through a link
        if not place_fault(file_name):
            return file_name
    raise UserError(f"{relative(file)}: {place_fault(resolved)}")


# ----------------------------------------------------------------------------------------------------------- its entry


def sound_entry(
    rows: list[dict[str, Any]], file_name: str, label: str, request: Request, info: dict[str, Any], data_dir: Path
) -> dict[str, Any]:
    """The entry of a file that is to be registered.

    Args:
        rows: the file's.
        file_name: the file, relative to `data_dir`; it need not be there yet.
        label: the file as errors name it.
        request: what the user wants.
        info: the entries that are there by now.
        data_dir: the folder of dataset_info.json.

    Raises UserError with the first faults of the name, the columns and the rows.
    """
    if not names.is_dataset_name(request.name):
        raise UserError(f"{label}: {request.name!r} {names.RULE}; give another NAME")
    try:
        entry = {"file_name": file_name} | infer_entry(rows, request.columns, request.prompts_only)
    except UserError as error:
        raise UserError(f"{label}: {error}") from None
    old, marks = info.get(request.name), request.marks
    if isinstance(old, dict) and old.get("file_name") == file_name:
        marks = {key: old[key] for key in (HELD_OUT, ACCEPTED_ROWS) if key in old} | marks
    entry |= {key: value for key, value in marks.items() if value}
    faults = entry_faults(entry) or row_faults(rows, entry)
    faults += comparison.split_faults(request.name, Path(data_dir) / file_name, rows, info, data_dir)
    if faults:
        more = [f"{label}: {len(faults)} faults in all"] if len(faults) > SHOWN else []
        raise UserError("\n".join([f"{label}: {fault}" for fault in faults[:SHOWN]] + more))
    return entry


def store(name: str, entry: dict[str, Any], replace: bool, data_dir: Path) -> str:
    """Put `entry` under `name` into dataset_info.json; everything else in it stays as it is. Returns what was done.

    Keys of an old entry for the same file that are not set here (num_samples) are kept. An entry without descriptions
    gets those of data/descriptions.yaml. Raises UserError when `name` stands for another file and not `replace`.
    """
    return store_all({name: entry}, replace, data_dir)[name]


def store_all(entries: dict[str, dict[str, Any]], replace: bool, data_dir: Path) -> dict[str, str]:
    """The same for several entries by dataset name: all of them, or none. Returns what was done, by name."""
    path = Path(data_dir) / "dataset_info.json"
    with waiting_lock(files.beside(path, "lock")):
        content = path.read_bytes() if path.exists() else b"{}\n"
        info, text, outcomes = parse_info(content, path), content.decode(), {}
        for name, entry in entries.items():
            old_file = require_free(name, entry["file_name"], replace, info, path)
            old = info.get(name)
            if isinstance(old, dict) and old_file == entry["file_name"]:
                ours = {"formatting", "columns", "tags", PROMPTS_ONLY, HELD_OUT, ACCEPTED_ROWS, *FOREIGN_KEYS}
                entry = entry | {key: value for key, value in old.items() if key not in ours}
            if descriptions.KEY not in entry and (found := descriptions.prepared(name, data_dir)):
                entry = entry | {descriptions.KEY: found}
            if old == entry:
                outcomes[name] = "already registered, nothing to change"
                continue
            text = with_entry(text, name, entry)
            outcomes[name] = "registered anew" if name in info else "registered"
        if text != content.decode():
            files.write_atomically(path, text.encode())
    return outcomes


def describe(name: str, texts: list[str], source: str, data_dir: Path) -> tuple[int, int]:
    """Add descriptions to the entry of a registered dataset; everything else in dataset_info.json stays as it is.

    Args:
        name: the dataset's, as it is registered.
        texts: the descriptions; those that it has already are left out.
        source: where they come from.
        data_dir: the folder of dataset_info.json.

    Returns (how many were added, how many it has). Raises UserError, with nothing written, for texts that cannot be
    descriptions and for a dataset that is not registered.
    """
    path = Path(data_dir) / "dataset_info.json"
    with waiting_lock(files.beside(path, "lock")):
        old = entry_of(name, data_dir)
        entry, count = descriptions.added(old, texts, source)
        if count:
            files.write_atomically(path, with_entry(path.read_text(encoding="utf-8"), name, entry).encode())
        return count, len(descriptions.descriptions_of(entry))


def require_free(name: str, file_name: str, replace: bool, info: dict[str, Any], path: Path) -> str | None:
    """The file that `name` stands for by now. Raises UserError when that is another one and not `replace`."""
    old = info.get(name)
    old_file = old.get("file_name") if isinstance(old, dict) else None
    if name in info and old_file != file_name and not replace:
        way_out = "give another NAME, or REPLACE=1 to register this file in its place"
        raise UserError(f"{relative(path)}: {name!r} is already registered for {old_file!r}; {way_out}")
    return old_file


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock `path`, waiting up to LOCK_SECONDS for another registration to end. Raises UserError after that."""
    for _ in range(LOCK_SECONDS * 20):
        try:
            with locks.lock(path):
                yield
            return
        except locks.Busy:
            time.sleep(0.05)
    raise UserError(f"{relative(path)}: another registration holds it for {LOCK_SECONDS} s; try again when it is done")


def with_entry(text: str, name: str, entry: dict[str, Any]) -> str:
    """The text of a dataset_info.json with `entry` under `name`, in its old place or at the end; the rest unchanged."""
    value = json.dumps(entry, indent=2, ensure_ascii=False).replace("\n", "\n  ")
    decoder = json.JSONDecoder()

    def skip(position: int) -> int:
        gap = re.compile(r"[\s,:]+").match(text, position)
        return gap.end() if gap else position

    end = text.index("{") + 1
    comma = ""
    while text[start := skip(end)] != "}":
        key, end = decoder.raw_decode(text, start)
        start = skip(end)
        _, end = decoder.raw_decode(text, start)
        if key == name:
            return text[:start] + value + text[end:]
        comma = ","
    rest = text[end:] if comma else "\n" + text[end:].lstrip()
    return f"{text[:end]}{comma}\n  {json.dumps(name, ensure_ascii=False)}: {value}{rest}"
