"""Work on many small tensors on all cores, with the same bits on any number of them.

Imported by export_canonical.py and stats.py. PyTorch's own threads share out each operation and wait for each other
after it; for a layer's small matrices on a busy machine that was seen to take ten times as long as one thread.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from paragen.common import devices

WORKERS = min(8, devices.cpu_cores())
WAITING = 4  # results per worker that may wait to be taken


def each(function: Callable[[Any], Any], items: Sequence) -> Iterator[Any]:
    """`function` of each item, in order; the calls run beside each other, each on one core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for threads started from here on
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            for start in range(0, len(items), WAITING * WORKERS):
                yield from pool.map(function, items[start : start + WAITING * WORKERS])
    finally:
        torch.set_num_threads(before)
