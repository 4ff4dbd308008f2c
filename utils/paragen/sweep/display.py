"""Shows a sweep while it runs: a live table on a terminal, plain lines elsewhere.

The progress of runs is read from their staging folders, as `make status` does from another shell.
"""

import sys
import time
from datetime import timedelta

from paragen.common import paths
from paragen.common.cli import say
from paragen.recipes.run import Cell
from paragen.sweep import cell_worker
from paragen.sweep.jobs import Job
from paragen.training import status
from paragen.training.outcome import Outcome


class Display:
    """A context manager; pass its `report` to sweep.run.

    Args:
        total: the number of cells in the sweep.
    """

    def __init__(self, total: int):
        self.total, self.finished, self.failed = total, 0, 0
        self.started = time.monotonic()
        self.running: list[Cell] = []
        self.live = None
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
        if event == "waiting":
            self.say(
                "nothing can start: no device is free, other programs train the remaining cells, or no machine of "
                f"the cluster has {sys.executable}"
            )
            return
        assert job is not None  # every other event is about a job
        if event == "started":
            self.running.append(job.cell)
            log = paths.relative(cell_worker.log_of(job.cell))
            self.say(f"started{' again' if job.number > 1 else ''}: {job.cell}, log in {log}")
            return
        assert outcome is not None  # `again` and `done` come with one
        if job.cell in self.running:
            self.running.remove(job.cell)
        if event == "again":
            head = "alone now" if outcome.kind == "not_packable" else "will try again"
            self.say(f"{head}: {job.cell}: {outcome.text}")
            return
        self.finished += 1
        self.failed += outcome.kind not in ("done", "stopped")
        self.say(
            f"[{self.finished}/{self.total}] {outcome.text}: {job.cell} ({outcome.seconds:.0f} s, {self.left()} left)"
        )

    def left(self) -> timedelta:
        """Estimated time for the remaining cells, from those that are done."""
        elapsed = time.monotonic() - self.started
        return timedelta(seconds=round(elapsed / max(1, self.finished) * (self.total - self.finished)))

    def say(self, line: str) -> None:
        """Print a line, above the live table where there is one."""
        if self.live:
            self.live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            say(line)

    def table(self):
        """The live table: the running cells with step, loss and remaining time."""
        from rich.table import Table

        left = f", {self.left()} left" if self.finished else ""
        head = f"{self.finished}/{self.total} done, {len(self.running)} running, {self.failed} failed{left}"
        table = Table(head, box=None, pad_edge=False)
        for cell in self.running:
            table.add_row(f"  {cell}: {status.progress_of(cell) or 'starting'}")
        return table
