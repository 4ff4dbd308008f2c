"""The index of all collections: saves/index.parquet, a row per checkpoint; and the selection of collections by it.

A collection that did not change since the last index is not read again. Checkpoints that changed after their manifest
was written, or since the last index, are hashed. Of several copies of one collection (copies.py), the index has one.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paragen.collection import checkpoints, copies, discovery, evaluation, selection
from paragen.collection.manifest import Manifest, read_manifest, require_manifest
from paragen.common import cli, files, parquet_files, paths, settings
from paragen.common.cli import UserError
from paragen.dataset import descriptions
from paragen.model import base_models

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, BEFORE = "5", ("3", "4")  # an index of a format before, which lacks some of LATER, can be read
# What an evaluation scored: whether its rows are the held-out ones of the collection's own dataset, how many of the
# split's first rows LIMIT took (null: all), and how many rows that were.
MARKS = {"paired": "bool_", "limit": "int64", "scored_rows": "int64"}
# Columns from evaluation.json, null where a checkpoint was not evaluated: the metric, the split and its marks, the
# score with its confidence interval, the mean loss per token of the responses, and the base model's figures.
SCORES = {
    "metric": "string", "split": "string", **MARKS, "score": "float64", "score_low": "float64", "score_high": "float64",
    "test_loss": "float64", "base_score": "float64", "base_loss": "float64",
}  # fmt: skip
COLUMNS = {
    "category": "string", "dataset": "string", "model": "string", "base_model": "string", "rank": "int32",
    "seed": "int64", "step": "int64", "loss": "float64", "learning_rate": "float64", **SCORES,
    "file": "string", "bytes": "int64", "sha256": "string", "prompts_file": "string", "prompts_sha256": "string",
    "rows": "int64", "description": "string", "collection": "string",
}  # fmt: skip
LATER = (*MARKS, "description")  # columns that indexes and published trees of earlier versions may lack
DESCRIPTION = 240  # the most characters of a description in a row


class Chosen(NamedTuple):
    """A collection on disk."""

    name: str  # <category>/<dataset>/<run folder>, as in the index
    folder: Path
    manifest: Manifest


def update(saves: Path | None = None) -> "tuple[pa.Table, dict[str, str]]":
    """Update the index from the collections below `saves`, and write it if it changed.

    A second copy of a collection is named on stderr. Returns (the table, by name the fault of each collection that is
    broken, a line).
    """
    import pyarrow as pa

    saves = saves or paths.SAVES
    old, known = read(saves)
    places = places_of(old)
    parts, seen, faults = {}, {}, {}
    for folder in discovery.find_collections([saves]) if saves.is_dir() else []:
        name = folder.relative_to(saves.absolute()).as_posix()
        try:
            stamp, scores, mark = stamp_of(folder), scores_stamp_of(folder), known.get(name)
            if mark and mark["stamp"] == stamp and mark["scores"]["stamp"] == scores and name in places:
                part, seal, scores_sha256 = old.slice(*places[name]), mark["sha256"], mark["scores"]["sha256"]
            else:
                scores_sha256 = evaluation.sha256_in(folder)
                part, seal = rows_of(name, folder)
            before = mark["files"] if mark and mark["sha256"] == seal else None
            found = check_files(saves, part, stamp, before)
        except UserError as error:
            faults[name] = str(error)
            continue
        parts[name] = part
        seen[name] = {
            "stamp": stamp, "sha256": seal, "files": found, "scores": {"stamp": scores, "sha256": scores_sha256},
        }  # fmt: skip
    copies.mark(saves, seen)
    tables = [part for name, part in parts.items() if copies.COPY_OF not in seen[name]]
    table = pa.concat_tables(tables).combine_chunks() if tables else schema().empty_table()
    if seen != known or (not seen and saves.is_dir()):
        write(saves, table, seen)
    return table, faults


def copies_in(saves: Path | None = None) -> dict[str, str]:
    """The second copies that the index on disk leaves out: by name, the name of the collection that it has."""
    _, known = read(saves or paths.SAVES)
    return {name: mark[copies.COPY_OF] for name, mark in known.items() if copies.COPY_OF in mark}


def places_of(table: "pa.Table") -> dict[str, tuple[int, int]]:
    """By collection, (first row, number of rows) in an index, whose rows are grouped by collection."""
    places: dict[str, tuple[int, int]] = {}
    for row, name in enumerate(table["collection"].to_pylist()):
        first, _ = places.get(name, (row, 0))
        places[name] = first, row - first + 1
    return places


def schema() -> "pa.Schema":
    """The index's columns and their types."""
    import pyarrow as pa

    return pa.schema([(name, getattr(pa, kind)()) for name, kind in COLUMNS.items()])


def read(saves: Path) -> "tuple[pa.Table, dict[str, dict]]":
    """The index on disk, and by collection what its rows were read from: the manifest's `stamp` and `sha256`, and those
    of its `scores`; for a second copy, which has no rows, also copies.COPY_OF.

    Both are empty where there is no index, or one of another format, damaged or edited: it can be made again. The
    file's hash is checked before it is parsed. In one of a format before, those of LATER that it lacks are null.
    """
    import pyarrow as pa

    try:
        table = parquet_files.read_own(saves / paths.INDEX)
        marks = json.loads(table.schema.metadata[b"paragen"])
        table = table.replace_schema_metadata(None)
        if marks["format"] in (FORMAT, *BEFORE) and marks["sha256"] == content_sha256(table, marks["collections"]):
            if marks["format"] in BEFORE:
                for mark in marks["collections"].values():
                    mark["scores"]["stamp"] = marks["format"]  # so that `update` makes the rows again
            table = with_all_columns(table)
            if table.schema.equals(schema()):
                return table, marks["collections"]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        pass
    return schema().empty_table(), {}


def with_all_columns(table: "pa.Table") -> "pa.Table":
    """A table of an earlier version with null for the columns of SCORES and LATER that it lacks; others as they are."""
    import pyarrow as pa

    lacking = [name for name in COLUMNS if name not in table.column_names]
    if not set(lacking) <= {*SCORES, *LATER} or table.column_names != [name for name in COLUMNS if name not in lacking]:
        return table
    for name in lacking:
        table = table.append_column(name, pa.nulls(table.num_rows, schema().field(name).type))
    return table.select(list(COLUMNS))


def write(saves: Path, table: "pa.Table", known: dict[str, dict]) -> None:
    """Write the index atomically."""
    import pyarrow as pa
    import pyarrow.parquet

    marks = json.dumps({"format": FORMAT, "collections": known, "sha256": content_sha256(table, known)})
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table.replace_schema_metadata({"paragen": marks}), sink)
    files.write_atomically(saves / paths.INDEX, parquet_files.sealed(sink.getvalue().to_pybytes()))


def content_sha256(table: "pa.Table", known: dict[str, dict]) -> str:
    """The hash of an index's rows and of what they were read from."""
    import pyarrow as pa
    import pyarrow.csv

    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(table, sink)
    sha256 = hashlib.sha256(sink.getvalue())
    sha256.update(json.dumps(known, sort_keys=True).encode())
    return sha256.hexdigest()


def stamp_of(folder: Path) -> list[int]:
    """A manifest's size and times, which differ once it was changed. Raises UserError without a manifest."""
    try:
        stat = os.stat(folder / paths.MANIFEST)
    except FileNotFoundError:
        raise UserError(f"{paths.relative(folder)}: has no {paths.MANIFEST}, so it is no finished collection") from None
    except OSError as error:
        raise UserError(f"{paths.relative(folder / paths.MANIFEST)}: cannot be read: {error.strerror}") from None
    return list(files.stamp_of(stat))


def scores_stamp_of(folder: Path) -> list[int] | None:
    """The same of evaluation.json, None where there is none. Raises UserError where that cannot be known."""
    try:
        return list(files.stamp_of(os.stat(folder / evaluation.FILE)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{paths.relative(folder / evaluation.FILE)}: cannot be read: {error.strerror}") from None


def rows_of(name: str, folder: Path) -> "tuple[pa.Table, str]":
    """(The rows of one collection, its manifest's hash). Raises UserError when its manifest, its evaluation.json or its
    folder's name is not sound."""
    import pyarrow as pa

    if name.encode(errors="replace").decode() != name:
        raise UserError(f"{paths.relative(folder)}: the name is not UTF-8, which no index can hold; rename the folder")
    manifest = require_manifest(folder)
    scores = scores_by_step(evaluation.shown(evaluation.read(folder, manifest)))
    data = manifest.data[0] if manifest.data else None
    texts = descriptions.descriptions_of(data.entry) if data else []
    shared = {
        "category": manifest.category,
        "dataset": manifest.dataset,
        "model": base_models.short_name(Path(manifest.base_name)) if manifest.base_name else None,
        "base_model": manifest.base_name,
        "rank": manifest.rank,
        "seed": manifest.seed,
        "prompts_file": data.file if data else None,
        "prompts_sha256": data.rows_sha256 if data else None,
        "rows": data.rows if data else None,
        "description": descriptions.shortened(texts[0], DESCRIPTION) if texts else None,
        "collection": name,
    }
    rows = [
        {**shared, **asdict(entry), **scores.get(entry.step, {}), "file": f"{name}/{entry.file_name}"}
        for entry in manifest.checkpoints
    ]
    return pa.Table.from_pylist(rows, schema=schema()), manifest.sha256


def scores_by_step(shown: dict[str, Any] | None) -> dict[int, dict[str, Any]]:
    """The SCORES columns by step, from the evaluation that tables show; a number that is not finite is None."""
    if shown is None:
        return {}
    base = shown["base"] or {}
    shared = {"metric": shown["metric"], "split": shown["split"]}
    shared |= {"paired": shown["paired"], "limit": shown["limit"], "scored_rows": shown["rows"]}
    shared |= {"base_score": base.get("score"), "base_loss": base.get("loss")}
    found = {}
    for score in shown["checkpoints"]:
        low, high = score["interval"] or (None, None)
        own = {"score": score["score"], "score_low": low, "score_high": high, "test_loss": score["loss"]}
        found[score["step"]] = {key: value if is_known(value) else None for key, value in {**shared, **own}.items()}
    return found


def is_known(value: Any) -> bool:
    """Whether a value is neither None nor a number that is not finite."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def check_files(saves: Path, rows: "pa.Table", manifest: list[int], before: str | None) -> str:
    """Check that a collection's files are those of its manifest; they are hashed only if they changed after it.

    Args:
        saves: the folder that the rows' files are relative to.
        rows: the collection's part of the index.
        manifest: the manifest's stamp; it is written after the checkpoints.
        before: what this function returned when the collection was last indexed with the same manifest, else None.

    Returns a hash of the files' stamps. Raises UserError naming a file that is missing or differs.
    """
    stamps = []
    for name, size in zip(rows["file"].to_pylist(), rows["bytes"].to_pylist(), strict=True):
        try:
            stamps.append(checkpoints.stamp_of(saves / name))
        except OSError:
            raise UserError(f"{paths.relative(saves / name)}: is missing; collect it again with FORCE=1") from None
        if stamps[-1][0] != size:
            raise UserError(
                f"{paths.relative(saves / name)}: has {stamps[-1][0]} bytes, its manifest says {size}; "
                "put the file back or collect again with FORCE=1"
            )
    # Without the inode's change time, which a new hard link changes as well.
    found = hashlib.sha256(repr([(size, written, number) for size, written, _, number in stamps]).encode()).hexdigest()
    late = any(changed > manifest[2] for _, _, changed, _ in stamps)
    if found != before and (late or before is not None):
        print(f"hashing {rows['collection'][0]}: changed after its manifest was written", file=sys.stderr, flush=True)
        for row in rows.select(["file", "bytes", "sha256"]).to_pylist():
            checkpoints.verified(saves / row["file"], row["bytes"], row["sha256"])
    return found


def load(saves: Path | None = None) -> "pa.Table":
    """The index on disk, checked to be as new as the manifests and scores that it was made from.

    Raises UserError naming the collections that changed or are gone since, or when there is no index. A collection that
    is not in the index yet is named on stderr.
    """
    return load_sealed(saves)[0]


def load_sealed(saves: Path | None = None) -> "tuple[pa.Table, dict[str, str]]":
    """The index as `load` returns it, and by collection the `sha256` of the manifest that its rows were read from."""
    saves = saves or paths.SAVES
    label = paths.relative(saves / paths.INDEX)
    table, known = read(saves)
    if not known:
        why = "there are no collections in it" if (saves / paths.INDEX).exists() else "there is no index yet"
        raise UserError(f"{label}: {why}, or it is broken; run: make index")
    copied = {name for name, mark in known.items() if copies.COPY_OF in mark}
    if stale := sorted(name for name in known.keys() - copied if is_stale(saves / name, known[name])):
        raise UserError(f"{label}: older than {listed(stale)}; run: make index")
    if twice := copies.alike({name: known[name] for name in known.keys() - copied}):
        raise UserError(f"{label}: has {' and '.join(twice[0][:2])}, copies of one collection; run: make index")
    there = {folder.relative_to(saves.absolute()).as_posix() for folder in discovery.find_collections([saves])}
    same = {name for name in there & copied if not is_stale(saves / name, known[name])}
    if new := sorted(there - (known.keys() - copied) - same):
        print(f"{label}: does not have {listed(new)} (make index adds it or names the reason)", file=sys.stderr)
    return table, {name: mark["sha256"] for name, mark in known.items()}


def listed(names: list[str]) -> str:
    """Names as a message shows them: the first three and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_stale(folder: Path, mark: dict) -> bool:
    """Whether a collection's manifest or scores changed since they were indexed, or are gone or not sound."""
    try:
        if stamp_of(folder) != mark["stamp"]:
            manifest = read_manifest(folder)
            if manifest is None or manifest.sha256 != mark["sha256"]:
                return True
        return (
            scores_stamp_of(folder) != mark["scores"]["stamp"]
            and evaluation.sha256_in(folder) != mark["scores"]["sha256"]
        )
    except UserError:
        return True


def chosen(saves: Path | None = None) -> tuple[list[Chosen], int]:
    """The collections that CATEGORY, DATASET, MODEL, RANK and SEED of the environment select; unset ones select all.

    Those of made tasks are among them where CATEGORY or DATASET names them (settings.takes_made). Names match without
    case and punctuation; each variable may list several. Updates the index first.

    Returns the whole ones among them, and how many are broken: a line on stderr names each of those, and a command that
    leaves them out ends with status 1. Raises UserError for a name, a rank or a seed that no collection has, when none
    is selected, or when all that are selected are broken.
    """
    saves = saves or paths.SAVES
    table, faults = update(saves)
    wanted = selection.requested_filters()
    unread = [name for name in faults if selection.may_fit(selection.place_of(name), wanted) and _is_taken(name)]
    broken = [faults[name] for name in unread]
    fitting = selection.places_in(selected(table, wanted, faults))
    names = sorted(name for name in fitting if _is_taken(name))
    if broken and not names:
        for fault in broken[:-1]:
            cli.complain(fault)
        raise UserError(broken[-1])
    if fitting and not names:
        what = "all collections that fit are of made tasks"
        raise UserError(f"{paths.relative(saves)}: {what}; CATEGORY={paths.MADE} takes them")
    if not names:
        raise selection.none_fits(saves, wanted)
    selection.require_each([*(fitting[name] for name in names), *map(selection.place_of, unread)], wanted, saves)
    for fault in broken:
        cli.complain(f"{fault}; it is left out")
    return [Chosen(name, saves / name, require_manifest(saves / name)) for name in names], len(broken)


def _is_taken(name: str) -> bool:
    """Whether a collection, by its path in saves/, may be chosen: one of a made task has to be named."""
    return settings.takes_made() or selection.place_of(name).category != paths.MADE


def chosen_at(folder: Path) -> Chosen:
    """The collection in a folder below saves/. Raises UserError where it is none."""
    name = folder.absolute().relative_to(paths.SAVES.absolute()).as_posix()
    return Chosen(name, folder, require_manifest(folder))


def selected(table: "pa.Table", wanted: dict[str, list[str]], broken: Iterable[str] = ()) -> "pa.Table":
    """The rows of an index that match `selection.requested_filters()`.

    Raises UserError for a name that no row has, and no path of a collection in `broken` either.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    unread = [selection.place_of(path) for path in broken]
    for name in ("category", "dataset", "model"):
        known = {value for value in [*table[name].to_pylist(), *(getattr(place, name) for place in unread)] if value}
        values = [paths.choose(value, known, f"collected {name}") for value in wanted[name]]
        if values:
            table = table.filter(pc.is_in(table[name], pa.array(values)))
    for name in ("rank", "seed"):
        if wanted[name]:
            values = pa.array([int(value) for value in wanted[name]], table.schema.field(name).type)
            table = table.filter(pc.is_in(table[name], values))
    return table
