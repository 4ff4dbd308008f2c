"""Reads a collection's checkpoints as stacked factors, each once, and while the device is busy with others."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from paragen.collection import checkpoints, lora_config, run_files
from paragen.collection.evaluation import BASE
from paragen.collection.manifest import Manifest
from paragen.scoring import factors
from paragen.scoring.base_model import BaseModel
from paragen.scoring.factors import Factors


class FactorReader:
    """The checkpoints of one collection.

    Args:
        folder: the collection's.
        manifest: its manifest.
        base: its base model, on whose device and in whose dtype factors are stacked.

    `last` is the last step, `layers` are the adapted layers. Raises UserError for a kind of LoRA that cannot be scored
    here; all methods raise UserError for a checkpoint that is not the one in the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest, base: BaseModel):
        self.folder, self.base = folder, base
        self.on_gpu = torch.cuda.is_available()
        self.entries = {entry.step: entry for entry in manifest.checkpoints}
        config = checkpoints.adapter_config(folder, manifest)
        factors.check_plain_lora(config)
        self.last = manifest.steps[-1]
        self.layers = checkpoints.layers_of(self.read(self.last))
        self.scaling = lora_config.scaling_of(config, self.layers[0])

    def read(self, step: int) -> dict[str, Tensor]:
        """The tensors of a checkpoint by PEFT's keys, memory-mapped."""
        entry = self.entries[step]
        return checkpoints.load(self._path(step), entry.bytes, entry.sha256)

    def stack(self, steps: list[int]) -> Factors:
        """The factors of some steps (evaluation.BASE: the base model, whose factors are zero), on the device."""
        adapters = [None if step == BASE else self.read(step) for step in steps]
        where = self.layers, self.scaling, self.base.model.device, self.base.dtype
        if adapters == [None]:  # the base alone gets the shapes of its factors from the last checkpoint
            return factors.stack_checkpoints([None, self.read(self.last)], *where).select([0])
        return factors.stack_checkpoints(adapters, *where)

    def stack_ahead(self, executor: ThreadPoolExecutor, steps: list[int]) -> Callable[[], Factors]:
        """Begin to read checkpoints in a thread; returns a function that waits for their factors.

        Beside a CPU's work the thread reads and hashes the files, but does not compute with PyTorch. PyTorch would use
        threads of its own for a second caller, which were seen to slow down the first caller's by a fifth.
        """
        if self.on_gpu:
            return executor.submit(self.stack, steps).result
        verified = executor.submit(self.verify, steps)

        def stacked() -> Factors:
            verified.result()
            return self.stack(steps)

        return stacked

    def verify(self, steps: list[int]) -> None:
        """Read and hash the checkpoints of steps, so that they come from the system's cache afterwards."""
        for step in steps:
            if step != BASE:
                entry = self.entries[step]
                checkpoints.verified(self._path(step), entry.bytes, entry.sha256)

    def _path(self, step: int) -> Path:
        return self.folder / run_files.checkpoint_name(step)
