"""Collect every cell of a category. Each collect_all_dataset.sh and `make collect-all` call it.

    [MODEL="m1 m2"] [RANK="2 8"] [SEED=..] [KEEP=..] [EVALUATE=1] [PRUNE_PRETRAIN=1] [FORCE=1] ...
        python utils/collect_all.py CATEGORY [DATASET ...]       (make collect-all: CATEGORY= and DATASET= name both)

Prints the plan, trains the cells that are not complete on all devices (see paragen/sweep/sweep.py), each with a log
beside its run folder, and prints a table. A cell that fails does not stop the others; the status is then 1. After a
stop or a crash, the next call continues. EVALUATE=1 scores each collection that is verified, and those that were
complete before, as utils/evaluate.py does. PRUNE_PRETRAIN=1 removes a cell's pretrain folder once its collection is
verified.
"""

import os
import sys

from paragen.collection import index
from paragen.common import cli, paths, settings
from paragen.common.cli import UserError, say
from paragen.recipes import lookup
from paragen.recipes.run import Cell
from paragen.sweep import plan, shared_scoring, sweep
from paragen.sweep.display import Display
from paragen.training import inputs, left_overs
from paragen.training.outcome import Outcome


def main() -> int:
    if sys.argv[1:]:
        os.environ["CATEGORY"] = sys.argv[1]
    if sys.argv[2:]:
        os.environ["DATASET"] = " ".join("".join(name.split()) for name in sys.argv[2:])
    if not settings.text("CATEGORY"):
        known = ", ".join(paths.CATEGORIES)
        raise UserError(f"name a category: make collect-all CATEGORY=..., one of {known}, or CATEGORY=all")
    chosen = lookup.chosen_cells()
    planned = plan.make(chosen)
    plan.show(planned)
    inputs.require(planned.cells)
    plan.check_disk(planned)
    to_do, outcomes = planned.cells, {}
    for cell in set(chosen) - set(to_do):
        left_overs.remove(cell)
    if to_do:
        with Display(len(to_do)) as display:
            outcomes = sweep.run(to_do, display.report)
    say("")
    cli.print_table(
        ("dataset", "model", "rank", "outcome"),
        [
            (cell.dataset, cell.model, str(cell.rank), outcomes[cell].text if cell in outcomes else "complete already")
            for cell in chosen
        ],
    )
    code = 0 if all(outcome.is_done for outcome in outcomes.values()) else 1
    return evaluate(chosen, outcomes) or code if settings.switch("EVALUATE") else code


def evaluate(chosen: list[Cell], outcomes: dict[Cell, Outcome]) -> int:
    """Score the collections that were complete before the sweep, and print the scores of all; returns a status."""
    collected = [cell for cell in chosen if cell not in outcomes or outcomes[cell].is_done]
    names = {cell: index.chosen_at(cell.finetune.folder) for cell in collected}
    say("")
    scored = {found.name for cell, found in names.items() if cell in outcomes}  # by the sweep
    return shared_scoring.score_all(list(names.values()), scored=scored)


if __name__ == "__main__":
    cli.run(main)
