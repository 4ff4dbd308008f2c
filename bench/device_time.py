"""Where a step's time goes, by kind of work: torch's profiler, its operations sorted by name and shape.

Imported by packed_grow.py.
"""

from collections.abc import Callable

import shapes
import torch
from torch.profiler import ProfilerActivity, profile

from paragen.common import cli
from paragen.common.cli import say

REPEATED = 3  # steps
BASE, LORA = "base layers' products", "LoRA's products"


def by_kind(step: Callable[[], None], shape: str, width: int) -> dict[str, float]:
    """Milliseconds of one step by kind.

    Args:
        step: does one, launched as it comes (a replayed graph does not tell which operation a kernel belongs to).
        shape: the model's name in shapes.SHAPES.
        width: of the stacks: by it, products with LoRA's factors are told from the base's.
    """
    on_cuda = torch.cuda.is_available()
    for _ in range(2):
        step()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=kinds, record_shapes=True) as profiler:
        for _ in range(REPEATED):
            step()
        if on_cuda:
            torch.cuda.synchronize()
    took: dict[str, float] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        micro = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if micro and not (on_cuda and event.device_type == torch.autograd.DeviceType.CUDA):
            kind = kind_of(event.key, event.input_shapes, shape, width)
            took[kind] = took.get(kind, 0.0) + micro / 1000 / REPEATED
    return dict(sorted(took.items(), key=lambda item: -item[1]))


def kind_of(name: str, inputs: list, shape: str, width: int) -> str:
    """The kind of an operation, from its name and the shapes of its inputs."""
    own = name.removeprefix("aten::")
    sizes = {size for one in inputs if isinstance(one, list) for size in one[-2:] if isinstance(size, int)}
    if own in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear"):
        if shapes.SHAPES[shape]["vocab_size"] in sizes:
            return "head and loss"
        return LORA if width in sizes or "bmm" in own else BASE
    if "attention" in own:
        return "attention"
    if "softmax" in own or "nll_loss" in own:
        return "head and loss"
    if "adam" in own or "norm" in own or own.startswith("_foreach"):
        return "optimizer, clipping, stacks' copies"
    if own.startswith("index") or own.startswith("embedding"):
        return "rows to tokens and back"
    if own in ("copy_", "_to_copy", "clone", "contiguous"):
        return "copies and casts"
    return "elementwise and the rest"


def show(took: dict[str, float], shape: str, point: dict, peak: float) -> None:
    """The table, and how fast the base layers' products run."""
    whole = sum(took.values())
    say(f"\nwhere it goes at {point['count']} adapters ({whole:.1f} ms of work a step, {point['ms']:.1f} as trained):")
    cli.print_table(("kind", "ms", "%"), [(kind, f"{ms:.2f}", f"{100 * ms / whole:.1f}") for kind, ms in took.items()])
    if took.get(BASE):
        rate = 4 * shapes.base_parameters(shape) * point["tokens"] / took[BASE] / 1e9
        say(f"the base layers' products: {rate:.4g} TFLOPS of useful tokens, {100 * rate / peak:.0f} % of the peak")
    say(f"bound by: {next(iter(took))}")
