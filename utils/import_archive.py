"""Restore archived collections into saves/: the same files with the same bytes, verified.

    python utils/import_archive.py X.archive          one collection                               (make import FILE=..)
    python utils/import_archive.py FOLDER             all archives below a folder, parts of a collection together

Each goes to saves/<category>/<dataset>/<run folder>/, which its manifest names. Where the same collection exists, at
whatever place below saves/, it stays there, and gets the archive's scores if it has fewer. Another collection stays,
too, and is an error, unless FORCE=1. The archives are not changed.
"""

import sys
from pathlib import Path

from paragen.archives import archive
from paragen.common import cli, paths, settings
from paragen.common.cli import UserError


def main() -> int:
    given = sys.argv[1:] or [settings.text("FILE")]
    if given == [""]:
        raise UserError(f"name an archive: make import FILE=x{archive.SUFFIX}, or a folder of them")
    faults = 0
    for parts in by_collection(archives_in([Path(name).expanduser() for name in given])):
        try:
            archive.restore(parts, paths.SAVES)
        except UserError as error:
            cli.complain(str(error))
            faults += 1
    return 1 if faults else 0


def archives_in(tops: list[Path]) -> list[Path]:
    """The archives among some files and below some folders, sorted. Raises UserError where there is none."""
    found: list[Path] = []
    for top in tops:
        below = top.rglob(f"*{archive.SUFFIX}") if top.is_dir() else [top]
        here = [path for path in below if not any(part.startswith(".") for part in path.relative_to(top).parts)]
        if not here or not all(path.exists() for path in here):
            raise UserError(f"{top}: no such archive, nor a folder of files *{archive.SUFFIX}")
        found += sorted(here)
    return found


def by_collection(archives: list[Path]) -> list[list[Path]]:
    """Archives grouped by the collection whose manifest they hold; one that cannot be read stands alone."""
    groups: dict[str, list[Path]] = {}
    for path in archives:
        try:
            groups.setdefault(archive.opened(path).index["manifest"], []).append(path)
        except UserError:
            groups[str(path)] = [path]
    return list(groups.values())


if __name__ == "__main__":
    cli.run(main)
