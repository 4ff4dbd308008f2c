"""Brings prepared dataset files into data/<category>/, checks each by its git blob id, and registers it.

    python utils/fetch_data.py ARC-c [BoolQ ...] [--category math] [--source URL-or-folder]     or --all

Reads data/sources.yaml; writes data/<category>/<file>.json and data/dataset_info.json. The files come from the
repository that sources.yaml names, or from --source or PARAGEN_DATA_SOURCE: a mirror's address or a folder, where each
is looked for at its upstream path, in its category's folder and by its bare name. A file that is there already is not
fetched again; a download that was cut off is gone on with.
"""

import argparse
import os
from pathlib import Path

from paragen.common import cli
from paragen.common.cli import UserError, run
from paragen.common.paths import CATEGORIES, DATA
from paragen.dataset import download, sources


def main() -> int:
    """Read the command line, bring the files, register them. The status of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="*", help="datasets, e.g. ARC-c: its training set and its test split")
    parser.add_argument("--category", help=f"all of one: {', '.join(CATEGORIES)}")
    parser.add_argument("--all", action="store_true", help="all of all categories")
    parser.add_argument(
        "--source", help=f"an http(s) address or a folder; default: ${download.SOURCE_VARIABLE}, else upstream"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that have other content")
    parser.add_argument(
        "--tries", type=int, default=download.TRIES, help=f"tries without progress, a file; default {download.TRIES}"
    )
    parser.add_argument("--data-dir", type=Path, default=DATA, help="default: the repository's data/")
    parser.add_argument("--table", type=Path, help="default: sources.yaml in the data folder")
    asked = parser.parse_args()
    datasets = [name for names in asked.dataset for name in names.split()]
    table = sources.table(asked.table or asked.data_dir / "sources.yaml")
    if not (datasets or asked.category or asked.all):
        known = ", ".join(dict.fromkeys(sources.family(entry["dataset"]) for entry in table["files"].values()))
        raise UserError(
            f"say which: make data DATASET=ARC-c, make data CATEGORY=math, or make data-all; known: {known}"
        )
    names = sources.selected(table["files"], datasets, asked.category)
    if not names:
        raise UserError(f"{asked.category}: holds none of {', '.join(datasets)}; leave CATEGORY= away")
    base = asked.source or os.environ.get(download.SOURCE_VARIABLE) or download.UPSTREAM.format_map(table)
    force = asked.force or cli.asked("FORCE")
    return download.bring_all({name: table["files"][name] for name in names}, base, force, asked.tries, asked.data_dir)


if __name__ == "__main__":
    run(main)
