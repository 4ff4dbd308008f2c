"""Print what collecting some cells takes: cells, steps, disk and, where runs of their models exist, time.

    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANKS="2 8"] python utils/plan.py        (make plan)

Reads recipes, run folders and their manifests; writes nothing. Too little disk is an error.
"""

import os

from paragen.common import cli
from paragen.recipes import lookup
from paragen.sweep import plan


def main() -> None:
    plan.show(lookup.chosen_cells(os.environ.get("CATEGORY", ""), os.environ.get("DATASET", "").split()))


if __name__ == "__main__":
    cli.run(main)
