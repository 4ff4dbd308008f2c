"""What a sweep shows while it runs: one live table on a terminal, plain lines elsewhere.

Imported by collect_all.py. What runs is read from the run folders, as `make status` does from any other shell.
"""

import sys
import time
from datetime import timedelta

from paragen.common import paths
from paragen.common.cli import say
from paragen.recipes.run import Cell
from paragen.sweep import cell_worker
from paragen.sweep.cell_worker import Outcome
from paragen.sweep.sweep import Job
from paragen.training import status


class Display:
    """Use it as a context; pass `report` to sweep.run.

    Args:
        total: how many cells there are to do.
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

    def report(self, what: str, job: Job | None, outcome: Outcome | None) -> None:
        """Take note of what happened (see sweep.run)."""
        if what == "tick":
            return
        if what == "waiting":
            self.say(
                "nothing can start: no device is free, other programs are at work on what is left, or no machine of "
                f"the cluster has {sys.executable}"
            )
            return
        assert job is not None  # all that follows is about a job
        if what == "started":
            self.running.append(job.cell)
            log = paths.relative(cell_worker.log_of(job.cell))
            self.say(f"started{' again' if job.number > 1 else ''}: {job.cell}, log in {log}")
            return
        assert outcome is not None  # `again` and `done` come with one
        if job.cell in self.running:
            self.running.remove(job.cell)
        if what == "again":
            head = "alone now" if outcome.kind == "not_packable" else "will try again"
            self.say(f"{head}: {job.cell}: {outcome.text}")
            return
        self.finished += 1
        self.failed += outcome.kind not in ("done", "stopped")
        self.say(
            f"[{self.finished}/{self.total}] {outcome.text}: {job.cell} ({outcome.seconds:.0f} s, {self.left()} left)"
        )

    def left(self) -> timedelta:
        """About how long the rest takes, going by the cells that are done."""
        elapsed = time.monotonic() - self.started
        return timedelta(seconds=round(elapsed / max(1, self.finished) * (self.total - self.finished)))

    def say(self, line: str) -> None:
        """Print a line that stays, above the live table where there is one."""
        if self.live:
            self.live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            say(line)

    def table(self):
        """The live table: what runs, with its step, loss and remaining time."""
        from rich.table import Table

        left = f", {self.left()} left" if self.finished else ""
        head = f"{self.finished}/{self.total} done, {len(self.running)} running, {self.failed} failed{left}"
        table = Table(head, box=None, pad_edge=False)
        for cell in self.running:
            table.add_row(f"  {cell}: {status.progress_of(cell) or 'starting'}")
        return table
