"""Collect every cell of a category. Each collect_all_dataset.sh and `make collect-all` call it.

    [MODEL="m1 m2"] [RANK="2 8"] [SEED=..] [KEEP=..] [PRUNE_PRETRAIN=1] [FORCE=1] ...
        python utils/collect_all.py CATEGORY [DATASET ...]       (make collect-all: CATEGORY= and DATASET= name both)

Prints the plan, trains the cells that are not complete on all devices (see paragen/sweep/sweep.py), each with a log
beside its run folder, and prints a table. A cell that fails does not stop the others; the status is then 1. After a
stop or a crash, the next call continues. PRUNE_PRETRAIN=1 removes a cell's pretrain folder once its collection is
verified.
"""

import os
import sys

from paragen.common import cli, paths, settings
from paragen.common.cli import UserError, say
from paragen.recipes import lookup
from paragen.sweep import plan, sweep
from paragen.sweep.display import Display
from paragen.training import inputs


def main() -> int:
    if sys.argv[1:]:
        os.environ |= {"CATEGORY": sys.argv[1], "DATASET": " ".join("".join(name.split()) for name in sys.argv[2:])}
    if not settings.text("CATEGORY"):
        known = ", ".join(paths.CATEGORIES)
        raise UserError(f"name a category: make collect-all CATEGORY=..., one of {known}, or CATEGORY=all")
    chosen = lookup.chosen_cells()
    planned = plan.make(chosen)
    plan.show(planned)
    inputs.require(planned.cells)
    plan.check_disk(planned)
    to_do, outcomes = planned.cells, {}
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
    return 0 if all(outcome.is_done for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    cli.run(main)
