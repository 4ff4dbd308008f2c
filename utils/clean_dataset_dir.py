"""Make every stock finetune run of a dataset a collection (as checkpoint_cleaner.py), and print a table.

    python utils/clean_dataset_dir.py FOLDER [--keep 100] [--dry-run]        FOLDER such as saves/math/MATH
    DATASET=MATH [MODEL=..] [RANK=..] ... python utils/clean_dataset_dir.py  the same by name (make clean-checkpoints)

Pretrain runs and clean runs stay as they are. The status is 1 when a run could not be cleaned.
"""

from pathlib import Path

from paragen.collection import discovery, selection, stock_runs
from paragen.common import cli, paths, settings
from paragen.common.cli import UserError, say


def main() -> int:
    parser = cli.ArgumentParser(description="Make every stock finetune run of a dataset a collection.")
    parser.add_argument("folder", type=Path, nargs="?", help="the dataset's folder under saves/")
    stock_runs.add_options(parser)
    args = parser.parse_args()
    rows, failed = [], 0
    for run in requested_runs(args.folder):
        if run.name.endswith("_pretrain"):
            rows.append((run.name, "pretrain, left alone", "", ""))
            continue
        try:
            outcome = stock_runs.clean(run, args.keep, args.dry_run)
            if args.dry_run and outcome.state != "clean":
                for line in (paths.relative(run), *outcome.lines):
                    say(line)
            rows.append((run.name, outcome.state, str(outcome.checkpoints), f"{outcome.freed / 1e6:.1f}"))
        except UserError as error:
            failed += 1
            rows.append((run.name, f"failed: {str(error).removeprefix(f'{run.absolute()}: ')}", "", ""))
    cli.print_table(("run", "state", "checkpoints", "MB to free" if args.dry_run else "MB freed"), rows)
    return 1 if failed else 0


def requested_runs(folder: Path | None) -> list[Path]:
    """The run folders in a folder, or those that CATEGORY, DATASET, MODEL, RANK and SEED select; sorted.

    Raises UserError where there is no such folder, and where neither a folder nor a dataset is named.
    """
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [run for dataset in discovery.dataset_folders(paths.SAVES) for run in sorted(dataset.glob("[!.]*"))]
    if not settings.values("DATASET"):
        known = ", ".join(sorted({run.parent.name for run in found})) or "none yet"
        raise UserError(f"name a dataset: make clean-checkpoints DATASET=..., or a folder; known: {known}")
    return selection.selected_folders([run for run in found if run.is_dir()])


if __name__ == "__main__":
    cli.run(main)
