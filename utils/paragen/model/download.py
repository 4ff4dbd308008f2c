"""Bring a base model into models/, or check one that is there.

    python utils/fetch_model.py MODEL                 make model MODEL=...

MODEL is a short name of models/models.yaml (qwen2.5-0.5b), any repository of the Hugging Face hub (org/name; a commit,
tag or branch of it as org/name@revision), or a folder put under models/ by hand. HF_ENDPOINT names a mirror, HF_TOKEN
or `hf auth login` the account. An interrupted download goes on where it was. A second call only checks what is there.
"""

import json
import os
import re
import shutil
from pathlib import Path

from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.hub import errors
from paragen.hub.transfer import allow_hub, bring_file, fault_of, gigabytes, part_of
from paragen.model import base_models

SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# What is downloaded beside weights and tokenizer: never code, never weights in formats that can run code.
SMALL_FILES = re.compile(r"(config|generation_config)\.json|(LICENSE|LICENCE|NOTICE)(\.\w+)?")


def asked_for(text: str) -> dict:
    """What is to be brought: the table's mapping, or one for another model (hub_id, revision, folder, license)."""
    name, _, revision = text.strip().partition("@")
    if not name:
        raise UserError(
            f"say which model: make model MODEL=...; known: {', '.join(base_models.table())}; any other: org/name"
        )
    if "/" in name:
        if not errors.REPOSITORY.fullmatch(name) or ".." in name:
            raise UserError(f"model {name!r} is not a hub repository's name; it looks like org/name")
        entry = entry_of_repository(name)
    else:
        try:
            _, entry = base_models.entry(name)
        except UserError as error:
            raise UserError(f"{error}; any model of the hub: MODEL=org/name") from None
    if revision and not entry["hub_id"]:
        raise UserError(f"model {text!r}: {name} is not from the hub, so it has no revision; leave @{revision} away")
    return {**entry, "revision": revision or entry["revision"]}


def entry_of_repository(hub_id: str) -> dict:
    """The table's mapping of a hub repository, or a new one that is filed under the repository's name."""
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


def check(folder: Path, entry: dict) -> None:
    """Raise unless the folder holds the whole model that was asked for, unchanged since `make model` brought it."""
    name = paths.relative(folder)
    if base_models.set_decoder(folder):
        say(f"{name}/config.json: is_decoder is true now")
    base_models.local_folder(folder)
    told = base_models.source_of(folder)
    if not told:
        say(f"{name} is there and whole (put there by hand)")
        return
    if not {"hub_id", "revision", "sha256"} <= set(told):
        raise UserError(f"{name}/{base_models.SOURCE_FILE}: make model did not write this; remove it and run it again")
    if entry["hub_id"] and (told["hub_id"] or "").lower() != entry["hub_id"].lower():
        raise UserError(f"{name}: holds {told['hub_id']}, not {entry['hub_id']}; move it away and run it again")
    wanted = entry["revision"]
    if base_models.is_commit(wanted) and not (told["revision"] or "").startswith(wanted):
        raise UserError(f"{name}: is at revision {told['revision']}, not {wanted}; move it away and run it again")
    changed = base_models.changed_files(folder)
    if changed or base_models.identity_of(folder)["sha256"] != told["sha256"]:
        raise UserError(
            f"{name}: {', '.join(changed) or 'its files'} changed since it was made; remove the folder and run it again"
        )
    say(f"{name} is there and whole")


# ------------------------------------------------------------------------------------------------------- from the hub


def bring_from_hub(folder: Path, entry: dict) -> None:
    """Download a model of the hub into a staging folder, which outlives an interruption, then give that its name."""
    set_hub_environment()
    staging = files.beside(folder, "download")

    def bring() -> tuple:
        info = look_up(entry)
        chosen = choose_files(entry["hub_id"], info)
        tidy(staging, chosen)
        check_disk(folder, staging, chosen)
        staging.mkdir(exist_ok=True)
        download(entry["hub_id"], info.sha, chosen, staging)
        return info, chosen

    finish(staging, folder, entry, *errors.translated(entry["hub_id"], entry["revision"], bring))


def set_hub_environment() -> None:
    """Let huggingface_hub, which is imported after this, reach the hub.

    Files come over plain HTTP, which goes on in the middle of a file and through every mirror. HF_HUB_DISABLE_XET=0
    asks for the hub's Xet storage, which is faster on a fast line and starts an interrupted file again.
    """
    allow_hub()
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")


def look_up(entry: dict):
    """The hub's ModelInfo of a repository: its commit, and the names, sizes and hashes of its files."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(entry["hub_id"], revision=entry["revision"], files_metadata=True)
    if not info.sha or info.siblings is None:
        raise json.JSONDecodeError("no commit or no files in the answer", "", 0)
    return info


def choose_files(hub_id: str, info) -> dict:
    """The files of a repository that are needed, as the hub's RepoSibling by name; its weights once, as safetensors."""
    there = {file.rfilename: file for file in info.siblings if "/" not in file.rfilename}
    if base_models.WEIGHTS in there:
        weights = {base_models.WEIGHTS}
    elif base_models.WEIGHTS_INDEX in there:
        weights = {base_models.WEIGHTS_INDEX, *filter(SHARD.fullmatch, there)}
    else:
        others = sorted(name for name in there if re.search(r"\.(bin|pt|pth|gguf|onnx|msgpack|h5|safetensors)$", name))
        raise UserError(
            f"{hub_id}: has no {base_models.WEIGHTS} nor {base_models.WEIGHTS_INDEX}, "
            f"only {', '.join(others) or 'no weights'}; "
            "other formats can run code when read: take a repository with safetensors weights"
        )
    chosen = {
        name: file
        for name, file in there.items()
        if name in weights or base_models.TOKENIZER_FILES.fullmatch(name) or SMALL_FILES.fullmatch(name)
    }
    if "config.json" not in chosen:
        raise UserError(f"{hub_id}: has no config.json, so it is no model for transformers; take another repository")
    return chosen


def tidy(staging: Path, chosen: dict) -> None:
    """Remove what a killed download left behind that cannot be used any more."""
    for path in (staging / ".cache").rglob("*.incomplete"):
        path.unlink()
    parts = {part_of(staging, file).name for file in chosen.values()}
    for path in staging.glob("*"):
        if path.is_file() and path.name not in chosen and path.name not in parts:
            path.unlink()


def check_disk(folder: Path, staging: Path, chosen: dict) -> None:
    """Raise when what is still to come does not fit on the disk, saying how much is missing."""
    total = sum(file.size or 0 for file in chosen.values())
    here = files.size_of([staging / name for name in chosen])
    here += files.size_of(part_of(staging, file) for file in chosen.values())
    free = shutil.disk_usage(folder.parent).free
    if total - here > free:
        raise UserError(
            f"{paths.relative(folder)}: {gigabytes(total - here)} are to be downloaded, {gigabytes(free)} of disk are "
            f"free: {gigabytes(total - here - free)} are missing; make room and run it again"
        )
    came = f", {gigabytes(here)} of it here already" if here else ""
    say(f"{paths.relative(folder)}: {len(chosen)} files, {gigabytes(total)}{came}")


def download(hub_id: str, commit: str, chosen: dict, staging: Path) -> None:
    """Bring all chosen files into `staging`; what is there whole is not fetched again.

    `snapshot_download` takes a large file that lies here when its hash is right, and fetches it again when not.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if constants.HF_HUB_DISABLE_XET:
        disable_progress_bars("huggingface_hub.snapshot_download")  # the large files have their own, the rest is small
        for file in chosen.values():
            if file.lfs is not None:
                bring_file(hub_id, commit, file, staging)
    snapshot_download(hub_id, revision=commit, local_dir=staging, allow_patterns=list(chosen))


def finish(staging: Path, folder: Path, entry: dict, info, chosen: dict) -> None:
    """Check what was downloaded, note where it came from, and give the folder its name."""
    for name, file in chosen.items():
        if fault := fault_of(staging / name, file, remembered_sha256):
            (staging / name).unlink(missing_ok=True)
            raise UserError(f"{entry['hub_id']}: {name} {fault}; run it again, the rest is kept")
    files.remove_folder(staging / ".cache")
    changed = {"is_decoder": True} if base_models.set_decoder(staging) else {}
    base_models.local_folder(staging)
    files.write_json(staging / base_models.SOURCE_FILE, {
        "hub_id": entry["hub_id"],
        "revision": info.sha,
        "license": getattr(info.card_data, "license", None) or entry["license"],
        "config_changed": changed,
        "files": base_models.hashes_of(staging, sorted(path for path in staging.iterdir() if path.is_file())),
        "sha256": base_models.identity_of(staging)["sha256"],
    })  # fmt: skip
    for path in staging.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    files.publish_folder(staging, folder)
    say(f"{paths.relative(folder)}: {entry['hub_id']} at {info.sha[:12]}")


def remembered_sha256(path: Path) -> str:
    """A file's SHA-256, noted so that it is not read again for the model's identity."""
    return base_models.hashes_of(path.parent, [path])[path.name]
