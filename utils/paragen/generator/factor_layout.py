"""How a checkpoint becomes one vector for the generator, and back: tensors of one kind lie behind each other.

A kind is a name in the model without the layer's number, and a shape: `model.layers.#.self_attn.q_proj.lora_A`.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from paragen.analysis import canonical


class Kind(NamedTuple):
    """The tensors of one kind."""

    name: str
    keys: tuple[str, ...]  # PEFT's, by layer
    shape: tuple[int, ...]  # of each

    @property
    def numel(self) -> int:
        """The number of values of each tensor."""
        return math.prod(self.shape)


class FactorLayout:
    """The order of a checkpoint's values in a vector.

    Args:
        shapes: the shape of each tensor by PEFT's key, in natural order.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = dict(shapes)
        kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for key, shape in shapes.items():
            kinds.setdefault((re.sub(r"\.\d+\.", ".#.", key), tuple(shape)), []).append(key)
        self.kinds = [Kind(name, tuple(keys), shape) for (name, shape), keys in kinds.items()]
        self.sizes = [kind.numel * len(kind.keys) for kind in self.kinds]
        self.size = sum(self.sizes)

    def split(self, vectors: Tensor) -> list[Tensor]:
        """Vectors [n, size] as a view per kind, [n, layers, values]."""
        parts = vectors.split(self.sizes, 1)
        return [part.unflatten(1, (len(kind.keys), -1)) for kind, part in zip(self.kinds, parts, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `split`, a copy."""
        return torch.cat([part.flatten(1) for part in parts], 1)

    def vector_of(self, tensors: Mapping[str, Tensor], form: str = "raw") -> Tensor:
        """A checkpoint's values [size], in its dtype; in canonical form, float32."""
        if form == "canonical":
            tensors = canonical_form(tensors)
        return torch.cat([tensors[key].reshape(-1) for kind in self.kinds for key in kind.keys])

    def tensors_of(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors of a vector [size] by PEFT's key, in natural order; views."""
        found: dict[str, Tensor] = {}
        for kind, part in zip(self.kinds, self.split(vector[None]), strict=True):
            found |= {key: values.view(kind.shape) for key, values in zip(kind.keys, part[0], strict=True)}
        return {key: found[key] for key in self.shapes}


def canonical_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint with canonical factors (analysis/canonical.py), float32."""
    found: dict[str, Tensor] = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            other = key.removesuffix("lora_A.weight") + "lora_B.weight"
            first, second = canonical.canonical(a.float(), tensors[other].float())
            found |= {key: first.float(), other: second.float()}
    return found
