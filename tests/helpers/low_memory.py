"""The packed engine on a device with little memory: `fork_server.start("helpers.low_memory", ...)`.

LOW_MEMORY=room:N       the memory module finds only as much free memory as N cells need
LOW_MEMORY=prepare:N    torch runs out of memory while a pack of more than N cells is prepared
"""

import os

from paragen.packed import packed_train


def main() -> int:
    import torch

    from paragen.common import devices
    from paragen.packed import memory
    from paragen.packed.engine import Engine

    kind, number = os.environ["LOW_MEMORY"].split(":")
    if kind == "room":

        def free_bytes(device: torch.device) -> float:
            return free_bytes.amount

        real = memory.count_that_fit

        def count_that_fit(model, dtype, adapters, steps):
            """Set the free memory to what N adapters need by the real measurement, and count again with it."""
            largest = [max(each, key=memory.token_count) for each in steps]
            per_token, beside = memory.measure_step(model, dtype, adapters[0], largest[0])
            need = [
                adapter.start.numel() * (memory.ADAPTER_BYTES + memory.STACK_COPIES * 4)
                + per_token * memory.token_count(step)
                for adapter, step in zip(adapters, largest, strict=True)
            ]
            free_bytes.amount = beside + (sum(need[: int(number)]) + 0.5 * min(need)) / memory.USABLE
            return real(model, dtype, adapters, steps)

        devices.free_bytes, memory.count_that_fit = free_bytes, count_that_fit
    else:
        prepare = Engine.prepare

        def refusing(engine, steps):
            if len(engine.adapters) > int(number):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return prepare(engine, steps)

        Engine.prepare = refusing
    return packed_train.main()
