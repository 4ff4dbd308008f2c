"""Run the whole project once on this machine, with a small model: `make demo`.

Downloads the embedded model, trains SmolLM2-135M on Demo at rank 8, collects 16 checkpoints, verifies them, and scores
the base model and four checkpoints on held-out questions. Then it names the report, a page to open in a browser. Parts
that are complete are skipped. All parts are forked from one process that imports what they need during the download.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paragen.analysis import report
from paragen.collection import run_files
from paragen.collection.manifest import Manifest, require_manifest
from paragen.common import cli, files, paths
from paragen.common.cli import UserError, say
from paragen.recipes import lookup
from paragen.sweep import cell_worker, forked
from paragen.training import ordinary, status

DATASET, MODEL, RANK = "Demo", "smollm2-135m", 8
STEPS = "every:5"  # whose checkpoints are scored
QUESTIONS = 2  # whose answers are printed
IGNORED_SETTINGS = (
    "MODELS",
    "RANKS",
    "KEEP",
    "SEED",
    "SPLIT",
    "LIMIT",
    "ENGINE",
    "CATEGORY",
    "FORCE",
)  # of other targets
STARTED = time.monotonic()


def main() -> None:
    os.environ |= dict.fromkeys(IGNORED_SETTINGS, "")
    os.environ |= {"DATASET": DATASET, "MODEL": MODEL, "RANK": str(RANK), "STEPS": STEPS}
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    forked.preload()
    step("downloading the base model")
    if cli.call([sys.executable, paths.UTILS / "fetch_model.py", MODEL]):
        raise UserError("the demo stopped at this part; see the cause above")
    step("training and collecting")
    cell = lookup.find_cell(DATASET, MODEL, RANK)
    if not status.is_done(cell):
        for run in cell.runs:
            call(ordinary.train, run)
    call(cell_worker.verify_runs, [cell.finetune])
    step("scoring the base model and four checkpoints on held-out questions")
    call(forked.run_script, "evaluate", ["--show", str(QUESTIONS)])
    show_table(cell.finetune.folder, require_manifest(cell.finetune.folder))
    step("drawing the report")
    call(forked.run_script, "report", [])
    say(f"\nthe demo took {time.monotonic() - STARTED:.0f} s")
    say(f"open it in a browser: {paths.relative(report.page_of())}")


def step(what: str) -> None:
    """Print the name of the next part, and how long the demo has taken so far."""
    say(f"\n=== {what} ({time.monotonic() - STARTED:.0f} s)")


def call(task: Callable[..., Any], *arguments: Any) -> None:
    """Run a task in a process forked from one that has imported; its output goes to this one's."""
    process = forked.start(task, arguments, {}, None)
    try:
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
    if process.exitcode:
        raise UserError("the demo stopped at this part; see the cause above")


def show_table(folder: Path, manifest: Manifest) -> None:
    """Print what was collected: place, size, losses, and how to load a checkpoint."""
    entries = manifest.checkpoints
    steps = manifest.steps
    assert manifest.pretrain is not None  # its recipe resumes one
    losses = [entry.loss for entry in entries if entry.loss is not None]
    log = folder.with_name(manifest.pretrain.run) / run_files.LOG
    first = json.loads(log.read_text().splitlines()[0]) if log.is_file() else {}
    table = {
        "collected": f"{len(entries)} checkpoints of rank {manifest.rank}, steps {steps[0]} to {steps[-1]}",
        "of": f"{manifest.base_name} on {manifest.dataset} ({manifest.trained_rows} prompts)",
        "in": paths.relative(folder),
        "size": f"{files.size_of(folder.iterdir()) / 1e6:.1f} MB, {entries[0].bytes / 1e6:.1f} MB each",
        "loss": f"{first.get('loss', entries[0].loss):.3f} first, {entries[-1].loss:.3f} last, "
        f"{sum(losses) / len(losses):.3f} mean of the kept steps",
    }
    print()
    for name, value in table.items():
        print(f"{name:10} {value}")
    print(f"""
load one in Python:
  from safetensors.torch import load_file
  tensors = load_file("{paths.relative(folder)}/{entries[-1].file_name}")
  print(len(tensors), "tensors, such as", *next((name, tuple(t.shape)) for name, t in tensors.items()))""")


if __name__ == "__main__":
    cli.run(main)
