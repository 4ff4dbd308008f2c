"""Writes the two recipes of a new pair, in the form that all recipes have."""

from pathlib import Path
from typing import Any

import yaml

from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.recipes import keys, vocabulary
from paragen.recipes.figures import split_batch, steps_per_epoch
from paragen.recipes.new_pair import UP, NewPair

Line = tuple[str, Any, str]  # (key, value, comment)


def write_pair(pair: NewPair, figures: dict[str, Any]) -> list[Path]:
    """Write both recipes, or neither, and return their paths. Raises UserError when one of them is there."""
    recipes = {phase: pair.recipe(phase) for phase in paths.PHASES}
    for path in recipes.values():
        if path.exists():
            raise UserError(f"{paths.relative(path)}: is there already; edit it, or remove it to have a new one")
    texts = {phase: text_of(pair, figures, phase) for phase in paths.PHASES}
    written: list[Path] = []
    try:
        for phase, path in recipes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, texts[phase].encode())
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def write_missing(pair: NewPair, figures: dict[str, Any], replace: bool) -> list[Path]:
    """Write those of the two recipes that are not there, with `replace` those that have another text, too.

    Returns the paths that were written. For many pairs: the caller syncs them to the disk (files.sync_tree).
    """
    written = []
    for phase in paths.PHASES:
        path, content = pair.recipe(phase), text_of(pair, figures, phase).encode()
        if not path.exists() or (replace and path.read_bytes() != content):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, content, durable=False)
            written.append(path)
    return written


def text_of(pair: NewPair, figures: dict[str, Any], phase: str) -> str:
    """The text of a recipe of a pair."""
    sections: dict[str, list[Line]] = {
        "model": [
            ("model_name_or_path", f"{UP}/models/{pair.folder}", ""),
            ("trust_remote_code", False, ""),
        ],
        "method": [
            ("stage", "sft", ""),
            ("do_train", True, ""),
            ("finetuning_type", "lora", ""),
            ("lora_rank", figures["lora_rank"], "of this file as it stands; RANK= sets another"),
            ("lora_target", pair.lora_target, ""),
        ],
        "dataset": dataset_lines(pair, figures),
        "output": output_lines(pair, figures, phase),
        "train": train_lines(pair, figures, phase),
    }
    own = {key for name in ("method", "dataset", "model") for key, *_ in sections[name]} | keys.NEVER_COPIED
    for each in paths.PHASES:
        own |= {key for key, *_ in output_lines(pair, figures, each) + train_lines(pair, figures, each)}
    taken = figures.get(f"{phase}_taken", {})
    sections["train"] += [(key, value, "") for key, value in taken.items() if key not in own]
    blocks = [header(pair, figures, phase)]
    for name, lines in sections.items():
        blocks.append(f"### {name}\n" + "".join(line(*values) for values in lines))
    return "\n".join(blocks)


def header(pair: NewPair, figures: dict[str, Any], phase: str) -> str:
    """The comment at the top: what a recipe is for, the commands that run it, where its figures come from."""
    if phase == "pretrain":
        lines = [f"Pretrain {pair.folder} on {pair.dataset}: bring the adapter to a region worth collecting in."]
    else:
        count = f"{figures['keep']} consecutive checkpoints"
        lines = [f"Collect {count} of {pair.folder} on {pair.dataset}, going on from the pretrain's last step."]
    if pair.dataset in vocabulary.listed():
        lines.append(f"  make data DATASET={paths.typed(pair.dataset)}")
    lines.append(f"  make model MODEL={paths.typed(pair.short)}")
    lines.append("  " + command("pretrain" if phase == "pretrain" else "collect", pair, figures["lora_rank"]))
    if pair.template in vocabulary.our_templates():
        lines.append(
            f"The template {pair.template} is in utils/prompt_templates.py: the commands above, our runner, know it;"
        )
        lines.append("stock LLaMA-Factory runs this recipe only after the template is added to its source.")
    lines.append(f"Figures: {figures['note']}.")
    return "".join(f"# {text}\n" for text in lines)


def command(target: str, pair: NewPair, rank: int) -> str:
    """The make command that runs a target for a pair."""
    return f"make {target} DATASET={paths.typed(pair.dataset)} MODEL={paths.typed(pair.short)} RANK={rank}"


def dataset_lines(pair: NewPair, figures: dict[str, Any]) -> list[Line]:
    """The lines under `### dataset`."""
    lines: list[Line] = [
        ("dataset", pair.dataset, ""),
        ("dataset_dir", f"{UP}/data", ""),
        ("template", pair.template, "how prompt and response become one text"),
        ("cutoff_len", figures["cutoff_len"], "tokens; longer rows are cut"),
        ("max_samples", figures["max_samples"], rows_comment(pair)),
    ]
    if "image_max_pixels" in figures and pair.processor and pair.category == "multimodal":
        lines.append(("image_max_pixels", figures["image_max_pixels"], "a picture; larger ones are scaled down"))
    return lines


def rows_comment(pair: NewPair) -> str:
    """The comment at max_samples."""
    if pair.usable is not None and pair.usable != pair.rows:
        of = f" of {pair.rows:,}" if pair.rows else ""
        return f"the first rows{of}; those after them stay unseen, to score checkpoints on"
    return f"rows at most; {pair.dataset} has {pair.rows:,}" if pair.rows else "rows at most"


def output_lines(pair: NewPair, figures: dict[str, Any], phase: str) -> list[Line]:
    """The lines under `### output`."""
    lines: list[Line] = [("output_dir", pair.run_folder(phase, figures["lora_rank"]), "")]
    if phase == "pretrain":
        step, every = figures["resume_step"], figures["save_steps"]
        saved = f"steps; {step // every} checkpoints to resume from" if step > every else "steps"
        return [*lines, ("logging_steps", 10, ""), ("save_steps", every, saved), ("plot_loss", True, "")]
    return [
        *lines,
        ("logging_steps", 1, ""),
        ("save_steps", 1, "a checkpoint after every step ..."),
        ("save_total_limit", figures["keep"], f"... of which the last {figures['keep']} are kept"),
        ("save_only_model", True, "the adapter without the optimizer's state"),
        ("plot_loss", True, ""),
    ]


def train_lines(pair: NewPair, figures: dict[str, Any], phase: str) -> list[Line]:
    """The lines under `### train`, without keys that only a FROM pair has."""
    batch, step = figures[f"{phase}_batch"], figures["resume_step"]
    micro, accumulated, keep_activations = split_batch(batch, pair, figures["cutoff_len"])
    lines: list[Line] = []
    if phase == "finetune":
        resumed = f"{pair.run_folder('pretrain', figures['lora_rank'])}/checkpoint-{step}"
        lines.append(("resume_from_checkpoint", resumed, ""))
    lines.append(("per_device_train_batch_size", micro, batch_comment(batch, micro, pair)))
    lines.append(("gradient_accumulation_steps", accumulated, f"{micro * accumulated} rows a step"))
    kept = "short rows, a small model: fits a 24 GB card, and nothing is computed twice"
    computed_twice = "activations are computed twice: slower, less memory"
    lines.append(("disable_gradient_checkpointing", keep_activations, kept if keep_activations else computed_twice))
    if phase == "pretrain":
        lines.append(("learning_rate", figures["learning_rate"], "at its highest"))
        lines.append(("max_steps", step, length_comment(pair, figures)))
    else:
        comment = "the pretrain's: a resumed run goes on with that one whatever stands here"
        lines.append(("learning_rate", figures["learning_rate"], comment))
        comment = (
            f"the resumed step {step} + {figures['keep']}; the first still has the pretrain's last learning rate, 0"
        )
        lines.append(("max_steps", step + figures["keep"], comment))
    lines.append(("lr_scheduler_type", "cosine", "down to 0 at max_steps"))
    share = "of all steps (below 1: a fraction)" if 0 < figures["warmup_steps"] < 1 else "steps"
    lines.append(("warmup_steps", figures["warmup_steps"], share))
    lines.append(("bf16", True, "float32 on a machine without an accelerator"))
    return lines


def batch_comment(batch: list[int], micro: int, pair: NewPair) -> str:
    """The comment at per_device_train_batch_size."""
    if pair.processor:
        return "as its source splits them: with a processor the loss is a mean of micro-batch means"
    if micro == batch[0]:
        return "rows at once"
    return f"rows at once: the same mean over tokens as {batch[0]} x {batch[1]}, and faster"


def length_comment(pair: NewPair, figures: dict[str, Any]) -> str:
    """The comment at a pretrain's max_steps: how many epochs they are."""
    usable = pair.usable if pair.usable is not None else pair.rows
    if usable is None:
        return "the finetune resumes here"
    per_epoch = steps_per_epoch(min(usable, figures["max_samples"]), figures["pretrain_batch"])
    epochs = figures["resume_step"] / per_epoch
    about = "" if abs(epochs - round(epochs, 1)) < 1e-9 else "about "
    many = "1 epoch" if f"{epochs:.1f}" == "1.0" else f"{epochs:.1f} epochs".replace(".0 ", " ")
    return f"{about}{many} of {per_epoch:,} steps; the finetune resumes here"


def line(key: str, value: Any, comment: str) -> str:
    """One line of a recipe, with its comment in the column of all comments."""
    text = f"{key}: {scalar(value)}"
    return f"{text:36} # {comment}\n" if comment else f"{text}\n"


def scalar(value: Any) -> str:
    """A value as all YAML readers read it: `5.0e-5`, not `5e-05`; text in quotes where it needs them."""
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        mantissa = mantissa.rstrip("0")
        return f"{mantissa}{'0' if mantissa.endswith('.') else ''}e{int(exponent)}"
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
