"""The table data/sources.yaml: the prepared dataset files that `make data` downloads, and which rows are held out."""

import re
from pathlib import Path
from typing import Any

import yaml

from paragen.common.cli import UserError
from paragen.common.paths import CATEGORIES, DATA, choose, relative
from paragen.dataset import names

TRAINED_ROWS = 5000  # the most rows that recipes take of a training set: LLaMA-Factory's max_samples
HELD_OUT_SHARE = 20  # of a smaller set, one row in this many is held out
KINDS = ("train", "test", "prompts")


def table(path: Path = DATA / "sources.yaml") -> dict[str, Any]:
    """The table: `repository`, `commit` and `files`, a mapping by file name. Raises UserError for anything else."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{relative(path)}: there is no such file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{relative(path)}: is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(read, dict) or not isinstance(read.get("files"), dict):
        raise UserError(f"{relative(path)}: has no files: a mapping by file name is expected")
    for key in ("repository", "commit"):
        if not isinstance(read.get(key), str):
            raise UserError(f"{relative(path)}: {key} {read.get(key)!r} is not a text")
    for name, entry in read["files"].items():
        if fault := entry_fault(str(name), entry):
            raise UserError(f"{relative(path)}: {name}: {fault}")
    return read


def entry_fault(name: str, entry: Any) -> str | None:
    """What is wrong with one file's mapping, or None."""
    if not isinstance(entry, dict):
        return "is not a mapping"
    if not names.PREPARED_FILE.fullmatch(name):
        return "is not the name of a .json file"
    for key, due in (("category", CATEGORIES), ("kind", KINDS)):
        if entry.get(key) not in due:
            return f"{key} {entry.get(key)!r} is none of {', '.join(due)}"
    for key in ("dataset", "path", "blob"):
        if not isinstance(entry.get(key), str):
            return f"{key} {entry.get(key)!r} is not a text"
    if not re.fullmatch(r"[0-9a-f]{40}", entry["blob"]):
        return f"blob {entry['blob']!r} is not 40 hexadecimal digits"
    if not isinstance(entry.get("family", ""), str):
        return f"family {entry['family']!r} is not a text"
    for key in ("rows", "bytes", "held_out"):
        if entry.get(key) is not None and (type(entry[key]) is not int or entry[key] < 0):
            return f"{key} {entry[key]!r} is not a number"
    return None


def selected(files: dict[str, dict], datasets: list[str], category: str | None) -> list[str]:
    """The names of the files of some datasets in a category.

    Args:
        files: the table's files.
        datasets: names without regard to case and punctuation: of datasets, which include their splits, of single
            splits, or of files; empty: all.
        category: None: all.

    Raises UserError for a name that is not known.
    """
    if category:
        category = choose(category, CATEGORIES, "category")
    by_name: dict[str, list[str]] = {}
    for name, entry in files.items():
        by_name.setdefault(names.prepared_dataset(entry["dataset"]), []).append(name)
    families = list(by_name)
    for name, entry in files.items():
        by_name.setdefault(entry["dataset"], [name])
    for name in files:
        by_name.setdefault(name.removesuffix(".json"), [name])
        by_name.setdefault(name, [name])
    wanted = set()
    for dataset in datasets:
        try:
            wanted.update(by_name[choose(dataset, by_name, "dataset")])
        except UserError:
            choose(dataset, families, "dataset")  # its message names the datasets alone
            raise
    return [
        name
        for name, entry in files.items()
        if (not datasets or name in wanted) and (not category or entry["category"] == category)
    ]


def held_out(rows: int) -> int:
    """How many of a training set's last rows are held out where the table does not state it.

    Those beyond the first 5000, and at least 5 %.
    """
    return max(rows - TRAINED_ROWS, -(-rows // HELD_OUT_SHARE))
