"""Attention masks for scoring, and attention for rows of which many share their prefix and their mask.

With a mask, transformers copies the shared prefix for each row, and keys for each head that uses them, in every layer.
The attention here reads both without copies.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from paragen.common.cli import UserError
from paragen.packed.model import text_config

SHARED = "shared_sdpa"  # the name under which transformers finds shared_attention
PREFIX = "prefix"  # the attribute of the rows' keys that holds the keys and values of the shared prefix
WORD_BITS = 64  # tokens of a mask in one int64


def enable_shared_attention(model: PreTrainedModel) -> None:
    """Let a model use shared_attention, if it uses PyTorch's scaled_dot_product_attention."""
    if text_config(model)._attn_implementation == "sdpa":
        AttentionInterface.register(SHARED, shared_attention)
        AttentionMaskInterface.register(SHARED, sdpa_mask)
        model.set_attn_implementation(SHARED)


def disable_shared_attention(model: PreTrainedModel) -> None:
    """Undo `enable_shared_attention`."""
    if has_shared_attention(model):
        model.set_attn_implementation("sdpa")


def has_shared_attention(model: PreTrainedModel) -> bool:
    """Whether a model uses shared_attention."""
    return text_config(model)._attn_implementation == SHARED


def rotate_rows_as_one(model: PreTrainedModel) -> None:
    """Wrap the rotary positions of a model on an NVIDIA GPU in `as_one_row`, where they are Liger's."""
    if model.device.type != "cuda":
        return
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    modeling = sys.modules[type(model).__module__]
    rotate = getattr(modeling, "apply_rotary_pos_emb", None)
    if rotate is liger_rotary_pos_emb:
        vars(modeling)["apply_rotary_pos_emb"] = as_one_row(rotate)


def as_one_row(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Rotary positions computed with all rows joined into one, which gives the same values.

    Liger compiles its kernel anew for each number of rows, so this saves compilations.

    Args:
        rotate: takes queries and keys [rows, heads, length, width] and cosines and sines [rows or 1, length, width].
    """

    def rotated(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        if cos.dim() != 3:
            return rotate(query, key, cos, sin, *more, **named)
        rows, _, length, _ = query.shape
        joined = [one.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for one in (query, key)]
        angles = [one.expand(rows, -1, -1).flatten(0, 1)[None] for one in (cos, sin)]
        results = rotate(*joined, *angles, *more, **named)
        query, key = (one.transpose(1, 2).unflatten(1, (rows, length))[0].transpose(1, 2) for one in results)
        return query, key

    return rotated


class PrefixLayer(DynamicLayer):
    """A layer's cache that holds the keys and values of the shared prefix, [adapters, heads, prefix, width].

    The cache returns the rows' own keys and values alone; shared_attention finds the prefix at their PREFIX.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        assert layer.keys is not None and layer.values is not None  # the prefix has gone through the model
        self.keys, self.values, self.is_initialized = layer.keys.contiguous(), layer.values.contiguous(), True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The rows' own keys and values; the keys carry the prefix."""
        setattr(key_states, PREFIX, (self.keys, self.values))
        return key_states, value_states


def cache_after_prefix(model: PreTrainedModel, prefix_cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache for `rows` rows of each adapter that follow its prefix.

    Args:
        model: decides whether the prefix is shared or copied for each row.
        prefix_cache: the prefix of each adapter; it is not changed.
    """
    cache = copy.copy(prefix_cache)
    if has_shared_attention(model):
        cache.layers = [PrefixLayer(cast(DynamicLayer, layer)) for layer in prefix_cache.layers]
    else:
        cache.layers = [copy.copy(layer) for layer in prefix_cache.layers]  # repeating creates new tensors
        cache.batch_repeat_interleave(rows)
    return cache


def shared_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, by a kernel of our own on an NVIDIA GPU.

    Args:
        query: [rows, heads, length, width].
        key, value: [rows, key heads, keys, width]; PrefixLayer's keys have a prefix before them.
        attention_mask: a mask as `pack_mask` returns it, [masks, 1, length, words]; `rows` is a multiple of `masks`,
            and the masks are repeated in order. Any other mask is left to transformers.

    Returns ([rows, length, heads, width], None).
    """
    if attention_mask is None or attention_mask.dtype is not torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    prefix, scale = getattr(key, PREFIX, None), more.get("scaling") or query.shape[-1] ** -0.5
    if query.device.type == "cuda":
        from paragen.scoring import kernels

        if kernels.can_attend(query, value):
            return kernels.attend(query, key, value, attention_mask, scale, prefix), None
    return plain_attention(query, key, value, attention_mask, scale, prefix), None


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, prefix: tuple[Tensor, Tensor] | None
) -> Tensor:
    """What kernels.attend computes, by PyTorch's operations; the arguments and the result are the same."""
    if prefix is not None:
        times = len(query) // len(prefix[0])
        key, value = (
            torch.cat([first.repeat_interleave(times, 0), own], 2)
            for first, own in zip(prefix, (key, value), strict=True)
        )
    mask = unpack_mask(mask)[..., : key.shape[2]].repeat(len(query) // len(mask), 1, 1, 1)
    # with fewer key heads than heads, a GPU would use the slowest of PyTorch's kernels
    key, value = (repeat_kv(one, query.shape[1] // one.shape[1]) for one in (key, value))
    y = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return y.transpose(1, 2).contiguous()


def mask_for(
    model: PreTrainedModel, mask: Tensor, window_mask: Tensor | None, count: int = 1
) -> Tensor | dict[str, Tensor]:
    """Masks as the model takes them; by type of layer, where it has more than one.

    Args:
        mask: which keys tokens attend to, [rows, 1, length, keys] bool.
        window_mask: the same for layers with a sliding window; None where no layer has one.
        count: how many times the rows are repeated in the batch.
    """

    def converted(one: Tensor) -> Tensor:
        return pack_mask(one) if has_shared_attention(model) else additive_mask(model, one, count)

    if window_mask is None or len(layer_types_of(model)) == 1:
        return converted(mask if window_mask is None else window_mask)
    return {"full_attention": converted(mask), "sliding_attention": converted(window_mask)}


def pack_mask(mask: Tensor) -> Tensor:
    """A mask [.., keys] bool as the bits of words, [.., words] int64, the first key in the lowest bit.

    It takes an eighth of the memory.
    """
    padded = nn.functional.pad(mask, (0, -mask.shape[-1] % WORD_BITS)).unflatten(-1, (-1, 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded * powers).sum(-1, dtype=torch.uint8).view(torch.int64)


def unpack_mask(words: Tensor) -> Tensor:
    """The mask of packed words, [.., WORD_BITS * words] bool."""
    parts = words.contiguous().view(torch.uint8)[..., None]
    return (parts >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1).bool().flatten(-2)


def additive_mask(model: PreTrainedModel, mask: Tensor, count: int) -> Tensor:
    """A mask as the term that is added to attention scores, [count * rows, 1, length, keys], in the model's dtype.

    Without it, PyTorch would convert the bool mask in each layer.
    """
    bias = torch.zeros((count, *mask.shape), dtype=model.dtype, device=mask.device)
    return bias.masked_fill_(~mask, -torch.inf).flatten(0, 1)


def key_head_count(config: Any) -> int:
    """The number of heads with keys of their own."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def window_for(model: PreTrainedModel, longest: int) -> int | None:
    """The size of a model's sliding window in tokens; None where no row of `longest` tokens is longer than it.

    Raises UserError where a row is longer and the model has layers of unknown types.
    """
    window, types = getattr(text_config(model), "sliding_window", None), layer_types_of(model)
    if not window or longest <= window or "sliding_attention" not in types:
        return None
    if others := types - {"sliding_attention", "full_attention"}:
        raise UserError(
            f"a row of {longest} tokens is longer than the {window} that some of the model's layers see, and it "
            f"has layers of {', '.join(sorted(others))}; LIMIT= or another SPLIT without it can be scored"
        )
    return window


def layer_types_of(model: PreTrainedModel) -> set[str]:
    """The attention types of a model's layers."""
    return set(getattr(text_config(model), "layer_types", None) or ["sliding_attention"])
