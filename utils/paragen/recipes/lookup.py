"""Finds the recipes and cells below collect_scripts/ that a user names with CATEGORY, DATASET, MODEL, RANK and SEED.

Names are matched without regard to case and punctuation.
"""

from collections.abc import Iterable
from pathlib import Path

from paragen.common import paths, settings
from paragen.common.cli import UserError
from paragen.model import base_models
from paragen.recipes import render
from paragen.recipes.run import Cell


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


def find(dataset: str, model: str, phase: str, scripts: Path | None = None) -> Path:
    """The recipe of a dataset and a model for a phase. Raises UserError with the known names when there is none."""
    known = recipes(scripts)
    dataset = paths.choose(dataset, {key[0] for key in known}, "dataset")
    models = {key[1] for key in known if key[0] == dataset and key[2] == phase}
    return known[dataset, choose_model(model, models, f"a {phase} recipe of {dataset} for the model"), phase]


def find_cell(dataset: str, model: str, rank: int) -> Cell:
    """The cell of a dataset, a model and a rank, by their names (as for `find`)."""
    pretrain, finetune = (find(dataset, model, phase) for phase in paths.PHASES)
    names = finetune.parent.name, finetune.name.removesuffix(f"_{finetune.parent.name}_finetune.yaml")
    return Cell(*names, rank, (pretrain, finetune))


def requested_cells(target: str, phases: tuple[str, ...] = paths.PHASES) -> list[Cell]:
    """The cells that DATASET, MODEL, RANK, SEED and KEEP name, to train one phase or both; CATEGORY may narrow them.

    Args:
        target: the make target, for messages.
        phases: the phases to train. The other half of a pair of recipes need not exist.

    Without MODEL: settings.DEFAULT_MODEL where the dataset has a recipe for it, else its one model. Raises UserError
    with the known names where a name is missing or unknown.
    """
    category, files = settings.category(), recipes()
    known = {
        (dataset, model): Cell(
            dataset, model, settings.DEFAULT_RANK, (_half(path, "pretrain"), _half(path, "finetune"))
        )
        for (dataset, model, phase), path in files.items()
        if phase == phases[0]
        and category in ("", path.parent.parent.name)
        and all((dataset, model, needed) in files for needed in phases)
    }
    names = sorted({dataset for dataset, _ in known})
    datasets = settings.values("DATASET")
    if not datasets:
        raise UserError(f"name a dataset: make {target} DATASET=...; known: {', '.join(names) or 'none yet'}")
    chosen = []
    for dataset in dict.fromkeys(paths.choose(name, names, "dataset") for name in datasets):
        models = {model for one, model in known if one == dataset}
        chosen += [known[dataset, model] for model in _models_of(dataset, models)]
    return _at_ranks_and_seeds(chosen, [settings.DEFAULT_RANK])


def chosen_cells() -> list[Cell]:
    """The cells that CATEGORY, DATASET, MODEL, RANK, SEED and KEEP select; without names all, at SWEEP_RANKS.

    Made tasks are among them where CATEGORY or DATASET names them (settings.takes_made). Those that share a base model
    are adjacent. Raises UserError with the known names for an unknown one.
    """
    pairs = pairs_in(settings.category())
    if not settings.takes_made():
        real = {key: pair for key, pair in pairs.items() if pair[0].parent.parent.name != paths.MADE}
        if not real:
            raise UserError(
                f"collect_scripts: all pairs of recipes are of made tasks; CATEGORY={paths.MADE} takes them"
            )
        pairs = real
    names = {dataset for dataset, _ in pairs}
    wanted = {paths.choose(name, names, "dataset") for name in settings.values("DATASET")} or names
    known_models = {model for dataset, model in pairs if dataset in wanted}
    models = {choose_model(name, known_models, "model") for name in settings.values("MODEL")} or known_models
    chosen = [
        Cell(dataset, model, settings.DEFAULT_RANK, pairs[dataset, model])
        for dataset, model in sorted(pairs, key=lambda pair: (pair[1], pair[0]))
        if dataset in wanted and model in models
    ]
    return _at_ranks_and_seeds(chosen, settings.SWEEP_RANKS)


def with_collected(cells: list[Cell]) -> list[Cell]:
    """Cells, and those of the same recipes at other ranks and seeds of which a run folder is there.

    With RANK or SEED the cells are returned as they are: those are all that was requested.
    """
    if settings.values("RANK") or settings.values("SEED"):
        return cells
    found = dict.fromkeys(cells)
    for cell in {(cell.dataset, cell.model): cell for cell in cells}.values():
        try:
            folders = [run.folder for run in cell.runs]
        except UserError:
            continue  # the cells of this recipe, which are in the list, say so
        for path in sorted(path for parent in {folder.parent for folder in folders} for path in parent.glob("[!.]*")):
            rank, seed = paths.rank_in(path.name) or (None, None)
            if rank and any(paths.with_rank(folder.name, rank, seed) == path.name for folder in folders):
                overrides = () if seed is None else (f"seed={seed}",)
                found[Cell(cell.dataset, cell.model, rank, cell.recipes, overrides, cell.finetune_overrides)] = None
    return sorted(found, key=lambda cell: (cell.model, cell.dataset, cell.overrides, cell.rank))


def choose_model(name: str, known: Iterable[str], what: str) -> str:
    """The one of the known short names that a user means; a folder such as models/Qwen2.5-0.5B-Instruct counts, too."""
    folder = Path(name)
    return paths.choose(base_models.short_name(folder) if folder.parent.name == "models" else name, known, what)


def _models_of(dataset: str, models: set[str]) -> list[str]:
    """The requested models of a dataset, or its default one."""
    if named := settings.values("MODEL"):
        return [choose_model(name, models, f"a recipe of {dataset} for the model") for name in named]
    if settings.DEFAULT_MODEL in models:
        return [settings.DEFAULT_MODEL]
    if len(models) == 1:
        return list(models)
    raise UserError(f"name a model of {dataset}: MODEL=...; known: {', '.join(sorted(models)) or 'none yet'}")


def _at_ranks_and_seeds(cells: list[Cell], default_ranks: Iterable[int]) -> list[Cell]:
    """Cells at the ranks and seeds that RANK and SEED name, with KEEP."""
    ranks = [render.parse_rank(rank) for rank in settings.values("RANK")] or default_ranks
    seeds: list[tuple[str, ...]] = [(f"seed={render.parse_seed(seed)}",) for seed in settings.values("SEED")] or [()]
    keep = settings.number("KEEP")
    kept = (f"save_total_limit={keep}",) if keep else ()
    return [
        Cell(cell.dataset, cell.model, rank, cell.recipes, seed, kept)
        for cell in cells
        for seed in seeds
        for rank in dict.fromkeys(ranks)
    ]


def _half(recipe: Path, phase: str) -> Path:
    """The recipe of the same pair for a phase, whether or not it exists."""
    other = next(each for each in paths.PHASES if recipe.stem.endswith(f"_{each}"))
    return recipe.with_name(f"{recipe.stem.removesuffix(other)}{phase}.yaml")


def pairs_in(category: str) -> dict[tuple[str, str], tuple[Path, Path]]:
    """The recipe pairs (pretrain, finetune) of a category, by (dataset, model); of all categories where it is empty."""
    known = {key: path for key, path in recipes().items() if category in ("", path.parent.parent.name)}
    pairs = {
        (dataset, model): (path, known[dataset, model, "finetune"])
        for (dataset, model, phase), path in known.items()
        if phase == "pretrain" and (dataset, model, "finetune") in known
    }
    if not pairs:
        raise UserError(f"collect_scripts/{category or '*'}: no pair of recipes exists yet")
    return pairs
