"""Trains one recipe with half the rows at a time, as a sweep does after a cell was out of memory.

fork_server.start("helpers.half_batch", [RECIPE, RANK], ...)
"""

import sys
from pathlib import Path

from paragen.recipes.run import run_of
from paragen.training import ordinary


def main() -> None:
    recipe, rank = sys.argv[1:]
    ordinary.train(run_of(Path(recipe), int(rank)), halved=True)
