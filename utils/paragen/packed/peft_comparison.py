"""Whether the packed layers can train a model, and compute for it what PEFT's own layers compute."""

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from paragen.packed.adapter import Adapter
from paragen.packed.batches import IGNORED, Row, Step
from paragen.packed.engine import Engine
from paragen.packed.layers import NotPackable
from paragen.packed.model import positions_depend_on_batch
from paragen.training import deterministic

MAX_TOKENS = 1024  # of a compared row; PEFT's forward pass computes the logits of all tokens
# Settings of models that change their logits after the output layer.
LOGITS_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 0.1)}  # relative, of the loss and of the gradient


def check_packable(adapted: PeftModel, dtype: torch.dtype) -> None:
    """Raise NotPackable where a model needs something that the packed layers do not do.

    Args:
        adapted: the model with PEFT's adapter.
        dtype: what the run computes in.
    """
    model = adapted.base_model.model
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear:
                raise NotPackable(f"{name} is not a linear layer with plain LoRA")
            if dtype is torch.float32 and module.base_layer.weight.dtype is not torch.float32:
                raise NotPackable(f"{name} computes in {module.base_layer.weight.dtype}, its adapter in float32")
    check_model(model)
    if any(isinstance(module, LoraLayer) for module in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise NotPackable("its embeddings or its output layer are adapted")
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    if any(".lora_A.default." not in name and ".lora_B.default." not in name for name in trained):
        raise NotPackable("more than LoRA's factors are trained")


def check_model(model: PreTrainedModel) -> None:
    """Raise NotPackable where a base model, with or without an adapter, computes what the packed layers do not."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and ".lora_dropout." not in f".{name}.":
            raise NotPackable(f"the model has dropout ({name})")
    config = model.config.to_dict()
    if changed := [key for key in LOGITS_SETTINGS if config.get(key) not in (None, 1, 1.0)]:
        raise NotPackable(f"the model changes its logits ({changed[0]})")
    if positions_depend_on_batch(model):
        raise NotPackable("its rotary positions depend on the longest row of a batch")
    if dropouts := [key for key, value in config.items() if key.endswith("dropout") and value]:
        raise NotPackable(f"the model has dropout ({dropouts[0]})")


def rows_to_compare(rows: list[Row]) -> list[Row]:
    """Two of the training rows: the one of median length and the longest, of those with at most MAX_TOKENS tokens."""
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    short = [row for row in by_length if len(row.tokens) <= MAX_TOKENS] or by_length[:1]
    return [short[len(short) // 2], short[-1]]


def probe_factors(like: Tensor) -> Tensor:
    """Second factors for the comparison, small and not zero as PEFT's initial ones are; the same on every device."""
    return (0.01 * torch.sin(torch.arange(like.numel(), dtype=torch.float32))).view(like.shape).to(like.device)


def peft_gradient(adapted: PeftModel, rows: list[Row], dtype: torch.dtype) -> tuple[float, Tensor]:
    """The loss of some rows and its gradient from PEFT's own forward pass, with `probe_factors` as second factors.

    Args:
        adapted: the model with PEFT's initial adapter, which is left as it was but for its dropout, which is off now.
        rows: the compared rows.
        dtype: float32, or bfloat16 for autocast to it.

    Returns (loss, gradient): the gradient is a float32 vector on the CPU, A and then B of each layer.
    """
    device = adapted.device
    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    labels, mask = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        here = slice(0, len(row.tokens))
        tokens[number, here], labels[number, here] = torch.from_numpy(row.tokens), torch.from_numpy(row.labels)
        mask[number, here] = 1
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.eval()
    trained = [parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    for parameter in trained[1::2]:
        parameter.data.copy_(probe_factors(parameter))
    with torch.autocast(device.type, torch.bfloat16, dtype is torch.bfloat16):
        loss = adapted(
            input_ids=tokens.to(device), attention_mask=mask.to(device), labels=labels.to(device),
            num_items_in_batch=(labels != IGNORED).sum().to(device),
        ).loss  # fmt: skip
    gradients = torch.autograd.grad(loss, trained)
    for parameter in trained[1::2]:
        parameter.data.zero_()
    return loss.item(), torch.cat([gradient.flatten().float().cpu() for gradient in gradients])


def check_against_peft(
    model: PreTrainedModel, factors: dict[str, tuple[Tensor, Tensor]], scaling: float, rows: list[Row],
    expected: tuple[float, Tensor], dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise NotPackable unless the packed layers have PEFT's loss and gradient without dropout, within TOLERANCE.

    Args:
        model: the base model without an adapter.
        factors, scaling: PEFT's initial adapter (lora_A and lora_B by layer).
        rows: the compared rows.
        expected: what `peft_gradient` returned for them.
        dtype: float32, or bfloat16 for autocast to it.
    """
    probes = {layer: (a, probe_factors(b).cpu()) for layer, (a, b) in factors.items()}
    adapter = Adapter(probes, scaling, [0.0], {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}, 0.0)
    engine = Engine(model, [adapter], dtype)
    try:
        loss, gradient = engine.gradient_of(Step([rows]))
    except (RuntimeError, TypeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise NotPackable(f"the packed layers cannot run this model: {deterministic.one_line(error)}") from error
    finally:
        engine.close()
    ordered = []
    for part in adapter.parts:
        ordered += [gradient[part.a], gradient[part.b].view(adapter.rank, -1).t().reshape(-1)]
    loss_error = abs(loss - expected[0]) / abs(expected[0])
    gradient_error = ((torch.cat(ordered) - expected[1]).norm() / expected[1].norm()).item()
    most_loss_error, most_gradient_error = TOLERANCE[dtype]
    if not (loss_error <= most_loss_error and gradient_error <= most_gradient_error):
        raise NotPackable(
            f"the packed layers differ from PEFT's for this model (loss {loss_error:.1e}, "
            f"gradient {gradient_error:.1e})"
        )
