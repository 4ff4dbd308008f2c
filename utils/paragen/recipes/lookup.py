"""Finds the recipe of a cell among those under collect_scripts/, from what a user types.

    DATASET=arcc MODEL=qwen2.5-0.5b python utils/cells.py pretrain      prints the recipe's path

DATASET and MODEL are matched without case and punctuation. Without MODEL: qwen2.5-0.5b where the dataset has a recipe
for it, else the one model that it has.
"""

from pathlib import Path

from paragen.common import paths
from paragen.common.cli import UserError

DEFAULT_MODEL = "qwen2.5-0.5b"


def recipes(scripts: Path | None = None) -> dict[tuple[str, str, str], Path]:
    """All collect_scripts/<category>/<dataset>/<model>_<dataset>_<phase>.yaml, by (dataset, model, phase)."""
    found = {}
    for path in sorted((scripts or paths.SCRIPTS).glob("*/*/*.yaml")):
        dataset = path.parent.name
        for phase in paths.PHASES:
            ending = f"_{dataset}_{phase}.yaml"
            if path.name.endswith(ending) and path.name != ending:
                key = (dataset, path.name.removesuffix(ending), phase)
                if key in found:
                    raise UserError(
                        f"{path}: the same recipe stands at {found[key]}; a dataset belongs to one category"
                    )
                found[key] = path
    return found


def find(dataset: str, model: str | None, phase: str, scripts: Path | None = None) -> Path:
    """The recipe that is meant. Raises UserError listing the right values when there is none."""
    known = recipes(scripts)
    if not dataset:
        raise UserError(
            f"say which dataset: make {phase} DATASET=...; known: {', '.join(sorted({key[0] for key in known}))}"
        )
    dataset = paths.choose(dataset, {key[0] for key in known}, "dataset")
    models = {key[1] for key in known if key[0] == dataset and key[2] == phase}
    if model:
        model = paths.choose(model, models, f"a {phase} recipe of {dataset} for the model")
    elif DEFAULT_MODEL in models:
        model = DEFAULT_MODEL
    elif len(models) == 1:
        model = models.pop()
    else:
        raise UserError(f"say which model of {dataset}: MODEL=...; known: {', '.join(sorted(models)) or 'none yet'}")
    return known[dataset, model, phase]
