"""What `make evaluate GENERATED=folder` does: scores adapters that are no collections, as checkpoints are scored.

The scores of a dataset's adapters stand in scores.json beside them, written when all are scored. The text around the
prompts is that of the collections of the same base model, on whose rows the adapters are scored.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paragen.collection import (
    adapter_folders,
    evaluation,
    index,
    manifest_kinds,
    manifest_recipe,
    run_identity,
    sealed_json,
)
from paragen.collection.adapter_folders import Samples
from paragen.collection.manifest import Manifest, require_manifest, sealed
from paragen.common import cli, files, locks, paths, settings
from paragen.common.cli import UserError, say
from paragen.dataset import dataset_info, names
from paragen.model import base_models
from paragen.scoring import evaluate, questions
from paragen.scoring.questions import Split
from paragen.training import llamafactory_output

if TYPE_CHECKING:
    from paragen.scoring.base_model import BaseModel

SCORES = "scores.json"  # beside the samples of a dataset
FORMAT = "paragen-generated-scores-1"
KINDS = {"evaluations": manifest_kinds.LIST}  # of the values in it that are read
NOT_TAKEN = ("CATEGORY", "RANK", "SEED", "STEPS")  # settings of `make evaluate` that select collections alone


class Plan(NamedTuple):
    """Which adapters to score on which rows."""

    samples: Samples
    manifest: Manifest  # of a collection of their base model, whose recipe tells how it reads text
    split: Split
    limit: int | None  # how many of the split's first rows; None: all

    def __str__(self) -> str:
        return f"{paths.relative(self.samples.folder)} on {self.split.name}"


def score_all(top: Path) -> None:
    """Score the adapters below a folder, of the datasets that DATASET names, and print a table.

    Raises UserError for settings that do not go with GENERATED, and for adapters that cannot be scored; those of other
    datasets that were scored before keep their scores.
    """
    for name in NOT_TAKEN:
        if settings.text(name):
            raise UserError(f"{name}={settings.text(name)}: selects collections; GENERATED takes DATASET and MODEL")
    settings.number("LIMIT")
    found = adapter_folders.find(top, settings.values("DATASET"))
    known = collections_of_bases()
    plans, base, rows = [plan_for(one, known) for one in found], None, []
    for plan in plans:
        base, content = score(plan, base)
        rows.append(row_of(plan, content))
    head = ("adapters", "trained on it", "on", "rows", "metric", "base", "best", "worst")
    cli.print_table(head, rows)


def collections_of_bases() -> dict[str, list[Manifest]]:
    """The manifests of all collections that have a recipe, by the folder of their base model."""
    table, _ = index.update()
    found: dict[str, list[Manifest]] = {}
    for name in dict.fromkeys(table["collection"].to_pylist()):
        manifest = require_manifest(paths.SAVES / name)
        if manifest.recipe is not None and manifest.base_name:
            found.setdefault(manifest.base_name, []).append(manifest)
    return found


def plan_for(samples: Samples, known: dict[str, list[Manifest]]) -> Plan:
    """On which rows a dataset's adapters are scored. Raises UserError where that is not known.

    Args:
        samples: the adapters.
        known: what `collections_of_bases` returned.
    """
    info = dataset_info.read_info(paths.DATA)
    dataset = paths.choose(samples.dataset, [name for name in info if not names.split_in(name)], "registered dataset")
    alike = known[base_of(samples, known)]
    own = [manifest for manifest in alike if manifest.dataset == dataset]
    requested = settings.text("SPLIT")
    split = questions.split_for(own[0], requested) if own else questions.split_of(dataset, requested)
    manifest = own[0] if own else one_reading(samples, alike)
    return Plan(samples, manifest, *evaluate.limited(split, settings.number("LIMIT")))


def base_of(samples: Samples, known: dict[str, list[Manifest]]) -> str:
    """The folder of the base model that adapters are for: as generated.json, MODEL or adapter_config.json names it.

    Raises UserError where no collection has it.
    """
    place, typed = paths.relative(samples.folder), settings.values("MODEL")
    if samples.record is not None:
        name, sha256 = (samples.record["base_model"].get(key) for key in ("name", "sha256"))
        for manifest in known.get(str(name), []):
            if manifest.base_model is not None and manifest.base_model.sha256 == sha256:
                return str(name)
        raise UserError(f"{place}: no collection here has its base model {name}, which tells how prompts are read")
    if typed:
        shorts = {base_models.short_name(Path(name)): name for name in known}
        return shorts[paths.choose(typed[0], shorts, "collected model")]
    stated = str(samples.config.get("base_model_name_or_path") or "")
    for name, manifests in known.items():
        hubs = {manifest.base_model.hub_id for manifest in manifests if manifest.base_model is not None}
        if stated and (stated in hubs or Path(stated).name == name):
            return name
    raise UserError(
        f"{place}: is for the base model {stated!r}, of which there is no collection here that tells how prompts are "
        f"read; MODEL= names one of {', '.join(sorted(known)) or 'none yet'}"
    )


def one_reading(samples: Samples, alike: list[Manifest]) -> Manifest:
    """A collection of a base model whose recipe tells how it reads text, where all of them tell the same.

    Raises UserError where they differ.
    """

    def reading(manifest: Manifest) -> dict[str, Any]:
        recipe = manifest.recipe or {}
        return manifest_recipe.text_settings(recipe) | manifest_recipe.loading_settings(recipe, manifest.run)

    other = next((one for one in alike if reading(one) != reading(alike[0])), None)
    if other is not None:
        raise UserError(
            f"{paths.relative(samples.folder)}: there is no collection of {samples.dataset}, and those of "
            f"{alike[0].dataset} and {other.dataset} read text differently; collect {samples.dataset} to score it"
        )
    return alike[0]


def score(plan: Plan, base: "BaseModel | None") -> "tuple[BaseModel | None, dict[str, Any]]":
    """Score a dataset's adapters unless they are scored already.

    Args:
        plan: which, and on which rows.
        base: the base model that was loaded last.

    Returns the base model that is loaded now, and the evaluation. Raises UserError where another process scores them,
    where their scores are of other adapters or rows, and for adapters that cannot be scored.
    """
    folder, metric = plan.samples.folder, plan.split.metric
    try:
        with locks.lock(files.beside(folder, evaluate.LOCK)):
            old, new = read(folder), evaluate.new_entry(plan.split, metric, plan.limit)
            del new["checkpoints"]
            there = next((one for one in old if evaluate.rows_key(one) == evaluate.rows_key(new)), None)
            if there is not None and not run_identity.force_requested():
                check_fresh(plan, there, new)
                say(f"scored already: {plan}, {len(plan.samples.names)} adapters")
                return base, there
            say(f"scoring {plan}: {new['rows']} rows, the base and {len(plan.samples.names)} adapters")
            tensors = [plan.samples.tensors(name) for name in plan.samples.names]
            llamafactory_output.reduce()
            from paragen.scoring import base_model, collection_scorer  # import torch: after the device is pinned

            base = base_model.base_for(plan.manifest, base)
            scores = collection_scorer.score_adapters(
                [None, *tensors], plan.samples.config, base, plan.split, metric, paths.relative(folder)
            )
            new |= evaluate.computed_by(base) | {"base": scores[0].score, "adapters": plan.samples.hashes}
            pairs = zip(plan.samples.names, scores[1:], strict=True)
            new["samples"] = [{"sample": name, **one.score} for name, one in pairs]
            write(plan, [*(one for one in old if one is not there), new])
            return base, new
    except locks.Busy:
        raise UserError(f"{plan}: another process is scoring it; wait for it") from None


def check_fresh(plan: Plan, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise UserError where scores are of other adapters, rows or settings than those requested."""
    changed = ["the adapters"] if old["adapters"] != plan.samples.hashes else []
    if changed := changed + evaluate.list_changes(old, new):
        raise UserError(f"{plan}: its scores are stale, changed since: {', '.join(changed)}; FORCE=1 scores again")


def read(folder: Path) -> list[dict[str, Any]]:
    """The evaluations in a dataset's scores.json, none without it. Each is as evaluation.read describes it, but has
    `samples` (a score each, with the sample's name) and `adapters` (the hashes of their files) in place of checkpoints.

    Raises UserError where the file is broken or was edited.
    """
    path, way_out = folder / SCORES, "remove it and score again"
    content = sealed_json.read(path, FORMAT, KINDS, way_out) or {"evaluations": []}
    for one in content["evaluations"]:
        fault = evaluation.fault_of(one, "samples")
        if fault is None and not (
            isinstance(one.get("adapters"), dict) and all("sample" in each for each in one["samples"])
        ):
            fault = "holds an evaluation that does not name its adapters"
        if fault:
            raise UserError(f"{paths.relative(path)}: {fault}; {way_out}")
    return content["evaluations"]


def write(plan: Plan, evaluations: list[dict[str, Any]]) -> None:
    """Write a dataset's scores.json, whole or not at all."""
    record = plan.samples.record or {}
    content = {
        "format": FORMAT, "dataset": plan.samples.dataset, "training": plan.samples.training,
        "training_tasks": record.get("seen"), "generator": record.get("generator"), "text_of": plan.manifest.run,
        "evaluations": evaluations,
    }  # fmt: skip
    files.write_json(plan.samples.folder / SCORES, sealed(content))


def row_of(plan: Plan, entry: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table that is printed."""
    best = evaluation.best_of({**entry, "checkpoints": entry["samples"]})
    figures = [(evaluation.figure_of(entry, one)[0], one) for one in entry["samples"]]
    known = [(figure, one) for figure, one in figures if figure is not None]
    worst = (max if entry["metric"] == "loss" else min)(known, key=lambda pair: pair[0], default=(None, None))[1]
    texts = [evaluation.text_of(entry, one) for one in (entry["base"], best, worst)]
    return (
        paths.relative(plan.samples.folder), plan.samples.training, entry["split"], str(entry["rows"]),
        entry["metric"], *texts,
    )  # fmt: skip
