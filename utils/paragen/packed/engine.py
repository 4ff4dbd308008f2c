"""Trains the adapters of a pack in lockstep: one forward and backward pass for all, then each adapter's own update.

Each adapter is one float32 vector with an optimizer group of its own. At each step its parts are copied into the
layers' stacks, and the stacks' gradients are copied back. On an NVIDIA GPU the whole step is replayed as a CUDA graph.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paragen.packed import layers
from paragen.packed.adapter import Adapter
from paragen.packed.batches import Step, to_batch
from paragen.packed.layers import NotPackable, PackedLinear
from paragen.packed.step_context import AdapterGroups, Batch, StepContext
from paragen.packed.step_runners import EagerRunner, GraphRunner
from paragen.training import deterministic

MAX_STEPS_AHEAD = 8  # steps that the host may queue before it waits for the device
# The largest factor of an adapter that has not diverged. Stacked products multiply it by other adapters' tokens before
# those products are set to zero, so it must not make them overflow: activations of 1e10, added up 1e4 times, do not.
MAX_FACTOR = 2.0**64


class Engine:
    """The adapters of a pack on one base model.

    Args:
        model: a transformers causal language model, frozen, on its device.
        adapters: those to be trained together.
        dtype: what the linear layers compute in: float32, or bfloat16 (then the rest is under autocast to bfloat16).
        loads: about how many tokens each adapter sees per step (default: all the same).

    `vectors`, `gradients` and `losses` hold the adapters' values, gradients and latest losses, in the order of
    `adapters`. `diverged` has the step (from 0) in which an adapter's loss or gradient was not finite, by adapter.
    Raises NotPackable where the model cannot be packed. Call `close` to give the model its layers back.
    """

    def __init__(
        self, model: PreTrainedModel, adapters: list[Adapter], dtype: torch.dtype, loads: list[float] | None = None
    ):
        self.model, self.adapters, self.dtype = model, adapters, dtype
        self.device = model.device
        self.on_cuda = self.device.type == "cuda"
        self.steps_ahead = MAX_STEPS_AHEAD if self.on_cuda else 0
        self.groups = AdapterGroups([adapter.rank for adapter in adapters], loads)
        scaling, dropout = [adapter.scaling for adapter in adapters], [adapter.dropout for adapter in adapters]
        self.context = StepContext(self.groups, scaling, self.device, dropout)
        names = [part.layer for part in adapters[0].parts]
        self.layers = layers.attach(model, names, self.context, dtype)
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        """Create the adapters, their gradients and the optimizer on the device."""
        adapters = self.adapters
        self.vectors = [nn.Parameter(adapter.start.to(self.device, copy=True)) for adapter in adapters]
        self.gradients = [torch.zeros_like(vector) for vector in self.vectors]
        self.rates = torch.zeros(len(adapters), device=self.device)
        parameter_groups = []
        for number, (vector, adapter) in enumerate(zip(self.vectors, adapters, strict=True)):
            vector.grad = self.gradients[number]
            parameter_groups.append({"params": [vector], **adapter.optimizer, "lr": self.rates[number]})
        self.optimizer = torch.optim.AdamW(parameter_groups, fused=True, capturable=self.on_cuda)
        # of the latest step, by adapter: its loss; 1 where that and the gradient are finite, else 0
        self.results = torch.zeros(2, len(adapters), device=self.device)
        self.losses, self.finite = self.results
        # 1 once something was not finite: AdamW then changes no adapter, until the host has found which one diverged
        self.stalled = torch.zeros((), device=self.device)
        vars(self.optimizer)["found_inf"] = self.stalled
        self.diverged: dict[int, int] = {}
        self.runner: EagerRunner | GraphRunner | None = None
        self._pair_parts()
        self.restart()

    def _pair_parts(self) -> None:
        """List which part of which vector is copied to and from which block of which stack."""
        self.vector_parts: list[Tensor] = []
        self.gradient_parts: list[Tensor] = []
        self.places: list[tuple[PackedLinear, str, int]] = []  # (layer, "a" or "b", adapter)
        for number, adapter in enumerate(self.adapters):
            vector, gradient = self.vectors[number].detach(), self.gradients[number]
            for part in adapter.parts:
                for name, where in (("a", part.a), ("b", part.b)):
                    self.vector_parts.append(vector[where].view(adapter.rank, -1))
                    self.gradient_parts.append(gradient[where].view(adapter.rank, -1))
                    self.places.append((self.layers[part.layer], name, number))
        self.stack_parts = [layer.block(getattr(layer, name).detach(), number) for layer, name, number in self.places]

    def restart(self) -> None:
        """Set adapters and optimizer to their initial state."""
        self.stalled.zero_()
        self.diverged.clear()
        for number, adapter in enumerate(self.adapters):
            with torch.no_grad():
                self.vectors[number].copy_(adapter.start)
            state = self.optimizer.state[self.vectors[number]]
            initial = adapter.moments or {"step": torch.tensor(0.0)}
            for name in ("step", "exp_avg", "exp_avg_sq"):
                like = self.vectors[number] if name != "step" else self.losses[0]
                value = state.setdefault(
                    name, torch.zeros_like(like, device=self._device_of(name), requires_grad=False)
                )
                value.copy_(initial[name]) if name in initial else value.zero_()

    def _device_of(self, name: str) -> torch.device:
        """The device of an entry of AdamW's state: `step` is on the CPU, unless it is part of a CUDA graph."""
        return self.device if self.on_cuda or name != "step" else torch.device("cpu")

    def step(self, batch: Batch) -> None:
        """Take one optimizer step with all adapters, and set `results`, on the device without waiting for it.

        Where a loss or a gradient is not finite, no adapter is changed, in this step and in later ones: see `stalled`.
        """
        torch._foreach_copy_(self.stack_parts, self.vector_parts)
        for layer in self.layers.values():
            layer.a.grad = layer.b.grad = None
        self._backward(batch)
        from_stacks = [layer.block(getattr(layer, name).grad, number) for layer, name, number in self.places]
        torch._foreach_copy_(self.gradient_parts, from_stacks)
        for vector, adapter in zip(self.vectors, self.adapters, strict=True):
            if adapter.max_norm > 0:
                nn.utils.clip_grad_norm_(vector, adapter.max_norm, foreach=False)
        norms = torch.stack(torch._foreach_norm(self.gradients))
        self.finite.copy_(norms.isfinite() & self.losses.isfinite())
        torch.maximum(self.stalled, 1 - self.finite.min(), out=self.stalled)
        self.optimizer.step()

    def _backward(self, batch: Batch) -> None:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16,
                            cache_enabled=False):  # fmt: skip
            losses = layers.token_losses(self.model, batch, self.context)
        weighted = losses * batch.weights
        weighted.sum().backward()
        self.losses.zero_().index_add_(0, batch.loss_adapter, weighted.detach())

    def gradient_of(self, step: Step) -> tuple[float, Tensor]:
        """The first adapter's loss, and its gradient as a vector on the CPU. The adapter is left as it is."""
        self.adapters[0].max_norm = 0.0
        self.rates.zero_()
        self.step(to_batch(step, self.groups, self.device))
        return self.losses[0].item(), self.gradients[0].cpu()

    def prepare(self, steps: list[Step]) -> "EagerRunner | GraphRunner":
        """Get ready to run these steps.

        Raises torch.OutOfMemoryError where they are too large for the device, NotPackable where a CUDA graph cannot
        capture them.
        """
        try:
            self.runner = (GraphRunner if self.on_cuda else EagerRunner)(self, steps)
        except RuntimeError as error:  # of CUDA, at an operation that a graph cannot capture
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotPackable(f"its step cannot be captured: {deterministic.one_line(error)}") from error
        return self.runner

    def train(
        self, steps: list[Step], after: Callable[[int], None], first: int = 0
    ) -> Iterator[tuple[int, list[float]]]:
        """Train all steps. An adapter that diverges is left out from that step on, as if its training were complete.

        Args:
            steps: the rows of each step.
            after: called with the number of each step (from 0) once its work is queued. Work that it queues sees the
                adapters as they are after that step. It is called again for a step that is taken again.
            first: the step to begin with; those before are trained already.

        Yields (step, the loss of each adapter) in order, as soon as the losses are known; on a GPU that is up to
        MAX_STEPS_AHEAD steps later. Ends early where all adapters have diverged that were still training.
        """
        runner = self.runner or self.prepare(steps)
        self.restart()
        waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        number = first
        while number < len(steps) or waiting:
            if number < len(steps):
                runner.run(steps[number].without(self.diverged), self._rates_at(number))
                after(number)
                waiting.append((number, *self._copy_results()))
                number += 1
            if len(waiting) <= self.steps_ahead and number < len(steps):
                continue
            known, results, copied = waiting.popleft()
            if copied is not None:
                copied.synchronize()
            losses, finite = results.tolist()
            if all(finite):
                yield known, losses
                continue
            waiting.clear()  # those steps changed nothing
            number = known
            self._exclude_diverged(known, steps[known], [index for index, one in enumerate(finite) if not one])
            if not any(one.without(self.diverged).has_rows for one in steps[known:]):
                return

    def _rates_at(self, number: int) -> list[float]:
        """The learning rate of each adapter at a step; 0 for one that diverged, since inf times 0 is NaN."""
        rates = enumerate(adapter.rate_at(number) for adapter in self.adapters)
        return [0.0 if index in self.diverged else rate for index, rate in rates]

    def _exclude_diverged(self, number: int, step: Step, suspects: list[int]) -> None:
        """Set the adapters to zero that diverged in a step, which nobody has taken yet.

        In a pack, values that are not finite can spread: stacked products multiply them by zero, which gives NaN, and
        all rows share their padding. So each suspect takes the step alone, once no factor is left that could spread.

        Args:
            number: the step's number.
            step: its rows.
            suspects: the adapters whose loss or gradient was not finite.
        """
        assert self.runner is not None  # see `train`
        found = [index for index, vector in enumerate(self.vectors) if not vector.detach().abs().max() <= MAX_FACTOR]
        self._set_to_zero(found)
        active = [index for index in suspects if step.rows[index]]  # the others' training is complete
        for index in sorted({*active} - {*found, *self.diverged}):
            others = {*range(len(self.adapters))} - {index}
            self.runner.run(step.without({*others, *found}), [0.0] * len(self.adapters))
            if not self.finite[index].item():
                found.append(index)
        found = found or active or suspects  # none alone: not expected, and none of them can go on together
        self._set_to_zero(found)
        self.diverged |= dict.fromkeys(found, number)
        self.stalled.zero_()

    def _set_to_zero(self, adapters: list[int]) -> None:
        """Set the values and the optimizer's moments of some adapters to zero."""
        for index in adapters:
            for value in (self.vectors[index].detach(), *self.moments_of(index).values()):
                value.zero_()

    def _copy_results(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy of `results` on the CPU, and the event after which it is complete (None: it already is)."""
        if not self.on_cuda:
            return self.results.clone(), None
        copy = torch.empty_like(self.results, device="cpu", pin_memory=True)
        copy.copy_(self.results, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return copy, event

    def moments_of(self, number: int) -> dict[str, Tensor]:
        """AdamW's state of an adapter: `step`, and `exp_avg` and `exp_avg_sq` as vectors like the adapter's own."""
        return self.optimizer.state[self.vectors[number]]

    def close(self) -> None:
        """Give the model its plain layers back."""
        layers.detach(self.model, self.layers)
