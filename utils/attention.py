"""How a model's tokens are told what they see, and attention whose heads share keys without copies of them.

Imported by scoring.py, decoding.py and lora_stack.py. With a mask, transformers repeats keys and values for each head
that uses them, in every layer; here the queries of such heads follow one another as rows, which gives the same numbers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cli import UserError

GROUPED = "grouped_sdpa"


def group(model: nn.Module) -> None:
    """Let a model's heads share keys as rows, where it attends by PyTorch's scaled_dot_product_attention."""
    if config_of(model)._attn_implementation == "sdpa":
        AttentionInterface.register(GROUPED, attend)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)
        model.set_attn_implementation(GROUPED)


def ungroup(model: nn.Module) -> None:
    """Undo `group`."""
    if is_grouped(model):
        model.set_attn_implementation("sdpa")


def is_grouped(model: nn.Module) -> bool:
    return config_of(model)._attn_implementation == GROUPED


def config_of(model: nn.Module) -> Any:
    """The configuration of a model's text part."""
    return model.config.get_text_config()


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: [rows, heads, length, width]; key, value: [rows, heads / groups, seen, width].
        attention_mask: as `mask_for` makes it, [rows, 1, groups * length, seen]; any other is left to transformers.
    """
    rows, heads, length, width = query.shape
    shared = key.shape[1]
    groups = heads // shared
    if groups == 1 or attention_mask is None or attention_mask.shape[2] != groups * length:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    y = nn.functional.scaled_dot_product_attention(
        query.reshape(rows, shared, groups * length, width), key, value, attn_mask=attention_mask,
        scale=more.get("scaling"),
    )  # fmt: skip
    # of the kernels some give the rows behind one another, others the heads: a dimension can always be split
    return y.view(rows, shared, groups, length, -1).permute(0, 3, 1, 2, 4).reshape(rows, length, heads, -1), None


def mask_for(model: nn.Module, seen: Tensor, near: Tensor | None, count: int = 1) -> Tensor | dict[str, Tensor]:
    """What tokens see, as the model takes it: by kind of layer where it has more than one.

    Args:
        seen: [rows, 1, length, seen] bool; near: the same for layers with a window; None where none has.
        count: how many times the rows follow one another.
    """
    if near is None or len(kinds_of(model)) == 1:
        return bias_of(model, seen if near is None else near, count)
    return {"full_attention": bias_of(model, seen, count), "sliding_attention": bias_of(model, near, count)}


def bias_of(model: nn.Module, mask: Tensor, count: int) -> Tensor:
    """A mask as what attention adds, [count * rows, 1, groups * length, seen].

    Else attention makes it of the mask in each layer; and its kernels want rows that begin at multiples of 8 numbers.
    """
    rows, _, length, seen = mask.shape
    config = config_of(model)
    groups = config.num_attention_heads // key_heads(config) if is_grouped(model) else 1
    shape = count, rows, groups, length, -(-seen // 8) * 8
    bias = torch.zeros(shape, dtype=model.dtype, device=mask.device)[..., :seen]
    return bias.masked_fill_(~mask, -torch.inf).view(count * rows, 1, groups * length, seen)


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


def positions_vary(model: nn.Module) -> bool:
    """Whether a model's rotary positions depend on the longest row of a batch."""
    rope = str(getattr(config_of(model), "rope_parameters", None))
    return any(kind in rope for kind in ("dynamic", "longrope"))


def kinds_of(model: nn.Module) -> set[str]:
    """The kinds of attention that a model's layers have."""
    return set(getattr(config_of(model), "layer_types", None) or ["sliding_attention"])
