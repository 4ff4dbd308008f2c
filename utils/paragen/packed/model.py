"""What packed training and scoring both need to know of a model, or do to it."""

from typing import Any

from peft import PeftModel
from torch import nn
from transformers.integrations.liger import apply_liger_kernel


def plain(adapted: PeftModel) -> nn.Module:
    """The model without its adapter, and without the note of it that makes PEFT warn at the next one."""
    model = adapted.unload()
    del model.peft_config
    return model


def fuse(model: nn.Module) -> None:
    """On an NVIDIA GPU, use Liger's kernels for norms, rotary positions and gated activations; the loss is our own."""
    if model.device.type == "cuda":
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def config_of(model: nn.Module) -> Any:
    """The configuration of a model's text part."""
    return model.config.get_text_config()


def positions_vary(model: nn.Module) -> bool:
    """Whether a model's rotary positions depend on the longest row of a batch."""
    rope = str(getattr(config_of(model), "rope_parameters", None))
    return any(kind in rope for kind in ("dynamic", "longrope"))
