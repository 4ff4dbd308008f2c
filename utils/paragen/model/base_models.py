"""The base models: their short names, their folders under models/, and what identifies their files.

    python utils/models.py list           prints the models this repository knows

Imported by the scripts that train, verify and fetch.
"""

import json
import os
import re
from functools import cache
from pathlib import Path

import yaml

from paragen.common import files, paths
from paragen.common.cli import UserError

TABLE = paths.ROOT / "models" / "models.yaml"
SOURCE_FILE = "source.json"  # written by `make model` into the folders that it makes
HASH_CACHE = ".hashes.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = re.compile(
    r"tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece.*\.model"
    r"|chat_template.*|(pre)?processor_config\.json|video_preprocessor_config\.json|tekken\.json"
)
VOCABULARIES = re.compile(
    r"tokenizer\.(json|model)|vocab\.(json|txt)|spiece\.model|sentencepiece.*\.model|tekken\.json"
)
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# Encoders that transformers also gives a causal-LM head: without `is_decoder: true` they attend to later tokens.
ENCODERS = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


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
        "processor": has_processor(folder),
    }


def how_to_get(folder: Path) -> str:
    """The command that brings the model of a folder name."""
    short = next((short for short, values in table().items() if values["folder"] == folder.name), None)
    hub_id = source_of(folder).get("hub_id")
    return f"make model MODEL={short or hub_id or f'<org>/{folder.name}'}"


def local_folder(folder: Path) -> Path:
    """`folder`, checked to hold a model that can be trained: config, whole safetensors weights, tokenizer.

    Reads the config, the index and the headers of the weights, not the weights themselves.
    """
    name, remedy = paths.relative(folder), how_to_get(folder)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "no such model folder"
        raise UserError(f"{name}: {what}; bring it with: {remedy}")
    config = _read_json(folder / "config.json")
    again = f"put it there whole, or remove the folder and: {remedy}"
    weights = weight_files(folder)
    if not weights:
        raise UserError(f"{name}: has no {WEIGHTS} nor {WEIGHTS_INDEX} (other formats can run code when read); {again}")
    missing = [path.name for path in weights if not path.is_file()]
    if missing:
        raise UserError(f"{name}: lacks {', '.join(missing)}, which {WEIGHTS_INDEX} names; {again}")
    for path in weights:
        if fault := fault_of_weights(path):
            raise UserError(f"{paths.relative(path)}: {fault}; {again}")
    if not any(VOCABULARIES.fullmatch(path.name) for path in tokenizer_files(folder)):
        raise UserError(f"{name}: has no tokenizer files (tokenizer.json or the like); {again}")
    if needs_decoder(config):
        raise UserError(
            f"{name}/config.json: is_decoder is not true, so this {config['model_type']} would see the tokens that it "
            f"is to predict; put it right with: make model MODEL={short_name(folder)}"
        )
    return folder


def short_name(folder: Path) -> str:
    """The name of a model folder as recipes and `make model` take it."""
    by_folder = {values["folder"]: short for short, values in table().items()}
    return by_folder.get(folder.name, folder.name.lower())


def needs_decoder(config: dict) -> bool:
    """Whether a config.json makes an encoder that a causal-LM head would let look at later tokens."""
    return config.get("model_type") in ENCODERS and config.get("is_decoder") is not True


def set_decoder(folder: Path) -> bool:
    """Put `is_decoder: true` into the config.json of an encoder; tells whether that was needed."""
    path = folder / "config.json"
    config = _read_json(path) if path.is_file() else {}
    if not needs_decoder(config):
        return False
    files.write_json(path, {**config, "is_decoder": True})
    return True


def fault_of_weights(path: Path) -> str | None:
    """What is wrong with a safetensors file by its header and its size, or None."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            return "is a Git LFS pointer, not the weights"
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            return f"has only {size} bytes: it is cut off, or no safetensors file"
        try:
            header = json.loads(file.read(length))
            whole = 8 + length + max((tensor["data_offsets"][1] for tensor in _tensors(header)), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "is not a safetensors file"
    return None if size == whole else f"has {size} bytes, its header tells of {whole}"


def _tensors(header: dict) -> list[dict]:
    return [tensor for name, tensor in header.items() if name != "__metadata__"]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a model folder, sorted; no second copy in another layout."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        return []
    shards = _read_json(folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and "/" not in name for name in shards.values()):
        raise UserError(f"{paths.relative(folder / WEIGHTS_INDEX)}: names no weight files; put the right one there")
    return sorted({folder / name for name in shards.values()})


def _read_json(path: Path) -> dict:
    """A JSON object of a model folder; raises UserError naming the file where it is none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{paths.relative(path)}: not valid JSON ({error}); put the right one there") from None
    if not isinstance(value, dict):
        raise UserError(f"{paths.relative(path)}: not a JSON object; put the right one there")
    return value


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
    # huggingface_hub notes the commit of each file that `hf download --local-dir` brings; a name alone proves nothing
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if not note.is_file():
        return None, None
    hub_id = next((values["hub_id"] for values in table().values() if values["folder"] == folder.name), None)
    return hub_id, note.read_text().split("\n")[0].strip()


def source_of(folder: Path) -> dict:
    """What `make model` wrote on where a folder's model came from; empty where it was put there by hand."""
    source = folder / SOURCE_FILE
    return _read_json(source) if source.is_file() else {}


def changed_files(folder: Path) -> list[str]:
    """The names of the files that are not as `make model` noted them."""
    told = source_of(folder).get("files", {})
    present = [folder / name for name in told if (folder / name).is_file()]
    hashes = hashes_of(folder, present)
    return [name for name, sha256 in told.items() if hashes.get(name) != sha256]


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit's id (whole or its beginning), not a branch or a tag."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{7,40}", revision) is not None


def hash_of(folder: Path, members: list[Path]) -> str:
    """One hash over files of a folder, by name and content."""
    return files.sha256_of_value(hashes_of(folder, members))


def hashes_of(folder: Path, members: list[Path]) -> dict[str, str]:
    """The SHA-256 of files of a folder, by name. Unchanged files (size, times) are not read again."""
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
    return hashes


def has_processor(folder: Path) -> bool:
    """Whether a model reads more than text, so that LLaMA-Factory averages its loss over micro-batches."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def adapter_bytes(folder: Path, rank: int, lora_target: str) -> int:
    """About how many bytes a float32 LoRA adapter of this rank takes on a base model.

    Goes by the shapes in the headers of the weight files: every matrix named by `lora_target` (a comma list of module
    names or their ends), or with `all` every one but embeddings and heads.
    """
    ends = None if lora_target == "all" else tuple(f".{name.strip()}.weight" for name in lora_target.split(","))
    total = 0
    for path in weight_files(folder):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for key, entry in header.items():
            if len(entry.get("shape", ())) == 2 and (key.endswith(ends) if ends else is_adapted_by_all(key)):
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
