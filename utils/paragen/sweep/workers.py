"""The workers of a sweep: one per slot (a device, GPUS_PER_CELL devices, or a CPU core), and the task each is at."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from paragen.common.cli import UserError
from paragen.sweep import ray_cluster
from paragen.sweep.session import STOP_SECONDS, Session

MAX_LOST_WORKERS = 20  # workers that may die before their first task; more mean that the set-up is at fault
IDLE_SECONDS = 120  # without any task at work, after which a sweep is stuck


class RayDied(Exception):
    """The result of a task that was at work when this machine's Ray died."""


class Ended(NamedTuple):
    """A task that ended."""

    task: Any
    worker: Any
    result: Any  # what the worker returned, or the exception that ended the task
    machine: str | None = None  # the name of the one that the worker ran on, where that is known


class Scheduler(Protocol):
    """What gives tasks to workers, a step at a time."""

    waiting: Any  # the tasks that no worker has yet, a collection

    def step(self) -> None:
        """Give what can be given, and take the results there are."""


class WorkTimes:
    """For which share of the time each worker has a task, one that takes the place of a dead one counted with it."""

    def __init__(self) -> None:
        self.workers: list[Any] = []  # None: it died
        self.spent: list[float] = []  # seconds at tasks
        self.began: list[float | None] = []  # when the present task began
        self.first = self.last = 0.0  # when the first task began, and the last one ended

    def begin(self, worker: Any) -> None:
        """A worker begins a task."""
        now = time.monotonic()
        self.first = self.first or now
        if worker not in self.workers and None not in self.workers:
            self.workers.append(None)
            self.spent.append(0.0)
            self.began.append(None)
        place = self.workers.index(worker if worker in self.workers else None)
        self.workers[place], self.began[place] = worker, now

    def end(self, worker: Any) -> None:
        """A worker's task ended."""
        place, self.last = self.workers.index(worker), time.monotonic()
        self.spent[place] += self.last - (self.began[place] or self.last)
        self.began[place] = None

    def keep(self, alive: list[Any]) -> None:
        """All workers but these have died."""
        for place, worker in enumerate(self.workers):
            if worker not in alive:
                if self.began[place] is not None:
                    self.end(worker)
                self.workers[place] = None

    @property
    def seconds(self) -> float:
        """The time from the begin of the first task to the end of the last."""
        return self.last - self.first

    def shares(self) -> list[float]:
        """Which share of `seconds` each had a task."""
        return [spent / self.seconds for spent in self.spent] if self.seconds > 0 else []


class Workers:
    """Ray actors that are starting, idle, or at a task.

    Args:
        session: Ray.
        worker_class: called with environment variables and the value of DEVICES; has `ready()` and `stop()`.
        gpus: those of a worker (default: GPUS_PER_CELL).
    """

    def __init__(self, session: Session, worker_class: type, gpus: int | None = None):
        self.session, self.worker_class, self.gpus = session, worker_class, gpus
        self.on_cpu = ray_cluster.choose_devices(session.ray, gpus)
        self.running: dict[Any, tuple[Any, Any]] = {}  # future -> (worker, its task)
        self.starting: dict[Any, Any] = {}  # future -> worker that is not ready yet
        self.idle: list[Any] = []
        self.machines: dict[Any, str | None] = {}  # the names, by worker
        self.lost = 0  # workers that died before their first task
        self.last_active = time.monotonic()  # when a task was at work, or `is_stuck` was True
        self.times = WorkTimes()

    @property
    def slots(self) -> int:
        """How many tasks can be at work at the same time now."""
        return ray_cluster.count_slots(self.session.ray, self.on_cpu, self.gpus)

    def start_missing(self, waiting: int) -> bool:
        """Start the workers missing for `waiting` more tasks. Returns whether any starts while nothing runs."""
        self.idle = [worker for worker in self.idle if self._is_alive(worker)]
        self.times.keep([*self.idle, *(worker for worker, _ in self.running.values())])
        wanted = min(self.slots, waiting + len(self.running))
        new = wanted - len(self.running) - len(self.idle) - len(self.starting)
        is_first = new > 0 and not (self.running or self.starting)
        for _ in range(new):
            worker = ray_cluster.new_worker(self.session.ray, self.worker_class, self.on_cpu, self.gpus)
            self.starting[worker.ready.remote()] = worker
        return is_first

    def run(self, scheduler: "Scheduler") -> None:
        """Take steps until nothing waits or is at work; an exception first lets the tasks at work clean up."""
        try:
            while scheduler.waiting or self.running:
                scheduler.step()
        except BaseException:
            self.stop()
            raise

    def give(self, task: Any, call: Callable[[Any], Any], worker: Any = None) -> None:
        """Have an idle worker do a task.

        Args:
            task: returned with the result.
            call: takes the worker and returns the future of the result.
            worker: an idle one (default: any).
        """
        worker = worker or self.idle[-1]
        self.idle.remove(worker)
        self.times.begin(worker)
        self.running[call(worker)] = worker, task

    def wait(self) -> list[Ended]:
        """Wait up to a second for tasks to end.

        Raises UserError where too many workers died before their first task.
        """
        futures = [*self.running, *self.starting]
        if not futures:  # all nodes are gone; others may join
            time.sleep(1)
            return []
        done, _ = self.session.ray.wait(futures, num_returns=1, timeout=1)
        ended = []
        for future in done:
            if future in self.starting:
                self._add(future)
            else:
                ended.append(self._end(future))
        return ended

    def _end(self, future: Any) -> Ended:
        """Take the result of a task; its worker is idle unless it died."""
        worker, task = self.running.pop(future)
        self.times.end(worker)
        try:
            result = self.session.ray.get(future)
        except self.session.ray.exceptions.RayError as error:
            result = error
        if not isinstance(result, Exception) or self.is_fault(result):
            self.idle.append(worker)
        return Ended(task, worker, result, self.machines.get(worker))

    def is_fault(self, error: Exception) -> bool:
        """Whether the exception that ended a task is of its own code, and not the death of its worker."""
        return isinstance(error, self.session.ray.exceptions.RayTaskError)

    def is_stuck(self, waiting: int) -> bool:
        """Whether tasks wait but none was at work for a while; True once in IDLE_SECONDS."""
        now = time.monotonic()
        if self.running or not waiting:
            self.last_active = now
        stuck = now - self.last_active > IDLE_SECONDS
        if stuck:
            self.last_active = now
        return stuck

    def restart(self) -> list[Any]:
        """Start this machine's Ray, which died, again; returns the tasks that were at work.

        Raises UserError where it died before.
        """
        self.session.start_again()
        tasks = [task for _, task in self.running.values()]
        self.running, self.starting, self.idle = {}, {}, []
        return tasks

    def stop(self) -> None:
        """Let the tasks at work clean up; a second signal cuts that short."""
        if not self.session.is_up or self.session.is_dead():
            return  # the session ends them
        for worker, _ in self.running.values():
            worker.stop.remote()
        deadline, left = time.monotonic() + STOP_SECONDS, list(self.running)
        while left and time.monotonic() < deadline:
            _, left = self.session.ray.wait(left, num_returns=1, timeout=1)

    def _is_alive(self, worker: Any) -> bool:
        """Whether an idle worker still answers; its node may be gone. One that does not is ended: it holds a device."""
        try:
            self.session.ray.get(worker.ready.remote(), timeout=STOP_SECONDS)
        except self.session.ray.exceptions.RayError:
            self.machines.pop(worker, None)
            self.session.ray.kill(worker)
            return False
        return True

    def _add(self, future: Any) -> None:
        """Add a worker that is ready to the idle ones; one whose node died meanwhile is replaced at the next step."""
        worker = self.starting.pop(future)
        try:
            self.machines[worker] = self.session.ray.get(future)
            self.idle.append(worker)
        except self.session.ray.exceptions.RayError as error:
            self.lost += 1
            if self.lost > MAX_LOST_WORKERS:
                cause = " ".join(str(error).split())[-300:]
                raise UserError(f"{self.lost} workers died before their first cell; the last: {cause}") from None
