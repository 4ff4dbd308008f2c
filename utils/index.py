"""One table over all collections: saves/index.parquet, a row per checkpoint.

    python utils/index.py                  bring it up to date and print a line per collection        (make index)
    python utils/index.py --rows           print every row (--csv: as CSV)

Collections whose manifest did not change are not read again. One that is broken is named and left out; status 1 then.
Imported by all that works on collections: `chosen` gives those that the user selects.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cli
import collection
import files
import models
import paths
import rank_config
from cli import UserError, say

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "1"
COLUMNS = {
    "category": "string", "dataset": "string", "model": "string", "base_model": "string", "rank": "int32",
    "seed": "int64", "step": "int64", "loss": "float64", "learning_rate": "float64", "file": "string",
    "bytes": "int64", "sha256": "string", "prompts_file": "string", "prompts_sha256": "string", "rows": "int64",
    "collection": "string",
}  # fmt: skip


class Chosen(NamedTuple):
    """A collection on disk."""

    name: str  # <category>/<dataset>/<run folder>, as in the index
    folder: Path
    manifest: dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description="Index all collections.")
    parser.add_argument("--rows", action="store_true", help="print every checkpoint")
    parser.add_argument("--csv", action="store_true", help="print every checkpoint as CSV")
    args = parser.parse_args()
    table, faults = update()
    if args.csv:
        import pyarrow.csv

        pyarrow.csv.write_csv(table, sys.stdout.buffer)
    elif args.rows:
        print_rows(table)
    else:
        print_collections(table)
    for fault in faults.values():
        print(f"FAULTY {fault}", file=sys.stderr, flush=True)
    return 1 if faults else 0


def update(saves: Path | None = None) -> "tuple[pa.Table, dict[str, str]]":
    """Bring the index up to date with the collections below `saves` and write it where it changed.

    Returns (the table, by name the collections that are not in it and what is wrong with each, a line).
    """
    import pyarrow as pa

    saves = saves or paths.SAVES
    old, known = read(saves)
    tables, seen, faults = [], {}, {}
    for folder in collection.run_folders([saves]) if saves.is_dir() else []:
        name = folder.relative_to(saves.absolute()).as_posix()
        try:
            stamp = stamp_of(folder)
            if name in known and known[name]["stamp"] == stamp:
                part, seal = old.filter(pa.compute.field("collection") == name), known[name]["sha256"]
            else:
                part, seal = rows_of(name, folder)
            check_files(saves, part)
        except UserError as error:
            faults[name] = str(error)
            continue
        tables.append(part)
        seen[name] = {"stamp": stamp, "sha256": seal}
    table = pa.concat_tables(tables) if tables else schema().empty_table()
    if seen != known:
        write(saves, table, seen)
    return table, faults


def schema() -> "pa.Schema":
    """The index's columns and their types."""
    import pyarrow as pa

    return pa.schema([(name, getattr(pa, kind)()) for name, kind in COLUMNS.items()])


def read(saves: Path) -> "tuple[pa.Table, dict[str, dict]]":
    """The index as it stands on disk, and by collection the manifest it was read from: its `stamp` and its `sha256`.

    Both empty where there is none, or one of another format or half a file: it is only a copy of the manifests.
    """
    import pyarrow as pa
    import pyarrow.parquet

    path = saves / paths.INDEX
    try:
        table = pyarrow.parquet.read_table(path, memory_map=False)
        marks = json.loads(table.schema.metadata[b"paragen"])
        if marks["format"] == FORMAT and table.schema.names == list(COLUMNS):
            return table.replace_schema_metadata(None), marks["collections"]
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        pass
    return schema().empty_table(), {}


def write(saves: Path, table: "pa.Table", known: dict[str, dict]) -> None:
    """Write the index, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet

    marks = json.dumps({"format": FORMAT, "collections": known})
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table.replace_schema_metadata({"paragen": marks}), sink)
    files.write_atomically(saves / paths.INDEX, sink.getvalue().to_pybytes())


def stamp_of(folder: Path) -> list[int]:
    """What tells whether a manifest is the one that was read: its size and times. Raises UserError without one."""
    try:
        stat = os.stat(folder / paths.MANIFEST)
    except FileNotFoundError:
        raise UserError(f"{paths.relative(folder)}: has no {paths.MANIFEST}, so it is no finished collection") from None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def rows_of(name: str, folder: Path) -> "tuple[pa.Table, str]":
    """The rows of one collection and its manifest's hash. Raises UserError when the manifest cannot be trusted."""
    import pyarrow as pa

    manifest = collection.read_manifest(folder)
    base, data = manifest["base_model"] or {}, (manifest["data"] or [{}])[0]
    shared = {
        "category": manifest["category"],
        "dataset": manifest["dataset"],
        "model": models.short_name(Path(base["name"])) if base.get("name") else None,
        "base_model": base.get("name"),
        "rank": manifest["rank"],
        "seed": manifest["seed"],
        "prompts_file": data.get("file"),
        "prompts_sha256": data.get("rows_sha256"),
        "rows": data.get("rows"),
        "collection": name,
    }
    rows = [
        {**shared, **{key: entry[key] for key in ("step", "loss", "learning_rate", "bytes", "sha256")}}
        | {"file": f"{name}/{collection.checkpoint_name(entry['step'])}"}
        for entry in manifest["checkpoints"]
    ]
    return pa.Table.from_pylist(rows, schema=schema()), manifest["sha256"]


def check_files(saves: Path, rows: "pa.Table") -> None:
    """Raise UserError unless each file of some rows is there with its length."""
    for name, size in zip(rows["file"].to_pylist(), rows["bytes"].to_pylist(), strict=True):
        try:
            found = os.stat(saves / name).st_size
        except FileNotFoundError:
            raise UserError(f"{paths.relative(saves / name)}: is missing; collect it again with FORCE=1") from None
        if found != size:
            raise UserError(f"{paths.relative(saves / name)}: has {found} bytes, its manifest says {size}")


def load(saves: Path | None = None) -> "pa.Table":
    """The index as it stands on disk, checked not to be older than the manifests it was made from.

    Raises UserError naming the collections that changed or are gone since, or when there is no index; a collection that
    the index does not have yet is named on stderr.
    """
    saves = saves or paths.SAVES
    table, known = read(saves)
    if not known:
        raise UserError(f"{paths.relative(saves / paths.INDEX)}: there is no index yet; run: make index")
    stale = [name for name, mark in known.items() if is_stale(saves / name, mark)]
    if stale:
        raise UserError(
            f"{paths.relative(saves / paths.INDEX)}: older than {', '.join(sorted(stale)[:3])}"
            f"{f' and {len(stale) - 3} more' if len(stale) > 3 else ''}; run: make index"
        )
    there = {folder.relative_to(saves.absolute()).as_posix() for folder in collection.run_folders([saves])}
    if new := sorted(there - known.keys()):
        print(
            f"{paths.relative(saves / paths.INDEX)}: does not have {', '.join(new[:3])}"
            f"{f' and {len(new) - 3} more' if len(new) > 3 else ''} (make index)",
            file=sys.stderr,
        )
    return table


def is_stale(folder: Path, mark: dict) -> bool:
    """Whether a collection's manifest is another than the one that was indexed."""
    try:
        return stamp_of(folder) != mark["stamp"] and collection.read_manifest(folder)["sha256"] != mark["sha256"]
    except UserError:
        return True


def chosen(saves: Path | None = None) -> list[Chosen]:
    """The collections that CATEGORY, DATASET, MODEL, RANK and SEED of the environment select; unset ones select all.

    Names are matched without case and punctuation; all may list several. Brings the index up to date first.

    Raises UserError for a name that no collection has, when nothing is left, or when a selected one is broken.
    """
    saves = saves or paths.SAVES
    table, faults = update(saves)
    table, asked = selected(table)
    for name, fault in faults.items():
        if concerns(name, asked):
            raise UserError(fault)
    names = sorted(set(table["collection"].to_pylist()))
    if not names:
        wanted = " ".join(f"{name.upper()}={' '.join(values)}" for name, values in asked.items() if values)
        what = f"no collection fits {wanted}" if wanted else "no collections yet"
        raise UserError(f"{paths.relative(saves)}: {what}; make index lists those there are")
    return [Chosen(name, saves / name, collection.read_manifest(saves / name)) for name in names]


def selected(table: "pa.Table") -> "tuple[pa.Table, dict[str, list[str]]]":
    """(the rows of an index that CATEGORY, DATASET, MODEL, RANK and SEED select, what these ask for).

    Raises UserError for a name that no row has.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    asked = {
        name: os.environ.get(name.upper(), "").split() for name in ("category", "dataset", "model", "rank", "seed")
    }
    asked["model"] = asked["model"] or os.environ.get("MODELS", "").split()
    asked["rank"] = asked["rank"] or os.environ.get("RANKS", "").split()
    for name in ("category", "dataset", "model"):
        known = {value for value in table[name].to_pylist() if value}
        values = [paths.choose(value, known, f"collected {name}") for value in asked[name]]
        if values:
            table = table.filter(pc.is_in(table[name], pa.array(values)))
    for name, parse in (("rank", rank_config.parse_rank), ("seed", parse_seed)):
        if asked[name]:
            values = pa.array([parse(value) for value in asked[name]], table.schema.field(name).type)
            table = table.filter(pc.is_in(table[name], values))
    return table, asked


def parse_seed(text: str) -> int:
    """A seed as typed; raises UserError unless it is a whole number that the index can hold."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise UserError(f"SEED={text}: is not a whole number")
    return int(text)


def concerns(name: str, asked: dict[str, list[str]]) -> bool:
    """Whether a collection whose manifest cannot be read may be one of those asked for, going by its path."""
    parts = name.split("/")
    held = paths.rank_in(name)
    return all(
        not asked[key] or paths.loose(part) in map(paths.loose, asked[key])
        for key, part in zip(("category", "dataset"), parts, strict=False)
    ) and (not asked["rank"] or held is None or str(held[0]) in asked["rank"])


def print_collections(table: "pa.Table") -> None:
    """A line per collection: what it is of, its steps, its loss, its size."""
    if not table.num_rows:
        say("no collections yet")
        return
    rows = []
    keys = ["collection", "category", "dataset", "model", "rank", "seed"]
    figures = [("step", "min"), ("step", "max"), ("step", "count"), ("loss", "mean"), ("bytes", "sum")]
    for row in table.group_by(keys).aggregate(figures).sort_by("collection").to_pylist():
        loss = "" if row["loss_mean"] is None else f"{row['loss_mean']:.4f}"
        named = [str(row[key]) if row[key] is not None else "?" for key in keys[1:]]
        steps = f"{row['step_min']}-{row['step_max']}"
        rows.append((*named, str(row["step_count"]), steps, loss, f"{row['bytes_sum'] / 1e6:.1f}"))
    cli.print_table(("category", "dataset", "model", "rank", "seed", "kept", "steps", "mean loss", "MB"), rows)


def print_rows(table: "pa.Table") -> None:
    """A line per checkpoint."""
    shown = ("category", "dataset", "model", "rank", "step", "loss", "learning_rate", "bytes", "file")
    columns = [
        [f"{value:.6g}" if isinstance(value, float) else str(value) for value in table[name].to_pylist()]
        for name in shown
    ]
    cli.print_table(shown, list(zip(*columns, strict=True)))


if __name__ == "__main__":
    cli.run(main)
