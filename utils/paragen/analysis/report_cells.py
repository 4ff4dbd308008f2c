"""The cells on the report: each pair of recipes at each rank, and at the seeds that were collected; how each stands."""

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from paragen.analysis import report_data
from paragen.collection import selection
from paragen.common import paths, settings
from paragen.common.cli import UserError
from paragen.model import base_models
from paragen.recipes import lookup
from paragen.recipes.run import Cell
from paragen.training import status

OUTSIDE = "belongs to no cell: no pair of recipes here makes it"
Place = tuple[int, int | None]  # a rank, and a seed where it is not the recipe's own


class CellState(NamedTuple):
    """A cell and how it stands."""

    category: str
    cell: Cell
    seed: int | None  # None: the recipe's own
    folder: str | None  # the collection's place, as `real_place` writes it; None where the recipe cannot be rendered
    state: str
    reason: str


def states_of(found: list[Path], wanted: dict[str, list[str]]) -> tuple[list[CellState], str]:
    """The cells that are selected, with the state of each.

    Args:
        found: the folders of the collections that are there, whole or not.
        wanted: the selection, as `selection.requested_filters()` returns it.

    Each pair of recipes, but for made tasks that are neither named nor collected, has a cell at each usual rank, and
    one for each rank and seed that was collected. Ranks and seeds that are selected replace these. Returns (the cells,
    why there are none: a line, or an empty text).
    """
    collected: dict[str, set[Place]] = {}
    for folder in found:
        if place := paths.rank_in(folder.name):
            collected.setdefault(without_place(folder), set()).add(place)
    try:
        pairs = lookup.pairs_in("")
    except UserError as error:  # without recipes, the collections are all there is
        return [], report_data.without_places(str(error), paths.SAVES)
    states = []
    for (dataset, model), recipes in sorted(pairs.items()):
        category = recipes[1].parent.parent.name
        if not selection.may_fit(selection.Place(category, dataset, None, None, None), wanted):
            continue
        first = Cell(dataset, model, settings.SWEEP_RANKS[0], recipes)
        models, key = names_of(first)
        if category == paths.MADE and key not in collected and not settings.takes_made():
            continue
        if any(selection.may_fit(selection.Place(None, None, name, None, None), wanted) for name in models):
            for rank, seed in places_of(collected.get(key, set()), wanted):
                overrides = () if seed is None else (f"seed={seed}",)
                cell = Cell(dataset, model, rank, recipes, overrides)
                states.append(state_of(category, first if cell == first else cell, seed))  # `first` is rendered already
    return states, ""


def names_of(cell: Cell) -> tuple[set[str], str]:
    """The names of a cell's model, as recipes and as collections call it, and its run folder `without_place` (empty for
    a recipe that cannot be rendered; the state of its cells says why)."""
    try:
        run = cell.finetune
    except UserError:
        return {cell.model}, ""
    return {cell.model, base_models.short_name(run.base)}, without_place(run.resolve(run.config["output_dir"]))


def without_place(folder: Path) -> str:
    """A run folder's path without rank and seed, by which a pair of recipes finds its collections. Links above it are
    followed, since `saves/` may be one."""
    return paths.with_rank(os.path.join(os.path.realpath(folder.parent), folder.name), 0, 0)


def places_of(collected: set[Place], wanted: dict[str, list[str]]) -> list[Place]:
    """The ranks and seeds at which a pair of recipes has a cell; the recipe's own seed first."""
    ranks = {int(rank) for rank in wanted["rank"]}
    usual = ranks or {*settings.SWEEP_RANKS, *(rank for rank, _ in collected)}
    if wanted["seed"]:
        places: set[Place] = {(rank, int(seed)) for rank in usual for seed in wanted["seed"]}
    else:
        others = {(rank, seed) for rank, seed in collected if seed is not None and (rank in ranks or not ranks)}
        own = ranks or {*settings.SWEEP_RANKS, *(rank for rank, seed in collected if seed is None)}
        places = {*others, *((rank, None) for rank in own)}
    return sorted(places, key=lambda place: (place[1] is not None, place[1] or 0, place[0]))


def state_of(category: str, cell: Cell, seed: int | None) -> CellState:
    """The state of one cell."""
    state, reason = status.state_of(cell)
    try:
        folder = real_place(cell.finetune.folder)
    except UserError:  # a recipe that cannot be rendered; the reason says so
        folder = None
    return CellState(category, cell, seed, folder, state, reason)


def real_place(folder: Path) -> str:
    """A run folder's path without links: a run folder may be a link to a larger disk."""
    return os.path.realpath(folder)


def grid(states: list[CellState], by_folder: dict[str, dict]) -> list[dict[str, Any]]:
    """The rows of the grid, by descending size: category, dataset, model, seed, bytes, cells by rank."""
    rows: dict[tuple, dict] = {}
    for category, cell, seed, folder, state, reason in states:
        key = (cell.dataset, cell.model, seed)
        names = {"category": category, "dataset": cell.dataset, "model": cell.model, "seed": seed}
        row = rows.setdefault(key, {**names, "bytes": 0, "cells": {}})
        there = by_folder.get(folder) if folder else None
        row["cells"][cell.rank] = {
            "state": there["state"] if there else state,
            "reason": there["reason"] if there else report_data.without_places(reason, paths.SAVES),
            "bytes": there["bytes"] if there else 0,
            "id": there["id"] if there else None,
            "anchor": there["anchor"] if there and there["kept"] else None,  # a broken one has nothing to open
        }
        row["bytes"] += there["bytes"] if there else 0
    return sorted(rows.values(), key=lambda row: (-row["bytes"], report_data.in_order(row)))


def balance(found: list[dict], pairs: list[dict]) -> str:
    """How many of the whole collections belong to cells, and how these stand, in a sentence; empty without any."""
    whole = [row for row in found if row["kept"]]
    if not whole:
        return ""
    inside = {cell["id"] for pair in pairs for cell in pair["cells"].values()}
    states = Counter(row["state"] for row in whole if row["id"] in inside)
    outside = sum(row["id"] not in inside for row in whole)
    parts = [f"{count:,} {state}" for state, count in sorted(states.items())]
    texts = [f"in cells {sum(states.values()):,} ({', '.join(parts)})"] if parts else []
    texts += [f"outside of cells {outside:,}, since no pair of recipes here makes them"] if outside else []
    return f"Collections: {'; '.join(texts)}."
