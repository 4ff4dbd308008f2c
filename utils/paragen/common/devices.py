"""Which devices and how many CPU threads a run gets. Call `pin` before torch is imported: torch reads its environment
when it starts.

DEVICES=1            the second GPU              DEVICES=0,1   two GPUs, one process each, same effective batch
DEVICES=cpu          the CPU                     DEVICES=cpu,cpu   two CPU processes
(nothing)            the first visible GPU, else any accelerator that torch finds, else the CPU

On the CPU a run gets a thread per physical core but one, or as many as OMP_NUM_THREADS says. The number never depends
on what else the machine does, because sums of another number of threads have other bits. One core is left to the rest:
the threads wait for each other after each operation, so that a single one that shares its core delays all of them.
"""

import contextlib
import functools
import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from paragen.common.cli import UserError, say

if TYPE_CHECKING:
    import torch

CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # this process's control group, and all of them
# The keys of recipes for GPUs that a CPU cannot follow, set for float32 there.
CPU_SETTINGS = {"use_cpu": True, "bf16": False, "fp16": False, "pure_bf16": False, "tf32": False}


def choose() -> list[str]:
    """The devices of this run: `cpu` entries, or GPU numbers or UUIDs as CUDA_VISIBLE_DEVICES takes them.

    An empty list means that there is no NVIDIA GPU and torch chooses. Raises UserError for a mixture of both, for a
    repeated GPU, for one outside CUDA_VISIBLE_DEVICES, or for one that this machine does not have.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    requested = [part.strip() for part in os.environ.get("DEVICES", "").split(",") if part.strip()]
    if requested:
        gpus = [device for device in requested if device != "cpu"]
        if gpus and (len(gpus) != len(requested) or len(set(gpus)) != len(gpus)):
            raise UserError(f"DEVICES={','.join(requested)}: give GPU numbers, each once, or only cpu")
        if any(not re.fullmatch(r"\d+|(GPU|MIG)-[\w-]+", gpu) for gpu in gpus):
            raise UserError(f"DEVICES={','.join(requested)}: not GPU numbers or UUIDs; write 0 or 0,1 or cpu")
        if gpus and visible and not set(gpus) <= set(visible.split(",")):
            raise UserError(f"DEVICES={','.join(requested)}: outside CUDA_VISIBLE_DEVICES={visible}")
        if gpus:
            check_present(gpus)
        return requested
    if visible is not None:
        found = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
        if len(found) > 1:
            say(f"CUDA_VISIBLE_DEVICES={visible}: training on {found[0]} alone; DEVICES={visible} uses all of them")
        return found[:1] or ["cpu"]
    return ["0"] if nvidia_driver() else []


def check_present(gpus: list[str]) -> None:
    """Raise UserError where a GPU does not exist, with those that do.

    Args:
        gpus: numbers or UUIDs; a UUID may be cut short, as in CUDA_VISIBLE_DEVICES.
    """
    requested = f"DEVICES={','.join(gpus)}"
    if Path("/dev/kfd").exists():  # AMD's driver, whose GPUs torch takes by number, too
        return
    there = nvidia_gpus()
    if not there:
        raise UserError(f"{requested}: there is no NVIDIA GPU here; omit DEVICES, or set DEVICES=cpu")

    def exists(gpu: str) -> bool:
        uuids = [uuid for uuid in there.values() if uuid]  # of whole GPUs, where nvidia-smi tells them
        is_known = any(uuid.startswith(gpu) for uuid in uuids) or gpu.startswith("MIG-") or not uuids
        return gpu in there if gpu.isdigit() else is_known

    if not all(map(exists, gpus)):
        have = f"GPUs {', '.join(there)}; name some of them" if len(there) > 1 else "a single GPU, 0; name it"
        raise UserError(f"{requested}: this machine has {have}, or set DEVICES=cpu")


def pin(devices: list[str]) -> None:
    """Let torch see these devices only, and set its CPU threads. Call it before torch is imported.

    Args:
        devices: as `choose` returns them.
    """
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if devices[0] == "cpu" else ",".join(devices)
    let_threads_sleep()
    if devices[:1] in ([], ["cpu"]):
        set_threads(threads(len(devices) or 1))
    elif len(devices) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which prints a warning about it


def let_threads_sleep() -> None:
    """Have the CPU threads of torch sleep while they wait for each other. Call it before torch is imported.

    By default they spin for a while, which takes the core from the thread that they wait for when another process keeps
    one busy. bench/README.md has figures. The bits are the same.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def threads(processes: int = 1) -> int:
    """How many CPU threads each of some processes gets: OMP_NUM_THREADS, else its share of the physical cores but one.

    Raises UserError where OMP_NUM_THREADS is not a number from 1 up.
    """
    requested = os.environ.get("OMP_NUM_THREADS")
    if not requested:
        return max(1, (physical_cores() - 1) // processes)
    first = requested.split(",")[0].strip()  # the others are for parallel regions within parallel ones
    if not first.isdecimal() or int(first) == 0:
        raise UserError(f"OMP_NUM_THREADS={requested}: is not a number of threads from 1 up; omit it, or set another")
    return int(first)


def set_threads(count: int) -> None:
    """Have this process and those that it starts use `count` CPU threads each."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:  # in a process forked from one that has imported it
        import torch

        torch.set_num_threads(count)


@functools.cache
def say_once(line: str) -> None:
    """Print a line once per process, and once for the processes of one training."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(line)


def settings(devices: list[str]) -> dict[str, bool]:
    """Recipe keys that the devices require: none on an accelerator, float32 on the CPU (one line is printed).

    Raises UserError when there is an NVIDIA GPU that this torch build cannot use.
    """
    import torch
    from llamafactory.extras.misc import is_accelerator_available

    if devices and devices[0] != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"GPU {devices[0]} cannot be used: the driver ({nvidia_driver() or 'none found'}) does not support torch "
            f"{torch.__version__}; update the driver, or train on the CPU with DEVICES=cpu"
        )
    if devices[:1] != ["cpu"] and is_accelerator_available():
        return {}
    count = torch.get_num_threads()
    reason, plural = "" if devices else "no accelerator: ", "s" if count > 1 else ""
    say_once(f"{reason}training in float32 on the CPU, {count} thread{plural} (OMP_NUM_THREADS sets the number)")
    return CPU_SETTINGS


def cpu_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """The physical cores among those: two threads on one core would only share its arithmetic units."""
    import psutil

    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or cpu_cores()
    listed = (
        Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in os.sched_getaffinity(0)
    )
    return len({path.read_text() for path in listed if path.is_file()}) or cpu_cores()


def available_memory() -> int:
    """The bytes of main memory that a process can take without anything being swapped out, or this being killed."""
    import psutil

    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _memory_limits())])


def total_memory() -> int:
    """The bytes of main memory that this process and those beside it may have."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit for limit, _ in _memory_limits())])


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(The limit, what is used of it) of the control groups that this process is in, as Slurm and containers set them.

    Files that the system keeps in memory and could drop do not count as used.
    """
    own = re.search(r"^0::/(.*)$", CGROUP.read_text(), re.MULTILINE) if CGROUP.is_file() else None
    for group in [CGROUPS / own[1], *(CGROUPS / own[1]).parents] if own else []:
        with contextlib.suppress(OSError, ValueError, TypeError):  # no such file, or "max": this group has no limit
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            kept = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            yield limit, max(0, used - int(kept[1])) if kept else used


def free_memory() -> None:
    """Free the memory of models that are no longer used, for this process and for others on the device."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()


def own() -> "torch.device":
    """The device that this process computes on, which is pinned: its first GPU, or the CPU where it sees none."""
    import torch

    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def free_bytes(device: "torch.device") -> int:
    """The free memory of a device, bytes, with what torch has reserved but does not use.

    Of what is free, the share of this process: where a sweep or a benchmark runs several (PARAGEN_CPU_SLOTS), or a
    benchmark several on a GPU (PARAGEN_GPU_SLOTS).
    """
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] // int(os.environ.get("PARAGEN_GPU_SLOTS") or 1) + unused
    return available_memory() // int(os.environ.get("PARAGEN_CPU_SLOTS") or 1)


def describe() -> str:
    """The name of the device that this process trains on, as the manifest records it."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def kind_of(device: str) -> str:
    """The name of a device as `choose` gives it, such as `NVIDIA H100 80GB HBM3`, or `cpu`; torch is not needed."""
    if device == "cpu" or not shutil.which("nvidia-smi"):
        return "cpu" if device == "cpu" else "GPU"
    query = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", f"--id={device}"], capture_output=True, text=True
    )
    return query.stdout.strip() if query.returncode == 0 else "GPU"


def nvidia_gpus() -> dict[str, str]:
    """The UUIDs of this machine's NVIDIA GPUs by their numbers; an empty text where nvidia-smi does not tell."""
    if shutil.which("nvidia-smi"):
        query = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"], capture_output=True, text=True
        )
        if found := re.findall(r"^(\d+), *(GPU-[\w-]+)", query.stdout, re.MULTILINE):
            return dict(found)
    return {str(number): "" for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))}


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, or None on a machine without an NVIDIA GPU."""
    if shutil.which("nvidia-smi"):
        query = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        if query.returncode == 0 and query.stdout.strip():
            return query.stdout.split("\n")[0].strip()
    if Path("/dev/nvidia0").exists() and (version := Path("/proc/driver/nvidia/version")).is_file():
        return (re.search(r"\d+\.\d+(\.\d+)?", version.read_text()) or ["unknown"])[0]
    return None
