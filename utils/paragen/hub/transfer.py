"""What downloads from the Hugging Face hub and uploads to it share. Import huggingface_hub after `allow_hub`."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from paragen.common import files
from paragen.common.cli import UserError
from paragen.hub import errors

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoSibling


def allow_hub() -> None:
    """Let huggingface_hub, which is imported after this, reach the hub."""
    os.environ["HF_HUB_OFFLINE"] = "0"


def quiet() -> None:
    """Show only errors of huggingface_hub, and progress bars only where stderr is a terminal."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not os.isatty(2):
        disable_progress_bars()


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """While several threads upload or download files, let a signal end the process at once.

    Otherwise the threads would finish all remaining files first. Nothing is lost: what has arrived is at the hub, or in
    a part file that the next call resumes.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        os.write(2, b"stopped; run it again to go on\n")
        os._exit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Stated(NamedTuple):
    """What the hub states of a repository at a revision."""

    info: "ModelInfo | DatasetInfo"
    commit: str
    files: list["RepoSibling"]  # with sizes and hashes


def look_up(hub_id: str, revision: str | None, repo_type: str | None = None) -> Stated:
    """Ask the hub for a repository. Raises UserError for an answer that is no hub's, besides errors of the hub.

    Args:
        hub_id: user/name.
        revision: a commit, branch or tag; None for the newest.
        repo_type: `dataset`, or None for a model.
    """
    from huggingface_hub import HfApi

    ask = HfApi().dataset_info if repo_type == "dataset" else HfApi().model_info
    with errors.read_as_of_a_hub():
        info = ask(hub_id, revision=revision, files_metadata=True)
    if not info.sha or info.siblings is None:
        raise UserError(errors.no_hub())
    return Stated(info, info.sha, info.siblings)


def download_file(hub_id: str, commit: str, file: "RepoSibling", staging: Path, repo_type: str | None = None) -> None:
    """Download one file of a repository to its path in `staging`, resuming what a killed process left of it.

    huggingface_hub would start such a file again: it resumes a dropped connection only within one process.

    Args:
        hub_id: user/name.
        commit: the revision's commit.
        file: what the hub states of the file. A file of its size that is there already stays as it is, so check it with
            `fault_of`.
        staging: the folder below which the file's path in the repository is kept.
        repo_type: `dataset`, or None for a model.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    name, size = file.rfilename, file.size
    if size is None:
        raise UserError(f"{hub_id}: the hub does not state the size of {name}, so it cannot be downloaded")
    final, part = staging / name, part_of(staging, file)
    if final.is_file() and final.stat().st_size == size:
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    if part.is_file() and part.stat().st_size > size:
        part.unlink()
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    with open(part, "ab") as data:
        url = hf_hub_url(hub_id, name, revision=commit, repo_type=repo_type)
        if data.tell() < size:
            http_get(url, data, resume_size=data.tell(), headers=headers, expected_size=size, displayed_filename=name)
        data.flush()
        os.fsync(data.fileno())
    part.rename(final)


def part_of(staging: Path, file: "RepoSibling") -> Path:
    """Where a file is while it arrives. The name holds its hash, so that another file never continues it."""
    content = (file.lfs.sha256 if file.lfs else file.blob_id or "whole")[:16]
    path = staging / file.rfilename
    return path.with_name(f".{path.name}.{content}.part")


def fault_of(path: Path, file: "RepoSibling", sha256_of: Callable[[Path], str] = files.sha256_of) -> str | None:
    """What is wrong with a downloaded file, or None.

    Args:
        path: the downloaded file.
        file: the size and hash that the hub states.
        sha256_of: computes or remembers a file's SHA-256.
    """
    if not path.is_file():
        return "did not arrive"
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"has {size} of {file.size} bytes"
    if file.lfs is not None:
        right = sha256_of(path) == file.lfs.sha256
    elif file.blob_id:
        right = files.git_blob_id(path) == file.blob_id
    else:
        right = True
    return None if right else "does not have the hash that the hub states"


def gigabytes(size: int) -> str:
    """Bytes as people read them: `0.98 GB`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
