"""The second stage's loss: the base model's own, on a task's rows, with the factors that the generator gives.

It is the loss of the responses' tokens that training and scoring have, through the layers with which scoring applies
several adapters at once. Gradients reach the factors; the base model stays frozen.
"""

from collections.abc import Sequence

import torch
from numpy.random import Generator as Draws
from torch import Tensor

from paragen.collection import checkpoints, lora_config, prompts
from paragen.collection.index import Chosen
from paragen.common.cli import UserError
from paragen.generator.conditions import LONGEST, Reader, padded
from paragen.generator.factor_layout import FactorLayout
from paragen.scoring import factors
from paragen.scoring.decoding import logits_only_at
from paragen.scoring.factors import Factors
from paragen.scoring.questions import Question
from paragen.scoring.stacked_model import StackedModel

TASKS, ROWS = 4, 8  # of a step: so many adapters, each on so many rows
MOST_ROWS = 400  # of a task that are tokenised


class BaseLoss:
    """The base model's loss on the rows of tasks.

    Args:
        chosen: the collections, a task each.
        reader: reads their rows; its model is changed in place until `close`.
        layout: of the vectors.

    Raises UserError for a kind of LoRA that is not applied here, and for a task whose rows are all too long.
    """

    def __init__(self, chosen: Sequence[Chosen], reader: Reader, layout: FactorLayout):
        self.reader, self.layout = reader, layout
        config = checkpoints.adapter_config(chosen[0].folder, chosen[0].manifest)
        factors.check_plain_lora(config)
        self.layers = checkpoints.layers_of(layout.shapes)
        self.scaling = lora_config.scaling_of(config, self.layers[0])
        self.rows = [self._rows_of(one) for one in chosen]
        self.stacked = StackedModel(reader.model, self.layers, fused=False)
        for parameter in reader.model.parameters():
            parameter.requires_grad_(False)

    def _rows_of(self, one: Chosen) -> list[Question]:
        """Some rows of a task, those that are not too long."""
        parts = [(entry, rows[:MOST_ROWS]) for entry, rows in prompts.parts(one.manifest)]
        found = self.reader.questions(parts)
        fitting = [row for row in found if len(row.tokens) + len(row.continuations[0].tokens) <= LONGEST]
        if not fitting:
            raise UserError(f"{one.name}: has no row of at most {LONGEST} tokens for the second stage; omit it")
        return fitting

    def draw(self, task: int, draws: Draws) -> list[Question]:
        """ROWS rows of a task."""
        rows = self.rows[task]
        return [rows[number] for number in draws.integers(len(rows), size=ROWS)]

    def loss(self, vectors: Tensor, rows: Sequence[Question]) -> Tensor:
        """The mean loss per token of the responses.

        Args:
            vectors: [adapters, size], factors as collected or in canonical form.
            rows: equally many for each adapter, in their order.
        """
        model = self.stacked.model
        tokens, mask = padded([row.tokens + row.continuations[0].tokens for row in rows], model.device)
        length = tokens.shape[1]
        ends = [(len(row.tokens), len(row.tokens) + len(row.continuations[0].tokens)) for row in rows]
        flat = [number * length + at - 1 for number, (start, end) in enumerate(ends) for at in range(start, end)]
        places = torch.tensor(flat, device=model.device)
        with self.stacked.using(self.factors_of(vectors)), logits_only_at(model, places):
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0]
        return torch.nn.functional.cross_entropy(logits.float(), tokens.flatten()[places + 1])

    def factors_of(self, vectors: Tensor) -> Factors:
        """The factors of some adapters as the layers take them, with gradients."""
        dtype, both = self.reader.base.dtype, Factors({}, {})
        for kind, part in zip(self.layout.kinds, self.layout.split(vectors), strict=True):
            for key, values in zip(kind.keys, part.unbind(1), strict=True):
                layer, half, _ = key.removeprefix(checkpoints.PEFT_PREFIX).rsplit(".", 2)
                value = values.unflatten(1, kind.shape).transpose(1, 2)
                if half == "lora_A":
                    both.a[layer] = value.to(dtype)
                else:
                    both.b[layer] = (value * self.scaling).to(dtype)
        return both

    def close(self) -> None:
        """Give the base model its own layers back."""
        self.stacked.close()
