"""Finds the recipes and cells below collect_scripts/ that a user names.

Names are matched without regard to case and punctuation.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.recipes import render
from paragen.recipes.run import Cell

DEFAULT_MODEL = "qwen2.5-0.5b"
RANKS = (2, 4, 8, 16, 64)  # that a sweep collects by default


def recipes(scripts: Path | None = None) -> dict[tuple[str, str, str], Path]:
    """All collect_scripts/<category>/<dataset>/<model>_<dataset>_<phase>.yaml, by (dataset, model, phase)."""
    found: dict[tuple[str, str, str], Path] = {}
    for path in sorted((scripts or paths.SCRIPTS).glob("*/*/*.yaml")):
        dataset = path.parent.name
        for phase in paths.PHASES:
            ending = f"_{dataset}_{phase}.yaml"
            if path.name.endswith(ending) and path.name != ending:
                key = (dataset, path.name.removesuffix(ending), phase)
                if key in found:
                    raise UserError(
                        f"{path}: the same recipe exists as {found[key]}; a dataset belongs to one category"
                    )
                found[key] = path
    return found


def find(dataset: str, model: str | None, phase: str, scripts: Path | None = None) -> Path:
    """The recipe that a user names.

    Without `model`: DEFAULT_MODEL where the dataset has a recipe for it, else its one model. Raises UserError with
    the known names when there is none.
    """
    known = recipes(scripts)
    return known[(*_names(known, dataset, model, phase), phase)]


def find_cell(
    dataset: str, model: str | None, rank: int, overrides: tuple[str, ...] = (), keep: tuple[str, ...] = ()
) -> Cell:
    """The cell that a user names (as for `find`). `keep`: overrides of the finetune only."""
    known = recipes()
    pretrain, finetune = (_names(known, dataset, model, phase) for phase in paths.PHASES)
    return Cell(*finetune, rank, (known[*pretrain, "pretrain"], known[*finetune, "finetune"]), overrides, keep)


def _names(known: dict[tuple[str, str, str], Path], dataset: str, model: str | None, phase: str) -> tuple[str, str]:
    """The named dataset and model, spelled as in the recipes' file names."""
    if not dataset:
        names = ", ".join(sorted({key[0] for key in known}))
        raise UserError(f"name a dataset: make {phase} DATASET=...; known: {names}")
    dataset = paths.choose(dataset, {key[0] for key in known}, "dataset")
    models = {key[1] for key in known if key[0] == dataset and key[2] == phase}
    if model:
        return dataset, paths.choose(model, models, f"a {phase} recipe of {dataset} for the model")
    if DEFAULT_MODEL in models:
        return dataset, DEFAULT_MODEL
    if len(models) == 1:
        return dataset, models.pop()
    raise UserError(f"name a model of {dataset}: MODEL=...; known: {', '.join(sorted(models)) or 'none yet'}")


def chosen_cells(category: str, datasets: Iterable[str]) -> list[Cell]:
    """The cells that a user selects; those that share a base model are adjacent.

    Args:
        category: its name; an empty text selects all.
        datasets: their names; none selects all.

    MODELS or MODEL selects models, RANKS ranks. Raises UserError with the known names for an unknown one.
    """
    pairs = pairs_in(category)
    names = {dataset for dataset, _ in pairs}
    wanted = {paths.choose(name, names, "dataset") for name in datasets} or names
    known_models = {model for dataset, model in pairs if dataset in wanted}
    named = (os.environ.get("MODELS") or os.environ.get("MODEL") or "").split()
    models = {paths.choose(name, known_models, "model") for name in named} or known_models
    ranks = [render.parse_rank(rank) for rank in os.environ.get("RANKS", "").split()] or RANKS
    return [
        Cell(dataset, model, rank, pairs[dataset, model])
        for dataset, model in sorted(pairs, key=lambda pair: (pair[1], pair[0]))
        if dataset in wanted and model in models
        for rank in dict.fromkeys(ranks)
    ]


def pairs_in(category: str) -> dict[tuple[str, str], tuple[Path, Path]]:
    """The recipe pairs (pretrain, finetune) of a category, by (dataset, model); of all categories where it is empty."""
    if category:
        category = paths.choose(category, paths.CATEGORIES, "category")
    known = {key: path for key, path in recipes().items() if category in ("", path.parent.parent.name)}
    pairs = {
        (dataset, model): (path, known[dataset, model, "finetune"])
        for (dataset, model, phase), path in known.items()
        if phase == "pretrain" and (dataset, model, "finetune") in known
    }
    if not pairs:
        raise UserError(f"collect_scripts/{category or '*'}: no pair of recipes exists yet")
    return pairs
