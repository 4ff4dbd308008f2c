"""Registers a data file in data/dataset_info.json after a look at every row, or checks all that is registered there.

    python utils/register_dataset.py data/math/GSM8K_train.json [--columns prompt=question response=answer]
    python utils/register_dataset.py table.csv --category math    (.jsonl, .parquet, hub:<repo>[:config[:split]] too)
    python utils/register_dataset.py --check

Reads data/<category>/<file>.json and data/dataset_info.json; writes the one entry of the latter, or nothing at all. Of
another kind of file it first writes data/<category>/<name>.json, with the columns that are read (convert_dataset.py).
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paragen.common import files
from paragen.common.cli import UserError, complain, say
from paragen.common.paths import CATEGORIES, loose, relative
from paragen.dataset import convert
from paragen.dataset.dataset_info import (
    ACCEPTED_ROWS,
    FOREIGN_KEYS,
    HELD_OUT,
    PROMPTS_ONLY,
    columns_in,
    columns_of,
    entry_faults,
    files_named,
    infer_entry,
    load_rows,
    parse_info,
    pictures_of,
    place_fault,
    read_info,
    row_faults,
)

SHOWN = 5  # faulty rows that a refusal names; --check names all
LOCK_SECONDS = 30
SPLIT = re.compile(r"_(train|test|validation|valid|val|dev|eval)$")
NAME = re.compile(r"\w[\w.+-]*(?: [\w.+-]+)*")  # folders bear it, and LLaMA-Factory splits a recipe's names at commas
NAME_RULE = "is no dataset name: letters, digits, . + - _ and single blanks"


def found(file: str, data_dir: Path) -> Path:
    """`file`, or the one that it is from the repository: data/..., typed in another folder."""
    from_root = data_dir.parent / file
    return from_root if not os.path.exists(file) and os.path.exists(from_root) else Path(file)


def target_of(source: str, category: str | None, stem: str, data_dir: Path) -> Path:
    """Where what is made of `source` goes: into its category's folder. Raises UserError when that is not said."""
    inside = None
    if not source.startswith(convert.HUB):
        folder = Path(source).resolve().parent
        inside = folder.name if folder.parent == Path(data_dir).resolve() and folder.name in CATEGORIES else None
    category = category or inside
    if category is None:
        raise UserError(f"{source}: say which CATEGORY= (--category) it is of: {', '.join(CATEGORIES)}")
    if category not in CATEGORIES:
        raise UserError(f"unknown category {category!r}; the categories are {', '.join(CATEGORIES)}")
    if not NAME.fullmatch(stem):
        raise UserError(f"{source}: {stem!r} {NAME_RULE}; give another --name")
    return Path(data_dir) / category / f"{stem}.json"


def register_converted(
    source: str,
    target: Path,
    name: str,
    named: dict[str, str],
    prompts_only: bool,
    replace: bool,
    data_dir: Path,
    marks: dict[str, Any],
) -> None:
    """Write the rows of `source` to `target` as LLaMA-Factory reads them, and register that. Arguments of `register`.

    Raises UserError when something is wrong with them, or when other rows are there and `replace` is not given; then
    nothing is written.
    """
    rows, notes = convert.convert(source, named, prompts_only)
    file_name, info = f"{target.parent.name}/{target.name}", read_info(data_dir)
    require_free(name, file_name, replace, info, Path(data_dir) / "dataset_info.json")
    sound_entry(rows, file_name, source, name, {}, prompts_only, marks, info, data_dir)
    content = convert.as_json(rows)
    same = target.is_file() and target.read_bytes() == content
    if target.exists() and not same and not replace:
        raise UserError(f"{relative(target)}: is there with other rows; give another --name, or --replace")
    if not same:
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(target, content)
    register(target, name, {}, prompts_only, replace, data_dir, marks)
    for note in notes:
        say(f"note: {note}")


def named_columns(pairs: list[str]) -> dict[str, str]:
    """["prompt=question"] as {"prompt": "question"}; a column's name may hold blanks. Raises UserError for no pair."""
    pairs = re.split(r"\s+(?=\w+=)", " ".join(pairs).strip()) if pairs else []
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--columns {pair}: say it as kind=column, e.g. prompt=question")
    return dict(pair.split("=", 1) for pair in pairs)


def file_of(name: str, category: str, data_dir: Path) -> Path:
    """The one file of the dataset `name` in `category`. Raises UserError when there is none or a choice."""
    if category not in CATEGORIES:
        raise UserError(f"unknown category {category!r}; the categories are {', '.join(CATEGORIES)}")
    found = files_named(name, [category], data_dir)
    if len(found) == 1:
        return found[0]
    holds = f"holds both {name}.json and" if found else f"holds neither {name}.json nor"
    raise UserError(f"{relative(data_dir / category)}: {holds} {name}_train.json; give the file itself")


def register(
    file: Path,
    name: str,
    named: dict[str, str],
    prompts_only: bool,
    replace: bool,
    data_dir: Path,
    marks: dict[str, Any] | None = None,
) -> None:
    """Write the entry `name` for `file` into the dataset_info.json of `data_dir` when every row of it is sound.

    `named`: columns that the user names, e.g. {"prompt": "question"}. `replace`: `name` may stand for another file.
    `marks`: held_out and accepted_rows; those that the entry has already stay where `marks` does not name them.
    Raises UserError for the first of all things that are wrong; then nothing is written.
    """
    file_name, label = place_of(file, data_dir), relative(file)
    file = Path(data_dir) / file_name
    rows = load_rows(file)
    info = read_info(data_dir)
    entry = sound_entry(rows, file_name, label, name, named, prompts_only, marks or {}, info, data_dir)
    outcome = store(name, entry, replace, data_dir)
    say(f"{name}: {outcome}: {label}, {len(rows)} rows{', prompts only: not for training' if prompts_only else ''}")
    say(f"columns: {', '.join(f'{kind}={column}' for kind, column in columns_of(entry).items())}")
    for note in notes_on(name, file, rows, entry, info, data_dir):
        say(f"note: {note}")


def sound_entry(
    rows: list[dict],
    file_name: str,
    label: str,
    name: str,
    named: dict[str, str],
    prompts_only: bool,
    marks: dict[str, Any],
    info: dict[str, Any],
    data_dir: Path,
) -> dict[str, Any]:
    """The entry `name` for these rows of data/`file_name`, which messages call `label`. Raises UserError like
    `register`, which says what the other arguments are."""
    if not NAME.fullmatch(name):
        raise UserError(f"{label}: {name!r} {NAME_RULE}; give another --name")
    try:
        entry = {"file_name": file_name} | infer_entry(rows, named, prompts_only)
    except UserError as error:
        raise UserError(f"{label}: {error}") from None
    old = info.get(name)
    if isinstance(old, dict) and old.get("file_name") == file_name:
        marks = {key: old[key] for key in (HELD_OUT, ACCEPTED_ROWS) if key in old} | marks
    entry |= {key: value for key, value in marks.items() if value}
    faults = entry_faults(entry) or row_faults(rows, entry)
    faults += split_faults(name, Path(data_dir) / file_name, rows, info, data_dir)
    if faults:
        more = [f"{label}: {len(faults)} faults in all"] if len(faults) > SHOWN else []
        raise UserError("\n".join([f"{label}: {fault}" for fault in faults[:SHOWN]] + more))
    return entry


def place_of(file: Path, data_dir: Path) -> str:
    """`file` as an entry names it, `<category>/<file>.json`. Raises UserError when it lies elsewhere or nowhere."""
    if not os.path.isfile(file):
        raise UserError(f"{relative(file)}: there is no such file")
    lexical = os.path.relpath(os.path.abspath(file), os.path.abspath(data_dir))
    resolved = os.path.relpath(file.parent.resolve() / file.name, Path(data_dir).resolve())
    for file_name in (lexical, resolved):  # the second for a repository reached through a link
        if not place_fault(file_name):
            return file_name
    raise UserError(f"{relative(file)}: {place_fault(resolved)}")


def store(name: str, entry: dict[str, Any], replace: bool, data_dir: Path) -> str:
    """Put `entry` under `name` into dataset_info.json; all else in it stays as it is. Returns what was done, in a word.

    Keys of an entry for the same file that are not ours (num_samples) are kept.
    Raises UserError when `name` stands for another file and `replace` is not given.
    """
    path = Path(data_dir) / "dataset_info.json"
    with waiting_lock(files.beside(path, "lock")):
        content = path.read_bytes() if path.exists() else b"{}\n"
        info = parse_info(content, path)
        old_file = require_free(name, entry["file_name"], replace, info, path)
        old = info.get(name)
        if old_file == entry["file_name"]:
            ours = {"formatting", "columns", "tags", PROMPTS_ONLY, HELD_OUT, ACCEPTED_ROWS, *FOREIGN_KEYS}
            entry = entry | {key: value for key, value in old.items() if key not in ours}
        if old == entry:
            return "already registered, nothing to change"
        files.write_atomically(path, with_entry(content.decode(), name, entry).encode())
        return "registered anew" if name in info else "registered"


def require_free(name: str, file_name: str, replace: bool, info: dict[str, Any], path: Path) -> str | None:
    """The file that `name` stands for by now. Raises UserError when that is another one and `replace` is not given."""
    old = info.get(name)
    old_file = old.get("file_name") if isinstance(old, dict) else None
    if name in info and old_file != file_name and not replace:
        way_out = "give another --name, or --replace to register this file in its place"
        raise UserError(f"{relative(path)}: {name!r} is already registered for {old_file!r}; {way_out}")
    return old_file


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock `path`, waiting for another registration to end. Raises UserError when it does not."""
    for _ in range(LOCK_SECONDS * 20):
        try:
            with files.lock(path):
                yield
            return
        except files.Busy:
            time.sleep(0.05)
    raise UserError(f"{relative(path)}: another registration holds it for {LOCK_SECONDS} s; try again when it is done")


def with_entry(text: str, name: str, entry: dict[str, Any]) -> str:
    """`text`, a whole dataset_info.json, with `entry` under `name`, in its old place or at the end; else unchanged."""
    value = json.dumps(entry, indent=2, ensure_ascii=False).replace("\n", "\n  ")
    decoder, skip = json.JSONDecoder(), re.compile(r"[\s,:]*").match
    end = text.index("{") + 1
    comma = ""
    while text[start := skip(text, end).end()] != "}":
        key, end = decoder.raw_decode(text, start)
        start = skip(text, end).end()
        _, end = decoder.raw_decode(text, start)
        if key == name:
            return text[:start] + value + text[end:]
        comma = ","
    rest = text[end:] if comma else "\n" + text[end:].lstrip()
    return f"{text[:end]}{comma}\n  {json.dumps(name, ensure_ascii=False)}: {value}{rest}"


def registered_files(info: dict[str, Any], data_dir: Path) -> dict[str, Path]:
    """The files of the entries, by dataset name, as far as they are there."""
    named = {name: entry.get("file_name") for name, entry in info.items() if isinstance(entry, dict)}
    paths = {name: Path(data_dir) / file_name for name, file_name in named.items() if isinstance(file_name, str)}
    return {name: path for name, path in paths.items() if os.path.isfile(path)}


def is_test(name: str, file: Path) -> bool:
    """Whether a dataset or its file is called a test, validation or other split that is not for training."""
    return any(split and split[1] != "train" for split in map(SPLIT.search, (name, file.stem)))


def split_faults(name: str, file: Path, rows: list[dict], info: dict[str, Any], data_dir: Path) -> list[str]:
    """The test split of this train split, or the train split of this test split, when it has the same rows."""
    splits = {path: path.stem for path in sorted(file.parent.glob("*.json"))}
    splits |= {path: other for other, path in registered_files(info, data_dir).items() if other != name}
    return [
        f"has the same rows as {path.name}: a test split must differ from its train split"
        for path, other in splits.items()
        if families(other, path) & families(name, file)
        and is_test(other, path) != is_test(name, file)
        and same_rows(rows, path)
    ]


def families(name: str, file: Path) -> set[str]:
    """The names without _train, _test and the like that a dataset goes by."""
    return {SPLIT.sub("", name), SPLIT.sub("", file.stem)}


def same_rows(rows: list[dict], path: Path) -> bool:
    """Whether the file `path` holds just these rows, in any order."""
    try:
        others = load_rows(path)
    except UserError:
        return False
    return len(rows) == len(others) and sorted(map(as_text, rows)) == sorted(map(as_text, others))


def as_text(value: Any) -> str:
    """A JSON value as text, the same for any order of its keys."""
    return json.dumps(value, sort_keys=True)


def notes_on(name: str, file: Path, rows: list[dict], entry: dict, info: dict[str, Any], data_dir: Path) -> list[str]:
    """What is no fault but may be a slip, in the dataset itself and beside the other ones in `info`."""
    notes = []
    columns = columns_of(entry)
    repeats = repeated_rows(rows, list(columns.values()))
    if repeats:
        shown = ", ".join(f"row {number} repeats row {first}" for number, first in repeats[:3])
        notes.append(f"duplicate rows ({len(repeats)}): {shown}{', ...' if len(repeats) > 3 else ''}")
    unused = [column for column in columns_in(rows) if column not in columns.values()]
    if unused:
        notes.append(f"columns that nothing reads: {', '.join(map(repr, unused))}")
    if "images" in columns:
        pictures = dict.fromkeys(picture for row in rows for picture in pictures_of(row, columns["images"]))
        missing = [picture for picture in pictures if not os.path.isfile(Path(data_dir) / picture)]
        if missing:
            notes.append(f"{len(missing)} of {len(pictures)} pictures are not in data/; the first: {missing[0]!r:.80}")
    named, filed = SPLIT.search(name), SPLIT.search(file.stem)
    if named and filed and named[1] != filed[1]:
        notes.append(f"the name says {named[1]}, the file {file.name} says {filed[1]}")
    notes += [f"its name is almost that of {other}" for other in info if other != name and loose(other) == loose(name)]
    for other, path in registered_files(info, data_dir).items():
        same_size = other != name and path.stat().st_size == file.stat().st_size
        if same_size and files.sha256_of(path) == files.sha256_of(file):
            notes.append(f"its file is the same as that of {other} ({path.name})")
    return notes


def repeated_rows(rows: list[dict], columns: list[str]) -> list[tuple[int, int]]:
    """(row, the earlier row that it repeats) for all rows that repeat one in these columns."""
    seen: dict[str, int] = {}
    read = (as_text([row[column] for column in columns]) for row in rows)
    firsts = [seen.setdefault(text, number) for number, text in enumerate(read, 1)]
    return [(number, first) for number, first in enumerate(firsts, 1) if number != first]


def check(data_dir: Path) -> int:
    """List all that is wrong in dataset_info.json and the files it names, one fault a line; 0 when nothing is.

    Raises UserError with the counts when something is.
    """
    info, where = read_info(data_dir), relative(data_dir / "dataset_info.json")
    if not info:
        raise UserError(f"{where}: there is nothing registered; `make register FILE=data/<category>/<file>.json`")
    fault_count = faulty = 0
    earlier: dict[str, Any] = {}
    for name, entry in info.items():
        faults, notes = check_entry(name, entry, info, earlier, data_dir)
        for fault in faults:
            complain(f"{name}: {fault}")
        for note in notes:
            say(f"note: {name}: {note}")
        fault_count += len(faults)
        faulty += bool(faults)
        earlier[name] = entry
    if fault_count:
        way_out = "put the files right, or register them anew with `make register FILE=data/<category>/<file>.json`"
        raise UserError(f"{where}: faults: {fault_count}, in {faulty} of {len(info)} datasets; {way_out}")
    say(f"{where}: {len(info)} datasets, no faults")
    return 0


def check_entry(name: str, entry: Any, info: dict, earlier: dict, data_dir: Path) -> tuple[list[str], list[str]]:
    """The faults of one entry, and the notes on it beside the `earlier` ones, so that a pair is noted once."""
    faults = [] if NAME.fullmatch(name) else [f"{name!r} {NAME_RULE}"]
    unsound = entry_faults(entry)
    if unsound:
        return faults + unsound, []
    file = data_dir / entry["file_name"]
    place = place_fault(entry["file_name"])
    faults += [f"{relative(file)}: {place}"] if place else []
    try:
        rows = load_rows(file)
    except UserError as error:
        return [*faults, str(error)], []
    found = row_faults(rows, entry)
    if is_test(name, file):
        found += split_faults(name, file, rows, info, data_dir)
    notes = [] if found else notes_on(name, file, rows, entry, earlier, data_dir)
    return faults + [f"{relative(file)}: {fault}" for fault in found], notes
