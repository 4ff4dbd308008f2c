"""Collect a cell, or several ranks at once: pretrain where it is missing, finetune, verify.

    DATASET=ARC-c [MODEL=..] [RANK=8] [KEEP=..] [SEED=..] [FORCE=1] [DEVICES=..] python utils/collect.py
    DATASET=ARC-c RANKS="2 4 8 16 64" [ENGINE=packed|stock] ... python utils/collect.py        (make collect)

RANK is trained by train_with_rank.sh, phase by phase; RANKS are trained by packed_train.py, all at once. ENGINE=packed
and ENGINE=stock force one of the two. Complete runs are skipped, so that a call after a crash continues where the last
one ended. A complete collection needs no pretrain folder, but one that exists must be up to date.
"""

import os
import sys
import tempfile
from pathlib import Path

from paragen.collection import run_identity
from paragen.common import cli, paths
from paragen.common.cli import UserError
from paragen.packed import packed_train
from paragen.recipes import keys, lookup, render
from paragen.recipes.run import Cell
from paragen.training import engines


def main() -> int:
    dataset, model, name = os.environ.get("DATASET", ""), os.environ.get("MODEL"), engines.requested_engine()
    ranks = requested_ranks()
    seed = (f"seed={value}",) if (value := os.environ.get("SEED")) else ()
    keep = (f"save_total_limit={value}",) if (value := os.environ.get("KEEP")) else ()
    chosen = [lookup.find_cell(dataset, model, rank, seed, keep) for rank in ranks]
    to_do, failed = split_cells(chosen)
    if name == "packed" or (name is None and os.environ.get("RANKS", "").split()):
        failed += train_packed(to_do) if to_do else []
    else:
        for cell in to_do:
            if status := train_ordinary(cell):
                if len(chosen) == 1 or status != 1:  # stopped or killed: the others do not start
                    return status
                failed.append(cell)
    status = verify([cell for cell in chosen if cell not in failed])
    for cell in failed:
        cli.complain(f"{cell.recipes[1].stem} at rank {cell.rank}: is not collected; see the cause above")
    return 1 if failed else status


def requested_ranks() -> list[int]:
    """The ranks in RANK or RANKS, each once. Raises UserError where both are set, or where one is not a rank."""
    one, several = os.environ.get("RANK"), os.environ.get("RANKS", "").split()
    if one and several:
        raise UserError(f"RANK={one} and RANKS={' '.join(several)}: give one of the two")
    return list(dict.fromkeys(render.parse_rank(rank) for rank in several or [one or str(keys.DEFAULT_RANK)]))


def split_cells(chosen: list[Cell]) -> tuple[list[Cell], list[Cell]]:
    """The cells with something to do, and those that cannot be collected. For each of these, prints the cause.

    Raises UserError where none can be collected.
    """
    to_do: list[Cell] = []
    errors: dict[Cell, UserError] = {}
    for cell in chosen:
        try:
            if run_identity.force_requested() or not packed_train.is_done(cell):
                to_do.append(cell)
        except UserError as error:
            errors[cell] = error
    if len(errors) == len(chosen):
        raise errors[chosen[0]]
    for obstacle in errors.values():
        cli.complain(str(obstacle))
    return to_do, list(errors)


def train_ordinary(cell: Cell) -> int:
    """Train both phases of a cell, one after the other; returns the status of the first that failed, else 0."""
    for run in cell.runs:
        if status := cli.call(["bash", paths.UTILS / "train_with_rank.sh", run.recipe, run.rank, *run.overrides]):
            return status
    return 0


def train_packed(chosen: list[Cell]) -> list[Cell]:
    """Train cells in one process of the packed engine; returns those that are not collections afterwards."""
    with tempfile.TemporaryDirectory(prefix="paragen-") as folder:
        results = Path(folder, "results")
        named = [argument for cell in chosen for argument in packed_train.arguments_of(cell)]
        command = [sys.executable, "-m", packed_train.__name__, *named, "--results", results]
        status = cli.call(command, cli.environment_for_modules())
        found = packed_train.read_results(results)
    if status < 0:
        cli.complain(f"the training was killed by signal {-status}; run it again, it skips complete runs")
    return [cell for number, cell in enumerate(chosen) if number not in found or not found[number].is_done]


def verify(chosen: list[Cell]) -> int:
    """Verify the collections of cells in one process; returns its status."""
    named = []
    for cell in chosen:
        named += ["--recipe", cell.finetune.recipe, cell.rank, *cell.finetune.overrides]
    return cli.call([sys.executable, paths.UTILS / "verify.py", *named]) if named else 0


if __name__ == "__main__":
    cli.run(main)
