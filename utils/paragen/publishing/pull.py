"""Downloads published collections into saves/ and their prompts into data/, and verifies them.

Every file is checked against the hub's hash, the repository's index and the collection's manifest. A collection comes
with its data files, or not at all: all of it is checked in the staging folder before anything is placed. A collection
that exists here, at whatever place, stays, and gets the published scores unless that would lose some. Another
collection or data file of the same name is replaced only with FORCE=1. An interrupted download is resumed by the next
call.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paragen.collection import copies, evaluation, index, replacing, run_identity, selection, verification
from paragen.collection.manifest import read_manifest, require_manifest
from paragen.common import cli, files, locks, paths
from paragen.common.cli import UserError, say
from paragen.hub import transfer
from paragen.model import base_models
from paragen.publishing import published_tree, pulled_data
from paragen.publishing.repository import Source, fetch, read_index

if TYPE_CHECKING:
    import pyarrow as pa


class Pulled(NamedTuple):
    """What a pull downloaded.

    Attributes:
        table: the repository's index rows of the collections that are here now; `model` is this project's name for it.
        summary: which were downloaded and which were not; empty when all were.
    """

    table: "pa.Table"
    summary: str


class Unit(NamedTuple):
    """A collection of a repository with its data files, which are downloaded together or not at all.

    Attributes:
        name: its name in the repository's index.
        folder: its folder here.
        mark: what the index's marks say of it.
        is_here: whether it is here and whole already.
        data: the hashes of its data files that are not in data/ yet, by path.
        entries: the entries of dataset_info.json that its rows need, by name.
    """

    name: str
    folder: Path
    mark: dict[str, Any]
    is_here: bool
    data: dict[str, str]
    entries: dict[str, dict[str, Any]]


def pull(repository: str, revision: str | None, staging: Path) -> Pulled:
    """Download the selected collections of a repository (see selection.requested_filters).

    Args:
        repository: user/name.
        revision: a commit, branch or tag; None for the newest.
        staging: the folder to download into; after an interruption, the next call continues with it.

    A collection that is not what its index or its manifest says is named on stderr and not downloaded; the others are.
    Raises UserError, with nothing written, for all that FORCE=1 would overwrite.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    stated = transfer.look_up(repository, revision, "dataset")
    source = Source(repository, stated.commit, {file.rfilename: file for file in stated.files}, staging)
    table, marks = read_index(source)
    wanted = selection.requested_filters()
    table = index.selected(table, wanted)
    if not table.num_rows:
        raise selection.none_fits(repository, wanted)
    selection.require_each(selection.places_in(table).values(), wanted, repository)
    units = [unit_of(source, name, folder, table, marks) for name, folder in places_of(table, marks).items()]
    check_disk(source, {unit.name: unit.mark for unit in units if not unit.is_here}, table)
    downloaded: list[str] = []
    faults: dict[str, str] = {}
    try:
        for unit in units:
            try:
                bring(source, unit, marks["layout"], table)
                downloaded.append(unit.name)
            except UserError as error:
                cli.complain(str(error))
                faults[unit.name] = str(error)
    except BaseException:
        left = {unit.name: "not reached" for unit in units if unit.name not in downloaded}
        say(summary_of(repository, downloaded, left | faults))
        raise
    table = table.filter(pc.is_in(table["collection"], pa.array(downloaded, pa.string())))
    return Pulled(with_own_names(table), summary_of(repository, downloaded, faults) if faults else "")


def with_own_names(table: "pa.Table") -> "pa.Table":
    """Index rows of another project with the short names that this project's models/models.yaml gives their models."""
    import pyarrow as pa

    names = [name and base_models.short_name(Path(name)) for name in table["base_model"].to_pylist()]
    at = table.column_names.index("model")
    return table.set_column(at, table.schema.field(at), pa.array(names, pa.string()))


def summary_of(repository: str, downloaded: list[str], faults: dict[str, str]) -> str:
    """One line: which collections of a repository were downloaded, and which were not and why."""
    missed = "; ".join(f"{name} ({reason})" for name, reason in faults.items())
    return f"{repository}: downloaded: {', '.join(downloaded) or 'nothing'}; not downloaded: {missed or 'nothing'}"


def unit_of(source: Source, name: str, folder: Path, table: "pa.Table", marks: dict[str, Any]) -> Unit:
    """A collection with what is missing of its data here. Raises UserError for all that FORCE=1 would overwrite."""
    import pyarrow.compute as pc

    entries = pulled_data.entries_of(source, table.filter(pc.field("collection") == name), marks)
    hashes = {entry["file_name"]: marks["data"][entry["file_name"]] for entry in entries.values()}
    missing = {file: sha256 for file, sha256 in sorted(hashes.items()) if not pulled_data.same_data(file, sha256)}
    for dataset, entry in entries.items():
        pulled_data.require_registrable(dataset, entry)
    mark = marks["collections"][name]
    return Unit(name, folder, mark, is_here(folder, mark), missing, entries)


def bring(source: Source, unit: Unit, layout: str, table: "pa.Table") -> None:
    """Download and check all that is missing of a collection and its data, then place it.

    Raises UserError, with nothing placed, for anything that is not what the index and the manifest say.
    """
    data = source.staging / "data"
    wanted = {file: sha256 for file, sha256 in unit.data.items() if not pulled_data.same_data(file, sha256)}
    for file, sha256 in wanted.items():
        pulled_data.fetch_data(source, file, sha256)
    if unit.is_here:
        scores = None
        if lacks_scores(unit.folder, unit.mark):
            scores = fetch_scores(source, unit.name, unit.folder, unit.mark, layout)
        with locked(unit.folder):
            manifest = require_manifest(unit.folder)
            pulled_data.check_rows(manifest, wanted, data)
            with pulled_data.placed(wanted, data, unit.entries):
                if scores is not None:
                    evaluation.import_scores(unit.folder, manifest, scores)
        return
    say(f"fetching {unit.name}")
    fetch(source, [f"{published_tree.COLLECTIONS}/{file}" for file in unit.mark["files"]])
    folder = restored(source, unit, layout, table)
    pulled_data.check_rows(require_manifest(folder), wanted, data)
    unit.folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(unit.folder):
        files.recover_folder(unit.folder)
        with pulled_data.placed(wanted, data, unit.entries):
            replacing.publish(folder, unit.folder)
    for file in unit.mark["files"]:
        (source.staging / published_tree.COLLECTIONS / file).unlink(missing_ok=True)
    say(f"downloaded: {paths.relative(unit.folder)}")


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


def restored(source: Source, unit: Unit, layout: str, table: "pa.Table") -> Path:
    """A downloaded collection's folder in the staging folder, verified against the index and flushed to disk."""
    saves = source.staging / "restored"
    files.remove_folder(saves)
    fetched = [source.staging / published_tree.COLLECTIONS / file for file in unit.mark["files"]]
    for path, size in zip(fetched, unit.mark["files"].values(), strict=True):
        if path.stat().st_size != size:
            raise UserError(f"{source.repository}: {path.name} has {path.stat().st_size} bytes, its index says {size}")
    try:
        folder = unpacked(source, unit.name, layout, fetched, saves)
        if fault := fault_of(folder, unit.name, unit.mark, table):
            raise UserError(f"{unit.name} {fault}")
    except UserError as error:
        raise UserError(f"{source.repository}: {error}; it was not kept") from None
    for path in folder.iterdir():
        files.sync(path)
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a collection's folder. Raises UserError where another process does."""
    try:
        with locks.lock(files.beside(folder, "lock")):
            yield
    except locks.Busy:
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
    unknown = [column for column in index.LATER if listed[column].null_count == listed.num_rows]  # published without
    unknown.append("model")  # a short name by models/models.yaml, which differs between projects
    same = rows.drop_columns(unknown).equals(listed.drop_columns(unknown))
    return None if same else f"has other checkpoints than {paths.INDEX} lists"
