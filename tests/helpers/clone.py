"""Copies of the repository's own folders, for tests that run scripts from another place."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What Python compiled of the scripts is copied, too, so that it need not be compiled in each copy; not what another
# process is writing of it at the moment.
UNFINISHED = shutil.ignore_patterns("*.pyc.*")


def copy_folder(name: str, top: Path) -> None:
    """Copy a folder of the repository, such as utils, below `top`."""
    shutil.copytree(ROOT / name, top / name, ignore=UNFINISHED)
