"""An adapter in training: its factors of all layers in one float32 vector, and its optimizer's settings."""

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Where a layer's factors are in an adapter's vector."""

    layer: str
    a: slice  # lora_A as PEFT has it, [rank, in] flattened
    b: slice  # lora_B transposed, [rank, out] flattened


class Adapter:
    """The adapter of one run before its training.

    Args:
        factors: PEFT's lora_A [rank, in] and lora_B [out, rank] by layer, float32.
        scaling: what PEFT multiplies B·A by.
        rates: the learning rate of each step that will be trained.
        optimizer: AdamW's settings (betas, eps, weight_decay).
        max_norm: the norm that the gradient is clipped to; 0 or less: it is not clipped.
        moments: AdamW's state in a resumed run: `step` (a scalar) and `exp_avg` and `exp_avg_sq` (vectors in the order
            of the adapter's own); None in a run that starts anew.
        dropout: the probability with which its first factors do not see a feature.

    `start` is the vector with the initial factors; `parts` are the layers' places in it.
    """

    def __init__(
        self,
        factors: dict[str, tuple[Tensor, Tensor]],
        scaling: float,
        rates: list[float],
        optimizer: dict,
        max_norm: float,
        moments: dict[str, Tensor] | None = None,
        dropout: float = 0.0,
    ):
        self.rank = next(iter(factors.values()))[0].shape[0]
        shapes = {layer: (a.shape[1], b.shape[0]) for layer, (a, b) in factors.items()}
        self.parts, length = parts_of(shapes, self.rank)
        self.start = torch.empty(length)
        self.scaling, self.rates, self.optimizer, self.max_norm = scaling, rates, optimizer, max_norm
        self.moments, self.dropout = moments, dropout
        for part in self.parts:
            a, b = factors[part.layer]
            self.start[part.a] = a.detach().reshape(-1)
            self.start[part.b] = b.detach().t().reshape(-1)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0; it is 0 after the last step, which leaves the adapter as it is."""
        return self.rates[step] if step < len(self.rates) else 0.0


def parts_of(shapes: dict[str, tuple[int, int]], rank: int) -> tuple[list[Part], int]:
    """The layers' places in an adapter's vector (all A, then all B), and the vector's length.

    Args:
        shapes: the layers' inputs and outputs (in, out), by name.
    """
    at_a, at_b, parts = 0, rank * sum(inputs for inputs, _ in shapes.values()), []
    for layer, (inputs, outputs) in shapes.items():
        parts.append(Part(layer, slice(at_a, at_a + rank * inputs), slice(at_b, at_b + rank * outputs)))
        at_a, at_b = at_a + rank * inputs, at_b + rank * outputs
    return parts, at_b
