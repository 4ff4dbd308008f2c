"""From where the runs of a pack go on after an interruption, and the record of their checkpoints.

A pack goes on from the last step at which all of its runs have a whole checkpoint: then each step has the batch that it
has in an undisturbed run, and on the CPU the same bits. A run whose training was complete by then has no rows left.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import run_files
from paragen.common import files
from paragen.training import interrupted, ordinary
from paragen.training.attempts import Attempt

UNLOGGED = interrupted.UNLOGGED.format(0)


class Continuation(NamedTuple):
    """How an attempt at a run begins, and what its checkpoints are recorded with.

    Attributes:
        checkpoint: the checkpoint folder from which it goes on; None where it starts anew.
        done: how many of its steps, and so of its pack's, are trained already.
        record: as ordinary.record_of gives it.
    """

    checkpoint: Path | None
    done: int
    record: dict[str, Any] | None


def plan(attempts: list[Attempt], wanted: list[str]) -> list[Continuation]:
    """How some attempts begin that would be trained in one pack; their staging folders are prepared for that.

    Runs without a whole checkpoint start anew. The others go on from the last step that all of them have; where there
    is none, each goes on from its own last one. Those with the same `done` belong in one pack.

    Args:
        attempts: as `attempts.begin` yields them.
        wanted: the device.
    """
    records = [ordinary.record_of(attempt, dict(attempt.run.config), wanted, "packed") for attempt in attempts]
    whole = [
        interrupted.whole_steps(attempt.staging, record["circumstances"]) if record else []
        for attempt, record in zip(attempts, records, strict=True)
    ]
    common = common_done([_Saved.of(*pair) for pair in zip(attempts, whole, strict=True) if pair[1]])
    found = []
    for attempt, record, steps in zip(attempts, records, whole, strict=True):
        kept = [step for step in steps if common is None or step - attempt.run.resumed_step <= common]
        checkpoint = None
        if record:
            reason = "no checkpoint of it is as it was recorded"
            checkpoint = interrupted.keep_until(attempt.staging, record["circumstances"], kept, reason)
        own = kept[-1] - attempt.run.resumed_step if kept else 0
        found.append(Continuation(checkpoint, (own if common is None else common) if kept else 0, record))
    return found


class _Saved(NamedTuple):
    """The whole checkpoints of a run, in steps of its pack."""

    steps: set[int]
    is_complete: bool  # whether the last of them is after the run's last step

    @classmethod
    def of(cls, attempt: Attempt, steps: list[int]) -> "_Saved":
        before = attempt.run.resumed_step
        return cls({step - before for step in steps}, interrupted.is_last(attempt.staging, steps[-1]))

    def has(self, done: int) -> bool:
        """Whether the run can go on after so many steps of its pack."""
        return done in self.steps or (self.is_complete and done > max(self.steps))


def common_done(runs: list[_Saved]) -> int | None:
    """The largest number of a pack's steps after which all runs can go on; None where there is none."""
    candidates = {step for run in runs for step in run.steps}
    return max((done for done in candidates if all(run.has(done) for run in runs)), default=None)


class CheckpointRecorder:
    """Records the checkpoints of a run in its staging folder, after their files are written.

    Several threads write them. They are recorded in order: those before the last recorded one count as deleted.

    Args:
        staging: the staging folder.
        record: as Continuation has it.
    """

    def __init__(self, staging: Path, record: dict[str, Any] | None):
        self.staging, self.record = staging, record
        self.is_recording = False
        self.latest: threading.Event | None = None  # set once the latest checkpoint is written and recorded

    def begin(self) -> None:
        """Begin with the training. Nothing is recorded where a file was touched before: its rows may be others."""
        self.is_recording = self.record is not None and interrupted.are_untouched(self.record["stamps"])

    def writing(self, write: Callable[[], None], step: int, unlogged: list[float]) -> Callable[[], None]:
        """A function that writes a checkpoint with `write`, and records it once those asked for before are recorded.

        Args:
            write: writes the files into the checkpoint's folder.
            step: its step.
            unlogged: the losses since the last line of the log.
        """
        unlogged, before, ended = list(unlogged), self.latest, threading.Event()
        self.latest = ended

        def write_and_record() -> None:
            try:
                write()
                if self.record is not None and self.is_recording:
                    files.write_json(self.staging / run_files.checkpoint_folder(step) / UNLOGGED, unlogged)
                    if before is not None:
                        before.wait()
                    if self.is_recording:
                        interrupted.add(self.staging, self.record["circumstances"], step)
            except BaseException:
                self.is_recording = False  # nothing after it
                raise
            finally:
                ended.set()

        return write_and_record

    def forget(self) -> None:
        """Drop the record, so that the staging folder is removed: the next attempt would come to the same end."""
        (self.staging / interrupted.RECORD).unlink(missing_ok=True)


def unlogged_losses(checkpoint: Path) -> list[float]:
    """The losses since the last line of the log, as they were saved with a recorded checkpoint."""
    return json.loads((checkpoint / UNLOGGED).read_bytes())
