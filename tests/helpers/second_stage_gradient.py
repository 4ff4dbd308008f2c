"""Prints, as JSON, how far the second stage's loss and gradient are from PEFT's: for tests that fork it in a project.

Setting: GENERATOR.
"""

import json
import os
from collections.abc import Callable
from typing import Any

STEP = 1  # the compared one


def main() -> None:
    import torch
    from peft import PeftModel, set_peft_model_state_dict

    from paragen.collection import adapter_config, checkpoints, index
    from paragen.common import paths
    from paragen.generator import saved, second_stage
    from paragen.packed.batches import IGNORED

    generator = saved.load(paths.SAVES / "generators" / os.environ["GENERATOR"])
    chosen = index.chosen()[0]
    attention = generator.reader.model.config._attn_implementation
    refused = refusal(lambda: second_stage.BaseLoss(chosen, generator.reader, generator.layout, 1, 0), generator)
    base = second_stage.BaseLoss(chosen, generator.reader, generator.layout, STEP + 1, 0)
    torch.manual_seed(0)
    vectors = (0.1 * torch.randn(second_stage.TASKS, generator.layout.size)).requires_grad_()
    loss = base.loss(vectors, STEP)
    (3 * loss).backward()  # a factor, as a larger loss would have it
    base.close()
    model = generator.reader.model
    assert model.config._attn_implementation == attention
    config = adapter_config.parse(checkpoints.adapter_config_bytes(chosen[0].folder, chosen[0].manifest), "")
    adapted = PeftModel(model, adapter_config.lora_config(config))
    losses, off = [], 0.0
    for vector, gradient, rows in zip(vectors.detach(), vectors.grad, base.steps[STEP].rows, strict=True):
        set_peft_model_state_dict(adapted, generator.layout.tensors_of(vector))
        adapted.requires_grad_(False)
        factors = {name: one for name, one in adapted.named_parameters() if "lora_" in name}
        for one in factors.values():
            one.requires_grad_()
        total, count = torch.zeros(()), 0
        for row in rows:
            logits = adapted(input_ids=torch.from_numpy(row.tokens)[None]).logits[0, :-1]
            labels = torch.from_numpy(row.labels)[1:]
            total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            count += int((labels != IGNORED).sum())
        mean = total / count
        losses.append(mean.item())
        expected = dict(zip(factors, torch.autograd.grad(mean, [*factors.values()]), strict=True))
        found = generator.layout.tensors_of(gradient * second_stage.TASKS / 3)
        for key, value in found.items():
            known = expected[key.replace(".weight", ".default.weight")]
            off = max(off, ((value - known).norm() / known.norm().clamp(min=1e-9)).item())
    print(
        "off: "
        + json.dumps({"loss": abs(loss.item() - sum(losses) / len(losses)), "gradient": off, "refused": refused})
    )


def refusal(make: Callable[[], object], generator: Any) -> str:
    """How a base model is refused that changes its logits; it has its own layers and attention afterwards."""
    from paragen.common.cli import UserError

    model = generator.reader.model
    before = model.config._attn_implementation, [type(one) for one in model.modules()]
    model.config.logits_scaling = 8.0
    try:
        make()
    except UserError as error:
        assert before == (model.config._attn_implementation, [type(one) for one in model.modules()])
        return str(error)
    finally:
        del model.config.logits_scaling
    raise AssertionError("it is not refused")
