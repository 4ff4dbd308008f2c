"""Registers a data file in data/dataset_info.json after a look at every row, or checks all that is registered there.

    python utils/register_dataset.py data/math/GSM8K_train.json [--columns prompt=question response=answer]
    python utils/register_dataset.py table.csv --category math    (.jsonl, .parquet, hub:<repo>[:config[:split]] too)
    python utils/register_dataset.py --check

Reads data/<category>/<file>.json and data/dataset_info.json; writes the one entry of the latter, or nothing at all. Of
another kind of file it first writes data/<category>/<name>.json, with the columns that are read (convert_dataset.py).
"""

import argparse
from pathlib import Path

from paragen.common.cli import run
from paragen.common.paths import CATEGORIES, DATA
from paragen.dataset import convert, registration
from paragen.dataset.dataset_info import (
    ACCEPTED_ROWS,
    HELD_OUT,
)


def main() -> int:
    """Read the command line; register one file or check all. The status of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="the data file, in data/<category>/, or what is to be converted")
    parser.add_argument("--name", help="the dataset's name; default: the file's, without .json and _train")
    parser.add_argument(
        "--category", help=f"with --name in place of the file, or of what is converted: one of {', '.join(CATEGORIES)}"
    )
    parser.add_argument("--columns", nargs="+", default=[], metavar="KIND=COLUMN", help="e.g. prompt=question")
    parser.add_argument(
        "--held-out", type=int, metavar="ROWS", help="the last so many rows are for scoring, not training"
    )
    parser.add_argument(
        "--accept-rows", nargs="+", type=int, metavar="ROW", help="rows that may lack a text or an answer, by number"
    )
    parser.add_argument("--prompts-only", action="store_true", help="the rows have no responses: not for training")
    parser.add_argument("--replace", action="store_true", help="the name may be registered for another file")
    parser.add_argument("--check", action="store_true", help="check every entry and list all that is wrong")
    parser.add_argument("--data-dir", type=Path, default=DATA, help="default: the repository's data/")
    asked = parser.parse_args()
    if asked.check:
        return registration.check(asked.data_dir)
    converts = bool(asked.file) and convert.is_source(asked.file)
    named_alone = bool(asked.name and asked.category)
    if not converts and ((asked.file is None) != named_alone or (asked.file and asked.category)):
        parser.error("give the file, or --name and --category; --category with a file only where it is converted")
    named, marks = (
        registration.named_columns(asked.columns),
        {HELD_OUT: asked.held_out, ACCEPTED_ROWS: asked.accept_rows},
    )
    marks = {key: value for key, value in marks.items() if value is not None}
    if converts:
        source = (
            asked.file if asked.file.startswith(convert.HUB) else str(registration.found(asked.file, asked.data_dir))
        )
        stem = asked.name or convert.stem_of(source)
        target = registration.target_of(source, asked.category, stem, asked.data_dir)
        name = asked.name or stem.removesuffix("_train")
        registration.register_converted(
            source, target, name, named, asked.prompts_only, asked.replace, asked.data_dir, marks
        )
        return 0
    file = (
        registration.found(asked.file, asked.data_dir)
        if asked.file
        else registration.file_of(asked.name, asked.category, asked.data_dir)
    )
    name = asked.name or file.stem.removesuffix("_train")
    registration.register(file, name, named, asked.prompts_only, asked.replace, asked.data_dir, marks)
    return 0


if __name__ == "__main__":
    run(main)
