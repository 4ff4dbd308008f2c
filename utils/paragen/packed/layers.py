"""LoRA for many adapters at once on one frozen base model: stacked factors, attention within rows, the loss.

Imported by packed_engine.py (training) and by scoring. The rows of all adapters lie behind one another in one sequence
of tokens, without padding between them, so that each base layer runs once over all of them. An adapter's factors are a
block of rows in a stack; a token's products with the blocks of other adapters are set to zero. Adapters are dealt into
bins of equal width, so that this costs no more for many adapters than for a few.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "packed_rows"  # the name under which transformers finds attend_within_rows
WIDTH = 128  # ranks per bin; wider products of zero would cost more than another batched product
ALIGNED = 16  # ranks; tensor cores want the stacks' width in multiples of this
LOGITS = 2**28  # elements of a chunk of logits (1 GB in float32)


class NotPackable(Exception):
    """The model asks for something that the packed layers do not do; the text says what."""


@dataclass
class Batch:
    """The rows of a step as one sequence of tokens, on the model's device; a shape of its own or a bucket's.

    N tokens, of which each bin of adapters has N / bins; R rows of up to L tokens; P positions with a loss.
    """

    tokens: Tensor  # [1, N] int64
    positions: Tensor  # [1, N] int64, within the token's row
    adapter: Tensor  # [N] int64, the token's adapter; the number of adapters for padding
    to_rows: Tensor  # [R * L] int64, the token at each place of the padded rows
    to_tokens: Tensor  # [N] int64, each token's place in the padded rows
    predicting: Tensor  # [P] int64, the tokens whose next token is learned
    targets: Tensor  # [P] int64, those next tokens
    weights: Tensor  # [P] float32, what each loss counts; 0 for padding
    loss_of: Tensor  # [P] int64, the adapter of each loss
    row_length: int  # L
    # first token of each adapter's rows and the one after the last, where they are multiplied one after the other
    spans: list[tuple[int, int]] | None


class Bins:
    """How adapters are dealt into stacks.

    Args:
        ranks: of each adapter.
        loads: how many tokens each sees per step, about; bins get equal shares (default: all the same).
        width: ranks per bin, about.

    `count` bins of `width` ranks; adapter i has the rows `start[i]` to `start[i] + ranks[i]` of bin `bin_of[i]`.
    """

    def __init__(self, ranks: list[int], loads: list[float] | None = None, width: int = WIDTH):
        loads = loads or [1.0] * len(ranks)
        self.ranks, self.bin_of, self.start = ranks, [0] * len(ranks), [0] * len(ranks)
        self.count = -(-sum(ranks) // width)
        dealt, used = [0.0] * self.count, [0] * self.count
        for adapter in sorted(range(len(ranks)), key=lambda i: (-loads[i], -ranks[i])):
            number = min(range(self.count), key=lambda one: (dealt[one], used[one]))
            self.bin_of[adapter], self.start[adapter] = number, used[number]
            dealt[number] += loads[adapter]
            used[number] += ranks[adapter]
        self.count = sum(width > 0 for width in used)  # fewer where there are fewer adapters than bins
        self.width = -(-max(used) // ALIGNED) * ALIGNED

    def rows_of(self, adapter: int) -> tuple[int, slice]:
        """Where an adapter's factors stand in a stack: the bin, and the rows in it."""
        start = self.start[adapter]
        return self.bin_of[adapter], slice(start, start + self.ranks[adapter])


class Shared:
    """What all packed layers of a model see of the present step."""

    def __init__(self, bins: Bins, scaling: list[float], device: torch.device):
        self.bins, self.scaling = bins, scaling
        self.scales = torch.zeros(len(scaling) + 1, bins.width, device=device)  # float32: PEFT's is no less exact
        for adapter, scale in enumerate(scaling):
            self.scales[adapter, bins.rows_of(adapter)[1]] = scale
        self.mask: Tensor | None = None
        self.batch: Batch | None = None

    def enter(self, batch: Batch) -> None:
        """Take a step's rows: each token gets its adapter's scaling at that one's ranks, and 0 at all others."""
        self.batch = batch
        if batch.spans is None:  # else they are multiplied one after the other
            self.mask = self.scales.index_select(0, batch.adapter).view(self.bins.count, -1, self.bins.width)

    def slices(self) -> list[tuple[slice, int, slice, float]]:
        """Of each adapter that has rows in this step: its tokens, its bin, its rows in a stack, its scaling."""
        return [
            (slice(*span), *self.bins.rows_of(adapter), self.scaling[adapter])
            for adapter, span in enumerate(self.batch.spans)
            if span[0] < span[1]
        ]


class _StackedLora(torch.autograd.Function):
    """base(x) + B A x for the adapter of each token; the base gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        bins = a.shape[0]
        down = torch.bmm(x.view(bins, -1, x.shape[-1]), a.transpose(1, 2)).mul_(mask)
        _add_bmm(y, down, b)
        ctx.save_for_backward(x, weight, a, b, mask, down)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, mask, down = ctx.saved_tensors
        dy = dy.contiguous()
        by_bin = dy.view(a.shape[0], -1, dy.shape[-1])
        db = torch.bmm(down.transpose(1, 2), by_bin)
        ddown = torch.bmm(by_bin, b.transpose(1, 2)).mul_(mask)
        da = torch.bmm(ddown.transpose(1, 2), x.view(a.shape[0], -1, x.shape[-1]))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            _add_bmm(dx, ddown, a)
        return dx, None, None, da, db, None


class _SlicedLora(torch.autograd.Function):
    """The same as _StackedLora, adapter by adapter: no products of zero, which is what counts on a CPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, shared: Shared
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        downs, slices = [], shared.slices()
        for here, number, rows, scale in slices:
            downs.append((x[0, here] @ a[number, rows].t()).mul_(scale))
            y[0, here].addmm_(downs[-1], b[number, rows])
        ctx.slices = slices
        ctx.save_for_backward(x, weight, a, b, *downs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, *downs = ctx.saved_tensors
        dy = dy.contiguous()
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        for (here, number, rows, scale), down in zip(ctx.slices, downs, strict=True):
            db[number, rows] = down.t() @ dy[0, here]
            ddown = (dy[0, here] @ b[number, rows].t()).mul_(scale)
            da[number, rows] = ddown.t() @ x[0, here]
            if dx is not None:
                dx[0, here].addmm_(ddown, a[number, rows])
        return dx, None, None, da, db, None


def _add_bmm(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right per bin, in place; total is [..., columns] and contiguous."""
    view = total.view(left.shape[0], -1, total.shape[-1])
    if len(view) == 1:
        view[0].addmm_(left[0], right[0])
    else:
        view.baddbmm_(left, right)


class PackedLinear(nn.Module):
    """A frozen linear layer with the LoRA factors of all adapters.

    Args:
        base: the layer; its weight is [out, in].
        shared: the model's.
        dtype: of the factors and their products.

    `a` is [bins, width, in], `b` [bins, width, out]: the transposed second factors, so that adapter i has the same
    rows of both.
    """

    def __init__(self, base: nn.Linear, shared: Shared, dtype: torch.dtype):
        super().__init__()
        self.base, self.shared = base, shared
        shape = shared.bins.count, shared.bins.width
        device = base.weight.device
        self.a = nn.Parameter(torch.zeros(*shape, base.in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(*shape, base.out_features, device=device, dtype=dtype))
        self.weight = base.weight.to(dtype)  # as autocast casts it at each call
        self.bias = None if base.bias is None else base.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, N, in]; returns [1, N, out] in the factors' dtype."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.a.dtype).contiguous()
            if self.shared.batch.spans is not None:
                return _SlicedLora.apply(x, self.weight, self.bias, self.a, self.b, self.shared)
            return _StackedLora.apply(x, self.weight, self.bias, self.a, self.b, self.shared.mask)

    def block(self, factor: Tensor, adapter: int) -> Tensor:
        """An adapter's rows of `a`, of `b` or of their gradients: [rank, columns]."""
        number, rows = self.shared.bins.rows_of(adapter)
        return factor[number, rows]


class _Rearranged(torch.autograd.Function):
    """Rows of a matrix by number; the gradient comes back by the inverse numbers, without adding up.

    Only right where each row of the input that matters stands once in the output, and what stands more often, padding,
    has no gradient.
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
    """transformers' attention function for packed rows: causal, each row by itself.

    Args:
        module: the attention layer; its `shared` was set by `attach`.
        query, key, value: [1, heads, N, head size]; fewer key and value heads are shared by groups of query heads.
        sliding_window: how many tokens a token sees, itself included; None: all before it.

    Returns ([1, N, heads, head size], None). Padding comes after a row's tokens, where causal attention does not look,
    so no mask is needed unless the window is shorter than the rows. Raises NotPackable for what stock attention would
    do otherwise.
    """
    asked = {name: one for name, one in others.items() if one is not None and name in KNOWN_ATTENTION}
    if attention_mask is not None or dropout or asked:
        raise NotPackable(f"its attention uses {', '.join(asked) or ('dropout' if dropout else 'a mask of its own')}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotPackable("its attention is not causal")
    batch = module.shared.batch
    length = batch.row_length
    rows = [_as_rows(heads, batch) for heads in (query, key, value)]
    window = None
    if sliding_window is not None and sliding_window < length:
        place = torch.arange(length, device=query.device)
        window = (place[:, None] >= place) & (place[:, None] - place < sliding_window)
        groups = query.shape[1] // key.shape[1]  # with a mask, only kernels that want equal numbers of heads are fast
        rows[1:] = [heads.repeat_interleave(groups, dim=1) for heads in rows[1:]]
    out = F.scaled_dot_product_attention(
        *rows,
        attn_mask=window,
        is_causal=window is None,
        scale=scaling,
        enable_gqa=rows[0].shape[1] != rows[1].shape[1],
    )
    out = out.transpose(1, 2).reshape(-1, out.shape[1] * out.shape[3])
    tokens = _Rearranged.apply(out, batch.to_tokens, batch.to_rows)
    return tokens.view(1, -1, query.shape[1], query.shape[3]), None


# Arguments with which transformers' attention functions compute something else.
KNOWN_ATTENTION = ("softcap", "s_aux", "position_bias", "head_mask", "alibi")
AttentionInterface.register(ATTENTION, attend_within_rows)


def _as_rows(heads: Tensor, batch: Batch) -> Tensor:
    """[1, heads, N, size] as padded rows [R, heads, L, size]."""
    count, size = heads.shape[1], heads.shape[3]
    tokens = heads.transpose(1, 2).reshape(-1, count * size)
    rows = _Rearranged.apply(tokens, batch.to_rows, batch.to_tokens)
    return rows.view(-1, batch.row_length, count, size).transpose(1, 2)


class _NextTokenLoss(torch.autograd.Function):
    """Cross-entropy at some positions, the logits in chunks; the gradient is made on the way, as the head is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        rows = max(1, LOGITS // head.weight.shape[0])
        losses, gradients = [], []
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            with torch.enable_grad():
                some = some.detach().requires_grad_()
                loss = F.cross_entropy(head(some).float(), wanted, reduction="none")
                gradients.append(torch.autograd.grad(loss.sum(), some)[0])
            losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * weights[:, None].to(gradient.dtype), None, None


def attach(model: nn.Module, names: Iterable[str], shared: Shared, dtype: torch.dtype) -> dict[str, PackedLinear]:
    """Put packed layers in the place of a model's linear ones, by name, and let its attention see the rows.

    Raises NotPackable where a layer is no plain linear one or the model's attention cannot be replaced.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise NotPackable(f"the attention of {type(model).__name__} cannot be replaced")
    packed: dict[str, PackedLinear] = {}
    try:
        for name in names:
            base = model.get_submodule(name)
            if type(base) is not nn.Linear:
                raise NotPackable(f"{name} is a {type(base).__name__}, not a linear layer")
            packed[name] = PackedLinear(base, shared, dtype)
            _put(model, name, packed[name])
    except BaseException:
        detach(model, packed)
        raise
    for module in model.modules():
        module.shared = shared
    model.set_attn_implementation(ATTENTION)
    return packed


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def detach(model: nn.Module, packed: dict[str, PackedLinear]) -> None:
    """Put the plain layers back."""
    for name, layer in packed.items():
        _put(model, name, layer.base)
    for module in model.modules():
        vars(module).pop("shared", None)


def losses(model: nn.Module, batch: Batch, shared: Shared) -> Tensor:
    """The cross-entropy of each learned token, float32 [P]; differentiable by the packed factors.

    Args:
        model: a transformers causal language model with packed layers.
    """
    shared.enter(batch)
    out = model.base_model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False)
    hidden = out.last_hidden_state[0].index_select(0, batch.predicting)
    return _NextTokenLoss.apply(hidden, model.get_output_embeddings(), batch.targets)
