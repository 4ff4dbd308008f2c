"""Removes what killed attempts at a run left, where the run is complete and no attempt follows that would do so."""

import contextlib

from paragen.common import files, locks, paths
from paragen.recipes import render
from paragen.recipes.run import Cell, Run


def remove(cell: Cell) -> None:
    """Remove the left-overs of both runs of a complete cell. What another process uses stays."""
    for run in cell.runs:
        remove_of(run)


def remove_of(run: Run) -> None:
    """Remove locks, staging folders, rendered recipe and claim that killed attempts at a complete run left."""
    rendered = render.temporary_path(run.recipe, run.config)
    if not files.companions(run.folder, "") and not rendered.exists():
        return
    lock = files.beside(run.folder, "lock")
    if locks.is_held(lock):
        return
    with contextlib.suppress(locks.Busy), locks.lock(lock), locks.lock(rendered):
        files.recover_folder(run.folder)
        drop_old_claim(run)


def drop_old_claim(run: Run) -> None:
    """Remove a sweep's claim on a run that was published after it: no attempt needs it any more.

    A claim that is younger than the run is of a sweep that does the run again. Call it with the run's lock held.
    """
    claim = files.beside(run.folder, "attempt")
    with contextlib.suppress(FileNotFoundError):
        if claim.stat().st_mtime < (run.folder / paths.MANIFEST).stat().st_mtime:
            claim.unlink()
