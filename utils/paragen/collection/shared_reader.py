"""Reads checkpoints in several processes, such as a DataLoader's workers, which hash each file once between them."""

from pathlib import Path
from typing import Any

import torch

from paragen.collection import checkpoints, vectors
from paragen.common import paths
from paragen.common.cli import UserError


class SharedReader:
    """Reads the checkpoints of an index's rows; its copies in other processes share which files were hashed.

    Args:
        saves: the folder that the rows' `file` is relative to.
        count: how many checkpoints there are; they are numbered from 0.
    """

    def __init__(self, saves: Path, count: int):
        self.saves = saves
        self.layouts: dict[str, vectors.Layout] = {}  # by collection
        # For each checkpoint, a hash of the stamp with which its file was verified; 0 before that.
        self._verified = torch.zeros(count, dtype=torch.int64).share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "layouts": {}}

    def read(self, number: int, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors by PEFT's key, memory-mapped.

        Args:
            number: the checkpoint's, below `count`.
            row: its row of the index: file, bytes, sha256, collection.

        Raises UserError naming the file when it differs from its row, or has another layout than its collection.
        """
        path = self.saves / row["file"]
        try:
            stamp = checkpoints.stamp_of(path)
        except OSError:
            stamp = ()  # loading raises the error
        mark = hash(stamp) or 1
        if stamp and int(self._verified[number]) == mark:
            checkpoints.mark_verified(path, stamp, row["sha256"])
        tensors = checkpoints.load(path, row["bytes"], row["sha256"])
        self._verified[number] = mark
        layout = vectors.layout_of(tensors)
        if self.layouts.setdefault(row["collection"], layout) != layout:
            raise UserError(f"{paths.relative(path)}: has other keys, shapes or types than the rest of its collection")
        return tensors
