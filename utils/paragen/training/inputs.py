"""Whether the models and data that cells are trained from are on disk, for all cells and before any training."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from paragen.common import cli, paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info
from paragen.model import base_models
from paragen.recipes.run import Cell, Run


def faults_of(cells: Iterable[Cell], phases: tuple[str, ...] = paths.PHASES) -> dict[str, list[Cell]]:
    """What is missing or broken of the inputs of cells, with the command that brings it, and the cells that need it.

    Each is looked at once, for the named phases. A cell whose recipe is broken is left out: its training fails alone
    and names the cause.
    """
    found: dict[str, list[Cell]] = {}
    checked: dict[tuple, str | None] = {}  # a model or a dataset is looked at once
    for cell in cells:
        try:
            checks = {key: check for phase in phases for key, check in _checks_of(cell.run(phase)).items()}
        except UserError:
            continue
        for key, check in checks.items():
            if key not in checked:
                checked[key] = _fault_in(check)
            if fault := checked[key]:
                found.setdefault(fault, []).append(cell)
    return found


def lines_of(faults: dict[str, list[Cell]]) -> list[str]:
    """The result of `faults_of` as lines: the fault, and how many cells need the input."""
    return [f"{fault} ({len(cells)} cells)" if len(cells) > 1 else fault for fault, cells in faults.items()]


def require(cells: Iterable[Cell], phases: tuple[str, ...] = paths.PHASES) -> None:
    """Raise UserError unless all inputs of some cells are on disk; prints a line for each where several are missing."""
    lines = lines_of(faults_of(cells, phases))
    if len(lines) == 1:
        raise UserError(lines[0])
    for line in lines:
        cli.complain(line)
    if lines:
        way_out = "bring them, or choose other cells with DATASET and MODEL"
        raise UserError(f"nothing was trained, {len(lines)} inputs are missing: {way_out}")


def _checks_of(run: Run) -> dict[tuple, Callable[[], Any]]:
    """The checks of a run's model and datasets, by what they look at; each raises UserError where that is missing."""
    checks: dict[tuple, Callable[[], Any]] = {(run.base,): partial(base_models.local_folder, run.base)}
    for name in run.datasets:
        checks[run.data_dir, name] = partial(_require_data, name, run.data_dir)
    return checks


def _require_data(name: str, data_dir: Path) -> None:
    dataset_info.require_trainable(name, dataset_info.entry_of(name, data_dir))
    dataset_info.data_file(name, data_dir)


def _fault_in(check: Callable[[], Any]) -> str | None:
    """The text of the UserError that a check raises, None where it raises none."""
    try:
        check()
    except UserError as error:
        return str(error)
    return None
