"""Work on many small tensors on all cores; the results have the same bits on any number of cores.

PyTorch's own threads divide each operation and wait for each other after it. For a layer's small matrices on a busy
machine this was measured to take ten times as long as one thread.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from paragen.common import devices

Item = TypeVar("Item")
Result = TypeVar("Result")
WORKERS = min(16, devices.cpu_cores())
WAITING = 4  # results per worker that may wait until they are used


@contextmanager
def single_threaded() -> Iterator[None]:
    """Within it, PyTorch uses one thread per operation, also in threads that are started."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`function` of each item, in the order of the items; the calls run in parallel, each on one core."""
    with single_threaded(), ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(items), WAITING * WORKERS):
            yield from pool.map(function, items[start : start + WAITING * WORKERS])
