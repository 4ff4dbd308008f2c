"""Collects many cells on all devices that Ray has: this machine's, or those of the cluster at RAY_ADDRESS.

There is one worker per device (per GPUS_PER_CELL devices; per core where there is no GPU). It imports once and then
trains one pack after the other: cells that can be trained together (see packs.py), or one cell.

A cell is tried a second time where its worker or node died, or with half the rows at a time where it was out of memory.
A cell that turns out not to be packable is trained alone.

All nodes of a cluster see this repository at the same path. With STAGE=1 they need its scripts and .venv there alone
(see stage.py).
"""

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.recipes.run import Cell
from paragen.sweep import cell_worker, jobs, packs, ray_cluster, stage
from paragen.sweep.cell_worker import CellWorker
from paragen.sweep.jobs import Job
from paragen.training import engines
from paragen.training.outcome import Outcome, outcome_of

MAX_LOST_WORKERS = 20  # workers that may die before their first cell; more mean that the set-up is at fault
STOP_SECONDS = 25  # that stopped runs have to clean up
IDLE_SECONDS = 120  # without any run, after which `waiting` is reported

Report = Callable[[str, Job | None, Outcome | None], None]


def run(cells: Iterable[Cell], report: Report, worker_class: type = CellWorker) -> dict[Cell, Outcome]:
    """Make each cell a verified collection.

    Args:
        cells: in the order in which they start.
        report: called with an event, the job and its outcome. Events: `started`; `again`, when another attempt follows;
            `done`, also for a cell that cannot start. Without a job: `ray`, before Ray starts; `workers`, when the
            first of them start; `tick`, each second; `waiting`, when nothing could start for a while.
        worker_class: what trains the cells: CellWorker, or (to measure the scheduler alone) a class with its methods.

    Returns the outcome of each cell. On Ctrl-C and SIGTERM the runs in progress clean up first.
    """
    ray_cluster.use_ray_token()
    # wrong settings are reported before anything starts
    staged, _, _ = stage.is_requested(), packs.gpus_per_cell(), engines.requested_engine()
    ray_cluster.check_settings()
    report("ray", None, None)
    import ray

    ray_cluster.start_ray(ray)
    on_cpu = ray_cluster.choose_devices(ray)
    server = stage.start_file_server(ray) if staged else None
    sweep = Sweep(ray, cells, report, stage.StagedWorker if staged else worker_class, on_cpu)
    try:
        with files.lock(paths.SAVES / f".sweep-{secrets.token_hex(4)}.lock"):  # `make clean-up` respects it
            while sweep.waiting or sweep.running:
                sweep.step()
    except BaseException:
        sweep.stop()
        raise
    finally:
        for _, pack in sweep.running.values():
            for job in pack:
                jobs.release_runs(job)
        if staged:
            stage.stop_file_server(ray, server)
        ray.shutdown()
    return sweep.outcomes


class Sweep:
    """The scheduler: jobs that wait, jobs that run, and the outcomes of the cells that are done.

    Args:
        ray: the module, initialised.
        on_cpu: whether the workers train on CPUs.
        cells, report, worker_class: as for `run`.
    """

    def __init__(self, ray: Any, cells: Iterable[Cell], report: Report, worker_class: type, on_cpu: bool):
        self.ray, self.report, self.worker_class, self.on_cpu = ray, report, worker_class, on_cpu
        self.waiting = deque(jobs.new_job(cell, packs.pack_key(cell)) for cell in cells)
        self.counts = Counter(job.pack_key for job in self.waiting)
        self.running: dict[Any, tuple[Any, list[Job]]] = {}  # future -> (worker, its jobs)
        self.starting: dict[Any, Any] = {}  # future -> worker that is not ready yet
        self.lost_workers = 0  # that died before their first cell
        self.idle: list[Any] = []
        self.outcomes: dict[Cell, Outcome] = {}
        self.last_active = time.monotonic()  # when something ran, or `waiting` was reported

    def step(self) -> None:
        """Start what can start, and wait up to a second for something to end."""
        self.start_jobs()
        futures = [*self.running, *self.starting]
        if futures:
            done, _ = self.ray.wait(futures, num_returns=1, timeout=1)
        else:  # all nodes are gone; others may join
            done = []
            time.sleep(1)
        for future in done:
            if future in self.starting:
                self.add_worker(future)
            else:
                self.end_pack(future)
        if self.running or not self.waiting:
            self.last_active = time.monotonic()
        elif time.monotonic() - self.last_active > IDLE_SECONDS:
            self.report("waiting", None, None)
            self.last_active = time.monotonic()
        self.report("tick", None, None)

    def start_jobs(self) -> None:
        """Start workers up to the number of slots, and give each idle one a pack."""
        if not self.waiting:
            return
        self.idle = [worker for worker in self.idle if self.is_alive(worker)]
        wanted = min(ray_cluster.count_slots(self.ray, self.on_cpu), len(self.waiting) + len(self.running))
        new = wanted - len(self.running) - len(self.idle) - len(self.starting)
        if new > 0 and not (self.running or self.starting):
            self.report("workers", None, None)
        for _ in range(new):
            worker = ray_cluster.new_worker(self.ray, self.worker_class, self.on_cpu)
            self.starting[worker.ready.remote()] = worker
        for _ in range(len(self.waiting)):
            if not self.idle or not self.waiting:
                break
            if pack := [job for job in self.next_pack() if self.is_claimed(job)]:
                worker, first = self.idle.pop(), pack[0]
                cells = [(job.cell, job.attempt) for job in pack]
                self.running[worker.collect.remote(cells, first.pack_key is not None, first.halved)] = worker, pack
                for job in pack:
                    self.report("started", job, None)

    def next_pack(self) -> list[Job]:
        """Remove and return the first waiting job and those that are trained together with it."""
        first = self.waiting.popleft()
        if first.pack_key is None:
            return [first]
        most = packs.share(self.counts[first.pack_key], ray_cluster.count_slots(self.ray, self.on_cpu))
        most = -(-most // first.number)  # a pack that was killed may have been too large: half of it
        alike = [job for job in self.waiting if (job.pack_key, job.number) == (first.pack_key, first.number)]
        for job in alike[: most - 1]:
            self.waiting.remove(job)
        return [first, *alike[: most - 1]]

    def is_claimed(self, job: Job) -> bool:
        """Whether a job may start now. If not, it waits behind the others, or has ended already."""
        try:
            if jobs.claim_runs(job):
                return True
            self.waiting.append(job)
        except UserError as error:  # its recipe does not even name a run folder
            self.end(job, outcome_of(error))
        return False

    def is_alive(self, worker: Any) -> bool:
        """Whether an idle worker still answers; its node may be gone."""
        try:
            self.ray.get(worker.ready.remote(), timeout=STOP_SECONDS)
        except self.ray.exceptions.RayError:
            return False
        return True

    def end_pack(self, future: Any) -> None:
        """Take the outcomes of the jobs of a worker, and queue the attempts that follow."""
        worker, pack = self.running.pop(future)
        try:
            outcomes = self.ray.get(future)
            self.idle.append(worker)
        except self.ray.exceptions.RayTaskError as error:  # a bug of ours: keep the traceback
            self.idle.append(worker)
            log = cell_worker.log_of(pack[0].cell)
            log.write_text(str(error))
            outcomes = [Outcome("failed", repr(error.cause), paths.relative(log))] * len(pack)
        except self.ray.exceptions.RayError as error:
            outcomes = [Outcome("killed", f"its worker died ({type(error).__name__})")] * len(pack)
        following = []
        for job, outcome in zip(pack, outcomes, strict=True):
            jobs.release_runs(job)
            if following_job := jobs.next_job(job, outcome):
                following.append(following_job)
                self.report("again", job, jobs.keep_log(job, outcome) if following_job.number > 1 else outcome)
            else:
                self.end(job, outcome)
        self.waiting.extendleft(reversed(following))

    def end(self, job: Job, outcome: Outcome) -> None:
        """Record the outcome of a cell."""
        self.outcomes[job.cell] = outcome
        self.report("done", job, outcome)

    def add_worker(self, future: Any) -> None:
        """Add a worker that is ready to the idle ones; one whose node died meanwhile is replaced at the next step."""
        worker = self.starting.pop(future)
        try:
            self.ray.get(future)
            self.idle.append(worker)
        except self.ray.exceptions.RayError as error:
            self.lost_workers += 1
            if self.lost_workers > MAX_LOST_WORKERS:
                cause = " ".join(str(error).split())[-300:]
                text = f"{self.lost_workers} workers died before their first cell; the last: {cause}"
                raise UserError(text) from None

    def stop(self) -> None:
        """Let all runs in progress clean up; a second signal cuts that short."""
        for worker, _ in self.running.values():
            worker.stop.remote()
        deadline, left = time.monotonic() + STOP_SECONDS, list(self.running)
        while left and time.monotonic() < deadline:
            _, left = self.ray.wait(left, num_returns=1, timeout=1)
