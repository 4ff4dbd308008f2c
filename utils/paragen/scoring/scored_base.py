"""A base model loaded to be scored, as LLaMA-Factory loads it for a recipe, and the proof that it is scored rightly.

Imported by evaluate.py.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from llamafactory.hparams import ModelArguments, get_infer_args
from llamafactory.model import load_config, load_model, load_tokenizer
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

import prompt_templates
from paragen.collection.manifest import BaseModel, Manifest
from paragen.common import paths
from paragen.common.cli import UserError
from paragen.model import base_models
from paragen.packed.model import fuse, plain
from paragen.scoring import attention, decoding, model_passes
from paragen.scoring.lora_stack import Factors
from paragen.scoring.questions import TEXT_KEYS, Question

# Of a recipe's model keys, those that say where from and how a training goes, not what the model is.
NOT_THE_MODELS = {
    "model_name_or_path", "adapter_name_or_path", "cache_dir", "enable_liger_kernel", "use_unsloth", "flash_attn",
}  # fmt: skip
WAY_OUT = "put its files back, or collect again with FORCE=1"
SAID = 8  # tokens of an answer that are compared
TIE = 10  # tolerances that the logits of likeliest tokens may be apart: they are rounded themselves
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # nats per token


class Base:
    """A base model and what reads text for it.

    Args:
        recipe: of a collection's manifest.
        folder: the model's.
        model: the model, where it is loaded already; only its tokenizer is, then.
    """

    def __init__(self, recipe: dict[str, Any], folder: Path, model: nn.Module | None = None):
        prompt_templates.register()
        self.folder, self.key, self.dtype = folder, key_of(recipe, folder), dtype_of(recipe)
        texts = {key: value for key, value in recipe.items() if key in TEXT_KEYS}
        self.model_args, self.data_args, self.finetuning_args, _ = get_infer_args({
            **model_keys(recipe), **texts, "model_name_or_path": str(folder),
            "infer_dtype": str(self.dtype).removeprefix("torch."),
        })  # fmt: skip
        self.model_args.device_map = {"": "cuda:0" if torch.cuda.is_available() else "cpu"}
        self.tokenizer_module = load_tokenizer(self.model_args)
        self.kept = model

    @property
    def model(self) -> nn.Module:
        """The model, loaded when it is first asked for."""
        if self.kept is None:
            tokenizer = self.tokenizer_module["tokenizer"]
            if not os.isatty(2):
                disable_progress_bar()
            self.kept = load_model(tokenizer, self.model_args, self.finetuning_args, False)
        return self.kept

    @property
    def longest(self) -> int:
        """How many tokens the model was made for."""
        config = load_config(self.model_args).get_text_config()
        return getattr(config, "max_position_embeddings", None) or 2**17

    def fuse(self) -> None:
        """Use fused kernels where the packed engine does; once for a model, also where collections share it."""
        if not hasattr(self.model, "paragen_fused"):
            fuse(self.model)
            attention.turn_by_token(self.model)
            self.model.paragen_fused = True


def at(manifest: Manifest, base: Base | None) -> Base:
    """The base model of a collection; the one that was loaded before where it is the same.

    Raises UserError when it is not there, or is another than the collection was trained on.
    """
    recipe, folder = manifest.recipe, folder_of(manifest)
    same = base is not None and base.key == key_of(recipe, folder)
    return Base(recipe, folder, base.kept if same else None)


def key_of(recipe: dict[str, Any], folder: Path) -> tuple:
    """What collections have in common that can share a loaded base."""
    return str(folder), str(model_keys(recipe)), dtype_of(recipe)


def folder_of(manifest: Manifest) -> Path:
    """The folder below models/ of a collection's base. Raises UserError when it is not there or is another model."""
    base = manifest.base_model or BaseModel()
    folder = base_models.local_folder(paths.MODELS / (base.name or "unknown"))
    if base_models.identity_of(folder)["sha256"] != base.sha256:
        raise UserError(
            f"{paths.relative(folder)}: is not the base model that {manifest.run} was trained on; {WAY_OUT}"
        )
    tokenizer = manifest.tokenizer.sha256 if manifest.tokenizer else None
    if base_models.hash_of(folder, base_models.tokenizer_files(folder)) != tokenizer:
        raise UserError(
            f"{paths.relative(folder)}: has not the tokenizer that {manifest.run} was trained with; {WAY_OUT}"
        )
    return folder


def dtype_of(recipe: dict[str, Any]) -> torch.dtype:
    """What a collection's training computed in, on a GPU; on the CPU it is always float32."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if recipe.get("bf16") else torch.float16 if recipe.get("fp16") else torch.float32


def model_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that decide what the base model is: collections that agree in them can share it."""
    known = {field.name for field in dataclasses.fields(ModelArguments)} - NOT_THE_MODELS
    return {key: value for key, value in recipe.items() if key in known}


def expected(
    model: nn.Module, folder: Path, tensors: dict[str, Tensor], questions: list[Question]
) -> list[list[float]]:
    """What PEFT makes of some questions: for the base and for a checkpoint of the collection in `folder`, the negative
    log-likelihood of each right response, in nats. The model is left as it was."""
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = True
    adapted = PeftModel(model, config)
    set_peft_model_state_dict(adapted, tensors)
    adapted.eval()
    with adapted.disable_adapter():
        base = [model_passes.reference(adapted, question) for question in questions]
    both = [base, [model_passes.reference(adapted, question) for question in questions]]
    plain(adapted)
    return both


def compare(found: list[list[model_passes.Marks]], theirs: list[list[float]], dtype: torch.dtype) -> None:
    """Raise UserError unless the base's and a checkpoint's marks of some questions are what PEFT makes of them."""
    for marks, losses in zip(found, theirs, strict=True):
        for mark, loss in zip(marks, losses, strict=True):
            off = abs(mark.loss - loss) / mark.count
            if not off <= TOLERANCE[dtype] * max(1.0, loss / mark.count):
                raise wrong(off, "PEFT's own forward pass")


def compare_answers(scorer: model_passes.Scorer, factors: Factors, dtype: torch.dtype) -> None:
    """Raise UserError unless each token of an adapter's answers, but for ties, is the likeliest of a forward pass.

    Args:
        factors: of one adapter, whose marks are known to be right.
    """
    if not decoding.suits(scorer.model):
        return  # transformers generates
    prompts = [question.tokens for question in scorer.questions]
    with torch.inference_mode(), scorer.stacked.using(factors):
        found = decoding.greedy(scorer.model, prompts, SAID, scorer.stops, scorer.pad)
        for prompt, row in zip(prompts, found, strict=True):
            said = row[: len(model_passes.until(row, scorer.stops)) + 1]  # with what ends it
            off = model_passes.missed(scorer.model, prompt, said)
            if not off <= TIE * TOLERANCE[dtype]:
                raise wrong(off, "the forward pass behind the same tokens")


def wrong(off: float, against: str) -> UserError:
    return UserError(
        f"the scores of this model would be wrong (by {off:.1e} nats a token against {against}), so none are made; "
        "export with FORMAT=peft and score with another tool"
    )
