"""A generator's benchmark as tables and pictures show it: the lines of benchmark.json, which the benchmark writes.

The report has a section for each saves/benchmarks/<name>/benchmark.json.
"""

import base64
from pathlib import Path
from typing import Any

from paragen.collection import manifest_kinds, sealed_json
from paragen.common import paths
from paragen.common.cli import UserError

FORMAT = "paragen-benchmark-1"
FILE, PICTURE = "benchmark.json", "benchmark.png"
FOLDER = "benchmarks"  # in saves/
WAY_OUT = "remove it and run: make benchmark-generator"
KINDS = {  # of the values that tables, pictures and the report show
    "base_model": manifest_kinds.TEXT, "rank": manifest_kinds.RANK, "collections": manifest_kinds.OBJECT,
    "groups": manifest_kinds.LIST,
}  # fmt: skip
# Each method's letter in the tables, its short name, and what it is.
METHODS = {
    "base": ("a", "base", "the base model"),
    "mean": ("b", "mean", "the mean of the other datasets' last checkpoints"),
    "nearest": ("c", "nearest", "the last checkpoint of the dataset with the most similar prompts"),
    "weighted": ("d", "weighted", "the mean weighted by similarity, its temperature chosen on training tasks"),
    "generated": ("e1", "generated, single", "generated from a draw of prompts, each sample alone"),
    "generated-mean": ("e", "generated", "the mean of the generated samples"),
    "own": ("f", "own", "the dataset's own adapter"),
    "again": ("f2", "own again", "the same with the rows in another order: the noise"),
    "union": ("g", "union", "one adapter of the same rank trained on the union of the others' rows, for as many steps"),
    "few": ("h", "few-shot", "an adapter trained on the prompts' rows with their answers"),
    "context": ("i", "in context", "the base model with those rows in its context"),
    "swapped": ("j1", "other prompts, single", "generated from another dataset's prompts, each sample alone"),
    "swapped-mean": ("j", "other prompts", "the mean of the samples that are generated from another dataset's prompts"),
}
SHOWN = tuple(name for name in METHODS if name not in ("swapped",))


def read(path: Path) -> dict[str, Any]:
    """A benchmark.json. Raises UserError where it is missing, broken, was edited or is of another format."""
    content = sealed_json.read(path, FORMAT, KINDS, WAY_OUT)
    if content is None:
        raise UserError(f"{paths.relative(path)}: is missing; {WAY_OUT}")
    return content


def number(figure: dict[str, Any] | None, digits: int = 3, percent: bool = False) -> str:
    """A figure as tables show it; empty where there is none."""
    if figure is None or figure["value"] is None:
        return ""
    return f"{100 * figure['value']:.0f} %" if percent else f"{figure['value']:.{digits}f}"


def with_interval(figure: dict[str, Any] | None, percent: bool = False) -> str:
    """A figure with its interval: `0.412 (0.380 to 0.441)`."""
    if figure is None or figure["value"] is None:
        return ""
    low, high = ({"value": edge} for edge in figure["interval"])
    return f"{number(figure, 3, percent)} ({number(low, 3, percent)} to {number(high, 3, percent)})"


def head_of(group: dict[str, Any]) -> tuple[str, ...]:
    """The columns of a group's table."""
    there = methods_of(group)
    return (
        "dataset",
        "kind",
        "rows",
        "figure",
        *(f"{METHODS[name][0]} {METHODS[name][1]}" for name in there),
        "closed",
    )


def methods_of(group: dict[str, Any]) -> list[str]:
    """The methods that some row of a group has, in the order of the table."""
    return [name for name in SHOWN if any(name in row["methods"] for row in group["rows"])]


def lines_of(group: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a group's table: of each dataset a line of losses and, where answers are scored, one of accuracies.

    `closed` is the share of the distance from base to own that the generated adapter closes, with its interval.
    """
    lines = []
    for row in group["rows"]:
        about = (row["dataset"] + ("" if row["uses_prompts"] else " *"), row["kind"], str(row["rows"]))
        share = with_interval(row["closed"].get("generated-mean"), percent=True)
        for kind in ("loss", "accuracy"):
            figures = [number(row["methods"].get(name, {}).get(kind)) for name in methods_of(group)]
            if any(figures):
                lines.append((*about, kind, *figures, share))
                about, share = ("", "", ""), ""
    return lines


def sentences_of(group: dict[str, Any]) -> list[str]:
    """What a group shows, in words."""
    found = []
    for kind, total in group["totals"].items():
        name = f"{total['datasets']} datasets" + ("" if kind == "all" else f" of {kind}")
        share = with_interval(total["closed"].get("generated-mean"), percent=True) or "no known share"
        closes = f"{name}: generated adapters close {share} of the loss from base to own"
        if right := with_interval(total["closed_accuracy"].get("generated-mean"), percent=True):
            closes += f", and {right} of the accuracy"
        if shares := [f"{100 * share:.0f} %" for share in total["closed_by_seed"].values()]:
            closes += f"; by seed {', '.join(shares)} of the loss"
        found += [closes, f"{name}: lower loss {_comparison(total, 'loss')}"]
        if total["mean_accuracy"]:
            found.append(f"{name}: higher accuracy {_comparison(total, 'accuracy')}")
    if without := group["totals"]["all"]["without_prompts"]:
        found.append(
            "* It is not shown that the prompts are used: with another dataset's prompts the adapters are not worse by "
            f"more than the interval on {', '.join(without)}"
        )
    return found


def _comparison(total: dict[str, Any], kind: str) -> str:
    """On how many datasets generated adapters are better, and worse, than each of what needs no generator."""
    each = ", ".join(
        f"{METHODS[name][1]} on {better} (worse on {total[f'worse_{kind}'][name]})"
        for name, better in total[f"better_{kind}"].items()
    )
    return f"than {each}, all of these on {total['better_than_all'][kind]}; by more than the interval"


def sections(saves: Path) -> list[dict[str, Any]]:
    """The benchmarks below saves/ as the report shows them: name, what was measured, tables, sentences, a picture.

    One that cannot be read has its `fault` alone.
    """
    found: list[dict[str, Any]] = []
    for path in sorted((saves / FOLDER).glob(f"*/{FILE}")):
        name = path.parent.name
        try:
            content = read(path)
            groups = _tables_of(content, path)
        except UserError as error:
            found.append({"name": name, "fault": str(error)})
            continue
        picture = path.with_name(PICTURE)
        image = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
        about = f"{content['base_model']}, rank {content['rank']}, {len(content['collections'])} collections"
        found.append({"name": name, "fault": "", "about": about, "groups": groups, "picture": image})
    return found


def _tables_of(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The groups of a benchmark as the report shows them. Raises UserError where their tables lack something."""
    try:
        return [
            {"name": group["name"], "head": head_of(group), "lines": lines_of(group), "sentences": sentences_of(group)}
            for group in content["groups"]
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise UserError(f"{paths.relative(path)}: its tables cannot be shown ({fault}); {WAY_OUT}") from None
