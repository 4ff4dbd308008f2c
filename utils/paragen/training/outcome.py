"""How a run ended, as a value. The process that ran it writes it as JSON; the one that started it reads it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from paragen.common import cli, files
from paragen.common.cli import UserError, is_out_of_memory

Kind = Literal["done", "running", "out_of_memory", "not_packable", "killed", "stopped", "storage", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a run, or all of a cell, ended."""

    kind: Kind
    cause: str = ""  # one line; empty for `done`
    log: str = ""  # the log file, relative to the repository
    seconds: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether everything requested is complete on disk."""
        return self.kind == "done"

    @property
    def text(self) -> str:
        """The outcome as tables and messages show it."""
        if self.kind in ("done", "stopped"):
            return {"done": "collected", "stopped": "stopped"}[self.kind]
        shown = f"{self.cause} (log: {self.log})" if self.log else self.cause
        return shown if self.kind == "not_packable" else f"failed: {shown}"


DONE = Outcome("done")
STOPPED = Outcome("stopped")


class AlreadyRunning(UserError):
    """Another process trains the same run."""


class OutOfMemory(UserError):
    """The device or this machine has too little memory for a run."""


class DistributedFailure(UserError):
    """Training on several devices failed; `outcome` says how, with the cause."""

    def __init__(self, outcome: Outcome):
        super().__init__(outcome.cause)
        self.outcome = outcome


def outcome_of(error: BaseException) -> Outcome:
    """The outcome of a run that ended with this exception."""
    if isinstance(error, DistributedFailure):
        return error.outcome
    if isinstance(error, AlreadyRunning):
        return Outcome("running", str(error))
    if isinstance(error, OutOfMemory):
        return Outcome("out_of_memory", str(error))
    if isinstance(error, UserError):
        return Outcome("failed", str(error))
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return STOPPED
    if is_out_of_memory(error):
        return Outcome("out_of_memory", one_line(error))
    if fault := cli.storage_fault(error):
        return Outcome("storage", fault)
    return Outcome("failed", one_line(error))


def one_line(error: BaseException) -> str:
    """An unexpected exception in one line, without its traceback."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def recorded(task: Callable[[], None], path: Path) -> None:
    """Run a task and write its Outcome to `path`; an exception is recorded and raised again."""
    try:
        task()
    except BaseException as error:
        write(path, outcome_of(error))
        raise
    write(path, DONE)


def write(path: Path, outcome: Outcome) -> None:
    """Write an outcome as JSON, atomically."""
    files.write_json(path, asdict(outcome))


def read(path: Path) -> Outcome | None:
    """The outcome in a file; None where the process ended without writing it."""
    try:
        return Outcome(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
