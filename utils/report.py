"""One page to look at all that was collected: saves/report/index.html, which opens from disk without a network.

    python utils/report.py        (make report)

Reads recipes, manifests, logs and the statistics of each collection (computed where they are missing); writes the
index, the statistics and the page. A broken collection is on the page as such, and named on stderr.
"""

from paragen.analysis import report
from paragen.common import cli, paths
from paragen.common.cli import say


def main() -> None:
    path = report.make()
    say(f"report: {paths.relative(path)}")


if __name__ == "__main__":
    cli.run(main)
