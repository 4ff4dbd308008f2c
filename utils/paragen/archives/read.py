"""Reads archives: any step alone, or all in their order. Every byte is checked against a hash before it is used.

archive.py describes the format.
"""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

import numpy as np

from paragen.archives import byte_planes
from paragen.collection import manifest_kinds as kinds
from paragen.collection.manifest import Manifest, parse_manifest
from paragen.common import devices, files, paths
from paragen.common.cli import UserError

if TYPE_CHECKING:
    import torch

FORMAT = "1"
HEAD = 512  # bytes at the front: the safetensors header, padded with spaces as that format allows
# What an archive may declare: a bomb of a few kB would otherwise become gigabytes before a hash is compared.
LARGEST_INDEX = 2**24  # bytes of JSON; a checkpoint takes about 500
LARGEST_SMALL = 2**26  # bytes of all files beside the checkpoints and of all headers
STEP_EXPANSION = 100  # a checkpoint, relative to the archive
LARGEST_EXPANSION = 1000  # all that is unpacked, relative to the archive; a real one is 1 to 3 times its size
FREE_EXPANSION = 2**26  # bytes that any archive may unpack to: adapters of zeros compress to nothing
MOST_BASES = 4  # checkpoints whose planes are held for later ones at a time; what `write` makes needs 2
LEVEL = 1  # zstd's, for what is written; 3, 6 and 9 change its size by -1 to +4 % and take two to six times as long


@dataclass(frozen=True)
class Opened:
    """An archive whose seal was checked; its blocks are checked as they are read."""

    path: Path
    index: dict[str, Any]
    positions: dict[int, int]  # step -> its position in index["steps"]


def codec():
    """pyarrow's zstd codec."""
    import pyarrow

    return pyarrow.Codec("zstd", compression_level=LEVEL)


def threads() -> int:
    """How many planes to compress or decompress at once: the processors that this process may use."""
    return devices.cpu_cores()


def opened(path: Path) -> Opened:
    """An archive, its seal checked. Raises UserError naming the file when it is truncated, damaged or no archive."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{paths.relative(path)}: no such archive") from None
    except OSError as error:
        raise UserError(f"{paths.relative(path)}: cannot be read: {error.strerror}") from None
    if not S_ISREG(stat.st_mode):
        raise UserError(f"{paths.relative(path)}: is no file, so no archive")
    return _opened(path, files.stamp_of(stat))


@functools.lru_cache(maxsize=16)
def _opened(path: Path, _stamp: tuple) -> Opened:
    """An archive whose seal, a hash of its header and its index, is checked here; see `opened`."""
    from safetensors import SafetensorError, safe_open

    name = paths.relative(path)
    try:
        head = files.read_up_to(path, HEAD)
        if len(head) < HEAD or int.from_bytes(head[:8], "little") != HEAD - 8:
            raise UserError(f"{name}: is truncated, damaged in its header, or no archive")
        with safe_open(path, "np") as file:
            marks = file.metadata() or {}
            if marks.get("paragen_archive") != FORMAT:
                raise UserError(f"{name}: is no archive of format {FORMAT}, or its header is damaged")
            if file.get_slice("index").get_shape()[0] > LARGEST_INDEX or int(marks["index_bytes"]) > LARGEST_INDEX:
                raise UserError(f"{name}: its index is larger than that of any collection")
            index, seal = (file.get_tensor(part).tobytes() for part in ("index", "seal"))
            size = file.get_slice("blocks").get_shape()[0]
    except (SafetensorError, OSError, ValueError, LookupError) as error:
        raise UserError(f"{name}: is truncated, damaged in its header, or no archive ({error})") from None
    if hashlib.sha256(head + index).digest() != seal:
        raise UserError(f"{name}: its header or its index is damaged; download or copy it again")
    try:
        index = json.loads(codec().decompress(index, int(marks["index_bytes"]), asbytes=True))
        _check_index(index, size)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError, OverflowError) as error:
        text = " ".join(repr(error).split())[:200]
        raise UserError(f"{name}: its index is not one of format {FORMAT} ({text})") from None
    return Opened(path, index, {step["step"]: place for place, step in enumerate(index["steps"])})


def _check_index(index: dict, size: int) -> None:
    """Check an archive's index: its values, and that its blocks cover all of `size` bytes and do not unpack to more
    than such an archive can. Raises ValueError, or the error of a missing key."""
    if not kinds.is_flat(index, 8):
        raise ValueError("it is nested too deeply")
    kinds.check(index["manifest"], kinds.SHA256, "manifest")
    small = [*index["files"].values(), *index["headers"]]
    if not all(type(entry["bytes"]) is int and entry["bytes"] >= 0 for entry in small):
        raise ValueError("a file or a header has no size")
    if sum(entry["bytes"] for entry in small) > LARGEST_SMALL:
        raise ValueError(f"its files and headers have more than {LARGEST_SMALL} bytes")
    unpacked = sum(entry["bytes"] for entry in (*small, *index["steps"]))
    if unpacked > FREE_EXPANSION + LARGEST_EXPANSION * size:
        raise ValueError(f"its {size} bytes would become {unpacked}")
    if (most := max((step["bytes"] for step in index["steps"]), default=0)) > FREE_EXPANSION + STEP_EXPANSION * size:
        raise ValueError(f"its {size} bytes would become a checkpoint of {most}")
    blocks = [entry["block"] for entry in (*index["files"].values(), *index["headers"])]
    for place, step in enumerate(index["steps"]):
        blocks += step["planes"]
        base = step["base"]
        if not all(type(step[key]) is int and step[key] >= 0 for key in ("step", "bytes", "header")):
            raise ValueError(f"checkpoint {place}: {str(step['step'])[:80]!r}")
        if step["header"] >= len(index["headers"]) or index["headers"][step["header"]]["bytes"] > step["bytes"]:
            raise ValueError(f"checkpoint {place} has no header")
        if base is None and any(kind == "xor" for kind, *_ in step["planes"]):
            raise ValueError(f"checkpoint {place} has no base")
        if base is not None and (not 0 <= base < place or index["steps"][base]["header"] != step["header"]):
            raise ValueError(f"checkpoint {place} has the base {base}")
    if _most_held(index["steps"]) > MOST_BASES:
        raise ValueError(f"more than {MOST_BASES} of its checkpoints are needed at once")
    end = 0
    for kind, offset, length, sha256 in sorted(blocks, key=lambda block: block[1]):
        if kind not in ("raw", "zstd", "xor") or offset != end or type(length) is not int or length < 0:
            raise ValueError(f"a block of kind {str(kind)[:80]!r} at {str(offset)[:80]}, expected at {end}")
        kinds.check(sha256, kinds.SHA256, "a block's hash")
        end += length
    if end != size or len({step["step"] for step in index["steps"]}) != len(index["steps"]):
        raise ValueError("bytes outside of the blocks, or a step twice")


def _last_uses(steps: list[dict]) -> dict[int, int]:
    """By the position of a checkpoint that others are stored against, the position of the last of those."""
    return {step["base"]: place for place, step in enumerate(steps) if step["base"] is not None}


def _most_held(steps: list[dict]) -> int:
    """The most checkpoints that are held at a time for later ones while all are read in their order."""
    ends = _last_uses(steps)
    most, held = 0, 0
    closing = Counter(ends.values())
    for place in range(len(steps)):
        held += (place in ends) - closing[place]
        most = max(most, held)
    return most


def _block(archive: Opened, handle: int, block: list, size: int, what: str) -> bytes:
    """The content of a block, `size` bytes. Raises UserError, calling it `what`, when it is damaged."""
    kind, offset, length, sha256 = block
    data = os.pread(handle, length, HEAD + offset)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(
            f"{paths.relative(archive.path)}: {what} is damaged (its sha256 differs); get the archive again"
        )
    try:
        data = data if kind == "raw" else codec().decompress(data, size, asbytes=True)
    except OSError as error:
        raise UserError(f"{paths.relative(archive.path)}: {what} cannot be decompressed ({error})") from None
    if len(data) != size:
        raise UserError(f"{paths.relative(archive.path)}: {what} has {len(data)} bytes, not {size}")
    return data


def read_files(path: Path) -> dict[str, bytes]:
    """The collection's files beside its checkpoints, by name: manifest.json, adapter_config.json, log, picture, and
    evaluation.json where it was evaluated."""
    archive = opened(path)
    with open(path, "rb") as file:
        return {
            name: _block(archive, file.fileno(), entry["block"], entry["bytes"], name)
            for name, entry in archive.index["files"].items()
        }


def manifest_in(path: Path) -> Manifest:
    """The manifest of the collection in an archive, or in any part of one. Raises UserError if it is not sound."""
    archive = opened(path)
    entry = archive.index["files"].get(paths.MANIFEST)
    if entry is None:
        raise UserError(f"{paths.relative(path)}: has no {paths.MANIFEST}")
    with open(path, "rb") as file:
        data = _block(archive, file.fileno(), entry["block"], entry["bytes"], paths.MANIFEST)
    return parse_manifest(data, f"{paths.relative(path)}: {paths.MANIFEST}", "get the archive again")


def steps_of(path: Path) -> list[int]:
    """The steps in an archive, in its order."""
    return list(opened(path).positions)


def sizes_of(path: Path) -> dict[int, int]:
    """The bytes of each checkpoint file in an archive, by step."""
    return {step["step"]: step["bytes"] for step in opened(path).index["steps"]}


def load_step(path: Path, step: int) -> "dict[str, torch.Tensor]":
    """The tensors of one checkpoint by PEFT's key, sorted by key. Reads and verifies the blocks that it needs.

    Raises UserError naming the damaged block, or, for a step that the archive does not hold, those that it holds.
    """
    from safetensors.torch import load

    archive = opened(path)
    if step not in archive.positions:
        there = list(archive.positions)
        span = f"{there[0]} to {there[-1]}" if there else "none"
        raise UserError(f"{paths.relative(path)}: does not hold step {step}; it holds {span}")
    with open(path, "rb") as file, ThreadPoolExecutor(threads()) as pool:
        data, _ = _restored(archive, file.fileno(), archive.positions[step], {}, {}, pool)
    tensors = load(bytes(data))
    return {key: tensors[key] for key in sorted(tensors)}


def read_all(path: Path) -> Iterator[tuple[int, bytearray]]:
    """Each (step, bytes of its checkpoint file) of an archive, in its order, every block read once.

    Takes the memory of MOST_BASES + 3 checkpoints. Raises UserError naming the damaged block, and, before anything is
    read, where this machine does not have so much memory.
    """
    archive = opened(path)
    steps = archive.index["steps"]
    _check_memory(path, steps)
    last_use = _last_uses(steps)
    known: dict[int, list[np.ndarray]] = {}
    headers: dict[int, bytes] = {}
    with open(path, "rb") as file, ThreadPoolExecutor(threads()) as pool:
        for place, step in enumerate(steps):
            data, planes = _restored(archive, file.fileno(), place, known, headers, pool)
            known = {base: known[base] for base in known if last_use[base] > place}
            if last_use.get(place, 0) > place:
                known[place] = planes
            yield step["step"], data


def _check_memory(path: Path, steps: list[dict]) -> None:
    """Raise UserError where this machine lacks the memory to read all checkpoints of an archive."""
    needed = (3 + _most_held(steps)) * max((step["bytes"] for step in steps), default=0)
    free = devices.available_memory()
    if needed > free:
        raise UserError(
            f"{paths.relative(path)}: reading it takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            "end other programs, or take a machine with more"
        )


def _restored(
    archive: Opened, handle: int, place: int, known: dict, headers: dict, pool: ThreadPoolExecutor
) -> tuple[bytearray, list[np.ndarray]]:
    """(The bytes, the planes) of one checkpoint; `known` are other checkpoints' planes, `headers` those read so far."""
    step = archive.index["steps"][place]
    what, number = f"checkpoint {step['step']}", step["header"]
    if number not in headers:
        entry = archive.index["headers"][number]
        headers[number] = _block(archive, handle, entry["block"], entry["bytes"], f"the header of {what}")
    try:
        header = headers[number]
        runs = byte_planes.runs_of(header, step["bytes"] - len(header))
        sizes = byte_planes.sizes_of(runs)
    except ValueError as error:
        raise UserError(f"{paths.relative(archive.path)}: {what} {error}") from None
    if len(sizes) != len(step["planes"]):
        raise UserError(f"{paths.relative(archive.path)}: {what} has {len(step['planes'])} planes, not {len(sizes)}")
    plane = functools.partial(_plane, archive, handle, place, known)
    planes = list(pool.map(plane, range(len(sizes)), sizes))
    return byte_planes.join(header, planes, runs), planes


def _plane(archive: Opened, handle: int, place: int, known: dict, number: int, size: int) -> np.ndarray:
    """One plane of a checkpoint (uint8), from its own block and, where that is a difference, the blocks before it."""
    found = None
    while True:
        step, ready = archive.index["steps"][place], known.get(place)
        kind = None if ready else step["planes"][number][0]
        what = f"byte plane {number} of checkpoint {step['step']}"
        block = (
            ready[number]
            if ready
            else np.frombuffer(_block(archive, handle, step["planes"][number], size, what), np.uint8)
        )
        found = block if found is None else np.bitwise_xor(found, block)
        if kind != "xor":
            return found
        place = step["base"]
