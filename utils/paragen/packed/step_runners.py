"""How an engine's steps are run: directly, or replayed as CUDA graphs."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from paragen.packed.batches import Shape, Step, choose_buckets, lay_out, to_batch
from paragen.packed.step_context import Batch

if TYPE_CHECKING:
    from paragen.packed.engine import Engine

MAX_BUCKETS = 8  # CUDA graphs per phase
STEPS_PER_BUCKET = 50  # capturing a graph takes about as long as the padding of so many steps costs


def buckets_of(shapes: list[Shape]) -> list[Shape]:
    """The shapes of the CUDA graphs for steps of these shapes, ascending."""
    return choose_buckets(shapes, max(1, min(MAX_BUCKETS, len(shapes) // STEPS_PER_BUCKET)))


class EagerRunner:
    """Runs each step directly, in a batch of its own shape.

    Args:
        engine: the engine whose steps are run.
        steps: all of them; not used here, see GraphRunner.
    """

    def __init__(self, engine: "Engine", steps: list[Step]):
        self.engine = engine

    def run(self, step: Step, rates: list[float]) -> None:
        """Run one step with these learning rates, one per adapter."""
        self.engine.rates.copy_(torch.tensor(rates))
        self.engine.step(to_batch(step, self.engine.groups, self.engine.device))


class GraphRunner:
    """Runs steps as CUDA graphs: one is captured for each bucket of shapes before the first step.

    Args:
        engine: the engine whose steps are run, on an NVIDIA GPU.
        steps: all of them; their shapes decide the buckets.

    Raises torch.OutOfMemoryError where the largest step does not fit, RuntimeError where one cannot be captured.
    """

    def __init__(self, engine: "Engine", steps: list[Step]):
        self.engine = engine
        self.shapes = buckets_of([step.shape(engine.groups) for step in steps])
        empty = steps[0].without(range(len(engine.adapters)))
        self.batches: dict[Shape, StaticBatch] = {}
        for shape in reversed(self.shapes):
            self.batches[shape] = StaticBatch(lay_out(empty, engine.groups, shape), shape, engine.device)
        self._warm_up(steps)
        self.graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        pool = None
        for shape in reversed(self.shapes):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                engine.step(self.batches[shape].batch)
            pool = pool or graph.pool()
            self.graphs[shape] = graph

    def _warm_up(self, steps: list[Step]) -> None:
        """Run the largest step outside of the capture: libraries initialise themselves, and memory proves enough."""
        engine, largest = self.engine, self.shapes[-1]
        step = max(steps, key=lambda step: step.shape(engine.groups))
        self.batches[largest].fill(lay_out(step, engine.groups, largest))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                engine.step(self.batches[largest].batch)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        for layer in engine.layers.values():
            layer.a.grad = layer.b.grad = None
        torch.cuda.empty_cache()

    def run(self, step: Step, rates: list[float]) -> None:
        """Queue one step with these learning rates, one per adapter; returns before it is complete."""
        engine = self.engine
        needed = step.shape(engine.groups)
        shape = next(shape for shape in self.shapes if shape.covers(needed))
        engine.rates.copy_(torch.tensor(rates).pin_memory(), non_blocking=True)
        self.batches[shape].fill(lay_out(step, engine.groups, shape))
        self.graphs[shape].replay()


class StaticBatch:
    """A batch at fixed addresses of the device's memory, as CUDA graphs need it; it is refilled for each step.

    The int64 fields are views of one tensor, so that a step's data need two transfers, both from pinned memory.

    Args:
        arrays: a layout of `shape`, which gives the fields' shapes.
        shape: the largest step that fits.
        device: where the batch is.
    """

    def __init__(self, arrays: dict[str, np.ndarray], shape: Shape, device: torch.device):
        self.sizes = [array.size for name, array in arrays.items() if name != "weights"]
        self.numbers = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)
        self.weights = torch.zeros(arrays["weights"].size, device=device)
        names = [name for name in arrays if name != "weights"]
        views = dict(zip(names, self.numbers.split(self.sizes), strict=True))
        shaped = {name: view.view(arrays[name].shape) for name, view in views.items()}
        self.batch = Batch(**shaped, weights=self.weights, row_length=shape.row_length, spans=None)

    def fill(self, arrays: dict[str, np.ndarray]) -> None:
        """Queue the copies of a step's layout into the batch; returns before they are complete."""
        numbers = np.concatenate([array.reshape(-1) for name, array in arrays.items() if name != "weights"])
        for target, values in ((self.numbers, numbers), (self.weights, arrays["weights"])):
            source = torch.from_numpy(values)
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
