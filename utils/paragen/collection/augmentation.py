"""Other factors of the same LoRA updates: B·A = (B·G)(G^-1·A) for every invertible G.

A model of weights that is to see an update as one thing can be shown its factors in many forms. All functions are
batch-free: one checkpoint, one draw of G per layer.
"""

from collections.abc import Callable, Mapping

import numpy
import torch

from paragen.collection import checkpoints
from paragen.common.cli import UserError

# How far the singular values of a random G are from 1: between 1/SPREAD and SPREAD, so that its condition number is at
# most SPREAD squared, and rounding grows by no more than that.
SPREAD = 2.0


def augmented(
    tensors: Mapping[str, torch.Tensor], kind: str, generator: numpy.random.Generator
) -> dict[str, torch.Tensor]:
    """A checkpoint with other factors of the same updates.

    Args:
        tensors: the factors by PEFT's key; lora_A is r x inputs, lora_B outputs x r. They are not written into.
        kind: `permute` reorders the ranks and `sign` flips some of them: the values stay those of the checkpoint. `gl`
            multiplies by a random matrix G of condition at most 4, in float64, and rounds to the checkpoint's dtype.
        generator: what is drawn with, one G per layer.

    Returns new tensors with the same keys, in the same order, shapes and dtypes. The product B·A of each layer is
    unchanged within rounding, which in bfloat16 is 0.4 % of a factor's entries.

    Raises UnsupportedAdapter for tensors that are no LoRA factors of linear layers.
    """
    found: dict[str, torch.Tensor] = {}
    for layer in checkpoints.layers_of(tensors):
        keys = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        found.update(zip(keys, KINDS[kind](tensors[keys[0]], tensors[keys[1]], generator), strict=True))
    return {key: found[key] for key in tensors}


def check_kind(kind: str) -> str:
    """`kind`, checked to be one that `augmented` knows."""
    if kind not in KINDS:
        raise UserError(f"augment={kind!r} is not known; known: {', '.join(KINDS)}")
    return kind


Factors = tuple[torch.Tensor, torch.Tensor]


def _permuted(a: torch.Tensor, b: torch.Tensor, generator: numpy.random.Generator) -> Factors:
    order = torch.from_numpy(generator.permutation(a.shape[0]))
    return a[order].contiguous(), b[:, order].contiguous()


def _flipped(a: torch.Tensor, b: torch.Tensor, generator: numpy.random.Generator) -> Factors:
    signs = torch.from_numpy(generator.integers(0, 2, a.shape[0]) * 2 - 1)
    return a * signs[:, None].to(a.dtype), b * signs.to(b.dtype)


def _multiplied(a: torch.Tensor, b: torch.Tensor, generator: numpy.random.Generator) -> Factors:
    rank = a.shape[0]
    left, right = (_orthogonal(rank, generator) for _ in range(2))
    sizes = torch.from_numpy(SPREAD ** generator.uniform(-1, 1, rank))
    g = (left * sizes) @ right
    inverse = (right.mT / sizes) @ left.mT
    return (inverse @ a.double()).to(a.dtype), (b.double() @ g).to(b.dtype)


def _orthogonal(size: int, generator: numpy.random.Generator) -> torch.Tensor:
    """A random orthogonal matrix, uniform over all of them: size x size, float64."""
    q, r = numpy.linalg.qr(generator.standard_normal((size, size)))
    return torch.from_numpy(q * numpy.sign(numpy.diag(r)))


KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor, numpy.random.Generator], Factors]] = {
    "permute": _permuted,
    "sign": _flipped,
    "gl": _multiplied,
}
