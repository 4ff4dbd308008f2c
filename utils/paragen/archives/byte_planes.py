"""A safetensors file as its header and byte planes: the first bytes of all values together, then the second ones, ...

Signs and exponents of neighbouring values are similar and compress well; the last bits of a mantissa are noise and do
not. So they are stored apart: values of 2 bytes make 2 planes, values of 4 bytes 4.
"""

from itertools import pairwise

import numpy as np

from paragen.common import safetensors_header

# Bytes per value; a dtype that is not listed is split byte by byte, which is lossless, too.
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def runs_of(header: bytes, size: int) -> list[tuple[int, int]]:
    """The data section that a header describes, as runs of values of one width: (bytes per value, bytes).

    Args:
        header: as `safetensors_header.header_in` returns it.
        size: the length of the data section, bytes.

    A data section that the header describes with gaps is one run of single bytes. Raises ValueError for a broken one.
    """
    try:
        tensors = safetensors_header.tensors_in(header).values()
        spans = sorted((*entry["data_offsets"], WIDTHS.get(entry["dtype"], 1)) for entry in tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"has a broken safetensors header ({str(error)[:200]})") from None
    bounds = [(0, 0), *((first, last) for first, last, _ in spans), (size, size)]
    if any(one[1] != other[0] for one, other in pairwise(bounds)) or any((b - a) % w or b < a for a, b, w in spans):
        return [(1, size)] if size else []
    runs: list[tuple[int, int]] = []
    for first, last, width in spans:
        if runs and runs[-1][0] == width:
            runs[-1] = (width, runs[-1][1] + last - first)
        elif last > first:
            runs.append((width, last - first))
    return runs


def sizes_of(runs: list[tuple[int, int]]) -> list[int]:
    """The length of each plane in bytes, in the order of `split`."""
    return [size // width for width, size in runs for _ in range(width)]


def split(data: np.ndarray, runs: list[tuple[int, int]]) -> list[np.ndarray]:
    """The planes of a data section (1-D uint8): run by run, lowest bytes first, each contiguous 1-D uint8."""
    planes, start = [], 0
    for width, size in runs:
        values = data[start : start + size].reshape(-1, width)
        planes += [np.ascontiguousarray(values[:, number]) for number in range(width)]
        start += size
    return planes


def join(header: bytes, planes: list[np.ndarray], runs: list[tuple[int, int]]) -> bytearray:
    """The bytes of the safetensors file with this header whose data section has these planes."""
    joined = bytearray(len(header) + sum(size for _, size in runs))
    joined[: len(header)] = header
    data, start, first = np.frombuffer(joined, np.uint8)[len(header) :], 0, 0
    for width, size in runs:
        values = data[start : start + size].reshape(-1, width)
        for number in range(width):
            values[:, number] = planes[first + number]
        start, first = start + size, first + width
    return joined
