"""The state of a cell: missing, pretrained, collecting, complete, stale or broken.

Files are compared by their names and lengths, and inputs that did not change since they were hashed are not read.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from paragen.collection import discovery, run_identity
from paragen.collection.discovery import State
from paragen.common import cli, files, locks, paths
from paragen.common.cli import UserError, say
from paragen.recipes.run import Cell, Run
from paragen.training import left_overs, progress

STATES = ("complete", "collecting", "pretrained", "stale", "broken", "missing")  # in the order of the summary


class CellState(NamedTuple):
    """How a cell stands: `name` is one of STATES; `reason` says more, empty where there is no more to say."""

    name: str
    reason: str = ""


def state_of(cell: Cell) -> CellState:
    """The state of a cell. The reason of a stale or broken one says what is wrong, and how to mend what is broken."""
    try:
        if any(locks.is_held(files.beside(run.folder, "lock")) for run in cell.runs):
            return CellState("collecting", str(progress.progress_of(cell) or ""))
        return compare(cell)
    except UserError as error:
        return CellState("broken", str(error))


def compare(cell: Cell) -> CellState:
    """The state of a cell, whether or not it is being trained right now.

    A complete collection needs no pretrain run, but one that is there must not be stale. Raises UserError where
    recipes, manifests or the base model are broken.
    """
    # both are rendered first, so that a mistake in a recipe is reported before a missing model
    pretrain, finetune = cell.runs
    collection = run_state(finetune)
    if collection.name == "unknown":
        name, way_out = paths.relative(finetune.folder), f"make clean-checkpoints DATASET={paths.typed(cell.dataset)}"
        return CellState("broken", f"{name} has no manifest.json; make a collection of a stock run with: {way_out}")
    if collection.name == "stale":
        return CellState("stale", collection.reason)
    if collection.name == "broken":
        return CellState("broken", f"{collection.reason}; mend it with: {command_of(cell)}")
    start = run_state(pretrain)
    if start.name == "stale":
        return CellState("stale", f"its pretrain run: {start.reason}")
    if collection.name == "complete":
        gone = ", ".join(collection.uncompared)
        return CellState("complete", f"not here, so not compared: {gone}" if gone else "")
    if start.name == "unknown":
        way_out = "make finetune goes on from a stock run; move anything else away"
        return CellState("broken", f"{paths.relative(pretrain.folder)} has no manifest.json; {way_out}")
    if start.name == "broken":
        return CellState("broken", f"its pretrain run: {start.reason}; mend it with: {command_of(cell)}")
    return CellState("pretrained" if start.name == "complete" else "missing")


def run_state(run: Run) -> State:
    """How a run's folder compares with what it would train. Raises UserError as `run_identity.quick_identity_of`."""
    if not run.folder.exists():
        return State("missing", [], None)
    return discovery.state_of(run.folder, run_identity.quick_identity_of(run))


def is_done(cell: Cell) -> bool:
    """Whether nothing is left to train of a cell. Raises as `compare`."""
    return compare(cell).name == "complete"


def is_complete(cell: Cell, phases: tuple[str, ...] = paths.PHASES) -> bool:
    """Whether nothing is left to train of some phases of a cell; if so, prints that. With FORCE=1 there always is.

    What killed attempts at a complete cell left is removed.

    Raises UserError as `compare`.
    """
    if len(phases) == 1:
        return is_run_complete(cell.run(phases[0]))
    if run_identity.force_requested() or not is_done(cell):
        return False
    left_overs.remove(cell)
    say_complete(cell.finetune)
    return True


def is_run_complete(run: Run) -> bool:
    """Whether a run is complete and nothing is left of a killed attempt at it; if so, prints that.

    This is the quick answer for a call that has nothing to do; `attempts.begin` gives the whole one, with errors.
    Raises UserError as `run_identity.quick_identity_of`.
    """
    if run_identity.force_requested() or files.companions(run.folder, ""):
        return False
    state = run_state(run)
    if state.name != "complete" or state.manifest is None or state.manifest.phase != run.phase:
        return False
    left_overs.remove_of(run)  # a rendered recipe
    say_complete(run)
    return True


def say_complete(run: Run) -> None:
    """Print that a run is complete, and how that was found out."""
    say(f"complete: {paths.relative(run.folder)} (by names and sizes; make verify re-reads)")


def command_of(cell: Cell) -> str:
    """The command that collects a cell."""
    given = dict(text.split("=", 1) for text in (*cell.overrides, *cell.finetune_overrides))
    parts = [f"make collect DATASET={paths.typed(cell.dataset)} MODEL={paths.typed(cell.model)} RANK={cell.rank}"]
    parts += [f"{name}={given[key]}" for key, name in (("seed", "SEED"), ("save_total_limit", "KEEP")) if key in given]
    return " ".join(parts)


# -------------------------------------------------------------------------------------------------------- of many cells


def states_of(cells: Iterable[Cell]) -> dict[Cell, CellState]:
    """The state of each cell, in their order."""
    return {cell: state_of(cell) for cell in cells}


def count(states: Iterable[CellState]) -> dict[str, int]:
    """How many cells there are in each state, without states of none."""
    counts = Counter(state.name for state in states)
    return {name: counts[name] for name in STATES if counts[name]}


def show(states: dict[Cell, CellState], with_missing: bool) -> None:
    """Print a table of states, what there is to say about single cells, and a summary line.

    Args:
        states: as `states_of` returns them.
        with_missing: also show datasets, models and ranks of which nothing is there.
    """
    shown = {cell: state for cell, state in states.items() if with_missing or state.name != "missing"}
    pairs = dict.fromkeys((cell.dataset, cell.model) for cell in shown)
    columns = sorted({(cell.rank, cell.overrides) for cell in shown})
    named = {(cell.dataset, cell.model, cell.rank, cell.overrides): state.name for cell, state in states.items()}
    if shown:
        heads = [" ".join((f"rank {rank}", *overrides)) for rank, overrides in columns]
        rows = [(*pair, *(named.get((*pair, *column), "") for column in columns)) for pair in pairs]
        cli.print_table(("dataset", "model", *heads), rows)
    for line in reason_lines(shown):
        say(line)
    summary = ", ".join(f"{number} {name}" for name, number in count(states.values()).items())
    hidden = "" if with_missing or len(shown) == len(states) else "; ALL=1 shows the missing ones, too"
    say(f"{len(states)} cells: {summary}{hidden}")


def reason_lines(states: dict[Cell, CellState]) -> list[str]:
    """A line per reason, with the cell that it is about, or the first one and how many more; one per running cell."""
    groups: dict[tuple[CellState, Cell | None], list[Cell]] = {}
    for cell, state in states.items():
        if state.reason:
            groups.setdefault((state, cell if state.name == "collecting" else None), []).append(cell)
    return [
        f"{state.name}: {cells[0]}{f' and {len(cells) - 1} more' if len(cells) > 1 else ''}: {state.reason}"
        for (state, _), cells in groups.items()
    ]


def content_of(states: dict[Cell, CellState]) -> dict[str, Any]:
    """The states of cells as a JSON object for programs."""
    cells = [{**cell_content(cell), "state": name, "reason": reason} for cell, (name, reason) in states.items()]
    return {"cells": cells, "summary": count(states.values())}


def cell_content(cell: Cell) -> dict[str, Any]:
    """What names a cell, as a JSON object; `folder`, relative to the repository, is null where its recipe is broken."""
    try:
        folder, seed = paths.relative(cell.finetune.folder), cell.finetune.seed
    except UserError:  # the cell's state says what is wrong with the recipe
        folder, seed = None, None
    return {
        "category": cell.recipes[1].parent.parent.name,
        "dataset": cell.dataset,
        "model": cell.model,
        "rank": cell.rank,
        "seed": seed,
        "folder": folder,
    }
