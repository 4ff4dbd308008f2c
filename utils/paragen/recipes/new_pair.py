"""Writes a new pair of recipes, pretrain and finetune, that agree with each other, for you to edit.

    MODEL=qwen2.5-0.5b DATASET=ARC-c python utils/make_recipe.py       (make recipe MODEL=.. DATASET=..)

FROM=     take the figures of another pair: a model of this dataset, a dataset with this model, or DATASET/MODEL
TEMPLATE= the prompt template; needed for a model that models/models.yaml does not list
CATEGORY= needed where neither data/sources.yaml nor the place of the dataset's file tells it

Reads collect_scripts/figures.yaml, models/, data/dataset_info.json and data/sources.yaml; writes two new files
collect_scripts/<category>/<dataset>/<model>_<dataset>_{pretrain,finetune}.yaml, never over one that is there.
"""

import difflib
import json
import math
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.dataset import names
from paragen.model import base_models, model_files
from paragen.recipes import keys, lookup, render, vocabulary

FIGURES = paths.SCRIPTS / "figures.yaml"
UP = "../../.."  # from a recipe's folder to the repository
SMALL = 2_000_000_000  # parameters


@dataclass
class Cell:
    """What a pair is for."""

    short: str  # the model in file names
    folder: str  # the model's folder under models/
    dataset: str
    category: str
    template: str
    lora_target: str
    parameters: int
    processor: bool
    rows: int | None  # of the dataset; None: not known
    usable: int | None  # its first rows, that may be trained on; None: not known

    def recipe(self, phase: str) -> Path:
        return paths.SCRIPTS / self.category / self.dataset / f"{self.short}_{self.dataset}_{phase}.yaml"

    def run_folder(self, phase: str, rank: int) -> str:
        return f"{UP}/saves/{self.category}/{self.dataset}/{self.folder}_lora-rank_{rank}_{phase}"


def cell_of(model: str, dataset: str, template: str | None = None, category: str | None = None) -> Cell:
    """The cell that is meant by what a user types. Raises UserError naming the value and the right ones."""
    dataset = choose_dataset(dataset)
    place = vocabulary.category_of(dataset)
    if category:
        category = paths.choose(category, paths.CATEGORIES, "category")
        if place and place != category:
            raise UserError(f"CATEGORY={category}: the file of {dataset} lies in data/{place}/; leave CATEGORY away")
    category = category or place
    if not category:
        raise UserError(f"dataset {dataset!r} lies in no category; say CATEGORY= one of {', '.join(paths.CATEGORIES)}")
    short, entry = base_models.find_entry(model)
    folder = paths.MODELS / entry["folder"]
    guess = read_figures()["datasets"].get(dataset, {}).get("rows")
    return Cell(
        short=short,
        folder=entry["folder"],
        dataset=dataset,
        category=category,
        template=choose_template(short, template or entry["template"]),
        lora_target=entry["lora_target"] if short in base_models.table() else lora_target_of(folder),
        parameters=entry["parameters"] or parameters_of(folder),
        processor=bool(entry["processor"]),
        rows=vocabulary.rows_of(dataset)[0] or guess,
        usable=vocabulary.trainable_rows(dataset, guess),
    )


def choose_dataset(typed: str) -> str:
    """The trainable dataset that is meant. Raises UserError when there is none, or its name can be no folder's."""
    known = vocabulary.trainable()
    if not any(paths.loose(name) == paths.loose(typed) for name in known):
        raise UserError(
            f"dataset {typed!r} is not known; register it: make register FILE=data/<category>/{typed}.json; "
            f"known: {', '.join(known)}"
        )
    name = paths.choose(typed, known, "dataset")
    if not names.is_dataset_name(name):
        raise UserError(
            f"dataset {name!r} cannot be a folder's name; register it under another one: make register NAME=.."
        )
    return name


def choose_template(short: str, typed: str | None) -> str:
    """The template that is meant; where none is said or known, a UserError with those of similar names."""
    known = sorted(vocabulary.stock_templates() | vocabulary.our_templates())
    if typed in known:
        return typed
    loose = [name for name in known if paths.loose(name) == paths.loose(typed or "")]
    if len(loose) == 1:
        return loose[0]
    near = near_templates(typed or short, known)
    if typed:
        raise UserError(
            f"template {typed!r} is neither LLaMA-Factory's nor in utils/prompt_templates.py; near: {', '.join(near)}"
        )
    raise UserError(
        f"model {short!r} is not in models/models.yaml, so say its prompt template: TEMPLATE=...; "
        f"near: {', '.join(near)}; `default` suits a base model without a chat format, "
        "others go into utils/prompt_templates.py"
    )


def near_templates(name: str, known: list[str]) -> list[str]:
    """The templates whose names are most like a model's or a template's name, nearest first."""
    starts = [paths.loose(name[found.start() :]) for found in re.finditer(r"[A-Za-z]+", name)] or [paths.loose(name)]
    shared = {each: max(len(os.path.commonprefix([start, paths.loose(each)])) for start in starts) for each in known}
    alike = {each: difflib.SequenceMatcher(None, starts[0], paths.loose(each)).ratio() for each in known}
    return sorted(known, key=lambda each: (-shared[each], -alike[each]))[:6]


def lora_target_of(folder: Path) -> str:
    """Which layers a model that is not in the table gets adapters on.

    LLaMA-Factory's `all` means every linear layer but the output head; it finds nothing in GPT-2's Conv1D layers.
    """
    config = json.loads((folder / "config.json").read_bytes())
    return base_models.table()["gpt2"]["lora_target"] if config.get("model_type") == "gpt2" else "all"


def parameters_of(folder: Path) -> int:
    """The parameters of a model folder, as near as its files tell: 2 bytes each; 0 where it has no weights yet."""
    return files.size_of(model_files.weight_files(folder)) // 2


def read_figures() -> dict:
    """collect_scripts/figures.yaml; its head explains it. Raises UserError when it is not such a table."""
    try:
        table = yaml.safe_load(FIGURES.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{paths.relative(FIGURES)}: cannot be read: {' '.join(str(error).split())}") from None
    parts = ("models", "categories", "datasets")
    if not isinstance(table, dict) or not all(isinstance(table.get(part), dict) for part in parts):
        raise UserError(f"{paths.relative(FIGURES)}: a mapping with {', '.join(parts)} is due")
    return table


def figures_for(cell: Cell) -> dict[str, Any]:
    """The figures of collect_scripts/figures.yaml for a cell, with a note on where they come from."""
    table = read_figures()
    dataset = table["datasets"].get(cell.dataset, {})
    figures = dict(table["categories"][cell.category])
    figures.update({key: value for key, value in dataset.items() if key not in ("models", "rows")})
    figures.update(dataset.get("models", {}).get(cell.short, {}))
    first = next(iter(dataset.get("models", {})), None)
    if "note" not in figures and first:
        figures.update({**dataset["models"][first], "note": f"a choice, no source has them: those of {first}"})
    figures.setdefault("note", f"a choice, no source has them: what is usual in {cell.category}")
    return finish(figures, cell)


def figures_from(typed: str, cell: Cell) -> dict[str, Any]:
    """The figures of another pair, fitted to a cell; `typed` is a model, a dataset, or DATASET/MODEL.

    Another dataset's steps become as many epochs of this one, where the rows of both are known.
    """
    dataset, model = find_pair(typed, cell)
    recipes = lookup.recipes()
    pretrain, finetune = (render.load(recipes[dataset, model, phase]) for phase in paths.PHASES)
    figures = {"note": f"those of {model} on {dataset}", "keep": finetune.get("save_total_limit", 100)}
    for key in keys.COPIED_FIGURES:
        if key in pretrain:
            figures[key] = pretrain[key]
    for phase, config in (("pretrain", pretrain), ("finetune", finetune)):
        split = (
            config.get("per_device_train_batch_size", keys.OMITTED_BATCH_SIZE),
            config.get("gradient_accumulation_steps", keys.OMITTED_ACCUMULATION),
        )
        figures[f"{phase}_batch"] = list(split)
        figures[f"{phase}_taken"] = config
    resumed = paths.CHECKPOINT.search(str(finetune.get("resume_from_checkpoint")))
    if not resumed:
        raise UserError(
            f"{paths.relative(recipes[dataset, model, 'finetune'])}: resume_from_checkpoint names no "
            "checkpoint-<step>, so there are no steps to take from it; see: make check-recipes"
        )
    figures["resume_step"] = int(resumed[1])
    if dataset != cell.dataset:
        del figures["save_steps"]
        rows = vocabulary.trainable_rows(dataset, rows=read_figures()["datasets"].get(dataset, {}).get("rows"))
        if rows and cell.usable:
            per_epoch = steps_per_epoch(min(rows, figures.get("max_samples", rows)), figures["pretrain_batch"])
            figures["epochs"] = round(figures.pop("resume_step") / per_epoch, 2)
    return finish({**read_figures()["categories"][cell.category], **figures}, cell)


def find_pair(typed: str, cell: Cell) -> tuple[str, str]:
    """The (dataset, model) whose whole pair FROM means. Raises UserError naming the pairs there are."""
    known = lookup.recipes()
    pairs = sorted({(d, m) for d, m, _ in known if all((d, m, phase) in known for phase in paths.PHASES)})
    wanted = [paths.loose(part) for part in typed.split("/")]
    if len(wanted) == 2:
        found = [pair for pair in pairs if sorted(map(paths.loose, pair)) == sorted(wanted)]
    else:
        of_dataset = [(d, m) for d, m in pairs if d == cell.dataset and paths.loose(m) in wanted]
        of_model = [(d, m) for d, m in pairs if m == cell.short and paths.loose(d) in wanted]
        found = of_dataset + of_model
    if len(found) == 1:
        return found[0]
    near = [f"{d}/{m}" for d, m in pairs if {paths.loose(d), paths.loose(m)} & {*wanted, paths.loose(cell.dataset)}]
    raise UserError(
        f"FROM={typed}: no such pair for {cell.dataset} and {cell.short}; say a model of {cell.dataset}, "
        f"a dataset with {cell.short}, or one of: {', '.join(near or [f'{d}/{m}' for d, m in pairs])}"
    )


def finish(figures: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Figures with what follows from them: context window, rows, steps."""
    figures = dict(figures)
    context = read_figures()["models"].get(cell.short, {}).get("context") or context_of(paths.MODELS / cell.folder)
    figures["cutoff_len"] = min(figures["cutoff_len"], context)
    if cell.usable is not None and cell.usable != cell.rows:
        figures["max_samples"] = min(figures["max_samples"], cell.usable)
    if "resume_step" not in figures:
        if cell.usable is None:
            raise UserError(
                f"dataset {cell.dataset!r}: its rows are not known, so neither are the steps of an epoch; "
                f"bring it first: make data DATASET={shlex.quote(cell.dataset)}"
            )
        per_epoch = steps_per_epoch(min(cell.usable, figures["max_samples"]), figures["pretrain_batch"])
        figures["resume_step"] = max(1, math.ceil(round(figures["epochs"] * per_epoch, 6)))
    step, every = figures["resume_step"], figures.get("save_steps")
    if not every or step % every:
        figures["save_steps"] = next((step // parts for parts in (2, 3, 5, 7) if step % parts == 0), step)
    return figures


def steps_per_epoch(rows: int, batch: list[int]) -> int:
    return math.ceil(rows / (batch[0] * batch[1]))


def context_of(folder: Path) -> int:
    """The tokens that a model on disk has positions for; without end where its config is not here or does not say."""
    config = folder / "config.json"
    told = json.loads(config.read_bytes()) if config.is_file() else {}
    told = {**told, **told.get("text_config", {})}
    return told.get("max_position_embeddings") or told.get("n_positions") or 1 << 40


def split(batch: list[int], cell: Cell, cutoff_len: int) -> tuple[int, int, bool]:
    """Rows in a micro-batch, micro-batches a step, and whether to do without gradient checkpointing.

    For a model with a processor the source's split stays: its loss is a mean of micro-batch means. For others every
    split of the same rows is the same mean over tokens, so as many rows go at once as a 24 GB card takes: all of them
    where the model is small and the rows are short, with all activations kept; else, with activations computed twice,
    about 8,800 tokens (logits over 150,000 words fill the card), half as many for a large model, but at least one row.
    """
    rows = batch[0] * batch[1]
    if cell.processor:
        return batch[0], batch[1], False
    if cell.parameters <= SMALL and cutoff_len <= 2048:
        return rows, 1, True
    tokens = 8800 if cell.parameters <= SMALL else 4400
    micro = next(part for part in range(rows, 0, -1) if rows % part == 0 and (part * cutoff_len <= tokens or part == 1))
    return micro, rows // micro, False


def write_pair(cell: Cell, figures: dict[str, Any]) -> None:
    """Write both recipes, or neither. Raises UserError when one of them is there."""
    recipes = {phase: cell.recipe(phase) for phase in paths.PHASES}
    for path in recipes.values():
        if path.exists():
            raise UserError(f"{paths.relative(path)}: is there already; edit it, or remove it to have a new one")
    texts = {phase: text_of(cell, figures, phase) for phase in paths.PHASES}
    written = []
    try:
        for phase, path in recipes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, texts[phase].encode())
            written.append(path)
            say(paths.relative(path))
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def text_of(cell: Cell, figures: dict[str, Any], phase: str) -> str:
    """A recipe of a cell, in the form that all recipes have."""
    sections = {
        "model": [
            ("model_name_or_path", f"{UP}/models/{cell.folder}", ""),
            ("trust_remote_code", False, ""),
        ],
        "method": [
            ("stage", "sft", ""),
            ("do_train", True, ""),
            ("finetuning_type", "lora", ""),
            ("lora_rank", figures["lora_rank"], "of this file as it stands; RANK= sets another"),
            ("lora_target", cell.lora_target, ""),
        ],
        "dataset": dataset_lines(cell, figures),
        "output": output_lines(cell, figures, phase),
        "train": train_lines(cell, figures, phase),
    }
    own = {key for name in ("method", "dataset", "model") for key, *_ in sections[name]} | keys.NEVER_COPIED
    for each in paths.PHASES:
        own |= {key for key, *_ in output_lines(cell, figures, each) + train_lines(cell, figures, each)}
    taken = figures.get(f"{phase}_taken", {})
    sections["train"] += [(key, value, "") for key, value in taken.items() if key not in own]
    blocks = [header(cell, figures, phase)]
    for name, lines in sections.items():
        blocks.append(f"### {name}\n" + "".join(line(*values) for values in lines))
    return "\n".join(blocks)


def header(cell: Cell, figures: dict[str, Any], phase: str) -> str:
    """What a recipe is for, the commands that run it, and where its figures come from."""
    if phase == "pretrain":
        lines = [f"Pretrain {cell.folder} on {cell.dataset}: bring the adapter to a region worth collecting in."]
    else:
        count = f"{figures['keep']} consecutive checkpoints"
        lines = [f"Collect {count} of {cell.folder} on {cell.dataset}, going on from the pretrain's last step."]
    if cell.dataset in vocabulary.listed():
        lines.append(f"  make data DATASET={shlex.quote(cell.dataset)}")
    lines.append(f"  make model MODEL={shlex.quote(cell.short)}")
    lines.append("  " + command("pretrain" if phase == "pretrain" else "collect", cell, figures["lora_rank"]))
    if cell.template in vocabulary.our_templates():
        lines.append(
            f"The template {cell.template} is in utils/prompt_templates.py: the commands above, our runner, know it;"
        )
        lines.append("stock LLaMA-Factory runs this recipe only after the template is added to its source.")
    lines.append(f"Figures: {figures['note']}.")
    return "".join(f"# {text}\n" for text in lines)


def command(target: str, cell: Cell, rank: int) -> str:
    return f"make {target} DATASET={shlex.quote(cell.dataset)} MODEL={shlex.quote(cell.short)} RANK={rank}"


def dataset_lines(cell: Cell, figures: dict[str, Any]) -> list[tuple]:
    lines = [
        ("dataset", cell.dataset, ""),
        ("dataset_dir", f"{UP}/data", ""),
        ("template", cell.template, "how prompt and response become one text"),
        ("cutoff_len", figures["cutoff_len"], "tokens; longer rows are cut"),
        ("max_samples", figures["max_samples"], rows_comment(cell, figures)),
    ]
    if "image_max_pixels" in figures and cell.processor and cell.category == "multimodal":
        lines.append(("image_max_pixels", figures["image_max_pixels"], "a picture; larger ones are scaled down"))
    return lines


def rows_comment(cell: Cell, figures: dict[str, Any]) -> str:
    if cell.usable is not None and cell.usable != cell.rows:
        of = f" of {cell.rows:,}" if cell.rows else ""
        return f"the first rows{of}; those after them stay unseen, to score checkpoints on"
    return f"rows at most; {cell.dataset} has {cell.rows:,}" if cell.rows else "rows at most"


def output_lines(cell: Cell, figures: dict[str, Any], phase: str) -> list[tuple]:
    lines = [("output_dir", cell.run_folder(phase, figures["lora_rank"]), "")]
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


def train_lines(cell: Cell, figures: dict[str, Any], phase: str) -> list[tuple]:
    batch, step = figures[f"{phase}_batch"], figures["resume_step"]
    micro, accumulated, keep_activations = split(batch, cell, figures["cutoff_len"])
    lines = []
    if phase == "finetune":
        resumed = f"{cell.run_folder('pretrain', figures['lora_rank'])}/checkpoint-{step}"
        lines.append(("resume_from_checkpoint", resumed, ""))
    lines.append(("per_device_train_batch_size", micro, batch_comment(batch, micro, cell)))
    lines.append(("gradient_accumulation_steps", accumulated, f"{micro * accumulated} rows a step"))
    why = "short rows, a small model: fits a 24 GB card, and nothing is computed twice"
    lines.append(
        (
            "disable_gradient_checkpointing",
            keep_activations,
            why if keep_activations else "activations are computed twice: slower, less memory",
        )
    )
    if phase == "pretrain":
        lines.append(("learning_rate", figures["learning_rate"], "at its highest"))
        lines.append(("max_steps", step, length_comment(cell, figures)))
    else:
        told = "the pretrain's: a resumed run goes on with that one whatever stands here"
        lines.append(("learning_rate", figures["learning_rate"], told))
        told = f"the resumed step {step} + {figures['keep']}; the first still has the pretrain's last learning rate, 0"
        lines.append(("max_steps", step + figures["keep"], told))
    lines.append(("lr_scheduler_type", "cosine", "down to 0 at max_steps"))
    share = "of all steps (below 1: a fraction)" if 0 < figures["warmup_steps"] < 1 else "steps"
    lines.append(("warmup_steps", figures["warmup_steps"], share))
    lines.append(("bf16", True, "float32 on a machine without an accelerator"))
    return lines


def batch_comment(batch: list[int], micro: int, cell: Cell) -> str:
    if cell.processor:
        return "as its source splits them: with a processor the loss is a mean of micro-batch means"
    if micro == batch[0]:
        return "rows at once"
    return f"rows at once: the same mean over tokens as {batch[0]} x {batch[1]}, and faster"


def length_comment(cell: Cell, figures: dict[str, Any]) -> str:
    usable = cell.usable if cell.usable is not None else cell.rows
    if usable is None:
        return "the finetune resumes here"
    per_epoch = steps_per_epoch(min(usable, figures["max_samples"]), figures["pretrain_batch"])
    epochs = figures["resume_step"] / per_epoch
    about = "" if abs(epochs - round(epochs, 1)) < 1e-9 else "about "
    many = "1 epoch" if f"{epochs:.1f}" == "1.0" else f"{epochs:.1f} epochs".replace(".0 ", " ")
    return f"{about}{many} of {per_epoch:,} steps; the finetune resumes here"


def line(key: str, value: Any, comment: str) -> str:
    """One line of a recipe, its comment where those of the others stand."""
    text = f"{key}: {scalar(value)}"
    return f"{text:36} # {comment}\n" if comment else f"{text}\n"


def scalar(value: Any) -> str:
    """A value as every YAML reader takes it for the same: `5.0e-5`, not `5e-05`; text in quotes where it must be."""
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        mantissa = mantissa.rstrip("0")
        return f"{mantissa}{'0' if mantissa.endswith('.') else ''}e{int(exponent)}"
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
