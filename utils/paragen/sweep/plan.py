"""Estimates what collecting some cells takes: steps, disk and, from the runs that exist, time. Writes nothing."""

import shutil
from datetime import timedelta
from statistics import median

from paragen.collection import run_identity
from paragen.collection.manifest import read_manifest
from paragen.common import cli, paths
from paragen.common.cli import UserError, say
from paragen.model import model_files
from paragen.recipes.run import Cell
from paragen.sweep import packs
from paragen.training import status

PRETRAIN_FACTOR = 4  # adapters per pretrain: the adapter, the optimizer's two moments, and the last one perhaps twice


def show(chosen: list[Cell]) -> list[Cell]:
    """Print the plan and return the cells with something to do. Raises UserError when the disk is too small."""
    states = {cell: status.state_of(cell)[0] for cell in chosen}
    forced = run_identity.force_requested()
    to_do = [cell for cell, state in states.items() if forced or state != "complete"]
    counts = {state: list(states.values()).count(state) for state in dict.fromkeys(states.values())}
    say(f"{len(chosen)} cells: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    if to_do:
        rates = measured_rates()
        rows = [row_of(cell, states[cell], rates) for cell in to_do]
        cli.print_table(("to do", "model", "rank", "state", "steps", "MB", "time"), rows)
        say(time_line(to_do, rates))
        say(packs.engine_line(to_do))
    check_disk(sum(bytes_of(cell) for cell in to_do if states[cell] != "broken"))
    return to_do


def row_of(cell: Cell, state: str, rates: dict[tuple[str, str], float]) -> tuple[str, ...]:
    """A cell's row in the plan's table."""
    seconds = seconds_of(cell, rates)
    steps = " + ".join(str(count) for count in steps_of(cell).values()) if state != "broken" else "?"
    size = f"{bytes_of(cell) / 1e6:.0f}" if state != "broken" else "?"
    took = "?" if seconds is None else str(timedelta(seconds=round(seconds)))
    return cell.dataset, cell.model, str(cell.rank), state, steps, size, took


def steps_of(cell: Cell) -> dict[str, int]:
    """The optimizer steps that each phase of a cell trains."""
    pretrain, finetune = cell.runs
    resumed = paths.CHECKPOINT.fullmatch(finetune.resumed.name) if finetune.resumed else None
    return {
        "pretrain": pretrain.config.get("max_steps", 0),
        "finetune": max(0, finetune.config.get("max_steps", 0) - (int(resumed[1]) if resumed else 0)),
    }


def measured_rates() -> dict[tuple[str, str], float]:
    """Seconds per step by (base model's folder name, phase): the median over the existing runs, start-up included.

    The time of a pack is divided by the number of its cells.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for path in paths.SAVES.glob("*/*/*/manifest.json"):
        try:
            manifest = read_manifest(path.parent)
        except UserError:
            continue  # broken, or another program's
        if not (manifest and manifest.attempt and manifest.total_steps and manifest.base_name):
            continue  # made from a stock run, whose time is not known
        duration = manifest.attempt.finished - manifest.attempt.started
        steps = manifest.total_steps - (manifest.pretrain.step if manifest.pretrain else 0)
        if steps > 0:
            found.setdefault((manifest.base_name, manifest.phase), []).append(
                duration.total_seconds() / steps / (manifest.packed_with or 1)
            )
    return {key: median(values) for key, values in found.items()}


def seconds_of(cell: Cell, rates: dict[tuple[str, str], float]) -> float | None:
    """Estimated seconds of a cell; None where its model has no run yet, or its recipe is broken or lacks max_steps."""
    try:
        base = cell.finetune.base.name
        steps = steps_of(cell)
    except UserError:
        return None
    if any((base, phase) not in rates or not count for phase, count in steps.items()):
        return None
    return sum(count * rates[base, phase] for phase, count in steps.items())


def time_line(to_do: list[Cell], rates: dict[tuple[str, str], float]) -> str:
    """One line on the estimated time of all cells."""
    known = [seconds for cell in to_do if (seconds := seconds_of(cell, rates)) is not None]
    if not known:
        return "time: not known before a first run of these models"
    text = f"time: about {timedelta(seconds=round(sum(known)))} on one device, estimated from existing runs"
    return text if len(known) == len(to_do) else f"{text} ({len(to_do) - len(known)} cells not included)"


def check_disk(needed: int) -> None:
    """Print how much disk is needed and free. Raises UserError where it is too little."""
    existing = next(folder for folder in (paths.SAVES, *paths.SAVES.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    say(f"disk: about {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    if needed > free:
        raise UserError(
            f"saves/: {(needed - free) / 1e9:.1f} GB are missing; free some space, or choose fewer with RANK or MODEL"
        )


def bytes_of(cell: Cell) -> int:
    """Estimated bytes of a cell's collection and pretrain; 0 where the base model does not exist yet."""
    run = cell.finetune
    if not run.base.is_dir():
        return 0
    adapter = model_files.adapter_bytes(run.base, run.rank, run.config.get("lora_target", "all"))
    return adapter * (run.config.get("save_total_limit", 1) + PRETRAIN_FACTOR)
