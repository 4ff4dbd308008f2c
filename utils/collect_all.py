"""Collect every cell of a category: the implementation behind each collect_all_dataset.sh and `make collect-all`.

    [MODELS="m1 m2"] [RANKS="2 8"] [PRUNE_PRETRAIN=1] [FORCE=1] python utils/collect_all.py CATEGORY [DATASET ...]

Shows what it will do, then sweeps over the cells that are not complete on all devices (see sweep.py), each into a log
of its own beside its run folder. A cell that fails does not stop the others. Stopped or killed, the next call goes on.
Ends with a table; status 1 when a cell failed. PRUNE_PRETRAIN=1 removes a cell's pretrain folder once its collection
has been verified.
"""

import sys

from paragen.common import cli
from paragen.common.cli import UserError, say
from paragen.recipes import lookup
from paragen.sweep import plan, sweep
from paragen.sweep.display import Display


def main() -> int:
    if len(sys.argv) < 2:
        raise UserError("usage: collect_all.py CATEGORY [DATASET ...]")
    chosen = lookup.chosen_cells(sys.argv[1], sys.argv[2:])
    to_do = plan.show(chosen)
    outcomes = {}
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
