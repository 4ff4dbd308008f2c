"""How a model's tokens are told what they see, and attention for rows of which many have the same mask.

Imported by scoring.py, decoding.py, lora_stack.py, scored_base.py, grades.py and packed_base.py. With a mask,
transformers copies what all rows begin with for each row, and keys for each head that uses them, in every layer; the
attention here takes both as they are.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from paragen.common.cli import UserError
from paragen.packed.model import config_of

SHARED = "shared_sdpa"
WORD = 64  # tokens of a mask in one number


def share(model: nn.Module) -> None:
    """Let a model attend by `attend`, where it does by PyTorch's scaled_dot_product_attention."""
    if config_of(model)._attn_implementation == "sdpa":
        AttentionInterface.register(SHARED, attend)
        AttentionMaskInterface.register(SHARED, sdpa_mask)
        model.set_attn_implementation(SHARED)


def unshare(model: nn.Module) -> None:
    """Undo `share`."""
    if is_shared(model):
        model.set_attn_implementation("sdpa")


def is_shared(model: nn.Module) -> bool:
    return config_of(model)._attn_implementation == SHARED


def turn_by_token(model: nn.Module) -> None:
    """Let a model on an NVIDIA GPU, which has Liger's rotary positions, have those of `by_token`."""
    if model.device.type != "cuda":
        return
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    modeling = sys.modules[type(model).__module__]
    if getattr(modeling, "apply_rotary_pos_emb", None) is liger_rotary_pos_emb:
        modeling.apply_rotary_pos_emb = by_token(liger_rotary_pos_emb)


def by_token(turn: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Rotary positions of rows as those of one long row, which are the same: Liger compiles its kernel anew for each
    number of rows.

    Args:
        turn: takes queries and keys [rows, heads, length, width] and cosines and sines [rows or 1, length, width].
    """

    def turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if cos.dim() != 3:
            return turn(query, key, cos, sin, *more, **named)
        rows, _, length, _ = query.shape
        flat = [one.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for one in (query, key)]
        angles = [one.expand(rows, -1, -1).flatten(0, 1)[None] for one in (cos, sin)]
        found = turn(*flat, *angles, *more, **named)
        query, key = (one.transpose(1, 2).unflatten(1, (rows, length))[0].transpose(1, 2) for one in found)
        return query, key

    return turned


class Beginning(DynamicLayer):
    """A layer's keys and values of what all rows of an adapter begin with; `attend` takes them beside the rows' own."""

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys.contiguous(), layer.values.contiguous(), True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The rows' own, from which `attend` gets at the others."""
        key_states.beginning = self.keys, self.values
        return key_states, value_states


def behind(model: nn.Module, before: DynamicCache, rows: int) -> DynamicCache:
    """A cache for so many rows of each adapter, behind what `before` holds for each; `before` stays as it is."""
    found = copy.copy(before)
    if is_shared(model):
        found.layers = [Beginning(layer) for layer in before.layers]
    else:
        found.layers = [copy.copy(layer) for layer in before.layers]  # repeating makes new tensors
        found.batch_repeat_interleave(rows)
    return found


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: [rows, heads, length, width]; key, value: [rows, heads / groups, seen, width], `key` as `Beginning` gives
            it where more comes before them.
        attention_mask: what is seen, as `packed` gives it, [some, 1, length, words]: the rows are so many, or a
            multiple, and then have it again and again. Any other is left to transformers.
    """
    if attention_mask is None or attention_mask.dtype is not torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    beginning, scale = getattr(key, "beginning", None), more.get("scaling") or query.shape[-1] ** -0.5
    if query.device.type == "cuda":
        from paragen.scoring import kernels

        if kernels.can_attend(query, value):
            return kernels.attend(query, key, value, attention_mask, scale, beginning), None
    return attended(query, key, value, attention_mask, scale, beginning), None


def attended(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, beginning: tuple[Tensor, Tensor] | None
) -> Tensor:
    """What scoring_kernels.attend does, by PyTorch's operations."""
    if beginning is not None:
        times = len(query) // len(beginning[0])
        key, value = (
            torch.cat([first.repeat_interleave(times, 0), own], 2)
            for first, own in zip(beginning, (key, value), strict=True)
        )
    mask = unpacked(seen)[..., : key.shape[2]].repeat(len(query) // len(seen), 1, 1, 1)
    key, value = (repeat_kv(one, query.shape[1] // one.shape[1]) for one in (key, value))  # else a GPU's is the slowest
    y = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return y.transpose(1, 2).contiguous()


def mask_for(model: nn.Module, seen: Tensor, near: Tensor | None, count: int = 1) -> Tensor | dict[str, Tensor]:
    """What tokens see, as the model takes it: by kind of layer where it has more than one.

    Args:
        seen: [rows, 1, length, seen] bool; near: the same for layers with a window; None where none has.
        count: how many times the rows follow one another.
    """

    def made(mask: Tensor) -> Tensor:
        return packed(mask) if is_shared(model) else bias_of(model, mask, count)

    if near is None or len(kinds_of(model)) == 1:
        return made(seen if near is None else near)
    return {"full_attention": made(seen), "sliding_attention": made(near)}


def packed(mask: Tensor) -> Tensor:
    """A mask [.., seen] as bits of words, [.., words] int64, the first in the lowest: an eighth of its memory."""
    wanted = nn.functional.pad(mask, (0, -mask.shape[-1] % WORD)).unflatten(-1, (-1, 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (wanted * powers).sum(-1, dtype=torch.uint8).view(torch.int64)


def unpacked(words: Tensor) -> Tensor:
    """The bits of words, [.., WORD * words] bool."""
    parts = words.contiguous().view(torch.uint8)[..., None]
    return (parts >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1).bool().flatten(-2)


def bias_of(model: nn.Module, mask: Tensor, count: int) -> Tensor:
    """A mask as what attention adds, [count * rows, 1, length, seen]; else attention makes it anew in each layer."""
    bias = torch.zeros((count, *mask.shape), dtype=model.dtype, device=mask.device)
    return bias.masked_fill_(~mask, -torch.inf).flatten(0, 1)


def key_heads(config: Any) -> int:
    """How many heads have keys of their own."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def window_of(model: nn.Module, longest: int) -> int | None:
    """How far back layers with a window see, where that is less than the longest row."""
    window, kinds = getattr(config_of(model), "sliding_window", None), kinds_of(model)
    if not window or longest <= window or "sliding_attention" not in kinds:
        return None
    if others := kinds - {"sliding_attention", "full_attention"}:
        raise UserError(
            f"a row of {longest} tokens is longer than the {window} that some of the model's layers see, and it "
            f"has layers of {', '.join(sorted(others))}; LIMIT= or another SPLIT without it can be scored"
        )
    return window


def kinds_of(model: nn.Module) -> set[str]:
    """The kinds of attention that a model's layers have."""
    return set(getattr(config_of(model), "layer_types", None) or ["sliding_attention"])
