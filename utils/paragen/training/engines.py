"""Which engine trains a run: the packed one, or the ordinary path through LLaMA-Factory's own loop.

A recipe that says anything the packed engine does not know for
sure is left to the ordinary path: it is never trained differently.
"""

import os

from paragen.collection import run_identity
from paragen.common.cli import UserError, say
from paragen.model import base_models
from paragen.recipes.run import Run

ENGINES = ("stock", "packed")
# Recipe keys that the packed engine follows, whatever their value: the data's, the adapter's, the schedule's.
FOLLOWED = run_identity.NOT_TRAINED | {
    "dataset", "template", "cutoff_len", "max_samples", "train_on_prompt", "mask_history", "enable_thinking",
    "lora_rank", "lora_alpha", "lora_target", "use_rslora", "seed", "data_seed", "learning_rate", "max_steps",
    "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "per_device_train_batch_size",
    "gradient_accumulation_steps", "save_steps", "save_total_limit", "bf16", "disable_gradient_checkpointing",
}  # fmt: skip
OFF = (None, False, 0, 0.0, "no", "none")
# Keys that it follows at some values alone.
SOME = {
    "stage": ("sft",),
    "finetuning_type": ("lora",),
    "trust_remote_code": (False,),
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "flash_attn": ("auto", "sdpa", "fa2", "disabled"),
    "save_strategy": ("steps",),
    **dict.fromkeys((
        "lora_dropout", "use_dora", "pissa_init", "packing", "neat_packing", "val_size", "fp16", "pure_bf16",
        "resize_vocab", "upcast_layernorm", "label_smoothing_factor", "neftune_noise_alpha", "do_eval", "do_predict",
        "eval_strategy", "predict_with_generate", "quantization_bit", "streaming", "dataloader_drop_last", "tf32",
    ), OFF),
}  # fmt: skip


def asked() -> str | None:
    """The engine that ENGINE forces, or None. Raises UserError for one that is not known."""
    name = os.environ.get("ENGINE") or None
    if name not in (None, *ENGINES):
        raise UserError(f"ENGINE={name}: is not known; {' or '.join(ENGINES)}")
    return name


def why_not_packed(run: Run, devices: list[str]) -> str | None:
    """Why the packed engine cannot train a run on some devices, or None where it can.

    What only the model itself tells (its layers, its attention, dropout) is seen when it is loaded.
    """
    for key, value in run.config.items():
        if key in FOLLOWED:
            continue
        allowed = SOME.get(key)
        if allowed is None or not any(value is one or (value == one and type(value) is type(one)) for one in allowed):
            return f"{key} is {value!r}" if allowed else f"{key} is not known to it"
    if len(devices) > 1:
        return "it trains on one device"
    if base_models.has_processor(run.base):
        return "the model has a processor, with which the loss is another mean"
    if run.config.get("report_to") not in (None, "none", []):
        return f"report_to is {run.config['report_to']!r}"
    return None


def say_fallback(run: Run, why: str) -> None:
    """One line that tells why the ordinary path runs; with ENGINE=packed that is an error."""
    text = f"{run}: not for the packed engine: {why}"
    if asked() == "packed":
        raise UserError(f"{text}; leave ENGINE away to train it the ordinary way")
    say(f"{text}; it is trained the ordinary way")
