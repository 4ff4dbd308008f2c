"""Finds the recipe of a cell among those under collect_scripts/, from what a user types.

    DATASET=arcc MODEL=qwen2.5-0.5b python utils/cells.py pretrain      prints the recipe's path

DATASET and MODEL are matched without case and punctuation. Without MODEL: qwen2.5-0.5b where the dataset has a recipe
for it, else the one model that it has.
"""

import os
import sys

from paragen.common import cli, paths
from paragen.common.cli import UserError
from paragen.recipes import lookup


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in paths.PHASES:
        raise UserError(f"usage: DATASET=... [MODEL=...] cells.py {'|'.join(paths.PHASES)}")
    print(lookup.find(os.environ.get("DATASET", ""), os.environ.get("MODEL"), sys.argv[1]))


if __name__ == "__main__":
    cli.run(main)
