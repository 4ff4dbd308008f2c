"""The header of a safetensors file: 8 bytes with its length (little-endian), then JSON with each tensor's place.

It is read without the safetensors library, which loads torch and maps the whole file.
"""

import json
from pathlib import Path
from typing import Any

from paragen.common import files

LARGEST = 2**24  # bytes of a header; one of 2,000 tensors has 300,000
LENGTH_BYTES = 8  # the length of the JSON, before it


def header_in(data: bytes) -> bytes:
    """The header in the bytes of a safetensors file: the 8 bytes of its length and its JSON.

    Raises ValueError when the bytes are too few to hold one.
    """
    end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    if len(data) < max(LENGTH_BYTES, end) or end > LARGEST:
        raise ValueError("is no safetensors file")
    return data[:end]


def tensors_in(header: bytes) -> dict[str, Any]:
    """What a header states of each tensor, by name: `dtype`, `shape` and `data_offsets` (bytes after the header).

    Raises ValueError or AttributeError when the header is not a JSON object; its values are not checked.
    """
    try:
        entries = json.loads(header[LENGTH_BYTES:])
    except RecursionError:
        raise ValueError("is no safetensors file: its header is nested too deeply") from None
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


def read_header(path: Path) -> bytes:
    """The header of a file, without its tensors. Raises ValueError when the file is too short to hold one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if length > LARGEST:
            raise ValueError(f"has a header of {length} bytes: it is damaged, or no safetensors file")
        if len(start) < LENGTH_BYTES or length > size - LENGTH_BYTES:
            raise ValueError(f"has only {size} bytes: it is cut off, or no safetensors file")
        return start + file.read(length)


def read_tensors(path: Path) -> dict[str, Any]:
    """What a file's header states of each tensor, by name, as `tensors_in` returns it; the same errors."""
    return tensors_in(read_header(path))


def fault_of(path: Path) -> str | None:
    """What is wrong with a safetensors file according to its header and its size; None for a sound one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(LENGTH_BYTES) == files.GIT_LFS_POINTER[:LENGTH_BYTES]:
            return "is a Git LFS pointer, not the weights"
    try:
        header = read_header(path)
    except ValueError as error:
        return str(error)
    try:
        ends = [entry["data_offsets"][1] for entry in tensors_in(header).values()]
        whole = len(header) + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return "is not a safetensors file"
    return None if size == whole else f"has {size} bytes, its header states {whole}"
