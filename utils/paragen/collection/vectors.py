"""A checkpoint as one flat vector with a layout, and back.

Both directions keep every bit.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.utils.data import get_worker_info

from paragen.common.cli import UserError


class Slot(NamedTuple):
    """Where a tensor lies in the vector of its checkpoint."""

    key: str  # PEFT's
    shape: tuple[int, ...]
    offset: int  # of its first value, counted in values; the others follow in row-major order
    dtype: torch.dtype  # its own, in the checkpoint


Layout = tuple[Slot, ...]


def layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """The layout of a checkpoint's vector: its tensors one behind the other, in the order of the mapping."""
    slots, offset = [], 0
    for key, tensor in tensors.items():
        slots.append(Slot(key, tuple(tensor.shape), offset, tensor.dtype))
        offset += tensor.numel()
    return tuple(slots)


def to_vector(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All values of a checkpoint in one new 1-D tensor, in the order of the mapping.

    Its dtype is the checkpoint's; where that mixes several, the smallest that holds them all without loss. In a worker
    of a DataLoader it is made in shared memory, so that the main process gets it without another copy.
    """
    parts = [tensor.reshape(-1) for tensor in tensors.values()]
    dtype = functools.reduce(torch.promote_types, {part.dtype for part in parts})
    size = sum(part.numel() for part in parts)
    out = torch.empty(0, dtype=dtype)
    if get_worker_info() is not None:
        out.set_(torch.UntypedStorage._new_shared(size * out.element_size()), 0, (size,), (1,))
    return torch.cat([part.to(dtype) for part in parts], out=out)


def to_dict(vector: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """The checkpoint whose values are `vector`: by PEFT's key, in the dtypes and shapes of the layout.

    Args:
        vector: 1-D; values behind the layout's last are ignored (the padding of `pairs.collate`).
        layout: as `layout_of` gives it.

    Tensors of the vector's own dtype are views of it, not copies. Raises UserError for a vector that is too short.
    """
    size = sum(torch.Size(slot.shape).numel() for slot in layout)
    if vector.dim() != 1 or vector.numel() < size:
        raise UserError(f"a vector of shape {tuple(vector.shape)} does not hold the {size} values of the layout")
    return {
        slot.key: vector[slot.offset : slot.offset + torch.Size(slot.shape).numel()].view(slot.shape).to(slot.dtype)
        for slot in layout
    }
