"""The base models: their short names, their folders under models/, and what identifies their files.

    python utils/models.py list           prints the models this repository knows

Imported by the scripts that train, verify and fetch.
"""

import json
import os
import re
import sys
from pathlib import Path

import cli
import files
import paths
from cli import UserError

# short name in a recipe's file name: (folder under models/, hub repository or None where the weights are made here)
KNOWN = {
    "smollm2-135m": ("SmolLM2-135M-Instruct-Q4_1", None),
    "qwen2.5-0.5b": ("Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
}
SOURCE_FILE = "source.json"  # written by `make model` into the folders that it makes
HASH_CACHE = ".hashes.json"
TOKENIZER_FILES = re.compile(
    r"tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model"
    r"|chat_template.*|(pre)?processor_config\.json|video_preprocessor_config\.json"
)


def how_to_get(folder: Path) -> str:
    """The command that brings the model of a folder name."""
    short = next((short for short, (name, _) in KNOWN.items() if name == folder.name), None)
    return f"make model MODEL={short}" if short else f"hf download <org>/{folder.name} --local-dir models/{folder.name}"


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
    source = folder / SOURCE_FILE
    if source.is_file():
        with open(source, encoding="utf-8") as file:
            told = json.load(file)
        return told.get("hub_id"), told.get("revision")
    hub_id = next((hub for name, hub in KNOWN.values() if name == folder.name), None)
    # huggingface_hub notes the commit of each file that `hf download --local-dir` brings
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    revision = note.read_text().split("\n")[0].strip() if note.is_file() else None
    return hub_id, revision


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
    for short, (name, hub_id) in KNOWN.items():
        state = "here" if (paths.MODELS / name / "config.json").is_file() else "not here yet"
        print(f"{short:16} models/{name:32} {hub_id or 'made by make model':32} {state}")


if __name__ == "__main__":
    cli.run(main)
