"""Download published collections into saves/ and their prompts into data/, and verify them.

    REPO=user/name [REVISION=..] [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] [SEED=..] python utils/pull.py
                                                                                                            (make pull)

Reads a repository that `make publish` made: its index first, then the files of the selected collections. Every file is
checked against the hub's hash, the index and the collection's manifest. A collection that exists here, at whatever
place, stays, and gets the published scores unless that would lose some. Another collection or data file of the same
name, and other scores, are replaced only with FORCE=1. An interrupted download is resumed by the next call.
"""

from paragen.collection import index, index_tables
from paragen.common import cli, files, locks, paths, settings
from paragen.common.cli import UserError
from paragen.hub import errors, transfer
from paragen.publishing import pull


def main() -> None:
    repository = errors.repository_of(settings.text("REPO"), "make pull")
    revision = settings.text("REVISION") or None
    transfer.allow_hub()
    staging = paths.SAVES / "publish" / f"pull--{repository.replace('/', '--')}"
    with locks.lock(files.beside(staging, "lock"), waiting=f"another process is pulling {repository}; waiting ..."):
        pulled = errors.translated(f"datasets/{repository}", revision, lambda: pull.pull(repository, revision, staging))
        if not pulled.summary:
            files.remove_folder(staging)
    index.update()
    index_tables.print_collections(pulled.table)
    if pulled.summary:
        raise UserError(pulled.summary)


if __name__ == "__main__":
    cli.run(main)
