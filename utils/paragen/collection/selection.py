"""Selects run folders by CATEGORY, DATASET, MODEL, RANK and SEED: also those whose manifest cannot be read."""

import shlex
from pathlib import Path
from typing import NamedTuple

from paragen.collection.manifest import read_manifest
from paragen.common import paths, settings
from paragen.common.cli import UserError
from paragen.model import base_models
from paragen.recipes import render


class Place(NamedTuple):
    """What the path of a run folder says; None where it says nothing."""

    category: str | None
    dataset: str | None
    model: str | None
    rank: str | None
    seed: str | None


def place_of(folder: Path | str) -> Place:
    """What a run folder's path says of it: <category>/<dataset>/<model folder>_lora-rank_<rank>[_seed-<seed>]_<phase>.

    Args:
        folder: its path, at least the last three parts of it.
    """
    parts = Path(folder).parts
    category, dataset = parts[-3:-1] if len(parts) >= 3 else (None, None)
    *_, rank = [None, *paths.RANK_PART.finditer(parts[-1])]
    if rank is None:
        return Place(category, dataset, None, None, None)
    return Place(category, dataset, base_models.short_name(Path(parts[-1][: rank.start()])), rank[1], rank[2])


def requested_filters() -> dict[str, list[str]]:
    """The values of CATEGORY, DATASET, MODEL, RANK and SEED, by column; no value selects all.

    Raises UserError for a rank or a seed that cannot be one.
    """
    category = settings.category()
    return {
        "category": [category] if category else [],
        "dataset": settings.values("DATASET"),
        "model": settings.values("MODEL"),
        "rank": [str(render.parse_rank(value)) for value in settings.values("RANK")],
        "seed": [str(render.parse_seed(value)) for value in settings.values("SEED")],
    }


def settings_of(wanted: dict[str, list[str]]) -> str:
    """`requested_filters()` as a user types them: `DATASET=ARC-c RANK='2 8'`; empty where nothing is selected."""
    return " ".join(f"{name.upper()}={shlex.quote(' '.join(values))}" for name, values in wanted.items() if values)


def may_fit(place: Place, wanted: dict[str, list[str]]) -> bool:
    """Whether a run folder may be one of those selected; what its path does not say fits everything."""
    return all(
        not values or held is None or paths.loose(held) in map(paths.loose, values)
        for values, held in ((wanted[name], getattr(place, name)) for name in place._fields)
    )


def _with_seed(folder: Path, place: Place) -> Place:
    """A run folder's place with the seed of its manifest: the path does not say the recipe's own."""
    try:
        manifest = read_manifest(folder)
    except UserError:
        return place  # the command that selects it says what is wrong
    return place._replace(seed=str(manifest.seed)) if manifest and manifest.seed is not None else place


def selected_folders(found: list[Path]) -> list[Path]:
    """Those of some run folders that CATEGORY, DATASET, MODEL, RANK and SEED select, all without them.

    Raises UserError with the known names for one that no folder has, and where none is left.
    """
    wanted = requested_filters()
    places = {folder: _with_seed(folder, place_of(folder)) if wanted["seed"] else place_of(folder) for folder in found}
    for name in ("category", "dataset", "model"):
        known = {value for place in places.values() if (value := getattr(place, name))}
        wanted[name] = [paths.choose(value, known, f"collected {name}") for value in wanted[name]]
    chosen = [folder for folder, place in places.items() if may_fit(place, wanted)]
    if settings_of(wanted) and not chosen:
        raise none_fits(paths.SAVES, wanted)
    return chosen


def none_fits(saves: Path, wanted: dict[str, list[str]]) -> UserError:
    """The error of a selection that no collection below `saves` fits."""
    given = settings_of(wanted)
    what = f"no collection fits {given}" if given else "no collections yet"
    return UserError(f"{paths.relative(saves)}: {what}; make index lists those there are")
