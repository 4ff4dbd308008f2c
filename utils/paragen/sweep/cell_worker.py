"""One slot of a sweep: trains, verifies and, with EVALUATE=1, scores cells.

It is a Ray actor that lives as long as the sweep, and works in processes forked from one that has imported what they
need. A cell that is trained alone gets a process per phase; the cells of a pack are trained together by
packed_train.py. Each cell's output goes to a log beside its run folder, that of a pack to the log of its first cell.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from paragen.collection import replacing, run_identity, verify
from paragen.common import devices, files, locks, paths, settings
from paragen.common.cli import UserError
from paragen.packed import packed_train
from paragen.recipes.run import Cell, Run
from paragen.sweep import forked
from paragen.sweep.scoring_process import ScoringProcess
from paragen.training import engines, ordinary, outcome, status
from paragen.training.outcome import DONE, STOPPED, Outcome


class CellWorker:
    """One slot.

    Args:
        settings: environment variables for every run: FORCE, PRUNE_PRETRAIN, OMP_NUM_THREADS and others.
        requested: the value of DEVICES for every run; None: the GPUs in this process's CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, settings: dict[str, str], requested: str | None):
        own = os.environ.get("CUDA_VISIBLE_DEVICES", "") if requested is None else requested
        self.settings = {**settings, "DEVICES": own}
        if requested is None:
            self.settings.setdefault("OMP_NUM_THREADS", str(threads_beside_gpu()))
            self.settings.setdefault("PARAGEN_CPU_SLOTS", str(gpu_slots()))
        self.process: ForkServerProcess | None = None
        self.stopping = threading.Event()
        self.scoring = ScoringProcess(self.stopping)
        os.environ.update(self.settings)
        forked.preload()

    def ready(self) -> str:
        """The name of the machine on which this worker runs."""
        return os.uname().nodename

    def collect(self, pack: list[tuple[Cell, str]], packed: bool, halved: bool) -> list[Outcome]:
        """Train and verify what is missing of some cells.

        Args:
            pack: the cells, each with the id of this attempt; only the latest attempt at a run may publish it.
            packed: train all together with the packed engine; otherwise one after the other.
            halved: train with half the rows at a time, accumulated twice as often; not for the packed engine.

        Returns the outcome of each.
        """
        if packed:
            return self._collect_together(pack)
        return [self._collect_alone(cell, attempt, halved) for cell, attempt in pack]

    def _collect_alone(self, cell: Cell, attempt: str, halved: bool) -> Outcome:
        started = time.monotonic()
        try:
            log = log_of(cell)
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(b"")
            with self._scoring_into(log):
                ended = self._collect(cell, attempt, halved, log)
        except UserError as error:
            ended = outcome.outcome_of(error)
        return replace(ended, seconds=time.monotonic() - started)

    def _collect(self, cell: Cell, attempt: str, halved: bool, log: Path) -> Outcome:
        for run in cell.runs:
            if not run_identity.force_requested() and status.is_done(cell):
                # removes the lock file of a run that was killed after it had published its collection
                locks.is_free(files.beside(cell.finetune.folder, "lock"))
                break
            ended = self._run(ordinary.train, (run, halved), {"PARAGEN_ATTEMPT": attempt}, log)
            if not ended.is_done:
                return ended
            if not run.collects:
                self.run_completed(cell, run)
        return self._finish(cell, log)

    def _finish(self, cell: Cell, log: Path, verified: bool = False) -> Outcome:
        """Finish a cell whose runs exist: verify its collection, unless that was done, report the run, and score it."""
        if not verified:
            ended = self._run(verify_runs, ([cell.finetune],), {}, log)
            if not ended.is_done:
                return ended
        self.run_completed(cell, cell.finetune)
        if settings.switch("EVALUATE"):
            ended = self.scoring.score(cell.finetune.folder)
            if not ended.is_done:
                return replace(ended, cause=f"collected, but not scored: {ended.cause}", log=paths.relative(log))
        if settings.switch("PRUNE_PRETRAIN"):
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
        with self._scoring_into(logs[0]):
            for cell, log in zip(cells, logs, strict=True):
                try:
                    if (cell.pretrain.folder / paths.MANIFEST).is_file():
                        self.run_completed(cell, cell.pretrain)
                    result = ended[cell] if cell in ended else self._finish(cell, log, verified)
                except UserError as error:
                    result = outcome.outcome_of(error)
                outcomes.append(replace(result, seconds=time.monotonic() - started))
        return outcomes

    @contextlib.contextmanager
    def _scoring_into(self, log: Path) -> Iterator[None]:
        """While the body runs, `scoring` scores in one process, whose output goes to a log."""
        with ScoringProcess(self.stopping, log) as self.scoring:
            yield

    def _train_together(self, cells: list[Cell], settings: dict[str, str], log: Path) -> dict[Cell, Outcome]:
        """Train cells in one process; returns the outcomes of those that are not collections afterwards."""
        ended: dict[Cell, Outcome] = {}
        waiting = cells
        while waiting and not self.stopping.is_set():
            process, results = self._run_packed(waiting, settings, log)
            running = []
            for number, cell in enumerate(waiting):
                result = results.get(number)
                if result is None:  # the process ended before this cell did
                    ended[cell] = process if process.kind == "killed" else outcome_in_crashed_pack(process)
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
        """Whether several cells all verify, in one process. Where this is False, each cell is verified alone."""
        return len(cells) > 1 and self._run(verify_runs, ([cell.finetune for cell in cells],), {}, log).is_done

    def _run_packed(self, cells: list[Cell], settings: dict[str, str], log: Path) -> tuple[Outcome, dict[int, Outcome]]:
        """Train cells with the packed engine; returns the outcome of the process, and that of each cell that ended."""
        with locks.process_folder() as folder:
            results = folder / "results"
            return self._fork(train_packed, (cells, results), settings, log), packed_train.read_results(results)

    def run_completed(self, cell: Cell, run: Run) -> None:
        """Called when a run is complete on this worker's disk; stage.py sends it to the driver."""

    def _run(self, task: Callable[..., None], arguments: tuple, settings: dict[str, str], log: Path) -> Outcome:
        """Run a task in a process of its own; waits while another process trains the same run."""
        while not self.stopping.is_set():
            ended = self._fork(task, arguments, settings, log)
            if ended.kind != "running":
                return ended
            # a process of another terminal, or one that outlived its killed parent, trains this run
            self.stopping.wait(1)
        return STOPPED

    def _fork(self, task: Callable[..., None], arguments: tuple, settings: dict[str, str], log: Path) -> Outcome:
        """Run a task once in a process of its own; returns its outcome with the log's name."""
        with locks.process_folder() as folder:
            outcome_file = folder / "outcome.json"
            self.process = process = forked.start(task, arguments, settings, log, outcome_file)
            if self.stopping.is_set():  # was set during the start, which can take as long as the imports
                process.terminate()
            process.join()
            code = process.exitcode
            ended = forked.outcome_of_signal(code) or outcome.read(outcome_file) or outcome_of_exit(code)
            return ended if ended.is_done else replace(ended, log=paths.relative(log))

    def stop(self) -> None:
        """Let the run in progress clean up, and start no other."""
        self.stopping.set()
        process = self.process
        if process is not None and process.is_alive():
            process.terminate()
        self.scoring.stop()


def train_packed(cells: list[Cell], results: Path) -> None:
    """Train cells with the packed engine, without those that cannot be packed; writes each outcome to `results`."""
    packed_train.collect(cells, packed_train.results_writer(results, cells), packed_only=True)


def verify_runs(runs: list[Run]) -> None:
    """Verify the collections of runs. Raises UserError with the last fault found."""
    faults = [
        f"FAULTY {paths.relative(run.folder)}: {fault}"
        for run in runs
        for fault in verify.verify(run.folder, run.base).faults
    ]
    if faults:
        raise UserError(faults[-1])


def log_of(cell: Cell) -> Path:
    """The log file of a cell's output."""
    folder = cell.finetune.folder
    return folder.with_name(f"{folder.name}.log")


def outcome_of_exit(code: int | None) -> Outcome:
    """The outcome of a process that exited without writing one."""
    return Outcome("failed", f"ended with status {code} and left no outcome")


def outcome_in_crashed_pack(ended: Outcome) -> Outcome:
    """The outcome of a cell whose pack ended before it: it is trained alone, unless ENGINE=packed forbids that, or a
    full or failing disk ended the pack."""
    if ended.kind == "storage" or engines.requested_engine() == "packed":
        return ended
    return Outcome("not_packable", f"failed in a pack: {ended.cause}; it is trained the ordinary way")


def prune(pretrain: Path) -> None:
    """Remove the pretrain folder of a cell whose collection has just been verified (see replacing.remove)."""
    with contextlib.suppress(locks.Busy), locks.lock(files.beside(pretrain, "lock")):
        if (pretrain / paths.MANIFEST).is_file():
            replacing.remove(pretrain)


def threads_beside_gpu() -> int:
    """The CPU threads of a run on a GPU: its share of the cores but one. Ray has given its worker a single one, unless
    the user started the node with another number."""
    if os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]
    return devices.threads(gpu_slots())


def gpu_slots() -> int:
    """How many runs on GPUs, of one GPU each, this machine may have at a time."""
    return len(devices.nvidia_gpus()) or 1
