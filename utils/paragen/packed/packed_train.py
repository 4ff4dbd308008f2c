"""Train the adapters of many cells at once on one copy of their base model; each becomes a run of its own.

    python -m paragen.packed.packed_train --cell PRETRAIN.yaml FINETUNE.yaml RANK [key=value ...] [--cell ...]

Trains both phases of each cell, or one (--phases pretrain), with the run folders, files and manifests of the ordinary
path. Complete runs are skipped. A run that cannot be packed is trained the ordinary way, after a line that names the
reason; with ENGINE=packed that is an error. FORCE=1 redoes complete or stale runs, DEVICES=0 names the device.

For programs that call it: --results FILE gets a line of JSON per cell as soon as its outcome is known (see
`read_results`), and --leave skips the cells that cannot be packed.
"""

import contextlib
import functools
import gc
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paragen.collection import run_identity
from paragen.collection.run_identity import Snapshot
from paragen.common import cli, devices, paths
from paragen.common.cli import UserError
from paragen.packed import continuation
from paragen.recipes import render
from paragen.recipes.run import Cell, Run
from paragen.training import (
    attempts,
    deterministic,
    engines,
    llamafactory_output,
    outcome,
    progress,
    status,
)
from paragen.training.attempts import Attempt
from paragen.training.outcome import DONE, Outcome


def main() -> int:
    parser = cli.ArgumentParser(description="Train the adapters of many cells at once.")
    parser.add_argument("--results", type=Path, help="a file that gets a line of JSON with each cell's outcome")
    parser.add_argument("--leave", action="store_true", help="skip cells that cannot be packed")
    parser.add_argument("--cell", nargs="+", action="append", required=True, metavar="PRETRAIN FINETUNE RANK key=value")
    parser.add_argument("--phases", nargs="+", choices=paths.PHASES, default=paths.PHASES, help="train these alone")
    args = parser.parse_args()
    chosen = [cell_of(*given) for given in args.cell]
    report = results_writer(args.results, chosen) if args.results else lambda cell, ended: None
    return 1 if collect(chosen, report, args.leave, tuple(args.phases)) else 0


def cell_of(pretrain: str, finetune: str = "", rank: str = "", *overrides: str) -> Cell:
    """The cell that the arguments of one --cell name (see `arguments_of`)."""
    if not rank:
        raise UserError("--cell needs a pretrain recipe, a finetune recipe and a rank")
    recipes = Path(pretrain), Path(finetune)
    keep = tuple(text for text in overrides if text.startswith("save_total_limit="))
    others = tuple(text for text in overrides if text not in keep)
    return Cell(recipes[1].parent.name, recipes[1].stem, render.parse_rank(rank), recipes, others, keep)


def arguments_of(cell: Cell) -> list[str]:
    """The command line arguments that name a cell."""
    return ["--cell", *map(str, cell.recipes), str(cell.rank), *cell.overrides, *cell.finetune_overrides]


def results_writer(path: Path, cells: list[Cell]) -> Callable[[Cell, Outcome], None]:
    """A function that appends a cell's outcome to a file that `read_results` reads."""

    def write(cell: Cell, ended: Outcome) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": cells.index(cell), **asdict(ended)}) + "\n")

    return write


def read_results(path: Path) -> dict[int, Outcome]:
    """The outcomes in a file of --results, by the cell's place on the command line.

    A cell with the outcome `not_packable` was skipped. A last line that a killed process did not finish is ignored.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    read = [json.loads(line) for line in lines if line.endswith("\n")]
    return {found.pop("cell"): Outcome(**found) for found in read}


def collect(
    chosen: list[Cell],
    report: Callable[[Cell, Outcome], None] = lambda cell, ended: None,
    packed_only: bool = False,
    phases: tuple[str, ...] = paths.PHASES,
) -> list[Cell]:
    """Train cells, so that each becomes a collection.

    Args:
        chosen: the cells, each once.
        report: called with each cell and its outcome, as soon as that is known.
        packed_only: skip cells that cannot be packed, in place of training them the ordinary way.
        phases: the phases to train, one or both.

    Returns the cells that failed. For each, a line with the cause was printed.
    """
    by_base: dict[tuple, list[Cell]] = {}
    failed = []
    for cell in chosen:
        try:
            by_base.setdefault(base_key(cell.run(phases[0])), []).append(cell)
        except UserError as error:
            failed.append(cell)
            cli.complain(str(error))
            report(cell, outcome.outcome_of(error))
    wanted = devices.choose()
    devices.pin(wanted)
    for members in by_base.values():
        failed += CellGroup(members, wanted, report, packed_only, phases).collect()
        devices.free_memory()
    return failed


def base_key(run: Run) -> tuple:
    """A key that is equal for runs that can share a base model."""
    return str(run.base), bool(run.config.get("bf16")), str(run.config.get("lora_target", "all"))


@functools.cache
def keep_imports() -> None:
    """Have the garbage collector leave alone what the imports made: each look at it takes a quarter of a second."""
    gc.freeze()


class CellGroup:
    """Cells that share a base model, which is loaded once.

    Args:
        cells: the requested cells.
        wanted: the device, as devices.choose gives it, already pinned.
        report, packed_only, phases: as for `collect`.
    """

    def __init__(
        self,
        cells: list[Cell],
        wanted: list[str],
        report: Callable[[Cell, Outcome], None],
        packed_only: bool,
        phases: tuple[str, ...],
    ):
        self.cells, self.wanted, self.report, self.packed_only = cells, wanted, report, packed_only
        self.phases = phases
        self.ended: dict[Cell, Outcome] = {}
        self.ordinary: list[tuple[Cell, Run]] = []  # runs of this phase that cannot be packed
        self.base: Any = None

    def collect(self) -> list[Cell]:
        """Train the phases; returns the cells that failed."""
        for phase in self.phases:
            self._phase(phase)
        for cell in [cell for cell in self.cells if cell not in self.ended]:
            self._end(cell, DONE)
        return [cell for cell, ended in self.ended.items() if ended.kind not in ("done", "not_packable")]

    def _end(self, cell: Cell, ended: Outcome) -> None:
        self.ended[cell] = ended
        self.report(cell, ended)

    def _fall_back(self, cell: Cell, run: Run, reason: str) -> None:
        """Queue a run for the ordinary path, or skip its cell. Raises UserError where ENGINE=packed forbids that."""
        engines.announce_fallback(run, reason)
        if self.packed_only:
            self._end(cell, Outcome("not_packable", reason))
        else:
            self.ordinary.append((cell, run))

    def _phase(self, phase: str) -> None:
        self.ordinary = []
        with contextlib.ExitStack() as stack:
            started = []
            for cell in [cell for cell in self.cells if cell not in self.ended]:
                with self._one_cell(cell):
                    run, snapshot = self._next(cell, phase)
                    attempt = stack.enter_context(attempts.begin(run, snapshot)) if snapshot else None
                    if attempt is None:
                        continue
                    if reason := engines.why_not_packed(run, self.wanted):
                        self._fall_back(cell, run, reason)
                    else:
                        started.append((cell, run, attempt))
            self._train_groups(started)
            devices.free_memory()
        for cell, run in self.ordinary:
            with self._one_cell(cell):
                script = ["bash", paths.UTILS / "train_with_rank.sh", run.recipe, cell.rank, *run.overrides]
                if code := cli.call(script):
                    ended = cli.killed_text(code) if code < 0 else f"failed with status {code}; see the cause above"
                    raise UserError(f"{run}: {ended}")

    def _next(self, cell: Cell, phase: str) -> tuple[Run, Snapshot | None]:
        """A cell's run of a phase, and its snapshot or, where the cell is done, None."""
        run = cell.run(phase)
        both = phase == "pretrain" and len(self.phases) > 1  # a cell that is done needs no pretrain
        is_done = both and not run_identity.force_requested() and status.is_done(cell)
        return run, None if is_done else run_identity.snapshot_of(run)

    @contextlib.contextmanager
    def _one_cell(self, cell: Cell) -> Iterator[None]:
        """Print a UserError of the body, and end this cell alone with it."""
        try:
            yield
        except UserError as error:
            cli.complain(str(error))
            self._end(cell, outcome.outcome_of(error))

    def _train_groups(self, started: list[tuple[Cell, Run, Attempt]]) -> None:
        """Train attempts: those that go on after the same number of steps together, then those that start anew."""
        planned = continuation.plan([attempt for _, _, attempt in started], self.wanted)
        for done in sorted({each.done for each in planned}, reverse=True):
            self._train([(*one, each) for one, each in zip(started, planned, strict=True) if each.done == done])

    def _train(self, started: list[tuple[Cell, Run, Attempt, continuation.Continuation]]) -> None:
        """Train attempts in as few packs as memory allows."""
        llamafactory_output.reduce()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        deterministic.choose_kernels()
        for _, _, attempt, _ in started:
            progress.report(attempt.staging, "importing LLaMA-Factory")
        from paragen.packed import frozen_base, loop  # they import LLaMA-Factory: after the devices are pinned

        cli.check_stopped()  # a library that is imported may have taken the signal's exception for a fault of its own
        keep_imports()
        self.base = self.base or frozen_base.FrozenBase(self.wanted)
        ready = []
        with self.base.tokenising_ahead([attempt for _, _, attempt, _ in started]):
            for cell, run, attempt, continued in started:
                cli.check_stopped()
                with self._one_cell(cell):
                    try:
                        ready.append((cell, run, self.base.admit(attempt, continued)))
                    except frozen_base.NotPackable as error:
                        self._fall_back(cell, run, str(error))
                    except frozen_base.OutOfMemory:
                        reason = "its model does not fit into memory beside what the comparison needs"
                        self._fall_back(cell, run, reason)
        for cell, run, ended in loop.train_all(self.base, ready):
            with self._one_cell(cell):
                if isinstance(ended, frozen_base.NotPackable):
                    self._fall_back(cell, run, str(ended))
                elif isinstance(ended, UserError):
                    raise ended


if __name__ == "__main__":
    cli.run(main)
