"""How many adapters fit into memory together, found by measuring a step before training."""

import torch
from transformers import PreTrainedModel

from paragen.common import devices
from paragen.packed.adapter import Adapter
from paragen.packed.batches import Step, to_batch
from paragen.packed.checkpoint_writer import BUFFERS
from paragen.packed.engine import Engine
from paragen.packed.layers import PackedLinear

USABLE = 0.85  # of the free memory; the rest is for what the measurement does not see
# Bytes per element of an adapter on its device: its value, its gradient, AdamW's two moments, a copy being written ...
ADAPTER_BYTES = 20
# ... and in the host's memory beside a GPU: its initial value and moments; copies on their way to disk come to that.
HOST_BYTES = 12
STACK_COPIES = 2  # of an adapter in the layers' stacks: the factors and their gradients


def count_that_fit(model: PreTrainedModel, dtype: torch.dtype, adapters: list[Adapter], steps: list[list[Step]]) -> int:
    """How many of the adapters, from the first on, fit on the device together; at least 1.

    Args:
        model, dtype: as for Engine.
        adapters: those of the runs.
        steps: by adapter, its steps without other adapters' rows.
    """
    largest = [max(each, key=token_count) for each in steps]
    per_token, constant = measure_step(model, dtype, adapters[0], largest[0])
    free = USABLE * (devices.free_bytes(model.device) - constant)
    for number, (adapter, step) in enumerate(zip(adapters, largest, strict=True)):
        state = adapter.start.numel() * (ADAPTER_BYTES + STACK_COPIES * torch.finfo(dtype).bits // 8)
        free -= state + per_token * token_count(step)
        if free < 0:
            return max(1, number)
    return len(adapters)


def count_within_host_memory(adapters: list[Adapter]) -> int:
    """How many of the adapters, from the first on, the host's memory serves while a GPU trains them; at least 1."""
    free = USABLE * devices.free_bytes(torch.device("cpu"))
    for number, adapter in enumerate(adapters):
        copy = 1 << (adapter.start.nbytes - 1).bit_length()  # pinned memory is rounded up to a power of two
        free -= HOST_BYTES * adapter.start.numel() + BUFFERS * copy
        if free < 0:
            return max(1, number)
    return len(adapters)


def token_count(step: Step) -> int:
    """The number of tokens in a step's rows."""
    return sum(len(row.tokens) for rows in step.rows for row in rows)


def measure_step(model: PreTrainedModel, dtype: torch.dtype, adapter: Adapter, step: Step) -> tuple[float, float]:
    """The memory of a pack as (bytes per token, further bytes), from two steps of different size.

    Args:
        model, dtype: as for Engine.
        adapter: the only one trained.
        step: the larger of the two; the other has its first row alone.
    """
    engine = Engine(model, [adapter], dtype)
    one_row = Step([step.rows[0][:1]], step.streams)
    try:
        small, large = bytes_used(engine, one_row), bytes_used(engine, step)
        copies = sum(map(bytes_of_copies, engine.layers.values()))
    finally:
        engine.close()
    more = token_count(step) - token_count(one_row)
    per_token = (large - small) / more if more > 0 and large > small else large / token_count(step)
    return per_token, copies + max(0.0, small - per_token * token_count(one_row))


def bytes_of_copies(layer: PackedLinear) -> int:
    """The memory that a packed layer takes for the base's weights in its own dtype; 0 where they have that dtype."""
    pairs = ((layer.weight, layer.base.weight), (layer.bias, layer.base.bias))
    return sum(mine.nbytes for mine, base in pairs if mine is not None and mine is not base)


def bytes_used(engine: Engine, step: Step) -> int:
    """The peak memory of one step, in bytes beyond what was allocated before. Learning rates are 0."""
    batch = to_batch(step, engine.groups, engine.device)
    if engine.on_cuda:
        engine.step(batch)  # the first step also allocates what libraries keep
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.step(batch)
        return torch.cuda.max_memory_allocated() - before
    saved: dict[int, int] = {}  # bytes by address, of the tensors kept for the backward pass

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        engine.step(batch)
    frozen = {parameter.untyped_storage().data_ptr() for parameter in engine.model.parameters()}
    return 2 * sum(size for address, size in saved.items() if address not in frozen)  # the backward pass needs as much
