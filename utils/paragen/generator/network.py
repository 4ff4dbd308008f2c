"""The reference generator's network: a condition in, the factors of all layers out.

A tensor's place (its layer and its kind of matrix) has an embedding. The condition is added to it, residual blocks mix
both, and the head of the tensor's kind gives its values, standardised. Heads start at zero, so that an untrained
network gives the mean of the tasks. It is a reference, simple on purpose.

A head gives combinations of as many directions as it has inputs, for all layers of its kind together. They have to be
enough for (tasks x layers) tensors that have little in common, so that a head has EXPANSION times the width as inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paragen.generator.factor_layout import Kind

BLOCKS, EXPANSION = 2, 4


class Network(nn.Module):
    """The network.

    Args:
        inputs: the length of a condition.
        width: of everything between condition and heads.
        kinds: the kinds of tensors to give.
    """

    def __init__(self, inputs: int, width: int, kinds: Sequence[Kind]):
        super().__init__()
        self.counts = [len(kind.keys) for kind in kinds]
        self.read = nn.Sequential(
            nn.Linear(inputs, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, width)
        )  # fmt: skip
        self.places = nn.Parameter(torch.randn(sum(self.counts), width))
        self.blocks = nn.ModuleList(
            nn.Sequential(expanded(width), nn.Linear(EXPANSION * width, width)) for _ in range(BLOCKS)
        )
        self.last = expanded(width)
        self.heads = nn.ModuleList(nn.Linear(EXPANSION * width, kind.numel) for kind in kinds)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, conditions: Tensor) -> list[Tensor]:
        """The standardised values of each kind, [batch, layers, values], from conditions [batch, inputs]."""
        x = self.read(conditions)[:, None] + self.places
        for block in self.blocks:
            x = x + block(x)
        parts = self.last(x).split(self.counts, 1)
        return [head(part) for head, part in zip(self.heads, parts, strict=True)]


def expanded(width: int) -> nn.Sequential:
    """A layer from `width` normalised values to EXPANSION times as many."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, EXPANSION * width), nn.GELU())
