"""Estimates of a sweep: the work of its cells, and its end from how far its cells are and how long others took."""

import heapq
from collections.abc import Iterable, Sequence

from paragen.collection import row_hashes, run_identity
from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info
from paragen.recipes import batches, keys
from paragen.recipes.run import Cell, Run
from paragen.training.progress import Progress

BYTES_PER_TOKEN = 4  # of a data file; only how cells compare matters


def seconds_left(running: Sequence[tuple[float, float]], waiting: int, took: Sequence[float]) -> float | None:
    """Estimated seconds until all cells are done; None while nothing is known.

    Waiting cells are given, one after the other, the places of the running ones as these become free. So the last cells
    do not seem to take longer only because fewer run beside them.

    Args:
        running: of each running cell the seconds since it started, and the part of it that is done, from 0 to 1.
        waiting: how many cells have not started.
        took: the seconds that finished cells took.
    """
    known = [*took, *(elapsed / done for elapsed, done in running if done)]
    if not known:
        return None
    usual = sum(known) / len(known)
    left = [elapsed / done - elapsed if done else max(0.0, usual - elapsed) for elapsed, done in running] or [0.0]
    heapq.heapify(left)
    for _ in range(waiting):
        heapq.heapreplace(left, left[0] + usual)
    return max(left)


def part_done(runs: Sequence[Run], present: Progress) -> float:
    """Which part of some runs is trained, from 0 to 1.

    Args:
        runs: those that are trained one after the other. Each counts by its rows, or all the same where one of them
            has no max_steps.
        present: the progress of one of them.
    """
    rows = [rows_of(run) for run in runs]
    rows = rows if all(rows) else [1] * len(runs)
    first = present.run.resumed_step
    part = max(0, present.step - first) / max(1, present.total - first)
    at = runs.index(present.run)
    return min(1.0, (sum(rows[:at]) + part * rows[at]) / sum(rows))


def rows_of(run: Run) -> int:
    """How many rows a run trains, each as often as it is seen; 0 where its recipe has no max_steps."""
    at_a_time, accumulated = batches.rows_and_accumulation(run.config)
    return max(0, keys.value_of(run.config, "max_steps", 0) - run.resumed_step) * at_a_time * accumulated


def works_of(cells: Iterable[Cell]) -> dict[Cell, float]:
    """About how many tokens each cell has to train: its steps times the tokens of a step, in the phases that are left.

    A cell of which that is not known (a broken recipe, missing data) counts as much as the others do on average.
    """
    seen: dict[tuple, tuple[int, float] | None] = {}  # what cells with the same data share
    known = {cell: _work_of(cell, seen) for cell in cells}
    found = [work for work in known.values() if work]
    usual = sum(found) / len(found) if found else 1.0
    return {cell: work or usual for cell, work in known.items()}


def _work_of(cell: Cell, seen: dict[tuple, tuple[int, float] | None]) -> float:
    """The tokens that a cell has to train; 0 where that is not known."""
    work = 0.0
    try:
        pretrain, finetune = cell.runs
        is_left = run_identity.force_requested() or not (pretrain.folder / paths.MANIFEST).is_file()
        for run in [pretrain, finetune] if is_left else [finetune]:
            key = run.data_dir, tuple(run.datasets), run.config.get("max_samples"), run.config.get("cutoff_len")
            if key not in seen:
                seen[key] = _rows_and_length(run)
            rows, length = seen[key] or (0, 0.0)
            work += length * (rows_of(run) or keys.value_of(run.config, "num_train_epochs", 0) * rows)
    except (UserError, KeyError):
        return 0.0
    return work


def _rows_and_length(run: Run) -> tuple[int, float] | None:
    """The rows of a run's datasets, and about how many tokens one has, from the files' sizes; None where they lack."""
    longest = keys.value_of(run.config, "cutoff_len", keys.OMITTED_CUTOFF)
    rows, tokens = 0, 0.0
    try:
        for name in run.datasets:
            path = dataset_info.data_file(name, run.data_dir)
            found = row_hashes.known(path, run.config.get("max_samples"))
            rows += found.rows
            tokens += found.rows * min(longest, path.stat().st_size / max(1, found.rows_in_file) / BYTES_PER_TOKEN)
    except (UserError, KeyError, OSError):
        return None
    return rows, tokens / max(1, rows)
