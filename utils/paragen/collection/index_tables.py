"""Prints the index of all collections: a line per collection, a line per checkpoint, or CSV."""

import argparse
import sys
from typing import TYPE_CHECKING

from paragen.collection import evaluation
from paragen.collection.index import SCORES
from paragen.common import cli
from paragen.common.cli import say

if TYPE_CHECKING:
    import pyarrow as pa


def show(table: "pa.Table", args: argparse.Namespace, whole: bool) -> None:
    """Print the index as the options `rows` and `csv` request; `whole`: no collection is broken."""
    if args.csv:
        import pyarrow.csv

        pyarrow.csv.write_csv(table, sys.stdout.buffer)
    elif args.rows:
        print_rows(table)
    elif table.num_rows or whole:
        print_collections(table)
    else:
        say("no whole collection")


def print_collections(table: "pa.Table") -> None:
    """Print a line per collection: its dataset, model and rank, its steps, its loss, its size."""
    if not table.num_rows:
        say("no collections yet")
        return
    rows = []
    keys = ["collection", "category", "dataset", "model", "rank", "seed"]
    figures = [("step", "min"), ("step", "max"), ("step", "count"), ("loss", "mean"), ("bytes", "sum")]
    last = last_scores(table)
    for row in table.group_by(keys).aggregate(figures).sort_by("collection").to_pylist():
        loss = "" if row["loss_mean"] is None else f"{row['loss_mean']:.4f}"
        named = [str(row[key]) if row[key] is not None else "?" for key in keys[1:]]
        steps = f"{row['step_min']}-{row['step_max']}"
        scores = last.get(row["collection"], ("", "", "")) if last else ()
        rows.append((*named, str(row["step_count"]), steps, loss, f"{row['bytes_sum'] / 1e6:.1f}", *scores))
    head = ("category", "dataset", "model", "rank", "seed", "kept", "steps", "mean loss", "MB")
    cli.print_table((*head, *(("base", "last score", "scored on") if last else ())), rows)


def last_scores(table: "pa.Table") -> dict[str, tuple[str, str, str]]:
    """By collection, texts about its last evaluated checkpoint: the base model's score, its own, and the scored rows.

    Scores are shares, or losses per token.
    """
    found = {}
    for row in table.select(["collection", *SCORES]).to_pylist():
        if row["metric"]:
            names = ("base_loss", "test_loss") if row["metric"] == "loss" else ("base_score", "score")
            texts = ["" if row[name] is None else f"{row[name]:.4f}" for name in names]
            about = evaluation.rows_text({**row, "rows": row["scored_rows"]})
            found[row["collection"]] = texts[0], f"{texts[1]} ({row['metric']})", about
    return found


def print_rows(table: "pa.Table") -> None:
    """Print a line per checkpoint."""
    shown = ("category", "dataset", "model", "rank", "step", "loss", "learning_rate", "bytes", "file")
    columns = [
        [f"{value:.6g}" if isinstance(value, float) else str(value) for value in table[name].to_pylist()]
        for name in shown
    ]
    cli.print_table(shown, list(zip(*columns, strict=True)))
