"""Converts a user's table or a dataset on the hub to rows that LLaMA-Factory reads.

Reads .jsonl, .csv and .parquet files and hub:<repo>[:<config>[:<split>]]; no code of theirs runs.
"""

import csv
import datetime
import decimal
import json
import math
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paragen.common import parquet_files
from paragen.common.cli import UserError, storage_fault
from paragen.common.paths import relative
from paragen.dataset import dataset_info, infer_entry

HUB = "hub:"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SUFFIXES = (".jsonl", ".csv", ".parquet")
TEXTS = ("prompt", "query", "response", "system")
# Values that a text column may hold besides text; they are written as text.
PLAIN = (decimal.Decimal, datetime.date, datetime.time, datetime.timedelta, uuid.UUID)


def is_source(name: str) -> bool:
    """Whether `name` is to be converted: a dataset on the hub, or a file with one of SUFFIXES."""
    return name.startswith(HUB) or name.lower().endswith(SUFFIXES)


def stem_of(source: str) -> str:
    """The name, without .json, of the file that a source becomes: `gsm8k_test` for hub:openai/gsm8k:main:test."""
    if not source.startswith(HUB):
        return Path(source).stem
    repository, _, split = hub_parts(source)
    return repository.rpartition("/")[2] + ("" if split in (None, "train") else f"_{split}")


def convert(source: str, named: dict[str, str], prompts_only: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a source as LLaMA-Factory reads them, and notes on what became of its columns.

    Args:
        source: a file's path, or hub:<repo>[:<config>[:<split>]].
        named: which column holds what, e.g. {"response": "answer"}; `answer.text` is a part of a column, `choices.0`
            the first of a list. Columns that are not named are found by their usual names.
        prompts_only: whether the rows have no responses.

    The rows have only what is read, under LLaMA-Factory's own names. A number in a text column is written as text, NaN
    becomes null. Raises UserError, with the row, for what cannot be read or is no text.
    """
    label = source if source.startswith(HUB) else relative(Path(source))
    raw = [without_nan(row) for row in read(source)]
    if not raw:
        raise UserError(f"{label}: there are no rows")
    given = list(dataset_info.columns_in(raw))
    try:
        add_parts(raw, named.values())
        columns = dataset_info.columns_of(infer_entry.infer_entry(raw, named, prompts_only))
    except UserError as error:
        raise UserError(f"{label}: {error}") from None
    rows = []
    for number, row in enumerate(raw, 1):
        try:
            rows.append({kind: written(kind, row.get(column), column) for kind, column in columns.items()})
        except UserError as error:
            raise UserError(f"{label}: row {number}: {error}") from None
    return rows, notes_on(given, columns, raw, rows)


def notes_on(given: list[str], columns: dict[str, str], raw: list[dict], rows: list[dict]) -> list[str]:
    """Notes for the user: which columns became text, and which of the `given` ones are not read."""
    notes = []
    for kind, column in columns.items() if raw else ():
        pairs = zip(raw, rows, strict=True)
        first = next((n for n, (old, new) in enumerate(pairs, 1) if old.get(column) != new[kind]), None)
        if first:
            notes.append(
                f"written as text: the column {column!r}, such as {rows[first - 1][kind]!r:.40} in row {first}"
            )
    read_here = columns.values()
    left = [column for column in given if not any(c == column or c.startswith(f"{column}.") for c in read_here)]
    return notes + ([f"columns left out: {', '.join(map(repr, left))}"] if left else [])


def as_json(rows: list[dict[str, Any]]) -> bytes:
    """Rows as a JSON list, a row per line."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


def read(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a source, unchanged. Raises UserError."""
    if source.startswith(HUB):
        return read_hub(source)
    path = Path(source)
    if not os.path.isfile(path):
        raise UserError(f"{relative(path)}: there is no such file")
    return {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}[path.suffix.lower()](path)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file with one JSON object per line; empty lines are skipped."""
    for number, line in enumerate(utf8_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{relative(path)}: line {number}: broken JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{relative(path)}: line {number}: is {dataset_info.kind_of(row)}, not an object")
        yield row


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of comma-separated values with a header line; every value stays text, `007` and `NA` too."""
    csv.field_size_limit(1 << 30)
    table = csv.reader(utf8_lines(path, newline=""), strict=True)
    try:
        header = next(table, [])
        twice = {column for column in header if header.count(column) > 1}
        if twice:
            raise UserError(f"{relative(path)}: the header names {sorted(twice)[0]!r} twice")
        if len(header) == 1 and re.search(r"[;\t]", header[0]):
            raise UserError(f"{relative(path)}: the header is {header[0]!r}: the columns must be separated by commas")
        for row in table:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(f"{relative(path)}: line {table.line_num}: {len(row)} values for {len(header)} columns")
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{relative(path)}: line {table.line_num}: broken CSV: {error}") from None


def utf8_lines(path: Path, newline: str | None = "\n") -> Iterator[str]:
    """The lines of a text file, with or without a byte order mark. Raises UserError when it is not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{relative(path)}: is not UTF-8 ({error.reason}); save it as UTF-8") from None


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a batch at a time, read in a child process (see parquet_files.py)."""
    import pyarrow

    try:
        stream = parquet_files.batches_in_child(path)
        next(stream)  # the schema
        for batch in stream:
            batch.validate(full=True)
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{relative(path)}: is no readable Parquet: {first_line(error)}") from None


def hub_parts(source: str) -> tuple[str, str | None, str | None]:
    """(repository, configuration, split) of hub:<repo>[:<config>[:<split>]]. Raises UserError."""
    parts = source.removeprefix(HUB).split(":")
    if len(parts) > 3 or not HUB_NAME.fullmatch(parts[0]):
        raise UserError(f"{source}: say it as hub:<repo>[:<config>[:<split>]], e.g. hub:openai/gsm8k:main:train")
    repository, config, split = parts + [""] * (3 - len(parts))
    return repository, config or None, split or None


def read_hub(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a dataset on the hub (or HF_ENDPOINT's mirror); labels by their names. Raises UserError."""
    repository, config, split = hub_parts(source)
    if os.path.exists(repository):
        raise UserError(f"{source}: {repository} is a folder here, which would be read instead; change the folder")
    os.environ["HF_HUB_OFFLINE"] = "0"
    import datasets

    datasets.disable_progress_bars() if not os.isatty(2) else None
    try:
        table = datasets.load_dataset(repository, config, split=split or "train")
    except Exception as error:
        if storage_fault(error):
            raise
        raise UserError(f"{source}: cannot be loaded: {first_line(error)}") from None
    media = [name for name, kind in table.features.items() if type(kind).__name__ in ("Image", "Audio", "Video")]
    if media:  # LLaMA-Factory reads paths of files, not what these columns hold
        raise UserError(
            f"{source}: the column {media[0]!r} holds pictures, sound or films, which are not converted; save them as "
            "files, and register a .json whose rows name them (data/README.md)"
        )
    labels = {name: kind for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
    for row in table:
        for name, kind in labels.items():
            value = row[name]
            row[name] = kind.int2str(value) if isinstance(value, int) and 0 <= value < kind.num_classes else None
        yield row


def first_line(error: BaseException) -> str:
    """An exception's text in one line."""
    return " ".join(str(error).split())[:300]


def add_parts(rows: list[dict[str, Any]], columns: Any) -> None:
    """Add to the rows each of `columns` that is a part of another, such as answer.text.

    Raises UserError for a part that no row has.
    """
    present = dataset_info.columns_in(rows)
    for column in columns:
        if column in present or "." not in column:
            continue
        found = [part_of(row, column.split(".")) for row in rows]
        if all(value is None for value in found):
            names = ", ".join(map(repr, present))
            raise UserError(f"MAP ...={column}: no row has this part of a column; there are {names}")
        for row, value in zip(rows, found, strict=True):
            row[column] = value


def part_of(value: Any, steps: list[str]) -> Any:
    """The part of a nested value at `steps`, keys of objects and numbers in lists; None where there is none."""
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def written(kind: str, value: Any, column: str) -> Any:
    """A value as it is written for `kind`: as text for the kinds of TEXTS, otherwise unchanged.

    Numbers and truth values become text as JSON writes them, dates and decimals as Python does. Raises UserError for a
    value that cannot be written so.
    """
    if kind in TEXTS:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, (bool, int, float)):
            return json.dumps(value)
        if isinstance(value, PLAIN):
            return str(value)
        inner = next(iter(value), None) if isinstance(value, dict) else 0 if isinstance(value, list) else None
        way_out = "" if inner is None else f"; name a part of it, e.g. {column}.{inner}"
        what = "bytes" if isinstance(value, bytes) else dataset_info.kind_of(value)
        raise UserError(f"the column {column!r} holds {what}, not text{way_out}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise UserError(f"the column {column!r} holds what JSON cannot: write it out as text or paths first") from None
    return value


def without_nan(value: Any) -> Any:
    """A value with None for each NaN in it: tables write NaN where a value is missing."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    return [without_nan(part) for part in value] if isinstance(value, list) else value
