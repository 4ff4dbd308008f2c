"""The statistics of collections below saves/stats: which are there, making the missing ones, and printing them.

A collection's statistics are up to date when they were made from its manifest as it is, by METHOD. PyTorch is imported
only where some are to be made.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paragen.collection import derived, index
from paragen.common import cli, devices, parallel, paths
from paragen.common.cli import UserError, say

if TYPE_CHECKING:
    import torch

    from paragen.analysis.measures import Measured

METHOD = "stats-2"  # to be changed whenever the numbers change
AT_ONCE = 2  # collections: one computes while another is read or written
GPU_BYTES = 8 << 30  # that measuring takes of a GPU's memory at most
WAY_OUT = "move it away, then run make stats again"  # of what is in the place of statistics


class GivenUp(Exception):
    """A collection was not measured to its end, as no time was left."""


def update(chosen: list[index.Chosen], out: Path | None = None) -> int:
    """Measure new and changed collections, below `out` (default: saves/stats), and print a table of each.

    A damaged one is named on stderr, and the others are measured all the same. Returns how many were damaged; where
    only one was chosen, raises its UserError.
    """
    out = out or paths.SAVES / "stats"
    missing = missing_of(chosen, out)
    names = {one.name for one in missing}
    for one in chosen:
        if one.name not in names:
            say(f"there already: {paths.relative(out / one.name)}")
            print_table(out / one.name)
    faults = 0
    for one, fault in make(missing, out):
        if fault is None:
            print_table(out / one.name)
        elif len(chosen) == 1:
            raise fault
        else:
            faults += 1
            cli.complain(str(fault))
    return faults


def missing_of(chosen: list[index.Chosen], out: Path) -> list[index.Chosen]:
    """The collections without statistics that are up to date and have the bytes of when they were made."""
    record = derived.read_record(out, WAY_OUT)
    return [one for one in chosen if not derived.is_whole(out, one.name, source_of(one), record)]


def source_of(one: index.Chosen) -> dict[str, Any]:
    """What a collection's statistics are made from."""
    return {"format": "stats", "method": METHOD, "manifest": one.manifest.sha256}


def make(
    missing: list[index.Chosen],
    out: Path,
    deadline: float | None = None,
    advance: Callable[[int], None] = lambda size: None,
) -> Iterator[tuple[index.Chosen, UserError | None]]:
    """Measure collections, AT_ONCE at a time, and write their statistics below `out`.

    Args:
        missing: the collections.
        out: the folder of all statistics.
        deadline: by time.monotonic(); a collection that is not done then is given up.
        advance: called, from several threads, with the number of bytes that were measured.

    Yields each collection that was not given up, in order, with the fault for which it has no statistics, or None. The
    fault is derived.NotReplaceable where something that is not ours is in the place of its statistics.
    """
    if not missing:
        return
    devices.pin(devices.choose()[:1])
    import torch  # after the device is pinned

    from paragen.analysis import measures

    device = choose_device()
    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set() or (deadline is not None and time.monotonic() > deadline):
            raise GivenUp

    def measured(one: index.Chosen) -> "Measured | UserError | GivenUp":
        try:
            derived.check_replaceable(out, one.name, source_of(one), WAY_OUT)
            check()
            try:
                return measures.of_collection(one, device, check, advance)
            except torch.OutOfMemoryError:  # another program took the GPU's memory meanwhile
                say(f"the GPU has no memory left: {one.name} is measured on the CPU")
                return measures.of_collection(one, measures.CPU, check, advance)
        except (UserError, GivenUp) as error:
            return error

    with parallel.single_threaded(), ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for one, found in zip(missing, pool.map(measured, missing), strict=True):
                if isinstance(found, UserError):
                    yield one, found
                elif not isinstance(found, GivenUp):
                    yield one, written(one, out, partial(measures.write, one, found))
        finally:
            stopped.set()


def written(one: index.Chosen, out: Path, write: Callable[[Path], None]) -> UserError | None:
    """Put a collection's statistics in their place. Returns the fault where something that is not ours came there."""
    try:
        derived.make_part(out, one.name, source_of(one), write, done="statistics", way_out=WAY_OUT)
    except derived.NotReplaceable as error:
        return error
    return None


def choose_device() -> "torch.device":
    """The GPU, where torch can use one that has memory to spare; else the CPU."""
    import torch

    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        if free >= GPU_BYTES:
            return torch.device("cuda")
        say(f"made on the CPU: of the GPU's memory {free / 1e9:.1f} GB are free, {GPU_BYTES / 1e9:.1f} needed")
    return torch.device("cpu")


def broken(path: Path, error: Exception) -> UserError:
    """The error of a file of statistics that cannot be read: of an earlier version, which recorded no hashes."""
    return UserError(
        f"{paths.relative(path)}: broken ({' '.join(str(error).split())[:100]}); make stats FORCE=1 makes it again"
    )


def print_table(folder: Path) -> None:
    """Print a collection's statistics by kind of layer. Their hashes were verified by `missing_of`, where they were not
    just made; those that an earlier version made have none."""
    import pyarrow
    import pyarrow.parquet

    path = folder / "stats.parquet"
    try:
        table = pyarrow.parquet.read_table(path, memory_map=False).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise broken(path, error) from None
    kinds: dict[str, list[dict]] = {}
    for row in table:
        if row["tensor"] == "update":
            kinds.setdefault(row["layer"].rsplit(".", 1)[-1], []).append(row)
    rows = []
    for kind, found in kinds.items():
        figures = ("norm_last", "change_mean", "effective_rank_mean", "importance")
        means = [sum(row[name] for row in found) / len(found) for name in figures]
        rows.append((kind, str(len(found)), *(f"{mean:.3g}" for mean in means)))
    cli.print_table(("layers", "count", "norm", "change per step", "effective rank", "importance"), rows)
