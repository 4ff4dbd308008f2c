"""Weight2Token's table of adapters: OUT/w2t.csv with its columns, and the adapters that it names.

    FORMAT=w2t [STEPS=all|last|every:10|best] [DTYPE=..] DATASET=ARC-c OUT=~/w2t python utils/export.py

A row per scored checkpoint, for `perf_prediction_pipeline.py prepare` and `cache`, `fewshot_retrieval.py` and the
classification scripts (which need a column `label_vector` beside these). Columns after `sidecar_config` are ours, but
for those of its own collecting script (train_samples, optimizer_steps). A row's `run_id` follows from its collection
and step, so that several exports can be merged; its paths are relative to OUT.
"""

import csv
import io
import math
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from paragen.collection import checkpoints, derived, evaluation, index
from paragen.collection.index import Chosen
from paragen.collection.manifest import Manifest, read_manifest
from paragen.common import files, paths, settings
from paragen.common.cli import UserError, say
from paragen.exports import adapters, best_step, parts
from paragen.exports.peft import Planned
from paragen.recipes import keys

FORMAT, NAME = "w2t", "w2t.csv"
# REQUIRED_METADATA_COLUMNS of llm/regression/perf_prediction_pipeline.py.
REQUIRED = (
    "run_id", "time", "run_name", "base_model", "dataset", "lr", "epochs", "batch_size", "grad_accum", "max_len",
    "warmup_ratio", "weight_decay", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "seed", "test_loss",
    "test_ppl", "test_acc", "safetensors_path", "sidecar_config",
)  # fmt: skip
OURS = (
    "train_samples", "optimizer_steps", "epochs_exact", "collection", "split", "scored_rows", "metric", "base_acc",
    "base_loss", "sha256",
)  # fmt: skip
# The defaults of transformers' TrainingArguments for keys that a recipe omits.
OMITTED = {"learning_rate": 5e-5, "weight_decay": 0.0, "warmup_steps": 0}
LARGEST_EXPONENT = 50.0  # of the loss: its own script writes an infinite perplexity above
RUN_ID_DIGITS = 12  # hexadecimal: whole numbers that a float64 holds


def export(chosen: list[Chosen], out: Path, dtype: str | None) -> None:
    """Write the table and the adapters of some collections.

    Args:
        chosen: the collections.
        out: the folder to write below.
        dtype: what the adapters are cast to; None keeps theirs.

    Raises UserError, before anything is written, for collections with other layers than the others, for one of rank 1
    or whose recipe is not known, and where no selected checkpoint has scores.
    """
    steps = settings.text("STEPS") or "all"
    # of a collection without scores, `best` selects the last checkpoint, which is then left out and counted
    plan = [adapters.planned(one, steps if steps != "best" or scores_of(one)[1] else "last") for one in chosen]
    rows = rows_to_write(plan)
    if not rows:
        raise UserError(f"{plan[0].chosen.name}: has no scores; {best_step.way_to_score(plan[0].chosen)}")
    scored = those_in(rows, plan)
    check_layers(scored)
    check_rank_and_recipe(scored)
    adapters.check(scored, out, FORMAT, dtype)
    source = adapters.table_source(FORMAT, chosen, rows)
    derived.check_replaceable(out, NAME, source)
    adapters.write(scored, out, FORMAT, dtype)
    parts.make(out, NAME, source, partial(write_csv, rows))
    print_notes(plan, rows, out, dtype)


def check_layers(plan: Sequence[Planned]) -> None:
    """Raise UserError for collections whose layers differ: those after the first would be left out silently there."""
    first: tuple[str, dict[str, tuple[int, int]]] | None = None
    for one in plan:
        handle = next(checkpoints.open_all(one.chosen.folder, one.entries))
        found = {
            key: (shape[1] if key.endswith("lora_A.weight") else shape[0], len(shape))
            for key, shape in checkpoints.layout_of(handle).items()
        }
        checkpoints.layers_of(found)
        if first is None:
            first = one.chosen.name, found
        elif found != first[1]:
            differing = min(key for key in found.keys() | first[1].keys() if found.get(key) != first[1].get(key))
            raise UserError(
                f"{one.chosen.name}: has other layers or widths than {first[0]} ({differing}), and Weight2Token reads "
                "one set of layers; choose with MODEL=.. DATASET=.., and an OUT for each"
            )


def check_rank_and_recipe(plan: Sequence[Planned]) -> None:
    """Raise UserError for a collection of rank 1, of which its model makes NaN, and one whose recipe is not known."""
    for one in plan:
        if one.chosen.manifest.rank == 1:
            raise UserError(
                f"{one.chosen.name}: is of rank 1; Weight2Token divides by the deviation across ranks, so that every "
                "loss of its model would be NaN: choose others with RANK=.., or take FORMAT=table"
            )
        if one.chosen.manifest.recipe is None:
            raise UserError(
                f"{one.chosen.name}: does not know its recipe (it was made from a stock run), of which the table has "
                "columns; select others with DATASET=.."
            )


def rows_to_write(plan: Sequence[Planned]) -> list[dict[str, Any]]:
    """The rows of all selected checkpoints that have scores.

    Where some have an accuracy, those without one are left out: one of them would make the mean of this target NaN.
    """
    rows = [row for one in plan for row in rows_of(one)]
    accurate = [row for row in rows if row["test_acc"] != ""]
    return accurate or rows


def those_in(rows: Sequence[dict[str, Any]], plan: Sequence[Planned]) -> list[Planned]:
    """The collections that have rows, each with the checkpoints of its rows."""
    named = {row["safetensors_path"] for row in rows}
    kept = [
        one._replace(entries=[entry for entry in one.entries if adapters.path_of(one, entry) in named]) for one in plan
    ]
    return [one for one in kept if one.entries]


def scores_of(chosen: Chosen) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """(The evaluation that tables show, its scores by step), both empty where there is none."""
    shown = evaluation.shown(evaluation.read(chosen.folder, chosen.manifest))
    return (shown, {score["step"]: score for score in shown["checkpoints"]}) if shown else ({}, {})


def is_number(value: Any) -> bool:
    """Whether a score is known and finite."""
    return value is not None and math.isfinite(value)


def rows_of(one: Planned) -> list[dict[str, Any]]:
    """The rows of a collection's selected checkpoints that have a loss on held-out rows; an unknown value is empty."""
    manifest = one.chosen.manifest
    shown, scores = scores_of(one.chosen)
    base = shown.get("base") or {}
    shared = {
        "time": manifest.attempt.finished.strftime("%Y%m%d_%H%M%S") if manifest.attempt else "",
        "base_model": manifest.base_model and (manifest.base_model.hub_id or manifest.base_model.name) or "",
        "dataset": manifest.dataset,
        **trained_with(manifest, one.config),
        "collection": one.chosen.name,
        "split": shown.get("split", ""),
        "scored_rows": shown.get("rows", ""),
        "metric": shown.get("metric", ""),
        "base_acc": shown_number(base.get("score")),
        "base_loss": shown_number(base.get("loss")),
    }
    rows = []
    for entry in one.entries:
        score = scores.get(entry.step)
        if score is None or not is_number(score["loss"]):
            continue
        folder, seen = adapters.path_of(one, entry), epochs_at(one.chosen, entry.step)
        row = {
            **shared,
            "run_id": int(files.sha256_of_value([manifest.sha256, entry.step])[:RUN_ID_DIGITS], 16),
            "run_name": f"{one.chosen.name}/checkpoint-{entry.step}",
            "epochs": 0 if seen is None else max(1, round(seen)),
            "epochs_exact": "" if seen is None else round(seen, 6),
            "optimizer_steps": entry.step,
            "test_loss": score["loss"],
            "test_ppl": math.exp(score["loss"]) if score["loss"] <= LARGEST_EXPONENT else math.inf,
            "test_acc": shown_number(score["score"]),
            "safetensors_path": folder,
            "sidecar_config": f"{folder}/{paths.ADAPTER_CONFIG}",
            "sha256": entry.sha256,
        }
        rows.append({name: row[name] for name in (*REQUIRED, *OURS)})
    return rows


def shown_number(value: Any) -> Any:
    """A number for the table, an empty text where it is not known."""
    return value if is_number(value) else ""


def trained_with(manifest: Manifest, config: dict[str, Any]) -> dict[str, Any]:
    """The columns with hyperparameters; `config` is adapter_config.json. What a recipe omits has its default."""
    recipe = manifest.recipe or {}
    target = config["target_modules"]
    warmup = recipe.get("warmup_ratio")
    if warmup is None:
        steps = recipe.get("warmup_steps", OMITTED["warmup_steps"])
        # transformers 5 reads a value below 1 as a share
        warmup = steps if steps < 1 else steps / manifest.total_steps if manifest.total_steps else ""
    return {
        "lr": recipe.get("learning_rate", OMITTED["learning_rate"]),
        "batch_size": rows_at_once(manifest),
        "grad_accum": manifest.accumulated or recipe.get("gradient_accumulation_steps", 1),
        "max_len": recipe.get("cutoff_len", keys.OMITTED_CUTOFF),
        "warmup_ratio": warmup,
        "weight_decay": recipe.get("weight_decay", OMITTED["weight_decay"]),
        "lora_r": manifest.rank,
        "lora_alpha": config.get("lora_alpha"),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": target if isinstance(target, str) else ",".join(sorted(target)),
        "seed": keys.OMITTED_SEED if manifest.seed is None else manifest.seed,
        "train_samples": sum(part.rows for part in manifest.data or ()),
    }


def rows_at_once(manifest: Manifest) -> int:
    """The rows in one forward pass of all processes together."""
    return (manifest.rows_at_a_time or (manifest.recipe or {}).get("per_device_train_batch_size", 8)) * (
        manifest.processes or 1
    )


def epochs_at(chosen: Chosen, step: int) -> float | None:
    """How often each row was seen until a step, those of the pretrain included; None where that is not known.

    The logs do not tell: a resumed run counts the pretrain's steps as if they had its own batch.
    """
    manifest, before = chosen.manifest, chosen.manifest.pretrain
    own = steps_per_epoch(manifest)
    if own is None:
        return None
    if before is None:
        return step / own
    try:
        pretrain = read_manifest(chosen.folder.parent / before.run)
    except UserError:  # make verify and make status name what is wrong with it
        return None
    theirs = steps_per_epoch(pretrain) if pretrain and pretrain.pretrain is None else None
    return None if theirs is None else before.step / theirs + (step - before.step) / own


def steps_per_epoch(manifest: Manifest) -> int | None:
    """The optimizer steps of an epoch, as transformers' Trainer counts them; None where they are not known."""
    if not (manifest.trained_rows and manifest.rows_at_a_time and manifest.accumulated and manifest.processes):
        return None
    batches = math.ceil(manifest.trained_rows / rows_at_once(manifest))
    return max(1, math.ceil(batches / manifest.accumulated))


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (*REQUIRED, *OURS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def print_notes(plan: Sequence[Planned], rows: Sequence[dict[str, Any]], out: Path, dtype: str | None) -> None:
    """Print what Weight2Token would not say; `plan`: all selected checkpoints, also those without a row."""
    say(
        f"note: the paths in {NAME} are relative to {paths.relative(out)}: run Weight2Token's scripts in that folder, "
        f"or with --path-map {shlex.quote(f'{adapters.FOLDER}={out / adapters.FOLDER}')}"
    )
    selected, named = sum(len(one.entries) for one in plan), {row["safetensors_path"] for row in rows}
    if len(rows) < selected:
        short = [one for one in plan if any(adapters.path_of(one, entry) not in named for entry in one.entries)]
        say(
            f"note: {selected - len(rows)} of {selected} checkpoints are left out, since they have no test_acc and "
            f"test_loss: {index.listed([one.chosen.name for one in short])}; {best_step.way_to_score(short[0].chosen)}"
        )
    if all(row["test_acc"] == "" for row in rows):
        say("note: test_acc is empty in all rows (scored by the loss alone): train with --target-col test_loss")
    if len({row["collection"] for row in rows}) < len(rows):
        say(
            "note: several steps of a run are rows here, and its random split puts some of them on both sides; "
            "STEPS=last or STEPS=best writes one row a run"
        )
    if unknown := sum(row["epochs"] == 0 for row in rows):
        say(f"note: epochs is 0 in {unknown} rows: the pretrain run or its figures are not there to count them")
    if any((dtype or one.stored) == "bfloat16" for one in plan):
        say("note: its classification scripts skip adapters in bfloat16; DTYPE=float32 writes others")
