"""The statistics that the report shows: it makes missing ones for at most SECONDS; `make stats` makes the rest."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from paragen.analysis import stats_files
from paragen.collection import index
from paragen.common.cli import UserError, say

if TYPE_CHECKING:
    import numpy as np

SECONDS = 60
NOT_MADE = "its statistics are not made yet; make stats makes them"


def make_missing(chosen: list[index.Chosen], out: Path) -> dict[str, UserError]:
    """Make statistics that are missing below `out`, those of the smallest collections first, and say what is left.

    Returns why a collection has none, by name: NOT_MADE, or the fault for which it cannot have them.
    """
    missing = stats_files.missing_of(chosen, out)
    without = {one.name: UserError(NOT_MADE) for one in missing}
    if not missing:
        return without
    sizes = {one.name: sum(entry.bytes for entry in one.manifest.checkpoints) for one in missing}
    total = sum(sizes.values())
    deadline = time.monotonic() + SECONDS
    size = f"{total / 1e9:.1f} GB"
    say(
        f"statistics: {len(missing)} of {len(chosen)} collections have none ({size}); making them for up to {SECONDS} s"
    )
    with progress(total) as advance:
        for one, fault in stats_files.make(sorted(missing, key=lambda one: sizes[one.name]), out, deadline, advance):
            if fault is None:
                del without[one.name]
            else:
                without[one.name] = fault
    left = sum(str(fault) == NOT_MADE for fault in without.values())
    if left:
        say(f"statistics: {left} of {len(chosen)} collections have none yet; make stats makes them")
    return without


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many of `total` bytes are done; call what it gives with those that were done since."""
    if not sys.stdout.isatty():  # a line per collection is printed anyway
        yield lambda size: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("statistics"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda size: bar.advance(task, size)


def read(folder: Path) -> "tuple[str, list[str], np.ndarray, np.ndarray, np.ndarray]":
    """The statistics in a folder, as the pictures show them. Their hashes are verified by stats_files.missing_of.

    Returns the base model's name, layers (names), steps (n,), sketches (n, d), and changes (layers, n): the norm of
    each layer's update less the one of the step before, over the norm of the update; NaN at the first step. Raises
    UserError for a broken file.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(folder / "steps.safetensors")
        about = json.loads((folder / "stats.json").read_bytes())
        change, norm = (tensors[name].astype(np.float64) for name in ("change", "norm"))
        named = about["base_model"], about["layers"], tensors["steps"], tensors["sketch"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise stats_files.broken(folder, error) from None
    relative = np.divide(change, norm, out=np.full(change.shape, np.nan), where=norm > 0)
    relative[:, 0] = np.nan
    return *named, relative
