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

from paragen.common import cli
from paragen.common.cli import UserError, run, say
from paragen.common.paths import CATEGORIES, DATA
from paragen.dataset import download, file_sources, names, sources

SHOWN = 5  # failed files that the last line names


def main() -> None:
    settings = parse_settings()
    table = sources.table(settings.table or settings.data_dir / "sources.yaml")
    wanted = chosen_files(table["files"], settings)
    base = settings.source or os.environ.get(file_sources.SOURCE_VARIABLE) or file_sources.UPSTREAM.format_map(table)
    force = settings.force or cli.is_on("FORCE")
    if len(wanted) > 1:
        say(f"{len(wanted)} files from {base}")
    failed, fetched, seconds = download.download_all(wanted, base, force, settings.tries, settings.data_dir)
    done = len(wanted) - len(failed)
    say(f"{done} of {len(wanted)} files are there and registered ({fetched} fetched, {seconds:.0f} s)")
    if failed:
        shown = ", ".join(failed[:SHOWN]) + (", ..." if len(failed) > SHOWN else "")
        raise UserError(f"{len(failed)} files failed: {shown}; correct the causes above and run it again")


def parse_settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, variable, tries = parser.add_argument, file_sources.SOURCE_VARIABLE, file_sources.TRIES
    add("dataset", nargs="*", help="datasets, e.g. ARC-c: its training set and its test split")
    add("--category", help=f"all of one: {', '.join(CATEGORIES)}")
    add("--all", action="store_true", help="all of all categories")
    add("--source", help=f"an http(s) address or a folder; default: ${variable}, else upstream")
    add("--force", action="store_true", help="overwrite files that have other content")
    add("--tries", type=int, default=tries, help=f"tries without progress, a file; default {tries}")
    add("--data-dir", type=Path, default=DATA, help="default: the repository's data/")
    add("--table", type=Path, help="default: sources.yaml in the data folder")
    return parser.parse_args()


def chosen_files(files: dict[str, dict], settings: argparse.Namespace) -> dict[str, dict]:
    """The mappings of the files that the settings choose. Raises UserError when they choose none."""
    datasets = [name for typed in settings.dataset for name in typed.split()]
    if not (datasets or settings.category or settings.all):
        known = ", ".join(dict.fromkeys(names.family(entry["dataset"]) for entry in files.values()))
        raise UserError(
            f"name a dataset: make data DATASET=ARC-c, make data CATEGORY=math, or make data-all; known: {known}"
        )
    chosen = sources.selected(files, datasets, settings.category)
    if not chosen:
        raise UserError(f"{settings.category}: holds none of {', '.join(datasets)}; omit CATEGORY=")
    return {name: files[name] for name in chosen}


if __name__ == "__main__":
    run(main)
