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
from transformers.activations import SiLUActivation

from paragen.collection.checkpoints import PEFT_PREFIX
from paragen.common.cli import UserError
from paragen.scoring import attention

MOST = 64  # of ranks that the kernel has room for
FEW = 64 * 128  # rows; of fewer, the kernel has not enough parts for a GPU's multiprocessors
READERS = "q_proj", "k_proj", "v_proj"  # as most models name the layers that read one input
SILU = (nn.SiLU, SiLUActivation)


class Factors(NamedTuple):
    """The factors of n adapters by layer, on the device and in the dtype that its layers compute in."""

    a: dict[str, Tensor]  # n x inputs x rank
    b: dict[str, Tensor]  # n x rank x outputs, scaled

    @property
    def count(self) -> int:
        """How many adapters."""
        return len(next(iter(self.a.values())))

    @property
    def bytes(self) -> int:
        """How much memory they take."""
        return sum(one.nbytes for half in self for one in half.values())

    def of(self, adapters: list[int]) -> "Factors":
        """Those of some of the adapters, by number."""
        if adapters == [*range(self.count)]:
            return self
        which = torch.tensor(adapters, device=next(iter(self.a.values())).device)
        return Factors(*({name: one.index_select(0, which) for name, one in half.items()} for half in self))


def joined(groups: list[Factors]) -> Factors:
    """The adapters of several groups as one."""
    if len(groups) == 1:
        return groups[0]
    halves = zip(*groups, strict=True)
    return Factors(*({name: torch.cat([one[name] for one in half]) for name in half[0]} for half in halves))


def scaling_of(config: dict[str, Any]) -> float:
    """What an adapter_config.json multiplies B·A by. Raises UserError for a kind of LoRA that is not done here."""
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"):
        if config.get(key) not in (None, False, "none", {}, []):
            raise UserError(f"adapter_config.json: {key} is {config[key]!r}; only plain LoRA is scored here")
    return config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))


def stack(
    adapters: list[dict[str, Tensor] | None], layers: list[str], scaling: float, device: torch.device,
    dtype: torch.dtype,
) -> Factors:  # fmt: skip
    """The factors of some checkpoints (tensors by PEFT's key; None: the base itself, an adapter that is zero).

    They go to the device in one piece and are put in order there; the host does not wait for it.

    Args:
        layers: the adapted layers, as checkpoints.layers_of names them.
        scaling: as `scaling_of` gives it; in float32 it is exact for powers of two alone, as in PEFT.
        device, dtype: of the result.
    """
    some = next(adapter for adapter in adapters if adapter is not None)
    keys = [f"{layer}.{half}.weight" for layer in layers for half in ("lora_A", "lora_B")]
    sizes = [some[key].numel() for key in keys]
    shape, is_pinned = (len(adapters), sum(sizes)), device.type == "cuda"
    flat = torch.zeros(shape, dtype=some[keys[0]].dtype, device="cpu", pin_memory=is_pinned)
    for row, adapter in zip(flat, adapters, strict=True):
        if adapter is not None:
            torch.cat([adapter[key].flatten() for key in keys], out=row)
    flat = flat.to(device, non_blocking=True).to(dtype)
    parts = zip(keys, flat.split(sizes, 1), strict=True)
    # turned for good: a CPU multiplies turned matrices more slowly
    turned = [part.view(len(flat), *some[key].shape).transpose(1, 2).contiguous() for key, part in parts]
    names = [layer.removeprefix(PEFT_PREFIX) for layer in layers]
    return Factors(
        dict(zip(names, turned[::2], strict=True)),
        dict(zip(names, [one.mul_(scaling) for one in turned[1::2]], strict=True)),
    )


class Siblings:
    """Layers that read the same input: the product with their first factors is made once for all.

    Args:
        layers: StackedLinear with inputs of one width.
    """

    def __init__(self, layers: "list[StackedLinear]"):
        self.layers, self.left = layers, 0
        self.a: Tensor | None = None  # theirs side by side
        self.x = self.hidden = None
        for layer in layers:
            layer.siblings = self

    def begin(self) -> None:
        """Take the layers' present factors."""
        self.a = torch.cat([layer.a for layer in self.layers], 2)
        self.ranks = [layer.a.shape[2] for layer in self.layers]

    def end(self) -> None:
        """Let them go."""
        self.a = self.x = self.hidden = None

    def of(self, layer: "StackedLinear", x: Tensor) -> Tensor:
        """A layer's part of `times`; an input is kept until all layers have read it."""
        if self.x is not x:
            self.x, self.hidden, self.left = x, times(x, self.a), len(self.layers)
        part = self.hidden.split(self.ranks, 2)[self.layers.index(layer)]
        self.left -= 1
        if self.left == 0:
            self.x = self.hidden = None
        return part


def times(x: Tensor, a: Tensor) -> Tensor:
    """An input [n * rows, ..., inputs] times n first factors, [n, rows, rank]."""
    return torch.bmm(x.reshape(len(a), -1, x.shape[-1]).to(a.dtype), a)


class StackedLinear(nn.Module):
    """A layer of the base with the factors of the present adapters, whose rows follow one another in its input."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.is_plain = type(base) is nn.Linear
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.siblings: Siblings | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(n * rows, ..., inputs) to (n * rows, ..., outputs)."""
        if self.a is None:
            return self.base(x)
        hidden = times(x, self.a) if self.siblings is None else self.siblings.of(self, x)
        if not self.is_plain:
            y = self.base(x)
            return (y + torch.bmm(hidden, self.b).view(y.shape)).to(y.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if self.base.bias is not None:
            y = self.base(rows)  # adds it while it is written
            return y.view(len(self.a), -1, y.shape[-1]).baddbmm_(hidden, self.b).view(*x.shape[:-1], -1)
        # the adapters' part first: the large product takes it up while it is written, so it is read and written once
        y = torch.bmm(hidden, self.b).view(len(rows), -1)
        return y.addmm_(rows, self.base.weight.t()).view(*x.shape[:-1], -1)


class StackedGated(nn.Module):
    """A block of gate, up and down whose activation takes up the factors (scoring_kernels.py).

    Args:
        block: its three layers are StackedLinear of plain layers without biases.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.inputs = Siblings([block.gate_proj, block.up_proj])

    def forward(self, x: Tensor) -> Tensor:
        """(n * rows, ..., inputs) to (n * rows, ..., outputs)."""
        gate, up, down = self.block.gate_proj, self.block.up_proj, self.block.down_proj
        rows = x.reshape(-1, x.shape[-1])
        if down.a is None or not pays(rows, *down.a.shape[1:]):
            return self.block(x)
        inner = gate.base(rows)
        hidden = gated(inner, up.base(rows), times(x, self.inputs.a), gate.b, up.b, down.a)
        y = torch.bmm(hidden, down.b).view(len(rows), -1)
        return y.addmm_(inner, down.base.weight.t()).view(*x.shape[:-1], -1)


def pays(rows: Tensor, inner: int, rank: int) -> bool:
    """Whether `gated` can do an input [rows, width], and faster than PyTorch's operations."""
    if not rows.is_cuda:
        return True
    from paragen.scoring import kernels

    return kernels.can_gate(inner) and rows.dtype.itemsize == 2 and rank <= MOST and len(rows) >= FEW


def gated(gate: Tensor, up: Tensor, hidden: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor) -> Tensor:
    """What scoring_kernels.gated does, by that kernel on an NVIDIA GPU."""
    if gate.device.type == "cuda":
        from paragen.scoring import kernels

        return kernels.gated(gate, up, hidden, b_gate, b_up, a_down)
    of_gate, of_up = hidden.chunk(2, 2)
    parts = torch.baddbmm(gate.view(len(b_gate), -1, gate.shape[-1]), of_gate, b_gate), torch.bmm(of_up, b_up)
    made = nn.functional.silu(parts[0]) * (parts[1] + up.view_as(parts[1]))
    gate.copy_(made.view_as(gate))
    return torch.bmm(made, a_down)


def is_gated(block: nn.Module) -> bool:
    """Whether a block is silu(gate) * up, then down, all of them adapted and without biases, and does no more."""
    parts = dict(block.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"} or type(parts.pop("act_fn")) not in SILU:
        return False
    if not all(isinstance(part, StackedLinear) and part.is_plain and part.base.bias is None for part in parts.values()):
        return False
    gate, up, down = (parts[name].base for name in ("gate_proj", "up_proj", "down_proj"))
    with torch.inference_mode():
        x = torch.linspace(-3, 3, gate.in_features, device=gate.weight.device, dtype=gate.weight.dtype)
        found, plain = block(x[None]), down(nn.functional.silu(gate(x[None])) * up(x[None]))
        return bool((found - plain).norm() <= 0.02 * plain.norm())


def readers_in(block: nn.Module) -> list[StackedLinear]:
    """The adapted plain layers among READERS, if their inputs have one width."""
    readers = [getattr(block, child, None) for child in READERS]
    readers = [layer for layer in readers if isinstance(layer, StackedLinear) and layer.is_plain]
    return readers if len({layer.base.in_features for layer in readers}) == 1 else []


class Stacked:
    """A base model whose adapted layers take factors; `close` puts its own layers back.

    Args:
        model: the base; it is changed in place.
        layers: the adapted layers, as checkpoints.layers_of names them.
        fused: whether gated activations take up their factors, layers with the same input share a product, and rows
            their masks; by default on an NVIDIA GPU.
    """

    def __init__(self, model: nn.Module, layers: list[str], fused: bool | None = None):
        self.model, self.layers, self.gated, self.siblings = model, {}, {}, []
        for name in (layer.removeprefix(PEFT_PREFIX) for layer in layers):
            try:
                layer = model.get_submodule(name)
            except AttributeError:
                raise UserError(f"{name}: is adapted, but the base model has no such layer") from None
            self.layers[name] = StackedLinear(layer)
            self._put(name, self.layers[name])
        if model.device.type == "cuda" if fused is None else fused:
            for name in dict.fromkeys(name.rpartition(".")[0] for name in self.layers):
                block = model.get_submodule(name)
                if is_gated(block):
                    self.gated[name] = StackedGated(block)
                    self._put(name, self.gated[name])
                    self.siblings.append(self.gated[name].inputs)
                elif len(readers := readers_in(block)) > 1:
                    self.siblings.append(Siblings(readers))
            attention.share(model)

    @contextmanager
    def using(self, factors: Factors) -> Iterator[None]:
        """While the body runs, a batch belongs to these adapters, in equal parts one behind the other."""
        for name, layer in self.layers.items():
            layer.a, layer.b = factors.a[name], factors.b[name]
        for siblings in self.siblings:
            siblings.begin()
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.a = layer.b = None
            for siblings in self.siblings:
                siblings.end()

    def close(self) -> None:
        """Give the model its own layers back."""
        attention.unshare(self.model)
        for name, block in self.gated.items():
            self._put(name, block.block)
        for name, layer in self.layers.items():
            self._put(name, layer.base)

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, layer)
