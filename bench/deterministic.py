"""What deterministic kernels cost of a step of the packed engine: with and without them by turns, in one process.

    python bench/deterministic.py [--shape qwen2.5-0.5b] [--tokens 300,1024] [--adapters 10] [--rows 2]

The model has random weights. Every row has as many tokens as --tokens says; the last quarter has a loss. Each case is
trained --rounds times from the same start, and the last column says whether all of these ended with the same bits. It
needs a GPU to mean anything; --tiny rehearses it on any machine.
"""

import argparse
import hashlib
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from shapes import SHAPES

from paragen.common import cli

KINDS = {"fastest": "0", "deterministic": "1"}  # and the value of DETERMINISTIC
TINY = {"shape": "tiny", "tokens": "40,60", "adapters": 2, "steps": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what deterministic kernels cost.")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--tokens", default="300,1024", help="tokens in a row, a case each (default: %(default)s)")
    parser.add_argument("--adapters", type=int, default=10, help="in the pack, of rank 8 (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="rows of each in a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind, by turns (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: a tiny model, few steps")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    os.environ["DETERMINISTIC"] = "1"
    from paragen.training import deterministic

    deterministic.choose_kernels()  # sets cuBLAS's workspace for the whole process, so for both kinds
    import packed_grow
    import shapes
    import torch

    from paragen.packed.model import use_fused_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = shapes.random_model(args.shape, device, "bfloat16" if device == "cuda" else "float32")
    model.requires_grad_(False)
    use_fused_kernels(model)  # as runs do
    pool = packed_grow.Pool(model, args)
    lines = [line for tokens in args.tokens.split(",") for line in measured(pool, int(tokens), args)]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    cli.say(f"{name}, {args.shape}, {args.adapters} adapters of rank 8, {args.rows} rows each")
    cli.print_table(("tokens", "kernels", "ms/step", "cost", "same bits"), lines)


def measured(pool: Any, tokens: int, args: argparse.Namespace) -> list[tuple[str, ...]]:
    """The lines of the table for rows of so many tokens."""
    from paragen.training import deterministic

    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    ends: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for _ in range(args.rounds):
        for kind, value in KINDS.items():
            os.environ["DETERMINISTIC"] = value
            deterministic.choose_kernels()
            taken, end = round_of(pool, tokens, args)
            times[kind] += taken
            ends[kind].add(end)
    plain, lines = statistics.median(times["fastest"]), []
    for kind in KINDS:
        found = statistics.median(times[kind])
        same = "yes" if len(ends[kind]) == 1 else f"no, {len(ends[kind])} ends in {args.rounds} rounds"
        lines.append((str(tokens), kind, f"{1000 * found:.2f}", f"{100 * (found / plain - 1):+.1f} %", same))
    return lines


def round_of(pool: Any, tokens: int, args: argparse.Namespace) -> tuple[list[float], str]:
    """Train a new pack; the seconds of its steps after the warm-up, and a hash of the adapters at its end."""
    import numpy as np
    import packed_grow
    import torch

    from paragen.packed.batches import IGNORED, Row, Step
    from paragen.packed.engine import Engine

    draw, words = np.random.default_rng(0), SHAPES[args.shape]["vocab_size"]
    unlearned = np.arange(tokens) < tokens - tokens // 4

    def row() -> Row:
        drawn = draw.integers(0, words, tokens)
        return Row(drawn, np.where(unlearned, IGNORED, drawn))

    steps = [Step([[row() for _ in range(args.rows)] for _ in range(args.adapters)]) for _ in range(args.steps)]
    dtype = torch.bfloat16 if pool.model.device.type == "cuda" else torch.float32
    engine = Engine(pool.model, [pool.adapter(8) for _ in range(args.adapters)], dtype)
    try:
        taken = list(packed_grow.step_times(engine, steps))[min(packed_grow.WARM_UP, args.steps // 2) :]
        adapters = b"".join(vector.detach().cpu().numpy().tobytes() for vector in engine.vectors)
    finally:
        engine.close()
        packed_grow.give_back(pool.model)
    return taken, hashlib.sha256(adapters).hexdigest()


if __name__ == "__main__":
    cli.run(main)
