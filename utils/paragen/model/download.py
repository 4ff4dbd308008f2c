"""Downloads a base model from the Hugging Face hub into models/, and checks one that is there already."""

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.hub import errors, transfer
from paragen.hub.transfer import allow_hub, download_file, fault_of, gigabytes, part_of
from paragen.model import base_models, model_files

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# What is downloaded besides weights and tokenizer: never code, never weights in formats that can run code.
SMALL_FILES = re.compile(r"(config|generation_config)\.json|(LICENSE|LICENCE|NOTICE)(\.\w+)?")


def requested_entry(text: str) -> dict[str, Any]:
    """The model that a user names, with the keys of models/models.yaml.

    Args:
        text: a short name, a folder under models/ (`my-model` or `models/my-model`), or org/name on the hub; what is of
            the hub may end in @revision.

    A hub repository that the table does not list has only `hub_id`, `revision`, `folder` and `license`. Raises
    UserError naming the models when there is no such one.
    """
    name, _, revision = text.strip().partition("@")
    if not name:
        raise UserError(
            f"say which model: make model MODEL=...; known: {', '.join(base_models.table())}; any other: org/name"
        )
    name = base_models.without_models(name)
    if "/" in name:
        if not errors.is_name(name):
            raise UserError(f"model {name!r} is not a hub repository's name ({errors.NAMING}); it looks like org/name")
        entry = entry_of_repository(name)
    else:
        try:
            _, entry = base_models.find_entry(name)
        except UserError as error:
            raise UserError(f"{error}; any model of the hub: MODEL=org/name") from None
    if revision and not entry["hub_id"]:
        raise UserError(f"model {text!r}: {name} is not from the hub, so it has no revision; omit @{revision}")
    return {**entry, "revision": revision or entry["revision"]}


def entry_of_repository(hub_id: str) -> dict[str, Any]:
    """The table's mapping of a hub repository, or a new one whose folder has the repository's name."""
    folder = hub_id.split("/")[1]
    for short, values in base_models.table().items():
        if (values["hub_id"] or "").lower() == hub_id.lower():
            return values
        if folder.lower() in (short, values["folder"].lower()):
            raise UserError(
                f"{hub_id}: models/{folder} would be taken for {short} ({values['hub_id']}); "
                "give it a short name and a folder of its own in models/models.yaml"
            )
    return {"hub_id": hub_id, "revision": None, "folder": folder, "license": None}


# ---------------------------------------------------------------------------------------------- what is there already


def check(folder: Path, entry: dict[str, Any]) -> list[str]:
    """Check that a folder holds the whole requested model, unchanged since `make model` made it.

    An encoder whose config.json lets it see later tokens is corrected. Returns lines to print. Raises UserError with
    the fault and the way out.
    """
    name = paths.relative(folder)
    lines = [f"{name}/config.json: is_decoder is true now"] if model_files.set_decoder(folder) else []
    base_models.local_folder(folder)
    source = base_models.source_of(folder)
    if source and not {"hub_id", "revision", "sha256"} <= set(source):
        raise UserError(f"{name}/{base_models.SOURCE_FILE}: make model did not write this; remove it and run it again")
    if source and entry["hub_id"] and (source["hub_id"] or "").lower() != entry["hub_id"].lower():
        held = source["hub_id"] or "a model that is not from the hub"
        raise UserError(f"{name}: holds {held}, not {entry['hub_id']}; move it away and run it again")
    if entry["revision"]:
        check_revision(folder, entry)
    if not source:
        return [*lines, f"{name} is there and whole (put there by hand)"]
    changed = base_models.changed_files(folder)
    if changed or base_models.identity_of(folder)["sha256"] != source["sha256"]:
        raise UserError(
            f"{name}: {', '.join(changed) or 'its files'} changed since it was made; remove the folder and run it again"
        )
    return [*lines, f"{name} is there and whole"]


def check_revision(folder: Path, entry: dict[str, Any]) -> None:
    """Raise UserError, naming both, where a folder is at another commit than the requested revision.

    The hub is asked only for a branch or tag that is not the one with which the folder was downloaded.
    """
    name, wanted, commit = paths.relative(folder), entry["revision"], base_models.hub_origin(folder)[1]
    way_out = f"omit @{wanted}, or move the folder away and run it again"
    if commit is None:
        raise UserError(f"{name}: was put there by hand, so which revision it is is not known; {way_out}")
    if wanted == base_models.source_of(folder).get("requested") or (len(wanted) >= 4 and commit.startswith(wanted)):
        return
    if base_models.is_commit(wanted):
        raise UserError(f"{name}: is at commit {commit}, not {wanted}; {way_out}")
    set_hub_environment()
    try:
        meant = errors.translated(entry["hub_id"], wanted, lambda: look_up(entry)).commit
    except UserError as error:
        raise UserError(f"{name}: is at commit {commit}, and which one {wanted} is is not known: {error}") from None
    if meant != commit:
        raise UserError(f"{name}: is at commit {commit}, but {wanted} is {meant}; {way_out}")


# ------------------------------------------------------------------------------------------------------- from the hub


def download(folder: Path, entry: dict[str, Any]) -> None:
    """Download a model of the hub to `folder`, with a record of where it comes from.

    The files arrive in a hidden folder beside it, which an interruption leaves for the next call, and which is renamed
    when all are checked. Raises UserError with the way out for errors of the hub, the network and the disk.
    """
    set_hub_environment()
    staging = files.beside(folder, "download")

    def fetch() -> tuple[Listing, dict[str, "RepoSibling"]]:
        listing = look_up(entry)
        chosen = choose_files(entry["hub_id"], listing)
        remove_unusable(staging, chosen)
        check_disk(folder, staging, chosen)
        staging.mkdir(exist_ok=True)
        download_files(entry["hub_id"], listing.commit, chosen, staging)
        return listing, chosen

    finish(staging, folder, entry, *errors.translated(entry["hub_id"], entry["revision"], fetch))


def set_hub_environment() -> None:
    """Let huggingface_hub, which is imported after this, reach the hub.

    Files are downloaded over plain HTTP, which resumes in the middle of a file and works through every mirror.
    HF_HUB_DISABLE_XET=0 selects the hub's Xet storage, which is faster on a fast line but restarts an interrupted file.
    """
    allow_hub()
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")


class Listing(NamedTuple):
    """What the hub states of a repository."""

    commit: str
    license: str | None
    files: list["RepoSibling"]  # with sizes and hashes


def look_up(entry: dict[str, Any]) -> Listing:
    """What the hub states of a repository at the requested revision."""
    stated = transfer.look_up(entry["hub_id"], entry["revision"])
    license_name = base_models.license_of(getattr(stated.info.card_data, "license", None))
    return Listing(stated.commit, license_name, stated.files)


def choose_files(hub_id: str, listing: Listing) -> dict[str, "RepoSibling"]:
    """The files of a repository that training needs, by name; the weights once, as safetensors.

    Raises UserError when the repository has no config or no safetensors weights.
    """
    there = {file.rfilename: file for file in listing.files if "/" not in file.rfilename}
    if model_files.WEIGHTS in there:
        weights = {model_files.WEIGHTS}
    elif model_files.WEIGHTS_INDEX in there:
        weights = {model_files.WEIGHTS_INDEX, *filter(SHARD.fullmatch, there)}
    else:
        others = sorted(name for name in there if re.search(r"\.(bin|pt|pth|gguf|onnx|msgpack|h5|safetensors)$", name))
        raise UserError(
            f"{hub_id}: has no {model_files.WEIGHTS} nor {model_files.WEIGHTS_INDEX}, "
            f"only {', '.join(others) or 'no weights'}; "
            "other formats can run code when read: take a repository with safetensors weights"
        )
    chosen = {
        name: file
        for name, file in there.items()
        if name in weights or model_files.TOKENIZER_FILES.fullmatch(name) or SMALL_FILES.fullmatch(name)
    }
    if "config.json" not in chosen:
        raise UserError(f"{hub_id}: has no config.json, so it is no model for transformers; take another repository")
    return chosen


def remove_unusable(staging: Path, chosen: dict[str, "RepoSibling"]) -> None:
    """Remove what an interrupted download left and this one cannot use."""
    for path in (staging / ".cache").rglob("*.incomplete"):
        path.unlink()
    parts = {part_of(staging, file).name for file in chosen.values()}
    for path in staging.glob("*"):
        if path.is_file() and path.name not in chosen and path.name not in parts:
            path.unlink()


def check_disk(folder: Path, staging: Path, chosen: dict[str, "RepoSibling"]) -> None:
    """Raise UserError, with the missing bytes, when the files that are not here yet do not fit on the disk."""
    total = sum(file.size or 0 for file in chosen.values())
    here = files.size_of([staging / name for name in chosen])
    here += files.size_of(part_of(staging, file) for file in chosen.values())
    free = shutil.disk_usage(folder.parent).free
    if total - here > free:
        raise UserError(
            f"{paths.relative(folder)}: {gigabytes(total - here)} are to be downloaded, {gigabytes(free)} of disk are "
            f"free: {gigabytes(total - here - free)} are missing; make room and run it again"
        )
    present = f", {gigabytes(here)} of it here already" if here else ""
    say(f"{paths.relative(folder)}: {len(chosen)} files, {gigabytes(total)}{present}")


def download_files(hub_id: str, commit: str, chosen: dict[str, "RepoSibling"], staging: Path) -> None:
    """Download all chosen files into `staging`; those that are there whole are not downloaded again.

    `snapshot_download` keeps a large file that is there with the right hash, and downloads it again otherwise.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if constants.HF_HUB_DISABLE_XET:
        disable_progress_bars("huggingface_hub.snapshot_download")  # the large files have their own, the rest is small
        for file in chosen.values():
            if file.lfs is not None:
                download_file(hub_id, commit, file, staging)
    snapshot_download(hub_id, revision=commit, local_dir=staging, allow_patterns=list(chosen))


def finish(
    staging: Path, folder: Path, entry: dict[str, Any], listing: Listing, chosen: dict[str, "RepoSibling"]
) -> None:
    """Check the downloaded files, record where they come from, and give the folder its name."""
    for name, file in chosen.items():
        if fault := fault_of(staging / name, file, remembered_sha256):
            (staging / name).unlink(missing_ok=True)
            raise UserError(f"{entry['hub_id']}: {name} {fault}; run it again, the rest is kept")
    files.remove_folder(staging / ".cache")
    changed = {"is_decoder": True} if model_files.set_decoder(staging) else {}
    base_models.local_folder(staging)
    files.write_json(staging / base_models.SOURCE_FILE, {
        "hub_id": entry["hub_id"],
        "revision": listing.commit,
        "requested": entry["revision"],
        "license": listing.license or entry["license"],
        "config_changed": changed,
        "files": model_files.hashes_of(staging, sorted(path for path in staging.iterdir() if path.is_file())),
        "sha256": base_models.identity_of(staging)["sha256"],
    })  # fmt: skip
    for path in staging.iterdir():
        files.sync(path)
    files.publish_folder(staging, folder)
    say(f"{paths.relative(folder)}: {entry['hub_id']} at {listing.commit[:12]}")


def remembered_sha256(path: Path) -> str:
    """A file's SHA-256, remembered so that the file is not read again for the model's identity."""
    return model_files.hashes_of(path.parent, [path])[path.name]
