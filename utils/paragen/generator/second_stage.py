"""The second stage's loss: the base model's own, on the tasks' rows, with the factors that the generator gives.

It is the loss of the responses' tokens that training and scoring have. The packed engine computes it and its gradient
by the factors, for some tasks at once; on an NVIDIA GPU as CUDA graphs, because Python would take longer than the GPU.
The base model stays frozen.
"""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from paragen.collection import checkpoints, lora_config, prompts
from paragen.collection.index import Chosen
from paragen.common import devices
from paragen.common.cli import UserError
from paragen.generator.conditions import LONGEST, Reader
from paragen.generator.factor_layout import FactorLayout
from paragen.packed.adapter import Adapter
from paragen.packed.batches import IGNORED, Row, Step
from paragen.packed.engine import Engine
from paragen.packed.layers import NotPackable
from paragen.packed.peft_comparison import check_model
from paragen.scoring import factors
from paragen.scoring.questions import Question

TASKS, ROWS = 16, 8  # of a step: so many adapters, each on so many rows at most
TOKENS = 640  # of a task in a step, which has fewer rows where they are long: its time and memory grow with them
MOST_ROWS = 400  # of a task that are tokenised
NO_OPTIMIZER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}  # the engine's own; its rates are zero


class BaseLoss:
    """The base model's loss on the rows of tasks.

    Args:
        chosen: the collections, a task each.
        reader: reads their rows; its model is changed in place until `close`.
        layout: of the vectors.
        steps: how many steps there are.
        seed: of what they draw; a step's draw does not depend on the others.

    `tasks` has the numbers of TASKS tasks for each step. Raises UserError for a kind of LoRA or a base model that the
    packed engine does not compute, and for a task whose rows are all too long.
    """

    def __init__(self, chosen: Sequence[Chosen], reader: Reader, layout: FactorLayout, steps: int, seed: int):
        self.reader, model = reader, reader.model
        config = checkpoints.adapter_config(chosen[0].folder, chosen[0].manifest)
        factors.check_plain_lora(config)
        rows = [self._rows_of(one) for one in chosen]
        draws = [numpy.random.default_rng((seed, step, 3)) for step in range(steps)]
        self.tasks = [one.integers(len(rows), size=TASKS).tolist() for one in draws]
        self.steps = [
            Step([fitting([rows[task][at] for at in one.integers(len(rows[task]), size=ROWS)]) for task in tasks])
            for one, tasks in zip(draws, self.tasks, strict=True)
        ]
        self.order = engine_order(layout).to(model.device)
        self.place = torch.argsort(self.order)  # the inverse; scattering would sort all indices in each step
        self.attention = model.config._attn_implementation
        self.engine: Engine | None = None
        scaling = lora_config.scaling_of(config, checkpoints.layers_of(layout.shapes)[0])
        adapter = Adapter(factors_of(layout, torch.zeros(layout.size)), scaling, [], NO_OPTIMIZER, 0.0)
        try:
            self._prepare(adapter)
        except (NotPackable, torch.OutOfMemoryError) as error:
            self.close()
            is_memory = isinstance(error, torch.OutOfMemoryError)
            cause = "a step does not fit into what other processes leave of the device's memory" if is_memory else error
            raise UserError(
                f"{chosen[0].name}: the second stage cannot train: {cause}; set BASE_STEPS=0 to do without it"
            ) from None
        except BaseException:
            self.close()
            raise

    def _prepare(self, adapter: Adapter) -> None:
        """Make the engine, and take a step whose result is not used: what the engine cannot do shows there."""
        if self.reader.base.dtype is torch.float16:
            raise NotPackable("its recipe computes in float16")
        check_model(self.reader.model)
        self.engine = Engine(self.reader.model, [adapter] * TASKS, self.reader.base.dtype)
        self.engine.prepare(self.steps).run(self.steps[0], [0.0] * TASKS)

    def _rows_of(self, one: Chosen) -> list[Row]:
        """Some rows of a task, those that are not too long."""
        parts = [(entry, rows[:MOST_ROWS]) for entry, rows in prompts.parts(one.manifest)]
        found = [row_of(question) for question in self.reader.questions(parts)]
        short = [row for row in found if len(row.tokens) <= LONGEST]
        if not short:
            raise UserError(f"{one.name}: has no row of at most {LONGEST} tokens for the second stage; omit it")
        return short

    def loss(self, vectors: Tensor, step: int) -> Tensor:
        """The mean of the losses of a step's tasks, each the mean over its responses' tokens.

        Args:
            vectors: [TASKS, size] float32, factors as collected or in canonical form.
            step: from 0.
        """
        return _Loss.apply(vectors, self, step)

    def close(self) -> None:
        """Give the base model its own layers and attention back."""
        if self.engine is not None:
            self.engine.close()
            self.engine.runner = None  # which refers to the engine
            self.engine = None
        self.reader.model.set_attn_implementation(self.attention)
        devices.free_memory()


class _Loss(torch.autograd.Function):
    """What BaseLoss.loss returns. The engine computes the gradient in the same pass."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, base: BaseLoss, step: int) -> Tensor:
        engine, ordered = base.engine, vectors.detach()[:, base.order]
        assert engine is not None and engine.runner is not None  # until `close`
        for own, vector in zip(engine.vectors, ordered, strict=True):
            own.detach().copy_(vector)
        with torch.enable_grad():
            engine.runner.run(base.steps[step], [0.0] * TASKS)
        ctx.save_for_backward(torch.stack(engine.gradients)[:, base.place] / TASKS)
        return engine.losses.mean()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * weight, None, None


def row_of(question: Question) -> Row:
    """A question with its response, as a row whose response alone is learned."""
    answer = question.continuations[0].tokens
    tokens = numpy.array(question.tokens + answer, dtype=numpy.int64)
    return Row(tokens, numpy.where(numpy.arange(len(tokens)) < len(question.tokens), IGNORED, tokens))


def fitting(rows: list[Row]) -> list[Row]:
    """The first rows, as many as have at most TOKENS tokens together; at least one."""
    ends = numpy.cumsum([len(row.tokens) for row in rows])
    return rows[: max(1, int((ends <= TOKENS).sum()))]


def factors_of(layout: FactorLayout, vector: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A vector's factors lora_A [rank, in] and lora_B [out, rank] by layer, as the model names it."""
    tensors = layout.tensors_of(vector)
    return {
        layer.removeprefix(checkpoints.PEFT_PREFIX): (
            tensors[f"{layer}.lora_A.weight"],
            tensors[f"{layer}.lora_B.weight"],
        )
        for layer in checkpoints.layers_of(layout.shapes)
    }


def engine_order(layout: FactorLayout) -> Tensor:
    """Where each value of an engine's vector (packed/adapter.py) is in a vector of the layout, [size] int64."""
    pairs = factors_of(layout, torch.arange(layout.size)).values()
    return torch.cat([*(a.reshape(-1) for a, _ in pairs), *(b.t().reshape(-1) for _, b in pairs)])
