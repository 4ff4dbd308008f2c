"""A base model loaded to be scored, as LLaMA-Factory loads it for a recipe."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from llamafactory.hparams import get_infer_args
from llamafactory.model import load_config, load_model, load_tokenizer
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from paragen.collection import manifest as manifest_records
from paragen.collection import manifest_recipe
from paragen.collection.manifest import Manifest
from paragen.common import devices, paths
from paragen.common.cli import UserError
from paragen.model import base_models, loading, model_files
from paragen.packed.model import use_fused_kernels
from paragen.recipes import templates
from paragen.scoring import attention

WAY_OUT = "put its files back, or collect again with FORCE=1"


class BaseModel:
    """A base model and its tokenizer. No code in the model's folder runs, whatever the recipe says.

    Args:
        recipe: the one in a collection's manifest, of which manifest_recipe.py takes what decides model and tokens.
        folder: the model's.
        loaded: the model, where it has been loaded already; then only the tokenizer is loaded.

    `key` is equal for recipes that can share a model; `dtype` is what the model computes in. Raises UserError for a
    recipe or a folder that LLaMA-Factory cannot load a tokenizer from; `model` does so for the model.
    """

    def __init__(self, recipe: dict[str, Any], folder: Path, loaded: PreTrainedModel | None = None):
        templates.register()
        self.recipe, self.folder = recipe, folder
        self.key, self.dtype = base_key(recipe, folder), dtype_of(recipe)
        given = {
            **loading_settings(recipe, folder),
            **manifest_recipe.text_settings(recipe),
            "model_name_or_path": str(folder),
            "infer_dtype": str(self.dtype).removeprefix("torch."),
            "trust_remote_code": False,
        }
        with naming(folder):
            self.model_args, self.data_args, self.finetuning_args, _ = get_infer_args(given)
            self.model_args.device_map = {"": str(devices.own())}
            self.tokenizer_module = load_tokenizer(self.model_args)
        self.loaded = loaded

    @property
    def model(self) -> PreTrainedModel:
        """The model, which is loaded at the first access. Its hash was verified by `base_for`: anew where its files'
        sizes or times changed since they were hashed."""
        if self.loaded is None:
            tokenizer = self.tokenizer_module["tokenizer"]
            if not os.isatty(2):
                disable_progress_bar()
            with torch.inference_mode(False):  # else gradients could not flow through it, whoever asked for it first
                with naming(self.folder):
                    self.loaded = load_model(tokenizer, self.model_args, self.finetuning_args, False)
                for parameter in self.loaded.parameters():  # LLaMA-Factory keeps the dtype in which files store them
                    parameter.data = parameter.data.to(self.dtype)
        return self.loaded

    def another(self) -> "BaseModel":
        """The same, loaded from its folder again, as nothing has changed it."""
        return BaseModel(self.recipe, self.folder)

    @property
    def max_tokens(self) -> int:
        """The number of positions that the model has."""
        config = load_config(self.model_args).get_text_config()
        return getattr(config, "max_position_embeddings", None) or 2**17

    def use_fused_kernels(self) -> None:
        """Use the fused kernels of the packed engine; once per model, also where several collections share it."""
        if not hasattr(self.model, "paragen_fused"):
            use_fused_kernels(self.model)
            attention.rotate_rows_as_one(self.model)
            vars(self.model)["paragen_fused"] = True


def base_for(manifest: Manifest, loaded: BaseModel | None) -> BaseModel:
    """The base model of a collection.

    Args:
        manifest: the collection's.
        loaded: the base model loaded last; its weights are used again where the collection has the same.

    Raises UserError where the model is not on disk, or is not the one that the collection was trained on.
    """
    recipe, folder = manifest.recipe or {}, folder_of(manifest)
    if loaded is not None and loaded.key == base_key(recipe, folder):
        return BaseModel(recipe, folder, loaded.loaded)
    return BaseModel(recipe, folder)


def base_key(recipe: dict[str, Any], folder: Path) -> tuple:
    """A key that is equal for collections that can share a loaded base model."""
    return str(folder), str(loading_settings(recipe, folder)), dtype_of(recipe)


def folder_of(manifest: Manifest) -> Path:
    """The folder below models/ of a collection's base model.

    Raises UserError where it is not there, or is not the model or the tokenizer of the collection's training.
    """
    base = manifest.base_model or manifest_records.BaseModel()
    folder = base_models.local_folder(paths.MODELS / (base.name or "unknown"))
    if base_models.identity_of(folder)["sha256"] != base.sha256:
        raise UserError(
            f"{paths.relative(folder)}: is not the base model that {manifest.run} was trained on; {WAY_OUT}"
        )
    tokenizer = manifest.tokenizer.sha256 if manifest.tokenizer else None
    if model_files.hash_of(folder, model_files.tokenizer_files(folder)) != tokenizer:
        raise UserError(
            f"{paths.relative(folder)}: does not have the tokenizer that {manifest.run} was trained with; {WAY_OUT}"
        )
    return folder


def dtype_of(recipe: dict[str, Any]) -> torch.dtype:
    """The dtype that a collection is scored in: its training's on a GPU, float32 on the CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if recipe.get("bf16") else torch.float16 if recipe.get("fp16") else torch.float32


def loading_settings(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The keys of a recipe that decide what the base model is; collections where they are equal can share it."""
    return manifest_recipe.loading_settings(recipe, paths.relative(folder))


def naming(folder: Path) -> contextlib.AbstractContextManager[None]:
    """While the body runs, turn what a base model's files or settings lead libraries to raise into a UserError."""
    way_out = (
        "make verify REHASH_MODELS=1 compares its files with what was recorded, and this gets it again: "
        f"{base_models.how_to_get(folder)}"
    )
    return loading.as_user_error(folder, way_out)
