"""Deterministic kernels: two runs of the same training on the same kind of device give the same bits.

On a GPU some kernels add up in another order at each call, above all the backward pass of fused attention from about
300 tokens on. PyTorch has others that do not. DETERMINISTIC=0 trains with the fastest ones, whatever their order.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from paragen.common import settings
from paragen.common.cli import UserError

# What cuBLAS may use as workspace, so that its sums do not depend on what else runs; it is read when cuBLAS starts.
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # those that PyTorch accepts; the first is as fast as without
NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")  # PyTorch's message


def choose_workspace() -> bool:
    """Set cuBLAS's workspace as DETERMINISTIC says. Call it before a device is used.

    Returns whether kernels are to be deterministic. Raises UserError for a value that is no switch.
    """
    wanted = settings.switch("DETERMINISTIC")
    if wanted and os.environ.get(WORKSPACE) not in WORKSPACES:
        os.environ[WORKSPACE] = WORKSPACES[0]
    return wanted


def choose_kernels() -> None:
    """Set this process's kernels as DETERMINISTIC says. Call it before a device is used.

    cuDNN's fused attention has no deterministic backward pass; PyTorch's own have one. Memory that an operation returns
    unfilled stays so: nothing here reads it before it is written. Raises UserError for a value that is no switch.
    """
    _use_deterministic(choose_workspace())


@contextlib.contextmanager
def chosen_kernels() -> Iterator[None]:
    """While the body runs, kernels as DETERMINISTIC says; then the fastest ones, with which a process scores.

    The process calls `choose_workspace` before a device is used.
    """
    choose_kernels()
    try:
        yield
    finally:
        _use_deterministic(False)


def _use_deterministic(wanted: bool) -> None:
    import torch
    import torch.utils.deterministic

    torch.use_deterministic_algorithms(wanted)
    filling: Any = torch.utils.deterministic  # a module with a property, which type checkers do not see
    filling.fill_uninitialized_memory = False
    torch.backends.cuda.enable_cudnn_sdp(not wanted)
    if wanted:
        torch.backends.cudnn.benchmark = False


def are_kernels_deterministic() -> bool:
    """Whether this process trains with deterministic kernels alone, as the manifest records it."""
    import torch

    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@contextlib.contextmanager
def naming_missing_kernel() -> Iterator[None]:
    """Turn an exception of the body that `missing_kernel` knows into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if cause := missing_kernel(error):
            raise UserError(cause) from None
        raise


def one_line(error: BaseException) -> str:
    """An exception of PyTorch in one line: what `missing_kernel` says of it, else its text."""
    return missing_kernel(error) or " ".join(str(error).split())[:200]


def missing_kernel(error: BaseException) -> str | None:
    """The cause and the way out where an exception means that an operation has no deterministic kernel, else None."""
    found = NO_KERNEL.search(str(error)) if isinstance(error, RuntimeError) else None
    return (
        found and f"{found[1]} has no deterministic kernel on this device; DETERMINISTIC=0 trains with the fastest ones"
    )
