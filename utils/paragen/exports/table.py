"""A plain table of checkpoints, a row each, for whatever reads tables: OUT/pairs.jsonl and OUT/pairs.parquet.

    FORMAT=table [STEPS=all|last|every:10|best] [COPY=1 [DTYPE=..]] DATASET=ARC-c OUT=~/table python utils/export.py

Both files hold the same rows. COPY=1 puts the adapters beside them as PEFT folders, so that OUT can be moved; without
it the rows name the files of the collections. All paths are relative to OUT.
"""

import io
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from paragen.collection import derived, index, task_descriptions
from paragen.collection.index import Chosen
from paragen.common import files, paths, settings
from paragen.common.cli import UserError, say
from paragen.exports import adapters, parts
from paragen.exports.peft import Planned

FORMAT = "table"
NAMES = ("pairs.jsonl", "pairs.parquet")
# Columns of the index that a row has under the same name; `file` and `prompts_file` become paths relative to OUT.
FROM_INDEX = (
    "category", "dataset", "model", "base_model", "rank", "seed", "step", "loss", "learning_rate", *index.SCORES,
    "prompts_file", "prompts_sha256", "rows", "collection",
)  # fmt: skip
# Keys of a recipe that are columns of their own.
KNOWN_KEYS = {"dataset", "lora_rank", "seed", "lora_alpha"}
RECIPE = "recipe."  # what the columns of a recipe's keys begin with


def export(chosen: list[Chosen], out: Path, dtype: str | None) -> None:
    """Write the table of some collections' checkpoints.

    Args:
        chosen: the collections.
        out: the folder to write below.
        dtype: what the copied adapters are cast to; None keeps theirs.

    Raises UserError, before anything is written, for a DTYPE without COPY=1 and an unknown value of STEPS.
    """
    copied = settings.switch("COPY")
    if dtype and not copied:
        raise UserError(f"DTYPE={dtype}: FORMAT=table casts only adapters that it copies; add COPY=1 or omit DTYPE")
    steps = settings.text("STEPS") or "all"
    plan = [adapters.planned(one, steps) for one in chosen]
    if copied:
        adapters.check(plan, out, FORMAT, dtype)
    rows = rows_of(plan, out, copied, dtype)
    for name in NAMES:
        derived.check_replaceable(out, name, {"format": FORMAT})
    if copied:
        adapters.write(plan, out, FORMAT, dtype)
        if not parts.dry_run_requested():
            for row in rows:
                row["sha256"] = files.sha256_of(out / row["file"])
    source = adapters.table_source(FORMAT, chosen, rows)
    parts.make(out, NAMES[0], source, partial(write_jsonl, rows))
    parts.make(out, NAMES[1], source, partial(write_parquet, rows))
    if bare := sorted({row["dataset"] for row in rows if not row["descriptions"]}):
        say(f"note: without descriptions of their task: {index.listed(bare)}; make describe adds them")


def rows_of(plan: Sequence[Planned], out: Path, copied: bool, dtype: str | None) -> list[dict[str, Any]]:
    """The table's rows, by collection and step.

    Args:
        plan: what is exported.
        out: the folder to write below.
        copied: the adapters lie below `out`, not in their collections.
        dtype: what the copied adapters are cast to; None keeps theirs.
    """
    varying = varying_keys([one.chosen.manifest.recipe or {} for one in plan])
    rows = []
    for one in plan:
        manifest, folder = one.chosen.manifest, one.chosen.folder
        recipe, texts = manifest.recipe or {}, task_descriptions.of_collection(manifest)
        indexed = {row["step"]: row for row in index.rows_of(one.chosen.name, folder)[0].to_pylist()}
        for entry in one.entries:
            known = indexed[entry.step]
            row = {"id": f"{one.chosen.name}/checkpoint-{entry.step}", **{name: known[name] for name in FROM_INDEX}}
            row["base_model"] = manifest.base_model and (manifest.base_model.hub_id or manifest.base_model.name)
            row["prompts_file"] = known["prompts_file"] and relative(paths.DATA / known["prompts_file"], out)
            row |= {"descriptions": texts, "alpha": one.config.get("lora_alpha"), "dtype": dtype or one.stored}
            row |= {RECIPE + key: recipe.get(key) for key in varying}
            path = adapters.path_of(one, entry) if copied else relative(folder / entry.file_name, out)
            config = f"{path}/{paths.ADAPTER_CONFIG}" if copied else relative(folder / paths.ADAPTER_CONFIG, out)
            row |= {"path": path, "file": f"{path}/{paths.ADAPTER}" if copied else path, "adapter_config": config}
            rows.append(row | {"sha256": entry.sha256, "collected_sha256": entry.sha256})
    for name in (RECIPE + key for key in varying):
        for row, value in zip(rows, of_one_type([row[name] for row in rows]), strict=True):
            row[name] = value
    return rows


def varying_keys(recipes: Sequence[dict[str, Any]]) -> list[str]:
    """The recipes' keys whose values differ between them, or that some lack, sorted; without those with a column."""
    keys = sorted({key for recipe in recipes for key in recipe} - KNOWN_KEYS)
    return [key for key in keys if len({json.dumps(recipe.get(key), sort_keys=True) for recipe in recipes}) > 1]


def relative(path: Path, out: Path) -> str:
    """A path relative to the export's folder."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(out))


def write_jsonl(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the rows as JSON objects, a line each."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the rows as a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet

    kinds = {**index.COLUMNS, "alpha": "float64"}
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name == "descriptions":
            columns[name] = pa.array(values, pa.list_(pa.string()))
        elif name.startswith(RECIPE):
            columns[name] = pa.array(values)
        else:
            columns[name] = pa.array(values, getattr(pa, kinds.get(name, "string"))())
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    path.write_bytes(sink.getvalue())


def of_one_type(values: list[Any]) -> list[Any]:
    """A recipe's values as one column: of one scalar type, numbers as floats where they mix, otherwise JSON texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) <= 1 and kinds <= {bool, int, float, str}:
        return values
    return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
