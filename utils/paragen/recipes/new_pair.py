"""What a new pair of recipes is for: its model, dataset, category and template, from what a user types."""

import difflib
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.dataset import names
from paragen.model import base_models, model_files
from paragen.recipes import vocabulary
from paragen.recipes.figures_table import read_figures

UP = "../../.."  # from a recipe's folder to the repository


@dataclass
class NewPair:
    """What a pair of recipes is for."""

    short: str  # the model in file names
    folder: str  # the model's folder under models/
    dataset: str
    category: str
    template: str
    lora_target: str
    parameters: int
    processor: bool
    rows: int | None  # of the dataset; None: not known
    usable: int | None  # how many of its first rows may be trained on; None: not known

    def recipe(self, phase: str) -> Path:
        """The path of the recipe of a phase."""
        return paths.SCRIPTS / self.category / self.dataset / f"{self.short}_{self.dataset}_{phase}.yaml"

    def run_folder(self, phase: str, rank: int) -> str:
        """The run folder of a phase, relative to the recipe."""
        return f"{UP}/saves/{self.category}/{self.dataset}/{self.folder}_lora-rank_{rank}_{phase}"


def requested_pair(model: str, dataset: str, template: str | None = None, category: str | None = None) -> NewPair:
    """The pair that a user requests.

    Args:
        model: a short name or a folder's name, without regard to case and punctuation; so is the dataset's name.
        dataset: registered, or listed in data/sources.yaml.
        template: a prompt template; needed for a model that models/models.yaml does not list.
        category: needed for a dataset that is in no category's folder.

    Raises UserError naming the wrong value and the right ones.
    """
    dataset = choose_dataset(dataset)
    place = vocabulary.category_of(dataset)
    if category:
        category = paths.choose(category, paths.CATEGORIES, "category")
        if place and place != category:
            raise UserError(f"CATEGORY={category}: the file of {dataset} lies in data/{place}/; omit CATEGORY")
    category = category or place
    if not category:
        raise UserError(f"dataset {dataset!r} lies in no category; say CATEGORY= one of {', '.join(paths.CATEGORIES)}")
    guess = read_figures()["datasets"].get(dataset, {}).get("rows")
    rows, usable = vocabulary.rows_of(dataset)[0] or guess, vocabulary.trainable_rows(dataset, guess)
    return pair_of(model, dataset, category, template, rows, usable)


def pair_of(
    model: str, dataset: str, category: str, template: str | None, rows: int | None, usable: int | None
) -> NewPair:
    """The pair of a model and a dataset of which everything is known; the dataset need not be registered yet.

    Args:
        model, template: as for `requested_pair`.
        dataset: its exact name.
        category: an exact one.
        rows, usable: as in NewPair.

    Raises UserError for an unknown model or template.
    """
    short, entry = base_models.find_entry(model)
    folder = paths.MODELS / entry["folder"]
    return NewPair(
        short=short,
        folder=entry["folder"],
        dataset=dataset,
        category=category,
        template=choose_template(short, template or entry["template"]),
        lora_target=entry["lora_target"] if short in base_models.table() else lora_target_of(folder),
        parameters=entry["parameters"] or parameters_of(folder),
        processor=bool(entry["processor"]),
        rows=rows,
        usable=usable,
    )


def choose_dataset(typed: str) -> str:
    """The trainable dataset that a user means.

    Raises UserError when there is none, when it is a test split, and when no folder can have its name.
    """
    known = vocabulary.trainable()
    for split in vocabulary.test_splits():
        if paths.loose(split) == paths.loose(typed):
            way_out = f"make recipe DATASET={paths.typed(names.without_split(split))} MODEL=..."
            raise UserError(f"dataset {split!r} {vocabulary.TEST_SPLIT}; {way_out}")
    if not any(paths.loose(name) == paths.loose(typed) for name in known):
        file = shlex.quote(f"{typed}.json")
        way_out = f"register it: make register FILE=data/<category>/{file}"
        near = paths.nearest(typed, known)
        raise UserError(f"dataset {typed!r} is not known{near}; {way_out}; known: {', '.join(known)}")
    name = paths.choose(typed, known, "dataset")
    if not names.is_dataset_name(name):
        raise UserError(
            f"dataset {name!r} cannot be a folder's name; register it under another one: make register NAME=.."
        )
    return name


def choose_template(short: str, typed: str | None) -> str:
    """The template that a user means. Raises UserError with those of similar names when none is given or known."""
    known = sorted(vocabulary.known_templates())
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
    """The six templates whose names are most like a model's or a template's name, nearest first."""
    starts = [paths.loose(name[found.start() :]) for found in re.finditer(r"[A-Za-z]+", name)] or [paths.loose(name)]
    shared = {each: max(len(os.path.commonprefix([start, paths.loose(each)])) for start in starts) for each in known}
    alike = {each: difflib.SequenceMatcher(None, starts[0], paths.loose(each)).ratio() for each in known}
    return sorted(known, key=lambda each: (-shared[each], -alike[each]))[:6]


def lora_target_of(folder: Path) -> str:
    """The lora_target of a model that is not in the table.

    LLaMA-Factory's `all` means every linear layer but the output head; it finds nothing in GPT-2's Conv1D layers.
    """
    config = json.loads((folder / "config.json").read_bytes())
    return base_models.table()["gpt2"]["lora_target"] if config.get("model_type") == "gpt2" else "all"


def parameters_of(folder: Path) -> int:
    """About how many parameters a model has, from the size of its files at 2 bytes each; 0 without weights."""
    return files.size_of(model_files.weight_files(folder)) // 2
