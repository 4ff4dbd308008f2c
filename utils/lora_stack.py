"""Several LoRA adapters of one shape on one base model, side by side: each has its share of the rows of a batch.

Imported by scoring.py. Where the packed engine trains adapters of any ranks on rows of their own, here all adapters see
the same rows, so that a layer's batch falls into equal parts and the factors are applied by two batched products,
without a mask. The base's weights stay as they are: merged ones would round away, in bfloat16, the differences between
neighbouring checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoints import PEFT_PREFIX
from cli import UserError


class Factors(NamedTuple):
    """The factors of n adapters by layer."""

    a: dict[str, Tensor]  # n x inputs x rank
    b: dict[str, Tensor]  # n x rank x outputs, scaled

    @property
    def count(self) -> int:
        """How many adapters."""
        return len(next(iter(self.a.values())))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Factors":
        """The same on a device, in the dtype that its layers compute in."""
        return Factors(*({name: one.to(device, dtype) for name, one in half.items()} for half in self))

    def of(self, adapters: list[int]) -> "Factors":
        """Those of some of the adapters, by number."""
        return Factors(*({name: one[adapters] for name, one in half.items()} for half in self))


def scaling_of(config: dict[str, Any]) -> float:
    """What an adapter_config.json multiplies B·A by. Raises UserError for a kind of LoRA that is not done here."""
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"):
        if config.get(key) not in (None, False, "none", {}, []):
            raise UserError(f"adapter_config.json: {key} is {config[key]!r}; only plain LoRA is scored here")
    return config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))


def stack(adapters: list[dict[str, Tensor] | None], layers: list[str], scaling: float) -> Factors:
    """The factors of some checkpoints (tensors by PEFT's key; None: the base itself, an adapter that is zero).

    Args:
        layers: the adapted layers, as checkpoints.layers_of names them.
        scaling: as `scaling_of` gives it; in float32 it is exact for powers of two alone, as in PEFT.
    """
    some = next(adapter for adapter in adapters if adapter is not None)

    def joined(key: str) -> Tensor:
        zero = torch.zeros_like(some[key])
        both = torch.stack([zero if adapter is None else adapter[key] for adapter in adapters])
        return both.transpose(1, 2).contiguous()  # a CPU multiplies turned matrices more slowly

    return Factors(
        {layer.removeprefix(PEFT_PREFIX): joined(f"{layer}.lora_A.weight") for layer in layers},
        {layer.removeprefix(PEFT_PREFIX): joined(f"{layer}.lora_B.weight") * scaling for layer in layers},
    )


class StackedLinear(nn.Module):
    """A layer of the base with the factors of the present adapters, whose rows follow one another in its input."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.is_plain = type(base) is nn.Linear
        self.a: Tensor | None = None
        self.b: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(n * rows, ..., inputs) to (n * rows, ..., outputs)."""
        if self.a is None:
            return self.base(x)
        rows = x.reshape(-1, x.shape[-1])
        hidden = torch.bmm(rows.view(len(self.a), -1, x.shape[-1]).to(self.a.dtype), self.a)
        if not self.is_plain:
            y = self.base(x)
            return (y + torch.bmm(hidden, self.b).view(y.shape)).to(y.dtype)
        # the adapters' part first: the large product takes it up while it is written, so it is read and written once
        bias = self.base.bias
        y = torch.bmm(hidden, self.b) if bias is None else torch.baddbmm(bias, hidden, self.b)
        return y.view(len(rows), -1).addmm_(rows, self.base.weight.t()).view(*x.shape[:-1], -1)


class Stacked:
    """A base model whose adapted layers take factors; `close` puts its own layers back.

    Args:
        model: the base; it is changed in place.
        layers: the adapted layers, as checkpoints.layers_of names them.
    """

    def __init__(self, model: nn.Module, layers: list[str]):
        self.model, self.layers = model, {}
        for name in (layer.removeprefix(PEFT_PREFIX) for layer in layers):
            try:
                layer = model.get_submodule(name)
            except AttributeError:
                raise UserError(f"{name}: is adapted, but the base model has no such layer") from None
            self.layers[name] = StackedLinear(layer)
            self._put(name, self.layers[name])

    @contextmanager
    def using(self, factors: Factors) -> Iterator[None]:
        """While the body runs, a batch belongs to these adapters, in equal parts one behind the other."""
        for name, layer in self.layers.items():
            layer.a, layer.b = factors.a[name], factors.b[name]
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.a = layer.b = None

    def close(self) -> None:
        """Give the model its own layers back."""
        for name, layer in self.layers.items():
            self._put(name, layer.base)

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, layer)
