"""What a sweep saves against one process per phase, on tiny models, both in this run.

    .venv/bin/python bench/sweep.py [--cells 12] [--no-op 1000] [--kill 3]
    .venv/bin/python bench/sweep.py --staged [--cells 12] [--kill 1]

Makes a copy of this repository in a temporary folder with random one-layer models and recipes of a few steps; runs its
cells through train_with_rank.sh, phase after phase, then (into other folders) through the sweep, and prints both, with
the time that went into import, train and the rest. --kill SIGKILLs that many workers at random moments of the sweep.
--no-op measures the scheduler alone on cells that do nothing. --staged counts the bytes that the cells take to nodes
that share no storage, and back (see sweep_staged.py).
"""

import argparse
import json
import os
import pstats
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "utils"), str(ROOT / "tests")]

import sweep_staged  # noqa: E402

CATEGORY = "math"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a sweep against a process per phase.")
    parser.add_argument("--cells", type=int, default=12)
    parser.add_argument("--no-op", type=int, default=1000, help="cells that do nothing, for the scheduler's own cost")
    parser.add_argument("--kill", type=int, default=0, help="workers to kill at random moments; a node with --staged")
    parser.add_argument("--sweep-only", action="store_true", help="leave out the process per phase")
    parser.add_argument("--staged", action="store_true", help="count the bytes to and from nodes, and nothing else")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sweep bench ") as folder:
        top = make_repository(Path(folder), args.cells)
        cells = len(RANKS) * len(list((top / "collect_scripts" / CATEGORY).iterdir()))
        if args.staged:
            sweep_staged.measure(top, CATEGORY, cells, environment(), bool(args.kill))
            return
        alone = None
        if not args.sweep_only:
            alone = process_per_phase(top)
            (top / "saves").rename(top / "alone")
            print(f"one process per phase: {cells} cells in {alone:.1f} s on {os.cpu_count()} cores", flush=True)
        swept = sweep(top, args.kill)
        print(f"sweep: {cells} cells in {swept:.1f} s, {whole(top)} collections whole", flush=True)
        if alone:
            print(f"the sweep is {alone / swept:.1f} times as fast")
            for what, seconds in where_time_goes(top).items():
                print(f"  of a phase in a process of its own: {seconds:5.1f} s {what}")
        if args.no_op:
            print(f"scheduler: {1000 * no_op(top, args.no_op):.1f} ms per cell at {args.no_op} no-op cells")


def make_repository(top: Path, cells: int) -> Path:
    """A copy of this repository's scripts with recipe pairs for tiny models: six ranks per dataset and model."""
    from helpers import tiny

    shutil.copytree(ROOT / "utils", top / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.in", "requirements.txt"):
        shutil.copy(ROOT / name, top)
    (top / ".venv").symlink_to(ROOT / ".venv")
    (top / "models").mkdir()
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    subprocess.run([sys.executable, ROOT / "tests" / "helpers" / "tiny.py", top / "models" / "Tiny-One"], check=True)
    (top / "data" / CATEGORY).mkdir(parents=True)
    info = {}
    for number in range(-(-cells // len(RANKS))):
        dataset = f"Set-{number}"
        rows = [{"prompt": f"{dataset} {row}", "response": "[A]", "system": ""} for row in range(64)]
        (top / "data" / CATEGORY / f"{dataset}.json").write_text(json.dumps(rows))
        columns = {"prompt": "prompt", "response": "response", "system": "system"}
        info[dataset] = {"file_name": f"{CATEGORY}/{dataset}.json", "columns": columns}
        folder = top / "collect_scripts" / CATEGORY / dataset
        folder.mkdir(parents=True)
        for phase, ending in (("pretrain", tiny.PRETRAIN), ("finetune", tiny.FINETUNE.format(model="Tiny-One"))):
            text = tiny.RECIPE.format(phase=phase, model="Tiny-One") + ending
            text = text.replace("Toy", dataset).replace("common-sense-reasoning", CATEGORY)
            (folder / f"tiny-one_{dataset}_{phase}.yaml").write_text(text)
    (top / "data" / "dataset_info.json").write_text(json.dumps(info))
    return top


RANKS = (2, 3, 4, 5, 6, 8)


def environment() -> dict[str, str]:
    """Of every run. What is measured is the sweep, so that both train a cell at a time unless ENGINE says otherwise."""
    engine = os.environ.get("ENGINE") or "stock"
    ranks = " ".join(map(str, RANKS))
    return {**os.environ, "DEVICES": "cpu", "OMP_NUM_THREADS": "1", "RANK": ranks, "ENGINE": engine}


def process_per_phase(top: Path) -> float:
    """Seconds for all cells, each phase through train_with_rank.sh."""
    started = time.monotonic()
    for folder in sorted((top / "collect_scripts" / CATEGORY).iterdir()):
        for rank in RANKS:
            for phase in ("pretrain", "finetune"):
                recipe = folder / f"tiny-one_{folder.name}_{phase}.yaml"
                command = ["bash", top / "utils" / "train_with_rank.sh", recipe, str(rank)]
                subprocess.run(command, env=environment(), check=True, capture_output=True)
    return time.monotonic() - started


def sweep(top: Path, kills: int) -> float:
    """Seconds for all cells through the sweep, verification included."""
    started = time.monotonic()
    command = [sys.executable, top / "utils" / "collect_all.py", CATEGORY]
    with open(top / "sweep.log", "wb") as log:
        run = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        threading.Thread(target=kill_workers, args=(run, kills), daemon=True).start()
        status = run.wait()
    print(*(line for line in (top / "sweep.log").read_text().splitlines() if "again" in line), sep="\n")
    if status:
        sys.exit((top / "sweep.log").read_text())
    return time.monotonic() - started


def kill_workers(run: subprocess.Popen, count: int) -> None:
    """SIGKILL `count` of the sweep's workers at random moments."""
    import psutil

    for _ in range(count):
        time.sleep(random.uniform(20, 60))
        workers = [p for p in psutil.Process(run.pid).children(recursive=True) if "CellWorker" in " ".join(p.cmdline())]
        if workers:
            os.kill(random.choice(workers).pid, signal.SIGKILL)


def whole(top: Path) -> int:
    """How many collections verify and can be indexed; raises when one does not."""
    python, counts = sys.executable, []
    for script, mark in (("verify.py", "whole "), ("index.py", CATEGORY)):
        command = [python, top / "utils" / script]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        counts.append(done.stdout.count(mark))
    assert counts[0] == counts[1], counts
    return counts[0]


def where_time_goes(top: Path) -> dict[str, float]:
    """Seconds of one phase by what it does, under Python's profiler, which makes all of it a little slower."""
    recipe = next((top / "collect_scripts" / CATEGORY).glob("*/*_pretrain.yaml"))
    profile = top / "profile"
    command = [
        sys.executable,
        "-m",
        "cProfile",
        "-o",
        profile,
        top / "utils" / "train.py",
        recipe,
        "7",
    ]
    started = time.monotonic()
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    whole = time.monotonic() - started
    stats = pstats.Stats(str(profile)).stats
    # an import within an import is counted in both: the outermost, which is the largest, counts
    named = {
        "import": ("_find_and_load",),
        "load": ("load_model", "load_tokenizer"),
        "tokenise": ("get_dataset",),
        "train": ("_inner_training_loop",),
        "write": ("save_model", "draw_loss", "publish_folder", "tidy"),
    }
    found = {
        what: sum(max((row[3] for key, row in stats.items() if key[2] == name), default=0.0) for name in names)
        for what, names in named.items()
    }
    return {**found, "the rest": whole - sum(found.values())}


class NoOp:
    """A worker whose cells take no time."""

    def __init__(self, settings, devices):
        pass

    def ready(self):
        pass

    def collect(self, pack, packed, halved):
        from paragen.training.outcome import Outcome

        return [Outcome("done")] * len(pack)

    def stop(self):
        pass


def no_op(top: Path, count: int) -> float:
    """Seconds per cell that the scheduler itself takes."""
    code = (
        "import sys, time; sys.path[:0] = ['utils', %r]\n"
        "import bench_sweep as bench\nfrom dataclasses import replace\n"
        "from paragen.recipes import lookup\nfrom paragen.sweep import sweep\n"
        "cells = [replace(cell, rank=rank) "
        "for cell in lookup.chosen_cells()[:1] for rank in range(1, %d)]\n"
        "times = []\n"
        "note = lambda event, *_: event in ('ray', 'workers') or times.append(time.monotonic())\n"
        "sweep.run(cells, note, bench.NoOp)\n"
        "print((times[-1] - times[0]) / len(cells))"
    )
    shutil.copy(__file__, top / "bench_sweep.py")
    done = subprocess.run(
        [sys.executable, "-c", code % (str(top), count + 1)],
        cwd=top, env={**environment(), "PYTHONPATH": os.pathsep.join([str(top), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
