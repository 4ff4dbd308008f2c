"""The benchmark's table from the parts that were measured: figures, paired differences, the share that is closed."""

import zlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from paragen.analysis import benchmark_page
from paragen.analysis.benchmark_page import METHODS
from paragen.benchmark import bootstrap
from paragen.benchmark.bootstrap import Figure, figure
from paragen.benchmark.plan import Plan
from paragen.collection.manifest import sealed
from paragen.generator.options import deciding
from paragen.scoring.answers import CONFIDENCE

GENERATED, SWAPPED = "generated-mean", "swapped-mean"
RIVALS = ("mean", "nearest", "weighted")  # what a generator has to be better than


class Measured:
    """One dataset's rows in one table, and the draws of its intervals.

    Args:
        parts: what parts of the benchmark hold on the dataset; their runs of one method are averaged row by row.
        family: the dataset's; those of one family are drawn together in intervals of totals.
    """

    def __init__(self, parts: Sequence[dict[str, Any]], family: str):
        first, self.family = parts[0], family
        self.dataset, self.metric, self.chance = first["dataset"], first["metric"], first["chance"]
        self.facts = [part["facts"] for part in parts]
        self.weights = bootstrap.draws_of(first["clusters"], zlib.crc32(self.dataset.encode()))  # its own draws
        self.runs: dict[str, list[dict[str, Any]]] = {}
        for part in parts:
            for method, runs in part["methods"].items():
                self.runs.setdefault(method, []).extend(runs)
        self.tokens = np.asarray(self.runs["base"][0]["tokens"], dtype=np.float64)

    def loss(self, method: str, seed: str = "") -> np.ndarray:
        """The mean loss per token in each draw, nats; of a method with several runs with a `seed` those of it alone."""
        runs = [run for run in self.runs[method] if seed in ("", run.get("run"))]
        sums = np.mean([run["losses"] for run in runs], axis=0)
        counts = np.mean([run["tokens"] for run in runs], axis=0)
        return bootstrap.ratio(self.weights, sums, counts)

    def accuracy(self, method: str) -> np.ndarray | None:
        """The share of right answers in each draw; None where the metric is the loss."""
        if self.metric == "loss":
            return None
        right = np.mean([run["right"] for run in self.runs[method]], axis=0)
        return bootstrap.ratio(self.weights, right, np.ones_like(right))

    @property
    def is_form(self) -> bool:
        """Whether the dataset's own adapter learned the form of an answer alone: its accuracy is that of always giving
        the most frequent answer."""
        own = self.accuracy("own")
        if own is None or self.metric != "choice":
            return False
        interval = figure(own)["interval"]
        return interval is None or interval[0] <= self.chance

    def row(self) -> dict[str, Any]:
        """The dataset's row of the table."""
        figures: dict[str, dict[str, Figure]] = {}
        for method in METHODS:
            if method in self.runs:
                right = self.accuracy(method)
                figures[method] = {"loss": figure(self.loss(method))}
                figures[method] |= {} if right is None else {"accuracy": figure(right)}
        made = self.loss(GENERATED)
        differences = {
            name: figure(made - self.loss(name)) for name in (*RIVALS, "own", "union", "few", "context", SWAPPED)
            if name in self.runs
        }  # fmt: skip
        right = self.accuracy(GENERATED)
        more_right = {
            name: figure(right - other) for name in differences
            if right is not None and (other := self.accuracy(name)) is not None
        }  # fmt: skip
        return {
            "dataset": self.dataset, "family": self.family, "metric": self.metric,
            "kind": "form" if self.is_form else "skill",
            "rows": len(self.tokens), "chance": self.chance, "methods": figures, "loss_difference": differences,
            "accuracy_difference": more_right,
            "closed": {name: closed([self], name) for name in (*RIVALS, GENERATED) if name in self.runs},
            "uses_prompts": uses_prompts(differences[SWAPPED], more_right.get(SWAPPED)),
            "seeds": self.by_seed(), "facts": self.facts,
        }  # fmt: skip

    def by_seed(self) -> dict[str, dict[str, float | None]]:
        """The loss and the accuracy of each generator's mean of samples."""
        found = {}
        for run in self.runs[GENERATED]:
            right = float(np.mean(run["right"])) if run["right"] else None
            found[run["run"]] = {"loss": sum(run["losses"]) / sum(run["tokens"]), "accuracy": right}
        return found


def uses_prompts(loss: Figure, accuracy: Figure | None) -> bool:
    """Whether a generator does better with a dataset's own prompts than with another one's, by more than the interval.

    Args:
        loss: its loss less the one with other prompts.
        accuracy: the same of its accuracy, where there is one.
    """
    better = accuracy is not None and accuracy["interval"] is not None and accuracy["interval"][0] > 0
    return bootstrap.is_below_zero(loss) or better


def closed(measured: Sequence[Measured], method: str, kind: str = "loss") -> Figure:
    """The share of the distance from base to own that a method closes, as a ratio of sums over datasets.

    Args:
        measured: the datasets; of several families these are drawn, too, and of several datasets of one family those.
        method: which.
        kind: `loss` or `accuracy`.

    It is not known where own is better than base in less than 97.5 % of the draws.
    """
    gained, possible, families = [], [], []
    for one in measured:
        base, own, found = ((one.loss if kind == "loss" else one.accuracy)(name) for name in ("base", "own", method))
        if base is not None and own is not None and found is not None:
            sign = -1 if kind == "loss" else 1  # less of the one is better, and more of the other
            gained.append(sign * (found - base))
            possible.append(sign * (own - base))
            families.append(one.family)
    if not gained:
        return {"value": None, "interval": None}
    several = [*dict.fromkeys(families)]
    clusters = [several.index(family) for family in families] if len(several) > 1 else [*range(len(gained))]
    weights = np.ones((bootstrap.DRAWS + 1, 1)) if len(gained) == 1 else bootstrap.draws_of(clusters, 1)
    distance = (weights * np.stack(possible, 1)).sum(1)
    if np.mean(distance[1:] <= 0) > (1 - CONFIDENCE) / 2:
        return {"value": None, "interval": None}  # own is not surely better than base, so there is nothing to close
    with np.errstate(divide="ignore", invalid="ignore"):
        return figure((weights * np.stack(gained, 1)).sum(1) / distance)


def group_of(name: str, measured: Sequence[Measured]) -> dict[str, Any]:
    """A table: a row per dataset, and the totals of those of skill, of form, and of all."""
    rows = [one.row() for one in measured]
    totals = {}
    for kind in ("all", "skill", "form"):
        some = [(one, row) for one, row in zip(measured, rows, strict=True) if kind in ("all", row["kind"])]
        if some and (kind == "all" or len(some) < len(rows)):
            totals[kind] = total_of([one for one, _ in some], [row for _, row in some])
    return {"name": name, "rows": rows, "totals": totals}


def total_of(measured: Sequence[Measured], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several datasets show together."""
    methods = [name for name in METHODS if all(name in one.runs for one in measured)]
    with_answers = [one for one in measured if one.metric != "loss"]
    accuracies = {name: [one.accuracy(name)[0] for one in with_answers] for name in methods}  # type: ignore[index]
    return {
        "datasets": len(rows),
        "mean_loss": {name: float(np.mean([one.loss(name)[0] for one in measured])) for name in methods},
        "mean_accuracy": {name: float(np.mean(found)) for name, found in accuracies.items() if found},
        "closed": {name: closed(measured, name) for name in methods if name not in ("base", "own")},
        "closed_accuracy": {
            name: closed(with_answers, name, "accuracy") for name in methods if name not in ("base", "own")
        },
        "closed_by_seed": {
            seed: _closed_by(measured, seed)
            for seed in sorted(rows[0]["seeds"])
            if closed(measured, GENERATED)["value"] is not None
        },
        "better_loss": {name: [_sign(row, "loss_difference", name) for row in rows].count(-1) for name in RIVALS},
        "worse_loss": {name: [_sign(row, "loss_difference", name) for row in rows].count(1) for name in RIVALS},
        "better_accuracy": {
            name: [_sign(row, "accuracy_difference", name) for row in rows].count(1) for name in RIVALS
        },
        "worse_accuracy": {
            name: [_sign(row, "accuracy_difference", name) for row in rows].count(-1) for name in RIVALS
        },
        "better_than_all": {
            "loss": sum(all(_sign(row, "loss_difference", name) < 0 for name in RIVALS) for row in rows),
            "accuracy": sum(all(_sign(row, "accuracy_difference", name) > 0 for name in RIVALS) for row in rows),
        },
        "without_prompts": [row["dataset"] for row in rows if not row["uses_prompts"]],
    }


def _sign(row: dict[str, Any], key: str, name: str) -> int:
    """On which side of zero the whole interval of a row's difference lies: -1, 1, or 0 where zero is in it."""
    span = row[key][name]["interval"] if name in row[key] else None
    return 0 if span is None else -1 if span[1] < 0 else 1 if span[0] > 0 else 0


def _closed_by(measured: Sequence[Measured], seed: str) -> float:
    """The share of the loss that the generators of one seed close."""
    gained = sum(one.loss("base")[0] - one.loss(GENERATED, seed)[0] for one in measured)
    return float(gained / sum(one.loss("base")[0] - one.loss("own")[0] for one in measured))


def identity_of(plan: Plan, options: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark was measured on and with: the keys of benchmark.json that decide its figures."""
    some = next(iter(plan.chosen.values())).manifest
    return {
        "base_model": some.base_name,
        "rank": some.rank,
        "settings": {key: value for key, value in asdict(plan.wanted).items() if key != "baselines"},
        "baselines": list(plan.wanted.baselines),
        "generator": deciding(options),
        "collections": {one.name: one.manifest.sha256 for one in plan.chosen.values()},
    }


def content_of(
    plan: Plan, options: dict[str, Any], parts: dict[str, dict[str, Any]], folds: list[dict[str, Any]]
) -> dict[str, Any]:
    """The benchmark as benchmark.json has it.

    Args:
        plan: what was measured.
        options: those of the generators.
        parts: by dataset, what is the same in all folds.
        folds: the parts of the folds.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for fold in folds:
        for dataset, part in fold["datasets"].items():
            groups.setdefault(fold["group"], {}).setdefault(dataset, [parts[dataset]]).append(part)
    content = {
        "format": benchmark_page.FORMAT,
        **identity_of(plan, options),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "devices": sorted({part["device"] for part in (*parts.values(), *folds)}),
        "dtypes": sorted({dtype for part in (*parts.values(), *folds) for dtype in part["inputs"]["dtype"].values()}),
        "groups": [
            group_of(name, [Measured(found, plan.families[dataset]) for dataset, found in by_dataset.items()])
            for name, by_dataset in groups.items()
        ],
    }
    return sealed(content)
