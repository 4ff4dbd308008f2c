"""One table over all collections: saves/index.parquet, a row per checkpoint.

    python utils/index.py                  update it and print a line per collection           (make index)
    python utils/index.py --rows           print every row (--csv: as CSV)

A collection that did not change is not read again; checkpoints that changed after their manifest was written, or since
the last index, are hashed. A broken collection is named and omitted, and the status is 1. Evaluated checkpoints
have their scores beside their loss, and the base model's for comparison. CATEGORY, DATASET, MODEL, RANK and SEED
choose what is printed; the table always holds all.
"""

import os
import sys

from paragen.collection import index, index_tables, selection
from paragen.common import cli, paths


def main() -> int:
    parser = cli.ArgumentParser(description="Index all collections.")
    parser.add_argument("--rows", action="store_true", help="print every checkpoint")
    parser.add_argument("--csv", action="store_true", help="print every checkpoint as CSV")
    args = parser.parse_args()
    table, faults = index.update()
    wanted = selection.requested_filters()
    table = index.selected(table, wanted, faults)
    if any(wanted.values()) and not (table.num_rows or faults):
        raise selection.none_fits(paths.SAVES, wanted)
    try:
        index_tables.show(table, args, whole=not faults)
    except BrokenPipeError:  # a reader such as `| head` has closed the pipe; Python must not flush into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for fault in faults.values():
        print(f"FAULTY {fault}", file=sys.stderr, flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    cli.run(main)
