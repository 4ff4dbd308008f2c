"""Sweeps over machines that do not share storage (STAGE=1): what a cell needs goes to its node, its runs come back.

Imported by sweep.py. The driver's machine holds data/, models/ and saves/; an actor there, the depot, hands files out
and takes runs in, through Ray's own connections. A worker on another node keeps what it was given below STAGE_DIR in
the repository's own layout (each file once, checked by SHA-256) and trains there as anywhere.
"""

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from paragen.collection import run_files
from paragen.common import cli, files, paths
from paragen.common.cli import UserError
from paragen.model import base_models
from paragen.recipes.run import Cell, Run
from paragen.sweep import cell_worker
from paragen.sweep.cell_worker import CellWorker
from paragen.sweep.file_server import CHUNK, UTILS, Depot, Item, Listed, Need, code_hash
from paragen.training.outcome import DONE, STOPPED, Outcome

NAME = "paragen-depot"  # as the workers of a sweep find the depot
WINDOW = 4  # chunks on their way, per worker
RHYTHM = 2  # seconds between two reports of a run that goes on
NOTES = ".staged"  # below a node's folder: what is known of each file in it


def asked() -> bool:
    """Whether the user said STAGE=1. Raises UserError where the driver is on no node of the cluster."""
    if not cli.is_on("STAGE"):
        return False
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise UserError(f"RAY_ADDRESS={address}: STAGE=1 must run on a node of the cluster: log in there, or use auto")
    return True


def open_depot(ray: Any) -> Any:
    """The depot's handle; it lives on this machine as long as the handle."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    kind = ray.remote(num_cpus=0, num_gpus=0, max_concurrency=16, scheduling_strategy=here, name=NAME)(Depot)
    depot = kind.remote(node)
    ray.get(depot.facts.remote())
    return depot


def close_depot(ray: Any, depot: Any) -> None:
    """Let go of all cells that nodes died over."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(depot.close.remote(), timeout=20)


class Stopped(Exception):
    """The sweep was told to stop."""


class StagedWorker(CellWorker):
    """A CellWorker that, on another node than the driver's, works in that node's own folder."""

    def __init__(self, settings: dict[str, str], devices: str | None):
        import ray

        self.depot = ray.get_actor(NAME)
        self.facts = self.ask("facts")
        self.elsewhere = ray.get_runtime_context().get_node_id() != self.facts["node"]
        self.top = stage_folder(settings) / self.facts["key"]
        self.jobs: dict[Cell, tuple[str, Need]] = {}  # of the cells at work: the attempt and what it needs
        if self.elsewhere:
            settings |= {"PARAGEN_TOP": str(self.top), "PARAGEN_TOKENS": str(self.top / "saves" / ".tokens")}
        super().__init__(settings, devices)

    def collect(self, pack: list[tuple[Cell, str]], packed: bool, smaller: bool) -> list[Outcome]:
        """As CellWorker's; on another node, what the cells need is brought first and their runs are sent back."""
        if not self.elsewhere:
            for cell, _ in pack:
                self.ask("forget", cell)
            return super().collect(pack, packed, smaller)
        started, outcomes = time.monotonic(), {}
        try:
            with contextlib.ExitStack() as stack:
                here = {}
                for cell, attempt in pack:
                    outcomes[attempt] = self._prepare(stack, cell, attempt, here)
                if here:
                    ended = super().collect([(copy, attempt) for attempt, copy in here.items()], packed, smaller)
                    outcomes |= dict(zip(here, ended, strict=True))
        finally:
            self.jobs.clear()
            for _, attempt in pack:
                self.ask("end", attempt)
        seconds = time.monotonic() - started
        return [
            replace(outcome, cause=outcome.cause.replace(f"{self.top}/", ""), seconds=seconds)
            for outcome in outcomes.values()
        ]

    def _prepare(self, stack: contextlib.ExitStack, cell: Cell, attempt: str, here: dict[str, Cell]) -> Outcome | None:
        """Have all that a cell needs on this node for as long as `stack` holds, and put its copy among those that are
        `here`; what became of it where it does not get so far."""
        try:
            copy = self._bring(stack, cell, attempt)
        except (Stopped, files.Busy):
            return STOPPED
        except (UserError, OSError) as error:
            fault = str(error) if isinstance(error, UserError) else cli.storage_fault(error)
            if fault is None:
                raise
            return Outcome("failed", f"{fault} (on {os.uname().nodename})")
        if copy is None:
            return DONE
        here[attempt] = copy
        return None

    def _bring(self, stack: contextlib.ExitStack, cell: Cell, attempt: str) -> Cell | None:
        """Bring what a cell needs; the cell as it stands here, or None when its collection is there already."""
        if code_hash() != self.facts["code"]:
            raise UserError(f"{UTILS}: is not the driver's version; bring this copy of the repository up to date")
        while (need := self.ask("begin", cell, attempt)) is None:  # another terminal's process is at work on it
            if self.stopping.wait(1):
                raise Stopped
        if need.done:
            return None
        here = replace(cell, recipes=(self.top / need.recipes[0], self.top / need.recipes[1]))
        self._say(attempt, f"on {os.uname().nodename}, in {self.top}")
        make_private(self.top)
        bring(self, [item for item in need.items if item.name in need.recipes], 0)
        with contextlib.ExitStack() as own:
            own.enter_context(own_runs(here, attempt, self.stopping))
            bring(self, need.items, need.room + sum(other.room for _, other in self.jobs.values()))
            live_in(self.top)
            own.enter_context(self._reports(here, attempt))
            self.jobs[here] = attempt, need
            stack.enter_context(own.pop_all())
        return here

    def finished(self, cell: Cell, run: Run) -> None:
        """Send a run back that is whole here."""
        if not self.elsewhere:
            return
        attempt, need = self.jobs[cell]
        if not run.collects and (need.has_pretrain or cli.is_on("PRUNE_PRETRAIN")):
            return
        try:
            send(self, run.folder, attempt, run.phase)
        except OSError as error:
            if fault := cli.storage_fault(error):
                raise UserError(f"{fault} (on {os.uname().nodename})") from error
            raise

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call the depot and wait. Raises UserError with its text, or for a full disk on the driver's side."""
        return self.get(getattr(self.depot, method).remote(*arguments))

    def get(self, future: Any) -> Any:
        """What a call of the depot gave; raises as `ask`."""
        import ray

        try:
            return ray.get(future)
        except ray.exceptions.RayTaskError as error:
            fault = str(error.cause) if isinstance(error.cause, UserError) else cli.storage_fault(error.cause)
            if fault is None:
                raise
            raise UserError(fault) from None

    def _say(self, attempt: str, line: str) -> None:
        self.ask("report", attempt, f"{line}\n".encode(), "", b"")

    @contextlib.contextmanager
    def _reports(self, here: Cell, attempt: str) -> Iterator[None]:
        """Keep the driver's copies of the cell's log and of the run's own log up to date while the body runs."""
        ended, sent = threading.Event(), 0

        def report() -> None:
            nonlocal sent
            output = cell_worker.log_of(here).read_bytes()[sent:]
            sent += len(output)
            phase, progress = progress_of(here)
            if output or progress:
                self.ask("report", attempt, output.replace(f"{self.top}/".encode(), b""), phase, progress)

        def go_on() -> None:
            while not ended.wait(RHYTHM):
                with contextlib.suppress(OSError, UserError):
                    report()

        thread = threading.Thread(target=go_on, name="reports", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError, UserError):
                report()


def stage_folder(settings: dict[str, str]) -> Path:
    """Where this node keeps what it is given: STAGE_DIR of the sweep, of the node, or below its temporary folder."""
    told = settings.get("STAGE_DIR") or os.environ.get("STAGE_DIR")
    return Path(told or Path(tempfile.gettempdir(), f"paragen-stage-{os.getuid()}")).expanduser().resolve()


def make_private(folder: Path) -> None:
    """Make a folder for this user alone; raises UserError where it, or the one above it, is somebody else's."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for part in (folder.parent, folder):
        if part.stat().st_uid != os.getuid():
            raise UserError(f"{part}: belongs to another user; choose a folder with STAGE_DIR")
    folder.chmod(0o700)


def live_in(top: Path) -> None:
    """Let this process, as those it starts with PARAGEN_TOP, take a stage folder for the repository."""
    paths.ROOT, base_models.TABLE = top, top / base_models.TABLE.relative_to(paths.ROOT)
    base_models.table.cache_clear()


def progress_of(here: Cell) -> tuple[str, bytes]:
    """The phase that is training here, and its trainer log so far."""
    for run in here.runs:
        for staging in files.companions(run.folder, "staging-"):
            with contextlib.suppress(OSError):
                return run.phase, (staging / run_files.LOG).read_bytes()
    return "", b""


@contextlib.contextmanager
def own_runs(here: Cell, attempt: str, stopping: threading.Event) -> Iterator[None]:
    """Room for this attempt's runs alone: nothing of an earlier one is taken over, nothing is left afterwards."""
    folders = [run.folder for run in here.runs]
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(files.beside(folder, "attempt"), attempt.encode())
        clear(folder, stopping)
    try:
        yield
    finally:
        for folder in folders:
            with contextlib.suppress(files.Busy):
                clear(folder, None)
            files.beside(folder, "attempt").unlink(missing_ok=True)
        cell_worker.log_of(here).unlink(missing_ok=True)


def clear(folder: Path, stopping: threading.Event | None) -> None:
    """Remove a run folder and what belongs to it, as soon as no process is at work on it.

    Raises files.Busy when one is and `stopping` is None or gets set.
    """
    while True:
        try:
            with files.lock(files.beside(folder, "lock")):
                files.recover_folder(folder)
                files.remove_folder(folder)
                return
        except files.Busy:
            if stopping is None or stopping.wait(1):
                raise


def bring(worker: StagedWorker, items: list[Item], room: int) -> None:
    """Have each file whole below the worker's folder. Raises UserError when the disk is too small, also for `room`."""
    top, sweep = worker.top, worker.facts["sweep"]
    lacking = sum(item.bytes for item in items if not is_whole(top, item, sweep))
    free = shutil.disk_usage(top).free
    if lacking + room > free:
        raise UserError(
            f"{top}: {(lacking + room) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room, or "
            "choose another disk with STAGE_DIR"
        )
    for item in items:
        note = top / NOTES / item.name
        note.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(note.with_name(f"{note.name}.lock"), waiting=f"another worker brings {item.name}"):
            for _ in range(2):
                if is_whole(top, item, sweep):
                    break
                fetch(worker, item, note.with_name(f"{note.name}.part"))
            else:
                raise UserError(f"{item.name}: arrives with other bytes than the driver has, twice")


def is_whole(top: Path, item: Item, sweep: str) -> bool:
    """Whether a file is here with the driver's bytes: read again once a sweep, and whenever it was touched."""
    path, note = top / item.name, top / NOTES / item.name
    try:
        stamp = list(files.stamp_of(path.stat()))
        with contextlib.suppress(OSError, ValueError):
            if json.loads(note.read_bytes()) == [sweep, item.sha256, stamp]:
                return True
        if stamp[0] != item.bytes or files.sha256_of(path) != item.sha256:
            return False
    except FileNotFoundError:
        return False
    note.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(note, json.dumps([sweep, item.sha256, stamp]).encode())
    return True


def fetch(worker: StagedWorker, item: Item, part: Path) -> None:
    """Bring one file, chunk by chunk; it gets its name when it is whole. Call it with the file's lock held."""
    offsets, coming = deque(range(0, item.bytes, CHUNK)), deque()
    try:
        with open(part, "wb") as file:
            while offsets or coming:
                while offsets and len(coming) < WINDOW:
                    coming.append(worker.depot.read.remote(item.name, offsets.popleft()))
                if worker.stopping.is_set():
                    raise Stopped
                file.write(worker.get(coming.popleft()))
        if files.sha256_of(part) == item.sha256:
            path = worker.top / item.name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def send(worker: StagedWorker, folder: Path, attempt: str, phase: str) -> None:
    """Send a finished run folder back and have it published."""
    listed, going = {}, deque()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        listed[name] = Listed(path.stat().st_size, files.sha256_of(path))
        for offset, data in chunks_of(path):
            going.append(worker.depot.write.remote(attempt, phase, name, offset, data))
            if len(going) >= WINDOW:
                worker.get(going.popleft())
    while going:
        worker.get(going.popleft())
    worker.ask("publish", attempt, phase, listed)


def chunks_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file's chunks with their offsets; an empty file has one."""
    with open(path, "rb") as file:
        data = file.read(CHUNK)
        yield 0, data
        while data := file.read(CHUNK):
            yield file.tell() - len(data), data
