"""The prompt files of an export for Drag-and-Drop LLMs, beside those that its checkout contains.

A file is a list of rows; Drag-and-Drop reads `prompt` of each, or the first of its `conversations`.
"""

import json
import os
from pathlib import Path
from typing import Any

from paragen.collection import derived, prompts
from paragen.collection.index import Chosen
from paragen.collection.manifest import Manifest
from paragen.common import paths
from paragen.common.cli import UserError, say
from paragen.exports import parts

SHAREGPT = {"user": "human", "assistant": "gpt", "function": "function_call", "observation": "observation"}


def rows_of(manifest: Manifest) -> list[dict[str, Any]]:
    """The rows that a collection was trained on, as Drag-and-Drop reads them."""
    return [as_row(texts) for texts in prompts.of_collection(manifest, "train", paths.DATA)]


def as_row(texts: dict[str, Any]) -> dict[str, Any]:
    """One row of `prompts.of_collection`: texts as prompt, response and system, a conversation as ShareGPT."""
    pictures = {"images": texts["images"]} if texts["images"] else {}
    if "messages" not in texts:
        return {"prompt": texts["prompt"], "response": texts["response"], "system": texts["system"], **pictures}
    messages = [message for message in texts["messages"] if message["role"] != "system"]
    while messages and messages[0]["role"] != "user" and any(message["role"] == "user" for message in messages):
        messages.pop(0)  # a greeting; the first message has to be the prompt
    turns = [{"from": SHAREGPT.get(message["role"], "human"), "value": message["content"]} for message in messages]
    return {"conversations": turns, **({"system": texts["system"]} if texts["system"] else {}), **pictures}


def write(chosen: Chosen, out: Path, name: str) -> None:
    """Write the rows that a collection was trained on to OUT/<name>; a file that no export made is kept beside it."""
    parts.set_aside(out, name)  # only with FORCE=1, see `kept`

    def make(staging: Path) -> None:
        rows = rows_of(chosen.manifest)
        staging.write_bytes(json.dumps(rows, ensure_ascii=False, indent=1).encode())

    assert chosen.manifest.data is not None  # `kept` lists the files of a collection that does not know its rows
    data = [{"name": part.name, "rows_sha256": part.rows_sha256} for part in chosen.manifest.data]
    parts.make(out, name, {"format": "dnd", "data": data}, make)


def kept(chosen: Chosen, names: list[str], out: Path) -> list[str]:
    """Those of a collection's prompt files that no export made and that stay, since they have its prompts already.

    Raises UserError where OUT has other prompts, unless FORCE=1, and where the collection's rows are gone or unknown.
    """
    record, stay = derived.read_record(out), []
    known = chosen.manifest.data is not None
    ours = [prompt_in(row) for row in rows_of(chosen.manifest)] if known else []
    for name in names:
        path = out / name
        if not known and not path.is_file():
            raise UserError(
                f"{chosen.name}: does not know its rows (it was made from a stock run); put them at "
                f"{paths.relative(path)}, or select others with DATASET=.."
            )
        if not known:
            stay.append(name)
            say(f"note: {paths.relative(path)} stays; whether {chosen.name} was trained on it is not known")
        elif name in record or not os.path.lexists(path):
            continue
        elif prompts_in(path) == ours:
            stay.append(name)
        else:
            trained = f"the {len(ours)} that {chosen.manifest.dataset} was trained on"
            parts.check_may_replace(path, "other prompts", trained)
    return stay


def prompts_in(path: Path) -> list[str | None]:
    """The prompts in a file as Drag-and-Drop reads them: None for a row without one; empty for another kind of file."""
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, FileNotFoundError, IsADirectoryError):
        return []
    return [prompt_in(row) for row in rows] if isinstance(rows, list) else []


def prompt_in(row: Any) -> str | None:
    """A row's prompt as Drag-and-Drop reads it."""
    try:
        return row["prompt"] if "prompt" in row else row["conversations"][0]["value"]
    except (TypeError, KeyError, IndexError):
        return None


def count(chosen: Chosen, path: Path) -> int:
    """How many prompts Drag-and-Drop finds for a collection."""
    data = chosen.manifest.data
    return len(prompts_in(path)) if data is None else sum(part.rows for part in data)
