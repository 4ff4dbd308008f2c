"""Publish collections as a dataset repository of the Hugging Face hub.

    REPO=user/name [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] [SEED=..] [PRIVATE=1] [RAW=1] [DRY_RUN=1] \
        python utils/publish.py                                                                 (make publish)

Builds the repository's tree in saves/publish/<user>--<name>/ (DRY_RUN=1: no more than that), then uploads the files
that the hub lacks; the next call resumes an interrupted upload. Archives of an earlier call are hashed before they are
used again, and the hub's hashes are compared with the recorded ones. The account is HF_TOKEN's, or of `hf auth login`.
Collections that do not verify are refused, as are data and base models of unknown licence (ALLOW_UNKNOWN_LICENSE=1).
RAW=1 publishes the collections' folders in place of archives.
"""

from paragen.collection import index
from paragen.common import cli, files, locks, paths, settings
from paragen.common.cli import say
from paragen.hub import errors, transfer
from paragen.publishing import card, published_tree, upload


def main() -> int:
    repository = errors.repository_of(settings.text("REPO"), "make publish")
    raw, private, dry = (settings.switch(name) for name in ("RAW", "PRIVATE", "DRY_RUN"))
    if not dry:
        transfer.allow_hub()
        errors.translated(repository, None, upload.require_account, uploads=True)
    chosen, broken = index.chosen()
    table = upload.rows_of(chosen)
    tree = paths.SAVES / "publish" / repository.replace("/", "--")
    entries = published_tree.data_plan(chosen, paths.DATA)
    published_tree.check_limits(table, 1 + len({entry["file_name"] for entry in entries.values()}), raw)
    with locks.lock(files.beside(tree, "lock"), waiting=f"{tree.name}: another process is publishing it; waiting ..."):
        upload.check_publishable(chosen, tree, raw)
        marks = published_tree.build(tree, chosen, table, paths.DATA, raw)
        text = card.render(repository, chosen, table, marks, paths.DATA, paths.MODELS)
        published_tree.write(tree / "README.md", text.encode())
        upload.print_tree(tree)
        if dry:
            say(f"{paths.relative(tree)}: nothing was uploaded; to upload just this: {upload.command()}")
            return min(broken, 1)
        recorded = published_tree.recorded_hashes(tree, chosen, marks)
        errors.translated(repository, None, lambda: upload.upload(repository, tree, private, recorded), uploads=True)
    return min(broken, 1)


if __name__ == "__main__":
    cli.run(main)
