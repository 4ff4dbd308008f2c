"""Publish collections as a dataset repository of the Hugging Face hub.

    REPO=user/name [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] [SEED=..] [PRIVATE=1] [RAW=1] [DRY_RUN=1] \\
        python utils/publish.py                                                                 (make publish)

Builds the repository's tree in saves/publish/<user>--<name>/ (DRY_RUN=1: no more than that), then uploads what the hub
does not have yet; an interrupted upload goes on at the next call. The account is HF_TOKEN's or that of `hf auth login`.
Collections that do not verify are refused, as are data and base models of unknown licence (ALLOW_UNKNOWN_LICENSE=1).
RAW=1 publishes the collections' folders in place of archives.
"""

import glob
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paragen.collection import index, verification
from paragen.common import cli, paths
from paragen.common.cli import UserError, say
from paragen.hub import errors, transfer
from paragen.publishing import licenses, published_tree

if TYPE_CHECKING:
    import pyarrow as pa

FORCE_HINT = "FORCE=1 removes them there"


def rows_of(chosen: list[index.Chosen]) -> "pa.Table":
    """The index's rows of some collections, in their order."""
    import pyarrow as pa

    return pa.concat_tables([index.rows_of(item.name, item.folder)[0] for item in chosen])


def refuse(chosen: list[index.Chosen], tree: Path, raw: bool) -> None:
    """Raise UserError unless every collection may be published: whole, in its place, of known licences.

    A collection whose archive lies untouched in the tree was whole when that was made, and is not read again.
    """
    done = {} if raw else published_tree.read_record(tree) or {}
    faulty = []
    for item in chosen:
        faults = place_faults(item.name)
        if published_tree.archive_in(tree, item, done) is None:
            say(f"verifying {item.name}")
            faults += verification.faults_of(item.folder, item.manifest)
            base = paths.MODELS / (item.manifest.base_name or "unknown")
            if not faults and (base / "config.json").is_file():
                faults += verification.peft_faults(item.folder, item.manifest.steps[-1], base)
        if not cli.asked("ALLOW_UNKNOWN_LICENSE"):
            hint = "or publish it as unknown with ALLOW_UNKNOWN_LICENSE=1"
            faults += [f"{fault}, {hint}" for fault in licenses.unknown(item.manifest, paths.DATA, paths.MODELS)]
        for fault in faults:
            print(f"FAULTY {paths.relative(item.folder)}: {fault}", file=sys.stderr, flush=True)
        if faults:
            faulty.append(f"{paths.relative(item.folder)}: {faults[0]}")
    if faulty:
        more = f" (and {len(faulty) - 1} more collections are faulty)" if len(faulty) > 1 else ""
        raise UserError(f"{faulty[0]}{more}; nothing was published")


def place_faults(name: str) -> list[str]:
    """What is wrong with where a collection lies below saves/."""
    parts = name.split("/")
    if len(parts) != 3 or parts[0] not in paths.CATEGORIES:
        return ["lies elsewhere than saves/<category>/<dataset>/<run folder>: move it there"]
    return []


def print_tree(tree: Path) -> None:
    """How many files of how many bytes each part of the tree has."""
    sizes: dict[str, list[int]] = {}
    for name in published_tree.files_of(tree):
        part = "/".join(name.split("/")[:2]) if name.startswith(published_tree.COLLECTIONS) else name.split("/")[0]
        sizes.setdefault(part, []).append((tree / name).stat().st_size)
    rows = [(part, str(len(found)), f"{sum(found) / 1e6:.2f}") for part, found in sizes.items()]
    cli.print_table(("path", "files", "MB"), rows)


# ---------------------------------------------------------------------------------------------------------- the upload


def require_account() -> None:
    """Raise UserError when nobody is logged in, before anything is made."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise UserError(f"publishing needs an account of the hub: {errors.LOG_IN} (a token with write access)")
    HfApi().whoami()


def upload(repository: str, tree: Path, private: bool) -> None:
    """Create the repository where it is missing and bring it to what the tree holds; after an interruption, go on.

    Files go up as the hub prefers, through its Xet storage, where an interrupted file goes on in its middle;
    HF_HUB_DISABLE_XET=1 asks for plain HTTP, where files that arrived whole are not sent again.

    Raises UserError when the repository is public and should not be, or holds files of other things.
    """
    from huggingface_hub import HfApi

    transfer.quiet()
    api = HfApi()
    api.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
    info = api.dataset_info(repository, files_metadata=True)
    if private and not info.private:
        raise UserError(f"{repository}: is public already; make it private in its settings, or leave PRIVATE away")
    ours = published_tree.files_of(tree)
    strangers = sorted({file.rfilename for file in info.siblings or []} - {*ours, ".gitattributes"})
    if strangers and not cli.asked("FORCE"):
        raise UserError(
            f"{repository}: holds {len(strangers)} files that are not in this selection, such as {strangers[0]}; "
            f"select what they are of, too, name another REPO, or: {FORCE_HINT}"
        )
    with transfer.stopping_at_once():
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=tree,
            commit_message="Publish collections",
            ignore_patterns=[".cache/*"],
            delete_patterns=[glob.escape(name) for name in strangers] or None,
        )
    check_arrived(api.dataset_info(repository, files_metadata=True), tree, ours)
    where = f"{api.endpoint}/datasets/{repository}"
    say(f"published: {where} ({len(ours)} files{', private' if info.private else ''})")


def check_arrived(info, tree: Path, ours: list[str]) -> None:
    """Raise UserError unless the hub lists each file of the tree with its size."""
    there = {file.rfilename: file.size for file in info.siblings or []}
    wrong = [name for name in ours if there.get(name) != (tree / name).stat().st_size]
    if wrong:
        raise UserError(f"{info.id}: {len(wrong)} files did not arrive whole, such as {wrong[0]}; run it again")
