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
from paragen.packed.layers import AdapterGroups, Batch, NotPackable, PackedLinear, StepContext
from paragen.packed.step_runners import EagerRunner, GraphRunner
from paragen.training import deterministic

MAX_STEPS_AHEAD = 8  # steps that the host may queue before it waits for the device


class Engine:
    """The adapters of a pack on one base model.

    Args:
        model: a transformers causal language model, frozen, on its device.
        adapters: those to be trained together.
        dtype: what the linear layers compute in: float32, or bfloat16 (then the rest is under autocast to bfloat16).
        loads: about how many tokens each adapter sees per step (default: all the same).

    `vectors`, `gradients` and `losses` hold the adapters' values, gradients and latest losses, in the order of
    `adapters`. Raises NotPackable where the model cannot be packed. Call `close` to give the model its layers back.
    """

    def __init__(
        self, model: PreTrainedModel, adapters: list[Adapter], dtype: torch.dtype, loads: list[float] | None = None
    ):
        self.model, self.adapters, self.dtype = model, adapters, dtype
        self.device = model.device
        self.on_cuda = self.device.type == "cuda"
        self.groups = AdapterGroups([adapter.rank for adapter in adapters], loads)
        self.context = StepContext(self.groups, [adapter.scaling for adapter in adapters], self.device)
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
        self.losses = torch.zeros(len(adapters), device=self.device)
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
        """Take one optimizer step with all adapters and set `losses` ([adapters] float32, on the device)."""
        torch._foreach_copy_(self.stack_parts, self.vector_parts)
        for layer in self.layers.values():
            layer.a.grad = layer.b.grad = None
        self._backward(batch)
        from_stacks = [layer.block(getattr(layer, name).grad, number) for layer, name, number in self.places]
        torch._foreach_copy_(self.gradient_parts, from_stacks)
        for vector, adapter in zip(self.vectors, self.adapters, strict=True):
            if adapter.max_norm > 0:
                nn.utils.clip_grad_norm_(vector, adapter.max_norm, foreach=False)
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

    def train(self, steps: list[Step], after: Callable[[int], None]) -> Iterator[tuple[int, list[float]]]:
        """Train all steps.

        Args:
            steps: the rows of each step.
            after: called with the number of each step (from 0) once its work is queued. Work that it queues sees the
                adapters as they are after that step.

        Yields (step, the loss of each adapter) in order, as soon as the losses are known; on a GPU that is up to
        MAX_STEPS_AHEAD steps later.
        """
        runner = self.runner or self.prepare(steps)
        self.restart()
        waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        for number, step in enumerate(steps):
            runner.run(step, [adapter.rate_at(number) for adapter in self.adapters])
            after(number)
            waiting.append((number, *self._copy_losses()))
            while len(waiting) > (MAX_STEPS_AHEAD if self.on_cuda else 0) or (waiting and number == len(steps) - 1):
                known, losses, copied = waiting.popleft()
                if copied is not None:
                    copied.synchronize()
                yield known, losses.tolist()

    def _copy_losses(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy of the losses on the CPU, and the event after which it is complete (None: it already is)."""
        if not self.on_cuda:
            return self.losses.clone(), None
        copy = torch.empty_like(self.losses, device="cpu", pin_memory=True)
        copy.copy_(self.losses, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return copy, event

    def moments_of(self, number: int) -> dict[str, Tensor]:
        """AdamW's state of an adapter: `step`, and `exp_avg` and `exp_avg_sq` as vectors like the adapter's own."""
        return self.optimizer.state[self.vectors[number]]

    def close(self) -> None:
        """Give the model its plain layers back."""
        layers.detach(self.model, self.layers)
