"""Train the cells that a user names: a pretrain, a finetune, or both with a verification.

    DATASET=ARC-c [MODEL=..] [RANK=8] [SEED=..] [FORCE=1] [DEVICES=..] [KEEP=..] python utils/collect.py  (make collect)
    DATASET=ARC-c RANK="2 4 8 16 64" [ENGINE=packed|stock] ... python utils/collect.py
    ... python utils/collect.py pretrain|finetune                                      (make pretrain, make finetune)

One rank is trained by train_with_rank.sh, phase by phase; several are trained by the packed engine, all at once.
ENGINE=packed and ENGINE=stock force one of the two. Complete runs are skipped, so that a call after a crash continues
where the last one ended. A complete collection needs no pretrain folder, but one that exists must be up to date.
"""

import sys

from paragen.common import cli, locks, paths, settings
from paragen.common.cli import UserError
from paragen.packed import packed_train
from paragen.recipes import lookup
from paragen.recipes.run import Cell
from paragen.training import engines, inputs, status


def main() -> int:
    phases = requested_phases(sys.argv[1:])
    target = phases[0] if len(phases) == 1 else "collect"
    chosen, engine = lookup.requested_cells(target, phases), engines.requested_engine()
    to_do, failed = split_cells(chosen, phases)
    inputs.require(to_do, phases)
    if engine == "packed" or (engine is None and len(settings.values("RANK")) > 1):
        failed += train_packed(to_do, phases) if to_do else []
    else:
        for cell in to_do:
            if code := train_ordinary(cell, phases):
                if len(chosen) == 1 or code != 1:  # stopped or killed: the others do not start
                    return code
                failed.append(cell)
    code = verify([cell for cell in to_do if cell not in failed]) if target == "collect" else 0
    for cell in failed:
        what = "is not collected" if target == "collect" else f"the {target} did not end well"
        cli.complain(f"{cell}: {what}; see the cause above")
    return 1 if failed else code


def requested_phases(arguments: list[str]) -> tuple[str, ...]:
    """The phases that the command line names. Raises UserError for other arguments."""
    if not arguments:
        return paths.PHASES
    if len(arguments) > 1 or arguments[0] not in paths.PHASES:
        raise UserError(f"usage: DATASET=... collect.py [{'|'.join(paths.PHASES)}]")
    return (arguments[0],)


def split_cells(chosen: list[Cell], phases: tuple[str, ...]) -> tuple[list[Cell], list[Cell]]:
    """The cells with something to do, and those that cannot be trained.

    Prints a line for each cell that is complete, and the cause for each that cannot be trained. Raises UserError where
    none can be trained.
    """
    to_do: list[Cell] = []
    errors: dict[Cell, UserError] = {}
    for cell in chosen:
        try:
            if not status.is_complete(cell, phases):
                to_do.append(cell)
        except UserError as error:
            errors[cell] = error
    if len(errors) == len(chosen):
        raise errors[chosen[0]]
    for obstacle in errors.values():
        cli.complain(str(obstacle))
    return to_do, list(errors)


def train_ordinary(cell: Cell, phases: tuple[str, ...]) -> int:
    """Train phases of a cell, one after the other; returns the status of the first that failed, else 0."""
    for phase in phases:
        run = cell.run(phase)
        code = cli.call(["bash", paths.UTILS / "train_with_rank.sh", run.recipe, run.rank, *run.overrides])
        if code < 0:
            cli.complain(f"{run}: the training {cli.killed_text(code)}; run it again, it skips complete runs")
            return 128 - code
        if code:
            return code
    return 0


def train_packed(chosen: list[Cell], phases: tuple[str, ...]) -> list[Cell]:
    """Train cells in one process of the packed engine; returns those of which a phase failed."""
    with locks.process_folder() as folder:
        results = folder / "results"
        named = [argument for cell in chosen for argument in packed_train.arguments_of(cell)]
        command = [sys.executable, "-m", packed_train.__name__, *named, "--phases", *phases, "--results", results]
        code = cli.call(command, cli.environment_for_modules())
        found = packed_train.read_results(results)
    if code < 0:
        cli.complain(f"the training {cli.killed_text(code)}; run it again, it skips complete runs")
    return [cell for number, cell in enumerate(chosen) if number not in found or not found[number].is_done]


def verify(chosen: list[Cell]) -> int:
    """Verify the collections of cells in one process; returns its status."""
    named = []
    for cell in chosen:
        named += ["--recipe", cell.finetune.recipe, cell.rank, *cell.finetune.overrides]
    return cli.call([sys.executable, paths.UTILS / "verify.py", *named]) if named else 0


if __name__ == "__main__":
    cli.run(main)
