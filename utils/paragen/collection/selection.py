"""Selects run folders by CATEGORY, DATASET, MODEL, RANK and SEED: also those whose manifest cannot be read."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from paragen.collection.manifest import read_manifest
from paragen.common import paths, settings
from paragen.common.cli import UserError
from paragen.model import base_models
from paragen.recipes import render

if TYPE_CHECKING:
    import pyarrow as pa


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


def places_in(table: "pa.Table") -> dict[str, Place]:
    """What the rows of an index say of each collection, by its name; an empty text where its manifest does not know."""
    keys = ["collection", *Place._fields]
    rows = table.group_by(keys).aggregate([]).to_pylist()
    texts = [{key: "" if row[key] is None else str(row[key]) for key in keys} for row in rows]
    return {row.pop("collection"): Place(**row) for row in texts}


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

    Raises UserError for a name, a rank or a seed that no folder has, and where none is left.
    """
    wanted = requested_filters()
    places = {folder: _with_seed(folder, place_of(folder)) if wanted["seed"] else place_of(folder) for folder in found}
    for name in ("category", "dataset", "model"):
        known = {value for place in places.values() if (value := getattr(place, name))}
        wanted[name] = [paths.choose(value, known, f"collected {name}") for value in wanted[name]]
    chosen = [folder for folder, place in places.items() if may_fit(place, wanted)]
    if settings_of(wanted) and not chosen:
        raise none_fits(paths.SAVES, wanted)
    require_each((places[folder] for folder in chosen), wanted, paths.SAVES)
    return chosen


def require_each(places: Iterable[Place], wanted: dict[str, list[str]], where: Path | str) -> None:
    """Raise UserError naming the requested ranks, or else seeds, that none of the selected run folders has.

    Args:
        places: what is known of each selected one; one whose rank or seed is not known may have any.
        wanted: the selection.
        where: the folder that holds the run folders, or a repository's name.
    """
    places = list(places)
    for name in ("rank", "seed"):
        each = {value: {**wanted, name: [value]} for value in wanted[name]}
        missing = [value for value, one in each.items() if not any(may_fit(place, one) for place in places)]
        if missing:
            raise none_fits(where, {**wanted, name: missing})


def none_fits(where: Path | str, wanted: dict[str, list[str]]) -> UserError:
    """The error of a selection that no collection fits, below a folder or in a repository of this name."""
    given = settings_of(wanted)
    what = f"no collection fits {given}" if given else "no collections yet"
    if isinstance(where, str):
        return UserError(f"{where}: {what}")
    return UserError(f"{paths.relative(where)}: {what}; make index lists those there are")
