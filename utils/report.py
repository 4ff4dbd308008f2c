"""Make the report, one page about all collections: saves/report/index.html. It opens from disk, without a network.

    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] [SEED=..] python utils/report.py                  (make report)

Reads recipes, manifests, logs and the statistics of each collection (measured where they are missing); writes the
index, the statistics and the page. A broken collection is marked on the page and named on stderr. A page of selected
collections says how they were selected.
"""

from paragen.analysis import report
from paragen.collection import selection
from paragen.common import cli, paths
from paragen.common.cli import say


def main() -> None:
    path = report.make()
    given = selection.settings_of(selection.requested_filters())
    say(f"report: {paths.relative(path)}{f' (of {given})' if given else ''}")


if __name__ == "__main__":
    cli.run(main)
