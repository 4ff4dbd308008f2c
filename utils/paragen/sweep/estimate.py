"""Estimates when a sweep ends, from how far its running cells are and how long the finished ones took."""

import heapq
from collections.abc import Sequence

from paragen.recipes import batches
from paragen.recipes.run import Run
from paragen.training.progress import Progress


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
    return max(0, run.config.get("max_steps", 0) - run.resumed_step) * at_a_time * accumulated
