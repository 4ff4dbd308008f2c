"""A base model that applies the LoRA factors of several adapters at once: each has its share of the rows of a batch.

The packed engine trains adapters of any ranks on rows of their own. Here all adapters have the same rank and get the
same rows, so that a layer's input divides into equal parts and two batched products apply the factors, without a mask.
The base's weights are not merged with them: in bfloat16, merging would round away the differences between neighbouring
checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from paragen.collection.checkpoints import PEFT_PREFIX
from paragen.common.cli import UserError
from paragen.packed.model import replace_submodule
from paragen.scoring import attention
from paragen.scoring.factors import Factors

MAX_KERNEL_RANK = 64  # the kernel of gated blocks has no room for more
MIN_KERNEL_ROWS = 64 * 128  # with fewer, the kernel has not enough parts for a GPU's multiprocessors
ATTENTION_INPUTS = "q_proj", "k_proj", "v_proj"  # the names that most models give the layers with one common input
SILU = (nn.SiLU, SiLUActivation)


class SharedInputGroup:
    """Layers with the same input: one product applies the first factors of all of them.

    Args:
        layers: StackedLinear layers whose inputs have the same width.
    """

    def __init__(self, layers: "list[StackedLinear]"):
        self.layers, self.left = layers, 0  # left: how many layers have not yet read the current input
        self.a: Tensor | None = None  # the layers' first factors side by side, [n, in, sum of ranks]
        self.x: Tensor | None = None  # the current input
        self.hidden: Tensor | None = None  # its product with `a`
        for layer in layers:
            layer.input_group = self

    def set_factors(self) -> None:
        """Join the layers' current factors."""
        factors = [layer.a for layer in self.layers if layer.a is not None]  # all layers have them by now
        self.a = torch.cat(factors, 2)
        self.ranks = [factor.shape[2] for factor in factors]

    def remove_factors(self) -> None:
        """Release the factors and the current input."""
        self.a = self.x = self.hidden = None

    def apply_first(self, layer: "StackedLinear", x: Tensor) -> Tensor:
        """What `apply_first_factors` returns for one of the layers. An input is kept until all layers have read it."""
        if self.x is not x or self.hidden is None:
            assert self.a is not None  # a layer calls this only while it has factors
            self.x, self.hidden, self.left = x, apply_first_factors(x, self.a), len(self.layers)
        part = self.hidden.split(self.ranks, 2)[self.layers.index(layer)]
        self.left -= 1
        if self.left == 0:
            self.x = self.hidden = None
        return part


def apply_first_factors(x: Tensor, a: Tensor) -> Tensor:
    """An input [n * rows, ..., in] times n first factors [n, in, rank]: [n, rows, rank]."""
    return torch.bmm(x.reshape(len(a), -1, x.shape[-1]).to(a.dtype), a)


class StackedLinear(nn.Module):
    """A layer of the base model with the factors of n adapters, which have equal parts of its input, in order.

    Args:
        base: the layer; without factors it is applied alone.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base: Any = base  # an nn.Linear where `is_plain`
        self.is_plain = type(base) is nn.Linear
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.input_group: SharedInputGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [n * rows, ..., in]; returns [n * rows, ..., out]."""
        if self.a is None or self.b is None:
            return self.base(x)
        group = self.input_group
        hidden = apply_first_factors(x, self.a) if group is None else group.apply_first(self, x)
        if not self.is_plain:
            y = self.base(x)
            return (y + torch.bmm(hidden, self.b).view(y.shape)).to(y.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if self.base.bias is not None:
            y = self.base(rows)  # adds the bias while it writes its result
            return y.view(len(self.a), -1, y.shape[-1]).baddbmm_(hidden, self.b).view(*x.shape[:-1], -1)
        # the adapters' part first: the large product adds to it while it writes its result, in one pass over memory
        y = torch.bmm(hidden, self.b).view(len(rows), -1)
        return y.addmm_(rows, self.base.weight.t()).view(*x.shape[:-1], -1)


class GatedBlock(Protocol):
    """A block for which `is_gated_block`."""

    gate_proj: StackedLinear
    up_proj: StackedLinear
    down_proj: StackedLinear

    def __call__(self, x: Tensor) -> Tensor: ...


class StackedGated(nn.Module):
    """A block of gate, up and down projection whose activation applies the factors (see `gated`).

    Args:
        block: the block.
    """

    def __init__(self, block: GatedBlock):
        super().__init__()
        self.block = block
        self.inputs = SharedInputGroup([block.gate_proj, block.up_proj])

    def forward(self, x: Tensor) -> Tensor:
        """x: [n * rows, ..., in]; returns [n * rows, ..., out]."""
        gate, up, down = self.block.gate_proj, self.block.up_proj, self.block.down_proj
        rows = x.reshape(-1, x.shape[-1])
        if down.a is None or not is_gated_faster(rows, *down.a.shape[1:]):
            return self.block(x)
        assert self.inputs.a is not None and gate.b is not None  # as `down` has its factors,
        assert up.b is not None and down.b is not None  # all three have them
        inner = gate.base(rows)
        hidden = gated(inner, up.base(rows), apply_first_factors(x, self.inputs.a), gate.b, up.b, down.a)
        y = torch.bmm(hidden, down.b).view(len(rows), -1)
        return y.addmm_(inner, down.base.weight.t()).view(*x.shape[:-1], -1)


def is_gated_faster(rows: Tensor, inner: int, rank: int) -> bool:
    """Whether `gated` supports an input [rows, width], and is faster than the layers one by one."""
    if not rows.is_cuda:
        return True
    from paragen.scoring import kernels

    return (
        kernels.can_gate(inner)
        and rows.dtype.itemsize == 2
        and rank <= MAX_KERNEL_RANK
        and len(rows) >= MIN_KERNEL_ROWS
    )


def gated(gate: Tensor, up: Tensor, hidden: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor) -> Tensor:
    """What kernels.gated computes, by that kernel on an NVIDIA GPU; the arguments and the result are the same."""
    if gate.device.type == "cuda":
        from paragen.scoring import kernels

        return kernels.gated(gate, up, hidden, b_gate, b_up, a_down)
    of_gate, of_up = hidden.chunk(2, 2)
    parts = torch.baddbmm(gate.view(len(b_gate), -1, gate.shape[-1]), of_gate, b_gate), torch.bmm(of_up, b_up)
    made = nn.functional.silu(parts[0]) * (parts[1] + up.view_as(parts[1]))
    gate.copy_(made.view_as(gate))
    return torch.bmm(made, a_down)


def is_gated_block(block: nn.Module) -> bool:
    """Whether a block is down(silu(gate(x)) * up(x)) and nothing else, with all three layers adapted, without biases.

    A trial computation makes sure of it.
    """
    parts = dict(block.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"} or type(parts.pop("act_fn")) not in SILU:
        return False
    in_order = [parts[name] for name in ("gate_proj", "up_proj", "down_proj")]
    plain = [part for part in in_order if isinstance(part, StackedLinear) and part.is_plain and part.base.bias is None]
    if len(plain) < len(parts):
        return False
    gate, up, down = (part.base for part in plain)
    with torch.inference_mode():
        x = torch.linspace(-3, 3, gate.in_features, device=gate.weight.device, dtype=gate.weight.dtype)
        result, expected = block(x[None]), down(nn.functional.silu(gate(x[None])) * up(x[None]))
        return bool((result - expected).norm() <= 0.02 * expected.norm())


def attention_inputs_in(block: nn.Module) -> list[StackedLinear]:
    """The adapted plain layers among ATTENTION_INPUTS; none where the widths of their inputs differ."""
    children = [getattr(block, child, None) for child in ATTENTION_INPUTS]
    layers = [layer for layer in children if isinstance(layer, StackedLinear) and layer.is_plain]
    return layers if len({layer.base.in_features for layer in layers}) == 1 else []


class StackedModel:
    """A base model whose adapted layers apply the factors of several adapters; `close` restores its own layers.

    Args:
        model: the base; it is changed in place.
        layers: the adapted layers, as checkpoints.layers_of names them.
        fused: whether gated activations apply their factors, layers with the same input share a product, and rows
            share their masks; by default on an NVIDIA GPU alone.

    Raises UserError where the model lacks one of the layers.
    """

    def __init__(self, model: PreTrainedModel, layers: list[str], fused: bool | None = None):
        self.model = model
        self.layers: dict[str, StackedLinear] = {}
        self.gated: dict[str, StackedGated] = {}
        self.input_groups: list[SharedInputGroup] = []
        for name in (layer.removeprefix(PEFT_PREFIX) for layer in layers):
            try:
                layer = model.get_submodule(name)
            except AttributeError:
                raise UserError(f"{name}: is adapted, but the base model has no such layer") from None
            self.layers[name] = StackedLinear(layer)
            replace_submodule(model, name, self.layers[name])
        if model.device.type == "cuda" if fused is None else fused:
            self._fuse()

    def _fuse(self) -> None:
        """Replace gated blocks, group layers with the same input, and share masks and prefixes."""
        for name in dict.fromkeys(name.rpartition(".")[0] for name in self.layers):
            block = self.model.get_submodule(name)
            if is_gated_block(block):
                self.gated[name] = StackedGated(cast(GatedBlock, block))
                replace_submodule(self.model, name, self.gated[name])
                self.input_groups.append(self.gated[name].inputs)
            elif len(layers := attention_inputs_in(block)) > 1:
                self.input_groups.append(SharedInputGroup(layers))
        attention.enable_shared_attention(self.model)

    @contextmanager
    def using(self, factors: Factors) -> Iterator[None]:
        """While the body runs, these adapters have equal parts of each batch, in order."""
        for name, layer in self.layers.items():
            layer.a, layer.b = factors.a[name], factors.b[name]
        for group in self.input_groups:
            group.set_factors()
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.a = layer.b = None
            for group in self.input_groups:
                group.remove_factors()

    def close(self) -> None:
        """Give the model its own layers back."""
        attention.disable_shared_attention(self.model)
        for name, block in self.gated.items():
            replace_submodule(self.model, name, cast(nn.Module, block.block))
        for name, layer in self.layers.items():
            replace_submodule(self.model, name, layer.base)
