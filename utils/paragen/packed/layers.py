"""LoRA for many adapters at once on one frozen base model: stacked factors, attention within rows, the loss.

The rows of all adapters form one sequence of tokens, without padding between them, so that each base layer runs once
over all of them. An adapter's factors are a block of rows in a stack; a token's products with the blocks of other
adapters are set to zero. Adapters are assigned to groups with a stack each, all of equal width, so that the cost per
token does not grow with the number of adapters.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from paragen.packed.dropout import LayerDropout
from paragen.packed.model import replace_submodule
from paragen.packed.step_context import Batch, StepContext

ATTENTION = "packed_rows"  # the name under which transformers finds attend_within_rows
MAX_FLASH_SIZE, FLASH_CAPABILITY = 256, (8, 0)  # the largest head, and the oldest GPUs (Ampere), of FlashAttention
CHUNK_LOGITS = 2**28  # elements of a chunk of logits (1 GB in float32)
# Arguments with which transformers' attention functions compute something else than attend_within_rows.
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "head_mask", "alibi")


class NotPackable(Exception):
    """The packed engine cannot train this run; the message is the reason."""


class _StackedLora(torch.autograd.Function):
    """base(x) + scaling * B A dropout(x) with the factors of each token's adapter; the base gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        mask: Tensor,
        dropout: LayerDropout | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        seen = x if dropout is None else dropout.kept(x[0])
        down = torch.bmm(seen.view(a.shape[0], -1, x.shape[-1]), a.transpose(1, 2)).mul_(mask)
        _add_bmm(y, down, b)
        ctx.dropout = dropout
        ctx.save_for_backward(x, weight, a, b, mask, down)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, mask, down = ctx.saved_tensors
        dropout = ctx.dropout
        dy = dy.contiguous()
        by_group = dy.view(a.shape[0], -1, dy.shape[-1])
        db = torch.bmm(down.transpose(1, 2), by_group)
        ddown = torch.bmm(by_group, b.transpose(1, 2)).mul_(mask)
        seen = x if dropout is None else dropout.kept(x[0])  # again: it would take as much memory as all inputs
        da = torch.bmm(ddown.transpose(1, 2), seen.view(a.shape[0], -1, x.shape[-1]))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            if dropout is None:
                _add_bmm(dx, ddown, a)
            else:
                dropout.add_kept(torch.bmm(ddown, a).view(-1, x.shape[-1]), dx[0])
        return dx, None, None, da, db, None, None


class _SlicedLora(torch.autograd.Function):
    """The same as _StackedLora, one adapter after another: without products of zeros, which a CPU is faster for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, context: StepContext, layer: int
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        downs, kept, slices, dropout = [], [], context.adapter_slices(), context.layer_dropout(layer)
        for here, group, rows, scale, drops in slices:
            seen, mask = x[0, here], None
            if drops and dropout is not None:
                mask = dropout.at(here).mask(x.shape[-1])
                seen = seen * mask
            downs.append((seen @ a[group, rows].t()).mul_(scale))
            y[0, here].addmm_(downs[-1], b[group, rows])
            kept.append(mask)
        ctx.slices = slices
        ctx.save_for_backward(x, weight, a, b, *downs, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, *others = ctx.saved_tensors
        downs, kept = others[: len(ctx.slices)], others[len(ctx.slices) :]
        dy = dy.contiguous()
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        for (here, group, rows, scale, _), down, mask in zip(ctx.slices, downs, kept, strict=True):
            db[group, rows] = down.t() @ dy[0, here]
            ddown = (dy[0, here] @ b[group, rows].t()).mul_(scale)
            da[group, rows] = ddown.t() @ (x[0, here] if mask is None else x[0, here] * mask)
            if dx is not None and mask is None:
                dx[0, here].addmm_(ddown, a[group, rows])
            elif dx is not None:
                dx[0, here].add_((ddown @ a[group, rows]).mul_(mask))
        return dx, None, None, da, db, None, None


def _add_bmm(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right for each group, in place; `total` is [..., columns] and contiguous."""
    view = total.view(left.shape[0], -1, total.shape[-1])
    if len(view) == 1:
        view[0].addmm_(left[0], right[0])
    else:
        view.baddbmm_(left, right)


class PackedLinear(nn.Module):
    """A frozen linear layer with the LoRA factors of all adapters.

    Args:
        base: the frozen layer; its weight is [out, in].
        context: the model's, which all its packed layers share.
        dtype: of the factors and of the products.
        number: the layer's among the packed ones, from 0.

    `a` is [groups, width, in]. `b` is [groups, width, out], with the second factors transposed, so that an adapter has
    the same rows in both.
    """

    def __init__(self, base: nn.Linear, context: StepContext, dtype: torch.dtype, number: int = 0):
        super().__init__()
        self.base, self.step_context, self.number = base, context, number
        shape = context.groups.count, context.groups.width
        device = base.weight.device
        self.a = nn.Parameter(torch.zeros(*shape, base.in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(*shape, base.out_features, device=device, dtype=dtype))
        self.weight = base.weight.to(dtype)  # autocast would cast it at each call
        self.bias = None if base.bias is None else base.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, N, in]; returns [1, N, out] in the factors' dtype."""
        context = self.step_context
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.a.dtype).contiguous()
            if context.batch.spans is not None:
                return _SlicedLora.apply(x, self.weight, self.bias, self.a, self.b, context, self.number)
            dropout = context.layer_dropout(self.number)
            return _StackedLora.apply(x, self.weight, self.bias, self.a, self.b, context.mask, dropout)

    def block(self, factor: Tensor, adapter: int) -> Tensor:
        """An adapter's rows of `a`, of `b` or of their gradients: [rank, columns]."""
        group, rows = self.step_context.groups.place_of(adapter)
        return factor[group, rows]


class _Rearranged(torch.autograd.Function):
    """The rows of a matrix in another order; the gradient is gathered by the inverse order, without summing.

    This is correct only where each row of the input occurs once in the output. Padding may occur more often, because
    its gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, numbers)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.inverse), None, None


def attend_within_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for packed rows: causal, within each row alone.

    Args:
        module: the attention layer; `attach` has set its `step_context`.
        query, key, value: [1, heads, N, head size]; where there are fewer key and value heads, groups of query heads
            share them.
        sliding_window: how many tokens a token attends to, itself included; None: all before it.

    Returns ([1, N, heads, head size], None). Padding comes after a row's tokens, where causal attention does not look,
    so no mask is needed unless the window is shorter than the rows. Raises NotPackable for settings with which stock
    attention computes something else.
    """
    unsupported = {name: one for name, one in others.items() if one is not None and name in UNSUPPORTED_ARGUMENTS}
    if attention_mask is not None or dropout or unsupported:
        used = ", ".join(unsupported) or ("dropout" if dropout else "a mask of its own")
        raise NotPackable(f"its attention uses {used}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotPackable("its attention is not causal")
    context = cast(StepContext, module.step_context)
    batch, starts = context.batch, context.sequences
    length = batch.row_length
    if starts is not None and takes_any_length(query, key, value):
        return attend_within_sequences(query, key, value, starts, length, scaling, sliding_window), None
    rows = [_as_rows(heads, batch) for heads in (query, key, value)]
    window = None
    if sliding_window is not None and sliding_window < length:
        place = torch.arange(length, device=query.device)
        window = (place[:, None] >= place) & (place[:, None] - place < sliding_window)
        sharing = query.shape[1] // key.shape[1]  # with a mask, only kernels for equal numbers of heads are fast
        rows[1:] = [heads.repeat_interleave(sharing, dim=1) for heads in rows[1:]]
    queries, keys, values = rows
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=window,
        is_causal=window is None,
        scale=scaling,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    out = out.transpose(1, 2).reshape(-1, out.shape[1] * out.shape[3])
    tokens = _Rearranged.apply(out, batch.to_tokens, batch.to_rows)
    return tokens.view(1, -1, query.shape[1], query.shape[3]), None


AttentionInterface.register(ATTENTION, attend_within_rows)


def takes_any_length(*heads: Tensor) -> bool:
    """Whether the kernel for sequences of any length takes queries, keys and values: FlashAttention's, of PyTorch."""
    dtypes, sizes = {one.dtype for one in heads}, {one.shape[3] for one in heads}
    is_half = dtypes in ({torch.bfloat16}, {torch.float16})
    is_fit = len(sizes) == 1 and max(sizes) <= MAX_FLASH_SIZE and max(sizes) % 8 == 0
    return is_half and is_fit and torch.cuda.get_device_capability(heads[0].device) >= FLASH_CAPABILITY


def attend_within_sequences(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention within sequences of any length.

    Args:
        query, key, value: as for `attend_within_rows`, for which `takes_any_length`.
        starts: where each sequence begins, and N; int32.
        longest: no sequence is longer.
        window: how many tokens a token attends to, itself included; None: all before it.

    Returns [1, N, heads, head size].
    """
    q, k, v = (heads[0].transpose(0, 1).contiguous() for heads in (query, key, value))
    before = -1 if window is None else window - 1
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=(before, 0))
    return cast(Tensor, out)[None]


def _as_rows(heads: Tensor, batch: Batch) -> Tensor:
    """[1, heads, N, size] as padded rows [R, heads, L, size]."""
    count, size = heads.shape[1], heads.shape[3]
    tokens = heads.transpose(1, 2).reshape(-1, count * size)
    rows = _Rearranged.apply(tokens, batch.to_rows, batch.to_tokens)
    return rows.view(-1, batch.row_length, count, size).transpose(1, 2)


class _Predicting(torch.autograd.Function):
    """The rows of a matrix at some positions; the gradient is gathered by their places, without summing.

    The backward pass of index_select would add up in any order, or sort the positions where the kernels have to be
    deterministic. Here a row occurs once, except as padding, whose gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        return hidden.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        nothing = gradient.new_zeros(1, gradient.shape[1])
        return torch.cat([gradient, nothing]).index_select(0, ctx.places), None, None


class _NextTokenLoss(torch.autograd.Function):
    """Cross-entropy at some positions, the logits in chunks.

    The forward pass also computes the gradient by the hidden states, which is possible because the head is frozen.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        rows = max(1, CHUNK_LOGITS // head.weight.shape[0])
        losses, gradients = [], []
        for chunk, chunk_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
            with torch.enable_grad():
                chunk = chunk.detach().requires_grad_()
                loss = F.cross_entropy(head(chunk).float(), chunk_targets, reduction="none")
                gradients.append(torch.autograd.grad(loss.sum(), chunk)[0])
            losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * weights[:, None].to(gradient.dtype), None, None


def attach(
    model: PreTrainedModel, names: Iterable[str], context: StepContext, dtype: torch.dtype
) -> dict[str, PackedLinear]:
    """Replace linear layers of a model by packed ones and its attention by attend_within_rows.

    Args:
        model: a transformers causal language model; it is changed in place (`detach` undoes that).
        names: the layers to replace.
        context: what the packed layers will share.
        dtype: of the factors and of the products.

    Returns the packed layers by name. Raises NotPackable where a layer is no plain nn.Linear or the model's attention
    cannot be replaced.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise NotPackable(f"the attention of {type(model).__name__} cannot be replaced")
    packed: dict[str, PackedLinear] = {}
    try:
        for number, name in enumerate(names):
            base = model.get_submodule(name)
            if type(base) is not nn.Linear:
                raise NotPackable(f"{name} is a {type(base).__name__}, not a linear layer")
            packed[name] = PackedLinear(base, context, dtype, number)
            replace_submodule(model, name, packed[name])
    except BaseException:
        detach(model, packed)
        raise
    for module in model.modules():
        vars(module)["step_context"] = context
    model.set_attn_implementation(ATTENTION)
    return packed


def detach(model: PreTrainedModel, packed: dict[str, PackedLinear]) -> None:
    """Put the plain layers back. The attention function stays replaced."""
    for name, layer in packed.items():
        replace_submodule(model, name, layer.base)
    for module in model.modules():
        vars(module).pop("step_context", None)


def token_losses(model: PreTrainedModel, batch: Batch, context: StepContext) -> Tensor:
    """The cross-entropy of each token with a loss, [P] float32, differentiable by the packed factors.

    Args:
        model: a transformers causal language model with packed layers.
    """
    context.begin_step(batch)
    out = model.base_model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False)
    hidden = _Predicting.apply(out.last_hidden_state[0], batch.predicting, batch.to_losses)
    return _NextTokenLoss.apply(hidden, model.get_output_embeddings(), batch.targets)
