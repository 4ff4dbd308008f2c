"""Sweeps over machines that do not share storage (STAGE=1).

The driver's machine holds data/, models/ and saves/. The file server, a Ray actor there, sends files and receives
finished runs through Ray's own connections. A worker on another node downloads what a cell needs into that node's copy
of the repository below STAGE_DIR (each file once, checked by SHA-256), trains there, and sends the runs back.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from paragen.common import cli, locks, paths, settings
from paragen.common.cli import UserError
from paragen.recipes.run import Cell, Run
from paragen.sweep import cell_worker, file_client, stage_folder
from paragen.sweep.cell_worker import CellWorker
from paragen.sweep.file_client import Downloads, FileClient, SweepStopped
from paragen.sweep.file_server import UTILS, FileManifest, FileServer, code_hash
from paragen.training.outcome import DONE, STOPPED, Outcome

FILE_SERVER = "paragen-file-server"  # the actor's name, by which workers find it
REPORT_SECONDS = 2  # between two reports of a run's progress


def is_requested() -> bool:
    """Whether the user set STAGE=1. Raises UserError with EVALUATE=1."""
    if not settings.switch("STAGE"):
        return False
    if settings.switch("EVALUATE"):
        raise UserError("EVALUATE=1: does not go with STAGE=1; omit it, and run make evaluate afterwards")
    return True


def start_file_server(ray: Any) -> Any:
    """Start the file server on this machine and return its handle; it ends when the handle is deleted."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "num_gpus": 0, "max_concurrency": 16, "scheduling_strategy": here, "name": FILE_SERVER}
    server = ray.remote(**options)(FileServer).remote(node)
    ray.get(server.facts.remote())
    return server


def stop_file_server(ray: Any, server: Any) -> None:
    """Have the file server close the cells whose nodes died."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(server.close.remote(), timeout=20)


class StagedWorker(CellWorker):
    """A CellWorker that, on another node than the driver's, trains in that node's copy of the repository."""

    def __init__(self, settings: dict[str, str], devices: str | None):
        import ray

        self.client = FileClient(ray.get_actor(FILE_SERVER))
        facts = self.client.call("facts")
        self.code = facts["code"]
        self.elsewhere = ray.get_runtime_context().get_node_id() != facts["node"]
        self.top = stage_folder.parent_folder(settings) / facts["key"]
        self.attempts: dict[Cell, tuple[str, FileManifest]] = {}  # of the cells that are being trained
        if self.elsewhere:
            settings |= {"PARAGEN_TOP": str(self.top), "PARAGEN_TOKENS": str(self.top / "saves" / paths.TOKENS)}
        super().__init__(settings, devices)
        self.downloads = Downloads(self.client, self.top, facts["sweep"], self.stopping)

    def collect(self, pack: list[tuple[Cell, str]], packed: bool, halved: bool) -> list[Outcome]:
        """As in CellWorker. On another node, the cells' files are downloaded first and their runs sent back."""
        if not self.elsewhere:
            for cell, _ in pack:
                self.client.call("close_attempts_at", cell)
            return super().collect(pack, packed, halved)
        started = time.monotonic()
        outcomes: dict[str, Outcome | None] = {}  # by attempt
        try:
            with contextlib.ExitStack() as stack:
                copies: dict[str, Cell] = {}  # by attempt
                for cell, attempt in pack:
                    outcomes[attempt] = self._prepare(stack, cell, attempt, copies)
                if copies:
                    ended = super().collect([(copy, attempt) for attempt, copy in copies.items()], packed, halved)
                    outcomes |= dict(zip(copies, ended, strict=True))
        finally:
            self.attempts.clear()
            for _, attempt in pack:
                self.client.call("close_cell", attempt)
        seconds = time.monotonic() - started
        return [
            replace(outcome, cause=outcome.cause.replace(f"{self.top}/", ""), seconds=seconds)
            for outcome in outcomes.values()
            if outcome is not None
        ]

    def _prepare(
        self, stack: contextlib.ExitStack, cell: Cell, attempt: str, copies: dict[str, Cell]
    ) -> Outcome | None:
        """Prepare a cell on this node until `stack` ends, and add its copy to `copies`.

        Returns None, or the outcome of a cell that is not trained here.
        """
        try:
            copy = self._stage(stack, cell, attempt)
        except (SweepStopped, locks.Busy):
            return STOPPED
        except (UserError, OSError) as error:
            fault = str(error) if isinstance(error, UserError) else cli.storage_fault(error)
            if fault is None:
                raise
            return Outcome("failed", f"{fault} (on {os.uname().nodename})")
        if copy is None:
            return DONE
        copies[attempt] = copy
        return None

    def _stage(self, stack: contextlib.ExitStack, cell: Cell, attempt: str) -> Cell | None:
        """Download what a cell needs; returns the cell with this node's recipes, or None where it is complete."""
        if code_hash() != self.code:
            raise UserError(f"{UTILS}: is not the driver's version; bring this copy of the repository up to date")
        while (needed := self.client.call("open_cell", cell, attempt)) is None:  # another process trains it
            if self.stopping.wait(1):
                raise SweepStopped
        if needed.is_complete:
            return None
        copy = replace(cell, recipes=(self.top / needed.recipes[0], self.top / needed.recipes[1]))
        self.client.call("report", attempt, f"on {os.uname().nodename}, in {self.top}\n".encode(), "", b"")
        stage_folder.make_private(self.top)
        self.downloads.fetch([info for info in needed.files if info.name in needed.recipes], 0)
        with contextlib.ExitStack() as own:
            own.enter_context(stage_folder.own_runs(copy, attempt, self.stopping))
            others = sum(other.run_bytes for _, other in self.attempts.values())
            self.downloads.fetch(needed.files, needed.run_bytes + others)
            stage_folder.use_as_repository(self.top)
            own.enter_context(self._reporting(copy, attempt))
            self.attempts[copy] = attempt, needed
            stack.enter_context(own.pop_all())
        return copy

    def run_completed(self, cell: Cell, run: Run) -> None:
        """Send a complete run to the driver, unless the driver has it or prunes it."""
        if not self.elsewhere:
            return
        attempt, needed = self.attempts[cell]
        if not run.collects and (needed.has_pretrain or settings.switch("PRUNE_PRETRAIN")):
            return
        try:
            file_client.send_run(self.client, run.folder, attempt, run.phase)
        except OSError as error:
            if fault := cli.storage_fault(error):
                raise UserError(f"{fault} (on {os.uname().nodename})") from error
            raise

    @contextlib.contextmanager
    def _reporting(self, copy: Cell, attempt: str) -> Iterator[None]:
        """Keep the driver's copies of the cell's log and of its trainer log up to date while the body runs."""
        ended, sent = threading.Event(), 0

        def report() -> None:
            nonlocal sent
            output = cell_worker.log_of(copy).read_bytes()[sent:]
            sent += len(output)
            phase, progress = stage_folder.progress_of(copy)
            if output or progress:
                self.client.call("report", attempt, output.replace(f"{self.top}/".encode(), b""), phase, progress)

        def report_until_ended() -> None:
            while not ended.wait(REPORT_SECONDS):
                with contextlib.suppress(OSError, UserError):
                    report()

        thread = threading.Thread(target=report_until_ended, name="reports", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError, UserError):
                report()
