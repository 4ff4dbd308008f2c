"""Collect every cell of a category: the implementation behind each collect_all_dataset.sh and `make collect-all`.

    [MODELS="m1 m2"] [RANKS="2 8"] [PRUNE_PRETRAIN=1] [FORCE=1] python utils/collect_all.py CATEGORY [DATASET ...]

Shows what it will do, then runs collect.py for each cell that is not complete, each into a log of its own beside its
run folder. A cell that fails does not stop the others. Stopped or killed, the next call goes on. Ends with a table;
status 1 when a cell failed. PRUNE_PRETRAIN=1 removes a cell's pretrain folder once its collection has been verified.
"""

import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import cli
import collection
import files
import models
import paths
import rank_config
import run_identity
import status
from cli import UserError, say
from status import Cell

PRETRAIN_FACTOR = (
    4  # a resumable checkpoint holds the adapter and the optimizer's two moments; the last one may stand twice
)


def main() -> int:
    if len(sys.argv) < 2:
        raise UserError("usage: collect_all.py CATEGORY [DATASET ...]")
    chosen = status.chosen_cells(sys.argv[1], sys.argv[2:])
    to_do = show_plan(chosen)
    outcomes = {}
    started = time.monotonic()
    for number, cell in enumerate(to_do, 1):
        outcomes[cell] = collect(cell, f"[{number}/{len(to_do)}]")
        elapsed = time.monotonic() - started
        left = timedelta(seconds=round(elapsed / number * (len(to_do) - number)))
        say(f"[{number}/{len(to_do)}] {outcomes[cell]}: {cell} ({left} left)")
    say("")
    cli.print_table(
        ("dataset", "model", "rank", "outcome"),
        [(cell.dataset, cell.model, str(cell.rank), outcomes.get(cell, "complete already")) for cell in chosen],
    )
    return 1 if any(outcome.startswith("failed") for outcome in outcomes.values()) else 0


def show_plan(chosen: list[Cell]) -> list[Cell]:
    """Say what will be done and return the cells with something to do. Raises UserError when the disk is too small."""
    states = {cell: status.state_of(cell)[0] for cell in chosen}
    forced = run_identity.force_asked()
    to_do = [cell for cell, state in states.items() if forced or state != "complete"]
    counts = {state: list(states.values()).count(state) for state in dict.fromkeys(states.values())}
    say(f"{len(chosen)} cells: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    for cell in to_do:
        say(f"  to do: {cell} ({states[cell]})")
    needed = sum(bytes_of(cell) for cell in to_do if states[cell] != "broken")
    existing = next(folder for folder in (paths.SAVES, *paths.SAVES.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    say(f"disk: about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    if needed > free:
        raise UserError(
            f"saves/: {(needed - free) / 1e9:.1f} GB are missing; free some space, or name fewer RANKS or MODELS"
        )
    return to_do


def bytes_of(cell: Cell) -> int:
    """About how many bytes a cell's collection and pretrain will take; 0 where the base model is not there yet."""
    config = rank_config.render(cell.finetune, cell.rank)
    base = rank_config.resolve(cell.finetune, config["model_name_or_path"])
    if not base.is_dir():
        return 0
    adapter = models.adapter_bytes(base, cell.rank, config.get("lora_target", "all"))
    return adapter * (config.get("save_total_limit", 1) + PRETRAIN_FACTOR)


def collect(cell: Cell, counter: str) -> str:
    """Bring one cell to a verified collection; `collected`, or `failed: ...` with the cause in one line."""
    try:
        pretrain, folder = status.run_folders(cell)
    except UserError as error:
        return f"failed: {error}"
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"{counter} {cell}: log in {paths.relative(log)}")
    wait_for_others([pretrain, folder])
    settings = {"DATASET": cell.dataset, "MODEL": cell.model, "RANK": str(cell.rank), "SEED": "", "KEEP": ""}
    with open(log, "w", encoding="utf-8") as output:
        command = [sys.executable, paths.ROOT / "utils" / "collect.py"]
        failed = cli.call(command, settings, output, own_group=True)
    if failed:
        return f"failed: {cause_in(log)}"
    if os.environ.get("PRUNE_PRETRAIN", "") not in ("", "0"):
        prune(pretrain)
    return "collected"


def wait_for_others(runs: list[Path]) -> None:
    """Wait while another process (another terminal's, or one that outlived a killed parent) works on these runs."""
    told = False
    while any(files.is_held(files.beside(run, "lock")) for run in runs):
        if not told:
            say("  another process is at work on it; waiting for it")
        told = True
        time.sleep(1)


def cause_in(log: Path) -> str:
    """The last error line of a log, or its last line, with the log's name."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error: ", "FAULTY "))]
    cause = (errors or lines or ["no output"])[-1].removeprefix("error: ")
    return f"{cause} (log: {paths.relative(log)})"


def prune(pretrain: Path) -> None:
    """Remove the pretrain folder of a cell whose collection has just been verified."""
    with files.lock(files.beside(pretrain, "lock")):
        if (pretrain / collection.MANIFEST).is_file():
            files.remove_folder(pretrain)
            say(f"  removed {paths.relative(pretrain)}")


if __name__ == "__main__":
    cli.run(main)
