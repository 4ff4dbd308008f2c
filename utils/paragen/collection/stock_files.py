"""The files that stock LLaMA-Factory, transformers, PEFT, accelerate and DeepSpeed write into the folder of a run.

What has another name was put there by somebody else, and is never deleted.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from paragen.common import paths

# In the run folder and in each checkpoint-<step>/.
_NAMES = {
    # PEFT: the adapter, and its card
    paths.ADAPTER, "adapter_model.bin", paths.ADAPTER_CONFIG, "README.md",
    # transformers: the state of the training
    "trainer_state.json", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt",
    "config.json", "generation_config.json",
    # transformers: tokenizer and processor
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    # LLaMA-Factory: results, log, settings
    "all_results.json", "train_results.json", "eval_results.json", "predict_results.json",
    "generated_predictions.jsonl", "trainer_log.jsonl", "training_args.yaml", "running_log.txt",
    "llamaboard_config.yaml", "swanlab_public_config.json", "value_head.bin", "value_head.safetensors",
    # DeepSpeed
    "latest", "zero_to_fp32.py",
}  # fmt: skip
_PATTERNS = (
    r"rng_state_\d+\.pth|rng_state\.pth",
    r"training_(loss|reward|rewards_\w+|eval_\w+)\.png",  # LLaMA-Factory's plot_loss
    r"additional_chat_templates/[^/]+\.jinja",
    r"runs/([^/]+/)?([^/]+/)?events\.out\.tfevents\.[^/]+",  # TensorBoard's
    r"global_step\d+/((bf16_|fp16_)?zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt",  # DeepSpeed's
    r"(pytorch_model_fsdp_\d+|optimizer_\d+)/(\.metadata|__\d+_\d+\.distcp)|pytorch_model_fsdp\.bin",  # accelerate's
)
_PATTERN = re.compile(f"({paths.CHECKPOINT.pattern}/)?({'|'.join(_PATTERNS)})")
_FOLDER = re.compile(
    rf"({paths.CHECKPOINT.pattern}/)?(additional_chat_templates|runs(/[^/]+){{0,2}}|global_step\d+"
    rf"|pytorch_model_fsdp_\d+|optimizer_\d+)|{paths.CHECKPOINT.pattern}"
)


class RunFiles(NamedTuple):
    """The files below a run folder, as sorted paths relative to it. Links count as files; none is followed."""

    stock: list[str]
    others: list[str]  # a folder of others that is empty has a "/" at its end


def files_in(folder: Path) -> RunFiles:
    """All files below a run folder: those that a stock run has written, and those of others."""
    found = RunFiles([], [])
    for here, folders, names in os.walk(folder):
        place = Path(here).relative_to(folder)
        links = [name for name in folders if Path(here, name).is_symlink()]
        for name in [*names, *links]:
            relative = str(place / name)
            (found.stock if _is_stock(Path(here, name), relative) else found.others).append(relative)
        if not folders and not names and not _FOLDER.fullmatch(str(place)) and place != Path():
            found.others.append(f"{place}/")
    return RunFiles(sorted(found.stock), sorted(found.others))


def _is_stock(path: Path, relative: str) -> bool:
    """Whether a stock run has written the regular file that has this path below its folder."""
    if path.is_symlink() or not path.is_file():
        return False
    head, _, name = relative.rpartition("/")
    named = name in _NAMES and (not head or paths.CHECKPOINT.fullmatch(head) is not None)
    return named or _PATTERN.fullmatch(relative) is not None
