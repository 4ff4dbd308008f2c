"""Bring collections that somebody published into saves/ and their prompts into data/, verified.

    REPO=user/name [REVISION=..] [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] [SEED=..] python utils/pull.py
                                                                                                            (make pull)

Reads a repository that `make publish` made: its index first, then the files of what is selected. Every file is checked:
by the hub's hash, by the index, by the collection's manifest. What is there already stays, and gets the scores of its
evaluation where that loses none measured here; another collection or data file under the same name, and other scores,
are replaced with FORCE=1 alone. An interrupted call goes on at the next one.
"""

import os

from paragen.collection import index
from paragen.common import cli, files, paths
from paragen.hub import errors, transfer
from paragen.publishing import pull


def main() -> None:
    repository = errors.repository_of(os.environ.get("REPO", ""), "make pull")
    revision = os.environ.get("REVISION") or None
    transfer.allow_hub()
    staging = paths.SAVES / "publish" / f"pull--{repository.replace('/', '--')}"
    with files.lock(files.beside(staging, "lock"), waiting=f"another process is pulling {repository}; waiting ..."):
        table = errors.translated(f"datasets/{repository}", revision, lambda: pull.pull(repository, revision, staging))
        files.remove_folder(staging)
    index.update()
    index.print_collections(table)


if __name__ == "__main__":
    cli.run(main)
