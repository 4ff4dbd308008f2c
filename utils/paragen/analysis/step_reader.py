"""Reads the checkpoints of a collection many steps at a time, each file once: hashed, checked, copied to the device.

The same tensor of all steps that were read is one strided view: nothing is copied on the CPU.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from paragen.collection import checkpoints
from paragen.collection.manifest import CheckpointEntry
from paragen.common import parallel, paths
from paragen.common.cli import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class OtherDtype(UserError):
    """A tensor's dtype is none of DTYPES."""


class Stored(NamedTuple):
    """A tensor in a safetensors file: its bytes are those from `begin` to `end` after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Steps(NamedTuple):
    """Some consecutive checkpoints of a collection."""

    part: slice  # which of the manifest's
    rows: torch.Tensor  # uint8, steps x bytes: the files without their headers
    layout: dict[str, Stored]

    def values(self, key: str) -> torch.Tensor:
        """A tensor in all these checkpoints, steps x rows x columns, float32. Do not write into it."""
        stored = self.layout[key]
        part = self.rows[:, stored.begin : stored.end]
        if stored.begin % stored.dtype.itemsize:
            part = part.clone(memory_format=torch.contiguous_format)  # starts at 0; contiguous() may copy nothing
        return part.view(stored.dtype).unflatten(1, stored.shape).float()


def read(
    folder: Path,
    entries: Sequence[CheckpointEntry],
    size: int,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Steps]:
    """The checkpoints of a collection, `size` at a time. Each overwrites the one before.

    `check` is called before each file; what it raises ends it.

    Raises UserError for a checkpoint that is not as recorded, or whose keys, shapes or dtypes are not the first one's.
    """
    width = -(-max(entry.bytes for entry in entries) // 8) * 8
    size = min(size, len(entries))
    host = torch.empty(size, width, dtype=torch.uint8, pin_memory=device.type == "cuda")
    rows = host if device.type == "cpu" else torch.empty_like(host, device=device)
    layout: dict[str, Stored] = {}
    for start in range(0, len(entries), size):
        some = entries[start : start + size]

        def fetch(place: int, some=some) -> bytes:
            check()
            entry = some[place]
            row = host[place].numpy().data
            return checkpoints.read_into(folder / entry.file_name, entry.bytes, entry.sha256, row)

        for place, header in enumerate(parallel.each(fetch, range(len(some)))):
            path = folder / some[place].file_name
            found = layout_of(path, header)
            layout = layout or found
            if found != layout:
                host[place] = rearranged(path, host[place], found, layout)
        if rows is not host:
            rows[: len(some)].copy_(host[: len(some)], non_blocking=True)
        yield Steps(slice(start, start + len(some)), rows[: len(some)], layout)


def first_layout(folder: Path, entries: Sequence[CheckpointEntry]) -> dict[str, Stored]:
    """Where the tensors of a collection's first checkpoint are. Raises UnsupportedAdapter for a dtype not in DTYPES."""
    entry = entries[0]
    path = folder / entry.file_name
    header = checkpoints.read_into(path, entry.bytes, entry.sha256, None)
    try:
        return layout_of(path, header)
    except OtherDtype as error:
        raise checkpoints.UnsupportedAdapter(str(error)) from None


def layout_of(path: Path, header: bytes) -> dict[str, Stored]:
    """Where the tensors of a safetensors file are, by its header; raises UserError where it has none."""
    try:
        return _parsed(header)
    except OtherDtype as error:
        raise OtherDtype(f"{paths.relative(path)}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{paths.relative(path)}: is no safetensors file of floating-point tensors: {error}") from None


@lru_cache(maxsize=16)
def _parsed(header: bytes) -> dict[str, Stored]:
    found = {}
    for key, about in json.loads(header).items():
        if key != "__metadata__":
            if about["dtype"] not in DTYPES:
                raise OtherDtype(f"{key} is {about['dtype']}, and statistics are of {', '.join(DTYPES)} alone")
            found[key] = stored = Stored(DTYPES[about["dtype"]], tuple(about["shape"]), *about["data_offsets"])
            if stored.end - stored.begin != math.prod(stored.shape) * stored.dtype.itemsize:
                raise ValueError(f"{key} has other bytes than its shape")
    return found


def rearranged(path: Path, row: torch.Tensor, found: dict[str, Stored], layout: dict[str, Stored]) -> torch.Tensor:
    """A file's tensors in the order of another's; raises UserError where they differ by more than their order."""
    described = [{key: stored[:2] for key, stored in each.items()} for each in (found, layout)]
    if described[0] != described[1]:
        raise UserError(
            f"{paths.relative(path)}: has other keys, shapes or dtypes than the collection's first checkpoint; "
            "make verify names all such files"
        )
    moved = torch.empty_like(row)
    for key, stored in layout.items():
        moved[stored.begin : stored.end] = row[found[key].begin : found[key].end]
    return moved
