"""How far a cell's present run is: its process writes it into the staging folder, `make status` and sweeps read it.

Until the first step is logged, a file has what the process does. Then LLaMA-Factory's own log has the steps.
"""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from paragen.collection import run_files
from paragen.common import files
from paragen.recipes.run import Cell, Run

ACTIVITY = "activity"  # the file in a staging folder


class Progress(NamedTuple):
    """The state of a run that is being trained.

    Attributes:
        run: the run.
        activity: what it does before its first step is logged.
        step, total: the last logged step and the last one that will be trained; 0 before a step is logged.
        loss: at that step, where it is known.
        left: LLaMA-Factory's estimate of the time left, such as `0:01:20`; empty where there is none.
    """

    run: Run
    activity: str = "starting"
    step: int = 0
    total: int = 0
    loss: float | None = None
    left: str = ""

    def __str__(self) -> str:
        if not self.step:
            return f"{self.run.phase} {self.activity}"
        if self.step >= self.total:
            return f"{self.run.phase} finishing"
        loss = f", loss {self.loss:.4f}" if self.loss is not None else ""
        left = f", {self.left} left" if self.left else ""
        return f"{self.run.phase} step {self.step} of {self.total}{loss}{left}"


def report(staging: Path, activity: str) -> None:
    """Write what the run of a staging folder does now."""
    files.write_atomically(staging / ACTIVITY, activity.encode(), durable=False)


def progress_of(cell: Cell) -> Progress | None:
    """The progress of a cell's present run; None where none is being trained. Raises UserError for a broken recipe."""
    for run in cell.runs:
        for staging in files.companions(run.folder, "staging-"):
            return in_staging(run, staging)
    return None


def in_staging(run: Run, staging: Path) -> Progress:
    """The progress of a run from its staging folder, which may be gone meanwhile."""
    with contextlib.suppress(OSError, IndexError, ValueError, KeyError):  # no complete line of the log yet
        last = json.loads((staging / run_files.LOG).read_text(encoding="utf-8").splitlines()[-1])
        steps = last["current_steps"], last["total_steps"]
        return Progress(run, "", *steps, last.get("loss"), last.get("remaining_time", ""))
    with contextlib.suppress(OSError):
        return Progress(run, (staging / ACTIVITY).read_text(encoding="utf-8"))
    return Progress(run)
