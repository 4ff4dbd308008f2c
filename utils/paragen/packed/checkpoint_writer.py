"""Writes the checkpoints of packed cells while training goes on.

The adapters leave the device through pinned memory on a stream of their own; threads hash
and write the files. Neither the device nor the training thread waits, unless the disk is slower than the training.
"""

import hashlib
import queue
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paragen.collection import checkpoints, run_files
from paragen.common import devices, files
from paragen.packed import stock_checkpoint
from paragen.packed.adapter import Adapter
from paragen.training import collector

THREADS = 8
FRAMES = 3  # copies of each adapter in memory: being filled, waiting, being written


class Writer:
    """The checkpoint files of one cell's collection.

    Args:
        folder: where they go; it exists.
        adapter: says how its vector is laid out.
        vector: the adapter's live vector, float32.
        threads: shared by all writers.

    A file holds PEFT's keys in the safetensors library's own layout.
    """

    def __init__(self, folder: Path, adapter: Adapter, vector: Tensor, threads: ThreadPoolExecutor):
        self.folder, self.adapter, self.vector, self.threads = folder, adapter, vector, threads
        self.head, self.order = collector.layout_of(stock_checkpoint.peft_tensors(adapter, torch.zeros(vector.shape)))
        first_b = adapter.parts[0].b.start
        self.a_part = vector.detach()[:first_b]
        # B is kept transposed; as matrices of equal width, all of them are put upright by one joining
        self.b_parts = [vector.detach()[part.b].view(adapter.rank, -1).t() for part in adapter.parts]
        self.spans = self._spans(first_b)
        self.on_cuda = vector.is_cuda
        self.free: queue.Queue[Tensor] = queue.Queue()
        self.made = 0
        self.upright = torch.empty_like(vector.detach()) if self.on_cuda else None
        self.left_device: torch.cuda.Event | None = None
        self.stream = torch.cuda.Stream() if self.on_cuda else None
        self.records: dict[int, Future] = {}

    def _spans(self, first_b: int) -> dict[str, tuple[int, int]]:
        """Where each of PEFT's tensors stands in a filled frame: first element and the one after the last."""
        spans, at = {}, first_b
        for part in self.adapter.parts:
            spans[f"{checkpoints.PEFT_PREFIX}{part.layer}.lora_A.weight"] = part.a.start, part.a.stop
            length = part.b.stop - part.b.start
            spans[f"{checkpoints.PEFT_PREFIX}{part.layer}.lora_B.weight"] = at, at + length
            at += length
        return spans

    def take(self, step: int) -> None:
        """Write the adapter as the work queued so far leaves it; returns before that is done."""
        frame = self._free_frame()
        filled = None
        if self.on_cuda:
            if self.left_device is not None:
                torch.cuda.current_stream().wait_event(self.left_device)
            self._put_upright(self.upright)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                frame.copy_(self.upright, non_blocking=True)
                filled = self.left_device = torch.cuda.Event()
                filled.record()
        else:
            self._put_upright(frame)
        self.records[step] = self.threads.submit(self._write, step, frame, filled)

    def _put_upright(self, out: Tensor) -> None:
        split = self.a_part.numel()
        out[:split].copy_(self.a_part)
        torch.cat(self.b_parts, out=out[split:].view(-1, self.adapter.rank))

    def _free_frame(self) -> Tensor:
        """A frame that is not being written; waits for one, and raises what went wrong in a writer."""
        for record in self.records.values():
            if record.done() and record.exception():
                raise record.exception()
        if self.made < FRAMES and self.free.empty():
            self.made += 1
            return torch.empty(self.vector.shape, pin_memory=self.on_cuda)
        return self.free.get()

    def _write(self, step: int, frame: Tensor, filled: "torch.cuda.Event | None") -> dict[str, Any]:
        try:
            if filled is not None:
                filled.synchronize()
            values = memoryview(frame.numpy()).cast("B")
            parts = [self.head, *(values[4 * start : 4 * end] for start, end in map(self.spans.get, self.order))]
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
            files.write(self.folder / run_files.checkpoint_name(step), *parts)
            return {"bytes": sum(map(len, parts)), "sha256": digest.hexdigest()}
        finally:
            self.free.put(frame)

    def written(self) -> dict[int, dict[str, Any]]:
        """Bytes and sha256 of each file by step, once all are written; raises what went wrong."""
        return {step: record.result() for step, record in self.records.items()}


def threads() -> ThreadPoolExecutor:
    """The threads that write for all cells."""
    return ThreadPoolExecutor(min(THREADS, devices.cpu_cores()), "checkpoint-writer")
