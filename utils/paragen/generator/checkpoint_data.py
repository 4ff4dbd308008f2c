"""The checkpoints that a generator is trained on: each is read and hashed once, and kept where there is room.

They are kept on the device where they fit, else in (pinned) memory, else they stay on disk and are mapped at each use.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from paragen.collection.index import Chosen
from paragen.collection.pairs import Pairs, Tensors
from paragen.common import devices, parallel, paths
from paragen.exports import peft
from paragen.generator.factor_layout import FactorLayout

SHARE = 0.6  # of the free memory that checkpoints may take
CHUNK = 64  # checkpoints whose statistics are computed at once
PLACES = ("device", "pinned", "disk")


class CheckpointData:
    """Checkpoints as vectors.

    Args:
        chosen: the collections, a task each.
        layout: of their checkpoints.
        device: where batches are wanted.
        form: `raw` or `canonical`.
        steps: which checkpoints, as STEPS says it.
        place: one of PLACES; empty for the first one with room.

    `tasks` has the numbers of each task's checkpoints, `mean` [size] and `scale` (a number per tensor) standardise
    vectors. Raises UserError for a checkpoint that is not as recorded.
    """

    def __init__(
        self, chosen: Sequence[Chosen], layout: FactorLayout, device: torch.device, form: str, steps: str, place: str
    ):
        self.layout, self.device, self.form = layout, device, form
        self.pairs = Pairs(prompts=0, collection=[one.name for one in chosen], saves=paths.SAVES)
        rows = [self.pairs.row(number) for number in range(len(self.pairs))]
        number_of = {(row["collection"], row["step"]): number for number, row in enumerate(rows)}
        self.numbers: list[int] = []  # in `pairs`
        self.tasks: list[range] = []
        for one in chosen:
            entries = peft.selected(one.manifest.checkpoints, steps)
            self.tasks.append(range(len(self.numbers), len(self.numbers) + len(entries)))
            self.numbers += [number_of[one.name, entry.step] for entry in entries]
        self.executor = ThreadPoolExecutor(1)
        self.ahead: tuple[list[int], Future[Tensor]] | None = None
        first = self._read(0)
        self.stored_dtype = next(iter(self._tensors(0).values())).dtype
        self.place = place or self._first_place(first.nbytes * len(self.numbers))
        self.store: Tensor | None = None
        if self.place != "disk":
            on_device = self.place == "device"
            self.store = torch.empty(
                (len(self.numbers), layout.size), dtype=first.dtype, device=device if on_device else "cpu",
                pin_memory=not on_device and device.type == "cuda",
            )  # fmt: skip
            for number, vector in enumerate(parallel.each(self._read, range(len(self.numbers)))):
                self.store[number].copy_(vector)
        self.mean, self.scale = self._statistics()
        self.spread = spread(layout, self.scale)

    def _first_place(self, size: int) -> str:
        """The first place with room for `size` bytes."""
        on_device, on_cpu = devices.free_bytes(self.device), devices.free_bytes(torch.device("cpu"))
        return first_place(size, on_device, on_cpu if self.device.type == "cuda" else 0)

    def _read(self, number: int) -> Tensor:
        return self.layout.vector_of(self._tensors(number), self.form)

    def _tensors(self, number: int) -> Tensors:
        found = self.pairs[self.numbers[number]].checkpoint
        assert isinstance(found, Tensors)  # as `pairs` was not asked for vectors
        return found

    def _fetch(self, numbers: Sequence[int]) -> Tensor:
        """Some checkpoints on the CPU, pinned for a GPU."""
        rows = [self._read(number) if self.store is None else self.store[number] for number in numbers]
        out = torch.empty((len(rows), self.layout.size), dtype=rows[0].dtype, pin_memory=self.device.type == "cuda")
        return torch.stack(rows, out=out)

    def prefetch(self, numbers: list[int]) -> None:
        """Begin to fetch the next batch, where it does not lie on the device."""
        if self.place != "device":
            self.ahead = numbers, self.executor.submit(self._fetch, numbers)

    def batch(self, numbers: list[int]) -> Tensor:
        """Some checkpoints, [n, size] float32 on the device."""
        if self.store is not None and self.place == "device":
            return self.store[torch.tensor(numbers, device=self.device)].float()
        ahead, self.ahead = self.ahead, None
        is_ready = ahead is not None and ahead[0] == numbers
        found = ahead[1].result() if ahead is not None and is_ready else self._fetch(numbers)
        return found.to(self.device, non_blocking=True).float()

    def release(self) -> None:
        """Free the memory of the checkpoints. What standardises vectors stays; there are no batches any more."""
        self.store = self.ahead = None
        self.executor.shutdown()
        devices.free_memory()

    def standardise(self, values: Tensor) -> Tensor:
        """Vectors [n, size] less their mean, each tensor divided by its scale."""
        return (values - self.mean) / self.spread

    def restore(self, values: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return values * self.spread + self.mean

    def _parts(self) -> Iterator[tuple[Tensor, float]]:
        """All checkpoints, some of one task at a time, with the weight of each: tasks count equally."""
        for task in self.tasks:
            for start in range(task.start, task.stop, CHUNK):
                yield self.batch(list(task)[start - task.start :][:CHUNK]), 1 / len(task) / len(self.tasks)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """(The mean [size], the root mean square deviation of each tensor from it), float32, over all tasks."""
        mean = torch.zeros(self.layout.size, dtype=torch.float64, device=self.device)
        for values, weight in self._parts():
            mean += values.sum(0, dtype=torch.float64) * weight
        mean = mean.float()
        squares = torch.zeros(sum(len(kind.keys) for kind in self.layout.kinds), device=self.device)
        for values, weight in self._parts():
            parts = self.layout.split((values - mean).square_())
            squares += torch.cat([part.mean(2).sum(0) for part in parts]) * weight
        return mean, squares.sqrt().clamp(min=1e-8)


def first_place(size: int, free_on_device: int, free_for_pinned: int) -> str:
    """The first of PLACES with room for `size` bytes.

    Args:
        size: of all checkpoints, from 1 on.
        free_on_device: bytes.
        free_for_pinned: bytes of the main memory; PyTorch rounds what it pins up to a power of two.
    """
    if size < SHARE * free_on_device:
        return "device"
    return "pinned" if 1 << (size - 1).bit_length() < SHARE * free_for_pinned else "disk"


def spread(layout: FactorLayout, scale: Tensor) -> Tensor:
    """A number per tensor, in the order of a vector, as one per value [size]."""
    sizes = [kind.numel for kind in layout.kinds for _ in kind.keys]
    return scale.repeat_interleave(torch.tensor(sizes, device=scale.device))
