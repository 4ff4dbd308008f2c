"""The LoRA factors of several checkpoints, stacked on the device."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paragen.collection import lora_config
from paragen.collection.checkpoints import PEFT_PREFIX
from paragen.common.cli import UserError


@dataclass(frozen=True)
class Factors:
    """The factors of n adapters by layer, on the device and in the dtype that the layers compute in."""

    a: dict[str, Tensor]  # [n, in, rank]
    b: dict[str, Tensor]  # [n, rank, out], multiplied by the scaling

    @property
    def count(self) -> int:
        """The number of adapters."""
        return len(next(iter(self.a.values())))

    @property
    def nbytes(self) -> int:
        """The memory that the factors take."""
        return sum(tensor.nbytes for half in (self.a, self.b) for tensor in half.values())

    def select(self, adapters: list[int]) -> "Factors":
        """The factors of some of the adapters, by number."""
        if adapters == [*range(self.count)]:
            return self
        which = torch.tensor(adapters, device=next(iter(self.a.values())).device)
        return Factors(
            *({name: tensor.index_select(0, which) for name, tensor in half.items()} for half in (self.a, self.b))
        )


def concatenate(groups: list[Factors]) -> Factors:
    """The adapters of several groups as one group."""
    if len(groups) == 1:
        return groups[0]
    halves = [group.a for group in groups], [group.b for group in groups]
    return Factors(*({name: torch.cat([one[name] for one in half]) for name in half[0]} for half in halves))


def check_plain_lora(config: dict[str, Any]) -> None:
    """Raise UserError for an adapter_config.json of a kind of LoRA that cannot be scored here."""
    for key, value in lora_config.beyond_plain(config).items():
        raise UserError(f"adapter_config.json: {key} is {value!r}; only plain LoRA is scored here")


def stack_checkpoints(
    adapters: list[dict[str, Tensor] | None], layers: list[str], scaling: float, device: torch.device,
    dtype: torch.dtype,
) -> Factors:  # fmt: skip
    """The factors of some checkpoints.

    They are copied to the device in one piece and rearranged there; the host does not wait for it.

    Args:
        adapters: the tensors of each checkpoint by PEFT's key, of any floating-point dtypes; None for the base model,
            whose factors are zero. At least one is not None.
        layers: the adapted layers, as checkpoints.layers_of names them.
        scaling: PEFT's scaling of all layers. As in PEFT, multiplying by it is exact for powers of two alone.
        device, dtype: of the result.
    """
    known = [adapter for adapter in adapters if adapter is not None]
    some = known[0]
    keys = [f"{layer}.{half}.weight" for layer in layers for half in ("lora_A", "lora_B")]
    sizes = [some[key].numel() for key in keys]
    shape, is_pinned = (len(adapters), sum(sizes)), device.type == "cuda"
    stored = {adapter[key].dtype for adapter in known for key in keys}
    holds_all = functools.reduce(torch.promote_types, stored)
    flat = torch.zeros(shape, dtype=holds_all, device="cpu", pin_memory=is_pinned)
    for row, adapter in zip(flat, adapters, strict=True):
        if adapter is not None:
            torch.cat([adapter[key].flatten() for key in keys], out=row)
    flat = flat.to(device, non_blocking=True).to(dtype)
    parts = zip(keys, flat.split(sizes, 1), strict=True)
    # contiguous, because a CPU multiplies transposed matrices more slowly
    transposed = [part.view(len(flat), *some[key].shape).transpose(1, 2).contiguous() for key, part in parts]
    names = [layer.removeprefix(PEFT_PREFIX) for layer in layers]
    return Factors(
        dict(zip(names, transposed[::2], strict=True)),
        dict(zip(names, [b.mul_(scaling) for b in transposed[1::2]], strict=True)),
    )
