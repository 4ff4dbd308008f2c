"""Reads adapters as stacked factors, each once, and while the device is busy with others."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paragen.collection import checkpoints, lora_config, run_files
from paragen.collection.evaluation import BASE
from paragen.collection.manifest import Manifest
from paragen.common import paths
from paragen.scoring import factors
from paragen.scoring.base_model import BaseModel
from paragen.scoring.factors import Factors


class FactorReader:
    """Adapters of one base model that have the same layers and one adapter_config.json.

    Args:
        config: the content of adapter_config.json, checked.
        compared: the number of an adapter, which has the layers of all; what is computed is compared with PEFT on it.
        base: the base model, on whose device and in whose dtype factors are stacked.
        name: what messages call the adapters.

    `layers` are the adapted layers. A subclass says where the tensors come from, in `read`. Raises UserError for a kind
    of LoRA that cannot be scored here.
    """

    def __init__(self, config: dict[str, Any], compared: int, base: BaseModel, name: str):
        self.config, self.compared, self.base, self.name = config, compared, base, name
        self.on_gpu = torch.cuda.is_available()
        factors.check_plain_lora(config)
        self.layers = checkpoints.layers_of(self.read(compared))
        self.scaling = lora_config.scaling_of(config, self.layers[0])

    def read(self, step: int) -> dict[str, Tensor]:
        """The tensors of an adapter by PEFT's keys."""
        raise NotImplementedError

    def stack(self, steps: list[int]) -> Factors:
        """The factors of some adapters (evaluation.BASE: the base model, whose factors are zero), on the device."""
        adapters = [None if step == BASE else self.read(step) for step in steps]
        where = self.layers, self.scaling, self.base.model.device, self.base.dtype
        if all(adapter is None for adapter in adapters):  # the base alone gets the shapes of its factors from another
            alone = factors.stack_checkpoints([None, self.read(self.compared)], *where)
            return alone.select([0] * len(adapters))
        return factors.stack_checkpoints(adapters, *where)

    def stack_ahead(self, executor: ThreadPoolExecutor, steps: list[int]) -> Callable[[], Factors]:
        """Begin to read adapters in a thread; returns a function that waits for their factors.

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
        """Read and hash what `read` will take from files, so that it comes from the system's cache afterwards."""


class CheckpointReader(FactorReader):
    """The checkpoints of one collection, by step.

    Args:
        folder: the collection's.
        manifest: its manifest.
        base: its base model.

    All methods raise UserError for a checkpoint that is not the one in the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest, base: BaseModel):
        self.folder = folder
        self.entries = {entry.step: entry for entry in manifest.checkpoints}
        config = checkpoints.adapter_config(folder, manifest)
        super().__init__(config, manifest.steps[-1], base, paths.relative(folder))

    def read(self, step: int) -> dict[str, Tensor]:
        """The tensors of a checkpoint by PEFT's keys, memory-mapped."""
        entry = self.entries[step]
        return checkpoints.load(self._path(step), entry.bytes, entry.sha256)

    def verify(self, steps: list[int]) -> None:
        """Read and hash the checkpoints of steps, so that they come from the system's cache afterwards."""
        for step in steps:
            if step != BASE:
                entry = self.entries[step]
                checkpoints.verified(self._path(step), entry.bytes, entry.sha256)

    def _path(self, step: int) -> Path:
        return self.folder / run_files.checkpoint_name(step)


class MemoryReader(FactorReader):
    """Adapters in memory, by number.

    The smallest is compared with PEFT: the larger an adapter is, the more it amplifies what bfloat16 rounds, and a
    generator can write larger ones than any that was trained, for example from the prompts of another task.

    Args:
        adapters: the tensors of each by PEFT's keys, of equal keys and shapes; numbers are from 1 on.
        config: the content of adapter_config.json, checked.
        base: the base model.
        name: what messages call the adapters.
    """

    def __init__(self, adapters: Mapping[int, dict[str, Tensor]], config: dict[str, Any], base: BaseModel, name: str):
        self.adapters = adapters
        super().__init__(config, min(adapters, key=lambda number: _size(adapters[number])), base, name)

    def read(self, step: int) -> dict[str, Tensor]:
        """The tensors of an adapter by PEFT's keys."""
        return self.adapters[step]


def _size(adapter: dict[str, Tensor]) -> float:
    """The sum of the squares of an adapter's values."""
    return sum(float(tensor.float().square().sum()) for tensor in adapter.values())
