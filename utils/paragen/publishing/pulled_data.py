"""The data of pulled collections: checked in the staging folder, then placed into data/ with their collection."""

import contextlib
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paragen.collection import prompts, run_identity
from paragen.collection.manifest import Manifest
from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.dataset import dataset_info, registration
from paragen.dataset.names import RULE, is_dataset_name, test_split_name
from paragen.publishing import published_tree
from paragen.publishing.repository import Source, fetch

if TYPE_CHECKING:
    import pyarrow as pa


def entries_of(source: Source, table: "pa.Table", marks: dict[str, Any]) -> dict[str, dict]:
    """The entries of the repository's dataset_info.json that the selected collections need, checked, by name."""
    if published_tree.INFO not in source.listed:
        raise UserError(f"{source.repository}: lacks {published_tree.INFO}")
    fetch(source, [published_tree.INFO])
    info = dataset_info.read_info(source.staging / "data")
    datasets = {part for name in table["dataset"].to_pylist() for part in (name or "").replace(",", " ").split()}
    files_used = set(table["prompts_file"].to_pylist())
    named = {name: entry.get("file_name") for name, entry in info.items() if isinstance(entry, dict)}
    names = {name for name, file in named.items() if isinstance(file, str) and file in files_used}
    names |= datasets & info.keys()
    names |= set(map(test_split_name, names)) & info.keys()
    for name in sorted(names):
        faults = [] if is_dataset_name(name) else [f"the name {RULE}"]
        faults += dataset_info.entry_faults(info[name])
        if not faults and info[name]["file_name"] not in marks["data"]:
            faults = [f"{info[name]['file_name']} is not among the files that {paths.INDEX} names"]
        if faults:
            raise UserError(f"{source.repository}: {published_tree.INFO}: {name!r}: {faults[0]}; nothing was written")
    return {name: info[name] for name in sorted(names)}


@cache
def _known_sha256(path: Path, stamp: tuple) -> str:
    """The hash of a file with this stamp, read once in this process: many collections share their data files."""
    return files.sha256_of(path)


def same_data(file: str, sha256: str) -> bool:
    """Whether data/`file` exists with this content. Raises UserError when it has another, unless FORCE=1."""
    path = paths.DATA / file
    if not path.exists():
        return False
    if _known_sha256(path, files.stamp_of(path.stat())) == sha256:
        return True
    if not run_identity.force_requested():
        raise UserError(f"{paths.relative(path)}: is there with other rows; move it away, or FORCE=1 replaces it")
    return False


def require_registrable(name: str, entry: dict[str, Any]) -> None:
    """Raise UserError when `name` is registered with another entry here, unless FORCE=1."""
    old = dataset_info.read_info(paths.DATA).get(name)
    if old is None or run_identity.force_requested() or same_entry(old, entry):
        return
    where = paths.relative(paths.DATA / "dataset_info.json")
    raise UserError(f"{where}: {name!r} is registered in another way; rename it there, or FORCE=1 replaces it")


def same_entry(one: Any, other: dict[str, Any]) -> bool:
    """Whether two entries read the same rows in the same way."""
    return isinstance(one, dict) and dataset_info.without_marks(one) == dataset_info.without_marks(other)


def fetch_data(source: Source, file: str, sha256: str) -> None:
    """Download one data file into the staging folder, and check it against the index."""
    name = f"data/{file}"
    fetch(source, [name])
    if files.sha256_of(source.staging / name) != sha256:
        raise UserError(f"{source.repository}: {name} is not the file that its {paths.INDEX} names")
    dataset_info.load_rows(source.staging / name)


def check_rows(manifest: Manifest, staged: Collection[str], data: Path) -> None:
    """Raise UserError unless the rows that a collection was trained on are those that its manifest records.

    Args:
        manifest: the collection's.
        staged: the data files below `data`; the others are in data/ already.
        data: the `data` folder of what was downloaded.
    """
    for part in manifest.data or ():
        prompts.trained(part, data if part.file in staged else paths.DATA)


@contextlib.contextmanager
def placed(staged: Collection[str], data: Path, entries: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Put data files and their entries in place for the body; where that fails, take back what was not there before.

    Args:
        staged: the files, relative to data/.
        data: the `data` folder of what was downloaded.
        entries: the entries of dataset_info.json, by name.
    """
    targets = {file: paths.DATA / file for file in staged}
    new = [target for target in targets.values() if not target.exists()]
    info = paths.DATA / "dataset_info.json"
    before = info.read_bytes() if info.exists() else None
    after = before
    try:
        for file, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(target, (data / file).read_bytes())
        for name, entry in entries.items():
            register(name, entry)
        after = info.read_bytes() if info.exists() else None
        yield
    except BaseException:
        for target in new:
            target.unlink(missing_ok=True)
        with registration.waiting_lock(files.beside(info, "lock")):
            if before is not None and after != before and info.read_bytes() == after:
                files.write_atomically(info, before)
            elif before is None:
                info.unlink(missing_ok=True)
        raise
    for target in targets.values():
        say(f"{paths.relative(target)}: downloaded")


def register(name: str, entry: dict[str, Any]) -> None:
    """Put an entry into dataset_info.json unless an equal one is there."""
    if not same_entry(dataset_info.read_info(paths.DATA).get(name), entry):
        say(f"{name}: {registration.store(name, entry, run_identity.force_requested(), paths.DATA)}")
