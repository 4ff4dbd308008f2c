"""The keys of a recipe in groups: which are paths, which decide what is trained, which the packed engine follows.

Recipes use LLaMA-Factory's own keys. What this repository knows about single keys is listed here and nowhere else;
the names and types of all keys are read from LLaMA-Factory's source (vocabulary.py).
"""

from typing import Any

# What LLaMA-Factory and transformers use for a key that a recipe omits.
OMITTED_SEED = 42
OMITTED_RANK = 8
OMITTED_CUTOFF = 2048  # cutoff_len, tokens
OMITTED_BATCH_SIZE = 8  # per_device_train_batch_size
OMITTED_ACCUMULATION = 1  # gradient_accumulation_steps

# ------------------------------------------------------------------------------------------------------- what they hold

# Paths, relative to the recipe. Those of runs name the rank, so rendering a recipe at another rank changes them.
RUN_PATHS = ("output_dir", "resume_from_checkpoint")
INPUT_PATHS = ("model_name_or_path", "dataset_dir", "media_dir")
PATHS = INPUT_PATHS + RUN_PATHS
READ_PATHS = (*INPUT_PATHS, "resume_from_checkpoint")

WHOLE_NUMBERS = (
    "seed", "max_steps", "save_total_limit", "max_samples", "cutoff_len", "per_device_train_batch_size",
    "gradient_accumulation_steps",
)  # fmt: skip
ANY_SIGN = ("seed", "max_steps")  # whole numbers that may be less than 1
EPOCHS_DECIDE = -1  # the max_steps of a recipe whose length is num_train_epochs
NUMBERS = ("learning_rate", "num_train_epochs", "lora_alpha", "lora_dropout", "weight_decay", "max_grad_norm")

# ------------------------------------------------------------------------------------------------ what a recipe may use

REQUIRED = ("model_name_or_path", "dataset", "output_dir")  # without these nothing can be trained
EXPECTED = ("model_name_or_path", "dataset", "template", "output_dir", "max_steps", "save_steps")  # in our own recipes

# Keys that are refused: the manifest could not record what would be trained, or the collector could not follow.
REFUSED = {
    "tokenized_path": "reads other rows than the dataset's; omit it",
    "streaming": "does not fix which rows are trained on; omit it",
    "adapter_name_or_path": "starts from an adapter that is not recorded; use resume_from_checkpoint",
    "deepspeed": "is not supported by the collector; omit it",
    "fsdp": "is not supported by the collector; omit it",
    "push_to_hub": "is not done from here; publish a finished collection instead",
}

# Values that are refused, by key.
REFUSED_AT = {
    "flash_attn": {
        "fa2": "fails with transformers 5.6.0, which is installed (LLaMA-Factory's pull request 10634); write sdpa, or "
        "omit it"
    }
}

# Keys in which a finetune recipe agrees with its pretrain recipe; any other key that both have may differ.
SAME_IN_PAIR = (
    "model_name_or_path", "dataset", "dataset_dir", "template", "learning_rate", "finetuning_type", "lora_rank",
    "lora_target", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "pissa_init", "cutoff_len", "max_samples",
    "image_max_pixels", "bf16", "fp16", "seed",
)  # fmt: skip

# Keys that a new pair takes from the pair named by FROM=.
COPIED_FIGURES = (
    "lora_rank", "cutoff_len", "max_samples", "image_max_pixels", "learning_rate", "warmup_steps", "save_steps",
)  # fmt: skip
# Keys that a new pair never takes: max_steps or warmup_steps replaces them, or they fit the other pair's data only.
NEVER_COPIED = {"num_train_epochs", "warmup_ratio", "image_max_pixels"}

# ------------------------------------------------------------------------------------------------- what the keys decide

SCHEDULE = {
    "learning_rate", "max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
}  # fmt: skip
BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps"}
SAVING = {"save_steps", "save_total_limit"}
ADAPTER = {"lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora"}
MEMORY = {"bf16", "disable_gradient_checkpointing"}

# Keys that a resumed run takes from its checkpoint: they stand in optimizer.pt and scheduler.pt, which transformers
# loads over what the recipe says. The shape of the schedule and its length are the recipe's.
HELD_BY_CHECKPOINT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")

# Text keys besides the rows: they decide how a row becomes text and tokens.
TEXT = ("template", "default_system", "tool_format", "enable_thinking", "preserve_thinking")

# Keys that state where files are, or how they are read and logged, but not what is trained. A run's identity omits
# them: it holds the hashes of what the paths point to.
NOT_TRAINED = {
    *PATHS, "overwrite_output_dir", "overwrite_cache", "cache_dir", "preprocessing_num_workers",
    "dataloader_prefetch_factor", "ddp_timeout", "dataloader_num_workers", "dataloader_pin_memory", "logging_steps",
    "logging_first_step", "plot_loss", "report_to", "run_name", "disable_tqdm", "log_level", "do_train",
    "save_only_model", "use_cpu", "dataloader_persistent_workers", "logging_dir",
}  # fmt: skip

# Keys that do not change how rows become tokens; a key that is not listed counts as one that does.
NOT_TOKENISED = SCHEDULE | BATCH | SAVING | ADAPTER | MEMORY | {
    "enable_liger_kernel", "finetuning_type", "flash_attn", "fp16", "freeze_vision_tower", "gradient_checkpointing",
    "loraplus_lr_ratio", "optim", "pure_bf16", "save_strategy", "use_dora",
}  # fmt: skip
# Keys with which the tokens depend on more than the dataset's rows, so that runs cannot share them.
UNSHARED_TOKENS = {"eval_dataset", "tokenized_path", "streaming"}

# --------------------------------------------------------------------------------------- what the packed engine follows

# Keys that the packed engine follows whatever their value is.
PACKED = NOT_TRAINED | SCHEDULE | BATCH | SAVING | ADAPTER | MEMORY | {
    "dataset", "template", "cutoff_len", "max_samples", "train_on_prompt", "mask_history", "enable_thinking", "seed",
    "data_seed",
}  # fmt: skip
OFF = (None, False, 0, 0.0, "no", "none")
# Keys that the packed engine follows at these values only.
PACKED_AT = {
    "stage": ("sft",),
    "finetuning_type": ("lora",),
    "trust_remote_code": (False,),
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "flash_attn": ("auto", "sdpa", "disabled"),
    "save_strategy": ("steps",),
    **dict.fromkeys((
        "use_dora", "pissa_init", "packing", "neat_packing", "val_size", "fp16", "pure_bf16",
        "resize_vocab", "upcast_layernorm", "label_smoothing_factor", "neftune_noise_alpha", "do_eval", "do_predict",
        "eval_strategy", "predict_with_generate", "quantization_bit", "streaming", "dataloader_drop_last", "tf32",
    ), OFF),
}  # fmt: skip


def value_of(config: dict[str, Any], key: str, omitted: Any) -> Any:
    """A recipe's value of a key; `omitted` where it has none, or null."""
    value = config.get(key)
    return omitted if value is None else value
