"""Shows a sweep while it runs: a live table on a terminal, plain lines elsewhere.

The progress of runs is read from their staging folders, as `make status` does from another shell.
"""

import contextlib
import os
import sys
import time
from datetime import timedelta
from typing import Any

from paragen.common import files, locks, paths
from paragen.common.cli import say
from paragen.recipes.run import Cell, Run
from paragen.scoring import evaluate
from paragen.sweep import cell_worker, estimate
from paragen.sweep.jobs import Job
from paragen.training import progress
from paragen.training.outcome import Outcome
from paragen.training.progress import Progress

LEFT_SHARE = 0.02  # of the time, at most, goes into estimating the time left
ROWS = 50  # running cells in the live table


class Display:
    """A context manager; pass its `report` to sweep.run.

    Args:
        total: the number of cells in the sweep.
    """

    def __init__(self, total: int):
        self.total, self.finished, self.failed = total, 0, 0
        self.took: list[float] = []  # seconds of each finished cell
        self.running: dict[Cell, float] = {}  # when each started, in seconds since the epoch
        self.preparing = ""  # what the sweep does while nothing runs
        self.estimate: float | None = None  # seconds left, as last estimated
        self.estimated_at, self.estimate_due = 0.0, 0.0  # in seconds of the monotonic clock
        self.live: Any = None
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(get_renderable=self.table, refresh_per_second=1, transient=True)

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def report(self, event: str, job: Job | None, outcome: Outcome | None) -> None:
        """Show an event (see sweep.run)."""
        if event == "tick":
            return
        if job is None:
            self.show_preparation(event)
            return
        if event == "started":
            self.running[job.cell] = time.time()
            log = paths.relative(cell_worker.log_of(job.cell))
            self.say(f"started{' again' if job.number > 1 else ''}: {job.cell}, log in {log}")
            return
        assert outcome is not None  # `again` and `done` come with one
        self.running.pop(job.cell, None)
        if event == "again":
            head = "alone now" if outcome.kind == "not_packable" else "will try again"
            self.say(f"{head}: {job.cell}: {outcome.text}")
            return
        self.finished += 1
        self.failed += outcome.kind not in ("done", "stopped")
        self.took += [outcome.seconds] if outcome.is_done else []
        self.say(f"[{self.finished}/{self.total}] {outcome.text}: {job.cell} ({outcome.seconds:.0f} s{self.left()})")

    def show_preparation(self, event: str) -> None:
        """Show what happens while no cell runs."""
        address = os.environ.get("RAY_ADDRESS")
        self.preparing = {
            "ray": f"joining the Ray cluster at {address}" if address else "starting Ray",
            "workers": "starting workers",
            "lost": "Ray died on this machine: starting it again; what was running is done again",
            "waiting": "nothing can start: no device is free, other programs train the remaining cells, or no machine "
            f"of the cluster has {sys.executable}",
        }[event]
        if not self.live or event in ("lost", "waiting"):
            self.say(self.preparing)

    def left(self) -> str:
        """The estimated time for the remaining cells, such as `, 0:01:20 left`; empty while nothing is known.

        An estimate reads the log of every running cell. Where these are many, it stands for a while.
        """
        began = time.monotonic()
        if began >= self.estimate_due:
            self.estimate = self.seconds_left()
            self.estimated_at = time.monotonic()
            self.estimate_due = self.estimated_at + (self.estimated_at - began) / LEFT_SHARE
        if self.estimate is None:
            return ""
        seconds = max(0.0, self.estimate - (time.monotonic() - self.estimated_at))
        return f", {timedelta(seconds=round(seconds))} left"

    def seconds_left(self) -> float | None:
        """The estimated seconds for the remaining cells; None while nothing is known."""
        now, running = time.time(), dict(self.running)
        parts = [(now - began, self.state_of(cell, began)[1]) for cell, began in running.items()]
        return estimate.seconds_left(parts, self.total - self.finished - len(running), self.took)

    def state_of(self, cell: Cell, began: float) -> tuple[str, float]:
        """What a running cell does, and which part of what it trains is done.

        Args:
            cell: the cell.
            began: when it started, in seconds since the epoch.
        """
        present, (pretrain, finetune) = progress.progress_of(cell), cell.runs
        if present is None and is_made(finetune, began):
            scores = locks.is_held(files.beside(finetune.folder, evaluate.LOCK))
            return "scoring" if scores else "verifying", 1.0
        is_pretrained = is_made(pretrain, began)
        if present is None and is_pretrained:
            return "pretrained, starting the finetune", estimate.part_done(cell.runs, Progress(finetune))
        if present is None:
            return "starting" if self.took else "starting: a worker's first cell waits for its imports", 0.0
        both = is_pretrained or present.run == pretrain
        return str(present), estimate.part_done(cell.runs if both else [finetune], present)

    def say(self, line: str) -> None:
        """Print a line, above the live table where there is one."""
        if self.live:
            self.live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            say(line)

    def table(self):
        """The live table: the running cells with step, loss and remaining time."""
        from rich.table import Table

        doing = f"{len(self.running)} running" if self.running else self.preparing
        left = self.left() if self.running else ""
        head = f"{self.finished}/{self.total} done, {doing}, {self.failed} failed{left}"
        table = Table(head, box=None, pad_edge=False)
        running = list(dict(self.running).items())
        for cell, began in running[:ROWS]:
            table.add_row(f"  {cell}: {self.state_of(cell, began)[0]}")
        if len(running) > ROWS:
            table.add_row(f"  and {len(running) - ROWS} more; make status shows them")
        return table


def is_made(run: Run, since: float) -> bool:
    """Whether a run became complete since a time, in seconds since the epoch."""
    with contextlib.suppress(OSError):
        return (run.folder / paths.MANIFEST).stat().st_mtime >= since
    return False
