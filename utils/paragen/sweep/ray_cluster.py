"""Ray for a sweep: starting or joining it, the devices it has, and the settings that its workers get."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paragen.common import devices, locks, paths, settings
from paragen.common.cli import UserError
from paragen.sweep import packs

# The user's environment variables that every run gets, on whichever machine it runs.
SETTINGS = (
    "FORCE", "PRUNE_PRETRAIN", "STAGE_DIR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LLAMAFACTORY_VERBOSITY",
    "HF_HUB_OFFLINE", "ENGINE", "DETERMINISTIC", "EVALUATE", "SPLIT", "STEPS", "LIMIT",
)  # fmt: skip
SESSION_BYTES = 50_000_000  # that Ray writes into its temporary folder: sockets, logs
CONNECT_SECONDS = 5  # that a cluster may take to answer
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2's, with empty settings
SETTINGS_FRAME = 4  # its type, the fourth byte of what an HTTP/2 server, such as Ray's, sends first
# Asks the cluster at an address for something, and ends with status REFUSED where it wants another token.
REFUSED = 3
ASK = f"""
import sys
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    there = canonicalize_bootstrap_address(sys.argv[1])
    GcsClient(address=there).internal_kv_get(b"paragen", b"paragen", timeout={CONNECT_SECONDS})
except AuthenticationError:
    sys.exit({REFUSED})
"""


def check_settings() -> None:
    """Raise UserError for values of DEVICES and RAY_ADDRESS with which no sweep can start."""
    requested, address = os.environ.get("DEVICES", ""), os.environ.get("RAY_ADDRESS", "")
    if requested and requested != "cpu":
        if "cpu" in requested:
            raise UserError(f"DEVICES={requested}: a sweep trains each cell on one CPU slot; set DEVICES=cpu")
        if address:
            raise UserError(f"DEVICES={requested}: a cluster's workers take the GPUs that Ray gives them; omit DEVICES")
        devices.choose()
    if address:
        check_reachable(address)
        check_token(address)


def start_ray(ray: Any) -> None:
    """Join the cluster at RAY_ADDRESS, or start Ray on this machine until `ray.shutdown()`."""
    address = os.environ.get("RAY_ADDRESS")
    python_path = os.pathsep.join(filter(None, (str(paths.UTILS), os.environ.get("PYTHONPATH"))))
    requested = os.environ.get("DEVICES", "")
    cpus = cpu_slots() if trains_on_cpu() else devices.cpu_cores()
    # "local": without it, Ray joins any cluster that it finds on this machine
    own = {"address": "local", "include_dashboard": False, "num_cpus": cpus, "object_store_memory": 10**8}
    if requested and requested != "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices.choose())  # Ray then sees these GPUs alone
    if not address:
        check_temporary_room()
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # else a Python is started for each core
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            **({"address": address} if address else own),
            log_to_driver=False,
            logging_level="error",
            # Ray puts the interpreter's path into a shell command without quoting it
            runtime_env={
                "env_vars": {"PYTHONPATH": python_path, **run_settings(on_cpu=False)},
                "py_executable": shlex.quote(sys.executable),
            },
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        what = f"RAY_ADDRESS={address}: cannot be joined" if address else "Ray cannot be started on this machine"
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from None
    signal.signal(signal.SIGTERM, handler)  # Ray's own handler kills the runs before they can clean up
    shorten_messages(ray)


def check_temporary_room() -> None:
    """Raise UserError where this machine's own Ray cannot write its session: it would wait for a file and time out."""
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}, but Ray writes there; set TMPDIR to a folder that exists"
        ) from None
    if free < SESSION_BYTES:
        raise UserError(
            f"{folder}: {free / 1e6:.0f} MB are free, and Ray needs {SESSION_BYTES / 1e6:.0f} MB there; free some "
            "space, or set TMPDIR to a short path on another disk"
        )


def shorten_messages(ray: Any) -> None:
    """Have Ray print the first line of each of its messages alone: below that of a dead server is its log."""
    worker = ray._private.worker
    printed = worker.print_to_stdstream

    def print_first_line(data: dict[str, Any], **options: Any) -> None:
        printed({**data, "lines": [line.split("\n")[0] for line in data["lines"]]}, **options)

    worker.print_to_stdstream = print_first_line


def check_reachable(address: str) -> None:
    """Raise UserError unless a server that speaks Ray's protocol answers at the `host:port` of a cluster.

    Ray itself would try for minutes. Other values, such as `auto`, it looks up at once.

    Args:
        address: the value of RAY_ADDRESS.
    """
    if address.startswith("ray://"):
        raise UserError(f"RAY_ADDRESS={address}: Ray's client protocol is not supported; name the head as host:6379")
    found = re.fullmatch(r"(.+):(\d+)", address)
    if not found:
        return
    try:
        with socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=CONNECT_SECONDS) as connection:
            connection.sendall(GREETING)
            answer = connection.recv(4)
        if answer[3:] == bytes([SETTINGS_FRAME]) or os.environ.get("RAY_USE_TLS") == "1":
            return
        cause = "what answers there is not Ray"
    except (OSError, OverflowError) as error:
        cause = getattr(error, "strerror", None) or str(error)
    raise UserError(
        f"RAY_ADDRESS={address}: cannot be joined: {cause}; start a cluster there, or omit RAY_ADDRESS to use this "
        "machine alone"
    )


def check_token(address: str) -> None:
    """Raise UserError where a cluster answers without a token (unless ALLOW_OPEN_RAY=1), or refuses the user's.

    Ray gives whoever reaches a cluster without a token a shell as its user. That this user has one says nothing: such a
    cluster ignores it.

    Args:
        address: the value of RAY_ADDRESS.
    """
    if accepts(address, {"RAY_AUTH_MODE": "disabled"}):
        if not settings.switch("ALLOW_OPEN_RAY"):
            raise UserError(
                f"RAY_ADDRESS={address}: is a cluster without a token: whoever reaches it runs code as its user; start "
                "it with RAY_AUTH_MODE=token (collect_scripts/README.md), or set ALLOW_OPEN_RAY=1"
            )
    elif not has_ray_token() or not accepts(address, {"RAY_AUTH_MODE": "token"}):
        what = "refuses the token that is here" if has_ray_token() else "asks for a token, and none is here"
        raise UserError(
            f"RAY_ADDRESS={address}: {what}; set RAY_AUTH_TOKEN, or copy the cluster's ~/.ray/auth_token here"
        )


def accepts(address: str, environment: dict[str, str]) -> bool:
    """Whether a cluster answers a client with these variables besides the user's; False where it wants another token.

    A process of its own asks, because Ray reads RAY_AUTH_MODE once. Raises UserError where no answer comes.
    """
    command = [sys.executable, "-c", ASK, address]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode not in (0, REFUSED):
        cause = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise UserError(f"RAY_ADDRESS={address}: cannot be joined: {cause[:300]}")
    return done.returncode == 0


def use_ray_token() -> None:
    """Have Ray authenticate with the user's token, where there is one and a cluster is named.

    `ray start` does so on its own, `ray.init(address)` does not.
    """
    if os.environ.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in os.environ and has_ray_token():
        os.environ["RAY_AUTH_MODE"] = "token"


def has_ray_token() -> bool:
    """Whether this user has a token for Ray clusters, in the places where Ray looks for it."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


def run_settings(on_cpu: bool) -> dict[str, str]:
    """The environment variables that every run gets; those on a CPU share its cores and memory."""
    per_slot = {"OMP_NUM_THREADS": str(devices.threads(cpu_slots())), "PARAGEN_CPU_SLOTS": str(cpu_slots())}
    threads = per_slot if on_cpu else {}
    tokens = {"PARAGEN_TOKENS": str(paths.SAVES / paths.TOKENS)}
    # make exports unset variables as empty ones, which must not hide what is set on a node
    return threads | tokens | {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}


def trains_on_cpu() -> bool:
    """Whether this machine's workers train on its CPU: it has no NVIDIA GPU, DEVICES=cpu requests it, or the user
    hides all GPUs from this machine's own Ray."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden and not os.environ.get("DEVICES") and not os.environ.get("RAY_ADDRESS"):
        return True
    return os.environ.get("DEVICES") == "cpu" or not devices.nvidia_driver()


def cpu_slots() -> int:
    """How many cells train at the same time on this machine's CPU: one per core, with 8 GB of memory for each.

    On a Mac it is one: torch uses its GPU, which Ray does not know.
    """
    return 1 if sys.platform == "darwin" else max(1, min(devices.cpu_cores(), devices.total_memory() >> 33))


def slots_here() -> int:
    """How many slots a sweep would have on this machine; at RAY_ADDRESS that is not known: as many as one likes."""
    if os.environ.get("RAY_ADDRESS"):
        return sys.maxsize
    if trains_on_cpu():
        return 1 if Path("/dev/kfd").exists() else cpu_slots()  # AMD's driver, whose GPU torch takes
    return len(gpus_here())


def gpus_here() -> list[str]:
    """The GPUs of this machine that a sweep would use, as DEVICES or CUDA_VISIBLE_DEVICES names them, else all."""
    if os.environ.get("DEVICES"):
        return devices.choose()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(devices.nvidia_gpus()) if visible is None else [gpu for gpu in visible.split(",") if gpu.strip()]


@contextlib.contextmanager
def only_sweep_here() -> Iterator[None]:
    """Hold this machine's devices for a sweep of this repository; at RAY_ADDRESS there is nothing to hold.

    Raises UserError where another sweep holds one of them.
    """
    on_cpu, host, uuids = trains_on_cpu(), socket.gethostname(), devices.nvidia_gpus()
    with contextlib.ExitStack() as stack:
        for device in [] if os.environ.get("RAY_ADDRESS") else ["cpu"] if on_cpu else gpus_here():
            try:
                gpu = uuids.get(device) or device  # containers of one host may number different GPUs alike
                stack.enter_context(locks.lock(paths.SAVES / f".sweep-on-{host}-{gpu}.lock"))
            except locks.Busy:
                held = "the CPU" if on_cpu else f"GPU {device}"
                way_out = "wait for it" if on_cpu else "wait for it, or choose other GPUs with DEVICES"
                raise UserError(f"another sweep is running on {held} of this machine; {way_out}") from None
        yield


def choose_devices(ray: Any, count: int | None = None) -> bool:
    """Whether this sweep trains on CPUs: because DEVICES=cpu requests it, or because there is no GPU.

    Args:
        ray: the module, initialised.
        count: the GPUs of a worker (default: GPUS_PER_CELL).

    The choice holds for the whole sweep: when the last node with a GPU is lost, cells wait for another one. Raises
    UserError where requested devices do not exist.
    """
    requested, count = os.environ.get("DEVICES", ""), count or packs.gpus_per_cell()
    gpus = [int(resources.get("GPU", 0)) for resources in node_resources(ray)]
    on_cpu = requested == "cpu" or not any(gpus)
    if on_cpu and requested not in ("", "cpu"):
        raise UserError(f"DEVICES={requested}: there is no GPU here; omit DEVICES, or set DEVICES=cpu")
    if on_cpu and count > 1:
        raise UserError(f"GPUS_PER_CELL={count}: there is no GPU to train on; omit it")
    if not on_cpu and max(gpus) < count:
        raise UserError(f"GPUS_PER_CELL={count}: no machine has so many GPUs, the largest has {max(gpus)}")
    return on_cpu


def node_resources(ray: Any) -> list[dict[str, float]]:
    """The resources (CPU, GPU, ...) of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def count_slots(ray: Any, on_cpu: bool, count: int | None = None) -> int:
    """How many workers of `count` GPUs each (default: GPUS_PER_CELL) have room now, each on one node."""
    nodes = node_resources(ray)
    if on_cpu:
        return sum(int(resources.get("CPU", 0)) for resources in nodes)
    gpus = count or packs.gpus_per_cell()
    return sum(min(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)) // gpus) for resources in nodes)


def new_worker(ray: Any, worker_class: type, on_cpu: bool, count: int | None = None) -> Any:
    """A new slot: a Ray actor that sees its own devices alone, `count` GPUs (default: GPUS_PER_CELL) or a CPU core."""
    if on_cpu:
        actor = ray.remote(num_cpus=1, num_gpus=0, max_concurrency=2, max_restarts=0)(worker_class)
        return actor.remote(run_settings(on_cpu), "" if sys.platform == "darwin" else "cpu")
    gpus = count or packs.gpus_per_cell()
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=2, max_restarts=0)(worker_class)
    return actor.remote(run_settings(on_cpu), None)
