"""Print what collecting some cells takes: cells, steps, disk and, where runs of their models exist, time.

    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK="2 8"] [SEED=..] [KEEP=..] python utils/plan.py        (make plan)

Reads recipes, run folders and their manifests; writes nothing. Too little disk is an error.
"""

from paragen.common import cli
from paragen.recipes import lookup
from paragen.sweep import plan


def main() -> None:
    plan.show(lookup.chosen_cells())


if __name__ == "__main__":
    cli.run(main)
