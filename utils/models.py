"""The base models: their short names, their folders under models/, and what identifies their files.

    python utils/models.py list           prints the models this repository knows

Imported by the scripts that train, verify and fetch.
"""

import json
import os
import re
import sys
from functools import cache
from pathlib import Path

import yaml

import cli
import files
import paths
from cli import UserError

TABLE = paths.ROOT / "models" / "models.yaml"
SOURCE_FILE = "source.json"  # written by `make model` into the folders that it makes
HASH_CACHE = ".hashes.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = re.compile(
    r"tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model"
    r"|chat_template.*|(pre)?processor_config\.json|video_preprocessor_config\.json"
)


@cache
def table() -> dict[str, dict]:
    """The models of models/models.yaml, by short name; its head explains the keys of each."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def entry(name: str) -> tuple[str, dict]:
    """The model that `name` means: its short name and its mapping, as in the table.

    `name` is a short name, matched without case and punctuation; a folder's name under models/ works too. A folder that
    is not in the table gives null where nothing is known. Raises UserError listing the short names when there is none.
    """
    by_folder = {values["folder"]: short for short, values in table().items()}
    others = {folder.name.lower(): folder for folder in _other_folders()}
    if name in by_folder:
        return by_folder[name], table()[by_folder[name]]
    short = paths.choose(name, [*table(), *others], "model")
    return (short, table()[short]) if short in table() else (short, _entry_of(others[short]))


def _other_folders() -> list[Path]:
    """The model folders under models/ that the table does not name."""
    named = {values["folder"] for values in table().values()}
    found = sorted(path.parent for path in paths.MODELS.glob("*/config.json"))
    return [folder for folder in found if folder.name not in named and not folder.name.startswith(".")]


def _entry_of(folder: Path) -> dict:
    """The table's keys for a model folder that is not in the table, from what lies in it."""
    hub_id, revision = hub_origin(folder)
    return {
        "hub_id": hub_id,
        "revision": revision,
        "folder": folder.name,
        "template": None,
        "lora_target": "all",
        "parameters": None,
        "gated": None,
        "license": source_of(folder).get("license"),
        "processor": any((folder / name).is_file() for name in PROCESSOR_FILES),
    }


def how_to_get(folder: Path) -> str:
    """The command that brings the model of a folder name."""
    short = next((short for short, values in table().items() if values["folder"] == folder.name), None)
    return f"make model MODEL={short or f'<org>/{folder.name}'}"


def local_folder(folder: Path) -> Path:
    """`folder`, checked to hold a model that can be trained: config, safetensors weights, tokenizer."""
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "no such model folder"
        raise UserError(f"{paths.relative(folder)}: {what}; bring it with: {how_to_get(folder)}")
    if not weight_files(folder):
        raise UserError(
            f"{paths.relative(folder)}: has no *.safetensors weights (other formats can run code when read)"
        )
    if not tokenizer_files(folder):
        raise UserError(f"{paths.relative(folder)}: has no tokenizer files; bring it with: {how_to_get(folder)}")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted."""
    return sorted(folder.glob("*.safetensors"))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder that decide how text becomes tokens, sorted."""
    return sorted(path for path in folder.iterdir() if TOKENIZER_FILES.fullmatch(path.name))


def identity_of(folder: Path) -> dict:
    """Name, hub id and revision (null where not known) and hash of a base model's config and weights."""
    hub_id, revision = hub_origin(folder)
    return {
        "name": folder.name,
        "hub_id": hub_id,
        "revision": revision,
        "sha256": hash_of(folder, [folder / "config.json", *weight_files(folder)]),
    }


def hub_origin(folder: Path) -> tuple[str | None, str | None]:
    """The hub repository and the commit a model folder came from, each None where it is not known."""
    told = source_of(folder)
    if told:
        return told.get("hub_id"), told.get("revision")
    hub_id = next((values["hub_id"] for values in table().values() if values["folder"] == folder.name), None)
    # huggingface_hub notes the commit of each file that `hf download --local-dir` brings
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    revision = note.read_text().split("\n")[0].strip() if note.is_file() else None
    return hub_id, revision


def source_of(folder: Path) -> dict:
    """What `make model` wrote on where a folder's model came from; empty where it was put there by hand."""
    source = folder / SOURCE_FILE
    return json.loads(source.read_bytes()) if source.is_file() else {}


def hash_of(folder: Path, members: list[Path]) -> str:
    """One hash over files of a folder, by name and content. Unchanged files (size, times) are not read again."""
    cache_file = folder.parent / HASH_CACHE
    cache = _read_cache(cache_file)
    hashes, read = {}, False
    for path in members:
        stat = path.stat()
        key = f"{path.absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
        if key not in cache:
            cache[key], read = files.sha256_of(path), True
        hashes[path.name] = cache[key]
    if read and os.access(folder.parent, os.W_OK):
        kept = {key: value for key, value in cache.items() if os.path.exists(key.split("|")[0])}
        files.write_json(cache_file, kept)
    return files.sha256_of_value(hashes)


def adapter_bytes(folder: Path, rank: int, lora_target: str) -> int:
    """About how many bytes a float32 LoRA adapter of this rank takes on a base model.

    Goes by the shapes in the headers of the weight files: every matrix named by `lora_target` (a comma list of module
    names), or with `all` every one but embeddings and heads.
    """
    names = None if lora_target == "all" else set(lora_target.split(","))
    total = 0
    for path in weight_files(folder):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for key, entry in header.items():
            module = key.split(".")[-2] if key.endswith(".weight") else ""
            if len(entry.get("shape", ())) == 2 and (module in names if names else is_adapted_by_all(key)):
                total += 4 * rank * sum(entry["shape"])
    return total


def is_adapted_by_all(key: str) -> bool:
    """Whether LLaMA-Factory's `lora_target: all` adapts the matrix of this name."""
    return not re.search(r"embed|lm_head|wte|wpe|cls\.|visual|vision|multi_modal_projector", key)


def _read_cache(path: Path) -> dict:
    """The remembered hashes; a missing or broken cache only costs reading the files again."""
    try:
        cache = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}


def main() -> None:
    if sys.argv[1:] != ["list"]:
        raise UserError("usage: models.py list")
    for short, values in [*table().items(), *(entry(folder.name.lower()) for folder in _other_folders())]:
        state = "here" if (paths.MODELS / values["folder"] / "config.json").is_file() else "not here yet"
        origin = values["hub_id"] or ("made by make model" if short in table() else "put there by hand")
        print(f"{short:16} models/{values['folder']:32} {origin:40} {state}")


if __name__ == "__main__":
    cli.run(main)
