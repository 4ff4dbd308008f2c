"""One slot of a sweep: brings one cell after the other to a verified collection, each phase in a process forked warm.

sweep.py runs it as a Ray actor; it lives as long as the sweep. Each cell's output goes to a log beside its run folder.
"""

import contextlib
import os
import re
import threading
import time
from multiprocessing import Process
from pathlib import Path
from typing import NamedTuple

import cli
import collect
import files
import forked
import paths
import run_identity
import status
from cli import UserError
from status import Cell

COLLECTED = "collected"
ERROR = re.compile(r"(?:^|it/s\]|s/it\])error: (.*)|^FAULTY .*")  # also where it goes on in a progress bar's line
ABOVE = "the cause stands above"  # how a run on several devices ends whose processes have said why
OUT_OF_MEMORY = re.compile(r"out of (device )?memory|can't allocate memory", re.IGNORECASE)


class Outcome(NamedTuple):
    """What became of a cell."""

    text: str  # `collected`, or `failed: ...` with the cause in one line
    again: str | None  # why it is worth another attempt: `killed`, `memory`, or None
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

    def collect(self, cell: Cell, attempt: str, smaller: bool) -> Outcome:
        """Do what is missing of one cell.

        Args:
            attempt: an id; only the latest attempt at a run may give it its name.
            smaller: with half the rows at a time, accumulated twice as often.
        """
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
        forced = run_identity.force_asked()
        for recipe in (cell.pretrain, cell.finetune):
            if not forced and collect.is_done(cell.pretrain, cell.finetune, cell.rank, [], []):
                break
            if failed := self._run("train", [str(recipe), str(cell.rank)], settings, log):
                return failed
            if recipe == cell.pretrain:
                self.finished(cell, "pretrain")
        if failed := self._run("verify", ["--recipe", str(cell.finetune), str(cell.rank)], settings, log):
            return failed
        self.finished(cell, "finetune")
        if cli.asked("PRUNE_PRETRAIN"):
            prune(status.run_folders(cell)[0])
        return None, COLLECTED

    def finished(self, cell: Cell, phase: str) -> None:
        """Called when a phase's run folder is whole on this worker's disk (see stage.py)."""

    def _run(self, script: str, arguments: list[str], settings: dict[str, str], log: Path) -> tuple[str, str] | None:
        """Run one script to its end; None when it went well, else (why another attempt is worth it, the outcome)."""
        while not self.stopping.is_set():
            self.process = forked.start(script, arguments, settings, log)
            if self.stopping.is_set():  # told so while it started, which takes as long as the import
                self.process.terminate()
            self.process.join()
            if self.process.exitcode == 0:
                return None
            cause = cause_in(log)
            if self.process.exitcode == forked.LOST:
                return "killed", f"failed: the process that it was forked from died (log: {paths.relative(log)})"
            if self.process.exitcode < 0:
                return "killed", f"failed: killed by signal {-self.process.exitcode} (log: {paths.relative(log)})"
            if "is running already" not in cause:
                return ("memory" if OUT_OF_MEMORY.search(cause) else None), f"failed: {cause}"
            # another terminal's process, or one that outlived its killed parent, is at work on it
            self.stopping.wait(1)
        return None, "stopped"

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
