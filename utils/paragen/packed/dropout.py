"""LoRA's dropout: which features of a token an adapter's first factor does not see, at each step and layer.

The random number of a feature is a hash of the cell's seed, the step, the token's row and position, the layer and the
feature. So a cell has the same masks alone and in any pack, whatever the layout of the batch, in a CUDA graph, and
after an interruption. They are distributed as PEFT's, whose own come from torch's generators and cannot be repeated
here. The hash is the finaliser of MurmurHash3; all arithmetic is modulo 2**32, in int32. Another hash needs another
interrupted.PACKED_DROPOUT.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GOLDEN = -0x61C88647  # 2**32 divided by the golden ratio, as int32: keeps what is hashed apart
FACTORS = (-0x7A143595, -0x3D4D51CB)  # of MurmurHash3's finaliser, as int32
SHIFTS = (16, 13, 16)


class LayerDropout(NamedTuple):
    """The dropout of a layer in one step.

    Attributes:
        keys: of each token, as `token_keys` makes them, [N] int64.
        thresholds: of each token's adapter, as `threshold_of` makes them, [N] int32.
        layer: the layer's number in the model.
    """

    keys: Tensor
    thresholds: Tensor
    layer: int

    def at(self, tokens: slice) -> "LayerDropout":
        """The dropout of some of the tokens."""
        return LayerDropout(self.keys[tokens], self.thresholds[tokens], self.layer)

    def mask(self, features: int) -> Tensor:
        """Which features are kept, [N, features] bool."""
        rows = mixed(self.keys.to(torch.int32), self.layer)
        numbers = torch.arange(features, dtype=torch.int32, device=rows.device) * GOLDEN
        return _finalise(rows[:, None] + numbers) >= self.thresholds[:, None]

    def kept(self, x: Tensor) -> Tensor:
        """A copy of x, [N, features] and contiguous, with zeros for the features that are dropped."""
        if x.is_cuda:
            from paragen.packed import kernels

            return kernels.keep(x, torch.empty_like(x), self.keys, self.thresholds, self.layer, False)
        return torch.where(self.mask(x.shape[-1]), x, 0.0)

    def add_kept(self, x: Tensor, total: Tensor) -> None:
        """total += kept(x), both [N, features] and contiguous."""
        if x.is_cuda:
            from paragen.packed import kernels

            kernels.keep(x, total, self.keys, self.thresholds, self.layer, True)
        else:
            total.add_(self.kept(x))


def threshold_of(probability: float) -> int:
    """The random number, an int32, from which on a feature is kept, where it is dropped with this probability."""
    return min(round(probability * 2**32), 2**32 - 1) - 2**31


def streams(seed: int, steps: range) -> list[int]:
    """A number per step (an int32) that stands for a cell's seed and that step."""
    start = _finalise(torch.tensor([_as_int32(seed)], dtype=torch.int32))
    return mixed(start, torch.arange(steps.start, steps.stop, dtype=torch.int32)).tolist()


def token_keys(of_steps: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The keys of tokens.

    Args:
        of_steps: for each token, what `streams` gives for its cell and step; int64, as all of these.
        rows: the number of its row among the cell's rows of the step.
        positions: its position in the row.
    """
    key, row, position = (torch.from_numpy(values).to(torch.int32) for values in (of_steps, rows, positions))
    return mixed(mixed(key, row), position).to(torch.int64).numpy()


def mixed(key: Tensor, value: Tensor | int) -> Tensor:
    """A hash of numbers that are hashed already and another one, int32."""
    return _finalise((key + GOLDEN) ^ value)


def _finalise(numbers: Tensor) -> Tensor:
    """MurmurHash3's finaliser, in place; every bit of the result depends on every bit of the number."""
    for shift, factor in zip(SHIFTS, (*FACTORS, None), strict=True):
        shifted = numbers >> shift
        numbers ^= shifted.bitwise_and_((1 << (32 - shift)) - 1)  # int32's shift repeats the sign
        if factor is not None:
            numbers *= factor
    return numbers


def _as_int32(number: int) -> int:
    """A whole number modulo 2**32, as int32."""
    return (number + 2**31) % 2**32 - 2**31
