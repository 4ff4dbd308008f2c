"""Train the adapters of many cells at once on one copy of their base model; each ends as its own verified-ready run.

    python -m paragen.packed.packed_train --cell PRETRAIN.yaml FINETUNE.yaml RANK [key=value ...] [--cell ...]

Does both phases of each cell, in the run folders, files and manifests of the ordinary path; what is complete is not
done again. A run that the packed engine cannot do is trained the ordinary way, and one line says why (ENGINE=packed
makes that an error). FORCE=1 redoes complete or stale runs, DEVICES=0 names the device.

For programs that call it: --results FILE takes a JSON line per cell as soon as it is known what became of it (see
Result), and --leave leaves the cells that cannot be packed to the caller.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import discovery, run_identity
from paragen.common import cli, devices, files, paths
from paragen.common.cli import UserError
from paragen.recipes import render
from paragen.training import engines, ordinary, status


class Run(NamedTuple):
    """One phase of a cell, as it is asked for."""

    recipe: Path
    config: dict[str, Any]
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return f"{paths.relative(self.recipe)} at rank {self.config['lora_rank']}"


class Cell(NamedTuple):
    """A pair of recipes at a rank; `keep` holds overrides of the finetune alone."""

    pretrain: Path
    finetune: Path
    rank: int
    overrides: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def run(self, phase: str) -> Run:
        """The run of a phase. Raises UserError for a broken recipe."""
        recipe = self.pretrain if phase == "pretrain" else self.finetune
        overrides = self.overrides if phase == "pretrain" else self.overrides + self.keep
        return Run(recipe, render.render(recipe, self.rank, list(overrides)), overrides)


def of(cell: status.Cell) -> Cell:
    """A cell of a sweep."""
    return Cell(cell.pretrain, cell.finetune, cell.rank)


class Result(NamedTuple):
    """What became of a cell, as a line of --results says it."""

    cell: int  # its place among the --cell arguments, from 0
    outcome: str  # `done` (both of its runs are whole), `failed`, or `left` to the ordinary path
    why: str  # the cause, or why it cannot be packed; empty for `done`


def read_results(path: Path) -> dict[int, Result]:
    """The results in a file of --results, by cell; a line that a killed process did not finish is not there."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return {found.cell: found for line in lines if line.endswith("\n") for found in [Result(**json.loads(line))]}


def arguments_of(cell: "Cell") -> list[str]:
    """The command line arguments that name a cell."""
    return ["--cell", str(cell.pretrain), str(cell.finetune), str(cell.rank), *cell.overrides, *cell.keep]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the adapters of many cells at once.")
    parser.add_argument("--results", type=Path, help="a file that takes a JSON line on what became of each cell")
    parser.add_argument("--leave", action="store_true", help="leave cells that cannot be packed to the caller")
    parser.add_argument("--cell", nargs="+", action="append", required=True, metavar="PRETRAIN FINETUNE RANK key=value")
    args = parser.parse_args()
    chosen = []
    for given in args.cell:
        if len(given) < 3:
            raise UserError("--cell needs a pretrain recipe, a finetune recipe and a rank")
        keep = tuple(text for text in given[3:] if text.startswith("save_total_limit="))
        others = tuple(text for text in given[3:] if text not in keep)
        chosen.append(Cell(Path(given[0]), Path(given[1]), render.parse_rank(given[2]), others, keep))

    def tell(cell: Cell, outcome: str, why: str) -> None:
        with open(args.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(Result(chosen.index(cell), outcome, why)._asdict()) + "\n")

    return 1 if collect(chosen, tell if args.results else lambda *_: None, args.leave) else 0


def collect(
    chosen: list[Cell], tell: Callable[[Cell, str, str], None] = lambda *_: None, leave: bool = False
) -> list[Cell]:
    """Bring cells to collections.

    Args:
        chosen: the cells, each once.
        tell: called with each cell, its outcome and why (see Result), as soon as that is known.
        leave: do not train what cannot be packed.

    Returns those that failed, each after a line that says why.
    """
    by_base: dict[tuple, list[Cell]] = {}
    failed = []
    for cell in chosen:
        try:
            run = cell.run("pretrain")
            by_base.setdefault(base_key(run), []).append(cell)
        except UserError as error:
            failed.append(cell)
            cli.complain(str(error))
            tell(cell, "failed", str(error))
    wanted = devices.choose()
    devices.pin(wanted)
    for members in by_base.values():
        failed += Pack(members, wanted, tell, leave).collect()
        devices.free_memory()
    return failed


def is_done(cell: Cell) -> bool:
    """Whether the collection is complete and its pretrain, where it is still there, is the recipe's."""
    return state_of(cell, "finetune") == "complete" and state_of(cell, "pretrain") in ("complete", "missing")


def state_of(cell: Cell, phase: str) -> str:
    """How the run folder of a cell's phase stands to its recipe (see discovery.state_of)."""
    run = cell.run(phase)
    identity = run_identity.identity_of(run.recipe, run.config)
    return discovery.state_of(render.run_folder(run.recipe, run.config), identity)[0]


def base_key(run: Run) -> tuple:
    """Runs with the same key can share a base model."""
    base = render.resolve(run.recipe, run.config["model_name_or_path"])
    return str(base), bool(run.config.get("bf16")), str(run.config.get("lora_target", "all"))


class Pack:
    """Cells that share a base model.

    Args:
        cells: what is asked for.
        wanted: the device, as devices.choose gives it, already pinned.
        tell, leave: as for `collect`.
    """

    def __init__(self, cells: list[Cell], wanted: list[str], tell: Callable[[Cell, str, str], None], leave: bool):
        self.cells, self.wanted, self.tell, self.leave = cells, wanted, tell, leave
        self.ended: dict[Cell, str] = {}  # outcomes, as of Result
        self.ordinary: list[tuple[Cell, Run]] = []  # what is left to the ordinary path in this phase
        self.base: Any = None

    def collect(self) -> list[Cell]:
        """Do both phases; the cells that failed."""
        for phase in paths.PHASES:
            self._phase(phase)
        for cell in [cell for cell in self.cells if cell not in self.ended]:
            self._end(cell, "done")
        return [cell for cell, outcome in self.ended.items() if outcome == "failed"]

    def _end(self, cell: Cell, outcome: str, why: str = "") -> None:
        self.ended[cell] = outcome
        self.tell(cell, outcome, why)

    def _fall_back(self, cell: Cell, run: Run, why: str) -> None:
        """Leave a run to the ordinary path; raises UserError where ENGINE=packed forbids that."""
        engines.say_fallback(run.recipe, cell.rank, why)
        if self.leave:
            self._end(cell, "left", why)
        else:
            self.ordinary.append((cell, run))

    def _phase(self, phase: str) -> None:
        self.ordinary = []
        with contextlib.ExitStack() as stack:
            begun = []
            for cell in [cell for cell in self.cells if cell not in self.ended]:
                with self._one_cell(cell):
                    run = cell.run(phase)
                    if phase == "pretrain" and not run_identity.force_asked() and is_done(cell):
                        continue
                    attempt = self._begin(stack, run)
                    if attempt is None:
                        continue
                    if why := engines.why_not_packed(run.recipe, run.config, self.wanted):
                        self._fall_back(cell, run, why)
                    else:
                        begun.append((cell, run, attempt))
            if begun:
                self._train(begun)
        if self.ordinary:
            self.base = None
            devices.free_memory()
        for cell, run in self.ordinary:
            with self._one_cell(cell):
                script = ["bash", paths.UTILS / "train_with_rank.sh", run.recipe, cell.rank, *run.overrides]
                if status := cli.call(script):
                    raise UserError(f"{run}: failed with status {status}; the cause stands above")

    @contextlib.contextmanager
    def _one_cell(self, cell: Cell) -> Iterator[None]:
        """What goes wrong in the body ends this cell alone."""
        try:
            yield
        except UserError as error:
            cli.complain(str(error))
            self._end(cell, "failed", str(error))

    def _begin(self, stack: contextlib.ExitStack, run: Run) -> ordinary.Attempt | None:
        """Lock a run and begin an attempt at it, for as long as `stack` holds; None where it is complete."""
        folder = render.run_folder(run.recipe, run.config)
        identity = run_identity.identity_of(run.recipe, run.config)
        with contextlib.ExitStack() as own:
            try:
                own.enter_context(files.lock(files.beside(folder, "lock")))
                own.enter_context(ordinary.rendered(run.recipe, run.config))
            except files.Busy as busy:
                raise UserError(f"{run} is running already (it holds {busy})") from None
            files.recover_folder(folder)
            if ordinary.already_there(folder, identity, render.phase_of(run.config)):
                ordinary.drop_claim(folder)
                return None
            ordinary.check_pretrain(run.recipe, run.config)
            attempt = own.enter_context(ordinary.staged(run.recipe, run.config, folder, identity))
            stack.enter_context(own.pop_all())
            return attempt

    def _train(self, begun: list[tuple[Cell, Run, ordinary.Attempt]]) -> None:
        """Train the attempts, in as few packs as memory allows."""
        os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from paragen.packed import frozen_base  # imports LLaMA-Factory: after the devices are pinned

        self.base = self.base or frozen_base.Base(self.wanted)
        ready = []
        for cell, run, attempt in begun:
            with self._one_cell(cell):
                try:
                    ready.append((cell, run, self.base.admit(attempt)))
                except frozen_base.NotPackable as why:
                    self._fall_back(cell, run, str(why))
                except frozen_base.OutOfMemory:
                    self._fall_back(cell, run, "its model does not fit into memory beside what the comparison needs")
        from paragen.packed import loop

        for cell, run, outcome in loop.train_all(self.base, ready):
            with self._one_cell(cell):
                if isinstance(outcome, frozen_base.NotPackable):
                    self._fall_back(cell, run, str(outcome))
                elif isinstance(outcome, UserError):
                    raise outcome


if __name__ == "__main__":
    cli.run(main)
