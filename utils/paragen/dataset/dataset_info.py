"""The entries of data/dataset_info.json and the rows of the files that they name.

Keys and defaults are those of LLaMA-Factory (its data/parser.py and converter.py), with a few keys of our own.
"""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from paragen.common import files
from paragen.common.cli import UserError
from paragen.common.paths import CATEGORIES, DATA, relative
from paragen.dataset import descriptions, names, sources

# Our own keys in an entry; LLaMA-Factory ignores keys that it does not know.
PROMPTS_ONLY = "prompts_only"
HELD_OUT = "held_out"  # the number of last rows that are for scoring: no recipe trains on them
ACCEPTED_ROWS = "accepted_rows"  # the numbers of rows that may lack a text or an answer
FAMILY = "family"  # a text that datasets of one form or origin share: they are held out together (families.py)
METRIC = "metric"  # how answers to its rows are scored, where the responses alone do not tell: EXACT
EXACT = "exact"  # a generated answer is right where it is the response, without surrounding blanks
PROVENANCE = ("license", "source", "citation", "language")  # of own data, for publishing; texts
IMAGES = ("images", "image")
# What an entry may map, by its formatting, and the columns that are used for it when the user names none.
CANDIDATES = {
    "alpaca": {
        "prompt": ("prompt", "instruction", "question"),
        "query": ("query", "input"),
        "response": ("response", "output", "answer"),
        "system": ("system",),
        "history": ("history",),
        "images": IMAGES,
    },
    "sharegpt": {"messages": ("conversations", "messages"), "system": ("system",), "images": IMAGES},
}
DEFAULT_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}
DEFAULT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
REQUIRED_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")
# Keys that make LLaMA-Factory read something else than the entry's file, or train in another way.
FOREIGN_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "ranking", "split")
KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def read_info(data_dir: Path = DATA) -> dict[str, Any]:
    """The entries of `data_dir`/dataset_info.json by dataset name, in the file's order; empty without such a file.

    The file is read at each call, and parsed when it changed; callers share the entries and must not change them.
    Raises UserError when it cannot be read, is not JSON, not an object, or names a dataset twice.
    """
    path = Path(data_dir) / "dataset_info.json"
    try:
        content = files.read_up_to(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{relative(path)}: cannot be read: {error.strerror}") from None
    return dict(_parse_once(content, path))


@lru_cache(maxsize=2)
def _parse_once(content: bytes, path: Path) -> dict[str, Any]:
    return parse_info(content, path)


def parse_info(content: bytes, path: Path) -> dict[str, Any]:
    """The entries in the bytes of a dataset_info.json; `path` is the name in errors. Raises like `read_info`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is there twice")
        return dict(pairs)

    try:
        info = json.loads(content.decode(), object_pairs_hook=unique)
        check_characters(content.decode(), info)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{relative(path)}: broken JSON: {error}; correct it first") from None
    if not isinstance(info, dict):
        raise UserError(f"{relative(path)}: is {kind_of(info)}, not an object of dataset names; correct it first")
    return info


def entry_of(name: str, data_dir: Path = DATA) -> dict[str, Any]:
    """The entry of the dataset `name`. Raises UserError when there is none or LLaMA-Factory could not use it."""
    info, where = read_info(data_dir), relative(Path(data_dir) / "dataset_info.json")
    if name not in info:
        files = files_named(name, CATEGORIES, data_dir)
        found = [shlex.quote(relative(file)) for file in files]
        ways = [
            f"`make register FILE={file}`" for file in found or [relative(Path(data_dir) / "<category>/<file>.json")]
        ]
        way_out = " or ".join(ways if files or not is_prepared(name, data_dir) else [f"`make data DATASET={name}`"])
        known = ", ".join(info) or "none yet"
        raise UserError(f"dataset {name!r} is not registered in {where}: {way_out}; registered: {known}")
    for fault in entry_faults(info[name]):
        raise UserError(f"{where}: {name}: {fault}")
    return info[name]


def is_prepared(name: str, data_dir: Path) -> bool:
    """Whether `make data` can download the dataset `name`."""
    table = Path(data_dir) / "sources.yaml"
    return table.is_file() and any(entry["dataset"] == name for entry in sources.table(table)["files"].values())


def data_file(name: str, data_dir: Path = DATA) -> Path:
    """The file with the rows of the dataset `name`. Raises UserError when it is not registered or not there."""
    file = Path(data_dir) / entry_of(name, data_dir)["file_name"]
    if not os.path.isfile(file):
        raise UserError(f"{relative(file)}: dataset {name!r} has no such file; put it there or register another one")
    return file


def files_named(name: str, categories: Iterable[str], data_dir: Path) -> list[Path]:
    """The existing files in `categories` that the dataset `name` could have."""
    found = [Path(data_dir) / category / f"{stem}.json" for category in categories for stem in names.file_stems(name)]
    return [file for file in found if os.path.isfile(file)]


def require_trainable(name: str, entry: dict[str, Any]) -> None:
    """Raise UserError, saying why, when the dataset `name` with this `entry` has nothing to train on."""
    if entry.get(PROMPTS_ONLY):
        raise UserError(
            f"dataset {name!r} ({entry['file_name']}) cannot be trained on: it holds prompts only, and without "
            "responses there is no loss, LLaMA-Factory would drop every row; train on a split that has responses"
        )


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a data file. Raises UserError when it is not JSON, not a list of objects, or empty."""
    label = relative(path)
    if not os.path.isfile(path):
        raise UserError(f"{label}: no such file")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{label}: broken JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{label}: cannot be read: {error.strerror}") from None
    if not isinstance(rows, list):
        raise UserError(f"{label}: is {kind_of(rows)}, not a list of rows")
    if not rows:
        raise UserError(f"{label}: is an empty list: there are no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{label}: row {number}: is {kind_of(row)}, not an object")
    return rows


def check_characters(text: str, value: Any) -> None:
    """Raise ValueError where a JSON text has half a surrogate pair, which cannot be written to a file again.

    Args:
        text: the JSON; only one with escapes such as `\\ud83d` can have one.
        value: what was read from it.
    """
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"it has {half} alone, half of a character") from None


def columns_of(entry: dict[str, Any]) -> dict[str, str]:
    """Which column holds what, e.g. {"prompt": "question"}, with LLaMA-Factory's defaults filled in."""
    columns = entry.get("columns", DEFAULT_COLUMNS[formatting_of(entry)])
    return {kind: column for kind, column in columns.items() if column}


def tags_of(entry: dict[str, Any]) -> dict[str, str]:
    """The tags of ShareGPT messages. LLaMA-Factory has no default for a single tag: either all are given or none."""
    return entry.get("tags", DEFAULT_TAGS)


def formatting_of(entry: dict[str, Any]) -> str:
    """`alpaca` or `sharegpt`."""
    return entry.get("formatting", "alpaca")


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return KINDS.get(type(value), "null")


def is_outside(path: str) -> bool:
    """Whether a path relative to data/ leaves it."""
    return path.startswith("/") or ".." in PurePosixPath(path).parts


def place_fault(file_name: str) -> str | None:
    """What is wrong with the place of a data file, given its path relative to data/; None for a right place."""
    parts = PurePosixPath(file_name).parts
    if is_outside(file_name):
        return "lies outside data/: put it into data/<category>/"
    if len(parts) > 1 and parts[0] not in CATEGORIES:
        return f"unknown category {parts[0]!r}; the categories are {', '.join(CATEGORIES)}"
    if len(parts) != 2:
        return f"does not lie right in data/<category>/; the categories are {', '.join(CATEGORIES)}"
    return None if file_name.endswith(".json") else "is not a .json file"


def entry_faults(entry: Any) -> list[str]:
    """What is wrong with an entry alone: what LLaMA-Factory could not use, or would use in a way not meant here."""
    if not isinstance(entry, dict):
        return [f"the entry is {kind_of(entry)}, not an object"]
    if not isinstance(entry.get("file_name"), str):
        return ["the entry has no file_name"]
    formatting = formatting_of(entry)
    if not isinstance(formatting, str) or formatting not in CANDIDATES:
        return [f"formatting {formatting!r} is not known here; known: {', '.join(CANDIDATES)}"]
    for key in ("columns", "tags"):
        pairs = entry.get(key, {})
        if not isinstance(pairs, dict) or not all(isinstance(value, str) for value in pairs.values()):
            return [f"{key} is not an object of names"]
    faults = [f"{entry['file_name']}: lies outside data/"] if is_outside(entry["file_name"]) else []
    faults += [f"key {key!r} has no place in an entry here" for key in FOREIGN_KEYS if key in entry]
    faults += mark_faults(entry)
    columns, tags = columns_of(entry), tags_of(entry)
    known = CANDIDATES[formatting]
    strange = [kind for kind in columns if kind not in known]
    faults += [f"{formatting} rows have no {kind!r} to map; known: {', '.join(known)}" for kind in strange]
    twice = [column for column, count in Counter(columns.values()).items() if count > 1]
    faults += [f"the column {column!r} is mapped twice" for column in twice]
    if formatting == "sharegpt":
        faults += [] if "messages" in columns else ["no column is mapped as messages"]
        lacking = [tag for tag in REQUIRED_TAGS if not tags.get(tag)]
        faults += [f"tags lack {tag}, for which LLaMA-Factory then has no default" for tag in lacking]
    elif not columns.keys() & {"prompt", "query"}:
        faults.append("no column is mapped as prompt")
    elif ("response" in columns) == bool(entry.get(PROMPTS_ONLY)):
        given = "a response column and prompts_only" if "response" in columns else "no response column"
        faults.append(f"the entry has {given}; register the file again, with PROMPTS_ONLY=1 if it has prompts only")
    return faults


def without_marks(entry: dict[str, Any]) -> dict[str, Any]:
    """The keys of an entry that decide how its rows are trained on."""
    marks = (HELD_OUT, ACCEPTED_ROWS, FAMILY, METRIC, descriptions.KEY, *PROVENANCE)
    return {key: value for key, value in entry.items() if key not in marks}


def mark_faults(entry: dict[str, Any]) -> list[str]:
    """What is wrong with our own keys of an entry, without regard to its rows."""
    held_out, accepted = entry.get(HELD_OUT, 0), entry.get(ACCEPTED_ROWS, [])
    faults = [] if type(held_out) is int and held_out >= 0 else [f"{HELD_OUT} {held_out!r} is not a number of rows"]
    if not isinstance(accepted, list) or not all(type(number) is int and number > 0 for number in accepted):
        faults.append(f"{ACCEPTED_ROWS} is not a list of row numbers")
    if entry.get(METRIC, EXACT) != EXACT:
        faults.append(f"{METRIC} is {entry[METRIC]!r}; it can be {EXACT!r}, and without it the responses decide")
    if fault := descriptions.fault_of(entry.get(descriptions.KEY, [])):
        faults.append(fault)
    return faults + [f"{key} is not a text" for key in (FAMILY, *PROVENANCE) if not isinstance(entry.get(key, ""), str)]


def columns_in(rows: list[dict[str, Any]]) -> dict[str, int]:
    """All columns of the rows in order of appearance, each with the number of the first row that has it."""
    found: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if row.keys() - found.keys():
            found.update({column: number for column in row if column not in found})
    return found


def pictures_of(row: dict[str, Any], column: str) -> list[Any]:
    """The pictures of a row, whether its column holds none, one or a list."""
    value = row.get(column)
    return value if isinstance(value, list) else [] if value is None else [value]


def is_blank(value: Any) -> bool:
    """Whether a value is null or text without a visible character."""
    return value is None or (isinstance(value, str) and not value.strip())


def is_unicode(text: str) -> bool:
    """Whether `text` can be encoded: JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
