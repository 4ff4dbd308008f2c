"""packed.py cpu: the packed engine beside the ordinary path's cells one after the other, SmolLM2-135M on Demo.

Both run as the sweep runs them, in processes forked from one that has imported what they need; the CPU time that they
used is told, too, for a machine that others use at the same time.
"""

import argparse
import importlib
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import scratch
import shapes

from paragen.common import cli
from paragen.common.cli import UserError, say

DATASET, LIKE, MODEL = "Demo", "smollm2-135m", "SmolLM2-135M-Instruct-Q4_1"
RANKS = (2, 4, 8, 16, 64)


def run(args: argparse.Namespace, top: Path) -> int:
    """Measure, print a table, write the raw numbers to args.out."""
    base = shapes.ROOT / "models" / MODEL
    if not base.is_dir():
        raise UserError(f"{base}: no such model; bring it with: make model MODEL={LIKE}")
    ranks = [RANKS[number % len(RANKS)] for number in range(args.cells)]
    if len(set(ranks)) < len(ranks):
        raise UserError(f"--cells {args.cells}: at most {len(RANKS)}, one per rank of {RANKS}")
    scratch.make(top, DATASET, shapes.ROOT / "data" / scratch.CATEGORY / "Demo_train.json")
    (top / "models" / MODEL).symlink_to(base.resolve())
    recipes = scratch.write_recipes(top, LIKE, DATASET, MODEL, args.steps, args.steps)
    os.environ |= {"DEVICES": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import llamafactory.train.tuner  # noqa: F401  what the forked processes find imported

    found: dict[str, Any] = {"ranks": ranks, "steps": args.steps, "one after the other": [], "packed": []}
    for rank in ranks:
        for recipe in recipes:
            log = top / f"rank {rank} {recipe.stem}.log"
            found["one after the other"].append(forked("train", [str(recipe), str(rank)], "stock", log))
        say(f"rank {rank}: {sum(one['seconds'] for one in found['one after the other'][-2:]):.1f} s")
    (top / "saves").rename(top / "stock saves")
    cells = [str(word) for rank in ranks for word in ("--cell", *recipes, rank)]
    found["packed"].append(forked("paragen.packed.packed_train", cells, "packed", top / "packed.log"))
    scratch.write_json(args.out, found)
    show(found)
    return 0


def forked(script: str, arguments: list[str], engine: str, log: Path) -> dict[str, float]:
    """Run one of utils' scripts in a forked process; its wall clock and user CPU `seconds` and `user`."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=call, args=(script, arguments, engine, str(log)))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{log.read_text(errors='replace')[-4000:]}\nerror: {script} failed with status {process.exitcode}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    return {"seconds": time.monotonic() - began, "user": used}


def call(script: str, arguments: list[str], engine: str, log: str) -> None:
    """In a forked process: a script's main, its output in a log."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ["ENGINE"] = engine
    sys.argv = [script, *arguments]
    cli.run(importlib.import_module(script).main)


def show(found: dict[str, Any]) -> None:
    """The table and the verdict."""
    cells = len(found["ranks"])
    say(f"\nSmolLM2-135M on Demo, ranks {found['ranks']}, {found['steps']} steps of each phase, CPU")
    totals = {way: {key: sum(one[key] for one in found[way]) for key in ("seconds", "user")}
              for way in ("one after the other", "packed")}  # fmt: skip
    cli.print_table(("way", "s per cell", "user CPU s per cell"), [
        (way, f"{one['seconds'] / cells:.2f}", f"{one['user'] / cells:.2f}") for way, one in totals.items()
    ])  # fmt: skip
    one, packed = totals["one after the other"], totals["packed"]
    say(
        f"packed is {one['seconds'] / packed['seconds']:.2f} times as fast by the clock, "
        f"{one['user'] / packed['user']:.2f} times by CPU time"
    )
