"""Estimates what collecting some cells takes: steps, disk and, from the runs that exist, time.

What is not known is None: the size of adapters before their base model is there, the time before a first run of it.
"""

import os
import shutil
from collections.abc import Iterable
from datetime import timedelta
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from paragen.collection import discovery, run_identity
from paragen.collection.manifest import read_manifest
from paragen.common import cli, paths
from paragen.common.cli import UserError, say
from paragen.model import model_files
from paragen.recipes import keys
from paragen.recipes.run import Cell
from paragen.sweep import estimate, packs, ray_cluster
from paragen.training import inputs, status
from paragen.training.status import CellState

PRETRAIN_FACTOR = 4  # adapters per pretrain: the adapter, the optimizer's two moments, and the last one perhaps twice


class CellPlan(NamedTuple):
    """What collecting one cell takes."""

    cell: Cell
    state: CellState
    steps: dict[str, int] | None  # by phase; None for a broken recipe
    bytes: int | None
    seconds: float | None  # on one device


class Plan(NamedTuple):
    """What collecting some cells takes."""

    states: dict[Cell, CellState]
    to_do: list[CellPlan]
    missing: list[str]  # inputs that are missing, a line each (see inputs.py)
    free: int  # bytes on the disk of saves/

    @property
    def cells(self) -> list[Cell]:
        """The cells with something to do."""
        return [planned.cell for planned in self.to_do]

    @property
    def known_bytes(self) -> int:
        """The bytes of the cells whose size is known."""
        return sum(planned.bytes or 0 for planned in self.to_do)


def make(chosen: Iterable[Cell]) -> Plan:
    """The plan of collecting some cells: all with FORCE=1, else those that are not complete."""
    states = status.states_of(chosen)
    forced = run_identity.force_requested()
    to_do = {cell: state for cell, state in states.items() if forced or state.name != "complete"}
    rates = measured_rates() if to_do else {}
    existing = next(folder for folder in (paths.SAVES, *paths.SAVES.parents) if folder.is_dir())
    return Plan(
        states,
        [plan_of(cell, state, rates) for cell, state in to_do.items()],
        inputs.lines_of(inputs.faults_of(to_do)),
        shutil.disk_usage(existing).free,
    )


def plan_of(cell: Cell, state: CellState, rates: dict[tuple[str, str], float]) -> CellPlan:
    """The plan of one cell, from the seconds per step that `measured_rates` gives."""
    try:
        steps, base = steps_of(cell), cell.finetune.base.name
        size = bytes_of(cell)
    except UserError:  # a broken recipe or model; the state says so, or the line on missing inputs does
        return CellPlan(cell, state, None, None, None)
    seconds = None
    if all((base, phase) in rates and count for phase, count in steps.items()):
        seconds = sum(count * rates[base, phase] for phase, count in steps.items())
    return CellPlan(cell, state, steps, size, seconds)


def show(plan: Plan) -> None:
    """Print a plan: a row for each cell with something to do, time, engine, missing inputs, disk."""
    counts = status.count(plan.states.values())
    say(f"{len(plan.states)} cells: " + ", ".join(f"{number} {state}" for state, number in counts.items()))
    if plan.to_do:
        cli.print_table(("to do", "model", "rank", "state", "steps", "MB", "time"), [row_of(one) for one in plan.to_do])
        say(time_line(plan))
        say(packs.engine_line(plan.cells))
        if len(shares := expected_shares(plan)) > 1:
            say(f"devices: {len(shares)}, expected to have work {packs.busy_text(shares)} of the time")
    for line in plan.missing:
        say(f"missing: {line}")
    say(disk_line(plan))


def expected_shares(plan: Plan) -> list[float]:
    """Which share of the time each of this machine's devices would have work; empty where they are not known."""
    slots = ray_cluster.slots_here() // packs.gpus_per_cell()
    if os.environ.get("RAY_ADDRESS") or not slots:
        return []
    return packs.expected_shares(estimate.works_of(plan.cells), slots)


def check_disk(plan: Plan) -> None:
    """Raise UserError where the disk has too little space for a plan."""
    if plan.known_bytes > plan.free:
        lacking = (plan.known_bytes - plan.free) / 1e9
        raise UserError(f"saves/: {lacking:.1f} GB are missing; free some space, or choose fewer with RANK or MODEL")


def row_of(planned: CellPlan) -> tuple[str, ...]:
    """A cell's row in the plan's table."""
    cell, state, steps, size, seconds = planned
    return (
        cell.dataset,
        cell.model,
        " ".join((str(cell.rank), *cell.overrides)),
        state.name,
        "?" if steps is None else " + ".join(str(count) for count in steps.values()),
        "?" if size is None else f"{size / 1e6:.0f}",
        "?" if seconds is None else str(timedelta(seconds=round(seconds))),
    )


def content_of(plan: Plan) -> dict[str, Any]:
    """A plan as a JSON object for programs; what is not known is null."""
    to_do = [
        {
            **status.cell_content(planned.cell),
            "state": planned.state.name,
            "reason": planned.state.reason,
            "steps": planned.steps,
            "bytes": planned.bytes,
            "seconds": planned.seconds,
            **packs.engine_content(planned.cell),
        }
        for planned in plan.to_do
    ]
    known = [planned.seconds for planned in plan.to_do]
    return {
        "summary": status.count(plan.states.values()),
        "to_do": to_do,
        "missing_inputs": plan.missing,
        "bytes": None if any(planned.bytes is None for planned in plan.to_do) else plan.known_bytes,
        "bytes_free": plan.free,
        "seconds": None if None in known else sum(known),
        "expected_shares": expected_shares(plan),
    }


def steps_of(cell: Cell) -> dict[str, int]:
    """The optimizer steps that each phase of a cell trains. Raises UserError for a broken recipe."""
    pretrain, finetune = cell.runs
    return {
        "pretrain": max(0, keys.value_of(pretrain.config, "max_steps", 0)),
        "finetune": max(0, keys.value_of(finetune.config, "max_steps", 0) - finetune.resumed_step),
    }


def measured_rates() -> dict[tuple[str, str], float]:
    """Seconds per step by (base model's folder name, phase): the median over the existing runs, start-up included.

    The time of a pack is divided by the number of its cells.
    """
    found: dict[tuple[str, str], list[float]] = {}
    folders = [run for dataset in discovery.dataset_folders(paths.SAVES) for run in dataset.iterdir()]
    for run in folders:
        if run.name.startswith("."):
            continue  # a training in progress, or what is left of one
        try:
            manifest = read_manifest(run)
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


def time_line(plan: Plan) -> str:
    """One line on the estimated time of all cells."""
    known = [planned.seconds for planned in plan.to_do if planned.seconds is not None]
    if not known:
        return "time: not known before a first run of these models"
    text = f"time: about {timedelta(seconds=round(sum(known)))} on one device, estimated from existing runs"
    return text if len(known) == len(plan.to_do) else f"{text} ({len(plan.to_do) - len(known)} cells not included)"


def disk_line(plan: Plan) -> str:
    """One line on the disk that all cells need, and how much is free."""
    unknown = sum(planned.bytes is None for planned in plan.to_do)
    free = f"{plan.free / 1e9:.1f} GB free"
    if unknown and unknown == len(plan.to_do):
        return f"disk: needed is not known until the models are there, {free}"
    text = f"disk: about {plan.known_bytes / 1e9:.1f} GB needed, {free}"
    return f"{text} ({unknown} cells not included: not known until their model is there)" if unknown else text


def bytes_of(cell: Cell) -> int | None:
    """Estimated bytes of a cell's collection and pretrain; None where its base model is not there.

    Raises UserError for a broken recipe or model.
    """
    run = cell.finetune
    if not model_files.has_weights(run.base):
        return None
    adapter = run.rank * _bytes_at_rank_1(run.base, keys.value_of(run.config, "lora_target", "all"))
    return adapter * (keys.value_of(run.config, "save_total_limit", 1) + PRETRAIN_FACTOR)


@cache
def _bytes_at_rank_1(base: Path, lora_target: str) -> int:
    return model_files.adapter_bytes(base, 1, lora_target)
