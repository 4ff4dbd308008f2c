"""One slot of a sweep: makes cells verified collections, in processes forked from one that has imported already.

sweep.py runs it as a Ray actor; it lives as long as the sweep. A cell alone gets a process per phase; the cells of a
pack are trained together by packed_train.py. Each cell's output goes to a log beside its run folder; what the training
of a pack prints, to that of its first cell.
"""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from paragen.collection import run_identity, verify
from paragen.common import cli, files, paths
from paragen.common.cli import UserError
from paragen.packed import packed_train
from paragen.recipes.run import Cell, Run
from paragen.sweep import forked
from paragen.training import engines, ordinary, outcome
from paragen.training.outcome import DONE, STOPPED, Outcome


class CellWorker:
    """One slot.

    Args:
        settings: environment variables for every run: FORCE, PRUNE_PRETRAIN, OMP_NUM_THREADS and the like.
        devices: what DEVICES is set to; None: the GPUs that CUDA_VISIBLE_DEVICES gives to this process.
    """

    def __init__(self, settings: dict[str, str], devices: str | None):
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "") if devices is None else devices
        self.settings = {**settings, "DEVICES": given}
        self.process: ForkServerProcess | None = None
        self.stopping = threading.Event()
        os.environ.update(self.settings)
        forked.preload()

    def ready(self) -> str:
        """Where this worker runs."""
        return os.uname().nodename

    def collect(self, pack: list[tuple[Cell, str]], packed: bool, smaller: bool) -> list[Outcome]:
        """Do what is missing of some cells.

        Args:
            pack: the cells, each with an id of this attempt at it; only the latest attempt at a run may give it its
                name.
            packed: all together, through the packed engine; else one after the other.
            smaller: with half the rows at a time, accumulated twice as often; not for the packed engine.

        Returns the outcome of each.
        """
        if packed:
            return self._collect_together(pack)
        return [self._collect_alone(cell, attempt, smaller) for cell, attempt in pack]

    def _collect_alone(self, cell: Cell, attempt: str, smaller: bool) -> Outcome:
        started = time.monotonic()
        try:
            log = log_of(cell)
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(b"")
            ended = self._collect(cell, attempt, smaller, log)
        except UserError as error:
            ended = outcome.outcome_of(error)
        return replace(ended, seconds=time.monotonic() - started)

    def _collect(self, cell: Cell, attempt: str, smaller: bool, log: Path) -> Outcome:
        for run in cell.runs:
            if not run_identity.force_asked() and packed_train.is_done(cell):
                # removes the lock file of a run that was killed after it had given its collection its name
                files.is_free(files.beside(cell.finetune.folder, "lock"))
                break
            ended = self._run(ordinary.train, (run, smaller), {"PARAGEN_ATTEMPT": attempt}, log)
            if not ended.is_done:
                return ended
            if not run.collects:
                self.finished(cell, run)
        return self._wind_up(cell, log)

    def _wind_up(self, cell: Cell, log: Path, verified: bool = False) -> Outcome:
        """The end of a cell whose runs are there: verify it, unless it was, and hand it over."""
        if not verified:
            ended = self._run(verify_runs, ([cell.finetune],), {}, log)
            if not ended.is_done:
                return ended
        self.finished(cell, cell.finetune)
        if cli.is_on("PRUNE_PRETRAIN"):
            prune(cell.pretrain.folder)
        return DONE

    def _collect_together(self, pack: list[tuple[Cell, str]]) -> list[Outcome]:
        started = time.monotonic()
        cells = [cell for cell, _ in pack]
        logs = [log_of(cell) for cell in cells]
        for log in logs:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"packed with {cells[0]}, log in {paths.relative(logs[0])}\n" if log != logs[0] else "")
        ended = self._train_together(cells, {"PARAGEN_ATTEMPT": ",".join(attempt for _, attempt in pack)}, logs[0])
        verified = self._verify_together([cell for cell in cells if cell not in ended], logs[0])
        outcomes = []
        for cell, log in zip(cells, logs, strict=True):
            try:
                if (cell.pretrain.folder / paths.MANIFEST).is_file():
                    self.finished(cell, cell.pretrain)
                became = ended[cell] if cell in ended else self._wind_up(cell, log, verified)
            except UserError as error:
                became = outcome.outcome_of(error)
            outcomes.append(replace(became, seconds=time.monotonic() - started))
        return outcomes

    def _train_together(self, cells: list[Cell], settings: dict[str, str], log: Path) -> dict[Cell, Outcome]:
        """Train cells in one process; the outcomes of those that are no collections after it."""
        ended: dict[Cell, Outcome] = {}
        waiting = cells
        while waiting and not self.stopping.is_set():
            whole, results = self._run_packed(waiting, settings, log)
            running = []
            for number, cell in enumerate(waiting):
                result = results.get(number)
                if result is None:  # the process ended before it was through
                    ended[cell] = whole if whole.kind == "killed" else crash(whole)
                elif result.kind == "running":
                    running.append(cell)
                elif result.kind == "not_packable":
                    cause = f"not for the packed engine: {result.cause}; it is trained the ordinary way"
                    ended[cell] = replace(result, cause=cause)
                elif not result.is_done:
                    ended[cell] = replace(result, log=paths.relative(log))
            waiting = running
            if running:
                self.stopping.wait(1)
        return ended | dict.fromkeys(waiting, STOPPED)

    def _verify_together(self, cells: list[Cell], log: Path) -> bool:
        """Whether all of some cells verify, read by one process; where not, each alone shows which does not."""
        return len(cells) > 1 and self._run(verify_runs, ([cell.finetune for cell in cells],), {}, log).is_done

    def _run_packed(self, cells: list[Cell], settings: dict[str, str], log: Path) -> tuple[Outcome, dict[int, Outcome]]:
        """Train cells with the packed engine: the outcome of the process, and of each cell that it finished."""
        with tempfile.TemporaryDirectory(prefix="paragen-") as folder:
            results = Path(folder, "results")
            return self._fork(train_packed, (cells, results), settings, log), packed_train.read_results(results)

    def finished(self, cell: Cell, run: Run) -> None:
        """Called when a run folder is whole on this worker's disk (see stage.py)."""

    def _run(self, task: Callable[..., None], arguments: tuple, settings: dict[str, str], log: Path) -> Outcome:
        """Run a task to its end in a process of its own; waits while another process trains the same run."""
        while not self.stopping.is_set():
            ended = self._fork(task, arguments, settings, log)
            if ended.kind != "running":
                return ended
            # another terminal's process, or one that outlived its killed parent, is at work on it
            self.stopping.wait(1)
        return STOPPED

    def _fork(self, task: Callable[..., None], arguments: tuple, settings: dict[str, str], log: Path) -> Outcome:
        """Run a task once in a process of its own; its outcome, with the log's name."""
        with tempfile.TemporaryDirectory(prefix="paragen-") as folder:
            note = Path(folder, "outcome.json")
            self.process = process = forked.start(task, arguments, settings, log, note)
            if self.stopping.is_set():  # set while it started, which takes as long as the import
                process.terminate()
            process.join()
            ended = death_of(process.exitcode) or outcome.read(note) or unnoted(process.exitcode)
            return ended if ended.is_done else replace(ended, log=paths.relative(log))

    def stop(self) -> None:
        """Let the run in progress unwind and start no other."""
        self.stopping.set()
        process = self.process
        if process is not None and process.is_alive():
            process.terminate()


def train_packed(cells: list[Cell], results: Path) -> None:
    """Train cells with the packed engine and leave the others to the caller; a line in `results` for each."""
    packed_train.collect(cells, packed_train.results_writer(results, cells), leave=True)


def verify_runs(runs: list[Run]) -> None:
    """Verify the collections of runs; raises UserError with the last fault found."""
    faults = [fault for run in runs for fault in verify.verify(run.folder, run.base)]
    if faults:
        raise UserError(faults[-1])


def log_of(cell: Cell) -> Path:
    """Where a cell's output goes."""
    folder = cell.finetune.folder
    return folder.with_name(f"{folder.name}.log")


def death_of(code: int | None) -> Outcome | None:
    """The outcome of a process that a signal ended, from its exit code; None for one that ended in another way."""
    if code == forked.LOST:
        return Outcome("killed", "the process that it was forked from died")
    return Outcome("killed", f"killed by signal {-code}") if code is not None and code < 0 else None


def unnoted(code: int | None) -> Outcome:
    """The outcome of a process that wrote none."""
    return Outcome("failed", f"ended with status {code} and left no outcome")


def crash(ended: Outcome) -> Outcome:
    """The outcome of a cell whose pack ended before it did: it is trained alone, unless ENGINE forbids that."""
    if engines.asked() == "packed":
        return ended
    return Outcome("not_packable", f"failed in a pack: {ended.cause}; it is trained the ordinary way")


def prune(pretrain: Path) -> None:
    """Remove the pretrain folder of a cell whose collection has just been verified."""
    with contextlib.suppress(files.Busy), files.lock(files.beside(pretrain, "lock")):
        if (pretrain / paths.MANIFEST).is_file():
            files.remove_folder(pretrain)
