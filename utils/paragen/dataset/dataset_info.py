"""What data/dataset_info.json says of a dataset, what its rows hold, and what is wrong with either.

Imported by register_dataset.py and by all that trains on a dataset. Keys, defaults and rules are those of
LLaMA-Factory (its data/parser.py, converter.py, mm_plugin.py): rows without a fault here are all trained on there.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from paragen.common.cli import UserError
from paragen.common.paths import CATEGORIES, DATA, relative
from paragen.dataset import sources

# Our marks in an entry; LLaMA-Factory ignores keys that it does not know.
PROMPTS_ONLY = "prompts_only"
HELD_OUT = "held_out"  # the last so many rows are for scoring: no recipe trains on them
ACCEPTED_ROWS = "accepted_rows"  # rows with a gap (no text, no answer) that stay as they are, by number
PROVENANCE = ("license", "source", "citation", "language")  # of own data, for publishing; texts
IMAGES = ("images", "image")
# What an entry may map, by its formatting, and the columns that are taken for it when the user names none.
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
# Keys with which LLaMA-Factory reads something else than the entry's file, or trains in another way.
FOREIGN_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "ranking", "split")
KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def read_info(data_dir: Path = DATA) -> dict[str, Any]:
    """The entries of `data_dir`/dataset_info.json by dataset name, in the file's order; none where there is no file.

    Raises UserError when it is not JSON, not an object, or names a dataset twice.
    """
    path = Path(data_dir) / "dataset_info.json"
    return parse_info(path.read_bytes(), path) if path.exists() else {}


def parse_info(content: bytes, path: Path) -> dict[str, Any]:
    """The entries in `content`, the bytes of the file `path` that error messages name. Raises like `read_info`."""

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} stands there twice")
        return dict(pairs)

    try:
        info = json.loads(content.decode(), object_pairs_hook=without_twins)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{relative(path)}: broken JSON: {error}; put it right first") from None
    if not isinstance(info, dict):
        raise UserError(f"{relative(path)}: is {kind_of(info)}, not an object of dataset names; put it right first")
    return info


def entry_of(name: str, data_dir: Path = DATA) -> dict[str, Any]:
    """The entry of the dataset `name`. Raises UserError when there is none or LLaMA-Factory could not use it."""
    info, where = read_info(data_dir), relative(Path(data_dir) / "dataset_info.json")
    if name not in info:
        files = files_named(name, CATEGORIES, data_dir)
        ways = [
            f"`make register FILE={relative(file)}`" for file in files or [Path(data_dir) / "<category>/<file>.json"]
        ]
        way_out = " or ".join(ways if files or not is_prepared(name, data_dir) else [f"`make data DATASET={name}`"])
        known = ", ".join(info) or "none yet"
        raise UserError(f"dataset {name!r} is not registered in {where}: {way_out}; registered: {known}")
    for fault in entry_faults(info[name]):
        raise UserError(f"{where}: {name}: {fault}")
    return info[name]


def is_prepared(name: str, data_dir: Path) -> bool:
    """Whether `make data` can bring the dataset `name`."""
    table = Path(data_dir) / "sources.yaml"
    return table.is_file() and any(entry["dataset"] == name for entry in sources.table(table)["files"].values())


def data_file(name: str, data_dir: Path = DATA) -> Path:
    """The file with the rows of the dataset `name`. Raises UserError when it is not registered or not there."""
    file = Path(data_dir) / entry_of(name, data_dir)["file_name"]
    if not os.path.isfile(file):
        raise UserError(f"{relative(file)}: dataset {name!r} has no such file; put it there or register another one")
    return file


def files_named(name: str, categories: Iterable[str], data_dir: Path) -> list[Path]:
    """The files that the dataset `name` would have in `categories` and that are there."""
    files = [Path(data_dir) / category / f"{name}{end}.json" for category in categories for end in ("", "_train")]
    return [file for file in files if os.path.isfile(file)]


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
    if not isinstance(rows, list):
        raise UserError(f"{label}: is {kind_of(rows)}, not a list of rows")
    if not rows:
        raise UserError(f"{label}: is an empty list: there are no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{label}: row {number}: is {kind_of(row)}, not an object")
    return rows


def columns_of(entry: dict[str, Any]) -> dict[str, str]:
    """What is read from which column, e.g. {"prompt": "question"}, LLaMA-Factory's defaults filled in as it does."""
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
    """Whether a path that is meant relative to data/ leaves it."""
    return path.startswith("/") or ".." in PurePosixPath(path).parts


def place_fault(file_name: str) -> str | None:
    """What is wrong with where a data file lies, given its path relative to data/; None when it lies right."""
    parts = PurePosixPath(file_name).parts
    if is_outside(file_name):
        return "lies outside data/: put it into data/<category>/"
    if len(parts) > 1 and parts[0] not in CATEGORIES:
        return f"unknown category {parts[0]!r}; the categories are {', '.join(CATEGORIES)}"
    if len(parts) != 2:
        return f"does not lie right in data/<category>/; the categories are {', '.join(CATEGORIES)}"
    return None if file_name.endswith(".json") else "is not a .json file"


def entry_faults(entry: Any) -> list[str]:
    """What is wrong with an entry by itself: what LLaMA-Factory could not use, or would use in a way not meant here."""
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
        faults.append(f"the entry has {given}; register the file again, with --prompts-only if it has prompts only")
    return faults


def without_marks(entry: dict[str, Any]) -> dict[str, Any]:
    """What of an entry decides how its rows are trained on."""
    return {key: value for key, value in entry.items() if key not in (HELD_OUT, ACCEPTED_ROWS, *PROVENANCE)}


def mark_faults(entry: dict[str, Any]) -> list[str]:
    """What is wrong with an entry's marks by themselves."""
    held_out, accepted = entry.get(HELD_OUT, 0), entry.get(ACCEPTED_ROWS, [])
    faults = [] if type(held_out) is int and held_out >= 0 else [f"{HELD_OUT} {held_out!r} is not a number of rows"]
    if not isinstance(accepted, list) or not all(type(number) is int and number > 0 for number in accepted):
        faults.append(f"{ACCEPTED_ROWS} is not a list of row numbers")
    return faults + [f"{key} is not a text" for key in PROVENANCE if not isinstance(entry.get(key, ""), str)]


def infer_entry(rows: list[dict[str, Any]], named: dict[str, str], prompts_only: bool) -> dict[str, Any]:
    """The entry, but for its file_name, that rows like these want.

    `named` is what the user says of the columns, e.g. {"prompt": "question"}; an empty name says that there is none.
    Raises UserError, naming the --columns to give, where the names of the columns leave more than one reading.
    """
    present = columns_in(rows)
    formatting = infer_formatting(present, named)
    columns = infer_columns(present, named, formatting)
    mark = {PROMPTS_ONLY: True} if prompts_only else {}
    if formatting == "sharegpt":
        tags = infer_tags(rows, columns["messages"])
        return {"formatting": formatting, "columns": columns} | ({} if tags == DEFAULT_TAGS else {"tags": tags}) | mark
    names = ", ".join(map(repr, present))
    if "prompt" not in columns:
        raise UserError(f"no column is plainly the prompt; there are {names}; say --columns prompt=<column>")
    response = columns.get("response")
    has_responses = not all(is_blank(row.get(response)) for row in rows)
    if has_responses and prompts_only:
        raise UserError(f"the column {response!r} holds responses; register the file without --prompts-only")
    if not has_responses and not prompts_only:
        way_out = "say --columns response=<column>, or --prompts-only when there are prompts only"
        raise UserError(f"the rows have no response; there are {names}; {way_out}")
    if prompts_only:
        columns.pop("response", None)
    return {"columns": columns} | mark


def infer_columns(present: dict[str, int], named: dict[str, str], formatting: str) -> dict[str, str]:
    """What to read from which of the columns `present`: as `named`, else by their usual names. Raises UserError."""
    names, known = ", ".join(map(repr, present)), CANDIDATES[formatting]
    for column, number in present.items():
        if not is_unicode(column):
            raise UserError(f"row {number}: the name of the column {column!r} is not Unicode text")
    for kind, column in named.items():
        if kind not in known:
            raise UserError(f"--columns {kind}=: {formatting} rows have no {kind!r} to map; known: {', '.join(known)}")
        if column and column not in present:
            raise UserError(f"--columns {kind}={column}: no row has the column {column!r}; there are {names}")
    columns = {}
    for kind, candidates in known.items():
        free = [column for column in candidates if column in present and column not in named.values()]
        found = [named[kind]] if kind in named else free
        if len(found) > 1:
            raise UserError(f"the {kind} can be {' or '.join(map(repr, found))}; say --columns {kind}=<one of them>")
        if found and found[0]:
            columns[kind] = found[0]
    return columns


def infer_formatting(present: Iterable[str], named: dict[str, str]) -> str:
    """`sharegpt` for rows with messages, else `alpaca`. Raises UserError when the columns speak for both."""
    messages = [column for column in CANDIDATES["sharegpt"]["messages"] if column in present]
    prompts = [column for column in CANDIDATES["alpaca"]["prompt"] if column in present]
    if "messages" in named or named.get("prompt"):
        return "sharegpt" if named.get("messages") else "alpaca"
    if messages and prompts:
        choice = f"--columns messages={messages[0]} or --columns prompt={prompts[0]}"
        raise UserError(f"there are both messages ({messages[0]!r}) and a prompt ({prompts[0]!r}); say {choice}")
    return "sharegpt" if messages else "alpaca"


def infer_tags(rows: list[dict[str, Any]], column: str) -> dict[str, str]:
    """The tags of the messages in `column`: keys from/value or role/content, roles human/gpt or user/assistant."""
    lists = [row[column] for row in rows if isinstance(row.get(column), list)]
    messages = [message for messages in lists for message in messages if isinstance(message, dict)]
    keys = {key for message in messages for key in message}
    tags = dict(DEFAULT_TAGS)
    if "role" in keys and "from" not in keys:
        tags |= {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    roles = {role for message in messages if isinstance(role := message.get(tags["role_tag"]), str)}
    for tag, spellings in (("user_tag", ("human", "user")), ("assistant_tag", ("gpt", "assistant"))):
        tags[tag] = next((spelling for spelling in spellings if spelling in roles), tags[tag])
    return tags


def columns_in(rows: list[dict[str, Any]]) -> dict[str, int]:
    """All columns of the rows in order of appearance, each with the number of the first row that has it."""
    found: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if row.keys() - found.keys():
            found.update({column: number for column in row if column not in found})
    return found


def row_faults(rows: list[dict[str, Any]], entry: dict[str, Any]) -> list[str]:
    """What is wrong with the rows of a sound `entry`: `row 17: ...`, one line for each faulty row."""
    columns, tags, present = columns_of(entry), tags_of(entry), columns_in(rows)
    names = ", ".join(map(repr, present))
    unmapped = [(kind, column) for kind, column in columns.items() if column not in present]
    if unmapped:
        return [f"{kind} is mapped to {column!r}, which no row has; there are {names}" for kind, column in unmapped]
    kinds: dict[str, tuple[str, int]] = {}
    accepted, faults = set(entry.get(ACCEPTED_ROWS, ())), mark_faults_in(rows, entry)
    for number, row in enumerate(rows, 1):
        missing = [column for column in present if column not in row] if len(row) < len(present) else []
        if missing:
            cause = f"lacks the column {missing[0]!r}, which others have (row {present[missing[0]]})"
        elif "messages" in columns:
            cause = messages_fault(row[columns["messages"]], tags)
        else:
            cause = alpaca_fault(row, columns)
        if not cause:
            gap = gap_in(row, columns, tags, bool(entry.get(PROMPTS_ONLY)))
            unfounded = f"stands among the {ACCEPTED_ROWS}, but nothing is wrong with it"
            cause = gap if number not in accepted else None if gap else unfounded
        cause = cause or text_fault(row, columns, ("system",)) or picture_fault(row, columns)
        if cause := cause or kind_fault(row, number, kinds):
            faults.append(f"row {number}: {cause}")
    return faults


def mark_faults_in(rows: list[dict[str, Any]], entry: dict[str, Any]) -> list[str]:
    """What of an entry's marks does not fit its rows."""
    count, held_out = len(rows), entry.get(HELD_OUT, 0)
    faults = [f"{HELD_OUT} is {held_out}, which leaves none of {count} rows to train on"] if held_out >= count else []
    return faults + [f"{ACCEPTED_ROWS}: no row {number}" for number in entry.get(ACCEPTED_ROWS, ()) if number > count]


def gaps(rows: list[dict[str, Any]], entry: dict[str, Any]) -> dict[int, str]:
    """The rows, by number, with which nothing is wrong but that a text or an answer is missing, and what is missing.

    LLaMA-Factory loads such rows: it learns an empty answer as one, and drops a conversation out of turn.
    """
    columns, tags, found = columns_of(entry), tags_of(entry), {}
    for number, row in enumerate(rows, 1):
        if "messages" in columns:
            fault = messages_fault(row.get(columns["messages"]), tags)
        else:
            fault = alpaca_fault(row, columns)
        gap = None if fault else gap_in(row, columns, tags, bool(entry.get(PROMPTS_ONLY)))
        if gap:
            found[number] = gap
    return found


def gap_in(row: dict[str, Any], columns: dict[str, str], tags: dict[str, str], prompts_only: bool) -> str | None:
    """What a row of the right shape lacks: a prompt, a response, the right order of turns."""
    if "messages" in columns:
        return messages_gap(row[columns["messages"]], tags, prompts_only)
    if is_blank(row.get(columns.get("prompt"))) and is_blank(row.get(columns.get("query"))):
        return f"empty prompt (column {columns.get('prompt') or columns['query']!r})"
    if "response" in columns and is_blank(row.get(columns["response"])):
        return f"empty response (column {columns['response']!r})"
    return None


def alpaca_fault(row: dict[str, Any], columns: dict[str, str]) -> str | None:
    """What is wrong with the shape of the prompt, query, response and history of a row."""
    fault = text_fault(row, columns, ("prompt", "query", "response"))
    if fault:
        return fault
    history = row.get(columns.get("history")) or []
    whole = isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)
    if not whole or not all(isinstance(text, str) and is_unicode(text) for turn in history for text in turn):
        return f"the history (column {columns['history']!r}) is not a list of [prompt, response] texts"
    return None


def messages_fault(messages: Any, tags: dict[str, str]) -> str | None:
    """What is wrong with the shape of the messages of a row: a list of objects with a role and a text."""
    if not isinstance(messages, list):
        return f"the messages are {kind_of(messages)}, not a list"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} is {kind_of(message)}, not an object"
        role, content = message.get(tags["role_tag"]), message.get(tags["content_tag"])
        if not isinstance(role, str):
            return f"message {number} has no role (key {tags['role_tag']!r})"
        if not isinstance(content, str) or not is_unicode(content):
            return f"message {number} holds {kind_of(content)}, not Unicode text (key {tags['content_tag']!r})"
    return None


def messages_gap(messages: list[dict], tags: dict[str, str], prompts_only: bool) -> str | None:
    """What messages of the right shape lack: user and assistant by turns, a response last unless `prompts_only`."""
    turn = 0
    for number, message in enumerate(messages, 1):
        role, content = message[tags["role_tag"]], message[tags["content_tag"]]
        leads = number == 1 and role == tags.get("system_tag")
        due = [tags.get(tag) for tag in (("user_tag", "observation_tag"), ("assistant_tag", "function_tag"))[turn % 2]]
        if not leads and role not in due:
            return f"message {number} is from {role!r} where {due[0]!r} is due"
        turn += not leads
        if is_blank(content) and not leads:
            return f"message {number} is an empty {'response' if role == tags['assistant_tag'] else 'prompt'}"
    if turn == 0:
        return "there are no messages"
    if (turn % 2 == 1) != prompts_only:
        leaves = "a response" if prompts_only else "no response (--prompts-only is for such files)"
        return f"the last message is from {messages[-1][tags['role_tag']]!r}, which leaves {leaves}"
    return None


def text_fault(row: dict[str, Any], columns: dict[str, str], kinds: Iterable[str]) -> str | None:
    """What keeps the columns mapped as `kinds` from being text. Null is an empty text."""
    for column in (columns[kind] for kind in kinds if kind in columns):
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            return f"the column {column!r} holds {kind_of(value)}, not text"
        if value and not is_unicode(value):
            return f"the column {column!r} holds half of a surrogate pair, which is not Unicode text"
    return None


def picture_fault(row: dict[str, Any], columns: dict[str, str]) -> str | None:
    """What is wrong with the pictures of a row: paths below data/, as many as the texts have <image> marks."""
    if "images" not in columns:
        return None
    pictures = pictures_of(row, columns["images"])
    for picture in pictures:
        if not isinstance(picture, str) or is_blank(picture) or not is_unicode(picture):
            return f"the picture {picture!r:.80} is not a path"
        if is_outside(picture):
            return f"the picture {picture!r:.80} lies outside data/"
    texts = [row.get(column) for kind, column in columns.items() if kind not in ("images", "system")]
    marks = str(texts).count("<image>")
    return None if marks == len(pictures) else f"{len(pictures)} pictures, but {marks} <image> marks in the texts"


def pictures_of(row: dict[str, Any], column: str) -> list[Any]:
    """The pictures of a row, whether its column holds none, one or a list."""
    value = row.get(column)
    return value if isinstance(value, list) else [] if value is None else [value]


def kind_fault(row: dict[str, Any], number: int, kinds: dict[str, tuple[str, int]]) -> str | None:
    """What changes its kind in this row; `kinds` remembers each column's first one. Such a file cannot be loaded."""
    for column, value in row.items():
        if value is None:
            continue
        kind, first = kinds.setdefault(column, (kind_of(value), number))
        if kind_of(value) != kind:
            return f"the column {column!r} holds {kind_of(value)}, but {kind} in row {first}"
    return None


def is_blank(value: Any) -> bool:
    """Whether a value is null or text without a visible character."""
    return value is None or (isinstance(value, str) and not value.strip())


def is_unicode(text: str) -> bool:
    """Whether `text` can be encoded: JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
