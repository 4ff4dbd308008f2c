"""Register a data file in data/dataset_info.json after a check of every row, or check all that is registered there.

    python utils/register_dataset.py data/math/GSM8K_train.json [--columns prompt=question response=answer]
    python utils/register_dataset.py table.csv --category math    (.jsonl, .parquet, hub:<repo>[:config[:split]] too)
    python utils/register_dataset.py --check                                                   (make check-data)

Reads data/<category>/<file>.json and data/dataset_info.json; writes one entry of the latter, or nothing at all. A file
of another format is first converted to data/<category>/<name>.json, with the columns that are read.
"""

import re
from pathlib import Path

from paragen.common import cli, settings
from paragen.common.cli import UserError, complain, run, say
from paragen.common.paths import CATEGORIES, DATA, relative
from paragen.dataset import checks, convert, names, registration
from paragen.dataset.dataset_info import ACCEPTED_ROWS, HELD_OUT


def main() -> None:
    args = parser_of_settings().parse_args()
    if args.check:
        check_all(args.data_dir)
        return
    converts = bool(args.file) and convert.is_source(args.file)
    named_alone = bool(args.name and args.category)
    if not converts and ((args.file is None) != named_alone or (args.file and args.category)):
        raise UserError("name a file, or a name and its category; a category beside a file only where it is converted")
    marks = {HELD_OUT: args.held_out, ACCEPTED_ROWS: args.accept_rows}
    request = registration.Request(
        name=args.name,
        columns=named_columns(args.columns),
        prompts_only=args.prompts_only,
        replace=args.replace,
        marks={key: value for key, value in marks.items() if value is not None},
    )
    if converts:
        on_hub = args.file.startswith(convert.HUB)
        source = args.file if on_hub else str(registration.find_file(args.file, args.data_dir))
        stem = args.name or convert.stem_of(source)
        target = registration.target_of(source, args.category, stem, args.data_dir)
        request = request._replace(name=args.name or names.dataset_of_file(stem))
        registered = registration.register_converted(source, target, request, args.data_dir)
    else:
        if args.file:
            file = registration.find_file(args.file, args.data_dir)
        else:
            file = registration.file_in_category(args.name, args.category, args.data_dir)
        request = request._replace(name=args.name or names.dataset_of_file(file.stem))
        registered = registration.register(file, request, args.data_dir)
    for line in registered.lines():
        say(line)


def parser_of_settings() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "file",
        nargs="?",
        default=settings.text("FILE") or None,
        help="the data file, in data/<category>/, or what is to be converted",
    )
    add(
        "--name",
        default=settings.text("NAME") or None,
        help="the dataset's name; default: the file's, without .json and _train",
    )
    with_name = "with --name in place of the file, or of what is converted"
    add("--category", default=settings.category() or None, help=f"{with_name}: one of {', '.join(CATEGORIES)}")
    add(
        "--columns", nargs="+", default=settings.text("MAP").split(), metavar="KIND=COLUMN", help="e.g. prompt=question"
    )
    add(
        "--held-out",
        type=int,
        default=settings.number("HELD_OUT"),
        metavar="ROWS",
        help="the number of last rows that are for scoring, not training",
    )
    accepted = settings.values("ACCEPT")
    if wrong := [row for row in accepted if not row.isdecimal()]:
        raise UserError(
            f"ACCEPT={' '.join(accepted)}: {wrong[0]!r} is no number of a row; give them with blanks between"
        )
    add(
        "--accept-rows",
        nargs="+",
        type=int,
        default=list(map(int, accepted)) or None,
        metavar="ROW",
        help="the numbers of rows that may lack a text or answer",
    )
    add(
        "--prompts-only",
        action="store_true",
        default=settings.switch("PROMPTS_ONLY"),
        help="the rows have no responses: not for training",
    )
    add(
        "--replace",
        action="store_true",
        default=settings.switch("REPLACE"),
        help="the name may be registered for another file",
    )
    add("--check", action="store_true", help="check every entry and list all that is wrong")
    add("--data-dir", type=Path, default=DATA, help="default: the repository's data/")
    return parser


def named_columns(pairs: list[str]) -> dict[str, str]:
    """["prompt=question"] as {"prompt": "question"}; a column's name may hold blanks. Raises UserError for no pair."""
    pairs = re.split(r"\s+(?=\w+=)", " ".join(pairs).strip()) if pairs else []
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f'columns {pair!r}: write kind=column, such as MAP="prompt=question response=answer"')
    return dict(pair.split("=", 1) for pair in pairs)


def check_all(data_dir: Path) -> None:
    """Print all faults, notes and warnings, a line each. Raises UserError with the counts when there are faults."""
    count = faulty = faults = 0
    for checked in checks.check_all(data_dir):
        count += 1
        faulty += bool(checked.faults)
        faults += len(checked.faults)
        for fault in checked.faults:
            complain(f"{checked.name}: {fault}")
        for note in checked.notes:
            say(f"note: {checked.name}: {note}")
        for warning in checked.warnings:
            say(f"warning: {checked.name}: {warning}")
    where = relative(data_dir / "dataset_info.json")
    if faults:
        way_out = "correct the files, or register them again with `make register FILE=data/<category>/<file>.json`"
        raise UserError(f"{where}: faults: {faults}, in {faulty} of {count} datasets; {way_out}")
    say(f"{where}: {count} datasets, no faults")


if __name__ == "__main__":
    run(main)
