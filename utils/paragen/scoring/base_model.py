"""A base model loaded to be scored, as LLaMA-Factory loads it for a recipe."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from llamafactory.hparams import ModelArguments, get_infer_args
from llamafactory.model import load_config, load_model, load_tokenizer
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from paragen.collection import manifest as manifest_records
from paragen.collection.manifest import Manifest
from paragen.common import cli, paths
from paragen.common.cli import UserError
from paragen.model import base_models, model_files
from paragen.packed.model import use_fused_kernels
from paragen.recipes import keys, templates
from paragen.scoring import attention
from paragen.training import outcome

WAY_OUT = "put its files back, or collect again with FORCE=1"


class BaseModel:
    """A base model and its tokenizer.

    Args:
        recipe: the one in a collection's manifest.
        folder: the model's.
        loaded: the model, where it has been loaded already; then only the tokenizer is loaded.

    `key` is equal for recipes that can share a model; `dtype` is what the model computes in.
    """

    def __init__(self, recipe: dict[str, Any], folder: Path, loaded: PreTrainedModel | None = None):
        templates.register()
        self.folder, self.key, self.dtype = folder, base_key(recipe, folder), dtype_of(recipe)
        texts = {key: value for key, value in recipe.items() if key in keys.TEXT}
        self.model_args, self.data_args, self.finetuning_args, _ = get_infer_args({
            **model_keys(recipe), **texts, "model_name_or_path": str(folder),
            "infer_dtype": str(self.dtype).removeprefix("torch."),
        })  # fmt: skip
        self.model_args.device_map = {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
        with _loading(folder):
            self.tokenizer_module = load_tokenizer(self.model_args)
        self.loaded = loaded

    @property
    def model(self) -> PreTrainedModel:
        """The model, which is loaded at the first access."""
        if self.loaded is None:
            tokenizer = self.tokenizer_module["tokenizer"]
            if not os.isatty(2):
                disable_progress_bar()
            with _loading(self.folder):
                self.loaded = load_model(tokenizer, self.model_args, self.finetuning_args, False)
            for parameter in self.loaded.parameters():  # LLaMA-Factory keeps the dtype in which the file stores them
                parameter.data = parameter.data.to(self.dtype)
        return self.loaded

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


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Turn what libraries raise for a damaged model folder, also plain Exceptions, into a UserError that names it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if cli.storage_fault(error) is not None or outcome.is_out_of_memory(error):
            raise
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{paths.relative(folder)}: cannot be loaded ({cause}); make verify REHASH_MODELS=1 compares its "
            f"files with what was recorded, and this gets it again: {base_models.how_to_get(folder)}"
        ) from error


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
    return str(folder), str(model_keys(recipe)), dtype_of(recipe)


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


def model_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that decide what the base model is; collections where they are equal can share it."""
    known = {field.name for field in dataclasses.fields(ModelArguments)} - keys.NOT_OF_THE_MODEL
    return {key: value for key, value in recipe.items() if key in known}
