"""The report: one page about all collections, saves/report/index.html, which opens from disk without a network.

Reads recipes, manifests, logs and the statistics of each collection (measured where they are missing); writes the
index, the statistics and the page. A broken collection is marked on the page and named on stderr.
"""

import base64
import datetime
import hashlib
import json
import sys
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paragen.analysis import report_cells, report_data
from paragen.collection import checkpoints, evaluation, index, quality_warnings, selection
from paragen.collection.manifest import read_manifest
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.model import base_models

if TYPE_CHECKING:
    import numpy as np

TEMPLATE, SCRIPT = "report.html", "report.js"
STATES = ("complete", "stale", "broken", "collecting", "pretrained", "missing")


def make(saves: Path | None = None) -> Path:
    """Gather the facts, render the page and write it atomically below `saves`; returns its path."""
    saves = saves or paths.SAVES
    facts = gather(saves)
    for fault in facts["faults"]:
        print(f"FAULTY {fault}", file=sys.stderr, flush=True)
    path = page_of(saves)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, render(facts).encode())
    return path


def page_of(saves: Path | None = None) -> Path:
    """The page's path."""
    return (saves or paths.SAVES) / "report" / "index.html"


def gather(saves: Path) -> dict[str, Any]:
    """All facts of the page, as plain values, of the collections and cells that CATEGORY, DATASET, MODEL, RANK and SEED
    select (unset ones select all).

    Returns `collections` (a dict each: its row of the table, and `pictures`), `pairs` (the rows of the grid: a recipe
    pair and its cells by rank), `no_pairs` (why there are none), `ranks`, `map` (a panel per base model), `totals`,
    `balance` (a sentence on collections and cells), `selection` (the settings and how many collections there are in
    all, or None), `faults` (lines).

    Raises UserError for a name that no collection has, and where none is selected.
    """
    wanted = selection.requested_filters()
    table, faults = index.update(saves)
    whole = index.selected(table, wanted, faults)
    broken = {name for name in faults if selection.may_fit(selection.place_of(name), wanted)}
    names = sorted(broken.union(whole["collection"].to_pylist()))
    if any(wanted.values()) and not names:
        raise index.none_fits(saves, wanted)
    states, no_pairs = report_cells.states_of([saves / name for name in names], wanted)
    cells = {one.folder: (one.state, one.reason) for one in states if one.folder}
    outside = ("complete", "" if no_pairs else report_cells.OUTSIDE)
    copies = copies_of(saves, names)
    rows = []
    for name in names:
        cell = next((cells[place] for place in copies[name].values() if place in cells), outside)
        row = row_of(saves, name, cell, faults.get(name), whole.num_rows)
        notes = [f"saves/{copy} is a second copy of it" for copy in copies[name] if copy != name]
        row["reason"] = "; ".join(filter(None, [row["reason"], *notes]))
        rows.append(row)
    found = [{"id": number, **row} for number, row in enumerate(sorted(rows, key=report_data.in_order))]
    pairs = report_cells.grid(states, {place: row for row in found for place in copies[row["name"]].values()})
    given = selection.settings_of(wanted)
    everything = len(faults.keys() | set(table["collection"].to_pylist()))
    return {
        "collections": found,
        "pairs": pairs,
        "no_pairs": no_pairs,
        "ranks": sorted({rank for pair in pairs for rank in pair["cells"]}),
        "map": checkpoint_map(found),
        "totals": totals(found, pairs),
        "balance": report_cells.balance(found, pairs),
        "selection": {"settings": given, "of": everything} if given else None,
        "faults": [row["reason"] for row in found if row["state"] == "broken"],
    }


def copies_of(saves: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """For each collection, the real paths of it and of its second copies, which the index leaves out, by name."""
    copies = {name: {name: report_cells.real_place(saves / name)} for name in names}
    for copy, kept in sorted(index.copies_in(saves).items()):
        place = report_cells.real_place(saves / copy)
        if kept in copies and place not in copies[kept].values():  # a link to the collection is no second copy
            copies[kept][copy] = place
    return copies


def row_of(saves: Path, name: str, cell: tuple[str, str], fault: str | None, total: int) -> dict[str, Any]:
    """The row and the pictures of one collection, whole or broken.

    Args:
        saves: the folder that `name` is relative to.
        name: the collection.
        cell: the state and the reason of its cell.
        fault: why it is not in the index, None where it is.
        total: the number of checkpoints of all selected collections.
    """
    if fault is None:
        try:
            return described(saves, name, *cell, total)
        except UserError as error:
            fault = str(error)
    return described_broken(saves, name, fault)


def described(saves: Path, name: str, state: str, reason: str, total: int) -> dict[str, Any]:
    """The row and the pictures of one collection; all collections have `total` checkpoints.

    `sketch` is (steps, sketches) of the checkpoints that the map shows, or None. Raises UserError where its manifest or
    its files are not as recorded.
    """
    folder = saves / name
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{paths.relative(folder)}: is gone")
    entries, base_model = manifest.checkpoints, manifest.base_name
    losses = [entry.loss for entry in entries if entry.loss is not None]
    pictures: dict[str, Any] = {"curve": report_data.curve(folder, manifest)}
    shown = None
    evaluated = evaluation.shown(evaluation.read(folder, manifest))
    if evaluated:
        pictures["scores"] = report_data.scores(evaluated, len(entries))
    try:
        base_model, layers, steps, sketch, change = statistics(index.Chosen(name, folder, manifest))
        pictures["trajectory"] = report_data.trajectory(steps, sketch)
        pictures["heat"] = report_data.heat([checkpoints.short_layer(layer) for layer in layers], steps, change)
        places = report_data.chosen_places(len(steps), total)
        shown = steps[places], sketch[places]
    except UserError as error:
        for entry in entries:  # raises if a file differs; otherwise the kind of adapter is not supported
            checkpoints.verified(folder / entry.file_name, entry.bytes, entry.sha256)
        pictures["none"] = report_data.without_places(str(error), saves)
    return {
        **named(name),
        "category": manifest.category or named(name)["category"],
        "dataset": manifest.dataset,
        "model": base_models.short_name(Path(base_model)) if base_model else "?",
        "base_model": base_model or "unknown base model",
        "rank": manifest.rank,
        "seed": manifest.seed,
        "state": state,
        "reason": report_data.without_places(reason, saves),
        "kept": len(entries),
        "first": entries[0].step,
        "last": entries[-1].step,
        "loss": sum(losses) / len(losses) if losses else None,
        "scores": report_data.scores_in_table(evaluated) if evaluated else None,
        "bytes": sum(entry.bytes for entry in entries),
        "each": entries[0].bytes,
        "file": json.dumps(f"saves/{name}/{entries[-1].file_name}", ensure_ascii=False),
        "rows": manifest.trained_rows,
        "device": manifest.device,
        "precision": manifest.precision,
        "data_warnings": quality_warnings.about_data(manifest),
        "pictures": pictures,
        "sketch": shown,
    }


def statistics(chosen: index.Chosen) -> "tuple[str, list[str], np.ndarray, np.ndarray, np.ndarray]":
    """The statistics of a collection that the pictures show, measured unless they are up to date.

    Returns the base model's name, layers (names), steps (n,), sketches (n, d), and changes (layers, n): the norm of
    each layer's update less the one of the step before, over the norm of the update; NaN at the first step.
    """
    import numpy as np
    from safetensors.numpy import load_file

    from paragen.analysis import measures

    folder = measures.measured_folder(chosen, quiet=True)
    tensors = load_file(folder / "steps.safetensors")
    about = json.loads((folder / "stats.json").read_bytes())
    change, norm = (tensors[name].astype(np.float64) for name in ("change", "norm"))
    relative = np.divide(change, norm, out=np.full(change.shape, np.nan), where=norm > 0)
    relative[:, 0] = np.nan
    return about["base_model"], about["layers"], tensors["steps"], tensors["sketch"], relative


def named(name: str) -> dict[str, Any]:
    """The facts that a collection's path alone gives."""
    parts = name.split("/")
    rank, seed = paths.rank_in(name) or (None, None)
    return {
        "name": name,
        "href": "../" + urllib.parse.quote(name) + "/",
        "anchor": urllib.parse.quote(name),
        "category": parts[0] if len(parts) > 2 else "?",
        "dataset": parts[-2] if len(parts) > 1 else "?",
        "model": selection.place_of(name).model or parts[-1].split("_lora-rank_")[0],
        "rank": rank,
        "seed": seed,
    }


def described_broken(saves: Path, name: str, fault: str) -> dict[str, Any]:
    """The row of a folder that is not a whole collection, or not yet."""
    folder = saves / name
    running = files.is_held(files.beside(folder, "lock"))
    found = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return {
        **named(name),
        "base_model": None,
        "state": "collecting" if running else "broken",
        "reason": "is being made now" if running else report_data.without_places(fault, saves),
        "kept": None,
        "first": None,
        "last": None,
        "loss": None,
        "scores": None,
        "bytes": files.size_of(found),
        "pictures": {},
        "sketch": None,
    }


def checkpoint_map(found: list[dict]) -> list[dict[str, Any]]:
    """A panel per base model: its checkpoints in their first two principal components."""
    import numpy as np

    held = [row for row in found if row["sketch"] is not None]
    panels = []
    for base_model in dict.fromkeys(row["base_model"] for row in held):
        rows = [row for row in held if row["base_model"] == base_model]
        points = [(row["id"], int(step)) for row in rows for step in row["sketch"][0]]
        sketch = np.concatenate([row["sketch"][1] for row in rows])
        panels.append(report_data.panel(base_model, points, sketch, sum(row["kept"] for row in rows)))
    return panels


def totals(found: list[dict], pairs: list[dict]) -> list[tuple[str, str]]:
    """The headline figures: (figure, label)."""
    whole = [row for row in found if row["kept"]]
    states = [cell["state"] for pair in pairs for cell in pair["cells"].values()]
    size = sum(row["bytes"] for row in whole)
    figures = [
        (len(whole), "collection"),
        (sum(row["kept"] for row in whole), "checkpoint"),
        (len({row["dataset"] for row in whole}), "dataset"),
        (len({row["base_model"] for row in whole}), "base model"),
    ]
    return [
        *((f"{count:,}", what + ("" if count == 1 else "s")) for count, what in figures),
        (f"{size / 1e9:.1f}" if size >= 9.5e8 else report_data.megabytes(size), "GB" if size >= 9.5e8 else "MB"),
        (f"{states.count('complete'):,} of {len(states):,}", "cells complete"),
        *((str(count), "broken") for count in [sum(row["state"] == "broken" for row in found)] if count),
    ]


def render(facts: dict[str, Any]) -> str:
    """The page as one text. No value in `facts` can become markup or script."""
    import jinja2
    import markupsafe
    import plotly.offline

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"megabytes": report_data.megabytes, "data": as_data, "digits": digits}
    scripts = [plotly.offline.get_plotlyjs(), (here / SCRIPT).read_text(encoding="utf-8")]
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    return environment.get_template(TEMPLATE).render(
        **facts,
        evaluated=any(row["scores"] for row in facts["collections"]),
        states=[state for state in STATES if any(row["state"] == state for row in facts["collections"])],
        labels=[{key: row[key] for key in ("dataset", "model", "rank")} for row in facts["collections"]],
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        scripts=[markupsafe.Markup(text) for text in scripts],
        policy=" ".join(f"'sha256-{value}'" for value in hashes),
    )


def as_data(value: Any) -> Any:
    """A value as JSON for a <script type="application/json">, escaped so that no text in it can end the script."""
    import markupsafe

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(text)


def digits(value: float | None) -> str:
    """A loss or a rate as a table shows it."""
    return "" if value is None else f"{value:#.4g}"
