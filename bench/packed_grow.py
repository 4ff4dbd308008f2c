"""packed.py grow: how the packed step grows with the number of adapters, on a random model made on the device.

Rows have ARC-c's lengths; adapters of one dataset (one per rank) see the same rows, as cells of one sweep do.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import device_time
import numpy as np
import scratch
import shapes
import torch
from timed import peak_gb, work_of

from paragen.common import cli
from paragen.common.cli import say
from paragen.packed.adapter import Adapter
from paragen.packed.batches import IGNORED, Row, Step, choose_buckets, to_batch
from paragen.packed.engine import Engine
from paragen.packed.layers import PackedLinear

RANKS = (2, 4, 8, 16, 64)
ROWS = {"pretrain": 8, "collect": 2}
LEARNED = 5  # tokens of a row's answer
# Every twentieth of the lengths of ARC-c's 1119 training rows, system prompt, template and answer included, in tokens.
LENGTHS = (106, 112, 115, 119, 122, 126, 129, 132, 134, 137, 140, 143, 146, 150, 153, 156, 161, 167, 172, 187, 264)
WARM_UP = 4  # steps
SLACK = 1.03  # by which a time per adapter may rise: what two measurements of the same differ by


def run(args: argparse.Namespace, top: Path) -> int:
    """Measure, print a table and a verdict per phase, write the raw numbers to args.out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = shapes.random_model(args.shape, device, str(dtype).removeprefix("torch."))
    model.requires_grad_(False)
    model.train()
    pool = Pool(model, args)
    found: dict[str, Any] = {"shape": args.shape, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    for phase in args.phases.split(","):
        found[phase] = grow(pool, dtype, phase, args)
        scratch.write_json(args.out, found)
    for phase in args.phases.split(","):
        show(found[phase], phase, args)
    scratch.write_json(args.out, found)
    return 0


class Pool:
    """Makes adapters and steps for a model."""

    def __init__(self, model: torch.nn.Module, args: argparse.Namespace):
        self.model, self.args = model, args
        linear = {
            name: one for name, one in model.named_modules() if type(one) is torch.nn.Linear and name != "lm_head"
        }
        self.sizes = {name: (one.in_features, one.out_features) for name, one in linear.items()}
        self.factors: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}

    def adapter(self, rank: int) -> Adapter:
        """A fresh adapter; those of one rank start alike."""
        if rank not in self.factors:
            self.factors[rank] = {
                name: (torch.randn(rank, columns) / columns**0.5, torch.zeros(rows, rank))
                for name, (columns, rows) in self.sizes.items()
            }
        settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        return Adapter(self.factors[rank], 2.0, [5e-5] * self.args.steps, settings, 1.0)

    def steps(self, count: int, rows: int) -> list[Step]:
        """Steps of `count` adapters with so many rows each; the same ones for the same arguments."""
        draw = np.random.default_rng(0)
        vocabulary = shapes.SHAPES[self.args.shape]["vocab_size"]

        def one_row() -> Row:
            length = round(np.interp(draw.random(), np.linspace(0, 1, len(LENGTHS)), LENGTHS))
            tokens = draw.integers(0, vocabulary, length)
            return Row(tokens, np.where(np.arange(length) < length - LEARNED, IGNORED, tokens))

        found = []
        for _ in range(self.args.steps):
            datasets = [[one_row() for _ in range(rows)] for _ in range(-(-count // len(RANKS)))]
            found.append(Step([datasets[number // len(RANKS)] for number in range(count)]))
        return found


def grow(pool: Pool, dtype: torch.dtype, phase: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a phase at each count, until memory is out; a dict with `points`, `out_of_memory_at` and `profile`."""
    found: dict[str, Any] = {"points": [], "out_of_memory_at": None, "profile": None}
    for count in map(int, args.counts.split(",")):
        found["points"] += measured(pool, dtype, phase, count, args)
        give_back(pool.model)
        if not found["points"] or found["points"][-1]["count"] != count:
            found["out_of_memory_at"] = count
            say(f"{phase}: {count} adapters: out of memory; the engine would train them in smaller packs")
            break
        say(f"{phase}: {count} adapters: {found['points'][-1]['ms']:.1f} ms/step")
    if args.profile and found["points"]:
        found["profile"] = profiled(pool, dtype, phase, found["points"][-1]["count"])
        give_back(pool.model)
    return found


def measured(pool: Pool, dtype: torch.dtype, phase: str, count: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One point of the curve, or none where memory is out."""
    ranks = [RANKS[number % len(RANKS)] for number in range(count)]
    steps = pool.steps(count, ROWS[phase])
    engine = None
    try:
        adapters = [pool.adapter(rank) for rank in ranks]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        engine = Engine(pool.model, adapters, dtype)
        engine.prepare(steps)
        ready = time.perf_counter() - began
        times = list(step_times(engine, steps))
    except torch.OutOfMemoryError:
        return []
    finally:
        if engine is not None:
            engine.close()
        del engine
    works = [work_of(step.rows[who] for step in steps) for who in range(count)]
    useful = sum(shapes.flops(args.shape, rank, work) for rank, work in zip(ranks, works, strict=True)) / len(steps)
    tokens = sum(work.tokens for work in works) / len(steps)
    seconds = statistics.median(times[min(WARM_UP, len(times) - 1) :])
    return [{
        "count": count, "ms": 1000 * seconds, "ms_per_adapter": 1000 * seconds / count, "tokens": tokens,
        "tokens_per_s": tokens / seconds, "TFLOP": useful / 1e12, "MFU": useful / seconds / args.peak / 1e12,
        "peak_GB": peak_gb(), "ready_s": ready, "times": times,
    }]  # fmt: skip


def step_times(engine: Engine, steps: list[Step]) -> Iterator[float]:
    """Seconds of each step but the first, from the end of the one before to its own, by the device's clock."""
    marks: list[Any] = []

    def after(number: int) -> None:
        if engine.on_cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    for _ in engine.train(steps, after):
        pass
    if engine.on_cuda:
        torch.cuda.synchronize()
    for before, mark in zip(marks, marks[1:], strict=False):
        yield before.elapsed_time(mark) / 1000 if engine.on_cuda else mark - before


def give_back(model: torch.nn.Module) -> None:
    """Plain layers again, also where an engine ran out of memory while it was made; and the memory."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.base)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def profiled(pool: Pool, dtype: torch.dtype, phase: str, count: int) -> dict[str, float] | None:
    """Milliseconds of a step by kind of work, from steps launched one by one, not replayed as a graph."""
    steps = pool.steps(count, ROWS[phase])
    try:
        engine = Engine(pool.model, [pool.adapter(RANKS[number % len(RANKS)]) for number in range(count)], dtype)
        groups = engine.groups
        step = sorted(steps, key=lambda one: one.shape(groups))[len(steps) // 2]
        shape = step.shape(groups)
        if engine.on_cuda:
            shape = choose_buckets([shape], 1)[0]
        batch = to_batch(step, groups, engine.device, shape)
        return device_time.by_kind(lambda: engine.step(batch), pool.args.shape, groups.width)
    except torch.OutOfMemoryError:
        say(f"{phase}: out of memory under the profiler at {count} adapters")
        return None


def show(found: dict[str, Any], phase: str, args: argparse.Namespace) -> None:
    """The table and the verdict of a phase; the verdict is added to `found`."""
    points = found["points"]
    say(f"\n{args.shape}, {phase}: {ROWS[phase]} rows per adapter and step, ranks {RANKS} in turn")
    head = ("adapters", "ms/step", "ms/adapter", "tokens/s", "MFU %", "peak GB", "ready s")
    cli.print_table(head, [
        (str(one["count"]), f"{one['ms']:.1f}", f"{one['ms_per_adapter']:.2f}", f"{one['tokens_per_s']:.0f}",
         f"{100 * one['MFU']:.1f}", f"{one['peak_GB']:.2f}", f"{one['ready_s']:.1f}") for one in points
    ])  # fmt: skip
    if found["out_of_memory_at"]:
        say(f"out of memory at {found['out_of_memory_at']} adapters")
    rises = [
        f"from {one['count']} to {two['count']} by {100 * (two['ms_per_adapter'] / one['ms_per_adapter'] - 1):.0f} %"
        for one, two in zip(points, points[1:], strict=False)
        if two["ms_per_adapter"] > SLACK * one["ms_per_adapter"]
    ]
    slower = [one["count"] for one in points if one["ms_per_adapter"] > SLACK * points[0]["ms_per_adapter"]]
    found["verdict"] = {"slower_than_alone": slower, "rises": rises}
    if points:
        alone = f"one after the other ({points[0]['ms_per_adapter']:.1f} ms each at {points[0]['count']})"
        say(f"verdict: {'SLOWER than ' + alone + f' at {slower}' if slower else 'never slower than ' + alone}; "
            f"the time per adapter {'rises ' + ', '.join(rises) if rises else 'never rises'}")  # fmt: skip
    if found["profile"]:
        device_time.show(found["profile"], args.shape, points[-1], args.peak)
