"""Checks which collections may be published, and uploads a repository's tree to the Hugging Face hub."""

import glob
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from paragen.collection import index, verification
from paragen.common import cli, files, paths, settings
from paragen.common.cli import UserError, say
from paragen.hub import errors, transfer
from paragen.publishing import licenses, published_tree

if TYPE_CHECKING:
    import pyarrow as pa
    from huggingface_hub.hf_api import RepoSibling

FORCE_HINT = "FORCE=1 removes them there"


def rows_of(chosen: list[index.Chosen]) -> "pa.Table":
    """The index's rows of some collections, in the same order."""
    import pyarrow as pa

    return pa.concat_tables([index.rows_of(item.name, item.folder)[0] for item in chosen])


def check_publishable(chosen: list[index.Chosen], tree: Path, raw: bool) -> None:
    """Raise UserError unless every collection is whole, lies in a category's folder and has known licences.

    A collection with an unchanged archive in the tree was verified when that was made, and is not read again. Where
    more than one thing is wrong, each is printed, and the error has their number.
    """
    check_licenses(chosen)
    done = {} if raw else published_tree.read_record(tree) or {}
    found: list[tuple[str, str]] = []
    for item in chosen:
        faults = place_faults(item.name)
        if published_tree.archive_in(tree, item, done) is None:
            say(f"verifying {item.name}")
            faults += verification.faults_of(item.folder, item.manifest)
            base = paths.MODELS / (item.manifest.base_name or "unknown")
            if not faults and (base / "config.json").is_file():
                faults += verification.peft_faults(item.folder, item.manifest.steps[-1], base)
        found += [(paths.relative(item.folder), fault) for fault in faults]
    if len(found) == 1:
        raise UserError(f"{': '.join(found[0])}; nothing was published")
    for name, fault in found:
        print(f"FAULTY {name}: {fault}", file=sys.stderr, flush=True)
    if found:
        faulty = len({name for name, _ in found})
        raise UserError(f"{len(found)} faults in {faulty} of {len(chosen)} collections; nothing was published")


def check_licenses(chosen: list[index.Chosen]) -> None:
    """Raise UserError where the licence of data or of a base model is not known, unless ALLOW_UNKNOWN_LICENSE=1."""
    if settings.switch("ALLOW_UNKNOWN_LICENSE"):
        return
    each = [licenses.unknown(item.folder, item.manifest, paths.DATA, paths.MODELS) for item in chosen]
    found = list(dict.fromkeys(phrase for phrases in each for phrase in phrases))
    way_out = "ALLOW_UNKNOWN_LICENSE=1 publishes them as unknown; nothing was published"
    if len(found) == 1:
        raise UserError(f"{found[0]}; or ALLOW_UNKNOWN_LICENSE=1 publishes it as unknown; nothing was published")
    for phrase in found:
        cli.complain(phrase)
    if found:
        raise UserError(f"{len(found)} licences are not known; {way_out}")


def place_faults(name: str) -> list[str]:
    """The fault of a collection's place below saves/, in a list."""
    parts = name.split("/")
    if len(parts) != 3 or parts[0] not in paths.CATEGORIES:
        return ["lies elsewhere than saves/<category>/<dataset>/<run folder>: move it there"]
    return []


def command() -> str:
    """The `make publish` that uploads what DRY_RUN=1 built: with all other settings of this call, to be pasted."""
    given = []
    for name in settings.TARGETS["publish"]:
        kind = settings.SETTINGS[name].kind
        if kind == "switch":
            value = "1" if settings.switch(name) else ""
        else:
            value = settings.text(name) if kind == "text" else " ".join(settings.values(name))
        given += [f"{name}={shlex.quote(value)}"] if value and name != "DRY_RUN" else []
    return " ".join(["make publish", *given])


def print_tree(tree: Path) -> None:
    """Print the number and size of the files in each part of the tree."""
    sizes: dict[str, list[int]] = {}
    for name in published_tree.files_of(tree):
        part = "/".join(name.split("/")[:2]) if name.startswith(published_tree.COLLECTIONS) else name.split("/")[0]
        sizes.setdefault(part, []).append((tree / name).stat().st_size)
    rows = [(part, str(len(found)), f"{sum(found) / 1e6:.2f}") for part, found in sizes.items()]
    cli.print_table(("path", "files", "MB"), rows)


# ---------------------------------------------------------------------------------------------------------- the upload


def require_account() -> None:
    """Raise UserError when no account is logged in."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise UserError(f"publishing needs an account of the hub: {errors.LOG_IN} (a token with write access)")
    HfApi().whoami()


def upload(repository: str, tree: Path, private: bool, recorded: dict[str, str]) -> None:
    """Create the repository if it is missing, and upload the tree; an interrupted upload is resumed.

    Args:
        repository: its id.
        tree: the tree's folder.
        private: whether a new repository is made private.
        recorded: the hashes that files of the tree must have, by their paths (see published_tree.recorded_hashes).

    Files go to the hub's Xet storage, which resumes an interrupted file in its middle. With HF_HUB_DISABLE_XET=1 they
    go over plain HTTP, and only files that did not arrive whole are sent again.

    Raises UserError when the repository is public and should be private, or holds files outside the tree; and when the
    hub, after the upload, states another size or hash of a file: huggingface_hub takes these from the bytes it sends.
    """
    from huggingface_hub import HfApi

    transfer.quiet()
    api = HfApi()
    with errors.read_as_of_a_hub():
        api.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
    there = transfer.look_up(repository, None, "dataset")
    if private and not there.info.private:
        raise UserError(f"{repository}: is public already; make it private in its settings, or omit PRIVATE")
    ours = published_tree.files_of(tree)
    foreign = sorted({file.rfilename for file in there.files} - {*ours, ".gitattributes"})
    if foreign and not settings.switch("FORCE"):
        raise UserError(
            f"{repository}: holds {len(foreign)} files that are not in this selection, such as {foreign[0]}; "
            f"select their collections, too, name another REPO, or: {FORCE_HINT}"
        )
    with transfer.stopping_at_once():
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=tree,
            commit_message="Publish collections",
            ignore_patterns=[".cache/*"],
            delete_patterns=[glob.escape(name) for name in foreign] or None,
        )
    check_arrived(transfer.look_up(repository, None, "dataset"), tree, ours, recorded)
    where = f"{api.endpoint}/datasets/{repository}"
    say(f"published: {where} ({len(ours)} files{', private' if there.info.private else ''})")


def _is_same(path: Path, there: "RepoSibling") -> bool:
    """Whether the hub states the size of a file and, of a small one that it keeps in git, the hash of its content."""
    in_git = there.lfs is None and there.blob_id is not None
    return there.size == path.stat().st_size and (not in_git or there.blob_id == files.git_blob_id(path))


def check_arrived(stated: transfer.Stated, tree: Path, ours: list[str], recorded: dict[str, str]) -> None:
    """Raise UserError unless the hub lists each file of the tree with its size and, where one is recorded, its hash."""
    there = {file.rfilename: file for file in stated.files}
    wrong = [name for name in ours if name not in there or not _is_same(tree / name, there[name])]
    if wrong:
        raise UserError(f"{stated.info.id}: {len(wrong)} files did not arrive whole, such as {wrong[0]}; run it again")
    for name, sha256 in recorded.items():
        lfs = there[name].lfs
        if (lfs.sha256 if lfs else files.sha256_of(tree / name)) != sha256:
            raise UserError(
                f"{paths.relative(tree / name)}: was damaged since it was made (a failing disk?), and was uploaded so; "
                "run it again: the file is made anew and replaced there"
            )
