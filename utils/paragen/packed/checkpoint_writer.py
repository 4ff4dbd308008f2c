"""Writes the checkpoints of packed cells while training continues.

Adapters are copied from the device into pinned memory on a stream of their own; threads hash and write the files.
Neither the device nor the training thread waits, unless the disk is slower than the training.
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
BUFFERS = 3  # copies of each adapter in memory: one being filled, one waiting, one being written


class Writer:
    """Writes the checkpoint files of one collection, with PEFT's keys and in the safetensors library's layout.

    Args:
        folder: an existing folder for the files.
        adapter: describes the layout of `vector`.
        vector: the adapter's parameters, float32, which training changes in place.
        threads: shared by all writers.
    """

    def __init__(self, folder: Path, adapter: Adapter, vector: Tensor, threads: ThreadPoolExecutor):
        self.folder, self.adapter, self.vector, self.threads = folder, adapter, vector, threads
        self.head, self.order = collector.layout_of(stock_checkpoint.peft_tensors(adapter, torch.zeros(vector.shape)))
        first_b = adapter.parts[0].b.start
        self.a_part = vector.detach()[:first_b]
        # the vector holds each lora_B transposed; all have `rank` columns, so that one torch.cat transposes all of them
        self.b_parts = [vector.detach()[part.b].view(adapter.rank, -1).t() for part in adapter.parts]
        self.spans = self._spans(first_b)
        self.on_cuda = vector.is_cuda
        self.free: queue.Queue[Tensor] = queue.Queue()  # buffers
        self.allocated = 0
        self.on_device = torch.empty_like(vector.detach()) if self.on_cuda else None
        self.copied: torch.cuda.Event | None = None
        self.stream = torch.cuda.Stream() if self.on_cuda else None
        self.records: dict[int, Future] = {}

    def _spans(self, first_b: int) -> dict[str, tuple[int, int]]:
        """For each of PEFT's tensors, the range of its elements in a filled buffer (end excluded)."""
        spans, at = {}, first_b
        for part in self.adapter.parts:
            spans[f"{checkpoints.PEFT_PREFIX}{part.layer}.lora_A.weight"] = part.a.start, part.a.stop
            length = part.b.stop - part.b.start
            spans[f"{checkpoints.PEFT_PREFIX}{part.layer}.lora_B.weight"] = at, at + length
            at += length
        return spans

    def take(self, step: int) -> None:
        """Queue the writing of the adapter as it is after the work queued so far; returns before that is done.

        For a step that was taken before, the file is replaced.
        """
        if step in self.records:
            self.records[step].result()
        buffer = self._free_buffer()
        filled = None
        if self.on_device is not None and self.stream is not None:  # on a CUDA device
            if self.copied is not None:
                torch.cuda.current_stream().wait_event(self.copied)
            self._copy_upright(self.on_device)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                buffer.copy_(self.on_device, non_blocking=True)
                filled = self.copied = torch.cuda.Event()
                filled.record()
        else:
            self._copy_upright(buffer)
        self.records[step] = self.threads.submit(self._write, step, buffer, filled)

    def _copy_upright(self, out: Tensor) -> None:
        """Copy the adapter into `out` with each lora_B as PEFT has it, [out, rank]."""
        split = self.a_part.numel()
        out[:split].copy_(self.a_part)
        torch.cat(self.b_parts, out=out[split:].view(-1, self.adapter.rank))

    def _free_buffer(self) -> Tensor:
        """A buffer that is not in use; waits for one. Raises the error of a failed write."""
        for record in self.records.values():
            if record.done() and (error := record.exception()):
                raise error
        if self.allocated < BUFFERS and self.free.empty():
            self.allocated += 1
            return torch.empty(self.vector.shape, pin_memory=self.on_cuda)
        return self.free.get()

    def _write(self, step: int, buffer: Tensor, filled: "torch.cuda.Event | None") -> dict[str, Any]:
        try:
            if filled is not None:
                filled.synchronize()
            values = buffer.numpy().data.cast("B")
            spans = [self.spans[name] for name in self.order]
            parts: list[bytes | memoryview] = [self.head, *(values[4 * start : 4 * end] for start, end in spans)]
            digest = hashlib.sha256()
            for part in parts:
                digest.update(part)
            files.write_atomically(self.folder / run_files.checkpoint_name(step), *parts, durable=False)
            return {"bytes": sum(map(len, parts)), "sha256": digest.hexdigest()}
        finally:
            self.free.put(buffer)

    def written(self) -> dict[int, dict[str, Any]]:
        """Bytes and SHA-256 of each file by step, once all are written. Raises the error of a failed write."""
        return {step: record.result() for step, record in self.records.items()}


def threads() -> ThreadPoolExecutor:
    """The threads that write the files of all cells."""
    return ThreadPoolExecutor(min(THREADS, devices.cpu_cores()), "checkpoint-writer")
