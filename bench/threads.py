"""A training step on the CPU by its number of threads, alone and while another process keeps one of the cores busy.

    taskset --cpu-list 0,1 .venv/bin/python bench/threads.py [--rows 1] [--tokens 150] [--seconds 12]

The model has SmolLM2-135M's shape, random weights and a LoRA of rank 8, in float32. Threads that wait for each other
sleep (OMP_WAIT_POLICY=PASSIVE), as in this repository's runs, or spin, as PyTorch has it by default.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from paragen.common import cli, devices

SHAPE = "smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training steps by their number of CPU threads.")
    parser.add_argument("--rows", type=int, default=1, help="rows in a step")
    parser.add_argument("--tokens", type=int, default=150, help="tokens in a row")
    parser.add_argument("--seconds", type=float, default=12, help="how long each case is measured")
    parser.add_argument("--shape", default=SHAPE, help="a key of shapes.SHAPES")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args)
        return
    cores = devices.physical_cores()
    cases = [(1, "PASSIVE")] + [(n, how) for n in sorted({cores - 1, cores} - {0, 1}) for how in ("PASSIVE", "ACTIVE")]
    rows = []
    for threads, how in cases:
        name = f"{threads} of {cores}{'' if threads == 1 else ', sleeping' if how == 'PASSIVE' else ', spinning'}"
        rows.append((name, run(threads, how, busy=False), run(threads, how, busy=True)))
    cli.print_table(("threads", "alone", "beside a busy process"), rows)


def run(threads: int, how: str, busy: bool) -> str:
    """Measure one case in a process of its own; returns its seconds per step as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("OMP_WAIT_POLICY", None)
    if how == "PASSIVE":
        environment["OMP_WAIT_POLICY"] = how
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, *sys.argv, "--child"]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    finally:
        if other is not None:
            other.kill()
            other.wait()


def measure(args: argparse.Namespace) -> None:
    """Train for some seconds and print the median and the longest step, and the CPU seconds of a step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from shapes import SHAPES
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        Qwen2ForCausalLM(Qwen2Config(**SHAPES[args.shape])), LoraConfig(r=8, target_modules="all-linear")
    )
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    tokens = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.rows, args.tokens))

    def step() -> float:
        started = time.monotonic()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.monotonic() - started

    step()  # warms up
    began, used, took = time.monotonic(), time.process_time(), [step()]
    while time.monotonic() - began < args.seconds or len(took) < 3:
        took.append(step())
    cpu = (time.process_time() - used) / len(took)
    print(f"{statistics.median(took):.2f} s, at most {max(took):.2f} ({cpu:.2f} s of CPU)")


if __name__ == "__main__":
    cli.run(main)
