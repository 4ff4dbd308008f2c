"""How many adapters fit on a device together, found by measuring a step before training.

Imported by packed_train.py.
"""

import psutil
import torch
from torch import nn

from paragen.common import devices
from paragen.packed.batches import Step, to_batch
from paragen.packed.packed_engine import Adapter, Engine

USED = 0.85  # of the free memory; the rest is for what the measurement does not see
STATE = 20  # bytes per element of an adapter: itself, its gradient, AdamW's two moments, a copy that is being written
HOST = 24  # the same in the host's memory beside a GPU: where it starts, its moments, three copies on their way to disk
STACKED = 2  # copies of it in the layers' stacks: the factors and their gradient


def how_many(model: nn.Module, dtype: torch.dtype, adapters: list[Adapter], steps: list[list[Step]]) -> int:
    """How many of the adapters, from the first on, one pack can hold; at least 1.

    Args:
        model, dtype: as for Engine.
        adapters: of the runs.
        steps: what each of them sees, as steps of that adapter alone.
    """
    largest = [max(each, key=tokens_of) for each in steps]
    per_token, beside = measure(model, dtype, adapters[0], largest[0])
    free = USED * (devices.free_bytes(model.device) - beside)
    for number, (adapter, step) in enumerate(zip(adapters, largest, strict=True)):
        state = adapter.start.numel() * (STATE + STACKED * torch.finfo(dtype).bits // 8)
        free -= state + per_token * tokens_of(step)
        if free < 0:
            return max(1, number)
    return len(adapters)


def beside_gpu(adapters: list[Adapter]) -> int:
    """How many of the adapters, from the first on, the host's memory serves while a GPU trains them; at least 1."""
    free = USED * psutil.virtual_memory().available
    for number, adapter in enumerate(adapters):
        free -= HOST * adapter.start.numel()
        if free < 0:
            return max(1, number)
    return len(adapters)


def tokens_of(step: Step) -> int:
    """The tokens that a step sees."""
    return sum(len(row.tokens) for rows in step.rows for row in rows)


def measure(model: nn.Module, dtype: torch.dtype, adapter: Adapter, step: Step) -> tuple[float, float]:
    """Bytes that a step takes per token, and beside its tokens, from two steps of different size."""
    engine = Engine(model, [adapter], dtype)
    one = Step([step.rows[0][:1]])
    try:
        small, large = used_by(engine, one), used_by(engine, step)
    finally:
        engine.close()
    more = tokens_of(step) - tokens_of(one)
    per_token = (large - small) / more if more > 0 and large > small else large / tokens_of(step)
    return per_token, max(0.0, small - per_token * tokens_of(one))


def used_by(engine: Engine, step: Step) -> int:
    """Bytes that one step needs at its highest, beyond what is there before; nothing is learned."""
    batch = to_batch(step, engine.shared.bins, engine.device)
    if engine.on_cuda:
        engine.step(batch)  # libraries take what they keep
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.step(batch)
        return torch.cuda.max_memory_allocated() - before
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        engine.step(batch)
    frozen = {parameter.untyped_storage().data_ptr() for parameter in engine.model.parameters()}
    return 2 * sum(size for place, size in kept.items() if place not in frozen)  # as much again while it runs back
