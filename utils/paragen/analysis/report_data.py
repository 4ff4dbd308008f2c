"""The data of the report's pictures, as plain JSON values: curves, scores, trajectories, heat maps, maps.

Every picture is a dict; its `label` describes it in words and numbers.
"""

import base64
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paragen.collection import evaluation, run_files
from paragen.collection.manifest import Manifest, ResumedPretrain, read_manifest
from paragen.common import paths
from paragen.common.cli import UserError

if TYPE_CHECKING:
    import numpy as np

CURVE_POINTS = 400  # the most points of a curve, besides those of the kept steps
HEAT_COLUMNS = 100  # the most columns of a heat map
MAP_POINTS = 3000  # the most points of the map, unless there are more collections


def curve(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The loss and the learning rate of a whole training: the logs of the pretrain, where it exists, and the finetune.

    Returns `lines`, a dict per phase with name, step, loss and rate (lists of numbers or None), `kept` (first and last
    kept step), `resumed` (step or None), `notes` (what is omitted, and why) and `label`. A run without a log has the
    figures of its manifest.
    """
    entries = manifest.checkpoints
    notes: list[str] = []
    kept = [entries[0].step, entries[-1].step]
    rows = read_log(folder / run_files.LOG, notes)
    if not rows:
        rows = [(entry.step, entry.loss, entry.learning_rate) for entry in entries]
    phases = {"finetune": rows}
    pretrain = manifest.pretrain
    if pretrain:
        before = folder.with_name(pretrain.run)
        if not (before / run_files.LOG).is_file():
            notes.append("the pretrain's log is not there any more")
        elif not is_same_pretrain(before, pretrain):
            notes.append(f"{before.name} is another pretrain by now, so it is not drawn")
        else:
            phases = {"pretrain": read_log(before / run_files.LOG, notes), **phases}
    lines = []
    for name, points in phases.items():
        lines.append({"name": name, **_columns(thinned(points, kept))})
    losses = [(step, loss) for points in phases.values() for step, loss, _ in points if loss is not None]
    if losses:
        label = (
            f"Loss from {losses[0][1]:#.3g} at step {losses[0][0]} to {losses[-1][1]:#.3g} at step {losses[-1][0]}; "
            f"steps {kept[0]} to {kept[1]} kept"
        )
    else:
        label = f"No loss was recorded; steps {kept[0]} to {kept[1]} kept"
    label += f"; resumed at step {pretrain.step}" if pretrain else ""
    return {
        "lines": lines if losses else [],
        "kept": kept,
        "resumed": pretrain and pretrain.step,
        "notes": notes,
        "label": label,
    }


def _columns(rows: list[tuple]) -> dict[str, list]:
    steps, losses, rates = zip(*rows, strict=True) if rows else ((), (), ())
    return {"step": list(steps), "loss": [short(loss) for loss in losses], "rate": [short(rate) for rate in rates]}


def is_same_pretrain(folder: Path, pretrain: ResumedPretrain) -> bool:
    """Whether a pretrain run folder's manifest lists the checkpoint that was resumed."""
    try:
        manifest = read_manifest(folder)
    except UserError:
        return False
    if manifest is None or pretrain.sha256 is None:
        return manifest is not None
    return any(entry.sha256 == pretrain.sha256 for entry in manifest.checkpoints)


def read_log(path: Path, notes: list[str]) -> list[tuple[int, float | None, float | None]]:
    """Step, loss and learning rate of each logged step of a trainer_log.jsonl; a note on unreadable lines is
    added to `notes`."""
    rows: list[tuple[int, float | None, float | None]] = []
    broken = 0
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row.get("loss") is not None:
                rows.append((int(row["current_steps"]), float(row["loss"]), _number(row.get("lr"))))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            broken += 1
    if broken:
        notes.append(f"{broken} lines of {path.parent.name}/{path.name} cannot be read")
    return rows


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def thinned(rows: list[tuple], kept: list[int]) -> list[tuple]:
    """Rows of a log, evenly thinned to CURVE_POINTS, with all rows of the kept steps."""
    stride = math.ceil(len(rows) / CURVE_POINTS)
    last = len(rows) - 1
    return [
        row for place, row in enumerate(rows) if place % stride == 0 or place == last or kept[0] <= row[0] <= kept[1]
    ]


def scores(shown: dict[str, Any], kept: int) -> dict[str, Any]:
    """The scores of a collection's checkpoints (of `kept` in all), or with the metric `loss` their test losses.

    Returns `step`, `value`, `low` and `high` (lists; the last two are the confidence interval, or None), `base` (a
    number or None), `best` (the place in the lists), `title`, `axis` and `label`; of these the last three alone where
    no figure is known.
    """
    is_loss = shown["metric"] == "loss"
    title = "Test loss" if is_loss else "Score"
    titles = {"title": title, "axis": "test loss per token" if is_loss else f"score ({shown['metric']})"}
    points = [(score["step"], *evaluation.figure_of(shown, score)) for score in shown["checkpoints"]]
    points = [point for point in points if point[1] is not None]
    if not points:
        return {**titles, "label": f"No figure of {shown['split']} is known"}
    base, _ = evaluation.figure_of(shown, shown["base"])
    steps, values, spans = zip(*points, strict=True)
    best_score = evaluation.best_of(shown)
    assert best_score is not None  # since there are points
    best = steps.index(best_score["step"])
    about = "the base model was not evaluated" if base is None else f"the base model {base:#.3g}"
    course = f"{values[0]:#.3g} at step {steps[0]}"
    if len(steps) > 1:
        course = (
            f"from {course} to {values[-1]:#.3g} at step {steps[-1]}, best {values[best]:#.3g} at step {steps[best]}"
        )
    label = (
        f"{title} {course}; {about}; {rows_of(shown)}, "
        f"{evaluation.METRICS[shown['metric']]}; {len(points)} of {kept} checkpoints evaluated"
    )
    label += ", with 95 % confidence intervals" if any(spans) else ""
    return {
        **titles,
        "step": list(steps),
        "value": [short(value) for value in values],
        "low": [short(span[0]) if span else None for span in spans],
        "high": [short(span[1]) if span else None for span in spans],
        "base": short(base),
        "best": best,
        "label": label,
    }


def scores_in_table(shown: dict[str, Any]) -> dict[str, Any]:
    """An evaluation in the table of collections: `metric`; `base`, `last` and `best`, numbers or None; `rows`, how many
    were scored; `marks`, what makes the scores incomparable with others: a text each."""
    whose = {"base": shown["base"], "last": shown["checkpoints"][-1], "best": evaluation.best_of(shown)}
    marks = [f"LIMIT={shown['limit']}"] if shown["limit"] is not None else []
    marks += [] if shown["paired"] else [f"rows of {shown['split']}"]
    figures = {key: evaluation.figure_of(shown, score)[0] for key, score in whose.items()}
    return {"metric": shown["metric"], **figures, "rows": shown["rows"], "marks": marks}


def rows_of(shown: dict[str, Any]) -> str:
    """The rows that an evaluation scored: `1,172 rows of ARC-c_test`, and whether they are all and of its dataset."""
    some = "" if shown["limit"] is None else "the first "
    limited = "" if shown["limit"] is None else f" (LIMIT={shown['limit']})"
    own = "" if shown["paired"] else ", not held out from its own dataset"
    return f"{some}{shown['rows']:,} rows of {shown['split']}{limited}{own}"


def short(value: float | None) -> float | None:
    """A number with the five digits that a picture can show; None for None and for a number that is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def principal(vectors: "np.ndarray") -> "tuple[np.ndarray, list[float], np.ndarray] | None":
    """The first two principal components of some vectors.

    Args:
        vectors: (n, d) numbers.

    Returns (coordinates, (n, 2); the shares of the variance that the two explain; the coordinates of the zero vector,
    (2,)), each component's largest coordinate positive, or None where all vectors are the same or one is not finite.
    """
    import numpy as np
    import scipy.linalg

    vectors = np.asarray(vectors, dtype=np.float64)
    count, width = vectors.shape
    if count < 2 or not np.isfinite(vectors).all():
        return None
    mean = vectors.mean(0)
    apart = vectors - mean
    total = float((apart**2).sum())
    if total <= 1e-20 * float((vectors**2).sum()):
        return None
    few = count <= width  # the smaller of the two Gram matrices has the same eigenvalues
    gram = apart @ apart.T if few else apart.T @ apart
    values, found = scipy.linalg.eigh(gram, subset_by_index=[max(0, len(gram) - 2), len(gram) - 1])
    places, zero, shares = np.zeros((count, 2)), np.zeros(2), [0.0, 0.0]
    for number, place in enumerate(range(len(values) - 1, -1, -1)):
        if values[place] <= 1e-12 * total:
            break  # only rounding error: there is no such component
        direction = apart.T @ found[:, place] / values[place] ** 0.5 if few else found[:, place]
        column = apart @ direction
        sign = 1.0 if column[np.abs(column).argmax()] >= 0 else -1.0
        places[:, number], zero[number] = sign * column, -sign * float(mean @ direction)
        shares[number] = float(values[place]) / total
    return places, shares, zero


def trajectory(steps: "np.ndarray", sketch: "np.ndarray") -> dict[str, Any]:
    """One collection's steps in the first two principal components of its updates.

    Args:
        steps: (n,) the checkpoints' steps.
        sketch: (n, d) their updates, sketched.
    """
    found = principal(sketch)
    if found is None:
        why = "one checkpoint alone has no trajectory" if len(steps) < 2 else "the checkpoints do not differ"
        return {"label": f"No trajectory: {why}"}
    places, shares, _ = found
    return {
        "step": [int(step) for step in steps],
        "x": [short(value) for value in places[:, 0]],
        "y": [short(value) for value in places[:, 1]],
        "share": [short(share) for share in shares],
        "label": f"{len(steps)} checkpoints from step {int(steps[0])} to {int(steps[-1])}; the first two principal "
        f"components hold {percent(shares[0])} and {percent(shares[1])} of the variance",
    }


def percent(share: float) -> str:
    """A share as a text that is not broken over lines: `71 %`, `0.4 %`."""
    return f"{100 * share:.0f}\u00a0%" if share >= 0.0995 else f"{100 * share:.2g}\u00a0%"


def heat(layers: list[str], steps: "np.ndarray", change: "np.ndarray") -> dict[str, Any]:
    """How much each layer changes at each step, on a logarithmic scale in 254 shades.

    Args:
        layers: the names of the l layers, as pictures show them.
        steps: (n,) the checkpoints' steps.
        change: (l, n) each layer's change since the step before, relative to its update; NaN where it is not known.

    Returns `layers` (grouped by kind, a kind's layers in order), `groups` ([kind, layers of it]), `steps` (the first of
    each column), `width` (steps in a column), `shades` (base64 of l x columns bytes: 0 none, 1 no change, 2 to 255 from
    `low` to `high` in log10) and `label`.
    """
    import numpy as np

    order, groups = grouped(layers)
    change = np.asarray(change, dtype=np.float64)[order]
    known = np.isfinite(change).any(axis=0)
    change, steps = change[:, known], np.asarray(steps)[known]
    if not (change > 0).any():
        return {"label": "No change per step: " + ("all steps are equal" if change.size else "one checkpoint alone")}
    names = [layers[place] for place in order]
    row, column = np.unravel_index(np.nanargmax(change), change.shape)
    label = (
        f"Change of {len(names)} layers per step, relative to their updates, over {change.shape[1]} steps: median "
        f"{np.nanmedian(change):.2g}, largest {change[row, column]:.2g} at step {int(steps[column])} in {names[row]}"
    )
    width = math.ceil(change.shape[1] / HEAT_COLUMNS)
    starts = np.arange(0, change.shape[1], width)
    counts = np.add.reduceat(np.isfinite(change), starts, axis=1)
    sums = np.add.reduceat(np.nan_to_num(change, nan=0.0, posinf=0.0, neginf=0.0), starts, axis=1)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    positive = means > 0
    logs = np.log10(means, out=np.full(means.shape, np.nan), where=positive)
    low, high = float(np.nanmin(logs)), float(np.nanmax(logs))
    shades = np.where(means == 0, 1, 0)
    shades[positive] = np.rint(2 + 253 * (logs[positive] - low) / ((high - low) or 1.0))
    return {
        "layers": names,
        "groups": groups,
        "steps": [int(step) for step in steps[starts]],
        "width": width,
        "shades": base64.b64encode(shades.astype(np.uint8).tobytes()).decode(),
        "low": short(low),
        "high": short(high),
        "label": label,
    }


def grouped(layers: list[str]) -> tuple[list[int], list[list]]:
    """Groups layers of the same kind: (the layers' numbers in grouped order, [kind, number of layers] of each kind).

    A kind is a name without its numbers, shortened to the last parts that distinguish it from the other kinds.
    """
    bare = [re.sub(r"\.+", ".", re.sub(r"(^|\.)\d+(?=\.|$)", r"\1", name)).strip(".") for name in layers]
    kinds = list(dict.fromkeys(bare))
    counts = Counter(bare)
    order = sorted(range(len(layers)), key=lambda place: kinds.index(bare[place]))
    return order, [[_short_kind(kind, kinds), counts[kind]] for kind in kinds]


def _short_kind(kind: str, kinds: list[str]) -> str:
    parts = kind.split(".")
    for count in range(1, len(parts)):
        ending = ".".join(parts[-count:])
        if sum(other == ending or other.endswith("." + ending) for other in kinds) == 1:
            return ending
    return kind


def chosen_places(count: int, total: int, limit: int = MAP_POINTS) -> list[int]:
    """The numbers of a collection's `count` checkpoints that the map shows, evenly spaced and always with the last.

    All collections have `total` checkpoints. Each has at least one point, so more than `limit` collections have more
    than `limit` points.
    """
    if total <= limit:
        return list(range(count))
    number = max(1, count * limit // total)
    return sorted({count - 1 - round(place * count / number) for place in range(number)})


def panel(base_model: str, points: list[tuple[int, int]], sketch: "np.ndarray", total: int) -> dict[str, Any]:
    """The map of the checkpoints of one base model.

    Args:
        base_model: its name.
        points: for each checkpoint, (its collection's number in the report, its step).
        sketch: (n, d) the updates, sketched.
        total: the number of that model's checkpoints, shown or not.
    """
    found = principal(sketch)
    owners = sorted({owner for owner, _ in points})
    counted = f"{len(points):,} of {total:,} checkpoints" if len(points) < total else f"{total:,} checkpoints"
    summary = f"{base_model}: {counted} of {len(owners)} collection{'s' if len(owners) > 1 else ''}"
    if found is None:
        return {"name": base_model, "label": f"{summary}; they do not differ, so there is no map"}
    places, shares, zero = found
    return {
        "name": base_model,
        "owner": [owner for owner, _ in points],
        "step": [step for _, step in points],
        "x": [short(value) for value in places[:, 0]],
        "y": [short(value) for value in places[:, 1]],
        "zero": [short(value) for value in zero],
        "share": [short(share) for share in shares],
        "label": f"{summary}; the first two principal components hold {percent(shares[0])} and {percent(shares[1])} "
        "of the variance",
    }


def in_order(row: dict[str, Any]) -> tuple:
    """A sort key for rows of tables: category, dataset, model, rank, seed and name; numbers in names as numbers, and
    what is not known first."""
    names = tuple(_natural(row[key]) for key in ("category", "dataset", "model"))
    numbers = tuple(-1 if row.get(key) is None else row[key] for key in ("rank", "seed"))
    return (*names, *numbers, _natural(row.get("name", "")))


def _natural(text: str) -> list[str | int]:
    parts = re.split(r"([0-9]+)", text.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def megabytes(size: float) -> str:
    """Bytes as a text in MB with sensible digits: `9.8`, `157`, `12,345`."""
    value = size / 1e6
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


def without_places(text: str, saves: Path) -> str:
    """A message without this machine's absolute paths."""
    for top in sorted({saves.absolute().parent, saves.resolve().parent, paths.ROOT}, key=lambda top: -len(str(top))):
        text = text.replace(f"{top}/", "")
    home = os.path.expanduser("~")
    if os.path.isabs(home) and home != "/":
        text = re.sub(rf"(?<!\w){re.escape(home)}/", "~/", text)  # not /data/home/me/, where it is /home/me
    return text
