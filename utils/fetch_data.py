"""Download prepared dataset files into data/<category>/, check each by its git blob id, and register it.

    python utils/fetch_data.py ARC-c [BoolQ ...] [--category math] [--source URL-or-folder]     or --all

Reads data/sources.yaml; writes data/<category>/<file>.json and data/dataset_info.json. The files come from the
repository that sources.yaml names, or from --source or PARAGEN_DATA_SOURCE: a mirror's address or a folder, where each
is looked for at its upstream path, in its category's folder and by its bare name. A file that is there already is not
downloaded again; an interrupted download is resumed.
"""

import argparse
import os
from pathlib import Path

from paragen.common import cli, settings
from paragen.common.cli import UserError, run, say
from paragen.common.paths import CATEGORIES, DATA
from paragen.dataset import download, file_sources, names, sources

SHOWN = 5  # failed files that the last line names


def main() -> None:
    args = parse_settings()
    table = sources.table(args.table or args.data_dir / "sources.yaml")
    wanted = chosen_files(table["files"], args)
    base = args.source or os.environ.get(file_sources.SOURCE_VARIABLE) or file_sources.UPSTREAM.format_map(table)
    force = args.force or settings.switch("FORCE")
    if len(wanted) > 1:
        say(f"{len(wanted)} files from {base}")
    failed, fetched, seconds = download.download_all(wanted, base, force, args.tries, args.data_dir)
    done = len(wanted) - len(failed)
    say(f"{done} of {len(wanted)} files are there and registered ({fetched} fetched, {seconds:.0f} s)")
    if failed:
        shown = ", ".join(failed[:SHOWN]) + (", ..." if len(failed) > SHOWN else "")
        raise UserError(f"{len(failed)} files failed: {shown}; correct the causes above and run it again")


def parse_settings() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    add, variable, tries = parser.add_argument, file_sources.SOURCE_VARIABLE, file_sources.TRIES
    add(
        "dataset",
        nargs="*",
        default=settings.values("DATASET"),
        help="datasets, e.g. ARC-c: its training set and its test split",
    )
    add("--category", default=settings.category() or None, help=f"all of one: {', '.join(CATEGORIES)}")
    add("--all", action="store_true", help="all of all categories")
    add("--source", help=f"an http(s) address or a folder; default: ${variable}, else upstream")
    add("--force", action="store_true", help="overwrite files that have other content")
    add("--tries", type=int, default=tries, help=f"tries without progress, a file; default {tries}")
    add("--data-dir", type=Path, default=DATA, help="default: the repository's data/")
    add("--table", type=Path, help="default: sources.yaml in the data folder")
    return parser.parse_args()


def chosen_files(files: dict[str, dict], args: argparse.Namespace) -> dict[str, dict]:
    """The mappings of the files that the settings choose. Raises UserError when they choose none."""
    datasets, category = [name for typed in args.dataset for name in typed.split()], args.category
    if args.all:
        datasets, category = [], None
    if not (datasets or category or args.all):
        known = ", ".join(dict.fromkeys(names.prepared_dataset(entry["dataset"]) for entry in files.values()))
        raise UserError(
            f"name a dataset: make data DATASET=ARC-c, make data CATEGORY=math, or make data-all; known: {known}"
        )
    chosen = sources.selected(files, datasets, category)
    if not chosen:
        raise UserError(f"{category}: holds none of {', '.join(datasets)}; omit CATEGORY")
    return {name: files[name] for name in chosen}


if __name__ == "__main__":
    run(main)
