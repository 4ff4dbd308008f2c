"""Runs many cells on all devices that Ray has: this machine's own, or those of the cluster at RAY_ADDRESS.

Imported by collect_all.py. One worker per device (GPUS_PER_CELL devices; per core without a GPU) imports once and takes
one pack after the other: cells that can be trained together (see packs.py), or one cell. A cell whose worker or node
dies is done again, once, elsewhere; one that was out of memory is tried once more with half the rows at a time; one
that turns out not to be for the packed engine is done alone. All nodes of a cluster see this repository at the same
path; with STAGE=1 they need its scripts and .venv there alone (see stage.py).
"""

import os
import secrets
import shlex
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from paragen.common import devices, files, paths
from paragen.common.cli import UserError
from paragen.recipes.run import Cell
from paragen.sweep import cell_worker, packs, stage
from paragen.sweep.cell_worker import CellWorker
from paragen.training import engines
from paragen.training.outcome import Outcome, outcome_of

# What of the user's environment counts in every run, wherever it runs.
SETTINGS = (
    "FORCE", "PRUNE_PRETRAIN", "STAGE_DIR", "OMP_NUM_THREADS", "LLAMAFACTORY_VERBOSITY", "HF_HUB_OFFLINE",
    "ENGINE",
)  # fmt: skip
LOST = 20  # workers that may die before their first cell; more is a fault of the set-up
GRACE = 25  # seconds that stopped runs have to unwind
QUIET = 120  # seconds without any run after which it is said that none can start


class Job(NamedTuple):
    """One attempt at a cell."""

    cell: Cell
    attempt: str
    number: int  # 1, or 2 for a second one
    smaller: bool
    kind: tuple | None = None  # jobs of the same kind can be done together by the packed engine; None: alone, without


def run(
    cells: Iterable[Cell], report: Callable[[str, "Job | None", Outcome | None], None], worker_class: type = CellWorker
) -> dict[Cell, Outcome]:
    """Bring cells to verified collections.

    Args:
        cells: in the order in which they are to start.
        report: called with `started`, `again` or `done`, the job and what became of it; each second with `tick`, and
            with `waiting` when nothing could start for a while. A cell that cannot start is `done` at once.
        worker_class: what does the work: CellWorker, or (to measure the sweep itself) something with its methods.

    Returns what became of each cell. On Ctrl-C or SIGTERM the runs in progress unwind first.
    """
    if os.environ.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in os.environ and has_ray_token():
        os.environ["RAY_AUTH_MODE"] = "token"  # `ray start` does so by itself, ray.init(address) does not
    import ray

    # what is wrong with the settings is said before anything starts
    staged, _, _ = stage.asked(), packs.gpus_per_cell(), engines.requested_engine()
    start_ray(ray)
    on_cpu = choose_devices(ray)
    depot = stage.open_depot(ray) if staged else None
    sweep = Sweep(ray, cells, report, stage.StagedWorker if staged else worker_class, on_cpu)
    try:
        while sweep.waiting or sweep.running:
            sweep.step()
    except BaseException:
        sweep.stop()
        raise
    finally:
        for _, pack in sweep.running.values():
            for job in pack:
                release(job)
        if staged:
            stage.close_depot(ray, depot)
        ray.shutdown()
    return sweep.outcomes


class Sweep:
    """What waits, what runs where, and what became of the rest; arguments as for `run`."""

    def __init__(self, ray: Any, cells: Iterable[Cell], report: Callable, worker_class: type, on_cpu: bool):
        self.ray, self.report, self.worker_class, self.on_cpu = ray, report, worker_class, on_cpu
        self.waiting = deque(Job(cell, secrets.token_hex(4), 1, False, packs.kind_of(cell)) for cell in cells)
        self.counts = Counter(job.kind for job in self.waiting)
        self.running: dict[Any, tuple[Any, list[Job]]] = {}  # future -> (worker, what it does)
        self.starting: dict[Any, Any] = {}  # future -> worker that is not there yet
        self.lost = 0  # workers that never were
        self.idle: list[Any] = []
        self.outcomes: dict[Cell, Outcome] = {}
        self.said = time.monotonic()  # when something ran, or it was said that nothing does

    def step(self) -> None:
        """Give out what can start, and wait up to a second for something to end."""
        self.fill()
        futures = [*self.running, *self.starting]
        if futures:
            done, _ = self.ray.wait(futures, num_returns=1, timeout=1)
        else:  # all nodes are gone; others may come
            done = []
            time.sleep(1)
        for future in done:
            self.take(future)
        if self.running or not self.waiting:
            self.said = time.monotonic()
        elif time.monotonic() - self.said > QUIET:
            self.report("waiting", None, None)
            self.said = time.monotonic()
        self.report("tick", None, None)

    def fill(self) -> None:
        """Give every free slot something to do."""
        if not self.waiting:
            return
        self.idle = [worker for worker in self.idle if self.is_alive(worker)]
        wanted = min(slots(self.ray, self.on_cpu), len(self.waiting) + len(self.running))
        for _ in range(wanted - len(self.running) - len(self.idle) - len(self.starting)):
            worker = new_worker(self.ray, self.worker_class, self.on_cpu)
            self.starting[worker.ready.remote()] = worker
        for _ in range(len(self.waiting)):
            if not self.idle or not self.waiting:
                break
            if pack := [job for job in self.next_pack() if self.is_claimed(job)]:
                worker, first = self.idle.pop(), pack[0]
                cells = [(job.cell, job.attempt) for job in pack]
                self.running[worker.collect.remote(cells, first.kind is not None, first.smaller)] = worker, pack
                for job in pack:
                    self.report("started", job, None)

    def next_pack(self) -> list[Job]:
        """Take the first job that waits, and those that are done together with it."""
        first = self.waiting.popleft()
        if first.kind is None:
            return [first]
        most = packs.share(self.counts[first.kind], slots(self.ray, self.on_cpu))
        most = -(-most // first.number)  # what was killed may have been too large
        alike = [job for job in self.waiting if (job.kind, job.number) == (first.kind, first.number)][: most - 1]
        for job in alike:
            self.waiting.remove(job)
        return [first, *alike]

    def is_claimed(self, job: Job) -> bool:
        """Whether a job may start now; else it waits behind the others, or has ended already."""
        try:
            if claim(job):
                return True
            self.waiting.append(job)
        except UserError as error:  # its recipe does not even name a run folder
            self.end(job, outcome_of(error))
        return False

    def is_alive(self, worker: Any) -> bool:
        """Whether an idle worker still answers; its node may be gone."""
        try:
            self.ray.get(worker.ready.remote(), timeout=GRACE)
        except self.ray.exceptions.RayError:
            return False
        return True

    def take(self, future: Any) -> None:
        """Take a worker that is ready, or what became of some jobs, whose cells may get a second attempt."""
        if future in self.starting:
            self.welcome(future)
            return
        worker, pack = self.running.pop(future)
        try:
            outcomes = self.ray.get(future)
            self.idle.append(worker)
        except self.ray.exceptions.RayTaskError as error:  # a bug of ours: the traceback helps to mend it
            self.idle.append(worker)
            log = cell_worker.log_of(pack[0].cell)
            log.write_text(str(error))
            outcomes = [Outcome("failed", repr(error.cause), paths.relative(log))] * len(pack)
        except self.ray.exceptions.RayError as error:
            outcomes = [Outcome("killed", f"its worker died ({type(error).__name__})")] * len(pack)
        seconds = []
        for job, outcome in zip(pack, outcomes, strict=True):
            release(job)
            if second := another(job, outcome):
                seconds.append(second)
                self.report("again", job, set_log_aside(job, outcome) if second.number > 1 else outcome)
            else:
                self.end(job, outcome)
        self.waiting.extendleft(reversed(seconds))

    def end(self, job: Job, outcome: Outcome) -> None:
        """Note what became of a cell."""
        self.outcomes[job.cell] = outcome
        self.report("done", job, outcome)

    def welcome(self, future: Any) -> None:
        """Take a new worker, unless its node died before it was there; another one is asked for then."""
        worker = self.starting.pop(future)
        try:
            self.ray.get(future)
            self.idle.append(worker)
        except self.ray.exceptions.RayError as error:
            self.lost += 1
            if self.lost > LOST:
                cause = " ".join(str(error).split())[-300:]
                raise UserError(f"{self.lost} workers died before their first cell; the last: {cause}") from None

    def stop(self) -> None:
        """Let all runs in progress unwind; a second signal cuts that short."""
        for worker, _ in self.running.values():
            worker.stop.remote()
        deadline, left = time.monotonic() + GRACE, list(self.running)
        while left and time.monotonic() < deadline:
            _, left = self.ray.wait(left, num_returns=1, timeout=1)


def start_ray(ray: Any) -> None:
    """Join the cluster at RAY_ADDRESS, or start Ray on this machine for the time of the sweep."""
    address = os.environ.get("RAY_ADDRESS")
    python_path = os.pathsep.join(filter(None, (str(paths.UTILS), os.environ.get("PYTHONPATH"))))
    asked = os.environ.get("DEVICES", "")
    cpus = devices.cpu_cores() if devices.nvidia_driver() and asked != "cpu" else cpu_slots()
    # local: else Ray joins whatever cluster it finds on this machine
    own = {"address": "local", "include_dashboard": False, "num_cpus": cpus, "object_store_memory": 10**8}
    if asked and asked != "cpu":
        if "cpu" in asked:
            raise UserError(f"DEVICES={asked}: a sweep trains each cell on one CPU slot; say cpu")
        if address:
            raise UserError(f"DEVICES={asked}: a cluster's workers take the GPUs that Ray gives them; leave it away")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices.choose())  # these GPUs alone, a worker for each
    unwind = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            **({"address": address} if address else own),
            log_to_driver=False,
            logging_level="error",
            # Ray puts the interpreter into a shell's command as it is
            runtime_env={
                "env_vars": {"PYTHONPATH": python_path, **settings()},
                "py_executable": shlex.quote(sys.executable),
            },
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        what = f"RAY_ADDRESS={address}: cannot be joined" if address else "Ray cannot be started on this machine"
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from None
    signal.signal(signal.SIGTERM, unwind)  # Ray's own kills the runs before they unwind


def has_ray_token() -> bool:
    """Whether this user has a token for Ray clusters, where Ray looks for it."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


def settings() -> dict[str, str]:
    """The user's settings that every run gets."""
    beside = {"OMP_NUM_THREADS": str(max(1, devices.cpu_cores() // cpu_slots())), "PARAGEN_CPU_SLOTS": str(cpu_slots())}
    threads = {} if devices.nvidia_driver() else beside
    tokens = {"PARAGEN_TOKENS": str(paths.SAVES / ".tokens")}
    # make exports what is not set as empty; that must not hide what a node says
    return threads | tokens | {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}


def cpu_slots() -> int:
    """How many cells train side by side on this machine's CPU: one per core, 8 GB of memory for each.

    On a Mac one: torch takes its GPU, which Ray does not know.
    """
    return 1 if sys.platform == "darwin" else max(1, min(devices.cpu_cores(), psutil.virtual_memory().total >> 33))


def choose_devices(ray: Any) -> bool:
    """Whether this sweep trains on CPUs: as DEVICES=cpu asks, or since there is no GPU.

    It stays so: when the last node with a GPU is lost, cells wait for another. Raises UserError for what is asked and
    not there.
    """
    asked, count = os.environ.get("DEVICES", ""), packs.gpus_per_cell()
    gpus = [int(there.get("GPU", 0)) for there in nodes(ray)]
    on_cpu = asked == "cpu" or not any(gpus)
    if on_cpu and asked not in ("", "cpu"):
        raise UserError(f"DEVICES={asked}: there is no GPU here; leave it away, or say cpu")
    if on_cpu and count > 1:
        raise UserError(f"GPUS_PER_CELL={count}: there is no GPU to train on; leave it away")
    if not on_cpu and max(gpus) < count:
        raise UserError(f"GPUS_PER_CELL={count}: no machine has so many GPUs, the largest has {max(gpus)}")
    return on_cpu


def nodes(ray: Any) -> list[dict[str, float]]:
    """What each node of the cluster has, as it is now."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def slots(ray: Any, on_cpu: bool) -> int:
    """How many cells the cluster can train at once, as it is now; the GPUs of a cell are of one node."""
    if on_cpu:
        return sum(int(there.get("CPU", 0)) for there in nodes(ray))
    return sum(min(int(there.get("CPU", 0)), int(there.get("GPU", 0)) // packs.gpus_per_cell()) for there in nodes(ray))


def new_worker(ray: Any, worker_class: type, on_cpu: bool) -> Any:
    """A new slot as an actor that sees its own devices alone."""
    if on_cpu:
        kind = ray.remote(num_cpus=1, num_gpus=0, max_concurrency=2, max_restarts=0)(worker_class)
        return kind.remote(settings(), "" if sys.platform == "darwin" else "cpu")
    kind = ray.remote(num_cpus=1, num_gpus=packs.gpus_per_cell(), max_concurrency=2, max_restarts=0)(worker_class)
    return kind.remote(settings(), None)


def another(job: Job, outcome: Outcome) -> Job | None:
    """What is done next for a cell, where more is worth it: a second attempt, or the same one alone."""
    if outcome.kind == "not_packable":
        return job._replace(attempt=secrets.token_hex(4), kind=None)
    if job.number > 1 or outcome.kind not in ("killed", "out_of_memory"):
        return None
    smaller = (
        outcome.kind == "out_of_memory"
    )  # which the packed engine does by itself, so that this one was too large alone
    return Job(job.cell, secrets.token_hex(4), 2, smaller, None if smaller else job.kind)


def set_log_aside(job: Job, outcome: Outcome) -> Outcome:
    """Keep the log of an attempt that another one follows, under a name of its own; the outcome with that name."""
    log = cell_worker.log_of(job.cell)
    aside = log.with_name(f"{log.stem}_attempt-{job.number}.log")
    if log.is_file():
        log.replace(aside)
    return replace(outcome, log=paths.relative(aside) if outcome.log else "")


def claim(job: Job) -> bool:
    """Note on disk which attempt may give a cell's runs their names.

    False where another program is at work on one, whose run would lose its name. That is no matter to a second attempt:
    it is the first one that may still be there.
    """
    folders = [run.folder for run in job.cell.runs]
    if job.number == 1 and not all(files.is_free(files.beside(folder, "lock")) for folder in folders):
        return False
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(files.beside(folder, "attempt"), job.attempt.encode())
    return True


def release(job: Job) -> None:
    """Forget the claim of an attempt that ended."""
    for run in job.cell.runs:
        path = files.beside(run.folder, "attempt")
        if path.is_file() and path.read_text() == job.attempt:
            path.unlink()
