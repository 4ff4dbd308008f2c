"""The list of commands behind bench/README.md's tables of generators, one after the other, with the time of each.

    .venv/bin/python bench/generator_tables.py FOLDER [--rows 1120] [--made-rows 1200] [--seconds 1500]
        [--settings "TRAIN_STEPS=100 BASE_STEPS=1200"] [--baselines none] [--per-device 3] [--tables real rules]

From prepared files in FOLDER (see bench/generator.py) to the report, in a clone of the repository, whose data and saves
it fills. saves/benchmarks/commands.json records what is done: a call that was killed, or stopped after --seconds, is
continued by the next one, also within a command. Python is .venv's, or that of PY in the environment.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from generator import TASKS, name_of

from paragen.analysis import benchmark_page
from paragen.common import cli, files, paths
from paragen.common.cli import UserError, say

MODEL = "smollm2-135m"
TABLES = ["real", "variants", "rules"]
STOPPED = 128 + signal.SIGINT


def commands(args: argparse.Namespace, made: Sequence[str]) -> list[list[str]]:
    """The commands in order.

    Args:
        args: of the command line.
        made: the names of the made tasks, as far as they are there.
    """
    real = [name_of(task, args.rows) for task in TASKS if task.dataset != "PIQA"]
    cells = [f"MODEL={MODEL}", "RANK=8", "KEEP=8"]
    rows = [f"ROWS={args.made_rows}"] if args.made_rows else []
    table = [
        "make",
        "benchmark-generator",
        f"MODEL={MODEL}",
        "RANK=8",
        "STEPS=every:2",
        f"PER_DEVICE={args.per_device}",
    ]
    table += [*args.settings.split(), f"BASELINES={args.baselines}"]
    prepare = [str(Path(__file__).with_name("generator.py")), str(args.folder), "--rows", str(args.rows)]
    tables = {
        "real": [f"DATASET={' '.join(real)}", "LIMIT=240", "LOSS_ONLY=math"],
        "variants": ["CATEGORY=made", "VARIANTS=1 3 6 12", "LIMIT=64", "SAMPLES=2"],
        "rules": ["CATEGORY=made", "LIMIT=64", "SAMPLES=2", "REPEATS=1"],
    }
    return [
        ["make", "model", f"MODEL={MODEL}"],
        [sys.executable, *prepare, "--model", MODEL],
        ["make", "made-tasks", f"MODEL={MODEL}", *rows],
        ["make", "collect-all", "CATEGORY=all", f"DATASET={' '.join([*real, *made])}", *cells],
        ["make", "verify", "CATEGORY=all"],
        *([*table, *tables[name]] for name in args.tables),
        ["make", "report"],
    ]


def run(command: list[str], seconds: float) -> int:
    """Run a command; returns its status. After `seconds` it is interrupted, as by Ctrl-C, and ends by itself."""
    process = subprocess.Popen(command, cwd=paths.ROOT, start_new_session=True)
    try:
        return process.wait(max(0.0, seconds))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait()
        return STOPPED


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="prepared files, at any depth")
    parser.add_argument("--rows", type=int, default=4000, help="rows of a real task to train on, at most")
    parser.add_argument("--made-rows", type=int, help="rows of a made task to train on (default: make made-tasks's)")
    parser.add_argument("--settings", default="TRAIN_STEPS=100 BASE_STEPS=1200", help="of generators: %(default)s")
    parser.add_argument("--baselines", default="none", help="BASELINES (default: %(default)s)")
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES, help="which, and in which order")
    parser.add_argument("--per-device", type=int, default=3, help="processes on a device (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    deadline, record = time.monotonic() + args.seconds, paths.SAVES / benchmark_page.FOLDER / "commands.json"
    done = json.loads(record.read_bytes()) if record.exists() else []
    for number in range(len(done), len(commands(args, []))):
        made = sorted(path.name for path in (paths.SCRIPTS / paths.MADE).glob("made-*"))
        command = commands(args, made)[number]
        began = time.monotonic()
        status = run(command, deadline - began)
        say(f"{time.monotonic() - began:.1f} s, status {status}: {shlex.join(command)[:150]}")
        if status:
            why = "there was no more time" if status == STOPPED else f"status {status}"
            raise UserError(f"stopped in command {number + 1} of {len(commands(args, []))} ({why}); call this again")
        done.append([round(time.monotonic() - began, 1), shlex.join(command)])
        record.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(record, done)
    cli.print_table(("seconds", "command"), [(f"{seconds:.1f}", text[:100]) for seconds, text in done])


if __name__ == "__main__":
    cli.run(main)
