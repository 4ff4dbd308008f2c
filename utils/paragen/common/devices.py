"""Which devices a run gets. Call `pin` before torch is imported: torch reads CUDA_VISIBLE_DEVICES when it starts.

DEVICES=1            the second GPU              DEVICES=0,1   two GPUs, one process each, same effective batch
DEVICES=cpu          the CPU                     DEVICES=cpu,cpu   two CPU processes
(nothing)            the first visible GPU, else any accelerator that torch finds, else the CPU
"""

import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paragen.common.cli import UserError, say

if TYPE_CHECKING:
    import torch

# The keys of recipes for GPUs that a CPU cannot follow, set for float32 there.
CPU_SETTINGS = {"use_cpu": True, "bf16": False, "fp16": False, "pure_bf16": False, "tf32": False}


def choose() -> list[str]:
    """The devices of this run: `cpu` entries, or GPU numbers or UUIDs as CUDA_VISIBLE_DEVICES takes them.

    An empty list means that there is no NVIDIA GPU and torch chooses. Raises UserError for a mixture of both, for a
    repeated GPU, or for one outside CUDA_VISIBLE_DEVICES.
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
        return requested
    if visible is not None:
        found = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
        if len(found) > 1:
            say(f"CUDA_VISIBLE_DEVICES={visible}: training on {found[0]} alone; DEVICES={visible} uses all of them")
        return found[:1] or ["cpu"]
    return ["0"] if nvidia_driver() else []


def pin(devices: list[str]) -> None:
    """Let torch see these devices only. Call it before torch is imported.

    Args:
        devices: as `choose` returns them.
    """
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if devices[0] == "cpu" else ",".join(devices)


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
    say("no accelerator: training in float32 on the CPU" if not devices else "training in float32 on the CPU")
    return CPU_SETTINGS


def cpu_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> None:
    """Free the memory of models that are no longer used, for this process and for others on the device."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()


def free_bytes(device: "torch.device") -> int:
    """The free memory of a device, bytes, with what torch has reserved but does not use.

    On the CPU: the share of this process where a sweep runs several (PARAGEN_CPU_SLOTS).
    """
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    slots = int(os.environ.get("PARAGEN_CPU_SLOTS") or 1)
    return psutil.virtual_memory().available // slots


def describe() -> str:
    """The name of the device that this process trains on, as the manifest records it."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


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
