"""One slot of a sweep: brings cells to verified collections, in processes forked warm.

sweep.py runs it as a Ray actor; it lives as long as the sweep. A cell by itself gets a process per phase; the cells of
a pack are trained together by packed_train.py. Each cell's output goes to a log beside its run folder; what the
training of a pack says, to that of its first cell.
"""

import contextlib
import os
import re
import tempfile
import threading
import time
from multiprocessing import Process
from pathlib import Path
from typing import NamedTuple

from paragen.collection import run_identity
from paragen.common import cli, files, paths
from paragen.common.cli import UserError
from paragen.packed import packed_train
from paragen.sweep import forked
from paragen.training import engines, status
from paragen.training.status import Cell

COLLECTED = "collected"
ERROR = re.compile(r"(?:^|it/s\]|s/it\])error: (.*)|^FAULTY .*")  # also where it goes on in a progress bar's line
BUSY = "is running already"  # in what a run says whose folder another process is at work on
ABOVE = "the cause stands above"  # how a run on several devices ends whose processes have said why
OUT_OF_MEMORY = re.compile(r"out of (device )?memory|can't allocate memory", re.IGNORECASE)


class Outcome(NamedTuple):
    """What became of a cell."""

    text: str  # `collected`, or `failed: ...` with the cause in one line
    again: str | None  # why another attempt is worth it: `killed`, `memory`, `alone` (it cannot be packed), or None
    seconds: float


class CellWorker:
    """One slot.

    Args:
        settings: environment variables for every run: FORCE, PRUNE_PRETRAIN, OMP_NUM_THREADS and the like.
        devices: what DEVICES is set to; None: the GPUs that CUDA_VISIBLE_DEVICES gives to this process.
    """

    def __init__(self, settings: dict[str, str], devices: str | None):
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "") if devices is None else devices
        self.settings = {**settings, "DEVICES": given}
        self.process: Process | None = None
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

        Returns what became of each.
        """
        if packed:
            return self._collect_together(pack)
        return [self._collect_alone(cell, attempt, smaller) for cell, attempt in pack]

    def _collect_alone(self, cell: Cell, attempt: str, smaller: bool) -> Outcome:
        started = time.monotonic()
        settings = {"PARAGEN_ATTEMPT": attempt, "PARAGEN_HALVE_BATCH": "1" if smaller else ""}
        try:
            log = log_of(cell)
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(b"")
            again, text = self._collect(cell, settings, log)
        except UserError as error:
            again, text = None, f"failed: {error}"
        return Outcome(text, again, time.monotonic() - started)

    def _collect(self, cell: Cell, settings: dict[str, str], log: Path) -> tuple[str | None, str]:
        forced, asked = run_identity.force_asked(), packed_train.of(cell)
        for recipe in (cell.pretrain, cell.finetune):
            if not forced and packed_train.is_done(asked):
                # takes away the lock file of a run that was killed after it had given its collection its name
                files.is_free(files.beside(status.run_folders(cell)[1], "lock"))
                break
            if failed := self._run("train", [str(recipe), str(cell.rank)], settings, log):
                return failed
            if recipe == cell.pretrain:
                self.finished(cell, "pretrain")
        return self._wind_up(cell, settings, log)

    def _wind_up(
        self, cell: Cell, settings: dict[str, str], log: Path, verified: bool = False
    ) -> tuple[str | None, str]:
        """The end of a cell whose runs are there: verify it, unless it was, and hand it over."""
        if not verified and (failed := self._run("verify", recipe_arguments(cell), settings, log)):
            return failed
        self.finished(cell, "finetune")
        if cli.is_on("PRUNE_PRETRAIN"):
            prune(status.run_folders(cell)[0])
        return None, COLLECTED

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
                if (status.run_folders(cell)[0] / paths.MANIFEST).is_file():
                    self.finished(cell, "pretrain")
                again, text = ended[cell] if cell in ended else self._wind_up(cell, {}, log, verified)
            except UserError as error:
                again, text = None, f"failed: {error}"
            outcomes.append(Outcome(text, again, time.monotonic() - started))
        return outcomes

    def _train_together(self, cells: list[Cell], settings: dict[str, str], log: Path) -> dict[Cell, tuple]:
        """Train cells in one process; of those that are no collections after it, why another attempt is worth it and
        the outcome."""
        ended, waiting = {}, cells
        while waiting and not self.stopping.is_set():
            code, results = self._run_packed(waiting, settings, log)
            busy = []
            for number, cell in enumerate(waiting):
                result = results.get(number)
                if result is None:  # the process ended before it was through
                    ended[cell] = death_of(code, log) or crash(cause_in(log))
                elif result.outcome == "failed" and BUSY in result.why:
                    busy.append(cell)
                elif result.outcome == "failed":
                    ended[cell] = failure(f"{result.why} (log: {paths.relative(log)})")
                elif result.outcome == "left":
                    ended[cell] = "alone", f"not for the packed engine: {result.why}; it is trained the ordinary way"
            waiting = busy
            if busy:
                self.stopping.wait(1)
        return ended | dict.fromkeys(waiting, (None, "stopped"))

    def _verify_together(self, cells: list[Cell], log: Path) -> bool:
        """Whether all of some cells verify, read by one process; where not, each by itself says which does not."""
        named = [argument for cell in cells for argument in recipe_arguments(cell)]
        return len(cells) > 1 and self._run("verify", named, {}, log) is None

    def _run_packed(
        self, cells: list[Cell], settings: dict[str, str], log: Path
    ) -> tuple[int, dict[int, packed_train.Result]]:
        """Run packed_train.py on cells to its end: its exit code, and its results."""
        asked = [packed_train.of(cell) for cell in cells]
        named = [argument for cell in asked for argument in packed_train.arguments_of(cell)]
        with tempfile.TemporaryDirectory(prefix="paragen-") as folder:
            results = Path(folder, "results")
            code = self._fork(packed_train.__name__, ["--leave", "--results", str(results), *named], settings, log)
            return code, packed_train.read_results(results)

    def finished(self, cell: Cell, phase: str) -> None:
        """Called when a phase's run folder is whole on this worker's disk (see stage.py)."""

    def _run(self, script: str, arguments: list[str], settings: dict[str, str], log: Path) -> tuple[str, str] | None:
        """Run one script to its end; None when it went well, else (why another attempt is worth it, the outcome)."""
        while not self.stopping.is_set():
            code = self._fork(script, arguments, settings, log)
            if code == 0:
                return None
            if died := death_of(code, log):
                return died
            cause = cause_in(log)
            if BUSY not in cause:
                return failure(cause)
            # another terminal's process, or one that outlived its killed parent, is at work on it
            self.stopping.wait(1)
        return None, "stopped"

    def _fork(self, script: str, arguments: list[str], settings: dict[str, str], log: Path) -> int:
        """Run one script to its end; its exit code, negative for a signal."""
        self.process = forked.start(script, arguments, settings, log)
        if self.stopping.is_set():  # told so while it started, which takes as long as the import
            self.process.terminate()
        self.process.join()
        return self.process.exitcode

    def stop(self) -> None:
        """Let the run in progress unwind and start no other."""
        self.stopping.set()
        process = self.process
        if process is not None and process.is_alive():
            process.terminate()


def log_of(cell: Cell) -> Path:
    """Where a cell's output goes."""
    folder = status.run_folders(cell)[1]
    return folder.with_name(f"{folder.name}.log")


def recipe_arguments(cell: Cell) -> list[str]:
    """How verify.py is told of a cell."""
    return ["--recipe", str(cell.finetune), str(cell.rank)]


def death_of(code: int, log: Path) -> tuple[str, str] | None:
    """What `_run` returns for a process that did not end by itself, going by its exit code; None where it did."""
    if code == forked.LOST:
        return "killed", f"failed: the process that it was forked from died (log: {paths.relative(log)})"
    if code < 0:
        return "killed", f"failed: killed by signal {-code} (log: {paths.relative(log)})"
    return None


def failure(cause: str) -> tuple[str | None, str]:
    """What `_run` returns for a script that failed."""
    return ("memory" if OUT_OF_MEMORY.search(cause) else None), f"failed: {cause}"


def crash(cause: str) -> tuple[str | None, str]:
    """What becomes of a cell whose pack ended before it did: it is trained alone, unless ENGINE forbids that."""
    if engines.asked() == "packed":
        return failure(cause)
    return "alone", f"failed in a pack: {cause}; it is trained the ordinary way"


def cause_in(log: Path) -> str:
    """The last error line of a log, or its last line, with the log's name."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [found[1] or found[0] for line in lines if (found := ERROR.search(line))]
    causes = [error for error in errors if not error.endswith(ABOVE)]
    cause = (causes or errors or lines or ["no output"])[-1]
    return f"{cause} (log: {paths.relative(log)})"


def prune(pretrain: Path) -> None:
    """Remove the pretrain folder of a cell whose collection has just been verified."""
    with contextlib.suppress(files.Busy), files.lock(files.beside(pretrain, "lock")):
        if (pretrain / paths.MANIFEST).is_file():
            files.remove_folder(pretrain)
