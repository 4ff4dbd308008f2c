"""The files of a base model's folder: its weights, its tokenizer, their hashes, and what is wrong with them."""

import json
import os
import re
from pathlib import Path
from typing import Any

from paragen.common import files, paths, safetensors_header
from paragen.common.cli import UserError

HASH_CACHE = ".hashes.json"  # in models/: hashes of files that were read before
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = re.compile(
    r"tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece.*\.model"
    r"|chat_template.*|(pre)?processor_config\.json|video_preprocessor_config\.json|tekken\.json"
)
# Of the tokenizer's files, those without which there is no tokenizer.
VOCABULARIES = re.compile(
    r"tokenizer\.(json|model)|vocab\.(json|txt)|spiece\.model|sentencepiece.*\.model|tekken\.json"
)
# Encoders that transformers also gives a causal-LM head: without `is_decoder: true` they attend to later tokens.
ENCODERS = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


def fault_of_folder(folder: Path) -> str | None:
    """What a model folder that has a config.json lacks to be trained: whole safetensors weights and a tokenizer.

    Reads the index and the headers of the weights, not the weights themselves. Raises UserError for a broken index.

    Returns:
        One phrase that begins with the folder's or the file's name; None for a whole folder.
    """
    name = paths.relative(folder)
    weights = weight_files(folder)
    if not weights:
        return f"{name}: has no {WEIGHTS} nor {WEIGHTS_INDEX} (other formats can run code when read)"
    missing = [path.name for path in weights if not path.is_file()]
    if missing:
        return f"{name}: lacks {', '.join(missing)}, which {WEIGHTS_INDEX} names"
    for path in weights:
        if fault := safetensors_header.fault_of(path):
            return f"{paths.relative(path)}: {fault}"
    if not any(VOCABULARIES.fullmatch(path.name) for path in tokenizer_files(folder)):
        return f"{name}: has no tokenizer files (tokenizer.json or the like)"
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a model folder, sorted; never a second copy of the weights.

    Raises UserError when the index of a sharded model names no files.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        return []
    shards = read_json(folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and "/" not in name for name in shards.values()):
        raise UserError(f"{paths.relative(folder / WEIGHTS_INDEX)}: names no weight files; put the right one there")
    return sorted({folder / name for name in shards.values()})


def has_weights(folder: Path) -> bool:
    """Whether a model folder has all its weight files. Raises UserError for a broken index."""
    found = weight_files(folder)
    return bool(found) and all(path.is_file() for path in found)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder that decide how text becomes tokens, sorted."""
    return sorted(path for path in folder.iterdir() if TOKENIZER_FILES.fullmatch(path.name))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder. Raises UserError naming the file when it is not one."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{paths.relative(path)}: not valid JSON ({error}); put the right one there") from None
    if not isinstance(value, dict):
        raise UserError(f"{paths.relative(path)}: not a JSON object; put the right one there")
    return value


def needs_decoder(config: dict[str, Any]) -> bool:
    """Whether a config.json makes an encoder whose tokens would attend to the later tokens that they predict."""
    return config.get("model_type") in ENCODERS and config.get("is_decoder") is not True


def set_decoder(folder: Path) -> bool:
    """Write `is_decoder: true` into the config.json of an encoder. Returns whether that was needed."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if not needs_decoder(config):
        return False
    files.write_json(path, {**config, "is_decoder": True})
    return True


def adapter_bytes(folder: Path, rank: int, lora_target: str) -> int:
    """About how many bytes a float32 LoRA adapter takes on a base model, by the shapes in its weights' headers.

    Args:
        folder: the model's folder.
        rank: the LoRA rank.
        lora_target: a comma list of module names or their ends; `all`: every matrix but embeddings and heads.
    """
    ends = None if lora_target == "all" else tuple(f".{name.strip()}.weight" for name in lora_target.split(","))
    total = 0
    for path in weight_files(folder):
        for key, tensor in safetensors_header.read_tensors(path).items():
            if len(tensor.get("shape", ())) == 2 and (key.endswith(ends) if ends else is_adapted_by_all(key)):
                total += 4 * rank * sum(tensor["shape"])
    return total


def is_adapted_by_all(key: str) -> bool:
    """Whether LLaMA-Factory's `lora_target: all` adapts the matrix of this name."""
    return not re.search(r"embed|lm_head|wte|wpe|cls\.|visual|vision|multi_modal_projector", key)


# --------------------------------------------------------------------------------------------------------------- hashes


def hash_of(folder: Path, members: list[Path]) -> str:
    """One SHA-256, hexadecimal, over the names and contents of some files of a folder."""
    return files.sha256_of_value(hashes_of(folder, members))


def hashes_of(folder: Path, members: list[Path]) -> dict[str, str]:
    """The SHA-256, hexadecimal, of some files of a folder, by name. Unchanged files (size, times) are not reread."""
    cache_file = folder.parent / HASH_CACHE
    cache = files.read_cache(cache_file)
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


def forget_hashes(folder: Path) -> None:
    """Forget what is known of a folder's files, so that the next `hashes_of` reads them, changed or not."""
    cache_file = folder.parent / HASH_CACHE
    cache = files.read_cache(cache_file)
    kept = {key: value for key, value in cache.items() if Path(key.split("|")[0]).parent != folder.absolute()}
    if len(kept) < len(cache):
        files.write_json(cache_file, kept)
