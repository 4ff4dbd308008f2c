"""Collects many cells on all devices that Ray has: this machine's, or those of the cluster at RAY_ADDRESS.

There is one worker per device (per GPUS_PER_CELL devices; per core where there is no GPU). It imports once and then
trains one pack after the other: cells that can be trained together (see packs.py), or one cell.

A cell is tried a second time where its worker or node died, or with half the rows at a time where it was out of memory.
A cell that turns out not to be packable is trained alone.

All nodes of a cluster see this repository at the same path. With STAGE=1 they need its scripts and .venv there alone
(see stage.py).
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from paragen.common import locks, paths
from paragen.common.cli import UserError, say
from paragen.recipes.run import Cell
from paragen.sweep import cell_worker, estimate, jobs, packs, ray_cluster, stage
from paragen.sweep.cell_worker import CellWorker
from paragen.sweep.jobs import Job
from paragen.sweep.session import Session
from paragen.sweep.workers import RayDied, Workers
from paragen.training import engines
from paragen.training.outcome import Outcome, outcome_of

Report = Callable[[str, Job | None, Outcome | None], None]


def run(cells: Iterable[Cell], report: Report, worker_class: type = CellWorker) -> dict[Cell, Outcome]:
    """Make each cell a verified collection.

    Args:
        cells: in the order in which they start.
        report: called with an event, the job and its outcome. Events: `started`; `again`, when another attempt follows;
            `done`, also for a cell that cannot start. Without a job: `ray`, before Ray starts; `workers`, when the
            first of them start; `tick`, each second; `waiting`, when nothing could start for a while; `lost`, when Ray
            died on this machine, before it is started again.
        worker_class: what trains the cells: CellWorker, or (to measure the scheduler alone) a class with its methods.

    Returns the outcome of each cell. On Ctrl-C and SIGTERM the runs in progress clean up first.
    """
    # wrong settings are reported before anything starts
    staged, _, _ = stage.is_requested(), packs.gpus_per_cell(), engines.requested_engine()
    ray_cluster.check_settings()
    jobs.remove_dead_locks()
    sweep_id = jobs.new_sweep_id()
    with ray_cluster.only_sweep_here(), locks.lock(jobs.lock_of(sweep_id)):
        report("ray", None, None)
        return collect(cells, report, staged, worker_class, sweep_id)


def collect(
    cells: Iterable[Cell], report: Report, staged: bool, worker_class: type, sweep_id: str
) -> dict[Cell, Outcome]:
    """What `run` does once it may; `sweep_id` is the one whose lock is held."""
    with Session(staged) as session:
        workers = Workers(session, stage.StagedWorker if staged else worker_class)
        sweep = Sweep(workers, cells, report, sweep_id)
        try:
            workers.run(sweep)
        finally:
            sweep.release_runs()
        if shares := workers.times.shares():
            say(f"devices: {len(shares)}, had work {packs.busy_text(shares)} of {workers.times.seconds:.0f} s")
    return sweep.outcomes


class Sweep:
    """The scheduler: jobs that wait, jobs that run, and the outcomes of the cells that are done.

    Args:
        workers: what trains the cells.
        cells, report: as for `run`.
        sweep_id: as jobs.new_sweep_id makes it.
    """

    def __init__(self, workers: Workers, cells: Iterable[Cell], report: Report, sweep_id: str):
        self.workers, self.report = workers, report
        # in the order in which they start
        self.waiting = OrderedDict((cell, jobs.new_job(cell, packs.pack_key(cell), sweep_id)) for cell in cells)
        self.counts = Counter(job.pack_key for job in self.waiting.values())
        self.started: Counter = Counter()  # packs of first attempts, by key
        self.dealt: dict[tuple | None, tuple[int, list[list[Job]]]] = {}  # by key: slots, and packs, the largest last
        self.works = estimate.works_of(cell for cell, job in self.waiting.items() if job.pack_key is not None)
        self.outcomes: dict[Cell, Outcome] = {}

    def step(self) -> None:
        """Start what can start, and wait up to a second for something to end."""
        if self.workers.session.is_dead():
            self.report("lost", None, None)
            for pack in self.workers.restart():
                self.end_pack(pack, RayDied())
        self.start_jobs()
        for ended in self.workers.wait():
            self.end_pack(ended.task, ended.result, ended.machine)
        if self.workers.is_stuck(len(self.waiting)):
            self.report("waiting", None, None)
        self.report("tick", None, None)

    def start_jobs(self) -> None:
        """Start workers up to the number of slots, and give each idle one a pack."""
        if not self.waiting:
            return
        if self.workers.start_missing(len(self.waiting)):
            self.report("workers", None, None)
        for _ in range(len(self.waiting)):
            if not self.workers.idle or not self.waiting:
                break
            if pack := [job for job in self.next_pack() if self.is_claimed(job)]:
                self.start(pack)

    def start(self, pack: list[Job]) -> None:
        """Have an idle worker train a pack."""
        cells, first = [(job.cell, job.attempt) for job in pack], pack[0]
        self.started[first.pack_key] += first.number == 1
        pack = [job._replace(packed_with=len(pack)) for job in pack]
        self.workers.give(pack, lambda worker: worker.collect.remote(cells, first.pack_key is not None, first.halved))
        for job in pack:
            self.report("started", job, None)

    def next_pack(self) -> list[Job]:
        """Remove and return the first waiting job, or the largest pack of those with its key."""
        first = next(iter(self.waiting.values()))
        if first.pack_key is None:
            pack = [first]
        else:
            pack = self.next_first_attempts(first) if first.number == 1 else self.deal_waiting(first)[0]
        for job in pack:
            del self.waiting[job.cell]
        return pack

    def next_first_attempts(self, first: Job) -> list[Job]:
        """The largest pack of the first attempts with a job's key.

        They are dealt again when the number of slots changed, or when jobs are left that could not be claimed before.
        """
        slots = self.workers.slots
        dealt_for, dealt = self.dealt.get(first.pack_key, (slots, []))
        if not dealt or dealt_for != slots:
            dealt = self.deal_waiting(first)[::-1]
        self.dealt[first.pack_key] = slots, dealt
        return dealt.pop()

    def deal_waiting(self, first: Job) -> list[list[Job]]:
        """Deal the waiting jobs with the key and the number of `first` out to packs, the largest first."""
        alike = [job for job in self.waiting.values() if (job.pack_key, job.number) == (first.pack_key, first.number)]
        count, most = 0, packs.MOST
        if first.number == 1:
            count = packs.count_packs(self.counts[first.pack_key], self.workers.slots) - self.started[first.pack_key]
        else:  # a pack that was killed may have been too large: half of it
            most = -(-min(job.packed_with for job in alike) // 2)
        dealt = packs.deal([self.works[job.cell] for job in alike], max(count, -(-len(alike) // most)), most)
        return [[alike[place] for place in pack] for pack in dealt]

    def is_claimed(self, job: Job) -> bool:
        """Whether a job may start now. If not, it waits behind the others, or has ended already."""
        try:
            if jobs.claim_runs(job):
                return True
            self.waiting[job.cell] = job
        except UserError as error:  # its recipe does not even name a run folder
            self.end(job, outcome_of(error))
        return False

    def end_pack(self, pack: list[Job], result: list[Outcome] | Exception, machine: str | None = None) -> None:
        """Take the outcomes of the jobs of a worker, on `machine`, and queue the attempts that follow."""
        if not isinstance(result, Exception):
            outcomes = result
        elif self.workers.is_fault(result):  # a bug of ours: keep the traceback
            log = cell_worker.log_of(pack[0].cell)
            log.write_text(str(result))
            outcomes = [Outcome("failed", repr(getattr(result, "cause", result)), paths.relative(log))] * len(pack)
        else:
            where = f" on {machine}" if machine else ""
            outcomes = [Outcome("killed", f"its worker died{where} ({type(result).__name__})")] * len(pack)
        following = []
        for job, outcome in zip(pack, outcomes, strict=True):
            jobs.release_runs(job)
            if following_job := jobs.next_job(job, outcome):
                following.append(following_job)
                self.report("again", job, jobs.keep_log(job, outcome) if following_job.number > 1 else outcome)
            else:
                self.end(job, outcome)
        for following_job in reversed(following):
            self.waiting[following_job.cell] = following_job
            self.waiting.move_to_end(following_job.cell, last=False)

    def end(self, job: Job, outcome: Outcome) -> None:
        """Record the outcome of a cell."""
        self.outcomes[job.cell] = outcome
        self.report("done", job, outcome)

    def release_runs(self) -> None:
        """Remove the claims of the jobs that are at work."""
        for _, pack in self.workers.running.values():
            for job in pack:
                jobs.release_runs(job)
