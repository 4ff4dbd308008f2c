"""A node's own copy of the repository for sweeps with STAGE=1: its place, and the cells that are trained in it."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from paragen.collection import run_files
from paragen.common import files, locks, paths
from paragen.common.cli import UserError
from paragen.model import base_models
from paragen.recipes.run import Cell
from paragen.sweep import cell_worker


def parent_folder(settings: dict[str, str]) -> Path:
    """The folder below which this node keeps copies of repositories.

    It is STAGE_DIR of the sweep, else of the node, else a folder in the node's temporary one.
    """
    named = settings.get("STAGE_DIR") or os.environ.get("STAGE_DIR")
    return Path(named or locks.temporary_folder() / f"paragen-stage-{os.getuid()}").expanduser().resolve()


def make_private(folder: Path) -> None:
    """Make a folder that only this user can read. Raises UserError where it, or its parent, belongs to someone else."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for part in (folder.parent, folder):
        if part.stat().st_uid != os.getuid():
            raise UserError(f"{part}: belongs to another user; choose a folder with STAGE_DIR")
    folder.chmod(0o700)


def use_as_repository(top: Path) -> None:
    """Let this process take `top` for the repository, as PARAGEN_TOP does for the processes that it starts."""
    paths.ROOT, base_models.TABLE = top, top / base_models.TABLE.relative_to(paths.ROOT)
    base_models.table.cache_clear()


def progress_of(cell: Cell) -> tuple[str, bytes]:
    """The phase of a cell that is being trained, and its trainer log so far."""
    for run in cell.runs:
        for staging in files.companions(run.folder, "staging-"):
            with contextlib.suppress(OSError):
                return run.phase, (staging / run_files.LOG).read_bytes()
    return "", b""


@contextlib.contextmanager
def own_runs(cell: Cell, attempt: str, stopping: threading.Event) -> Iterator[None]:
    """The run folders of a cell for one attempt: nothing of an earlier attempt is used, and nothing is left."""
    folders = [run.folder for run in cell.runs]
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(files.beside(folder, "attempt"), attempt.encode())
        remove_run(folder, stopping)
    try:
        yield
    finally:
        for folder in folders:
            with contextlib.suppress(locks.Busy):
                remove_run(folder, None)
            files.beside(folder, "attempt").unlink(missing_ok=True)
        cell_worker.log_of(cell).unlink(missing_ok=True)


def remove_run(folder: Path, stopping: threading.Event | None) -> None:
    """Remove a run folder and its hidden companions, as soon as no process trains the run.

    Raises locks.Busy where one does and `stopping` is None or gets set.
    """
    while True:
        try:
            with locks.lock(files.beside(folder, "lock")):
                files.recover_folder(folder)
                files.remove_folder(folder)
                return
        except locks.Busy:
            if stopping is None or stopping.wait(1):
                raise
