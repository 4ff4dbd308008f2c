"""The file tree of a published dataset repository: its layout, the hub's limits, and how it is built.

    README.md  index.parquet
    data/dataset_info.json  data/<category>/<file>.json
    collections/<category>/<dataset>/<run folder>.archive, in parts of at most PART_BYTES; or, raw, the folder itself

index.parquet has the rows of saves/index.parquet for these collections. Its metadata records, under `paragen`, all
other files: for each collection its manifest's hash, its files and, where it was evaluated, the hash of
evaluation.json as `labels`; and the data files with their hashes.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from paragen.collection import evaluation, index, prompts, run_files
from paragen.common import cli, files, paths
from paragen.common.cli import UserError, say
from paragen.dataset import dataset_info
from paragen.publishing import licenses

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "1"
# The hub's limits: https://huggingface.co/docs/hub/repositories-recommendations
REPOSITORY_FILES = 100_000
FOLDER_ENTRIES = 10_000
FILE_BYTES = 20_000_000_000
PART_BYTES = 5_000_000_000  # the most bytes that an interrupted upload sends again
COLLECTIONS = "collections"
INFO = "data/dataset_info.json"
OTHER_FILES = (paths.MANIFEST, *run_files.BESIDE)
RECORD = ".cache/publish.json"  # what each archive was made from; not uploaded
SEVERAL = "publish several repositories: select with CATEGORY, DATASET, MODEL and RANK"


# ----------------------------------------------------------------------------------------------------- the hub's limits


def planned(table: "pa.Table", data_files: int, raw: bool) -> tuple[Counter, int]:
    """(the number of files in each folder of a tree before it is built, the largest file's bytes). Reads no file.

    Args:
        table: the index's rows of all collections to publish; the size of an archive counts as that of its checkpoints.
        data_files: how many files go below data/.
        raw: whether collections are published as folders.
    """
    per_folder, largest = Counter({"": 2, "data": data_files}), 0
    figures = [("bytes", "sum"), ("bytes", "count"), ("bytes", "max"), ("metric", "count")]
    sums = table.group_by("collection").aggregate(figures)
    for row in sums.to_pylist():
        folder = PurePosixPath(COLLECTIONS, row["collection"])
        if raw:
            evaluated = row["metric_count"] > 0
            per_folder[str(folder)] += row["bytes_count"] + len(OTHER_FILES) - (0 if evaluated else 1)
            largest = max(largest, row["bytes_max"])
        else:
            per_folder[str(folder.parent)] += -(-row["bytes_sum"] // PART_BYTES)
            largest = max(largest, min(row["bytes_sum"], PART_BYTES))
    return per_folder, largest


def check_limits(table: "pa.Table", data_files: int, raw: bool) -> None:
    """Raise UserError, with the way out, when the tree would exceed the hub's limits; arguments as for `planned`."""
    per_folder, largest = planned(table, data_files, raw)
    way_out = "omit RAW: an archive is one file per collection" if raw else SEVERAL
    total = sum(per_folder.values())
    if total > REPOSITORY_FILES:
        raise UserError(f"{total} files; the hub takes {REPOSITORY_FILES} in a repository; {way_out}")
    folders = {path for folder in per_folder for path in (PurePosixPath(folder), *PurePosixPath(folder).parents)}
    entries = per_folder + Counter(str(path.parent) for path in folders if path.name)
    folder, most = entries.most_common(1)[0]
    if most > FOLDER_ENTRIES:
        raise UserError(f"{folder}: {most} entries; the hub takes {FOLDER_ENTRIES} in a folder; {way_out}")
    if largest > FILE_BYTES:
        raise UserError(f"a file of {largest / 1e9:.0f} GB; the hub takes {FILE_BYTES / 1e9:.0f} GB; {way_out}")


# ------------------------------------------------------------------------------------------------------------- building


def data_plan(chosen: list[index.Chosen], data_dir: Path) -> dict[str, dict[str, Any]]:
    """The entries of dataset_info.json that the pairs of some collections need, with their test splits, by name.

    Raises UserError when a file is gone or its rows are not those that a collection was trained on.
    """
    entries: dict[str, dict[str, Any]] = {}
    for item in chosen:
        for data in item.manifest.data or ():
            prompts.trained(data, data_dir)
            entry = dataset_info.read_info(data_dir).get(data.name)
            if not isinstance(entry, dict) or entry.get("file_name") != data.file:
                entry = {"file_name": data.file, **data.entry}
            entries[data.name] = entry
            if paired := licenses.test_split(data, data_dir):
                dataset_info.data_file(paired[0], data_dir)
                entries[paired[0]] = paired[1]
    for name, entry in entries.items():
        if fault := dataset_info.place_fault(entry["file_name"]):
            raise UserError(f"{name}: {paths.relative(Path(data_dir) / entry['file_name'])}: {fault}")
    return dict(sorted(entries.items()))


def build(tree: Path, chosen: list[index.Chosen], table: "pa.Table", data_dir: Path, raw: bool) -> dict[str, Any]:
    """Build the tree without its README.md; archives made from the same collections stay.

    Args:
        tree: the tree's folder. Where an earlier call made it, files that are not of this tree are removed.
        chosen: the collections.
        table: their rows of the index.
        data_dir: data/.
        raw: whether collections are published as folders.

    Returns the marks in the metadata of index.parquet. Raises UserError for a folder that no earlier call made.
    """
    import pyarrow.compute as pc

    try:
        tree.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{paths.relative(tree)}: is there already, and no folder; move it away") from None
    record = read_record(tree)
    if record is None and any(path.name != ".cache" for path in tree.iterdir()):  # .cache alone: an earlier call began
        raise UserError(f"{paths.relative(tree)}: is there already, and no tree of ours; move it away")
    record = record or {}
    (tree / RECORD).parent.mkdir(exist_ok=True)
    files.remove_folder(tree / ".cache" / "staging")  # of a killed process
    files.write_json(tree / RECORD, record)
    entries = data_plan(chosen, data_dir)
    marks: dict[str, Any] = {"format": FORMAT, "layout": "raw" if raw else "archive", "collections": {}, "data": {}}
    for file in sorted({entry["file_name"] for entry in entries.values()}):
        place(Path(data_dir) / file, tree / "data" / file)
        marks["data"][file] = files.sha256_of(tree / "data" / file)
    write(tree / INFO, (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode())
    for item in chosen:
        scores = evaluation.scores_mark(item.folder)
        kept = raw_folder(tree, item) if raw else archived(tree, item, record)
        marks["collections"][item.name] = {"sha256": item.manifest.sha256, **scores, "files": kept}
        rows = table.filter(pc.field("collection") == item.name).combine_chunks()
        if evaluation.scores_mark(item.folder) != scores or index.rows_of(item.name, item.folder)[0] != rows:
            raise UserError(f"{paths.relative(item.folder)}: was evaluated while it was published; run it again")
    write(tree / paths.INDEX, index_of(table, marks))
    remove_foreign(tree, {paths.INDEX, INFO, "README.md", *files_in(marks)}, record)
    return marks


def files_in(marks: dict[str, Any]) -> list[str]:
    """The paths in the tree of all files that the marks of an index.parquet name."""
    return [
        *(f"data/{file}" for file in marks["data"]),
        *(f"{COLLECTIONS}/{file}" for mark in marks["collections"].values() for file in mark["files"]),
    ]


def raw_folder(tree: Path, item: index.Chosen) -> dict[str, int]:
    """Link or copy a collection's folder into the tree; returns the sizes of its files."""
    kept = {}
    names = [entry.file_name for entry in item.manifest.checkpoints]
    for name in [*names, *(name for name in OTHER_FILES if (item.folder / name).is_file())]:
        place(item.folder / name, tree / COLLECTIONS / item.name / name)
        kept[f"{item.name}/{name}"] = (item.folder / name).stat().st_size
    return kept


def archived(tree: Path, item: index.Chosen, record: dict[str, Any]) -> dict[str, int]:
    """Archive a collection into the tree, unless its archive is there with the recorded hashes.

    Returns the sizes of its parts.
    """
    from paragen.archives import archive

    if there := archive_in(tree, item, record):
        damaged = [
            file for file, sha256 in hashes_of(tree, there).items() if sha256 != record[item.name]["sha256"][file]
        ]
        if not damaged:
            return there
        say(f"{paths.relative(tree / COLLECTIONS / damaged[0])}: was damaged since it was made; it is made again")
    source = source_of(item)
    folder = (tree / COLLECTIONS / item.name).parent
    folder.mkdir(parents=True, exist_ok=True)
    staging = tree / ".cache" / "staging"
    files.remove_folder(staging)
    staging.mkdir()
    say(f"archiving {item.name}")
    with cli.writing_to(tree):
        parts = archive.write(item.folder, item.manifest, staging / f"{item.folder.name}.archive", PART_BYTES)
    for part in parts:
        os.replace(part, folder / part.name)
    files.sync_folder(folder)
    files.remove_folder(staging)
    kept = {f"{Path(item.name).parent}/{part.name}": (folder / part.name).stat().st_size for part in parts}
    hashes = hashes_of(tree, kept)
    record[item.name] = {"source": source, "files": kept, "written": written(tree, kept), "sha256": hashes}
    files.write_json(tree / RECORD, record)
    return kept


def archive_in(tree: Path, item: index.Chosen, record: dict[str, Any]) -> dict[str, int] | None:
    """The sizes of the parts of a collection's archive in the tree; None unless they were made from the present
    collection, and have the sizes and times of then. Their bytes are not read."""
    there = record.get(item.name)
    if there is None or there["source"] != source_of(item) or "sha256" not in there:
        return None
    whole = all(size_of(tree / COLLECTIONS / file) == size for file, size in there["files"].items())
    return there["files"] if whole and there.get("written") == written(tree, there["files"]) else None


def source_of(item: index.Chosen) -> dict[str, Any]:
    """What decides the content of a collection's archive."""
    return {"manifest": item.manifest.sha256, "part_bytes": PART_BYTES, **evaluation.scores_mark(item.folder)}


def written(tree: Path, kept: dict[str, int]) -> dict[str, int]:
    """The modification time of each part of an archive, nanoseconds."""
    return {file: (tree / COLLECTIONS / file).stat().st_mtime_ns for file in kept}


def hashes_of(tree: Path, kept: Iterable[str]) -> dict[str, str]:
    """The hash of each part of an archive, which is read."""
    return {file: files.sha256_of(tree / COLLECTIONS / file) for file in kept}


def recorded_hashes(tree: Path, chosen: list[index.Chosen], marks: dict[str, Any]) -> dict[str, str]:
    """The hashes that a built tree's data files, archives and checkpoints must have, by their paths in the tree."""
    recorded = {f"data/{file}": sha256 for file, sha256 in marks["data"].items()}
    if marks["layout"] == "archive":
        record = read_record(tree) or {}
        for item in chosen:
            recorded |= {f"{COLLECTIONS}/{file}": sha256 for file, sha256 in record[item.name]["sha256"].items()}
        return recorded
    for item in chosen:
        for entry in item.manifest.checkpoints:
            recorded[f"{COLLECTIONS}/{item.name}/{entry.file_name}"] = entry.sha256
    return recorded


def index_of(table: "pa.Table", marks: dict[str, Any]) -> bytes:
    """The bytes of index.parquet; equal rows and marks give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet

    sink = pa.BufferOutputStream()
    text = json.dumps(marks, ensure_ascii=False)
    pyarrow.parquet.write_table(table.combine_chunks().replace_schema_metadata({"paragen": text}), sink)
    return sink.getvalue().to_pybytes()


def place(source: Path, target: Path) -> None:
    """Hard-link `source` to `target`, or copy it where that is not possible."""
    if target.is_file() and (os.path.samefile(source, target) or same_content(source, target)):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = files.beside(target, "new")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, beside)
    os.replace(beside, target)


def same_content(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    return size_of(one) == size_of(other) and files.sha256_of(one) == files.sha256_of(other)


def size_of(path: Path) -> int | None:
    """The bytes of a file, None where there is none."""
    return path.stat().st_size if path.is_file() else None


def write(path: Path, data: bytes) -> None:
    """Write `data` to `path` unless the file holds it already."""
    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, data)


def files_of(tree: Path) -> list[str]:
    """The paths of all files of a tree to upload, sorted."""
    found = []
    for folder, subfolders, names in os.walk(tree):
        subfolders[:] = [name for name in subfolders if Path(folder, name) != tree / ".cache"]
        found += [Path(folder, name).relative_to(tree).as_posix() for name in names]
    return sorted(found)


def remove_foreign(tree: Path, expected: set[str], record: dict[str, Any]) -> None:
    """Remove files that an earlier call with another selection, or a killed one, left in the tree."""
    for name in set(files_of(tree)) - expected:
        (tree / name).unlink()
    for folder, _, _ in os.walk(tree, topdown=False):
        if Path(folder) != tree and not os.listdir(folder):
            os.rmdir(folder)
    kept = {name: part for name, part in record.items() if all(f"{COLLECTIONS}/{x}" in expected for x in part["files"])}
    files.write_json(tree / RECORD, kept)


def read_record(tree: Path) -> dict[str, Any] | None:
    """What each archive in a tree was made from; None for a folder that is no tree of ours."""
    try:
        record = json.loads((tree / RECORD).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{paths.relative(tree / RECORD)}: broken ({error}); remove {paths.relative(tree)}") from None
    return record
