"""The initial adapters of runs: as PEFT's layers have them, or drawn as PEFT draws them, without its layers."""

import copy
import math
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from paragen.collection import lora_config
from paragen.packed.layers import NotPackable


class InitialAdapter(NamedTuple):
    """A new adapter as PEFT initialises it."""

    config: LoraConfig
    factors: dict[str, tuple[Tensor, Tensor]]  # lora_A [rank, in] and lora_B [out, rank] by layer; float32, on the CPU
    scaling: float

    def equals(self, other: "InitialAdapter") -> bool:
        """Whether both have the same layers in the same order, the same bits and the same scaling."""
        pairs = zip(self.factors.values(), other.factors.values(), strict=False)
        same = all(torch.equal(mine, theirs) for pair in pairs for mine, theirs in zip(*pair, strict=True))
        return same and list(self.factors) == list(other.factors) and self.scaling == other.scaling


def initial_adapter_of(adapted: PeftModel) -> InitialAdapter:
    """The adapter of a PEFT model, copied to the CPU. Raises NotPackable where its layers have different scalings."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    scaling: set[float] = set()
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            pair = (cast(nn.Linear, half["default"]) for half in (module.lora_A, module.lora_B))
            a, b = (linear.weight.detach().to("cpu", torch.float32, copy=True) for linear in pair)
            factors[name] = a, b
            scaling.add(module.scaling["default"])
    if len(scaling) != 1:
        raise NotPackable("its layers are scaled differently")
    return InitialAdapter(cast(LoraConfig, adapted.peft_config["default"]), factors, scaling.pop())


def drawn(
    model: PreTrainedModel, like: InitialAdapter, finetuning_args: Any, seed: int, is_resumed: bool = False
) -> InitialAdapter:
    """The adapter that PEFT would initialise after `set_seed(seed)`, for the layers of another one.

    Args:
        model: the base model without an adapter.
        like: an adapter of the same layers, as PEFT made it.
        finetuning_args: LLaMA-Factory's, for rank, alpha, dropout and use_rslora.
        seed: the run's.
        is_resumed: omit the factors, which a checkpoint has.
    """
    config = copy.deepcopy(like.config)
    for key in ("lora_alpha", "lora_dropout", "use_rslora"):
        setattr(config, key, getattr(finetuning_args, key))
    config.r = finetuning_args.lora_rank
    scaling = lora_config.scaling_of(config.to_dict(), next(iter(like.factors)))
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    for layer in () if is_resumed else like.factors:
        base = cast(nn.Linear, model.get_submodule(layer))
        a, b = torch.empty(config.r, base.in_features), torch.empty(base.out_features, config.r)
        for factor in (a, b, a):  # PEFT makes two linear layers, and then initialises the first one again
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
        factors[layer] = a.to(base.weight.dtype).float(), b.zero_()  # PEFT's layers begin with the dtype of the base
    return InitialAdapter(config, factors, scaling)
