"""The prompts of a collection: the rows it was trained on, or those kept to score it, as its manifest recorded them.

Imported by all that pairs prompts with checkpoints. A data file that changed since is refused.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import dataset_info
import files
import paths
from cli import UserError

SPLITS = ("train", "test")


def of_collection(manifest: dict[str, Any], split: str = "train", data_dir: Path = paths.DATA) -> list[dict[str, Any]]:
    """The prompts of one split of a collection's dataset.

    Args:
        manifest: the collection's.
        split: `train` for the rows trained on; `test` for the dataset's registered `<name>_test`, else for the rows of
            its own file that were not trained on (only the last `held_out` of them where the entry says so).
        data_dir: where dataset_info.json lies.

    Returns a dict per row: `system`, `prompt` and `response` (texts, empty where there is none), `images` (paths
    relative to data/). A conversation gives its first user message, its last answer, and all of it as `messages`.

    Raises UserError when the rows are gone, changed since the training, or when there are none of this split.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not known; known: {', '.join(SPLITS)}")
    if manifest["data"] is None:
        raise UserError(f"{manifest['run']}: its manifest does not know the data (it was made from a stock run)")
    return [
        texts_of(row, entry)
        for data in manifest["data"]
        for entry, rows in (trained(data, data_dir) if split == "train" else kept_back(data, data_dir),)
        for row in rows
    ]


def trained(data: dict[str, Any], data_dir: Path = paths.DATA) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the entry of dataset_info.json, the rows) that one element of a manifest's `data` was trained on, unchanged."""
    path = Path(data_dir) / data["file"]
    rows = rows_in(path)[: data["rows"]]
    if _hash_of(path, _stamp(path), data["rows"]) != data["rows_sha256"]:
        raise UserError(
            f"{paths.relative(path)}: its first {data['rows']} rows are not those that {data['name']} was trained on; "
            "put the file back, or train again with FORCE=1"
        )
    return data["entry"], rows


def kept_back(data: dict[str, Any], data_dir: Path = paths.DATA) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the entry, the rows) that one element of a manifest's `data` was not trained on."""
    paired = f"{data['name']}_test"
    info = dataset_info.read_info(data_dir)
    if paired in info:
        return dataset_info.entry_of(paired, data_dir), rows_in(dataset_info.data_file(paired, data_dir))
    entry, _ = trained(data, data_dir)
    rest = rows_in(Path(data_dir) / data["file"])[data["rows"] :]
    rest = rest[-entry[dataset_info.HELD_OUT] :] if entry.get(dataset_info.HELD_OUT) else rest
    if not rest:
        raise UserError(f"{data['name']}: has no {paired} in dataset_info.json and was trained on all its rows")
    return entry, rest


def texts_of(row: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """A row as texts, as LLaMA-Factory reads it (its data/converter.py): prompt and query are joined by a newline."""
    columns, tags = dataset_info.columns_of(entry), dataset_info.tags_of(entry)
    images = dataset_info.pictures_of(row, columns["images"]) if "images" in columns else []
    system = row.get(columns.get("system")) or ""
    if "messages" not in columns:
        parts = [row.get(columns.get(kind)) for kind in ("prompt", "query")]
        response = row.get(columns.get("response")) or ""
        return {"system": system, "prompt": "\n".join(filter(None, parts)), "response": response, "images": images}
    roles = {tags.get(f"{kind}_tag"): kind for kind in ("user", "assistant", "observation", "function", "system")}
    said = [
        {"role": roles.get(message[tags["role_tag"]]), "content": message[tags["content_tag"]]}
        for message in row[columns["messages"]]
    ]
    system = next((message["content"] for message in said if message["role"] == "system"), system)
    prompt = next((message["content"] for message in said if message["role"] == "user"), "")
    response = said[-1]["content"] if said and said[-1]["role"] in ("assistant", "function") else ""
    return {"system": system, "prompt": prompt, "response": response, "images": images, "messages": said}


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a data file, read once per process while it stays unchanged."""
    return _rows(path, _stamp(path))


def _stamp(path: Path) -> tuple:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{paths.relative(path)}: the prompts are gone; put the file back (make data)") from None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@lru_cache(maxsize=8)
def _rows(path: Path, _: tuple) -> list[dict[str, Any]]:
    return dataset_info.load_rows(path)


@lru_cache(maxsize=64)
def _hash_of(path: Path, stamp: tuple, rows: int) -> str:
    return files.sha256_of_value(_rows(path, stamp)[:rows])
