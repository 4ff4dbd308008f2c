"""Trains the adapters of many cells in lockstep: one forward and backward pass, then each adapter's own update.

Imported by packed_train.py. An adapter is one float32 vector with an optimizer group of its own; at each step its parts
are copied into the layers' stacks, and the stacks' gradients back. On an NVIDIA device the whole step is replayed as a
CUDA graph, one per bucket of shapes.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from paragen.packed import layers
from paragen.packed.batches import Shape, Step, buckets, lay_out, to_batch
from paragen.packed.layers import Batch, Bins, NotPackable, PackedLinear, Shared

BUCKETS = 6  # CUDA graphs per phase at most; capturing one takes as long as ...
STEPS_PER_BUCKET = 50  # ... the padding of so many steps costs, about
AHEAD = 8  # steps that the host may be ahead of the device


class Part(NamedTuple):
    """A layer's factors in an adapter's vector: A as PEFT has it, and B transposed."""

    layer: str
    a: slice
    b: slice


class Adapter:
    """One cell's adapter while it is trained.

    Args:
        factors: PEFT's lora_A [rank, in] and lora_B [out, rank] by layer, float32.
        scaling: what PEFT multiplies their product by.
        rates: the learning rate of each step that will be trained.
        optimizer: AdamW's settings (betas, eps, weight_decay).
        max_norm: to which the gradient is clipped; 0: not at all.
        moments: AdamW's step, exp_avg and exp_avg_sq as vectors like the adapter's own; None at a fresh start.
    """

    def __init__(
        self,
        factors: dict[str, tuple[Tensor, Tensor]],
        scaling: float,
        rates: list[float],
        optimizer: dict,
        max_norm: float,
        moments: dict[str, Tensor] | None = None,
    ):
        self.rank = next(iter(factors.values()))[0].shape[0]
        self.parts, at = parts_of({layer: (a.shape[1], b.shape[0]) for layer, (a, b) in factors.items()}, self.rank)
        self.start = torch.empty(at)
        self.scaling, self.rates, self.optimizer, self.max_norm = scaling, rates, optimizer, max_norm
        self.moments = moments
        for part in self.parts:
            a, b = factors[part.layer]
            self.start[part.a] = a.detach().reshape(-1)
            self.start[part.b] = b.detach().t().reshape(-1)


def parts_of(shapes: dict[str, tuple[int, int]], rank: int) -> tuple[list[Part], int]:
    """Where each layer's factors stand in an adapter's vector, all A before all B, and its length.

    Args:
        shapes: columns of A and rows of B (in, out) by layer.
    """
    at_a, at_b, parts = 0, rank * sum(columns for columns, _ in shapes.values()), []
    for layer, (columns, rows) in shapes.items():
        parts.append(Part(layer, slice(at_a, at_a + rank * columns), slice(at_b, at_b + rank * rows)))
        at_a, at_b = at_a + rank * columns, at_b + rank * rows
    return parts, at_b


class Engine:
    """The adapters of a pack on one base model.

    Args:
        model: a transformers causal language model, frozen, on its device.
        adapters: of the cells, in order.
        dtype: what the linear layers compute in; bfloat16 stands for autocast to it.
        loads: about how many tokens each adapter sees per step (default: all the same).

    Raises packed_layers.NotPackable where the model cannot be packed. Call `close` to give the model back.
    """

    def __init__(self, model: nn.Module, adapters: list[Adapter], dtype: torch.dtype, loads: list[float] | None = None):
        self.model, self.adapters, self.dtype = model, adapters, dtype
        self.device = model.device
        self.on_cuda = self.device.type == "cuda"
        bins = Bins([adapter.rank for adapter in adapters], loads)
        self.shared = Shared(bins, [adapter.scaling for adapter in adapters], self.device)
        names = [part.layer for part in adapters[0].parts]
        self.layers = layers.attach(model, names, self.shared, dtype)
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def _allocate(self) -> None:
        """Adapters, gradients and optimizer on the device."""
        adapters = self.adapters
        self.vectors = [nn.Parameter(adapter.start.to(self.device, copy=True)) for adapter in adapters]
        self.gradients = [torch.zeros_like(vector) for vector in self.vectors]
        self.rates = torch.zeros(len(adapters), device=self.device)
        groups = []
        for number, (vector, adapter) in enumerate(zip(self.vectors, adapters, strict=True)):
            vector.grad = self.gradients[number]
            groups.append({"params": [vector], **adapter.optimizer, "lr": self.rates[number]})
        self.optimizer = torch.optim.AdamW(groups, fused=True, capturable=self.on_cuda)
        self.losses = torch.zeros(len(adapters), device=self.device)
        self.runner: EagerRunner | GraphRunner | None = None
        self._pair_parts()
        self.restart()

    def _pair_parts(self) -> None:
        """Note which part of which vector is copied to and from which block of which stack."""
        self.vector_parts: list[Tensor] = []
        self.gradient_parts: list[Tensor] = []
        self.places: list[tuple[PackedLinear, str, int]] = []
        for number, adapter in enumerate(self.adapters):
            vector, gradient = self.vectors[number].detach(), self.gradients[number]
            for part in adapter.parts:
                for name, where in (("a", part.a), ("b", part.b)):
                    self.vector_parts.append(vector[where].view(adapter.rank, -1))
                    self.gradient_parts.append(gradient[where].view(adapter.rank, -1))
                    self.places.append((self.layers[part.layer], name, number))
        self.stack_parts = [layer.block(getattr(layer, name).detach(), number) for layer, name, number in self.places]

    def restart(self) -> None:
        """Set adapters and optimizer to where they start."""
        for number, adapter in enumerate(self.adapters):
            with torch.no_grad():
                self.vectors[number].copy_(adapter.start)
            state = self.optimizer.state[self.vectors[number]]
            started = adapter.moments or {"step": torch.tensor(0.0)}
            for name in ("step", "exp_avg", "exp_avg_sq"):
                like = self.vectors[number] if name != "step" else self.losses[0]
                value = state.setdefault(name, torch.zeros_like(like, device=self._home_of(name), requires_grad=False))
                value.copy_(started[name]) if name in started else value.zero_()

    def _home_of(self, name: str) -> torch.device:
        return self.device if self.on_cuda or name != "step" else torch.device("cpu")

    def step(self, batch: Batch) -> None:
        """One optimizer step of all adapters; their losses are then in `losses`."""
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
            losses = layers.losses(self.model, batch, self.shared)
        weighted = losses * batch.weights
        weighted.sum().backward()
        self.losses.zero_().index_add_(0, batch.loss_of, weighted.detach())

    def gradient_of(self, step: Step) -> tuple[float, Tensor]:
        """Loss and gradient (a vector like the adapter's, on the CPU) of the first adapter as it stands."""
        self.adapters[0].max_norm = 0.0
        self.rates.zero_()
        self.step(to_batch(step, self.shared.bins, self.device))
        return self.losses[0].item(), self.gradients[0].cpu()

    def prepare(self, steps: list[Step]) -> "EagerRunner | GraphRunner":
        """Make ready for these steps; raises torch.OutOfMemoryError where they are too large for the device, and
        NotPackable where they do other things than a CUDA graph can."""
        try:
            self.runner = (GraphRunner if self.on_cuda else EagerRunner)(self, steps)
        except RuntimeError as error:  # of CUDA, at what a graph cannot hold
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotPackable(f"its step cannot be captured: {' '.join(str(error).split())[:200]}") from error
        return self.runner

    def train(self, steps: list[Step], after: Callable[[int], None]) -> Iterator[tuple[int, list[float]]]:
        """Train all steps.

        Args:
            steps: what each sees; an adapter's learning rate at a step is its `rates` there, and 0 after the last.
            after: called with the number of each step (from 0) once its work is queued; what it queues sees the
                adapters as they are after that step.

        Yields (step, the loss of each adapter) as they become known, in order, some steps later on a device.
        """
        runner = self.runner or self.prepare(steps)
        self.restart()
        waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        for number, step in enumerate(steps):
            runner.run(step, [rate_at(adapter.rates, number) for adapter in self.adapters])
            after(number)
            waiting.append((number, *self._copied_losses()))
            while len(waiting) > (AHEAD if self.on_cuda else 0) or (waiting and number == len(steps) - 1):
                known, losses, copied = waiting.popleft()
                if copied is not None:
                    copied.synchronize()
                yield known, losses.tolist()

    def _copied_losses(self) -> tuple[Tensor, torch.cuda.Event | None]:
        if not self.on_cuda:
            return self.losses.clone(), None
        copy = torch.empty_like(self.losses, device="cpu", pin_memory=True)
        copy.copy_(self.losses, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return copy, event

    def moments_of(self, number: int) -> dict[str, Tensor]:
        """AdamW's state of an adapter: step, and exp_avg and exp_avg_sq as vectors."""
        return self.optimizer.state[self.vectors[number]]

    def close(self) -> None:
        """Give the model its plain layers back."""
        layers.detach(self.model, self.layers)


def rate_at(rates: list[float], step: int) -> float:
    """The learning rate of a step; 0 for an adapter that is through, which leaves it as it is."""
    return rates[step] if step < len(rates) else 0.0


class EagerRunner:
    """Runs steps as they come, each in a batch of its own shape."""

    def __init__(self, engine: Engine, steps: list[Step]):
        self.engine = engine

    def run(self, step: Step, rates: list[float]) -> None:
        """One step at these learning rates."""
        self.engine.rates.copy_(torch.tensor(rates))
        self.engine.step(to_batch(step, self.engine.shared.bins, self.engine.device))


class GraphRunner:
    """Runs steps as CUDA graphs: one is captured for each bucket of shapes before the first step.

    A step's numbers travel as one pinned array of int64 and one of float32, whose copies hold nobody up.
    """

    def __init__(self, engine: Engine, steps: list[Step]):
        self.engine = engine
        count = max(1, min(BUCKETS, len(steps) // STEPS_PER_BUCKET))
        self.shapes = buckets([step.shape(engine.shared.bins) for step in steps], count)
        self.graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        empty = Step([[] for _ in engine.adapters])
        largest = self.shapes[-1]
        self.stage = {}
        for shape in reversed(self.shapes):
            self.stage[shape] = Stage(lay_out(empty, engine.shared.bins, shape), shape, engine.device)
        warm = max(steps, key=lambda step: step.shape(engine.shared.bins))
        self.stage[largest].fill(lay_out(warm, engine.shared.bins, largest))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up, and memory is tried, outside of the capture
            for _ in range(2):
                engine.step(self.stage[largest].batch)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        for layer in engine.layers.values():
            layer.a.grad = layer.b.grad = None
        torch.cuda.empty_cache()
        pool = None
        for shape in reversed(self.shapes):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                engine.step(self.stage[shape].batch)
            pool = pool or graph.pool()
            self.graphs[shape] = graph

    def run(self, step: Step, rates: list[float]) -> None:
        """One step at these learning rates; returns before it is done."""
        engine = self.engine
        wanted = step.shape(engine.shared.bins)
        shape = next(shape for shape in self.shapes if shape.covers(wanted))
        engine.rates.copy_(torch.tensor(rates).pin_memory(), non_blocking=True)
        self.stage[shape].fill(lay_out(step, engine.shared.bins, shape))
        self.graphs[shape].replay()


class Stage:
    """A batch at fixed places of the device's memory, filled anew for each step."""

    def __init__(self, arrays: dict[str, np.ndarray], shape: Shape, device: torch.device):
        self.sizes = [array.size for name, array in arrays.items() if name != "weights"]
        self.numbers = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)
        self.weights = torch.zeros(arrays["weights"].size, device=device)
        names = [name for name in arrays if name != "weights"]
        views = dict(zip(names, self.numbers.split(self.sizes), strict=True))
        shaped = {name: view.view(arrays[name].shape) for name, view in views.items()}
        self.batch = Batch(**shaped, weights=self.weights, row_length=shape.row_length, spans=None)

    def fill(self, arrays: dict[str, np.ndarray]) -> None:
        """Queue the copies of a step's arrays."""
        numbers = np.concatenate([array.reshape(-1) for name, array in arrays.items() if name != "weights"])
        for there, values in ((self.numbers, numbers), (self.weights, arrays["weights"])):
            values = torch.from_numpy(values)
            there.copy_(values.pin_memory() if there.is_cuda else values, non_blocking=True)
