"""The benchmark's picture: what each method reaches per dataset or family, or over the number of variants."""

import io
from pathlib import Path
from typing import Any

from paragen.analysis.benchmark_page import METHODS, methods_of
from paragen.common import files

MARKS = {"base": "x", "mean": "s", "nearest": "^", "weighted": "D", "generated-mean": "o", "own": "*", "union": "v",
         "few": "P", "context": "h", "swapped-mean": "1"}  # fmt: skip
FARTHEST = 1.5  # share closed, either way, that is shown
MOST_ROWS = 40  # datasets that have a line each; of more, each family has one, of means without intervals


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw a benchmark.json's content as a PNG file, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = content["groups"]
    if len(groups) > 1:
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        _course(figure, groups)
    else:
        rows = rows_of(groups[0])
        figure = Figure(figsize=(10, 2 + 0.3 * len(rows)), layout="constrained")
        _datasets(figure, groups[0], rows)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    files.write_atomically(path, image.getvalue())


def rows_of(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a group: its datasets, or its families where there are more than MOST_ROWS datasets."""
    rows = group["rows"]
    if len(rows) <= MOST_ROWS:
        return rows
    names = dict.fromkeys(row["family"] for row in rows)
    return [_mean_row(name, [row for row in rows if row["family"] == name]) for name in names]


def _mean_row(family: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A family's line: the means over its datasets of what they all have."""
    methods: dict[str, dict[str, Any]] = {}
    for method in rows[0]["methods"]:
        for kind in ("loss", "accuracy"):
            found = [row["methods"].get(method, {}).get(kind) for row in rows]
            values = [one["value"] for one in found if one and one["value"] is not None]
            if len(values) == len(rows):
                mean = sum(values) / len(values)
                methods.setdefault(method, {})[kind] = {"value": mean, "interval": [mean, mean]}
    return {"dataset": f"{family} ({len(rows)})", "methods": methods}


def _datasets(figure: Any, group: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A line per row with a mark per method: the loss, and the accuracy where answers are scored."""
    kinds = ["loss", *(["accuracy"] if any("accuracy" in row["methods"].get("base", {}) for row in rows) else [])]
    for place, kind in enumerate(kinds, 1):
        axes = figure.add_subplot(1, len(kinds), place)
        for method in [name for name in methods_of(group) if name in MARKS]:
            found = [(at, row["methods"].get(method, {}).get(kind)) for at, row in enumerate(rows)]
            points = [(one["value"], at, one["interval"]) for at, one in found if one and one["value"] is not None]
            if points:
                values, places, spans = zip(*points, strict=True)
                errors = [[v - s[0] for v, s in zip(values, spans, strict=True)],
                          [s[1] - v for v, s in zip(values, spans, strict=True)]]  # fmt: skip
                errors = [[max(0.0, one) for one in side] for side in errors]
                label = f"{METHODS[method][0]} {METHODS[method][1]}"
                axes.errorbar(values, places, xerr=errors, fmt=MARKS[method], label=label, elinewidth=0.6, markersize=5)
        names = [row["dataset"] for row in rows] if place == 1 else [""] * len(rows)
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.set_xlabel("loss per token of the right response, nats" if kind == "loss" else "share of right answers")
        axes.grid(alpha=0.3)
        if kind == "loss":
            axes.set_xscale("log")
        else:
            axes.set_xlim(-0.03, 1.03)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")


def _course(figure: Any, groups: list[dict[str, Any]]) -> None:
    """The mean loss and accuracy of each method over the groups, and the share that generated adapters close."""
    names = [group["name"].split(" ")[0] for group in groups]
    kinds = ("mean_loss", "mean_accuracy", "closed")
    titles = ("mean loss per token, nats", "mean share of right answers", "share closed by generated adapters")
    for place, (kind, title) in enumerate(zip(kinds, titles, strict=True), 1):
        axes = figure.add_subplot(1, 3, place)
        totals = [group["totals"]["all"] for group in groups]
        if kind == "closed":
            for key, label in (("closed", "of the loss"), ("closed_accuracy", "of the accuracy")):
                found = [(at, total[key].get("generated-mean")) for at, total in enumerate(totals)]
                points = [(at, one) for at, one in found if one and one["value"] is not None]
                if points:
                    values = [one["value"] for _, one in points]
                    errors = [[max(0.0, one["value"] - one["interval"][0]) for _, one in points],
                              [max(0.0, one["interval"][1] - one["value"]) for _, one in points]]  # fmt: skip
                    axes.errorbar([at for at, _ in points], values, yerr=errors, fmt="o-", label=label, capsize=3)
                    axes.legend(fontsize="small", loc="upper left")
            axes.set_ylim(max(axes.get_ylim()[0], -FARTHEST), min(axes.get_ylim()[1], FARTHEST))
        else:
            for method, mark in MARKS.items():
                points = [(at, total[kind][method]) for at, total in enumerate(totals) if method in total[kind]]
                if points:
                    label = f"{METHODS[method][0]} {METHODS[method][1]}"
                    axes.plot(*zip(*points, strict=True), f"{mark}-", label=label, linewidth=0.8)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("variants of each family to train on")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    methods = figure.axes[0].get_legend_handles_labels()
    figure.legend(*methods, loc="outside lower center", ncols=len(methods[0]), fontsize="small")
