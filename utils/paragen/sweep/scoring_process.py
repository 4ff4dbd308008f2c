"""A process that scores one collection after the other, and keeps the base model that it loaded last."""

import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO

from paragen.collection import index
from paragen.common import cli, devices, locks
from paragen.common.cli import UserError
from paragen.scoring import evaluate
from paragen.sweep import forked
from paragen.training import outcome
from paragen.training.outcome import DONE, STOPPED, Outcome

END_SECONDS = 20  # that a process without further work has to end


class ScoringProcess:
    """Starts the process with its first collection, and again after it died; a context manager that ends it.

    Args:
        stopping: set when nothing more shall be scored.
        log: the file to which its output is appended; None: `output` returns it.
    """

    def __init__(self, stopping: threading.Event, log: Path | None = None):
        self.stopping, self.log = stopping, log
        self.process: ForkServerProcess | None = None
        self.connection: Connection | None = None
        self.reader: IO[bytes] | None = None
        self.unread = b""  # the beginning of a line

    def __enter__(self) -> "ScoringProcess":
        return self

    def __exit__(self, *_) -> None:
        if self.connection is not None and self.process is not None:
            self.connection.close()
            self.process.join(END_SECONDS)
            self.stop()

    def score(self, folder: Path, show: int = 0) -> Outcome:
        """Score what a collection's evaluation.json lacks (see evaluate.py).

        Args:
            folder: the collection's.
            show: the number of questions whose answers are printed.
        """
        try:
            self.connection = self.connection or self._start()
        except (EOFError, ConnectionError):
            return self._died()
        except OSError as error:
            if cli.storage_fault(error) is None:
                raise
            return outcome.outcome_of(error)
        try:
            self.connection.send((folder, show))
            return self.connection.recv()
        except (EOFError, OSError):  # it died
            return self._died()

    def _start(self) -> Connection:
        here, there = forked.context.Pipe()
        with locks.process_folder() as folder:
            log = self.log or folder / "output"
            if self.log is None:
                log.touch()
                self.reader = open(log, "rb")  # noqa: SIM115 it outlives the folder
            self.process = forked.start(score_requested, (there,), {}, log)
            there.close()
            here.recv()  # it has opened the log
        return here

    def _died(self) -> Outcome:
        assert self.process is not None
        self.process.join()
        code, self.connection = self.process.exitcode, None
        if self.stopping.is_set():
            return STOPPED
        return forked.outcome_of_signal(code) or Outcome("failed", f"its process ended with status {code}")

    def output(self) -> list[str]:
        """The whole lines that were written since the last call."""
        if self.reader is None:
            return []
        *lines, self.unread = (self.unread + self.reader.read()).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def stop(self) -> None:
        """Let the process clean up and end."""
        if self.process is not None and self.process.is_alive():
            self.process.terminate()


def score_requested(connection: Connection) -> None:
    """A task of the process: score the collections whose folders come over the connection, until it is closed.

    Sends the outcome of each. What is neither the user's to correct nor the disk's is a bug, which ends the process.
    """
    devices.pin(devices.choose()[:1])
    connection.send(None)
    base = None
    while True:
        try:
            folder, show = connection.recv()
        except EOFError:
            return
        try:
            base = evaluate.score(evaluate.plan_for(index.chosen_at(folder)), base, show)
            ended = DONE
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and cli.storage_fault(error) is None:
                raise
            ended = outcome.outcome_of(error)
        sys.stdout.flush()  # it is a file
        connection.send(ended)
