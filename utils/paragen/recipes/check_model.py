"""What is wrong with a recipe's model: its folder, its template, and the layers that get adapters."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paragen.common import paths, safetensors_header
from paragen.model import base_models, model_files
from paragen.recipes import vocabulary
from paragen.recipes.recipe_file import Fault, Recipe

# fmt: off
# The output head and the embeddings, by the last part of their names.
HEADS = {
    "lm_head", "embed_out", "embed_tokens", "word_embeddings", "wte", "wpe", "decoder", "predictions", "cls", "score",
}
# The linear layers of the table's models on which LLaMA-Factory's `all` trains, those of vision towers included.
LINEAR = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv", "proj", "out_proj",
    "fc1", "fc2",
}
# fmt: on


def model_faults(recipe: Recipe) -> Iterator[Fault]:
    """The model's folder, the template and the layers that get adapters."""
    folder, table = recipe.resolved("model_name_or_path"), base_models.table()
    by_folder = base_models.short_names()
    if folder and folder.parent != paths.MODELS:
        given = recipe.config["model_name_or_path"]
        yield "model_name_or_path", f"{given!r} is not a folder in models/: ../../../models/<folder>"
    elif folder and recipe.short:
        short = by_folder.get(folder.name, folder.name.lower())
        if short != recipe.short:
            wanted = table.get(recipe.short, {}).get("folder")
            way_out = f"{recipe.short} is models/{wanted}" if wanted else f"models/{folder.name} is {short}"
            yield "model_name_or_path", f"is models/{folder.name}, but the file's name says {recipe.short}; {way_out}"
    template = recipe.config.get("template")
    known = vocabulary.known_templates()
    if template is not None and (not isinstance(template, str) or template not in known):
        near = ", ".join(difflib.get_close_matches(str(template), known, 3)) or "see LLaMA-Factory's data/template.py"
        yield "template", f"{template!r} is neither LLaMA-Factory's nor in utils/prompt_templates.py; near: {near}"
    meant = meant_folder(recipe)
    entry = table.get(by_folder.get(meant.name, "")) if meant else None
    for text in target_faults(recipe.config.get("lora_target", "all"), meant, entry):
        yield "lora_target", text


def meant_folder(recipe: Recipe) -> Path | None:
    """The folder of the model that a recipe is for: the one that its file's name says, else the one that it names."""
    entry = base_models.table().get(recipe.short)
    return paths.MODELS / entry["folder"] if entry else recipe.resolved("model_name_or_path")


def target_faults(target: Any, folder: Path | None, entry: dict[str, Any] | None) -> Iterator[str]:
    """What is wrong with a LoRA target.

    Args:
        target: the recipe's lora_target.
        folder: the model's, where the recipe names one.
        entry: the model's mapping in models/models.yaml, where it has one.
    """
    right = entry["lora_target"] if entry else "all"
    model = folder.name if folder else "the model"
    if not isinstance(target, str) or not target.strip():
        yield f"{target!r} is not `all` or a comma list of layer names"
        return
    if target == "all":
        if right != "all":
            yield f"`all` does not fit {model}; models/models.yaml has {right}"
        return
    layers = layers_on_disk(folder)
    known = set(right.split(",")) if right != "all" else LINEAR if entry else None
    for part in (part.strip() for part in target.split(",")):
        if part.split(".")[-1] in HEADS:
            yield f"{part!r} is the head or an embedding, which is tied to the other one in many models; omit it"
        elif layers and not any(name == part or name.endswith(f".{part}") for name in layers):
            yield f"{part!r}: models/{model} has no such layer"
        elif not layers and known and part not in known and part.split(".")[-1] not in known:
            yield f"{part!r}: {model} has no such layer; it has {','.join(sorted(known))}"


def layers_on_disk(folder: Path | None) -> set[str]:
    """The names of a model's layers, from the headers of its weight files; empty where the model is not here."""
    names: set[str] = set()
    for path in model_files.weight_files(folder) if folder and folder.is_dir() else []:
        try:
            tensors = safetensors_header.read_tensors(path)
        except (ValueError, AttributeError, OSError):
            continue  # `make model` reports broken weights
        names |= {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    return names
