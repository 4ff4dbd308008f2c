"""Print the path of the recipe of a dataset, a model and a phase.

    DATASET=arcc MODEL=qwen2.5-0.5b python utils/cells.py pretrain|finetune

Reads the file names below collect_scripts/. DATASET and MODEL are matched without regard to case and punctuation.
Without MODEL: qwen2.5-0.5b where the dataset has a recipe for it, else the dataset's one model.
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
