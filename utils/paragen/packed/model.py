"""Helpers for base models that packed training and scoring share."""

import logging
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel


def unload_adapter(adapted: PeftModel) -> PreTrainedModel:
    """The base model without PEFT's layers, and without the `peft_config` that makes PEFT warn at the next adapter."""
    model = adapted.unload()
    del model.peft_config
    return model


def use_fused_kernels(model: PreTrainedModel) -> None:
    """On an NVIDIA GPU, use Liger's kernels for norms, rotary positions and gated activations, not for the loss."""
    if model.device.type == "cuda":
        logging.getLogger("liger_kernel.backends").setLevel(logging.ERROR)  # it warns of those for other devices
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of a model's text part."""
    return model.config.get_text_config()


def positions_depend_on_batch(model: PreTrainedModel) -> bool:
    """Whether a model's rotary positions depend on the longest row of a batch."""
    rope = str(getattr(text_config(model), "rope_parameters", None))
    return any(kind in rope for kind in ("dynamic", "longrope"))


def replace_submodule(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the submodule with this dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
