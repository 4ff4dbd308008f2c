"""Ray while a sweep runs: this machine's own, which is started again once where it dies, or the cluster at RAY_ADDRESS.

On a cluster another node may join in place of a lost one. On one machine none will.
"""

import os

import psutil

from paragen.common import cli
from paragen.common.cli import UserError
from paragen.sweep import ray_cluster, stage

SERVERS = ("gcs_server", "raylet")  # the processes without which this machine's own Ray is dead
STOP_SECONDS = 25  # that stopped runs have to clean up


class Session:
    """Ray, initialised; a context manager that ends it.

    Args:
        staged: whether the workers need the file server (see stage.py).

    `ray` is the module; it must not be called while `is_up` is False. Raises UserError where Ray cannot be started.
    """

    def __init__(self, staged: bool = False):
        ray_cluster.use_ray_token()
        import ray

        self.ray, self.staged, self.is_up, self.was_restarted = ray, staged, False, False
        self.others: set[psutil.Process] = set()  # this process's children before Ray was started
        self.servers: list[psutil.Process] = []
        self.helpers: list[psutil.Process] = []  # that `ray.shutdown` ends
        self._start()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        if self.is_dead():
            self._end_dead()
        elif self.is_up:
            if self.staged:
                stage.stop_file_server(self.ray, self.file_server)
            self.is_up = False
            self.ray.shutdown()

    def is_dead(self) -> bool:
        """Whether this machine's own Ray died; on a cluster always False.

        Ask before other calls to Ray: where its server is dead, some wait for a minute and then end this process.
        """
        if not self.servers or not self.is_up:
            return False
        return any(map(has_ended, self.servers)) or not ray_cluster.node_resources(self.ray)

    def start_again(self) -> None:
        """Start this machine's own Ray again, once the processes of the dead one have ended.

        Raises UserError where it has died before.
        """
        self._end_dead()
        if self.was_restarted:
            raise UserError(
                "Ray died twice on this machine, and what was running has been stopped; free some memory, or look for "
                "what kills its processes, and run it again: what is complete is not done again"
            )
        self.was_restarted = True
        self._start()

    def _start(self) -> None:
        is_own = not os.environ.get("RAY_ADDRESS")
        if is_own:
            cli.adopt_orphans()  # so that `_end_dead` finds the runs of a dead Ray
            self.others = set(psutil.Process().children())
        ray_cluster.start_ray(self.ray)
        self.is_up = True
        if is_own:
            started = [child for child in psutil.Process().children() if child not in self.others]
            self.servers = [child for child in started if child.name() in SERVERS]
            self.helpers = [child for child in started if child not in self.servers]
        self.file_server = stage.start_file_server(self.ray) if self.staged else None

    def _end_dead(self) -> None:
        """End a dead Ray, its workers, and the runs below them, which clean up before they end."""
        mine = psutil.Process().children(recursive=True)
        others = {each for other in self.others for each in (other, *descendants(other))}
        left = [process for process in mine if process not in others and process not in self.helpers]
        for process in left:
            if is_ray(process):  # without its worker a run is stopped (see forked.py)
                process.kill()
        _, alive = psutil.wait_procs(left, STOP_SECONDS)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, STOP_SECONDS)
        self.is_up = False
        self.ray.shutdown()


def has_ended(process: psutil.Process) -> bool:
    """Whether a child of this process has ended."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def is_ray(process: psutil.Process) -> bool:
    """Whether a process is a server or a worker of Ray's."""
    try:
        return process.name() in SERVERS or process.name().startswith("ray::")
    except psutil.NoSuchProcess:
        return False


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """The processes below a process, none where it has ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
