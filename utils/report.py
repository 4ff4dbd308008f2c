"""Make the report, one page about all collections: saves/report/index.html. It opens from disk, without a network.

    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] [SEED=..] python utils/report.py                  (make report)

Reads recipes, manifests, logs and the statistics of each collection; writes the index and the page. Statistics that
are missing are made for at most a minute, and `make stats` makes the rest: a collection without them is shown without
pictures of its weights. A broken one is marked on the page and named on stderr, and the status is 1. A page of selected
collections says how they were selected.
"""

import os

from paragen.analysis import report
from paragen.collection import selection
from paragen.common import cli, paths
from paragen.common.cli import say

# NumPy reads it when it starts. The pictures' matrices are small: waiting for other threads takes longer than the work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> int:
    path, faults = report.make()
    given = selection.settings_of(selection.requested_filters())
    say(f"report: {paths.relative(path)}{f' (of {given})' if given else ''}")
    return min(faults, 1)


if __name__ == "__main__":
    cli.run(main)
