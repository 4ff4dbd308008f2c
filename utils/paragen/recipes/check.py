"""Checks recipes without training them: names against contents, keys, templates, LoRA targets, a pair's agreement."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info
from paragen.model import base_models
from paragen.recipes import keys, render, rendered_row, vocabulary
from paragen.recipes.check_keys import key_faults, path_faults
from paragen.recipes.check_model import meant_folder, model_faults
from paragen.recipes.recipe_file import Fault, Recipe, is_positive, other_half, read_recipe, resumed_step
from paragen.recipes.rendered_row import RenderedRow


class Report(NamedTuple):
    """What the check of some recipes found."""

    messages: list[str]  # a line per fault
    faulty: int  # the number of recipes with faults
    rows: dict[Path, RenderedRow]  # for recipes without faults whose tokenizer is here: a row as the model reads it
    missing: list[str]  # the names of models that are not here, so that no row was rendered


def check(chosen: list[Path]) -> Report:
    """Check some recipes: all faults of each, and a rendered row where there are none."""
    messages: list[str] = []
    faulty: set[Path] = set()
    read: dict[Path, Recipe] = {}
    for path in chosen:
        try:
            read[path] = read_recipe(path)
        except UserError as error:
            messages.append(str(error).replace(str(path), paths.relative(path)))
            faulty.add(path)
    rows: dict[Path, RenderedRow] = {}
    rendered: dict[tuple, RenderedRow] = {}
    missing: set[str] = set()
    for recipe in read.values():
        for test in (name_faults, key_faults, model_faults, dataset_faults, path_faults, phase_faults, header_faults):
            recipe.faults += test(recipe)
        recipe.faults += pair_faults(recipe, read)
        found = lines_of(recipe, recipe.faults) or runner_fault(recipe)
        if not found and rendered_row.is_possible(recipe):
            key = rendered_row.key_of(recipe)
            row = rendered.get(key) or rendered.setdefault(key, rendered_row.render_row(recipe))
            found = lines_of(recipe, row.faults)
            rows[recipe.path] = row
        elif not found and (folder := recipe.resolved("model_name_or_path")):
            missing.add(base_models.short_name(folder))
        messages += found
        if found:
            faulty.add(recipe.path)
    return Report(messages, len(faulty), rows, sorted(missing))


def lines_of(recipe: Recipe, faults: list[Fault]) -> list[str]:
    """Faults of a recipe as lines."""
    return [f"{recipe.place(key)}: {text}" for key, text in faults]


def runner_fault(recipe: Recipe) -> list[str]:
    """The fault for which train_with_rank.sh would refuse a recipe, where there is one."""
    try:
        render.render(recipe.path, recipe.config.get("lora_rank", keys.OMITTED_RANK))
    except UserError as error:
        return [str(error).replace(str(recipe.path), paths.relative(recipe.path))]
    return []


def name_faults(recipe: Recipe) -> Iterator[Fault]:
    """Category, dataset, model, phase and rank: in the file's name, its folder, and its paths."""
    path = recipe.path
    if not path.is_relative_to(paths.SCRIPTS) or path.parent == paths.SCRIPTS:
        return  # a recipe may be anywhere else, under any name
    form = "collect_scripts/<category>/<dataset>/<model>_<dataset>_pretrain.yaml or ..._finetune.yaml"
    if not recipe.short:
        yield "its name", f"is not of the form {form}"
        return
    if recipe.category not in paths.CATEGORIES:
        yield "its folder", f"{recipe.category!r} is no category; the categories are {', '.join(paths.CATEGORIES)}"
    if recipe.config.get("dataset") != recipe.dataset:
        yield "dataset", f"is {recipe.config.get('dataset')!r}, but the file and its folder say {recipe.dataset!r}"
    rank = recipe.config.get("lora_rank", keys.OMITTED_RANK)
    folder = meant_folder(recipe)
    wanted = f"saves/{recipe.category}/{recipe.dataset}/{folder and folder.name}_lora-rank_{rank}_{recipe.phase}"
    if folder and recipe.resolved("output_dir") != paths.ROOT / wanted:
        yield "output_dir", f"is {recipe.config.get('output_dir')!r}; this recipe fills {wanted}"


def dataset_faults(recipe: Recipe) -> Iterator[Fault]:
    """Whether the dataset is known, trainable and in the category of the recipe's folder, its held-out rows unused."""
    dataset = recipe.config.get("dataset")
    if recipe.resolved("dataset_dir") != paths.DATA:
        yield "dataset_dir", f"is {recipe.config.get('dataset_dir')!r}; the datasets are in data/: ../../../data"
    if not isinstance(dataset, str) or not dataset:
        return
    if dataset in vocabulary.test_splits():
        yield "dataset", f"{dataset!r} {vocabulary.TEST_SPLIT}"
        return
    registered = dataset_info.read_info().get(dataset)
    if registered is None and dataset not in vocabulary.listed():
        way_out = f"make register FILE=data/<category>/{shlex.quote(f'{dataset}.json')}"
        yield "dataset", f"{dataset!r} is neither registered nor listed in data/sources.yaml; {way_out}"
        return
    if dataset not in vocabulary.trainable():
        yield "dataset", f"{dataset!r} holds prompts only and cannot be trained on"
        return
    if recipe.dataset and dataset != recipe.dataset:
        return  # which of the two is meant is not known
    place = vocabulary.category_of(dataset)
    if recipe.category and place and place != recipe.category:
        yield "dataset", f"the data of {dataset} is in {place}, the recipe in {recipe.category}"
    rows, held_out = vocabulary.rows_of(dataset)
    usable, most = vocabulary.trainable_rows(dataset), recipe.config.get("max_samples")
    if usable is not None and usable != rows and (most is None or (isinstance(most, int) and most > usable)):
        state = "is missing, so all rows are trained on" if most is None else f"{most} is too much"
        yield (
            "max_samples",
            f"{state}: the rows of {dataset} after the first {usable} stay unseen, to score checkpoints on",
        )


def phase_faults(recipe: Recipe) -> Iterator[Fault]:
    """Keys for saving and resuming that do not fit the phase in the recipe's name."""
    config = recipe.config
    if recipe.phase == "pretrain":
        if config.get("resume_from_checkpoint"):
            yield "resume_from_checkpoint", "a pretrain starts anew; omit it"
        if config.get("save_only_model"):
            yield "save_only_model", "the finetune resumes with the optimizer's state; omit it"
        return
    if recipe.phase != "finetune" and render.phase_of(config) != "finetune":
        return
    if not config.get("resume_from_checkpoint"):
        yield "resume_from_checkpoint", "is missing: a finetune resumes from a checkpoint of its pretrain"
    if config.get("save_steps") != 1:
        yield "save_steps", f"{config.get('save_steps')!r} does not collect every step; set it to 1"
    if config.get("save_only_model") is not True:
        yield "save_only_model", "is not true: every checkpoint would hold the optimizer's state too"
    limit, step = config.get("save_total_limit"), resumed_step(recipe)
    if not is_positive(limit):
        yield "save_total_limit", f"{limit!r} is not how many checkpoints are kept"
    elif step is not None and is_positive(last := config.get("max_steps")) and last < step + limit:
        left = f"{last - step} steps" if last > step else "no step"
        right = f"{step + limit} = the resumed step {step} + save_total_limit {limit}, or more"
        yield "max_steps", f"{last} leaves {left} to collect; set it to {right}"


def header_faults(recipe: Recipe) -> Iterator[Fault]:
    """Commands at the top of the recipe that are for another model, dataset or rank."""
    named = {"MODEL": recipe.short, "DATASET": recipe.dataset, "RANK": str(recipe.config.get("lora_rank", ""))}
    for number, text in recipe.header:
        command = text.lstrip("# ").strip()
        if not recipe.short or not command.startswith("make "):
            continue
        try:
            words = shlex.split(command)[1:]
        except ValueError:
            words = []
        given = dict(word.split("=", 1) for word in words if "=" in word)
        for key, right in named.items():
            if right and key in given and paths.loose(given[key]) != paths.loose(right):
                yield "header", f"line {number} says {key}={given[key]}, the recipe is for {right}"


def pair_faults(recipe: Recipe, read: dict[Path, Recipe]) -> Iterator[Fault]:
    """A recipe without its other half, and where a finetune does not agree with its pretrain."""
    if not recipe.phase:
        return
    other_path = other_half(recipe.path)
    if not other_path.exists():
        yield "its pair", f"{paths.relative(other_path)} is missing"
        return
    if recipe.phase == "pretrain" or other_path not in read:
        return
    pretrain, config = read[other_path], recipe.config
    for key in keys.SAME_IN_PAIR:
        mine, theirs = config.get(key), pretrain.config.get(key)
        if mine != theirs:
            yield key, f"is {mine!r}, in {other_path.name} it is {theirs!r}"
    resumed, run = recipe.resolved("resume_from_checkpoint"), pretrain.resolved("output_dir")
    if resumed is None:
        return
    step = resumed_step(recipe)
    if resumed.parent != run or step is None:
        given = config["resume_from_checkpoint"]
        yield "resume_from_checkpoint", f"{given!r} is no checkpoint-<step> of {other_path.name}'s output_dir"
    elif not is_saved(step, pretrain.config):
        saved = f"save_steps {pretrain.config.get('save_steps')}, max_steps {pretrain.config.get('max_steps')}"
        kept = pretrain.config.get("save_total_limit")
        saved += f", save_total_limit {kept}" if kept else ""
        yield "resume_from_checkpoint", f"step {step} is not there after {other_path.name}: {saved}"


def is_saved(step: int, pretrain: dict[str, Any]) -> bool:
    """Whether a pretrain keeps a checkpoint of a step: it saves every save_steps and at its end, and keeps the last."""
    every, last, kept = (pretrain.get(key) for key in ("save_steps", "max_steps", "save_total_limit"))
    if not is_positive(every) or not is_positive(last):
        return True  # other checks report those keys
    steps = sorted({*range(every, last + 1, every), last})
    return step in (steps[-kept:] if is_positive(kept) else steps)
