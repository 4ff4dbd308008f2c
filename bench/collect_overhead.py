"""What saving a checkpoint after every step costs: our collector and stock LLaMA-Factory, each beside no saving.

    python bench/collect_overhead.py [--steps 48] [--rank 8] [--rounds 2] [--random-qwen] [--no-stock]

Trains the Demo finetune recipe, without its pretrain, once per way of saving and round, each in a process of its own.
Within a run, blocks of steps that save take turns with blocks that do not, so that both see the same machine.
--random-qwen takes random weights of Qwen2.5-0.5B's shape instead of SmolLM2-135M (for a GPU). Prints a table, no pass
or fail; everything is written to a temporary folder and removed.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from shapes import tokenizer_source, write_random

from paragen.common import cli, devices, paths
from paragen.model import base_models
from paragen.recipes import lookup, render

WARM_UP = 4  # steps at the start that no median counts
BLOCK = 6  # steps; the first of a block is not counted, since writing what was saved before may reach into it
OURS = "our collector"
WAYS = {
    OURS: {"save_strategy": "no"},
    "stock, save_only_model": {"save_steps": 1, "save_only_model": True},
    "stock, optimizer states too": {"save_steps": 1, "save_only_model": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what collecting costs per step.")
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps per run (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="runs per way, taken in turns (default: %(default)s)")
    parser.add_argument("--random-qwen", action="store_true", help="random weights of Qwen2.5-0.5B's shape")
    parser.add_argument("--no-stock", action="store_true", help="measure our collector alone")
    args = parser.parse_args()
    # LLaMA-Factory asks the GPU for its type while it is imported, and CUDA cannot be used again in a fork after that.
    context = multiprocessing.get_context("spawn" if devices.nvidia_driver() else "forkserver")
    context.set_forkserver_preload(["llamafactory.train.tuner"])
    measured = {way: [] for way in WAYS if way == OURS or not args.no_stock}
    with tempfile.TemporaryDirectory(prefix="collect_overhead_") as top:
        base = paths.MODELS / base_models.table()["smollm2-135m"]["folder"]
        if args.random_qwen:
            base = Path(top, "Qwen2.5-0.5B-random")
            in_process(context, write_random, "qwen2.5-0.5b", str(base), str(tokenizer_source()))
        for _ in range(args.rounds):
            for way, results in measured.items():
                result = Path(top, "result.json")
                in_process(context, measure, way, str(base), args.steps, args.rank, top, str(result))
                results.append(json.loads(result.read_text()))
    print_table(measured, base, args)


def in_process(context, function, *arguments) -> None:
    """Run a function in a process of its own; leave with an error when it fails."""
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        cli.fail(f"{function.__name__}{arguments} failed with status {process.exitcode}")


def measure(way: str, base: str, steps: int, rank: int, top: str, result: str) -> None:
    """Train once; write the times (ms) of the steps that save and of those that do not as JSON to `result`."""
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    wanted = devices.choose()
    devices.pin(wanted)
    from llamafactory.train.tuner import run_exp

    from paragen.training.collector import Collector, Rules

    recipe = lookup.find("Demo", "smollm2-135m", "finetune")
    out = Path(top, "out")
    out.mkdir()
    config = render.render(recipe, rank)
    arguments = {**config, "resume_from_checkpoint": None, "save_total_limit": None, "plot_loss": False}
    arguments |= {"model_name_or_path": base, "max_steps": steps, "output_dir": str(out), **WAYS[way]}
    arguments |= {"dataset_dir": str(paths.DATA), **devices.settings(wanted)}
    collector = Collector(out, steps) if way == OURS else None
    turns = make_turns(collector)
    run_exp(arguments, [Rules(config), turns, *([collector] if collector else [])])
    saved = [path for path in out.rglob("*") if path.is_file() and "checkpoint-" in str(path.relative_to(out))]
    saving_steps = len({path.relative_to(out).parts[0] for path in saved})
    size = sum(path.stat().st_size for path in saved) / saving_steps / 1e6
    Path(result).write_text(json.dumps({**turns.times, "saved_MB": size, "device": devices.describe()}))
    shutil.rmtree(out)


def make_turns(collector):
    """A trainer callback that lets blocks of steps save and not save in turn, and notes each step's time."""
    import torch
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        times = {"saving": [], "plain": []}

        def on_step_begin(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now, step = time.perf_counter(), state.global_step
            if step > WARM_UP and (step - 1) % BLOCK:
                self.times["saving" if self.saves else "plain"].append(1000 * (now - self.began))
            self.saves = (step // BLOCK) % 2 == 0
            self.began = now
            if collector:
                collector.first = 0 if self.saves else sys.maxsize

        def on_step_end(self, args, state, control, **kwargs):
            if not self.saves:
                control.should_save = False
            return control

        def on_train_end(self, args, state, control, **kwargs):
            if collector:
                collector.first = 0

    return Turns()


def print_table(measured: dict[str, list[dict]], base: Path, args: argparse.Namespace) -> None:
    """Print the median step with and without saving per way, over all rounds."""
    device = measured[OURS][0]["device"]
    print(f"\n{base.name}, rank {args.rank}, {args.rounds} rounds of {args.steps} steps, {device}")
    print(f"{'way of saving':30}{'ms/step, not saving':>21}{'ms/step, saving':>17}{'cost':>9}{'MB/checkpoint':>15}")
    for way, rounds in measured.items():
        plain, saving = (statistics.median(ms for one in rounds for ms in one[kind]) for kind in ("plain", "saving"))
        cost = f"{100 * (saving / plain - 1):+.1f} %"
        print(f"{way:30}{plain:21.1f}{saving:17.1f}{cost:>9}{rounds[0]['saved_MB']:15.1f}")


if __name__ == "__main__":
    cli.run(main)
