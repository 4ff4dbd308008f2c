"""What saving a checkpoint after every step costs: our collector and stock LLaMA-Factory beside no saving at all.

    python bench/collect_overhead.py [--steps 40] [--rank 8] [--rounds 3] [--random-qwen]

Trains the Demo finetune recipe, without its pretrain, once per way of saving and round, each in a process forked from
one that has imported LLaMA-Factory. --random-qwen takes random weights of Qwen2.5-0.5B's shape instead of SmolLM2-135M
(for a GPU). Prints a table, no pass or fail; everything is written to a temporary folder and removed.
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

import cells
import cli
import devices
import models
import paths
import rank_config

WARM_UP = 5  # steps left out of the medians
WAYS = {
    "no saving": {"save_strategy": "no"},
    "our collector": {"save_strategy": "no"},
    "stock, save_only_model": {"save_steps": 1, "save_only_model": True},
    "stock, optimizer states too": {"save_steps": 1, "save_only_model": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what collecting costs per step.")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps per run (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="runs per way, taken in turns (default: %(default)s)")
    parser.add_argument("--random-qwen", action="store_true", help="random weights of Qwen2.5-0.5B's shape")
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llamafactory.train.tuner"])
    with tempfile.TemporaryDirectory(prefix="collect_overhead_") as top:
        base = paths.MODELS / models.KNOWN["smollm2-135m"][0]
        if args.random_qwen:
            base = Path(top, "Qwen2.5-0.5B-random")
            in_process(context, make_random_qwen, str(base), str(tokenizer_source()))
        measured = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                result = Path(top, "result.json")
                in_process(context, measure, way, str(base), args.steps, args.rank, top, str(result))
                measured[way].append(json.loads(result.read_text()))
        print_table(measured, base, args)


def in_process(context, function, *arguments) -> None:
    """Run a function in a fresh fork; leave with an error when it fails."""
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        cli.fail(f"{function.__name__}{arguments} failed with status {process.exitcode}")


def tokenizer_source() -> Path:
    """A folder with a tokenizer for the random model: the embedded model's, or TOKENIZER."""
    return Path(os.environ.get("TOKENIZER", paths.MODELS / models.KNOWN["smollm2-135m"][0]))


def make_random_qwen(folder: str, tokenizer: str) -> None:
    """Write random bfloat16 weights of Qwen2.5-0.5B's shape (0.49 B parameters) and a tokenizer to `folder`."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def measure(way: str, base: str, steps: int, rank: int, top: str, result: str) -> None:
    """Train once and write the steps' times (ms) and the bytes saved per step as JSON to `result`."""
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    wanted = devices.choose()
    devices.pin(wanted)
    from llamafactory.train.tuner import run_exp

    from collector import Collector, Rules

    recipe = cells.find("Demo", "smollm2-135m", "finetune")
    out = Path(top, "out")
    out.mkdir()
    config = rank_config.render(recipe, rank)
    arguments = {**config, "resume_from_checkpoint": None, "save_total_limit": None, "plot_loss": False}
    arguments |= {"model_name_or_path": base, "max_steps": steps, "output_dir": str(out), **WAYS[way]}
    arguments |= {"dataset_dir": str(paths.DATA), **devices.settings(wanted)}
    times: list[float] = []
    callbacks = [make_timer(times), Rules()] + ([Collector(out, steps)] if way == "our collector" else [])
    run_exp(arguments, callbacks)
    step_times = [after - before for before, after in zip(times, times[1:], strict=False)][WARM_UP:]
    saved = [path for path in out.rglob("*") if path.is_file() and "checkpoint-" in str(path.relative_to(out))]
    Path(result).write_text(json.dumps({
        "steps_ms": [1000 * seconds for seconds in step_times],
        "saved_MB": sum(path.stat().st_size for path in saved) / steps / 1e6,
        "device": devices.describe(),
    }))  # fmt: skip
    shutil.rmtree(out)


def make_timer(times: list[float]):
    """A trainer callback that notes when each step begins, the device idle; a step's time includes its saving."""
    import torch
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        def on_train_end(self, args, state, control, **kwargs):
            self.on_step_begin(args, state, control)

    return Timer()


def print_table(measured: dict[str, list[dict]], base: Path, args: argparse.Namespace) -> None:
    """Print the median step per way over all rounds, and how much it is above no saving."""
    device = measured["no saving"][0]["device"]
    print(f"\n{base.name}, rank {args.rank}, {args.rounds} rounds of {args.steps} steps, {device}")
    print(f"{'way of saving':30}{'median ms/step':>16}{'over no saving':>16}{'mean ms/step':>14}{'MB/checkpoint':>15}")
    steps = {way: [ms for one in rounds for ms in one["steps_ms"]] for way, rounds in measured.items()}
    plain = statistics.median(steps["no saving"])
    for way, times in steps.items():
        median, mean = statistics.median(times), statistics.mean(times)
        over = f"{100 * (median / plain - 1):+.1f} %"
        print(f"{way:30}{median:16.1f}{over:>16}{mean:14.1f}{measured[way][0]['saved_MB']:15.1f}")


if __name__ == "__main__":
    cli.run(main)
