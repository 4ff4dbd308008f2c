"""The report: one page about all collections, saves/report/index.html, which opens from disk without a network.

Reads recipes, manifests, logs and the statistics of each collection (report_statistics.py makes missing ones); writes
the index, the statistics and the page. A broken collection is marked on the page and named on stderr.
"""

import base64
import datetime
import hashlib
import json
import os
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from paragen.analysis import benchmark_page, report_cells, report_data, report_statistics
from paragen.collection import checkpoints, derived, evaluation, index, quality_warnings, selection
from paragen.collection.manifest import require_manifest
from paragen.common import files, locks, paths
from paragen.common.cli import UserError
from paragen.model import base_models

TEMPLATE, SCRIPT = "report.html", "report.js"
NO_FAULTS = (checkpoints.UnsupportedAdapter, derived.NotReplaceable)  # of a collection without statistics
STATES = ("complete", "stale", "broken", "collecting", "pretrained", "missing")


def make(saves: Path | None = None) -> tuple[Path, int]:
    """Gather the facts, render the page and write it atomically below `saves`.

    Returns its path and how many collections are broken: a line on stderr names each.
    """
    saves = saves or paths.SAVES
    facts = gather(saves)
    for fault in facts["faults"]:
        print(f"FAULTY {fault}", file=sys.stderr, flush=True)
    path = page_of(saves)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, render(facts).encode(errors="replace"))  # a folder's name may be no UTF-8
    return path, len(facts["faults"])


def page_of(saves: Path | None = None) -> Path:
    """The page's path."""
    return (saves or paths.SAVES) / "report" / "index.html"


def gather(saves: Path) -> dict[str, Any]:
    """All facts of the page, as plain values, of the collections and cells that CATEGORY, DATASET, MODEL, RANK and SEED
    select (unset ones select all).

    Returns `collections` (a dict each: its row of the table, and `pictures`), `pairs` (the rows of the grid: a recipe
    pair and its cells by rank), `no_pairs` (why there are none), `ranks`, `map` (a panel per base model), `totals`,
    `balance` (a sentence on collections and cells), `benchmarks` (those of generators), `selection` (the settings and
    how many collections there are in all, or None), `faults` (lines).

    Raises UserError for a name that no collection has, and where none is selected.
    """
    wanted = selection.requested_filters()
    table, faults = index.update(saves)
    whole = index.selected(table, wanted, faults)
    broken = {name for name in faults if selection.may_fit(selection.place_of(name), wanted)}
    names = sorted(broken.union(whole["collection"].to_pylist()))
    if any(wanted.values()) and not names:
        raise selection.none_fits(saves, wanted)
    states, no_pairs = report_cells.states_of([saves / name for name in names], wanted)
    cells = {one.folder: (one.state, one.reason) for one in states if one.folder}
    outside = ("complete", "" if no_pairs else report_cells.OUTSIDE)
    copies = copies_of(saves, names)
    chosen = chosen_of(saves, [name for name in names if name not in faults], faults)
    without = report_statistics.make_missing(list(chosen.values()), saves / "stats")
    rows = []
    for name in names:
        cell = next((cells[place] for place in copies[name].values() if place in cells), outside)
        row = row_of(saves, name, cell, chosen.get(name) or faults[name], without.get(name), whole.num_rows)
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
        "benchmarks": benchmark_page.sections(saves),
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


def chosen_of(saves: Path, names: list[str], faults: dict[str, str]) -> dict[str, index.Chosen]:
    """The collections by name; of one that cannot be read, why is added to `faults`."""
    found = {}
    for name in names:
        try:
            found[name] = index.Chosen(name, saves / name, require_manifest(saves / name))
        except UserError as error:
            faults[name] = str(error)
    return found


def row_of(
    saves: Path, name: str, cell: tuple[str, str], found: index.Chosen | str, without: UserError | None, total: int
) -> dict[str, Any]:
    """The row and the pictures of one collection, whole or broken.

    Args:
        saves: the folder that `name` is relative to.
        name: the collection.
        cell: the state and the reason of its cell.
        found: the collection, or why it is not in the index.
        without: why it has no statistics; None where it has.
        total: the number of checkpoints of all selected collections.
    """
    fault = found if isinstance(found, str) else ""
    if isinstance(found, index.Chosen):
        try:
            return described(saves, found, *cell, without, total)
        except UserError as error:
            fault = str(error)
    return described_broken(saves, name, fault)


def described(
    saves: Path, one: index.Chosen, state: str, reason: str, without: UserError | None, total: int
) -> dict[str, Any]:
    """The row and the pictures of one collection; all collections have `total` checkpoints.

    `sketch` is (steps, sketches) of the checkpoints that the map shows, or None. Raises UserError where its files are
    not as recorded.
    """
    name, folder, manifest = one
    entries, base_model = manifest.checkpoints, manifest.base_name
    losses = [entry.loss for entry in entries if entry.loss is not None]
    pictures: dict[str, Any] = {"curve": report_data.curve(folder, manifest)}
    shown = None
    evaluated = evaluation.shown(evaluation.read(folder, manifest))
    if evaluated:
        pictures["scores"] = report_data.scores(evaluated, len(entries))
    if without is None:
        base_model, layers, steps, sketch, change = report_statistics.read(saves / "stats" / name)
        pictures["trajectory"] = report_data.trajectory(steps, sketch)
        pictures["heat"] = report_data.heat([checkpoints.short_layer(layer) for layer in layers], steps, change)
        places = report_data.chosen_places(len(steps), total)
        shown = steps[places], sketch[places]
    elif isinstance(without, NO_FAULTS) or str(without) == report_statistics.NOT_MADE:
        pictures["none"] = report_data.without_places(str(without), saves)
    else:
        raise without
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


def named(name: str) -> dict[str, Any]:
    """The facts that a collection's path alone gives."""
    parts = name.split("/")
    rank, seed = paths.rank_in(name) or (None, None)
    return {
        "name": name,
        "href": "../" + urllib.parse.quote(os.fsencode(name)) + "/",
        "anchor": urllib.parse.quote(name, errors="replace"),
        "category": parts[0] if len(parts) > 2 else "?",
        "dataset": parts[-2] if len(parts) > 1 else "?",
        "model": selection.place_of(name).model or parts[-1].split("_lora-rank_")[0],
        "rank": rank,
        "seed": seed,
    }


def described_broken(saves: Path, name: str, fault: str) -> dict[str, Any]:
    """The row of a folder that is not a whole collection, or not yet."""
    folder = saves / name
    running = locks.is_held(files.beside(folder, "lock"))
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
        methods=benchmark_page.METHODS.values(),
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
