"""Make every stock finetune run of a dataset a collection (as checkpoint_cleaner.py), and print a table.

    python utils/clean_dataset_dir.py FOLDER [--keep 100] [--dry-run]        FOLDER such as saves/math/MATH
    DATASET=MATH python utils/clean_dataset_dir.py                           the same by name (make clean-checkpoints)

Pretrain runs and clean runs stay as they are. The status is 1 when a run could not be cleaned.
"""

import argparse
import os
from pathlib import Path

from paragen.collection import stock_runs
from paragen.common import cli, paths
from paragen.common.cli import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description="Make every stock finetune run of a dataset a collection.")
    parser.add_argument("folder", type=Path, nargs="?", help="the dataset's folder under saves/")
    stock_runs.add_options(parser)
    args = parser.parse_args()
    folder = args.folder or dataset_folder(os.environ.get("DATASET", ""))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    rows, failed = [], 0
    for run in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if run.name.endswith("_pretrain"):
            rows.append((run.name, "pretrain, left alone", "", ""))
            continue
        try:
            outcome = stock_runs.clean(run, args.keep, args.dry_run)
            rows.append((run.name, outcome.state, str(outcome.checkpoints), f"{outcome.freed / 1e6:.1f}"))
        except UserError as error:
            failed += 1
            rows.append((run.name, f"failed: {str(error).removeprefix(f'{run.absolute()}: ')}", "", ""))
    cli.print_table(("run", "state", "checkpoints", "MB to free" if args.dry_run else "MB freed"), rows)
    return 1 if failed else 0


def dataset_folder(name: str) -> Path:
    """The folder below saves/ of a dataset that the user names."""
    found = {path.name: path for path in paths.SAVES.glob("*/*") if path.is_dir() and not path.name.startswith(".")}
    if not name:
        raise UserError(f"name a dataset: DATASET=... or a folder; known: {', '.join(sorted(found)) or 'none yet'}")
    return found[paths.choose(name, found, "collected dataset")]


if __name__ == "__main__":
    cli.run(main)
