"""The base models: their short names, their folders under models/, where they come from, and what identifies them."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.model import model_files

TABLE = paths.ROOT / "models" / "models.yaml"
MODELS_IN_REPOSITORY = Path("models")
SOURCE_FILE = "source.json"  # written by `make model` into the folders that it makes
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@cache
def table() -> dict[str, dict[str, Any]]:
    """The models of models/models.yaml, by short name; the comment at its top explains the keys of each."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def short_names() -> dict[str, str]:
    """The short names of the table's models, by the names of their folders."""
    return {entry["folder"]: short for short, entry in table().items()}


def short_name(folder: Path) -> str:
    """The name of a model folder as recipes and `make model` take it."""
    return short_names().get(folder.name, folder.name.lower())


def find_entry(name: str) -> tuple[str, dict[str, Any]]:
    """The model that `name` means: its short name and its mapping, with the keys of models/models.yaml.

    Args:
        name: a short name, without regard to case and punctuation, or the name of a folder under models/, also as the
            shell completes it: `models/my-model/`.

    A folder that is not in the table has None for what is not known. Raises UserError listing the short names when no
    model has this name.
    """
    name = without_models(name)
    if name in short_names():
        short = short_names()[name]
        return short, table()[short]
    others = {folder.name.lower(): folder for folder in _other_folders()}
    short = paths.choose(name, [*table(), *others], "model")
    return short, table()[short] if short in table() else _entry_of(others[short])


def without_models(name: str) -> str:
    """The name of a model folder without the path that a shell's completion puts around it; any other text as it is."""
    path = Path(name)
    is_path = path.parent in (MODELS_IN_REPOSITORY, paths.MODELS) and path.name not in ("", "..")
    return path.name if is_path else name.rstrip("/")


def _other_folders() -> list[Path]:
    """The model folders under models/ that the table does not name."""
    found = sorted(path.parent for path in paths.MODELS.glob("*/config.json"))
    return [folder for folder in found if folder.name not in short_names() and not folder.name.startswith(".")]


def _entry_of(folder: Path) -> dict[str, Any]:
    """The table's keys for a model folder that is not in the table, from its files."""
    hub_id, revision = hub_origin(folder)
    return {
        "hub_id": hub_id,
        "revision": revision,
        "folder": folder.name,
        "template": None,
        "lora_target": "all",
        "parameters": None,
        "gated": None,
        "license": license_of(source_of(folder).get("license")),
        "processor": has_processor(folder),
    }


def has_processor(folder: Path) -> bool:
    """Whether a model reads more than text, so that LLaMA-Factory averages its loss over micro-batches."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


# --------------------------------------------------------------------------------------------------- whole and the same


def local_folder(folder: Path) -> Path:
    """`folder`, checked to hold a model that can be trained: config, whole safetensors weights, tokenizer.

    Reads the config, the index and the headers of the weights, not the weights themselves. Raises UserError with the
    fault and the way out.
    """
    name, remedy = paths.relative(folder), how_to_get(folder)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "no such model folder"
        raise UserError(f"{name}: {what}; download it with: {remedy}")
    config = model_files.read_json(folder / "config.json")
    if fault := model_files.fault_of_folder(folder):
        raise UserError(f"{fault}; put it there whole, or remove the folder and: {remedy}")
    if model_files.needs_decoder(config):
        raise UserError(
            f"{name}/config.json: is_decoder is not true, so this {config['model_type']} would see the tokens that it "
            f"is to predict; correct it with: make model MODEL={paths.typed(short_name(folder))}"
        )
    return folder


def how_to_get(folder: Path) -> str:
    """The command that downloads the model of a folder."""
    hub_id = source_of(folder).get("hub_id")
    return f"make model MODEL={short_names().get(folder.name) or hub_id or f'<org>/{shlex.quote(folder.name)}'}"


def identity_of(folder: Path) -> dict[str, str | None]:
    """A base model's `name`, `hub_id` and `revision` (None: not known), and the `sha256` of its config and weights."""
    hub_id, revision = hub_origin(folder)
    return {
        "name": folder.name,
        "hub_id": hub_id,
        "revision": revision,
        "sha256": model_files.hash_of(folder, [folder / "config.json", *model_files.weight_files(folder)]),
    }


# ------------------------------------------------------------------------------------------------- where it comes from


def hub_origin(folder: Path) -> tuple[str | None, str | None]:
    """The hub repository and the commit that a model folder comes from, each None where it is not known."""
    source = source_of(folder)
    if source:
        return source.get("hub_id"), source.get("revision")
    # huggingface_hub notes the commit of each file that `hf download --local-dir` writes; a name alone proves nothing
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if not note.is_file():
        return None, None
    hub_id = next((entry["hub_id"] for entry in table().values() if entry["folder"] == folder.name), None)
    return hub_id, note.read_text().split("\n")[0].strip()


def source_of(folder: Path) -> dict[str, Any]:
    """What `make model` recorded in a folder about where its model comes from; empty for a folder made by hand."""
    source = folder / SOURCE_FILE
    return model_files.read_json(source) if source.is_file() else {}


def license_of(stated: Any) -> str | None:
    """The licence that a model card or source.json states: of several, all, joined by -and-; None for no text."""
    if isinstance(stated, list) and all(isinstance(name, str) for name in stated):
        stated = "-and-".join(stated)
    return stated if isinstance(stated, str) and stated else None


def changed_files(folder: Path) -> list[str]:
    """The names of the files that differ from what `make model` recorded."""
    recorded = source_of(folder).get("files", {})
    present = [folder / name for name in recorded if (folder / name).is_file()]
    hashes = model_files.hashes_of(folder, present)
    return [name for name, sha256 in recorded.items() if hashes.get(name) != sha256]


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit's id (whole or its beginning), not a branch or a tag."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{7,40}", revision) is not None
