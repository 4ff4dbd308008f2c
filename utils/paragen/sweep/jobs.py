"""A job is one attempt at a cell. Files beside the run folders record which attempt may publish them."""

import secrets
from dataclasses import replace
from typing import NamedTuple

from paragen.common import files, paths
from paragen.recipes.run import Cell
from paragen.sweep import cell_worker
from paragen.training.outcome import Outcome


class Job(NamedTuple):
    """One attempt at a cell."""

    cell: Cell
    attempt: str  # a random id
    number: int  # 1, or 2 for a second attempt
    halved: bool  # train with half the rows at a time
    pack_key: tuple | None = None  # jobs with the same key can be packed together; None: train it the ordinary way


def new_job(cell: Cell, pack_key: tuple | None) -> Job:
    """The first attempt at a cell."""
    return Job(cell, secrets.token_hex(4), 1, False, pack_key)


def next_job(job: Job, outcome: Outcome) -> Job | None:
    """The attempt that follows `job`, or None where its outcome stands.

    A cell that cannot be packed is trained the ordinary way, which does not count as a second attempt. A first attempt
    that was killed is repeated. One that was out of memory is repeated with half the rows at a time and outside a pack,
    since the packed engine makes packs smaller on its own: this cell was too large even alone.
    """
    if outcome.kind == "not_packable":
        return job._replace(attempt=secrets.token_hex(4), pack_key=None)
    if job.number > 1 or outcome.kind not in ("killed", "out_of_memory"):
        return None
    halved = outcome.kind == "out_of_memory"
    return Job(job.cell, secrets.token_hex(4), 2, halved, None if halved else job.pack_key)


def keep_log(job: Job, outcome: Outcome) -> Outcome:
    """Rename the log of an attempt that another one follows; returns the outcome with the new name."""
    log = cell_worker.log_of(job.cell)
    kept = log.with_name(f"{log.stem}_attempt-{job.number}.log")
    if log.is_file():
        log.replace(kept)
    return replace(outcome, log=paths.relative(kept) if outcome.log else "")


def claim_runs(job: Job) -> bool:
    """Record on disk that this attempt may publish the cell's runs.

    Returns False where another program is training one of them, which would then not be allowed to publish it. A second
    attempt does not check: the program may be the first attempt, which is taken for dead.
    """
    folders = [run.folder for run in job.cell.runs]
    if job.number == 1 and not all(files.is_free(files.beside(folder, "lock")) for folder in folders):
        return False
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(files.beside(folder, "attempt"), job.attempt.encode())
    return True


def release_runs(job: Job) -> None:
    """Remove the record of `claim_runs` of an attempt that ended."""
    for run in job.cell.runs:
        path = files.beside(run.folder, "attempt")
        if path.is_file() and path.read_text() == job.attempt:
            path.unlink()
