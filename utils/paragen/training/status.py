"""How every cell stands: missing, pretrained, collecting, complete, stale or broken.

    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANKS="2 8"] python utils/status.py        (make status)

Reads recipes, run folders and their manifests; writes nothing. A cell is a dataset, a model and a rank.
"""

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from paragen.collection import discovery, run_files, run_identity
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.recipes import lookup, render

RANKS = (2, 4, 8, 16, 64)


class Cell(NamedTuple):
    """What is collected together: the recipe pair of a dataset and a model, at a rank."""

    dataset: str
    model: str
    rank: int
    pretrain: Path
    finetune: Path

    def __str__(self) -> str:
        return f"{self.dataset} {self.model} rank {self.rank}"


def chosen_cells(category: str, datasets: Iterable[str]) -> list[Cell]:
    """The cells of a category (empty: all) and of some datasets (none: all), for MODELS or MODEL and RANKS.

    Names are matched without case and punctuation. Cells that share a base model stand together. Raises UserError for a
    value that is not known, listing the right ones.
    """
    pairs = pairs_in(category)
    names = {dataset for dataset, _ in pairs}
    wanted = {paths.choose(name, names, "dataset") for name in datasets} or names
    known_models = {model for dataset, model in pairs if dataset in wanted}
    asked = (os.environ.get("MODELS") or os.environ.get("MODEL") or "").split()
    models = {paths.choose(name, known_models, "model") for name in asked} or known_models
    ranks = [render.parse_rank(rank) for rank in os.environ.get("RANKS", "").split()] or RANKS
    return [
        Cell(dataset, model, rank, *pairs[dataset, model])
        for dataset, model in sorted(pairs, key=lambda pair: (pair[1], pair[0]))
        if dataset in wanted and model in models
        for rank in dict.fromkeys(ranks)
    ]


def pairs_in(category: str) -> dict[tuple[str, str], tuple[Path, Path]]:
    """The recipe pairs (pretrain, finetune) of a category, by (dataset, model); all categories' where none is named."""
    if category:
        category = paths.choose(category, paths.CATEGORIES, "category")
    recipes = {key: path for key, path in lookup.recipes().items() if category in ("", path.parent.parent.name)}
    pairs = {
        (dataset, model): (path, recipes[dataset, model, "finetune"])
        for (dataset, model, phase), path in recipes.items()
        if phase == "pretrain" and (dataset, model, "finetune") in recipes
    }
    if not pairs:
        raise UserError(f"collect_scripts/{category or '*'}: no pair of recipes there yet")
    return pairs


def state_of(cell: Cell) -> tuple[str, str]:
    """How a cell stands and, where there is more to say, why: (state, reason)."""
    try:
        pretrain, folder = run_folders(cell)
        if any(files.is_held(files.beside(run, "lock")) for run in (pretrain, folder)):
            return "collecting", progress_of(cell)
        if not folder.exists():
            return ("pretrained" if (pretrain / paths.MANIFEST).is_file() else "missing"), ""
        config = render.render(cell.finetune, cell.rank)
        state, changed = discovery.state_of(folder, run_identity.identity_of(cell.finetune, config))
    except UserError as error:
        return "broken", str(error)
    if state == "unknown":
        return "broken", f"{paths.relative(folder)} has no manifest.json"
    return state, "; ".join(changed)


def progress_of(cell: Cell) -> str:
    """How far the run in progress of a cell is, from the log in its staging folder; empty where there is none yet."""
    for phase, folder in zip(paths.PHASES, run_folders(cell), strict=True):
        for staging in files.companions(folder, "staging-"):
            try:
                last = json.loads((staging / run_files.LOG).read_text(encoding="utf-8").splitlines()[-1])
                loss = f", loss {last['loss']:.4f}" if "loss" in last else ""
                left = f", {last['remaining_time']} left" if "remaining_time" in last else ""
                return f"{phase} step {last['current_steps']} of {last['total_steps']}{loss}{left}"
            except (OSError, IndexError, ValueError, KeyError):
                return f"{phase} starting"  # no whole line yet, or it ended just now
    return ""


@functools.cache  # a sweep asks often, and must know them to its end, whatever becomes of the recipe meanwhile
def run_folders(cell: Cell) -> tuple[Path, Path]:
    """The pretrain and the finetune run folder of a cell. Raises UserError for a broken recipe."""
    pretrain = render.run_folder(cell.pretrain, render.render(cell.pretrain, cell.rank))
    return pretrain, render.run_folder(cell.finetune, render.render(cell.finetune, cell.rank))
