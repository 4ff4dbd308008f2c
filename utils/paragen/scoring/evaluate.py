"""What `make evaluate` does for one collection: which rows and checkpoints to score, and its evaluation.json.

evaluation.json is written after every few checkpoints, so that an interrupted run continues where it stopped.
"""

import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from paragen.collection import evaluation, prompts, run_identity
from paragen.collection.index import Chosen
from paragen.collection.manifest import read_manifest
from paragen.common import cli, devices, files, locks, settings
from paragen.common.cli import UserError, say
from paragen.exports import peft
from paragen.scoring import questions
from paragen.scoring.questions import Question, Split
from paragen.training import llamafactory_output

if TYPE_CHECKING:
    from paragen.scoring.base_model import BaseModel
    from paragen.scoring.checkpoint_scores import CheckpointScore

ENGINE = "packed"  # what computes scores, as evaluation.json names it
LOCK = "evaluation.lock"  # beside a collection while it is scored
BASE = evaluation.BASE
PACKAGES = ("llamafactory", "transformers", "torch", "math-verify")


class Plan(NamedTuple):
    """What to score of a collection."""

    chosen: Chosen
    split: Split
    metric: str
    limit: int | None  # how many of the split's first rows; None: all
    steps: list[int]  # BASE, and the requested checkpoints

    def __str__(self) -> str:
        return f"{self.chosen.name} on {self.split.name}"


def check_requested() -> None:
    """Raise UserError for values of LIMIT, STEPS or SPLIT with which no collection can be scored."""
    settings.number("LIMIT")
    peft.selected([], requested_steps())
    if split := settings.text("SPLIT"):
        prompts.registered(split)


def requested_steps() -> str:
    """Which checkpoints STEPS requests."""
    return settings.text("STEPS") or "all"


def plan_for(chosen: Chosen) -> Plan:
    """What SPLIT, LIMIT and STEPS request of a collection. Raises UserError where that cannot be scored."""
    manifest = chosen.manifest
    if manifest.recipe is None:
        raise UserError(
            f"{chosen.name}: its manifest has no recipe (it was made from a stock run), so it is unknown how it reads "
            "text; collect it here to score it"
        )
    split, limit = limited(questions.split_for(manifest, settings.text("SPLIT")), settings.number("LIMIT"))
    entries = peft.selected(manifest.checkpoints, requested_steps())
    steps = [BASE, *(entry.step for entry in entries)]
    return Plan(chosen, split, split.metric, limit, steps)


def limited(split: Split, limit: int | None) -> tuple[Split, int | None]:
    """A split's first rows, and how many they are: None where they are all."""
    if limit is not None and limit >= len(split.rows):
        limit = None
    return questions.first_rows(split, limit), limit


def score(plan: Plan, base: "BaseModel | None", show: int) -> "BaseModel | None":
    """Compute the scores that a collection's evaluation.json lacks of a plan, and write them into it.

    Args:
        plan: what to score.
        base: the base model that was loaded last; it is used again where the collection has the same.
        show: the number of questions whose answers are printed.

    Returns the base model that is loaded now. Raises UserError where another process is scoring the collection, where
    its evaluation.json has scores of other rows or settings, or where it cannot be scored.
    """
    folder, manifest = plan.chosen.folder, plan.chosen.manifest
    try:
        with locks.lock(files.beside(folder, LOCK)):
            entry = entry_for(plan, evaluation.read(folder, manifest))
            wanted = missing_steps(plan, entry)
            if not wanted:
                more = "; FORCE=1 scores again, and shows answers" if show else ""
                say(f"scored already: {plan}, {len(plan.steps) - 1} checkpoints{more}")
                return base
            say(f"scoring {plan}: {entry['rows']} rows, {len(wanted)} of {len(plan.steps)} models")
            llamafactory_output.reduce()
            from paragen.scoring import base_model, collection_scorer  # import torch: after the device is pinned

            base = base_model.base_for(manifest, base)
            entry |= provenance_of(plan, base, entry)
            started = time.monotonic()
            shown: dict[int, CheckpointScore] = {}
            scorer = collection_scorer.CollectionScorer(plan.chosen, base, plan.split, plan.metric)
            for scores in unless_replaced(plan, scorer.scores(wanted)):
                add_scores(entry, scores)
                save(plan, entry)
                left = len(missing_steps(plan, entry))
                say(f"  {len(plan.steps) - left} of {len(plan.steps)} scored, {time.monotonic() - started:.0f} s")
                shown |= {step: one for step, one in scores.items() if step in (BASE, plan.steps[-1])}
            show_answers(scorer.questions[:show], shown)
            return base
    except locks.Busy:
        raise UserError(f"{plan}: another process is scoring it; wait for it") from None


def entry_for(plan: Plan, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation to add scores to: the existing one of the same rows, or a new one (with FORCE=1 always).

    Args:
        plan: what to score.
        entries: the evaluations in evaluation.json.

    Raises UserError where the existing one's rows have changed or its settings are others.
    """
    new = new_entry(plan.split, plan.metric, plan.limit)
    old = next((one for one in entries if rows_key(one) == rows_key(new)), None)
    if old is None or run_identity.force_requested():
        return new
    if changed := list_changes(old, new):
        raise UserError(f"{plan}: its scores are stale, changed since: {', '.join(changed)}; FORCE=1 scores again")
    return old


def new_entry(split: Split, metric: str, limit: int | None) -> dict[str, Any]:
    """An evaluation without scores, as evaluation.json has it.

    Args:
        split: the rows that are scored.
        metric: a key of evaluation.METRICS.
        limit: how many of the split's first rows they are; None: all.
    """
    most = evaluation.MOST.get(metric)
    return {
        "split": split.name, "paired": split.paired, "limit": limit, "metric": metric, "rows": len(split.rows),
        "prompts_sha256": files.sha256_of_value(split.texts), "settings": {"max_new_tokens": most} if most else {},
        "engine": ENGINE, "dtype": None, "device": None, "versions": {}, "base": None, "checkpoints": [],
    }  # fmt: skip


def list_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences that make the scores of one evaluation useless for another, a phrase each."""
    rows = ["the rows"] if old["prompts_sha256"] != new["prompts_sha256"] else []
    keys = ("metric", "rows", "settings", "engine")
    return rows + [f"{key} ({old[key]}, now {new[key]})" for key in keys if old[key] != new[key]]


def missing_steps(plan: Plan, entry: dict[str, Any]) -> list[int]:
    """The requested steps that have no score yet."""
    scored = {one["step"] for one in entry["checkpoints"]} | ({BASE} if entry["base"] else set())
    return [step for step in plan.steps if step not in scored]


def has_missing_scores(plan: Plan) -> bool:
    """Whether a collection's evaluation.json lacks scores of a plan. Raises UserError where they are stale."""
    entries = evaluation.read(plan.chosen.folder, plan.chosen.manifest)
    return bool(missing_steps(plan, entry_for(plan, entries)))


def provenance_of(plan: Plan, base: "BaseModel", entry: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's dtype, device and package versions.

    Raises UserError where its existing scores were computed in another dtype.
    """
    found = computed_by(base)
    if entry["dtype"] not in (None, found["dtype"]):
        raise UserError(
            f"{plan}: {len(missing_steps(plan, entry))} models are to be scored in {found['dtype']}, the others were "
            f"in {entry['dtype']} ({entry['device']}); go on there, or score all again with FORCE=1"
        )
    return found


def computed_by(base: "BaseModel") -> dict[str, Any]:
    """The dtype, device and package versions that scores are computed with now."""
    versions = {name: version(name) for name in PACKAGES}
    return {
        "dtype": str(base.dtype).removeprefix("torch."), "device": devices.describe(), "versions": versions
    }  # fmt: skip


def add_scores(entry: dict[str, Any], scores: "dict[int, CheckpointScore]") -> None:
    """Put new scores into an evaluation."""
    by_step = {one["step"]: one for one in entry["checkpoints"]}
    for step, one in scores.items():
        if step == BASE:
            entry["base"] = one.score
        else:
            by_step[step] = {"step": step, **one.score}
    entry["checkpoints"] = [by_step[step] for step in sorted(by_step)]


def save(plan: Plan, entry: dict[str, Any]) -> None:
    """Write an evaluation into its collection's evaluation.json, beside those of other rows.

    Raises UserError where the collection has been replaced meanwhile.
    """
    folder = plan.chosen.folder
    with locks.lock(files.beside(folder, "lock"), waiting=f"waiting for what is at work on {plan.chosen.name}"):
        check_same(plan)
        files.remove_unfinished(folder / evaluation.FILE)
        others = [one for one in evaluation.read(folder, plan.chosen.manifest) if rows_key(one) != rows_key(entry)]
        evaluation.write(folder, plan.chosen.manifest, [*others, entry])


def unless_replaced(plan: Plan, groups: Iterator[Any]) -> Iterator[Any]:
    """The groups. Where they end with an error and the collection was replaced meanwhile, that becomes the error."""
    try:
        yield from groups
    except UserError:
        check_same(plan)
        raise


def check_same(plan: Plan) -> None:
    """Raise UserError where the collection is no longer the one that is being scored."""
    manifest = read_manifest(plan.chosen.folder)
    if manifest is None or manifest.sha256 != plan.chosen.manifest.sha256:
        raise UserError(f"{plan}: the collection was replaced while it was scored; score it again")


def rows_key(entry: dict[str, Any]) -> tuple:
    """A key that is equal for evaluations of the same rows."""
    return entry["split"], entry["limit"]


def show_answers(first_questions: list[Question], scores: "dict[int, CheckpointScore]") -> None:
    """Print answers to the first questions.

    Args:
        first_questions: those of the split.
        scores: the models whose answers are printed, by step.
    """
    for number, question in enumerate(first_questions):
        print(f"\n{question.prompt}\n  right:      {question.response}")
        for step, one in sorted(scores.items()):
            name = "base" if step == BASE else f"step {step}"
            print(f"  {name + ':':11} {' '.join(one.answers[number].split())}")


def show_scores(plans: list[Plan]) -> None:
    """Print a line per collection: the scores of its base, its best and its last checkpoint."""
    rows = []
    for plan in plans:
        entries = evaluation.read(plan.chosen.folder, plan.chosen.manifest)
        entry = next(one for one in entries if rows_key(one) == (plan.split.name, plan.limit))
        last, best = entry["checkpoints"][-1], evaluation.best_of(entry)
        texts = [evaluation.text_of(entry, one) for one in (entry["base"], best, last)]
        if best is not None:
            texts[1] += f" at step {best['step']}"
        rows.append((plan.chosen.name, entry["split"], str(entry["rows"]), entry["metric"], *texts))
    if rows:
        cli.print_table(("collection", "on", "rows", "metric", "base", "best", "last"), rows)
