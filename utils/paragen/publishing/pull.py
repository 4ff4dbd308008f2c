"""Downloads published collections into saves/ and their prompts into data/, and verifies them.

Every file is checked against the hub's hash, the repository's index and the collection's manifest. A collection that
exists here, at whatever place, stays, and gets the published scores unless that would lose some. Another collection or
data file of the same name is replaced only with FORCE=1. An interrupted download is resumed by the next call.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paragen.collection import copies, evaluation, index, run_files, run_identity, selection, verification
from paragen.collection.manifest import read_manifest, require_manifest
from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.dataset import dataset_info, registration
from paragen.dataset.names import PATH_PART, RULE, is_dataset_name, test_split_name
from paragen.hub import transfer
from paragen.publishing import published_tree

if TYPE_CHECKING:
    import pyarrow as pa

THREADS = 8
PART = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.archive")


class Source(NamedTuple):
    """A repository at a commit."""

    repository: str
    commit: str
    listed: dict[str, Any]  # the hub's RepoSibling by path
    staging: Path  # the folder of downloaded files that are not in their final places yet


def pull(repository: str, revision: str | None, staging: Path) -> "pa.Table":
    """Download the selected collections of a repository (see selection.requested_filters).

    Args:
        repository: user/name.
        revision: a commit, branch or tag; None for the newest.
        staging: the folder to download into; after an interruption, the next call continues with it.

    Returns the repository's index rows of them. Raises UserError, with nothing written, for all that FORCE=1 would
    overwrite.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
    assert info.sha is not None  # the hub names the commit of every revision
    source = Source(repository, info.sha, {file.rfilename: file for file in info.siblings or []}, staging)
    table, marks = read_index(source)
    table = index.selected(table, selection.requested_filters())
    if not table.num_rows:
        raise UserError(f"{repository}: has no collection that fits the selection")
    folders = places_of(table, marks)
    table = table.filter(pc.is_in(table["collection"], pa.array(list(folders))))
    entries = data_entries(source, table, marks)
    used = sorted({entry["file_name"] for entry in entries.values()})
    new_data = {file: marks["data"][file] for file in used if not same_data(file, marks["data"][file])}
    for name, entry in entries.items():
        require_registrable(name, entry)
    found = {name: marks["collections"][name] for name in folders}
    wanted = {name: mark for name, mark in found.items() if not is_here(folders[name], mark)}
    check_disk(source, wanted, table)
    scores = {
        name: fetch_scores(source, name, folders[name], mark, marks["layout"])
        for name, mark in found.items()
        if name not in wanted and lacks_scores(folders[name], mark)
    }
    for file, sha256 in new_data.items():
        fetch_data(source, file, sha256)
    for name, entry in entries.items():
        register(name, entry)
    for name, data in scores.items():
        with locked(folders[name]):
            evaluation.import_scores(folders[name], require_manifest(folders[name]), data)
    for name, mark in wanted.items():
        say(f"fetching {name}")
        fetch(source, [f"{published_tree.COLLECTIONS}/{file}" for file in mark["files"]])
        restore(source, name, folders[name], mark, marks["layout"], table)
    return table


# --------------------------------------------------------------------------------------------- what the repository says


def read_index(source: Source) -> "tuple[pa.Table, dict[str, Any]]":
    """The repository's index and the marks in its metadata, whose paths are checked to stay below saves/ and data/."""
    import pyarrow as pa
    import pyarrow.parquet

    if paths.INDEX not in source.listed:
        raise UserError(f"{source.repository}: has no {paths.INDEX}, so `make publish` did not make it")
    fetch(source, [paths.INDEX])
    try:
        table = pyarrow.parquet.read_table(source.staging / paths.INDEX, memory_map=False)
        marks = json.loads(table.schema.metadata[b"paragen"])
        table = table.replace_schema_metadata(None)
        table = index.with_all_columns(table)
        if marks["format"] != published_tree.FORMAT or not table.schema.equals(index.schema()):
            raise ValueError(f"of another format than {published_tree.FORMAT}")
        faults = marks_faults(marks, set(table["collection"].to_pylist()))
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source.repository}: {paths.INDEX} is broken, or `make publish` did not make it: {error}"
        ) from None
    if faults:
        raise UserError(f"{source.repository}: {paths.INDEX}: {faults[0]}; nothing was written")
    return table, marks


def marks_faults(marks: dict[str, Any], names: set[str]) -> list[str]:
    """The faults of an index's marks and their paths. `names`: the collections in its rows."""
    faults = [] if names == marks["collections"].keys() else ["does not list the collections that it has rows of"]
    faults += [] if marks["layout"] in ("archive", "raw") else [f"layout {marks['layout']!r} is not known"]
    for name, mark in marks["collections"].items():
        parts = name.split("/")
        if len(parts) != 3 or parts[0] not in paths.CATEGORIES or not all(map(PATH_PART.fullmatch, parts)):
            faults.append(f"{name!r} is no <category>/<dataset>/<run folder>")
        for file in mark["files"]:
            folder, _, last = file.rpartition("/")
            if marks["layout"] == "raw":
                right = folder == name and (
                    last in published_tree.OTHER_FILES or run_files.CHECKPOINT_FILE.fullmatch(last)
                )
            else:
                part = PART.fullmatch(file)
                right = part is not None and part[1] == name
            if not right:
                faults.append(f"{file!r} is no file of {name}")
    for file in marks["data"]:
        if dataset_info.place_fault(file) or not all(map(PATH_PART.fullmatch, file.split("/"))):
            faults.append(f"{file!r} is no <category>/<file>.json")
    return faults


def fetch(source: Source, names: list[str]) -> None:
    """Download files of the repository into the staging folder, and check them against the hub's hashes."""
    missing = [name for name in names if name not in source.listed]
    if missing:
        raise UserError(f"{source.repository}: lacks {missing[0]}, which its {paths.INDEX} names")

    def download(name: str) -> str | None:
        file = source.listed[name]
        for _ in range(2):  # an earlier call may have left a broken file
            transfer.download_file(source.repository, source.commit, file, source.staging, "dataset")
            fault = transfer.fault_of(source.staging / name, file)
            if fault is None:
                return None
            (source.staging / name).unlink(missing_ok=True)
        return f"{name} {fault}"

    transfer.quiet()
    with transfer.stopping_at_once(), ThreadPoolExecutor(THREADS) as threads:
        faults = [fault for fault in threads.map(download, names) if fault]
    if faults:
        raise UserError(f"{source.repository}: {faults[0]}; run it again, the rest is kept")


def check_disk(source: Source, wanted: dict[str, dict], table: "pa.Table") -> None:
    """Raise UserError when the collections to download do not fit on the disk."""
    names = table["collection"].to_pylist()
    total = sum(size for name, size in zip(names, table["bytes"].to_pylist(), strict=True) if name in wanted)
    needed = [f"{published_tree.COLLECTIONS}/{file}" for mark in wanted.values() for file in mark["files"]]
    total += sum(source.listed[name].size for name in needed if name in source.listed and ".archive" in name)
    total -= files.size_of(source.staging.rglob("*"))
    free = shutil.disk_usage(source.staging).free
    if total > free:
        size, there = transfer.gigabytes(total), transfer.gigabytes(free)
        raise UserError(
            f"{paths.relative(paths.SAVES)}: {size} are needed, {there} of disk are free; make room, or select less"
        )


# ----------------------------------------------------------------------------------------------------------- into data/


def data_entries(source: Source, table: "pa.Table", marks: dict[str, Any]) -> dict[str, dict]:
    """The entries of the repository's dataset_info.json that the selected collections need, checked, by name."""
    if published_tree.INFO not in source.listed:
        raise UserError(f"{source.repository}: lacks {published_tree.INFO}")
    fetch(source, [published_tree.INFO])
    info = dataset_info.read_info(source.staging / "data")
    datasets = {part for name in table["dataset"].to_pylist() for part in (name or "").replace(",", " ").split()}
    files_used = set(table["prompts_file"].to_pylist())
    names = {name for name, entry in info.items() if isinstance(entry, dict) and entry.get("file_name") in files_used}
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


def same_data(file: str, sha256: str) -> bool:
    """Whether data/`file` exists with this content. Raises UserError when it has another, unless FORCE=1."""
    path = paths.DATA / file
    if not path.exists():
        return False
    if files.sha256_of(path) == sha256:
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
    """Download one data file to its place, checked against the index."""
    name = f"data/{file}"
    fetch(source, [name])
    if files.sha256_of(source.staging / name) != sha256:
        raise UserError(f"{source.repository}: {name} is not the file that its {paths.INDEX} names")
    dataset_info.load_rows(source.staging / name)
    target = paths.DATA / file
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(target, (source.staging / name).read_bytes())
    say(f"{paths.relative(target)}: downloaded")


def register(name: str, entry: dict[str, Any]) -> None:
    """Put an entry into dataset_info.json unless an equal one is there."""
    if not same_entry(dataset_info.read_info(paths.DATA).get(name), entry):
        say(f"{name}: {registration.store(name, entry, run_identity.force_requested(), paths.DATA)}")


# ---------------------------------------------------------------------------------------------------------- into saves/


def places_of(table: "pa.Table", marks: dict[str, Any]) -> dict[str, Path]:
    """The folder here of each selected collection, by its name: where it is already, else the place of that name.

    Of collections that a repository has several times, under different names, only the first is returned.
    """
    names = sorted(set(table["collection"].to_pylist()))
    by_sha256 = {marks["collections"][name]["sha256"]: name for name in reversed(names)}
    here = copies.find(paths.SAVES, by_sha256)
    return {by_sha256[sha256]: here.get(sha256, paths.SAVES / by_sha256[sha256]) for sha256 in reversed(by_sha256)}


def is_here(folder: Path, mark: dict[str, Any]) -> bool:
    """Whether a collection exists here and is whole. Raises UserError when another one does, unless FORCE=1."""
    if not folder.exists():
        return False
    try:
        manifest = read_manifest(folder)
        if manifest is None or manifest.sha256 != mark["sha256"]:
            fault: str | None = "is another collection"
        else:
            fault = next(iter(verification.faults_of(folder, manifest)), None)
    except UserError as error:
        fault = str(error)
    if fault is None:
        say(f"there already: {paths.relative(folder)}")
        return True
    if not run_identity.force_requested():
        raise UserError(f"{paths.relative(folder)}: is there, but {fault}; move it away, or FORCE=1 replaces it")
    return False


def restore(source: Source, name: str, target: Path, mark: dict[str, Any], layout: str, table: "pa.Table") -> None:
    """Move a downloaded collection to its folder `target` once it is verified against the index."""
    saves = source.staging / "restored"
    files.remove_folder(saves)
    fetched = [source.staging / published_tree.COLLECTIONS / file for file in mark["files"]]
    for path, size in zip(fetched, mark["files"].values(), strict=True):
        if path.stat().st_size != size:
            raise UserError(f"{source.repository}: {path.name} has {path.stat().st_size} bytes, its index says {size}")
    try:
        folder = unpacked(source, name, layout, fetched, saves)
        if fault := fault_of(folder, name, mark, table):
            raise UserError(f"{name} {fault}")
    except UserError as error:
        raise UserError(f"{source.repository}: {error}; it was not kept") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    with locked(target):
        files.recover_folder(target)
        files.publish_folder(folder, target)
    for path in fetched:
        path.unlink(missing_ok=True)
    say(f"downloaded: {paths.relative(target)}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a collection's folder. Raises UserError where another process does."""
    try:
        with files.lock(files.beside(folder, "lock")):
            yield
    except files.Busy:
        raise UserError(f"{paths.relative(folder)}: is being trained right now; run it again later") from None


def lacks_scores(folder: Path, mark: dict[str, Any]) -> bool:
    """Whether a collection that exists here was published with other scores than it has."""
    return "labels" in mark and evaluation.sha256_in(folder) != mark["labels"]


def fetch_scores(source: Source, name: str, folder: Path, mark: dict[str, Any], layout: str) -> bytes:
    """Download the evaluation.json of a collection that exists in `folder`; of an archive, one part is downloaded.

    Raises UserError where it is not the one that the index names, or would replace scores that were measured here.
    """
    file = f"{name}/{evaluation.FILE}" if layout == "raw" else next(iter(mark["files"]), "")
    say(f"fetching the scores of {name}")
    fetch(source, [f"{published_tree.COLLECTIONS}/{file}"])
    path = source.staging / published_tree.COLLECTIONS / file
    if layout == "raw":
        data = path.read_bytes()
    else:
        from paragen.archives import archive

        data = archive.read_files(path).get(evaluation.FILE, b"")
    if hashlib.sha256(data).hexdigest() != mark["labels"]:
        raise UserError(
            f"{source.repository}: {name} has other scores than its {paths.INDEX} names; nothing was written"
        )
    label, force = paths.relative(folder / evaluation.FILE), run_identity.force_requested()
    evaluation.adds_scores(data, evaluation.bytes_in(folder), require_manifest(folder), label, force)
    return data


def unpacked(source: Source, name: str, layout: str, fetched: list[Path], saves: Path) -> Path:
    """Restore a downloaded collection below the folder `saves`; returns its folder."""
    if layout == "raw":
        folder = saves / name
        folder.mkdir(parents=True)
        for path in fetched:
            os.link(path, folder / path.name)
        return folder
    from paragen.archives import archive

    return archive.restore(fetched, saves)  # `fault_of` compares its hash; the folder may have been renamed


def fault_of(folder: Path, name: str, mark: dict[str, Any], table: "pa.Table") -> str | None:
    """The fault of a restored collection, by its manifest or compared with the index; None for none."""
    import pyarrow.compute as pc

    manifest = read_manifest(folder)
    if manifest is None:
        return "has no manifest.json"
    if manifest.sha256 != mark["sha256"]:
        return f"has another manifest than {paths.INDEX} names"
    if evaluation.sha256_in(folder) != mark.get("labels"):
        return f"has other scores than {paths.INDEX} names"
    faults = verification.faults_of(folder, manifest)
    rows, _ = index.rows_of(name, folder)
    if faults:
        return f"is not whole: {faults[0]}"
    listed = table.filter(pc.field("collection") == name).combine_chunks()
    unknown = [column for column in index.MARKS if listed[column].null_count == listed.num_rows]  # published without
    same = rows.drop_columns(unknown).equals(listed.drop_columns(unknown))
    return None if same else f"has other checkpoints than {paths.INDEX} lists"
