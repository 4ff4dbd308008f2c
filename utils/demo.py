"""Run the whole project once on this machine, with a small model: `make demo`.

Downloads the embedded model, trains SmolLM2-135M on Demo at rank 8, collects 16 checkpoints, verifies them, and scores
the base model and the last checkpoint on held-out questions: the base answers at chance, the checkpoint far above. Then
it names the report, a page to open in a browser. Parts that are complete are skipped. All parts are forked from one
process that imports what they need during the download.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paragen.analysis import report
from paragen.collection import evaluation, run_files
from paragen.collection.manifest import Manifest, require_manifest
from paragen.common import cli, files, paths
from paragen.common.cli import UserError, say
from paragen.recipes import lookup
from paragen.sweep import cell_worker, forked
from paragen.training import ordinary, status

DATASET, MODEL, RANK = "Demo", "smollm2-135m", 8
STEPS = "last"  # whose checkpoints are scored
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
    step("scoring the base model and the last checkpoint on held-out questions")
    call(forked.run_script, "evaluate", ["--show", str(QUESTIONS)])
    manifest = require_manifest(cell.finetune.folder)
    show_accuracies(cell.finetune.folder, manifest)
    show_table(cell.finetune.folder, manifest)
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


def show_accuracies(folder: Path, manifest: Manifest) -> None:
    """Print how many of the held-out questions the base model and the last checkpoint answer rightly."""
    scored = evaluation.shown(evaluation.read(folder, manifest))
    assert scored is not None  # the part before scored it
    last = scored["checkpoints"][-1]
    rows = [
        (name, share(score["score"], score["interval"]), share(score["likelihood_score"], score["likelihood_interval"]))
        for name, score in (("base model", scored["base"]), (f"step {last['step']}", last))
    ]
    say(f"\naccuracy on {scored['rows']} held-out questions of two options, with its 95 % interval")
    cli.print_table(("", "answers as generated", "likeliest options"), rows)


def share(value: float, interval: list[float]) -> str:
    """A share and its interval: `0.870 (0.816 to 0.910)`."""
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


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
