"""A job is one attempt at a cell. Files beside the run folders (claims) record which attempt may publish them.

An attempt's id begins with that of its sweep, which holds a lock: other sweeps see whether a claim is of a living one.
"""

import secrets
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from paragen.common import files, locks, paths
from paragen.recipes.run import Cell
from paragen.sweep import cell_worker
from paragen.training.outcome import Outcome

SWEEP_DIGITS = 4  # of an attempt's id: those of its sweep


class Job(NamedTuple):
    """One attempt at a cell."""

    cell: Cell
    attempt: str  # 16 hexadecimal digits: its sweep's id, then random ones
    number: int  # 1, or 2 for a second attempt
    halved: bool  # train with half the rows at a time
    pack_key: tuple | None = None  # jobs with the same key can be packed together; None: train it the ordinary way
    packed_with: int = 0  # how many cells its pack had; of a second attempt, the one before


def new_sweep_id() -> str:
    """An id of 4 hexadecimal digits that no running sweep has."""
    while lock_of(sweep_id := secrets.token_hex(2)).exists():
        pass
    return sweep_id


def remove_dead_locks() -> None:
    """Remove the locks of killed sweeps."""
    for lock in paths.SAVES.glob(".sweep-*.lock"):
        if not locks.is_held(lock):
            locks.is_free(lock)


def lock_of(sweep_id: str) -> Path:
    """The lock that a sweep holds while it runs."""
    return paths.SAVES / f".sweep-{sweep_id}.lock"


def new_attempt(sweep_id: str) -> str:
    """The id of a new attempt; long enough to be the only one in a sweep of a million cells (see file_server.py)."""
    return sweep_id + secrets.token_hex(6)


def new_job(cell: Cell, pack_key: tuple | None, sweep_id: str) -> Job:
    """The first attempt at a cell."""
    return Job(cell, new_attempt(sweep_id), 1, False, pack_key)


def next_job(job: Job, outcome: Outcome) -> Job | None:
    """The attempt that follows `job`, or None where its outcome stands.

    A cell that cannot be packed is trained the ordinary way, which does not count as a second attempt. A first attempt
    that was killed is repeated. One that was out of memory is repeated with half the rows at a time and outside a pack,
    since the packed engine makes packs smaller on its own: this cell was too large even alone.
    """
    following = new_attempt(job.attempt[:SWEEP_DIGITS])
    if outcome.kind == "not_packable":
        return job._replace(attempt=following, pack_key=None)
    if job.number > 1 or outcome.kind not in ("killed", "out_of_memory"):
        return None
    halved = outcome.kind == "out_of_memory"
    return Job(job.cell, following, 2, halved, None if halved else job.pack_key, job.packed_with)


def keep_log(job: Job, outcome: Outcome) -> Outcome:
    """Rename the log of an attempt that another one follows; returns the outcome with the new name."""
    log = cell_worker.log_of(job.cell)
    kept = log.with_name(f"{log.stem}_attempt-{job.number}.log")
    if log.is_file():
        log.replace(kept)
    return replace(outcome, log=paths.relative(kept) if outcome.log else "")


def claim_runs(job: Job) -> bool:
    """Record on disk that this attempt may publish the cell's runs.

    Returns False where another program is training one of them, or another running sweep has claimed one: it would then
    not be allowed to publish it. A second attempt does not check: the program may be the first attempt, which is taken
    for dead.
    """
    folders = [run.folder for run in job.cell.runs]
    if job.number == 1 and not all(locks.is_free(files.beside(folder, "lock")) for folder in folders):
        return False
    if job.number == 1 and any(is_claimed_by_another(folder, job.attempt[:SWEEP_DIGITS]) for folder in folders):
        return False
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(files.beside(folder, "attempt"), job.attempt.encode())
    return True


def is_claimed_by_another(folder: Path, sweep_id: str) -> bool:
    """Whether a running sweep other than `sweep_id` has claimed a run folder; a dead one's claim counts for nothing."""
    try:
        owner = files.beside(folder, "attempt").read_text()[:SWEEP_DIGITS]
    except FileNotFoundError:
        return False
    return owner != sweep_id and locks.is_held(lock_of(owner))


def release_runs(job: Job) -> None:
    """Remove the record of `claim_runs` of an attempt that ended."""
    for run in job.cell.runs:
        path = files.beside(run.folder, "attempt")
        if path.is_file() and path.read_text() == job.attempt:
            path.unlink()
