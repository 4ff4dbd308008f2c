"""Descriptions of a dataset's task in words, for generators that read a description in place of prompts.

An entry of data/dataset_info.json may have them under `descriptions`, by where they come from:

    "descriptions": {"written for ParaGen-Dataset": ["Answer school science questions ...", "..."]}

A plain list of texts, whose source is not known, is read as well. data/descriptions.yaml holds those that this project
has for prepared datasets.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from paragen.common import paths
from paragen.common.cli import UserError

KEY = "descriptions"
UNKNOWN = "unknown"  # the source of a plain list
TABLE = "descriptions.yaml"  # in data/
SHOWN = 60  # the most characters of a text in a message


def descriptions_of(entry: dict[str, Any]) -> list[str]:
    """The descriptions in an entry of dataset_info.json, in its order; an empty list where it has none."""
    return [text for texts in by_source(entry).values() for text in texts]


def by_source(entry: dict[str, Any]) -> dict[str, list[str]]:
    """The same by where they come from; a sound entry is expected, see `fault_of`."""
    value = entry.get(KEY) or {}
    return {UNKNOWN: value} if isinstance(value, list) else value


def fault_of(value: Any) -> str | None:
    """What is wrong with the value of an entry's `descriptions`, None for nothing."""
    if isinstance(value, list):
        value = {UNKNOWN: value}
    if not isinstance(value, dict):
        return f"{KEY} is neither a list of texts nor an object of such lists by source"
    for source, texts in value.items():
        if not isinstance(source, str) or not source.strip():
            return f"{KEY} has a source without a name"
        if not isinstance(texts, list):
            return f"{KEY}: {source}: is not a list of texts"
    return fault_in([text for texts in value.values() for text in texts])


def fault_in(texts: Iterable[Any]) -> str | None:
    """What is wrong with some descriptions, None for nothing: each is a text of one line, and no two are alike."""
    seen: dict[str, int] = {}
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            return f"description {number} is not a text"
        if not text.strip():
            return f"description {number} is empty"
        if not text.isprintable() or text != text.strip():
            return f"description {number} ({shortened(text)!r}) is not a text of one line without blanks at its ends"
        first = seen.setdefault(alike(text), number)
        if first != number:
            return f"descriptions {first} and {number} are the same: {shortened(text)!r}"
    return None


def alike(text: str) -> str:
    """A key that is equal for descriptions which differ only in case, blanks and the full stop at the end."""
    return " ".join(text.casefold().split()).rstrip(".")


def shortened(text: str, most: int = SHOWN) -> str:
    """A text, or its start with `...` where it has more characters than `most`."""
    return text if len(text) <= most else text[: most - 3] + "..."


def added(entry: dict[str, Any], texts: list[str], source: str) -> tuple[dict[str, Any], int]:
    """An entry with further descriptions at the end of those of their source.

    Args:
        entry: a sound entry of dataset_info.json.
        texts: the descriptions; those that the entry has already are left out.
        source: where they come from.

    Returns (the new entry, how many descriptions were added). Raises UserError where one of them is empty or no text of
    one line, or two of them are alike.
    """
    if fault := fault_in(texts):
        raise UserError(fault)
    known = set(map(alike, descriptions_of(entry)))
    new = [text for text in texts if alike(text) not in known]
    kept = by_source(entry)
    value = {**kept, source: [*kept.get(source, []), *new]} if new else kept
    return ({**entry, KEY: value} if new else entry), len(new)


def way_to_add(dataset: str) -> str:
    """How a message ends that misses descriptions of a dataset: the command that adds them."""
    return f'add them: make describe DATASET={paths.typed(dataset)} TEXT="..", or FILE=.. with one a line'


def read_file(path: Path) -> list[str]:
    """The descriptions in a file: a line each (.txt), or a list (.json, .yaml), which may stand under the key
    `descriptions`, as in Text-to-LoRA's metadata.yaml. Blanks at the ends are removed, and empty lines of a .txt.

    Raises UserError for another kind of file or content.
    """
    label = paths.relative(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            found: Any = [line for line in text.splitlines() if line.strip()]
        elif path.suffix in (".json", ".yaml", ".yml"):
            found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        else:
            raise UserError(f"{label}: is no .txt, .json or .yaml file")
    except OSError as error:
        raise UserError(f"{label}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{label}: is not readable: {' '.join(str(error).split())}") from None
    found = found.get(KEY) if isinstance(found, dict) else found
    if not isinstance(found, list) or not found:
        raise UserError(f"{label}: holds no descriptions: a list of texts is expected, or one under the key {KEY}")
    return [text.strip() if isinstance(text, str) else text for text in found]


def prepared(name: str, data_dir: Path) -> dict[str, list[str]] | None:
    """The descriptions that data/descriptions.yaml has for a dataset, by source; None where it has none.

    Raises UserError where that file is not as its head says.
    """
    path = Path(data_dir) / TABLE
    if not path.is_file():
        return None
    label = paths.relative(path)
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{label}: is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict) or not isinstance(table.get("datasets"), dict) or "source" not in table:
        raise UserError(f"{label}: has no source and datasets: a mapping with both is expected")
    if name not in table["datasets"]:
        return None
    value = {table["source"]: table["datasets"][name]}
    if fault := fault_of(value):
        raise UserError(f"{label}: {name}: {fault}")
    return value
